"""Coreset selection inside training loops: `torch` for loops of one's own, `transformers` for its Trainer.

`flashcoreset.integrations.transformers` is imported when it is first used, and needs the extra `transformers`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from flashcoreset.integrations import torch


def __getattr__(name: str) -> ModuleType:
    if name == "transformers":
        return importlib.import_module("flashcoreset.integrations.transformers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["torch"]
