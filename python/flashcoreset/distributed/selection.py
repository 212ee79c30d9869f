"""Facility location over candidates and clients that are spread over ranks."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET, DISTANCES
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.errors import InputWarning
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Selection
from flashcoreset._core.scaling import exponent_into, largest_magnitude
from flashcoreset._core.tensor import (
    as_floating,
    as_int64,
    as_integer,
    as_matrix,
    as_number,
    as_tensor,
    as_vector,
    check_finite,
    check_preselected,
    check_weights,
    compute_dtype,
    is_sparse,
    one_of,
    promoted,
)
from flashcoreset.distributed.checkpoint import Checkpoint, checksum
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.greedy import Candidates, Greedy, SharedRows
from flashcoreset.distributed.limits import ShardLimits
from flashcoreset.distributed.lost_gains import check_gains
from flashcoreset.distributed.partition import Sample, best_shard, bounded, drawn
from flashcoreset.distributed.problem import Call, OneRank, ShardedSelection, scale_of, shard_labels, traffic
from flashcoreset.distributed.sampled import from_sample
from flashcoreset.distributed.sources import MatrixRows, Points, Source
from flashcoreset.distributed.sums import exact_sum, ordered_counts, ordered_sum
from flashcoreset.facility_location import facility_location as on_one_machine
from flashcoreset.facility_location.backend import choose
from flashcoreset.facility_location.checks import (
    check_costs,
    check_exclude,
    check_left,
    check_limits,
    check_memory_budget,
    warn_of_idle_picks,
)
from flashcoreset.facility_location.lost_gains import own_similarities
from flashcoreset.facility_location.problem import MATRICES, METRICS, Problem, Request
from flashcoreset.facility_location.rounds import in_rounds

_FAR_ABOVE = (
    1000  # as on one machine: an offset this many times above the distances is left out of the arithmetic
)
# Largest magnitudes of points whose squares and products are normal numbers, also for points that are 2^20 times nearer.
_SAFE = {torch.float32: (-40, 50), torch.float64: (-400, 480)}
_LEAST_L1 = 2.0**-900
# Options on which no result depends.
_OF_NO_CONSEQUENCE = (
    "memory_budget",
    "device",
    "checkpoint",
    "bounding",
    "sample_error",
    "confidence",
    "seed",
)
# The options that rule candidates out, end the picks, or say what they cost, where they are not given.
_WITHOUT_LIMITS = {
    "costs": "None", "cost_budget": None, "cost_sensitive": True, "stop_gain": None, "exclude": None, "caps": None, "min_distance": None,
    "rounds": 1,
}  # fmt: skip
_LEAST_SAMPLE, _MOST_SAMPLE = 2048, 16384  # clients for bounding


def facility_location(
    x_shard: Any,
    k: int | None,
    *,
    exact: bool = True,
    group: dist.ProcessGroup | None = None,
    clients: Any = None,
    metric: str = "cosine",
    weights: Any = None,
    groups: Any = None,
    budgets: Any = None,
    preselected: Any = None,
    offset: float | None = None,
    bounding: bool = True,
    sample_error: float = 0.02,
    confidence: float = 0.99,
    seed: int = 0,
    backend: str | None = None,
    progress: Report | bool | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    checkpoint: str | os.PathLike[str] | None = None,
    costs: Any = None,
    cost_budget: float | None = None,
    cost_sensitive: bool = True,
    stop_gain: float | None = None,
    exclude: Any = None,
    caps: Any = None,
    min_distance: float | None = None,
    rounds: int = 1,
) -> ShardedSelection:
    """Facility location over the rows of all ranks: the sequence of `fc.facility_location`, bit for bit.

    Every rank of the process group calls this with its own shard and the same options. The shards' rows, rank after rank, are the
    candidates and, without `clients`, the clients. Without an initialized process group there is one rank, which is this process.

    Args:
        x_shard: [n of this rank, d] as in `fc.facility_location`; the shards may be of unequal sizes, smaller than k, or have no rows.
            A memory-mapped array is not copied as long as its type is float32 or float64. With metric="precomputed" or
            "precomputed_distance": this rank's rows of the matrix [candidates, all clients].
        k: how many to pick from all ranks' rows; with `budgets` their sum or None; with `cost_budget` or `stop_gain` the most picks, or
            None for any number.
        exact: False picks k on each rank alone, then k from all these, over the clients of all ranks (GreeDi), with
            far less traffic.
        group: the process group (gloo or NCCL); None is the default one.
        clients: [m of this rank, d], this rank's part of the clients; None, the candidates; or "sample", a random part of all rows
            for choosing, after which the objective is measured over all rows.
        metric, groups, budgets, offset, backend: as in `fc.facility_location`. `groups` [n of this rank]; a label may have
            members on many ranks.
        weights: [m of this rank], or with a matrix [m], the same on every rank.
        preselected: global indices, the same on every rank.
        bounding: with exact=False, whether candidates that cannot be among the best k are discarded first, and those that must be
            are taken, by bounds over a sample of clients (Böther et al. 2025).
        sample_error, confidence: for clients="sample": so many clients are drawn that the mean similarity which any fixed
            set of picks gives the sample differs from its mean over all clients by at most `sample_error` of the largest possible one,
            at this confidence (Hoeffding's bound), and at least 10 k.
        seed: in [0, 2^64), for samples.
        progress: as in `fc.facility_location`, on rank 0.
        memory_budget: bytes for rows and lists on each rank; the result does not depend on it.
        checkpoint: a folder, on a file system that all ranks share, in which finished work is recorded (first gains and picks). A call
            with the same arguments goes on from there, also with another number of ranks, and returns what the undisturbed one
            returns. The folder is removed at the end. With one rank, and with exact=False, all is done anew.
        costs: [n of this rank] > 0, as in `fc.facility_location`.
        exclude: global indices of candidates that are not picked, the same on every rank.
        cost_budget, cost_sensitive, stop_gain, caps, min_distance, rounds: as in `fc.facility_location`; they hold for the picks of all
            ranks together. A round costs what a call costs, except that the first gains are found once. These, `costs` and `exclude` need
            exact=True, and clients that are not "sample". `method="stochastic"` is one machine's alone.

    Returns:
        ShardedSelection: a `fc.Selection` with `info`, identical on every rank but for `assignment` and `served_by`, which are of this
        rank's clients. `objective` is over all clients.

    Raises:
        TypeError, ValueError: as `fc.facility_location` does; on every rank, naming the rank, if the options differ between the
            ranks or one rank's data is wrong; for data that one machine would have to multiply by a power of two
            (docs/numerics.md).
        RankError: within the group's timeout, if a rank ends or hangs; the message names it.

    Guarantees of exact=False, as shares of the best k: (1 - 1/e)^2 / min(ranks, k) for any shards, and (1 - 1/e) / 2 in expectation
    for shards drawn at random; on clustered data, sorted or not, 0.97 of the exact objective and more is usual (docs/scale.md).

    Sources: Minoux 1978 (lazy evaluation); Mirzasoleiman, Karbasi, Sarkar and Krause, "Distributed submodular maximization", JMLR 2016
    (GreeDi); Barbosa, Ene, Nguyen and Ward, "The power of randomization", ICML 2015 (random shards); Böther, Sebastian, Awasthi,
    Klimovic and Ramalingam, "On distributed larger-than-memory subset selection with pairwise submodular functions", MLSys 2025.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])  # on one rank; torchrun gives each rank its own rows
        >>> found = fc.distributed.facility_location(x, 2, metric="l1", offset=20.0)
        >>> found.indices, found.gains, found.info["collectives"]
        (tensor([2, 3]), tensor([80., 16.]), 0)
    """
    with Communicator(group) as comm:
        wanted: Any = k  # None is replaced by the checks
        request = Request(
            x_shard, None, None, 0, wanted, clients, metric, weights, groups, None, budgets, preselected, "lazy", 0.1, "0", offset,
            memory_budget, backend, costs, cost_budget, cost_sensitive, stop_gain, exclude, None, caps, min_distance, rounds,
        )  # fmt: skip
        call = _checked(comm, request, exact, bounding, sample_error, confidence, seed, progress, checkpoint)
        return from_sample(call, exact_choice) if call.sampled else exact_choice(call)


def as_shard(value: Any, name: str) -> Tensor:
    """`value` as a matrix [rows, columns], which may have no rows."""
    if is_sparse(value):
        raise TypeError(
            f"{name} must be dense, got a sparse matrix; pass {name}.toarray(), or choose on one machine"
        )
    tensor = as_floating(as_tensor(value, name), name)
    return (
        tensor if tensor.dim() == 2 and tensor.shape[0] == 0 and tensor.shape[1] else as_matrix(tensor, name)
    )


def _by_label(counts: Any, name: str) -> dict[Any, int] | None:
    if counts is None:
        return None
    if not isinstance(counts, Mapping):
        vector = as_vector(counts, name, torch.device("cpu"), integers=True).tolist()
        counts = dict(enumerate(vector))
    found = {label: as_int64(count, f"{name}[{label!r}]") for label, count in counts.items()}
    for label, count in found.items():
        if count < 0:
            raise ValueError(f"{name} must be >= 0, got {count} for label {label!r}")
    return found


def _check_limits(r: Request, rows: int, exact: bool, sampled: bool) -> dict[str, Any]:
    """Checks what rules out some of the `rows` candidates of this rank, ends the picks, or says what they cost; returns what has to be the
    same on every rank."""
    cap_of, grouped = _by_label(r.caps, "caps"), r.groups is not None
    # Which labels there are is known when the ranks have told each other.
    if grouped:
        r.groups = torch.zeros(rows, dtype=torch.int64)
    if cap_of is not None:
        r.cap_labels, r.caps = (
            torch.arange(len(cap_of)),
            torch.tensor(list(cap_of.values()), dtype=torch.int64),
        )
    if r.exclude is not None:  # no mask: a rank has one of its own rows alone
        r.exclude = as_vector(r.exclude, "exclude", r.x.device, integers=True)
    check_limits(r, rows)
    if r.costs is not None and rows:
        check_costs(r.costs)
    excluded = None if r.exclude is None else r.exclude.tolist()
    told = {
        "costs": "None" if r.costs is None else "given", "cost_budget": r.cost_budget, "cost_sensitive": r.cost_sensitive,
        "stop_gain": r.stop_gain, "exclude": excluded, "caps": cap_of, "min_distance": r.min_distance, "rounds": r.rounds,
    }  # fmt: skip
    if not exact or sampled:
        for name in [name for name, value in told.items() if value != _WITHOUT_LIMITS[name]]:
            how = "clients='sample'" if sampled else "exact=False"
            raise ValueError(
                f"{name} is for exact=True and all clients, got {how}; leave one of them out, or choose on one machine"
            )
    return told


def _checked(
    comm: Communicator, r: Request, exact: Any, bounding: Any, sample_error: Any, confidence: Any, seed: Any,
    progress: Any, checkpoint: Any,
) -> Call:  # fmt: skip
    """The call, after all ranks have told each other what they were passed; on every rank the same error, or none."""
    k: Any = r.k
    clients, metric, weights, groups = r.clients, r.metric, r.weights, r.groups
    preselected: Any = r.preselected
    offset, backend, memory_budget, caps = r.offset, r.backend, r.memory_budget, r.caps
    single: dict[str, Any] = {"metric": metric, "groups": groups, "budgets": r.budgets, "caps": caps}
    limits: dict[str, Any] = {}
    options: dict[str, Any] = {}
    own: dict[str, Any] = {}
    error: Exception | None = None
    sampled = isinstance(clients, str)
    cpu = torch.device("cpu")
    try:
        one_of(metric, "metric", METRICS)
        check_backend(backend)
        check_progress(progress)
        for name, value in (("exact", exact), ("bounding", bounding)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
        if sampled and clients != "sample":
            raise ValueError(f"clients must be points, None or 'sample', got {clients!r}")
        is_matrix = metric in MATRICES
        x = as_shard(r.x, "x_shard")
        own_clients = None
        if clients is not None and not sampled:
            if is_matrix:
                raise ValueError(
                    f"clients must be None with metric {metric!r}, where they are the columns of x_shard"
                )
            own_clients = as_shard(clients, "clients")
            if own_clients.shape[1] != x.shape[1]:
                raise ValueError(
                    f"clients must have {x.shape[1]} columns as x_shard has, got shape {tuple(own_clients.shape)}"
                )
            x, own_clients = promoted(x, own_clients)
        if sampled and (is_matrix or groups is not None or not exact):
            raise ValueError("clients='sample' is for points without groups and with exact=True")
        dtype = compute_dtype(x.dtype)
        kind = str(x.dtype)
        x = x.detach().to(dtype)
        check_finite(x, "x_shard")
        if own_clients is not None:
            own_clients = own_clients.detach().to(dtype)
            check_finite(own_clients, "clients")
        m = x.shape[1] if is_matrix else x.shape[0] if own_clients is None else own_clients.shape[0]
        if weights is not None:
            weights = as_vector(weights, "weights", x.device, integers=False, length=m)
            if len(weights):
                check_weights(weights, dtype)
        if preselected is not None:
            preselected = as_vector(preselected, "preselected", cpu, integers=True).tolist() or None
        budget_of = _by_label(r.budgets, "budgets")
        labels = None if groups is None else shard_labels(groups, x.shape[0])
        if labels is None and budget_of is not None:
            raise ValueError("budgets need groups, got groups=None")
        r.x = x
        limits = _check_limits(r, x.shape[0], exact, sampled)
        if k is not None:
            k = as_integer(k, "k")
        elif budget_of is None and r.cost_budget is None and r.stop_gain is None:
            raise TypeError("k must be an int unless budgets are given, got None")
        if offset is not None:
            offset = as_number(offset, "offset")
            if metric not in DISTANCES and metric != "precomputed_distance":
                raise ValueError(f"offset is for distances; metric {metric!r} takes None, got {offset}")
            if not 0 <= offset <= torch.finfo(dtype).max:
                raise ValueError(
                    f"offset must be >= 0 and in the range of the dtype of x_shard, got {offset}"
                )
        sample_error, confidence = (
            as_number(sample_error, "sample_error"),
            as_number(confidence, "confidence"),
        )
        for name, value in (("sample_error", sample_error), ("confidence", confidence)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        seed = as_integer(seed, "seed")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        memory_budget = check_memory_budget(memory_budget)
        kernels = choose(backend, x.device)
        if metric == "precomputed_distance" and x.numel() and bool((x < 0).any()):
            row, column = (x < 0).nonzero()[0].tolist()
            raise ValueError(
                f"x_shard must be >= 0 with metric 'precomputed_distance', got {float(x[row, column])} at row {row}, column "
                f"{column}"
            )
        options = {
            "metric": metric, "k": k, "dtype": kind, "columns of x_shard": x.shape[1], "exact": exact,
            "clients": "sample" if sampled else "None" if own_clients is None else "points",
            "weights": "None" if weights is None else "given", "groups": "None" if labels is None else "given",
            "budgets": budget_of, "preselected": preselected, "offset": offset, "bounding": bounding,
            "sample_error": sample_error, "confidence": confidence, "seed": seed, "memory_budget": memory_budget,
            "backend": backend, "device": x.device.type, "checkpoint": None if checkpoint is None else os.fspath(checkpoint), **limits,
        }  # fmt: skip
        if is_matrix and weights is not None:
            options["sum of the weights"] = float(weights.sum())
        sizes: dict[Any, int] = {}
        for label in labels or ():
            sizes[label] = sizes.get(label, 0) + 1
        own = {
            "rows": x.shape[0],
            "clients": 0 if own_clients is None else own_clients.shape[0],
            "labels": sizes,
            "magnitude": largest_magnitude(x, own_clients),
            "largest": float(x.max()) if is_matrix and x.numel() else 0.0,
        }
    except (TypeError, ValueError, RuntimeError) as caught:
        error = caught
    parts = comm.agree(options, error, own)

    starts = np.concatenate([[0], np.cumsum([part["rows"] for part in parts])]).tolist()
    n = starts[-1]
    if n == 0:
        raise ValueError("x_shard must have at least 1 row on one of the ranks, got none on all of them")
    m = x.shape[1] if is_matrix else n if own_clients is None else sum(part["clients"] for part in parts)
    if m == 0:
        raise ValueError("clients must have at least 1 row on one of the ranks, got none on all of them")
    chosen = preselected or []
    if chosen:
        check_preselected(torch.tensor(chosen), n)
    ruled_out = set(limits["exclude"] or ())
    if r.exclude is not None:
        check_exclude(r.exclude, n)
    if r.min_distance is not None and is_matrix and n != m:
        raise ValueError(
            f"x_shard must be square for min_distance with metric {metric!r}, got {n} rows in all and {m} columns"
        )
    sizes = {}
    for part in parts:
        for label, size in part["labels"].items():
            sizes[label] = sizes.get(label, 0) + size
    try:
        all_labels = sorted(sizes)
    except TypeError as caught:
        raise TypeError(f"groups must hold labels that can be sorted, such as strings: {caught}") from None
    grouped = labels is not None and limits["caps"] is None
    if grouped and is_matrix and n != m:
        raise ValueError(
            f"x_shard must be square for groups with metric {metric!r}, got {n} rows in all and {m} columns"
        )
    places = {label: place for place, label in enumerate(all_labels)}
    member = None if labels is None else torch.tensor([places[label] for label in labels], dtype=torch.int64)
    free = dict(sizes)
    members: dict[Any, list[int]] = {label: [] for label in all_labels}
    first, end = starts[comm.rank], starts[comm.rank + 1]
    if labels is not None and grouped:
        taken = dict.fromkeys(ruled_out, False) | dict.fromkeys(chosen, True)
        here = [(labels[j - first], j) for j in taken if first <= j < end]
        for part in comm.gather_objects(here):
            for label, j in part:
                free[label] -= 1
                if taken[j]:
                    members[label].append(j)
    counts, k = _counts(
        n, k, len(chosen), budget_of, grouped, all_labels, sizes, free, " or excluded" if ruled_out else ""
    )
    r.k, r.preselected = k, _as_numbers(chosen)
    excluded = None
    if r.exclude is not None:
        r.exclude = r.exclude.cpu()
        if not grouped:
            check_left(r, n)
        here_too = r.exclude[(r.exclude >= first) & (r.exclude < end)] - first
        excluded = torch.zeros(end - first, dtype=torch.bool)
        excluded[here_too] = True
    if limits["caps"] is not None:
        r.groups = member
        r.cap_labels, r.caps = _caps(caps, limits["caps"], places)
    call = Call(
        comm, kernels, x, own_clients, metric, weights, starts, k, member if grouped else None, counts, chosen, [sorted(part) for part in members.values()],
        0.0, None, exact, bounding, sampled, sample_error, confidence, seed, progress, memory_budget, backend, m, single, r, excluded,
    )  # fmt: skip
    single |= {
        "clients": own_clients, "weights": weights, "preselected": preselected, "offset": offset, "backend": backend,
        "memory_budget": memory_budget, "costs": r.costs, "exclude": limits["exclude"],
        **{name: limits[name] for name in ("cost_budget", "cost_sensitive", "stop_gain", "min_distance", "rounds")},
    }  # fmt: skip
    if checkpoint is not None and exact and not sampled and comm.world > 1:
        first_client = sum(part["clients"] for part in parts[: comm.rank])
        told = {
            name: value
            for name, value in options.items()
            if name not in _OF_NO_CONSEQUENCE and not (name in limits and value == _WITHOUT_LIMITS[name])
        }
        told["rows"] = n
        told["data"] = checksum(
            comm,
            (x, first),
            (own_clients, first_client),
            (weights, 0 if is_matrix else first if own_clients is None else first_client),
            (member, first),
            (r.costs, first),
        )
        call.checkpoint = Checkpoint(comm, checkpoint, told)
    if comm.world > 1 or sampled:
        _find_offsets(
            call, offset, max(part["magnitude"] for part in parts), max(part["largest"] for part in parts)
        )
    return call


def _counts(
    n: int, k: int | None, taken: int, budget_of: dict[Any, int] | None, grouped: bool, labels: list[Any],
    sizes: dict[Any, int], free: dict[Any, int], or_excluded: str,
) -> tuple[list[int], int]:  # fmt: skip
    """How many to pick of each label, and in all."""
    total = None if budget_of is None else sum(budget_of.values())
    if k is not None and total is not None and k != total:
        raise ValueError(f"k must be the sum of the budgets, {total}, or None, got {k}")
    if k is None:
        k = n - taken if total is None else total
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if k > n - taken:
        among = f"{n} candidates less {taken} preselected" if taken else f"{n} candidates"
        raise ValueError(f"k must be at most {n - taken} ({among}), got {k}")
    if not grouped:
        return [], k
    if budget_of is None:
        return allocate_budgets([free[label] for label in labels], k).tolist(), k
    for label, count in budget_of.items():
        if count and label not in sizes:
            raise ValueError(f"budgets: {count} asked of label {label!r}, which no candidate has in groups")
    for label in labels:
        if label not in budget_of:
            raise ValueError(
                f"budgets must name every label in groups, got none for label {label!r} (0 takes none of it)"
            )
        if budget_of[label] > free[label]:
            raise ValueError(
                f"budgets: {budget_of[label]} asked of label {label!r}, whose group has {free[label]} candidates left "
                f"({sizes[label]} less {sizes[label] - free[label]} preselected{or_excluded})"
            )
    return [budget_of[label] for label in labels], k


def _as_numbers(preselected: list[int]) -> Tensor | None:
    return torch.tensor(preselected, dtype=torch.int64) if preselected else None


def _caps(caps: Any, cap_of: dict[Any, int], places: dict[Any, int]) -> tuple[Tensor, Tensor]:
    """The places [C] of the labels that `caps` names among all labels, and their caps [C]."""
    if not all(type(label) is int for label in places):
        if not isinstance(caps, Mapping):
            kind = type(next(iter(places))).__name__
            raise TypeError(
                f"caps must be a dict by label where groups holds labels of type {kind}, got {caps!r}"
            )
        for label, count in cap_of.items():
            if label not in places and count:
                raise ValueError(f"caps: {count} asked of label {label!r}, which no candidate has in groups")
    known = [(places[label], count) for label, count in cap_of.items() if label in places]
    labels, counts = torch.tensor(known, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return labels, counts


# ---- offsets


def _find_offsets(call: Call, offset: float | None, magnitude: float, largest: float) -> None:
    dtype, metric = call.x.dtype, call.metric
    limit = torch.finfo(dtype).max

    def rounded(value: float) -> float:
        return float(torch.tensor(value, dtype=dtype))

    if metric == "precomputed_distance":
        above = rounded(min(largest * 1.0001 or 1.0, limit))
        offset = above if offset is None else rounded(offset)
        call.near, call.offset = (offset if offset <= _FAR_ABOVE * above else above), offset
        call.x, call.metric = -call.x, "precomputed"
        return
    if metric in ("cosine", "precomputed"):
        return
    if metric != "l1" and exponent_into(magnitude, _SAFE[dtype]):
        low, high = _SAFE[dtype]
        raise ValueError(
            f"x_shard: magnitudes up to {magnitude:.3g} lie outside of 2^{low} to 2^{high}, within which {metric!r} of {dtype} is "
            "the same on ranks and on one machine; multiply all data by a power of two"
        )
    if metric == "dot":
        return
    default = None
    if offset is None:
        call.offset = call.near = rounded(default := _default_offset(call))
    else:
        call.near = call.offset = rounded(offset)
        few = _first_rows(call, call.x if call.clients is None else call.clients, 8)
        point = _first_rows(call, call.x, 1)
        if call.near > _FAR_ABOVE * float(call.kernels.pairwise(point, few, metric=metric).max()):
            default = _default_offset(call)
            call.near = min(rounded(default), call.near)
    if metric == "l1" and dtype == torch.float64 and call.near < _LEAST_L1:
        raise ValueError(
            f"x_shard: distances up to {call.near:.3g} are too small; multiply all data by a power of two"
        )


def _first_rows(call: Call, points: Tensor, count: int) -> Tensor:
    """The first rows of all ranks' `points`."""
    return torch.cat(call.comm.gather_rows(points[:count].contiguous()))[:count]


def _default_offset(call: Call) -> float:
    """An upper bound of all distances: through the first client, by the triangle inequality, as on one machine."""
    metric, kernels = call.metric, call.kernels
    plain = "euclidean" if metric == "sqeuclidean" else metric

    def farthest(point: Tensor, points: Tensor) -> float:
        own = float(kernels.pairwise(point, points, metric=plain).max()) if len(points) else 0.0
        return call.comm.most(own)

    if call.clients is None:
        radius = 2 * farthest(_first_rows(call, call.x, 1), call.x)
    else:
        first = _first_rows(call, call.clients, 1)
        radius = farthest(first, call.clients)
        radius += farthest(first, call.x)
    offset = radius * 1.0001
    offset = offset * offset if metric == "sqeuclidean" else offset
    if not offset <= torch.finfo(call.x.dtype).max:
        raise ValueError(
            f"x: distances of metric {metric!r} overflow {call.x.dtype}; scale the data down or use float64"
        )
    return offset or 1.0


# ---- the run


def exact_choice(call: Call) -> ShardedSelection:
    return _alone(call) if call.comm.world == 1 else _on_ranks(call)


def _alone(call: Call) -> ShardedSelection:
    """One rank: one machine's call."""
    found = on_one_machine(call.x, call.k, progress=call.progress, **call.single)
    info = {"shards": call.shards, **traffic(call.comm, [(0, 0)] * len(found.indices))}
    return ShardedSelection(
        found.indices, found.gains, found.weights, found.assignment, found.objective, found.offset, rounds=found.rounds,
        served_by=found.served_by, info=info,
    )  # fmt: skip


@dataclass(eq=False)
class Found:
    """One problem's picks, by their numbers among all candidates, and what they took."""

    selection: Selection
    per_pick: list[tuple[int, int]]  # bytes and collectives
    evaluations: int


def _on_ranks(call: Call) -> ShardedSelection:
    comm, x, dtype = call.comm, call.x, call.x.dtype
    info: dict[str, Any] = {"shards": call.shards}
    shown = call.progress if comm.rank == 0 else None
    with Progress(shown, call.k, "facility location") as bar:
        if call.groups is None:
            rows = torch.arange(x.shape[0])
            found = [_solve_one(call, rows, call.k, call.preselected, bar, 0, info)]
        else:
            found = _solve_groups(call, bar, info)
    chosen = found[0].selection if call.groups is None else _together(call, found)
    if not chosen.objective <= torch.finfo(dtype).max:
        raise ValueError(
            f"weights: the objective, {chosen.objective:.3g}, overflows {dtype}; scale the weights down or use float64"
        )
    info |= traffic(comm, [pair for part in found for pair in part.per_pick])
    info["evaluations"] = sum(part.evaluations for part in found)
    if call.checkpoint is not None:
        call.checkpoint.remove()
    apart = call.clients is not None or (call.is_matrix and call.total != x.shape[1])
    if comm.rank == 0 and apart and int(torch.count_nonzero(chosen.gains)) < len(chosen.gains):
        warn_of_idle_picks(chosen, False)
    return ShardedSelection(
        chosen.indices, chosen.gains, chosen.weights, chosen.assignment, chosen.objective, call.offset, rounds=chosen.rounds,
        served_by=chosen.served_by, info=info,
    )  # fmt: skip


def _together(call: Call, found: list[Found]) -> Selection:
    """The picks of all groups."""
    x, parts = call.x, [part.selection for part in found]
    indices, gains, won = (
        torch.cat(column) for column in zip(*((p.indices, p.gains, p.weights) for p in parts), strict=True)
    )
    rounds = None
    if call.request.rounds > 1:
        rounds = torch.cat([part.rounds for part in parts if part.rounds is not None])
    if call.clients is not None:
        won, assignment, objective = _serve(call, indices.tolist(), call.preselected)
        served = None
        if rounds is not None:
            won, served = _serve_in_rounds(call, indices, rounds)
            assignment = served[0]
        return Selection(
            indices, gains, won, assignment, objective, call.offset, rounds=rounds, served_by=served
        )
    m = x.shape[1] if call.is_matrix else x.shape[0]
    most = max(len(part.served_by) if part.served_by is not None else 1 for part in parts)
    served = torch.full((most, m), -1, dtype=torch.int64, device=x.device)
    objective, done, place = 0.0, 0, 0
    for label, count in enumerate(call.budgets):
        if not _has_part(call, label, count):
            continue
        part, place = parts[place], place + 1
        own = (_members(call, label) if not call.is_matrix else _all_members(call, label)).to(x.device)
        of = part.assignment[None] if part.served_by is None else part.served_by
        served[: len(of), own] = torch.where(of >= 0, of + done, -1)
        objective += part.objective
        done += len(part.indices)
    return Selection(
        indices, gains, won, served[0], objective, call.offset, rounds=rounds, served_by=None if rounds is None else served,
    )  # fmt: skip


def _has_part(call: Call, label: int, count: int) -> bool:
    """Whether a group is solved: it has picks, or its preselected members serve it."""
    return count > 0 or (call.clients is None and bool(call.preselected_of[label]))


def _members(call: Call, label: int) -> Tensor:
    assert call.groups is not None
    return (call.groups == label).nonzero()[:, 0]


def _all_members(call: Call, label: int) -> Tensor:
    return torch.cat(call.comm.gather_rows(_members(call, label) + call.first))


def _solve_groups(call: Call, bar: Progress, info: dict[str, Any]) -> list[Found]:
    found: list[Found] = []
    done = 0
    for label, count in enumerate(call.budgets):
        if not _has_part(call, label, count):
            continue
        found.append(
            _solve_one(call, _members(call, label), count, call.preselected_of[label], bar, done, info, label)
        )
        done += len(found[-1].per_pick)
    return found


def _solve_one(
    call: Call, rows: Tensor, k: int, preselected: list[int], bar: Progress, done: int, info: dict[str, Any],
    label: int | None = None,
) -> Found:  # fmt: skip
    """The `k` picks of one problem, among `rows` [r] of this rank."""
    comm, x, weights = call.comm, call.x, call.weights
    whole = label is None
    numbers = rows + call.first
    columns: Tensor | None = None
    if call.is_matrix and not whole:
        columns = _all_members(call, label if label is not None else 0)
        clients = x[rows][:, columns.to(x.device)].contiguous()
        weights = None if weights is None else weights[columns.to(x.device)]
    elif call.is_matrix or call.clients is not None:
        clients = x if call.clients is None else call.clients
    else:
        clients = x if whole else x[rows]
        weights = weights if weights is None or whole else weights[rows.to(weights.device)]
    is_square = call.clients is None and (not call.is_matrix or not whole or call.total == x.shape[1])

    def client_of(number: int) -> int:
        if call.is_matrix:
            return number if columns is None else int(torch.searchsorted(columns, number))
        if not candidates.is_here(number):
            return -1
        return int(torch.searchsorted(numbers, number))

    own_x = clients if call.is_matrix else x if whole else x[rows]
    candidates = Candidates(call.starts, comm.rank, numbers)
    m = clients.shape[1] if call.is_matrix else clients.shape[0]
    whose = OneRank() if call.is_matrix else comm
    scale = scale_of(call, whose, own_x, clients, weights)
    told = torch.ones(m, dtype=torch.float64, device=x.device) if weights is None else weights
    source: Source = (
        MatrixRows(call.kernels, own_x)
        if call.is_matrix
        else Points(call.kernels, own_x, clients, call.metric)
    )

    problem = Problem(
        own_x, None if is_square or call.is_matrix else clients, call.metric, weights, _as_numbers(preselected),
        offset=call.near,
    )  # fmt: skip
    r, excluded = call.request, None if call.excluded is None else call.excluded[rows]
    places = numbers if columns is None else torch.searchsorted(columns, numbers)
    limits = None
    if r.is_limited or r.costs is not None:
        shared = SharedRows(comm, source, candidates)
        limits = ShardLimits(
            comm, call.kernels, r, problem, excluded, candidates, shared, places if call.is_matrix else None
        )
    per_pick: list[tuple[int, int]] = []
    evaluations = begun = 0
    name = "all" if label is None else f"group{label}"
    first_gains: np.ndarray | None = None  # of a run for which nothing is preselected

    def to_self() -> Tensor:
        if not call.is_matrix:
            return own_similarities(problem, slice(0, m))
        return torch.cat(comm.gather_rows(own_x[torch.arange(len(rows)), places].double()))

    def solve_round(given: Problem, k: int, made: int, stop_gain: float | None) -> Selection:
        nonlocal first_gains, evaluations, begun
        before = [] if given.preselected is None else given.preselected.tolist()
        record = None
        if call.checkpoint is not None:
            record = call.checkpoint.part(f"{name}-round{begun}" if begun else name)

        def run_among(kept: Tensor | None) -> Greedy:
            """The run over this rank's candidates `kept` (places in `rows`), or all of them."""
            of, numbers_left = source, numbers
            if kept is not None:
                few = own_x[kept.to(x.device)]
                of = (
                    MatrixRows(call.kernels, few)
                    if call.is_matrix
                    else Points(call.kernels, few, clients, call.metric)
                )
                numbers_left = numbers[kept]
            return Greedy(
                comm, of, Candidates(call.starts, comm.rank, numbers_left), told, scale, call.floor, before,
                call.memory_budget, client_of if is_square else None, record, limits, None if before else first_gains, k > 0,
            )  # fmt: skip

        constant = 0.0  # what an offset far above all distances adds
        if call.offset is not None and call.offset > call.near:
            constant = (call.offset - call.near) * _total_weight(call, weights, m)
        if call.exact or k == 0:
            run = run_among(None)
            run.step(k, bar, done + made, stop_gain, 0.0 if before else constant)
        else:
            run = _approximate(
                call, source, own_x, clients, weights, candidates, k, before, run_among, bar, done, info
            )
        per_pick.extend(run.per_pick)
        evaluations, begun = evaluations + run.evaluations, begun + 1
        if not before:
            first_gains = run.first_gains
        owner, count = run.assignment(), len(run.picks)
        best = (run.best.double() - run.floor.double()).cpu().numpy()
        won = ordered_counts(whose, owner, weights, count)
        objective = ordered_sum(whose, best if weights is None else weights.cpu().numpy() * best)
        gains = torch.tensor([run.told(gain) for gain in run.gains], dtype=torch.float64)
        gains = gains.to(x.device, x.dtype)
        some = not call.exact or limits is not None
        check_gains(comm, whose, run, given, before, gains, to_self if is_square else None, some)
        objective += constant
        if constant and not before and count:
            gains[0] += constant
        chosen = torch.tensor(run.picks, dtype=torch.int64, device=x.device)
        return Selection(chosen, gains, won.to(x.device, x.dtype), owner, objective, call.offset)

    if r.rounds == 1:
        selection = solve_round(problem, k, 0, r.stop_gain)
    else:
        selection = in_rounds(problem, r.rounds, k, r.stop_gain, solve_round)
    return Found(selection, per_pick, evaluations)


def _total_weight(call: Call, weights: Tensor | None, m: int) -> float:
    """As one machine sums it."""
    if call.is_matrix:
        return float(m) if weights is None else float(weights.sum())
    if weights is None:
        return float(call.comm.sum(torch.tensor([m]))[0])
    return float(torch.cat(call.comm.gather_rows(weights)).sum())


def _approximate(
    call: Call, source: Source, x: Tensor, clients: Tensor, weights: Tensor | None, candidates: Candidates, k: int,
    preselected: list[int], run_among: Callable[[Tensor], Greedy], bar: Progress, done: int, info: dict[str, Any],
) -> Greedy:  # fmt: skip
    """Partition greedy: k picks on each rank, then k among all these."""
    comm = call.comm
    is_open = torch.ones(len(x), dtype=torch.bool)
    here = candidates.places([j for j in preselected if candidates.is_here(j)])
    is_open[here] = False
    alive, grown = is_open.nonzero()[:, 0], here[:0]
    if call.bounding:
        size = min(max(_LEAST_SAMPLE, 2 * k), _MOST_SAMPLE)
        if call.is_matrix:
            columns = drawn(x.shape[1], size, call.seed).to(x.device)
            told = (
                torch.ones(len(columns), dtype=torch.float64) if weights is None else weights[columns].cpu()
            )
            alive, grown, counts = bounded(
                comm, lambda places: x[places.to(x.device)][:, columns], told, call.floor, is_open, k
            )
        else:
            sample = Sample(comm, clients, weights, size, call.seed)
            of = Points(call.kernels, x, sample.points, call.metric)
            alive, grown, counts = bounded(
                comm, lambda places: of.similarities(x[places.to(x.device)], slice(None)), sample.weights, call.floor,
                is_open, k,
            )  # fmt: skip
        info["bounding"] = counts
    error: Exception | None = None
    local = here[:0]
    try:
        local = _local_picks(call, x, clients, weights, alive, torch.cat([here, grown]), k)
    except ValueError as caught:
        error = caught
    comm.agree({}, error)
    pool = torch.cat([local, grown]).unique()
    info["candidates"] = int(comm.sum(torch.tensor([len(pool)]))[0])
    merged = run_among(
        torch.cat([pool, here]).unique()
    )  # what is preselected is looked up there, and not picked
    merged.step(k, bar, done)
    sums = OneRank() if call.is_matrix else comm
    winner = best_shard(comm, merged, source, local, weights, candidates, preselected, sums)
    if winner is None:
        return merged
    alone = run_among(torch.cat([local if comm.rank == winner else local[:0], here]).unique())
    alone.step(k, bar, done)
    return alone


def _local_picks(
    call: Call, x: Tensor, clients: Tensor, weights: Tensor | None, alive: Tensor, before: Tensor, k: int
) -> Tensor:
    """The places [<= k], ascending, of this rank's own picks among its candidates `alive`, where those `before` are chosen already."""
    count = min(k, len(alive))
    if count == 0:
        return alive[:0]
    rows = torch.cat([alive, before]).sort().values
    own = None if not len(before) else torch.searchsorted(rows, before)
    options: dict[str, Any] = {
        "preselected": own,
        "backend": call.backend,
        "memory_budget": call.memory_budget,
    }
    some, metric = x[rows.to(x.device)], call.metric
    if call.is_matrix:
        metric, some = ("precomputed_distance", -some) if call.near else (metric, some)
    elif len(clients):
        options["clients"] = None if clients is x and len(rows) == len(x) else clients
    else:
        weights = None  # of no clients: this rank's candidates stand for themselves
    if call.near:
        options["offset"] = call.near
    with warnings.catch_warnings():
        # A rank's own picks may gain nothing there; those of all ranks count.
        warnings.simplefilter("ignore", InputWarning)
        found = on_one_machine(some, count, metric=metric, weights=weights, **options)
    return rows[found.indices.cpu()].sort().values


# ---- clients that serve all groups together


def _serve_in_rounds(call: Call, indices: Tensor, rounds: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of all groups' picks, and which of them serves each client in each round; `rounds` [k] is the round of each pick."""
    won = torch.zeros(len(indices), dtype=call.x.dtype, device=indices.device)
    served = []
    for number in range(int(rounds.max()) + 1 if len(rounds) else 1):
        own = (rounds == number).nonzero()[:, 0]
        won[own], assignment, _ = _serve(call, indices[own].tolist(), [] if number else call.preselected)
        served.append(own[assignment].where(assignment >= 0, -1) if len(own) else assignment)
    return won, torch.stack(served)


def _serve(call: Call, numbers: list[int], preselected: list[int]) -> tuple[Tensor, Tensor, float]:
    """Weights, assignment and f(S) of all groups' picks together, over clients that are not the candidates."""
    assert call.clients is not None
    x, clients, dtype = call.x, call.clients, call.x.dtype
    floor = torch.tensor(0.0 if call.offset is None else -call.offset, dtype=dtype, device=x.device)
    candidates = Candidates(call.starts, call.comm.rank, torch.arange(x.shape[0]) + call.first)
    source = Points(call.kernels, x, clients, call.metric)
    shared = SharedRows(call.comm, source, candidates)
    k, m = len(numbers), clients.shape[0]
    covered = floor.expand(m).clone()
    most = torch.full((m,), -math.inf, dtype=dtype, device=x.device)
    first = torch.full((m,), -1, dtype=torch.int64, device=x.device)
    for begin in range(0, len(preselected), 256):
        for some, s in shared.similarities(shared.fetch(preselected[begin : begin + 256])):
            covered[some] = torch.maximum(covered[some], s.amax(0))
    for begin in range(0, k, 256):
        for some, s in shared.similarities(shared.fetch(numbers[begin : begin + 256])):
            position = torch.arange(len(s), device=x.device)[:, None]
            top = s.amax(0)
            at = torch.where(s == top, position, len(s)).amin(0) + begin
            better = top > most[some]
            first[some] = torch.where(better, at, first[some])
            most[some] = torch.where(better, top, most[some])
    assignment = torch.where(most > covered, first, -1)
    best = (torch.maximum(most, covered).double() - floor.double()).cpu().numpy()
    won = ordered_counts(call.comm, assignment, call.weights, k).to(x.device, dtype)
    terms = best if call.weights is None else call.weights.cpu().numpy() * best
    return won, assignment, exact_sum(call.comm, terms)
