"""Programs written for other libraries, on these kernels: `flashcoreset.compat.NAME` has the names, arguments and results of the
peer NAME, for `import` lines that are changed; `patch` takes over the calls of an unchanged program.

Example:
    >>> from flashcoreset import compat
    >>> compat.patch("nothing")
    Traceback (most recent call last):
    ...
    ValueError: unknown peer 'nothing'; valid names: submodlib, apricot, trak, dattri, sjlt, ot, geomloss, opacus
"""

from __future__ import annotations

import importlib
from types import ModuleType

from flashcoreset.compat._patching import patch, report, unpatch
from flashcoreset.compat._peers import PEERS


def __getattr__(name: str) -> ModuleType:
    if name in PEERS:
        return importlib.import_module(f"flashcoreset.compat.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["patch", "report", "unpatch"]
