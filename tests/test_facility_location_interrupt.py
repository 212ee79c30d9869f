"""Ctrl-C ends a long call at once, and other Python threads run meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from cases import DEVICE

import flashcoreset as fc

LONG_CALL = """
import time, torch, flashcoreset as fc
x = torch.randn({n}, 64, generator=torch.Generator().manual_seed(0)).to("{device}")
fc.facility_location(x[:50], 5, backend="{backend}")
print("ready", flush=True)
try:
    fc.facility_location(x, {k}, method="{method}", backend="{backend}", memory_budget=0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(fc.facility_location(x[:50], 5, backend="{backend}").indices.shape[0], flush=True)
"""


LONG = {
    "cpu": [
        ("cpu", "lazy", 60_000),
        ("cpu", "naive", 60_000),
        ("cpu", "stochastic", 60_000),
        ("torch", "lazy", 20_000),
    ],
    # The first takes seconds for its first pick, the second half a minute for many short ones.
    "cuda": [("cuda", "lazy", 2_000_000), ("cuda", "naive", 60_000)],
}


@pytest.mark.parametrize(("backend", "method", "n"), LONG[DEVICE])
def test_ctrl_c_ends_the_call_within_a_second(backend: str, method: str, n: int) -> None:
    code = LONG_CALL.format(backend=backend, method=method, n=n, k=n // 2, device=DEVICE)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.7)  # well inside the call
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - begin < 1
        assert process.stdout.readline() == "5\n"
        assert process.wait(timeout=30) == 0


def test_other_threads_run_during_a_call() -> None:
    x = torch.randn(6000, 64, generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    expected = fc.facility_location(x, 100, backend="cpu", memory_budget=0)
    alone = time.perf_counter() - begin
    done = threading.Event()
    results: list[fc.Selection] = []

    def call() -> None:
        results.append(fc.facility_location(x, 100, backend="cpu", memory_budget=0))
        done.set()

    thread = threading.Thread(target=call)
    longest, last = 0.0, time.perf_counter()
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    thread.join()
    # A call that held the GIL would stall this thread for as long as it takes.
    assert longest < 0.5 * alone
    assert torch.equal(results[0].indices, expected.indices)


def test_threads_may_call_at_the_same_time() -> None:
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    expected = fc.facility_location(x, 50, backend="cpu")
    results: list[fc.Selection] = []
    threads = [
        threading.Thread(target=lambda: results.append(fc.facility_location(x, 50, backend="cpu")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(result.gains, expected.gains) for result in results)
