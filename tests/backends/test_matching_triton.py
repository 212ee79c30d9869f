"""The Triton kernels of gradient matching, in Triton's interpreter (on a GPU under `make gpu`): chunks, layouts, the sieve."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DEVICE
from checks.matching import history, moved, normal

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.kernels import Gradients, UpdatesProblem
from flashcoreset.kernels import triton as kernels
from flashcoreset.triton_kernels import matching as launchers


def test_chunks_and_layout_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    numel = 5_003
    past = history(
        normal(numel, seed=1, dtype=torch.float32), normal(numel, seed=2, dtype=torch.float32).square(), 4
    )
    member, offset = torch.arange(20).flip(0), torch.tensor([0, 7, 20])
    rows = Gradients(normal(20, numel, dtype=torch.float32))
    given = moved(UpdatesProblem(rows, past, member, offset, 50), DEVICE)

    def results(g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        problem = replace(given, g=Gradients(g), history=replace(given.history, m=m, v=v))
        step = kernels.update_history(problem.g, problem.history, problem.member)
        return [*kernels.top_updates(problem), *step]

    g, m, v = given.g.values, given.history.m, given.history.v
    expected = results(g, m, v)
    wide = torch.cat([g, g], 1)[:, :numel]
    twice = torch.stack([m, v], 1)
    found = [results(g.T.contiguous().T, m, v), results(wide, twice[:, 0], twice[:, 1])]
    monkeypatch.setattr(launchers, "_FIRST_CHUNK", 1)
    monkeypatch.setattr(launchers, "_CHUNK", 3_000)
    monkeypatch.setattr(launchers, "_PRODUCTS", 1)
    assert len(list(launchers.chunks(numel, 2, 50))) == 8
    found.append(results(g, m, v))
    for other in found:
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


def test_few_dimensions_pass_the_sieve(monkeypatch: pytest.MonkeyPatch) -> None:
    """With random data top ln(D / top) dimensions pass after the first chunk."""
    passed = []
    weigh = launchers.weigh_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(**arguments: Any) -> None:
                weigh[grid](**arguments)
                if arguments["SIEVED"]:
                    passed.append(arguments["found"].tolist())

            return launch

    monkeypatch.setattr(launchers, "weigh_kernel", Watched())
    numel, top = 20_000, 100
    past = history(torch.zeros(numel), torch.ones(numel), 9)
    g = Gradients(normal(8, numel, dtype=torch.float32))
    problem = UpdatesProblem(g, past, torch.arange(8), torch.tensor([0, 8]), top)
    kernels.top_updates(moved(problem, DEVICE))
    assert len(passed) == 2  # chunks of 8,192 dimensions and of the rest
    assert 50 < sum(count for (count,) in passed) < 400
