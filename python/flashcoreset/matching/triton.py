"""Adam updates of gradients, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.gradients.adam import AdamState
from flashcoreset.matching.problem import Gradients, Updates
from flashcoreset.matching.rule import OVERFLOW, refuse
from flashcoreset.pairwise.triton import pairwise
from flashcoreset.triton_kernels.matching import launch_history, launch_top_updates

__all__ = ["TAKES", "pairwise", "top_updates", "update_history"]

TAKES = Takes()


def top_updates(problem: Updates) -> tuple[Tensor, Tensor]:
    """The largest mean updates; see `flashcoreset.matching.backend.Kernels`. Waits for the device at the end, and before that for
    all but the last launches, so that Ctrl-C is handled."""
    problem = problem.compact()
    dims, u, refused = launch_top_updates(problem)
    if refused < problem.g.numel:
        refuse(problem, refused)
    return dims, u


def update_history(g: Gradients, history: AdamState, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's history after a step; see `flashcoreset.matching.backend.Kernels`. Waits for the device."""
    history = history.contiguous()
    new_m, new_v = torch.empty_like(history.m), torch.empty_like(history.v)
    if launch_history(g, history, chosen.contiguous(), new_m, new_v):
        raise ValueError(OVERFLOW)
    return new_m, new_v
