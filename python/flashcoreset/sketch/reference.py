"""Random projections: their matrices, entry by entry, and the products with them.

Row i of the matrix belongs to column i of the input, counted from the start of what is sketched, `offset` included. Every
entry is a function of (kind, seed, row, column) and of nothing else. Random words are Philox4x32-10 blocks of the key `seed`;
the counter is (row low, row high, block, kind), with the kinds' numbers from STREAMS:

- rademacher: +-1 / sqrt(dim). Bit c % 32 of word c % 128 / 32 of block c / 128 of the row is set if column c is negative
  (Achlioptas, "Database-friendly random projections", 2003).
- gaussian: n / sqrt(dim), n standard normal by Box and Muller's formula in float32 arithmetic (`normal_pairs`). Block 4g + l gives
  eight of the columns 32g to 32g + 31: words 0 and 1 the columns 2l and 8 + 2l of the group, words 2 and 3 the columns 16 + 2l
  and 24 + 2l; the same words with their halves exchanged give the column behind each. So every number has two whole words, and
  two numbers that share them are independent down to steps of 2^-16 of their uniform numbers. Words are Philox4x32-7's: seven
  rounds instead of ten. n is a float32 number, whatever the precision of the product.
- gaussian-boxmuller: what "gaussian" was before; n / sqrt(dim), n standard normal by Box and Muller's formula in float64
  (`box_muller`): words 0 and 1 of block c / 4 give columns 4b and 4b + 1, words 2 and 3 the next two. n is a float32 number.
- sjlt: `nnz` entries +-1 / sqrt(nnz) per row, one in each of `nnz` nearly equal blocks of columns (Kane and Nelson, "Sparser
  Johnson-Lindenstrauss transforms", 2014). Words 2e and 2e + 1 of the row (word w is word w % 4 of block w / 4) say where
  in its block entry e is, and by their lowest bit its sign.
- srht: rows in blocks of N, a power of two; block b is sqrt(1 / dim) D H_b: D random signs (bit i % 128 of counter row i / 128
  for row i), H_b `dim` columns of the N x N Hadamard matrix (Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform",
  2009; blockwise: Balabanov, Beaupere, Grigori and Lederer, "Block subsampled randomized Hadamard transform for low-rank
  approximation on distributed architectures", 2023). Column c is drawn from the c-th of `dim` equal parts of the N while
  dim <= N, else from all of them, by word c % 4 of block 1 + c / 4 of counter row b.

- mask: column c is sqrt(n_c) times one entry of the input, drawn from the n_c entries of the c-th of `dim` nearly equal parts of the
  D, begin_c = c D // dim to begin_(c+1): entry begin_c + floor((2^32 w + w') n_c / 2^64), w and w' being words 2 (c % 2) and the next of
  block c / 2 of counter row 0, whose kind is 5 (4 is that of the directions of zeroth-order gradients). So the matrix depends on D.
- grass: the sjlt of a mask of 4 dim entries, of all D if there are fewer, under the same seed (Hu, Melkonian, Tang, Zhao and Ma, "GraSS:
  scalable data attribution with gradient sparsification and sparse projection", 2025).

All kinds keep squared lengths and inner products in expectation.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset._core.philox import philox4x32
from flashcoreset._core.tensor import Csr, compute_dtype
from flashcoreset.sketch.kinds import (
    CHOICE_STREAM,
    CHOICES,
    ROWS_AT_ONCE,
    STREAMS,
    columns_read,
    hadamard_block,
)

TAKES = Takes(sparse=True)


def _words(kind: str, seed: int, rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The words [rows, blocks, 4] of the counters (row, block)."""
    counter = np.empty((len(rows), len(blocks), 4), dtype=np.uint32)
    counter[..., 0] = (rows & 0xFFFFFFFF)[:, None]
    counter[..., 1] = (rows >> 32)[:, None]
    counter[..., 2] = blocks
    counter[..., 3] = STREAMS[kind]
    rounds = 7 if kind == "gaussian" else 10
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), rounds)


def _bits(words: np.ndarray) -> np.ndarray:
    """The bits [rows, 32 * words] of the words, the lowest first."""
    rows, count = words.shape
    return (words[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).reshape(rows, 32 * count)


def box_muller(words: np.ndarray) -> np.ndarray:
    """Box and Muller's pairs of normal numbers from pairs of words [..., 2], as float32.

    Angles are cut into quadrants exactly, so that numbers near 0 have all their digits.
    """
    radius = np.sqrt(-2 * np.log((words[..., 0].astype(np.float64) + 1) * 2.0**-32))
    turn = (words[..., 1].astype(np.float64) + 0.5) * 2.0**-30
    quadrant = turn.astype(np.int64)
    part = turn - quadrant
    sine, cosine = np.sin(part * (np.pi / 2)), np.sin((1 - part) * (np.pi / 2))
    odd = quadrant % 2 == 1
    x = np.where(odd, sine, cosine) * np.where((quadrant == 1) | (quadrant == 2), -1, 1)
    y = np.where(odd, cosine, sine) * np.where(quadrant >= 2, -1, 1)
    return (np.stack([x, y], axis=-1) * radius[..., None]).astype(np.float32)


# -log2(1 - f) / f, -1/3 < f <= 1/3, in units of 2^-23: minimax, to 7.2e-6 of it.
LOGARITHM = (12102290.0, 6051346.0, 4020255.0, 3007360.25, 2740731.25, 2341755.5)
# sin(pi / 4 t) / t and cos(pi / 4 t) as polynomials of t^2, |t| <= 1: minimax, to 1.5e-6 and 3e-8. Both are divided by the root
# mean square of what they are multiplied with, so that the numbers' variance is 1 (to 4e-8).
SINE = (0.00031928022508509457, -3.281629324192181e-05, 9.901314115268178e-07)
COSINE = (0.0004065207904204726, -0.000125380844110623, 6.443226538976887e-06, -1.2956950001807854e-07)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray | float) -> np.ndarray:
    """a b + c in float32, rounded once: float64 holds the product exactly. (The sum is rounded to float64 first; in one of 2^29
    cases at most that changes the last bit.)"""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """By Horner's rule, in fused multiply-adds."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = _fused(total, x, coefficient)
    return total


def normal_pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two standard normal numbers, float32, from each pair of words: Box and Muller's formula in float32.

    The low 31 bits of `a` are the radius, its highest bit the sign of the cosine; the low 31 bits of `b` are the angle within 45
    degrees to both sides of the first axis, its highest bit exchanges the axes. Every operation is rounded as IEEE 754 says, so
    that all backends have the same bits. The numbers are within 6e-6 of their size of what exact arithmetic gives; they reach
    6.66 standard deviations.
    """
    one = 1 << 23  # in the exponent's place
    uniform = (a & np.uint32(0x7FFFFFFF)).astype(np.float32) + np.float32(0.5)  # times 2^-31: in (0, 1]
    bits = uniform.view(np.int32)
    # uniform = 2^31 2^(-exponent) (1 - f), 2/3 <= 1 - f < 4/3; 0x3F2AAAAB are the bits of 2/3.
    exponent = (np.int32(0x3F2AAAAB + 32 * one - 1) - bits) & np.int32(-one)
    f = np.float32(1) - (bits + exponent - np.int32(31 * one)).view(np.float32)
    radius = np.sqrt(_fused(f, _polynomial(f, LOGARITHM), exponent.astype(np.float32)))
    t = (b << np.uint32(1) | np.uint32(1)).view(np.int32).astype(np.float32) * np.float32(2.0**-31)
    square = t * t
    sine = _polynomial(square, SINE) * t * radius
    cosine = _polynomial(square, COSINE) * np.where(a >> np.uint32(31), -radius, radius)
    exchanged = (b >> np.uint32(31)).astype(bool)
    return np.where(exchanged, cosine, sine), np.where(exchanged, sine, cosine)


def normals(seed: int, dim: int, rows: np.ndarray) -> np.ndarray:
    """The normal numbers [rows, dim], float32."""
    groups = (dim + 31) // 32
    words = _words("gaussian", seed, rows, np.arange(4 * groups)).reshape(len(rows), groups, 4, 2, 2)
    both = np.stack([words, words << np.uint32(16) | words >> np.uint32(16)], axis=-1)
    pairs = normal_pairs(both[..., 0, :], both[..., 1, :])  # [rows, groups, block, pair, half]
    return np.stack(pairs, axis=3).transpose(0, 1, 4, 3, 2, 5).reshape(len(rows), -1)[:, :dim]


def sjlt_entries(seed: int, dim: int, nnz: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns [rows, nnz] and signs [rows, nnz] (+1 or -1) of the sparse matrix's entries."""
    words = _words("sjlt", seed, rows, np.arange((nnz + 1) // 2)).reshape(len(rows), -1).astype(np.int64)
    begin = np.arange(nnz + 1, dtype=np.int64) * dim // nnz
    columns = begin[:-1] + (words[:, 0 : 2 * nnz : 2] * np.diff(begin) >> 32)
    return columns, 1 - 2 * (words[:, 1 : 2 * nnz : 2] & 1)


def _hadamard(seed: int, dim: int, rows: np.ndarray) -> np.ndarray:
    """Signs [rows, dim] of srht's entries, as 0 (+) and 1."""
    size = hadamard_block(dim)
    words = _words("srht", seed, rows >> 7, np.zeros(1, np.int64))[:, 0]
    own = _bits(words)[np.arange(len(rows)), rows & 127]
    block = rows // size
    columns = np.arange(dim, dtype=np.int64)
    if dim <= size:
        begin, width = columns * size // dim, (columns + 1) * size // dim - columns * size // dim
    else:
        begin, width = np.zeros(dim, np.int64), np.full(dim, size)
    numbers, which = np.unique(block, return_inverse=True)
    drawn = _words("srht", seed, numbers, 1 + np.arange((dim + 3) // 4)).reshape(len(numbers), -1)[:, :dim]
    picked = begin + (drawn.astype(np.int64) * width >> 32)
    shared = picked[which] & (rows % size)[:, None]
    for shift in (8, 4, 2, 1):  # 12 bits at most
        shared ^= shared >> shift
    return (shared & 1) ^ own[:, None]


def projection_matrix(
    rows: int,
    dim: int,
    *,
    kind: str,
    seed: int,
    offset: int,
    nnz: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The matrix [rows, dim] on `device`, its first row being row `offset` of the projection."""
    if kind in CHOICES:
        count = columns_read(rows, dim, kind)
        own = torch.eye(dim, dtype=dtype)
        if kind == "grass":
            own = _matrix(_consecutive(0, count), dim, "sjlt", seed, nnz, dtype)
        matrix = torch.zeros(rows, dim, dtype=dtype)
        for c, (i, size) in enumerate(_choice(rows, count, seed)):
            matrix[i] = own[c] * torch.tensor(math.sqrt(size), dtype=torch.float64).to(dtype)
        return matrix.to(device)
    return _matrix(_consecutive(offset, rows), dim, kind, seed, nnz, dtype).to(device)


def _consecutive(begin: int, count: int) -> np.ndarray:
    return begin + np.arange(count, dtype=np.int64)


def _matrix(number: np.ndarray, dim: int, kind: str, seed: int, nnz: int, dtype: torch.dtype) -> Tensor:
    """The rows of the matrix with the numbers `number` [rows] int64."""
    rows = len(number)
    if kind == "gaussian":
        return torch.from_numpy(normals(seed, dim, number)).to(dtype) * _scale(dim, dtype)
    if kind == "gaussian-boxmuller":
        words = _words(kind, seed, number, np.arange((dim + 3) // 4))
        normal = box_muller(words.reshape(rows, -1, 2)).reshape(rows, -1)[:, :dim]
        return torch.from_numpy(normal).to(dtype) * _scale(dim, dtype)
    if kind == "sjlt":
        columns, signs = sjlt_entries(seed, dim, nnz, number)
        matrix = torch.zeros(rows, dim, dtype=dtype)
        return matrix.scatter_(
            1, torch.from_numpy(columns), torch.from_numpy(signs).to(dtype) * _scale(nnz, dtype)
        )
    if kind == "rademacher":
        words = _words(kind, seed, number, np.arange((dim + 127) // 128))
        negative = _bits(words.reshape(rows, -1))[:, :dim]
    else:
        negative = _hadamard(seed, dim, number)
    return (1 - 2 * torch.from_numpy(negative.astype(np.int8))).to(dtype) * _scale(dim, dtype)


def _choice(columns: int, count: int, seed: int) -> list[tuple[int, int]]:
    """The entries that a mask reads, and the sizes of the parts that they were drawn from."""
    counter = np.zeros((count, 4), dtype=np.uint32)
    counter[:, 2] = np.arange(count) // 2
    counter[:, 3] = CHOICE_STREAM
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).tolist()
    found = []
    for c in range(count):
        begin, end = c * columns // count, (c + 1) * columns // count
        high, low = words[c][2 * (c % 2) :][:2]
        found.append((begin + ((high << 32 | low) * (end - begin) >> 64), end - begin))
    return found


def _scale(count: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(1 / math.sqrt(count), dtype=torch.float64).to(dtype)


def sketch(x: Tensor, dim: int, *, kind: str, seed: int, offset: int, nnz: int) -> Tensor:
    """Multiplies x [B, D] by the matrix [D, dim], in the dtype of `x`, a part of the rows at a time."""
    if kind in CHOICES:
        chosen = _choice(x.shape[1], columns_read(x.shape[1], dim, kind), seed)
        dtype = compute_dtype(x.dtype)
        factors = [torch.tensor(math.sqrt(n), dtype=torch.float64).to(dtype) for _, n in chosen]
        part = torch.stack([x[:, i].to(dtype) * by for (i, _), by in zip(chosen, factors, strict=True)], 1)
        return part if kind == "mask" else sketch(part, dim, kind="sjlt", seed=seed, offset=0, nnz=nnz)
    out = x.new_zeros(x.shape[0], dim)
    step = max(1, ROWS_AT_ONCE // dim)
    for begin in range(0, x.shape[1], step):
        part = x[:, begin : begin + step]
        number = _consecutive(offset + begin, part.shape[1])
        matrix = _matrix(number, dim, kind, seed, nnz, x.dtype).to(x.device)
        # Row by row, without a matrix product, whose bits depend on how many rows there are and on the number of threads.
        for sums, row in zip(out, part, strict=True):
            sums += (row[:, None] * matrix).sum(0)
    return out


def sketch_csr(x: Csr, dim: int, *, kind: str, seed: int, offset: int, nnz: int) -> Tensor:
    """The same of a sparse matrix, row by row."""
    out = torch.zeros(x.shape[0], dim, dtype=x.dtype, device=x.device)
    for sums, begin, end in zip(out, x.crow.tolist(), x.crow.tolist()[1:], strict=False):
        col, values = x.col[begin:end], x.values[begin:end]
        if kind in CHOICES:
            row = values.new_zeros(1, x.shape[1])
            row[0, col] = values
            sums += sketch(row, dim, kind=kind, seed=seed, offset=0, nnz=nnz)[0]
        elif end > begin:
            matrix = _matrix(offset + col.cpu().numpy(), dim, kind, seed, nnz, x.dtype).to(x.device)
            sums += (values[:, None] * matrix).sum(0)
    return out
