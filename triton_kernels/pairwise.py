"""Similarities and distances of all pairs of rows, a tile at a time.

A pair's value is a chain over the features 0, 1, ..., d-1 with one accumulator,

    product   acc = fma(a_k, b_k, acc)               (dot; cosine, of rows of unit length)
    square    acc = fma(a_k - b_k, a_k - b_k, acc)   (sqeuclidean; euclidean takes its root)
    absolute  acc = acc + |a_k - b_k|                (l1)

restarted every 256 features, the partial results added in order: the sums of csrc/cpu/tile.h. Every element of a tile has an
accumulator of its own, so a pair's value does not depend on the tile, and has the same bits for (a, b) and (b, a).

A device rounds an fma once, as the CPU kernels do if the processor has the instruction. Triton's interpreter multiplies,
rounds and adds, as the CPU build without fused multiply-adds does: its last bits are not those of a device.

Loops are written with while: the interpreter makes int() of the bounds of a range, which NumPy 2.4 refuses for the
arrays of one element that it holds them in.

Points come as panels, feature by feature [d, rows]: the rows of a feature are read as vectors, and there are whole
tiles of them, so that the inner loop needs no mask.

Cost: n * m * d fused multiply-adds (absolute: two additions each); a tile reads (ROWS + COLS) * d numbers, in float32 8 loads
per thread for 64 multiply-adds. Nothing is staged in shared memory: neighbouring programs share the tile of columns, which the
first-level cache keeps for them.

Rejected: tl.dot, even with input_precision="ieee". Its order of summation is the compiler's choice (float64 goes to
matrix units that sum four features at once), and the interpreter hands it to NumPy's matrix product, whose last bits
depend on the shape of the tile. Distances cannot use it anyway: |a|^2 + |b|^2 - 2ab cancels for near points, and
equal rows would not be at distance 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# How many features one chain of the sum takes.
CHAIN = tl.constexpr(256)


@triton.jit
def pair_values(
    a,  # first of ROWS rows in a panel [d, >= ROWS], `a_stride` from feature to feature
    a_stride,
    b,  # first of COLS rows in such a panel
    b_stride,
    d,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,  # d <= 256: no second accumulator
):
    """[ROWS, COLS] values of `METRIC`: similarities or distances."""
    rows = tl.arange(0, ROWS)
    # As if neighbours did not touch: so each thread loads the columns that it multiplies, each a warp's width from the next.
    # Vector loads would bring it other columns, and every feature an exchange through shared memory. The compiler gives all
    # loads nearby one layout, so the loads that a kernel makes beside the tile do the same.
    cols = tl.max_contiguous(tl.arange(0, COLS), 1)
    total = tl.full((ROWS, COLS), 0, a.dtype.element_ty)
    while d > 0:
        acc = tl.full((ROWS, COLS), 0, a.dtype.element_ty)
        count = tl.minimum(CHAIN, d)
        d -= CHAIN
        while count > 0:
            p, q = tl.load(a + rows)[:, None], tl.load(b + cols)[None, :]
            if METRIC == "cosine" or METRIC == "dot":
                acc = tl.fma(p, q, acc)
            elif METRIC == "l1":
                acc += tl.abs(p - q)
            else:
                acc = tl.fma(p - q, p - q, acc)
            a += a_stride
            b += b_stride
            count -= 1
        if ONE_CHAIN:
            total = acc
        else:
            total += acc
    if METRIC == "euclidean":
        # tl.sqrt is an approximation in float32, tl.sqrt_rn does not take float64.
        total = tl.sqrt_rn(total) if total.dtype == tl.float32 else tl.sqrt(total)
    return total


@triton.jit(do_not_specialize=["n", "m", "d"])
def pairwise_kernel(
    a,  # [d, a_stride]
    a_stride,
    b,  # [d, b_stride]
    b_stride,
    out,  # [n, m], `out_stride` from row to row
    out_stride,
    n,
    m,
    d,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
):
    # In one dimension of the grid: the others have at most 65,535 blocks.
    tiles = (m + COLS - 1) // COLS
    first_row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    first_col = (tl.program_id(0) % tiles).to(tl.int64) * COLS
    values = pair_values(a + first_row, a_stride, b + first_col, b_stride, d, METRIC, ROWS, COLS, ONE_CHAIN)
    rows = (first_row + tl.arange(0, ROWS))[:, None]
    cols = (first_col + tl.arange(0, COLS))[None, :]
    tl.store(out + rows * out_stride + cols, values, mask=(rows < n) & (cols < m))


# Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET as it was when triton was imported.
INTERPRETED = not isinstance(pairwise_kernel, triton.JITFunction)


@dataclass(frozen=True)
class Tile:
    """How a program's tile of pairs is computed."""

    rows: int
    cols: int
    warps: int
    one_chain: bool

    @staticmethod
    def of(dtype: torch.dtype, d: int) -> Tile:
        """The tile for `dtype` and `d` features. One warp computes it, each thread all rows of some columns: 16 x 4
        accumulators in float32 and 16 x 2 in float64, which take as many registers; half the rows if each needs a second
        accumulator. With more warps, each thread would get fewer columns, and load more numbers per product."""
        one_chain = d <= CHAIN.value
        if INTERPRETED:  # a program costs milliseconds, the numbers in its tile little
            return Tile(256, 256, 1, one_chain)
        return Tile(16 if one_chain else 8, 128 if dtype == torch.float32 else 64, 1, one_chain)


def panel(x: Tensor) -> Tensor:
    """`x` [n, d] feature by feature, as [d, n rounded up to whole tiles]; zeros fill it up."""
    n, d = x.shape
    tile = Tile.of(x.dtype, d)
    size = max(tile.rows, tile.cols)
    packed = x.new_zeros(d, -(-n // size) * size)
    packed[:, :n] = x.t()
    return packed


def launch_pairwise(a: Tensor, b: Tensor, out: Tensor, metric: str) -> None:
    """Writes the values of the pairs of the rows in the panels `a` and `b` to `out` [n, m], whose rows are contiguous."""
    (n, m), d = out.shape, a.shape[0]
    tile = Tile.of(out.dtype, d)
    grid = (triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.cols),)
    with torch.cuda.device_of(out):
        pairwise_kernel[grid](
            a,
            a.stride(0),
            b,
            b.stride(0),
            out,
            out.stride(0),
            n,
            m,
            d,
            METRIC=metric,
            ROWS=tile.rows,
            COLS=tile.cols,
            ONE_CHAIN=tile.one_chain,
            num_warps=tile.warps,
        )
