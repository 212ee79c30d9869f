"""``torchrun ... -m flashcoreset select facility-location``: one choice by all processes that torchrun started.

Every way to start the command, also the installed ``flashcoreset``, comes through `run`.
"""

from __future__ import annotations

import argparse
import functools
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch.distributed as dist

import flashcoreset as fc
from flashcoreset._core.dispatch import BACKENDS
from flashcoreset._core.imports import imported
from flashcoreset.cli import _one_line_warnings, _out_of_memory, main
from flashcoreset.cli.errors import CommandError, with_options
from flashcoreset.cli.files_in import LABELS, load_array, parse_counts
from flashcoreset.cli.files_out import Output, check_output, jsonable, write_whole
from flashcoreset.cli.parser import Parser, WrongArguments, add_limits
from flashcoreset.cli.select import check_count
from flashcoreset.cli.shards import ShardFiles, shard_files
from flashcoreset.distributed.communication import Communicator

_COMMAND = ["select", "facility-location"]
_SUFFIXES = (".npz", ".parquet")
_LIMITS = ("cost_budget", "cost_sensitive", "stop_gain", "min_distance", "rounds")  # that come from no file


def run() -> int:
    """Runs the command that this process was started with, on all ranks together if it is for them; returns its exit code."""
    argv = sys.argv[1:]
    return run_on_ranks(argv) if is_for_ranks(argv) else main(argv)


def is_for_ranks(argv: Sequence[str]) -> bool:
    """Whether arguments are those of a choice by several processes, from several files, or of one that goes on where it was."""
    if list(argv[:2]) != _COMMAND or not {"-h", "--help"}.isdisjoint(argv):
        return False
    several = any(glob.has_magic(text) and not os.path.exists(text) for text in argv[2:])
    return several or "--resume" in argv or int(os.environ.get("WORLD_SIZE", "1")) > 1


def _parser() -> Parser:
    parser = Parser(prog="flashcoreset select facility-location", allow_abbrev=False)
    parser.add_argument(
        "--features",
        required=True,
        nargs="+",
        metavar="F",
        help="files of rows [., d], or patterns such as 'shards/*.npy'",
    )
    parser.add_argument(
        "--target",
        "--clients",
        nargs="+",
        metavar="T",
        help="files of the clients [., d], or patterns (default: the rows themselves)",
    )
    parser.add_argument("-k", type=int, metavar="K", help="how many rows to select")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="OUT.npz or OUT.parquet")
    parser.add_argument("--force", action="store_true", help="replace an output that exists, and begin anew")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that was begun for this output, if there is one",
    )
    parser.add_argument("--metric", choices=("cosine", "dot", "euclidean", "sqeuclidean", "l1"))
    parser.add_argument("--weights", metavar="W", help="client weights [m]")
    parser.add_argument("--groups", metavar="G", help="labels of all rows [n], integers or strings")
    add_limits(parser)
    parser.set_defaults(cost_sensitive=None)  # the library's own default
    parser.add_argument("--offset", type=float, help="similarity of a distance of 0")
    parser.add_argument(
        "--approximate", action="store_true", help="partition greedy: k of each process, then k of all these"
    )
    parser.add_argument("--sample", action="store_true", help="choose for a sample of the rows")
    parser.add_argument(
        "--sample-error", type=float, metavar="E", help="the sample's error as a share (default: 0.02)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument(
        "--memory-budget", type=int, metavar="BYTES", help="for rows and lists of each process"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="how long to wait for a process (default: 1800)"
    )
    parser.add_argument("--progress", action="store_true", help="show a bar on stderr")
    return parser


def run_on_ranks(argv: Sequence[str]) -> int:
    """Runs the command on this rank and returns its exit code: 0, 2 for bad input, 3 if another rank ended or hangs."""
    rank = int(os.environ.get("RANK", "0"))
    who = f"flashcoreset: rank {rank}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "flashcoreset: "
    typed: dict[str, tuple[str, str]] = {}
    try:
        with _one_line_warnings(), _out_of_memory():
            parser = _parser()
            typed = parser.typed(argv[2:])
            typed["x_shard"] = typed["features"]
            arguments = parser.parse_args(list(argv[2:]))
            _begin_group(arguments.timeout)
            _choose(arguments)
        return 0
    except KeyboardInterrupt:
        print(f"{who}interrupted", file=sys.stderr)
        return 130
    except fc.distributed.RankError as error:
        print(f"{who}{' '.join(str(error).split())}; the same command with --resume goes on", file=sys.stderr)
        return 3
    except (
        CommandError, WrongArguments, OSError, TypeError, ValueError, MemoryError, ImportError, fc.BackendUnavailableError
    ) as error:  # fmt: skip
        print(f"{who}{with_options(' '.join(str(error).split()) or 'out of memory', typed)}", file=sys.stderr)
        return 2
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _begin_group(seconds: float | None) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=None if seconds is None else timedelta(seconds=seconds))


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _agreed(work: Callable[[], Any]) -> Any:
    """What `work` returns here, once it is known that it failed on no rank."""
    error: Exception | None = None
    value = None
    try:
        value = work()
    except (CommandError, OSError, ValueError) as caught:
        error = caught
    with Communicator() as comm:
        comm.agree({}, error)
    return value


def _choose(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    if arguments.resume and out.exists() and not arguments.force:
        _agreed(lambda: _check_result(arguments, out))
        _tell(f"{out}: done already")
        return
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shards, rows, options = _agreed(lambda: _prepared(arguments, rank, world))
    found = fc.distributed.facility_location(rows, arguments.k, checkpoint=_partial(out), **options)
    _agreed(lambda: _write(arguments, shards, found) if rank == 0 else None)
    _tell(
        f"{out}: {len(found.indices):,} of {shards.shape[0]:,} rows on {world} {'process' if world == 1 else 'processes'}"
    )


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the result depends on."""
    names = (
        *("features", "target", "k", "metric", "weights", "groups", "preselected", "offset", "approximate", "sample", "sample_error", "seed"),
        *("budgets", "cost_budget", "stop_gain", "min_distance", "rounds", "costs", "exclude", "caps"),
    )  # fmt: skip
    plain = {"plain_gains": True} if arguments.cost_sensitive is False else {}
    return {name: getattr(arguments, name) for name in names} | plain


def _check_result(arguments: argparse.Namespace, out: Path) -> None:
    """Raises CommandError unless `out` is the result of this call."""
    try:
        if out.suffix.lower() == ".npz":
            with out.open("rb") as stream, np.load(stream) as found:
                text = str(found["info"])
        else:
            text = imported("pyarrow.parquet").read_schema(out).metadata[b"flashcoreset"].decode()
        before = json.loads(text)["asked"]
    except Exception as error:  # a file of any kind
        raise CommandError(
            f"--out: {out} is no result of this command: {error}; choose another name, or pass --force"
        ) from None
    asked = _asked(arguments)
    for name in [*asked, *(before.keys() - asked.keys())]:
        value = asked.get(name)
        if before.get(name) != value:
            raise CommandError(
                f"--out: {out} is the result of a call with {name}={before.get(name)}, got {value}; choose another name, or pass --force"
            )


def _tell(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def _prepared(
    arguments: argparse.Namespace, rank: int, world: int
) -> tuple[ShardFiles, np.ndarray, dict[str, Any]]:
    """The files, this rank's rows, and the options for them."""
    if arguments.approximate and arguments.sample:
        raise CommandError("--sample: it does not go with --approximate")
    for how in ("approximate", "sample"):
        for name in ("caps", "costs", "exclude", *_LIMITS):
            if getattr(arguments, how) and getattr(arguments, name) is not None:
                flag = "--plain-gains" if name == "cost_sensitive" else f"--{name.replace('_', '-')}"
                raise CommandError(f"{flag}: it does not go with --{how}")
    if arguments.target is not None and arguments.sample:
        raise CommandError("--sample: it does not go with --target")
    if arguments.sample_error is not None and not arguments.sample:
        raise CommandError("--sample-error: it needs --sample")
    out = Path(arguments.out)
    if out.suffix.lower() not in _SUFFIXES:
        raise CommandError(f"--out: expected a name that ends in {' or '.join(_SUFFIXES)}, got {out}")
    files = shard_files(arguments.features, "--features")
    of_clients = [] if arguments.target is None else shard_files(arguments.target, "--target")
    if rank == 0:
        named = [
            getattr(arguments, name)
            for name in ("weights", "groups", "budgets", "preselected", "costs", "exclude", "caps")
        ]
        given = [*files, *of_clients, *(name for name in named if name)]
        check_output(arguments.out, "--out", out.suffix.lower(), given, replace=arguments.force)
        if _partial(out).exists() and not arguments.resume:
            if not arguments.force:
                raise CommandError(
                    f"--out: a run for {out} was begun, see {_partial(out)}; pass --resume to go on, or --force to begin anew"
                )
            _discard(_partial(out))
    shards = ShardFiles(files, "--features")
    begin, end = shards.part(rank, world)
    options: dict[str, Any] = {
        name: value
        for name in ("metric", "offset", "sample_error", "seed", "backend", "memory_budget", *_LIMITS)
        if (value := getattr(arguments, name)) is not None
    }
    options["progress"] = arguments.progress or None
    options["exact"] = not arguments.approximate
    if arguments.sample:
        options["clients"] = "sample"
    of_rows = of_weights = ("rows", shards.shape[0], begin, end)
    if of_clients:
        clients = ShardFiles(of_clients, "--target")
        of_weights = ("clients", clients.shape[0], *clients.part(rank, world))
        options["clients"] = clients.rows(*of_weights[2:], None)
    labels = None
    for name, kinds, wanted, (whose, count, first, last) in (
        ("weights", "fiu", f"a real array [{of_weights[0]}]", of_weights),
        ("groups", LABELS, "an array of labels [rows], integers or strings", of_rows),
        ("costs", "fiu", "a real array [rows]", of_rows),
    ):
        if getattr(arguments, name) is not None:
            array = load_array(getattr(arguments, name), f"--{name}", kinds=kinds, ndim=1, wanted=wanted)
            if len(array) != count:
                raise CommandError(
                    f"--{name}: expected an entry for each of the {count} {whose}, got {len(array)}"
                )
            options[name] = np.array(array[first:last])
            labels = array if name == "groups" else labels
    for name in ("budgets", "caps"):
        if getattr(arguments, name) is not None:
            options[name] = parse_counts(getattr(arguments, name), f"--{name}", labels)
    for name in ("preselected", "exclude"):
        if getattr(arguments, name) is not None:
            options[name] = _rows_named(getattr(arguments, name), f"--{name}", shards.shape[0])
    check_count(arguments.k, options)
    return shards, shards.rows(begin, end, arguments.progress if rank == 0 else None), options


def _rows_named(text: str, option: str, rows: int) -> np.ndarray:
    """The indices that a file holds, or those that its mask marks."""
    array = load_array(text, option, kinds="iub", ndim=1, wanted="an integer array of rows, or a mask [rows]")
    if array.dtype != bool:
        return np.array(array)
    if len(array) != rows:
        raise CommandError(f"{option}: expected a mask of the {rows} rows, got {len(array)} entries")
    return np.flatnonzero(array)


def _discard(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _write(arguments: argparse.Namespace, shards: ShardFiles, found: Any) -> None:
    out = Path(arguments.out)
    info = {
        "algorithm": "facility-location", "version": fc.__version__, "rows": shards.shape[0], "asked": _asked(arguments),
        "objective": found.objective, "offset": found.offset,
        **{name: found.info[name] for name in ("sample", "sample_objective", "error", "confidence") if name in found.info},
    }  # fmt: skip
    arrays = {
        "indices": found.indices.cpu().numpy(),
        "weights": found.weights.cpu().numpy(),
        "gains": found.gains.cpu().numpy(),
    }
    if found.rounds is not None:
        arrays["rounds"] = found.rounds.cpu().numpy()
    write = _npz if out.suffix.lower() == ".npz" else _parquet
    write_whole(
        Output(out, "--out", functools.partial(write, arrays, json.dumps(jsonable(info))), arguments.force)
    )


def _npz(arrays: dict[str, np.ndarray], info: str, stream: IO[bytes]) -> None:
    np.savez(stream, info=np.array(info), **arrays)  # type: ignore[arg-type]


def _parquet(arrays: dict[str, np.ndarray], info: str, stream: IO[bytes]) -> None:
    try:
        arrow, parquet = imported("pyarrow"), imported("pyarrow.parquet")
    except ImportError:
        raise CommandError("--out: Parquet needs pyarrow; install it, or write a .npz file") from None
    table = arrow.table(dict(arrays)).replace_schema_metadata({"flashcoreset": info})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    stream.write(buffer.getvalue())
