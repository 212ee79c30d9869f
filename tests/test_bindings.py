"""Numbers given to the compiled modules' bindings: every number, in every binding, on the CPU and on the (emulated) GPU.

The table of tests/binding_calls.py runs in a process of its own, whose last line names the call that ended it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import binding_calls
import conftest
import numpy as np
import pytest
import torch
from binding_calls import HOSTILE, cases, numbers, signatures

from flashcoreset._core import native
from flashcoreset._core.tensor import Csr
from flashcoreset.directions.reference import directions
from flashcoreset.kernels import FacilityLocationProblem as Problem
from flashcoreset.sketch.kinds import KINDS

WORKS, REFUSED = "works", ("TypeError", "ValueError")
# Parameters that may be something else than a number.
MAY_BE_NONE = {"offset", "length", "expected_picks", "stop_gain"}
MAY_BE_INFINITE = {"rho_a", "rho_b", "ceiling", "enough", "goal"}
# These alone can't be negative, 0, or that large by what the others are.
POSITIVE = {"threads", "length", "lists", "size", "n", "nnz", "goal", "max_iter", "iterations"}


def module_of(which: str) -> ModuleType:
    module = native.module() if which == "cpu" else conftest.emulated_module()
    if module is None:
        pytest.fail("the emulated CUDA module is not built: make emulated")
    return module


@dataclasses.dataclass(frozen=True)
class Outcome:
    binding: str
    parameter: str | None
    value: str
    outcome: str
    message: str

    @property
    def name(self) -> str:
        """The parameter's, or the field's of an object."""
        return (self.parameter or "").rpartition(".")[2]


@functools.cache
def outcomes(which: str) -> list[Outcome]:
    """The outcomes of all calls, made in a process of their own."""
    module = module_of(which)
    name, path = module.__spec__.name.rpartition(".")[2], str(module.__file__)
    found = subprocess.run(
        [sys.executable, str(Path(binding_calls.__file__)), name, path],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.returncode == 0, (
        f"{lines[-1:]} ended the process with {found.returncode}: {found.stderr[-2000:]}"
    )
    results = [line for line in lines if "result" in line]
    return [Outcome(*line["result"], line["outcome"], line["message"]) for line in results]


@pytest.fixture(params=["cpu", "cuda"])
def which(request: pytest.FixtureRequest) -> str:
    return request.param


def kinds_of(which: str) -> dict[tuple[str, str], str]:
    return {
        (binding, name): kind
        for binding, parameters in numbers(module_of(which)).items()
        for name, kind in parameters
    }


def test_every_binding_says_what_it_takes(which: str) -> None:
    """Numbers come in by csrc/bindings/arguments.h and by nothing else."""
    allowed = {*binding_calls.KINDS, "object", "str"}
    for binding, signature in signatures(module_of(which)).items():
        for name, kind in signature:
            assert kind in allowed or kind.endswith(".CaratheodoryReduction"), (binding, name, kind)


def test_every_number_of_every_binding_is_in_the_table(which: str) -> None:
    expected = set(cases(module_of(which)))
    assert {(o.binding, o.parameter, o.value) for o in outcomes(which)} == expected
    assert len(expected) > 500
    unknown = {o.binding for o in outcomes(which) if o.outcome == "not in the table"}
    assert not unknown, f"tests/binding_calls.py has no arguments for {sorted(unknown)}"
    failed = [o for o in outcomes(which) if o.parameter is None and o.outcome != WORKS]
    assert not failed


def test_hostile_numbers_work_or_are_refused(which: str) -> None:
    bad = [o for o in outcomes(which) if o.outcome not in (WORKS, *REFUSED, "MemoryError")]
    # Only CUDA knows which streams exist.
    bad = [o for o in bad if not (o.parameter == "stream" and o.message.endswith("invalid resource handle"))]
    assert not bad, bad[:10]


def test_what_is_of_another_type_is_a_type_error_that_names_the_argument(which: str) -> None:
    kinds = kinds_of(which)
    others = {
        "Integer": ("1.5", "nan", "inf", "'3'", "None", "True", "b'x'"),
        "Real": ("'3'", "None", "True", "b'x'"),
        "Flag": tuple(set(HOSTILE) - {"True"}),
    }
    checked = 0
    for o in outcomes(which):
        if o.parameter is None or o.value not in others[kinds[o.binding, o.parameter]]:
            continue
        if o.value == "None" and o.name in MAY_BE_NONE:
            continue
        assert o.outcome == "TypeError", o
        assert re.match(f"{o.name}: expected .*, got {type(HOSTILE[o.value]).__name__}$", o.message), o
        checked += 1
    assert checked > 200


def test_what_is_out_of_range_is_a_value_error_that_names_the_argument(which: str) -> None:
    kinds = kinds_of(which)
    for o in outcomes(which):
        if o.parameter is None:
            continue
        kind, value = kinds[o.binding, o.parameter], HOSTILE[o.value]
        beyond = False
        if kind == "Integer" and type(value) is int:
            least = 1 if o.name in POSITIVE else -1 if o.name == "shared_bytes" else 0
            beyond = value >= 2**63 or value < (-(2**63) if o.name == "seed" else least)
            beyond |= o.name in ("threads", "device", "count", "event_delay") and value == 2**70
            beyond |= (
                o.name in ("threads", "lists", "n", "length") and value >= 2**62 and "begin" not in o.binding
            )
        elif kind == "Real" and type(value) in (int, float):
            beyond = o.value in ("nan", "10**400") or (o.value == "inf" and o.name not in MAY_BE_INFINITE)
        if beyond:
            assert o.outcome == "ValueError", o
            assert re.match(f"{o.name}: expected .*, got ", o.message), o


@pytest.mark.parametrize("text", ["\ud800", "", "l1\0", "ä" * 5000, 3, None])
def test_texts_that_name_nothing_are_refused(which: str, text: object) -> None:
    """Half of a surrogate pair, which UTF-8 does not have, was an error of pybind11's own."""
    calls, taken = 0, []
    for name, call in binding_calls.calls_with_text(module_of(which), text):
        calls += 1
        with contextlib.suppress(TypeError, ValueError):
            call()
            taken.append(name)
    assert not taken
    assert calls > 5


def test_working_arrays_that_fit_in_no_memory_are_a_memory_error() -> None:
    found = {(o.binding, o.parameter, o.value): o.outcome for o in outcomes("cpu")}
    for binding, parameter in binding_calls.LARGE:
        assert found[binding, parameter, "2**31"] == "MemoryError"


# ----------------------------------------------------------------------------------------------- the cases one by one


@pytest.fixture(params=native.available_isas())
def m(request: pytest.FixtureRequest) -> ModuleType:
    return native.load_isa(request.param)


@pytest.mark.parametrize("threads", [0, -1, 4097, 2**31])
@pytest.mark.parametrize("kind", ["gaussian", "gaussian-boxmuller", "srht"])
def test_a_number_of_threads_that_there_cannot_be(m: ModuleType, threads: int, kind: str) -> None:
    x, out = torch.randn(22, 96), torch.empty(22, 600)
    with pytest.raises(ValueError, match=rf"threads: expected an integer in \[1, 4096\], got {threads}"):
        m.sketch(x, out, kind, 1, 0, 3, threads)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_columns_have_sketches_of_zeros(m: ModuleType, kind: str) -> None:
    out = torch.full((3, 5), 7.0)
    m.sketch(torch.empty(3, 0), out, kind, 1, 0, 1, 2)
    assert torch.equal(out, torch.zeros(3, 5))


def test_numbers_of_numpy_and_torch_are_numbers(m: ModuleType) -> None:
    x = torch.randn(4, 9)
    for one, two in ((np.int64(1), np.uint8(2)), (torch.tensor(1), torch.tensor(2, dtype=torch.int32))):
        found, expected = torch.empty(2, 4, 8)
        m.sketch(x, found, "sjlt", one, np.int32(0), two, one)
        m.sketch(x, expected, "sjlt", 1, 0, 2, 1)
        assert torch.equal(found, expected)
    out = torch.empty(4, 4)
    m.pairwise(x, x, out, "dot", 1, np.bool_(True))
    for shrink in (1, np.float32(0.5), torch.tensor(2.0)):
        m.CaratheodoryReduction(torch.zeros(2, dtype=torch.float64), shrink)


def test_an_error_of_the_number_itself_comes_through(m: ModuleType) -> None:
    class Broken:
        def __index__(self) -> int:
            raise KeyError("mine")

        def __float__(self) -> float:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        m.NearestOrder(torch.ones(1, 1), Broken())
    with pytest.raises(KeyError, match="mine"):
        m.ActiveSet(True, Broken(), 1.0)


def test_a_sparse_matrix_of_more_columns_than_there_can_be(m: ModuleType) -> None:
    arrays = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2)
    for columns in HOSTILE.values():
        problem = Problem(Csr(*arrays, (2, columns)), metric="precomputed")
        if type(columns) is not int:
            with pytest.raises(TypeError, match="columns: expected an integer, got"):
                m.FacilityLocation(problem, 1)
        elif not 0 <= columns <= 2**48:
            with pytest.raises(
                ValueError, match=r"columns: expected an integer in \[0, 281474976710656\], got"
            ):
                m.FacilityLocation(problem, 1)


@pytest.mark.parametrize("given", [torch.ones(3, 3).to_sparse(), torch.ones(3, 3, device="meta")])
def test_a_field_that_is_not_in_memory_is_refused_by_name(m: ModuleType, given: torch.Tensor) -> None:
    for problem, name in (
        (Problem(given), "x"),
        (Problem(torch.ones(3, 3), clients=given), "clients"),
    ):
        with pytest.raises(
            TypeError, match=f"{name}: expected a dense tensor in memory, got one that has none"
        ):
            m.FacilityLocation(problem, 1)


@pytest.mark.parametrize("columns", [[0, 0], [1, 0], [0, 1, 1]])
def test_a_sparse_row_that_has_a_column_twice(m: ModuleType, columns: list[int]) -> None:
    """Its gain would be summed beyond the range that fixed-point numbers have."""
    count = len(columns)
    arrays = torch.tensor([0, count]), torch.tensor(columns), torch.ones(count)
    run = m.FacilityLocation(Problem(Csr(*arrays, (1, 3)), metric="precomputed"), 1)
    with pytest.raises(ValueError, match="column indices must rise within a row, got"):
        run.step(1, False)


def test_directions_to_the_end_of_64_bits(m: ModuleType) -> None:
    out = torch.empty(2, 5)
    most = 2**63 - 1 - 2**16 - 5
    for begin in (2**63 - 1, most + 1):
        with pytest.raises(ValueError, match=rf"begin: expected an integer in \[0, {most}\], got {begin}"):
            m.directions(out, 1, begin, 0, 1)
    m.directions(out, 1, most, 2**32 - 2, 1)
    expected = torch.empty(2, 5)
    directions(expected, seed=1, begin=most, first=2**32 - 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # the vector logarithm's last digits
    with pytest.raises(ValueError, match=r"first: expected an integer in \[0, 4294967294\], got 4294967295"):
        m.directions(out, 1, 0, 2**32 - 1, 1)


def test_arrays_that_claim_more_elements_than_any_memory_has(m: ModuleType) -> None:
    out = torch.empty(1, 1)
    for shape in ((1, 2**50), (2**50, 0), (0, 2**62)):
        wide = torch.zeros(1).expand(1, 2**50) if 0 not in shape else torch.empty(shape)
        with pytest.raises(ValueError, match=r"x: expected an array of at most 2\^48 elements, got shape"):
            m.pairwise(wide, wide, out, "dot", 1, False)


def test_a_similarity_matrix_without_clients(m: ModuleType) -> None:
    run = m.FacilityLocation(Problem(torch.empty(3, 0), metric="precomputed"), 1)
    assert run.step(2, False) == 2


def updates(**rule: float) -> SimpleNamespace:
    """A problem of gradient matching, as its bindings take it."""
    numbers = {"m_scale": 0.9, "m_step": 0.1, "v_scale": 0.9, "v_step": 0.1, "eps": 1e-8} | rule
    return SimpleNamespace(
        g=SimpleNamespace(values=torch.arange(18.0).reshape(2, 9), seed=0, length=None),
        history=SimpleNamespace(m=torch.arange(9.0), v=torch.ones(9)), rule=SimpleNamespace(**numbers),
        member=torch.tensor([0, 1]), offset=torch.tensor([0, 2]),
    )  # fmt: skip


@pytest.mark.parametrize("which", ["m_scale", "m_step", "v_scale", "v_step", "eps"])
def test_a_rule_of_negative_numbers(m: ModuleType, which: str) -> None:
    """With a negative m_step the bound of |u| was one of nothing, and lists stayed empty."""
    dims, u = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{which}: expected a finite number >= 0, got -0.1"):
        m.top_updates(updates(**{which: -0.1}), dims, u)


@pytest.mark.parametrize("which", ["m_scale", "m_step", "v_scale", "v_step", "eps"])
def test_minus_zero_is_zero(m: ModuleType, which: str) -> None:
    """With a v_step of -0 the bound of |u| was -inf, and lists stayed empty."""
    found = []
    for zero in (0.0, -0.0):
        dims, u = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.float64)
        m.top_updates(updates(**{which: zero}), dims, u)
        found.append((dims.tolist(), u.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("betas", [0.9, (0.9,), [0.9, 0.99], (0.9, 0.99, 0.999), None])
def test_betas_are_a_pair(m: ModuleType, betas: object) -> None:
    problem, out = updates(), torch.zeros(9)
    problem.history.betas = betas
    with pytest.raises(TypeError, match="betas: expected a tuple of two numbers, got"):
        m.update_history(problem.g, problem.history, torch.tensor([0]), out, out.clone())


@pytest.mark.parametrize("betas", [("0.9", 0.99), (0.9, math.nan), (True, 0.99)])
def test_betas_are_numbers(m: ModuleType, betas: object) -> None:
    problem, out = updates(), torch.zeros(9)
    problem.history.betas = betas
    with pytest.raises((TypeError, ValueError), match=r"betas\[[01]\]: expected a (finite )?number, got"):
        m.update_history(problem.g, problem.history, torch.tensor([0]), out, out.clone())


def in_a_process(m: ModuleType, code: str) -> subprocess.CompletedProcess[str]:
    """For calls that once never returned and cannot be interrupted."""
    name = m.__name__.rpartition(".")[2]
    start = f"import torch; from flashcoreset import {name} as m; nan, inf = float('nan'), float('inf')\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_fit_of_what_is_no_number_ends(m: ModuleType) -> None:
    found = in_a_process(
        m,
        """
def f64(*values): return torch.tensor(values, dtype=torch.float64)
calls = [(nonnegative, products, 0.5) for nonnegative in (True, False)
         for products in ((nan, 1.0), (inf, 1.0), (-inf, 1.0), (0.5, nan), (0.5, inf), (1e308, 1e-308))]
calls += [(True, (0.0, 1e-300), 1e308), (False, (0.0, 1e-300), 1e308)]
for nonnegative, products, correlation in calls:
    fit = m.ActiveSet(nonnegative, 0.0, 1.0)
    fit.add(f64(1.0), 0.5)
    try:
        taken = fit.add(f64(*products), correlation)
        weights = f64(0, 0)[:2 if taken else 1]
        fit.weights(weights)
        assert weights.isfinite().all(), (products, weights)
        print(nonnegative, products, "taken" if taken else "not taken")
    except ValueError as error:
        assert str(error) == "g, target: products of their entries are not finite; scale them down", error
        print(nonnegative, products, "refused")
""",
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 14
    # Only 1e308 can't be distinguished from a row that depends on the first: its squared distance is below 0.
    assert [line for line in lines if not line.endswith("refused")] == [
        f"{nonnegative} (1e+308, 1e-308) not taken" for nonnegative in (True, False)
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_reduction_of_what_is_no_number_is_refused(m: ModuleType, bad: float) -> None:
    """Runs would neither be kept nor dropped."""
    f64 = functools.partial(torch.rand, dtype=torch.float64)
    words = "x, weights: sums of their products are not finite; scale them down"
    reduction = m.CaratheodoryReduction(torch.zeros(2, dtype=torch.float64), 1.0)
    reduction.take_total(f64(8, 3) + 0.5)
    indices, new_weights = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.float64)
    x, sums = torch.rand(50, 2), f64(12, 3)
    x[7, 1] = sums[5, 2] = bad
    with pytest.raises(ValueError, match=words):
        reduction.rest(x, f64(50), indices, new_weights, 1)
    with pytest.raises(ValueError, match=words):
        reduction.factors(sums, torch.empty(12, dtype=torch.float64), 1)
    sampler = m.CaratheodorySampler(reduction, f64(50) + 0.5, 5, 1)
    with pytest.raises(ValueError, match=words):
        sampler.push(x)


def test_estimates_of_no_directions_have_a_history_of_zeros() -> None:
    new_m, new_v = torch.ones(9), torch.ones(9)
    history = SimpleNamespace(m=torch.full((9,), 2.0), v=torch.full((9,), 4.0), betas=(0.5, 0.5))
    g = SimpleNamespace(values=torch.empty(4, 0), seed=1, length=9)
    overflows = torch.zeros(1, dtype=torch.int64)
    module_of("cuda").update_history(g, history, torch.tensor([0, 2]), new_m, new_v, overflows, 0)
    assert torch.equal(new_m, torch.full((9,), 1.0))
    assert torch.equal(new_v, torch.full((9,), 2.0))


def test_without_further_threads_one_does_the_work(m: ModuleType) -> None:
    found = in_a_process(
        m,
        """
import os, resource
x, alone, together = torch.ones(22, 96), torch.empty(22, 600), torch.empty(22, 600)
m.sketch(x, alone, "gaussian", 1, 0, 1, 1)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
if os.getuid() == 0:  # whom the limit does not bind
    os.setuid(54321)
import threading
try:
    threading.Thread(target=print).start()
except RuntimeError:
    print("no thread")
m.sketch(x, together, "gaussian", 1, 0, 1, 8)
print(torch.equal(alone, together))
""",
    )
    assert (found.stdout, found.returncode) == ("no thread\nTrue\n", 0), found.stderr
