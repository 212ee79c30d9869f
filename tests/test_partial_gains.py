"""Gains over some of the clients, and the lists of live pairs, against sums over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import on_device
from conftest import EVERY_BACKEND, SANITIZED
from torch import Tensor

from flashcoreset._core import native
from flashcoreset.facility_location.backend import PartialGains, choose

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ROOM = 1 << 20  # pairs


def gains_of(s: Tensor, best: Tensor, weights: Tensor) -> list[int]:
    """Each row's sum of trunc(max(0, s - best) weight), pair by pair, each step rounded to the type."""
    s, best, weights = (t.cpu().numpy() for t in (s, best, weights))
    zero = np.zeros((), s.dtype)
    return [sum(int(max(zero, v - b) * w) for v, b, w in zip(row, best, weights, strict=True)) for row in s]


class Clients:
    """Similarities [n, m] of candidates, and what the clients have."""

    def __init__(self, n: int, m: int, dtype: torch.dtype, backend: str, entries: int = ROOM) -> None:
        random = torch.Generator().manual_seed(n + m)
        device = on_device(torch.empty(0)).device
        self.s = torch.randn(n, m, generator=random, dtype=torch.float64).to(dtype).to(device)
        self.best = torch.full((m,), 0.5, dtype=dtype, device=device)
        # Of all magnitudes, so that the sums need all bits.
        exponents = torch.randint(0, 40, (m,), generator=random).double()
        self.weights = (
            (torch.rand(m, generator=random, dtype=torch.float64) * 2**exponents).to(dtype).to(device)
        )
        self.owner = torch.full((m,), -1, dtype=torch.int64, device=device)
        kernels = choose(backend, device)
        self.partial: PartialGains = kernels.PartialGains(m, dtype, device, entries)

    def evaluate(self, numbers: list[int], width: int, listing: bool = True) -> list[int]:
        """Sums over blocks of `width` clients, after which the candidates may have lists."""
        sums = torch.zeros(len(numbers), dtype=torch.int64, device=self.s.device)
        self.partial.begin(len(numbers), listing)
        for first in range(0, self.s.shape[1], width):
            block = self.s[numbers][:, first : first + width]
            self.partial.add(block, first, self.best, self.weights, sums)
        if listing:
            self.partial.keep(numbers)
        return sums.tolist()

    def listed(self, numbers: list[int]) -> list[int]:
        return self.partial.evaluate(numbers, self.best, self.weights).tolist()

    def expected(self, numbers: list[int]) -> list[int]:
        return gains_of(self.s[numbers], self.best, self.weights)


@EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("listing", [False, True])
def test_gains_are_sums_over_all_pairs(listing: bool, dtype: torch.dtype, backend: str) -> None:
    """For any blocks; 1,500 clients, since float32 sums are folded every 512 vectors and on the way a row has more pairs than its list."""
    for m, width in ((1, 1), (7, 3), (64, 64), (1500, 1000), (20_000, 20_000)):
        clients = Clients(5, m, dtype, backend)
        assert clients.evaluate([3, 0, 4], width, listing) == clients.expected([3, 0, 4])


@EVERY_BACKEND
@DTYPES
def test_lists_give_the_same_sums_while_bests_rise(dtype: torch.dtype, backend: str) -> None:
    clients = Clients(12, 900, dtype, backend)
    numbers = [4, 9, 1, 7]
    clients.evaluate(numbers, 128)
    assert all(clients.partial.has(j) for j in numbers)
    for position, j in enumerate([4, 1]):
        own, before = clients.s[j], clients.best.clone()
        clients.partial.win(j, position, clients.best, clients.owner)
        torch.testing.assert_close(clients.best, torch.maximum(before, own), rtol=0, atol=0)
        assert torch.equal(clients.owner == position, own > before)
        clients.partial.forget(j)
        assert not clients.partial.has(j)
        for some in ([9, 7], [7]):  # twice, since lists shrink while they are read
            assert clients.listed(some) == clients.expected(some)
    clients.best[:] = clients.s.amax()
    assert clients.listed([7, 9]) == [0, 0]
    assert clients.listed([7, 9]) == [0, 0]


@EVERY_BACKEND
@DTYPES
def test_candidates_with_many_live_pairs_have_no_list(dtype: torch.dtype, backend: str) -> None:
    clients = Clients(4, 3000, dtype, backend)
    clients.s[1] += 9  # all pairs of the candidate are live
    numbers = [0, 1, 2]
    assert clients.evaluate(numbers, 256) == clients.expected(numbers)
    assert [clients.partial.has(j) for j in numbers] == [True, False, True]
    assert clients.listed([2, 0]) == clients.expected([2, 0])


@EVERY_BACKEND
@DTYPES
def test_the_newest_lists_stay(dtype: torch.dtype, backend: str) -> None:
    """With room for some 5 of 20 lists of about 300 pairs."""
    clients = Clients(20, 1000, dtype, backend, entries=1800)
    for j in range(20):
        assert clients.evaluate([j], 1000) == clients.expected([j])
    held = [j for j in range(20) if clients.partial.has(j)]
    assert held == list(range(20 - len(held), 20))
    assert 4 <= len(held) <= 6
    assert clients.listed(held) == clients.expected(held)
    clients.evaluate([held[-1]], 1000)  # a candidate has one list
    assert clients.listed([held[-1]]) == clients.expected([held[-1]])


@EVERY_BACKEND
def test_lists_of_no_pairs_take_room_too(backend: str) -> None:
    clients = Clients(60, 20, torch.float32, backend, entries=1000)
    clients.best[:] = clients.s.max()
    for j in range(60):
        clients.evaluate([j], 20)
    assert 1 <= sum(clients.partial.has(j) for j in range(60)) <= 31


@EVERY_BACKEND
def test_no_room_and_no_clients(backend: str) -> None:
    clients = Clients(3, 50, torch.float32, backend, entries=0)
    assert clients.evaluate([0, 2], 50) == clients.expected([0, 2])
    assert not clients.partial.has(0)
    clients.partial.forget(0)
    empty = Clients(3, 0, torch.float32, backend)
    assert empty.evaluate([0, 1], 1) == [0, 0]


@pytest.mark.skipif(SANITIZED, reason="a sanitizer ends the process if it is asked for too much memory")
def test_lists_that_memory_ends_for() -> None:
    """A batch goes on without lists if there is no memory for them; some systems grant any."""
    partial = native.module().PartialGains(10_000_000, "float32", 2**48, 1)
    is_granted = True
    try:
        partial.begin(100_000, True)
    except MemoryError:
        is_granted = False
    s, best, sums = torch.ones(100_000, 2), torch.zeros(10_000_000), torch.zeros(100_000, dtype=torch.int64)
    partial.add(s, 5, best, torch.ones(10_000_000), sums)
    assert sums.unique().tolist() == [2]
    partial.keep(torch.arange(100_000))
    assert partial.has(3) == is_granted
