"""The CUDA kernels, on tensors of a CUDA device and torch's current stream there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset import _native
from flashcoreset._errors import BackendUnavailableError
from flashcoreset._tensor import Csr, check_finite
from flashcoreset.reference.facility_location import DEFAULT_MEMORY_BUDGET

__all__ = ["CHECKS_VALUES", "FacilityLocation", "pairwise"]

# The kernels look at weights and preselected candidates, and find an offset, on the device: a look from here would wait for it.
CHECKS_VALUES = True

# Where the kernels' tensors are. The tests run the same kernels on the CPU, by an emulator.
DEVICE_TYPE = "cuda"

_capsule = torch.utils.dlpack.to_dlpack

_MESSAGES = {
    "overflow": "x: similarities, or their weighted sum, overflow {dtype}; scale the data down or use float64",
    "vanishing": "x: similarities times weights are so close to the smallest numbers of the type that gains would be "
    "lost; scale x or the weights up",
    "weights": "weights must be finite and >= 0, got {got} at position {row}",
    "preselected": "preselected must be distinct and in [0, {n}), got {got} at position {row}",
}


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else _capsule(tensor.contiguous())


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """Similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of all pairs of rows.

    Args:
        x: [n, d] float32 or float64, on a CUDA device. NaN and infinity are not looked for.
        y: [m, d], same dtype and device; None is `x` itself.
        metric: "cosine", "dot", "euclidean", "sqeuclidean" or "l1".
        out: [n, m], same dtype, rows contiguous; None allocates it.

    Returns:
        `out`; the work is on torch's current stream and not waited for.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        TypeError, ValueError: for arrays that do not fit each other.
    """
    x = x.detach()
    other = x if y is None else y.detach()
    if out is None:
        out = x.new_empty(x.shape[0], other.shape[0])
    _native.cuda_module().pairwise(_capsule(x), _capsule(other), _capsule(out), metric, _stream(x.device))
    return out


class FacilityLocation:
    """A greedy run that stays on the GPU; see `flashcoreset.reference.facility_location` for the definition.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64, on a CUDA
            device.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from; None for an upper bound of all distances, found on the device
            and told by `offset` after `finish`.
        memory_budget: not used: memory is proportional to the points.
        expected_picks: not used.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device, and for a sparse matrix.
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
            raise BackendUnavailableError(
                "backend 'cuda': there is no CUDA kernel for sparse matrices; pass backend='torch', or "
                "backend='cpu' with the matrix on the CPU"
            )
        if metric == "precomputed" and x.stride(1) != 1:
            x = x.contiguous()
        self._x, self._clients, self._weights, self._preselected = x, clients, weights, preselected
        self.offset = offset
        self._run = _native.cuda_module().FacilityLocation(
            _capsule(x),
            None if clients is None else _capsule(clients),
            metric,
            _optional(weights),
            _optional(preselected),
            offset,
            _stream(x.device),
        )

    def step(self, count: int, naive: bool = False) -> int:
        """Starts up to `count` further picks; `naive` evaluates every candidate for each. Returns the number
        of picks that there will be; does not wait for them."""
        return self._run.step(count, naive)

    def step_among(self, candidates: Tensor) -> int:
        """One pick among `candidates` [r] int64, which are neither picked nor preselected. Waits and returns
        the pick."""
        pick = self._run.step_among(_capsule(candidates))
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
        objective, self.offset = self._run.finish(
            _capsule(indices), _capsule(exact_gains), _capsule(exact_weights), _capsule(assignment)
        )
        self._raise(*self._run.verdict())
        gains.copy_(exact_gains)
        weights.copy_(exact_weights)
        return objective

    def _raise(self, wrong: str | None, argument: str, row: int) -> None:
        if wrong is None:
            return
        if wrong == "not finite":
            culprit = self._x if argument == "x" or self._clients is None else self._clients
            check_finite(culprit, argument)
        got: Any = None
        if wrong == "weights" and self._weights is not None:
            got = float(self._weights[row])
        if wrong == "preselected" and self._preselected is not None:
            got = int(self._preselected[row])
        raise ValueError(_MESSAGES[wrong].format(dtype=self._x.dtype, row=row, got=got, n=self._x.shape[0]))
