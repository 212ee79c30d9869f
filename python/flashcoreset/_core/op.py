"""The one way to define a torch op, which torch.compile and fake tensors see: from typed Python, without a schema by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
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
        run: computes the results. Its parameters with their types are the op's arguments; in the place of a parameter that is a
            dataclass there are its fields with their types.
        fake: makes empty results of the right shapes, from the same arguments as `run`.
        results: names of the results, each of which is a tensor; no names mean one tensor without a name.

    Returns:
        A function of the arguments of `run`, which calls the op.

    Raises:
        TypeError: for a type that a torch op cannot take.
    """
    hints = get_type_hints(run)
    parts: list[tuple[type[Any] | None, list[str]]] = []  # of each parameter: a dataclass, the op's arguments
    types: dict[str, Any] = {}
    for parameter in inspect.signature(run).parameters:
        kind = hints[parameter]
        record = kind if isinstance(kind, type) and is_dataclass(kind) else None
        own = {parameter: kind}
        if record is not None:
            own = {field.name: get_type_hints(record)[field.name] for field in fields(record)}
        parts.append((record, [*own]))
        types |= own
    for argument, kind in types.items():
        if kind not in _SCHEMA:
            raise TypeError(f"{name}: {argument} is of type {kind}, which a torch op cannot take")
    arguments = ", ".join(f"{_SCHEMA[kind]} {argument}" for argument, kind in types.items())
    returns = f"({', '.join(f'Tensor {result}' for result in results)})" if results else "Tensor"
    full = f"flashcoreset::{name}"
    torch.library.define(full, f"({arguments}) -> {returns}")

    def gathered(values: tuple[Any, ...]) -> Iterator[Any]:
        for record, own in parts:
            yield values[0] if record is None else record(*values[: len(own)])
            values = values[len(own) :]

    if all(record is None for record, _ in parts):
        torch.library.impl(full, "default")(run)
        torch.library.register_fake(full)(fake)
        return getattr(torch.ops.flashcoreset, name)
    torch.library.impl(full, "default")(lambda *values: run(*gathered(values)))
    torch.library.register_fake(full)(lambda *values: fake(*gathered(values)))
    op = getattr(torch.ops.flashcoreset, name)

    def call(*given: Any) -> Any:
        flat: list[Any] = []
        for value, (record, own) in zip(given, parts, strict=True):
            flat += [value] if record is None else [getattr(value, argument) for argument in own]
        return op(*flat)

    return call
