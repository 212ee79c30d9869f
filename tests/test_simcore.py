"""simcore against a brute force in NumPy that follows the definition word by word, and everything a caller
can get wrong.
"""

from __future__ import annotations

import _thread
import importlib
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import flashcoreset as fc
from flashcoreset.methods.simcore import _best_of_starts

BACKENDS = ["cpu", "torch"]


def unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)


def brute_force(
    openset: np.ndarray,
    target: np.ndarray,
    k: int | None,
    n_clusters: int,
    stop: bool,
    stop_threshold: float,
    patience: int,
    seed: int = 0,
) -> tuple[list[list[int]], list[float], int]:
    """The rounds kept, whole (a last round that passes k is not cut), their values, and the limit."""
    openset, target = unit(openset.astype(np.float64)), unit(target.astype(np.float64))
    target = np.array(list(dict.fromkeys(map(tuple, np.round(target, 12) + 0.0))))
    if len(target) <= n_clusters:
        centroids = target
    else:
        centroids = unit(KMeans(n_clusters, n_init=10, random_state=seed).fit(target).cluster_centers_)
    s = openset @ centroids.T
    orders = [list(np.argsort(-np.round(s[:, c], 12), kind="stable")) for c in range(len(centroids))]
    limit = min(len(openset), k if k is not None else 50 * len(target))
    taken: set[int] = set()
    rounds: list[list[int]] = []
    values: list[float] = []
    while len(taken) < limit:
        picks = [next(int(i) for i in order if i not in taken) for order in orders]
        value = float(np.mean([s[item, c] for c, item in enumerate(picks)]))
        threshold = values[patience - 1] * stop_threshold if len(rounds) >= patience else 0
        if stop and value < threshold:
            break
        rounds.append(list(dict.fromkeys(picks)))
        values.append(value)
        taken |= set(picks)
    return rounds, values, limit


def check(coreset: fc.Coreset, rounds: list[list[int]], values: list[float], limit: int) -> None:
    got = [part.tolist() for part in coreset.indices.split(coreset.info["counts"])]
    if not rounds:
        assert coreset.info["rounds"] == len(coreset.indices) == len(coreset.weights) == 0
        return
    assert got[:-1] == rounds[:-1]
    room = limit - sum(len(r) for r in rounds[:-1])
    if len(rounds[-1]) <= room:
        assert got[-1] == rounds[-1]
    else:  # a subset, in the order of the round
        assert len(got[-1]) == room
        assert [item for item in rounds[-1] if item in got[-1]] == got[-1]
    assert coreset.info["rounds"] == len(rounds)
    assert coreset.info["values"] == pytest.approx(values, abs=1e-6)
    assert coreset.indices.dtype == torch.int64
    assert coreset.weights.tolist() == [1.0] * len(coreset.indices)


def data(n: int, m: int, d: int, seed: int = 0, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """A target in a few directions, and an open set of which a part lies in them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((5, d))
    target = centres[rng.integers(0, 5, m)] + 0.3 * rng.standard_normal((m, d))
    near = centres[rng.integers(0, 5, n)] + 0.5 * rng.standard_normal((n, d))
    openset = np.where(rng.random((n, 1)) < 0.3, near, rng.standard_normal((n, d)))
    return openset.astype(dtype), target.astype(dtype)


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    n=st.integers(1, 60),
    m=st.integers(1, 12),
    d=st.integers(1, 4),
    n_clusters=st.integers(12, 20),
    k=st.one_of(st.none(), st.integers(1, 60)),
    stop=st.booleans(),
    stop_threshold=st.sampled_from([0.0, 0.5, 0.95, 1.0, 1.5]),
    patience=st.integers(1, 8),
    budget=st.sampled_from([1, 3000, 2**28]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_definition_on_exact_grids(
    backend: str,
    n: int,
    m: int,
    d: int,
    n_clusters: int,
    k: int | None,
    stop: bool,
    stop_threshold: float,
    patience: int,
    budget: int,
    seed: int,
) -> None:
    # Rows along the axes, with signs, repetitions and zero rows: cosines are exactly -1, 0 or 1, and most of
    # them tie.
    rng = np.random.default_rng(seed)
    axes = np.concatenate([np.eye(d), -np.eye(d), np.zeros((1, d))]).astype(np.float32)
    openset = axes[rng.integers(0, len(axes), n)] * rng.integers(1, 9, (n, 1)).astype(np.float32)
    target = axes[rng.integers(0, len(axes), m)]
    k = None if k is None and stop else min(k or n, n)
    options: dict[str, Any] = {
        "n_clusters": n_clusters,
        "stop": stop,
        "stop_threshold": stop_threshold,
        "patience": patience,
    }
    with warnings.catch_warnings():  # of nothing taken
        warnings.simplefilter("ignore", fc.InputWarning)
        coreset = fc.simcore(openset, target, k, backend=backend, memory_budget=budget, **options)
    check(coreset, *brute_force(openset, target, k, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [None, 1, 97, 400])
@pytest.mark.parametrize(("patience", "stop"), [(1, True), (4, True), (20, False)])
def test_definition_with_clusters(
    backend: str, dtype: type, k: int | None, patience: int, stop: bool
) -> None:
    openset, target = data(400, 60, 8, seed=3, dtype=dtype)
    k = k if k or stop else 200
    options: dict[str, Any] = {"n_clusters": 7, "stop": stop, "stop_threshold": 0.9, "patience": patience}
    coreset = fc.simcore(openset, target, k, backend=backend, seed=5, **options)
    check(coreset, *brute_force(openset, target, k, seed=5, **options))
    assert coreset.weights.dtype == (torch.float64 if dtype == np.float64 else torch.float32)
    norms = torch.linalg.vector_norm(coreset.info["centroids"], dim=1)
    assert norms.numpy() == pytest.approx(np.ones(7), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_round_by_hand(backend: str) -> None:
    # Two centroids along the axes; item 0 is best for both, item 3 ties with item 1.
    openset = torch.tensor([[1.0, 1.0], [3.0, 4.0], [-1.0, 0.0], [6.0, 8.0], [0.0, -1.0]])
    target = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    coreset = fc.simcore(openset, target, 5, stop=False, backend=backend)
    r = 0.5**0.5
    # x takes 0 (0.707), y takes 1 (0.8) | x takes 3 (0.6), y too (0.8) | x takes 4 (0), y takes 2 (0).
    assert coreset.indices.tolist() == [0, 1, 3, 4, 2]
    assert coreset.info["counts"] == [2, 1, 2]
    assert coreset.info["values"] == pytest.approx([(r + 0.8) / 2, 0.7, 0.0], abs=1e-7)
    assert coreset.info["stopped"] == "k"
    # Round 1 has 0.7536; a share of 0.93 of it is above round 2's 0.7, 0.92 is below.
    one = fc.simcore(openset, target, stop_threshold=0.93, patience=1, backend=backend)
    assert one.indices.tolist() == [0, 1]
    assert one.info["stopped"] == "threshold"
    assert one.info["dropped_value"] == pytest.approx(0.7, abs=1e-7)
    assert one.info["threshold"] == pytest.approx(0.93 * (r + 0.8) / 2, abs=1e-6)
    two = fc.simcore(openset, target, stop_threshold=0.92, patience=1, backend=backend)
    assert two.indices.tolist() == [0, 1, 3]
    # The threshold of round 2 does not touch round 2 itself.
    assert fc.simcore(openset, target, stop_threshold=1.5, patience=2, backend=backend).info["rounds"] == 2
    everything = fc.simcore(openset, target, patience=20, backend=backend)
    assert everything.info["stopped"] == "exhausted"
    assert everything.info["threshold"] is None
    assert sorted(everything.indices.tolist()) == [0, 1, 2, 3, 4]


def test_limit_without_k_is_fifty_times_the_target() -> None:
    openset = np.ones((200, 2), dtype=np.float32)
    coreset = fc.simcore(openset, np.array([[1, 1], [1, 2], [2, 2], [1, 3], [1, 2]], dtype=np.float32))
    assert coreset.indices.tolist() == list(range(150))
    assert coreset.info["k"] == 150
    assert coreset.info["stopped"] == "k"


def test_last_round_keeps_a_seeded_random_subset() -> None:
    openset = target = np.eye(12, dtype=np.float32)
    subsets = [fc.simcore(openset, target, 5, seed=seed).indices.tolist() for seed in range(40)]
    assert subsets == [fc.simcore(openset, target, 5, seed=seed).indices.tolist() for seed in range(40)]
    assert all(len(set(subset)) == 5 and subset == sorted(subset) for subset in subsets)
    # 200 draws of 12: each is expected 16.7 times, with a standard deviation of 3.1.
    counts = np.bincount(np.concatenate(subsets), minlength=12)
    assert counts.min() >= 4
    assert counts.max() <= 30


def test_result_does_not_depend_on_threads() -> None:
    openset, target = data(3000, 300, 24, seed=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fc.simcore(openset, target, 500, n_clusters=30))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].indices, results[1].indices)
    assert results[0].info["values"] == results[1].info["values"]
    assert torch.equal(results[0].info["centroids"], results[1].info["centroids"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_clusters", [3, 9, 50, 200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_repeated_target_rows_change_nothing(backend: str, n_clusters: int, dtype: type) -> None:
    """With more clusters than distinct rows, fewer, and as many; of all rows or of some, and at another length."""
    openset, target = data(2000, 9, 6, dtype=dtype)
    options: dict[str, Any] = {"n_clusters": n_clusters, "backend": backend}
    once = fc.simcore(openset, target, **options)
    assert len(once.info["centroids"]) == min(n_clusters, 9)
    repeated = [np.tile(target, (20, 1)), np.repeat(target, 3, axis=0)]
    repeated += [target[[0, 1, 1, 2, 3, 4, 5, 1, 6, 7, 8, 8]], np.concatenate([target, 4 * target[::-1]])]
    for again in repeated:
        coreset = fc.simcore(openset, again, **options)
        assert torch.equal(coreset.indices, once.indices)
        assert coreset.info["values"] == once.info["values"]
        assert coreset.info["k"] == once.info["k"] == 450
        assert torch.equal(coreset.info["centroids"], once.info["centroids"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_rows_do_not_pull_their_centroid(backend: str) -> None:
    """A point counts once in k-means, however often it appears."""
    openset, _ = data(50, 4, 2)
    target = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    coreset = fc.simcore(openset, target, 20, n_clusters=1, stop=False, backend=backend)
    expected = np.array([[1, 1]]) / np.sqrt(2)
    np.testing.assert_allclose(coreset.info["centroids"].numpy(), expected, rtol=1e-6)


def test_zero_rows_of_either_sign_are_one_point() -> None:
    target = torch.tensor([[0.0, -0.0], [-0.0, 0.0], [1.0, -0.0], [2.0, 0.0]])
    assert fc.simcore(torch.eye(2), target, 1).info["centroids"].tolist() == [[0, 0], [1, 0]]


# --- what was taken by whom -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_similarity_and_centroid_of_every_pick(backend: str, dtype: type) -> None:
    openset, target = data(300, 40, 5, seed=6, dtype=dtype)
    coreset = fc.simcore(openset, target, 90, n_clusters=6, stop=False, seed=2, backend=backend)
    info = coreset.info
    s = unit(openset.astype(np.float64)) @ info["centroids"].double().numpy().T
    assert info["similarity"].dtype == coreset.weights.dtype
    np.testing.assert_allclose(info["similarity"], s[coreset.indices, info["centroid"]], atol=1e-6)
    # In each round every centroid takes its best free item, and an item's centroid is the first that took it.
    free = np.ones(300, dtype=bool)
    begin = 0
    for count in info["counts"][:-1]:
        best = np.where(free[:, None], s, -2).argmax(0).tolist()
        expected = {item: best.index(item) for item in best}
        rows = slice(begin, begin + count)
        assert coreset.indices[rows].tolist() == list(expected)
        assert info["centroid"][rows].tolist() == list(expected.values())
        free[best] = False
        begin += count
    assert len(info["similarity"]) == len(info["centroid"]) == len(coreset.indices) == 90


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pick_of_a_round_that_is_cut_keeps_its_own_centroid(backend: str) -> None:
    openset = np.eye(12, dtype=np.float32)[::-1].copy()
    coreset = fc.simcore(openset, np.eye(12, dtype=np.float32), 5, seed=3, backend=backend)
    assert (11 - coreset.info["centroid"]).tolist() == coreset.indices.tolist()
    assert coreset.info["similarity"].tolist() == [1.0] * 5


@pytest.mark.parametrize("budget", [2**28, 4000])
def test_takers_do_not_depend_on_batches_or_backend(budget: int) -> None:
    openset, target = data(500, 40, 6, seed=2)
    options: dict[str, Any] = {"n_clusters": 9, "stop": False}
    whole = fc.simcore(openset, target, 120, **options)
    for backend in BACKENDS:
        batches = fc.simcore(
            np.split(openset, [2, 77]), target, 120, backend=backend, memory_budget=budget, **options
        )
        assert torch.equal(batches.info["centroid"], whole.info["centroid"])
        np.testing.assert_allclose(batches.info["similarity"], whole.info["similarity"], atol=1e-6)


# --- the stop rule --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_round_of_negative_value_stops(backend: str) -> None:
    openset = np.float32([[1, 0], [3, 4], [0, 1], [-3, 4], [-1, 0]])
    target = np.float32([[2, 0]])
    coreset = fc.simcore(openset, target, patience=20, backend=backend)  # 1, .6, 0 | -.6
    assert coreset.indices.tolist() == [0, 1, 2]
    assert coreset.info["stopped"] == "threshold"
    assert coreset.info["threshold"] is None
    assert coreset.info["dropped_value"] == pytest.approx(-0.6)
    assert len(fc.simcore(openset, target, 5, stop=False, backend=backend).indices) == 5
    # Also in the round that would be the reference.
    assert len(fc.simcore(openset, target, patience=4, backend=backend).indices) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_taken_where_all_is_unlike_the_target(backend: str) -> None:
    openset = np.float32([[-1, 0.5], [-1, -1]])
    with pytest.warns(fc.InputWarning, match=r"nothing was taken.*mean similarity of -0\.707 to the target"):
        coreset = fc.simcore(openset, np.float32([[1, 0]]), backend=backend)
    assert coreset.indices.shape == coreset.weights.shape == (0,)
    assert coreset.indices.dtype == torch.int64
    assert coreset.info["values"] == coreset.info["counts"] == []


@pytest.mark.parametrize(
    ("n", "clusters", "patience"), [(100, 5, 1), (6399, 5, 1), (6400, 5, 2), (9600, 5, 3), (70_000, 5, 20)]
)
def test_patience_by_default_is_the_published_share(n: int, clusters: int, patience: int) -> None:
    openset, target = data(n, clusters, 3, seed=1)
    coreset = fc.simcore(openset, target, 5 * clusters)
    assert coreset.info["patience"] == patience
    assert torch.equal(coreset.indices, fc.simcore(openset, target, 5 * clusters, patience=patience).indices)
    batches = fc.simcore(np.split(openset, [10]), target, 5 * clusters)
    assert batches.info["patience"] == patience


def test_patience_by_default_takes_less_of_a_small_open_set() -> None:
    openset, target = data(1500, 60, 16, seed=1)
    small, old = fc.simcore(openset, target), fc.simcore(openset, target, patience=20)
    assert len(small.indices) < 0.5 * len(old.indices)


# --- centroids of one's own, shares, samples ------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_centroids_of_ones_own(backend: str) -> None:
    openset, target = data(400, 30, 6, seed=3)
    by_target = fc.simcore(openset, target, 60, n_clusters=7, stop=False, backend=backend)
    centroids = by_target.info["centroids"]
    own = fc.simcore(openset, centroids=3 * centroids, k=60, stop=False, backend=backend)
    assert torch.equal(own.indices, by_target.indices)
    np.testing.assert_allclose(own.info["centroids"], centroids, atol=1e-7)
    # More than n_clusters of them stay as they are, and equal ones count once.
    many = np.concatenate([target, 2 * target])
    found = fc.simcore(openset, centroids=many, n_clusters=4, backend=backend)
    assert len(found.info["centroids"]) == 30
    assert found.info["k"] == 400
    few = fc.simcore(np.tile(openset, (30, 1)), centroids=target[:2], backend=backend)
    assert few.info["k"] == 100


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1, 0.333])
def test_ratio_is_a_share_of_the_open_set(ratio: float) -> None:
    openset, target = data(203, 30, 6, seed=3)
    k = int(ratio * 203)
    expected = fc.simcore(openset, target, k, stop=False)
    for source in (openset, torch.from_numpy(openset), [openset[:9], openset[9:]], lambda: [openset]):
        coreset = fc.simcore(source, target, ratio=ratio, stop=False)
        assert torch.equal(coreset.indices, expected.indices)
        assert coreset.info["k"] == k
    stopped = fc.simcore(openset, target, ratio=1.0)
    assert torch.equal(stopped.indices, fc.simcore(openset, target, 203).indices)


def test_ratio_of_an_iterator_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"ratio needs the number of rows, and openset is an iterator.*pass k"
    ):
        fc.simcore(iter([GOOD]), GOOD, ratio=0.5)


def test_k_means_on_a_sample() -> None:
    openset, target = data(200, 300, 6, seed=3)
    whole = fc.simcore(openset, target, 20, n_clusters=8)
    assert torch.equal(fc.simcore(openset, target, 20, n_clusters=8, fit_on=300).indices, whole.indices)
    sample = fc.simcore(openset, target, 20, n_clusters=8, fit_on=8)
    # Each of 8 points is a centroid then, and they are drawn by the seed.
    units = unit(target.astype(np.float64))
    found = [int(np.abs(units - c).sum(1).argmin()) for c in sample.info["centroids"].double().numpy()]
    np.testing.assert_allclose(sample.info["centroids"], units[found], atol=1e-6)
    assert len(set(found)) == 8
    again = fc.simcore(openset, target, 20, n_clusters=8, fit_on=8)
    assert torch.equal(again.info["centroids"], sample.info["centroids"])
    other = fc.simcore(openset, target, 20, n_clusters=8, fit_on=8, seed=1)
    assert not torch.equal(other.info["centroids"], sample.info["centroids"])


def test_k_means_keeps_the_best_of_its_starts_whatever_the_threads() -> None:
    """Against scikit-learn's own choice among as many starts, by the sum of squared distances."""
    _, target = data(10, 400, 8, seed=5)
    points = unit(target).astype(np.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_best_of_starts(points, 12, 7, 10))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    inertia = ((points[:, None] - found[0]) ** 2).sum(-1).min(1).sum()
    peer = KMeans(12, n_init=10, random_state=7).fit(points)
    assert inertia == pytest.approx(peer.inertia_, rel=1e-4)
    assert inertia < KMeans(12, n_init=1, random_state=7).fit(points).inertia_ + 1e-4


def test_larger_targets_get_one_start_and_then_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    openset, target = data(50, 900, 6, seed=3)
    made = []

    class Counted(KMeans):
        def fit(self, x: np.ndarray, *rest: object, **more: object) -> KMeans:
            made.append(len(x))
            return super().fit(x, *rest, **more)

    class Batches(MiniBatchKMeans):
        def fit(self, x: np.ndarray, *rest: object, **more: object) -> MiniBatchKMeans:
            made.append(-len(x))
            return super().fit(x, *rest, **more)

    monkeypatch.setattr("sklearn.cluster.KMeans", Counted)
    monkeypatch.setattr("sklearn.cluster.MiniBatchKMeans", Batches)
    module = importlib.import_module("flashcoreset.methods.simcore")
    monkeypatch.setattr(module, "_ONE_START_FROM", 600)
    monkeypatch.setattr(module, "_BATCHES_FROM", 800)

    def centroids(rows: int, **options: int) -> np.ndarray:
        made.clear()
        return fc.simcore(openset, target[:rows], 5, n_clusters=6, **options).info["centroids"].numpy()

    few, one, batches = (centroids(rows) for rows in (600, 800, 900))
    assert made == [-900]
    centroids(800)
    assert made == [800]
    centroids(600)
    assert made == [600] * 10
    asked = centroids(900, n_init=2)
    assert made == [900] * 2
    centroids(900, fit_on=700)
    assert made == [700]
    again = centroids(900)
    assert np.array_equal(batches, again)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert np.array_equal(centroids(900), batches)
    finally:
        torch.set_num_threads(before)
    points = unit(target).astype(np.float64)
    left = [float((1 - (points @ unit(c).T).max(1)).sum()) for c in (asked, batches)]
    assert left[1] < 1.1 * left[0]
    assert few.shape == one.shape == (6, 6)


def test_interrupted_k_means_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(self: KMeans, x: np.ndarray) -> KMeans:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(2)
        return self

    monkeypatch.setattr(KMeans, "fit", fit)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    timer = threading.Timer(0.5, _thread.interrupt_main)
    timer.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            _best_of_starts(np.random.default_rng(0).random((50, 3)), 4, 0, 4)
        assert time.perf_counter() - begin < 1.5
    finally:
        timer.cancel()
        torch.set_num_threads(before)


# --- the open set in pieces -----------------------------------------------------------------------


class Batches:
    """Reads like a DataLoader: every iteration starts anew."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.readings = 0

    def __iter__(self) -> Iterator[Any]:
        self.readings += 1
        return iter(self.batches)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [2**28, 40_000, 4000])
def test_batches_give_the_same_bits(backend: str, budget: int) -> None:
    openset, target = data(500, 40, 6, seed=2)
    arguments: dict[str, Any] = {"n_clusters": 9, "stop": False, "backend": backend}
    whole = fc.simcore(openset, target, 120, **arguments)
    pieces = np.split(openset, [1, 2, 77, 300])
    tensors = [torch.from_numpy(piece) for piece in [openset[:0], *pieces[:2], openset[:0], *pieces[2:]]]
    loader = DataLoader(TensorDataset(torch.from_numpy(openset), torch.arange(500)), batch_size=33)
    sources = [openset, pieces, tensors, Batches(pieces), lambda: iter(pieces), lambda: pieces, loader]
    for source in sources:
        coreset = fc.simcore(source, target, 120, memory_budget=budget, **arguments)
        assert torch.equal(coreset.indices, whole.indices)
        assert coreset.info["values"] == whole.info["values"]
        assert (coreset.info["passes"] > 1) == (budget == 4000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [120, None])
def test_generator_is_read_once(backend: str, k: int | None) -> None:
    openset, target = data(500, 9, 6, seed=2)
    arguments: dict[str, Any] = {"patience": 2, "stop_threshold": 0.5, "backend": backend}
    coreset = fc.simcore((piece for piece in np.split(openset, 5)), target, k, **arguments)
    assert coreset.info["passes"] == 1
    assert torch.equal(coreset.indices, fc.simcore(openset, target, k, **arguments).indices)


def test_generator_that_would_be_read_again_is_an_error() -> None:
    openset, target = data(500, 9, 6, seed=2)
    with pytest.raises(ValueError, match=r"is an iterator, which can be read once only.*raise memory_budget"):
        fc.simcore(iter([openset]), target, 200, stop=False, memory_budget=1000)


def test_readings_that_differ_are_an_error() -> None:
    openset, target = data(500, 9, 6, seed=2)
    rng = np.random.default_rng(0)

    def shuffled() -> list[np.ndarray]:
        return [rng.permutation(openset)]

    def shrinking(sizes: Iterator[int]) -> Any:
        return lambda: [openset[: next(sizes)]]

    arguments: dict[str, Any] = {"k": 200, "stop": False, "memory_budget": 1000}
    with pytest.raises(ValueError, match=r"same rows in the same order.*shuffle=False"):
        fc.simcore(shuffled, target, **arguments)
    with pytest.raises(ValueError, match=r"reading 2 \(499 rows\) differs from the first \(500 rows\)"):
        fc.simcore(shrinking(iter([500, 499])), target, **arguments)
    with pytest.raises(ValueError, match="had 400 rows in its first reading, and has more in reading 2"):
        fc.simcore(shrinking(iter([400, 500])), target, **arguments)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.eye(12))


class OwnOrder(BatchSampler):
    """Batches may come in any order."""


ROWS = TensorDataset(torch.eye(12))
REFUSED: dict[str, tuple[DataLoader, str]] = {
    "shuffle": (DataLoader(ROWS, 3, shuffle=True), "its sampler is a RandomSampler.*shuffle=False and no sampler"),
    "shuffle, no batches": (DataLoader(ROWS, None, shuffle=True), "its sampler is a RandomSampler"),
    "some of the rows": (DataLoader(ROWS, 3, sampler=SubsetRandomSampler(range(4))), "its sampler is a SubsetRandomSampler"),
    "weights": (DataLoader(ROWS, 3, sampler=WeightedRandomSampler([1.0] * 12, 5)), "its sampler is a WeightedRandomSampler"),
    "batches of a shuffle": (
        DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 3, False)), "its sampler is a RandomSampler",
    ),
    "batches of another kind": (
        DataLoader(ROWS, batch_sampler=OwnOrder(SequentialSampler(ROWS), 3, False)), "its batch_sampler is a OwnOrder.*batch_size",
    ),
    "lists": (DataLoader(ROWS, batch_sampler=[[3, 1], [0]]), "its batch_sampler is a list"),
    "drop_last": (DataLoader(ROWS, 5, drop_last=True), "drop_last=True leaves rows out.*drop_last=False"),
    "drop_last of batches": (
        DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 5, True)), "drop_last=True leaves rows out",
    ),
    "drop_last of a stream": (DataLoader(Stream(), 3, drop_last=True), "drop_last=True leaves rows out"),
    "workers of a stream": (DataLoader(Stream(), 3, num_workers=2), "its 2 workers read an IterableDataset side by side.*num_workers=0"),
    "in any order": (DataLoader(ROWS, 3, num_workers=2, in_order=False), "in_order=False takes batches as workers finish"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_loaders_that_lose_the_order_are_refused(case: str) -> None:
    loader, words = REFUSED[case]
    with pytest.raises(
        ValueError, match=rf"^openset must be a DataLoader that gives every row .*but {words}"
    ):
        fc.simcore(loader, np.eye(12, dtype=np.float32), 3)
    with pytest.raises(ValueError, match=r"^openset\(\) must be a DataLoader that gives every row"):
        fc.simcore(lambda: loader, np.eye(12, dtype=np.float32), 3)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(ROWS, 5), DataLoader(ROWS, 4, drop_last=True), DataLoader(Stream(), 5), DataLoader(Stream(), 5, num_workers=1),
        DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 5, False)), DataLoader(ROWS, 5, num_workers=2),
        DataLoader([torch.eye(12)[:5], torch.eye(12)[5:]], None),
    ],
    ids=["plain", "nothing dropped", "stream", "one worker", "batches", "workers", "no batches"],
)  # fmt: skip
def test_loaders_in_order(loader: DataLoader) -> None:
    target = np.eye(12, dtype=np.float32)[[7, 2, 11]]
    assert fc.simcore(loader, target, 3, stop=False).indices.tolist() == [7, 2, 11]


def anonymous_memory() -> int:
    """Bytes of this process that are not pages of a file."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_memory_mapped_open_set_is_never_copied_whole(tmp_path: Path, dtype: type) -> None:
    n, d = 400_000, 64
    stored = np.lib.format.open_memmap(tmp_path / "openset.npy", mode="w+", dtype=dtype, shape=(n, d))
    stored[: n // 4] = np.random.default_rng(0).standard_normal((n // 4, d)).astype(dtype)
    stored.flush()
    del stored
    mapped = np.load(tmp_path / "openset.npy", mmap_mode="r")
    target = np.array(mapped[:20])
    arguments: dict[str, Any] = {"k": 300, "stop": False, "memory_budget": 8 * 2**20}
    few = fc.simcore(mapped[: n // 4], target, **arguments)  # code that is loaded once is loaded now
    seen: list[int] = []
    before = anonymous_memory()
    whole = fc.simcore(mapped, target, progress=lambda *_: seen.append(anonymous_memory()), **arguments)
    # As float32 the open set takes 100 MB; the zero rows add nothing to the selection.
    assert max(seen) - before < 25e6
    assert torch.equal(whole.indices, few.indices)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_layouts_and_gradients(backend: str, dtype: torch.dtype) -> None:
    openset, target = (torch.from_numpy(part).to(dtype) for part in data(200, 20, 6, seed=4))
    wide = openset.to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = fc.simcore(wide, target.to(wide.dtype), 50, n_clusters=5, backend=backend)
    views = [
        openset,
        openset.clone().requires_grad_(),
        torch.cat([openset, openset], dim=1)[:, :6],
        openset.T.contiguous().T,
        openset.repeat_interleave(2, dim=0)[::2],
    ]
    for view in views:
        coreset = fc.simcore(view, target, 50, n_clusters=5, backend=backend)
        assert torch.equal(coreset.indices, expected.indices)
        assert coreset.info["values"] == expected.info["values"]
        assert coreset.weights.dtype == wide.dtype
        assert not coreset.weights.requires_grad


def test_numpy_views() -> None:
    openset, target = data(200, 20, 6, seed=4)
    expected = fc.simcore(openset, target, 50).indices
    read_only = openset.copy()
    read_only.flags.writeable = False
    reverse = openset[::-1].copy()
    for view in (read_only, reverse[::-1], np.asfortranarray(openset)):
        assert torch.equal(fc.simcore(view, target, 50).indices, expected)
    with pytest.raises(ValueError, match="openset has byte-swapped dtype"):
        fc.simcore(openset.astype(openset.dtype.newbyteorder()), target, 50)


# --- what a caller can get wrong ------------------------------------------------------------------

GOOD = np.ones((6, 2), dtype=np.float32)
NAN = np.array([[1, 1], [1, np.nan]], dtype=np.float32)
INF = np.array([[1, 1], [np.inf, 1]], dtype=np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"openset": NAN, "k": 1}, ValueError, r"openset must be finite, got (NaN|nan) at row 1, column 1"),
        ({"openset": INF, "k": 1}, ValueError, "openset must be finite, got inf at row 1, column 0"),
        ({"openset": [GOOD, NAN]}, ValueError, r"openset must be finite, got (NaN|nan) at row 7, column 1"),
        ({"target": NAN}, ValueError, "target must be finite, got NaN at row 1, column 1"),
        ({"target": INF}, ValueError, "target must be finite, got inf at row 1, column 0"),
        ({"openset": GOOD[:0]}, ValueError, "openset must have at least 1 row"),
        ({"openset": GOOD[:, :0]}, ValueError, "openset must have at least 1 row and 1 column"),
        ({"target": GOOD[:0]}, ValueError, "target must have at least 1 row"),
        ({"openset": GOOD[0]}, ValueError, "openset must have 2 dimensions"),
        ({"target": GOOD[:, :1]}, ValueError, "target must have 2 columns as openset has"),
        ({"openset": GOOD.astype(np.int64)}, TypeError, "openset must have dtype"),
        ({"openset": GOOD.astype(np.complex64)}, TypeError, "openset must have dtype"),
        ({"openset": GOOD.astype(np.uint32)}, TypeError, "openset must have dtype"),
        ({"openset": GOOD.astype(object)}, TypeError, "openset must hold real numbers"),
        ({"target": GOOD.astype(np.int32)}, TypeError, "target must have dtype"),
        ({"target": "rows"}, TypeError, "target must be a torch.Tensor"),
        ({"openset": 3}, TypeError, "openset must be a matrix, an iterable of matrices or a function"),
        ({"openset": "features.npy"}, TypeError, "openset must be a matrix, an iterable"),
        ({"openset": lambda: 3}, TypeError, r"openset\(\) must return an iterable of matrices, got int"),
        ({"openset": []}, ValueError, "openset must have at least 1 row, got an empty iterable"),
        ({"openset": [GOOD[:0], GOOD[:0]]}, ValueError, "openset must have at least 1 row, got 2 batches"),
        ({"openset": lambda: GOOD}, TypeError, "must return an iterable of matrices, got a ndarray"),
        ({"openset": [[]]}, ValueError, "openset batch 0 is an empty list"),
        ({"openset": [GOOD, 3]}, TypeError, "openset batch 1 must be a torch.Tensor"),
        ({"openset": [GOOD, GOOD[:, :1]]}, ValueError, "openset batch 1 must have 2 columns"),
        ({"openset": [GOOD, GOOD.astype(np.float64)]}, ValueError, "openset batch 1 must have dtype"),
        ({"k": 0}, ValueError, "k must be >= 1, got 0"),
        ({"k": -1}, ValueError, "k must be >= 1, got -1"),
        ({"k": 7}, ValueError, "k must be <= the 6 rows of openset, got 7"),
        ({"openset": [GOOD[:2], GOOD[:2]], "k": 5}, ValueError, "k must be <= the 4 rows of openset, got 5"),
        ({"k": 2.0}, TypeError, "k must be an int"),
        ({"k": True}, TypeError, "k must be an int"),
        ({"stop": False}, ValueError, "k or ratio must be given where stop is False"),
        ({"target": None}, ValueError, "one of target and centroids must be given, got neither"),
        ({"centroids": GOOD}, ValueError, "one of target and centroids must be given, got both"),
        (
            {"target": None, "centroids": NAN},
            ValueError,
            "centroids must be finite, got NaN at row 1, column 1",
        ),
        (
            {"target": None, "centroids": GOOD[:, :1]},
            ValueError,
            "centroids must have 2 columns as openset has",
        ),
        ({"target": None, "centroids": GOOD[0]}, ValueError, "centroids must have 2 dimensions"),
        ({"target": None, "centroids": GOOD[:0]}, ValueError, "centroids must have at least 1 row"),
        ({"target": None, "centroids": "rows"}, TypeError, "centroids must be a torch.Tensor"),
        (
            {"target": None, "centroids": GOOD, "fit_on": 9},
            ValueError,
            "fit_on must be None where centroids are given, got 9",
        ),
        ({"fit_on": 0}, ValueError, "fit_on must be >= 1"),
        ({"fit_on": 50.0}, TypeError, "fit_on must be an int"),
        ({"fit_on": 50}, ValueError, "fit_on must be >= n_clusters=100, got 50"),
        ({"ratio": 0}, ValueError, r"ratio must be in \(0, 1\], got 0"),
        ({"ratio": 1.01}, ValueError, r"ratio must be in \(0, 1\], got 1.01"),
        ({"ratio": float("nan")}, ValueError, "ratio must be finite"),
        ({"ratio": "0.5"}, TypeError, "ratio must be a number"),
        ({"ratio": 0.1}, ValueError, "ratio must take at least 1 of the 6 rows of openset, got 0.1"),
        ({"ratio": 0.5, "k": 3}, ValueError, "ratio must be None where k is given, got ratio=0.5 and k=3"),
        ({"stop": 1}, TypeError, "stop must be a bool"),
        ({"n_clusters": 0}, ValueError, "n_clusters must be >= 1"),
        ({"n_clusters": 1.5}, TypeError, "n_clusters must be an int"),
        ({"patience": 0}, ValueError, "patience must be >= 1"),
        ({"n_init": 0}, ValueError, "n_init must be >= 1"),
        ({"stop_threshold": float("nan")}, ValueError, "stop_threshold must be finite"),
        ({"stop_threshold": -0.1}, ValueError, "stop_threshold must be >= 0"),
        ({"stop_threshold": "0.9"}, TypeError, "stop_threshold must be a number"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 2**32}, ValueError, "seed must be in"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be >= 1"),
        ({"progress": 3}, TypeError, "progress must be None, True or a callable"),
    ],
)
def test_bad_arguments(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fc.simcore(**({"openset": GOOD, "target": GOOD, "backend": backend} | changes))


def test_backends() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        fc.simcore(GOOD, GOOD, 1, backend="gpu")
    with pytest.raises(fc.BackendUnavailableError, match="triton"):
        fc.simcore(GOOD, GOOD, 1, backend="triton")
    meta = torch.ones(6, 2, device="meta")
    with pytest.raises(ValueError, match="target is on device meta, but openset is on cpu"):
        fc.simcore(GOOD, meta, 1)


# --- long calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_progress_reports_items_taken(backend: str) -> None:
    openset, target = data(300, 20, 4)
    calls: list[tuple[int, int]] = []
    coreset = fc.simcore(
        openset, target, 100, stop=False, backend=backend, progress=lambda *call: calls.append(call)
    )
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[0] == 0
    assert calls[-1] == (len(coreset.indices), 100)

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fc.simcore(openset, target, 100, backend=backend, progress=refuse)


def test_interrupt_stops_within_a_second() -> None:
    batch = torch.ones(200_000, 64)
    target = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield batch

    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.perf_counter())
        _thread.interrupt_main()

    timer = threading.Timer(1.0, press)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            fc.simcore(endless(), target, 10, n_clusters=200)
        assert time.perf_counter() - pressed[0] < 1
    finally:
        timer.cancel()


def test_memory_estimate() -> None:
    small = fc.memory_estimate(fc.simcore, (200_000, 128), (1000, 128), 10_000)
    assert 20 * 2**20 < small < 2**28
    # Only the item flags grow with the open set, and the lists stay within the budget.
    assert fc.memory_estimate("simcore", (10**9, 128), (1000, 128), 10_000) - small < 10**9 // 8
    assert fc.memory_estimate("simcore", (10**7, 128), (1000, 128), 10**6, memory_budget=10**7) < 2 * 10**8
    with pytest.raises(ValueError, match="target must have 128 columns"):
        fc.memory_estimate("simcore", (1000, 128), (1000, 64))
