"""Sinkhorn with relaxed marginals on every backend against Newton's method on the dual in float64, and the results of odd
arguments and of numbers at the ends of their types' ranges."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE

import flashcoreset as fc
from flashcoreset.sinkhorn import cuda
from flashcoreset.sinkhorn.schedule import Schedule

INF = math.inf
BACKENDS = ["torch", "cpu", "cuda", "cuda streamed"]
# The interpreter takes 0.1 s per iteration, so Triton's kernels are given few of them.
WITH_TRITON = pytest.mark.parametrize("solver", [*BACKENDS, "triton"], indirect=True)
Pair = tuple[float | None, float | None]


@pytest.fixture(params=BACKENDS)
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., fc.Transport]:
    """`fc.sinkhorn` on the backend's device."""
    backend = request.param.split()[0]
    if backend == "cuda":
        request.getfixturevalue("emulated_cuda")
        if request.param != backend:
            monkeypatch.setattr(cuda, "SINKHORN_SHARED_BYTES", 0)
    device = DEVICE if backend in ("cuda", "triton") else "cpu"

    def solve(*arrays: Any, **options: Any) -> fc.Transport:
        moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in arrays]
        there = {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in options.items()}
        return fc.sinkhorn(*moved, **{"backend": backend, **there})

    solve.device = device  # type: ignore[attr-defined]
    return solve


# ---- the oracle


def dual(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, reg: float, rho: tuple[float, float], z: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The dual objective at z = (f, g), its gradient, and its Hessian with the sign changed."""
    n = len(a)
    plan = a[:, None] * b * np.exp(np.minimum((z[:n, None] + z[n:] - cost) / reg, 600))
    value, asked, bend = -reg * (plan.sum() - a.sum() * b.sum()), [], []
    for potential, weight, r in ((z[:n], a, rho[0]), (z[n:], b, rho[1])):
        share = np.exp(np.minimum(-potential / r, 600))
        value += (weight * (potential if r == INF else -r * np.expm1(-potential / r))).sum()
        asked.append(weight * share)
        bend.append(weight * share / r)
    gradient = np.concatenate(asked) - np.concatenate([plan.sum(1), plan.sum(0)])
    hessian = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]]) / reg
    return value, gradient, hessian + np.diag(np.concatenate(bend))


def optimum(
    cost: np.ndarray, a: np.ndarray, b: np.ndarray, reg: float, marginals: Pair
) -> tuple[float, np.ndarray, np.ndarray]:
    """The largest dual value, its potentials (f, g) and its plan: damped Newton steps, from a larger reg down."""
    rho = tuple(INF if r is None else r for r in marginals)
    z = np.zeros(len(a) + len(b))
    eps = max(reg, float(np.ptp(cost)) / 4)
    while True:
        value, gradient, hessian = dual(cost, a, b, eps, rho, z)
        for _ in range(100):
            ridge = 1e-13 * np.abs(hessian).max()
            step, size = np.linalg.solve(hessian + ridge * np.eye(len(z)), gradient), 1.0
            # At the end the value has no digits left to grow in, while the gradient still has.
            while size > 1e-6:
                there = dual(cost, a, b, eps, rho, z + size * step)
                if there[0] > value or np.abs(there[1]).sum() < np.abs(gradient).sum():
                    break
                size /= 2
            else:
                break
            z = z + size * step
            value, gradient, hessian = there
            if np.abs(gradient).sum() < 1e-13:
                break
        if eps == reg:
            break
        eps = max(eps / 3, reg)
    assert np.abs(gradient).sum() < 1e-9
    plan = a[:, None] * b * np.exp((z[: len(a), None] + z[len(a) :] - cost) / reg)
    return value, z, plan


def residual(found: fc.Transport, a: torch.Tensor, b: torch.Tensor, marginals: Pair) -> float:
    """The definition of `error`, for the plan and the potentials that are returned."""
    plan, total = found.plan().double().cpu(), 0.0
    for sums, weight, potential, rho in (
        (plan.sum(1), a, found.f, marginals[0]),
        (plan.sum(0), b, found.g, marginals[1]),
    ):
        asked = weight if rho is None else weight * (-potential.double().cpu() / rho).exp()
        total += float((sums - asked).abs().sum())
    return total


# ---- right values

CLUSTERED: list[Pair] = [(5.0, None), (None, 5.0), (1.0, None), (50.0, 0.2)]


@functools.cache
def clustered(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs of two sets of points in clusters, the largest of them 1, and their weights."""
    r = np.random.default_rng(seed)
    n, m, k = r.integers(4, 11), r.integers(4, 11), r.integers(2, 5)
    centres = 3 * r.standard_normal((k, 2))
    x, y = (centres[r.integers(k, size=s)] + 0.1 * r.standard_normal((s, 2)) for s in (n, m))
    cost = ((x[:, None] - y) ** 2).sum(2)
    a, b = r.random(n) + 0.1, r.random(m) + 0.1
    return cost / cost.max(), a / a.sum(), b / b.sum() * (1.5 if seed % 3 == 0 else 1.0)


@functools.cache
def clustered_optimum(seed: int, marginals: Pair) -> tuple[float, np.ndarray, np.ndarray]:
    return optimum(*clustered(seed), 0.01, marginals)


@functools.cache
def slopes(seed: int, marginals: Pair) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """A direction of the weights of each side, and the central differences of the value along them."""
    cost, a, b = clustered(seed)
    r = np.random.default_rng(seed + 1000)
    ways, h = (a * r.standard_normal(len(a)), b * r.standard_normal(len(b))), 1e-4
    found = []
    for da, db in ((ways[0], 0 * b), (0 * a, ways[1])):
        up, down = (optimum(cost, a + s * da, b + s * db, 0.01, marginals)[0] for s in (h, -h))
        found.append((up - down) / (2 * h))
    return ways[0], ways[1], (found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("marginals", CLUSTERED, ids=str)
def test_clustered_points(marginals: Pair, dtype: torch.dtype, solver: Callable[..., fc.Transport]) -> None:
    """60 problems, 15 per pair, as a ragged batch; half of them were off by up to a factor of 2.3 when iterations stopped at a
    plan that stood still."""
    seeds = [15 * CLUSTERED.index(marginals) + i for i in range(15)]
    count, most = len(seeds), 10
    cost = torch.full((count, most, most), math.nan, dtype=dtype)
    a, b = (torch.full((count, most), math.nan, dtype=torch.float64) for _ in range(2))
    sizes = []
    for p, seed in enumerate(seeds):
        c, wa, wb = clustered(seed)
        sizes.append(c.shape)
        cost[p, : c.shape[0], : c.shape[1]] = torch.from_numpy(c)
        a[p, : len(wa)], b[p, : len(wb)] = torch.from_numpy(wa), torch.from_numpy(wb)
    leaves = [t.to(solver.device).requires_grad_() for t in (cost, a, b)]  # type: ignore[attr-defined]
    rows, columns = (torch.tensor([s[i] for s in sizes]) for i in range(2))
    found = solver(
        leaves[0], None, leaves[1], leaves[2], reg=0.01, metric="precomputed", reg_marginal=marginals,
        x_lengths=rows, y_lengths=columns, tol=1e-6, max_iter=2000,
    )  # fmt: skip
    assert found.converged.all()
    found.value.sum().backward()
    plan = found.plan().double().cpu()
    within = 2e-6 if dtype == torch.float64 else 2e-5
    for p, seed in enumerate(seeds):
        n, m = sizes[p]
        value, _, best = clustered_optimum(seed, marginals)
        assert math.isclose(float(found.value[p].detach()), value, rel_tol=1e-5)
        # If mass may move at next to no cost, tol leaves more of it undone: as much as reg is smaller than rho.
        assert np.abs(plan[p, :n, :m].numpy() - best).sum() <= 100 * within
        assert torch.allclose(leaves[0].grad[p, :n, :m].cpu().double(), plan[p, :n, :m], rtol=1e-5, atol=1e-7)
        da, db, (along_a, along_b) = slopes(seed, marginals)
        for leaf, way, slope in ((leaves[1], da, along_a), (leaves[2], db, along_b)):
            got = float((leaf.grad[p, : len(way)].cpu() * torch.from_numpy(way)).sum())
            assert abs(got - slope) <= 1e-4
    # A problem alone is the same.
    p = count - 1
    n, m = sizes[p]
    with torch.no_grad():
        alone = solver(
            cost[p, :n, :m].contiguous(), None, a[p, :n].contiguous(), b[p, :m].contiguous(), reg=0.01,
            metric="precomputed", reg_marginal=marginals, tol=1e-6, max_iter=2000,
        )  # fmt: skip
    assert int(alone.iterations) == int(found.iterations[p])
    assert float(alone.value) == float(found.value[p].detach())
    assert residual(alone, a[p, :n].detach(), b[p, :m].detach(), marginals) <= 1e-6 + (
        0 if dtype == torch.float64 else 2e-6
    )


SIDES: list[Pair] = [(5.0, None), (None, 5.0), (5.0, 5.0), (5.0, 0.01), (1e-4, 1e4), (1e-6, 1e-6), (1e7, 1e7), (1e10, None),
                     (1e30, 1e20), (1e25, 0.5)]  # fmt: skip


@pytest.mark.parametrize("marginals", SIDES, ids=str)
def test_a_problem_and_its_transpose(marginals: Pair, solver: Callable[..., fc.Transport]) -> None:
    """The plan stands still from the third iteration on while the potentials drift by some reg in each."""
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    a, b = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([0.7, 0.3], dtype=torch.float64)
    # From 1e12 on a penalty holds its marginal to all digits.
    held: Pair = tuple(None if r is None or r > 1e12 else r for r in marginals)  # type: ignore[assignment]
    want = optimum(cost.numpy(), a.numpy(), b.numpy(), 0.01, held)[0]
    if marginals == (5.0, None):
        assert math.isclose(want, 0.380085614722, rel_tol=1e-9)
    for rows, columns, pair in ((a, b, marginals), (b, a, marginals[::-1])):
        found = solver(cost, None, rows, columns, reg=0.01, metric="precomputed", reg_marginal=pair)
        assert found.converged
        assert int(found.iterations) < 150
        assert math.isclose(float(found.value), want, rel_tol=1e-6)
        kept = tuple(None if r is None or r > 1e12 else r for r in pair)
        # From outside, f / rho has the digits of f.
        parts = [float(t.abs().max()) / r for t, r in zip((found.f, found.g), kept, strict=True) if r]
        slack = 1e-15 * max([1.0, *parts])
        assert abs(residual(found, rows, columns, kept) - float(found.error)) <= 1e-9 + slack  # type: ignore[arg-type]
    for huge in ((1e30, 1e20), (1e25, None)):
        with pytest.raises(
            ValueError, match=r"reg_marginal of .* all but holds the marginals, whose sums differ: a has 2"
        ):
            solver(cost, None, 2 * a, b, reg=0.01, metric="precomputed", reg_marginal=huge)


@pytest.mark.parametrize(("marginals", "dtype"), [((5.0, None), torch.float64), ((None, 5.0), torch.float32),
                                                  ((0.2, 500.0), torch.float32)], ids=str)  # fmt: skip
@pytest.mark.parametrize("solver", ["triton"], indirect=True)
def test_triton(marginals: Pair, dtype: torch.dtype, solver: Callable[..., fc.Transport]) -> None:
    """One clustered problem per side, and the two together."""
    cost, a, b = clustered(7)
    there = torch.from_numpy(cost).to(dtype)
    weights = torch.from_numpy(a), torch.from_numpy(b)
    want = clustered_optimum(7, marginals)[0]
    found = solver(there, None, *weights, reg=0.01, metric="precomputed", reg_marginal=marginals, tol=1e-4)
    assert found.converged
    assert int(found.iterations) > 3
    assert math.isclose(float(found.value), want, rel_tol=1e-4)
    assert abs(residual(found, *weights, marginals) - float(found.error)) <= 2e-6


@pytest.mark.parametrize("marginals", [(3.0, None), (0.05, 30.0)], ids=str)
def test_points_zero_weights_and_warm_starts(marginals: Pair, solver: Callable[..., fc.Transport]) -> None:
    r = np.random.default_rng(3)
    x, y = r.standard_normal((7, 2)), r.standard_normal((9, 2)) + 0.5
    a, b = r.random(7) + 0.1, 1.5 * (r.random(9) + 0.1)
    a[2], b[[0, 8]] = 0, 0
    cost = ((x[:, None] - y) ** 2).sum(2)
    want, z, _ = optimum(cost[a > 0][:, b > 0], a[a > 0], b[b > 0], 0.1, marginals)
    options: dict[str, Any] = {"reg": 0.1, "reg_marginal": marginals, "tol": 1e-8, "max_iter": 3000}
    arrays = [torch.from_numpy(t) for t in (x, y, a, b)]
    first = solver(*arrays, **options)
    assert first.converged
    assert math.isclose(float(first.value), want, rel_tol=1e-7)
    asked = [np.exp(-f / marginals[0]) for f in (first.f.cpu().numpy()[a > 0], z[: int((a > 0).sum())])]
    assert np.allclose(*asked, atol=1e-6)
    again = solver(*arrays, warm_start=first, **options)
    assert int(again.iterations) <= 2
    assert math.isclose(float(again.value), want, rel_tol=1e-7)
    # From any start: a constant that is off, and one side far out.
    for f, g in (
        (first.f + 40, first.g - 40),
        (first.f * 0 - 30, first.g + torch.arange(9.0).to(first.g) * 5),
    ):
        other = solver(*arrays, warm_start=(f, g), **options)
        assert other.converged
        assert math.isclose(float(other.value), want, rel_tol=1e-7)
    half = solver(*(t.to(torch.float16) for t in arrays[:2]), *arrays[2:], **{**options, "tol": 1e-6})
    assert half.value.dtype == torch.float32
    assert math.isclose(float(half.value), want, rel_tol=5e-3)


# ---- numbers at the ends of their ranges


@pytest.mark.parametrize("marginals", [(None, None), (2.0, None), (0.5, 8.0)], ids=str)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float64, 1e150),
                                              (torch.float64, 1e-150), (torch.float64, 1e-280)])  # fmt: skip
def test_scales(
    dtype: torch.dtype, scale: float, marginals: Pair, solver: Callable[..., fc.Transport]
) -> None:
    """If all numbers are multiplied by a factor, so are the results."""
    cost, a, b = clustered(4)
    want = optimum(cost, a, b, 0.05, marginals)[0]
    there = (torch.from_numpy(cost) * scale).to(dtype)
    options = {
        "reg": 0.05 * scale,
        "metric": "precomputed",
        "reg_marginal": tuple(r and r * scale for r in marginals),
    }
    found = solver(there, None, torch.from_numpy(a), torch.from_numpy(b), **options)
    assert found.converged
    assert math.isclose(float(found.value) / scale, want, rel_tol=1e-5)
    plan = found.plan().double()
    assert math.isclose(
        float((plan.cpu() * torch.from_numpy(cost)).sum()), float(found.transport_cost) / scale, rel_tol=1e-5
    )


def test_points_whose_distances_overflow_half(solver: Callable[..., fc.Transport]) -> None:
    x, y = torch.tensor([[0.0], [400.0]]), torch.tensor([[100.0], [500.0]])
    plain = solver(x.half(), y.half(), reg=1000.0)
    assert plain.converged
    want = optimum((x - y.T).double().numpy() ** 2, np.full(2, 0.5), np.full(2, 0.5), 1000.0, (None, None))[0]
    assert math.isclose(float(plain.value), want, rel_tol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value) encountered"
)  # NumPy's, in the interpreter: no constant then
@WITH_TRITON
@pytest.mark.parametrize("marginals", [(None, None), (0.5, None), (None, 0.5), (0.2, 4.0)], ids=str)
def test_masses_far_below_one(marginals: Pair, solver: Callable[..., fc.Transport]) -> None:
    """An error of 1e-6 is all of a mass of 1e-6: tol is a share of the plan's mass, in each problem of a batch by itself."""
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    left, right = torch.tensor([0.3, 0.7]).double(), torch.tensor([0.7, 0.3]).double()
    reg = 0.3  # few iterations, since the interpreter is slow
    masses = [(1.0, 1.0), (1e-6, 1e-6), (1e-30, 1e-30)]
    if marginals != (None, None):
        masses += [(1.0, 1e-6), (1e-6, 1.0)]
    a, b = (torch.stack([side * pair[k] for pair in masses]) for k, side in enumerate((left, right)))
    options: dict[str, Any] = {"metric": "precomputed", "reg": reg, "reg_marginal": marginals}
    batch = solver(cost.expand(len(masses), 2, 2), a=a, b=b, **options)
    assert batch.converged.all()
    for p, pair in enumerate(masses):
        found = solver(cost, a=a[p], b=b[p], **options)
        assert found.converged
        assert torch.equal(found.f, batch.f[p])
        assert torch.equal(found.g, batch.g[p])
        # The plan has the mass of the marginal that holds.
        mass = {(True, False): pair[0], (False, True): pair[1]}.get(
            tuple(r is None for r in marginals), max(pair)
        )
        assert residual(found, a[p], b[p], marginals) <= 2e-6 * min(1.0, mass)
        assert float(found.error) <= 1e-6 * min(1.0, mass)
        if marginals == (None, None):
            # The plan is in proportion; -reg log(mass) of it comes from KL(P | a b).
            value, _, _ = optimum(cost.numpy(), left.numpy(), right.numpy(), reg, marginals)
            expected = value - reg * (math.log(pair[0]) + 1 - pair[0])
            assert float(found.value) / pair[0] == pytest.approx(expected, rel=1e-5)


def test_float32_reaches_the_error_of_unequal_masses(solver: Callable[..., fc.Transport]) -> None:
    """The share of b's mass would be below the rounding of a plan of mass 1."""
    x, y = (torch.rand(n, 3, generator=torch.Generator().manual_seed(n)) for n in (30, 40))
    for mass in (0.1, 1e-3):
        b = torch.full((40,), mass / 40, dtype=torch.float64)
        for marginals in ((None, 1.0), (1.0, 1.0)):
            found = solver(x, y, b=b, reg=0.05, reg_marginal=marginals)
            assert found.converged
            assert int(found.iterations) < 200


@WITH_TRITON
def test_a_value_beyond_float32_is_refused(solver: Callable[..., fc.Transport]) -> None:
    """One iteration from a potential that is large beside rho: the plan has a mass of exp(424), which float64 holds."""
    options: dict[str, Any] = {
        "metric": "precomputed",
        "reg": 2.0**-6,
        "reg_marginal": (None, 2.0**-13),
        "max_iter": 1,
        "tol": 0,
    }
    start = [torch.tensor([number], device=solver.device) for number in (-0.0625, -6.6875)]
    cost = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="value or error is not finite"):
        solver(cost, warm_start=tuple(start), **options)
    found = solver(cost.double(), warm_start=tuple(start), **options)
    assert float(found.plan()) == pytest.approx(math.exp((float(found.f) + float(found.g)) * 64), rel=1e-9)


@WITH_TRITON
def test_masses_that_differ_are_refused_if_balanced(solver: Callable[..., fc.Transport]) -> None:
    """On a GPU the weights had been made equal before they were checked."""
    x, b = torch.zeros(2, 3, 1), torch.full((2, 3), 1 / 3).double()
    b[1, 2] += 2e-4
    for options in ({"b": b}, {"a": torch.ones(2, 3).double(), "b": 3 * b}):
        with pytest.raises(
            ValueError, match=r"a and b must have the same sum for balanced .* of problem 1; scale"
        ):
            solver(x, x, reg=1.0, **options)
        assert solver(x, x, reg=1.0, reg_marginal=(None, 1.0), **options).converged.all()


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "l1", "precomputed"])
def test_costs_that_overflow_are_refused(metric: str, solver: Callable[..., fc.Transport]) -> None:
    # Squares of 1e20, differences of 2e38 and more.
    far = {"sqeuclidean": 1e20, "euclidean": 1e20, "l1": 3e38, "precomputed": 3e38}[metric]
    x = torch.tensor([[far, 0.0], [-far, 1.0]])
    y = None if metric == "precomputed" else -x
    with pytest.raises(
        ValueError, match=r"x: costs overflow torch.float32; scale the data down or use float64"
    ):
        solver(x, y, reg=1.0, metric=metric)


@WITH_TRITON
def test_exponents_that_overflow_are_refused(solver: Callable[..., fc.Transport]) -> None:
    cost = torch.tensor([[0.0, 1e10], [1e10, 0.0]])
    with pytest.raises(ValueError, match=r"^reg: costs .* overflow torch.float32; raise reg or use float64"):
        solver(cost, reg=1e-30, metric="precomputed")


def test_a_reg_below_the_digits_of_costs_is_refused(solver: Callable[..., fc.Transport]) -> None:
    # f + g - C is about 1e-16 of rounding here, which is 1e14 in units of reg: infinite plans, or empty ones.
    x, y = (
        torch.randn(20, n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (3, 4)
    )
    with pytest.raises(ValueError, match=r"^reg: value or error of problem \d+ is not finite: 1e-30"):
        solver(x, y, reg=1e-30, max_iter=1)


def test_a_small_reg_in_float64(solver: Callable[..., fc.Transport]) -> None:
    cost = torch.tensor([[0.0, 1e10], [1e10, 0.0]])
    # Of what fits, the optimum is what little entropy leaves of it.
    found = solver(cost.double(), reg=1e-30, metric="precomputed", max_iter=50)
    assert float(found.transport_cost) == 0
    assert found.converged


def test_the_smallest_reg(solver: Callable[..., fc.Transport]) -> None:
    """No number of stages is made from a value that is no number."""
    cost = torch.tensor([[0.0, 1e250], [1e250, 0.0]], dtype=torch.float64)
    found = solver(cost, reg=1e-50, metric="precomputed", max_iter=40)
    assert float(found.transport_cost) == 0
    schedule = Schedule(1e-300, 1e300, 1e-6, 5000, False)
    stages = 0
    while schedule.eps > 1e-300:
        assert schedule.after(math.inf, math.inf) in ("go on", "new eps")
        stages += 1
        assert stages < 5000
    for error in (math.nan, INF):
        schedule = Schedule(1.0, 1e4, 1e-6, 20, False)
        while schedule.after(error, error) != "stop":
            assert schedule.iterations < 20
        assert schedule.iterations <= 20


# ---- arguments

X, Y = torch.zeros(3, 2), torch.ones(4, 2)


@pytest.mark.parametrize(("value", "message"), [
    ((torch.full((3,), 1e300, dtype=torch.float64), torch.zeros(4)), r"warm_start: f must be potentials of costs like these"),
    ((torch.zeros(3), torch.tensor([0.0, 0, 0, -1e300], dtype=torch.float64)), r"warm_start: g must be potentials .* -?1e\+300"),
])  # fmt: skip
def test_warm_starts_without_digits_are_refused(
    value: tuple[torch.Tensor, torch.Tensor], message: str, solver: Callable[..., fc.Transport]
) -> None:
    with pytest.raises(ValueError, match=message):
        solver(X, Y, reg=1.0, warm_start=tuple(t.to(solver.device) for t in value))  # type: ignore[attr-defined]


class Rude:
    """Its __dlpack__ sets no error and returns nothing that is a capsule."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> Any:
        raise SystemError("returned a result with an exception set")


@pytest.mark.parametrize("function", [fc.sinkhorn, fc.sinkhorn_divergence])
def test_odd_arguments_are_named(function: Callable[..., Any]) -> None:
    sparse = torch.full((3,), 1 / 3).to_sparse()
    with pytest.raises(TypeError, match=r"a must be a dense tensor, got layout torch\.sparse_coo"):
        function(X, Y, sparse, reg=1.0)
    for place, name in enumerate(("x", "y", "a", "b")):
        arrays: list[Any] = [X, Y, None, None]
        arrays[place] = Rude()
        with pytest.raises(TypeError, match=f"^{name}: the __dlpack__ of Rude could not be taken"):
            function(*arrays, reg=1.0)
    with pytest.raises(ValueError, match="reg_marginal must be at least 1e-290"):
        function(X, Y, reg=1.0, reg_marginal=5e-324)
    with pytest.raises(TypeError, match="reg must be a number"):
        function(X, Y, reg=torch.ones(2))
    found = function(
        X, Y, torch.full((3,), 0.5), torch.full((4,), 0.25), reg=torch.tensor(0.5), reg_marginal=1e4
    )
    plain = function(X, Y, torch.full((3,), 0.5), torch.full((4,), 0.25), reg=0.5, reg_marginal=1e4)
    values = [t.value if isinstance(t, fc.Transport) else t for t in (found, plain)]
    assert torch.equal(*values)


def test_odd_arguments_of_a_warm_start_and_of_products_are_named() -> None:
    with pytest.raises(TypeError, match="warm_start: f must be a dense tensor"):
        fc.sinkhorn(X, Y, reg=1.0, warm_start=(torch.zeros(3).to_sparse(), torch.zeros(4)))
    with pytest.raises(
        TypeError, match="warm_start: g must have dtype float16, bfloat16, float32 or float64, got int64"
    ):
        fc.sinkhorn(X, Y, reg=1.0, warm_start=(torch.zeros(3), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(TypeError, match="v must be a dense tensor"):
        fc.sinkhorn(X, Y, reg=1.0).apply(torch.ones(4).to_sparse())


# ---- warnings


def line_of(call: Callable[[], Any]) -> tuple[int, list[warnings.WarningMessage]]:
    """The line of a call of one line, and its warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return call.__code__.co_firstlineno, [w for w in seen if w.category is fc.ConvergenceWarning]


def test_warnings_point_at_the_line_that_called(backend: str) -> None:
    x, y = torch.rand(5, 2), torch.rand(6, 2)
    leaf = x.clone().requires_grad_()
    options: dict[str, Any] = {"reg": 1e-3, "max_iter": 2, "backend": backend}
    for call in (
        lambda: fc.sinkhorn(x, y, **options),
        lambda: fc.sinkhorn(x, y, reg_marginal=3.0, **options),
        lambda: fc.sinkhorn(leaf, y, **options).value.backward(),
        lambda: fc.sinkhorn_divergence(x, y, **options),
        lambda: fc.sinkhorn_divergence(leaf, y, reg_marginal=3.0, **options).backward(),
    ):
        line, seen = line_of(call)
        assert seen
        assert {(w.filename, w.lineno) for w in seen} == {(__file__, line)}


def test_each_line_is_warned_of_once() -> None:
    x, y = torch.rand(5, 2), torch.rand(6, 2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            fc.sinkhorn(x, y, reg=1e-3, max_iter=2)
        fc.sinkhorn(x, y, reg=1e-3, max_iter=2)
    assert len(seen) == 2


def test_goracs_leaves_what_is_undone_to_its_gap() -> None:
    x, y = torch.rand(60, 3), torch.rand(40, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fc.ConvergenceWarning)
        fc.goracs(x, y, torch.rand(60), 8, solver="sinkhorn", reg=1e-3)
