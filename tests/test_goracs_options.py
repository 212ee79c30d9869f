"""goracs without norms, with norms cut and scaled, with scales of all classes, and with bounds to its run; against costs and scores
made of the definition in NumPy and POT."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import flashcoreset as fc
from flashcoreset.methods.goracs import exact_transport, reference

ot = exact_transport.load_pot()


def data(n: int, clients: int, d: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((8, d))
    train = centres[rng.integers(0, 8, n)] + 0.4 * rng.standard_normal((n, d))
    own = rng.choice(8, clients, p=rng.dirichlet(np.ones(8)))
    return train, centres[own] + 0.4 * rng.standard_normal((clients, d)), rng.random(n) + 0.05


def unit(c: np.ndarray) -> np.ndarray:
    c = c - c.min()
    return c / (c.max() or 1)


def check_stage_1(c: np.ndarray, k: int, coreset: fc.Coreset) -> None:
    """The picks, and the score of the picks, are those of the costs `c` [n, V]."""
    assert coreset.indices.tolist() == reference.cover(c, k)
    assert coreset.info["score"] == pytest.approx(reference.score(c[coreset.indices.numpy()])[0], abs=1e-12)


# --- norms ----------------------------------------------------------------------------------------


def test_norms_are_not_asked_for_by_default() -> None:
    train, valid, norms = data(80, 30)
    plain = fc.goracs(train, valid, k=9)
    for other in (fc.goracs(train, valid, None, 9), fc.goracs(train, valid, norms, 9, lam=0.0)):
        assert torch.equal(other.indices, plain.indices)
        assert other.info["scores"] == plain.info["scores"]
    c = cdist(train, valid)
    check_stage_1(unit(c), 9, fc.goracs(train, valid, k=9, max_exchanges=0))
    with pytest.raises(TypeError, match="k must be an int, got None"):
        fc.goracs(train, valid)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.93, 1.0])
def test_norms_are_clipped_at_a_quantile(quantile: float) -> None:
    train, valid, norms = data(90, 40, seed=1)
    norms[7] = 50.0
    clipped = np.minimum(norms, np.quantile(norms, quantile))
    coreset = fc.goracs(train, valid, norms, 12, lam=0.7, norm_clip=quantile, max_exchanges=0)
    check_stage_1(reference.costs(train, valid, clipped, 0.7), 12, coreset)


def test_one_outlier_switches_norms_off_unless_they_are_clipped() -> None:
    train, valid, norms = data(200, 60, seed=2)
    options: dict[str, Any] = {"lam": 0.1, "max_exchanges": 0}
    plain = fc.goracs(train, valid, norms, 20, **options).indices
    without = fc.goracs(train, valid, k=20, max_exchanges=0).indices
    norms[5] = 1e6
    outlier = fc.goracs(train, valid, norms, 20, **options).indices
    clipped = fc.goracs(train, valid, norms, 20, norm_clip=0.95, **options).indices

    def common(a: torch.Tensor, b: torch.Tensor) -> int:
        return len(set(a.tolist()) & set(b.tolist()))

    assert common(outlier, without) >= 18  # but for the outlier itself
    assert common(clipped, plain) > common(outlier, plain)


@pytest.mark.parametrize("lam", [0.3, 1.0, 4.0])
def test_norms_scaled_to_the_spread_of_distances(lam: float) -> None:
    train, valid, norms = data(120, 50, seed=3)
    d = cdist(train, valid)
    d /= d.max()
    term = lam * norms * d.mean(1).std() / norms.std()
    c = unit(d - term[:, None])
    for budget in (1, 2**28):
        coreset = fc.goracs(
            train, valid, norms, 12, lam=lam, norm_scale="spread", max_exchanges=0, memory_budget=budget
        )
        check_stage_1(c, 12, coreset)
        spread = coreset.info["spread"]
        assert spread["distance"] == pytest.approx(d.mean(1).std(), rel=1e-12)
        assert spread["norms"] == pytest.approx(lam * d.mean(1).std(), rel=1e-12)
    # Their unit and a common shift do not matter then.
    shifted = fc.goracs(train, valid, 7 * norms + 3, 12, lam=lam, norm_scale="spread", max_exchanges=0)
    assert torch.equal(shifted.indices, coreset.indices)


def test_equal_norms_have_no_spread_to_scale() -> None:
    train, valid, _ = data(60, 30)
    plain = fc.goracs(train, valid, k=8)
    equal = fc.goracs(train, valid, np.ones(60), 8, lam=2, norm_scale="spread")
    assert torch.equal(plain.indices, equal.indices)


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_parts_of_the_score(lam: float) -> None:
    train, valid, norms = data(90, 40, seed=4)
    info = (coreset := fc.goracs(train, valid, norms, 12, lam=lam, max_exchanges=5)).info
    d = cdist(train, valid)
    d /= d.max()
    term = lam * norms / norms.max()
    c = d - term[:, None]
    chosen = coreset.indices.numpy()
    plan = ot.emd(np.full(12, 1 / 12), np.full(40, 1 / 40), unit(c)[chosen])
    parts = info["parts"]
    assert parts["distance"] == pytest.approx((plan * d[chosen]).sum(), abs=1e-9)
    assert parts["norms"] == pytest.approx(term[chosen].mean(), abs=1e-12)
    assert (parts["shift"], parts["scale"]) == pytest.approx((c.min(), c.max() - c.min()), abs=1e-12)
    score = (parts["distance"] - parts["norms"] - parts["shift"]) / parts["scale"]
    assert score == pytest.approx(info["score"], abs=1e-12)
    assert info["spread"] == pytest.approx({"distance": d.mean(1).std(), "norms": term.std()}, abs=1e-12)


# --- labels ---------------------------------------------------------------------------------------


def labelled(seed: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    train, valid, norms = data(120, 50, seed=seed)
    rng = np.random.default_rng(0)
    labels = {"train_labels": rng.integers(0, 3, 120), "valid_labels": rng.choice([0, 2], 50)}
    train[labels["train_labels"] == 2] *= 3
    norms[labels["train_labels"] == 2] *= 5
    return train, valid, norms, labels


@pytest.mark.parametrize("scaling", ["class", "global"])
@pytest.mark.parametrize("quantile", [None, 0.6])
@pytest.mark.parametrize("budget", [1, 2**28])
def test_scales_of_a_class_or_of_all(scaling: str, quantile: float | None, budget: int) -> None:
    train, valid, norms, labels = labelled()
    coreset = fc.goracs(
        train, valid, norms, 15, lam=0.5, scaling=scaling, norm_clip=quantile, max_exchanges=0,
        memory_budget=budget, **labels,
    )  # fmt: skip
    whole = cdist(train, valid)
    if quantile and scaling == "global":
        norms = np.minimum(norms, np.quantile(norms, quantile))
    begin = 0
    for label, count in coreset.info["budgets"].items():
        rows, own = labels["train_labels"] == label, labels["valid_labels"] == label
        part, d = norms[rows], whole[rows][:, own]
        if quantile and scaling == "class":
            part = np.minimum(part, np.quantile(part, quantile))
        largest, top = (whole.max(), norms.max()) if scaling == "global" else (d.max(), part.max())
        c = unit(d / largest - 0.5 * part[:, None] / top)
        expected = np.flatnonzero(rows)[reference.cover(c, count)].tolist()
        assert coreset.indices[begin : begin + count].tolist() == expected
        chosen = reference.score(c[reference.cover(c, count)])[0]
        assert coreset.info["classes"][label]["score"] == pytest.approx(chosen, abs=1e-12)
        begin += count


def test_global_scales_are_the_published_ones_but_for_the_unit_of_lam() -> None:
    """The published code for labels leaves distances as they are, so that its lam is one in units of these."""
    train, valid, norms, labels = labelled()
    coreset = fc.goracs(train, valid, norms, 15, lam=0.5, scaling="global", max_exchanges=0, **labels)
    whole = cdist(train, valid)
    begin = 0
    for label, count in coreset.info["budgets"].items():
        rows, own = labels["train_labels"] == label, labels["valid_labels"] == label
        published = unit(whole[rows][:, own] - 0.5 * whole.max() * (norms[rows] / norms.max())[:, None])
        expected = np.flatnonzero(rows)[reference.cover(published, count)].tolist()
        assert coreset.indices[begin : begin + count].tolist() == expected
        begin += count


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_global_scales_at_the_ends_of_float32(factor: float) -> None:
    train, valid, norms, labels = labelled()
    options: dict[str, Any] = {"lam": 0.5, "scaling": "global", "max_exchanges": 2, **labels}
    plain = fc.goracs(np.float32(train), np.float32(valid), norms, 15, **options)
    factor = float(2.0 ** round(np.log2(factor)))
    other = fc.goracs(np.float32(train * factor), np.float32(valid * factor), norms, 15, **options)
    assert torch.equal(plain.indices, other.indices)


def test_a_class_without_norms_is_taken_with_global_scales() -> None:
    train, valid, norms, labels = labelled()
    norms[labels["train_labels"] == 0] = 0
    with pytest.raises(ValueError, match="grad_norms must not be all 0 with lam > 0 in class 0"):
        fc.goracs(train, valid, norms, 15, lam=0.5, **labels)
    coreset = fc.goracs(train, valid, norms, 15, lam=0.5, scaling="global", **labels)
    assert coreset.info["classes"][0]["parts"]["norms"] == 0


# --- bounds of a run ------------------------------------------------------------------------------


def test_solves_are_limited() -> None:
    train, valid, norms = data(120, 60, seed=0)
    free = fc.goracs(train, valid, norms, 12, lam=0.5)
    assert free.info["exact_solves"] > 8
    for limit in (1, 2, 5, 8):
        info = fc.goracs(train, valid, norms, 12, lam=0.5, max_solves=limit).info
        assert info["exact_solves"] == limit
        assert (info["stopped"], info["certificate"]) == ("max_solves", False)
        assert info["scores"] == free.info["scores"][: len(info["scores"])]
    one = fc.goracs(train, valid, norms, 12, lam=0.5, max_solves=1)
    assert torch.equal(one.indices, fc.goracs(train, valid, norms, 12, lam=0.5, max_exchanges=0).indices)
    many = fc.goracs(train, valid, norms, 12, lam=0.5, max_solves=10_000)
    assert torch.equal(many.indices, free.indices)
    assert many.info["stopped"] == free.info["stopped"]
    by_sinkhorn = fc.goracs(train, valid, norms, 12, solver="sinkhorn", reg=0.05, max_solves=2).info
    assert by_sinkhorn["sinkhorn_solves"] == 2


def test_solves_are_limited_in_each_class() -> None:
    train, valid, norms, labels = labelled()
    info = fc.goracs(train, valid, norms, 15, lam=0.5, max_solves=2, **labels).info
    assert [part["exact_solves"] for part in info["classes"].values()] == [2, 2]


def test_time_is_limited() -> None:
    train, valid, norms = data(120, 60, seed=0)
    short = fc.goracs(train, valid, norms, 12, lam=0.5, time_limit=1e-9)
    assert (short.info["stopped"], short.info["exact_solves"]) == ("time_limit", 1)
    assert torch.equal(short.indices, fc.goracs(train, valid, norms, 12, lam=0.5, max_exchanges=0).indices)
    long = fc.goracs(train, valid, norms, 12, lam=0.5, time_limit=3600)
    assert torch.equal(long.indices, fc.goracs(train, valid, norms, 12, lam=0.5).indices)


def test_classes_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that runs a second at each look; 30 s are left for two classes, and the second gets what the first leaves."""
    from flashcoreset.methods.goracs.exact_descent import ExactDescent

    seen: list[float] = []
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    original = ExactDescent.__init__

    def watch(self: Any, costs: Any, picks: Any, options: Any) -> None:
        seen.append(options.deadline)
        original(self, costs, picks, options)

    monkeypatch.setattr(ExactDescent, "__init__", watch)
    train, valid, norms, labels = labelled()
    info = fc.goracs(train, valid, norms, 15, lam=0.5, time_limit=30, **labels).info
    assert seen[0] == 1 + 29 / 2
    assert seen[1] == 30
    assert {part["stopped"] for part in info["classes"].values()} <= {
        "time_limit",
        "candidates",
        "certificate",
    }


@pytest.mark.parametrize("tol", [1e-3, 0.02, 0.2])
def test_small_gains_are_left(tol: float) -> None:
    for seed in range(4):
        train, valid, norms = data(14, 9, d=2, seed=seed)
        coreset = fc.goracs(train, valid, norms, 3, lam=0.5, tol=tol)
        scores = coreset.info["scores"]
        assert all(new < old * (1 - tol) for old, new in itertools.pairwise(scores))
        if coreset.info["certificate"]:
            c = reference.costs(train, valid, norms, 0.5)
            chosen = coreset.indices.tolist()
            for place, o in itertools.product(range(3), set(range(14)) - set(chosen)):
                trial = [*chosen[:place], o, *chosen[place + 1 :]]
                assert reference.score(c[trial])[0] >= scores[-1] * (1 - tol) - 1e-9


def test_small_gains_cost_no_solves() -> None:
    train, valid, _ = data(300, 100, seed=1)
    exact, rough = fc.goracs(train, valid, k=20).info, fc.goracs(train, valid, k=20, tol=0.01).info
    assert rough["exact_solves"] < exact["exact_solves"]
    assert rough["score"] < rough["scores"][0]
    assert fc.goracs(train, valid, k=20, tol=1.0).info["exact_solves"] == 1
    assert fc.goracs(train, valid, k=20, tol=0.0).info["scores"] == exact["scores"]


def test_estimate_takes_the_same_options() -> None:
    options: dict[str, Any] = {
        "lam": 0.5, "norm_clip": 0.9, "norm_scale": "spread", "scaling": "global", "max_solves": 9, "time_limit": 3.0, "tol": 0.01,
    }  # fmt: skip
    assert fc.memory_estimate(fc.goracs, (100, 8), (40, 8), (100,), 5, **options) > 0
