"""fc.match_gradients against a dense restatement of CoLM's matching in float64."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset.matching.rule import Rule
from flashcoreset.pursuit import orthogonal_matching_pursuit

BETAS, EPS = (0.9, 0.999), 1e-8
Check = Callable[[str, str], None]
# Triton's interpreter is NumPy, which warns of overflow and NaN that are meant to happen.
QUIET = {"over": "ignore", "invalid": "ignore"}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kernels_of(backend: str) -> ModuleType:
    return importlib.import_module(f"flashcoreset.kernels.{backend}")


def greedy_medoids(distance: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """Facility location with the distances' largest value as offset, written out; cluster sizes."""
    similarity = distance.max() - distance
    covered, picks = np.zeros(len(distance)), []
    for _ in range(k):
        gains = np.maximum(similarity - covered, 0).sum(1)
        gains[picks] = -1
        picks.append(int(gains.argmax()))
        covered = np.maximum(covered, similarity[picks[-1]])
    nearest = similarity[picks].argmax(0)
    nearest[picks] = np.arange(k)
    return picks, np.bincount(nearest, minlength=k).astype(float).tolist()


class Restated:
    """One step of the method, every matrix formed."""

    def __init__(self, numel: int) -> None:
        self.m, self.v, self.t = np.zeros(numel), np.zeros(numel), 0

    def step(self, g: np.ndarray, groups: np.ndarray, budgets: dict[int, int], top: int) -> dict[str, Any]:
        self.t += 1
        m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        u = m / (1 - BETAS[0] ** self.t) / (np.sqrt(v / (1 - BETAS[1] ** self.t)) + EPS)
        picks, weights, dims = [], [], []
        for label in sorted(budgets):
            rows = np.flatnonzero(groups == label)
            order = np.argsort(-np.abs(u[rows].mean(0)), kind="stable")[:top]
            part = u[rows][:, order]
            found, sizes = greedy_medoids(np.abs(part[:, None] - part[None]).sum(2), budgets[label])
            picks += rows[found].tolist()
            weights += sizes
            dims.append(order.tolist())
        self.m, self.v = m[picks].mean(0), v[picks].mean(0)
        return {"picks": picks, "weights": weights, "dims": dims}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_twenty_steps_equal_the_dense_restatement(backend: str, kind: str, dtype: torch.dtype) -> None:
    check_steps(backend, "cpu", kind, dtype, (150, 1_537, 60), {0: 4, 1: 3, 2: 2})


def check_steps(
    backend: str,
    device: str,
    kind: str,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    budgets: dict[int, int],
    steps: int = 20,
) -> None:
    # Few picks of many: if a candidate would serve one other alone, the two are an exact tie.
    count, numel, top = size
    groups = torch.arange(count) * 7 % len(budgets)
    restated = Restated(numel)
    zero = torch.zeros(numel, dtype=dtype, device=device)
    state: Any = fc.AdamState(zero, zero, 1, BETAS, EPS)
    for step in range(steps):
        if kind == "dense":
            rows = normal(count, numel, seed=step, dtype=dtype)
            g: Any = rows.to(device)
        else:
            c = normal(count, 2, seed=step, dtype=dtype)
            rows = c.double() @ fc.LowRankGradients(c, step, numel, "torch").directions().double()
            g = fc.LowRankGradients(c.to(device), seed=step, numel=numel)
        # Steps with the first history 0 are ties throughout, so the restatement goes on from ours.
        expected = restated.step(rows.double().numpy(), groups.numpy(), budgets, top)
        found = fc.match_gradients(
            g, None, normalize=state, top=top, groups=groups.to(device), budgets=budgets, backend=backend
        )
        state = found.state
        assert state.step == step + 2
        assert state.m.device.type == device
        assert found.dims.shape == (len(budgets), top)
        if step == 0:
            assert found.weights.sum() == count
            chosen = rows[found.indices.cpu()].double().numpy()
            restated.m = (1 - BETAS[0]) * chosen.mean(0)
            restated.v = (1 - BETAS[1]) * (chosen**2).mean(0)
        else:
            assert found.dims.tolist() == expected["dims"]
            assert found.indices.tolist() == expected["picks"]
            assert found.weights.tolist() == expected["weights"]
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert np.abs(state.m.cpu().double().numpy() - restated.m).max() <= tolerance
        assert np.abs(state.v.cpu().double().numpy() - restated.v).max() <= tolerance


SIZES = [(1, 1, 1), (7, 97, 13), (33, 1_025, 1_025), (5, 5_000, 100)]  # gradients, D, top


def check_kernels(
    backend: str, device: str, size: tuple[int, int, int], step: int | None, dtype: torch.dtype
) -> None:
    count, numel, top = size
    g = normal(count, numel, dtype=dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    m = v = rule = None
    if step is not None:
        m, v = 0.1 * normal(numel, seed=1, dtype=exact), normal(numel, seed=2, dtype=exact).square()
        rule = Rule.adam(step, BETAS, EPS)
    member = torch.arange(count).flip(0)
    offset = torch.tensor([0, (count + 1) // 2, count] if count > 1 else [0, 1])
    kernel = kernels_of(backend)
    ours, our_m, our_v, our_member = (None if x is None else x.to(device) for x in (g, m, v, member))
    dims, u = kernel.top_updates(ours, our_m, our_v, rule, our_member, offset.to(device), top)
    expected_dims, expected_u = kernels.torch.top_updates(g.double(), m, v, rule, member, offset, top)
    assert torch.equal(dims.cpu(), expected_dims)
    assert torch.allclose(u.cpu(), expected_u, rtol=1e-13, atol=1e-13)
    if m is not None and v is not None:
        for found, theirs in zip(
            kernel.update_history(ours, our_m, our_v, BETAS, our_member),
            kernels.torch.update_history(g.double(), m.double(), v.double(), BETAS, member),
            strict=True,
        ):
            assert found.dtype == exact
            assert torch.allclose(
                found.cpu().double(), theirs, rtol=2e-7 if exact == torch.float32 else 1e-14, atol=1e-15
            )


def check_low_rank(backend: str, device: str, q: int, dtype: torch.dtype, numel: int) -> None:
    c = normal(19, q, dtype=dtype)
    rows = c.double() @ fc.LowRankGradients(c, -4, numel, "torch").directions().double()
    m, v = 0.1 * normal(numel, seed=1, dtype=dtype), normal(numel, seed=2, dtype=dtype).square()
    member, offset = torch.arange(19), torch.tensor([0, 6, 19])
    kernel = kernels_of(backend)
    ours, our_m, our_v, our_member = (x.to(device) for x in (c, m, v, member))
    for rule in (None, Rule.adam(4, BETAS, EPS)):
        dims, u = kernel.top_updates(
            ours, our_m, our_v, rule, our_member, offset.to(device), 40, seed=-4, length=numel
        )
        expected_dims, expected_u = kernels.torch.top_updates(
            rows, m.double(), v.double(), rule, member, offset, 40
        )
        assert torch.equal(dims.cpu(), expected_dims)
        # Normal numbers of float32 that are rounded the other way are off by one in 2^23 (none was seen).
        assert torch.allclose(u.cpu(), expected_u, rtol=1e-12, atol=1e-12)
    found = kernel.update_history(ours, our_m, our_v, BETAS, our_member[::3], seed=-4, length=numel)
    expected = kernels.torch.update_history(rows, m.double(), v.double(), BETAS, member[::3])
    for got, theirs in zip(found, expected, strict=True):
        assert torch.allclose(
            got.cpu().double(), theirs, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-9
        )


def check_ties(backend: str, device: str) -> None:
    kernel = kernels_of(backend)
    member, offset = torch.arange(4, device=device), torch.tensor([0, 4], device=device)
    g = torch.ones(4, 9_000, device=device)
    g[:, 7_777] = -2
    dims, _ = kernel.top_updates(g, None, None, None, member, offset, 5)
    assert dims.tolist() == [[7_777, 0, 1, 2, 3]]
    # More of them than a list holds, some below and some above the others.
    g[:, 1:8_000:3], g[:, 5:8_000:3] = 3, 0.5
    dims, _ = kernel.top_updates(g, None, None, None, member, offset, 2_700)
    expected = [*range(1, 8_000, 3), *(d for d in range(9_000) if g[0, d] == -2)]
    expected += [d for d in range(9_000) if g[0, d] == 1]
    assert dims.tolist() == [expected[:2_700]]
    zero = torch.zeros(9_000, device=device)
    rule = Rule.adam(1, BETAS, EPS)
    dims, u = kernel.top_updates(torch.zeros(4, 9_000, device=device), zero, zero, rule, member, offset, 5)
    assert dims.tolist() == [[0, 1, 2, 3, 4]]
    assert not u.any()


def check_close_calls(backend: str, device: str) -> None:
    """Means that differ by less than float32 sees, in shuffled order."""
    numel, count, top = 9_001, 8, 1_000
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(numel, generator=generator)
    m = (1 + 3e-8 * order.double()).float()
    g = torch.ones(count, numel)
    v = torch.ones(numel)
    rule = Rule.adam(3, BETAS, EPS)
    member, offset = torch.arange(count), torch.tensor([0, count])
    ours = (x.to(device) for x in (g, m, v))
    dims, _ = kernels_of(backend).top_updates(*ours, rule, member.to(device), offset.to(device), top)
    expected, _ = kernels.torch.top_updates(g.double(), m.double(), v.double(), rule, member, offset, top)
    assert torch.equal(dims.cpu(), expected)
    # A list whose least mean is that of all other dimensions but for a few parts in 10^8; float32 may round it either way.
    early = torch.arange(numel) < 4_096
    for low in (1.0, 1.1, 1.2, 1.3):
        m = torch.where(torch.arange(numel) < 500, 2.0, low)
        m[~early] = low + torch.rand(int((~early).sum()), generator=generator)
        least = float(rule.updates(g[0, 0].double(), torch.tensor(low).double(), torch.ones(1).double()))
        root = (rule.m_scale * m.double() + rule.m_step) / least - rule.eps
        v = torch.where(early, 1.0, ((root.square() - rule.v_step) / rule.v_scale).float())
        ours = (x.to(device) for x in (g, m, v))
        dims, _ = kernels_of(backend).top_updates(*ours, rule, member.to(device), offset.to(device), top)
        expected, _ = kernels.torch.top_updates(g.double(), m.double(), v.double(), rule, member, offset, top)
        assert (expected[:, 500:] >= 4_096).all()
        assert torch.equal(dims.cpu(), expected)


@np.errstate(**QUIET)
def check_large(backend: str, device: str) -> None:
    numel = 9_000
    g, m, v = torch.zeros(4, numel), torch.linspace(1, 2, numel), torch.ones(numel)
    g[:, 8_000] = 6e20
    rule = Rule.adam(2_000, BETAS, EPS)
    ours = (x.to(device) for x in (g, m, v))
    member, offset = torch.arange(4, device=device), torch.tensor([0, 4], device=device)
    dims, u = kernels_of(backend).top_updates(*ours, rule, member, offset, 3)
    assert dims.tolist() == [[8_000, 8_999, 8_998]]
    expected = rule.updates(g.double(), m.double(), v.double())[:, dims[0].cpu()]
    assert torch.allclose(u.cpu(), expected, rtol=1e-13)


def check_cancellation(backend: str, device: str) -> None:
    """A gradient c z that float32 makes 0 where it is not, in the one dimension without a history."""
    numel = 9_000
    z = fc.LowRankGradients(torch.ones(1, 2), 3, numel, "torch").directions()
    other = torch.nextafter(-z[0], torch.tensor(torch.inf))
    exact = (z[1].double() * z[0] + other.double() * z[1]).abs()
    vanishing = torch.where(z[1] * z[0] + other * z[1] == 0, exact, 0)
    vanishing[:5_000] = 0  # once there is a bar
    d = int(vanishing.argmax())
    assert vanishing[d] > 1e-8
    c = torch.stack([z[1, d], other[d]])[None]
    m, v = torch.zeros(numel), torch.ones(numel)
    v[d] = 0
    rule = Rule.adam(2_000, BETAS, 1e-10)
    member, offset = torch.arange(1), torch.tensor([0, 1])
    expected, _ = kernels.torch.top_updates(c, m, v, rule, member, offset, 5, seed=3, length=numel)
    assert expected[0, 0] == d
    ours = (x.to(device) for x in (c, m, v))
    dims, _ = kernels_of(backend).top_updates(
        *ours, rule, member.to(device), offset.to(device), 5, seed=3, length=numel
    )
    assert torch.equal(dims.cpu(), expected)


def test_threads_and_layout_change_no_bit() -> None:
    g = normal(50, 40_000, dtype=torch.float32)
    m, v = normal(40_000, seed=1, dtype=torch.float32), normal(40_000, seed=2, dtype=torch.float32).square()
    rule = Rule.adam(4, BETAS, EPS)
    member, offset = torch.randperm(50, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 21, 50])
    threads = torch.get_num_threads()
    results = []
    try:
        for count, rows in itertools.product(
            (1, 2, 5), (g, g.T.contiguous().T, torch.cat([g, g], 1)[:, :40_000])
        ):
            torch.set_num_threads(count)
            dims, u = kernels.cpu.top_updates(rows, m, v, rule, member, offset, 500)
            results.append((dims, u, *kernels.cpu.update_history(rows, m, v, BETAS, member)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("metric", ["l1", "euclidean", "sqeuclidean", "cosine", "dot"])
@pytest.mark.parametrize("normalize", [False, True])
def test_without_top_all_dimensions_count(backend: str, metric: str, normalize: bool) -> None:
    check_all_dimensions(backend, "cpu", metric, normalize)


def check_all_dimensions(backend: str, device: str, metric: str, normalize: bool) -> None:
    numel = 700
    g = normal(24, numel).to(device)
    groups = torch.arange(24, device=device) % 2
    state = None
    if normalize:
        m, v = 0.1 * normal(numel, seed=3).to(device), normal(numel, seed=4).square().to(device)
        state = fc.AdamState(m, v, 5)
    found = fc.match_gradients(g, 4, normalize=state, groups=groups, metric=metric, backend=backend)
    rows = g if state is None else Rule.adam(5, BETAS, EPS).updates(g, state.m, state.v)
    expected = fc.facility_location(rows, 4, groups=groups, metric=metric, backend="torch")
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.assignment, expected.assignment)
    assert found.dims is None
    if metric in ("cosine", "dot"):
        assert torch.allclose(found.gains, expected.gains, rtol=1e-9)
        assert found.objective == pytest.approx(expected.objective, rel=1e-9)
    else:
        assert found.offset is not None


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
    _, u = kernels.torch.top_updates(
        g.coefficients,
        dense.m,
        dense.v,
        Rule.adam(4, BETAS, EPS),
        torch.arange(31),
        torch.tensor([0, 31]),
        top,
        seed=3,
        length=numel,
    )
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


def check_another_direction(backend: str, device: str) -> None:
    history = fc.RankOneAdamState(500, mean=0.4, mean_square=1.5, seed=3, step=4)
    c = normal(10, 1)
    g = fc.LowRankGradients(c.to(device), seed=8, numel=500, backend=backend)
    found = fc.match_gradients(g, 3, normalize=history, top=50, backend=backend)
    expected = fc.match_gradients(
        fc.LowRankGradients(c, 8, 500), 3, normalize=history.dense(torch.float64), top=50, backend="torch"
    )
    assert isinstance(found.state, fc.AdamState)
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert torch.allclose(found.state.m.cpu(), expected.state.m, rtol=1e-12)


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
    dims, u = kernels.cpu.top_updates(
        g.coefficients, None, None, None, member, offset, 10, seed=0, length=g.numel
    )
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
        (
            G.double(),
            1,
            {"normalize": fc.AdamState(ZERO, ZERO, 1)},
            TypeError,
            "normalize must have dtype torch.float64",
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


@np.errstate(**QUIET)
def check_bad_values(backend: str, device: str, bad: float) -> None:
    g = normal(6, 9_000, dtype=torch.float32).to(device)
    zero, one = torch.zeros(9_000, device=device), torch.ones(9_000, device=device)
    state = fc.AdamState(zero, one, 2)
    broken = g.clone()
    broken[3, 8_000] = bad
    for normalize in (None, state):
        with pytest.raises(ValueError, match=r"g must be finite, got (nan|NaN|inf) at row 3, column 8000"):
            fc.match_gradients(broken, 2, top=5, normalize=normalize, backend=backend)
    m, v = zero.clone(), one.clone()
    m[7] = bad
    with pytest.raises(ValueError, match=r"normalize: m must be finite, got (NaN|inf) at position 7"):
        fc.match_gradients(g, 2, top=5, normalize=fc.AdamState(m, v, 2), backend=backend)
    # Also if no mean shows it.
    bad_v = one.clone()
    bad_v[8_000] = -1
    history = fc.AdamState(zero, bad_v, 2, (0.9, 0.0))
    with pytest.raises(ValueError, match=r"v must be finite and >= 0, got -.* at position 8000"):
        fc.match_gradients(g, 2, top=5, normalize=history, backend=backend)
    v[8] = -1
    with pytest.raises(ValueError, match=r"normalize: v must be finite and >= 0, got -1.* at position 8"):
        fc.match_gradients(g, 2, top=5, normalize=fc.AdamState(zero, v, 2), backend=backend)
    coefficients = torch.ones(4, 1, device=device)
    coefficients[2] = bad
    with pytest.raises(ValueError, match=r"g.coefficients must be finite"):
        fc.match_gradients(fc.LowRankGradients(coefficients, 0, 100), 2, top=5, backend=backend)


@np.errstate(**QUIET)
def check_overflow(backend: str, device: str) -> None:
    zero = torch.zeros(5, device=device)
    state = fc.AdamState(zero, zero, 1)
    with pytest.raises(ValueError, match="overflow"):
        fc.match_gradients(
            torch.full((4, 5), 1e30, device=device), 2, top=2, normalize=state, backend=backend
        )


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


def test_the_row_of_a_bad_value_is_named(backend: str) -> None:
    """The row is named by its number among all, whichever group it is in."""
    g = torch.ones(6, 2)
    g[4, 1] = torch.nan
    groups = [1, 1, 1, 1, 0, 0]
    for method in ("omp", "frank_wolfe", "caratheodory"):
        with pytest.raises(ValueError, match="g must be finite, got NaN at row 4, column 1"):
            fc.match_gradients(g, 4, method=method, groups=groups, backend=backend)
    # Beyond the first block of dimensions.
    long = torch.ones(512, 9_000)
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
        ({"m": torch.zeros(5, dtype=torch.float64)}, TypeError, "v must have the dtype of m"),
        ({"m": torch.zeros(5, 1)}, ValueError, r"m must have shape \[D\]"),
        ({"v": torch.zeros(5, dtype=torch.int64)}, TypeError, "v must have dtype float32 or float64"),
    ],
)
def test_bad_histories_are_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dataclasses.replace(fc.AdamState(ZERO, ZERO, 1), **change)


def check_directions(backend: str, device: str) -> None:
    """To two units in the last place: logarithms differ."""
    for dtype, (begin, length, first) in itertools.product(
        (torch.float32, torch.float64),
        ((0, 1, 0), (5, 1_001, 2), (2**40 + 3, 70, 0), (3, 9_000, 2**32 - 2)),
    ):
        ours = torch.full((2, length + 2), 9.0, dtype=dtype, device=device)
        theirs = torch.empty(2, length, dtype=dtype)
        kernels_of(backend).directions(ours[:, 1:-1], seed=-9, begin=begin, first=first)
        kernels.torch.directions(theirs, seed=-9, begin=begin, first=first)
        found = ours[:, 1:-1].cpu()
        assert np.abs(found.float().numpy().view(np.int32) - theirs.float().numpy().view(np.int32)).max() <= 2
        assert (ours[:, 0] == 9).all()
        assert (ours[:, -1] == 9).all()


def check_zeroth_order(backend: str, device: str) -> None:
    """The parameters move along the directions that come back, and these are matched."""
    x = normal(12, 50, dtype=torch.float32)
    results = []
    for name, where in ((backend, device), ("torch", "cpu")):
        weight, inputs = torch.zeros(50, device=where), x.to(where)
        g = fc.zeroth_order_gradients(
            lambda weight=weight, inputs=inputs: inputs @ weight,
            [weight],
            seed=3,
            n_perturbations=2,
            backend=name,
        )
        results.append(g)
        assert not weight.any()
    ours, theirs = results
    assert ours.coefficients.device.type == device
    assert torch.allclose(ours.coefficients.cpu(), theirs.coefficients, rtol=1e-4, atol=1e-4)
    assert torch.allclose(ours.directions(7, 40).cpu(), theirs.directions(7, 40), rtol=1e-6)
    assert torch.allclose(ours.dense().cpu(), x @ theirs.directions().T @ theirs.directions() / 2, atol=1e-2)
    found = fc.match_gradients(ours, 3, top=20, backend=backend)
    same = fc.LowRankGradients(ours.coefficients.cpu(), 3, 50)
    expected = fc.match_gradients(same, 3, top=20, backend="torch")
    assert torch.equal(found.dims.cpu(), expected.dims)
    assert torch.equal(found.indices.cpu(), expected.indices)


def check(function: Callable[..., None], *arguments: Any) -> Any:
    """`function(backend, device, *arguments)` as an entry of CHECKS; its id is the function's name and the arguments."""
    name = function.__name__.removeprefix("check_").replace("_", " ")
    told = "-".join(str(argument).removeprefix("torch.") for argument in arguments)
    return pytest.param(
        lambda backend, device: function(backend, device, *arguments), id=f"{name}-{told}".rstrip("-")
    )


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The checks of every backend, as check(backend, device): run here and in test_matching_cuda.py and test_matching_triton.py.
# Sizes are such that Triton's interpreter can do them.
CHECKS = [
    *(
        check(check_kernels, size, step, dtype)
        for size, step, dtype in itertools.product(SIZES, (None, 9), DTYPES)
    ),
    *(check(check_kernels, (7, 97, 13), 1, dtype) for dtype in DTYPES),
    *(
        check(check_low_rank, q, dtype, 5_001)
        for q, dtype in itertools.product((1, 3), (torch.float32, torch.float64))
    ),
    *(check(check_steps, kind, torch.float32, (32, 401, 40), {0: 2, 1: 2}) for kind in ("dense", "low rank")),
    *(check(check_all_dimensions, metric, True) for metric in ("l1", "cosine")),
    *(check(check_bad_values, bad) for bad in (math.nan, math.inf)),
    check(check_ties),
    check(check_close_calls),
    check(check_large),
    check(check_cancellation),
    check(check_another_direction),
    check(check_directions),
    check(check_overflow),
    check(check_zeroth_order),
]


@pytest.mark.parametrize("check", CHECKS)
def test_equals_the_definition(backend: str, check: Check) -> None:
    check(backend, "cpu")
