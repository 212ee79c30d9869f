"""Odd numbers for every real argument: a right answer, or an error of the right type that names the argument.

The right answer comes from exact arithmetic, from what the definition says about a limit, or from the same call with the number that a
0-dimensional array or a fraction stands for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import on_device

import flashcoreset as fc
from flashcoreset.facility_location.sampling import CandidateSampler

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(14, 3, generator=GENERATOR)
GRADIENTS = torch.randn(12, 6, generator=GENERATOR, dtype=torch.float64)
GRADIENTS[:, 2] = 0  # a dimension in which nothing happens
M, V = (
    torch.randn(6, generator=GENERATOR, dtype=torch.float64),
    torch.rand(6, generator=GENERATOR, dtype=torch.float64),
)
M[2] = V[2] = 0
SCORES = np.arange(14.0)

WRONG_TYPES: dict[str, Any] = {
    "bool": True, "NumPy bool": np.True_, "bool tensor": torch.tensor(True), "str": "0.25", "NumPy str": np.str_("0.25"),
    "bytes": b"0.25", "bytearray": bytearray(b"0.25"), "list": [0.25], "complex": 0.25 + 0j, "NumPy complex": np.complex128(0.25),
    "complex tensor": torch.tensor(0.25 + 0j), "array [1]": np.array([0.25]), "tensor [1]": torch.tensor([0.25]),
    "meta": torch.tensor(0.25, device="meta"), "object": object(),
}  # fmt: skip
NOT_FINITE: dict[str, Any] = {
    "inf": math.inf, "-inf": -math.inf, "nan": math.nan, "NumPy nan": np.float32("nan"), "tensor inf": torch.tensor(math.inf),
    "2**1100": 2**1100, "-2**1100": -(2**1100),
}  # fmt: skip
QUARTERS: dict[str, Any] = {
    "float16": np.float16(0.25), "float32": np.float32(0.25), "float64": np.float64(0.25), "array": np.array(0.25),
    "tensor": torch.tensor(0.25), "float64 tensor": torch.tensor(0.25, dtype=torch.float64),
    "bfloat16 tensor": torch.tensor(0.25).bfloat16(), "with a gradient": torch.tensor(0.25, requires_grad=True),
    "Fraction": Fraction(1, 4), "Decimal": Decimal("0.25"),
}  # fmt: skip
ODD = [
    5e-324,
    1e-308,
    1e-30,
    1e30,
    1e308,
    -0.0,
    0.0,
    -1.0,
    -5e-324,
    math.nextafter(1, 0),
    1.0,
    2**70,
    -(2**70),
]


@dataclass
class Argument:
    name: str
    call: Callable[[Any], Any]
    # The right answer for a number; None if it is to be refused.
    expected: Callable[[float], Any]
    close: float = 0.0  # how near floating results have to come, relatively


def chosen(found: Any) -> tuple[list[int], list[float]]:
    return found.indices.tolist(), found.weights.tolist()


# --- facility_location ------------------------------------------------------------------------------


def by_epsilon(epsilon: float) -> list[int] | None:
    """ceil(n / k ln(1 / epsilon)) candidates: all of them for tiny epsilons, one for those next to 1."""
    if not 0 < epsilon < 1:
        return None
    if epsilon < 1e-20:
        return fc.facility_location(X, 4, method="naive").indices.tolist()
    sampler = CandidateSampler(list(range(14)), 0)
    picks = []
    for _ in range(4):
        picks += sampler.draw(1).tolist()
        sampler.remove(picks[-1])
    return picks


def exact_greedy(offset: float, dtype: torch.dtype) -> list[int] | None:
    """Greedy picks of sum_i max(0, offset - |x_i - x_j|_1) in fractions."""
    if dtype == torch.float32 and 0 < offset < 1e-46:
        offset = 0.0  # in its own precision
    least = 2.0 ** (-96 if dtype == torch.float32 else -970)  # below it gains have no room
    if offset and not least <= 14 * offset <= torch.finfo(dtype).max:
        return None
    distance = (X.double()[:, None] - X.double()).abs().sum(2).tolist()
    s = [[max(Fraction(0), Fraction(offset) - Fraction(d)) for d in row] for row in distance]
    best, picks = [Fraction(0)] * 14, []
    for _ in range(4):
        gains = [sum(max(a, b) - b for a, b in zip(row, best, strict=True)) for row in s]
        left = [j for j in range(14) if j not in picks]
        picks.append(max(left, key=lambda j: (gains[j], -j)))
        best = [max(a, b) for a, b in zip(s[picks[-1]], best, strict=True)]
    return picks


def located(backend: str, **options: Any) -> list[int]:
    return fc.facility_location(X, 4, backend=backend, **options).indices.tolist()


def with_offset(backend: str, dtype: torch.dtype) -> Callable[[Any], list[int]]:
    return lambda v: fc.facility_location(
        X.to(dtype), 4, metric="l1", offset=v, backend=backend
    ).indices.tolist()


# --- match_gradients, AdamState, CoLM ---------------------------------------------------------------


def pursued(ridge: float) -> tuple[list[int], list[float]] | None:
    """The definition, with a solve of the normal equations at each step; the digits that ridge leaves of float64 at its
    limits."""
    if ridge < 0:
        return None
    g = GRADIENTS.numpy()
    b, picks, weights = g.sum(0), [], np.zeros(0)
    for _ in range(3):
        rest = g @ (b - g[picks].T @ weights)
        rest[picks] = -np.inf
        picks.append(int(rest.argmax()))
        part = g[picks]
        weights = np.linalg.solve(part @ part.T + ridge * np.eye(len(picks)), part @ b)
        assert (weights > 0).all()  # the bound on weights is not in force
    return picks, weights.tolist()


def matched(ridge: Any, backend: str) -> tuple[list[int], list[float]]:
    return chosen(fc.match_gradients(GRADIENTS, 3, method="omp", ridge=ridge, backend=backend))


def update(g: np.ndarray, betas: tuple[float, float], eps: float) -> np.ndarray:
    """Adam's at step 3, from M and V."""
    m = betas[0] * M.numpy() + (1 - betas[0]) * g
    v = betas[1] * V.numpy() + (1 - betas[1]) * g**2
    m, v = m / (1 - betas[0] ** 3), v / (1 - betas[1] ** 3)
    return m / (np.sqrt(v) + eps)


def normalized(betas: Any = (0.9, 0.999), eps: Any = 1e-8, backend: str = "cpu") -> list[int]:
    state = fc.AdamState(M, V, 3, betas, eps)
    return fc.match_gradients(GRADIENTS, 4, normalize=state, backend=backend).indices.tolist()


def by_update(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> list[int] | None:
    """Medoids of the updates, by a greedy search in float64 whose offset is far above all distances."""
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and 0 < eps <= 1e100):
        return None
    u = update(GRADIENTS.numpy(), betas, eps)
    u = u / np.abs(u).max()
    distance = np.abs(u[:, None] - u).sum(2)
    nearest, picks = np.full(12, 1e3), []
    for _ in range(4):
        costs = np.minimum(distance, nearest).sum(1)
        costs[picks] = np.inf
        picks.append(int(costs.argmin()))
        nearest = np.minimum(nearest, distance[picks[-1]])
    return picks


def colm(**options: Any) -> list[int]:
    return fc.CoLM(4, top=6, **options).select(GRADIENTS).indices.tolist()


def by_first_update(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> list[int] | None:
    """At step 1, without a history, the update is g / (|g| + eps), whatever the betas."""
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and 0 < eps <= 1e100):
        return None
    u = GRADIENTS.abs() + eps
    return fc.facility_location(GRADIENTS / u / (GRADIENTS / u).abs().max(), 4, metric="l1").indices.tolist()


def dense(**options: Any) -> tuple[float, float]:
    state = fc.RankOneAdamState(numel=40, **{"mean": 0.5, "mean_square": 0.5} | options).dense(torch.float64)
    z = fc.LowRankGradients(torch.ones(1, 1, dtype=torch.float64), 0, 40).directions()[0]
    return float((state.m / z.double()).median()), float((state.v / z.double() ** 2).median())


# --- the rest ---------------------------------------------------------------------------------------


def zeroth(eps: Any, dtype: torch.dtype, at: float) -> list[float]:
    """Coefficients of a linear loss, whose derivatives are the numbers of the direction."""
    weight = torch.full((3,), at, dtype=dtype, requires_grad=True)
    return fc.zeroth_order_gradients(lambda: weight * 1, [weight], eps=eps).coefficients[:, 0].tolist()


def slopes(eps: float, dtype: torch.dtype, at: float) -> list[float] | None:
    limits = torch.finfo(dtype)
    if not limits.tiny <= eps <= limits.max / 8 or (at and eps < 1e-20):
        return None
    one = torch.ones(1, 1, dtype=dtype)
    return fc.LowRankGradients(one, 0, 3).directions()[0].tolist()


def goracs(**options: Any) -> tuple[list[int], float]:
    found = fc.goracs(X, X[:5] + 0.1, np.linspace(0.1, 1, 14), 4, max_exchanges=0, **options)
    return found.indices.tolist(), found.info["score"]


def by_lam(lam: float, solver: str) -> tuple[list[int], float] | None:
    """If lam is nothing beside the distances, or the distances nothing beside lam (2^40: some of their digits are left)."""
    if lam < 0:
        return None
    if lam < 1e-20:
        return goracs(lam=0, solver=solver)
    return goracs(lam=2.0**40 if lam > 1e10 else lam, solver=solver)


def dropped(ratio: Any) -> int:
    return fc.ccs(SCORES, 1, mislabel_scores=SCORES, mislabel_ratio=ratio).info["dropped"]


def stopped(threshold: Any) -> list[int]:
    return fc.simcore(X, X[:4], 12, stop_threshold=threshold, patience=2).indices.tolist()


def by_threshold(threshold: float) -> list[int] | None:
    """Similarities are positive: no round is below nothing, and the third is below anything large."""
    if threshold < 0:
        return None
    if threshold < 0.5:
        return fc.simcore(X, X[:4], 12, stop=False).indices.tolist()
    rounds = fc.simcore(X, X[:4], 12, stop=False).info
    values, counts = rounds["values"], rounds["counts"]
    kept = next((i for i in range(2, len(values)) if values[i] < values[1] * threshold), len(values))
    return fc.simcore(X, X[:4], 12, stop=False).indices[: sum(counts[:kept])].tolist()


ARGUMENTS: dict[str, Argument] = {
    **{
        f"epsilon, {b}": Argument("epsilon", lambda v, b=b: located(b, method="stochastic", epsilon=v), by_epsilon)
        for b in ("cpu", "torch")
    },
    **{
        f"offset, {b}, {d}": Argument("offset", with_offset(b, d), lambda v, d=d: exact_greedy(v, d))
        for b in ("cpu", "torch")
        for d in (torch.float32, torch.float64)
    },
    **{
        f"ridge, {b}": Argument("ridge", lambda v, b=b: matched(v, b), pursued, 1e-9) for b in ("cpu", "torch")
    },
    "betas[0]": Argument("betas[0]", lambda v: normalized((v, 0.999)), lambda v: by_update((v, 0.999))),
    "betas[1]": Argument("betas[1]", lambda v: normalized((0.9, v)), lambda v: by_update((0.9, v))),
    **{
        f"eps of AdamState, {b}": Argument("eps", lambda v, b=b: normalized(eps=v, backend=b), lambda v: by_update(eps=v))
        for b in ("cpu", "torch")
    },
    "betas[0] of CoLM": Argument("betas[0]", lambda v: colm(betas=(v, 0.999)), lambda v: by_first_update((v, 0.999))),
    "betas[1] of CoLM": Argument("betas[1]", lambda v: colm(betas=(0.9, v)), lambda v: by_first_update((0.9, v))),
    "eps of CoLM": Argument("eps", lambda v: colm(eps=v), lambda v: by_first_update(eps=v)),
    "mean": Argument("mean", lambda v: dense(mean=v), lambda v: None if abs(v) > 2e307 else (v, 0.5), 1e-14),
    "mean_square": Argument(
        "mean_square", lambda v: dense(mean_square=v), lambda v: None if not 0 <= v < 2e306 else (0.5, v), 1e-14
    ),
    "eps of RankOneAdamState": Argument(
        "eps", lambda v: fc.RankOneAdamState(numel=9, eps=v).eps, lambda v: v if 0 < v <= 1e100 else None
    ),
    **{
        f"eps of zeroth_order_gradients, {d}, at {at}": Argument(
            "eps", lambda v, d=d, at=at: zeroth(v, d, at), lambda v, d=d, at=at: slopes(v, d, at), 1e-6
        )
        for d in (torch.float32, torch.float64)
        for at in (0.0, 1e-3)
    },
    **{
        f"lam, {s}": Argument("lam", lambda v, s=s: goracs(lam=v, solver=s), lambda v, s=s: by_lam(v, s), 1e-3) for s in ("exact", "sinkhorn")
    },
    "mislabel_ratio": Argument(
        "mislabel_ratio", dropped, lambda v: math.floor(Fraction(v) * 14) if 0 <= v < 1 else None
    ),
    "stop_threshold": Argument("stop_threshold", stopped, by_threshold),
}  # fmt: skip


@pytest.mark.parametrize("value", WRONG_TYPES)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_other_types_are_refused(argument: str, value: str) -> None:
    one = ARGUMENTS[argument]
    with pytest.raises(TypeError, match=rf"^{re.escape(one.name)} must be a number, got "):
        one.call(WRONG_TYPES[value])


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_is_not_finite_is_refused(argument: str, value: str) -> None:
    one = ARGUMENTS[argument]
    with pytest.raises(
        ValueError, match=rf"^{re.escape(one.name)} must be (finite|in the range of a float), got"
    ):
        one.call(NOT_FINITE[value])


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_numbers_of_every_kind(argument: str) -> None:
    one = ARGUMENTS[argument]
    expected = one.call(0.25)
    for kind, value in QUARTERS.items():
        check(
            one.call(value), expected, 1e-12, f"{argument}: {kind}"
        )  # lstsq of the reference: its last bits


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_odd_numbers(argument: str, value: float) -> None:
    one = ARGUMENTS[argument]
    expected = one.expected(float(value))
    if expected is None:
        with pytest.raises(ValueError, match=re.escape(one.name)):
            one.call(value)
    else:
        check(one.call(value), expected, one.close, argument)


def check(found: Any, expected: Any, close: float, what: str) -> None:
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), what
        for a, b in zip(found, expected, strict=True):
            check(a, b, close, what)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=close, abs=0), what
    else:
        assert found == expected, what


@pytest.mark.parametrize("scale", [2.0**70, 1e30])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "l1"])
def test_an_offset_far_above_all_distances_on_a_device(
    metric: str, scale: float, emulated_cuda: None
) -> None:
    expected = fc.facility_location(X, 4, metric=metric, backend="torch").indices
    found = fc.facility_location(on_device(X), 4, metric=metric, offset=scale, backend="cuda")
    assert found.indices.tolist() == expected.tolist()


def test_the_overflow_of_an_offset_is_named() -> None:
    x = X.double()
    for options in ({}, {"clients": x[:5]}, {"clients": x[:5], "groups": [0, 1] * 7}):
        with pytest.raises(
            ValueError, match=r"the objective, inf, overflows torch.float64; .* lower offset, 1e\+308"
        ):
            fc.facility_location(x, 4, metric="l1", offset=1e308, **options)
