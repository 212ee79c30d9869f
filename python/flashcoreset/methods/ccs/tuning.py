"""The search for the best cut-off of CCS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_number
from flashcoreset.methods.ccs import ccs, check_ratio, group_sizes

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def tune_ccs(
    scores: Any,
    k: int,
    evaluate: Callable[[Tensor], float],
    mislabel_ratios: Iterable[float] = GRID,
    *,
    mislabel_scores: Any = None,
    n_strata: int = 50,
    strata: str = "width",
    groups: Any = None,
    seed: int = 0,
    progress: Report | bool | None = None,
) -> Coreset:
    """The coreset of `ccs` with the cut-off that is best for a task: `ccs` and `evaluate` run once per ratio.

    The published experiments choose the cut-off so, in steps of 10 % of the samples, for each pruning rate and score. `evaluate`
    should measure on data that no coreset is drawn from, and not on the data of the final test.

    Args:
        scores: as for `ccs`.
        k: the number of samples to take, as for `ccs`.
        evaluate: called with the `indices` of each coreset; returns a number, the higher the better: usually the validation
            accuracy of a model that was trained on these samples.
        mislabel_ratios: the shares to try, each in [0, 1); those that leave fewer than k samples are passed over.
        mislabel_scores: as for `ccs`.
        n_strata: as for `ccs`.
        strata: as for `ccs`.
        groups: as for `ccs`.
        seed: as for `ccs`; the same for all ratios.
        progress: None, True for a bar, or a callable(done, total) that gets the ratios tried and those there are.

    Returns:
        Coreset: that of the ratio with the highest value, the smallest ratio of equals. Its `info` also has "tried": a list of
        (ratio, value) in the order of the calls, and "skipped", the ratios that were passed over.

    Raises:
        TypeError: for arguments of a wrong type, and if `evaluate` returns no number.
        ValueError: as `ccs`, for no ratios or one out of range, if all ratios leave fewer than k samples, and if `evaluate`
            returns NaN or infinity.

    Source: Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high pruning rates", ICLR 2023.

    Example:
        >>> import torch, flashcoreset as fc
        >>> aum = torch.arange(100.0)
        >>> wrong = aum < 15  # labels
        >>> evaluate = lambda indices: 1 - float(wrong[indices].float().mean())
        >>> coreset = fc.tune_ccs(aum, 20, evaluate, (0, 0.1, 0.2), mislabel_scores=aum)
        >>> coreset.info["mislabel_ratio"], coreset.info["tried"][-1]
        (0.2, (0.2, 1.0))
    """
    check_progress(progress)
    if not callable(evaluate):
        raise TypeError(
            f"evaluate must be a callable(indices) -> float, got {evaluate!r} of type {type(evaluate).__name__}"
        )
    if isinstance(mislabel_ratios, (str, bytes)) or not isinstance(mislabel_ratios, Iterable):
        raise TypeError(f"mislabel_ratios must be numbers, got {mislabel_ratios!r}")
    ratios = sorted({check_ratio(ratio, "mislabel_ratios") for ratio in mislabel_ratios})
    if not ratios:
        raise ValueError("mislabel_ratios must have at least 1 entry, got none")
    options: dict[str, Any] = {
        "mislabel_scores": mislabel_scores, "n_strata": n_strata, "strata": strata, "groups": groups, "seed": seed,
    }  # fmt: skip
    # With a ratio of 0 every argument is checked, before `evaluate` has taken its time.
    ccs(scores, k, mislabel_ratio=0, **options)
    sizes = group_sizes(scores, groups)
    skipped = [ratio for ratio in ratios if sum(size - math.floor(ratio * size) for size in sizes) < k]
    ratios = ratios[: len(ratios) - len(skipped)]
    if not ratios:
        raise ValueError(
            f"mislabel_ratios must have one that leaves {k} samples, got {skipped[0]} as the least"
        )
    coresets = [ccs(scores, k, mislabel_ratio=ratio, **options) for ratio in ratios]
    best, tried = coresets[0], list[tuple[float, float]]()
    with Progress(progress, len(ratios), "tune_ccs") as bar:
        for ratio, coreset in zip(ratios, coresets, strict=True):
            value = as_number(evaluate(coreset.indices), "what evaluate returns")
            if tried and value > max(old for _, old in tried):
                best = coreset
            tried.append((ratio, value))
            bar.update(len(tried))
    return Coreset(best.indices, best.weights, {**best.info, "tried": tried, "skipped": skipped})
