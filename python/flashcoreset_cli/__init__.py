"""The command `flashcoreset`: help and version at once, everything else by `flashcoreset.cli`, under torchrun on all ranks together.

This is a package of its own because importing anything inside `flashcoreset` imports torch, which takes seconds. The
parser's file imports nothing but the standard library and is loaded by its path.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Runs one command and returns its exit code."""
    if not {"-h", "--help", "--version"}.isdisjoint(sys.argv[1:]):
        _answer(sys.argv[1:])
    from flashcoreset.cli.ranks import run

    return run()


def _answer(argv: list[str]) -> None:
    """Prints help or the version and exits; returns where the arguments are wrong, of which the command itself tells."""
    from importlib.util import find_spec, module_from_spec, spec_from_file_location
    from pathlib import Path

    package = find_spec("flashcoreset")
    if package is None or package.origin is None:
        return
    spec = spec_from_file_location(f"{__name__}.parser", Path(package.origin).parent / "cli" / "parser.py")
    if spec is None or spec.loader is None:
        return
    parser = module_from_spec(spec)
    spec.loader.exec_module(parser)
    try:
        parser.make_parser().parse_args(argv)
    except parser.WrongArguments:
        return
