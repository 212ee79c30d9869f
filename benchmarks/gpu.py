"""``make gpu OUT=dir``: tests, benchmarks and sanitizer runs on a machine with a GPU, without network, within nine minutes.

Builds the package into build/gpu with what is installed, runs the tests of the CUDA and Triton backends on the device, times
facility location and pairwise distances beside the device's measured limits, and runs compute-sanitizer over a few cases where it
is installed. Writes OUT/gpu.json, OUT/gpu.md and the logs. ``--measure`` is the part that the built package runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, machine

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu" / "site"
BUDGET = 9 * 60.0  # seconds for everything
SANITIZED = "test_follows_the_definition and (97-float32 or weights or clients)"


def run(command: list[str], log: Path, seconds: float, **environment: str) -> tuple[int, float]:
    """Exit status (124 after `seconds`) and time of a command whose output goes to `log`."""
    start = time.perf_counter()
    with log.open("w") as stream:
        try:
            status = subprocess.run(
                command,
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=max(seconds, 1),
                env={**os.environ, **environment},
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    return status, time.perf_counter() - start


def event_times(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Seconds by device events: median, and the 20 and 80 % quantiles; the second-level cache is emptied before each."""
    call()
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    seconds.sort()
    return {
        "q20": seconds[len(seconds) // 5],
        "median": statistics.median(seconds),
        "q80": seconds[4 * len(seconds) // 5],
    }


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes of the device that the call takes at its peak, looked at every millisecond: not all of them come from torch."""
    torch.cuda.empty_cache()
    before = least = torch.cuda.mem_get_info()[0]
    done = threading.Event()

    def watch() -> None:
        nonlocal least
        while not done.wait(0.001):
            least = min(least, torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return before - least


def limits() -> dict[str, float]:
    """Operations a second of a float32 product (no TF32), and bytes a second of a copy, read and written."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = torch.randn(2, 8192, 8192, device="cuda").unbind()
    out = torch.empty_like(a)
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    return {
        "matrix": 2 * 8192**3 / event_times(lambda: torch.mm(a, b, out=out), 5)["median"],
        "copy": 2 * source.nbytes / event_times(lambda: target.copy_(source), 5)["median"],
    }


def measure(out: Path, deadline: float) -> None:
    """The benchmarks, largest last; what the deadline leaves no time for is named as left out."""
    import flashcoreset as fc

    found = limits()
    rows: list[dict[str, Any]] = []
    for n, d, k, backend, rounds, expected in (
        (10_000, 128, 1_000, "cuda", 5, 5),
        (10_000, 128, 100, "triton", 3, 10),
        (100_000, 128, 1_000, "cuda", 3, 10),
        (1_000_000, 128, 1_000, "cuda", 1, 120),
    ):
        row: dict[str, Any] = {"name": f"facility-location-{n}-{d}-{k}-{backend}", "backend": backend}
        rows.append(row)
        if time.time() + expected > deadline:
            row["left_out"] = "no time left"
            continue
        x = torch.from_numpy(data.clustered(n, d)).cuda()

        def select(x: torch.Tensor = x, k: int = k, backend: str = backend) -> fc.Selection:
            return fc.facility_location(x, k, backend=backend)

        row["memory"] = peak_memory(select)
        row["seconds"] = event_times(select, rounds)
        row["products"] = row["seconds"]["median"] * found["matrix"] / (2.0 * n * n * d)
        if n <= 10_000:
            row["same_picks_as_cpu"] = torch.equal(
                select().indices.cpu(), fc.facility_location(x.cpu(), k).indices
            )
    x = torch.randn(8192, 512, device="cuda")
    for metric, peer in (("cosine", _mm_cosine), ("l1", _cdist_l1)):
        peer_times = event_times(lambda peer=peer: peer(x), 5)
        for backend in ("cuda", "triton"):
            pairwise = importlib.import_module(f"flashcoreset.kernels.{backend}").pairwise
            times = event_times(lambda pairwise=pairwise, metric=metric: pairwise(x, metric=metric), 5)
            agrees = torch.allclose(pairwise(x, metric=metric), peer(x), rtol=1e-4, atol=1e-4)
            rows.append(
                {
                    "name": f"pairwise-{metric}-8192-512-{backend}",
                    "backend": backend,
                    "seconds": times,
                    "peer_seconds": peer_times,
                    "ratio": peer_times["median"] / times["median"],
                    "products": times["median"] * found["matrix"] / (2.0 * 8192**2 * 512),
                    "same_values_as_peer": agrees,
                }
            )
    (out / "measured.json").write_text(json.dumps({"limits": found, "rows": rows}, indent=1))


def _mm_cosine(x: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(x)
    return unit @ unit.T


def _cdist_l1(x: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, x, p=1)


def table(report: dict[str, Any]) -> str:
    """The report in words and Markdown."""
    hardware = report["hardware"]
    lines = [
        f"{hardware['gpu']}, torch {hardware['torch']}, Python {hardware['python']}, commit {hardware['commit']}",
        "",
        "| step | result | seconds |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {step['name']} | {step['result']} | {step['seconds']:.0f} |" for step in report["steps"]]
    measured = report.get("measured")
    if measured is None:
        return "\n".join(lines) + "\n"
    found = measured["limits"]
    lines += [
        "",
        f"Limits: {found['matrix'] / 1e12:.1f} TFLOP/s in float32 products, {found['copy'] / 1e12:.2f} TB/s copying.",
        "",
        "| row | median | 20 to 80 % | products | ratio to the peer | agrees | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured["rows"]:
        if "left_out" in row:
            lines.append(f"| {row['name']} | left out: {row['left_out']} | | | | | |")
            continue
        times = {name: f"{value * 1e3:.3f} ms" for name, value in row["seconds"].items()}
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        agrees = row.get("same_picks_as_cpu", row.get("same_values_as_peer", ""))
        memory = f"{row['memory'] / 1e6:.0f} MB" if "memory" in row else ""
        lines.append(
            f"| {row['name']} | {times['median']} | {times['q20']} to {times['q80']} | {row['products']:.2f} | {ratio} "
            f"| {agrees} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """0 if everything ran and passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--measure", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.measure is not None:
        measure(out, arguments.measure)
        return 0
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    deadline = time.time() + BUDGET
    major, minor = torch.cuda.get_device_capability()
    report: dict[str, Any] = {
        "hardware": {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": machine.commit(),
        },
        "steps": [],
    }
    on_gpu = {"PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}", "FLASHCORESET_TEST_DEVICE": "cuda"}

    def step(name: str, command: list[str], seconds: float, **environment: str) -> bool:
        left = min(seconds, deadline - time.time())
        status, took = run(command, out / f"{name}.log", left, **environment)
        result = {0: "passed", 124: "ran out of time"}.get(status, f"failed ({status})")
        report["steps"].append({"name": name, "result": result, "seconds": took})
        print(f"{name}: {result} in {took:.0f} s", flush=True)
        return status == 0

    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    built = step(
        "build",
        [*install, "--upgrade", "--target", str(SITE), str(ROOT)],
        240,
        FLASHCORESET_BUILD_ISAS="native",
        FLASHCORESET_CUDA="auto",
        FLASHCORESET_CUDA_ARCHITECTURES=f"{major}{minor}-real",
    )
    passed = built
    if built:
        test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        passed &= step("test-cuda", [*test, "tests/test_cuda.py"], 120, **on_gpu)
        passed &= step("test-triton", [*test, "tests/test_triton.py"], 180, **on_gpu)
        bench = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), f"--measure={deadline - 60}"]
        if step("measure", bench, 300, **on_gpu):
            report["measured"] = json.loads((out / "measured.json").read_text())
        else:
            passed = False
        sanitizer = shutil.which("compute-sanitizer")
        for tool in ("memcheck", "racecheck") if sanitizer else ():
            command = [
                sanitizer,
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                *test,
                "tests/test_cuda.py",
                "-k",
                SANITIZED,
            ]
            passed &= step(tool, command, 90, **on_gpu)
    (out / "gpu.json").write_text(json.dumps(report, indent=1))
    (out / "gpu.md").write_text(table(report))
    print(table(report))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
