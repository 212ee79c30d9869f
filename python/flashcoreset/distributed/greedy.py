"""The exact greedy sequence over candidates and clients that are spread over ranks.

    gain(j) = sum over ranks of sum_i trunc(max(0, s(j, i) - best_i) * (w_i * scale))

is a sum of 64-bit integers, so the ranks' parts add up to the bits that one machine finds, and the picks are its picks.

lazy: gains only fall, so an old one bounds the new one. Each candidate's bound is kept by its own rank. The candidates of the
highest bounds stand in a *front* that all ranks know, together with the best entry that does not (`rest`): as long as the top of the
front beats `rest`, no rank has to be asked. A pick evaluates candidates from the top of the front, a batch at a time, until the best
fresh gain beats every bound left.

Per batch: one exchange of those rows that the ranks do not hold yet (a broadcast if it is one row), one sum of a 64-bit integer per
candidate; the front is filled up now and then by a gathering of `FRONT` bounds per rank. Each rank keeps the rows of recent
candidates, and for each of them the list of clients that it can still win, which is what its next evaluation reads.

Before the first pick every candidate is evaluated once: each row goes to every rank, n * d numbers per rank in all.

limits: a candidate's own rank closes it, and says so when the candidate is evaluated, by a part that makes the sum negative. So with
limits no old bound is taken for a gain, not even one of 0.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.progress import Progress
from flashcoreset.distributed.checkpoint import Part
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.sources import Source

if TYPE_CHECKING:
    from flashcoreset.distributed.limits import ShardLimits

FRONT = 64  # bounds that a rank adds to the front at a time
_MOST_FRONT = 1 << 14
_SEGMENT = 1 << 14  # first gains that are recorded together
_BATCH = 256  # candidates that are evaluated together at the most
_BLOCK = 1 << 18  # similarities that are computed together
_TENSOR = 600  # bytes that a row takes beside its numbers
_IS_CLOSED = -(1 << 62)  # gains are below 2^62

_INTEGERS = {4: torch.int32, 8: torch.int64}


class Candidates:
    """Which rank a candidate lives on, by its number among all.

    Args:
        starts: [world + 1] the number of each rank's first row, and how many rows there are.
        rank: this rank.
        numbers: [count] int64 on the CPU, ascending: the candidates of this rank, numbers of rows.
    """

    def __init__(self, starts: list[int], rank: int, numbers: Tensor) -> None:
        self._starts, self._rank = starts, rank
        self.first = starts[rank]
        self.numbers = numbers.numpy()

    def rank_of(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1

    def is_here(self, number: int) -> bool:
        return self.rank_of(number) == self._rank

    def places(self, numbers: list[int]) -> Tensor:
        """Places among this rank's candidates, of some of them."""
        return torch.from_numpy(np.searchsorted(self.numbers, np.asarray(numbers, dtype=np.int64)))


class SharedRows:
    """The rows of any candidates, on every rank, and their similarities to this rank's clients."""

    def __init__(self, comm: Communicator, source: Source, candidates: Candidates) -> None:
        self.comm, self.source, self.candidates = comm, source, candidates

    def fetch(self, numbers: list[int]) -> Tensor:
        """The rows [r, width] of candidates."""
        source, comm = self.source, self.comm
        if comm.world == 1:
            return source.rows(self.candidates.places(numbers).to(source.device))
        rows = torch.zeros(len(numbers), source.width, dtype=source.dtype, device=source.device)
        mine = [place for place, j in enumerate(numbers) if self.candidates.is_here(j)]
        if mine:
            own = self.candidates.places([numbers[place] for place in mine])
            rows[torch.tensor(mine, device=rows.device)] = source.rows(own.to(source.device))
        owners = {self.candidates.rank_of(j) for j in numbers}
        if len(owners) == 1:
            return comm.broadcast(rows, owners.pop())
        # A sum of one rank's bits and zeros: integers, since -0.0 + 0.0 would lose a sign.
        return comm.sum(rows.view(_INTEGERS[rows.element_size()])).view(source.dtype)

    def blocks(self, rows: int) -> list[slice]:
        step = max(64, _BLOCK // max(1, rows))
        m = self.source.clients
        return [slice(begin, min(begin + step, m)) for begin in range(0, m, step)]

    def similarities(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The similarities of candidates, given by their rows, block by block of the clients."""
        for some in self.blocks(len(rows)):
            yield some, self.source.similarities(rows, some)


class Greedy:
    """A greedy run that all ranks advance together.

    Args:
        comm: the ranks.
        source: this rank's candidates and clients.
        candidates: the numbers of all candidates.
        weights: [clients] float64 of the clients evaluated here.
        scale: what makes gains integers.
        floor: the similarity from which gains are counted.
        preselected: numbers of candidates that are chosen already.
        memory_budget: bytes for rows and lists, the same on every rank.
        client_of: the client evaluated here that a candidate is, by its number, or -1; None if clients are no candidates.
        record: what was finished before, and is finished now.
        limits: what is closed, and what candidates are compared by; None for neither.
        first_gains: [candidates here] int64, of a run that began in the same way; None to find them.
        evaluates: whether there will be picks; else the preselected are covered, and that is all.
    """

    def __init__(
        self,
        comm: Communicator,
        source: Source,
        candidates: Candidates,
        weights: Tensor,
        scale: float,
        floor: float,
        preselected: list[int],
        memory_budget: int,
        client_of: Callable[[int], int] | None = None,
        record: Part | None = None,
        limits: ShardLimits | None = None,
        first_gains: np.ndarray | None = None,
        evaluates: bool = True,
    ) -> None:
        self._client_of, self._record, self._limits = client_of, record, limits
        self._comm, self._source, self._candidates = comm, source, candidates
        self.shared = SharedRows(comm, source, candidates)
        m, dtype, device = source.clients, source.dtype, source.device
        self._scale, self._scaled_weights = scale, (weights * scale).to(dtype)
        self.floor = torch.tensor(floor, dtype=dtype, device=device)
        self.best = self.floor.expand(m).clone()
        self.owner = torch.full((m,), -1, dtype=torch.int64, device=device)
        self.picks: list[int] = []
        self.gains: list[int] = []
        self.per_pick: list[tuple[int, int]] = []  # bytes and collectives
        self.evaluations = 0
        self._serves_itself: list[tuple[int, int]] = []  # own client, position of the pick
        size = dtype.itemsize
        self._most_rows = max(2 * _BATCH, memory_budget // 2 // (source.width * size + _TENSOR))
        self._rows: OrderedDict[int, Tensor] = OrderedDict()
        self._partial = source.kernels.PartialGains(m, dtype, device, memory_budget // 2 // (8 + size))
        self._before: Tensor | None = None
        # The bounds [count] of candidates that live here and are not in the front; -1 of those that are closed or in it.
        self._bound = np.zeros(source.count, dtype=np.int64)
        self._front: list[tuple[int, int]] = []  # a heap of (-bound, number)
        self._stamp: dict[int, int] = {}  # after how many picks the bound of a number was exact
        self._rest: tuple[int, int] | None = (
            None  # (-bound, number) of the best entry that is not in the front
        )
        for begin in range(0, len(preselected), _BATCH):
            self._cover(preselected[begin : begin + _BATCH])
        self.first_gains: np.ndarray | None = None
        self._is_closed = np.zeros(source.count if limits is not None else 0, dtype=bool)
        if not evaluates:
            return
        if first_gains is None:
            self._sweep()
        else:
            self._bound = first_gains.copy()
        before = [] if record is None else record.picks()
        if limits is not None:
            if limits.is_repeated:
                self.first_gains = self._bound.copy()
            self._bound = limits.own_keys(self._bound)
            self._close(limits.closed())
            limits.tell([number for number, _ in before])
        taken = [*preselected, *(number for number, _ in before)]
        here = [j for j in taken if candidates.is_here(j)]
        self._bound[candidates.places(here).numpy()] = -1
        for number, gain in before:
            self._commit(number, gain)
            self.per_pick.append((0, 0))
        self._refill()

    # ---- rows

    def _known_rows(self, numbers: list[int]) -> Tensor:
        """The same, from those that are held; all ranks hold the same ones."""
        missing = [j for j in numbers if j not in self._rows]
        if missing:
            for j, row in zip(missing, self.shared.fetch(missing), strict=True):
                self._rows[j] = row.clone()  # a view would keep the whole batch
        for j in numbers:
            self._rows.move_to_end(j)
        found = torch.stack([self._rows[j] for j in numbers])
        while len(self._rows) > self._most_rows:
            self._rows.popitem(last=False)
        return found

    # ---- gains

    def _gains(self, rows: Tensor, numbers: list[int] | None = None) -> Tensor:
        """This rank's parts [r] int64 of the gains of candidates, given by their rows; with `numbers` they may leave lists."""
        self._partial.begin(len(rows), numbers is not None)
        gains = torch.zeros(len(rows), dtype=torch.int64, device=self.best.device)
        for some, s in self.shared.similarities(rows):
            self._partial.add(s, some.start, self.best, self._scaled_weights, gains)
        if numbers is not None:
            self._partial.keep(numbers)
        self.evaluations += len(rows)
        return gains

    def _sweep(self) -> None:
        """The gains of all candidates, but for those that are on record."""
        source, comm, record = self._source, self._comm, self._record
        todo = np.arange(source.count)
        if record is not None:
            known, self._bound = record.first_gains(self._candidates.numbers)
            todo = np.flatnonzero(~known)
        counts = comm.gather(torch.tensor([len(todo)]))[:, 0].tolist()
        for rank, count in enumerate(counts):
            mine = rank == comm.rank
            if not (source.by_all or mine):
                continue
            for first in range(0, count, _SEGMENT):
                last = min(first + _SEGMENT, count)
                for begin in range(first, last, _BATCH):
                    end = min(begin + _BATCH, last)
                    if mine:
                        rows = source.rows(torch.from_numpy(todo[begin:end]).to(source.device))
                    else:
                        rows = torch.empty(
                            end - begin, source.width, dtype=source.dtype, device=source.device
                        )
                    if source.by_all:
                        gains = comm.sum(self._gains(comm.broadcast(rows, rank)))
                    else:
                        gains = self._gains(rows)
                    if mine:
                        self._bound[todo[begin:end]] = gains.cpu().numpy()
                if mine and record is not None:
                    some = todo[first:last]
                    record.keep_first_gains(self._candidates.numbers[some], self._bound[some])

    def _evaluate(self, numbers: list[int]) -> tuple[list[int], list[int]]:
        """Fresh gains of candidates of the front, and what they are compared by, which is negative for closed ones."""
        if self._source.by_all:
            rows, places = self._known_rows(numbers), list(range(len(numbers)))
        else:
            places = [place for place, j in enumerate(numbers) if self._candidates.is_here(j)]
            own = self._candidates.places([numbers[place] for place in places])
            rows = self._source.rows(own.to(self.best.device))
        gains = torch.zeros(len(numbers), dtype=torch.int64, device=self.best.device)
        if places:
            parts = self._partial_gains([numbers[place] for place in places], rows)
            gains[torch.tensor(places, device=gains.device)] = parts
        if self._limits is None:
            found = self._comm.sum(gains).tolist()
            return found, found
        self._limits.tell(numbers)
        here = [place for place, j in enumerate(numbers) if self._candidates.is_here(j)]
        is_closed = self._is_closed[self._candidates.places([numbers[place] for place in here]).numpy()]
        closed = torch.tensor(here, dtype=torch.int64)[torch.from_numpy(is_closed)]
        gains[closed.to(gains.device)] = _IS_CLOSED
        gains = self._comm.sum(gains)
        return gains.tolist(), self._limits.keys(numbers, gains).tolist()

    def _partial_gains(self, numbers: list[int], rows: Tensor) -> Tensor:
        """This rank's parts [r] int64 of the gains of candidates, some of which have lists."""
        listed = [place for place, j in enumerate(numbers) if self._partial.has(j)]
        others = sorted(set(range(len(numbers))).difference(listed))
        gains = torch.empty(len(numbers), dtype=torch.int64, device=self.best.device)
        if listed:  # before the others, whose lists may take the place of these
            found = self._partial.evaluate([numbers[i] for i in listed], self.best, self._scaled_weights)
            gains[torch.tensor(listed, device=gains.device)] = found
        if others:
            at = torch.tensor(others, device=gains.device)
            gains[at] = self._gains(rows[at], [numbers[i] for i in others])
        return gains

    # ---- the front

    def _refill(self) -> None:
        """Each rank's best candidates that are not in the front come into it."""
        bound = self._bound
        count = min(FRONT + 1, len(bound))
        chosen = np.empty(0, dtype=np.int64)
        if count:
            least = np.partition(bound, len(bound) - count)[len(bound) - count]
            above = np.flatnonzero(bound > least)
            equal = np.flatnonzero(bound == least)[: count - len(above)]
            chosen = np.concatenate([above, equal])
            chosen = chosen[bound[chosen] >= 0]
            chosen = chosen[np.lexsort((chosen, -bound[chosen]))]
        told = torch.full((FRONT + 1, 2), -1, dtype=torch.int64)
        told[: len(chosen), 0] = torch.from_numpy(bound[chosen])
        told[: len(chosen), 1] = torch.from_numpy(self._candidates.numbers[chosen])
        bound[chosen[:FRONT]] = -1
        rest = None
        for part in self._comm.gather(told).tolist():
            for value, number in part[:FRONT]:
                if number >= 0:
                    heapq.heappush(self._front, (-value, number))
            value, number = part[FRONT]
            if number >= 0 and (rest is None or (-value, number) < rest):
                rest = -value, number
        self._rest = rest

    def _trim(self) -> None:
        if len(self._front) <= _MOST_FRONT:
            return
        self._front.sort()
        for value, number in self._front[_MOST_FRONT // 2 :]:
            if self._candidates.is_here(number):
                self._bound[self._candidates.places([number]).numpy()] = -value
            self._stamp.pop(number, None)
        if self._limits is not None:
            self._bound[self._is_closed] = -1
        dropped = self._front[_MOST_FRONT // 2]
        del self._front[_MOST_FRONT // 2 :]
        self._rest = dropped if self._rest is None else min(self._rest, dropped)

    def _top(self) -> tuple[int, int] | None:
        """(-bound, number) of the best entry of all, which is in the front then."""
        while self._rest is not None and (not self._front or self._rest < self._front[0]):
            self._refill()
        return self._front[0] if self._front else None

    # ---- picks

    def pick(self, stop_gain: float | None = None) -> int:
        """Makes one pick, if its gain is at least `stop_gain`; returns it, or -1 if none was made, which ends the run."""
        comm, now = self._comm, len(self.picks)
        before = comm.bytes, comm.collectives
        is_strict = self._limits is not None and self._limits.is_strict
        best: tuple[int, int] | None = None
        gain_of: dict[int, int] = {}
        taken: list[tuple[int, int]] = []
        size = 8
        while True:
            batch: list[int] = []
            while len(batch) < size:
                top = self._top()
                if top is None or (best is not None and best < top):
                    break
                heapq.heappop(self._front)
                if not is_strict and (self._stamp.get(top[1], 0) == now or top[0] == 0):
                    best = top
                    taken.append(top)
                else:
                    batch.append(top[1])
            if not batch:
                break
            for j, gain, key in zip(batch, *self._evaluate(batch), strict=True):
                if key < 0:
                    self._partial.forget(j)
                    continue
                self._stamp[j], gain_of[j] = now, gain
                taken.append((-key, j))
                if best is None or (-key, j) < best:
                    best = -key, j
            size = min(2 * size, _BATCH)
        if best is None:
            return -1
        for entry in taken:
            if entry != best:
                heapq.heappush(self._front, entry)
        self._trim()
        gain = gain_of.get(best[1], -best[0])
        if stop_gain is not None and self.told(gain) < stop_gain:
            return -1
        self._commit(best[1], gain)
        self.per_pick.append((comm.bytes - before[0], comm.collectives - before[1]))
        return best[1]

    def told(self, gain: int) -> float:
        """A gain in the unit of the similarities."""
        return gain / self._scale if gain else 0.0

    def step(
        self,
        count: int,
        progress: Progress | None = None,
        done: int = 0,
        stop_gain: float | None = None,
        left_out: float = 0.0,
    ) -> None:
        """Makes picks until there are `count`, or before the first gain below `stop_gain`; the first gain is told with `left_out`
        added to it."""
        while len(self.picks) < count:
            least = stop_gain if stop_gain is None or self.picks else stop_gain - left_out
            if self.pick(least) < 0:
                return
            if self._record is not None:
                self._record.keep_picks(self.picks, self.gains)
            if progress is not None:
                progress.update(done + len(self.picks))

    def _similarities(self, rows: Tensor) -> Tensor:
        parts = [s for _, s in self.shared.similarities(rows)]
        return torch.cat(parts, 1) if parts else rows.new_empty(len(rows), 0)

    def _cover(self, numbers: list[int]) -> None:
        """Clients are covered by the preselected, which are no picks."""
        s = self._similarities(self.shared.fetch(numbers)).amax(0)
        self._before = s if self._before is None else torch.maximum(self._before, s)
        self.best = torch.maximum(self.best, s)

    def _commit(self, number: int, gain: int) -> None:
        position, source = len(self.picks), self._source
        row = (self._known_rows if source.by_all else self.shared.fetch)([number])
        if source.by_all and self._partial.has(number):
            self._partial.win(number, position, self.best, self.owner)
        else:
            s = self._similarities(row)[0]
            better = s > self.best
            self.best = torch.where(better, s, self.best)
            self.owner[better] = position
        own = -1 if self._client_of is None else self._client_of(number)
        if own >= 0:
            itself = source.similarities(row, slice(own, own + 1))[0, 0]
            if self._before is None or not self._before[own] > itself:
                self._serves_itself.append((own, position))
        self.picks.append(number)
        self.gains.append(gain)
        self._partial.forget(number)
        if self._limits is not None:
            self._close(self._limits.after_pick(number, row))

    def _close(self, places: Tensor) -> None:
        """Candidates that live here are not picked from now on."""
        self._is_closed[places.numpy()] = True
        self._bound[places.numpy()] = -1

    def assignment(self) -> Tensor:
        """[clients] the position of the pick that serves each client evaluated here, or -1; a pick serves itself."""
        owner = self.owner.clone()
        for client, position in self._serves_itself:
            owner[client] = position
        return owner
