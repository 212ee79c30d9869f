"""flashcoreset.compat.apricot beside apricot on the same input, and beside its rules written out in NumPy."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsTransformer

from flashcoreset.compat import apricot as ours
from flashcoreset.compat.apricot import optimizers

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # apricot is imported from sources that current Python and Numba warn about
    import apricot
    import apricot.functions.facilityLocation as their_module
    import apricot.optimizers

X = load_digits().data[:120] + np.random.default_rng(1).random((120, 64))
RNG = np.random.default_rng(0)
PAIRS = RNG.random((90, 90))
COSTS = RNG.uniform(0.3, 3, 120)


@pytest.fixture(scope="module", autouse=True)
def _apricot_uncompiled() -> Iterator[None]:
    """apricot compiles its loops for each selector, which takes seconds; here Python runs them."""

    def uncompiled(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*_: Any) -> Any:
            return make(None, False, True, False)

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(their_module, "njit", lambda *_, **__: lambda function: function)
        patch.setattr(their_module, "prange", range)
        for name in ("calculate_gains", "calculate_gains_sparse", "calculate_gains_sieve"):
            patch.setattr(their_module, name, uncompiled(getattr(their_module, name)))
        yield


def both(
    k: float, *arguments: Any, fit: dict[str, Any] | None = None, X: Any = X, **named: Any
) -> tuple[Any, Any]:
    """Selectors of ours and of apricot, fitted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = apricot.FacilityLocationSelection(k, *arguments, **named).fit(X, **(fit or {}))
    return ours.FacilityLocationSelection(k, *arguments, **named).fit(X, **(fit or {})), peer


def assert_same(mine: Any, peer: Any, *, ranked: bool = True) -> None:
    np.testing.assert_array_equal(mine.ranking, peer.ranking)
    np.testing.assert_allclose(mine.gains, peer.gains, rtol=1e-9, atol=1e-9 * abs(peer.gains).max())
    for name in ("ranking", "gains", "subset", "mask", "idxs", "current_values"):
        assert getattr(mine, name).dtype == getattr(peer, name).dtype, name
        assert getattr(mine, name).shape == getattr(peer, name).shape, name
    np.testing.assert_array_equal(mine.subset, peer.subset)
    np.testing.assert_array_equal(mine.mask, peer.mask)
    np.testing.assert_array_equal(mine.idxs, peer.idxs)
    np.testing.assert_allclose(mine.current_values, peer.current_values, rtol=1e-9)
    assert mine.current_values_sum == pytest.approx(peer.current_values_sum, rel=1e-9)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "corr", "manhattan"])
@pytest.mark.parametrize("optimizer", ["naive", "lazy", "two-stage"])
def test_metrics(metric: str, optimizer: str) -> None:
    # Of two rows that serve nobody but each other either gains as much, so later picks are decided by rounding.
    assert_same(*both(15, metric, optimizer=optimizer))


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("naive", {}),
    ("lazy", {}),
    ("approximate-lazy", {}),
    ("approximate-lazy", {"beta": 0.5}),
    ("two-stage", {"n_first_selections": 3}),
    ("two-stage", {"optimizer1": "modular", "optimizer2": "naive"}),
    ("stochastic", {}),
    ("stochastic", {"epsilon": 0.3}),
    ("sample", {}),
    ("sample", {"epsilon": 0.5, "optimizer": "approximate-lazy"}),
    ("modular", {}),
    ("greedi", {"m": 4, "l": 8}),
    ("greedi", {"m": 3, "l": 20, "optimizer1": "naive", "optimizer2": "approximate-lazy"}),
]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize(("optimizer", "settings"), KINDS)
def test_optimizers(optimizer: str, settings: dict[str, Any], kind: str) -> None:
    pairs = PAIRS if kind == "dense" else scipy.sparse.csr_matrix(np.where(PAIRS > 0.7, PAIRS, 0))
    for seed in (0, 1):
        arguments: dict[str, Any] = {"optimizer": optimizer, "optimizer_kwds": settings, "random_state": seed}
        assert_same(*both(12, "precomputed", X=pairs, **arguments))


@pytest.mark.parametrize(("optimizer", "settings"), KINDS)
def test_costs(optimizer: str, settings: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"optimizer": optimizer, "optimizer_kwds": settings, "random_state": 0}
    mine, peer = both(15, "cosine", fit={"sample_cost": COSTS}, **arguments)
    assert_same(mine, peer)
    assert COSTS[mine.ranking].sum() <= 15
    # Where all that is left is too dear.
    assert_same(
        *both(
            2,
            "cosine",
            fit={"sample_cost": COSTS},
            **{**arguments, "optimizer": "naive", "optimizer_kwds": {}},
        )
    )


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    # apricot's ModularGreedy picks other rows than it means to if there is an initial subset.
    [kind for kind in KINDS if kind[0] not in ("greedi", "modular") and "modular" not in kind[1].values()],
)
@pytest.mark.parametrize("initial", [[5, 3, 77], np.arange(120) < 4])
def test_initial_subset(optimizer: str, settings: dict[str, Any], initial: Any) -> None:
    arguments: dict[str, Any] = {"optimizer": optimizer, "optimizer_kwds": settings, "random_state": 0}
    mine, peer = both(10, "cosine", initial_subset=initial, **arguments)
    assert_same(mine, peer)
    with_costs, peer = both(10, "cosine", initial_subset=initial, fit={"sample_cost": COSTS}, **arguments)
    assert_same(with_costs, peer)


def test_modular_with_an_initial_subset() -> None:
    """The rows of the largest first gains, which apricot looks up in the wrong list."""
    initial = [3, 40]
    mine = ours.FacilityLocationSelection(5, "precomputed", optimizer="modular", initial_subset=initial).fit(
        PAIRS
    )
    covered = PAIRS[initial].max(axis=0)
    gains = np.maximum(PAIRS - covered, 0).sum(axis=1)
    gains[initial] = -1
    assert mine.ranking.tolist() == np.argsort(-gains)[:5].tolist()


def test_random() -> None:
    """Each row as likely as the others; apricot's own fails."""
    counts = np.zeros(90)
    for seed in range(300):
        mine = ours.FacilityLocationSelection(9, "precomputed", optimizer="random", random_state=seed).fit(
            PAIRS
        )
        assert len(set(mine.ranking.tolist())) == 9
        counts[mine.ranking] += 1
    # 300 * 9 / 90 = 30 of each, standard deviation 5.2
    assert counts.min() > 8
    assert counts.max() < 60
    covered = np.maximum.accumulate(PAIRS[mine.ranking], axis=0)
    np.testing.assert_allclose(mine.gains, np.diff(covered.sum(axis=1), prepend=0))
    costs = COSTS[:90]
    dear = ours.FacilityLocationSelection(9, "precomputed", optimizer="random", random_state=0).fit(
        PAIRS, sample_cost=costs
    )
    left = np.setdiff1d(np.arange(90), dear.ranking)
    assert costs[dear.ranking].sum() <= 9 < costs[dear.ranking].sum() + costs[left].min()


def test_optimizer_objects() -> None:
    for name, settings in KINDS:
        made = {
            module: module.OPTIMIZERS[name](random_state=0, **settings)
            for module in (apricot.optimizers, optimizers)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = apricot.FacilityLocationSelection(
                12, "precomputed", optimizer=apricot.optimizers.OPTIMIZERS[name](random_state=0, **settings)
            ).fit(PAIRS)
        for optimizer in made.values():  # apricot's own objects are taken too
            mine = ours.FacilityLocationSelection(12, "precomputed", optimizer=optimizer).fit(PAIRS)
            assert_same(mine, peer)


def test_nested_optimizer_objects() -> None:
    nested = optimizers.TwoStageGreedy(
        optimizer1=optimizers.ApproximateLazyGreedy(), optimizer2=optimizers.NaiveGreedy()
    )
    mine = ours.FacilityLocationSelection(15, "cosine", optimizer=nested).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = apricot.optimizers
        peer = apricot.FacilityLocationSelection(
            15,
            "cosine",
            optimizer=theirs.TwoStageGreedy(optimizer1="approximate-lazy", optimizer2="naive"),
        ).fit(X)
    assert_same(mine, peer)
    with pytest.raises(ValueError, match="optimizer1 must be a string or an optimizer, got int"):
        ours.FacilityLocationSelection(5, optimizer=optimizers.TwoStageGreedy(optimizer1=3)).fit(X)


def test_own_optimizer() -> None:
    """A class of a program, on the methods that apricot's optimizers use."""

    class Backwards(optimizers.BaseOptimizer):
        def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
            for _ in range(int(k)):
                gains = self.function._calculate_gains(X)
                worst = int(np.argmin(gains))
                row = int(self.function.idxs[worst])
                self.function._select_next(X[row], gains[worst], row)

    mine = ours.FacilityLocationSelection(4, "precomputed", optimizer=Backwards()).fit(PAIRS)
    assert mine.ranking[0] == np.argmin(PAIRS.sum(axis=1))
    assert mine.gains[0] == pytest.approx(PAIRS.sum(axis=1).min())


def test_ties_of_lazy() -> None:
    """apricot's order of equal gains that are not 0."""
    for seed in (9, 10, 12, 15, 16):
        pairs = np.random.default_rng(seed).integers(0, 20, (60, 60)).astype(np.float64)
        ties = 0
        for optimizer in ("naive", "lazy", "two-stage"):
            mine, peer = both(11, "precomputed", X=pairs, optimizer=optimizer)
            np.testing.assert_array_equal(mine.ranking, peer.ranking)
            np.testing.assert_array_equal(mine.gains, peer.gains)
            ties += int(((np.diff(peer.gains) == 0) & (peer.gains[1:] > 0)).sum())
        assert ties, "without a tie nothing is tested"


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "corr", "manhattan"])
def test_neighbors(metric: str) -> None:
    """apricot itself fails after the search of neighbours: the rule written out."""
    mine = ours.FacilityLocationSelection(8, metric, n_neighbors=10).fit(X)
    wide = X - X.mean(axis=1, keepdims=True) if metric == "corr" else X
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    distance = {
        "euclidean": np.sqrt(((X[:, None] - X) ** 2).sum(axis=2)),
        "manhattan": abs(X[:, None] - X).sum(axis=2),
    }.get(metric, 1 - (unit @ unit.T) ** 2)
    np.fill_diagonal(distance, 0)
    near = np.argsort(distance, axis=1, kind="stable")[:, :11]
    kept = np.take_along_axis(distance, near, axis=1)
    s = np.zeros_like(distance)
    np.put_along_axis(s, near, (1.0 if metric in ("cosine", "corr") else kept.max()) - kept, axis=1)
    best = np.zeros(len(X))
    for row, gain in zip(mine.ranking, mine.gains, strict=True):
        gains = np.maximum(s - best, 0).sum(axis=1)
        assert gain == pytest.approx(gains[row], rel=1e-7)
        assert gains[row] >= gains.max() * (1 - 1e-7)
        best = np.maximum(best, s[row])
    np.testing.assert_array_equal(mine.subset, X[mine.ranking])
    if metric == "euclidean":
        same = ours.FacilityLocationSelection(
            8, metric, n_neighbors=KNeighborsTransformer(n_neighbors=10)
        ).fit(X)
        np.testing.assert_array_equal(same.ranking, mine.ranking)


def test_dtypes_and_lists() -> None:
    pairs = PAIRS.astype(np.float32)
    assert_same(*both(20, "precomputed", X=pairs))
    assert_same(*both(20, "cosine", X=X.astype(np.int64)))
    for given in (X.tolist(), X.astype(np.float32)):
        mine = ours.FacilityLocationSelection(20).fit(given)
        np.testing.assert_array_equal(mine.ranking, ours.FacilityLocationSelection(20).fit(X).ranking)
    same = ours.FacilityLocationSelection(9, "precomputed").fit(scipy.sparse.csr_array(PAIRS))
    np.testing.assert_array_equal(
        same.ranking, ours.FacilityLocationSelection(9, "precomputed").fit(PAIRS).ranking
    )


def test_more_rows_than_there_are() -> None:
    for optimizer in ("naive", "stochastic"):
        assert_same(*both(90, "precomputed", X=PAIRS, optimizer=optimizer, random_state=0))
    for optimizer in ("naive", "lazy"):
        # Those that are left out are never picked; apricot picks rows twice here.
        settings: dict[str, Any] = {"epsilon": 0.5, "optimizer": optimizer}
        mine = ours.FacilityLocationSelection(
            80, "precomputed", optimizer="sample", random_state=0, optimizer_kwds=settings
        ).fit(PAIRS)
        left_out = np.random.RandomState(0).choice(90, replace=False, size=45)
        assert sorted(mine.ranking.tolist()) == np.setdiff1d(np.arange(90), left_out).tolist()
    assert_same(*both(5.5, "precomputed", X=PAIRS, optimizer="naive"))


def test_all_negative() -> None:
    assert_same(*both(5, "precomputed", X=-PAIRS, optimizer="naive"))


def test_transform() -> None:
    y, weight = np.arange(120), np.linspace(1, 2, 120)
    mine = ours.FacilityLocationSelection(6, "cosine")
    rows, labels, weights = mine.fit_transform(X, y, weight)
    np.testing.assert_array_equal(rows, X[mine.ranking])
    np.testing.assert_array_equal(labels, y[mine.ranking])
    np.testing.assert_array_equal(weights, weight[mine.ranking])
    np.testing.assert_array_equal(mine.transform(X), rows)
    assert mine.transform(X, sample_weight=weight)[1] is None
    assert len(mine.transform(X, y)) == 2
    assert len(mine.fit_transform(X, sample_cost=COSTS)) == len(mine.ranking)


STREAMS: list[dict[str, Any]] = [
    {"reservoir": X},
    {"max_reservoir_size": 25},
    {"max_reservoir_size": 500, "metric": "euclidean"},
    {"reservoir": X[:30], "metric": "corr", "optimizer_kwds": {"epsilon": 0.1}},
]


@pytest.mark.parametrize("arguments", STREAMS)
@pytest.mark.parametrize("cuts", [[], [40, 41, 90]])
def test_streams(arguments: dict[str, Any], cuts: list[int]) -> None:
    selectors = []
    for module in (ours, apricot):
        selector = module.FacilityLocationSelection(7, random_state=3, **{"metric": "cosine", **arguments})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if module is apricot else "error")
            for batch in np.split(X, cuts):
                assert selector.partial_fit(batch) is None
        selectors.append(selector)
    mine, peer = selectors
    np.testing.assert_array_equal(mine.ranking, peer.ranking)
    np.testing.assert_allclose(mine.gains, peer.gains, rtol=1e-9)
    np.testing.assert_array_equal(mine.subset, peer.subset)
    np.testing.assert_array_equal(
        mine.reservoir[: mine.reservoir_size], peer.reservoir[: peer.reservoir_size]
    )
    for name in ("n_seen_", "reservoir_size", "max_reservoir_size"):
        assert getattr(mine, name) == getattr(peer, name)
    assert mine.optimizer.thresholds == pytest.approx(peer.optimizer.thresholds, rel=1e-12)
    assert mine.optimizer.n_seen_ == 120


def test_sieve_of_a_whole() -> None:
    mine, peer = both(7, "cosine", optimizer="sieve")
    np.testing.assert_array_equal(mine.ranking, peer.ranking)
    np.testing.assert_allclose(mine.gains, peer.gains, rtol=1e-9)
    sparse = ours.FacilityLocationSelection(7, "precomputed", optimizer="sieve").fit(
        scipy.sparse.csr_matrix(PAIRS)
    )
    dense = ours.FacilityLocationSelection(7, "precomputed", optimizer="sieve").fit(PAIRS)
    np.testing.assert_array_equal(sparse.ranking, dense.ranking)


def test_streams_with_an_initial_subset() -> None:
    """Sieves written out, with what the initial subset covers taken off; apricot's own fails."""
    initial, k, epsilon = [5, 50, 80], 6, 0.05
    selector = ours.FacilityLocationSelection(
        k, "cosine", reservoir=X, initial_subset=initial, optimizer_kwds={"epsilon": epsilon}
    )
    for batch in np.split(X, [60]):
        selector.partial_fit(batch)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    s = (unit @ unit.T) ** 2
    thresholds: list[float] = [1.0]
    largest, sieves = -1.0, {}
    for begin, end in ((0, 60), (60, 120)):
        base = s[[row for row in initial if row < end]].max(axis=0)
        left = [row for row in range(begin, end) if row not in initial]
        gains = (np.maximum(s[left], base).sum(axis=1) - base.sum()) / 120
        if gains.max() > largest:
            largest = gains.max()
            while (1 + epsilon) ** len(thresholds) - 1 <= largest * k:
                thresholds.append((1 + epsilon) ** len(thresholds) - 1)
        for number, guess in enumerate(thresholds):
            picks, total, best = sieves.setdefault(number, ([], 0.0, np.zeros(120)))
            best = np.maximum(best, base)
            for row in left:
                if len(picks) == k:
                    break
                gain = np.maximum(best, s[row]).mean() - base.mean() - total
                if gain > (guess / 2 - total) / (k - len(picks)):
                    best, total = np.maximum(best, s[row]), total + gain
                    picks.append(row)
            sieves[number] = (picks, total, best)
    best_picks = max(sieves.values(), key=lambda sieve: sieve[1])[0]
    assert selector.ranking.tolist() == best_picks
    assert not set(initial) & set(best_picks)
    mask = np.zeros(120, dtype=bool)
    mask[initial] = True
    again = ours.FacilityLocationSelection(
        k, "cosine", reservoir=X, initial_subset=mask, optimizer_kwds={"epsilon": epsilon}
    )
    for batch in np.split(X, [60]):
        again.partial_fit(batch)
    np.testing.assert_array_equal(again.ranking, selector.ranking)


ERRORS: list[tuple[dict[str, Any], Any]] = [
    ({"n_samples": 0}, X),
    ({"optimizer": "other"}, X),
    ({"verbose": 3}, X),
    ({"initial_subset": (1, 2)}, X),
    ({"initial_subset": X[:2]}, X),
    ({"initial_subset": [1] * 3, "n_samples": 118}, X),
    ({"initial_subset": [121]}, X),
    ({"initial_subset": [-1]}, X),
    ({"random_state": "a"}, X),
    ({"n_samples": 121}, X),
    ({"metric": "precomputed"}, X),
    ({"metric": "precomputed"}, PAIRS - 0.5),
    ({"metric": "precomputed"}, scipy.sparse.csr_matrix(PAIRS - 0.5)),
    ({}, scipy.sparse.csr_matrix(X)),
    ({"optimizer": "greedi", "n_samples": 3}, X),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "rows"), ERRORS)
def test_errors(arguments: dict[str, Any], rows: Any) -> None:
    def run(module: Any) -> object:
        return module.FacilityLocationSelection(**{"n_samples": 5, **arguments}).fit(rows)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as wanted:  # noqa: PT011
            run(apricot)
    with pytest.raises(type(wanted.value)) as raised:
        run(ours)
    assert str(raised.value) == str(wanted.value)


def test_what_apricot_does_not_say() -> None:
    select = ours.FacilityLocationSelection
    with pytest.raises(NotImplementedError, match=r"'bidirectional'.*take 'lazy'"):
        select(5, optimizer="bidirectional").fit(X)
    with pytest.raises(NotImplementedError, match=r"initial_subset: .*apricot\.optimizers\.GreeDi"):
        select(20, optimizer="greedi", initial_subset=[3]).fit(X)
    with pytest.raises(NotImplementedError, match=r"n_neighbors: .*partial_fit"):
        select(5, n_neighbors=4).partial_fit(X)
    with pytest.raises(NotImplementedError, match=r"sample_cost: apricot\.optimizers\.SieveGreedy"):
        select(5).partial_fit(X, sample_cost=COSTS)
    with pytest.raises(NotImplementedError, match="X: a sparse matrix cannot be streamed"):
        select(5, "precomputed").partial_fit(scipy.sparse.csr_matrix(PAIRS))
    with pytest.raises(ValueError, match=r"sample_cost must have shape \(120,\), got \(119,\)"):
        select(5).fit(X, sample_cost=COSTS[:-1])
    with pytest.raises(ValueError, match="sample_cost must be finite and > 0, got 0"):
        select(5).fit(X, sample_cost=COSTS * 0)
    with pytest.raises(
        TypeError, match="n_neighbors must be an int, a KNeighborsTransformer or None, got float"
    ):
        select(5, n_neighbors=4.5).fit(X)
    with pytest.raises(ValueError, match="m and l must be given together, got m=4 and l=None"):
        select(8, optimizer="greedi", optimizer_kwds={"m": 4}).fit(X)
    with pytest.raises(ValueError, match="optimizer must be an optimizer or one of"):
        select(8, optimizer="sample", optimizer_kwds={"optimizer": "other"}).fit(X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        select(5, optimizer_kwds={"other": 1}).fit(X)
    broken = X.copy()
    broken[3, 4] = np.nan
    with pytest.raises(ValueError, match="X"):
        select(5).fit(broken)


def test_initial_subset_that_apricot_fails_on() -> None:
    with pytest.raises(ValueError, match="the maximum value cannot exceed the size of the data set"):
        ours.FacilityLocationSelection(5, initial_subset=[120]).fit(X)
    empty = ours.FacilityLocationSelection(5, initial_subset=[]).fit(X)
    np.testing.assert_array_equal(empty.ranking, ours.FacilityLocationSelection(5).fit(X).ranking)


def test_correlation_by_its_own_name() -> None:
    mine = ours.FacilityLocationSelection(9, "correlation").fit(X)
    np.testing.assert_array_equal(mine.ranking, ours.FacilityLocationSelection(9, "corr").fit(X).ranking)
    assert mine.metric == "correlation"


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    for optimizer in ("lazy", "approximate-lazy", "stochastic", "greedi"):
        for verbose in (False, True):
            arguments: dict[str, Any] = {"optimizer": optimizer, "random_state": 0, "verbose": verbose}
            mine = ours.FacilityLocationSelection(16, "precomputed", **arguments).fit(PAIRS)
            assert ("apricot" in capsys.readouterr().err) == verbose
        assert len(mine.ranking) == 16


def test_names() -> None:
    from flashcoreset.compat.apricot.functions import facilityLocation

    assert facilityLocation.FacilityLocationSelection is ours.FacilityLocationSelection
    assert issubclass(ours.FacilityLocationSelection, ours.functions.base.BaseGraphSelection)
    assert list(optimizers.OPTIMIZERS) == list(apricot.optimizers.OPTIMIZERS)
    for name in dir(apricot):
        if name.endswith("Selection"):
            assert isinstance(getattr(ours, name), type)
    with pytest.raises(NotImplementedError, match=r"use apricot\.GraphCutSelection"):
        ours.GraphCutSelection(5)
    assert not hasattr(ours, "Nothing")


def test_nothing_of_apricot_is_imported() -> None:
    program = """
import sys
for name in ("apricot", "numba", "submodlib"):
    sys.modules[name] = None  # an import of it fails
from flashcoreset.compat.apricot.functions.facilityLocation import FacilityLocationSelection
import flashcoreset.compat.apricot.optimizers
import numpy as np
print(FacilityLocationSelection(2).fit(np.array([[0.0], [1.0], [2.0], [10.0]])).ranking)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[2 3]\n"
