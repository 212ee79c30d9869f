"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes, choose_kernels


class Taken(NamedTuple):
    """What some rounds took.

    Attributes:
        items: [k] int64, one round after the other, in a round in the order of the lists that took them.
        counts: how many items each round took.
        values: the rounds' values.
        takers: [k] int64, the list that took each item; the first, if several did in one round.
        similarities: [k] float64, that list's similarity of the item.
    """

    items: Tensor
    counts: list[int]
    values: list[float]
    takers: Tensor
    similarities: Tensor


class Order(Protocol):
    """The lists of one run, kept while items stream by."""

    @property
    def taken(self) -> int: ...

    def begin(self, length: int) -> None: ...

    def update(self, x: Tensor) -> None: ...

    def update_similarities(self, s: Tensor) -> None: ...

    def finish(self) -> int: ...

    def order(self, index: int) -> tuple[Tensor, Tensor]: ...

    def rounds(self, count: int, k: int) -> Taken: ...


class Kernels(Protocol):
    """The kernels of one backend: a module, whose functions say what they do."""

    TAKES: Takes

    def NearestOrder(self, centroids: Tensor) -> Order: ...


def choose(backend: str | None, device: torch.device) -> Kernels:
    """The kernels for tensors on `device`; see `flashcoreset._core.dispatch.choose_kernels`."""
    return cast(Kernels, choose_kernels(backend, device, "nearest_order"))


if TYPE_CHECKING:
    from flashcoreset.nearest_order import cpu, reference

    _CONFORM: tuple[Kernels, ...] = (
        cpu,
        reference,
    )
