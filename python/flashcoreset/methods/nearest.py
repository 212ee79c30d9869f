"""The rows that are most similar to a target: the control beside SimCore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale
from flashcoreset._core.tensor import as_matrix, at_least_one, check_finite, compute_dtype, one_of
from flashcoreset.methods.ccs.strata import lowest
from flashcoreset.nearest_order import RowSource, compute_type
from flashcoreset.pairwise.backend import choose

_METRICS = ("cosine", "dot", "euclidean", "sqeuclidean", "l1")

# Rows of magnitudes between these powers of two have products and distances that are normal numbers.
_SAFE = {torch.float32: (-40, 50), torch.float64: (-400, 480)}


def nearest(
    openset: Any,
    target: Any,
    k: int,
    *,
    metric: str = "cosine",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
) -> Coreset:
    """Takes from an open set the k rows that are most similar to any row of a target: the control beside `simcore`.

    Ties go to the lowest index.

    Args:
        openset: [n, d] float16, bfloat16, float32 or float64: a tensor or array (also a memory-mapped one); with "cosine" also an
            iterable of batches, as `simcore` takes it. It is read once.
        target: [m, d], on the same device.
        k: the number of rows to take, 1 <= k <= n.
        metric: "cosine" (a zero row has similarity 0 to everything) or "dot", of which the largest count; "euclidean",
            "sqeuclidean" or "l1", of which the smallest count.
        memory_budget: bytes for the rows and similarities in work.
        backend: None, "cpu", "cuda", "triton" or "torch".
        progress: None, True for a bar, or a callable(done, total) of rows that were read, where their number is known.

    Returns:
        Coreset: `indices` from the most similar row on; `weights` all 1; and `info`: "values" ([k] the similarity or distance
        of each to its nearest target row), "targets" ([k] int64, the index of that row).

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN or infinity, options out of range, k > n, a metric other than "cosine" for batches, and products
            that overflow.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Example:
        >>> import torch, flashcoreset as fc
        >>> openset = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
        >>> fc.nearest(openset, torch.tensor([[2.0, 0.0], [0.0, -1.0]]), 2).indices
        tensor([0, 2])
    """
    check_backend(backend)
    check_progress(progress)
    one_of(metric, "metric", _METRICS)
    k = at_least_one(k, "k")
    memory_budget = at_least_one(memory_budget, "memory_budget")
    points = as_matrix(target, "target")
    source = RowSource(openset)
    if metric != "cosine" and not source.is_matrix:
        raise ValueError(
            f"metric must be 'cosine' for an openset in batches, whose magnitudes are not known from the start, got {metric!r}"
        )
    if points.shape[1] != source.columns:
        raise ValueError(
            f"target must have {source.columns} columns as openset has, got shape {tuple(points.shape)}"
        )
    if points.device != source.device:
        raise ValueError(
            f"target is on device {points.device}, but openset is on {source.device}; move one of them"
        )
    _check_size(k, source.rows)
    kernels = choose(backend, source.device)
    check_finite(points, "target")
    dtype = compute_type(source, points)
    points = points.to(dtype).contiguous()
    of_target, of_openset = _exponents(points, openset if source.is_matrix else None, metric, dtype)
    points = scale(points, of_target) if of_target else points
    with Progress(progress, source.rows or 0, "nearest") as bar:
        told = bar if source.rows else None
        found = list(_best(source, points, of_openset, kernels, metric, memory_budget, told))
    values = np.concatenate([of for of, _ in found])
    targets = np.concatenate([of for _, of in found])
    _check_size(k, len(values))
    power = of_target + of_openset if metric == "dot" else of_target * (2 if metric == "sqeuclidean" else 1)
    order = values if metric in ("cosine", "dot") else -values
    taken = np.flatnonzero(lowest(-order, k))
    taken = taken[np.argsort(-order[taken], kind="stable")]
    best = torch.from_numpy(values[taken]).to(source.device)
    best = scale(best, -power) if power else best
    if not bool(torch.isfinite(best).all()):
        raise ValueError(f"openset: its {metric} values beside target overflow {dtype}; scale both down")
    info = {"values": best, "targets": torch.from_numpy(targets[taken]).to(source.device)}
    return Coreset(
        torch.from_numpy(taken).to(source.device), torch.ones(k, dtype=dtype, device=source.device), info
    )


def _exponents(target: Tensor, openset: Any, metric: str, dtype: torch.dtype) -> tuple[int, int]:
    """The powers of two that target and openset have to be multiplied by: products may have two, distances need one."""
    if openset is None:
        return 0, 0
    x = as_matrix(openset, "openset")
    check_finite(x, "openset")
    if metric == "cosine":
        return 0, 0  # the kernels scale rows
    most = largest_magnitude(target), largest_magnitude(x)
    if metric != "dot":
        most = max(most), max(most)
    of_target, of_openset = (exponent_into(of, _SAFE[dtype]) for of in most)
    return of_target, of_openset


def _best(
    source: RowSource,
    target: Tensor,
    exponent: int,
    kernels: Any,
    metric: str,
    memory_budget: int,
    progress: Progress | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For pieces of the open set: each row's best value, and the first target row that has it."""
    m, device = len(target), target.device
    rows = _piece_rows(target.shape[1], m, target.element_size(), memory_budget)
    rows = rows if source.rows is None else min(rows, source.rows)
    # Made once: between results that are kept, the allocator would find no room for the next ones.
    values = torch.empty(rows, m, dtype=target.dtype, device=device)
    equal = torch.empty(rows, m, dtype=torch.bool, device=device)
    where = torch.empty(rows, m, dtype=torch.int64, device=device)
    places, none = torch.arange(m, device=device), torch.tensor(m, device=device)
    done = 0
    for piece in source.read(target.dtype, rows):
        if not source.is_matrix:
            check_finite(piece, f"openset from row {done} on")
        n = len(piece)
        scaled = scale(piece, exponent) if exponent else piece
        kernels.pairwise(scaled, target, metric=metric, out=values[:n])
        best = values[:n].amax(1) if metric in ("cosine", "dot") else values[:n].amin(1)
        # torch's argmax may be any of equal places.
        torch.eq(values[:n], best[:, None], out=equal[:n])
        torch.where(equal[:n], places, none, out=where[:n])
        done += n
        if progress is not None:
            progress.update(done)
        yield best.cpu().numpy(), where[:n].amin(1).cpu().numpy()


def _piece_rows(d: int, m: int, size: int, memory_budget: int) -> int:
    """Rows of which features, values and places fit into half of the budget."""
    return max(1, memory_budget // 2 // (2 * d * size + m * (size + 9)))


def _check_size(k: int, rows: int | None) -> None:
    if rows is not None and k > rows:
        raise ValueError(f"k must be <= the {rows} rows of openset, got {k}")


@register_estimate("nearest")
def _estimate(
    openset: Any,
    target: Any,
    k: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    metric: str = "cosine",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Any = None,
) -> int:
    """The bytes of one call; see `memory_estimate`."""
    check_backend(backend)
    one_of(metric, "metric", _METRICS)
    k, memory_budget = at_least_one(k, "k"), at_least_one(memory_budget, "memory_budget")
    n, d = as_shape(openset, "openset")
    m, width = as_shape(target, "target")
    if width != d:
        raise ValueError(f"target must have {d} columns as openset has, got shape {(m, width)}")
    _check_size(k, n)
    size = compute_dtype(as_dtype(dtype)).itemsize
    rows = min(n, _piece_rows(d, m, size, memory_budget))
    work = rows * (3 * d * size + m * (size + 9))
    kept = 2 * n * (size + 8) + 3 * n * size  # the pieces' results, put together; the order of values
    return 3 * m * d * size + work + work // 8 + kept + 32 * k
