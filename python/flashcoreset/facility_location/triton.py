"""Facility location, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.errors import BackendUnavailableError, no_sparse_kernel
from flashcoreset._core.tensor import Csr, check_finite
from flashcoreset.facility_location.gains import bounds_of_matrix, bounds_of_points, gain_scale, pick_keys
from flashcoreset.facility_location.partial_gains import PartialGains
from flashcoreset.facility_location.problem import Problem, Watch
from flashcoreset.pairwise import normalize_rows
from flashcoreset.pairwise.triton import pairwise
from flashcoreset.triton_kernels.facility_location import Similarities
from flashcoreset.triton_kernels.pairwise import launch_pairwise, panel

__all__ = ["TAKES", "FacilityLocation", "PartialGains", "pairwise", "workspace"]

TAKES = Takes()


# Candidates that a lazy pick evaluates first, a tile of them at least: fewer would take as long.
_BATCH = 128


class FacilityLocation:
    """A greedy run, as `flashcoreset.facility_location.backend.Run` says.

    Raises:
        BackendUnavailableError: for a sparse matrix.
        ValueError: for NaN or infinity in `x` or `clients`, or similarities that overflow.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.offset is not None  # only kernels that check values may find an offset themselves
        self.offset, self.completed = problem.offset, 0
        x, clients, metric = problem.x, problem.clients, problem.metric
        if isinstance(x, Csr):
            raise BackendUnavailableError(f"backend 'triton': {no_sparse_kernel('triton')}")
        check_finite(x, "x")
        if clients is not None:
            check_finite(clients, "clients")
        (n, m), device = problem.shape, x.device
        self._n, self._self_clients = n, problem.is_square
        self._floor = torch.tensor(problem.floor, dtype=x.dtype, device=device)
        weights = problem.weights
        self._weights = torch.ones(m, dtype=torch.float64, device=device) if weights is None else weights
        if metric == "precomputed":
            upper = bounds_of_matrix(x, float(self._floor))
        else:
            if metric == "cosine":
                x, clients = normalize_rows(x), None if clients is None else normalize_rows(clients)
            upper = bounds_of_points(x, x if clients is None else clients, metric, float(self._floor))
        self._scale = gain_scale(upper, self._weights, metric, x.dtype)
        self._similarities = _similarities(x, clients, metric, m, problem.memory_budget)
        self._scaled_weights = (self._weights * self._scale).to(x.dtype)

        self._numbers = torch.arange(n, device=device)
        # Keys when last computed, which bound the present ones; -1 for candidates that are not open. The gains that belong to
        # them, if these are not the keys.
        self._costs = problem.costs
        self._bounds = torch.full((n,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
        self._exact = self._bounds if self._costs is None else torch.zeros_like(self._bounds)
        self._covered = torch.full((m,), -math.inf, dtype=x.dtype, device=device)  # best of the preselected
        self._owner = torch.full((m,), -1, dtype=torch.int64, device=device)
        self._own_similarity = torch.empty(n, dtype=x.dtype, device=device)  # s(j, j) by position
        for j in [] if problem.preselected is None else problem.preselected.tolist():
            self._similarities.update(j, 0, self._covered, self._owner, self._own_similarity)
            self._bounds[j] = -1
        self._owner.fill_(-1)
        self._best = torch.maximum(self._covered, self._floor)
        self._left = n - (0 if problem.preselected is None else problem.preselected.shape[0])
        self._picks: list[int] = []
        self._gains: list[int] = []

    def step(self, count: int, naive: bool = False, report: Watch | None = None) -> int:
        for _ in range(min(count, self._left)):
            self.pick(naive)
        return self.completed

    def pick(self, naive: bool = False, stop_gain: float | None = None) -> int:
        if self._left == 0:
            return -1
        j, gain = self._find_best(self._n if naive or not self._picks else _BATCH)
        if stop_gain is not None and (gain / self._scale if gain else 0.0) < stop_gain:
            return -1
        self._pick(j, gain)
        return j

    def _find_best(self, batch: int) -> tuple[int, int]:
        """The candidate of the largest gain, the lowest of those, and the gain; `batch` candidates are
        evaluated first, then twice as many each time."""
        # A bound of 0 is a gain of 0.
        current = self._bounds <= 0
        while True:
            if batch >= self._n:
                self._note(slice(None), self._similarities.gains(None, self._best, self._scaled_weights))
                current.fill_(True)
            else:
                index = torch.where(current, -1, self._bounds).topk(batch).indices
                self._note(index, self._similarities.gains(index, self._best, self._scaled_weights))
                current[index] = True
            largest = self._bounds.max()
            first = torch.where(self._bounds == largest, self._numbers, self._n).min()
            j, gain, is_current = torch.stack((first, self._exact[first], current[first].long())).tolist()
            if is_current:
                return j, gain
            batch *= 2

    def _note(self, index: slice | Tensor, gains: Tensor) -> None:
        """Makes `gains` those of the candidates `index` that are open."""
        keys = pick_keys(gains, None if self._costs is None else self._costs[index])
        self._bounds[index] = torch.where(self._bounds[index] < 0, -1, keys)
        if self._costs is not None:
            self._exact[index] = gains

    def close(self, candidates: Tensor) -> None:
        candidates = candidates.to(self._bounds.device)
        self._bounds[candidates] = -1
        self._left = int((self._bounds >= 0).sum())

    def step_among(self, candidates: Tensor) -> int:
        candidates = candidates.sort().values
        self._note(candidates, self._similarities.gains(candidates, self._best, self._scaled_weights))
        keys = self._bounds[candidates]
        first = candidates[keys == keys.max()][0]
        j, gain = torch.stack((first, self._exact[first])).tolist()
        self._pick(j, gain)
        return j

    def _pick(self, j: int, gain: int) -> None:
        self._similarities.update(j, len(self._picks), self._best, self._owner, self._own_similarity)
        self._bounds[j] = -1
        self._left -= 1
        self._picks.append(j)
        self._gains.append(gain)
        self.completed = len(self._picks)

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        k = len(self._picks)
        picks = torch.tensor(self._picks, dtype=torch.int64, device=self._best.device)
        owner = self._owner.clone()
        if self._self_clients:
            # A pick serves itself unless a preselected item is more similar to it.
            itself = ~(self._covered[picks] > self._own_similarity[:k])
            owner[picks[itself]] = itself.nonzero()[:, 0]
        indices.copy_(picks)
        gains.copy_(torch.tensor([g / self._scale if g else 0.0 for g in self._gains], dtype=torch.float64))
        # Summed on the CPU, where the order of summation is fixed.
        served, client_weights = (owner >= 0).cpu(), self._weights.cpu()
        weights.copy_(torch.bincount(owner.cpu()[served], client_weights[served], minlength=k).double())
        assignment.copy_(owner)
        return math.fsum((client_weights * (self._best.double() - self._floor.double()).cpu()).tolist())


def _similarities(x: Tensor, clients: Tensor | None, metric: str, m: int, memory_budget: int) -> Similarities:
    """The similarities of a matrix `x`, or of points whose rows have unit length already for cosine."""
    n = x.shape[0]
    if metric == "precomputed":
        matrix = x if x.stride(1) == 1 else x.contiguous()
        return Similarities(metric, matrix, matrix, n, m)
    a = panel(x)
    b = a if clients is None else panel(clients)
    if n * m * x.element_size() > memory_budget:
        return Similarities(metric, a, b, n, m)
    matrix = x.new_empty(n, m)
    launch_pairwise(a, b, matrix, metric)
    if metric in DISTANCES:
        matrix.neg_()
    return Similarities("precomputed", matrix, matrix, n, m)


def workspace(problem: Problem) -> int:
    """Terms are named after what the kernels' host allocates."""
    (n, m), d, size = problem.shape, problem.x.shape[1], problem.x.dtype.itemsize
    is_points, pairs = problem.metric != "precomputed", n * m * size
    points = (n if problem.clients is None else n + m) * d * size if is_points else 0
    panels = points + 256 * d * size
    wide = points * 8 // size if problem.metric == "dot" else 0  # norms are taken in float64
    batch = 2 * n * d * size if is_points else 0  # of candidates: some columns of the panel, padded
    matrix = pairs if is_points and pairs <= problem.memory_budget else 0
    normalized = 3 * points if problem.metric == "cosine" else 0
    return normalized + panels + wide + batch + matrix + 200 * n + 64 * m
