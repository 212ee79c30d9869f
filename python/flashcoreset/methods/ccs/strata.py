"""Samples drawn from strata of scores, and the samples of extreme scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def budgets(sizes: np.ndarray, k: int) -> np.ndarray:
    """The picks [n_strata] int64 of each stratum, k in all, for k <= the sum of the sizes [n_strata]. Strata that are smaller than an
    equal share give all their samples; the other strata share what is left."""
    counts = np.zeros(len(sizes), dtype=np.int64)
    order = np.argsort(sizes, kind="stable")
    for place, stratum in enumerate(order):
        counts[stratum] = min(int(sizes[stratum]), (k - int(counts.sum())) // (len(order) - place))
    return counts


def random_keys(seed: int, n: int) -> np.ndarray:
    """Random keys [n] uint64: for one seed, sample i always has the same key."""
    return np.random.Philox(key=seed).random_raw(n)


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """A mask [n] bool of the `count` lowest of the values [n], the lower index first among equals."""
    taken = np.zeros(len(values), dtype=bool)
    if count == 0:
        return taken
    last = np.partition(values, count - 1)[count - 1]
    np.less(values, last, out=taken)
    equal = np.flatnonzero(values == last)
    taken[equal[: count - np.count_nonzero(taken)]] = True
    return taken


@dataclass(frozen=True)
class Strata:
    """Strata of equal width.

    Attributes:
        edges: [n_strata + 1] the boundaries of the strata.
        sizes: [n_strata] int64.
        members: [n] the samples, stratum by stratum, ascending.
    """

    edges: np.ndarray
    sizes: np.ndarray
    members: np.ndarray


def cut(scores: np.ndarray, members: np.ndarray | None, n_strata: int) -> Strata:
    """Cuts the range of `scores` [n] float64 into strata, of all samples or the `members` [m], ascending."""
    values = scores if members is None else scores[members]
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):  # rare, so that the usual case needs no copy
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    # (high - low) overflows if the two are far apart: then everything is halved.
    scale = 1.0 if math.isfinite(high - low) else 0.5
    small = np.uint8 if n_strata <= 256 else np.uint16 if n_strata <= 65_536 else np.int64
    if low == high:
        place = np.full(values.shape, n_strata - 1, dtype=small)
        place[values < low] = 0
    else:
        position = values * scale - low * scale
        position /= high * scale - low * scale
        position *= n_strata
        np.clip(position, 0, n_strata - 1, out=position)
        place = position.astype(small)
    # A stable sort of small integers is a counting sort.
    order = np.argsort(place, kind="stable")
    sizes = np.bincount(place, minlength=n_strata)
    edges = (
        np.linspace(low, high, n_strata + 1)
        if scale == 1
        else 2 * np.linspace(low / 2, high / 2, n_strata + 1)
    )
    return Strata(edges, sizes, order if members is None else members[order])


def draw(strata: Strata, k: int, keys: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """k samples, stratum by stratum, ascending, and how many of them each stratum has."""
    counts = budgets(strata.sizes, k).tolist()
    picks = []
    for members, count in zip(np.split(strata.members, strata.sizes.cumsum()[:-1]), counts, strict=True):
        whole = count == len(members)
        picks.append(members if whole else members[lowest(keys[members], count)])
    return np.concatenate(picks), counts
