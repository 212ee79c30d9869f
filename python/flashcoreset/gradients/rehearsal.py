"""A forward pass that leaves no trace: random numbers, buffers and attributes are put back."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashcoreset.gradients.inputs import _copied, _memo


class Randomness:
    """States of generators: of torch, Python and NumPy, and of `others`."""

    def __init__(self, others: list[Any], device: torch.device) -> None:
        self._others, self._device = others, device
        self._states = self._now()

    def _now(self) -> list[Any]:
        own = [_generator_state(one) for one in self._others]
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return [torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(), *own]  # noqa: NPY002

    def restore(self) -> None:
        cpu, cuda, python, numpy, *own = self._states
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for one, state in zip(self._others, own, strict=True):
            _set_generator(one, state)

    def drawn(self) -> bool:
        """Whether random numbers were drawn since the states were taken."""
        return not _equal(self._states, self._now())

    def of_now(self) -> Randomness:
        return Randomness(self._others, self._device)


def _generator_state(one: Any) -> Any:
    if isinstance(one, np.random.Generator):
        return copy.deepcopy(one.bit_generator.state)
    return one.getstate() if isinstance(one, random.Random) else one.get_state()


def _set_generator(one: Any, state: Any) -> None:
    if isinstance(one, np.random.Generator):
        one.bit_generator.state = state
    elif isinstance(one, random.Random):
        one.setstate(state)
    else:
        one.set_state(state)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping):
        return all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (tuple, list)):
        return all(map(_equal, a, b))
    return bool(a == b)


class State:
    """Copies of what a forward pass depends on beside its inputs and parameters: random numbers, also those of Python, NumPy and the
    model's own generators; buffers and other attributes of modules, also of modules that are in no list of modules."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        modules: dict[int, nn.Module] = {}
        waiting: list[nn.Module] = [model]
        self._memo: dict[int, Any] = {}
        generators: list[Any] = []
        while waiting:
            for module in waiting.pop().modules():
                if id(module) in modules or isinstance(module, nn.parallel.DistributedDataParallel):
                    continue
                modules[id(module)] = module
                memo, found, hidden = _memo(
                    value for name, value in vars(module).items() if name not in _MODULE
                )
                self._memo.update(memo)
                generators += found
                waiting += hidden
        self._memo.update((id(p), p) for module in modules.values() for p in module.parameters(recurse=False))
        self._memo.update(modules)
        self.random = Randomness(list({id(one): one for one in generators}.values()), device)
        memo = dict(self._memo)
        self._attributes = [(module, _own(module, vars(module), memo)) for module in modules.values()]

    def attributes(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Copies of the modules' attributes, which a forward pass may change."""
        memo = dict(self._memo)
        return [(module, _own(module, own, memo)) for module, own in self._attributes]


def _own(module: nn.Module, attributes: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Copies of a module's buffers and of what its class has put there."""

    def copied(name: str, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        return _copied(
            value, lambda x: x.detach().clone(), memo, f"{type(module).__name__}'s attribute {name!r}"
        )

    found = {name: copied(name, value) for name, value in attributes.items() if name not in _MODULE}
    buffers = {name: copied(name, value) for name, value in attributes["_buffers"].items()}
    return {**found, "_buffers": buffers}


@contextlib.contextmanager
def rehearsal(state: State, still: bool, backward: bool = False) -> Iterator[None]:
    """Calls of the model in here begin with `state` and leave nothing behind; `still`: as in eval mode. They keep no activations, unless
    there is to be a `backward` pass."""

    def drop(_: Tensor) -> None:
        return None

    def refuse(_: None) -> Tensor:
        raise RuntimeError("a backward pass inside the forward pass")

    now, attributes = state.random.of_now(), state.attributes()
    before = [(module, dict(vars(module))) for module, _ in attributes]
    try:
        for module, own in attributes:
            _assign(module, {**_only(vars(module)), **own, **({"training": False} if still else {})})
        state.random.restore()
        saved = (
            contextlib.nullcontext() if backward else torch.autograd.graph.saved_tensors_hooks(drop, refuse)
        )
        with warnings.catch_warnings(), saved:
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, own in before:
            _assign(module, own)
        now.restore()


def restore(state: State) -> None:
    """Puts modules and random numbers back to `state`."""
    for module, own in state.attributes():
        _assign(module, {**_only(vars(module)), **own})
    state.random.restore()


_DROPOUTS = {
    getattr(F, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}


def without_dropout(
    function: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call of `function` in which nothing is dropped."""
    if function in _DROPOUTS:
        x = args[0] if args else keywords["input"]
        return (x,), {"p": 0.0, "training": False}
    if function is F.scaled_dot_product_attention:
        return (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, {
            name: value for name, value in keywords.items() if name != "dropout_p"
        }
    return args, keywords


def _only(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name in _MODULE}


def _assign(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in vars(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)


_MODULE = frozenset(vars(nn.Module()))  # attributes that every module has
