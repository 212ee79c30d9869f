"""What CCS does by default and beside its published form: the cut-off, kinds of strata, the search for a cut-off, and the coverage
of a subset; each against values worked out by hand or by plain NumPy."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

import flashcoreset as fc
from flashcoreset.methods.ccs import reference
from flashcoreset.methods.ccs.strata import random_keys

INF = math.inf
AUM = np.random.default_rng(0).permutation(np.linspace(-3, 5, 1000))


# --- the cut-off ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "ratio", "origin"),
    [
        (100, 0.3, "published"),
        (200, 0.2, "published"),
        (10, 0.3, "interpolated"),
        (103, 0.3, "published"),
        (150, 0.25, "interpolated"),
        (300, 0.1, "interpolated"),
        (350, 0.05, "interpolated"),
        (400, 0.0, "interpolated"),
        (999, 0.0, "interpolated"),
        (1000, 0.0, "interpolated"),
    ],
)
def test_cut_off_by_default_is_the_published_one(k: int, ratio: float, origin: str) -> None:
    coreset = fc.ccs({"aum": AUM}, k)
    assert coreset.info["mislabel_ratio"] == ratio
    assert coreset.info["mislabel_ratio_from"] == origin
    lowest = np.argsort(AUM)[: round(1000 * ratio)].tolist()
    assert coreset.info["dropped"] == len(lowest)
    assert not set(coreset.indices.tolist()) & set(lowest)
    given = fc.ccs(AUM, k, mislabel_scores=AUM, mislabel_ratio=ratio)
    assert torch.equal(coreset.indices, given.indices)
    assert given.info["mislabel_ratio_from"] == "argument"


def test_no_cut_off_stays_available() -> None:
    coreset = fc.ccs({"aum": AUM}, 100, mislabel_ratio=0)
    assert (coreset.info["dropped"], coreset.info["mislabel_ratio_from"]) == (0, "argument")
    assert coreset.indices.tolist() == fc.ccs(AUM, 100, mislabel_ratio=0).indices.tolist()


def test_cut_off_by_default_in_groups() -> None:
    groups = np.arange(1000) % 3
    coreset = fc.ccs({"aum": AUM}, 100, groups=groups)
    assert coreset.info["dropped"] == math.floor(0.3 * 334) + 2 * math.floor(0.3 * 333)
    assert coreset.info["mislabel_ratio"] == 0.3


def test_scores_without_mislabel_scores_are_warned_of() -> None:
    with pytest.warns(fc.InputWarning, match=r"where 100 of 1000 samples are kept.*drop the 30 %.*ratio=0"):
        coreset = fc.ccs(AUM, 100)
    assert coreset.info["mislabel_ratio_from"] == "none"
    assert torch.equal(coreset.indices, fc.ccs(AUM, 100, mislabel_ratio=0).indices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fc.ccs(AUM, 310)  # nothing to speak of was published
        fc.ccs(AUM, 100, n_strata=1)  # uniform


def test_one_stratum_is_random_after_the_same_cut_off() -> None:
    """Each of the 70 samples left comes equally often: 2,000 draws of 10 have each 286 times, with a deviation of 15.6."""
    aum = torch.arange(100.0)
    draws = Counter[int]()
    for seed in range(2000):
        draws.update(fc.ccs({"aum": aum}, 10, n_strata=1, seed=seed).indices.tolist())
    assert set(draws) == set(range(30, 100))
    assert max(abs(count - 2000 / 7) for count in draws.values()) < 4.5 * 15.6


# --- strata ---------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 2.0, 3.0, 10.0, 1e300, INF]), min_size=1, max_size=30),
    n_strata=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
def test_log_strata_are_equally_wide_in_logarithms(
    scores: list[float], n_strata: int, share: float, seed: int
) -> None:
    k = max(1, math.floor(share * len(scores)))
    coreset = fc.ccs(scores, k, strata="log", n_strata=n_strata, seed=seed)
    with np.errstate(divide="ignore"):
        logs = np.log(scores).tolist()
    keys = random_keys(seed, len(scores)).tolist()
    wanted = reference.ccs(logs, k, logs, 0.0, n_strata, keys)
    assert coreset.indices.tolist() == [i for picks in wanted for i in picks]


def test_log_strata_by_hand() -> None:
    scores = [1.0, 3.0, 10.5, 99.0, 101.0, 1000.0, 0.0, INF]
    info = fc.ccs(scores, 8, strata="log", n_strata=3).info
    assert info["sizes"] == [3, 2, 3]  # 0, 1, 3 | 10.5, 99 | 101, 1000, inf
    assert info["edges"] == pytest.approx([1, 10, 100, 1000])
    assert (info["edges"][0], info["edges"][-1]) == (1, 1000)


@given(
    scores=st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.floats(-9, 9), st.sampled_from([INF, -INF])),
        min_size=1, max_size=40,
    ),
    n_strata=st.integers(1, 12),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_quantile_strata_follow_their_definition(
    scores: list[float], n_strata: int, share: float, seed: int
) -> None:
    """A stratum begins at the score of rank floor(i n / n_strata); a score lies in the last one that begins at it or below."""
    n = len(scores)
    k = max(1, math.floor(share * n))
    coreset = fc.ccs(scores, k, strata="quantile", n_strata=n_strata, seed=seed, mislabel_ratio=0)
    ordered = sorted(scores)
    starts = [ordered[i * n // n_strata] for i in range(n_strata)]
    members: list[list[int]] = [[] for _ in range(n_strata)]
    for i, score in enumerate(scores):
        members[max(j for j in range(n_strata) if starts[j] <= score)].append(i)
    assert coreset.info["sizes"] == [len(m) for m in members]
    assert coreset.info["edges"] == [*starts, ordered[-1]]
    keys = random_keys(seed, n)
    counts = reference.budgets([len(m) for m in members], k)
    wanted = [sorted(sorted(m, key=lambda i: int(keys[i]))[:c]) for m, c in zip(members, counts, strict=True)]
    assert coreset.indices.tolist() == [i for picks in wanted for i in picks]


def test_quantile_strata_of_distinct_scores_are_equally_full() -> None:
    info = fc.ccs(AUM, 500, strata="quantile", n_strata=40).info
    assert info["sizes"] == [25] * 40
    assert set(info["counts"]) == {12, 13}


def test_heavy_tails_are_warned_of_and_remedied() -> None:
    scores = np.exp(2 * np.random.default_rng(1).standard_normal(5000))
    with pytest.warns(
        fc.InputWarning,
        match=r"of 50 strata are empty: one stratum holds 9\d % of the samples.*strata='quantile' or strata='log'",
    ):
        width = fc.ccs(scores, 1000, mislabel_ratio=0)
    assert max(width.info["sizes"]) > 0.9 * 5000
    for kind in ("log", "quantile"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            info = fc.ccs(scores, 1000, strata=kind, mislabel_ratio=0).info
        assert max(info["sizes"]) < 0.1 * 5000


def test_warning_names_what_can_be_done() -> None:
    negative = np.append(AUM, -1e6)
    with pytest.warns(fc.InputWarning, match=r"48 of 50 strata are empty.*pass strata='quantile', fewer"):
        fc.ccs(negative, 500)
    with pytest.warns(fc.InputWarning, match=r"strata are empty.*pass strata='quantile', fewer"):
        fc.ccs(np.append(np.linspace(5, 6, 100), 1e-300), 60, strata="log")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fc.ccs(AUM, 500)
        fc.ccs([1.0] * 50, 40)  # all in one stratum: a uniform choice
        fc.ccs(negative, 500, strata="quantile")
        fc.ccs(AUM[:4], 3)  # 4 samples cannot fill 50 strata


def test_warnings_stand_at_the_callers_line() -> None:
    with pytest.warns(fc.InputWarning) as seen:
        fc.ccs(AUM, 10)
    assert [record.filename for record in seen] == [__file__]


# --- the search -----------------------------------------------------------------------------------


def test_tuning_takes_the_best_of_the_ratios() -> None:
    asked: list[list[int]] = []

    def evaluate(indices: torch.Tensor) -> float:
        asked.append(indices.tolist())
        return -abs(float(np.sort(AUM[indices.numpy()])[0]) + 1.4)  # best where the lowest score is -1.4

    calls: list[tuple[int, int]] = []
    coreset = fc.tune_ccs(
        AUM, 400, evaluate, mislabel_scores=AUM, seed=3, n_strata=20, progress=lambda *call: calls.append(call)
    )  # fmt: skip
    alone = [
        fc.ccs(AUM, 400, mislabel_scores=AUM, mislabel_ratio=r / 10, seed=3, n_strata=20) for r in range(7)
    ]
    assert asked == [found.indices.tolist() for found in alone]
    values = [-abs(AUM[found.indices.numpy()].min() + 1.4) for found in alone]
    assert [ratio for ratio, _ in coreset.info["tried"]] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert [value for _, value in coreset.info["tried"]] == values
    best = int(np.argmax(values))
    assert best == 2
    assert coreset.info["mislabel_ratio"] == 0.2
    assert torch.equal(coreset.indices, alone[best].indices)
    assert coreset.info["skipped"] == [0.7, 0.8, 0.9]
    assert calls == [(i, 7) for i in range(1, 8)]


def test_tuning_takes_the_smallest_ratio_of_equals_and_any_number() -> None:
    coreset = fc.tune_ccs({"aum": AUM}, 100, lambda _: torch.tensor(1.0), (0.3, 0.1, 0.1))
    assert coreset.info["mislabel_ratio"] == 0.1
    assert coreset.info["tried"] == [(0.1, 1.0), (0.3, 1.0)]
    groups = np.arange(1000) % 2
    assert fc.tune_ccs({"aum": AUM}, 9, lambda _: 1, [0.5], groups=groups).info["dropped"] == 500


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"evaluate": 3}, TypeError, r"evaluate must be a callable\(indices\) -> float, got 3 of type int"),
        ({"evaluate": lambda _: "good"}, TypeError, "what evaluate returns must be a number, got 'good'"),
        ({"evaluate": lambda _: None}, TypeError, "what evaluate returns must be a number, got None"),
        (
            {"evaluate": lambda _: math.nan},
            ValueError,
            "what evaluate returns must be finite, got nan",
        ),
        ({"mislabel_ratios": []}, ValueError, "mislabel_ratios must have at least 1 entry, got none"),
        ({"mislabel_ratios": 0.1}, TypeError, "mislabel_ratios must be numbers, got 0.1"),
        ({"mislabel_ratios": "0.1"}, TypeError, "mislabel_ratios must be numbers, got '0.1'"),
        ({"mislabel_ratios": [1.0]}, ValueError, r"mislabel_ratios must be in \[0, 1\), got 1.0"),
        ({"mislabel_ratios": [None]}, TypeError, "mislabel_ratios must be a number, got None"),
        (
            {"k": 900, "mislabel_ratios": [0.5, 0.2]},
            ValueError,
            "mislabel_ratios must have one that leaves 900 samples, got 0.2 as the least",
        ),
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"strata": "depth"}, ValueError, "unknown strata 'depth'"),
        ({"mislabel_scores": None}, ValueError, "mislabel_scores must be given with mislabel_ratio="),
        ({"progress": 3}, TypeError, "progress must be None, True or a callable"),
    ],
)
def test_bad_arguments_of_tuning(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    asked: list[Any] = []
    good: dict[str, Any] = {"scores": AUM, "k": 100, "evaluate": asked.append, "mislabel_scores": AUM}
    with pytest.raises(error, match=message):
        fc.tune_ccs(**good | changes)
    assert asked == []


# --- samples that were never learned ----------------------------------------------------------------


def test_never_learned_samples_count_as_asked() -> None:
    td = fc.TrainingDynamics(3)
    right, wrong = [4.0, 0.0], [0.0, 4.0]
    for epoch, rows in enumerate(([right, wrong, right], [wrong, wrong, right])):
        td.update([0, 1, 2], torch.tensor(rows), [0, 0, 0], epoch)
    assert td.scores()["forgetting"].tolist() == [1, INF, 0]
    assert td.scores(never_learned=0)["forgetting"].tolist() == [1, 0, 0]
    assert td.scores(never_learned=7.5)["forgetting"].tolist() == [1, 7.5, 0]
    assert td.scores(never_learned=0)["aum"].tolist() == td.scores()["aum"].tolist()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "never_learned must be >= 0, got -1"),
        (math.nan, ValueError, "never_learned must be finite, got nan"),
        (-INF, ValueError, "never_learned must be finite, got -inf"),
        ("0", TypeError, "never_learned must be a number, got '0'"),
    ],
)
def test_bad_never_learned(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fc.TrainingDynamics(3).scores(never_learned=value)


# --- coverage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "l1", "cosine"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("budget", [1, 2**28])
def test_coverage_is_the_mean_distance_to_the_nearest_member(
    backend: str, metric: str, dtype: type, budget: int
) -> None:
    rng = np.random.default_rng(0)
    x, test = rng.standard_normal((97, 5)).astype(dtype), rng.standard_normal((31, 5)).astype(dtype)
    members = rng.choice(97, 12, replace=False)
    name = {"l1": "cityblock"}.get(metric, metric)
    for points in (None, test):
        wide = (x if points is None else points).astype(np.float64)
        wanted = cdist(wide, x[members].astype(np.float64), name).min(1).mean()
        got = fc.coverage_auc(x, members, test=points, metric=metric, backend=backend, memory_budget=budget)
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_coverage_is_the_area_under_the_curve_of_radii() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 3))
    members = [3, 9, 33]
    nearest = cdist(x, x[members]).min(1)
    # r(p) by its definition: the least radius that holds a share p of the points.
    shares = (np.arange(60_000) + 0.5) / 60_000
    radii = [np.sort(nearest)[math.ceil(p * 60) - 1] for p in shares]
    assert fc.coverage_auc(x, members) == pytest.approx(np.mean(radii), rel=1e-9)


def test_coverage_of_many_members_and_blocks_is_the_same() -> None:
    x = np.random.default_rng(2).standard_normal((3000, 4))
    whole = fc.coverage_auc(x, range(2500))
    assert whole == fc.coverage_auc(x, list(range(2500))[::-1], memory_budget=1000)
    assert whole == pytest.approx(cdist(x, x[:2500]).min(1).mean())
    assert fc.coverage_auc(x, range(3000)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_coverage_at_the_ends_of_float32(scale: float) -> None:
    x = np.float32([[0.0, 0.0], [3 * scale, 4 * scale], [6 * scale, 8 * scale]])
    assert fc.coverage_auc(x, [0]) == pytest.approx(5 * scale, rel=1e-6)
    assert fc.coverage_auc(x.astype(np.float64) * scale**4, [0]) == pytest.approx(5 * scale**5, rel=1e-6)
    assert fc.coverage_auc(x, [0], metric="sqeuclidean") == pytest.approx(125 / 3 * scale**2, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": []}, ValueError, "indices must have at least 1 entry, got none"),
        ({"indices": [0, 6]}, ValueError, r"indices must be in \[0, 6\), got 6 at position 1"),
        ({"indices": [-1]}, ValueError, r"indices must be in \[0, 6\), got -1 at position 0"),
        ({"indices": [0.5]}, TypeError, "indices must hold integers"),
        ({"x": np.full((6, 2), np.nan)}, ValueError, "x must be finite, got NaN at row 0"),
        ({"test": np.full((6, 2), np.inf)}, ValueError, "test must be finite, got inf at row 0"),
        ({"test": np.ones((6, 3))}, ValueError, "test must have 2 columns as x has"),
        ({"test": np.ones((6, 2), np.float32)}, TypeError, "test must have the dtype of x, torch.float64"),
        ({"test": torch.ones(6, 2, dtype=torch.float64, device="meta")}, ValueError, "test is on device meta"),
        ({"metric": "dot"}, ValueError, "unknown metric 'dot'; valid names: euclidean, sqeuclidean, l1, cosine"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be >= 1, got 0"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    ],
)  # fmt: skip
def test_bad_arguments_of_coverage(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fc.coverage_auc(**{"x": np.ones((6, 2)), "indices": [0], "test": None} | changes)


def test_estimates() -> None:
    assert fc.memory_estimate(fc.coverage_auc, (10**6, 64), (1000,), test=(10**4, 64)) < 2**28
    with pytest.raises(ValueError, match="test must have 64 columns"):
        fc.memory_estimate("coverage_auc", (100, 64), (5,), test=(9, 3))
    for strata in ("width", "log", "quantile"):
        assert fc.memory_estimate(fc.ccs, (1000,), 10, strata=strata) > 0
    with pytest.raises(ValueError, match="unknown strata 'depth'"):
        fc.memory_estimate(fc.ccs, (1000,), 10, strata="depth")
