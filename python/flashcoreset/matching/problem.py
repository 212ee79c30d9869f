"""What gradient matching is given: by its caller (`Problem`) and by itself to the kernels (`Updates`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.inputs import numbered_labels
from flashcoreset._core.tensor import (
    as_integer,
    as_matrix,
    compute_dtype,
    is_traced,
    one_of,
)
from flashcoreset.facility_location.checks import check_picks, group_members
from flashcoreset.gradients.adam import AdamState, RankOneAdamState
from flashcoreset.gradients.outer_products import OuterProductGradients
from flashcoreset.gradients.zeroth_order import LowRankGradients
from flashcoreset.matching.rule import Rule
from flashcoreset.pursuit.problem import check_fit

METRICS = ("l1", "euclidean", "sqeuclidean", "cosine", "dot")
METHODS = ("medoid", "omp", "frank_wolfe", "caratheodory")

History = AdamState | RankOneAdamState
Asked = tuple[int, Tensor | None, Tensor | None, Tensor | None]  # k, groups, labels and budgets


@dataclass(slots=True, eq=False)
class Gradients:
    """Gradients, as rows, as coefficients of shared directions, or as factors of outer products.

    Attributes:
        values: [B, D] float16, bfloat16, float32 or float64; with `length` the coefficients [B, q], float32 or float64; with
            `factors` bounds [B, 1] of the entries of each row. They are not finite where a row is not, and 0 where it is.
        seed: the seed of the directions [q, length].
        length: the length of the directions; None for rows.
        backend: the backend that makes directions outside of a kernel.
        factors: what columns are made of; None for rows and coefficients. Kernels get such columns as rows, never this.
    """

    values: Tensor
    seed: int = 0
    length: int | None = None
    backend: str | None = None
    factors: OuterProductGradients | None = None

    @classmethod
    def of(cls, g: Any, name: str) -> Gradients:
        if isinstance(g, LowRankGradients):
            return cls(g.coefficients.detach(), g.seed, g.numel, g.backend)
        if isinstance(g, OuterProductGradients):
            return cls(g.bounds()[:, None].to(g.dtype), factors=g)
        return cls(as_matrix(g, name).detach())

    @property
    def count(self) -> int:
        return self.values.shape[0]

    @property
    def numel(self) -> int:
        if self.factors is not None:
            return self.factors.numel
        return self.values.shape[1] if self.length is None else self.length

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the gradients are computed."""
        return compute_dtype(self.values.dtype)

    @property
    def shared(self) -> LowRankGradients:
        """The coefficients with their directions."""
        return LowRankGradients(self.values, self.seed, self.numel, self.backend)

    def columns(self, begin: int, end: int) -> Tensor:
        """The columns [B, end - begin], float32 or float64."""
        if self.factors is not None:
            return self.factors.columns(begin, end).to(self.dtype)
        if self.length is None:
            return self.values[:, begin:end].to(self.dtype)
        return self.values @ self.shared.directions(begin, end)


@dataclass(slots=True, eq=False)
class Updates:
    """Groups of gradients whose updates are wanted in the dimensions where these are largest.

    Attributes:
        g: the gradients.
        history: Adam's, float64 if the gradients are, else float32; None takes the gradients themselves as updates.
        member: [R] int64, the groups' rows, one group after the other.
        offset: [G + 1] int64, where each group begins in `member`; none is empty.
        top: how many dimensions, 1 <= top <= D.
    """

    g: Gradients
    history: AdamState | None
    member: Tensor
    offset: Tensor
    top: int

    @property
    def rule(self) -> Rule:
        """How updates are made of a history; without one it is not used."""
        h = self.history
        return Rule() if h is None else Rule.adam(h.step, h.betas, h.eps)

    def compact(self) -> Updates:
        """The same with a history, members and offsets that are contiguous."""
        history = None if self.history is None else self.history.contiguous()
        return Updates(self.g, history, self.member.contiguous(), self.offset.contiguous(), self.top)


@dataclass(slots=True, eq=False)
class Problem:
    """What is to be matched: its arguments are checked, their values not yet.

    Attributes:
        g: the gradients.
        history: Adam's before the step, None to match the gradients themselves.
        top: the dimensions that count in each group; None for all.
        members: for each group with a budget its rows, ascending, and the budget.
        metric, method, nonnegative, ridge: as for `match_gradients`.
    """

    g: Gradients
    history: History | None
    top: int | None
    members: list[tuple[Tensor, int]]
    metric: str = "l1"
    method: str = "medoid"
    nonnegative: bool = True
    ridge: float = 0.0


def check(
    g: Any,
    k: Any,
    normalize: Any,
    top: Any,
    groups: Any,
    budgets: Any,
    metric: Any,
    method: Any,
    nonnegative: Any,
    ridge: Any,
) -> tuple[Problem, Asked]:
    """The problem (without members inside a graph, where labels have no values), and what `check_picks` returns for k, groups and
    budgets."""
    one_of(metric, "metric", METRICS)
    one_of(method, "method", METHODS)
    gradients = Gradients.of(g, "g")
    ridge = check_fit(nonnegative, ridge)
    if method != "omp" and (not nonnegative or ridge):
        raise ValueError(
            f"nonnegative and ridge are for method 'omp', got {nonnegative} and {ridge} with {method!r}"
        )
    device = gradients.values.device
    groups, budgets = numbered_labels(groups, budgets=budgets)
    asked = check_picks(gradients.count, k, groups, budgets, device)
    gradients, history = check_history(normalize, gradients, "normalize")
    top = check_top(top, gradients.numel)
    members: list[tuple[Tensor, int]] = []
    if not is_traced(gradients.values):
        count, labelled, labels, counts = asked
        members = [(torch.arange(gradients.count, device=device), count)]
        if labelled is not None:
            found = group_members(count, labelled, labels, counts)
            members = [(rows, count) for rows, count in found if count]
    return Problem(gradients, history, top, members, metric, method, nonnegative, ridge), asked


def check_top(top: Any, numel: int) -> int | None:
    if top is None:
        return None
    number = as_integer(top, "top")
    if not 1 <= number <= numel:
        raise ValueError(f"top must be in [1, {numel}], {numel} being the length of a gradient, got {number}")
    return number


def check_history(history: Any, g: Gradients, name: str) -> tuple[Gradients, History | None]:
    """The gradients and the history, checked, in the same precision."""
    if history is None:
        return g, None
    if not isinstance(history, (AdamState, RankOneAdamState)):
        raise TypeError(f"{name} must be an AdamState, got {type(history).__name__}")
    if history.numel != g.numel:
        raise ValueError(
            f"{name} must be of gradients of length {g.numel}, as these are, got one of length {history.numel}"
        )
    if isinstance(history, AdamState):
        if history.m.device != g.values.device:
            raise ValueError(
                f"{name} is on device {history.m.device}, but the gradients are on {g.values.device}; move one of them"
            )
        if history.m.dtype != g.dtype:
            # One of them is float32, and its numbers are float64's too.
            values, m, v = (tensor.double() for tensor in (g.values, history.m, history.v))
            return replace(g, values=values), replace(history, m=m, v=v)
    return g, history
