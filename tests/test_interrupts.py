"""Ctrl-C at a random time: one of the interrupts of tests/interrupts.py, which makes as many as one likes, of each long function."""

from __future__ import annotations

import threading
from pathlib import Path

import interrupts
import processes
import pytest


@pytest.mark.parametrize("name", interrupts.table())
def test_ctrl_c_ends_the_call_within_a_second(name: str) -> None:
    # A whole call takes seconds, and tests/interrupts.py is there to measure it.
    outcome = interrupts.interrupt(name, 1, seed=len(name), seconds=0.4)
    assert outcome.faults == []
    assert len(outcome.latencies) + outcome.after == 1
    assert all(latency < 1 for latency in outcome.latencies), outcome.latencies


IMPORT = """
import os, signal, sys, threading, time
sys.path.insert(0, {folder!r})
from flashcoreset._core.imports import imported
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    imported("slow_package", {{"SLOW": "1"}})
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - begin < 1)
print(imported("slow_package", {{"SLOW": "1"}}).seen, imported("slow_package") is sys.modules["slow_package"], os.environ.get("SLOW"))
"""


def test_an_import_goes_on_when_the_call_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "slow_package.py").write_text(
        "import os, time\nseen = os.environ['SLOW']\nfor _ in range(150): time.sleep(0.01)\n"
    )
    done = processes.run(IMPORT.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["interrupted True", "1 True None"]


FORK = """
import os, signal, sys, threading, time
sys.path.insert(0, {folder!r})
import flashcoreset
from flashcoreset._core.imports import imported
thread = threading.Thread(target=imported, args=("slow_package",))
thread.start()
time.sleep(0.2)
if os.fork() == 0:
    signal.alarm(20)  # a lock of the import that the child inherits is held for ever
    os._exit(7 if hasattr(imported("slow_package"), "seen") else 8)  # 8: half imported
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_fork_waits_for_an_import_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "slow_package.py").write_text(
        "import time\nfor _ in range(100): time.sleep(0.01)\nseen = 1\n"
    )
    done = processes.run(FORK.format(folder=str(tmp_path)))
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


def test_imports_from_another_thread_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcoreset._core.imports import imported

    (tmp_path / "quick_package.py").write_text("here = 1\n")
    (tmp_path / "broken_package.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    thread = threading.Thread(target=lambda: found.append(imported("quick_package").here))
    thread.start()
    thread.join()
    assert found == [1]
    for _ in range(2):
        with pytest.raises(ImportError, match="no_such_package"):
            imported("broken_package")


def test_pot_is_imported_without_other_array_libraries() -> None:
    code = (
        "import sys, os\n"
        "from flashcoreset.methods.goracs.exact_transport import load_pot\n"
        "ot = load_pot()\n"
        "assert ot.emd and not {'jax', 'tensorflow', 'cupy'} & set(sys.modules)\n"
        "assert not [name for name in os.environ if name.startswith('POT_BACKEND')]\n"
        "import torch\n"
        "assert ot.backend.get_backend(torch.ones(1)).__name__ == 'torch'\n"
    )
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
