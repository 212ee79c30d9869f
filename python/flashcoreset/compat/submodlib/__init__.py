"""submodlib's facility-location functions on flashcoreset's kernels: `from flashcoreset.compat.submodlib import
FacilityLocationFunction` in the place of `from submodlib import FacilityLocationFunction`.

Example:
    >>> import numpy as np
    >>> from flashcoreset.compat.submodlib import FacilityLocationFunction
    >>> data = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    >>> function = FacilityLocationFunction(n=3, mode="dense", data=data)
    >>> [element for element, gain in function.maximize(budget=2, show_progress=False)]
    [1, 2]
"""

from __future__ import annotations

from flashcoreset.compat.submodlib import functions, helper
from flashcoreset.compat.submodlib.functions import (
    FacilityLocationConditionalGainFunction,
    FacilityLocationConditionalMutualInformationFunction,
    FacilityLocationFunction,
    FacilityLocationMutualInformationFunction,
    FacilityLocationVariantMutualInformationFunction,
    SetFunction,
)


def __getattr__(name: str) -> type:
    return getattr(functions, name)


__all__ = [
    "FacilityLocationConditionalGainFunction",
    "FacilityLocationConditionalMutualInformationFunction",
    "FacilityLocationFunction",
    "FacilityLocationMutualInformationFunction",
    "FacilityLocationVariantMutualInformationFunction",
    "SetFunction",
    "functions",
    "helper",
]
