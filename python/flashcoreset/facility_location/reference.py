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

With rounds, a run ends when no candidate gains anything, and a further run begins, in which nothing is covered and earlier picks and the
preselected are no candidates (`greedy_in_rounds`).

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

from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.tensor import Csr, check_finite
from flashcoreset.facility_location.gains import bounds_of_matrix, bounds_of_points, gain_scale, pick_keys
from flashcoreset.facility_location.partial_gains import PartialGains as PartialGains
from flashcoreset.facility_location.problem import Problem, Watch
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
    """A greedy run that advances pick by pick, as `flashcoreset.facility_location.backend.Run` says."""

    def __init__(self, problem: Problem) -> None:
        assert problem.offset is not None  # only kernels that check values may find an offset themselves
        self.offset, self.completed = problem.offset, 0
        s: _Similarities
        if isinstance(problem.x, Csr):
            s = _Sparse(problem.x)
        elif problem.metric == "precomputed":
            check_finite(problem.x, "x")
            s = _Matrix(problem.x)
        else:
            s = _Points(problem.x, problem.clients, problem.metric)
        n, m = self._shape = s.shape
        self._self_clients = problem.is_square
        weights = problem.weights
        self._weights = torch.ones(m, dtype=torch.float64, device=s.device) if weights is None else weights
        self._scale = gain_scale(s.upper_bounds(problem.floor), self._weights, problem.metric, s.dtype)
        if isinstance(s, _Points) and n * m * s.dtype.itemsize <= problem.memory_budget:
            held = torch.empty(n, m, dtype=s.dtype, device=s.device)
            for rows in _blocks(n, m * s.dtype.itemsize):
                held[rows] = s.rows(rows)
            s = _Matrix(held)
        self._s = s
        self._floor = torch.tensor(problem.floor, dtype=s.dtype, device=s.device)
        self._scaled_weights = (self._weights * self._scale).to(s.dtype)
        self._costs = problem.costs

        covered = torch.full((m,), -math.inf, dtype=s.dtype, device=s.device)  # best of the preselected
        self._open = torch.ones(
            n, dtype=torch.bool, device=s.device
        )  # neither picked, preselected nor closed
        for j in [] if problem.preselected is None else problem.preselected.tolist():
            covered = torch.maximum(covered, s.rows(slice(j, j + 1))[0])
            self._open[j] = False
        self._covered = covered
        self._best = torch.maximum(covered, self._floor)
        self._owner = torch.full((m,), -1, dtype=torch.int64, device=s.device)
        self._picks: list[int] = []
        self._gains: list[int] = []
        self._own_similarity: list[Tensor] = []
        self._queue: list[tuple[int, int, int, int]] | None = None

    def _gains_of(self, rows: slice | Tensor) -> Tensor:
        terms = (self._s.rows(rows) - self._best).clamp_min_(0).mul_(self._scaled_weights)
        return terms.to(torch.int64).sum(1)

    def _all_gains(self) -> Tensor:
        n, m = self._shape
        # Allocated first: small results between the blocks' temporaries would keep the allocator from using their place again.
        gains = torch.empty(n, dtype=torch.int64, device=self._best.device)
        for rows in _blocks(n, 4 * m * 8):
            gains[rows] = self._gains_of(rows)
        return gains

    def _pick(self, j: int, gain: int) -> None:
        s = self._s.rows(slice(j, j + 1))[0]
        better = s > self._best
        self._best = torch.where(better, s, self._best)
        self._owner[better] = len(self._picks)
        self._open[j] = False
        self._picks.append(j)
        self._gains.append(gain)
        self.completed = len(self._picks)
        if self._self_clients:
            self._own_similarity.append(s[j])

    def step(self, count: int, naive: bool = False, report: Watch | None = None) -> int:
        while count > 0 and self.pick(naive) >= 0:
            count -= 1
        return self.completed

    def pick(self, naive: bool = False, stop_gain: float | None = None) -> int:
        if not self._open.any():
            return -1
        if naive:
            keys = self._keys(gains := self._all_gains())
            j = int((keys == keys.max()).nonzero()[0])  # argmax does not promise the first of equal values
            gain = int(gains[j])
        else:
            j, gain = self._find_best()
        if stop_gain is not None and (gain / self._scale if gain else 0.0) < stop_gain:
            return -1
        self._pick(j, gain)
        return j

    def _keys(self, gains: Tensor, index: slice | Tensor = slice(None)) -> Tensor:
        """What candidates `index` are compared by; -1 for those that are not open."""
        keys = pick_keys(gains, None if self._costs is None else self._costs[index])
        return torch.where(self._open[index], keys, -1)

    def _find_best(self) -> tuple[int, int]:
        now = len(self._picks)
        if self._queue is None:
            # (-key, candidate, number of picks when the gain was computed, gain); an old key is an upper bound.
            gains = self._all_gains()
            entries = zip(self._keys(gains).tolist(), gains.tolist(), strict=True)
            self._queue = [(-key, j, now, gain) for j, (key, gain) in enumerate(entries) if key >= 0]
            heapq.heapify(self._queue)
        while True:
            _, j, when, gain = self._queue[0]
            if not self._open[j]:
                heapq.heappop(self._queue)
            elif when == now:
                return j, gain
            else:
                row = slice(j, j + 1)
                gains = self._gains_of(row)
                heapq.heapreplace(self._queue, (-int(self._keys(gains, row)), j, now, int(gains)))

    def step_among(self, candidates: Tensor) -> int:
        candidates = candidates.sort().values
        gains = torch.empty_like(candidates)
        for rows in _blocks(len(candidates), 4 * self._shape[1] * 8):
            gains[rows] = self._gains_of(candidates[rows])
        keys = self._keys(gains, candidates)
        place = int((keys == keys.max()).nonzero()[0])
        self._pick(int(candidates[place]), int(gains[place]))
        return self._picks[-1]

    def close(self, candidates: Tensor) -> None:
        self._open[candidates.to(self._open.device)] = False

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
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


def greedy_in_rounds(
    s: Tensor, k: int, rounds: int, weights: Tensor, preselected: list[int]
) -> list[tuple[int, float, int]]:
    """The definition of rounds, for similarities `s` [n, m] float64 and `weights` [m]: each pick, its gain, and its round."""
    picks: list[tuple[int, float, int]] = []
    is_open = torch.ones(len(s), dtype=torch.bool)
    is_open[preselected] = False
    for number in range(rounds):
        best = torch.zeros(s.shape[1], dtype=s.dtype)
        if number == 0 and preselected:
            best = best.maximum(s[preselected].amax(0))
        while len(picks) < k:
            gains = ((s - best).clamp_min(0) * weights).sum(1).where(is_open, -1)
            j = int((gains == gains.max()).nonzero()[0])
            if gains[j] == 0 and number < rounds - 1:
                break
            picks.append((j, float(gains[j]), number))
            best, is_open[j] = best.maximum(s[j]), False
    return picks


def workspace(problem: Problem) -> int:
    (n, m), d, size = problem.shape, problem.x.shape[1], problem.x.dtype.itemsize
    is_points, pairs = problem.metric != "precomputed", n * m * size
    normalized = 2 * (n if problem.clients is None else n + m) * d * size if is_points else 0
    matrix = pairs if is_points and pairs <= problem.memory_budget else 0
    # Temporaries of a block of rows, and the allocator's share of them.
    block = 8 * max(2**20, 8 * m)
    return normalized + matrix + 200 * n + 64 * m + block
