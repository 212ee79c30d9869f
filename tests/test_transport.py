"""Exact transport against POT's network simplex: solutions, exchanges, the best of many, and bounds; on both backends."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset.methods.goracs.exact_transport import load_pot
from flashcoreset.transport import cpu, reference
from flashcoreset.transport.backend import Candidates, choose

ot = load_pot()
BACKENDS = [pytest.param(cpu.Transport, id="cpu"), pytest.param(reference.Transport, id="torch")]
KINDS = ("plain", "ties", "zero", "duplicates", "two-values", "negative", "far-apart")


def costs(kind: str, k: int, sinks: int, rng: np.random.Generator) -> np.ndarray:
    c = rng.random((k, sinks))
    if kind == "ties":
        return np.round(c, 1)
    if kind == "zero":
        return np.zeros((k, sinks))
    if kind == "duplicates":
        return np.ascontiguousarray(c[rng.integers(0, k, k)][:, rng.integers(0, sinks, sinks)])
    if kind == "two-values":
        return np.round(c)
    if kind == "negative":
        return c - 0.7
    if kind == "far-apart":
        return c + 1000.0 * rng.integers(0, 2, (k, sinks))
    return c


def exact(c: np.ndarray) -> float:
    k, sinks = c.shape
    value, log = ot.emd2(np.full(k, 1 / k), np.full(sinks, 1 / sinks), c, log=True, numItermax=10**7)
    assert log["warning"] is None
    return float(value)


def check(solved: Any, c: np.ndarray) -> None:
    """The transport is the optimum of the costs, by its flows and by its dual variables."""
    k, sinks = c.shape
    unit = 1e-12 * max(1e-300, np.abs(c).max())
    assert solved.value == pytest.approx(exact(c), abs=1e3 * unit)
    assert 0 <= solved.gap <= 4 * unit
    u, f = (part.numpy() for part in solved.duals())
    reduced = c - u[:, None] - f
    assert reduced.min() >= -unit
    source, sink, units = (part.numpy() for part in solved.flows())
    assert (units > 0).all()
    assert len(set(zip(source.tolist(), sink.tolist(), strict=True))) == len(units)
    assert reduced[source, sink].max() <= unit
    assert 0 <= solved.slackness <= unit
    common = math.gcd(k, sinks)
    np.testing.assert_array_equal(np.bincount(source, units, k), sinks // common)
    np.testing.assert_array_equal(np.bincount(sink, units, sinks), k // common)
    assert solved.value == pytest.approx((units * c[source, sink]).sum() / units.sum(), abs=4 * unit)


@pytest.mark.parametrize(
    ("transport", "problems"), [(cpu.Transport, 110), (reference.Transport, 4)], ids=["cpu", "torch"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_exchanges_are_those_of_pot(transport: Any, problems: int, kind: str) -> None:
    """With k above, below and no divisor of V; 2,300 exchanges of the compiled transport over all kinds."""
    for seed in range(problems):
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        k, sinks = int(rng.integers(1, 14)), int(rng.integers(1, 20))
        dtype = torch.float32 if seed % 2 else torch.float64
        c = torch.from_numpy(costs(kind, k, sinks, rng)).to(dtype)
        solved = transport(c)
        check(solved, c.double().numpy())
        for _ in range(3):
            place = int(rng.integers(0, k))
            item = torch.from_numpy(costs(kind, 1, sinks, rng)).to(dtype)[0]
            if kind == "duplicates" and rng.random() < 0.5:
                item = c[rng.integers(0, k)].clone()
            c[place] = item
            expected = exact(c.double().numpy())
            unit = 1e-9 * float(c.abs().max() + 1)
            # A ceiling that the cost does not stay below leaves everything as it was.
            before = (solved.value, *solved.duals(), *solved.flows())
            assert solved.exchange(place, item, expected - unit) == math.inf
            after = (solved.value, *solved.duals(), *solved.flows())
            assert after[0] == before[0]
            assert all(torch.equal(a, b) for a, b in zip(after[1:3], before[1:3], strict=True))
            pairs = [
                sorted(zip(*(part.tolist() for part in flows[3:]), strict=True)) for flows in (before, after)
            ]
            assert pairs[0] == pairs[1]
            assert solved.exchange(place, item) == pytest.approx(expected, abs=unit)
            check(solved, c.double().numpy())


@pytest.mark.parametrize("transport", BACKENDS)
@pytest.mark.parametrize(("k", "sinks"), [(1, 9), (7, 1), (6, 18), (9, 14), (12, 5)])
def test_bounds_are_below_the_costs_and_the_best_is_the_best(transport: Any, k: int, sinks: int) -> None:
    rng = np.random.default_rng(k)
    c, items = rng.random((k, sinks)), rng.random((5, sinks))
    items[3] = items[1]
    solved = transport(torch.from_numpy(c))
    after = np.empty((5, k))
    for row in range(5):
        for place in range(k):
            trial = c.copy()
            trial[place] = items[row]
            after[row, place] = exact(trial)
    lowest, listed = solved.bounds(torch.from_numpy(items), math.inf, 5 * k)
    assert sorted(zip(listed.rows.tolist(), listed.places.tolist(), strict=True)) == [
        (row, place) for row in range(5) for place in range(k)
    ]
    bounds = np.empty((5, k))
    bounds[listed.rows, listed.places] = listed.bounds
    assert (bounds <= after + 1e-12).all()
    np.testing.assert_array_equal(lowest.numpy(), bounds.min(1))
    assert (np.diff(listed.bounds.numpy()) >= 0).all()
    # The formula, by hand.
    u, f = (part.numpy() for part in solved.duals())
    reduced = np.sort(c - u[:, None], axis=0)
    owner = (c - u[:, None]).argmin(0)
    w = reduced[1] - reduced[0] if k > 1 else np.zeros(sinks)
    d = items - f
    y = np.sort(d, axis=1)[:, -(-sinks // k) - 1]
    for row in range(5):
        for place in range(k):
            own = owner == place
            loss = -u[place] / k + w[own].sum() / sinks
            gain = y[row] / k - np.maximum(0, y[row] - d[row]).sum() / sinks
            saved = np.maximum(0, w - np.maximum(0, d[row] - y[row]))[own].sum() / sinks
            assert bounds[row, place] == pytest.approx(u.mean() + f.mean() + loss + gain - saved, abs=1e-12)
    # Tightened bounds are bounds, not below the others, and exact if one unit moves.
    _, tight = solved.bounds(torch.from_numpy(items), math.inf, 5 * k, ways=True)
    tightened = np.empty((5, k))
    tightened[tight.rows, tight.places] = tight.bounds
    assert (tightened <= after + 1e-12).all()
    assert (tightened >= bounds).all()
    assert (np.diff(tight.bounds.numpy()) >= 0).all()
    if sinks == 1 or k == 1:
        np.testing.assert_allclose(tightened, after, atol=1e-12)
    # Fewer are the lowest of all.
    goal = float(np.median(bounds))
    _, few = solved.bounds(torch.from_numpy(items), goal, 3)
    below = int((listed.bounds < goal).sum())
    assert all(torch.equal(a, b[: min(3, below)]) for a, b in zip(few, listed, strict=True))

    before = solved.value
    costs_of_items = torch.from_numpy(items)
    best = solved.best_exchange(costs_of_items, listed, math.inf, -math.inf, 10**6)
    assert best.value == pytest.approx(after.min(), abs=1e-12)
    assert after[listed.rows[best.place], listed.places[best.place]] == pytest.approx(after.min(), abs=1e-12)
    assert best.tried <= len(listed.rows)
    # Nothing below the ceiling; the first that is enough; the best of a few.
    assert solved.best_exchange(costs_of_items, listed, after.min() - 1e-9, -math.inf, 10**6)[0] == -1
    tried = after[listed.rows, listed.places]
    first = solved.best_exchange(costs_of_items, listed, math.inf, math.inf, 10**6)
    assert (first.place, first.tried) == (0, 1)
    assert first.value == pytest.approx(tried[0], abs=1e-12)
    some = solved.best_exchange(costs_of_items, listed, math.inf, -math.inf, 2)
    assert some.value == pytest.approx(tried[:2].min(), abs=1e-12)
    assert solved.best_exchange(costs_of_items, listed, math.inf, -math.inf, 0) == (-1, math.inf, 0)
    assert solved.value == before
    check(solved, c)


@pytest.mark.parametrize("transport", BACKENDS)
def test_scores_do_not_depend_on_the_scores_before(transport: Any) -> None:
    """Every exchange of a list, scored one by one under ceilings just above and below its cost; prices found for some items rule out
    others at the same place, but never one that is below."""
    for seed, kind in enumerate(("plain", "ties", "duplicates", "negative", "far-apart")):
        rng = np.random.default_rng(seed)
        k, sinks = int(rng.integers(2, 9)), int(rng.integers(3, 16))
        c, items = costs(kind, k, sinks, rng), costs(kind, 6, sinks, rng)
        unit = 1e-9 * float(np.abs(c).max() + 1)
        solved = transport(torch.from_numpy(c))
        for place in range(k):
            for row in rng.permutation(6).tolist():
                trial = c.copy()
                trial[place] = items[row]
                expected = exact(trial)
                one = Candidates(
                    torch.tensor([row]), torch.tensor([place]), torch.tensor([-math.inf]).double()
                )
                for ceiling, index in ((expected - unit, -1), (expected + unit, 0), (math.inf, 0)):
                    best = solved.best_exchange(torch.from_numpy(items), one, ceiling, -math.inf, 1)
                    assert best.place == index
                    if index == 0:
                        assert best.value == pytest.approx(expected, abs=1e-3 * unit)
        check(solved, c)


def test_both_backends_agree_on_larger_problems() -> None:
    for k, sinks in ((25, 100), (24, 60), (40, 23)):
        rng = np.random.default_rng(sinks)
        c, items = rng.random((k, sinks)), torch.from_numpy(rng.random((30, sinks)))
        compiled, plain = (
            transport(torch.from_numpy(c)) for transport in (cpu.Transport, reference.Transport)
        )
        for turn in range(8):
            value = compiled.exchange(turn, items[turn])
            assert value == pytest.approx(plain.exchange(turn, items[turn]), abs=1e-12)
            c[turn] = items[turn]
        check(compiled, c)


def test_a_thousand_exchanges_leave_no_rounding_behind() -> None:
    rng = np.random.default_rng(0)
    c = rng.random((20, 90))
    solved = cpu.Transport(torch.from_numpy(c))
    for _ in range(1000):
        place = int(rng.integers(0, 20))
        c[place] = rng.random(90) * 10.0 ** rng.integers(-9, 3)
        solved.exchange(place, torch.from_numpy(c[place]))
    check(solved, c)


def test_both_backends_tighten_alike() -> None:
    for k, sinks in ((12, 60), (9, 40), (30, 20)):
        rng = np.random.default_rng(k)
        # Points on a line: units have a long way from one end to the other.
        places = rng.random(k + 6)
        c, items = torch.from_numpy(np.abs(places[:, None] - rng.random(sinks))).split((k, 6))
        tables = np.empty((2, 2, 6, k))  # of each backend, without ways and with them
        for solved, two in zip((cpu.Transport(c), reference.Transport(c)), tables, strict=True):
            for ways in (False, True):
                _, listed = solved.bounds(items, math.inf, 6 * k, ways)
                two[int(ways)][listed.rows, listed.places] = listed.bounds
        # Ways as far as the compiled ones look at sinks: all of them, in problems of this size. The other bounds depend
        # on the dual variables.
        low = tables[:, 0].max(0)
        np.testing.assert_allclose(*np.maximum(tables[:, 1], low), atol=1e-12)
        assert (tables[:, 1] > low).any()


@pytest.mark.parametrize("k", [30, 29])
def test_results_are_those_of_any_number_of_threads_and_any_start(k: int) -> None:
    rng = np.random.default_rng(3)
    c, items = (torch.from_numpy(rng.random((rows, 120)).astype(np.float32)) for rows in (k, 2000))
    before = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            solved = cpu.Transport(c)
            lowest, candidates = solved.bounds(items, solved.value, 500, ways=True)
            best = solved.best_exchange(items, candidates, solved.value, -math.inf, 100)
            found.append([*solved.duals(), *solved.flows(), lowest, *candidates, torch.tensor(best)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    started = cpu.Transport(c, torch.from_numpy(rng.standard_normal(k)))
    assert started.value == pytest.approx(solved.value, abs=1e-12)
    check(started, c.double().numpy())


def test_builds_for_all_instruction_sets_agree() -> None:
    rng = np.random.default_rng(5)
    c, items = (torch.from_numpy(rng.random((rows, 70)).astype(np.float32)) for rows in (20, 40))
    results = []
    for isa in native.available_isas():
        made = native.load_isa(isa).Transport(c, None, 1)
        lowest, bounds = torch.empty(2, 800, dtype=torch.float64)
        rows, places = torch.empty(2, 800, dtype=torch.int64)
        count = made.bounds(items, math.inf, True, lowest[:40], rows, places, bounds)
        values = [made.exchange(int(places[i]), items[int(rows[i])], math.inf) for i in range(9)]
        u, f = torch.empty(20, dtype=torch.float64), torch.empty(70, dtype=torch.float64)
        made.duals(u, f)
        results.append(
            (count, rows.tolist(), places.tolist(), bounds.tolist(), values, u.tolist(), f.tolist())
        )
    assert results
    assert all(result == results[0] for result in results)


# --- what a caller can get wrong ------------------------------------------------------------------


def test_bad_arguments() -> None:
    module = native.module()
    c = torch.rand(3, 5)
    for changes, error, message in (
        ({"costs": torch.tensor([[0.0, math.nan]])}, ValueError, "costs must be finite.*row 0, column 1"),
        ({"costs": torch.tensor([[0.0], [math.inf]])}, ValueError, "costs must be finite.*row 1, column 0"),
        ({"costs": torch.empty(0, 5)}, ValueError, "costs: expected at least 1 row and 1 column"),
        ({"costs": c.T}, ValueError, "costs: expected rows that are contiguous"),
        ({"costs": c.long()}, TypeError, "costs: expected dtype float32 or float64"),
        ({"u": torch.zeros(2, dtype=torch.float64)}, ValueError, r"u: expected shape \(3,\)"),
        ({"u": torch.zeros(3)}, TypeError, "u: expected dtype float64"),
        ({"u": torch.tensor([0.0, math.nan, 0.0]).double()}, ValueError, "u: expected finite numbers"),
        ({"threads": 0}, ValueError, "threads"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            module.Transport(**{"costs": c, "u": None, "threads": 1, **changes})
    made = module.Transport(c, None, 1)
    value = made.value
    row = torch.rand(5)
    with pytest.raises(ValueError, match=r"place: expected a source in \[0, 3\), got 3"):
        made.exchange(3, row, math.inf)
    with pytest.raises(ValueError, match="place: expected an integer >= 0"):
        made.exchange(-1, row, math.inf)
    with pytest.raises(ValueError, match=r"row: expected shape \(5,\)"):
        made.exchange(0, row[:4], math.inf)
    with pytest.raises(TypeError, match="row: expected dtype float32"):
        made.exchange(0, row.double(), math.inf)
    with pytest.raises(ValueError, match=r"row must be finite.*column 2"):
        made.exchange(0, torch.where(torch.arange(5) == 2, math.nan, row), math.inf)
    with pytest.raises(ValueError, match="ceiling: expected a number, got nan"):
        made.exchange(0, row, math.nan)
    lists = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.zeros(1).double())
    with pytest.raises(ValueError, match=r"rows: expected a row in \[0, 2\), got 2"):
        made.best_exchange(torch.rand(2, 5), lists[0] + 2, *lists[1:], math.inf, -math.inf, 1)
    with pytest.raises(ValueError, match=r"costs: expected shape \(2, 5\)"):
        made.best_exchange(torch.rand(2, 4), *lists, math.inf, -math.inf, 1)
    with pytest.raises(ValueError, match=r"places: expected shape \(1,\)"):
        made.best_exchange(
            torch.rand(2, 5), lists[0], torch.zeros(2, dtype=torch.int64), lists[2], 1.0, 0.0, 1
        )
    with pytest.raises(ValueError, match=r"place: expected a source in \[0, 3\), got 7"):
        made.best_exchange(torch.rand(2, 5), lists[0], lists[1] + 7, lists[2], 1.0, 0.0, 1)
    with pytest.raises(ValueError, match=r"rows: expected a row in \[0, 2\), got -1"):
        made.best_exchange(torch.rand(2, 5), lists[0] - 1, *lists[1:], 1.0, 0.0, 1)
    with pytest.raises(TypeError, match="ways: expected True or False"):
        made.bounds(torch.rand(2, 5), 1.0, 1, torch.zeros(2).double(), *lists)
    with pytest.raises(ValueError, match=r"lowest: expected shape \(2,\)"):
        made.bounds(torch.rand(2, 5), 1.0, False, torch.zeros(3).double(), *lists)
    with pytest.raises(ValueError, match=r"u: expected shape \(3,\)"):
        made.duals(torch.zeros(4).double(), torch.zeros(5).double())
    # After all that the object works still.
    assert made.value == value
    assert made.exchange(0, row, math.inf) < math.inf


def test_kernels_are_chosen_for_the_host() -> None:
    assert choose(None) is cpu
    assert choose("cuda") is cpu
    assert choose("torch") is reference


def test_calls_from_two_threads_are_refused() -> None:
    solved = cpu.Transport(torch.rand(60, 4000))
    items = torch.rand(4000, 4000)
    errors: list[str] = []

    def bounds() -> None:
        try:
            solved.bounds(items, math.inf, 10)
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=bounds) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["this run is in use by another thread"]


def test_candidates_are_named() -> None:
    solved = cpu.Transport(torch.rand(3, 6))
    _, candidates = solved.bounds(torch.rand(2, 6), math.inf, 4)
    assert isinstance(candidates, Candidates)
    assert [len(part) for part in candidates] == [4, 4, 4]
