"""Stage 2 of GORACS with exact scores: exchanges in the order of their bounds, scored by repairing the transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcoreset.methods.goracs.descent import Options, Progression, pool_rows
from flashcoreset.methods.goracs.transport_costs import TransportCosts
from flashcoreset.transport.backend import Candidates, choose

HELD_BYTES = 2**30
_ENOUGH = 0.9  # the share of the largest decrease that a bound allows with which an exchange is made at once
_TRIES = 32  # exchanges that are tried before the best of them is made
_CHUNK = 256  # exchanges that are tried between two looks at the clock


def transport_bytes(k: int, sinks: int, size: int) -> int:
    """The bytes of the transport of k members: their costs by rows and by columns, and what taking over sinks costs them."""
    return 2 * (k + 8) * (sinks + 8) * size + 8 * k * (k + 8) + 200 * (k + sinks)


@dataclass
class _Pool:
    """Additions whose costs are kept, on the host."""

    items: Tensor  # [p]
    costs: Tensor  # [p, V]


class ExactDescent(Progression):
    """Stage 2 from the picks of stage 1.

    All items are bounded, and the most promising ones form a pool. The pool's exchanges are tried in the order of their bounds; the
    best of the first few is made, or one that leads at once to nearly what its bound allows. What remains of the list goes on,
    until its exchanges stop helping; then the pool is bounded anew, and if that does not help, all items are.
    """

    def __init__(self, costs: TransportCosts, picks: Tensor, options: Options) -> None:
        super().__init__(options)
        self._costs, self.subset = costs, picks.clone()
        self._transport = choose(options.backend).Transport(
            torch.cat([costs.costs(rows).cpu() for rows in picks.split(costs.step)])
        )
        self._pool_size = pool_rows(costs.shape[1], options.n_candidates)
        self._limit = 2 * options.n_candidates**2
        self.solves = 1
        self.scores.append(self._transport.value)
        self.exchanges.append(0)

    @property
    def gap(self) -> float:
        return self._transport.gap

    def run(self, report: Callable[[int], None]) -> None:
        """Makes exchanges; `report` gets their number."""
        pool: _Pool | None = None
        while self.exchanges[-1] < self._options.max_exchanges:
            if spent := self._spent():
                self.stopped = spent
                return
            fresh = pool is None
            if pool is None:
                pool = self._best_additions()
            if pool is None:
                self.stopped = "certificate"
                return
            if self._step(pool, report, patient=fresh):
                continue
            if spent := self._spent():
                self.stopped = spent
                return
            if fresh:
                self.stopped = "certificate" if self._is_certain(pool) else "candidates"
                return
            pool = None

    def _others(self) -> Tensor:
        """The items that are not members, ascending."""
        free = torch.ones(self._costs.shape[0], dtype=torch.bool, device=self.subset.device)
        free[self.subset] = False
        return free.nonzero()[:, 0]

    def _best_additions(self) -> _Pool | None:
        """The additions with the lowest bounds, or None if no bound is below the score."""
        others = self._others()
        if len(others) == 0:
            return None
        parts = others.split(self._costs.step)
        lowest = torch.cat(
            [self._transport.bounds(self._costs.costs(items).cpu(), self._goal, 0)[0] for items in parts]
        )
        self._below = int((lowest < self._goal).sum())
        order = torch.argsort(lowest, stable=True)[: self._pool_size]
        order = order[lowest[order] < self._goal]
        if len(order) == 0:
            return None
        items = others[order.to(others.device)]
        return _Pool(
            items, torch.cat([self._costs.costs(part).cpu() for part in items.split(self._costs.step)])
        )

    def _step(self, pool: _Pool, report: Callable[[int], None], patient: bool) -> bool:
        """Makes exchanges for items of the pool; False if no candidate helps, or, unless `patient`, if the first few do not."""
        members = set(self.subset.tolist())
        kept = torch.tensor([row for row, item in enumerate(pool.items.tolist()) if item not in members])
        if len(kept) < len(pool.items):
            pool.items, pool.costs = pool.items[kept.to(pool.items.device)], pool.costs[kept]
        if len(pool.items) == 0:
            return False
        _, candidates = self._transport.bounds(pool.costs, self._goal, self._limit)
        self._listed = len(candidates.rows)
        made = False
        while len(candidates.rows) and self.exchanges[-1] < self._options.max_exchanges:
            score = self.scores[-1]
            enough = score - _ENOUGH * (score - float(candidates.bounds[0]))
            index = self._best(pool, candidates, enough, patient and not made)
            if index is None:
                return made
            row, place = int(candidates.rows[index]), int(candidates.places[index])
            value = self._transport.exchange(place, pool.costs[row])
            self.subset[place] = pool.items[row]
            self.scores.append(value)
            self.exchanges.append(self.exchanges[-1] + 1)
            report(self.exchanges[-1])
            made = True
            # What the others promised, they promise still, roughly; the bounds of the next list are bounds again.
            left = (candidates.rows != row) & (candidates.places != place)
            candidates = Candidates(
                candidates.rows[left], candidates.places[left], candidates.bounds[left] - (score - value)
            )
        return made

    def _best(self, pool: _Pool, candidates: Candidates, enough: float, patient: bool) -> int | None:
        """The exchange to make, or None. `patient`: all candidates are tried if need be."""
        begin, goal = 0, self._goal
        while begin < len(candidates.rows) and self._spent() is None:
            size = _TRIES if begin == 0 else _CHUNK
            allowed = min(size, self._solves_left())
            part = Candidates(*(array[begin : begin + size] for array in candidates))
            wanted = enough if begin == 0 else goal
            best = self._transport.best_exchange(pool.costs, part, goal, wanted, allowed)
            self.solves += best.tried
            # What is best of fewer because no more may be solved would not be made otherwise.
            whole = allowed == size or best.tried < allowed
            if best.index >= 0 and (whole or best.value <= wanted):
                return begin + best.index
            if not patient:
                return None
            begin += size
        return None

    def _is_certain(self, pool: _Pool) -> bool:
        """Whether every exchange whose bound is below the score was tried."""
        return self._below <= len(pool.items) and self._listed < self._limit
