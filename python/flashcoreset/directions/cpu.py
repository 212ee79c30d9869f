"""Random directions, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule

__all__ = ["TAKES", "directions"]

TAKES = Takes()


def directions(out: Tensor, *, seed: int, begin: int, first: int = 0) -> None:
    """Fills out [q, n] float32 or float64, on the CPU, with elements begin to begin + n of the directions first to
    first + q; see `flashcoreset.directions.reference` for the definition.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for a negative `begin`, or directions outside [0, 2^32).

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> z = torch.empty(1, 3)
        >>> kernels.cpu.directions(z, seed=0, begin=0)
        >>> bool(z.abs().max() < 6)
        True
    """
    native.module().directions(capsule(out), seed, begin, first, torch.get_num_threads())
