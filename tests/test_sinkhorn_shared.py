"""Costs that problems share, forbidden pairs and mixed dtypes in `fc.sinkhorn`, on every backend, against plain iterations in float64,
and against POT."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import on_device
from checks.sinkhorn import DTYPES, points, weights
from conftest import EVERY_BACKEND
from torch import Tensor

import flashcoreset as fc

# Compiling POT's sources warns of their escape sequences.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot

pytestmark = EVERY_BACKEND
INF = math.inf


def costs(n: int, m: int, seed: int = 0) -> Tensor:
    """Squared distances of two sets in space, from 0 to 1."""
    cost = torch.cdist(points(1, n, 3, seed)[0], points(1, m, 3, seed + 1)[0]) ** 2
    return (cost - cost.min()) / (cost.max() - cost.min())


def plan_of(cost: Tensor, a: Tensor, b: Tensor, reg: float, rho: float = INF) -> Tensor:
    """The plan after as many iterations as change nothing any more: P_ij = a_i phi_i exp(-C_ij / reg) psi_j b_j."""
    kernel, a, b = np.exp(-cost.numpy() / reg), a.numpy(), b.numpy()
    damp = 1.0 if math.isinf(rho) else rho / (rho + reg)
    # Lines without weight count for nothing, and may have no pairs.
    left, right, psi = a > 0, b > 0, np.ones(len(b))
    for _ in range(20_000):
        before = psi
        phi = np.where(left, np.where(left, kernel @ (b * psi), 1) ** -damp, 0)
        psi = np.where(right, np.where(right, kernel.T @ (a * phi), 1) ** -damp, 0)
        if np.abs(psi - before).max() <= 1e-13 * psi.max():
            break
    return torch.from_numpy((a * phi)[:, None] * kernel * (b * psi))


def solve(cost: Tensor, a: Tensor | None, b: Tensor | None, backend: str, **options: Any) -> fc.Transport:
    arrays = [on_device(t) for t in (cost, a, b)]
    return fc.sinkhorn(arrays[0], None, *arrays[1:], metric="precomputed", backend=backend, **options)


def slow(backend: str) -> bool:
    return backend in ("cuda", "triton", "torch")


def histograms(count: int, n: int, seed: int) -> Tensor:
    """Weights of which two thirds are 0."""
    w = weights(count, n, seed) * (points(count, n, 1, seed + 1)[:, :, 0] > 0.4)
    w[:, 0] += 0.01
    return w / w.sum(1, keepdim=True)


@DTYPES
@pytest.mark.parametrize("reg", [0.5, 0.05, 0.012])
def test_weights_of_a_batch_on_one_cost(reg: float, dtype: torch.dtype, backend: str) -> None:
    count, n, m = (3, 9, 8) if slow(backend) else (37, 41, 30)
    cost, a, b = costs(n, m).to(dtype), histograms(count, n, 3), histograms(count, m, 5)
    tol = 1e-5 if slow(backend) or dtype == torch.float32 else 1e-9
    found = solve(cost, a, b, backend, reg=reg, tol=tol, max_iter=60 if backend == "triton" else 20_000)
    plan = found.plan().cpu().double()
    assert plan.shape == (count, n, m)
    shown = (plan.sum(2) - a).abs().sum(1) + (plan.sum(1) - b).abs().sum(1)
    torch.testing.assert_close(
        found.error.cpu().double(), shown, rtol=0, atol=3e-7 if dtype == torch.float32 else 1e-12
    )
    if backend == "triton" and reg < 0.5:
        return  # the interpreter has no time to converge
    assert found.converged.all()
    for p in range(0, count, 7):
        exact = plan_of(cost.double(), a[p], b[p], reg)
        assert float((plan[p] - exact).abs().sum()) <= 60 * tol
        assert float(found.transport_cost[p]) == pytest.approx(
            float((exact * cost.double()).sum()), abs=60 * tol
        )
        entropy = torch.special.xlogy(exact, exact / (a[p][:, None] * b[p]).clamp(min=1e-300)).sum()
        value = float((exact * cost.double()).sum() + reg * entropy)
        assert float(found.value[p]) == pytest.approx(value, abs=60 * tol)


@DTYPES
@pytest.mark.parametrize("reg", [0.5, 0.05, 0.012])
def test_the_l2_error_of_a_batch_on_one_cost(reg: float, dtype: torch.dtype, backend: str) -> None:
    """By which each of the problems ends, whichever way it is solved."""
    count, n, m = (3, 9, 8) if slow(backend) else (11, 41, 30)
    cost, a, b = costs(n, m).to(dtype), histograms(count, n, 3), histograms(count, m, 5)
    tol = 1e-5 if slow(backend) or dtype == torch.float32 else 1e-9
    options: dict[str, Any] = {"reg": reg, "tol": tol, "max_iter": 60 if backend == "triton" else 20_000}
    if backend == "triton" and reg < 0.5:
        return  # the interpreter has no time to converge
    found, longer = (solve(cost, a, b, backend, norm=norm, **options) for norm in ("l2", "l1"))
    assert found.converged.all()
    f, g = found._problem.f.cpu(), found._problem.g.cpu()
    plan = torch.exp((f[:, :, None] + g[:, None] - cost.double()) / reg) * a[:, :, None] * b[:, None]
    shown = (plan.sum(2) - a).norm(dim=1) + (plan.sum(1) - b).norm(dim=1)
    slack = 2e-7 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found.error.cpu().double(), shown, rtol=0, atol=slack)
    assert (found.iterations <= longer.iterations).all()
    if not slow(backend):  # on few points the two errors are nearly the same
        assert int(found.iterations.sum()) < int(longer.iterations.sum())


@pytest.mark.parametrize("rho", [None, 0.5])
def test_one_of_many_is_one_alone(rho: float | None, backend: str) -> None:
    """Also with a marginal that all problems share, relaxed marginals and costs that do not begin at 0."""
    count = 2 if slow(backend) else 6
    cost, a, b = costs(8, 6) + 3, weights(1, 8, 1)[0], weights(count, 6, 2)
    options: dict[str, Any] = {"reg": 0.2, "reg_marginal": rho, "tol": 1e-6, "max_iter": 300}
    together = solve(cost, a, b, backend, **options)
    for p in range(count):
        alone = solve(cost, a, b[p], backend, **options)
        assert together.converged[p]
        assert float((together.plan()[p] - alone.plan()).abs().sum()) <= 5e-5
        assert float(together.value[p]) == pytest.approx(float(alone.value), abs=1e-6)
    v = on_device(points(count, 6, 2, 4))
    torch.testing.assert_close(together.apply(v), together.plan() @ v)
    w = on_device(points(count, 8, 1, 4)[:, :, 0])
    torch.testing.assert_close(together.apply_transpose(w), (together.plan().mT @ w[:, :, None])[:, :, 0])
    again = solve(cost, a, b, backend, warm_start=together, **{**options, "tol": 1e-5})
    assert (again.iterations <= 2).all()


def test_gradients_of_a_shared_cost(backend: str) -> None:
    cost, a, b = costs(5, 4), weights(3, 5, 1), weights(3, 4, 2)
    leaves = [on_device(t).clone().requires_grad_() for t in (cost, a, b)]
    scale = on_device(torch.tensor([1.0, -2.0, 0.5]))
    found = fc.sinkhorn(
        leaves[0], None, *leaves[1:], reg=0.3, metric="precomputed", tol=1e-7, max_iter=100, backend=backend
    )
    (found.value * scale).sum().backward()
    plans = torch.stack([plan_of(cost, a[p], b[p], 0.3) for p in range(3)])
    torch.testing.assert_close(
        leaves[0].grad.cpu(), (plans * scale.cpu()[:, None, None]).sum(0), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(leaves[1].grad, scale[:, None] * found.f, rtol=1e-6, atol=1e-9)


@DTYPES
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("rho", [None, 0.7])
def test_forbidden_pairs_carry_nothing(
    rho: float | None, shared: bool, dtype: torch.dtype, backend: str
) -> None:
    cost = costs(9, 8).to(dtype)
    forbidden = points(1, 9, 8, 11)[0] > 0.6
    forbidden[torch.arange(8), torch.arange(8)] = False
    forbidden[2], forbidden[:, 5] = True, True  # a row and a column of no weight
    assert 20 < int(forbidden.sum()) < 50
    cost[forbidden] = INF
    a, b = weights(2, 9, 1), weights(2, 8, 2)
    a[:, 2] = b[:, 5] = 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    a, b = (a, b) if shared else (a[0], b[0])
    leaf = on_device(cost).clone().requires_grad_()
    found = fc.sinkhorn(
        leaf, None, on_device(a), on_device(b), reg=0.2, metric="precomputed", reg_marginal=rho, tol=1e-5, max_iter=300,
        backend=backend,
    )  # fmt: skip
    assert found.converged.all()
    plan = found.plan().cpu().double().reshape(-1, 9, 8)
    assert torch.isfinite(found.f).all()
    assert torch.isfinite(found.g).all()
    assert not plan[:, forbidden].any()
    exact = torch.stack(
        [
            plan_of(cost.double(), *pair, 0.2, INF if rho is None else rho)
            for pair in zip(a.view(-1, 9), b.view(-1, 8), strict=True)
        ]
    )
    assert float((plan - exact).abs().sum()) <= 1e-3
    paid = (exact * torch.where(forbidden, 0, cost.double())).sum((1, 2))
    torch.testing.assert_close(found.transport_cost.detach().cpu().double().view(-1), paid, rtol=0, atol=1e-4)
    found.value.sum().backward()
    gradient = leaf.grad.cpu().double()
    assert not gradient[forbidden].any()
    torch.testing.assert_close(gradient, plan.sum(0), rtol=1e-5, atol=1e-6)
    v = on_device(torch.ones(*b.shape, dtype=dtype))
    torch.testing.assert_close(found.apply(v).cpu().double().view(-1, 9), plan.sum(2), rtol=0, atol=1e-6)


def test_forbidden_pairs_at_a_small_reg(backend: str) -> None:
    """Annealed, and with costs far above reg."""
    cost = costs(6, 6)
    cost[torch.eye(6, dtype=torch.bool)] = INF
    found = solve(cost, None, None, backend, reg=1e-3, tol=1e-2, max_iter=15 if backend == "triton" else 2000)
    if backend != "triton":
        assert found.converged
    assert not found.plan().diagonal().any()


def test_lines_that_have_no_place_to_go_are_refused(backend: str) -> None:
    cost = costs(4, 5)
    cost[1] = INF
    with pytest.raises(
        ValueError, match=r"x must allow a pair of each .*, got \+inf in row 1 wherever .* 0.25 in a$"
    ):
        solve(cost, None, None, backend, reg=0.5, max_iter=20)
    # All pairs that are allowed have no weight on the other side.
    cost, a = costs(4, 5), torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64)
    cost[:2, 3] = INF
    for batch in (cost, cost.expand(2, 4, 5)):
        with pytest.raises(ValueError, match=r"got \+inf in column 3( of problem 0)? wherever .* 0.2 in b$"):
            solve(batch, a.expand(*batch.shape[:-1]), None, backend, reg=0.5, tol=0, max_iter=3)
    for value in (math.nan, -INF):
        cost = costs(4, 5)
        cost[3, 2] = value
        with pytest.raises(ValueError, match=r"x must be finite, got (NaN|nan|-inf) at row 3, column 2"):
            solve(cost, weights(3, 4, 0), None, backend, reg=0.5)


def test_float32_beside_float64_is_promoted(backend: str) -> None:
    x, y = on_device(points(1, 6, 2, 0)[0]), on_device(points(1, 5, 2, 1)[0])
    options: dict[str, Any] = {"reg": 1.0, "max_iter": 20, "tol": 0, "backend": backend}
    for left, right in ((x.float(), y), (x, y.float())):
        found, wide = (
            fc.sinkhorn(left, right, **options),
            fc.sinkhorn(left.double(), right.double(), **options),
        )
        assert found.value.dtype == torch.float64
        assert torch.equal(found.f, wide.f)
    leaf = x.float().requires_grad_()
    fc.sinkhorn(leaf, y, **options).value.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32


def test_shapes_of_weights_that_do_not_fit(backend: str) -> None:
    cost = costs(4, 5)
    with pytest.raises(ValueError, match=r"a must have shape \[3, 4\], got \(2, 4\)"):
        solve(cost, weights(2, 4, 0), weights(3, 5, 0), backend, reg=1.0)
    with pytest.raises(ValueError, match=r"b must have shape \[2, 5\], got \(2, 4\)"):
        solve(cost, weights(2, 4, 0), weights(2, 4, 0), backend, reg=1.0)
    with pytest.raises(ValueError, match="a and b must have weights for one problem at least"):
        solve(cost, weights(0, 4, 0), None, backend, reg=1.0)
    lists = fc.sinkhorn(
        on_device(cost), None, None, weights(2, 5, 0).tolist(), reg=1.0, metric="precomputed", backend=backend
    )
    assert lists.value.shape == (2,)


def test_plans_of_pot_for_many_histograms(backend: str) -> None:
    count = 2 if slow(backend) else 20
    cost, a, b = costs(12, 10), weights(1, 12, 1)[0], weights(count, 10, 2)
    found = solve(cost, a, b, backend, reg=0.3, tol=1e-7, max_iter=60)
    losses = ot.sinkhorn(a.numpy(), b.numpy().T, cost.numpy(), 0.3, numItermax=10_000, stopThr=1e-13)
    np.testing.assert_allclose(found.transport_cost.cpu().numpy(), losses, rtol=1e-5)
