"""Adam updates of gradients, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import optional_compact, stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.matching.rule import OVERFLOW, Rule, refuse
from flashcoreset.pairwise.cuda import pairwise

__all__ = ["TAKES", "pairwise", "top_updates", "update_history"]

TAKES = Takes()


def top_updates(
    g: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    rule: Rule | None,
    member: Tensor,
    offset: Tensor,
    top: int,
    *,
    seed: int = 0,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The dimensions of the largest mean updates of each group, and its members' updates there.

    Waits for the device at the end, and before that for all but the last two chunks of the dimensions, so that Ctrl-C is handled.

    Args:
        g: [B, D] rows of any floating dtype, on a CUDA device, like all that follows; with `length` the coefficients [B, q],
            float32 or float64, of directions [q, length] from `seed`.
        m, v: [D] float64 if the rows are, else float32; None, also for `rule`, takes the rows themselves as updates.
        rule: how updates are made.
        member: [R] int64, rows of the groups, one group after the other.
        offset: [G + 1] int64, where each group begins in `member`; none is empty.
        top: how many dimensions, 1 <= top <= D.

    Returns:
        dims [G, top] int64, the largest first, and u [R, top] float64.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        ValueError: for NaN and infinity, for v < 0, and for arrays that do not fit each other.
        torch.OutOfMemoryError: if the device has no room for the lists (24 bytes for each of 2^19 candidates, or for `top` in
            each group).
    """
    g, device, groups = g.detach(), g.device, len(offset) - 1
    history = None if rule is None or m is None or v is None else (m.contiguous(), v.contiguous())
    scales = (0.0, 1.0, 0.0, 0.0, 0.0)
    if history is not None and rule is not None:
        scales = (rule.m_scale, rule.m_step, rule.v_scale, rule.v_step, rule.eps)
    dims = torch.zeros(groups, top, dtype=torch.int64, device=device)
    values = torch.empty(groups, top, dtype=torch.float64, device=device)
    u = torch.empty(len(member), top, dtype=torch.float64, device=device)
    refused = torch.full((1,), 2**63 - 1, dtype=torch.int64, device=device)
    module, queue = native.cuda_module(device.index or 0), stream(device)

    def problem() -> tuple[Any, ...]:
        """The first arguments of both functions; a capsule is used once."""
        past = (None, None) if history is None else map(capsule, history)
        return (capsule(g), seed, length, *past, *scales, optional_compact(member), optional_compact(offset))

    with_memory(
        lambda: module.top_dimensions(*problem(), capsule(dims), capsule(values), capsule(refused), queue)
    )
    dims, by_dimension = dims.sort(dim=1)
    order = values.gather(1, by_dimension).sort(dim=1, descending=True, stable=True).indices
    dims = dims.gather(1, order)
    module.restrict_updates(*problem(), capsule(dims), capsule(u), queue)
    first = int(refused)
    if first < (g.shape[1] if length is None else length):
        refuse(g, history, member, first, seed=seed, length=length)
    return dims, u


def update_history(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    betas: tuple[float, float],
    chosen: Tensor,
    *,
    seed: int = 0,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Adam's history after a step: the means of the new m and v, [D] each, of the rows `chosen` [c] int64. Waits for the
    device.

    The other arguments and the errors are those of `top_updates`.
    """
    m, v = m.contiguous(), v.contiguous()
    new_m, new_v = torch.empty_like(m), torch.empty_like(v)
    overflows = torch.zeros(1, dtype=torch.int64, device=m.device)
    native.cuda_module(g.device.index or 0).update_history(
        capsule(g.detach()),
        seed,
        length,
        *betas,
        capsule(m),
        capsule(v),
        optional_compact(chosen),
        capsule(new_m),
        capsule(new_v),
        capsule(overflows),
        stream(g.device),
    )
    if bool(overflows):
        raise ValueError(OVERFLOW)
    return new_m, new_v
