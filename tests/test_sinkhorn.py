"""Batched Sinkhorn against its definition, against POT, and against its promises."""

from __future__ import annotations

import functools
import math
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from checks.sinkhorn import points, weights
from conftest import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset.sinkhorn.schedule import Schedule

# Compiling POT's sources warns of their escape sequences.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot

INF = math.inf
METRICS = ["sqeuclidean", "euclidean", "l1", "cosine"]
SIZES = [(1, 1), (1, 7), (33, 97), (130, 75)]
MARGINALS: dict[str, Any] = {
    "balanced": None,
    "unbalanced": 0.7,
    "semi": (None, 0.3),
    "semi rows": (0.4, None),
}

# The L1 distance of a plan of mass 1 to the float64 definition's, both stopped at tol. Worst seen: float32 3.1e-6
# (float32 costs differ from exact ones by 1e-7 of the largest, and reg is down to a hundredth of that), float64 2e-10.
PLAN = {torch.float32: 2e-5, torch.float64: 1e-9}


def costs(n: int, m: int, seed: int = 0, dtype: torch.dtype = torch.float64, batch: int = 1) -> torch.Tensor:
    """Squared distances of two sets in space, at most 1."""
    cost = torch.cdist(points(batch, n, 3, seed), points(batch, m, 3, seed + 1)) ** 2
    return (cost / cost.max()).to(dtype)


def check_marginals(transport: fc.Transport, a: torch.Tensor, b: torch.Tensor, slack: float) -> None:
    """`error` is the error of the plan."""
    plan = transport.plan().double()
    shown = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)
    assert torch.allclose(shown, transport.error.double(), rtol=0, atol=slack)


@functools.cache
def problem(size: tuple[int, int], metric: str) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Two problems in float32, and their largest distance."""
    n, m = size
    if metric == "precomputed":
        return costs(n, m, 3, torch.float32, batch=2), None, 1.0
    x, y = points(2, n, 4, 1, torch.float32), points(2, m, 4, 2, torch.float32)
    return x, y, float(kernels.torch.pairwise(x[0], y[0], metric="euclidean").max())


@functools.cache
def definition(
    size: tuple[int, int], metric: str, marginal: str, reg: float
) -> tuple[fc.Transport, torch.Tensor]:
    """The solution in float64 and its plan."""
    x, y, largest = problem(size, metric)
    found = fc.sinkhorn(
        x.double(), None if y is None else y.double(), weights(2, size[0], 4), weights(2, size[1], 5), metric=metric,
        reg=reg * largest, reg_marginal=MARGINALS[marginal], tol=1e-11, max_iter=20_000, backend="torch",
    )  # fmt: skip
    return found, found.plan()


# Every build of the CPU kernels; the reference is the definition itself, at one size that takes several blocks of rows.
@pytest.mark.parametrize(
    ("backend", "size"),
    [*((build, size) for build in BACKENDS if build != "torch" for size in SIZES), ("torch", (33, 97))],
    ids=str,
    indirect=["backend"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("metric", [*METRICS, "precomputed"])
def test_follows_the_definition(
    size: tuple[int, int], metric: str, marginal: str, dtype: torch.dtype, backend: str
) -> None:
    x, y, largest = problem(size, metric)
    x, y = x.to(dtype), None if y is None else y.to(dtype)
    a, b = weights(2, size[0], 4), weights(2, size[1], 5)
    tol = 1e-6 if dtype == torch.float32 else 1e-9
    for reg in (0.05, 0.02):
        expected, plan = definition(size, metric, marginal, reg)
        # The error that tol leaves: a relaxed marginal lets the mass creep by a factor of reg / rho per iteration.
        left = 10 * tol * (1 if marginal == "balanced" else 1 + 0.7 / (reg * largest))
        for budget in (2**28, 0):
            found = fc.sinkhorn(
                x, y, a, b, reg=reg * largest, metric=metric, reg_marginal=MARGINALS[marginal], tol=tol,
                max_iter=20_000, backend=backend, memory_budget=budget,
            )  # fmt: skip
            assert found.converged.all()
            allowed = PLAN[dtype] * plan.sum((1, 2)) + left
            assert ((found.plan().double() - plan).abs().sum((1, 2)) <= allowed).all()
            assert torch.allclose(found.value.double(), expected.value, rtol=1e-5, atol=largest * 1e-6)
            assert (
                (found.transport_cost.double() - expected.transport_cost).abs() <= largest**2 * allowed
            ).all()
            if marginal == "balanced":
                check_marginals(found, a, b, 2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reg", [0.05, 0.01])
def test_plans_of_pot(reg: float, dtype: torch.dtype, backend: str) -> None:
    cost, a, b = costs(97, 130), weights(1, 97, 1), weights(1, 130, 2)
    found = fc.sinkhorn(cost[0].to(dtype), None, a[0], b[0], reg=reg, metric="precomputed", backend=backend,
                        tol=1e-6 if dtype == torch.float32 else 1e-10, max_iter=10_000)  # fmt: skip
    peer = ot.sinkhorn(a[0].numpy(), b[0].numpy(), cost[0].numpy(), reg, numItermax=100_000, stopThr=1e-13)
    assert float((found.plan().double() - torch.from_numpy(peer)).abs().sum()) <= (
        1e-4 if dtype == torch.float32 else 1e-7
    )
    # POT leaves KL(P | a x b) to its caller.
    entropy = float(np.sum(peer * np.log(peer / np.outer(a, b))))
    assert math.isclose(
        float(found.value), float((peer * cost[0].numpy()).sum()) + reg * entropy, rel_tol=1e-5
    )
    check_marginals(found, a[0], b[0], 2e-7)


@pytest.mark.parametrize("rho", [0.5, 5.0])
def test_unbalanced_plans_of_pot(rho: float, backend: str) -> None:
    cost, a, b = costs(40, 60), weights(1, 40, 1)[0], 1.5 * weights(1, 60, 2)[0]
    found = fc.sinkhorn(cost[0], None, a, b, reg=0.05, metric="precomputed", reg_marginal=rho, backend=backend,
                        tol=1e-12, max_iter=50_000)  # fmt: skip
    peer = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), cost[0].numpy(), 0.05, rho, reg_type="kl", numItermax=100_000, stopThr=1e-14
    )
    assert float((found.plan() - torch.from_numpy(peer)).abs().sum()) <= 1e-7
    # At the optimum the primal objective is the dual one.
    kl = lambda p, q: float((p * (p / q).log() - p + q).sum())  # noqa: E731
    plan = torch.from_numpy(peer)
    primal = float((plan * cost[0]).sum()) + 0.05 * kl(plan, a[:, None] * b)
    primal += rho * (kl(plan.sum(1), a) + kl(plan.sum(0), b))
    assert math.isclose(float(found.value), primal, rel_tol=1e-7)


def far_apart(data: str) -> torch.Tensor:
    """Costs [60, 70] of points, the largest of them 1."""
    g = torch.Generator().manual_seed(3)
    if data == "uniform":
        x, y = torch.rand(60, 3, generator=g), torch.rand(70, 3, generator=g)
    else:
        centres = 3 * torch.randn(8, 5, generator=g)
        x, y = (
            centres[torch.randint(8, (size,), generator=g)] + torch.randn(size, 5, generator=g)
            for size in (60, 70)
        )
    cost = torch.cdist(x, y) ** 2
    return cost / cost.max()


@functools.cache
def log_domain_value(data: str, reg: float) -> float:
    """By POT in float64."""
    cost = far_apart(data).double().numpy()
    a, b = np.full(60, 1 / 60), np.full(70, 1 / 70)
    plan = ot.bregman.sinkhorn_log(a, b, cost, reg, numItermax=20_000, stopThr=1e-5, warn=False)
    entropy = float(np.sum(np.where(plan > 0, plan * np.log(plan / np.outer(a, b) + 1e-300), 0)))
    return float((plan * cost).sum()) + reg * entropy


# The reference takes minutes if it takes thousands of iterations.
@pytest.mark.parametrize("data", ["uniform", "clusters"])
@pytest.mark.parametrize(
    ("backend", "reg", "error"),
    [
        *(
            (build, *limits)
            for build in BACKENDS
            if build != "torch"
            for limits in ((1e-3, 5e-5), (1e-4, 5e-4))
        ),
        ("torch", 1e-3, 5e-5),
    ],
    indirect=["backend"],
)
def test_small_regularisation(reg: float, error: float, data: str, backend: str) -> None:
    cost = far_apart(data)
    found = fc.sinkhorn(cost, reg=reg, metric="precomputed", tol=error, max_iter=5000, backend=backend)
    a, b = torch.full((60,), 1 / 60, dtype=torch.float64), torch.full((70,), 1 / 70, dtype=torch.float64)
    assert found.converged
    assert torch.isfinite(found.f).all()
    assert torch.isfinite(found.g).all()
    check_marginals(found, a, b, 2e-7)
    assert math.isclose(float(found.value), log_domain_value(data, reg), rel_tol=1e-3)


def test_textbook_iterations_with_tol_0(backend: str) -> None:
    cost, a, b = costs(30, 50), weights(1, 30, 1)[0], weights(1, 50, 2)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fc.sinkhorn(
            cost[0], None, a, b, reg=0.02, metric="precomputed", tol=0, max_iter=7, backend=backend
        )
    assert int(found.iterations) == 7
    kernel = (-cost[0] / 0.02).exp()
    v = b  # g = 0
    for _ in range(7):
        u = a / (kernel @ v)
        v = b / (kernel.mT @ u)
    expected = u[:, None] * kernel * v
    assert float((found.plan() - expected).abs().sum()) <= 1e-12
    check_marginals(found, a, b, 1e-12)


@pytest.mark.parametrize("metric", ["sqeuclidean", "l1", "precomputed"])
@pytest.mark.parametrize("marginal", MARGINALS)
def test_ragged_batches_are_their_problems(marginal: str, metric: str, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    count, most = 9, 60
    rows, columns = (torch.randint(1, most + 1, (count,), generator=g) for _ in range(2))
    rows[0], columns[1], rows[2] = 1, 1, most
    if metric == "precomputed":
        x, y = costs(most, most, 5, torch.float32, count), None
    else:
        x, y = points(count, most, 3, 5, torch.float32), points(count, most, 3, 6, torch.float32)
    a, b = (torch.rand(count, most, generator=g, dtype=torch.float64) + 0.1 for _ in range(2))
    for p in range(count):
        a[p] /= a[p, : rows[p]].sum()
        b[p] /= b[p, : columns[p]].sum()
        a[p, rows[p] :], b[p, columns[p] :] = math.nan, math.nan
        x[p, rows[p] :] = math.nan
        if y is None:
            x[p, :, columns[p] :] = math.nan
        else:
            y[p, columns[p] :] = math.nan
    options: dict[str, Any] = {
        "reg": 0.1,
        "metric": metric,
        "reg_marginal": MARGINALS[marginal],
        "backend": backend,
    }
    batch = fc.sinkhorn(x, y, a, b, x_lengths=rows, y_lengths=columns, max_iter=5000, **options)
    v, w = torch.rand(count, most, 2, generator=g), torch.rand(count, most, generator=g)
    plan, applied, back = batch.plan(), batch.apply(v), batch.apply_transpose(w)
    for p in range(count):
        n, m = int(rows[p]), int(columns[p])
        one = fc.sinkhorn(
            x[p, :n, :m] if y is None else x[p, :n], None if y is None else y[p, :m], a[p, :n], b[p, :m],
            max_iter=5000, **options,
        )  # fmt: skip
        for name in ("value", "transport_cost", "error", "iterations", "converged"):
            assert torch.equal(getattr(batch, name)[p], getattr(one, name)), name
        assert torch.equal(batch.f[p, :n], one.f)
        assert torch.equal(batch.g[p, :m], one.g)
        assert torch.equal(plan[p, :n, :m], one.plan())
        assert torch.allclose(applied[p, :n], one.apply(v[p, :m]), atol=1e-7)
        assert torch.allclose(back[p, :m], one.apply_transpose(w[p, :n]), atol=1e-7)
        for padded in (
            batch.f[p, n:],
            batch.g[p, m:],
            plan[p, n:],
            plan[p, :, m:],
            applied[p, n:],
            back[p, m:],
        ):
            assert not padded.any()


def test_weights_of_a_ragged_batch_keep_the_bits_of_their_problem(backend: str) -> None:
    """The weights' sums must not depend on the padding, which torch's sums do: they add blocks, whose places follow the length."""
    g = torch.Generator().manual_seed(3)
    for n, m, pad in ((29, 33, 3), (130, 97, 31), (200, 160, 57)):
        x, y = points(1, n, 2, n, torch.float32), points(1, m, 2, m, torch.float32)
        a, b = torch.rand(1, n, generator=g), torch.rand(1, m, generator=g)
        a, b = a / a.sum(), b / b.sum()
        options: dict[str, Any] = {"reg": 0.2, "max_iter": 3, "tol": 0, "backend": backend}
        alone = fc.sinkhorn(x, y, a, b, **options)
        longer = [torch.nn.functional.pad(t, (0, pad)) for t in (a, b)]
        rows = [torch.nn.functional.pad(t, (0, 0, 0, pad)) for t in (x, y)]
        padded = fc.sinkhorn(*rows, *longer, x_lengths=[n], y_lengths=[m], **options)
        assert torch.equal(padded.f[:, :n], alone.f)
        assert torch.equal(padded.g[:, :m], alone.g)
        assert torch.equal(padded.value, alone.value)


def test_a_relaxed_divergence_ignores_the_padding_of_weights() -> None:
    x, y = points(2, 5, 2, 0, torch.float64), points(2, 4, 2, 1, torch.float64)
    a, b = torch.full((2, 5), 0.3, dtype=torch.float64), torch.full((2, 4), 0.2, dtype=torch.float64)
    options: dict[str, Any] = {"reg": 0.5, "reg_marginal": 1.0, "tol": 1e-10, "max_iter": 5000}
    alone = fc.sinkhorn_divergence(x[1, :3], y[1, :2], a[1, :3], b[1, :2], **options)
    a[1, 3:], b[1, 2:] = math.nan, math.nan
    found = fc.sinkhorn_divergence(x, y, a, b, x_lengths=[5, 3], y_lengths=[4, 2], **options)
    assert torch.isfinite(found).all()
    assert float(found[1]) == pytest.approx(float(alone), rel=1e-9)


def test_nothing_depends_on_the_number_of_threads() -> None:
    single = (points(1, 700, 5, 0, torch.float32)[0], points(1, 500, 5, 1, torch.float32)[0])
    batch = (points(40, 70, 3, 2, torch.float32), points(40, 80, 3, 3, torch.float32))
    before = torch.get_num_threads()
    try:
        for x, y in (single, batch):
            for budget in (2**28, 0):
                found = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    found.append(fc.sinkhorn(x, y, reg=0.3, tol=1e-5, memory_budget=budget, backend="cpu"))
                for other in found[1:]:
                    assert torch.equal(found[0].f, other.f)
                    assert torch.equal(found[0].value, other.value)
                    assert torch.equal(found[0].iterations, other.iterations)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reg", [0.1, 0.015, 1e-3])
def test_one_of_many_problems_on_a_cost_depends_on_no_other(reg: float, dtype: torch.dtype) -> None:
    """Whatever the number of threads, the others of its batch, and when these are solved. The smallest reg is solved one by one."""
    cost, a, b = costs(40, 30, dtype=dtype)[0], weights(75, 40, 1), weights(75, 30, 2)
    a[:, 3:20] *= torch.linspace(0, 1, 75, dtype=torch.float64)[:, None] ** 8
    a /= a.sum(1, keepdim=True)
    tol = 1e-5 if reg > 0.01 else 1e-3
    options: dict[str, Any] = {
        "reg": reg,
        "metric": "precomputed",
        "tol": tol,
        "max_iter": 2000,
        "backend": "cpu",
    }
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(fc.sinkhorn(cost, None, a, b, **options))
        part = fc.sinkhorn(cost, None, a[::8], b[::8], **options)
    finally:
        torch.set_num_threads(before)
    assert found[0].converged.all()
    assert len(set(found[0].iterations.tolist())) > 1
    for name in ("f", "g", "value", "transport_cost", "error", "iterations"):
        first = getattr(found[0], name)
        assert all(torch.equal(first, getattr(other, name)) for other in found[1:]), name
        assert torch.equal(first[::8], getattr(part, name)), name
    for p in (0, 74):
        alone = fc.sinkhorn(cost, None, a[p], b[p], **options)
        assert float((found[0].plan()[p] - alone.plan()).abs().sum()) <= 20 * tol
    steps: list[int] = []
    watched = fc.sinkhorn(cost, None, a, b, progress=lambda done, total: steps.append(done), **options)
    assert torch.equal(watched.f, found[0].f)
    assert steps == sorted(steps)
    assert steps[-1] == 75 * 2000


def test_scalings_that_leave_the_range_of_a_shared_kernel_matrix() -> None:
    cost, b = costs(12, 9, dtype=torch.float32)[0], weights(4, 9, 2)
    options: dict[str, Any] = {"reg": 0.1, "metric": "precomputed", "max_iter": 500, "backend": "cpu"}
    plain = fc.sinkhorn(cost, None, None, b, **options)
    start = torch.zeros(4, 12), torch.zeros(4, 9)
    start[0][1], start[1][2, 4] = 30.0, -40.0  # exp(300) and exp(-400)
    found = fc.sinkhorn(cost, None, None, b, warm_start=start, **options)
    assert found.converged.all()
    assert float((found.plan() - plain.plan()).abs().sum()) <= 2e-5
    assert torch.equal(
        found.f[0],
        fc.sinkhorn(cost, None, None, b[:3], warm_start=(start[0][:3], start[1][:3]), **options).f[0],
    )


def test_progress_changes_nothing(backend: str) -> None:
    x, y = points(3, 40, 2, 0), points(3, 30, 2, 1)
    seen: list[tuple[int, int]] = []
    told = fc.sinkhorn(
        x, y, reg=0.05, max_iter=3000, backend=backend, progress=lambda *done: seen.append(done)
    )
    plain = fc.sinkhorn(x, y, reg=0.05, max_iter=3000, backend=backend)
    assert torch.equal(told.f, plain.f)
    assert seen
    assert all(total == 9000 for _, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_solution_is_found_again_at_once(backend: str) -> None:
    x, y = points(2, 40, 2, 0, torch.float32), points(2, 30, 2, 1, torch.float32)
    first = fc.sinkhorn(x, y, reg=0.05, max_iter=5000, backend=backend)
    again = fc.sinkhorn(x, y, reg=0.05, warm_start=first, tol=1e-5, backend=backend)
    assert (again.iterations <= 2).all()
    assert (first.iterations > 20).all()
    # Rounded to float32 they are a start too, a little farther off.
    rounded = fc.sinkhorn(x, y, reg=0.05, warm_start=(first.f, first.g), tol=1e-5, backend=backend)
    assert (rounded.iterations <= 5).all()


def test_a_bad_start_does_no_harm(backend: str) -> None:
    cost = costs(40, 30, dtype=torch.float32)[0]
    g = torch.Generator().manual_seed(0)
    start = (1e4 * torch.randn(40, generator=g), 1e4 * torch.randn(30, generator=g))
    found = fc.sinkhorn(
        cost, reg=0.05, metric="precomputed", warm_start=start, max_iter=5000, backend=backend
    )
    plain = fc.sinkhorn(cost, reg=0.05, metric="precomputed", max_iter=5000, backend=backend)
    assert found.converged
    # The potentials differ by a constant of 1e4, whose rounding is 1e-3 of reg in float32 outside the plan.
    assert float((found.plan() - plain.plan()).abs().sum()) <= 1e-5


@pytest.mark.parametrize("marginal", MARGINALS)
def test_zero_weights(marginal: str, backend: str) -> None:
    cost, a, b = costs(20, 25), weights(1, 20, 1)[0], weights(1, 25, 2)[0]
    a[[0, 7, 19]], b[[3, 24]] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    cost[0, 0, 3] = 1e-3  # the nearest of all, between two that do not count
    options: dict[str, Any] = {"reg": 0.03, "metric": "precomputed", "reg_marginal": MARGINALS[marginal], "tol": 1e-9,
                               "max_iter": 20_000, "backend": backend}  # fmt: skip
    found = fc.sinkhorn(cost[0], None, a, b, **options)
    rows, columns = a > 0, b > 0
    part = fc.sinkhorn(cost[0][rows][:, columns].contiguous(), None, a[rows], b[columns], **options)
    assert torch.allclose(found.plan()[rows][:, columns], part.plan(), atol=1e-8)
    assert not found.plan()[~rows].any()
    assert not found.plan()[:, ~columns].any()
    assert torch.allclose(found.value, part.value, rtol=1e-7)
    # The potential that the other side implies.
    rho = MARGINALS[marginal]
    rho = rho if isinstance(rho, tuple) else (rho, rho)
    damp = [1 if r is None else r / (r + 0.03) for r in rho]
    implied = -damp[0] * 0.03 * torch.logsumexp((found.g - cost[0]) / 0.03 + b.log(), 1)
    assert torch.allclose(found.f[~rows], implied[~rows], atol=1e-8)
    implied = -damp[1] * 0.03 * torch.logsumexp((found.f[:, None] - cost[0]) / 0.03 + a.log()[:, None], 0)
    assert torch.allclose(found.g[~columns], implied[~columns], atol=1e-8)


def test_rows_without_weight_cost_no_time() -> None:
    """The kernel matrix is made once, whatever rows count for nothing."""
    cost, a = costs(600, 600, dtype=torch.float32)[0], weights(1, 600, 1)[0]
    lighter = a.clone()
    lighter[5] = 0

    def seconds(weight: torch.Tensor) -> float:
        begin = time.perf_counter()
        fc.sinkhorn(
            cost,
            None,
            weight / weight.sum(),
            reg=0.05,
            metric="precomputed",
            tol=0,
            max_iter=100,
            backend="cpu",
        )
        return time.perf_counter() - begin

    # Exponentials in every iteration took ten times as long.
    assert min(seconds(lighter) for _ in range(5)) < 3 * min(seconds(a) for _ in range(5))


@pytest.mark.parametrize("marginal", ["unbalanced", "semi", "semi rows"])
@pytest.mark.parametrize("size", [(1, 7), (7, 1), (12, 9)], ids=str)
def test_value_is_the_objective_of_the_plan(size: tuple[int, int], marginal: str, backend: str) -> None:
    """If only the columns hold, iterations do not see a constant that moves between f and g, but the value does."""
    cost, reg = costs(*size)[0] + 20, 0.1
    a, b = 0.5 * weights(1, size[0], 1)[0], 2 * weights(1, size[1], 2)[0]
    rho = MARGINALS[marginal] if isinstance(MARGINALS[marginal], tuple) else (0.7, 0.7)
    found = fc.sinkhorn(
        cost,
        None,
        a,
        b,
        reg=reg,
        metric="precomputed",
        reg_marginal=rho,
        tol=1e-13,
        max_iter=20_000,
        backend=backend,
    )
    plan = found.plan()

    def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (torch.special.xlogy(p, p / q) - p + q).sum()

    objective = (plan * cost).sum() + reg * divergence(plan, a[:, None] * b)
    for sums, weight, penalty in ((plan.sum(1), a, rho[0]), (plan.sum(0), b, rho[1])):
        if penalty is not None:
            objective += penalty * divergence(sums, weight)
    assert found.converged
    assert torch.allclose(found.value, objective, rtol=1e-8)
    assert torch.allclose(found.apply(torch.ones(size[1], dtype=torch.float64)), plan.sum(1), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4, 1e15])
def test_masses_other_than_1(scale: float, backend: str) -> None:
    cost, a, b = costs(20, 25, dtype=torch.float32)[0], weights(1, 20, 1)[0], weights(1, 25, 2)[0]
    plain = fc.sinkhorn(cost, None, a, b, reg=0.05, metric="precomputed", backend=backend)
    scaled = fc.sinkhorn(
        cost, None, scale * a, scale * b, reg=0.05, metric="precomputed", tol=1e-6 * scale, backend=backend
    )
    assert torch.allclose(scaled.plan() / scale, plain.plan(), atol=1e-8)
    assert scaled.iterations == plain.iterations


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_compute_in_float32(dtype: torch.dtype, backend: str) -> None:
    x, y = points(1, 30, 4, 0).to(dtype)[0], points(1, 20, 4, 1).to(dtype)[0]
    found = fc.sinkhorn(x, y, reg=0.5, backend=backend)
    wide = fc.sinkhorn(x.float(), y.float(), reg=0.5, backend=backend)
    assert found.f.dtype == found.value.dtype == found.plan().dtype == torch.float32
    assert torch.equal(found.f, wide.f)


def test_layouts(backend: str) -> None:
    """Strided, transposed and expanded inputs, NumPy arrays, DLPack objects."""
    x, y = points(2, 30, 6, 0, torch.float32), points(2, 20, 6, 1, torch.float32)
    plain = fc.sinkhorn(x, y, reg=1.0, backend=backend)
    wide = torch.zeros(2, 30, 12)
    wide[:, :, ::2] = x
    assert torch.equal(fc.sinkhorn(wide[:, :, ::2], y, reg=1.0, backend=backend).f, plain.f)
    assert torch.equal(fc.sinkhorn(x.mT.contiguous().mT, y, reg=1.0, backend=backend).f, plain.f)
    assert torch.equal(fc.sinkhorn(x.numpy(), y.numpy(), reg=1.0, backend=backend).f, plain.f)
    cost = costs(30, 20, dtype=torch.float32)[0]
    straight = fc.sinkhorn(cost, reg=0.1, metric="precomputed", backend=backend)
    turned = fc.sinkhorn(cost.mT.contiguous().mT, reg=0.1, metric="precomputed", backend=backend)
    assert torch.equal(straight.f, turned.f)
    shared = fc.sinkhorn(x, y[:1].expand(2, -1, -1), reg=1.0, backend=backend)
    assert torch.equal(shared.f[0], plain.f[0])


def test_apply_is_the_plan(backend: str) -> None:
    x, y = points(1, 75, 4, 0, torch.float32)[0], points(1, 130, 4, 1, torch.float32)[0]
    for metric in METRICS:
        found = fc.sinkhorn(x, y, reg=1.0, metric=metric, backend=backend)
        plan, v, w = (
            found.plan(),
            points(1, 130, 3, 2, torch.float32)[0],
            points(1, 75, 3, 3, torch.float32)[0],
        )
        assert torch.allclose(found.apply(v), plan @ v, atol=1e-6)
        assert torch.allclose(found.apply(v[:, 0]), plan @ v[:, 0], atol=1e-6)
        assert torch.allclose(found.apply_transpose(w), plan.mT @ w, atol=1e-6)


# ---- gradients


@pytest.mark.parametrize(
    ("backend", "metric", "marginal"),
    [
        *(("cpu", metric, marginal) for metric in [*METRICS, "precomputed"] for marginal in MARGINALS),
        ("torch", "euclidean", "balanced"),
    ],
)
def test_gradients(metric: str, marginal: str, backend: str) -> None:
    first = points(2, 5, 3, 0) if metric != "precomputed" else costs(5, 3, batch=2)
    second = points(2, 4, 3, 1) if metric != "precomputed" else None
    logits = [
        points(2, size, 1, seed)[:, :, 0] for size, seed in ((5, 2), (4 if second is not None else 3, 3))
    ]
    heavier = 1.0 if marginal == "balanced" else 1.3
    lengths = {"x_lengths": [5, 3], "y_lengths": [2, logits[1].shape[1]]}

    def value(x: torch.Tensor, y: torch.Tensor | None, za: torch.Tensor, zb: torch.Tensor) -> torch.Tensor:
        # Each problem's own weights sum up to the same, whatever is asked for.
        masked = [
            torch.where(torch.arange(z.shape[1]) < torch.tensor(size)[:, None], z, -INF)
            for z, size in zip((za, zb), lengths.values(), strict=True)
        ]
        a, b = (z.softmax(1) for z in masked)
        return fc.sinkhorn(
            x, y, heavier * a, b, reg=0.5, metric=metric, reg_marginal=MARGINALS[marginal], tol=1e-11,
            max_iter=20_000, backend=backend, **lengths,
        ).value  # fmt: skip

    inputs = [first, second, *logits]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(value, inputs, atol=1e-7, rtol=1e-5)


def test_gradients_of_points_that_coincide(backend: str) -> None:
    """At points where the distance has no derivative, its part is 0, not NaN."""
    x = torch.zeros(3, 2, requires_grad=True)
    for metric in METRICS:
        (gradient,) = torch.autograd.grad(
            fc.sinkhorn(x, torch.zeros(4, 2), reg=1.0, metric=metric, backend=backend).value, x
        )
        assert torch.equal(gradient, torch.zeros(3, 2))


def test_gradients_in_float32_of_a_batch_of_arrays_in_half(backend: str) -> None:
    x = points(1, 20, 3, 0)[0].half().requires_grad_()
    y = points(1, 30, 3, 1)[0].half()
    (half,) = torch.autograd.grad(fc.sinkhorn(x, y, reg=1.0, backend=backend).value, x)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(
        fc.sinkhorn(wide, y.double(), reg=1.0, tol=1e-9, backend=backend).value, wide
    )
    assert half.dtype == torch.float16
    assert torch.allclose(half.double(), exact, rtol=2e-3, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    x = points(1, 5, 2, 0)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(
        fc.sinkhorn(x, points(1, 4, 2, 1)[0], reg=1.0).value, x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_divergence(backend: str) -> None:
    x, y = points(2, 30, 3, 0), points(2, 40, 3, 1) + 1
    options: dict[str, Any] = {"reg": 1.0, "tol": 1e-7, "max_iter": 5000, "backend": backend}
    there, back = fc.sinkhorn_divergence(x, y, **options), fc.sinkhorn_divergence(y, x, **options)
    assert torch.allclose(there, back, rtol=1e-6)
    assert (there > 0.1).all()
    assert torch.allclose(
        fc.sinkhorn_divergence(x, x, **options), torch.zeros(2, dtype=torch.float64), atol=1e-9
    )
    for p in range(2):
        peer = ot.bregman.empirical_sinkhorn_divergence(
            x[p].numpy(), y[p].numpy(), 1.0, numIterMax=10_000, stopThr=1e-10, warn=False
        )
        # POT's has <P, C> where this has the value; both are debiased.
        assert math.isclose(float(there[p]), float(np.squeeze(peer)), rel_tol=0.2)
    moved = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fc.sinkhorn_divergence(moved, x, **options).sum(), moved)
    assert torch.allclose(gradient, torch.zeros_like(x), atol=1e-5)
    relaxed = fc.sinkhorn_divergence(
        x, x, 2 * weights(2, 30, 0), weights(2, 30, 0), reg_marginal=1.0, **options
    )
    assert (relaxed > 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.02, 5), st.integers(0, 2**32 - 1))
def test_properties(n: int, m: int, reg: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(n, m, generator=g, dtype=torch.float64)
    a, b = weights(1, n, seed % 1000)[0], weights(1, m, seed % 999)[0]
    found = fc.sinkhorn(cost, None, a, b, reg=reg, metric="precomputed", tol=1e-9, max_iter=50_000)
    check_marginals(found, a, b, 1e-12)
    exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    assert float(found.transport_cost) >= exact - 1e-7
    assert exact - 1e-7 <= float(found.value) <= float((a[:, None] * b * cost).sum()) + 1e-7
    order = torch.randperm(n, generator=g)
    mixed = fc.sinkhorn(
        cost[order], None, a[order], b, reg=reg, metric="precomputed", tol=1e-9, max_iter=50_000
    )
    assert torch.allclose(mixed.plan(), found.plan()[order], atol=1e-8)


# ---- what can go wrong


def test_one_warning_for_those_that_did_not_converge(backend: str) -> None:
    cost = costs(30, 30, batch=3)
    with pytest.warns(
        fc.ConvergenceWarning, match=r"3 of 3 problems, the first of them 0, did not converge in 3 it"
    ) as seen:
        found = fc.sinkhorn(cost, reg=0.01, metric="precomputed", max_iter=3, backend=backend)
    assert len(seen) == 1
    assert not found.converged.any()
    check_marginals(found, torch.full((3, 30), 1 / 30), torch.full((3, 30), 1 / 30), 1e-7)
    with pytest.warns(fc.ConvergenceWarning, match=r"^sinkhorn did not converge"):
        fc.sinkhorn(cost[0], reg=0.01, metric="precomputed", max_iter=3, backend=backend)


@pytest.mark.filterwarnings("ignore::flashcoreset.ConvergenceWarning")
@pytest.mark.parametrize("reg", [0.1, 0.01, 1e-3])
def test_what_did_not_converge_comes_back_at_its_best(
    backend: str, reg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[float] = []  # of the iterates of one run
    definition = Schedule.after

    def watched(self: Schedule, error: float, judged: float) -> str:
        if self.eps == self.reg:
            errors.append(error)
        return definition(self, error, judged)

    monkeypatch.setattr(Schedule, "after", watched)
    cost = costs(40, 30).double()
    for max_iter in (11, 12, 21, 33, 57):
        errors.clear()
        options: dict[str, Any] = {"reg": reg, "metric": "precomputed", "max_iter": max_iter, "tol": 1e-14}
        expected = fc.sinkhorn(cost, backend="torch", **options)
        # 1e-14: converged but for rounding.
        assert float(expected.error) <= min(errors) + 1e-14
        found = fc.sinkhorn(cost, backend=backend, **options)
        assert float(found.error) == pytest.approx(float(expected.error), rel=1e-6, abs=1e-13)


NAN = math.nan
X, Y, C = torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3, 4)
BX, BY, BC = torch.zeros(2, 3, 2), torch.zeros(2, 4, 2), torch.zeros(2, 3, 4)


def changed(tensor: torch.Tensor, place: tuple[int, ...], value: float) -> torch.Tensor:
    result = tensor.clone()
    result[place] = value
    return result


COST: dict[str, Any] = {"metric": "precomputed"}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((changed(X, (1, 0), NAN), Y), {}, r"x must be finite, got NaN at row 1, column 0$"),
        ((X, changed(Y, (3, 1), INF)), {}, r"y must be finite, got inf at row 3, column 1$"),
        ((BX, changed(BY, (1, 3, 1), NAN)), {}, r"y must be finite, got NaN at row 3, column 1 of problem 1"),
        ((changed(C, (2, 3), NAN),), COST, r"x must be finite, got NaN at row 2, column 3"),
        ((changed(BC, (1, 2, 3), -INF),), COST, r"x must be finite, got -inf at row 2, column 3 of problem 1"),
        ((C, Y), COST, r"y must be None with metric 'precomputed'"),
        ((X,), {}, r"y must be given for metric 'sqeuclidean', got None"),
        ((X, torch.zeros(4, 3)), {}, r"y must have shape \[m, 2\] to fit x, got \(4, 3\)"),
        ((BX, Y), {}, r"y must have shape \[2, m, 2\] to fit x, got \(4, 2\)"),
        ((BX, torch.zeros(3, 4, 2)), {}, r"y must have shape \[2, m, 2\] to fit x, got \(3, 4, 2\)"),
        ((torch.zeros(0, 2), Y), {}, r"x must have no dimension of size 0, got shape \(0, 2\)"),
        ((torch.zeros(2), Y), {}, r"x must have 2 dimensions, or 3 for a batch, got shape \(2,\)"),
        ((X, Y, torch.tensor([0.5, -0.1, 0.6])), {}, r"a must be finite and >= 0, got -0.1\d* at position 1$"),
        ((X, Y, None, torch.tensor([0.5, NAN, 0.5, 0])), {}, r"b must be finite and >= 0, got nan at position 1$"),
        ((BX, BY, torch.tensor([[1.0, 1, 1], [1, INF, 1]])), {}, r"a must be .* got inf at position 1 of problem 1"),
        ((X, Y, torch.zeros(3)), {}, r"a must have a weight > 0, got none"),
        ((BX, BY, None, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])), {}, r"b must have .* got none of problem 1"),
        ((X, Y, torch.ones(3), torch.ones(4)), {}, r"a and b must have the same sum .* got 3 and 4; scale"),
        ((BX, BY, torch.ones(2, 3)), {}, r"same sum .* got 3 and 1 of problem 0"),
        ((X, Y, torch.ones(4)), {}, r"a must have shape \[3\], got \(4,\)"),
        ((BX, BY, None, torch.ones(4)), {}, r"b must have shape \[2, 4\], got \(4,\)"),
        ((X, Y), {"reg": 0}, r"reg must be > 0, got 0"),
        ((X, Y), {"reg": -1.0}, r"reg must be > 0, got -1"),
        ((X, Y), {"reg": NAN}, r"reg must be finite, got nan"),
        ((X, Y), {"reg": 1e36}, r"reg must be at most .*; scale the data down, got 1e\+36"),
        ((X, Y), {"reg": 1e-38}, r"reg must be at least .*; scale the data up, got 1e-38"),
        ((X, Y), {"reg_marginal": 0.0}, r"reg_marginal must be > 0, or None for a marginal that holds, got 0.0"),
        ((X, Y), {"reg_marginal": (1.0, -2.0)}, r"reg_marginal must be > 0, .* got -2.0"),
        ((X, Y), {"reg_marginal": (1.0, 1.0, 1.0)}, r"reg_marginal must be None, a number or a pair of these, got 3"),
        ((X, Y), {"max_iter": 0}, r"max_iter must be >= 1 and below 2\^40, got 0"),
        ((X, Y), {"tol": -1e-3}, r"tol must be >= 0, got -0.001"),
        ((X, Y), {"metric": "dot"}, r"unknown metric 'dot'; valid names"),
        ((X, Y), {"norm": "linf"}, r"unknown norm 'linf'; valid names: l1, l2"),
        ((X, Y), {"x_lengths": [2]}, r"x_lengths and y_lengths are for batches"),
        ((BX, BY), {"x_lengths": [2]}, r"x_lengths must have shape \[2\], got \(1,\)"),
        ((BX, BY), {"x_lengths": [2, 4]}, r"x_lengths must be in \[1, 3\], got 4 for problem 1"),
        ((BX, BY), {"y_lengths": [0, 4]}, r"y_lengths must be in \[1, 4\], got 0 for problem 0"),
        ((X, Y), {"memory_budget": -1}, r"memory_budget must be >= 0 bytes, got -1"),
        ((X, Y), {"warm_start": (torch.zeros(2), torch.zeros(4))}, r"warm_start: f must .* shape \[3\], got .* \(2,\)"),
        ((X, Y), {"warm_start": (changed(torch.zeros(3), (1,), NAN), torch.zeros(4))}, r"warm_start: f must be finite"),
        ((X, Y), {"backend": "gpu"}, r"unknown backend 'gpu'"),
    ],
)  # fmt: skip
def test_bad_values(arguments: tuple[Any, ...], options: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        fc.sinkhorn(*arguments, **{"reg": 1.0, "backend": backend} | options)


@pytest.mark.parametrize("count", [1, 16, 17])  # checked one by one, or together
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a", {3: NAN}, "a must be finite and >= 0, got nan at position 3"),
        ("b", {0: INF}, "b must be finite and >= 0, got inf at position 0"),
        ("a", {4: -INF, 1: INF}, "a must be finite and >= 0, got inf at position 1"),
        ("b", {2: -1e-300}, "b must be finite and >= 0, got -1e-300 at position 2"),
        ("a", dict.fromkeys(range(5), 0.0), "a must have a weight > 0, got none"),
        ("b", {0: 1.5e308, 1: 1.5e308}, "b must have a finite sum"),
        ("a", {2: 0.2003}, "a and b must have the same sum for balanced transport, got 1.0003 and 1"),
        ("b", {2: 0.2003}, "a and b must have the same sum for balanced transport, got 1 and 1.0003"),
    ],
)
def test_one_problem_with_bad_weights(
    name: str, values: dict[int, float], message: str, count: int, backend: str
) -> None:
    sides = {side: torch.full((count, 6), 0.2, dtype=torch.float64) for side in "ab"}
    for weights_of_side in sides.values():
        weights_of_side[:, 5] = NAN  # padding
    for place, value in values.items():
        sides[name][-1, place] = value
    lengths = {"x_lengths": [5] * count, "y_lengths": [5] * count}
    cost = torch.ones(count, 6, 6)
    within = f" of problem {count - 1}" if count > 1 else ""
    with pytest.raises(ValueError, match=re.escape(message + within) + "(;|$)"):
        fc.sinkhorn(cost, **sides, reg=1.0, metric="precomputed", backend=backend, **lengths)
    sides[name][-1, :5] = 0.2 * (1 + 0.9e-4)  # the same sum, rounded
    found = fc.sinkhorn(cost, **sides, reg=1.0, metric="precomputed", backend=backend, **lengths)
    assert found.converged.all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X.long(), Y.long()), {}, r"x must have dtype float16, bfloat16, float32 or float64, got int64"),
        (("points", Y), {}, r"x must be a torch.Tensor, a NumPy array, an object with .*, got str"),
        ((X, Y, torch.ones(3, dtype=torch.int64)), {}, r"a must have dtype float16, bfloat16, float32 or float64, got int64"),
        ((X, Y, ["1", "2", "3"]), {}, r"a must hold numbers, .* got a list: "),
        ((BX, BY, None, [[1.0], [1.0, 2.0]]), {}, r"b must hold numbers, .* got a list: "),
        ((X, Y), {"reg": "1"}, r"reg must be a number, got '1'"),
        ((X, Y), {"max_iter": 1.5}, r"max_iter must be an int, got 1.5"),
        ((X, Y), {"norm": 2}, r"norm must be a str, one of l1, l2, got 2 of type int"),
        ((X, Y), {"warm_start": 3}, r"warm_start must be None, a Transport or a pair \(f, g\), got int"),
        ((X, Y), {"progress": 3}, r"progress must be None, True or a callable"),
        ((BX, BY), {"x_lengths": [1.5, 2]}, r"x_lengths must hold integers"),
    ],
)  # fmt: skip
def test_bad_types(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fc.sinkhorn(*arguments, **{"reg": 1.0} | options)


def test_costs_that_overflow_are_named() -> None:
    big = torch.tensor([[3e38, -3e38], [-3e38, 3e38]])
    with pytest.raises(
        ValueError, match=r"^x: costs overflow torch.float32; scale the data down or use float64$"
    ):
        fc.sinkhorn(big, reg=1.0, metric="precomputed", backend="cpu")
    batch = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0))
    batch[1] *= 1e25
    for metric in ("sqeuclidean", "euclidean"):
        with pytest.raises(
            ValueError, match=r"^x: costs overflow torch.float32 in problem 1; scale the data down"
        ):
            fc.sinkhorn(batch, batch, reg=1.0, metric=metric, backend="cpu")
    assert fc.sinkhorn(batch.double(), batch.double(), reg=1e45, backend="cpu").converged.all()


def test_bad_arguments_of_the_result_and_of_the_divergence() -> None:
    found = fc.sinkhorn(X, Y, reg=1.0)
    with pytest.raises(ValueError, match=r"v must have shape \[4\] or \[4, k\], got \(3,\)"):
        found.apply(torch.ones(3))
    with pytest.raises(TypeError, match="v must have dtype float16, bfloat16, float32 or float64, got int64"):
        found.apply_transpose(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="metric must be one of points"):
        fc.sinkhorn_divergence(X, Y, reg=1.0, metric="precomputed")
    with pytest.raises(ValueError, match="reg_marginal must be the same for both"):
        fc.sinkhorn_divergence(X, Y, reg=1.0, reg_marginal=(None, 1.0))
    other = fc.sinkhorn(Y, X, reg=1.0)
    with pytest.raises(
        ValueError, match="warm_start must have potentials of 1 problems of 3 rows and 4 columns"
    ):
        fc.sinkhorn(X, Y, reg=1.0, warm_start=other)


LONG_CALL = """
import torch, flashcoreset as fc
torch.set_num_threads(2)
cost = torch.zeros(4, 64, 64)
cost[{hard}] = 50 * torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) ** 2
print("ready", flush=True)
try:
    fc.sinkhorn(cost, reg=0.001, metric="precomputed", tol=0, max_iter=10**9, backend="cpu")
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(fc.sinkhorn(cost[0], reg=50.0, metric="precomputed").converged.item(), flush=True)
"""


@pytest.mark.parametrize("hard", range(4))
def test_ctrl_c_ends_a_batch_of_which_one_problem_is_left(hard: int) -> None:
    """Whichever thread has it."""
    code = LONG_CALL.format(hard=hard)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(20, process.kill)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.7)  # well inside the call
            assert process.poll() is None
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            watchdog.start()
            assert process.stdout.readline() == "interrupted\n"
            assert time.monotonic() - begin < 1
            assert process.stdout.readline() == "True\n"
            assert process.wait(timeout=30) == 0
        finally:
            watchdog.cancel()
            process.kill()


def test_a_run_is_not_shared_by_threads() -> None:
    """The low-level run refuses a second caller; the public function makes a run of its own per call."""
    x, y = points(1, 300, 3, 0)[0], points(1, 300, 3, 1)[0]
    found: list[fc.Transport] = []
    callers = [
        threading.Thread(target=lambda: found.append(fc.sinkhorn(x, y, reg=0.5, backend="cpu")))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(found[0].f, other.f) for other in found)


# ---- the torch op

OP = torch.ops.flashcoreset.sinkhorn.default


@pytest.mark.parametrize("metric", ["sqeuclidean", "precomputed"])
@pytest.mark.parametrize("lengths", [None, [3, 2]])
def test_opcheck(metric: str, lengths: list[int] | None) -> None:
    x = points(2, 4, 3, 0).requires_grad_()
    y = points(2, 5, 3, 1).requires_grad_() if metric != "precomputed" else None
    a = weights(2, 4, 2).requires_grad_()
    sizes = None if lengths is None else torch.tensor(lengths)
    if sizes is not None:
        a = a.detach() / torch.stack([a[0, :3].sum(), a[1, :2].sum()]).detach()[:, None]
    b = torch.full((2, 5 if y is not None else 3), 0.2 if y is not None else 1 / 3, dtype=torch.float64)
    problem = (
        x,
        y,
        a,
        b,
        0.5,
        metric,
        INF,
        2.0,
        sizes,
        None,
        5000,
        1e-9,
        None,
        None,
        2**28,
        True,
        True,
        None,
        False,
        "l2",
    )
    torch.library.opcheck(OP, problem)


@pytest.mark.parametrize("metric", ["sqeuclidean", "precomputed"])
def test_opcheck_of_plan_and_apply(metric: str) -> None:
    x = points(2, 4, 3, 0, torch.float32)
    y = points(2, 3, 3, 1, torch.float32) if metric != "precomputed" else None
    potentials = torch.zeros(2, 4).double(), torch.zeros(2, 3).double()
    lengths = torch.tensor([3, 2]), None
    ops = torch.ops.flashcoreset
    problem = (
        x, y, weights(2, 4, 2), weights(2, 3, 3), 0.5, metric, INF, INF, *lengths, 1000, 1e-6, *potentials, 2**28, True, True,
        None, False, "l1",
    )  # fmt: skip
    torch.library.opcheck(ops.sinkhorn_plan.default, problem)
    for transpose in (False, True):
        v = torch.ones(2, 4 if transpose else 3, 2)
        torch.library.opcheck(ops.sinkhorn_apply.default, (*problem, v, transpose))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compile_of_plan_and_apply_without_a_graph_break(backend: str) -> None:
    def results(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        found = fc.sinkhorn(x, y, reg=0.5, backend=backend)
        return [found.plan(), found.apply(y), found.apply_transpose(x[..., 0])]

    for batch in (slice(0, 2), 0):
        x, y = points(2, 12, 3, 0)[batch], points(2, 9, 3, 1)[batch]
        torch._dynamo.reset()
        compiled = torch.compile(results, fullgraph=True, backend="aot_eager")(x, y)
        assert all(torch.equal(one, other) for one, other in zip(compiled, results(x, y), strict=True))


@pytest.mark.filterwarnings("ignore")  # of torch.jit, about itself
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_transforms_of_plan_and_apply(backend: str) -> None:
    """What records a call of a finished transport records the op, and not the empty tensors that a kernel writes to."""
    found = fc.sinkhorn(points(1, 5, 2, 0)[0], points(1, 4, 2, 1)[0], reg=0.5, backend=backend)
    v = torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([found.apply(row) for row in v])
    assert torch.equal(torch.jit.trace(found.apply, v[0])(v[1]), expected[1])
    assert torch.equal(make_fx(lambda row: found.apply(row))(v[0])(v[1]), expected[1])
    assert torch.equal(make_fx(lambda: found.plan())()(), found.plan())
    assert torch.equal(torch.func.functionalize(found.apply)(v[1]), expected[1])
    assert torch.equal(torch.func.vmap(found.apply)(v), expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_compile_without_a_graph_break(backend: str) -> None:
    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found = fc.sinkhorn(2 * x, y, reg=0.5, tol=1e-9, max_iter=5000, backend=backend)
        return found.value + 0 * found.f.sum()

    x, y = points(1, 12, 3, 0)[0].requires_grad_(), points(1, 9, 3, 1)[0]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, y)
    plain = loss(x, y)
    assert torch.equal(compiled, plain)
    assert torch.allclose(*(torch.autograd.grad(result, x)[0] for result in (compiled, plain)))


@pytest.mark.parametrize("reg", [0.05, 0.01])
def test_agrees_with_ott_and_geomloss(reg: float) -> None:
    """Plans and values in float32, if each of the others offers them; the tolerance of float32 plans is 1e-4 in L1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jax and geomloss, about themselves
        import jax.numpy as jnp
        from geomloss import SamplesLoss
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn as ott_sinkhorn

        x, y = (points(1, n, 3, seed, torch.float32)[0] for seed, n in enumerate((60, 45)))
        cost = torch.cdist(x, y) ** 2
        scale = float(cost.max())
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost_matrix=jnp.asarray((cost / scale).numpy()), epsilon=reg)
        )
        found = ott_sinkhorn.Sinkhorn(threshold=1e-6, max_iterations=20_000, norm_error=1)(problem)
        # geomloss anneals: at this scaling its value is a thousandth off. Its cost is half the squared distance.
        loss = SamplesLoss(
            "sinkhorn", p=2, blur=(reg * scale / 2) ** 0.5, debias=False, scaling=0.95, backend="tensorized"
        )
        value = 2 * float(loss(x, y))
    transport = fc.sinkhorn(cost / scale, reg=reg, metric="precomputed", tol=1e-6, max_iter=20_000)
    assert (torch.from_numpy(np.array(found.matrix)) - transport.plan()).abs().sum() <= 1e-4
    assert float(transport.value) == pytest.approx(float(found.reg_ot_cost), rel=1e-5)
    assert float(transport.value) * scale == pytest.approx(value, rel=3e-3)


def test_a_ragged_batch_of_many_sizes_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.randint(1, 501, (64,), generator=generator) for _ in range(2))
    x, y = (torch.full((64, 500, 3), math.nan) for _ in range(2))
    for padded, lengths in ((x, rows), (y, columns)):
        for problem, size in enumerate(lengths.tolist()):
            padded[problem, :size] = torch.rand(size, 3, generator=generator)
    options: dict[str, Any] = {"reg": 0.1, "tol": 0, "max_iter": 20}
    together = fc.sinkhorn(x, y, x_lengths=rows, y_lengths=columns, **options)
    alone = [
        float(fc.sinkhorn(a[:n], b[:m], **options).value)
        for a, b, n, m in zip(x, y, rows.tolist(), columns.tolist(), strict=True)
    ]
    assert torch.allclose(together.value, torch.tensor(alone), rtol=0, atol=1e-6)
