"""The samplers: imbalanced-learn's checks of estimators, its Pipeline, and what they choose."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.preprocessing import StandardScaler

import flashcoreset as fc
from flashcoreset.integrations.sklearn import (
    AutoCoresetSampler,
    CCSSampler,
    FacilityLocationSampler,
    KCenterSampler,
)

pytest.importorskip("imblearn", reason="imbalanced-learn comes with the extra `test`")
from imblearn.base import is_sampler
from imblearn.pipeline import Pipeline
from imblearn.under_sampling import RandomUnderSampler
from imblearn.utils.estimator_checks import parametrize_with_checks

SAMPLERS = (FacilityLocationSampler(), KCenterSampler(), CCSSampler(), AutoCoresetSampler())


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    x, y = make_classification(300, 6, n_informative=4, n_classes=3, weights=[0.2, 0.3], random_state=0)
    return x, np.array(["a", "b", "c"])[y]


# As a list, since pytest deprecates the iterator that the mark holds.
CHECKS = parametrize_with_checks(list(SAMPLERS)).mark


@pytest.mark.parametrize(CHECKS.args[0], list(CHECKS.args[1]), **CHECKS.kwargs)
def test_checks_of_imbalanced_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_rows_are_those_of_the_indices(sampler: Any, data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    assert is_sampler(sampler)
    small, labels = sampler.fit_resample(x, y)
    rows = sampler.sample_indices_
    np.testing.assert_array_equal(small, x[rows])
    np.testing.assert_array_equal(labels, y[rows])
    assert len(set(rows.tolist())) == len(rows)
    smallest = min(Counter(y.tolist()).values())
    if not isinstance(sampler, AutoCoresetSampler):  # which may need fewer
        assert Counter(labels.tolist()) == dict.fromkeys("abc", smallest)
    assert set(labels.tolist()) == set("abc")
    sparse, _ = sampler.fit_resample(scipy.sparse.csc_matrix(x), y)
    assert (sparse.format, sparse.shape) == ("csc", small.shape)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_in_a_pipeline(sampler: Any, data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    steps = [("scale", StandardScaler()), ("choose", clone(sampler)), ("model", LogisticRegression())]
    pipeline = Pipeline(steps).fit(x, y)
    assert pipeline.predict(x).shape == (300,)  # of all rows
    scaled = StandardScaler().fit_transform(x)
    chosen = clone(sampler).fit_resample(scaled, y)
    np.testing.assert_allclose(pipeline["model"].coef_, LogisticRegression().fit(*chosen).coef_)


def test_each_class_is_a_problem_of_its_own(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    wanted = {"b": 7, "c": 20}
    for sampler, choose in (
        (FacilityLocationSampler(wanted), lambda x, k: fc.facility_location(x, k, metric="euclidean")),
        (KCenterSampler(wanted), fc.k_center),
    ):
        _, labels = sampler.fit_resample(x, y)
        assert Counter(labels.tolist()) == {"a": (y == "a").sum(), **wanted}
        assert sampler.sampling_strategy_ == wanted
        expected = []
        for label in "abc":
            rows = np.flatnonzero(y == label)
            expected += (
                rows[choose(x[rows], wanted[label]).indices.numpy()].tolist()
                if label != "a"
                else rows.tolist()
            )
        assert sampler.sample_indices_.tolist() == expected


@pytest.mark.parametrize(
    "strategy",
    ["auto", "not minority", "majority", "not majority", "all", {"b": 5}, lambda y: {"c": 11}],
    ids=lambda strategy: strategy if isinstance(strategy, str) else type(strategy).__name__,
)
def test_strategies_are_those_of_imbalanced_learn(strategy: Any, data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    ours = KCenterSampler(strategy)
    theirs = RandomUnderSampler(sampling_strategy=strategy, random_state=0)
    assert Counter(ours.fit_resample(x, y)[1].tolist()) == Counter(theirs.fit_resample(x, y)[1].tolist())
    if not isinstance(strategy, str):
        assert ours.sampling_strategy_ == dict(theirs.sampling_strategy_)


def test_ratios_of_two_classes() -> None:
    x = np.random.default_rng(0).standard_normal((90, 2))
    y = np.arange(90) % 5 == 0
    for ratio in (0.3, 0.5, 1.0):
        theirs = RandomUnderSampler(sampling_strategy=ratio).fit_resample(x, y)[1]
        assert Counter(KCenterSampler(ratio).fit_resample(x, y)[1].tolist()) == Counter(theirs.tolist())


def test_numbers_in_all(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    for total in (3, 50, 299, 300):
        for sampler in (KCenterSampler(n_samples=total), FacilityLocationSampler(n_samples=total)):
            labels = Counter(sampler.fit_resample(x, y)[1].tolist())
            assert sum(labels.values()) == total
            for label, size in Counter(y.tolist()).items():
                assert abs(labels[label] - size * total / 300) <= 2
    one = KCenterSampler(n_samples=10).fit_resample(x, np.zeros(300))
    assert one[0].shape == (10, 6)


@pytest.mark.filterwarnings("ignore:.* strata are empty")  # scores of few rows, most of them nearly 0
def test_ccs_scores_are_of_rows_not_seen(data: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.model_selection import cross_val_predict

    x, y = data
    sampler = CCSSampler(n_samples=60, estimator=GaussianNB(), score="el2n", cv=4, mislabel_ratio=0.2)
    _, labels = sampler.fit_resample(x, y)
    p = cross_val_predict(GaussianNB(), x, y, cv=4, method="predict_proba")
    own = (y[:, None] == np.array(list("abc"))).astype(float)
    np.testing.assert_allclose(sampler.scores_, np.linalg.norm(p - own, axis=1), atol=1e-9)
    margin = (p * own).sum(1) - (p - 2 * own).max(1)
    for label in "abc":
        rows = np.flatnonzero(y == label)
        dropped = rows[np.argsort(margin[rows], kind="stable")[: int(0.2 * len(rows))]]
        assert not set(dropped) & set(sampler.sample_indices_)
    assert len(labels) == 60


def test_autocoreset_weights(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = data
    sampler = AutoCoresetSampler(n_samples=60)
    small, labels = sampler.fit_resample(x, y)
    codes = np.unique(y, return_inverse=True)[1]
    expected = fc.autocoreset(x, codes, "logistic_regression", None, 60, groups=codes)
    assert sampler.sample_indices_.tolist() == expected.indices.tolist()
    assert sampler.sample_weight_.tolist() == expected.weights.tolist()
    for label in "abc":
        assert sampler.sample_weight_[labels == label].sum() == pytest.approx((y == label).sum())
    LogisticRegression().fit(small, labels, sample_weight=sampler.sample_weight_)


X, Y = np.random.default_rng(0).standard_normal((20, 2)), np.arange(20) % 4 == 0


@pytest.mark.parametrize(
    ("sampler", "y", "error", "message"),
    [
        (
            KCenterSampler(),
            np.zeros(20),
            ValueError,
            "y must have more than one class where n_samples is None",
        ),
        (KCenterSampler(), np.linspace(0, 1, 20), ValueError, "Unknown label type"),
        (KCenterSampler(), np.ones((20, 2), int), ValueError, "y must have one class a row"),
        (KCenterSampler({True: 6}), Y, ValueError, "6 rows of class True are wanted, and it has 5"),
        (KCenterSampler({3: 6}), Y, ValueError, "y has no class 3; it has False, True"),
        (KCenterSampler({True: 2.5}), Y, TypeError, r"sampling_strategy\[True\] must be an int, got 2.5"),
        (KCenterSampler("most"), Y, ValueError, "unknown sampling_strategy 'most'"),
        (KCenterSampler(1.5), Y, ValueError, r"must be in \(0, 1\], for two classes, got 1.5"),
        (KCenterSampler(0.5), np.arange(20) % 3, ValueError, "for two classes, got 0.5 for 3"),
        (
            KCenterSampler([1]),
            Y,
            TypeError,
            "sampling_strategy must be a str, a number, a dict or a callable",
        ),
        (
            KCenterSampler(n_samples=1),
            Y,
            ValueError,
            "n_samples must be between the 2 classes and the 20 rows",
        ),
        (KCenterSampler(0.5, n_samples=4), Y, ValueError, "both say how many rows"),
        (AutoCoresetSampler(n_samples=21), Y, ValueError, "n_samples must be between"),
        (CCSSampler(score="loudness"), Y, ValueError, "unknown score 'loudness'"),
        (CCSSampler(cv=1), Y, ValueError, "cv be >= 2"),
        (CCSSampler(n_samples=3), np.arange(20) == 0, ValueError, r"class sizes \[19, 1\]"),
        (KCenterSampler(metric="dot"), Y, ValueError, "unknown metric 'dot'"),
    ],
)
def test_bad_calls(sampler: Any, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sampler.fit_resample(X, y)


def test_imbalanced_learn_is_not_needed() -> None:
    code = (
        "import sys, numpy as np; sys.modules['imblearn'] = None\n"
        "from flashcoreset.integrations.sklearn import KCenterSampler\n"
        "from sklearn.utils import get_tags\n"
        "del sys.modules['imblearn']\n"
        "s = KCenterSampler(n_samples=4); print(s.fit_resample(np.eye(9), np.arange(9) % 2)[0].shape, s)\n"
        "print(get_tags(s).target_tags.required, 'imblearn' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "(4, 9) KCenterSampler(n_samples=4)\nTrue False\n", done.stderr
