"""What a run has finished, in a folder, so that it can go on after a rank was lost.

The folder holds `options.json` (what the run was asked for, and a checksum of the data), the first gains of ranges of candidates as
they are found, and the picks so far. Files appear whole. A run with another number of ranks can go on from it: gains are of global
numbers, and whole.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset.distributed.communication import Communicator

_SECONDS = 5.0  # between two records of picks


class Checkpoint:
    """The folder of one run, on every rank; see `facility_location`.

    Args:
        comm: the ranks.
        folder: on a file system that all ranks share.
        options: what the run is asked for, the same on every rank.

    Raises:
        ValueError: if the folder is of a run that was asked for something else; the option is named.
    """

    def __init__(self, comm: Communicator, folder: Any, options: dict[str, Any]) -> None:
        self._comm, self.folder = comm, Path(folder)
        error: Exception | None = None
        if comm.rank == 0:
            try:
                self._begin({name: repr(value) for name, value in options.items()})
            except (OSError, ValueError) as caught:
                error = ValueError(f"checkpoint: {caught}")
        comm.agree({}, error)

    def _begin(self, options: dict[str, str]) -> None:
        path = self.folder / "options.json"
        if path.exists():
            before = json.loads(path.read_text())
            for name in before.keys() | options.keys():
                if before.get(name) != options.get(name):
                    raise ValueError(
                        f"{self.folder} is of a run with {name}={before.get(name)}, got {options.get(name)}; pass the same, or remove "
                        "the folder"
                    )
            return
        # What was being written when a process was killed begins with a dot.
        if self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no run; name a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(options, indent=1).encode())

    def part(self, name: str) -> Part:
        """The record of one problem of the run."""
        return Part(self._comm, self.folder, name)

    def remove(self) -> None:
        if self._comm.rank == 0:
            shutil.rmtree(self.folder)


class Part:
    """The first gains and the picks of one problem."""

    def __init__(self, comm: Communicator, folder: Path, name: str) -> None:
        self._comm, self._folder, self._name = comm, folder, name
        self._told = time.monotonic()

    def first_gains(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of this rank's candidates [n] were evaluated before, and their gains [n]."""
        known, gains = np.zeros(len(numbers), dtype=bool), np.zeros(len(numbers), dtype=np.int64)
        for path in sorted(self._folder.glob(f"{self._name}-first-*.npy")):
            their_numbers, their_gains = np.load(path)
            _, here, there = np.intersect1d(numbers, their_numbers, assume_unique=True, return_indices=True)
            known[here], gains[here] = True, their_gains[there]
        return known, gains

    def keep_first_gains(self, numbers: np.ndarray, gains: np.ndarray) -> None:
        if len(numbers):
            path = self._folder / f"{self._name}-first-{numbers[0]}-{numbers[-1]}.npy"
            _save(path, np.stack([numbers, gains]))

    def picks(self) -> list[list[int]]:
        """The picks that were made before, and their gains, in order."""
        path = self._folder / f"{self._name}-picks.npy"
        found = np.empty((0, 2), dtype=np.int64)
        if self._comm.rank == 0 and path.exists():
            found = np.load(path)
        count = int(self._comm.broadcast(torch.tensor([len(found)]), 0)[0])
        if count == 0:
            return []
        mine: Tensor = (
            torch.from_numpy(found) if self._comm.rank == 0 else torch.empty(count, 2, dtype=torch.int64)
        )
        return self._comm.broadcast(mine, 0).tolist()

    def keep_picks(self, picks: list[int], gains: list[int]) -> None:
        """Records the picks now and then."""
        if self._comm.rank == 0 and time.monotonic() - self._told >= _SECONDS:
            _save(self._folder / f"{self._name}-picks.npy", np.array([picks, gains], dtype=np.int64).T)
            self._told = time.monotonic()


def _save(path: Path, array: np.ndarray) -> None:
    beside = path.with_name(f".{path.name}")
    try:
        with beside.open("wb") as stream:
            np.save(stream, array)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _write(path: Path, contents: bytes) -> None:
    beside = path.with_name(f".{path.name}")
    try:
        beside.write_bytes(contents)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def checksum(comm: Communicator, *parts: tuple[Tensor | None, int]) -> int:
    """A sum of the bits of all ranks' rows, each times its number: the same however they are spread over ranks.

    Args:
        comm: the ranks.
        parts: this rank's rows [n, ...] of some tensor, or None, and the number of the first of them.
    """
    total = 0
    for place, (tensor, first) in enumerate(parts):
        if tensor is None or not tensor.numel():
            continue
        rows = tensor.reshape(len(tensor), -1)
        step = max(1, (1 << 22) // rows.shape[1])
        for begin in range(0, len(rows), step):
            some = rows[begin : begin + step].contiguous()
            bits = some.view(torch.int32 if some.element_size() == 4 else torch.int64).sum(
                1, dtype=torch.int64
            )
            numbers = torch.arange(begin, begin + len(some), device=bits.device) + first + 1
            total += int((bits * numbers).sum()) * (place + 1)
    return int(comm.sum(torch.tensor([(total + 2**63) % 2**64 - 2**63]))[0])
