"""The model of docs/scale.md against measured runs: ``python -m benchmarks.scaling_model`` prints predicted beside measured.

Runs of `fc.distributed.facility_location` on 1, 2 and 4 gloo processes with one thread each, at several n and a small k:

    exact    seconds = v n (n / ranks) pair + bytes * byte + collectives * collective + k * pick
             bytes   = n (d s + 8) and what the picks send, which grows with n
    GreeDi   seconds = one (n / ranks)^2 + v ranks k (n / ranks) pair + ranks k (n / ranks) product + ...
             bytes   = ranks k (2 d s + 8) and what the picks send
    sample   seconds = v (n / ranks) c pair + (n / ranks) k product + ...
             bytes   = c (d s + 8) + k d s and what the picks send, which grows with n

What a pair of a candidate and a client, a product (its similarity alone), a byte, a collective and a pick cost is measured apart from the
runs, in the same processes and at the same time on all of them. Seconds are these costs times what each run counts: bytes, collectives, and v,
how often a candidate is evaluated, which is the data's own. One process does not count its evaluations: v is that of the next more
processes there, and its seconds follow from its run at the smallest n; those of GreeDi's parts ("one") from its run at the nearest n. Seconds are CPU seconds of the rank
that needs most, since ranks may share a core. Bytes, those that a rank receives, are predicted from n, with what the picks send at the smallest n.

The picks of 2 and 4 processes have to be those of one, and the objective of GreeDi and of the sample at least 0.95 of theirs. Ends with 1
if that fails, or if a prediction is farther off than --within says for seconds, 1.25 for bytes (GreeDi's: 2, since one more run follows where
one rank's own picks are better).

At the full size, on two quiet cores: about ten minutes, 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flashcoreset as fc
from benchmarks import data, machine
from flashcoreset.distributed.communication import Communicator
from flashcoreset.distributed.greedy import Candidates, Greedy
from flashcoreset.distributed.problem import OneRank, power_of_gains
from flashcoreset.distributed.sampled import sample_size
from flashcoreset.distributed.sources import Points
from flashcoreset.facility_location.backend import choose

MODES = ("exact", "GreeDi", "sample")
BYTES_WITHIN = {"exact": 1.25, "GreeDi": 2.0, "sample": 1.25}  # v is not quite the same at every n
LEAST_SHARE = 0.95
SIZE = 4  # bytes of a float32
FRONT_BYTES = 1040  # of each rank, when the list of the best bounds is filled


@dataclass(frozen=True)
class Plan:
    """What is run: the sizes ascending, the modes, and how often the smallest size is run (the fastest one counts)."""

    sizes: tuple[int, ...]
    d: int
    k: int
    modes: tuple[str, ...]
    sample_error: float
    repeats: int
    timeout: float


@dataclass(frozen=True)
class Costs:
    """CPU seconds."""

    pair: float  # of a candidate and a client, similarity and gain
    product: float  # the similarity alone
    byte: float
    collective: float
    pick: float


@dataclass(frozen=True)
class Run:
    """One measured run on one rank."""

    mode: str
    n: int
    indices: list[int]
    objective: float
    cpu: float
    wall: float
    evaluations: int
    bytes: int
    pick_bytes: int
    collectives: int
    pick_collectives: int


# --- on a rank ----------------------------------------------------------------------------------------


def _least(work: Callable[[], object], repeats: int = 3) -> float:
    """The least CPU seconds of some calls."""
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def _greedy(candidates: torch.Tensor, clients: torch.Tensor) -> Greedy:
    """The ranks' own run, on this rank alone; it evaluates every candidate once."""
    m = len(clients)
    return Greedy(
        OneRank(), Points(choose("cpu", clients.device), candidates, clients, "cosine"),
        Candidates([0, len(candidates)], 0, torch.arange(len(candidates))), torch.ones(m, dtype=torch.float64),
        power_of_gains(1.001 * m, 1.0, clients.dtype), 0.0, [], 1 << 28,
    )  # fmt: skip


def unit_costs(d: int, quick: bool) -> Costs:
    """The unit costs, all ranks at the same time."""
    few, many = (64, 1024) if quick else (512, 16384)
    x = torch.from_numpy(data.clustered(many, d))
    kernels = choose("cpu", x.device)
    with Communicator() as comm:
        comm.sum(torch.zeros(1, dtype=torch.int64))  # nobody begins before the others
        pair = _least(lambda: _greedy(x[:few], x)) / (few * many)
        product = _least(lambda: kernels.pairwise(x[:few], x, metric="cosine")) / (few * many)
        small = _greedy(x[:500], x[:500])
        pick = _least(lambda: small.step(len(small.picks) + 20)) / 20
        if comm.world == 1:
            return Costs(pair, product, 0.0, 0.0, pick)
        count = 20 if quick else 200
        collective = (
            _least(lambda: [comm.sum(torch.zeros(8, dtype=torch.int64)) for _ in range(count)]) / count
        )
        block = torch.zeros(1 << (16 if quick else 20))
        byte = _least(lambda: [comm.broadcast(block, 0) for _ in range(10)]) / (10 * block.nbytes)
    return Costs(pair, product, byte, collective, pick)


def measured(mode: str, n: int, x: torch.Tensor, plan: Plan) -> Run:
    """One run; `x` are this rank's rows."""
    options: dict[str, Any] = {
        "GreeDi": {"exact": False, "bounding": False},
        "sample": {"clients": "sample", "sample_error": plan.sample_error},
    }.get(mode, {})
    wall, cpu = time.perf_counter(), time.process_time()
    found = fc.distributed.facility_location(x, plan.k, backend="cpu", **options)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    info = found.info
    return Run(
        mode, n, found.indices.tolist(), found.objective, cpu, wall, info.get("evaluations", 0), info["bytes"],
        int(info["pick_bytes"].sum()), info["collectives"], int(info["pick_collectives"].sum()),
    )  # fmt: skip


def rank_main(rank: int, world: int, folder: str, plan: Plan, quick: bool) -> None:
    """Everything that one of `world` processes measures, into a file of its own."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world, timeout=timedelta(seconds=plan.timeout),
        )  # fmt: skip
    try:
        costs, runs = unit_costs(plan.d, quick), []
        for n in plan.sizes:
            x = torch.from_numpy(data.clustered(n, plan.d))[
                n * rank // world : n * (rank + 1) // world
            ].clone()
            for mode in plan.modes:
                if mode == "GreeDi" and world == 1:
                    continue  # one rank chooses exactly
                count = plan.repeats if n == plan.sizes[0] else 1
                tries = [measured(mode, n, x, plan) for _ in range(count)]
                runs.append(min(tries, key=lambda run: run.cpu))
                if rank == 0:
                    print(
                        f"{world} ranks, {mode}, n = {n:,}: {runs[-1].wall:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
        text = json.dumps({"costs": asdict(costs), "runs": [asdict(run) for run in runs]})
        (Path(folder) / f"{world}-{rank}.json").write_text(text)
    finally:
        if world > 1:
            dist.destroy_process_group()


# --- the model ----------------------------------------------------------------------------------------


def first_bytes(mode: str, n: int, world: int, plan: Plan) -> float:
    """What a rank receives outside of the picks."""
    row = plan.d * SIZE
    if world == 1:
        return 0.0
    if mode == "exact":
        return n * (row + 8) + FRONT_BYTES * world
    if mode == "GreeDi":
        # The rows of all ranks' picks: evaluated once, and once more to see whether one rank's own picks are better.
        return world * plan.k * (2 * row + 8) + FRONT_BYTES * world
    return distinct(n, plan) * (row + 8) + plan.k * row + FRONT_BYTES * world


def distinct(n: int, plan: Plan) -> float:
    """How many different rows a sample drawn with replacement has."""
    return n * (1 - (1 - 1 / n) ** sample_size(plan.k, plan.sample_error, 0.99))


def growth(run: Run, first: Run) -> float:
    """How many times as much the picks evaluate and send as in the run `first` at the smallest n."""
    return 1.0 if run.mode == "GreeDi" else run.n / first.n


def predicted_bytes(run: Run, first: Run, world: int, plan: Plan) -> float:
    return first_bytes(run.mode, run.n, world, plan) + first.pick_bytes * growth(run, first)


def evaluated(run: Run, world: int, plan: Plan) -> float:
    """v: how often a candidate is evaluated; 0 if it is not counted."""
    candidates = {"exact": run.n, "GreeDi": world * plan.k, "sample": run.n / world}[run.mode]
    return run.evaluations / candidates


def seconds_of_one(run: Run, first: Run, of_more: dict[tuple[str, int], float], plan: Plan) -> float:
    """CPU seconds of one process, from its run at the smallest n and from v of more processes by mode and n."""
    here, there = of_more.get((run.mode, run.n)), of_more.get((first.mode, first.n))
    more = run.n / first.n * (here / there if here and there else 1.0)
    clients = run.n / first.n if run.mode == "exact" else distinct(run.n, plan) / distinct(first.n, plan)
    return first.cpu * more * clients


def predicted_seconds(run: Run, one: dict[int, Run], world: int, costs: Costs, plan: Plan) -> float:
    """CPU seconds of several processes; `one` has one process's exact runs by n."""
    n, k, here = run.n, plan.k, run.n / world
    rest = run.bytes * costs.byte + run.collectives * costs.collective + k * costs.pick
    if run.mode == "exact":
        return run.evaluations * here * costs.pair + rest
    if run.mode == "GreeDi":
        nearest = one[min(one, key=lambda size: abs(size - here))]
        of_one = nearest.cpu / nearest.n**2 * here**2
        return of_one + run.evaluations * here * costs.pair + world * k * here * costs.product + rest
    return run.evaluations * distinct(n, plan) * costs.pair + here * k * costs.product + rest


def of_slowest(runs: list[Run]) -> Run:
    return max(runs, key=lambda run: run.cpu)


def table(
    found: dict[int, tuple[Costs, list[list[Run]]]], plan: Plan, within: float
) -> tuple[list[str], list[str]]:
    """The lines of the table, and what is wrong.

    Args:
        found: by the number of ranks: unit costs, and the runs of each rank.
        plan: what was run.
        within: the largest ratio of measured and predicted seconds; infinite for none.
    """
    lines = [
        "| mode | ranks | n | v | bytes predicted | counted | ratio | CPU s predicted | measured | ratio | wall s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    wrong: list[str] = []
    (alone,) = found[1][1]
    exact = {run.n: run for run in alone if run.mode == "exact"}
    several = min((world for world in found if world > 1), default=1)
    of_more = {
        (run.mode, run.n): v
        for run in map(of_slowest, map(list, zip(*found[several][1], strict=True)))
        if (v := evaluated(run, several, plan))
    }
    for world, (costs, of_ranks) in sorted(found.items()):
        runs = [of_slowest(list(same)) for same in zip(*of_ranks, strict=True)]
        for run in runs:
            first = next(other for other in runs if other.mode == run.mode)
            what = f"{run.mode} on {world} ranks, n = {run.n:,}"
            share = run.objective / exact[run.n].objective
            if any(
                part.indices != run.indices
                for same in zip(*of_ranks, strict=True)
                for part in same
                if (part.mode, part.n) == (run.mode, run.n)
            ):
                wrong.append(f"{what}: the ranks have different picks")
            if run.mode == "exact" and run.indices != exact[run.n].indices:
                wrong.append(f"{what}: the picks are not those of one process")
            if share < LEAST_SHARE:
                wrong.append(f"{what}: the objective is {share:.3f} of the exact one")
            sent = predicted_bytes(run, first, world, plan)
            if world == 1:
                seconds = seconds_of_one(run, first, of_more, plan)
            else:
                seconds = predicted_seconds(run, exact, world, costs, plan)
            byte_ratio, ratio = run.bytes / sent if sent else 1.0, run.cpu / seconds
            bound = BYTES_WITHIN[run.mode]
            if world > 1 and not 1 / bound <= byte_ratio <= bound:
                wrong.append(f"{what}: {run.bytes:,} bytes, predicted {sent:,.0f}")
            if not 1 / within <= ratio <= within:
                wrong.append(f"{what}: {run.cpu:.2f} CPU s, predicted {seconds:.2f}")
            v = f"{evaluated(run, world, plan):.2f}" if run.evaluations else ""
            bytes_of = f"{sent:,.0f} | {run.bytes:,} | {byte_ratio:.3f}" if world > 1 else "| |"
            lines.append(
                f"| {run.mode} | {world} | {run.n:,} | {v} | {bytes_of} | {seconds:.2f} | {run.cpu:.2f} | {ratio:.2f} | {run.wall:.2f} |"
            )
    return lines, wrong


# --- the command --------------------------------------------------------------------------------------


def measure(worlds: list[int], plan: Plan, quick: bool) -> dict[int, tuple[Costs, list[list[Run]]]]:
    """Starts the processes, and reads what they measured."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            mp.spawn(rank_main, args=(world, folder, plan, quick), nprocs=world, join=True)
            told = [json.loads((Path(folder) / f"{world}-{rank}.json").read_text()) for rank in range(world)]
            # A rank waits for the slowest one, whose unit costs count.
            costs = Costs(**{name: max(part["costs"][name] for part in told) for name in told[0]["costs"]})
            found[world] = costs, [[Run(**run) for run in part["runs"]] for part in told]
    return found


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if results agree and the model holds, 1 if not, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", default=[10_000, 30_000, 100_000])
    parser.add_argument("--ranks", type=int, nargs="+", metavar="R", default=[2, 4], help="beside 1")
    parser.add_argument("-d", type=int, default=64, help="numbers of a row (default: 64)")
    parser.add_argument("-k", type=int, default=20, help="picks (default: 20)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeats", type=int, default=3, help="of the smallest size (default: 3)")
    parser.add_argument("--within", type=float, default=2.0, metavar="RATIO", help="of seconds (default: 2)")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS", help="for a rank that does not answer"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do the results and bytes agree?")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write all figures there")
    asked = parser.parse_args(argv)
    if min([*asked.sizes, *asked.ranks, asked.d, asked.k, asked.repeats]) < 1:
        parser.error("sizes, ranks, -d, -k and --repeats must be >= 1")
    sizes = [400, 800] if asked.quick else sorted(set(asked.sizes))
    k, sample_error = (5, 0.1) if asked.quick else (asked.k, 0.02)
    if sample_size(k, sample_error, 0.99) >= sizes[0] and "sample" in asked.modes:
        parser.error(
            f"the smallest size must be above the sample's {sample_size(k, sample_error, 0.99):,} rows, got {sizes[0]:,}"
        )
    modes = tuple(
        mode for mode in MODES if mode in {"exact", *asked.modes}
    )  # "exact" is what the others are compared with
    repeats = 1 if asked.quick else asked.repeats
    plan = Plan(tuple(sizes), 8 if asked.quick else asked.d, k, modes, sample_error, repeats, asked.timeout)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    begin = time.perf_counter()
    found = measure(sorted({1, *asked.ranks}), plan, asked.quick)
    lines, wrong = table(found, plan, float("inf") if asked.quick else asked.within)
    hardware = machine.hardware()
    print(
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['isa']}, one thread a rank; d = {plan.d}, k = {plan.k}, float32"
    )
    for world, (costs, _) in sorted(found.items()):
        told = {name: f"{1e9 * seconds:.3g} ns" for name, seconds in asdict(costs).items() if seconds}
        print(f"{world} ranks, unit costs: {', '.join(f'{name} {text}' for name, text in told.items())}")
    print("\n".join(lines))
    print("\n".join(wrong) or "all predictions hold")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if asked.out is not None:
        figures = {
            str(world): {"costs": asdict(costs), "runs": [[asdict(run) for run in rank] for rank in runs]}
            for world, (costs, runs) in found.items()
        }
        asked.out.write_text(
            json.dumps(
                {"plan": asdict(plan), "hardware": hardware, "commit": machine.commit(), "ranks": figures},
                indent=1,
            )
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
