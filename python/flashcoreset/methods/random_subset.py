"""A uniform choice: the control that every method has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcoreset._core.memory import register_estimate
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import at_least_one
from flashcoreset.methods.ccs import _estimate as _estimate_ccs
from flashcoreset.methods.ccs import ccs


def random_subset(
    n: int,
    k: int,
    *,
    groups: Any = None,
    mislabel_scores: Any = None,
    mislabel_ratio: float = 0.0,
    seed: int = 0,
) -> Coreset:
    """Draws k of n samples uniformly, without replacement: the control beside every method.

    With the same seed the picks are those of `ccs` with one stratum, so that the two differ by the strata alone.

    Args:
        n: the number of samples.
        k: the number of samples to take, 1 <= k <= n less those dropped.
        groups: [n] labels as for `ccs`, or None. Each group gets its proportional share (`allocate_budgets`).
        mislabel_scores: [n] real numbers, low for labels that are probably wrong, as the area under the margin is; or None.
        mislabel_ratio: the share of the lowest mislabel scores to drop first, in [0, 1): "random after the same cut-off", the
            control for `ccs` with that ratio.
        seed: 0 <= seed < 2^64. A sample's random number depends on the seed and its index alone.

    Returns:
        Coreset: `indices` ascending (with `groups`, group by group in label order), on the CPU; `weights` all 1; and `info`: "dropped"
        (how many); with `groups` "counts", a dict of label to picks.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, options out of range, k larger than what remains, and a `mislabel_ratio` > 0 without
            mislabel scores.

    Example:
        >>> import flashcoreset as fc
        >>> coreset = fc.random_subset(10, 4, groups=[0] * 5 + [1] * 5)
        >>> len(coreset.indices), coreset.info["counts"]
        (4, {0: 2, 1: 2})
    """
    n = at_least_one(n, "n")
    chosen = ccs(
        np.zeros(n, dtype=np.float32),
        k,
        mislabel_scores=mislabel_scores,
        mislabel_ratio=mislabel_ratio,
        n_strata=1,
        groups=groups,
        seed=seed,
    )
    info: dict[str, Any] = {"dropped": chosen.info["dropped"]}
    if groups is not None:
        info["counts"] = {label: sum(of["counts"]) for label, of in chosen.info["groups"].items()}
    return Coreset(chosen.indices, chosen.weights, info)


@register_estimate("random_subset")
def _estimate(n: Any, k: int = 1, **options: Any) -> int:
    """The bytes of one call; see `memory_estimate`."""
    n = at_least_one(n, "n")
    return 4 * n + _estimate_ccs((n,), k, n_strata=1, **options)
