"""Matching pursuit and Frank-Wolfe, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

from flashcoreset._core.dispatch import Takes
from flashcoreset.pursuit.on_device import Launchers, run_frank_wolfe, run_pursuit
from flashcoreset.pursuit.problem import Problem, Pursuit
from flashcoreset.triton_kernels.pursuit import (
    launch_pick,
    launch_products,
    launch_residual,
    launch_squares,
)

__all__ = ["TAKES", "frank_wolfe", "orthogonal_matching_pursuit"]

TAKES = Takes(host="the weights are fitted")

_PURSUIT = Launchers(launch_products, launch_squares, launch_pick, launch_residual)


def orthogonal_matching_pursuit(problem: Problem) -> Pursuit:
    """Up to k rows whose weighted sum is close to a target; see `flashcoreset.pursuit.backend.Kernels`. The weights are fitted on the
    host, by the compiled CPU module, so that every pick waits for the device."""
    return run_pursuit(_PURSUIT, problem)


def frank_wolfe(problem: Problem) -> Pursuit:
    """Rows and weights by steps on the sphere; see `flashcoreset.pursuit.backend.Kernels`. Nothing is fitted, but every step waits for
    the device."""
    return run_frank_wolfe(_PURSUIT, problem)
