"""Squared norms of per-sample gradients that are sums of outer products, without the gradients.

Sources: Goodfellow, "Efficient per-example gradient computations", 2015, for one position a sample; Li, Tramer, Liang and
Hashimoto, "Large language models can be strong differentially private learners", 2022, section 4, for sequences ("ghost
clipping").
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset.ops.gradient_layers import Gradient, Outer, Rows

_PART = 1 << 22  # entries of products that are formed at a time


def squares(gradient: Gradient) -> Tensor:
    """[b]: the squared norms."""
    if isinstance(gradient, Outer):
        return _outer(gradient.a, gradient.g)
    if isinstance(gradient, Rows):
        return _rows(gradient.indices, gradient.g)
    return gradient.values.square().sum(1)


def _outer(a: Tensor, g: Tensor) -> Tensor:
    """|sum_t g_t a_t^T|^2 = sum_tu (a_t . a_u) (g_t . g_u): by the Gram matrices or by the product, whichever has fewer
    operations."""
    batch, length, columns = a.shape
    rows = g.shape[2]
    by_gram = length * (rows + columns) < rows * columns
    out = a.new_empty(batch)
    step = max(1, _PART // (length * length if by_gram else columns))
    for first in range(0, batch, step):
        part, other = a[first : first + step], g[first : first + step]
        if by_gram:
            out[first : first + step] = _gram(part).mul_(_gram(other)).sum((1, 2))
        else:
            out[first : first + step] = _product(part, other)
    return out.clamp_(min=0)  # what cancels may come out below 0


def _gram(x: Tensor) -> Tensor:
    return x @ x.transpose(1, 2)


def _product(a: Tensor, g: Tensor) -> Tensor:
    out = a.new_zeros(a.shape[0])
    step = max(1, _PART // (a.shape[0] * a.shape[2]))
    for begin in range(0, g.shape[2], step):
        out += (g[:, :, begin : begin + step].transpose(1, 2) @ a).square_().sum((1, 2))
    return out


def _rows(indices: Tensor, g: Tensor) -> Tensor:
    """Rows that a sample names several times add up first."""
    batch, width = g.shape[0], g.shape[2]
    sample = torch.arange(batch, device=g.device)[:, None]
    named, place = torch.unique(indices * batch + sample, return_inverse=True)
    sums = g.new_zeros(len(named), width).index_add_(0, place.reshape(-1), g.reshape(-1, width))
    return g.new_zeros(batch).index_add_(0, named % batch, sums.square().sum(1))


def add_explicit(gradient: Gradient, out: Tensor) -> None:
    """Adds the gradient of a batch of one sample to `out` [numel]."""
    if isinstance(gradient, Outer):
        out.view(-1, gradient.a.shape[2]).addmm_(gradient.g[0].T, gradient.a[0])
    elif isinstance(gradient, Rows):
        out.view(-1, gradient.width).index_add_(0, gradient.indices[0], gradient.g[0])
    else:
        out += gradient.values[0]


class TiedEmbedding:
    """|G + E|^2 a sample, where a matrix is used by one linear layer (gradient G, dense) and by embeddings (E, in the rows
    that were looked up): of G, the norm and those rows are enough.

    Args:
        indices: [B, S], all that is looked up.
    """

    def __init__(self, indices: Tensor) -> None:
        self._indices = indices.sort(1).values
        self._dense: Tensor | None = None  # [B, S, width]: rows of G
        self._squares = torch.zeros(len(indices), dtype=torch.float64, device=indices.device)
        self._rows: list[Rows] = []

    def add(self, gradient: Gradient) -> None:
        if isinstance(gradient, Rows):
            self._rows.append(gradient)
            return
        assert isinstance(gradient, Outer)
        a, g = gradient.a, gradient.g
        here = slice(gradient.first, gradient.first + len(a))
        self._squares[here] += squares(gradient)
        indices = self._indices[here]
        columns = g.gather(2, indices[:, None].expand(-1, g.shape[1], -1))
        if self._dense is None:
            self._dense = a.new_zeros(*self._indices.shape, a.shape[2])
        self._dense[here] = columns.transpose(1, 2) @ a

    def total(self) -> Tensor:
        """[B] float64."""
        if not self._rows:
            return self._squares
        indices, g = (torch.cat([getattr(rows, name) for rows in self._rows], 1) for name in ("indices", "g"))
        total = self._squares + _rows(indices, g)
        if self._dense is not None:
            place = torch.searchsorted(self._indices, indices)
            dense = self._dense.gather(1, place[:, :, None].expand(-1, -1, g.shape[2]))
            total += 2 * (dense * g).sum((1, 2))
        return total.clamp_(min=0)
