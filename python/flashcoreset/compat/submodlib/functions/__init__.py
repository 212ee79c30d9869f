"""submodlib.functions: the facility-location functions. Those of other kinds can be imported and refuse to be made."""

from __future__ import annotations

from flashcoreset.compat.submodlib._others import OTHERS, refusing
from flashcoreset.compat.submodlib.functions.facilityLocation import FacilityLocationFunction
from flashcoreset.compat.submodlib.functions.facilityLocationConditionalGain import (
    FacilityLocationConditionalGainFunction,
)
from flashcoreset.compat.submodlib.functions.facilityLocationConditionalMutualInformation import (
    FacilityLocationConditionalMutualInformationFunction,
)
from flashcoreset.compat.submodlib.functions.facilityLocationMutualInformation import (
    FacilityLocationMutualInformationFunction,
)
from flashcoreset.compat.submodlib.functions.facilityLocationVariantMutualInformation import (
    FacilityLocationVariantMutualInformationFunction,
)
from flashcoreset.compat.submodlib.functions.setFunction import SetFunction


def __getattr__(name: str) -> type:
    if name in OTHERS:
        return refusing(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "FacilityLocationConditionalGainFunction",
    "FacilityLocationConditionalMutualInformationFunction",
    "FacilityLocationFunction",
    "FacilityLocationMutualInformationFunction",
    "FacilityLocationVariantMutualInformationFunction",
    "SetFunction",
]
