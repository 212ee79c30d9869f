"""What each backend of this family offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes, choose_kernels
from flashcoreset._core.tensor import Csr


class Kernels(Protocol):
    """The kernels of one backend: a module, whose functions say what they do."""

    TAKES: Takes

    def sketch(self, x: Tensor, dim: int, *, kind: str, seed: int, offset: int, nnz: int) -> Tensor: ...

    def projection_matrix(
        self,
        rows: int,
        dim: int,
        *,
        kind: str,
        seed: int,
        offset: int,
        nnz: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor: ...


class SparseKernels(Kernels, Protocol):
    """Those of a backend that takes sparse matrices."""

    def sketch_csr(self, x: Csr, dim: int, *, kind: str, seed: int, offset: int, nnz: int) -> Tensor: ...


def choose_sparse(backend: str | None, device: torch.device) -> SparseKernels:
    """The kernels for sparse matrices on `device`."""
    return cast(SparseKernels, choose_kernels(backend, device, "sketch", sparse=True))


def choose(backend: str | None, device: torch.device) -> Kernels:
    """The kernels for tensors on `device`; see `flashcoreset._core.dispatch.choose_kernels`."""
    return cast(Kernels, choose_kernels(backend, device, "sketch"))


if TYPE_CHECKING:
    from flashcoreset.sketch import cpu, cuda, reference, triton

    _CONFORM: tuple[Kernels, ...] = (
        cpu,
        cuda,
        reference,
        triton,
    )
    _CONFORM_SPARSE: tuple[SparseKernels, ...] = (cpu, reference)
