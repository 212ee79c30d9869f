"""The names of `dattri.params.projection`: what a random projection is given by, as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashcoreset._core.tensor import as_integer
from flashcoreset.compat.dattri.func.projection import parse_projection_type

__all__ = [
    "BaseProjectionParams",
    "DVEmbProjectionParams",
    "FactGrassProjectionParams",
    "GeneralProjectionParams",
    "IFProjectionParams",
    "LoGraProjectionParams",
    "RandomProjectionParams",
    "TRAKProjectionParams",
    "TracInProjectionParams",
]

_INTEGERS = ("proj_max_batch_size", "proj_seed", "proj_dim", "proj_dim_per_layer", "feature_batch_size")


@dataclass(kw_only=True)
class BaseProjectionParams:
    """What all projections have.

    Attributes:
        proj_max_batch_size: rows that dattri's CUDA kernels take at a time; changes nothing here.
        proj_seed: a 64-bit integer.
        proj_type: "identity", "normal", "rademacher", "sjlt", "random_mask", "grass" or "grass_N".
    """

    proj_max_batch_size: int = 64
    proj_seed: int = 0
    proj_type: str = "normal"

    def __post_init__(self) -> None:
        parse_projection_type(self.proj_type)
        for name in _INTEGERS:
            value = getattr(self, name, None)
            if value is not None:
                setattr(self, name, as_integer(value, name))


@dataclass(kw_only=True)
class GeneralProjectionParams(BaseProjectionParams):
    """A projection to `proj_dim` dimensions."""

    proj_dim: int


@dataclass(kw_only=True)
class IFProjectionParams(GeneralProjectionParams):
    """Defaults of influence functions."""

    proj_dim: int = 512
    proj_max_batch_size: int = 32


@dataclass(kw_only=True)
class TracInProjectionParams(BaseProjectionParams):
    """Defaults of TracIn."""

    proj_dim: int = 512
    proj_max_batch_size: int = 32


@dataclass(kw_only=True)
class TRAKProjectionParams(GeneralProjectionParams):
    """Defaults of TRAK."""

    proj_dim: int = 512
    proj_max_batch_size: int = 32


@dataclass(kw_only=True)
class LoGraProjectionParams(BaseProjectionParams):
    """A projection per layer, of LoGra."""

    proj_dim_per_layer: int = 4096


@dataclass(kw_only=True)
class FactGrassProjectionParams(BaseProjectionParams):
    """A projection per layer, of FactGraSS."""

    proj_dim_per_layer: int = 4096


@dataclass(kw_only=True)
class DVEmbProjectionParams(BaseProjectionParams):
    """A projection per layer, of data value embeddings; None for none."""

    proj_dim_per_layer: int | None = None
    proj_type: str = "identity"


@dataclass(kw_only=True)
class RandomProjectionParams(GeneralProjectionParams):
    """What `random_project(feature, proj_params)` takes.

    Attributes:
        feature_batch_size: rows of the features.
        device: where results are.
    """

    proj_dim: int
    proj_max_batch_size: int
    proj_seed: int
    feature_batch_size: int
    device: Any
    proj_type: str = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.device = torch.device(self.device)
