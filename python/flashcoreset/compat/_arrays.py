"""The arrays of a caller, as torch tensors and back: NumPy in, NumPy out; torch in, torch out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.errors import ConvergenceWarning, warn_caller
from flashcoreset._core.tensor import as_tensor


@dataclass(frozen=True)
class Library:
    """The library, type and device of the arrays of one call.

    `to_numpy`, `todense`, `tocsr` and `sum` are what results need of it.
    """

    is_numpy: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def __name__(self) -> str:
        return "numpy" if self.is_numpy else "torch"

    def give(self, tensor: Tensor) -> Any:
        """`tensor` as an array of the caller's library and type; a number per call becomes a NumPy scalar there."""
        tensor = tensor.to(self.dtype)
        return tensor.detach().numpy()[()] if self.is_numpy else tensor

    def give_all(self, *tensors: Tensor) -> tuple[Any, ...]:
        return tuple(map(self.give, tensors))

    def to_numpy(self, array: Any) -> Any:
        return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)

    def todense(self, array: Any) -> Any:
        return array

    def tocsr(self, array: Any) -> Any:
        if not self.is_numpy:
            return array
        from scipy.sparse import csr_matrix

        return csr_matrix(array)

    def sum(self, array: Any, axis: int) -> Any:
        return array.sum(axis)


def take(call: str, **arrays: Any) -> tuple[Library, dict[str, Tensor | None]]:
    """The arrays of `call` by the names of their arguments, as floating tensors of one type; None for None and for an array without
    entries. Lists count as NumPy arrays where no tensor says otherwise, and integers become floats.

    Raises:
        ValueError: for arrays of several libraries or devices.
        NotImplementedError: for arrays of other libraries.
    """
    tensors = {name: value for name, value in arrays.items() if isinstance(value, Tensor)}
    others = {}
    for name, value in arrays.items():
        if value is None or name in tensors:
            continue
        if not isinstance(value, (np.ndarray, np.generic, list, tuple, int, float)):
            raise NotImplementedError(
                f"{call}: {name} is an array of type {type(value).__module__}.{type(value).__name__}; NumPy arrays and torch "
                f"tensors are taken here, other libraries' by the peer's {call}"
            )
        others[name] = np.asarray(value)
    foreign = [name for name, value in others.items() if isinstance(arrays[name], np.ndarray) and value.size]
    if tensors and foreign:
        raise ValueError(
            f"{call}: {next(iter(tensors))} is a torch tensor, but {foreign[0]} a NumPy array; convert one of them"
        )
    if tensors:
        return _take_tensors(call, arrays, tensors, others)
    filled = [value for value in others.values() if value.size]
    dtype = np.result_type(*filled) if filled else np.dtype(np.float64)
    if dtype.kind in "iub":
        dtype = np.dtype(np.float64)
    found: dict[str, Tensor | None] = dict.fromkeys(arrays)
    for name, value in others.items():
        if value.size:
            found[name] = as_tensor(value if value.dtype == dtype else value.astype(dtype), name)
    kept = next(
        (tensor for tensor in found.values() if tensor is not None), torch.empty(0, dtype=torch.float64)
    )
    return Library(True, kept.dtype, kept.device), found


def _take_tensors(
    call: str, arrays: dict[str, Any], tensors: dict[str, Tensor], others: dict[str, np.ndarray]
) -> tuple[Library, dict[str, Tensor | None]]:
    filled = [tensor for tensor in tensors.values() if tensor.numel()]
    devices = {tensor.device for tensor in filled}
    if len(devices) > 1:
        raise ValueError(f"{call}: the arrays are on several devices: {', '.join(sorted(map(str, devices)))}")
    floating = [tensor.dtype for tensor in filled if tensor.dtype.is_floating_point]
    dtype = functools.reduce(torch.promote_types, floating) if floating else torch.get_default_dtype()
    device = next(iter(devices), torch.device("cpu"))
    found: dict[str, Tensor | None] = dict.fromkeys(arrays)
    for name, tensor in tensors.items():
        if tensor.numel():
            found[name] = tensor.to(dtype)
    for name, value in others.items():
        if value.size:
            found[name] = as_tensor(value, name).to(device, dtype)
    return Library(False, dtype, device), found


def matrix(call: str, name: str, value: Tensor | None, dimensions: int = 2) -> Tensor:
    """`value`, which has to be an array of so many dimensions, none of them 0."""
    if value is None or value.dim() != dimensions:
        got = "no entries" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(f"{call}: {name} must have {dimensions} dimensions and entries, got {got}")
    return value


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_unknown(call: str, unknown: dict[str, Any]) -> None:
    """Refuses keyword arguments by name that the peer would take, or take without looking at them."""
    if unknown:
        raise NotImplementedError(
            f"{call}: the argument {next(iter(unknown))!r} is not supported here; the peer's {call} takes it"
        )


def warn_user(message: str) -> None:
    """Gives a `UserWarning` at the line that called the library."""
    warn_caller(message, UserWarning)


def warn_unconverged(call: str, max_iter: int, error: Tensor) -> None:
    """Warns where the peer would say nothing of it."""
    warn_caller(
        f"{call} did not converge in {max_iter} iterations: error {float(error):.3g}; allow more iterations, or a larger "
        "regularization",
        ConvergenceWarning,
    )
