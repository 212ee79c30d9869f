"""The rule of an Adam update, and the errors for which gradients and histories are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from flashcoreset._core.tensor import check_finite
from flashcoreset.directions.backend import choose

if TYPE_CHECKING:
    from flashcoreset.matching.problem import Gradients, Updates

OVERFLOW = "g: the mean squares of the chosen rows overflow the history's dtype; scale the gradients down"
BLOCK = 1 << 16  # dimensions at a time


@dataclass(frozen=True)
class Rule:
    """The update u = (m_scale m + m_step g) / (sqrt(v_scale v + v_step g^2) + eps)."""

    m_scale: float = 0.0
    m_step: float = 1.0
    v_scale: float = 0.0
    v_step: float = 0.0
    eps: float = 0.0

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


def refuse(problem: Updates, dim: int) -> NoReturn:
    """Reports what is wrong in a dimension in which a kernel met NaN, infinity or v < 0.

    Raises:
        ValueError: always.
    """
    g, history = problem.g, problem.history
    device = g.values.device
    if history is not None:
        for name, tensor in (("m", history.m), ("v", history.v)):
            value = float(tensor[dim])
            if not math.isfinite(value) or (name == "v" and value < 0):
                expected = "finite" if name == "m" else "finite and >= 0"
                raise ValueError(
                    f"normalize: {name} must be {expected}, got {_named(value)} at position {dim}"
                )
    at = torch.tensor([dim], device=device)
    for row in problem.member.sort().values.tolist():
        value = float(entries(g, torch.tensor([row], device=device), at))
        if not math.isfinite(value):
            raise ValueError(f"g must be finite, got {_named(value)} at row {row}, column {dim}")
    raise ValueError(overflow(dim))


def overflow(dim: int) -> str:
    return f"g: updates overflow in dimension {dim}; scale the gradients down"


def _named(value: float) -> str:
    return "NaN" if math.isnan(value) else str(value)


def entries(g: Gradients, rows: Tensor, at: Tensor) -> Tensor:
    """The gradients of `rows` in the dimensions `at`, float64."""
    if g.length is None:
        return g.values[rows][:, at].double()
    return g.values[rows].double() @ _direction_elements(g, at)


def _direction_elements(g: Gradients, at: Tensor) -> Tensor:
    """The directions' elements [q, dimensions at] float64."""
    low, high = int(at.min()), int(at.max()) + 1
    z = torch.empty(g.values.shape[1], len(at), dtype=torch.float64)
    directions = choose("torch", z.device).directions
    if high - low == len(at):
        directions(z, seed=g.seed, begin=low)
        z = z[:, at.cpu() - low]  # which may be in another order
    else:
        for i, j in enumerate(at.tolist()):
            directions(z[:, i : i + 1], seed=g.seed, begin=j)
    return z.to(g.values.device)
