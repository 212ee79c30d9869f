"""The CUDA kernels of random projections, run by the emulator (on a GPU under `make gpu`): rows that do not see each other, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import on_device
from checks.sketch import KINDS, rows

from flashcoreset.kernels import cuda

pytestmark = pytest.mark.usefixtures("emulated_cuda")


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
