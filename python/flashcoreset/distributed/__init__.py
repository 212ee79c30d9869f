"""Selection from data that is spread over the ranks of a process group, on torch.distributed (gloo or NCCL).

Every rank calls these functions with its own rows; what comes back has global indices and is the same on every rank.
"""

from flashcoreset.distributed.ccs import ccs
from flashcoreset.distributed.communication import RankError
from flashcoreset.distributed.goracs import goracs
from flashcoreset.distributed.problem import ShardedSelection
from flashcoreset.distributed.selection import facility_location
from flashcoreset.distributed.simcore import simcore
from flashcoreset.distributed.sketches import gather_rows, sketch

__all__ = [
    "RankError",
    "ShardedSelection",
    "ccs",
    "facility_location",
    "gather_rows",
    "goracs",
    "simcore",
    "sketch",
]
