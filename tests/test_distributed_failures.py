"""flashcoreset.distributed when something is wrong: bad input on one rank, a rank that is killed, stops or hangs, a run that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, ranks

import flashcoreset as fc
from flashcoreset.cli.ranks import is_for_ranks, run_on_ranks
from flashcoreset.cli.shards import ShardFiles, shard_files
from flashcoreset.distributed import checkpoint, greedy
from flashcoreset.distributed.communication import Communicator

N, K = 60, 10


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    group = Ranks(3)
    yield group
    group.close()


def rows(rank: int, world: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x[N * rank // world : N * (rank + 1) // world]


# ---- bad input

FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "k": ({"k": 7}, "ValueError", "k must be the same on every rank, got 10 on rank 0 and 7 on rank 1"),
    "dtype": ({"x": "double"}, "ValueError", "dtype must be the same on every rank, got 'torch.float32' on rank 0 and 'torch.float64' on rank 1"),
    "d": ({"x": "wide"}, "ValueError", "columns of x_shard must be the same on every rank, got 4 on rank 0 and 5 on rank 1"),
    "metric": ({"metric": "l1"}, "ValueError", "metric must be the same on every rank, got 'cosine' on rank 0 and 'l1' on rank 1"),
    "nan": ({"x": "nan"}, "ValueError", "x_shard must be finite, got NaN at row 2, column 0"),
    "missing": ({"x": None}, "TypeError", "x_shard must be a torch.Tensor"),
    "weights": ({"weights": [1.0]}, "ValueError", "weights must have shape [20]"),
    "preselected": ({"preselected": [1]}, "ValueError", "preselected must be the same on every rank, got None on rank 0 and [1] on rank 1"),
    "exact": ({"exact": "yes"}, "TypeError", "exact must be True or False, got str"),
    "caps": ({"caps": {0: 1}}, "ValueError", "caps need groups, the labels that they cap, got groups=None"),
    "rounds": ({"rounds": 2}, "ValueError", "rounds must be the same on every rank, got 1 on rank 0 and 2 on rank 1"),
    "costs": ({"costs": [1.0]}, "ValueError", "costs must have shape [20], got (1,)"),
    "costs alone": ({"costs": [1.0] * 20}, "ValueError", "costs must be the same on every rank, got 'None' on rank 0 and 'given' on rank 1"),
    "exclude": ({"exclude": [4]}, "ValueError", "exclude must be the same on every rank, got None on rank 0 and [4] on rank 1"),
}  # fmt: skip


def faulty(group: Any, rank: int, world: int, fault: str) -> None:
    x: Any = rows(rank, world)
    options: dict[str, Any] = {"k": K, "metric": "cosine"}
    if rank == 1:
        options |= FAULTS[fault][0]
        kind = options.pop("x", "")
        if kind == "nan":
            x[2, 0] = torch.nan
        x = {"double": x.double(), "wide": torch.zeros(20, 5), None: None}.get(kind, x)
    fc.distributed.facility_location(x, **options, group=group)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_every_rank_hears_of_one_ranks_fault(three: Ranks, fault: str) -> None:
    _, kind, text = FAULTS[fault]
    for rank, (raised, message) in enumerate(three.errors(faulty, fault)):
        assert raised == kind
        assert text in message
        if "same on every rank" not in text:
            assert message.startswith("rank 1: ") == (rank != 1)


def whole(group: Any, rank: int, world: int, options: dict[str, Any]) -> None:
    fc.distributed.facility_location(options.pop("x", rows(rank, world)), **options, group=group)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 61}, "k must be at most 60 (60 candidates), got 61"),
        ({"k": 59, "preselected": [1, 2]}, "k must be at most 58 (60 candidates less 2 preselected), got 59"),
        ({"k": 2, "preselected": [60]}, "preselected must be in [0, 60), got 60"),
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"k": None}, "k must be an int unless budgets are given, got None"),
        ({"k": 2, "clients": "all"}, "clients must be points, None or 'sample', got 'all'"),
        ({"k": 2, "clients": "sample", "exact": False}, "clients='sample' is for points without groups and with exact=True"),
        ({"k": 2, "metric": "precomputed", "clients": torch.ones(2, 2)}, "clients must be None with metric 'precomputed'"),
        ({"k": 2, "budgets": {0: 2}}, "budgets need groups, got groups=None"),
        ({"k": 2, "sample_error": 0.0}, "sample_error must be in (0, 1), got 0.0"),
        ({"k": 2, "confidence": 1.0}, "confidence must be in (0, 1), got 1.0"),
        ({"k": 2, "offset": 1.0}, "offset is for distances; metric 'cosine' takes None, got 1.0"),
        ({"k": 2, "seed": -1}, "seed must be in [0, 2^64), got -1"),
        ({"k": 2, "x": torch.zeros(0, 3)}, "x_shard must have at least 1 row on one of the ranks"),
        ({"k": 2, "metric": "sqeuclidean", "x": torch.full((2, 2), 1e30)}, "multiply all data by a power of two"),
        ({"k": 2, "group": 3}, "multiple values"),
        ({"k": 2, "caps": {0: 1}}, "caps need groups, the labels that they cap, got groups=None"),
        ({"k": 2, "caps": {0: -1}, "groups": [0] * 30}, "caps must be >= 0, got -1 for label 0"),
        ({"k": 2, "caps": {0: 1.5}, "groups": [0] * 30}, "caps[0]"),
        ({"k": 2, "caps": [1], "groups": ["a"] * 30}, "caps must be a dict by label where groups holds labels of type str, got [1]"),
        ({"k": 2, "caps": {"b": 1}, "groups": ["a"] * 30}, "caps: 1 asked of label 'b', which no candidate has in groups"),
        ({"k": 2, "caps": {"a": -1}, "groups": ["a"] * 30}, "caps must be >= 0, got -1 for label 'a'"),
        ({"k": 2, "caps": {0: 1}, "groups": [0] * 30, "budgets": {0: 2}}, "caps and budgets exclude each other"),
        ({"k": 2, "min_distance": -1}, "min_distance must be a number >= 0, got -1.0"),
        ({"k": 2, "min_distance": "far"}, "min_distance must be a number"),
        ({"k": 2, "min_distance": 1, "metric": "dot"}, "min_distance needs distances, of which metric 'dot' has none"),
        ({"k": 2, "min_distance": 1, "metric": "precomputed_distance", "x": torch.ones(2, 3)}, "x_shard must be square for min_distance"),
        ({"k": 2, "rounds": 0}, "rounds must be >= 1, got 0"),
        ({"k": 2, "rounds": 1.5}, "rounds must be an int"),
        ({"k": 2, "stop_gain": float("nan")}, "stop_gain must be finite, got nan"),
        ({"k": 2, "costs": [0.0] * 30}, "costs must be > 0, in [2^-900, 2^900], got 0.0 at position 0"),
        ({"k": 2, "costs": [1.0] * 30, "groups": [0] * 30}, "costs are for one problem, got groups"),
        ({"k": None, "cost_budget": 1.0}, "cost_budget needs costs, got costs=None"),
        ({"k": None, "cost_budget": -1.0, "costs": [1.0] * 30}, "cost_budget must be a number >= 0, got -1.0"),
        ({"k": 2, "cost_sensitive": "no"}, "cost_sensitive must be True or False, got str"),
        ({"k": 2, "exclude": [60]}, "exclude must be in [0, 60), got 60"),
        ({"k": 2, "exclude": torch.ones(30, dtype=torch.bool)}, "exclude must hold integers, got dtype"),
        ({"k": 59, "exclude": [1, 5, 5]}, "k must be at most 58 (60 candidates less 2 preselected or excluded), got 59"),
        ({"k": None, "exclude": [1], "groups": [0] * 30, "budgets": {0: 60}}, "whose group has 59 candidates left (60 less 1 preselected or excluded)"),
        ({"k": 2, "exact": False, "caps": {0: 1}, "groups": [0] * 30}, "caps is for exact=True and all clients, got exact=False; leave one of them out"),
        ({"k": 2, "exact": False, "costs": [1.0] * 30}, "costs is for exact=True and all clients, got exact=False"),
        ({"k": 2, "clients": "sample", "rounds": 2}, "rounds is for exact=True and all clients, got clients='sample'"),
        ({"k": 2, "clients": "sample", "stop_gain": 0.5}, "stop_gain is for exact=True and all clients, got clients='sample'"),
        ({"k": 2, "clients": "sample", "min_distance": 0.5}, "min_distance is for exact=True and all clients, got clients='sample'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_refused_on_every_rank(three: Ranks, options: dict[str, Any], text: str) -> None:
    for raised, message in three.errors(whole, options, world=2):
        assert raised in ("TypeError", "ValueError")
        assert text in message


def others(group: Any, rank: int, world: int, method: str) -> None:
    x = rows(rank, world)
    if method == "ccs":
        fc.distributed.ccs(x[:, 0], 5 + rank, group=group)
    elif method == "simcore":
        fc.distributed.simcore(x, x[:5], 5, n_clusters=2, group=group)  # another target on each rank
    elif method == "simcore iterator":
        fc.distributed.simcore(iter([x]), torch.ones(2, 4), 5, group=group)
    elif method == "goracs":
        fc.distributed.goracs(x, torch.ones(2, 4), None, 5, lam=float(rank), group=group)
    elif method == "goracs labels":
        own = ["a", "b"] * 15 if rank else [1, 2] * 15
        fc.distributed.goracs(
            x, torch.ones(2, 4), None, 5, train_labels=own, valid_labels=own[:2], group=group
        )
    elif method.startswith("goracs one"):
        valid_labels = [0, 1] if method.endswith("class") else None
        fc.distributed.goracs(
            x, torch.ones(2, 4), None, 5, train_labels=[0] * 30, valid_labels=valid_labels, group=group
        )
    elif method == "goracs scaling":
        fc.distributed.goracs(x, torch.ones(2, 4), None, 5, scaling="own", group=group)
    elif method == "goracs kinds":
        fc.distributed.goracs(
            x, torch.ones(2, 4), None, 5, train_labels=[0] * 30, valid_labels=["0", "1"], group=group
        )
    elif method == "goracs norms":
        norms = torch.arange(30.0) if rank else torch.zeros(30)
        own = [rank] * 30
        fc.distributed.goracs(
            x, torch.ones(2, 4), norms, 5, lam=1.0, train_labels=own, valid_labels=[0, 1], group=group
        )
    elif method == "goracs clip":
        norms = torch.tensor([0.0] * 29 + [9.0 * rank])
        fc.distributed.goracs(x, torch.ones(2, 4), norms, 5, lam=1.0, norm_clip=0.5, group=group)
    elif method.startswith("goracs no"):
        key, values = {
            "goracs no clip": ("norm_clip", (0.0, 0.0)),
            "goracs no scale": ("norm_scale", ("mean", "mean")),
            "goracs no time": ("time_limit", (0, 0)),
            "goracs no norms": ("norm_clip", (0.5, 0.5)),
            "goracs no clip alike": ("norm_clip", (0.5, 0.6)),
        }[method]
        norms = None if method.endswith("norms") else torch.ones(30)
        fc.distributed.goracs(x, torch.ones(2, 4), norms, 5, **{key: values[rank]}, group=group)
    elif method == "goracs pool":
        fc.distributed.goracs(x, torch.ones(2, 4), None, 5, pool=4, group=group)
    elif method == "gather":
        fc.distributed.gather_rows(x if rank else x.double(), group=group)
    elif method == "gather nothing":
        fc.distributed.gather_rows(torch.tensor(1.0), group=group)
    elif method == "sketch":
        fc.distributed.sketch(x, 3, seed=rank, group=group)
    else:
        fc.TrainingDynamics(5 + rank).all_reduce(group)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("ccs", "k must be the same on every rank, got 5 on rank 0 and 6 on rank 1"),
        ("simcore", "sum of target must be the same on every rank"),
        ("simcore iterator", "openset_shard is an iterator, which can be read once only"),
        ("goracs", "grad_norms must be given with lam=1.0, got None"),
        ("goracs pool", "pool must be >= k=5, got 4"),
        (
            "goracs labels",
            "valid_labels must be the same on every rank, got [1, 2] on rank 0 and ['a', 'b'] on rank 1",
        ),
        ("goracs one", "train_labels and valid_labels must be given together, got valid_labels=None"),
        ("goracs one class", "train_labels must hold every class of valid_labels, got none of class 1"),
        ("goracs scaling", "unknown scaling 'own'; valid names: class, global"),
        (
            "goracs kinds",
            "must hold labels of one kind, got integers in train_labels, other labels in valid_labels",
        ),
        ("goracs norms", "grad_norms must not be all 0 with lam > 0 in class 0, got lam=1.0"),
        ("goracs clip", "grad_norms must not be all 0 with lam > 0, got lam=1.0 and norm_clip=0.5"),
        ("goracs no clip", "norm_clip must be in (0, 1], got 0.0"),
        ("goracs no scale", "unknown norm_scale 'mean'; valid names: max, spread"),
        ("goracs no time", "time_limit must be > 0 seconds, got 0"),
        ("goracs no norms", "grad_norms must be given with norm_clip=0.5, got None"),
        (
            "goracs no clip alike",
            "norm_clip must be the same on every rank, got 0.5 on rank 0 and 0.6 on rank 1",
        ),
        ("sketch", "seed must be the same on every rank, got 0 on rank 0 and 1 on rank 1"),
        (
            "gather",
            "dtype must be the same on every rank, got 'torch.float64' on rank 0 and 'torch.float32' on rank 1",
        ),
        ("gather nothing", "rows_shard must have at least 1 dimension"),
        ("dynamics", "n_samples must be the same on every rank, got 5 on rank 0 and 6 on rank 1"),
    ],
)
def test_the_other_methods_refuse_options_that_differ(three: Ranks, method: str, text: str) -> None:
    for _, message in three.errors(others, method, world=2):
        assert text in message


def test_a_group_is_a_process_group() -> None:
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group or None, got int"):
        fc.distributed.facility_location(torch.eye(3), 1, group=3)  # type: ignore[arg-type]


# ---- gains that are lost beside far points

LOST: dict[str, dict[str, Any]] = {
    "distances": {"metric": "euclidean"},
    "float32": {"metric": "precomputed", "dtype": torch.float32},
    "clients": {"metric": "euclidean", "clients": True},
    "weights": {"metric": "sqeuclidean", "weights": torch.linspace(0.5, 1, 24, dtype=torch.float64)},
    "groups": {"metric": "l1", "groups": torch.arange(24) % 2},
    "preselected": {"metric": "euclidean", "preselected": [5, 9]},
    "an offset": {"metric": "euclidean", "offset": 1e33},
    "dot": {"metric": "dot"},
    "similarities": {"metric": "precomputed"},
    "a matrix of distances": {"metric": "precomputed_distance"},
    "limits": {"metric": "euclidean", "min_distance": 0.001},
    "rounds": {"metric": "euclidean", "clients": True, "rounds": 2},
}


def far_point(case: str, far: float) -> tuple[torch.Tensor, dict[str, Any]]:
    """24 points of which one is far away, and options for one machine."""
    options = dict(LOST[case])
    metric, dtype = options["metric"], options.pop("dtype", torch.float64)
    x = torch.rand(24, 3, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.1
    x[5] = far
    if metric == "dot":
        x[:, 0], x[5] = 0, torch.tensor([far, 0, 0])
    elif metric == "precomputed":
        x = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[5, 5] = far
    elif metric == "precomputed_distance":
        x = torch.cdist(x, x)
    if options.pop("clients", False):
        options["clients"] = torch.cat([x[5:6], x[10:] + 0.01])
    return x, options


def far_away(group: Any, rank: int, world: int, case: str, far: float) -> torch.Tensor:
    x, options = far_point(case, far)
    for name in ("weights", "groups"):
        if name in options:
            options[name] = options[name][24 * rank // world : 24 * (rank + 1) // world]
    if "clients" in options:
        options["clients"] = options["clients"][15 * rank // world : 15 * (rank + 1) // world]
    x = x[24 * rank // world : 24 * (rank + 1) // world]
    return fc.distributed.facility_location(x, 6, **options, group=group).indices


@pytest.mark.filterwarnings("ignore::flashcoreset.InputWarning")
@pytest.mark.parametrize("case", list(LOST))
def test_every_rank_refuses_gains_that_are_lost(three: Ranks, case: str) -> None:
    x, options = far_point(case, 1e4)
    picks = fc.facility_location(x, 6, **options).indices
    for world in (2, 3):
        assert all(torch.equal(found, picks) for found in three.run(far_away, case, 1e4, world=world))
    x, options = far_point(case, 1e17 if case in ("dot", "weights") else 1e30)
    with pytest.raises(ValueError, match=r"^x: gains of .* are lost beside") as one:
        fc.facility_location(x, 6, **options)
    for world in (2, 3):
        found = three.errors(far_away, case, 1e17 if case in ("dot", "weights") else 1e30, world=world)
        assert found == [("ValueError", str(one.value))] * world


# ---- labels of a rank without rows


def without_rows(group: Any, rank: int, world: int, labels: Any) -> torch.Tensor:
    x = rows(0, 1) if rank == 0 else torch.zeros(0, 4)
    own = torch.arange(N) % 2 if rank == 0 else labels
    return fc.distributed.facility_location(x, K, groups=own, group=group).indices


def test_a_rank_without_rows_has_no_labels(three: Ranks) -> None:
    picks = fc.facility_location(rows(0, 1), K, groups=torch.arange(N) % 2).indices
    for labels in ([], (), torch.empty(0), np.array([]), np.array([], dtype="U4")):
        assert all(torch.equal(found, picks) for found in three.run(without_rows, labels, world=2))
    for labels, kind, text in [
        (5, "TypeError", "groups must be a torch.Tensor, a NumPy array, "),
        ("", "TypeError", "got str"),
        ({}, "TypeError", "got dict; pass a list of its values"),
        (torch.tensor(1), "ValueError", "groups must have shape [0], got ()"),
        ([1], "ValueError", "groups must have shape [0], got (1,)"),
    ]:
        for rank, (raised, message) in enumerate(three.errors(without_rows, labels, world=2)):
            assert raised == kind
            assert text in message
            assert message.startswith("rank 1: ") == (rank == 0)


# ---- lost ranks


def awake(group: Any, rank: int, world: int) -> int:
    return rank


def endless(group: Any, rank: int, world: int, event: str) -> None:
    """Sums until something happens to rank 1 after the third."""
    with Communicator(group) as comm:
        for number in range(1000):
            if rank == 1 and number == 3:
                if event == "hang":
                    time.sleep(1000)
                elif event == "fail":
                    raise OSError("No space left on device")
                else:
                    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[event])
            comm.sum(torch.tensor([1]))


def absent(group: Any, rank: int, world: int) -> None:
    """Rank 1 takes part in one call and not in the next."""
    fc.distributed.sketch(torch.ones(2, 3), 2, group=group)
    if rank == 1:
        time.sleep(1000)
    fc.distributed.sketch(torch.ones(2, 3), 2, group=group)


def test_a_rank_that_does_not_come_is_named() -> None:
    with ranks(2, 8, awake) as group:
        group.start(absent)
        with pytest.raises(Exception, match="rank 1 has not begun the call"):
            group.result(0, 60)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ("kill", "rank 1 was killed or stopped"),
        ("stop", "rank 1 was killed or stopped"),
        ("hang", "rank 1 hangs: it lives, but has begun 3 collectives and this rank 4"),
        ("fail", "rank 1 failed with OSError: No space left on device"),
    ],
)
def test_a_lost_rank_ends_the_others_and_is_named(event: str, text: str) -> None:
    seconds = 6
    with ranks(3, seconds, awake) as group:
        begin = time.monotonic()
        group.start(endless, event)
        for rank in (0, 2):
            with pytest.raises(Exception, match=text) as raised:
                group.result(rank, 60)
            assert raised.value.args[0] == "RankError"
        # The timeout, the time for signs of life, and room for a busy machine.
        assert time.monotonic() - begin < seconds + 60


# ---- going on


class _Lost(Exception):
    pass


def data(n: int = 300) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(5))


RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"groups": torch.arange(300) % 2},
    "limits": {
        "clients": data(30)[:12], "rounds": 4, "min_distance": 0.02, "groups": torch.arange(300) % 3, "caps": {0: 9, 2: 4},
        "costs": torch.arange(300).double() % 7 + 1, "cost_budget": 60.0, "exclude": [4, 8], "preselected": [7],
        "weights": torch.arange(1.0, 13.0),
    },
}  # fmt: skip


def of_rank(case: str, rank: int, world: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """One rank's rows and options."""
    share = slice(300 * rank // world, 300 * (rank + 1) // world)
    options = dict(RESUMED[case])
    for name in ("groups", "costs"):
        if name in options:
            options[name] = options[name][share]
    for name in ("clients", "weights"):
        if name in options:
            options[name] = options[name][12 * rank // world : 12 * (rank + 1) // world]
    return data()[share], options


def interrupted(group: Any, rank: int, world: int, folder: str, after: int, case: str) -> None:
    """A run that ends as if the machine had failed, after so many segments of first gains or picks on record."""
    greedy._SEGMENT, checkpoint._SECONDS = 40, 0.0
    kept = [0]
    plain = checkpoint._save

    def save(path: Path, array: np.ndarray) -> None:
        plain(path, array)
        kept[0] += 1
        if kept[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        checkpoint._save = save
    x, options = of_rank(case, rank, world)
    fc.distributed.facility_location(x, 20, **options, checkpoint=folder, group=group)


def resumed(group: Any, rank: int, world: int, folder: str, case: str, k: int = 20) -> tuple[Any, ...]:
    greedy._SEGMENT, checkpoint._SECONDS = 40, 0.0
    x, options = of_rank(case, rank, world)
    s = fc.distributed.facility_location(x, k, **options, checkpoint=folder, group=group)
    return s.indices, s.gains, s.objective, s.info["evaluations"]


@pytest.mark.parametrize(
    ("after", "case"), [(2, "plain"), (9, "plain"), (8, "groups"), (10, "limits"), (27, "limits")]
)
def test_a_run_goes_on_where_it_was_killed(three: Ranks, tmp_path: Path, after: int, case: str) -> None:
    folder = tmp_path / "run"
    with ranks(2, 8, awake) as group:
        group.start(interrupted, str(folder), after, case)
        with pytest.raises(Exception, match="rank 0"):
            group.result(1, 60)
    assert (folder / "options.json").exists()
    records = [path.name for path in folder.iterdir()]
    assert not [name for name in records if name.startswith(".")]
    # Something else is no continuation.
    for raised, message in three.errors(resumed, str(folder), case, 21):
        assert raised == "ValueError"
        assert "is of a run with k=20, got 21" in message
    if after == 27:  # in a round that is not the first one
        assert "all-round1-picks.npy" in records
    one = fc.facility_location(data(), 20, **RESUMED[case])
    afresh = three.run(resumed, str(tmp_path / "other"), case)
    # Three ranks go on where two were.
    for answer, new in zip(three.run(resumed, str(folder), case), afresh, strict=True):
        assert torch.equal(answer[0], one.indices)
        assert torch.equal(answer[1], one.gains)
        assert answer[2] == one.objective
        assert answer[3] < new[3]
    assert not folder.exists()


def test_a_folder_that_holds_something_else_is_no_checkpoint(three: Ranks, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for raised, message in three.errors(resumed, str(tmp_path), "plain"):
        assert raised == "ValueError"
        assert "is not empty and holds no run" in message
    assert (tmp_path / "mine.txt").read_text() == "mine"


# ---- the command


def command(
    group: Any, rank: int, world: int, arguments: list[str], port: int, events: str = ""
) -> tuple[int, str]:
    """The command's exit code and what it wrote to stderr, as torchrun would start it."""
    import contextlib
    import io

    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if events:
        greedy._SEGMENT, checkpoint._SECONDS = 20, 0.0
        plain, kept = checkpoint._save, [0]

        def save(path: Path, array: np.ndarray) -> None:
            plain(path, array)
            kept[0] += 1
            if rank == 0 and kept[0] == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._save = save
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = run_on_ranks(arguments)
    return code, told.getvalue()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    for number, part in enumerate(data(120).split([50, 3, 67])):
        np.save(tmp_path / "shards" / f"s-{number}-of-3.npy", part.numpy())
    return tmp_path


def test_the_command_ends_with_the_same_file_after_a_kill(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["select", "facility-location", "--features", str(shards / "shards" / "*.npy"), "-k", "12"]
    one, two = shards / "one.npz", shards / "two.npz"
    assert is_for_ranks(base)
    assert run_on_ranks([*base, "-o", str(one)]) == 0
    with ranks(2, 8, awake) as group:
        group.start(command, [*base, "-o", str(two), "--timeout", "8"], free_port(), "kill")
        code, told = group.result(1, 60)
    assert code == 3
    assert "rank 0" in told
    assert "--resume" in told
    assert not two.exists()
    assert (shards / "two.npz.partial").is_dir()
    assert run_on_ranks([*base, "-o", str(two)]) == 2  # begun, and neither --resume nor --force
    with ranks(2, 8, awake) as group:
        assert group.run(command, [*base, "-o", str(two), "--resume"], free_port()) == [(0, ""), (0, "")]
    assert two.read_bytes() == one.read_bytes()
    assert run_on_ranks([*base, "-o", str(two), "--resume"]) == 0  # done already
    assert run_on_ranks([*base[:-1], "13", "-o", str(two), "--resume"]) == 2
    assert "is the result of a call with k=12, got 13" in capsys.readouterr().err
    assert two.read_bytes() == one.read_bytes()
    assert not (shards / "two.npz.partial").exists()
    assert sorted(path.name for path in shards.iterdir()) == ["one.npz", "shards", "two.npz"]
    chosen = fc.facility_location(data(120), 12)
    with np.load(two) as found:
        assert (found["indices"] == chosen.indices.numpy()).all()
        assert (found["gains"] == chosen.gains.numpy()).all()
        assert (found["weights"] == chosen.weights.numpy()).all()


@pytest.mark.parametrize("how", ["module", "script", "no-python"])
def test_torchrun_starts_the_command(shards: Path, how: str) -> None:
    script = shards / "flashcoreset"  # as pip writes it
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom flashcoreset_cli import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    started = {"module": ["-m", "flashcoreset"], "script": [script], "no-python": ["--no-python", script]}[
        how
    ]
    # A plain file: without the variables that torchrun sets, this would be a command for one process.
    np.save(shards / "x.npy", data(120).numpy())
    out = shards / "out.npz"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *started, "select", "facility-location",
        "--features", shards / "x.npy", "-k", "12", "-o", out,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "12 of 120 rows on 2 processes" in done.stdout
    with np.load(out) as found:
        assert (found["indices"] == fc.facility_location(data(120), 12).indices.numpy()).all()


def test_the_command_says_what_is_wrong(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["select", "facility-location", "-k", "12", "--features"]
    pattern, out = str(shards / "shards" / "*.npy"), ["-o", str(shards / "out.npz")]
    (shards / "shards" / "s-1-of-3.npy").rename(shards / "s-1-of-3.npy")
    np.save(shards / "wide.npy", np.zeros((2, 9), dtype=np.float32))
    (shards / "broken.npy").write_bytes((shards / "s-1-of-3.npy").read_bytes()[:150])
    (shards / "taken.npz").write_bytes(b"mine")
    np.save(shards / "labels.npy", np.zeros(3, dtype=np.int64))
    np.save(shards / "mask.npy", np.zeros(3, dtype=bool))
    np.save(shards / "narrow.npy", np.zeros((3, 4), dtype=np.float32))
    np.save(shards / "narrow9.npy", np.zeros((3, 9), dtype=np.float32))
    np.save(shards / "labels2.npy", np.zeros(2, dtype=np.int64))
    np.savez(shards / "mask.npz", np.ones(2))
    for arguments, text in [
        ([*base, pattern, *out], "--features: shard 1 of 3 is missing beside"),
        ([*base, str(shards / "none*.npy"), *out], "--features: no such file:"),
        ([*base, str(shards / "s-1-of-3.npy"), str(shards / "wide.npy"), *out], "holds float32 rows of 9, but"),
        ([*base, str(shards / "wide.npy"), str(shards / "wide.npy"), *out], "stands twice"),
        ([*base, str(shards / "broken.npy"), *out], "--features: cannot read"),
        ([*base, str(shards / "wide.npy"), "-o", str(shards / "out.txt")], "--out: expected a name that ends in .npz or .parquet"),
        ([*base, str(shards / "wide.npy"), "-o", str(shards / "taken.npz")], "--out:"),
        ([*base, str(shards / "wide.npy"), "-o", str(shards / "taken.npz"), "--resume"], "is no result of this command"),
        ([*base, str(shards / "wide.npy"), *out, "--groups", str(shards / "labels.npy")], "--groups: expected an entry for each of the 2 rows, got 3"),
        ([*base, str(shards / "wide.npy"), *out, "--sample", "--approximate"], "--sample: it does not go with --approximate"),
        ([*base, str(shards / "wide.npy"), *out, "--sample-error", "0.1"], "--sample-error: it needs --sample"),
        ([*base[:2], "--features", str(shards / "wide.npy"), *out], "-k: the number of rows to select is missing"),
        ([*base, str(shards / "wide.npy"), *out, "--sample", "--target", str(shards / "wide.npy")], "--sample: it does not go with --target"),
        ([*base, str(shards / "wide.npy"), *out, "--target", str(shards / "none.npy")], "--target: no such file:"),
        ([*base, str(shards / "wide.npy"), *out, "--target", str(shards / "narrow.npy")], "columns"),
        ([*base, str(shards / "wide.npy"), *out, "--costs", str(shards / "labels.npy")], "--costs: expected an entry for each of the 2 rows, got 3"),
        ([*base, str(shards / "wide.npy"), *out, "--exclude", str(shards / "mask.npy")], "--exclude: expected a mask of the 2 rows, got 3 entries"),
        ([*base, str(shards / "wide.npy"), *out, "--caps", "0:1"], "--caps:"),
        ([*base, str(shards / "wide.npy"), *out, "--approximate", "--min-distance", "1"], "--min-distance: it does not go with --approximate"),
        ([*base, str(shards / "wide.npy"), *out, "--sample", "--plain-gains"], "--plain-gains: it does not go with --sample"),
        ([*base, str(shards / "wide.npy"), *out, "--cost-budget", "4"], "--cost-budget: cost_budget needs costs"),
        ([*base, str(shards / "wide.npy"), *out, "--rounds", "0"], "--rounds: rounds must be >= 1, got 0"),
        ([*base, str(shards / "wide.npy"), *out, "--target", str(shards / "narrow9.npy"), "--weights", str(shards / "labels2.npy")], "--weights: expected an entry for each of the 3 clients, got 2"),
        ([*base, str(shards / "wide.npy"), "-o", str(shards / "mask.npz"), "--force", "--costs", str(shards / "mask.npz")], "is also an input"),
        ([*base, str(shards / "wide.npy"), *out, "--metrics", "l1"], "unrecognized arguments: --metrics"),
    ]:  # fmt: skip
        assert run_on_ranks(arguments) == 2, arguments
        told = capsys.readouterr().err
        assert text in told
        assert told.count("\n") == 1
    assert not (shards / "out.npz").exists()
    assert (shards / "taken.npz").read_bytes() == b"mine"


def test_the_command_writes_parquet_and_takes_options(shards: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    import pyarrow.parquet

    np.save(shards / "weights.npy", np.arange(120.0))
    np.save(shards / "before.npy", np.array([5]))
    out = shards / "out.parquet"
    assert run_on_ranks([
        "select", "facility-location", "--features", str(shards / "shards" / "*.npy"), "-k", "4", "-o", str(out), "--metric", "euclidean",
        "--weights", str(shards / "weights.npy"), "--preselected", str(shards / "before.npy"),
    ]) == 0  # fmt: skip
    table = pyarrow.parquet.read_table(out)
    one = fc.facility_location(data(120), 4, metric="euclidean", weights=np.arange(120.0), preselected=[5])
    assert table["indices"].to_pylist() == one.indices.tolist()
    assert table["gains"].to_pylist() == pytest.approx(one.gains.tolist())
    assert b"objective" in table.schema.metadata[b"flashcoreset"]


COLOURS = np.array(["red", "green", "blue"])[np.arange(120) % 3]
OUT_OF_THE_WAY = np.arange(120) % 7 == 0
COSTS = 1.0 + np.arange(120) % 5
LIMITS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "caps": (["-k", "9", "--groups", "@groups", "--caps", "red=2,blue=9,green=1"], {"k": 9, "groups": COLOURS, "caps": {"red": 2, "blue": 9, "green": 1}}),
    "budgets": (["--groups", "@groups", "--budgets", "red=1,blue=2,green=3"], {"k": None, "groups": COLOURS, "budgets": {"red": 1, "blue": 2, "green": 3}}),
    "costs": (["--costs", "@costs", "--cost-budget", "20", "--exclude", "@exclude"], {"k": None, "costs": COSTS, "cost_budget": 20.0, "exclude": OUT_OF_THE_WAY}),
    "plain gains": (
        ["--costs", "@costs", "--cost-budget", "20", "--plain-gains"], {"k": None, "costs": COSTS, "cost_budget": 20.0, "cost_sensitive": False}
    ),
    "stop": (
        ["--metric", "euclidean", "--stop-gain", "3", "--min-distance", "0.5", "--preselected", "@preselected"],
        {"k": None, "metric": "euclidean", "stop_gain": 3.0, "min_distance": 0.5, "preselected": [5, 9]},
    ),
    "target": (["-k", "8", "--target", "@target-*", "--rounds", "2", "--weights", "@weights"], {"k": 8, "clients": data(9), "rounds": 2, "weights": np.arange(1.0, 10)}),
}  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
def test_the_command_takes_limits(shards: Path, world: int) -> None:
    preselected = np.zeros(120, dtype=bool)
    preselected[[5, 9]] = True
    files = {
        "groups": COLOURS, "costs": COSTS, "exclude": OUT_OF_THE_WAY, "preselected": preselected, "weights": np.arange(1.0, 10),
        "target-0": data(9)[:2].numpy(), "target-1": data(9)[2:].numpy(),
    }  # fmt: skip
    for name, array in files.items():
        np.save(shards / f"{name}.npy", array)
    base = ["select", "facility-location", "--features", str(shards / "shards" / "*.npy")]
    calls = []
    for name, (asked, _) in LIMITS.items():
        named = [str(shards / f"{word[1:]}.npy") if word.startswith("@") else word for word in asked]
        calls.append([*base, *named, "-o", str(shards / f"{name}.npz")])
    if world == 1:
        assert [run_on_ranks(call) for call in calls] == [0] * len(calls)
    else:
        with ranks(2, 60, awake) as group:
            for call in calls:
                assert group.run(command, call, free_port()) == [(0, ""), (0, "")]
    for name, (_, options) in LIMITS.items():
        one = fc.facility_location(data(120), **options)
        with np.load(shards / f"{name}.npz") as found:
            assert len(one.indices) > 3, name
            assert (found["indices"] == one.indices.numpy()).all(), name
            assert (found["gains"] == one.gains.numpy()).all(), name
            assert ("rounds" in found) == (one.rounds is not None)


def test_shards_are_read_without_a_copy_where_one_file_has_them(shards: Path) -> None:
    files = ShardFiles(shard_files([str(shards / "shards" / "*.npy")], "--features"), "--features")
    assert files.shape == (120, 4)
    assert isinstance(files.rows(10, 40), np.memmap)
    assert (files.rows(45, 60) == data(120)[45:60].numpy()).all()
    assert [files.part(rank, 7) for rank in range(7)][-1][1] == 120


def test_only_calls_for_ranks_go_to_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = ["select", "facility-location", "--features", "x.npy", "-k", "3", "-o", "out.npz"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not is_for_ranks(plain)
    assert is_for_ranks([*plain, "--resume"])
    assert not is_for_ranks(["select", "ccs", "--resume"])
    assert not is_for_ranks([*plain, "--resume", "--help"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_for_ranks(plain)
