"""The CUDA kernels of all families, on CUDA tensors."""

from flashcoreset.caratheodory.cuda import caratheodory
from flashcoreset.directions.cuda import directions
from flashcoreset.facility_location.cuda import FacilityLocation
from flashcoreset.matching.cuda import top_updates, update_history
from flashcoreset.pairwise.cuda import pairwise
from flashcoreset.pursuit.cuda import frank_wolfe, orthogonal_matching_pursuit
from flashcoreset.sinkhorn.cuda import sinkhorn, sinkhorn_apply, sinkhorn_plan
from flashcoreset.sketch.cuda import projection_matrix, sketch

__all__ = [
    "FacilityLocation",
    "caratheodory",
    "directions",
    "frank_wolfe",
    "orthogonal_matching_pursuit",
    "pairwise",
    "projection_matrix",
    "sinkhorn",
    "sinkhorn_apply",
    "sinkhorn_plan",
    "sketch",
    "top_updates",
    "update_history",
]
