"""The command line: ``flashcoreset info | demo | select | bench``.

Every command ends with 0 when it did its work, with 2 and one line on stderr when the input does not allow
it, and with 130 on Ctrl-C. Outputs appear whole or not at all: they are written beside their place and then
put into it. An existing output is replaced only with --force.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import torch

import flashcoreset as fc
from flashcoreset.cli.commands import run_bench, run_demo, run_info
from flashcoreset.cli.errors import CommandError, with_options
from flashcoreset.cli.parser import WrongArguments, make_parser
from flashcoreset.cli.select import run_select

_COMMANDS = {"info": run_info, "demo": run_demo, "select": run_select, "bench": run_bench}


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"flashcoreset: {category.__name__}: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _drop_stdout_that_fails() -> None:
    """Redirects stdout, because Python flushes it once more at exit and must not fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Turns torch's RuntimeError for missing memory into Python's MemoryError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in text for words in _NO_MEMORY):
            raise
        raise MemoryError(f"out of memory: {text}") from None


# What torch says when it cannot allocate CPU tensors, and for sizes beyond 2^63 bytes.
_NO_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for bad input (one line on stderr), 130 for Ctrl-C."""
    given = sys.argv[1:] if argv is None else argv
    typed: dict[str, tuple[str, str]] = {}
    try:
        with _one_line_warnings(), _out_of_memory():
            parser = make_parser()
            arguments = parser.parse_args(given)
            typed = _with_names_inside(arguments, parser.typed(given))
            code = _COMMANDS[arguments.run](arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print("flashcoreset: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout_that_fails()  # its reader (such as head) has left
        return 1
    except OSError as error:  # for example stdout into a file on a full disk
        print(f"flashcoreset: {' '.join(str(error).split())}", file=sys.stderr)
        _drop_stdout_that_fails()
        return 2
    except (
        CommandError,
        WrongArguments,
        TypeError,
        ValueError,
        MemoryError,
        ImportError,
        fc.BackendUnavailableError,
    ) as error:
        text = " ".join(str(error).split()) or "out of memory"
        print(f"flashcoreset: {with_options(text, typed)}", file=sys.stderr)
        return 2


# What the library calls an option that has another name here.
_INSIDE = {
    "facility-location": {"features": "x"},
    "k-center": {"features": "x"},
    "autocoreset": {"features": "x", "targets": "y"},
    "simcore": {"features": "openset"},
    "nearest": {"features": "openset"},
    "colm": {"gradients": "grads"},
}


def _with_names_inside(
    arguments: argparse.Namespace, typed: dict[str, tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    names = _INSIDE.get(getattr(arguments, "algorithm", ""), {})
    return typed | {inside: typed[name] for name, inside in names.items()}
