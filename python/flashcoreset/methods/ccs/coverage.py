"""How well a subset covers a distribution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import (
    as_integer,
    as_matrix,
    as_vector,
    check_finite,
    compute_dtype,
    one_of,
)
from flashcoreset.pairwise.backend import choose

_MEMBERS = 1024  # in a block
_BLOCK_BYTES = 2**24
# Largest magnitudes for which squares of distances, and of those 2^-20 times as long, are normal numbers.
_SAFE = {torch.float32: (-40, 55), torch.float64: (-400, 490)}
METRICS = ("euclidean", "sqeuclidean", "l1", "cosine")


def coverage_auc(
    x: Any,
    indices: Any,
    *,
    test: Any = None,
    metric: str = "euclidean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
) -> float:
    """The area under the coverage curve of a subset: the mean distance of a point to the nearest member. The less, the better.

    The coverage curve r(p) is the least radius with which balls around the members hold a share p of the points. The integral of r
    over p in [0, 1] is the mean of the points' distances to their nearest members, AUC_pr in the paper, which
    measures it on a test set in the features of a trained network.

    Args:
        x: [n, d] features that the members are rows of, float16, bfloat16, float32 or float64.
        indices: [k] integers in [0, n): the members.
        test: [m, d] points to cover, same dtype and device; None: x itself.
        metric: "euclidean" (as published), "sqeuclidean", "l1", or "cosine" (1 - the cosine; that of a zero row is 0).
        memory_budget: bytes for the distances in work.
        backend: "cpu", "cuda" or "triton" (on CUDA tensors), "torch" or None: whose kernels compute distances.

    Returns:
        float: the mean of m distances, summed in float64 in one order.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN or infinity, no indices, indices out of range, and unknown metrics.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high pruning rates", ICLR 2023, section 3.1.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> fc.coverage_auc(x, [0]), fc.coverage_auc(x, [0, 3])
        (1.5, 0.5)
    """
    check_backend(backend)
    one_of(metric, "metric", METRICS)
    budget = as_integer(memory_budget, "memory_budget")
    if budget < 1:
        raise ValueError(f"memory_budget must be >= 1, got {budget}")
    points = as_matrix(x, "x")
    queries = points if test is None else as_matrix(test, "test")
    if queries.shape[1] != points.shape[1]:
        raise ValueError(
            f"test must have {points.shape[1]} columns as x has, got shape {tuple(queries.shape)}"
        )
    if queries.dtype != points.dtype:
        raise TypeError(f"test must have the dtype of x, {points.dtype}, got {queries.dtype}")
    if queries.device != points.device:
        raise ValueError(f"test is on device {queries.device}, but x is on {points.device}; move one of them")
    chosen = as_vector(
        indices.to(points.device) if isinstance(indices, Tensor) else indices, "indices", points.device, integers=True
    )  # fmt: skip
    if len(chosen) == 0:
        raise ValueError("indices must have at least 1 entry, got none")
    bad = (chosen < 0) | (chosen >= len(points))
    if bad.any():
        place = int(bad.nonzero()[0])
        raise ValueError(
            f"indices must be in [0, {len(points)}), got {int(chosen[place])} at position {place}"
        )
    kernels = choose(backend, points.device)
    check_finite(points, "x")
    check_finite(queries, "test")
    dtype = compute_dtype(points.dtype)
    members = points[chosen].to(dtype)
    exponent = 0
    if metric != "cosine":
        exponent = exponent_into(largest_magnitude(points, queries), _SAFE[dtype])
    members = scale(points[chosen].to(dtype), exponent)
    step = block_rows(len(members), dtype.itemsize, budget)
    nearest: list[float] = []
    for rows in queries.split(step):
        wide, least = scale(rows.to(dtype), exponent), None
        for part in members.split(_MEMBERS):
            pairs = kernels.pairwise(wide, part, metric=metric)
            low = 1 - pairs.amax(1).double() if metric == "cosine" else pairs.amin(1).double()
            least = low if least is None else torch.minimum(least, low)
        assert least is not None
        nearest += least.tolist()
    # Exactly summed, so that the blocks do not matter.
    return times_power(math.fsum(nearest) / len(queries), -exponent * (2 if metric == "sqeuclidean" else 1))


def block_rows(members: int, size: int, memory_budget: int) -> int:
    """The points whose distances to a block of members are computed at a time."""
    return max(1, min(_BLOCK_BYTES, memory_budget) // (size * min(members, _MEMBERS)))


@register_estimate("coverage_auc")
def _estimate(
    x: Any,
    indices: Any,
    *,
    test: Any = None,
    dtype: torch.dtype = torch.float32,
    metric: str = "euclidean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
) -> int:
    """The bytes of one call; see `memory_estimate`."""
    check_backend(backend)
    one_of(metric, "metric", METRICS)
    dtype = as_dtype(dtype)
    n, d = as_shape(x, "x")
    (k,) = as_shape(indices, "indices", 1)
    m, width = (n, d) if test is None else as_shape(test, "test")
    if width != d:
        raise ValueError(f"test must have {d} columns as x has, got shape {(m, width)}")
    size = compute_dtype(dtype).itemsize
    rows = min(m, block_rows(k, size, memory_budget))
    # The members and their packed copies; a block of points, scaled and packed; its distances; a float per point.
    return 4 * k * d * size + 4 * rows * d * size + 2 * rows * min(k, _MEMBERS) * size + 64 * m + 2**20
