"""The compiled CPU kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset import _native
from flashcoreset._tensor import Csr
from flashcoreset.kernels.nearest_order import NearestOrder
from flashcoreset.reference.facility_location import DEFAULT_MEMORY_BUDGET

__all__ = ["FacilityLocation", "NearestOrder", "pairwise"]

# A capsule costs 0.3 us, calling Tensor.__dlpack__ from C++ 2 us.
_capsule = torch.utils.dlpack.to_dlpack
_MANY = 2**63 - 1


def _optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else _capsule(tensor)


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """Similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of all pairs of rows.

    Args:
        x: [n, d] float32 or float64, on the CPU.
        y: [m, d], same dtype; None is `x` itself, of which each pair is computed once.
        metric: "cosine", "dot", "euclidean", "sqeuclidean" or "l1".
        out: [n, m], same dtype, rows contiguous; None allocates it.

    Returns:
        `out`.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        TypeError, ValueError: for arrays that do not fit each other, NaN or infinity.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> kernels.cpu.pairwise(torch.eye(2), metric="sqeuclidean")
        tensor([[0., 2.],
                [2., 0.]])
    """
    x = x.detach()
    other = x if y is None else y.detach()
    if out is None:
        out = x.new_empty(x.shape[0], other.shape[0])
    _native.module().pairwise(
        _capsule(x), _capsule(other), _capsule(out), metric, torch.get_num_threads(), y is None
    )
    return out


class FacilityLocation:
    """A greedy run that advances pick by pick; see `flashcoreset.reference.facility_location` for the
    definition.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64, or such a
            sparse matrix.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from.
        memory_budget: bytes for lists and matrices larger than n + m.
        expected_picks: how many picks are likely to be asked for in all, on which the order of the work is
            planned (the result does not depend on it); None: many.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity in `x` or `clients` (at the first step).

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> run = kernels.cpu.FacilityLocation(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
        >>> run.step(2)
        2
        >>> indices, assignment = torch.empty(2, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        >>> gains, weights = torch.empty(2, dtype=torch.float64), torch.empty(2, dtype=torch.float64)
        >>> run.finish(indices, gains, weights, assignment), indices
        (3.0, tensor([1, 0]))
    """

    def __init__(
        self,
        x: Tensor | Csr,
        clients: Tensor | None = None,
        *,
        metric: str = "cosine",
        weights: Tensor | None = None,
        preselected: Tensor | None = None,
        offset: float = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        expected_picks: int | None = None,
    ) -> None:
        native = _native.module().FacilityLocation
        threads = torch.get_num_threads()
        if isinstance(x, Csr):
            n, m = x.shape
            self._run = native.from_csr(
                _capsule(x.crow),
                _capsule(x.col),
                _capsule(x.values),
                m,
                _optional(weights),
                _optional(preselected),
                n == m,
                memory_budget,
                threads,
            )
            return
        if metric == "precomputed" and x.stride(1) != 1:
            x = x.contiguous()
        self._run = native(
            _capsule(x),
            _optional(clients),
            metric,
            _optional(weights),
            _optional(preselected),
            offset,
            memory_budget,
            threads,
            _MANY if expected_picks is None else expected_picks,
        )

    def step(self, count: int, naive: bool = False) -> int:
        """Makes up to `count` further picks; `naive` evaluates every candidate for each. Returns the number
        of picks so far."""
        return self._run.step(count, naive)

    def step_among(self, candidates: Tensor) -> int:
        """One pick among `candidates` [r] int64, which are neither picked nor preselected. Returns the
        pick."""
        return self._run.step_among(_capsule(candidates))

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32,
        `assignment` [m] int64; returns f(S), the preselected included."""
        return self._run.finish(_capsule(indices), _capsule(gains), _capsule(weights), _capsule(assignment))

    def stats(self) -> dict[str, int]:
        """What the run did so far: evaluations of candidates, similarities computed or read, and sweeps over
        all candidates."""
        return self._run.stats()
