"""Weighted subsets of rows whose weighted column sums are close to, or exactly, those of a whole loss matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flashcoreset.ops.caratheodory import caratheodory

Subset = tuple[np.ndarray, np.ndarray]
_GROUPS = 9  # of the median of means


def exact(losses: np.ndarray, k: int, rng: np.random.Generator) -> Subset:
    """At most k rows of losses [n, c] with exactly the column sums: a Carathéodory reduction of the rows in random order that
    stops at k, which is a balanced random sample. k > c, or k >= n.
    """
    order = rng.permutation(len(losses))
    subset = caratheodory(torch.from_numpy(losses[order]), max_size=k)
    return order[subset.indices.numpy()], subset.weights.numpy()


def importance(losses: np.ndarray, k: int, rng: np.random.Generator) -> Subset:
    """k rows, the chance of a row being proportional to the largest share that it has of a column (or of the rows), and
    its weight to the inverse: systematic sampling in random order, so none is drawn twice."""
    n = len(losses)
    totals = losses.sum(0)
    shares = np.divide(losses, totals, out=np.full(losses.shape, 1 / n), where=totals > 0)
    chance = shares.max(1, initial=0) + 1 / n
    # Rows that would have a chance above 1 are taken, and the others share what is left.
    certain = np.zeros(n, dtype=bool)
    while True:
        left = k - np.count_nonzero(certain)
        scaled = chance * (left / chance[~certain].sum()) if left else np.zeros(n)
        above = ~certain & (scaled >= 1)
        if not above.any():
            break
        certain |= above
        if certain.all():
            break
    inclusion = np.where(certain, 1.0, scaled)
    order = rng.permutation(n)
    ends = np.cumsum(inclusion[order])
    ends *= k / ends[-1]
    starts = np.concatenate([[0.0], ends[:-1]])
    offset = rng.random()
    taken = order[np.floor(ends - offset) > np.floor(starts - offset)]
    weights = 1 / inclusion[taken]
    return taken, weights * (n / weights.sum())


def median_of_means(losses: np.ndarray, k: int, rng: np.random.Generator) -> Subset:
    """Of some uniform samples the one whose column means are the nearest to those of most others: that of the least median
    distance. Columns count relative to their means."""
    scale = losses.mean(0)
    scaled = losses / np.where(scale > 0, scale, 1)
    samples = [rng.choice(len(losses), k, replace=False) for _ in range(_GROUPS)]
    means = np.stack([scaled[rows].mean(0) for rows in samples])
    distances = np.linalg.norm(means[:, None] - means, axis=2)
    rows = samples[int(np.median(distances, axis=1).argmin())]
    return rows, np.full(k, len(losses) / k)


def uniform(losses: np.ndarray, k: int, rng: np.random.Generator) -> Subset:
    """k rows without replacement, of equal weights."""
    return rng.choice(len(losses), k, replace=False), np.full(k, len(losses) / k)


METHODS: dict[str, Callable[[np.ndarray, int, np.random.Generator], Subset]] = {
    "caratheodory": exact,
    "importance": importance,
    "median_of_means": median_of_means,
    "uniform": uniform,
}


def in_groups(
    method: str, losses: np.ndarray, groups: list[np.ndarray], budgets: list[int], rng: np.random.Generator
) -> Subset:
    """Rows, ascending, and weights, which sum to a group's size in each of `groups` (rows each); a group gives at most its
    budget, and all of itself where that is no less."""
    rows, weights = [], []
    for members, budget in zip(groups, budgets, strict=True):
        if budget >= len(members):
            rows.append(members)
            weights.append(np.ones(len(members)))
        elif budget > 0:
            taken, weight = METHODS[method](losses[members], budget, rng)
            rows.append(members[taken])
            weights.append(weight)
    chosen, weight = np.concatenate(rows), np.concatenate(weights)
    order = np.argsort(chosen)
    return chosen[order], weight[order]


def equal_budgets(sizes: list[int], k: int) -> list[int]:
    """k // G for each group, the remainder for the largest (of equal ones the first); what a group cannot give, the largest
    of the others do."""
    budgets = [min(size, k // len(sizes)) for size in sizes]
    left = min(k, sum(sizes)) - sum(budgets)
    for group in sorted(range(len(sizes)), key=lambda g: -sizes[g]):
        more = min(left, sizes[group] - budgets[group])
        budgets[group] += more
        left -= more
    return budgets


def uniform_with_classes(codes: np.ndarray | None, n: int, k: int, rng: np.random.Generator) -> Subset:
    """k of n rows without replacement, of equal weights, ascending; of each class in `codes` [n] (0, 1, ...) at least one."""
    order = rng.permutation(n)
    if codes is not None:
        _, first = np.unique(codes[order], return_index=True)
        order = np.concatenate([order[first], np.delete(order, first)])
    return np.sort(order[:k]), np.full(k, n / k)
