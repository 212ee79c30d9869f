"""The Triton kernels of the Carathéodory reduction, in Triton's interpreter (on a GPU under `make gpu`): sums of runs."""

from __future__ import annotations

import platform

import pytest
import torch
from cases import DEVICE
from checks.caratheodory import exact_sums, random

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.caratheodory.problem import Runs
from flashcoreset.triton_kernels import caratheodory as launchers


@pytest.mark.parametrize("size", [1, 7, 600])
@pytest.mark.parametrize("d", [1, 5, 40])
def test_sums_of_runs(monkeypatch: pytest.MonkeyPatch, d: int, size: int) -> None:
    """Over several tiles of rows and columns, pieces and runs; with and without rows and weights."""
    monkeypatch.setattr(launchers, "COLUMNS", 16)
    monkeypatch.setattr(launchers, "TILE", 1 << 12)
    n = 700 if size == 600 else 40
    x = random(n, d)
    centre = random(1, d, 1)[0]
    for rows in (None, torch.arange(0, n, 3)):
        own = x if rows is None else x[rows]
        for weights in (None, random(len(own), 1, 2)[:, 0].square()):
            w = torch.ones(len(own), dtype=torch.float64) if weights is None else weights
            sums = torch.empty(-(-len(own) // size), 1 + d, dtype=torch.float64, device=DEVICE)
            there = [None if value is None else value.to(DEVICE) for value in (x, rows, weights)]
            launchers.launch_sums(Runs(*there, size), centre.to(DEVICE), 0.5, sums)
            for run, found in enumerate(sums.cpu()):
                part = slice(run * size, (run + 1) * size)
                values = (own[part] * 0.5 - centre).numpy()
                wanted = torch.tensor(exact_sums(values, w[part].numpy()), dtype=torch.float64)
                sizes = torch.tensor(exact_sums(abs(values), w[part].numpy()), dtype=torch.float64)
                # Worst seen: 1.1e-15, in the interpreter, which adds up 256 rows of a tile one after the other.
                assert ((found - wanted).abs() <= 3e-15 * sizes).all()
