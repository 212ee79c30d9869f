"""Pairwise similarities and distances on every backend, against the definition."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from cases import DEVICE, POINT_METRICS, on_device, points
from conftest import EVERY_BACKEND

import flashcoreset as fc
from flashcoreset._core.dispatch import kernels_of


def kernels(backend: str) -> ModuleType:
    return kernels_of(backend, "pairwise")


@EVERY_BACKEND
@pytest.mark.parametrize("metric", POINT_METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairwise(metric: str, dtype: torch.dtype, backend: str) -> None:
    pairwise = kernels(backend).pairwise
    for n, m, d in ((1, 1, 1), (7, 97, 3), (5, 4, 257)):
        x, y = points(n, d, 1, dtype), points(m, d, 2, dtype)
        y[0] = x[0]
        values = pairwise(on_device(x), on_device(y), metric=metric).cpu()
        exact = fc.kernels.torch.pairwise(x.double(), y.double(), metric=metric)
        # 256 roundings in a row, whose random walk is 16 steps long; the worst seen is 7.
        tolerance = 16 * torch.finfo(dtype).eps * float(exact.abs().max())
        torch.testing.assert_close(values.double(), exact, rtol=0, atol=tolerance)
        if d < 257:
            assert torch.equal(pairwise(on_device(y), on_device(x), metric=metric).cpu(), values.T)
        if metric not in ("cosine", "dot"):
            assert values[0, 0] == 0
        # Points among themselves.
        own = pairwise(on_device(x), metric=metric)
        assert torch.equal(own, pairwise(on_device(x), on_device(x.clone()), metric=metric))
    x = on_device(points(40, 3, 3, dtype))
    values = pairwise(x, metric=metric)
    out = torch.full((40, 41), 9, dtype=dtype, device=DEVICE)
    assert pairwise(x.T.contiguous().T, x, metric=metric, out=out[:, :40]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:, :40], values)
    assert (out[:, 40] == 9).all()
    assert torch.equal(pairwise(x[3:5], x[7:8], metric=metric), values[3:5, 7:8])
