"""Gradients times a diagonal: numbers of one's own, or what an adaptive optimizer multiplies gradients by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flashcoreset.gradients.layers import Gradient, Outer, Rows, Vector
from flashcoreset.gradients.uses import Target

_TILE = 1 << 22  # entries of products that are formed at a time


def check_scale(scale: Any) -> None:
    if scale is not None and not isinstance(scale, (Mapping, Tensor, torch.optim.Optimizer)):
        raise TypeError(
            "scale must be None, a tensor [D], a dict: name of a parameter -> tensor of its shape, or an optimizer of torch, got "
            f"{type(scale).__name__}"
        )


def find_scales(scale: Any, targets: list[Target], numel: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors of each parameter's gradient, flattened, by the names of the parameters."""
    if scale is None:
        return {}
    if isinstance(scale, Tensor):
        if scale.shape != (numel,):
            raise ValueError(
                f"scale must have the shape ({numel},), one number per entry of the flattened gradient, got {tuple(scale.shape)}"
            )
        found = {one.name: scale[one.offset : one.offset + one.parameter.numel()] for one in targets}
    elif isinstance(scale, Mapping):
        found = {one.name: _given(scale, one) for one in targets}
    else:
        found = {one.name: _of_optimizer(scale, one) for one in targets}
    out = {}
    for one in targets:
        values = found[one.name].detach().to(one.parameter.device, dtype).reshape(-1)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"scale must be finite, got NaN or infinity for parameter {one.name!r}")
        out[one.name] = values.contiguous()
    return out


def _given(scale: Mapping[str, Any], target: Target) -> Tensor:
    if target.name not in scale:
        raise ValueError(
            f"scale must hold each wanted parameter, got none for {target.name!r}; it holds {', '.join(list(scale)[:3]) or 'nothing'}"
        )
    value, shape = scale[target.name], target.parameter.shape
    if not isinstance(value, Tensor):
        raise TypeError(f"scale[{target.name!r}] must be a tensor, got {type(value).__name__}")
    if value.shape != shape and value.dim() > 0:
        raise ValueError(
            f"scale[{target.name!r}] must have the shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    return value.expand(shape)


def _of_optimizer(optimizer: torch.optim.Optimizer, target: Target) -> Tensor:
    """1 / (sqrt(v) + eps), with v as the optimizer's next division by it has it."""
    groups = [
        group for group in optimizer.param_groups if any(p is target.parameter for p in group["params"])
    ]
    if not groups:
        raise ValueError(
            f"scale: the optimizer does not hold parameter {target.name!r}; leave it out with parameters="
        )
    state, group = optimizer.state.get(target.parameter, {}), groups[0]
    if "exp_avg_sq" in state:
        steps = float(state["step"])
        v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        v = v / (1 - group["betas"][1] ** steps)
    elif "square_avg" in state:
        v = state["square_avg"]
    elif "sum" in state:
        v = state["sum"]
    else:
        reason = "has taken no step with" if not state else "keeps no mean of squared gradients for"
        raise ValueError(
            f"scale: the optimizer {type(optimizer).__name__} {reason} parameter {target.name!r}; take a step before, use Adam, RMSprop or "
            "Adagrad, or pass a dict of tensors"
        )
    return 1 / (v.double().sqrt() + group.get("eps", 0.0))


def scaled(gradient: Gradient, scale: Tensor) -> Iterator[Gradient]:
    """The gradient times `scale`, the factors of the whole parameter, in parts that hold different entries or samples."""
    if isinstance(gradient, Vector):
        end = gradient.begin + gradient.values.shape[1]
        yield Vector(gradient.values * scale[gradient.begin : end], gradient.first, None, gradient.begin)
    elif isinstance(gradient, Rows):
        yield Rows(
            gradient.indices, gradient.g * scale.view(-1, gradient.width)[gradient.indices], gradient.width
        )
    else:
        yield from _scaled_products(gradient, scale)


def _scaled_products(gradient: Outer, scale: Tensor) -> Iterator[Vector]:
    batch, _, columns = gradient.a.shape
    factors = scale.view(-1, columns)
    step = max(1, _TILE // (batch * columns))
    for begin in range(0, gradient.g.shape[2], step):
        tile = gradient.g[:, :, begin : begin + step].transpose(1, 2) @ gradient.a
        first = gradient.row + begin
        tile *= factors[first : first + tile.shape[1]]
        yield Vector(tile.flatten(1), gradient.first, None, first * columns)
