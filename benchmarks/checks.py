"""Checks whether the answers agree. Each check returns the text to print, or raises ``Disagreement``."""

from __future__ import annotations

import heapq

import numpy as np
import torch

# An entry of a float32 similarity matrix may be off by a few units in the last place (2^-24 relative each).
ENTRY_ROUNDING = 4 * 2.0**-24
GAIN_TOLERANCE = 1e-4


class Disagreement(AssertionError):
    """Our answer is not the peer's."""


def counted(number: int, noun: str) -> str:
    """ "1 tie", "2 ties"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


class _Prefix:
    """Gains after a prefix of picks, in float64, from a similarity matrix [n candidates, m clients]."""

    def __init__(self, similarity: np.ndarray, picks: np.ndarray) -> None:
        self.similarity = similarity
        self.best = np.zeros(similarity.shape[1], dtype=similarity.dtype)
        for pick in picks:
            self.add(pick)

    def add(self, pick: int) -> None:
        np.maximum(self.best, self.similarity[pick], out=self.best)

    def gain(self, candidate: int) -> float:
        return float(np.maximum(self.similarity[candidate] - self.best, 0).sum(dtype=np.float64))

    def rounding(self, candidate: int) -> float:
        """How far the candidate's gain may be off because the matrix's entries are rounded."""
        row = self.similarity[candidate]
        better = row > self.best
        return ENTRY_ROUNDING * float((np.abs(row[better]) + np.abs(self.best[better])).sum(dtype=np.float64))


def greedy_ties(similarity: np.ndarray, picks: np.ndarray, start: int) -> int:
    """Checks that ``picks[start:]`` is a greedy sequence of the matrix but for ties within rounding.

    Lazy greedy along the given picks: stale gains are upper bounds, so only candidates whose bound exceeds the pick's gain are
    evaluated again. Returns the number of picks that were not strictly the best; raises Disagreement at the first pick that
    some candidate beats by more than rounding.
    """
    prefix = _Prefix(similarity, picks[:start])
    taken = set(picks[:start].tolist())
    # -gain first: the queue's top is the largest bound, ties to the lowest index.
    queue = [(-prefix.gain(j), j) for j in range(similarity.shape[0]) if j not in taken]
    heapq.heapify(queue)
    ties = 0
    for position in range(start, len(picks)):
        pick = int(picks[position])
        gain, slack = prefix.gain(pick), prefix.rounding(pick)
        taken.add(pick)
        tied = []
        while queue and -queue[0][0] > gain:
            _, candidate = heapq.heappop(queue)
            if candidate in taken:
                continue
            fresh = prefix.gain(candidate)
            if fresh <= gain:
                heapq.heappush(queue, (-fresh, candidate))
            elif fresh <= gain + slack + prefix.rounding(candidate):
                tied.append((-fresh, candidate))
            else:
                raise Disagreement(
                    f"pick {position} is {pick} with gain {gain:.9g} on the peer's matrix, but {candidate} has {fresh:.9g}"
                )
        ties += bool(tied)
        for entry in tied:
            heapq.heappush(queue, entry)
        prefix.add(pick)
    return ties


def same_picks(ours: tuple[np.ndarray, np.ndarray], peer: tuple[np.ndarray, np.ndarray, np.ndarray]) -> str:
    """Ours (indices, gains) against the peer's (indices, gains, similarity): equal, but for ties within the peer's rounding."""
    indices, gains = ours
    peer_indices, peer_gains, similarity = peer
    if len(indices) != len(peer_indices):
        raise Disagreement(f"{len(indices)} picks, the peer made {len(peer_indices)}")
    if len(set(indices.tolist())) != len(indices):
        raise Disagreement("an index was picked twice")
    differing = np.flatnonzero(indices != peer_indices)
    # Past a tie the two sequences are different greedy runs; gains are compared as far as they are the same run.
    common = len(indices) if not len(differing) else int(differing[0])
    worst = float(np.max(np.abs(gains[:common] / peer_gains[:common] - 1), initial=0.0))
    if worst > GAIN_TOLERANCE:
        raise Disagreement(f"gains differ by {worst:.2g} relative, more than {GAIN_TOLERANCE:g}")
    if not len(differing):
        return f"same picks, gains to {worst:.0e}"
    ties = greedy_ties(similarity, indices, common)
    return f"same picks but for {counted(max(ties, 1), 'rounding tie')}, gains to {worst:.0e}"


def same_values(ours: torch.Tensor, peer: torch.Tensor, tolerance: float) -> str:
    """Checks that two matrices are equal to ``tolerance`` of the largest entry."""
    worst = float((ours.double() - peer.double()).abs().max() / peer.double().abs().max())
    if not worst <= tolerance:
        raise Disagreement(f"values differ by {worst:.2g} of the largest, more than {tolerance:g}")
    return f"same values to {worst:.0e}" if worst else "bit for bit the same values"
