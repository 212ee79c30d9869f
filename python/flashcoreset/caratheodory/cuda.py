"""Carathéodory reductions, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.caratheodory.on_device import reduce_on_device
from flashcoreset.caratheodory.problem import Problem, Runs

__all__ = ["TAKES", "caratheodory"]

TAKES = Takes(host="sums of runs are reduced")


def caratheodory(problem: Problem, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.caratheodory.backend.Kernels`. The device sums runs
    of rows, the host reduces these sums and the rows that are left; the host waits for each round."""
    device = problem.x.device
    module, queue = native.cuda_module(device.index or 0), stream(device)

    def sum_runs(runs: Runs, centre: Tensor, shrink: float, sums: Tensor) -> None:
        with_memory(lambda: module.sum_runs(runs, capsule(centre), shrink, capsule(sums), queue))

    def keep_runs(runs: Runs, kept: Tensor, factors: Tensor, new_rows: Tensor, new_weights: Tensor) -> None:
        module.keep_runs(runs, *map(capsule, (kept, factors, new_rows, new_weights)), queue)

    return reduce_on_device(problem, out, sum_runs, keep_runs)
