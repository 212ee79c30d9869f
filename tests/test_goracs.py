"""goracs against its definition in NumPy and POT, the bound of an exchange against exact solves, and everything a
caller can get wrong.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import flashcoreset as fc
from flashcoreset.facility_location import cpu
from flashcoreset.methods.goracs import class_budgets, exact_transport, reference
from flashcoreset.methods.goracs.exchanges import Exchanges
from flashcoreset.methods.goracs.transport_costs import TransportCosts

matplotlib.use("Agg")
ot = exact_transport.load_pot()


def data(n: int, clients: int, d: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training items of eight clusters, validation items that prefer some of these, and norms."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((8, d))
    train = centres[rng.integers(0, 8, n)] + 0.4 * rng.standard_normal((n, d))
    shares = rng.dirichlet(np.ones(8))
    valid = centres[rng.choice(8, clients, p=shares)] + 0.4 * rng.standard_normal((clients, d))
    return train, valid, rng.random(n) + 0.05


def goracs(*arguments: Any, lam: float = 0.5, **options: Any) -> fc.Coreset:
    """With gradient norms that count."""
    return fc.goracs(*arguments, lam=lam, **options)


def blocks_of(c: np.ndarray, rows: int = 7) -> Any:
    def blocks() -> Iterator[tuple[slice, torch.Tensor]]:
        for begin in range(0, len(c), rows):
            part = slice(begin, min(begin + rows, len(c)))
            yield part, torch.from_numpy(c[part])

    return blocks


# --- stage 1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("n", "clients", "k", "lam"),
    [
        (1, 1, 1, 0.5),
        (7, 1, 3, 0.5),
        (97, 40, 12, 0.0),
        (97, 40, 12, 0.5),
        (97, 97, 30, 0.5),
        (60, 61, 20, 0.1),
        (150, 20, 60, 0.5),
        (150, 200, 1, 0.2),
        (40, 30, 40, 0.5),
        (300, 120, 50, 3.0),
    ],
)
def test_stage_1_makes_the_picks_of_the_definition(
    backend: str, n: int, clients: int, k: int, lam: float
) -> None:
    for seed in range(2):
        train, valid, norms = data(n, clients, seed=seed)
        c = reference.costs(train, valid, norms, lam)
        expected = reference.cover(c, k)
        for budget in (1, 40_000, 2**28):
            coreset = goracs(
                train, valid, norms, k, lam=lam, max_exchanges=0, backend=backend, memory_budget=budget
            )
            assert coreset.indices.tolist() == expected
            assert coreset.info["score"] == pytest.approx(reference.score(c[expected])[0], abs=1e-12)


def test_stage_1_with_duplicates_takes_the_lowest_index() -> None:
    train, valid, _ = data(40, 30, seed=1)
    train = np.concatenate([train, train, train])
    norms = np.ones(120)
    c = reference.costs(train, valid, norms, 0.5)
    for k in (1, 5, 12, 20, 60):
        expected = reference.cover(c, k)
        for budget in (1, 2**28):
            coreset = goracs(train, valid, norms, k, max_exchanges=0, memory_budget=budget)
            assert coreset.indices.tolist() == expected
    assert max(reference.cover(c, 10)) < 40


def test_cover_that_is_complete_before_k_picks_serve_keeps_the_first_k() -> None:
    # Item 0 is nearest to the first validation item, and item 1 ties with it there and is nearest to the second:
    # two items are nearest by their indices, but one pick serves both.
    train = np.array([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]])
    valid = np.array([[0.5, 0.0], [1.0, 0.0]])
    coreset = goracs(train, valid, np.ones(3), 1, max_exchanges=0)
    assert coreset.indices.tolist() == [1]
    c = reference.costs(np.repeat(train, 2, axis=0), valid, np.ones(6), 0.5)
    twice = goracs(np.repeat(train, 2, axis=0), valid, np.ones(6), 2, max_exchanges=0)
    assert twice.indices.tolist() == reference.cover(c, 2)


def test_picks_that_serve_nothing_are_dropped() -> None:
    train, valid, norms = data(400, 300, d=2, seed=3)
    coreset = goracs(train, valid, norms, 120, lam=0, max_exchanges=0)
    assert coreset.info["picks"] > 120
    chosen = reference.costs(train, valid, norms, 0.0)[coreset.indices.numpy()]
    assert len(np.unique(chosen.argmin(axis=0))) == 120


def test_items_that_are_all_alike() -> None:
    coreset = goracs(np.ones((6, 2)), np.ones((4, 2)), np.ones(6), 3)
    assert coreset.indices.tolist() == [0, 1, 2]
    assert coreset.info["score"] == 0
    assert coreset.info["certificate"]


# --- transport ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_transport_on_few_cells_is_that_on_all(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_transport, "_DENSE", 10**9 if whole else 0)
    for seed in range(24):
        rng = np.random.default_rng(seed)
        k, clients = int(rng.integers(1, 30)), int(rng.integers(1, 40))
        c = rng.random((k, clients))
        c = np.round(c, 1) if seed % 2 else c  # ties
        monkeypatch.setattr(exact_transport, "_CELLS", 1 + seed % 4)
        start = torch.from_numpy(rng.standard_normal(k))
        found = exact_transport.solve(blocks_of(c), start, clients)
        assert found.value == pytest.approx(reference.score(c)[0], abs=1e-12)
        assert 0 <= found.gap < 1e-10
        # The cells hold a feasible plan of changed costs too.
        c[0] = rng.random(clients)
        again = exact_transport.solve(blocks_of(c), found.u, clients, found.cells)
        assert again.value == pytest.approx(reference.score(c)[0], abs=1e-12)


# --- the bound ------------------------------------------------------------------------------------


def test_bound_is_below_the_exact_score_of_every_exchange_and_ranks_like_it() -> None:
    correlations, published = [], []
    for seed in range(3):
        train, valid, norms = data(60, 40, seed=seed)
        c = reference.costs(train, valid, norms, 0.5)
        subset = reference.cover(c, 8)
        value, u = reference.score(c[subset])
        bounds = Exchanges(blocks_of(c[subset]), torch.from_numpy(u), 40)
        assert bounds.value == pytest.approx(value, abs=1e-12)
        others = np.setdiff1d(np.arange(60), subset)
        screened, _ = bounds.bounds(torch.from_numpy(c[others]))
        exact = np.array(
            [
                [reference.score(c[[*subset[:i], o, *subset[i + 1 :]]])[0] for i in range(8)]
                for o in others.tolist()
            ]
        )
        greatest = np.array(
            [[reference.bound(c, subset, u, i, o) for i in range(8)] for o in others.tolist()]
        )
        for row, o in enumerate(others.tolist()):
            ours = bounds.greatest_bounds(torch.arange(8), torch.from_numpy(c[o]))
            np.testing.assert_allclose(ours.numpy(), greatest[row], atol=1e-12)
        assert (screened.numpy() <= greatest + 1e-12).all()
        assert (greatest <= exact + 1e-12).all()
        correlations.append(spearmanr(screened.flatten(), exact.flatten()).statistic)
        # The published order: all additions after the first removal, then after the second.
        estimates = reference.published_estimates(c, subset, u)
        removal, addition = (estimates[rows].argsort().argsort() for rows in (subset, others))
        order = removal * len(others) + addition[:, None]
        published.append(spearmanr(order.flatten(), exact.flatten()).statistic)
    assert min(correlations) > 0.9
    assert np.mean(published) < np.mean(correlations) - 0.2


def test_bound_is_greatest_among_all_values_of_the_free_variable() -> None:
    train, valid, norms = data(30, 20, seed=5)
    c = reference.costs(train, valid, norms, 0.5)
    subset = reference.cover(c, 6)
    _, u = reference.score(c[subset])
    for place, added in itertools.product(range(6), (1, 7, 20)):
        f = reference.rest(c[subset] - u[:, None], place)
        tried = [
            (np.delete(u, place).sum() + y) / 6 + np.minimum(f, c[added] - y).mean()
            for y in np.linspace(-3, 3, 2001)
        ]
        assert max(tried) <= reference.bound(c, subset, u, place, added) + 1e-12


def test_bound_of_the_only_member_is_the_new_score() -> None:
    c = np.random.default_rng(0).random((5, 9))
    bounds = Exchanges(blocks_of(c[:1]), torch.zeros(1, dtype=torch.float64), 9)
    screened, _ = bounds.bounds(torch.from_numpy(c))
    np.testing.assert_allclose(screened[:, 0].numpy(), c.mean(axis=1), atol=1e-12)


# --- the descent ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "clients", "k"), [(60, 40, 8), (120, 40, 10), (60, 20, 15), (50, 1, 3)])
def test_score_is_that_of_the_definition_or_lower(n: int, clients: int, k: int) -> None:
    ours, straightforward = [], []
    for seed in range(4):
        train, valid, norms = data(n, clients, seed=seed)
        coreset = goracs(train, valid, norms, k)
        c = reference.costs(train, valid, norms, 0.5)
        exact = reference.score(c[coreset.indices.numpy()])[0]
        info = coreset.info
        assert exact == pytest.approx(info["score"], abs=1e-12)
        assert info["scores"] == sorted(info["scores"], reverse=True)
        assert info["score"] == info["scores"][-1]
        assert len(info["exchanges"]) == len(info["scores"])
        assert info["exact_solves"] >= len(info["scores"])
        assert len(set(coreset.indices.tolist())) == k
        ours.append(info["score"])
        straightforward.append(reference.exchange(c, reference.cover(c, k), 100, 30)[1][-1])
    assert all(score <= other + 1e-9 for score, other in zip(ours, straightforward, strict=True))


def test_certificate_is_true() -> None:
    certified = 0
    for seed in range(8):
        train, valid, norms = data(14, 9, d=2, seed=seed)
        coreset = goracs(train, valid, norms, 3)
        certified += coreset.info["certificate"]
        if coreset.info["certificate"]:
            c = reference.costs(train, valid, norms, 0.5)
            chosen = coreset.indices.tolist()
            for place, o in itertools.product(range(3), set(range(14)) - set(chosen)):
                trial = [*chosen[:place], o, *chosen[place + 1 :]]
                assert reference.score(c[trial])[0] >= coreset.info["score"] - 1e-9
    assert certified > 0


def test_exchanges_are_limited_and_counted() -> None:
    train, valid, norms = data(120, 60, seed=0)
    free = goracs(train, valid, norms, 12)
    assert free.info["exchanges"][-1] >= 3
    for limit in (0, 1, 2):
        info = goracs(train, valid, norms, 12, max_exchanges=limit).info
        assert info["exchanges"][-1] == limit
        assert info["stopped"] == "max_exchanges"
        assert info["scores"][0] == free.info["scores"][0]
    few = goracs(train, valid, norms, 12, n_candidates=1).info
    assert few["score"] <= few["scores"][0]


def test_every_item_is_taken_where_k_is_n() -> None:
    train, valid, norms = data(12, 7)
    coreset = goracs(train, valid, norms, 12)
    assert sorted(coreset.indices.tolist()) == list(range(12))
    assert coreset.info["certificate"]
    assert coreset.weights.tolist() == pytest.approx([7 / 12] * 12)


def test_one_item_is_the_one_of_least_mean_cost() -> None:
    train, valid, norms = data(90, 40, seed=2)
    coreset = goracs(train, valid, norms, 1)
    c = reference.costs(train, valid, norms, 0.5)
    assert coreset.indices.tolist() == [int(c.mean(axis=1).argmin())]
    assert coreset.info["certificate"]
    assert coreset.weights.tolist() == [40.0]


def test_streamed_costs_give_the_same_result() -> None:
    train, valid, norms = data(1200, 300, d=16, seed=4)
    train, valid = train.astype(np.float32), valid.astype(np.float32)
    # Neither the n x V costs nor those of the members are held at 2^16 bytes.
    results = [
        goracs(train, valid, norms, 30, max_exchanges=3, memory_budget=budget) for budget in (2**16, 2**28)
    ]
    assert torch.equal(results[0].indices, results[1].indices)
    assert results[0].info["scores"] == results[1].info["scores"]
    assert results[0].info["exchanges"][-1] == 3


def test_result_does_not_depend_on_threads_or_seed() -> None:
    train, valid, norms = data(1000, 300, d=16, seed=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(goracs(train, valid, norms, 30, max_exchanges=8, seed=threads))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].indices, results[1].indices)
    assert results[0].info["scores"] == results[1].info["scores"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_views(dtype: torch.dtype) -> None:
    train, valid, norms = (torch.from_numpy(part) for part in data(90, 40, seed=4))
    train, valid = train.to(dtype), valid.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = goracs(train.to(wide), valid.to(wide), norms, 9)
    views = [
        train,
        train.clone().requires_grad_(),
        train.T.contiguous().T,
        train.repeat_interleave(2, 0)[::2],
    ]
    for view in views:
        coreset = goracs(view, valid, norms.to(dtype) if dtype == torch.float64 else norms, 9)
        assert torch.equal(coreset.indices, expected.indices)
        assert coreset.weights.dtype == wide
    assert torch.equal(
        goracs(train.to(wide).numpy(), valid.to(wide).numpy(), norms.numpy(), 9).indices, expected.indices
    )


def test_norms_that_are_all_zero_are_taken_without_lam() -> None:
    train, valid, norms = data(60, 20)
    zero = goracs(train, valid, np.zeros(60), 6, lam=0)
    assert torch.equal(zero.indices, goracs(train, valid, norms, 6, lam=0).indices)


def test_costs_are_those_of_the_definition() -> None:
    train, valid, norms = data(50, 30)
    expected = reference.costs(train, valid, norms, 0.5)
    penalty = torch.from_numpy(0.5 * norms / norms.max())
    for budget in (1, 2**28):
        costs = TransportCosts(torch.from_numpy(train), torch.from_numpy(valid), penalty, cpu, budget)
        np.testing.assert_allclose(costs.costs(slice(0, 50)).numpy(), expected, atol=1e-12)
        assert (costs.held is None) == (budget == 1)


# --- labels ---------------------------------------------------------------------------------------


def test_classes_are_problems_of_their_own() -> None:
    train, valid, norms = data(120, 50, seed=6)
    rng = np.random.default_rng(0)
    train_labels, valid_labels = rng.integers(0, 4, 120), rng.choice([2, 0, 3], 50)
    coreset = goracs(train, valid, norms, 15, train_labels=train_labels, valid_labels=valid_labels)
    shares = np.bincount(valid_labels, minlength=4)
    expected = fc.allocate_budgets(shares, 15).tolist()
    assert coreset.info["budgets"] == {0: expected[0], 2: expected[2], 3: expected[3]}
    parts, weights = [], []
    for label in (0, 2, 3):
        rows, own = np.flatnonzero(train_labels == label), valid[valid_labels == label]
        alone = goracs(train[rows], own, norms[rows], expected[label])
        assert coreset.info["classes"][label]["scores"] == alone.info["scores"]
        parts += rows[alone.indices.numpy()].tolist()
        weights += [len(own) / expected[label]] * expected[label]
    assert coreset.indices.tolist() == parts
    assert coreset.weights.tolist() == pytest.approx(weights)
    assert float(coreset.weights.sum()) == pytest.approx(50)
    each = coreset.info["classes"].values()
    assert coreset.info["exact_solves"] == sum(info["exact_solves"] for info in each)


def test_budget_of_a_class_is_not_above_its_items() -> None:
    assert class_budgets([10, 10], [3, 30], 12) == [3, 9]
    assert class_budgets([1, 1, 1], [1, 2, 9], 12) == [1, 2, 9]
    assert class_budgets([90, 5, 5], [10, 10, 10], 20) == [10, 5, 5]
    assert class_budgets([17, 12, 8], [99, 99, 99], 17) == fc.allocate_budgets([17, 12, 8], 17).tolist()
    # More than there are validation items.
    assert class_budgets([2, 1], [50, 50], 30) == [20, 10]
    for seed in range(50):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 20, 5)
        k = int(rng.integers(1, sizes.sum() + 1))
        budgets = class_budgets(rng.integers(1, 9, 5).tolist(), sizes.tolist(), k)
        assert sum(budgets) == k
        assert (np.array(budgets) <= sizes).all()


# --- solver="sinkhorn" ----------------------------------------------------------------------------


def test_sinkhorn_encloses_the_exact_score() -> None:
    train, valid, norms = data(80, 40, seed=3)
    coreset = goracs(train, valid, norms, 8, max_exchanges=5, solver="sinkhorn")
    c = reference.costs(train, valid, norms, 0.5)
    exact = reference.score(c[coreset.indices.numpy()])[0]
    info = coreset.info
    assert info["score"] - info["score_error"] - 1e-6 <= exact <= info["score"] + 1e-6
    assert info["score_error"] < 0.02
    assert info["exact_solves"] == 0
    assert info["sinkhorn_solves"] >= 1
    assert info["score"] < info["scores"][0]


def test_sinkhorn_needs_no_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "ot")
    train, valid, norms = data(20, 10)
    assert len(goracs(train, valid, norms, 3, max_exchanges=0, solver="sinkhorn").indices) == 3


# --- what a caller can get wrong ------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes the import of `package` fail."""
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)


GOOD = np.arange(12, dtype=np.float32).reshape(6, 2)
NAN = GOOD.copy()
NAN[4, 1] = np.nan
INF = GOOD.copy()
INF[2, 0] = np.inf


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": NAN}, ValueError, "train must be finite, got NaN at row 4, column 1"),
        ({"valid": INF}, ValueError, "valid must be finite, got inf at row 2, column 0"),
        ({"train": GOOD[:0]}, ValueError, "train must have at least 1 row"),
        ({"valid": GOOD[:0]}, ValueError, "valid must have at least 1 row"),
        ({"train": GOOD[0]}, ValueError, "train must have 2 dimensions"),
        ({"train": "rows"}, TypeError, "train must be a torch.Tensor"),
        ({"train": GOOD.astype(int)}, TypeError, "train must have dtype float16"),
        ({"valid": GOOD[:, :1]}, ValueError, "valid must have 2 columns as train has"),
        ({"valid": torch.ones(6, 2, device="meta")}, ValueError, "valid is on device meta"),
        ({"grad_norms": np.ones(5)}, ValueError, r"grad_norms must have shape \[6\], got \(5,\)"),
        ({"grad_norms": np.ones((6, 1))}, ValueError, r"grad_norms must have shape \[6\]"),
        ({"grad_norms": [1, 1, -2, 1, 1, 1]}, ValueError, "grad_norms must be >= 0, got -2.0 at position 2"),
        ({"grad_norms": [1, 1, np.nan, 1, 1, 1]}, ValueError, "grad_norms must be finite, got NaN"),
        ({"grad_norms": np.zeros(6)}, ValueError, "grad_norms must not be all 0 with lam > 0, got lam=0.5"),
        ({"grad_norms": None}, ValueError, "grad_norms must be given with lam=0.5, got None"),
        (
            {"grad_norms": None, "lam": 0, "norm_clip": 0.9},
            ValueError,
            "grad_norms must be given with norm_clip=0.9",
        ),
        ({"norm_clip": 0}, ValueError, r"norm_clip must be in \(0, 1\], got 0"),
        ({"norm_clip": 1.5}, ValueError, r"norm_clip must be in \(0, 1\], got 1.5"),
        ({"norm_clip": float("nan")}, ValueError, "norm_clip must be finite"),
        ({"norm_clip": "a"}, TypeError, "norm_clip must be a number"),
        (
            {"norm_clip": 0.5, "grad_norms": [0, 0, 0, 0, 0, 1]},
            ValueError,
            "grad_norms must not be all 0 with lam > 0, got lam=0.5 and norm_clip=0.5",
        ),
        ({"norm_scale": "sum"}, ValueError, "unknown norm_scale 'sum'; valid names: max, spread"),
        ({"norm_scale": 1}, TypeError, "norm_scale must be a str"),
        ({"scaling": "all"}, ValueError, "unknown scaling 'all'; valid names: class, global"),
        ({"scaling": None}, TypeError, "scaling must be a str"),
        ({"max_solves": 0}, ValueError, "max_solves must be >= 1, got 0"),
        ({"max_solves": 2.5}, TypeError, "max_solves must be an int"),
        ({"time_limit": 0}, ValueError, "time_limit must be > 0 seconds, got 0"),
        ({"time_limit": float("inf")}, ValueError, "time_limit must be finite"),
        ({"time_limit": "1"}, TypeError, "time_limit must be a number"),
        ({"tol": -0.1}, ValueError, "tol must be >= 0, got -0.1"),
        ({"tol": None}, TypeError, "tol must be a number"),
        ({"k": 7}, ValueError, "k must be <= the 6 rows of train, got 7"),
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"k": None}, TypeError, "k must be an int"),
        ({"lam": -0.5}, ValueError, "lam must be >= 0, got -0.5"),
        ({"lam": float("nan")}, ValueError, "lam must be finite"),
        ({"lam": "a"}, TypeError, "lam must be a number"),
        ({"max_exchanges": -1}, ValueError, "max_exchanges must be >= 0, got -1"),
        ({"max_exchanges": 1.5}, TypeError, "max_exchanges must be an int"),
        ({"n_candidates": 0}, ValueError, "n_candidates must be >= 1, got 0"),
        ({"solver": "emd"}, ValueError, "unknown solver 'emd'; valid names: exact, sinkhorn"),
        ({"solver": None}, TypeError, "solver must be a str"),
        ({"reg": 0}, ValueError, "reg must be > 0, got 0"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be >= 1"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
        ({"progress": 3}, TypeError, "progress must be None, True or a callable"),
        ({"train_labels": [0] * 6}, ValueError, "must be given together, got valid_labels=None"),
        ({"valid_labels": [0] * 6}, ValueError, "must be given together, got train_labels=None"),
        (
            {"train_labels": [0] * 5, "valid_labels": [0] * 6},
            ValueError,
            r"train_labels must have shape \[6\]",
        ),
        (
            {"train_labels": [0] * 6, "valid_labels": [0] * 5},
            ValueError,
            r"valid_labels must have shape \[6\]",
        ),
        ({"train_labels": [0.5] * 6, "valid_labels": [0] * 6}, TypeError, "train_labels must hold integers"),
        (
            {"train_labels": [0] * 6, "valid_labels": [0, 0, 0, 0, 0, 3]},
            ValueError,
            "train_labels must hold every class of valid_labels, got none of class 3",
        ),
        (
            {"train_labels": [0, 1, 1, 1, 1, 1], "valid_labels": [0] * 6, "k": 2},
            ValueError,
            "k must be <= the 1 rows of train in the classes of valid, got 2",
        ),
        (
            {
                "train_labels": [0, 0, 0, 1, 1, 1],
                "valid_labels": [0, 1] * 3,
                "grad_norms": [1, 1, 1, 0, 0, 0],
            },
            ValueError,
            "grad_norms must not be all 0 with lam > 0 in class 1",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"train": GOOD, "valid": GOOD, "grad_norms": np.ones(6), "k": 2}
    calls: list[int] = []
    with pytest.raises(error, match=message):
        goracs(**{"progress": lambda done, _: calls.append(done), **arguments, **changes})
    assert calls == []


def test_distances_that_overflow() -> None:
    """Shares of the largest distance do not."""
    found = goracs(np.float32([[-3e38], [3e38]]), np.float32([[3e38]]), np.ones(2), 1)
    assert found.indices.tolist() == [1]


def test_exact_scores_need_no_pot_if_the_costs_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "ot")
    assert goracs(GOOD, GOOD, np.ones(6), 2).info["exact_solves"] >= 1
    monkeypatch.setattr(sys.modules["flashcoreset.methods.goracs"], "HELD_BYTES", 0)
    with pytest.raises(ImportError, match=r"solver='exact' needs POT.*flashcoreset\[goracs\].*sinkhorn"):
        goracs(GOOD, GOOD, np.ones(6), 2)


def test_failure_of_the_solver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ot.emd
    monkeypatch.setattr(sys.modules["flashcoreset.methods.goracs"], "HELD_BYTES", 0)

    def fail(*arguments: Any, **keywords: Any) -> Any:
        plan, log = real(*arguments, **keywords)
        return plan, {**log, "warning": "numItermax reached"}

    monkeypatch.setattr(ot, "emd", fail)
    for dense in (0, 10**9):
        monkeypatch.setattr(exact_transport, "_DENSE", dense)
        with pytest.raises(RuntimeError, match="POT's network simplex failed on a 2 x 6 problem: numItermax"):
            goracs(GOOD, GOOD, np.ones(6), 2)


def test_members_whose_costs_are_not_held_are_scored_by_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid, norms = data(60, 40)
    held = goracs(train, valid, norms, 8)
    monkeypatch.setattr(sys.modules["flashcoreset.methods.goracs"], "HELD_BYTES", 0)
    solved = goracs(train, valid, norms, 8)
    c = reference.costs(train, valid, norms, 0.5)
    for coreset in (held, solved):
        exact = reference.score(c[coreset.indices.numpy()])[0]
        assert exact == pytest.approx(coreset.info["score"], abs=1e-12)
    assert held.info["scores"][0] == pytest.approx(solved.info["scores"][0], abs=1e-12)
    assert held.info["score"] <= solved.info["score"] + 1e-9


def test_the_definition_of_transport_gives_the_same_exchanges() -> None:
    train, valid, norms = data(60, 30, seed=2)
    compiled, plain = (
        goracs(train, valid, norms, 6, backend=backend, max_exchanges=2) for backend in ("cpu", "torch")
    )
    assert compiled.info["scores"] == pytest.approx(plain.info["scores"], abs=1e-12)


# --- around it ------------------------------------------------------------------------------------


def test_progress_goes_up_to_the_total() -> None:
    train, valid, norms = data(200, 120, seed=3)
    calls: list[tuple[int, int]] = []
    goracs(train, valid, norms, 40, lam=0.1, max_exchanges=6, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert 40 in done
    assert calls[-1] == (46, 46)

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        goracs(train, valid, norms, 40, progress=refuse)


def test_descent_is_drawn() -> None:
    train, valid, norms = data(120, 60, seed=0)
    coreset = goracs(train, valid, norms, 12)
    ax = fc.plot.descent(coreset)
    (line,) = ax.get_lines()
    assert line.get_ydata().tolist() == coreset.info["scores"]
    assert line.get_xdata().tolist() == coreset.info["exchanges"]
    labels = np.arange(120) % 2, np.arange(60) % 2
    classes = goracs(train, valid, norms, 12, train_labels=labels[0], valid_labels=labels[1])
    _, second = matplotlib.pyplot.subplots()
    assert fc.plot.descent(classes, second) is second
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["class 0", "class 1"]
    matplotlib.pyplot.close("all")


def test_descent_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="coreset must be a Coreset, got int"):
        fc.plot.descent(3)
    other = fc.simcore(GOOD + 1, GOOD + 1, 2)
    with pytest.raises(ValueError, match=r"coreset must be one that goracs returned.*rounds"):
        fc.plot.descent(other)
    coreset = goracs(GOOD, GOOD, np.ones(6), 2)
    hide(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match=r"plot.descent needs matplotlib.*flashcoreset\[demo\]"):
        fc.plot.descent(coreset)


def test_select_by_name() -> None:
    train, valid, norms = data(60, 30)
    by_name = fc.select("goracs", train=train, valid=valid, grad_norms=norms, k=5, lam=0.5)
    assert torch.equal(by_name.indices, goracs(train, valid, norms, 5).indices)


def test_memory_estimate() -> None:
    estimate = fc.memory_estimate(fc.goracs, (15_000, 768), (5_000, 768), (15_000,), 1_000)
    assert estimate < 2**30
    # The matrix of a million by ten thousand would take 40 GB.
    assert fc.memory_estimate("goracs", (10**6, 64), (10_000, 64), None, 1_000) < 2 * 2**30
    with pytest.raises(ValueError, match="valid must have 64 columns"):
        fc.memory_estimate("goracs", (100, 64), (100, 32), None, 5)
    with pytest.raises(ValueError, match="k must be <= the 100 rows of train"):
        fc.memory_estimate("goracs", (100, 64), (100, 64), None, 101)
