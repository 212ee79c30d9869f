"""Gradients of the value of entropic optimal transport, by the envelope theorem: at the optimal potentials the value
changes with its arguments as the dual objective does, the potentials held.

    d value / d C_ij = P_ij
    d value / d a_i  = f_i - reg (1 - sum b),    rho (1 - exp(-f_i / rho)) - reg (exp(-f_i / rho) - sum b) if relaxed

The gradients with respect to the points follow through the costs, without P if the metric allows it:

    sqeuclidean   2 (r_i x_i - (P y)_i), with r = P 1
    euclidean     the same with P_ij / (2 |x_i - y_j|) in the place of P_ij, 0 where points coincide
    l1            sum_j P_ij sign(x_i - y_j), feature by feature
    cosine        -(P yn)_i less its part along xn_i, over |x_i|, with rows xn, yn of unit length; 0 for a zero row
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset.sinkhorn.backend import Kernels
from flashcoreset.sinkhorn.problem import Problem, masked

# Blocks of rows of a plan take about this many bytes.
_BLOCK_BYTES = 2**24


def weight_gradients(
    potential: Tensor, rho: float, reg: float, other_weights: Tensor, of_value: Tensor
) -> Tensor:
    """The gradient [B, n]: of_value [B] times d value / d a, from f [B, n] and b [B, m]."""
    other_mass = other_weights.sum(1, keepdim=True)
    if math.isinf(rho):
        slope = potential - reg * (1 - other_mass)
    else:
        less = torch.expm1(-potential / rho)  # keeps its digits if rho is large
        slope = -rho * less - reg * (1 + less - other_mass)
    return of_value[:, None] * slope


def cost_gradients(
    kernels: Kernels, problem: Problem, of_value: Tensor, needs_y: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients, times of_value [B], with respect to the costs, or to both sets of points, of a problem with potentials."""
    x, y, (f, g) = problem.x, problem.y, problem.potentials()
    scale = of_value.to(x.dtype)[:, None, None]
    if y is None:
        if len(x) == len(f):
            return kernels.sinkhorn_plan(problem).to(x.dtype).mul_(scale), None
        total = torch.zeros_like(x)  # of costs that problems share, one plan at a time
        for p in range(len(f)):
            total += scale[p] * kernels.sinkhorn_plan(_only(problem, p)).to(x.dtype)
        return total, None

    def apply(v: Tensor, transpose: bool) -> Tensor:
        return kernels.sinkhorn_apply(problem, v, transpose).to(v.dtype)

    x, y = masked(x, problem.x_lengths), masked(y, problem.y_lengths)
    if problem.metric == "sqeuclidean":
        of_x = _pull(x, apply(_with_ones(y), False))
        of_y = _pull(y, apply(_with_ones(x), True)) if needs_y else None
        return 2 * scale * of_x, None if of_y is None else 2 * scale * of_y
    if problem.metric == "cosine":
        x_unit, x_norm = _unit(x)
        y_unit, y_norm = _unit(y)
        of_x = _across(-apply(y_unit, False), x_unit, x_norm)
        of_y = _across(-apply(x_unit, True), y_unit, y_norm) if needs_y else None
        return scale * of_x, None if of_y is None else scale * of_y

    of_x, of_y = torch.zeros_like(x), torch.zeros_like(y)
    for p in range(x.shape[0]):
        n = x.shape[1] if problem.x_lengths is None else int(problem.x_lengths[p])
        m = y.shape[1] if problem.y_lengths is None else int(problem.y_lengths[p])
        step = max(1, _BLOCK_BYTES // (m * x.element_size()))
        one, columns = slice(p, p + 1), slice(0, m)
        for begin in range(0, n, step):
            rows = slice(begin, min(begin + step, n))
            part = replace(
                problem, x=x[one, rows], y=y[one, columns], a=problem.a[one, rows], b=problem.b[one, columns],
                f=f[one, rows], g=g[one, columns], x_lengths=None, y_lengths=None,
            )  # fmt: skip
            plan = kernels.sinkhorn_plan(part).to(x.dtype)[0]
            if problem.metric == "euclidean":
                distance = kernels.pairwise(x[p, rows], y[p, columns], metric="euclidean")
                pull = torch.where(distance > 0, plan / distance, 0)
                of_x[p, rows] = x[p, rows] * pull.sum(1, keepdim=True) - pull @ y[p, columns]
                of_y[p, columns] += y[p, columns] * pull.sum(0)[:, None] - pull.mT @ x[p, rows]
                continue
            for k in range(x.shape[2]):
                pull = plan * torch.sign(x[p, rows, k, None] - y[p, columns, k])
                of_x[p, rows, k] = pull.sum(1)
                of_y[p, columns, k] -= pull.sum(0)
    return scale * of_x, scale * of_y


def _only(problem: Problem, p: int) -> Problem:
    """Problem p alone, of problems with the same costs."""
    own, (f, g) = slice(p, p + 1), problem.potentials()
    rows, columns = (t if t is None else t[own] for t in (problem.x_lengths, problem.y_lengths))
    a, b = problem.a[own], problem.b[own]
    return replace(problem, a=a, b=b, f=f[own], g=g[own], x_lengths=rows, y_lengths=columns)


def _with_ones(points: Tensor) -> Tensor:
    return torch.cat([points, torch.ones_like(points[:, :, :1])], dim=2)


def _pull(points: Tensor, sums: Tensor) -> Tensor:
    """The differences r_i x_i - (P y)_i from P [y, 1]."""
    return points * sums[:, :, -1:] - sums[:, :, :-1]


def _unit(points: Tensor) -> tuple[Tensor, Tensor]:
    norm = points.norm(dim=2, keepdim=True)
    return torch.where(norm > 0, points / norm, 0), norm


def _across(gradient: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    along = (gradient * unit).sum(2, keepdim=True)
    return torch.where(norm > 0, (gradient - along * unit) / norm, 0)
