"""A minute of the random callers (`make fuzz` runs them for longer), and the programs that once failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parent / "fuzz"
REGRESSIONS = sorted((FUZZ / "regressions").glob("*.txt"))


def call(*arguments: str) -> None:
    """Runs call.py, which reports faults by its exit status."""
    result = subprocess.run(
        [sys.executable, str(FUZZ / "call.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


# Programs are numbered, so these are the same ones each time.
@pytest.mark.parametrize(("target", "programs"), [("public", 300), ("cpu", 1500), ("cuda", 400)])
def test_random_calls(target: str, programs: int) -> None:
    call(target, "--calls", str(programs), "--seed", "1", "--limit", "300")


@pytest.mark.parametrize("target", ["public", "cpu", "cuda"])
def test_programs_that_failed_once(target: str) -> None:
    files = [str(path) for path in REGRESSIONS if path.name.startswith(f"{target}-")]
    assert files
    call(target, "--limit", "300", "--run", *files)
