"""CCS: samples of all difficulties, and the plain choice by score beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.errors import InputWarning, warn_caller
from flashcoreset._core.labels import Labels, as_labels
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_dense, as_integer, as_number, as_vector, compute_dtype, one_of
from flashcoreset.methods.ccs.cutoff import published_ratio
from flashcoreset.methods.ccs.strata import KINDS, Strata, cut, draw, filled_share, lowest, random_keys

_MOST_STRATA = 2**24


def ccs(
    scores: Any,
    k: int,
    *,
    mislabel_scores: Any = None,
    mislabel_ratio: float | None = None,
    n_strata: int = 50,
    strata: str = "width",
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

    With n_strata=1 the choice is random after the same cut-off: the control that says what the strata add.

    Args:
        scores: [n] real numbers that say how hard each sample is, of either direction: a tensor, an array or a list; or
            the dict that `TrainingDynamics.scores` returns, from which "aum" is taken.
        k: the number of samples to take, 1 <= k <= n less those dropped.
        mislabel_scores: [n] real numbers, low for labels that are probably wrong, as the area under the margin is. None:
            the "aum" of `scores`, if that is such a dict.
        mislabel_ratio: the share to drop, in [0, 1). None: as in the published experiments, which choose it by the pruning
            rate 1 - k/n and by the area under the margin: 0.3 at a rate of 90 %, 0.2 at 80 %, between and below these on the
            line through both (0 up to 60 %), above them 0.3; without mislabel scores 0, with an `InputWarning` where
            more was published. `tune_ccs` finds the value that is best for a task.
        n_strata: the number of strata, 1 to 2^24.
        strata: what all strata have in common. "width": an equal share of the range, as published. "log": an equal share
            of the range of the scores' logarithms, for scores >= 0 that differ by orders of magnitude (0 belongs to the first
            stratum). "quantile": an equal number of samples, but that equal scores stay together. Where most strata
            of equal width are empty, an `InputWarning` says so.
        groups: [n] labels, integers, strings or other values that can be sorted, or None. All steps above are done inside each group, whose budget is proportional
            to its samples after dropping, by `allocate_budgets`.
        seed: 0 <= seed < 2^64. A sample's random number depends on the seed and its index alone.

    Returns:
        Coreset: `indices` stratum by stratum from low scores to high ones, ascending in each (with `groups`, group by
        group in label order), on the device of the scores; `weights` all 1; and `info`: "dropped" (how many),
        "mislabel_ratio" and "mislabel_ratio_from" ("argument", "published", "interpolated" or, without mislabel
        scores, "none"), "edges" ([n_strata + 1] boundaries of the strata), "sizes" and "counts" ([n_strata] samples that each
        stratum has, and that were taken from it). With `groups`, "groups" holds these entries for each label that has samples,
        and "dropped" is the sum.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN, options out of range, k larger than what remains, a `mislabel_ratio` > 0
            without mislabel scores, negative scores with strata="log", and a dict without "aum".

    Source: Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high pruning rates", ICLR 2023,
    algorithm 1. See docs/ccs.md for what its code does otherwise.

    Example:
        >>> import torch, flashcoreset as fc
        >>> scores = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 5.0, 9.9, 10.0])
        >>> fc.ccs(scores, 4, n_strata=3).indices  # two of the five low ones, the middle one, a high one
        tensor([0, 2, 5, 6])
    """
    k = _at_least_one(k, "k")
    n_strata = _strata(n_strata)
    one_of(strata, "strata", KINDS)
    given = mislabel_ratio is not None
    ratio = check_ratio(mislabel_ratio, "mislabel_ratio") if given else 0.0
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
    if strata == "log" and (values < 0).any():
        place = int((values < 0).argmax())
        raise ValueError(
            f"scores must be >= 0 with strata='log', got {values[place]} at position {place}; pass strata='quantile'"
        )
    origin = "argument"
    if not given:
        ratio, origin = published_ratio(n, k)
        if suspects is None:
            if ratio >= 0.1 and n_strata > 1:
                warn_of_no_cut(n, k, ratio)
            ratio, origin = 0.0, "none"

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
    emptiest: tuple[float, Strata, list[int]] | None = None
    for members, count in zip(kept, counts, strict=True):
        parts = cut(values, members, n_strata, strata)
        chosen, taken = draw(parts, count, keys)
        picks.append(chosen)
        infos.append({"edges": parts.edges.tolist(), "sizes": parts.sizes.tolist(), "counts": taken})
        filled = filled_share(parts.sizes)
        if emptiest is None or filled < emptiest[0]:
            emptiest = filled, parts, taken
    assert emptiest is not None
    if strata != "quantile" and emptiest[0] < 0.5:
        warn_of_empty(*emptiest[1:], strata)
    info: dict[str, Any] = {"dropped": dropped, "mislabel_ratio": ratio, "mislabel_ratio_from": origin}
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
        groups: [n] labels as for `ccs`, or None: the same inside each group, with proportional budgets
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
    thresholds: dict[Any, float] = {}
    for (label, rows), count in zip(members.items(), counts, strict=True):
        of = -values[rows] if largest else values[rows]
        taken = np.flatnonzero(lowest(of, count))
        chosen = rows[taken[np.argsort(of[taken], kind="stable")]]
        picks.append(chosen)
        if count:
            thresholds[label] = float(values[chosen[-1]])
    return _coreset(picks, device, dtype, {"threshold": thresholds[None] if labels is None else thresholds})


def warn_of_no_cut(n: int, k: int, ratio: float) -> None:
    warn_caller(
        f"where {k} of {n} samples are kept, the published experiments first drop the {100 * ratio:.0f} % whose labels are most "
        "probably wrong, but there are no mislabel_scores to find them by, and the hardest samples are kept; pass "
        "mislabel_scores= (the area under the margin), or mislabel_ratio=0 if that is wanted",
        InputWarning,
    )


def warn_of_empty(parts: Strata, taken: list[int], kind: str) -> None:
    largest = int(parts.sizes.argmax())
    share, picked = parts.sizes[largest] / parts.sizes.sum(), taken[largest] / max(1, sum(taken))
    other = (
        "strata='quantile'" if kind == "log" or parts.edges[0] < 0 else "strata='quantile' or strata='log'"
    )
    warn_caller(
        f"{int((parts.sizes == 0).sum())} of {len(parts.sizes)} strata are empty: one stratum holds {100 * share:.0f} % of the "
        f"samples and gives {100 * picked:.0f} % of the picks; pass {other}, fewer n_strata, or scores without outliers",
        InputWarning,
    )


def check_ratio(value: Any, name: str) -> float:
    """`value` as a share in [0, 1)."""
    ratio = as_number(value, name)
    if not 0 <= ratio < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return ratio


def group_sizes(scores: Any, groups: Any) -> list[int]:
    """How many samples each group has, in label order."""
    n = len(_values(scores["aum"] if isinstance(scores, dict) else scores, "scores")[0])
    labels = _labels(groups, n)
    return [n] if labels is None else [len(members) for members in _members(labels).values()]


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


def _labels(groups: Any, n: int) -> Labels | None:
    if groups is None:
        return None
    labels = groups.cpu() if isinstance(groups, Tensor) else groups
    return as_labels(labels, "groups", torch.device("cpu"), n)


def _members(labels: Labels) -> dict[Any, np.ndarray]:
    """The samples of each group, ascending, in label order."""
    codes = labels.codes.numpy()
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    return labels.named(dict(zip(present.tolist(), np.split(order, starts[1:]), strict=True)))


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
    mislabel_ratio: float | None = None,
    n_strata: int = 50,
    strata: str = "width",
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
    one_of(strata, "strata", KINDS)
    ratio = published_ratio(n, k)[0] if mislabel_ratio is None else mislabel_ratio
    dropping = mislabel_scores is not None and ratio > 0
    # In float64: the scores, and the scores for dropping.
    values = 8 * n * ((dtype.itemsize < 8) + (dropping and dtype.itemsize < 8))
    members = 8 * n * ((groups is not None) * 2 + dropping)  # the order of labels, and the samples left
    # The random numbers; strata: positions and members; draws: the numbers of a stratum, and which are taken.
    drawing = 8 * n + 3 * 8 * n + 2 * n
    # The sorted scores and their places, or the logarithms.
    drawing += {"width": 0, "quantile": 2 * 8 * n, "log": 2 * 8 * n}[strata]
    return values + members + drawing + 400 * n_strata + 20 * k
