"""Facility location, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET, DISTANCES
from flashcoreset._core.cuda import optional_compact, stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.errors import BackendUnavailableError, no_sparse_kernel
from flashcoreset._core.native import capsule
from flashcoreset._core.tensor import Csr, check_finite, check_preselected, check_weights
from flashcoreset.pairwise.cuda import pairwise

__all__ = ["TAKES", "FacilityLocation", "pairwise"]

TAKES = Takes(checks_values=True)


class FacilityLocation:
    """A greedy run that stays on the GPU; see `flashcoreset.facility_location.reference` for the definition.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64, on a CUDA
            device.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from, those of points and those that a matrix holds negated; None for an upper bound of all distances, found on the device
            and returned by `offset` after `finish`.
        memory_budget: not used: memory is proportional to the points.
        expected_picks: not used.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device, and for a sparse matrix.
        TypeError, ValueError: for arrays that do not fit each other.
        torch.OutOfMemoryError: if the device has no room for the run.
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
        if isinstance(x, Csr):
            raise BackendUnavailableError(f"backend 'cuda': {no_sparse_kernel('cuda')}")
        if metric == "precomputed" and x.stride(1) != 1:
            x = x.contiguous()
        self._x, self._clients, self._weights, self._preselected = x, clients, weights, preselected
        self._metric, self.offset = metric, offset
        module, queue = native.cuda_module(x.device.index or 0), stream(x.device)
        self._run = with_memory(
            lambda: module.FacilityLocation(
                capsule(x),
                None if clients is None else capsule(clients),
                metric,
                optional_compact(weights),
                optional_compact(preselected),
                offset,
                queue,
            )
        )

    @property
    def completed(self) -> int:
        """How many of the picks that `step` started are known to be made."""
        return self._run.completed

    def step(self, count: int, naive: bool = False) -> int:
        """Starts up to `count` further picks; `naive` evaluates every candidate for each pick. Returns the number
        of picks that there will be; waits only for picks that would take long, so that Ctrl-C is handled."""
        return with_memory(lambda: self._run.step(count, naive))

    def step_among(self, candidates: Tensor) -> int:
        """Makes one pick among `candidates` [r] int64, which are neither picked nor preselected. Waits and returns
        the pick."""
        pick = with_memory(lambda: self._run.step_among(capsule(candidates)))
        if pick < 0:
            self._raise(*self._run.verdict())
        return pick

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32,
        `assignment` [m] int64; waits and returns f(S), the preselected included.

        Raises:
            ValueError: for data that turned out to be NaN, infinite, or too large or small for its type.
        """
        exact_gains, exact_weights = gains.double(), weights.double()
        objective, offset = self._run.finish(
            capsule(indices), capsule(exact_gains), capsule(exact_weights), capsule(assignment)
        )
        self._raise(*self._run.verdict())
        if self._metric in DISTANCES and self.offset is None:
            self.offset = offset
        elif self._metric in DISTANCES and self.offset > offset:
            # The kernels leave out the part of an offset that is far above all distances: beside it the first gains would be rounded.
            total = float(assignment.shape[0]) if self._weights is None else float(self._weights.sum())
            excess = (self.offset - offset) * total
            objective += excess
            if self._preselected is None and exact_gains.shape[0] > 0:
                exact_gains[0] += excess
        gains.copy_(exact_gains)
        weights.copy_(exact_weights)
        return objective

    def _raise(self, wrong: str | None, argument: str, row: int) -> None:
        if wrong is None:
            return
        dtype, is_points = self._x.dtype, self._metric != "precomputed"
        if wrong == "not finite":
            culprit = self._x if argument == "x" or self._clients is None else self._clients
            check_finite(culprit, argument)
        if wrong in ("weights", "weights sum") and self._weights is not None:
            check_weights(self._weights, dtype)
        if wrong == "preselected" and self._preselected is not None:
            check_preselected(self._preselected, self._x.shape[0])
        if wrong == "vanishing":
            raise ValueError(
                "x: similarities times weights are so close to the smallest numbers of the type that gains would be "
                "lost; scale x or the weights up"
            )
        if wrong == "overflow" and is_points:
            values = "distances" if self._metric in DISTANCES else "similarities"
            raise ValueError(
                f"x: {values} of metric {self._metric!r} overflow {dtype}; scale the data down or use float64"
            )
        if wrong == "overflow":
            raise ValueError(
                "x: the sum of a candidate's similarities overflows the range of a double; scale x or the weights down"
            )
        # Checked again, the values are fine.
        raise RuntimeError(f"{argument}: {wrong} at row {row} on the device; was it written to meanwhile?")
