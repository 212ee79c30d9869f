"""The CUDA kernels, run by the emulator: against the definition and the CPU kernels, and what is said where they cannot run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.sparse
import torch
from cases import (
    DEVICE,
    METRICS,
    PLAIN,
    POINT_METRICS,
    VARIANTS,
    Case,
    on_device,
    points,
    select_on_device,
    worst_error,
)

import flashcoreset as fc
from flashcoreset import _native

emulated = pytest.mark.usefixtures("emulated_cuda")
needs_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="scipy's matrices are on the CPU")


@emulated
@pytest.mark.parametrize("case", [*PLAIN, *VARIANTS], ids=str)
def test_follows_the_definition(case: Case) -> None:
    selection = select_on_device(case, "cuda")
    worst_error(case, selection)
    reference = fc.facility_location(case.x, case.k, backend="cpu", **case.options)
    assert selection.gains.dtype == reference.gains.dtype
    if _native.module().ISA == "x86-64-v2":
        return  # which has no fused multiply-add, so that its picks may differ where gains tie
    assert torch.equal(selection.indices, reference.indices)
    assert torch.equal(selection.assignment, reference.assignment)
    assert math.isclose(selection.objective, reference.objective, rel_tol=1e-12, abs_tol=1e-300)


@emulated
@pytest.mark.parametrize("metric", METRICS)
def test_schedules_methods_and_sizes_agree_bit_for_bit(metric: str) -> None:
    x = points(60, 60 if metric == "precomputed" else 5, 3, torch.float32)
    module = _native.cuda_module()
    emulated = hasattr(module, "set_schedule")
    selections = []
    for schedule in ("forward", "reverse", "random:7"):
        if emulated:
            module.set_schedule(schedule)
        for method in ("lazy", "naive"):
            case = Case("", x, 7, {"metric": metric, "method": method, "preselected": [4]})
            selections.append(select_on_device(case, "cuda"))
    if emulated:
        module.set_schedule("forward")
    for other in selections[1:]:
        assert torch.equal(other.indices, selections[0].indices)
        assert torch.equal(other.gains, selections[0].gains)
        assert torch.equal(other.assignment, selections[0].assignment)
        assert other.objective == selections[0].objective


@emulated
@pytest.mark.parametrize("metric", POINT_METRICS)
def test_pairwise(metric: str) -> None:
    for n, m, d in ((1, 1, 1), (7, 97, 3), (5, 4, 257)):
        x, y = points(n, d, 1, torch.float64), points(m, d, 2, torch.float64)
        values = fc.kernels.cuda.pairwise(on_device(x), on_device(y), metric=metric).cpu()
        assert torch.equal(
            fc.kernels.cuda.pairwise(on_device(x), metric=metric),
            fc.kernels.cuda.pairwise(on_device(x), on_device(x.clone()), metric=metric),
        )
        torch.testing.assert_close(
            values, fc.kernels.torch.pairwise(x, y, metric=metric), rtol=1e-12, atol=1e-12
        )


@emulated
@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        ((4, float("nan")), {}, "x must be finite, got NaN at row 4, column 1"),
        ((4, float("inf")), {"metric": "l1", "offset": 9.0}, "x must be finite, got inf at row 4, column 1"),
        ((0, 1e30), {"metric": "dot"}, "overflow"),
        (1e-38, {"metric": "precomputed"}, "scale x or the weights up"),
        ((4, float("nan")), {"method": "stochastic"}, "x must be finite, got NaN at row 4, column 1"),
        (1.0, {"weights": [1, 1, -2, 1, 1, 1]}, "weights must be finite and >= 0, got -2.0 at position 2"),
        (1.0, {"preselected": [3, 1, 1]}, r"preselected must be distinct and in \[0, 6\), got 1 at position"),
        (1.0, {"preselected": [6]}, r"preselected must be distinct and in \[0, 6\), got 6 at position 0"),
    ],
)
def test_bad_data(spoil: tuple[int, float] | float, options: dict[str, Any], words: str) -> None:
    x = torch.arange(12.0).reshape(6, 2) + 1
    if isinstance(spoil, tuple):
        x[spoil[0], 1] = spoil[1]
    else:
        x *= spoil
    with pytest.raises(ValueError, match=words):
        fc.facility_location(on_device(x), 2, backend="cuda", **options)


@needs_cpu
@emulated
def test_sparse_matrices_are_refused() -> None:
    with pytest.raises(fc.BackendUnavailableError, match=r"no CUDA kernel for sparse.*backend='cpu'"):
        fc.facility_location(
            scipy.sparse.csr_matrix(torch.eye(3).numpy()), 1, metric="precomputed", backend="cuda"
        )


def test_without_a_device_the_reason_is_named() -> None:
    if _native.cuda_failure() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(
        fc.BackendUnavailableError, match=r"backend 'cuda': .*(built without|no CUDA device).*backend="
    ):
        fc.facility_location(torch.eye(3), 1, backend="cuda")


def test_the_module_is_built_where_there_is_a_compiler() -> None:
    module = _native._import("_cuda")
    if isinstance(module, str):
        pytest.skip("built without nvcc")
    assert module.ARCHITECTURES
    assert module.unusable(10**6) is not None
