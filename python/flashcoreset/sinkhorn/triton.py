"""Batches of entropic optimal transport, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.pairwise import normalize_rows
from flashcoreset.pairwise.triton import pairwise, panels
from flashcoreset.sinkhorn.problem import Problem, Result, inside, masked
from flashcoreset.sinkhorn.schedule import dual_value, ordered_sums, range_fault
from flashcoreset.triton_kernels.pairwise import launch_pairwise
from flashcoreset.triton_kernels.sinkhorn import RUNNING, Batch, Run

__all__ = ["TAKES", "pairwise", "sinkhorn", "sinkhorn_apply", "sinkhorn_plan", "workspace"]

TAKES = Takes()


# Sinkhorn iterations that are launched between two checks of what is solved.
_ITERATIONS = 10


# Numbers that are checked together for NaN: masks stay small beside the data.
_LOOKED_AT = 1 << 22


def sinkhorn(problem: Problem, report: Callable[[int, int], None] | None = None) -> Result:
    """Solves a batch of problems; see `Problem` and `Kernels.sinkhorn`. `report` is called every few iterations; `memory_budget` is
    not used, since costs are never kept."""
    x, max_iter = problem.x, problem.max_iter
    counts = _counts(problem)
    _check_values(problem, counts)
    spread = _spread(problem, counts)
    batch = problem.sizes[0]
    for p, largest in enumerate(spread.tolist()):
        within = problem.within(p).replace(" of", " in", 1)
        fault = range_fault(largest, problem.reg, problem.metric, x.dtype, within)
        if fault is not None:
            raise ValueError(fault)
    prepared = _batch(problem, counts)
    run = Run(prepared, problem, spread)
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
    a, b = (side.weight for side in prepared.sides)
    value = dual_value(replace(problem, a=a, b=b), f, g, run.mass, ordered_sums)
    return Result(f, g, value, run.cost, run.error, run.iterations, run.error <= run.tolerance)


def sinkhorn_apply(problem: Problem, v: Tensor, transpose: bool = False) -> Tensor:
    """In float64."""
    problem.potentials()
    return _batch(problem, _counts(problem)).apply(v.to(problem.x.dtype), problem.reg, transpose)


def sinkhorn_plan(problem: Problem) -> Tensor:
    """In float64."""
    x, y, a, b = problem.each_x, problem.y, problem.a, problem.b
    f, g = problem.potentials()
    out = torch.zeros(problem.sizes, dtype=torch.float64, device=a.device)
    for p, (n, m) in enumerate(torch.stack(_counts(problem), 1).tolist()):
        if y is None:
            costs = x[p, :n, :m]
        else:
            costs = x.new_empty(n, m)
            launch_pairwise(*panels(x[p, :n], y[p, :m], problem.metric), costs, problem.metric)
            costs = 1 - costs if problem.metric == "cosine" else costs
        logs = (f[p, :n, None] + g[p, :m] - costs.double()) / problem.reg
        logs = logs + a[p, :n, None].log() + b[p, :m].log()
        torch.exp(logs, out=out[p, :n, :m])
    return out


def workspace(problem: Problem) -> int:
    batch, n, m = problem.sizes
    # The points twice, as panels and without padding; potentials, weights and their logarithms, the blocks' sums; masks.
    points = 0 if problem.y is None else 3 * (n + m + 256) * problem.x.shape[2] * problem.x.element_size()
    return batch * (points + (n + m + 2) * 8 * 8) + 24 * _LOOKED_AT


def _counts(problem: Problem) -> tuple[Tensor, Tensor]:
    """The numbers of rows and of columns of each problem, [B] int64."""
    rows, columns = (
        torch.full((len(weight),), weight.shape[1], dtype=torch.int64, device=weight.device)
        if lengths is None
        else lengths.contiguous()
        for _, weight, _, lengths in problem.sides
    )
    return rows, columns


def _check_values(problem: Problem, counts: tuple[Tensor, Tensor]) -> None:
    """Raises ValueError naming the first NaN or infinity that is not in the padding."""
    rows, columns = counts
    if problem.y is None:
        _check_batch(problem.each_x, "x", rows, columns, forbids=True)
        return
    width = torch.full_like(rows, problem.x.shape[2])
    _check_batch(problem.x, "x", rows, width)
    _check_batch(problem.y, "y", columns, width)


def _check_batch(tensor: Tensor, name: str, rows: Tensor, columns: Tensor, forbids: bool = False) -> None:
    batch, height, _ = tensor.shape
    for begin, values, mask in _row_blocks(tensor, rows, columns):
        bad = ~torch.isfinite(values) & mask
        if forbids:
            bad &= values != math.inf
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
    present = inside(rows, height).flatten()
    step = max(1, _LOOKED_AT // width)
    for begin in range(0, batch * height, step):
        numbers = torch.arange(begin, min(begin + step, batch * height), device=tensor.device)
        problem = numbers // height
        mask = present[numbers, None] & inside(columns[problem], width)
        yield begin, tensor[problem, numbers % height], mask


def _batch(problem: Problem, counts: tuple[Tensor, Tensor]) -> Batch:
    """The problems as the kernels take them; potentials are copied."""
    x, y = problem.each_x, problem.y
    if y is not None:
        x, y = masked(x, counts[0]), masked(y, counts[1])
        if problem.metric == "cosine":
            x, y = (normalize_rows(points.flatten(0, 1)).view_as(points) for points in (x, y))
    rows, columns = (
        torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if potential is None
        else masked(potential, count).contiguous()
        for (_, weight, potential, _), count in zip(problem.sides, counts, strict=True)
    )
    a, b = (masked(weight, lengths).contiguous() for _, weight, _, lengths in problem.sides)
    return Batch(x, y, problem.metric, counts, (rows, columns), (a, b))


def _spread(problem: Problem, counts: tuple[Tensor, Tensor]) -> Tensor:
    """The range [B] float64 of each problem's costs; for points at least the largest cost, by the triangle inequality through
    the first column's point."""
    x, y, metric = problem.each_x, problem.y, problem.metric
    if y is None:
        largest, smallest = [], []
        for _, values, mask in _row_blocks(x, *counts):
            largest.append(torch.where(mask & (values < math.inf), values, -math.inf).amax(1))
            smallest.append(torch.where(mask, values, math.inf).amin(1))
        high, low = (torch.cat(rows).view(x.shape[:2]) for rows in (largest, smallest))
        return (high.amax(1).double() - low.amin(1).double()).clamp(min=0)  # below 0: all pairs are forbidden
    if metric == "cosine":
        return torch.full((x.shape[0],), 2.0, dtype=torch.float64, device=x.device)
    far = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for points, count in zip((x, y), counts, strict=True):
        difference = points - y[:, :1]
        distance = torch.linalg.vector_norm(
            difference, 1 if metric == "l1" else 2, dim=2, dtype=torch.float64
        )
        far += masked(distance, count).amax(1)
    return far * far if metric == "sqeuclidean" else far
