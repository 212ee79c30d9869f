"""Per-sample gradients of layers in forms that need no matrix per sample: from a layer's input and the gradient of its
output.

A layer's function takes its input x and the gradient g of its output, both with the batch in dimension 0, and yields for
each of its parameters what the samples' gradients are made of. Inputs are saved only if a parameter's gradient needs
them; computations are in the precision of `dtype`.

Sources: Goodfellow, "Efficient per-example gradient computations", 2015 (linear layers); Rochette, Manoel and Tramel,
"Efficient per-example gradient computations in convolutional neural networks", 2019 (patches).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PART = 1 << 22  # entries of patches that are formed, and numbers that are converted, at a time


@dataclass(frozen=True, eq=False)
class Outer:
    """The gradient of a matrix [rows, columns], or of its rows from `row` on, as sum_t g[b, t] a[b, t]^T, for the samples from
    `first` on."""

    a: Tensor  # [b, T, columns]
    g: Tensor  # [b, T, rows]
    first: int = 0
    row: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """The gradient of a matrix [rows, width] as the sum over t of g[b, t] in row indices[b, t]."""

    indices: Tensor  # [B, T] int64
    g: Tensor  # [B, T, width]
    width: int


@dataclass(frozen=True, eq=False)
class Vector:
    """The gradient itself, flattened, or its entries from `begin` on, for the samples from `first` on."""

    values: Tensor  # [b, numel]
    first: int = 0
    terms: Callable[[], Tensor] | None = (
        None  # [b, ...]: the terms that were added up, or numbers as large; None for `values` themselves
    )
    begin: int = 0


Gradient = Outer | Rows | Vector
Gradients = Iterator[tuple[str, Gradient]]


@dataclass(frozen=True)
class Layer:
    """What is known about a type of layers.

    Attributes:
        gradients: (module, wanted, x, g, dtype) -> (name of the parameter, form of its gradient) for each wanted one; `x` is
            None if no wanted parameter is in `needs_input`. Gradients of one parameter come in parts, by samples.
        least_dims: dimensions of an input that has a batch.
        needs_input: the parameters whose gradients depend on the input; None for all of them.
        names: the parameters that are known; None for any.
        problem: why this very module cannot be taken, or None.
        features: the trailing dimensions of an output that are one row's; those before them are samples and positions in any order.
            None if only dimension 0 may hold the samples.
    """

    gradients: Callable[[Any, Collection[str], Any, Tensor, torch.dtype], Gradients]
    least_dims: Callable[[Any], int]
    needs_input: Collection[str] | None = ("weight",)
    names: Collection[str] | None = ("weight", "bias")
    problem: Callable[[Any], str | None] = lambda module: None
    features: Callable[[Any], int] | None = None


OTHERWISE = ("forward", "_conv_forward", "_call_impl", "__call__")  # define what a module computes


def layer_of(module: nn.Module) -> Layer | None:
    """The layer that `module` is, or None if its gradients are not known."""
    for kinds, layer in _TORCH:
        for kind in kinds:
            # A subclass with a forward of its own computes something else.
            if isinstance(module, kind) and all(
                getattr(type(module), name, None) is getattr(kind, name, None) for name in OTHERWISE
            ):
                return layer
    name, home = type(module).__name__, type(module).__module__
    if name == "Conv1D" and home == "transformers.pytorch_utils":
        return TRANSPOSED_LINEAR
    if name.endswith(("RMSNorm", "LayerNorm")) or (
        name.endswith("Norm") and home.startswith("transformers.")
    ):
        own = list(module.parameters(recurse=False))
        return _ANY_NORM if own and not list(module.children()) else None
    return None


def problem_of(module: nn.Module, layer: Layer | None, name: str) -> str | None:
    """Why gradients of the parameter `name` of `module` cannot be taken, or None."""
    replaced = next((method for method in OTHERWISE if method in vars(module)), None)
    if replaced is not None:
        return f"its {replaced} was replaced, so that it may compute anything"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
        return "scale_grad_by_freq=True divides by counts over the whole batch"
    return None if layer is None else layer.problem(module)


def batch_statistics(module: nn.Module) -> bool:
    """Whether `module` normalises a sample by the others."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return module.training or module.running_mean is None


# ---- linear layers


def _linear(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    g = g.reshape(g.shape[0], -1, g.shape[-1])
    if "weight" in wanted:
        x = x.reshape(g.shape[0], -1, x.shape[-1])
        yield from (("weight", Outer(a, b, first)) for a, b, first in _converted(x, g, dtype))
    if "bias" in wanted:
        yield "bias", Vector(g.sum(1, dtype=dtype), terms=lambda: g)


def _transposed_linear(
    module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype
) -> Gradients:
    """Gradients of transformers' Conv1D, whose weight is [in, out]."""
    for name, gradient in _linear(module, wanted, x, g, dtype):
        if isinstance(gradient, Outer):
            yield name, Outer(gradient.g, gradient.a, gradient.first)
        else:
            yield name, gradient


def _converted(x: Tensor, g: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Both `x` and `g` in `dtype`: at once if they have it already, else some samples at a time."""
    if x.dtype == g.dtype == dtype:
        yield x, g, 0
        return
    step = max(1, _PART // (x[0].numel() + g[0].numel()))
    for first in range(0, x.shape[0], step):
        yield x[first : first + step].to(dtype), g[first : first + step].to(dtype), first


# ---- convolutions


def _convolution(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    batch, groups = g.shape[0], module.groups
    if "bias" in wanted:
        yield "bias", Vector(g.flatten(2).sum(2, dtype=dtype), terms=lambda: g)
    if "weight" not in wanted:
        return
    per_group = module.weight[0].numel()
    step = max(1, _PART // (groups * per_group * g[0, 0].numel()))
    for first in range(0, batch, step):
        patches = _patches(
            module, x[first : first + step].to(dtype), g.shape[2:]
        )  # [b, L, groups * per_group]
        part = g[first : first + step].to(dtype).flatten(2)  # [b, out, L]
        if groups == 1:
            yield "weight", Outer(patches, part.transpose(1, 2), first)
        else:
            b, length = part.shape[0], part.shape[2]
            each = part.reshape(b, groups, -1, length) @ patches.reshape(
                b, length, groups, per_group
            ).transpose(1, 2)
            yield "weight", Vector(each.flatten(1), first, partial(_terms, part, patches, per_group))


def _terms(g: Tensor, patches: Tensor, per_group: int) -> Tensor:
    """Numbers as large as the products of g [b, out, L] and the part of each patch that belongs to the group."""
    return g * (patches.square().mean() * per_group).sqrt()


def _patches(module: Any, x: Tensor, size: torch.Size) -> Tensor:
    """What each of the L output positions sees of x [b, channels, ...]: [b, L, channels * kernel]."""
    margins: list[int] = []
    for axis, (kernel, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if module.padding == "same":
            whole = dilation * (kernel - 1)
            before, after = whole // 2, whole - whole // 2
        else:
            before = after = 0 if module.padding == "valid" else module.padding[axis]
        margins = [before, after, *margins]  # F.pad begins with the last dimension
    if any(margins):
        x = F.pad(x, margins, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    spatial = x.stride()[2:]
    moves = [stride * step for stride, step in zip(spatial, module.stride, strict=True)]
    reach = [stride * step for stride, step in zip(spatial, module.dilation, strict=True)]
    # Copied with the positions last, whose neighbours are neighbours in x.
    windows = x.as_strided(
        (x.shape[0], x.shape[1], *module.kernel_size, *size), (x.stride(0), x.stride(1), *reach, *moves),
        x.storage_offset(),
    )  # fmt: skip
    return windows.reshape(x.shape[0], -1, size.numel()).transpose(1, 2)


# ---- embeddings


def _embedding(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    g = g.reshape(g.shape[0], -1, g.shape[-1]).to(dtype)
    indices = x.reshape(g.shape[0], -1).to(torch.int64)
    if module.padding_idx is not None:
        g = g.masked_fill((indices == module.padding_idx)[:, :, None], 0)
    yield "weight", Rows(indices, g, g.shape[-1])


# ---- normalisation


def _layer_norm(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    shape = module.normalized_shape
    yield from _affine(wanted, g, dtype, lambda: F.layer_norm(x.to(dtype), shape, eps=module.eps), shape)


def _rms_norm(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    shape = module.normalized_shape
    # The value that eps=None stands for depends on the precision of the input.
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    yield from _affine(wanted, g, dtype, lambda: F.rms_norm(x.to(dtype), shape, eps=eps), shape)


def _affine(
    wanted: Collection[str],
    g: Tensor,
    dtype: torch.dtype,
    normalised: Callable[[], Tensor],
    shape: tuple[int, ...],
) -> Gradients:
    """Gradients of weight and bias of the trailing dimensions `shape`."""
    batch, size = g.shape[0], torch.Size(shape).numel()
    if "weight" in wanted:
        terms = (normalised() * g).reshape(batch, -1, size)
        yield "weight", Vector(terms.sum(1), terms=lambda: terms)
    if "bias" in wanted:
        yield "bias", Vector(g.reshape(batch, -1, size).sum(1, dtype=dtype), terms=lambda: g)


def _group_norm(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    yield from _channels(
        wanted, g, dtype, lambda: F.group_norm(x.to(dtype), module.num_groups, eps=module.eps)
    )


def _batch_norm(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    mean, variance = module.running_mean.to(dtype), module.running_var.to(dtype)
    yield from _channels(wanted, g, dtype, lambda: F.batch_norm(x.to(dtype), mean, variance, eps=module.eps))


def _channels(
    wanted: Collection[str], g: Tensor, dtype: torch.dtype, normalised: Callable[[], Tensor]
) -> Gradients:
    """Gradients of weight and bias of dimension 1."""
    batch, channels = g.shape[:2]
    if "weight" in wanted:
        terms = (normalised() * g).reshape(batch, channels, -1)
        yield "weight", Vector(terms.sum(2), terms=lambda: terms)
    if "bias" in wanted:
        yield "bias", Vector(g.reshape(batch, channels, -1).sum(2, dtype=dtype), terms=lambda: g)


def _any_norm(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    """Gradients of norms with formulas of their own (weight or 1 + weight, where eps goes, ...): autograd runs them, sample by sample."""
    parameters = {name: p.detach().to(dtype) for name, p in module.named_parameters(recurse=False)}

    def gradient(sample: Tensor, out: Tensor) -> dict[str, Tensor]:
        def call(own: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, own, (sample[None],))

        (own,) = torch.func.vjp(call, parameters)[1](out[None])
        return own

    found = torch.func.vmap(gradient)(x.to(dtype), g.to(dtype))
    for name in wanted:
        yield name, Vector(found[name].flatten(1), terms=lambda: g)


def _instance_norm(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    own = module.training or module.running_mean is None
    mean, variance = (None, None) if own else (module.running_mean.to(dtype), module.running_var.to(dtype))

    def normalised() -> Tensor:
        return F.instance_norm(x.to(dtype), mean, variance, use_input_stats=own, momentum=0.0, eps=module.eps)

    yield from _channels(wanted, g, dtype, normalised)


# ---- more layers of torch


def _transposed_convolution(
    module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype
) -> Gradients:
    """A transposed convolution is the adjoint of a convolution of g by the same weight, whose result meets x."""
    if "weight" in wanted:
        yield from _convolution(module, ["weight"], g, x, dtype)
    if "bias" in wanted:
        yield "bias", Vector(g.flatten(2).sum(2, dtype=dtype), terms=lambda: g)


def _prelu(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    terms = g.to(dtype) * x.to(dtype).clamp(max=0)
    if module.weight.numel() == 1:
        yield "weight", Vector(terms.flatten(1).sum(1, keepdim=True), terms=lambda: terms)
    else:
        flat = terms.reshape(*terms.shape[:2], -1)
        yield "weight", Vector(flat.sum(2), terms=lambda: terms)


@dataclass(frozen=True)
class Elementwise:
    """A sum or product of a parameter and a tensor, or copies of the parameter for all samples.

    Attributes:
        shape: that of the parameter, with ones where it is broadcast, over the dimensions of a sample of the result.
        factor: of the parameter in a sum.
    """

    shape: tuple[int, ...]
    factor: float = 1.0


def _elementwise(module: Any, wanted: Collection[str], x: Any, g: Tensor, dtype: torch.dtype) -> Gradients:
    """Gradients of a parameter "weight" in an `Elementwise` operation with x [B, ...], or None for a sum."""
    terms = g.to(dtype) * module.factor if x is None else g.to(dtype) * x.to(dtype)
    sums = [i + 1 for i, size in enumerate(module.shape) if size == 1 and g.shape[i + 1] != 1]
    out = terms.sum(sums) if sums else terms
    yield "weight", Vector(out.reshape(len(g), -1), terms=lambda: terms)


def _one(module: Any) -> int:
    return 1


def _norm_features(module: Any) -> int:
    return len(module.normalized_shape)


TRANSPOSED_LINEAR = Layer(_transposed_linear, lambda module: 2, features=_one)
_ANY_NORM = Layer(_any_norm, lambda module: 2, needs_input=None, names=None, features=_one)
LINEAR = Layer(_linear, lambda module: 2, features=_one)
EMBEDDING = Layer(_embedding, lambda module: 1, features=_one)
ELEMENTWISE = Layer(_elementwise, lambda module: 1)
_TORCH: tuple[tuple[tuple[type[nn.Module], ...], Layer], ...] = (
    ((nn.Linear,), LINEAR),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), Layer(_convolution, lambda module: len(module.kernel_size) + 2)),
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        Layer(_transposed_convolution, lambda module: len(module.kernel_size) + 2),
    ),
    ((nn.Embedding,), EMBEDDING),
    (
        (nn.LayerNorm,),
        Layer(_layer_norm, lambda module: len(module.normalized_shape) + 1, features=_norm_features),
    ),
    (
        (nn.RMSNorm,),
        Layer(_rms_norm, lambda module: len(module.normalized_shape) + 1, features=_norm_features),
    ),
    ((nn.PReLU,), Layer(_prelu, lambda module: 1 + (module.weight.numel() > 1), names=("weight",))),
    (
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        Layer(_instance_norm, lambda module: int(type(module).__name__[-2]) + 2),
    ),
    ((nn.GroupNorm,), Layer(_group_norm, lambda module: 2)),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), Layer(_batch_norm, lambda module: 2)),
)
