"""``make gpu OUT=dir``: tests, benchmarks and sanitizer runs on a machine with a GPU, without network, within six minutes.

Builds the package into build/gpu with the tools that are installed, runs the tests that can have their tensors on a device
there (those of the CUDA and Triton backends, of torch.compile and of Ctrl-C; the others are about the CPU), several at a time, times
every family of kernels beside the device's measured limits and the times that were predicted (docs/gpu.md), and runs
compute-sanitizer over a few cases if it is installed. Writes OUT/gpu.json, OUT/gpu.md and OUT/gpu.log, and a row to
OUT/measured.json as soon as it is measured. ``--measure`` is the part that the built package runs; ``--predict`` prints the
predictions and needs no GPU.
"""

from __future__ import annotations

import argparse
import functools
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import data, machine

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu" / "site"
BUDGET = 6 * 60.0  # seconds for everything
TESTING = 150.0  # seconds of them for the tests
TESTS_AT_ONCE = 4  # processes that share the GPU while tests run, which wait for the host most of the time
FAMILIES = ("facility_location", "sinkhorn", "sketch", "scores", "matching", "caratheodory", "pursuit")
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


def test_steps() -> list[tuple[str, list[str]]]:
    """The tests that can have their tensors on a device, as names and arguments of pytest; those that take longest first."""
    steps = []
    for family in FAMILIES:
        for backend in ("cuda", "triton"):
            files = [f"tests/test_{family}.py", f"tests/backends/test_{family}_{backend}.py"]
            if family == "facility_location":
                files += [
                    "tests/test_facility_location_limits.py",
                    "tests/test_precomputed_distance.py",
                    "tests/test_pairwise.py",
                ]
            files = [file for file in files if (ROOT / file).is_file()]
            steps.append((f"test-{backend}-{family}", [*files, "-k", backend]))
    # One family has no CUDA kernels of its own, so that pytest would find no test and fail.
    steps = [(name, more) for name, more in steps if name != "test-cuda-scores"]
    others = ["tests/test_torch_library.py", "tests/test_facility_location_interrupt.py"]
    return [*steps, ("test-others", [*others, "-k", "opcheck or compile or ctrl_c"])]


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


@dataclass(frozen=True)
class Work:
    """What a row's kernels have to do at the least, and the share of the limit that is predicted to be reached.

    Attributes:
        operations: floating-point operations outside matrix units; a fused multiply-add is two.
        moved: bytes read from and written to the device's memory.
        reached: the predicted share of the limit that binds.
        why: where that share and the waits come from.
        waits: seconds that are predicted to go by beside the work, for launches, barriers of the whole grid, and the host.
    """

    operations: float
    moved: float
    reached: float
    why: str
    waits: float = 0.0

    def limit(self, found: dict[str, float]) -> float:
        """Seconds below which the row cannot come on a device of these limits."""
        return max(self.operations / found["matrix"], self.moved / found["copy"])

    def predicted(self, found: dict[str, float]) -> float:
        return self.limit(found) / self.reached + self.waits

    def binds(self, found: dict[str, float]) -> str:
        """The limit that binds."""
        is_arithmetic = self.operations / found["matrix"] > self.moved / found["copy"]
        return "arithmetic" if is_arithmetic else "memory"

    def beside(self, median: float, found: dict[str, float]) -> Row:
        """A median time beside the work: in products, as a share of the copy bandwidth, and the time that was predicted."""
        return {
            "products": median * found["matrix"] / self.operations,
            "copy_share": self.moved / median / found["copy"],
            "predicted": self.predicted(found),
        }


def facility_location_row(n: int, d: int, k: int, backend: str, rounds: int) -> Row:
    """A row of facility location: time and memory. One round is timed while the memory is watched; more rounds follow with cold
    caches and without the watch."""
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
    row: Row = {"seconds": times, "memory": memory}
    if n <= 10_000:
        row["same_picks_as_cpu"] = torch.equal(
            select().indices.cpu(), fc.facility_location(x.cpu(), k).indices
        )
    return row


def pairwise_row(metric: str, backend: str) -> Row:
    """A row of pairwise distances, beside torch's own way to them."""
    x = torch.randn(*PAIRWISE, device="cuda")
    peer = {"cosine": _mm_cosine, "l1": _cdist_l1}[metric]
    peer_times = event_times(lambda: peer(x), 5)
    pairwise = importlib.import_module(f"flashcoreset.kernels.{backend}").pairwise
    times = event_times(lambda: pairwise(x, metric=metric), 5)
    row = {"seconds": times, "peer_seconds": peer_times, "ratio": peer_times["median"] / times["median"]}
    row["same_values_as_peer"] = torch.allclose(pairwise(x, metric=metric), peer(x), rtol=1e-4, atol=1e-4)
    return row


def matching_row(backend: str) -> Row:
    """A row of gradient matching: which dimensions of low-rank gradients count, and the updates there."""
    import flashcoreset as fc
    from flashcoreset.kernels import Gradients, UpdatesProblem, cpu

    (count, numel), groups, top = MATCHED, 4, 2_560
    coefficients, m, v = torch.randn(count, 1), 0.1 * torch.randn(numel), torch.rand(numel)
    offset = torch.arange(0, count + 1, count // groups)

    def problem_on(device: str) -> UpdatesProblem:
        history = fc.AdamState(m.to(device), v.to(device), 10)
        g = Gradients(coefficients.to(device), 1, numel)
        return UpdatesProblem(g, history, torch.arange(count, device=device), offset.to(device), top)

    here = problem_on("cuda")
    kernel = importlib.import_module(f"flashcoreset.kernels.{backend}").top_updates
    row: Row = {
        "seconds": event_times(lambda: kernel(here), 5),
        "memory": peak_memory(lambda: kernel(here)),
    }
    dims, _ = cpu.top_updates(problem_on("cpu"))
    row["same_picks_as_cpu"] = torch.equal(kernel(here)[0].cpu(), dims)
    return row


def caratheodory_row(backend: str) -> Row:
    """A row of the Carathéodory reduction, all of whose rounds count."""
    from flashcoreset.kernels import CaratheodoryProblem

    d = REDUCED[1]
    x = torch.randn(*REDUCED, device="cuda")
    problem = CaratheodoryProblem(x)
    kernel = importlib.import_module(f"flashcoreset.kernels.{backend}").caratheodory
    row: Row = {
        "seconds": event_times(lambda: kernel(problem), 5),
        "memory": peak_memory(lambda: kernel(problem)),
    }
    indices, weights = kernel(problem)
    missing = (weights @ x[indices].double() - x.double().sum(0)).abs() / x.double().abs().sum(0)
    row["keeps_sums"] = len(indices) == d + 1 and float(missing.max()) < 1e-14
    return row


def pursuit_row(backend: str) -> Row:
    """A row of orthogonal matching pursuit."""
    from flashcoreset import kernels

    b, d, k = PURSUED
    g = torch.from_numpy(data.clustered(b, d)).cuda()
    target = g.double().sum(0)
    kernel = importlib.import_module(f"flashcoreset.kernels.{backend}").orthogonal_matching_pursuit
    problem = kernels.PursuitProblem(g, target, k)
    row: Row = {
        "seconds": event_times(lambda: kernel(problem), 5),
        "memory": peak_memory(lambda: kernel(problem)),
    }
    on_host = kernels.PursuitProblem(g.cpu(), target.cpu(), k)
    picks = kernels.cpu.orthogonal_matching_pursuit(on_host).indices
    row["same_picks_as_cpu"] = torch.equal(kernel(problem).indices.cpu(), picks)
    return row


# What 10 iterations take on an A100 by FlashSinkhorn's paper, on matrix units, for n points of 64 dimensions.
FLASH_SINKHORN = {10_000: 8.3e-3, 20_000: 21.7e-3, 50_000: 102.6e-3}


def sinkhorn_row(n: int, backend: str) -> Row:
    """A row of ten plain iterations of Sinkhorn between two clouds of `n` points."""
    import flashcoreset as fc

    x, y = torch.rand(2, n, 64, device="cuda").unbind()
    reg = 0.05 * float((x[:512, None] - y[None, :512]).square().sum(-1).max())

    def solve() -> fc.Transport:
        # With tol=0 plain iterations are made, all of them.
        return fc.sinkhorn(x, y, reg=reg, max_iter=10, tol=0, backend=backend)

    row: Row = {"seconds": event_times(solve, 3), "memory": peak_memory(solve)}
    row["ratio"] = FLASH_SINKHORN[n] / row["seconds"]["median"]
    few = fc.sinkhorn(x[:500], y[:500], reg=reg, max_iter=10, tol=0, backend=backend)
    host = fc.sinkhorn(x[:500].cpu(), y[:500].cpu(), reg=reg, max_iter=10, tol=0)
    row["same_values_as_cpu"] = torch.allclose(few.value.cpu(), host.value, rtol=1e-5)
    return row


SKETCHED = (64, 50_000_000, 8_192)


def sketch_row(kind: str, backend: str) -> Row:
    """A row of sketches of 64 gradients of 50 million numbers."""
    import flashcoreset as fc

    rows, length, dim = SKETCHED
    x = torch.randn(rows, length, device="cuda")

    def sketch() -> torch.Tensor:
        return fc.sketch(x, dim, kind=kind, seed=0, backend=backend)

    row: Row = {"seconds": event_times(sketch, 3), "memory": peak_memory(sketch)}
    part = x[:2, :100_000]
    on_device = fc.sketch(part, dim, kind=kind, seed=0, backend=backend)
    on_host = fc.sketch(part.cpu(), dim, kind=kind, seed=0)
    row["same_values_as_cpu"] = torch.allclose(on_device.cpu(), on_host, rtol=1e-4, atol=1e-4)
    return row


SCORED = (32_768, 32_000)


def scores_row(backend: str) -> Row:
    """A row of the scores of 32,768 tokens over a vocabulary of 32,000."""
    import flashcoreset as fc

    count, classes = SCORED
    logits = torch.randn(count, classes, device="cuda")
    targets = torch.randint(classes, (count,), device="cuda")

    def score() -> fc.SampleScores:
        return fc.sample_scores(logits, targets, backend=backend)

    row: Row = {"seconds": event_times(score, 5), "memory": peak_memory(score)}
    found = score().loss[:256].cpu()
    on_host = fc.sample_scores(logits[:256].cpu(), targets[:256].cpu()).loss
    row["same_values_as_cpu"] = torch.allclose(found, on_host, rtol=1e-4)
    return row


MATCHED = (128, 655_360)


def colm_row(backend: str) -> Row:
    """A row of CoLM's step as a whole: from 128 zeroth-order gradients to the 64 picks."""
    import flashcoreset as fc

    count, numel = MATCHED
    coefficients, m, v = torch.randn(count, 1), 0.1 * torch.randn(numel), torch.rand(numel)
    groups = torch.arange(count) * 4 // count

    def step(device: str, backend: str | None) -> torch.Tensor:
        g = fc.LowRankGradients(coefficients.to(device), seed=2, numel=numel)
        history = fc.AdamState(m.to(device), v.to(device), 10)
        return fc.match_gradients(
            g, 64, normalize=history, top=2_560, groups=groups.to(device), backend=backend
        ).indices

    row: Row = {
        "seconds": event_times(lambda: step("cuda", backend), 5),
        "memory": peak_memory(lambda: step("cuda", backend)),
    }
    row["same_picks_as_cpu"] = torch.equal(step("cuda", backend).cpu(), step("cpu", None))
    return row


def greedy_work(n: int, d: int, k: int) -> Work:
    """The products of one full sweep; the points are packed, and read at least once per pick."""
    return Work(
        2.0 * n * n * d, 4.0 * n * d * (2 + k), 0.2,
        "3 products in all, as on the CPU, at 60 % of a product's speed; 15 microseconds of barriers per pick", k * 15e-6,
    )  # fmt: skip


PAIRWISE = (8192, 512)
REDUCED = (1_000_000, 32)
PURSUED = (4_096, 2_048, 400)


def pairwise_work(metric: str) -> Work:
    n, d = PAIRWISE
    moved = 4.0 * (2 * n * d + n * n)
    if metric == "l1":
        # A difference and an addition of its magnitude, which is no fused operation, per pair and dimension.
        return Work(4.0 * n * n * d, moved, 0.5, "two additions in place of one fused operation")
    return Work(2.0 * n * n * d, moved, 0.6, "tiles of plain fused multiply-adds")


def matching_work(waits: float) -> Work:
    count, numel = MATCHED
    why = "a generator's rounds, roots and quotients per dimension beside the 128 products; some 20 launches"
    return Work(2.0 * count * numel, 8.0 * numel, 0.1, why, waits)


def reduction_work() -> Work:
    """Each round reads a quarter of the rows that the one before did."""
    n, d = REDUCED
    why = "the first round decides; each of eight rounds waits 0.3 ms for the host"
    return Work(2.0 * n * d * 4 / 3, 4.0 * n * d * 4 / 3, 0.5, why, 8 * 0.3e-3)


def pursuit_work() -> Work:
    """The rows are read for a dozen columns of the Gram matrix at a time; earlier picks' columns are read for each pick."""
    b, d, k = PURSUED
    moved = 4.0 * b * d * k / 12 + 4.0 * b * k * k
    return Work(2.0 * b * d * k, moved, 0.5, "20 microseconds for the host's answer per pick", k * 20e-6)


def scores_work() -> Work:
    count, classes = SCORED
    return Work(8.0 * count * classes, 4.0 * count * classes, 0.8, "one reading, block by block")


def sinkhorn_work(n: int) -> Work:
    """Ten iterations of two passes, each of which makes all costs anew: a product and an exponential per pair."""
    return Work(
        10 * 2 * float(n) * n * (2 * 64 + 20), 10 * 2 * 2 * 4.0 * n * 64, 0.5,
        "128 registers, two blocks of 256 threads per multiprocessor; exponentials beside fused multiply-adds",
    )  # fmt: skip


def sketch_work(kind: str) -> Work:
    """Every number is read once; dense projections are products beside the generator's rounds."""
    rows, length, dim = SKETCHED
    moved = 4.0 * rows * length
    if kind == "sjlt":
        return Work(2.0 * rows * length, moved, 0.5, "additions to shared memory, with conflicts of banks")
    if kind == "srht":
        # 13 additions per number for blocks of 8,192.
        return Work(13.0 * rows * length, moved, 0.5, "13 steps through shared memory per number")
    return Work(
        2.0 * rows * length * dim, moved, 0.4, "signs made beside the products, by each tile of 64 rows once"
    )


@dataclass(frozen=True)
class Planned:
    """A row to be measured."""

    name: str
    backend: str
    work: Work
    expected: Callable[[list[Row]], float]  # seconds of the whole row, given the rows before it
    measure: Callable[[], Row]


def plan() -> list[Planned]:
    """The rows, the one that takes longest last."""

    def greedy(n: int, k: int, backend: str, rounds: int, expected: Callable[[list[Row]], float]) -> Planned:
        name = f"facility-location-{n}-128-{k}-{backend}"
        work = greedy_work(n, 128, k)
        return Planned(
            name, backend, work, expected, lambda: facility_location_row(n, 128, k, backend, rounds)
        )

    def short(
        name: str,
        work: Work,
        row: Callable[..., Row],
        *arguments: str | int,
        backends: tuple[str, ...] = ("cuda", "triton"),
    ) -> list[Planned]:
        return [
            Planned(f"{name}-{b}", b, work, lambda rows: 10, functools.partial(row, *arguments, b))
            for b in backends
        ]

    def from_a_tenth(rows: list[Row]) -> float:
        """Ten times the points are a hundred times the products."""
        seconds = (row["seconds"]["median"] for row in rows if row["name"] == tenth.name and "seconds" in row)
        return 100 * next(seconds, math.inf) + 10

    tenth = greedy(LARGEST // 10, 1_000, "cuda", 3, lambda rows: 15)
    planned = [
        greedy(10_000, 1_000, "cuda", 5, lambda rows: 10),
        greedy(10_000, 100, "triton", 3, lambda rows: 20),
        tenth,
    ]
    for n in FLASH_SINKHORN:
        planned += short(f"sinkhorn-{n}-64-10", sinkhorn_work(n), sinkhorn_row, n)
    for kind in ("sjlt", "srht", "rademacher"):
        name = f"sketch-{kind}-{SKETCHED[0]}-{SKETCHED[1]}-{SKETCHED[2]}"
        # Triton's one kernel for all kinds makes a dense matrix.
        backends = ("cuda", "triton") if kind == "rademacher" else ("cuda",)
        planned += short(name, sketch_work(kind), sketch_row, kind, backends=backends)
    planned += short(f"scores-{SCORED[0]}-{SCORED[1]}", scores_work(), scores_row, backends=("triton",))
    planned += short(f"colm-step-{MATCHED[0]}-{MATCHED[1]}-4-2560-64", matching_work(1e-3), colm_row)
    for metric in ("cosine", "l1"):
        name = f"pairwise-{metric}-{PAIRWISE[0]}-{PAIRWISE[1]}"
        planned += short(name, pairwise_work(metric), pairwise_row, metric)
    planned += short(f"matching-{MATCHED[0]}-{MATCHED[1]}-4-2560", matching_work(0.1e-3), matching_row)
    planned += short(f"caratheodory-{REDUCED[0]}-{REDUCED[1]}", reduction_work(), caratheodory_row)
    planned += short("pursuit-" + "-".join(map(str, PURSUED)), pursuit_work(), pursuit_row)
    return [*planned, greedy(LARGEST, 1_000, "cuda", 1, from_a_tenth)]


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
                row |= planned.measure()
                row |= planned.work.beside(row["seconds"]["median"], found)
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


# Float32 products without matrix units, and copies read and written, per second: what these devices are expected to measure.
EXPECTED = {
    "A100": {"matrix": 17e12, "copy": 1.3e12},
    "H100": {"matrix": 48e12, "copy": 2.8e12},
    "H200": {"matrix": 48e12, "copy": 4.0e12},
}


def predictions() -> str:
    """The rows' predicted times on each device of `EXPECTED`, in Markdown."""
    lines = [
        "| row | operations | bytes | limit | reached | " + " | ".join(EXPECTED) + " | why |",
        "| --- " * (6 + len(EXPECTED)) + "|",
    ]
    last = EXPECTED["H200"]
    for planned in plan():
        work = planned.work
        times = " | ".join(f"{work.predicted(found) * 1e3:.3g} ms" for found in EXPECTED.values())
        lines.append(
            f"| {planned.name} | {work.operations:.2g} | {work.moved:.2g} | {work.binds(last)} | {work.reached:.0%} | {times} "
            f"| {work.why} |"
        )
    return "\n".join(lines) + "\n"


AGREEMENTS = ("same_picks_as_cpu", "same_values_as_cpu", "same_values_as_peer", "keeps_sums")
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
        "| row | median | 20 to 80 % | predicted | products | share of copying | ratio to the peer | agrees | memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured["rows"]:
        if why := next((f"{how}: {row[key]}" for key, how in NOT_MEASURED.items() if key in row), None):
            lines.append(f"| {row['name']} | {why} | | | | | | | |")
            continue
        times = {name: f"{value * 1e3:.3f} ms" for name, value in row["seconds"].items()}
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        agrees = next((row[name] for name in AGREEMENTS if name in row), "")
        memory = f"{row['memory'] / 1e6:.0f} MB" if "memory" in row else ""
        lines.append(
            f"| {row['name']} | {times['median']} | {times['q20']} to {times['q80']} | {row['predicted'] * 1e3:.3f} ms "
            f"| {row['products']:.2f} | {row['copy_share']:.0%} | {ratio} | {agrees} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if everything ran and passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    what.add_argument(
        "--predict", action="store_true", help="print the times that are predicted for each row"
    )
    parser.add_argument("--measure", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.predict:
        print(predictions())
        return 0
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
    log, lock = out / "gpu.log", threading.Lock()
    log.write_text("")
    (out / "measured.json").unlink(missing_ok=True)
    on_gpu = {"PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}", "FLASHCORESET_TEST_DEVICE": "cuda"}

    def step(name: str, command: list[str], seconds: float, **environment: str) -> bool:
        left = min(seconds, deadline - time.time())
        own = out / f"{name}.log"  # steps that run at once must not write between each other's lines
        own.write_text("")
        status, took = run(command, own, left, **environment)
        result = {0: "passed", 124: "ran out of time"}.get(status, f"failed ({status})")
        with lock, log.open("a") as stream:
            stream.write(own.read_text())
            own.unlink()
            report["steps"].append({"name": name, "result": result, "seconds": took})
            print(f"{name}: {result} in {took:.0f} s", flush=True)
        return status == 0

    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    built = step(
        "build",
        [*install, "--upgrade", "--target", str(SITE), str(ROOT)],
        180,
        FLASHCORESET_BUILD_ISAS="native",
        FLASHCORESET_CUDA="auto",
        FLASHCORESET_CUDA_ARCHITECTURES=f"{major}{minor}-real",
    )
    passed = built
    if built:
        test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        until = time.time() + TESTING
        with ThreadPoolExecutor(TESTS_AT_ONCE) as pool:
            started = [
                pool.submit(
                    lambda name, more: step(name, [*test, *more], until - time.time(), **on_gpu), name, more
                )
                for name, more in test_steps()
            ]
        passed &= all(done.result() for done in started)
        bench = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), f"--measure={deadline - 40}"]
        passed &= step("measure", bench, 200, **on_gpu)
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
            passed &= step(tool, command, 45, **on_gpu, FLASHCORESET_CUDA_BLOCKS="1")
    (out / "gpu.json").write_text(json.dumps(report, indent=1))
    (out / "gpu.md").write_text(table(report))
    print(table(report))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
