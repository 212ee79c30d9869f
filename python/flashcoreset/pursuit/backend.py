"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch

from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset.pursuit.problem import Problem, Pursuit


class Kernels(Protocol):
    """The kernels of one backend, for tensors on its device; `flashcoreset.pursuit.reference` defines what they compute.

    All raise ValueError for NaN or infinity, arrays that do not fit each other, and products that overflow,
    BackendUnavailableError if they cannot run here, and torch.OutOfMemoryError if a device has no room for the columns.
    """

    TAKES: Takes

    def orthogonal_matching_pursuit(self, problem: Problem) -> Pursuit:
        """Up to k rows, the weights of all fitted anew with each."""
        ...

    def frank_wolfe(self, problem: Problem) -> Pursuit:
        """Rows and weights by k steps of Frank-Wolfe on the sphere."""
        ...


def choose(backend: str | None, device: torch.device) -> Kernels:
    """The kernels for tensors on `device`; see `flashcoreset._core.dispatch.choose_kernels`."""
    return cast(Kernels, choose_kernels(backend, device, "pursuit"))


if TYPE_CHECKING:
    from flashcoreset.pursuit import cpu, cuda, reference, triton

    _CONFORM: tuple[Kernels, ...] = (
        cpu,
        cuda,
        reference,
        triton,
    )
