"""What is the Triton kernels' of Sinkhorn alone, in Triton's interpreter (on a GPU under `make gpu`): tiles, groups of columns, and the
schedule on the device."""

from __future__ import annotations

import math
import platform
from typing import Any

import pytest
import torch
from cases import DEVICE, on_device
from checks.sinkhorn import BOTH, Case, points, there

import flashcoreset as fc
from flashcoreset.sinkhorn import reference
from flashcoreset.sinkhorn.problem import Problem
from flashcoreset.sinkhorn.schedule import REACH

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

import triton
import triton.language as tl

from flashcoreset.sinkhorn import triton as kernels
from flashcoreset.triton_kernels import sinkhorn as launchers
from flashcoreset.triton_kernels.pairwise import Tile
from flashcoreset.triton_kernels.sinkhorn import expm1_of, log1p_of


@triton.jit
def _of_numbers(x, out, count: tl.constexpr, is_log: tl.constexpr):
    at = tl.arange(0, count)
    values = tl.load(x + at)
    if is_log:
        tl.store(out + at, log1p_of(values))
    else:
        tl.store(out + at, expm1_of(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_log", [False, True])
def test_small_numbers_keep_their_digits(dtype: torch.dtype, is_log: bool) -> None:
    powers = 2.0 ** torch.arange(-60, 4, dtype=torch.float64)
    x = torch.cat([1.1 * powers, -0.99 * powers[:60], torch.tensor([0.0, 1e4, 1e-30, -0.75])]).to(dtype)
    if not is_log:
        x[-3] = 40.0  # e^40 is in the range of float32, e^10000 in none
    expected = (torch.log1p if is_log else torch.expm1)(x.double())
    out = torch.empty_like(x, device=DEVICE)
    _of_numbers[(1,)](on_device(x), out, len(x), is_log)
    assert len(x) == 128
    torch.testing.assert_close(out.cpu().double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("metric", ["euclidean", "precomputed"])
def test_several_tiles(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one block of rows and tile of columns on either side."""
    monkeypatch.setattr(Tile, "of", lambda dtype, d: Tile(128, 64, 1 if DEVICE == "cpu" else 8, True))
    case = Case(1, 150, 130, metric=metric)
    case.compare(kernels, reg=0.05 * case.largest, max_iter=2)


def test_products_with_columns_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(3, 14, 17, metric="l1")
    problem = case.problem(
        reg=0.1 * case.largest, f=0.1 * points(3, 14, 1, 14)[:, :, 0], g=0.1 * points(3, 17, 1, 17)[:, :, 0]
    )
    plan = reference.sinkhorn_plan(problem)
    monkeypatch.setattr(launchers, "_FEATURES", 2)
    for transpose, size in ((False, 17), (True, 14)):
        v = points(3, size, 3, 5, torch.float32)
        found = kernels.sinkhorn_apply(there(problem), on_device(v), transpose).cpu()
        expected = (plan.mT if transpose else plan) @ v.double()
        torch.testing.assert_close(found, expected, rtol=0, atol=17e-5 * float(plan.max()))


def test_nan_is_found_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LOOKED_AT", 20)
    case = Case(2, 7, 5, metric="precomputed")
    case.x[1, 5, 4] = math.nan
    with pytest.raises(ValueError, match=r"x must be finite, got NaN at row 5, column 4 of problem 1$"):
        case.solve(kernels, reg=1.0)


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
    one = torch.ones(problems, 1, dtype=torch.float64)
    problem = there(Problem(torch.ones(problems, 1, 1), None, one, one, 1.0, "precomputed", **options))
    ranges = on_device(torch.tensor(spread, dtype=torch.float64))
    return launchers.Run(kernels._batch(problem, kernels._counts(problem)), problem, ranges)


# The L2 errors that the tests make up, as shares of the L1 errors; 1 for runs that are judged by these.
SHARES = pytest.mark.parametrize("share", [1.0, 0.25])


def note(run: launchers.Run, sides: Any, share: float) -> None:
    """Puts errors of rows and columns, one block a problem, where the kernels of an iteration do."""
    for sums, values in zip(run._sums, sides, strict=True):
        errors = on_device(torch.tensor(values, dtype=torch.float64))
        sums[0, :, 0], sums[4, :, 0] = errors, (share * errors) ** 2


@pytest.mark.parametrize("marginals", [BOTH, (1.0, 1.0)], ids=["balanced", "unbalanced"])
@SHARES
def test_schedule(marginals: tuple[float, float], share: float) -> None:
    """The schedule equals that of the definition, number by number."""
    spread, most = [10.0, 3000.0, 600.0], 33
    # Falling fast, slowly and not at all, so that omega rises, stays and goes back; one becomes NaN.
    rates = [[0.7, 0.9, 1.02], [0.2, 0.8, 0.85], [0.995, 0.97, 0.2]]
    tol = 1e-4
    norm = "l1" if share == 1 else "l2"
    run = run_of(3, spread, tol=tol, max_iter=most, rho_a=marginals[0], rho_b=marginals[1], norm=norm)
    schedules = [reference.Schedule(1.0, s, tol, most, False) for s in spread]
    errors, carried = [0.4, 0.8, 0.3], [0.0] * 3
    running, orders = [True] * 3, set()
    for i in range(most):
        rows, columns = [0.75 * e for e in errors], [0.25 * e for e in errors]
        note(run, (rows, columns), share)
        run._after_iteration()
        state, iterations = run.look()
        for p, schedule in enumerate(schedules):
            if not running[p]:
                continue
            error = rows[p] + carried[p]
            order = schedule.after(error, share * error)
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


@pytest.mark.parametrize("symmetric", [False, True])
@SHARES
def test_schedule_of_warm_starts_and_of_rest(symmetric: bool, share: float) -> None:
    """Likewise, with potentials given: one start stalls at once, one when it is over-relaxed, one never; and then errors of rounding
    alone, errors that go on falling, and errors that come back from them."""
    spread, most, tol = [10.0, 3000.0, 600.0], 420, 1e-9
    zero = torch.zeros(3, 1, dtype=torch.float64)
    norm = "l1" if share == 1 else "l2"
    run = run_of(3, spread, tol=tol, max_iter=most, f=zero, g=zero, symmetric=symmetric, norm=norm)
    reach = REACH[torch.float32]
    schedules = [
        reference.Schedule(1.0, s, tol, most, True, symmetric=symmetric, reach_of_type=reach) for s in spread
    ]
    noise = torch.rand(3, most, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    running, orders = [True] * 3, set()
    for i in range(most):
        errors = [
            [0.4, 0.1, 0.098, 0.09][min(i, 3)] if i < 40 else 2e-7 + 1e-7 * noise[0][i],
            0.4 * 0.6 ** min(i, 12) if i < 60 else 6e-7 * 0.96 ** (i - 60),
            0.3 * 0.7 ** min(i, 40) if i % 100 < 90 else 1e-3,
        ]
        note(run, ([e / (2 if symmetric else 1) for e in errors], [0.0] * 3), share)
        run._after_iteration()
        state, iterations = run.look()
        for p, schedule in enumerate(schedules):
            if not running[p]:
                continue
            order = schedule.after(errors[p], share * errors[p])
            orders.add(order)
            expected = {"check": launchers.CHECKED, "stop": launchers.STOPPED}.get(order, launchers.RUNNING)
            assert state[p] == expected.value
            assert iterations[p] == schedule.iterations
            assert math.isclose(float(run._eps[p]), schedule.eps, rel_tol=1e-12)
            assert math.isclose(float(run._omega[p]), schedule.omega, rel_tol=1e-12)
            running[p] = order in ("go on", "new eps")
    assert orders == {"go on", "check", "stop"} | (set() if symmetric else {"new eps"})
    assert schedules[0].iterations < most


def test_a_nan_ends_a_run() -> None:
    run = run_of(1, [1.0], tol=1e-4, max_iter=50)
    run._sums[0][0] = math.nan
    run._after_iteration()
    assert run.look() == ([launchers.STOPPED.value], [1])


@pytest.mark.parametrize("max_iter", [1, 2])
def test_after_a_check_that_failed_plain_iterations_go_on(max_iter: int) -> None:
    case = Case(1, 9, 13)
    problem = there(case.problem(reg=1.0, tol=1e-9, max_iter=max_iter))
    spread = on_device(torch.ones(1, dtype=torch.float64))
    run = launchers.Run(kernels._batch(problem, kernels._counts(problem)), problem, spread)
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
