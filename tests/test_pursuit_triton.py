"""The Triton kernels of matching pursuit, in Triton's interpreter (on a GPU under `make gpu`), against the definition.

An interpreted program takes milliseconds: sizes are few.
"""

from __future__ import annotations

import math
import platform

import pytest
import torch
from cases import DEVICE
from checks.pursuit import (
    check_bad_values,
    check_by_hand,
    check_ends,
    check_frank_wolfe,
    check_half_types,
    check_interrupt,
    check_less_memory,
    check_match_gradients,
    check_memory,
    check_nearly_dependent,
    check_needs_the_cpu_module,
    check_opcheck_and_compile,
    check_overflow,
    check_pursuit,
    check_ties,
    check_views,
    check_weights_that_round_to_zero,
    normal,
)

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.pursuit import triton as kernels
from flashcoreset.triton_kernels import pursuit as launchers

pytestmark = pytest.mark.usefixtures("one_thread")

# Several blocks of rows and tiles of columns, and a part more; half types are converted.
CASES = [
    *((torch.float64, size) for size in [(1, 1), (7, 3), (70, 20), (30, 129), (19, 530)]),
    *((torch.float32, size) for size in [(1, 9), (70, 20), (19, 530)]),
    (torch.float16, (7, 30)),
    (torch.bfloat16, (7, 30)),
]


@pytest.mark.parametrize(("dtype", "size"), CASES, ids=str)
def test_is_the_definition(dtype: torch.dtype, size: tuple[int, int]) -> None:
    check_pursuit("triton", DEVICE, "clustered", dtype, size, 4)
    if size[1] > 2:  # on a circle every geodesic is the same
        check_frank_wolfe("triton", DEVICE, "clustered", dtype, size, 4)


def test_cases_worked_by_hand() -> None:
    check_by_hand("triton", DEVICE)


@pytest.mark.parametrize("kind", ["scaled", "repeated"])
def test_rows_of_all_magnitudes_duplicates_and_zeros(kind: str) -> None:
    check_pursuit("triton", DEVICE, kind, torch.float64, (40, 20), 8)
    check_pursuit("triton", DEVICE, kind, torch.float32, (40, 20), 4)
    check_frank_wolfe("triton", DEVICE, kind, torch.float64, (40, 20), 5)


def test_as_many_picks_as_rows() -> None:
    check_pursuit("triton", DEVICE, "normal", torch.float64, (8, 20), 8)


def test_ties_go_to_the_lowest_index() -> None:
    check_ties("triton", DEVICE, 20, 6)


def test_ends_where_the_residual_vanishes() -> None:
    check_ends("triton", DEVICE)


def test_nearly_dependent_rows_are_passed_over() -> None:
    check_nearly_dependent("triton", DEVICE, 8)


def test_less_memory_gives_the_same() -> None:
    check_less_memory(kernels, DEVICE, (40, 30), 7, [0, 7, 8])


def test_memory_is_that_of_the_columns() -> None:
    check_memory(kernels, DEVICE)


def test_ctrl_c_is_heard_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    check_interrupt(kernels, DEVICE, monkeypatch)


def test_half_types_compute_with_their_exact_values() -> None:
    check_half_types("triton", DEVICE)


def test_views() -> None:
    check_views("triton", DEVICE)


def test_opcheck_and_compile() -> None:
    check_opcheck_and_compile("triton", DEVICE, 3)


def test_match_gradients() -> None:
    check_match_gradients("triton", DEVICE)


def test_needs_the_cpu_module(monkeypatch: pytest.MonkeyPatch) -> None:
    check_needs_the_cpu_module("triton", DEVICE, monkeypatch)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value: float, dtype: torch.dtype) -> None:
    check_bad_values("triton", DEVICE, value, dtype)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # NumPy's, in the interpreter
def test_overflow_is_refused() -> None:
    check_overflow("triton", DEVICE)


def test_weights_that_round_to_zero() -> None:
    check_weights_that_round_to_zero("triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_product_is_the_same_bits_whatever_it_is_computed_along_with(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other vectors, other rows, pieces of the columns in one program or in several."""
    monkeypatch.setattr(launchers, "PIECE", 2 * launchers.STEP)
    g = normal(40, 5 * launchers.STEP + 3).to(DEVICE, dtype)
    which = torch.arange(6, device=DEVICE)
    results = []
    for few in (0, 1_000):  # blocks, below which pieces are programs of their own
        monkeypatch.setattr(launchers, "_FEW", few)
        together, alone, listed = g.new_empty(3, 6, 40, dtype=torch.float64)
        launchers.launch_products(g, None, g, which, together, which.flip(0))
        for v in range(6):
            launchers.launch_products(g, None, g, which[v:][:1], alone, which[v:][:1])
        order = torch.arange(40, device=DEVICE).flip(0)
        launchers.launch_products(g, order, g, which, listed, which)
        squares = g.new_empty(40, dtype=torch.float64)
        launchers.launch_squares(g, squares)
        results += [together.flip(0), alone, listed.flip(1), torch.cat([alone[:, :6].diag(), squares[6:]])]
        assert torch.equal(squares[:6], alone[:, :6].diag())
    for other in results[1:3] + results[4:7]:
        assert torch.equal(results[0], other)
    assert torch.equal(results[3], results[7])
    torch.testing.assert_close(results[0], g[:6].double() @ g.double().T, rtol=1e-13, atol=1e-10)
