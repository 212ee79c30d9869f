"""What a distributed choice was asked for, and what it returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.labels import as_labels
from flashcoreset._core.progress import Report
from flashcoreset._core.results import Selection
from flashcoreset.distributed.checkpoint import Checkpoint
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.sums import ordered_sum, row_norms
from flashcoreset.facility_location.backend import Kernels
from flashcoreset.facility_location.problem import Request


@dataclass(frozen=True, eq=False)
class ShardedSelection(Selection):
    """A choice from data that is spread over ranks: `flashcoreset.Selection`, the same on every rank except for `assignment`.

    Attributes:
        indices: [k] int64, global: rank 0's rows come first, then those of rank 1, and so on.
        assignment: [m of this rank] int64, for each of this rank's clients the position of the pick that serves it, or -1.
        info: what the call took: "bytes" and "collectives" that this rank's collectives brought and counted in all, "first_bytes"
            and "first_collectives" outside of the picks, before the first one above all, "pick_bytes" and "pick_collectives" ([k] for each pick), "evaluations" (of
            candidates, over this rank's clients; with clients="sample" of this rank's candidates), "shards" (the rows of each rank). With exact=False also "candidates" (that were
            left for the last stage) and "bounding" ("discarded", "grown"); with clients="sample" "sample" (its size),
            "sample_objective", "error" and "confidence".

    Example:
        >>> import torch, flashcoreset as fc
        >>> fc.distributed.facility_location(torch.eye(3), 2).indices
        tensor([0, 1])
    """

    info: dict[str, Any] = field(default_factory=dict)


def shard_labels(groups: Any, n: int, name: str = "groups") -> list[Any]:
    """The labels of one rank's `n` items, which may be none: integers, strings, or any values that can be sorted; from the argument
    `name`."""
    moved = groups.cpu() if isinstance(groups, Tensor) else groups
    if n == 0 and getattr(moved, "shape", None) == (0,):
        return []  # of any type: other ranks have the labels, and know their kind
    return as_labels(moved, name, torch.device("cpu"), n).per_item()


@dataclass(eq=False)
class Call:
    """What was asked for, checked, with the numbers that the ranks have told each other."""

    comm: Communicator
    kernels: Kernels
    x: Tensor  # [n here, d] in the computing type
    clients: Tensor | None  # [m here, d]
    metric: str  # never "precomputed_distance"
    weights: Tensor | None  # [m here]
    starts: list[int]  # [world + 1] of rows
    k: int
    groups: Tensor | None  # [n here] places among the sorted labels, if each group is a problem of its own
    budgets: list[int]  # [labels]
    preselected: list[int]
    preselected_of: list[list[int]]  # [labels]
    near: float  # the offset of the arithmetic; 0 for similarities
    offset: float | None  # the one that is told
    exact: bool
    bounding: bool
    sampled: bool
    sample_error: float
    confidence: float
    seed: int
    progress: Report | bool | None
    memory_budget: int
    backend: str | None
    total_clients: int
    single: dict[str, Any]  # the options for one machine
    request: (
        Request  # what rules candidates out or ends the picks; its costs and groups are of this rank's rows
    )
    excluded: Tensor | None = None  # [n here] bool
    checkpoint: Checkpoint | None = None

    @property
    def floor(self) -> float:
        return -self.near if self.near else 0.0

    @property
    def is_matrix(self) -> bool:
        return self.metric == "precomputed"

    @property
    def first(self) -> int:
        return self.starts[self.comm.rank]

    @property
    def total(self) -> int:
        return self.starts[-1]

    @property
    def shards(self) -> list[int]:
        return [end - start for start, end in pairwise(self.starts)]


class OneRank(Communicator):
    """One rank's sums alone, where every rank has all clients."""

    def __init__(self) -> None:
        self.rank, self.world, self.bytes, self.collectives, self.ranks = 0, 1, 0, 0, [0]
        self._pulse = None


def _ceil_log2(value: float) -> int:
    mantissa, exponent = math.frexp(value)
    return exponent if mantissa > 0.5 else exponent - 1


def scale_of(call: Call, sums: Communicator, x: Tensor, clients: Tensor, weights: Tensor | None) -> float:
    """The power of two that makes gains integers, from the bound that one machine has; see facility_location/gains.py. Sums over
    clients go over the ranks of `sums`."""
    comm, metric, dtype = call.comm, call.metric, call.x.dtype
    w = None if weights is None else weights.cpu().numpy()
    if metric == "precomputed":
        largest = comm.most(max(0.0, float(x.max())) if x.numel() else 0.0)
        total = float(clients.shape[1]) if w is None else ordered_sum(sums, w)
        bound = total * (largest - call.floor)
        heaviest = 1.0 if w is None else float(w.max())
    else:
        m = len(clients)
        if metric == "dot":
            longest = comm.most(float(row_norms(x).max()) if len(x) else 0.0)
            upper = row_norms(clients) * longest * 1.001
            most = comm.most(float(upper.max()) if m else 0.0)
            if not most < torch.finfo(dtype).max / 4:
                raise ValueError(f"x: products of features overflow {dtype}; scale the features down")
        else:
            upper = np.full(m, 1.001 if metric == "cosine" else call.near)
        bound = ordered_sum(sums, upper if w is None else w * upper)
        heaviest = 1.0 if w is None else comm.most(float(w.max()) if m else 0.0)
    return power_of_gains(bound, heaviest, dtype)


def power_of_gains(bound: float, heaviest: float, dtype: torch.dtype) -> float:
    """The power of two that makes gains integers, where `bound` is the most that a sum can be, and `heaviest` a weight."""
    if not bound <= torch.finfo(torch.float64).max / 4:
        raise ValueError(
            "x: the sum of a candidate's similarities overflows the range of a double; scale x or the weights down"
        )
    if bound <= 0:
        return 1.0
    room = (126 if dtype == torch.float32 else 1000) - _ceil_log2(heaviest)
    scale = math.ldexp(1.0, min(61 - _ceil_log2(bound), room, 1000))
    if bound * scale < 2.0**30:
        raise ValueError(
            "x: similarities times weights are so close to the smallest numbers of the type that gains would be lost; scale x or "
            "the weights up"
        )
    return scale


def traffic(
    comm: Communicator, spent: list[tuple[int, int]], used: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What is told of bytes and collectives: in all, before the first pick, and for each pick; `used` by then, or None for now."""
    used = (comm.bytes, comm.collectives) if used is None else used
    per_pick = torch.tensor(spent, dtype=torch.int64).reshape(-1, 2)
    of_picks = per_pick.sum(0).tolist()
    return {
        "bytes": comm.bytes,
        "collectives": comm.collectives,
        "first_bytes": used[0] - of_picks[0],
        "first_collectives": used[1] - of_picks[1],
        "pick_bytes": per_pick[:, 0],
        "pick_collectives": per_pick[:, 1],
    }
