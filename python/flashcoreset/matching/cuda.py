"""Adam updates of gradients, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import compact, stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.gradients.adam import AdamState
from flashcoreset.matching.problem import Gradients, Updates
from flashcoreset.matching.rule import OVERFLOW, refuse
from flashcoreset.pairwise.cuda import pairwise

__all__ = ["TAKES", "pairwise", "top_updates", "update_history"]

TAKES = Takes()


def top_updates(problem: Updates) -> tuple[Tensor, Tensor]:
    """The largest mean updates; see `flashcoreset.matching.backend.Kernels`. Waits for the device at the end, and before that for
    all but the last two chunks of the dimensions, so that Ctrl-C is handled."""
    problem = problem.compact()
    device, groups, top = problem.g.values.device, len(problem.offset) - 1, problem.top
    dims = torch.zeros(groups, top, dtype=torch.int64, device=device)
    values = torch.empty(groups, top, dtype=torch.float64, device=device)
    u = torch.empty(len(problem.member), top, dtype=torch.float64, device=device)
    refused = torch.full((1,), 2**63 - 1, dtype=torch.int64, device=device)
    module, queue = native.cuda_module(device.index or 0), stream(device)
    with_memory(
        lambda: module.top_dimensions(problem, capsule(dims), capsule(values), capsule(refused), queue)
    )
    dims, by_dimension = dims.sort(dim=1)
    order = values.gather(1, by_dimension).sort(dim=1, descending=True, stable=True).indices
    dims = dims.gather(1, order)
    module.restrict_updates(problem, capsule(dims), capsule(u), queue)
    first = int(refused)
    if first < problem.g.numel:
        refuse(problem, first)
    return dims, u


def update_history(g: Gradients, history: AdamState, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's history after a step; see `flashcoreset.matching.backend.Kernels`. Waits for the device."""
    history, device = history.contiguous(), g.values.device
    new_m, new_v = torch.empty_like(history.m), torch.empty_like(history.v)
    overflows = torch.zeros(1, dtype=torch.int64, device=history.m.device)
    native.cuda_module(device.index or 0).update_history(
        g, history, compact(chosen), capsule(new_m), capsule(new_v), capsule(overflows), stream(device)
    )
    if bool(overflows):
        raise ValueError(OVERFLOW)
    return new_m, new_v
