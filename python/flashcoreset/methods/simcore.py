"""SimCore: the part of an open set that looks like a target set."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.imports import imported
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.philox import uniforms
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_integer, as_matrix, as_number, check_finite, compute_dtype
from flashcoreset.nearest_order import Rounds, RowSource, chunk_rows, compute_type, list_bytes
from flashcoreset.nearest_order.backend import choose
from flashcoreset.nearest_order.rows import normalize_rows

_PER_TARGET = 50  # picks per distinct target point if no k is given


def simcore(
    openset: Any,
    target: Any,
    k: int | None = None,
    *,
    n_clusters: int = 100,
    stop: bool = True,
    stop_threshold: float = 0.95,
    patience: int = 20,
    seed: int = 0,
    n_init: int = 10,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
) -> Coreset:
    """Takes from an open set the items that are most similar to a target set, round by round.

    The rows of both sets are scaled to unit length, the target is clustered by k-means and its centroids are
    scaled to unit length. Target rows that are then equal are one point, which counts in k-means as often as it
    appears. In a round every centroid takes its most similar item (by cosine) that no earlier
    round took; two centroids may take the same item in one round, and then it counts once. The value of a round
    is the mean over the centroids of the similarities taken. With `stop`, the value of round number
    `patience` times `stop_threshold` is the threshold, and the first later round whose value is below it is
    dropped and ends the selection. Ties go to the lowest index; a zero row has similarity 0 to everything.

    The open set is streamed: from the n x n_clusters similarities a partial order for each centroid is kept,
    and the open set is read again when one of these orders runs out.

    Args:
        openset: [n, d] float16, bfloat16, float32 or float64: a tensor or array (also a memory-mapped one),
            or an iterable of such batches [., d] that together are the open set: a list, a DataLoader
            without shuffling, an object whose `iter()` starts anew, a function that returns a new iterator,
            or an iterator (a generator), which can be read only once. A batch may also be a tuple or list
            whose first entry is the matrix; batches without rows are passed over. The indices count the rows in the order in which they come, so a
            DataLoader that shuffles, samples, drops or mixes rows is refused. An iterable is read once if n_clusters x k entries
            of 24 bytes fit into 3/4 of `memory_budget`.
        target: [m, d], on the same device.
        k: the most items to take, 1 <= k <= n. None, with `stop`: 50 per point of the target,
            or n if that is less.
        n_clusters: the number of centroids; if the target has no more points than that, every point is a centroid.
        stop: whether a round of low value ends the selection.
        stop_threshold: share of the reference value, >= 0.
        patience: the round, counted from 1, whose value is the reference: 20 in the published code, 1 in the
            paper.
        seed: for k-means, and for the random part of the last round that is kept if all of it would exceed
            k; 0 <= seed < 2^32.
        n_init: the number of k-means starts, of which the best is kept. scikit-learn runs them on one thread, since its
            sums depend on the number of threads in their last bits.
        memory_budget: bytes for the partial orders and the chunks in work, k-means not included.
        backend: None, "cpu" or "torch".
        progress: None, True for a bar, or a callable(done, total) that gets the items taken and `k`; it is
            called with an unchanged `done` while the open set is read.

    Returns:
        Coreset: `indices` round by round, in a round in the order of the centroids that took them; `weights`
        all 1; and `info`: "rounds" (kept ones), "values" (one per round), "counts" (items per round),
        "threshold" (None if it was not reached), "dropped_value" (the value of the round that ended the
        selection, or None), "stopped" ("k", "threshold", or "exhausted": the whole open set was taken), "k"
        (the limit), "passes" (how often the open set was read), "centroids" ([K, d]).

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, options out of range, NaN or infinity, k > n, neither `stop` nor `k`, an
            open set that changes from one reading to the next, an iterator that would have to be read
            again, and a DataLoader whose rows do not come in the order of its data set.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Kim, Bae and Yun, "Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning",
    CVPR 2023.

    Example:
        >>> import torch, flashcoreset as fc
        >>> openset = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [-1.0, 0.0]])
        >>> fc.simcore(openset, torch.tensor([[1.0, 0.0]]), 2).indices
        tensor([0, 2])
    """
    check_backend(backend)
    check_progress(progress)
    if not isinstance(stop, (bool, np.bool_)):
        raise TypeError(f"stop must be a bool, got {stop!r} of type {type(stop).__name__}")
    if k is not None:
        k = _at_least_one(k, "k")
    elif not stop:
        raise ValueError("k must be given where stop is False, or nothing would end the selection")
    n_clusters = _at_least_one(n_clusters, "n_clusters")
    patience = _at_least_one(patience, "patience")
    n_init = _at_least_one(n_init, "n_init")
    memory_budget = _at_least_one(memory_budget, "memory_budget")
    stop_threshold = as_number(stop_threshold, "stop_threshold")
    if stop_threshold < 0:
        raise ValueError(f"stop_threshold must be >= 0, got {stop_threshold}")
    seed = as_integer(seed, "seed")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    points = as_matrix(target, "target")
    source = RowSource(openset)
    if points.shape[1] != source.columns:
        raise ValueError(
            f"target must have {source.columns} columns as openset has, got shape {tuple(points.shape)}"
        )
    if points.device != source.device:
        raise ValueError(
            f"target is on device {points.device}, but openset is on {source.device}; move one of them"
        )
    _check_size(k, source)
    choose(backend, source.device)
    check_finite(points, "target")

    dtype = compute_type(source, points)
    points, counts = _distinct(points.to(dtype))
    centroids = _centroids(points, counts, n_clusters, seed, n_init)
    limit = k if k is not None else _PER_TARGET * points.shape[0]
    if source.rows is not None:
        limit = min(limit, source.rows)
    with Progress(progress, limit, "simcore") as bar:
        rounds = Rounds(source, centroids, limit, backend=backend, memory_budget=memory_budget, progress=bar)
        rounds.read()
        _check_size(k, source)
        assert source.rows is not None
        limit = min(limit, source.rows)
        picks, info = _select(rounds, limit, bool(stop), stop_threshold, patience, seed, bar)
    if info["stopped"] == "k" and k is None and limit == source.rows:
        info["stopped"] = "exhausted"
    info |= {"k": limit, "passes": source.passes, "centroids": centroids}
    weights = torch.ones(len(picks), dtype=dtype, device=source.device)
    return Coreset(picks.to(source.device), weights, info)


def _select(
    rounds: Rounds, k: int, stop: bool, stop_threshold: float, patience: int, seed: int, progress: Progress
) -> tuple[Tensor, dict[str, Any]]:
    """The picks [<= k] and what is known about them; `rounds` has at least k items to give."""
    picks: list[Tensor] = []
    kept_values: list[float] = []
    kept_counts: list[int] = []
    threshold: float | None = None
    dropped: float | None = None
    taken = 0
    while taken < k and dropped is None:
        items, counts, values = rounds.take()
        for new, value in zip(items.split(counts), values, strict=True):
            if threshold is not None and value < threshold:
                dropped = value
                break
            if len(new) > k - taken:
                # The items with the smallest of as many random numbers, in the order of the centroids.
                keep = np.sort(np.argsort(uniforms(seed, 0, len(new)), kind="stable")[: k - taken])
                new = new[torch.from_numpy(keep)]
            picks.append(new)
            kept_values.append(value)
            kept_counts.append(len(new))
            taken += len(new)
            if stop and len(kept_values) == patience:
                threshold = value * stop_threshold
        progress.update(taken)
    info: dict[str, Any] = {
        "rounds": len(kept_values),
        "values": kept_values,
        "counts": kept_counts,
        "threshold": threshold,
        "dropped_value": dropped,
        "stopped": "k" if dropped is None else "threshold",
    }
    return torch.cat(picks), info


def _distinct(target: Tensor) -> tuple[Tensor, np.ndarray]:
    """The distinct rows of unit length (or zero) in the order of their first appearance, and how often each appears."""
    points = normalize_rows(target) + 0.0  # -0.0 and 0.0 are the same
    rows = np.ascontiguousarray(points.cpu().numpy())
    _, first, counts = np.unique(
        rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0],
        return_index=True,
        return_counts=True,
    )
    order = first.argsort()
    return points[torch.from_numpy(first[order]).to(points.device)], counts[order]


def _centroids(points: Tensor, counts: np.ndarray, n_clusters: int, seed: int, n_init: int) -> Tensor:
    """The centroids [K, d], distinct rows of unit length (or zero)."""
    if points.shape[0] <= n_clusters:
        return points.contiguous()
    threadpool_limits = imported("threadpoolctl").threadpool_limits
    kmeans = imported("sklearn.cluster").KMeans(n_clusters=n_clusters, n_init=n_init, random_state=seed)
    # A target that is repeated as a whole has the same centroids as a single copy.
    weights = counts // np.gcd.reduce(counts)
    with warnings.catch_warnings(), threadpool_limits(1):
        # For points that differ by less than k-means can resolve, some centroids are equal.
        warnings.simplefilter("ignore", imported("sklearn.exceptions").ConvergenceWarning)
        kmeans.fit(points.cpu().numpy(), sample_weight=None if weights.max() == 1 else weights)
    centers = torch.from_numpy(kmeans.cluster_centers_).to(points.device, points.dtype)
    return _distinct(centers)[0].contiguous()


def _at_least_one(value: Any, name: str) -> int:
    number = as_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {number}")
    return number


def _check_size(k: int | None, source: RowSource) -> None:
    if k is not None and source.rows is not None and k > source.rows:
        raise ValueError(f"k must be <= the {source.rows} rows of openset, got {k}")


@register_estimate("simcore")
def _estimate(
    openset: Any,
    target: Any,
    k: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    n_clusters: int = 100,
    stop: bool = True,
    stop_threshold: float = 0.95,
    patience: int = 20,
    seed: int = 0,
    n_init: int = 10,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Any = None,
) -> int:
    """The bytes of one call; see `memory_estimate`."""
    check_backend(backend)
    n_clusters = _at_least_one(n_clusters, "n_clusters")
    memory_budget = _at_least_one(memory_budget, "memory_budget")
    k = None if k is None else _at_least_one(k, "k")
    dtype = as_dtype(dtype)
    n, d = as_shape(openset, "openset")
    m, width = as_shape(target, "target")
    if width != d:
        raise ValueError(f"target must have {d} columns as openset has, got shape {(m, width)}")
    size = compute_dtype(dtype).itemsize
    lists = min(m, n_clusters)
    limit = min(n, _PER_TARGET * m if k is None else k)
    length = min(limit, max(1, memory_budget * 3 // 4 // list_bytes(lists, size, backend)))
    orders = length * list_bytes(lists, size, backend)
    chunk = chunk_rows(d, lists, size, memory_budget) * (d * size + 40 * lists)
    # scikit-learn copies the points, and keeps two distances to a centroid and some counters for each.
    clustering = 4 * m * d * size + 4 * m * lists * size if m > n_clusters else 3 * m * d * size
    survivors = torch.get_num_threads() * 2**20 + 2 * 24 * max(1 << 19, 64 * lists)
    return clustering + orders + chunk + survivors + 2 * lists * d * size + n // 8 + 24 * limit
