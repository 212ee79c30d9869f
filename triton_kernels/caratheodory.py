"""The parts of the Carathéodory reduction that read all rows: the sums over runs of w (1, shrink x - centre), and the rows that
are left when runs are dropped. See csrc/cpu/caratheodory.cpp for the method and csrc/cuda/caratheodory.cu for the cost.

    sum_pieces   A program takes a piece of a run and some columns. Each place of its tile has a sum of its own, in float64; the
                 tile's rows are added up at the end.
    gather       A program takes rows of the runs that are kept. Runs are kept or dropped whole, so the host knows where each
                 goes.

The order of sums depends on the number of rows and columns and on `size`, not on strides. A NaN or infinity in a row makes its
run's sums not finite even if its weight is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcoreset.caratheodory.problem import Runs
from flashcoreset.triton_kernels.pairwise import INTERPRETED

COLUMNS = 1024 if INTERPRETED else 32  # columns of a tile, at most
TILE = 1 << 14 if INTERPRETED else 1024  # numbers
PIECE = 256  # rows
BLOCK = 1 << 14 if INTERPRETED else 512  # rows per program of gather
WARPS = 4
_PIECES = 1 << 13  # pieces of all rows, beyond which pieces get longer


@triton.jit(do_not_specialize=["count", "size", "d", "piece_rows", "pieces", "tiles"])
def sum_pieces_kernel(
    x,  # [n, d]
    x_stride,
    x_step,
    rows_of,  # [count] int64, or anything if the rows are the first `count`
    weights,  # [count] float64, or anything if all are 1
    numbers,  # [1 + d] float64: shrink and the centre
    count,
    size,  # of a run
    d,
    piece_rows,
    pieces,  # of a run
    tiles,  # of columns
    out,  # [runs, pieces, 1 + d] float64
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PIECE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile, piece = program % tiles, program // tiles
    begin = piece // pieces * size
    first = begin + piece % pieces * piece_rows
    last = tl.minimum(tl.minimum(begin + size, count), first + piece_rows)
    columns = tile * COLS + tl.arange(0, COLS)
    here = columns < d
    shrink = tl.load(numbers)
    centre = tl.load(numbers + 1 + columns, mask=here, other=0.0)
    totals = tl.zeros((ROWS, COLS), tl.float64)
    row = first
    while row < last:
        own = row + tl.arange(0, ROWS)
        inside = own < last
        rows = own
        if HAS_ROWS:
            rows = tl.load(rows_of + own, mask=inside, other=0)
        places = rows[:, None] * x_stride + columns[None, :] * x_step
        value = tl.load(x + places, mask=inside[:, None] & here[None, :], other=0.0).to(tl.float64)
        value = value * shrink - centre[None, :]
        if HAS_WEIGHTS:
            w = tl.load(weights + own, mask=inside, other=0.0)
            totals = tl.fma(w[:, None] + tl.zeros_like(value), value, totals)
        else:
            totals += tl.where(inside[:, None], value, 0.0)
        row += ROWS
    place = out + piece * (d + 1)
    tl.store(place + 1 + columns, tl.sum(totals, axis=0), mask=here)
    if tile == 0:
        mass = tl.maximum(last - first, 0).to(tl.float64)
        if HAS_WEIGHTS:
            masses = tl.zeros((PIECE,), tl.float64)
            row = first
            while row < last:
                own = row + tl.arange(0, PIECE)
                masses += tl.load(weights + own, mask=own < last, other=0.0)
                row += PIECE
            mass = tl.sum(masses, axis=0)
        tl.store(place, mass)


@triton.jit(do_not_specialize=["size", "count"])
def gather_kernel(
    rows_of,
    weights,
    kept,  # [runs kept] int64, ascending
    factors,  # [runs kept] float64
    size,
    count,  # the number of rows of these
    new_rows,  # [count] int64
    new_weights,  # [count] float64
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    run = at // size
    old = tl.load(kept + run, mask=here, other=0) * size + at % size
    weight = tl.load(factors + run, mask=here, other=0.0)
    row = old
    if HAS_ROWS:
        row = tl.load(rows_of + old, mask=here, other=0)
    if HAS_WEIGHTS:
        weight = tl.load(weights + old, mask=here, other=0.0) * weight
    tl.store(new_rows + at, row, mask=here)
    tl.store(new_weights + at, weight, mask=here)


def tile_of(d: int) -> tuple[int, int]:
    """Rows and columns that a program takes at a time."""
    columns = min(triton.next_power_of_2(d), COLUMNS)
    return min(TILE // columns, PIECE), columns


def launch_sums(runs: Runs, centre: Tensor, shrink: float, sums: Tensor) -> None:
    """Writes sums [runs, 1 + d] of w (1, shrink x - centre) over the rows of each run. Does not wait for the device."""
    x, count, d = runs.x, runs.count, runs.x.shape[1]
    tile_rows, columns = tile_of(d)
    piece_rows = PIECE * triton.cdiv(count, PIECE * _PIECES)
    pieces, tiles = triton.cdiv(runs.size, piece_rows), triton.cdiv(d, columns)
    numbers = torch.cat([centre.new_full((1,), shrink), centre])
    partial = sums if pieces == 1 else sums.new_empty(len(sums), pieces, 1 + d)
    with torch.cuda.device_of(x):
        sum_pieces_kernel[(len(sums) * pieces * tiles,)](
            x,
            x.stride(0),
            x.stride(1),
            sums if runs.rows is None else runs.rows,
            sums if runs.weights is None else runs.weights,
            numbers,
            count,
            runs.size,
            d,
            piece_rows,
            pieces,
            tiles,
            partial,
            HAS_ROWS=runs.rows is not None,
            HAS_WEIGHTS=runs.weights is not None,
            ROWS=tile_rows,
            COLS=columns,
            PIECE=PIECE,
            num_warps=WARPS,
        )
    if pieces > 1:
        torch.sum(partial, 1, out=sums)


def launch_keep(runs: Runs, kept: Tensor, factors: Tensor, new_rows: Tensor, new_weights: Tensor) -> None:
    """Writes the rows of the runs `kept` and their weights times their run's factor. Does not wait for the device."""
    count = len(new_rows)
    with torch.cuda.device_of(kept):
        gather_kernel[(triton.cdiv(count, BLOCK),)](
            kept if runs.rows is None else runs.rows,
            factors if runs.weights is None else runs.weights,
            kept,
            factors,
            runs.size,
            count,
            new_rows,
            new_weights,
            HAS_ROWS=runs.rows is not None,
            HAS_WEIGHTS=runs.weights is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
