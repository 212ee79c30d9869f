"""Candidates drawn without replacement, the same on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.philox import uniforms


class CandidateSampler:
    """Draws samples of the candidates that are not picked yet, by a partial Fisher-Yates shuffle.

    Step t uses row t of the Philox stream of the seed.
    """

    def __init__(self, candidates: list[int], seed: int, first_row: int = 0) -> None:
        self._pool = candidates
        self._seed, self._row = seed, first_row

    def draw(self, count: int) -> Tensor:
        """A sample [min(count, candidates left)] int64, ascending."""
        pool = self._pool
        count = min(count, len(pool))
        for i, u in enumerate(uniforms(self._seed, self._row, count).tolist()):
            j = i + int(u * (len(pool) - i))
            pool[i], pool[j] = pool[j], pool[i]
        self._row += 1
        self._drawn = count
        return torch.tensor(sorted(pool[:count]), dtype=torch.int64)

    @property
    def left(self) -> int:
        return len(self._pool)

    def discard(self, candidates: Tensor) -> None:
        """Takes candidates, which may be gone already, out of the pool."""
        gone = set(candidates.tolist())
        self._pool = [j for j in self._pool if j not in gone]

    def remove(self, candidate: int) -> None:
        """Takes a candidate of the last draw out of the pool."""
        pool = self._pool
        i = pool.index(candidate, 0, self._drawn)
        pool[i] = pool[-1]
        pool.pop()
