"""Greedy facility location in plain torch: the definition that the other backends are tested against.

    f(S) = sum_i w_i * max(0, max_{j in S} s(j, i))        maximised over candidates j for clients i

Distances become similarities as s = -distance with the floor -offset in the place of 0, so that the offset
never rounds into s.

A gain is a sum of integers, since integers sum to the same value in any order: with a power of two `scale`
such that no gain reaches 2^62,

    gain(j) = sum_i trunc(max(0, s(j, i) - best_i) * (w_i * scale)),     best_i = the largest s(., i) so far,
    at least the floor

where the product is rounded to the computing type T (float32 or float64). Each term falls as best_i rises, so
gains never grow and lazy evaluation is exact; a tie is a tie of integers and goes to the lowest index.

Sources: Nemhauser, Wolsey and Fisher, "An analysis of approximations for maximizing submodular set
functions", 1978 (greedy); Minoux, "Accelerated greedy algorithms for maximizing submodular set functions",
1978 (lazy).
"""

from __future__ import annotations

import heapq
import math
from typing import Protocol

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET, DISTANCES
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.tensor import Csr, check_finite
from flashcoreset.facility_location.gains import bounds_of_matrix, bounds_of_points, gain_scale
from flashcoreset.pairwise import normalize_rows
from flashcoreset.pairwise.reference import _blocks, values_of_rows
from flashcoreset.pairwise.reference import pairwise as pairwise

TAKES = Takes(sparse=True)


class _Similarities(Protocol):
    """The similarities s [n, m], read some rows at a time."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def rows(self, index: slice | Tensor) -> Tensor: ...

    def upper_bounds(self, floor: float) -> Tensor:
        """[m] float64: for each client a number not below max_j s(j, i) - floor."""
        ...


class _Points:
    """Similarities of points, computed when they are read."""

    def __init__(self, x: Tensor, clients: Tensor | None, metric: str) -> None:
        check_finite(x, "x")
        if clients is not None:
            check_finite(clients, "clients")
        if metric == "cosine":
            x, clients = normalize_rows(x), None if clients is None else normalize_rows(clients)
        self._x, self._clients, self._metric = x, x if clients is None else clients, metric
        self.shape = (x.shape[0], self._clients.shape[0])
        self.dtype, self.device = x.dtype, x.device

    def rows(self, index: slice | Tensor) -> Tensor:
        values = values_of_rows(self._x[index], self._clients, self._metric)
        return values.neg_() if self._metric in DISTANCES else values

    def upper_bounds(self, floor: float) -> Tensor:
        return bounds_of_points(self._x, self._clients, self._metric, floor)


class _Matrix:
    """Similarities held as a matrix [n, m]."""

    def __init__(self, s: Tensor) -> None:
        self._s = s
        self.shape = (s.shape[0], s.shape[1])
        self.dtype, self.device = s.dtype, s.device

    def rows(self, index: slice | Tensor) -> Tensor:
        return self._s[index]

    def upper_bounds(self, floor: float) -> Tensor:
        return bounds_of_matrix(self._s, floor)


class _Sparse:
    """Similarities held as a sparse matrix, absent entries 0."""

    def __init__(self, s: Csr) -> None:
        check_finite(s.values, "x.data")
        self._s = s
        self.shape, self.dtype, self.device = s.shape, s.dtype, s.device

    def rows(self, index: slice | Tensor) -> Tensor:
        numbers = torch.arange(self.shape[0], device=self.device)[index]
        begin, end = self._s.crow[numbers], self._s.crow[numbers + 1]
        row = torch.repeat_interleave(torch.arange(len(numbers), device=self.device), end - begin)
        first = torch.repeat_interleave((end - begin).cumsum(0) - (end - begin), end - begin)
        entry = torch.arange(len(row), device=self.device) - first + begin[row]
        dense = torch.zeros(len(numbers), self.shape[1], dtype=self.dtype, device=self.device)
        dense[row, self._s.col[entry]] = self._s.values[entry]
        return dense

    def upper_bounds(self, floor: float) -> Tensor:
        largest = max(0.0, float(self._s.values.max())) if len(self._s.values) else 0.0
        return torch.full((self.shape[1],), largest, dtype=torch.float64, device=self.device)


class FacilityLocation:
    """A greedy run that advances pick by pick.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64, or such a
            sparse matrix.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from: those of points, and those that a matrix holds negated.
        memory_budget: similarities from points are kept if they take at most this many bytes, else computed as
            needed.
        expected_picks: compiled kernels plan with it; ignored here.

    Raises:
        ValueError: for NaN or infinity in `x` or `clients`, or similarities that overflow.
    """

    def __init__(
        self,
        x: Tensor | Csr,
        clients: Tensor | None = None,
        *,
        metric: str = "cosine",
        weights: Tensor | None = None,
        preselected: Tensor | None = None,
        offset: float | None = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        expected_picks: int | None = None,
    ) -> None:
        assert offset is not None  # only kernels that check values may find an offset themselves
        self.offset, self.completed = offset, 0
        s: _Similarities
        if isinstance(x, Csr):
            s = _Sparse(x)
        elif metric == "precomputed":
            check_finite(x, "x")
            s = _Matrix(x)
        else:
            s = _Points(x, clients, metric)
        n, m = self._shape = s.shape
        self._self_clients = clients is None and n == m
        floor = -offset if metric in DISTANCES or (metric == "precomputed" and offset) else 0.0
        self._weights = (
            torch.ones(m, dtype=torch.float64, device=s.device) if weights is None else weights.double()
        )
        self._scale = gain_scale(s.upper_bounds(floor), self._weights, metric, s.dtype)
        if isinstance(s, _Points) and n * m * s.dtype.itemsize <= memory_budget:
            held = torch.empty(n, m, dtype=s.dtype, device=s.device)
            for rows in _blocks(n, m * s.dtype.itemsize):
                held[rows] = s.rows(rows)
            s = _Matrix(held)
        self._s = s
        self._floor = torch.tensor(floor, dtype=s.dtype, device=s.device)
        self._scaled_weights = (self._weights * self._scale).to(s.dtype)

        covered = torch.full((m,), -math.inf, dtype=s.dtype, device=s.device)  # best of the preselected
        self._open = torch.ones(n, dtype=torch.bool, device=s.device)  # neither picked nor preselected
        for j in [] if preselected is None else preselected.tolist():
            covered = torch.maximum(covered, s.rows(slice(j, j + 1))[0])
            self._open[j] = False
        self._covered = covered
        self._best = torch.maximum(covered, self._floor)
        self._owner = torch.full((m,), -1, dtype=torch.int64, device=s.device)
        self._picks: list[int] = []
        self._gains: list[int] = []
        self._own_similarity: list[Tensor] = []
        self._queue: list[tuple[int, int, int]] | None = None

    def _gains_of(self, rows: slice | Tensor) -> Tensor:
        terms = (self._s.rows(rows) - self._best).clamp_min_(0).mul_(self._scaled_weights)
        return terms.to(torch.int64).sum(1)

    def _all_gains(self) -> Tensor:
        """[n] gains; -1 for candidates that are not open."""
        n, m = self._shape
        # Allocated first: small results between the blocks' temporaries would keep the allocator from using their place again.
        gains = torch.empty(n, dtype=torch.int64, device=self._best.device)
        for rows in _blocks(n, 4 * m * 8):
            gains[rows] = self._gains_of(rows)
        return torch.where(self._open, gains, -1)

    def _pick(self, j: int, gain: int) -> None:
        s = self._s.rows(slice(j, j + 1))[0]
        better = s > self._best
        self._best = torch.where(better, s, self._best)
        self._owner[better] = len(self._picks)
        self._open[j] = False
        self._picks.append(j)
        self._gains.append(gain)
        if self._self_clients:
            self._own_similarity.append(s[j])

    def step(self, count: int, naive: bool = False) -> int:
        """Makes up to `count` further picks; `naive` evaluates every candidate for each pick. Returns the number
        of picks so far."""
        for _ in range(min(count, int(self._open.sum()))):
            if naive:
                gains = self._all_gains()
                gain = int(gains.max())
                j = int((gains == gain).nonzero()[0])  # argmax does not promise the first of equal values
            else:
                j, gain = self._pop_best()
            self._pick(j, gain)
        self.completed = len(self._picks)
        return self.completed

    def _pop_best(self) -> tuple[int, int]:
        if self._queue is None:
            # (-gain, candidate, number of picks when the gain was computed); an old gain is an upper bound.
            now = len(self._picks)
            self._queue = [(-gain, j, now) for j, gain in enumerate(self._all_gains().tolist()) if gain >= 0]
            heapq.heapify(self._queue)
        while True:
            negative_gain, j, when = self._queue[0]
            if not self._open[j]:
                heapq.heappop(self._queue)
            elif when == len(self._picks):
                heapq.heappop(self._queue)
                return j, -negative_gain
            else:
                gain = int(self._gains_of(slice(j, j + 1)))
                heapq.heapreplace(self._queue, (-gain, j, len(self._picks)))

    def step_among(self, candidates: Tensor) -> int:
        """Makes one pick among `candidates` [r] int64, which are neither picked nor preselected. Returns the
        pick."""
        candidates = candidates.sort().values
        gains = torch.empty_like(candidates)
        for rows in _blocks(len(candidates), 4 * self._shape[1] * 8):
            gains[rows] = self._gains_of(candidates[rows])
        gain = int(gains.max())
        j = int(candidates[gains == gain][0])
        self._pick(j, gain)
        return j

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32,
        `assignment` [m] int64; returns f(S), the preselected included."""
        owner = self._owner.clone()
        for position, j in enumerate(self._picks):
            # A pick serves itself unless a preselected item is more similar to it.
            if self._self_clients and not self._covered[j] > self._own_similarity[position]:
                owner[j] = position
        indices.copy_(torch.tensor(self._picks, dtype=torch.int64))
        gains.copy_(torch.tensor([g / self._scale if g else 0.0 for g in self._gains], dtype=torch.float64))
        # Summed on the CPU, where the order of summation is fixed.
        owner, client_weights = owner.cpu(), self._weights.cpu()
        served = owner >= 0
        weights.copy_(
            torch.bincount(owner[served], client_weights[served], minlength=len(self._picks)).double()
        )
        assignment.copy_(owner)
        return math.fsum((client_weights * (self._best.double() - self._floor.double()).cpu()).tolist())
