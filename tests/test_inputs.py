"""What a caller has: small integers, flags, lists, mixed precisions, columns and frames of other libraries, in every public function
that takes arrays. Each call has the result of the same numbers as tensors of one type."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcoreset as fc
from flashcoreset._core.inputs import as_array
from flashcoreset._core.tensor import as_floating, as_matrix, promoted
from flashcoreset.pursuit import frank_wolfe, orthogonal_matching_pursuit


def whole(rows: int, columns: int, seed: int = 0, high: int = 100) -> Tensor:
    """[rows, columns] float32 of small whole numbers, no row 0."""
    return torch.randint(1, high, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def signs(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 3 == 0, 1, -1).float()


POINTS, OTHERS, WEIGHTS = whole(12, 4), whole(9, 4, seed=1), whole(12, 1, seed=2)[:, 0]
COSTS = dict(zip(("x", "y"), (POINTS / 128, OTHERS / 128), strict=True))

# By name: a call, and the arrays that it takes, [rows, columns] or [n].
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "facility_location": (
        lambda x, clients, weights: fc.facility_location(x, 3, clients=clients, weights=weights, metric="l1"),
        {"x": POINTS, "clients": OTHERS, "weights": WEIGHTS[:9]},
    ),
    "facility_location precomputed": (
        lambda x: fc.facility_location(x, 3, metric="precomputed"),
        {"x": whole(6, 8)},
    ),
    "sinkhorn": (lambda x, y: fc.sinkhorn(x, y, reg=500.0, max_iter=50, tol=0), {"x": POINTS, "y": OTHERS}),
    "sinkhorn_divergence": (
        lambda x, y: fc.sinkhorn_divergence(x, y, reg=500.0, max_iter=20, tol=0),
        {"x": POINTS, "y": OTHERS},
    ),
    "sketch": (lambda x: fc.sketch(x, 3), {"x": POINTS}),
    "match_gradients": (lambda g: fc.match_gradients(g, 3), {"g": POINTS}),
    "match_gradients normalize": (
        lambda g, m, v: fc.match_gradients(g, 3, normalize=fc.AdamState(m, v, 2)),
        {"g": POINTS, "m": whole(1, 4, seed=3)[0], "v": whole(1, 4, seed=4)[0]},
    ),
    "LowRankGradients": (
        lambda coefficients: fc.match_gradients(fc.LowRankGradients(coefficients, 0, 9), 2),
        {"coefficients": POINTS[:, :2]},
    ),
    "caratheodory": (lambda x, weights: fc.caratheodory(x, weights), {"x": POINTS, "weights": WEIGHTS}),
    "orthogonal_matching_pursuit": (
        lambda g, target: orthogonal_matching_pursuit(g, target, 2),
        {"g": POINTS, "target": whole(1, 4, seed=5)[0]},
    ),
    "frank_wolfe": (
        lambda g, target: frank_wolfe(g, target, 2),
        {"g": POINTS, "target": whole(1, 4, seed=5)[0]},
    ),
    "sample_scores": (
        lambda logits: fc.sample_scores(logits, torch.arange(12) % 4),
        {"logits": POINTS},
    ),
    "TrainingDynamics": (
        lambda logits: _dynamics(logits),
        {"logits": POINTS},
    ),
    "matching_error": (
        lambda g, weights: torch.tensor(fc.matching_error(g, range(12), weights)),
        {"g": POINTS, "weights": WEIGHTS},
    ),
    "CoLM": (lambda grads: fc.CoLM(3, top=2).select(grads), {"grads": POINTS}),
    "simcore": (
        lambda openset, target: fc.simcore(openset, target, 3, n_clusters=2),
        {"openset": POINTS, "target": OTHERS},
    ),
    "ccs": (lambda scores: fc.ccs(scores, 4, n_strata=3), {"scores": WEIGHTS}),
    "top_scores": (lambda scores: fc.top_scores(scores, 4), {"scores": WEIGHTS}),
    "goracs": (
        lambda train, valid, grad_norms: fc.goracs(train, valid, grad_norms, 3, max_exchanges=3),
        {"train": POINTS, "valid": OTHERS, "grad_norms": WEIGHTS},
    ),
}  # fmt: skip


def _dynamics(logits: Any) -> Any:
    found = fc.TrainingDynamics(12)
    found.update(torch.arange(12), logits, torch.arange(12) % 4, epoch=0)
    return SimpleNamespace(**found.scores())


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors and numbers of a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (int, float)):
        yield torch.tensor(value, dtype=torch.float64)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif hasattr(value, "indices") and hasattr(value, "weights"):
        yield from (value.indices, value.weights)
    elif isinstance(value, (fc.Transport, SimpleNamespace)):
        for name in ("f", "g", "value") if isinstance(value, fc.Transport) else vars(value):
            yield getattr(value, name)


def check_same(found: Any, expected: Any) -> None:
    pairs = list(itertools.zip_longest(tensors(found), tensors(expected)))
    assert pairs
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def with_arrays(name: str, convert: Callable[[Tensor], Any]) -> Any:
    call, arrays = CALLS[name]
    return call(**{key: convert(value) for key, value in arrays.items()})


def outcome(run: Callable[[], Any]) -> Any:
    """The result of a call, or why it was refused."""
    try:
        return run()
    except ValueError as error:
        return str(error)


SMALL = [np.int8, np.uint8, np.int16, np.uint16, torch.int8, torch.uint8, torch.int16]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_small_integers_are_float32(name: str, dtype: Any) -> None:
    def convert(value: Tensor) -> Any:
        return value.to(dtype) if isinstance(dtype, torch.dtype) else value.numpy().astype(dtype)

    check_same(with_arrays(name, convert), with_arrays(name, lambda value: value))


@pytest.mark.parametrize("name", CALLS)
def test_flags_are_zeros_and_ones(name: str) -> None:
    def odd(value: Tensor) -> Tensor:
        flags = value % 2 == 1
        flags[..., 0] = True  # no row of zeros
        return flags

    found, expected = (
        outcome(lambda convert=convert: with_arrays(name, convert))
        for convert in (odd, lambda value: odd(value).float())
    )
    if isinstance(expected, str):
        assert found == expected
    else:
        check_same(found, expected)


# A list is one of batches for simcore.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "simcore"])
def test_lists_of_numbers_are_float64(name: str) -> None:
    # Weights of scores that come without a type are float32.
    expected = with_arrays(name, lambda value: value if name in ("ccs", "top_scores") else value.double())
    for convert in (
        lambda value: value.tolist(),
        lambda value: value.int().tolist(),
        lambda value: tuple(value.double().numpy()) if value.dim() == 2 else value.tolist(),
    ):
        check_same(with_arrays(name, convert), expected)


MIXED = [name for name, (_, arrays) in CALLS.items() if len(arrays) > 1]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("which", [0, 1])
def test_float32_beside_float64_is_float64(name: str, which: int) -> None:
    call, arrays = CALLS[name]
    main = [key for key in arrays if key not in ("weights", "target", "grad_norms")] or list(arrays)
    third = {key: value / 3 for key, value in arrays.items()}
    exact = {key: value.double() for key, value in third.items()}
    mixed = dict(third)
    mixed[main[min(which, len(main) - 1)]] = exact[main[min(which, len(main) - 1)]]
    if len(main) < 2:
        return check_same(
            call(**mixed), call(**(exact | {key: third[key] for key in third if key not in main}))
        )
    check_same(call(**mixed), call(**exact))
    return None


class Column:
    """A column or frame of another library: it has __array__ and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array


class Sliced:
    """An array in a file, as h5py and zarr have it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.array[key]


class Listed(Sequence):
    """A sequence of rows, as the columns of `datasets` are."""

    def __init__(self, array: np.ndarray) -> None:
        self.rows = array.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return self.rows[key]


def column_of_lists(array: np.ndarray) -> Column:
    rows = np.empty(len(array), dtype=object)
    rows[:] = [row.tolist() for row in array]
    return Column(rows)


@pytest.mark.parametrize("kind", [Column, Sliced, Listed, column_of_lists])
@pytest.mark.parametrize("name", CALLS)
def test_columns_and_frames_of_other_libraries(name: str, kind: Callable[[np.ndarray], Any]) -> None:
    if kind is Listed and name == "simcore":  # a sequence is one of batches there
        kind = Column
    found = with_arrays(name, lambda value: kind(value.double().numpy()))
    check_same(found, with_arrays(name, lambda value: value.double()))


def test_frames_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(POINTS.numpy(), columns=list("abcd"))
    assert torch.equal(fc.sketch(frame, 3), fc.sketch(POINTS, 3))
    assert torch.equal(fc.sketch(frame.astype("int8"), 3), fc.sketch(POINTS, 3))
    vectors = pandas.Series(POINTS.double().tolist())
    assert torch.equal(fc.sketch(vectors, 3), fc.sketch(POINTS.double(), 3))
    weights = pandas.Series(WEIGHTS.numpy())[::-1]
    check_same(fc.caratheodory(frame, weights), fc.caratheodory(POINTS, WEIGHTS.flip(0)))
    with pytest.raises(TypeError, match=r"x must hold numbers, got a DataFrame with strings, .*to_numpy\("):
        fc.sketch(frame.assign(name="a"), 3)
    with pytest.raises(ValueError, match="x must have lists of equal length, got a Series with others"):
        fc.sketch(pandas.Series([[1.0], [1.0, 2.0]]), 3)


class Broken(Column):
    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise RuntimeError("the file is closed")


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, r"got int64; convert it with x\.double\(\)"),
        (torch.zeros(2, 2, dtype=torch.int32), TypeError, r"got int32; convert it with x\.double\(\)"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "got complex64$"),
        ([["a"]], TypeError, "x must hold real numbers, got an array of dtype <U1"),
        ([[1.0], [2.0, 3.0]], ValueError, "x must be a list of numbers, got a nested one of unequal lengths"),
        ([[2**53 + 1]], ValueError, r"x must hold integers of at most 2\^53, which float64 has, got larger ones"),
        ([torch.ones(2), torch.ones(3)], ValueError, r"x must be rows of one shape, got torch.Size\(\[2\]\)"),
        ([], ValueError, "x must have 2 dimensions"),
        ("text", TypeError, "x must be a torch.Tensor, a NumPy array, an object with .*, got str"),
        ({"a": 1}, TypeError, "x must be a torch.Tensor, a NumPy array, an object with .*, got dict"),
        (object(), TypeError, "x must be a torch.Tensor, a NumPy array, an object with .*, got object"),
        (Broken(np.ones(1)), TypeError, "x: the numbers of Broken could not be read: the file is closed"),
        (Column(np.array([None, 1.0])), TypeError, "x must hold numbers, got a Column with strings, missing"),
    ],
)  # fmt: skip
def test_what_is_not_taken_says_how_to_convert_it(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        as_matrix(value, "x")


def test_promotion_loses_no_digit() -> None:
    half, brain, single, double = (
        torch.tensor([1.0 / 3], dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )
    for tensors_, dtype in (
        ((half, half), torch.float16),
        ((half, brain), torch.float32),
        ((half, single), torch.float32),
        ((single, double, half), torch.float64),
    ):
        for before, after in zip(tensors_, promoted(*tensors_), strict=True):
            assert after.dtype == dtype
            assert float(after) == float(before)
    for dtype in (torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16):
        ends = [0, 1] if dtype == torch.bool else [torch.iinfo(dtype).min, torch.iinfo(dtype).max]
        assert as_floating(torch.tensor(ends).to(dtype), "x").tolist() == ends


NAMES = ["sea", "air", "land", "air", "sea", "land", "land", "air", "sea", "air", "land", "air"]
CODES = [sorted(set(NAMES)).index(name) for name in NAMES]


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        lambda names: np.array(names, dtype=object),
        lambda names: Column(np.array(names)),
        lambda names: Listed(np.array(names)),
    ],
    ids=["list", "tuple", "array", "objects", "column", "sequence"],
)
def test_labels_may_be_strings(convert: Callable[[list[str]], Any]) -> None:
    """They count as their places in sorted order."""
    labels = convert(NAMES)
    for solve in (fc.facility_location, fc.match_gradients):
        check_same(solve(POINTS, 5, groups=labels), solve(POINTS, 5, groups=CODES))
        by_name = solve(POINTS, None, groups=labels, budgets={"sea": 1, "air": 3, "land": 0})
        check_same(by_name, solve(POINTS, None, groups=CODES, budgets={2: 1, 0: 3, 1: 0}))
    with pytest.raises(ValueError, match="caps must be >= 0, got -2 for label 'air'"):
        fc.facility_location(POINTS, 5, groups=labels, caps={"air": -2})
    capped = fc.facility_location(POINTS, 5, groups=labels, caps={"air": 2})
    check_same(capped, fc.facility_location(POINTS, 5, groups=CODES, caps={0: 2}))


@pytest.mark.parametrize(
    ("groups", "budgets", "error", "words"),
    [
        (NAMES, {"sea": 1, "air": 1}, ValueError, "got none for label 'land'"),
        (NAMES, {"sea": 1, "air": 1, "land": 1, "moon": 1}, ValueError, "1 asked of label 'moon', which no"),
        (NAMES, {"sea": -1, "air": 1, "land": 1}, ValueError, "budgets must be >= 0, got -1 for label 'sea'"),
        (NAMES, {"sea": 4, "air": 1, "land": 1}, ValueError, "4 asked of label 'sea', whose group has 3"),
        (NAMES, [1, 2, 3], TypeError, "budgets must be a dict by label where groups holds labels of type str"),
        ([*NAMES[:11], None], None, TypeError, "groups must hold labels that can be sorted, such as strings"),
        (["a", "b"], None, ValueError, r"groups must have shape \[12\], got \(2,\)"),
        ([1.5] * 12, None, TypeError, "groups must hold integers"),
    ],
)  # fmt: skip
def test_bad_labels_are_named(groups: Any, budgets: Any, error: type[Exception], words: str) -> None:
    for solve in (fc.facility_location, fc.match_gradients):
        with pytest.raises(error, match=words):
            solve(POINTS, None if budgets is not None else 3, groups=groups, budgets=budgets)


def test_a_column_of_objects_that_are_numbers() -> None:
    assert as_array(Column(np.array([1, 2.5], dtype=object)), "x").tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fc.facility_location(x, 2, backend="cpu").gains,
        lambda x: fc.match_gradients(x, 2, backend="cpu").weights,
        lambda x: fc.sinkhorn(x, x, reg=0.5, backend="cpu").f,
        lambda x: fc.k_center(x, 2, backend="cpu").gains,
    ],
)
def test_functionalize_is_an_error_not_a_crash(call: Callable[[Tensor], Tensor]) -> None:
    """The parts of its tensors have addresses that are not null, and no memory there."""
    part = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0))[1]
    with pytest.raises(ValueError, match=r"has no values while torch\.func\.functionalize traces the call"):
        torch.func.functionalize(call)(part)
