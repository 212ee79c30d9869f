"""What comes back: results pickle, copy and save without a change, and a choice is applied to whatever holds the data."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import flashcoreset as fc

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
NAMES = [["sea", "air", "land"][i % 3] for i in range(30)]


def dynamics() -> fc.TrainingDynamics:
    found = fc.TrainingDynamics(30, el2n_epochs=1)
    for epoch in range(2):
        found.update(torch.arange(30), X * (-1) ** epoch, torch.arange(30) % 4, epoch)
    return found


def transport() -> fc.Transport:
    return fc.sinkhorn(X.clone().requires_grad_(), X[:7] + 1, reg=0.5)


RESULTS: dict[str, Callable[[], Any]] = {
    "Selection": lambda: fc.facility_location(X, 5, metric="l1", groups=NAMES),
    "Selection of gradients": lambda: fc.match_gradients(
        X, 4, top=2, normalize=fc.AdamState(torch.zeros(4), torch.zeros(4), 1)
    ),
    "Coreset of simcore": lambda: fc.simcore(X, X[:3], 6, n_clusters=2),
    "Coreset of ccs": lambda: fc.ccs(X[:, 0], 6, n_strata=3, groups=NAMES, mislabel_ratio=0),
    "Coreset of top_scores": lambda: fc.top_scores(torch.tensor([1.0, float("inf"), 2.0]), 1),
    "Coreset of CoLM": lambda: fc.CoLM(6, top=None, keep_groups=["sea"]).select(X, NAMES),
    "Coreset of autocoreset": lambda: fc.autocoreset(X, X[:, 0], "linear_regression", None, 12),
    "Coreset of tune_ccs": lambda: fc.tune_ccs(X[:, 0], 5, lambda rows: 1.0, (0, 0.1), mislabel_scores=X[:, 1]),
    "Transport": transport,
    "Transport of batches": lambda: fc.sinkhorn(
        X.view(2, 15, 4).double(), X.view(2, 15, 4).double(), reg=0.5, x_lengths=[15, 9], reg_marginal=1.0, tol=1e-3
    ),
    "AdamState": lambda: fc.AdamState(X[0], X[1].abs(), 3),
    "RankOneAdamState": lambda: fc.RankOneAdamState(9, 0.5, 0.25, seed=3),
    "LowRankGradients": lambda: fc.LowRankGradients(X[:, :1], 5, 100),
    "SampleScores": lambda: fc.sample_scores(X, torch.arange(30) % 4),
    "TrainingDynamics": dynamics,
}  # fmt: skip


def check_equal(one: Any, other: Any) -> None:
    """Equal to the bit, in types too."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one.detach(), other)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            check_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            check_equal(left, right)
    elif isinstance(one, fc.TrainingDynamics):
        check_equal(one.state_dict(), other.state_dict())
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            check_equal(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other or (one != one and other != other)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda result: pickle.loads(pickle.dumps(result)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("way", [*COPIES, "save"])
@pytest.mark.parametrize("name", RESULTS)
def test_results_survive(name: str, way: str, tmp_path: Path) -> None:
    result = RESULTS[name]()
    if way == "save":
        result.save(tmp_path / "result")
        assert os.listdir(tmp_path) == ["result"]
        found = fc.load(tmp_path / "result")
    else:
        found = COPIES[way](result)
    check_equal(result, found)
    if isinstance(result, fc.Transport):
        check_equal(result.plan(), found.plan())
    if way == "deepcopy" and isinstance(result, (fc.Selection, fc.Coreset)):
        found.indices[0] += 1  # of a memory of its own
        assert not torch.equal(result.indices, found.indices)


def test_states_of_methods_survive() -> None:
    method = fc.CoLM(6, top=None, keep_groups=["sea"])
    method.select(X, NAMES)
    for way in COPIES.values():
        check_equal(method.select(X + 1, NAMES).indices, way(method).select(X + 1, NAMES).indices)


def test_a_copy_of_a_transport_has_no_graph() -> None:
    result = transport()
    result.value.backward()
    assert not copy.deepcopy(result).value.requires_grad
    assert result.value.requires_grad


def test_values_of_all_kinds(tmp_path: Path) -> None:
    info = {
        "none": None, "true": True, "big": 2**80, "nan": float("nan"), "minus": float("-inf"), "tuple": (1, [2.5, "a"]),
        3: "int key", (1, "b"): {"date": np.datetime64("2020-01-02")}, "half": X.half(), "brain": X.bfloat16(),
        "array": np.arange(3, dtype=np.uint8), "strings": np.array(["a", "bc"]), "number": np.float32(0.1), "a/../b": X[:1],
        "view": X.T[1:], "empty": torch.zeros(0, 3), "state": fc.RankOneAdamState(3), None: "none key",
    }  # fmt: skip
    coreset = fc.Coreset(torch.tensor([1, 0]), torch.ones(2), info)
    coreset.save(tmp_path / "a.npz")
    check_equal(coreset, fc.load(tmp_path / "a.npz"))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert archive["indices"].tolist() == [1, 0]
        assert not any(".." in entry for entry in zipfile.ZipFile(tmp_path / "a.npz").namelist())
    with pytest.raises(RuntimeError):
        fc.load(tmp_path / "a.npz", device="no device")


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("old")
    for value, words in (
        (object(), r"info\.x is a object, which save cannot write"),
        (np.array([{}], dtype=object), r"info\.x is an array of objects"),
        (torch.eye(2).to_sparse(), r"info\.x is a sparse tensor"),
        ({1, 2}, r"info\.x is a set"),
    ):
        with pytest.raises(TypeError, match=words):
            fc.Coreset(torch.tensor([0]), torch.ones(1), {"x": value}).save(path)
    with pytest.raises(FileNotFoundError):
        fc.Coreset(torch.tensor([0]), torch.ones(1)).save(tmp_path / "none" / "a.npz")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    fc.Coreset(torch.tensor([0]), torch.ones(1)).save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    document = json.loads(str(arrays["flashcoreset"]))
    changed: dict[str, dict[str, Any]] = {
        "its format is 2, and": arrays | {"flashcoreset": json.dumps(document | {"format": 2})},
        "'Nothing'": arrays | {"flashcoreset": json.dumps(document | {"result": {"kind": "Nothing", "fields": {}}})},
        "'weights'": {key: array for key, array in arrays.items() if key != "weights"},
        "holds a, b": {"a": np.ones(1), "b": np.ones(1)},
        "damaged or holds pickled": arrays | {"indices": np.array([{}], dtype=object)},
    }  # fmt: skip
    for words, entries in changed.items():
        np.savez(path, **entries)
        with pytest.raises(ValueError, match=words):
            fc.load(path)
    path.write_bytes(pickle.dumps(1))
    with pytest.raises(ValueError, match=r"which is no \.npz archive"):
        fc.load(path)
    with pytest.raises(FileNotFoundError):
        fc.load(tmp_path / "absent")


# --- take ---------------------------------------------------------------------------------------------

PICKS = [7, 2, 2, 29, 0]
CHOICE = fc.Coreset(torch.tensor(PICKS), torch.ones(5))
ARRAY = X.numpy()


class Items(Dataset):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, row: int) -> str:
        return f"item {row}"


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(30))


class Table:
    """Rows by number, in shape and slices alone."""

    shape = (30, 4)

    def __getitem__(self, row: int) -> np.ndarray:
        return ARRAY[int(row)]


def test_take_of_arrays_and_lists() -> None:
    for value in (X, X.T.contiguous().T, X[:, 0].int()):
        taken = CHOICE.take(value)
        assert isinstance(taken, Tensor)
        assert torch.equal(taken, value[PICKS])
    np.testing.assert_array_equal(CHOICE.take(ARRAY), ARRAY[PICKS])
    np.testing.assert_array_equal(CHOICE.take(Table()), ARRAY[PICKS])
    assert CHOICE.take(NAMES) == [NAMES[i] for i in PICKS]
    assert CHOICE.take(tuple(NAMES)) == tuple(NAMES[i] for i in PICKS)
    assert CHOICE.take(range(100, 130)) == [107, 102, 102, 129, 100]
    sparse = scipy.sparse.coo_matrix(ARRAY)
    np.testing.assert_array_equal(CHOICE.take(sparse).toarray(), ARRAY[PICKS])
    both = CHOICE.take({"x": X, "name": NAMES})
    assert list(both) == ["x", "name"]
    assert both["name"] == CHOICE.take(NAMES)
    selection = fc.facility_location(X, 3)
    assert torch.equal(selection.take(X), X[selection.indices])


def test_take_of_datasets_of_torch() -> None:
    taken = CHOICE.take(Items())
    assert isinstance(taken, Subset)
    assert list(taken) == [f"item {i}" for i in PICKS]
    pairs = CHOICE.take(TensorDataset(X, torch.arange(30)))
    assert [int(pair[1]) for pair in pairs] == PICKS
    inner = Subset(Items(), list(range(29, -1, -1)))
    taken = CHOICE.take(inner)
    assert list(taken) == [inner[i] for i in PICKS]
    assert taken.dataset is inner.dataset


def test_take_of_frames(tmp_path: Path) -> None:
    pandas, polars, pyarrow, datasets, h5py, zarr = (
        pytest.importorskip(name) for name in ("pandas", "polars", "pyarrow", "datasets", "h5py", "zarr")
    )
    columns = {"a": ARRAY[:, 0], "name": NAMES}
    frame = pandas.DataFrame(columns, index=range(50, 80))
    taken = CHOICE.take(frame)
    pandas.testing.assert_frame_equal(taken, frame.iloc[PICKS])
    assert CHOICE.take(frame["name"]).tolist() == CHOICE.take(NAMES)
    assert CHOICE.take(frame.index).tolist() == [50 + i for i in PICKS]
    assert CHOICE.take(polars.DataFrame(columns)).equals(polars.DataFrame(columns)[PICKS])
    assert CHOICE.take(polars.Series(NAMES)).to_list() == CHOICE.take(NAMES)
    table = pyarrow.table(columns)
    assert CHOICE.take(table).equals(table.take(PICKS))
    assert CHOICE.take(table["name"]).to_pylist() == CHOICE.take(NAMES)
    data = datasets.Dataset.from_dict({"a": ARRAY[:, 0].tolist(), "name": NAMES})
    assert isinstance(CHOICE.take(data), datasets.Dataset)
    assert CHOICE.take(data)["name"][:] == CHOICE.take(NAMES)
    assert CHOICE.take(data["name"]) == CHOICE.take(NAMES)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = ARRAY
        np.testing.assert_array_equal(CHOICE.take(file["x"]), ARRAY[PICKS])
    np.testing.assert_array_equal(CHOICE.take(zarr.array(ARRAY)), ARRAY[PICKS])
    np.testing.assert_array_equal(CHOICE.take(fc.open_rows(ARRAY)), ARRAY[PICKS])
    with pytest.raises(TypeError, match=r"got a LazyFrame; pass data\.collect\(\)"):
        CHOICE.take(polars.LazyFrame(columns))
    with pytest.raises(TypeError, match="got an IterableDataset"):
        CHOICE.take(data.to_iterable_dataset())


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (X[:29], ValueError, "data must have the rows that were chosen, which go up to number 29, got 29 rows"),
        (NAMES[:5], ValueError, "got 5 rows"),
        ({"x": X, "y": X[:3]}, ValueError, "got 3 rows"),
        (Stream(), TypeError, "got an IterableDataset, which has none by number"),
        (DataLoader(Items()), TypeError, "got a DataLoader; pass its dataset"),
        ("text" * 30, TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        (5, TypeError, "got int"),
        ({1} | set(range(30)), TypeError, "must have rows that can be chosen, got set"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_from(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CHOICE.take(data)
