"""Pictures of chosen rows: what each pick gained, and where the picks lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flashcoreset._core.results import Coreset, Selection
from flashcoreset._core.tensor import as_vector
from flashcoreset.plot.style import BLUE, DARK, LIGHT, ORANGE, axes, grid, in_two_dimensions, whole_numbers

_ROUNDING = 1e-5  # of the largest gain: a rise below it is none
_MOST_LINES = 20_000  # lines from points to picks; more are a grey area


def elbow(gains: Any) -> int | None:
    """The number of picks after which further ones gain little: the elbow of a curve of falling gains.

    The gains from the second pick on are scaled to [0, 1], and so are their numbers; the elbow is the pick farthest below the line
    from the first to the last of them. The first pick is left out, since its gain is measured from nothing.

    Args:
        gains: [k] numbers, what each pick gained, in the order of picking.

    Returns:
        The number of picks, or None where there is no elbow: gains that rise (groups and costs make such), that are all alike, that fall
        along a line or above one, or that are fewer than four.

    Raises:
        TypeError: for a wrong type.
        ValueError: for a wrong shape, NaN and infinity.

    Source: Satopaa, Albrecht, Irwin and Raghavan, "Finding a 'kneedle' in a haystack", ICDCS workshops 2011, without smoothing and with the
    whole curve known.

    Example:
        >>> import flashcoreset as fc
        >>> fc.plot.elbow([100, 9, 8, 7, 1, 0.9, 0.8])
        5
    """
    values = as_vector(gains, "gains", torch.device("cpu"), integers=False).double().numpy()
    if not np.isfinite(values).all():
        raise ValueError("gains must be finite, got NaN or infinity")
    rest = values[1:]
    if len(rest) < 3 or not (np.diff(rest) <= _ROUNDING * np.abs(values).max()).all() or rest[0] == rest[-1]:
        return None
    heights = (rest - rest[-1]) / (rest[0] - rest[-1])
    below = 1 - np.linspace(0, 1, len(rest)) - heights
    place = int(below.argmax())
    return place + 2 if below[place] > 1e-9 else None


def gains(selection: Selection, *, ax: Any = None) -> Any:
    """Draws what each pick gained, from the second on, and the elbow after which further picks gain little.

    The gain of the first pick is written instead: it is measured from nothing and would hide all others.

    Args:
        selection: what `facility_location` or `match_gradients` returned, of at least two picks.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes. The elbow is that of `plot.elbow`; where that is None (gains of groups rise again), none is marked.

    Raises:
        TypeError: if `selection` is no Selection, or `ax` no Axes.
        ValueError: if there are fewer than two picks.
        ImportError: without matplotlib.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> fc.plot.gains(fc.facility_location(x, 20)).get_xlabel()
        'picks'
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}")
    if len(selection.gains) < 2:
        raise ValueError(f"selection must have at least 2 picks, got {len(selection.gains)}")
    ax = axes(ax, "gains")
    values = selection.gains.detach().cpu().double().numpy()
    numbers = np.arange(2, len(values) + 1)
    ax.plot(numbers, values[1:], color=BLUE, marker="o" if len(values) <= 60 else None, markersize=3)
    found = elbow(selection.gains)
    if found is not None:
        share = values[found:].sum() / values[1:].sum()
        ax.axvline(found, color=ORANGE, linestyle="--")
        ax.plot(
            [found],
            [values[found - 1]],
            color=ORANGE,
            marker="o",
            linestyle="",
            label=f"elbow: {found} picks; later ones gain {100 * share:.0f} % of what is drawn",
        )
        ax.legend(edgecolor="none", framealpha=1)
    ax.set(xlabel="picks", ylabel="gain of the pick")
    first = f"{values[0]:,.0f}" if abs(values[0]) >= 1000 else f"{values[0]:.4g}"
    ax.set_title(f"the first pick gains {first}", fontsize="medium", loc="left", color=DARK)
    ax.set_ylim(bottom=min(0.0, float(values[1:].min())))
    whole_numbers(ax.xaxis)
    grid(ax)
    return ax


def coverage(points: Any, chosen: Any, *, clients: Any = None, ax: Any = None) -> Any:
    """Draws a map of embeddings in two dimensions with the picks, as large as what each stands for.

    Points of more than two dimensions are drawn by their first two principal components. If `chosen` is a `Selection` whose assignment
    belongs to the points, a line leads from each point to the pick that serves it.

    Args:
        points: [n, d] numbers, what was chosen from.
        chosen: a `Selection`, a `Coreset`, or the indices [k] of the picks in `points`.
        clients: [m, d] the clients of the choice, if they are other points; they are drawn too.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN and infinity, and picks that are no rows of `points`.
        ImportError: without matplotlib.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        >>> fc.plot.coverage(x, fc.facility_location(x, 20)).get_title()
        '20 of 200 points'
    """
    sets = {"points": points} if clients is None else {"points": points, "clients": clients}
    places, labels = in_two_dimensions(sets)
    indices, weights, assignment = _picks(chosen, len(places[0]))
    served = places[-1]
    ax = axes(ax, "coverage")
    picked = places[0][indices]
    if assignment is not None and len(assignment) == len(served):
        lines = _lines(served, picked, assignment)
        if lines is not None:
            ax.add_collection(lines)
    size = 8 if len(places[0]) <= 5000 else 2
    ax.scatter(
        *places[0].T, s=size, color=LIGHT, linewidths=0, label="points", rasterized=len(places[0]) > 5000
    )
    if clients is not None:
        ax.scatter(*served.T, s=12, color=ORANGE, marker="x", linewidths=0.8, label="clients")
    mean = weights.mean() or 1.0
    ax.scatter(
        *picked.T,
        s=np.clip(30 * weights / mean, 8, 300),
        color=BLUE,
        edgecolors="white",
        linewidths=0.6,
        label="picks",
        zorder=3,
    )
    ax.set(xlabel=labels[0], ylabel=labels[1], title=f"{len(indices):,} of {len(places[0]):,} points")
    for handle in ax.legend(frameon=False).legend_handles:
        handle.set_sizes([30])
    return ax


def _lines(points: np.ndarray, picked: np.ndarray, assignment: np.ndarray) -> Any:
    """Lines from points to the picks that serve them, or None if there are too many to see."""
    from matplotlib.collections import LineCollection

    served = np.flatnonzero(assignment >= 0)
    if len(served) > _MOST_LINES:
        return None
    ends = np.stack([points[served], picked[assignment[served]]], 1)
    return LineCollection(list(ends), colors=LIGHT, linewidths=0.4, alpha=0.6, zorder=0)


def _picks(chosen: Any, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The indices [k] of the picks, their weights [k], and for each client the place of its pick, if that is known."""
    assignment = None
    if isinstance(chosen, (Selection, Coreset)):
        indices = chosen.indices.cpu().numpy()
        weights = chosen.weights.detach().cpu().double().numpy()
        if isinstance(chosen, Selection):
            assignment = chosen.assignment.cpu().numpy()
    else:
        indices = as_vector(chosen, "chosen", torch.device("cpu"), integers=True).numpy()
        weights = np.ones(len(indices))
    if len(indices) == 0:
        raise ValueError("chosen must have at least 1 pick, got none")
    if indices.min() < 0 or indices.max() >= n:
        raise ValueError(
            f"chosen must hold rows of the {n} points, got indices from {indices.min()} to {indices.max()}"
        )
    return indices, weights, assignment
