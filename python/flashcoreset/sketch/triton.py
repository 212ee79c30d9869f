"""Random projections, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.sketch.chosen import matrix_chosen, sketch_chosen
from flashcoreset.sketch.kinds import CHOICES
from flashcoreset.triton_kernels.sketch import Projection, launch_matrix, launch_sketch

__all__ = ["TAKES", "projection_matrix", "sketch"]

TAKES = Takes(half=True)


def sketch(
    x: Tensor,
    dim: int,
    *,
    kind: str,
    seed: int,
    offset: int = 0,
    nnz: int = 1,
    out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Multiplies x [B, D] by the projection's matrix [D, dim]; see `flashcoreset.sketch.reference` for the definition.

    Args:
        x: float16, bfloat16, float32 or float64. NaN and infinities go where the product takes them.
        dim, kind, seed, offset, nnz: as for `fc.sketch`.
        out: [B, dim] float64 for float64, else float32, rows contiguous; None allocates it.
        allow_tf32: whether products of float32 may be TF32's, with 10 bits of significand.

    Returns:
        `out`.
    """
    if kind in CHOICES:
        return sketch_chosen(sketch, x, dim, kind=kind, seed=seed, nnz=nnz, out=out)
    x = x.detach()
    if out is None:
        out = x.new_empty(x.shape[0], dim, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    launch_sketch(x, Projection(kind, dim, seed, offset, nnz), out, allow_tf32)
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
    """The matrix [rows, dim] itself, float32 or float64."""
    if kind in CHOICES:
        return matrix_chosen(
            projection_matrix, rows, dim, kind=kind, seed=seed, nnz=nnz, dtype=dtype, device=device
        )
    out = torch.empty(rows, dim, dtype=dtype, device=device)
    launch_matrix(Projection(kind, dim, seed, offset, nnz), out)
    return out
