"""The Triton kernels of random projections, in Triton's interpreter (on a GPU under `make gpu`), against the definition.

An interpreted tile takes ten milliseconds: sizes are few.
"""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from cases import DEVICE, on_device
from checks.sketch import DTYPES, KINDS, check_close, check_matrix, check_product, check_stays, rows

import flashcoreset as fc

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.kernels import triton as kernels
from flashcoreset.triton_kernels import sketch as launchers

# (rows of x, D, dim, nnz, offset): several tiles of each, a piece more, all sizes of Hadamard blocks, large offsets.
SIZES = [
    (1, 1, 1, 1, 0),
    (2, 7, 5, 1, 3),
    (5, 97, 130, 3, 11),
    (9, 4500, 64, 4, 1000),
    (35, 300, 129, 129, 4097),
    (3, 40, 4500, 2, 2**40),
    (2, 130, 2000, 1, 5),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_the_product(kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    check_product("triton", DEVICE, kind, dtype, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matrices_are_the_same_bits(kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    check_matrix("triton", DEVICE, kind, dtype, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", range(3))
def test_stays_what_it_was(kind: str, case: int) -> None:
    check_stays("triton", DEVICE, kind, case)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(kind: str) -> None:
    """Bit for bit, beside rows that are not finite, and in any memory layout.

    The interpreter leaves products to NumPy, whose rounding depends on a row's place in the tile: there sums are exact.
    """
    x = on_device(rows(37, 300, torch.float32))
    if DEVICE == "cpu":
        x = (8 * x).round()
        if kind == "gaussian":
            x[:, 1:] = 0
    options: dict[str, Any] = {"dim": 150, "kind": kind, "seed": 1, "nnz": 3}
    whole = kernels.sketch(x, **options)
    for part in (slice(0, 1), slice(5, 9), slice(3, 37)):
        assert torch.equal(kernels.sketch(x[part], **options), whole[part])
    assert torch.equal(kernels.sketch(x.T.contiguous().T, **options), whole)
    bad = x.clone()
    bad[4] = torch.nan
    found = kernels.sketch(bad, **options)
    assert found[4].isnan().all()
    assert torch.equal(found[5:], whole[5:])


@pytest.mark.parametrize("kind", KINDS)
def test_launches_may_be_cut_anywhere(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is cut by columns, by rows and by outputs."""
    x = on_device(rows(33, 1100, torch.float32))
    options: dict[str, Any] = {"dim": 140, "kind": kind, "seed": 5, "nnz": 2}
    whole = kernels.sketch(x, **options)
    for name, value in (("_OPERATIONS", 1), ("_SUMS", 1), ("_OUTPUTS", 128)):
        monkeypatch.setattr(launchers, name, value)
        assert torch.equal(kernels.sketch(x, **options), whole)


def test_columns_may_come_in_pieces() -> None:
    x = on_device(rows(4, 1500, torch.float64))
    for kind in KINDS:
        options: dict[str, Any] = {"dim": 70, "kind": kind, "nnz": 2, "backend": "triton"}
        whole = fc.sketch(x, **options)
        pieces = fc.sketch(x[:, :999], **options) + fc.sketch(x[:, 999:], offset=999, **options)
        check_close(pieces, whole, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_tf32_is_close(kind: str) -> None:
    """On a GPU products then have 10 bits of significand, half a unit of which is 5e-4; the interpreter has all of float32's."""
    x = on_device(rows(3, 200, torch.float32))
    exact = kernels.sketch(x, 40, kind=kind, seed=2)
    found = kernels.sketch(x, 40, kind=kind, seed=2, allow_tf32=True)
    assert (found - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_writes_where_it_is_told() -> None:
    x = on_device(rows(5, 40, torch.float16))
    wide = torch.full((5, 20), 7.0, device=DEVICE)
    out = wide[:, 3:11]
    assert kernels.sketch(x, 8, kind="srht", seed=3, out=out) is out
    assert torch.equal(out, kernels.sketch(x, 8, kind="srht", seed=3))
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 11:] == 7).all()


def test_is_told_what_is_wrong() -> None:
    x = on_device(rows(2, 6, torch.bfloat16))
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="x must be finite, got NaN at row 1, column 2"):
        fc.sketch(x, 4, backend="triton")
