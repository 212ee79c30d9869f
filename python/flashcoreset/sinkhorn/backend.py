"""What each backend of this family offers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset.sinkhorn.schedule import Solution


class Kernels(Protocol):
    """The kernels of one backend: a module, whose functions say what they do."""

    TAKES: Takes

    def pairwise(
        self, x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None
    ) -> Tensor: ...

    def sinkhorn(
        self,
        x: Tensor,
        y: Tensor | None,
        a: Tensor,
        b: Tensor,
        *,
        reg: float,
        metric: str,
        reg_marginal: tuple[float, float] = (math.inf, math.inf),
        x_lengths: Tensor | None = None,
        y_lengths: Tensor | None = None,
        max_iter: int = 1000,
        tol: float = 1e-6,
        f: Tensor | None = None,
        g: Tensor | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        report: Callable[[int, int], None] | None = None,
    ) -> Solution: ...

    def sinkhorn_apply(
        self,
        x: Tensor,
        y: Tensor | None,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        v: Tensor,
        *,
        reg: float,
        metric: str,
        transpose: bool = False,
        x_lengths: Tensor | None = None,
        y_lengths: Tensor | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> Tensor: ...

    def sinkhorn_plan(
        self,
        x: Tensor,
        y: Tensor | None,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        *,
        reg: float,
        metric: str,
        x_lengths: Tensor | None = None,
        y_lengths: Tensor | None = None,
    ) -> Tensor: ...


def choose(backend: str | None, device: torch.device) -> Kernels:
    """The kernels for tensors on `device`; see `flashcoreset._core.dispatch.choose_kernels`."""
    return cast(Kernels, choose_kernels(backend, device, "sinkhorn"))


if TYPE_CHECKING:
    from flashcoreset.sinkhorn import cpu, cuda, reference, triton

    _CONFORM: tuple[Kernels, ...] = (
        cpu,
        cuda,
        reference,
        triton,
    )
