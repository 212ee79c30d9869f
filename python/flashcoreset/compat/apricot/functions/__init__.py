"""apricot.functions: facility location. Selectors of other kinds can be imported and refuse to be made."""

from __future__ import annotations

import functools
from typing import Any

from flashcoreset.compat.apricot.functions.base import BaseGraphSelection, BaseSelection
from flashcoreset.compat.apricot.functions.facilityLocation import FacilityLocationSelection

_OTHERS = frozenset(
    f"{name}Selection"
    for name in (
        "FeatureBased", "MaxCoverage", "SaturatedCoverage", "SumRedundancy", "GraphCut", "Mixture", "Custom", "CustomGraph",
    )
)  # fmt: skip


def __getattr__(name: str) -> type:
    if name in _OTHERS:
        return _refusing(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _refusing(name: str) -> type:
    """A class of this name that cannot be made."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{name}: flashcoreset.compat.apricot has FacilityLocationSelection alone; use apricot.{name}"
        )

    return type(name, (), {"__init__": __init__, "__module__": __name__})


__all__ = ["BaseGraphSelection", "BaseSelection", "FacilityLocationSelection"]
