"""ccs and top_scores against the definition gone through sample by sample, and everything a caller can get wrong."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcoreset as fc
from flashcoreset.methods.ccs import reference
from flashcoreset.methods.ccs.strata import budgets, random_keys

NAN, INF = math.nan, math.inf


def check_info(info: dict[str, Any], picks: list[list[int]]) -> None:
    assert info["counts"] == [len(p) for p in picks]
    assert len(info["edges"]) == len(info["sizes"]) + 1 == len(picks) + 1
    assert all(taken <= size for taken, size in zip(info["counts"], info["sizes"], strict=True))


# --- ccs ------------------------------------------------------------------------------------------

SCORES = st.lists(
    st.one_of(
        st.integers(-5, 5).map(float),
        st.floats(-1e3, 1e3),
        st.sampled_from([INF, -INF, 1.7e308, -1.7e308, 5e-324, -3.0, 0.1]),
    ),
    min_size=1,
    max_size=40,
)


@given(
    scores=SCORES, share=st.floats(0, 1), n_strata=st.integers(1, 60), ratio=st.sampled_from([0.0, 0.1, 0.5, 0.99]),
    seed=st.integers(0, 2**64 - 1), data=st.data(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
def test_follows_the_definition(
    scores: list[float], share: float, n_strata: int, ratio: float, seed: int, data: st.DataObject
) -> None:
    n = len(scores)
    mislabel = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=n, max_size=n))
    left = n - math.floor(ratio * n)
    k = max(1, math.floor(share * left))
    coreset = fc.ccs(scores, k, mislabel_scores=mislabel, mislabel_ratio=ratio, n_strata=n_strata, seed=seed)
    wanted = reference.ccs(scores, k, mislabel, ratio, n_strata, random_keys(seed, n).tolist())
    assert coreset.indices.tolist() == [i for picks in wanted for i in picks]
    assert len(set(coreset.indices.tolist())) == k
    assert coreset.weights.tolist() == [1.0] * k
    assert coreset.info["dropped"] == n - left
    check_info(coreset.info, wanted)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9), share=st.floats(0, 1))
@settings(max_examples=500, deadline=None)
def test_budgets_are_spent_whole_and_never_above_a_size(sizes: list[int], share: float) -> None:
    k = round(share * sum(sizes))
    counts = budgets(np.array(sizes), k).tolist()
    assert counts == reference.budgets(sizes, k)
    assert sum(counts) == k
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    # The samples that a stratum cannot give are shared evenly by the others: no stratum is far below another without being
    # empty.
    open_ = [count for count, size in zip(counts, sizes, strict=True) if count < size]
    if open_:
        assert max(counts) - min(open_) <= 1


def test_a_case_worked_by_hand() -> None:
    # Strata of width 1 over [0, 4]: sizes 5, 1, 0, 2; 4 belongs to the last one. A budget of 6 over the sizes 0, 1, 2,
    # 5: 0, min(1, 6 // 3), min(2, 5 // 2), min(5, 3).
    scores = [0.0, 0.1, 0.2, 0.3, 0.9, 1.5, 3.5, 4.0]
    coreset = fc.ccs(scores, 6, n_strata=4)
    assert coreset.info == {
        "dropped": 0,
        "mislabel_ratio": 0.0,
        "mislabel_ratio_from": "none",
        "edges": [0, 1, 2, 3, 4],
        "sizes": [5, 1, 0, 2],
        "counts": [3, 1, 0, 2],
    }
    assert coreset.indices[3:].tolist() == [5, 6, 7]
    assert set(coreset.indices[:3].tolist()) <= {0, 1, 2, 3, 4}


def test_boundaries_belong_to_the_upper_stratum_and_the_maximum_to_the_last() -> None:
    coreset = fc.ccs(torch.arange(11.0), 11, n_strata=5)
    assert coreset.info["sizes"] == [2, 2, 2, 2, 3]
    assert fc.ccs(-torch.arange(11.0), 11, n_strata=5).info["sizes"] == [2, 2, 2, 2, 3]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e300, INF, -INF])
def test_constant_scores_are_one_stratum(value: float) -> None:
    coreset = fc.ccs([value] * 20, 7, n_strata=4, mislabel_ratio=0)
    assert sorted(coreset.info["sizes"]) == [0, 0, 0, 20]
    assert len(set(coreset.indices.tolist())) == 7


def test_all_negative_scores_keep_the_top_item() -> None:
    scores = -torch.arange(1.0, 31)
    coreset = fc.ccs(scores, 30, n_strata=6)
    assert sorted(coreset.indices.tolist()) == list(range(30))
    assert fc.ccs(scores, 6, n_strata=30, mislabel_ratio=0).info["counts"].count(1) == 6


def test_infinite_scores_are_the_hardest_and_not_part_of_the_range() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, INF, INF, -INF])
    coreset = fc.ccs(scores, 6, n_strata=2)
    assert coreset.info["edges"] == [0, 1, 2]
    assert coreset.indices.tolist() == [0, 5, 1, 2, 3, 4]


def test_samples_are_drawn_uniformly() -> None:
    """In a stratum of 6 that gives 2, every sample and every pair comes equally often."""
    scores, draws = [0.0] * 6 + [1.0] * 2, 3000
    singles: Counter[int] = Counter()
    pairs: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        picks = tuple(fc.ccs(scores, 4, n_strata=2, seed=seed).indices[:2].tolist())
        singles.update(picks)
        pairs.update([picks])
    assert set(pairs) == {(i, j) for i in range(6) for j in range(i + 1, 6)}
    for counts, p in ((singles, 1 / 3), (pairs, 1 / 15)):
        for count in counts.values():
            assert abs(count - draws * p) <= 4.5 * math.sqrt(draws * p * (1 - p))


def test_seeds_and_stability() -> None:
    scores = torch.randn(500, generator=torch.Generator().manual_seed(0))
    first = fc.ccs(scores, 60, seed=3, mislabel_ratio=0)
    assert torch.equal(fc.ccs(scores, 60, seed=3, mislabel_ratio=0).indices, first.indices)
    assert not torch.equal(fc.ccs(scores, 60, seed=4, mislabel_ratio=0).indices, first.indices)
    # The random numbers of a seed do not change from one release to the next.
    assert random_keys(3, 2).tolist() == [17234461323001060555, 1460271564492649549]
    assert fc.ccs([0.0] * 9, 3, seed=7).indices.tolist() == [1, 4, 8]


def test_mislabelled_samples_are_dropped() -> None:
    scores = torch.arange(10.0)
    mislabel = torch.tensor([5.0, 1, 1, 1, 5, 5, 5, 5, 0, 5])
    for ratio, gone in ((0.0, set()), (0.1, {8}), (0.39, {8, 1, 2}), (0.4, {8, 1, 2, 3})):
        coreset = fc.ccs(scores, 10 - len(gone), mislabel_scores=mislabel, mislabel_ratio=ratio)
        assert set(range(10)) - set(coreset.indices.tolist()) == gone
        assert coreset.info["dropped"] == len(gone)
    # The range is that of the remaining scores.
    assert fc.ccs(scores, 5, mislabel_scores=-scores, mislabel_ratio=0.5, n_strata=2).info["edges"] == [
        0,
        2,
        4,
    ]


def test_training_dynamics_are_taken_by_their_aum() -> None:
    td = fc.TrainingDynamics(30)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(3):
        td.update(range(30), torch.randn(30, 4, generator=generator), [0] * 30, epoch)
    scores = td.scores()
    got = fc.ccs(scores, 9, mislabel_ratio=0.2)
    plain = fc.ccs(scores["aum"], 9, mislabel_scores=scores["aum"], mislabel_ratio=0.2)
    assert torch.equal(got.indices, plain.indices)
    other = fc.ccs(scores, 9, mislabel_ratio=0.2, mislabel_scores=scores["el2n"])
    assert not torch.equal(got.indices, other.indices)
    assert len(fc.ccs(scores["forgetting"], 9, mislabel_ratio=0, n_strata=2).indices) == 9


def test_groups_are_problems_of_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    n, k, ratio = 97, 31, 0.15
    groups = torch.randint(-1, 3, (n,), generator=generator)
    scores, mislabel = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    coreset = fc.ccs(
        scores, k, mislabel_scores=mislabel, mislabel_ratio=ratio, groups=groups, n_strata=5, seed=2
    )
    keys = random_keys(2, n).tolist()
    labels = sorted(set(groups.tolist()))
    rows = [(groups == label).nonzero()[:, 0].tolist() for label in labels]
    left = [len(r) - math.floor(ratio * len(r)) for r in rows]
    wanted: list[int] = []
    for label, own, budget in zip(labels, rows, fc.allocate_budgets(left, k).tolist(), strict=True):
        picks = reference.ccs(
            scores[own].double().tolist(),
            budget,
            mislabel[own].double().tolist(),
            ratio,
            5,
            [keys[i] for i in own],
        )
        wanted += [own[i] for stratum in picks for i in stratum]
        check_info(coreset.info["groups"][label], picks)
    assert coreset.indices.tolist() == wanted
    assert coreset.info["dropped"] == n - sum(left)


def test_inputs_and_dtypes() -> None:
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0))
    wanted = fc.ccs(scores, 9, mislabel_ratio=0).indices
    for value in (scores.numpy(), scores.tolist(), scores.double(), torch.stack([scores, scores], 1)[:, 0]):
        assert torch.equal(fc.ccs(value, 9, mislabel_ratio=0).indices, wanted)
    assert fc.ccs(scores.half(), 9, mislabel_ratio=0).weights.dtype == torch.float32
    assert fc.ccs(scores.double(), 9, mislabel_ratio=0).weights.dtype == torch.float64
    assert fc.ccs(range(40), 9, mislabel_ratio=0).weights.dtype == torch.float32
    assert torch.equal(fc.select("ccs", scores=scores, k=9, mislabel_ratio=0).indices, wanted)
    assert len(fc.ccs(scores, 9, n_strata=100_000, mislabel_ratio=0).indices) == 9


# --- top_scores -----------------------------------------------------------------------------------


@given(scores=SCORES, share=st.floats(0, 1), largest=st.booleans())
@settings(max_examples=100, deadline=None)
def test_top_scores(scores: list[float], share: float, largest: bool) -> None:
    k = max(1, math.floor(share * len(scores)))
    coreset = fc.top_scores(scores, k, largest=largest)
    order = sorted(range(len(scores)), key=lambda i: -scores[i] if largest else scores[i])
    assert coreset.indices.tolist() == order[:k]
    assert coreset.info == {"threshold": scores[order[k - 1]]}
    assert coreset.weights.tolist() == [1.0] * k


def test_top_scores_in_groups() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.7, 0.3, 0.2])
    groups = [4, 4, 4, 4, -2, -2, 7]
    coreset = fc.top_scores(scores, 3, groups=groups)
    # 7 groups' shares of 3: 4 -> 1, 2 -> 0, 1 -> 0; the two left over go to the smallest shares.
    assert coreset.indices.tolist() == [4, 1, 6]
    assert coreset.info["threshold"] == pytest.approx({-2: 0.7, 4: 0.9, 7: 0.2})
    assert fc.top_scores(scores, 7, largest=False, groups=groups).indices.tolist() == [5, 4, 0, 2, 3, 1, 6]
    assert fc.top_scores(scores.double(), 1, groups=groups).info["threshold"] == pytest.approx({-2: 0.7})


# --- bad input ------------------------------------------------------------------------------------

S = [0.0, 1.0, 2.0, 3.0]
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN": ({"scores": [0.0, NAN, 1.0, NAN]}, ValueError, "scores must not be NaN, got NaN at position 1"),
    "no scores": ({"scores": []}, ValueError, r"scores must have at least 1 entry, got shape \(0,\)"),
    "2-d": ({"scores": torch.zeros(4, 1)}, ValueError, r"scores must have shape \[n\], got \(4, 1\)"),
    "text": ({"scores": ["a"]}, TypeError, "scores must hold real numbers"),
    "None": ({"scores": None}, TypeError, "scores must be a torch.Tensor.*, got NoneType"),
    "complex": (
        {"scores": torch.ones(4) + 0j},
        TypeError,
        "scores must hold real numbers, got dtype complex64",
    ),
    "dict": ({"scores": {"el2n": S}}, ValueError, "scores must have the entry aum, got el2n"),
    "k above n": ({"k": 5}, ValueError, "k must be <= the 4 samples, got 5"),
    "k 0": ({"k": 0}, ValueError, "k must be >= 1, got 0"),
    "k float": ({"k": 2.0}, TypeError, "k must be an int, got 2.0"),
    "k above the rest": (
        {"k": 3, "mislabel_ratio": 0.5, "mislabel_scores": S}, ValueError,
        "k must be <= the 2 samples that mislabel_ratio=0.5 leaves of 4, got 3",
    ),
    "ratio 1": ({"mislabel_ratio": 1}, ValueError, r"mislabel_ratio must be in \[0, 1\), got 1"),
    "ratio negative": ({"mislabel_ratio": -0.1}, ValueError, r"mislabel_ratio must be in \[0, 1\), got -0.1"),
    "ratio NaN": ({"mislabel_ratio": NAN}, ValueError, "mislabel_ratio must be finite, got nan"),
    "ratio list": ({"mislabel_ratio": [0.1]}, TypeError, r"mislabel_ratio must be a number, got \[0.1\]"),
    "strata of no kind": (
        {"strata": "depth"}, ValueError, "unknown strata 'depth'; valid names: width, quantile, log",
    ),
    "strata a number": ({"strata": 3}, TypeError, "strata must be a str, one of width, quantile, log, got 3"),
    "log of less than 0": (
        {"scores": [3.0, 0.0, -2.0, -1.0], "strata": "log"}, ValueError,
        r"scores must be >= 0 with strata='log', got -2.0 at position 2; pass strata='quantile'",
    ),
    "log of -inf": ({"scores": [-INF, 0.0, 1.0], "strata": "log"}, ValueError, "got -inf at position 0"),
    "ratio text": ({"mislabel_ratio": "0.1"}, TypeError, "mislabel_ratio must be a number, got '0.1'"),
    "no mislabel scores": (
        {"mislabel_ratio": 0.1}, ValueError, "mislabel_scores must be given with mislabel_ratio=0.1, got None",
    ),
    "mislabel NaN": (
        {"mislabel_scores": [0.0, 1.0, NAN, 2.0]}, ValueError, "mislabel_scores must not be NaN, got NaN at position 2",
    ),
    "mislabel short": ({"mislabel_scores": [0.0]}, ValueError, r"mislabel_scores must have shape \[4\], got \(1,\)"),
    "strata for nobody": ({"n_strata": 2**24 + 1}, ValueError, "n_strata must be <= 16777216, got 16777217"),
    "strata beyond 64 bits": ({"n_strata": 10**30}, ValueError, "n_strata must be <= 16777216"),
    "no strata": ({"n_strata": 0}, ValueError, "n_strata must be >= 1, got 0"),
    "strata float": ({"n_strata": 2.5}, TypeError, "n_strata must be an int, got 2.5"),
    "groups short": ({"groups": [0, 1]}, ValueError, r"groups must have shape \[4\], got \(2,\)"),
    "groups float": ({"groups": S}, TypeError, "groups must hold integers, got dtype float64"),
    "seed negative": ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    "seed large": ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, error, words = BAD[name]
    with pytest.raises(error, match=words):
        fc.ccs(**({"scores": S, "k": 2} | arguments))
    if arguments.keys() <= {"scores", "k", "groups"} and name != "dict":
        with pytest.raises(error, match=words):
            fc.top_scores(**({"scores": S, "k": 2} | arguments))


def test_bad_arguments_of_top_scores() -> None:
    with pytest.raises(TypeError, match="largest must be a bool, got 1 of type int"):
        fc.top_scores(S, 2, largest=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scores must be a torch.Tensor.*, got dict"):
        fc.top_scores({"aum": S}, 2)
    assert np.isfinite(fc.top_scores(S, np.int64(2)).info["threshold"])
