"""The unit of gains, which are sums of integers, from a bound of all sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bounds_of_points(x: Tensor, clients: Tensor, metric: str, floor: float) -> Tensor:
    """Bounds [m] float64: for each of `clients` [m, d] a number not below max_j s(j, i) - floor over the rows j of `x`
    [n, d]."""
    if metric == "dot":
        return clients.double().norm(dim=1) * (x.double().norm(dim=1).max() * 1.001)
    bound = 1.001 if metric == "cosine" else -floor
    return torch.full((clients.shape[0],), bound, dtype=torch.float64, device=x.device)


def bounds_of_matrix(s: Tensor, floor: float) -> Tensor:
    """Bounds [m] float64: for each column of `s` [n, m] a number not below its entries and 0, less `floor` <= 0."""
    largest = max(0.0, float(s.max())) - floor
    return torch.full((s.shape[1],), largest, dtype=torch.float64, device=s.device)


def _ceil_log2(value: float) -> int:
    """The least e with value <= 2^e; math.log2 rounds a value just above a power of two down to that power."""
    mantissa, exponent = math.frexp(value)
    return exponent if mantissa > 0.5 else exponent - 1


def gain_scale(upper: Tensor, weights: Tensor, metric: str, dtype: torch.dtype) -> float:
    """The power of two by which gains are made integers.

    With bound = sum_i w_i * upper_i the scale is the largest with bound * scale <= 2^61, such that weights * scale stay in
    the range of `dtype`.

    Args:
        upper: [m] float64, for each client a bound of its similarities above the floor.
        weights: [m] float64.
        metric: for the message.
        dtype: float32 or float64, the type of the similarities.

    Raises:
        ValueError: if similarities overflow `dtype`, or gains would vanish in it.
    """
    bound, largest_weight = float((weights * upper).sum()), float(weights.max())
    if not (float(upper.max()) <= torch.finfo(dtype).max and math.isfinite(bound)):
        raise ValueError(
            f"x: similarities of metric {metric!r} overflow {dtype}; scale the data down or use float64"
        )
    if bound <= 0:
        return 0.0
    largest = 126 if dtype == torch.float32 else 1000
    exponent = 61 - _ceil_log2(bound)
    scale = math.ldexp(1.0, min(exponent, largest - _ceil_log2(largest_weight), 1000))
    if bound * scale < 2**30:
        raise ValueError(
            "x: similarities times weights are so close to the smallest numbers of the type that gains would be "
            "lost; scale x or the weights up"
        )
    return scale


def pick_keys(gains: Tensor, costs: Tensor | None) -> Tensor:
    """What candidates are compared by, int64: their `gains`, or the bits of gain / cost in float64, which have the order of such
    numbers since none is negative."""
    return gains if costs is None else (gains.double() / costs).view(torch.int64)
