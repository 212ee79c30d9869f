"""Adam updates of gradients, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.gradients.adam import AdamState
from flashcoreset.matching.problem import Gradients, Updates
from flashcoreset.pairwise.cpu import pairwise

__all__ = ["TAKES", "pairwise", "top_updates", "update_history"]

TAKES = Takes()


def top_updates(problem: Updates) -> tuple[Tensor, Tensor]:
    """The largest mean updates; see `flashcoreset.matching.backend.Kernels`.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> g, rows, offset = torch.tensor([[1.0, 5.0, -3.0]]), torch.tensor([0]), torch.tensor([0, 1])
        >>> kernels.cpu.top_updates(kernels.UpdatesProblem(kernels.Gradients(g), None, rows, offset, top=2))
        (tensor([[1, 2]]), tensor([[ 5., -3.]], dtype=torch.float64))
    """
    dims = torch.empty(len(problem.offset) - 1, problem.top, dtype=torch.int64)
    u = torch.empty(len(problem.member), problem.top, dtype=torch.float64)
    native.module().top_updates(problem, capsule(dims), capsule(u), torch.get_num_threads())
    return dims, u


def update_history(g: Gradients, history: AdamState, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's history after a step; see `flashcoreset.matching.backend.Kernels`.

    Example:
        >>> import torch, flashcoreset as fc
        >>> from flashcoreset import kernels
        >>> g, zero = kernels.Gradients(torch.tensor([[1.0], [3.0]])), torch.zeros(1)
        >>> kernels.cpu.update_history(g, fc.AdamState(zero, zero, 1, (0.5, 0.5)), torch.tensor([0, 1]))
        (tensor([1.]), tensor([2.5000]))
    """
    new_m, new_v = torch.empty_like(history.m), torch.empty_like(history.v)
    native.module().update_history(
        g, history, capsule(chosen), capsule(new_m), capsule(new_v), torch.get_num_threads()
    )
    return new_m, new_v
