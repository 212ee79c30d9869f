"""Columns and frames of pandas, polars, pyarrow, `datasets`, h5py and zarr, and rows of files, in every argument of every public function
that holds one entry per item: the same results as from tensors of the same numbers."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcoreset as fc

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")
pyarrow = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")


def whole(*shape: int, seed: int = 0, high: int = 90) -> Tensor:
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(seed))


X, Y, W = whole(12, 3).double(), whole(9, 3, seed=1).double(), whole(12, seed=2).double()
LABELS, TARGETS = torch.arange(12) % 2, torch.arange(12) % 3
PLACES = torch.tensor([3, 1])


def dynamics(indices: Any, logits: Any, targets: Any) -> dict[str, Tensor]:
    found = fc.TrainingDynamics(12)
    found.update(indices, logits, targets, epoch=0)
    return found.scores()


# By name: a call, and its arguments of one entry per item, in double precision or as integers.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "facility_location": (
        lambda x, **more: fc.facility_location(x, 4, metric="l1", **more),
        {"x": X, "clients": Y, "weights": W[:9], "groups": LABELS, "preselected": PLACES},
    ),
    "facility_location with costs": (
        lambda x, **more: fc.facility_location(x, 4, metric="l1", cost_budget=200.0, **more),
        {"x": X, "costs": W, "exclude": PLACES},
    ),
    "k_center": (lambda x, preselected: fc.k_center(x, 3, preselected=preselected), {"x": X, "preselected": PLACES}),
    "nearest": (lambda openset, target: fc.nearest(openset, target, 3), {"openset": X, "target": Y}),
    "coverage_auc": (lambda **given: fc.coverage_auc(**given), {"x": X, "indices": PLACES, "test": Y}),
    "simcore": (lambda openset, target: fc.simcore(openset, target, 4, n_clusters=2), {"openset": X, "target": Y}),
    "simcore centroids": (lambda openset, centroids: fc.simcore(openset, centroids=centroids, k=4), {"openset": X, "centroids": Y}),
    "ccs": (
        lambda scores, **more: fc.ccs(scores, 4, n_strata=2, mislabel_ratio=0.2, **more),
        {"scores": W, "mislabel_scores": W, "groups": LABELS},
    ),
    "top_scores": (lambda scores, groups: fc.top_scores(scores, 4, groups=groups), {"scores": W, "groups": LABELS}),
    "random_subset": (lambda **given: fc.random_subset(12, 4, mislabel_ratio=0.1, **given), {"groups": LABELS, "mislabel_scores": W}),
    "tune_ccs": (lambda scores, **more: fc.tune_ccs(scores, 4, lambda rows: 1.0, (0, 0.2), n_strata=2, **more), {"scores": W, "mislabel_scores": W, "groups": LABELS}),
    "goracs": (
        lambda train, valid, grad_norms, **labels: fc.goracs(train, valid, grad_norms, 4, lam=0.1, max_exchanges=2, **labels),
        {"train": X, "valid": Y, "grad_norms": W, "train_labels": LABELS, "valid_labels": LABELS[:9]},
    ),
    "autocoreset": (
        lambda x, y, groups: fc.autocoreset(x, y, "linear_regression", None, 8, groups=groups),
        {"x": X, "y": W, "groups": LABELS},
    ),
    "match_gradients": (lambda g, groups: fc.match_gradients(g, 4, groups=groups), {"g": X, "groups": LABELS}),
    "CoLM": (lambda grads, groups: fc.CoLM(6, top=2, keep_groups=[1]).select(grads, groups), {"grads": X, "groups": LABELS}),
    "LowRankGradients": (lambda coefficients: fc.LowRankGradients(coefficients, 0, 9).dense(), {"coefficients": X}),
    "AdamState": (lambda m, v: fc.AdamState(m, v, 1), {"m": W, "v": W}),
    "caratheodory": (lambda x, weights: fc.caratheodory(x, weights), {"x": X, "weights": W}),
    "sketch": (lambda x: fc.sketch(x, 2), {"x": X}),
    "sample_scores": (lambda logits, targets: fc.sample_scores(logits, targets), {"logits": X, "targets": TARGETS}),
    "TrainingDynamics": (dynamics, {"indices": torch.arange(12), "logits": X, "targets": TARGETS}),
    "sinkhorn": (
        lambda x, y, a, b: fc.sinkhorn(x, y, a, b, reg=500.0, max_iter=20, tol=0),
        {"x": X, "y": Y, "a": W / W.sum(), "b": W[:9] / W[:9].sum()},
    ),
    "sinkhorn_divergence": (lambda x, y: fc.sinkhorn_divergence(x, y, reg=500.0, max_iter=9, tol=0), {"x": X, "y": Y}),
    "Transport.apply": (lambda v: fc.sinkhorn(Y, X, reg=500.0, max_iter=9, tol=0).apply(v), {"v": W}),
    "allocate_budgets": (lambda sizes: fc.allocate_budgets(sizes, 9), {"sizes": LABELS + 3}),
}  # fmt: skip


def arrow_lists(value: Tensor, kind: Any) -> Any:
    column = pyarrow.array(value.tolist(), kind)
    return pyarrow.chunked_array([column[:5], column[5:]])


def dataset_column(value: Tensor) -> Any:
    kind = "int64" if value.dtype == torch.int64 else "float64"
    feature = datasets.Value(kind) if value.dim() == 1 else datasets.List(datasets.Value(kind))
    return datasets.Dataset.from_dict({"c": value.tolist()}, features=datasets.Features({"c": feature}))["c"]


def in_file(value: Tensor) -> Any:
    file = h5py.File(f"{next(_NUMBERS)}.h5", "w", driver="core", backing_store=False)
    return file.create_dataset("x", data=value.numpy())


_NUMBERS = itertools.count()

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "pandas": lambda t: pandas.DataFrame(t.numpy()) if t.dim() == 2 else pandas.Series(t.numpy(), index=range(50, 50 + len(t))),
    "pandas nullable": lambda t: pandas.DataFrame(t.numpy()).astype("Float64") if t.dim() == 2 else pandas.Series(t.numpy()).astype("Int64" if t.dtype == torch.int64 else "Float64"),
    "pandas lists": lambda t: pandas.Series(list(t.numpy())),
    "polars": lambda t: polars.DataFrame(t.numpy()) if t.dim() == 2 else polars.Series(t.numpy()),
    "polars lists": lambda t: polars.Series(t.tolist()),
    "pyarrow": lambda t: pyarrow.table({str(i): t.numpy()[:, i] for i in range(t.shape[1])}) if t.dim() == 2 else pyarrow.array(t.numpy()),
    "pyarrow lists": lambda t: arrow_lists(t, pyarrow.list_(pyarrow.float64())) if t.dim() == 2 else pyarrow.chunked_array([t.numpy()]),
    "pyarrow fixed lists": lambda t: arrow_lists(t, pyarrow.list_(pyarrow.float64(), t.shape[1])) if t.dim() == 2 else pyarrow.array(t.numpy()),
    "datasets": dataset_column,
    "h5py": in_file,
    "zarr": lambda t: zarr.array(t.numpy()),
    "open_rows": lambda t: fc.open_rows(t.numpy()),
}  # fmt: skip


def parts(value: Any) -> list[Any]:
    """What has to be equal in two results, but for times."""
    if isinstance(value, dict):
        return [part for key, entry in value.items() if key != "seconds" for part in (key, *parts(entry))]
    if isinstance(value, (list, tuple)):
        return [part for entry in value for part in parts(entry)]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, fc.Transport):
        return [part for name in value.__dataclass_fields__ for part in parts(getattr(value, name))]
    if isinstance(value, fc.Transport):
        return parts([value.f, value.g, value.value])
    return [value]


EXPECTED: dict[str, Any] = {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_takes_every_kind(name: str, kind: str) -> None:
    call, arguments = CALLS[name]
    if name not in EXPECTED:
        EXPECTED[name] = parts(call(**arguments))
    found = parts(call(**{key: KINDS[kind](value) for key, value in arguments.items()}))
    assert len(found) == len(EXPECTED[name])
    for one, other in zip(found, EXPECTED[name], strict=True):
        if isinstance(other, Tensor):
            assert one.dtype == other.dtype
            # Models are given frames as they are, whose columns lie apart, and sum in another order.
            same = torch.allclose if name == "autocoreset" else torch.equal
            assert same(one, other)
        else:
            assert one == (
                pytest.approx(other) if isinstance(other, float) and name == "autocoreset" else other
            )


# --- labels -------------------------------------------------------------------------------------------

WORDS = ["sea" if code else "air" for code in LABELS.tolist()]
STRINGS: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "numpy": np.array,
    "pandas": pandas.Series,
    "categorical": lambda words: pandas.Series(words, dtype="category"),
    "polars": polars.Series,
    "polars categorical": lambda words: polars.Series(words, dtype=polars.Categorical),
    "pyarrow": pyarrow.array,
    "pyarrow dictionary": lambda words: pyarrow.chunked_array([pyarrow.array(words).dictionary_encode()]),
    "datasets": lambda words: datasets.Dataset.from_dict({"c": words})["c"],
}  # fmt: skip
BY_LABEL = ("groups", "budgets", "classes", "threshold", "counts")


@pytest.mark.parametrize("kind", STRINGS)
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (_, given) in CALLS.items()
        if {"groups", "train_labels"} & set(given) and name != "CoLM"
    ],
)
def test_labels_of_every_kind_come_back(name: str, kind: str) -> None:
    """Labels count as their places in sorted order, and results are by label."""
    call, arguments = CALLS[name]
    words = {
        key: STRINGS[kind](WORDS[: len(value)])
        for key, value in arguments.items()
        if key in ("groups", "train_labels", "valid_labels")
    }
    found, expected = call(**(arguments | words)), call(**arguments)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.weights, expected.weights)
    keys = [key for key in BY_LABEL if isinstance(getattr(expected, "info", {}).get(key), dict)]
    if name not in ("facility_location", "match_gradients"):
        assert keys
    for key in keys:
        assert list(found.info[key]) == ["air", "sea"]
        assert parts(list(found.info[key].values())) == parts(list(expected.info[key].values()))


@pytest.mark.parametrize("kind", STRINGS)
def test_labels_of_colm(kind: str) -> None:
    found = fc.CoLM(8, top=2, keep_groups=["sea"]).select(X, STRINGS[kind](WORDS))
    expected = fc.CoLM(8, top=2, keep_groups=[1]).select(X, LABELS)
    assert torch.equal(found.indices, expected.indices)
    assert (found.info["kept"], found.info["budgets"], found.info["unseen"]) == (6, {"air": 2}, [])
    other = fc.CoLM(8, top=2, keep_groups=["moon", "sea"])
    assert other.select(X, STRINGS[kind](WORDS)).info["unseen"] == ["moon"]
    # By label, whatever labels the next batch has.
    assert other.select(X[:6], STRINGS[kind](["moon"] * 5 + ["zoo"])).info["kept"] == 5
    assert other.select(X, STRINGS[kind](WORDS)).info["unseen"] == []
    with pytest.raises(
        TypeError, match=r"keep_groups must be labels as groups has them, got \['moon', 'sea'\]"
    ):
        other.select(X, LABELS)
    with pytest.raises(TypeError, match="keep_groups must be labels as groups has them, got"):
        fc.CoLM(8, top=2, keep_groups=[1]).select(X, STRINGS[kind](WORDS))


def test_other_labels() -> None:
    dates = pandas.Series(pandas.to_datetime(["2024-05-01", "2023-01-01"] * 6))
    flags, pairs = [True, False] * 6, [("b", 1), ("a", 2)] * 6
    for labels in (dates, flags, np.array(flags), torch.tensor(flags), pandas.Series(flags), pairs):
        found = fc.top_scores(W, 4, groups=labels).info["threshold"]
        assert list(found.values()) == list(fc.top_scores(W, 4, groups=[1, 0] * 6).info["threshold"].values())
    assert list(fc.top_scores(W, 4, groups=pairs).info["threshold"]) == [("a", 2), ("b", 1)]
    assert list(fc.top_scores(W, 4, groups=flags).info["threshold"]) == [False, True]
    picks = fc.facility_location(X, None, metric="l1", groups=flags, budgets={True: 2, False: 1})
    assert (picks.indices % 2).tolist() == [1, 0, 0]
    dates[3] = None
    with pytest.raises(
        ValueError, match="groups must have a label for every item, got a missing date at position 3"
    ):
        fc.top_scores(W, 4, groups=dates)
    with pytest.raises(
        TypeError,
        match="groups must hold labels that can be sorted, such as strings, and none that are missing",
    ):
        fc.top_scores(W, 4, groups=pandas.Series([*WORDS[:11], None]))
    with pytest.raises(
        TypeError,
        match="train_labels and valid_labels must hold labels of one kind, got integers in train_labels, other",
    ):
        fc.goracs(X, Y, k=2, train_labels=LABELS, valid_labels=WORDS[:9])
    with pytest.raises(
        ValueError, match="train_labels must hold every class of valid_labels, got none of class 'moon'"
    ):
        fc.goracs(X, Y, k=2, train_labels=WORDS, valid_labels=[*WORDS[:8], "moon"])
    with pytest.raises(ValueError, match=r"groups must have shape \[12\], got \(11,\)"):
        fc.ccs(W, 4, groups=WORDS[:11], mislabel_ratio=0)


# --- what is not taken --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (pandas.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}), r"x must hold numbers, got a DataFrame with strings"),
        (polars.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}), r"x must hold numbers, got a DataFrame with strings"),
        (pyarrow.table({"a": [1.0, 2.0], "b": ["x", "y"]}), "x must hold numbers, got a Table with strings"),
        (polars.LazyFrame({"a": [1.0]}), r"got LazyFrame; pass x\.collect\(\)"),
        (datasets.Dataset.from_dict({"a": [[1.0]]}), r"got Dataset; pass its column, as x\['name'\], or fc\.open_rows\(x, 'name'\)"),
        (datasets.DatasetDict(), r"got DatasetDict; choose a split and its column, as x\['train'\]\['name'\]"),
        (pyarrow.array([[1.0], None]), r"x must have a list in every row, got 1 missing ones"),
        (pyarrow.array([[1.0], [1.0, 2.0]]), "x must have lists of equal length, got a ListArray with others"),
        (polars.Series([[1.0], [1.0, 2.0]]), "x must have lists of equal length, got a Series with others"),
        (pandas.DataFrame({"a": pandas.array([1, None], dtype="Int8")}), "missing|NA"),
        (open, "got builtin_function_or_method"),
    ],
    ids=["pandas", "polars", "pyarrow", "lazy", "dataset", "splits", "missing list", "ragged", "ragged polars", "nullable", "function"],
)  # fmt: skip
def test_what_is_not_taken_says_how_to_convert_it(value: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        fc.sketch(value, 2)


# --- rows of files ------------------------------------------------------------------------------------


def test_simcore_streams_rows_of_files(tmp_path: Path) -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "a.npy", x[:200].numpy())
    np.save(tmp_path / "b.npy", x[200:].numpy())
    expected = fc.simcore(x, x[:9], 40, n_clusters=3)
    for source in (str(tmp_path / "x.npy"), [tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "[ab]*.npy"):
        rows = fc.open_rows(source)
        assert rows.shape == (500, 6)
        for read in (rows, rows.batches(64), list(rows.batches(64))):
            assert torch.equal(fc.simcore(read, x[:9], 40, n_clusters=3).indices, expected.indices)
        assert torch.equal(fc.nearest(rows, x[:9], 7).indices, fc.nearest(x, x[:9], 7).indices)


def test_datasets_are_read_by_column() -> None:
    data = datasets.Dataset.from_dict({"e": X.tolist(), "w": W.tolist(), "name": WORDS})
    data = data.select(range(11, -1, -1))  # with an order of its own
    rows = fc.open_rows(data, "e")
    np.testing.assert_array_equal(rows[...], X.flip(0).numpy())
    np.testing.assert_array_equal(rows[3:5], X.flip(0)[3:5].numpy())
    np.testing.assert_array_equal(fc.open_rows(data, "w")[...], W.flip(0).numpy())
    assert fc.open_rows(data, "name")[...].tolist() == WORDS[::-1]
    for column, words in (
        ("x", "no column 'x' in the dataset"),
        (None, "the dataset has the columns e, w, name"),
    ):
        with pytest.raises(ValueError, match=words):
            fc.open_rows(data, column)
    with pytest.raises(TypeError, match="choose a split"):
        fc.open_rows(datasets.DatasetDict({"train": data}), "e")


def test_open_rows_refuses(tmp_path: Path) -> None:
    for source, error, words in (
        (
            5,
            TypeError,
            "source must be a file's name or names, a datasets.Dataset, or an array or column, got int",
        ),
        (np.float32(1), TypeError, "got float32"),
        (str(tmp_path / "x.txt"), ValueError, "must be a file of one of the formats .npy, .npz"),
        (str(tmp_path / "x.npy"), ValueError, "no such file"),
        (str(tmp_path), ValueError, "must be a file of one of the formats"),
    ):
        with pytest.raises(error, match=words):
            fc.open_rows(source)
    rows = fc.open_rows(X.numpy())
    with pytest.raises(TypeError, match=r"iterate over rows\.batches\(\)"):
        iter(rows)
    with pytest.raises(IndexError, match=r"rows must be in \[0, 12\), got 3 to 12"):
        rows[[3, 12]]
    with pytest.raises(ValueError, match="rows must be >= 1, got 0"):
        rows.batches(0)
    with pytest.raises(ValueError, match="depth must be >= 0, got -1"):
        rows.batches(2, prefetch=-1)


def test_read_ahead() -> None:
    made: list[int] = []

    def numbers(fail: bool = False) -> Any:
        for i in range(100):
            made.append(i)
            if fail and i == 3:
                raise RuntimeError("of the source")
            yield i

    for depth in (0, 1, 5):
        assert list(fc.read_ahead(numbers(), depth)) == list(range(100))
    ahead = fc.read_ahead(numbers(fail=True), 2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="of the source"):
        next(ahead)
    made.clear()
    ahead = fc.read_ahead(numbers(), 2)
    next(ahead)
    ahead.close()  # ends the thread, which does not read on
    assert len(made) <= 6
    for value, error in ((True, TypeError), (1.5, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="depth must be"):
            fc.read_ahead([], value)
    with pytest.raises(TypeError, match="batches must be an iterable, got int"):
        fc.read_ahead(5)


def test_a_column_of_parquet_is_in_memory_once(tmp_path: Path) -> None:
    """NumPy's memory, as tracemalloc counts it, and that of Arrow."""
    parquet = pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).standard_normal((1_000_000, 8)).astype(np.float32)
    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.ravel()), 8)
    parquet.write_table(pyarrow.table({"x": lists}), tmp_path / "x.parquet")
    rows = fc.open_rows(tmp_path / "x.parquet", "x")
    most = 0
    total = pyarrow.total_allocated_bytes
    matrix = rows._reader._matrix

    def watched(table: Any) -> np.ndarray:
        nonlocal most
        most = max(most, total())
        return matrix(table)

    rows._reader._matrix = watched
    before = total()
    tracemalloc.start()
    try:
        found = rows[...]
        own = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, x)
    assert own <= 1.05 * x.nbytes
    # Batches, and what Parquet holds of one row group: about 10 MB, whatever the number of rows.
    assert most - before <= x.nbytes / 2
