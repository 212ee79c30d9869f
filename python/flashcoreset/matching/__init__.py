"""Gradient matching: a few weighted gradients that stand for many, group by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.dispatch import DEFAULTS, check_backend
from flashcoreset._core.memory import as_dtype, as_shape, memory_estimate, register_estimate
from flashcoreset._core.op import define_op
from flashcoreset._core.results import Selection
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import (
    as_integer,
    as_matrix,
    as_number,
    as_vector,
    check_finite,
    check_not_meta,
    compute_dtype,
    is_traced,
    one_of,
)
from flashcoreset.caratheodory import caratheodory
from flashcoreset.facility_location import facility_location
from flashcoreset.facility_location.checks import check_picks, group_members
from flashcoreset.gradients.adam import AdamState, RankOneAdamState
from flashcoreset.gradients.zeroth_order import LowRankGradients
from flashcoreset.matching.backend import Kernels, choose
from flashcoreset.matching.rule import BLOCK as REFERENCE_BLOCK
from flashcoreset.matching.rule import OVERFLOW, Rule
from flashcoreset.matching.rule import check_history as check_moments
from flashcoreset.pursuit import pursuit_bytes, solve_frank_wolfe, solve_pursuit

METRICS = ("l1", "euclidean", "sqeuclidean", "cosine", "dot")
METHODS = ("medoid", "omp", "frank_wolfe", "caratheodory")

Asked = tuple[int, Tensor | None, Tensor | None, Tensor | None]  # k, groups, labels and budgets

_BLOCK_BYTES = 1 << 25  # bytes of the gradients that are handled together
# The updates count as numbers along one direction if eps moves no update by more than this part of it, which float32 sums may do too.
_NEGLIGIBLE = 1e-6
# Largest magnitudes of updates whose squares are normal numbers, also for rows that are 2^100 times nearer.
_SAFE = (-400, 450)
_MOST_WITH_SQUARE = 2.0**505


def match_gradients(
    g: Any,
    k: int | None,
    *,
    normalize: AdamState | RankOneAdamState | None = None,
    top: int | None = None,
    groups: Any = None,
    budgets: Any = None,
    metric: str = "l1",
    method: str = "medoid",
    nonnegative: bool = True,
    ridge: float = 0.0,
    backend: str | None = None,
) -> Selection:
    """A weighted subset of gradients that stands for all of them.

    Args:
        g: [B, D] gradients, one row per sample, float16, bfloat16, float32 or float64; or `LowRankGradients`, for which nothing
            of size B x D or D x q is formed.
        k: how many gradients to take. With `budgets`: their sum, or None.
        normalize: Adam's history: each gradient is replaced by the update that Adam would make with it, and the `state` of the result
            is the history after a step with the chosen gradients. None matches the gradients themselves.
        top: in each group, only the `top` dimensions of the largest |mean (normalised) gradient| count, ties to the lower
            dimension; 1 <= top <= D. None takes all.
        groups: [B] integer labels; each label is its own problem over its own members.
        budgets: how many to take from each group: a dict label -> count, or counts [G] for the labels 0..G-1. Default:
            `allocate_budgets` of the groups' sizes and `k`.
        metric: "l1", "euclidean", "sqeuclidean", "cosine" or "dot", between rows, for "medoid".
        method: "medoid" takes the gradients that are nearest to all others, by facility location. The other methods make a weighted
            sum of few gradients that is near the sum of all: "omp" by orthogonal matching pursuit (as in GradMatch), "frank_wolfe" by greedy
            iterative geodesic ascent, "caratheodory" exactly, if the rank of the gradients less their mean is below k.
        nonnegative: whether the weights of "omp" must be >= 0.
        ridge: for "omp": a multiple of the sum of squares of the weights that is added to the squared distance, >= 0.
        backend: None, "cpu", "cuda", "triton" or "torch".

    Returns:
        Selection on the device of `g`: `indices` [k] group by group in label order, in each in the order of the picks;
        `weights` [k], the sizes of their clusters, `gains` and `assignment` [B] as in `facility_location`. Methods other than "medoid"
        may take fewer than k; their `weights` are those of the sum, `gains` 0, `assignment` -1, and `objective` is minus the
        distance that is left, summed over the groups.
        `dims` [groups with a budget, top] int64, the largest first (None without `top`, and if one shared direction makes all
        dimensions alike); `state`, of the kind of `normalize`, its step one higher, its means unchanged if nothing was taken.

    Raises:
        TypeError: for a wrong type or dtype, such as a history in another precision than the gradients'.
        ValueError: for a wrong shape, option, label or budget, a history of another D, NaN and infinity.
        BackendUnavailableError: if a `backend` was named that cannot run here.

    The sums of updates that decide which dimensions count, the rows and the distances are float64, whatever the dtype of `g`.

    With a `RankOneAdamState` and gradients along its one direction, every update is h(c) sign(z), c being the
    coefficient, and the history stays of this kind: numbers stand for rows if eps is small beside the square roots that it is
    added to (one part in a million); otherwise rows are made. Gradients along another direction make it an `AdamState`. A function
    given to torch.compile takes `AdamState` alone, to which `RankOneAdamState.dense` leads.

    Sources: Nguyen, Yang, Anand, Yang and Mirzasoleiman, "Mini-batch coresets for memory-efficient language model training on
    data mixtures" (CoLM), ICLR 2025, section 4; Killamsetty, Sivasubramanian, Ramakrishnan, De and Iyer, "GRAD-MATCH", ICML 2021;
    Campbell and Broderick, "Bayesian coreset construction via greedy iterative geodesic ascent", ICML 2018; Maalouf,
    Jubran and Feldman, "Fast and accurate least-mean-squares solvers", NeurIPS 2019.

    Example:
        >>> import torch, flashcoreset as fc
        >>> g = torch.tensor([[1.0, 0.0, 3.0], [1.1, 0.0, 3.0], [-2.0, 0.1, 3.0]])
        >>> found = fc.match_gradients(g, 2, top=2, normalize=fc.AdamState(torch.zeros(3), torch.ones(3), step=2))
        >>> found.indices, found.weights, found.dims, found.state.step
        (tensor([0, 2]), tensor([2., 1.]), tensor([[2, 0]]), 3)
    """
    problem, asked = _check(g, k, normalize, top, groups, budgets, metric, method, nonnegative, ridge)
    check_backend(backend)
    if is_traced(problem.g.values):
        if problem.method != "medoid" or (problem.top is not None and groups is not None):
            check_not_meta(problem.g.values, "g")
        return _call_op(problem, asked, backend)
    return match_members(problem, backend)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients, as rows or as coefficients of shared directions."""

    values: Tensor  # [B, D], or coefficients [B, q]
    seed: int = 0
    length: int | None = None  # the length of the directions
    backend: str | None = None  # the backend that makes the directions

    @classmethod
    def of(cls, g: Any, name: str) -> Gradients:
        if isinstance(g, LowRankGradients):
            return cls(g.coefficients.detach(), g.seed, g.numel, g.backend)
        return cls(as_matrix(g, name).detach())

    @property
    def count(self) -> int:
        return self.values.shape[0]

    @property
    def numel(self) -> int:
        return self.values.shape[1] if self.length is None else self.length

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the gradients are computed."""
        return compute_dtype(self.values.dtype)

    @property
    def source(self) -> dict[str, Any]:
        """The kernels' further arguments."""
        return {"seed": self.seed, "length": self.length}

    def columns(self, begin: int, end: int) -> Tensor:
        """The columns [B, end - begin], float32 or float64."""
        if self.length is None:
            return self.values[:, begin:end].to(self.dtype)
        shared = LowRankGradients(self.values, self.seed, self.length, self.backend)
        return self.values @ shared.directions(begin, end)


@dataclass(frozen=True, eq=False)
class Problem:
    """A matching problem: its arguments are checked, their values not yet."""

    g: Gradients
    history: AdamState | RankOneAdamState | None
    top: int | None
    members: list[tuple[Tensor, int]]  # for each group with a budget: its rows, ascending, and the budget
    metric: str = "l1"
    method: str = "medoid"
    nonnegative: bool = True
    ridge: float = 0.0


def _check(
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
    if not isinstance(nonnegative, bool):
        raise TypeError(
            f"nonnegative must be a bool, got {nonnegative!r} of type {type(nonnegative).__name__}"
        )
    ridge = as_number(ridge, "ridge")
    if ridge < 0:
        raise ValueError(f"ridge must be >= 0, got {ridge}")
    if method != "omp" and (not nonnegative or ridge):
        raise ValueError(
            f"nonnegative and ridge are for method 'omp', got {nonnegative} and {ridge} with {method!r}"
        )
    device = gradients.values.device
    asked = check_picks(gradients.count, k, groups, budgets, device)
    history = check_history(normalize, gradients, "normalize")
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


def check_history(history: Any, g: Gradients, name: str) -> AdamState | RankOneAdamState | None:
    if history is None:
        return None
    if not isinstance(history, (AdamState, RankOneAdamState)):
        raise TypeError(f"{name} must be an AdamState, got {type(history).__name__}")
    if history.numel != g.numel:
        raise ValueError(
            f"{name} must be of gradients of length {g.numel}, as these are, got one of length {history.numel}"
        )
    if isinstance(history, AdamState):
        if history.m.dtype != g.dtype:
            raise TypeError(f"{name} must have dtype {g.dtype} for these gradients, got {history.m.dtype}")
        if history.m.device != g.values.device:
            raise ValueError(
                f"{name} is on device {history.m.device}, but the gradients are on {g.values.device}; move one of them"
            )
    return history


def match_members(problem: Problem, backend: str | None) -> Selection:
    """Solves a checked problem."""
    g, history = problem.g, problem.history
    kernels = choose(backend, g.values.device)
    if g.length is not None:
        _check_rows(problem, "g.coefficients")
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
            dims, u = _top_updates(problem, dense, kernels)
            parts = _solve(problem, u.split([len(rows) for rows, _ in problem.members]), backend)
        elif problem.method == "medoid":
            parts = _medoids_of_all_dimensions(problem, dense, kernels, backend)
        else:
            try:
                parts = _solve(problem, _as_short_rows(problem, dense, kernels), backend)
            except ValueError as error:
                raise _explained(problem, dense, error) from None
    return _assemble(problem, parts, dims, lambda chosen: _advance(g, history, dense, chosen, kernels))


def _check_rows(problem: Problem, name: str) -> None:
    """Raises ValueError for NaN and infinity in rows that are matched."""
    values = problem.g.values
    try:
        return check_finite(values, name)
    except ValueError:
        ignored = torch.ones(len(values), dtype=torch.bool, device=values.device)
    for rows, _ in problem.members:
        ignored[rows] = False
    check_finite(values.masked_fill(ignored[:, None], 0), name)


def _explained(problem: Problem, history: AdamState | None, error: ValueError) -> ValueError:
    """The error for the arguments in place of a kernel's `error` for a block of dimensions, a sum or a group's rows: it names the first
    NaN or infinity; `error` itself if there is none."""
    try:
        if problem.g.length is None:
            _check_rows(problem, "g")
        if history is not None:
            check_moments(history.m, history.v)
    except ValueError as found:
        return found
    return error


def _of_g(error: ValueError) -> ValueError:
    """An error of `facility_location` about its x, reworded for g."""
    text = str(error)
    return ValueError("g" + text[1:]) if text.startswith("x") else error


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


def _rule(history: AdamState | None) -> Rule | None:
    return None if history is None else Rule.adam(history.step, history.betas, history.eps)


def _top_updates(problem: Problem, history: AdamState | None, kernels: Kernels) -> tuple[Tensor, Tensor]:
    g = problem.g
    assert problem.top is not None
    found: tuple[Tensor, Tensor] = kernels.top_updates(
        g.values,
        None if history is None else history.m,
        None if history is None else history.v,
        _rule(history),
        *_offsets(problem),
        problem.top,
        **g.source,
    )
    return found


def _offsets(problem: Problem) -> tuple[Tensor, Tensor]:
    """The groups' rows, one group after the other, and where each begins."""
    rows = [rows for rows, _ in problem.members]
    begins = list(accumulate((len(r) for r in rows), initial=0))
    return rows[0] if len(rows) == 1 else torch.cat(rows), torch.tensor(begins, device=rows[0].device)


def _sums_of_pairs(
    problem: Problem,
    history: AdamState | None,
    kernels: Kernels,
    metric: str,
    exponents: list[int] | None = None,
) -> list[Tensor]:
    """For each group the "l1", "sqeuclidean" or "dot" of its pairs, [members, members] float64, summed over blocks of dimensions; the
    updates of all members [R] are multiplied by 2^exponents."""
    sizes = [len(rows) for rows, _ in problem.members]
    sums = [problem.members[0][0].new_zeros(size, size, dtype=torch.float64) for size in sizes]
    for u in _blocks_of_updates(problem, history, kernels):
        for total, rows in zip(
            sums, (u if exponents is None else scale(u, exponents)).split(sizes), strict=True
        ):
            total += kernels.pairwise(rows, metric=metric)
    return sums


def _blocks_of_updates(problem: Problem, history: AdamState | None, kernels: Kernels) -> Iterator[Tensor]:
    """The updates of all members [R, some dimensions] float64, group after group."""
    g = problem.g
    member, offset = _offsets(problem)
    step = max(1, _BLOCK_BYTES // (8 * g.count))
    for begin in range(0, g.numel, step):
        part = g.columns(begin, min(begin + step, g.numel))
        m, v = None, None
        if history is not None:
            m, v = history.m[begin : begin + step], history.v[begin : begin + step]
        try:
            _, u = kernels.top_updates(part, m, v, _rule(history), member, offset, part.shape[1])
        except ValueError as error:
            raise _explained(problem, history, error) from None
        yield u


def _scaled_sums(
    problem: Problem, history: AdamState | None, kernels: Kernels, metric: str, each_row: bool = False
) -> tuple[list[Tensor], list[int]]:
    """The sums of pairs of each group, and the exponent of the power of two that the updates were multiplied by so that squares stay
    in the range of float64. `each_row`: every row by its own power, which does not change cosines."""
    sums = _sums_of_pairs(problem, history, kernels, metric)
    low, high = (2.0 ** (2 * end) for end in _SAFE)
    sizes = [len(total) for total in sums]
    for total in sums:
        judged = total.diagonal() if each_row else total.amax()
        if not bool(((judged >= low) & (judged <= high)).all()):
            break
    else:
        return sums, [0] * len(sums)
    most = torch.zeros(sum(sizes), dtype=torch.float64, device=sums[0].device)
    for u in _blocks_of_updates(problem, history, kernels):
        most = torch.maximum(most, u.abs().amax(1))
    by_row = [exponent_into(value, _SAFE) for value in most.tolist()]
    by_group = [exponent_into(float(part.max()), _SAFE) for part in most.split(sizes)]
    if not any(by_row if each_row else by_group):
        return sums, [0] * len(sums)
    if not each_row:
        by_row = [e for e, size in zip(by_group, sizes, strict=True) for _ in range(size)]
    return _sums_of_pairs(problem, history, kernels, metric, by_row), by_group


def _medoids_of_all_dimensions(
    problem: Problem, history: AdamState | None, kernels: Kernels, backend: str | None
) -> list[Selection]:
    metric = problem.metric
    summed = {"euclidean": "sqeuclidean", "cosine": "dot"}.get(metric, metric)
    parts = []
    sums, exponents = _scaled_sums(problem, history, kernels, summed, each_row=metric == "cosine")
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


def _as_short_rows(problem: Problem, history: AdamState | None, kernels: Kernels) -> Iterable[Tensor]:
    """For each group, rows with the inner products of its updates in all dimensions: weighted sums of these rows are as near to each
    other as those of the updates."""
    g = problem.g
    if history is None and g.length is None:
        # One group after the other; a group of all rows needs no copy.
        return (
            (g.values if len(rows) == g.count else g.values[rows]).to(g.dtype) for rows, _ in problem.members
        )
    if history is None:
        # c Z has the inner products of c F, where Z Z^T = F F^T.
        gram = g.values.new_zeros(g.values.shape[1], g.values.shape[1], dtype=torch.float64)
        shared = LowRankGradients(g.values, g.seed, g.numel, g.backend)
        step = max(1, _BLOCK_BYTES // (8 * len(gram)))
        for begin in range(0, g.numel, step):
            z = shared.directions(begin, min(begin + step, g.numel)).double()
            gram += z @ z.T
        factor = _factor(gram)
        return [g.values[rows].double() @ factor for rows, _ in problem.members]
    sums, exponents = _scaled_sums(problem, history, kernels, "dot")
    return [scale(_factor(total), -exponent) for total, exponent in zip(sums, exponents, strict=True)]


def _factor(gram: Tensor) -> Tensor:
    """A matrix F with F F^T = gram, which is positive semidefinite except for rounding."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def _solve(problem: Problem, updates: Iterable[Tensor], backend: str | None) -> list[Selection]:
    """Each group's selection by its updates [members, dimensions]."""
    groups, parts = iter(updates), []
    for _, count in problem.members:
        u = next(groups)
        if problem.method == "medoid":
            exponent = exponent_into(largest_magnitude(u), _SAFE)
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
    step = max(1, _BLOCK_BYTES // (8 * len(u)))
    target = torch.cat([part.sum(0, dtype=torch.float64) for part in u.split(step, 1)])
    most = largest_magnitude(target)
    if not math.isfinite(most):
        check_finite(u, "g")
        raise ValueError(f"g: the sum of its rows overflows {torch.float64}; scale the gradients down")
    # The results stay float64 until all groups are put together: an intermediate norm may leave the range of g's type.
    if problem.method == "omp":
        indices, weights, norms = solve_pursuit(u, target, count, problem.nonnegative, problem.ridge, backend)
    else:
        indices, weights, norms = solve_frank_wolfe(u, target, count, backend)
    if len(norms):
        # Rounded to the type of g, because backends may differ in further digits.
        left = float(norms[-1].to(compute_dtype(problem.g.dtype)))
        left = left if left < math.inf else float(norms[-1])
    else:
        exponent = exponent_into(most, _SAFE)
        left = times_power(float(scale(target, exponent).norm()), -exponent)
    used = weights.to(problem.g.dtype) != 0
    if not used.all():
        indices, weights = indices[used], weights[used]
    nowhere = torch.full((len(u),), -1, dtype=torch.int64, device=u.device)
    return Selection(indices, torch.zeros_like(weights), weights, nowhere, -left, None)


def _assemble(
    problem: Problem, parts: list[Selection], dims: Tensor | None, state_after: Callable[[Tensor], Any]
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
        return Selection(
            one.indices,
            one.gains.to(g.dtype),
            one.weights.to(g.dtype),
            one.assignment,
            one.objective,
            one.offset,
            dims,
            state_after(one.indices),
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
    history: AdamState | RankOneAdamState | None,
    dense: AdamState | RankOneAdamState | None,
    chosen: Tensor,
    kernels: Kernels,
) -> AdamState | RankOneAdamState | None:
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
    m, v = kernels.update_history(g.values, dense.m, dense.v, dense.betas, chosen, **g.source)
    return replace(dense, m=m, v=v, step=step)


@register_estimate("match_gradients")
def _estimate(
    g: Any,
    k: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    normalize: Any = None,
    top: int | None = None,
    groups: Any = None,
    budgets: Any = None,
    metric: str = "l1",
    method: str = "medoid",
    nonnegative: bool = True,
    ridge: float = 0.0,
    backend: str | None = None,
) -> int:
    """The bytes of one call; see `memory_estimate`. `g` may be `LowRankGradients`; labels in `groups` say how large the groups are,
    their shape alone stands for one group of all. A `RankOneAdamState` counts as the rows that may have to be made from it."""
    one_of(metric, "metric", METRICS)
    one_of(method, "method", METHODS)
    check_backend(backend)
    if isinstance(g, LowRankGradients):
        dtype, q, backend_of = g.coefficients.dtype, g.coefficients.shape[1], g.coefficients
        count, numel = len(g.coefficients), g.numel
    else:
        dtype, q, backend_of = as_dtype(dtype), 0, g
        count, numel = as_shape(g, "g")
    if backend is None:
        device = backend_of.device.type if isinstance(backend_of, Tensor) else "cpu"
        backend = DEFAULTS.get(device, ("torch",))[0]
    k = count if k is None else as_integer(k, "k")
    if not 1 <= k <= count:
        raise ValueError(f"k must be between 1 and {count}, the rows of g, got {k}")
    top = check_top(top, numel)
    if normalize is not None and not isinstance(normalize, (AdamState, RankOneAdamState)):
        raise TypeError(f"normalize must be an AdamState, got {type(normalize).__name__}")
    if normalize is not None and normalize.numel != numel:
        raise ValueError(
            f"normalize must be of gradients of length {numel}, got one of length {normalize.numel}"
        )
    sizes = _sizes_of_groups(groups, count)
    largest, threads, size = max(sizes), torch.get_num_threads(), compute_dtype(dtype).itemsize

    history = 0 if normalize is None else 2 * numel * size  # the history after the step
    if isinstance(normalize, RankOneAdamState):
        history *= 3  # and the history before the step, and what it is made from
    results = 72 * k + 32 * count
    width = min(numel, max(1, _BLOCK_BYTES // (8 * count))) if top is None else top
    updates = 8 * (count + len(sizes)) * width
    if backend == "torch":
        # A group's float64 rows and what their updates are made from, sums, and sorted positions.
        search = (4 * largest + 40) * 8 * min(numel, REFERENCE_BLOCK) + 64 * len(sizes) * width
        step = 40 * k * min(numel, REFERENCE_BLOCK)
    elif backend == "cpu":
        # Each thread's lists, twice as long as they have to be, its tile and directions.
        search = threads * (16 * (2 * len(sizes) + 2) * width + 40 * max(q, 1) * 1024 + 2**19)
        step = threads * (40 * max(q, 1) * 1024 + 2**18)
    else:
        chunk = min(numel, max(2**19 // len(sizes), width))
        search, step = 64 * len(sizes) * (width + chunk), 2**20

    def solved(columns: int, dtype: torch.dtype, picked: int) -> int:
        shape = (largest, columns)
        if method == "medoid":
            return memory_estimate(
                "facility_location", shape, k=picked, dtype=dtype, metric=metric, backend=backend
            )
        if method == "caratheodory":
            return memory_estimate("caratheodory", shape, max_size=picked, dtype=dtype, backend=backend)
        pursued = pursuit_bytes(largest, columns, picked, dtype, method == "omp", backend)
        return 16 * columns + max(_BLOCK_BYTES, pursued)

    picked = min(k, largest)
    if top is not None:
        return results + updates + max(search, solved(top, torch.float64, picked), step + history)
    pairs = 8 * sum(n * n for n in sizes)
    blocks = updates + search + 2 * count * width * size + q * width * size
    if method == "medoid":
        own = 8 * largest**2
        block = blocks + own + 8 * largest * width
        choice = 4 * own + memory_estimate(
            "facility_location",
            (largest, largest),
            k=picked,
            dtype=torch.float64,
            metric="precomputed",
            backend=backend,
        )
        return results + pairs + max(block, choice, step + history)
    if normalize is None and not q:
        copied = largest * numel * size if dtype.itemsize < size else 0
        copied += largest * numel * dtype.itemsize if len(sizes) > 1 else 0
        return results + copied + solved(numel, compute_dtype(dtype), picked)
    if normalize is None:
        directions = 3 * q * width * 8 + 24 * q * q
        return results + directions + 8 * count * q + solved(q, torch.float64, picked)
    # Eigenvectors of a group's products, and LAPACK's room for them.
    factor = 48 * largest**2
    block = max(blocks + 8 * largest**2 + 8 * largest * width, factor, solved(largest, torch.float64, picked))
    return results + 2 * pairs + max(block, step + history)


def _sizes_of_groups(groups: Any, count: int) -> list[int]:
    if groups is None or not isinstance(groups, (Tensor, np.ndarray, list)):
        if groups is not None and as_shape(groups, "groups", 1) != (count,):
            raise ValueError(f"groups must have shape [{count}], got {groups}")
        return [count]
    labels = as_vector(groups, "groups", torch.device("cpu"), integers=True, length=count)
    return labels.unique(return_counts=True)[1].tolist()


# The torch op, which torch.compile and fake tensors see.

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
    problem, _ = _check(
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


def _call_op(problem: Problem, asked: Asked, backend: str | None) -> Selection:
    g, history = problem.g, problem.history
    k, groups, labels, budgets = asked
    if isinstance(history, RankOneAdamState):
        raise TypeError(
            "normalize must be an AdamState in a function given to torch.compile, got RankOneAdamState; pass its dense()"
        )
    past_m, past_v, step, (beta1, beta2), eps = None, None, 1, (0.9, 0.999), 1e-8
    if history is not None:
        past_m, past_v, step, (beta1, beta2), eps = (
            history.m,
            history.v,
            history.step,
            history.betas,
            history.eps,
        )
    call = _Call(
        g.values, g.length, g.seed, g.backend, k, past_m, past_v, step, beta1, beta2, eps, problem.top, groups, labels, budgets, problem.metric, problem.method,
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
