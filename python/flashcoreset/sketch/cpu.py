"""Random projections, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset._core.tensor import Csr
from flashcoreset.sketch.chosen import chosen_entries, matrix_chosen, sketch_chosen
from flashcoreset.sketch.kinds import CHOICES

__all__ = ["TAKES", "projection_matrix", "sketch", "sketch_csr", "sketch_rows"]

TAKES = Takes(sparse=True)


def sketch(
    x: Tensor, dim: int, *, kind: str, seed: int, offset: int = 0, nnz: int = 1, out: Tensor | None = None
) -> Tensor:
    """Multiplies x [B, D] by the projection's matrix [D, dim], into `out` [B, dim] of the same dtype, float32 or float64. NaN and
    infinities go where the product takes them."""
    if kind in CHOICES:
        return sketch_chosen(sketch, x, dim, kind=kind, seed=seed, nnz=nnz, out=out)
    if out is None:
        out = x.new_empty(x.shape[0], dim)
    native.module().sketch(capsule(x), capsule(out), kind, seed, offset, nnz, torch.get_num_threads())
    return out


def sketch_csr(x: Csr, dim: int, *, kind: str, seed: int, offset: int = 0, nnz: int = 1) -> Tensor:
    """The sketches [B, dim] of the rows of a sparse matrix, float32 or float64. For each entry a row of the projection's matrix is
    made; "mask" and "grass" look their columns up."""
    if kind in CHOICES:
        x = chosen_entries(x, dim, kind, seed)
        if kind == "mask":
            return x.to_dense()
        kind = "sjlt"
    out = torch.empty(x.shape[0], dim, dtype=x.dtype)
    native.module().sketch_csr(x, capsule(out), kind, seed, offset, nnz, torch.get_num_threads())
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
    if kind in CHOICES:
        return matrix_chosen(
            projection_matrix, rows, dim, kind=kind, seed=seed, nnz=nnz, dtype=dtype, device=device
        )
    out = torch.empty(rows, dim, dtype=dtype, device=device)
    native.module().projection_matrix(capsule(out), kind, seed, offset, nnz, torch.get_num_threads())
    return out
