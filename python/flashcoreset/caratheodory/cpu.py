"""Carathéodory reductions, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule, optional_capsule

__all__ = ["TAKES", "caratheodory"]

TAKES = Takes()


def caratheodory(
    x: Tensor,
    weights: Tensor | None = None,
    *,
    max_size: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
    one_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.caratheodory.reference` for the definition.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64, on the CPU, in any strides.
        weights: [n] float64 >= 0, not all 0; None for 1.
        max_size: > 0 ends the reduction as soon as at most that many rows are left.
        out: two tensors [min(n, max(d + 1, max_size))], int64 and float64, to write to; None allocates them.
        one_scale: numbers that are small beside the largest of all count as rounding, in every column.

    Returns:
        [k] int64, ascending, and [k] float64, > 0: the first k entries of `out`.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity in `x`, weights that are not as above, arrays that do not fit each other.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> kernels.cpu.caratheodory(torch.tensor([[0.0], [1.0], [2.0], [6.0]]))[1].sum()
        tensor(4., dtype=torch.float64)
    """
    if out is None:
        most = min(x.shape[0], max(x.shape[1] + 1, max_size))
        out = torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.float64)
    count = native.module().caratheodory(
        capsule(x.detach()),
        optional_capsule(weights),
        max_size,
        capsule(out[0]),
        capsule(out[1]),
        torch.get_num_threads(),
        one_scale,
    )
    return out[0][:count], out[1][:count]
