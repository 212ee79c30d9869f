"""Chooses the kernels for a call."""

from __future__ import annotations

from types import ModuleType

import torch

from flashcoreset import _native, kernels
from flashcoreset._errors import BackendUnavailableError, warn_slow_path
from flashcoreset._tensor import one_of

BACKENDS = ("cpu", "cuda", "triton", "torch")


def check_backend(backend: object) -> None:
    """Raises TypeError or ValueError unless `backend` is None or a known name."""
    if backend is not None:
        one_of(backend, "backend", BACKENDS)


def choose_kernels(backend: str | None, device: torch.device) -> ModuleType:
    """The kernels of `backend` for tensors on `device`; for None the fastest that can take them.

    Raises:
        BackendUnavailableError: if `backend` was named and cannot run here.
        ValueError: if FLASHCORESET_ISA is not a known name.
    """
    if backend == "torch":
        return kernels.torch
    if backend in ("cuda", "triton"):
        raise BackendUnavailableError(
            f"backend {backend!r}: flashcoreset was built without {backend} kernels; "
            f"move the tensors to the CPU for backend='cpu', or pass backend='torch'"
        )
    if device.type != "cpu":
        reason = f"no compiled kernel takes tensors on {device}"
        if backend == "cpu":
            raise BackendUnavailableError(
                f"backend 'cpu': {reason}; move them with .cpu(), or pass backend='torch'"
            )
        warn_slow_path(reason)
        return kernels.torch
    if backend is None and (missing := _native.failure()) is not None:
        warn_slow_path(missing)
        return kernels.torch
    _native.module()
    return kernels.cpu
