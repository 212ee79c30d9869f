"""Carathéodory reductions, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import optional_compact, stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.caratheodory.on_device import reduce_on_device

__all__ = ["TAKES", "caratheodory"]

TAKES = Takes(host="sums of runs are reduced")


def caratheodory(
    x: Tensor, weights: Tensor | None = None, *, max_size: int = 0, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.caratheodory.reference` for the definition.

    The device sums runs of rows, the host reduces these sums and the rows that are left; the host waits for each round.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64, on a CUDA device, in any strides.
        weights: [n] float64 >= 0 there, not all 0; None for 1.
        max_size: > 0 ends the reduction as soon as at most that many rows are left; the rows come to the host in pieces.
        out: two tensors [min(n, max(d + 1, max_size))] there, int64 and float64, to write to; None allocates them.

    Returns:
        [k] int64, ascending, and [k] float64, > 0: the first k entries of `out`.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels, no device or no compiled CPU module.
        ValueError: for NaN or infinity in `x`.
        torch.OutOfMemoryError: if the device has no room for partial sums (one row of float64 per 256 rows of x).
    """
    module, queue = native.cuda_module(x.device.index or 0), stream(x.device)

    def sum_runs(
        x: Tensor,
        rows: Tensor | None,
        weights: Tensor | None,
        centre: Tensor,
        shrink: float,
        size: int,
        sums: Tensor,
    ) -> None:
        with_memory(
            lambda: module.sum_runs(
                capsule(x),
                optional_compact(rows),
                optional_compact(weights),
                capsule(centre),
                shrink,
                size,
                capsule(sums),
                queue,
            )
        )

    def keep_runs(
        n: int,
        rows: Tensor | None,
        weights: Tensor | None,
        size: int,
        kept: Tensor,
        factors: Tensor,
        new_rows: Tensor,
        new_weights: Tensor,
    ) -> None:
        module.keep_runs(
            n,
            optional_compact(rows),
            optional_compact(weights),
            size,
            capsule(kept),
            capsule(factors),
            capsule(new_rows),
            capsule(new_weights),
            queue,
        )

    return reduce_on_device(x, weights, max_size, out, sum_runs, keep_runs)
