"""Public functions in children of a process that has used them: forked, spawned, of a fork server, and workers of a DataLoader."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashcoreset as fc

METHODS = ("fork", "dataloader", "forkserver", "spawn")
SCRIPT = Path(__file__).with_name("forked_calls.py")


@functools.cache
def outcomes(method: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), method],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_calls_in_children_are_those_of_the_parent(method: str) -> None:
    wrong = {name: outcome for name, outcome in outcomes(method).items() if outcome != "same"}
    assert not wrong


def test_no_public_function_is_left_out() -> None:
    without_work = {
        "AdamState",
        "BackendUnavailableError",
        "CoLM",  # as "colm"
        "ConvergenceWarning",
        "Coreset",
        "Divergence",
        "InputWarning",
        "LowRankGradients",
        "OuterProductGradients",
        "RankOneAdamState",
        "Rows",
        "SampleScores",
        "Selection",
        "SlowPathWarning",
        "Transport",
        "__version__",
        "compat",
        "distributed",  # ranks are processes of their own
        "integrations",  # as BatchSelector
        "kernels",  # by their names
        "load",
        "memory_estimate",
        "open_rows",
        "plot",
        "read_ahead",
        "register_gradient_rule",
        "select",  # as "colm"
    }
    called = {name.partition(" ")[0] for name in outcomes("fork")}
    assert set(fc.__all__) - without_work <= called
