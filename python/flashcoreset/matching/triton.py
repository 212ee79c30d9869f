"""Adam updates of gradients, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.matching.rule import OVERFLOW, Rule, refuse
from flashcoreset.pairwise.triton import pairwise
from flashcoreset.triton_kernels.matching import (
    Gradients,
    launch_history,
    launch_top_updates,
)

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

    Waits for the device at the end, and before that for all but the last launches, so that Ctrl-C is handled.

    Args:
        g: [B, D] rows of any floating dtype; with `length` the coefficients [B, q], float32 or float64, of directions
            [q, length] from `seed`.
        m, v: [D] float64 if the rows are, else float32; None, also for `rule`, takes the rows themselves as updates.
        rule: how updates are made.
        member: [R] int64, rows of the groups, one group after the other.
        offset: [G + 1] int64, where each group begins in `member`; none is empty.
        top: how many dimensions, 1 <= top <= D.

    Returns:
        dims [G, top] int64, the largest first, and u [R, top] float64.

    Raises:
        ValueError: for NaN and infinity, and for v < 0.
    """
    history = None if rule is None or m is None or v is None else (m.contiguous(), v.contiguous())
    gradients = Gradients(g.detach(), seed, length)
    dims, u, refused = launch_top_updates(
        gradients, history, rule, member.contiguous(), offset.contiguous(), top
    )
    if refused < gradients.numel:
        refuse(g, history, member, refused, seed=seed, length=length)
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

    The other arguments are those of `top_updates`.

    Raises:
        ValueError: if these means overflow.
    """
    m, v = m.contiguous(), v.contiguous()
    new_m, new_v = torch.empty_like(m), torch.empty_like(v)
    gradients = Gradients(g.detach(), seed, length)
    if launch_history(gradients, m, v, betas, chosen.contiguous(), new_m, new_v):
        raise ValueError(OVERFLOW)
    return new_m, new_v
