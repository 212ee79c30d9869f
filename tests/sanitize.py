"""Runs Python on modules that were built with sanitizers: python tests/sanitize.py address|thread [arguments of pytest].

`make sanitize` builds them (tests/cpp, FLASHCORESET_CPU_MODULE) and runs TESTS, or what ARGS names, under both. The package of
this tree is laid over the installed one, with the sanitized modules in place of its own, and the sanitizer's library is loaded
first, as it has to be in a program that was built without. Only reports on the interpreter, torch and NumPy themselves are
suppressed (tests/sanitizers/*.supp).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"address": ROOT / "build" / "sanitize-address", "thread": ROOT / "build" / "sanitize-thread"}

# The table of tests that drive each binding, the emulated CUDA kernels among them. Tests that train models, start processes
# without the sanitizer or compare with other packages are left out: they call the same kernels with the same arguments.
TESTS = (
    "test_bindings.py",
    "test_boundary.py",
    "test_bad_input.py",
    "test_facility_location.py",
    "test_facility_location_sampling.py",
    "test_facility_location_limits.py",
    "test_facility_location_rounds.py",
    "test_precomputed_distance.py",
    "test_pairwise.py",
    "backends/test_facility_location_cuda.py",
    "test_nearest_order.py",
    "test_partial_gains.py",
    "test_sinkhorn.py",
    "test_sinkhorn_kernels.py",
    "test_sinkhorn_course.py",
    "test_sinkhorn_relaxed.py",
    "test_sinkhorn_shared.py",
    "backends/test_sinkhorn_cuda.py",
    "test_sketch.py",
    "backends/test_sketch_cuda.py",
    "test_scores.py",
    "test_matching.py",
    "backends/test_matching_cuda.py",
    "test_zeroth_order.py",
    "test_transport.py",
    "test_caratheodory.py",
    "backends/test_caratheodory_cuda.py",
    "test_pursuit.py",
    "backends/test_pursuit_cuda.py",
)


def package(kind: str) -> Path:
    """A folder to import flashcoreset from: links to this tree's sources and the sanitized modules. Others may be using it."""
    built, place = FOLDERS[kind] / "modules", FOLDERS[kind] / "python"
    modules = list(built.glob("_cpu_*.so"))
    if len(modules) != 1:
        raise SystemExit(
            f"expected one sanitized module in {built}, found {len(modules)}: make sanitize builds it"
        )
    folder = place / "flashcoreset"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = [path for path in (ROOT / "python" / "flashcoreset").iterdir() if path.suffix != ".so"]
    wanted = {
        path.name: path
        for path in (*sources, ROOT / "triton_kernels", *modules, built / f"_processor{suffix}")
    }
    for link in folder.iterdir():
        if link.name not in wanted:
            link.unlink(missing_ok=True)
    for name, path in wanted.items():
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(path)
    return place


def _library(name: str) -> str:
    found = subprocess.run(
        [os.environ.get("CXX", "c++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = found.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{name} is missing: install the sanitizers' libraries of the C++ compiler")
    return os.path.realpath(path)


def environment(kind: str) -> dict[str, str]:
    """The environment that a Python process needs to run on the sanitized modules."""
    suppressions = ROOT / "tests" / "sanitizers"
    libraries = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[kind]
    options = {
        # torch and the interpreter keep what they allocate. Too large an allocation is an exception, as without the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:hard_rss_limit_mb=8000",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"suppressions={suppressions / 'thread.supp'}:halt_on_error=1:report_signal_unsafe=0",
    }
    return {
        **os.environ,
        **options,
        "FLASHCORESET_SANITIZER": kind,
        "LD_PRELOAD": " ".join(map(_library, libraries)),
        "PYTHONPATH": str(package(kind)),
        "FLASHCORESET_TEST_EMULATED": str(FOLDERS[kind] / "emulator"),
        # torch's own team of threads is not tested, and the sanitizer does not know how it waits.
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
    }


def main() -> int:
    kind, *arguments = sys.argv[1:] or ["none"]
    if kind not in FOLDERS:
        raise SystemExit(f"usage: sanitize.py {'|'.join(FOLDERS)} [arguments of pytest]")
    named = any(argument.partition("::")[0].endswith(".py") for argument in arguments)
    tests = [] if named else [f"tests/{name}" for name in TESTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=0",
        "-s",
        *arguments,
        *tests,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment(kind), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
