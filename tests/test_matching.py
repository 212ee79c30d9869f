"""fc.match_gradients against a dense restatement of CoLM's matching in float64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from cases import DEVICE
from checks.matching import (
    BETAS,
    CHECKS,
    EPS,
    Check,
    check_all_dimensions,
    check_steps,
    greedy_medoids,
    history,
    normal,
)
from conftest import EVERY_BACKEND
from torch import Tensor

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset.kernels import Gradients, UpdatesProblem
from flashcoreset.matching import updates
from flashcoreset.matching.rule import Rule
from flashcoreset.pursuit import orthogonal_matching_pursuit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_twenty_steps_equal_the_dense_restatement(backend: str, kind: str, dtype: torch.dtype) -> None:
    check_steps(backend, "cpu", kind, dtype, (150, 1_537, 60), {0: 4, 1: 3, 2: 2})


def test_threads_and_layout_change_no_bit() -> None:
    g = normal(50, 40_000, dtype=torch.float32)
    m, v = normal(40_000, seed=1, dtype=torch.float32), normal(40_000, seed=2, dtype=torch.float32).square()
    member, offset = torch.randperm(50, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 21, 50])
    threads = torch.get_num_threads()
    results = []
    try:
        for count, rows in itertools.product(
            (1, 2, 5), (g, g.T.contiguous().T, torch.cat([g, g], 1)[:, :40_000])
        ):
            torch.set_num_threads(count)
            problem = UpdatesProblem(Gradients(rows), history(m, v, 4), member, offset, 500)
            dims, u = kernels.cpu.top_updates(problem)
            results.append((dims, u, *kernels.cpu.update_history(problem.g, problem.history, member)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("metric", ["l1", "euclidean", "sqeuclidean", "cosine", "dot"])
@pytest.mark.parametrize("normalize", [False, True])
def test_without_top_all_dimensions_count(backend: str, metric: str, normalize: bool) -> None:
    check_all_dimensions(backend, "cpu", metric, normalize)


@pytest.mark.parametrize("metric", ["l1", "euclidean", "sqeuclidean"])
@pytest.mark.parametrize("top", [None, 3])
def test_the_farthest_are_in_a_cluster_too(backend: str, metric: str, top: int | None) -> None:
    g = torch.tensor([[0.0, 1, 0], [4, 0, 0], [0, 1, 0], [0, 1, 0]])
    for count in (1, 2):
        found = fc.match_gradients(g[:2], count, metric=metric, top=top, backend=backend)
        assert found.weights.sum() == 2
    found = fc.match_gradients(g, 1, metric=metric, top=top, backend=backend)
    assert (found.indices.tolist(), found.weights.tolist()) == ([0], [4])
    # Equal rows, and zeros.
    for rows in (g[[0, 2, 3, 0]], torch.zeros(4, 3)):
        found = fc.match_gradients(rows, 2, metric=metric, top=top, backend=backend)
        assert found.weights.tolist() == [3, 1]
        assert found.assignment.tolist() == [0, 1, 0, 0]


def test_all_dimensions_in_another_order(backend: str) -> None:
    """`top` = D of directions: the dimensions are a whole range, but not in its order."""
    shared = fc.LowRankGradients(normal(17, 1), seed=-4, numel=6, backend=backend)
    state = fc.AdamState(normal(6, seed=1), normal(6, seed=2).square(), 5)
    found, expected = (
        fc.match_gradients(g, 5, normalize=state, top=6, metric="sqeuclidean", backend=backend)
        for g in (shared, shared.dense())
    )
    assert sorted(found.dims[0].tolist()) == list(range(6)) != found.dims[0].tolist()
    assert torch.equal(found.dims, expected.dims)
    assert torch.equal(found.indices, expected.indices)
    assert torch.allclose(found.gains, expected.gains, rtol=1e-12)


def _left(g: Tensor, found: fc.Selection) -> float:
    return float((found.weights.double() @ g[found.indices].double() - g.double().sum(0)).norm())


@pytest.mark.parametrize("method", ["omp", "frank_wolfe"])
def test_weighted_sums_approach_the_sum_of_all(backend: str, method: str) -> None:
    g = normal(60, 20, dtype=torch.float32)
    distances = []
    for k in (1, 5, 15, 30):
        found = fc.match_gradients(g, k, method=method, backend=backend)
        assert len(found.indices) <= k
        assert len(set(found.indices.tolist())) == len(found.indices)
        assert (found.weights > 0).all()
        assert found.assignment.unique().tolist() == [-1]
        assert not found.gains.any()
        distances.append(_left(g, found))
        assert found.objective == pytest.approx(-distances[-1], rel=1e-3, abs=1e-3)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < (0.05 if method == "omp" else 0.15) * float(g.sum(0).norm())


def test_matching_pursuit_of_each_group(backend: str) -> None:
    g, groups = normal(40, 9), torch.arange(40) % 2
    found = fc.match_gradients(
        g, None, method="omp", groups=groups, budgets=[4, 2], nonnegative=False, ridge=0.5, backend=backend
    )
    for label, count in ((0, 4), (1, 2)):
        rows = (groups == label).nonzero()[:, 0]
        alone = orthogonal_matching_pursuit(
            g[rows], g[rows].sum(0), count, nonnegative=False, ridge=0.5, backend=backend
        )
        own = groups[found.indices] == label
        assert torch.equal(found.indices[own], rows[alone.indices])
        assert torch.allclose(found.weights[own], alone.weights)


def test_caratheodory_is_exact(backend: str) -> None:
    g = normal(60, 5)
    found = fc.match_gradients(g, 6, method="caratheodory", backend=backend)
    assert len(found.indices) <= 6
    assert float(found.weights.sum()) == pytest.approx(60)
    assert _left(g, found) < 1e-9
    with pytest.raises(ValueError, match=r"k, or the budget of a group, must be >= 6.*got 5"):
        fc.match_gradients(g, 5, method="caratheodory", backend=backend)
    shared = fc.LowRankGradients(normal(60, 2), seed=0, numel=4_000, backend=backend)
    found = fc.match_gradients(shared, 3, method="caratheodory", backend=backend)
    rows = shared.dense()
    assert len(found.indices) <= 3
    assert _left(rows, found) < 1e-9 * float(rows.abs().sum())


@pytest.mark.parametrize("method", ["omp", "frank_wolfe"])
@pytest.mark.parametrize("normalize", [False, True])
def test_short_rows_stand_for_long_ones(backend: str, method: str, normalize: bool) -> None:
    """Low-rank gradients and histories, all dimensions: the picks of the rows themselves."""
    numel = 3_000
    shared = fc.LowRankGradients(normal(25, 3), seed=5, numel=numel, backend=backend)
    state = (
        fc.AdamState(0.1 * normal(numel, seed=3), normal(numel, seed=4).square(), 5) if normalize else None
    )
    found = fc.match_gradients(shared, 5, normalize=state, method=method, backend=backend)
    rows = shared.dense()
    rows = rows if state is None else Rule.adam(5, BETAS, EPS).updates(rows, state.m, state.v)
    expected = fc.match_gradients(rows, 5, method=method, backend=backend)
    assert torch.equal(found.indices, expected.indices)
    assert torch.allclose(found.weights, expected.weights, rtol=1e-5)
    assert found.objective == pytest.approx(expected.objective, rel=1e-5, abs=1e-5 * float(rows.norm()))
    if state is not None:
        assert found.state.step == 6


def test_weighted_methods_take_the_dimensions_and_history_of_adam(backend: str) -> None:
    g = normal(30, 400)
    state = fc.AdamState(0.1 * normal(400, seed=3), normal(400, seed=4).square(), 5)
    found = fc.match_gradients(g, 6, normalize=state, top=40, method="omp", backend=backend)
    medoids = fc.match_gradients(g, 6, normalize=state, top=40, backend=backend)
    assert torch.equal(found.dims, medoids.dims)
    m = 0.9 * state.m + 0.1 * g[found.indices].mean(0)
    assert torch.allclose(found.state.m, m, rtol=1e-12, atol=1e-14)
    # Along one direction one row is a multiple of the sum.
    history = fc.RankOneAdamState(1_000, mean=0.4, mean_square=1.5, seed=3, step=4)
    shared = fc.LowRankGradients(normal(20, 1), seed=3, numel=1_000, backend=backend)
    one = fc.match_gradients(shared, 4, normalize=history, method="omp", backend=backend)
    assert len(one.indices) == 1
    assert one.objective == pytest.approx(0, abs=1e-6)


def test_nothing_to_match_leaves_the_means(backend: str) -> None:
    state = fc.AdamState(torch.zeros(7), torch.zeros(7), 3)
    found = fc.match_gradients(torch.zeros(5, 7), 2, normalize=state, method="omp", backend=backend)
    assert len(found.indices) == 0
    assert (found.state.m is state.m, found.state.v is state.v, found.state.step) == (True, True, 4)


def test_one_offset_for_all_groups(backend: str) -> None:
    """Gains and the objective are those of facility location with the offset that is returned."""
    g = torch.cat([normal(9, 30), 10 * normal(8, 30, seed=1)])
    groups = torch.tensor([0] * 9 + [1] * 8)
    found = fc.match_gradients(g, 6, top=30, groups=groups, backend=backend)
    expected = fc.facility_location(g, 6, groups=groups, metric="l1", offset=found.offset, backend=backend)
    assert torch.equal(found.indices, expected.indices)
    assert torch.allclose(found.gains, expected.gains, rtol=1e-12)
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)


def test_one_direction_needs_no_rows(backend: str) -> None:
    """Updates along one direction differ by the numbers that stand for them, in every dimension."""
    numel, top = 2_000, 300
    history = fc.RankOneAdamState(numel, mean=0.4, mean_square=1.5, seed=3, step=4)
    g = fc.LowRankGradients(normal(31, 1), seed=3, numel=numel, backend=backend)
    dense = history.dense(torch.float64)
    problem = UpdatesProblem(
        Gradients(g.coefficients, 3, numel), dense, torch.arange(31), torch.tensor([0, 31]), top
    )
    _, u = kernels.torch.top_updates(problem)
    distance = torch.cdist(u, u, p=1)
    found = fc.match_gradients(g, 6, normalize=history, top=top, backend=backend)
    by_rows = fc.match_gradients(g, 6, normalize=dense, top=top, backend=backend)
    assert found.dims is None
    assert by_rows.dims is not None
    # Medians of evenly many numbers tie, so picks may differ, but not their worth.
    picks, _ = greedy_medoids(distance.numpy(), 6)
    for selection in (found, by_rows):
        covered = distance[selection.indices].min(0).values.sum()
        assert float(covered) <= 1.05 * float(distance[picks].min(0).values.sum())
    assert found.gains[0] - by_rows.gains[0] == pytest.approx(31 * (found.offset - by_rows.offset), abs=1e-4)
    # One pick among 31: a median without a tie.
    one = [fc.match_gradients(g, 1, normalize=h, top=top, backend=backend).indices for h in (history, dense)]
    assert torch.equal(*one)
    state = fc.match_gradients(g, 1, normalize=history, top=top, backend=backend).state
    assert isinstance(state, fc.RankOneAdamState)
    advanced = fc.match_gradients(g, 1, normalize=dense, top=top, backend=backend).state
    again = state.dense(torch.float64)
    assert again.step == advanced.step
    assert torch.allclose(again.m, advanced.m, rtol=1e-12)
    assert torch.allclose(again.v, advanced.v, rtol=1e-12)


def test_small_coefficients_are_matched_as_rows() -> None:
    """eps counts there: updates are not h(c) sign(z)."""
    g = fc.LowRankGradients(1e-6 * normal(9, 1), seed=0, numel=400)
    found = fc.match_gradients(g, 2, normalize=fc.RankOneAdamState(400), top=20)
    assert found.dims is not None
    assert isinstance(found.state, fc.RankOneAdamState)


def test_memory_does_not_grow_with_the_length_of_gradients() -> None:
    """From low-rank gradients the lists and rows are all there is: 20 million dimensions of 64 samples would be 5 GB."""
    g = fc.LowRankGradients(normal(64, 1, dtype=torch.float32), seed=0, numel=20_000_000)
    member, offset = torch.arange(64), torch.tensor([0, 64])
    problem = UpdatesProblem(Gradients(g.coefficients, 0, g.numel), None, member, offset, 10)
    dims, u = kernels.cpu.top_updates(problem)
    z = g.directions()[0].abs()
    assert torch.equal(dims[0].sort().values, z.topk(10).indices.sort().values)
    assert u.shape == (64, 10)


G = torch.ones(6, 5)
ZERO = torch.zeros(5)


@pytest.mark.parametrize(
    ("g", "k", "options", "error", "text"),
    [
        (G[0], 1, {}, ValueError, "g must have 2 dimensions"),
        (G.long(), 1, {}, TypeError, "g must have dtype float16"),
        (G, 0, {}, ValueError, "k must be >= 1"),
        (G, 7, {}, ValueError, r"k must be at most 6"),
        (G, 1.5, {}, TypeError, "k must be an int"),
        (G, 1, {"top": 0}, ValueError, r"top must be in \[1, 5\]"),
        (G, 1, {"top": 6}, ValueError, r"top must be in \[1, 5\], 5 being the length of a gradient, got 6"),
        (G, 1, {"top": 2.0}, TypeError, "top must be an int"),
        (G, 1, {"metric": "l3"}, ValueError, "unknown metric 'l3'"),
        (G, 1, {"method": "best"}, ValueError, "unknown method 'best'"),
        (G, 1, {"groups": [0, 1]}, ValueError, r"groups must have shape \[6\]"),
        (G, None, {"groups": [0] * 6, "budgets": {1: 2}}, ValueError, "label 1"),
        (G, 1, {"normalize": "adam"}, TypeError, "normalize must be an AdamState, got str"),
        (
            G,
            1,
            {"normalize": fc.AdamState(torch.zeros(4), torch.zeros(4), 1)},
            ValueError,
            r"normalize must be of gradients of length 5, .* length 4",
        ),
        (G, 1, {"nonnegative": False}, ValueError, "are for method 'omp'"),
        (G, 1, {"ridge": 1.0}, ValueError, "are for method 'omp'"),
        (G, 1, {"ridge": -1.0, "method": "omp"}, ValueError, "ridge must be >= 0"),
        (G, 1, {"method": "omp", "backend": "cuda"}, fc.BackendUnavailableError, "cuda"),
        (G, 1, {"backend": "gpu"}, ValueError, "unknown backend"),
    ],
)
def test_bad_arguments_are_named(
    g: Tensor, k: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        fc.match_gradients(g, k, **options)


def test_what_overflows_is_said_of_the_gradients(backend: str) -> None:
    large = 1e200 * torch.tensor([[1.0, 2], [3, -1], [2, 2]], dtype=torch.float64)
    zeros = fc.AdamState(*torch.zeros(2, 2, dtype=torch.float64), 1)
    for metric, top in itertools.product(("sqeuclidean", "dot"), (None, 2)):
        with pytest.raises(ValueError, match=f"g: sums over dimensions for metric '{metric}' overflow"):
            fc.match_gradients(large, 1, metric=metric, top=top, backend=backend)
    for state, g in ((fc.RankOneAdamState(10), fc.LowRankGradients(large[:, :1], 0, 10)), (zeros, large)):
        with pytest.raises(
            ValueError, match=r"g: the squares of entries of up to 3e.200, which Adam's history"
        ):
            fc.match_gradients(g, 1, normalize=state, backend=backend)
    single = 1e30 * torch.tensor([[1.0, 2], [3, -1], [2, 2]])
    with pytest.raises(ValueError, match=r"g: gains or weights of up to .* overflow torch.float32; scale"):
        fc.match_gradients(single, 1, metric="dot", backend=backend)
    with pytest.raises(ValueError, match="g: the mean squares of the chosen rows overflow"):
        fc.match_gradients(
            single, 1, normalize=fc.AdamState(torch.zeros(2), torch.zeros(2), 1), backend=backend
        )
    one = torch.ones(2)
    history = fc.AdamState(one, torch.zeros(2), 1, eps=5e-324)
    with pytest.raises(ValueError, match="g: updates overflow in dimension 0; scale the gradients down"):
        fc.match_gradients(torch.zeros(3, 2), 1, normalize=history, top=2, backend=backend)


def test_the_row_of_a_bad_value_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is named by its number among all, whichever group it is in, in whichever block of dimensions."""
    monkeypatch.setattr(updates, "BLOCK_BYTES", 8 * 16 * 8192)
    g = torch.ones(6, 2)
    g[4, 1] = torch.nan
    groups = [1, 1, 1, 1, 0, 0]
    for method in ("omp", "frank_wolfe", "caratheodory"):
        with pytest.raises(ValueError, match="g must be finite, got NaN at row 4, column 1"):
            fc.match_gradients(g, 4, method=method, groups=groups, backend=backend)
    # In the second block of dimensions.
    long = torch.ones(16, 9_000)
    long[7, 8_500] = torch.inf
    with pytest.raises(ValueError, match="g must be finite, got inf at row 7, column 8500"):
        fc.match_gradients(long, 4, metric="dot", backend=backend)
    m = torch.zeros(9_000)
    m[8_501] = torch.nan
    state = fc.AdamState(m, torch.ones(9_000), 2)
    with pytest.raises(ValueError, match=r"normalize: m must be finite, got (nan|NaN) at position 8501"):
        fc.match_gradients(long.nan_to_num(posinf=1), 4, normalize=state, metric="dot", backend=backend)
    shared = fc.LowRankGradients(g, seed=0, numel=50)
    with pytest.raises(ValueError, match=r"g\.coefficients must be finite, got NaN at row 4, column 1"):
        fc.match_gradients(shared, 4, groups=groups, backend=backend)
    # Rows that nothing is asked about may be anything.
    for rows in (g, shared):
        found = fc.match_gradients(rows, None, groups=groups, budgets=[0, 2], method="omp", backend=backend)
        assert set(found.indices.tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"step": 10**400}, ValueError, "step must be in the range of 64-bit integers"),
        ({"step": 0}, ValueError, "step must be >= 1"),
        ({"step": 1.0}, TypeError, "step must be an int"),
        ({"betas": (1.0, 0.999)}, ValueError, r"betas\[0\] must be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be in \[0, 1\)"),
        ({"betas": (0.9,)}, ValueError, "betas must be a pair"),
        ({"betas": 0.9}, TypeError, "betas must be a pair"),
        ({"eps": 0.0}, ValueError, "eps must be > 0"),
        ({"m": torch.zeros(4)}, ValueError, r"v must have the shape of m"),
        ({"m": torch.zeros(5, 1)}, ValueError, r"m must have shape \[D\]"),
        ({"v": torch.zeros(5, dtype=torch.int64)}, TypeError, "v must have dtype float16, .* got int64"),
    ],
)
def test_bad_histories_are_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dataclasses.replace(fc.AdamState(ZERO, ZERO, 1), **change)


@EVERY_BACKEND
@pytest.mark.parametrize("check", CHECKS)
def test_equals_the_definition(backend: str, check: Check) -> None:
    check(backend, DEVICE)
