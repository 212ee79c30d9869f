"""Similarities and distances of pairs of rows, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule

__all__ = ["TAKES", "pairwise"]

TAKES = Takes()


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """Similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of all pairs of rows.

    Args:
        x: [n, d] float32 or float64, on the CPU.
        y: [m, d], same dtype; None is `x` itself, whose pairs are each computed once.
        metric: "cosine", "dot", "euclidean", "sqeuclidean" or "l1".
        out: [n, m], same dtype, rows contiguous; None allocates it.

    Returns:
        `out`.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        TypeError, ValueError: for arrays that do not fit each other, NaN or infinity.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> kernels.cpu.pairwise(torch.eye(2), metric="sqeuclidean")
        tensor([[0., 2.],
                [2., 0.]])
    """
    x = x.detach()
    other = x if y is None else y.detach()
    if out is None:
        out = x.new_empty(x.shape[0], other.shape[0])
    native.module().pairwise(
        capsule(x), capsule(other), capsule(out), metric, torch.get_num_threads(), y is None
    )
    return out
