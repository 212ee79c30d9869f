"""The problems of this family: one greedy run as the kernels take it, and what facility_location() was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET, DISTANCES
from flashcoreset._core.tensor import Csr, compute_dtype

MATRICES = ("precomputed", "precomputed_distance")
METRICS = ("cosine", "dot", *DISTANCES, *MATRICES)
# Hears of a step that lasts: the pairs computed, in units of those that the first pick takes, and the picks made.
Watch = Callable[[float, int], object]


# Neither class is frozen, which would cost 2 us per call, and neither is written to after it was checked.


@dataclass(eq=False, slots=True)
class Problem:
    """One greedy run, as kernels take it.

    Attributes:
        x: [n, d] points, or [n, m] similarities if `metric` is "precomputed"; float32 or float64, or such a sparse matrix of
            similarities.
        clients: [m, d] points of the dtype of `x`, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        costs: [n] float64 in [2^-900, 2^900]: picks are of the largest gain per cost, as float64; None: of the largest gain.
        offset: what distances are subtracted from: those of points, and those that a matrix holds negated. None, for
            kernels that check values: an upper bound of all distances.
        memory_budget: bytes that may be spent on similarities and lists larger than n + m. The result does not depend on it.
        expected_picks: how many picks are likely to be asked for in all, from which the order of the work is planned (the
            result does not depend on it); None: many.
    """

    x: Tensor | Csr
    clients: Tensor | None = None
    metric: str = "cosine"
    weights: Tensor | None = None
    preselected: Tensor | None = None
    costs: Tensor | None = None
    offset: float | None = 0.0
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    expected_picks: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """How many candidates and clients there are."""
        n, width = self.x.shape
        if self.metric == "precomputed":
            return n, width
        return n, n if self.clients is None else self.clients.shape[0]

    @property
    def is_square(self) -> bool:
        """Whether the clients are the candidates."""
        n, m = self.shape
        return self.clients is None and n == m

    @property
    def total_weight(self) -> float:
        return float(self.shape[1]) if self.weights is None else float(self.weights.sum())

    @property
    def floor(self) -> float:
        """What similarities below count as: 0, or where similarities are negative distances the negative offset."""
        return -self.offset if self.offset and self.metric in (*DISTANCES, "precomputed") else 0.0


@dataclass(eq=False, slots=True)
class Request:
    """The arguments of facility_location(), with types, shapes and options checked, values not yet; also those of the
    torch op, which takes tensors and numbers alone."""

    x: Tensor  # values, if the matrix is sparse
    crow: Tensor | None
    col: Tensor | None
    columns: int
    k: int
    clients: Tensor | None
    metric: str
    weights: Tensor | None  # [m] float64
    groups: Tensor | None  # [n] int64
    labels: Tensor | None  # [G] int64
    budgets: Tensor | None  # [G] int64
    preselected: Tensor | None  # [p] int64
    method: str
    epsilon: float
    seed: str  # a torch op's int ends at 2^63
    offset: float | None
    memory_budget: int
    backend: str | None
    costs: Tensor | None  # [n] float64
    cost_budget: float | None
    cost_sensitive: bool
    stop_gain: float | None
    exclude: Tensor | None  # [e] int64
    cap_labels: Tensor | None  # [C] int64
    caps: Tensor | None  # [C] int64
    min_distance: float | None
    rounds: int

    @property
    def is_grouped(self) -> bool:
        """Whether each group is a problem of its own; with caps they are but labels of one problem."""
        return self.groups is not None and self.caps is None

    @property
    def is_limited(self) -> bool:
        """Whether candidates are ruled out, or picks may be fewer than k, of a run if not of the call."""
        return self.rounds > 1 or not (
            self.cost_budget is self.stop_gain is self.exclude is self.caps is self.min_distance is None
        )

    @property
    def matrix(self) -> Tensor | Csr:
        if self.crow is None or self.col is None:
            return self.x
        return Csr(self.crow, self.col, self.x, (self.crow.shape[0] - 1, self.columns))

    @property
    def dtype(self) -> torch.dtype:
        """In which the problem is solved, and the type of gains."""
        return compute_dtype(self.x.dtype)
