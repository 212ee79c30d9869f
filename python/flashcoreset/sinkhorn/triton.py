"""Batches of entropic optimal transport, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import Takes
from flashcoreset.pairwise import normalize_rows
from flashcoreset.pairwise.triton import pairwise, panels
from flashcoreset.sinkhorn.schedule import Solution, dual_value, range_fault
from flashcoreset.triton_kernels.pairwise import launch_pairwise
from flashcoreset.triton_kernels.sinkhorn import RUNNING, Problems, Run

__all__ = ["TAKES", "pairwise", "sinkhorn", "sinkhorn_apply", "sinkhorn_plan"]

TAKES = Takes()


# Sinkhorn iterations that are launched between two checks of what is solved.
_ITERATIONS = 10


# Numbers that are checked together for NaN: masks stay small beside the data.
_LOOKED_AT = 1 << 22


def sinkhorn(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    metric: str,
    reg_marginal: tuple[float, float] = (math.inf, math.inf),
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    f: Tensor | None = None,
    g: Tensor | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    report: Callable[[int, int], None] | None = None,
) -> Solution:
    """Solves a batch of problems; see `flashcoreset.sinkhorn.reference` for the definition.

    Args:
        x: [B, n, d] points with `y` [B, m, d], or the costs [B, n, m] with `y` None and metric "precomputed"; float32 or
            float64.
        a: [B, n] float64, and b [B, m]: weights >= 0, of equal sums if both marginals are balanced.
        reg, reg_marginal: eps and (rho_a, rho_b); inf for a balanced marginal.
        metric: "sqeuclidean", "euclidean", "l1", "cosine" or "precomputed".
        x_lengths, y_lengths: [B] int64, the sizes of the problems; None for n and m.
        max_iter, tol: the most iterations and the error to stop at.
        f, g: [B, n] and [B, m] float64 to start from; None starts from 0.
        memory_budget: not used, since costs are never kept.
        report: called with the number of iterations done and their largest possible number, every few iterations.

    Raises:
        ValueError: for NaN or infinity in `x` or `y`, and costs that overflow.
    """
    counts = _counts(x, y, x_lengths, y_lengths)
    _check_problems(x, y, counts)
    start = None if f is None or g is None else (f, g)
    problems = _problems(x, y, metric, counts, start, (a, b))
    spread = _spread(x, y, metric, counts)
    batch = a.shape[0]
    for p, largest in enumerate(spread.tolist()):
        fault = range_fault(largest, reg, metric, x.dtype, f" in problem {p}" if batch > 1 else "")
        if fault is not None:
            raise ValueError(fault)
    run = Run(problems, reg, reg_marginal, tol, max_iter, spread, start is not None)
    state, iterations = [RUNNING.value] * batch, [0] * batch
    while RUNNING.value in state:
        least = min(i for i, s in zip(iterations, state, strict=True) if s == RUNNING.value)
        run.iterate(min(_ITERATIONS, max_iter - least))
        state, iterations = run.look()
        if any(s != RUNNING.value for s in state):
            run.evaluate()
            state, iterations = run.look()
        if report is not None:
            done = sum(i if s == RUNNING.value else max_iter for i, s in zip(iterations, state, strict=True))
            report(done, batch * max_iter)
    f, g = run.potentials()
    value = dual_value(f, g, a, b, run.mass, reg, reg_marginal)
    return Solution(f, g, value, run.cost, run.error, run.iterations, run.error <= run.tolerance)


def sinkhorn_apply(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    *,
    reg: float,
    metric: str,
    transpose: bool = False,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """The products P v [B, n, k] float64 of the plans with potentials f, g for v [B, m, k]; with `transpose` P^T v [B, m, k] for v
    [B, n, k]. Rows beyond a problem's size are 0. `memory_budget` is not used."""
    counts = _counts(x, y, x_lengths, y_lengths)
    return _problems(x, y, metric, counts, (f, g), (a, b)).apply(v.to(x.dtype), reg, transpose)


def sinkhorn_plan(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    *,
    reg: float,
    metric: str,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
) -> Tensor:
    """The plans P [B, n, m] float64 with potentials f, g; 0 beyond a problem's size."""
    counts = _counts(x, y, x_lengths, y_lengths)
    out = torch.zeros(*a.shape, b.shape[1], dtype=torch.float64, device=a.device)
    sizes = torch.stack(counts, 1).tolist()
    for p, (n, m) in enumerate(sizes):
        if y is None:
            costs = x[p, :n, :m]
        else:
            costs = x.new_empty(n, m)
            launch_pairwise(*panels(x[p, :n], y[p, :m], metric), costs, metric)
            costs = 1 - costs if metric == "cosine" else costs
        logs = (f[p, :n, None] + g[p, :m] - costs.double()) / reg + a[p, :n, None].log() + b[p, :m].log()
        torch.exp(logs, out=out[p, :n, :m])
    return out


def _counts(
    x: Tensor, y: Tensor | None, x_lengths: Tensor | None, y_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The numbers of rows and of columns of each problem, [B] int64."""
    sizes = (x.shape[1], x.shape[2] if y is None else y.shape[1])
    rows, columns = (
        torch.full((x.shape[0],), size, dtype=torch.int64, device=x.device)
        if lengths is None
        else lengths.contiguous()
        for size, lengths in zip(sizes, (x_lengths, y_lengths), strict=True)
    )
    return rows, columns


def _inside(count: Tensor, size: int) -> Tensor:
    """A mask [B, size] bool, True for what is not padding."""
    return torch.arange(size, device=count.device) < count[:, None]


def _check_problems(x: Tensor, y: Tensor | None, counts: tuple[Tensor, Tensor]) -> None:
    """Raises ValueError naming the first NaN or infinity that is not in the padding."""
    rows, columns = counts
    if y is None:
        _check_batch(x, "x", rows, columns)
        return
    width = torch.full_like(rows, x.shape[2])
    _check_batch(x, "x", rows, width)
    _check_batch(y, "y", columns, width)


def _check_batch(tensor: Tensor, name: str, rows: Tensor, columns: Tensor) -> None:
    batch, height, _ = tensor.shape
    for begin, values, inside in _row_blocks(tensor, rows, columns):
        bad = ~torch.isfinite(values) & inside
        if bool(bad.any()):
            place, column = bad.nonzero()[0].tolist()
            problem, row = divmod(begin + place, height)
            value = float(values[place, column])
            got = "NaN" if math.isnan(value) else value
            of = f" of problem {problem}" if batch > 1 else ""
            raise ValueError(f"{name} must be finite, got {got} at row {row}, column {column}{of}")


def _row_blocks(tensor: Tensor, rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some rows at a time of all problems of `tensor` [B, n, m], one after the other: the number of the first, the rows
    [r, m], and a mask [r, m] of what is not padding."""
    batch, height, width = tensor.shape
    inside = _inside(rows, height).flatten()
    step = max(1, _LOOKED_AT // width)
    for begin in range(0, batch * height, step):
        numbers = torch.arange(begin, min(begin + step, batch * height), device=tensor.device)
        problem = numbers // height
        mask = inside[numbers, None] & _inside(columns[problem], width)
        yield begin, tensor[problem, numbers % height], mask


def _problems(
    x: Tensor,
    y: Tensor | None,
    metric: str,
    counts: tuple[Tensor, Tensor],
    potentials: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor],
) -> Problems:
    """The problems as the kernels take them; `potentials` are copied, None for 0."""
    if y is not None:
        x, y = (_without_padding(points, count) for points, count in zip((x, y), counts, strict=True))
        if metric == "cosine":
            x, y = (normalize_rows(points.flatten(0, 1)).view_as(points) for points in (x, y))
    rows, columns = (
        torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if potentials is None
        else torch.where(_inside(counts[side], weight.shape[1]), potentials[side], 0).contiguous()
        for side, weight in enumerate(weights)
    )
    return Problems(x, y, metric, counts, (rows, columns), (weights[0].contiguous(), weights[1].contiguous()))


def _without_padding(points: Tensor, count: Tensor) -> Tensor:
    return torch.where(_inside(count, points.shape[1])[:, :, None], points, 0)


def _spread(x: Tensor, y: Tensor | None, metric: str, counts: tuple[Tensor, Tensor]) -> Tensor:
    """The range [B] float64 of each problem's costs; for points at least the largest cost, by the triangle inequality through
    the first column's point."""
    if y is None:
        largest, smallest = [], []
        for _, values, mask in _row_blocks(x, *counts):
            largest.append(torch.where(mask, values, -math.inf).amax(1))
            smallest.append(torch.where(mask, values, math.inf).amin(1))
        high, low = (torch.cat(rows).view(x.shape[:2]) for rows in (largest, smallest))
        return high.amax(1).double() - low.amin(1).double()
    if metric == "cosine":
        return torch.full((x.shape[0],), 2.0, dtype=torch.float64, device=x.device)
    far = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for points, count in zip((x, y), counts, strict=True):
        difference = points - y[:, :1]
        distance = torch.linalg.vector_norm(
            difference, 1 if metric == "l1" else 2, dim=2, dtype=torch.float64
        )
        far += torch.where(_inside(count, points.shape[1]), distance, 0).amax(1)
    return far * far if metric == "sqeuclidean" else far
