"""Sketches of gradients that are products or looked-up rows, a tile of them formed at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset.sketch import cpu
from flashcoreset.sketch.backend import Kernels

_TILE = 1 << 22  # entries, as many as the shared cache of a processor holds


def add_products(kernels: Kernels, a: Tensor, g: Tensor, out: Tensor, *, offset: int, **options: Any) -> None:
    """Does out[b] += the sketch of sum_t g[b, t] a[b, t]^T, a matrix [rows, columns] flattened row by row, which begins at row
    `offset` of the projection; a tile of its rows at a time.

    a [B, T, columns], g [B, T, rows] and out [B, dim] have one dtype, float32 or float64.
    """
    batch, _, columns = a.shape
    step = max(1, _TILE // (batch * columns))
    for begin in range(0, g.shape[2], step):
        tile = g[:, :, begin : begin + step].transpose(1, 2) @ a
        out += kernels.sketch(tile.flatten(1), out.shape[1], offset=offset + begin * columns, **options)


def add_rows(
    kernels: Kernels, indices: Tensor, g: Tensor, out: Tensor, *, offset: int, **options: Any
) -> None:
    """Does out[b] += the sum over t of the sketch of g[b, t], row indices[b, t] of a matrix of g's width that is flattened row by
    row and begins at row `offset` of the projection.

    indices [B, T] int64, g [B, T, width] and out [B, dim] of one dtype, float32 or float64. The compiled CPU kernels
    compute only the rows that are named; for other backends, tiles of all rows between the least and the largest number are formed.
    """
    if kernels is cpu:
        cpu.sketch_rows(indices, g, out, offset=offset, **options)
        return
    batch, width = g.shape[0], g.shape[2]
    step = max(1, _TILE // (batch * width))
    sample = torch.arange(batch, device=g.device)[:, None].expand_as(indices)
    for begin in range(int(indices.min()), int(indices.max()) + 1, step):
        here = (indices >= begin) & (indices < begin + step)
        tile = g.new_zeros(batch, step, width)
        tile.index_put_((sample[here], indices[here] - begin), g[here], accumulate=True)
        out += kernels.sketch(tile.flatten(1), out.shape[1], offset=offset + begin * width, **options)
