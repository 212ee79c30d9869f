"""Rows of unit length."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_rows(x: Tensor) -> Tensor:
    """`x` [n, d] with every row divided by its Euclidean norm; a zero row stays zero.

    The row is first divided by its largest magnitude, so that squares neither overflow nor vanish.
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    norm = x.square().sum(dim=1, keepdim=True).sqrt()
    return x / torch.where(norm > 0, norm, 1)
