"""The memory that a call of `match_gradients` takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.dispatch import DEFAULTS, check_backend
from flashcoreset._core.inputs import numbered_labels
from flashcoreset._core.memory import as_dtype, as_shape, memory_estimate, register_estimate
from flashcoreset._core.tensor import as_integer, as_vector, compute_dtype, one_of
from flashcoreset.gradients.adam import AdamState, RankOneAdamState
from flashcoreset.gradients.outer_products import OuterProductGradients
from flashcoreset.gradients.zeroth_order import LowRankGradients
from flashcoreset.matching.problem import METHODS, METRICS, check_top
from flashcoreset.matching.rule import BLOCK as REFERENCE_BLOCK
from flashcoreset.matching.updates import BLOCK_BYTES
from flashcoreset.pursuit import pursuit_bytes


@register_estimate("match_gradients")
def _estimate(
    g: Any,
    k: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    normalize: Any = None,
    top: int | None = None,
    groups: Any = None,
    budgets: Any = None,
    metric: str = "l1",
    method: str = "medoid",
    nonnegative: bool = True,
    ridge: float = 0.0,
    backend: str | None = None,
) -> int:
    """The bytes of one call; see `memory_estimate`. `g` may be `LowRankGradients` or `OuterProductGradients`; labels in `groups` say how large the groups are,
    their shape alone stands for one group of all. A `RankOneAdamState` counts as the rows that may have to be made from it."""
    one_of(metric, "metric", METRICS)
    one_of(method, "method", METHODS)
    check_backend(backend)
    is_factored = isinstance(g, OuterProductGradients)
    if isinstance(g, LowRankGradients):
        dtype, q, backend_of = g.coefficients.dtype, g.coefficients.shape[1], g.coefficients
        count, numel = len(g.coefficients), g.numel
    elif is_factored:
        dtype, q, backend_of = g.dtype, 0, g.factors[0][0]
        count, numel = len(g), g.numel
    else:
        dtype, q, backend_of = as_dtype(dtype), 0, g
        count, numel = as_shape(g, "g")
    if backend is None:
        device = backend_of.device.type if isinstance(backend_of, Tensor) else "cpu"
        backend = DEFAULTS.get(device, ("torch",))[0]
    k = count if k is None else as_integer(k, "k")
    if not 1 <= k <= count:
        raise ValueError(f"k must be between 1 and {count}, the rows of g, got {k}")
    top = check_top(top, numel)
    if normalize is not None and not isinstance(normalize, (AdamState, RankOneAdamState)):
        raise TypeError(f"normalize must be an AdamState, got {type(normalize).__name__}")
    if normalize is not None and normalize.numel != numel:
        raise ValueError(
            f"normalize must be of gradients of length {numel}, got one of length {normalize.numel}"
        )
    sizes = _sizes_of_groups(groups, count)
    largest, threads, size = max(sizes), torch.get_num_threads(), compute_dtype(dtype).itemsize

    history = 0 if normalize is None else 2 * numel * size  # the history after the step
    if isinstance(normalize, RankOneAdamState):
        history *= 3  # and the history before the step, and what it is made from
    results = 72 * k + 32 * count
    width = min(numel, max(1, BLOCK_BYTES // (8 * count))) if top is None else top
    updates = 8 * (count + len(sizes)) * width
    if backend == "torch":
        # A group's float64 rows and what their updates are made from, sums, and sorted positions.
        search = (4 * largest + 40) * 8 * min(numel, REFERENCE_BLOCK) + 64 * len(sizes) * width
        step = 40 * k * min(numel, REFERENCE_BLOCK)
    elif backend == "cpu":
        # Each thread's lists, twice as long as they have to be, its tile and directions.
        search = threads * (16 * (2 * len(sizes) + 2) * width + 40 * max(q, 1) * 1024 + 2**19)
        step = threads * (40 * max(q, 1) * 1024 + 2**18)
    else:
        chunk = min(numel, max(2**19 // len(sizes), width))
        search, step = 64 * len(sizes) * (width + chunk), 2**20

    def solved(columns: int, dtype: torch.dtype, picked: int) -> int:
        shape = (largest, columns)
        if method == "medoid":
            return memory_estimate(
                "facility_location", shape, k=picked, dtype=dtype, metric=metric, backend=backend
            )
        if method == "caratheodory":
            return memory_estimate("caratheodory", shape, max_size=picked, dtype=dtype, backend=backend)
        pursued = pursuit_bytes(largest, columns, picked, dtype, method == "omp", backend)
        return 16 * columns + max(BLOCK_BYTES, pursued)

    picked = min(k, largest)
    if is_factored:
        # A block of columns and what it is made of, its updates, and the factors of the chosen rows.
        block = min(numel, max(1, BLOCK_BYTES // (8 * count)))
        results += (3 * size + 16) * count * block
        results += sum(k * a.shape[1] * (a.shape[2] + rows.shape[2]) * size for a, rows in g.factors)
        updates *= 3
    if top is not None:
        return results + updates + max(search, solved(top, torch.float64, picked), step + history)
    pairs = 8 * sum(n * n for n in sizes)
    blocks = updates + search + 2 * count * width * size + q * width * size
    if method == "medoid":
        own = 8 * largest**2
        block = blocks + own + 8 * largest * width
        choice = 4 * own + memory_estimate(
            "facility_location",
            (largest, largest),
            k=picked,
            dtype=torch.float64,
            metric="precomputed",
            backend=backend,
        )
        return results + pairs + max(block, choice, step + history)
    if normalize is None and not q and not is_factored:
        copied = largest * numel * size if dtype.itemsize < size else 0
        copied += largest * numel * dtype.itemsize if len(sizes) > 1 else 0
        return results + copied + solved(numel, compute_dtype(dtype), picked)
    if normalize is None and not is_factored:
        directions = 3 * q * width * 8 + 24 * q * q
        return results + directions + 8 * count * q + solved(q, torch.float64, picked)
    # Eigenvectors of a group's products, and LAPACK's room for them.
    factor = 48 * largest**2
    block = max(blocks + 8 * largest**2 + 8 * largest * width, factor, solved(largest, torch.float64, picked))
    return results + 2 * pairs + max(block, step + history)


def _sizes_of_groups(groups: Any, count: int) -> list[int]:
    if groups is None or not isinstance(groups, (Tensor, np.ndarray, list)):
        if groups is not None and as_shape(groups, "groups", 1) != (count,):
            raise ValueError(f"groups must have shape [{count}], got {groups}")
        return [count]
    (groups,) = numbered_labels(groups)
    labels = as_vector(groups, "groups", torch.device("cpu"), integers=True, length=count)
    return labels.unique(return_counts=True)[1].tolist()
