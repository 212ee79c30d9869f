"""The course of Sinkhorn iterations on every backend: warm starts that stall, tolerances that a type cannot reach, symmetric problems and
the divergences made of them."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE

import flashcoreset as fc
from flashcoreset.sinkhorn import cuda, self_transport
from flashcoreset.sinkhorn.schedule import REACH, Schedule

BACKENDS = ["torch", "cpu", "cuda", "cuda streamed"]
# The interpreter takes 0.1 s per iteration, so Triton's kernels are given few of them.
WITH_TRITON = pytest.mark.parametrize("backend", [*BACKENDS, "triton"], indirect=True)
Flow = list[tuple[torch.Tensor, torch.Tensor, float, tuple[torch.Tensor, torch.Tensor]]]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param.split()[0]
    if name == "cuda":
        request.getfixturevalue("emulated_cuda")
        if request.param != name:
            monkeypatch.setattr(cuda, "SINKHORN_SHARED_BYTES", 0)
    return name


def there(backend: str, *arrays: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(DEVICE if backend in ("cuda", "triton") else "cpu") for t in arrays]


def points(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(n: int, seed: int) -> torch.Tensor:
    raw = points(n, 1, seed)[:, 0] + 0.05
    return raw / raw.sum()


# ---- warm starts


@functools.cache
def flow(seed: int, apart: float, rate: float, away: float, steps: int = 7) -> Flow:
    """The problems of a gradient flow to two clusters, each with the potentials of the one before."""
    g = torch.Generator().manual_seed(seed)
    n, reg = 40, 0.005
    x = 0.1 * torch.randn(n, 2, generator=g, dtype=torch.float64) + away
    y = 0.03 * torch.randn(n, 2, generator=g, dtype=torch.float64)
    y[:, 0] += torch.where(torch.rand(n, generator=g) < 0.5, -apart / 2, apart / 2)
    start, problems = None, []
    for _ in range(steps):
        x = x.detach().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.ConvergenceWarning)
            found = fc.sinkhorn(x, y, reg=reg, warm_start=start, max_iter=3000, backend="cpu")
        if start is not None:
            problems.append((x.detach(), y, reg, (start.f.detach(), start.g.detach())))
        found.value.backward()
        start, x = found, x - rate * n * x.grad
    return problems


FLOWS = [
    (seed, *rest)
    for seed in (0, 1)
    for rest in ((0.6, 0.1, 1.0), (0.6, 0.3, 1.0), (0.6, 0.1, 0.0), (2.0, 0.1, 0.0))
]


def counts(
    x: torch.Tensor, y: torch.Tensor, reg: float, start: Any, backend: str, **options: Any
) -> tuple[int, int]:
    """The iterations of a warm and of a cold start; those that do not converge count as infinitely many (10^9)."""
    arrays = there(backend, x, y)
    moved = None if start is None else tuple(there(backend, *start))
    result = []
    for given in (moved, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.ConvergenceWarning)
            found = fc.sinkhorn(
                *arrays, reg=reg, warm_start=given, backend=backend, **{"max_iter": 400, **options}
            )
        result.append(int(found.iterations) if bool(found.converged) else 10**9)
    return result[0], result[1]


@pytest.mark.parametrize("flow_of", FLOWS, ids=str)
def test_a_warm_start_never_loses_to_a_cold_one(flow_of: tuple[int, float, float, float]) -> None:
    """By more than a tenth, or where that is less by the dozen iterations that it takes to find out and to come down from a larger eps.
    Before, clusters whose masses had to change took 1,000 iterations without convergence where a cold start takes 16."""
    for x, y, reg, start in flow(*flow_of):
        warm, cold = counts(x, y, reg, start, "cpu")
        assert warm <= max(1.1 * cold, cold + 12), (warm, cold)


def test_a_warm_start_that_stalls_is_annealed(backend: str) -> None:
    """The same course on every backend."""
    stalled = 0
    for x, y, reg, start in flow(0, 0.6, 0.1, 1.0)[2:5]:
        warm, cold = counts(x, y, reg, start, backend)
        assert (warm, cold) == counts(x, y, reg, start, "torch")
        assert warm <= 25
        stalled += cold > 400
    assert stalled > 0, "no problem in which annealing is what matters"


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_warm_start_that_stalls_is_annealed_by_triton(backend: str) -> None:
    x, y, reg, start = flow(0, 0.6, 0.1, 1.0)[3]
    options: dict[str, Any] = {"max_iter": 30, "tol": 1e-4}
    stalls, _ = counts(x, y, reg, start, "torch", **options)
    assert 10 < stalls <= 25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.ConvergenceWarning)
        found = fc.sinkhorn(*there(backend, x, y), reg=reg, warm_start=start, backend=backend, **options)
    assert int(found.iterations) == stalls


def test_a_good_warm_start_is_left_alone() -> None:
    for x, y, reg, start in flow(0, 2.0, 0.1, 0.0):
        warm, cold = counts(x, y, reg, start, "cpu")
        assert warm <= 0.75 * cold
    for x, y, reg, _ in flow(1, 0.6, 0.1, 1.0)[-1:]:
        done = fc.sinkhorn(x, y, reg=reg, backend="cpu", max_iter=3000)
        assert counts(x, y, reg, (done.f, done.g), "cpu")[0] <= 2


def test_warm_starts_from_anywhere() -> None:
    """Potentials of other problems, turned round, of random numbers, and of a constant."""
    worst = 0.0
    for seed in range(6):
        x, y = points(40, 3, seed), points(30, 3, seed + 100)
        g = torch.Generator().manual_seed(seed)
        for reg in (0.2, 0.02, 0.004):
            cold = fc.sinkhorn(x, y, reg=reg, max_iter=30_000, backend="cpu")
            noise = (
                torch.randn(40, generator=g, dtype=torch.float64),
                torch.randn(30, generator=g, dtype=torch.float64),
            )
            starts = [noise, (-cold.f, -cold.g), (cold.f.flip(0), cold.g.flip(0)), (cold.f + 7, cold.g - 7)]
            for start in starts:
                warm = fc.sinkhorn(x, y, reg=reg, max_iter=30_000, backend="cpu", warm_start=start)
                assert warm.converged
                assert math.isclose(float(warm.value), float(cold.value), rel_tol=1e-5)
                worst = max(worst, (int(warm.iterations) - 10) / int(cold.iterations))
    assert worst <= 2.5  # seen: 2.04; how soon over-relaxation finds its omega is a matter of luck


def test_one_cost_for_many_weights_from_a_start_that_stalls() -> None:
    """Problems that are solved together leave each other when one is to be annealed."""
    x, y, reg, start = flow(0, 0.6, 0.1, 1.0)[3]
    cost = torch.cdist(x, y) ** 2
    b = torch.full((3, 40), 1 / 40, dtype=torch.float64)
    f, g = (t.expand(3, -1).clone() for t in start)
    f[1:], g[1:] = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.ConvergenceWarning)
        found = fc.sinkhorn(
            cost, None, None, b, reg=reg, metric="precomputed", warm_start=(f, g), backend="cpu", max_iter=400
        )
        alone = fc.sinkhorn(
            cost,
            None,
            None,
            b[0],
            reg=reg,
            metric="precomputed",
            warm_start=start,
            backend="cpu",
            max_iter=400,
        )
    assert found.converged[0]
    assert int(found.iterations[0]) == int(alone.iterations) <= 25


# ---- tolerances below rounding


@pytest.mark.parametrize("reg", [0.1, 0.01])
@pytest.mark.parametrize("marginal", [None, 0.5])
def test_a_tolerance_below_rounding(reg: float, marginal: float | None, backend: str) -> None:
    cost = torch.cdist(points(24, 3, 0), points(30, 3, 1)) ** 2
    cost /= cost.max()
    for dtype, tol in ((torch.float32, 1e-9), (torch.float64, 1e-18)):
        computed = dtype if backend != "torch" else torch.float64  # as the reference does, whatever comes in
        with pytest.warns(fc.ConvergenceWarning) as caught:
            found = fc.sinkhorn(
                *there(backend, cost.to(dtype)), reg=reg, metric="precomputed", tol=tol if computed == dtype else 1e-18,
                reg_marginal=marginal, max_iter=5000, backend=backend,
            )  # fmt: skip
        message = str(caught[0].message)
        assert not found.converged
        assert int(found.iterations) < 1000
        assert float(found.error) <= REACH[computed]
        assert f"about what {str(computed)[6:]} can reach here" in message
        assert message.endswith("or use float64" if computed == torch.float32 else "raise tol")


@pytest.mark.parametrize("marginal", [None, 0.5, (None, 5.0), (200.0, 0.1)], ids=str)
def test_slow_runs_are_not_cut_short(marginal: Any) -> None:
    """Every run that converges without the rule of rest converges with it, in the same iterations. The tolerances are below the errors that
    the rule looks at and above those that float64 and float32 reach."""
    for seed in range(3):
        cost = torch.cdist(points(30, 2, seed), points(25, 2, seed + 9)) ** 2
        cost /= cost.max()
        for reg in (0.1, 0.01, 0.003):
            for dtype, tol in ((torch.float32, 8e-7), (torch.float64, 1.2e-14)):
                assert tol < REACH[dtype]
                options: dict[str, Any] = {
                    "reg": reg,
                    "metric": "precomputed",
                    "reg_marginal": marginal,
                    "backend": "cpu",
                }
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", fc.ConvergenceWarning)
                    close = fc.sinkhorn(cost.to(dtype), tol=tol, max_iter=20_000, **options)
                assert close.converged, (seed, reg, dtype, float(close.error))


def schedule_of(errors: list[float], share: float = 1.0, **options: Any) -> tuple[int, str]:
    """When a run ends that is judged by this share of its L1 errors, and how."""
    schedule = Schedule(
        1.0, 1.0, max_iter=len(errors), warm=False, reach_of_type=1e-6, **{"tol": 1e-9, **options}
    )
    for done, error in enumerate(errors, start=1):
        order = schedule.after(error, share * error)
        if order != "go on":
            return done, order
    raise AssertionError("a schedule has an end")


def test_the_rule_of_rest() -> None:
    # Noise about an error that stays; the windows that are compared begin when the error is within reach.
    noise = np.random.default_rng(0).uniform(2e-7, 3e-7, 5000)
    done, order = schedule_of([1e-3] * 40 + list(noise))
    assert order == "stop"
    assert done <= 40 + (Schedule.RESTS + 6) * Schedule.WINDOW
    # Errors that fall, however slowly, as long as they come to the tolerance in time.
    slow = [5e-7 * 0.998**i for i in range(5000)]
    assert schedule_of(slow)[1] == "check"
    # A stay that ends: outside of reach nothing is counted.
    assert schedule_of([2e-6] * 3000 + slow)[1] == "check"
    # Errors that do not come to the tolerance in time, while those that are judged do.
    done, order = schedule_of(slow[:2000])
    assert (order, done < 500) == ("stop", True)
    assert schedule_of(slow[:2000], share=1 / 30)[1] == "check"
    # With tol = 0, or one above the reach, there is no such rule.
    assert schedule_of([2e-7] * 500, tol=0.0) == (500, "stop")
    assert schedule_of([2e-6] * 500, tol=1.5e-6) == (500, "stop")
    # Checks that fail.
    schedule = Schedule(1.0, 1.0, 1e-9, 10**6, False, reach_of_type=1e-6)
    failed = 0
    while schedule.after(5e-10, 5e-10) == "check" and schedule.disappointed(5e-9):
        failed += 1
    assert failed == Schedule.CHECKS - 1


# ---- symmetric problems


def averaged(cost: np.ndarray, a: np.ndarray, reg: float, rho: float) -> np.ndarray:
    """The potential of a symmetric problem in float64, by 20,000 averages at most."""
    f, heavy = np.zeros(len(a)), a > 0
    damp = 1.0 if rho == math.inf else rho / (rho + reg)
    for _ in range(20_000):
        exponent = (f[:, None] + f[heavy] - cost[:, heavy]) / reg + np.log(a[heavy])
        top = exponent.max(1)
        sums = top + np.log(np.exp(exponent - top[:, None]).sum(1))
        new = f / 2 + damp * (f - reg * sums) / 2
        if np.abs(new - f).max() < 1e-15:
            break
        f = new
    return f


METRICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sqeuclidean": lambda x: torch.cdist(x, x) ** 2,
    "euclidean": lambda x: torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"),
    "l1": lambda x: torch.cdist(x, x, 1),
    "cosine": lambda x: 1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rho", [None, 0.3])
@pytest.mark.parametrize("metric", METRICS)
def test_symmetric_problems(metric: str, rho: float | None, dtype: torch.dtype, backend: str) -> None:
    """Against float64 averages, for any reg in a dozen iterations."""
    x, a = points(45, 3, 5).to(dtype), weights(45, 6)
    a[[3, 40]] = 0
    a /= a.sum()
    cost = METRICS[metric](x.double()).numpy()
    regs = (1.0, 0.05, 0.001) if backend in ("torch", "cpu") else (0.02,)
    for part in regs:
        reg = part * float(cost.max())
        found = self_transport(
            *there(backend, x, a), reg=reg, metric=metric, reg_marginal=rho, backend=backend
        )
        assert found.converged
        assert int(found.iterations) <= 13
        assert torch.equal(found.f, found.g)
        # An error of 1e-6 leaves potentials off by reg / 2 times as much as the weights' shares, here of 0.001 and more.
        expected = averaged(cost, a.numpy(), reg, rho or math.inf)
        slack = 2e-6 * float(cost.max()) + 1e-3 * reg
        assert np.abs(found.f.double().cpu().numpy() - expected).max() <= slack
        plan = found.plan().double().cpu()
        asked = a if rho is None else a * torch.exp(-found.f.double().cpu() / rho)
        shown = float((plan.sum(1) - asked).abs().sum() + (plan.sum(0) - asked).abs().sum())
        assert abs(shown - float(found.error)) <= (1e-12 if dtype == torch.float64 else 2e-6)
        if dtype == torch.float64:
            assert torch.allclose(plan, plan.T, atol=1e-12)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_symmetric_problem_of_triton(backend: str) -> None:
    x, a = points(12, 2, 5), weights(12, 6)
    options: dict[str, Any] = {"reg": 0.05, "reg_marginal": 0.7}
    found = self_transport(*there(backend, x, a), backend=backend, **options)
    expected = self_transport(x, a, backend="torch", **options)
    assert int(found.iterations) == int(expected.iterations)
    assert torch.allclose(found.f.cpu(), expected.f, atol=1e-9)
    assert torch.equal(found.f, found.g)


@WITH_TRITON
def test_symmetric_problems_of_a_batch(backend: str) -> None:
    """Each has the bits that it has alone, whatever its padding."""
    sizes = [9, 4, 1]
    x = torch.full((3, 9, 2), math.nan)
    for p, size in enumerate(sizes):
        x[p, :size] = points(size, 2, p).float()
    given = there(backend, x)[0]
    batch = self_transport(given, reg=0.03, x_lengths=sizes, backend=backend)
    for p, size in enumerate(sizes):
        alone = self_transport(given[p, :size].contiguous(), reg=0.03, backend=backend)
        assert torch.equal(batch.f[p, :size], alone.f)
        assert torch.equal(batch.value[p], alone.value)
        assert int(batch.iterations[p]) == int(alone.iterations)
        assert not batch.f[p, size:].any()


def test_symmetric_problems_without_a_matrix_in_memory() -> None:
    x, a = points(150, 3, 1).float(), weights(150, 2)
    for rho in (None, 0.5):
        kept, made = (
            self_transport(x, a, reg=0.01, reg_marginal=rho, memory_budget=budget, backend="cpu")
            for budget in (2**28, 0)
        )
        assert int(kept.iterations) == int(made.iterations)
        assert torch.allclose(kept.f, made.f, atol=1e-6)
    plain = self_transport(x, a, reg=0.01, tol=0, max_iter=4, backend="cpu")
    assert int(plain.iterations) == 4


# ---- divergences


def test_a_divergence_with_all_that_was_found(backend: str) -> None:
    x, y = there(backend, points(20, 2, 0), points(15, 2, 1) + 0.5)
    a, b = there(backend, weights(20, 2), weights(15, 3))
    options: dict[str, Any] = {"reg": 0.02, "backend": backend}
    found = fc.sinkhorn_divergence(x, y, a, b, full_output=True, **options)
    assert isinstance(found, fc.Divergence)
    plain = fc.sinkhorn_divergence(x, y, a, b, **options)
    assert isinstance(plain, torch.Tensor)
    assert torch.equal(found.value, plain)
    assert found.converged
    assert float(found.error) == max(float(t.error) for t in (found.cross, found.of_x, found.of_y))
    assert int(found.iterations) == sum(int(t.iterations) for t in (found.cross, found.of_x, found.of_y))
    assert max(int(found.of_x.iterations), int(found.of_y.iterations)) <= 13
    by_hand = [
        fc.sinkhorn(u, v, p, q, max_iter=20_000, **options).value
        for u, v, p, q in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    ]
    assert math.isclose(float(plain), float(by_hand[0] - (by_hand[1] + by_hand[2]) / 2), abs_tol=1e-7)
    # The potentials are the slopes in the weights, in directions that leave the mass.
    way = (
        there(
            backend, torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
        )[0]
        * a
    )
    way -= a * way.sum()
    up, down = (
        fc.sinkhorn_divergence(x, y, a + s * way, b, tol=1e-9, max_iter=5000, **options) for s in (1, -1)
    )
    assert math.isclose(float(up - down) / 2, float((found.f * way).sum()), rel_tol=1e-3, abs_tol=1e-9)
    # Again, from all three.
    again = fc.sinkhorn_divergence(x, y, a, b, warm_start=found, full_output=True, **options)
    assert [int(t.iterations) for t in (again.cross, again.of_x, again.of_y)] == [1, 1, 1]
    assert math.isclose(float(again.value), float(plain), abs_tol=1e-8)


def test_divergences_along_a_flow() -> None:
    """From the divergence of the step before, never many more iterations than anew."""
    last = None
    for x, y, reg, _ in flow(0, 0.6, 0.1, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.ConvergenceWarning)
            found = fc.sinkhorn_divergence(x, y, reg=reg, warm_start=last, full_output=True, backend="cpu")
            anew = fc.sinkhorn_divergence(x, y, reg=reg, full_output=True, backend="cpu")
        for warm, cold in zip(found._parts, anew._parts, strict=True):
            if bool(cold.converged):
                assert bool(warm.converged)
                assert int(warm.iterations) <= 1.1 * int(cold.iterations) + 8
        last = found


def test_divergences_are_saved_and_copied(tmp_path: Any) -> None:
    x = points(2 * 6, 2, 0).view(2, 6, 2)
    found = fc.sinkhorn_divergence(x, x + 1, reg=0.1, full_output=True)
    assert found.value.shape == found.error.shape == found.iterations.shape == found.converged.shape == (2,)
    assert found.f.shape == found.g.shape == (2, 6)
    found.save(tmp_path / "divergence.npz")
    for other in (fc.load(tmp_path / "divergence.npz"), copy.deepcopy(found)):
        assert torch.equal(other.value, found.value)
        assert torch.equal(other.of_y.plan(), found.of_y.plan())
    again = fc.sinkhorn_divergence(x, x + 1, reg=0.1, warm_start=fc.load(tmp_path / "divergence.npz"))
    assert torch.allclose(again, found.value, atol=1e-6)


def test_gradients_of_divergences() -> None:
    x, y, a = points(7, 2, 0).requires_grad_(), points(6, 2, 1), weights(7, 2)
    value = lambda t: fc.sinkhorn_divergence(t, y, a, None, reg=0.1, tol=1e-11, max_iter=5000)  # noqa: E731
    assert torch.autograd.gradcheck(value, x, eps=1e-5, atol=1e-6)


def test_bad_arguments_of_divergences() -> None:
    x = points(4, 2, 0)
    with pytest.raises(TypeError, match="full_output must be True or False, got int"):
        fc.sinkhorn_divergence(x, x, reg=1.0, full_output=1)  # type: ignore[call-overload]
    with pytest.raises(
        ValueError, match="warm_start must have potentials of 1 problems of 3 rows and 4 columns"
    ):
        fc.sinkhorn_divergence(
            x[:3], x, reg=1.0, warm_start=fc.sinkhorn_divergence(x, x, reg=1.0, full_output=True)
        )
    with pytest.raises(TypeError, match="warm_start must be None, a Transport or a pair"):
        fc.sinkhorn_divergence(x, x, reg=1.0, warm_start=3)


@pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
def test_symmetric_problems_of_bindings_read_one_side(backend: str) -> None:
    """What the columns are given as may be of any size; results have that of the rows."""
    kernels = getattr(fc.kernels, backend)
    x, y, a, b = points(6, 2, 0)[None], points(9, 2, 1)[None], weights(6, 2)[None], weights(9, 3)[None]
    options: dict[str, Any] = {"reg": 0.1, "metric": "sqeuclidean", "symmetric": True}
    right = fc.kernels.SinkhornProblem(*there(backend, x, x, a, a), **options)
    assert torch.equal(kernels.sinkhorn(right).f, kernels.sinkhorn(right).g)
    with pytest.raises(ValueError, match=r"g: expected shape \(1, 6\), got \(1, 9\)"):
        kernels.sinkhorn(fc.kernels.SinkhornProblem(*there(backend, x, y, a, b), **options))
    costs = there(backend, points(6, 6, 0)[None])[0]
    with pytest.raises(ValueError, match="y: expected points, or None for metric precomputed"):
        kernels.sinkhorn(
            fc.kernels.SinkhornProblem(
                costs, None, *there(backend, a, a), **{**options, "metric": "precomputed"}
            )
        )


# ---- the norm of the error

RHO = {
    "balanced": (None, None),
    "relaxed": (0.5, 0.5),
    "rows relaxed": (0.4, None),
    "columns relaxed": (None, 0.3),
}


def residuals(
    cost: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    reg: float,
    rho: tuple[float | None, ...],
    found: Any,
) -> list[torch.Tensor]:
    """What both marginals of a plan are off by, in float64, from its potentials and costs alone."""
    f, g = found._problem.f.cpu(), found._problem.g.cpu()
    f, g = (f, g) if cost.dim() == 3 else (f[0], g[0])
    plan = (
        torch.exp((f[..., :, None] + g[..., None, :] - cost.double()) / reg)
        * a[..., :, None]
        * b[..., None, :]
    )
    asked = (w if r is None else w * torch.exp(-p / r) for w, p, r in zip((a, b), (f, g), rho, strict=True))
    return [sums - wanted for sums, wanted in zip((plan.sum(-1), plan.sum(-2)), asked, strict=True)]


def l2_error(*problem: Any) -> torch.Tensor:
    rows, columns = residuals(*problem)
    return rows.norm(dim=-1) + columns.norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("marginal", RHO)
@WITH_TRITON
def test_the_l2_error_is_that_of_the_plan(backend: str, marginal: str, dtype: torch.dtype) -> None:
    """And the iterations are those that the L1 error goes with."""
    rho, reg = RHO[marginal], 0.05
    a, b = weights(21, 3), weights(34, 4)
    cost = torch.cdist(points(21, 3, 1), points(34, 3, 2)).to(dtype)
    options: dict[str, Any] = {
        "reg": reg,
        "metric": "precomputed",
        "reg_marginal": rho,
        "tol": 0,
        "backend": backend,
    }
    for max_iter in (1, 2, 6):
        first, second = (
            fc.sinkhorn(
                *there(backend, cost), None, *there(backend, a, b), max_iter=max_iter, norm=norm, **options
            )
            for norm in ("l1", "l2")
        )
        assert torch.equal(first.f, second.f)
        assert torch.equal(first.g, second.g)
        assert first.value == second.value
        off = residuals(cost, a, b, reg, rho, second)
        # Sums of float32 are off by some 1e-7 of the mass all together.
        slack = 2e-7 if dtype == torch.float32 else 1e-14
        assert float(second.error) == pytest.approx(float(sum(r.norm() for r in off)), abs=slack)
        assert float(first.error) == pytest.approx(float(sum(r.abs().sum() for r in off)), abs=4 * slack)
        assert float(second.error) < 0.6 * float(first.error)


@pytest.mark.parametrize("marginal", RHO)
@WITH_TRITON
def test_runs_end_by_the_l2_error(backend: str, marginal: str) -> None:
    """Earlier than by the L1 error, after as many iterations on every backend."""
    rho, reg, tol = RHO[marginal], 0.1, 1e-3 if backend == "triton" else 1e-8
    a, b = weights(30, 3), weights(40, 4)
    cost = torch.cdist(points(30, 3, 1), points(40, 3, 2))
    options: dict[str, Any] = {"reg": reg, "metric": "precomputed", "reg_marginal": rho, "tol": tol}
    found, sooner = (
        fc.sinkhorn(*there(backend, cost), None, *there(backend, a, b), norm=norm, backend=backend, **options)
        for norm in ("l1", "l2")
    )
    assert found.converged
    assert sooner.converged
    assert float(sooner.error) <= tol
    assert float(sooner.error) == pytest.approx(float(l2_error(cost, a, b, reg, rho, sooner)), abs=1e-14)
    assert int(sooner.iterations) < int(found.iterations)
    expected = fc.sinkhorn(cost, None, a, b, norm="l2", backend="torch", **options)
    assert int(sooner.iterations) == int(expected.iterations)
    with pytest.warns(fc.ConvergenceWarning, match="did not converge in"):
        short = fc.sinkhorn(
            *there(backend, cost), None, *there(backend, a, b), norm="l2", backend=backend,
            max_iter=int(sooner.iterations) - 2, **options,
        )  # fmt: skip
    assert float(short.error) == pytest.approx(float(l2_error(cost, a, b, reg, rho, short)), abs=1e-14)
    assert float(short.error) > tol


@WITH_TRITON
def test_the_l2_error_of_a_divergence(backend: str) -> None:
    """That of symmetric problems is twice that of a side."""
    x, y, a = points(20, 2, 0), points(17, 2, 1) + 0.3, weights(20, 2)
    b = weights(17, 5)
    options: dict[str, Any] = {"reg": 0.2, "tol": 1e-2 if backend == "triton" else 1e-7, "full_output": True}
    sides = there(backend, x, y, a, b)
    found, longer = (
        fc.sinkhorn_divergence(*sides, backend=backend, norm=norm, **options) for norm in ("l2", "l1")
    )
    for part, other, (u, v, p, q) in zip(
        found._parts, longer._parts, ((x, y, a, b), (x, x, a, a), (y, y, b, b)), strict=True
    ):
        cost = torch.cdist(u, v).square()
        assert part.converged
        assert float(part.error) == pytest.approx(
            float(l2_error(cost, p, q, 0.2, (None, None), part)), abs=1e-14
        )
        assert int(part.iterations) <= int(other.iterations)


@pytest.mark.parametrize("marginal", ["balanced", "relaxed"])
def test_the_l2_error_of_small_and_large_masses(backend: str, marginal: str) -> None:
    """The squares of such errors are no numbers."""
    a, b, rho = weights(30, 3), weights(40, 4), RHO[marginal]
    cost = torch.cdist(points(30, 3, 1), points(40, 3, 2))
    options: dict[str, Any] = {
        "reg": 0.1,
        "metric": "precomputed",
        "reg_marginal": rho,
        "norm": "l2",
        "backend": backend,
    }
    one = fc.sinkhorn(*there(backend, cost), None, *there(backend, a, b), tol=1e-6, **options)
    for mass in (
        (1e-170, 1e150) if marginal == "balanced" else (1e-170,)
    ):  # large ones do not converge, in L1 either
        scaled = fc.sinkhorn(
            *there(backend, cost),
            None,
            *there(backend, mass * a, mass * b),
            tol=1e-6 * max(mass, 1.0),
            **options,
        )
        assert scaled.converged
        assert 0 < float(scaled.error) <= 1e-6 * mass
        if marginal == "balanced":  # else the plan is another, since the entropy is relative to a x b
            assert float(scaled.error) == pytest.approx(mass * float(one.error), rel=1e-6)
            assert int(scaled.iterations) == int(one.iterations)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "cuda streamed"], indirect=True)
def test_rounding_leaves_less_in_l2(backend: str) -> None:
    """Runs come to rest in either norm, and one of a tolerance between what they rest at converges in L2."""
    cost = torch.cdist(points(120, 3, 0), points(110, 3, 1)).float()
    options: dict[str, Any] = {"reg": 0.2, "metric": "precomputed", "backend": backend, "max_iter": 5000}
    rests = {}
    for norm in ("l1", "l2"):
        with pytest.warns(fc.ConvergenceWarning, match="came to rest at an error"):
            found = fc.sinkhorn(*there(backend, cost), tol=1e-12, norm=norm, **options)
        assert int(found.iterations) < 1000
        rests[norm] = float(found.error)
    assert 0 < rests["l2"] < rests["l1"] / 4  # of 120 points, a tenth
    assert fc.sinkhorn(*there(backend, cost), tol=rests["l1"] / 3, norm="l2", **options).converged


@WITH_TRITON
def test_kernels_refuse_other_norms(backend: str) -> None:
    kernels = importlib.import_module(f"flashcoreset.kernels.{backend}")
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    arrays = there(backend, points(2, 2, 0)[None], points(2, 2, 1)[None], half, half)
    problem = fc.kernels.SinkhornProblem(*arrays, reg=1.0, metric="sqeuclidean", norm="linf")
    with pytest.raises(ValueError, match=r"norm.*'linf'"):
        kernels.sinkhorn(problem)
