"""What may be picked no more: candidates that are excluded, cost too much, have too many of their label, or are too near."""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset.facility_location.backend import Kernels
from flashcoreset.facility_location.problem import Problem, Request


class Taken(NamedTuple):
    """What limits ask about a pick or a preselected candidate.

    Attributes:
        label: its label; None if no label is capped.
        cost: what it costs; 0 without costs.
        row: [1, d] its point, or [1, n] its negated distances to the candidates; None if no distance is asked for.
    """

    label: int | None
    cost: float
    row: Tensor | None


class Limits:
    """The candidates that each pick closes, in one run or in the runs of several rounds.

    Args:
        kernels: the backend, for distances.
        r: the request, whose limits these are.
        problem: the problem that is solved.
        excluded: [n] bool, the candidates that are excluded; None for none.
    """

    def __init__(self, kernels: Kernels, r: Request, problem: Problem, excluded: Tensor | None) -> None:
        self._kernels, self._problem = kernels, problem
        self._excluded, self._min_distance = excluded, r.min_distance
        self.is_repeated = (
            r.rounds > 1
        )  # later runs know nothing of what is picked and preselected before them
        self._labels: list[int] = []
        self._room: dict[int, int] = {}  # how many more each label may have
        self._members: dict[int, Tensor] = {}
        if r.groups is not None and r.cap_labels is not None and r.caps is not None:
            groups = r.groups.cpu()
            self._labels = groups.tolist()
            self._room = dict(zip(r.cap_labels.tolist(), r.caps.tolist(), strict=True))
            self._members = {label: (groups == label).nonzero()[:, 0] for label in self._room}
            for label, cap in self._room.items():
                if cap < 0:
                    raise ValueError(f"caps must be >= 0, got {cap} for label {label}")
        self._budget = math.inf if r.cost_budget is None else r.cost_budget
        self._spent = Fraction(0)
        if r.costs is not None:
            ascending = r.costs.cpu().sort(stable=True)
            self._ascending, self._by_cost = ascending.values.tolist(), ascending.indices
            self._costs = r.costs.tolist()
        self._affordable = problem.shape[0]  # the cheapest so many
        self._closed = self._first()

    def closed(self) -> Tensor:
        """The candidates [c] int64, on the CPU, that are closed at the start of a run, by the runs before it too."""
        self._closed = [_together(self._closed)]
        return self._closed[0]

    def _first(self) -> list[Tensor]:
        closed = [] if self._excluded is None else [self._excluded.cpu().nonzero()[:, 0]]
        closed += self._too_expensive()
        preselected = [] if self._problem.preselected is None else self._problem.preselected.tolist()
        if self.is_repeated:
            closed.append(self._places(preselected))
        for taken in self._taken(preselected):
            closed += self._of_label(taken)
            closed += self._too_near(taken)
        closed += [self._members[label] for label, room in self._room.items() if room <= 0]
        return closed

    def after(self, j: int) -> Tensor:
        """The candidates that pick `j` closes, some of which may be closed already."""
        (taken,) = self._taken([j])
        return self._after(j, taken)

    def _after(self, j: int, taken: Taken) -> Tensor:
        closed = self._of_label(taken) + self._too_near(taken)
        if self._budget < math.inf:
            self._spent += Fraction(taken.cost)
            closed += self._too_expensive()
        if self.is_repeated:
            self._closed += [self._places([j]), *closed]
        return _together(closed)

    def _places(self, candidates: list[int]) -> Tensor:
        """Those of `candidates` that this object closes, as what it closes them by."""
        return torch.tensor(candidates, dtype=torch.int64)

    def _taken(self, candidates: list[int]) -> list[Taken]:
        x = None if self._min_distance is None else self._problem.x
        return [
            Taken(
                self._labels[j] if self._room else None,
                self._costs[j] if self._budget < math.inf else 0.0,
                x[j : j + 1] if isinstance(x, Tensor) else None,
            )
            for j in candidates
        ]

    def _too_expensive(self) -> list[Tensor]:
        if self._budget == math.inf:
            return []
        # A candidate fits if what would be spent then, rounded to a double once, is within the budget.
        count = bisect_right(
            self._ascending,
            False,
            hi=self._affordable,
            key=lambda cost: float(self._spent + Fraction(cost)) > self._budget,
        )
        closed = self._by_cost[count : self._affordable]
        self._affordable = count
        return [closed]

    def _of_label(self, taken: Taken) -> list[Tensor]:
        label = taken.label
        if label is None or label not in self._room:
            return []
        self._room[label] -= 1
        return [self._members[label]] if self._room[label] == 0 else []

    def _too_near(self, taken: Taken) -> list[Tensor]:
        if self._min_distance is None or taken.row is None:
            return []
        x, metric = self._problem.x, self._problem.metric
        assert isinstance(x, Tensor)
        if metric == "precomputed":
            distance = -taken.row[0]
        else:
            distance = self._kernels.pairwise(taken.row, x, metric=metric)[0]
            distance = distance if metric in DISTANCES else 1 - distance
        return [(distance < self._min_distance).nonzero()[:, 0].cpu()]


def _together(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
