"""The controls against brute force in float64, on every backend, and everything a caller can get wrong."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE
from conftest import BACKENDS
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import flashcoreset as fc
from flashcoreset import cli
from flashcoreset._core import native

METRICS = ("euclidean", "sqeuclidean", "l1", "cosine")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Relative to the largest distance or similarity; the worst seen is 9e-8 and 3.5e-16.
TOLERANCE = {torch.float32: 5e-7, torch.float64: 2e-15}


@pytest.fixture(params=[*BACKENDS, "cuda", "triton"])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend of pairwise: the compiled one in each build, CUDA by the emulator, Triton by its interpreter."""
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setattr(native, "_loaded", native.load_isa(isa))
    elif name == "cuda":
        request.getfixturevalue("emulated_cuda")
    return name


def place(x: Tensor, backend: str) -> Tensor:
    return x.to(DEVICE) if backend in ("cuda", "triton") else x


def points(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, d, generator=generator, dtype=torch.float64) * 3
    x = centres[torch.randint(0, 5, (n,), generator=generator)]
    return (x + torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype)


def unit(x: np.ndarray) -> np.ndarray:
    x = x / np.maximum(np.abs(x).max(1, keepdims=True), 1e-300)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)


def similar(x: Any, y: Any, metric: str) -> np.ndarray:
    """[n, m] in float64: similarities, or distances."""
    a, b = (np.asarray(torch.as_tensor(v).double().cpu()) for v in (x, y))
    if metric == "cosine":
        return unit(a) @ unit(b).T
    if metric == "dot":
        return a @ b.T
    difference = np.abs(a[:, None] - b[None])
    if metric == "l1":
        return difference.sum(2)
    squares = (difference**2).sum(2)
    return np.sqrt(squares) if metric == "euclidean" else squares


def distances(x: Any, y: Any, metric: str) -> np.ndarray:
    values = similar(x, y, metric)
    return np.maximum(1 - values, 0) if metric == "cosine" else values


# --- k_center ---------------------------------------------------------------------------------------


def check_traversal(x: Tensor, coreset: fc.Coreset, metric: str, fixed: list[int], tolerance: float) -> None:
    """Follows the picks: none of the other rows was farther from the picks before, but for rounding; and all that `info` says."""
    n = len(x)
    every = distances(x, x, metric)
    reach = every.max() or 1.0
    least = every[fixed].min(0) if fixed else np.full(n, np.inf)
    free = np.ones(n, dtype=bool)
    free[fixed] = False
    picks, gaps = coreset.indices.tolist(), coreset.info["pick_distances"].tolist()
    for place_, (pick, gap) in enumerate(zip(picks, gaps, strict=True)):
        assert free[pick]
        if place_ == 0 and not fixed:
            rows = x.double().cpu().numpy()
            mean = (unit(rows) if metric == "cosine" else rows).mean(0, keepdims=True)
            central = distances(x, mean, metric)[:, 0]
            assert central[pick] <= central.min() + tolerance * reach
            assert gap == np.inf
        else:
            assert gap == pytest.approx(least[pick], abs=tolerance * reach)
            assert least[free].max() <= least[pick] + tolerance * reach
        free[pick] = False
        least = np.minimum(least, every[pick])
    least[picks + fixed] = 0
    assert coreset.info["radius"] == pytest.approx(least.max(), abs=tolerance * reach)
    np.testing.assert_allclose(
        coreset.info["distances"].double().cpu(), least, rtol=0, atol=tolerance * reach
    )
    assert coreset.weights.tolist() == [1.0] * len(picks)
    assert coreset.indices.dtype == torch.int64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_k_center_follows_the_definition(any_backend: str, metric: str, dtype: torch.dtype) -> None:
    x = place(points(83, 5, 1, dtype), any_backend)
    for k, fixed in ((1, []), (9, []), (6, [80, 3]), (81, [80, 3])):
        if any_backend == "triton" and k > 9:
            continue  # the interpreter's minutes
        coreset = fc.k_center(x, k, metric=metric, preselected=fixed or None, backend=any_backend)
        out = torch.float64 if dtype == torch.float64 else torch.float32
        assert coreset.weights.dtype == coreset.info["distances"].dtype == out
        check_traversal(x, coreset, metric, fixed, TOLERANCE[out])


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (97, 1), (1025, 4), (200, 300)])
def test_k_center_sizes(backend: str, shape: tuple[int, int]) -> None:
    x = points(*shape, dtype=torch.float32)
    coreset = fc.k_center(x, min(shape[0], 40), backend=backend)
    check_traversal(x, coreset, "euclidean", [], TOLERANCE[torch.float32])


@pytest.mark.parametrize(("pool", "first", "block"), [(1, 1, 1), (5, 2, 3), (50, 64, 512), (5000, 4, 7)])
def test_bounds_change_nothing(monkeypatch: pytest.MonkeyPatch, pool: int, first: int, block: int) -> None:
    """What is skipped, and what is computed together, has no part in the picks or in a bit of the distances."""
    x = points(700, 6, 2, torch.float32)
    expected = fc.k_center(x, 60, backend="cpu")
    for name, value in (("_POOL", pool), ("_FIRST", first), ("_BLOCK", block)):
        monkeypatch.setattr(sys.modules["flashcoreset.methods.k_center"], name, value)
    got = fc.k_center(x, 60, backend="cpu", memory_budget=20_000)
    assert got.indices.tolist() == expected.indices.tolist()
    for name in ("distances", "pick_distances"):
        assert torch.equal(got.info[name], expected.info[name])
    check_traversal(x, expected, "euclidean", [], TOLERANCE[torch.float32])


def test_k_center_ties_go_to_the_lowest_index(any_backend: str) -> None:
    """Whole numbers, so that distances are exact: the sequence is the one by hand."""
    x = place(torch.tensor([[0.0], [4.0], [-4.0], [4.0], [2.0], [-2.0], [0.0]]), any_backend)
    coreset = fc.k_center(x, 7, backend=any_backend)
    # 0 is at the mean; 1, 2 and 3 are at 4; then 2; 4 and 5 at 2; then what is at 0.
    assert coreset.indices.tolist() == [0, 1, 2, 4, 5, 3, 6]
    assert coreset.info["pick_distances"].tolist() == [np.inf, 4, 4, 2, 2, 0, 0]
    grid = place(torch.tensor(list(itertools.product(range(5), repeat=2)), dtype=torch.float32), any_backend)
    every = distances(grid, grid, "l1")
    least, expected = every[12], [12]
    for _ in range(9):
        free = np.where(np.isin(np.arange(25), expected), -1, least)
        expected.append(int(free.argmax()))
        least = np.minimum(least, every[expected[-1]])
    assert fc.k_center(grid, 10, metric="l1", backend=any_backend).indices.tolist() == expected


def test_k_center_duplicates_and_zeros(backend: str) -> None:
    x = torch.ones(50, 3)
    coreset = fc.k_center(x, 50, backend=backend)
    assert coreset.indices.tolist() == list(range(50))
    assert coreset.info["radius"] == 0
    zeros = torch.zeros(9, 3)
    zeros[4] = 1
    found = fc.k_center(zeros, 2, metric="cosine", preselected=[4], backend=backend)
    assert found.indices.tolist() == [0, 1]
    assert found.info["pick_distances"].tolist() == [1, 1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
def test_k_center_of_huge_and_tiny_values(metric: str, dtype: torch.dtype, sign: int) -> None:
    """Powers of two change no pick, though squares would leave the range of the type."""
    x = points(90, 4, 3, dtype)
    power = {torch.float32: 100, torch.float64: 900}[dtype] * sign
    coreset, expected = (fc.k_center(of, 12, metric=metric) for of in (x * 2.0**power, x))
    assert coreset.indices.tolist() == expected.indices.tolist()
    if metric == "cosine":
        assert torch.equal(coreset.info["distances"], expected.info["distances"])
    elif metric != "sqeuclidean":
        assert torch.equal(coreset.info["distances"], expected.info["distances"] * 2.0**power)


def test_k_center_takes_arrays_and_views(tmp_path: Path) -> None:
    x = points(60, 4, dtype=torch.float32)
    expected = fc.k_center(x, 7).indices.tolist()
    np.save(tmp_path / "x.npy", x.numpy())
    wide = torch.zeros(120, 8)[::2, 1::2].copy_(x)
    for view in (x.numpy(), np.load(tmp_path / "x.npy", mmap_mode="r"), wide, x.T.contiguous().T):
        assert fc.k_center(view, 7).indices.tolist() == expected
    assert fc.k_center(x, 7, preselected=np.array([2])).indices.tolist() == fc.k_center(
        x, 7, preselected=torch.tensor([2])
    ).indices.tolist()  # fmt: skip


def test_k_center_does_not_depend_on_threads() -> None:
    x = points(3000, 8, 5, torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(fc.k_center(x, 50))
    finally:
        torch.set_num_threads(before)
    assert found[0].indices.tolist() == found[1].indices.tolist()
    assert torch.equal(found[0].info["distances"], found[1].info["distances"])


def test_k_center_progress() -> None:
    told: list[tuple[int, int]] = []
    fc.k_center(points(20, 2), 3, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


X = torch.eye(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((X, 5), {}), ValueError, "k must be <= the 4 rows of x, got 5"),
        (((X, 4), {"preselected": [1]}), ValueError, "k must be <= the 3 rows of x beside the 1 preselected ones, got 4"),
        (((X, 0), {}), ValueError, "k must be >= 1, got 0"),
        (((X, 2.0), {}), TypeError, "k must be an int, got 2.0"),
        (((X, 1), {"metric": "dot"}), ValueError, "unknown metric 'dot'; valid names: euclidean, sqeuclidean"),
        (((X, 1), {"preselected": [4]}), ValueError, r"preselected must be in \[0, 4\), got 4"),
        (((X, 1), {"preselected": [2, 2]}), ValueError, "preselected must be distinct, got 2 more than once"),
        (((X, 1), {"preselected": [0.5]}), TypeError, "preselected must hold integers"),
        (((X, 1), {"backend": "fast"}), ValueError, "unknown backend 'fast'"),
        (((X, 1), {"memory_budget": 0}), ValueError, "memory_budget must be >= 1, got 0"),
        (((X, 1), {"progress": 3}), TypeError, "progress must be None, True or a callable"),
        (((X[0], 1), {}), ValueError, "x must have 2 dimensions"),
        (((X * torch.nan, 1), {}), ValueError, "x must be finite, got NaN at row 0, column 0"),
        (((X / 0, 1), {}), ValueError, "x must be finite, got inf at row 0, column 0"),
        ((("abc", 1), {}), TypeError, "x must be a torch.Tensor"),
    ],
)  # fmt: skip
def test_bad_calls_of_k_center(arguments: Any, error: type[Exception], message: str) -> None:
    (positional, keywords) = arguments
    with pytest.raises(error, match=message):
        fc.k_center(*positional, **keywords)


# --- nearest ----------------------------------------------------------------------------------------


def check_nearest(x: Tensor, target: Tensor, coreset: fc.Coreset, metric: str, tolerance: float) -> None:
    values = similar(x, target, metric)
    goal = values if metric in ("cosine", "dot") else -values
    best, reach = goal.max(1), np.abs(values).max() or 1.0
    picks = coreset.indices.tolist()
    assert len(set(picks)) == len(picks)
    assert (np.diff(best[picks]) <= tolerance * reach).all()
    others = np.setdiff1d(np.arange(len(x)), picks)
    if len(others):
        assert best[others].max() <= best[picks].min() + tolerance * reach
    expected = values[picks, coreset.info["targets"].tolist()]
    np.testing.assert_allclose(np.abs(expected), np.abs(best[picks]), rtol=0, atol=tolerance * reach)
    np.testing.assert_allclose(
        coreset.info["values"].double().cpu(), expected, rtol=0, atol=tolerance * reach
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean", "sqeuclidean", "l1"])
def test_nearest_follows_the_definition(any_backend: str, metric: str, dtype: torch.dtype) -> None:
    x, target = (place(points(n, 5, n, dtype), any_backend) for n in (83, 19))
    out = torch.float64 if dtype == torch.float64 else torch.float32
    for k, budget in ((7, 2**28), (83, 20_000)):
        coreset = fc.nearest(x, target, k, metric=metric, memory_budget=budget, backend=any_backend)
        check_nearest(x, target, coreset, metric, TOLERANCE[out])
        assert coreset.weights.tolist() == [1.0] * k
        assert coreset.info["values"].dtype == out


def test_nearest_ties_go_to_the_lowest_index(any_backend: str) -> None:
    x = place(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]), any_backend)
    target = place(torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), any_backend)
    coreset = fc.nearest(x, target, 5, backend=any_backend)
    assert coreset.indices.tolist() == [0, 1, 2, 3, 4]
    assert coreset.info["targets"].tolist() == [1, 0, 1, 0, 0]
    assert fc.nearest(x, target, 3, metric="l1", backend=any_backend).indices.tolist() == [1, 3, 2]


@pytest.mark.parametrize("metric", ["dot", "euclidean", "l1"])
@pytest.mark.parametrize("powers", [(100, 90), (-100, -90), (100, -100), (-100, 20)])
def test_nearest_of_huge_and_tiny_values(metric: str, powers: tuple[int, int]) -> None:
    x, target = points(80, 4, 1).float() * 2.0 ** powers[0], points(9, 4, 2).float() * 2.0 ** powers[1]
    if metric == "dot" and sum(powers) > 120:
        with pytest.raises(ValueError, match=r"openset: its dot values beside target overflow torch.float32"):
            fc.nearest(x, target, 5, metric=metric)
        return
    got = fc.nearest(x, target, 20, metric=metric)
    wide = fc.nearest(x.double(), target.double(), 20, metric=metric)
    assert got.info["values"].tolist() == pytest.approx(wide.info["values"].tolist(), rel=1e-5)
    if abs(powers[0] - powers[1]) < 50:  # else all distances are the same but for rounding
        assert got.indices.tolist() == wide.indices.tolist()


def test_nearest_reads_batches() -> None:
    x, target = points(500, 6, 1).float(), points(30, 6, 2).float()
    expected = fc.nearest(x, target, 25)

    def batches() -> Iterator[Tensor]:
        yield from x.split(77)

    sources: list[Any] = [list(x.split(64)), DataLoader(TensorDataset(x), batch_size=50), batches, batches()]
    for source in [*sources, x.numpy()]:
        got = fc.nearest(source, target, 25, memory_budget=30_000)
        assert got.indices.tolist() == expected.indices.tolist()
        assert torch.equal(got.info["values"], expected.info["values"])
        assert got.info["targets"].tolist() == expected.info["targets"].tolist()


T = torch.eye(4)[:2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((X, T, 5), {}), ValueError, "k must be <= the 4 rows of openset, got 5"),
        ((([X, X], T, 9), {}), ValueError, "k must be <= the 8 rows of openset, got 9"),
        (((X, T, 0), {}), ValueError, "k must be >= 1, got 0"),
        (
            ((X, T[:, :3], 1), {}),
            ValueError,
            r"target must have 4 columns as openset has, got shape \(2, 3\)",
        ),
        ((([X], T, 1), {"metric": "l1"}), ValueError, "metric must be 'cosine' for an openset in batches"),
        (((X, T, 1), {"metric": "cos"}), ValueError, "unknown metric 'cos'"),
        (((X, T * torch.nan, 1), {}), ValueError, "target must be finite, got NaN at row 0, column 0"),
        (((X * torch.nan, T, 1), {}), ValueError, "openset must be finite, got NaN at row 0, column 0"),
        (
            (([X, X * torch.nan], T, 1), {}),
            ValueError,
            "openset from row 4 on must be finite, got NaN at row 0",
        ),
        (((X, T, 1), {"memory_budget": -1}), ValueError, "memory_budget must be >= 1, got -1"),
        (((3, T, 1), {}), TypeError, "openset must be a matrix"),
        ((([X], T, 1), {"backend": "gpu"}), ValueError, "unknown backend 'gpu'"),
    ],
)
def test_bad_calls_of_nearest(arguments: Any, error: type[Exception], message: str) -> None:
    positional, keywords = arguments
    with pytest.raises(error, match=message):
        fc.nearest(*positional, **keywords)


# --- random_subset ------------------------------------------------------------------------------------


def test_random_subset_is_uniform() -> None:
    drawn = np.zeros(12)
    pairs = np.zeros((12, 12))
    for seed in range(4000):
        picks = fc.random_subset(12, 4, seed=seed).indices.numpy()
        assert (np.diff(picks) > 0).all()
        drawn[picks] += 1
        pairs[np.ix_(picks, picks)] += 1
    # 4,000 draws of probability 1/3: a deviation of 30; of pairs 1/11: of 18. Five of them.
    assert np.abs(drawn - 4000 / 3).max() < 150
    off = pairs[~np.eye(12, dtype=bool)]
    assert np.abs(off - 4000 / 11).max() < 91


def test_random_subset_is_ccs_with_one_stratum() -> None:
    scores = np.random.default_rng(0).standard_normal(200)
    aum = np.random.default_rng(1).standard_normal(200)
    labels = np.arange(200) % 3
    for options in (
        {},
        {"groups": labels},
        {"mislabel_scores": aum, "mislabel_ratio": 0.3},
        {"mislabel_scores": aum, "mislabel_ratio": 0.3, "groups": labels},
    ):
        got = fc.random_subset(200, 40, seed=7, **options)
        expected = fc.ccs(scores, 40, n_strata=1, seed=7, **options)
        assert got.indices.tolist() == expected.indices.tolist()
        assert got.info["dropped"] == (0 if "mislabel_ratio" not in options else expected.info["dropped"])
        if "mislabel_ratio" in options:
            assert aum[got.indices].min() >= np.quantile(aum, 0.2)
        if "groups" in options:
            counts = {int(label): int((labels[got.indices] == label).sum()) for label in range(3)}
            assert got.info["counts"] == counts


def test_random_subset_of_all() -> None:
    coreset = fc.random_subset(5, 5)
    assert coreset.indices.tolist() == [0, 1, 2, 3, 4]
    assert coreset.weights.tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((5, 6), {}), ValueError, "k must be <= the 5 samples, got 6"),
        (((0, 1), {}), ValueError, "n must be >= 1, got 0"),
        (((5.0, 1), {}), TypeError, "n must be an int, got 5.0"),
        (((5, 1), {"groups": [0, 1]}), ValueError, r"groups must have shape \[5\], got \(2,\)"),
        (((5, 1), {"seed": -1}), ValueError, "seed must be in"),
        (((5, 1), {"mislabel_ratio": 0.5}), ValueError, "mislabel_scores must be given"),
        (
            ((5, 4), {"mislabel_scores": [1.0, 2, 3, 4, 5], "mislabel_ratio": 0.5}),
            ValueError,
            "k must be <= the 3",
        ),
    ],
)
def test_bad_calls_of_random_subset(arguments: Any, error: type[Exception], message: str) -> None:
    positional, keywords = arguments
    with pytest.raises(error, match=message):
        fc.random_subset(*positional, **keywords)


# --- memory -------------------------------------------------------------------------------------------


def test_memory_estimates() -> None:
    assert fc.memory_estimate(fc.k_center, (100_000, 128), 1000) < 2**28
    assert fc.memory_estimate(fc.k_center, (100_000, 128), 1000, memory_budget=2**20) < 2**26
    assert fc.memory_estimate(fc.k_center, (10**6, 8), 10, preselected=(500,), dtype="float64") < 10**6 * 250
    assert fc.memory_estimate(fc.nearest, (10**6, 64), (1000, 64), 50, memory_budget=2**24) < 2**26
    assert fc.memory_estimate(fc.random_subset, 10**6, 50) < 10**6 * 60
    for arguments, options, error, message in (
        ((fc.k_center, (9, 3), 10), {}, ValueError, "k must be <= the 9 rows of x, got 10"),
        ((fc.k_center, (9, 3)), {"metric": "dot"}, ValueError, "unknown metric 'dot'"),
        ((fc.nearest, (9, 3), (2, 4)), {}, ValueError, r"target must have 3 columns as openset has"),
        ((fc.nearest, (9, 3), (2, 3), 10), {}, ValueError, "k must be <= the 9 rows of openset"),
        ((fc.random_subset, 9, 10), {}, ValueError, "k must be <= the 9 samples"),
        ((fc.random_subset, 0), {}, ValueError, "n must be >= 1"),
    ):
        with pytest.raises(error, match=message):
            fc.memory_estimate(*arguments, **options)


# --- the command line ---------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = points(50, 4, dtype=torch.float32).numpy()
    for name, array in (("x", x), ("t", x[:5]), ("fixed", np.array([3, 4])), ("labels", np.arange(50) % 2)):
        np.save(tmp_path / f"{name}.npy", array)

    def select(*arguments: object) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        out = tmp_path / "out.npz"
        assert cli.main(["select", *map(str, arguments), "-o", str(out), "--force"]) == 0
        with np.load(out) as read:
            arrays = dict(read)
        return arrays, json.loads(str(arrays.pop("info")))

    features, target = ("--features", tmp_path / "x.npy"), ("--target", tmp_path / "t.npy")
    arrays, info = select(
        "k-center", *features, "-k", 6, "--metric", "l1", "--preselected", tmp_path / "fixed.npy"
    )
    expected = fc.k_center(x, 6, metric="l1", preselected=[3, 4])
    np.testing.assert_array_equal(arrays["indices"], expected.indices)
    np.testing.assert_array_equal(arrays["distances"], expected.info["distances"])
    assert (info["radius"], info["rows"]) == (expected.info["radius"], 50)

    arrays, info = select("nearest", *features, *target, "-k", 6, "--metric", "euclidean")
    expected = fc.nearest(x, x[:5], 6, metric="euclidean")
    np.testing.assert_array_equal(arrays["indices"], expected.indices)
    np.testing.assert_array_equal(arrays["targets"], expected.info["targets"])

    arrays, info = select(
        "random-subset", "-n", 50, "-k", 6, "--seed", 4, "--groups", tmp_path / "labels.npy"
    )
    expected = fc.random_subset(50, 6, seed=4, groups=np.arange(50) % 2)
    np.testing.assert_array_equal(arrays["indices"], expected.indices)
    assert info["counts"] == {"0": 3, "1": 3}

    capsys.readouterr()
    assert (
        cli.main(["select", "k-center", *map(str, features), "-k", "60", "-o", str(tmp_path / "o.npz")]) == 2
    )
    assert "k must be <= the 50 rows of x, got 60" in capsys.readouterr().err
