"""What the CUDA kernels of all families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashcoreset._core.native import capsule

# The type of device that holds the kernels' tensors. The tests run the same kernels on the CPU, by an emulator.
DEVICE_TYPE = "cuda"

_T = TypeVar("_T")


def with_memory(call: Callable[[], _T]) -> _T:
    """Returns `call()`; if that runs out of memory, calls once more after freeing the memory that torch keeps for later."""
    try:
        return call()
    except MemoryError:
        torch.cuda.empty_cache()
    try:
        return call()
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from None


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def optional_compact(tensor: Tensor | None) -> Any:
    return None if tensor is None else compact(tensor)


def compact(tensor: Tensor) -> Any:
    """A DLPack capsule of the tensor, or of a copy that is contiguous."""
    return capsule(tensor.contiguous())
