"""The reference behind the names of the compiled kernels."""

from flashcoreset.reference.facility_location import FacilityLocation, pairwise
from flashcoreset.reference.simcore import NearestOrder

__all__ = ["FacilityLocation", "NearestOrder", "pairwise"]
