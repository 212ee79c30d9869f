"""The CUDA kernels of the Carathéodory reduction, run by the emulator (on a GPU under `make gpu`): more sizes, schedules, memory,
errors."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DEVICE
from checks.caratheodory import DTYPES, check, check_keeps_the_sums, random, reduce

from flashcoreset._core import native
from flashcoreset.caratheodory import on_device as driver
from flashcoreset.caratheodory.problem import Runs

pytestmark = pytest.mark.usefixtures("emulated_cuda")


@pytest.fixture
def all_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems go to the device too, and pieces of them to the host."""
    monkeypatch.setattr(driver, "FEW", 0)
    monkeypatch.setattr(driver, "PIECE_BYTES", 4_000)
    monkeypatch.setattr(driver, "QR_NUMBERS", 1_000)


@pytest.mark.usefixtures("all_on_device")
@pytest.mark.parametrize(("n", "d"), [(n, d) for n in (1, 7, 97, 1025) for d in (1, 2, 7, 33)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_on_the_cpu_keeps_the_sums(n: int, d: int, dtype: torch.dtype) -> None:
    check_keeps_the_sums("cuda", n, d, dtype)


@pytest.mark.parametrize("n", [97, 1025])
def test_small_problems_are_the_cpus(n: int) -> None:
    x = random(n, 7)
    for max_size in (None, 60):
        found = reduce(x, None, max_size, backend="cuda")
        expected = reduce(x, None, max_size, backend="cpu")
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.weights, expected.weights)


@pytest.mark.usefixtures("all_on_device")
def test_schedules_change_no_bit() -> None:
    module = native.cuda_module()
    x = random(3_000, 9)
    found = []
    for schedule in ("reverse", "random:7", "forward"):
        if hasattr(module, "set_schedule"):
            module.set_schedule(schedule)
        found += [reduce(x, None, max_size, backend="cuda") for max_size in (None, 200)]
    for first, other in zip(found[:2] * 2, found[2:], strict=True):
        assert torch.equal(first.indices, other.indices)
        assert torch.equal(first.weights, other.weights)
    check(found[0], x)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulated device alone can be made a poorer one")
@pytest.mark.usefixtures("all_on_device")
def test_memory_is_that_of_partial_sums() -> None:
    x = random(60_000, 3)
    module = native.cuda_module()
    before = module.allocated_bytes()
    try:
        module.set_device(bytes=before + 2 * 8 * 4 * (60_000 // 256 + 16))
        reduce(x, backend="cuda")
        module.set_device(bytes=before + 100)
        with pytest.raises(torch.OutOfMemoryError, match="out of device memory"):
            reduce(x, backend="cuda")
    finally:
        module.set_device()
    assert module.allocated_bytes() == before


def test_the_binding_checks_its_arrays() -> None:
    module = native.cuda_module()
    x = random(20, 3).to(DEVICE)
    capsule = torch.utils.dlpack.to_dlpack

    def sums(rows: int = 4, columns: int = 4, size: int = 5, weights: int = 20, centre: int = 3) -> None:
        runs = Runs(x, None, x.new_ones(weights), size)
        module.sum_runs(runs, capsule(x.new_zeros(centre)), 1.0, capsule(x.new_empty(rows, columns)), 0)

    sums()
    for wrong, words in (
        ({"rows": 5}, "sums: expected shape"),
        ({"columns": 3}, "sums: expected shape"),
        ({"size": 0}, "size: expected an integer >= 1, got 0"),
        ({"weights": 19}, "weights: expected shape"),
        ({"centre": 2}, "centre: expected shape"),
    ):
        with pytest.raises(ValueError, match=words):
            sums(**wrong)
    kept = torch.tensor([0, 2], device=DEVICE)

    def keep(count: int, factors: int = 2) -> None:
        arrays = kept, x.new_ones(factors), kept.new_empty(count), x.new_empty(count)
        module.keep_runs(Runs(x, None, None, 5), *map(capsule, arrays), 0)

    keep(10)
    with pytest.raises(ValueError, match="new_rows: expected as many as the runs kept have, got 11"):
        keep(11)
    with pytest.raises(ValueError, match="factors: expected shape"):
        keep(10, 3)


def test_nan_is_found_where_it_is() -> None:
    x = random(40_000, 4)
    x[31_234, 2] = math.nan
    for max_size in (None, 100):
        with pytest.raises(ValueError, match="x must be finite, got NaN at row 31234, column 2"):
            reduce(x, None, max_size, backend="cuda")
