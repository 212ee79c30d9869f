"""Costs, budgets of costs, stops, exclusions, caps and least distances, on every backend, against the greedy rule in NumPy."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import locate, points
from conftest import EVERY_BACKEND

import flashcoreset as fc

N, M = 37, 23
# Whole numbers, so that gains are exact in every type, and many of them tie.
GRID = torch.randint(0, 9, (N, 3), generator=torch.Generator().manual_seed(0)).double()
CLIENTS = torch.randint(0, 9, (M, 3), generator=torch.Generator().manual_seed(1)).double()
MATRIX = torch.randint(-2, 12, (N, M), generator=torch.Generator().manual_seed(2)).double()
LABELS = torch.arange(N) % 4
COSTS = (torch.arange(N) * 7 % 5 + 1).double() / 4
WEIGHTS = torch.arange(M).double() % 4


def distances(clients: torch.Tensor = GRID) -> torch.Tensor:
    return (GRID[:, None] - clients).abs().sum(2)


def greedy(
    s: np.ndarray,
    k: int,
    *,
    weights: Any = None,
    preselected: Any = (),
    costs: Any = None,
    cost_budget: float = math.inf,
    cost_sensitive: bool = True,
    stop_gain: float = -math.inf,
    exclude: Any = (),
    groups: Any = None,
    caps: Any = None,
    min_distance: float = 0.0,
    distance: Any = None,
) -> tuple[list[int], list[float], float]:
    """Picks, gains and f(S) by the definition: at each pick, all candidates that are allowed."""
    n, m = s.shape
    w = np.ones(m) if weights is None else np.asarray(weights)
    kept = [int(j) for j in preselected]
    best = np.maximum(0, s[kept].max(0)) if kept else np.zeros(m)
    picks: list[int] = []
    gains: list[float] = []
    while len(picks) < k:
        spent = (
            sum((Fraction(float(costs[j])) for j in picks), Fraction(0)) if costs is not None else Fraction(0)
        )
        found, order = -1, -math.inf
        for j in range(n):
            chosen = picks + kept
            if j in chosen or j in set(np.asarray(exclude).tolist()):
                continue
            if costs is not None and float(spent + Fraction(float(costs[j]))) > cost_budget:
                continue
            if caps is not None and int(groups[j]) in caps:
                label = int(groups[j])
                if sum(int(groups[i]) == label for i in chosen) >= caps[label]:
                    continue
            if distance is not None and any(distance[i, j] < min_distance for i in chosen):
                continue
            gain = float(np.maximum(0, s[j] - best) @ w)
            worth = gain / float(costs[j]) if costs is not None and cost_sensitive else gain
            if worth > order:
                found, order = j, worth
        if found < 0:
            break
        gain = float(np.maximum(0, s[found] - best) @ w)
        if gain < stop_gain:
            break
        picks.append(found)
        gains.append(gain)
        best = np.maximum(best, s[found])
    return picks, gains, float(best @ w)


LIMITS: dict[str, dict[str, Any]] = {
    "costs": {"costs": COSTS},
    "budget": {"costs": COSTS, "cost_budget": 3.0},
    "budget-k": {"costs": COSTS, "cost_budget": 6.0, "k": 4},
    "budget-by-gain": {"costs": COSTS, "cost_budget": 3.0, "cost_sensitive": False},
    "budget-preselected": {"costs": COSTS, "cost_budget": 2.5, "preselected": torch.tensor([7, 30])},
    "nothing-fits": {"costs": COSTS, "cost_budget": 0.2},
    "tenths": {"costs": torch.full((N,), 0.1, dtype=torch.float64), "cost_budget": 1.0},
    "stop": {"stop_gain": 9.0},
    "stop-at-once": {"stop_gain": 1e6},
    "stop-above-zero": {"stop_gain": 0.5, "preselected": torch.tensor([5])},
    "stop-costs": {"stop_gain": 9.0, "costs": COSTS},
    "exclude": {"exclude": torch.tensor([1, 8, 8, 20]), "k": 9},
    "exclude-preselected": {"exclude": torch.arange(0, 12), "preselected": torch.tensor([3, 15]), "k": 9},
    "caps": {"groups": LABELS, "caps": {0: 2, 1: 0, 3: 1}, "k": 8},
    "caps-all": {"groups": LABELS, "caps": {0: 2, 1: 0, 2: 3, 3: 1}, "k": 20},
    "caps-preselected": {"groups": LABELS, "caps": {0: 2, 1: 1, 2: 3}, "k": 7, "preselected": torch.tensor([4, 9, 13])},
    "everything": {
        "costs": COSTS, "cost_budget": 5.0, "exclude": torch.arange(20, 25), "groups": LABELS, "caps": {0: 3, 2: 2},
        "stop_gain": 1.0, "preselected": torch.tensor([2]),
    },
}  # fmt: skip
PROBLEMS: dict[str, tuple[torch.Tensor, dict[str, Any], np.ndarray]] = {
    "l1": (GRID, {"metric": "l1", "offset": 24.0}, (24.0 - distances()).numpy()),
    "dot": (GRID, {"metric": "dot", "clients": CLIENTS, "weights": WEIGHTS}, (GRID @ CLIENTS.T).numpy()),
    "precomputed": (MATRIX, {"metric": "precomputed", "weights": WEIGHTS}, MATRIX.numpy()),
}


@EVERY_BACKEND
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("limits", LIMITS)
def test_is_the_greedy_rule(limits: str, problem: str, backend: str) -> None:
    if backend == "triton" and problem == "dot" and limits not in ("budget", "everything"):
        limits = (
            "budget"  # the interpreter is slow, and what differs between metrics is not what limits are about
        )
    x, options, s = PROBLEMS[problem]
    given = dict(LIMITS[limits])
    k = given.pop("k", None)
    taken = len(given.get("preselected", ()))
    asked = N - taken if k is None and not {"cost_budget", "stop_gain"} & {*given} else k
    picks, gains, objective = greedy(
        s, N if asked is None else asked, weights=options.get("weights"), **given
    )
    methods = ("lazy", "naive") if backend in ("cpu", "torch") else ("lazy",)
    for dtype in (torch.float32, torch.float64) if backend == "cpu" else (torch.float32,):
        placed = {**options, **({"clients": CLIENTS.to(dtype)} if "clients" in options else {})}
        for method in methods:
            found = locate(x.to(dtype), asked, backend=backend, method=method, **placed, **given)
            assert found.indices.tolist() == picks
            assert found.gains.tolist() == gains
            assert found.objective == objective
            served = found.assignment >= 0
            assert found.assignment.max() < len(picks)
            w = torch.ones(s.shape[1]).double() if "weights" not in options else WEIGHTS
            won = torch.bincount(found.assignment[served], w[served], minlength=len(picks))
            assert torch.equal(found.weights.double(), won)


@EVERY_BACKEND
@pytest.mark.parametrize("least", [0.0, 1.0, 3.0, 6.0, 100.0])
def test_least_distances(least: float, backend: str) -> None:
    d, s = distances().numpy(), PROBLEMS["l1"][2]
    for preselected in ((), (4, 30)):
        picks, gains, _ = greedy(s, 12, preselected=preselected, min_distance=least, distance=d)
        options = {
            "offset": 24.0,
            "min_distance": least,
            "preselected": torch.tensor(preselected, dtype=torch.int64),
        }
        for metric, x in (("l1", GRID), ("precomputed_distance", distances())):
            found = locate(x.float(), 12, backend=backend, metric=metric, **options)
            assert found.indices.tolist() == picks
            assert found.gains.tolist() == gains


@EVERY_BACKEND
def test_least_distances_of_cosine(backend: str) -> None:
    angle = torch.tensor([0, 10, 20, 90, 100, 180.0], dtype=torch.float64).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)
    found = locate(x, 6, backend=backend, min_distance=1 - math.cos(math.radians(15)))
    s = np.cos((angle[:, None] - angle).numpy())
    picks, _, _ = greedy(s, 6, min_distance=1 - math.cos(math.radians(15)), distance=1 - s)
    assert found.indices.tolist() == picks
    assert len(picks) == 4


@EVERY_BACKEND
def test_masks_are_indices(backend: str) -> None:
    mask = torch.zeros(N, dtype=torch.bool)
    mask[[3, 5, 20]] = True
    for name in ("exclude", "preselected"):
        by_index = locate(GRID, 6, backend=backend, **{name: torch.tensor([3, 5, 20])})
        for value in (mask, mask.numpy(), mask.tolist()):
            given = (
                value if isinstance(value, torch.Tensor) or torch.get_default_device().type == "cpu" else mask
            )
            assert torch.equal(locate(GRID, 6, backend=backend, **{name: given}).indices, by_index.indices)
        nobody = locate(GRID, 6, backend=backend, **{name: torch.zeros(N, dtype=torch.bool)})
        assert torch.equal(nobody.indices, locate(GRID, 6, backend=backend).indices)


@EVERY_BACKEND
def test_groups_have_their_own_limits(backend: str) -> None:
    options: dict[str, Any] = {"metric": "l1", "offset": 24.0, "stop_gain": 12.0}
    both = locate(GRID, 24, backend=backend, groups=LABELS, exclude=[0, 1, 2], **options)
    begin = 0
    for label in range(4):
        members = (label == LABELS).nonzero()[:, 0]
        out = [i for i, j in enumerate(members.tolist()) if j in (0, 1, 2)]
        # Allocated as without the excluded: by the sizes that are left.
        k = int(fc.allocate_budgets([9, 8, 8, 9], 24)[label])
        alone = locate(GRID[members], k, backend=backend, exclude=out, **options)
        count = len(alone.indices)
        assert torch.equal(both.indices[begin : begin + count], members[alone.indices])
        assert torch.equal(both.gains[begin : begin + count], alone.gains)
        begin += count
    assert begin == len(both.indices) < 24
    shared = locate(GRID, 24, backend=backend, groups=LABELS, clients=CLIENTS, **options)
    assert shared.assignment.max() < len(shared.indices)
    none = locate(GRID, 24, backend=backend, groups=LABELS, clients=CLIENTS, **{**options, "stop_gain": 1e9})
    assert len(none.indices) == none.objective == 0
    assert (none.assignment == -1).all()


@EVERY_BACKEND
def test_stops_beside_an_offset_far_above_all_distances(backend: str) -> None:
    """The first gain has the whole offset in it."""
    x = GRID.float()
    for stop_gain in (1e3, 5.0, 1e30):
        near = locate(
            x,
            None,
            backend=backend,
            metric="l1",
            offset=24.0,
            stop_gain=stop_gain if stop_gain < 100 else 0.0,
        )
        far = locate(x, None, backend=backend, metric="l1", offset=2.0**40, stop_gain=stop_gain)
        expected = {1e3: 1, 5.0: len(near.indices), 1e30: 0}[stop_gain]
        assert far.indices.tolist() == near.indices.tolist()[:expected]


@EVERY_BACKEND
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of NumPy, in Triton's interpreter
@pytest.mark.parametrize("power", [-80, 80])
def test_limits_of_points_that_are_scaled(power: int, backend: str) -> None:
    """Squares of such points leave float32."""
    x, unit = GRID.float() * 2.0**power, 4.0**power
    limits = {"stop_gain": 20.0, "min_distance": 5.0}
    expected = locate(GRID.float(), None, backend=backend, metric="sqeuclidean", **limits)
    if power < 0:
        with pytest.raises(ValueError, match="underflow"):
            locate(
                x,
                None,
                backend=backend,
                metric="sqeuclidean",
                **{name: v * unit for name, v in limits.items()},
            )
        return
    with pytest.raises(ValueError, match="overflow"):
        locate(
            x, None, backend=backend, metric="sqeuclidean", **{name: v * unit for name, v in limits.items()}
        )
    scaled = locate(
        x,
        None,
        backend=backend,
        metric="euclidean",
        stop_gain=20.0 * 2.0**power,
        min_distance=2.5 * 2.0**power,
    )
    plain = locate(GRID.float(), None, backend=backend, metric="euclidean", stop_gain=20.0, min_distance=2.5)
    assert torch.equal(scaled.indices, plain.indices)
    assert 0 < len(plain.indices) < N
    assert 0 < len(expected.indices) < N


@EVERY_BACKEND
def test_stochastic_within_limits(backend: str) -> None:
    options: dict[str, Any] = {
        "metric": "l1",
        "offset": 24.0,
        "costs": COSTS,
        "cost_budget": 5.0,
        "exclude": [3, 4],
    }
    some = locate(GRID, 20, backend=backend, method="stochastic", seed=5, **options)
    assert float(COSTS[some.indices].sum()) <= 5
    assert not {3, 4} & {*some.indices.tolist()}
    left = [j for j in range(N) if j not in {3, 4, *some.indices.tolist()}]
    assert len(some.indices) == 20 or float(COSTS[left].min()) + float(COSTS[some.indices].sum()) > 5
    every = locate(GRID, 20, backend=backend, method="stochastic", epsilon=1e-300, **options)
    assert torch.equal(every.indices, locate(GRID, 20, backend=backend, **options).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_the_work_cannot_be_seen(dtype: torch.dtype, backend: str) -> None:
    n, k = (
        (4200, 12) if backend == "cpu" and dtype == torch.float32 else (150, 20)
    )  # 4,096 and more look ahead
    x = points(n, 4, 3, dtype)
    costs = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options: dict[str, Any] = {
        "backend": backend, "costs": costs, "cost_budget": 0.7 * k, "exclude": torch.arange(0, n, 3), "metric": "euclidean",
    }  # fmt: skip
    expected = fc.facility_location(x, k, method="naive", memory_budget=0, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for memory_budget in (0, 300_000, 2**28):
                found = fc.facility_location(x, k, memory_budget=memory_budget, **options)
                assert torch.equal(found.indices, expected.indices)
                assert torch.equal(found.gains, expected.gains)
                assert torch.equal(found.assignment, expected.assignment)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"costs": COSTS[1:]}, ValueError, "costs must have"),
        ({"costs": COSTS - 0.25}, ValueError, r"costs must be > 0, in .*, got 0.0 at position 0"),
        ({"costs": COSTS * math.nan}, ValueError, "costs must be > 0, .*got nan at position 0"),
        ({"cost_budget": 3.0}, ValueError, "cost_budget needs costs"),
        ({"costs": COSTS, "cost_budget": -1}, ValueError, "cost_budget must be a number >= 0, got -1.0"),
        ({"costs": COSTS, "cost_budget": math.nan}, ValueError, "cost_budget must be"),
        ({"costs": COSTS, "groups": LABELS}, ValueError, "costs are for one problem, got groups"),
        ({"costs": COSTS, "cost_sensitive": 1}, TypeError, "cost_sensitive must be True or False, got int"),
        ({"stop_gain": math.nan}, ValueError, "stop_gain must be"),
        ({"stop_gain": "1"}, TypeError, "stop_gain must be"),
        ({"stop_gain": 1.0, "method": "stochastic"}, ValueError, "stop_gain needs method 'lazy' or 'naive'"),
        ({"exclude": [N]}, ValueError, rf"exclude must be in \[0, {N}\), got {N}"),
        ({"exclude": [-1]}, ValueError, "exclude must be in"),
        ({"exclude": [0.5]}, TypeError, "exclude"),
        ({"exclude": torch.ones(N - 1, dtype=torch.bool)}, ValueError, r"exclude must have shape \(37,\) as a mask"),
        ({"exclude": list(range(30)), "preselected": [31]}, ValueError, "k must be at most 6 .37 candidates less 31 preselected or"),
        ({"preselected": torch.ones(3, dtype=torch.bool)}, ValueError, "preselected must have shape"),
        ({"caps": {0: 1}}, ValueError, "caps need groups"),
        ({"caps": {0: -1}, "groups": LABELS}, ValueError, "caps must be >= 0, got -1 for label 0"),
        ({"caps": {0: 1.5}, "groups": LABELS}, TypeError, r"caps\[0\]"),
        ({"caps": {0: 1}, "groups": LABELS, "budgets": [2, 2, 1, 2]}, ValueError, "caps and budgets exclude each other"),
        ({"min_distance": -1.0}, ValueError, "min_distance must be a number >= 0"),
        ({"min_distance": 1.0, "metric": "dot"}, ValueError, "min_distance needs distances, of which metric 'dot' has none"),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fc.facility_location(GRID, 7, **options)


def test_in_a_graph() -> None:
    exclude, costs = torch.tensor([1, 2, 30]), COSTS

    def choose(x: torch.Tensor) -> torch.Tensor:
        return fc.facility_location(x, 5, metric="l1", exclude=exclude, costs=costs).indices

    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")(GRID)
    assert torch.equal(compiled, choose(GRID))
    for limit in ({"stop_gain": 1.0}, {"costs": costs, "cost_budget": 2.0}, {"min_distance": 1.0}):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=f"{[*limit][-1]} is not for torch.compile"):
            torch.compile(
                lambda x, limit=limit: fc.facility_location(x, 5, metric="l1", **limit).indices,
                fullgraph=True,
                backend="aot_eager",
            )(GRID)


@EVERY_BACKEND
def test_a_run_that_is_closed_and_stopped(backend: str) -> None:
    """The low-level calls, in an order that the public function does not have."""
    from flashcoreset._core.dispatch import kernels_of

    problem = fc.kernels.FacilityLocationProblem(MATRIX, metric="precomputed")
    run = kernels_of(backend, "facility_location").FacilityLocation(problem)
    run.close(torch.tensor([0, 1, 2, 3]))
    first = run.pick()
    assert run.pick(stop_gain=1e9) == -1
    run.close(torch.tensor([first, 4, 5]))  # what is picked stays picked
    assert run.step(2) == 3
    second = run.pick(naive=True)
    picks, gains, objective = greedy(MATRIX.numpy(), 4, exclude=[0, 1, 2, 3])
    assert not {4, 5} & {*picks}
    k = run.step(100)
    assert k == N - 6
    assert run.pick() == -1
    indices, assignment = torch.empty(k, dtype=torch.int64), torch.empty(M, dtype=torch.int64)
    found, won = torch.empty(k, dtype=torch.float64), torch.empty(k, dtype=torch.float64)
    run.finish(indices, found, won, assignment)
    assert indices[:4].tolist() == picks == [first, *picks[1:3], second]
    assert found[:4].tolist() == gains
    assert objective <= float(found.sum())
