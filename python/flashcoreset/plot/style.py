"""What all pictures share: Axes, colours, ticks, and checks of what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcoreset._core.imports import imported
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_matrix

# Okabe and Ito's colours: they differ with any colour vision.
BLUE, ORANGE, SKY, RED, GREEN, PINK = "#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7"
GREY, LIGHT, DARK = "#999999", "#CCCCCC", "#444444"
CYCLE = (BLUE, ORANGE, GREEN, RED, SKY, PINK, GREY)
MARKERS = "os^Dv<>"


def axes(ax: Any, function: str) -> Any:
    """`ax`, or the Axes of a new figure."""
    try:
        plt = imported("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            f"plot.{function} needs matplotlib ({error}); install it with pip install 'flashcoreset[demo]'"
        ) from error
    if ax is None:
        return plt.subplots(layout="constrained")[1]
    if not isinstance(ax, imported("matplotlib.axes").Axes):
        raise TypeError(f"ax must be a matplotlib Axes or None, got {type(ax).__name__}")
    return ax


def coreset_with(coreset: Any, keys: set[str], origin: str) -> Coreset:
    """`coreset`, if it is a Coreset whose info has the `keys`, which those of `origin` have."""
    if not isinstance(coreset, Coreset):
        raise TypeError(f"coreset must be a Coreset, got {type(coreset).__name__}")
    if not keys <= coreset.info.keys():
        raise ValueError(
            f"coreset must be one that {origin}, got info with {', '.join(coreset.info) or 'nothing'}"
        )
    return coreset


def whole_numbers(axis: Any) -> None:
    """Ticks of an axis that counts: at whole numbers."""
    axis.set_major_locator(imported("matplotlib.ticker").MaxNLocator(integer=True))


def grid(ax: Any, axis: str = "both") -> None:
    ax.grid(visible=True, axis=axis, alpha=0.3)
    ax.set_axisbelow(True)


def in_two_dimensions(sets: dict[str, Any]) -> tuple[list[np.ndarray], tuple[str, str]]:
    """Sets of points [n, d] as [n, 2], by their common principal components if d > 2, and the names of the two axes.

    Args:
        sets: the points by the name of their argument.
    """
    arrays = [as_matrix(value, name).detach().cpu().double().numpy() for name, value in sets.items()]
    names = list(sets)
    columns = arrays[0].shape[1]
    for name, array in zip(names, arrays, strict=True):
        if array.shape[1] != columns:
            raise ValueError(f"{name} must have {columns} columns as {names[0]} has, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if columns == 1:
        return [np.column_stack([array[:, 0], np.zeros(len(array))]) for array in arrays], ("value", "")
    if columns == 2:
        return arrays, ("first coordinate", "second coordinate")
    everything = np.concatenate(arrays)
    center = everything.mean(0)
    # The principal components: of the covariance if there are more points than columns, which is smaller then.
    centred = everything - center
    if len(centred) >= columns:
        _, directions = np.linalg.eigh(centred.T @ centred)
        directions = directions[:, :-3:-1]
    else:
        directions = np.linalg.svd(centred, full_matrices=False)[2][:2].T
    # A component's sign is arbitrary: its largest entry is positive.
    places = np.abs(directions).argmax(0)
    directions = directions * np.sign(directions[places, range(directions.shape[1])])
    if directions.shape[1] == 1:
        directions = np.column_stack([directions, np.zeros(columns)])
    total = float((centred**2).sum()) or 1.0
    shares = [float(((centred @ direction) ** 2).sum()) / total for direction in directions.T]
    labels = [
        f"principal component {i + 1} ({100 * share:.0f} % of the variance)" for i, share in enumerate(shares)
    ]
    return [(array - center) @ directions for array in arrays], (labels[0], labels[1])
