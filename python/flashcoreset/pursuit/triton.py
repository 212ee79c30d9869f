"""Matching pursuit and Frank-Wolfe, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import Takes
from flashcoreset.pursuit.on_device import Launchers, run_frank_wolfe, run_pursuit
from flashcoreset.triton_kernels.pursuit import (
    launch_pick,
    launch_products,
    launch_residual,
    launch_squares,
)

__all__ = ["TAKES", "frank_wolfe", "orthogonal_matching_pursuit"]

TAKES = Takes(host="the weights are fitted")


_PURSUIT = Launchers(launch_products, launch_squares, launch_pick, launch_residual)


def orthogonal_matching_pursuit(
    g: Tensor,
    target: Tensor,
    k: int,
    *,
    nonnegative: bool = True,
    ridge: float = 0.0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to k rows of `g` whose weighted sum is close to `target`; see `flashcoreset.pursuit.reference` for the
    definition. The weights are fitted on the host, by the compiled CPU module, so that every pick waits for the device.

    Args:
        g: [B, D] float32 or float64. Rows that are not contiguous are copied.
        target: [D] float64.
        k: the most picks.
        nonnegative, ridge: as in the definition.
        memory_budget: bytes for columns of the Gram matrix, 8 * B each; room for 2 k + 12 of them is allocated at once, as far
            as the budget allows. If k columns take more, every pick costs a pass over `g` instead.

    Returns:
        The rows [r], their weights [r] (float64) and the norms of the residual after each step (float64).

    Raises:
        BackendUnavailableError: if no compiled CPU module can be loaded.
        ValueError: for NaN or infinity, and for products that overflow.
    """
    return run_pursuit(
        _PURSUIT, g, target, k, nonnegative=nonnegative, ridge=ridge, memory_budget=memory_budget
    )


def frank_wolfe(
    g: Tensor, target: Tensor, k: int, *, memory_budget: int = DEFAULT_MEMORY_BUDGET
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights by k steps of Frank-Wolfe on the sphere; if the columns take more than `memory_budget`, old columns are
    computed anew. Nothing is fitted, but every step waits for the device."""
    return run_frank_wolfe(_PURSUIT, g, target, k, memory_budget=memory_budget)
