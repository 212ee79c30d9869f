"""Products of long rows with random matrices that are generated on the way.

    out_bc = sum over columns i of x of x_bi P_(offset + i)c

A program has a tile of rows of x and outputs, and a piece of the columns of x. It makes the tile of P that some columns need
from the generator's words (`flashcoreset.sketch.reference` defines them) and multiplies:

    rademacher   one random block per row of P: the 128 signs of a tile's outputs
    gaussian     one block for eight outputs; Box and Muller's formula in float32 (gaussian-boxmuller: for four, in float64, rounded to
                 float32)
    sjlt         the entries whose blocks of columns meet the tile, each compared with the tile's columns
    srht         the parity of the bits that a row's and an output's numbers share

Cost: B D dim multiply-adds for all kinds, beside D dim ceil(B / ROWS) entries of P; x is read dim / COLS times. sjlt and srht
cost less in the CUDA kernels, which scatter and transform.

Products of float32 are plain fused multiply-adds unless TF32 is allowed; products of half types go to matrix units that sum in
float32 (+-1 and 0 are exact in them; gaussian numbers are not, so x becomes float32 there); products of float64 are in
float64. Sums over CHUNK columns are added up in float64, in order, and so are the pieces, by a second kernel: cuts depend on
D, dim and the offset alone, and a row's result depends on no other row.

Rejected: scatters with atomics (their order is left to chance); float32 as three products of TF32 (not float32's result).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcoreset.sketch.kinds import STREAMS, hadamard_block
from flashcoreset.triton_kernels.pairwise import INTERPRETED

# Columns of x between two additions in float64.
CHUNK = tl.constexpr(1024)

# The types that products are computed in.
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# Whether fused multiply-adds have to be made of float64's operations: the interpreter's round twice.
_FUSES_IN_FLOAT64 = tl.constexpr(INTERPRETED)

_PIECE = 2048  # the least columns of a piece
_PROGRAMS = 512  # pieces times tiles of outputs, at most, if there are several pieces
_OUTPUTS = 1 << 18  # outputs that are worked on together
_SUMS = 1 << 23  # of all pieces
_OPERATIONS = 1 << 40  # per launch: a tenth of a second or two
_MOST_WAITING = 2  # launches


@triton.jit
def random_words(row, block, seed_low, seed_high, NUMBER: tl.constexpr, ROUNDS: tl.constexpr = 10):
    """The four words, uint32, of the counters (row, block), whose shapes are broadcast; `row` is int64."""
    c0, c1 = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    c2 = block.to(tl.uint32)
    c3 = tl.full((1,), NUMBER, tl.uint32)
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        low0, low2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = tl.umulhi(c2, 0xCD9E8D57) ^ c1 ^ k0, tl.umulhi(c0, 0xD2511F53) ^ c3 ^ k1
        c1, c3 = low2, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def in_turn(a, b, c, d):
    """a0 b0 c0 d0 a1 ... along the last axis."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def bit_of(words, place):
    """Bit `place` < 128 of four words, as 0 or 1."""
    w0, w1, w2, w3 = words
    low = tl.where(place < 32, w0, w1)
    high = tl.where(place < 96, w2, w3)
    return (tl.where(place < 64, low, high) >> (place % 32).to(tl.uint32)) & 1


@triton.jit
def quarter_sine(t):
    """sin(pi / 2 t), 0 <= t <= 1, by Taylor's series; what is left out is 5e-14 of it at most."""
    s = t * t
    sum = 6.0669357311061955e-12 * s - 6.688035109811468e-10
    sum = sum * s + 5.692172921967927e-08
    sum = sum * s - 3.598843235212085e-06
    sum = sum * s + 0.00016044118478735983
    sum = sum * s - 0.004681754135318688
    sum = sum * s + 0.07969262624616705
    sum = sum * s - 0.6459640975062463
    return (sum * s + 1.5707963267948966) * t


@triton.jit
def fused(a, b, c):
    """a b + c, float32, rounded once."""
    return (a.to(tl.float64) * b + c).to(tl.float32) if _FUSES_IN_FLOAT64 else tl.fma(a, b, c)


@triton.jit
def float_pair(a, b):
    """Box and Muller's pair of normal numbers in float32, of two words; `flashcoreset.sketch.reference` explains it."""
    uniform = (a & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5
    bits = uniform.to(tl.int32, bitcast=True)
    exponent = (0x3F2AAAAB + 0x0FFFFFFF - bits) & -0x800000
    f = 1.0 - (bits + exponent - 0x0F800000).to(tl.float32, bitcast=True)
    radius = fused(f, 2341755.5, 2740731.25)
    radius = fused(radius, f, 3007360.25)
    radius = fused(radius, f, 4020255.0)
    radius = fused(radius, f, 6051346.0)
    radius = fused(radius, f, 12102290.0)
    radius = tl.sqrt_rn(fused(radius, f, exponent.to(tl.float32)))
    t = (b << 1 | 1).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    square = t * t
    sine = fused(square, 9.901314115268178e-07, -3.281629324192181e-05)
    sine = fused(sine, square, 0.00031928022508509457) * t * radius
    cosine = fused(square, -1.2956950001807854e-07, 6.443226538976887e-06)
    cosine = fused(cosine, square, -0.000125380844110623)
    cosine = fused(cosine, square, 0.0004065207904204726) * tl.where(a >> 31 != 0, -radius, radius)
    exchanged = b >> 31 != 0
    return tl.where(exchanged, cosine, sine), tl.where(exchanged, sine, cosine)


@triton.jit
def with_exchanged(word):
    """[..., 2]: the words, and behind each the same with its halves exchanged."""
    return tl.join(word, word << 16 | word >> 16)


@triton.jit
def normal_pair(word0, word1):
    """Box and Muller's pair of normal numbers in float64, rounded to float32."""
    radius = tl.sqrt(-2.0 * tl.log((word0.to(tl.float64) + 1.0) * 2.3283064365386963e-10))  # 2^-32
    part = ((word1 & 0x3FFFFFFF).to(tl.float64) + 0.5) * 9.313225746154785e-10  # 2^-30
    quadrant = word1 >> 30
    sine, cosine = quarter_sine(part) * radius, quarter_sine(1.0 - part) * radius
    odd = (quadrant & 1) != 0
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    x = tl.where((quadrant == 1) | (quadrant == 2), -x, x)
    return x.to(tl.float32), tl.where(quadrant >= 2, -y, y).to(tl.float32)


@triton.jit
def matrix_tile(
    row,  # the tile's first row of the projection, a multiple of STEP
    first_col,  # a multiple of COLS
    dim,
    nnz,
    seed_low,
    seed_high,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SIZE: tl.constexpr,  # N, of srht
    STEP: tl.constexpr,
    COLS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[STEP, COLS] entries of the projection without their scale."""
    rows = row + tl.arange(0, STEP)
    cols = first_col + tl.arange(0, COLS)
    quads = first_col // 4 + tl.arange(0, COLS // 4)
    if KIND == "rademacher":
        block = (first_col // 128) + tl.zeros((1, 1), tl.int64)
        words = random_words(rows[:, None], block, seed_low, seed_high, NUMBER)
        tile = tl.where(bit_of(words, (cols % 128)[None, :]) != 0, -1.0, 1.0).to(DTYPE)
    elif KIND == "gaussian":
        blocks = first_col // 8 + tl.arange(0, COLS // 8)
        w0, w1, w2, w3 = random_words(rows[:, None], blocks[None, :], seed_low, seed_high, NUMBER, ROUNDS=7)
        x0, y0 = float_pair(with_exchanged(w0), with_exchanged(w1))
        x1, y1 = float_pair(with_exchanged(w2), with_exchanged(w3))
        # [row, group, block in the group, half, number, pair] to the order of columns.
        numbers = tl.join(tl.join(x0, y0), tl.join(x1, y1)).reshape(STEP, COLS // 32, 4, 2, 2, 2)
        numbers = numbers.permute(0, 1, 5, 4, 2, 3).reshape(STEP, COLS)
        # For the reason of this choice see below.
        tile = tl.where((cols < dim)[None, :], numbers, 0.0).to(DTYPE)
    elif KIND == "gaussian-boxmuller":
        w0, w1, w2, w3 = random_words(rows[:, None], quads[None, :], seed_low, seed_high, NUMBER)
        n0, n1 = normal_pair(w0, w1)
        n2, n3 = normal_pair(w2, w3)
        # For sm_100 Triton 3.6 fails to compile a product with a tile that was only just put in turn: hence the choice.
        tile = tl.where((cols < dim)[None, :], in_turn(n0, n1, n2, n3), 0.0).to(DTYPE)
    elif KIND == "sjlt":
        tile = tl.zeros((STEP, COLS), DTYPE)
        # The entries whose blocks of columns have the tile's first and last one.
        pair = ((first_col + 1) * nnz - 1) // dim // 2
        last = (tl.minimum(first_col + COLS, dim) * nnz - 1) // dim
        while 2 * pair <= last:
            begin, middle = 2 * pair * dim // nnz, (2 * pair + 1) * dim // nnz
            end = (2 * pair + 2) * dim // nnz
            w0, w1, w2, w3 = random_words(rows, pair + tl.zeros((1,), tl.int64), seed_low, seed_high, NUMBER)
            first = begin + (w0.to(tl.int64) * (middle - begin) >> 32)
            # The second entry of the last pair may be one too many: its column is beyond all.
            second = middle + (w2.to(tl.int64) * (end - middle) >> 32)
            sign = tl.where((w1 & 1) != 0, -1.0, 1.0).to(DTYPE)
            tile = tl.where(first[:, None] == cols[None, :], sign[:, None], tile)
            sign = tl.where((w3 & 1) != 0, -1.0, 1.0).to(DTYPE)
            tile = tl.where(second[:, None] == cols[None, :], sign[:, None], tile)
            pair += 1
    else:
        number = row // SIZE + tl.zeros((1,), tl.int64)
        w0, w1, w2, w3 = random_words(number, 1 + quads, seed_low, seed_high, NUMBER)
        drawn = in_turn(w0, w1, w2, w3).to(tl.int64)
        if SIZE < 4096:  # as many as outputs at least
            begin = cols * SIZE // dim
            width = (cols + 1) * SIZE // dim - begin
        else:
            begin = tl.where(dim > SIZE, 0, cols * SIZE // dim)
            width = tl.where(dim > SIZE, SIZE, (cols + 1) * SIZE // dim - begin)
        picked = (begin + (drawn * width >> 32)).to(tl.int32)
        shared = picked[None, :] & (rows % SIZE).to(tl.int32)[:, None]
        shared ^= shared >> 8
        shared ^= shared >> 4
        shared ^= shared >> 2
        shared ^= shared >> 1
        words = random_words(rows // 128, tl.zeros((1,), tl.int64), seed_low, seed_high, NUMBER)
        own = bit_of(words, rows % 128).to(tl.int32)
        tile = tl.where(((shared ^ own[:, None]) & 1) != 0, -1.0, 1.0).to(DTYPE)
    return tile


@triton.jit(
    do_not_specialize=[
        "row_count", "dim", "first_output", "width", "base", "shift", "end", "piece", "pieces", "begin",
        "count", "nnz", "seed_low", "seed_high",
    ]
)  # fmt: skip
def sketch_kernel(
    x,  # [row_count, end - shift], strides x_stride and x_step
    x_stride,
    x_step,
    sums,  # [pieces, row_count, width] float64
    row_count,
    dim,
    first_output,
    width,  # of the outputs, worked on now
    base,  # the projection's row that columns are counted from, a multiple of STEP
    shift,  # x has the columns [shift, end)
    end,
    piece,  # columns of a piece
    pieces,
    begin,  # of each piece, `count` columns from here on
    count,
    nnz,
    seed_low,
    seed_high,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,  # of products
    SUMS: tl.constexpr,  # and of their sums within a chunk
    PRECISION: tl.constexpr,
):
    # In one dimension of the grid: the others have at most 65,535 blocks.
    tiles = (width + COLS - 1) // COLS
    program = tl.program_id(0).to(tl.int64)
    col = program % tiles * COLS
    number = program // tiles % pieces
    rows = program // tiles // pieces * ROWS + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    # Widened, so that no product overflows.
    dim, nnz, base = dim.to(tl.int64), nnz.to(tl.int64), base.to(tl.int64)
    column = number * piece + begin
    stop = tl.minimum(tl.minimum(column + count, (number + 1) * piece), end)
    place = sums + (number * row_count + rows[:, None]) * width + cols[None, :]
    inside = (rows < row_count)[:, None] & (cols < width)[None, :]
    # Sums over chunks are kept in memory: in registers they would take as many registers as two tiles of float32.
    while column < stop:
        is_first = column == number * piece
        chunk = tl.minimum(column + CHUNK, stop)
        acc = tl.zeros((ROWS, COLS), SUMS)
        while column < chunk:
            own = column + tl.arange(0, STEP)
            here = (rows < row_count)[:, None] & ((own >= shift) & (own < end))[None, :]
            values = tl.load(
                x + rows[:, None] * x_stride + (own - shift)[None, :] * x_step, mask=here, other=0.0
            )
            matrix = matrix_tile(
                base + column,
                first_output + col,
                dim,
                nnz,
                seed_low,
                seed_high,
                KIND,
                NUMBER,
                SIZE,
                STEP,
                COLS,
                DTYPE,
            )
            acc = tl.dot(values.to(DTYPE), matrix, acc, input_precision=PRECISION, out_dtype=SUMS)
            column += STEP
        before = tl.load(place, mask=inside & (is_first == 0), other=0.0)
        tl.store(place, before + acc.to(tl.float64), mask=inside)


@triton.jit(do_not_specialize=["pieces", "size", "width", "scale"])
def add_kernel(
    sums,  # [pieces, size] float64, `width` per row
    pieces,
    size,
    width,
    scale,  # [1] float64
    out,  # [size / width, width], `out_stride` per row
    out_stride,
    COUNT: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    total = tl.zeros((COUNT,), tl.float64)
    while pieces > 0:
        total += tl.load(sums + at, mask=at < size, other=0.0)
        sums += size
        pieces -= 1
    tl.store(out + at // width * out_stride + at % width, total * tl.load(scale), mask=at < size)


@triton.jit(do_not_specialize=["row_count", "dim", "base", "shift", "nnz", "seed_low", "seed_high"])
def matrix_kernel(
    out,  # [row_count, dim]
    out_stride,
    row_count,
    dim,
    base,
    shift,
    nnz,
    seed_low,
    seed_high,
    scale,  # [1]
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    dim, nnz, base = dim.to(tl.int64), nnz.to(tl.int64), base.to(tl.int64)
    tiles = (dim + COLS - 1) // COLS
    program = tl.program_id(0).to(tl.int64)
    col, own = program % tiles * COLS, program // tiles * STEP
    tile = matrix_tile(
        base + own, col, dim, nnz, seed_low, seed_high, KIND, NUMBER, SIZE, STEP, COLS, out.dtype.element_ty
    )
    rows, cols = own - shift + tl.arange(0, STEP), col + tl.arange(0, COLS)
    inside = ((rows >= 0) & (rows < row_count))[:, None] & (cols < dim)[None, :]
    tl.store(out + rows[:, None] * out_stride + cols[None, :], tile * tl.load(scale), mask=inside)


@dataclass(frozen=True)
class Tile:
    """How a program's tile of products is computed; the same for every number of rows."""

    rows: int
    cols: int
    step: int
    warps: int

    @staticmethod
    def of(dtype: torch.dtype, allow_tf32: bool = False) -> Tile:
        """The tile for products of `dtype`, without spilled registers. For float32 it has 32 rows: from 64 on Triton 3.6 takes
        TF32 for products asked for as "ieee" on sm_100."""
        if INTERPRETED:  # a program costs milliseconds, the numbers in its tile little
            return Tile(32, 128, 128, 1)
        if dtype == torch.float64:
            return Tile(32, 64, 16, 4)
        return Tile(32, 128, 32, 8) if dtype == torch.float32 and not allow_tf32 else Tile(64, 64, 32, 8)


@dataclass(frozen=True)
class Projection:
    """A projection to `dim` outputs, as the kernels take it."""

    kind: str
    dim: int
    seed: int
    offset: int
    nnz: int

    def scale(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[1], rounded to `dtype`."""
        count = self.nnz if self.kind == "sjlt" else self.dim
        return torch.full((1,), 1 / math.sqrt(count), dtype=dtype, device=device)

    def arguments(self) -> dict[str, object]:
        # Always signed 32 bits, so that kernels are compiled for one type.
        low, high = (((self.seed >> shift) + 2**31) % 2**32 - 2**31 for shift in (0, 32))
        return {
            "nnz": self.nnz,
            "seed_low": low,
            "seed_high": high,
            "KIND": self.kind,
            "NUMBER": STREAMS[self.kind],
            "SIZE": hadamard_block(self.dim) if self.kind == "srht" else 0,
        }


def launch_sketch(x: Tensor, projection: Projection, out: Tensor, allow_tf32: bool) -> None:
    """Writes x [B, D] times the projection to `out` [B, dim], whose rows are contiguous."""
    count, d = x.shape
    dim = projection.dim
    dtype = x.dtype
    # The interpreter multiplies the bits of bfloat16 as if they were whole numbers.
    if dtype != torch.float64 and (
        projection.kind in ("gaussian", "gaussian-boxmuller") or (INTERPRETED and dtype == torch.bfloat16)
    ):
        dtype = torch.float32
    # Not for half types, which are widened exactly and would be narrowed again.
    allow_tf32 = allow_tf32 and x.dtype == torch.float32
    tile = Tile.of(dtype, allow_tf32)
    shift = projection.offset % tile.step
    end = shift + d
    pieces = max(1, min(d // _PIECE, _PROGRAMS // triton.cdiv(dim, tile.cols)))
    piece = triton.cdiv(triton.cdiv(end, pieces), CHUNK.value) * CHUNK.value
    pieces = triton.cdiv(end, piece)
    width = min(dim, _OUTPUTS)
    height = min(count, max(tile.rows, _SUMS // (pieces * width)))
    sums = x.new_empty(pieces * height * width, dtype=torch.float64)
    scale = projection.scale(out.dtype, x.device).double()
    waiting: list[torch.cuda.Event] = []
    with torch.cuda.device_of(x):
        for row in range(0, count, height):
            rows = x[row : row + height]
            for output in range(0, dim, width):
                target = out[row : row + height, output : output + width]
                size = target.shape[0] * target.shape[1]
                at_once = max(1, _OPERATIONS // (size * pieces * CHUNK.value)) * CHUNK.value
                for begin in range(0, min(piece, end), at_once):
                    programs = (
                        triton.cdiv(target.shape[1], tile.cols) * pieces * triton.cdiv(len(rows), tile.rows)
                    )
                    sketch_kernel[(programs,)](
                        rows,
                        rows.stride(0),
                        rows.stride(1),
                        sums,
                        len(rows),
                        dim,
                        output,
                        target.shape[1],
                        projection.offset - shift,
                        shift,
                        end,
                        piece,
                        pieces,
                        begin,
                        at_once,
                        ROWS=tile.rows,
                        COLS=tile.cols,
                        STEP=tile.step,
                        DTYPE=TYPES[dtype],
                        SUMS=TYPES[out.dtype],
                        PRECISION="tf32" if allow_tf32 else "ieee",
                        num_warps=tile.warps,
                        **projection.arguments(),
                    )
                    wait_for_all_but_a_few(waiting, x.device)
                add_kernel[(triton.cdiv(size, 1024),)](
                    sums, pieces, size, target.shape[1], scale, target, target.stride(0), COUNT=1024
                )


def wait_for_all_but_a_few(waiting: list[torch.cuda.Event], device: torch.device) -> None:
    """Keeps the host within reach of Ctrl-C, by not running far ahead of the device."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()
    event.record()
    waiting.append(event)
    if len(waiting) > _MOST_WAITING:
        waiting.pop(0).synchronize()


def launch_matrix(projection: Projection, out: Tensor) -> None:
    """Writes the projection's matrix to `out` [rows, dim], float32 or float64, whose rows are contiguous."""
    tile = Tile.of(torch.float64)  # small, since all of it is in registers
    shift = projection.offset % tile.step
    programs = triton.cdiv(shift + len(out), tile.step) * triton.cdiv(projection.dim, tile.cols)
    with torch.cuda.device_of(out):
        matrix_kernel[(programs,)](
            out,
            out.stride(0),
            len(out),
            projection.dim,
            projection.offset - shift,
            shift,
            scale=projection.scale(out.dtype, out.device),
            COLS=tile.cols,
            STEP=tile.step,
            num_warps=tile.warps,
            **projection.arguments(),
        )
