"""The array boundary: an array that comes in through DLPack is checked before a kernel sees it, whoever made it.

Most cases go through real arrays; the ones that no library would produce are capsules written by hand, byte by
byte, from the published structures.
"""

from __future__ import annotations

import ctypes
import gc
import random
import re
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checks.boundary import Handmade, new_capsule

from flashcoreset._core import native
from flashcoreset.kernels import FacilityLocationProblem as Problem

FLOATS = [np.float32, np.float64]

# The public functions take such arrays from any NumPy, through torch.
NUMPY_EXPORTS_READ_ONLY = np.lib.NumpyVersion(np.__version__) >= "2.1.0"
needs_read_only = pytest.mark.skipif(
    not NUMPY_EXPORTS_READ_ONLY, reason="NumPy before 2.1 exports no read-only array through DLPack"
)


@pytest.fixture(scope="module", params=native.available_isas())
def m(request: pytest.FixtureRequest) -> ModuleType:
    return native.load_isa(request.param)


def dot(m: ModuleType, x: Any, y: Any = None, out: Any = None) -> Any:
    """x y^T through the native call; x, y and out are passed on as they are."""
    y = x if y is None else y
    if out is None:
        out = np.empty((4, 4), np.asarray(ROWS).dtype)
    m.pairwise(x, y, out, "dot", 1, False)
    return out


ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
GRAM = ROWS @ ROWS.T


# --------------------------------------------------------------------------------------------- capsules by hand


class Producer:
    """An object whose __dlpack__ does what the test sets."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __dlpack__(self, max_version: tuple[int, int] | None = None) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


# ------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("dtype", FLOATS)
def test_arrays_of_any_layout(m: ModuleType, dtype: type) -> None:
    rows = ROWS.astype(dtype)
    padded = np.full((4, 8), np.nan, dtype)
    padded[:, 1:7:2] = rows
    frozen = rows.copy()
    frozen.flags.writeable = False
    for x in (
        rows,
        np.asfortranarray(rows),
        rows[::-1].copy()[::-1],
        rows[:, ::-1].copy()[:, ::-1],
        padded[:, 1:7:2],
        *([frozen] if NUMPY_EXPORTS_READ_ONLY else []),
        torch.from_numpy(rows),
        torch.from_numpy(rows.T.copy()).T,
        torch.utils.dlpack.to_dlpack(torch.from_numpy(rows)),
    ):
        out = np.empty((4, 4), dtype)
        m.pairwise(x, rows, out, "dot", 1, False)
        np.testing.assert_array_equal(out, GRAM.astype(dtype))


@needs_read_only
def test_broadcast_input(m: ModuleType) -> None:
    x = np.broadcast_to(np.float32([1, 2, 3]), (4, 3))
    np.testing.assert_array_equal(dot(m, x), np.full((4, 4), 14, np.float32))


def test_outputs_of_torch_and_strided(m: ModuleType) -> None:
    for out in (torch.zeros(4, 4), torch.zeros(4, 9)[:, 2:6], torch.zeros(4, 4).flip(0)):
        dot(m, ROWS, out=out)
        np.testing.assert_array_equal(out.numpy(), GRAM)
    backwards = np.zeros((4, 4), np.float32)[::-1]
    np.testing.assert_array_equal(dot(m, ROWS, out=backwards), GRAM)


@pytest.mark.parametrize("versioned", [False, True])
def test_handmade(m: ModuleType, versioned: bool) -> None:
    memory = np.concatenate([np.full(5, -1, np.float32), ROWS.ravel()])
    reverse = (3 - np.arange(4), slice(None))
    for tensor, rows in (
        (Handmade(ROWS, (4, 3), versioned=versioned), ROWS),
        (Handmade(ROWS, (4, 3), (3, 1), versioned=versioned), ROWS),
        (Handmade(memory, (4, 3), None, offset=20, versioned=versioned), ROWS),
        (Handmade(memory, (4, 3), (-3, 1), offset=20 + 36, versioned=versioned), ROWS[reverse]),
    ):
        np.testing.assert_array_equal(dot(m, tensor, ROWS), rows @ ROWS.T)
        assert tensor.deleted == 1


def test_old_producer_without_max_version(m: ModuleType) -> None:
    class Old:
        calls = 0

        def __dlpack__(self, stream: None = None) -> Any:
            self.calls += 1
            return ROWS.__dlpack__()

    old = Old()
    np.testing.assert_array_equal(dot(m, old, ROWS), GRAM)
    assert old.calls == 1


def test_strides_of_single_rows_do_not_matter(m: ModuleType) -> None:
    for stride in (0, -7, sys.maxsize, -sys.maxsize - 1):
        out = np.zeros((1, 4), np.float32)
        m.pairwise(Handmade(ROWS, (1, 3), (stride, 1)), ROWS, out, "dot", 1, False)
        np.testing.assert_array_equal(out, GRAM[:1])


def test_empty(m: ModuleType) -> None:
    for x in (
        np.zeros((0, 3), np.float32),
        torch.zeros(0, 3),
        Handmade(None, (0, 3)),
        Handmade(None, (0, 3), (9, 9)),
    ):
        out = np.zeros((0, 4), np.float32)
        m.pairwise(x, ROWS, out, "dot", 1, False)


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [None, 3, 1.5, "x", [[1.0]], ((1.0,),), {}, object(), b"bytes"])
def test_not_an_array(m: ModuleType, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"x: expected an array .* got {type(value).__name__}"):
        dot(m, value, ROWS)


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        ("int32", "int32"),
        ("uint8", "uint8"),
        ("complex64", "complex64"),
        ("bool", "bool"),
    ],
)
def test_dtype(m: ModuleType, dtype: str, named: str) -> None:
    with pytest.raises(
        TypeError, match=rf"x: expected dtype float16, bfloat16, float32, float64 or int64, got {named}"
    ):
        dot(m, ROWS.astype(dtype), ROWS)


def test_dtype_of_the_others(m: ModuleType) -> None:
    with pytest.raises(TypeError, match="x: expected dtype float32 or float64, got int64"):
        dot(m, ROWS.astype(np.int64), ROWS)
    with pytest.raises(TypeError, match="y: expected dtype float32, got float64"):
        dot(m, ROWS, ROWS.astype(np.float64))
    with pytest.raises(TypeError, match="out: expected dtype float32, got float64"):
        dot(m, ROWS, ROWS, np.zeros((4, 4)))
    for half in ("float16", "bfloat16"):  # of the scores alone
        with pytest.raises(TypeError, match=f"x: expected dtype float32 or float64, got {half}"):
            dot(m, torch.zeros(4, 3, dtype=getattr(torch, half)), ROWS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lanes": 4}, "got float32 x 4 lanes"),
        ({"code": 77, "bits": 8}, "got type code 77, bits 8"),
        ({"code": 3, "bits": 64}, "got opaque64"),
    ],
)
def test_handmade_dtype(m: ModuleType, fields: dict[str, int], message: str) -> None:
    tensor = Handmade(ROWS, (4, 3), **fields)
    with pytest.raises(TypeError, match=message):
        dot(m, tensor, ROWS)
    assert tensor.deleted == 1


def test_what_producers_refuse_comes_through(m: ModuleType) -> None:
    with pytest.raises(BufferError, match="byte order"):
        dot(m, ROWS.astype(ROWS.dtype.newbyteorder()), ROWS)
    with pytest.raises(BufferError, match="require gradient"):
        dot(m, torch.zeros(4, 3, requires_grad=True), ROWS)
    for error in (RuntimeError("mine"), TypeError("mine"), AttributeError("mine"), KeyboardInterrupt("mine")):
        with pytest.raises(type(error), match="mine"):
            dot(m, Producer(error), ROWS)


@pytest.mark.parametrize("answer", [None, 3, "dltensor", ROWS])
def test_not_a_capsule(m: ModuleType, answer: Any) -> None:
    with pytest.raises(
        TypeError, match=f"x: expected __dlpack__ to return a capsule, got .*{type(answer).__name__}"
    ):
        dot(m, Producer(answer), ROWS)


def test_capsules_are_consumed_once(m: ModuleType) -> None:
    capsule = torch.utils.dlpack.to_dlpack(torch.from_numpy(ROWS))
    dot(m, capsule, ROWS)
    assert "used_dltensor" in repr(capsule)
    with pytest.raises(ValueError, match="consumed"):
        dot(m, capsule, ROWS)
    for name in (b"something", None):
        with pytest.raises(ValueError, match="x: expected a DLPack capsule"):
            dot(m, new_capsule(ctypes.addressof(Handmade(ROWS, (4, 3)).managed), name, None), ROWS)


def test_unconsumed_capsule_is_left_alone(m: ModuleType) -> None:
    tensor = Handmade(ROWS, (4, 3))
    capsule = tensor.capsule()
    with pytest.raises(TypeError, match="x: expected an array"):
        dot(m, 3, capsule)
    assert "used" not in repr(capsule)
    assert tensor.deleted == 0


@needs_read_only
def test_read_only_output(m: ModuleType) -> None:
    out = np.zeros((4, 4), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected a writable array, got a read-only one"):
        dot(m, ROWS, out=out)
    flagged = Handmade(np.zeros((4, 4), np.float32), (4, 4), flags=1)
    with pytest.raises(ValueError, match="out: expected a writable array"):
        dot(m, ROWS, out=flagged)
    assert flagged.deleted == 1
    assert not out.any()


def test_overlapping_output(m: ModuleType) -> None:
    for out in (torch.zeros(1, 4).expand(4, 4), torch.zeros(16).as_strided((4, 4), (2, 1))):
        with pytest.raises(ValueError, match="out: expected an array whose elements do not overlap"):
            dot(m, ROWS, out=out)


def test_shape(m: ModuleType) -> None:
    with pytest.raises(ValueError, match=re.escape("x: expected 2 dimensions, got 1 (shape (3,))")):
        dot(m, ROWS[0], ROWS)
    with pytest.raises(ValueError, match=re.escape("x: expected 2 dimensions, got 0 (shape ())")):
        dot(m, np.array(1, np.float32), ROWS)
    with pytest.raises(ValueError, match=re.escape("out: expected shape (4, 4), got (4, 5)")):
        dot(m, ROWS, out=np.zeros((4, 5), np.float32))


def test_alignment(m: ModuleType) -> None:
    data = np.zeros(4 * 12 + 1, np.uint8)[1:].view(np.float32).reshape(4, 3)
    assert not data.flags.aligned
    with pytest.raises(ValueError, match="x: expected data aligned to 4 bytes"):
        dot(m, data, ROWS)
    with pytest.raises(ValueError, match="x: expected data aligned to 4 bytes"):
        dot(m, Handmade(ROWS, (2, 3), offset=2), ROWS)


@pytest.mark.parametrize("device", [2, 4, 7, 10, 13, 99, -1])
def test_device(m: ModuleType, device: int) -> None:
    tensor = Handmade(ROWS, (4, 3), device=device)
    named = {2: "cuda", 13: "cuda", 10: "rocm"}.get(device, f"device type {device}")
    with pytest.raises(ValueError, match=f"x: expected an array in CPU memory, got {named}:0"):
        dot(m, tensor, ROWS)
    assert tensor.deleted == 1


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: Handmade(ROWS, (4, 3), version=(2, 0)), "expected DLPack version 1, got 2.0"),
        (lambda: Handmade(ROWS, (4, 3), version=(0, 8)), "expected DLPack version 1, got 0.8"),
        (lambda: Handmade(None, (4, 3)), "null"),
        (lambda: Handmade(ROWS, (4, -3)), re.escape("expected sizes >= 0, got shape (4, -3)")),
        (lambda: Handmade(ROWS, (2**32, 2**31)), "byte offsets fit in 64 bits"),
        (lambda: Handmade(ROWS, (2**31, 2**30), (0, 0)), "byte offsets fit in 64 bits"),
        (lambda: Handmade(ROWS, (4, 3), (2**62, 1)), "byte offsets fit in 64 bits"),
        (lambda: Handmade(ROWS, (4, 3), (-(2**63), 1)), "byte offsets fit in 64 bits"),
        (lambda: Handmade(ROWS, (4, 3), offset=2**63), "byte offsets fit in 64 bits"),
        (lambda: Handmade(ROWS, None, ndim=2), "2 dimensions and no shape"),
        (lambda: Handmade(ROWS, None, ndim=-1), "-1 dimensions"),
    ],
)
def test_impossible_tensors(m: ModuleType, tensor: Any, message: str) -> None:
    made = tensor()
    with pytest.raises(ValueError, match=message):
        dot(m, made, ROWS)
    assert made.deleted == 1


# -------------------------------------------------------------------------------------------------------- lifetime


def test_references_are_returned(m: ModuleType) -> None:
    x, out = ROWS.copy(), np.zeros((4, 4), np.float32)
    whole, bad = torch.from_numpy(ROWS.copy()), np.zeros((4, 9), np.float32)
    before = [sys.getrefcount(a) for a in (x, out, whole, bad)]
    for _ in range(100):
        dot(m, x, whole, out)
        with pytest.raises(ValueError, match="out"):
            dot(m, x, whole, bad)
    gc.collect()
    assert [sys.getrefcount(a) for a in (x, out, whole, bad)] == before


def test_a_run_keeps_its_arrays_alive(m: ModuleType) -> None:
    tensor = Handmade(ROWS, (4, 3))
    run = m.FacilityLocation(Problem(tensor, metric="dot"), 1)
    assert tensor.deleted == 0
    assert run.step(2) == 2
    assert tensor.deleted == 0
    del run
    gc.collect()
    assert tensor.deleted == 1


def test_random_headers(m: ModuleType) -> None:
    """Headers with random fields are either taken, when they describe memory that is there, or refused."""
    rng = random.Random(0)
    memory = np.ones(64, np.float32)
    taken = 0
    for _ in range(3000):
        ndim = rng.choice([0, 1, 2, 2, 2, 2, 3])
        shape = tuple(rng.choice([0, 1, 2, 3, 4, 1, 2, 3, 4, -1, 2**31, 2**62]) for _ in range(ndim))
        strides = (
            tuple(rng.choice([0, 1, 2, 4, -1, 2**40, -(2**63)]) for _ in range(ndim))
            if rng.random() < 0.6
            else None
        )
        offset = rng.choice([0, 0, 0, 0, 4, 1, 128, 2**63])
        steps = strides
        if steps is None and ndim == 2:
            steps = (shape[1], 1)
        reach = [(n - 1) * s for n, s in zip(shape, steps or (), strict=False) if n > 1]
        low = offset // 4 + sum(r for r in reach if r < 0)
        high = offset // 4 + sum(r for r in reach if r > 0)
        outside = low < 0 or high >= 64
        # A header that is well-formed but points outside of its memory would be believed: no consumer can notice.
        if outside and all(n > 0 for n in shape):
            shape, strides, offset = (2, 2), (2**62, 2**62), 0
        tensor = Handmade(
            memory,
            shape,
            strides,
            offset=offset,
            code=rng.choice([2, 2, 2, 2, 2, 0, 9]),
            bits=rng.choice([32, 32, 32, 32, 64, 7]),
            lanes=rng.choice([1, 1, 1, 1, 1, 0, 2]),
            device=rng.choice([1, 1, 1, 1, 1, 2, 0]),
            versioned=rng.random() < 0.5,
        )
        columns = shape[1] if ndim == 2 and 0 <= shape[1] < 5 else 3
        rows = shape[0] if ndim == 2 and 0 <= shape[0] < 5 else 2
        y, out = np.ones((2, columns), np.float32), np.full((rows, 2), np.nan, np.float32)
        try:
            m.pairwise(tensor, y, out, "dot", 1, False)
        except (TypeError, ValueError):
            pass
        else:
            taken += 1
            np.testing.assert_array_equal(out, np.full((rows, 2), float(columns), np.float32))
        assert tensor.deleted == 1
    assert taken > 100, taken
