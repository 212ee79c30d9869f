"""Sketches of chosen columns, for every backend with kernels: torch gathers the columns, and a kernel sketches them.

The choice takes one number per output, so it is made on the host. `flashcoreset.sketch.reference` has the definitions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.philox import philox4x32
from flashcoreset._core.tensor import Csr, compute_dtype
from flashcoreset.sketch.kinds import CHOICE_STREAM, columns_read

MOST_PER_PART = 2**31  # columns of which one is chosen


@functools.lru_cache(maxsize=8)
def _choice(columns: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` of `columns`, ascending and distinct, and the sizes of the parts that they stand for."""
    part = np.arange(count + 1, dtype=np.int64)
    begin = part * (columns // count) + part * (columns % count) // count
    size = np.diff(begin)
    counter = np.zeros(((count + 1) // 2, 4), dtype=np.uint32)
    counter[:, 2] = np.arange(len(counter))
    counter[:, 3] = CHOICE_STREAM
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).reshape(-1, 2)[:count]
    high, low = words.astype(np.int64).T
    return begin[:-1] + (high * size + (low * size >> 32) >> 32), size


def choose_columns(
    columns: int, count: int, seed: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The columns that `kind="mask"` reads and their factors: x[:, chosen] * factors is the sketch.

    Args:
        columns: D.
        count: how many to choose, at most D, and more than D / 2^31.
        seed: a 64-bit integer.
        device: where the tensors go.

    Returns:
        [count] int64, ascending and distinct, and [count] float64.

    Example:
        >>> from flashcoreset.sketch.chosen import choose_columns
        >>> choose_columns(6, 3, seed=0)[1].square()
        tensor([2., 2., 2.], dtype=torch.float64)
    """
    chosen, size = _choice(columns, count, seed)
    factors = torch.from_numpy(np.sqrt(size.astype(np.float64)))
    return torch.tensor(chosen).to(device), factors.to(device)  # the choice is kept


def sketch_chosen(
    sketch: Callable[..., Tensor],
    x: Tensor,
    dim: int,
    *,
    kind: str,
    seed: int,
    nnz: int,
    out: Tensor | None = None,
) -> Tensor:
    """The sketch of x [B, D] of any floating dtype by a kind of CHOICES; `sketch` is the backend's own kernel."""
    dtype = compute_dtype(x.dtype)
    chosen, factors = choose_columns(x.shape[1], columns_read(x.shape[1], dim, kind), seed, x.device)
    part = x.detach().index_select(1, chosen).to(dtype).mul_(factors.to(dtype))
    if kind == "mask":
        return part if out is None else out.copy_(part)
    return sketch(part, dim, kind="sjlt", seed=seed, nnz=nnz, out=out)


def chosen_entries(x: Csr, dim: int, kind: str, seed: int) -> Csr:
    """The chosen columns of a sparse matrix, multiplied by their factors."""
    chosen, factors = choose_columns(x.shape[1], columns_read(x.shape[1], dim, kind), seed, x.device)
    place = torch.searchsorted(chosen, x.col).clamp_(max=len(chosen) - 1)
    kept = (chosen[place] == x.col).nonzero()[:, 0]
    rows = x.rows()[kept]
    crow = torch.zeros_like(x.crow)
    crow[1:] = torch.bincount(rows, minlength=x.shape[0]).cumsum(0)
    place = place[kept]
    return Csr(crow, place, x.values[kept] * factors.to(x.dtype)[place], (x.shape[0], len(chosen)))


def matrix_chosen(
    matrix: Callable[..., Tensor],
    rows: int,
    dim: int,
    *,
    kind: str,
    seed: int,
    nnz: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """The matrix [rows, dim] of a kind of CHOICES; `matrix` is the backend's own kernel."""
    chosen, factors = choose_columns(rows, columns_read(rows, dim, kind), seed, device)
    found = torch.zeros(rows, dim, dtype=dtype, device=device)
    if kind == "mask":
        found[chosen, torch.arange(dim, device=device)] = factors.to(dtype)
    else:
        own = matrix(len(chosen), dim, kind="sjlt", seed=seed, nnz=nnz, dtype=dtype, device=device)
        found[chosen] = own * factors.to(dtype)[:, None]
    return found
