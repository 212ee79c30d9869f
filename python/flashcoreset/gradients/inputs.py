"""A model's inputs: the tensors in containers of any depth, and copies of them that a second forward pass may take."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(eq=False)
class Inputs:
    """The arguments of a call."""

    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def map(self, change: Callable[[Tensor], Any]) -> Inputs:
        """The inputs with other tensors, also inside of objects, which are copied."""
        memo = _memo([self.args, self.keywords])[0]
        return Inputs(_map(self.args, change, memo), _map(self.keywords, change, memo))

    def leaves(self) -> Iterator[tuple[str, Any]]:
        yield from _leaves(self.args, "")
        yield from _leaves(self.keywords, "")

    def tensors(self) -> list[Tensor]:
        """The tensors that have dimensions; those inside of objects come last."""
        found = [value for _, value in self.leaves() if isinstance(value, Tensor)]
        found += [value for value in _reach([self.args, self.keywords]) if isinstance(value, Tensor)]
        return list({id(value): value for value in found if value.dim()}.values())

    def main(self) -> Tensor | None:
        """The tensor whose first dimension is the batch: the first that does not hold positions for all samples, or the first."""
        tensors = [
            (path, value) for path, value in self.leaves() if isinstance(value, Tensor) and value.dim()
        ]
        found = (value for path, value in tensors if not _for_all(path, value))
        return next(found, tensors[0][1] if tensors else None)

    def form(self) -> tuple[Any, ...]:
        """The form of a call, which is everything except sizes and numbers."""
        return tuple(
            (path, value.dim(), value.dtype)
            if isinstance(value, Tensor)
            else (path, value if value is None or isinstance(value, (bool, str)) else type(value))
            for path, value in self.leaves()
        )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{i}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from _leaves(getattr(value, part.name, None), f"{path}.{part.name}")
    else:
        yield path, value


def _for_all(path: str, value: Tensor) -> bool:
    """Whether `value`, of size 1, holds positions instead of a batch of one: by its name, or because it counts up."""
    if value.shape[0] != 1:
        return False
    if "position" in path:
        return True
    if value.dim() < 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.shape[-1] > 1 and bool((value.diff(dim=-1) == 1).all())


def _map(value: Any, change: Callable[[Tensor], Any], memo: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, types.MappingProxyType):
        return types.MappingProxyType({key: _map(inner, change, memo) for key, inner in value.items()})
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, inner in value.items():
            changed[key] = _map(inner, change, memo)
        return changed
    if isinstance(value, (tuple, list)):
        parts = [_map(one, change, memo) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made: Any = copy.copy(value)
        for part in dataclasses.fields(value):
            object.__setattr__(made, part.name, _map(getattr(value, part.name, None), change, memo))
        return made
    return _copied(value, change, memo, "an input")


class _Tensors(TorchFunctionMode):
    """Makes copies of objects hold what `change` makes of their tensors, whatever graph the tensors are in."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        if id(x) not in memo:
            memo[id(x)] = self._change(x)
        return memo[id(x)]


def _copied(value: Any, change: Callable[[Tensor], Any], memo: dict[int, Any], what: str) -> Any:
    try:
        with _Tensors(change):
            return copy.deepcopy(value, memo)
    except Exception as error:
        raise ValueError(
            f"{what} of type {type(value).__name__} cannot be copied ({type(error).__name__}: {error}). The check of which sample "
            "each row belongs to runs the forward pass again on copies; set verify='never' if row b of each layer belongs to sample b"
        ) from error


_HOMES = ("torch", "_thread", "threading", "weakref")

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _reach(values: Iterable[Any]) -> Iterator[Any]:
    """The values that can be reached through containers and attributes; modules are not entered."""
    waiting, seen = list(values), {}
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if _left_alone(value) or isinstance(value, (Tensor, nn.Module)):
            continue
        if isinstance(value, Mapping):
            waiting += list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            waiting += list(value)
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        waiting += list(getattr(value, "__dict__", {}).values())


def _left_alone(value: Any) -> bool:
    """Whether copies keep `value` itself: classes, functions, generators, marks, what belongs to torch or to threads."""
    kind = type(value)
    if kind in (object, types.ModuleType, types.FunctionType, *weakref.ProxyTypes):
        return True
    if isinstance(value, (type, *_GENERATORS)):
        return True
    return kind.__module__.split(".")[0] in _HOMES and not isinstance(
        value, (tuple, Mapping, Tensor, nn.Module)
    )


def _memo(values: Iterable[Any]) -> tuple[dict[int, Any], list[Any], list[nn.Module]]:
    """What deepcopy must not copy, and the random generators and the modules among it."""
    memo: dict[int, Any] = {}
    generators, modules = [], []
    for value in _reach(values):
        alone = _left_alone(value)
        if alone or isinstance(value, (nn.Module, nn.Parameter)):
            memo[id(value)] = value
        if alone and isinstance(value, _GENERATORS):
            generators.append(value)
        elif not alone and isinstance(value, nn.Module):
            modules.append(value)
    return memo, generators, modules
