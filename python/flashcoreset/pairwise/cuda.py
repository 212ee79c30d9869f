"""Similarities and distances of pairs of rows, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule

__all__ = ["TAKES", "pairwise"]

TAKES = Takes()


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """Similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of all pairs of rows.

    Args:
        x: [n, d] float32 or float64, on a CUDA device. NaN and infinity are not checked for.
        y: [m, d], same dtype and device; None is `x` itself.
        metric: "cosine", "dot", "euclidean", "sqeuclidean" or "l1".
        out: [n, m], same dtype, rows contiguous; None allocates it.

    Returns:
        `out`; the work is on torch's current stream; the call does not wait for it.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        TypeError, ValueError: for arrays that do not fit each other.
        torch.OutOfMemoryError: if the device has no room for the packed points.
    """
    x = x.detach()
    other = x if y is None else y.detach()
    if out is None:
        out = x.new_empty(x.shape[0], other.shape[0])
    module, queue = native.cuda_module(x.device.index or 0), stream(x.device)
    with_memory(lambda: module.pairwise(capsule(x), capsule(other), capsule(out), metric, queue))
    return out
