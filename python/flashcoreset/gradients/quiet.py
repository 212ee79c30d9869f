"""Forward passes that a GradientSketcher makes for itself, which no sketcher takes for the user's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_OWN = threading.local()


def quiet() -> bool:
    """Whether hooks must not take the calls of now for the user's."""
    return getattr(_OWN, "who", None) is not None


def rehearses(who: object) -> bool:
    """Whether `who` makes the calls of now."""
    return getattr(_OWN, "who", None) is who


@contextlib.contextmanager
def own_calls(who: object) -> Iterator[None]:
    """Calls of modules in here are made by `who`, an object that tells them apart."""
    before = getattr(_OWN, "who", None)
    _OWN.who = who
    try:
        yield
    finally:
        _OWN.who = before


@contextlib.contextmanager
def unhooked() -> Iterator[None]:
    """What autograd saves in here goes to no hooks on saved tensors that were set outside: an activation checkpoint counts what it is
    given, and torch.func refuses to run under hooks."""
    autograd, taken = torch._C._autograd, []
    try:
        while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
            taken.append(top)
            autograd._pop_saved_tensors_default_hooks()
        yield
    finally:
        for pack, unpack in reversed(taken):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
