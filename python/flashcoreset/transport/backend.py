"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes, choose_kernels


class Candidates(NamedTuple):
    """Exchanges and what bounds them.

    Attributes:
        rows: [p] int64, the items that enter, as rows of the costs that were given.
        places: [p] int64, the sources that leave.
        bounds: [p] float64, ascending; numbers that are not above the transport cost after the exchange.
    """

    rows: Tensor
    places: Tensor
    bounds: Tensor


class Best(NamedTuple):
    """The best of some candidates.

    Attributes:
        place: that of the best among the candidates; -1 if none leads below the ceiling.
        value: the transport cost after it, or the ceiling.
        tried: how many candidates were tried.
    """

    place: int
    value: float
    tried: int


class Transport(Protocol):
    """An optimal flow, which exchanges change."""

    @property
    def value(self) -> float: ...

    @property
    def gap(self) -> float: ...

    @property
    def slackness(self) -> float: ...

    def exchange(self, place: int, row: Tensor, ceiling: float = ...) -> float: ...

    def best_exchange(
        self, costs: Tensor, candidates: Candidates, ceiling: float, enough: float, most: int
    ) -> Best: ...

    def bounds(
        self, costs: Tensor, goal: float, most: int, ways: bool = ...
    ) -> tuple[Tensor, Candidates]: ...

    def duals(self) -> tuple[Tensor, Tensor]: ...

    def flows(self) -> tuple[Tensor, Tensor, Tensor]: ...


class Kernels(Protocol):
    """The kernels of one backend: a module, whose classes say what they do."""

    TAKES: Takes

    def Transport(self, costs: Tensor, u: Tensor | None = None) -> Transport: ...


def choose(backend: str | None) -> Kernels:
    """The kernels on the host: the reference for "torch" or where nothing is compiled, else the compiled ones."""
    return cast(
        Kernels,
        choose_kernels("torch" if backend == "torch" else None, torch.device("cpu"), "transport"),
    )


if TYPE_CHECKING:
    from flashcoreset.transport import cpu, reference

    _CONFORM: tuple[Kernels, ...] = (
        cpu,
        reference,
    )
