"""What each backend of this family offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset._core.imports import imported
from flashcoreset.sinkhorn.problem import Problem, Result


class Kernels(Protocol):
    """The kernels of one backend, a module."""

    TAKES: Takes

    def pairwise(
        self, x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None
    ) -> Tensor: ...

    def sinkhorn(self, problem: Problem, report: Callable[[int, int], None] | None = None) -> Result:
        """Solves a batch of problems. `report` is called with the number of iterations done and their largest possible number.

        Raises:
            ValueError: for NaN or infinity in `x` or `y`, costs that overflow, and arrays that do not fit each other.
        """

    def sinkhorn_apply(self, problem: Problem, v: Tensor, transpose: bool = False) -> Tensor:
        """The products P v [B, n, k] of the plans with potentials f, g for v [B, m, k] of the type of `x`; with `transpose` P^T v
        [B, m, k] for v [B, n, k]. Rows beyond a problem's size are 0."""

    def sinkhorn_plan(self, problem: Problem) -> Tensor:
        """The plans P [B, n, m] with potentials f, g; 0 beyond a problem's size."""

    def workspace(self, problem: Problem) -> int:
        """An upper bound of the bytes that `sinkhorn` allocates beside its arguments and results."""


def choose(backend: str | None, device: torch.device) -> Kernels:
    """The kernels for tensors on `device`; see `flashcoreset._core.dispatch.choose_kernels`."""
    return cast(Kernels, choose_kernels(backend, device, "sinkhorn"))


def kernels_of(backend: str) -> Kernels:
    """The kernels of a backend, whether they can run here or not."""
    name = "reference" if backend == "torch" else backend
    return cast(Kernels, imported(f"flashcoreset.sinkhorn.{name}"))


if TYPE_CHECKING:
    from flashcoreset.sinkhorn import cpu, cuda, reference, triton

    _CONFORM: tuple[Kernels, ...] = (cpu, cuda, reference, triton)
