"""SimCore: the part of an open set that looks like a target set."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.errors import InputWarning, warn_caller
from flashcoreset._core.imports import imported
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.philox import uniforms
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_integer, as_matrix, as_number, check_finite, compute_dtype
from flashcoreset.nearest_order import Rounds, RowSource, chunk_rows, compute_type, list_bytes
from flashcoreset.nearest_order.backend import Taken, choose
from flashcoreset.nearest_order.rows import normalize_rows

_PER_TARGET = 50  # picks per distinct target point (or centroid of the caller's) if no k is given
# The published experiment takes 20 rounds of 100 items of 1.28 million before the round that is the reference.
_ITEMS_PER_REFERENCE, _LONGEST_PATIENCE = 640, 20

_WAIT = 0.05  # seconds
# Up to how many points k-means gets ten starts by default, and all points at a time. On mixtures and on normal points of 64
# dimensions one start leaves 0 to 3 % more of the squared distances than the best of six, and batches 0 to 2 %.
_ONE_START_FROM, _BATCHES_FROM, _BATCH = 10_000, 100_000, 4_096


def simcore(
    openset: Any,
    target: Any = None,
    k: int | None = None,
    *,
    centroids: Any = None,
    ratio: float | None = None,
    n_clusters: int = 100,
    stop: bool = True,
    stop_threshold: float = 0.95,
    patience: int | None = None,
    fit_on: int | None = None,
    seed: int = 0,
    n_init: int | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
) -> Coreset:
    """Takes from an open set the items that are most similar to a target set, round by round.

    The rows of both sets are scaled to unit length, the target is clustered by k-means and its centroids are
    scaled to unit length. Target rows that are then equal are one point: duplicates change nothing. In a round every centroid
    takes its most similar item (by cosine) that no earlier
    round took; two centroids may take the same item in one round, and then it counts once. The value of a round
    is the mean over the centroids of the similarities taken. With `stop`, the value of round number
    `patience` times `stop_threshold` is the threshold, and the first later round whose value is below it is
    dropped and ends the selection; so does any round whose value is negative. Ties go to the lowest index; a zero row has
    similarity 0 to everything.

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
        target: [m, d], on the same device; or `centroids`.
        k: the most items to take, 1 <= k <= n. None, with `stop`: 50 per point of the target (or row of `centroids`),
            or n if that is less.
        centroids: [K, d] in place of the target: what k-means or something better has made of it, used as they are, scaled to
            unit length; equal ones count once.
        ratio: in place of k, the share of the open set to take at most, floor(ratio * n) items, 0 < ratio <= 1. Batches are read
            once more to be counted; an iterator needs k.
        n_clusters: the number of centroids; if the target has no more points than that, every point is a centroid.
        stop: whether a round of low value ends the selection.
        stop_threshold: share of the reference value, >= 0.
        patience: the round, counted from 1, whose value is the reference. The paper has 1, the published code 20 for 100
            centroids and 1.28 million items. None: the same share of any open set, n // (640 K), at least 1 and at most 20. The
            larger, the lower the threshold, and the more is taken: in a small open set 20 takes nearly all.
        fit_on: k-means sees this many points of the target, drawn with `seed`, n_clusters <= fit_on; None: all.
        seed: for k-means, and for the random part of the last round that is kept if all of it would exceed
            k; 0 <= seed < 2^32.
        n_init: the number of k-means starts, of which the best is kept. They are made by scikit-learn and share out the threads:
            each runs on one, since its sums would depend on the number of threads in their last bits. None: 10 for targets of up to
            10,000 distinct points and 1 for larger ones; beyond 100,000 points k-means sees batches of 4,096.
        memory_budget: bytes for the partial orders and the chunks in work, k-means not included.
        backend: None, "cpu" or "torch".
        progress: None, True for a bar, or a callable(done, total) that gets the items taken and `k`; it is
            called with an unchanged `done` while the open set is read.

    Returns:
        Coreset: `indices` round by round, in a round in the order of the centroids that took them; `weights`
        all 1; and `info`: "similarity" and "centroid" ([items]: the row of "centroids" that took each item, the first if several
        did, and how similar they are), "rounds" (kept ones), "values" (one per round), "counts" (items per round),
        "patience", "threshold" (None if it was not reached), "dropped_value" (the value of the round that ended the
        selection, or None), "stopped" ("k", "threshold", or "exhausted": the whole open set was taken), "k"
        (the limit), "passes" (how often the open set was read), "centroids" ([K, d]). No items, with an `InputWarning`, if
        already the first round has a negative value.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, options out of range, NaN or infinity, k > n, neither `stop` nor `k` nor `ratio`, both or
            neither of `k` and `ratio` or of `target` and `centroids` where one is meant, an open set that changes from one reading to the next, an iterator that would have to be read
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
    asked = check_options(
        target,
        k,
        centroids,
        ratio,
        n_clusters,
        stop,
        stop_threshold,
        patience,
        fit_on,
        seed,
        n_init,
        memory_budget,
    )
    k, share, patience, fit_on = asked.k, asked.share, asked.patience, asked.fit_on
    n_clusters, n_init, memory_budget, seed = asked.n_clusters, asked.n_init, asked.memory_budget, asked.seed
    stop_threshold, fixed, name = asked.stop_threshold, asked.fixed, asked.name
    points = as_matrix(centroids if fixed else target, name)
    source = RowSource(openset)
    if points.shape[1] != source.columns:
        raise ValueError(
            f"{name} must have {source.columns} columns as openset has, got shape {tuple(points.shape)}"
        )
    if points.device != source.device:
        raise ValueError(
            f"{name} is on device {points.device}, but openset is on {source.device}; move one of them"
        )
    _check_size(k, source)
    choose(backend, source.device)
    check_finite(points, name)

    dtype = compute_type(source, points)
    if share is not None:
        k = _share_of(source, share, dtype, memory_budget)
    points = _distinct(points.to(dtype))
    made = points.contiguous() if fixed else _centroids(points, n_clusters, seed, n_init, fit_on)
    limit = k if k is not None else _PER_TARGET * points.shape[0]
    if source.rows is not None:
        limit = min(limit, source.rows)
    with Progress(progress, limit, "simcore") as bar:
        rounds = Rounds(source, made, limit, backend=backend, memory_budget=memory_budget, progress=bar)
        rounds.read()
        _check_size(k, source)
        assert source.rows is not None
        limit = min(limit, source.rows)
        if patience is None:
            patience = patience_of(source.rows, len(made))
        picks, info = _select(rounds, limit, bool(stop), stop_threshold, patience, seed, bar)
    if info["stopped"] == "k" and k is None and limit == source.rows:
        info["stopped"] = "exhausted"
    if not len(picks):
        warn_caller(
            f"nothing was taken: the open set's most similar items have a mean similarity of {info['dropped_value']:.3g} to the "
            f"{name}; pass stop=False with k to take them all the same",
            InputWarning,
        )
    info["similarity"] = info["similarity"].to(source.device, dtype)
    info["centroid"] = info["centroid"].to(source.device)
    info |= {"k": limit, "passes": source.passes, "centroids": made}
    weights = torch.ones(len(picks), dtype=dtype, device=source.device)
    return Coreset(picks.to(source.device), weights, info)


def patience_of(rows: int, centroids: int) -> int:
    """The default patience for so many rows in the open set."""
    return min(_LONGEST_PATIENCE, max(1, rows // (_ITEMS_PER_REFERENCE * centroids)))


class RoundTaker(Protocol):
    """What makes rounds; see `Rounds`."""

    def take(self) -> Taken: ...


class Asked(NamedTuple):
    """The options of `simcore`, checked."""

    k: int | None
    share: float | None
    n_clusters: int
    stop_threshold: float
    patience: int | None
    fit_on: int | None
    seed: int
    n_init: int | None
    memory_budget: int
    fixed: bool  # whether centroids are given in place of the target
    name: str  # of what is given


def check_options(
    target: Any,
    k: Any,
    centroids: Any,
    ratio: Any,
    n_clusters: Any,
    stop: Any,
    stop_threshold: Any,
    patience: Any,
    fit_on: Any,
    seed: Any,
    n_init: Any,
    memory_budget: Any,
) -> Asked:
    if not isinstance(stop, (bool, np.bool_)):
        raise TypeError(f"stop must be a bool, got {stop!r} of type {type(stop).__name__}")
    if k is not None:
        k = _at_least_one(k, "k")
        if ratio is not None:
            raise ValueError(f"ratio must be None where k is given, got ratio={ratio} and k={k}")
    elif ratio is None and not stop:
        raise ValueError("k or ratio must be given where stop is False, or nothing would end the selection")
    share = None if ratio is None else as_number(ratio, "ratio")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    n_clusters = _at_least_one(n_clusters, "n_clusters")
    patience = None if patience is None else _at_least_one(patience, "patience")
    n_init = None if n_init is None else _at_least_one(n_init, "n_init")
    memory_budget = _at_least_one(memory_budget, "memory_budget")
    stop_threshold = as_number(stop_threshold, "stop_threshold")
    if stop_threshold < 0:
        raise ValueError(f"stop_threshold must be >= 0, got {stop_threshold}")
    seed = as_integer(seed, "seed")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if (target is None) == (centroids is None):
        got = "neither" if target is None else "both"
        raise ValueError(f"one of target and centroids must be given, got {got}")
    fixed = centroids is not None
    name = "centroids" if fixed else "target"
    if fit_on is not None:
        fit_on = _at_least_one(fit_on, "fit_on")
        if fixed:
            raise ValueError(f"fit_on must be None where centroids are given, got {fit_on}")
        if fit_on < n_clusters:
            raise ValueError(f"fit_on must be >= n_clusters={n_clusters}, got {fit_on}")
    return Asked(
        k, share, n_clusters, stop_threshold, patience, fit_on, seed, n_init, memory_budget, fixed, name
    )


def _share_of(source: RowSource, share: float, dtype: torch.dtype, memory_budget: int) -> int:
    """floor(share * n), where batches are counted first."""
    if source.rows is None:
        if source.once:
            raise ValueError(
                "ratio needs the number of rows, and openset is an iterator, which can be read once only; pass k, or a "
                "list, a DataLoader or a function that returns a new iterator"
            )
        for _ in source.read(dtype, chunk_rows(source.columns, 1, dtype.itemsize, memory_budget)):
            pass
    assert source.rows is not None
    k = int(share * source.rows)
    if k < 1:
        raise ValueError(f"ratio must take at least 1 of the {source.rows} rows of openset, got {share}")
    return k


def _select(
    rounds: RoundTaker,
    k: int,
    stop: bool,
    stop_threshold: float,
    patience: int,
    seed: int,
    progress: Progress,
) -> tuple[Tensor, dict[str, Any]]:
    """The picks [<= k] and what is known about them; `rounds` has at least k items to give."""
    picks: list[tuple[Tensor, Tensor, Tensor]] = []  # items, takers, similarities
    kept_values: list[float] = []
    kept_counts: list[int] = []
    threshold: float | None = None
    dropped: float | None = None
    taken = 0
    while taken < k and dropped is None:
        some = rounds.take()
        parts = zip(
            *(t.split(some.counts) for t in (some.items, some.takers, some.similarities)), strict=True
        )
        for part, value in zip(parts, some.values, strict=True):
            if stop and value < (threshold or 0.0):
                dropped = value
                break
            if len(part[0]) > k - taken:
                # The items with the smallest of as many random numbers, in the order of the centroids.
                keep = np.sort(np.argsort(uniforms(seed, 0, len(part[0])), kind="stable")[: k - taken])
                part = tuple(values[torch.from_numpy(keep)] for values in part)
            picks.append(part)
            kept_values.append(value)
            kept_counts.append(len(part[0]))
            taken += len(part[0])
            if stop and len(kept_values) == patience:
                threshold = value * stop_threshold
        progress.update(taken)
    if picks:
        items, takers, similarities = (torch.cat(tensors) for tensors in zip(*picks, strict=True))
    else:
        items, takers, similarities = some.items[:0], some.takers[:0], some.similarities[:0]
    info: dict[str, Any] = {
        "similarity": similarities,
        "centroid": takers,
        "rounds": len(kept_values),
        "values": kept_values,
        "counts": kept_counts,
        "patience": patience,
        "threshold": threshold,
        "dropped_value": dropped,
        "stopped": "k" if dropped is None else "threshold",
    }
    return items, info


def _distinct(target: Tensor) -> Tensor:
    """The distinct rows of unit length (or zero) in the order of their first appearance."""
    points = normalize_rows(target) + 0.0  # -0.0 and 0.0 are the same
    rows = np.ascontiguousarray(points.cpu().numpy())
    _, first = np.unique(
        rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0], return_index=True
    )
    return points[torch.from_numpy(np.sort(first)).to(points.device)]


def _centroids(points: Tensor, n_clusters: int, seed: int, n_init: int | None, fit_on: int | None) -> Tensor:
    """The centroids [K, d], distinct rows of unit length (or zero)."""
    if points.shape[0] <= n_clusters:
        return points.contiguous()
    seen = points.cpu().numpy()
    if fit_on is not None and fit_on < len(seen):
        seen = seen[np.sort(np.argsort(uniforms(seed, 1, len(seen)), kind="stable")[:fit_on])]
    if n_init is None and len(seen) > _BATCHES_FROM:
        centers = torch.from_numpy(_by_batches(seen, n_clusters, seed))
    else:
        centers = torch.from_numpy(_best_of_starts(seen, n_clusters, seed, n_init or _starts(len(seen))))
    return _distinct(centers.to(points.device, points.dtype)).contiguous()


def _starts(points: int) -> int:
    """How many starts k-means gets by default."""
    return 10 if points <= _ONE_START_FROM else 1


def _by_batches(points: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """The centers [n_clusters, d] that k-means finds from batches of the points."""
    cluster = imported("sklearn.cluster")
    mean = points.mean(axis=0)
    # One thread, as in the runs below: the error that decides when to end is a sum over the threads.
    with imported("threadpoolctl").ThreadpoolController().limit(limits=1):
        kmeans = cluster.MiniBatchKMeans(n_clusters, batch_size=_BATCH, n_init=1, random_state=seed)
        return kmeans.fit(points - mean).cluster_centers_ + mean


def _best_of_starts(points: np.ndarray, n_clusters: int, seed: int, n_init: int) -> np.ndarray:
    """The centers [n_clusters, d] of the best of `n_init` runs of k-means."""
    cluster = imported("sklearn.cluster")
    threads = imported("threadpoolctl").ThreadpoolController()
    workers = min(n_init, torch.get_num_threads())  # before the limit below, which is torch's too
    mean = points.mean(axis=0)
    points = points - mean
    # The starts come from one sequence of random numbers, and the runs from the starts alone, so that any number of threads may
    # share them out.
    random = np.random.RandomState(seed)

    def run(start: np.ndarray) -> tuple[float, np.ndarray]:
        with threads.limit(limits=1, user_api="openmp"):  # a setting of the calling thread
            kmeans = cluster.KMeans(n_clusters=n_clusters, init=start, n_init=1).fit(points)
        return kmeans.inertia_, kmeans.cluster_centers_

    with warnings.catch_warnings(), threads.limit(limits=1):
        # For points that differ by less than k-means can resolve, some centroids are equal.
        warnings.simplefilter("ignore", imported("sklearn.exceptions").ConvergenceWarning)
        starts = [cluster.kmeans_plusplus(points, n_clusters, random_state=random)[0] for _ in range(n_init)]
        if workers == 1:
            runs = [run(start) for start in starts]
        else:
            pool = ThreadPoolExecutor(workers)
            try:
                futures = [pool.submit(run, start) for start in starts]
                while wait(futures, timeout=_WAIT).not_done:  # Ctrl-C just before a wait is handled after it
                    pass
                runs = [future.result() for future in futures]
            finally:
                # Ctrl-C does not wait for runs that go on.
                pool.shutdown(wait=False, cancel_futures=True)
    return min(runs, key=lambda found: found[0])[1] + mean


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
    target: Any = None,
    k: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    centroids: Any = None,
    ratio: float | None = None,
    n_clusters: int = 100,
    stop: bool = True,
    stop_threshold: float = 0.95,
    patience: int | None = None,
    fit_on: int | None = None,
    seed: int = 0,
    n_init: int | None = None,
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
    name = "target" if centroids is None else "centroids"
    m, width = as_shape(target if centroids is None else centroids, name)
    if width != d:
        raise ValueError(f"{name} must have {d} columns as openset has, got shape {(m, width)}")
    if ratio is not None:
        k = max(1, int(ratio * n))
    size = compute_dtype(dtype).itemsize
    lists = min(m, n_clusters) if centroids is None else m
    limit = min(n, _PER_TARGET * m if k is None else k)
    length = min(limit, max(1, memory_budget * 3 // 4 // list_bytes(lists, size, backend)))
    orders = length * list_bytes(lists, size, backend)
    chunk = chunk_rows(d, lists, size, memory_budget) * (d * size + 40 * lists)
    # scikit-learn copies the points in each run, and keeps two distances to a centroid and some counters for each.
    seen = m if fit_on is None else min(m, _at_least_one(fit_on, "fit_on"))
    clustering = 3 * m * d * size
    if m > lists:
        # By default duplicates may leave so few points that they get all starts.
        few = min(seen, _ONE_START_FROM)
        cases = [(seen, 1), (few, 10)] if n_init is None else [(seen, _at_least_one(n_init, "n_init"))]
        clustering += max(
            (2 + runs) * points * d * size + (3 + runs) * points * lists * size
            for points, runs in ((points, min(starts, torch.get_num_threads())) for points, starts in cases)
        )
    survivors = torch.get_num_threads() * 2**20 + 2 * 24 * max(1 << 19, 64 * lists)
    return clustering + orders + chunk + survivors + 2 * lists * d * size + n // 8 + 56 * limit
