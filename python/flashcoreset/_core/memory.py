"""memory_estimate: the peak memory of a call before it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flashcoreset._core.tensor import FLOATING, as_integer

_estimators: dict[str, Callable[..., int]] = {}


def register_estimate(
    function: str | Callable[..., Any], *tensors: str
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Makes the decorated function the estimate for a public function.

    With the public function itself, whose arguments the estimate then has too: the estimate takes one object that has them as
    attributes, defaults filled in, and `dtype`. The arguments named `tensors` may be passed by position, and all but the first be
    left out. With a name alone the estimate is a function(*shapes, **keywords) of its own.
    """

    def register(estimator: Callable[..., int]) -> Callable[..., int]:
        if isinstance(function, str):
            _estimators[function] = estimator
            return estimator
        signature = _signature(function, tensors)

        def bound(*shapes: Any, **kw: Any) -> int:
            arguments = signature.bind(*shapes, **kw)
            arguments.apply_defaults()
            return estimator(SimpleNamespace(**arguments.arguments))

        bound.__signature__ = signature  # type: ignore[attr-defined]
        _estimators[function.__name__] = bound
        return estimator

    return register


def _signature(function: Callable[..., Any], tensors: Sequence[str]) -> inspect.Signature:
    """The parameters of `function` and `dtype`, for an estimate."""
    kinds = inspect.Parameter
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = None if parameter.default is kinds.empty else parameter.default
        if name in tensors:
            required = name == tensors[0]
            found.append(
                kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if required else default)
            )
        else:
            found.append(kinds(name, kinds.KEYWORD_ONLY, default=default))
    found.append(kinds("dtype", kinds.KEYWORD_ONLY, default=torch.float32))
    return inspect.Signature(sorted(found, key=lambda parameter: parameter.kind))


def memory_estimate(fn: Callable[..., Any] | str, *shapes: Any, **kw: Any) -> int:
    """An upper bound of the bytes that a call allocates at its peak, outputs included, the arguments
    themselves not.

    Args:
        fn: a public function, or its name.
        shapes: the shapes of its tensor arguments in order, as tuples (a tensor or array stands for its
            shape): for facility_location `x` and, optionally, `clients`. Numbers that the call takes in between, such as
            `dim` of sketch, are passed in their places.
        kw: as for the call; also `dtype`, the dtype of the tensors (default torch.float32). A keyword that is
            a tensor in the call may be that tensor or its shape.

    Returns:
        Bytes.

    Raises:
        TypeError: if `fn` has no estimate, for an unknown keyword or a wrong type.
        ValueError: for shapes and options that the call itself would refuse.

    Example:
        >>> import flashcoreset as fc
        >>> fc.memory_estimate(fc.facility_location, (100_000, 128), k=1000) < 2**30
        True
    """
    name = fn if isinstance(fn, str) else getattr(fn, "__name__", repr(fn))
    estimator = _estimators.get(name)
    if estimator is None:
        raise TypeError(f"fn must be one of {', '.join(sorted(_estimators))} or its name, got {name}")
    try:
        inspect.signature(estimator).bind(*shapes, **kw)
    except TypeError as error:
        raise TypeError(f"memory_estimate of {name}: {error}") from None
    return estimator(*shapes, **kw)


def as_dtype(value: Any) -> torch.dtype:
    """A floating type of the library, given as torch's or NumPy's or by name."""
    name = (
        str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else np.dtype(value).name
    )
    for dtype in FLOATING:
        if name == str(dtype).removeprefix("torch."):
            return dtype
    raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {value!r}")


def as_shape(value: Any, name: str, dimensions: int = 2) -> tuple[int, ...]:
    """The shape that `value`, a shape or something that has one, stands for."""
    shape = getattr(value, "shape", value)
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"{name} must be a shape such as (1000, 64), got {value!r}")
    shape = tuple(as_integer(size, f"a size in the shape of {name}") for size in shape)
    if len(shape) != dimensions or min(shape) < 1:
        raise ValueError(f"{name} must have {dimensions} dimensions, each >= 1, got {shape}")
    return shape
