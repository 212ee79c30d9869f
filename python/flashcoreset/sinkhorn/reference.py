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

The error of potentials is the residual of both sides' optimality conditions, the slope of the dual objective:

    sum_i |a_i exp(S_i) - a_i exp(-f_i / rho_a)| + sum_j |b_j exp(T_j) - b_j exp(-g_j / rho_b)|

with exp(-f / rho) = 1 for a balanced marginal. The dual is concave, so potentials at which this error is 0 are a solution, and no
others are. (By how much the plan changes in an iteration says nothing: if each column's mass goes to one row, the plan
stands still while the potentials drift by some eps per iteration.) An update with omega = 1 makes its own side's part exactly
0: with f' = lambda (f - eps S), f' (1 / eps + 1 / rho) = f / eps - S, that is S + (f' - f) / eps = -f' / rho. The
columns move last, so at the end of a plain iteration the rows alone are off, which the next pass over the rows measures before
they move. After an over-relaxed one the columns are off too, by |b exp(T + (g' - g) / eps) - b exp(-g' / rho_b)|; and a
constant c that g loses multiplies what it asks for by exp(c / rho_b), which adds at most sum_j b_j exp(-g'_j / rho_b)
|exp(c / rho_b) - 1|. So an iteration knows, at no cost, a bound of the error of the potentials that it began with; when that
bound reaches tol, the error itself is computed from the current potentials, and decides.

Sources: Cuturi, "Sinkhorn distances", 2013; Chizat, Peyre, Schmitzer and Vialard, "Scaling algorithms for
unbalanced optimal transport problems", 2018, and Schmitzer, "Stabilized sparse scaling algorithms for entropy
regularized transport problems", 2019 (absorption, annealing); Thibault, Chizat, Dossal and Papadakis,
"Overrelaxed Sinkhorn-Knopp algorithm for regularized optimal transport", 2021, and Lehmann, von Renesse, Sambale
and Uschmajew, "A note on overrelaxation in the Sinkhorn algorithm", 2022 (over-relaxation; the optimal omega from
the rate of convergence is Young's formula for successive over-relaxation); Sejourne, Vialard and Peyre, "Faster unbalanced
optimal transport: translation invariant Sinkhorn and 1-D Frank-Wolfe", 2022 (the constant, which plain iterations lose by
a factor of lambda_a lambda_b each).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.tensor import check_finite
from flashcoreset.pairwise import normalize_rows
from flashcoreset.pairwise.reference import pairwise as pairwise
from flashcoreset.pairwise.reference import values_of_rows
from flashcoreset.sinkhorn.schedule import Schedule, Solution, asked, dual_value, range_fault, whole_mass

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
            self.spread = float(self.x.max() - self.x.min())
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


def _problems(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    metric: str,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    memory_budget: int,
) -> Iterator[tuple[int, slice, slice, _Costs]]:
    """The number of each problem, its rows and its columns, and its costs."""
    batch = a.shape[0]
    rows = [a.shape[1]] * batch if x_lengths is None else x_lengths.tolist()
    columns = [b.shape[1]] * batch if y_lengths is None else y_lengths.tolist()
    for p, (r, c) in enumerate(zip(rows, columns, strict=True)):
        own, other = (x[p, :r, :c], None) if y is None else (x[p, :r], y[p, :c])
        try:
            check_finite(own, "x")
            if other is not None:
                check_finite(other, "y")
        except ValueError as error:
            raise ValueError(f"{error} of problem {p}" if batch > 1 else str(error)) from None
        yield p, slice(0, r), slice(0, c), _Costs(own, other, metric, memory_budget)


def damping(rho: float, eps: float) -> float:
    """The factor lambda = rho / (rho + eps); 1 for a balanced marginal."""
    return 1.0 if math.isinf(rho) else rho / (rho + eps)


def moved(potential: Tensor, log_sum: Tensor, eps: float, omega: float, damp: float) -> Tensor:
    """The next potentials from S or T."""
    return (1 - omega) * (1 - damp) * potential + damp * (potential - omega * eps * log_sum)


def translation(f: Tensor, g: Tensor, a: Tensor, b: Tensor, reg_marginal: tuple[float, float]) -> float:
    """The c for which f + c and g - c have the largest dual value: both sides then ask for the same mass,

    A exp(-c / rho_a) = B exp(c / rho_b)    A = sum a exp(-f / rho_a)    B = sum b exp(-g / rho_b)
    """
    logs = []
    for potential, weight, rho in zip((f, g), (a, b), reg_marginal, strict=True):
        mass = float(weight.sum())
        # Computed from the difference to the weights, which keeps its digits if rho is large and c is a small difference of
        # large numbers.
        lost = float((weight * torch.expm1(-potential / rho)).nan_to_num(0.0).sum()) / mass
        logs.append(math.log(mass) + math.log1p(lost) if -1 < lost < math.inf else -math.inf)
    c = (logs[0] - logs[1]) / (1 / reg_marginal[0] + 1 / reg_marginal[1])
    return c if math.isfinite(c) else 0.0


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
    """Solves a batch of problems, one after the other.

    Args:
        x: [B, n, d] points with `y` [B, m, d], or the costs [B, n, m] with `y` None and metric "precomputed".
        a: [B, n] float64, and b [B, m]: weights >= 0, of equal sums if both marginals are balanced.
        reg, reg_marginal: eps and (rho_a, rho_b); inf for a balanced marginal.
        metric: "sqeuclidean", "euclidean", "l1", "cosine" or "precomputed".
        x_lengths, y_lengths: [B] int64, the sizes of the problems; None for n and m. What lies beyond is not read.
        max_iter, tol: see `Schedule`.
        f, g: [B, n] and [B, m] float64 to start from; None starts from 0.
        memory_budget: bytes that the costs of a problem may take.
        report: called with the number of iterations done and their largest possible number.
    """
    batch = a.shape[0]
    out_f, out_g = torch.zeros_like(a), torch.zeros_like(b)
    scalars = torch.zeros(5, batch, dtype=torch.float64)
    for p, r, c, costs in _problems(x, y, a, b, metric, x_lengths, y_lengths, memory_budget):
        fault = range_fault(costs.spread, reg, metric, x.dtype, f" in problem {p}" if batch > 1 else "")
        if fault is not None:
            raise ValueError(fault)
        start = None if f is None or g is None else (f[p, r], g[p, c])
        masses = float(a[p, r].sum()), float(b[p, c].sum())
        schedule = Schedule(
            reg, costs.spread, tol, max_iter, start is not None, masses[0], whole_mass(reg_marginal, *masses)
        )
        own_report = None
        if report is not None:
            own_report = _of_problem(report, p, batch, max_iter)
        out_f[p, r], out_g[p, c], *found = _solve(
            costs, a[p, r], b[p, c], reg, reg_marginal, schedule, start, own_report
        )
        scalars[:, p] = torch.tensor([*found, schedule.tolerance], dtype=torch.float64)
    scalars = scalars.to(a.device)
    value, transport_cost, error, iterations, tolerance = scalars
    return Solution(out_f, out_g, value, transport_cost, error, iterations.long(), error <= tolerance)


def _of_problem(report: Callable[[int, int], None], p: int, batch: int, most: int) -> Callable[[int], None]:
    return lambda done: report(p * most + done, batch * most)


def _solve(
    costs: _Costs,
    a: Tensor,
    b: Tensor,
    reg: float,
    reg_marginal: tuple[float, float],
    schedule: Schedule,
    start: tuple[Tensor, Tensor] | None,
    report: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor, float, float, float, int]:
    n, m = costs.shape
    f, g = start if start is not None else (a.new_zeros(n), b.new_zeros(m))
    f, g = f.clone(), g.clone()
    relaxed = [not math.isinf(rho) for rho in reg_marginal]
    translates = any(relaxed) and (schedule.accelerated or not relaxed[1])
    columns_off = 0.0
    while True:
        eps, omega = schedule.eps, schedule.omega
        damp_a, damp_b = (damping(rho, eps) for rho in reg_marginal)
        row_sums, column_sums = a.new_empty(n), b.new_full((m,), -math.inf)
        before = f.clone()
        for rows, cost in costs.blocks():
            exponent = (f[rows, None] + g - cost) / eps
            row_sums[rows] = torch.logsumexp(exponent + b.log(), 1)
            new = moved(f[rows], row_sums[rows], eps, omega, damp_a)
            exponent += ((new - f[rows]) / eps + a[rows].log())[:, None]
            f[rows] = new
            column_sums = torch.logaddexp(column_sums, torch.logsumexp(exponent, 0))
        new = moved(g, column_sums, eps, omega, damp_b)
        # `error` is that of the plan that this iteration began with, `columns_off` that of the plan that it made.
        error = _off(a, row_sums, before, reg_marginal[0]) + columns_off
        columns_off = _off(b, column_sums + (new - g) / eps, new, reg_marginal[1])
        g = new
        if translates:
            c = translation(f, g, a, b, reg_marginal)
            if relaxed[1]:
                columns_off += float((b * asked(g, reg_marginal[1])).sum()) * abs(
                    math.expm1(c / reg_marginal[1])
                )
            f, g = f + c, g - c
        order = schedule.after(error)
        if report is not None:
            report(schedule.iterations)
        if order == "new eps":
            columns_off = 0.0  # as at the start: not known, and computed before the end
        elif order != "go on":
            f, g, error, mass, total = _evaluate(costs, f, g, a, b, reg, reg_marginal)
            if order == "check" and not error <= schedule.tolerance and schedule.disappointed():
                continue
            value = dual_value(f[None], g[None], a[None], b[None], mass, reg, reg_marginal)
            return f, g, float(value), total, error, schedule.iterations


def _off(weight: Tensor, log_sum: Tensor, potential: Tensor, rho: float) -> float:
    """By how much the sums weight exp(log_sum) of a plan are off what the potentials ask for."""
    off = weight * (log_sum.exp() - asked(potential, rho)).abs()
    return float(torch.where(weight > 0, off, 0).sum())  # zero weights have no error, however large the sums


def _evaluate(
    costs: _Costs, f: Tensor, g: Tensor, a: Tensor, b: Tensor, reg: float, reg_marginal: tuple[float, float]
) -> tuple[Tensor, Tensor, float, Tensor, float]:
    """The potentials (at zero weights those that the other side implies), the error and the mass of the plan, and <P, C>."""
    row_sums, column_sums = torch.empty_like(f), g.new_full(g.shape, -math.inf)
    total = 0.0
    for rows, cost in costs.blocks():
        exponent = (f[rows, None] + g - cost) / reg
        row_sums[rows] = torch.logsumexp(exponent + b.log(), 1)
        column_sums = torch.logaddexp(column_sums, torch.logsumexp(exponent + a[rows, None].log(), 0))
        total += float(((exponent + a[rows, None].log() + b.log()).exp() * cost).sum())
    damp_a, damp_b = (damping(rho, reg) for rho in reg_marginal)
    f = torch.where(a > 0, f, damp_a * (f - reg * row_sums))
    g = torch.where(b > 0, g, damp_b * (g - reg * column_sums))
    error = _off(a, row_sums, f, reg_marginal[0]) + _off(b, column_sums, g, reg_marginal[1])
    return f, g, error, torch.where(a > 0, a * row_sums.exp(), 0).sum(), total


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
    """The products P v [B, n, k] of the plans with potentials f, g for v [B, m, k]; with `transpose` P^T v [B, m, k] for v
    [B, n, k]. Rows beyond a problem's size are 0."""
    size = (b if transpose else a).shape[1]
    out = torch.zeros(a.shape[0], size, v.shape[2], dtype=torch.float64, device=v.device)
    for p, r, c, costs in _problems(x, y, a, b, metric, x_lengths, y_lengths, memory_budget):
        for some, plan in _plan_blocks(costs, f[p, r], g[p, c], a[p, r], b[p, c], reg):
            if transpose:
                out[p, c] += plan.mT @ v[p, some].double()
            else:
                out[p, some] = plan @ v[p, c].double()
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
    """The plans P [B, n, m] float64 with potentials f, g; 0 beyond a problem's size."""
    out = torch.zeros(*a.shape, b.shape[1], dtype=torch.float64, device=a.device)
    for p, r, c, costs in _problems(x, y, a, b, metric, x_lengths, y_lengths, 0):
        for some, part in _plan_blocks(costs, f[p, r], g[p, c], a[p, r], b[p, c], reg):
            out[p, some, c] = part
    return out


def _plan_blocks(
    costs: _Costs, f: Tensor, g: Tensor, a: Tensor, b: Tensor, reg: float
) -> Iterator[tuple[slice, Tensor]]:
    for rows, cost in costs.blocks():
        yield rows, ((f[rows, None] + g - cost) / reg + a[rows, None].log() + b.log()).exp()
