"""k-center: every row near a pick, by farthest-first traversal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import (
    as_matrix,
    as_vector,
    at_least_one,
    check_finite,
    check_preselected,
    compute_dtype,
    one_of,
)
from flashcoreset.pairwise import normalize_rows
from flashcoreset.pairwise.backend import choose

_METRICS = ("euclidean", "sqeuclidean", "l1", "cosine")

# Rows of magnitudes between these powers of two have distances, and differences of them, that are normal numbers.
_SAFE = {torch.float32: (-40, 50), torch.float64: (-400, 480)}
_SCALED_TO = {torch.float32: (-30, 30), torch.float64: (-300, 300)}

_POOL = 4096  # rows that are looked through at each pick
_FIRST = 64  # rows that are brought up to date before it is known how far the farthest row is
_BLOCK = 512  # rows that are brought up to date by one product


def k_center(
    x: Any,
    k: int,
    *,
    metric: str = "euclidean",
    preselected: Any = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
) -> Coreset:
    """Picks k rows one after the other, each the row that is farthest from all picks before it.

    The largest distance of a row to its nearest pick is at most twice what any k rows reach (for distances with the triangle
    inequality: "euclidean" and "l1"). The first pick, if nothing is preselected, is the row that is nearest to the mean of all
    rows (for "cosine", of the rows scaled to unit length). Ties go to the lowest index.

    The sequence is exact, but few of the n k distances are computed one pick at a time: a row's distance to the picks so far is a bound
    for later, and only rows whose bound is as large as the farthest row's distance are compared with the picks that
    they have missed, many rows and picks in one product.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64, a tensor or array (also a memory-mapped one).
        k: the number of rows to pick, 1 <= k <= n less the preselected ones.
        metric: "euclidean", "sqeuclidean" (the same picks but for ties, other distances), "l1" or "cosine" (1 - cos; a zero row
            has distance 1 to everything).
        preselected: [p] distinct indices of rows that are picks already, as in active learning; they are not returned.
        memory_budget: bytes for the rows and distances in work.
        backend: None, "cpu", "cuda", "triton" or "torch".
        progress: None, True for a bar, or a callable(done, total) of picks.

    Returns:
        Coreset: `indices` in the order of picking; `weights` all 1; and `info`: "radius" (the largest distance of a row to its
        nearest pick or preselected row), "distances" ([n] those of all rows; 0 for picks), "pick_distances" ([k] the distance of each
        pick to the picks before it, never rising; the first is inf if nothing is preselected).

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN or infinity in x, options out of range, and preselected rows that are repeated or that x does
            not have.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", Theoretical Computer Science 38, 1985; as a
    coreset Sener and Savarese, "Active learning for convolutional neural networks: a core-set approach", ICLR 2018.

    Example:
        >>> import torch, flashcoreset as fc
        >>> coreset = fc.k_center(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), 3)
        >>> coreset.indices, coreset.info["radius"]
        (tensor([2, 3, 0]), 1.0)
    """
    check_backend(backend)
    check_progress(progress)
    one_of(metric, "metric", _METRICS)
    k = at_least_one(k, "k")
    memory_budget = at_least_one(memory_budget, "memory_budget")
    points = as_matrix(x, "x")
    n, device = points.shape[0], points.device
    fixed = torch.empty(0, dtype=torch.int64, device=device)
    if preselected is not None:
        fixed = as_vector(preselected, "preselected", device, integers=True)
        check_preselected(fixed, n)
    if k > n - len(fixed):
        beside = f" beside the {len(fixed)} preselected ones" if len(fixed) else ""
        raise ValueError(f"k must be <= the {n - len(fixed)} rows of x{beside}, got {k}")
    distances = _Distances(points, metric, backend, memory_budget)
    # One step more than there are picks: what would be picked next is at the distance that is the radius.
    traversal = _Traversal(distances, fixed, len(fixed) + k)
    picks, gaps = [], []
    with Progress(progress, k, "k_center") as bar:
        for done in range(1, k + 1):
            first = done == 1 and len(fixed) == 0
            row, distance = (distances.most_central(), np.inf) if first else traversal.farthest()
            traversal.take(row)
            picks.append(row)
            gaps.append(distance)
            bar.update(done)
    bounds = traversal.finish()
    dtype = distances.dtype
    info = {
        "radius": distances.unscaled(float(bounds.max())),
        "distances": distances.unscaled_all(bounds),
        "pick_distances": distances.unscaled_all(torch.tensor(gaps, dtype=dtype, device=device)),
    }
    return Coreset(torch.tensor(picks, device=device), torch.ones(k, dtype=dtype, device=device), info)


class _Distances:
    """Distances between rows, in the type and in the scale that they are computed in."""

    def __init__(self, x: Tensor, metric: str, backend: str | None, memory_budget: int) -> None:
        self._x = x
        self._metric = metric
        self._kernels = choose(backend, x.device)
        self._budget = memory_budget
        self.dtype = compute_dtype(x.dtype)
        most = largest_magnitude(x)
        if not np.isfinite(most):
            check_finite(x, "x")
        self._exponent = 0
        if metric != "cosine":  # whose kernels scale rows themselves
            self._exponent = exponent_into(most, _SAFE[self.dtype], _SCALED_TO[self.dtype])

    @property
    def shape(self) -> tuple[int, int]:
        return self._x.shape[0], self._x.shape[1]

    @property
    def device(self) -> torch.device:
        return self._x.device

    def rows(self, which: Tensor | slice) -> Tensor:
        rows = self._x[which].to(self.dtype)
        return (scale(rows, self._exponent) if self._exponent else rows).contiguous()

    def blocks(self, count: int, beside: int) -> Iterator[slice]:
        """Slices of `count` rows that are compared with `beside` others at a time."""
        a_row = (self.shape[1] + beside) * self.dtype.itemsize
        step = max(1, self._budget // 4 // a_row)
        for begin in range(0, count, step):
            yield slice(begin, min(begin + step, count))

    def least(self, rows: Tensor, others: Tensor) -> Tensor:
        """The distance of each of `rows` to the nearest of `others`."""
        # The kernels pack the second operand for many uses, and a few rows cost least as the first.
        if len(others) < len(rows):
            values, axis = self._kernels.pairwise(others, rows, metric=self._metric), 0
        else:
            values, axis = self._kernels.pairwise(rows, others, metric=self._metric), 1
        if self._metric == "cosine":
            return (1 - values.amax(axis)).clamp_(min=0)
        return values.amin(axis)

    def most_central(self) -> int:
        """The row nearest to the mean."""
        n, d = self.shape
        total = np.zeros(d)
        for block in self.blocks(n, 2 * d):
            rows = self.rows(block).double()
            rows = normalize_rows(rows) if self._metric == "cosine" else rows
            # By NumPy, whose order of summation does not depend on the number of threads.
            total += np.add.reduce(rows.cpu().numpy(), axis=0)
        mean = torch.from_numpy(total / n).to(self.device, self.dtype)[None]
        nearest = torch.cat([self.least(self.rows(block), mean) for block in self.blocks(n, 1)])
        return int(nearest.cpu().numpy().argmin())  # the first of equals

    def unscaled(self, distance: float) -> float:
        return times_power(distance, -self._power)

    def unscaled_all(self, distances: Tensor) -> Tensor:
        return scale(distances, -self._power) if self._power else distances

    @property
    def _power(self) -> int:
        return self._exponent * (2 if self._metric == "sqeuclidean" else 1)


class _Traversal:
    """Farthest-first traversal.

    A row's bound is its distance to the nearest of the first `seen` picks, so at least that to all picks. The pool holds the rows of the
    largest bounds, all that are at least `floor`. Bounds are on the host, whichever device computes distances.
    """

    def __init__(self, distances: _Distances, fixed: Tensor, most: int) -> None:
        n, d = distances.shape
        self._distances = distances
        self._picks = torch.empty(most, d, dtype=distances.dtype, device=distances.device)
        self._picks[: len(fixed)] = distances.rows(fixed)
        self._count = len(fixed)
        self._bounds = np.full(n, np.inf, dtype=str(distances.dtype).removeprefix("torch."))
        self._seen = np.zeros(n, dtype=np.int64)
        self._taken = np.zeros(n, dtype=bool)
        self._taken[fixed.cpu().numpy()] = True
        self._pool = _Pool(self._bounds[:0], self._seen[:0], np.empty(0, dtype=np.int64))
        self._floor = np.inf

    def take(self, row: int) -> None:
        self._picks[self._count] = self._distances.rows(slice(row, row + 1))[0]
        self._count += 1
        self._taken[row] = True
        self._pool.bounds[self._pool.rows == row] = -1

    def farthest(self) -> tuple[int, float]:
        """The row that is farthest from all picks, and how far."""
        while True:
            bounds, seen, rows = self._pool
            place = int(bounds.argmax()) if len(bounds) else -1  # the first of equals, so the lowest row
            if place < 0 or bounds[place] < self._floor:
                self._fill_pool()
            elif seen[place] == self._count:
                return int(rows[place]), float(bounds[place])
            else:
                # First the likeliest rows; then all whose bounds reach the distance of the farthest row that is up to date.
                stale = seen < self._count
                least = bounds.max(where=~stale, initial=-1)
                if least < 0 and len(bounds) > _FIRST:
                    least = np.partition(bounds, -_FIRST)[-_FIRST]
                self._refresh(np.flatnonzero(stale & (bounds >= least)), self._pool)

    def finish(self) -> Tensor:
        """The distance of every row to the nearest pick; 0 for picks."""
        self._empty_pool()
        rows = np.arange(len(self._bounds))
        self._refresh(rows, _Pool(self._bounds, self._seen, rows))
        self._bounds[self._taken] = 0
        return torch.from_numpy(self._bounds).to(self._distances.device)

    def _fill_pool(self) -> None:
        self._empty_pool()
        free = np.where(self._taken, -1, self._bounds)
        size = min(_POOL, len(free))
        self._floor = max(np.partition(free, -size)[-size], 0)
        rows = np.flatnonzero(free >= self._floor)
        self._pool = _Pool(free[rows], self._seen[rows], rows)

    def _empty_pool(self) -> None:
        self._bounds[self._pool.rows] = self._pool.bounds
        self._seen[self._pool.rows] = self._pool.seen

    def _refresh(self, places: np.ndarray, pool: _Pool) -> None:
        """Brings a pool up to date at `places`."""
        missed = self._count - pool.seen[places]
        cuts = [*range(0, len(places), _BLOCK), len(places)]
        if missed.min() != missed.max():
            # Rows that missed about as many picks go together.
            order = np.argsort(-missed, kind="stable")
            places, missed = places[order], missed[order]
            cuts = sorted({*cuts, *np.searchsorted(-missed, [-256, -64, -16, -4, 0]).tolist()})
        for begin, end in itertools.pairwise(cuts):
            count = int(missed[begin])
            if count == 0:
                break
            picks = self._picks[self._count - count : self._count]
            for block in self._distances.blocks(end - begin, count):
                here = places[begin:end][block]
                points = self._distances.rows(torch.from_numpy(pool.rows[here]).to(picks.device))
                least = self._distances.least(points, picks).cpu().numpy()
                pool.bounds[here] = np.minimum(pool.bounds[here], least)
        pool.seen[places] = self._count


class _Pool(NamedTuple):
    bounds: np.ndarray
    seen: np.ndarray
    rows: np.ndarray


@register_estimate("k_center")
def _estimate(
    x: Any,
    k: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    metric: str = "euclidean",
    preselected: Any = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Any = None,
) -> int:
    """The bytes of one call; see `memory_estimate`."""
    check_backend(backend)
    one_of(metric, "metric", _METRICS)
    k, memory_budget = at_least_one(k, "k"), at_least_one(memory_budget, "memory_budget")
    dtype = as_dtype(dtype)
    n, d = as_shape(x, "x")
    fixed = 0 if preselected is None else as_shape(preselected, "preselected", 1)[0]
    if k > n - fixed:
        raise ValueError(f"k must be <= the {n - fixed} rows of x, got {k}")
    size = compute_dtype(dtype).itemsize
    picks = (k + fixed) * d * size
    bounds = n * (2 * size + 9) + n * (
        5 * 8 + 2 * size
    )  # and at the end, all rows in the order of what they missed
    # For the first pick, a block of rows in float64, and one whose rows are packed beside the mean.
    summed = (
        min(n, max(1, memory_budget // 4 // (3 * d * size)))
        * d
        * (size + 8 * (4 if metric == "cosine" else 1))
    )
    beside_mean = min(n, max(1, memory_budget // 4 // ((d + 1) * size))) * (2 * d + 3) * size
    later = min(n, _BLOCK) * (2 * d + k + fixed) * size + picks
    holes = 12 * 2**20  # that blocks of a few hundred rows leave in the heap
    return picks + bounds + max(summed, beside_mean, later) + 20 * k + holes
