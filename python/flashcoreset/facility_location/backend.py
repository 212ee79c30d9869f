"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset._core.tensor import Csr


class Run(Protocol):
    """A greedy run that the caller advances pick by pick."""

    @property
    def offset(self) -> float | None:
        """What distances are subtracted from; None until kernels that check values have found one."""

    @property
    def completed(self) -> int:
        """The number of picks that are made; a device makes the picks that `step` started later."""

    def step(self, count: int, naive: bool = False) -> int: ...

    def step_among(self, candidates: Tensor) -> int: ...

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float: ...


class Kernels(Protocol):
    """The kernels of one backend: a module, whose functions say what they do."""

    TAKES: Takes

    def pairwise(
        self, x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None
    ) -> Tensor: ...

    def FacilityLocation(
        self,
        x: Tensor | Csr,
        clients: Tensor | None = None,
        *,
        metric: str = "cosine",
        weights: Tensor | None = None,
        preselected: Tensor | None = None,
        offset: float | None = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        expected_picks: int | None = None,
    ) -> Run: ...


def choose(backend: str | None, device: torch.device, *, sparse: bool = False) -> Kernels:
    """The kernels for tensors on `device`; see `flashcoreset._core.dispatch.choose_kernels`."""
    return cast(Kernels, choose_kernels(backend, device, "facility_location", sparse=sparse))


if TYPE_CHECKING:
    from flashcoreset.facility_location import cpu, cuda, reference, triton

    _CONFORM: tuple[Kernels, ...] = (
        cpu,
        cuda,
        reference,
        triton,
    )
