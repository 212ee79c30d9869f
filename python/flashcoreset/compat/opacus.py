"""Per-sample gradients and their norms for opacus, of which this module registers the samplers when it is imported.

    import flashcoreset.compat.opacus

From then on `PrivacyEngine`, `GradSampleModule` and `GradSampleModuleFastGradientClipping` (mode "ghost") take these layers' per-sample gradients and
norms from here: Linear, Embedding, LayerNorm, RMSNorm, Conv1d, Conv2d, Conv3d. A norm is computed without the gradient, or with it, whichever
costs less; half types are summed in float32. `unregister()` puts opacus' own samplers back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashcoreset._core.tensor import compute_dtype
from flashcoreset.gradients.layers import Gradient, Outer, Rows, Vector, layer_of, problem_of
from flashcoreset.gradients.norms import SquaredNorms, squares

try:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
except ModuleNotFoundError as error:
    if error.name != "opacus":
        raise
    raise ModuleNotFoundError(
        "flashcoreset.compat.opacus registers samplers in opacus, which is not installed; install it with pip install opacus",
        name="opacus",
    ) from None

__all__ = ["LAYERS", "grad_sample", "norm_sample", "register", "unregister"]

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
)

_before: list[tuple[dict[Any, Any], type[nn.Module], Any]] = []  # (table, type, opacus' own sampler or None)


def grad_sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The per-sample gradients [B, ...] of the layer's parameters that require one.

    Args:
        layer: one of LAYERS.
        activations: its inputs, of which the first [B, ...] counts.
        backprops: [B, ...], the gradient of its output.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for name, gradient in _gradients(layer, activations, backprops):
        parameter = getattr(layer, name)
        part = _explicit(gradient, parameter.shape).to(backprops.dtype)
        if len(part) == len(backprops):
            found[parameter] = part
            continue
        if parameter not in found:
            found[parameter] = backprops.new_empty(len(backprops), *parameter.shape)
        first = getattr(gradient, "first", 0)
        found[parameter][first : first + len(part)] = part
    return found


def norm_sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The norms [B] of the per-sample gradients of the layer's parameters that require one; arguments as of grad_sample."""
    sums: dict[nn.Parameter, SquaredNorms] = {}
    for name, gradient in _gradients(layer, activations, backprops):
        parameter = getattr(layer, name)
        if parameter not in sums:
            sums[parameter] = SquaredNorms(len(backprops), backprops.device)
        sums[parameter].add(squares(gradient), getattr(gradient, "first", 0))
    return {parameter: total.norms().to(backprops.dtype) for parameter, total in sums.items()}


def register() -> None:
    """Puts `grad_sample` and `norm_sample` into opacus' tables. The import has done it."""
    ghost = GradSampleModuleFastGradientClipping
    tables = [GradSampleModule.GRAD_SAMPLERS, ghost.GRAD_SAMPLERS, ghost.NORM_SAMPLERS]
    for table, sampler in zip(tables, (grad_sample, grad_sample, norm_sample), strict=True):
        for kind in LAYERS:
            if table.get(kind) is not sampler:
                _before.append((table, kind, table.get(kind)))
                table[kind] = sampler


def unregister() -> None:
    """Puts opacus' own samplers back, and takes away those that it has none of."""
    while _before:
        table, kind, own = _before.pop()
        if own is None:
            del table[kind]
        else:
            table[kind] = own


def _gradients(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Any:
    """(name, gradient) in parts, of the parameters that require one."""
    wanted = [name for name, p in layer.named_parameters(recurse=False) if p.requires_grad]
    known = layer_of(layer)
    for name in wanted:
        problem = problem_of(layer, known, name)
        if problem is not None:
            raise NotImplementedError(
                f"the per-sample gradients of {name} of {type(layer).__name__} are not supported: {problem}; "
                "flashcoreset.compat.opacus.unregister() leaves them to opacus"
            )
    if not wanted:
        return
    if len(backprops) == 0:  # a batch that Poisson sampling left empty
        for name in wanted:
            yield name, Vector(backprops.new_zeros(0, getattr(layer, name).numel()))
        return
    assert known is not None
    yield from known.gradients(layer, wanted, activations[0], backprops, compute_dtype(backprops.dtype))


def _explicit(gradient: Gradient, shape: torch.Size) -> Tensor:
    """The gradient of each of its samples, [b, *shape]."""
    if isinstance(gradient, Outer):
        return (gradient.g.transpose(1, 2) @ gradient.a).view(-1, *shape)
    if isinstance(gradient, Vector):
        return gradient.values.view(-1, *shape)
    assert isinstance(gradient, Rows)
    batch = len(gradient.g)
    rows = gradient.indices + shape[0] * torch.arange(batch, device=gradient.g.device)[:, None]
    out = gradient.g.new_zeros(batch * shape[0], gradient.width)
    # Index by index in order, also on a GPU, where index_add_ adds in any order.
    if out.device.type == "cpu":
        out.index_add_(0, rows.flatten(), gradient.g.flatten(0, 1))
    else:
        out.index_put_((rows.flatten(),), gradient.g.flatten(0, 1), accumulate=True)
    return out.view(batch, *shape)


register()
