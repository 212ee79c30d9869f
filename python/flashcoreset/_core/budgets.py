"""The division of picks among groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.philox import uniforms
from flashcoreset._core.tensor import as_int64, as_integer, as_vector, one_of

RULES = ("proportional", "balanced", "published_balanced")


def allocate_budgets(sizes: Any, k: int, rule: str = "proportional", *, seed: int = 0) -> Tensor:
    """Divides `k` picks among groups: whole numbers that sum to `k`, none above its group's size.

    Args:
        sizes: [G] group sizes, integers >= 0 (tensor, array or list).
        k: picks to divide, 0 <= k <= the sum of the sizes.
        rule: "proportional" gives each group size * k // total; then, with the groups sorted once by that
            number (ties: the lower label first), each gets one more in that order, cyclically, skipping full
            groups, until k is reached. "balanced" gives each group as nearly the same number as the sizes
            allow, and the rest goes to the lower labels first. "published_balanced", which CoLM's published code calls balanced, gives
            each group its exact share size * k / total rounded down or up; a random order, which `seed` makes, says which shares
            are rounded up. It favours small groups less than the other rules do.
        seed: a 64-bit integer, for "published_balanced".

    Returns:
        [G] int64, on the device of `sizes`.

    Raises:
        TypeError: if `sizes` are not integers or `k` is not an int.
        ValueError: if a size is negative, `k` is out of range or the rule is unknown.

    Source: the proportional rule and the published balanced one are CoLM's (Nguyen, Yang, Anand, Yang and Mirzasoleiman,
    "Mini-batch coresets for memory-efficient language model training on data mixtures", ICLR 2025, and its code).

    Example:
        >>> import flashcoreset as fc
        >>> fc.allocate_budgets([17, 12, 8], 17)
        tensor([7, 6, 4])
        >>> fc.allocate_budgets([17, 2, 8], 17, rule="balanced")
        tensor([8, 2, 7])
        >>> fc.allocate_budgets([17, 2, 8], 17, rule="published_balanced")
        tensor([11, 1, 5])
    """
    device = sizes.device if isinstance(sizes, Tensor) else torch.device("cpu")
    vector = as_vector(sizes, "sizes", device, integers=True)
    k = as_integer(k, "k")
    one_of(rule, "rule", RULES)
    seed = as_int64(seed, "seed")
    counts = vector.tolist()
    if any(size < 0 for size in counts):
        raise ValueError(f"sizes must be >= 0, got {counts}")
    if not 0 <= k <= sum(counts):
        raise ValueError(f"k must be between 0 and {sum(counts)}, the sum of the sizes, got {k}")
    if rule == "published_balanced":
        budgets = _rounded(counts, k, seed)
    else:
        budgets = _proportional(counts, k) if rule == "proportional" else _balanced(counts, k)
    return torch.tensor(budgets, dtype=torch.int64, device=device)


def _proportional(sizes: list[int], k: int) -> list[int]:
    total = sum(sizes)
    budgets = [size * k // total if total else 0 for size in sizes]
    order = sorted(range(len(sizes)), key=lambda group: budgets[group])
    left = k - sum(budgets)
    while left:
        for group in order:
            if left and budgets[group] < sizes[group]:
                budgets[group] += 1
                left -= 1
    return budgets


def _balanced(sizes: list[int], k: int) -> list[int]:
    budgets = [0] * len(sizes)
    left = k
    while left:
        hungry = [group for group, size in enumerate(sizes) if budgets[group] < size]
        if left < len(hungry):
            for group in hungry[:left]:
                budgets[group] += 1
            break
        share = min(left // len(hungry), min(sizes[group] - budgets[group] for group in hungry))
        for group in hungry:
            budgets[group] += share
        left -= share * len(hungry)
    return budgets


def _rounded(sizes: list[int], k: int, seed: int) -> list[int]:
    total = sum(sizes)
    budgets = [size * k // total if total else 0 for size in sizes]
    # What is missing is the sum of the fractions, so fewer than there are groups with one.
    open_ = [group for group, size in enumerate(sizes) if total and size * k % total]
    order = uniforms(seed & (2**64 - 1), 0, len(open_)).argsort(kind="stable").tolist()
    for place in order[: k - sum(budgets)]:
        budgets[open_[place]] += 1
    return budgets
