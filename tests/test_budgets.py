"""allocate_budgets against hand-computed values and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashcoreset as fc


@pytest.mark.parametrize(
    ("sizes", "k", "rule", "expected"),
    [
        ([17, 12, 8], 17, "proportional", [7, 6, 4]),  # 7.8, 5.5, 3.7: one more for the two with the least
        ([17, 12, 8], 37, "proportional", [17, 12, 8]),
        ([17, 12, 8], 0, "proportional", [0, 0, 0]),
        ([1, 1, 1, 97], 3, "proportional", [1, 0, 0, 2]),  # 0, 0, 0, 2: the lowest label of those with 0
        ([5, 0, 5], 5, "proportional", [3, 0, 2]),
        ([0, 0], 0, "proportional", [0, 0]),
        ([10, 10, 10], 10, "balanced", [4, 3, 3]),
        ([1, 10, 2], 9, "balanced", [1, 6, 2]),
        ([0, 3, 3], 5, "balanced", [0, 3, 2]),
        ([4], 3, "balanced", [3]),
    ],
)
def test_by_hand(sizes: list[int], k: int, rule: str, expected: list[int]) -> None:
    budgets = fc.allocate_budgets(sizes, k, rule=rule)
    assert budgets.dtype == torch.int64
    assert budgets.tolist() == expected
    assert fc.allocate_budgets(np.array(sizes), k, rule).tolist() == expected
    assert fc.allocate_budgets(torch.tensor(sizes, dtype=torch.int32), k, rule).tolist() == expected


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
    st.floats(0, 1),
    st.sampled_from(["proportional", "balanced"]),
)
def test_sums_to_k_within_the_sizes(sizes: list[int], share: float, rule: str) -> None:
    k = int(share * sum(sizes))
    budgets = fc.allocate_budgets(sizes, k, rule).tolist()
    assert sum(budgets) == k
    assert all(0 <= budget <= size for budget, size in zip(budgets, sizes, strict=True))
    if rule == "proportional":
        assert all(b >= size * k // max(1, sum(sizes)) for b, size in zip(budgets, sizes, strict=True))
    else:
        unfilled = [b for b, size in zip(budgets, sizes, strict=True) if b < size]
        assert not unfilled or max(budgets) <= min(unfilled) + 1


@pytest.mark.parametrize(
    ("sizes", "k", "rule", "error", "words"),
    [
        ([3, -1], 1, "proportional", ValueError, r"sizes .*-1"),
        ([3, 1], 5, "proportional", ValueError, r"k .*4.*got 5"),
        ([3, 1], -1, "proportional", ValueError, r"k .*got -1"),
        ([3, 1], 1.0, "proportional", TypeError, r"k must be an int, got 1.0"),
        ([3.0, 1.0], 1, "proportional", TypeError, r"sizes .*float64"),
        ([[3, 1]], 1, "proportional", ValueError, r"sizes .*\(1, 2\)"),
        ("31", 1, "proportional", TypeError, r"sizes .*str"),
        ([3, 1], 1, "even", ValueError, r"rule 'even'; valid names: proportional, balanced"),
    ],
)
def test_bad_input(sizes: object, k: object, rule: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fc.allocate_budgets(sizes, k, rule)  # type: ignore[arg-type]
