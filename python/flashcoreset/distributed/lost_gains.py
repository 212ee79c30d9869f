"""Whether gains are so small beside what they are counted in that the picks would be arbitrary: the check of
facility_location/lost_gains.py, over all ranks' clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.greedy import Greedy
from flashcoreset.facility_location.lost_gains import SAFE_UNITS, least_told_of, refuse_lost, told
from flashcoreset.facility_location.problem import Problem

_PICKS = 64  # rows of similarities that are checked together


def check_gains(
    comm: Communicator,
    sums: Communicator,
    run: Greedy,
    problem: Problem,
    preselected: list[int],
    gains: Tensor,
    own: Callable[[], Tensor] | None,
    approximate: bool,
) -> None:
    """Sums gains again in float64, if some are so small that their sums may have lost them.

    Args:
        comm: the ranks.
        sums: those over which sums over clients go.
        run: the greedy run.
        problem: the clients that are evaluated here, as points or similarities, with their weights and the offset.
        preselected: numbers of candidates.
        gains: [k].
        own: gives each client's similarity with itself [m here]; None if the clients are no candidates.
        approximate: whether only some candidates were evaluated.

    Raises:
        ValueError: if a pick is worth more than its gain, or a client still misses more than the worst pick brought.
    """
    weights, metric, offset = problem.weights, problem.metric, float(problem.offset or 0.0)
    if len(gains) < (1 if preselected else 2) or (metric == "cosine" and weights is None):
        return
    m = run.best.shape[0]
    clients = int(sums.sum(torch.tensor([m]))[0])
    w = torch.ones(m, dtype=torch.float64, device=gains.device) if weights is None else weights
    if not preselected and metric != "cosine" and not offset and not approximate:
        bound = float(gains[0])
    else:
        bound = float(sums.sum_floats(w.sum()[None].cpu())[0]) * _largest(comm, run, problem, offset)
    limit, least = clients * bound * SAFE_UNITS, float(gains.min())
    if least >= limit:
        return
    order = preselected + run.picks
    worth = torch.zeros(len(order), dtype=torch.float64, device=gains.device)
    best = torch.full((m,), -offset, dtype=torch.float64, device=gains.device)
    for first in range(0, len(order), _PICKS):
        rows = run.shared.fetch(order[first : first + _PICKS])
        for some, values in run.shared.similarities(rows):
            bests = torch.cat([best[None, some], values.double()]).cummax(0).values
            more = told(values.double(), bests[:-1], least_told_of(problem, some))
            worth[first : first + len(rows)] += (more * w[some]).sum(1)
            best[some] = bests[-1]
    worth = sums.sum_floats(worth)[len(preselected) :]
    missed = 0.0
    if own is not None and not approximate:
        more = told(own(), best, least_told_of(problem, slice(0, m))) * w
        missed = float(more.max()) if m else 0.0
    missed = comm.most(missed)
    refuse_lost(problem, offset, worth, gains, missed, limit, bound)


def _largest(comm: Communicator, run: Greedy, problem: Problem, offset: float) -> float:
    """A bound of all similarities above the floor."""
    x: Any = problem.x
    if offset:
        return offset
    if problem.metric == "cosine":
        return 1.0
    if problem.metric == "precomputed":
        return comm.most(max(0.0, float(x.max())) if x.numel() else 0.0)
    longest = [
        comm.most(
            float(torch.linalg.vector_norm(some, dim=1, dtype=torch.float64).max()) if len(some) else 0.0
        )
        for some in (x, x if problem.clients is None else problem.clients)
    ]
    return longest[0] * longest[1]
