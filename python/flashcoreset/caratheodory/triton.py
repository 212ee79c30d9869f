"""Carathéodory reductions, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.caratheodory.on_device import reduce_on_device
from flashcoreset.caratheodory.problem import Problem
from flashcoreset.triton_kernels.caratheodory import launch_keep, launch_sums

__all__ = ["TAKES", "caratheodory"]

TAKES = Takes(host="sums of runs are reduced")


def caratheodory(problem: Problem, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.caratheodory.backend.Kernels`. The device sums runs
    of rows, the host reduces these sums and the rows that are left; the host waits for each round."""
    return reduce_on_device(problem, out, launch_sums, launch_keep)
