"""Facility location on every backend and in every build, against the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import (
    DEVICE,
    DISTANCES,
    METRICS,
    PLAIN,
    POINT_METRICS,
    VARIANTS,
    Case,
    data,
    for_interpreter,
    locate,
    on_device,
    points,
    worst_error,
)
from conftest import EVERY_BACKEND, GPU_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset._core import native
from flashcoreset._core.progress import Progress
from flashcoreset.facility_location.solve import Work


def select(case: Case, backend: str, **changes: Any) -> fc.Selection:
    return locate(case.x, case.k, backend=backend, **{**case.options, **changes})


# The interpreter gets the cases at sizes that it can bear.
BY_BACKEND = {"triton": [*for_interpreter(PLAIN, 5), *for_interpreter(VARIANTS, 2)]}
TABLE = [
    pytest.param(backend, case, id=f"{backend}-{case}")
    for backend in EVERY_BACKEND.args[1]
    for case in BY_BACKEND.get(backend, [*PLAIN, *VARIANTS])
]


def assert_same(a: fc.Selection, b: fc.Selection) -> None:
    """Bit for bit."""
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.gains, b.gains)
    assert torch.equal(a.weights, b.weights)
    assert torch.equal(a.assignment, b.assignment)
    assert a.objective == b.objective
    assert a.offset == b.offset


@pytest.mark.parametrize(("backend", "case"), TABLE, indirect=["backend"])
def test_follows_the_definition(case: Case, backend: str) -> None:
    options: dict[str, Any] = {}
    if backend == "triton":
        # Too little for the matrix: similarities are computed in the kernels. Clients of groups are served so many at a time.
        options["memory_budget"] = 4000 if "groups" in case.options else 0
    selection = select(case, backend, **options)
    worst_error(case, selection)
    dtype = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    assert selection.indices.dtype == selection.assignment.dtype == torch.int64
    assert selection.gains.dtype == selection.weights.dtype == dtype
    assert isinstance(selection.objective, float)
    assert (selection.offset is not None) == (case.metric in DISTANCES)
    if "groups" not in case.options:
        assert (selection.gains.diff() <= 0).all()
    if backend == "cuda" and native.module().ISA != "x86-64-v2":
        # That build has no fused multiply-add, so that its picks may differ if gains tie.
        expected = select(case, "cpu")
        for name in ("indices", "gains", "assignment"):
            assert torch.equal(getattr(selection, name), getattr(expected, name)), name
        assert math.isclose(selection.objective, expected.objective, rel_tol=1e-12, abs_tol=1e-300)
    if backend == "triton":
        # A device rounds a fused multiply-add once, as the CPU kernels do; interpreted it is rounded twice, as in the reference.
        expected = select(case, "torch" if DEVICE == "cpu" else "cpu", **options)
        # On a device, rows of unit length are torch's here, the CPU kernels' own there.
        if DEVICE == "cpu" or case.metric != "cosine":
            assert torch.equal(selection.indices, expected.indices)
        if expected.offset is not None:
            assert math.isclose(selection.offset, expected.offset, rel_tol=1e-6)
        assert math.isclose(selection.objective, expected.objective, rel_tol=1e-6, abs_tol=1e-30)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_methods_and_memory_budgets_agree_bit_for_bit(case: Case, backend: str) -> None:
    lazy = select(case, backend)
    assert_same(lazy, select(case, backend, method="naive"))
    for memory_budget in (0, 5000, 2**40):
        assert_same(lazy, select(case, backend, memory_budget=memory_budget))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thread_counts_agree_bit_for_bit(metric: str, dtype: torch.dtype, backend: str) -> None:
    case = Case("", data(metric, 700 if backend == "cpu" else 150, 6, dtype), 30, {"metric": metric})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = select(case, backend)
        torch.set_num_threads(2)
        for memory_budget in (0, 100_000, 2**28):
            assert_same(one, select(case, backend, memory_budget=memory_budget))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("metric", METRICS)
def test_stochastic(metric: str, backend: str) -> None:
    x = data(metric, 300, 7, torch.float32)
    exact = locate(x, 30, metric=metric, backend=backend)
    some = locate(x, 30, metric=metric, method="stochastic", seed=3, backend=backend)
    assert len(set(some.indices.tolist())) == 30
    assert 0.9 * exact.objective < some.objective <= 1.02 * exact.objective
    assert_same(some, locate(x, 30, metric=metric, method="stochastic", seed=3, backend=backend))
    other = locate(x, 30, metric=metric, method="stochastic", seed=4, backend=backend)
    assert not torch.equal(some.indices, other.indices)
    reference = locate(x, 30, metric=metric, method="stochastic", seed=3, backend="torch")
    assert torch.equal(some.indices, reference.indices)


@EVERY_BACKEND
@pytest.mark.parametrize("k", [1, 6, 7])
def test_stochastic_with_samples_of_everything_is_exact(k: int, backend: str) -> None:
    x = points(7, 3, 8)
    selection = locate(x, k, method="stochastic", epsilon=1e-300, backend=backend)
    assert_same(selection, locate(x, k, backend=backend))


@EVERY_BACKEND
def test_stochastic_within_groups_and_beside_preselected(backend: str) -> None:
    x, groups = points(60, 4, 9), torch.arange(60) % 3
    selection = locate(
        x, 30, groups=groups, preselected=[0, 1, 2], method="stochastic", epsilon=0.9, backend=backend
    )
    assert torch.bincount(groups[selection.indices]).tolist() == [10, 10, 10]
    assert not set(selection.indices.tolist()) & {0, 1, 2}


@EVERY_BACKEND
@pytest.mark.parametrize("metric", POINT_METRICS)
def test_ties_go_to_the_lowest_index(metric: str, backend: str) -> None:
    x = torch.tensor([[0.0, 4.0], [4.0, 0.0]]).repeat(20, 1)
    selection = locate(x, 5, metric=metric, backend=backend)
    assert selection.indices.tolist() == [0, 1, 2, 3, 4]
    assert selection.gains[2:].tolist() == [0, 0, 0]
    # Equal points are won by the earliest pick, but a pick serves itself.
    assert selection.assignment.tolist() == [0, 1, 2, 3, 4, *[1, 0] * 17, 1]


@EVERY_BACKEND
def test_zero_gains_give_distinct_lowest_indices(backend: str) -> None:
    for x in (torch.zeros(9, 3), torch.ones(9, 3)):
        selection = locate(x, 9, backend=backend)
        assert selection.indices.tolist() == list(range(9))
        assert selection.assignment.tolist() == list(range(9))
        assert selection.gains[1:].tolist() == [0] * 8
    assert locate(torch.zeros(3, 2), 1, backend=backend).assignment.tolist() == [0, -1, -1]


@EVERY_BACKEND
def test_hand_computed(backend: str) -> None:
    s = torch.tensor([[5.0, 0.0, 1.0, 0.0], [0.0, 4.0, 0.0, -1.0], [3.0, 3.0, 1.0, -2.0]])
    selection = locate(s, 3, metric="precomputed", backend=backend)
    assert selection.indices.tolist() == [2, 0, 1]
    assert selection.gains.tolist() == [7, 2, 1]
    assert selection.assignment.tolist() == [1, 2, 0, -1]
    assert selection.weights.tolist() == [1, 1, 1]
    assert selection.objective == 10
    warm = locate(s, 1, metric="precomputed", preselected=[2], backend=backend)
    assert (warm.indices.tolist(), warm.gains.tolist(), warm.objective) == ([0], [2], 9)
    assert warm.assignment.tolist() == [0, -1, -1, -1]


@EVERY_BACKEND
def test_preselected_continues_a_run(backend: str) -> None:
    x = points(80, 6, 10)
    whole = locate(x, 20, metric="sqeuclidean", backend=backend)
    rest = locate(
        x, 12, metric="sqeuclidean", preselected=whole.indices[:8], offset=whole.offset, backend=backend
    )
    assert torch.equal(rest.indices, whole.indices[8:])
    torch.testing.assert_close(rest.gains, whole.gains[8:])
    assert rest.objective == whole.objective


@EVERY_BACKEND
@pytest.mark.parametrize("metric", DISTANCES)
def test_picks_do_not_depend_on_a_sufficient_offset(metric: str, backend: str) -> None:
    x = points(90, 4, 11)
    default = locate(x, 10, metric=metric, backend=backend)
    distance = fc.kernels.torch.pairwise(x, metric=metric)
    assert default.offset >= distance.max()
    larger = locate(x, 10, metric=metric, offset=3 * default.offset, backend=backend)
    assert torch.equal(default.indices, larger.indices)
    assert larger.offset == 3 * default.offset

    # So far above the distances that float32 cannot hold them beside it.
    for options in ({}, {"preselected": [3, 5]}, {"groups": torch.arange(90) % 3}):
        near = locate(x.float(), 10, metric=metric, backend=backend, **options)
        far = locate(x.float(), 10, metric=metric, offset=1e12, backend=backend, **options)
        assert torch.equal(near.indices, far.indices)
        assert torch.equal(near.assignment, far.assignment)
        assert math.isclose(far.objective, near.objective + 90 * (1e12 - near.offset), rel_tol=1e-7)
        if "groups" not in options:
            shift = 0 if "preselected" in options else 90 * (far.offset - near.offset)
            assert math.isclose(float(far.gains[0]), float(near.gains[0]) + shift, rel_tol=1e-6)


@EVERY_BACKEND
def test_groups_are_problems_of_their_own(backend: str) -> None:
    x, groups = points(70, 5, 12), torch.tensor([7, -2, 0, 7, 7]).repeat(14)
    weights = torch.arange(70) / 70
    both = locate(x, None, groups=groups, budgets={0: 3, 7: 5, -2: 2}, weights=weights, backend=backend)
    begin, objective = 0, 0.0
    for label, k in ((-2, 2), (0, 3), (7, 5)):
        members = (groups == label).nonzero()[:, 0]
        alone = locate(x[members], k, weights=weights[members], backend=backend)
        assert torch.equal(both.indices[begin : begin + k], members[alone.indices])
        assert torch.equal(both.gains[begin : begin + k], alone.gains)
        assert torch.equal(both.weights[begin : begin + k], alone.weights)
        assert torch.equal(both.assignment[members], alone.assignment + begin)
        begin, objective = begin + k, objective + alone.objective
    assert math.isclose(both.objective, objective, rel_tol=1e-12)


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.csr_array, "torch"])
@pytest.mark.parametrize("shape", [(60, 60), (60, 31), (5, 80)])
@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta:UserWarning"
)  # of torch, for the test's own tensor
def test_sparse_equals_dense(form: Any, shape: tuple[int, int], backend: str) -> None:
    dense = points(*shape, 13, torch.float32) * (points(*shape, 14) > 0.8)
    dense[3] = 0
    sparse = dense.to_sparse_csr() if form == "torch" else form(dense.numpy())
    options: dict[str, Any] = {"metric": "precomputed", "backend": backend, "preselected": [2]}
    for method in ("lazy", "naive", "stochastic"):
        expected = locate(dense, 4, method=method, **options)
        assert_same(expected, locate(sparse, 4, method=method, **options))
    if shape[0] == shape[1]:
        groups = torch.arange(60) % 4
        expected = locate(dense, 12, groups=groups, **options)
        assert_same(expected, locate(sparse, 12, groups=groups, **options))


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # of torch, for the test's own tensor
def test_sparse_with_duplicate_and_unsorted_entries(backend: str) -> None:
    s = scipy.sparse.csr_matrix(
        (np.array([1.0, 2.0, 0.5, 4.0]), np.array([2, 0, 2, 1]), np.array([0, 3, 4, 4])), shape=(3, 3)
    )
    selection = locate(s, 2, metric="precomputed", backend=backend)
    assert selection.indices.tolist() == [1, 0]
    assert selection.gains.tolist() == [4, 3.5]
    # Halves are summed in float32, where 2,048 + 1 is not 2,048.
    crow, col = torch.tensor([0, 3, 3]), torch.tensor([0, 0, 0])
    half = torch.sparse_csr_tensor(crow, col, torch.tensor([2048.0, 1, 1]).half(), (2, 2))
    assert locate(half, 1, metric="precomputed", backend=backend).gains.tolist() == [2050]


def test_sparse_arrays_may_be_longer_than_what_they_hold(backend: str) -> None:
    eye = scipy.sparse.csr_matrix(np.eye(3))
    spare = scipy.sparse.csr_matrix(
        (np.r_[eye.data, 9, 9], np.r_[eye.indices, 0, 0], eye.indptr), shape=(3, 3)
    )
    selection = locate(spare, 3, metric="precomputed", backend=backend)
    assert selection.gains.tolist() == [1, 1, 1]


@EVERY_BACKEND
def test_clients_that_are_x_itself_are_served_by_themselves(backend: str) -> None:
    x = torch.ones(4, 2)
    assert locate(x, 3, clients=x, backend=backend).assignment.tolist() == [0, 1, 2, 0]
    assert locate(x, 3, clients=x.clone(), backend=backend).assignment.tolist() == [0] * 4


@given(
    n=st.integers(1, 30),
    d=st.integers(1, 6),
    metric=st.sampled_from(POINT_METRICS),
    seed=st.integers(0, 2**32),
    share=st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None)
def test_properties(n: int, d: int, metric: str, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    k = max(1, int(share * n))
    case = Case("", torch.from_numpy(rng.integers(-3, 4, (n, d)).astype(np.float32)), k, {"metric": metric})
    for backend in ("cpu", "torch"):
        selection = select(case, backend)
        worst_error(case, selection)
        assert (selection.gains.diff() <= 0).all()
        assert math.isclose(
            float(selection.gains.double().sum()), selection.objective, rel_tol=1e-5, abs_tol=1e-5
        )

        # The gains of a permuted problem are the same up to rounding, unless a tie led elsewhere; the first
        # never does.
        permuted = case.x[torch.from_numpy(rng.permutation(n))]
        again = locate(permuted, k, metric=metric, offset=selection.offset, backend=backend)
        torch.testing.assert_close(again.gains[0], selection.gains[0], rtol=1e-5, atol=1e-5)


@EVERY_BACKEND
def test_permuting_candidates_permutes_the_picks(backend: str) -> None:
    x, order = points(120, 8, 15), torch.randperm(120, generator=torch.Generator().manual_seed(0))
    plain = locate(x, 30, backend=backend)
    permuted = locate(x[order], 30, backend=backend)
    assert torch.equal(order[permuted.indices], plain.indices)


def test_inputs_of_every_kind_are_taken(backend: str) -> None:
    x = points(40, 6, 16, torch.float32)
    expected = locate(x, 7, backend=backend)
    array = x.numpy()
    read_only = array.copy()
    read_only.flags.writeable = False

    class Exporter:
        def __dlpack__(self, **options: Any) -> Any:
            return x.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return x.__dlpack_device__()

    unaligned = (
        np.frombuffer(b"\0" + array.tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(array.shape)
    )
    wide = np.zeros((40, 12), dtype=np.float32)
    wide[:, ::2] = array
    kinds = {
        "numpy": array,
        "read-only": read_only,
        "negative strides": array[::-1, ::-1].copy()[::-1, ::-1],
        "fortran order": np.asfortranarray(array),
        "strided": wide[:, ::2],
        "unaligned": unaligned,
        "dlpack": Exporter(),
        "requires grad": x.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(x.clone()),
        "computed": (x.clone().requires_grad_() * 1.0),
    }
    for kind, value in kinds.items():
        selection = locate(value, 7, backend=backend)
        assert_same(selection, expected), kind
        assert not selection.gains.requires_grad
    assert (read_only == array).all()


def test_lists_are_taken_for_vectors(backend: str) -> None:
    x = points(6, 3, 17)
    lists = locate(
        x,
        2,
        weights=[1, 2, 3, 4, 5, 6],
        groups=[0, 0, 0, 1, 1, 1],
        preselected=[5],
        budgets=[1, 1],
        backend=backend,
    )
    tensors = locate(
        x, 2, weights=torch.arange(1, 7), groups=np.array([0, 0, 0, 1, 1, 1], dtype=np.int8),
        preselected=np.array([5]), budgets=torch.tensor([1, 1]), backend=backend,
    )  # fmt: skip
    assert_same(lists, tensors)
    assert_same(
        locate(x, 2, preselected=[], backend=backend),
        locate(x, 2, backend=backend),
    )


@EVERY_BACKEND
def test_progress_reaches_the_total(backend: str) -> None:
    x = points(50, 4, 18)
    quiet = locate(x, 20, groups=torch.arange(50) % 2, backend=backend)
    for method in ("lazy", "naive", "stochastic"):
        seen: list[tuple[int, int]] = []
        loud = locate(
            x, 20, groups=torch.arange(50) % 2, method=method, backend=backend,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )  # fmt: skip
        assert seen[-1] == (20, 20)
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        if method != "stochastic":
            assert_same(loud, quiet)


def test_progress_counts_the_work_before_the_first_pick() -> None:
    x = points(8_000, 128, 3)
    before = torch.get_num_threads()
    seen: list[tuple[int, int]] = []
    try:
        torch.set_num_threads(1)
        loud = locate(x, 100, backend="cpu", progress=lambda *now: seen.append(now))
    finally:
        torch.set_num_threads(before)
    # 8,000 first gains of 128 dimensions are 16 billion operations, some reports long; they are worth half of the picks.
    assert [done for done, _ in seen if done < 50]
    assert seen[-1] == (100, 100)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {100}
    assert_same(loud, locate(x, 100, backend="cpu"))


def test_what_the_picks_are_worth_beside_the_first_gains() -> None:
    seen: list[int] = []
    with Progress(lambda done, total: seen.append(done), 1_500, "for a test") as bar:
        # After 500 picks of another group: the first pick, pairs that the sweeps compute, and picks, which are half of the other half.
        work = Work(1_000, bar, 500)
        for pairs, picks in ((0.0, 0), (0.5, 0), (1.3, 0), (1.3, 1), (1.69, 1), (3.9, 1), (3.9, 500)):
            work.report(pairs, picks)
        work.made(999)
        work.made(1_000)
    assert seen == [500, 750, 1000, 1062, 1250, 1375, 1499, 1500]
    seen.clear()
    with Progress(lambda done, total: seen.append(done), 1_500, "for a test") as bar:
        work = Work(1_000, bar, 500)
        # Pairs may be counted in other units later, or a first report may come late: what was told stays.
        for pairs, picks in ((0.0, 400), (0.8, 401), (0.1, 402), (0.1, 950)):
            work.report(pairs, picks)
    assert seen == sorted(set(seen))
    assert seen[0] == 900
    with Progress(lambda done, total: seen.append(done), 400, "for a test") as bar:
        # A first pick that took no time worth a report.
        seen.clear()
        work = Work(400, bar, 0)
        for picks in (4, 200, 399, 400):
            work.made(picks)
    assert seen == [4, 200, 399, 400]


def test_a_step_reports_while_it_lasts() -> None:
    run = kernels.cpu.FacilityLocation(kernels.FacilityLocationProblem(points(8_000, 128, 3)))
    with pytest.raises(TypeError, match="report: expected a function or None"):
        run.step(1, False, 3)
    heard: list[tuple[float, int]] = []

    def stop(work: float, picks: int) -> None:
        heard.append((work, picks))
        if len(heard) == 1:
            raise ZeroDivisionError("enough")
        with pytest.raises(RuntimeError, match="in use"):
            run.stats()

    with pytest.raises(ZeroDivisionError, match="enough"):
        run.step(20, False, stop)
    assert run.step(20, False, stop) == 20
    assert all(work >= 0 and picks <= 20 for work, picks in heard)
    assert [work for work, _ in heard[1:]] == sorted(work for work, _ in heard[1:])
    assert len(heard) > 2


def test_progress_bar_goes_to_stderr(capfd: pytest.CaptureFixture[str], backend: str) -> None:
    locate(points(50, 4, 18), 20, backend=backend)
    assert capfd.readouterr() == ("", "")
    locate(points(50, 4, 18), 20, progress=True, backend=backend)
    out, err = capfd.readouterr()
    assert out == ""
    assert "facility location" in err


def test_progress_reaches_the_total_of_what_limits_leave() -> None:
    seen: list[tuple[int, int]] = []
    caps = {0: 1, 1: 2}
    chosen = locate(
        points(50, 4, 18), 20, groups=torch.arange(50) % 2, caps=caps, backend="cpu",
        progress=lambda *now: seen.append(now),
    )  # fmt: skip
    assert len(chosen.indices) == 3
    assert seen == [(1, 20), (2, 20), (3, 20), (20, 20)]


def test_progress_of_a_matrix_only_grows() -> None:
    s = points(3_000, 8, 1)
    seen: list[int] = []
    locate(
        s @ s.T, 1_000, metric="precomputed", backend="cpu", progress=lambda done, total: seen.append(done)
    )
    assert seen == sorted(set(seen))
    assert seen[-1] == 1_000


@EVERY_BACKEND
def test_progress_may_stop_the_call(backend: str) -> None:
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        locate(points(50, 4, 18), 20, progress=stop, backend=backend)


@EVERY_BACKEND
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused_by_name(bad: float, backend: str) -> None:
    x = torch.ones(4, 2)
    y = x.clone()
    y[2, 1] = bad
    with pytest.raises(ValueError, match=r"x must be finite, got .* at row 2, column 1"):
        locate(y, 1, backend=backend)
    with pytest.raises(ValueError, match="clients must be finite"):
        locate(x, 1, clients=y, backend=backend)
    with pytest.raises(ValueError, match="x must be finite"):
        locate(y, 1, metric="precomputed", backend=backend)
    with pytest.raises(ValueError, match="x must be finite"):
        locate(y, 1, metric="l1", backend=backend)


@EVERY_BACKEND
def test_vectors_may_be_strided(backend: str) -> None:
    x = points(30, 3, 3)
    weights, preselected, costs = (
        (torch.arange(60.0, dtype=torch.float64) % 7 + 1)[::2],
        torch.tensor([4, 0, 9, 0])[::2],
        torch.arange(1.0, 61)[::2],
    )
    vectors = {"weights": weights, "preselected": preselected, "costs": costs.double()}
    expected = locate(
        x, 4, backend=backend, **{name: vector.contiguous() for name, vector in vectors.items()}
    )
    assert_same(locate(x, 4, backend=backend, **vectors), expected)


@EVERY_BACKEND
def test_overflow_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"x: .*overflow"):
        locate(torch.full((3, 2), 1e30), 1, metric="dot", backend=backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_matrices_are_for_other_backends(backend: str) -> None:
    s = on_device(torch.eye(3)).to_sparse_csr()
    with pytest.raises(
        fc.BackendUnavailableError, match=rf"no {backend} kernel for sparse.*backend='torch'.*backend='cpu'"
    ):
        fc.facility_location(s, 1, metric="precomputed", backend=backend)
