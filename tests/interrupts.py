"""Ctrl-C at random times in every long function.

    python tests/interrupts.py [--count 200] [--seed 0] [NAME ...]

Each function has a process of its own, which calls it over and over while this one sends it SIGINT, once per call. Each call
must end in a KeyboardInterrupt within a second, and a small call after it must have the same result as ever. "first goracs"
forks a process per call, which then imports POT in it. Prints one row per function; test_interrupts.py runs a few of each.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

import flashcoreset as fc

Call = Callable[[], Any]


def table() -> dict[str, Callable[[], tuple[Call, Call]]]:
    """For each function, the makers of a call that takes a second or more, and of a small one."""

    def points(rows: int, columns: int = 64, seed: int = 0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))

    def facility_location(n: int, k: int, **options: Any) -> Call:
        x = points(n)
        return lambda: fc.facility_location(x, k, **options).indices

    def sinkhorn(n: int, iterations: int, **options: Any) -> Call:
        x, y = points(n, 8), points(n, 8, 1)
        return lambda: fc.sinkhorn(x, y, reg=0.5, max_iter=iterations, tol=0.0, **options).f

    def batches(count: int, iterations: int) -> Call:
        x = points(count * 40, 8).view(count, 40, 8)
        return lambda: fc.sinkhorn(x, x, reg=0.5, max_iter=iterations, tol=0.0, backend="cpu").f

    def divergence(n: int, iterations: int) -> Call:
        x, y = points(n, 8), points(n, 8, 1)
        return lambda: fc.sinkhorn_divergence(x, y, reg=0.5, max_iter=iterations, tol=0.0)

    def simcore(n: int, k: int, **options: Any) -> Call:
        x, y = points(n), points(1000, 64, 1)[: n // 3]
        return lambda: fc.simcore(x, y, k, n_clusters=100, stop=False, **options).indices

    def goracs(n: int, exchanges: int, solver: str = "exact") -> Call:
        x, y, norms = points(n), points(n // 5, 64, 1), points(n, 1)[:, 0].abs()
        return lambda: (
            fc.goracs(x, y, norms, n // 20, lam=0.5, max_exchanges=exchanges, solver=solver, reg=0.05).indices
        )

    def autocoreset(n: int, k: int) -> Call:
        x = points(n, 16).numpy()
        y = (x[:, 0] > 0).astype(np.int64)
        return lambda: (
            fc.autocoreset(x, y, "logistic_regression", "logistic_regression", k, patience=50).indices
        )

    def caratheodory(n: int, d: int) -> Call:
        x = points(n, d)
        return lambda: fc.caratheodory(x).indices

    def match(n: int, d: int, k: int, **options: Any) -> Call:
        g = points(n, d)
        return lambda: fc.match_gradients(g, k, **options).indices

    def colm(n: int, d: int) -> Call:
        g = points(n, d)
        return lambda: fc.select("colm", grads=g, k=n // 2, top=d // 2).indices

    def sketch(n: int, d: int, dim: int, kind: str) -> Call:
        x = points(n, d)
        return lambda: fc.sketch(x, dim, kind=kind)

    def projection(rows: int, dim: int) -> Call:
        return lambda: fc.projection_matrix(rows, dim, kind="gaussian")

    def sample_scores(n: int, c: int, backend: str = "cpu") -> Call:
        logits, targets = points(n, c), torch.arange(n) % c
        return lambda: fc.sample_scores(logits, targets, backend=backend).loss

    def ccs(n: int) -> Call:
        scores = points(n, 1)[:, 0]
        return lambda: fc.ccs(scores, n // 10, mislabel_scores=-scores, mislabel_ratio=0.1).indices

    def top_scores(n: int) -> Call:
        scores = points(n, 1)[:, 0]
        return lambda: fc.top_scores(scores, n // 10).indices

    def zeroth_order(n: int, count: int) -> Call:
        x, weight = points(200, n), torch.nn.Parameter(points(n, 200, 1))
        return lambda: (
            fc.zeroth_order_gradients(
                lambda: (x @ weight).square().mean(1), [weight], n_perturbations=count
            ).coefficients
        )

    def sketcher(width: int, rows: int) -> Call:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(4)])
        x = points(rows, width)

        def run() -> Any:
            found = fc.GradientSketcher(model, 64)
            with found:
                model(x).square().mean(1).mean().backward()
            model.zero_grad()
            return found.sketches

        return run

    def dynamics(n: int, c: int) -> Call:
        logits, targets = points(n, c), torch.arange(n) % c

        def run() -> Any:
            found = fc.TrainingDynamics(n)
            for epoch in range(4):
                found.update(torch.arange(n), logits, targets, epoch)
            return found.scores()["el2n"]

        return run

    return {
        "facility_location lazy": lambda: (
            facility_location(5_000, 1_500, backend="cpu", memory_budget=0),
            facility_location(50, 5, backend="cpu"),
        ),
        "facility_location naive": lambda: (
            facility_location(2_000, 200, backend="cpu", method="naive", memory_budget=0),
            facility_location(50, 5, backend="cpu", method="naive"),
        ),
        "facility_location stochastic": lambda: (
            facility_location(10_000, 3_000, backend="cpu", method="stochastic", memory_budget=0),
            facility_location(50, 5, backend="cpu", method="stochastic"),
        ),
        "facility_location torch": lambda: (
            facility_location(2_000, 200, backend="torch"),
            facility_location(50, 5, backend="torch"),
        ),
        "sinkhorn": lambda: (sinkhorn(2_000, 1_000, backend="cpu"), sinkhorn(50, 10, backend="cpu")),
        "sinkhorn of batches": lambda: (batches(2_000, 200), batches(5, 10)),
        "sinkhorn torch": lambda: (sinkhorn(1_000, 200, backend="torch"), sinkhorn(50, 10, backend="torch")),
        "sinkhorn_divergence": lambda: (divergence(1_500, 300), divergence(50, 10)),
        "simcore": lambda: (simcore(30_000, 5_000), simcore(300, 20)),
        "simcore torch": lambda: (simcore(20_000, 2_000, backend="torch"), simcore(300, 20, backend="torch")),
        "goracs": lambda: (goracs(8_000, 100), goracs(100, 3)),
        "goracs sinkhorn": lambda: (goracs(1_000, 5, "sinkhorn"), goracs(100, 3, "sinkhorn")),
        "first goracs": lambda: (goracs(8_000, 100), goracs(100, 3)),
        "autocoreset": lambda: (autocoreset(5_000, 100), autocoreset(200, 20)),
        "caratheodory": lambda: (caratheodory(200_000, 60), caratheodory(300, 10)),
        "match_gradients": lambda: (
            match(2_000, 4_000, 800, backend="cpu"),
            match(60, 100, 10, backend="cpu"),
        ),
        "match_gradients omp": lambda: (
            match(3_000, 1_000, 400, method="omp"),
            match(60, 100, 10, method="omp"),
        ),
        "match_gradients frank_wolfe": lambda: (
            match(5_000, 2_000, 2_000, method="frank_wolfe"),
            match(60, 100, 10, method="frank_wolfe"),
        ),
        "match_gradients caratheodory": lambda: (
            match(20_000, 80, 100, method="caratheodory"),
            match(60, 8, 12, method="caratheodory"),
        ),
        "colm": lambda: (colm(2_000, 4_000), colm(60, 100)),
        "sketch rademacher": lambda: (
            sketch(200, 100_000, 1_000, "rademacher"),
            sketch(5, 100, 10, "rademacher"),
        ),
        "sketch gaussian": lambda: (sketch(200, 50_000, 500, "gaussian"), sketch(5, 100, 10, "gaussian")),
        "sketch sjlt": lambda: (sketch(400, 400_000, 1_000, "sjlt"), sketch(5, 100, 10, "sjlt")),
        "sketch srht": lambda: (sketch(100, 1_000_000, 1_000, "srht"), sketch(5, 100, 10, "srht")),
        "projection_matrix": lambda: (projection(100_000, 1_000), projection(100, 10)),
        "sample_scores": lambda: (sample_scores(100_000, 1_000), sample_scores(50, 7)),
        "sample_scores torch": lambda: (
            sample_scores(50_000, 1_000, "torch"),
            sample_scores(50, 7, "torch"),
        ),
        "ccs": lambda: (ccs(10_000_000), ccs(500)),
        "top_scores": lambda: (top_scores(10_000_000), top_scores(500)),
        "zeroth_order_gradients": lambda: (zeroth_order(10_000, 50), zeroth_order(20, 3)),
        "GradientSketcher": lambda: (sketcher(1_000, 1_000), sketcher(20, 9)),
        "TrainingDynamics": lambda: (dynamics(100_000, 200), dynamics(50, 7)),
    }


FRESH = "first goracs"
LONGEST = 1.5  # seconds into a call
PATIENCE = 300


def digest(result: torch.Tensor) -> str:
    data = result.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


# ---- The process that is interrupted


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def interrupted(long: Call, small: Call, expected: str) -> None:
    """A call that is interrupted once, and one after it."""
    has_ended = False
    try:
        say("go", os.getpid())
        long()
        has_ended = True
        time.sleep(5)  # the signal is still to come, or was lost
        say("lost")
    except KeyboardInterrupt:
        say("late" if has_ended else "stopped", time.monotonic())
    say("right" if digest(small()) == expected else "wrong")


def in_child(act: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        say("died", status)


def work(name: str, count: int, seconds: float | None) -> None:
    long, small = table()[name]()
    if name == FRESH:
        here, there = os.pipe()
        start = time.monotonic()
        in_child(lambda: os.write(there, digest(small()).encode()) and None)
        say("ready", time.monotonic() - start)
        expected = os.read(here, 100).decode()
        for _ in range(count):
            in_child(lambda: interrupted(long, small, expected))
        return
    expected = digest(small())
    if seconds is None:
        start = time.monotonic()
        long()
        seconds = time.monotonic() - start
    say("ready", seconds)
    for _ in range(count):
        interrupted(long, small, expected)


# ---- The one that interrupts


@dataclass
class Outcome:
    """The outcome of the interrupts of one function."""

    name: str
    seconds: float = 0.0  # of a whole call
    latencies: list[float] = field(default_factory=list)
    after: int = 0  # signals that came when the call had ended
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ordered = sorted(self.latencies) or [float("nan")]
        return (
            f"{self.name:30} {self.seconds:7.2f} s a call  {len(self.latencies):4} stopped  {self.after:3} ended before  "
            f"median {ordered[len(ordered) // 2] * 1000:6.0f} ms  worst {ordered[-1] * 1000:6.0f} ms  "
            f"{len(self.faults)} faults {'; '.join(self.faults[:3])}"
        )


def interrupt(name: str, count: int, seed: int, seconds: float | None = None) -> Outcome:
    """Calls the function `count` times in a process of its own, and interrupts each call within `seconds`; None: within the time
    that a whole call takes."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", "--count", str(count), name]
    command += [] if seconds is None else ["--seconds", str(seconds)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "passive"}
    outcome, moments = Outcome(name), random.Random(f"{seed} {name}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        lines = Lines(process.stdout)
        try:
            outcome.seconds = float(answer(lines, outcome, "ready"))
            for _ in range(count):
                pid = int(answer(lines, outcome, "go"))
                time.sleep(moments.uniform(0, 0.9 * min(outcome.seconds, LONGEST)))
                sent = time.monotonic()
                os.kill(pid, signal.SIGINT)
                word, _, told = lines.next().partition(" ")
                if word == "stopped":
                    outcome.latencies.append(float(told) - sent)
                elif word == "late":
                    outcome.after += 1
                else:
                    outcome.faults.append(f"{word} {told}".strip())
                if word != "died":
                    answer(lines, outcome, "right")
        except (EOFError, TimeoutError) as error:
            outcome.faults.append(str(error))
            process.kill()
        status = process.wait()
        if status:
            outcome.faults.append(f"the process ended with {status}")
    return outcome


class Lines:
    """The output of a process, line by line, with a limit on the time to wait."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self._held = source.fileno(), b""

    def next(self) -> str:
        while b"\n" not in self._held:
            if not select.select([self._source], [], [], PATIENCE)[0]:
                raise TimeoutError(f"no answer for {PATIENCE} seconds")
            told = os.read(self._source, 1 << 16)
            if not told:
                raise EOFError("the process ended")
            self._held += told
        line, _, self._held = self._held.partition(b"\n")
        return line.decode()


def answer(lines: Lines, outcome: Outcome, wanted: str) -> str:
    """The text after the word that is wanted; other words are faults."""
    while True:
        word, _, told = lines.next().partition(" ")
        if word == wanted:
            return told
        outcome.faults.append(f"{word} {told}".strip())
        if word == "wrong":
            return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Ctrl-C at random times in every long function.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work(arguments.names[0], arguments.count, arguments.seconds)
        return
    outcomes = []
    for name in arguments.names or table():
        outcomes.append(interrupt(name, arguments.count, arguments.seed))
        print(outcomes[-1], flush=True)
    worst = max((latency for outcome in outcomes for latency in outcome.latencies), default=0.0)
    faults = sum(len(outcome.faults) for outcome in outcomes)
    print(
        f"{sum(len(o.latencies) for o in outcomes)} calls stopped, the worst after {worst * 1000:.0f} ms; {faults} faults"
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
