"""The Triton kernels, in Triton's interpreter: against the definition and the reference, and the errors if they cannot run."""

from __future__ import annotations

import math
import platform
from typing import Any

import processes
import pytest
import torch
from cases import (
    DEVICE,
    METRICS,
    PLAIN,
    POINT_METRICS,
    VARIANTS,
    Case,
    data,
    for_interpreter,
    on_device,
    points,
    select_on_device,
    worst_error,
)

import flashcoreset as fc
from flashcoreset._core import native

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.facility_location import triton as kernels
from flashcoreset.triton_kernels import facility_location as launchers
from flashcoreset.triton_kernels.pairwise import Tile

TABLE = [*for_interpreter(PLAIN, 5), *for_interpreter(VARIANTS, 2)]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_follows_the_definition(case: Case) -> None:
    # Too little for the matrix: similarities are computed in the kernels. Clients of groups are served so many at a time.
    options = {"memory_budget": 4000 if "groups" in case.options else 0, **case.options}
    selection = select_on_device(Case(case.name, case.x, case.k, options), "triton")
    worst_error(case, selection)
    # A device rounds a fused multiply-add once, as the CPU kernels do; interpreted it is rounded twice, as in the reference.
    interpreted = DEVICE == "cpu"
    reference = fc.facility_location(case.x, case.k, backend="torch" if interpreted else "cpu", **options)
    if (
        interpreted or case.metric != "cosine"
    ):  # rows of unit length are torch's here, the CPU kernels' own there
        assert torch.equal(selection.indices, reference.indices)
    assert selection.gains.dtype == reference.gains.dtype
    if reference.offset is not None:
        assert math.isclose(selection.offset, reference.offset, rel_tol=1e-6)
    assert math.isclose(selection.objective, reference.objective, rel_tol=1e-6, abs_tol=1e-30)


def assert_same(a: fc.Selection, b: fc.Selection) -> None:
    """Bit for bit."""
    for name in ("indices", "gains", "weights", "assignment"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.objective == b.objective


# Tests of the interpreter, or of the messages that a machine without a GPU gives.
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter on the CPU")


@interpreted
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_the_work_cannot_be_seen(
    metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = data(metric, 27, 1, dtype)
    options: dict[str, Any] = {"metric": metric, "backend": "triton", "weights": torch.arange(27) % 4}
    naive = fc.facility_location(x, 4, method="naive", memory_budget=0, **options)
    assert_same(naive, fc.facility_location(x, 4, **options))  # of the matrix
    monkeypatch.setattr(kernels, "_BATCH", 3)  # lazy evaluation evaluates some candidates only
    assert_same(naive, fc.facility_location(x, 4, memory_budget=0, **options))
    # Two programs for the same candidates, each with two tiles of clients.
    monkeypatch.setattr(Tile, "of", lambda dtype, d: Tile(16, 8, 1, True))
    monkeypatch.setattr(launchers, "_PROGRAMS", 4)
    assert_same(naive, fc.facility_location(x, 4, method="naive", memory_budget=0, **options))


@pytest.mark.parametrize("metric", POINT_METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairwise(metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, m, d in ((1, 1, 1), (7, 97, 3), (5, 4, 257)):
        x, y = points(n, d, 1, dtype), points(m, d, 2, dtype)
        y[0] = x[0]
        values = kernels.pairwise(on_device(x), on_device(y), metric=metric).cpu()
        exact = fc.kernels.torch.pairwise(x.double(), y.double(), metric=metric)
        # 256 roundings in a row, whose random walk is 16 steps long; the worst seen is 7.
        tolerance = 16 * torch.finfo(dtype).eps * float(exact.abs().max())
        torch.testing.assert_close(values.double(), exact, rtol=0, atol=tolerance)
        if d < 257:
            assert torch.equal(kernels.pairwise(on_device(y), on_device(x), metric=metric).cpu(), values.T)
        if metric not in ("cosine", "dot"):
            assert values[0, 0] == 0
    x = on_device(points(40, 3, 3, dtype))
    values = kernels.pairwise(x, metric=metric)
    out = torch.full((40, 41), 9, dtype=dtype, device=DEVICE)
    monkeypatch.setattr(Tile, "of", lambda dtype, d: Tile(8, 32, 1, True))
    assert (
        kernels.pairwise(x.T.contiguous().T, x, metric=metric, out=out[:, :40]).data_ptr() == out.data_ptr()
    )
    assert torch.equal(out[:, :40], values), "a pair's value depends on the tile"
    assert (out[:, 40] == 9).all()
    assert torch.equal(kernels.pairwise(x[3:5], x[7:8], metric=metric), values[3:5, 7:8])


@pytest.mark.parametrize("metric", ["dot", "l1", "euclidean", "sqeuclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_a_cpu_that_rounds_alike(
    metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain of operations is the CPU kernels', bit for bit: of the build without fused multiply-adds in Triton's
    interpreter, which has none, and of one with them on a device. (Cosine is that of rows which torch brought to unit
    length.)"""
    isa = "x86-64-v2" if DEVICE == "cpu" else "x86-64-v3"
    if isa not in native.available_isas():
        pytest.skip("this processor has no fused multiply-add")
    monkeypatch.setattr(native, "_loaded", native.load_isa(isa))
    for d in (3, 300):
        x = points(30, d, d, dtype)
        expected = fc.kernels.cpu.pairwise(x, metric=metric)
        assert torch.equal(kernels.pairwise(on_device(x), metric=metric).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairwise_of_half_types_is_that_of_float32(dtype: torch.dtype) -> None:
    x = on_device(points(9, 3, 4, dtype))
    assert torch.equal(kernels.pairwise(x, metric="l1"), kernels.pairwise(x.float(), metric="l1"))


def test_stochastic_groups_and_progress() -> None:
    x, groups = on_device(points(30, 3, 5)), on_device(torch.arange(30) % 2)
    exact = fc.facility_location(x, 4, backend="triton")
    everything = fc.facility_location(x, 4, method="stochastic", epsilon=1e-300, backend="triton")
    assert_same(exact, everything)
    seen: list[tuple[int, int]] = []
    loud = fc.facility_location(
        x, 4, groups=groups, backend="triton", progress=lambda done, total: seen.append((done, total))
    )
    assert torch.bincount(groups[loud.indices]).tolist() == [2, 2]
    assert seen[-1] == (4, 4)


def test_ties_go_to_the_lowest_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BATCH", 3)
    x = on_device(torch.tensor([[0.0, 4.0], [4.0, 0.0]]).repeat(20, 1))
    selection = fc.facility_location(x, 5, metric="l1", backend="triton")
    assert selection.indices.tolist() == [0, 1, 2, 3, 4]
    assert selection.gains[2:].tolist() == [0, 0, 0]
    assert selection.assignment.tolist() == [0, 1, 2, 3, 4, *[1, 0] * 17, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    x = on_device(torch.ones(4, 2))
    y = x.clone()
    y[2, 1] = bad
    with pytest.raises(ValueError, match=r"x must be finite, got .* at row 2, column 1"):
        fc.facility_location(y, 1, backend="triton")
    with pytest.raises(ValueError, match="clients must be finite"):
        fc.facility_location(x, 1, clients=y, backend="triton")
    with pytest.raises(ValueError, match="x must be finite"):
        fc.facility_location(y, 1, metric="precomputed", backend="triton")
    with pytest.raises(ValueError, match="y must be finite"):
        kernels.pairwise(x, y, metric="dot")


def test_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric 'dot' overflow torch.float32; scale"):
        fc.facility_location(torch.full((3, 2), 1e30, device=DEVICE), 1, metric="dot", backend="triton")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_matrices_are_for_other_backends() -> None:
    s = on_device(torch.eye(3)).to_sparse_csr()
    with pytest.raises(fc.BackendUnavailableError, match=r"sparse.*backend='torch'.*backend='cpu'"):
        fc.facility_location(s, 1, metric="precomputed", backend="triton")


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


REFUSED = """
import sys, torch, flashcoreset as fc
assert "triton" not in sys.modules
if {blocked}: sys.modules["triton"] = None
try:
    fc.facility_location(torch.eye(2), 1, backend="triton")
except fc.BackendUnavailableError as error:
    print(error)
"""


def test_without_triton_the_message_says_how_to_get_it() -> None:
    done = processes.run(REFUSED.format(blocked=True))
    assert "pip install triton" in done.stdout, done.stderr


@interpreted
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    message = processes.run(REFUSED.format(blocked=False), TRITON_INTERPRET="0").stdout.strip()
    assert message.startswith("backend 'triton': ")
    assert ".cuda()" in message if torch.cuda.is_available() else "torch finds none" in message
    assert "backend='cpu'" in message


def test_other_devices_are_refused() -> None:
    from flashcoreset._core.dispatch import triton_failure

    assert "backend='torch'" in str(triton_failure(torch.device("meta")))
    assert triton_failure(torch.device("cuda")) is None
