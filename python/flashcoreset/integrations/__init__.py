"""Coreset selection inside other frameworks: `torch` for training loops of one's own, `transformers` for its Trainer, `sklearn` for
pipelines, `ray` for Ray Data.

`flashcoreset.integrations.transformers`, `.sklearn` and `.ray` are imported when they are first used, and need the extra of their name (scikit-learn is
always there).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from flashcoreset.integrations import torch


def __getattr__(name: str) -> ModuleType:
    if name in ("ray", "sklearn", "transformers"):
        return importlib.import_module(f"flashcoreset.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["torch"]
