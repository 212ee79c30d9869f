"""What the commands end with when something is wrong with their arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping


class CommandError(Exception):
    """An error that says in one line what the user has to change."""


def with_options(message: str, typed: Mapping[str, tuple[str, str]]) -> str:
    """An error of a command or of the library, with the option that it is about in front, as the person typed it.

    Args:
        message: "n_strata must be >= 1, got 0" or "--out: it exists".
        typed: by name in the library, an option's long name and what was typed.

    Example:
        >>> with_options("n_strata must be >= 1, got 0", {"n_strata": ("--n-strata", "--n-strata")})
        '--n-strata: n_strata must be >= 1, got 0'
        >>> with_options("--out: it exists", {"out": ("--out", "-o")})
        '-o/--out: it exists'
    """
    for long, given in typed.values():
        if message.startswith(f"{long}:") and given != long:
            return (given if given.startswith("--") else f"{given}/{long}") + message.removeprefix(long)
    first = re.match(r"\w+", message)
    if first is not None and first[0] in typed:
        return f"{typed[first[0]][1]}: {message}"
    return message
