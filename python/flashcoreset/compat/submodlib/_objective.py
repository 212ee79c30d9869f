"""What submodlib's facility-location functions have in common: one function of sets, dense or sparse.

    f(A) = sum_i (max(base_i, max_{j in A} s(j, i)) - base_i) + sum_{j in A} bonus_j          with base_i >= 0

- facility location: base = 0.
- mutual information: sum_i min(max_A s, eta max_Q s) is the same with s' = min(s, eta max_Q s).
- conditional gain: sum_i max(max_A s - nu max_P s, 0) has base = nu max_P s.
- conditional mutual information has both, since max(min(a, q) - p, 0) = max(min(a, q), p) - p.
- the variant of mutual information, sum_{q in Q} max_A s + eta sum_{j in A} max_Q s, has bonus_j = eta max_Q s. The bonus is a client that
  only j serves, so this is facility location of a sparse matrix.

The kernels see base as a preselected candidate. Candidates are stored in reverse, because the kernels give ties to the lowest
row and submodlib's NaiveGreedy to the largest element.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from flashcoreset.compat._coverage import covered_gains
from flashcoreset.compat._points import check_values
from flashcoreset.pairwise.backend import choose

_BLOCK = 2**22  # similarities in memory beside the matrix
_NOTHING = 1e-37  # a bonus that only has a sign


class Objective(ABC):
    """One of the functions above. `rows` and `problem` depend on how similarities are held."""

    def __init__(
        self, n: int, clients: int, base: np.ndarray | None = None, bonus: np.ndarray | None = None
    ) -> None:
        self.n = n
        self._base = base
        self.base = np.zeros(clients, dtype=np.float32) if base is None else base
        self.bonus = bonus

    @abstractmethod
    def rows(self, elements: np.ndarray) -> np.ndarray:
        """Similarities [len(elements), m] float32 to all clients."""

    @abstractmethod
    def problem(self) -> dict[str, Any]:
        """The arguments of `facility_location`, whose candidate r is the element n - 1 - r."""

    @property
    def is_plain(self) -> bool:
        """Whether `problem` is this function."""
        return self.bonus is None or not (self.bonus < 0).any()

    def best(self, elements: np.ndarray) -> np.ndarray:
        """max(base, max_{j in elements} s(j, .)), [m] float32."""
        best = self.base
        for block in self._blocks(elements):
            best = np.maximum(best, self.rows(block).max(axis=0))
        return best

    def value(self, elements: np.ndarray, best: np.ndarray) -> float:
        """f of `elements`, whose `best` is given."""
        value = best.sum(dtype=np.float64) - self.base.sum(dtype=np.float64)
        if self.bonus is not None:
            value += self.bonus[elements].sum(dtype=np.float64)
        return float(value)

    def gains(self, elements: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Marginal gains of `elements`, float64."""
        parts = [
            np.maximum(self.rows(block) - best, 0).sum(axis=1, dtype=np.float64)
            for block in self._blocks(elements)
        ]
        gains = np.concatenate(parts) if parts else np.empty(0)
        return gains if self.bonus is None else gains + self.bonus[elements]

    def gains_in_order(self, picks: np.ndarray) -> np.ndarray:
        """The gain of each pick after those before it, float64."""
        gains = covered_gains(picks, self.rows, self.base)[0]
        return gains if self.bonus is None else gains + self.bonus[picks]

    def _blocks(self, elements: np.ndarray) -> list[np.ndarray]:
        count = max(1, _BLOCK // max(1, len(self.base)))
        return [elements[begin : begin + count] for begin in range(0, len(elements), count)]


class Dense(Objective):
    """Similarities held as a matrix.

    Args:
        s: [m, n], client by candidate, as submodlib has it.
        name: of `s`, for messages.
        cap: [m] what similarities are cut down to, or None.
    """

    def __init__(
        self,
        s: np.ndarray,
        name: str,
        *,
        cap: np.ndarray | None = None,
        base: np.ndarray | None = None,
        bonus: np.ndarray | None = None,
    ) -> None:
        clients, n = s.shape
        super().__init__(n, clients, base, bonus)
        self._x = _reversed_transpose(s, base, cap)
        check_values(torch.from_numpy(self._x), name)

    def rows(self, elements: np.ndarray) -> np.ndarray:
        return self._x[self.n - 1 - elements]

    def problem(self) -> dict[str, Any]:
        if self.bonus is None:
            taken = None if self._base is None else torch.tensor([self.n])
            return {"x": torch.from_numpy(self._x), "metric": "precomputed", "preselected": taken}
        every = np.arange(self.n)
        bonus = np.where(self.bonus > _NOTHING, self.bonus, 0)[::-1]
        own = scipy.sparse.csr_matrix((bonus, (every, every)), shape=(self.n, self.n))
        x = scipy.sparse.hstack([scipy.sparse.csr_matrix(self._x), own], format="csr")
        return {"x": x, "metric": "precomputed"}


class Sparse(Objective):
    """Similarities held as a sparse matrix, absent ones 0.

    Args:
        x: [n, m], candidate by client, float32.
    """

    def __init__(self, x: scipy.sparse.csr_matrix, name: str) -> None:
        super().__init__(x.shape[0], x.shape[1])
        self._x = x[::-1].tocsr()
        check_values(torch.from_numpy(self._x.data), name)

    def rows(self, elements: np.ndarray) -> np.ndarray:
        return self._x[self.n - 1 - elements].toarray()

    def problem(self) -> dict[str, Any]:
        return {"x": self._x, "metric": "precomputed"}


class Clustered(Sparse):
    """Clusters that only serve themselves.

    While no element of a cluster is picked, submodlib counts the negative similarities in the gains of its elements; once one
    is, negative similarities count as 0, as everywhere.

    Args:
        x: [n, n], 0 between clusters.
        clusters: [n] of each element.
    """

    def __init__(self, x: scipy.sparse.csr_matrix, clusters: np.ndarray, name: str) -> None:
        super().__init__(x, name)
        self.clusters = clusters
        self._signed = bool((x.data < 0).any())
        self._first = np.asarray(x.astype(np.float64).sum(axis=1)).reshape(-1)

    @property
    def is_plain(self) -> bool:
        return not self._signed

    def gains_in_order(self, picks: np.ndarray) -> np.ndarray:
        if self.is_plain:
            return super().gains_in_order(picks)
        state, gains = State(self), []
        for element in picks:
            gains.append(state.gains(np.array([element]))[0])
            state.add(element)
        return np.array(gains)

    def first_gains(self, elements: np.ndarray, gains: np.ndarray, begun: set[int]) -> np.ndarray:
        """`gains` of `elements`, but those of clusters that are not in `begun` as submodlib counts them."""
        fresh = ~np.isin(self.clusters[elements], list(begun))
        return np.where(fresh, self._first[elements], gains)


class Points(Objective):
    """Similarities computed from points when they are needed.

    Args:
        data: [n, d] float32.
        clients: [m, d] float32, or None for the points themselves.
        metric: "cosine" or "dot".
    """

    def __init__(self, data: Tensor, clients: Tensor | None, metric: str) -> None:
        super().__init__(data.shape[0], (data if clients is None else clients).shape[0])
        self._x, self._clients, self._metric = data.flip(0), clients, metric

    def rows(self, elements: np.ndarray) -> np.ndarray:
        x = self._x[self.n - 1 - torch.from_numpy(elements)]
        clients = self._x if self._clients is None else self._clients
        return choose(None, x.device).pairwise(x, clients, metric=self._metric).numpy()

    def problem(self) -> dict[str, Any]:
        return {"x": self._x, "clients": self._clients, "metric": self._metric}


class State:
    """What was picked so far: submodlib's memoized statistics."""

    def __init__(self, objective: Objective, elements: np.ndarray | None = None) -> None:
        self._objective = objective
        elements = np.empty(0, dtype=np.int64) if elements is None else elements
        self.best = objective.best(elements)
        self._begun: set[int] = set()
        if isinstance(objective, Clustered):
            self._begun.update(objective.clusters[elements].tolist())

    def gains(self, elements: np.ndarray) -> np.ndarray:
        gains = self._objective.gains(elements, self.best)
        if isinstance(self._objective, Clustered) and not self._objective.is_plain:
            return self._objective.first_gains(elements, gains, self._begun)
        return gains

    def add(self, element: int) -> None:
        self.best = np.maximum(self.best, self._objective.rows(np.array([element]))[0])
        if isinstance(self._objective, Clustered):
            self._begun.add(int(self._objective.clusters[element]))

    def value(self, elements: np.ndarray) -> float:
        return self._objective.value(elements, self.best)


def _reversed_transpose(s: np.ndarray, base: np.ndarray | None, cap: np.ndarray | None) -> np.ndarray:
    """[n, m] float32, the rows in reverse, and `base` as one more; blocks stay in the cache on both sides."""
    m, n = s.shape
    x = np.empty((n + (base is not None), m), dtype=np.float32)
    reverse, width = x[:n][::-1], 128
    for i in range(0, m, width):
        for j in range(0, n, width):
            reverse[j : j + width, i : i + width] = s[i : i + width, j : j + width].T
    if cap is not None:
        np.minimum(x[:n], cap, out=x[:n])
    if base is not None:
        x[n] = base
    return x
