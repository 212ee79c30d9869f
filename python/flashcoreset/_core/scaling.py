"""Powers of two that bring data into the range where squares and products are normal numbers: multiplying by one is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def largest_magnitude(*tensors: Tensor | None) -> float:
    """The largest magnitude of all entries; infinite or NaN if an entry is."""
    most = 0.0
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            for end in torch.aminmax(tensor.detach()):
                magnitude = abs(float(end))
                most = magnitude if magnitude > most or magnitude != magnitude else most
    return most


def exponent_into(magnitude: float, safe: tuple[int, int], target: tuple[int, int] = (0, 0)) -> int:
    """The e such that magnitude * 2^e is near 2^target[0] if the magnitude is below 2^safe[0], and near 2^target[1] if it is above
    2^safe[1]; else 0, also for magnitudes that are 0 or not finite."""
    if magnitude == 0 or not math.isfinite(magnitude):
        return 0
    exponent = math.frexp(magnitude)[1]
    if safe[0] < exponent <= safe[1]:
        return 0
    return target[exponent > safe[1]] - exponent


def times_power(value: float, exponent: int) -> float:
    """value * 2^exponent, infinite if that overflows."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def scale(values: Tensor, exponent: int | Sequence[int]) -> Tensor:
    """values * 2^exponent, with a list one exponent per row; rounded once."""
    # In two factors, neither of which overflows or is rounded.
    if isinstance(exponent, int):
        half = exponent // 2
        return values * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)
    shape = (-1, *[1] * (values.dim() - 1))
    for powers in ([e // 2 for e in exponent], [e - e // 2 for e in exponent]):
        factors = [math.ldexp(1.0, power) for power in powers]
        values = values * torch.tensor(factors, dtype=values.dtype, device=values.device).reshape(shape)
    return values
