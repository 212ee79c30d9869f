"""GORACS in plain NumPy and POT: the definition, with dense matrices and one exact solve for each exchange
that is tried.

Costs. D holds the Euclidean distances of n training and V validation items, divided by the largest; with
p_s = lam * g_s / max(g), C_sv = D_sv - p_s, then shifted and scaled so that its smallest entry is 0 and its
largest 1 (all 0 if they are equal). The score of a subset S is the cost of the optimal transport between
the uniform distributions on S and on the validation items: the lower, the better S stands for them.

Stage 1, cover. Greedy k-medoid: each pick lowers sum_v min_{s in S} C_sv the most. The cover goes on until k picks
serve at least one validation item each, and picks that serve none are dropped. If at most k training items
are nearest to any validation item, the cover stops at k picks and keeps them all; likewise if it becomes
complete (every validation item is served at its smallest cost) although fewer than k picks serve.

Stage 2, exchanges. With optimal dual variables u of S and f_v = min_{s in S} (C_sv - u_s), the score is
sum(u) / k + mean(f). Removing i leaves the dual feasible, with f_v = min_{s in S, s != i} (C_sv - u_s). Adding
o with the dual variable y gives the lower bound

    (sum_{s in S, s != i} u_s + y) / k + mean_v min(f_v, C_ov - y)

of the new score. The bound is concave in y with slope 1/k - #{v: C_ov - f_v < y} / V, so it is greatest at the R-th
smallest of C_ov - f_v with R = ceil(V / k).

Source: Mei, Chen, Yu, Liang and Yang, "GORACS: Group-level Optimal Transport-guided Coreset Selection for
LLM-based Recommender Systems", KDD 2025. The bound is derived here; what the published code does in its place is
`published_exchange`, for comparison.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from flashcoreset.methods.goracs.exchanges import IMPROVEMENT
from flashcoreset.pairwise.reference import pairwise


def costs(train: np.ndarray, valid: np.ndarray, grad_norms: np.ndarray, lam: float) -> np.ndarray:
    """The costs C [n, V] float64 of features [n, d] and [V, d] and norms [n]."""
    x, y = (torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (train, valid))
    c = pairwise(x, y, metric="euclidean").numpy()
    c /= c.max() or 1.0
    if lam:
        c -= (lam * grad_norms / grad_norms.max())[:, None]
    c -= c.min()
    return c / (c.max() or 1.0)


def greedy(c: np.ndarray, steps: int) -> list[int]:
    """The first `steps` picks of the greedy k-medoid."""
    best = np.ones(c.shape[1])  # no cost is larger: the first pick has the least sum of costs
    picks: list[int] = []
    while len(picks) < steps:
        gains = np.maximum(best - c, 0).sum(axis=1)
        gains[picks] = -1
        picks.append(int(gains.argmax()))
        best = np.minimum(best, c[picks[-1]])
    return picks


def cover(c: np.ndarray, k: int) -> list[int]:
    """Stage 1: the `k` picks that are kept, in the order in which they were made."""
    n = len(c)
    picks = greedy(c, n)
    if len(np.unique(c.argmin(axis=0))) <= k:
        return picks[:k]
    for made in range(k, n + 1):
        # Among equal costs the earlier pick counts.
        serving = np.unique(c[picks[:made]].argmin(axis=0))
        if len(serving) == k:
            return [picks[place] for place in serving]
    return picks[:k]


def score(c: np.ndarray) -> tuple[float, np.ndarray]:
    """The transport cost between the rows and the columns of `c` [k, V], and dual variables [k] of the rows."""
    import ot

    k, clients = c.shape
    a, b = np.full(k, 1 / k), np.full(clients, 1 / clients)
    plan, log = ot.emd(a, b, c, numItermax=10_000_000, log=True, center_dual=False)
    return float((plan * c).sum()), log["u"]


def rest(reduced: np.ndarray, place: int) -> np.ndarray:
    """The values f [V] without the member at `place`, from C - u [k, V] of all members."""
    if len(reduced) == 1:  # any f will do, and the bound is then the score itself
        return np.zeros(reduced.shape[1])
    return np.delete(reduced, place, axis=0).min(axis=0)


def bound(c: np.ndarray, subset: list[int], u: np.ndarray, place: int, added: int) -> float:
    """A lower bound of the score of `subset`, rows of `c` [n, V] with the dual variables `u`, after its member at
    `place` has given way to `added`."""
    k, clients = len(subset), c.shape[1]
    f = rest(c[subset] - u[:, None], place)
    y = np.sort(c[added] - f)[-(-clients // k) - 1]
    return float((np.delete(u, place).sum() + y) / k + np.minimum(f, c[added] - y).mean())


def candidates(c: np.ndarray, subset: list[int], u: np.ndarray, count: int) -> list[tuple[float, int, int]]:
    """The tuples (bound, place of the removed, added) of the pairs of `count` removals and `count` additions, lowest bound
    first.

    The removals are those that alone raise the bound least, the additions those that alone lower it most.
    """
    k, clients = len(subset), c.shape[1]
    reduced = c[subset] - u[:, None]
    f = reduced.min(axis=0)
    loss = [(rest(reduced, place) - f).mean() - u[place] / k for place in range(k)]
    others = np.setdiff1d(np.arange(len(c)), subset)
    d = c[others] - f
    y = np.sort(d, axis=1)[:, -(-clients // k) - 1]
    gain = y / k - np.maximum(y[:, None] - d, 0).mean(axis=1)
    removals = np.argsort(loss, kind="stable")[:count].tolist()
    additions = others[np.argsort(gain, kind="stable")[:count]].tolist()
    return sorted((bound(c, subset, u, i, o), i, o) for i in removals for o in additions)


def exchange(
    c: np.ndarray, subset: list[int], max_exchanges: int, n_candidates: int
) -> tuple[list[int], list[float], int]:
    """Stage 2: the subset, its score at the beginning and after each exchange, and the number of exact solves."""
    subset = list(subset)
    value, u = score(c[subset])
    scores, solves = [value], 1
    improves = True
    while improves and len(scores) <= max_exchanges:
        improves = False
        for lowest, place, added in candidates(c, subset, u, n_candidates):
            if lowest >= scores[-1] - IMPROVEMENT:
                break
            trial = [*subset[:place], added, *subset[place + 1 :]]
            value, trial_u = score(c[trial])
            solves += 1
            if value < scores[-1] - IMPROVEMENT:
                subset, u, improves = trial, trial_u, True
                scores.append(value)
                break
    return subset, scores, solves


def published_estimates(c: np.ndarray, subset: list[int], u: np.ndarray) -> np.ndarray:
    """The published code's estimate [n] for every item, member or not: what its row of `c` [n, V] adds to the dual value.

    It stands beside f_v = min_s (C_sv - u_s) of all members, also for the removal of one of them, and its dual variable is the
    R-th largest of C_ev - f_v.
    """
    k = len(subset)
    share = -(-c.shape[1] // k)
    d = c - (c[subset] - u[:, None]).min(axis=0)
    y = np.sort(d, axis=1)[:, -share]
    return y / k + np.minimum(d - y[:, None], 0).mean(axis=1)


def published_exchange(
    c: np.ndarray, subset: list[int], max_exchanges: int, n_candidates: int
) -> tuple[list[int], list[float], int]:
    """The published stage 2, returned as by `exchange`.

    The candidates are the members of the highest estimates and the other items of the lowest. Every removal in the order of rising
    estimates is tried with every addition in the order of rising estimates, one exact solve each, and the first pair that
    lowers the score is made; the addition then stands last.
    """
    subset = list(subset)
    value, u = score(c[subset])
    scores, solves = [value], 1
    while len(scores) <= max_exchanges:
        estimates = published_estimates(c, subset, u)
        others = np.setdiff1d(np.arange(len(c)), subset)
        members = np.array(subset)
        removals = members[np.argsort(estimates[members], kind="stable")][-n_candidates:].tolist()
        additions = others[np.argsort(estimates[others], kind="stable")][:n_candidates].tolist()
        for removed, added in itertools.product(removals, additions):
            trial = [*(item for item in subset if item != removed), added]
            value, trial_u = score(c[trial])
            solves += 1
            if value < scores[-1]:
                subset, u = trial, trial_u
                scores.append(value)
                break
        else:
            break
    return subset, scores, solves
