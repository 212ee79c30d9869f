"""Matching pursuit and Frank-Wolfe, by the compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule

__all__ = ["TAKES", "frank_wolfe", "orthogonal_matching_pursuit"]

TAKES = Takes()


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
    definition.

    Args:
        g: [B, D] float32 or float64, on the CPU. Rows that are not contiguous are copied.
        target: [D] float64.
        k: the most picks.
        nonnegative, ridge: as in the definition.
        memory_budget: bytes for columns of the Gram matrix, 8 * B each. If k columns take more, every pick costs a
            pass over `g` instead.

    Returns:
        The rows [r], their weights [r] (float64) and the norms of the residual after each step (float64).

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity, arrays that do not fit each other, and products that overflow.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> target = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> kernels.cpu.orthogonal_matching_pursuit(torch.eye(2), target, 1)[:2]
        (tensor([1]), tensor([3.], dtype=torch.float64))
    """
    run = native.module().orthogonal_matching_pursuit
    indices, weights, norms = _pursuit_results(k)
    rows, steps = run(
        *_pursuit_inputs(g, target),
        nonnegative,
        ridge,
        capsule(indices),
        capsule(weights),
        capsule(norms),
        memory_budget,
        torch.get_num_threads(),
    )
    return indices[:rows], weights[:rows], norms[:steps]


def frank_wolfe(
    g: Tensor, target: Tensor, k: int, *, memory_budget: int = DEFAULT_MEMORY_BUDGET
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights by k steps of Frank-Wolfe on the sphere; if the columns take more than `memory_budget`, old columns are
    computed anew."""
    run = native.module().frank_wolfe
    indices, weights, norms = _pursuit_results(k)
    rows, steps = run(
        *_pursuit_inputs(g, target),
        capsule(indices),
        capsule(weights),
        capsule(norms),
        memory_budget,
        torch.get_num_threads(),
    )
    return indices[:rows], weights[:rows], norms[:steps]


def _pursuit_inputs(g: Tensor, target: Tensor) -> tuple[Any, Any]:
    g = g.detach()
    return capsule(g if g.stride(1) == 1 else g.contiguous()), capsule(target.contiguous())


def _pursuit_results(k: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.empty(2, k, dtype=torch.float64)
    return torch.empty(k, dtype=torch.int64), weights[0], weights[1]
