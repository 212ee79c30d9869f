"""Pictures of optimal transport: the plan, and the way from one set of points to the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flashcoreset._core.tensor import as_number
from flashcoreset.plot.style import BLUE, LIGHT, ORANGE, axes, in_two_dimensions
from flashcoreset.sinkhorn import Transport

_MOST_CELLS = 400  # rows and columns that are drawn; a larger plan's cells are summed


def plan(transport: Transport, *, problem: int | None = None, ax: Any = None) -> Any:
    """Draws a transport plan: how much mass each row sends to each column, on a logarithmic scale of six decades.

    Of a plan with more than 400 rows or columns, neighbouring cells are summed.

    Args:
        transport: what `sinkhorn` returned.
        problem: which problem of a batch.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: if `problem` is missing for a batch, is given without one, or is out of range.
        ImportError: without matplotlib.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> x, y = torch.rand(2, 30, 2, generator=torch.Generator().manual_seed(0))
        >>> fc.plot.plan(fc.sinkhorn(x, y, reg=0.05)).get_ylabel()
        'rows of x'
    """
    masses = _plan_of(transport, problem).detach().cpu().double().numpy()
    ax = axes(ax, "plan")
    from matplotlib.colors import LogNorm

    rows, columns = masses.shape
    drawn = _summed(_summed(masses, _MOST_CELLS).T, _MOST_CELLS).T
    most = float(drawn.max()) or 1.0
    picture = ax.imshow(
        drawn,
        norm=LogNorm(most * 1e-6, most, clip=True),
        cmap="Blues",
        aspect="auto",
        interpolation="nearest",
        extent=(0, columns, rows, 0),
    )
    ax.figure.colorbar(picture, ax=ax, label="mass", extend="min")
    ax.set(xlabel="rows of y", ylabel="rows of x")
    return ax


def interpolation(
    transport: Transport,
    x: Any,
    y: Any,
    *,
    problem: int | None = None,
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    ax: Any = None,
) -> Any:
    """Draws the points of x on their way to y: at time t, (1 - t) x_i + t times the mean of the y that row i of the plan leads to.

    Args:
        transport: what `sinkhorn` returned for these points.
        x: [n, d] points; of more than two dimensions, the first two principal components of both sets are drawn.
        y: [m, d] points, drawn as crosses.
        problem: which problem of a batch; `x` and `y` are its points.
        times: when the points are drawn, from 0 to 1.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for shapes that do not belong to the plan, NaN and infinity, no times or times outside [0, 1], and `problem` as in
            `plot.plan`.
        ImportError: without matplotlib.

    Source: McCann's displacement interpolation, by the barycentric projection of the plan.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> x, y = torch.rand(2, 30, 2, generator=torch.Generator().manual_seed(0))
        >>> len(fc.plot.interpolation(fc.sinkhorn(x, y + 2, reg=0.05), x, y + 2, times=(0, 0.5)).collections)
        4
    """
    moments = [as_number(t, "times") for t in times]
    if not moments or not all(0 <= t <= 1 for t in moments):
        raise ValueError(f"times must be one or more numbers in [0, 1], got {list(times)}")
    (start, end), labels = in_two_dimensions({"x": x, "y": y})
    masses = _plan_of(transport, problem).detach().cpu().double().numpy()
    if masses.shape != (len(start), len(end)):
        raise ValueError(
            f"x and y must be the points of the plan, which is {masses.shape[0]} x {masses.shape[1]}, got {len(start)} and {len(end)}"
        )
    sums = masses.sum(1)
    moving = np.flatnonzero(sums > 0)  # rows without mass lead nowhere
    begin = start[moving]
    goal = masses[moving] @ end / sums[moving, None]
    ax = axes(ax, "interpolation")
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    ax.add_collection(
        LineCollection(list(np.stack([begin, goal], 1)), colors=LIGHT, linewidths=0.5, zorder=0)
    )
    ax.scatter(*end.T, color="black", marker="x", s=18, linewidths=0.8, label="y", zorder=1)
    blend = LinearSegmentedColormap.from_list("time", [BLUE, ORANGE])
    for t in moments:
        ax.scatter(
            *((1 - t) * begin + t * goal).T, s=12, color=blend(t), linewidths=0, label=f"t = {t:g}", zorder=2
        )
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.set_aspect("equal", adjustable="datalim")
    ax.legend(frameon=False)
    return ax


def _plan_of(transport: Transport, problem: int | None) -> torch.Tensor:
    """The plan [n, m] of one problem."""
    if not isinstance(transport, Transport):
        raise TypeError(f"transport must be a Transport, got {type(transport).__name__}")
    masses = transport.plan()
    if masses.ndim == 2:
        if problem is not None:
            raise ValueError(f"problem must be None where transport holds one problem, got {problem}")
        return masses
    if problem is None:
        raise ValueError(f"problem must be given where transport holds {len(masses)} problems, got None")
    if isinstance(problem, bool) or not isinstance(problem, int):
        raise TypeError(f"problem must be an int or None, got {problem!r} of type {type(problem).__name__}")
    if not 0 <= problem < len(masses):
        raise ValueError(f"problem must be in [0, {len(masses)}), got {problem}")
    return masses[problem]


def _summed(masses: np.ndarray, most: int) -> np.ndarray:
    """`masses` with at most that many rows: of neighbours the sums."""
    if len(masses) <= most:
        return masses
    return np.add.reduceat(masses, np.arange(most) * len(masses) // most, axis=0)
