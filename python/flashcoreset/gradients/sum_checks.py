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

_NOISES = (
    4  # by how many times what half precision changes in our sum it may have changed autograd's, and ours
)

_NOTHING_LEFT = 0.25  # a loss of autograd's sum in half precision from which on a difference says nothing


class Sums:
    """Sums of the samples' gradients of parameters, taken between random vectors."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, Tensor, float, float]] = {}
        self._noise: dict[str, Tensor] = {}  # what half precision has changed in sums
        self._columns: dict[str, int] = {}  # of the matrices that parameters are
        self._vectors: dict[tuple[int, int, torch.device], Tensor] = {}

    def add(
        self, name: str, shape: torch.Size, gradient: Gradient, precision: float, rounded: float = 0.0
    ) -> None:
        """Adds a `gradient` of the parameter `name` of `shape`, computed in arithmetic of a relative `precision`; `rounded` is the share
        that autograd's sum may lose if it adds up in half precision."""
        wide = gradient.a.shape[2] if isinstance(gradient, Outer) else _columns(shape)
        columns = self._columns.setdefault(name, wide)
        rows = shape.numel() // columns
        device = (gradient.values if isinstance(gradient, Vector) else gradient.g).device
        u, v = self._normal(rows, 0, device), self._normal(columns, 1, device)
        sums, size, most, lost = self._found.get(name, (u.new_zeros(_VECTORS), u.new_zeros(()), 0.0, 0.0))
        for part in _parts(gradient):
            if isinstance(part, Outer):
                if wide == columns:
                    here = u[part.row : part.row + part.g.shape[2]]
                    sums = sums + (_product(part.g, here) * _product(part.a, v)).sum((0, 1))
                else:  # another use has taken the parameter for another matrix
                    total = _product(part.g.flatten(0, 1).T, part.a.flatten(0, 1)).flatten()
                    sums = sums + _between(total, part.row * wide, u, v)
                size = size + (_squares(part.a) * _squares(part.g)).sum()
            elif isinstance(part, Rows):
                sums = sums + (u[part.indices] * _product(part.g, v)).sum((0, 1))
                size = size + _squares(part.g).sum()
            else:
                values = part.values.double()
                sums = sums + _between(values.sum(0), part.begin, u, v)
                size = size + values.square().sum()
                if part.terms is not None:
                    size = size + _squares(part.terms()).sum()
        self._found[name] = sums, size, max(most, precision), lost + rounded

    def add_noise(self, name: str, shape: torch.Size, found: Vector, exact: Vector) -> None:
        """Notes how far half precision has brought a gradient, `found`, from the same computation in float32, `exact`: where terms cancel
        out, autograd's sum is off as much."""
        columns = self._columns.setdefault(name, _columns(shape))
        u = self._normal(shape.numel() // columns, 0, found.values.device)
        v = self._normal(columns, 1, found.values.device)
        change = _between((found.values.double() - exact.values.double()).sum(0), 0, u, v)
        self._noise[name] = self._noise.get(name, 0) + change

    def pop(self, name: str, gradient: Tensor) -> float | None:
        """The distance of `gradient`, autograd's, from the sum, relative to autograd's, if it is more than rounding; forgets the sum."""
        sums, size, precision, rounded = self._found.pop(name)
        noise = self._noise.pop(name, None)
        if rounded >= _NOTHING_LEFT:
            return None
        g = gradient.to_dense() if gradient.is_sparse else gradient
        columns = self._columns[name]
        rows = g.numel() // columns
        u, v = self._normal(rows, 0, g.device), self._normal(columns, 1, g.device)
        step = max(1, PART // columns)
        theirs = torch.zeros_like(sums)
        for first in range(0, rows, step):
            some = g.reshape(rows, columns)[first : first + step]
            theirs += (_product(some, v) * u[first : first + step]).sum(0)
        noise = torch.zeros_like(sums) if noise is None else noise
        off, size, own, lost = torch.stack(
            [_rms(sums - theirs), size.sqrt(), _rms(theirs), _rms(noise)]
        ).tolist()
        # Sums of n terms lose sqrt(n) roundings of their type, of the size of the terms or of the whole sum; products in half
        # precision lose a few roundings.
        allowed = 4096 * precision if precision <= 2e-7 else max(8 * precision, 5e-4, rounded)
        within = max(allowed * max(size, own), _NOISES * lost)
        return off / max(own, 1e-300) if off > within else None

    def clear(self) -> None:
        self._found.clear()
        self._noise.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def _normal(self, length: int, side: int, device: torch.device) -> Tensor:
        key = (length, side, device)
        if key not in self._vectors:
            generator = torch.Generator().manual_seed(side)
            found = torch.randn(length, _VECTORS, dtype=torch.float64, generator=generator)
            self._vectors[key] = found.to(device)
        return self._vectors[key]


def _columns(shape: torch.Size) -> int:
    return max(1, shape[1:].numel())  # 1 for a number, too


def _between(total: Tensor, begin: int, u: Tensor, v: Tensor) -> Tensor:
    """The sums u^T G v of a matrix G, of which `total` are the entries from `begin` on, and the others are zeros."""
    numel = len(u) * len(v)
    if total.numel() != numel:
        total = F.pad(total, (begin, numel - begin - total.numel()))
    return ((total.view(len(u), len(v)) @ v) * u).sum(0)


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
