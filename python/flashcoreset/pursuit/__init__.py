"""Matching pursuit and Frank-Wolfe: arguments checked, the chosen kernel called, the result wrapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.op import define_op
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import as_integer, as_matrix, as_number, as_vector, compute_dtype, is_traced
from flashcoreset.pursuit.backend import choose
from flashcoreset.pursuit.on_device import columns_kept


@dataclass(frozen=True, eq=False)
class Pursuit:
    """Rows whose weighted sum is close to a target.

    Attributes:
        indices: [r] int64, the rows, distinct, in pick order; r <= k.
        weights: [r], none of them 0.
        residual_norms: [s], |target - sum_i w_i g_i| after each of the s <= k steps.

    Inside a function given to torch.compile all three have k entries: -1, 0 and -1 in places without a row or step.

    Example:
        >>> import torch
        >>> from flashcoreset.pursuit import orthogonal_matching_pursuit
        >>> found = orthogonal_matching_pursuit(torch.eye(3), torch.tensor([1.0, 3.0, -2.0]), 3)
        >>> found.indices.tolist(), found.weights.tolist()
        ([1, 0], [3.0, 1.0])
    """

    indices: Tensor
    weights: Tensor
    residual_norms: Tensor


def orthogonal_matching_pursuit(
    g: Any,
    target: Any,
    k: int,
    *,
    nonnegative: bool = True,
    ridge: float = 0.0,
    backend: str | None = None,
) -> Pursuit:
    """Up to k rows of `g` and weights w that make |sum_i w_i g_i - target|^2 + ridge |w|^2 small, greedily.

    A step picks the row of the largest inner product with the residual target - sum_i w_i g_i (of the largest
    magnitude, unless `nonnegative`), ties to the lowest index, and fits the weights of all picks anew, exactly. No row
    is picked twice. A pick whose weight becomes 0 stays a pick: a later fit may give it weight again, and picks that
    have weight 0 in the end are left out of the result, which then has fewer than k rows. The result also has fewer rows if the run
    ends early because no row correlates with the residual (positively, if `nonnegative`) by more than rounding, for
    example when the residual has vanished. A row that depends on those in use (its squared distance from their span at most
    1e-10 of its square) is passed over.

    Args:
        g: [B, D] float16, bfloat16, float32 or float64. All sums are in float64.
        target: [D], on the device of `g`: the sum of all rows, for a coreset.
        k: the most picks, 1 to B.
        nonnegative: whether weights must be >= 0.
        ridge: >= 0, in units of the squares of `g`.
        backend: None or a name.

    Returns:
        Pursuit; weights and norms are float64 for float64 rows, else float32.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, k or ridge out of range, NaN and infinity, weights that overflow.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Killamsetty, Sivasubramanian, Ramakrishnan, De and Iyer, "GRAD-MATCH: gradient matching based data subset
    selection for efficient deep model training", ICML 2021, algorithm 2; Rubinstein, Zibulevsky and Elad, "Efficient
    implementation of the K-SVD algorithm using batch orthogonal matching pursuit", 2008.

    Example:
        >>> import torch
        >>> from flashcoreset.pursuit import orthogonal_matching_pursuit
        >>> g = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
        >>> found = orthogonal_matching_pursuit(g, g.sum(0), 10)
        >>> bool((g[found.indices].T @ found.weights - g.sum(0)).norm() < 0.5 * g.sum(0).norm())
        True
    """
    rows, b, k = _check(g, target, k, backend)
    if not isinstance(nonnegative, bool):
        raise TypeError(
            f"nonnegative must be a bool, got {nonnegative!r} of type {type(nonnegative).__name__}"
        )
    ridge = as_number(ridge, "ridge")
    if ridge < 0:
        raise ValueError(f"ridge must be >= 0, got {ridge}")
    if is_traced(rows):
        return Pursuit(*_PURSUIT(rows, b, k, nonnegative, ridge, backend))
    return Pursuit(*_rounded(rows.dtype, *solve_pursuit(rows, b, k, nonnegative, ridge, backend)))


def frank_wolfe(g: Any, target: Any, k: int, *, backend: str | None = None) -> Pursuit:
    """Rows of `g` and weights > 0 whose sum is close to `target`, by k steps of greedy iterative geodesic ascent.

    A step turns the direction of the weighted sum towards the row whose geodesic from it points most nearly at the
    target (ties to the lowest index; the row may have been picked before), as far as brings the direction nearest to the
    target; in the end all weights are scaled by the best common factor. The run ends early when no row leads nearer by more than
    rounding; rows within 1e-4 radians of the direction are not considered.

    Args:
        g: [B, D] float16, bfloat16, float32 or float64. All sums are in float64.
        target: [D], on the device of `g`: the sum of all rows, for a coreset.
        k: the number of steps, and the most rows, 1 to B.
        backend: None or a name.

    Returns:
        Pursuit, rows in the order of their first pick; weights and norms are float64 for float64 rows, else float32.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, k out of range, NaN and infinity, weights that overflow.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Campbell and Broderick, "Bayesian coreset construction via greedy iterative geodesic ascent", ICML 2018,
    algorithm 1.

    Example:
        >>> import torch
        >>> from flashcoreset.pursuit import frank_wolfe
        >>> found = frank_wolfe(torch.eye(3, dtype=torch.float64), torch.tensor([1.0, 3.0, -2.0]), 2)
        >>> found.indices.tolist(), [round(weight, 6) for weight in found.weights.tolist()]
        ([1, 0], [3.0, 1.0])
    """
    rows, b, k = _check(g, target, k, backend)
    if is_traced(rows):
        return Pursuit(*_FRANK_WOLFE(rows, b, k, backend))
    return Pursuit(*_rounded(rows.dtype, *solve_frank_wolfe(rows, b, k, backend)))


def _check(g: Any, target: Any, k: int, backend: str | None) -> tuple[Tensor, Tensor, int]:
    check_backend(backend)
    rows = as_matrix(g, "g")
    on = getattr(target, "device", None)
    if isinstance(on, torch.device) and on != rows.device:
        raise ValueError(f"target is on device {on}, but g is on {rows.device}; move one of them")
    b = as_vector(target, "target", rows.device, integers=False, length=rows.shape[1])
    k = as_integer(k, "k")
    if not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k must be between 1 and the number of rows of g, {rows.shape[0]}, got {k}")
    return rows, b, k


# The range of largest magnitudes of rows and target in which kernels take them.
_SAFE = (-399, 460)
_MOST_RIDGE = 2.0**900

_Found = tuple[Tensor, Tensor, Tensor]


def solve_pursuit(
    g: Tensor, target: Tensor, k: int, nonnegative: bool, ridge: float, backend: str | None
) -> _Found:
    """Indices, and weights and residual norms in float64, for arguments that were checked."""
    kernels = choose(backend, g.device)
    rows = g.to(compute_dtype(g.dtype))

    def solve(rows: Tensor, target: Tensor, exponent: int = 0) -> _Found:
        by = times_power(ridge, 2 * exponent)
        if by > max(ridge, _MOST_RIDGE):
            raise ValueError(
                f"ridge: {ridge} is so far above the squares of g that no weights are left; lower it"
            )
        return kernels.orthogonal_matching_pursuit(rows, target, k, nonnegative=nonnegative, ridge=by)

    try:
        found = solve(rows, target)
    except ValueError:
        exponent = exponent_into(largest_magnitude(rows), _SAFE)
        of_target = exponent_into(largest_magnitude(target), _SAFE)
        if exponent == of_target == 0:
            raise
        indices, weights, norms = solve(scale(rows, exponent), scale(target, of_target), exponent)
        found = indices, scale(weights, exponent - of_target), scale(norms, -of_target)
    return found


def solve_frank_wolfe(g: Tensor, target: Tensor, k: int, backend: str | None) -> _Found:
    """Indices, and weights and residual norms in float64, for arguments that were checked."""
    kernels = choose(backend, g.device)
    rows = g.to(compute_dtype(g.dtype))
    try:
        found = kernels.frank_wolfe(rows, target, k)
    except ValueError:
        # Only directions count, so each row is scaled by itself.
        exponents = [exponent_into(most, _SAFE) for most in rows.abs().amax(1).tolist()]
        of_target = exponent_into(largest_magnitude(target), _SAFE)
        if not any(exponents) and of_target == 0:
            raise
        indices, weights, norms = kernels.frank_wolfe(scale(rows, exponents), scale(target, of_target), k)
        own = [exponents[row] - of_target for row in indices.tolist()]
        found = indices, scale(weights, own), scale(norms, -of_target)
    return found


def _rounded(
    dtype: torch.dtype, indices: Tensor, weights: Tensor, residual_norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The results in the type of rows of `dtype`; a pick whose weight rounds to 0 in that type is left out."""
    dtype = compute_dtype(dtype)
    rounded, norms = weights.to(dtype), residual_norms.to(dtype)
    if not rounded.isfinite().all():
        most = float(weights.abs().max())
        raise ValueError(f"weights of up to {most:.3g} overflow {dtype}; scale g up or target down")
    if not norms.isfinite().all():
        most = float(residual_norms.max())
        raise ValueError(
            f"norms of what is left of target, of up to {most:.3g}, overflow {dtype}; scale g and target down"
        )
    if not rounded.all():
        indices, rounded = indices[rounded != 0], rounded[rounded != 0]
    return indices, rounded, norms


def _padded(k: int, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The results at length k, since the shapes of an op's outputs must not depend on values."""
    indices, weights, residual_norms = found
    return _filled(indices, k, -1), _filled(weights, k, 0), _filled(residual_norms, k, -1)


def _filled(values: Tensor, k: int, fill: float) -> Tensor:
    result = values.new_full((k,), fill)
    result[: len(values)] = values
    return result


def pursuit_bytes(b: int, d: int, k: int, dtype: torch.dtype, orthogonal: bool, backend: str | None) -> int:
    """An upper bound of what a call with rows [b, d] of `dtype`, float32 or float64, allocates."""
    results = 72 * k + 32 * b
    if backend == "torch":
        # The rows in float64, unit rows for Frank-Wolfe, products of all rows with one vector; the rows of the picks for a fit.
        return results + 8 * b * d * 3 + (40 * (d + k) * k if orthogonal else 0)
    fit = 24 * k * k if orthogonal else 0  # the picks' products, and their factor
    if backend in ("cuda", "triton"):
        columns = 8 * b * columns_kept(b, k, DEFAULT_MEMORY_BUDGET, orthogonal=orthogonal)
        # For few long rows, the products' sums over pieces of the rows.
        pieces = 96 * b * -(-d // 4096) if d > 4096 and b < 8192 else 0
        vectors = 64 * b + 16 * d if orthogonal else 152 * b + 40 * d
        return results + columns + pieces + fit + vectors + 2**20
    # Columns of the Gram matrix, a dozen at a time; at least one of the dozen is for a pick.
    columns = 8 * b * min(b, 12 * k, max(DEFAULT_MEMORY_BUDGET // (8 * b), 1))
    return results + columns + fit + 64 * b + 16 * d + 2**20


# The torch ops, which torch.compile and fake tensors see.


def _pursuit_op(
    g: Tensor, target: Tensor, k: int, nonnegative: bool, ridge: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _padded(k, _rounded(g.dtype, *solve_pursuit(g, target, k, nonnegative, ridge, backend)))


def _frank_wolfe_op(g: Tensor, target: Tensor, k: int, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    return _padded(k, _rounded(g.dtype, *solve_frank_wolfe(g, target, k, backend)))


def _fake_pursuit(
    g: Tensor, target: Tensor, k: int, nonnegative: bool, ridge: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(g.dtype)
    return (
        g.new_empty(k, dtype=torch.int64),
        g.new_empty(k, dtype=dtype),
        g.new_empty(k, dtype=dtype),
    )


def _fake_frank_wolfe(
    g: Tensor, target: Tensor, k: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_pursuit(g, target, k, True, 0.0, backend)


_RESULTS = ("indices", "weights", "residual_norms")
_PURSUIT = define_op("orthogonal_matching_pursuit", _pursuit_op, _fake_pursuit, _RESULTS)
_FRANK_WOLFE = define_op("frank_wolfe", _frank_wolfe_op, _fake_frank_wolfe, _RESULTS)
