"""Random directions, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import stream
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule

__all__ = ["TAKES", "directions"]

TAKES = Takes()


def directions(out: Tensor, *, seed: int, begin: int, first: int = 0) -> None:
    """Fills out [q, n] float32 or float64, rows contiguous, with elements begin to begin + n of the directions first to
    first + q; see `flashcoreset.directions.reference` for the definition. Does not wait for the device.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        ValueError: for a negative `begin`, or directions outside [0, 2^32).
    """
    module = native.cuda_module(out.device.index or 0)
    module.directions(capsule(out), seed, begin, first, stream(out.device))
