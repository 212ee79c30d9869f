"""Numbers at the ends of their types: denormal ones, squares that overflow or come to 0, magnitudes that differ by hundreds of
decades, on every backend.

Each result is the right one, computed here in NumPy's long double (whose exponents reach 4932), in fractions or from the same data
near 1, or it is refused by name.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE, DISTANCES, POINT_METRICS, points
from torch import Tensor

import flashcoreset as fc
from flashcoreset.pursuit import frank_wolfe, orthogonal_matching_pursuit

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Triton's interpreter computes in NumPy, which warns where a device does not.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.skipif(
        np.finfo(np.longdouble).maxexp <= 1024, reason="the oracle needs exponents beyond those of float64"
    ),
]

Long = np.ndarray  # of np.longdouble

# Powers of two that data near 1 is brought to: denormal, squares that come to 0, ordinary, squares that overflow, the end.
EXPONENTS = {
    torch.float16: (-22, 14),
    torch.bfloat16: (-130, 120),
    torch.float32: (-146, -100, -70, 0, 63, 118, 125),
    torch.float64: (-1071, -700, -540, -410, 0, 505, 513, 1000, 1021),
}
SCALES = [(dtype, e) for dtype, exponents in EXPONENTS.items() for e in exponents]
LONG_SCALES = [(dtype, e) for dtype, e in SCALES if dtype in (torch.float32, torch.float64)]


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture(params=["torch", "cpu", "cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name = request.param
    if name == "cuda":
        request.getfixturevalue("emulated_cuda")
    if name == "triton" and platform.machine() != "x86_64":
        pytest.skip("triton is published for x86-64 alone")
    return name


def on(backend: str, x: Tensor) -> Tensor:
    interpreted = backend == "triton" and DEVICE == "cpu"
    if interpreted and x.dtype == torch.bfloat16 and ((x != 0) & (x.abs() < 1e-37)).any():
        pytest.skip("Triton's interpreter reads denormal bfloat16 numbers wrongly, which no device does")
    return x.to(DEVICE) if backend in ("cuda", "triton") else x


def times_power(x: Tensor, exponent: int | np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """x * 2^exponent, rounded to `dtype`."""
    scaled = np.ldexp(x.double().numpy().astype(np.longdouble), exponent)
    return (torch.from_numpy(scaled.astype(np.float64))).to(dtype or x.dtype)


def long(x: Tensor) -> Long:
    return x.double().cpu().numpy().astype(np.longdouble)


def tolerance(dtype: torch.dtype) -> float:
    """The tolerance for sums of some dozen numbers, with rounding to the results' type."""
    return 1e-13 if dtype == torch.float64 else 3e-6


# ---- facility location


def distances(a: Long, b: Long, metric: str) -> Long:
    """Similarities or distances in long double."""
    if metric in ("cosine", "dot"):
        if metric == "cosine":
            a, b = (
                np.divide(v, norm, out=np.zeros_like(v), where=norm > 0)
                for v in (a, b)
                for norm in [np.sqrt((v * v).sum(1, keepdims=True))]
            )
        return a @ b.T
    difference = np.abs(a[:, None] - b[None])
    if metric == "l1":
        return difference.sum(2)
    squares = (difference * difference).sum(2)
    return np.sqrt(squares) if metric == "euclidean" else squares


def check_greedy(s: Long, found: fc.Selection, share: float, least: float) -> None:
    """Each pick is the best but for a `share` of f, and gains, weights and objective are those of the picks.

    `least`: below it numbers of the results' type are rounded to its steps."""
    best = np.zeros(s.shape[1], dtype=np.longdouble)
    whole = np.maximum(s, 0).max(0).sum()
    for pick, gain in zip(found.indices.tolist(), found.gains.tolist(), strict=True):
        gains = np.maximum(s - best, 0).sum(1)
        assert gains[pick] >= gains.max() - share * whole
        assert abs(gain - gains[pick]) <= share * whole + least
        best = np.maximum(best, s[pick])
    assert abs(found.objective - best.sum()) <= share * whole + least
    assert float(found.weights.sum()) == int((found.assignment >= 0).sum())


def check_facility_location(
    run: Callable[[], fc.Selection], x: Long, metric: str, dtype: torch.dtype, share: float, rounds: bool
) -> None:
    """Right, or refused if a bound of the gains is not a number of `dtype`; `rounds`: gains that are too small for it are
    rounded instead."""
    limit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    values = distances(x, x, metric)
    most = np.abs(values).max() * len(x)
    try:
        found = run()
    except ValueError as error:
        told = re.search(r"^[xg]: .*(overflow|underflow).*; scale", str(error))
        if not told:
            raise
        # Offsets are bounds: twice the largest distance, four times its square.
        if told[1] == "overflow":
            assert (
                max(most * 8, np.abs(x).max() * len(x)) > limit.max
            )  # or sums of rows, which choose dimensions
        else:
            assert not rounds
            assert most / len(x) ** 2 < limit.tiny
        return
    s = values
    if metric in DISTANCES:
        assert found.offset is not None
        largest = values.max()
        if rounds and largest < limit.smallest_normal:
            s = 2 * largest - values  # the offset has few digits then
        else:
            assert largest * (1 - share) <= found.offset <= 9 * largest
            s = np.longdouble(found.offset) - values
    check_greedy(s, found, share, 2 * float(limit.tiny))


@pytest.mark.parametrize(("dtype", "exponent"), SCALES, ids=name_of)
@pytest.mark.parametrize("metric", POINT_METRICS)
def test_facility_location(backend: str, metric: str, dtype: torch.dtype, exponent: int) -> None:
    x = times_power(points(16, 5, 1) + 0.2, exponent, dtype)
    check_facility_location(
        lambda: fc.facility_location(on(backend, x), 6, metric=metric, backend=backend),
        long(x), metric, dtype, tolerance(dtype), rounds=False,
    )  # fmt: skip


@pytest.mark.parametrize("metric", POINT_METRICS)
@pytest.mark.parametrize("exponent", [-600, 0, 900])
def test_facility_location_with_the_other_arguments(backend: str, metric: str, exponent: int) -> None:
    """Clients, weights, groups, preselected candidates and an offset go through the scaling: the result is that of the same data
    near 1, but for the power of two."""
    x, clients = points(30, 4, 2) + 0.1, points(17, 4, 3)
    weights, groups = torch.rand(17, dtype=torch.float64), torch.arange(30) % 3
    power = {"cosine": 0, "dot": 2, "sqeuclidean": 2}.get(metric, 1) * exponent
    offset = {"offset": 100.0} if metric in DISTANCES else {}
    for options in ({}, {"groups": groups, "preselected": torch.tensor([4, 8])}, offset):
        arguments = {"clients": clients, "weights": weights, "metric": metric, **options}
        near = fc.facility_location(x, 6, backend="torch", **arguments)
        scaled: dict[str, Any] = {**arguments, "clients": on(backend, times_power(clients, exponent))}
        for name in {"weights", "groups", "preselected"} & scaled.keys():
            scaled[name] = on(backend, scaled[name])
        if "offset" in scaled:
            try:
                scaled["offset"] = math.ldexp(100.0, power)
            except OverflowError:
                continue
            if scaled["offset"] < 1e-300:
                continue

        def run(scaled: dict[str, Any] = scaled) -> fc.Selection:
            return fc.facility_location(on(backend, times_power(x, exponent)), 6, backend=backend, **scaled)

        if abs(power) > 1000:
            with pytest.raises(ValueError, match=r"^x: .*(overflow|underflow)"):
                run()
            continue
        far = run()
        assert far.indices.tolist() == near.indices.tolist()
        assert far.assignment.tolist() == near.assignment.tolist()
        torch.testing.assert_close(far.weights.cpu(), near.weights, rtol=1e-12, atol=0)
        torch.testing.assert_close(times_power(far.gains.cpu(), -power), near.gains, rtol=1e-12, atol=1e-12)
        assert math.ldexp(far.objective, -power) == pytest.approx(near.objective, rel=1e-12)
        if near.offset is not None:
            assert math.ldexp(far.offset, -power) == pytest.approx(near.offset, rel=1e-12)


def test_an_offset_far_above_tiny_distances(backend: str) -> None:
    """The picks do not depend on it; one that no power of two brings into range beside the distances is refused."""
    x = points(20, 3, 4)
    near = fc.facility_location(x, 5, metric="euclidean", backend="torch")
    far = fc.facility_location(
        on(backend, times_power(x, -600)), 5, metric="euclidean", offset=1.0, backend=backend
    )
    assert far.indices.tolist() == near.indices.tolist()
    assert far.objective == 20
    with pytest.raises(ValueError, match=r"^offset: 1e\+300 is too far from all distances"):
        fc.facility_location(
            on(backend, times_power(x, -1000)), 5, metric="euclidean", offset=1e300, backend=backend
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_cosines_of_rows_of_all_magnitudes(backend: str, dtype: torch.dtype) -> None:
    most = 120 if dtype == torch.float32 else 1000
    x = times_power(points(24, 5, 5), np.linspace(-most, most, 24).astype(int)[:, None], dtype)
    check_facility_location(
        lambda: fc.facility_location(on(backend, x), 6, metric="cosine", backend=backend),
        long(x), "cosine", dtype, tolerance(dtype), rounds=False,
    )  # fmt: skip


@pytest.mark.parametrize("metric", ["dot", "euclidean", "l1"])
@pytest.mark.parametrize("low", [-1000, -300])
def test_tiny_rows_among_huge_ones(backend: str, metric: str, low: int) -> None:
    """Half of the rows are 2^low, the others 2^400 or, if squares leave the range, 2^600."""
    for high in (400, 600) if metric != "dot" else (400,):
        x = times_power(points(24, 5, 6), np.where(np.arange(24) % 2, low, high)[:, None])
        check_facility_location(
            lambda x=x: fc.facility_location(on(backend, x), 6, metric=metric, backend=backend),
            long(x), metric, torch.float64, 1e-13, rounds=False,
        )  # fmt: skip


# ---- gradients


@pytest.mark.parametrize(("dtype", "exponent"), LONG_SCALES, ids=name_of)
@pytest.mark.parametrize("metric", POINT_METRICS)
def test_medoids_of_gradients(backend: str, metric: str, dtype: torch.dtype, exponent: int) -> None:
    g = times_power(points(16, 5, 7) + 0.2, exponent, dtype)
    for top in (None, 5):
        check_facility_location(
            lambda top=top: fc.match_gradients(on(backend, g), 5, metric=metric, top=top, backend=backend),
            long(g), metric, dtype, tolerance(dtype), rounds=True,
        )  # fmt: skip


def greedy_fit(
    g: np.ndarray, b: np.ndarray, k: int, nonnegative: bool, ridge: float
) -> tuple[list[int], Any]:
    """Orthogonal matching pursuit with SciPy's solvers, of numbers near 1."""
    from scipy.optimize import nnls

    picks: list[int] = []
    weights = np.zeros(0)
    for _ in range(k):
        rest = g @ (b - g[picks].T @ weights)
        score = rest if nonnegative else np.abs(rest)
        score[picks] = -np.inf
        picks.append(int(score.argmax()))
        matrix = np.concatenate([g[picks].T, math.sqrt(ridge) * np.eye(len(picks))])
        right = np.concatenate([b, np.zeros(len(picks))])
        weights = nnls(matrix, right)[0] if nonnegative else np.linalg.lstsq(matrix, right, rcond=None)[0]
    return picks, weights


PURSUITS = [(True, 0.0), (False, 0.0), (True, 0.5)]


@pytest.mark.parametrize(("dtype", "exponent"), LONG_SCALES, ids=name_of)
def test_orthogonal_matching_pursuit(backend: str, dtype: torch.dtype, exponent: int) -> None:
    g = times_power(points(16, 9, 8) + 0.5, exponent, dtype)
    near = times_power(g, -exponent, torch.float64).numpy()
    if exponent > 1018:
        with pytest.raises(ValueError, match=r"^g: the sum of its rows overflows torch.float64; scale"):
            fc.match_gradients(on(backend, g), 4, method="omp", backend=backend)
        return
    # Steps of numbers of this type.
    step = math.ldexp(1.0, (-1074 if dtype == torch.float64 else -149) - exponent) if exponent < 0 else 0.0
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    for nonnegative, share in PURSUITS:
        if share and abs(exponent) > 500:
            continue  # no such ridge
        picks, weights = greedy_fit(near, near.sum(0), 4, nonnegative, share)
        found = fc.match_gradients(
            on(backend, g), 4, method="omp", nonnegative=nonnegative,
            ridge=math.ldexp(share, 2 * exponent) if share else 0.0, backend=backend,
        )  # fmt: skip
        kept = weights != 0
        assert found.indices.tolist() == np.array(picks)[kept].tolist()
        np.testing.assert_allclose(found.weights.cpu().numpy(), weights[kept], rtol=rtol)
        left = np.linalg.norm(near.sum(0) - near[picks].T @ weights)
        np.testing.assert_allclose(np.ldexp(-found.objective, -exponent), left, rtol=rtol, atol=step)


@pytest.mark.parametrize("of_rows", [-1000, -420, 0, 470, 900])
@pytest.mark.parametrize("of_target", [-1000, -420, 0, 470, 900])
def test_a_target_of_another_magnitude(backend: str, of_rows: int, of_target: int) -> None:
    near = points(16, 9, 8) + 0.5
    g, target = times_power(near, of_rows), times_power(near.sum(0), of_target)
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        expected = solve(near, near.sum(0), 4, backend="torch")
        if of_target - of_rows > 1000:
            with pytest.raises(ValueError, match=r"^weights of up to .* overflow torch.float64; scale g up"):
                solve(on(backend, g), on(backend, target), 4, backend=backend)
            continue
        found = solve(on(backend, g), on(backend, target), 4, backend=backend)
        if of_target - of_rows < -1100:
            assert found.indices.tolist() == []  # all weights round to 0
            continue
        assert found.indices.tolist() == expected.indices.tolist()
        if of_target - of_rows > -1000:
            weights = times_power(found.weights.cpu(), of_rows - of_target)
            torch.testing.assert_close(weights, expected.weights, rtol=1e-9, atol=0)
        norms = times_power(found.residual_norms.cpu(), -of_target)
        torch.testing.assert_close(norms, expected.residual_norms, rtol=1e-9, atol=0)


def test_a_ridge_that_leaves_no_weights(backend: str) -> None:
    g = on(backend, times_power(points(5, 3, 1), -600))
    with pytest.raises(ValueError, match=r"^ridge: 1.0 is so far above the squares of g that no weights"):
        orthogonal_matching_pursuit(g, g.sum(0), 2, ridge=1.0, backend=backend)


def geodesics(units: Long, goal: Long, k: int) -> tuple[list[int], Long]:
    """Frank-Wolfe on the sphere: the picks, and the weights of unit rows whose sum is as long as its projection on the goal."""
    weights, y = np.zeros(len(units), dtype=np.longdouble), np.zeros_like(goal)
    picks: list[int] = []
    for _ in range(k):
        along, towards = units @ y, goal @ y
        square = 1 - along**2
        score = np.where(
            square > 1e-8, (units @ goal - towards * along) / np.sqrt(np.maximum(square, 1e-8)), -1
        )
        j = int(score.argmax())
        ahead, behind = (units[j] @ goal) - towards * along[j], towards - (units[j] @ goal) * along[j]
        part = ahead / (ahead + behind) if picks else np.longdouble(1)
        y, weights = (1 - part) * y + part * units[j], (1 - part) * weights
        weights[j] += part
        norm = np.sqrt(y @ y)
        y, weights = y / norm, weights / norm
        if j not in picks:
            picks.append(j)
    return picks, weights[picks] * (y @ goal)


@pytest.mark.parametrize(("dtype", "exponent"), LONG_SCALES, ids=name_of)
@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
def test_frank_wolfe(backend: str, mixed: bool, dtype: torch.dtype, exponent: int) -> None:
    """`mixed`: rows of all magnitudes, each a direction like the others."""
    room = (110 if dtype == torch.float32 else 1000) if mixed and exponent == 0 else 0
    by = exponent + np.linspace(-room, room, 16).astype(int)[:, None]
    g = times_power(points(16, 9, 9) + 0.5, by, dtype)
    target = times_power(points(16, 9, 9).sum(0) + 8, min(exponent, 1018) if dtype == torch.float64 else 0)
    rows, b = long(g), long(target)
    lengths, length = np.sqrt((rows * rows).sum(1)), np.sqrt(b @ b)
    picks, weights = geodesics(rows / lengths[:, None], b / length, 4)
    weights = weights * (length / lengths[picks])
    found = None
    try:
        found = frank_wolfe(on(backend, g), on(backend, target), 4, backend=backend)
    except ValueError as error:
        if "weights of up to" not in str(error) or weights.max() <= torch.finfo(dtype).max:
            raise
    if found is not None:
        assert found.indices.tolist() == picks
        expected = weights.astype(np.float64)
        rtol = 1e-9 if dtype == torch.float64 else 1e-5
        np.testing.assert_allclose(
            found.weights.double().cpu().numpy(), expected, rtol=rtol, atol=float(torch.finfo(dtype).tiny)
        )


def worst_sum(x: Tensor, found: fc.Selection, column: int) -> float:
    """By how much the weighted sum of a column is off, as a share of the sum of magnitudes; exact."""
    values = [Fraction(v) for v in x[:, column].tolist()]
    weighted = sum(
        Fraction(w) * values[i] for w, i in zip(found.weights.tolist(), found.indices.tolist(), strict=True)
    )
    return float(abs(weighted - sum(values)) / sum(abs(v) for v in values))


@pytest.mark.parametrize(("dtype", "exponent"), SCALES, ids=name_of)
def test_caratheodory(backend: str, dtype: torch.dtype, exponent: int) -> None:
    x = times_power(points(40, 3, 10) + 0.3, exponent, dtype)
    found = fc.caratheodory(on(backend, x), backend=backend)
    assert len(found.indices) <= 4
    assert float(found.weights.double().sum()) == pytest.approx(40, rel=tolerance(dtype))
    # Denormal rows less their mean have few digits.
    least = 2e-2 if exponent <= -1071 else 1e-6 if exponent <= -1022 else tolerance(dtype)
    for column in range(3):
        assert worst_sum(x, found, column) <= least


@pytest.mark.parametrize("ends", [(-1000, 1000), (-900, 0), (0, 990), (-1000, 960)])
def test_columns_of_all_magnitudes(backend: str, ends: tuple[int, int]) -> None:
    x = times_power(points(40, 3, 11) + 0.3, np.array([ends[0], 0, ends[1]]))
    found = fc.caratheodory(on(backend, x), backend=backend)
    assert len(found.indices) == 4
    for column in range(3):
        assert worst_sum(x, found, column) <= 1e-14


def test_updates_of_adam(backend: str) -> None:
    """u = m / (sqrt(v) + eps), for gradients whose squares come to 0; squares that overflow are refused, as Adam's history
    is."""
    for exponent in (-1070, -700, -500, 0, 300):
        near = points(12, 6, 12)
        g = times_power(near, exponent)
        state = fc.AdamState(
            on(backend, torch.zeros(6, dtype=torch.float64)),
            on(backend, torch.zeros(6, dtype=torch.float64)),
            1,
        )
        rows = long(g)
        first, second = np.longdouble(1) - np.longdouble(0.9), np.longdouble(1) - np.longdouble(0.999)
        u = rows * first / first / (np.sqrt(second * rows * rows / second) + np.longdouble(1e-8))
        check_facility_location(
            lambda g=g, state=state: fc.match_gradients(on(backend, g), 4, normalize=state, backend=backend),
            u, "l1", torch.float64, 1e-12, rounds=True,
        )  # fmt: skip
    huge = on(backend, times_power(points(12, 6, 12), 514))
    with pytest.raises(ValueError, match=r"^g: the squares of entries of up to .* overflow float64"):
        fc.match_gradients(huge, 4, normalize=state, backend=backend)


# ---- sketches and scores


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt", "srht", "gaussian-boxmuller"])
@pytest.mark.parametrize(("dtype", "exponent"), SCALES, ids=name_of)
def test_sketch(backend: str, kind: str, dtype: torch.dtype, exponent: int) -> None:
    x = times_power(points(5, 70, 13).clamp(-1.9, 1.9), exponent, dtype)
    matrix = fc.projection_matrix(70, 12, kind=kind, dtype=torch.float64, backend="torch")
    expected = long(x) @ long(matrix)
    limit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    sums = (np.abs(long(x)) @ np.abs(np.sign(long(matrix)))).max()
    try:
        found = fc.sketch(on(backend, x), 12, kind=kind, backend=backend)
    except ValueError as error:
        if not str(error).startswith("x: sums of its rows go beyond the range of") or sums <= limit.max:
            raise
        return
    error = np.abs(long(found) - expected).max()
    # Terms are added first and scaled in the end: sums of denormal numbers are exact.
    assert (
        error <= 16 * limit.eps * np.abs(long(x)).sum(1).max() + 16 * float(limit.smallest_normal) * limit.eps
    )


LOGITS = [
    [1e30, 0, -1e30, 5],
    [1e30, 1e30, -1e30, 0],
    [1e-40, 2e-40, 0, -1e-40],
    [1e38, -1e38, 3e38, 0],
    [-3e38, -3e38, -3e38, -3e38],
    [80, 0, 0, 0],
    [0, 0, 0, -200],
    [1e-30, 1e-30, 1e-30, 1e-30],
]
LOGITS_OF = {
    torch.float16: [[65504, -65504, 0, 1], [6e-8, 0, 0, 1e-7], [-65504, -65504, 65504, 65504]],
    torch.bfloat16: [row for row in LOGITS if 1e-40 not in row],
    torch.float32: LOGITS,
    torch.float64: [*LOGITS, [1e300, 0, -1e308, 1.7e308], [-1.7e308, 1.7e308, 0, 0], [5e-324, 0, 0, 1e-310]],
}


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", LOGITS_OF, ids=name_of)
def test_sample_scores(backend: str, dtype: torch.dtype) -> None:
    """Losses to their own precision, probabilities to that of 1."""
    x = torch.tensor(LOGITS_OF[dtype], dtype=dtype)
    z = long(x)
    shifted = z - z.max(1, keepdims=True)
    exps = np.exp(shifted)
    p = exps / exps.sum(1, keepdims=True)
    rows, limit = np.arange(len(z)), torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    for target in range(4):
        found = fc.sample_scores(on(backend, x), on(backend, torch.full((len(z),), target)), backend=backend)
        loss = np.log(exps.sum(1)) - shifted[:, target]
        others = np.delete(p, target, 1)
        margin = p[:, target] - others.max(1)
        hot = np.zeros_like(p)
        hot[:, target] = 1
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(p > 0, p * np.log(p), 0).sum(1)
        expected = {"entropy": entropy, "margin": margin, "el2n": np.sqrt(((p - hot) ** 2).sum(1))}
        got_loss = long(found.loss)
        fits = loss <= limit.max
        assert (np.abs(got_loss - loss)[fits] <= 8 * limit.eps * np.maximum(loss, 1)[fits]).all()
        assert (got_loss[~fits] == np.inf).all()
        for name, values in expected.items():
            assert (np.abs(long(getattr(found, name)) - values) <= 16 * limit.eps).all(), name
        largest = z[rows, target] == z.max(1)
        assert not (found.correct.cpu().numpy() & ~largest).any()


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_logits_are_refused(backend: str, value: float) -> None:
    x = on(backend, torch.tensor([[0.0, 1.0], [value, 0.0]]))
    with pytest.raises(ValueError, match=r"^logits must be finite, got .* at sample 1, class 0"):
        fc.sample_scores(x, on(backend, torch.tensor([0, 0])), backend=backend)


@pytest.mark.parametrize("exponent", [-1040, -700, 0, 900, 1020])
def test_strata_and_top_scores(exponent: int) -> None:
    near = points(300, 1, 14)[:, 0].clamp(-1.9, 1.9)
    scores = times_power(near, exponent)
    exact = [Fraction(v) for v in scores.tolist()]
    order = sorted(range(300), key=lambda i: (-exact[i], i))
    assert fc.top_scores(scores, 9).indices.tolist() == order[:9]
    found = fc.ccs(scores, 40, n_strata=8, mislabel_ratio=0)
    low, high = min(exact), max(exact)
    places = [min(int((v - low) * 8 / (high - low)), 7) for v in exact]
    assert found.info["sizes"] == [places.count(stratum) for stratum in range(8)]
    assert sum(found.info["counts"]) == 40


def test_scores_from_one_end_to_the_other() -> None:
    scores = torch.tensor(
        [-1.7e308, -1e308, -5e-324, 0.0, 5e-324, 1e-300, 1e308, 1.7e308], dtype=torch.float64
    )
    assert fc.top_scores(scores, 8).indices.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert fc.ccs(scores, 8, n_strata=4).info["sizes"] == [2, 0, 4, 2]  # -5e-324 + 1.7e308 rounds


@pytest.mark.parametrize("exponent", [-1040, -540, 520, 1000])
def test_dynamics(exponent: int) -> None:
    """Logits that are far apart are certain, those that are nearly equal undecided."""
    logits = times_power(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64), exponent)
    dynamics = fc.TrainingDynamics(2)
    for epoch in range(3):
        dynamics.update([0, 1], logits, [0, 0], epoch)
    sure = exponent > 0
    scores = dynamics.scores()
    assert scores["aum"].tolist() == pytest.approx([3.0, -3.0] if sure else [0.0, 0.0], abs=1e-15)
    assert scores["el2n"].tolist() == pytest.approx([0.0, 3 * 2**0.5] if sure else [3 * 0.5**0.5] * 2)
    assert scores["correctness"].tolist() == [3.0, 0.0]


# ---- methods


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(dtype, e) for dtype, e in LONG_SCALES if e not in (-1071, -410, -146, -70, 513, 1021, 125)],
    ids=name_of,
)
def test_methods_by_shares_and_cosines(backend: str, dtype: torch.dtype, exponent: int) -> None:
    """GORACS divides by the largest distance, SimCore by each row's norm: a power of two changes nothing."""
    train, valid = (times_power(points(30, 4, seed), exponent, dtype) for seed in (15, 16))
    near = [times_power(x, -exponent) for x in (train, valid)]
    norms = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(17))

    def picks(x: Tensor, y: Tensor, name: str) -> list[list[int]]:
        x, y = on(name, x), on(name, y)
        chosen = fc.goracs(x, y, on(name, norms), 5, lam=0.3, backend=name, max_exchanges=3)
        found = [chosen.indices.tolist()]
        if name in ("cpu", "torch"):
            found.append(fc.simcore(x, y, 8, n_clusters=3, backend=name).indices.tolist())
        return found

    assert picks(train, valid, backend) == picks(*near, backend)


@pytest.mark.parametrize("largest", [5e-324, 1e-300, 1e300, 1.7e308])
def test_gradient_norms_at_the_ends(largest: float) -> None:
    train, valid = points(30, 4, 15), points(10, 4, 16)
    norms = torch.zeros(30, dtype=torch.float64)
    norms[::2] = 1
    expected = fc.goracs(train, valid, norms, 5, lam=7.0, max_exchanges=3)
    assert torch.equal(
        fc.goracs(train, valid, norms * largest, 5, lam=7.0, max_exchanges=3).indices, expected.indices
    )


@pytest.mark.parametrize(
    ("dtype", "exponent"), [(torch.float32, e) for e in (-126, -60, 60, 110)] + [(torch.float64, e) for e in (-1022, -540, 540, 1000)], ids=name_of
)  # fmt: skip
def test_zeroth_order_gradients(dtype: torch.dtype, exponent: int) -> None:
    """For a linear loss A w the coefficients are A z; parameters come back to the bit."""
    a = times_power(points(4, 5, 18), exponent, dtype)
    w = torch.zeros(5, dtype=dtype)
    g = fc.zeroth_order_gradients(lambda: a @ w, [w], eps=2.0**-10, seed=3)
    z = fc.LowRankGradients(torch.ones(1, 1, dtype=torch.float64), g.seed, 5).dense()[0]
    expected = times_power(a, -exponent, torch.float64) @ z
    found = times_power(g.coefficients[:, 0], -exponent, torch.float64)
    # Losses of 2^-10 times the smallest normal number have 10 digits fewer.
    least = 2e-2 if exponent in (-126, -1022) else 1e-5
    torch.testing.assert_close(found, expected, rtol=least, atol=least)
    assert torch.equal(w, torch.zeros(5, dtype=dtype))


def test_losses_that_overflow_are_refused() -> None:
    w = torch.zeros(5)
    a = torch.full((2, 5), 3e38)
    with pytest.raises(ValueError, match=r"^loss_fn must return finite losses"):
        fc.zeroth_order_gradients(lambda: a @ (w * 1e4), [w], eps=1.0)


@pytest.mark.parametrize("method", ["omp", "frank_wolfe"])
def test_a_residual_beyond_its_type_is_refused(backend: str, method: str) -> None:
    # The target's norm is 3e38 sqrt(8), beyond float32; weights are 1.
    with pytest.raises(ValueError, match=r"overflow torch\.float32; scale"):
        fc.match_gradients(on(backend, torch.eye(10) * 3e38), 2, method=method, backend=backend)
    fc.match_gradients(on(backend, torch.eye(10) * 1e38), 2, method=method, backend=backend)


def test_distances_beyond_their_type_are_refused_under_small_weights(backend: str) -> None:
    # Squared distances of 1e308 and more: the objective fits, but not an offset above them.
    x = points(6, 3, 1) * 1e154
    with pytest.raises(ValueError, match=r"x: distances of metric 'sqeuclidean' overflow torch\.float64"):
        fc.facility_location(
            on(backend, x), 2, metric="sqeuclidean", weights=torch.full((6,), 1e-5), backend=backend
        )


def test_a_transport_whose_mass_overflows_is_refused(backend: str) -> None:
    # reg * sum a * sum b is 1e318, though the plan has a mass of 1e160.
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    a = torch.tensor([3e159, 7e159], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not finite: .* scale the weights down"):
        fc.sinkhorn(on(backend, cost), a=on(backend, a), b=on(backend, a.flip(0)), reg=0.01, metric="precomputed",
                    tol=1e154, backend=backend)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "far", "metric"),
    [(torch.float32, 1e30, "euclidean"), (torch.float32, 1e9, "sqeuclidean"), (torch.float64, 1e200, "l1")],
)
def test_one_far_point_that_hides_all_others_is_refused(
    backend: str, dtype: torch.dtype, far: float, metric: str
) -> None:
    # Gains are whole numbers of units of the first one's 2^-61: those of the other points, of about 7, would be 0.
    x = points(24, 3, 0)
    x[5] = far
    with pytest.raises(ValueError, match=r"^x: gains of .* are lost beside distances whose sum is"):
        fc.facility_location(on(backend, x.to(dtype)), 4, metric=metric, backend=backend)
    x[5] = 1e3
    picks = fc.facility_location(on(backend, x.to(dtype)), 4, metric=metric, backend=backend).indices
    assert 5 in picks.tolist()


LOST: dict[str, dict[str, Any]] = {
    "distances": {"metric": "euclidean"},
    "clients": {"metric": "euclidean", "clients": 24},
    "weights": {"metric": "sqeuclidean", "weights": 24},
    "groups": {"metric": "l1", "groups": torch.arange(24) % 2},
    "preselected": {"metric": "euclidean", "preselected": torch.tensor([5, 9])},
    "stochastic": {"metric": "euclidean", "method": "stochastic"},
    "an offset": {"metric": "euclidean", "offset": 1e33},
    "dot": {"metric": "dot"},
    "similarities": {"metric": "precomputed"},
    "costs": {"metric": "precomputed_distance"},
}


@pytest.mark.parametrize("case", LOST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gains_that_are_lost_are_refused(backend: str, dtype: torch.dtype, case: str) -> None:
    """The same problems with a row that is far away, but not too far, have picks that float64 arithmetic has too."""
    options = dict(LOST[case])
    for far in (1e4, 1e17 if options["metric"] == "dot" else 1e30):
        if options["metric"] == "sqeuclidean":
            far = min(far, 1e17)
        x = points(24, 3, 0).abs() + 0.1
        x[5] = far
        given = {name: options[name] for name in ("clients", "weights") if name in options}
        if "clients" in given:
            given["clients"] = torch.cat([x[5:6], points(given["clients"], 3, 4).abs()])
        if "weights" in given:
            given["weights"] = torch.linspace(0.5, 1, 24, dtype=torch.float64)
        metric = options["metric"]
        if metric == "precomputed":
            x = torch.rand(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            x[5, 5] = far
        elif metric == "dot":
            x[:, 0], x[5] = 0, torch.tensor([far, 0, 0])
        elif metric == "precomputed_distance":
            x = torch.cdist(x, x)
        arguments = {**options, **given}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                kept = value.to(dtype) if name == "clients" else value
                arguments[name] = on(backend, kept)

        def run(x: torch.Tensor = x, arguments: dict[str, Any] = arguments) -> fc.Selection:
            return fc.facility_location(on(backend, x.to(dtype)), 6, backend=backend, **arguments)

        if far > 1e4:
            with pytest.raises(
                ValueError,
                match=r"^x: gains of .* are lost beside (distances|similarities) whose sum is up to",
            ):
                run()
            continue
        assert float(run().gains[1]) > 0


def test_gains_lost_beside_what_no_pick_brings(backend: str) -> None:
    """The large similarity belongs to a preselected row, to a row that no sample had, or to one client's weight."""
    lost = pytest.raises(ValueError, match=r"^x: gains of .* are lost beside similarities whose sum is up to")
    s = torch.diag(torch.tensor([1e20, 1.0, 2.0], dtype=torch.float64))
    with lost:
        fc.facility_location(
            on(backend, s),
            1,
            metric="precomputed",
            preselected=on(backend, torch.tensor([0])),
            backend=backend,
        )
    x = torch.eye(6, dtype=torch.float64)
    x[0] *= 1e10
    with lost:
        fc.facility_location(
            on(backend, x), 2, metric="dot", preselected=on(backend, torch.tensor([0])), backend=backend
        )
    x = torch.cat([torch.eye(6)[:5], torch.eye(6)[4:5]])
    weights = torch.tensor([1e25, 1, 1, 1, 1, 1], dtype=torch.float64)
    with lost:
        fc.facility_location(on(backend, x), 4, weights=on(backend, weights), backend=backend)
    large = torch.rand(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    large[0], large[0, 0] = 0, 1e20
    for seed in range(4):
        with lost:
            fc.facility_location(
                on(backend, large),
                5,
                metric="precomputed",
                method="stochastic",
                epsilon=0.5,
                seed=seed,
                backend=backend,
            )
    picks = fc.facility_location(
        on(backend, x), 4, weights=on(backend, weights.clamp(max=1e3)), backend=backend
    ).indices
    assert 4 in picks.tolist()


@pytest.mark.parametrize("exponent", [-960, -1000, -1010])
def test_near_ties_of_tiny_distances_of_l1(backend: str, exponent: int) -> None:
    """Gains that differ in their last digits only, which a unit that underflows cannot distinguish."""
    x = points(12, 2, 9)
    x[6:] = x[:6] * (1 + 2.0**-40)
    near = fc.facility_location(x, 6, metric="l1", backend="torch")
    for options in ({}, {"offset": math.ldexp(near.offset, exponent)}):
        found = fc.facility_location(
            on(backend, times_power(x, exponent)), 6, metric="l1", backend=backend, **options
        )
        assert found.indices.tolist() == near.indices.tolist()
        assert times_power(found.gains.cpu(), -exponent).tolist() == pytest.approx(
            near.gains.tolist(), rel=1e-9
        )
