"""Batches of entropic optimal transport, by the CUDA kernels, on CUDA tensors. A tensor that is not contiguous is copied."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import compact, stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.pairwise.cuda import pairwise
from flashcoreset.sinkhorn.problem import Output, Problem, Result

__all__ = ["TAKES", "pairwise", "sinkhorn", "sinkhorn_apply", "sinkhorn_plan", "workspace"]

TAKES = Takes(checks_values=True)


# Bytes of shared memory that a block may take for a Sinkhorn problem; None for what the device has. Problems that need
# more are streamed.
SINKHORN_SHARED_BYTES: int | None = None

_ARRAYS = ("x", "y", "a", "b", "x_lengths", "y_lengths", "f", "g")


def _module(problem: Problem) -> ModuleType:
    return native.cuda_module(problem.x.device.index or 0)


def _in_one_piece(problem: Problem) -> Problem:
    given = {name: getattr(problem, name) for name in _ARRAYS}
    copies = {name: t.contiguous() for name, t in given.items() if t is not None and not t.is_contiguous()}
    return replace(problem, **copies) if copies else problem


def sinkhorn(problem: Problem, report: Callable[[int, int], None] | None = None) -> Result:
    """Solves a batch of problems; see `Problem` and `Kernels.sinkhorn`. Waits once, when all problems are solved; `report` is
    called once, at the end. `memory_budget` is not used: costs are kept in the multiprocessors' own memory or not at all.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        ValueError: for weights that are negative, all zero or of unequal sums, too.
    """
    problem = _in_one_piece(problem)
    output = Output.of(problem)
    shared = -1 if SINKHORN_SHARED_BYTES is None else SINKHORN_SHARED_BYTES
    wrong, argument, number, row, column = with_memory(
        lambda: _module(problem).sinkhorn(problem, *map(capsule, output), shared, stream(problem.x.device))
    )
    if wrong is not None:
        raise ValueError(_fault(problem, wrong, argument, number, row, column))
    if report is not None:
        total = problem.sizes[0] * problem.max_iter
        report(total, total)
    return output.result()


def _fault(problem: Problem, wrong: str, argument: str, number: int, row: int, column: int) -> str:
    tensor: Tensor = getattr(problem, argument)
    of = problem.within(number)
    within = of.replace(" of", " in", 1)
    if wrong == "not finite":
        value = float(tensor[number, row, column])
        return f"{argument} must be finite, got {_named(value)} at row {row}, column {column}{of}"
    if wrong == "weight":
        return f"{argument} must be finite and >= 0, got {_named(float(tensor[number, row]))} at position {row}{of}"
    if wrong == "no weight":
        return f"{argument} must have a finite sum > 0; its sum is not{within}"
    if wrong == "unequal":
        return f"a and b must have equal sums where both marginals are balanced; they differ by more than 1 in 10^4{within}"
    dtype = problem.x.dtype
    remedy = " or use float64" if dtype.itemsize == 4 else ""
    if wrong == "small reg":
        return f"reg: costs in units of it overflow {dtype}{within}; raise reg{remedy}"
    return f"x: costs overflow {dtype}{within}; scale the data down{remedy}"


def _named(value: float) -> str:
    return "NaN" if math.isnan(value) else str(value)


def sinkhorn_apply(problem: Problem, v: Tensor, transpose: bool = False) -> Tensor:
    """In float64. Does not wait for the device."""
    problem = _in_one_piece(problem)
    batch, n, m = problem.sizes
    out = problem.a.new_empty(batch, m if transpose else n, v.shape[2])
    with_memory(
        lambda: _module(problem).sinkhorn_apply(
            problem, compact(v.double()), transpose, capsule(out), stream(problem.x.device)
        )
    )
    return out


def sinkhorn_plan(problem: Problem) -> Tensor:
    """In float64. Does not wait for the device."""
    problem = _in_one_piece(problem)
    out = problem.a.new_empty(problem.sizes)
    with_memory(lambda: _module(problem).sinkhorn_plan(problem, capsule(out), stream(problem.x.device)))
    return out


def workspace(problem: Problem) -> int:
    batch, n, m = problem.sizes
    size = problem.x.element_size()
    # Points of cosine at unit length; teams' potentials in two parts, their strips' sums and costs, in 256 MB or for one team.
    units = batch * (n + m) * problem.x.shape[2] * size if problem.metric == "cosine" else 0
    rows, columns = (64, 128) if size == 4 else (32, 64)
    tiles = max((n // rows + 1) * (m // columns + 1), (m // rows + 1) * (n // columns + 1))
    sums = min(tiles, 2048 + (n + m) // rows + 2 + tiles // 16 + (n + m) // rows + 2) * rows
    team = sums * (2 * size + 8) + (n + m) * (4 * size + 1) + 2**12
    return units + min(batch * team, max(team, 2**28)) + batch * 64 + 2**20
