"""Finds picks whose gains were lost beside far larger similarities: gains are whole numbers of a unit that the similarities set."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.tensor import Csr
from flashcoreset.facility_location.backend import Kernels
from flashcoreset.facility_location.problem import Problem

# A sum over m clients loses at most m units of 2^-60 of the bound of all sums; gains above 2^10 times that loss are right to 0.1 %.
SAFE_UNITS = 2.0**-50
# Distances below this share of the points themselves, and gains below this share of the similarities, may be their rounding.
_ROUNDING = 2.0**-16
_BLOCK = 2**19  # similarities that are checked together
_PICKS = 64  # rows of similarities that are checked together


def check_gains(
    kernels: Kernels, problem: Problem, offset: float, indices: Tensor, gains: Tensor, stochastic: bool
) -> None:
    """Sums gains again, pick by pick in float64, if some are so small that their sums may have lost them.

    Args:
        kernels: the backend that solved the problem.
        problem: the problem.
        offset: what distances were subtracted from; 0 for similarities.
        indices, gains: [k] the picks that were found, and their gains.
        stochastic: whether only some candidates were evaluated for each pick.

    Raises:
        ValueError: if a pick is worth more than its reported gain, or a client still misses more than the worst pick brought.
    """
    weights, preselected, metric = problem.weights, problem.preselected, problem.metric
    if len(gains) < (2 if preselected is None else 1) or (metric == "cosine" and weights is None):
        return
    x, m = problem.x, problem.shape[1]
    # A first pick among all candidates is worth at least what the largest similarity is.
    known = preselected is None and not stochastic and metric != "cosine" and not offset
    bound = float(gains[0]) if known else _bound(problem, offset)
    limit, least = m * bound * SAFE_UNITS, float(gains.min())
    if least >= limit:
        return
    before = 0 if preselected is None else len(preselected)
    order = indices if preselected is None else torch.cat([preselected, indices])
    worth = torch.zeros(len(order), dtype=torch.float64, device=x.device)
    missed = 0.0
    # The rows of a sparse matrix are made dense one at a time.
    step = 1 if isinstance(x, Csr) else min(_PICKS, len(order))
    columns = m if isinstance(x, Csr) else max(1, _BLOCK // step)
    for begin in range(0, m, columns):
        some = slice(begin, min(begin + columns, m))
        w = (
            torch.ones((), dtype=torch.float64, device=x.device)
            if weights is None
            else weights[some].double()
        )
        best = torch.full((some.stop - begin,), -offset, dtype=torch.float64, device=x.device)
        least_told = least_told_of(problem, some)
        for first in range(0, len(order), step):
            rows = order[first : first + step]
            s = _similarities(kernels, problem, rows, some)
            bests = torch.cat([best[None], s]).cummax(0).values
            worth[first : first + len(rows)] += (told(s, bests[:-1], least_told) * w).sum(1)
            best = bests[-1]
        if problem.is_square and not stochastic:
            more = told(own_similarities(problem, some), best, least_told) * w
            missed = max(missed, float(more.max()))
    worth = worth[before:]
    refuse_lost(problem, offset, worth, gains, missed, limit, bound)


def refuse_lost(
    problem: Problem, offset: float, worth: Tensor, gains: Tensor, missed: float, limit: float, bound: float
) -> None:
    """Raises ValueError if a pick is worth more than its gain, or a client still misses more than the worst pick brought.

    Args:
        problem: whose picks they are.
        offset: what distances were subtracted from; 0 for similarities.
        worth: [k] float64, what the picks are worth, summed again.
        gains: [k] as they were reported.
        missed: the most that a client which is a candidate still misses.
        limit: gains below it may have been lost.
        bound: of all sums of weights times similarities.
    """
    lost = (worth > 1.02 * gains.double()) & (gains < limit)
    most = max(
        float(worth[lost].max()) if lost.any() else 0.0, missed if missed > 2 * float(gains.min()) else 0.0
    )
    if most:
        what, how = ("distances", "farther away") if offset else ("similarities", "longer")
        if problem.metric == "precomputed" and not offset:
            how = "larger"
        remedy = f"leave out rows that are so much {how} than the others"
        if problem.weights is not None:
            remedy += ", or bring the weights nearer to each other"
        raise ValueError(
            f"x: gains of {most:.3g} are lost beside {what} whose sum is up to {bound:.3g}, so that picks would be arbitrary; {remedy}"
        )


def _bound(problem: Problem, offset: float) -> float:
    """An upper bound of all sums of weights times similarities."""
    x, total = problem.x, problem.total_weight
    if offset:
        return offset * total
    if problem.metric == "cosine":
        return total
    if isinstance(x, Csr):
        return total * max(0.0, float(x.values.max())) if len(x.values) else 0.0
    if problem.metric == "precomputed":
        return total * max(0.0, float(x.max()))
    longest = [
        float(torch.linalg.vector_norm(some, dim=1, dtype=torch.float64).max())
        for some in (x, x if problem.clients is None else problem.clients)
    ]
    return total * longest[0] * longest[1]


def _similarities(kernels: Kernels, problem: Problem, rows: Tensor, some: slice) -> Tensor:
    """The similarities [rows, clients] float64 of `some` of the clients."""
    x, metric = problem.x, problem.metric
    if isinstance(x, Csr):
        part = slice(int(x.crow[rows[0]]), int(x.crow[rows[0] + 1]))
        s = x.values.new_zeros(1, x.shape[1], dtype=torch.float64)
        s[0, x.col[part]] = x.values[part].double()
        return s
    if metric == "precomputed":
        return x[rows, some].double()
    values = kernels.pairwise(
        x[rows], (x if problem.clients is None else problem.clients)[some], metric=metric
    ).double()
    return values if metric in ("cosine", "dot") else -values


def own_similarities(problem: Problem, some: slice) -> Tensor:
    """Each client's similarity with itself."""
    x, metric = problem.x, problem.metric
    if isinstance(x, Csr):
        rows = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), x.crow.diff())
        s = x.values.new_zeros(x.shape[1], dtype=torch.float64)
        same = rows == x.col
        s[rows[same]] = x.values[same].double()
        return s
    if metric == "precomputed":
        return x.diagonal()[some].double()
    if metric == "cosine":
        return x[some].any(1).double()
    if metric == "dot":
        return x[some].double().square().sum(1)
    return torch.zeros(some.stop - some.start, dtype=torch.float64, device=x.device)


def least_told_of(problem: Problem, some: slice) -> Tensor | None:
    """For each client the distance above which distances are more than rounding of the points; None for similarities."""
    x, metric = problem.x, problem.metric
    if isinstance(x, Csr) or metric in ("cosine", "dot", "precomputed"):
        return None
    size = _ROUNDING * (x if problem.clients is None else problem.clients)[some].abs().amax(1).double()
    return size.square() if metric == "sqeuclidean" else size


def told(s: Tensor, best: Tensor, least: Tensor | None) -> Tensor:
    """The difference by which s is above the best so far; 0 if that may be a rounding error."""
    more = s - best
    told = more > _ROUNDING * torch.maximum(best.abs(), s.abs()) if least is None else -best > least
    return torch.where(told & (more > 0), more, 0)
