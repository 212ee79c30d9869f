"""The CUDA kernels of random projections, run by the emulator (on a GPU under `make gpu`), against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICE, on_device
from checks.sketch import DTYPES, KINDS, SIZES, check_close, check_matrix, check_product, check_stays, rows

import flashcoreset as fc
from flashcoreset.kernels import cuda

pytestmark = pytest.mark.usefixtures("emulated_cuda")

# An emulated warp takes its time over the entries of sjlt: of those with 513 per row there are fewer here.
FEW = [(batch, d, dim, min(nnz, 33), offset) for batch, d, dim, nnz, offset in SIZES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", FEW, ids=str)
def test_is_the_product(kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    check_product("cuda", DEVICE, kind, dtype, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matrices_are_the_same_bits(kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    check_matrix("cuda", DEVICE, kind, dtype, size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", range(3))
def test_stays_what_it_was(kind: str, case: int) -> None:
    check_stays("cuda", DEVICE, kind, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_do_not_see_each_other(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, in the wide tile and the narrow one, beside rows that are not finite, and in any memory layout."""
    x = on_device(rows(19, 2500, dtype))
    options: dict[str, Any] = {"dim": 150, "kind": kind, "seed": 1, "nnz": 3}
    whole = cuda.sketch(x, **options)
    for part in (slice(0, 1), slice(5, 9), slice(3, 19)):
        assert torch.equal(cuda.sketch(x[part], **options), whole[part])
    for view in (x.T.contiguous().T, torch.stack([x, x], 2)[:, :, 0]):
        assert torch.equal(cuda.sketch(view, **options), whole)
    bad = x.clone()
    bad[4] = torch.nan
    found = cuda.sketch(bad, **options)
    assert found[4].isnan().any()
    assert torch.equal(found[5:], whole[5:])
    assert torch.equal(found[:4], whole[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_columns_may_come_in_pieces(kind: str) -> None:
    x = on_device(rows(4, 3000, torch.float64))
    options: dict[str, Any] = {"dim": 70, "kind": kind, "nnz": 2, "backend": "cuda"}
    whole = fc.sketch(x, **options)
    for cut in (1, 999, 2048):
        pieces = fc.sketch(x[:, :cut], **options) + fc.sketch(x[:, cut:], offset=cut, **options)
        check_close(pieces, whole, torch.float64)


def test_writes_where_it_is_told() -> None:
    x = on_device(rows(5, 40, torch.float32))
    wide = torch.full((5, 20), 7.0, device=DEVICE)
    out = wide[:, 3:11]
    assert cuda.sketch(x, 8, kind="srht", seed=3, out=out) is out
    assert torch.equal(out, cuda.sketch(x, 8, kind="srht", seed=3))
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 11:] == 7).all()


def test_is_told_what_is_wrong() -> None:
    x = on_device(rows(2, 6, torch.float32))
    with pytest.raises(ValueError, match="out: expected shape"):
        cuda.sketch(x, 4, kind="sjlt", seed=0, out=x.new_empty(3, 4))
    with pytest.raises(ValueError, match="rows that are contiguous"):
        cuda.sketch(x, 4, kind="sjlt", seed=0, out=x.new_empty(4, 2).T)
    with pytest.raises(TypeError, match="out: expected dtype float32, got float64"):
        cuda.sketch(x, 4, kind="sjlt", seed=0, out=x.new_empty(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"nnz: expected an integer in \[1, 4\], got 5"):
        cuda.sketch(x, 4, kind="sjlt", seed=0, nnz=5)
    x[1, 2] = torch.inf
    with pytest.raises(ValueError, match="x must be finite, got inf at row 1, column 2"):
        fc.sketch(x, 4, backend="cuda")
