"""Similarities and distances of pairs of rows, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset._core.tensor import check_finite
from flashcoreset.pairwise import normalize_rows
from flashcoreset.triton_kernels.pairwise import launch_pairwise, panel

__all__ = ["TAKES", "pairwise"]

TAKES = Takes()


def panels(x: Tensor, y: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    if metric == "cosine":
        x, y = normalize_rows(x), None if y is None else normalize_rows(y)
    a = panel(x)
    return a, a if y is None else panel(y)


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """Similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of all pairs of rows.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64; half types are computed in float32.
        y: [m, d], same dtype; None is `x` itself.
        metric: "cosine", "dot", "euclidean", "sqeuclidean" or "l1".
        out: [n, m] float64 for float64, else float32, rows contiguous; None allocates it.

    Returns:
        `out`.

    Raises:
        ValueError: for NaN or infinity in `x` or `y`.
    """
    check_finite(x, "x")
    if y is not None:
        check_finite(y, "y")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.detach().to(dtype), None if y is None else y.detach().to(dtype)
    if out is None:
        out = x.new_empty(x.shape[0], (x if y is None else y).shape[0])
    launch_pairwise(*panels(x, y, metric), out, metric)
    return out
