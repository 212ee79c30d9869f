"""apricot's facility-location selector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch

import flashcoreset as fc
from flashcoreset.compat._coverage import covered_gains
from flashcoreset.compat._knapsack import Budget
from flashcoreset.compat._run import KernelRun, gains_of_zero_expected
from flashcoreset.compat.apricot.functions.base import BaseGraphSelection

_BLOCK = 2**22  # similarities in memory beside the matrix


class FacilityLocationSelection(BaseGraphSelection):
    """Picks rows that are similar to many others: f(S) = sum_i max(0, max_{j in S} s(j, i)).

    Args:
        n_samples: how many rows, or what their costs may add up to.
        metric: of similarities: "euclidean" (the largest squared distance less the squared distance), "cosine" and "corr" (the
            square of it), another of scikit-learn's (the largest distance less the distance), or "precomputed".
        initial_subset: indices or a boolean mask of rows that are covered already and are not picked.
        optimizer: a name in `optimizers.OPTIMIZERS`, or an optimizer.
        optimizer_kwds: arguments of the optimizer that is named.
        n_neighbors: keep similarities of so many nearest rows alone; a number or a KNeighborsTransformer.
        reservoir: [r, d] the rows that `partial_fit` compares with.
        max_reservoir_size: how many rows it keeps for that if there is no `reservoir`.
        n_jobs: unused, as in apricot; threads are torch's.
        random_state: a seed or a RandomState, for optimizers that draw, and for the reservoir.
        verbose: show a bar on stderr.

    Attributes:
        ranking: [k] the picks, in order.
        gains: [k] float64.
        subset: [k, d] float64, the rows; empty with metric="precomputed".
        mask: [n] int8, 1 where a row is picked or covered already.
        idxs: the other rows.
        current_values: [n] float64, the largest similarity of each row to a pick.
    """

    @property
    def current_values_sum(self) -> float:
        return float(self.current_values.sum())

    def _initialize(self, X: Any) -> None:
        if self.initial_subset is not None and self.initial_subset.ndim != 1:
            raise ValueError(
                "When using facility location, the initial subset must be a one dimensional array of indices."
            )
        super()._initialize(X)
        self._covering = np.flatnonzero(self.mask)  # the rows that `current_values` are of
        if len(self._covering):
            self.current_values = np.maximum(_dense(X[self._covering]).max(axis=0), 0.0).astype(np.float64)

    def _calculate_gains(self, X: Any, idxs: np.ndarray | None = None) -> np.ndarray:
        """What each of the rows `idxs` (default: all that are left) would add, float64."""
        idxs = self.idxs if idxs is None else idxs
        if len(idxs) == 1 and scipy.sparse.issparse(X):  # SciPy takes longer to cut a row out
            entries = slice(X.indptr[idxs[0]], X.indptr[idxs[0] + 1])
            return np.maximum(X.data[entries] - self.current_values[X.indices[entries]], 0).sum(keepdims=True)
        gains = np.empty(len(idxs))
        step = max(1, _BLOCK // X.shape[1])
        total = self.current_values.sum()
        for begin in range(0, len(idxs), step):
            rows = X[idxs[begin : begin + step]]
            if scipy.sparse.issparse(rows):
                above = np.maximum(rows.data - self.current_values[rows.indices], 0)
                gains[begin : begin + step] = np.add.reduceat(np.append(above, 0.0), rows.indptr[:-1])
                gains[begin : begin + step][np.diff(rows.indptr) == 0] = 0
            else:
                gains[begin : begin + step] = np.maximum(rows, self.current_values).sum(axis=1) - total
        return gains

    def _gains_in_order(self, X: Any, picks: np.ndarray) -> np.ndarray:
        """The gain of each of `picks` after those before it, float64; they are covered from now on."""
        gains, best = covered_gains(picks, lambda some: _dense(X[some]), self.current_values)
        self.current_values = best.astype(np.float64)
        return gains

    def _cover(self, row: Any) -> None:
        self.current_values = np.maximum(self.current_values, _dense(row).reshape(-1))

    def _append(self, picks: np.ndarray, gains: np.ndarray) -> None:
        """Takes over `picks`, which are covered already."""
        self.ranking += picks.tolist()
        self.gains += gains.tolist()
        self.mask[picks] = 1
        self.idxs = np.where(self.mask == 0)[0]
        self._covering = np.concatenate([self._covering, picks])
        if self._bar is not None:
            self._bar.update(len(self.ranking))

    def _select_next(self, row: Any, gain: float, idx: int) -> None:
        """Picks the row `idx`, whose similarities are `row`."""
        self._cover(row)
        self._append(np.array([idx], dtype=np.int64), np.array([gain]))

    def _pick_greedily(self, X: Any, count: int) -> int:
        """The next `count` picks of the exact greedy sequence, fewer if there are no more rows.

        Returns:
            How many of them there are up to the last whose gain is that of the pick before it, and not 0.
        """
        count = min(count, len(self.idxs))
        if count < 1:
            return 0
        x, preselected, rows = self._problem(X)
        bar, made = self._bar, len(self.ranking)
        report = None if bar is None else lambda done, total: bar.update(made + done)
        with gains_of_zero_expected():
            selection = fc.facility_location(
                x, count, metric="precomputed", preselected=preselected, progress=report
            )
        gains = self._finish(X, selection.indices.numpy(), rows)
        tied = np.flatnonzero((np.diff(gains) == 0) & (gains[1:] > 0))
        return int(tied[-1]) + 2 if len(tied) else 0

    def _pick_among(self, X: Any, count: int, draw: Callable[[np.ndarray], np.ndarray]) -> None:
        """The next `count` picks, each the best of what `draw` gives out of the rows that are left."""
        count = min(count, len(self.idxs))
        if count < 1:
            return
        x, preselected, rows = self._problem(X)
        covered = None if preselected is None else torch.from_numpy(preselected)
        run = KernelRun(x, count, metric="precomputed", preselected=covered)
        left, picks = self.idxs, np.empty(count, dtype=np.int64)
        for i in range(count):
            drawn = draw(left)
            picks[i] = run.pick_among(drawn if rows is None else np.searchsorted(rows, drawn))
            left = left[left != (picks[i] if rows is None else rows[picks[i]])]
        self._finish(X, picks, rows)

    def _pick_within(self, X: Any, costs: np.ndarray, budget: Budget) -> None:
        """The picks of the largest gains per cost [n], each out of the rows that still fit."""
        if not len(self.idxs):
            return
        x, preselected, rows = self._problem(X)
        covered = None if preselected is None else torch.from_numpy(preselected)
        in_rows = np.ones(x.shape[0])  # one more than rows if there is one of what is covered
        in_rows[: X.shape[0] if rows is None else len(rows)] = costs if rows is None else costs[rows]
        run = KernelRun(x, None, metric="precomputed", preselected=covered, costs=in_rows)
        candidates = self.idxs if rows is None else np.arange(len(rows))
        self._finish(X, run.picks_within(candidates, in_rows, budget), rows)

    def _problem(self, X: Any) -> tuple[Any, np.ndarray | None, np.ndarray | None]:
        """Similarities, what is covered, and the rows that they are of (None: all).

        Rows that are left out but not covered are taken out, and a row of what is covered already is put in.
        """
        if len(self._covering) + len(self.idxs) == X.shape[0]:
            return X, self._covering if len(self._covering) else None, None
        part = X[self.idxs]
        if not len(self._covering):
            return part, None, self.idxs
        stack = partial(scipy.sparse.vstack, format="csr") if scipy.sparse.issparse(part) else np.vstack
        return (
            stack([part, self.current_values[None].astype(part.dtype)]),
            np.array([len(self.idxs)]),
            self.idxs,
        )

    def _finish(self, X: Any, picks: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
        picks = picks if rows is None else rows[picks]
        gains = self._gains_in_order(X, picks)
        self._append(picks, gains)
        return gains

    def _kept(self) -> dict[str, Any]:
        """What picks change."""
        names = ("ranking", "gains", "mask", "idxs", "current_values", "_covering")
        return {name: copy.copy(getattr(self, name)) for name in names}

    def _restore(self, kept: dict[str, Any]) -> None:
        """Goes back to a state of `_kept`."""
        self.__dict__.update(kept)


def _dense(rows: Any) -> np.ndarray:
    return rows.toarray() if scipy.sparse.issparse(rows) else np.asarray(rows)
