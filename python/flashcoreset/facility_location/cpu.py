"""Facility location, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule, optional_capsule
from flashcoreset._core.tensor import Csr
from flashcoreset.pairwise.cpu import pairwise

__all__ = ["TAKES", "FacilityLocation", "pairwise"]

TAKES = Takes(sparse=True)


_MANY = 2**63 - 1


class FacilityLocation:
    """A greedy run that advances pick by pick; see `flashcoreset.facility_location.reference` for the
    definition.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64, or such a
            sparse matrix.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from: those of points, and those that a matrix holds negated.
        memory_budget: bytes for lists and matrices larger than n + m.
        expected_picks: how many picks are likely to be asked for in all, from which the order of the work is
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
        offset: float | None = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        expected_picks: int | None = None,
    ) -> None:
        assert offset is not None  # only kernels that check values may find an offset themselves
        self.offset, self.completed = offset, 0
        made = native.module().FacilityLocation
        threads = torch.get_num_threads()
        if isinstance(x, Csr):
            n, m = x.shape
            self._run = made.from_csr(
                capsule(x.crow),
                capsule(x.col),
                capsule(x.values),
                m,
                optional_capsule(weights),
                optional_capsule(preselected),
                n == m,
                memory_budget,
                threads,
            )
            return
        if metric == "precomputed" and x.stride(1) != 1:
            x = x.contiguous()
        self._run = made(
            capsule(x),
            optional_capsule(clients),
            metric,
            optional_capsule(weights),
            optional_capsule(preselected),
            offset,
            memory_budget,
            threads,
            _MANY if expected_picks is None else expected_picks,
        )

    def step(self, count: int, naive: bool = False) -> int:
        """Makes up to `count` further picks; `naive` evaluates every candidate for each pick. Returns the number
        of picks so far."""
        self.completed = made = int(self._run.step(count, naive))
        return made

    def step_among(self, candidates: Tensor) -> int:
        """Makes one pick among `candidates` [r] int64, which are neither picked nor preselected. Returns the
        pick."""
        return self._run.step_among(capsule(candidates))

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32,
        `assignment` [m] int64; returns f(S), the preselected included."""
        return self._run.finish(capsule(indices), capsule(gains), capsule(weights), capsule(assignment))

    def stats(self) -> dict[str, int]:
        """What the run did so far: evaluations of candidates, similarities computed or read, and sweeps over
        all candidates."""
        return self._run.stats()
