"""Entropic optimal transport in plain torch: the definition that the other backends are tested against.

For costs C [n, m], weights a [n], b [m] and reg = eps > 0,

    min over P >= 0 of <P, C> + eps KL(P | a x b) + rho_a KL(P 1 | a) + rho_b KL(P^T 1 | b)

with KL(p | q) = sum p log(p / q) - p + q; rho = inf asks for the marginal exactly (balanced). With potentials
f [n] and g [m], P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps). One iteration is

    S_i = log sum_j b_j exp((f_i + g_j - C_ij) / eps)    f_i <- (1 - omega) f_i + omega lambda_a (f_i - eps S_i)
    T_j = log sum_i a_i exp((f_i + g_j - C_ij) / eps)    g_j <- (1 - omega) g_j + omega lambda_b (g_j - eps T_j)

where lambda = rho / (rho + eps), 1 if balanced, and omega = 1 unless the iterations are over-relaxed. Then, if a marginal
is relaxed, f gains and g loses a constant, which leaves the plan as it is: the best one, in closed form (`translation`).
`Schedule` says when iterations are over-relaxed, when eps is annealed and when to stop. Everything is computed in float64.

If x and y are the same points with the same weights (`Problem.symmetric`), both potentials are the same, and an iteration is the
first line alone with omega = 1/2, f <- (f + T(f)) / 2 (later on other omegas, see `Schedule`), after which g = f. Where exp(-C / eps) is positive semidefinite, as with all
metrics of points here, the errors of f shrink by (1 - lambda mu) / 2 with mu in [0, 1], so by 2 at least, whatever eps is: an
alternation of rows and columns shrinks them by mu^2, which is next to 1 if eps is small.

The error of potentials is the residual of both sides' optimality conditions, the slope of the dual objective:

    sum_i |a_i exp(S_i) - a_i exp(-f_i / rho_a)| + sum_j |b_j exp(T_j) - b_j exp(-g_j / rho_b)|

with exp(-f / rho) = 1 for a balanced marginal. If the problem's norm is "l2", each of the two sums of numbers |r_i| is replaced by
sqrt(sum_i r_i^2), which is at most that sum and at least 1 / sqrt(n) of it. The dual is concave, so potentials at which this error is 0 are a solution, and no
others are. (By how much the plan changes in an iteration says nothing: if each column's mass goes to one row, the plan
stands still while the potentials drift by some eps per iteration.) An update with omega = 1 makes its own side's part exactly
0: with f' = lambda (f - eps S), f' (1 / eps + 1 / rho) = f / eps - S, that is S + (f' - f) / eps = -f' / rho. The
columns move last, so at the end of a plain iteration the rows alone are off, which the next pass over the rows measures before
they move. After an over-relaxed one the columns are off too, by |b exp(T + (g' - g) / eps) - b exp(-g' / rho_b)|; and a
constant c that g loses multiplies what it asks for by exp(c / rho_b), which adds at most sum_j b_j exp(-g'_j / rho_b)
|exp(c / rho_b) - 1|, in either norm. So an iteration knows, at no cost, a bound of the error of the potentials that it began with; when that
bound reaches tol, the error itself is computed from the current potentials, and decides.

Sources: Cuturi, "Sinkhorn distances", 2013; Chizat, Peyre, Schmitzer and Vialard, "Scaling algorithms for
unbalanced optimal transport problems", 2018, and Schmitzer, "Stabilized sparse scaling algorithms for entropy
regularized transport problems", 2019 (absorption, annealing); Thibault, Chizat, Dossal and Papadakis,
"Overrelaxed Sinkhorn-Knopp algorithm for regularized optimal transport", 2021, and Lehmann, von Renesse, Sambale
and Uschmajew, "A note on overrelaxation in the Sinkhorn algorithm", 2022 (over-relaxation; the optimal omega from
the rate of convergence is Young's formula for successive over-relaxation); Sejourne, Vialard and Peyre, "Faster unbalanced
optimal transport: translation invariant Sinkhorn and 1-D Frank-Wolfe", 2022 (the constant, which plain iterations lose by
a factor of lambda_a lambda_b each); Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", 2019
(symmetric problems).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset._core.tensor import check_finite
from flashcoreset.pairwise import normalize_rows
from flashcoreset.pairwise.reference import pairwise as pairwise
from flashcoreset.pairwise.reference import values_of_rows
from flashcoreset.sinkhorn.problem import Problem, Result
from flashcoreset.sinkhorn.schedule import (
    REACH,
    Error,
    Schedule,
    asked,
    dual_value,
    range_fault,
    whole_mass,
)

TAKES = Takes()

# Temporaries of a block of rows of costs: as many bytes as this, or as one row takes.
_BLOCK_BYTES = 2**20


class _Costs:
    """C [n, m] of one problem in float64, some rows at a time; kept if it fits into `memory_budget` bytes."""

    def __init__(self, x: Tensor, y: Tensor | None, metric: str, memory_budget: int) -> None:
        self.x = x.double()
        self.metric = metric
        self.matrix: Tensor | None = None
        if y is None:
            self.matrix = self.x
            self.shape = (x.shape[0], x.shape[1])
            allowed = self.x[self.x < math.inf]
            self.spread = float(allowed.max() - allowed.min()) if len(allowed) else 0.0
            return
        self.y = y.double()
        if metric == "cosine":
            self.x, self.y = normalize_rows(self.x), normalize_rows(self.y)
        self.shape = (x.shape[0], y.shape[0])
        self.spread = self._bound()
        if 8 * self.shape[0] * self.shape[1] <= memory_budget:
            kept = self.x.new_empty(self.shape)
            for rows, cost in self.blocks():
                kept[rows] = cost
            self.matrix = kept

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows and their costs."""
        n, m = self.shape
        step = max(1, _BLOCK_BYTES // (8 * m))
        for begin in range(0, n, step):
            rows = slice(begin, min(begin + step, n))
            if self.matrix is not None:
                yield rows, self.matrix[rows]
                continue
            values = values_of_rows(self.x[rows], self.y, self.metric)
            yield rows, 1 - values if self.metric == "cosine" else values

    def _bound(self) -> float:
        """A bound, at least the largest cost, by the triangle inequality through the first column's point."""
        if self.metric == "cosine":
            return 2.0
        plain = "l1" if self.metric == "l1" else "euclidean"
        far = sum(float(values_of_rows(self.y[:1], z, plain).max()) for z in (self.x, self.y))
        return far * far if self.metric == "sqeuclidean" else far


def _each(problem: Problem, memory_budget: int) -> Iterator[tuple[int, slice, slice, _Costs]]:
    """The number of each problem, its rows and its columns, and its costs."""
    x, y = problem.each_x, problem.y
    batch, n, m = problem.sizes
    rows = [n] * batch if problem.x_lengths is None else problem.x_lengths.tolist()
    columns = [m] * batch if problem.y_lengths is None else problem.y_lengths.tolist()
    for p, (r, c) in enumerate(zip(rows, columns, strict=True)):
        own, other = (x[p, :r, :c], None) if y is None else (x[p, :r], y[p, :c])
        try:
            check_finite(own if other is not None else torch.where(own == math.inf, 0, own), "x")
            if other is not None:
                check_finite(other, "y")
        except ValueError as error:
            raise ValueError(f"{error}{problem.within(p)}") from None
        yield p, slice(0, r), slice(0, c), _Costs(own, other, problem.metric, memory_budget)


def damping(rho: float, eps: float) -> float:
    """The factor lambda = rho / (rho + eps); 1 for a balanced marginal."""
    return 1.0 if math.isinf(rho) else rho / (rho + eps)


def moved(potential: Tensor, log_sum: Tensor, eps: float, omega: float, damp: float) -> Tensor:
    """The next potentials from S or T."""
    return (1 - omega) * (1 - damp) * potential + damp * (potential - omega * eps * log_sum)


def allowed(potential: Tensor, weight: Tensor) -> Tensor:
    """New potentials; if all pairs of a line are forbidden: 0 for a line without weight, and NaN, with which the run ends, for one
    that has weight and no place to go."""
    return torch.where(potential.isfinite(), potential, torch.where(weight > 0, math.nan, 0.0))


def translation(f: Tensor, g: Tensor, a: Tensor, b: Tensor, rho_a: float, rho_b: float) -> float:
    """The c for which f + c and g - c have the largest dual value: both sides then ask for the same mass,

    A exp(-c / rho_a) = B exp(c / rho_b)    A = sum a exp(-f / rho_a)    B = sum b exp(-g / rho_b)
    """
    logs = []
    for potential, weight, rho in zip((f, g), (a, b), (rho_a, rho_b), strict=True):
        mass = float(weight.sum())
        # Computed from the difference to the weights, which keeps its digits if rho is large and c is a small difference of
        # large numbers.
        lost = float((weight * torch.expm1(-potential / rho)).nan_to_num(0.0).sum()) / mass
        logs.append(math.log(mass) + math.log1p(lost) if -1 < lost < math.inf else -math.inf)
    c = (logs[0] - logs[1]) / (1 / rho_a + 1 / rho_b)
    return c if math.isfinite(c) else 0.0


def sinkhorn(problem: Problem, report: Callable[[int, int], None] | None = None) -> Result:
    """Solves a batch of problems, one after the other; see `Problem`."""
    a, b = problem.a, problem.b
    batch = len(a)
    out_f, out_g = torch.zeros_like(a), torch.zeros_like(b)
    scalars = torch.zeros(5, batch, dtype=torch.float64)
    for p, r, c, costs in _each(problem, problem.memory_budget):
        within = problem.within(p).replace(" of", " in", 1)
        fault = range_fault(costs.spread, problem.reg, problem.metric, problem.x.dtype, within)
        if fault is not None:
            raise ValueError(fault)
        one = replace(
            problem, a=a[p : p + 1, r], b=b[p : p + 1, c], f=None if problem.f is None else problem.f[p : p + 1, r],
            g=None if problem.g is None else problem.g[p : p + 1, c],
        )  # fmt: skip
        own_report = None
        if report is not None:
            own_report = _of_problem(report, p, batch, problem.max_iter)
        out_f[p, r], out_g[p, c], *found = _solve(costs, one, own_report)
        scalars[:, p] = torch.tensor(found, dtype=torch.float64)
    value, transport_cost, error, iterations, tolerance = scalars.to(a.device)
    return Result(out_f, out_g, value, transport_cost, error, iterations.long(), error <= tolerance)


def _of_problem(report: Callable[[int, int], None], p: int, batch: int, most: int) -> Callable[[int], None]:
    return lambda done: report(p * most + done, batch * most)


def _solve(
    costs: _Costs, problem: Problem, report: Callable[[int], None] | None
) -> tuple[Tensor, Tensor, float, float, float, int, float]:
    """Solves one problem, whose sizes are those of its weights [1, n] and [1, m]: the potentials, the value, <P, C>, the error, the
    number of iterations and the error at which the problem is solved."""
    a, b = problem.a[0], problem.b[0]
    rho_a, rho_b = problem.rho_a, problem.rho_b
    n, m = costs.shape
    f = a.new_zeros(n) if problem.f is None else problem.f[0].clone()
    g = b.new_zeros(m) if problem.g is None else problem.g[0].clone()
    masses = float(a.sum()), float(b.sum())
    schedule = Schedule(
        problem.reg, costs.spread, problem.tol, problem.max_iter, problem.f is not None, masses[0],
        whole_mass(rho_a, rho_b, *masses), problem.symmetric, REACH[torch.float64],
    )  # fmt: skip
    translates = schedule.translates(rho_a, rho_b)
    columns_off = Error(0.0, 0.0)
    while True:
        eps, omega = schedule.eps, schedule.omega
        damp_a, damp_b = damping(rho_a, eps), damping(rho_b, eps)
        row_sums, column_sums = a.new_empty(n), b.new_full((m,), -math.inf)
        before = f.clone()
        for rows, cost in costs.blocks():
            exponent = (f[rows, None] + g - cost) / eps
            row_sums[rows] = torch.logsumexp(exponent + b.log(), 1)
            new = allowed(moved(f[rows], row_sums[rows], eps, omega, damp_a), a[rows])
            if not problem.symmetric:
                exponent += ((new - f[rows]) / eps + a[rows].log())[:, None]
                column_sums = torch.logaddexp(column_sums, torch.logsumexp(exponent, 0))
            f[rows] = new
        # `error` is that of the plan that this iteration began with, `columns_off` that of the plan that it made.
        error = Error.of(_off(a, row_sums, before, rho_a), problem.l2)
        if problem.symmetric:
            error, g = error.plus(error), f.clone()
        else:
            new = allowed(moved(g, column_sums, eps, omega, damp_b), b)
            error = error.plus(columns_off)
            columns_off = Error.of(_off(b, column_sums + (new - g) / eps, new, rho_b), problem.l2)
            g = new
        if translates:
            c = translation(f, g, a, b, rho_a, rho_b)
            if not math.isinf(rho_b):
                more = float((b * asked(g, rho_b)).sum()) * abs(math.expm1(c / rho_b))
                columns_off = columns_off.plus(Error(more, more))
            f, g = f + c, g - c
        order = schedule.after(*error)
        if report is not None:
            report(schedule.iterations)
        if order == "new eps":
            columns_off = Error(0.0, 0.0)  # as at the start: not known, and computed before the end
        elif order != "go on":
            f, g, found, mass, total = _evaluate(costs, problem, f, g)
            if order == "check" and not found <= schedule.tolerance and schedule.disappointed(found):
                continue
            value = float(dual_value(problem, f[None], g[None], mass))
            return f, g, value, total, found, schedule.iterations, schedule.tolerance


def _off(weight: Tensor, log_sum: Tensor, potential: Tensor, rho: float) -> Tensor:
    """By how much each of the sums weight exp(log_sum) of a plan is off what its potential asks for."""
    off = weight * (log_sum.exp() - asked(potential, rho)).abs()
    return torch.where(weight > 0, off, 0)  # zero weights have no error, however large the sums


def _evaluate(
    costs: _Costs, problem: Problem, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, float, Tensor, float]:
    """The potentials (at zero weights those that the other side implies), the error and the mass of the plan, and <P, C>."""
    a, b, reg = problem.a[0], problem.b[0], problem.reg
    row_sums, column_sums = torch.empty_like(f), g.new_full(g.shape, -math.inf)
    total = 0.0
    for rows, cost in costs.blocks():
        exponent = (f[rows, None] + g - cost) / reg
        row_sums[rows] = torch.logsumexp(exponent + b.log(), 1)
        column_sums = torch.logaddexp(column_sums, torch.logsumexp(exponent + a[rows, None].log(), 0))
        plan = (exponent + a[rows, None].log() + b.log()).exp()
        total += float(torch.where(cost < math.inf, plan * cost, 0).sum())
    damp_a, damp_b = damping(problem.rho_a, reg), damping(problem.rho_b, reg)
    f = torch.where(a > 0, f, allowed(damp_a * (f - reg * row_sums), a))
    g = torch.where(b > 0, g, allowed(damp_b * (g - reg * column_sums), b))
    error = Error.of(_off(a, row_sums, f, problem.rho_a), problem.l2)
    error = error.plus(Error.of(_off(b, column_sums, g, problem.rho_b), problem.l2))
    return f, g, error.judged, torch.where(a > 0, a * row_sums.exp(), 0).sum(), total


def sinkhorn_apply(problem: Problem, v: Tensor, transpose: bool = False) -> Tensor:
    batch, n, m = problem.sizes
    out = torch.zeros(batch, m if transpose else n, v.shape[2], dtype=torch.float64, device=v.device)
    for p, rows, columns, plan in _plan_blocks(problem, problem.memory_budget):
        if transpose:
            out[p, columns] += plan.mT @ v[p, rows].double()
        else:
            out[p, rows] = plan @ v[p, columns].double()
    return out


def sinkhorn_plan(problem: Problem) -> Tensor:
    """In float64."""
    out = torch.zeros(problem.sizes, dtype=torch.float64, device=problem.a.device)
    for p, rows, columns, plan in _plan_blocks(problem, 0):
        out[p, rows, columns] = plan
    return out


def _plan_blocks(problem: Problem, memory_budget: int) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """The number of each problem, some of its rows, its columns, and the plan there."""
    f, g = problem.potentials()
    a, b = problem.a, problem.b
    for p, _, c, costs in _each(problem, memory_budget):
        for rows, cost in costs.blocks():
            logs = (f[p, rows, None] + g[p, c] - cost) / problem.reg
            yield p, rows, c, (logs + a[p, rows, None].log() + b[p, c].log()).exp()


def workspace(problem: Problem) -> int:
    _, n, m = problem.sizes
    d = 0 if problem.y is None else problem.x.shape[2]
    resident = n * m * 8 if n * m * problem.x.element_size() <= problem.memory_budget else 0
    # Points and potentials in float64; temporaries of a block of rows, and the allocator's share of them.
    return resident + (n + m) * (16 * d + 128) + 16 * max(_BLOCK_BYTES, 8 * m)
