"""The CUDA kernels of matching pursuit, run by the emulator (on a GPU under `make gpu`): schedules, pieces, memory, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DEVICE
from checks.pursuit import check_equal, make_rows, normal

from flashcoreset._core import native
from flashcoreset.kernels import PursuitProblem
from flashcoreset.pursuit import cuda as kernels
from flashcoreset.pursuit.on_device import Correlations

pytestmark = pytest.mark.usefixtures("emulated_cuda", "one_thread")


def test_schedules_change_no_bit() -> None:
    g = make_rows("clustered", 50, 300).float().to(DEVICE)
    module, emulated = native.cuda_module(), DEVICE == "cpu"
    results = []
    for schedule in ("reverse", "random:7", "forward"):
        if emulated:
            module.set_schedule(schedule)
        problem = PursuitProblem(g, g.double().sum(0), 9)
        results.append(
            [
                kernels.orthogonal_matching_pursuit(problem),
                kernels.orthogonal_matching_pursuit(replace(problem, memory_budget=0)),
                kernels.frank_wolfe(problem),
            ]
        )
    for other in results[1:]:
        for one, again in zip(results[0], other, strict=True):
            check_equal(one, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_rows_are_summed_in_pieces(dtype: torch.dtype) -> None:
    """More columns than a block takes at a time; products have the same bits whatever other products are computed along with
    them."""
    g = normal(5, 9_001).to(DEVICE, dtype)
    which = torch.arange(5, device=DEVICE)
    together, alone, listed = g.new_empty(3, 5, 5, dtype=torch.float64)
    kernels._products(g, None, g, which, together, which.flip(0))
    for v in range(5):
        kernels._products(g, None, g, which[v:][:1], alone, which[v:][:1])
    kernels._products(g, which.flip(0), g, which, listed, which)
    squares = g.new_empty(5, dtype=torch.float64)
    kernels._squares(g, squares)
    assert torch.equal(together.flip(0), alone)
    assert torch.equal(listed.flip(1), alone)
    assert torch.equal(squares, alone.diag())
    torch.testing.assert_close(alone, g.double() @ g.double().T, rtol=1e-13, atol=1e-10)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulated device alone can be made a poorer one")
def test_memory_that_is_not_there_is_told() -> None:
    module = native.cuda_module()
    before = module.allocated_bytes()
    g = normal(5, 9_001)
    try:
        module.set_device(bytes=before + 100)
        with pytest.raises(torch.OutOfMemoryError, match="out of device memory"):
            kernels.frank_wolfe(PursuitProblem(g, g.sum(0), 2))
    finally:
        module.set_device()
    assert module.allocated_bytes() == before


def test_is_told_what_is_wrong() -> None:
    g, first = make_rows("normal", 4, 3).to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    out, all_of = g.new_empty(1, 4), g.new_empty(4)
    with pytest.raises(ValueError, match=r"vectors: expected shape \(4, 3\), got \(4, 2\)"):
        kernels._products(g, None, g[:, :2], first, out, first)
    with pytest.raises(ValueError, match=r"out: expected shape \(1, 4\), got \(1, 3\)"):
        kernels._products(g, None, g, first, out[:, :3].contiguous(), first)
    with pytest.raises(ValueError, match="rows: expected at least 1 row, got 0"):
        kernels._products(g, first[:0], g, first, out, first)
    with pytest.raises(ValueError, match=r"places: expected shape \(1,\), got \(4,\)"):
        kernels._products(g, None, g, first, out, first.expand(4).contiguous())
    with pytest.raises(ValueError, match="g: expected at least 1 row and 1 column, rows contiguous"):
        kernels._squares(g.T, all_of[:3])
    with pytest.raises(TypeError, match="g: expected dtype float32 or float64, got float16"):
        kernels._squares(g.half(), all_of)
    correlations = Correlations(all_of, out, first, all_of[:1], all_of, False)
    with pytest.raises(ValueError, match=r"numbers: expected shape \(2,\), got \(1,\)"):
        kernels._pick(correlations, all_of.clone(), all_of[:2].clone())
    with pytest.raises(ValueError, match=r"target: expected shape \(3,\), got \(4,\)"):
        kernels._residual(g, all_of, first, all_of[:1], all_of.clone()[:3])
    with pytest.raises(TypeError, match="weights: expected dtype float64, got float32"):
        kernels._residual(g, all_of[:3], first, all_of[:1].float(), all_of.clone()[:3])
