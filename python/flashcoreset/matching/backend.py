"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset.gradients.adam import AdamState
from flashcoreset.matching.problem import Gradients, Updates


class Kernels(Protocol):
    """The kernels of one backend, for tensors on its device; `flashcoreset.matching.reference` defines what they compute."""

    TAKES: Takes

    def pairwise(
        self, x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None
    ) -> Tensor: ...

    def top_updates(self, problem: Updates) -> tuple[Tensor, Tensor]:
        """The dimensions of the largest mean updates of each group, dims [G, top] int64, the largest first, and its members'
        updates there, u [R, top] float64.

        Raises:
            BackendUnavailableError: if the kernels cannot run here.
            ValueError: for NaN and infinity, for v < 0, and for arrays that do not fit each other.
            torch.OutOfMemoryError: if a device has no room for the lists (24 bytes for each of 2^19 candidates, or for `top`
                in each group).
        """
        ...

    def update_history(self, g: Gradients, history: AdamState, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Adam's history after a step: the means of the new m and v, [D] each, in the dtype of the old, of the rows `chosen` [c]
        int64; other errors are those of `top_updates`.

        Raises:
            ValueError: if these means overflow.
        """
        ...


def choose(backend: str | None, device: torch.device) -> Kernels:
    """The kernels for tensors on `device`; see `flashcoreset._core.dispatch.choose_kernels`."""
    return cast(Kernels, choose_kernels(backend, device, "matching"))


if TYPE_CHECKING:
    from flashcoreset.matching import cpu, cuda, reference, triton

    _CONFORM: tuple[Kernels, ...] = (
        cpu,
        cuda,
        reference,
        triton,
    )
