"""Carathéodory reductions, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.caratheodory.problem import Problem

__all__ = ["TAKES", "caratheodory"]

TAKES = Takes()


def caratheodory(problem: Problem, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.caratheodory.backend.Kernels`.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [6.0]])
        >>> kernels.cpu.caratheodory(kernels.CaratheodoryProblem(x))[1].sum()
        tensor(4., dtype=torch.float64)
    """
    if out is None:
        most = problem.room
        out = torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.float64)
    count = native.module().caratheodory(problem, capsule(out[0]), capsule(out[1]), torch.get_num_threads())
    return out[0][:count], out[1][:count]
