"""CCS: samples of all difficulties, and the plain choice by score beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_dense, as_integer, as_number, as_vector, compute_dtype
from flashcoreset.methods.ccs.strata import cut, draw, lowest, random_keys

_MOST_STRATA = 2**24


def ccs(
    scores: Any,
    k: int,
    *,
    mislabel_scores: Any = None,
    mislabel_ratio: float = 0.0,
    n_strata: int = 50,
    groups: Any = None,
    seed: int = 0,
) -> Coreset:
    """Coverage-centric coreset selection: k samples spread over the whole range of their scores.

    The floor(mislabel_ratio * n) samples of the lowest mislabel scores, probably labelled wrongly, are dropped. The
    range of the remaining scores is cut into `n_strata` strata of equal width (the maximum belongs to the last
    one). The strata, by ascending size, get min(size, budget left // strata left) samples, which are drawn
    uniformly without replacement. Exactly k samples are returned.

    If all scores are equal, they are in one stratum and the choice is uniform, as with n_strata=1. Infinite scores
    (forgetting has them) belong to the first and the last stratum, but do not widen the range.

    Args:
        scores: [n] real numbers that say how hard each sample is, of either direction: a tensor, an array or a list; or
            the dict that `TrainingDynamics.scores` returns, from which "aum" is taken.
        k: the number of samples to take, 1 <= k <= n less those dropped.
        mislabel_scores: [n] real numbers, low for labels that are probably wrong, as the area under the margin is. None:
            the "aum" of `scores`, if that is such a dict.
        mislabel_ratio: the share to drop, in [0, 1).
        n_strata: the number of strata, 1 to 2^24.
        groups: [n] integer labels, or None. All steps above are done inside each group, whose budget is proportional
            to its samples after dropping, by `allocate_budgets`.
        seed: 0 <= seed < 2^64. A sample's random number depends on the seed and its index alone.

    Returns:
        Coreset: `indices` stratum by stratum from low scores to high ones, ascending in each (with `groups`, group by
        group in label order), on the device of the scores; `weights` all 1; and `info`: "dropped" (how many),
        "edges" ([n_strata + 1] boundaries of the strata), "sizes" and "counts" ([n_strata] samples that each
        stratum has, and that were taken from it). With `groups`, "groups" holds these entries for each label that has samples,
        and "dropped" is the sum.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN, options out of range, k larger than what remains, a `mislabel_ratio` > 0
            without mislabel scores, and a dict without "aum".

    Source: Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high pruning rates", ICLR 2023,
    algorithm 1. The published code may return fewer than k, and loses the highest score if that is below 0.

    Example:
        >>> import torch, flashcoreset as fc
        >>> scores = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 5.0, 9.9, 10.0])
        >>> fc.ccs(scores, 4, n_strata=3).indices  # two of the five low ones, the middle one, a high one
        tensor([0, 2, 5, 6])
    """
    k = _at_least_one(k, "k")
    n_strata = _strata(n_strata)
    ratio = as_number(mislabel_ratio, "mislabel_ratio")
    if not 0 <= ratio < 1:
        raise ValueError(f"mislabel_ratio must be in [0, 1), got {mislabel_ratio}")
    seed = as_integer(seed, "seed")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if isinstance(scores, dict):
        if "aum" not in scores:
            raise ValueError(f"scores must have the entry aum, got {', '.join(map(str, scores)) or 'none'}")
        scores = scores["aum"]
        mislabel_scores = scores if mislabel_scores is None else mislabel_scores
    elif ratio > 0 and mislabel_scores is None:
        raise ValueError(f"mislabel_scores must be given with mislabel_ratio={ratio}, got None")
    values, device, dtype = _values(scores, "scores")
    n = len(values)
    suspects = None
    if mislabel_scores is not None:
        suspects, _, _ = _values(mislabel_scores, "mislabel_scores", n)
    labels = _labels(groups, n)
    if k > n:
        raise ValueError(f"k must be <= the {n} samples, got {k}")

    by_label = {} if labels is None else _members(labels)
    kept: list[np.ndarray | None] = [None] if labels is None else list(by_label.values())
    dropped = 0
    if suspects is not None and ratio > 0:
        for place, members in enumerate(kept):
            of = suspects if members is None else suspects[members]
            count = math.floor(ratio * len(of))
            left = np.flatnonzero(~lowest(of, count))
            kept[place] = left if members is None else members[left]
            dropped += count
    if k > n - dropped:
        raise ValueError(
            f"k must be <= the {n - dropped} samples that mislabel_ratio={ratio} leaves of {n}, got {k}"
        )
    sizes = [n if members is None else len(members) for members in kept]
    counts = allocate_budgets(sizes, k).tolist()
    keys = random_keys(seed, n)
    picks, infos = [], []
    for members, count in zip(kept, counts, strict=True):
        strata = cut(values, members, n_strata)
        chosen, taken = draw(strata, count, keys)
        picks.append(chosen)
        infos.append({"edges": strata.edges.tolist(), "sizes": strata.sizes.tolist(), "counts": taken})
    info: dict[str, Any] = {"dropped": dropped}
    if labels is None:
        info |= infos[0]
    else:
        info["groups"] = dict(zip(by_label, infos, strict=True))
    return _coreset(picks, device, dtype, info)


def top_scores(scores: Any, k: int, *, largest: bool = True, groups: Any = None) -> Coreset:
    """The k samples of the highest (or lowest) scores: the plain baseline beside `ccs`.

    Args:
        scores: [n] real numbers; infinite scores are allowed.
        k: the number of samples to take, 1 <= k <= n.
        largest: True takes high scores, False low ones.
        groups: [n] integer labels, or None: the same inside each group, with proportional budgets
            (`allocate_budgets`).

    Returns:
        Coreset: `indices` from the most extreme score on, the lower index first among equals (with `groups`, group by
        group in label order), on the device of the scores; `weights` all 1; and `info`: "threshold", the last
        score that was taken (with `groups`, a dict of thresholds for each label that has picks).

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN and k out of range.

    Source: the baselines of Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high pruning
    rates", ICLR 2023. The random baseline there is `ccs` with n_strata=1.

    Example:
        >>> import torch, flashcoreset as fc
        >>> fc.top_scores(torch.tensor([0.5, 0.9, 0.1, 0.9]), 3).indices
        tensor([1, 3, 0])
    """
    k = _at_least_one(k, "k")
    if not isinstance(largest, (bool, np.bool_)):
        raise TypeError(f"largest must be a bool, got {largest!r} of type {type(largest).__name__}")
    values, device, dtype = _values(scores, "scores")
    n = len(values)
    labels = _labels(groups, n)
    if k > n:
        raise ValueError(f"k must be <= the {n} samples, got {k}")
    members = {None: np.arange(n)} if labels is None else _members(labels)
    counts = allocate_budgets([len(rows) for rows in members.values()], k).tolist()
    picks: list[np.ndarray] = []
    thresholds: dict[int | None, float] = {}
    for (label, rows), count in zip(members.items(), counts, strict=True):
        of = -values[rows] if largest else values[rows]
        taken = np.flatnonzero(lowest(of, count))
        chosen = rows[taken[np.argsort(of[taken], kind="stable")]]
        picks.append(chosen)
        if count:
            thresholds[label] = float(values[chosen[-1]])
    return _coreset(picks, device, dtype, {"threshold": thresholds[None] if labels is None else thresholds})


def _values(value: Any, name: str, length: int | None = None) -> tuple[np.ndarray, torch.device, torch.dtype]:
    """The values [n] float64, checked for NaN; the device that they came from, and the dtype of their weights."""
    device, dtype = torch.device("cpu"), torch.float32
    if not isinstance(value, (list, tuple, range)):
        value = as_dense(value, name)
        device, dtype = value.device, compute_dtype(value.dtype)
    vector = as_vector(value, name, device, integers=False, length=length).cpu().numpy()
    if len(vector) == 0:
        raise ValueError(f"{name} must have at least 1 entry, got shape (0,)")
    bad = np.isnan(vector)
    if bad.any():
        raise ValueError(f"{name} must not be NaN, got NaN at position {int(bad.argmax())}")
    return vector, device, dtype


def _labels(groups: Any, n: int) -> np.ndarray | None:
    if groups is None:
        return None
    labels = groups.cpu() if isinstance(groups, Tensor) else groups
    return as_vector(labels, "groups", torch.device("cpu"), integers=True, length=n).numpy()


def _members(labels: np.ndarray) -> dict[int, np.ndarray]:
    """The samples of each group, ascending, in label order."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    return dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True))


def _coreset(
    picks: list[np.ndarray], device: torch.device, dtype: torch.dtype, info: dict[str, Any]
) -> Coreset:
    indices = torch.from_numpy(np.concatenate(picks)).to(device)
    return Coreset(indices, torch.ones(len(indices), dtype=dtype, device=device), info)


def _strata(value: Any) -> int:
    number = _at_least_one(value, "n_strata")
    if number > _MOST_STRATA:
        raise ValueError(f"n_strata must be <= {_MOST_STRATA}, got {number}")
    return number


def _at_least_one(value: Any, name: str) -> int:
    number = as_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {number}")
    return number


@register_estimate("ccs")
def _estimate(
    scores: Any,
    k: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    mislabel_scores: Any = None,
    mislabel_ratio: float = 0.0,
    n_strata: int = 50,
    groups: Any = None,
    seed: int = 0,
) -> int:
    """The bytes of one call; see `memory_estimate`."""
    dtype = as_dtype(dtype)
    (n,) = as_shape(scores, "scores", 1)
    k, n_strata = _at_least_one(k, "k"), _strata(n_strata)
    if k > n:
        raise ValueError(f"k must be <= the {n} samples, got {k}")
    for name, value in (("mislabel_scores", mislabel_scores), ("groups", groups)):
        if value is not None and (got := as_shape(value, name, 1)) != (n,):
            raise ValueError(f"{name} must have shape [{n}], got {got}")
    dropping = mislabel_scores is not None and mislabel_ratio > 0
    # In float64: the scores, and the scores for dropping.
    values = 8 * n * ((dtype.itemsize < 8) + (dropping and dtype.itemsize < 8))
    members = 8 * n * ((groups is not None) * 2 + dropping)  # the order of labels, and the samples left
    # The random numbers; strata: positions and members; draws: the numbers of a stratum, and which are taken.
    drawing = 8 * n + 3 * 8 * n + 2 * n
    return values + members + drawing + 400 * n_strata + 20 * k
