"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset.facility_location.problem import Problem, Watch


class Run(Protocol):
    """A greedy run that the caller advances pick by pick. Values that are not finite, or sums that overflow, are a ValueError of
    the first step, or on a device of whatever waits first."""

    @property
    def offset(self) -> float | None:
        """What distances are subtracted from: on a device known after `finish`, and less than the problem's offset if that is so far
        above all distances that sums beside it would be rounded."""

    @property
    def completed(self) -> int:
        """The number of picks that are made; a device makes the picks that `step` started later."""

    def step(self, count: int, naive: bool = False, report: Watch | None = None) -> int:
        """Makes up to `count` further picks, or starts them on a device; `naive` evaluates every candidate for each. Returns the
        number of picks that there are then. The compiled kernels call `report` about every 50 ms while they work; of the other
        backends `completed` tells how far they are."""

    def pick(self, naive: bool = False, stop_gain: float | None = None) -> int:
        """Makes one pick, as `step` does, if its gain is at least `stop_gain`. Returns the pick, or -1 if none was made."""

    def step_among(self, candidates: Tensor) -> int:
        """Makes one pick among `candidates` [r] int64, which are open: neither picked, preselected nor closed. Returns the
        pick."""

    def close(self, candidates: Tensor) -> None:
        """These `candidates` [r] int64, on the CPU, are not picked from now on."""

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32, `assignment` [m]
        int64; returns f(S), the preselected included."""


class PartialGains(Protocol):
    """Gains of candidates over the clients that are here: parts of sums over all ranks. A candidate of few live pairs leaves their list behind,
    by its number, and its later evaluations read that list; which lists are kept changes no sum."""

    def begin(self, rows: int, listing: bool) -> None:
        """Begins a batch of candidates; `listing`: whether to prepare lists of their live pairs."""

    def add(self, s: Tensor, first: int, best: Tensor, weights: Tensor, sums: Tensor) -> None:
        """Adds to `sums` [rows] int64 the terms trunc(max(0, s_rc - best) weight) over the clients from `first` on, of which s
        [rows, c] has the similarities; `best` and `weights` are those of all clients."""

    def keep(self, numbers: list[int]) -> None:
        """Ends the batch: keeps the lists of its candidates, whose `numbers` are distinct."""

    def has(self, number: int) -> bool:
        """Whether a candidate has a list."""

    def evaluate(self, numbers: list[int], best: Tensor, weights: Tensor) -> Tensor:
        """The gains [r] int64 of candidates that have lists."""

    def win(self, number: int, position: int, best: Tensor, owner: Tensor) -> None:
        """Writes the similarities of a candidate's list that are better to `best`, and `position` to `owner` [clients] int64."""

    def forget(self, number: int) -> None:
        """Drops a candidate's list, if it has one."""


class Kernels(Protocol):
    """The kernels of one backend: a module, whose functions say what they do."""

    TAKES: Takes

    def pairwise(
        self, x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None
    ) -> Tensor: ...

    def FacilityLocation(self, problem: Problem) -> Run: ...

    def PartialGains(
        self, clients: int, dtype: torch.dtype, device: torch.device, entries: int
    ) -> PartialGains:
        """For float32 or float64 similarities to so many clients; the lists have at most `entries` pairs in all."""

    def workspace(self, problem: Problem) -> int:
        """An upper bound of the bytes that a run allocates; of the tensors only the shapes and types are read."""


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
