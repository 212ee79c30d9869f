"""Carathéodory reductions, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.caratheodory.on_device import reduce_on_device
from flashcoreset.triton_kernels.caratheodory import launch_keep, launch_sums

__all__ = ["TAKES", "caratheodory"]

TAKES = Takes(host="sums of runs are reduced")


def caratheodory(
    x: Tensor, weights: Tensor | None = None, *, max_size: int = 0, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.caratheodory.reference` for the definition.

    The device sums runs of rows, the host reduces these sums and the rows that are left; the host waits for each round.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64, in any strides.
        weights: [n] float64 >= 0 there, not all 0; None for 1.
        max_size: > 0 ends the reduction as soon as at most that many rows are left; the rows come to the host in pieces.
        out: two tensors [min(n, max(d + 1, max_size))] there, int64 and float64, to write to; None allocates them.

    Returns:
        [k] int64, ascending, and [k] float64, > 0: the first k entries of `out`.

    Raises:
        BackendUnavailableError: if there is no compiled CPU module.
        ValueError: for NaN or infinity in `x`.
    """
    return reduce_on_device(x, weights, max_size, out, launch_sums, launch_keep)
