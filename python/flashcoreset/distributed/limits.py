"""What may be picked no more, over ranks: each rank closes its own candidates, and is told of a pick's label, cost and row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.greedy import Candidates, SharedRows
from flashcoreset.facility_location.backend import Kernels
from flashcoreset.facility_location.gains import pick_keys
from flashcoreset.facility_location.limits import Limits, Taken
from flashcoreset.facility_location.problem import Problem, Request


class ShardLimits(Limits):
    """The limits of one machine, and what candidates are compared by, for the candidates of this rank.

    Args:
        comm: the ranks.
        kernels: the backend, for distances.
        r: the request; its groups and costs are those of this rank's rows.
        problem: this rank's candidates; what is preselected in it are numbers among all ranks' candidates.
        excluded: [n here] bool; None for none.
        candidates: which candidates live here.
        shared: the rows of any candidates.
        columns: [n here] which entry of a row of a matrix each candidate is; None for points.
    """

    def __init__(
        self,
        comm: Communicator,
        kernels: Kernels,
        r: Request,
        problem: Problem,
        excluded: Tensor | None,
        candidates: Candidates,
        shared: SharedRows,
        columns: Tensor | None,
    ) -> None:
        self._comm, self._candidates, self._shared, self._columns = comm, candidates, shared, columns
        self._goes_by_cost = r.costs is not None and r.cost_sensitive
        self._own_costs = None if r.costs is None else r.costs.cpu()
        self._own_labels = None if r.caps is None or r.groups is None else r.groups.cpu()
        self._told: dict[int, tuple[float, int]] = {}  # cost and label of candidates of any rank
        super().__init__(kernels, r, problem, excluded)
        # Whether a candidate may be closed while others are picked, or goes by something else than its gain.
        self.is_strict = bool(
            self._goes_by_cost or self._room or r.cost_budget is not None or r.min_distance is not None
        )

    def tell(self, numbers: list[int]) -> None:
        """Brings the costs and labels of candidates to every rank, unless they are known."""
        new = [j for j in numbers if j not in self._told]
        if not new or (self._own_costs is None and self._own_labels is None):
            return
        facts = torch.zeros(len(new), 2, dtype=torch.int64)
        mine, own = torch.tensor([self._candidates.is_here(j) for j in new]), self._places(new)
        if self._own_costs is not None:
            facts[mine, 0] = self._own_costs.view(torch.int64)[own]
        if self._own_labels is not None:
            facts[mine, 1] = self._own_labels[own]
        facts = self._comm.sum(facts)
        costs = facts[:, 0].contiguous().view(torch.float64).tolist()
        self._told.update(zip(new, zip(costs, facts[:, 1].tolist(), strict=True), strict=True))

    def own_keys(self, gains: np.ndarray) -> np.ndarray:
        """What this rank's candidates are compared by, of their `gains` [n here] int64."""
        return pick_keys(torch.from_numpy(gains), self._own_costs if self._goes_by_cost else None).numpy()

    def keys(self, numbers: list[int], gains: Tensor) -> Tensor:
        """What candidates of any rank are compared by, of their `gains` [r] int64; `tell` has been asked for them."""
        costs = [self._told[j][0] for j in numbers] if self._goes_by_cost else None
        return pick_keys(
            gains, None if costs is None else torch.tensor(costs, dtype=torch.float64, device=gains.device)
        )

    def after_pick(self, number: int, row: Tensor) -> Tensor:
        """The places of this rank's candidates that a pick closes, given its row [1, width] among the candidates' rows."""
        return self._after(number, self._of(number, row))

    def _of(self, number: int, row: Tensor | None) -> Taken:
        cost, label = self._told.get(number, (0.0, -1))
        if row is None or self._min_distance is None or not self._candidates.numbers.size:
            return Taken(label, cost, None)
        if self._columns is not None:
            row = row[:, self._columns.to(row.device)]
        return Taken(label, cost, row)

    def _places(self, candidates: list[int]) -> Tensor:
        return self._candidates.places([j for j in candidates if self._candidates.is_here(j)])

    def _taken(self, candidates: list[int]) -> list[Taken]:
        self.tell(candidates)
        rows = self._shared.fetch(candidates) if candidates and self._min_distance is not None else None
        return [
            self._of(j, None if rows is None else rows[place : place + 1])
            for place, j in enumerate(candidates)
        ]
