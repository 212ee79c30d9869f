"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset.caratheodory.problem import Problem


class Kernels(Protocol):
    """The kernels of one backend, for tensors on its device; `flashcoreset.caratheodory.reference` defines what they compute."""

    TAKES: Takes

    def caratheodory(
        self, problem: Problem, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """At most rank + 1 of the rows and their new weights.

        Args:
            problem: the rows.
            out: two tensors [problem.room], int64 and float64, to write to; None allocates them.

        Returns:
            [k] int64, ascending, and [k] float64, > 0: the first k entries of `out`.

        Raises:
            BackendUnavailableError: if the kernels cannot run here.
            ValueError: for NaN or infinity in `x`, weights out of range, arrays that do not fit each other.
            torch.OutOfMemoryError: if a device has no room for partial sums (one row of float64 per 256 rows of x).
        """
        ...


def choose(backend: str | None, device: torch.device) -> Kernels:
    """The kernels for tensors on `device`; see `flashcoreset._core.dispatch.choose_kernels`."""
    return cast(Kernels, choose_kernels(backend, device, "caratheodory"))


if TYPE_CHECKING:
    from flashcoreset.caratheodory import cpu, cuda, reference, triton

    _CONFORM: tuple[Kernels, ...] = (
        cpu,
        cuda,
        reference,
        triton,
    )
