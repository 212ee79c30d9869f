"""The reference of all families, behind the names of the compiled kernels."""

from flashcoreset.caratheodory.reference import caratheodory
from flashcoreset.directions.reference import directions
from flashcoreset.facility_location.reference import FacilityLocation
from flashcoreset.matching.reference import top_updates, update_history
from flashcoreset.nearest_order.reference import NearestOrder
from flashcoreset.pairwise.reference import pairwise
from flashcoreset.pursuit.reference import frank_wolfe, orthogonal_matching_pursuit
from flashcoreset.scores.reference import sample_scores
from flashcoreset.sinkhorn.reference import sinkhorn, sinkhorn_apply, sinkhorn_plan
from flashcoreset.sketch.reference import projection_matrix, sketch, sketch_csr

__all__ = [
    "FacilityLocation",
    "NearestOrder",
    "caratheodory",
    "directions",
    "frank_wolfe",
    "orthogonal_matching_pursuit",
    "pairwise",
    "projection_matrix",
    "sample_scores",
    "sinkhorn",
    "sinkhorn_apply",
    "sinkhorn_plan",
    "sketch",
    "sketch_csr",
    "top_updates",
    "update_history",
]
