"""Arrays of points as tensors, and their values checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.tensor import check_finite


def as_points(value: Any, name: str, dtype: type[np.floating] | None = None) -> Tensor:
    """[n, d] of `dtype` (None: float32 if it is, otherwise float64), finite; `name` is for messages."""
    array = np.asarray(value)
    dtype = dtype or (np.float32 if array.dtype == np.float32 else np.float64)
    points = torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
    if points.dim() != 2 or 0 in points.shape:
        raise ValueError(f"{name} must have 2 dimensions of at least 1, got shape {tuple(points.shape)}")
    check_values(points, name)
    return points


def check_values(values: Tensor, name: str) -> None:
    """Raises ValueError for NaN or infinity in a matrix or vector; reads it once if there is none."""
    if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        check_finite(values, name)
