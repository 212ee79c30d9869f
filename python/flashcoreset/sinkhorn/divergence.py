"""Divergence: what `sinkhorn_divergence` returns with `full_output`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashcoreset._core.saving import Saved, savable
from flashcoreset.sinkhorn.transport import Transport


@savable
@dataclass(frozen=True, eq=False)
class Divergence(Saved):
    """A Sinkhorn divergence with what its three transports have found: what `sinkhorn_divergence` returns with `full_output`.

    Attributes:
        value: scalar or [B]: the divergence; differentiable in x, y, a and b.
        cross: the `Transport` from x to y.
        of_x, of_y: the transports of each set to itself, whose two potentials are the same.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> found = fc.sinkhorn_divergence(x, x + 2, reg=0.5, full_output=True)
        >>> bool(found.converged), [int(t.iterations) for t in (found.cross, found.of_x, found.of_y)]
        (True, [20, 2, 2])
        >>> (found.f - found.f.mean()).round(decimals=3)
        tensor([ 2., -2.])
    """

    value: Tensor
    cross: Transport
    of_x: Transport
    of_y: Transport

    @property
    def f(self) -> Tensor:
        """[n] or [B, n]: the potentials of the cross transport less those of x to itself, the divergence's slope in `a` up to a
        constant."""
        return self.cross.f - self.of_x.f

    @property
    def g(self) -> Tensor:
        """[m] or [B, m]: likewise for y and `b`."""
        return self.cross.g - self.of_y.f

    @property
    def error(self) -> Tensor:
        """Scalar or [B]: the largest error of the three transports."""
        return torch.stack([t.error for t in self._parts]).amax(0)

    @property
    def iterations(self) -> Tensor:
        """Scalar or [B] int64: the iterations of all three."""
        return torch.stack([t.iterations for t in self._parts]).sum(0)

    @property
    def converged(self) -> Tensor:
        """Scalar or [B] bool: whether all three reached `tol`."""
        return torch.stack([t.converged for t in self._parts]).all(0)

    @property
    def _parts(self) -> tuple[Transport, Transport, Transport]:
        return self.cross, self.of_x, self.of_y
