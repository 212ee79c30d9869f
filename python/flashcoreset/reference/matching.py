"""What gradient matching reads off gradients, in plain torch: the definition that the kernels are tested against.

With Adam's history m, v [D] before step t, the gradient g_i would make the update

    u_i = mhat_i / (sqrt(vhat_i) + eps),   mhat_i = (beta1 m + (1 - beta1) g_i) / (1 - beta1^t),
                                           vhat_i = (beta2 v + (1 - beta2) g_i^2) / (1 - beta2^t).

For each group of samples `top_updates` takes the dimensions where the mean of its u_i is largest in size, ties to the lower
dimension, and restricts its u_i to them. `update_history` makes m and v the means of the new m_i and v_i over the chosen samples.

Source: Nguyen, Yang, Anand, Yang and Mirzasoleiman, "Mini-batch coresets for memory-efficient language model training on
data mixtures" (CoLM), ICLR 2025, section 4 (equations 7 and 8 and the sparse dimensions after them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from flashcoreset._tensor import check_finite
from flashcoreset.reference.zeroth_order import directions

OVERFLOW = "g: the mean squares of the chosen rows overflow the history's dtype; scale the gradients down"

BLOCK = 1 << 16  # dimensions at a time


@dataclass(frozen=True)
class Rule:
    """u = (m_scale m + m_step g) / (sqrt(v_scale v + v_step g^2) + eps)."""

    m_scale: float
    m_step: float
    v_scale: float
    v_step: float
    eps: float

    @classmethod
    def adam(cls, step: int, betas: tuple[float, float], eps: float) -> Rule:
        beta1, beta2 = betas
        first, second = 1 - beta1**step, 1 - beta2**step
        return cls(beta1 / first, (1 - beta1) / first, beta2 / second, (1 - beta2) / second, eps)

    def updates(self, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return (self.m_scale * m + self.m_step * g) / (
            (self.v_scale * v + self.v_step * g * g).sqrt() + self.eps
        )


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
        m, v: [D] float64 where the rows are, else float32; None, with `rule`, takes the rows themselves as updates.
        rule: how updates are made.
        member: [R] int64, rows of the groups, one group after the other.
        offset: [G + 1] int64, where each group begins in `member`; none is empty.
        top: how many dimensions, 1 <= top <= D.

    Returns:
        dims [G, top] int64, the largest first, and u [R, top] float64.

    Raises:
        ValueError: for NaN and infinity, and where v < 0.
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
            # Stable, so that of equal values the lower dimension, which is earlier, stays.
            order = values.sort(descending=True, stable=True).indices[:top]
            best[group] = values[order], dims[order]
    dims = torch.stack([found for _, found in best])
    u = torch.cat(
        [
            _updates(g, m, v, rule, member[first:last], dims[group], seed, length)
            for group, (first, last) in enumerate(bounds)
        ]
    )
    return dims, u


def check_history(m: Tensor, v: Tensor) -> None:
    check_finite(m, "normalize: m")
    check_finite(v, "normalize: v")
    if bool((v < 0).any()):
        i = int((v < 0).nonzero()[0])
        raise ValueError(f"normalize: v must be finite and >= 0, got {float(v[i])} at position {i}")


def refuse(
    g: Tensor,
    history: tuple[Tensor, Tensor] | None,
    member: Tensor,
    dim: int,
    *,
    seed: int = 0,
    length: int | None = None,
) -> NoReturn:
    """Says what is wrong in a dimension where a kernel met NaN, infinity or v < 0; `history` is (m, v), and the other
    arguments are those of `top_updates`.

    Raises:
        ValueError: always.
    """
    at = torch.tensor([dim], device=g.device)
    if history is not None:
        for name, tensor in zip("mv", history, strict=True):
            value = float(tensor[dim])
            if not math.isfinite(value) or (name == "v" and value < 0):
                expected = "finite" if name == "m" else "finite and >= 0"
                raise ValueError(
                    f"normalize: {name} must be {expected}, got {_named(value)} at position {dim}"
                )
    for row in member.sort().values.tolist():
        value = float(_entries(g, torch.tensor([row], device=g.device), at, seed, length))
        if not math.isfinite(value):
            raise ValueError(f"g must be finite, got {_named(value)} at row {row}, column {dim}")
    raise ValueError(f"g: updates overflow in dimension {dim}; scale the gradients down")


def _named(value: float) -> str:
    return "NaN" if math.isnan(value) else str(value)


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
    """u [rows, dimensions at] float64."""
    values = _entries(g, rows, at, seed, length)
    if rule is None or m is None or v is None:
        return values
    return rule.updates(values, m[at].double(), v[at].double())


def _entries(g: Tensor, rows: Tensor, at: Tensor, seed: int, length: int | None) -> Tensor:
    """Gradients of `rows` in the dimensions `at`, float64."""
    if length is None:
        return g[rows][:, at].double()
    return g[rows].double() @ _direction_elements(g, at, seed)


def _direction_elements(g: Tensor, at: Tensor, seed: int) -> Tensor:
    """[q, dimensions at] float64."""
    low, high = int(at.min()), int(at.max()) + 1
    z = torch.empty(g.shape[1], len(at), dtype=torch.float64)
    if high - low == len(at):
        directions(z, seed=seed, begin=low)
    else:
        for i, j in enumerate(at.tolist()):
            directions(z[:, i : i + 1], seed=seed, begin=j)
    return z.to(g.device)


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
        ValueError: if they overflow.
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
