"""Checks that the samples' gradients add up to the gradient that autograd computes.

Both sides of sum_b G_b = G are taken between a few random vectors u, v, as u^T G v, without the matrices G_b: E (u^T D v)^2 = |D|^2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flashcoreset.gradients.layers import Gradient, Outer, Rows, Vector
from flashcoreset.gradients.precision import PART, working_dtype

_VECTORS = 16

_NOTHING_LEFT = 0.25  # a loss of autograd's sum in half precision from which on a difference says nothing


class Sums:
    """Sums of the samples' gradients of parameters, taken between random vectors."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, Tensor, float, float]] = {}
        self._vectors: dict[tuple[int, int, torch.device], Tensor] = {}

    def add(
        self, name: str, shape: torch.Size, gradient: Gradient, precision: float, rounded: float = 0.0
    ) -> None:
        """Adds a `gradient` of the parameter `name` of `shape`, computed in arithmetic of a relative `precision`; `rounded` is the share
        that autograd's sum may lose if it adds up in half precision."""
        rows, columns = _matrix(shape)
        device = (gradient.values if isinstance(gradient, Vector) else gradient.g).device
        u, v = self._normal(rows, 0, device), self._normal(columns, 1, device)
        sums, size, most, lost = self._found.get(name, (u.new_zeros(_VECTORS), u.new_zeros(()), 0.0, 0.0))
        for part in _parts(gradient):
            if isinstance(part, Outer):
                here = u[part.row : part.row + part.g.shape[2]]
                sums = sums + (_product(part.g, here) * _product(part.a, v)).sum((0, 1))
                size = size + (_squares(part.a) * _squares(part.g)).sum()
            elif isinstance(part, Rows):
                sums = sums + (u[part.indices] * _product(part.g, v)).sum((0, 1))
                size = size + _squares(part.g).sum()
            else:
                values = part.values.double()
                total = values.sum(0)
                if total.numel() != rows * columns:
                    total = F.pad(total, (part.begin, rows * columns - part.begin - total.numel()))
                sums = sums + ((total.view(rows, columns) @ v) * u).sum(0)
                size = size + values.square().sum()
                if part.terms is not None:
                    size = size + _squares(part.terms()).sum()
        self._found[name] = sums, size, max(most, precision), lost + rounded

    def pop(self, name: str, gradient: Tensor) -> float | None:
        """The distance of `gradient`, autograd's, from the sum, relative to autograd's, if it is more than rounding; forgets the sum."""
        sums, size, precision, rounded = self._found.pop(name)
        if rounded >= _NOTHING_LEFT:
            return None
        g = gradient.to_dense() if gradient.is_sparse else gradient
        rows, columns = _matrix(g.shape)
        u, v = self._normal(rows, 0, g.device), self._normal(columns, 1, g.device)
        step = max(1, PART // columns)
        theirs = torch.zeros_like(sums)
        for first in range(0, rows, step):
            some = g.reshape(rows, columns)[first : first + step]
            theirs += (_product(some, v) * u[first : first + step]).sum(0)
        off, size, own = torch.stack([_rms(sums - theirs), size.sqrt(), _rms(theirs)]).tolist()
        # Sums of n terms lose sqrt(n) roundings of their type, of the size of the terms or of the whole sum; products in half
        # precision lose a few roundings.
        allowed = 4096 * precision if precision <= 2e-7 else max(8 * precision, 5e-4, rounded)
        return off / max(own, 1e-300) if off > allowed * max(size, own) else None

    def clear(self) -> None:
        self._found.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def _normal(self, length: int, side: int, device: torch.device) -> Tensor:
        key = (length, side, device)
        if key not in self._vectors:
            generator = torch.Generator().manual_seed(side)
            found = torch.randn(length, _VECTORS, dtype=torch.float64, generator=generator)
            self._vectors[key] = found.to(device)
        return self._vectors[key]


def _matrix(shape: torch.Size) -> tuple[int, int]:
    return (shape[0], shape[1:].numel()) if len(shape) else (1, 1)


def _parts(gradient: Gradient) -> Iterator[Gradient]:
    """The gradient in parts of some samples, which are converted at a time."""
    if isinstance(gradient, Vector):
        yield gradient
        return
    wide = gradient.g[0].numel() + (gradient.a[0].numel() if isinstance(gradient, Outer) else 0)
    step = max(1, PART // max(1, wide))
    for first in range(0, len(gradient.g), step):
        here = slice(first, first + step)
        if isinstance(gradient, Outer):
            yield Outer(gradient.a[here], gradient.g[here], row=gradient.row)
        else:
            yield Rows(gradient.indices[here], gradient.g[here], gradient.width)


def _product(x: Tensor, vectors: Tensor) -> Tensor:
    dtype = working_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return (x.to(dtype) @ vectors.to(dtype)).double()


def _squares(x: Tensor) -> Tensor:
    """The squared lengths along the last dimension."""
    return torch.linalg.vector_norm(x.to(working_dtype(x)), dim=-1).double().square()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
