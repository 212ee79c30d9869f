"""The rule of an Adam update, and the errors for which a history is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from flashcoreset._core.tensor import check_finite
from flashcoreset.directions.backend import choose

OVERFLOW = "g: the mean squares of the chosen rows overflow the history's dtype; scale the gradients down"
BLOCK = 1 << 16  # dimensions at a time


@dataclass(frozen=True)
class Rule:
    """The update u = (m_scale m + m_step g) / (sqrt(v_scale v + v_step g^2) + eps)."""

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
    """Reports what is wrong in a dimension in which a kernel met NaN, infinity or v < 0; `history` is (m, v), and the other
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
    raise ValueError(_overflow(dim))


def _overflow(dim: int) -> str:
    return f"g: updates overflow in dimension {dim}; scale the gradients down"


def _named(value: float) -> str:
    return "NaN" if math.isnan(value) else str(value)


def _entries(g: Tensor, rows: Tensor, at: Tensor, seed: int, length: int | None) -> Tensor:
    """The gradients of `rows` in the dimensions `at`, float64."""
    if length is None:
        return g[rows][:, at].double()
    return g[rows].double() @ _direction_elements(g, at, seed)


def _direction_elements(g: Tensor, at: Tensor, seed: int) -> Tensor:
    """The directions' elements [q, dimensions at] float64."""
    low, high = int(at.min()), int(at.max()) + 1
    z = torch.empty(g.shape[1], len(at), dtype=torch.float64)
    directions = choose("torch", z.device).directions
    if high - low == len(at):
        directions(z, seed=seed, begin=low)
        z = z[:, at.cpu() - low]  # which may be in another order
    else:
        for i, j in enumerate(at.tolist()):
            directions(z[:, i : i + 1], seed=seed, begin=j)
    return z.to(g.device)
