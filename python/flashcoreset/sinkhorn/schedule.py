"""The course of a problem's iterations, and the value of a solution: the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcoreset.sinkhorn.problem import Problem

# Exponents, which are sums of potentials and costs in units of reg, stay below this part of what a type holds.
EXPONENTS = 1e-3
# exp() of a larger number leaves the range of float64.
MOST_EXPONENT = 700.0


def whole_mass(rho_a: float, rho_b: float, mass_a: float, mass_b: float) -> float:
    """The mass that errors are a share of: the plan's if a marginal holds, else the larger one of the weights'."""
    rows_hold, columns_hold = (math.isinf(rho) for rho in (rho_a, rho_b))
    if rows_hold != columns_hold:
        return mass_a if rows_hold else mass_b
    return max(mass_a, mass_b)


@dataclass
class Schedule:
    """The course of one problem's iterations, the same on every backend (csrc/core/sinkhorn_schedule.h).

    Annealing: if the costs range over more than ANNEALED_FROM times reg, the iterations start at a quarter of the
    range and eps falls by FACTOR whenever the marginals are off by STAGE_ERROR of the mass or after a stage's share of iterations.
    Over-relaxation: every PERIOD iterations the measured rate of convergence gives a better
    omega; when the error grew, omega goes back towards 1. The last of `max_iter` iterations is a plain one: a plain iteration leaves
    the columns exact, and so the best iterate, while an over-relaxed one leaves both sides off. With tol = 0
    plain iterations are made, unless they are annealed; without constants, except if the rows alone are relaxed: the constants
    leave plans as they are.
    """

    reg: float
    spread: float  # the range of the costs; a bound will do
    tol: float
    max_iter: int
    warm: bool  # potentials are given
    mass: float = 1.0  # of the rows: the errors of the stages are compared with it
    whole: float = 1.0  # what the error at the end is a share of, see `whole_mass`

    LEAST_SHARE = 1e-6
    ANNEALED_FROM = 500.0
    FACTOR = 4.0
    STAGE_ERROR = 0.02
    STAGE_ITERATIONS = 200
    PERIOD = 10
    MOST_OMEGA = 1.95

    def __post_init__(self) -> None:
        stages = 0
        if not self.warm and self.spread > self.ANNEALED_FROM * self.reg and math.isfinite(self.spread):
            # The quotient of two numbers of float64 may leave its range.
            quotient = self.spread / self.reg
            logs = math.log(quotient) if quotient < math.inf else math.log(self.spread) - math.log(self.reg)
            stages = math.ceil(logs / math.log(self.FACTOR)) - 1
        if 2 * stages > self.max_iter:
            stages = 0
        self.eps = self.spread / self.FACTOR if stages else self.reg
        self.stage_iterations = min(self.STAGE_ITERATIONS, self.max_iter // (2 * stages)) if stages else 0
        self.accelerated = self.tol > 0 or stages > 0
        # The error at which the problem is solved: for masses below 1 no larger a share of the mass than tol or LEAST_SHARE.
        self.tolerance = min(self.tol, max(self.tol, self.LEAST_SHARE) * self.whole)
        self.omega = 1.0
        self.iterations = 0
        self._in_stage = 0
        self._since = 0
        self._base = 0.0

    def after(self, error: float) -> str:
        """What to do after an iteration that began with this error: "go on", "new eps", "check" (whether it has converged)
        or "stop"."""
        self.iterations += 1
        self._in_stage += 1
        if self.eps > self.reg and self.iterations < self.max_iter:
            if error <= self.STAGE_ERROR * self.mass or self._in_stage >= self.stage_iterations:
                self.eps = max(self.eps / self.FACTOR, self.reg)
                self._in_stage = 0
                self._restart()
                return "new eps"
        elif self.eps <= self.reg and error <= self.tolerance and self.tolerance > 0:
            return "check"
        if self.iterations >= self.max_iter or math.isnan(error):
            return "stop"
        if self.accelerated:
            self._adapt(error)
        if self.iterations + 1 == self.max_iter:
            self.omega = 1.0
        return "go on"

    def disappointed(self) -> bool:
        """Goes on with plain iterations after a check that failed. Returns whether any are left."""
        self._restart()
        return self.iterations < self.max_iter

    def _restart(self) -> None:
        self.omega = 1.0
        self._since = 0

    def _adapt(self, error: float) -> None:
        if self._since == 0:
            if error >= 0.5 * self.mass:
                return
            self._base = error
        elif self._since == self.PERIOD:
            rate = (error / self._base) ** (1 / self.PERIOD) if self._base > 0 else 0.0
            if rate >= 1:
                self.omega = 1 + 0.7 * (self.omega - 1)
            elif rate > self.omega - 1:
                # The rate of plain iterations, by Young's relation between it and the rate at omega.
                plain = min((rate + self.omega - 1) ** 2 / (rate * self.omega**2), 0.9999)
                self.omega = min(max(self.omega, 2 / (1 + math.sqrt(1 - plain))), self.MOST_OMEGA)
            else:
                self.omega = 1 + 0.95 * (self.omega - 1)
            self._base = error
            self._since = 0
        self._since += 1


def range_fault(spread: float, reg: float, metric: str, dtype: torch.dtype, within: str) -> str | None:
    """The error message for costs that range over `spread` (or at most so much) if they, or their exponents in units of reg,
    leave the range of the data's type; None if they do not."""
    most = torch.finfo(dtype).max
    remedy = " or use float64" if dtype == torch.float32 else ""
    # Euclidean distances are the roots of their squares.
    if not spread <= (math.sqrt(most) if metric == "euclidean" else most):
        return f"x: costs overflow {dtype}{within}; scale the data down{remedy}"
    if not spread <= EXPONENTS * most * reg:
        return f"reg: costs of {spread:.3g} in units of {reg:.3g} overflow {dtype}{within}; raise reg{remedy}"
    return None


def ordered_sums(values: Tensor) -> Tensor:
    """The sums over the last dimension, in an order that does not depend on how many zeros end a row, as `Tensor.sum`'s does: a
    problem in a padded batch has the bits that it has alone."""
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        values = values[..., ::2] + values[..., 1::2]
    return values[..., 0]


def dual_value(
    problem: Problem,
    f: Tensor,
    g: Tensor,
    mass: Tensor,
    sums: Callable[[Tensor], Tensor] = lambda rows: rows.sum(1),
) -> Tensor:
    """The dual objective [B] at potentials f [B, n], g [B, m] of plans of total `mass` [B]; `sums` adds up rows."""
    a, b = problem.a, problem.b
    sides = []
    for potential, weight, rho in zip((f, g), (a, b), (problem.rho_a, problem.rho_b), strict=True):
        worth = potential if math.isinf(rho) else -rho * torch.expm1(-potential / rho)
        # If a weight is 0, its potential may be anything.
        sides.append(torch.where(weight > 0, weight * worth, 0))
    first, second, *masses = map(sums, (*sides, a, b))
    return first + second - problem.reg * (mass - masses[0] * masses[1])


def asked(potential: Tensor, rho: float) -> Tensor | float:
    """The shares exp(-f / rho) of their weights that potentials ask for. Kept below infinity, which a plan may reach too."""
    return 1.0 if math.isinf(rho) else torch.exp((-potential / rho).clamp(max=MOST_EXPONENT))
