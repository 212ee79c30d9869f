"""Features in several files, of which each rank reads its rows."""

from __future__ import annotations

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from flashcoreset._core.progress import Progress
from flashcoreset.cli.errors import CommandError
from flashcoreset.cli.files_in import load_features

_READERS = 4
_ROWS = 1 << 16  # rows that are read at a time


def shard_files(patterns: list[str], option: str) -> list[str]:
    """The files that names and patterns stand for, each pattern's in the order of their names.

    Raises:
        CommandError: if nothing is there, a name stands twice, or files numbered ``-00002-of-00008`` are not all there.
    """
    files: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise CommandError(f"{option}: no such file: {pattern}")
        files += found
    if len(set(files)) < len(files):
        twice = next(name for name in files if files.count(name) > 1)
        raise CommandError(f"{option}: {twice} stands twice")
    numbered = [re.search(r"-(\d+)-of-(\d+)", os.path.basename(name)) for name in files]
    if all(numbered):
        numbers = {int(match[1]) for match in numbered if match}
        wanted = {int(match[2]) for match in numbered if match}
        if len(wanted) == 1:
            (count,) = wanted
            for missing in range(min(numbers), min(numbers) + count):
                if missing not in numbers:
                    raise CommandError(f"{option}: shard {missing} of {count} is missing beside {files[0]}")
    return files


class ShardFiles:
    """The rows of several matrices, one after another, memory-mapped where the files allow it."""

    def __init__(self, files: list[str], option: str) -> None:
        self.files = files
        self._arrays = [load_features(name, option) for name in files]
        first = self._arrays[0]
        for name, array in zip(files, self._arrays, strict=True):
            if array.shape[1] != first.shape[1] or array.dtype != first.dtype:
                raise CommandError(
                    f"{option}: {name} holds {array.dtype} rows of {array.shape[1]}, but {files[0]} {first.dtype} rows of "
                    f"{first.shape[1]}"
                )
        ends = np.cumsum([len(array) for array in self._arrays]).tolist()
        self._starts = [0, *ends]
        self.shape = (ends[-1], first.shape[1])
        self.dtype = first.dtype

    def part(self, rank: int, world: int) -> tuple[int, int]:
        """The first row of a rank's share, and the one after its last."""
        n = self.shape[0]
        return n * rank // world, n * (rank + 1) // world

    def rows(self, begin: int, end: int, progress: Any = None) -> np.ndarray:
        """Rows [end - begin, d]: a view of the file if they lie in one that is memory-mapped, else read by several threads."""
        for array, (first, last) in zip(self._arrays, pairwise(self._starts), strict=True):
            if first <= begin and end <= last:
                return array[begin - first : end - first]
        out = np.empty((end - begin, self.shape[1]), dtype=self.dtype)
        pieces = []
        for array, (first, last) in zip(self._arrays, pairwise(self._starts), strict=True):
            for start in range(max(begin, first), min(end, last), _ROWS):
                stop = min(start + _ROWS, end, last)
                pieces.append((out[start - begin : stop - begin], array[start - first : stop - first]))

        def read(piece: tuple[np.ndarray, np.ndarray]) -> int:
            np.copyto(*piece)
            return len(piece[0])

        with ThreadPoolExecutor(_READERS) as pool, Progress(progress, end - begin, "reading") as bar:
            done = 0
            for count in pool.map(read, pieces):
                done += count
                bar.update(done)
        return out
