"""The sieves of streaming selection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

_CHUNK = 64  # rows whose gains are computed at once


@dataclass
class _Sieve:
    guess: float
    selection: tuple[int, ...] = ()
    gains: list[float] = field(default_factory=list)
    total: float = 0.0


class Sieves:
    """For each guess of the best value, the rows that it lets through.

    Sieves with the same picks so far, which most are, share their covering and the gains of the rows that come next.

    Args:
        k: the picks of a sieve.
        clients: the columns that there may be; a stream may begin with fewer.
    """

    def __init__(self, k: int, clients: int) -> None:
        self._k, self._clients = k, clients
        self._sieves: list[_Sieve] = []
        self._covers: dict[tuple[int, ...], np.ndarray] = {}  # of the sieves that are not full

    def update(self, X: Any, base: np.ndarray, guesses: list[float], begin: int, excluded: set[int]) -> None:
        """Takes rows.

        Args:
            X: [n, d] similarities of the rows to d of the clients.
            base: [d] what the initial subset covers.
            guesses: of all sieves; new ones are at the end.
            begin: the number of the first row.
            excluded: numbers of rows that no sieve may take.
        """
        self._sieves += [_Sieve(guess) for guess in guesses[len(self._sieves) :]]
        d, floor = X.shape[1], float(base.mean())
        covers = {selection: np.maximum(cover[:d], base) for selection, cover in self._covers.items()}
        covers.setdefault((), base)
        for first in range(0, X.shape[0], _CHUNK):
            rows = X[first : first + _CHUNK]
            rows = rows.toarray() if hasattr(rows, "toarray") else np.asarray(rows)
            numbers = np.arange(begin + first, begin + first + len(rows))
            self._take(rows, numbers, np.isin(numbers, list(excluded)), covers, floor)
            open_ = {sieve.selection for sieve in self._sieves if len(sieve.selection) < self._k}
            covers = {selection: covers[selection] for selection in open_}
        self._covers = {selection: np.zeros(self._clients) for selection in covers if selection}
        for selection, whole in self._covers.items():
            whole[:d] = covers[selection]

    def _take(
        self,
        rows: np.ndarray,
        numbers: np.ndarray,
        barred: np.ndarray,
        covers: dict[tuple[int, ...], np.ndarray],
        floor: float,
    ) -> None:
        values: dict[tuple[int, ...], np.ndarray] = {}  # f of a sieve's picks and one of the rows
        for sieve in self._sieves:
            at = 0
            while len(sieve.selection) < self._k and at < len(rows):
                if sieve.selection not in values:
                    reached = np.maximum(rows, covers[sieve.selection]).mean(axis=1) - floor
                    values[sieve.selection] = np.where(barred, -np.inf, reached)
                gains = values[sieve.selection][at:] - sieve.total
                enough = gains > (sieve.guess / 2 - sieve.total) / (self._k - len(sieve.selection))
                hit = int(np.argmax(enough))
                if not enough[hit]:
                    break
                at += hit
                sieve.gains.append(float(gains[hit]))
                before = sieve.selection
                sieve.total = float(values[before][at])
                sieve.selection = (*before, int(numbers[at]))
                if sieve.selection not in covers:
                    covers[sieve.selection] = np.maximum(rows[at], covers[before])
                at += 1

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """The picks and gains of the sieve of the largest value; of equal ones, the lowest guess."""
        best = max(self._sieves, key=lambda sieve: sieve.total)
        return np.array(best.selection, dtype=np.int64), np.array(best.gains)

    def taken(self) -> set[int]:
        """The rows that any sieve has picked."""
        return {number for sieve in self._sieves for number in sieve.selection}
