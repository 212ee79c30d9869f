"""The one way to define a torch op, which torch.compile and fake tensors see: from typed Python, without a schema by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", int | None: "int?", float: "float", float | None: "float?",
    str: "str", str | None: "str?", bool: "bool", list[float]: "float[]", tuple[float, float]: "float[]", list[bool]: "bool[]",
}  # fmt: skip


def define_op(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], results: Sequence[str] = ()
) -> Callable[..., Any]:
    """Defines the op flashcoreset::`name` and returns the function that calls it.

    Args:
        name: the op's name.
        run: computes the results. Its parameters with their types are the op's arguments; or its one parameter is a dataclass, whose
            fields with their types are the arguments.
        fake: makes empty results of the right shapes, from the same arguments as `run`.
        results: names of the results, each of which is a tensor; no names mean one tensor without a name.

    Returns:
        A function of the arguments of `run`, which calls the op.

    Raises:
        TypeError: for a type that a torch op cannot take.
    """
    parameters = [*inspect.signature(run).parameters]
    types = get_type_hints(run)
    record = types[parameters[0]]
    # A dataclass goes through the dispatcher field by field.
    packed = len(parameters) == 1 and is_dataclass(record)
    if packed:
        parameters, types = [field.name for field in fields(record)], get_type_hints(record)
    for parameter in parameters:
        if types[parameter] not in _SCHEMA:
            raise TypeError(
                f"{name}: {parameter} is of type {types[parameter]}, which a torch op cannot take"
            )
    arguments = ", ".join(f"{_SCHEMA[types[parameter]]} {parameter}" for parameter in parameters)
    returns = f"({', '.join(f'Tensor {result}' for result in results)})" if results else "Tensor"
    full = f"flashcoreset::{name}"
    torch.library.define(full, f"({arguments}) -> {returns}")
    if not packed:
        torch.library.impl(full, "default")(run)
        torch.library.register_fake(full)(fake)
        return getattr(torch.ops.flashcoreset, name)
    torch.library.impl(full, "default")(lambda *values: run(record(*values)))
    torch.library.register_fake(full)(lambda *values: fake(record(*values)))
    op = getattr(torch.ops.flashcoreset, name)
    return lambda given: op(*(getattr(given, parameter) for parameter in parameters))
