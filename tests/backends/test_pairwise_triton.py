"""Pairwise similarities and distances by the Triton kernels."""

from __future__ import annotations

import platform

import pytest
import torch
from cases import DEVICE, POINT_METRICS, on_device, points

import flashcoreset as fc
from flashcoreset._core import native

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.pairwise import triton as kernels
from flashcoreset.triton_kernels.pairwise import Tile


@pytest.mark.parametrize("metric", POINT_METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_do_not_depend_on_the_tile(
    metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = on_device(points(40, 3, 3, dtype))
    values = kernels.pairwise(x, metric=metric)
    monkeypatch.setattr(Tile, "of", lambda dtype, d: Tile(8, 32, 1, True))
    assert torch.equal(kernels.pairwise(x.T.contiguous().T, x, metric=metric), values)


@pytest.mark.parametrize("metric", ["dot", "l1", "euclidean", "sqeuclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_a_cpu_that_rounds_alike(
    metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain of operations is the CPU kernels', bit for bit: of the build without fused multiply-adds in Triton's
    interpreter, which has none, and of one with them on a device. (Cosine is that of rows which torch brought to unit
    length.)"""
    isa = "x86-64-v2" if DEVICE == "cpu" else "x86-64-v3"
    if isa not in native.available_isas():
        pytest.skip("this processor has no fused multiply-add")
    monkeypatch.setattr(native, "_loaded", native.load_isa(isa))
    for d in (3, 300):
        x = points(30, d, d, dtype)
        expected = fc.kernels.cpu.pairwise(x, metric=metric)
        assert torch.equal(kernels.pairwise(on_device(x), metric=metric).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairwise_of_half_types_is_that_of_float32(dtype: torch.dtype) -> None:
    x = on_device(points(9, 3, 4, dtype))
    assert torch.equal(kernels.pairwise(x, metric="l1"), kernels.pairwise(x.float(), metric="l1"))
