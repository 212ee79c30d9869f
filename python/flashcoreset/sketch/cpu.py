"""Random projections, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule

__all__ = ["TAKES", "projection_matrix", "sketch", "sketch_rows"]

TAKES = Takes()


def sketch(
    x: Tensor, dim: int, *, kind: str, seed: int, offset: int = 0, nnz: int = 1, out: Tensor | None = None
) -> Tensor:
    """Multiplies x [B, D] by the projection's matrix [D, dim], into `out` [B, dim] of the same dtype, float32 or float64. NaN and
    infinities go where the product takes them."""
    if out is None:
        out = x.new_empty(x.shape[0], dim)
    native.module().sketch(capsule(x), capsule(out), kind, seed, offset, nnz, torch.get_num_threads())
    return out


def sketch_rows(
    indices: Tensor, g: Tensor, out: Tensor, *, kind: str, seed: int, offset: int = 0, nnz: int = 1
) -> None:
    """Adds to `out` [B, dim] the sketches of B long rows that are zero except for some parts: `g` [B, T, width] are the
    parts, `indices` [B, T] (int64, >= 0) their numbers, row offset + indices[b, t] * width of the projection being a part's
    first. Parts of the same number add up. `g` and `out` are of one dtype, float32 or float64."""
    native.module().sketch_rows(
        capsule(indices), capsule(g), capsule(out), kind, seed, offset, nnz, torch.get_num_threads()
    )


def projection_matrix(
    rows: int,
    dim: int,
    *,
    kind: str,
    seed: int,
    offset: int = 0,
    nnz: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The matrix [rows, dim] itself, float32 or float64."""
    out = torch.empty(rows, dim, dtype=dtype, device=device)
    native.module().projection_matrix(capsule(out), kind, seed, offset, nnz, torch.get_num_threads())
    return out
