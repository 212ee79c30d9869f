"""Solves checked problems: each group by its method, then all groups as one selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.results import Selection
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import check_finite, compute_dtype
from flashcoreset.caratheodory import caratheodory
from flashcoreset.facility_location import facility_location
from flashcoreset.gradients.adam import AdamState, RankOneAdamState
from flashcoreset.matching.backend import Kernels, choose
from flashcoreset.matching.problem import Gradients, History, Problem
from flashcoreset.matching.rule import OVERFLOW, Rule
from flashcoreset.matching.updates import (
    BLOCK_BYTES,
    SAFE,
    as_short_rows,
    check_rows,
    explained,
    history_after,
    in_largest_dimensions,
    scaled_sums,
)
from flashcoreset.pursuit import solve_frank_wolfe, solve_pursuit
from flashcoreset.pursuit.problem import Problem as PursuitProblem

# The updates count as numbers along one direction if eps moves no update by more than this part of it, which float32 sums may do too.
_NEGLIGIBLE = 1e-6
_MOST_WITH_SQUARE = 2.0**505


def match_members(problem: Problem, backend: str | None) -> Selection:
    """Solves a checked problem."""
    g, history = problem.g, problem.history
    kernels = choose(backend, g.values.device)
    if g.factors is not None:
        check_rows(problem, "g.factors")
    if g.length is not None:
        check_rows(problem, "g.coefficients")
    if history is not None and g.dtype == torch.float64:
        # If a square is infinite, the update becomes 0.
        most = largest_magnitude(g.values)
        if _MOST_WITH_SQUARE < most < math.inf:
            raise ValueError(
                f"g: the squares of entries of up to {most:.3g}, which Adam's history holds, overflow float64; scale the gradients "
                "down"
            )
    dims, numbers, dense = None, None, history
    if isinstance(history, RankOneAdamState):
        if _along_one_direction(g, history):
            numbers = _numbers(problem, history)
        if numbers is None:
            dense = history.dense(g.dtype, g.values.device, backend)
    if numbers is not None:
        parts = _solve(problem, numbers, backend)
    else:
        assert not isinstance(dense, RankOneAdamState)
        if problem.top is not None:
            dims, u = in_largest_dimensions(problem, dense, kernels)
            parts = _solve(problem, u, backend)
        elif problem.method == "medoid":
            parts = _medoids_of_all_dimensions(problem, dense, kernels, backend)
        else:
            try:
                parts = _solve(problem, as_short_rows(problem, dense, kernels), backend)
            except ValueError as error:
                raise explained(problem, dense, error) from None
    return _assemble(problem, parts, dims, lambda chosen: _advance(g, history, dense, chosen, kernels))


def _along_one_direction(g: Gradients, history: RankOneAdamState) -> bool:
    return g.length is not None and g.values.shape[1] == 1 and (history.is_empty or history.seed == g.seed)


def _numbers(problem: Problem, history: RankOneAdamState) -> list[Tensor] | None:
    """For each group [members, 1] float64 whose distances are those of updates along one direction; None if eps counts."""
    g = problem.g
    rule = Rule.adam(history.step, history.betas, history.eps)
    width = problem.top or g.numel
    scale = width if problem.method == "medoid" and problem.metric == "l1" else width**0.5
    result = []
    for rows, _ in problem.members:
        c = g.values[rows].double()
        root = (rule.v_scale * history.mean_square + rule.v_step * c.square()).sqrt()
        if not bool((root * _NEGLIGIBLE >= rule.eps).all()):
            return None
        result.append((rule.m_scale * history.mean + rule.m_step * c) / root * scale)
    return result


def _of_g(error: ValueError) -> ValueError:
    """An error of `facility_location` about its x, reworded for g."""
    text = str(error)
    return ValueError("g" + text[1:]) if text.startswith("x") else error


def _medoids_of_all_dimensions(
    problem: Problem, history: AdamState | None, kernels: Kernels, backend: str | None
) -> list[Selection]:
    metric = problem.metric
    summed = {"euclidean": "sqeuclidean", "cosine": "dot"}.get(metric, metric)
    parts = []
    sums, exponents = scaled_sums(problem, history, kernels, summed, each_row=metric == "cosine")
    for total, exponent, (_, count) in zip(sums, exponents, problem.members, strict=True):
        most = float(total.max())  # NaN if there is one; no product is above the largest square
        if not 2 * most < math.inf:
            raise ValueError(_sums_overflow(metric))
        if metric == "cosine":
            norm = total.diagonal().sqrt()
            total = torch.where(total == 0, 0, total / (norm[:, None] * norm))
        elif metric == "euclidean":
            total, most = total.sqrt(), most**0.5
        offset_of = None
        if metric in DISTANCES:
            # The offset is above all distances, so that the farthest members are served too.
            offset_of = 2 * most or 1.0
            total = offset_of - total
        try:
            found = facility_location(total, count, metric="precomputed", backend=backend)
        except ValueError as error:
            raise _of_g(error) from None
        parts.append(_scaled_back(replace(found, offset=offset_of), exponent, metric))
    return parts


def _sums_overflow(metric: str) -> str:
    return f"g: sums over dimensions for metric {metric!r} overflow; scale the gradients down"


def _scaled_back(found: Selection, exponent: int, metric: str) -> Selection:
    """The medoids `found` for updates times 2^exponent, as those of the updates; squares of tiny updates may become 0."""
    if exponent == 0 or metric == "cosine":
        return found
    back = -exponent * (2 if metric in ("sqeuclidean", "dot") else 1)
    objective = times_power(found.objective, back)
    if not math.isfinite(objective):
        raise ValueError(_sums_overflow(metric))
    offset = None if found.offset is None else times_power(found.offset, back)
    return replace(found, gains=scale(found.gains, back), objective=objective, offset=offset)


def _solve(problem: Problem, updates: Iterable[Tensor], backend: str | None) -> list[Selection]:
    """Each group's selection by its updates [members, dimensions]."""
    groups, parts = iter(updates), []
    for _, count in problem.members:
        u = next(groups)
        if problem.method == "medoid":
            exponent = exponent_into(largest_magnitude(u), SAFE)
            rows = scale(u, exponent) if exponent else u
            try:
                found = facility_location(rows, count, metric=problem.metric, backend=backend)
            except ValueError as error:
                raise _of_g(error) from None
            parts.append(_scaled_back(found, exponent, problem.metric))
        elif problem.method == "caratheodory":
            parts.append(_reduce(u, count, backend))
        else:
            parts.append(_pursue(problem, u, count, backend))
        del u  # frees them before the next group's rows are copied
    return parts


def _reduce(u: Tensor, count: int, backend: str | None) -> Selection:
    try:
        return caratheodory(u, max_size=count, backend=backend)
    except ValueError as error:
        raise ValueError(str(error).replace("max_size", "k, or the budget of a group,")) from None


def _pursue(problem: Problem, u: Tensor, count: int, backend: str | None) -> Selection:
    # Some columns at a time, because torch converts what it sums.
    step = max(1, BLOCK_BYTES // (8 * len(u)))
    target = torch.cat([part.sum(0, dtype=torch.float64) for part in u.split(step, 1)])
    most = largest_magnitude(target)
    if not math.isfinite(most):
        check_finite(u, "g")
        raise ValueError(f"g: the sum of its rows overflows {torch.float64}; scale the gradients down")
    # The results stay float64 until all groups are put together: an intermediate norm may leave the range of g's type.
    given = PursuitProblem(u, target, count, problem.nonnegative, problem.ridge)
    found = (solve_pursuit if problem.method == "omp" else solve_frank_wolfe)(given, backend)
    indices, weights, norms = found.indices, found.weights, found.residual_norms
    if len(norms):
        # Rounded to the type of g, because backends may differ in further digits.
        left = float(norms[-1].to(compute_dtype(problem.g.dtype)))
        left = left if left < math.inf else float(norms[-1])
    else:
        exponent = exponent_into(most, SAFE)
        left = times_power(float(scale(target, exponent).norm()), -exponent)
    used = weights.to(problem.g.dtype) != 0
    if not used.all():
        indices, weights = indices[used], weights[used]
    nowhere = torch.full((len(u),), -1, dtype=torch.int64, device=u.device)
    return Selection(indices, torch.zeros_like(weights), weights, nowhere, -left, None)


def _assemble(
    problem: Problem,
    parts: list[Selection],
    dims: Tensor | None,
    state_after: Callable[[Tensor], History | None],
) -> Selection:
    """The groups' selections as one, with one offset for all, and the state after a step with the chosen rows."""
    g = problem.g
    for part in parts:
        most = max(
            abs(part.objective), largest_magnitude(part.weights) if problem.method != "medoid" else 0.0
        )
        if most > torch.finfo(g.dtype).max:
            raise ValueError(
                f"g: gains or weights of up to {most:.3g} overflow {g.dtype}; scale the gradients, or use float64"
            )
    if len(parts) == 1 and len(problem.members[0][0]) == g.count:
        one = parts[0]
        return replace(
            one,
            gains=one.gains.to(g.dtype),
            weights=one.weights.to(g.dtype),
            dims=dims,
            state=state_after(one.indices),
        )
    offsets = [part.offset for part in parts if part.offset is not None]
    offset = max(offsets, default=None)
    assignment = torch.full((g.count,), -1, dtype=torch.int64, device=g.values.device)
    indices, gains, weights = [], [], []
    objective, done = 0.0, 0
    for part, (rows, _) in zip(parts, problem.members, strict=True):
        more = 0.0
        if offset is not None and part.offset is not None:
            more = (offset - part.offset) * len(rows)
        indices.append(rows[part.indices])
        gains.append(part.gains.clone())
        gains[-1][:1] += more
        weights.append(part.weights)
        assignment[rows] = torch.where(part.assignment >= 0, part.assignment + done, -1)
        objective += part.objective + more
        done += len(part.indices)
    chosen = torch.cat(indices)
    return Selection(
        chosen,
        torch.cat(gains).to(g.dtype),
        torch.cat(weights).to(g.dtype),
        assignment,
        objective,
        offset,
        dims,
        state_after(chosen),
    )


def _advance(
    g: Gradients,
    history: History | None,
    dense: History | None,
    chosen: Tensor,
    kernels: Kernels,
) -> History | None:
    """The history after a step with the chosen gradients; `dense` is what was matched with."""
    if history is None or dense is None:
        return None
    if not len(chosen):  # without rows there are no means
        return replace(history, step=history.step + 1)
    beta1, beta2 = history.betas
    step = history.step + 1
    if isinstance(history, RankOneAdamState) and _along_one_direction(g, history):
        c = g.values[chosen, 0].double()
        mean = beta1 * history.mean + (1 - beta1) * float(c.mean())
        mean_square = beta2 * history.mean_square + (1 - beta2) * float(c.square().mean())
        if not (math.isfinite(mean) and math.isfinite(mean_square)):
            raise ValueError(OVERFLOW)
        return replace(history, mean=mean, mean_square=mean_square, seed=g.seed, step=step)
    assert isinstance(dense, AdamState)
    m, v = history_after(g, dense, chosen, kernels)
    return replace(dense, m=m, v=v, step=step)
