"""The kernels of Sinkhorn on each backend, by low-level calls, against the definition.

An interpreted or emulated iteration of one problem takes up to a tenth of a second: sizes and iterations are few.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import DEVICE, on_device
from checks.sinkhorn import BOTH, DTYPES, METRICS, Case, points, spoil_padding, there
from conftest import BACKENDS, GPU_BACKENDS

from flashcoreset._core import native
from flashcoreset.sinkhorn import cuda, reference
from flashcoreset.sinkhorn.backend import Kernels, kernels_of

COMPILED = [name for name in BACKENDS if name != "torch" and DEVICE == "cpu"]
SOLVERS = [*COMPILED, "cuda", "cuda streamed", *GPU_BACKENDS[1:]]


@pytest.fixture(params=SOLVERS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The low-level calls of a backend. CUDA's keep problems that fit in shared memory there, or stream them all."""
    name, *streamed = request.param.split()
    if name == "cuda":
        request.getfixturevalue("emulated_cuda")
        monkeypatch.setattr(cuda, "SINKHORN_SHARED_BYTES", 0 if streamed else None)
    elif name.startswith("cpu-"):
        monkeypatch.setattr(native, "_loaded", native.load_isa(name.removeprefix("cpu-")))
    return kernels_of(name.split("-")[0])


def is_triton(kernels: Kernels) -> bool:
    return kernels.__name__.endswith("triton")  # type: ignore[attr-defined]


@DTYPES
@pytest.mark.parametrize("metric", METRICS)
def test_agrees_with_the_definition(metric: str, dtype: torch.dtype, kernels: Kernels) -> None:
    cases = [((1, 7), (0.5, 2.0)), ((33, 70), BOTH), ((40, 21), (math.inf, 1.0))]
    if not is_triton(kernels):
        cases += [
            ((1, 1), BOTH),
            ((7, 1), BOTH),
            ((33, 7), (0.5, 2.0)),
            ((7, 97), (math.inf, 1.0)),
            ((130, 33), BOTH),
        ]
    for (n, m), (rho_a, rho_b) in cases:
        case = Case(1, n, m, metric=metric, dtype=dtype)
        case.compare(kernels, reg=0.1 * case.largest, rho_a=rho_a, rho_b=rho_b)


def test_features_in_several_chains(kernels: Kernels) -> None:
    for metric in ("euclidean", "l1"):
        case = Case(1, 9, 5, 300, metric=metric)
        case.compare(kernels, reg=0.1 * case.largest, max_iter=1 if is_triton(kernels) else 3)


@DTYPES
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "precomputed"])
@pytest.mark.parametrize("rho", [BOTH, (1.0, math.inf)], ids=["balanced", "semi-unbalanced"])
def test_ragged_batches_never_read_the_padding(
    rho: tuple[float, float], metric: str, dtype: torch.dtype, kernels: Kernels
) -> None:
    case = Case(4, 14, 17, metric=metric, dtype=dtype)
    lengths = {"x_lengths": torch.tensor([14, 1, 13, 7]), "y_lengths": torch.tensor([9, 17, 1, 7])}
    case.a[0, 3] = case.b[3, 2] = 0
    spoil_padding(case, lengths)
    options: dict[str, Any] = {"reg": 0.1 * case.largest, "rho_a": rho[0], "rho_b": rho[1]}
    got = case.compare(kernels, **lengths, **options)
    f, g = got.f.clone(), got.g.clone()
    v, w = points(4, 17, 6, 5, dtype), points(4, 14, 1, 6, dtype)
    for p, (n, m) in enumerate(zip(*(t.tolist() for t in lengths.values()), strict=True)):
        assert not f[p, n:].any()
        assert not g[p, m:].any()
        one = Case(1, n, m, metric=metric, dtype=dtype)
        one.x = case.x[p : p + 1, :n, : m if case.y is None else None]
        one.y = None if case.y is None else case.y[p : p + 1, :m]
        one.a, one.b = case.a[p : p + 1, :n], case.b[p : p + 1, :m]
        alone = one.solve(kernels, **options)
        # A problem's numbers are the same, bit for bit, in a batch and alone.
        for name in ("value", "transport_cost", "error", "iterations"):
            assert torch.equal(getattr(got, name)[p], getattr(alone, name)[0]), name
        assert torch.equal(f[p, :n], alone.f[0])
        assert torch.equal(g[p, :m], alone.g[0])
        f[p, n:] = g[p, m:] = v[p, m:] = w[p, n:] = math.nan
    problem = case.problem(f=f, g=g, **lengths, **options)
    plan, exact = kernels.sinkhorn_plan(there(problem)).cpu().double(), reference.sinkhorn_plan(problem)
    # A plan is off by the rounding of a cost as a share of reg, and by the rounding of the exponent.
    within = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype] * float(exact.max())
    torch.testing.assert_close(plan, exact, rtol=0, atol=within)
    for factor, transpose in ((v, False), (w, True)):
        product = kernels.sinkhorn_apply(there(problem), on_device(factor), transpose).cpu()
        expected = (plan.mT if transpose else plan) @ factor.double().nan_to_num(0.0)
        torch.testing.assert_close(product.double(), expected, rtol=0, atol=within * 17)


def test_each_problem_stops_for_itself(kernels: Kernels) -> None:
    """A problem that is solved keeps its results, while others go on."""
    case = Case(3, 8, 6)
    case.x[0] *= 3
    case.x[1] *= 0.1
    case.largest *= 9
    got = case.compare(kernels, reg=0.3, max_iter=60 if not is_triton(kernels) else 12, tol=1e-2)
    assert len(set(got.iterations.tolist())) > 1
    assert got.converged[1]


@DTYPES
@pytest.mark.parametrize("rho", [BOTH, (2.0, 0.7)], ids=["balanced", "unbalanced"])
def test_warm_start_and_zero_weights(rho: tuple[float, float], dtype: torch.dtype, kernels: Kernels) -> None:
    case = Case(2, 12, 9, dtype=dtype)
    case.a[:, ::4] = 0
    case.b[1, :5] = 0
    case.a /= case.a.sum(1, keepdim=True)
    case.b /= case.b.sum(1, keepdim=True)
    options: dict[str, Any] = {"reg": 0.05 * case.largest, "rho_a": rho[0], "rho_b": rho[1]}
    first = case.compare(kernels, **options)
    second = case.compare(kernels, f=first.f, g=first.g, **options)
    assert (second.error < first.error).all()


@pytest.mark.parametrize("mass", [1e-6, 1.0, 1e4])
def test_masses_other_than_one(mass: float, kernels: Kernels) -> None:
    case = Case(1, 10, 14, dtype=torch.float64)
    case.a *= mass
    case.b *= mass
    options: dict[str, Any] = {"reg": 0.1 * case.largest, "max_iter": 8}
    got, want = case.solve(kernels, **options), reference.sinkhorn(case.problem(**options))
    for name in ("f", "g", "value", "transport_cost", "error"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-11, atol=1e-13 * mass)


def test_potentials_are_as_exact_as_their_differences(kernels: Kernels) -> None:
    """Costs of about 1000, exact in float32, that differ by 1/64: potentials in float32 would be off by 3e-5."""
    case = Case(1, 12, 9, metric="precomputed")
    case.x = 1000 + (64 * case.x / case.x.max()).round() / 64
    start = {
        "f": torch.full((1, 12), 499.9, dtype=torch.float64),
        "g": torch.full((1, 9), 500.3, dtype=torch.float64),
    }
    got, want = case.solve(kernels, reg=0.1, **start), reference.sinkhorn(case.problem(reg=0.1, **start))
    for name in ("f", "g", "value"):
        # Exponents of up to 10 are rounded to 5e-7, which reg makes 5e-8.
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-7)


@DTYPES
def test_small_regularisation_is_annealed(dtype: torch.dtype, kernels: Kernels) -> None:
    case = Case(1, 30, 20, metric="precomputed", dtype=dtype)
    assert reference.Schedule(1.0, 1e3, 0.0, 13, False).eps > 1
    assert torch.isfinite(case.compare(kernels, reg=1e-3 * case.largest, max_iter=13).f).all()


def test_comes_to_its_tolerance(kernels: Kernels) -> None:
    case = Case(1, 20, 15, metric="precomputed")
    options: dict[str, Any] = {"reg": 0.02 * case.largest, "tol": 1e-5, "max_iter": 200}
    found = case.compare(kernels, **options)
    assert found.converged.all()
    assert int(found.iterations[0]) > 2 * reference.Schedule.PERIOD, "too few iterations to be over-relaxed"
    plan = case.plan(kernels, found, **options).double()
    shown = (plan.sum(2) - case.a).abs().sum(1) + (plan.sum(1) - case.b).abs().sum(1)
    torch.testing.assert_close(found.error, shown, rtol=0, atol=2e-7)


# The tol that can be met in the iterations that the emulator has time for; if it is 0, max_iter ends the run.
@DTYPES
@pytest.mark.parametrize(
    ("part", "iterations", "tol"), [(0.05, 100, 1e-5), (0.01, 100, 1e-5), (1e-3, 150, 0.0), (1e-4, 150, 0.0)]
)
@pytest.mark.parametrize(
    "kernels", SOLVERS[: len(COMPILED) + 2], indirect=True
)  # the interpreter takes too long
def test_small_regularisation(
    part: float, iterations: int, tol: float, dtype: torch.dtype, kernels: Kernels
) -> None:
    case, single = Case(1, 24, 19, dtype=dtype), dtype == torch.float32
    options: dict[str, Any] = {"reg": part * case.largest, "max_iter": iterations, "tol": tol}
    # Over-relaxation is steered by the errors seen, so differences in rounding are carried on; relative to reg, in which
    # marginals feel them, they are up to 10^4 times what they are to the costs.
    got = case.compare(kernels, tolerance=1.0 if single else 50.0, **options)
    plan = case.plan(kernels, got, **options).double()
    shown = (plan.sum(2) - case.a).abs().sum() + (plan.sum(1) - case.b).abs().sum()
    assert abs(float(shown - got.error)) <= (2e-7 if single else 1e-13)  # seen: 3e-8, 9e-15
    assert bool(got.converged) == (tol > 0)
    exact = case.plan(reference, reference.sinkhorn(case.problem(**options)), **options)
    assert float((plan - exact).abs().sum()) <= (5e-6 if single else 2e-12)  # seen: 1.4e-6, 4e-13


def test_exactly_the_iterations_asked_for(kernels: Kernels) -> None:
    case = Case(2, 8, 8)
    for iterations in (1, 2, 11):
        got = case.compare(kernels, reg=case.largest, max_iter=iterations)
        assert got.iterations.tolist() == [iterations, iterations]
    done: list[tuple[int, int]] = []
    kernels.sinkhorn(there(case.problem(reg=1.0)), lambda *at: done.append(at))
    assert done[-1] == (6, 6)


@DTYPES
def test_products_with_plans(dtype: torch.dtype, kernels: Kernels) -> None:
    case = Case(2, 70, 140, dtype=dtype)
    problem = case.problem(
        reg=2.0, f=0.1 * points(2, 70, 1, 7)[:, :, 0], g=0.1 * points(2, 140, 1, 8)[:, :, 0]
    )
    moved, plan = there(problem), reference.sinkhorn_plan(problem)
    # The error of entries of at most 1e-3 each; float32: their costs' rounding over reg, 1e-6 of them.
    tolerance = {"rtol": 5e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-16}
    torch.testing.assert_close(kernels.sinkhorn_plan(moved).cpu().double(), plan, **tolerance)
    # Sums of so many entries, of both signs, and (on the CPU) results of the points' type.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-15}
    for transpose, size, k in ((False, 140, 5), (True, 70, 1), (False, 140, 0)):
        if k == 0 and is_triton(kernels):
            continue  # the public function does not call it
        v = points(2, size, k, 9, dtype)
        found = kernels.sinkhorn_apply(moved, on_device(v), transpose).cpu().double()
        torch.testing.assert_close(found, (plan.mT if transpose else plan) @ v.double(), **tolerance)


def test_arrays_in_any_layout(kernels: Kernels) -> None:
    case = Case(2, 9, 7)
    assert case.y is not None
    case.x, case.y = case.x.mT.contiguous().mT, torch.stack([case.y, case.y], -1)[..., 0]
    case.a, case.b = case.a.T.contiguous().T, case.b[:1].expand(2, 7)
    case.compare(kernels, reg=1.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a warning of NumPy in the interpreter
@pytest.mark.parametrize(
    ("name", "at", "value", "metric", "words"),
    [
        ("x", (2, 3, 1), math.nan, "l1", "x must be finite, got (NaN|nan) at row 3, column 1 of problem 2$"),
        ("y", (1, 4, 0), -math.inf, "l1", "y must be finite, got -inf at row 4, column 0 of problem 1$"),
        (
            "x",
            (0, 5, 4),
            -math.inf,
            "precomputed",
            "x must be finite, got -inf at row 5, column 4 of problem 0$",
        ),
        ("x", (1, 0, 0), 1e30, "sqeuclidean", "costs overflow torch.float32 in problem 1"),
    ],
)
def test_bad_values(
    name: str, at: tuple[int, ...], value: float, metric: str, words: str, kernels: Kernels
) -> None:
    case = Case(3, 6, 5, metric=metric)
    getattr(case, name)[at] = value
    with pytest.raises(ValueError, match=words):
        case.solve(kernels, reg=1.0)


def test_bad_values_of_a_single_problem(kernels: Kernels) -> None:
    case = Case(1, 6, 5)
    case.x[0, 3, 2] = math.nan
    with pytest.raises(ValueError, match=r"x must be finite, got (NaN|nan) at row 3, column 2$"):
        case.solve(kernels, reg=1.0)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"a": torch.ones(1, 5, dtype=torch.float64)}, r"a: expected shape \(1, 6\), got \(1, 5\)"),
        ({"b": torch.ones(1, 5)}, "b: expected dtype float64, got float32"),
        ({"y": torch.ones(1, 5, 2)}, r"y: expected shape \(1, 5, 3\), got \(1, 5, 2\)"),
        ({"y": None}, "y: expected points, or None for metric precomputed"),
        ({"f": torch.ones(1, 6, dtype=torch.float64)}, "f, g: expected both, or None for both"),
    ],
)
@pytest.mark.parametrize("kernels", SOLVERS[: len(COMPILED) + 2], indirect=True)  # which a binding checks
def test_arrays_that_do_not_fit(replaced: dict[str, Any], words: str, kernels: Kernels) -> None:
    problem = Case(1, 6, 5).problem(reg=1.0)
    for name, value in replaced.items():
        setattr(problem, name, value)
    with pytest.raises((TypeError, ValueError), match=words):
        kernels.sinkhorn(there(problem))
