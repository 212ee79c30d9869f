"""The Triton kernels of the Carathéodory reduction, in Triton's interpreter (on a GPU under `make gpu`): everything that holds on
the CPU."""

from __future__ import annotations

import platform

import pytest
import torch
from cases import DEVICE
from checks.caratheodory import (
    Check,
    check_driver,
    check_matching,
    check_memory,
    check_op,
    checks_of,
    exact_sums,
    random,
    reduce,
)

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

import flashcoreset as fc
from flashcoreset._core import native
from flashcoreset.caratheodory import on_device as driver
from flashcoreset.kernels import triton as kernels
from flashcoreset.triton_kernels import caratheodory as launchers


@pytest.fixture
def all_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems go to the device too, for a round or two, and pieces of them to the host."""
    monkeypatch.setattr(driver, "FEW", 300)
    monkeypatch.setattr(driver, "PIECE_BYTES", 4_000)
    monkeypatch.setattr(driver, "QR_NUMBERS", 1_000)


SIZES = [(1, 1), (97, 7), (1025, 3)]


# Warnings of NumPy, in the interpreter, when sums are to become infinite or NaN.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.usefixtures("all_on_device")
@pytest.mark.parametrize("holds", checks_of(SIZES))
def test_as_on_the_cpu(holds: Check) -> None:
    holds("triton")


def test_the_way_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "FEW", 4_000)
    check_driver("triton", 8_000)


@pytest.mark.parametrize("size", [1, 7, 600])
@pytest.mark.parametrize("d", [1, 5, 40])
def test_sums_of_runs(monkeypatch: pytest.MonkeyPatch, d: int, size: int) -> None:
    """Over several tiles of rows and columns, pieces and runs; with and without rows and weights."""
    monkeypatch.setattr(launchers, "COLUMNS", 16)
    monkeypatch.setattr(launchers, "TILE", 1 << 12)
    n = 700 if size == 600 else 40
    x = random(n, d)
    centre = random(1, d, 1)[0]
    for rows in (None, torch.arange(0, n, 3)):
        own = x if rows is None else x[rows]
        for weights in (None, random(len(own), 1, 2)[:, 0].square()):
            w = torch.ones(len(own), dtype=torch.float64) if weights is None else weights
            sums = torch.empty(-(-len(own) // size), 1 + d, dtype=torch.float64, device=DEVICE)
            there = [None if value is None else value.to(DEVICE) for value in (x, rows, weights, centre)]
            launchers.launch_sums(*there, 0.5, size, sums)
            for run, found in enumerate(sums.cpu()):
                part = slice(run * size, (run + 1) * size)
                values = (own[part] * 0.5 - centre).numpy()
                wanted = torch.tensor(exact_sums(values, w[part].numpy()), dtype=torch.float64)
                sizes = torch.tensor(exact_sums(abs(values), w[part].numpy()), dtype=torch.float64)
                # Worst seen: 1.1e-15, in the interpreter, which adds up 256 rows of a tile one after the other.
                assert ((found - wanted).abs() <= 3e-15 * sizes).all()


@pytest.mark.usefixtures("all_on_device")
def test_memory_of_the_callers_own() -> None:
    check_memory(kernels, DEVICE)


@pytest.mark.usefixtures("all_on_device")
def test_opcheck() -> None:
    check_op("triton", DEVICE)


@pytest.mark.usefixtures("all_on_device")
def test_gradients_are_matched_exactly() -> None:
    check_matching("triton")


def test_without_the_compiled_cpu_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "failure", lambda: "no compiled CPU module could be loaded (broken)")
    with pytest.raises(
        fc.BackendUnavailableError, match=r"backend 'triton': of caratheodory sums of runs .*\(broken\)"
    ):
        reduce(random(9, 2), backend="triton")
