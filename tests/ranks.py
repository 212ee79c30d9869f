"""Processes that form a torch.distributed process group (gloo), for tests: forked from a server that has imported torch and flashcoreset
once."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

MOST = 4

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "flashcoreset.distributed"])


def _serve(
    connection: Connection, rank: int, world: int, store: str, seconds: float, subgroups: bool
) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout
    )
    groups: dict[int, Any] = {world: None}
    if subgroups:
        groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, world + 1)}
    while True:
        try:
            function, size, arguments = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            connection.send((True, function(groups[size], rank, size, *arguments)))
        except Exception as error:
            connection.send((False, (type(error).__name__, str(error), traceback.format_exc())))


class Failed(Exception):
    """What a rank raised: the type's name, the message, the traceback."""


class Ranks:
    """`world` ranks that run functions until they are closed.

    Args:
        world: how many.
        seconds: the process group's timeout.
        subgroups: whether the first 1, 2, ... ranks are groups of their own, too.
    """

    def __init__(self, world: int = MOST, seconds: float = 60, subgroups: bool = True) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.world = world
        self._connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            mine, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_serve,
                args=(theirs, rank, world, os.path.join(self._folder.name, "store"), seconds, subgroups),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._connections.append(mine)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any, world: int | None = None) -> None:
        """Runs `function(group, rank, world, *arguments)` on the first `world` ranks; `function` is one of a module."""
        for connection in self._connections[: world or self.world]:
            connection.send((function, world or self.world, arguments))

    def result(self, rank: int, seconds: float = 120) -> Any:
        """What the function returned on a rank; raises Failed for what it raised."""
        connection = self._connections[rank]
        if not connection.poll(seconds):
            raise TimeoutError(f"rank {rank} has not answered for {seconds} s")
        fine, value = connection.recv()
        if not fine:
            raise Failed(*value)
        return value

    def run(self, function: Callable[..., Any], *arguments: Any, world: int | None = None) -> list[Any]:
        self.start(function, *arguments, world=world)
        answers: list[Any] = []
        failures: list[Failed] = []
        for rank in range(world or self.world):
            try:
                answers.append(self.result(rank))
            except Failed as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return answers

    def errors(
        self, function: Callable[..., Any], *arguments: Any, world: int | None = None
    ) -> list[tuple[str, str]]:
        """The types and messages of what every rank raises."""
        self.start(function, *arguments, world=world)
        found = []
        for rank in range(world or self.world):
            try:
                self.result(rank)
            except Failed as error:
                found.append(error.args[:2])
            else:
                found.append(("", "no error"))
        return found

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
        deadline = time.monotonic() + 10
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


@contextmanager
def ranks(world: int, seconds: float, first: Callable[..., Any]) -> Iterator[Ranks]:
    """Ranks that may be killed, once they have run `first`, which imports the module that it is of: no timeout runs then."""
    group = Ranks(world, seconds, subgroups=False)
    try:
        group.run(first)
        yield group
    finally:
        group.close()
