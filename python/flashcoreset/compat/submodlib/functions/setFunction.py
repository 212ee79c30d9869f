"""What all of submodlib's functions of sets offer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flashcoreset._core.tensor import as_number, one_of
from flashcoreset.compat.submodlib import _greedy
from flashcoreset.compat.submodlib._objective import Objective, State


class SetFunction:
    """A function of sets of elements 0..n-1, with submodlib's methods and its error messages.

    Subclasses set `n`, `effective_ground` and `_objective`.
    """

    n: int
    effective_ground: set[int]
    _objective: Objective
    _memo: State | np.ndarray | None = None  # picks of `maximize` stand for the state that they lead to

    def evaluate(self, X: set[int]) -> float:
        """The function's value at X."""
        self._check_set(X, "ERROR: X should be a subset of effective ground set")
        if not X:
            return 0
        elements = _array(X)
        return self._objective.value(elements, self._objective.best(elements))

    def marginalGain(self, X: set[int], element: int) -> float:
        """What `element` adds to X."""
        self._check_element(X, element)
        if element in X:
            return 0
        return float(State(self._objective, _array(X)).gains(np.array([element]))[0])

    def maximize(
        self,
        budget: float,
        optimizer: str = "NaiveGreedy",
        stopIfZeroGain: bool = False,
        stopIfNegativeGain: bool = False,
        epsilon: float = 0.1,
        verbose: bool = False,
        show_progress: bool = True,
        costs: Sequence[float] | np.ndarray | None = None,
        costSensitiveGreedy: bool = False,
    ) -> list[tuple[int, float]]:
        """A large set within `budget`: (element, gain) in the order of picking.

        Args:
            budget: how many elements, or the costs that they may add up to; below n.
            optimizer: "NaiveGreedy" and "LazyGreedy" make the exact greedy sequence, ties to the largest element;
                "StochasticGreedy" and "LazierThanLazyGreedy" pick the best of a sample for each pick, the same samples as
                submodlib on Linux.
            stopIfZeroGain: stop at the first gain below 1, which is where submodlib 0.0.3 stops, not only at 0.
            stopIfNegativeGain: stop at the first negative gain.
            epsilon: samples have (n / budget) log(1 / epsilon) elements if it is below 1, `epsilon` elements otherwise.
            verbose: print the picks.
            show_progress: show a bar on stderr.
            costs: of each element.
            costSensitiveGreedy: choose by gain per cost; what is returned are gains per cost too.
        """
        if budget >= len(self.effective_ground):
            raise Exception("Budget must be less than effective ground set size")
        one_of(optimizer, "optimizer", _greedy.EXACT + _greedy.SAMPLED)
        budget, progress = as_number(budget, "budget"), bool(show_progress)
        if costs is None:
            if costSensitiveGreedy:
                raise RuntimeError("costs must be given with costSensitiveGreedy=True, got None")
            if budget < 0:
                raise ValueError(f"budget must be >= 0, got {budget:g}")
            picks = self._picks(optimizer, budget, epsilon, progress)
            gains = self._objective.gains_in_order(picks)
        else:
            if len(costs) != self.n:
                raise Exception("Mismtach between length of costs and number of elements in the groundset")
            if optimizer in _greedy.SAMPLED:
                raise NotImplementedError(
                    f"costs: submodlib's maximize(optimizer={optimizer!r}) does not look at them; take 'NaiveGreedy' or 'LazyGreedy'"
                )
            per_cost = bool(costSensitiveGreedy)
            prices = _checked_costs(costs, per_cost)
            picks, gains = _greedy.with_costs(self._objective, budget, prices, per_cost, progress)
        stop = np.zeros(len(picks), dtype=bool)
        if stopIfZeroGain:
            stop |= np.trunc(gains) == 0
        if stopIfNegativeGain:
            stop |= gains < 0
        end = int(np.argmax(stop)) if stop.any() else len(picks)
        chosen = list(zip(picks[:end].tolist(), gains[:end].tolist(), strict=True))
        self._memo = picks[:end]
        if verbose:
            for element, gain in chosen:
                print(f"Added element {element} and the gain is {gain:g}")
        return chosen

    def setMemoization(self, X: set[int]) -> None:
        """Computes and keeps the statistics of X."""
        self._check_set(X, "ERROR: X should be a subset of effective ground set")
        self._memo = _array(X)

    def clearMemoization(self) -> None:
        """Forgets the statistics: those of the empty set take their place."""
        self._memo = _array(set())

    def updateMemoization(self, X: set[int], element: int) -> None:
        """Adds `element` to the statistics, which are those of X; X itself stays as it is."""
        self._check_element(X, element)
        if element not in X:
            self._state().add(element)

    def marginalGainWithMemoization(self, X: set[int], element: int) -> float:
        """What `element` adds to the set whose statistics are kept."""
        self._check_element(X, element)
        if element in X:
            return 0
        return float(self._state().gains(np.array([element]))[0])

    def evaluateWithMemoization(self, X: set[int]) -> float:
        """The value at X, whose statistics are kept."""
        self._check_set(X, "ERROR: X should be a subset of effective ground set")
        return self._state().value(_array(X)) if X else 0

    def getEffectiveGroundSet(self) -> set[int]:
        """The elements, 0..n-1."""
        return set(range(self.n))

    def _picks(self, optimizer: str, budget: float, epsilon: float, progress: bool) -> np.ndarray:
        count = math.ceil(budget)
        if count == 0:
            return _array(set())
        if optimizer in _greedy.EXACT:
            return _greedy.exact(self._objective, count, progress)
        sample = _greedy.sample_size(self.n, budget, as_number(epsilon, "epsilon"))
        return _greedy.sampled(self._objective, count, sample, progress)

    def _state(self) -> State:
        if not isinstance(self._memo, State):
            self._memo = State(self._objective, self._memo)
        return self._memo

    def _check_set(self, X: set[int], outside: str) -> None:
        if type(X) is not set:
            raise Exception("ERROR: X should be a set")
        if not X.issubset(self.effective_ground):
            raise Exception(outside)

    def _check_element(self, X: set[int], element: int) -> None:
        if type(X) is not set:
            raise Exception("ERROR: X should be a set")
        if type(element) is not int:
            raise Exception("ERROR: element should be an int")
        self._check_set(X, "ERROR: X is not a subset of effective ground set")
        if element not in self.effective_ground:
            raise Exception("Error: element must be in the effective ground set")


def _array(X: set[int]) -> np.ndarray:
    return np.array(sorted(X), dtype=np.int64)


def _checked_costs(costs: Sequence[float] | np.ndarray, per_cost: bool) -> np.ndarray:
    prices = np.asarray(costs, dtype=np.float32)
    least = prices.min()
    if not np.isfinite(prices).all() or least < 0 or (per_cost and least == 0):
        above = "> 0 with costSensitiveGreedy=True" if per_cost else ">= 0"
        raise ValueError(
            f"costs must be finite numbers {above}, got {prices[np.argmin(prices)]:g} at the least"
        )
    return prices
