"""What gradient matching computes from gradients, in plain torch: the definition that the kernels are tested against.

With Adam's history m, v [D] before step t, the gradient g_i would lead to the update

    u_i = mhat_i / (sqrt(vhat_i) + eps),   mhat_i = (beta1 m + (1 - beta1) g_i) / (1 - beta1^t),
                                           vhat_i = (beta2 v + (1 - beta2) g_i^2) / (1 - beta2^t).

For each group of samples `top_updates` takes the dimensions where the mean of the group's u_i is largest in size, ties to the lower
dimension, and restricts these u_i to them. `update_history` makes m and v the means of the new m_i and v_i over the chosen samples.

Source: Nguyen, Yang, Anand, Yang and Mirzasoleiman, "Mini-batch coresets for memory-efficient language model training on
data mixtures" (CoLM), ICLR 2025, section 4 (equations 7 and 8 and the sparse dimensions after them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.matching.rule import BLOCK, OVERFLOW, Rule, _entries, _overflow, check_history
from flashcoreset.pairwise.reference import pairwise as pairwise

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
        g: [B, D] rows of any floating dtype; with `length` the coefficients [B, q] of directions [q, length] from `seed`.
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
    numel = g.shape[1] if length is None else length
    bounds = list(zip(offset.tolist(), offset.tolist()[1:], strict=False))
    best = [(g.new_empty(0, dtype=torch.float64), member.new_empty(0)) for _ in bounds]
    if m is not None and v is not None:
        check_history(m, v)
    for row in member.sort().values.tolist():
        bad = ~torch.isfinite(g[row])
        if bad.any():
            column = int(bad.nonzero()[0])
            raise ValueError(f"g must be finite, got {float(g[row, column])} at row {row}, column {column}")
    for begin in range(0, numel, BLOCK):
        at = torch.arange(begin, min(begin + BLOCK, numel), device=g.device)
        for group, (first, last) in enumerate(bounds):
            u = _updates(g, m, v, rule, member[first:last], at, seed, length)
            values = torch.cat([best[group][0], u.mean(0).abs()])
            dims = torch.cat([best[group][1], at])
            # A stable sort, so that among equal values the lower dimension, which is earlier, stays.
            order = values.sort(descending=True, stable=True).indices[:top]
            best[group] = values[order], dims[order]
    dims = torch.stack([found for _, found in best])
    u = torch.cat(
        [
            _updates(g, m, v, rule, member[first:last], dims[group], seed, length)
            for group, (first, last) in enumerate(bounds)
        ]
    )
    if not bool(u.isfinite().all()):  # NaN is above all else when sorted
        at = dims.repeat_interleave(offset.diff(), 0)[~u.isfinite()].min()
        raise ValueError(_overflow(int(at)))
    return dims, u


def _updates(
    g: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    rule: Rule | None,
    rows: Tensor,
    at: Tensor,
    seed: int,
    length: int | None,
) -> Tensor:
    """The updates u [rows, dimensions at] float64."""
    values = _entries(g, rows, at, seed, length)
    if rule is None or m is None or v is None:
        return values
    return rule.updates(values, m[at].double(), v[at].double())


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
    """The means of the chosen samples' new m and v, [D] each, in the dtype of `m`; the arguments are those of `top_updates`.

    Raises:
        ValueError: if these means overflow.
    """
    beta1, beta2 = betas
    new_m, new_v = torch.empty_like(m), torch.empty_like(v)
    for begin in range(0, len(m), BLOCK):
        part = slice(begin, begin + BLOCK)
        at = torch.arange(begin, min(begin + BLOCK, len(m)), device=g.device)
        values = _entries(g, chosen, at, seed, length)
        new_m[part] = beta1 * m[part].double() + (1 - beta1) * values.mean(0)
        new_v[part] = beta2 * v[part].double() + (1 - beta2) * values.square().mean(0)
    if not bool(new_m.isfinite().all() & new_v.isfinite().all()):
        raise ValueError(OVERFLOW)
    return new_m, new_v
