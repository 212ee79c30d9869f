"""``make gpu OUT=dir``: tests, benchmarks and sanitizer runs on a machine with a GPU, without network, within nine minutes.

Builds the package into build/gpu with the tools that are installed, runs the tests that can have their tensors on a device
there (those of the CUDA and Triton backends, of torch.compile and of Ctrl-C; the others are about the CPU), times facility
location, pairwise distances, gradient matching, the Carathéodory reduction and matching pursuit beside the device's measured
limits, and runs compute-sanitizer over a few cases if it is installed. Writes OUT/gpu.json, OUT/gpu.md and OUT/gpu.log, and a
row to OUT/measured.json as soon as it is measured. ``--measure`` is the part that the built package runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, machine

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu" / "site"
BUDGET = 9 * 60.0  # seconds for everything
# The tests' names of one plain case per metric, and of a few cases with everything else that a kernel reads: under the
# sanitizer a case takes seconds.
SANITIZED = (
    "test_follows_the_definition and cuda and (97-float32 or cosine-float32-clients-weights-preselected or "
    "l1-float64-weights or precomputed-float32-rectangular or sqeuclidean-float32-wide) or "
    "test_as_on_the_cpu and cuda and (keeps_the_sums-1025-3-torch.float32 or rows_of_weight_zero) or "
    "test_is_the_definition and cuda and float32 and 530"
)
SANITIZED_FILES = (
    "tests/test_facility_location.py",
    "tests/test_caratheodory.py",
    "tests/test_pursuit.py",
)


def run(command: list[str], log: Path, seconds: float, **environment: str) -> tuple[int, float]:
    """Exit status (124 after `seconds`) and time of a command whose output is appended to `log`. Processes that the command
    started end with it."""
    start = time.perf_counter()
    with log.open("a") as stream:
        stream.write(f"\n$ {' '.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            status = 124
        except BaseException:
            end_group(process)
            raise
        if status == 124:
            end_group(process)
    return status, time.perf_counter() - start


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session, and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def find_sanitizer() -> str | None:
    """compute-sanitizer, which CUDA's installer does not put on the PATH."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders = [
        os.environ.get("PATH", os.defpath),
        *(f"{home}/{name}" for home in homes for name in ("bin", "compute-sanitizer")),
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


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
    """Bytes of the device that the call takes at its peak, sampled every millisecond: not all of them come from torch."""
    torch.cuda.empty_cache()
    before = least = torch.cuda.mem_get_info()[0]
    done = threading.Event()

    def watch() -> None:
        nonlocal least
        while not done.wait(0.001):
            least = min(least, torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
        torch.cuda.synchronize()
    finally:
        done.set()
        watcher.join()
    return before - least


def limits() -> dict[str, float]:
    """Operations per second of a float32 product (no TF32), and bytes per second of a copy, read and written."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = torch.randn(2, 8192, 8192, device="cuda").unbind()
    out = torch.empty_like(a)
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    return {
        "matrix": 2 * 8192**3 / event_times(lambda: torch.mm(a, b, out=out), 5)["median"],
        "copy": 2 * source.nbytes / event_times(lambda: target.copy_(source), 5)["median"],
    }


Row = dict[str, Any]
LARGEST = 1_000_000


def facility_location_row(n: int, d: int, k: int, backend: str, rounds: int, found: dict[str, float]) -> Row:
    """A row of facility location: time, memory, and the shares of the device's limits. One round is timed while the memory is
    watched; more rounds follow with cold caches and without the watch."""
    import flashcoreset as fc

    x = torch.from_numpy(data.clustered(n, d)).cuda()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def select() -> fc.Selection:
        start.record()
        selection = fc.facility_location(x, k, backend=backend)
        end.record()
        return selection

    memory = peak_memory(select)
    if rounds == 1:
        times = dict.fromkeys(("q20", "median", "q80"), start.elapsed_time(end) / 1e3)
    else:
        times = event_times(select, rounds)
    # The points are packed, and read at least once per pick.
    row = shares(times, 2.0 * n * n * d, 4.0 * n * d * (2 + k), found)
    row["memory"] = memory
    if n <= 10_000:
        row["same_picks_as_cpu"] = torch.equal(
            select().indices.cpu(), fc.facility_location(x.cpu(), k).indices
        )
    return row


def shares(times: dict[str, float], operations: float, moved: float, found: dict[str, float]) -> Row:
    """The times beside the time of `operations` in products, and the share of the copy bandwidth that `moved` bytes make."""
    return {
        "seconds": times,
        "products": times["median"] * found["matrix"] / operations,
        "copy_share": moved / times["median"] / found["copy"],
    }


def pairwise_row(metric: str, backend: str, found: dict[str, float]) -> Row:
    """A row of pairwise distances, beside torch's own way to them."""
    n, d = 8192, 512
    x = torch.randn(n, d, device="cuda")
    peer = {"cosine": _mm_cosine, "l1": _cdist_l1}[metric]
    peer_times = event_times(lambda: peer(x), 5)
    pairwise = importlib.import_module(f"flashcoreset.kernels.{backend}").pairwise
    times = event_times(lambda: pairwise(x, metric=metric), 5)
    row = shares(times, 2.0 * n * n * d, 4.0 * (2 * n * d + n * n), found)
    row |= {"peer_seconds": peer_times, "ratio": peer_times["median"] / times["median"]}
    row["same_values_as_peer"] = torch.allclose(pairwise(x, metric=metric), peer(x), rtol=1e-4, atol=1e-4)
    return row


def matching_row(backend: str, found: dict[str, float]) -> Row:
    """A row of gradient matching: which dimensions of low-rank gradients count, and the updates there."""
    import flashcoreset as fc
    from flashcoreset.kernels import Gradients, UpdatesProblem, cpu

    count, numel, groups, top = 128, 655_360, 4, 2_560
    coefficients, m, v = torch.randn(count, 1), 0.1 * torch.randn(numel), torch.rand(numel)
    offset = torch.arange(0, count + 1, count // groups)

    def problem_on(device: str) -> UpdatesProblem:
        history = fc.AdamState(m.to(device), v.to(device), 10)
        g = Gradients(coefficients.to(device), 1, numel)
        return UpdatesProblem(g, history, torch.arange(count, device=device), offset.to(device), top)

    here = problem_on("cuda")
    kernel = importlib.import_module(f"flashcoreset.kernels.{backend}").top_updates
    times = event_times(lambda: kernel(here), 5)
    # m and v are read.
    row = shares(times, 2.0 * count * numel, 8.0 * numel, found)
    row["memory"] = peak_memory(lambda: kernel(here))
    dims, _ = cpu.top_updates(problem_on("cpu"))
    row["same_picks_as_cpu"] = torch.equal(kernel(here)[0].cpu(), dims)
    return row


def caratheodory_row(backend: str, found: dict[str, float]) -> Row:
    """A row of the Carathéodory reduction, all of whose rounds count."""
    from flashcoreset.kernels import CaratheodoryProblem

    n, d = 1_000_000, 32
    x = torch.randn(n, d, device="cuda")
    problem = CaratheodoryProblem(x)
    kernel = importlib.import_module(f"flashcoreset.kernels.{backend}").caratheodory
    times = event_times(lambda: kernel(problem), 5)
    # Each round reads a quarter of the rows that the one before did.
    row = shares(times, 2.0 * n * d * 4 / 3, 4.0 * n * d * 4 / 3, found)
    row["memory"] = peak_memory(lambda: kernel(problem))
    indices, weights = kernel(problem)
    missing = (weights @ x[indices].double() - x.double().sum(0)).abs() / x.double().abs().sum(0)
    row["keeps_sums"] = len(indices) == d + 1 and float(missing.max()) < 1e-14
    return row


def pursuit_row(backend: str, found: dict[str, float]) -> Row:
    """A row of orthogonal matching pursuit."""
    from flashcoreset import kernels

    b, d, k = 4_096, 2_048, 400
    g = torch.from_numpy(data.clustered(b, d)).cuda()
    target = g.double().sum(0)
    kernel = importlib.import_module(f"flashcoreset.kernels.{backend}").orthogonal_matching_pursuit
    problem = kernels.PursuitProblem(g, target, k)
    times = event_times(lambda: kernel(problem), 5)
    # The rows are read for a dozen columns of the Gram matrix at a time, and the columns of the earlier picks are read for
    # each pick.
    row = shares(times, 2.0 * b * d * k, 4.0 * b * d * k / 12 + 4.0 * b * k * k, found)
    row["memory"] = peak_memory(lambda: kernel(problem))
    on_host = kernels.PursuitProblem(g.cpu(), target.cpu(), k)
    picks = kernels.cpu.orthogonal_matching_pursuit(on_host).indices
    row["same_picks_as_cpu"] = torch.equal(kernel(problem).indices.cpu(), picks)
    return row


@dataclass(frozen=True)
class Planned:
    """A row to be measured."""

    name: str
    backend: str
    expected: Callable[[list[Row]], float]  # seconds, given the rows before it
    measure: Callable[[dict[str, float]], Row]


def plan() -> list[Planned]:
    """The rows, the one that takes longest last."""

    def greedy(n: int, k: int, backend: str, rounds: int, expected: Callable[[list[Row]], float]) -> Planned:
        name = f"facility-location-{n}-128-{k}-{backend}"
        return Planned(
            name, backend, expected, lambda found: facility_location_row(n, 128, k, backend, rounds, found)
        )

    def pairs(metric: str, backend: str) -> Planned:
        name = f"pairwise-{metric}-8192-512-{backend}"
        return Planned(name, backend, lambda rows: 10, lambda found: pairwise_row(metric, backend, found))

    def matching(backend: str) -> Planned:
        name = f"matching-128-655360-4-2560-{backend}"
        return Planned(name, backend, lambda rows: 10, lambda found: matching_row(backend, found))

    def reduction(backend: str) -> Planned:
        name = f"caratheodory-1000000-32-{backend}"
        return Planned(name, backend, lambda rows: 10, lambda found: caratheodory_row(backend, found))

    def pursuit(backend: str) -> Planned:
        name = f"pursuit-4096-2048-400-{backend}"
        return Planned(name, backend, lambda rows: 10, lambda found: pursuit_row(backend, found))

    def from_a_tenth(rows: list[Row]) -> float:
        """Ten times the points are a hundred times the products."""
        seconds = (row["seconds"]["median"] for row in rows if row["name"] == tenth.name and "seconds" in row)
        return 100 * next(seconds, math.inf) + 10

    tenth = greedy(LARGEST // 10, 1_000, "cuda", 3, lambda rows: 15)
    return [
        greedy(10_000, 1_000, "cuda", 5, lambda rows: 10),
        greedy(10_000, 100, "triton", 3, lambda rows: 20),
        tenth,
        *(pairs(metric, backend) for metric in ("cosine", "l1") for backend in ("cuda", "triton")),
        *(matching(backend) for backend in ("cuda", "triton")),
        *(reduction(backend) for backend in ("cuda", "triton")),
        *(pursuit(backend) for backend in ("cuda", "triton")),
        greedy(LARGEST, 1_000, "cuda", 1, from_a_tenth),
    ]


def measure(out: Path, deadline: float) -> bool:
    """The benchmarks, each written to measured.json when it is done; a benchmark that the deadline leaves no time for is named
    as left out. Returns whether none failed."""
    found = limits()
    rows: list[Row] = []
    for planned in plan():
        row: Row = {"name": planned.name, "backend": planned.backend}
        if time.time() + planned.expected(rows) > deadline:
            row["left_out"] = "no time left"
        else:
            try:
                row |= planned.measure(found)
            except Exception as error:
                traceback.print_exc()
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        rows.append(row)
        (out / "measured.json").write_text(json.dumps({"limits": found, "rows": rows}, indent=1))
    return not any("failed" in row for row in rows)


def _mm_cosine(x: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(x)
    return unit @ unit.T


def _cdist_l1(x: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, x, p=1)


AGREEMENTS = ("same_picks_as_cpu", "same_values_as_peer", "keeps_sums")
NOT_MEASURED = {"left_out": "left out", "failed": "failed"}


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
        "| row | median | 20 to 80 % | products | share of copying | ratio to the peer | agrees | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured["rows"]:
        if why := next((f"{how}: {row[key]}" for key, how in NOT_MEASURED.items() if key in row), None):
            lines.append(f"| {row['name']} | {why} | | | | | | |")
            continue
        times = {name: f"{value * 1e3:.3f} ms" for name, value in row["seconds"].items()}
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        agrees = next((row[name] for name in AGREEMENTS if name in row), "")
        memory = f"{row['memory'] / 1e6:.0f} MB" if "memory" in row else ""
        lines.append(
            f"| {row['name']} | {times['median']} | {times['q20']} to {times['q80']} | {row['products']:.2f} "
            f"| {row['copy_share']:.0%} | {ratio} | {agrees} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if everything ran and passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--measure", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.measure is not None:
        return 0 if measure(out, arguments.measure) else 1
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
    log = out / "gpu.log"
    log.write_text("")
    (out / "measured.json").unlink(missing_ok=True)
    on_gpu = {"PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}", "FLASHCORESET_TEST_DEVICE": "cuda"}

    def step(name: str, command: list[str], seconds: float, **environment: str) -> bool:
        left = min(seconds, deadline - time.time())
        status, took = run(command, log, left, **environment)
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
        for backend in ("cuda", "triton"):
            for family in ("facility_location", "sketch", "matching", "caratheodory", "pursuit"):
                files = [f"tests/test_{family}.py", f"tests/backends/test_{family}_{backend}.py"]
                if family == "facility_location":
                    files += [
                        "tests/test_facility_location_limits.py",
                        "tests/test_precomputed_distance.py",
                        "tests/test_pairwise.py",
                    ]
                passed &= step(f"test-{backend}-{family}", [*test, *files, "-k", backend], 120, **on_gpu)
        others = ["tests/test_torch_library.py", "tests/test_facility_location_interrupt.py"]
        passed &= step("test-others", [*test, *others, "-k", "opcheck or compile or ctrl_c"], 60, **on_gpu)
        bench = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), f"--measure={deadline - 60}"]
        passed &= step("measure", bench, 300, **on_gpu)
        if (
            out / "measured.json"
        ).exists():  # rows measured before an error or before the end of the time, too
            report["measured"] = json.loads((out / "measured.json").read_text())
        sanitizer = find_sanitizer()
        for tool in ("memcheck", "racecheck"):
            if sanitizer is None:
                report["steps"].append(
                    {"name": tool, "result": "compute-sanitizer is not installed", "seconds": 0.0}
                )
                continue
            command = [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
            command += [*test, *SANITIZED_FILES, "-k", SANITIZED]
            # Instrumented kernels may need more registers than the occupancy that CUDA reports allows for.
            passed &= step(tool, command, 90, **on_gpu, FLASHCORESET_CUDA_BLOCKS="1")
    (out / "gpu.json").write_text(json.dumps(report, indent=1))
    (out / "gpu.md").write_text(table(report))
    print(table(report))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
