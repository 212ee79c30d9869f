"""The reference behind the names of the compiled kernels."""

from flashcoreset.reference.facility_location import FacilityLocation, pairwise

__all__ = ["FacilityLocation", "pairwise"]
