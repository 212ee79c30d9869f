"""The parts of `make gpu` around the measurements, which need a GPU: no measurement gets lost, and nothing hangs."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu")


MEASURED = {"seconds": {"q20": 1.0, "median": 2.0, "q80": 3.0}}


def test_rows_are_written_as_they_are_measured(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def written() -> list[dict[str, Any]]:
        return json.loads((tmp_path / "measured.json").read_text())["rows"]

    def fine() -> dict[str, Any]:
        seen.append(len(written()) if seen else 0)
        return dict(MEASURED)

    def fails() -> dict[str, Any]:
        raise RuntimeError("no such\nluck")

    # Half a second of operations and half a second of copying; one second is predicted, and another of waits.
    work = gpu.Work(5e11, 5e11, 0.5, "for a test", 1.0)
    rows = [
        gpu.Planned("first", "cuda", work, lambda rows: 1, fine),
        gpu.Planned("second", "triton", work, lambda rows: 1, fails),
        gpu.Planned("third", "cuda", work, lambda rows: 1, fine),
        gpu.Planned("long", "cuda", work, lambda rows: 1e9, fails),
    ]
    monkeypatch.setattr(gpu, "limits", lambda: {"matrix": 1e12, "copy": 1e12})
    monkeypatch.setattr(gpu, "plan", lambda: rows)
    assert not gpu.measure(tmp_path, time.time() + 100)
    assert seen == [0, 2]
    assert [row.get("failed") for row in written()] == [None, "RuntimeError: no such", None, None]
    assert "left_out" in written()[3]
    hardware = {"gpu": "none", "torch": "0", "python": "0", "commit": "0"}
    measured = json.loads((tmp_path / "measured.json").read_text())
    table = gpu.table({"hardware": hardware, "steps": [], "measured": measured})
    assert "| first | 2000.000 ms | 1000.000 ms to 3000.000 ms | 2000.000 ms | 4.00 | 25% |" in table
    assert "| second | failed: RuntimeError: no such |" in table
    assert "| long | left out: no time left |" in table
    columns = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert set(columns[3:]) == {10}


def test_predictions_stand_in_the_documentation(gpu: Any) -> None:
    names = [planned.name for planned in gpu.plan()]
    assert len(set(names)) == len(names)
    families = {name.partition("-")[0] for name in names}
    assert families >= {
        "facility",
        "sinkhorn",
        "sketch",
        "scores",
        "colm",
        "pairwise",
        "caratheodory",
        "pursuit",
    }
    assert gpu.predictions() in (ROOT / "docs/gpu.md").read_text()


def test_what_binds_a_row(gpu: Any) -> None:
    device = {"matrix": 1e12, "copy": 1e11}
    arithmetic, memory = gpu.Work(4e12, 1e11, 0.5, ""), gpu.Work(1e12, 4e11, 1.0, "", 0.25)
    assert (arithmetic.binds(device), memory.binds(device)) == ("arithmetic", "memory")
    assert (arithmetic.limit(device), memory.limit(device)) == (4.0, 4.0)
    assert (arithmetic.predicted(device), memory.predicted(device)) == (8.0, 4.25)


def test_every_device_test_has_its_files(gpu: Any) -> None:
    steps = dict(gpu.test_steps())
    assert {"test-cuda-sinkhorn", "test-triton-scores", "test-others"} <= set(steps)
    assert "test-cuda-scores" not in steps
    for files in steps.values():
        assert all((ROOT / file).is_file() for file in files if file.endswith(".py"))


def test_occupancy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    occupancy = importlib.import_module("benchmarks.occupancy")
    usage = "\n Function first:\n  REG:128 STACK:0 SHARED:2048 LOCAL:0\n Function second:\n  REG:32 STACK:8 SHARED:116000 LOCAL:0\n"
    info = "\n\t<0x1>\n\tAttribute:\tEIATTR_REGCOUNT\n\tFormat:\tEIFMT_SVAL\n\tValue:\tfirst\n"
    most = "\n\t<0x2>\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t{} 0x1 0x1\n"
    elf = ".nv.info.first" + info + most.format("0x100") + ".nv.info.second" + most.format("0x40")
    first, second = occupancy.read_kernels(usage, elf)
    # 128 registers of 256 threads are half of them; two blocks of 113 KB fill the shared memory.
    assert (first.threads, first.blocks(), first.occupancy()) == (256, 2, 0.25)
    assert (second.threads, second.blocks(), second.occupancy()) == (64, 1, 2 / 64)
    assert "| `first` | 256 | 128 | 0 B | 2048 B | 2 | 25% |" in occupancy.table([first], ["first"])
    name = "void fc::cuda::(anonymous namespace)::greedy<float, (fc::Form)2, true>(fc::cuda::(anonymous namespace)::State<float>)"
    assert occupancy.short_name(name) == "greedy<float, 2, true>"


def test_the_largest_row_is_last_and_expected_from_a_smaller_one(gpu: Any) -> None:
    last = gpu.plan()[-1]
    assert last.name == f"facility-location-{gpu.LARGEST}-128-1000-cuda"
    assert last.expected([]) == float("inf")
    tenth = {"name": f"facility-location-{gpu.LARGEST // 10}-128-1000-cuda", **MEASURED}
    assert last.expected([tenth]) == 210


def test_a_step_ends_in_time_with_all_that_it_started(gpu: Any, tmp_path: Path) -> None:
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])"
    log, pid = tmp_path / "log", tmp_path / "pid"
    log.write_text("before\n")
    status, seconds = gpu.run([sys.executable, "-c", parent, str(pid)], log, 3)
    assert status == 124
    assert seconds < 20
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid.read_text()}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # ended; whoever inherited it has not asked yet
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid.read_text()}").exists()
    status, _ = gpu.run([sys.executable, "-c", "print('said'); raise SystemExit(3)"], log, 100, SOME="thing")
    assert status == 3
    assert log.read_text().startswith("before\n")
    assert log.read_text().endswith("\nsaid\n")


def test_memory_is_watched_until_the_call_fails(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [100]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call() -> None:
        free[0] = 30
        time.sleep(0.2)
        free[0] = 80

    assert gpu.peak_memory(call) == 70
    with pytest.raises(ZeroDivisionError):
        gpu.peak_memory(lambda: 1 // 0)


def test_the_sanitizer_need_not_be_on_the_path(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    place = tmp_path / "bin" / "compute-sanitizer"
    place.parent.mkdir()
    place.write_text("#!/bin/sh\n")
    place.chmod(0o755)
    assert gpu.find_sanitizer() == str(place)
