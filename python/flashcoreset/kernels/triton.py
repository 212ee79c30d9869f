"""The Triton kernels of all families: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors.

Importing this module imports triton.
"""

from flashcoreset.caratheodory.triton import caratheodory
from flashcoreset.directions.triton import directions
from flashcoreset.facility_location.triton import FacilityLocation
from flashcoreset.matching.triton import top_updates, update_history
from flashcoreset.pairwise.triton import pairwise
from flashcoreset.pursuit.triton import frank_wolfe, orthogonal_matching_pursuit
from flashcoreset.scores.triton import sample_scores
from flashcoreset.sinkhorn.triton import sinkhorn, sinkhorn_apply, sinkhorn_plan
from flashcoreset.sketch.triton import projection_matrix, sketch

__all__ = [
    "FacilityLocation",
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
