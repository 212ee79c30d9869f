"""The CUDA kernels, run by the emulator: against the definition and the CPU kernels, and the errors if they cannot run."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DEVICE,
    DISTANCES,
    METRICS,
    POINT_METRICS,
    Case,
    on_device,
    points,
    select_on_device,
)
from checks.boundary import Handmade

import flashcoreset as fc
from flashcoreset._core import native
from flashcoreset.kernels import FacilityLocationProblem as Problem

emulated = pytest.mark.usefixtures("emulated_cuda")
only_emulated = pytest.mark.skipif(
    DEVICE != "cpu", reason="the emulated device alone can be made a poorer one"
)


@emulated
@pytest.mark.parametrize("metric", METRICS)
def test_schedules_methods_and_sizes_agree_bit_for_bit(metric: str) -> None:
    x = points(60, 60 if metric == "precomputed" else 5, 3, torch.float32)
    module = native.cuda_module()
    emulated = hasattr(module, "set_schedule")
    selections = []
    for schedule in ("forward", "reverse", "random:7"):
        if emulated:
            module.set_schedule(schedule)
        for method in ("lazy", "naive"):
            case = Case("", x, 7, {"metric": metric, "method": method, "preselected": [4]})
            selections.append(select_on_device(case, "cuda"))
    if emulated:
        module.set_schedule("forward")
    for other in selections[1:]:
        assert torch.equal(other.indices, selections[0].indices)
        assert torch.equal(other.gains, selections[0].gains)
        assert torch.equal(other.assignment, selections[0].assignment)
        assert other.objective == selections[0].objective


@emulated
@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        ((4, float("nan")), {}, "x must be finite, got NaN at row 4, column 1"),
        ((4, float("inf")), {"metric": "l1", "offset": 9.0}, "x must be finite, got inf at row 4, column 1"),
        (1e-38, {"metric": "precomputed"}, "scale x or the weights up"),
        ((4, float("nan")), {"method": "stochastic"}, "x must be finite, got NaN at row 4, column 1"),
        (1.0, {"weights": [1, 1, -2, 1, 1, 1]}, "weights must be finite and >= 0, got -2.0 at position 2"),
        (
            1.0,
            {"weights": [3e38] * 6},
            r"weights: their sum, 1.8e\+39, overflows torch.float32; scale them down",
        ),
        (1.0, {"preselected": [3, 1, 1]}, "preselected must be distinct, got 1 more than once"),
        (1.0, {"preselected": [6]}, r"preselected must be in \[0, 6\), got 6"),
        ((0, 1e30), {"metric": "dot"}, "x: similarities of metric 'dot' overflow torch.float32; scale"),
        ((0, 3e38), {"metric": "l1"}, "x: distances of metric 'l1' overflow torch.float32; scale"),
        (
            (4, float("nan")),
            {"weights": [1, 1, 1, 1, 1, -1]},
            "weights must be finite and >= 0, got -1.0 at position 5",
        ),
    ],
)
def test_bad_data(spoil: tuple[int, float] | float, options: dict[str, Any], words: str) -> None:
    x = torch.arange(12.0).reshape(6, 2) + 1
    if isinstance(spoil, tuple):
        x[spoil[0], 1] = spoil[1]
    else:
        x *= spoil
    with pytest.raises(ValueError, match=words):
        fc.facility_location(on_device(x), 2, backend="cuda", **options)


@emulated
def test_messages_are_those_of_the_cpu() -> None:
    """Faults that the public function finds for one backend, and the kernels for the other."""
    x = torch.arange(12.0).reshape(6, 2) + 1
    for options in (
        {"weights": [1, 1, -2, 1, 1, 1]},
        {"weights": [1, 1, float("inf"), 1, 1, 1]},
        {"weights": [3e38] * 6},
        {"preselected": [3, 1, 1]},
        {"preselected": [1, -1]},
        {"metric": "l1", "preselected": [0, 6]},
    ):
        messages = []
        for backend in ("cpu", "cuda"):
            place = on_device(x) if backend == "cuda" else x
            with pytest.raises(ValueError, match=r"weights|preselected") as raised:
                fc.facility_location(place, 2, backend=backend, **options)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def tied(dtype: torch.dtype) -> torch.Tensor:
    """Candidates 0 and 1 tie, or do not, as the columns' or the whole matrix's largest entry sets the scale."""
    s = torch.zeros(3, 4096, dtype=dtype)
    s[0] = s[1] = 1
    s[1, 5] = 1 + (2.0**-23 if dtype == torch.float32 else 2.0**-25)
    s[2, 0] = 2.0**28
    return s


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    case = Case("", tied(dtype), 2, {"metric": "precomputed"})
    selection = select_on_device(case, "cuda")
    for backend in ("cpu", "torch"):
        reference = fc.facility_location(case.x, case.k, metric="precomputed", backend=backend)
        assert torch.equal(selection.indices, reference.indices)
        assert torch.equal(selection.gains, reference.gains)


@emulated
@pytest.mark.parametrize("shape", [(1, 700), (3, 130), (257, 257)])
def test_gains_of_matrices_are_those_of_the_cpu(shape: tuple[int, int]) -> None:
    s = points(*shape, 1, torch.float64)
    selection = select_on_device(Case("", s, 1, {"metric": "precomputed"}), "cuda")
    reference = fc.facility_location(s, 1, metric="precomputed", backend="cpu")
    assert torch.equal(selection.gains, reference.gains)


def sparse_on_device() -> torch.Tensor:
    return on_device(torch.diag(torch.tensor([1.0, 3.0, 2.0]))).to_sparse_csr()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@emulated
def test_sparse_matrices_on_a_device_fall_back_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcoreset._core import dispatch as backends
    from flashcoreset._core import errors

    monkeypatch.setattr(errors, "_reported", set())
    monkeypatch.setitem(backends.DEFAULTS, DEVICE, backends.DEFAULTS["cuda"])
    with pytest.warns(fc.SlowPathWarning, match="no cuda kernel for sparse.*no triton kernel for sparse"):
        selection = fc.facility_location(sparse_on_device(), 2, metric="precomputed")
    assert selection.indices.tolist() == [1, 2]


def run_of(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    return fc.kernels.cuda.FacilityLocation(Problem(x, *arguments, **options))


def finished(run: Any, k: int, m: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Indices, gains and f(S) of a run that made `k` picks."""
    indices, assignment = (on_device(torch.empty(size, dtype=torch.int64)) for size in (k, m))
    gains, weights = (on_device(torch.empty(k, dtype=torch.float64)) for _ in range(2))
    objective = run.finish(indices, gains, weights, assignment)
    return indices.cpu(), gains.cpu(), objective


@emulated
def test_a_sample_has_open_candidates_alone() -> None:
    run = run_of(on_device(torch.eye(4)), preselected=on_device(torch.tensor([2])))
    assert run.step_among(on_device(torch.tensor([1, 3, 1]))) == 1  # twice is once, as on the CPU
    for bad in (1, 2, -1, 4, 2**40):
        with pytest.raises(
            ValueError, match=rf"candidates: expected indices in \[0, 4\) that are not .* got {bad}$"
        ):
            run.step_among(on_device(torch.tensor([0, bad])))
    assert run.step_among(on_device(torch.tensor([3, 0]))) == 0
    assert run.step_among(on_device(torch.tensor([3]))) == 3
    with pytest.raises(ValueError, match=r"candidates: .* got 3$"):
        run.step_among(on_device(torch.tensor([3])))
    indices, gains, objective = finished(run, 3, 4)
    assert indices.tolist() == [1, 0, 3]
    assert gains.tolist() == [1, 1, 1]
    assert objective == 4


@emulated
def test_picks_after_a_sample_that_was_refused() -> None:
    """The refusal had stayed on the device: later picks were not made, and what had been in the memory was taken for them."""
    x = on_device(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    found = []
    for refused in (False, True):
        run = run_of(x, metric="euclidean", preselected=on_device(torch.tensor([4])), offset=9.0)
        if refused:
            with pytest.raises(ValueError, match=r"that are not chosen yet, got 4$"):
                run.step_among(on_device(torch.tensor([4])))
        assert run.step(3) == 3
        indices, gains, objective = finished(run, 3, 9)
        found.append((indices.tolist(), gains.tolist(), objective))
    assert found[0] == found[1]


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_compute(dtype: torch.dtype) -> None:
    nobody, nowhere = on_device(torch.empty(0, 3, dtype=dtype)), on_device(torch.empty(3, 0, dtype=dtype))
    some = on_device(torch.ones(2, 3, dtype=dtype))
    for metric in POINT_METRICS:
        out = on_device(torch.full((3, 3), 7, dtype=dtype))
        assert (fc.kernels.cuda.pairwise(nowhere, metric=metric, out=out) == 0).all()
        for x, y in ((nobody, nobody), (some, nobody), (nobody, some)):
            shape = (x.shape[0], y.shape[0])
            assert fc.kernels.cuda.pairwise(x, y, metric=metric).shape == shape
        for offset in (1.0, None):
            run = run_of(nobody, metric=metric, offset=offset)
            assert run.step(2) == 0
            assert finished(run, 0, 0)[2] == 0
        run = run_of(some, nobody, metric=metric, offset=None)
        assert run.step(2) == 2
        assert finished(run, 2, 0)[1].tolist() == [0, 0]
        run = run_of(nowhere, metric=metric)
        assert run.step(2) == 2
        assert finished(run, 2, 3)[0].tolist() == [0, 1]


@emulated
def test_f_of_an_offset_that_the_type_rounds() -> None:
    x = points(20, 3, 1, torch.float32)
    values = []
    for kernels, place in ((fc.kernels.cpu, x), (fc.kernels.cuda, on_device(x))):
        run = kernels.FacilityLocation(Problem(place, metric="l1", offset=12.1))
        run.step(3)
        if kernels is fc.kernels.cpu:
            out = [torch.empty(3, dtype=torch.int64), *torch.empty(2, 3, dtype=torch.float64).unbind()]
            values.append(run.finish(*out, torch.empty(20, dtype=torch.int64)))
        else:
            values.append(finished(run, 3, 20)[2])
    assert math.isclose(values[0], values[1], rel_tol=1e-15)


@emulated
def test_an_offset_far_above_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels notice such an offset: a check from here would wait for the device."""
    x = points(60, 3, 2, torch.float32)
    for metric in DISTANCES:
        for options in ({}, {"preselected": [7]}, {"weights": torch.arange(60.0)}):
            case = Case("", x, 5, {"metric": metric, "offset": 1e7, **options})
            reference = fc.facility_location(x, 5, backend="cpu", **case.options)
            with monkeypatch.context() as patch:
                patch.setattr(fc.kernels.cuda, "pairwise", None)
                selection = select_on_device(case, "cuda")
            assert selection.offset == reference.offset == 1e7
            assert torch.equal(selection.indices, reference.indices)
            assert torch.equal(selection.gains[1:], reference.gains[1:])
            assert math.isclose(float(selection.gains[0]), float(reference.gains[0]), rel_tol=2.0**-23)
            assert math.isclose(selection.objective, reference.objective, rel_tol=1e-15)


def test_without_a_device_the_reason_is_named() -> None:
    if native.cuda_failure() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(
        fc.BackendUnavailableError,
        match=r"backend 'cuda': .*(built without|CUDA device 0 cannot be used: \w).*backend=",
    ):
        fc.facility_location(torch.eye(3), 1, backend="cuda")


def test_the_module_is_built_where_there_is_a_compiler() -> None:
    module = native._import("_cuda")
    if isinstance(module, str):
        pytest.skip("built without nvcc")
    assert module.ARCHITECTURES
    assert module.unusable(10**6) is not None


def cuobjdump() -> str | None:
    """The reader of compiled kernels, of CUDA or in Triton's wheel."""
    folders = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


# Bytes per thread: those that the grid's barrier, which is a call, keeps there on sm_90, and a variable of frexp's.
STACK = 40
# Sinkhorn's runs hold tiles of costs, the loops over them and the schedule in one kernel of 128 registers, so that two blocks
# fit; the spilled values are used outside of the feature loops and of those over the matrix, a few per tile.
SINKHORN_STACK = 256


def test_no_kernel_spills() -> None:
    """Registers that do not suffice show as a stack; the kernels use nearly all the registers that a thread has."""
    module = native._import("_cuda")
    if isinstance(module, str):
        pytest.skip("built without nvcc")
    if (reader := cuobjdump()) is None:
        pytest.skip("neither CUDA nor Triton is installed")
    told = subprocess.run([reader, "-res-usage", module.__file__], capture_output=True, text=True, check=True)
    kernels = re.findall(r"arch = (\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+)", told.stdout)
    found = [(name, int(stack)) for _, name, _, stack in kernels if name]
    assert len([name for name, _ in found if "greedy" in name]) >= 11
    bounds = [(name, stack, SINKHORN_STACK if "sinkhorn" in name else STACK) for name, stack in found]
    assert [(name, stack) for name, stack, most in bounds if stack > most] == []


@pytest.fixture
def device(emulated_cuda: None) -> Iterator[ModuleType]:
    """The emulated module, whose device a test may change."""
    module = native.cuda_module()
    yield module
    module.set_device()


@only_emulated
@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("cooperative_launch", "no cooperative launch"),
        ("memory_pools", "no memory pools"),
        (
            "has_code",
            "compiled for .*, not for this device .no kernel image is available.*FLASHCORESET_CUDA_ARCHITECTURES",
        ),
    ],
)
def test_a_device_that_cannot_be_used_is_told_before_the_first_call(
    device: ModuleType, lacking: str, words: str
) -> None:
    assert device.unusable(0) is None
    assert "there are 1 CUDA devices" in device.unusable(1)
    device.set_device(**{lacking: False})
    assert re.search(words, device.unusable(0))


@only_emulated
def test_arrays_are_on_one_device(device: ModuleType) -> None:
    device.set_device(count=2)
    x = np.ones((3, 2), dtype=np.float32)
    far, far_index = (
        Handmade(x, (3, 2), device_id=1),
        Handmade(np.arange(3), (3,), code=0, bits=64, device_id=1),
    )
    words = "expected an array on device 0, where x is, got one on device 1; move it there"
    out = np.empty((3, 3), dtype=np.float32)
    for y, to in ((far, out), (x, Handmade(out, (3, 3), device_id=1))):
        with pytest.raises(ValueError, match=f"{'y' if y is far else 'out'}: {words}"):
            device.pairwise(x, y, to, "dot", 0)
    with pytest.raises(ValueError, match=f"clients: {words}"):
        device.FacilityLocation(Problem(x, far, "l1", offset=None), 0)
    with pytest.raises(ValueError, match=f"preselected: {words}"):
        device.FacilityLocation(Problem(x, None, "l1", preselected=far_index, offset=None), 0)
    run = device.FacilityLocation(Problem(x, None, "l1", offset=None), 0)
    with pytest.raises(ValueError, match=f"candidates: {words}"):
        run.step_among(far_index)
    with pytest.raises(ValueError, match=f"indices: {words}"):
        run.finish(far_index, np.empty(3), np.empty(3), np.empty(3, dtype=np.int64))


@only_emulated
def test_memory_goes_back_to_its_device(device: ModuleType) -> None:
    device.set_device(count=2)
    before = device.allocated_bytes()
    run = device.FacilityLocation(Problem(np.ones((3, 2), dtype=np.float32), None, "l1", offset=None), 0)
    assert device.allocated_bytes() > before
    device.set_current_device(1)
    del run
    assert device.allocated_bytes() == before
    device.set_current_device(0)


@only_emulated
def test_out_of_memory_is_tried_again_without_what_torch_keeps(
    device: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(100, 2)
    before = device.allocated_bytes()
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(device.set_device()))
    for call in (
        lambda: fc.facility_location(x, 2, backend="cuda").indices,
        lambda: fc.kernels.cuda.pairwise(x, metric="l1"),
    ):
        expected = call()
        device.set_device(bytes=before + 100)
        assert torch.equal(call(), expected)
    assert len(freed) == 2
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    device.set_device(bytes=before + 100)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of device memory: \d+ bytes more"):
        fc.facility_location(x, 2, backend="cuda")
    assert device.allocated_bytes() == before


@only_emulated
@pytest.mark.parametrize(
    ("shapes", "dtype", "options"),
    [
        ([(3000, 64)], torch.float32, {}),
        ([(3000, 64)], torch.float64, {"metric": "dot"}),
        ([(200, 3), (9000, 3)], torch.float32, {"metric": "l1"}),
        ([(2000, 3)], torch.float32, {"method": "stochastic"}),
        ([(20, 9000)], torch.float64, {"metric": "precomputed"}),
    ],
)
def test_memory_estimate_is_an_upper_bound_within_a_factor_of_three(
    device: ModuleType, shapes: list[tuple[int, int]], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The peak of the device's memory beside the arguments; the results, which are in it too, are torch's here."""
    tensors = [points(*shape, 1, dtype) for shape in shapes]
    every = {**options, "backend": "cuda"}
    if len(tensors) > 1:
        every["clients"] = tensors[1]
    estimate = fc.memory_estimate("facility_location", *tensors, k=2, dtype=dtype, **options, backend="cuda")
    before = device.allocated_bytes()
    device.set_device(bytes=before + estimate)
    assert fc.facility_location(tensors[0], 2, **every).indices.shape == (2,)
    device.set_device(bytes=before + estimate // 3)
    with pytest.raises(torch.OutOfMemoryError):
        fc.facility_location(tensors[0], 2, **every)


@only_emulated
def test_ctrl_c_ends_a_call_between_two_launches(device: ModuleType) -> None:
    """The device is slow to report that it is done, as a busy one is."""
    x = points(64, 3, 1, torch.float32)
    expected = fc.facility_location(x, 9, backend="cuda")
    device.set_device(event_delay=2**31 - 1)
    timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fc.facility_location(x, 9, backend="cuda")
    assert time.monotonic() - begin < 1.3
    device.set_device()
    assert torch.equal(fc.facility_location(x, 9, backend="cuda").gains, expected.gains)


@emulated
def test_progress_tells_of_picks_that_are_made() -> None:
    """Launches that were only started do not count: the last ones are not waited for before the end."""
    x = on_device(points(400, 3, 1, torch.float32))
    seen: list[int] = []
    fc.facility_location(x, 300, backend="cuda", progress=lambda done, total: seen.append(done))
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == 300
    assert seen.count(300) == 1
    assert len(set(seen)) > 50
