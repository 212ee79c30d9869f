"""The Triton kernels of gradient matching, in Triton's interpreter (on a GPU under `make gpu`), against the definition."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE
from checks.matching import BETAS, CHECKS, EPS, Check, normal

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.kernels import triton as kernels
from flashcoreset.matching.rule import Rule
from flashcoreset.triton_kernels import matching as launchers


@pytest.mark.parametrize("check", CHECKS)
def test_equals_the_definition(check: Check) -> None:
    check("triton", DEVICE)


def test_chunks_and_layout_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    numel = 5_003
    g = normal(20, numel, dtype=torch.float32).to(DEVICE)
    m = normal(numel, seed=1, dtype=torch.float32).to(DEVICE)
    v = normal(numel, seed=2, dtype=torch.float32).square().to(DEVICE)
    member, offset = torch.arange(20, device=DEVICE).flip(0), torch.tensor([0, 7, 20], device=DEVICE)
    rule = Rule.adam(4, BETAS, EPS)

    def results(g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        return [
            *kernels.top_updates(g, m, v, rule, member, offset, 50),
            *kernels.update_history(g, m, v, BETAS, member),
        ]

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
    g = normal(8, numel, dtype=torch.float32).to(DEVICE)
    m, v = torch.zeros(numel, device=DEVICE), torch.ones(numel, device=DEVICE)
    member, offset = torch.arange(8, device=DEVICE), torch.tensor([0, 8], device=DEVICE)
    kernels.top_updates(g, m, v, Rule.adam(9, BETAS, EPS), member, offset, top)
    assert len(passed) == 2  # chunks of 8,192 dimensions and of the rest
    assert 50 < sum(count for (count,) in passed) < 400
