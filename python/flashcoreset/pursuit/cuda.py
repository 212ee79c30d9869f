"""Matching pursuit and Frank-Wolfe, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.cuda import stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule, optional_capsule
from flashcoreset.pursuit.on_device import Correlations, Launchers, run_frank_wolfe, run_pursuit
from flashcoreset.pursuit.problem import Problem, Pursuit

__all__ = ["TAKES", "frank_wolfe", "orthogonal_matching_pursuit"]

TAKES = Takes(host="the weights are fitted")


def _products(
    g: Tensor, rows: Tensor | None, vectors: Tensor, which: Tensor, out: Tensor, places: Tensor
) -> None:
    module, queue = native.cuda_module(g.device.index or 0), stream(g.device)
    with_memory(
        lambda: module.products(
            capsule(g), optional_capsule(rows), *map(capsule, (vectors, which, out, places)), queue
        )
    )


def _squares(g: Tensor, out: Tensor) -> None:
    module, queue = native.cuda_module(g.device.index or 0), stream(g.device)
    with_memory(lambda: module.squares(capsule(g), capsule(out), queue))


def _pick(correlations: Correlations, scores: Tensor, found: Tensor) -> None:
    module, queue = native.cuda_module(scores.device.index or 0), stream(scores.device)
    with_memory(lambda: module.best_row(correlations, capsule(scores), capsule(found), queue))


def _residual(g: Tensor, target: Tensor, rows: Tensor, weights: Tensor, out: Tensor) -> None:
    module, queue = native.cuda_module(g.device.index or 0), stream(g.device)
    module.residual(*map(capsule, (g, target, rows, weights, out)), queue)


_PURSUIT = Launchers(_products, _squares, _pick, _residual)


def orthogonal_matching_pursuit(problem: Problem) -> Pursuit:
    """Up to k rows whose weighted sum is close to a target; see `flashcoreset.pursuit.backend.Kernels`. The weights are fitted on the
    host, by the compiled CPU module, so that every pick waits for the device."""
    return run_pursuit(_PURSUIT, problem)


def frank_wolfe(problem: Problem) -> Pursuit:
    """Rows and weights by steps on the sphere; see `flashcoreset.pursuit.backend.Kernels`. Nothing is fitted, but every step waits for
    the device."""
    return run_frank_wolfe(_PURSUIT, problem)
