"""Ray Data: the same scores, sketches and choices as one machine's, on a local Ray with two workers, which starts once."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashcoreset as fc

ray = pytest.importorskip("ray")
pa = pytest.importorskip("pyarrow")

N, D = 240, 5
X = (
    np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
    + np.eye(D, dtype=np.float32)[np.arange(N) % D] * 4
)
SCORES = np.random.default_rng(1).random(N)
NAMES = [["sea", "air", "land"][i % 3] for i in range(N)]
LABELS = np.arange(N) % D


def start() -> None:
    """Starts Ray with two workers. It gives itself 30 seconds, which a busy machine may not have at the first try."""
    for attempt in range(3):
        try:
            ray.init(
                num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20
            )
            return
        except Exception as error:
            ray.shutdown()
            if attempt == 2 or "timed out" not in str(error):
                raise


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own
        start()
        ray.data.DataContext.get_current().enable_progress_bars = False
        from flashcoreset.integrations import ray as module

        yield module
        ray.shutdown()


pytestmark = pytest.mark.filterwarnings("ignore")  # Ray warns of what is its own business


def data(blocks: int = 3, **more: Any) -> Any:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), D)
    table = pa.table({"embedding": vectors, "score": SCORES, "kind": NAMES, "label": LABELS, **more})
    cuts = np.linspace(0, N, blocks + 1).astype(int)
    return ray.data.from_arrow([table.slice(a, b - a) for a, b in itertools.pairwise(cuts)])


def column(ds: Any, name: str) -> np.ndarray:
    return np.asarray([row[name] for row in ds.take_all()])


def kill_one(marker: str) -> Any:
    """A function of batches that kills the worker that runs it, once."""

    def run(batch: Any) -> Any:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return batch
        os._exit(1)

    return run


def test_sketches_are_one_machine_s_though_a_worker_is_killed(on_ray: Any, tmp_path: Path) -> None:
    ds = data().map_batches(kill_one(str(tmp_path / "killed")))
    found = on_ray.sketch(ds, 3, kind="sjlt", seed=4, options={"batch_size": 50})
    rows = sorted(found.take_all(), key=lambda row: row["score"])
    assert (tmp_path / "killed").exists()
    np.testing.assert_array_equal(
        np.asarray([row["sketch"] for row in rows]),
        fc.sketch(X, 3, kind="sjlt", seed=4).numpy()[np.argsort(SCORES)],
    )


def test_scores_are_one_machine_s(on_ray: Any) -> None:
    rows = sorted(on_ray.sample_scores(data(), logits="embedding").take_all(), key=lambda row: row["score"])
    expected = fc.sample_scores(X, LABELS)
    for name in ("loss", "entropy", "margin", "el2n", "correct"):
        want = getattr(expected, name).numpy()[np.argsort(SCORES)]
        np.testing.assert_array_equal(np.asarray([row[name] for row in rows]), want)


@pytest.mark.parametrize("blocks", [1, 3])
def test_ccs_is_one_machine_s(on_ray: Any, blocks: int) -> None:
    found = on_ray.ccs(
        data(blocks), 20, n_strata=5, groups="kind", mislabel_scores="score", mislabel_ratio=0.1, seed=3
    )
    expected = fc.ccs(
        SCORES, 20, n_strata=5, groups=NAMES, mislabel_scores=SCORES, mislabel_ratio=0.1, seed=3
    )
    assert column(found, "coreset_index").tolist() == expected.indices.tolist()
    assert column(found, "kind").tolist() == expected.take(NAMES)
    assert column(found, "coreset_weight").tolist() == [1.0] * 20


@pytest.mark.parametrize("blocks", [1, 3])
def test_caratheodory_keeps_the_mean(on_ray: Any, blocks: int) -> None:
    found = on_ray.caratheodory(data(blocks), weights="score")
    weights, chosen = column(found, "coreset_weight"), column(found, "embedding")
    assert len(weights) <= D + 1
    np.testing.assert_allclose(weights.sum(), SCORES.sum(), rtol=1e-12)
    np.testing.assert_allclose(weights @ chosen, SCORES @ X.astype(float), rtol=1e-9)
    np.testing.assert_array_equal(chosen, X[column(found, "coreset_index")])


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("k", [30, N])
def test_simcore_is_one_machine_s(on_ray: Any, blocks: int, k: int) -> None:
    options: dict[str, Any] = {"n_clusters": 4, "seed": 2, "stop": k < N}
    found = on_ray.simcore(data(blocks), X[:20] * 2, k, **options)
    expected = fc.simcore(X, X[:20] * 2, k, **options)
    assert column(found, "coreset_index").tolist() == expected.indices.tolist()
    np.testing.assert_array_equal(column(found, "embedding"), X[expected.indices])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=["in order", "out of order"])
def test_merging_does_not_depend_on_the_order_of_blocks(order: list[int]) -> None:
    """Without Ray's engine."""
    from flashcoreset.integrations import ray as module

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), D)
    whole = pa.table({"embedding": vectors, "score": SCORES, "kind": NAMES, module.INDEX: np.arange(N)})
    blocks = [whole.slice(0, 100), whole.slice(100, 50), whole.slice(150)]

    def run(aggregate: Any) -> Any:
        parts = [aggregate.aggregate_block(blocks[place]) for place in order]
        return aggregate.finalize(functools.reduce(aggregate.combine, parts))

    options: dict[str, Any] = {"n_strata": 5, "mislabel_ratio": 0.1}
    drawn = run(module._CCS(20, "score", groups="kind", mislabel_scores="score", **options))
    expected = fc.ccs(SCORES, 20, groups=NAMES, mislabel_scores=SCORES, **options)
    assert drawn["indices"] == expected.indices.tolist()
    reduced = run(module._Caratheodory("embedding", weights="score"))
    weights = np.asarray(reduced["weights"])
    assert len(weights) <= D + 1
    np.testing.assert_allclose(weights @ X[reduced["indices"]], SCORES @ X.astype(float), rtol=1e-9)
    centroids = fc.simcore(X[:20], X[:20], 1, stop=False, n_clusters=4).info["centroids"]
    near = run(module._Nearest(centroids, 30, "embedding"))["indices"]
    assert len(near) < N
    found = fc.simcore(X[near], centroids=centroids, k=30, patience=module.patience_of(N, len(centroids)))
    assert (
        np.asarray(near)[found.indices].tolist() == fc.simcore(X, X[:20], 30, n_clusters=4).indices.tolist()
    )


def test_worth_of_picks_alone() -> None:
    from flashcoreset.integrations import ray as module

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), D)
    exact = fc.facility_location(X, 12)
    gains, won = module._worth_in_block(
        pa.table({"embedding": vectors}), "embedding", X[exact.indices], "cosine", 0.0
    )
    np.testing.assert_allclose(gains, exact.gains.numpy(), rtol=1e-4, atol=1e-3)
    assert won.tolist() == exact.weights.tolist()


def objective(rows: np.ndarray) -> float:
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    return float(np.maximum(unit[rows].astype(float) @ unit.T, 0).max(0).sum())


def test_facility_location_in_two_stages(on_ray: Any) -> None:
    exact = fc.facility_location(X, 12)
    whole = on_ray.facility_location(data(1), 12)
    assert column(whole, "coreset_index").tolist() == exact.indices.tolist()
    np.testing.assert_allclose(column(whole, "coreset_gain"), exact.gains.numpy(), rtol=1e-4, atol=1e-3)
    found = on_ray.facility_location(data(3), 12)
    rows, weights = column(found, "coreset_index"), column(found, "coreset_weight")
    assert len(set(rows.tolist())) == 12
    assert column(found, "coreset_gain").sum() == pytest.approx(objective(rows), rel=1e-6)
    assert objective(rows) >= 0.95 * exact.objective
    assert weights.sum() == N
    by_distance = on_ray.facility_location(data(3), 4, metric="l1", offset=100.0)
    distances = np.abs(X[column(by_distance, "coreset_index")][:, None].astype(float) - X[None]).sum(2).min(0)
    assert column(by_distance, "coreset_gain").sum() == pytest.approx((100 - distances).sum(), rel=1e-6)


def test_bad_input(on_ray: Any) -> None:
    ds = data()
    for call, error, words in (
        (lambda: on_ray.ccs(ds, 5, column="x"), ValueError, "column must be one of the columns embedding, score, kind, label, got 'x'"),
        (lambda: on_ray.ccs(ds, 5, groups="x"), ValueError, "groups must be one of the columns"),
        (lambda: on_ray.ccs(X, 5), TypeError, "ds must be a ray.data.Dataset, got ndarray"),
        (lambda: on_ray.ccs(ds, 0), ValueError, "k must be >= 1, got 0"),
        (lambda: on_ray.sketch(ds, 0), ValueError, "dim must be >= 1, got 0"),
        (lambda: on_ray.sketch(ds, 2, kind="x"), ValueError, "unknown kind 'x'"),
        (lambda: on_ray.sketch(ds, 2, actors=0), ValueError, "actors must be >= 1, got 0"),
        (lambda: on_ray.simcore(ds, X, N + 1), ValueError, "k must be <= the 240 rows of ds, got 241"),
        (lambda: on_ray.facility_location(ds, 5, metric="l1"), ValueError, "offset must be given with metric 'l1'"),
        (lambda: on_ray.facility_location(ds, 5, offset=1.0), ValueError, "offset must be None with metric 'cosine'"),
        (lambda: on_ray.facility_location(ds, N + 1), ValueError, "k must be <= the 240 rows of ds"),
        (lambda: on_ray.facility_location(ds, 5, metric="x"), ValueError, "unknown metric 'x'"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()


def test_errors_of_workers_come_back(on_ray: Any) -> None:
    broken = X.copy()
    broken[7, 2] = np.nan
    ds = ray.data.from_arrow(
        pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(broken.ravel()), D)})
    )
    with pytest.raises(Exception, match="x must be finite, got NaN at row 7, column 2"):
        on_ray.facility_location(ds, 5)
