"""Processes of their own for a piece of code, forked from one that has imported torch already: importing it anew takes seconds.

flashcoreset is not imported there, and nothing has started a thread.
"""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        for name, to in (("out", 1), ("err", 2)):
            os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT), to)
        os.environ.update(task["environment"])
        status = 0
        try:
            exec(compile(task["code"], "<code>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server(start: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    command = ["env", *(f"{name}={value}" for name, value in start), sys.executable, "-c", _SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None
    atexit.register(server.stdin.close)  # which ends it
    return server


def run(
    code: str, start: dict[str, str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The output and exit status of ``python -c code``, with `environment` set; `start` is for variables that count when a
    process starts."""
    server = _server(tuple((start or {}).items()))
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        task = {"code": code, "out": str(out), "err": str(err), "environment": environment}
        print(json.dumps(task), file=server.stdin, flush=True)
        told = server.stdout.readline()
        assert told, "the process that forks has ended"
        return subprocess.CompletedProcess(code, int(told), out.read_text(), err.read_text())
