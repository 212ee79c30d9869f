"""Times a row: our call and the peer's on the same data, in alternating rounds, with memory, limits and agreement.

A row is data (``Row``); a family's file lists its rows and hands each to ``run``. The peer runs in the setup of each
pytest-benchmark round, on its own clock, so that both see the same moments of a shared machine.
"""

from __future__ import annotations

import ctypes
import gc
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import machine
from benchmarks.checks import Disagreement

Inputs = dict[str, Any]
QUANTILES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Work:
    """The least work of a row: operations of matrix products, or bytes moved."""

    limit: Literal["matrix", "copy"]
    amount: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``figure`` names the number that is compared with ``goal``: "ratio" (peer's time / ours, at least), "overhead" (ours minus
    the peer's, seconds per call, at most), "products" (our time as a multiple of ``work`` at the matrix rate, at most).
    """

    name: str
    title: str
    make: Callable[..., Inputs]
    size: Mapping[str, int]
    small: Mapping[str, int]
    ours: Callable[[Inputs], Any]
    check: Callable[[Inputs, Any, Any], str]
    peer: Callable[[Inputs], Any] | None = None
    peer_name: str = ""
    work: Callable[..., Work] | None = None
    figure: Literal["ratio", "overhead", "products"] = "ratio"
    goal: float | None = None
    memory_goal: float | None = None
    # Calls of either side in a round, one after the other: enough that a round lasts many ticks of the clock, and that caches
    # hold the data that the call uses, not the data that the other side left there.
    calls: int = 1
    # For a peer that takes many minutes, ``peer`` may do this share of the work; its times are divided by it, and
    # ``peer_name`` says so.
    peer_share: float = 1.0


@dataclass(frozen=True)
class Options:
    """The settings of a run: ``quick`` takes the small sizes (to check that the answers agree); ``seconds`` is the time budget
    of a row's rounds."""

    quick: bool = False
    seconds: float = 10.0
    limits: bool = True


@dataclass
class Record:
    """The measurements of a row; the JSON files hold these records."""

    name: str
    title: str
    size: dict[str, int]
    peer: str
    figure: str
    value: float
    goal: float | None
    memory_goal: float | None
    met: bool | None
    ours: dict[str, float]
    peer_times: dict[str, float] | None
    rounds: int
    agreement: str
    agrees: bool
    memory: int | None
    peer_memory: int | None
    limit: str | None
    share: float | None
    limits: dict[str, float] | None
    command: str
    commit: str
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d"))


class PeakMemory:
    """Peak resident memory between ``start`` and ``stop`` over the memory resident before, in bytes; None if Linux does not
    report it.

    The kernel's own high-water mark is reset and read, so nothing is sampled and short peaks count.
    """

    bytes: int | None = None

    @staticmethod
    def _status(key: str) -> int:
        match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if match is None:
            raise OSError(f"no {key} in /proc/self/status")
        return int(match.group(1)) * 1024

    def start(self) -> None:
        """Resets the mark."""
        gc.collect()
        try:
            # Memory that malloc keeps for later would hide the memory that the call takes from it.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before: int | None = self._status("VmRSS")
        except (OSError, AttributeError):
            self._before = None

    def stop(self) -> None:
        """Reads the mark."""
        if self._before is not None:
            self.bytes = max(0, self._status("VmHWM") - self._before)


def _timed(call: Callable[[Inputs], Any], inputs: Inputs, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call(inputs)
    return (time.perf_counter() - start) / calls


def _wait_for_other_threads() -> None:
    """Waits until this process uses no processor while it sleeps, for a second at most.

    Threads of a peer's pool spin before they sleep, OpenBLAS' for 2^26 cycles and more; they must not take our cores.
    """
    for _ in range(50):
        before = time.process_time()
        time.sleep(0.02)
        if time.process_time() - before < 0.002:
            return


def quantiles(seconds: list[float]) -> dict[str, float]:
    """{"q20", "median", "q80"} of the rounds' times."""
    low, middle, high = np.quantile(seconds, QUANTILES)
    return {"q20": float(low), "median": float(middle), "q80": float(high)}


def figure_of(
    row: Row, ours: float, peer: float | None, work: Work | None, limits: machine.Limits | None
) -> float:
    """The number that ``row.goal`` is about, from median times."""
    if row.figure == "products":
        assert work is not None
        assert limits is not None
        return ours * limits.matrix / work.amount
    assert peer is not None
    return peer / ours if row.figure == "ratio" else ours - peer


def goal_met(row: Row, value: float, memory: int | None) -> bool | None:
    """Whether the row reached its goals; None if it has none."""
    verdicts = []
    if row.goal is not None:
        verdicts.append(value >= row.goal if row.figure == "ratio" else value <= row.goal)
    if row.memory_goal is not None and memory is not None:
        verdicts.append(memory <= row.memory_goal)
    return all(verdicts) if verdicts else None


def _measure_limits(options: Options) -> machine.Limits:
    return machine.measure_limits(size=512, copy_bytes=1 << 22) if options.quick else machine.measure_limits()


def title_of(row: Row, options: Options) -> str:
    """The row's title, which names the full sizes; a quick run names the sizes that it ran instead."""
    if not options.quick:
        return row.title
    return f"{row.name}, quick ({', '.join(f'{name} = {value:,}' for name, value in row.small.items())})"


def command_of(family: str, row: Row) -> str:
    """The command that repeats this row."""
    return shlex.join(["python", "-m", "benchmarks", family, "--rows", row.name])


def run(row: Row, family: str, benchmark: Any, options: Options, records: list[Record]) -> None:
    """Measures a row through pytest-benchmark's fixture and appends its record; raises Disagreement after that."""
    size = dict(row.small if options.quick else row.size)
    # Libraries load, thread pools start and compilers run on a small input, outside every measurement.
    warm = row.make(**row.small)
    row.ours(warm)
    if row.peer is not None:
        row.peer(warm)
    del warm

    inputs = row.make(**size)
    # The time of a whole product has no other measure than the machine's own rate.
    limits = _measure_limits(options) if options.limits or row.figure == "products" else None
    answers: dict[str, Any] = {}
    ours_memory, peer_memory = PeakMemory(), PeakMemory()
    peer_seconds: list[float] = []
    if row.peer is None:
        # Minutes long: its one call is timed and checked and its memory read all at once.
        rounds = 1

        def target() -> None:
            answers["ours"] = row.ours(inputs)

        benchmark.pedantic(target, setup=ours_memory.start, rounds=rounds)
        ours_memory.stop()
        if limits is not None:
            limits = machine.mean_limits(limits, _measure_limits(options))
    else:
        peer = row.peer
        first_round = 0.0
        for side, call, memory in (("peer", peer, peer_memory), ("ours", row.ours, ours_memory)):
            memory.start()
            start = time.perf_counter()
            answers[side] = call(inputs)
            first_round += time.perf_counter() - start
            memory.stop()
        fewest = 1 if options.quick else 3
        rounds = int(np.clip(options.seconds / (first_round * row.calls), fewest, 50))

        def setup() -> None:
            peer_seconds.append(_timed(peer, inputs, row.calls) / row.peer_share)
            _wait_for_other_threads()

        def target() -> None:
            for _ in range(row.calls):
                row.ours(inputs)

        benchmark.pedantic(target, setup=setup, rounds=rounds)
    seconds = [value / row.calls for value in benchmark.stats.stats.data]

    try:
        agreement, agrees = row.check(inputs, answers["ours"], answers.get("peer")), True
    except Disagreement as error:
        agreement, agrees = f"DIFFERS: {error}", False
    ours, peers = quantiles(seconds), quantiles(peer_seconds) if peer_seconds else None
    work = row.work(**size) if row.work is not None else None
    value = figure_of(row, ours["median"], peers["median"] if peers else None, work, limits)
    record = Record(
        name=row.name,
        title=title_of(row, options),
        size=size,
        peer=row.peer_name,
        figure=row.figure,
        value=value,
        # The goals are about the full sizes.
        goal=None if options.quick else row.goal,
        memory_goal=None if options.quick else row.memory_goal,
        met=None if options.quick else goal_met(row, value, ours_memory.bytes),
        ours=ours,
        peer_times=peers,
        rounds=rounds,
        agreement=agreement,
        agrees=agrees,
        memory=ours_memory.bytes,
        peer_memory=peer_memory.bytes,
        limit=work.limit if work and limits else None,
        share=work.amount / asdict(limits)[work.limit] / ours["median"] if work and limits else None,
        limits=asdict(limits) if limits else None,
        command=command_of(family, row),
        commit=machine.commit(),
    )
    records.append(record)
    benchmark.extra_info.update(asdict(record))
    if not agrees:
        raise Disagreement(f"{row.name}: {agreement}")
