"""flashcoreset.distributed on 1 to 4 gloo processes: the bits of one machine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ranks import MOST, Ranks

import flashcoreset as fc
from flashcoreset.distributed import greedy
from flashcoreset.distributed.order import ordered_bits, values_of_bits
from flashcoreset.distributed.sampled import sample_size
from flashcoreset.distributed.sums import row_norms

N, M, K = 90, 50, 12
POINTS = ("cosine", "dot", "euclidean", "sqeuclidean", "l1")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks()
    yield group
    group.close()


def shares(n: int, world: int) -> list[slice]:
    """Unequal shards: with 3 ranks an empty one, with 4 some that are smaller than K."""
    ends = {1: [n], 2: [n // 3, n], 3: [n // 2, n // 2, n], 4: [5, n // 2, n // 2 + 1, n]}[world]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def points(n: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(6, 5, generator=g)
    x = centers[torch.randint(0, 6, (n,), generator=g)] + torch.randn(n, 5, generator=g)
    x[n // 2] = x[0]  # a duplicate on another rank
    x[n - 1] = 0
    return x.to(dtype)


def weights(n: int) -> torch.Tensor:
    w = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w[3] = 0
    return w


LABELS = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
NAMES = np.array(["blue", "green", "red"])[LABELS.numpy()]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weights": True},
    "groups": {"groups": LABELS},
    "budgets": {"groups": NAMES, "budgets": {"red": 2, "blue": 7, "green": 3}, "k": None},
    "dates": {
        "groups": np.array(["2024-01-02", "2023-05-06", "2025-07-08"], dtype="datetime64[D]")[LABELS.numpy()]
    },
    "preselected": {"preselected": [3, 80, 10]},
    "all": {"groups": LABELS, "weights": True, "preselected": [0, 60]},
    "clients": {"clients": True},
    "clients-all": {"clients": True, "groups": LABELS, "weights": True, "preselected": [0, 60]},
}
# What rules candidates out, ends the picks, or says what they cost. Distances and gains are shares of what each metric has.
LIMITS: dict[str, dict[str, Any]] = {
    "caps": {"groups": NAMES, "caps": {"red": 2, "blue": 4}, "preselected": [3, 80]},
    "caps-fewer": {"groups": LABELS, "caps": [3, 2, 0], "weights": True},
    "exclude": {"exclude": [0, 1, 2, 44, 45, 80], "preselected": [3]},
    "exclude-budgets": {"exclude": [0, 44, 80], "groups": NAMES, "budgets": {"red": 2, "blue": 7, "green": 3}, "k": None},
    "stop": {"stop_gain": 7, "k": None},
    "stop-groups": {"stop_gain": 4, "groups": LABELS, "preselected": [60]},
    "costs": {"costs": True},
    "cost-budget": {"costs": True, "cost_budget": 9.0, "k": None, "preselected": [3], "weights": True},
    "insensitive": {"costs": True, "cost_budget": 9.0, "cost_sensitive": False},
    "near": {"min_distance": 0.4, "preselected": [3, 80]},
    "near-groups": {"min_distance": 0.4, "groups": LABELS, "k": 40},
    "rounds": {"clients": True, "rounds": 3, "k": 60, "preselected": [3, 80], "weights": True},
    "rounds-stop": {"clients": True, "rounds": 99, "stop_gain": 5, "k": 50},
    "rounds-groups": {"clients": True, "rounds": 2, "k": 70, "groups": LABELS, "preselected": [0, 60]},
    "rounds-of-themselves": {"rounds": 2, "k": 80, "groups": NAMES, "weights": True, "stop_gain": 9},
    "all-limits": {"clients": True, "rounds": 4, "k": 60, "groups": NAMES, "caps": {"red": 12, "blue": 9}, "min_distance": 0.15,
                   "costs": True, "cost_budget": 40.0, "exclude": [9, 70], "preselected": [5], "weights": True},
}  # fmt: skip
CASES |= LIMITS
BEFORE_LIMITS = [case for case in CASES if case not in LIMITS]


def arguments_of(metric: str, case: str, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
    """The arguments for one machine."""
    options: dict[str, Any] = {"k": K, "metric": metric, **CASES[case]}
    matrix = metric.startswith("precomputed")
    x = points(N, 0, dtype)
    if matrix:
        x = torch.rand(N, N, generator=torch.Generator().manual_seed(4)).to(dtype)
    if options.pop("clients", False):
        options["clients"] = points(M, 5, dtype)
    if options.pop("weights", False):
        options["weights"] = weights(M if "clients" in options else N)
    if options.pop("costs", False):
        options["costs"] = (
            torch.rand(N, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.5
        )
    if "min_distance" in options:
        plain = {"precomputed_distance": "l1"}.get(metric, metric)
        far = x.max() if matrix else fc.kernels.cpu.pairwise(x, x, metric=plain).max()
        options["min_distance"] *= 0.5 if metric == "cosine" else float(far) / 2
    if "stop_gain" in options:  # the gain of that pick of a run without
        chosen = {name: options[name] for name in ("clients", "groups", "weights") if name in options}
        options["stop_gain"] = float(
            fc.facility_location(x, 30, metric=metric, **chosen).gains[options["stop_gain"]]
        )
    return x, options


def pick(
    group: Any,
    rank: int,
    world: int,
    metric: str,
    cases: list[str],
    dtype: torch.dtype,
    extra: dict[str, Any],
) -> list[Any]:
    """What one rank finds for several cases."""
    found = []
    for case in cases:
        x, options = arguments_of(metric, case, dtype)
        share = shares(N, world)[rank]
        own = shares(M, world)[rank] if "clients" in options else share
        if "clients" in options:
            options["clients"] = options["clients"][own]
        if "weights" in options and not metric.startswith("precomputed"):
            options["weights"] = options["weights"][own]
        for name in ("groups", "costs"):
            if name in options:
                options[name] = options[name][share]
        s = fc.distributed.facility_location(x[share], **{**options, **extra}, group=group)
        own_parts = s.assignment, s.served_by
        found.append((s.indices, s.gains, s.weights, own_parts, s.objective, s.offset, s.rounds, s.info))
    return found


def check_same(
    ranks: Ranks,
    metric: str,
    cases: list[str],
    world: int,
    dtype: torch.dtype = torch.float32,
    run: Callable[..., Any] = pick,
    **extra: Any,
) -> None:
    answers = ranks.run(run, metric, cases, dtype, extra, world=world)
    for place, case in enumerate(cases):
        x, options = arguments_of(metric, case, dtype)
        one = fc.facility_location(
            x, **options, **{k: v for k, v in extra.items() if k in ("offset", "backend")}
        )
        for answer in answers:
            indices, gains, won, _, objective, offset, rounds, info = answer[place]
            assert len(info["pick_bytes"]) == len(indices)
            assert torch.equal(indices, one.indices), (metric, case)
            assert torch.equal(gains, one.gains), (metric, case)
            assert torch.equal(won, one.weights), (metric, case)
            assert (objective, offset) == (one.objective, one.offset), (metric, case)
            assert (rounds is None) == (one.rounds is None)
            assert rounds is None or torch.equal(rounds, one.rounds), (metric, case)
        parts = [answer[place][3] for answer in answers]
        parts = parts[:1] if metric.startswith("precomputed") else parts
        assert torch.equal(torch.cat([part for part, _ in parts]), one.assignment), (metric, case)
        if one.served_by is not None:
            assert torch.equal(torch.cat([part for _, part in parts], 1), one.served_by), (metric, case)


@pytest.mark.parametrize("metric", POINTS)
def test_four_ranks_make_the_picks_of_one_machine(ranks: Ranks, metric: str) -> None:
    check_same(ranks, metric, BEFORE_LIMITS, 4)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_any_number_of_ranks_makes_the_picks_of_one_machine(ranks: Ranks, metric: str, world: int) -> None:
    check_same(ranks, metric, ["plain", "all", "clients-all"], world)


@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
@pytest.mark.parametrize(("metric", "world"), [("cosine", 1), ("euclidean", 2), ("cosine", 3), ("euclidean", 4), ("sqeuclidean", 4), ("l1", 2)])  # fmt: skip
def test_limits_are_those_of_one_machine(ranks: Ranks, metric: str, world: int) -> None:
    check_same(ranks, metric, list(LIMITS), world)


@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
def test_limits_of_other_similarities(ranks: Ranks) -> None:
    without_distances = [case for case, options in LIMITS.items() if "min_distance" not in options]
    check_same(ranks, "dot", without_distances, 3)
    of_matrices = [case for case, options in LIMITS.items() if "clients" not in options]
    check_same(ranks, "precomputed_distance", of_matrices, 4)
    check_same(ranks, "precomputed", [case for case in of_matrices if case in without_distances], 2)
    # An offset far above all distances is left out of the gains that are compared with stop_gain.
    check_same(ranks, "euclidean", ["stop", "near", "rounds-stop"], 3, offset=1e6)
    check_same(ranks, "cosine", ["cost-budget", "near", "all-limits"], 3, memory_budget=2000)


def of_a_wide_matrix(group: Any, rank: int, world: int, columns: int) -> torch.Tensor:
    s, share = (
        torch.rand(N, 120, generator=torch.Generator().manual_seed(4))[:, :columns],
        shares(N, world)[rank],
    )
    return fc.distributed.facility_location(
        s[share],
        30,
        metric="precomputed",
        groups=LABELS[share],
        caps={0: 3, 2: 9},
        rounds=3,
        exclude=[1],
        group=group,
    ).indices


@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
@pytest.mark.parametrize("columns", [8, 120])
def test_limits_of_a_matrix_that_is_not_square(ranks: Ranks, columns: int) -> None:
    s = torch.rand(N, 120, generator=torch.Generator().manual_seed(4))[:, :columns]
    one = fc.facility_location(
        s, 30, metric="precomputed", groups=LABELS, caps={0: 3, 2: 9}, rounds=3, exclude=[1]
    )
    assert all(torch.equal(found, one.indices) for found in ranks.run(of_a_wide_matrix, columns, world=3))


def pick_with_a_short_front(group: Any, rank: int, world: int, *arguments: Any) -> list[Any]:
    """As `pick`, where the list of the best bounds is filled and cut again and again."""
    before = greedy.FRONT, greedy._MOST_FRONT
    greedy.FRONT, greedy._MOST_FRONT = 3, 8
    try:
        return pick(group, rank, world, *arguments)
    finally:
        greedy.FRONT, greedy._MOST_FRONT = before


@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
def test_closed_candidates_stay_closed_where_the_front_is_cut(ranks: Ranks) -> None:
    cases = ["plain", "groups", "caps", "cost-budget", "near", "rounds-stop", "all-limits"]
    check_same(ranks, "euclidean", cases, 3, run=pick_with_a_short_front)


@pytest.mark.parametrize("metric", ["precomputed", "precomputed_distance"])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_of_a_matrix_are_shared_out(ranks: Ranks, metric: str, world: int) -> None:
    check_same(ranks, metric, ["plain", "weights", "preselected", "all"], world)


def test_other_types_offsets_budgets_and_backends(ranks: Ranks) -> None:
    check_same(ranks, "dot", ["plain", "all"], 3, torch.float64)
    check_same(ranks, "cosine", ["plain"], 2, torch.bfloat16)
    check_same(ranks, "euclidean", ["weights", "groups"], 3, offset=1e6)
    check_same(ranks, "euclidean", ["weights", "groups"], 2, offset=30.0)
    # Little memory: rows and lists are dropped again and again.
    check_same(ranks, "cosine", ["plain", "clients-all"], 3, memory_budget=2000)
    check_same(ranks, "cosine", ["plain"], 2, backend="torch")


def few_clients(group: Any, rank: int, world: int, exact: bool) -> tuple[torch.Tensor, list[str]]:
    x = points(N, 0)[shares(N, world)[rank]]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        s = fc.distributed.facility_location(
            x, 9, clients=points(4, 8)[shares(4, world)[rank]], exact=exact, group=group
        )
    return s.indices, [str(warning.message) for warning in told]


@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
def test_picks_that_gain_nothing_are_told_once(ranks: Ranks) -> None:
    one = fc.facility_location(points(N, 0), 9, clients=points(4, 8))
    gained = int((one.gains > 0).sum())
    assert gained < 9
    (indices, told), *others = ranks.run(few_clients, True, world=2)
    assert torch.equal(indices, one.indices)
    assert [text for text in told if f"{gained} of 9 picks gain something" in text]
    assert not [text for _, texts in others for text in texts if "gain something" in text]
    for rank, (_, texts) in enumerate(ranks.run(few_clients, False, world=2)):
        assert len([text for text in texts if "gain something" in text]) == (rank == 0)


def all_picks(group: Any, rank: int, world: int) -> torch.Tensor:
    x = points(N, 0)[shares(N, world)[rank]]
    return fc.distributed.facility_location(x, N, metric="l1", group=group).indices


def test_everything_is_picked_when_everything_is_asked_for(ranks: Ranks) -> None:
    one = fc.facility_location(points(N, 0), N, metric="l1").indices
    for indices in ranks.run(all_picks, world=4):
        assert torch.equal(indices, one)


# ---- traffic


def traffic(group: Any, rank: int, world: int, n: int, d: int) -> tuple[dict[str, Any], int]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g)
    x = x[n * rank // world : n * (rank + 1) // world]
    info = fc.distributed.facility_location(x, 8, group=group).info
    return info, len(x)


def test_bytes_are_counted_and_a_pick_costs_no_more_with_more_rows(ranks: Ranks) -> None:
    (small, _), *others = ranks.run(traffic, 200, 8, world=2)
    for info, _ in others:
        assert (info["bytes"], info["collectives"]) == (small["bytes"], small["collectives"])
    assert small["bytes"] == small["first_bytes"] + int(small["pick_bytes"].sum())
    assert small["collectives"] == small["first_collectives"] + int(small["pick_collectives"].sum())
    assert small["shards"] == [100, 100]
    # Every row goes to every rank once before the first pick: n d numbers of 4 bytes and a sum of 8 bytes for each.
    assert small["first_bytes"] >= 200 * (8 * 4 + 8)
    (large, _), _ = ranks.run(traffic, 800, 8, world=2)
    (wide, _), _ = ranks.run(traffic, 200, 64, world=2)
    # Nothing in a collective of a pick is as long as n: a batch has 256 rows at most, and a filling of the front 65 bounds of each rank.
    most = 256 * 8 * 4 + 256 * 8 + 2 * 65 * 16
    assert int((large["pick_bytes"] / large["pick_collectives"].clamp_min(1)).max()) <= most
    assert int(wide["pick_bytes"].sum()) > 2 * int(small["pick_bytes"].sum())


# ---- fewer candidates, fewer clients


def clustered(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    which = torch.randint(0, 30, (n,), generator=g).sort().values  # sorted: each rank has clusters of its own
    return 4 * torch.randn(30, 8, generator=g)[which] + torch.randn(n, 8, generator=g)


def partition(
    group: Any, rank: int, world: int, shuffled: bool, metric: str, bounding: bool
) -> tuple[Any, ...]:
    x = clustered(600)
    if shuffled:
        x = x[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    share = shares(600, world)[rank]
    s = fc.distributed.facility_location(
        x[share], 40, metric=metric, exact=False, bounding=bounding, group=group
    )
    return s.indices, s.objective, s.info, s.assignment


@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("bounding", [True, False])
def test_partition_greedy_comes_close(ranks: Ranks, shuffled: bool, metric: str, bounding: bool) -> None:
    x = clustered(600)
    if shuffled:
        x = x[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    one = fc.facility_location(x, 40, metric=metric)
    answers = ranks.run(partition, shuffled, metric, bounding, world=4)
    indices, objective, info, _ = answers[0]
    assert all(torch.equal(answer[0], indices) for answer in answers)
    assert len(indices.unique()) == 40
    # Against the naive sum over all clients of the best of the picks.
    s = fc.kernels.cpu.pairwise(x[indices], x, metric=metric).double()
    value = s.amax(0).clamp_min(0).sum() if metric == "cosine" else (one.offset - s.amin(0)).sum()
    assert objective == pytest.approx(float(value), rel=1e-6)
    assert objective / one.objective >= (0.97 if bounding else 0.95)
    assert info["candidates"] <= 4 * 40 + (info["bounding"]["grown"] if bounding else 0)


def one_ranks_own(group: Any, rank: int, world: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    x = scattered(seed)[shares(80, world)[rank]]
    s = fc.distributed.facility_location(x, 5, exact=False, bounding=False, group=group)
    return s.indices, s.gains, s.objective


def scattered(seed: int) -> torch.Tensor:
    return torch.randn(80, 4, generator=torch.Generator().manual_seed(seed))


def beside_preselected(group: Any, rank: int, world: int) -> tuple[list[int], list[float], float]:
    x = scattered(3)[:40, :2]
    found = fc.distributed.facility_location(
        x[shares(40, world)[rank]], 4, metric="l1", offset=20.0, preselected=[0, 17], exact=False, group=group
    )
    return found.indices.tolist(), found.gains.tolist(), found.objective


def test_partition_greedy_beside_preselected_rows(ranks: Ranks) -> None:
    x = scattered(3)[:40, :2]
    similarities = 20.0 - torch.cdist(x.double(), x.double(), p=1)
    for indices, gains, objective in ranks.run(beside_preselected, world=2):
        assert len({0, 17, *indices}) == 6
        covered = similarities[[0, 17]].amax(0)
        for j, gain in zip(indices, gains, strict=True):
            better = torch.maximum(covered, similarities[j])
            assert gain == pytest.approx(float((better - covered).sum()), rel=1e-4)
            covered = better
        assert objective == pytest.approx(float(covered.sum()), rel=1e-5)


def test_one_ranks_own_picks_are_taken_where_they_are_better(ranks: Ranks) -> None:
    """Its picks come in the order of a run over all clients, with their gains there."""
    alone = 0
    for seed in range(12):
        x = scattered(seed)
        (indices, gains, objective), *others = ranks.run(one_ranks_own, seed, world=2)
        assert all(torch.equal(other[0], indices) for other in others)
        s = fc.kernels.cpu.pairwise(x[indices], x, metric="cosine").double().clamp_min(0)
        reached = torch.cat([torch.zeros(1, 80, dtype=torch.float64), s]).cummax(0).values.sum(1)
        torch.testing.assert_close(gains.double(), reached.diff(), rtol=1e-5, atol=1e-5)
        assert objective == pytest.approx(float(reached[-1]), rel=1e-6)
        alone += len({int(j) < shares(80, 2)[0].stop for j in indices}) == 1
    assert alone  # in some cases


def sparse_matrix() -> torch.Tensor:
    """Similarities of which each candidate has few: most candidates can be discarded, some have to be taken."""
    g = torch.Generator().manual_seed(0)
    s = torch.zeros(60, 60)
    for j in range(60):
        s[j, j] = 1.0 if j < 8 else 0.05 * float(torch.rand((), generator=g))
    s[8:, 59] += 0.01
    return s


def bounded_picks(group: Any, rank: int, world: int) -> tuple[torch.Tensor, dict[str, Any]]:
    s = fc.distributed.facility_location(
        sparse_matrix()[shares(60, world)[rank]], 10, metric="precomputed", exact=False, group=group
    )
    return s.indices, s.info["bounding"]


def test_bounding_takes_what_must_be_taken_and_discards_what_cannot(ranks: Ranks) -> None:
    one = fc.facility_location(sparse_matrix(), 10, metric="precomputed")
    for indices, told in ranks.run(bounded_picks, world=3):
        assert set(indices.tolist()) == set(one.indices.tolist())
        assert told["grown"] >= 8
        assert told["discarded"] >= 20


def sampled(group: Any, rank: int, world: int, metric: str, weighted: bool) -> tuple[Any, ...]:
    x = clustered(3000)
    share = shares(3000, world)[rank]
    w = weights(3000)[share] if weighted else None
    s = fc.distributed.facility_location(
        x[share],
        20,
        metric=metric,
        clients="sample",
        sample_error=0.05,
        weights=w,
        seed=3,
        preselected=[7],
        group=group,
    )
    return s.indices, s.objective, s.info, s.assignment, s.weights


@pytest.mark.parametrize(("metric", "weighted"), [("cosine", False), ("euclidean", True)])
def test_a_sample_of_clients_chooses_nearly_as_well(ranks: Ranks, metric: str, weighted: bool) -> None:
    x, w = clustered(3000), weights(3000) if weighted else None
    one = fc.facility_location(x, 20, metric=metric, weights=w, preselected=[7])
    answers = {world: ranks.run(sampled, metric, weighted, world=world) for world in (1, 3)}
    for found in answers.values():
        indices, objective, info, _, won = found[0]
        assert info["sample"] == sample_size(20, 0.05, 0.99) == 1060
        assert objective >= 0.98 * one.objective
        # The objective is over all rows: against one machine's f of the same picks.
        again = fc.facility_location(x, 20, metric=metric, weights=w, preselected=[7], offset=one.offset, exclude=[
            j for j in range(3000) if j not in set(indices.tolist()) and j != 7
        ])  # fmt: skip
        assert objective == pytest.approx(again.objective, rel=1e-6)
        assert abs(info["sample_objective"] - objective) <= info["error"]
        assert won.sum() == pytest.approx(float(again.weights.sum()), rel=1e-5)
        assert len(torch.cat([answer[3] for answer in found])) == 3000
    if not weighted:
        assert torch.equal(answers[1][0][0], answers[3][0][0])


def test_the_size_of_a_sample_is_hoeffdings() -> None:
    assert sample_size(1, 0.05, 0.95) == int(np.ceil(np.log(40) / (2 * 0.0025)))
    assert sample_size(1000, 0.05, 0.95) == 10_000


def test_a_small_set_is_no_sample() -> None:
    x = points(N, 0)
    found, one = fc.distributed.facility_location(x, K, clients="sample"), fc.facility_location(x, K)
    assert torch.equal(found.indices, one.indices)
    assert found.info["error"] == 0


# ---- the other methods

SCORES = torch.randn(N, generator=torch.Generator().manual_seed(0)).round(decimals=1)
CCS: list[dict[str, Any]] = [
    {},
    {"strata": "quantile"},
    {"strata": "log"},
    {"groups": LABELS},
    {"groups": NAMES},
    {"mislabel_scores": -SCORES, "mislabel_ratio": 0.2},
    {"mislabel_scores": -SCORES},
    {"mislabel_scores": -SCORES, "groups": LABELS, "strata": "quantile", "mislabel_ratio": 0.3},
    {"seed": 7, "n_strata": 300},
]


def scores_of(options: dict[str, Any]) -> torch.Tensor:
    scores = SCORES.abs() if options.get("strata") == "log" else SCORES.clone()
    scores[4] = torch.inf
    return scores


def strata(group: Any, rank: int, world: int) -> list[Any]:
    share, found = shares(N, world)[rank], []
    for options in CCS:
        own = {
            key: value[share] if isinstance(value, (torch.Tensor, np.ndarray)) else value
            for key, value in options.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.InputWarning)
            coreset = fc.distributed.ccs(scores_of(options)[share], 30, **own, group=group)
        found.append((coreset.indices, coreset.info))
    return found


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
def test_strata_are_those_of_one_machine(ranks: Ranks, world: int) -> None:
    answers = ranks.run(strata, world=world)
    for place, options in enumerate(CCS):
        one = fc.ccs(scores_of(options), 30, **options)
        for answer in answers:
            indices, info = answer[place]
            assert torch.equal(indices, one.indices), options
            assert {key: info[key] for key in one.info} == one.info, options


def test_keys_are_ordered_as_their_values() -> None:
    values = np.array([-np.inf, -2.5, -0.0, 0.0, 5e-324, 1.0, np.inf])
    keys = ordered_bits(values)
    assert (keys[1:] >= keys[:-1]).all()
    assert keys[2] == keys[3]
    assert (np.diff(keys.astype(object)) == 0).sum() == 1
    assert (values_of_bits(keys) == values).all()


SIMCORE: list[dict[str, Any]] = [
    {"n_clusters": 4},
    {"n_clusters": 4, "k": N, "stop": False},
    {"n_clusters": 3, "k": 50, "stop": False, "memory_budget": 2000},
    {"n_clusters": 40, "k": 30},
    {"ratio": 0.3, "n_clusters": 5},
]


def rounds(group: Any, rank: int, world: int, batches: bool) -> list[Any]:
    x, target = points(N, 0), points(30, 9)
    own: Any = x[shares(N, world)[rank]]
    if batches and len(own):
        own = list(own.split(7))
    found = []
    for options in SIMCORE:
        coreset = fc.distributed.simcore(own, target, **options, group=group)
        found.append(
            (coreset.indices, {k: v for k, v in coreset.info.items() if k not in ("bytes", "collectives")})
        )
    return found


@pytest.mark.parametrize(("world", "batches"), [(1, False), (2, True), (3, False), (4, True)])
def test_rounds_are_those_of_one_machine(ranks: Ranks, world: int, batches: bool) -> None:
    answers = ranks.run(rounds, batches, world=world)
    for place, options in enumerate(SIMCORE):
        one = fc.simcore(points(N, 0), points(30, 9), **options)
        for answer in answers:
            indices, info = answer[place]
            assert torch.equal(indices, one.indices), options
            for key, value in one.info.items():
                if key == "passes":
                    continue
                same = (
                    torch.equal(info[key], value) if isinstance(value, torch.Tensor) else info[key] == value
                )
                assert same, (options, key)


OF_VALID = torch.arange(20) % 3
OF_VALID[:4] = 1
GORACS: list[dict[str, Any]] = [
    {"k": 8},
    {"k": 25},
    {"k": 8, "lam": 0.5},
    {"k": 14, "train_labels": LABELS, "valid_labels": OF_VALID},
    {"k": 14, "lam": 0.5, "train_labels": NAMES, "valid_labels": np.array(["blue", "green", "red"])[OF_VALID], "scaling": "global"},
    {"k": 9, "lam": 0.5, "train_labels": (NAMES == "red").tolist(), "valid_labels": [True] * 6 + [False] * 14},
    {"k": 5, "train_labels": LABELS, "valid_labels": [2] * 20},  # a class that no validation item has
    {"k": 8, "lam": 0.5, "norm_clip": 0.8},
    {"k": 8, "lam": 1.0, "norm_scale": "spread"},
    {"k": 14, "lam": 0.5, "norm_clip": 0.73, "norm_scale": "spread", "train_labels": LABELS, "valid_labels": OF_VALID},
    {"k": 14, "lam": 0.5, "norm_clip": 1, "norm_scale": "spread", "train_labels": LABELS, "valid_labels": OF_VALID, "scaling": "global"},
    {"k": 8, "lam": 0.5, "norm_clip": 0.4, "train_labels": LABELS, "valid_labels": OF_VALID, "scaling": "global"},
    {"k": 8, "time_limit": 1e-9},  # over before the first exchange
]  # fmt: skip


def transported(group: Any, rank: int, world: int, pool: int) -> list[Any]:
    share = shares(N, world)[rank]
    found = []
    for options in GORACS:
        own = dict(options)
        if "train_labels" in own:
            own["train_labels"] = own["train_labels"][share]
        coreset = fc.distributed.goracs(
            points(N, 0)[share], points(20, 9), weights(N)[share], pool=pool, **own, group=group
        )
        found.append((coreset.indices, coreset.weights, coreset.info))
    return found


def without_times(info: dict[str, Any]) -> dict[str, Any]:
    """The entries of a result, and of its classes, that do not depend on the machine."""
    kept = {
        name: value
        for name, value in info.items()
        if name not in ("seconds", "classes", "cover", "pool", "bytes", "collectives")
    }
    classes = {label: without_times(part) for label, part in info.get("classes", {}).items()}
    return kept | {"classes": classes}


@pytest.mark.parametrize(("world", "pool"), [(1, 1000), (2, 40), (3, 1000), (4, 40)])
def test_the_cover_is_that_of_one_machine(ranks: Ranks, world: int, pool: int) -> None:
    answers = ranks.run(transported, pool, world=world)
    for place, options in enumerate(GORACS):
        x, valid, norms = points(N, 0), points(20, 9), weights(N)
        one = fc.goracs(x, valid, norms, **options)
        cover = fc.goracs(x, valid, norms, **options, max_exchanges=0)
        given = [options.get(name, [0] * N) for name in ("train_labels", "valid_labels")]
        own, wanted = (labels if isinstance(labels, list) else labels.tolist() for labels in given)
        sizes = [own.count(label) for label in set(wanted)]
        for answer in answers:
            indices, won, info = answer[place]
            assert torch.equal(info["cover"], cover.indices), options
            assert torch.equal(won, one.weights), options
            if pool >= max(sizes):
                assert info["pool"] == sum(sizes)
                assert torch.equal(indices, one.indices), options
                assert without_times(info) == without_times(one.info), options
            else:
                assert info["pool"] < sum(sizes)
                assert info["score"] <= cover.info["score"] + 1e-12


KINDS = ("rademacher", "gaussian", "sjlt", "srht", "gaussian-boxmuller")


def projections(group: Any, rank: int, world: int) -> list[Any]:
    own = points(N, 0)[shares(N, world)[rank]]
    return [
        (fc.distributed.sketch(own, 8, kind=kind, seed=3, group=group), fc.distributed.sketch(own, 8, kind=kind, seed=3, gather=False, group=group))
        for kind in KINDS
    ]  # fmt: skip


@pytest.mark.parametrize("world", [1, 3, 4])
def test_sketches_are_those_of_one_machine(ranks: Ranks, world: int) -> None:
    answers = ranks.run(projections, world=world)
    for place, kind in enumerate(KINDS):
        one = fc.sketch(points(N, 0), 8, kind=kind, seed=3)
        for answer in answers:
            assert torch.equal(answer[place][0], one), kind
        assert torch.equal(torch.cat([answer[place][1] for answer in answers]), one), kind


def gradients(group: Any, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sketches of per-sample gradients of a part of a batch, gathered."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    share = shares(20, world)[rank]
    x, y = torch.arange(80.0).reshape(20, 4) / 80, torch.arange(20) % 3
    sketcher = fc.GradientSketcher(model, 6, seed=2, reduction="sum")
    sketches, norms = torch.empty(0, 6), torch.empty(0)
    if len(x[share]):
        with sketcher:
            torch.nn.functional.cross_entropy(model(x[share]), y[share], reduction="sum").backward()
        sketches, norms = sketcher.sketches, sketcher.norms
    return fc.distributed.gather_rows(sketches, group=group), fc.distributed.gather_rows(norms, group=group)


def test_gradient_sketches_are_gathered(ranks: Ranks) -> None:
    ((sketches, norms),) = ranks.run(gradients, world=1)
    assert sketches.shape == (20, 6)
    for world in (2, 3):
        for together, their_norms in ranks.run(gradients, world=world):
            torch.testing.assert_close(together, sketches)
            torch.testing.assert_close(their_norms, norms)


def dynamics(rank: int) -> fc.TrainingDynamics:
    td = fc.TrainingDynamics(20)
    for epoch in range(rank, 3):
        g = torch.Generator().manual_seed(10 * epoch + rank)
        td.update(
            torch.randint(0, 20, (9,), generator=g),
            torch.randn(9, 4, generator=g),
            torch.randint(0, 4, (9,), generator=g),
            epoch,
        )
    return td


def reduced(group: Any, rank: int, world: int) -> tuple[dict[str, torch.Tensor], str]:
    td = dynamics(rank)
    assert td.all_reduce(group) is td
    try:
        td.all_reduce(group)
    except ValueError as error:
        return td.scores(), str(error)
    return td.scores(), ""


def test_training_dynamics_are_merged_on_every_rank(ranks: Ranks) -> None:
    together = dynamics(0)
    for rank in (1, 2):
        together.merge(dynamics(rank))
    for scores, error in ranks.run(reduced, world=3):
        assert all(torch.equal(scores[name], value) for name, value in together.scores().items())
        assert "count twice" in error


def test_norms_have_the_order_of_the_kernels() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]])
    assert row_norms(x) == pytest.approx([5.0, 0.0, 1e-30], rel=1e-7)
    assert MOST == 4
