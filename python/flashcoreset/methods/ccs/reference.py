"""Coverage-centric coreset selection, sample by sample: the definition that `fc.ccs` is tested against.

1. With `mislabel_ratio` beta, the floor(beta * n) samples of the lowest mislabel score are dropped; among equals the
   lower index first.
2. The range [low, high] of the remaining scores is cut into strata of equal width. A score lies in stratum
   floor((score - low) / (high - low) * n_strata); `high` belongs to the last one, and so does every score if
   all are equal. Infinite scores belong to the first and the last stratum, but do not widen the range.
3. The strata, by ascending size (the lower first among equals), get min(size, budget left // strata left) picks.
4. A stratum's picks are its members of the smallest random numbers.

Step 3 spends the whole budget k <= n: if a stratum gets less than its size, the share of every later, larger stratum
is at most one more, which that stratum has.

Source: Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high pruning rates", ICLR 2023,
algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def dropped(mislabel_scores: Sequence[float], ratio: float) -> set[int]:
    """The samples that step 1 drops."""
    n = len(mislabel_scores)
    order = sorted(range(n), key=lambda i: mislabel_scores[i])
    return set(order[: math.floor(ratio * n)])


def stratum(score: float, low: float, high: float, n_strata: int) -> int:
    """Step 2: the stratum of a score; low <= high are finite."""
    if score == -math.inf:
        return 0
    if score == math.inf or low == high:
        return n_strata - 1
    if high - low == math.inf:
        score, low, high = score / 2, low / 2, high / 2
    return min(n_strata - 1, math.floor((score - low) / (high - low) * n_strata))


def budgets(sizes: Sequence[int], k: int) -> list[int]:
    """Step 3: how many picks each stratum gets; k in all, for k <= the sum of the sizes."""
    counts = [0] * len(sizes)
    left = k
    for place, index in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        counts[index] = min(sizes[index], left // (len(sizes) - place))
        left -= counts[index]
    return counts


def ccs(
    scores: Sequence[float],
    k: int,
    mislabel_scores: Sequence[float],
    mislabel_ratio: float,
    n_strata: int,
    keys: Sequence[int],
) -> list[list[int]]:
    """The picks of every stratum, ascending; `keys` are random numbers, one per sample."""
    out = dropped(mislabel_scores, mislabel_ratio)
    left = [i for i in range(len(scores)) if i not in out]
    finite = [scores[i] for i in left if math.isfinite(scores[i])] or [0.0]
    strata: list[list[int]] = [[] for _ in range(n_strata)]
    for i in left:
        strata[stratum(scores[i], min(finite), max(finite), n_strata)].append(i)
    counts = budgets([len(members) for members in strata], k)
    return [
        sorted(sorted(members, key=lambda i: keys[i])[:count])
        for members, count in zip(strata, counts, strict=True)
    ]
