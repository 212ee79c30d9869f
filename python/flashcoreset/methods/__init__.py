"""The coreset methods and the controls beside them, each a composition of ops, and `select`, which calls one by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashcoreset._core.results import Coreset
from flashcoreset.methods.autocoreset import autocoreset
from flashcoreset.methods.ccs import ccs, top_scores
from flashcoreset.methods.ccs.coverage import coverage_auc
from flashcoreset.methods.ccs.tuning import tune_ccs
from flashcoreset.methods.colm import CoLM, colm, small_sources
from flashcoreset.methods.goracs import goracs
from flashcoreset.methods.k_center import k_center
from flashcoreset.methods.nearest import nearest
from flashcoreset.methods.random_subset import random_subset
from flashcoreset.methods.simcore import simcore

_METHODS: dict[str, Callable[..., Coreset]] = {
    "colm": colm,
    "simcore": simcore,
    "ccs": ccs,
    "goracs": goracs,
    "autocoreset": autocoreset,
    "random_subset": random_subset,
    "top_scores": top_scores,
    "k_center": k_center,
    "nearest": nearest,
}


def select(name: str, **arguments: Any) -> Coreset:
    """Calls a coreset method by its name.

    Args:
        name: "colm", "simcore", "ccs", "goracs" or "autocoreset"; or a control: "random_subset", "top_scores", "k_center" or
            "nearest".
        arguments: those of the function of that name; "colm" takes those of `CoLM` and of its `select`.

    Returns:
        Its Coreset.

    Raises:
        ValueError: for a name that no method has.
        TypeError: for a name that is not a string, and for arguments that the method does not have.

    Example:
        >>> import torch, flashcoreset as fc
        >>> openset = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
        >>> fc.select("simcore", openset=openset, target=openset[:1], k=2).indices
        tensor([0, 2])
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if name not in _METHODS:
        raise ValueError(f"unknown method {name!r}; valid names: {', '.join(_METHODS)}")
    return _METHODS[name](**arguments)


__all__ = [
    "CoLM",
    "autocoreset",
    "ccs",
    "coverage_auc",
    "goracs",
    "k_center",
    "nearest",
    "random_subset",
    "select",
    "simcore",
    "small_sources",
    "top_scores",
    "tune_ccs",
]
