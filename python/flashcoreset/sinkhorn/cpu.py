"""Batches of entropic optimal transport, by the compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule, optional_capsule
from flashcoreset.pairwise.cpu import pairwise
from flashcoreset.sinkhorn.schedule import Solution

__all__ = ["TAKES", "pairwise", "sinkhorn", "sinkhorn_apply", "sinkhorn_plan"]

TAKES = Takes()


def _batch(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    metric: str,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
) -> tuple[Any, ...]:
    """The first arguments of every call of the compiled module."""
    points = None if y is None else y.detach()
    lengths = (optional_capsule(x_lengths), optional_capsule(y_lengths))
    return capsule(x.detach()), optional_capsule(points), capsule(a), capsule(b), metric, *lengths


def sinkhorn(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    metric: str,
    reg_marginal: tuple[float, float] = (math.inf, math.inf),
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    f: Tensor | None = None,
    g: Tensor | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    report: Callable[[int, int], None] | None = None,
) -> Solution:
    """Solves a batch of entropic optimal transport problems; see `flashcoreset.sinkhorn.reference` for the
    definition.

    Args:
        x: [B, n, d] points with `y` [B, m, d], or the costs [B, n, m] with `y` None and metric "precomputed"; float32
            or float64, on the CPU.
        a: [B, n] float64, and b [B, m]: weights >= 0, of equal sums if both marginals are balanced.
        reg, reg_marginal: eps and (rho_a, rho_b); inf for a balanced marginal.
        metric: "sqeuclidean", "euclidean", "l1", "cosine" or "precomputed".
        x_lengths, y_lengths: [B] int64, the sizes of the problems; None for n and m.
        max_iter, tol: the most iterations and the error to stop at.
        f, g: [B, n] and [B, m] float64 to start from; None starts from 0.
        memory_budget: bytes that the kernel matrix of a problem may take; the rows of a larger one are made anew each time.
        report: called with the number of iterations done and their largest possible number.

    Returns:
        The potentials and, for each problem, value, transport cost, error, iterations and whether it converged.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity in `x` or `y`, and arrays that do not fit each other.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> cost, half = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.full((1, 2), 0.5, dtype=torch.float64)
        >>> found = kernels.cpu.sinkhorn(cost, None, half, half, reg=0.1, metric="precomputed")
        >>> round(found.transport_cost.item(), 6)
        4.5e-05
    """
    warm = f is not None and g is not None
    f = torch.zeros_like(a) if f is None or not warm else f.clone()
    g = torch.zeros_like(b) if g is None or not warm else g.clone()
    batch = a.shape[0]
    scalars = torch.empty(4, batch, dtype=torch.float64)
    iterations = torch.empty(batch, dtype=torch.int64)
    run = native.module().Sinkhorn(
        *_batch(x, y, a, b, metric, x_lengths, y_lengths),
        reg,
        *reg_marginal,
        max_iter,
        tol,
        warm,
        memory_budget,
        torch.get_num_threads(),
        capsule(f),
        capsule(g),
        capsule(scalars),
        capsule(iterations),
    )
    total = run.total()
    part = total if report is None else max(1, total // 1000)
    done = 0
    while done < total:
        done = run.step(part)
        if report is not None:
            report(done, total)
    value, transport_cost, error, tolerance = scalars
    return Solution(f, g, value, transport_cost, error, iterations, error <= tolerance)


def sinkhorn_apply(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    *,
    reg: float,
    metric: str,
    transpose: bool = False,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """The products P v [B, n, k] of the plans with potentials f, g for v [B, m, k] of the dtype of `x`; with `transpose` P^T v
    [B, m, k] for v [B, n, k]. The plan is made 24 rows at a time, whatever the `memory_budget`.

    Rows beyond a problem's size are 0. The other arguments and the errors are those of `sinkhorn`.
    """
    out = x.new_zeros(a.shape[0], (b if transpose else a).shape[1], v.shape[2])
    native.module().sinkhorn_apply(
        *_batch(x, y, a, b, metric, x_lengths, y_lengths),
        capsule(f),
        capsule(g),
        reg,
        capsule(v.detach()),
        transpose,
        capsule(out),
        torch.get_num_threads(),
    )
    return out


def sinkhorn_plan(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    *,
    reg: float,
    metric: str,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
) -> Tensor:
    """The plans P [B, n, m], of the dtype of `x`, with potentials f, g; 0 beyond a problem's size. Arguments and
    errors are those of `sinkhorn`."""
    out = x.new_empty(a.shape[0], a.shape[1], b.shape[1])
    native.module().sinkhorn_plan(
        *_batch(x, y, a, b, metric, x_lengths, y_lengths),
        capsule(f),
        capsule(g),
        reg,
        capsule(out),
        torch.get_num_threads(),
    )
    return out
