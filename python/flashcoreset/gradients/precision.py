"""The precision of numbers of a type, and copies of tensors, for the checks of GradientSketcher."""

from __future__ import annotations

import torch
from torch import Tensor

PART = 1 << 22  # entries that are converted at a time


def kept(x: Tensor) -> Tensor:
    """A copy that a model may change in place."""
    return as_input(x, x.detach().clone())


def as_input(x: Tensor, new: Tensor) -> Tensor:
    """`new`, which requires gradients if `x` does."""
    return new.requires_grad_(x.requires_grad)


def working_dtype(x: Tensor) -> torch.dtype:
    """The type float32 if the squares of x's numbers are normal numbers, else float64."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not x.numel():
        return torch.float64
    low, high = torch.aminmax(x)
    return torch.float32 if 1e-12 <= max(-float(low), float(high)) <= 1e12 else torch.float64


def eps(dtype: torch.dtype) -> float:
    """The spacing of numbers of the type near 1; for integers that of float64."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 2.0**-52


def precision_of(*dtypes: torch.dtype, device: torch.device) -> float:
    """The relative precision of arithmetic with tensors of `dtypes`."""
    found = max(eps(dtype) for dtype in dtypes)
    if found < 1e-12:
        return found
    if torch.get_float32_matmul_precision() == "medium":
        return max(found, 2.0**-7)
    tf32 = device.type == "cuda" or torch.get_float32_matmul_precision() == "high"  # cuDNN's default
    return max(found, 2.0**-10) if tf32 else found
