"""Matching pursuit and Frank-Wolfe, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.cuda import stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.pursuit.on_device import Launchers, run_frank_wolfe, run_pursuit

__all__ = ["TAKES", "frank_wolfe", "orthogonal_matching_pursuit"]

TAKES = Takes(host="the weights are fitted")


def _products(
    g: Tensor, rows: Tensor | None, vectors: Tensor, which: Tensor, out: Tensor, places: Tensor
) -> None:
    module, queue = native.cuda_module(g.device.index or 0), stream(g.device)
    with_memory(
        lambda: module.products(
            capsule(g),
            None if rows is None else capsule(rows),
            *map(capsule, (vectors, which, out, places)),
            queue,
        )
    )


def _squares(g: Tensor, out: Tensor) -> None:
    module, queue = native.cuda_module(g.device.index or 0), stream(g.device)
    with_memory(lambda: module.squares(capsule(g), capsule(out), queue))


def _pick(
    correlation: Tensor,
    gram: Tensor,
    slots: Tensor,
    numbers: Tensor,
    norm: Tensor,
    magnitude: bool,
    scores: Tensor,
    found: Tensor,
) -> None:
    module, queue = native.cuda_module(norm.device.index or 0), stream(norm.device)
    given = (correlation, gram, slots, numbers, norm)
    with_memory(
        lambda: module.best_row(*map(capsule, given), magnitude, capsule(scores), capsule(found), queue)
    )


def _residual(g: Tensor, target: Tensor, rows: Tensor, weights: Tensor, out: Tensor) -> None:
    module, queue = native.cuda_module(g.device.index or 0), stream(g.device)
    module.residual(*map(capsule, (g, target, rows, weights, out)), queue)


_PURSUIT = Launchers(_products, _squares, _pick, _residual)


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
        g: [B, D] float32 or float64, on a CUDA device. Rows that are not contiguous are copied.
        target: [D] float64.
        k: the most picks.
        nonnegative, ridge: as in the definition.
        memory_budget: bytes for columns of the Gram matrix, 8 * B each; room for 2 k + 12 of them is allocated at once, as far
            as the budget allows. If k columns take more, every pick costs a pass over `g` instead.

    Returns:
        The rows [r], their weights [r] (float64) and the norms of the residual after each step (float64).

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device, or no compiled CPU module can be loaded.
        ValueError: for NaN or infinity, and for products that overflow.
        torch.OutOfMemoryError: if the device has no room for the columns.
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
