"""apricot.optimizers: how a selector picks."""

from __future__ import annotations

import heapq
import itertools
from typing import Any

import numpy as np

from flashcoreset.compat.apricot._sieve import Sieves
from flashcoreset.compat.apricot.utils import check_random_state

_HEAP_ROWS = 4096


class BaseOptimizer:
    """What all optimizers share.

    Args:
        function: the selector; it sets itself.
        random_state: a seed, a RandomState or None.
        n_jobs: unused, as in apricot.
        verbose: show a bar on stderr.
    """

    def __init__(
        self, function: Any = None, random_state: Any = None, n_jobs: int | None = None, verbose: bool = False
    ) -> None:
        self.function = function
        self.random_state = check_random_state(random_state)
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.gains_ = None

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        """Picks rows of the similarities X [n, m] until there are `k`, or until their costs reach `k`."""
        raise NotImplementedError


class NaiveGreedy(BaseOptimizer):
    """The exact greedy sequence, ties to the lowest index; with costs, of gain per cost among those that fit."""

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        if sample_cost is None:
            self.function._pick_greedily(X, int(k))
            return
        self.function._pick_within(X, _checked_costs(sample_cost, X.shape[0]), _Budget(k))


class LazyGreedy(NaiveGreedy):
    """The same as NaiveGreedy, but for ties.

    If picks with equal gains follow each other and there are at most 4,096 rows, their order is apricot's, which depends on when each
    gain was last computed.
    """

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        if sample_cost is not None:
            super().select(X, k, sample_cost)
            return
        function = self.function
        before = function._kept()
        tied = function._pick_greedily(X, int(k))
        if tied and X.shape[0] <= _HEAP_ROWS:
            function._restore(before)
            self._select_by_heap(X, tied)
            function._pick_greedily(X, int(k) - tied)

    def _select_by_heap(self, X: Any, k: int) -> None:
        """Picks `k` rows by computing gains in apricot's order."""
        function = self.function
        count = itertools.count()
        gains = function._calculate_gains(X)
        queue = [
            (-gain, next(count), j) for gain, j in zip(gains.tolist(), function.idxs.tolist(), strict=True)
        ]
        heapq.heapify(queue)
        for _ in range(k):
            best, chosen = -np.inf, None
            while True:
                _, _, j = heapq.heappop(queue)
                if j == chosen:
                    break
                gain = float(function._calculate_gains(X, np.array([j]))[0])
                heapq.heappush(queue, (-gain, next(count), j))
                if gain > best:
                    best, chosen = gain, j
            function._select_next(X[chosen], best, chosen)


class ApproximateLazyGreedy(BaseOptimizer):
    """Takes the first candidate in the order of old gains whose new gain is at least `beta` times the old one."""

    def __init__(
        self,
        function: Any = None,
        beta: float = 0.9,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(function, random_state, n_jobs, verbose)
        self.beta = beta

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        function = self.function
        costs = _checked_costs(sample_cost, X.shape[0])
        count = itertools.count()
        old = function._calculate_gains(X) / costs[function.idxs]
        queue = [
            (-gain, next(count), j) for gain, j in zip(old.tolist(), function.idxs.tolist(), strict=True)
        ]
        heapq.heapify(queue)
        budget = _Budget(k)
        while budget.is_open() and queue:
            negative, _, j = heapq.heappop(queue)
            if not budget.fits(costs[j]):
                continue
            gain = float(function._calculate_gains(X, np.array([j]))[0] / costs[j])
            if gain < self.beta * -negative:
                heapq.heappush(queue, (-gain, next(count), j))
                continue
            budget.spend(costs[j])
            function._select_next(X[j], gain * costs[j], j)


class TwoStageGreedy(BaseOptimizer):
    """The first `n_first_selections` by one optimizer, the others by another; with costs, budgets in the place of numbers."""

    def __init__(
        self,
        function: Any = None,
        n_first_selections: int = 10,
        optimizer1: Any = "naive",
        optimizer2: Any = "lazy",
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(function, random_state, n_jobs, verbose)
        self.n_first_selections, self.optimizer1, self.optimizer2 = n_first_selections, optimizer1, optimizer2

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        first = _made(self.optimizer1, "optimizer1", self.function)
        second = _made(self.optimizer2, "optimizer2", self.function)
        if sample_cost is None and {type(first), type(second)} <= {NaiveGreedy, LazyGreedy}:
            before = self.function._kept()
            if not self.function._pick_greedily(X, int(k)):
                return
            self.function._restore(before)
        first.select(X, min(self.n_first_selections, k), sample_cost=sample_cost)
        if k > self.n_first_selections:
            second.select(X, k - self.n_first_selections, sample_cost=sample_cost)


class StochasticGreedy(BaseOptimizer):
    """The best of -log(epsilon) n / k candidates that are drawn anew for each pick, by the same calls of `random_state` as apricot."""

    def __init__(
        self,
        function: Any = None,
        epsilon: float = 0.9,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(function, random_state, n_jobs, verbose)
        self.epsilon = epsilon

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        function = self.function
        size = max(int(-np.log(self.epsilon) * X.shape[0] / k), 1)
        if sample_cost is None:
            function._pick_among(X, int(k), lambda left: self._draw(left, size))
            return
        costs, budget = _checked_costs(sample_cost, X.shape[0]), _Budget(k)
        while budget.is_open() and len(function.idxs):
            drawn = self._draw(function.idxs, size)
            gains = function._calculate_gains(X, drawn) / costs[drawn]
            order = np.argsort(-gains, kind="stable")
            best = next((i for i in order if budget.fits(costs[drawn[i]])), None)
            if best is None:
                return
            budget.spend(costs[drawn[best]])
            # Gains per cost, as apricot keeps them here and nowhere else.
            function._select_next(X[drawn[best]], gains[best], drawn[best])

    def _draw(self, left: np.ndarray, size: int) -> np.ndarray:
        return self.random_state.choice(left, replace=False, size=min(size, len(left)))


class SampleGreedy(BaseOptimizer):
    """Another optimizer on a random sample of n * `epsilon` candidates, by the same call of `random_state` as apricot."""

    def __init__(
        self,
        function: Any = None,
        epsilon: float = 0.9,
        optimizer: Any = "lazy",
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(function, random_state, n_jobs, verbose)
        self.epsilon, self.optimizer = epsilon, optimizer

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        n = X.shape[0]
        left_out = self.random_state.choice(
            self.function.idxs, replace=False, size=n - max(int(n * self.epsilon), 1)
        )
        self.function.mask[left_out] = 1
        self.function.idxs = np.where(self.function.mask == 0)[0]
        _made(self.optimizer, "optimizer", self.function).select(X, k, sample_cost=sample_cost)


class GreeDi(BaseOptimizer):
    """`l` picks from each of `m` random parts, each of which serves itself alone, then the picks among those."""

    def __init__(
        self,
        function: Any = None,
        m: int | None = None,
        l: int | None = None,  # noqa: E741
        optimizer1: Any = "lazy",
        optimizer2: Any = "lazy",
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(function, random_state, n_jobs, verbose)
        self.m, self.l, self.optimizer1, self.optimizer2 = m, l, optimizer1, optimizer2

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        function = self.function
        if function.initial_subset is not None:
            raise NotImplementedError(
                "initial_subset: its indices mean nothing in GreeDi's parts; take another optimizer than 'greedi' "
                "(apricot.optimizers.GreeDi applies them to the rows of each part)"
            )
        if self.m is None and self.l is None:
            self.m = 8
            self.l = int(min(k // 4, X.shape[0] // self.m))
        if self.m is None or self.l is None:
            raise ValueError(f"m and l must be given together, got m={self.m} and l={self.l}")
        if k > self.m * self.l:
            raise ValueError("k must be smaller than m * l")
        costs = None if sample_cost is None else _checked_costs(sample_cost, X.shape[0])
        parts = np.arange(X.shape[0]) % self.m
        self.random_state.shuffle(parts)
        first, second = (
            _made(o, n, function)
            for o, n in ((self.optimizer1, "optimizer1"), (self.optimizer2, "optimizer2"))
        )

        def picked(rows: np.ndarray, optimizer: BaseOptimizer, count: float) -> np.ndarray:
            part = X[rows][:, rows]
            function._initialize(part)
            optimizer.select(part, count, sample_cost=None if costs is None else costs[rows])
            return rows[np.array(function.ranking, dtype=np.int64)]

        found = np.concatenate([picked(np.where(parts == i)[0], first, self.l) for i in range(self.m)])
        chosen = picked(found, second, k)
        function._initialize(X)
        function._append(chosen, function._gains_in_order(X, chosen))


class RandomGreedy(BaseOptimizer):
    """Candidates that fit, each as likely as the others."""

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        function = self.function
        costs, budget = _checked_costs(sample_cost, X.shape[0]), _Budget(k)
        picks: list[int] = []
        left = function.idxs
        while budget.is_open():
            left = left[[budget.fits(cost) for cost in costs[left].tolist()]]
            if not len(left):
                break
            picks.append(int(self.random_state.choice(left)))
            budget.spend(costs[picks[-1]])
            left = left[left != picks[-1]]
        chosen = np.array(picks, dtype=np.int64)
        function._append(chosen, function._gains_in_order(X, chosen))


class ModularGreedy(BaseOptimizer):
    """The candidates of the largest gains before anything is picked."""

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        function = self.function
        costs, budget = _checked_costs(sample_cost, X.shape[0]), _Budget(k)
        gains = function._calculate_gains(X) / costs[function.idxs]
        picks = []
        for j in function.idxs[gains.argsort()[::-1]].tolist():
            if budget.fits(costs[j]):
                budget.spend(costs[j])
                picks.append(j)
        chosen = np.array(picks, dtype=np.int64)
        function._append(chosen, function._gains_in_order(X, chosen))


class BidirectionalGreedy(BaseOptimizer):
    """Refuses to select: apricot 0.6.1's own does for facility location."""

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        raise NotImplementedError(
            "optimizer: 'bidirectional' is for functions that are not monotone, and apricot.optimizers.BidirectionalGreedy fails on "
            "facility location; take 'lazy'"
        )


class SieveGreedy(BaseOptimizer):
    """Picks from a stream: for each of many guesses of the best value, rows whose gains keep up with the guess.

    Args:
        function, random_state, n_jobs, verbose: see BaseOptimizer.
        epsilon: guesses are 1 + epsilon apart.
    """

    def __init__(
        self,
        function: Any = None,
        epsilon: float = 0.01,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(function, random_state, n_jobs, verbose)
        self.epsilon = epsilon
        self.n_seen_ = 0
        self.thresholds: list[float] = [1]
        self.max_gain = -1.0
        self._sieves: Sieves | None = None

    def select(self, X: Any, k: float, sample_cost: Any = None) -> None:
        if sample_cost is not None:
            raise NotImplementedError(
                "sample_cost: apricot.optimizers.SieveGreedy picks k rows whatever they cost; leave it None"
            )
        function = self.function
        clients = X.shape[1] if function.reservoir is None else function.max_reservoir_size
        if X.shape[1] > clients:
            raise ValueError(
                f"max_reservoir_size must be at least the columns of X, {X.shape[1]}, got {clients}"
            )
        scale = 1 if function.reservoir is None else X.shape[1]
        self._raise_thresholds(float(function._calculate_gains(X).max()) / scale, k)
        if self._sieves is None:
            self._sieves = Sieves(int(k), clients)
        covered = set((np.flatnonzero(function.mask) + self.n_seen_).tolist())
        self._sieves.update(X, function.current_values, self.thresholds, self.n_seen_, covered)
        ranking, gains = self._sieves.best()
        function._keep_rows(ranking, self._sieves.taken(), self.n_seen_)
        function.ranking, function.gains = ranking.tolist(), gains.tolist()
        self.n_seen_ += X.shape[0]

    def _raise_thresholds(self, largest: float, k: float) -> None:
        if largest <= self.max_gain:
            return
        self.max_gain = largest
        while (threshold := (1 + self.epsilon) ** len(self.thresholds) - 1) <= self.max_gain * k:
            self.thresholds.append(threshold)


OPTIMIZERS: dict[str, type[BaseOptimizer]] = {
    "random": RandomGreedy,
    "modular": ModularGreedy,
    "naive": NaiveGreedy,
    "lazy": LazyGreedy,
    "approximate-lazy": ApproximateLazyGreedy,
    "two-stage": TwoStageGreedy,
    "stochastic": StochasticGreedy,
    "sample": SampleGreedy,
    "greedi": GreeDi,
    "bidirectional": BidirectionalGreedy,
    "sieve": SieveGreedy,
}


class _Budget:
    """What is spent, in float64 as apricot counts it."""

    def __init__(self, budget: float) -> None:
        self._budget, self._spent = budget, 0.0

    def is_open(self) -> bool:
        return self._spent < self._budget

    def fits(self, cost: float) -> bool:
        return self._spent + cost <= self._budget

    def spend(self, cost: float) -> None:
        self._spent += cost


def _made(optimizer: Any, name: str, function: Any) -> BaseOptimizer:
    """An optimizer from its name, for `function`."""
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"{name} must be an optimizer or one of {', '.join(OPTIMIZERS)}, got {optimizer!r}"
            )
        return OPTIMIZERS[optimizer](function=function)
    if not isinstance(optimizer, BaseOptimizer):
        raise ValueError(f"{name} must be a string or an optimizer, got {type(optimizer).__name__}")
    optimizer.function = function
    return optimizer


def _checked_costs(sample_cost: Any, n: int) -> np.ndarray:
    """[n] float64; 1 for None."""
    if sample_cost is None:
        return np.ones(n)
    costs = np.asarray(sample_cost, dtype=np.float64)
    if costs.shape != (n,):
        raise ValueError(f"sample_cost must have shape ({n},), got {costs.shape}")
    if not (np.isfinite(costs).all() and costs.min() > 0):
        raise ValueError(f"sample_cost must be finite and > 0, got {costs.min():g} at the least")
    return costs
