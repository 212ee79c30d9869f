"""Pictures of results; matplotlib is imported when one is drawn."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from flashcoreset._core.imports import imported
from flashcoreset._core.results import Coreset


def descent(coreset: Coreset, ax: Any = None) -> Any:
    """Draws the score of a `goracs` coreset against the number of exchanges; with labels one curve per class.

    Args:
        coreset: what `goracs` returned.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: if `coreset` is no Coreset.
        ValueError: if its `info` holds no scores of exchanges.
        ImportError: without matplotlib.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> train = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
        >>> coreset = fc.goracs(train, torch.tensor([[0.5], [1.5], [9.5], [10.5]]), torch.ones(5), 2)
        >>> fc.plot.descent(coreset).get_xlabel()
        'exchanges'
    """
    if not isinstance(coreset, Coreset):
        raise TypeError(f"coreset must be a Coreset, got {type(coreset).__name__}")
    classes = coreset.info.get("classes", {None: coreset.info})
    if not all({"scores", "exchanges"} <= info.keys() for info in classes.values()):
        raise ValueError(
            f"coreset must be one that goracs returned, whose info has scores and exchanges, got info with "
            f"{', '.join(coreset.info) or 'nothing'}"
        )
    ax = _axes(ax, "descent")
    for label, info in classes.items():
        ax.plot(
            info["exchanges"],
            info["scores"],
            drawstyle="steps-post",
            marker="o",
            markersize=3,
            label=None if label is None else f"class {label}",
        )
    ax.set_xlabel("exchanges")
    ax.set_ylabel("transport cost")
    ax.grid(visible=True, alpha=0.3)
    if "classes" in coreset.info:
        ax.legend(frameon=False)
    return ax


def strata(coreset: Coreset, ax: Any = None) -> Any:
    """Draws the histogram of the scores behind a `ccs` coreset, one bar per stratum, and what was taken from each.

    Args:
        coreset: what `ccs` returned, without `groups`.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: if `coreset` is no Coreset.
        ValueError: if its `info` holds no strata.
        ImportError: without matplotlib.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> coreset = fc.ccs(torch.randn(500, generator=torch.Generator().manual_seed(0)), 100, n_strata=20)
        >>> fc.plot.strata(coreset).get_ylabel()
        'samples'
    """
    if not isinstance(coreset, Coreset):
        raise TypeError(f"coreset must be a Coreset, got {type(coreset).__name__}")
    if not {"edges", "sizes", "counts"} <= coreset.info.keys():
        raise ValueError(
            f"coreset must be one that ccs returned without groups, whose info has strata, got info with "
            f"{', '.join(coreset.info) or 'nothing'}"
        )
    ax = _axes(ax, "strata")
    edges = coreset.info["edges"]
    widths = [right - left for left, right in pairwise(edges)]
    for name, colour, label in (("sizes", "#BBBBBB", "left out"), ("counts", "#0072B2", "taken")):
        ax.bar(edges[:-1], coreset.info[name], width=widths, align="edge", color=colour, label=label)
    ax.set_xlabel("score")
    ax.set_ylabel("samples")
    ax.legend(frameon=False)
    return ax


def _axes(ax: Any, function: str) -> Any:
    """`ax`, or those of a new figure."""
    try:
        plt = imported("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            f"plot.{function} needs matplotlib ({error}); install it with pip install 'flashcoreset[demo]'"
        ) from error
    return plt.subplots(layout="constrained")[1] if ax is None else ax
