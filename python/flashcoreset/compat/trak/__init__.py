"""trak's projectors without projection matrices: `trak.projectors` and `fast_jl`, the CUDA extension that it may use.

`TRAKer` itself stays trak's own; it takes any of these projectors (`TRAKer(..., projector=...)`).
"""

from flashcoreset.compat.trak import fast_jl, projectors
from flashcoreset.compat.trak.projectors import (
    AbstractProjector,
    BasicProjector,
    BasicSingleBlockProjector,
    ChunkedCudaProjector,
    CudaProjector,
    NoOpProjector,
    ProjectionType,
)

__all__ = [
    "AbstractProjector",
    "BasicProjector",
    "BasicSingleBlockProjector",
    "ChunkedCudaProjector",
    "CudaProjector",
    "NoOpProjector",
    "ProjectionType",
    "fast_jl",
    "projectors",
]
