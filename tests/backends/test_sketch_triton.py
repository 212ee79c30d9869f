"""The Triton kernels of random projections, in Triton's interpreter (on a GPU under `make gpu`): rows that do not see each
other, launches, TF32."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from cases import DEVICE, on_device
from checks.sketch import KINDS, NORMAL, rows

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.kernels import triton as kernels
from flashcoreset.triton_kernels import sketch as launchers


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(kind: str) -> None:
    """Bit for bit, beside rows that are not finite, and in any memory layout.

    The interpreter leaves products to NumPy, whose rounding depends on a row's place in the tile: there sums are exact.
    """
    x = on_device(rows(37, 300, torch.float32))
    if DEVICE == "cpu":
        x = (8 * x).round()
        if kind in NORMAL:
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


@pytest.mark.parametrize("kind", KINDS)
def test_tf32_is_close(kind: str) -> None:
    """On a GPU products then have 10 bits of significand, half a unit of which is 5e-4; the interpreter has all of float32's."""
    x = on_device(rows(3, 200, torch.float32))
    exact = kernels.sketch(x, 40, kind=kind, seed=2)
    found = kernels.sketch(x, 40, kind=kind, seed=2, allow_tf32=True)
    assert (found - exact).abs().max() <= 1e-3 * exact.abs().max()
