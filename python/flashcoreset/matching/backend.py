"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset.matching.rule import Rule


class Kernels(Protocol):
    """The kernels of one backend: a module, whose functions say what they do."""

    TAKES: Takes

    def pairwise(
        self, x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None
    ) -> Tensor: ...

    def top_updates(
        self,
        g: Tensor,
        m: Tensor | None,
        v: Tensor | None,
        rule: Rule | None,
        member: Tensor,
        offset: Tensor,
        top: int,
        *,
        seed: int = 0,
        length: int | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def update_history(
        self,
        g: Tensor,
        m: Tensor,
        v: Tensor,
        betas: tuple[float, float],
        chosen: Tensor,
        *,
        seed: int = 0,
        length: int | None = None,
    ) -> tuple[Tensor, Tensor]: ...


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
