"""Carathéodory reduction: arguments checked, the chosen kernel called, the subset wrapped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.memory import as_shape, register_estimate
from flashcoreset._core.op import define_op
from flashcoreset._core.results import Selection
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale
from flashcoreset._core.tensor import (
    as_int64,
    as_matrix,
    as_vector,
    check_not_meta,
    check_weights,
    compute_dtype,
    is_traced,
)
from flashcoreset.caratheodory import on_device as driver
from flashcoreset.caratheodory.backend import choose
from flashcoreset.caratheodory.problem import Problem

# Sums over many rows may overflow for numbers above this.
_HUGE = 2.0**900


def caratheodory(
    x: Any, weights: Any = None, max_size: int | None = None, *, backend: str | None = None
) -> Selection:
    """A weighted subset of at most d + 1 rows with the weighted mean and the total weight of all rows.

    The number of rows is at most rank + 1, where rank is that of the rows less their mean. Everything is computed in float64,
    and the sums are kept to about 1e-15 of the sums of magnitudes; float32 weights round the sums to 6e-8, so pass
    `x.double()` if that matters. Columns may be of very different size and far from 0. Which rows are taken depends on
    the backend; the sums do not.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64.
        weights: [n] real numbers >= 0, not all 0; None for 1. Rows with weight 0 are not taken.
        max_size: end the reduction as soon as at most this many rows are left, >= 1. Beyond d + 1 the weights are as
            even as possible: no weight is, except for rounding, above its old value or the total / (max_size - d - 1), whichever is
            larger, and at most 2 (d + 1) weights are changed to something else than the latter; the rows are a random sample (from
            fixed numbers) that is balanced on the columns. None goes on to the end. `max_size` may be below d + 1 if the rank allows it.
        backend: None, "cpu", "cuda", "triton" or "torch". "cuda" and "triton" leave what is small and sequential to the
            compiled CPU module: the reduction of sums of runs, and all steps with a `max_size`, for which rows are copied to the host
            in pieces.

    Returns:
        Selection: `indices` [k] ascending, `weights` [k] > 0, float64 for float64, else float32. A row stands for no particular
        rows: `gains` are 0, `assignment` [n] is -1, and `objective` 0.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN or infinity, negative weights, weights that are all 0, and a `max_size` below
            the number of rows that are left when no further reduction is possible (the message names this number).
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Maalouf, Jubran and Feldman, "Fast and accurate least-mean-squares solvers", NeurIPS 2019;
    for `max_size` Deville and Tillé, "Efficient balanced sampling: the cube method", Biometrika 91, 2004.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> subset = fc.caratheodory(x)
        >>> len(subset.indices), round(float(subset.weights.sum()), 9)
        (4, 1000.0)
        >>> torch.allclose(subset.weights @ x[subset.indices], x.sum(0))
        True
    """
    check_backend(backend)
    points = as_matrix(x, "x")
    n = points.shape[0]
    if weights is not None:
        weights = as_vector(weights, "weights", points.device, integers=False, length=n)
    limit = 0
    if max_size is not None:
        limit = as_int64(max_size, "max_size")
        if limit < 1:
            raise ValueError(f"max_size must be >= 1, got {limit}")
    if is_traced(points):
        check_not_meta(points, "x")
        indices, new_weights = _CARATHEODORY(points, weights, limit, backend)
    else:
        indices, new_weights = _solve(points, weights, limit, backend)
    return Selection(
        indices=indices,
        gains=torch.zeros_like(new_weights),
        weights=new_weights,
        # One number n times: filling n would take torch's threads.
        assignment=torch.full((1,), -1, dtype=torch.int64, device=points.device).expand(n),
        objective=0.0,
        offset=None,
    )


def _solve(x: Tensor, weights: Tensor | None, max_size: int, backend: str | None) -> tuple[Tensor, Tensor]:
    """The rows [k] that are taken and their weights [k]."""
    kernels, x = choose(backend, x.device), x.detach()
    dtype = compute_dtype(x.dtype)
    if weights is not None:
        check_weights(weights, dtype)
        if not weights.any():
            raise ValueError(f"weights must not all be 0, got {len(weights)} zeros")
    indices, new_weights = kernels.caratheodory(Problem(x, weights, max_size))
    if dtype == torch.float64 and largest_magnitude(x.index_select(0, indices)) > _HUGE:
        # The kernels shrink all columns if one is huge, and tiny numbers are then lost: scaling each column by itself keeps all.
        exponents = [exponent_into(most, (-400, 400)) for most in x.abs().amax(0).tolist()]
        scaled = Problem(scale(x.T, exponents).T, weights, max_size)
        indices, new_weights = kernels.caratheodory(scaled)
    if 0 < max_size < len(indices):
        raise ValueError(
            f"max_size must be >= {len(indices)}, to which these rows can be reduced (rank + 1), got {max_size}"
        )
    new_weights = new_weights.to(dtype)
    # A positive float64 weight may be 0 in float32; such a weight becomes the least number above 0.
    least = 2.0**-1074 if dtype == torch.float64 else 2.0**-149
    return indices, torch.where(new_weights > 0, new_weights, least)


@register_estimate("caratheodory")
def _estimate(
    x: Any,
    weights: Any = None,
    max_size: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> int:
    """The bytes of one call; see `memory_estimate`."""
    check_backend(backend)
    n, d = as_shape(x, "x")
    dim = d + 1
    # Rows and weights, in lists that grow if some rows may be left out.
    rows = (40 if weights is not None else 16) * n + 48 * min(n, max(dim, max_size or 0))
    if backend == "torch":
        # Vectors of the rows in float64, and as many numbers again for their sums; a null vector's factorisation.
        return rows + 8 * n * dim * 3 + 8 * 6 * (dim + 1) ** 2 + 8 * n * d + 2**21
    columns = 0
    on_device = backend in ("cuda", "triton") and n * d > driver.FEW
    if dim > 2 * n:  # the n columns of a triangle stand for the d columns
        columns = 8 * n * n * 18 + 256 * n * torch.get_num_threads()
        if on_device:
            columns = 8 * n * (4 * min(d, max(2 * n, driver.QR_NUMBERS // n)) + 8 * n)
        dim = n + 1
    runs = min(n, (2 if dim > 64 else 4) * dim)
    if on_device:
        # On the device and on the host: the rows that rounds leave, or the weights of all; sums of pieces and of runs; the rows
        # that are left in the end, or pieces of all rows.
        rows = (17 if weights is not None else 0) * n + 48 * min(n, max(dim, max_size or 0))
        rows += 8 * n if max_size is not None else 16 * n * (3 if dim > 64 else 1) // (4 if dim > 64 else 3)
        rest = max(runs * min(d, dim), driver.FEW) * (compute_dtype(dtype).itemsize + 2)
        columns += 8 * (min(n // 256, 2**13) + 2 * runs) * dim
        columns += 2 * max(rest, 0 if max_size is None else driver.PIECE_BYTES)
    return rows + columns + 2 * 8 * runs * dim + 2**20


# The torch op, which torch.compile and fake tensors see.


def _fake(x: Tensor, weights: Tensor | None, max_size: int, backend: str | None) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(count, dtype=torch.int64), x.new_empty(count, dtype=compute_dtype(x.dtype))


_CARATHEODORY = define_op("caratheodory", _solve, _fake, ("indices", "weights"))
