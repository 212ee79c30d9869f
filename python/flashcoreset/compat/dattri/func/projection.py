"""The names of `dattri.func.projection` (dattri 0.3): random projections of gradients and other features.

normal and rademacher keep squared lengths in expectation (they are divided by sqrt(proj_dim)), as does sjlt, one +-1 per column;
random_mask takes columns as they are, and grass is sjlt of `grass_multiplier` x proj_dim columns that random_mask took. All of them run on every
device. No matrix is stored: it is `flashcoreset.projection_matrix`, a function of proj_type, seed and ensemble_id, the same on every device.
The columns of random_mask are those that dattri takes on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import Tensor

from flashcoreset._core.tensor import as_integer
from flashcoreset.compat._gradients import (
    Chunked,
    Part,
    check_floating,
    check_width,
    columns,
    member_seed,
    parts_of,
    project,
)

Features = dict[str, Tensor] | Tensor


class ProjectionType(str, Enum):
    """The kinds of projections."""

    identity = "identity"
    normal = "normal"
    rademacher = "rademacher"
    sjlt = "sjlt"
    random_mask = "random_mask"
    grass = "grass"


_KINDS = {
    ProjectionType.normal: "gaussian",
    ProjectionType.rademacher: "rademacher",
    ProjectionType.sjlt: "sjlt",
    ProjectionType.grass: "sjlt",
}
_GRASS = 4
_MEMBER_APART = 100_000  # dattri's distance between the seeds of the ensemble's members


class AbstractProjector(ABC):
    """A projection of features.

    Args:
        feature_dim: columns of the features.
        proj_dim: columns of the result; of "identity", any number.
        seed: a 64-bit integer.
        proj_type: a ProjectionType or its name.
        device: where results are; features are moved there.
    """

    @abstractmethod
    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
    ) -> None:
        self.feature_dim = feature_dim
        self.proj_dim = proj_dim
        self.seed = seed
        self.proj_type = proj_type
        self.device = device

    @abstractmethod
    def project(self, features: Features, ensemble_id: int) -> Tensor:
        """The projection of `features`: a tensor [B, feature_dim], or a dictionary of [B, ...] that is flattened in its order.

        Each `ensemble_id` has a matrix of its own.
        """

    @abstractmethod
    def free_memory(self) -> None:
        """Nothing to free: no matrix is stored."""


class _Projector(AbstractProjector):
    """A projection without a matrix, in precision and type `dtype`."""

    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        dtype: torch.dtype,
        grass_multiplier: int,
    ) -> None:
        super().__init__(feature_dim, as_integer(proj_dim, "proj_dim"), seed, proj_type, torch.device(device))
        self._type, own = parse_projection_type(proj_type)
        if self._type != ProjectionType.identity and self.proj_dim < 1:
            raise ValueError(f"proj_dim must be at least 1, got {self.proj_dim}")
        member_seed(seed, 0, "ensemble_id")  # refuses what is no seed
        if self._type in _KINDS:
            check_floating(dtype, "dtype")
        self.dtype = dtype
        self.ensemble_id = 0
        chosen = self.proj_dim
        if self._type == ProjectionType.grass:
            multiplier = as_integer(grass_multiplier, "grass_multiplier") if own is None else own
            if multiplier < 1:
                raise ValueError(f"grass_multiplier must be at least 1, got {multiplier}")
            chosen = min(self.proj_dim * multiplier, feature_dim)
            self.grass_multiplier = chosen // self.proj_dim
        self._chosen = chosen
        self._mask: tuple[int, Tensor] | None = None

    @property
    def active_indices(self) -> Tensor:
        """The ascending numbers of the columns that random_mask and grass take for the `ensemble_id` that came last."""
        if self._type not in (ProjectionType.random_mask, ProjectionType.grass):
            raise AttributeError(f"{self._type.value} has no active_indices")
        if self._mask is None or self._mask[0] != self.ensemble_id:
            # On the CPU for every device, so that the columns are the same on all of them.
            generator = torch.Generator().manual_seed(int(self.seed) + _MEMBER_APART * self.ensemble_id)
            order = torch.randperm(self.feature_dim, generator=generator)
            self._mask = self.ensemble_id, order[: self._chosen].sort().values.to(self.device)
        return self._mask[1]

    def project(self, features: Features, ensemble_id: int) -> Tensor:
        seed = member_seed(self.seed, ensemble_id, "ensemble_id")
        parts = parts_of(features, "features", self.device)
        if self._type != ProjectionType.identity:
            check_width(parts, self.feature_dim, "feature_dim", "features")
        self.ensemble_id = int(ensemble_id)
        if self._type == ProjectionType.identity:
            if isinstance(features, Tensor):
                return features.to(self.device, self.dtype)
            return torch.cat([part.values.to(self.dtype) for part in parts], 1)
        if self._type in (ProjectionType.random_mask, ProjectionType.grass):
            chosen = columns(parts, self.active_indices)
            if self._type == ProjectionType.random_mask:
                return chosen.to(self.dtype)
            parts = [Part(chosen, "features")]
        found = project(
            parts, self.proj_dim, kind=_KINDS[self._type], seed=seed, dtype=self.dtype, name="features"
        )
        return found.to(self.dtype)

    def free_memory(self) -> None:
        """Forgets the columns of random_mask and grass, which are found again."""
        self._mask = None


class BasicProjector(_Projector):
    """The projection; `block_size`, which dattri trades memory for speed with, changes nothing."""

    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        ensemble_id: int = 0,
        grass_multiplier: int = _GRASS,
    ) -> None:
        super().__init__(feature_dim, proj_dim, seed, proj_type, device, dtype, grass_multiplier)
        self.block_size = min(self.proj_dim, block_size)
        self.num_blocks = -(-self.proj_dim // self.block_size)
        self.ensemble_id = ensemble_id


class CudaProjector(_Projector):
    """The projection, on any device."""

    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        grass_multiplier: int = _GRASS,
    ) -> None:
        super().__init__(feature_dim, proj_dim, seed, proj_type, device, dtype, grass_multiplier)


class ChunkedCudaProjector(Chunked):
    """The sum of one projection per chunk of the features.

    Args:
        projector_per_chunk: projectors, of this module or others.
        max_chunk_size: columns that a chunk has at most; a parameter that does not fit begins the next.
        dim_per_chunk: columns of each chunk.
        feature_batch_size: rows that dattri would allocate; any number is taken.
        device: where results are.
        dtype: the type of results.
    """

    def __init__(
        self,
        projector_per_chunk: list[Any],
        max_chunk_size: int,
        dim_per_chunk: list[int],
        feature_batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(projector_per_chunk, max_chunk_size, dim_per_chunk, device, dtype)
        self.dim_per_chunk = dim_per_chunk
        self.feature_batch_size = feature_batch_size

    def dict_project(self, features: dict[str, Tensor], ensemble_id: int) -> Tensor:
        """The projection of a dictionary of [B, ...]."""
        return self._project_dictionary(features, "features", ensemble_id=ensemble_id)

    def project(self, features: Tensor, ensemble_id: int) -> Tensor:
        """The projection of a tensor [B, sum of dim_per_chunk]."""
        if isinstance(features, dict):
            raise TypeError(
                "ChunkedCudaProjector.project() only accepts Tensor inputs; pass the dictionary to dict_project()"
            )
        parts = parts_of(features, "features", self.device)
        check_width(parts, sum(self._sizes), "sum(dim_per_chunk)", "features")
        pieces = list(parts[0].values.split(self._sizes, 1))
        return self._sum(pieces, len(features), {"ensemble_id": ensemble_id})


def make_random_projector(
    param_shape_list: list[int],
    feature_batch_size: int,
    proj_dim: int,
    proj_max_batch_size: int,
    device: torch.device,
    proj_seed: int = 0,
    proj_type: str | ProjectionType = ProjectionType.sjlt,
    *,
    dtype: torch.dtype = torch.float32,
    grass_multiplier: int = _GRASS,
) -> BasicProjector | CudaProjector:
    """A projector of features of sum(param_shape_list) columns.

    Args:
        param_shape_list: columns of each parameter.
        feature_batch_size, proj_max_batch_size: what dattri cuts chunks by; nothing is cut here, and they change nothing.
        proj_dim, proj_seed, proj_type, device, dtype, grass_multiplier: as for the projectors.

    Returns:
        A BasicProjector on the CPU, else a CudaProjector.
    """
    kind = BasicProjector if torch.device(device).type == "cpu" else CudaProjector
    return kind(
        int(sum(param_shape_list)), proj_dim, proj_seed, proj_type, device, dtype=dtype, grass_multiplier=grass_multiplier
    )  # fmt: skip


def random_project(
    feature: Features,
    feature_batch_size: Any = None,
    proj_dim: int | None = None,
    proj_max_batch_size: int | None = None,
    proj_seed: int = 0,
    proj_type: str | ProjectionType = "normal",
    *,
    device: str | torch.device = "cpu",
    proj_params: Any = None,
) -> Callable[..., Tensor]:
    """A function that projects features like `feature`.

    Both conventions are taken: random_project(feature, feature_batch_size, proj_dim, proj_max_batch_size, ...) of dattri 0.3.0, and
    random_project(feature, proj_params) of the versions after.

    Args:
        feature: a tensor [B, ...] or a dictionary of them; only its shape and type count.
        feature_batch_size: B.
        proj_dim: columns of the result.
        proj_max_batch_size: rows that dattri's CUDA kernels take at a time; changes nothing here.
        proj_seed: a 64-bit integer.
        proj_type: "identity", "normal", "rademacher", "sjlt", "random_mask", "grass" or "grass_N", which takes N x proj_dim columns.
        device: where results are, "cpu" or "cuda".
        proj_params: an object with all of these as attributes (`RandomProjectionParams` of either library).

    Returns:
        A function (feature, ensemble_id=0) -> [B, proj_dim], in the type of `feature`.

    Raises:
        TypeError, ValueError: for arguments that are missing or that there cannot be.
    """
    if proj_params is None and hasattr(feature_batch_size, "proj_dim"):
        proj_params, feature_batch_size = feature_batch_size, None
    if proj_params is not None:
        if not (feature_batch_size is None and proj_dim is None and proj_max_batch_size is None):
            raise TypeError("random_project takes proj_params or numbers, not both")
        feature_batch_size, proj_dim = proj_params.feature_batch_size, proj_params.proj_dim
        proj_max_batch_size, proj_seed = proj_params.proj_max_batch_size, proj_params.proj_seed
        proj_type, device = proj_params.proj_type, proj_params.device
    given = {
        "feature_batch_size": feature_batch_size,
        "proj_dim": proj_dim,
        "proj_max_batch_size": proj_max_batch_size,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise TypeError(f"random_project needs {' and '.join(missing)}, or proj_params")
    rows = as_integer(feature_batch_size, "feature_batch_size")
    if rows < 1:
        raise ValueError(f"feature_batch_size must be at least 1, got {rows}")
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    values = list(feature.values()) if isinstance(feature, dict) else [feature]
    base, multiplier = parse_projection_type(proj_type)
    projector = make_random_projector(
        [value.numel() // rows for value in values],
        rows,
        given["proj_dim"],
        given["proj_max_batch_size"],
        place,
        proj_seed,
        base,
        dtype=values[0].dtype,
        grass_multiplier=_GRASS if multiplier is None else multiplier,
    )

    def project_feature(feature: Features, ensemble_id: int = 0) -> Tensor:
        return projector.project(feature, ensemble_id)

    return project_feature


def arnoldi_project(*args: Any, **kwargs: Any) -> NoReturn:
    """Not here: an eigendecomposition of a Hessian is no random projection."""
    raise NotImplementedError("arnoldi_project is not supported; call dattri.func.projection.arnoldi_project")


class ArnoldiProjector:
    """Not here: an eigendecomposition of a Hessian is no random projection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "ArnoldiProjector is not supported; use dattri.func.projection.ArnoldiProjector"
        )


def parse_projection_type(proj_type: Any) -> tuple[ProjectionType, int | None]:
    """The type that `proj_type` names, and the N of "grass_N"."""
    name = proj_type.value if isinstance(proj_type, Enum) else proj_type
    multiplier = None
    if isinstance(name, str) and name.startswith("grass_"):
        try:
            multiplier = int(name.removeprefix("grass_"))
        except ValueError:
            raise ValueError(f"proj_type must be 'grass_N' with a whole number N, got {name!r}") from None
        name = "grass"
    try:
        return ProjectionType(name), multiplier
    except ValueError:
        names = ", ".join(repr(each.value) for each in ProjectionType)
        raise ValueError(f"proj_type must be one of {names} or 'grass_N', got {proj_type!r}") from None
