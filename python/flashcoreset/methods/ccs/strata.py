"""Samples drawn from strata of scores, and the samples of extreme scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

KINDS = ("width", "quantile", "log")


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
    """Samples by the stratum of their scores.

    Attributes:
        edges: [n_strata + 1] the boundaries of the strata.
        sizes: [n_strata] int64.
        members: [n] the samples, stratum by stratum, ascending.
    """

    edges: np.ndarray
    sizes: np.ndarray
    members: np.ndarray


def cut(scores: np.ndarray, members: np.ndarray | None, n_strata: int, kind: str) -> Strata:
    """Cuts the range of `scores` [n] float64 into strata of a kind of `KINDS`, of all samples or the `members` [m], ascending."""
    values = scores if members is None else scores[members]
    small = small_type(n_strata)
    if kind == "quantile":
        place, edges = _by_rank(values, n_strata, small)
    elif kind == "log":
        with np.errstate(divide="ignore"):
            logs = np.log(values)
        place, edges = _by_width(logs, n_strata, small)
        edges = np.exp(edges)
        finite = values[np.isfinite(logs)]
        if len(finite):  # exp and log need not be inverse to the last bit
            edges[0], edges[-1] = finite.min(), finite.max()
    else:
        place, edges = _by_width(values, n_strata, small)
    order = np.argsort(place, kind="stable")
    sizes = np.bincount(place, minlength=n_strata)
    return Strata(edges, sizes, order if members is None else members[order])


def small_type(n_strata: int) -> type:
    """The smallest type for numbers of strata: a stable sort of small integers is a counting sort."""
    return np.uint8 if n_strata <= 256 else np.uint16 if n_strata <= 65_536 else np.int64


def _by_width(values: np.ndarray, n_strata: int, small: type) -> tuple[np.ndarray, np.ndarray]:
    """The stratum of equal width of each value [n], and the edges [n_strata + 1]."""
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):  # rare, so that the usual case needs no copy
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    return by_width(values, low, high, n_strata, small)


def by_width(
    values: np.ndarray, low: float, high: float, n_strata: int, small: type
) -> tuple[np.ndarray, np.ndarray]:
    """The same, where the finite values of all samples lie from `low` to `high`."""
    # (high - low) overflows if the two are far apart: then everything is halved.
    scale = 1.0 if math.isfinite(high - low) else 0.5
    if low == high:
        place: np.ndarray = np.full(values.shape, n_strata - 1, dtype=small)
        place[values < low] = 0
    else:
        position = values * scale - low * scale
        position /= high * scale - low * scale
        position *= n_strata
        np.clip(position, 0, n_strata - 1, out=position)
        place = position.astype(small)
    edges = (
        np.linspace(low, high, n_strata + 1)
        if scale == 1
        else 2 * np.linspace(low / 2, high / 2, n_strata + 1)
    )
    return place, edges


def _by_rank(values: np.ndarray, n_strata: int, small: type) -> tuple[np.ndarray, np.ndarray]:
    """The stratum of equal number of each value [n], and the edges [n_strata + 1], which are values: equal ones stay together."""
    ordered = np.sort(values)
    ranks = np.arange(n_strata) * len(values) // n_strata
    starts = ordered[ranks]
    place: np.ndarray = np.searchsorted(starts[1:], values, side="right").astype(small)
    return place, np.append(starts, ordered[-1])


def filled_share(sizes: np.ndarray) -> float:
    """The share of strata of these sizes that have samples, of those that could have; 1 if one holds all samples."""
    filled = int(np.count_nonzero(sizes))
    return 1.0 if filled <= 1 else filled / min(len(sizes), int(sizes.sum()))


def draw(strata: Strata, k: int, keys: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """k samples, stratum by stratum, ascending, and how many of them each stratum has."""
    counts = budgets(strata.sizes, k).tolist()
    picks = []
    for members, count in zip(np.split(strata.members, strata.sizes.cumsum()[:-1]), counts, strict=True):
        whole = count == len(members)
        picks.append(members if whole else members[lowest(keys[members], count)])
    return np.concatenate(picks), counts
