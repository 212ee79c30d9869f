"""Batches of entropic optimal transport, by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset.pairwise.cpu import pairwise
from flashcoreset.sinkhorn.problem import Output, Problem, Result

__all__ = ["TAKES", "pairwise", "sinkhorn", "sinkhorn_apply", "sinkhorn_plan", "workspace"]

TAKES = Takes()


def sinkhorn(problem: Problem, report: Callable[[int, int], None] | None = None) -> Result:
    """Solves a batch of problems; see `Problem` and `Kernels.sinkhorn`.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> cost, half = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.full((1, 2), 0.5, dtype=torch.float64)
        >>> problem = kernels.SinkhornProblem(cost, None, half, half, reg=0.1, metric="precomputed")
        >>> round(kernels.cpu.sinkhorn(problem).transport_cost.item(), 6)
        4.5e-05
    """
    output = Output.of(problem)
    run = native.module().Sinkhorn(problem, *map(native.capsule, output), torch.get_num_threads())
    total: int = run.total()
    part = total if report is None else max(1, total // 1000)
    done = 0
    while done < total:
        done = run.step(part)
        if report is not None:
            report(done, total)
    return output.result()


def sinkhorn_apply(problem: Problem, v: Tensor, transpose: bool = False) -> Tensor:
    """The plan is made 24 rows at a time, whatever the `memory_budget`."""
    batch, n, m = problem.sizes
    out = problem.x.new_zeros(batch, m if transpose else n, v.shape[2])
    native.module().sinkhorn_apply(
        problem, native.capsule(v.detach()), transpose, native.capsule(out), torch.get_num_threads()
    )
    return out


def sinkhorn_plan(problem: Problem) -> Tensor:
    """Of the type of `x`."""
    out = problem.x.new_empty(problem.sizes)
    native.module().sinkhorn_plan(problem, native.capsule(out), torch.get_num_threads())
    return out


def workspace(problem: Problem) -> int:
    batch, n, m = problem.sizes
    size, threads = problem.x.element_size(), torch.get_num_threads()
    d = 0 if problem.y is None else problem.x.shape[2]
    matrix = n * m * size
    # Problems that are solved at the same time: one, or one per thread.
    at_once = threads if batch > 1 and matrix * threads <= problem.memory_budget else 1
    workers = 1 if at_once > 1 else threads
    chunks = min(64, n // 72 + 1)
    # The points as panels, K if it is kept, potentials and scalings, the chunks' sums, blocks of 24 rows.
    own = ((n + m + 24) * d + 64 * m) * size + (matrix if matrix <= problem.memory_budget else 0)
    own += 10 * (n + m) * 8 + (chunks + workers * 24) * m * size
    if (
        len(problem.x) < batch
    ):  # K, its transpose and K times C; scalings and weights of up to 256 problems at a time
        together = (3 * n * m + 8 * (n + m) * min(batch + 31, 256)) * 8
        own += together if together <= 2 * problem.memory_budget else 0
    return at_once * own + threads * 2**20
