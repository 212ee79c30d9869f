"""Removes each barrier of the CUDA kernels, one at a time, and lists those that no test misses.

    python tests/emulator/barriers.py [--only sketch.cu:228 sinkhorn] [--jobs 2]

A barrier is a __syncthreads(), __syncwarp() or grid_sync(). Each is taken out of a clone of the current commit, the emulator's
tests of its family are built and run, and the file is put back. A barrier that no test misses is needless, or the tests have a
hole: README.md beside this file has the reason for each that is known. Takes about a minute per barrier, so this is not part
of `make test`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BARRIER = re.compile(r"(__syncthreads|__syncwarp|grid_sync)\([^;]*\);")
FAMILIES = ("facility_location", "sinkhorn", "sketch", "matching", "caratheodory", "pursuit")


@dataclass(frozen=True)
class Barrier:
    """Line `line` (from 1) of `file` in csrc/cuda."""

    file: str
    line: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def tests(self) -> list[str]:
        """The targets that run its kernel: the family's own, or all for files that families share."""
        own = [family for family in FAMILIES if self.file.startswith(family)]
        return [f"test_cuda_{family}" for family in own or FAMILIES]


def barriers() -> list[Barrier]:
    """All barriers, file by file."""
    found = []
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        for number, text in enumerate(path.read_text().splitlines(), 1):
            code = text.partition("//")[0]
            if BARRIER.search(code) and "void grid_sync" not in code:
                found.append(Barrier(path.name, number, text.strip()))
    return found


def run(command: list[str], limit: float = 900) -> bool:
    """Whether the command succeeds within the limit of seconds; a kernel that waits for ever fails."""
    try:
        return subprocess.run(command, capture_output=True, timeout=limit, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="names, or beginnings of names")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    options = parser.parse_args()
    wanted = [b for b in barriers() if not options.only or b.name.startswith(tuple(options.only))]
    if not wanted:
        parser.error(f"there is no such barrier; there are {', '.join(b.name for b in barriers())}")
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        clone, build = Path(folder) / "clone", Path(folder) / "build"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        subprocess.run(
            ["cmake", "-S", str(clone / "tests" / "cpp"), "-B", str(build)], check=True, capture_output=True
        )

        def passes(targets: list[str]) -> bool | None:
            make = ["cmake", "--build", str(build), "-j", str(options.jobs), "--target", *targets]
            if not run(make, 3600):
                return None
            pattern = f"^({'|'.join(targets)})$"
            return run(["ctest", "--test-dir", str(build), "-R", pattern, f"-j{options.jobs}"])

        if not passes(sorted({target for b in wanted for target in b.tests})):
            print("the tests do not pass as they are", file=sys.stderr)
            return 2
        for barrier in wanted:
            path = clone / "csrc" / "cuda" / barrier.file
            kept = path.with_suffix(".kept")
            shutil.copy(path, kept)
            lines = path.read_text().splitlines(keepends=True)
            lines[barrier.line - 1] = BARRIER.sub(";", lines[barrier.line - 1], count=1)
            path.write_text("".join(lines))
            passed = passes(barrier.tests)
            shutil.move(kept, path)
            verdict = {True: "SURVIVES", False: "missed", None: "does not compile"}[passed]
            print(f"{verdict:16} {barrier.name:32} {barrier.text}", flush=True)
            if passed:
                survivors.append(barrier)
    print(f"{len(survivors)} of {len(wanted)} survive")
    return 0


if __name__ == "__main__":
    sys.exit(main())
