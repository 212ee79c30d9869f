"""The CUDA kernels of Sinkhorn, run by the emulator (on a GPU under `make gpu`), against the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import DEVICE
from torch import Tensor

from flashcoreset.sinkhorn import cuda, reference

pytestmark = pytest.mark.usefixtures("emulated_cuda")

METRICS = ("sqeuclidean", "euclidean", "l1", "cosine", "precomputed")
BOTH = (math.inf, math.inf)

# Which kernel: None lets problems that fit stay in shared memory, 0 streams them all.
PATHS = pytest.mark.parametrize("shared", [None, 0], ids=["resident", "streamed"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

# Largest error of potentials, value, transport cost and error (of the marginals, which sum up to 1) that is allowed, relative
# to the largest cost, or reg or (cosine, where 1 - cos cancels) 1 if that is more: costs computed in float32 are off by some
# units of 6e-8, and so are all numbers made from them. Worst seen: 1.9e-7 and 1.2e-15.
TOLERANCE = {torch.float32: 5e-7, torch.float64: 5e-15}


@dataclass
class Problems:
    """A batch on DEVICE, and the definition's solution of it."""

    x: Tensor
    y: Tensor | None
    a: Tensor
    b: Tensor
    largest: float

    def options(self, **more: Any) -> dict[str, Any]:
        return {
            "metric": "precomputed" if self.y is None else "sqeuclidean",
            "max_iter": 8,
            "tol": 0.0,
            **more,
        }


def weights(batch: int, count: int, generator: torch.Generator) -> Tensor:
    w = torch.rand(batch, count, generator=generator, dtype=torch.float64) + 0.1
    return w / w.sum(1, keepdim=True)


def problems(
    batch: int,
    n: int,
    m: int,
    d: int = 3,
    *,
    metric: str = "sqeuclidean",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problems:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, d, generator=generator, dtype=torch.float64).to(dtype)
    y: Tensor | None = torch.randn(batch, m, d, generator=generator, dtype=torch.float64).to(dtype) + 0.5
    a, b = weights(batch, n, generator), weights(batch, m, generator)
    plain = "sqeuclidean" if metric == "precomputed" else metric
    assert y is not None
    costs = [reference._Costs(u, v, plain, 2**30).matrix for u, v in zip(x, y, strict=True)]
    if metric == "precomputed":
        x, y = torch.stack(costs).to(dtype), None
    largest = max(float(c.max()) for c in costs)
    return Problems(*(None if t is None else t.to(DEVICE) for t in (x, y, a, b)), largest)  # type: ignore[arg-type]


def host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def compare(
    case: Problems,
    monkeypatch: pytest.MonkeyPatch,
    shared: int | None,
    tolerance: float = 1.0,
    **options: Any,
) -> tuple[reference.Solution, reference.Solution]:
    """Both solutions, checked against each other within `tolerance` times TOLERANCE."""
    monkeypatch.setattr(cuda, "SINKHORN_SHARED_BYTES", shared)
    got = cuda.sinkhorn(case.x, case.y, case.a, case.b, **options)
    want = reference.sinkhorn(
        case.x.cpu(), host(case.y), case.a.cpu(), case.b.cpu(), **{k: host(v) for k, v in options.items()}
    )
    got = reference.Solution(*(t.cpu() for t in got))
    scale = max(case.largest, options["reg"], 1.0 if options["metric"] == "cosine" else 0.0)
    within = TOLERANCE[case.x.dtype] * tolerance
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert torch.equal(got.iterations, want.iterations)
    assert torch.equal(got.converged, got.error <= options["tol"])
    if options["tol"] > 0:  # an error of 0 is an accident of rounding
        assert torch.equal(got.converged, want.converged)
    torch.testing.assert_close(got.f, want.f, rtol=0, atol=within * scale)
    torch.testing.assert_close(got.g, want.g, rtol=0, atol=within * scale)
    torch.testing.assert_close(got.value, want.value, rtol=0, atol=within * scale)
    torch.testing.assert_close(got.transport_cost, want.transport_cost, rtol=0, atol=within * scale)
    torch.testing.assert_close(got.error, want.error, rtol=0, atol=within)
    return got, want


@PATHS
@DTYPES
@pytest.mark.parametrize("metric", METRICS)
def test_agrees_with_the_definition(
    metric: str, dtype: torch.dtype, shared: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for (n, m), marginals in zip(
        [(1, 1), (7, 1), (1, 7), (33, 7), (7, 97), (130, 33)],
        [BOTH, BOTH, (1.0, math.inf), (0.5, 2.0), (math.inf, 1.0), BOTH],
        strict=True,
    ):
        case = problems(1, n, m, metric=metric, dtype=dtype, seed=n)
        compare(
            case,
            monkeypatch,
            shared,
            reg=0.1 * case.largest,
            reg_marginal=marginals,
            metric=metric,
            max_iter=5,
            tol=0.0,
        )


@PATHS
def test_features_in_several_chains(shared: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problems(1, 9, 6, 300, metric="l1")
    compare(case, monkeypatch, shared, reg=0.1 * case.largest, metric="l1", max_iter=3, tol=0.0)


@PATHS
@DTYPES
@pytest.mark.parametrize("metric", ["euclidean", "precomputed"])
@pytest.mark.parametrize("marginals", [BOTH, (1.0, math.inf)], ids=["balanced", "semi-unbalanced"])
def test_ragged_batches_never_read_the_padding(
    marginals: tuple[float, float],
    metric: str,
    dtype: torch.dtype,
    shared: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = problems(4, 20, 17, metric=metric, dtype=dtype)
    rows, columns = torch.tensor([20, 1, 13, 7]), torch.tensor([9, 17, 1, 7])
    case.a[0, 3] = case.b[3, 2] = 0
    for p, (r, c) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        for side, count in ((case.a, r), (case.b, c)):
            side[p, count:] = math.nan
            side[p, :count] /= side[p, :count].sum()
        case.x[p, r:] = math.nan
        if case.y is None:
            case.x[p, :, c:] = math.nan
        else:
            case.y[p, c:] = math.nan
    more = {
        "reg": 0.1 * case.largest,
        "metric": metric,
        "x_lengths": rows.to(DEVICE),
        "y_lengths": columns.to(DEVICE),
    }
    got, _ = compare(case, monkeypatch, shared, reg_marginal=marginals, max_iter=6, tol=0.0, **more)
    for p, (r, c) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        assert not got.f[p, r:].any()
        assert not got.g[p, c:].any()
        alone = cuda.sinkhorn(
            case.x[p : p + 1, :r] if case.y is not None else case.x[p : p + 1, :r, :c],
            None if case.y is None else case.y[p : p + 1, :c],
            case.a[p : p + 1, :r],
            case.b[p : p + 1, :c],
            reg=0.1 * case.largest,
            metric=metric,
            reg_marginal=marginals,
            max_iter=6,
            tol=0.0,
        )
        # A problem's numbers are the same, bit for bit, in a batch and alone.
        assert torch.equal(got.f[p, :r], alone.f[0].cpu())
        assert got.value[p] == alone.value[0].cpu()
    f, g = got.f.to(DEVICE), got.g.to(DEVICE)
    f[0, 20:] = g[0, 9:] = math.nan
    plan = cuda.sinkhorn_plan(case.x, case.y, case.a, case.b, f, g, **more).cpu()
    v = torch.randn(4, 17, 6, dtype=torch.float64)
    for p, (r, c) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        assert not plan[p, r:].any()
        assert not plan[p, :, c:].any()
        v[p, c:] = math.nan
    product = cuda.sinkhorn_apply(case.x, case.y, case.a, case.b, f, g, v.to(DEVICE), **more).cpu()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(product, plan @ v.nan_to_num(0.0), rtol=0, atol=tolerance)


@PATHS
@DTYPES
def test_warm_start_and_zero_weights(
    dtype: torch.dtype, shared: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problems(2, 12, 9, dtype=dtype)
    case.a[:, ::4] = 0
    case.b[1, :5] = 0
    case.a /= case.a.sum(1, keepdim=True)
    case.b /= case.b.sum(1, keepdim=True)
    for marginals in (BOTH, (2.0, 0.7)):
        options = case.options(reg=0.05 * case.largest, reg_marginal=marginals)
        first, _ = compare(case, monkeypatch, shared, **options)
        f, g = first.f.to(DEVICE), first.g.to(DEVICE)
        second, _ = compare(case, monkeypatch, shared, f=f, g=g, **options)
        assert (second.error < first.error).all()


@PATHS
@pytest.mark.parametrize("masses", [1e-6, 1.0, 1e4])
def test_masses_other_than_one(masses: float, shared: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problems(1, 10, 14, dtype=torch.float64)
    case.a *= masses
    case.b *= masses
    monkeypatch.setattr(cuda, "SINKHORN_SHARED_BYTES", shared)
    options = case.options(reg=0.1 * case.largest)
    got = cuda.sinkhorn(case.x, case.y, case.a, case.b, **options)
    want = reference.sinkhorn(case.x.cpu(), host(case.y), case.a.cpu(), case.b.cpu(), **options)
    for name in ("f", "g", "value", "transport_cost", "error"):
        torch.testing.assert_close(
            getattr(got, name).cpu(), getattr(want, name), rtol=1e-11, atol=1e-13 * masses
        )


# The tol that can be met in the iterations that the emulator has time for; if it is None, max_iter ends the run.
@PATHS
@DTYPES
@pytest.mark.parametrize(
    ("part", "iterations", "tol"), [(0.05, 100, 1e-5), (0.01, 100, 1e-5), (1e-3, 150, 0.0), (1e-4, 150, 0.0)]
)
def test_small_regularisation(
    part: float,
    iterations: int,
    tol: float,
    dtype: torch.dtype,
    shared: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = problems(1, 24, 19, dtype=dtype)
    reg = part * case.largest
    # Over-relaxation is steered by the errors seen, so differences in rounding are carried on; relative to reg, in which
    # marginals feel them, they are up to 10^4 times what they are to the costs.
    got, want = compare(
        case,
        monkeypatch,
        shared,
        tolerance=1.0 if dtype == torch.float32 else 50.0,
        **case.options(reg=reg, max_iter=iterations, tol=tol),
    )
    plan = cuda.sinkhorn_plan(
        case.x, case.y, case.a, case.b, got.f.to(DEVICE), got.g.to(DEVICE), reg=reg, metric="sqeuclidean"
    ).cpu()
    a, b = case.a.cpu(), case.b.cpu()
    shown = (plan.sum(2) - a).abs().sum() + (plan.sum(1) - b).abs().sum()
    single = dtype == torch.float32
    assert abs(float(shown - got.error)) <= (2e-7 if single else 1e-13)  # seen: 3e-8, 9e-15
    assert bool(got.converged) == (tol > 0)
    exact = reference.sinkhorn_plan(
        case.x.cpu(), host(case.y), a, b, want.f, want.g, reg=reg, metric="sqeuclidean"
    )
    assert float((plan - exact).abs().sum()) <= (5e-6 if single else 2e-12)  # seen: 1.4e-6, 4e-13


@PATHS
def test_exactly_the_iterations_asked_for(shared: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problems(2, 8, 8)
    for iterations in (1, 2, 11):
        got, _ = compare(case, monkeypatch, shared, **case.options(reg=case.largest, max_iter=iterations))
        assert got.iterations.tolist() == [iterations, iterations]
    monkeypatch.setattr(cuda, "SINKHORN_SHARED_BYTES", shared)
    done: list[tuple[int, int]] = []
    cuda.sinkhorn(
        case.x,
        case.y,
        case.a,
        case.b,
        report=lambda *at: done.append(at),
        **case.options(reg=1.0, max_iter=3),
    )
    assert done == [(6, 6)]


@PATHS
def test_each_problem_stops_for_itself(shared: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problems(3, 8, 6)
    case.x[0] *= 3
    case.x[1] *= 0.1
    case.largest *= 9
    got, _ = compare(case, monkeypatch, shared, **case.options(reg=0.3, max_iter=60, tol=1e-3))
    assert len(set(got.iterations.tolist())) > 1
    assert got.iterations[1] < 60
    assert got.converged[1]


@DTYPES
def test_products_with_plans(dtype: torch.dtype) -> None:
    case = problems(2, 70, 140, dtype=dtype)
    f, g = torch.randn(2, 70, dtype=torch.float64) * 0.1, torch.randn(2, 140, dtype=torch.float64) * 0.1
    v, u = torch.randn(2, 140, 5, dtype=torch.float64), torch.randn(2, 70, 1, dtype=torch.float64)
    more = {"reg": 2.0, "metric": "sqeuclidean"}
    arguments = (case.x, case.y, case.a, case.b, f.to(DEVICE), g.to(DEVICE))
    plain = tuple(host(argument) for argument in arguments)
    # The error of entries of at most 1e-3 each; float32: their costs' rounding over reg, 1e-6 of them.
    tolerance = {"rtol": 5e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-16}
    for got, want in (
        (cuda.sinkhorn_plan(*arguments, **more), reference.sinkhorn_plan(*plain, **more)),
        (cuda.sinkhorn_apply(*arguments, v.to(DEVICE), **more), reference.sinkhorn_apply(*plain, v, **more)),
        (
            cuda.sinkhorn_apply(*arguments, u.to(DEVICE), transpose=True, **more),
            reference.sinkhorn_apply(*plain, u, transpose=True, **more),
        ),
    ):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.cpu(), want, **tolerance)
    none = torch.empty(2, 140, 0, dtype=torch.float64, device=DEVICE)
    assert cuda.sinkhorn_apply(*arguments, none, **more).shape == (2, 70, 0)


def test_arrays_in_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problems(2, 9, 7)
    assert case.y is not None
    strided = Problems(
        case.x.mT.contiguous().mT,
        torch.stack([case.y, case.y], -1)[..., 0],
        case.a.T.contiguous().T,
        case.b.expand(2, 7),
        case.largest,
    )
    compare(strided, monkeypatch, None, **strided.options(reg=1.0))


def spoiled(name: str, at: tuple[int, ...], value: float, metric: str = "sqeuclidean") -> Problems:
    case = problems(3, 6, 5, metric=metric)
    getattr(case, name)[at] = value
    return case


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (("x", (2, 3, 1), math.nan), "x must be finite, got NaN at row 3, column 1 of problem 2"),
        (("y", (1, 4, 0), -math.inf), "y must be finite, got -inf at row 4, column 0 of problem 1"),
        (
            ("x", (0, 5, 4), math.inf, "precomputed"),
            "x must be finite, got inf at row 5, column 4 of problem 0",
        ),
        (("a", (1, 2), -0.5), "a must be finite and >= 0, got -0.5 at position 2 of problem 1"),
        (("b", (2, 0), math.nan), "b must be finite and >= 0, got NaN at position 0 of problem 2"),
        (("a", (1, slice(None)), 0.0), "a must have a finite sum > 0; its sum is not in problem 1"),
        (("b", (0, 1), 0.9), "a and b must have equal sums .* in problem 0"),
        (("x", (1, 0, 0), 1e30), "costs overflow torch.float32 in problem 1"),
    ],
)
def test_bad_values(case: tuple[Any, ...], words: str) -> None:
    batch = spoiled(*case)
    with pytest.raises(ValueError, match=words):
        cuda.sinkhorn(batch.x, batch.y, batch.a, batch.b, **batch.options(reg=1.0))


def test_bad_values_of_a_single_problem() -> None:
    case = problems(1, 6, 5)
    case.x[0, 3, 2] = math.nan
    with pytest.raises(ValueError, match=r"x must be finite, got NaN at row 3, column 2$"):
        cuda.sinkhorn(case.x, case.y, case.a, case.b, **case.options(reg=1.0))


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"a": torch.ones(1, 5, dtype=torch.float64)}, r"a: expected a contiguous array \[1, 6\]"),
        ({"b": torch.ones(1, 5)}, "b: expected dtype float64, got float32"),
        ({"y": torch.ones(1, 5, 2)}, r"y: expected a contiguous array \[1, 5, 3\]"),
        ({"y": None}, "y: expected points, or None for metric precomputed"),
    ],
)
def test_arrays_that_do_not_fit(replaced: dict[str, Tensor | None], words: str) -> None:
    case = problems(1, 6, 5)
    arrays = {"x": case.x, "y": case.y, "a": case.a, "b": case.b}
    arrays |= {name: None if t is None else t.to(DEVICE) for name, t in replaced.items()}
    with pytest.raises((TypeError, ValueError), match=words):
        cuda.sinkhorn(*arrays.values(), reg=1.0, metric="sqeuclidean")  # type: ignore[arg-type]
