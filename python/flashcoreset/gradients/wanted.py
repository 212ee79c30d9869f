"""Which parameters a GradientSketcher takes, and the modules that use them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from flashcoreset._core.tensor import FLOATING
from flashcoreset.gradients.layers import layer_of, problem_of
from flashcoreset.gradients.rules import rule_of
from flashcoreset.gradients.uses import Place, Target


def wanted_parameters(model: nn.Module, parameters: Any) -> dict[str, nn.Parameter]:
    """The wanted parameters by their first names, in order."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters is None:
        chosen = trainable
    elif callable(parameters):
        chosen = {name: p for name, p in trainable.items() if parameters(name, p)}
    else:
        patterns = [parameters] if isinstance(parameters, str) else parameters
        if isinstance(patterns, Mapping) or not isinstance(patterns, Iterable):
            raise TypeError(
                "parameters must be names, glob patterns or a function (name, parameter) -> bool, got "
                f"{type(parameters).__name__}"
            )
        chosen = _matching(model, trainable, list(patterns))
    if not chosen:
        raise ValueError("parameters: none of the model's parameters is wanted and requires gradients")
    for name, parameter in chosen.items():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} has no values yet: call the model once before, as lazy modules need it"
            )
        if parameter.dtype not in FLOATING:
            raise TypeError(f"parameter {name!r} must hold real floating numbers, got {parameter.dtype}")
    return chosen


def _matching(
    model: nn.Module, trainable: dict[str, nn.Parameter], patterns: list[Any]
) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters(remove_duplicate=False))  # shared ones by all their names
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"parameters must hold names or glob patterns, got {pattern!r} of type {type(pattern).__name__}"
            )

    def found(pattern: str) -> set[int]:
        own = [p for name, p in every.items() if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not own:
            some = ", ".join(list(every)[:3])
            raise ValueError(
                f"parameters: {pattern!r} matches no parameter of the model; its parameters have names like {some}"
            )
        if not any(p.requires_grad for p in own):
            raise ValueError(f"parameters: what {pattern!r} matches does not require gradients")
        return {id(p) for p in own}

    taken = [pattern for pattern in patterns if not pattern.startswith("!")]
    left_out = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    picked = {id(p) for p in every.values()} if left_out and not taken else set[int]()
    for pattern in taken:
        picked |= found(pattern)
    for pattern in left_out:
        picked -= found(pattern)
    return {name: p for name, p in trainable.items() if id(p) in picked}


def one_device(wanted: dict[str, nn.Parameter]) -> torch.device:
    devices = list(dict.fromkeys(parameter.device for parameter in wanted.values()))
    if len(devices) > 1:
        raise ValueError(
            f"parameters must be on one device, got {devices[0]} and {devices[1]}; make a GradientSketcher for each"
        )
    return devices[0]


def find_places(
    model: nn.Module, targets: dict[int, Target]
) -> tuple[list[Place], dict[nn.Module, dict[str, Target]]]:
    """The layers that own wanted parameters, and the modules with a registered rule, with the targets by their names in them. Other
    parameters are found where they are used."""
    ruled: dict[nn.Module, dict[str, Target]] = {}
    covered: dict[int, set[int]] = {}  # modules inside of ruled ones -> parameters
    for _, module in model.named_modules():
        if rule_of(module) is None or id(module) in covered:
            continue
        own = {name: targets[id(p)] for name, p in module.named_parameters() if id(p) in targets}
        if own:
            ruled[module] = own
            for inner in module.modules():
                covered[id(inner)] = {id(one.parameter) for one in own.values()}
    places = []
    for name, module in model.named_modules():
        own = {key: targets[id(p)] for key, p in module._parameters.items() if id(p) in targets}
        layer = layer_of(module)
        if layer is None or id(module) in covered:
            continue
        known = {key: one for key, one in own.items() if layer.names is None or key in layer.names}
        if known:
            places.append(Place(name, module, layer, known, f"{type(module).__name__} {name!r}"))
    return places, ruled


def check_places(model: nn.Module, targets: dict[int, Target], parameters: Any) -> None:
    """Refuses, all at once, parameters of modules whose gradients cannot be known."""
    problems = []
    for name, module in model.named_modules():
        if rule_of(module) is not None:
            continue
        for own, parameter in module._parameters.items():
            target = targets.get(id(parameter))
            problem = None if target is None else problem_of(module, layer_of(module), own)
            if target is not None and problem is not None:
                problems.append((target, f"{type(module).__name__} {name!r}", problem))
    if problems:
        texts = [
            f"parameter {target.name!r} belongs to {what}: {problem}" for target, what, problem in problems
        ]
        raise ValueError(f"{'; '.join(texts)}; {advice([one[0] for one in problems], targets, parameters)}")


def advice(refused: Iterable[Target], targets: dict[int, Target], parameters: Any) -> str:
    """How to leave parameters out, by patterns as short as possible."""
    out = {target.name for target in refused}
    kept = {target.name for target in targets.values()} - out
    patterns: list[str] = []
    for name in sorted(out):
        if any(fnmatch.fnmatchcase(name, pattern[1:]) for pattern in patterns):
            continue
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) + ".*" for i in range(1, len(parts))]
        best = next(
            (one for one in prefixes if not any(fnmatch.fnmatchcase(other, one) for other in kept)), name
        )
        patterns.append(f"!{best}")
    if callable(parameters):
        names = ", ".join(repr(name) for name in sorted(out))
        return f"leave {'it' if len(out) == 1 else 'them'} out with parameters=: a function that is False for {names}"
    base = ["*"] if parameters is None else [parameters] if isinstance(parameters, str) else list(parameters)
    return f"leave {'it' if len(out) == 1 else 'them'} out with parameters={[*base, *patterns]!r}"


def callable_modules(model: nn.Module, targets: dict[int, Target]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold wanted parameters and may be called, by name."""
    holders = {""}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in targets:
            path = name.split(".")
            holders.update(".".join(path[:depth]) for depth in range(1, len(path)))
    for name, module in model.named_modules():
        # Calls of DistributedDataParallel, which talk to other processes, are those of its module.
        if name in holders and not isinstance(module, nn.parallel.DistributedDataParallel):
            yield name, module
