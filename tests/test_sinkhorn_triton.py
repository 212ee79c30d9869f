"""The Triton kernels of Sinkhorn, in Triton's interpreter (on a GPU under `make gpu`), against the definition.

An interpreted iteration of one problem takes a tenth of a second: sizes and iterations are few.
"""

from __future__ import annotations

import math
import platform
from typing import Any

import pytest
import torch
from cases import DEVICE, on_device
from torch import Tensor

import flashcoreset as fc
from flashcoreset.sinkhorn import reference

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

from flashcoreset.sinkhorn import triton as kernels
from flashcoreset.triton_kernels import sinkhorn as launchers
from flashcoreset.triton_kernels.pairwise import Tile

METRICS = ("sqeuclidean", "euclidean", "l1", "cosine", "precomputed")
BOTH = (math.inf, math.inf)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

# Largest error of potentials, value, transport cost and error (of marginals that sum up to 1) that is allowed, relative to the
# largest cost: costs computed in float32 are off by some units of 6e-8 of it, and so are all numbers made from them. Worst
# seen: 1.0e-7 and 8e-16.
TOLERANCE = {torch.float32: 5e-7, torch.float64: 5e-15}


def weights(batch: int, count: int, seed: int) -> Tensor:
    raw = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return raw / raw.sum(1, keepdim=True)


def points(batch: int, n: int, d: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


class Case:
    """A batch of problems on the CPU."""

    def __init__(
        self,
        batch: int,
        n: int,
        m: int,
        d: int = 3,
        *,
        metric: str = "sqeuclidean",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        x, y = points(batch, n, d, 1, dtype), points(batch, m, d, 2, dtype) + 0.5
        plain = "sqeuclidean" if metric == "precomputed" else metric
        costs = torch.stack(
            [next(reference._Costs(u, v, plain, 2**30).blocks())[1] for u, v in zip(x, y, strict=True)]
        )
        self.metric, self.dtype, self.largest = metric, dtype, float(costs.max())
        self.x, self.y = (costs.to(dtype), None) if metric == "precomputed" else (x, y)
        self.a, self.b = weights(batch, n, 3), weights(batch, m, 4)

    def solve(self, backend: Any, **options: Any) -> reference.Solution:
        arguments = [None if t is None else on_device(t) for t in (self.x, self.y, self.a, self.b)]
        options = {name: on_device(value) for name, value in options.items()}
        found = backend.sinkhorn(*arguments, metric=self.metric, **{"tol": 0.0, "max_iter": 3, **options})
        return reference.Solution(*(t.cpu() for t in found))

    def compare(self, share: float, **options: Any) -> reference.Solution:
        """The kernels' solution at reg = `share` of the largest cost, checked against the definition's."""
        options = {"reg": share * self.largest, **options}
        got, want = self.solve(kernels, **options), self.solve(reference, **options)
        assert [t.dtype for t in got] == [t.dtype for t in want]
        assert torch.equal(got.iterations, want.iterations)
        assert torch.equal(got.converged, got.error <= options.get("tol", 0.0))
        if options.get("tol", 0.0) > 0:  # an error of 0 is an accident of rounding
            assert torch.equal(got.converged, want.converged)
        within = TOLERANCE[self.dtype]
        for name in ("f", "g", "value", "transport_cost"):
            torch.testing.assert_close(
                getattr(got, name), getattr(want, name), rtol=0, atol=within * self.largest
            )
        torch.testing.assert_close(got.error, want.error, rtol=0, atol=within)
        return got


@DTYPES
@pytest.mark.parametrize("metric", METRICS)
def test_agrees_with_the_definition(metric: str, dtype: torch.dtype) -> None:
    for (n, m), marginals in zip(
        [(33, 70), (1, 7), (40, 21)], [BOTH, (0.5, 2.0), (math.inf, 1.0)], strict=True
    ):
        Case(1, n, m, metric=metric, dtype=dtype).compare(0.05, reg_marginal=marginals)


@pytest.mark.parametrize("metric", ["euclidean", "precomputed"])
def test_several_tiles_and_chains(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if metric == "euclidean":  # features in two chains
        Case(1, 9, 5, 258, metric=metric).compare(0.05, max_iter=1)
    # More than one block of rows and tile of columns on either side.
    monkeypatch.setattr(Tile, "of", lambda dtype, d: Tile(128, 64, 1 if DEVICE == "cpu" else 8, True))
    Case(1, 150, 130, metric=metric).compare(0.05, max_iter=2)


@DTYPES
def test_small_regularisation_is_annealed(dtype: torch.dtype) -> None:
    case = Case(1, 30, 20, metric="precomputed", dtype=dtype)
    assert reference.Schedule(1.0, 1e3, 0.0, 13, False).eps > 1
    assert torch.isfinite(case.compare(1e-3, max_iter=13).f).all()


def test_comes_to_its_tolerance() -> None:
    case = Case(1, 20, 15, metric="precomputed")
    found = case.compare(0.02, tol=1e-5, max_iter=200)
    assert found.converged.all()
    assert int(found.iterations[0]) > 2 * reference.Schedule.PERIOD, "too few iterations to be over-relaxed"
    plan = kernels.sinkhorn_plan(
        *(on_device(t) for t in (case.x, case.y, case.a, case.b, found.f, found.g)),
        reg=0.02 * case.largest, metric=case.metric,
    ).cpu()  # fmt: skip
    shown = (plan.sum(2) - case.a).abs().sum(1) + (plan.sum(1) - case.b).abs().sum(1)
    torch.testing.assert_close(found.error, shown, rtol=0, atol=2e-7)


def test_potentials_are_as_exact_as_their_differences() -> None:
    """Costs of about 1000, exact in float32, that differ by 1/64: potentials in float32 would be off by 3e-5."""
    case = Case(1, 12, 9, metric="precomputed")
    case.x = 1000 + (64 * case.x / case.x.max()).round() / 64
    start = {
        "f": torch.full((1, 12), 499.9, dtype=torch.float64),
        "g": torch.full((1, 9), 500.3, dtype=torch.float64),
    }
    got, want = (case.solve(backend, reg=0.1, **start) for backend in (kernels, reference))
    for name in ("f", "g", "value"):
        # Exponents of up to 10 are rounded to 5e-7, which reg makes 5e-8.
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-7)


@pytest.mark.parametrize("marginals", [BOTH, (1.0, 0.3)], ids=["balanced", "unbalanced"])
@DTYPES
def test_zero_weights(marginals: tuple[float, float], dtype: torch.dtype) -> None:
    case = Case(1, 20, 25, dtype=dtype)
    case.a[:, [0, 7, 19]], case.b[:, [3, 24]] = 0, 0
    case.a, case.b = case.a / case.a.sum(), case.b / case.b.sum()
    case.compare(0.05, reg_marginal=marginals)


def ragged(metric: str) -> tuple[Case, dict[str, Tensor]]:
    """Problems of several sizes, with NaN in their padding."""
    case = Case(3, 14, 17, metric=metric)
    lengths = {"x_lengths": torch.tensor([14, 1, 5]), "y_lengths": torch.tensor([6, 17, 1])}
    for p, (n, m) in enumerate(zip(*(t.tolist() for t in lengths.values()), strict=True)):
        case.x[p, n:] = math.nan
        if case.y is None:
            case.x[p, :, m:] = math.nan
        else:
            case.y[p, m:] = math.nan
        for weight, size in ((case.a, n), (case.b, m)):
            weight[p, size:] = 0
            weight[p] /= weight[p].sum()
    return case, lengths


@pytest.mark.parametrize("metric", ["cosine", "precomputed"])
def test_ragged_batches_are_their_problems(metric: str) -> None:
    case, lengths = ragged(metric)
    options: dict[str, Any] = {"reg": 0.1 * case.largest, "tol": 1e-2, "max_iter": 8}
    batch, want = (case.solve(backend, **lengths, **options) for backend in (kernels, reference))
    # A problem that is solved keeps its results, while others go on.
    assert len(set(batch.iterations.tolist())) > 1
    assert torch.equal(batch.iterations, want.iterations)
    torch.testing.assert_close(batch.value, want.value, rtol=0, atol=5e-7 * case.largest)
    for p, (n, m) in enumerate(zip(*(t.tolist() for t in lengths.values()), strict=True)):
        one = Case(1, n, m, metric=metric)
        one.x = case.x[p : p + 1, :n, : m if case.y is None else None]
        one.y = None if case.y is None else case.y[p : p + 1, :m]
        one.a, one.b = case.a[p : p + 1, :n], case.b[p : p + 1, :m]
        single = one.solve(kernels, **options)
        for name in ("value", "transport_cost", "error", "iterations"):
            assert torch.equal(getattr(batch, name)[p], getattr(single, name)[0]), name
        assert torch.equal(batch.f[p, :n], single.f[0])
        assert torch.equal(batch.g[p, :m], single.g[0])
        assert not batch.f[p, n:].any()
        assert not batch.g[p, m:].any()


@DTYPES
@pytest.mark.parametrize("metric", ["l1", "precomputed"])
def test_products_with_the_plan(metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case, lengths = ragged(metric)
    case.x, case.y = case.x.to(dtype), None if case.y is None else case.y.to(dtype)
    case.a[0, 2] = 0
    reg = 0.1 * case.largest
    # Potentials near those of a solution, NaN in the padding.
    potentials = [
        0.4 * case.largest + 0.1 * points(3, size, 1, size, torch.float64)[:, :, 0] for size in (14, 17)
    ]
    for potential, length in zip(potentials, lengths.values(), strict=True):
        potential[torch.arange(potential.shape[1]) >= length[:, None]] = math.nan
    arguments = (case.x, case.y, case.a, case.b, *potentials)
    there = [on_device(t) for t in arguments]
    options: dict[str, Any] = {"reg": reg, "metric": metric, **lengths}
    moved = {name: on_device(value) for name, value in options.items()}
    plan = reference.sinkhorn_plan(*arguments, **options)
    # A plan is off by the rounding of a cost as a share of reg, and by the rounding of the exponent.
    within = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype] * float(plan.max())
    torch.testing.assert_close(kernels.sinkhorn_plan(*there, **moved).cpu(), plan, rtol=0, atol=within)
    monkeypatch.setattr(launchers, "_FEATURES", 2)  # columns of v in two groups
    for transpose, size, length in ((False, 17, "y_lengths"), (True, 14, "x_lengths")):
        v = points(3, size, 3, 5, dtype)
        product = (plan.mT if transpose else plan) @ v.double()
        v[torch.arange(size) >= lengths[length][:, None]] = math.nan
        found = kernels.sinkhorn_apply(*there, on_device(v), transpose=transpose, **moved).cpu()
        torch.testing.assert_close(found, product, rtol=0, atol=within * 17)


def test_a_start_is_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 9, 13)
    whole = case.solve(kernels, reg=1.0, max_iter=3)
    first = case.solve(kernels, reg=1.0, max_iter=1)
    monkeypatch.setattr(kernels, "_ITERATIONS", 1)
    rest = case.solve(kernels, reg=1.0, max_iter=2, f=first.f, g=first.g)
    for name in ("f", "g", "value", "transport_cost", "error"):
        assert torch.equal(getattr(rest, name), getattr(whole, name)), name


def run_of(problems: int, spread: list[float], **options: Any) -> launchers.Run:
    """Problems of one row and one column, whose errors the test makes up."""
    one = torch.ones(problems, 1, dtype=torch.float64, device=DEVICE)
    count = torch.ones(problems, dtype=torch.int64, device=DEVICE)
    costs = on_device(torch.ones(problems, 1, 1))
    batch = launchers.Problems(
        costs, None, "precomputed", (count, count), (torch.zeros_like(one), torch.zeros_like(one)), (one, one)
    )
    ranges = on_device(torch.tensor(spread, dtype=torch.float64))
    return launchers.Run(batch, spread=ranges, warm=False, **{"reg": 1.0, "reg_marginal": BOTH, **options})


@pytest.mark.parametrize("marginals", [BOTH, (1.0, 1.0)], ids=["balanced", "unbalanced"])
def test_schedule(marginals: tuple[float, float]) -> None:
    """The schedule equals that of the definition, number by number."""
    spread, most = [10.0, 3000.0, 600.0], 33
    # Falling fast, slowly and not at all, so that omega rises, stays and goes back; one becomes NaN.
    rates = [[0.7, 0.9, 1.02], [0.2, 0.8, 0.85], [0.995, 0.97, 0.2]]
    tol = 1e-4
    run = run_of(3, spread, tol=tol, max_iter=most, reg_marginal=marginals)
    schedules = [reference.Schedule(1.0, s, tol, most, False) for s in spread]
    errors, carried = [0.4, 0.8, 0.3], [0.0] * 3
    running, orders = [True] * 3, set()
    for i in range(most):
        rows, columns = [0.75 * e for e in errors], [0.25 * e for e in errors]
        for sums, values in zip(run._sums, (rows, columns), strict=True):
            sums[0, :, 0] = on_device(torch.tensor(values, dtype=torch.float64))
        run._after_iteration()
        state, iterations = run.look()
        for p, schedule in enumerate(schedules):
            if not running[p]:
                continue
            order = schedule.after(rows[p] + carried[p])
            orders.add(order)
            carried[p] = columns[p]
            if order == "new eps":
                carried[p] = 0.0
            expected = {"check": launchers.CHECKED, "stop": launchers.STOPPED}.get(order, launchers.RUNNING)
            assert state[p] == expected.value
            assert iterations[p] == schedule.iterations
            assert math.isclose(float(run._eps[p]), schedule.eps, rel_tol=1e-12)
            assert math.isclose(float(run._omega[p]), schedule.omega, rel_tol=1e-12)
            running[p] = order in ("go on", "new eps")
        errors = [e * rates[p][min(i // 11, 2)] for p, e in enumerate(errors)]
    assert orders == {"go on", "new eps", "check", "stop"}
    assert max(schedule.omega for schedule in schedules) > 1.05


def test_a_nan_ends_a_run() -> None:
    run = run_of(1, [1.0], tol=1e-4, max_iter=50)
    run._sums[0][0] = math.nan
    run._after_iteration()
    assert run.look() == ([launchers.STOPPED.value], [1])


@pytest.mark.parametrize("max_iter", [1, 2])
def test_after_a_check_that_failed_plain_iterations_go_on(max_iter: int) -> None:
    case = Case(1, 9, 13)
    count = [on_device(torch.tensor([size])) for size in (9, 13)]
    x, y, a, b = (on_device(t) for t in (case.x, case.y, case.a, case.b))
    problems = kernels._problems(x, y, case.metric, (count[0], count[1]), None, (a, b))
    spread = on_device(torch.ones(1, dtype=torch.float64))
    run = launchers.Run(problems, 1.0, BOTH, 1e-9, max_iter, spread, False)
    run.iterate(1)
    run._state.fill_(launchers.CHECKED.value)
    run._omega.fill_(1.5)
    run._since.fill_(3)
    run.evaluate()
    goes_on = max_iter == 2
    assert run.look() == ([(launchers.RUNNING if goes_on else launchers.DONE).value], [1])
    assert float(run.error) > 1e-9
    if goes_on:
        assert (float(run._omega), int(run._since)) == (1.0, 0)


@pytest.mark.parametrize("metric", ["sqeuclidean", "precomputed"])
def test_gradients_and_progress(metric: str) -> None:
    case = Case(2, 7, 5, metric=metric)
    found, seen = {}, []
    for backend in ("triton", "torch"):
        x, y, a, b = (
            None if t is None else on_device(t).clone().requires_grad_()
            for t in (case.x, case.y, case.a, case.b)
        )
        transport = fc.sinkhorn(
            x, y, a, b, reg=0.2 * case.largest, metric=metric, tol=0, max_iter=3, backend=backend,
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
        transport.value.sum().backward()
        found[backend] = [t.grad for t in (x, y, a, b) if t is not None]
    assert seen[-1] == (6, 6)
    for got, want in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LOOKED_AT", 20)  # some rows at a time
    for metric, name, place, value, message in (
        ("l1", "x", (0, 3, 2), math.nan, "x must be finite, got NaN at row 3, column 2 of problem 0"),
        ("l1", "y", (1, 4, 0), -math.inf, "y must be finite, got -inf at row 4, column 0 of problem 1"),
        (
            "precomputed",
            "x",
            (1, 5, 4),
            math.inf,
            "x must be finite, got inf at row 5, column 4 of problem 1",
        ),
    ):
        case = Case(2, 7, 5, metric=metric)
        getattr(case, name)[place] = value
        with pytest.raises(ValueError, match=message + "$"):
            case.solve(kernels, reg=1.0)
    case = Case(1, 7, 5)
    case.x[0, 3, 2] = math.nan
    with pytest.raises(ValueError, match=r"x must be finite, got NaN at row 3, column 2$"):
        case.solve(kernels, reg=1.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a warning of NumPy in the interpreter
def test_costs_that_overflow_are_named() -> None:
    case = Case(2, 3, 4)
    case.x[1] *= 1e25
    with pytest.raises(ValueError, match=r"x: costs overflow torch.float32 in problem 1; scale"):
        case.solve(kernels, reg=1.0, max_iter=1)
