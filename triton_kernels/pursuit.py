"""What matching pursuit and Frank-Wolfe compute from the rows of G [B, D]; see csrc/cpu/pursuit.cpp for the algorithms and
flashcoreset/pursuit/on_device.py for the loop around these kernels.

    products    out_vi = g_i . y_v. A program takes a block of rows and up to four vectors y, and runs through the columns in
                pieces: sums lane by lane in float64 (products of float32 numbers are exact), reduced at the end of a piece.
                Programs of the same rows and other vectors are neighbours, so that G comes from memory once. With few rows
                each piece gets a program of its own, and a second kernel adds the pieces up in order.
    pick        score_i = c_i - sum_p w_p K_pi, of columns K_p of the Gram matrix, and the best row of a block.
    best        The best row of all, of equal ones the first.
    residual    b - sum_p w_p g_p, a column at a time.

A product has the same bits whatever rows and vectors are computed along with it: bounds of pieces depend on D alone, and all
forms of the kernel have one layout (tests/test_triton_compile.py).

Cost: itemsize * B * D bytes, and 8 * B * s bytes for the scores after s picks.

Rejected: tl.dot (it has no float64 sums of float32 operands); a reduction in the loop over the columns (one barrier per tile).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcoreset.pursuit.on_device import Correlations
from flashcoreset.triton_kernels.pairwise import INTERPRETED

VECTORS = 4  # per program
ROWS, STEP, WARPS = (64, 512, 4) if INTERPRETED else (4, 256, 4)
PIECE = 4096  # columns whose sum is reduced before it goes on, a multiple of STEP
LINES, TERMS = 64, 8  # rows and columns of a step of `pick`
COLUMNS = 1024 if INTERPRETED else 128  # per program of `residual`
CHUNK = 1024  # blocks per step of `best`, and sums per program of `add`
_FEW = 256  # blocks of rows; fewer leave multiprocessors idle


@triton.jit
def vector_at(vectors, stride, which, v, count):
    """The place where vector v begins; beyond the last vector, the place where the last one begins."""
    return vectors + tl.load(which + tl.minimum(v, count - 1)) * stride


# If strides were known to be multiples of 16, the rows would be loaded four numbers at a time, and the vectors would then go
# through shared memory, with a barrier at each step; and the order of a sum would depend on the strides.
@triton.jit(do_not_specialize=["g_stride", "row_count", "columns", "stride", "count", "blocks"])
def products_kernel(
    g,
    g_stride,
    rows,  # [row_count] int64: which rows of g, if LISTED
    row_count,
    columns,
    vectors,
    stride,
    which,  # [count] int64: which rows of `vectors`
    count,
    blocks,  # of rows
    out,  # [*, row_count] float64, or [pieces, count, row_count]
    places,  # [count] int64: the vectors' rows of `out`
    LISTED: tl.constexpr,
    SQUARES: tl.constexpr,  # the products of the rows with themselves
    SPLIT: tl.constexpr,  # one piece per program
    COUNT: tl.constexpr,  # vectors of a program: 1 or 4
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PIECE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    groups = (count + COUNT - 1) // COUNT
    v = program % groups * COUNT
    block = program // groups % blocks
    i = block * ROWS + tl.arange(0, ROWS)
    number = i
    if LISTED:
        number = tl.load(rows + i, mask=i < row_count, other=0)
    first = vector_at(vectors, stride, which, v, count)
    second = vector_at(vectors, stride, which, v + 1, count)
    third = vector_at(vectors, stride, which, v + 2, count)
    fourth = vector_at(vectors, stride, which, v + 3, count)
    total0 = tl.zeros((ROWS,), tl.float64)
    total1, total2, total3 = total0, total0, total0
    begin = tl.full((), 0, tl.int64)
    last = begin + columns
    if SPLIT:
        piece = program // groups // blocks
        begin = piece * PIECE
        last = tl.minimum(begin + PIECE, last)
        out += piece * count * row_count
    while begin < last:
        end = tl.minimum(begin + PIECE, last)
        sum0 = tl.zeros((ROWS, STEP), tl.float64)
        sum1, sum2, sum3 = sum0, sum0, sum0
        at = begin
        while at < end:
            k = at + tl.arange(0, STEP)
            inside = k < end
            place = g + number[:, None] * g_stride + k[None, :]
            x = tl.load(place, mask=(i < row_count)[:, None] & inside[None, :], other=0).to(tl.float64)
            if SQUARES:
                sum0 = tl.fma(x, x, sum0)
            else:
                y0 = tl.load(first + k, mask=inside, other=0).to(tl.float64)
                sum0 = tl.fma(x, tl.broadcast_to(y0[None, :], (ROWS, STEP)), sum0)
            if COUNT > 1:
                y1 = tl.load(second + k, mask=inside, other=0).to(tl.float64)
                y2 = tl.load(third + k, mask=inside, other=0).to(tl.float64)
                y3 = tl.load(fourth + k, mask=inside, other=0).to(tl.float64)
                sum1 = tl.fma(x, tl.broadcast_to(y1[None, :], (ROWS, STEP)), sum1)
                sum2 = tl.fma(x, tl.broadcast_to(y2[None, :], (ROWS, STEP)), sum2)
                sum3 = tl.fma(x, tl.broadcast_to(y3[None, :], (ROWS, STEP)), sum3)
            at += STEP
        total0 += tl.sum(sum0, 1)
        if COUNT > 1:
            total1 += tl.sum(sum1, 1)
            total2 += tl.sum(sum2, 1)
            total3 += tl.sum(sum3, 1)
        begin += PIECE
    there = i < row_count
    width = tl.full((), 0, tl.int64) + row_count
    tl.store(out + row_of(v, places, count, SPLIT) * width + i, total0, mask=there)
    if COUNT > 1:
        tl.store(out + row_of(v + 1, places, count, SPLIT) * width + i, total1, mask=there & (v + 1 < count))
        tl.store(out + row_of(v + 2, places, count, SPLIT) * width + i, total2, mask=there & (v + 2 < count))
        tl.store(out + row_of(v + 3, places, count, SPLIT) * width + i, total3, mask=there & (v + 3 < count))


@triton.jit
def row_of(v, places, count, SPLIT: tl.constexpr):
    row = v
    if not SPLIT:
        row = tl.load(places + tl.minimum(v, count - 1))
    return row


@triton.jit(do_not_specialize=["pieces", "row_count", "count"])
def add_pieces_kernel(
    sums,  # [pieces, count, row_count]
    pieces,
    row_count,
    count,
    places,
    out,
    CHUNK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    size = tl.full((), 0, tl.int64) + row_count
    inside = at < size * count
    place = tl.load(places + at // size, mask=inside, other=0)
    total = tl.zeros((CHUNK,), tl.float64)
    while pieces > 0:
        total += tl.load(sums + at, mask=inside, other=0.0)
        sums += size * count
        pieces -= 1
    tl.store(out + place * size + at % size, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "count"])
def pick_kernel(
    correlation,  # [rows] float64
    gram,  # [slots, rows] float64: columns of the Gram matrix
    slots,  # [count] int64
    numbers,  # [count + 1] float64: weights, and the rounding error of a correlation with a row of norm 1
    norm,  # [rows] float64, infinite for a row that is taken
    scores,  # [rows] float64
    best,  # [blocks] float64
    best_row,  # [blocks] int64
    rows,
    count,
    MAGNITUDE: tl.constexpr,
    LINES: tl.constexpr,
    TERMS: tl.constexpr,
):
    NONE: tl.constexpr = float("-inf")
    LAST: tl.constexpr = 2**63 - 1
    block = tl.program_id(0).to(tl.int64)
    i = block * LINES + tl.arange(0, LINES)
    there = i < rows
    width = tl.full((), 0, tl.int64) + rows
    sums = tl.zeros((TERMS, LINES), tl.float64)
    p = tl.full((), 0, tl.int64)
    while p < count:
        own = p + tl.arange(0, TERMS)
        weight = tl.load(numbers + own, mask=own < count, other=0.0)
        used = weight != 0
        column = tl.load(slots + own, mask=used, other=0) * width
        value = tl.load(gram + column[:, None] + i[None, :], mask=used[:, None] & there[None, :], other=0.0)
        sums = tl.fma(tl.broadcast_to(weight[:, None], (TERMS, LINES)), value, sums)
        p += TERMS
    rest = tl.load(correlation + i, mask=there, other=0.0) - tl.sum(sums, 0)
    score = tl.abs(rest) if MAGNITUDE else rest
    least = tl.load(numbers + count) * tl.load(norm + i, mask=there, other=0.0)
    score = tl.where(there & (score > least), score, NONE)
    tl.store(scores + i, score, mask=there)
    most = tl.max(score, 0)
    tl.store(best + block, most)
    tl.store(best_row + block, tl.min(tl.where(score == most, i, LAST), 0))


@triton.jit(do_not_specialize=["blocks"])
def best_kernel(
    best,  # [blocks] float64
    best_row,  # [blocks] int64
    found,  # [2] float64: the best score and its row
    blocks,
    CHUNK: tl.constexpr,
):
    NONE: tl.constexpr = float("-inf")
    LAST: tl.constexpr = 2**63 - 1
    values = tl.full((CHUNK,), NONE, tl.float64)
    rows = tl.full((CHUNK,), LAST, tl.int64)
    begin = tl.full((), 0, tl.int64)
    while begin < blocks:
        at = begin + tl.arange(0, CHUNK)
        value = tl.load(best + at, mask=at < blocks, other=NONE)
        row = tl.load(best_row + at, mask=at < blocks, other=LAST)
        better = value > values  # an equal value comes later
        rows = tl.where(better, row, rows)
        values = tl.where(better, value, values)
        begin += CHUNK
    most = tl.max(values, 0)
    tl.store(found, most)
    tl.store(found + 1, tl.min(tl.where(values == most, rows, LAST), 0).to(tl.float64))


@triton.jit(do_not_specialize=["columns", "count"])
def residual_kernel(
    g,
    g_stride,
    target,  # [columns] float64
    rows,  # [count] int64
    weights,  # [count] float64
    out,  # [columns] float64
    columns,
    count,
    COLUMNS: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = k < columns
    left = tl.load(target + k, mask=inside, other=0.0)
    p = tl.full((), 0, tl.int64)
    while p < count:
        weight = tl.zeros((COLUMNS,), tl.float64) - tl.load(weights + p)
        x = tl.load(g + tl.load(rows + p) * g_stride + k, mask=inside, other=0).to(tl.float64)
        left = tl.fma(weight, x, left)
        p += 1
    tl.store(out + k, left, mask=inside)


def launch_products(
    g: Tensor, rows: Tensor | None, vectors: Tensor, which: Tensor, out: Tensor, places: Tensor
) -> None:
    """Rows places [m] int64 of out [S, n] float64, = the products of the rows which [m] int64 of `vectors` [*, D] with the
    rows [n] int64 of g [B, D], all rows for None. Rows are contiguous."""
    _launch(g, rows, vectors, which, out, places, squares=False)


def launch_squares(g: Tensor, out: Tensor) -> None:
    """out [B] float64 = the squares of the rows."""
    first = torch.zeros(1, dtype=torch.int64, device=g.device)
    _launch(g, None, g, first, out[None], first, squares=True)


def _launch(
    g: Tensor,
    rows: Tensor | None,
    vectors: Tensor,
    which: Tensor,
    out: Tensor,
    places: Tensor,
    *,
    squares: bool,
) -> None:
    row_count, columns, count = len(g) if rows is None else len(rows), g.shape[1], len(which)
    together = VECTORS if count > 1 else 1
    blocks, pieces = triton.cdiv(row_count, ROWS), triton.cdiv(columns, PIECE)
    split = pieces > 1 and blocks < _FEW
    sums = torch.empty(pieces, count, row_count, dtype=torch.float64, device=g.device) if split else out
    with torch.cuda.device_of(g):
        products_kernel[(triton.cdiv(count, together) * blocks * (pieces if split else 1),)](
            g,
            g.stride(0),
            which if rows is None else rows,
            row_count,
            columns,
            vectors,
            vectors.stride(0),
            which,
            count,
            blocks,
            sums,
            places,
            LISTED=rows is not None,
            SQUARES=squares,
            SPLIT=split,
            COUNT=together,
            ROWS=ROWS,
            STEP=STEP,
            PIECE=PIECE,
            num_warps=WARPS,
        )
        if split:
            add_pieces_kernel[(triton.cdiv(count * row_count, CHUNK),)](
                sums, pieces, row_count, count, places, out, CHUNK=CHUNK, num_warps=WARPS
            )


def launch_pick(c: Correlations, scores: Tensor, found: Tensor) -> None:
    """scores [B] float64 = start - sum_p numbers[p] gram[slots[p]] (or its magnitude) if that is more than the last of
    `numbers` times `norm`, else -inf; found [2] float64 = the best and its row, the first of equal ones."""
    rows = len(c.start)
    blocks = triton.cdiv(rows, LINES)
    best, best_row = scores.new_empty(blocks), c.slots.new_empty(blocks)
    with torch.cuda.device_of(scores):
        pick_kernel[(blocks,)](
            c.start,
            c.gram,
            c.slots,
            c.numbers,
            c.norm,
            scores,
            best,
            best_row,
            rows,
            len(c.slots),
            MAGNITUDE=c.magnitude,
            LINES=LINES,
            TERMS=TERMS,
            num_warps=WARPS,
        )
        best_kernel[(1,)](best, best_row, found, blocks, CHUNK=CHUNK, num_warps=WARPS)


def launch_residual(g: Tensor, target: Tensor, rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """out [D] float64 = target - the sum of the rows [p] int64 of g times `weights` [p] float64."""
    columns = g.shape[1]
    with torch.cuda.device_of(g):
        residual_kernel[(triton.cdiv(columns, COLUMNS),)](
            g,
            g.stride(0),
            target,
            rows,
            weights,
            out,
            columns,
            len(rows),
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )
