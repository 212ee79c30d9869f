"""Entropic transport and its debiased form in geomloss' terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import flashcoreset as fc
from flashcoreset.sinkhorn import self_transport


@dataclass(frozen=True, eq=False)
class Parts:
    """The transports between a batch of sets [B, n, d] and [B, m, d], and for a debiased loss those of each set with itself.

    Attributes:
        scale: the kernels' cost over geomloss'.
        a, b: weights [B, n] and [B, m].
    """

    ab: fc.Transport
    aa: fc.Transport | None
    bb: fc.Transport | None
    a: Tensor
    b: Tensor
    reg: float
    is_relaxed: bool
    scale: float

    @property
    def value(self) -> Tensor:
        """[B]: of the duals without a constant, as geomloss has it: <a, f> + <b, g> if the marginals hold."""
        mass_a, mass_b = (t.sum(1).to(self.ab.value.dtype) for t in (self.a, self.b))
        value = self.ab.value
        if self.aa is not None and self.bb is not None:
            value = value - 0.5 * (self.aa.value + self.bb.value)
            if self.is_relaxed:
                value = value + 0.5 * self.reg * (mass_a - mass_b) ** 2
        else:
            value = value + self.reg * (0.5 * (mass_a + mass_b) - mass_a * mass_b)
        return value / self.scale

    @property
    def dual_value(self) -> Tensor:
        """[B]: min <P, C> + reg KL(P | a x b) and penalties, the sign of `value` at masses other than 1; debiased as `value` is."""
        if self.aa is not None or not self.is_relaxed:
            return self.value
        return self.ab.value / self.scale

    @property
    def cross_potentials(self) -> tuple[Tensor, Tensor]:
        """f [B, n] and g [B, m]; where a constant is free, the one with <a, f> = <b, g>."""
        f, g = self.ab.f.double(), self.ab.g.double()
        if not self.is_relaxed:
            a, b = self.a.detach().double(), self.b.detach().double()
            shift = (((b * g).sum(1) - (a * f).sum(1)) / (a.sum(1) + b.sum(1)))[:, None]
            f, g = f + shift, g - shift
        return f / self.scale, g / self.scale

    @property
    def own_potentials(self) -> tuple[Tensor, Tensor]:
        """f of each set with itself, where both sides' are the same."""
        if self.aa is None or self.bb is None:
            raise ValueError("the potentials of a set with itself are there with debias=True alone")
        own_a, own_b = ((t.f.double() + t.g.double()) / (2 * self.scale) for t in (self.aa, self.bb))
        return own_a, own_b

    @property
    def potentials(self) -> tuple[Tensor, Tensor]:
        """f and g, less those of each set with itself if the loss is debiased."""
        f, g = self.cross_potentials
        if self.aa is None:
            return f, g
        own_a, own_b = self.own_potentials
        return f - own_a, g - own_b


def transports(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    reach: float | None,
    metric: str,
    scale: float = 1.0,
    own: tuple[Tensor, Tensor] | None = None,
    debias: bool,
    tol: float,
    max_iter: int,
) -> Parts:
    """Solves a batch of problems.

    Args:
        x, y: [B, n, d] and [B, m, d], or costs [B, n, m] and None.
        a, b: [B, n], [B, m].
        reg, reach: the weight of the entropy and the penalty of the marginals (None: these hold), in units of the metric.
        scale: how many times geomloss' cost the metric is.
        own: costs of each set with itself, [B, n, n] and [B, m, m], if costs are given and `debias`.
    """
    options: dict[str, Any] = {
        "reg": reg, "reg_marginal": reach, "metric": metric, "tol": tol, "max_iter": max_iter,
    }  # fmt: skip
    ab = fc.sinkhorn(x, y, a, b, **options)
    aa = bb = None
    if debias:
        if own is None:
            aa, bb = self_transport(x, a, **options), self_transport(y, b, **options)
        else:
            aa, bb = (fc.sinkhorn(cost, None, w, w, **options) for cost, w in zip(own, (a, b), strict=True))
    return Parts(ab, aa, bb, a, b, reg, reach is not None, scale)


def uniform(points: Tensor) -> Tensor:
    """Weights 1/n [..., n] for points [..., n, d]."""
    return torch.full(points.shape[:-1], 1 / points.shape[-2], dtype=points.dtype, device=points.device)
