"""The CUDA kernels of gradient matching, run by the emulator (on a GPU under `make gpu`), against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICE
from checks.matching import BETAS, CHECKS, EPS, Check, normal

from flashcoreset import kernels
from flashcoreset._core import native
from flashcoreset.kernels import cuda
from flashcoreset.matching.rule import Rule

pytestmark = pytest.mark.usefixtures("emulated_cuda")


@pytest.mark.parametrize("check", CHECKS)
def test_equals_the_definition(check: Check) -> None:
    check("cuda", DEVICE)


def problem() -> dict[str, Any]:
    numel = 20_003
    return {
        "g": normal(20, numel, dtype=torch.float32).to(DEVICE),
        "m": normal(numel, seed=1, dtype=torch.float32).to(DEVICE),
        "v": normal(numel, seed=2, dtype=torch.float32).square().to(DEVICE),
        "rule": Rule.adam(4, BETAS, EPS),
        "member": torch.arange(20, device=DEVICE).flip(0),
        "offset": torch.tensor([0, 7, 20], device=DEVICE),
        "top": 300,
    }


def test_schedules_and_layout_change_no_bit() -> None:
    given = problem()
    g, m, v = (given[name] for name in "gmv")
    wide, twice = torch.cat([g, g], 1)[:, : g.shape[1]], torch.stack([m, v], 1)
    module = native.cuda_module()
    emulated = hasattr(module, "set_schedule")
    results = []
    for schedule in ("reverse", "random:7", "forward"):
        if emulated:
            module.set_schedule(schedule)
        for change in ({}, {"g": g.T.contiguous().T}, {"g": wide, "m": twice[:, 0], "v": twice[:, 1]}):
            call = given | change
            history = [call[name] for name in "gmv"]
            results.append(
                [*cuda.top_updates(**call), *cuda.update_history(*history, BETAS, given["member"])]
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bits_are_those_of_the_cpu() -> None:
    """Sums have the same order, of rows in float64: means that tie there tie here."""
    if native.module().ISA == "x86-64-v2":
        pytest.skip("that build has no fused multiply-add")
    given = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in problem().items()
    }
    dims, u = cuda.top_updates(**problem())
    expected_dims, expected_u = kernels.cpu.top_updates(**given)
    assert torch.equal(dims.cpu(), expected_dims)
    assert torch.equal(u.cpu(), expected_u)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulated device alone can be made a poorer one")
def test_memory_is_that_of_the_lists() -> None:
    """24 bytes per dimension of a chunk: less than the rows or directions would take."""
    count, q, numel = 40, 20, 20_000
    c = normal(count, q, dtype=torch.float32)
    m, v = torch.zeros(numel), torch.ones(numel)
    member, offset = torch.arange(count), torch.tensor([0, count])
    rule = Rule.adam(4, BETAS, EPS)
    module = native.cuda_module()
    before = module.allocated_bytes()
    try:
        module.set_device(bytes=before + 24 * (numel + 10) + 100)
        cuda.top_updates(c, m, v, rule, member, offset, 10, length=numel)
        cuda.update_history(c, m, v, BETAS, member, length=numel)
        module.set_device(bytes=before + 20 * numel)
        with pytest.raises(torch.OutOfMemoryError, match="out of device memory"):
            cuda.top_updates(c, m, v, rule, member, offset, 10, length=numel)
    finally:
        module.set_device()
    assert module.allocated_bytes() == before


def test_is_told_what_is_wrong() -> None:
    given = problem()
    with pytest.raises(ValueError, match="dims: expected 1 to 20003 columns, got 20004"):
        cuda.top_updates(**given | {"top": 20_004})
    with pytest.raises(TypeError, match="m: expected dtype float32, got float64"):
        cuda.top_updates(**given | {"m": given["m"].double()})
    with pytest.raises(ValueError, match="v: expected shape"):
        cuda.top_updates(**given | {"v": given["v"][1:]})
    with pytest.raises(ValueError, match="chosen: expected at least 1 row, got 0"):
        cuda.update_history(given["g"], given["m"], given["v"], BETAS, given["member"][:0])
    out = torch.empty(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"begin: expected an integer in \[0, [0-9]*\], got -1"):
        cuda.directions(out, seed=0, begin=-1)
    with pytest.raises(ValueError, match=r"first: expected an integer in \[0, 4294967294\], got 4294967295"):
        cuda.directions(out, seed=0, begin=0, first=2**32 - 1)
    with pytest.raises(ValueError, match="out: expected rows that are contiguous"):
        cuda.directions(out.T, seed=0, begin=0)
