"""The names of `trak.projectors` (traker 0.3.2): random projections of per-sample gradients.

Entries of the matrix have a variance of 1, as trak's: nothing is divided by sqrt(proj_dim). The matrix is not stored: it is
`flashcoreset.projection_matrix` times sqrt(proj_dim), a function of proj_type, seed and model_id, the same on every device and for
every projector here. `block_size` and `max_batch_size`, which trak trades memory for speed with, change nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.tensor import as_integer
from flashcoreset.compat._gradients import (
    Chunked,
    Part,
    check_floating,
    check_width,
    member_seed,
    parts_of,
    project,
    unscaled,
    whole,
)
from flashcoreset.sketch import projection_matrix


class ProjectionType(str, Enum):
    """The distribution of the matrix's entries."""

    normal = "normal"
    rademacher = "rademacher"


KINDS = {ProjectionType.normal: "gaussian", ProjectionType.rademacher: "rademacher"}


class AbstractProjector(ABC):
    """What trak's TRAKer calls.

    Args:
        grad_dim: columns of the gradients.
        proj_dim: columns of the result.
        seed: a 64-bit integer.
        proj_type: a ProjectionType or its name.
        device: where results are; gradients are moved there.
    """

    @abstractmethod
    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
    ) -> None:
        self.grad_dim = grad_dim
        self.proj_dim = proj_dim
        self.seed = seed
        self.proj_type = proj_type
        self.device = device

    @abstractmethod
    def project(self, grads: dict[str, Tensor] | Tensor, model_id: int) -> Tensor:
        """The projection of `grads`: a tensor [B, grad_dim], or a dictionary of [B, ...] that is flattened in its order.

        Each `model_id` has a matrix of its own.
        """

    def free_memory(self) -> None:  # noqa: B027
        """Nothing to free: no matrix is stored."""


class NoOpProjector(AbstractProjector):
    """Gradients as they are; those of a dictionary flattened, on `device`."""

    def __init__(
        self,
        grad_dim: int = 0,
        proj_dim: int = 0,
        seed: int = 0,
        proj_type: str | ProjectionType = "na",
        device: str | torch.device = "cuda",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)

    def project(self, grads: dict[str, Tensor] | Tensor, model_id: int) -> Tensor:
        if isinstance(grads, Tensor):
            return grads
        return torch.cat([part.values for part in parts_of(grads, "grads", self.device)], 1)


class _Projector(AbstractProjector):
    """A projection without a matrix."""

    dtype: torch.dtype | None = None  # of the result; None for the gradients' own
    model_id = 0  # the last one

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
    ) -> None:
        super().__init__(grad_dim, as_integer(proj_dim, "proj_dim"), seed, proj_type, device)
        self._kind = _kind(proj_type)
        if self.proj_dim < 1:
            raise ValueError(f"proj_dim must be at least 1, got {self.proj_dim}")
        member_seed(seed, 0, "model_id")  # refuses what is no seed

    def project(self, grads: dict[str, Tensor] | Tensor, model_id: int) -> Tensor:
        parts = parts_of(grads, "grads", self.device)
        self._check(parts)
        seed = member_seed(self.seed, model_id, "model_id")
        found = project_unscaled(parts, self.proj_dim, kind=self._kind, seed=seed, dtype=self.dtype)
        self.model_id = model_id
        return found

    def _check(self, parts: list[Part]) -> None:
        """Raises ValueError for gradients that the projector is not for."""


class BasicProjector(_Projector):
    """The projection, in precision and type `dtype`."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        check_floating(dtype, "dtype")
        self.block_size = min(self.proj_dim, block_size)
        self.num_blocks = -(-self.proj_dim // self.block_size)
        self.dtype = dtype
        self.model_id = model_id

    def _check(self, parts: list[Part]) -> None:
        check_width(parts, self.grad_dim, "grad_dim", "grads")


class BasicSingleBlockProjector(BasicProjector):
    """The projection, and its matrix for those who look at it."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device, proj_dim, dtype, model_id)

    @property
    def proj_matrix(self) -> Tensor:
        """[grad_dim, proj_dim]: the matrix of the model that came last, formed anew at each look."""
        seed = member_seed(self.seed, self.model_id, "model_id")
        matrix = projection_matrix(
            self.grad_dim,
            self.proj_dim,
            kind=self._kind,
            seed=seed,
            dtype=self.dtype or torch.float32,
            device=self.device,
        )
        return unscaled(matrix).to(self.dtype)


class CudaProjector(_Projector):
    """The projection, in the gradients' own type, on any device."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        max_batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        self.max_batch_size = max_batch_size


class ChunkedCudaProjector(Chunked):
    """The sum of one projection per chunk of the parameters.

    Args:
        projector_per_chunk: projectors, of this module or others.
        max_chunk_size: columns that a chunk has at most; a parameter that does not fit begins the next.
        params_per_chunk: columns of each chunk.
        feat_bs: rows that trak would allocate; any number is taken.
        device: where results are.
        dtype: the type of results.
    """

    def __init__(
        self,
        projector_per_chunk: list[Any],
        max_chunk_size: int,
        params_per_chunk: list[int],
        feat_bs: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(projector_per_chunk, max_chunk_size, params_per_chunk, device, dtype)
        self.params_per_chunk = params_per_chunk
        self.feat_bs = feat_bs

    def project(self, grads: dict[str, Tensor], model_id: int) -> Tensor:
        return self._project_dictionary(grads, "grads", model_id=model_id)


def project_unscaled(
    parts: list[Part], dim: int, *, kind: str, seed: int, dtype: torch.dtype | None
) -> Tensor:
    """[B, dim] the parts times the matrix whose entries have a variance of 1, in `dtype`; None is the parts' own."""
    if dtype is None:
        dtype = parts[0].values.dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.values.dtype)
        check_floating(dtype, "grads")
    found = unscaled(project(parts, dim, kind=kind, seed=seed, dtype=dtype, name="grads"))
    # Sums of whole numbers with signs are whole, but for what scaling to and fro rounded.
    if kind == "rademacher" and whole(parts):
        found.round_()
    return found.to(dtype)


def _kind(proj_type: Any) -> str:
    try:
        return KINDS[ProjectionType(proj_type)]
    except ValueError:
        names = ", ".join(repr(each.value) for each in ProjectionType)
        raise KeyError(f"proj_type must be one of {names}, got {proj_type!r}") from None
