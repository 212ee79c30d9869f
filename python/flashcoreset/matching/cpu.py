"""Adam updates of gradients, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule, optional_capsule
from flashcoreset.matching.rule import Rule
from flashcoreset.pairwise.cpu import pairwise

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

    Args:
        g: [B, D] rows of any floating dtype, on the CPU; with `length` the coefficients [B, q], float32 or float64, of
            directions [q, length] from `seed`.
        m, v: [D] float64 if the rows are, else float32; None, also for `rule`, takes the rows themselves as updates.
        rule: how updates are made.
        member: [R] int64, rows of the groups, one group after the other.
        offset: [G + 1] int64, where each group begins in `member`; none is empty.
        top: how many dimensions, 1 <= top <= D.

    Returns:
        dims [G, top] int64, the largest first, and u [R, top] float64.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN and infinity, for v < 0, and for arrays that do not fit each other.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> g, rows, offset = torch.tensor([[1.0, 5.0, -3.0]]), torch.tensor([0]), torch.tensor([0, 1])
        >>> kernels.cpu.top_updates(g, None, None, None, rows, offset, 2)
        (tensor([[1, 2]]), tensor([[ 5., -3.]], dtype=torch.float64))
    """
    dims = torch.empty(len(offset) - 1, top, dtype=torch.int64)
    u = torch.empty(len(member), top, dtype=torch.float64)
    numbers = (0.0, 1.0, 0.0, 0.0, 0.0)
    if rule is not None:
        numbers = (rule.m_scale, rule.m_step, rule.v_scale, rule.v_step, rule.eps)
    native.module().top_updates(
        capsule(g.detach()),
        seed,
        length,
        None if rule is None else optional_capsule(m),
        None if rule is None else optional_capsule(v),
        *numbers,
        capsule(member),
        capsule(offset),
        capsule(dims),
        capsule(u),
        torch.get_num_threads(),
    )
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
    """Adam's history after a step: the means of the new m and v, [D] each, of the rows `chosen` [c] int64.

    The other arguments and the errors are those of `top_updates`.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> g, zero = torch.tensor([[1.0], [3.0]]), torch.zeros(1)
        >>> kernels.cpu.update_history(g, zero, zero, (0.5, 0.5), torch.tensor([0, 1]))
        (tensor([1.]), tensor([2.5000]))
    """
    new_m, new_v = torch.empty_like(m), torch.empty_like(v)
    native.module().update_history(
        capsule(g.detach()),
        seed,
        length,
        *betas,
        capsule(m),
        capsule(v),
        capsule(chosen),
        capsule(new_m),
        capsule(new_v),
        torch.get_num_threads(),
    )
    return new_m, new_v
