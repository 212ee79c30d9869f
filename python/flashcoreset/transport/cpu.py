"""The compiled exact transport."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule, optional_capsule
from flashcoreset.transport.backend import Best, Candidates

__all__ = ["TAKES", "Transport"]

TAKES = Takes()


class Transport:
    """The optimal transport between k sources of mass 1/k and V sinks of mass 1/V; see `flashcoreset.transport.reference`.

    Flows are whole numbers of units, of which V / g leave each source and k / g reach each sink, g = gcd(k, V). After an exchange
    the flow is repaired along shortest augmenting paths, at the cost of what changes.

    Args:
        costs: [k, V] float32 or float64 on the CPU, rows contiguous, finite; copied.
        u: [k] float64, dual variables of the sources to begin with: any are valid, nearly optimal ones are fast.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        TypeError, ValueError: for arrays that do not fit, NaN or infinity.
        RuntimeError: if rounding forbids complementary slackness to 1e-12 of the largest cost.

    Example:
        >>> import torch
        >>> from flashcoreset.transport.cpu import Transport
        >>> solved = Transport(torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 1.0, 0.0]]))
        >>> solved.value
        0.375
        >>> solved.exchange(1, torch.tensor([1.0, 0.0, 0.25, 1.0])), solved.value
        (0.0625, 0.0625)
    """

    def __init__(self, costs: Tensor, u: Tensor | None = None) -> None:
        self._native = native.module().Transport(capsule(costs), optional_capsule(u), torch.get_num_threads())
        self._shape = costs.shape

    @property
    def value(self) -> float:
        """The transport cost."""
        return self._native.value

    @property
    def gap(self) -> float:
        """By how much `value` may exceed the optimum: its distance to the dual value."""
        return self._native.gap

    @property
    def slackness(self) -> float:
        """The largest C_sv - u_s - f_v of a pair between which mass flows, at most 1e-12 of the largest cost."""
        return self._native.slackness

    def exchange(self, place: int, row: Tensor, ceiling: float = math.inf) -> float:
        """Gives source `place` the costs `row` [V] if the transport cost is below `ceiling` then, and returns that cost; otherwise
        nothing changes, and infinity comes back."""
        return self._native.exchange(place, capsule(row), ceiling)

    def best_exchange(
        self, costs: Tensor, candidates: Candidates, ceiling: float, enough: float, most: int
    ) -> Best:
        """The exchange that leads to the lowest transport cost below `ceiling`, which is not made.

        Tries the candidates, rows of `costs` [r, V] for places, in their order until `most` were tried, one leads to `enough` or
        less, or a bound is not below the lowest cost found.
        """
        arrays = (capsule(part) for part in candidates)
        return Best(*self._native.best_exchange(capsule(costs), *arrays, ceiling, enough, most))

    def bounds(self, costs: Tensor, goal: float, most: int, ways: bool = False) -> tuple[Tensor, Candidates]:
        """(lowest [r] float64: numbers that are not above the transport cost after any exchange for the items with `costs` [r, V];
        the `most` exchanges with the lowest bounds below `goal`).

        With `ways` the bounds of the exchanges also know the ways on which units get from the item to the source that leaves; they are
        never lower.
        """
        lowest, bounds = torch.empty(len(costs), dtype=torch.float64), torch.empty(most, dtype=torch.float64)
        rows, places = torch.empty(2, most, dtype=torch.int64)
        count = self._native.bounds(
            capsule(costs), goal, ways, *(capsule(part) for part in (lowest, rows, places, bounds))
        )
        return lowest, Candidates(rows[:count], places[:count], bounds[:count])

    def duals(self) -> tuple[Tensor, Tensor]:
        """(u [k], f [V]) float64: u_s + f_v <= C_sv, f_v = min_s (C_sv - u_s)."""
        u, f = (torch.empty(length, dtype=torch.float64) for length in self._shape)
        self._native.duals(capsule(u), capsule(f))
        return u, f

    def flows(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sources, sinks, units), int64 each: the pairs between which mass flows."""
        flows = torch.empty(3, self._native.flow_count, dtype=torch.int64)
        self._native.flows(*(capsule(part) for part in flows))
        sources, sinks, units = flows
        return sources, sinks, units
