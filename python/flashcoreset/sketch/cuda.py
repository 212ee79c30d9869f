"""Random projections, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.sketch.chosen import matrix_chosen, sketch_chosen
from flashcoreset.sketch.kinds import CHOICES

__all__ = ["TAKES", "projection_matrix", "sketch"]

TAKES = Takes()


def sketch(
    x: Tensor, dim: int, *, kind: str, seed: int, offset: int = 0, nnz: int = 1, out: Tensor | None = None
) -> Tensor:
    """Multiplies x [B, D] by the projection's matrix [D, dim]; see `flashcoreset.sketch.reference` for the definition.

    Args:
        x: float32 or float64, on a CUDA device. NaN and infinities go where the product takes them.
        dim, kind, seed, offset, nnz: as for `fc.sketch`.
        out: [B, dim], same dtype and device, rows contiguous; None allocates it.

    Returns:
        `out`; the work is on torch's current stream. Only if it takes several launches of tenths of a second, the call waits for
        the last launch but one, so that Ctrl-C is handled.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        TypeError, ValueError: for arrays that do not fit each other.
        torch.OutOfMemoryError: if the device has no room for partial sums (64 MiB at most, or 8 bytes per output).
    """
    if kind in CHOICES:
        return sketch_chosen(sketch, x, dim, kind=kind, seed=seed, nnz=nnz, out=out)
    x = x.detach()
    if out is None:
        out = x.new_empty(x.shape[0], dim)
    module, queue = native.cuda_module(x.device.index or 0), stream(x.device)
    with_memory(lambda: module.sketch(capsule(x), capsule(out), kind, seed, offset, nnz, queue))
    return out


def projection_matrix(
    rows: int,
    dim: int,
    *,
    kind: str,
    seed: int,
    offset: int = 0,
    nnz: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
) -> Tensor:
    """The matrix [rows, dim] itself, float32 or float64, on torch's current stream."""
    if kind in CHOICES:
        return matrix_chosen(
            projection_matrix, rows, dim, kind=kind, seed=seed, nnz=nnz, dtype=dtype, device=device
        )
    out = torch.empty(rows, dim, dtype=dtype, device=device)
    module = native.cuda_module(out.device.index or 0)
    module.projection_matrix(capsule(out), kind, seed, offset, nnz, stream(out.device))
    return out
