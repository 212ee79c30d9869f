"""The Triton kernels of matching pursuit, in Triton's interpreter (on a GPU under `make gpu`): products in any company."""

from __future__ import annotations

import platform

import pytest
import torch
from cases import DEVICE
from checks.pursuit import normal

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.triton_kernels import pursuit as launchers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_product_is_the_same_bits_whatever_it_is_computed_along_with(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other vectors, other rows, pieces of the columns in one program or in several."""
    monkeypatch.setattr(launchers, "PIECE", 2 * launchers.STEP)
    g = normal(40, 5 * launchers.STEP + 3).to(DEVICE, dtype)
    which = torch.arange(6, device=DEVICE)
    results = []
    for few in (0, 1_000):  # blocks, below which pieces are programs of their own
        monkeypatch.setattr(launchers, "_FEW", few)
        together, alone, listed = g.new_empty(3, 6, 40, dtype=torch.float64)
        launchers.launch_products(g, None, g, which, together, which.flip(0))
        for v in range(6):
            launchers.launch_products(g, None, g, which[v:][:1], alone, which[v:][:1])
        order = torch.arange(40, device=DEVICE).flip(0)
        launchers.launch_products(g, order, g, which, listed, which)
        squares = g.new_empty(40, dtype=torch.float64)
        launchers.launch_squares(g, squares)
        results += [together.flip(0), alone, listed.flip(1), torch.cat([alone[:, :6].diag(), squares[6:]])]
        assert torch.equal(squares[:6], alone[:, :6].diag())
    for other in results[1:3] + results[4:7]:
        assert torch.equal(results[0], other)
    assert torch.equal(results[3], results[7])
    torch.testing.assert_close(results[0], g[:6].double() @ g.double().T, rtol=1e-13, atol=1e-10)
