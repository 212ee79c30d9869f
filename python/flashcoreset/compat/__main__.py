"""`python -m flashcoreset.compat [--only NAMES] [--report] program.py ARGS...`: runs a program with its peers patched."""

from __future__ import annotations

import argparse
import atexit
import os
import runpy
import sys
from collections.abc import Sequence
from types import ModuleType

from flashcoreset.compat import patch, report
from flashcoreset.compat._calls import CALLS
from flashcoreset.compat._peers import PEERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flashcoreset.compat",
        description="Runs an unchanged program whose calls of other libraries go to these kernels, where they take them.",
        usage="%(prog)s [--only NAMES] [--report] (program.py | -m module) [arguments ...]",
    )
    parser.add_argument(
        "--only",
        metavar="NAMES",
        action="append",
        help=f"patch these alone, separated by commas: {', '.join(PEERS)} (default: all that are installed)",
    )
    parser.add_argument(
        "--report", action="store_true", help="at exit, a table of all calls on stderr in place of one line"
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="the program is a module, as in python -m"
    )
    parser.add_argument("program", help="the program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the program's own arguments")
    return parser


def _summary() -> str:
    """One line: the calls that were taken over and those that were left, by name."""
    counts = CALLS.snapshot()
    parts = []
    for title, calls in (("taken over", "taken"), ("left to the peers", "left")):
        of = {name: getattr(c, calls) for name, c in sorted(counts.items()) if getattr(c, calls)}
        seconds = sum(getattr(c, f"seconds_{calls}") for c in counts.values())
        told = f": {', '.join(f'{name} {n}' for name, n in of.items())} ({seconds:.3f} s)" if of else ""
        parts.append(f"{sum(of.values())} calls {title}{told}")
    return f"flashcoreset.compat: {'; '.join(parts)}"


def _report_at_exit(whole: bool) -> None:
    process = os.getpid()

    def tell() -> None:
        if os.getpid() == process:  # a forked child has this function too
            sys.stderr.write(f"{report() if whole else _summary()}\n")

    atexit.register(tell)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = [name.strip() for given in options.only or () for name in given.split(",") if name.strip()]
    if options.only and not names:
        parser.error(f"--only: no name given; valid names: {', '.join(PEERS)}")
    if not options.module and not os.path.exists(options.program):
        parser.error(f"program: there is no file {options.program}")
    try:
        patch(*names)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    _report_at_exit(options.report)
    sys.argv = [options.program, *options.arguments]
    if options.module:
        sys.path[0] = os.getcwd()
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    elif os.path.isdir(options.program):
        runpy.run_path(options.program, run_name="__main__")
    else:
        _run_file(options.program)


def _run_file(path: str) -> None:
    """Runs a file as `python path` does: its folder is first in sys.path, and the module __main__ stays until the process ends."""
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    module = ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    exec(code, module.__dict__)


if __name__ == "__main__":
    main()
