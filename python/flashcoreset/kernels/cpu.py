"""The compiled CPU kernels of all families."""

from flashcoreset.caratheodory.cpu import caratheodory
from flashcoreset.directions.cpu import directions
from flashcoreset.facility_location.cpu import FacilityLocation
from flashcoreset.matching.cpu import top_updates, update_history
from flashcoreset.nearest_order.cpu import NearestOrder
from flashcoreset.pairwise.cpu import pairwise
from flashcoreset.pursuit.cpu import frank_wolfe, orthogonal_matching_pursuit
from flashcoreset.scores.cpu import sample_scores
from flashcoreset.sinkhorn.cpu import sinkhorn, sinkhorn_apply, sinkhorn_plan
from flashcoreset.sketch.cpu import projection_matrix, sketch, sketch_csr, sketch_rows

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
    "sketch_rows",
    "top_updates",
    "update_history",
]
