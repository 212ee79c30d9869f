"""Similarities and distances of pairs of rows, as they are defined."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.pairwise import normalize_rows

TAKES = Takes()

# Temporaries of a block of rows of similarities: as many bytes as this, or as one row takes.
_BLOCK_BYTES = 2**20


def values_of_rows(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Similarities or distances [r, m] of the rows of `x` [r, d] and `y` [m, d]; for cosine the rows have unit
    length already.

    The sum over features is taken in order, by elementwise operations: the last bits of torch.mm depend on
    its number of rows, and a pair's value must not.
    """
    total = x.new_zeros(x.shape[0], y.shape[0])
    for a, b in zip(x.unbind(1), y.unbind(1), strict=True):
        if metric in ("cosine", "dot"):
            total += a[:, None] * b
        elif metric == "l1":
            total += (a[:, None] - b).abs_()
        else:
            difference = a[:, None] - b
            total += difference * difference
    return total.sqrt_() if metric == "euclidean" else total


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """The similarity (cosine, dot) or distance (euclidean, sqeuclidean, l1) of every row of `x` [n, d] with
    every row of `y` [m, d] (None: `x` itself) as [n, m]."""
    if metric == "cosine":
        x, y = normalize_rows(x), None if y is None else normalize_rows(y)
    y = x if y is None else y
    if out is None:
        out = x.new_empty(x.shape[0], y.shape[0])
    for rows in _blocks(x.shape[0], y.shape[0] * x.element_size()):
        out[rows] = values_of_rows(x[rows], y, metric)
    return out


def _blocks(count: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // row_bytes)
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))
