"""What the commands end with when something is wrong with their arguments."""

from __future__ import annotations

import argparse
from typing import NoReturn


class CommandError(Exception):
    """An error that says in one line what the user has to change."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong option like any other bad input: one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see: {self.prog} --help)")
