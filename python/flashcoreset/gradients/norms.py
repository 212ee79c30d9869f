"""Squared norms of per-sample gradients that are sums of outer products, without forming the gradients. A norm may have any size
that floating numbers have, whatever the size of the other samples' norms.

Sources: Goodfellow, "Efficient per-example gradient computations", 2015, for one position per sample; Li, Tramer, Liang and
Hashimoto, "Large language models can be strong differentially private learners", 2022, section 4, for sequences ("ghost
clipping").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashcoreset.gradients.layers import Gradient, Outer, Rows, Vector

_PART = 1 << 22  # entries of products that are formed at a time
_LOWEST = -(2.0**14)  # an exponent below all others, for zeros


@dataclass(frozen=True, eq=False)
class Squares:
    """The numbers values * 4^exponents, one per sample."""

    values: Tensor  # [b]
    exponents: Tensor | None = None  # [b] float64 whole numbers; None for zeros


def squares(gradient: Gradient) -> Squares:
    """The squared norms of the samples' gradients.

    Squares may leave the range of floating numbers when the numbers themselves do not. Samples whose squares come near the ends of
    the range are computed again from powers of two times their inputs. On the CPU only these samples are, elsewhere all, since
    finding out which they are would wait for the device.
    """
    found, *sizes = _squares(gradient)
    if found.device.type != "cpu":
        return _scaled(gradient)
    # Sums of squares above this are as good as any: what they lost by underflow is below their rounding.
    low, high = (1e-280, 1e280) if found.dtype == torch.float64 else (1e-24, 1e36)
    least, most = torch.aminmax(torch.stack([found, *sizes])) if len(found) else (found.new_ones(()),) * 2
    if low <= float(least) and float(most) <= high:
        return Squares(found)
    inside = (found >= low) & (found <= high)
    for size in sizes:
        inside &= (size >= low) & (size <= high)
    rows = (~inside).nonzero()[:, 0]
    again = _scaled(_take(gradient, rows))
    assert again.exponents is not None
    values, exponents = found.double(), found.new_zeros(len(found), dtype=torch.float64)
    values[rows], exponents[rows] = again.values, again.exponents
    return Squares(values, exponents)


class SquaredNorms:
    """Sums of `Squares` for B samples, each with an exponent of its own."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._values = torch.zeros(batch, dtype=torch.float64, device=device)
        self._exponents: Tensor | None = None

    def copy(self) -> SquaredNorms:
        other = SquaredNorms(0, self._values.device)
        other._values = self._values.clone()
        other._exponents = None if self._exponents is None else self._exponents.clone()
        return other

    def add(self, found: Squares, first: int = 0) -> None:
        """Adds `found` to the samples from `first` on."""
        here = slice(first, first + len(found.values))
        if self._exponents is None and found.exponents is None:
            self._values[here] += found.values
            return
        if self._exponents is None:
            self._exponents = torch.zeros_like(self._values)
        values, exponents = self._values[here], self._exponents[here]
        more = found.values.double()
        theirs = torch.zeros_like(exponents) if found.exponents is None else found.exponents
        top = torch.maximum(exponents.where(values != 0, _LOWEST), theirs.where(more != 0, _LOWEST))
        # An exponent above `top` is that of a zero.
        values.mul_((2 * (exponents - top)).clamp_(max=0).exp2_())
        values.add_(more * (2 * (theirs - top)).clamp_(max=0).exp2_())
        exponents.copy_(top.where(top != _LOWEST, 0))

    def add_all(self, other: SquaredNorms) -> None:
        self.add(Squares(other._values, other._exponents))

    def norms(self) -> Tensor:
        """The norms [B] float64."""
        out = self._values.clamp(min=0).sqrt_()  # after cancellation a sum may be below 0
        if self._exponents is None:
            return out
        half = (self._exponents / 2).floor()  # 2^exponent alone may leave the range of float64
        return out * half.exp2() * (self._exponents - half).exp2()


def exponents(*parts: Tensor) -> Tensor:
    """Exponents [b] float64, for each sample that of the largest number in its rows of `parts`; 0 if there are only zeros, or
    infinities and NaN."""
    found = None
    for part in parts:
        rows = part.reshape(len(part), -1)
        most = (
            torch.linalg.vector_norm(rows, torch.inf, dim=1) if rows.shape[1] else rows.new_zeros(len(rows))
        )
        found = most if found is None else torch.maximum(found, most)
    assert found is not None
    found = found.where(found.isfinite(), 0)
    # 2 to this power, and its inverse, are normal numbers.
    most = 1000 if found.dtype == torch.float64 else 126
    return torch.frexp(found).exponent.double().clamp_(-most, most)


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """x / 2^by, with one exponent per sample."""
    return x * (-by).exp2_().to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _scaled(gradient: Gradient) -> Squares:
    if isinstance(gradient, Outer):
        first, second = exponents(gradient.a), exponents(gradient.g)
        values, *_ = _squares(Outer(scaled(gradient.a, first), scaled(gradient.g, second)))
        return Squares(values.double(), first + second)
    if isinstance(gradient, Rows):
        only = exponents(gradient.g)
        values, *_ = _squares(Rows(gradient.indices, scaled(gradient.g, only), gradient.width))
    else:
        only = exponents(gradient.values)
        values, *_ = _squares(Vector(scaled(gradient.values, only)))
    return Squares(values.double(), only)


def _take(gradient: Gradient, rows: Tensor) -> Gradient:
    """The gradient of some samples, in float64."""
    if isinstance(gradient, Outer):
        return Outer(gradient.a[rows].double(), gradient.g[rows].double())
    if isinstance(gradient, Rows):
        return Rows(gradient.indices[rows], gradient.g[rows].double(), gradient.width)
    return Vector(gradient.values[rows].double())


def _squares(gradient: Gradient) -> tuple[Tensor, ...]:
    """The squared norms [b], and other sums of squares that they were made from."""
    if isinstance(gradient, Outer):
        return _outer(gradient.a, gradient.g)
    if isinstance(gradient, Rows):
        return (_rows(gradient.indices, gradient.g),)
    return (gradient.values.square().sum(1),)


def _outer(a: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The squared norms |sum_t g_t a_t^T|^2 = sum_tu (a_t . a_u) (g_t . g_u), by the Gram matrices or by the product, whichever
    takes fewer operations."""
    batch, length, columns = a.shape
    rows = g.shape[2]
    by_gram = length * (rows + columns) < rows * columns
    out = a.new_empty(3 if by_gram else 1, batch)
    step = max(1, _PART // (length * length if by_gram else columns))
    for first in range(0, batch, step):
        part, other, here = a[first : first + step], g[first : first + step], out[:, first : first + step]
        if by_gram:
            grams = _gram(part), _gram(other)
            for size, gram in zip(here[1:], grams, strict=True):
                size.copy_(gram.diagonal(dim1=1, dim2=2).sum(1))
            here[0] = grams[0].mul_(grams[1]).sum((1, 2))
        else:
            here[0] = _product(part, other)
    out[0].clamp_(min=0)  # what cancels may come out below 0
    return tuple(out)


def _gram(x: Tensor) -> Tensor:
    return x @ x.transpose(1, 2)


def _product(a: Tensor, g: Tensor) -> Tensor:
    out = a.new_zeros(a.shape[0])
    step = max(1, _PART // (a.shape[0] * a.shape[2]))
    for begin in range(0, g.shape[2], step):
        out += (g[:, :, begin : begin + step].transpose(1, 2) @ a).square_().sum((1, 2))
    return out


def _rows(indices: Tensor, g: Tensor) -> Tensor:
    """The squared norms of looked-up rows; rows that a sample names several times add up first."""
    batch, width = g.shape[0], g.shape[2]
    sample = torch.arange(batch, device=g.device)[:, None]
    named, place = torch.unique(indices * batch + sample, return_inverse=True)
    sums = g.new_zeros(len(named), width).index_add_(0, place.reshape(-1), g.reshape(-1, width))
    return g.new_zeros(batch).index_add_(0, named % batch, sums.square().sum(1))


def add_explicit(gradient: Gradient, out: Tensor) -> None:
    """Adds the gradient of a batch of one sample to `out` [numel]."""
    if isinstance(gradient, Outer):
        rows = out.view(-1, gradient.a.shape[2])
        rows[gradient.row : gradient.row + gradient.g.shape[2]].addmm_(gradient.g[0].T, gradient.a[0])
    elif isinstance(gradient, Rows):
        out.view(-1, gradient.width).index_add_(0, gradient.indices[0], gradient.g[0])
    else:
        out[gradient.begin : gradient.begin + gradient.values.shape[1]] += gradient.values[0]


class TiedEmbedding:
    """The squared norm |G + E|^2 of each sample, for a matrix that is used by one linear layer (gradient G, dense) and by embeddings
    (gradient E, in the rows that were looked up): the norm of G and its looked-up rows are enough.

    Args:
        indices: [B, S], all rows that are looked up.
    """

    def __init__(self, indices: Tensor) -> None:
        self._indices = indices.sort(1).values
        self._dense: Tensor | None = None  # [B, S, width]: rows of G
        self._squares = SquaredNorms(len(indices), indices.device)
        self._rows: list[Rows] = []

    def add(self, gradient: Gradient) -> None:
        if isinstance(gradient, Rows):
            self._rows.append(gradient)
            return
        assert isinstance(gradient, Outer)
        a, g = gradient.a, gradient.g
        here = slice(gradient.first, gradient.first + len(a))
        self._squares.add(squares(gradient), gradient.first)
        indices = self._indices[here]
        columns = g.gather(2, indices[:, None].expand(-1, g.shape[1], -1))
        if self._dense is None:
            self._dense = a.new_zeros(*self._indices.shape, a.shape[2])
        self._dense[here] = columns.transpose(1, 2) @ a

    def total(self) -> SquaredNorms:
        if not self._rows:
            return self._squares
        indices, g = (torch.cat([getattr(rows, name) for rows in self._rows], 1) for name in ("indices", "g"))
        by = exponents(g) if self._dense is None else exponents(g, self._dense)
        g = scaled(g, by)
        found = _rows(indices, g).double()
        if self._dense is not None:
            place = torch.searchsorted(self._indices, indices)
            dense = self._dense.gather(1, place[:, :, None].expand(-1, -1, g.shape[2]))
            found += 2 * (scaled(dense, by) * g).sum((1, 2))
        total = self._squares.copy()
        total.add(Squares(found, by))
        return total
