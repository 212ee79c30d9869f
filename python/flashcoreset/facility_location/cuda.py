"""Facility location, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.cuda import stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.errors import BackendUnavailableError, no_sparse_kernel
from flashcoreset._core.native import capsule
from flashcoreset._core.tensor import Csr, check_finite, check_preselected, check_weights
from flashcoreset.facility_location.partial_gains import PartialGains
from flashcoreset.facility_location.problem import Problem, Watch
from flashcoreset.pairwise.cuda import pairwise

__all__ = ["TAKES", "FacilityLocation", "PartialGains", "pairwise", "workspace"]

TAKES = Takes(checks_values=True)


class FacilityLocation:
    """A greedy run that stays on the GPU, as `flashcoreset.facility_location.backend.Run` says; memory is proportional to the
    points, whatever the budget.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device, and for a sparse matrix.
        TypeError, ValueError: for arrays that do not fit each other; by `pick`, `step_among` and `finish` for data that turned out
            to be NaN, infinite, or too large or small for its type.
        torch.OutOfMemoryError: if the device has no room for the run.
    """

    def __init__(self, problem: Problem) -> None:
        x = problem.x
        if isinstance(x, Csr):
            raise BackendUnavailableError(f"backend 'cuda': {no_sparse_kernel('cuda')}")
        if problem.metric == "precomputed" and x.stride(1) != 1:
            problem = replace(problem, x=x.contiguous())
        for name in ("weights", "preselected", "costs"):
            vector = getattr(problem, name)
            if vector is not None and not vector.is_contiguous():
                problem = replace(problem, **{name: vector.contiguous()})
        self._x, self._problem, self.offset = x, problem, problem.offset
        module, queue = native.cuda_module(x.device.index or 0), stream(x.device)
        self._run = with_memory(lambda: module.FacilityLocation(problem, queue))

    @property
    def completed(self) -> int:
        """How many of the picks that `step` started are known to be made."""
        return self._run.completed

    def step(self, count: int, naive: bool = False, report: Watch | None = None) -> int:
        """Waits only for picks that would take long, so that Ctrl-C is handled."""
        return with_memory(lambda: self._run.step(count, naive))

    def pick(self, naive: bool = False, stop_gain: float | None = None) -> int:
        return self._made(with_memory(lambda: self._run.pick(naive, stop_gain)))

    def step_among(self, candidates: Tensor) -> int:
        return self._made(with_memory(lambda: self._run.step_among(capsule(candidates))))

    def _made(self, pick: int) -> int:
        if pick < 0:
            self._raise(*self._run.verdict())
        return pick

    def close(self, candidates: Tensor) -> None:
        with_memory(lambda: self._run.close(capsule(candidates)))

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        exact_gains, exact_weights = gains.double(), weights.double()
        objective, offset = self._run.finish(
            capsule(indices), capsule(exact_gains), capsule(exact_weights), capsule(assignment)
        )
        self._raise(*self._run.verdict())
        if self._problem.metric in DISTANCES:
            self.offset = offset
        gains.copy_(exact_gains)
        weights.copy_(exact_weights)
        return objective

    def _raise(self, wrong: str | None, argument: str, row: int) -> None:
        if wrong is None:
            return
        x, p = self._x, self._problem
        if wrong == "not finite":
            check_finite(x if argument == "x" or p.clients is None else p.clients, argument)
        if wrong in ("weights", "weights sum") and p.weights is not None:
            check_weights(p.weights, x.dtype)
        if wrong == "preselected" and p.preselected is not None:
            check_preselected(p.preselected, x.shape[0])
        if wrong == "vanishing":
            raise ValueError(
                "x: similarities times weights are so close to the smallest numbers of the type that gains would be "
                "lost; scale x or the weights up"
            )
        if wrong == "overflow" and p.metric != "precomputed":
            values = "distances" if p.metric in DISTANCES else "similarities"
            raise ValueError(
                f"x: {values} of metric {p.metric!r} overflow {x.dtype}; scale the data down or use float64"
            )
        if wrong == "overflow":
            raise ValueError(
                "x: the sum of a candidate's similarities overflows the range of a double; scale x or the weights down"
            )
        # Checked again, the values are fine.
        raise RuntimeError(f"{argument}: {wrong} at row {row} on the device; was it written to meanwhile?")


def workspace(problem: Problem) -> int:
    """Terms are named after what csrc/cuda/facility_location.cu allocates."""
    (n, m), d, size = problem.shape, problem.x.shape[1], problem.x.dtype.itemsize
    points = n if problem.clients is None else n + m
    packed = points * d * size if problem.metric != "precomputed" else 0
    norms = 8 * points if problem.metric == "dot" else 0
    # Bounds, sums and picks of candidates; best similarities, weights and owners of clients; a sample.
    state = (4 * 8 + 6 * 4 + 4) * n + (4 * size + 2 * 4) * m
    named = 12 * n if problem.preselected is not None else 0
    exact = 8 * n if problem.costs is not None else 0
    picks = n if problem.expected_picks is None else problem.expected_picks
    written = 16 * picks  # gains and weights are written in float64
    return packed + norms + state + named + exact + written + 8 * m + 2**16
