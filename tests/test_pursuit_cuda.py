"""The CUDA kernels of matching pursuit, run by the emulator (on a GPU under `make gpu`), against the definition."""

from __future__ import annotations

import math

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
    make_rows,
    normal,
)

from flashcoreset._core import native
from flashcoreset.pursuit import cuda as kernels

pytestmark = pytest.mark.usefixtures("emulated_cuda", "one_thread")

# Several blocks of rows and tiles of columns, and a part more; half types are converted.
CASES = [
    *((torch.float64, size) for size in [(1, 1), (7, 3), (70, 20), (30, 129), (19, 530)]),
    *((torch.float32, size) for size in [(1, 9), (70, 20), (19, 530)]),
    (torch.float16, (7, 30)),
    (torch.bfloat16, (7, 30)),
]


@pytest.mark.parametrize(("dtype", "size"), CASES, ids=str)
def test_is_the_definition(dtype: torch.dtype, size: tuple[int, int]) -> None:
    check_pursuit("cuda", DEVICE, "clustered", dtype, size, 5)
    if size[1] > 2:  # on a circle every geodesic is the same
        check_frank_wolfe("cuda", DEVICE, "clustered", dtype, size, 5)


def test_cases_worked_by_hand() -> None:
    check_by_hand("cuda", DEVICE)


@pytest.mark.parametrize("kind", ["scaled", "repeated"])
def test_rows_of_all_magnitudes_duplicates_and_zeros(kind: str) -> None:
    check_pursuit("cuda", DEVICE, kind, torch.float64, (40, 20), 12)
    check_pursuit("cuda", DEVICE, kind, torch.float32, (40, 20), 4)
    check_frank_wolfe("cuda", DEVICE, kind, torch.float64, (40, 20), 8)


def test_as_many_picks_as_rows() -> None:
    check_pursuit("cuda", DEVICE, "normal", torch.float64, (8, 20), 8)


def test_ties_go_to_the_lowest_index() -> None:
    check_ties("cuda", DEVICE, 20, 6)


def test_ends_where_the_residual_vanishes() -> None:
    check_ends("cuda", DEVICE)


def test_nearly_dependent_rows_are_passed_over() -> None:
    check_nearly_dependent("cuda", DEVICE, 8)


def test_less_memory_gives_the_same() -> None:
    check_less_memory(kernels, DEVICE, (40, 30), 9, [0, 3, 9, 10])


def test_memory_is_that_of_the_columns() -> None:
    check_memory(kernels, DEVICE)


def test_ctrl_c_is_heard_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    check_interrupt(kernels, DEVICE, monkeypatch)


def test_half_types_compute_with_their_exact_values() -> None:
    check_half_types("cuda", DEVICE)


def test_views() -> None:
    check_views("cuda", DEVICE)


def test_opcheck_and_compile() -> None:
    check_opcheck_and_compile("cuda", DEVICE, 3)


def test_match_gradients() -> None:
    check_match_gradients("cuda", DEVICE)


def test_needs_the_cpu_module(monkeypatch: pytest.MonkeyPatch) -> None:
    check_needs_the_cpu_module("cuda", DEVICE, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value: float, dtype: torch.dtype) -> None:
    check_bad_values("cuda", DEVICE, value, dtype)


def test_overflow_is_refused() -> None:
    check_overflow("cuda", DEVICE)


def test_weights_that_round_to_zero() -> None:
    check_weights_that_round_to_zero("cuda", DEVICE)


def test_schedules_change_no_bit() -> None:
    g = make_rows("clustered", 50, 300).float().to(DEVICE)
    module, emulated = native.cuda_module(), DEVICE == "cpu"
    results = []
    for schedule in ("reverse", "random:7", "forward"):
        if emulated:
            module.set_schedule(schedule)
        target = g.double().sum(0)
        results.append(
            [
                *kernels.orthogonal_matching_pursuit(g, target, 9),
                *kernels.orthogonal_matching_pursuit(g, target, 9, memory_budget=0),
                *kernels.frank_wolfe(g, target, 9),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_rows_are_summed_in_pieces(dtype: torch.dtype) -> None:
    """More columns than a block takes at a time; products have the same bits whatever other products are computed along with
    them."""
    g = normal(5, 9_001).to(DEVICE, dtype)
    which = torch.arange(5, device=DEVICE)
    together, alone, listed = g.new_empty(3, 5, 5, dtype=torch.float64)
    kernels._products(g, None, g, which, together, which.flip(0))
    for v in range(5):
        kernels._products(g, None, g, which[v:][:1], alone, which[v:][:1])
    kernels._products(g, which.flip(0), g, which, listed, which)
    squares = g.new_empty(5, dtype=torch.float64)
    kernels._squares(g, squares)
    assert torch.equal(together.flip(0), alone)
    assert torch.equal(listed.flip(1), alone)
    assert torch.equal(squares, alone.diag())
    torch.testing.assert_close(alone, g.double() @ g.double().T, rtol=1e-13, atol=1e-10)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulated device alone can be made a poorer one")
def test_memory_that_is_not_there_is_told() -> None:
    module = native.cuda_module()
    before = module.allocated_bytes()
    g = normal(5, 9_001)
    try:
        module.set_device(bytes=before + 100)
        with pytest.raises(torch.OutOfMemoryError, match="out of device memory"):
            kernels.frank_wolfe(g, g.sum(0), 2)
    finally:
        module.set_device()
    assert module.allocated_bytes() == before


def test_is_told_what_is_wrong() -> None:
    g, first = make_rows("normal", 4, 3).to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    out, all_of = g.new_empty(1, 4), g.new_empty(4)
    with pytest.raises(ValueError, match=r"vectors: expected shape \(4, 3\), got \(4, 2\)"):
        kernels._products(g, None, g[:, :2], first, out, first)
    with pytest.raises(ValueError, match=r"out: expected shape \(1, 4\), got \(1, 3\)"):
        kernels._products(g, None, g, first, out[:, :3].contiguous(), first)
    with pytest.raises(ValueError, match="rows: expected at least 1 row, got 0"):
        kernels._products(g, first[:0], g, first, out, first)
    with pytest.raises(ValueError, match=r"places: expected shape \(1,\), got \(4,\)"):
        kernels._products(g, None, g, first, out, first.expand(4).contiguous())
    with pytest.raises(ValueError, match="g: expected at least 1 row and 1 column, rows contiguous"):
        kernels._squares(g.T, all_of[:3])
    with pytest.raises(TypeError, match="g: expected dtype float32 or float64, got float16"):
        kernels._squares(g.half(), all_of)
    with pytest.raises(ValueError, match=r"numbers: expected shape \(2,\), got \(1,\)"):
        kernels._pick(all_of, out, first, all_of[:1], all_of, False, all_of.clone(), all_of[:2].clone())
    with pytest.raises(ValueError, match=r"target: expected shape \(3,\), got \(4,\)"):
        kernels._residual(g, all_of, first, all_of[:1], all_of.clone()[:3])
    with pytest.raises(TypeError, match="weights: expected dtype float64, got float32"):
        kernels._residual(g, all_of[:3], first, all_of[:1].float(), all_of.clone()[:3])
