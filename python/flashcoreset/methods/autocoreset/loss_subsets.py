"""Weighted subsets of rows whose weighted column sums are close to, or exactly, those of a whole loss matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from flashcoreset.caratheodory import caratheodory

Subset = tuple[np.ndarray, np.ndarray]
_SAMPLES = 100  # of the median of means
_MANY = 4096  # rows from which on they are cut into runs
_RUNS = 8  # of that many times k


def exact(losses: np.ndarray, k: int, rng: np.random.Generator) -> Subset:
    """At most k rows of losses [n, c] with exactly the column sums, k > c, by a Carathéodory reduction of the rows in random
    order that stops at k.

    With chances p_i as in `importance`, the vectors (losses_i, 1) / p_i with weights p_i have the sums that are to be
    kept. `caratheodory` leaves most of the weights that it keeps equal, so the weights of rows come out nearly as 1 / p_i: an
    importance sample balanced on the columns.

    Many rows are first cut at random into runs, some of which are kept in the same way: a run is then what one row is, its rows' sums with
    the sum of their chances as the weight. A reduction of r vectors costs r c^2 steps; so all cost some 20 k c^2, and not n c^2.
    """
    # The total of the chances is one more sum to keep; if there is no room for it, all chances are the same.
    chance = _chances(losses) if k > losses.shape[1] + 1 else np.ones(len(losses))
    rows, weight = np.arange(len(losses)), chance
    while len(losses) > _MANY and len(rows) > _RUNS * k:
        order = rng.permutation(len(rows))
        rows, weight = rows[order], weight[order]
        starts = np.arange(_RUNS * k) * len(rows) // (_RUNS * k)
        factor, totals = weight / chance[rows], np.add.reduceat(weight, starts)
        parts = [np.add.reduceat(column[rows] * factor, starts) for column in losses.T]
        vectors = np.stack([*parts, np.add.reduceat(factor, starts)], 1) / totals[:, None]
        subset = caratheodory(torch.from_numpy(vectors), torch.from_numpy(totals), k + k // 4)
        kept, scales = subset.indices.numpy(), np.zeros(len(totals))
        scales[kept] = subset.weights.numpy() / totals[kept]
        scales = np.repeat(scales, np.diff(starts, append=len(rows)))
        rows, weight = rows[scales > 0], (weight * scales)[scales > 0]
    order = rng.permutation(len(rows))
    rows, weight = rows[order], weight[order]
    vectors = np.concatenate([losses[rows], np.ones((len(rows), 1))], 1) / chance[rows, None]
    subset = caratheodory(torch.from_numpy(vectors), torch.from_numpy(weight), k)
    places = subset.indices.numpy()
    return rows[places], subset.weights.numpy() / chance[rows[places]]


def importance(losses: np.ndarray, k: int, rng: np.random.Generator) -> Subset:
    """k rows, the chance of a row being proportional to the largest share that it has of a column (or of the rows), and
    its weight to the inverse: systematic sampling in random order, so no row is drawn twice."""
    n = len(losses)
    chance = _chances(losses)
    # Rows that would have a chance above 1 are taken, and the other rows share what is left.
    certain = np.zeros(n, dtype=bool)
    while True:
        left = k - np.count_nonzero(certain)
        inclusion = np.where(certain, 1.0, chance * (left / chance[~certain].sum()))
        above = ~certain & (inclusion > 1)
        if not above.any():
            break
        certain |= above
    order = rng.permutation(n)
    ends = np.cumsum(inclusion[order])
    ends *= k / ends[-1]
    ends[-1] = k
    starts = np.concatenate([[0.0], ends[:-1]])
    offset = rng.random()
    taken = order[np.floor(ends - offset) > np.floor(starts - offset)]
    weights = 1 / inclusion[taken]
    return taken, weights * (n / weights.sum())


def _chances(losses: np.ndarray) -> np.ndarray:
    """The chances [n]: the largest share that each row has of a column's sum, or its share of the rows."""
    n = len(losses)
    largest = np.zeros(n)
    for column, total in zip(losses.T, losses.sum(0).tolist(), strict=True):
        np.maximum(largest, column / total if total > 0 else 1 / n, out=largest)
    return largest + 1 / n


def median_of_means(losses: np.ndarray, k: int, rng: np.random.Generator) -> Subset:
    """The one of a hundred uniform samples whose column means are nearest to those of all rows (the first among equals)."""
    means, least = losses.mean(0), np.inf
    for _ in range(_SAMPLES):
        rows = rng.choice(len(losses), k, replace=False)
        distance = float(np.linalg.norm(losses[rows].mean(0) - means))
        if distance < least:
            nearest, least = rows, distance
    return nearest, np.full(k, len(losses) / k)


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
    budget, and all its rows if there are no more than that."""
    rows, weights = [], []
    for members, budget in zip(groups, budgets, strict=True):
        if budget >= len(members):
            rows.append(members)
            weights.append(np.ones(len(members)))
        elif budget > 0:
            # Many rows are read column by column, as they lie. Sums of few depend on the order in memory.
            whole = method == "caratheodory" and len(members) == len(losses) > _MANY
            own = losses if whole else np.ascontiguousarray(losses[members])
            taken, weight = METHODS[method](own, budget, rng)
            rows.append(members[taken])
            weights.append(weight)
    chosen, weight = np.concatenate(rows), np.concatenate(weights)
    order = np.argsort(chosen)
    return chosen[order], weight[order]


def equal_budgets(sizes: list[int], k: int) -> list[int]:
    """Budgets of k // G for each group, the remainder for the largest (the first among equals); what a group cannot give, the
    largest of the others give."""
    budgets = [min(size, k // len(sizes)) for size in sizes]
    left = min(k, sum(sizes)) - sum(budgets)
    for group in sorted(range(len(sizes)), key=lambda g: -sizes[g]):
        more = min(left, sizes[group] - budgets[group])
        budgets[group] += more
        left -= more
    return budgets


def class_budgets(sizes: list[int], k: int) -> list[int]:
    """Budgets for classes that favour the small ones: each has the mean of its shares under three rules, in proportion to the share p
    of all samples that it has, to |log p| and to exp(-p), rounded such that the budgets sum to k, with one sample at least and no
    more than the class has. Needs len(sizes) <= k <= sum(sizes).

    The published linear program mixes these rules by three weights; where each class has more than k samples it leaves them between 0.32 and 0.36.
    """
    if len(sizes) == 1:
        return [k]
    room = np.array(sizes)
    p = room / room.sum()
    rules = np.stack([p, np.abs(np.log(p)), np.exp(-p)])
    wanted = k * (rules / rules.sum(1, keepdims=True)).mean(0)
    budgets = np.clip(np.floor(wanted).astype(np.int64), 1, room)
    while budgets.sum() > k:
        budgets[budgets.argmax()] -= 1
    # What rounding and small classes leave goes to those that have least of what they should have.
    while budgets.sum() < k:
        budgets[np.where(budgets < room, wanted - budgets, -np.inf).argmax()] += 1
    return [int(budget) for budget in budgets]


def uniform_with_classes(
    codes: np.ndarray | None, groups: list[np.ndarray], budgets: list[int], rng: np.random.Generator
) -> Subset:
    """Rows without replacement, ascending: from each of `groups` (rows each) its budget, with equal weights that sum to its size; from
    each class in `codes` [n] (0, 1, ...) at least one row, the rarest class first, if a group with such rows has a budget left."""
    n = sum(len(members) for members in groups)
    order = rng.permutation(n)
    group_of = np.empty(n, dtype=np.int64)
    for group, members in enumerate(groups):
        group_of[members] = group
    left, weight_of = (
        np.array(budgets),
        np.array([len(m) / max(1, b) for m, b in zip(groups, budgets, strict=True)]),
    )
    taken = np.zeros(n, dtype=bool)
    if codes is not None:
        for code in np.bincount(codes).argsort(kind="stable"):
            able = order[(codes[order] == code) & (left[group_of[order]] > 0)]
            taken[able[:1]] = True
            left[group_of[able[:1]]] -= 1
    for group in range(len(groups)):
        others = order[(group_of[order] == group) & ~taken[order]]
        taken[others[: left[group]]] = True
    rows = taken.nonzero()[0]
    return rows, weight_of[group_of[rows]]
