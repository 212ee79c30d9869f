"""What a Carathéodory reduction is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Problem:
    """Rows whose weighted mean and total weight a few of them are to have.

    Attributes:
        x: [n, d] float16, bfloat16, float32 or float64, in any strides.
        weights: [n] float64 >= 0, not all 0; None for 1.
        max_size: > 0 ends the reduction as soon as at most that many rows are left.
        one_scale: numbers that are small beside the largest of all count as rounding, in every column. On the CPU alone; the
            columns of other backends are of any size.
    """

    x: Tensor
    weights: Tensor | None = None
    max_size: int = 0
    one_scale: bool = False

    @property
    def room(self) -> int:
        """The most rows that can be left."""
        return min(self.x.shape[0], max(self.x.shape[1] + 1, self.max_size))


@dataclass(slots=True, eq=False)
class Runs:
    """Rows that are left, in runs of neighbours. All tensors are on one device.

    Attributes:
        x: [n, d] points.
        rows: [count] int64, those of x that are left, ascending; None for all.
        weights: [count] float64; None for 1.
        size: the rows of a run; the last run may have fewer.
    """

    x: Tensor
    rows: Tensor | None
    weights: Tensor | None
    size: int = 1

    @property
    def count(self) -> int:
        return len(self.x) if self.rows is None else len(self.rows)

    def points(self, begin: int, end: int) -> Tensor:
        """Rows begin to end, on the host."""
        points = self.x[begin:end] if self.rows is None else self.x.index_select(0, self.rows[begin:end])
        return points.cpu()

    def host_rows(self) -> Tensor:
        return torch.arange(self.count) if self.rows is None else self.rows.cpu()

    def host_weights(self) -> Tensor:
        """A copy of the weights on the host."""
        if self.weights is None:
            return torch.ones(self.count, dtype=torch.float64)
        return self.weights.to("cpu", copy=True)

    def without_zeros(self) -> Runs:
        if self.weights is None:
            return self
        rows = self.weights.nonzero()[:, 0]
        return Runs(self.x, rows if self.rows is None else self.rows[rows], self.weights[rows])
