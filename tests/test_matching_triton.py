"""The Triton kernels of gradient matching, in Triton's interpreter (on a GPU under `make gpu`), against the definition."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE
from test_matching import (
    BETAS,
    EPS,
    SIZES,
    check_all_dimensions,
    check_another_direction,
    check_bad_values,
    check_cancellation,
    check_close_calls,
    check_directions,
    check_kernels,
    check_large,
    check_low_rank,
    check_overflow,
    check_steps,
    check_ties,
    check_zeroth_order,
    normal,
)

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.kernels import triton as kernels
from flashcoreset.reference.matching import Rule
from flashcoreset.triton_kernels import matching as launchers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("step", [None, 9])
def test_equal_the_reference(size: tuple[int, int, int], step: int | None, dtype: torch.dtype) -> None:
    check_kernels("triton", DEVICE, size, step, dtype)


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank_gradients_equal_their_dense_form(q: int, dtype: torch.dtype) -> None:
    check_low_rank("triton", DEVICE, q, dtype, 5_001)


def test_ties_go_to_the_lower_dimension() -> None:
    check_ties("triton", DEVICE)


def test_close_calls_of_float32_are_decided_in_float64() -> None:
    check_close_calls("triton", DEVICE)


def test_squares_beyond_float32_pass_the_sieve() -> None:
    check_large("triton", DEVICE)


def test_cancelled_sums_pass_the_sieve() -> None:
    check_cancellation("triton", DEVICE)


@pytest.mark.parametrize("metric", ["l1", "cosine"])
def test_without_top_all_dimensions_count(metric: str) -> None:
    check_all_dimensions("triton", DEVICE, metric, True)


def test_another_direction_makes_the_history_dense() -> None:
    check_another_direction("triton", DEVICE)


def test_directions_equal_numpys() -> None:
    check_directions("triton", DEVICE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_named(bad: float) -> None:
    check_bad_values("triton", DEVICE, bad)


def test_squares_that_overflow_are_an_error() -> None:
    check_overflow("triton", DEVICE)


@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_steps_equal_the_dense_restatement(kind: str) -> None:
    check_steps("triton", DEVICE, kind, torch.float32, 2)


def test_chunks_and_layout_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    numel = 5_003
    g = normal(20, numel, dtype=torch.float32).to(DEVICE)
    m = normal(numel, seed=1, dtype=torch.float32).to(DEVICE)
    v = normal(numel, seed=2, dtype=torch.float32).square().to(DEVICE)
    member, offset = torch.arange(20, device=DEVICE).flip(0), torch.tensor([0, 7, 20], device=DEVICE)
    rule = Rule.adam(4, BETAS, EPS)

    def results(g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        return [
            *kernels.top_updates(g, m, v, rule, member, offset, 50),
            *kernels.update_history(g, m, v, BETAS, member),
        ]

    expected = results(g, m, v)
    wide = torch.cat([g, g], 1)[:, :numel]
    twice = torch.stack([m, v], 1)
    found = [results(g.T.contiguous().T, m, v), results(wide, twice[:, 0], twice[:, 1])]
    monkeypatch.setattr(launchers, "_FIRST_CHUNK", 1)
    monkeypatch.setattr(launchers, "_CHUNK", 3_000)
    monkeypatch.setattr(launchers, "_PRODUCTS", 1)
    assert len(list(launchers.chunks(numel, 2, 50))) == 8
    found.append(results(g, m, v))
    for other in found:
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


def test_few_dimensions_pass_the_sieve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random data top ln(D / top) after the first chunk."""
    passed = []
    weigh = launchers.weigh_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(**arguments: Any) -> None:
                weigh[grid](**arguments)
                if arguments["SIEVED"]:
                    passed.append(arguments["found"].tolist())

            return launch

    monkeypatch.setattr(launchers, "weigh_kernel", Watched())
    numel, top = 20_000, 100
    g = normal(8, numel, dtype=torch.float32).to(DEVICE)
    m, v = torch.zeros(numel, device=DEVICE), torch.ones(numel, device=DEVICE)
    member, offset = torch.arange(8, device=DEVICE), torch.tensor([0, 8], device=DEVICE)
    kernels.top_updates(g, m, v, Rule.adam(9, BETAS, EPS), member, offset, top)
    assert len(passed) == 2  # chunks of 8,192 dimensions and of what is left
    assert 50 < sum(count for (count,) in passed) < 400


def test_zeroth_order_gradients() -> None:
    """The parameters move along the directions that come back, and these are matched."""
    check_zeroth_order("triton", DEVICE)
