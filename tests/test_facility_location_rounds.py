"""Rounds of facility location, on every backend, against the definition; and the warning that picks gain nothing."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE, locate, points
from conftest import EVERY_BACKEND

import flashcoreset as fc
from flashcoreset.facility_location.reference import greedy_in_rounds

N, M = 29, 6
# Whole numbers, so that gains are exact in every type, and many of them tie.
POOL = torch.randint(0, 9, (N, 3), generator=torch.Generator().manual_seed(0)).double()
TARGETS = torch.randint(0, 9, (M, 3), generator=torch.Generator().manual_seed(1)).double()
WEIGHTS = torch.tensor([1.0, 0, 2, 1, 3, 1], dtype=torch.float64)
LABELS = torch.arange(N) % 3
COSTS = (torch.arange(N) * 7 % 5 + 1).double() / 4
L1 = 24.0 - (POOL[:, None] - TARGETS).abs().sum(2)
PROBLEMS: dict[str, tuple[torch.Tensor, dict[str, Any], torch.Tensor]] = {
    "l1": (POOL, {"metric": "l1", "offset": 24.0, "clients": TARGETS}, L1),
    "dot": (POOL - 4, {"metric": "dot", "clients": TARGETS - 4, "weights": WEIGHTS}, (POOL - 4) @ (TARGETS - 4).T),
    "precomputed": (L1 - 12, {"metric": "precomputed", "weights": WEIGHTS}, L1 - 12),
}  # fmt: skip


def brute_force(
    s: np.ndarray,
    k: int,
    rounds: int,
    *,
    weights: Any = None,
    preselected: Any = (),
    stop_gain: float = -math.inf,
    exclude: Any = (),
    groups: Any = None,
    caps: Any = None,
    costs: Any = None,
    cost_budget: float = math.inf,
    least: np.ndarray | None = None,
) -> tuple[list[int], list[float], list[int], float]:
    """Picks, their gains and rounds, and f of all of them, candidate by candidate; `least` [n, n] says which candidates are too near."""
    n, m = s.shape
    w = np.ones(m) if weights is None else np.asarray(weights)
    before = [int(j) for j in preselected]
    best = np.maximum(0, s[before].max(0)) if before else np.zeros(m)
    picks: list[int] = []
    gains: list[float] = []
    numbers: list[int] = []
    number, is_fresh, is_last = 0, not before, rounds == 1
    while len(picks) < k:
        chosen = picks + before
        allowed = [
            j
            for j in range(n)
            if j not in chosen
            and j not in exclude
            and not (caps and int(groups[j]) in caps and sum(groups[i] == groups[j] for i in chosen) >= caps[int(groups[j])])
            and not (costs is not None and float(sum(costs[i] for i in [*picks, j])) > cost_budget)
            and not (least is not None and any(least[i, j] for i in chosen))
        ]  # fmt: skip
        worth = [float(np.maximum(0, s[j] - best) @ w) for j in allowed]
        keys = worth if costs is None else [g / float(costs[j]) for g, j in zip(worth, allowed, strict=True)]
        place = int(np.argmax(keys)) if allowed else -1
        is_last = is_last or number == rounds - 1 or (is_fresh and (not allowed or worth[place] <= 0))
        if not allowed or worth[place] < stop_gain or (worth[place] <= 0 and not is_last):
            if is_last or is_fresh:
                break
            number, best, is_fresh = number + 1, np.zeros(m), True
            continue
        picks.append(allowed[place])
        gains.append(worth[place])
        numbers.append(number)
        best, is_fresh = np.maximum(best, s[allowed[place]]), False
    every = picks + before
    return (
        picks,
        gains,
        numbers,
        float(np.maximum(0, s[every].max(0)) @ w) if every else 0.0,
    )


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "preselected": {"preselected": torch.tensor([4, 9])},
    "preselected-serve-all": {"preselected": torch.arange(20)},
    "exclude": {"exclude": torch.tensor([0, 5, 6])},
    "caps": {"groups": LABELS, "caps": {0: 3, 2: 4}},
    "stop": {"stop_gain": 3.0},
    "stop-at-once": {"stop_gain": 1e6},
    "costs": {"costs": COSTS, "cost_budget": 6.0},
    "everything": {
        "costs": COSTS, "cost_budget": 5.0, "exclude": torch.arange(8, 11), "groups": LABELS, "caps": {0: 2},
        "stop_gain": 1.0, "preselected": torch.tensor([2]),
    },
}  # fmt: skip


# What differs between metrics is not what rounds are about.
OF_EVERY_METRIC = ("plain", "preselected-serve-all", "everything")


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("call", "problem"),
    [(call, problem) for call in CALLS for problem in PROBLEMS if problem == "l1" or call in OF_EVERY_METRIC],
)
def test_is_the_definition(call: str, problem: str, backend: str) -> None:
    x, options, s = PROBLEMS[problem]
    given = CALLS[call]
    k = min(14, N - len(given.get("preselected", ())))
    for rounds in (2, 5) if backend in ("cpu", "torch") else (3,):
        picks, gains, numbers, objective = brute_force(
            s.numpy(), k, rounds, weights=options.get("weights"), **given
        )
        for dtype in (torch.float32, torch.float64) if backend == "cpu" else (torch.float32,):
            placed = {
                **options,
                **({"clients": options["clients"].to(dtype)} if "clients" in options else {}),
            }
            for method in ("lazy", "naive") if backend in ("cpu", "torch") else ("lazy",):
                found = locate(
                    x.to(dtype), k, backend=backend, method=method, rounds=rounds, **placed, **given
                )
                assert found.indices.tolist() == picks
                assert found.gains.tolist() == gains
                assert found.objective == objective
                assert found.rounds is not None
                assert found.served_by is not None
                rounds_of = found.rounds.cpu().tolist()
                assert rounds_of == numbers
                check_who_serves(
                    found, s, options.get("weights", torch.ones(M)), given.get("preselected", ())
                )


def check_who_serves(found: fc.Selection, s: torch.Tensor, weights: torch.Tensor, preselected: Any) -> None:
    served_by, numbers = found.served_by.cpu(), found.rounds.cpu()
    assert torch.equal(found.assignment, served_by[0])
    won = torch.zeros(len(found.indices)).double()
    for number, row in enumerate(served_by):
        own = (numbers == number).nonzero()[:, 0]
        covered = torch.zeros(s.shape[1]).double()
        if number == 0 and len(preselected):
            covered = covered.maximum(s[torch.as_tensor(preselected)].amax(0))
        for client in range(s.shape[1]):
            values = s[found.indices[own], client]
            best = int((values == values.max()).nonzero()[0]) if len(own) else -1
            expected = int(own[best]) if len(own) and values[best] > covered[client] else -1
            assert row[client] == expected
            if expected >= 0:
                won[expected] += weights[client]
    assert torch.equal(found.weights.double(), won)


def test_the_reference_by_hand() -> None:
    # Two clients; candidate 0 is good for both, 1 and 2 are the best for one each, 3 is worth nothing.
    s = torch.tensor([[3.0, 3], [4, 0], [0, 5], [0, 0]]).double()
    expected = [(0, 6.0, 0), (2, 2.0, 0), (1, 1.0, 0)]
    assert greedy_in_rounds(s, 3, 2, torch.ones(2), []) == expected
    assert greedy_in_rounds(s, 3, 2, torch.ones(2), [0]) == [(2, 2.0, 0), (1, 1.0, 0), (3, 0.0, 1)]
    wide = torch.cat([s, s[:3]])
    found = fc.facility_location(wide, 7, metric="precomputed", rounds=2)
    again = greedy_in_rounds(wide, 7, 2, torch.ones(2), [])
    assert again == [*expected, (4, 6.0, 1), (6, 2.0, 1), (5, 1.0, 1), (3, 0.0, 1)]
    assert [*zip(found.indices.tolist(), found.gains.tolist(), found.rounds.tolist(), strict=True)] == again
    assert found.served_by.tolist() == [[2, 1], [5, 4]]
    assert found.weights.tolist() == [0, 1, 1, 0, 1, 1, 0]


@EVERY_BACKEND
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_whole_rounds_pick_the_most_similar_of_each_client(metric: str, backend: str) -> None:
    n, rounds = (24, 2) if backend in ("cuda", "triton") else (300, 4)
    pool, targets = points(n, 4, 1, torch.float32), points(7, 4, 2, torch.float32)
    found = locate(pool, n - 5, backend=backend, metric=metric, clients=targets, rounds=rounds + 1)
    whole = {*found.indices[found.rounds.cpu() < rounds].tolist()}
    if metric == "cosine":
        s = torch.nn.functional.normalize(targets, dim=1) @ torch.nn.functional.normalize(pool, dim=1).T
    else:
        s = -torch.cdist(targets, pool)
    for row in s:
        nearest = row.argsort(descending=True)[:rounds]
        if metric == "cosine":
            nearest = nearest[row[nearest] > 0]
        assert {*nearest.tolist()} <= whole
    # A round is a call without the picks of the rounds before.
    first = int((found.rounds == 0).sum())
    second = locate(
        pool, 3, backend=backend, metric=metric, clients=targets, exclude=found.indices[:first].to(DEVICE)
    )
    assert torch.equal(second.indices, found.indices[first : first + 3])
    assert torch.equal(second.gains, found.gains[first : first + 3])


@EVERY_BACKEND
def test_near_duplicates_are_left_out_of_all_rounds(backend: str) -> None:
    distance = (POOL[:, None] - POOL).abs().sum(2).numpy()
    options: dict[str, Any] = {
        "metric": "l1",
        "offset": 24.0,
        "clients": TARGETS.float(),
        "min_distance": 4.0,
    }
    found = locate(POOL.float(), 14, backend=backend, rounds=3, **options)
    picks, gains, numbers, objective = brute_force(L1.numpy(), 14, 3, least=distance < 4.0)
    assert found.indices.tolist() == picks
    assert found.gains.tolist() == gains
    assert found.rounds.tolist() == numbers
    assert found.objective == objective
    assert len({*numbers}) == 3


@EVERY_BACKEND
@pytest.mark.parametrize("shared", [True, False])
def test_each_group_has_its_rounds(shared: bool, backend: str) -> None:
    if shared:
        x, s, options = POOL, L1, {"clients": TARGETS.float(), "offset": 24.0, "metric": "l1"}
    else:
        x = POOL[torch.arange(N) // 2]  # every row twice, so that a second round has something to serve
        s, options = 24.0 - (x[:, None] - x).abs().sum(2), {"offset": 24.0, "metric": "l1"}
    budgets = {0: 9, 1: 0, 2: 7}
    found = locate(
        x.float(), None, backend=backend, groups=LABELS, budgets=budgets, rounds=2, preselected=[1, 2], **options
    )  # fmt: skip
    begin = 0
    for label in (0, 2):
        members = (label == LABELS).nonzero()[:, 0]
        own = s[members] if shared else s[members[:, None], members]
        before = (members == 2).nonzero()[:, 0]
        picks, gains, numbers, _ = brute_force(own.numpy(), budgets[label], 2, preselected=before)
        count = len(picks)
        assert found.indices[begin : begin + count].tolist() == members[picks].tolist()
        assert found.gains[begin : begin + count].tolist() == gains
        assert found.rounds[begin : begin + count].tolist() == numbers
        begin += count
    assert begin == len(found.indices) == 16
    if shared:
        check_who_serves(found, s, torch.ones(M), [1, 2])
        assert found.objective == float(s[[*found.indices.tolist(), 1, 2]].amax(0).clamp_min(0).sum())
    else:
        served = found.served_by[found.served_by >= 0]
        assert torch.equal(found.weights.long(), torch.bincount(served, minlength=16))
        clients = (found.served_by >= 0).nonzero()
        pick = found.indices[found.served_by[clients[:, 0], clients[:, 1]]]
        assert torch.equal(LABELS[pick], LABELS[clients[:, 1]])
        assert torch.equal(found.rounds[found.served_by[clients[:, 0], clients[:, 1]]], clients[:, 0])


def test_of_no_number_of_threads_and_no_memory(backend: str) -> None:
    n = 300 if backend == "torch" else 700
    pool, targets = points(n, 5, 4, torch.float32), points(40, 5, 5, torch.float32)
    options: dict[str, Any] = {"clients": targets, "rounds": 9, "metric": "euclidean", "backend": backend}
    expected = fc.facility_location(pool, 150, method="naive", memory_budget=0, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = fc.facility_location(pool, 150, **options)
            for name in ("indices", "gains", "weights", "assignment", "rounds", "served_by"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
            assert found.objective == expected.objective
    finally:
        torch.set_num_threads(threads)
    assert len(found.served_by) > 2
    assert found.indices.unique().numel() == 150


def test_progress_goes_through_all_rounds() -> None:
    seen: list[tuple[int, int]] = []
    fc.facility_location(
        points(50, 3, 1), 20, clients=points(5, 3, 2), rounds=9, progress=lambda *now: seen.append(now)
    )
    assert [done for done, _ in seen if done] == [*range(1, 21)]
    assert {total for _, total in seen} == {20}


def test_scaled_points_and_far_offsets() -> None:
    """Squares of such points leave float32; and an offset far above all distances stands in the first gain of each round."""
    pool, targets = POOL.float(), TARGETS.float()
    plain = fc.facility_location(pool, 14, metric="euclidean", clients=targets, rounds=9)
    power = 2.0**80
    scaled = fc.facility_location(pool * power, 14, metric="euclidean", clients=targets * power, rounds=9)
    assert torch.equal(scaled.indices, plain.indices)
    assert torch.equal(scaled.served_by, plain.served_by)
    far = fc.facility_location(pool, 14, metric="l1", clients=targets, rounds=9, offset=2.0**30)
    near = fc.facility_location(pool, 14, metric="l1", clients=targets, rounds=9, offset=64.0)
    assert torch.equal(far.indices, near.indices)
    assert torch.equal(far.rounds, near.rounds)
    first = near.rounds.diff(prepend=torch.tensor([-1])) > 0
    assert torch.equal(far.gains[~first], near.gains[~first])
    assert (far.gains[first] - near.gains[first] == M * (2.0**30 - 64)).all()


def test_selections_of_one_round_are_as_before() -> None:
    found = fc.facility_location(POOL, 5, metric="l1", clients=TARGETS, rounds=1)
    assert found.rounds is found.served_by is None
    assert torch.equal(found.indices, fc.facility_location(POOL, 5, metric="l1", clients=TARGETS).indices)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rounds": 0}, ValueError, "rounds must be >= 1, got 0"),
        ({"rounds": -3}, ValueError, "rounds must be >= 1, got -3"),
        ({"rounds": 1.5}, TypeError, "rounds must be an int"),
        ({"rounds": None}, TypeError, "rounds must be an int"),
        ({"rounds": True}, TypeError, "rounds must be an int"),
        ({"rounds": 2, "method": "stochastic"}, ValueError, "rounds needs method 'lazy' or 'naive', got 'stochastic'"),
    ],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fc.facility_location(POOL, 7, clients=TARGETS, **options)


def test_memory_of_rounds() -> None:
    one, many = (fc.memory_estimate(fc.facility_location, (500, 3), (50, 3), k=100, rounds=r) for r in (1, 4))
    assert many - one >= 4 * 50 * 8 + 100 * 8  # served_by and rounds


def gained_of(caught: Any) -> tuple[int, int]:
    assert len(caught) == 1
    assert caught[0].filename == __file__
    gained, k = re.match(r"(\d+) of (\d+) picks gain something", str(caught[0].message)).groups()
    return int(gained), int(k)


def test_one_warning_says_how_many_picks_gain() -> None:
    pool, targets = points(300, 8, 1), points(10, 8, 2)
    with pytest.warns(fc.InputWarning) as caught:
        found = fc.facility_location(pool, 100, clients=targets)
    gained = int((found.gains > 0).sum())
    assert gained_of(caught) == (gained, 100)
    rounds = int(re.search(r"rounds=(\d+) or more", str(caught[0].message))[1])
    # The remedies that the warning names.
    assert (fc.facility_location(pool, 100, clients=targets, rounds=rounds + 1).gains > 0).all()
    assert len(fc.facility_location(pool, 100, clients=targets, stop_gain=1e-9).indices) == gained
    assert (fc.facility_location(pool, gained, clients=targets).gains > 0).all()
    with pytest.warns(fc.InputWarning) as caught:
        fc.facility_location(pool, 100, clients=targets, rounds=2)
    assert gained < gained_of(caught)[0] < 100
    with pytest.warns(fc.InputWarning, match="method='lazy'"):
        fc.facility_location(pool, 100, clients=targets, method="stochastic")
    with pytest.warns(fc.InputWarning) as caught:
        fc.facility_location(pool, 60, clients=targets, groups=torch.arange(300) % 2)
    assert gained_of(caught)[1] == 60
    with pytest.warns(fc.InputWarning, match="0 of 2 picks .*clients that some candidate is similar to"):
        fc.facility_location(torch.tensor([[1.0], [1.0]]), 2, clients=torch.tensor([[-1.0]]))


def test_picks_that_serve_themselves_are_not_warned_of() -> None:
    twice = points(20, 3, 1).repeat(2, 1)
    assert (fc.facility_location(twice, 40).gains == 0).sum() == 20
