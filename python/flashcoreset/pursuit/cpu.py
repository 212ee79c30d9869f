"""Matching pursuit and Frank-Wolfe, by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.pursuit.problem import Problem, Pursuit

__all__ = ["TAKES", "frank_wolfe", "orthogonal_matching_pursuit"]

TAKES = Takes()


def orthogonal_matching_pursuit(problem: Problem) -> Pursuit:
    """Up to k rows whose weighted sum is close to a target; see `flashcoreset.pursuit.backend.Kernels`.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> target = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> found = kernels.cpu.orthogonal_matching_pursuit(kernels.PursuitProblem(torch.eye(2), target, 1))
        >>> found.indices, found.weights
        (tensor([1]), tensor([3.], dtype=torch.float64))
    """
    return _run(native.module().orthogonal_matching_pursuit, problem)


def frank_wolfe(problem: Problem) -> Pursuit:
    """Rows and weights by steps on the sphere; see `flashcoreset.pursuit.backend.Kernels`."""
    return _run(native.module().frank_wolfe, problem)


def _run(kernel: Callable[..., tuple[int, int]], problem: Problem) -> Pursuit:
    indices = torch.empty(problem.k, dtype=torch.int64)
    weights, norms = torch.empty(2, problem.k, dtype=torch.float64)
    found = map(capsule, (indices, weights, norms))
    rows, steps = kernel(problem.compact(), *found, torch.get_num_threads())
    return Pursuit(indices[:rows], weights[:rows], norms[:steps])
