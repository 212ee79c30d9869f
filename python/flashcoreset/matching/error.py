"""How near the mean of chosen gradients is to the mean of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.tensor import as_number, as_vector, check_finite
from flashcoreset.matching.problem import Gradients
from flashcoreset.matching.updates import blocks, gram_of_directions


def matching_error(g: Any, indices: Any, weights: Any = None, *, total: float | None = None) -> float:
    """|mean of the chosen gradients - mean of all|^2 / |mean of all|^2: what a choice loses of a batch's gradient.

    0 is a perfect choice. k of B rows drawn at random give (1 / k - 1 / B) (mean of |g|^2 - |mean of all|^2) / |mean of all|^2 in the
    mean, up to a factor B / (B - 1).

    Args:
        g: [B, D] gradients, one row per sample, float16, bfloat16, float32 or float64; `LowRankGradients`, of which only the coefficients
            and the directions' inner products are used; or `OuterProductGradients`, some columns at a time.
        indices: [k] int64, the chosen rows, k >= 1; a row may occur more than once.
        weights: [k] numbers of any sign; the mean of the chosen is then sum_i w_i g_i / `total`. None: all 1.
        total: what the weighted sum is divided by, > 0. None: the sum of the weights. The weights of "omp" stand for a sum over all rows
            and need not sum to B: with total=B the error is that of the loss in which they are used.

    Returns:
        float >= 0, computed in float64; infinite if the mean of all is zero and that of the chosen is not, 0.0 if both are.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, no index, an index out of range, weights whose sum is not positive, NaN and infinity.

    Example:
        >>> import torch, flashcoreset as fc
        >>> g = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> fc.matching_error(g, [2])
        1.0
        >>> fc.matching_error(g, [0, 1, 2])
        0.0
    """
    gradients = Gradients.of(g, "g")
    device = gradients.values.device
    chosen = as_vector(indices, "indices", device, integers=True)
    if not len(chosen):
        raise ValueError("indices must name at least one row, got none")
    bad = (chosen < 0) | (chosen >= gradients.count)
    if bool(bad.any()):
        raise ValueError(
            f"indices must be in [0, {gradients.count - 1}], the rows of g, got {int(chosen[bad][0])}"
        )
    w = torch.ones(len(chosen), dtype=torch.float64, device=device)
    if weights is not None:
        w = as_vector(weights, "weights", device, integers=False, length=len(chosen)).double()
        check_finite(w, "weights")
    divisor = float(w.sum())
    if total is not None:
        divisor = as_number(total, "total")
        if divisor <= 0:
            raise ValueError(f"total must be > 0, got {total}")
    elif divisor <= 0:
        raise ValueError(f"weights must have a positive sum, got {divisor:.6g}")
    check_finite(gradients.values, "g")
    # The two means are these combinations of all rows.
    of_all = torch.full((gradients.count,), 1 / gradients.count, dtype=torch.float64, device=device)
    apart = torch.zeros_like(of_all).index_add_(0, chosen, w / divisor) - of_all
    both = torch.stack([apart, of_all])
    missed, whole = _squared_norms(gradients, both).tolist()
    if whole == 0:
        return float("inf") if missed else 0.0
    return float(missed / whole)


def _squared_norms(g: Gradients, combinations: Tensor) -> Tensor:
    """The squared norms of combinations [n, B] float64 of the gradients, float64."""
    if g.length is not None:
        c = combinations @ g.values.double()
        return ((c @ gram_of_directions(g)) * c).sum(1)
    norms = combinations.new_zeros(len(combinations))
    for begin, end in blocks(g):
        norms += (combinations @ g.columns(begin, end).double()).square().sum(1)
    return norms
