"""Runs of the kernels that their caller advances, as peers' optimizers need them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.errors import InputWarning
from flashcoreset._core.tensor import as_csr, as_matrix, is_sparse
from flashcoreset.compat._knapsack import Budget
from flashcoreset.facility_location.backend import choose
from flashcoreset.facility_location.problem import Problem


@contextmanager
def gains_of_zero_expected() -> Iterator[None]:
    """Without the warning that picks gain nothing, which peers do not give."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ of \d+ picks gain something", InputWarning)
        yield


class KernelRun:
    """Facility location, one pick after the other.

    Args:
        x: [n, d] points, or [n, m] similarities, dense or a SciPy CSR matrix.
        count: how many picks are likely, or None for many.
        clients: [m, d] points, or None for `x`.
        metric: of points, or "precomputed".
        preselected: [p] int64, or None.
        costs: [n] float64 that gains are divided by, or None.
    """

    def __init__(
        self,
        x: Any,
        count: int | None,
        *,
        clients: Tensor | None = None,
        metric: str,
        preselected: Tensor | None = None,
        costs: np.ndarray | None = None,
    ) -> None:
        sparse = is_sparse(x)
        kernels = choose(None, torch.device("cpu"), sparse=sparse)
        self._run = kernels.FacilityLocation(
            Problem(
                as_csr(x, "x") if sparse else as_matrix(x, "x"),
                clients,
                metric,
                preselected=preselected,
                costs=None if costs is None else torch.from_numpy(costs),
                expected_picks=count,
            )
        )

    def pick_among(self, candidates: np.ndarray) -> int:
        """The best of `candidates` [r] int64, which are neither picked nor preselected; of equal ones the lowest."""
        return int(self._run.step_among(torch.from_numpy(np.sort(candidates))))

    def picks_within(self, candidates: np.ndarray, costs: np.ndarray, budget: Budget) -> np.ndarray:
        """The best candidates one by one, each out of those that still fit, until none does.

        Args:
            candidates: [r] int64, all that are not preselected.
            costs: [n] of all of `x`, > 0.
            budget: what is spent.
        """
        dearest = candidates[np.argsort(-costs[candidates], kind="stable")].tolist()
        picks: dict[int, None] = {}
        checked, left = 0, len(dearest)
        while budget.is_open():
            dear = []
            while checked < len(dearest) and not budget.fits(float(costs[dearest[checked]])):
                if dearest[checked] not in picks:
                    dear.append(dearest[checked])
                checked += 1
            left -= len(dear)
            if left == 0:
                break
            if dear:
                self._run.close(torch.tensor(dear))
            pick = self._run.pick()
            budget.spend(float(costs[pick]))
            picks[pick] = None
            left -= 1
        return np.array(list(picks), dtype=np.int64)
