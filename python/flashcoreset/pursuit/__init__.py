"""Matching pursuit and Frank-Wolfe: arguments checked, the chosen kernel called, the result wrapped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.op import define_op
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import as_integer, as_matrix, as_vector, compute_dtype, is_traced
from flashcoreset.pursuit.backend import choose
from flashcoreset.pursuit.on_device import columns_kept
from flashcoreset.pursuit.problem import Problem, Pursuit, check_fit

__all__ = ["Pursuit", "frank_wolfe", "orthogonal_matching_pursuit"]


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
    problem = _check(g, target, k, backend, nonnegative, ridge)
    if is_traced(problem.g):
        return Pursuit(*_PURSUIT(problem.g, problem.target, problem.k, nonnegative, problem.ridge, backend))
    return _rounded(problem.g.dtype, solve_pursuit(problem, backend))


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
    problem = _check(g, target, k, backend)
    if is_traced(problem.g):
        return Pursuit(*_FRANK_WOLFE(problem.g, problem.target, problem.k, backend))
    return _rounded(problem.g.dtype, solve_frank_wolfe(problem, backend))


def _check(
    g: Any, target: Any, k: Any, backend: str | None, nonnegative: Any = True, ridge: Any = 0.0
) -> Problem:
    check_backend(backend)
    rows = as_matrix(g, "g")
    on = getattr(target, "device", None)
    if isinstance(on, torch.device) and on != rows.device:
        raise ValueError(f"target is on device {on}, but g is on {rows.device}; move one of them")
    b = as_vector(target, "target", rows.device, integers=False, length=rows.shape[1])
    k = as_integer(k, "k")
    if not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k must be between 1 and the number of rows of g, {rows.shape[0]}, got {k}")
    return Problem(rows, b, k, nonnegative, check_fit(nonnegative, ridge))


# The range of largest magnitudes of rows and target in which kernels take them.
_SAFE = (-399, 460)
_MOST_RIDGE = 2.0**900


def _converted(problem: Problem) -> Problem:
    """The problem for kernels, which take no half types."""
    dtype = compute_dtype(problem.g.dtype)
    return problem if problem.g.dtype == dtype else replace(problem, g=problem.g.to(dtype))


def solve_pursuit(problem: Problem, backend: str | None) -> Pursuit:
    """Matching pursuit by checked arguments; `g` may be of a half type, and weights and norms are float64."""
    kernels = choose(backend, problem.g.device)
    problem = _converted(problem)
    try:
        return kernels.orthogonal_matching_pursuit(problem)
    except ValueError:
        exponent = exponent_into(largest_magnitude(problem.g), _SAFE)
        of_target = exponent_into(largest_magnitude(problem.target), _SAFE)
        if exponent == of_target == 0:
            raise
        ridge = times_power(problem.ridge, 2 * exponent)
        if ridge > max(problem.ridge, _MOST_RIDGE):
            raise ValueError(
                f"ridge: {problem.ridge} is so far above the squares of g that no weights are left; lower it"
            ) from None
        g, target = scale(problem.g, exponent), scale(problem.target, of_target)
        found = kernels.orthogonal_matching_pursuit(replace(problem, g=g, target=target, ridge=ridge))
        weights = scale(found.weights, exponent - of_target)
        return Pursuit(found.indices, weights, scale(found.residual_norms, -of_target))


def solve_frank_wolfe(problem: Problem, backend: str | None) -> Pursuit:
    """Frank-Wolfe by checked arguments; `g` may be of a half type, and weights and norms are float64."""
    kernels = choose(backend, problem.g.device)
    problem = _converted(problem)
    try:
        return kernels.frank_wolfe(problem)
    except ValueError:
        # Only directions count, so each row is scaled by itself.
        exponents = [exponent_into(most, _SAFE) for most in problem.g.abs().amax(1).tolist()]
        of_target = exponent_into(largest_magnitude(problem.target), _SAFE)
        if not any(exponents) and of_target == 0:
            raise
        g, target = scale(problem.g, exponents), scale(problem.target, of_target)
        found = kernels.frank_wolfe(replace(problem, g=g, target=target))
        own = [exponents[row] - of_target for row in found.indices.tolist()]
        return Pursuit(found.indices, scale(found.weights, own), scale(found.residual_norms, -of_target))


def _rounded(dtype: torch.dtype, found: Pursuit) -> Pursuit:
    """The results in the type of rows of `dtype`; a pick whose weight rounds to 0 in that type is left out."""
    dtype, indices = compute_dtype(dtype), found.indices
    rounded, norms = found.weights.to(dtype), found.residual_norms.to(dtype)
    if not rounded.isfinite().all():
        most = float(found.weights.abs().max())
        raise ValueError(f"weights of up to {most:.3g} overflow {dtype}; scale g up or target down")
    if not norms.isfinite().all():
        most = float(found.residual_norms.max())
        raise ValueError(
            f"norms of what is left of target, of up to {most:.3g}, overflow {dtype}; scale g and target down"
        )
    if not rounded.all():
        indices, rounded = indices[rounded != 0], rounded[rounded != 0]
    return Pursuit(indices, rounded, norms)


def _padded(k: int, found: Pursuit) -> tuple[Tensor, Tensor, Tensor]:
    """The results at length k, since the shapes of an op's outputs must not depend on values."""
    return (
        _filled(found.indices, k, -1),
        _filled(found.weights, k, 0),
        _filled(found.residual_norms, k, -1),
    )


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
    problem = Problem(g, target, k, nonnegative, ridge)
    return _padded(k, _rounded(g.dtype, solve_pursuit(problem, backend)))


def _frank_wolfe_op(g: Tensor, target: Tensor, k: int, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    return _padded(k, _rounded(g.dtype, solve_frank_wolfe(Problem(g, target, k), backend)))


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
