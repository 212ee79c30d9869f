"""GORACS: the training items that stand for a validation set, by optimal transport and gradient norms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.scaling import exponent_into, scale
from flashcoreset._core.tensor import (
    as_integer,
    as_matrix,
    as_number,
    as_vector,
    check_finite,
    compute_dtype,
    one_of,
    promoted,
)
from flashcoreset.facility_location.backend import Kernels, choose
from flashcoreset.methods.goracs.entropic_transport import solve_entropic
from flashcoreset.methods.goracs.exact_transport import CertifiedPlan, load_pot, solve
from flashcoreset.methods.goracs.exchanges import IMPROVEMENT, Exchanges
from flashcoreset.methods.goracs.transport_costs import TransportCosts, cover_bytes, cover_picks

SOLVERS = ("exact", "sinkhorn")
_KEPT_BYTES = 2**24
_POOL = 16  # additions whose costs are kept, as a multiple of n_candidates
_FAILURES = 3  # exchanges that may fail one after the other before all additions are bounded anew
_SHARE = 0.7  # the share of the decrease allowed by its bounds that a step of several exchanges has to reach
_ROUNDING = 1e-5  # how far float32 bounds may be off


def goracs(
    train: Any,
    valid: Any,
    grad_norms: Any,
    k: int,
    *,
    lam: float = 0.5,
    max_exchanges: int = 100,
    n_candidates: int = 30,
    train_labels: Any = None,
    valid_labels: Any = None,
    solver: str = "exact",
    seed: int = 0,
    reg: float = 1e-3,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
) -> Coreset:
    """Takes the k training items that a validation set is transported to at the least cost.

    The cost of a training item s for a validation item v is C_sv: their Euclidean distance, divided by the
    largest of all, less lam * grad_norms_s / max(grad_norms); then shifted and scaled so that C lies in [0, 1].
    The score of k items is the cost of the optimal transport between the uniform distributions on them and on the
    validation items. The score is lowered in two stages:

    1. A greedy k-medoid cover of the validation items goes on until k picks serve at least one of them each,
       and drops picks that serve none. If at most k training items are nearest to any validation item, the cover
       stops at k picks and keeps them all; likewise if the cover is complete before k picks serve.
    2. Members are exchanged for other items. The dual variables of the transport bound from below what each
       exchange would lead to. The pairs of the `n_candidates` most promising removals and additions are tried in
       the order of their bounds; pairs that do not touch the same validation items are tried together, and
       kept if a new transport problem shows a lower score, else halved in number. If none of these pairs helps, as many
       others follow. The stage ends after `max_exchanges`, when no candidate helps, or when no bound of any
       exchange is below the score: then no single exchange helps.

    Args:
        train: [n, d] features of the training items, float16, bfloat16, float32 or float64 (half types compute
            in float32).
        valid: [V, d] features of the validation items, same dtype and device.
        grad_norms: [n] gradient norms of the training items, >= 0.
        k: the number of items to take, 1 <= k <= n.
        lam: weight of the gradient norms, >= 0.
        max_exchanges: the most exchanges to make, >= 0; with labels, in each class.
        n_candidates: the number of removals and of additions to pair, >= 1.
        train_labels: [n] integer class labels. The budget is split by the validation classes' shares
            (`allocate_budgets`, no budget above the class's training items), and each class is a problem of its own.
            A class with a budget of 0 gets no item.
        valid_labels: [V] integer class labels; both or neither.
        solver: "exact" solves transport problems by POT's network simplex, "sinkhorn" by `fc.sinkhorn`,
            whose plan is rounded to a feasible one.
        seed: 0 <= seed < 2^32. Nothing is drawn at random, so the result does not depend on it.
        reg: the regularisation of "sinkhorn", > 0; costs are in [0, 1].
        memory_budget: bytes for costs and lists; the result does not depend on it. The n x V costs are held if
            they take at most half of it, else computed as needed, a few times.
        backend: "cpu", "cuda" or "triton" (on CUDA tensors), "torch" or None: whose kernels compute distances.
        progress: None, True for a bar, or a callable(done, total) that gets picks and exchanges.

    Returns:
        Coreset: `indices` [k] in the order of the picks, an addition in the place of what it replaced; with
        labels class by class, ascending. `weights`: the number of validation items that an item stands for,
        V / k for all, because the transport is uniform (with labels, V and k are those of its class). `info`: "score",
        "scores" (after stage 1, then after each step that was kept), "exchanges" (their number by then),
        "exact_solves" (0 with "sinkhorn", which has "sinkhorn_solves"), "score_error" (by how much the exact
        score may be lower), "picks" (that stage 1 made), "certificate" (whether it is proved that no single
        exchange lowers the score by more than 1e-9), "stopped" ("max_exchanges", "certificate" or
        "candidates": none of the candidates helped), "seconds" ({"cover", "exchange"}). With labels "classes"
        holds these entries for each label, "budgets" the counts, "score" and "score_error" are means by the
        classes' shares (each class has a scale of its own), and the rest are sums or hold for all.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, options out of range, NaN or infinity, `grad_norms` that are negative or, with lam >
            0, all 0, k > n, and a validation class that no training item has.
        ImportError: if `solver` is "exact" and POT is not installed.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Mei, Chen, Yu, Liang and Yang, "GORACS: Group-level Optimal Transport-guided Coreset Selection for
    LLM-based Recommender Systems", KDD 2025; the bound of an exchange differs from the published one (see
    docs/goracs.md).

    Example:
        >>> import torch, flashcoreset as fc
        >>> train = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
        >>> coreset = fc.goracs(train, torch.tensor([[0.5], [1.5], [9.5], [10.5]]), torch.ones(5), 2)
        >>> coreset.indices, coreset.weights, coreset.info["certificate"]
        (tensor([1, 4]), tensor([2., 2.]), True)
    """
    check_backend(backend)
    check_progress(progress)
    one_of(solver, "solver", SOLVERS)
    k = _at_least(k, "k", 1)
    options = _Options(
        lam=as_number(lam, "lam"),
        max_exchanges=_at_least(max_exchanges, "max_exchanges", 0),
        n_candidates=_at_least(n_candidates, "n_candidates", 1),
        solver=solver,
        reg=as_number(reg, "reg"),
        memory_budget=_at_least(memory_budget, "memory_budget", 1),
        backend=backend,
    )
    if options.lam < 0:
        raise ValueError(f"lam must be >= 0, got {lam}")
    if options.reg <= 0:
        raise ValueError(f"reg must be > 0, got {reg}")
    seed = as_integer(seed, "seed")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    x, y = as_matrix(train, "train"), as_matrix(valid, "valid")
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"valid must have {x.shape[1]} columns as train has, got shape {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"valid is on device {y.device}, but train is on {x.device}; move one of them")
    x, y = promoted(x, y)
    n, device = x.shape[0], x.device
    norms = as_vector(grad_norms, "grad_norms", device, integers=False, length=n)
    if k > n:
        raise ValueError(f"k must be <= the {n} rows of train, got {k}")
    if (train_labels is None) != (valid_labels is None):
        missing = "train_labels" if train_labels is None else "valid_labels"
        raise ValueError(f"train_labels and valid_labels must be given together, got {missing}=None")
    labels = None
    if train_labels is not None:
        labels = (
            as_vector(train_labels, "train_labels", device, integers=True, length=n),
            as_vector(valid_labels, "valid_labels", device, integers=True, length=y.shape[0]),
        )
    kernels = choose(backend, device)
    if solver == "exact":
        load_pot()
    check_finite(x, "train")
    check_finite(y, "valid")
    check_finite(norms, "grad_norms")
    if (norms < 0).any():
        place = int((norms < 0).nonzero()[0])
        raise ValueError(f"grad_norms must be >= 0, got {float(norms[place])} at position {place}")
    classes = [(0, torch.arange(n, device=device), torch.arange(len(y), device=device), k)]
    if labels is not None:
        classes = _split(*labels, k)
    if options.lam > 0:
        for label, members, _, _ in classes:
            if not (norms[members] > 0).any():
                where = f" in class {label}" if labels is not None else ""
                raise ValueError(f"grad_norms must not be all 0 with lam > 0{where}, got lam={options.lam}")

    dtype = compute_dtype(x.dtype)
    total = k + len(classes) * options.max_exchanges
    indices, weights, infos, done = [], [], {}, 0
    with Progress(progress, total, "goracs") as bar:
        for label, members, own, count in classes:
            whole = labels is None
            part, clients = (x, y) if whole else (x[members], y[own])
            report = _shifted(bar, done)
            chosen, info = _select(
                part.to(dtype), clients.to(dtype), norms[members], count, options, kernels, report
            )
            indices.append(members[chosen])
            weights.append(torch.full((count,), len(own) / count, dtype=dtype, device=device))
            infos[label] = info
            done += count + options.max_exchanges
            bar.update(done)
    info = infos[0] if labels is None else _together(infos, classes)
    return Coreset(torch.cat(indices), torch.cat(weights), info)


@dataclass(frozen=True)
class _Options:
    lam: float
    max_exchanges: int
    n_candidates: int
    solver: str
    reg: float
    memory_budget: int
    backend: str | None


_Class = tuple[int, Tensor, Tensor, int]  # label, training items, validation items, budget


def _split(train_labels: Tensor, valid_labels: Tensor, k: int) -> list[_Class]:
    """The classes of the validation items, ascending, without those whose budget is 0."""
    present, shares = valid_labels.unique(return_counts=True)
    members = [(train_labels == label).nonzero()[:, 0] for label in present.tolist()]
    sizes = [len(rows) for rows in members]
    for label, size in zip(present.tolist(), sizes, strict=True):
        if size == 0:
            raise ValueError(f"train_labels must hold every class of valid_labels, got none of class {label}")
    if k > sum(sizes):
        raise ValueError(f"k must be <= the {sum(sizes)} rows of train in the classes of valid, got {k}")
    budgets = class_budgets(shares.tolist(), sizes, k)
    return [
        (label, rows, (valid_labels == label).nonzero()[:, 0], count)
        for label, rows, count in zip(present.tolist(), members, budgets, strict=True)
        if count
    ]


def class_budgets(shares: list[int], sizes: list[int], k: int) -> list[int]:
    """`k` divided by `shares`, none above its size: what a full class cannot take is divided among the others."""
    budgets = [0] * len(sizes)
    free = list(range(len(sizes)))
    while True:
        left = k - sum(budgets[group] for group in range(len(sizes)) if group not in free)
        # allocate_budgets caps a group at its share; a multiple of all shares divides in the same way and never reaches the cap.
        factor = k + 1
        counts = allocate_budgets([shares[group] * factor for group in free], left).tolist()
        full = [group for group, count in zip(free, counts, strict=True) if count > sizes[group]]
        if not full:
            for group, count in zip(free, counts, strict=True):
                budgets[group] = count
            return budgets
        for group in full:
            budgets[group] = sizes[group]
        free = [group for group in free if group not in full]


def _together(infos: dict[int, dict[str, Any]], classes: list[_Class]) -> dict[str, Any]:
    served = sum(len(own) for _, _, own, _ in classes)
    parts = [(infos[label], len(own) / served) for label, _, own, _ in classes]
    return {
        "score": sum(info["score"] * share for info, share in parts),
        "score_error": sum(info["score_error"] * share for info, share in parts),
        "exact_solves": sum(info["exact_solves"] for info, _ in parts),
        "sinkhorn_solves": sum(info["sinkhorn_solves"] for info, _ in parts),
        "picks": sum(info["picks"] for info, _ in parts),
        "certificate": all(info["certificate"] for info, _ in parts),
        "seconds": {
            stage: sum(info["seconds"][stage] for info, _ in parts) for stage in ("cover", "exchange")
        },
        "budgets": {label: count for label, _, _, count in classes},
        "classes": infos,
    }


def _shifted(bar: Progress, done: int) -> Callable[[int], None]:
    return lambda more: bar.update(done + more)


def _select(
    train: Tensor,
    valid: Tensor,
    norms: Tensor,
    k: int,
    options: _Options,
    kernels: Kernels,
    report: Callable[[int], None],
) -> tuple[Tensor, dict[str, Any]]:
    """The chosen rows [k] of one problem and what is known about them."""
    start = time.perf_counter()
    # Scaled so that they stay finite times lam.
    norms = scale(norms, exponent_into(float(norms.max()), (-1100, 500)))
    penalty = options.lam * norms / norms.max() if options.lam else torch.zeros_like(norms)
    costs = TransportCosts(train, valid, penalty, kernels, options.memory_budget)
    picks, made = cover_picks(costs, k, report)
    report(k)
    covered = time.perf_counter()
    descent = _Descent(costs, picks, options)
    descent.run(lambda exchanges: report(k + exchanges))
    end = time.perf_counter()
    solves = {"exact": 0, "sinkhorn": 0} | {options.solver: descent.solves}
    info = {
        "score": descent.scores[-1],
        "scores": descent.scores,
        "exchanges": descent.exchanges,
        "score_error": descent.transport.gap,
        "exact_solves": solves["exact"],
        "sinkhorn_solves": solves["sinkhorn"],
        "picks": made,
        "certificate": descent.stopped == "certificate",
        "stopped": descent.stopped,
        "seconds": {"cover": covered - start, "exchange": end - covered},
    }
    return descent.subset, info


def pool_rows(sinks: int, n_candidates: int) -> int:
    """The number of additions whose costs are kept, whatever the budget, because the exchanges must not depend on that."""
    return max(n_candidates, min(_POOL * n_candidates, _KEPT_BYTES // (8 * sinks)))


class _Members:
    """The costs of a subset's members, [k, V]: held if they take at most a quarter of the budget, as float64 if
    that fits too."""

    def __init__(self, costs: TransportCosts, subset: Tensor) -> None:
        self._costs, self.subset = costs, subset
        self.sinks = costs.shape[1]
        size = costs.costs(subset[:1]).element_size()
        entries = len(subset) * self.sinks
        # Independent of the budget, on which the dual variables, and so the exchanges, must not depend.
        self._step = max(1, min(128, _KEPT_BYTES // (8 * self.sinks)))
        self._held: Tensor | None = None
        for width, dtype in ((8, torch.float64), (size, None)):
            if self._held is None and entries * width <= costs.memory_budget // 4:
                parts = [costs.costs(rows) for rows in subset.split(self._step)]
                self._held = torch.cat([part if dtype is None else part.to(dtype) for part in parts])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, len(self.subset), self._step):
            rows = slice(begin, min(begin + self._step, len(self.subset)))
            yield rows, self._costs.costs(self.subset[rows]) if self._held is None else self._held[rows]

    def exchange(self, places: Tensor, items: Tensor) -> None:
        """Puts `items` in the `places` of members."""
        self.subset = self.subset.index_copy(0, places, items)
        if self._held is not None:
            self._held[places] = self._costs.costs(items).to(self._held.dtype)


@dataclass
class _Pool:
    """Additions whose costs are kept."""

    items: Tensor  # [p]
    costs: Tensor  # [p, V]


_Pair = tuple[int, int, float]  # place of the removal, row of the addition in the pool, bound


class _Descent:
    """Stage 2 from the picks of stage 1."""

    def __init__(self, costs: TransportCosts, picks: Tensor, options: _Options) -> None:
        self._costs, self._options = costs, options
        self._members = _Members(costs, picks)
        self.solves = 0
        k, sinks = len(picks), costs.shape[1]
        self.transport = self._solve(torch.zeros(k, dtype=torch.float64, device=picks.device))
        self.scores, self.exchanges = [self.transport.value], [0]
        self.stopped = "max_exchanges"
        self._width = options.n_candidates
        self._tried: set[tuple[int, int]] = set()
        self._pool_size = pool_rows(sinks, options.n_candidates)

    @property
    def subset(self) -> Tensor:
        return self._members.subset

    def _solve(self, u: Tensor, cells: tuple[Tensor, Tensor] | None = None) -> CertifiedPlan:
        self.solves += 1
        if self._options.solver == "exact":
            return solve(self._members.blocks, u, self._members.sinks, cells)
        return solve_entropic(
            self._members.blocks, u, self._members.sinks, self._options.reg, self._options.backend
        )

    def run(self, report: Callable[[int], None]) -> None:
        pool: _Pool | None = None
        while self.exchanges[-1] < self._options.max_exchanges:
            bounds = Exchanges(self._members.blocks, self.transport.u, self._members.sinks)
            fresh = pool is None
            if pool is None:
                pool = self._best_additions(bounds)
            if pool is not None and self._step(bounds, pool, patient=fresh):
                report(self.exchanges[-1])
                self._tried.clear()
            elif fresh:
                self.stopped = "certificate" if self._is_certain(bounds) else "candidates"
                return
            else:
                pool = None

    def _others(self) -> Tensor:
        """The items that are not members, ascending."""
        free = torch.ones(self._costs.shape[0], dtype=torch.bool, device=self.subset.device)
        free[self.subset] = False
        return free.nonzero()[:, 0]

    def _best_additions(self, bounds: Exchanges) -> _Pool | None:
        """The additions with the lowest bounds, or None if no bound is below the score."""
        others = self._others()
        if len(others) == 0:
            return None
        parts = others.split(self._costs.step)
        lowest = torch.cat([bounds.bounds(self._costs.costs(items))[0].amin(1) for items in parts])
        order = torch.argsort(lowest, stable=True)[: self._pool_size]
        items = others[order[lowest[order] < self.scores[-1] - IMPROVEMENT]]
        if len(items) == 0:
            return None
        return _Pool(items, torch.cat([self._costs.costs(part) for part in items.split(self._costs.step)]))

    def _step(self, bounds: Exchanges, pool: _Pool, patient: bool) -> bool:
        """Makes exchanges that lower the score; False if no candidate does, or, unless `patient`, if the first few do not."""
        values, y = self._screen(bounds, pool)
        pairs = self._candidates(values)
        failures, beyond = 0, False
        while patient or failures < _FAILURES:
            if not pairs:
                if not patient or beyond:
                    break
                # No pair of candidates helps: as many other pairs follow, from all removals and additions.
                pairs, beyond = self._lowest(self._screen(bounds, pool)[0]), True
                continue
            batch = self._apart(bounds, pool, pairs, y)
            places = torch.tensor([place for place, _, _ in batch], device=self.subset.device)
            rows = torch.tensor([row for _, row, _ in batch], device=self.subset.device)
            before = self.subset[places]
            self._members.exchange(places, pool.items[rows])
            u = self.transport.u.index_copy(0, places, y[rows].double())
            trial = self._solve(u, self.transport.cells)
            promised = sum(self.scores[-1] - bound for _, _, bound in batch) if len(batch) > 1 else 0.0
            if trial.value < self.scores[-1] - max(IMPROVEMENT, _SHARE * promised):
                self.transport = trial
                self.scores.append(trial.value)
                self.exchanges.append(self.exchanges[-1] + len(batch))
                self._width = min(2 * self._width, self._options.n_candidates)
                return True
            self._members.exchange(places, before)
            if len(batch) > 1:
                self._width = len(batch) // 2
            else:
                failures += 1
                place, row, _ = pairs.pop(0)
                self._tried.add((place, int(pool.items[row])))
        return False

    def _screen(self, bounds: Exchanges, pool: _Pool) -> tuple[Tensor, Tensor]:
        """Bounds [p, k] of the pool's exchanges, infinite if an exchange was tried or the item is a member by now; y
        [p]."""
        values, y = bounds.bounds(pool.costs)
        row_of = {item: row for row, item in enumerate(pool.items.tolist())}
        for place, item in self._tried:
            if item in row_of:
                values[row_of[item], place] = float("inf")
        members = set(self.subset.tolist())
        values[[row for item, row in row_of.items() if item in members]] = float("inf")
        return values, y

    def _candidates(self, values: Tensor) -> list[_Pair]:
        """Pairs of the removals and the additions with the lowest bounds."""
        count = self._options.n_candidates
        rows = torch.argsort(values.amin(1), stable=True)[:count]
        places = torch.argsort(values.amin(0), stable=True)[:count]
        chosen = torch.full_like(values, float("inf"))
        chosen[rows[:, None], places] = values[rows[:, None], places]
        return self._lowest(chosen)

    def _lowest(self, values: Tensor) -> list[_Pair]:
        """The n_candidates^2 pairs with the lowest bounds below the score, lowest first."""
        row, place = (values < self.scores[-1] - IMPROVEMENT).nonzero(as_tuple=True)
        below = values[row, place]
        order = torch.argsort(below, stable=True)[: self._options.n_candidates**2]
        return list(zip(place[order].tolist(), row[order].tolist(), below[order].tolist(), strict=True))

    def _apart(self, bounds: Exchanges, pool: _Pool, pairs: list[_Pair], y: Tensor) -> list[_Pair]:
        """The first of `pairs`, and further ones that share no item and no validation item with those before."""
        room = min(self._width, self._options.max_exchanges - self.exchanges[-1])
        batch: list[_Pair] = []
        taken: Tensor | None = None
        used_places: set[int] = set()
        used_rows: set[int] = set()
        for place, row, bound in pairs:
            if len(batch) == room:
                break
            if place in used_places or row in used_rows:
                continue
            touched = bounds.touched(place, pool.costs[row], y[row])
            if taken is not None and (touched & taken).any():
                continue
            taken = touched if taken is None else touched | taken
            batch.append((place, row, bound))
            used_places.add(place)
            used_rows.add(row)
        return batch

    def _is_certain(self, bounds: Exchanges) -> bool:
        """Whether the greatest bound of every exchange is at the score or above, or the exchange was tried."""
        goal = self.scores[-1] - IMPROVEMENT
        for items in self._others().split(self._costs.step):
            costs = self._costs.costs(items)
            low = bounds.bounds(costs)[0] < goal + _ROUNDING
            for row in low.any(1).nonzero()[:, 0].tolist():
                for places in low[row].nonzero()[:, 0].split(64):
                    below = bounds.greatest_bounds(places, costs[row]) < goal
                    for place in places[below].tolist():
                        # A failed trial proves nothing if the score itself is not exact.
                        if self._options.solver != "exact" or (place, int(items[row])) not in self._tried:
                            return False
        return True


def _at_least(value: Any, name: str, least: int) -> int:
    number = as_integer(value, name)
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}")
    return number


@register_estimate("goracs")
def _estimate(
    train: Any,
    valid: Any,
    grad_norms: Any = None,
    k: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    lam: float = 0.5,
    max_exchanges: int = 100,
    n_candidates: int = 30,
    train_labels: Any = None,
    valid_labels: Any = None,
    solver: str = "exact",
    seed: int = 0,
    reg: float = 1e-3,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Any = None,
) -> int:
    """The bytes of one call; see `memory_estimate`. With labels, as if all items were of one class, which takes the most."""
    check_backend(backend)
    one_of(solver, "solver", SOLVERS)
    k = _at_least(k, "k", 1)
    n_candidates = _at_least(n_candidates, "n_candidates", 1)
    memory_budget = _at_least(memory_budget, "memory_budget", 1)
    dtype = as_dtype(dtype)
    n, d = as_shape(train, "train")
    clients, width = as_shape(valid, "valid")
    if width != d:
        raise ValueError(f"valid must have {d} columns as train has, got shape {(clients, width)}")
    if k > n:
        raise ValueError(f"k must be <= the {n} rows of train, got {k}")
    size = compute_dtype(dtype).itemsize
    copies = (n + clients) * d * size if dtype.itemsize < size or train_labels is not None else 0
    # The kernel packs its inputs.
    packed = (clients + 2 * 128) * d * size
    members = min(memory_budget // 4, 8 * k * clients)
    pool = min(n, pool_rows(clients, n_candidates))
    # For the pool, when the bounds of all its pairs are computed: costs, reduced costs, and the costs of the removals.
    screening = pool * (6 * clients * size + 3 * k * size)
    problem = 500 * (k + clients) * 8 + 8 * _KEPT_BYTES
    if solver == "sinkhorn":
        problem += 6 * 8 * k * clients
    cover = cover_bytes(n, clients, d, size, memory_budget)
    held = n * clients * size if n * clients * size <= memory_budget // 2 else 0
    return copies + packed + max(cover, held + members + screening + problem) + 200 * (n + clients)
