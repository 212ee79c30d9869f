"""Similarities and distances of all pairs of rows: kernels that other families use."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_rows(x: Tensor) -> Tensor:
    """`x` [n, d] with rows of unit length; a zero row stays zero.

    Rows are divided by their largest magnitude first, since squares of large or tiny values leave the range
    of the type.
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    squares = x.new_zeros(x.shape[0])
    for feature in x.unbind(1):
        squares += feature * feature
    norm = squares.sqrt().unsqueeze(1)
    return x / torch.where(norm > 0, norm, 1)
