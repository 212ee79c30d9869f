"""Groups: each is a problem of its own, or with clients for all of them their picks serve together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.results import Selection
from flashcoreset._core.tensor import Csr, check_finite
from flashcoreset.facility_location.backend import Kernels
from flashcoreset.facility_location.problem import Problem


def solve_groups(
    kernels: Kernels,
    problem: Problem,
    members: list[tuple[Tensor, int]],
    offset: float | None,
    solve_one: Callable[[Tensor, Problem, int, int], Selection],
    rounds: int,
) -> Selection:
    """The picks of all groups, one group after the other.

    Args:
        kernels: the backend.
        problem: the problem that has all candidates.
        members: each group's candidates, and how many of them to pick.
        offset: the one that distances are meant to be subtracted from.
        solve_one: solves one problem, given its candidates among all, its number of picks, and the number of those made before.
        rounds: how many rounds each group may have.
    """
    x, clients = problem.x, problem.clients
    # Checked here, since a group's kernel would name the row within its group.
    check_finite(x.values if isinstance(x, Csr) else x, "x")
    n, m = problem.shape
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    assignment = torch.full((m,), -1, dtype=torch.int64, device=x.device)
    objective, done = 0.0, 0
    numbers: list[Tensor] = []  # the round of each pick
    served_by: list[
        tuple[Tensor, Tensor]
    ] = []  # of each group: its members, and which pick serves them in each round
    is_preselected = torch.zeros(n, dtype=torch.bool, device=x.device)
    if problem.preselected is not None:
        is_preselected[problem.preselected] = True
    for rows, count in members:
        chosen = is_preselected[rows].nonzero()[:, 0]
        if count == 0 and (chosen.shape[0] == 0 or clients is not None):
            continue
        weights = problem.weights
        group = replace(
            problem,
            x=_part(x, rows, square=problem.metric == "precomputed"),
            weights=weights[rows] if clients is None and weights is not None else weights,
            preselected=chosen if chosen.shape[0] else None,
            expected_picks=count,
        )
        found = solve_one(rows, group, count, done)
        parts.append((rows[found.indices], found.gains, found.weights))
        if clients is None:
            assignment[rows] = torch.where(found.assignment >= 0, found.assignment + done, -1)
            objective += found.objective
            if found.served_by is not None:
                served_by.append((rows, torch.where(found.served_by >= 0, found.served_by + done, -1)))
        if found.rounds is not None:
            numbers.append(found.rounds)
        done += found.indices.shape[0]
    indices, gains, won = (torch.cat(column) for column in zip(*parts, strict=True))
    if clients is not None:
        won, assignment, objective = _serve(kernels, problem, indices, offset)
    if rounds == 1:
        return Selection(indices, gains, won, assignment, objective, offset)
    number = torch.cat(numbers)
    if clients is None:
        served = torch.full(
            (max(part.shape[0] for _, part in served_by), m), -1, dtype=torch.int64, device=x.device
        )
        for rows, part in served_by:
            served[: part.shape[0], rows] = part
    else:
        won, served = _serve_in_rounds(kernels, problem, indices, number, offset)
    return Selection(indices, gains, won, served[0], objective, offset, rounds=number, served_by=served)


def _part(x: Tensor | Csr, rows: Tensor, square: bool) -> Tensor | Csr:
    if isinstance(x, Csr):
        return x.square_part(rows)
    return x[rows[:, None], rows] if square else x[rows]


def _serve_in_rounds(
    kernels: Kernels, problem: Problem, indices: Tensor, number: Tensor, offset: float | None
) -> tuple[Tensor, Tensor]:
    """Weights of the picks of all groups together, and which pick serves each client in each round; `number` [k] is the round of each
    pick."""
    won = torch.zeros(len(indices), dtype=problem.x.dtype, device=indices.device)
    served = []
    for place in range(int(number.max()) + 1 if len(number) else 1):
        own = (number == place).nonzero()[:, 0]
        weights, assignment, _ = _serve(kernels, problem, indices[own], offset)
        won[own] = weights
        served.append(own[assignment].where(assignment >= 0, -1) if len(own) else assignment)
        problem = replace(problem, preselected=None)
    return won, torch.stack(served)


def _serve(
    kernels: Kernels, problem: Problem, indices: Tensor, offset: float | None
) -> tuple[Tensor, Tensor, float]:
    """Weights, assignment and f(S) of the picks of all groups together, over clients that are not the
    candidates."""
    x, clients, metric = problem.x, problem.clients, problem.metric
    assert isinstance(x, Tensor)
    assert clients is not None
    sign = -1 if metric in DISTANCES else 1
    floor = torch.tensor(0.0 if offset is None else -offset, dtype=x.dtype, device=x.device)
    picks = x[indices]
    fixed = None if problem.preselected is None else x[problem.preselected]
    k, m = len(indices), clients.shape[0]
    position = torch.arange(k, device=x.device)[:, None]
    assignment = torch.full((m,), -1, dtype=torch.int64, device=x.device)
    best = torch.empty(m, dtype=x.dtype, device=x.device)
    block = max(1, min(problem.memory_budget, 1 << 24) // (x.element_size() * (k + x.shape[1])))
    for begin in range(0, m, block):
        some = clients[begin : begin + block]
        covered = floor
        if fixed is not None:
            covered = torch.maximum(floor, (sign * kernels.pairwise(fixed, some, metric=metric)).amax(0))
        most = covered
        if k:
            s = sign * kernels.pairwise(picks, some, metric=metric)
            most = s.amax(0)
            first = torch.where(s == most, position, k).amin(0)  # argmax does not promise the first
            assignment[begin : begin + block] = torch.where(most > covered, first, -1)
        best[begin : begin + block] = torch.maximum(most, covered)
    # Summed on the CPU, where the order of summation is fixed.
    weights = torch.ones(m, dtype=torch.float64) if problem.weights is None else problem.weights.cpu()
    owner = assignment.cpu()
    won = torch.bincount(owner[owner >= 0], weights[owner >= 0], minlength=k)
    try:
        objective = math.fsum((weights * (best.double() - floor.double()).cpu()).tolist())
    except OverflowError:
        objective = math.inf
    return won.to(x.device, x.dtype), assignment, objective
