"""The costs of GORACS, C [n, V], without the matrix: rows on demand, and the greedy cover.

    C_sv = (D_sv / max D - p_s - low) / (high - low)        D: Euclidean distances; low, high: C in [0, 1]

max D is the largest of these distances, or one that the caller gives.

One pass over D yields max D and every row's extremes, from which low and high follow. Rows are computed in
blocks by the `pairwise` kernel, whose values do not depend on the block, so nothing here depends on
`memory_budget`.

The cover is facility location of the similarities 1 - C, which come from no metric because of p. If they do not
fit into the budget, its first picks are made by lazy evaluation of streamed rows, with the gains of the kernels:
sums of integers. A similarity that does not exceed what its validation item has reached cannot matter again.
As soon as the other similarities fit, one pass lists them, and the kernel goes on with the sparse matrix; what was
reached is one more row of the matrix, preselected. So the picks are those that the dense matrix would give, bit for bit. (A
list of all entries above a fixed threshold would change the first picks, and l1 or a further coordinate cannot
express p.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import Csr
from flashcoreset.facility_location import cpu
from flashcoreset.facility_location.backend import Kernels, choose
from flashcoreset.facility_location.gains import gain_scale
from flashcoreset.facility_location.problem import Problem

_BLOCK_BYTES, _LEAST_BYTES = 2**24, 2**18
# Largest distances for which that distance and those 2^-20 times as long have squares that are normal numbers.
_SAFE = {torch.float32: (-40, 60), torch.float64: (-400, 500)}
_SAMPLE = 128  # rows from which the share of live similarities is estimated


def block_rows(columns: int, size: int, memory_budget: int) -> int:
    """The rows of a block: with its temporaries a block takes about a quarter of the budget, or a small size anyway."""
    return max(1, min(_BLOCK_BYTES, max(_LEAST_BYTES, memory_budget // 16)) // (columns * size))


def list_capacity(rows: int, columns: int, size: int, memory_budget: int) -> int:
    """The number of live similarities that may be listed: entries of 8 + size bytes, held twice while they are put together, in
    half of the budget, or as many as are small beside the arguments."""
    return max(rows + columns, memory_budget // 2 // (2 * (8 + size)))


def cover_bytes(n: int, clients: int, d: int, size: int, memory_budget: int) -> int:
    """The bytes that TransportCosts and Cover take at their peak."""
    pairs = n * clients * size
    held = pairs if pairs <= memory_budget // 2 else 0
    lists = 0 if held else 2 * (8 + size) * min(list_capacity(n, clients, size, memory_budget), n * clients)
    sample = 0 if held else min(n, _SAMPLE) * clients * size
    block = 4 * min(n, block_rows(clients, size, memory_budget)) * clients * 8
    return held + lists + sample + memory_budget // 4 + block + 150 * n + 64 * clients + 2**22


class TransportCosts:
    """Similarities 1 - C [n, V] and costs C of training and validation items.

    Args:
        train: [n, d] float32 or float64.
        valid: [V, d], the same type.
        penalty: [n] float64, what is subtracted from the distances divided by the largest; or a function that makes it of the
            items' mean distances [n], so divided.
        kernels: those of facility location.
        memory_budget: bytes; the similarities are held if they take at most half of it.
        largest: what distances are divided by; None: the largest of them.
        most: the largest of a number of all parts, if the training items are one part of several; there may be none of them.

    Attributes:
        penalty: [n] float64.
        dtype: the type of similarities and costs.
        mean_distance: [n] float64, each training item's mean distance, divided.
        low, spread: D / max D - p is in [low, low + spread].
    """

    def __init__(
        self,
        train: Tensor,
        valid: Tensor,
        penalty: Tensor | Callable[[Tensor], Tensor],
        kernels: Kernels,
        memory_budget: int,
        *,
        largest: float | None = None,
        most: Callable[[float], float] = float,
    ) -> None:
        self._train, self._valid, self.kernels = train, valid, kernels
        self.memory_budget, self.dtype = memory_budget, train.dtype
        self.shape = (train.shape[0], valid.shape[0])
        self.dtype = train.dtype
        n, clients = self.shape
        size = train.element_size()
        self.step = block_rows(clients, size, memory_budget)
        fits = n * clients * size <= memory_budget // 2
        held = train.new_empty(n, clients) if fits else None
        self.held: Tensor | None = None

        def largest_of(values: Tensor) -> float:
            return most(float(values.max()) if len(values) else -math.inf)

        nearest, farthest, total = self._extremes(held)
        own = largest_of(farthest)
        exponent = 0
        # Costs are shares of the largest distance: a power of two, which brings squares into range, changes none.
        least, greatest = _SAFE[train.dtype]
        if not 2.0**least < own < 2.0**greatest and (
            exponent := exponent_into(most(largest_magnitude(train, valid)), (least, greatest - 10))
        ):
            self._train, self._valid = scale(train, exponent), scale(valid, exponent)
            nearest, farthest, total = self._extremes(held)
            own = largest_of(farthest)
        self.largest = times_power(own, -exponent) if largest is None else largest
        unit_distance = own if largest is None else times_power(largest, exponent)
        per_distance = 1 / unit_distance if unit_distance else 0.0
        self.mean_distance = total * (per_distance / clients)
        self.penalty = penalty = penalty if isinstance(penalty, Tensor) else penalty(self.mean_distance)
        self.low = low = -largest_of(penalty - nearest * per_distance)
        self.spread = largest_of(farthest * per_distance - penalty) - low
        unit = 1 / self.spread if self.spread > 0 else 0.0
        base = self._base_of(penalty)
        self._exponent, self._per_distance = exponent, per_distance
        self._slope = per_distance * unit
        self._base = base.to(train.dtype)
        # Bounds of the sums of a row's similarities: each similarity, and the sum of distances (which torch takes in
        # a cascade), is off by a few units of its last place.
        slack = 64 * torch.finfo(train.dtype).eps * clients
        self._sums = (clients * base - self._slope * total).clamp_min_(0) + slack
        if held is not None:
            for begin in range(0, n, self.step):
                rows = slice(begin, begin + self.step)
                self._to_similarities(held[rows], self._base[rows])
            self.held = held

    def _base_of(self, penalty: Tensor) -> Tensor:
        return 1 + (penalty + self.low) * (1 / self.spread) if self.spread > 0 else torch.ones_like(penalty)

    def of_items(self, train: Tensor, penalty: Tensor) -> TransportCosts:
        """The costs of other training items [r, d] with penalties [r], on the same scale; not for a `Cover`."""
        others = copy(self)
        others._train, others.penalty, others.held = scale(train, self._exponent), penalty, None
        others.shape = (train.shape[0], self.shape[1])
        others._base = self._base_of(penalty).to(train.dtype)
        others.mean_distance = others._extremes(None)[2] * (self._per_distance / self.shape[1])
        return others

    def _extremes(self, held: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's least and largest distance and the sum of its distances, [n] float64; the distances are written to `held` [n, V]."""
        nearest, farthest, total = self._train.new_empty(3, self.shape[0], dtype=torch.float64)
        for begin in range(0, self.shape[0], self.step):
            rows = slice(begin, begin + self.step)
            d = self._distances(rows, None if held is None else held[rows])
            nearest[rows], farthest[rows] = d.amin(1).double(), d.amax(1).double()
            # torch shares out the sum of a single row among its threads, whose number would show in the last bits.
            total[rows] = (d if len(d) > 1 else d.expand(2, -1)).sum(1).double()[: len(d)]
        return nearest, farthest, total

    def _distances(self, rows: slice | Tensor, out: Tensor | None = None) -> Tensor:
        return self.kernels.pairwise(self._train[rows], self._valid, metric="euclidean", out=out)

    def _to_similarities(self, distances: Tensor, base: Tensor) -> Tensor:
        # One rounding after another, never fused, whatever the block.
        return distances.mul_(-self._slope).add_(base[:, None]).clamp_(0, 1)

    def similarities(self, rows: slice | Tensor) -> Tensor:
        """The similarities 1 - C of some rows, [r, V]; not to be written to."""
        if self.held is not None:
            return self.held[rows]
        return self._to_similarities(self._distances(rows), self._base[rows])

    def costs(self, rows: slice | Tensor) -> Tensor:
        """The costs C of some rows, [r, V]."""
        return 1 - self.similarities(rows)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The similarities of all rows, block by block."""
        for begin in range(0, self.shape[0], self.step):
            rows = slice(begin, min(begin + self.step, self.shape[0]))
            yield rows, self.similarities(rows)

    def sum_bounds(self) -> Tensor:
        """Bounds [n] float64, for each row a number not below the sum of its similarities."""
        return self._sums


def largest_distance(
    train: Tensor,
    valid: Tensor,
    kernels: Kernels,
    memory_budget: int,
    most: Callable[[float], float] = float,
) -> float:
    """The largest Euclidean distance of a training and a validation item; `most` as in `TransportCosts`."""
    step = block_rows(len(valid), train.element_size(), memory_budget)

    def farthest(x: Tensor, y: Tensor) -> float:
        blocks = x.split(step) if len(x) else ()
        largest = (float(kernels.pairwise(rows, y, metric="euclidean").max()) for rows in blocks)
        return most(max(largest, default=-math.inf))

    largest = farthest(train, valid)
    least, greatest = _SAFE[train.dtype]
    if 2.0**least < largest < 2.0**greatest:
        return largest
    exponent = exponent_into(most(largest_magnitude(train, valid)), (least, greatest - 10))
    return times_power(farthest(scale(train, exponent), scale(valid, exponent)), -exponent)


class Cover:
    """The greedy cover of the validation items, advanced pick by pick.

    Attributes:
        picks: training items in the order in which they were picked.
        owner: [V] int64, the place in `picks` of the pick that serves each validation item (the earlier of equals).
        complete: whether no training item would serve any validation item at a smaller cost.
    """

    def __init__(self, costs: TransportCosts) -> None:
        self._costs = costs
        n, clients = costs.shape
        device, dtype = costs.sum_bounds().device, costs.similarities(slice(0, 1)).dtype
        self.picks: list[int] = []
        self.owner = torch.full((clients,), -1, dtype=torch.int64, device=device)
        self.complete = False
        self._best = torch.zeros(clients, dtype=dtype, device=device)
        self._nearest: Tensor | None = None
        self._run: Any = None
        self._run_picks = 0
        if costs.held is not None:
            self._run = costs.kernels.FacilityLocation(
                Problem(costs.held, metric="precomputed", memory_budget=costs.memory_budget // 4)
            )
            return
        ones = torch.ones(clients, dtype=torch.float64, device=device)
        # The largest similarity is 1, so this is the scale that the kernel finds.
        scale = gain_scale(ones, ones, "precomputed", dtype)
        self._scaled_weights = (ones * scale).to(dtype)
        self._bounds = (costs.sum_bounds() * scale).ceil_().to(torch.int64)
        count = max(1, min(n, _SAMPLE, costs.memory_budget // 16 // (clients * dtype.itemsize)))
        rows = torch.linspace(0, n - 1, count, dtype=torch.float64).round_().to(device, torch.int64)
        self._sample = costs.similarities(rows)
        self._capacity = list_capacity(n, clients, dtype.itemsize, costs.memory_budget)
        self._wanted_share = 0.8 * self._capacity / (n * clients)

    @property
    def serving(self) -> list[int]:
        """The places in `picks` of the picks that serve at least one validation item, ascending."""
        return self.owner[self.owner >= 0].unique().tolist()

    def nearest_items(self) -> int:
        """How many training items are nearest to any validation item (the lowest of equals)."""
        if self._nearest is None:
            self._list_live(capacity=0)
        assert self._nearest is not None
        return len(self._nearest.unique())

    def extend(self, count: int) -> None:
        """Makes up to `count` further picks."""
        count = min(count, self._costs.shape[0] - len(self.picks))
        while self._run is None and count:
            if float((self._sample > self._best).double().mean()) <= self._wanted_share:
                self._run = self._sparse_run()
            if self._run is None:
                self._serve([self._streamed_pick()])
                count -= 1
        if count:
            self._serve(self._kernel_picks(count))

    def _serve(self, picks: list[int]) -> None:
        for begin in range(0, len(picks), self._costs.step):
            some = picks[begin : begin + self._costs.step]
            rows = self._costs.similarities(torch.tensor(some, device=self.owner.device))
            for pick, row in zip(some, rows, strict=True):
                better = row > self._best
                if not self.picks:
                    better = torch.ones_like(better)
                elif not better.any():
                    self.complete = True
                self.owner[better] = len(self.picks)
                self._best = torch.where(better, row, self._best)
                self.picks.append(pick)

    def _streamed_pick(self) -> int:
        """The candidate of the largest gain: stale gains are upper bounds, so only candidates are evaluated whose gains
        reach the largest fresh one."""
        fresh = torch.zeros_like(self._bounds, dtype=torch.bool)
        self._bounds[self.picks] = -1
        size = 16
        while True:
            reached = int(torch.where(fresh, self._bounds, 0).max())
            stale = (~fresh & (self._bounds >= reached)).nonzero()[:, 0]
            if len(stale) == 0:
                return int((fresh & (self._bounds == reached)).nonzero()[0])
            batch = stale[torch.argsort(self._bounds[stale], descending=True, stable=True)[:size]]
            self._bounds[batch] = self._gains(self._costs.similarities(batch))
            fresh[batch] = True
            size = min(2 * size, self._costs.step)

    def _gains(self, similarities: Tensor) -> Tensor:
        terms = (similarities - self._best).clamp_min_(0).mul_(self._scaled_weights)
        return terms.to(torch.int64).sum(1)

    def _list_live(self, capacity: int) -> Csr | None:
        """The similarities that exceed what is reached, or None if there are more than `capacity`; the last row is
        what is reached. Also finds the nearest items."""
        n, clients = self._costs.shape
        device = self.owner.device
        most = torch.full_like(self._best, -1)
        nearest = torch.zeros_like(self.owner)
        counts = torch.zeros(n + 2, dtype=torch.int64, device=device)
        columns: list[Tensor] = []
        values: list[Tensor] = []
        total = 0
        for rows, s in self._costs.blocks():
            top = s.amax(0)
            numbers = torch.arange(rows.start, rows.stop, device=device)[:, None]
            for column in (top > most).nonzero()[:, 0].split(4096):
                first = torch.where(s[:, column] == top[column], numbers, n).amin(0)
                nearest[column] = first
            most = torch.maximum(most, top)
            if total <= capacity and capacity:
                live = s > self._best
                counts[rows.start + 1 : rows.stop + 1] = live.sum(1)
                total += int(counts[rows.start + 1 : rows.stop + 1].sum())
                if total > capacity:
                    columns, values = [], []
                    continue
                columns.append(live.nonzero()[:, 1])
                values.append(s[live])
        self._nearest = nearest
        if total > capacity or not capacity:
            return None
        counts[n + 1] = clients
        columns.append(torch.arange(clients, device=device))
        values.append(self._best)
        return Csr(counts.cumsum(0), torch.cat(columns), torch.cat(values), (n + 1, clients))

    def _sparse_run(self) -> Any:
        live = self._list_live(self._capacity)
        if live is None:
            self._wanted_share /= 2  # the sample was not like the rest
            return None
        n = self._costs.shape[0]
        fixed = torch.tensor([*self.picks, n], dtype=torch.int64, device=self.owner.device)
        # Only these two backends take sparse matrices.
        kernels = self._costs.kernels
        if kernels is not cpu:
            kernels = choose("torch", self.owner.device)
        del self._sample, self._bounds
        self._live = live  # the kernel reads the matrix in place
        budget = self._costs.memory_budget // 4
        return kernels.FacilityLocation(
            Problem(live, metric="precomputed", preselected=fixed, memory_budget=budget)
        )

    def _kernel_picks(self, count: int) -> list[int]:
        done, dtype, device = self._run_picks, self._best.dtype, self.owner.device
        total = self._run.step(count)
        indices = torch.empty(total, dtype=torch.int64, device=device)
        gains = torch.empty(total, dtype=dtype, device=device)
        self._run.finish(indices, gains, torch.empty_like(gains), torch.empty_like(self.owner))
        self._run_picks = total
        return indices[done:].tolist()


class Picks(Protocol):
    """A cover that `cover_picks` extends; see `Cover`."""

    picks: list[int]
    complete: bool

    @property
    def owner(self) -> Tensor: ...

    @property
    def serving(self) -> list[int]: ...

    def nearest_items(self) -> int: ...

    def extend(self, count: int) -> None: ...


def cover_picks(cover: Picks, items: int, k: int, report: Any = None) -> tuple[Tensor, int]:
    """Stage 1 of GORACS: the `k` picks of a cover by `items` training items that are kept, in the order in which they were made, and
    how many were made.

    `report(done)` gets the number of picks that serve a validation item.
    """
    cover.extend(k)
    kept = cover.serving
    if len(kept) < k and cover.nearest_items() > k:
        # A pick adds at most one to the picks that serve, so their number never passes k.
        while len(kept) < k and not cover.complete and len(cover.picks) < items:
            if report is not None:
                report(len(kept))
            cover.extend(k - len(kept))
            kept = cover.serving
    places = kept if len(kept) == k else range(k)
    return torch.tensor([cover.picks[place] for place in places], device=cover.owner.device), len(cover.picks)
