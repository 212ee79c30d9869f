"""Stage 2 of GORACS from nothing but solves: exchanges that lower the score, chosen by their bounds and certified by a solve each. What
Sinkhorn iterations score, and exact transport too large for `exact_descent`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcoreset.methods.goracs.entropic_transport import solve_entropic
from flashcoreset.methods.goracs.exact_transport import CertifiedPlan, solve
from flashcoreset.methods.goracs.exchanges import IMPROVEMENT, Exchanges
from flashcoreset.methods.goracs.transport_costs import TransportCosts

KEPT_BYTES = 2**24
_POOL = 16  # additions whose costs are kept, as a multiple of n_candidates
_FAILURES = 3  # exchanges that may fail one after the other before all additions are bounded anew
_SHARE = 0.7  # the share of the decrease allowed by its bounds that a step of several exchanges has to reach
_ROUNDING = 1e-5  # how far float32 bounds may be off


@dataclass(frozen=True)
class Options:
    """What bounds and shapes the exchanges; the arguments of `goracs` of these names.

    Attributes:
        deadline: the time of `time.perf_counter` at which no further transport problem is begun, or None.
    """

    lam: float
    max_exchanges: int
    n_candidates: int
    solver: str
    reg: float
    memory_budget: int
    backend: str | None
    norm_scale: str
    max_solves: int | None
    tol: float
    deadline: float | None = None


def pool_rows(sinks: int, n_candidates: int) -> int:
    """The number of additions whose costs are kept, whatever the budget, because the exchanges must not depend on that."""
    return max(n_candidates, min(_POOL * n_candidates, KEPT_BYTES // (8 * sinks)))


class Progression:
    """How far stage 2 has come, and what ends it.

    Attributes:
        scores: after stage 1, then after each step.
        exchanges: their number by then.
        solves: how many transport problems were solved.
        stopped: what ended the run.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.scores: list[float] = []
        self.exchanges: list[int] = []
        self.solves = 0
        self.stopped = "max_exchanges"

    @property
    def _goal(self) -> float:
        """The score that an exchange has to fall below."""
        return self.scores[-1] - max(IMPROVEMENT, self._options.tol * self.scores[-1])

    def _solves_left(self) -> int:
        most = self._options.max_solves
        return sys.maxsize if most is None else most - self.solves

    def _spent(self) -> str | None:
        """What forbids to begin another transport problem, or None."""
        if self._solves_left() <= 0:
            return "max_solves"
        if self._options.deadline is not None and time.perf_counter() >= self._options.deadline:
            return "time_limit"
        return None


class _Members:
    """The costs of a subset's members, [k, V]: held if they take at most a quarter of the budget, as float64 if
    that fits too."""

    def __init__(self, costs: TransportCosts, subset: Tensor) -> None:
        self._costs, self.subset = costs, subset
        self.sinks = costs.shape[1]
        size = costs.costs(subset[:1]).element_size()
        entries = len(subset) * self.sinks
        # Independent of the budget, on which the dual variables, and so the exchanges, must not depend.
        self._step = max(1, min(128, KEPT_BYTES // (8 * self.sinks)))
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


class Descent(Progression):
    """Stage 2 from the picks of stage 1."""

    def __init__(self, costs: TransportCosts, picks: Tensor, options: Options) -> None:
        super().__init__(options)
        self._costs = costs
        self._members = _Members(costs, picks)
        k, sinks = len(picks), costs.shape[1]
        self.transport = self._solve(torch.zeros(k, dtype=torch.float64, device=picks.device))
        self.scores, self.exchanges = [self.transport.value], [0]
        self._width = options.n_candidates
        self._tried: set[tuple[int, int]] = set()
        self._pool_size = pool_rows(sinks, options.n_candidates)

    @property
    def subset(self) -> Tensor:
        return self._members.subset

    @property
    def gap(self) -> float:
        return self.transport.gap

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
            if spent := self._spent():
                self.stopped = spent
                return
            bounds = Exchanges(self._members.blocks, self.transport.u, self._members.sinks)
            fresh = pool is None
            if pool is None:
                pool = self._best_additions(bounds)
            if pool is not None and self._step(bounds, pool, patient=fresh):
                report(self.exchanges[-1])
                self._tried.clear()
            elif spent := self._spent():
                self.stopped = spent
                return
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
        items = others[order[lowest[order] < self._goal]]
        if len(items) == 0:
            return None
        return _Pool(items, torch.cat([self._costs.costs(part) for part in items.split(self._costs.step)]))

    def _step(self, bounds: Exchanges, pool: _Pool, patient: bool) -> bool:
        """Makes exchanges that lower the score; False if no candidate does, or, unless `patient`, if the first few do not."""
        values, y = self._screen(bounds, pool)
        pairs = self._candidates(values)
        failures, beyond = 0, False
        while (patient or failures < _FAILURES) and self._spent() is None:
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
            if trial.value < min(self._goal, self.scores[-1] - _SHARE * promised):
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
        row, place = (values < self._goal).nonzero(as_tuple=True)
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
        goal = self._goal
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
