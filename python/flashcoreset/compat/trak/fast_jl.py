"""The functions of `fast_jl`, trak's CUDA extension, on any device: `sys.modules["fast_jl"] = flashcoreset.compat.trak.fast_jl`
makes trak's own CudaProjector use them.

    project_{normal|rademacher}_{8|16|32}(grads, proj_dim, seed, num_sms) -> Tensor

`grads` [B, D] times a matrix [D, proj_dim] whose entries have a variance of 1: [B, proj_dim] in the type of `grads`. The matrix is that of
`CudaProjector` for model_id=0. The numbers in the names (rows that fast_jl takes at a time) and `num_sms` change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flashcoreset._core.tensor import as_int64, as_integer
from flashcoreset.compat._gradients import parts_of
from flashcoreset.compat.trak.projectors import KINDS, ProjectionType, project_unscaled

__all__ = [
    "project_normal_8",
    "project_normal_16",
    "project_normal_32",
    "project_rademacher_8",
    "project_rademacher_16",
    "project_rademacher_32",
]


def _named(proj_type: ProjectionType, rows: int) -> Callable[[Tensor, int, int, int], Tensor]:
    def project(grads: Tensor, proj_dim: int, seed: int, num_sms: Any) -> Tensor:
        if not isinstance(grads, Tensor):
            raise TypeError(f"grads must be a tensor, got {type(grads).__name__}")
        return project_unscaled(
            parts_of(grads, "grads", None),
            as_integer(proj_dim, "proj_dim"),
            kind=KINDS[proj_type],
            seed=as_int64(seed, "seed"),
            dtype=None,
        )

    project.__name__ = project.__qualname__ = f"project_{proj_type.value}_{rows}"
    return project


project_normal_8 = _named(ProjectionType.normal, 8)
project_normal_16 = _named(ProjectionType.normal, 16)
project_normal_32 = _named(ProjectionType.normal, 32)
project_rademacher_8 = _named(ProjectionType.rademacher, 8)
project_rademacher_16 = _named(ProjectionType.rademacher, 16)
project_rademacher_32 = _named(ProjectionType.rademacher, 32)
