"""The CUDA kernels of random projections, run by the emulator (on a GPU under `make gpu`), against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICE, on_device
from test_sketch import DTYPES, KINDS, SIZES, check_close, rows

import flashcoreset as fc
from flashcoreset.kernels import cuda

pytestmark = pytest.mark.usefixtures("emulated_cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_the_product(kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    batch, d, dim, nnz, offset = size
    x = rows(batch, d, dtype)
    options: dict[str, Any] = {"kind": kind, "seed": 2**40 + 3, "nnz": nnz, "offset": offset}
    matrix = fc.projection_matrix(d, dim, dtype=torch.float64, backend="torch", **options)
    found = fc.sketch(on_device(x), dim, backend="cuda", **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.device.type == DEVICE
    check_close(found.cpu(), x.double() @ matrix, dtype)
