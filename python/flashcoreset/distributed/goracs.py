"""GORACS over training items that are spread over ranks: stage 1 exact, stage 2 among gathered items."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.inputs import sorted_labels
from flashcoreset._core.labels import Labels, joint_labels
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import (
    as_matrix,
    at_least_one,
    check_finite,
    compute_dtype,
    promoted,
)
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.greedy import Candidates, Greedy, SharedRows
from flashcoreset.distributed.order import kth_smallest, ordered_bits, values_of_bits
from flashcoreset.distributed.problem import power_of_gains, shard_labels
from flashcoreset.distributed.selection import as_shard
from flashcoreset.distributed.sums import exact_sum
from flashcoreset.facility_location.backend import Kernels, choose
from flashcoreset.methods.goracs import (
    check_norms,
    checked_budgets,
    checked_norms,
    checked_options,
    costs_of,
    exchanged,
    in_time,
    info_of_classes,
    is_held,
)
from flashcoreset.methods.goracs.descent import Options
from flashcoreset.methods.goracs.exact_transport import load_pot
from flashcoreset.methods.goracs.transport_costs import TransportCosts, cover_picks, largest_distance


def goracs(
    train_shard: Any,
    valid: Any,
    grad_norms: Any = None,
    k: int | None = None,
    *,
    lam: float = 0.0,
    norm_clip: float | None = None,
    norm_scale: str = "max",
    max_exchanges: int = 100,
    n_candidates: int = 30,
    max_solves: int | None = None,
    time_limit: float | None = None,
    tol: float = 0.0,
    solver: str = "exact",
    reg: float = 1e-3,
    pool: int = 16384,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
    train_labels: Any = None,
    valid_labels: Any = None,
    scaling: str = "class",
    group: dist.ProcessGroup | None = None,
) -> Coreset:
    """GORACS from the training items of all ranks: the picks of stage 1 are those of `fc.goracs`; stage 2 exchanges gathered items.

    Stage 1 (the greedy cover of the validation items) is one machine's, bit for bit. For stage 2 the ranks gather the picks and, for each
    validation item, its nearest items of each rank, up to `pool` in all; if all training items are no more than that, they are gathered
    in their order, and the whole result is the one of `fc.goracs`.

    Args:
        train_shard: [n of this rank, d]; a rank may have no rows.
        valid: [V, d], the same on every rank.
        grad_norms: [n of this rank] >= 0, or None if lam is 0.
        time_limit: as in `fc.goracs`, by the clock of the first rank, whose choice all ranks return.
        pool: how many items stage 2 may choose from, >= k; with labels, in each class.
        train_labels: [n of this rank] class labels, as in `fc.goracs`; a class may have items on many ranks.
        valid_labels: [V] class labels, the same on every rank; both or neither.
        group: the process group; None is the default one.

    The other arguments are those of `fc.goracs`, the same on every rank.

    Returns:
        Coreset, the same on every rank: `indices` are global; `info` has the entries of `fc.goracs` (a "certificate" holds among the
        gathered items) and "cover" ([k], the picks of stage 1, with labels class by class), "pool" (how many items were gathered, of all
        classes), "bytes" and "collectives".

    Raises:
        TypeError, ValueError: as `fc.goracs` does, on every rank, naming the rank.
        ImportError: if `solver` is "exact" and POT is not installed, where `fc.goracs` needs it.
        RankError: if a rank ends or hangs.

    Source: see `fc.goracs`.

    Example:
        >>> import torch, flashcoreset as fc
        >>> train = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
        >>> coreset = fc.distributed.goracs(train, torch.tensor([[0.5], [1.5], [9.5], [10.5]]), k=2)
        >>> coreset.indices, coreset.info["cover"]
        (tensor([1, 4]), tensor([1, 4]))
    """
    with Communicator(group) as comm:
        error: Exception | None = None
        told: dict[str, Any] = {}
        own: tuple[int, float, dict[Any, tuple[int, float]]] = (0, 0.0, {})
        labels: tuple[list[Any], list[Any]] | None = None  # of training items here, and of validation items
        try:
            check_backend(backend)
            check_progress(progress)
            count = at_least_one(k, "k")
            options, quantile, seconds = checked_options(
                lam=lam, norm_clip=norm_clip, norm_scale=norm_scale, max_exchanges=max_exchanges, n_candidates=n_candidates,
                max_solves=max_solves, time_limit=time_limit, tol=tol, scaling=scaling, solver=solver, reg=reg,
                memory_budget=memory_budget, backend=backend,
            )  # fmt: skip
            pool = at_least_one(pool, "pool")
            if pool < count:
                raise ValueError(f"pool must be >= k={count}, got {pool}")
            x, y = as_shard(train_shard, "train_shard"), as_matrix(valid, "valid")
            if y.shape[1] != x.shape[1]:
                raise ValueError(
                    f"valid must have {x.shape[1]} columns as train_shard has, got shape {tuple(y.shape)}"
                )
            if y.device != x.device:
                raise ValueError(
                    f"valid is on device {y.device}, but train_shard on {x.device}; move one of them"
                )
            x, y = promoted(x, y)
            dtype = compute_dtype(x.dtype)
            x, y = x.detach().to(dtype), y.detach().to(dtype)
            norms = checked_norms(grad_norms, len(x), x.device, options, quantile)
            check_finite(x, "train_shard")
            check_finite(y, "valid")
            if len(norms):
                check_norms(norms)
            kernels = choose(backend, x.device)
            labels = _labels(train_labels, valid_labels, len(x), len(y))
            told = {
                "k": count, "lam": options.lam, "max_exchanges": options.max_exchanges, "n_candidates": options.n_candidates, "tol": options.tol,
                "solver": solver, "reg": options.reg, "max_solves": options.max_solves, "pool": pool, "dtype": str(dtype),
                "rows of valid": len(y), "columns of train_shard": x.shape[1], "sum of valid": float(y.double().sum()),
                "memory_budget": options.memory_budget, "scaling": scaling, "norm_clip": quantile, "norm_scale": norm_scale, "time_limit": seconds,
                "valid_labels": None if labels is None else labels[1],
            }  # fmt: skip
            own = _parts(norms, None if labels is None else labels[0])
        except (TypeError, ValueError, RuntimeError) as caught:
            error = caught
        parts = comm.agree(told, error, own)
        start = time.perf_counter()
        n, first = sum(part[0] for part in parts), sum(part[0] for part in parts[: comm.rank])
        if count > n:
            raise ValueError(f"k must be <= the {n} rows of train, got {count}")
        names, classes = _classes(count, labels, parts, len(x), len(y))
        if solver == "exact" and not all(
            is_held(share, len(own_valid), dtype) for _, _, own_valid, share in classes
        ):
            try:
                load_pot()
            except ImportError as caught:
                error = caught
            comm.agree({}, error)
        together = labels is None or scaling == "global"
        top = max(part[1] for part in parts)
        tops = {code: top if together else _most_of(parts, names.name(code)) for code, *_ in classes}
        if quantile is not None:
            problems = [norms] if together else [norms[members] for _, members, _, _ in classes]
            bounds = _quantiles(comm, problems, quantile)
            for (code, *_), bound in zip(classes, bounds * len(classes) if together else bounds, strict=True):
                tops[code] = min(tops[code], bound)
        for code, most in tops.items():
            if options.lam > 0 and most == 0:
                where = "" if together else f" in class {names.name(code)!r}"
                clip = "" if quantile is None else f" and norm_clip={quantile}"
                raise ValueError(
                    f"grad_norms must not be all 0 with lam > 0{where}, got lam={options.lam}{clip}"
                )
        largest = None
        if labels is not None and together:
            largest = largest_distance(x, y, kernels, options.memory_budget, comm.most)
            if not math.isfinite(largest):
                raise ValueError("train and valid must have distances in the range of float64; scale them")
        total, done = count + len(classes) * options.max_exchanges, 0
        found: list[tuple[Tensor, Tensor, int, dict[str, Any]]] = []
        with Progress(progress if comm.rank == 0 else None, total, "goracs") as bar:
            for number, (code, members, own_valid, share) in enumerate(classes):
                begin = time.perf_counter() if found else start

                def report(more: int, before: int = done) -> None:
                    bar.update(before + more)

                options = in_time(options, start, seconds, len(classes) - number)
                part, norms_of, clients = x, norms, y
                if labels is not None:
                    part, norms_of, clients = x[members], norms[members], y[own_valid]
                costs = costs_of(
                    part, clients, norms_of.clamp_max(tops[code]), options, kernels, tops[code], largest, comm.most,
                    lambda numbers: exact_sum(comm, np.array(numbers)),
                )  # fmt: skip
                items = members + first
                found.append(
                    _select(
                        comm,
                        costs,
                        _Features(costs.kernels, part),
                        items,
                        share,
                        options,
                        pool,
                        report,
                        begin,
                    )
                )
                done += share + options.max_exchanges
                bar.skip(done)  # the exchanges that were not made
        infos = {code: part[3] for (code, *_), part in zip(classes, found, strict=True)}
        info = infos[0] if labels is None else info_of_classes(infos, classes, names)
        indices, cover = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
        info |= {
            "cover": cover,
            "pool": sum(part[2] for part in found),
            "bytes": comm.bytes,
            "collectives": comm.collectives,
        }
        weights = [
            torch.full((share,), len(own_valid) / share, dtype=dtype, device=x.device)
            for _, _, own_valid, share in classes
        ]
        return Coreset(indices, torch.cat(weights), info)


_Class = tuple[int, Tensor, Tensor, int]  # as in `flashcoreset.methods.goracs`; training items of this rank


def _labels(
    train_labels: Any, valid_labels: Any, rows: int, clients: int
) -> tuple[list[Any], list[Any]] | None:
    """The labels of this rank's training items and of the validation items."""
    if (train_labels is None) != (valid_labels is None):
        missing = "train_labels" if train_labels is None else "valid_labels"
        raise ValueError(f"train_labels and valid_labels must be given together, got {missing}=None")
    if train_labels is None:
        return None
    if rows == 0:
        own = shard_labels(train_labels, 0, "train_labels")
        return own, shard_labels(valid_labels, clients, "valid_labels")
    moved = [value.cpu() if isinstance(value, Tensor) else value for value in (train_labels, valid_labels)]
    of_train, of_valid = joint_labels(
        torch.device("cpu"), train_labels=(moved[0], rows), valid_labels=(moved[1], clients)
    )
    return of_train.per_item(), of_valid.per_item()


def _parts(norms: Tensor, labels: list[Any] | None) -> tuple[int, float, dict[Any, tuple[int, float]]]:
    """How many items this rank has, and their largest norm; of all, and of each class."""
    most = float(norms.max()) if len(norms) else 0.0
    of: dict[Any, tuple[int, float]] = {}
    for label, norm in zip(labels or (), norms.tolist(), strict=False):
        size, largest = of.get(label, (0, 0.0))
        of[label] = size + 1, max(largest, norm)
    return len(norms), most, of


def _quantiles(comm: Communicator, parts: list[Tensor], quantile: float) -> list[float]:
    """The quantile of all ranks' numbers of each collection, with the bits of `numpy.quantile`; 0 for an empty one."""
    keys = [np.sort(ordered_bits(part.cpu().numpy())) for part in parts]
    counts = comm.sum(torch.tensor([len(part) for part in parts])).tolist()
    at = [quantile * max(0, count - 1) for count in counts]
    ranks = [
        np.array([math.floor(place), math.ceil(place)]) + 1 if count else np.zeros(0, dtype=np.int64)
        for place, count in zip(at, counts, strict=True)
    ]
    return [
        float(np.quantile(values_of_bits(found), place - math.floor(place))) if len(found) else 0.0
        for found, place in zip(kth_smallest(comm, keys, ranks), at, strict=True)
    ]


def _most_of(parts: list[Any], label: Any) -> float:
    return max(part[2].get(label, (0, 0.0))[1] for part in parts)


def _classes(
    k: int, labels: tuple[list[Any], list[Any]] | None, parts: list[Any], rows: int, clients: int
) -> tuple[Labels, list[_Class]]:
    """The labels, and the classes of the validation items, ascending, without those whose budget is 0."""
    if labels is None:
        return Labels(torch.empty(0)), [(0, torch.arange(rows), torch.arange(clients), k)]
    of_train, of_valid = labels
    present = list(sorted_labels(of_valid, "valid_labels"))
    shares = Counter(of_valid)
    sizes = [sum(part[2].get(label, (0, 0.0))[0] for part in parts) for label in present]
    budgets = checked_budgets(present, [shares[label] for label in present], sizes, k)
    are_numbers = all(type(label) is int for label in present)
    classes = [
        (label if are_numbers else place, _places(of_train, label), _places(of_valid, label), count)
        for place, (label, count) in enumerate(zip(present, budgets, strict=True))
        if count
    ]
    return Labels(torch.empty(0), None if are_numbers else present), classes


def _places(labels: list[Any], label: Any) -> Tensor:
    return torch.tensor([place for place, own in enumerate(labels) if own == label], dtype=torch.int64)


def _select(
    comm: Communicator, costs: TransportCosts, rows: _Features, items: Tensor, k: int, options: Options, pool: int,
    report: Callable[[int], None], begin: float,
) -> tuple[Tensor, Tensor, int, dict[str, Any]]:  # fmt: skip
    """The choice of one problem.

    Args:
        comm: the ranks.
        costs: those of this rank's training items.
        rows: these items' features.
        items: [n here] int64, their numbers among all training items.
        k: how many to choose.
        options: those of stage 2.
        pool: how many items stage 2 may choose from.
        report: gets the picks and exchanges made.
        begin: when the problem was begun.

    Returns:
        The chosen items [k] and those of stage 1 [k], by their numbers; how many were gathered; and what is known about the choice.
    """
    counts = comm.gather(torch.tensor([len(items)]))[:, 0].tolist()
    starts = [sum(counts[:rank]) for rank in range(comm.world + 1)]
    candidates = Candidates(starts, comm.rank, torch.arange(len(items)) + starts[comm.rank])
    picks, made = cover_picks(_SharedCover(comm, costs, candidates, starts[-1]), starts[-1], k, report)
    numbers = _gathered(comm, costs, picks, starts, pool)
    shared = SharedRows(comm, rows, candidates)
    features = torch.cat([shared.fetch(numbers[i : i + 1024]) for i in range(0, len(numbers), 1024)])
    penalties, of_all = _facts(comm, costs.penalty, items, candidates, numbers)
    at = {number: i for i, number in enumerate(numbers)}
    start = torch.tensor([at[j] for j in picks.tolist()], device=features.device)
    chosen, info = exchanged(costs.of_items(features, penalties), start, made, options, report, begin)
    # Every rank has solved the same problem. One whose processor rounds otherwise, or whose clock runs otherwise, takes over what the
    # first found.
    chosen = comm.broadcast(chosen, 0)
    info = comm.gather_objects(info)[0]
    return of_all[chosen], of_all[start], len(numbers), info


class _Features:
    """The rows of training items, to be sent."""

    by_all, clients = True, 0

    def __init__(self, kernels: Kernels, x: Tensor) -> None:
        self.kernels, self._x = kernels, x
        self.count, self.width = x.shape
        self.dtype, self.device = x.dtype, x.device

    def rows(self, candidates: Tensor) -> Tensor:
        return self._x[candidates]

    def similarities(self, rows: Tensor, clients: slice) -> Tensor:
        return rows.new_empty(len(rows), 0)


class _Similarities:
    """Similarities of training items to all validation items, where each rank has those of its own."""

    by_all = False

    def __init__(self, costs: TransportCosts) -> None:
        self._costs = costs
        self.count, self.width = costs.shape
        self.clients = self.width
        self.dtype, self.device = costs.dtype, costs.penalty.device
        self.kernels = costs.kernels

    def rows(self, candidates: Tensor) -> Tensor:
        if not len(candidates):
            return torch.empty(0, self.width, dtype=self.dtype, device=self.device)
        return self._costs.similarities(candidates)

    def similarities(self, rows: Tensor, clients: slice) -> Tensor:
        return rows[:, clients]


class _SharedCover:
    """The greedy cover over all ranks; see `flashcoreset.methods.goracs.transport_costs.Cover`."""

    def __init__(self, comm: Communicator, costs: TransportCosts, candidates: Candidates, n: int) -> None:
        self._comm, self._costs, self._n, self.candidates = comm, costs, n, candidates
        source = _Similarities(costs)
        clients = costs.shape[1]
        top, self._nearest = torch.full((clients,), -1.0, dtype=source.dtype), torch.full((clients,), n)
        for rows, s in costs.blocks():
            most, first = s.cpu().max(0)
            first = torch.where(s.cpu() == most, torch.arange(len(s))[:, None], len(s)).amin(0)
            better = most > top
            self._nearest = torch.where(better, first + rows.start + int(candidates.first), self._nearest)
            top = torch.maximum(top, most)
        tops, firsts = comm.gather(top), comm.gather(self._nearest)
        best = tops.amax(0)
        self._nearest = torch.where(tops == best, firsts, n).amin(0)
        self._run = Greedy(
            comm, source, candidates, torch.ones(clients, dtype=torch.float64, device=source.device),
            power_of_gains(clients * max(0.0, float(best.max())), 1.0, source.dtype), 0.0, [], costs.memory_budget,
        )  # fmt: skip
        self.picks = self._run.picks
        self.complete = False

    @property
    def owner(self) -> Tensor:
        # The first pick serves everybody until a better one comes.
        return self._run.owner.clamp_min(0)

    @property
    def serving(self) -> list[int]:
        return self.owner.unique().tolist()

    def nearest_items(self) -> int:
        return len(self._nearest.unique())

    def extend(self, count: int) -> None:
        for _ in range(min(count, self._n - len(self.picks))):
            self._run.pick()
            position = len(self.picks) - 1
            if position and not bool((self._run.owner == position).any()):
                self.complete = True


def _gathered(
    comm: Communicator, costs: TransportCosts, picks: Tensor, starts: list[int], pool: int
) -> list[int]:
    """The numbers of the items that stage 2 chooses from, ascending."""
    n, first = starts[-1], starts[comm.rank]
    if n <= pool:
        return list(range(n))
    clients = costs.shape[1]
    each = max(1, (pool - len(picks)) // (clients * comm.world))
    top = torch.full((0, clients), 0.0, dtype=costs.dtype)
    which = torch.zeros(0, clients, dtype=torch.int64)
    for rows, s in costs.blocks():
        values = torch.cat([top, s.cpu()])
        numbers = torch.cat([which, torch.arange(rows.start, rows.stop)[:, None].expand(-1, clients)])
        order = torch.argsort(values, dim=0, descending=True, stable=True)[:each]
        top, which = values.gather(0, order), numbers.gather(0, order)
    here = which.unique() + first
    everyone = torch.cat([*comm.gather_rows(here), picks.cpu()])
    return everyone.unique().tolist()


def _facts(
    comm: Communicator, penalty: Tensor, items: Tensor, candidates: Candidates, numbers: list[int]
) -> tuple[Tensor, Tensor]:
    """The penalties [r] of any items of a problem and their numbers [r] among all items, on every rank."""
    found = torch.zeros(len(numbers), 2, dtype=torch.int64, device=penalty.device)
    mine = torch.tensor([candidates.is_here(number) for number in numbers], device=penalty.device)
    places = candidates.places([number for number in numbers if candidates.is_here(number)])
    own = torch.stack([penalty.view(torch.int64), items.to(penalty.device)], dim=1)
    found[mine] = own[places.to(penalty.device)]
    found = comm.sum(found)
    return found[:, 0].contiguous().view(torch.float64), found[:, 1]
