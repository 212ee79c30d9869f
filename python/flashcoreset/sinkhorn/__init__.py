"""Batched entropic optimal transport: arguments checked, the chosen kernels called, gradients by the envelope
theorem."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.progress import check_progress
from flashcoreset._core.tensor import is_traced, one_of
from flashcoreset.sinkhorn.arguments import as_problem, as_rho, keep_graph
from flashcoreset.sinkhorn.backend import kernels_of
from flashcoreset.sinkhorn.divergence import Divergence
from flashcoreset.sinkhorn.ops import ProgressArgument, solve
from flashcoreset.sinkhorn.problem import METRICS, Problem, masked, totals
from flashcoreset.sinkhorn.transport import Transport

__all__ = [
    "METRICS",
    "Divergence",
    "Problem",
    "Transport",
    "self_transport",
    "sinkhorn",
    "sinkhorn_divergence",
]


def sinkhorn(
    x: Any,
    y: Any = None,
    a: Any = None,
    b: Any = None,
    *,
    reg: float,
    metric: str = "sqeuclidean",
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    x_lengths: Any = None,
    y_lengths: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    norm: str = "l1",
    warm_start: Any = None,
    backend: str | None = None,
    progress: Callable[[int, int], object] | bool | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Transport:
    """Entropic optimal transport: min over P of <P, C> + reg KL(P | a x b) with marginals a and b.

    Args:
        x: [n, d] points, or [B, n, d] for a batch of problems; with metric="precomputed" the costs C, [n, m] or
            [B, n, m], +inf for a pair that is forbidden: its entries of plans and gradients are 0. float16, bfloat16, float32 or float64
            (half types compute in float32); a torch tensor, a NumPy array or an object with `__dlpack__`.
        y: [m, d] or [B, m, d]; None with metric="precomputed". If the dtypes of `x` and `y` differ, both are promoted.
        a: [n] or [B, n] weights >= 0 of the rows, some of them > 0; default 1/n. b: [m] or [B, m], weights of the columns. If
            both marginals are balanced, their sums have to be the same; `b` is scaled to remove the difference that
            rounding leaves between them. Costs [n, m] with weights [B, n] or [B, m] (or both; the other may have no batch
            dimension) are the costs of B problems, and are read once for all of them.
        reg: the weight of the entropy, > 0, in the units of the cost. The iterations are stable down to 1e-4 of the largest cost.
        metric: C_ij = |x_i - y_j|^2 ("sqeuclidean"), |x_i - y_j| ("euclidean"), sum_k |x_ik - y_jk| ("l1"),
            1 - cos(x_i, y_j) ("cosine"; 1 for a zero row), or given ("precomputed").
        reg_marginal: None for balanced transport. A number rho > 0 relaxes both marginals to a penalty
            rho KL(P 1 | a) + rho KL(P^T 1 | b); a pair (rho_a, rho_b) relaxes each on its own, None for a marginal that holds,
            as a marginal does from 1e12 times costs and reg on.
        x_lengths, y_lengths: [B] integers, the sizes of the problems of a batch in x and y; what lies beyond them (the
            padding, which may be NaN) is not read and costs no work.
        max_iter: the most iterations that one problem takes.
        tol: a problem stops when its `Transport.error`, a distance of marginals, is at most `tol`, but no larger a
            share of the plan's mass (if both marginals are relaxed, of the larger mass of a and b) than `tol` or 1e-6. 0 makes exactly
            `max_iter` iterations, plain ones if reg is at least 1/500 of the costs' range, without a warning.
        norm: what that distance is: the sum of |P 1 - a| over the rows and |P^T 1 - b| over the columns ("l1"), or the sum of these two
            vectors' Euclidean norms ("l2"), at most the former, on n points down to 1 / sqrt(n) of it. The same `tol` takes
            fewer iterations with "l2".
        warm_start: a `Transport` of problems of the same sizes, or potentials (f, g), to start from: at most 1e9 times the
            costs or reg. If iterations from there come to a standstill, they are annealed after all.
        backend: None (the fastest that can run), "cpu", "cuda", "triton" or "torch" (the reference).
        progress: None, True (a bar on stderr) or a callable(done, total), in iterations.
        memory_budget: bytes that a matrix [n, m] of one problem may take; a larger matrix is made anew, a block at a time,
            in each iteration.

    Returns:
        A `Transport`.

    Warns:
        ConvergenceWarning: once per call, if a problem did not reach `tol` in `max_iter` iterations, or if its error came to rest
            above a `tol` that is below the rounding of the dtype (about 1e-6 of the mass in float32, 1e-14 in float64); what is returned
            is its last iterate, which a plain iteration made and which is therefore the best.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape or option, negative weights or all zero, sums that differ, NaN and infinity (but for forbidden
            pairs), rows or columns with weight all of whose pairs are forbidden; for a batch the message names the number of the
            problem.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Cuturi, "Sinkhorn distances", 2013; Chizat et al., "Scaling algorithms for unbalanced optimal transport
    problems", 2018. Iterations with tol > 0 are over-relaxed (Thibault et al., 2021), iterations of relaxed marginals are
    translation invariant (Sejourne et al., 2022), and if reg is small, iterations start from a larger one (docs/sinkhorn.md).

    Example:
        >>> import torch, flashcoreset as fc
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
        >>> transport = fc.sinkhorn(x, y, reg=0.05)
        >>> transport.plan().sum(1), bool(transport.converged)
        (tensor([0.5000, 0.5000]), True)
    """
    problem = as_problem(
        x, y, a, b, reg, metric, reg_marginal, x_lengths, y_lengths, max_iter, tol, norm, warm_start, backend,
        memory_budget,
    )  # fmt: skip
    check_progress(progress)
    return _transport(problem, progress)


@overload
def sinkhorn_divergence(
    x: Any,
    y: Any,
    a: Any = None,
    b: Any = None,
    *,
    reg: float,
    metric: str = "sqeuclidean",
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    x_lengths: Any = None,
    y_lengths: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    norm: str = "l1",
    warm_start: Any = None,
    full_output: Literal[False] = False,
    backend: str | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor: ...


@overload
def sinkhorn_divergence(
    x: Any,
    y: Any,
    a: Any = None,
    b: Any = None,
    *,
    reg: float,
    metric: str = "sqeuclidean",
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    x_lengths: Any = None,
    y_lengths: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    norm: str = "l1",
    warm_start: Any = None,
    full_output: Literal[True],
    backend: str | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Divergence: ...


def sinkhorn_divergence(
    x: Any,
    y: Any,
    a: Any = None,
    b: Any = None,
    *,
    reg: float,
    metric: str = "sqeuclidean",
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    x_lengths: Any = None,
    y_lengths: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    norm: str = "l1",
    warm_start: Any = None,
    full_output: bool = False,
    backend: str | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor | Divergence:
    """The debiased divergence OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + reg (sum a - sum b)^2 / 2, with OT the `value` of
    `sinkhorn`: 0 for x = y, positive otherwise.

    The arguments are those of `sinkhorn`; costs cannot be given, and a pair `reg_marginal` needs two equal numbers, since each
    side takes both places. The transports of a set to itself are made by symmetric iterations, f <- (f + T(f)) / 2, about twenty
    for any reg.

    Args:
        warm_start: a `Divergence` of sets of the same sizes, for all three transports; or what `sinkhorn` takes, for the one from x to y.
        full_output: whether a `Divergence` is returned, which has the potentials, errors and iterations too.

    Returns:
        A scalar, or [B] for a batch, differentiable in x, y, a and b; with `full_output` a `Divergence` whose `value` that is.

    Warns:
        ConvergenceWarning: for each of the three transports that did not reach `tol`.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as `sinkhorn`.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", 2019; Sejourne
    et al., "Sinkhorn divergences for unbalanced optimal transport", 2019.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(float(fc.sinkhorn_divergence(x, x + 2, reg=0.5)), 4)
        4.0
    """
    one_of(metric, "metric", METRICS)
    if metric == "precomputed":
        raise ValueError("metric must be one of points for a divergence, got 'precomputed'")
    rho = as_rho(reg_marginal)
    if rho[0] != rho[1]:
        raise ValueError(
            f"reg_marginal must be the same for both marginals of a divergence, got {reg_marginal}"
        )

    if not isinstance(full_output, bool):
        raise TypeError(f"full_output must be True or False, got {type(full_output).__name__}")
    starts: tuple[Any, ...] = (warm_start, None, None)
    if isinstance(warm_start, Divergence):
        starts = (warm_start.cross, warm_start.of_x, warm_start.of_y)
    options = (reg, metric, reg_marginal)
    limits = (max_iter, tol, norm, backend, memory_budget)
    cross = as_problem(
        x, y, a, b, *options, x_lengths, y_lengths, max_iter, tol, norm, starts[0], backend, memory_budget
    )
    if cross.x.dtype == torch.float64:  # if one of them is, both are in all three problems
        x, y = keep_graph(x, "x").double(), keep_graph(y, "y").double()
    own = [
        _self_problem(points, weights, lengths, options, start, limits)
        for points, weights, lengths, start in ((x, a, x_lengths, starts[1]), (y, b, y_lengths, starts[2]))
    ]
    parts = [_transport(problem, None) for problem in (cross, *own)]
    result = parts[0].value - 0.5 * (parts[1].value + parts[2].value)
    if not math.isinf(rho[0]) and cross.weighted:
        left, right = (
            1.0 if given is None else totals(masked(weights, lengths)).to(result.dtype)
            for given, (_, weights, _, lengths) in zip((a, b), cross.sides, strict=True)
        )
        extra: Any = 0.5 * cross.reg * (left - right) ** 2
        result = result + cross.shaped(extra)
    return Divergence(result, *parts) if full_output else result


def self_transport(
    x: Any,
    a: Any = None,
    *,
    reg: float,
    metric: str = "sqeuclidean",
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    x_lengths: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    norm: str = "l1",
    warm_start: Any = None,
    backend: str | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Transport:
    """`sinkhorn(x, x, a, a)` by symmetric iterations, whose potentials are the same: f = g. Arguments as there, but no costs."""
    limits = (max_iter, tol, norm, backend, memory_budget)
    return _transport(_self_problem(x, a, x_lengths, (reg, metric, reg_marginal), warm_start, limits), None)


def _self_problem(
    x: Any, a: Any, lengths: Any, options: tuple[Any, ...], start: Any, limits: tuple[Any, ...]
) -> Problem:
    """The transport of a set to itself; `options` are reg, the metric and reg_marginal, `limits` what follows warm_start beside it."""
    (reg, metric, rho), (max_iter, tol, norm, backend, budget) = options, limits
    problem = as_problem(
        x, x, a, a, reg, metric, rho, lengths, lengths, max_iter, tol, norm, start, backend, budget
    )  # fmt: skip
    return replace(problem, symmetric=True, g=problem.f)


def _transport(p: Problem, progress: ProgressArgument) -> Transport:
    found, dtype = solve(p, progress), p.x.dtype
    f, g, cost, error = _converted((found.f, found.g, found.transport_cost, found.error), dtype)
    return Transport(
        p.shaped(f), p.shaped(g), p.shaped(found.value.to(dtype)), p.shaped(cost), p.shaped(error),
        p.shaped(found.iterations), p.shaped(found.converged), p.at(found.f, found.g),
    )  # fmt: skip


def _converted(numbers: tuple[Tensor, ...], dtype: torch.dtype) -> Sequence[Tensor]:
    """Tensors of float64 in another type. Few numbers are converted together: each conversion takes as long as thousands of them."""
    if dtype == torch.float64:
        return numbers
    sizes = [tensor.numel() for tensor in numbers]
    if is_traced(*numbers) or sum(sizes) > 4_096:
        return [tensor.to(dtype) for tensor in numbers]
    parts = torch.cat([tensor.reshape(-1) for tensor in numbers]).to(dtype).split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, numbers, strict=True)]


_CALL = inspect.signature(sinkhorn)


def _estimate(*shapes: Any, dtype: Any = torch.float32, **options: Any) -> int:
    """The bytes of one call; see `memory_estimate`."""
    call = _CALL.bind(*shapes, **{"reg": 1.0} | options)
    arguments = dict.fromkeys(("x_lengths", "y_lengths", "warm_start"))
    one_of(call.arguments.get("metric", "sqeuclidean"), "metric", METRICS)
    shaped, given = as_dtype(dtype), {name: call.arguments.get(name) for name in ("x", "y", "a", "b")}
    for name, value in given.items():
        if value is not None:
            shape = as_shape(value, name, len(getattr(value, "shape", value)))
            given[name] = torch.empty(shape, dtype=shaped if name in "xy" else torch.float64, device="meta")
    call.arguments |= arguments | given
    call.apply_defaults()
    call.arguments.pop("progress")
    p = as_problem(**call.arguments)
    batch, n, m = p.sizes
    outputs = batch * (n + m) * (8 * 3 + p.x.element_size())
    converted = 0
    if shaped.itemsize < p.x.element_size():
        converted = sum(t.numel() * t.element_size() for t in (p.x, p.y) if t is not None) + 2**22
    return outputs + converted + kernels_of(p.backend or "cpu").workspace(p)


_estimate.__signature__ = _CALL.replace(  # type: ignore[attr-defined]
    parameters=[
        *(q.replace(default=1.0) if q.name == "reg" else q for q in _CALL.parameters.values()),
        inspect.Parameter("dtype", inspect.Parameter.KEYWORD_ONLY, default=torch.float32),
    ]
)
register_estimate("sinkhorn")(_estimate)
