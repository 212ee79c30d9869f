"""Chooses the kernels for a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch

from flashcoreset._core import cuda, native
from flashcoreset._core.errors import BackendUnavailableError, no_sparse_kernel, warn_slow_path
from flashcoreset._core.imports import imported
from flashcoreset._core.tensor import one_of


@dataclass(frozen=True)
class Takes:
    """What a backend's kernels of one family take beside dense tensors of float32 and float64 on its device.

    Attributes:
        sparse: matrices in CSR form.
        half: float16 and bfloat16 as they are; for other backends they are converted first.
        checks_values: the kernels check weights, preselected candidates and offsets on the device; a check from outside would
            have to wait for the device.
        host: names the small part of the work that the compiled CPU module does on the host; None if there is none.
    """

    sparse: bool = False
    half: bool = False
    checks_values: bool = False
    host: str | None = None


BACKENDS = ("cpu", "cuda", "triton", "torch")

# The backends of each family; a family's default on a type of device is the first of DEFAULTS that it has and that can run.
# docs/backends.md says why.
FAMILIES = {
    "facility_location": ("cpu", "cuda", "triton", "torch"),
    "nearest_order": ("cpu", "torch"),
    "transport": ("cpu", "torch"),
    "sinkhorn": ("cpu", "cuda", "triton", "torch"),
    "sketch": ("cpu", "cuda", "triton", "torch"),
    "scores": ("cpu", "triton", "torch"),
    "matching": ("cpu", "cuda", "triton", "torch"),
    "directions": ("cpu", "cuda", "triton", "torch"),
    "pairwise": ("cpu", "cuda", "triton", "torch"),
    "caratheodory": ("cpu", "cuda", "triton", "torch"),
    "pursuit": ("cpu", "cuda", "triton", "torch"),
}
DEFAULTS = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}


def check_backend(backend: object) -> None:
    """Raises TypeError or ValueError unless `backend` is None or a known name."""
    if backend is not None:
        one_of(backend, "backend", BACKENDS)


def choose_kernels(
    backend: str | None, device: torch.device, family: str, *, sparse: bool = False
) -> ModuleType:
    """The kernels of `backend` for tensors on `device`, or (`sparse`) a sparse matrix there; for None the fastest that
    can take them.

    Raises:
        BackendUnavailableError: if `backend` was named and cannot run here, or has no kernel of `family`.
        ValueError: if FLASHCORESET_ISA is not a known name.
    """
    if backend is not None:
        reason = _failure(backend, device, family, sparse)
        if reason is not None:
            raise BackendUnavailableError(f"backend {backend!r}: {reason}")
        return kernels_of(backend, family)
    reasons = []
    for name in DEFAULTS.get(device.type, ("torch",)):
        if name == "torch":
            break
        reason = _failure(name, device, family, sparse)
        if reason is None:
            return kernels_of(name, family)
        reasons.append(reason)
    warn_slow_path("; ".join(reasons) or f"no compiled kernel takes tensors on {device}")
    return kernels_of("torch", family)


def _failure(backend: str, device: torch.device, family: str, sparse: bool) -> str | None:
    """Why `backend` cannot serve a call, and what to do; None if it can."""
    if backend not in FAMILIES[family]:
        return (
            f"there are no {backend} kernels for {family}; move the tensors to the CPU for backend='cpu', or pass "
            "backend='torch'"
        )
    if backend == "torch":
        return None
    if backend in ("cuda", "triton"):
        reason = cuda_failure(device) if backend == "cuda" else triton_failure(device)
        if reason is not None:
            return reason
        takes = takes_of(backend, family)
        if sparse and not takes.sparse:
            return no_sparse_kernel(backend)
        if takes.host is not None and (missing := native.failure()) is not None:
            return f"of {family} {takes.host} on the host, by the compiled CPU module: {missing}"
        return None
    if device.type != "cpu":
        return f"the compiled CPU kernels do not take tensors on {device}; move them with .cpu(), or pass backend='torch'"
    return native.failure()


@functools.cache
def kernels_of(backend: str, family: str) -> ModuleType:
    """The kernels of `backend` for `family`, whether they can run here or not."""
    return imported(f"flashcoreset.{family}.{'reference' if backend == 'torch' else backend}")


def takes_of(backend: str, family: str) -> Takes:
    """What the kernels of `backend` for `family`, which must exist, take.

    Raises:
        ImportError: if the backend needs a package that is missing.
    """
    takes: Takes = kernels_of(backend, family).TAKES
    return takes


def cuda_failure(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot take tensors on `device`, and what to do; None if they can."""
    if (reason := native.cuda_failure(device.index or 0)) is not None:
        return reason
    if device.type != cuda.DEVICE_TYPE:
        return f"CUDA kernels take CUDA tensors, these are on {device}; move them with .cuda(), or pass backend='cpu'"
    return None


def triton_failure(device: torch.device) -> str | None:
    """Why the Triton kernels cannot take tensors on `device`, and what to do; None if they can."""
    try:
        interpreted = imported("flashcoreset.triton_kernels.pairwise").INTERPRETED
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with pip install triton"
    if device.type == "cuda" or (device.type == "cpu" and interpreted):
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
