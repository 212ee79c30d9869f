"""Partition greedy (GreeDi) and the bounding before it: fewer candidates for the last stage, which is exact.

bounding: with S the items that were taken already, T those that are left,

    most(j)  = f(S + j) - f(S)                what j brings at the most
    least(j) = f(S + T) - f(S + T - j)        what j brings at the least

If at least k items have a `least` above most(j), some best set does without j: exchanging j for one of them raises f. If at most k - 1
items have a `most` above least(j), every best set has j. Both hold for any monotone submodular f (Böther et al. 2025 state them for
pairwise ones). f is taken over a sample of clients, so that they are estimates unless the sample is everybody.

Source: Mirzasoleiman, Karbasi, Sarkar and Krause 2016; Böther et al. 2025; see `facility_location`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.philox import uniforms
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.greedy import Candidates, Greedy, SharedRows
from flashcoreset.distributed.sources import Source
from flashcoreset.distributed.sums import ordered_sum

_MOST_ROUNDS = 10


def drawn(total: int, size: int, seed: int) -> Tensor:
    """About `size` of `total` places, ascending; all of them if there are no more."""
    if size >= total:
        return torch.arange(total)
    # A few come twice, and count once.
    return torch.from_numpy(np.unique((np.asarray(uniforms(seed, 0, size)) * total).astype(np.int64)))


class Sample:
    """Clients drawn from all ranks, the same on every rank: similarities of this rank's candidates to them.

    Args:
        comm: the ranks.
        clients: [m here, d].
        weights: [m here] or None.
        size: how many; all of them if there are no more.
        seed: of the draw.
    """

    def __init__(
        self, comm: Communicator, clients: Tensor, weights: Tensor | None, size: int, seed: int
    ) -> None:
        counts = comm.gather(torch.tensor([len(clients)]))[:, 0].tolist()
        total, first = sum(counts), sum(counts[: comm.rank])
        chosen = drawn(total, size, seed)
        places = chosen[(chosen >= first) & (chosen < first + len(clients))] - first
        self.points = torch.cat(comm.gather_rows(clients[places.to(clients.device)]))
        own = torch.ones(len(places), dtype=torch.float64) if weights is None else weights.cpu()[places]
        self.weights = torch.cat(comm.gather_rows(own))
        self.total = total


def bounded(
    comm: Communicator,
    similarities: Callable[[Tensor], Tensor],
    weights: Tensor,
    floor: float,
    is_open: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Discards candidates, and takes some.

    Args:
        comm: the ranks.
        similarities: of some of this rank's candidates (their places [r]) to the sample, [r, c].
        weights: [c] of the sample.
        floor: where similarities begin to count.
        is_open: [n here] bool, the candidates.
        k: how many will be picked.

    Returns:
        The places [a] and [b] int64 of the candidates that are left and of those that were taken, of this rank; and how many
        were discarded and taken on all ranks.
    """
    alive, taken = is_open.nonzero()[:, 0], torch.empty(0, dtype=torch.int64)
    c = len(weights)
    best = torch.full((c,), floor, dtype=torch.float64)
    before = int(comm.sum(torch.tensor([len(alive)]))[0])
    grown = 0
    for _ in range(_MOST_ROUNDS):
        if grown >= k:
            break
        most = torch.zeros(len(alive), dtype=torch.float64)
        top = torch.full((2, c), floor, dtype=torch.float64)  # the two largest similarities of this rank
        which = torch.full((c,), -1, dtype=torch.int64)  # whose the largest is
        step = max(1, (1 << 22) // max(1, c))
        for begin in range(0, len(alive), step):
            s = similarities(alive[begin : begin + step]).double().cpu()
            most[begin : begin + step] = ((s - best).clamp_min_(0) * weights).sum(1)
            first = s.max(0)
            second = s.topk(2, dim=0).values[1] if len(s) > 1 else torch.full_like(first.values, floor)
            which = torch.where(first.values > top[0], first.indices + begin, which)
            top = torch.cat([top, first.values[None], second[None]]).topk(2, dim=0).values
        least = _least_gains(comm, top, which, best, weights, len(alive))
        wanted = k - grown
        need, reach = _kth(comm, least, wanted), _kth(comm, most, wanted)
        discard = most < need
        grow = least > reach
        counts = comm.sum(torch.tensor([int(discard.sum()), int(grow.sum())])).tolist()
        if counts == [0, 0]:
            break
        grown += counts[1]
        new = alive[grow]
        if counts[1]:
            covered = similarities(new).double().cpu().amax(0) if len(new) else torch.full_like(best, floor)
            best = torch.maximum(best, comm.maximum(covered))
        taken = torch.cat([taken, new])
        alive = alive[~(discard | grow)]
    left = int(comm.sum(torch.tensor([len(alive)]))[0])
    return alive, taken, {"discarded": before - left - grown, "grown": grown}


def _least_gains(
    comm: Communicator, top: Tensor, which: Tensor, best: Tensor, weights: Tensor, count: int
) -> Tensor:
    """[count] what each of this rank's candidates brings beside all others."""
    everyone = comm.gather(top)  # [world, 2, c]
    two = everyone.flatten(0, 1).topk(min(2, 2 * comm.world), dim=0).values
    mine = (top[0] == two[0]) & (which >= 0)
    gap = (two[0] - torch.maximum(two[1], best)).clamp_min_(0) * weights
    return torch.zeros(count, dtype=torch.float64).index_add_(0, which[mine], gap[mine])


def _kth(comm: Communicator, values: Tensor, k: int) -> float:
    """The k-th largest of all ranks' values; -inf if there are fewer."""
    largest = values.topk(min(k, len(values))).values
    together = torch.cat(comm.gather_rows(largest))
    return float(together.topk(k).values[-1]) if len(together) >= k else float("-inf")


def best_shard(
    comm: Communicator,
    merged: Greedy,
    source: Source,
    local: Tensor,
    weights: Tensor | None,
    candidates: Candidates,
    preselected: list[int],
    sums: Any,
) -> int | None:
    """The rank whose own picks have a larger f over all clients than the merged ones; None if there is none."""

    def value(best: Tensor) -> float:
        terms = (best.double() - merged.floor.double()).cpu().numpy()
        return ordered_sum(sums, terms if weights is None else weights.cpu().numpy() * terms)

    shared = SharedRows(comm, source, candidates)
    start = merged.floor.expand(source.clients).clone()
    for begin in range(0, len(preselected), 256):
        for some, s in shared.similarities(shared.fetch(preselected[begin : begin + 256])):
            start[some] = torch.maximum(start[some], s.amax(0))
    picks = [part.tolist() for part in comm.gather_rows(torch.from_numpy(candidates.numbers)[local])]
    reached, winner = value(merged.best), None
    for rank, own in enumerate(picks):
        if len(own) < len(merged.picks):
            continue
        best = start.clone()
        for begin in range(0, len(own), 256):
            for some, s in shared.similarities(shared.fetch(own[begin : begin + 256])):
                best[some] = torch.maximum(best[some], s.amax(0))
        if (alone := value(best)) > reached:
            reached, winner = alone, rank
    return winner
