"""What the machine is and how fast it can be: the limits that every time is compared with.

The matrix rate is that of a float32 ``torch.mm`` at the benchmark's thread count, 2 * n * m * d operations per product, and
the copy bandwidth that of ``Tensor.copy_`` between buffers larger than the caches, each byte counted once read and once
written.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "flashcoreset",
    "torch",
    "numpy",
    "scikit-learn",
    "submodlib-py",
    "apricot-select",
    "numba",
    "POT",
)


@dataclass(frozen=True)
class Limits:
    """Measured limits: ``matrix`` in operations per second, ``copy`` in bytes per second."""

    matrix: float
    copy: float


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_limits(*, size: int = 2048, copy_bytes: int = 1 << 28, repeats: int = 5) -> Limits:
    """Measures both limits now: other users of the machine move them, so each row measures its own."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator)
    b = torch.randn(size, size, generator=generator)
    out = torch.empty(size, size)
    matrix = 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out), repeats)
    source = torch.zeros(copy_bytes // 4)
    target = torch.empty_like(source)
    copy = 2 * copy_bytes / _median_seconds(lambda: target.copy_(source), repeats)
    return Limits(matrix=matrix, copy=copy)


def mean_limits(before: Limits, after: Limits) -> Limits:
    """The limits of a long row, from a measurement before it and one after it."""
    return Limits(**{name: (value + asdict(after)[name]) / 2 for name, value in asdict(before).items()})


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@functools.cache
def hardware() -> dict[str, object]:
    """Processor, cores, threads used and the build of our kernels that this process took."""
    from flashcoreset._core import native

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native.module().ISA,
        "system": f"{platform.system()} {platform.machine()}",
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of every package that takes part and is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def commit() -> str:
    """The commit measured; "+changes" if the sources differ from it, "unknown" outside a git checkout."""
    sources = ["csrc", "python", "CMakeLists.txt", "benchmarks/*.py"]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", *sources],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


if __name__ == "__main__":
    limits = measure_limits()
    print(
        f"{hardware()}\nmatrix product {limits.matrix / 1e9:.0f} GFLOP/s, copy {limits.copy / 1e9:.1f} GB/s"
    )
    sys.exit(0)
