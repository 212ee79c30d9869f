"""Finds and loads the compiled CPU module: one source built for several instruction sets, the best one taken
at first use."""

from __future__ import annotations

import functools
import os
import threading
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.errors import BackendUnavailableError
from flashcoreset._core.imports import imported

# Best first. The names are those of FLASHCORESET_ISA; the modules are the package's own.
MODULES = {
    "x86-64-v4": "_cpu_x86_64_v4",
    "x86-64-v3": "_cpu_x86_64_v3",
    "x86-64-v2": "_cpu_x86_64_v2",
    "aarch64": "_cpu_aarch64",
    "generic": "_cpu_generic",
}

_REMEDY = "reinstall flashcoreset with a C++17 compiler present (pip install .), or pass backend='torch'"


def capsule(tensor: Tensor) -> Any:
    """A DLPack capsule of a tensor, as the compiled modules take it.

    Raises:
        ValueError: for a tensor without values of its own.
    """
    # Its storage is null, but the address of a part of it is not.
    if torch._is_functional_tensor(tensor):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} has no values while torch.func.functionalize traces the call; make the call "
            "outside of it"
        )
    return torch.utils.dlpack.to_dlpack(tensor)


@functools.cache
def _import(name: str) -> ModuleType | str:
    """The package's compiled module of that name, or why there is none."""
    try:
        # Imported where Ctrl-C does not reach: pybind11 turns Ctrl-C into an ImportError, and the build would count as missing.
        module = imported(f"flashcoreset.{name}")
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    if name != "_processor":
        # A capsule costs 0.3 us, calling Tensor.__dlpack__ from C++ 2 us.
        module.set_exporter(Tensor, capsule)
    return module


@functools.cache
def unavailable_reason(isa: str) -> str | None:
    """Why the build for `isa` cannot be used here, or None if it can."""
    # Checked first: a build for another processor would end the process at its first instruction.
    processor = _import("_processor")
    if isinstance(processor, str):
        return processor
    if isa not in processor.supported_isas():
        return "this processor does not have it"
    module = _import(MODULES[isa])
    return None if isinstance(module, ModuleType) else module


def available_isas() -> list[str]:
    """The builds that run here, best first."""
    return [isa for isa in MODULES if unavailable_reason(isa) is None]


def load_isa(isa: str) -> ModuleType:
    """The build for one instruction set.

    Raises:
        ValueError: if `isa` is not one of the known names.
        BackendUnavailableError: if that build is missing or the processor lacks the instructions.
    """
    if isa not in MODULES:
        raise ValueError(f"unknown instruction set {isa!r}; valid names: {', '.join(MODULES)}")
    if isa not in available_isas():
        raise BackendUnavailableError(
            f"the build for {isa} cannot be used here: {unavailable_reason(isa)}; "
            f"available: {', '.join(available_isas()) or 'none'}"
        )
    module = _import(MODULES[isa])
    assert isinstance(module, ModuleType)
    return module


_lock = threading.Lock()
_loaded: ModuleType | None = None
_failure: str | None = None


def _choose() -> ModuleType:
    forced = os.environ.get("FLASHCORESET_ISA")
    if forced:
        try:
            return load_isa(forced)
        except (ValueError, BackendUnavailableError) as error:
            raise type(error)(f"FLASHCORESET_ISA={forced}: {error}") from None
    available = available_isas()
    if not available:
        reasons = "; ".join(f"{isa}: {unavailable_reason(isa)}" for isa in MODULES)
        raise BackendUnavailableError(f"no compiled CPU module could be loaded ({reasons}); {_REMEDY}")
    return load_isa(available[0])


def module() -> ModuleType:
    """The build in use: FLASHCORESET_ISA if set, else the best that runs here. Chosen once, at first use.

    Raises:
        ValueError: if FLASHCORESET_ISA is not a known name.
        BackendUnavailableError: if no build (or not the forced one) can be used; the reason is kept.
    """
    global _loaded, _failure
    if _loaded is None:
        with _lock:
            if _failure is not None:
                raise BackendUnavailableError(_failure)
            if _loaded is None:
                try:
                    _loaded = _choose()
                except BackendUnavailableError as error:
                    _failure = str(error)
                    raise
    return _loaded


def cuda_failure(device: int = 0) -> str | None:
    """Why the CUDA kernels cannot run on that device, and what to do; None if they can."""
    module = _import("_cuda")
    if isinstance(module, str):
        return (
            "flashcoreset was built without CUDA kernels; reinstall it where nvcc 12.4 or newer is found "
            f"(pip install . with FLASHCORESET_CUDA unset or auto), or pass backend='cpu' or backend='torch' ({module})"
        )
    if (reason := _unusable(device)) is not None:
        return f"CUDA device {device} cannot be used: {reason}; pass backend='cpu' or backend='torch'"
    return None


@functools.cache
def _unusable(device: int) -> str | None:
    """Why `_cuda` cannot use a device, or None. Asked once, since the check loads a kernel there."""
    module = _import("_cuda")
    assert isinstance(module, ModuleType)
    return module.unusable(device)


def cuda_architectures() -> str | None:
    """What the CUDA kernels were compiled for, as CMake writes it; None if they were not built."""
    module = _import("_cuda")
    return None if isinstance(module, str) else module.ARCHITECTURES


def cuda_module(device: int = 0) -> ModuleType:
    """The CUDA kernels, for arrays on that device.

    Raises:
        BackendUnavailableError: if the kernels were not built or the device cannot run them; the message says which.
    """
    if (reason := cuda_failure(device)) is not None:
        raise BackendUnavailableError(f"backend 'cuda': {reason}")
    module = _import("_cuda")
    assert isinstance(module, ModuleType)
    return module


def failure() -> str | None:
    """Why `module()` raises BackendUnavailableError, or None if it does not."""
    try:
        module()
    except BackendUnavailableError as error:
        return str(error)
    return None


def optional_capsule(tensor: Tensor | None) -> Any:
    """None, or a DLPack capsule of the tensor."""
    return None if tensor is None else capsule(tensor)
