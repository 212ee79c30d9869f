"""Gains of candidates that live anywhere, over the clients that are here, by torch's operations: on any device.

`flashcoreset.facility_location.backend.PartialGains` says what each method does; `csrc/cpu/partial_gains.cpp` is the same for CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHORT, _SHARE = 1024, 10  # a list has a tenth of all pairs at the most, or this many
_OVERHEAD = 64  # what a list costs beside its pairs, in pairs


class PartialGains:
    def __init__(self, clients: int, dtype: torch.dtype, device: torch.device, entries: int) -> None:
        self._device, self._most = device, entries
        self._longest = max(_SHORT, clients // _SHARE)
        self._lists: dict[int, tuple[Tensor, Tensor]] = {}  # clients and similarities of live pairs
        self._entries = 0
        self._listing = False
        self._counts = torch.empty(0, dtype=torch.int64, device=device)
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self, rows: int, listing: bool) -> None:
        self._listing, self._found = listing, []
        self._counts = torch.zeros(rows, dtype=torch.int64, device=self._device)

    def add(self, s: Tensor, first: int, best: Tensor, weights: Tensor, sums: Tensor) -> None:
        some = slice(first, first + s.shape[1])
        gaps = s - best[some]
        sums += gaps.clamp(min=0).mul_(weights[some]).to(torch.int64).sum(1)
        if not self._listing:
            return
        live = gaps > 0
        self._counts += live.sum(1)
        live &= (self._counts <= self._longest)[:, None]
        row, client = live.nonzero(as_tuple=True)
        self._found.append((row, client + first, s[row, client]))

    def keep(self, numbers: list[int]) -> None:
        if self._found:
            row, client, values = (torch.cat(column) for column in zip(*self._found, strict=True))
            order = torch.argsort(row, stable=True)
            counts = torch.bincount(row, minlength=len(numbers)).tolist()
            whole = (self._counts <= self._longest).tolist()
            for j, own, is_whole in zip(numbers, order.split(counts), whole, strict=True):
                if is_whole:
                    self.forget(j)
                    self._lists[j] = client[own], values[own]
                    self._entries += len(own) + _OVERHEAD
            while self._entries > self._most:
                self.forget(next(iter(self._lists)))
        self._listing, self._found = False, []

    def has(self, number: int) -> bool:
        return number in self._lists

    def evaluate(self, numbers: list[int], best: Tensor, weights: Tensor) -> Tensor:
        lists = [self._lists[j] for j in numbers]
        lengths = torch.tensor([len(values) for _, values in lists])
        which = torch.repeat_interleave(torch.arange(len(numbers)), lengths).to(self._device)
        clients, values = (torch.cat(column) for column in zip(*lists, strict=True))
        terms = (values - best[clients]).clamp_min_(0).mul_(weights[clients]).to(torch.int64)
        return torch.zeros(len(numbers), dtype=torch.int64, device=self._device).index_add_(0, which, terms)

    def win(self, number: int, position: int, best: Tensor, owner: Tensor) -> None:
        clients, values = self._lists[number]
        better = values > best[clients]
        best[clients[better]] = values[better]
        owner[clients[better]] = position

    def forget(self, number: int) -> None:
        if number in self._lists:
            self._entries -= len(self._lists.pop(number)[0]) + _OVERHEAD
