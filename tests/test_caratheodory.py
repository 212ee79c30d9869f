"""caratheodory keeps the sums with few rows, on every backend and build, and everything a caller can get wrong."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE
from checks.caratheodory import (
    Check,
    X,
    check,
    check_driver,
    check_half_types,
    check_matching,
    check_memory,
    check_op,
    check_sums_only,
    checks_of,
    random,
    reduce,
)
from conftest import EVERY_BACKEND, GPU_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset._core import native
from flashcoreset.caratheodory import on_device as driver
from flashcoreset.kernels import CaratheodoryProblem


@pytest.fixture
def small_on_device(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Small problems go to the device too, in Triton's interpreter for a round or two, and pieces of them to the host."""
    monkeypatch.setattr(driver, "FEW", 300 if backend == "triton" else 0)
    monkeypatch.setattr(driver, "PIECE_BYTES", 4_000)
    monkeypatch.setattr(driver, "QR_NUMBERS", 1_000)


ON_GPU = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 5, 8])
def test_round_numbers_have_even_weights_too(d: int) -> None:
    """Columns of 0 and 1: many basic vectors are at their ends at once."""
    for seed in range(40):
        x = torch.randint(0, 2, (700, d), generator=torch.Generator().manual_seed(seed)).double()
        subset = fc.caratheodory(x, max_size=87)
        assert float(subset.weights.max()) <= 700 / (87 - d - 1) * (1 + 1e-9)
        check_sums_only(subset, x)


def test_every_row_has_the_same_mean_weight() -> None:
    """Over many orders of the rows, outliers and inner points weigh the same."""
    n, k, draws = 40, 12, 600
    x = torch.exp(2 * random(n, 2))
    total = np.zeros(n)
    for draw in range(draws):
        order = torch.from_numpy(np.random.default_rng(draw).permutation(n))
        subset = fc.caratheodory(x[order], max_size=k)
        total[order[subset.indices].numpy()] += subset.weights.numpy()
    # Weights lie between 0 and 40 / 9 and are 1 in the mean: their variance is below 31 / 9.
    assert np.abs(total / draws - 1).max() < 4 * math.sqrt(31 / 9 / draws)


ROWS = st.integers(1, 4).flatmap(
    lambda d: st.lists(
        st.tuples(
            st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6)), min_size=d, max_size=d),
            st.one_of(st.integers(0, 3).map(float), st.floats(1e-300, 1e6)),
        ),
        min_size=1,
        max_size=60,
    )
)


@given(rows=ROWS, name=st.sampled_from(["cpu", "torch"]))
@settings(max_examples=300, deadline=None)
def test_any_small_case(rows: list[tuple[list[float], float]], name: str) -> None:
    x = torch.tensor([values for values, _ in rows], dtype=torch.float64)
    weights = torch.tensor([weight for _, weight in rows], dtype=torch.float64)
    if not weights.any():
        with pytest.raises(ValueError, match="weights must not all be 0"):
            fc.caratheodory(x, weights, backend=name)
        return
    check(fc.caratheodory(x, weights, backend=name), x, weights)


# --- promises -------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n", "d"), [(3000, 9), (900, 250), (50, 3000)])
def test_threads_change_nothing(n: int, d: int, threads: None) -> None:
    x = random(n, d).repeat(2, 1)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(fc.caratheodory(x, backend="cpu"))
    for other in found[1:]:
        assert torch.equal(found[0].indices, other.indices)
        assert torch.equal(found[0].weights, other.weights)
    check(found[0], x)


def test_half_types_compute_in_float64() -> None:
    check_half_types("cpu")


@EVERY_BACKEND
def test_memory_of_the_callers_own(backend: str, small_on_device: None) -> None:
    check_memory(importlib.import_module(f"flashcoreset.kernels.{backend}"), DEVICE)


def test_the_binding_checks_its_arrays() -> None:
    x, ints, floats = random(9, 2), torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.float64)
    for weights in (torch.zeros(9), torch.full((9,), -1.0), torch.full((9,), math.nan), torch.ones(8)):
        with pytest.raises(ValueError, match="weights: expected"):
            kernels.cpu.caratheodory(CaratheodoryProblem(x, weights.double()))
    for out in ((ints[:2], floats), (ints, floats[:2])):
        with pytest.raises(ValueError, match="expected shape"):
            kernels.cpu.caratheodory(CaratheodoryProblem(x), out)
    with pytest.raises(ValueError, match="max_size"):
        kernels.cpu.caratheodory(CaratheodoryProblem(x, max_size=-1), (ints, floats))


def test_the_parts_for_devices_check_their_arrays() -> None:
    module, capsule = native.module(), torch.utils.dlpack.to_dlpack

    def numbers(*shape: int, value: float = 1.0) -> Any:
        return capsule(torch.full(shape, value, dtype=torch.float64))

    with pytest.raises(ValueError, match="centre: expected at least 1 number"):
        module.CaratheodoryReduction(numbers(0), 1.0)
    reduction = module.CaratheodoryReduction(numbers(2, value=0.0), 1.0)
    assert reduction.most_runs == 12
    with pytest.raises(ValueError, match="sums: expected a total weight > 0 first"):
        reduction.factors(numbers(4, 3), numbers(4))
    assert not reduction.take_total(numbers(4, 3, value=math.inf))
    assert reduction.take_total(numbers(4, 3))
    for call, words in (
        (lambda: reduction.take_total(numbers(4, 2)), "sums: expected shape"),
        (lambda: reduction.take_total(numbers(0, 3)), "sums: expected at least 1 run"),
        (lambda: reduction.take_total(capsule(torch.ones(3, 4).double().T)), "sums: expected rows that are"),
        (lambda: reduction.move_to_mean(numbers(4, 4)), "sums: expected shape"),
        (lambda: reduction.centre(numbers(3)), "out: expected shape"),
        (lambda: reduction.factors(numbers(4, 3), numbers(5)), "out: expected shape"),
        (lambda: reduction.correct(numbers(5, 3), numbers(5), numbers(3)), "x: expected shape"),
        (lambda: reduction.correct(numbers(5, 2), numbers(4), numbers(3)), "weights: expected shape"),
        (lambda: reduction.correct(numbers(5, 2), numbers(5), numbers(2)), "sums: expected shape"),
        (lambda: module.CaratheodorySampler(reduction, numbers(9, value=0.0), 3), "weights: expected finite"),
        (
            lambda: module.CaratheodorySampler(reduction, numbers(9), 0),
            "goal: expected an integer >= 1, got 0",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    places, weights = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.float64)
    for x, w, out, words in (
        ((5, 3), 5, 3, "x: expected shape"),
        ((5, 2), 4, 3, "weights: expected shape"),
        ((5, 2), 5, 2, "indices: expected shape"),
    ):
        with pytest.raises(ValueError, match=words):
            reduction.rest(numbers(*x), numbers(w), capsule(places[:out]), capsule(weights))
    sampler = module.CaratheodorySampler(reduction, numbers(9), 4)
    with pytest.raises(ValueError, match="x: expected no more rows than weights"):
        sampler.push(numbers(10, 2))
    with pytest.raises(ValueError, match="x: expected shape"):
        sampler.push(numbers(2, 3))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck_and_compile(backend: str) -> None:
    check_op(backend, "cpu")
    x = random(80, 3)
    torch.library.opcheck(torch.ops.flashcoreset.caratheodory.default, (x, None, 0, backend))

    def mean(x: Tensor) -> Tensor:
        subset = fc.caratheodory(x * 2, backend=backend)
        return subset.weights @ x[subset.indices]

    torch._dynamo.reset()
    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mean(x))


# --- bad input ------------------------------------------------------------------------------------


def test_a_weight_below_float32() -> None:
    subset = fc.caratheodory(torch.eye(3), [1e-60, 1.0, 1.0])
    assert subset.indices.tolist() == [0, 1, 2]
    assert (subset.weights > 0).all()


def test_sums_of_weights_in_range() -> None:
    with pytest.raises(ValueError, match=r"their sum, .* overflows torch\.float32"):
        fc.caratheodory(X.float(), [1e38] * 6)


def test_backends_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="unknown backend"):
        fc.caratheodory(X, backend="gpu")


# --- what holds on every backend -------------------------------------------------------------------


@pytest.mark.parametrize(
    "holds", checks_of([(n, d) for n in (1, 7, 97, 1025) for d in (1, 2, 7, 33)], thorough=True)
)
def test_reduction(backend: str, holds: Check) -> None:
    holds(backend)


# Warnings of NumPy, in Triton's interpreter, when sums are to become infinite or NaN.
@ON_GPU
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("holds", checks_of([(1, 1), (97, 7), (1025, 3)]))
def test_as_on_the_cpu(backend: str, holds: Check, small_on_device: None) -> None:
    holds(backend)


@ON_GPU
def test_the_way_to_the_host(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"triton": 4_000}.get(backend, driver.FEW)
    monkeypatch.setattr(driver, "FEW", few)
    check_driver(backend, 8_000 if backend == "triton" else 50_000)


@ON_GPU
def test_opcheck(backend: str, small_on_device: None) -> None:
    check_op(backend, DEVICE)


@ON_GPU
def test_gradients_are_matched_exactly(backend: str, small_on_device: None) -> None:
    check_matching(backend)


@ON_GPU
def test_without_the_compiled_cpu_module(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "failure", lambda: "no compiled CPU module could be loaded (broken)")
    words = rf"backend '{backend}': of caratheodory sums of runs .*\(broken\)"
    with pytest.raises(fc.BackendUnavailableError, match=words):
        reduce(random(9, 2), backend=backend)
