"""Stage 2 of GORACS with exact scores: exchanges in the order of their bounds, scored by repairing the transport."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcoreset.methods.goracs.descent import KEPT_BYTES, Options, Progression, pool_rows
from flashcoreset.methods.goracs.transport_costs import TransportCosts
from flashcoreset.transport.backend import Candidates, choose

HELD_BYTES = 2**30
_ENOUGH = 0.9  # the share of the largest decrease that a bound allows with which an exchange is made at once
_TRIES = 32  # exchanges that are tried before the best of them is made
_PATIENCE = 8  # times as many of a late pool's exchanges are tried before all items are bounded anew
_LISTED = 2**17  # exchanges of a pool or a block of items that are listed
_PRICES = 2**25  # bytes of the prices that scores have found, at most
_LAST = 2  # exchanges of all items that are tried at the end, in units of n_candidates^2


def costs_bytes(k: int, sinks: int, size: int) -> int:
    """The bytes of the costs of k members, by rows and by columns, and of what taking over sinks costs them."""
    return 2 * (k + 8) * (sinks + 8) * size + 8 * k * (k + 8) + 200 * (k + sinks)


def transport_bytes(k: int, sinks: int, size: int) -> int:
    """The bytes of the transport of k members: those costs, the ways of units for each member that leaves, twice, what members on paths
    cost, and prices."""
    return costs_bytes(k, sinks, size) + 4 * 8 * k * (k + 8) + _PRICES


@dataclass
class _Pool:
    """Additions whose costs are kept, on the host."""

    items: Tensor  # [p]
    costs: Tensor  # [p, V]


class ExactDescent(Progression):
    """Stage 2 from the picks of stage 1.

    All items are bounded, and the most promising ones form a pool. The pool's exchanges are tried in the order of their bounds; the
    best of the first few is made, or one that leads at once to nearly what the lowest bound allows. What remains of the list goes on,
    until its first exchanges stop helping; then the pool is bounded anew, its bounds are tightened, and all items are bounded for
    another pool. When that does not help either, the exchanges of all items are listed, and the most promising ones are tried; their
    items are the next pool. The end comes when none of these helps with tightened bounds.
    """

    def __init__(self, costs: TransportCosts, picks: Tensor, options: Options) -> None:
        super().__init__(options)
        self._costs, self.subset = costs, picks.clone()
        self._transport = choose(options.backend).Transport(
            torch.cat([costs.costs(rows).cpu() for rows in picks.split(costs.step)])
        )
        self._pool_size = pool_rows(costs.shape[1], options.n_candidates)
        self.solves = 1
        self.scores.append(self._transport.value)
        self.exchanges.append(0)

    @property
    def gap(self) -> float:
        return self._transport.gap

    def run(self, report: Callable[[int], None]) -> None:
        """Makes exchanges; `report` gets their number."""
        self._report = report
        pool: _Pool | None = None
        while not self._is_over():
            fresh = pool is None
            pool = self._best_additions() if pool is None else pool
            if pool is not None and self._exchange_with(pool, (False, True), _TRIES):
                continue
            pool = None
            if fresh:
                break
        self._finish()

    def _finish(self) -> None:
        """Makes exchanges of all items, until the most promising ones do not help."""
        ways = False
        while not self._is_over():
            pool, candidates, complete = self._most_promising(ways)
            made, tried = self._exchange_along(pool, candidates, _LAST * self._options.n_candidates**2)
            if made:
                while self._exchange_with(pool, (False,), _PATIENCE * _TRIES):
                    pass
            elif ways:
                self.stopped = self._spent() or ("certificate" if complete and tried else "candidates")
                return
            ways = not made

    def _is_over(self) -> bool:
        """Whether no more exchanges may be made."""
        if self.exchanges[-1] >= self._options.max_exchanges:
            return True
        if spent := self._spent():
            self.stopped = spent
        return bool(spent)

    def _others(self) -> Tensor:
        """The items that are not members, ascending."""
        free = torch.ones(self._costs.shape[0], dtype=torch.bool, device=self.subset.device)
        free[self.subset] = False
        return free.nonzero()[:, 0]

    def _blocks(self, items: Tensor) -> Iterator[_Pool]:
        """Items with their costs, part by part."""
        for part in items.split(max(1, KEPT_BYTES // (8 * self._costs.shape[1]))):  # whatever the budget
            yield _Pool(part, self._costs.costs(part).cpu())

    def _best_additions(self) -> _Pool | None:
        """The additions with the lowest bounds, or None if no bound is below the score."""
        others = self._others()
        if len(others) == 0:
            return None
        lowest = torch.cat(
            [self._transport.bounds(block.costs, self._goal, 0)[0] for block in self._blocks(others)]
        )
        order = torch.argsort(lowest, stable=True)[: self._pool_size]
        order = order[lowest[order] < self._goal]
        return self._pool_of(others[order.to(others.device)]) if len(order) else None

    def _pool_of(self, items: Tensor) -> _Pool:
        empty = torch.empty(0, self._costs.shape[1], dtype=self._costs.dtype)
        return _Pool(items, torch.cat([empty, *(block.costs for block in self._blocks(items))]))

    def _most_promising(self, ways: bool) -> tuple[_Pool, Candidates, bool]:
        """The additions with the lowest bounds, their exchanges in the order of these bounds, and whether no other exchange
        can help."""
        others = self._others()
        complete, begin = True, 0
        nothing = torch.empty(0, dtype=torch.int64)
        parts = [Candidates(nothing, nothing, nothing.double())]
        for block in self._blocks(others):
            _, listed = self._transport.bounds(block.costs, self._goal, _LISTED, ways)
            complete = complete and len(listed.rows) < _LISTED
            parts.append(listed._replace(rows=listed.rows + begin))
            begin += len(block.items)
        rows, places, bounds = (torch.cat(part) for part in zip(*parts, strict=True))
        order = torch.argsort(bounds, stable=True)
        rows, places, bounds = rows[order], places[order], bounds[order]
        lowest = torch.full((len(others),), math.inf, dtype=torch.float64)
        lowest.scatter_reduce_(0, rows, bounds, "amin")
        chosen = torch.argsort(lowest, stable=True)[: self._pool_size]
        chosen = chosen[lowest[chosen] < self._goal].sort().values
        place_of = torch.full((len(others),), -1)
        place_of[chosen] = torch.arange(len(chosen))
        kept = place_of[rows] >= 0
        candidates = Candidates(place_of[rows[kept]], places[kept], bounds[kept])
        return self._pool_of(others[chosen.to(others.device)]), candidates, complete and bool(kept.all())

    def _exchange_with(self, pool: _Pool, kinds: tuple[bool, ...], patience: int) -> bool:
        """Makes exchanges for items of the pool, listed by bounds of the `kinds`, tightened or not; False if the first `patience` of no
        list help."""
        members = set(self.subset.tolist())
        kept = torch.tensor(
            [row for row, item in enumerate(pool.items.tolist()) if item not in members], dtype=torch.int64
        )
        if len(kept) < len(pool.items):
            pool.items, pool.costs = pool.items[kept.to(pool.items.device)], pool.costs[kept]
        if len(pool.items) == 0 or self.exchanges[-1] >= self._options.max_exchanges:
            return False
        return any(
            self._exchange_along(
                pool, self._transport.bounds(pool.costs, self._goal, _LISTED, ways)[1], patience
            )[0]
            for ways in kinds
        )

    def _exchange_along(self, pool: _Pool, candidates: Candidates, patience: int) -> tuple[bool, bool]:
        """Makes exchanges of the list until `patience` of them one after the other have not helped: (whether some were made, whether
        all were tried)."""
        made, failed = False, 0
        while len(candidates.rows) and failed < patience and self.exchanges[-1] < self._options.max_exchanges:
            score = self.scores[-1]
            index = self._best(pool, candidates)
            if self._spent() or (index is None and made):
                break
            if index is None:
                candidates = Candidates(*(part[_TRIES:] for part in candidates))
                failed += _TRIES
                continue
            row, place = candidates.rows[index], candidates.places[index]
            self._make(pool, int(row), int(place))
            made, failed = True, 0
            # What the others promised, they promise still, roughly; the bounds of the next list are bounds again.
            left = (candidates.rows != row) & (candidates.places != place)
            candidates = Candidates(
                candidates.rows[left],
                candidates.places[left],
                candidates.bounds[left] - (score - self.scores[-1]),
            )
        return made, len(candidates.rows) == 0

    def _best(self, pool: _Pool, candidates: Candidates) -> int | None:
        """The best of the first candidates, or the first that is nearly as good as the lowest bound allows; None if none helps."""
        if self._spent():
            return None
        score = self.scores[-1]
        enough = score - _ENOUGH * (score - float(candidates.bounds[0]))
        allowed = min(_TRIES, self._solves_left())
        best = self._transport.best_exchange(pool.costs, candidates, self._goal, enough, allowed)
        self.solves += best.tried
        # What is best of fewer because no more may be solved would not be made otherwise.
        whole = allowed == _TRIES or best.tried < allowed
        return best.place if best.place >= 0 and (whole or best.value <= enough) else None

    def _make(self, pool: _Pool, row: int, place: int) -> None:
        self.scores.append(self._transport.exchange(place, pool.costs[row]))
        self.subset[place] = pool.items[row]
        self.exchanges.append(self.exchanges[-1] + 1)
        self._report(self.exchanges[-1])
