"""Where the samples of a batch lie in a tensor: in dimension 0 or 1, or in rows that were flattened together with positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """`dim`: the dimension of the samples; if `flat`, that of the samples after dimension 0 is split into samples and positions, which
    have been flattened in this order (dim 0) or with the positions first (dim 1)."""

    dim: int
    flat: bool = False

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        """Whether a tensor of `shape` may hold `batch` samples so."""
        if self.flat:
            return len(shape) > 0 and batch > 0 and shape[0] % batch == 0 and shape[0] > 0
        return len(shape) > self.dim and shape[self.dim] == batch

    def bring(self, x: Tensor, batch: int) -> Tensor:
        """`x` with the samples in dimension 0, [batch, ...]."""
        return self.split(x, batch).movedim(self.dim, 0)

    def split(self, x: Tensor, batch: int) -> Tensor:
        """`x` with the samples in the dimension `dim`."""
        if not self.flat:
            return x
        return x.unflatten(0, (-1, batch) if self.dim else (batch, -1))

    def one(self, sample: Tensor) -> Tensor:
        """What `x` would be in a batch of one, from a sample without its dimension."""
        return sample if self.flat else sample.unsqueeze(self.dim)

    def sample_of(self, rows: Tensor, count: int, batch: int) -> tuple[Tensor, Tensor]:
        """The samples, and the positions in them, of `rows` among the `count` rows of a tensor."""
        if not self.flat:
            return rows, torch.zeros_like(rows)
        if self.dim:
            return rows % batch, rows // batch
        length = count // batch
        return rows // length, rows % length

    def __str__(self) -> str:
        return ("flattened, " if self.flat else "") + f"samples in dimension {self.dim}"


FIRST, SECOND = Layout(0), Layout(1)
FLAT, FLAT_SECOND = Layout(0, True), Layout(1, True)
ALL = (FIRST, SECOND, FLAT, FLAT_SECOND)


def layouts(shape: Sequence[int], batch: int, batch_dim: int) -> list[Layout]:
    """The layouts in which a tensor, whose leading dimensions `shape` are samples or positions, may hold `batch` samples; the most
    likely first."""
    order = (SECOND, FIRST, FLAT_SECOND, FLAT) if batch_dim else ALL
    found = [one for one in order if not one.flat and one.fits(shape, batch)]
    if shape and shape[0] > batch:
        found += [one for one in order if one.flat and one.fits(shape, batch)]
    return found
