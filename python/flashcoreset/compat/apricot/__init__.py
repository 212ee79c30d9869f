"""apricot's facility-location selector on flashcoreset's kernels: `from flashcoreset.compat.apricot import
FacilityLocationSelection` in the place of `from apricot import FacilityLocationSelection`.

Example:
    >>> import numpy as np
    >>> from flashcoreset.compat.apricot import FacilityLocationSelection
    >>> X = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    >>> FacilityLocationSelection(2).fit(X).ranking.tolist()
    [2, 3]
"""

from __future__ import annotations

from flashcoreset.compat.apricot import functions, optimizers
from flashcoreset.compat.apricot.functions import BaseGraphSelection, BaseSelection, FacilityLocationSelection


def __getattr__(name: str) -> type:
    return getattr(functions, name)


__all__ = ["BaseGraphSelection", "BaseSelection", "FacilityLocationSelection", "functions", "optimizers"]
