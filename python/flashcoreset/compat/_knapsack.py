"""Greedy selection under a budget of costs."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

import numpy as np


class Budget(Protocol):
    """What is left to spend, in the arithmetic of the peer."""

    def is_open(self) -> bool: ...

    def fits(self, cost: float) -> bool: ...

    def spend(self, cost: float) -> None: ...


def knapsack(
    candidates: np.ndarray,
    gains: Callable[[np.ndarray], np.ndarray],
    add: Callable[[int], None],
    costs: np.ndarray,
    budget: Budget,
    *,
    per_cost: bool,
    tie: Callable[[int], int],
    lazy: bool = True,
) -> tuple[list[int], list[float]]:
    """Picks the candidate of the largest gain (per cost) that still fits, until none does.

    Args:
        candidates: [c] what may be picked.
        gains: marginal gains of some candidates, given what was added.
        add: takes a pick over.
        costs: [n] of all elements.
        budget: what is spent.
        per_cost: whether gains are divided by costs.
        tie: of equal gains the candidate with the lower number goes first.
        lazy: gains never rise, so a candidate that stays above the others' old gains is the best one.

    Returns:
        The picks, and the numbers that they were chosen by.
    """
    picks: list[int] = []
    values: list[float] = []

    def valued(some: np.ndarray) -> list[float]:
        found = gains(some)
        return (found / costs[some] if per_cost else found).tolist()

    def queue_of(some: np.ndarray) -> list[tuple[float, int, int, int]]:
        now = len(picks)
        queue = [(-value, tie(j), j, now) for value, j in zip(valued(some), some.tolist(), strict=True)]
        heapq.heapify(queue)
        return queue

    queue = queue_of(candidates)
    while budget.is_open() and queue:
        negative, order, j, when = queue[0]
        if not budget.fits(float(costs[j])):
            heapq.heappop(queue)  # what is left only shrinks
            continue
        if when != len(picks):
            if not lazy:
                queue = queue_of(np.array([entry[2] for entry in queue], dtype=np.int64))
            else:
                value = valued(np.array([j], dtype=np.int64))[0]
                heapq.heapreplace(queue, (-value, order, j, len(picks)))
            continue
        heapq.heappop(queue)
        add(j)
        budget.spend(float(costs[j]))
        picks.append(j)
        values.append(-negative)
    return picks, values
