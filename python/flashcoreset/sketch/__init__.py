"""Random projections of gradients and other long rows: arguments, backends and the torch op."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.op import define_op
from flashcoreset._core.tensor import (
    Csr,
    as_csr,
    as_dense,
    as_floating,
    as_int64,
    as_integer,
    as_matrix,
    check_finite,
    compute_dtype,
    is_sparse,
    one_of,
)
from flashcoreset.sketch.backend import choose, choose_sparse
from flashcoreset.sketch.chosen import MOST_PER_PART
from flashcoreset.sketch.kinds import CHOICES, KINDS, ROWS_AT_ONCE, columns_read

_MOST_COLUMNS = 2**31
_MOST_ENTRIES = 2**60  # the most entries of a matrix
_CONVERTED = 64 * 2**20  # bytes of half-precision input that are converted at a time
_COLUMNS = 1 << 18  # columns of a row that are converted together


def sketch(
    x: Any,
    dim: int,
    *,
    kind: str = "rademacher",
    seed: int = 0,
    offset: int = 0,
    nnz: int = 1,
    backend: str | None = None,
) -> Tensor:
    """The rows of `x`, projected to `dim` dimensions: x @ projection_matrix(D, dim, ...), without forming that matrix.

    Squared lengths and inner products of the rows are kept in expectation over `seed`, with a relative standard deviation of
    about sqrt(2 / dim) ("mask" and "grass": for rows whose length is spread over all columns). The matrix is a function of (kind, seed,
    row, column), for "mask" and "grass" also of D: one seed gives the same one on every backend,
    for every batch size, chunking and thread count, in this and later releases (`flashcoreset.sketch.reference` defines it).

    Args:
        x: [B, D], float16, bfloat16, float32 or float64; half types are computed in float32. Also sparse, as scipy CSR or a torch
            sparse CSR tensor, for "cpu" and "torch": the cost is then that of the entries that are not zero. Also a dict of
            per-sample gradients, name -> [B, *shape], which stand side by side in its order, each flattened; they are not joined in memory
            (but for "mask" and "grass").
        dim: columns of the result, 1 to 2^31.
        kind: "rademacher" (random signs; Achlioptas, 2003) or "gaussian": dense, B D dim multiply-adds; "sjlt": `nnz` entries per
            row of the matrix (Kane and Nelson, 2014), B D nnz; "srht": blocks of N rows, a power of two between 1,024 and
            4,096, by fast Hadamard transforms (Ailon and Chazelle, 2009), B D (log N + dim / N); "mask": `dim` random columns, one
            from each of `dim` nearly equal parts, times the root of that part's size, B dim, for dim <= D; "grass": the sjlt of
            a mask of 4 dim columns (Hu et al., 2025), 4 B dim nnz. "gaussian-boxmuller" are the normal numbers that "gaussian" had
            in releases before 1.0: for sketches made then; making them takes ten times as long.
        seed: a 64-bit integer.
        offset: the row of the matrix that column 0 of `x` belongs to, so that columns may come in pieces:
            sketch(x) = sketch(x[:, :c]) + sketch(x[:, c:], offset=c), up to rounding. (srht costs least if pieces begin at
            multiples of N. "mask" and "grass", which choose among all columns, take no pieces.)
        nnz: the entries per row of "sjlt" and "grass", at most `dim`; more entries lower the variance of short or sparse rows.
        backend: None, "cpu", "cuda", "triton" or "torch".

    Returns:
        [B, dim], float32, or float64 for float64 inputs. Not differentiable.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for a wrong shape or option, NaN or infinity in `x` (in the columns that are read), or sums beyond the range of
            the result's dtype.
        BackendUnavailableError: if `backend` cannot run here.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.ones(2, 1000)
        >>> pieces = fc.sketch(x[:, :300], 64, kind="sjlt") + fc.sketch(x[:, 300:], 64, kind="sjlt", offset=300)
        >>> torch.allclose(fc.sketch(x, 64, kind="sjlt"), pieces)
        True
    """
    # A DatasetDict is a dict of splits: each is a table of its own, and as_matrix says so.
    if isinstance(x, Mapping) and not hasattr(x, "column_names"):
        return _sketch_parts(x, dim, kind, seed, offset, nnz, backend)
    if is_sparse(x):
        return _sketch_csr(as_csr(x, "x"), dim, kind, seed, offset, nnz, backend)
    matrix = as_matrix(x, "x")
    dim, seed, offset, nnz = check_projection(matrix.shape[1], dim, kind, seed, offset, nnz)
    check_backend(backend)
    return _SKETCH(matrix, dim, kind, seed, offset, nnz, backend)


def _sketch_parts(
    parts: Mapping[Any, Any], dim: Any, kind: Any, seed: Any, offset: Any, nnz: Any, backend: Any
) -> Tensor:
    """The sketch of matrices side by side, without joining them."""
    if not parts:
        raise ValueError("x must hold at least one part, got an empty dict")
    rows = {}
    for name, part in parts.items():
        value = as_floating(as_dense(part, f"x[{name!r}]"), f"x[{name!r}]")
        if value.dim() < 1:
            raise ValueError(f"x[{name!r}] must have the batch in dimension 0, got a number")
        rows[name] = value.reshape(len(value), value[0].numel()) if len(value) else value.flatten(1)
    first, *others = rows.items()
    for name, value in others:
        if len(value) != len(first[1]):
            raise ValueError(
                f"x: all parts must have as many rows, got {len(first[1])} in {first[0]!r} and {len(value)} in {name!r}"
            )
    dtype = functools.reduce(torch.promote_types, (compute_dtype(value.dtype) for value in rows.values()))
    if kind in CHOICES:
        return sketch(
            torch.cat([value.to(dtype) for value in rows.values()], 1),
            dim, kind=kind, seed=seed, offset=offset, nnz=nnz, backend=backend,
        )  # fmt: skip
    out: Tensor | None = None
    begin = as_integer(offset, "offset")
    for value in rows.values():
        if value.shape[1] == 0:
            continue
        found = sketch(value, dim, kind=kind, seed=seed, offset=begin, nnz=nnz, backend=backend).to(dtype)
        out, begin = found if out is None else out + found, begin + value.shape[1]
    if out is None:
        raise ValueError("x must hold at least one column, got none in any of its parts")
    return out


def projection_matrix(
    D: int,
    dim: int,
    *,
    kind: str = "rademacher",
    seed: int = 0,
    offset: int = 0,
    nnz: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The matrix that `sketch` multiplies by: rows offset to offset + D of the projection. For tests and small D.

    Entries are the same bits on every backend (normal numbers: to 2 units in the last place).

    Args:
        D: rows, at least 1.
        dim, kind, seed, offset, nnz, backend: as for `sketch`.
        dtype: torch.float32 or torch.float64; float16 and bfloat16 round float32's entries.
        device: the device of the result; None is the CPU.

    Returns:
        [D, dim].

    Raises:
        TypeError, ValueError, BackendUnavailableError: as `sketch`.

    Example:
        >>> import flashcoreset as fc
        >>> fc.projection_matrix(1000, 16).square().sum(1)[:3]
        tensor([1., 1., 1.])
    """
    rows = as_integer(D, "D")
    if rows < 1:
        raise ValueError(f"D must be at least 1, got {rows}")
    dim, seed, offset, nnz = check_projection(rows, dim, kind, seed, offset, nnz)
    check_backend(backend)
    dtype, place = as_dtype(dtype), _device(device)
    if rows * dim >= _MOST_ENTRIES:
        raise ValueError(f"D times dim must be below 2^60, got {rows} * {dim}")
    kernels = choose(backend, place)
    found: Tensor = kernels.projection_matrix(
        rows, dim, kind=kind, seed=seed, offset=offset, nnz=nnz, dtype=compute_dtype(dtype), device=place
    )
    return found.to(dtype)


def check_projection(
    rows: int,
    dim: Any,
    kind: Any,
    seed: Any,
    offset: Any,
    nnz: Any,
    kinds: tuple[str, ...] = (*KINDS, *CHOICES),
) -> tuple[int, int, int, int]:
    """`dim`, `seed`, `offset` and `nnz` as integers in their ranges."""
    dim, offset, nnz = as_integer(dim, "dim"), as_integer(offset, "offset"), as_integer(nnz, "nnz")
    one_of(kind, "kind", kinds)
    if not 1 <= dim <= _MOST_COLUMNS:
        raise ValueError(f"dim must be in [1, 2^31], got {dim}")
    if not 0 <= offset < 2**63 - rows:
        raise ValueError(f"offset must be >= 0, and its sum with the {rows} columns below 2^63, got {offset}")
    if not 1 <= nnz <= dim:
        raise ValueError(f"nnz must be in [1, dim] = [1, {dim}], got {nnz}")
    if kind in CHOICES:
        if offset:
            raise ValueError(
                f"offset must be 0 for kind {kind!r}, which chooses among all columns, got {offset}; pass all columns at once, or "
                "another kind"
            )
        count = columns_read(rows, dim, kind)
        if count > rows:
            raise ValueError(f"dim must be at most D = {rows} for kind 'mask', got {dim}")
        if -(-rows // count) >= MOST_PER_PART:
            raise ValueError(
                f"dim must be more than D / 2^31 for kind {kind!r}, got D = {rows} and dim = {dim}"
            )
    return dim, as_int64(seed, "seed"), offset, nnz


def _device(value: Any) -> torch.device:
    """The device of a call, checked to be one that torch can use here."""
    try:
        place = torch.device("cpu" if value is None else value)
        torch.empty(0, device=place)
    except TypeError:
        raise TypeError(f"device must be a torch.device or its name, got {value!r}") from None
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        raise ValueError(f"device must be one that torch can use here, got {str(value)!r}: {error}") from None
    return place


def _op(x: Tensor, dim: int, kind: str, seed: int, offset: int, nnz: int, backend: str | None) -> Tensor:
    dim, seed, offset, nnz = check_projection(x.shape[1], dim, kind, seed, offset, nnz)
    kernels = choose(backend, x.device)
    dtype = compute_dtype(x.dtype)
    with torch.no_grad():
        if x.dtype == dtype or kernels.TAKES.half or kind in CHOICES:
            out: Tensor = kernels.sketch(x, dim, kind=kind, seed=seed, offset=offset, nnz=nnz)
        else:
            out = x.new_zeros(x.shape[0], dim, dtype=dtype)
            # Columns are cut in the same places for every number of rows, because a row's bits must not depend on that number.
            rows = max(1, _CONVERTED // (dtype.itemsize * min(x.shape[1], _COLUMNS)))
            for first in range(0, x.shape[0], rows):
                for begin in range(0, x.shape[1], _COLUMNS):
                    out[first : first + rows] += kernels.sketch(
                        # Without a name, so that this part is freed before the next.
                        x[first : first + rows, begin : begin + _COLUMNS].to(dtype),
                        dim, kind=kind, seed=seed, offset=offset + begin, nnz=nnz,
                    )  # fmt: skip
        # A number that is not finite in a row is not finite in its sketch either, which is shorter to check.
        if not bool(torch.isfinite(out).all()):
            check_finite(x, "x")
            raise ValueError(_TOO_LARGE.format(dtype))
    return out


def _sketch_csr(x: Csr, dim: Any, kind: Any, seed: Any, offset: Any, nnz: Any, backend: str | None) -> Tensor:
    dim, seed, offset, nnz = check_projection(x.shape[1], dim, kind, seed, offset, nnz)
    check_backend(backend)
    kernels, dtype = choose_sparse(backend, x.device), compute_dtype(x.dtype)
    x = Csr(x.crow, x.col, x.values.to(dtype), x.shape)
    out = kernels.sketch_csr(x, dim, kind=kind, seed=seed, offset=offset, nnz=nnz)
    if not bool(torch.isfinite(out).all()):
        bad = (~torch.isfinite(x.values)).nonzero()[:1, 0].tolist()
        if bad:
            value = float(x.values[bad[0]])
            raise ValueError(
                f"x must be finite, got {'NaN' if value != value else value} at row {int(x.rows()[bad[0]])}, column {int(x.col[bad[0]])}"
            )
        raise ValueError(_TOO_LARGE.format(dtype))
    return out


_TOO_LARGE = "x: sums of its rows go beyond the range of {}; scale it down"


def _fake(x: Tensor, dim: int, kind: str, seed: int, offset: int, nnz: int, backend: str | None) -> Tensor:
    return x.new_empty(x.shape[0], dim, dtype=compute_dtype(x.dtype))


_SKETCH = define_op("sketch", _op, _fake)


# Bytes of random words, bits and numbers per entry of the reference's matrix.
_REFERENCE = {
    "rademacher": 14, "gaussian": 28, "sjlt": 1, "srht": 22, "mask": 16, "grass": 16, "gaussian-boxmuller": 50,
}  # fmt: skip


@register_estimate("sketch")
def _estimate(
    x: Any,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str = "rademacher",
    seed: int = 0,
    offset: int = 0,
    nnz: int = 1,
    backend: str | None = None,
) -> int:
    """The bytes of one call; see `memory_estimate`. Terms are named after what the kernels allocate."""
    dtype = as_dtype(dtype)
    batch, columns = as_shape(x, "x")
    dim, _, _, nnz = check_projection(columns, dim, kind, seed, offset, nnz)
    check_backend(backend)
    size = compute_dtype(dtype).itemsize
    out = batch * dim * size
    if kind in CHOICES:
        # The choice, which is kept for the next call, and the columns that it reads, twice.
        read = columns_read(columns, dim, kind)
        most = out + 3 * batch * dim
        if kind == "grass":
            more = {"dtype": compute_dtype(dtype), "nnz": nnz, "backend": backend}
            most = _estimate((batch, read), dim, kind="sjlt", **more)
        out = 400 * read + 2 * batch * read * size + most
    if is_sparse(x):
        # Indices and values in canonical form and, for a choice, of the columns that it reads; the sums of each thread.
        entries = x.values().numel() if isinstance(x, Tensor) else x.nnz
        return out + 3 * batch * dim + 150 * (entries + batch) + torch.get_num_threads() * (8 * dim + 2**12)
    if kind in CHOICES:
        return out
    converted = min(_CONVERTED, batch * min(columns, _COLUMNS) * size) if dtype.itemsize < size else 0
    if backend == "torch":
        rows = max(1, min(columns, ROWS_AT_ONCE // dim))
        return 2 * out + converted + rows * (dim + 128) * (_REFERENCE[kind] * 3 // 2 + size)
    dense = kind not in ("sjlt", "srht")
    # The cuts of csrc/cpu/sketch.cpp.
    most = 32 if dense else 8
    pieces = min(max(columns // 2048, 1), min(max(most * 512 // dim, 1), most))
    each, threads = 256 if dense else 32, torch.get_num_threads()
    rows = min(batch, max(4, min((1 << 20) // dim // pieces, each * (1 if dense else threads))))
    partial = pieces * rows * dim * 8
    together = min(rows if rows < 8 else rows + 15, each)
    split = threads if pieces > 1 or rows * columns * nnz >= 1 << 16 else 1
    # (Allocators keep the numbers of the slab before.)
    sums = threads * together * min(dim, 512) * 8 if dense else 2 * split * together * dim * size
    scratch = sums + threads * ((1 << 20) + 1024 * nnz)
    # The result is checked for numbers that are not finite: its absolute values and three masks.
    return (2 if converted else 1) * out + converted + scratch + max(partial, out + 3 * batch * dim)


@register_estimate("projection_matrix")
def _matrix_estimate(
    D: int,
    dim: int,
    *,
    kind: str = "rademacher",
    seed: int = 0,
    offset: int = 0,
    nnz: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> int:
    rows = as_integer(D, "D")
    if rows < 1:
        raise ValueError(f"D must be at least 1, got {rows}")
    dim, _, _, nnz = check_projection(rows, dim, kind, seed, offset, nnz)
    check_backend(backend)
    dtype = as_dtype(dtype)
    size = compute_dtype(dtype).itemsize
    made = rows * dim * ((_REFERENCE[kind] if backend == "torch" else 0) + size)
    return made + (rows * dim * dtype.itemsize if dtype.itemsize < size else 0) + (1 << 20)
