"""The course of a problem's iterations, and the value of a solution: the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashcoreset.sinkhorn.problem import Problem

# Exponents, which are sums of potentials and costs in units of reg, stay below this part of what a type holds.
EXPONENTS = 1e-3
# The share of the mass below which the rounding of a type may be all that is left of an error. (Errors that iterations came to
# rest at, for reg down to 5e-4 of the largest cost: 1.2e-7 to 7e-7 in float32, 3e-16 to 9e-15 in float64.)
REACH = {torch.float32: 8 * 2.0**-23, torch.float64: 64 * 2.0**-52}
# exp() of a larger number leaves the range of float64.
MOST_EXPONENT = 700.0


class Error(NamedTuple):
    """An error, or a bound of it: in L1, by which eps and omega go, and in the norm of the problem, by which a run ends."""

    l1: float
    judged: float

    @classmethod
    def of(cls, off: Tensor, l2: bool) -> Error:
        """The error of a side whose sums are off by so much each."""
        l1 = float(off.sum())
        if not l2 or not 0 < l1 < math.inf:
            return cls(l1, l1)
        return cls(
            l1, l1 * float((off / l1).norm())
        )  # squares leave the range of float64 before the numbers do

    def plus(self, other: Error) -> Error:
        return Error(self.l1 + other.l1, self.judged + other.judged)


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
    Warm starts: given potentials are iterated at reg. If a plain iteration, or PERIOD over-relaxed ones, leave more than STALLED
    of the error, the iterations are annealed after all, from the potentials as they are, with one iteration per eps.
    Rounding: if the tolerance is below what rounding may leave (`reach`), errors are watched by windows of WINDOW iterations. If RESTS
    windows in a row have least errors within reach that fall so little below the least one before that the iterations left do not come to
    the tolerance, or if CHECKS checks have failed there, the run ends; but not at errors below LUCK times the tolerance.
    Norms: what is compared with the tolerance, at the end and by the watch on rounding, is the error in the norm of the problem; eps and omega
    go by the L1 error whatever the norm, a share of the mass.
    Symmetric problems: omega is 1/2, the iteration f <- (f + T(f)) / 2; with tol > 0 and once the error is below half of the mass, it
    alternates between SYMMETRIC, the two steps of Chebyshev's iteration for eigenvalues 1 + lambda mu in [1, 2]: 1 / (3/2 +- sqrt(1/8)).
    They are not annealed.
    """

    reg: float
    spread: float  # the range of the costs; a bound will do
    tol: float
    max_iter: int
    warm: bool  # potentials are given
    mass: float = 1.0  # of the rows: the errors of the stages are compared with it
    whole: float = 1.0  # what the error at the end is a share of, see `whole_mass`
    symmetric: bool = False  # the columns are the rows
    reach_of_type: float = 0.0  # as a share of the mass, see `REACH`

    LEAST_SHARE = 1e-6
    ANNEALED_FROM = 500.0
    REANNEALED_FROM = 16.0
    FACTOR = 4.0
    STAGE_ERROR = 0.02
    STAGE_ITERATIONS = 200
    STALLED = 0.9
    LUCK = 4.0
    PERIOD = 10
    MOST_OMEGA = 1.95
    SYMMETRIC = (0.5395042867795848, 0.8722604191145028)
    WINDOW = 32
    RESTS = 6
    CHECKS = 8

    def __post_init__(self) -> None:
        stages = 0
        if (
            not self.symmetric
            and self.spread > self.REANNEALED_FROM * self.reg
            and math.isfinite(self.spread)
        ):
            # The quotient of two numbers of float64 may leave its range.
            quotient = self.spread / self.reg
            logs = math.log(quotient) if quotient < math.inf else math.log(self.spread) - math.log(self.reg)
            stages = math.ceil(logs / math.log(self.FACTOR)) - 1
        self._trial_stages = stages if self.warm and self.tol > 0 else 0
        if self.warm or not self.spread > self.ANNEALED_FROM * self.reg or 2 * stages > self.max_iter:
            stages = 0
        self.eps = self.spread / self.FACTOR if stages else self.reg
        self.stage_iterations = min(self.STAGE_ITERATIONS, self.max_iter // (2 * stages)) if stages else 0
        self.accelerated = self.tol > 0 or stages > 0
        # The error at which the problem is solved: for masses below 1 no larger a share of the mass than tol or LEAST_SHARE.
        self.tolerance = min(self.tol, max(self.tol, self.LEAST_SHARE) * self.whole)
        reach = self.reach_of_type * self.whole
        self._reach = reach if 0 < self.tolerance < reach else 0.0
        self.omega = self._plain_omega = 0.5 if self.symmetric else 1.0
        self.iterations = 0
        self._in_stage = 0
        self._since = 0
        self._base = 0.0
        self._before = 0.0
        self._least = self._best = 0.0
        self._in_window = self._rests = self._checks = 0
        self._ends = False

    def translates(self, rho_a: float, rho_b: float) -> bool:
        """Whether iterations move a constant from one side's potentials to the other's."""
        relaxed = not (math.isinf(rho_a) and math.isinf(rho_b))
        return not self.symmetric and relaxed and (self.accelerated or math.isinf(rho_b))

    def after(self, error: float, judged: float) -> str:
        """What to do after an iteration that began with this error, in L1 and `judged` in the problem's norm: "go on", "new eps", "check"
        (whether it has converged) or "stop"."""
        self.iterations += 1
        self._in_stage += 1
        if self.eps > self.reg and self.iterations < self.max_iter:
            if error <= self.STAGE_ERROR * self.mass or self._in_stage >= self.stage_iterations:
                self._new_eps(max(self.eps / self.FACTOR, self.reg))
                return "new eps"
        elif self.eps <= self.reg and judged <= self.tolerance and self.tolerance > 0:
            return "check"
        if self.iterations >= self.max_iter or self._ends or math.isnan(error):
            return "stop"
        if self._stalls(error):
            self._trial_stages = 0
            self.stage_iterations = 1
            self._new_eps(self.spread / self.FACTOR)
            return "new eps"
        if self.accelerated:
            self._adapt(error)
        self._ends = self._comes_to_rest(judged)
        if self.iterations + 1 == self.max_iter or self._ends:
            self.omega = self._plain_omega
        return "go on"

    def disappointed(self, error: float) -> bool:
        """Goes on with plain iterations after a check that found this error, above the tolerance. Returns whether any are left."""
        self._restart()
        if self._hopeless(error):
            self._checks += 1
            self._ends = self._checks >= self.CHECKS
        return self.iterations < self.max_iter and not self._ends

    def _new_eps(self, eps: float) -> None:
        self.eps = eps
        self._in_stage = self._in_window = self._rests = 0
        self._best = 0.0
        self._restart()

    def _restart(self) -> None:
        self.omega = self._plain_omega
        self._since = 0

    def _stalls(self, error: float) -> bool:
        """Whether the start that was given has turned out to be one from which iterations hardly come on."""
        left = self.max_iter - self.iterations
        if self._trial_stages == 0 or error <= self._reach or left < 2 * self._trial_stages:
            return False
        if self.omega != 1:
            return self._since == self.PERIOD and error >= self.STALLED * self._base
        before, self._before = self._before, error
        return self.iterations > 2 and error >= self.STALLED * before

    def _hopeless(self, error: float) -> bool:
        """Whether an error may be rounding alone, and is not one that the luck of rounding brings to the tolerance."""
        return self.LUCK * self.tolerance < error <= self._reach

    def _comes_to_rest(self, error: float) -> bool:
        """Whether rounding is all that is left of the error."""
        if self._reach == 0:
            return False
        self._least = error if self._in_window == 0 else min(self._least, error)
        self._in_window += 1
        if self._in_window < self.WINDOW:
            return False
        self._in_window = 0
        is_rest = self._best > 0 and self._hopeless(self._least)
        if is_rest:
            # By how much the logarithm falls per window, and how many windows are left for it.
            fall, windows = (
                math.log(self._best / self._least),
                (self.max_iter - self.iterations) // self.WINDOW,
            )
            is_rest = fall * windows < math.log(self._least / self.tolerance)
        self._rests = self._rests + 1 if is_rest else 0
        self._best = min(self._best or math.inf, self._least)
        return self._rests >= self.RESTS

    def _adapt(self, error: float) -> None:
        if self.symmetric:
            first, second = self.SYMMETRIC
            self.omega = second if self.omega == first else first
            if error >= 0.5 * self.mass:
                self.omega = self._plain_omega
            return
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
