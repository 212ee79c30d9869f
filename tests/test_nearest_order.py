"""The nearest orders and their rounds, compiled and reference, against a brute force over the whole
similarity matrix.
"""

from __future__ import annotations

import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcoreset._core import native
from flashcoreset.nearest_order import Rounds, reference
from flashcoreset.nearest_order.backend import Taken
from flashcoreset.nearest_order.cpu import NearestOrder

CLASSES = [NearestOrder, reference.NearestOrder]


def brute_force(s: np.ndarray, k: int) -> tuple[list[list[int]], list[float]]:
    """All rounds until k items are taken: the items of each, in the order of the lists, and its value."""
    n, lists = s.shape
    orders = [np.argsort(-s[:, c], kind="stable") for c in range(lists)]
    taken: set[int] = set()
    rounds, values = [], []
    while len(taken) < min(k, n):
        new: list[int] = []
        total = 0.0
        for c in range(lists):
            item = next(int(i) for i in orders[c] if i not in taken)
            total += float(s[item, c])
            if item not in new:
                new.append(item)
        taken |= set(new)
        rounds.append(new)
        values.append(total / lists)
    return rounds, values


def check_takers(
    s: torch.Tensor, taken: list[int], items: torch.Tensor, counts: list[int], takers: torch.Tensor
) -> None:
    """Every item's taker is the first list whose best free item it is."""
    free = np.ones(len(s), dtype=bool)
    free[taken] = False
    for own, lists in zip(items.split(counts), takers.split(counts), strict=True) if counts else ():
        best = np.where(free[:, None], s.double().numpy(), -np.inf).argmax(0).tolist()
        assert lists.tolist() == [best.index(item) for item in own.tolist()]
        free[own.numpy()] = False


def run(cls: type, s: torch.Tensor, k: int, lengths: list[int], cuts: list[int], count: int = 3) -> tuple:
    """The rounds from given similarities that arrive in pieces, with lists of the given length in each pass
    (the last of them in all further ones).
    """
    order = cls.of_similarities(s.shape[1], s.dtype)
    rounds: list[list[int]] = []
    values: list[float] = []
    taken: list[int] = []
    for number in range(s.shape[0] + 1):
        order.begin(lengths[min(number, len(lengths) - 1)])
        for piece in s.tensor_split(cuts):
            order.update_similarities(piece)
        assert order.finish() == s.shape[0]
        while True:
            items, counts, new_values, takers, similarities = order.rounds(count, k)
            assert len(takers) == len(similarities) == len(items)
            assert similarities.tolist() == s[items, takers].double().tolist()
            check_takers(s, taken, items, counts, takers)
            taken += items.tolist()
            rounds += [part.tolist() for part in items.split(counts)] if counts else []
            values += new_values
            if not counts:
                break
        if order.taken >= min(k, s.shape[0]):
            return rounds, values
    raise AssertionError("a pass did not bring the selection forward")


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int, list[int], list[int]]:
    n, lists = draw(st.integers(1, 60)), draw(st.integers(1, 40))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: many ties
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    s = rng.integers(-levels, levels + 1, (n, lists)) / levels
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    lengths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return torch.from_numpy(s).to(dtype), draw(st.integers(1, n)), lengths, cuts


@pytest.mark.parametrize("cls", CLASSES)
@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_rounds_match_brute_force(cls: type, problem: tuple) -> None:
    s, k, lengths, cuts = problem
    assert run(cls, s, k, lengths, cuts) == brute_force(s.numpy(), k)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_isas_and_threads_agree(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", lambda: native.load_isa(isa))
    generator = torch.Generator().manual_seed(1)
    # Several slices, several cuts of a list, a width that fills no vector, and many ties.
    s = torch.randint(-50, 50, (9000, 97), generator=generator).to(dtype) / 64
    s[4000:] += 0.5  # later items are better: the worst case for the thresholds
    expected = brute_force(s.numpy(), 700)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert run(NearestOrder, s, 700, [40, 100], [5, 6000]) == expected
            assert run(NearestOrder, s, 700, [700], []) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (97, 13, 33), (1025, 100, 64), (300, 25, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_similarities_from_features(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "module", lambda: native.load_isa(isa))
    n, lists, d = shape
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    x[n // 2] = 0
    centroids = reference.normalize_rows(torch.randn(lists, d, generator=generator, dtype=dtype))
    exact = reference.similarities(x.double(), centroids.double())
    orders = []
    for cuts in ([], [1, n // 3, n // 3 + 1]):
        order = NearestOrder(centroids)
        order.begin(n)
        for piece in x.tensor_split(cuts):
            order.update(piece)
        order.finish()
        orders.append([order.order(c) for c in range(lists)])
    worst = 0.0
    for c, (items, values) in enumerate(orders[0]):
        assert torch.equal(items, orders[1][c][0])
        assert torch.equal(values, orders[1][c][1])
        assert sorted(items.tolist()) == list(range(n))
        assert bool((values.diff() <= 0).all())
        worst = max(worst, float((values.double() - exact[items, c]).abs().max()))
    # A cosine is a sum of products of magnitude at most 1 in all. Worst seen: 1.1e-7 and 2.3e-16.
    assert worst <= (4e-7 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_magnitudes(cls: type, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    row = torch.tensor([3.0, 4.0, 0.0], dtype=dtype)
    scales = [1.0, info.max / 4, info.tiny, info.smallest_normal * info.eps, 0.0]
    x = torch.stack([row * scale for scale in scales])
    order = cls(torch.tensor([[0.6, 0.8, 0.0]], dtype=dtype))
    order.begin(len(scales))
    order.update(x)
    order.finish()
    items, values = order.order(0)
    found = dict(zip(items.tolist(), values.tolist(), strict=True))
    for item in range(4):
        assert found[item] == pytest.approx(1, rel=4 * info.eps)
    assert found[4] == 0


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_values_name_their_place(cls: type) -> None:
    x = torch.zeros(40, 3)
    x[37, 2] = float("nan")
    order = cls(torch.eye(3))
    order.begin(2)
    order.update(torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"openset must be finite, got (NaN|nan) at row 42, column 2"):
        order.update(x)
    order = cls.of_similarities(20)
    order.begin(2)
    s = torch.zeros(40, 20)
    s[39, 18] = float("inf")
    with pytest.raises(ValueError, match=r"similarities must be finite, got inf at row 39, column 18"):
        order.update_similarities(s)
    # A new pass starts clean.
    order.begin(2)
    order.update_similarities(torch.zeros(4, 20))
    assert order.finish() == 4


def test_misuse_is_an_error() -> None:
    order = NearestOrder(torch.eye(3))
    with pytest.raises(ValueError, match="no pass is open"):
        order.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="no pass is open"):
        order.finish()
    with pytest.raises(ValueError, match="no pass is finished"):
        order.rounds(1, 1)
    with pytest.raises(ValueError, match="length: expected an integer >= 1"):
        order.begin(0)
    order.begin(5)
    with pytest.raises(ValueError, match="x: expected 3 columns, got 4"):
        order.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="contiguous"):
        order.update(torch.ones(3, 6)[:, ::2])
    with pytest.raises(TypeError, match="x: expected dtype float32, got float64"):
        order.update(torch.ones(2, 3, dtype=torch.float64))
    order.update(torch.ones(2, 3))
    order.finish()
    order.begin(5)
    with pytest.raises(ValueError, match="more rows than the 2 of its first reading"):
        order.update(torch.ones(3, 3))
    order.begin(5)
    order.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="has 1 rows, it had 2"):
        order.finish()
    fed_similarities = NearestOrder.of_similarities(3)
    fed_similarities.begin(1)
    with pytest.raises(ValueError, match="without centroids"):
        fed_similarities.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"lists: expected an integer in \[1, "):
        NearestOrder.of_similarities(0)
    with pytest.raises(ValueError, match="dtype: expected float32 or float64"):
        NearestOrder.of_similarities(3, torch.float16)
    with pytest.raises(ValueError, match="centroids must be finite, got NaN at row 1, column 0"):
        NearestOrder(torch.tensor([[1.0], [float("nan")]]))
    made = native.module().NearestOrder(torch.eye(3), 1)
    made.begin(1)
    made.update(torch.eye(3))
    made.finish()
    one, counts, values = (
        torch.empty(1, dtype=torch.int64),
        torch.empty(1, dtype=torch.int64),
        torch.empty(1).double(),
    )
    with pytest.raises(ValueError, match="room for 1 rounds of up to 3 items"):
        made.rounds(3, one, counts, values, one, values)
    three = torch.empty(3, dtype=torch.int64)
    for takers, similarities in ((one, torch.empty(3).double()), (three, values)):
        with pytest.raises(ValueError, match="takers, similarities: expected room for 1 rounds"):
            made.rounds(3, three, counts, values, takers, similarities)
    with pytest.raises(ValueError, match=r"list: expected an index in \[0, 3\), got 3"):
        made.order(3, one, torch.empty(1))
    with pytest.raises(ValueError, match="room for 1 entries"):
        made.order(0, one[:0], torch.empty(0))


def test_a_list_that_never_finds_a_free_item_ends_the_rounds() -> None:
    class Order:
        taken = 0

        def rounds(self, count: int, k: int) -> Taken:
            nothing = torch.empty(0, dtype=torch.int64)
            return Taken(nothing, [], [], nothing, nothing.double())

    rounds: Any = object.__new__(Rounds)
    rounds._order, rounds._lists, rounds._k = Order(), 3, 2
    rounds._source = types.SimpleNamespace(rows=9)
    reads: list[None] = []
    rounds.read = lambda: reads.append(None)
    with pytest.raises(ValueError, match="a list has found no item that is free"):
        rounds.take()
    assert len(reads) == 1


def test_two_threads_of_the_caller_do_not_race() -> None:
    order = NearestOrder(torch.eye(64))
    order.begin(100)
    x = torch.randn(40_000, 64, generator=torch.Generator().manual_seed(0))
    outcomes: list[str] = []

    def feed() -> None:
        try:
            order.update(x)
            outcomes.append("done")
        except RuntimeError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=feed) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = outcomes.count("done")
    assert done >= 1
    assert outcomes.count("this run is in use by another thread") == 4 - done
    assert order.finish() == done * 40_000
