"""sample_scores by the Triton kernel, in Triton's interpreter."""

from __future__ import annotations

import math
import platform

import pytest
import torch
from cases import on_device, points

import flashcoreset as fc

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1, 10, 1025, 9000])
def test_sample_scores(classes: int, dtype: torch.dtype) -> None:
    """Rows of one block and of several, some learned, against the definition in float64."""
    x = (3 * points(12, classes, 1)).to(dtype)
    targets = torch.arange(12) * 7 % classes
    x[:4].scatter_(1, targets[:4, None], 9.0)
    got = fc.sample_scores(on_device(x), on_device(targets), backend="triton")
    wanted = fc.sample_scores(x.double(), targets, backend="torch")
    for name in ("loss", "entropy", "margin", "el2n"):
        error = (getattr(got, name).cpu().double() - getattr(wanted, name)).abs() / (
            1 + getattr(wanted, name).abs()
        )
        # Worst seen: 8e-8 and 4e-15.
        assert float(error.max()) <= (2e-14 if dtype == torch.float64 else 1e-6), name
    assert torch.equal(got.correct.cpu(), wanted.correct)


def test_sample_scores_of_masked_tokens_and_bad_values() -> None:
    x = points(15, 20, 2, torch.float32).reshape(5, 3, 20)
    targets = torch.arange(15).reshape(5, 3)
    x[2, 1] = math.nan
    device_x, device_targets = on_device(x), on_device(targets)
    with pytest.raises(ValueError, match="logits must be finite, got NaN at sample 2, token 1, class 0"):
        fc.sample_scores(device_x, device_targets, backend="triton")
    with pytest.raises(ValueError, match=r"targets must be in \[0, 20\), got 20 at sample 2"):
        fc.sample_scores(device_x[:, :1], device_targets[:, :1] + 14, backend="triton")
    mask = torch.ones_like(targets)
    mask[2, 1] = 0
    got = fc.sample_scores(device_x, device_targets, on_device(mask), backend="triton")
    wanted = fc.sample_scores(x, targets, mask, backend="torch")
    torch.testing.assert_close(got.loss.cpu(), wanted.loss)
