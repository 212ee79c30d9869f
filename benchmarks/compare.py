"""``python -m benchmarks.compare COMMIT [FAMILY ...]``: did a ratio to the peer get worse since COMMIT?

Both sources are built the same way, into directories of their own, and this checkout's benchmarks run on each in turn, several
times. Our speed is compared relative to the peer timed in the same run (for "scale", relative to the measured matrix rate),
because two runs minutes apart do not see the same machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.__main__ import DEFAULT, FAMILIES
from benchmarks.harness import Record
from benchmarks.machine import ROOT

TOLERANCE = 0.10


class CompareError(Exception):
    """An error that the caller can put right."""


@dataclass(frozen=True)
class Change:
    """A row's figure in both sources; ``factor`` is new over old speed, above 1 if it got faster."""

    row: str
    base: float
    head: float
    factor: float

    @property
    def lost(self) -> bool:
        return self.factor < 1 - TOLERANCE


def changes(base: Sequence[Mapping[str, Record]], head: Sequence[Mapping[str, Record]]) -> list[Change]:
    """Medians over the repeats of every row that both sources ran. Overheads are checked against their goal, not compared."""
    found = []
    for name, record in head[0].items():
        old = [run[name].value for run in base if name in run]
        new = [run[name].value for run in head if name in run]
        if record.figure == "overhead" or not old:
            continue
        before, after = statistics.median(old), statistics.median(new)
        found.append(
            Change(name, before, after, after / before if record.figure == "ratio" else before / after)
        )
    return found


def _run(command: Sequence[str | Path], problem: str, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise CompareError(f"{problem}\n{tail}")
    return str(done.stdout)


def resolve(commit: str) -> str:
    """The full name of a commit of this checkout."""
    problem = f"BASE: expected a commit of this repository, got {commit!r}; `git log --oneline` lists them"
    return _run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}"],
        problem,
        cwd=ROOT,
    ).strip()


@contextmanager
def worktree(commit: str, directory: Path) -> Iterator[Path]:
    """The commit's files in a temporary worktree, removed with git's record of it."""
    _run(
        ["git", "worktree", "add", "--detach", directory, commit],
        f"git could not check out {commit}",
        cwd=ROOT,
    )
    try:
        yield directory
    finally:
        _run(
            ["git", "worktree", "remove", "--force", directory], f"git could not remove {directory}", cwd=ROOT
        )


def build(source: Path, target: Path) -> None:
    """Installs the package of ``source`` into ``target`` with this interpreter and nothing fetched."""
    # A build folder of its own: the checkout's may be in use.
    options = [
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        f"--config-settings=build-dir={target}-build",
    ]
    # cmake and ninja stand beside the interpreter when they were installed with pip.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    _run(
        [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", target, source],
        f"{source} did not build",
        env={**os.environ, "PATH": path},
    )


def _environment(target: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}


def check_imports(scratch: Path) -> None:
    """An editable installation would answer every import of the package, whatever the path says."""
    package = scratch / "flashcoreset"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    command = [sys.executable, "-c", "import flashcoreset; print(flashcoreset.__file__)"]
    found = _run(command, "the interpreter does not start", env=_environment(scratch), cwd=scratch).strip()
    if not Path(found).is_relative_to(scratch):
        raise CompareError(
            f"flashcoreset is installed in editable form ({found}), which hides every other build of it; "
            f"replace it first: {sys.executable} -m pip install --no-build-isolation --no-deps {ROOT}"
        )


def measure(target: Path, family: str, directory: Path, seconds: float, *, quick: bool) -> dict[str, Record]:
    """One run of a family on the package in ``target``: its rows by name; rows that failed are left out."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        family,
        "--results",
        str(directory),
        "--seconds",
        str(seconds),
    ]
    # A row that the older source cannot run fails there and is left out; the others are still compared.
    done = subprocess.run(
        [*command, *(["--quick"] if quick else [])],
        env=_environment(target),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    path = directory / f"{family}.json"
    if not path.exists():
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise CompareError(f"no row of {family} ran on {target}\n{tail}")
    return {record.name: record for record in results.read(directory)[family]["rows"] if record.agrees}


def compare(
    commit: str, families: Sequence[str], *, repeats: int, seconds: float, quick: bool = False
) -> int:
    """Builds, measures and prints; the exit status."""
    base_name = resolve(commit)
    lost = []
    with tempfile.TemporaryDirectory(prefix="flashcoreset-compare-") as name:
        scratch = Path(name).resolve()
        head_target, base_target = scratch / "head", scratch / "base"
        check_imports(scratch / "probe")
        print("building this checkout", flush=True)
        build(ROOT, head_target)
        print(f"building {base_name[:12]}", flush=True)
        with worktree(base_name, scratch / "worktree") as source:
            build(source, base_target)
        for family in families:
            head: list[dict[str, Record]] = []
            base: list[dict[str, Record]] = []
            for repeat in range(repeats):
                print(f"{family}: run {repeat + 1} of {repeats} on each", flush=True)
                head.append(
                    measure(head_target, family, scratch / f"{family}-head-{repeat}", seconds, quick=quick)
                )
                base.append(
                    measure(base_target, family, scratch / f"{family}-base-{repeat}", seconds, quick=quick)
                )
            compared = changes(base, head)
            for change in compared:
                note = f"  LOST more than {TOLERANCE:.0%}" if change.lost else ""
                print(
                    f"  {change.row}: {change.base:.3g} -> {change.head:.3g}, {change.factor:.2f}x the speed{note}"
                )
                lost += [f"{family} {change.row}"] if change.lost else []
            for missing in sorted(set(head[0]) - {change.row for change in compared}):
                print(f"  {missing}: not compared")
    if lost:
        print(f"a ratio lost more than {TOLERANCE:.0%}: {', '.join(lost)}", file=sys.stderr)
    return 1 if lost else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)} (default: {', '.join(DEFAULT)})")
    parser.add_argument("--repeats", type=int, default=3, help="runs on each source, alternating (default 3)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time budget of each row's rounds (default 5)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: tries the comparison itself out")
    options = parser.parse_args(argv)
    families = options.family or list(DEFAULT)
    for family in families:
        if family not in FAMILIES:
            parser.error(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    try:
        return compare(
            options.commit, families, repeats=options.repeats, seconds=options.seconds, quick=options.quick
        )
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # Ended from outside, the worktree and the temporary folder still have to go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
