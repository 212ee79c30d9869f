"""The CUDA kernels of gradient matching, run by the emulator (on a GPU under `make gpu`): schedules, bits, memory, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DEVICE
from checks.matching import history, moved, normal

from flashcoreset import kernels
from flashcoreset._core import native
from flashcoreset.kernels import Gradients, UpdatesProblem, cuda

pytestmark = pytest.mark.usefixtures("emulated_cuda")


def problem() -> UpdatesProblem:
    numel, dtype = 20_003, torch.float32
    past = history(normal(numel, seed=1, dtype=dtype), normal(numel, seed=2, dtype=dtype).square(), 4)
    g = Gradients(normal(20, numel, dtype=dtype))
    member, offset = torch.arange(20).flip(0), torch.tensor([0, 7, 20])
    return moved(UpdatesProblem(g, past, member, offset, 300), DEVICE)


def test_schedules_and_layout_change_no_bit() -> None:
    given = problem()
    past, rows = given.history, given.g.values
    wide, twice = torch.cat([rows, rows], 1)[:, : rows.shape[1]], torch.stack([past.m, past.v], 1)
    strided = replace(past, m=twice[:, 0], v=twice[:, 1])
    module = native.cuda_module()
    emulated = hasattr(module, "set_schedule")
    results = []
    for schedule in ("reverse", "random:7", "forward"):
        if emulated:
            module.set_schedule(schedule)
        for g, own in ((rows, past), (rows.T.contiguous().T, past), (wide, strided)):
            call = replace(given, g=Gradients(g), history=own)
            results.append([*cuda.top_updates(call), *cuda.update_history(call.g, own, given.member)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bits_are_those_of_the_cpu() -> None:
    """Sums have the same order, of rows in float64: means that tie there tie here."""
    if native.module().ISA == "x86-64-v2":
        pytest.skip("that build has no fused multiply-add")
    dims, u = cuda.top_updates(problem())
    expected_dims, expected_u = kernels.cpu.top_updates(moved(problem(), "cpu"))
    assert torch.equal(dims.cpu(), expected_dims)
    assert torch.equal(u.cpu(), expected_u)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulated device alone can be made a poorer one")
def test_memory_is_that_of_the_lists() -> None:
    """24 bytes per dimension of a chunk: less than the rows or directions would take."""
    count, q, numel = 40, 20, 20_000
    past = history(torch.zeros(numel), torch.ones(numel), 4)
    g = Gradients(normal(count, q, dtype=torch.float32), 0, numel)
    given = UpdatesProblem(g, past, torch.arange(count), torch.tensor([0, count]), 10)
    module = native.cuda_module()
    before = module.allocated_bytes()
    try:
        module.set_device(bytes=before + 24 * (numel + 10) + 100)
        cuda.top_updates(given)
        cuda.update_history(g, past, given.member)
        module.set_device(bytes=before + 20 * numel)
        with pytest.raises(torch.OutOfMemoryError, match="out of device memory"):
            cuda.top_updates(given)
    finally:
        module.set_device()
    assert module.allocated_bytes() == before


def test_is_told_what_is_wrong() -> None:
    given = problem()
    past = given.history
    with pytest.raises(ValueError, match="dims: expected 1 to 20003 columns, got 20004"):
        cuda.top_updates(replace(given, top=20_004))
    with pytest.raises(TypeError, match="m: expected dtype float32, got float64"):
        cuda.top_updates(replace(given, history=replace(past, m=past.m.double(), v=past.v.double())))
    with pytest.raises(ValueError, match="m: expected shape"):
        cuda.top_updates(replace(given, history=replace(past, m=past.m[1:], v=past.v[1:])))
    with pytest.raises(ValueError, match="chosen: expected at least 1 row, got 0"):
        cuda.update_history(given.g, past, given.member[:0])
    out = torch.empty(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"begin: expected an integer in \[0, [0-9]*\], got -1"):
        cuda.directions(out, seed=0, begin=-1)
    with pytest.raises(ValueError, match=r"first: expected an integer in \[0, 4294967294\], got 4294967295"):
        cuda.directions(out, seed=0, begin=0, first=2**32 - 1)
    with pytest.raises(ValueError, match="out: expected rows that are contiguous"):
        cuda.directions(out.T, seed=0, begin=0)
