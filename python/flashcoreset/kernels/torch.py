"""The reference behind the names of the compiled kernels."""

from flashcoreset.reference.caratheodory import caratheodory
from flashcoreset.reference.facility_location import FacilityLocation, pairwise
from flashcoreset.reference.matching import top_updates, update_history
from flashcoreset.reference.pursuit import frank_wolfe, orthogonal_matching_pursuit
from flashcoreset.reference.scores import sample_scores
from flashcoreset.reference.simcore import NearestOrder
from flashcoreset.reference.sinkhorn import apply as sinkhorn_apply
from flashcoreset.reference.sinkhorn import plan as sinkhorn_plan
from flashcoreset.reference.sinkhorn import sinkhorn
from flashcoreset.reference.sketch import projection_matrix, sketch
from flashcoreset.reference.zeroth_order import directions

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
    "top_updates",
    "update_history",
]
