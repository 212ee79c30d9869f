"""The torch op, which torch.compile and fake tensors see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.op import define_op
from flashcoreset._core.results import Selection
from flashcoreset._core.tensor import compute_dtype
from flashcoreset.gradients.adam import AdamState, RankOneAdamState
from flashcoreset.gradients.zeroth_order import LowRankGradients
from flashcoreset.matching.problem import Asked, Problem, check
from flashcoreset.matching.solve import match_members

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Call:
    """The arguments of the op, which takes tensors and numbers alone. Coefficients come with a length and the backend of their directions;
    rows come with neither."""

    g: Tensor
    length: int | None
    seed: int
    directions: str | None
    k: int
    m: Tensor | None
    v: Tensor | None
    step: int
    beta1: float
    beta2: float
    eps: float
    top: int | None
    groups: Tensor | None
    labels: Tensor | None
    budgets: Tensor | None
    metric: str
    method: str
    nonnegative: bool
    ridge: float
    backend: str | None


def _op(c: _Call) -> _Outputs:
    g = c.g
    rows = g.detach()
    given = rows if c.length is None else LowRankGradients(rows, c.seed, c.length, c.directions)
    if (c.m is None) != (c.v is None):
        raise ValueError("m and v must be given together, or neither of them")
    history = None
    if c.m is not None and c.v is not None:
        history = AdamState(c.m.detach(), c.v.detach(), c.step, (c.beta1, c.beta2), c.eps)
    named = None
    if c.labels is not None and c.budgets is not None:
        named = dict(zip(c.labels.tolist(), c.budgets.tolist(), strict=True))
    problem, _ = check(
        given, c.k, history, c.top, c.groups, named, c.metric, c.method, c.nonnegative, c.ridge
    )
    found = match_members(problem, c.backend)
    objective, offset = (
        torch.tensor(value or 0.0, dtype=torch.float64, device=g.device)
        for value in (found.objective, found.offset)
    )
    dims = g.new_empty(0, 0, dtype=torch.int64) if found.dims is None else found.dims
    new_m, new_v = g.new_empty(0), g.new_empty(0)
    if found.state is not None:
        new_m, new_v = found.state.m, found.state.v
        if not len(found.indices):  # an op must not return its inputs
            new_m, new_v = new_m.clone(), new_v.clone()
    # `caratheodory` stores one number for all rows.
    assignment = found.assignment.contiguous()
    return found.indices, found.gains, found.weights, assignment, objective, offset, dims, new_m, new_v


def _fake(c: _Call) -> _Outputs:
    # Weighted sums may take fewer than k; groups without a budget have no dimensions.
    taken: Any = c.k if c.method == "medoid" else torch.library.get_ctx().new_dynamic_size()
    lists: Any = 0 if c.top is None else 1
    if c.top is not None and c.groups is not None:
        lists = torch.library.get_ctx().new_dynamic_size()
    g, dtype = c.g, compute_dtype(c.g.dtype)
    return (
        g.new_empty(taken, dtype=torch.int64),
        g.new_empty(taken, dtype=dtype),
        g.new_empty(taken, dtype=dtype),
        g.new_empty(g.shape[0], dtype=torch.int64),
        g.new_empty((), dtype=torch.float64),
        g.new_empty((), dtype=torch.float64),
        g.new_empty(lists, c.top or 0, dtype=torch.int64),
        g.new_empty(0) if c.m is None else torch.empty_like(c.m),
        g.new_empty(0) if c.v is None else torch.empty_like(c.v),
    )


_MATCH = define_op(
    "match_gradients",
    _op,
    _fake,
    ("indices", "gains", "weights", "assignment", "objective", "offset", "dims", "m", "v"),
)


def call_op(problem: Problem, asked: Asked, backend: str | None) -> Selection:
    g, history = problem.g, problem.history
    k, groups, labels, budgets = asked
    if isinstance(history, RankOneAdamState):
        raise TypeError(
            "normalize must be an AdamState in a function given to torch.compile, got RankOneAdamState; pass its dense()"
        )
    past: tuple[Tensor | None, Tensor | None, int, float, float, float] = (None, None, 1, 0.9, 0.999, 1e-8)
    if history is not None:
        past = (history.m, history.v, history.step, *history.betas, history.eps)
    call = _Call(
        g.values, g.length, g.seed, g.backend, k, *past, problem.top, groups, labels, budgets, problem.metric, problem.method,
        problem.nonnegative, problem.ridge, backend,
    )  # fmt: skip
    indices, gains, weights, assignment, objective, offset, dims, m, v = _MATCH(call)
    if problem.method != "medoid" or problem.metric not in DISTANCES:
        offset = None
    return Selection(
        indices,
        gains,
        weights,
        assignment,
        objective,
        offset,
        None if problem.top is None else dims,
        None if history is None else replace(history, m=m, v=v, step=history.step + 1),
    )
