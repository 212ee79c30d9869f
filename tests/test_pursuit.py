"""Matching pursuit and Frank-Wolfe against the definitions, SciPy and NumPy, on every backend, and mistakes of a caller."""

from __future__ import annotations

import collections
import math
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset._core import native
from flashcoreset.pursuit import Pursuit, frank_wolfe, orthogonal_matching_pursuit, pursuit_bytes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = [(1, 1), (7, 3), (7, 97), (40, 1), (97, 40), (130, 1025), (1025, 33)]

# Largest relative error of a weight or a norm. Every backend computes in float64 and float32 results are rounded in the
# end. Worst seen: 3e-7 (rounding of a subnormal weight) and 2e-9 (a Gram matrix has the condition of the rows squared).
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-8}


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_rows(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """[rows, columns] float64."""
    x = normal(rows, columns, seed)
    if kind == "clustered":
        return 0.3 * x + normal(9, columns, seed + 1)[torch.arange(rows) % 9]
    if kind == "scaled":  # squares from 1e-6 to 1e6
        return x * torch.logspace(-3, 3, rows, dtype=torch.float64)[:, None]
    if kind == "repeated":  # duplicates, multiples and zeros
        generator = torch.Generator().manual_seed(seed + 2)
        picks = torch.randint(0, rows, (rows,), generator=generator)
        return x[picks] * torch.randint(0, 3, (rows, 1), generator=generator)
    return x


def make_target(rows: Tensor, whole: bool, seed: int = 0) -> Tensor:
    """The sum of the rows, or one to which weights below 0 would help."""
    if whole:
        return rows.double().sum(0)
    return rows.double().T @ normal(len(rows), 1, seed + 7)[:, 0]


def check_same(found: Pursuit, wanted: Pursuit, target: Tensor, dtype: torch.dtype) -> None:
    out = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[out]
    assert found.indices.dtype == torch.int64
    assert found.weights.dtype == found.residual_norms.dtype == out
    assert found.indices.tolist() == wanted.indices.tolist()
    torch.testing.assert_close(found.weights.cpu(), wanted.weights, rtol=tolerance, atol=1e-37)
    torch.testing.assert_close(
        found.residual_norms.cpu(), wanted.residual_norms, rtol=tolerance, atol=1e-10 * float(target.norm())
    )


def check_pursuit(
    backend: str, device: str, kind: str, dtype: torch.dtype, size: tuple[int, int], k: int
) -> None:
    """Compares with the definition, for the whole target and another, with weights of any sign and with a ridge."""
    g = make_rows(kind, *size).to(dtype)
    k = min(k, size[0])
    for whole in (True, False):
        target = make_target(g, whole)
        for options in (
            {},
            {"nonnegative": False},
            {"ridge": 0.3 * float(g.double().square().sum(1).mean())},
        ):
            found = orthogonal_matching_pursuit(
                g.to(device), target.to(device), k, backend=backend, **options
            )
            wanted = orthogonal_matching_pursuit(g, target, k, backend="torch", **options)
            check_same(found, wanted, target, dtype)


def check_frank_wolfe(
    backend: str, device: str, kind: str, dtype: torch.dtype, size: tuple[int, int], k: int
) -> None:
    g = make_rows(kind, *size).to(dtype)
    k = min(k, size[0])
    for whole in (True, False):
        target = make_target(g, whole)
        found = frank_wolfe(g.to(device), target.to(device), k, backend=backend)
        check_same(found, frank_wolfe(g, target, k, backend="torch"), target, dtype)


# --- the definitions ------------------------------------------------------------------------------


def check_by_hand(backend: str, device: str) -> None:
    g = torch.tensor([[1.0, 0, 0], [0, 2, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.float64, device=device)
    target = torch.tensor([3.0, 1, 2], dtype=torch.float64, device=device)
    # Products with the target: 3, 2, 4, 0. With the residual (1, -1, 2) they are 1, -2, 0, 0; then only the third of the
    # target's coordinates is left.
    found = orthogonal_matching_pursuit(g, target, 4, backend=backend)
    assert found.indices.tolist() == [2, 0]
    assert found.weights.tolist() == pytest.approx([1, 2])
    assert found.residual_norms.tolist() == pytest.approx([6**0.5, 2])
    found = orthogonal_matching_pursuit(g, target, 2, nonnegative=False, backend=backend)
    assert found.indices.tolist() == [2, 1]
    assert found.weights.tolist() == pytest.approx([3, -1])
    # With a ridge of 2 the first weight is 4 / (2 + 2).
    found = orthogonal_matching_pursuit(g, target, 1, ridge=2.0, backend=backend)
    assert found.weights.tolist() == pytest.approx([1])
    # The unit rows' cosines with the target are as 3, 1, 4 / sqrt(2).
    found = frank_wolfe(g, target, 1, backend=backend)
    assert (found.indices.tolist(), found.weights.tolist()) == ([0], pytest.approx([3]))
    # From the first row the geodesics to the second and the third are the same: without the third, nothing depends on
    # rounding.
    found = frank_wolfe(g[:2], target, 2, backend=backend)
    assert found.indices.tolist() == [0, 1]
    assert found.weights.tolist() == pytest.approx([3, 0.5])


def test_cases_worked_by_hand(backend: str) -> None:
    check_by_hand(backend, "cpu")


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "clustered"])
def test_is_the_definition(backend: str, kind: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    name = backend.partition("-")[0]
    k = max(1, size[1] // 2) if dtype == torch.float64 else 12
    check_pursuit(name, "cpu", kind, dtype, size, min(k, 20))
    if size[1] > 2:  # on a circle every geodesic is the same
        check_frank_wolfe(name, "cpu", kind, dtype, size, 12)


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
@pytest.mark.parametrize("kind", ["scaled", "repeated"])
def test_rows_of_all_magnitudes_duplicates_and_zeros(backend: str, kind: str) -> None:
    check_pursuit("cpu", "cpu", kind, torch.float64, (97, 40), 30)
    check_pursuit("cpu", "cpu", kind, torch.float32, (97, 40), 30)
    check_frank_wolfe("cpu", "cpu", kind, torch.float64, (97, 40), 20)


def picks_by_lstsq(g: np.ndarray, target: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """As GradMatch has it: lstsq, and nnls if that gives a weight below 0."""
    picks: list[int] = []
    residual, weights = target, np.zeros(0)
    for _ in range(k):
        score = g @ residual
        score[picks] = -np.inf
        picks.append(int(score.argmax()))
        weights = np.linalg.lstsq(g[picks].T, target, rcond=None)[0]
        if weights.min() < 0:
            weights = nnls(g[picks].T, target)[0]
        residual = target - g[picks].T @ weights
    return picks, weights


@pytest.mark.parametrize("whole", [True, False])
def test_is_gradmatch(backend: str, whole: bool) -> None:
    g = make_rows("normal", 200, 30, seed=1)
    target = g.sum(0) if whole else normal(30, 1, seed=10)[:, 0]
    picks, weights = picks_by_lstsq(g.numpy(), target.numpy(), 20)
    found = orthogonal_matching_pursuit(g, target, 20, backend=backend)
    kept = weights > 0
    assert whole or not kept.all()  # weights did come to 0 in the second case
    assert found.indices.tolist() == np.array(picks)[kept].tolist()
    np.testing.assert_allclose(found.weights.numpy(), weights[kept], rtol=1e-8)
    assert len(found.residual_norms) == 20


@pytest.mark.parametrize("ridge", [0.0, 5.0])
def test_weights_are_those_of_nnls(backend: str, ridge: float) -> None:
    g = make_rows("clustered", 90, 25, seed=1)
    target = make_target(g, False, seed=4)
    found = orthogonal_matching_pursuit(g, target, 20, ridge=ridge, backend=backend)
    chosen = g[found.indices]
    matrix = torch.cat([chosen.T, ridge**0.5 * torch.eye(len(chosen), dtype=torch.float64)])
    wanted, _ = nnls(matrix.numpy(), torch.cat([target, torch.zeros(len(chosen))]).numpy())
    np.testing.assert_allclose(found.weights.numpy(), wanted, rtol=1e-7)


def test_geodesic_steps_in_plain_numpy(backend: str) -> None:
    """Algorithm 1 of the paper, line by line."""
    rows = make_rows("normal", 60, 12, seed=3).numpy()
    total = rows.sum(0)
    units, goal = rows / np.linalg.norm(rows, axis=1, keepdims=True), total / np.linalg.norm(total)
    w, y = np.zeros(60), np.zeros(12)
    for _ in range(15):
        d = goal - (goal @ y) * y
        d_rows = units - np.outer(units @ y, y)
        length = np.linalg.norm(d_rows, axis=1)
        n = int((d_rows @ d / np.where(length > 1e-6, length, np.inf)).argmax())
        zeta0, zeta1, zeta2 = goal @ units[n], goal @ y, units[n] @ y
        gamma = (zeta0 - zeta1 * zeta2) / ((zeta0 - zeta1 * zeta2) + (zeta1 - zeta0 * zeta2))
        w *= 1 - gamma
        w[n] += gamma
        y = w @ units
        w, y = w / np.linalg.norm(y), y / np.linalg.norm(y)
    w *= np.linalg.norm(total) / np.linalg.norm(rows, axis=1) * (y @ goal)
    found = frank_wolfe(rows, total, 15, backend=backend)
    dense = np.zeros(60)
    dense[found.indices.numpy()] = found.weights.numpy()
    np.testing.assert_allclose(dense, w, rtol=1e-9, atol=1e-12)
    assert float(found.residual_norms[-1]) == pytest.approx(np.linalg.norm(total - w @ rows), rel=1e-9)


# --- promises -------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=12),
    st.lists(st.integers(-5, 5), min_size=4, max_size=4),
    st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=80, deadline=None)
def test_conditions_of_the_optimum(rows: list[list[int]], goal: list[int], ridge: float) -> None:
    """Small whole numbers: zeros, duplicates, dependent rows and ties throughout."""
    g, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(goal, dtype=torch.float64)
    scale = 1 + float(target.norm()) * (1 + float(g.norm()))
    for nonnegative in (True, False):
        found = orthogonal_matching_pursuit(g, target, len(g), nonnegative=nonnegative, ridge=ridge)
        assert len(found.indices.unique()) == len(found.indices) <= len(found.residual_norms) <= len(g)
        residual = target - g[found.indices].T @ found.weights
        rest = g @ residual
        # The weights are those of a least-squares fit, and with all rows allowed nothing is left to gain.
        assert (
            (rest[found.indices] - ridge * found.weights).abs().max() <= 1e-9 * scale
            if len(found.indices)
            else True
        )
        others = torch.ones(len(g), dtype=torch.bool)
        others[found.indices] = False
        left = rest[others] if nonnegative else rest[others].abs()
        if ridge == 0 and others.any():
            assert float(left.max()) <= 1e-7 * scale
        if nonnegative:
            assert (found.weights > 0).all()
        if len(found.residual_norms):
            assert float(found.residual_norms[-1]) == pytest.approx(float(residual.norm()), abs=1e-9 * scale)
        if ridge == 0:
            assert (found.residual_norms.diff() <= 1e-9 * scale).all()
    found = frank_wolfe(g, target, len(g))
    assert (found.weights > 0).all()
    assert (found.residual_norms.diff() <= 1e-9 * scale).all()
    if len(found.indices):
        sums = g[found.indices].T @ found.weights
        assert float(found.residual_norms[-1]) == pytest.approx(
            float((target - sums).norm()), abs=1e-7 * scale
        )


def check_ties(backend: str, device: str, distinct_rows: int, k: int) -> None:
    """A duplicate may lie anywhere in a vector or a block of rows."""
    distinct = make_rows("normal", distinct_rows, distinct_rows + 10, seed=2)
    order = torch.randperm(5 * distinct_rows, generator=torch.Generator().manual_seed(0)) % distinct_rows
    g, target = distinct[order].to(device), distinct.sum(0).to(device)
    first = {int((order == i).nonzero()[0]) for i in range(distinct_rows)}
    for nonnegative in (True, False):
        found = orthogonal_matching_pursuit(g, target, k, nonnegative=nonnegative, backend=backend)
        assert len(found.indices) == k
        assert set(found.indices.tolist()) <= first
    assert set(frank_wolfe(g, target, k, backend=backend).indices.tolist()) <= first


def test_ties_go_to_the_lowest_index(backend: str) -> None:
    check_ties(backend, "cpu", 40, 30)


def check_ends(backend: str, device: str) -> None:
    g = make_rows("normal", 80, 6).to(device)
    zero, one = torch.zeros(6, device=device), torch.ones(6, device=device)
    for nonnegative in (True, False):
        found = orthogonal_matching_pursuit(g, g.sum(0), 80, nonnegative=nonnegative, backend=backend)
        assert len(found.indices) == 6
        assert float(found.residual_norms[-1]) <= 1e-12 * float(g.sum(0).norm())
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        for rows, target in ((g, zero), (0 * g, one), (-g.abs(), one)):
            nothing = solve(rows, target, 5, backend=backend)
            assert [len(nothing.indices), len(nothing.weights), len(nothing.residual_norms)] == [0, 0, 0]


def test_ends_where_the_residual_vanishes(backend: str) -> None:
    check_ends(backend, "cpu")


def check_nearly_dependent(backend: str, device: str, count: int) -> None:
    """Without the ridge; a ridge makes any rows independent."""
    g = make_rows("normal", count, count + 10)
    g = torch.cat([g, g * (1 + 1e-9)]).to(device)
    target = make_target(g.cpu(), True).to(device)
    found = orthogonal_matching_pursuit(g, target, 2 * count, nonnegative=False, backend=backend)
    assert sorted((found.indices % count).tolist()) == list(range(count))
    both = orthogonal_matching_pursuit(g, target, 2 * count, ridge=1.0, backend=backend)
    assert sorted(both.indices.tolist()) == list(range(2 * count))


def test_nearly_dependent_rows_are_passed_over(backend: str) -> None:
    check_nearly_dependent(backend, "cpu", 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    g = make_rows("clustered", 5000, 70).to(dtype)
    target = make_target(g, False)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(
            [
                kernels.cpu.orthogonal_matching_pursuit(g, target, 50),
                kernels.cpu.orthogonal_matching_pursuit(g, target, 50, memory_budget=0),
                kernels.cpu.frank_wolfe(g, target, 50),
            ]
        )
    for again in results[1:]:
        for one, other in zip(results[0], again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_less_memory(
    module: ModuleType, device: str, size: tuple[int, int], k: int, columns: Sequence[int]
) -> None:
    """With room for so many columns; `k` of them are wanted."""
    g = make_rows("clustered", *size)
    target = make_target(g, False).to(device)
    g = g.to(device)
    budgets = [8 * size[0] * count for count in columns]
    for nonnegative in (True, False):
        options: dict[str, Any] = {"nonnegative": nonnegative, "ridge": 0.1}
        many = module.orthogonal_matching_pursuit(g, target, k, **options)
        for budget in budgets:
            few = module.orthogonal_matching_pursuit(g, target, k, memory_budget=budget, **options)
            check_same(Pursuit(*few), Pursuit(*(part.cpu() for part in many)), target, torch.float64)
    many = module.frank_wolfe(g, target, k)
    for budget in budgets:
        few = module.frank_wolfe(g, target, k, memory_budget=budget)
        assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))


def test_less_memory_gives_the_same() -> None:
    check_less_memory(kernels.cpu, "cpu", (97, 300), 40, [0, 3, 25])


def test_permuted_rows_give_permuted_picks(backend: str) -> None:
    g = make_rows("normal", 150, 40)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        plain = solve(g, g.sum(0), 20, backend=backend)
        moved = solve(g[order], g.sum(0), 20, backend=backend)
        assert order[moved.indices].tolist() == plain.indices.tolist()
        torch.testing.assert_close(moved.weights, plain.weights, rtol=1e-9, atol=0)


def test_a_gram_matrix_in_double_keeps_the_weights_of_rows_that_are_alike() -> None:
    """Rows in float32 that are 1e-3 apart: squares in float32 would leave their weights no digit."""
    g = (normal(1, 60) + 1e-3 * normal(50, 60, seed=1)).float()
    target = g.double().sum(0)
    found = orthogonal_matching_pursuit(g, target, 30, nonnegative=False, backend="cpu")
    wanted = np.linalg.lstsq(g[found.indices].double().numpy().T, target.numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.weights.double().numpy(), wanted, rtol=1e-5)


def check_half_types(backend: str, device: str) -> None:
    target = torch.ones(30, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        g = make_rows("normal", 40, 30).to(device, dtype)
        for solve in (orthogonal_matching_pursuit, frank_wolfe):
            half = solve(g, target, 10, backend=backend)
            single = solve(g.float(), target, 10, backend=backend)
            assert torch.equal(half.indices, single.indices)
            assert torch.equal(half.weights, single.weights)


def test_half_types_compute_with_their_exact_values(backend: str) -> None:
    check_half_types(backend, "cpu")


def check_views(backend: str, device: str) -> None:
    g = make_rows("normal", 20, 25).float().to(device)
    target = normal(25, 1)[:, 0].to(device)
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        wanted = solve(g, target, 4, backend=backend)
        wide, both = torch.cat([g, g], 1)[:, 3:28].roll(3, 1), torch.stack([target, target], 1)
        for rows in (g.T.contiguous().T, wide, torch.cat([g, g], 1)[:, :25], torch.cat([g, g])[:20]):
            found = solve(rows, both[:, 1], 4, backend=backend)
            assert torch.equal(found.indices, wanted.indices)
            assert torch.equal(found.weights, wanted.weights)


def test_views_and_arrays(backend: str) -> None:
    g, target = make_rows("normal", 60, 25).float(), normal(25, 1)[:, 0]
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        wanted = solve(g, target, 8, backend=backend)
        wide = torch.stack([g, g], 2)[:, :, 0]
        for rows in (
            g.T.contiguous().T,
            wide,
            torch.cat([g, g], 1)[:, :25],
            g.numpy(),
            g.clone().requires_grad_(),
        ):
            for goal in (target, torch.stack([target, target], 1)[:, 0], target.tolist(), target.numpy()):
                found = solve(rows, goal, 8, backend=backend)
                assert torch.equal(found.indices, wanted.indices)
                assert torch.equal(found.weights, wanted.weights)


def check_opcheck_and_compile(name: str | None, device: str, k: int = 9) -> None:
    g, target = make_rows("normal", 12, 5).float().to(device), normal(5, 1)[:, 0].to(device)
    pursue, wolfe = (
        torch.ops.flashcoreset.orthogonal_matching_pursuit.default,
        torch.ops.flashcoreset.frank_wolfe.default,
    )
    torch.library.opcheck(pursue, (g, target, k, True, 0.0, name))
    torch.library.opcheck(pursue, (g.double(), target, min(k, 4), False, 0.5, name))
    torch.library.opcheck(wolfe, (g.half(), target, min(k, 4), name))

    def weighted(g: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        first = orthogonal_matching_pursuit(g * 2, target, k, backend=name)
        second = frank_wolfe(g * 2, target, k, backend=name)
        return first.indices * first.weights, second.weights

    torch._dynamo.reset()
    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")(g, target)
    for got, wanted in zip(compiled, weighted(g, target), strict=True):
        assert got.shape == (k,)  # padded, since a shape that depends on values would break the graph
        assert torch.equal(got[: len(wanted)], wanted)
        assert (got[len(wanted) :] == 0).all()


@pytest.mark.parametrize("name", ["torch", "cpu", None])
def test_opcheck_and_compile(name: str | None) -> None:
    check_opcheck_and_compile(name, "cpu")
    meta = orthogonal_matching_pursuit(G.to("meta"), GOAL.to("meta"), 3)
    assert (meta.indices.is_meta, meta.weights.shape) == (True, (3,))


LONG_CALL = """
import torch
from flashcoreset.pursuit import frank_wolfe, orthogonal_matching_pursuit
g = torch.randn(60_000, 1000, generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
try:
    {name}(g, g.sum(0), 60_000, backend="cpu")
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(len(orthogonal_matching_pursuit(g[:50], g.sum(0), 5, backend="cpu").indices), flush=True)
"""


@pytest.mark.parametrize("name", ["orthogonal_matching_pursuit", "frank_wolfe"])
def test_ctrl_c_ends_the_call_within_a_second(name: str) -> None:
    code = LONG_CALL.format(name=name)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.7)  # well inside the call
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - begin < 1
        assert process.stdout.readline() == "5\n"
        assert process.wait(timeout=30) == 0


# --- bad input ------------------------------------------------------------------------------------


def check_bad_values(backend: str, device: str, value: float, dtype: torch.dtype) -> None:
    g, target = make_rows("normal", 9, 70).to(device, dtype), torch.ones(70, device=device)
    said = "NaN" if math.isnan(value) else str(value)
    bad, bad_target = g.clone(), target.clone()
    bad[[4, 6], 66] = value
    bad_target[[3, 50]] = value
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        with pytest.raises(ValueError, match=rf"^g must be finite, got {said} at row 4, column 66$"):
            solve(bad, target, 3, backend=backend)
        with pytest.raises(ValueError, match=rf"^target must be finite, got {said} at position 3$"):
            solve(g, bad_target, 3, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(backend: str, value: float, dtype: torch.dtype) -> None:
    check_bad_values(backend, "cpu", value, dtype)


def check_overflow(backend: str, device: str) -> None:
    g = make_rows("normal", 5, 4).to(device)
    one = torch.ones(4, dtype=torch.float64, device=device)
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        with pytest.raises(ValueError, match=r"weights of up to .* overflow torch.float32"):
            solve(1e-30 * g.float(), 1e30 * one, 2, backend=backend)


def test_overflow_is_refused(backend: str) -> None:
    check_overflow(backend, "cpu")


def check_weights_that_round_to_zero(backend: str, device: str) -> None:
    """A weight of 1e-50 is none in float32, so its row is no pick; in float64 it is."""
    for dtype, expected in ((torch.float32, [1]), (torch.float64, [0, 1])):
        g = torch.tensor([[1e30, 0.0], [0.0, 1e-30]], dtype=dtype, device=device)
        target = torch.tensor([1e-20, 1e-20], dtype=torch.float64, device=device)
        for solve in (orthogonal_matching_pursuit, frank_wolfe):
            found = solve(g, target, 2, backend=backend)
            assert sorted(found.indices.tolist()) == expected
            assert found.weights.all()


def test_weights_that_round_to_zero(backend: str) -> None:
    check_weights_that_round_to_zero(backend, "cpu")


G, GOAL = torch.ones(4, 3), torch.ones(3)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "g int": ((G.int(), GOAL, 1), {}, TypeError, "g must have dtype float16, .*, got int32"),
    "g list": (([[1.0]], GOAL, 1), {}, TypeError, "g must be a torch.Tensor, .*, got list"),
    "g 1-d": ((GOAL, GOAL, 1), {}, ValueError, r"g must have 2 dimensions, got shape \(3,\)"),
    "g empty": ((G[:0], GOAL, 1), {}, ValueError, r"g must have at least 1 row and 1 column, got shape \(0, 3\)"),
    "target long": ((G, torch.ones(4), 1), {}, ValueError, r"target must have shape \[3\], got \(4,\)"),
    "target 2-d": ((G, GOAL[None], 1), {}, ValueError, r"target must have shape \[3\], got \(1, 3\)"),
    "target bool": ((G, GOAL.bool(), 1), {}, TypeError, "target must hold real numbers, got dtype bool"),
    "target None": ((G, None, 1), {}, TypeError, "target must be a torch.Tensor, .*, got NoneType"),
    "target elsewhere": ((G, GOAL.to("meta"), 1), {}, ValueError, "target is on device meta, but g is on cpu"),
    "k 0": ((G, GOAL, 0), {}, ValueError, "k must be between 1 and the number of rows of g, 4, got 0"),
    "k 5": ((G, GOAL, 5), {}, ValueError, "k must be between 1 and the number of rows of g, 4, got 5"),
    "k float": ((G, GOAL, 2.0), {}, TypeError, "k must be an int, got 2.0"),
    "ridge -1": ((G, GOAL, 1), {"ridge": -1}, ValueError, "ridge must be >= 0, got -1.0"),
    "ridge inf": ((G, GOAL, 1), {"ridge": math.inf}, ValueError, "ridge must be finite, got inf"),
    "ridge str": ((G, GOAL, 1), {"ridge": "1"}, TypeError, "ridge must be a number, got '1'"),
    "sign": ((G, GOAL, 1), {"nonnegative": 1}, TypeError, "nonnegative must be a bool, got 1 of type int"),
    "backend": ((G, GOAL, 1), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, options, error, words = BAD[name]
    with pytest.raises(error, match=words):
        orthogonal_matching_pursuit(*arguments, **options)
    if not options:
        with pytest.raises(error, match=words):
            frank_wolfe(*arguments)


def test_the_compiled_call_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"target: expected shape \(3,\), got \(4,\)"):
        kernels.cpu.orthogonal_matching_pursuit(G, torch.ones(4).double(), 1)
    with pytest.raises(TypeError, match="target: expected dtype float64, got float32"):
        kernels.cpu.frank_wolfe(G, GOAL, 1)
    with pytest.raises(TypeError, match="g: expected dtype float32 or float64, got float16"):
        kernels.cpu.frank_wolfe(G.half(), GOAL.double(), 1)


def check_needs_the_cpu_module(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernels of a GPU find the picks, the CPU module fits their weights."""
    monkeypatch.setattr(native, "failure", lambda: "no compiled CPU module could be loaded")
    said = f"backend '{backend}': of pursuit the weights are fitted on the host, .* no compiled CPU module"
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        with pytest.raises(fc.BackendUnavailableError, match=said):
            solve(G.to(device), GOAL.to(device), 1, backend=backend)


def check_match_gradients(backend: str, device: str) -> None:
    """By rows, with Adam's history and groups, and by the directions of zeroth-order gradients."""
    g, groups = normal(24, 300, seed=1), torch.arange(24) % 2
    state = fc.AdamState(0.1 * normal(1, 300, seed=3)[0], normal(1, 300, seed=4)[0].square(), 5)
    there = fc.AdamState(state.m.to(device), state.v.to(device), 5)
    for method in ("omp", "frank_wolfe"):
        wanted = fc.match_gradients(
            g, 5, normalize=state, top=40, method=method, groups=groups, backend="cpu"
        )
        found = fc.match_gradients(
            g.to(device), 5, normalize=there, top=40, method=method, groups=groups.to(device), backend=backend
        )
        assert found.indices.tolist() == wanted.indices.tolist()
        torch.testing.assert_close(found.weights.cpu(), wanted.weights, rtol=1e-9, atol=0)
        assert found.objective == pytest.approx(wanted.objective, rel=1e-9)
        shared = fc.LowRankGradients(normal(9, 3), seed=5, numel=2_000, backend="cpu")
        wanted = fc.match_gradients(shared, 3, method=method, backend="cpu")
        shared = fc.LowRankGradients(normal(9, 3).to(device), seed=5, numel=2_000, backend=backend)
        found = fc.match_gradients(shared, 3, method=method, backend=backend)
        assert found.indices.tolist() == wanted.indices.tolist()
        torch.testing.assert_close(found.weights.cpu(), wanted.weights, rtol=1e-6, atol=0)


class Allocations(TorchDispatchMode):
    """The bytes of the largest of torch's storages that come into being inside, and of all that live at the same time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.tensors = collections.Counter(tensor.untyped_storage().data_ptr() for tensor in known)
        self.largest = self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if not self.tensors[storage.data_ptr()]:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                self.largest = max(self.largest, storage.nbytes())
            self.tensors[storage.data_ptr()] += 1
            weakref.finalize(leaf, self._ends, storage.data_ptr(), storage.nbytes())
        return out

    def _ends(self, place: int, size: int) -> None:
        self.tensors[place] -= 1
        if not self.tensors[place]:
            self.now -= size


def check_memory(module: ModuleType, device: str) -> None:
    """Columns within the budget, numbers per row and column, and nothing of the size of the rows."""
    b, d, k, columns = 60, 2_000, 5, 7
    g, target = make_rows("normal", b, d).to(device), torch.ones(d, dtype=torch.float64, device=device)
    for solve in (module.orthogonal_matching_pursuit, module.frank_wolfe):
        for budget in (8 * b * columns, 0):
            with Allocations(g, target) as seen:
                solve(g, target, k, memory_budget=budget)
            assert seen.largest <= max(8 * d, 8 * b * columns)
        with Allocations(g, target) as seen:  # much is allowed, little is needed
            solve(g, target, k, memory_budget=2**40)
        assert seen.largest <= max(8 * d, 8 * b * (2 * k + 12))
        name, orthogonal = module.__name__.rpartition(".")[2], solve is module.orthogonal_matching_pursuit
        expected = pursuit_bytes(b, d, k, g.dtype, orthogonal, name) - 2**20
        assert seen.peak <= expected <= 2.5 * seen.peak


def check_interrupt(module: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is handled between two steps."""
    g = make_rows("normal", 20, 9).to(device)
    launchers, calls = module._PURSUIT, [0]

    def products(*arguments: Any) -> None:
        launchers.products(*arguments)
        calls[0] += 1
        if calls[0] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "_PURSUIT", replace(launchers, products=products))
    for solve in (module.orthogonal_matching_pursuit, module.frank_wolfe):
        calls[0] = 0
        with pytest.raises(KeyboardInterrupt):
            solve(g, g.sum(0), 9, memory_budget=0)
        assert calls[0] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU both are there")
def test_unavailable_backends_say_why() -> None:
    with pytest.raises(fc.BackendUnavailableError, match=r"backend 'cuda': .*(built without|cannot be used)"):
        orthogonal_matching_pursuit(G, GOAL, 1, backend="cuda")
