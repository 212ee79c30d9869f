"""Random directions, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.triton_kernels.matching import (
    launch_directions,
)

__all__ = ["TAKES", "directions"]

TAKES = Takes()


def directions(out: Tensor, *, seed: int, begin: int, first: int = 0) -> None:
    """Fills out [q, n] float32 or float64 with elements begin to begin + n of the directions first to first + q; see
    `flashcoreset.directions.reference` for the definition. Does not wait for the device."""
    launch_directions(out, seed, begin, first)
