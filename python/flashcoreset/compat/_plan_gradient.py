"""Gradients of entropic plans, by implicit differentiation of the conditions that a solved plan satisfies.

A plan P_ij = exp((f_i + g_j - C_ij) / reg) has the marginals P 1 = a exp(-f / rho_a) and P^T 1 = b exp(-g / rho_b), with rho infinite
for a marginal that holds. For a gradient G with respect to P, with W = G * P / reg and (r, c) the sums of its rows and columns,

    [diag(P 1 (1 + reg / rho_a))   P                            ] [x]   [r]
    [P^T                           diag(P^T 1 (1 + reg / rho_b))] [y] = [c]

gives d / d C = P * (x + y) - W, d / d a = reg x (P 1) / a and d / d b = reg y (P^T 1) / b.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiable(
    plan: Tensor,
    costs: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    rho: tuple[float, float] = (math.inf, math.inf),
    rows_last: bool = True,
    product_reference: bool = False,
) -> Tensor:
    """The solved `plan` [B, n, m] as a function of the costs [B, n, m] and the weights a [B, n] and b [B, m].

    Args:
        plan: without a graph.
        reg, rho: the weight of the entropy, and the penalties of the marginals.
        rows_last: of balanced problems, whether an iteration ends with the rows: which of the weights changes the plan's mass, for
            gradients along which the sums of a and b differ.
        product_reference: whether the entropy is relative to a x b, in relaxed problems. (In balanced ones it makes no difference.)
    """
    found: Tensor = _Plan.apply(plan, costs, a, b, reg, rho, rows_last, product_reference)
    return found


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Tensor,
        costs: Tensor,
        a: Tensor,
        b: Tensor,
        reg: float,
        rho: tuple[float, float],
        *flags: bool,
    ) -> Tensor:
        ctx.save_for_backward(plan, a, b)
        ctx.options = (reg, rho, *flags)
        ctx.dtypes = costs.dtype, a.dtype, b.dtype
        return plan.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_plan: Tensor) -> tuple[Any, ...]:
        plan, a, b = (t.double() for t in ctx.saved_tensors)
        reg, rho, rows_last, product_reference = ctx.options
        w = of_plan.double() * plan / reg
        mass_a, mass_b = plan.sum(2), plan.sum(1)
        x, y = _solve(plan, mass_a, mass_b, w.sum(2), w.sum(1), reg, rho, rows_last)
        of_costs = plan * (x[:, :, None] + y[:, None, :]) - w
        of_a = reg * x * torch.where(a > 0, mass_a / a, 0)
        of_b = reg * y * torch.where(b > 0, mass_b / b, 0)
        if product_reference:
            of_a = of_a - reg * torch.where(a > 0, of_costs.sum(2) / a, 0)
            of_b = of_b - reg * torch.where(b > 0, of_costs.sum(1) / b, 0)
        dtypes = ctx.dtypes
        return None, of_costs.to(dtypes[0]), of_a.to(dtypes[1]), of_b.to(dtypes[2]), None, None, None, None


def _solve(
    plan: Tensor,
    mass_a: Tensor,
    mass_b: Tensor,
    r: Tensor,
    c: Tensor,
    reg: float,
    rho: tuple[float, float],
    rows_last: bool,
) -> tuple[Tensor, Tensor]:
    """x [B, n] and y [B, m]; the system is reduced to its shorter side."""
    n, m = plan.shape[1:]
    if n < m:
        y, x = _solve(plan.mT, mass_b, mass_a, c, r, reg, (rho[1], rho[0]), not rows_last)
        return x, y
    diagonal_a, diagonal_b = mass_a * (1 + reg / rho[0]), mass_b * (1 + reg / rho[1])
    inverse = torch.where(diagonal_a > 0, 1 / diagonal_a, 0)
    system = torch.diag_embed(diagonal_b) - plan.mT @ (plan * inverse[:, :, None])
    right = c - (plan.mT @ (inverse * r)[:, :, None])[:, :, 0]
    scale = diagonal_b.mean(1)
    # Columns without mass have no part in it; 1 in their place keeps the system regular.
    system = system + torch.diag_embed(torch.where(mass_b > 0, 0.0, scale[:, None]))
    balanced = all(map(math.isinf, rho))
    if balanced:  # a constant may go from x to y
        system = system + scale[:, None, None] / m
    y = _regular_or_least(system, right)
    x = inverse * (r - (plan @ y[:, :, None])[:, :, 0])
    if balanced:
        weight, potential = (mass_b, y) if rows_last else (mass_a, x)
        constant = ((weight * potential).sum(1) / weight.sum(1))[:, None]
        x, y = (x + constant, y - constant) if rows_last else (x - constant, y + constant)
    return x, y


def _regular_or_least(system: Tensor, right: Tensor) -> Tensor:
    """The solution of symmetric systems [B, m, m] that are not negative; the shortest one for parts that rounding leaves singular,
    as those of plans that fall into pieces are."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if not bool(failed.any()):
        return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
    return (torch.linalg.pinv(system, hermitian=True, rtol=1e-12) @ right[:, :, None])[:, :, 0]
