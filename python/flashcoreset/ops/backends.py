"""Chooses the kernels for a call."""

from __future__ import annotations

from types import ModuleType

import torch

from flashcoreset import _native, kernels
from flashcoreset._errors import BackendUnavailableError, warn_slow_path
from flashcoreset._tensor import one_of

BACKENDS = ("cpu", "cuda", "triton", "torch")

# The families that have Triton kernels.
_TRITON_FAMILIES = ("facility_location",)


def check_backend(backend: object) -> None:
    """Raises TypeError or ValueError unless `backend` is None or a known name."""
    if backend is not None:
        one_of(backend, "backend", BACKENDS)


def choose_kernels(backend: str | None, device: torch.device, family: str) -> ModuleType:
    """The kernels of `backend` for tensors on `device`; for None the fastest that can take them.

    Raises:
        BackendUnavailableError: if `backend` was named and cannot run here, or has no kernel of `family`.
        ValueError: if FLASHCORESET_ISA is not a known name.
    """
    if backend == "torch":
        return kernels.torch
    if backend == "triton" and family in _TRITON_FAMILIES:
        return _triton_kernels(device)
    if backend in ("cuda", "triton"):
        raise BackendUnavailableError(
            f"backend {backend!r}: flashcoreset was built without {backend} kernels for {family}; "
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


def triton_failure(device: torch.device) -> str | None:
    """Why the Triton kernels cannot take tensors on `device`, and what to do; None if they can."""
    try:
        from flashcoreset.kernels import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with pip install triton"
    if device.type == "cuda" or (device.type == "cpu" and triton.INTERPRETED):
        return None
    if not torch.cuda.is_available():
        return (
            f"Triton kernels run on a CUDA device, and torch finds none; pass backend='cpu' or backend='torch' "
            f"for the tensors on {device}"
        )
    return (
        f"Triton kernels take CUDA tensors, these are on {device}; move them with .cuda(), or pass "
        "backend='cpu' or backend='torch'"
    )


def _triton_kernels(device: torch.device) -> ModuleType:
    if (failure := triton_failure(device)) is not None:
        raise BackendUnavailableError(f"backend 'triton': {failure}")
    from flashcoreset.kernels import triton

    return triton
