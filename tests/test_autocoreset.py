"""autocoreset: subsets with the sums of the losses, the loop around them, and everything a caller can get wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.base import clone
from sklearn.cluster import BisectingKMeans, KMeans, MiniBatchKMeans
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.linear_model import (
    ElasticNet,
    Lasso,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Ridge,
    RidgeClassifier,
    RidgeCV,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC as KernelSVC
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils import check_random_state

import flashcoreset as fc
from flashcoreset.methods.autocoreset.loss_subsets import (
    METHODS,
    class_budgets,
    equal_budgets,
    exact,
    importance,
    in_groups,
    uniform_with_classes,
)
from flashcoreset.methods.autocoreset.weighted_models import LOSSES, make_model, named_loss

RNG = np.random.default_rng(0)
X = RNG.standard_normal((400, 4))
Y = X @ np.array([1.0, -2.0, 0.5, 0.0]) + RNG.standard_normal(400)
LABELS = (Y > 0).astype(int) + (Y > 2)  # three classes
NAMES = tuple(LOSSES)


def check(coreset: fc.Coreset, n: int, k: int) -> None:
    assert coreset.indices.dtype == torch.int64
    assert len(coreset.indices) <= k
    assert (coreset.indices.diff() > 0).all()
    assert 0 <= int(coreset.indices[0]) <= int(coreset.indices[-1]) < n
    assert (coreset.weights > 0).all()
    assert float(coreset.weights.sum()) == pytest.approx(
        n, rel=1e-6 if coreset.weights.dtype == torch.float32 else 1e-12
    )
    info = coreset.info
    assert info["fits"] == len(info["losses"])
    assert info["loss"] == min(info["losses"]) == info["losses"][info["best"]]


def targets(name: str) -> Any:
    return {"kmeans": None, "linear_regression": Y}.get(name, LABELS)


# --- subsets --------------------------------------------------------------------------------------


@given(
    n=st.integers(2, 80), c=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 1000),
    kind=st.sampled_from(["normal", "heavy", "zeros"]), method=st.sampled_from(list(METHODS)),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_subsets(n: int, c: int, share: float, seed: int, kind: str, method: str) -> None:
    rng = np.random.default_rng(seed)
    losses = np.abs(rng.standard_normal((n, c)))
    if kind == "heavy":
        losses = np.exp(4 * losses)
    if kind == "zeros":
        losses *= rng.random((n, c)) < 0.2
    k = max(c + 1, math.ceil(share * (n - 1)))
    if k >= n:
        return
    rows, weights = METHODS[method](losses, k, rng)
    assert len(rows) == len(weights) <= k
    assert len(set(rows.tolist())) == len(rows)
    assert (weights > 0).all()
    assert weights.sum() == pytest.approx(n, rel=1e-12)
    if method == "caratheodory":
        np.testing.assert_allclose(weights @ losses[rows], losses.sum(0), rtol=1e-11)
    else:
        assert len(rows) == k


def test_importance_is_unbiased() -> None:
    losses = np.exp(2 * np.random.default_rng(1).standard_normal((30, 2)))
    taken = np.zeros(30)
    for seed in range(3000):
        rows, _ = METHODS["importance"](losses, 8, np.random.default_rng(seed))
        taken[rows] += 1
    chance = (losses / losses.sum(0)).max(1) + 1 / 30
    certain = taken == 3000
    expected = chance[~certain] * (8 - certain.sum()) / chance[~certain].sum()
    np.testing.assert_allclose(taken[~certain] / 3000, expected, atol=4 * 0.5 / math.sqrt(3000))
    assert expected.max() < 1


def test_median_of_means_takes_the_nearest_of_a_hundred_samples() -> None:
    losses = np.exp(3 * np.random.default_rng(1).standard_normal((500, 1)))
    rows, _ = METHODS["median_of_means"](losses, 20, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    samples = [rng.choice(500, 20, replace=False) for _ in range(100)]
    errors = [abs(losses[some].mean() - losses.mean()) for some in samples]
    assert rows.tolist() == samples[int(np.argmin(errors))].tolist()
    spread = {"uniform": [], "median_of_means": []}
    for name, found in spread.items():
        for seed in range(60):
            rows, weights = METHODS[name](losses, 20, np.random.default_rng(seed))
            found.append(abs(float(weights @ losses[rows, 0]) / losses.sum() - 1))
    assert np.mean(spread["median_of_means"]) < 0.1 * np.mean(spread["uniform"])


def test_budgets_of_classes_favour_small_ones() -> None:
    assert class_budgets([7], 3) == [3]
    assert class_budgets([50, 50], 9) == [5, 4]
    # Shares .1 and .9: in proportion; by |log p| .956 and .044; by exp(-p) .690 and .310. Their means are .582 and .418.
    assert class_budgets([1000, 9000], 1000) == [582, 418]
    assert class_budgets([100, 900], 500) == [100, 400]  # all of a class that has less than its share
    assert class_budgets([1, 1, 998], 3) == [1, 1, 1]
    assert class_budgets([2, 3], 5) == [2, 3]
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = np.ceil(np.exp(rng.uniform(0, 7, rng.integers(1, 9)))).astype(int)
        k = int(rng.integers(len(sizes), sizes.sum() + 1))
        budgets = np.array(class_budgets(sizes.tolist(), k))
        assert budgets.sum() == k
        assert (budgets >= 1).all()
        assert (budgets <= sizes).all()


def test_groups_get_equal_shares_and_their_own_sums() -> None:
    assert equal_budgets([10, 30, 20], 20) == [6, 8, 6]
    assert equal_budgets([2, 30, 30], 20) == [2, 12, 6]
    assert equal_budgets([2, 3], 9) == [2, 3]
    assert equal_budgets([1, 1, 5, 5], 11) == [1, 1, 5, 4]
    losses = np.abs(RNG.standard_normal((400, 3)))
    members = [np.flatnonzero(label == LABELS) for label in range(3)]
    sizes = [len(rows) for rows in members]
    budgets = equal_budgets(sizes, 60)
    for method in METHODS:
        rows, weights = in_groups(method, losses, members, budgets, np.random.default_rng(0))
        assert (np.diff(rows) > 0).all()
        for own, budget in zip(members, budgets, strict=True):
            inside = np.isin(rows, own)
            assert inside.sum() <= budget
            assert weights[inside].sum() == pytest.approx(len(own), rel=1e-12)
            if method == "caratheodory":
                got = weights[inside] @ losses[rows[inside]]
                np.testing.assert_allclose(got, losses[own].sum(0), rtol=1e-11)


def test_first_samples_have_every_class() -> None:
    codes = np.array([0] * 96 + [1] + [2] * 3)
    for seed in range(50):
        rows, weights = uniform_with_classes(codes, [np.arange(100)], [3], np.random.default_rng(seed))
        assert sorted(codes[rows].tolist()) == [0, 1, 2]
        assert weights.tolist() == [100 / 3] * 3
        groups = [np.arange(0, 100, 2), np.arange(1, 100, 2)]  # class 1 is row 96
        rows, weights = uniform_with_classes(codes, groups, [1, 4], np.random.default_rng(seed))
        assert sorted(set(codes[rows].tolist())) == [0, 1, 2]
        assert rows[rows % 2 == 0].tolist() == [96]
        assert weights[rows % 2 == 0].tolist() == [50]
        assert weights[rows % 2 == 1].tolist() == [12.5] * 4


# --- models and losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_fit_on_all_data_has_the_least_total(name: str) -> None:
    """The losses are those that the models minimise, penalties included: no change of the parameters makes less."""
    for y in (
        targets(name),
        (Y > 0).astype(int) if name in ("logistic_regression", "linear_svm") else targets(name),
    ):
        model = make_model(name, 0)
        if hasattr(model, "tol"):
            model.set_params(tol=1e-8)
        model.fit(X, y, sample_weight=np.ones(400))
        losses = LOSSES[name](model, X, y)
        assert losses.shape == (400,)
        assert (losses >= 0).all()
        for attribute in ("coef_", "intercept_", "cluster_centers_"):
            if not hasattr(model, attribute):
                continue
            value = np.atleast_1d(getattr(model, attribute))
            for place in range(value.size):
                for step in (1e-3, -1e-3):
                    changed = value.copy()
                    changed.flat[place] += step
                    setattr(model, attribute, changed)
                    assert LOSSES[name](model, X, y).sum() > losses.sum()
            setattr(model, attribute, value)


NEAR = np.digitize(Y + 0.5 * np.random.default_rng(6).standard_normal(400), [0, 2])  # three classes
TWO = (NEAR > 0).astype(int)
BOTH = np.stack([Y, X[:, 1] - Y**2 / 9], 1)
HEAVY = {0: 1.0, 1: 3.0, 2: 0.4}
SVC = {"tol": 1e-9, "max_iter": 200_000, "random_state": 0}
NEWTON = {"solver": "newton-cholesky", "tol": 1e-10}
SAGA = {"solver": "saga", "tol": 1e-9, "max_iter": 50_000, "random_state": 0}
LIBLINEAR = {"solver": "liblinear", "tol": 1e-9, "max_iter": 5_000, "random_state": 0}


def logistic(model: Any, y: Any, weights: Any, r: float, classes: Any = None, bias: bool = False) -> float:
    """C times the weighted sum of cross-entropies, and the penalty: the objective that scikit-learn's user guide states, by C."""
    z = X @ model.coef_.T + model.intercept_
    z = np.concatenate([np.zeros_like(z), z], 1) if z.shape[1] == 1 else z
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    own = weights * (1 if classes is None else np.array([classes[label] for label in y]))
    w = np.append(model.coef_, model.intercept_ / model.intercept_scaling) if bias else model.coef_
    return float(-(own * np.log(p[np.arange(400), y])).sum()) + penalty(w, r) / model.C


def penalty(w: Any, r: float) -> float:
    return float(r * np.abs(w).sum() + (1 - r) / 2 * (w**2).sum())


def svm(model: Any, y: Any, weights: Any, power: int = 2, r: float = 0, classes: Any = None) -> float:
    """liblinear's objective by C: in each problem of one class against the rest only that class has a weight of its own."""
    total = 0.0
    classes = classes or {0: 1, 1: 1, 2: 1}
    for row, (w, b) in enumerate(
        zip(model.coef_, np.broadcast_to(model.intercept_, len(model.coef_)), strict=True)
    ):
        own = y == (1 if len(model.coef_) == 1 else row)
        rest = classes[0] if len(model.coef_) == 1 else 1.0
        cost = weights * np.where(own, classes[1 if len(model.coef_) == 1 else row], rest)
        hinge = np.maximum(0, 1 - np.where(own, 1, -1) * (X @ w + b)) ** power
        total += (cost * hinge).sum() + penalty(np.append(w, b / model.intercept_scaling), r) / model.C
    return float(total)


def crammer_singer(model: Any, y: Any, weights: Any, classes: Any = None) -> float:
    w = np.concatenate([model.coef_, model.intercept_[:, None] / model.intercept_scaling], 1)
    w = np.concatenate([-w / 2, w / 2]) if len(w) == 1 else w
    z = np.concatenate([X, np.full((400, 1), model.intercept_scaling)], 1) @ w.T
    margin = 1 + z - z[np.arange(400), y][:, None]
    margin[np.arange(400), y] = 0
    own = weights * (1 if classes is None else np.array([classes[label] for label in y]))
    return float((own * margin.max(1)).sum() + penalty(w, 0) / model.C)


def squares(model: Any, y: Any, weights: Any, l1: float = 0, l2: Any = 0) -> float:
    """The weighted sum of squared errors with the norms of the coefficients, l1 and l2 (of each target) times."""
    coef = np.atleast_2d(model.coef_)
    errors = (X @ coef.T + model.intercept_ - np.reshape(y, (400, -1))) ** 2
    return float((weights[:, None] * errors).sum() + l1 * np.abs(coef).sum() + (l2 * (coef**2).sum(1)).sum())


def inertia(model: Any, y: Any, weights: Any) -> float:
    return float((weights * ((X[:, None] - model.cluster_centers_) ** 2).sum(2).min(1)).sum())


# The model, its targets, and its objective from the definition.
OBJECTIVES: dict[str, tuple[str, Any, Any, Any]] = {
    "logistic": ("logistic_regression", LogisticRegression(**NEWTON), NEAR, lambda *a: logistic(*a, 0)),
    "logistic, two": ("logistic_regression", LogisticRegression(C=0.1, **NEWTON), TWO, lambda *a: logistic(*a, 0)),
    "no penalty": ("logistic_regression", LogisticRegression(C=np.inf, **NEWTON), NEAR, lambda *a: logistic(*a, 0)),
    "l1": ("logistic_regression", LogisticRegression(C=0.1, l1_ratio=1, **SAGA), NEAR, lambda *a: logistic(*a, 1)),
    "elastic net": (
        "logistic_regression", LogisticRegression(C=0.1, l1_ratio=0.3, **SAGA), NEAR, lambda *a: logistic(*a, 0.3),
    ),
    "no intercept": (
        "logistic_regression", LogisticRegression(C=0.1, fit_intercept=False, **NEWTON), NEAR, lambda *a: logistic(*a, 0),
    ),
    "class weights": (
        "logistic_regression", LogisticRegression(C=0.1, class_weight=HEAVY, **NEWTON), NEAR,
        lambda *a: logistic(*a, 0, HEAVY),
    ),
    "liblinear": (
        "logistic_regression", LogisticRegression(C=0.1, intercept_scaling=3, **LIBLINEAR), TWO,
        lambda *a: logistic(*a, 0, bias=True),
    ),
    "liblinear, dual": (
        "logistic_regression", LogisticRegression(C=0.1, dual=True, **LIBLINEAR), TWO,
        lambda *a: logistic(*a, 0, bias=True),
    ),
    "liblinear, l1": (
        "logistic_regression", LogisticRegression(C=0.1, l1_ratio=1, intercept_scaling=0.5, **LIBLINEAR), TWO,
        lambda *a: logistic(*a, 1, bias=True),
    ),
    "liblinear, class weights": (
        "logistic_regression",
        LogisticRegression(C=0.1, fit_intercept=False, class_weight={0: 1, 1: 3.0}, **LIBLINEAR), TWO,
        lambda *a: logistic(*a, 0, HEAVY),
    ),
    "squared hinge": ("linear_svm", LinearSVC(C=0.1, **SVC), NEAR, svm),
    "squared hinge, two, scaled": ("linear_svm", LinearSVC(C=0.1, intercept_scaling=4, **SVC), TWO, svm),
    "squared hinge, no intercept": ("linear_svm", LinearSVC(C=0.1, fit_intercept=False, **SVC), NEAR, svm),
    "squared hinge, dual": ("linear_svm", LinearSVC(C=0.1, dual=True, **SVC), NEAR, svm),
    "squared hinge, l1": (
        "linear_svm", LinearSVC(C=0.1, penalty="l1", intercept_scaling=2, **SVC), NEAR, lambda *a: svm(*a, r=1),
    ),
    "squared hinge, class weights": (
        "linear_svm", LinearSVC(C=0.1, class_weight=HEAVY, **SVC), NEAR, lambda *a: svm(*a, classes=HEAVY),
    ),
    "squared hinge, two, class weights": (
        "linear_svm", LinearSVC(C=0.1, class_weight={0: 1, 1: 3.0}, **SVC), TWO, lambda *a: svm(*a, classes=HEAVY),
    ),
    "hinge": ("linear_svm", LinearSVC(C=0.1, loss="hinge", **SVC), NEAR, lambda *a: svm(*a, power=1)),
    "hinge, two, class weights": (
        "linear_svm", LinearSVC(C=0.1, loss="hinge", intercept_scaling=2, class_weight={0: 1, 1: 3.0}, **SVC), TWO,
        lambda *a: svm(*a, power=1, classes=HEAVY),
    ),
    "crammer_singer": (
        "linear_svm", LinearSVC(C=0.1, multi_class="crammer_singer", intercept_scaling=2, **SVC), NEAR, crammer_singer,
    ),
    "crammer_singer, two, class weights": (
        "linear_svm", LinearSVC(C=0.1, multi_class="crammer_singer", class_weight={0: 1, 1: 3.0}, **SVC), TWO,
        lambda *a: crammer_singer(*a, HEAVY),
    ),
    "squares": ("linear_regression", LinearRegression(), Y, squares),
    "squares, several": ("linear_regression", LinearRegression(fit_intercept=False), BOTH, squares),
    "squares, positive": ("linear_regression", LinearRegression(positive=True), Y, squares),
    "ridge": ("linear_regression", Ridge(alpha=30.0), Y, lambda *a: squares(*a, l2=30)),
    "ridge, alphas": (
        "linear_regression", Ridge(alpha=np.array([9.0, 90.0])), BOTH, lambda *a: squares(*a, l2=np.array([9, 90])),
    ),
    "ridge, positive": ("linear_regression", Ridge(alpha=30.0, positive=True, tol=1e-12), Y, lambda *a: squares(*a, l2=30)),
    "lasso": ("linear_regression", Lasso(alpha=0.2, tol=1e-12), Y, lambda *a: squares(*a, l1=2 * 400 * 0.2)),
    "lasso, several": ("linear_regression", Lasso(alpha=0.2, tol=1e-12), BOTH, lambda *a: squares(*a, l1=2 * 400 * 0.2)),
    "lasso, a column": ("linear_regression", Lasso(alpha=0.2, tol=1e-12), Y[:, None], lambda *a: squares(*a, l1=160)),
    "lasso, positive": ("linear_regression", Lasso(alpha=0.2, positive=True, tol=1e-12), Y, lambda *a: squares(*a, l1=160)),
    "elastic net, squares": (
        "linear_regression", ElasticNet(alpha=0.2, l1_ratio=0.7, tol=1e-12), Y,
        lambda *a: squares(*a, l1=160 * 0.7, l2=80 * 0.3),
    ),
    "kmeans": ("kmeans", KMeans(5, n_init=3, random_state=0, tol=0), None, inertia),
    "kmeans, minibatch": ("kmeans", MiniBatchKMeans(5, n_init=3, random_state=0), None, inertia),
}  # fmt: skip


@pytest.mark.parametrize("case", OBJECTIVES)
def test_the_losses_are_the_models_objective(case: str) -> None:
    """The weighted total is the objective by its definition, and the weighted fit minimises it."""
    name, model, y, objective = OBJECTIVES[case]
    weights = np.random.default_rng(1).random(400) + 0.5
    weights *= 400 / weights.sum()
    model = clone(model).fit(X, y, sample_weight=weights)
    losses = named_loss(name, model)(model, X, y)
    assert losses.shape == (400,)
    assert (losses >= 0).all()
    least = weights @ losses
    assert least == pytest.approx(objective(model, y, weights), rel=1e-10)
    assert losses.sum() == pytest.approx(objective(model, y, np.ones(400)), rel=1e-10)
    if isinstance(model, MiniBatchKMeans):
        return  # it stops beside the least
    positive = getattr(model, "positive", False)
    rng = np.random.default_rng(2)
    fitted = {
        a: np.array(getattr(model, a))
        for a in ("coef_", "intercept_", "cluster_centers_")
        if hasattr(model, a)
    }
    if not getattr(model, "fit_intercept", True):
        del fitted["intercept_"]
    for trial in range(200):
        for attribute, value in fitted.items():
            step = 10 ** rng.uniform(-4, -1) * rng.standard_normal(value.shape)
            if trial % 2:  # one coordinate
                step = step * (np.arange(value.size) == trial % value.size).reshape(value.shape)
            changed = value + step
            setattr(
                model, attribute, np.maximum(changed, 0) if positive and attribute == "coef_" else changed
            )
        assert weights @ named_loss(name, model)(model, X, y) > least * (1 - 1e-9)


@pytest.mark.parametrize("kind", ["logistic_regression", "linear_svm"])
@pytest.mark.parametrize("y", [NEAR, TWO], ids=["three", "two"])
def test_balanced_classes_are_those_of_all_samples(kind: str, y: Any) -> None:
    model = LogisticRegression(C=0.1, class_weight="balanced", **NEWTON) if kind == "logistic_regression" else (
        LinearSVC(C=0.1, class_weight="balanced", **SVC)
    )  # fmt: skip
    counts = np.bincount(y)
    balanced = dict(enumerate(400 / (len(counts) * counts)))
    model.fit(X, y)
    total = LOSSES[kind](model, X, y).sum()
    expected = logistic(model, y, np.ones(400), 0, balanced) if kind == "logistic_regression" else (
        svm(model, y, np.ones(400), classes=balanced)
    )  # fmt: skip
    assert total == pytest.approx(expected, rel=1e-10)
    coreset = fc.autocoreset(X, y, model, kind, 150, seed=1)
    rows = coreset.indices.numpy()
    again = clone(model).fit(X[rows], y[rows], sample_weight=coreset.weights.numpy())
    assert coreset.info["loss"] == pytest.approx(LOSSES[kind](again, X, y).sum(), rel=1e-9)
    assert total * (1 - 1e-9) < coreset.info["loss"] < 1.2 * total


@pytest.mark.filterwarnings("ignore:'penalty' was deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Inconsistent values:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting penalty=None:UserWarning")
@pytest.mark.parametrize(
    ("old", "r"),
    [({"penalty": None}, 0), ({"penalty": "l2"}, 0), ({"penalty": "l1"}, 1), ({"penalty": "elasticnet", "l1_ratio": 0.3}, 0.3)],
    ids=str,
)  # fmt: skip
def test_penalties_by_their_older_names(old: dict[str, Any], r: float) -> None:
    model = LogisticRegression(C=0.1, **SAGA).set_params(**old).fit(X, NEAR)
    total = LOSSES["logistic_regression"](model, X, NEAR).sum()
    if old["penalty"] is None:
        model.C = np.inf
    assert total == pytest.approx(logistic(model, NEAR, np.ones(400), r), rel=1e-10)


def test_nearly_separable_data_without_a_penalty() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 4))
    y = (x[:, 0] + 0.02 * rng.standard_normal(500) > 0).astype(int)
    coreset = fc.autocoreset(
        x, y, LogisticRegression(C=np.inf, max_iter=10_000), "logistic_regression", 50, seed=1
    )
    rows = coreset.indices.numpy()
    fit = LogisticRegression(C=np.inf, max_iter=10_000).fit(x[rows], y[rows], coreset.weights.numpy())
    z = fit.decision_function(x) * np.where(y == 1, -1, 1)
    assert coreset.info["loss"] == pytest.approx(np.logaddexp(0, z).sum(), rel=1e-6)
    assert coreset.info["loss"] < 0.1


def test_small_losses_keep_their_digits() -> None:
    """The other classes' share of 1e-30 beside 1 is the loss."""
    model = LogisticRegression().fit(X, NEAR)
    model.coef_, model.intercept_, model.C = np.zeros((3, 4)), np.array([70.0, 0.0, 1.0]), np.inf
    losses = LOSSES["logistic_regression"](model, X[:1], np.array([0]))
    assert losses[0] == pytest.approx(math.exp(-70) + math.exp(-69), rel=1e-12)
    two = LogisticRegression().fit(X, TWO)
    two.coef_, two.intercept_, two.C = np.zeros((1, 4)), np.array([70.0]), np.inf
    assert LOSSES["logistic_regression"](two, X[:1], np.array([1]))[0] == pytest.approx(
        math.exp(-70), rel=1e-12
    )


@pytest.mark.parametrize("wrap", [np.asarray, scipy.sparse.csr_matrix], ids=["dense", "sparse"])
@pytest.mark.parametrize("shift", [0.0, 1e7])
def test_distances_far_from_the_origin(shift: float, wrap: Any) -> None:
    model = KMeans(3, n_init=1, random_state=0).fit(X)
    expected = ((X[:, None] - model.cluster_centers_) ** 2).sum(2).min(1)
    model.cluster_centers_ = model.cluster_centers_ + shift
    found = LOSSES["kmeans"](model, wrap(X + shift), None)
    np.testing.assert_allclose(
        found, expected, rtol=1e-12 if shift == 0 else 1e-5
    )  # the digits of X that the shift leaves


class Penalised(LogisticRegression):
    """May minimise anything."""


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("logistic_regression", SGDClassifier(loss="log_loss")), ("logistic_regression", Penalised()),
        ("logistic_regression", LogisticRegressionCV()), ("logistic_regression", LinearSVC()), ("linear_svm", LogisticRegression()),
        ("linear_svm", KernelSVC(kernel="linear")), ("linear_regression", RidgeClassifier()), ("linear_regression", SGDRegressor()),
        ("linear_regression", RidgeCV()), ("linear_regression", LogisticRegression()), ("kmeans", BisectingKMeans()),
        ("linear_regression", GridSearchCV(Ridge(), {"alpha": [1.0]})), ("kmeans", Ridge()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_named_losses_of_other_models_are_refused(name: str, model: Any) -> None:
    kind = type(model).__qualname__
    with pytest.raises(
        TypeError,
        match=rf"loss '{name}' is what scikit-learn's own .* minimises, got .*{kind}; pass a callable",
    ):
        fc.autocoreset(X, LABELS, model, name, 50)


@pytest.mark.parametrize(
    ("name", "value", "y"),
    [("multi_class", "ovr", NEAR), ("solver", "liblinear", NEAR), ("multi_class", "multinomial", TWO)],
)
def test_objectives_of_older_releases_are_refused(name: str, value: str, y: Any) -> None:
    """scikit-learn before 1.8 fits these otherwise."""
    model = LogisticRegression().fit(X, y)
    setattr(model, name, value)
    words = f"that of scikit-learn's default for {y.max() + 1} classes, got {name}='{value}'"
    with pytest.raises(ValueError, match=words):
        LOSSES["logistic_regression"](model, X, y)


@pytest.mark.parametrize("name", ["kmeans", "linear_svm", "linear_regression"])
def test_losses_that_overflow_are_refused(name: str) -> None:
    model = {"kmeans": KMeans(2), "linear_svm": LinearSVC(), "linear_regression": LinearRegression()}[
        name
    ].fit(X, TWO)
    with pytest.raises(ValueError, match="loss must be finite and >= 0, got inf for sample"):
        fc.autocoreset(1e200 * X, TWO, Recorder(), lambda _, x, y: LOSSES[name](model, x, y), 30)


def test_targets_of_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"y must have shape \[400\], one class per sample, got \(400, 1\)"):
        LOSSES["linear_svm"](LinearSVC().fit(X, TWO), X, TWO[:, None])
    with pytest.raises(ValueError, match="y must have 1 targets as model predicts, got 2"):
        LOSSES["linear_regression"](LinearRegression().fit(X, Y), X, BOTH)


def test_losses_by_hand() -> None:
    svm = LinearSVC().fit(X, LABELS > 0)
    svm.coef_, svm.intercept_ = np.array([[2.0, 0, 0, 0]]), np.array([0.0])
    one = np.array([[0.25, 0, 0, 0]])
    assert LOSSES["linear_svm"](svm, one, np.array([True])).tolist() == [0.25 + 4 / 2]
    assert LOSSES["linear_svm"](svm, one, np.array([False])).tolist() == [2.25 + 4 / 2]
    line = LinearRegression().fit(X, Y)
    line.coef_, line.intercept_ = np.array([1.0, 0, 0, 0]), 1.0
    assert LOSSES["linear_regression"](line, one, np.array([0.0])).tolist() == [1.5625]
    logistic = LogisticRegression(C=4.0).fit(X, LABELS)
    expected = (
        -np.log(logistic.predict_proba(X)[np.arange(400), LABELS]) + (logistic.coef_**2).sum() / 8 / 400
    )
    np.testing.assert_allclose(LOSSES["logistic_regression"](logistic, X, LABELS), expected, rtol=1e-9)
    with pytest.raises(ValueError, match=r"model knows no class 7, .* pass groups=y"):
        LOSSES["logistic_regression"](logistic, one, np.array([7]))


# --- the method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_model_and_method(name: str, method: str) -> None:
    for groups in (None, LABELS):
        coreset = fc.autocoreset(X, targets(name), name, None, 45, method=method, groups=groups, seed=3)
        check(coreset, 400, 45)
        assert coreset.info["fits"] == coreset.info["rounds"] + 3
        again = fc.autocoreset(X, targets(name), name, name, 45, method=method, groups=groups, seed=3)
        assert torch.equal(coreset.indices, again.indices)
        assert torch.equal(coreset.weights, again.weights)
        if groups is not None:
            budgets = equal_budgets(np.bincount(LABELS).tolist(), 45)
            assert coreset.info["budgets"] == dict(zip([0, 1, 2], budgets, strict=True))
            check_groups(coreset, LABELS)
        other = fc.autocoreset(X, targets(name), name, None, 45, method=method, groups=groups, seed=4)
        assert not torch.equal(coreset.indices, other.indices)


def check_groups(coreset: fc.Coreset, groups: Any) -> None:
    own = groups[coreset.indices.numpy()]
    for label, budget in coreset.info["budgets"].items():
        assert (own == label).sum() <= budget
        weight = float(coreset.weights[torch.from_numpy(own == label)].sum())
        assert weight == pytest.approx((groups == label).sum(), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_first_samples_are_of_groups_too(method: str) -> None:
    """The best subset may be one of them."""
    groups = np.repeat([0, 1, 2], [300, 60, 40])
    for losses in (np.ones(400), np.arange(400.0)):
        coreset = fc.autocoreset(
            X, None, Recorder(), lambda m, x, y, losses=losses: losses, 30, method=method, groups=groups
        )
        assert coreset.info["best"] == 0
        check(coreset, 400, 30)
        check_groups(coreset, groups)


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_are_left_alone(name: str) -> None:
    shared = check_random_state(None)  # NumPy's
    numpy_before, torch_before = shared.get_state(), torch.get_rng_state()
    fc.autocoreset(X, targets(name), name, None, 12, patience=1)
    numpy_after = shared.get_state()
    assert numpy_after[2] == numpy_before[2]
    assert (numpy_after[1] == numpy_before[1]).all()
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_beats_as_many_uniform_samples() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    full = make_model("logistic_regression", 0).fit(x, y)
    least = LOSSES["logistic_regression"](full, x, y).sum()
    for seed in range(4):
        coreset = fc.autocoreset(x, y, "logistic_regression", None, 100, seed=seed)
        uniform = fc.autocoreset(
            x,
            y,
            "logistic_regression",
            None,
            100,
            method="uniform",
            groups=False,
            n_initial=coreset.info["fits"],
            seed=seed,
            patience=1,
        )
        error, by_chance = coreset.info["loss"] / least - 1, uniform.info["loss"] / least - 1
        assert error < by_chance / 3
        assert error > -1e-5  # the fit on all data minimises the loss


class Recorder:
    """A model of the mean, without scikit-learn, that remembers its fits."""

    fits: list[tuple[Any, Any, Any]]

    def __init__(self) -> None:
        self.fits = []

    def __deepcopy__(self, memo: Any) -> Recorder:
        fresh = Recorder()
        fresh.fits = self.fits
        return fresh

    def fit(self, x: Any, y: Any, sample_weight: Any = None) -> None:
        self.fits.append((x, y, sample_weight))
        self.mean = np.average(x, axis=0, weights=sample_weight)


def distances(model: Any, x: Any, y: Any) -> Any:
    return torch.from_numpy(((x - model.mean) ** 2).sum(1))


def test_the_course_by_hand() -> None:
    model = Recorder()
    coreset = fc.autocoreset(X, None, model, distances, 20, n_initial=2, patience=3, seed=1)
    check(coreset, 400, 20)
    assert len(model.fits) == coreset.info["fits"]
    assert not hasattr(model, "mean")  # copies are fitted
    for place, (x, y, weights) in enumerate(model.fits):
        assert y is None
        assert len(x) == len(weights) <= 20
        assert weights.sum() == pytest.approx(400)
        mean = np.average(x, axis=0, weights=weights)
        assert coreset.info["losses"][place] == pytest.approx(((X - mean) ** 2).sum())
        if place >= 2:  # the columns before it match
            columns = np.stack(
                [((X - np.average(a, axis=0, weights=b)) ** 2).sum(1) for a, _, b in model.fits[:place]], 1
            )
            own = np.stack(
                [((x - np.average(a, axis=0, weights=b)) ** 2).sum(1) for a, _, b in model.fits[:place]], 1
            )
            np.testing.assert_allclose(weights @ own, columns.sum(0), rtol=1e-10)
    x, _, weights = model.fits[coreset.info["best"]]
    np.testing.assert_array_equal(x, X[coreset.indices.numpy()])
    np.testing.assert_array_equal(weights, coreset.weights.numpy())


def test_it_ends() -> None:
    losses = iter(np.linspace(9, 1, 100))

    def falling(model: Any, x: Any, y: Any) -> Any:
        return np.full(400, next(losses))

    by_columns = fc.autocoreset(X, None, Recorder(), falling, 10, n_initial=2, patience=3)
    assert (by_columns.info["stopped"], by_columns.info["fits"]) == ("columns", 10)
    constant = fc.autocoreset(X, None, Recorder(), lambda m, x, y: np.ones(400), 50, n_initial=4, patience=3)
    assert (constant.info["stopped"], constant.info["fits"], constant.info["best"]) == ("patience", 7, 0)
    many = fc.autocoreset(X, None, Recorder(), lambda m, x, y: np.ones(400), 5, n_initial=8)
    assert (many.info["stopped"], many.info["fits"], many.info["rounds"]) == ("columns", 8, 0)
    zero = fc.autocoreset(X, None, Recorder(), lambda m, x, y: np.zeros(400), 30)
    check(zero, 400, 30)


def test_all_samples() -> None:
    coreset = fc.autocoreset(X, Y, "linear_regression", None, 400)
    assert coreset.indices.tolist() == list(range(400))
    assert coreset.weights.tolist() == [1.0] * 400
    check(coreset, 400, 400)


def test_inputs_of_other_libraries() -> None:
    plain = fc.autocoreset(X, Y, "linear_regression", None, 40)
    for x, y in (
        (torch.from_numpy(X), torch.from_numpy(Y)),
        (X.tolist(), Y.tolist()),
        (scipy.sparse.csr_matrix(X), Y),
        (scipy.sparse.coo_matrix(X), Y),
    ):
        found = fc.autocoreset(x, y, "linear_regression", None, 40)
        assert len(found.indices) == len(plain.indices)
        check(found, 400, 40)
    quarters = fc.autocoreset(X, Y, LinearRegression(), lambda m, x, y: torch.ones(400).bfloat16(), 40)
    check(quarters, 400, 40)
    narrow = fc.autocoreset(torch.from_numpy(X).float(), torch.from_numpy(Y), "linear_regression", None, 40)
    assert narrow.weights.dtype == torch.float32
    check(narrow, 400, 40)
    half = fc.autocoreset(
        torch.from_numpy(X).bfloat16(), None, KMeans(3, n_init=1, random_state=0), "kmeans", 40
    )
    check(half, 400, 40)
    names = np.array(["a", "b", "c"])[LABELS]
    check(fc.autocoreset(X, names, DecisionTreeClassifier(random_state=0), _miss, 40), 400, 40)


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas", reason="an extra of the user's own")
    plain = fc.autocoreset(X, Y, "linear_regression", None, 40)
    series = pandas.Series(Y, index=range(400, 0, -1))
    found = fc.autocoreset(pandas.DataFrame(X), series, "linear_regression", None, 40)
    assert torch.equal(found.indices, plain.indices)
    check(fc.autocoreset(X, pandas.DataFrame({"a": Y, "b": Y}), "linear_regression", None, 40), 400, 40)


def _miss(model: Any, x: Any, y: Any) -> Any:
    return (model.predict(x) != y).astype(float)


def test_a_rare_class_is_in_every_subset() -> None:
    y = np.zeros(400, dtype=int)
    y[:8] = 1
    seen = []

    def loss(model: Any, x: Any, y: Any) -> Any:
        seen.append(len(model.classes_))
        return LOSSES["logistic_regression"](model, x, y)

    check(fc.autocoreset(X, y, LogisticRegression(), loss, 30, method="uniform"), 400, 30)
    assert set(seen) == {2}


def test_classes_are_groups_of_a_classifier() -> None:
    names = np.array(["b", "a", "c"])[LABELS]
    for y, values in ((LABELS, [0, 1, 2]), (names, ["a", "b", "c"])):
        found = fc.autocoreset(X, y, LogisticRegression(), "logistic_regression", 45, seed=1, patience=1)
        sizes = [int((y == value).sum()) for value in values]
        assert found.info["budgets"] == dict(zip(values, class_budgets(sizes, 45), strict=True))
        check_groups(found, y)
        check(found, 400, 45)
    alone = fc.autocoreset(
        X, LABELS, LogisticRegression(), "logistic_regression", 45, patience=1, groups=False
    )
    assert "budgets" not in alone.info
    assert "budgets" not in fc.autocoreset(X, Y, "linear_regression", None, 45).info
    by_name = fc.autocoreset(X, Y, "linear_regression", None, 45, groups=names)
    by_number = fc.autocoreset(X, Y, "linear_regression", None, 45, groups=np.array([1, 0, 2])[LABELS])
    assert torch.equal(by_name.indices, by_number.indices)
    assert by_name.info["budgets"] == dict(zip("abc", by_number.info["budgets"].values(), strict=True))


def test_a_test_set_is_told_of_and_decides_nothing() -> None:
    plain = fc.autocoreset(X[:300], Y[:300], "linear_regression", None, 40)
    found = fc.autocoreset(X[:300], Y[:300], "linear_regression", None, 40, x_test=X[300:], y_test=Y[300:])
    assert torch.equal(found.indices, plain.indices)
    assert found.info["losses"] == plain.info["losses"]
    assert len(found.info["test_losses"]) == found.info["fits"]
    rows, weights = found.indices.numpy(), found.weights.numpy()
    model = LinearRegression().fit(X[:300][rows], Y[:300][rows], sample_weight=weights)
    expected = np.square(model.predict(X[300:]) - Y[300:]).sum()
    assert found.info["test_loss"] == found.info["test_losses"][found.info["best"]]
    assert found.info["test_loss"] == pytest.approx(expected)
    assert "test_loss" not in plain.info
    of_rows = fc.autocoreset(X[:300], None, "kmeans", None, 40, x_test=X[300:])
    assert of_rows.info["test_loss"] > 0


def test_clusters_and_hinge_by_name() -> None:
    found = fc.autocoreset(X, None, "kmeans", None, 40, n_clusters=3, seed=2)
    model = make_model("kmeans", 2, clusters=3)
    object_ = fc.autocoreset(X, None, model, "kmeans", 40, seed=2)
    assert found.info["losses"] == object_.info["losses"]
    for hinge in ("hinge", "squared_hinge"):
        named = fc.autocoreset(X, LABELS, "linear_svm", hinge, 40, seed=2)
        model = make_model("linear_svm", 2, hinge=hinge)
        assert model.loss == hinge
        for loss in (hinge, "linear_svm"):
            assert fc.autocoreset(X, LABELS, model, loss, 40, seed=2).info["losses"] == named.info["losses"]
    squared = fc.autocoreset(X, LABELS, "linear_svm", None, 40, seed=2)
    assert squared.info["losses"] == named.info["losses"]


class Weighted(LinearRegression):
    """A regression that keeps the weights it was fitted with."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Weighted:
        self.seen_ = None if sample_weight is None else np.array(sample_weight)
        return super().fit(X, y, sample_weight)


def test_pipelines_get_their_weights_in_every_step() -> None:
    scaled = X * 10 + 3
    pipeline = make_pipeline(
        StandardScaler(), PCA(3, random_state=0), make_pipeline("passthrough", Weighted())
    )
    seen: list[Any] = []

    def loss(model: Any, x: Any, y: Any) -> Any:
        seen.append((model.steps[0][1], model.steps[-1][1].steps[-1][1].seen_))
        return np.square(model.predict(x) - y)

    found = fc.autocoreset(scaled, Y, pipeline, loss, 40)
    check(found, 400, 40)
    scaler, weights = seen[found.info["best"]]
    np.testing.assert_array_equal(weights, found.weights.numpy())
    mean = found.weights.numpy() @ scaled[found.indices.numpy()] / 400
    np.testing.assert_allclose(scaler.mean_, mean)


def test_the_loss_of_a_pipeline_is_that_of_its_last_step() -> None:
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    found = fc.autocoreset(X, LABELS, pipeline, "logistic_regression", 60)
    rows, weights = found.indices.numpy(), found.weights.numpy()
    fit = clone(pipeline).fit(
        X[rows],
        LABELS[rows],
        standardscaler__sample_weight=weights,
        logisticregression__sample_weight=weights,
    )
    own = LOSSES["logistic_regression"](fit[-1], fit[0].transform(X), LABELS)
    assert found.info["loss"] == pytest.approx(own.sum())
    assert found.info["budgets"]
    with pytest.raises(TypeError, match="loss 'kmeans' is what"):
        fc.autocoreset(X, LABELS, pipeline, "kmeans", 60)


def test_searches_get_their_weights() -> None:
    for inner, names in ((Ridge(), "alpha"), (make_pipeline(StandardScaler(), Ridge()), "ridge__alpha")):
        search = GridSearchCV(inner, {names: [0.1, 1.0]}, cv=2)
        fits: list[Any] = []

        def loss(model: Any, x: Any, y: Any, fits: list[Any] = fits) -> Any:
            fits.append(model.best_estimator_)
            return np.square(model.predict(x) - y)

        found = fc.autocoreset(X, Y, search, loss, 60, n_initial=1, patience=1)
        rows, weights = found.indices.numpy(), found.weights.numpy()
        best = fits[found.info["best"]]
        prefixes = ("standardscaler__", "ridge__") if names != "alpha" else ("",)
        given = {f"{prefix}sample_weight": weights for prefix in prefixes}
        again = clone(best).fit(X[rows], Y[rows], **given)
        np.testing.assert_allclose(best.predict(X), again.predict(X))


def test_weights_go_where_routing_sends_them() -> None:
    with config_context(enable_metadata_routing=True):
        model = OneVsRestClassifier(LogisticRegression().set_fit_request(sample_weight=True))
        check(fc.autocoreset(X, LABELS, model, _miss, 60), 400, 60)
        with pytest.raises(TypeError, match=r"model must hand sample_weight on.*set_fit_request"):
            fc.autocoreset(X, LABELS, OneVsRestClassifier(LogisticRegression()), _miss, 60)


def test_progress_and_select() -> None:
    calls: list[tuple[int, int]] = []
    coreset = fc.select(
        "autocoreset", x=X, y=Y, model="linear_regression", loss=None, k=25,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(fit + 1, 25) for fit in range(coreset.info["fits"])]


# --- bad input ------------------------------------------------------------------------------------


class Fitless:
    pass


def _bad_loss(value: Any) -> Any:
    def loss(model: Any, x: Any, y: Any) -> Any:
        losses = np.ones(len(x))
        losses[7] = value
        return losses

    return loss


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no sample_weight": (
        {"model": KNeighborsClassifier(), "loss": _miss, "y": LABELS}, TypeError,
        r"model must have fit\(X, y, sample_weight=...\), got KNeighborsClassifier, whose fit takes X, y",
    ),
    "no fit": ({"model": Fitless(), "loss": _miss}, TypeError, "model must be one of kmeans, .* got Fitless"),
    "a class": ({"model": LinearRegression}, TypeError, "got LinearRegression, a class"),
    "unknown model": ({"model": "svm"}, ValueError, "unknown model 'svm'; valid names: kmeans, logistic_regression"),
    "unknown loss": ({"loss": "huber"}, ValueError, "unknown loss 'huber'; valid names: kmeans.*squared_hinge"),
    "hinge of others": ({"loss": "hinge"}, TypeError, "loss 'hinge' is what scikit-learn's own LinearSVC minimises, got .*LinearRegression"),
    "another hinge": (
        {"model": LinearSVC(), "loss": "hinge", "y": LABELS}, TypeError,
        r"loss 'hinge' is what LinearSVC\(loss='hinge'\) minimises, got one with loss='squared_hinge'.*; pass loss='linear_svm'",
    ),
    "groups True": ({"groups": True}, TypeError, "groups must be labels"),
    "n_clusters of others": ({"n_clusters": 3}, ValueError, "n_clusters is for model 'kmeans', got model 'linear_regression'"),
    "n_clusters of an object": (
        {"model": KMeans(3), "loss": "kmeans", "n_clusters": 3}, ValueError, "n_clusters is for model 'kmeans', got model an object",
    ),
    "n_clusters 0": ({"model": "kmeans", "loss": None, "n_clusters": 0}, ValueError, "n_clusters must be >= 1, got 0"),
    "n_clusters float": ({"model": "kmeans", "loss": None, "n_clusters": 2.0}, TypeError, "n_clusters must be an int"),
    "k < n_clusters": (
        {"model": "kmeans", "loss": None, "n_clusters": 31}, ValueError, "k must be >= the 31 clusters of kmeans, got 30",
    ),
    "y_test alone": ({"y_test": Y}, ValueError, "y_test needs x_test"),
    "x_test alone": ({"x_test": X}, ValueError, "y_test must be given with x_test if y is, got y_test=None and y=ndarray"),
    "x_test narrow": (
        {"x_test": X[:5, :2], "y_test": Y[:5]}, ValueError, r"x_test must have samples of the shape \(4,\) as x, got \(2,\)",
    ),
    "y_test short": ({"x_test": X, "y_test": Y[:5]}, ValueError, "y_test must have 400 entries as x_test has samples, got 5"),
    "x_test empty": ({"x_test": X[:0], "y_test": Y[:0]}, ValueError, "x_test must have at least 1 sample"),
    "pipeline without weights": (
        {"model": make_pipeline(StandardScaler(), KNeighborsClassifier()), "loss": _miss, "y": LABELS}, TypeError,
        r"model must have fit.*got KNeighborsClassifier.*, as the last step, 'kneighborsclassifier', of a Pipeline",
    ),
    "pipeline without an estimator": (
        {"model": Pipeline([("scale", StandardScaler()), ("end", "passthrough")]), "loss": _miss}, TypeError,
        "model must end with an estimator, got a Pipeline whose last step, 'end', is 'passthrough'",
    ),
    "search without weights": (
        {"model": GridSearchCV(KNeighborsClassifier(), {"n_neighbors": [1, 2]}), "loss": _miss, "y": LABELS}, TypeError,
        "model must have fit.*got KNeighborsClassifier",
    ),
    "search without a model": (
        {"model": GridSearchCV(Ridge(), {"alpha": [1, 2]}, refit=False), "loss": _miss}, ValueError,
        r"model must keep the best model that it finds, got GridSearchCV\(refit=False\); pass refit=True",
    ),
    "weights not handed on": (
        {"model": OneVsRestClassifier(LogisticRegression()), "loss": _miss, "y": LABELS}, TypeError,
        r"model must hand sample_weight on.*OneVsRestClassifier.*enable_metadata_routing=True.*set_fit_request",
    ),
    "loss of a type": ({"loss": 3}, TypeError, "loss must be a str"),
    "no loss": ({"model": LinearRegression(), "loss": None}, TypeError, "loss must be a callable"),
    "loss a matrix": (
        {"loss": lambda m, x, y: np.ones((len(x), 1))}, ValueError, r"loss must return shape \(400,\), .* got \(400, 1\)",
    ),
    "loss a sum": ({"loss": lambda m, x, y: 3.0}, ValueError, r"loss must return shape \(400,\), .* got \(\)"),
    "loss complex": ({"loss": lambda m, x, y: np.ones(400) * 1j}, TypeError, "loss must return real numbers"),
    "loss too large": ({"loss": lambda m, x, y: np.full(400, 1e307)}, ValueError, "loss: the total over all samples, inf|4e"),
    "loss of others": (
        {"loss": "kmeans"}, TypeError, "loss 'kmeans' is what scikit-learn's own KMeans or MiniBatchKMeans minimises, got .*LinearRegression;",
    ),
    "k < clusters": ({"model": "kmeans", "loss": None, "k": 7}, ValueError, "k must be >= the 8 clusters of kmeans, got 7"),
    "loss text": ({"loss": lambda m, x, y: ["a"] * 400}, TypeError, "loss must return real numbers"),
    "loss NaN": ({"loss": _bad_loss(math.nan)}, ValueError, "loss must be finite and >= 0, got nan for sample 7"),
    "loss inf": ({"loss": _bad_loss(math.inf)}, ValueError, "loss must be finite and >= 0, got inf for sample 7"),
    "loss < 0": ({"loss": _bad_loss(-1)}, ValueError, "loss must be finite and >= 0, got -1.0 for sample 7"),
    "k 0": ({"k": 0}, ValueError, "k must be >= 1, got 0"),
    "k > n": ({"k": 401}, ValueError, "k must be <= the 400 samples, got 401"),
    "k float": ({"k": 2.0}, TypeError, "k must be an int"),
    "k < classes": (
        {"model": "logistic_regression", "loss": None, "y": LABELS, "k": 2}, ValueError, "k must be >= the 3 classes of y, got 2",
    ),
    "k < groups": ({"groups": np.arange(400) % 50, "k": 49}, ValueError, "k must be >= the 50 groups, got 49"),
    "groups short": ({"groups": [0, 1]}, ValueError, r"groups must have shape \[400\], got \(2,\)"),
    "groups float": ({"groups": Y}, TypeError, "groups must hold integers"),
    "y short": ({"y": Y[:5]}, ValueError, "y must have 400 entries as x has samples, got 5"),
    "x a number": ({"x": 3.0}, TypeError, "x must be an array of samples"),
    "x empty": ({"x": X[:0]}, ValueError, "x must have at least 1 sample"),
    "x ragged": ({"x": [[1.0], [1.0, 2.0]]}, ValueError, "x must be an array, got a nested list"),
    "method": ({"method": "random"}, ValueError, "unknown method 'random'; valid names: caratheodory, importance"),
    "n_initial": ({"n_initial": 0}, ValueError, "n_initial must be >= 1, got 0"),
    "patience": ({"patience": 0}, ValueError, "patience must be >= 1, got 0"),
    "seed": ({"seed": -1}, ValueError, "seed must be in"),
    "progress": ({"progress": "yes"}, TypeError, "progress must be None, True or a callable"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, error, words = BAD[name]
    arguments = {"x": X, "y": Y, "model": "linear_regression", "loss": None, "k": 30} | changes
    if "model" not in changes and "loss" not in changes:
        arguments["loss"] = "linear_regression"
    with pytest.raises(error, match=words):
        fc.autocoreset(**arguments)


def test_a_class_that_no_subset_has() -> None:
    y = np.zeros(20_000, dtype=int)
    y[0] = 1
    x = np.repeat(X, 50, axis=0)
    with pytest.raises(ValueError, match=r"k must be large enough for every class, got 2, .* pass groups=y"):
        fc.autocoreset(
            x, y, LogisticRegression(), "logistic_regression", 2, method="uniform", n_initial=1, groups=False
        )
    check(fc.autocoreset(x, y, LogisticRegression(), "logistic_regression", 4, groups=y), 20_000, 4)


@pytest.mark.parametrize("columns", [1, 7, 38])
@pytest.mark.parametrize("order", ["C", "F"])
def test_many_rows_are_reduced_by_runs_to_the_same_sums(columns: int, order: Any) -> None:
    rng = np.random.default_rng(columns)
    losses = np.array(rng.gamma(0.5, 1.0, (9000, columns)), order=order)
    rows, weights = exact(losses, 40, np.random.default_rng(0))
    assert len(set(rows.tolist())) == len(rows) <= 40
    assert (weights > 0).all()
    np.testing.assert_allclose(weights @ losses[rows], losses.sum(0), rtol=1e-11)
    assert weights.sum() == pytest.approx(9000, rel=1e-11)


def test_rows_of_runs_are_an_unbiased_sample() -> None:
    """Sums of a column that is not balanced: their mean over many draws is the sum, and they vary no more than those of an importance
    sample."""
    rng = np.random.default_rng(1)
    losses, other = rng.gamma(0.5, 1.0, (5000, 3)), rng.gamma(0.5, 1.0, 5000)
    sums = {
        draw: np.array(
            [
                weights @ other[rows]
                for rows, weights in (draw(losses, 60, np.random.default_rng(seed)) for seed in range(200))
            ]
        )
        for draw in (exact, importance)
    }
    ours, theirs = sums.values()
    assert abs(ours.mean() - other.sum()) < 4 * ours.std() / 200**0.5
    assert ours.std() < 1.25 * theirs.std()
