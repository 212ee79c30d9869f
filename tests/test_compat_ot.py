"""`flashcoreset.compat.ot` against POT on the same input: plans, costs, logs, gradients, warnings and refusals."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import flashcoreset as fc
from flashcoreset.compat import ot as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot as pot

METHODS = ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "greenkhorn", "sinkhorn_epsilon_scaling"]
WITH_COSTS = ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"]
RELAXED = ["sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant"]


def problem(n: int = 12, m: int = 9, k: int = 0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Points, weights (k columns of b) and costs."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(m, 2)) + 0.5
    a, b = rng.random(n) + 0.1, rng.random((m, k) if k else m) + 0.1
    return x, y, a / a.sum(), b / b.sum(0), ((x[:, None] - y[None]) ** 2).sum(2)


def quiet(function, *args, **kwargs):
    """A call of POT's without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def up_to_a_factor(u: np.ndarray, v: np.ndarray) -> float:
    """How far log(u / v) is from a constant."""
    ratio = np.log(u) - np.log(v)
    return np.abs(ratio - ratio.mean(0)).max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_plans_are_pots(method, dtype, library):
    *_, a, b, M = (v.astype(dtype) for v in problem())
    arrays = [a, b, M] if library == "numpy" else [torch.from_numpy(v) for v in (a, b, M)]
    plan = ours.sinkhorn(*arrays, 0.5, method=method)
    wanted = quiet(
        pot.sinkhorn, a.astype(float), b.astype(float), M.astype(float), 0.5, method=method, numItermax=20_000
    )
    assert type(plan) is type(arrays[2])
    assert plan.dtype == arrays[2].dtype
    # POT stops when its columns are right to 1e-9.
    np.testing.assert_allclose(np.asarray(plan), wanted, atol=1e-8 if dtype == "float64" else 1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_logs_have_pots_keys(method):
    *_, a, b, M = problem()
    plan, log = ours.sinkhorn(a, b, M, 0.5, method=method, log=True)
    _, wanted = quiet(pot.sinkhorn, a, b, M, 0.5, method=method, log=True, numItermax=20_000)
    assert set(log) == set(wanted)
    for name in set(log) - {"err", "niter", "n_iter", "warmstart"}:
        assert log[name].shape == wanted[name].shape
        if name in ("u", "v"):
            assert up_to_a_factor(log[name], wanted[name]) < 1e-6
    if "u" in log:
        np.testing.assert_allclose(log["u"][:, None] * np.exp(-M / 0.5) * log["v"], plan, atol=1e-12)
    if "logu" in log:
        np.testing.assert_allclose(np.exp(log["logu"][:, None] - M / 0.5 + log["logv"]), plan, atol=1e-12)
    if "alpha" in log:
        np.testing.assert_allclose(np.exp((log["alpha"][:, None] - M + log["beta"]) / 0.5), plan, atol=1e-12)
        assert log["warmstart"] == (log["alpha"], log["beta"])
    if "err" in log:
        assert 0 <= log["err"][-1] < 1e-9


def off_of(plan: np.ndarray, a: np.ndarray, b: np.ndarray, norm: int = 2) -> float:
    """The sum of the errors of both marginals."""
    return sum(np.linalg.norm(plan.sum(axis) - w, norm) for axis, w in ((1, a), (0, b)))


@pytest.mark.parametrize("method", METHODS)
def test_the_rule_to_stop_by_is_pots(method):
    """The L2 error of the marginals: the L1 error may be more than stopThr."""
    *_, a, b, M = problem(120, 90)
    in_l1 = []
    for stop in (1e-9, 1e-8, 1e-7, 1e-6, 1e-5):
        plan, log = ours.sinkhorn(a, b, M, 0.3, method=method, stopThr=stop, log=True)
        assert off_of(plan, a, b) <= stop
        in_l1.append(off_of(plan, a, b, 1) / stop)
        if "err" in log:
            err = log["err"][-1] ** (0.5 if method == "sinkhorn_epsilon_scaling" else 1)
            assert err == pytest.approx(off_of(plan, a, b), abs=1e-14)
    assert max(in_l1) > 1


@pytest.mark.parametrize("method", WITH_COSTS)
def test_the_rule_to_stop_by_of_many_histograms(method):
    """The error of all of them together, but for sinkhorn_log, which takes one after the other, as POT's does."""
    *_, a, b, M = problem(60, 50, k=30)
    _, log = ours.sinkhorn(a, b, M, 0.3, method=method, stopThr=1e-6, log=True)
    u, v = (log[name] if name in log else np.exp(log[f"log{name}"]) for name in "uv")
    each = [off_of(u[:, k, None] * np.exp(-M / 0.3) * v[:, k], a, b[:, k]) for k in range(30)]
    assert max(each) <= 1e-6
    assert (np.linalg.norm(each) <= 1e-6) == (method != "sinkhorn_log")
    batch = ours.solve_batch(np.stack([M, 2 * M]), 0.3, np.stack([a, a]), b.T[:2], tol=1e-6)
    for k in range(2):
        assert off_of(batch.plan[k], a, b[:, k]) <= 1e-6 < off_of(batch.plan[k], a, b[:, k], 1)


@pytest.mark.parametrize("method", WITH_COSTS)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_costs_of_one_and_many_histograms(method, k):
    *_, a, b, M = problem(k=k)
    cost, log = ours.sinkhorn2(a, b, M, 0.5, method=method, log=True)
    if method == "sinkhorn_log" and k == 1:  # POT fails there
        wanted, wanted_log = np.array([pot.sinkhorn2(a, b[:, 0], M, 0.5)]), {"log_u", "log_v", "u", "v"}
    else:
        wanted, wanted_log = quiet(pot.sinkhorn2, a, b, M, 0.5, method=method, log=True)
    np.testing.assert_allclose(cost, wanted, atol=1e-7)
    assert np.shape(cost) == np.shape(wanted)
    assert set(log) == set(wanted_log)
    if k:
        assert log["u" if "u" in log else "logu"].shape == (len(a), k)
        np.testing.assert_allclose(ours.sinkhorn(a, b, M, 0.5, method=method), wanted, atol=1e-7)


@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"])
def test_without_a_threshold_iterates_are_pots(method, iterations):
    *_, a, b, M = problem()
    options = {"numItermax": iterations, "stopThr": 0, "method": method}
    with pytest.warns(UserWarning, match="did not converge"):
        plan = ours.sinkhorn(a, b, M, 0.5, **options)
    np.testing.assert_allclose(plan, quiet(pot.sinkhorn, a, b, M, 0.5, **options), rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_warm_starts(method):
    *_, a, b, M = problem()
    cold, log = ours.sinkhorn(a, b, M, 0.05, method=method, log=True)
    start = (np.log(log["u"]), np.log(log["v"])) if "u" in log else log["warmstart"]
    warm, again = ours.sinkhorn(a, b, M, 0.05, method=method, log=True, warmstart=start)
    count = "niter" if "niter" in log else "n_iter"
    assert again[count] < min(log[count], 3)
    np.testing.assert_allclose(warm, cold, atol=1e-9)


def test_a_warm_start_for_every_histogram():
    *_, a, b, M = problem(k=3)
    cost, log = ours.sinkhorn(a, b, M, 0.05, log=True)
    again, warm = ours.sinkhorn(a, b, M, 0.05, log=True, warmstart=(np.log(log["u"]), np.log(log["v"])))
    assert warm["niter"] < 3
    np.testing.assert_allclose(again, cost, atol=1e-9)
    pairs = [(np.log(log["u"][:, k]), np.log(log["v"][:, k])) for k in range(3)]
    np.testing.assert_allclose(
        ours.bregman.sinkhorn_log(a, b, M, 0.05, warmstart=pairs, numItermax=3), cost, atol=1e-9
    )


def test_small_reg():
    """Where POT's plain iterations underflow: the conditions that make a plan the solution."""
    *_, a, b, M = problem()
    plan = ours.sinkhorn(a, b, M, 2e-3)
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-9)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-9)
    # The scalings themselves are beyond float64.
    log = ours.sinkhorn(a, b, M, 2e-3, method="sinkhorn_log", log=True)[1]
    u, v = log["log_u"], log["log_v"]
    np.testing.assert_allclose(np.exp(u[:, None] - M / 2e-3 + v), plan, atol=1e-9)


def test_empty_weights_lists_and_integers():
    *_, M = problem()
    uniform = ours.sinkhorn([], [], M, 0.5)
    np.testing.assert_allclose(uniform, pot.sinkhorn([], [], M, 0.5), atol=1e-8)
    np.testing.assert_allclose(ours.sinkhorn(np.array([]), torch.tensor([]).numpy(), M, 0.5), uniform)
    whole = ours.sinkhorn([0.5, 0.5], [0.5, 0.5], np.array([[0, 1], [1, 0]]), 1)
    assert whole.dtype == np.float64
    np.testing.assert_allclose(
        whole, pot.sinkhorn([0.5, 0.5], [0.5, 0.5], np.array([[0.0, 1], [1, 0]]), 1), atol=1e-9
    )


def test_zero_weights():
    *_, a, b, M = problem()
    a[3] = b[0] = 0
    a, b = a / a.sum(), b / b.sum()
    for method in METHODS[:3]:
        plan = ours.sinkhorn(a, b, M, 0.5, method=method)
        np.testing.assert_allclose(plan, quiet(pot.sinkhorn, a, b, M, 0.5, method="sinkhorn_log"), atol=1e-8)
        assert (plan[3] == 0).all()
        assert (plan[:, 0] == 0).all()


def test_warnings_are_pots():
    *_, a, b, M = problem()
    with pytest.warns(
        UserWarning, match=r"^Sinkhorn did not converge\. You might want to increase the number of iterations"
    ):
        ours.sinkhorn(a, b, M, 0.01, numItermax=2)
    ours.sinkhorn(a, b, M, 0.01, numItermax=2, warn=False)  # warnings are errors here
    ours.sinkhorn2(a, b, M, 0.01, numItermax=2)
    with pytest.warns(UserWarning, match=r"^Warning: numerical errors at iteration 0$"):
        plan = ours.sinkhorn(a, b, M, 0, warn=False)
    with pytest.warns(UserWarning, match=r"^Numerical errors at iteration 0$"):
        ours.sinkhorn(a, b, M, 0, method="sinkhorn_stabilized", warn=False)
    assert not plan.any()  # exp(-M / 0), as POT's
    with pytest.warns(UserWarning, match="did not converge") as caught:
        ours.sinkhorn(a, b, M, 0.01, numItermax=2)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("relaxed", [False, True])
def test_sums_that_differ(relaxed):
    """No plan has such marginals; the update that POT ends with wins."""
    *_, a, b, M = problem()
    function, extra = ("sinkhorn_unbalanced", (float("inf"),)) if relaxed else ("sinkhorn", ())
    with pytest.warns(fc.ConvergenceWarning, match="have the sums 1 and 3"):
        plan = getattr(ours, function)(a, 3 * b, M, 0.5, *extra)
    # So many iterations that POT's scalings do not overflow yet.
    wanted = quiet(getattr(pot, function), a, 3 * b, M, 0.5, *extra, numItermax=200)
    np.testing.assert_allclose(plan, wanted, atol=1e-8)
    assert plan.sum() == pytest.approx(3 if relaxed else 1)


def gradients(
    module, function, values: list[np.ndarray], **options
) -> tuple[list[torch.Tensor], torch.Tensor]:
    tensors = [torch.tensor(v, requires_grad=True) for v in values]
    loss = quiet(function, module, *tensors, **options)
    loss.backward()
    return [t.grad for t in tensors], loss.detach()


def plan_loss(module, a, b, M, **options):
    """A number that every entry of the plan changes."""
    plan = module.sinkhorn(a, b, M, 0.5, stopThr=1e-13, numItermax=5000, **options)
    return (plan * torch.linspace(0, 1, plan.numel(), dtype=plan.dtype).view_as(plan) ** 2).sum()


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (8, 8)])
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
def test_gradients_of_plans(method, shape):
    """Implicit differentiation gives what POT's recorded iterations do."""
    values = list(problem(*shape)[2:])
    found, _ = gradients(ours, plan_loss, values, method=method)
    wanted, _ = gradients(pot, plan_loss, values, method=method)
    for grad, other in zip(found, wanted, strict=True):
        assert torch.allclose(grad, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("k", [0, 3])
def test_gradients_of_costs(k):
    values = list(problem(k=k)[2:])
    found, wanted = (
        gradients(
            m, lambda m, a, b, M: m.sinkhorn2(a, b, M, 0.5, stopThr=1e-13, numItermax=5000).sum(), values
        )[0]
        for m in (ours, pot)
    )
    for grad, other in zip(found, wanted, strict=True):
        assert torch.allclose(grad, other, rtol=1e-7, atol=1e-8)


def test_gradients_of_plans_in_pieces():
    """At small reg a plan is a matching, and the system of the implicit gradient singular: the derivatives of the costs are the
    plan then."""
    x = np.arange(4.0)
    values = [np.full(4, 0.25), np.full(4, 0.25), 100 * (x[:, None] - x) ** 2]
    (*_, of_costs), _ = gradients(ours, lambda m, a, b, M: m.sinkhorn2(a, b, M, 0.5), values)
    assert torch.allclose(of_costs, torch.eye(4, dtype=torch.float64) / 4, atol=1e-12)
    assert of_costs.isfinite().all()


@pytest.mark.parametrize("method", RELAXED)
@pytest.mark.parametrize(
    ("reg_m", "reg_type"),
    [(1.0, "kl"), (1.0, "entropy"), ((0.3, 2.0), "kl"), ((1.0, float("inf")), "kl"), (100.0, "kl")],
)
def test_relaxed_marginals(method, reg_m, reg_type):
    *_, a, b, M = problem()
    mass = 1.0 if reg_m == (1.0, float("inf")) else 1.5
    options = {"reg_m": reg_m, "reg_type": reg_type}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "If reg_type = entropy")
        plan, log = ours.sinkhorn_unbalanced(a, mass * b, M, 0.5, method=method, log=True, **options)
        linear, total = (
            ours.sinkhorn_unbalanced2(a, mass * b, M, 0.5, returnCost=which, **options)
            for which in ("linear", "total")
        )
    wanted, wanted_log = quiet(
        pot.sinkhorn_unbalanced, a, mass * b, M, 0.5, log=True, stopThr=1e-13, numItermax=100_000, **options
    )
    np.testing.assert_allclose(plan, wanted, atol=1e-8)
    assert set(log) == set(wanted_log)
    for name in ("logu", "logv"):
        np.testing.assert_allclose(log[name], wanted_log[name], atol=1e-6)
    np.testing.assert_allclose([log["cost"], linear], wanted_log["cost"], rtol=1e-6)
    # Without the terms of the masses it is 0 at a solution whose marginals are both relaxed.
    np.testing.assert_allclose([log["total_cost"], total], wanted_log["total_cost"], rtol=1e-6, atol=1e-8)


def test_relaxed_marginals_with_a_reference_and_zero_weights():
    *_, a, b, M = problem()
    c = np.random.default_rng(5).random(M.shape) + 0.1
    plan = ours.unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.5, 1.0, c=c)
    wanted = pot.unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 0.5, 1.0, c=c, stopThr=1e-13)
    np.testing.assert_allclose(plan, wanted, atol=1e-8)
    a[2] = 0
    with pytest.warns(UserWarning, match="overwritten by the one matrix"):
        plan = ours.sinkhorn_unbalanced(a, b, M, 0.5, 1.0, reg_type="entropy")
    np.testing.assert_allclose(
        plan, quiet(pot.sinkhorn_unbalanced, a, b, M, 0.5, 1.0, reg_type="entropy", stopThr=1e-13), atol=1e-8
    )


def test_relaxed_marginals_of_many_histograms():
    *_, a, b, M = problem(k=3)
    found, log = ours.sinkhorn_unbalanced(a, b, M, 0.5, 1.0, log=True)
    wanted, wanted_log = pot.sinkhorn_unbalanced(a, b, M, 0.5, 1.0, log=True, stopThr=1e-13)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert set(log) == set(wanted_log)
    np.testing.assert_allclose(log["logv"], wanted_log["logv"], atol=1e-6)
    with pytest.warns(UserWarning, match="Use entropy"):
        np.testing.assert_allclose(ours.sinkhorn_unbalanced2(a, b, M, 0.5, 1.0), wanted, rtol=1e-6)


@pytest.mark.parametrize("reg_m", [1.0, (0.5, float("inf"))])
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_gradients_of_relaxed_plans(reg_m, reg_type):
    def loss(module, a, b, M):
        plan, log = module.sinkhorn_unbalanced(
            a, b, M, 0.5, reg_m, reg_type=reg_type, log=True, stopThr=1e-13, numItermax=5000
        )
        return (plan * torch.linspace(0, 1, plan.numel(), dtype=plan.dtype).view_as(plan)).sum() + log[
            "total_cost"
        ]

    values = list(problem()[2:])
    found, wanted = (gradients(m, loss, values)[0] for m in (ours, pot))
    for grad, other in zip(found, wanted, strict=True):
        assert torch.allclose(grad, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_solve(reg_type):
    *_, a, b, M = problem()
    found, wanted = (
        ours.solve(M, a, b, reg=0.5, reg_type=reg_type),
        pot.solve(M, a, b, reg=0.5, reg_type=reg_type),
    )
    names = {n for n in dir(wanted) if not n.startswith("_")} - {"a_to_b", "b_to_a"}
    assert names <= set(dir(found))
    for name in ("value", "value_linear", "plan", "marginal_a", "marginal_b"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-7)
    for name in ("potential_a", "potential_b"):
        assert up_to_a_factor(np.exp(getattr(found, name)), np.exp(getattr(wanted, name))) < 1e-6
    np.testing.assert_allclose(found.sparse_plan.toarray(), found.plan)
    assert (found.value_quad, found.lazy_plan, found.log, found.status) == (None, None, None, None)


@pytest.mark.parametrize("grad", ["autodiff", "envelope"])
@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_gradients_of_solve(grad, reg_type):
    values = list(problem()[2:])
    found, wanted = (
        gradients(
            m,
            lambda m, a, b, M: m.solve(M, a, b, reg=2.0, reg_type=reg_type, grad=grad, tol=1e-13).value,
            values,
        )[0]
        for m in (ours, pot)
    )
    for grads in (found, wanted):
        grads[:2] = [g - g.mean() for g in grads[:2]]  # which is all that the marginals' sums leave
    for first, second in zip(found, wanted, strict=True):
        assert torch.allclose(first, second, rtol=1e-6, atol=1e-7)
    last, _ = gradients(
        ours, lambda m, a, b, M: m.solve(M, a, b, reg=2.0, reg_type=reg_type, grad="last_step").value, values
    )
    exact, _ = gradients(ours, lambda m, a, b, M: m.solve(M, a, b, reg=2.0, reg_type=reg_type).value, values)
    assert all(torch.equal(u, v) for u, v in zip(last, exact, strict=True))
    detached = ours.solve(torch.tensor(values[2], requires_grad=True), reg=2.0, grad="detach")
    assert not detached.value.requires_grad


def test_solve_with_relaxed_marginals():
    *_, a, b, M = problem()
    found, wanted = ours.solve(M, a, b, reg=0.5, unbalanced=1.0), pot.solve(M, a, b, reg=0.5, unbalanced=1.0)
    for name in ("value", "value_linear", "plan", "potential_a", "potential_b"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-7)


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("method", ["auto", "sinkhorn", "log_sinkhorn"])
def test_solve_batch(method, reg_type):
    M = np.stack([problem(seed=s)[4] for s in range(3)])
    a, b = (np.stack([problem(seed=s)[i] for s in range(3)]) for i in (2, 3))
    options = {"reg_type": reg_type, "tol": 1e-10}
    found = ours.solve_batch(M, 0.5, a, b, method=method, **options)
    wanted = pot.solve_batch(M, 0.5, a, b, method=method, **options)
    for name in ("value", "value_linear", "plan"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-8)
    for u, v in zip(found.potentials, wanted.potentials, strict=True):
        logs = [np.log(t) if method == "sinkhorn" else t for t in (u, v)]
        assert up_to_a_factor(np.exp(logs[0]).T, np.exp(logs[1]).T) < 1e-6
    assert set(found.log) == set(wanted.log)
    old = ours.solve_batch(M, 0.5, a, b, solver="sinkhorn", **options)  # POT 0.9.6
    np.testing.assert_allclose(old.plan, found.plan, atol=1e-12)
    for k in range(3):
        one = ours.solve(M[k], a[k], b[k], reg=0.5, reg_type=reg_type, tol=1e-10)
        np.testing.assert_allclose(found.value[k], one.value, atol=1e-9)


@pytest.mark.parametrize("grad", ["autodiff", "envelope"])
def test_gradients_of_solve_batch(grad):
    values = [np.stack([problem(seed=s)[i] for s in range(2)]) for i in (2, 3, 4)]
    found, wanted = [], []
    for module, grads in ((ours, found), (pot, wanted)):
        tensors = [torch.tensor(v, requires_grad=True) for v in values]
        result = module.solve_batch(tensors[2], 0.5, *tensors[:2], reg_type="kl", grad=grad, tol=1e-12)
        result.value.sum().backward()
        grads += [t.grad for t in tensors]
    for first, second in zip(found, wanted, strict=True):
        assert torch.allclose(first, second, rtol=1e-6, atol=1e-7)


def test_the_pieces_of_the_batch_module():
    x, y = (np.stack([problem(seed=s)[i] for s in range(2)]) for i in (0, 1))
    for metric in ("sqeuclidean", "euclidean", "minkowski"):
        np.testing.assert_allclose(
            ours.dist_batch(x, y, metric, p=3), pot.batch.dist_batch(x, y, metric, p=3), atol=1e-12
        )
    h = np.exp(x) / np.exp(x).sum(2, keepdims=True)
    np.testing.assert_allclose(
        ours.dist_batch(h, metric="kl"), pot.batch.dist_batch(h, metric="kl"), atol=1e-12
    )
    M = ours.dist_batch(x, y)
    found, wanted = (m.solve_sample_batch(x, y, 0.5, tol=1e-10) for m in (ours, pot))
    np.testing.assert_allclose(found.plan, wanted.plan, atol=1e-9)
    for name in ("loss_linear_batch",):
        np.testing.assert_allclose(getattr(ours.batch, name)(M, found.plan), found.value_linear)
    np.testing.assert_allclose(ours.batch.loss_linear_samples_batch(x, y, found.plan), found.value_linear)
    np.testing.assert_allclose(ours.batch.entropy_batch(found.plan), pot.batch.entropy_batch(found.plan))
    for name, kernel in (("bregman_projection_batch", np.exp(-M)), ("bregman_log_projection_batch", -M)):
        projected, wanted = (
            getattr(ours.batch, name)(kernel, tol=1e-10),
            getattr(pot.batch, name)(kernel, tol=1e-10),
        )
        assert set(projected) == set(wanted)
        np.testing.assert_allclose(projected["T"], wanted["T"], atol=1e-9)
        assert projected["potentials"][0].shape == wanted["potentials"][0].shape
    with pytest.warns(
        fc.ConvergenceWarning, match=r"ot\.batch\.solve_batch did not converge in 2 iterations"
    ):
        ours.solve_batch(M, 0.01, max_iter=2)


@pytest.mark.parametrize(
    "metric", ["sqeuclidean", "euclidean", "cityblock", "cosine", "correlation", "chebyshev"]
)
def test_distances(metric):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    np.testing.assert_allclose(ours.dist(x, y, metric), pot.dist(x, y, metric), atol=1e-12)
    if metric == "chebyshev":
        with pytest.raises(NotImplementedError, match="metric='chebyshev' is not supported for tensors"):
            ours.dist(torch.from_numpy(x), torch.from_numpy(y), metric)
        return
    found, wanted = [], []
    for module, grads in ((ours, found), (pot, wanted)):
        tensors = [torch.tensor(v, requires_grad=True) for v in (x, y)]
        (module.dist(*tensors, metric) ** 2).sum().backward()
        grads += [t.grad for t in tensors]
    for first, second in zip(found, wanted, strict=True):
        assert torch.allclose(first, second, rtol=1e-9)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_samples(metric):
    x, y, a, b, _ = problem()
    options = {"a": a, "b": b, "metric": metric}
    plan = pot.bregman.empirical_sinkhorn(x, y, 0.5, **options)
    np.testing.assert_allclose(ours.bregman.empirical_sinkhorn(x, y, 0.5, **options), plan, atol=1e-8)
    f, g, log = ours.bregman.empirical_sinkhorn(x, y, 0.5, isLazy=True, log=True, **options)
    *_, wanted = pot.bregman.empirical_sinkhorn(x, y, 0.5, isLazy=True, log=True, **options)
    assert set(log) == set(wanted)
    np.testing.assert_allclose(np.exp(f[:, None] + g - ours.dist(x, y, metric) / 0.5), plan, atol=1e-8)
    np.testing.assert_allclose(log["lazy_plan"][:], plan, atol=1e-8)
    np.testing.assert_allclose(log["lazy_plan"][2:4, 1], plan[2:4, 1:2], atol=1e-8)
    assert log["lazy_plan"].shape == plan.shape
    for lazy in (False, True):
        cost = ours.bregman.empirical_sinkhorn2(x, y, 0.5, isLazy=lazy, **options)
        np.testing.assert_allclose(cost, pot.bregman.empirical_sinkhorn2(x, y, 0.5, **options), atol=1e-7)
        value, log = ours.bregman.empirical_sinkhorn_divergence(x, y, 0.5, isLazy=lazy, log=True, **options)
        wanted, wanted_log = pot.bregman.empirical_sinkhorn_divergence(
            x, y, 0.5, isLazy=lazy, log=True, **options
        )
        np.testing.assert_allclose(value, wanted, atol=1e-7)
        assert set(log) == set(wanted_log)
    found, wanted = (m.solve_sample(x, y, a, b, metric, reg=0.5) for m in (ours, pot))
    np.testing.assert_allclose(found.value, wanted.value, atol=1e-7)
    lazy = ours.solve_sample(x, y, a, b, metric, reg=0.5, lazy=True)
    np.testing.assert_allclose(lazy.value_linear, found.value_linear, atol=1e-8)
    np.testing.assert_allclose(lazy.marginal_a, a, atol=1e-8)
    np.testing.assert_allclose(lazy.marginal_b, b, atol=1e-8)
    debiased, wanted = (m.solve_sample(x, y, a, b, metric, reg=0.5, debias=True) for m in (ours, pot))
    np.testing.assert_allclose(debiased.value, wanted.value, atol=1e-7)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_geomloss_under_pots_name(metric):
    """At reg = 1, since POT solves euclidean problems for the root of reg."""
    x, y, a, b, _ = problem()
    plan = pot.bregman.empirical_sinkhorn(x, y, 1.0, a, b, metric=metric)
    options = {"metric": metric, "scaling": 0.9999}
    value, log = ours.bregman.empirical_sinkhorn2_geomloss(x, y, 1.0, a, b, log=True, **options)
    wanted, wanted_log = pot.bregman.empirical_sinkhorn2_geomloss(
        x, y, 1.0, a, b, log=True, metric=metric, scaling=0.995
    )
    assert set(log) == set(wanted_log)
    np.testing.assert_allclose(value, wanted, rtol=1e-3)
    np.testing.assert_allclose(log["lazy_plan"][:], plan, atol=1e-6)
    value = ours.bregman.empirical_sinkhorn2_geomloss(x, y, 1.0, a, b, **options)
    wanted = pot.bregman.empirical_sinkhorn2_geomloss(x, y, 1.0, a, b, metric=metric, scaling=0.995)
    np.testing.assert_allclose(value, wanted, rtol=1e-3)


MODULES = {
    "": (ours, pot),
    "bregman": (ours.bregman, pot.bregman),
    "unbalanced": (ours.unbalanced, pot.unbalanced),
}
MODULES["batch"] = ours.batch, pot.batch


@pytest.mark.parametrize("module", MODULES)
def test_signatures_are_pots(module):
    mine, theirs = MODULES[module]
    for name in mine.__all__:
        if not inspect.isfunction(getattr(mine, name)) or name in ("dist",):
            continue
        parameters = inspect.signature(getattr(mine, name)).parameters
        for parameter in inspect.signature(getattr(theirs, name)).parameters.values():
            assert parameter.name in parameters, name
            assert parameters[parameter.name].default == parameter.default, (name, parameter)
        order = [p for p in parameters if p in inspect.signature(getattr(theirs, name)).parameters]
        assert order == list(inspect.signature(getattr(theirs, name)).parameters), name


@pytest.mark.parametrize("module", MODULES)
def test_other_functions_of_pot_are_refused_by_name(module):
    mine, theirs = MODULES[module]
    for name in theirs.__all__:
        if inspect.isfunction(getattr(theirs, name, None)) and name not in mine.__all__:
            with pytest.raises(NotImplementedError, match=rf"POT's ot\.{module}.*{name} computes it"):
                getattr(mine, name)(1, x=2)
    with pytest.raises(AttributeError, match="has no attribute 'no_such'"):
        mine.no_such  # noqa: B018


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda o, a, b, M: o.sinkhorn(a, b, M, 0.5, foo=1),
            "'foo' is not supported here; the peer's ot.bregman.sinkhorn_knopp",
        ),
        (lambda o, a, b, M: o.sinkhorn_unbalanced(a, b, M, 0.5, 1.0, tau=3), "'tau' is not supported"),
        (lambda o, a, b, M: o.sinkhorn_unbalanced(a, b, M, 0.5, 1.0, reg_type="l2"), "reg_type='l2'"),
        (lambda o, a, b, M: o.solve(M, a, b), "reg=None is transport without an entropy; POT's ot.solve"),
        (lambda o, a, b, M: o.solve(M, a, b, reg=1, reg_type="L2"), "reg_type='L2'"),
        (lambda o, a, b, M: o.solve(M, a, b, reg=1, reg_type=(abs, abs)), "reg_type="),
        (
            lambda o, a, b, M: o.solve(M, a, b, reg=1, unbalanced=1, unbalanced_type="TV"),
            "unbalanced_type='TV'",
        ),
        (lambda o, a, b, M: o.solve(M, a, b, reg=1, c=M), "c without unbalanced"),
        (lambda o, a, b, M: o.solve(M, a, b, reg=1, plan_init=M), "plan_init"),
        (lambda o, a, b, M: o.solve(M, a, b, reg=1, method="mm"), "method='mm'"),
        (lambda o, a, b, M: o.solve_sample(M, M, reg=1, method="lowrank"), "method='lowrank'"),
        (lambda o, a, b, M: o.solve_sample(M, M, reg=1, rank=3), "'rank'"),
        (lambda o, a, b, M: o.solve_sample(M, M, reg=1, debias="split"), "'debias'"),
        (
            lambda o, a, b, M: o.solve_sample(M, M, reg=1, debias=True, method="geomloss"),
            "debias with method",
        ),
        (lambda o, a, b, M: o.solve_sample(M, M, reg=1, lazy=True, unbalanced=1), "unbalanced with lazy"),
        (lambda o, a, b, M: o.solve_batch(M[None]), "reg=None is exact transport"),
        (lambda o, a, b, M: o.solve_batch(M[None], 1, method="proximal"), "method='proximal'"),
        (lambda o, a, b, M: o.dist(M, M, w=a), "'w'"),
        (lambda o, a, b, M: o.sinkhorn_unbalanced(a, b, M, 1, 1, reg_type=1), "reg_type=1"),
        # Names that the shim's own functions have.
        (
            lambda o, a, b, M: o.unbalanced.sinkhorn_knopp_unbalanced(a, b, M, 1, 1, method="sinkhorn"),
            "'method'",
        ),
        (lambda o, a, b, M: o.sinkhorn(a, b, M, 1, call="sinkhorn"), "'call'"),
        (lambda o, a, b, M: o.sinkhorn2(a, b, M, 1, names=()), "'names'"),
        (lambda o, a, b, M: o.sinkhorn(a, b, fc, 1), "M is an array of type builtins.module"),
        (
            lambda o, a, b, M: o.sinkhorn(a, b, M, torch.tensor(1.0, requires_grad=True)),
            "gradients with respect to reg",
        ),
        (
            lambda o, a, b, M: o.bregman.empirical_sinkhorn(M, M, 1, metric="correlation", isLazy=True),
            "metric='correlation' is not supported with isLazy",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(call, message):
    *_, a, b, M = problem()
    with pytest.raises(NotImplementedError) as caught:
        call(ours, a, b, M)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, a, b, M: o.sinkhorn(a, b, M, 1, method="foo"), "Unknown method 'foo'"),
        (lambda o, a, b, M: o.sinkhorn(a, b, M, 1, method=1), "Unknown method 1"),
        (lambda o, a, b, M: o.sinkhorn_unbalanced(a, b, M, 1, 1, method=None), "Unknown method None"),
        (lambda o, a, b, M: o.sinkhorn2(a, b, M, 1, method="greenkhorn"), "Unknown method 'greenkhorn'"),
        (lambda o, a, b, M: o.sinkhorn(a[:3], b, M, 1), "a must have shape (12,), got (3,)"),
        (lambda o, a, b, M: o.sinkhorn(a, b, M[0], 1), "M must have 2 dimensions"),
        (lambda o, a, b, M: o.sinkhorn(a, b, M * np.nan, 1), "ot.bregman.sinkhorn_knopp: M "),
        (lambda o, a, b, M: o.sinkhorn(a, b, M, -1.0), "ot.bregman.sinkhorn_knopp: reg must be > 0"),
        (
            lambda o, a, b, M: o.sinkhorn(a, b, M, 1.0, numItermax=0),
            "ot.bregman.sinkhorn_knopp: numItermax must be",
        ),
        (lambda o, a, b, M: o.sinkhorn(-a, b, M, 1.0), "a must be finite and >= 0"),
        (
            lambda o, a, b, M: o.sinkhorn(torch.from_numpy(a), b, M, 1.0),
            "a is a torch tensor, but M a NumPy array",
        ),
        (lambda o, a, b, M: o.bregman.greenkhorn(a, np.stack([b, b], 1), M, 1.0), "this method takes one b"),
        (
            lambda o, a, b, M: o.sinkhorn_unbalanced2(a, b, M, 1, 1, returnCost="foo"),
            "Unknown returnCost 'foo'",
        ),
        (lambda o, a, b, M: o.sinkhorn_unbalanced(a, b, M, 1, [1, 2, 3]), "reg_m must be a number"),
        (lambda o, a, b, M: o.solve_batch(M[None], -1.0, method="sinkhorn"), "reg must be > 0"),
        (lambda o, a, b, M: o.solve_batch(M[None], 1.0, grad="foo"), "grad must be one of"),
        (lambda o, a, b, M: o.solve_sample(M, M, reg=1, method="foo"), "Unknown method 'foo'"),
    ],
)
def test_wrong_arguments_are_named_as_pot_names_them(call, message):
    *_, a, b, M = problem()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        call(ours, a, b, M)
    assert message in str(caught.value)


def test_nothing_of_the_peers_is_imported():
    code = (
        "import sys; from flashcoreset.compat import ot, geomloss; "
        "assert not {'ot', 'geomloss', 'pykeops'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_verbose_prints_pots_table(capsys):
    *_, a, b, M = problem()
    ours.sinkhorn(a, b, M, 0.5, verbose=True)
    head, line, row = capsys.readouterr().out.splitlines()
    assert (head, line) == ("It.  |Err         ", "-" * 19)
    assert int(row.split("|")[0]) > 0
    assert float(row.split("|")[1]) < 1e-9
