"""submodlib's functions of other kinds: a program that imports them beside facility location runs as far as it does not use them."""

from __future__ import annotations

import functools
from typing import Any

OTHERS = frozenset(
    {
        "ClusteredFunction",
        "ConcaveOverModularFunction",
        "DisparityMinFunction",
        "DisparitySumFunction",
        "FeatureBasedFunction",
        *(
            f"{name}{kind}Function"
            for name in ("GraphCut", "LogDeterminant", "ProbabilisticSetCover", "SetCover")
            for kind in ("", "MutualInformation", "ConditionalGain", "ConditionalMutualInformation")
            if (name, kind) != ("GraphCut", "ConditionalMutualInformation")
        ),
    }
)


@functools.cache
def refusing(name: str) -> type:
    """A class of this name that cannot be made."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{name} is none of the facility-location functions that flashcoreset.compat.submodlib has; use submodlib.{name}"
        )

    return type(name, (), {"__init__": __init__, "__module__": "flashcoreset.compat.submodlib"})
