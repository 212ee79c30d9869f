"""Matching pursuit and Frank-Wolfe against the definitions, SciPy and NumPy, on every backend, and mistakes of a caller."""

from __future__ import annotations

import importlib
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE
from checks.pursuit import (
    GOAL,
    G,
    check_bad_values,
    check_by_hand,
    check_ends,
    check_equal,
    check_frank_wolfe,
    check_half_types,
    check_interrupt,
    check_less_memory,
    check_match_gradients,
    check_memory,
    check_nearly_dependent,
    check_needs_the_cpu_module,
    check_opcheck_and_compile,
    check_overflow,
    check_pursuit,
    check_ties,
    check_views,
    check_weights_that_round_to_zero,
    make_rows,
    make_target,
    normal,
)
from conftest import BACKENDS, EVERY_BACKEND, GPU_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset.kernels import PursuitProblem
from flashcoreset.pursuit import frank_wolfe, orthogonal_matching_pursuit

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = [(1, 1), (7, 3), (7, 97), (40, 1), (97, 40), (130, 1025), (1025, 33)]


ON_GPU = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
pytestmark = pytest.mark.usefixtures("one_thread")


def module_of(backend: str) -> ModuleType:
    return importlib.import_module(f"flashcoreset.pursuit.{backend}")


# --- the definitions ------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize(
    "check",
    [
        check_by_hand,
        check_ends,
        check_half_types,
        check_overflow,
        check_views,
        check_weights_that_round_to_zero,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_holds(backend: str, check: Callable[[str, str], None]) -> None:
    check(backend, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "clustered"])
def test_is_the_definition(backend: str, kind: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    name = backend.partition("-")[0]
    k = max(1, size[1] // 2) if dtype == torch.float64 else 12
    check_pursuit(name, "cpu", kind, dtype, size, min(k, 20))
    if size[1] > 2:  # on a circle every geodesic is the same
        check_frank_wolfe(name, "cpu", kind, dtype, size, 12)


# Several blocks of rows and tiles of columns, and a part more; half types are converted.
FEW = [
    *((torch.float64, size) for size in [(1, 1), (7, 3), (70, 20), (30, 129), (19, 530)]),
    *((torch.float32, size) for size in [(1, 9), (70, 20), (19, 530)]),
    (torch.float16, (7, 30)),
    (torch.bfloat16, (7, 30)),
]


@ON_GPU
@pytest.mark.parametrize(("dtype", "size"), FEW, ids=str)
def test_is_the_definition_on_a_gpu(backend: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    check_pursuit(backend, DEVICE, "clustered", dtype, size, 5)
    if size[1] > 2:  # on a circle every geodesic is the same
        check_frank_wolfe(backend, DEVICE, "clustered", dtype, size, 5)


@ON_GPU
@pytest.mark.parametrize("kind", ["scaled", "repeated"])
def test_rows_of_all_magnitudes_duplicates_and_zeros_on_a_gpu(backend: str, kind: str) -> None:
    check_pursuit(backend, DEVICE, kind, torch.float64, (40, 20), 8)
    check_pursuit(backend, DEVICE, kind, torch.float32, (40, 20), 4)
    check_frank_wolfe(backend, DEVICE, kind, torch.float64, (40, 20), 5)


@ON_GPU
def test_as_many_picks_as_rows(backend: str) -> None:
    check_pursuit(backend, DEVICE, "normal", torch.float64, (8, 20), 8)


@ON_GPU
def test_memory_is_that_of_the_columns(backend: str) -> None:
    check_memory(module_of(backend), DEVICE)


@ON_GPU
def test_ctrl_c_is_handled_between_steps(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_interrupt(module_of(backend), DEVICE, monkeypatch)


@ON_GPU
def test_match_gradients(backend: str) -> None:
    check_match_gradients(backend, DEVICE)


@ON_GPU
def test_needs_the_cpu_module(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_needs_the_cpu_module(backend, DEVICE, monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)
@pytest.mark.parametrize("kind", ["scaled", "repeated"])
def test_rows_of_all_magnitudes_duplicates_and_zeros(backend: str, kind: str) -> None:
    check_pursuit("cpu", "cpu", kind, torch.float64, (97, 40), 30)
    check_pursuit("cpu", "cpu", kind, torch.float32, (97, 40), 30)
    check_frank_wolfe("cpu", "cpu", kind, torch.float64, (97, 40), 20)


def picks_by_lstsq(g: np.ndarray, target: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """As GradMatch has it: lstsq, and nnls if that gives a weight below 0."""
    picks: list[int] = []
    residual, weights = target, np.zeros(0)
    for _ in range(k):
        score = g @ residual
        score[picks] = -np.inf
        picks.append(int(score.argmax()))
        weights = np.linalg.lstsq(g[picks].T, target, rcond=None)[0]
        if weights.min() < 0:
            weights = nnls(g[picks].T, target)[0]
        residual = target - g[picks].T @ weights
    return picks, weights


@pytest.mark.parametrize("whole", [True, False])
def test_is_gradmatch(backend: str, whole: bool) -> None:
    g = make_rows("normal", 200, 30, seed=1)
    target = g.sum(0) if whole else normal(30, 1, seed=10)[:, 0]
    picks, weights = picks_by_lstsq(g.numpy(), target.numpy(), 20)
    found = orthogonal_matching_pursuit(g, target, 20, backend=backend)
    kept = weights > 0
    assert whole or not kept.all()  # weights did come to 0 in the second case
    assert found.indices.tolist() == np.array(picks)[kept].tolist()
    np.testing.assert_allclose(found.weights.numpy(), weights[kept], rtol=1e-8)
    assert len(found.residual_norms) == 20


@pytest.mark.parametrize("ridge", [0.0, 5.0])
def test_weights_are_those_of_nnls(backend: str, ridge: float) -> None:
    g = make_rows("clustered", 90, 25, seed=1)
    target = make_target(g, False, seed=4)
    found = orthogonal_matching_pursuit(g, target, 20, ridge=ridge, backend=backend)
    chosen = g[found.indices]
    matrix = torch.cat([chosen.T, ridge**0.5 * torch.eye(len(chosen), dtype=torch.float64)])
    wanted, _ = nnls(matrix.numpy(), torch.cat([target, torch.zeros(len(chosen))]).numpy())
    np.testing.assert_allclose(found.weights.numpy(), wanted, rtol=1e-7)


def test_geodesic_steps_in_plain_numpy(backend: str) -> None:
    """Algorithm 1 of the paper, line by line."""
    rows = make_rows("normal", 60, 12, seed=3).numpy()
    total = rows.sum(0)
    units, goal = rows / np.linalg.norm(rows, axis=1, keepdims=True), total / np.linalg.norm(total)
    w, y = np.zeros(60), np.zeros(12)
    for _ in range(15):
        d = goal - (goal @ y) * y
        d_rows = units - np.outer(units @ y, y)
        length = np.linalg.norm(d_rows, axis=1)
        n = int((d_rows @ d / np.where(length > 1e-6, length, np.inf)).argmax())
        zeta0, zeta1, zeta2 = goal @ units[n], goal @ y, units[n] @ y
        gamma = (zeta0 - zeta1 * zeta2) / ((zeta0 - zeta1 * zeta2) + (zeta1 - zeta0 * zeta2))
        w *= 1 - gamma
        w[n] += gamma
        y = w @ units
        w, y = w / np.linalg.norm(y), y / np.linalg.norm(y)
    w *= np.linalg.norm(total) / np.linalg.norm(rows, axis=1) * (y @ goal)
    found = frank_wolfe(rows, total, 15, backend=backend)
    dense = np.zeros(60)
    dense[found.indices.numpy()] = found.weights.numpy()
    np.testing.assert_allclose(dense, w, rtol=1e-9, atol=1e-12)
    assert float(found.residual_norms[-1]) == pytest.approx(np.linalg.norm(total - w @ rows), rel=1e-9)


# --- promises -------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=12),
    st.lists(st.integers(-5, 5), min_size=4, max_size=4),
    st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=80, deadline=None)
def test_conditions_of_the_optimum(rows: list[list[int]], goal: list[int], ridge: float) -> None:
    """Small whole numbers: zeros, duplicates, dependent rows and ties throughout."""
    g, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(goal, dtype=torch.float64)
    scale = 1 + float(target.norm()) * (1 + float(g.norm()))
    for nonnegative in (True, False):
        found = orthogonal_matching_pursuit(g, target, len(g), nonnegative=nonnegative, ridge=ridge)
        assert len(found.indices.unique()) == len(found.indices) <= len(found.residual_norms) <= len(g)
        residual = target - g[found.indices].T @ found.weights
        rest = g @ residual
        # The weights are those of a least-squares fit, and with all rows allowed nothing is left to gain.
        assert (
            (rest[found.indices] - ridge * found.weights).abs().max() <= 1e-9 * scale
            if len(found.indices)
            else True
        )
        others = torch.ones(len(g), dtype=torch.bool)
        others[found.indices] = False
        left = rest[others] if nonnegative else rest[others].abs()
        if ridge == 0 and others.any():
            assert float(left.max()) <= 1e-7 * scale
        if nonnegative:
            assert (found.weights > 0).all()
        if len(found.residual_norms):
            assert float(found.residual_norms[-1]) == pytest.approx(float(residual.norm()), abs=1e-9 * scale)
        if ridge == 0:
            assert (found.residual_norms.diff() <= 1e-9 * scale).all()
    found = frank_wolfe(g, target, len(g))
    assert (found.weights > 0).all()
    assert (found.residual_norms.diff() <= 1e-9 * scale).all()
    if len(found.indices):
        sums = g[found.indices].T @ found.weights
        assert float(found.residual_norms[-1]) == pytest.approx(
            float((target - sums).norm()), abs=1e-7 * scale
        )


@EVERY_BACKEND
def test_ties_go_to_the_lowest_index(backend: str) -> None:
    check_ties(backend, DEVICE, *((20, 6) if backend in GPU_BACKENDS else (40, 30)))


@EVERY_BACKEND
def test_nearly_dependent_rows_are_passed_over(backend: str) -> None:
    check_nearly_dependent(backend, DEVICE, 8 if backend in GPU_BACKENDS else 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    g = make_rows("clustered", 5000, 70).to(dtype)
    target = make_target(g, False)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        problem = PursuitProblem(g, target, 50)
        results.append(
            [
                kernels.cpu.orthogonal_matching_pursuit(problem),
                kernels.cpu.orthogonal_matching_pursuit(replace(problem, memory_budget=0)),
                kernels.cpu.frank_wolfe(problem),
            ]
        )
    for again in results[1:]:
        for one, other in zip(results[0], again, strict=True):
            check_equal(one, other)


def test_less_memory_gives_the_same() -> None:
    check_less_memory(kernels.cpu, "cpu", (97, 300), 40, [0, 3, 25])


@ON_GPU
def test_less_memory_gives_the_same_on_a_gpu(backend: str) -> None:
    check_less_memory(module_of(backend), DEVICE, (40, 30), 7, [0, 3, 7, 8])


def test_permuted_rows_give_permuted_picks(backend: str) -> None:
    g = make_rows("normal", 150, 40)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        plain = solve(g, g.sum(0), 20, backend=backend)
        moved = solve(g[order], g.sum(0), 20, backend=backend)
        assert order[moved.indices].tolist() == plain.indices.tolist()
        torch.testing.assert_close(moved.weights, plain.weights, rtol=1e-9, atol=0)


def test_a_gram_matrix_in_double_keeps_the_weights_of_rows_that_are_alike() -> None:
    """Rows in float32 that are 1e-3 apart: squares in float32 would leave their weights no digit."""
    g = (normal(1, 60) + 1e-3 * normal(50, 60, seed=1)).float()
    target = g.double().sum(0)
    found = orthogonal_matching_pursuit(g, target, 30, nonnegative=False, backend="cpu")
    wanted = np.linalg.lstsq(g[found.indices].double().numpy().T, target.numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.weights.double().numpy(), wanted, rtol=1e-5)


def test_views_and_arrays(backend: str) -> None:
    g, target = make_rows("normal", 60, 25).float(), normal(25, 1)[:, 0]
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        wanted = solve(g, target, 8, backend=backend)
        wide = torch.stack([g, g], 2)[:, :, 0]
        for rows in (
            g.T.contiguous().T,
            wide,
            torch.cat([g, g], 1)[:, :25],
            g.numpy(),
            g.clone().requires_grad_(),
        ):
            for goal in (target, torch.stack([target, target], 1)[:, 0], target.tolist(), target.numpy()):
                found = solve(rows, goal, 8, backend=backend)
                assert torch.equal(found.indices, wanted.indices)
                assert torch.equal(found.weights, wanted.weights)


@pytest.mark.parametrize("name", ["torch", "cpu", None])
def test_opcheck_and_compile(name: str | None) -> None:
    check_opcheck_and_compile(name, "cpu")
    meta = orthogonal_matching_pursuit(G.to("meta"), GOAL.to("meta"), 3)
    assert (meta.indices.is_meta, meta.weights.shape) == (True, (3,))


@ON_GPU
def test_opcheck_and_compile_on_a_gpu(backend: str) -> None:
    check_opcheck_and_compile(backend, DEVICE, 3)


LONG_CALL = """
import torch
from flashcoreset.pursuit import frank_wolfe, orthogonal_matching_pursuit
g = torch.randn(60_000, 1000, generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
try:
    {name}(g, g.sum(0), 60_000, backend="cpu")
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(len(orthogonal_matching_pursuit(g[:50], g.sum(0), 5, backend="cpu").indices), flush=True)
"""


@pytest.mark.parametrize("name", ["orthogonal_matching_pursuit", "frank_wolfe"])
def test_ctrl_c_ends_the_call_within_a_second(name: str) -> None:
    code = LONG_CALL.format(name=name)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.7)  # well inside the call
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - begin < 1
        assert process.stdout.readline() == "5\n"
        assert process.wait(timeout=30) == 0


# --- bad input ------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(backend: str, value: float, dtype: torch.dtype) -> None:
    check_bad_values(backend, DEVICE, value, dtype)


BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "g int": ((G.int(), GOAL, 1), {}, TypeError, "g must have dtype float16, .*, got int32"),
    "g list": (([[1.0], [2.0, 3.0]], GOAL, 1), {}, ValueError, "g must be a list of numbers, got a nested one"),
    "g 1-d": ((GOAL, GOAL, 1), {}, ValueError, r"g must have 2 dimensions, got shape \(3,\)"),
    "g empty": ((G[:0], GOAL, 1), {}, ValueError, r"g must have at least 1 row and 1 column, got shape \(0, 3\)"),
    "target long": ((G, torch.ones(4), 1), {}, ValueError, r"target must have shape \[3\], got \(4,\)"),
    "target 2-d": ((G, GOAL[None], 1), {}, ValueError, r"target must have shape \[3\], got \(1, 3\)"),
    "target complex": ((G, GOAL.to(torch.complex64), 1), {}, TypeError, "target must hold real numbers, got dtype complex64"),
    "target None": ((G, None, 1), {}, TypeError, "target must be a torch.Tensor, .*, got NoneType"),
    "target elsewhere": ((G, GOAL.to("meta"), 1), {}, ValueError, "target is on device meta, but g is on cpu"),
    "k 0": ((G, GOAL, 0), {}, ValueError, "k must be between 1 and the number of rows of g, 4, got 0"),
    "k 5": ((G, GOAL, 5), {}, ValueError, "k must be between 1 and the number of rows of g, 4, got 5"),
    "k float": ((G, GOAL, 2.0), {}, TypeError, "k must be an int, got 2.0"),
    "ridge -1": ((G, GOAL, 1), {"ridge": -1}, ValueError, "ridge must be >= 0, got -1.0"),
    "ridge inf": ((G, GOAL, 1), {"ridge": math.inf}, ValueError, "ridge must be finite, got inf"),
    "ridge str": ((G, GOAL, 1), {"ridge": "1"}, TypeError, "ridge must be a number, got '1'"),
    "sign": ((G, GOAL, 1), {"nonnegative": 1}, TypeError, "nonnegative must be a bool, got 1 of type int"),
    "backend": ((G, GOAL, 1), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, options, error, words = BAD[name]
    with pytest.raises(error, match=words):
        orthogonal_matching_pursuit(*arguments, **options)
    if not options:
        with pytest.raises(error, match=words):
            frank_wolfe(*arguments)


def test_the_compiled_call_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"target: expected shape \(3,\), got \(4,\)"):
        kernels.cpu.orthogonal_matching_pursuit(PursuitProblem(G, torch.ones(4).double(), 1))
    with pytest.raises(TypeError, match="target: expected dtype float64, got float32"):
        kernels.cpu.frank_wolfe(PursuitProblem(G, GOAL, 1))
    with pytest.raises(TypeError, match="g: expected dtype float32 or float64, got float16"):
        kernels.cpu.frank_wolfe(PursuitProblem(G.half(), GOAL.double(), 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU both are there")
def test_unavailable_backends_say_why() -> None:
    with pytest.raises(fc.BackendUnavailableError, match=r"backend 'cuda': .*(built without|cannot be used)"):
        orthogonal_matching_pursuit(G, GOAL, 1, backend="cuda")
