"""Facility location from a sample of clients, with the objective measured over all rows at the end.

For a set S that does not depend on the sample, the sample's mean similarity is within `sample_error` R of the mean over all clients
at the stated confidence, where R bounds a similarity above its floor: ln(2 / (1 - confidence)) / (2 sample_error^2) clients, drawn with
replacement in proportion to their weights (Hoeffding 1963). The best set is such an S. So with f' the sample's objective, W the sum of the
weights, and S' the greedy picks of the sample,

    f'(S') >= (1 - 1/e) f'(best) >= (1 - 1/e) (f(best) - sample_error R W)

The picks themselves fit the sample better than other clients, which is why f(S') is measured over all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.philox import uniforms
from flashcoreset._core.progress import Progress
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.greedy import Candidates, Greedy, SharedRows
from flashcoreset.distributed.problem import Call, OneRank, ShardedSelection, scale_of, traffic
from flashcoreset.distributed.sources import Points
from flashcoreset.distributed.sums import ordered_counts, ordered_sum, row_norms
from flashcoreset.facility_location import facility_location as on_one_machine

_PER_PICK = 10  # clients drawn for each pick at the least
_BLOCK_BYTES = 2**24


def sample_size(k: int, sample_error: float, confidence: float) -> int:
    """How many clients are drawn.

    Example:
        >>> from flashcoreset.distributed.sampled import sample_size
        >>> sample_size(100, 0.02, 0.99)
        6623
    """
    hoeffding = math.log(2 / (1 - confidence)) / (2 * sample_error**2)
    return max(_PER_PICK * k, math.ceil(hoeffding - 1e-6))


def draw_clients(
    comm: Communicator, x: Tensor, weights: Tensor | None, size: int, seed: int
) -> tuple[Tensor, Tensor, float]:
    """`size` rows of all ranks, drawn with replacement in proportion to their weights, each once with the weight of all its draws.

    Returns:
        The rows [c, d] and weights [c] float64, the same on every rank, and the sum of all weights.
    """
    ends = np.cumsum(np.ones(len(x)) if weights is None else weights.cpu().numpy())
    sums = comm.gather(torch.tensor([ends[-1] if len(ends) else 0.0], dtype=torch.float64))[:, 0].tolist()
    total, before = math.fsum(sums), math.fsum(sums[: comm.rank])
    if not total > 0:
        raise ValueError("weights must not all be 0 with clients='sample'")
    drawn = np.asarray(uniforms(seed, 0, size)) * total - before
    drawn = drawn[(drawn >= 0) & (drawn < sums[comm.rank])]
    places, counts = np.unique(np.searchsorted(ends, drawn, side="right"), return_counts=True)
    rows = torch.cat(comm.gather_rows(x[torch.from_numpy(places).to(x.device)]))
    own = torch.from_numpy(counts.astype(np.float64) * (total / size))
    return rows, torch.cat(comm.gather_rows(own)), total


def from_sample(call: Call, exactly: Callable[[Call], ShardedSelection]) -> ShardedSelection:
    """The picks of a sample of clients; `exactly` chooses from all of them where these are no more."""
    comm, x, metric = call.comm, call.x, call.metric
    size = sample_size(call.k, call.sample_error, call.confidence)
    if size >= call.total:
        # Everybody is no more than the sample would be.
        found = exactly(call)
        found.info.update(sample=call.total, sample_objective=found.objective, error=0.0, confidence=1.0)
        return found
    sample, sample_weights, total = draw_clients(comm, x, call.weights, size, call.seed)
    if metric == "cosine":
        largest = 1.0
    elif metric == "dot":
        largest = comm.most(float(row_norms(x).max()) if len(x) else 0.0) ** 2
    else:
        largest = call.near
    own = OneRank()
    candidates = Candidates(call.starts, comm.rank, torch.arange(len(x)) + call.first)
    if comm.world == 1:
        options: dict[str, Any] = {"offset": call.near} if metric in DISTANCES else {}
        chosen = on_one_machine(
            x, call.k, clients=sample, weights=sample_weights, metric=metric, backend=call.backend, progress=call.progress,
            preselected=call.preselected or None, memory_budget=call.memory_budget, **options,
        )  # fmt: skip
        numbers, gains, value = chosen.indices.tolist(), chosen.gains, chosen.objective
        spent: list[tuple[int, int]] = [(0, 0)] * call.k
        evaluated: dict[str, int] = {}
    else:
        scale = scale_of(call, own, x, sample, sample_weights)
        run = Greedy(
            comm, Points(call.kernels, x, sample, metric, replicated=True), candidates, sample_weights, scale, call.floor,
            call.preselected, call.memory_budget,
        )  # fmt: skip
        with Progress(call.progress if comm.rank == 0 else None, call.k, "facility location") as bar:
            run.step(call.k, bar)
        numbers, spent, evaluated = run.picks, run.per_pick, {"evaluations": run.evaluations}
        gains = torch.tensor([g / scale for g in run.gains], dtype=torch.float64).to(x.device, x.dtype)
        best = (run.best.double() - run.floor.double()).cpu().numpy()
        value = ordered_sum(own, sample_weights.numpy() * best)
    used = comm.bytes, comm.collectives
    won, assignment, objective = measured(call, candidates, numbers)
    info = {"shards": call.shards, **traffic(comm, spent, used), **evaluated}
    info |= {"sample": size, "sample_objective": value, "error": call.sample_error * largest * total}
    info["confidence"] = call.confidence
    indices = torch.tensor(numbers, dtype=torch.int64, device=x.device)
    return ShardedSelection(indices, gains, won, assignment, objective, call.offset, info=info)


def measured(call: Call, candidates: Candidates, numbers: list[int]) -> tuple[Tensor, Tensor, float]:
    """Weights, assignment and f(S) of the picks over all rows, which are read once."""
    comm, x, metric = call.comm, call.x, call.metric
    n, k = len(x), len(numbers)
    shared = SharedRows(comm, Points(call.kernels, x, x, metric), candidates)
    rows = torch.cat([shared.fetch(numbers[begin : begin + 256]) for begin in range(0, k, 256)])
    fixed = shared.fetch(call.preselected) if call.preselected else None
    floor = torch.tensor(call.floor, dtype=x.dtype, device=x.device)
    best = floor.expand(n).clone()
    owner = torch.full((n,), -1, dtype=torch.int64, device=x.device)
    covered = None if fixed is None else best.clone()
    step = max(1, _BLOCK_BYTES // (x.element_size() * max(k, len(call.preselected), x.shape[1])))
    positions = torch.arange(k, device=x.device)[:, None]
    for begin in range(0, n, step):
        some = slice(begin, min(begin + step, n))
        if fixed is not None and covered is not None:
            covered[some] = torch.maximum(floor, shared.source.similarities(fixed, some).amax(0))
            best[some] = covered[some]
        s = shared.source.similarities(rows, some)
        top = s.amax(0)
        better = top > best[some]
        first = torch.where(s == top, positions, k).amin(0)
        owner[some] = torch.where(better, first, -1)
        best[some] = torch.where(better, top, best[some])
    for position, j in enumerate(numbers):
        if candidates.is_here(j):
            place = j - call.first
            itself = shared.source.similarities(rows[position : position + 1], slice(place, place + 1))[0, 0]
            if covered is None or not covered[place] > itself:
                owner[place] = position
    won = ordered_counts(comm, owner, call.weights, k).to(x.device, x.dtype)
    terms = (best.double() - floor.double()).cpu().numpy()
    objective = ordered_sum(comm, terms if call.weights is None else call.weights.cpu().numpy() * terms)
    return won, owner, objective
