"""The Triton kernels, in Triton's interpreter: against the definition and the reference, and the errors if they cannot run."""

from __future__ import annotations

import platform
from typing import Any

import processes
import pytest
import torch
from cases import (
    DEVICE,
    METRICS,
    data,
    on_device,
)

import flashcoreset as fc

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.facility_location import triton as kernels
from flashcoreset.triton_kernels import facility_location as launchers
from flashcoreset.triton_kernels.pairwise import Tile


def assert_same(a: fc.Selection, b: fc.Selection) -> None:
    """Bit for bit."""
    for name in ("indices", "gains", "weights", "assignment"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.objective == b.objective


# Tests of the interpreter, or of the messages that a machine without a GPU gives.
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter on the CPU")


@interpreted
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_the_work_cannot_be_seen(
    metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = data(metric, 27, 1, dtype)
    options: dict[str, Any] = {"metric": metric, "backend": "triton", "weights": torch.arange(27) % 4}
    naive = fc.facility_location(x, 4, method="naive", memory_budget=0, **options)
    assert_same(naive, fc.facility_location(x, 4, **options))  # of the matrix
    monkeypatch.setattr(kernels, "_BATCH", 3)  # lazy evaluation evaluates some candidates only
    assert_same(naive, fc.facility_location(x, 4, memory_budget=0, **options))
    # Two programs for the same candidates, each with two tiles of clients.
    monkeypatch.setattr(Tile, "of", lambda dtype, d: Tile(16, 8, 1, True))
    monkeypatch.setattr(launchers, "_PROGRAMS", 4)
    assert_same(naive, fc.facility_location(x, 4, method="naive", memory_budget=0, **options))


def test_ties_go_to_the_lowest_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BATCH", 3)
    x = on_device(torch.tensor([[0.0, 4.0], [4.0, 0.0]]).repeat(20, 1))
    selection = fc.facility_location(x, 5, metric="l1", backend="triton")
    assert selection.indices.tolist() == [0, 1, 2, 3, 4]
    assert selection.gains[2:].tolist() == [0, 0, 0]
    assert selection.assignment.tolist() == [0, 1, 2, 3, 4, *[1, 0] * 17, 1]


REFUSED = """
import sys, torch, flashcoreset as fc
assert "triton" not in sys.modules
if {blocked}: sys.modules["triton"] = None
try:
    fc.facility_location(torch.eye(2), 1, backend="triton")
except fc.BackendUnavailableError as error:
    print(error)
"""


def test_without_triton_the_message_says_how_to_get_it() -> None:
    done = processes.run(REFUSED.format(blocked=True))
    assert "pip install triton" in done.stdout, done.stderr


@interpreted
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    message = processes.run(REFUSED.format(blocked=False), TRITON_INTERPRET="0").stdout.strip()
    assert message.startswith("backend 'triton': ")
    assert ".cuda()" in message if torch.cuda.is_available() else "torch finds none" in message
    assert "backend='cpu'" in message


def test_other_devices_are_refused() -> None:
    from flashcoreset._core.dispatch import triton_failure

    assert "backend='torch'" in str(triton_failure(torch.device("meta")))
    assert triton_failure(torch.device("cuda")) is None
