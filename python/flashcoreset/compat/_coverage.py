"""Gains of picks that are known already."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_BLOCK = 2**17  # similarities at once: the cache holds them, and their memory is used again


def covered_gains(
    picks: np.ndarray, rows: Callable[[np.ndarray], np.ndarray], best: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gain of each pick after those before it, float64, and the largest similarities of all.

    Args:
        picks: [k].
        rows: gives the similarities [., m] of some picks, which may be written over.
        best: [m] the largest similarities before the first pick, numbers of the type of `rows`.
    """
    gains, step = np.empty(len(picks)), max(1, _BLOCK // max(1, len(best)))
    total = best.sum(dtype=np.float64)
    for begin in range(0, len(picks), step):
        reached = rows(picks[begin : begin + step])
        best = best.astype(reached.dtype, copy=False)
        for row in reached:  # faster than np.maximum.accumulate
            best = np.maximum(row, best, out=row)
        totals = reached.sum(axis=1, dtype=np.float64)
        # Sums that rise by less than they are rounded by may seem to fall.
        gains[begin : begin + step] = np.maximum(np.diff(totals, prepend=total), 0)
        best, total = best.copy(), totals[-1]
    return gains, best
