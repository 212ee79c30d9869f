"""Facility location, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET, DISTANCES
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.errors import BackendUnavailableError, no_sparse_kernel
from flashcoreset._core.tensor import Csr, check_finite
from flashcoreset.facility_location.gains import bounds_of_matrix, bounds_of_points, gain_scale
from flashcoreset.pairwise import normalize_rows
from flashcoreset.pairwise.triton import pairwise
from flashcoreset.triton_kernels.facility_location import Similarities
from flashcoreset.triton_kernels.pairwise import launch_pairwise, panel

__all__ = ["TAKES", "FacilityLocation", "pairwise"]

TAKES = Takes()


# Candidates that a lazy pick evaluates first, a tile of them at least: fewer would take as long.
_BATCH = 128


class FacilityLocation:
    """A greedy run that advances pick by pick; see `flashcoreset.facility_location.reference` for the
    definition.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from: those of points, and those that a matrix holds negated.
        memory_budget: similarities of points are kept if they take at most this many bytes, else computed as
            needed.
        expected_picks: how many picks are likely; not used, since nothing is prepared for later picks.

    Raises:
        BackendUnavailableError: for a sparse matrix.
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
        if isinstance(x, Csr):
            raise BackendUnavailableError(f"backend 'triton': {no_sparse_kernel('triton')}")
        check_finite(x, "x")
        n, m = x.shape[0], x.shape[1] if metric == "precomputed" else x.shape[0]
        if clients is not None:
            check_finite(clients, "clients")
            m = clients.shape[0]
        device = x.device
        self._n, self._self_clients = n, clients is None and n == m
        has_offset = metric in DISTANCES or (metric == "precomputed" and offset)
        self._floor = torch.tensor(-offset if has_offset else 0.0, dtype=x.dtype, device=device)
        self._weights = torch.ones(m, dtype=torch.float64, device=device) if weights is None else weights
        if metric == "precomputed":
            upper = bounds_of_matrix(x, float(self._floor))
        else:
            if metric == "cosine":
                x, clients = normalize_rows(x), None if clients is None else normalize_rows(clients)
            upper = bounds_of_points(x, x if clients is None else clients, metric, float(self._floor))
        self._scale = gain_scale(upper, self._weights, metric, x.dtype)
        self._similarities = _similarities(x, clients, metric, m, memory_budget)
        self._scaled_weights = (self._weights * self._scale).to(x.dtype)

        self._numbers = torch.arange(n, device=device)
        # Gains when last computed, which bound the present ones; -1 for candidates that are picked or preselected.
        self._bounds = torch.full((n,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
        self._covered = torch.full((m,), -math.inf, dtype=x.dtype, device=device)  # best of the preselected
        self._owner = torch.full((m,), -1, dtype=torch.int64, device=device)
        self._own_similarity = torch.empty(n, dtype=x.dtype, device=device)  # s(j, j) by position
        for j in [] if preselected is None else preselected.tolist():
            self._similarities.update(j, 0, self._covered, self._owner, self._own_similarity)
            self._bounds[j] = -1
        self._owner.fill_(-1)
        self._best = torch.maximum(self._covered, self._floor)
        self._left = n - (0 if preselected is None else preselected.shape[0])
        self._picks: list[int] = []
        self._gains: list[int] = []

    def step(self, count: int, naive: bool = False) -> int:
        """Makes up to `count` further picks; `naive` evaluates every candidate for each. Returns the number
        of picks so far."""
        for _ in range(min(count, self._left)):
            self._pick(*self._find_best(self._n if naive or not self._picks else _BATCH))
        self.completed = len(self._picks)
        return self.completed

    def _find_best(self, batch: int) -> tuple[int, int]:
        """The candidate of the largest gain, the lowest of those, and the gain; `batch` candidates are
        evaluated first, then twice as many each time."""
        # A bound of 0 is a gain of 0.
        current = self._bounds <= 0
        while True:
            if batch >= self._n:
                gains = self._similarities.gains(None, self._best, self._scaled_weights)
                self._bounds = torch.where(self._bounds < 0, -1, gains)
                current.fill_(True)
            else:
                index = torch.where(current, -1, self._bounds).topk(batch).indices
                gains = self._similarities.gains(index, self._best, self._scaled_weights)
                self._bounds[index] = torch.where(self._bounds[index] < 0, -1, gains)
                current[index] = True
            largest = self._bounds.max()
            first = torch.where(self._bounds == largest, self._numbers, self._n).min()
            j, gain, is_current = torch.stack((first, largest, current[first].long())).tolist()
            if is_current:
                return j, gain
            batch *= 2

    def step_among(self, candidates: Tensor) -> int:
        """Makes one pick among `candidates` [r] int64, which are neither picked nor preselected. Returns the
        pick."""
        candidates = candidates.sort().values
        gains = self._similarities.gains(candidates, self._best, self._scaled_weights)
        self._bounds[candidates] = gains
        largest = gains.max()
        j, gain = torch.stack((candidates[gains == largest][0], largest)).tolist()
        self._pick(j, gain)
        return j

    def _pick(self, j: int, gain: int) -> None:
        self._similarities.update(j, len(self._picks), self._best, self._owner, self._own_similarity)
        self._bounds[j] = -1
        self._left -= 1
        self._picks.append(j)
        self._gains.append(gain)

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32,
        `assignment` [m] int64; returns f(S), the preselected included."""
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
