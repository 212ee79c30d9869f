"""submodlib's optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

import flashcoreset as fc
from flashcoreset._core.progress import Progress
from flashcoreset.compat._knapsack import knapsack
from flashcoreset.compat._run import KernelRun, gains_of_zero_expected
from flashcoreset.compat.submodlib._objective import Clustered, Objective, State

EXACT = ("NaiveGreedy", "LazyGreedy")
SAMPLED = ("StochasticGreedy", "LazierThanLazyGreedy")
LABEL = "facility location"


def exact(objective: Objective, count: int, progress: bool) -> np.ndarray:
    """The greedy sequence of `count` elements."""
    if objective.is_plain:
        with gains_of_zero_expected():
            selection = fc.facility_location(k=count, progress=progress or None, **objective.problem())
        return objective.n - 1 - selection.indices.numpy()
    state, is_open, picks = State(objective), np.ones(objective.n, dtype=bool), []
    for _ in range(count):
        picks.append(_add_best(state, np.flatnonzero(is_open)))
        is_open[picks[-1]] = False
    return np.array(picks, dtype=np.int64)


def sampled(objective: Objective, count: int, sample: int, progress: bool) -> np.ndarray:
    """`count` elements, each the best of `sample` that are drawn anew."""
    draws = _Draws(objective.n, sample)
    last, state = objective.n - 1, State(objective)
    run = KernelRun(count=count, **objective.problem()) if objective.is_plain else None
    picks: list[int] = []
    with Progress(progress, count, LABEL) as bar:
        for _ in range(count):
            drawn = draws.draw()
            picks.append(_add_best(state, drawn) if run is None else last - run.pick_among(last - drawn))
            draws.remove(picks[-1])
            bar.update(len(picks))
    return np.array(picks, dtype=np.int64)


def with_costs(
    objective: Objective, budget: float, costs: np.ndarray, per_cost: bool, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Elements whose costs [n] float32 add up to at most `budget`, and the gains (per cost) that they were chosen by."""
    with Progress(progress, math.ceil(budget), LABEL) as bar:
        purse = _Budget(budget, bar)
        if objective.is_plain:
            picks = _picks_within(objective, costs, purse, per_cost)
            gains = objective.gains_in_order(picks)
            return picks, gains / costs[picks] if per_cost else gains
        state = State(objective)
        chosen, values = knapsack(
            np.arange(objective.n),
            state.gains,
            state.add,
            costs,
            purse,
            per_cost=per_cost,
            tie=lambda j: -j,
            lazy=not isinstance(objective, Clustered),
        )
    return np.array(chosen, dtype=np.int64), np.array(values)


def _picks_within(objective: Objective, costs: np.ndarray, budget: _Budget, per_cost: bool) -> np.ndarray:
    problem, n = objective.problem(), objective.n
    in_rows = np.ones(problem["x"].shape[0])  # one more than elements if there is a base
    in_rows[:n] = costs[::-1]
    run = KernelRun(count=None, costs=in_rows if per_cost else None, **problem)
    return n - 1 - run.picks_within(np.arange(n), in_rows, budget)


class _Budget:
    """What is left, in float32 as submodlib counts it."""

    def __init__(self, budget: float, bar: Progress) -> None:
        self._budget = self._left = np.float32(budget)
        self._bar = bar

    def is_open(self) -> bool:
        return bool(self._left > 0)

    def fits(self, cost: float) -> bool:
        return bool(cost <= self._left)

    def spend(self, cost: float) -> None:
        self._left -= np.float32(cost)
        self._bar.update(math.ceil(self._budget - self._left))


def _add_best(state: State, elements: np.ndarray) -> int:
    """The element of the largest gain, of equal ones the largest element."""
    elements = np.sort(elements)[::-1]
    element = int(elements[np.argmax(state.gains(elements))])
    state.add(element)
    return element


class _Draws:
    """The samples of submodlib on Linux: elements rand() % n from srand(1) on, without those that are picked or drawn already."""

    def __init__(self, n: int, sample: int) -> None:
        self._n, self._sample = n, sample
        self._left = set(range(n))
        self._random = _glibc_random()

    def draw(self) -> np.ndarray:
        count = min(self._sample, len(self._left))
        drawn: set[int] = set()
        while len(drawn) < count:
            element = next(self._random) % self._n
            if element in self._left:
                drawn.add(element)
        return np.fromiter(drawn, dtype=np.int64, count=count)

    def remove(self, element: int) -> None:
        self._left.remove(element)


def _glibc_random() -> Iterator[int]:
    """The numbers of glibc's rand() after srand(1): an additive feedback generator, r_i = r_(i-3) + r_(i-31) mod 2^32."""
    state = [1]
    for _ in range(30):
        state.append(16807 * state[-1] % 2147483647)
    state += state[:3]
    for i in range(34, 2**62):
        newest = (state[-3] + state[-31]) & 0xFFFFFFFF
        state.append(newest)
        if i >= 344:
            yield newest >> 1
        if len(state) == 4096:
            del state[:-31]


def sample_size(n: int, budget: float, epsilon: float) -> int:
    """How many elements are drawn for a pick."""
    size = int(n / budget * math.log(1 / epsilon)) if epsilon < 1 else int(epsilon)
    if size < 1:
        raise ValueError(
            f"epsilon: {epsilon} leaves nothing to draw for a budget of {budget:g} out of {n} elements"
        )
    return size
