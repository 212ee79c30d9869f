"""What is the CUDA kernels' of Sinkhorn alone: checks of weights on the device."""

from __future__ import annotations

import math

import pytest
from checks.sinkhorn import Case

from flashcoreset.sinkhorn import cuda

pytestmark = pytest.mark.usefixtures("emulated_cuda")


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        ("a", (1, 2), -0.5, "a must be finite and >= 0, got -0.5 at position 2 of problem 1"),
        ("b", (2, 0), math.nan, "b must be finite and >= 0, got NaN at position 0 of problem 2"),
        ("a", (1, slice(None)), 0.0, "a must have a finite sum > 0; its sum is not in problem 1"),
        ("b", (0, 1), 0.9, "a and b must have equal sums .* in problem 0"),
    ],
)
def test_bad_weights(name: str, at: tuple[int | slice, ...], value: float, words: str) -> None:
    case = Case(3, 6, 5)
    getattr(case, name)[at] = value
    with pytest.raises(ValueError, match=words):
        case.solve(cuda, reg=1.0)


def test_progress_is_reported_once_at_the_end() -> None:
    done: list[tuple[int, int]] = []
    cuda.sinkhorn(Case(2, 8, 8).problem(reg=1.0), lambda *at: done.append(at))
    assert done == [(6, 6)]
