"""Entropic transport in POT's terms: a plan u K v with K = exp(-M / reg), log-scalings in the place of potentials."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import flashcoreset as fc
from flashcoreset._core.errors import warn_caller
from flashcoreset.compat._arrays import Library, wants_gradient
from flashcoreset.compat._plan_gradient import differentiable

DID_NOT_CONVERGE = (
    "Sinkhorn did not converge. You might want to increase the number of iterations `numItermax` or the regularization "
    "parameter `reg`."
)

# Errors of marginals below this are beyond float32; such problems are solved in float64.
_LEAST_OF_FLOAT32 = 1e-6

# Sums that differ by less are the same, rounded, as for `fc.sinkhorn`.
_SAME_MASS = 1e-4

_NAMES = {
    "x": "M",
    "tol": "stopThr",
    "max_iter": "numItermax",
    "reg_marginal": "reg_m",
    "warm_start": "warmstart",
}


@dataclass(frozen=True, eq=False)
class Solved:
    """A solved problem, or several: what the functions of POT return parts of.

    Attributes:
        library: of the caller's arrays.
        costs: [n, m], also of a batch that shares them, or [B, n, m]; as the caller gave them.
        a, b: [n] and [m], or [B, n] and [B, m].
        transport: of these costs, or of `costs` plus what makes another entropy of the kernels'; transposed if `is_transposed`.
        rows_last: whether the last update was that of the rows.
        rho: penalties of the marginals; infinite if these hold.
        reference: what the entropy is relative to, and a part of K: "product" for a x b, "ones" for nothing.
        is_relaxed: whether the problem was posed with penalties, infinite ones too.
    """

    library: Library
    costs: Tensor
    a: Tensor
    b: Tensor
    reg: float
    transport: fc.Transport
    is_transposed: bool = False
    rows_last: bool = True
    rho: tuple[float, float] = (math.inf, math.inf)
    reference: str = "ones"
    is_relaxed: bool = False

    @cached_property
    def log_scalings(self) -> tuple[Tensor, Tensor]:
        """log u and log v of the plan u K v, in float64."""
        f, g = self.potentials
        if self.is_relaxed:  # K has the weights, or `transport` has costs without them
            return f / self.reg, g / self.reg
        return f / self.reg + _log(self.a), g / self.reg + _log(self.b)

    @property
    def potentials(self) -> tuple[Tensor, Tensor]:
        f, g = self.transport.f.double(), self.transport.g.double()
        return (g, f) if self.is_transposed else (f, g)

    @cached_property
    def plan(self) -> Tensor:
        """The plan, a function of costs and weights if these ask for gradients."""
        plan = self.transport.plan()
        plan = plan.mT if self.is_transposed else plan
        if not self.wants_gradient:
            return plan
        batched = plan.dim() == 3
        costs = self.costs.expand_as(plan)
        plan, costs, a, b = (t if batched else t[None] for t in (plan, costs, self.a, self.b))
        plan = differentiable(
            plan, costs, a, b, reg=self.reg, rho=self.rho, rows_last=self.rows_last,
            product_reference=self.reference == "product",
        )  # fmt: skip
        return plan if batched else plan[0]

    @property
    def cost(self) -> Tensor:
        """<P, costs>, per problem."""
        if self.wants_gradient or (self.is_relaxed and self.reference == "ones"):
            return (self.costs * self.plan).sum((-2, -1))
        return self.transport.transport_cost

    @property
    def wants_gradient(self) -> bool:
        return wants_gradient(self.costs, self.a, self.b)

    @property
    def iterations(self) -> int:
        return int(self.transport.iterations.max())

    @property
    def error(self) -> Tensor:
        """The error at which the problems were judged, of all of them together."""
        return self.transport.error.norm()

    @property
    def converged(self) -> bool:
        return bool(self.transport.converged.all())


def weights(value: Tensor | None, size: int, like: Tensor) -> Tensor:
    """The weights that a caller gave, or uniform ones."""
    return like.new_full((size,), 1 / size) if value is None else value


def number(call: str, name: str, value: Any) -> float:
    """`value` as a float; a tensor that asks for gradients is refused, since none would come."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise NotImplementedError(
            f"{call}: gradients with respect to {name} are not supported here; the peer's {call} has them"
        )
    return float(value)


def solve(
    call: str,
    library: Library,
    costs: Tensor,
    a: Tensor,
    b: Tensor,
    reg: float,
    *,
    max_iter: int,
    tol: float,
    start: tuple[Tensor, Tensor] | None = None,
    rows_last: bool = True,
    names: dict[str, str] = _NAMES,
) -> Solved:
    """Balanced transport.

    Args:
        call: the function of POT, for messages. names: its names of arguments.
        costs: [n, m] or [B, n, m]. a, b: [n] or [B, n], [m] or [B, m]; [B, n] and [B, m] for costs [n, m] that all share.
        max_iter, tol: the most iterations, and the L2 error of the marginals to stop at, of each problem, as in POT; 0 makes just POT's
            iterations, in its order and from its start.
        start: log-scalings (log u, log v).
    """
    exact = costs.detach()
    if 0 < tol < _LEAST_OF_FLOAT32:
        exact = exact.double()
    rows, columns = a.detach().double(), b.detach().double()
    transposed = tol <= 0 and rows_last
    if tol <= 0 and start is None:
        start = torch.zeros_like(rows), torch.zeros_like(columns)
    warm = None if start is None else warm_potentials(start, (rows, columns), reg)
    if transposed:
        exact, rows, columns = exact.mT, columns, rows
        warm = None if warm is None else warm[::-1]
    try:
        transport = run(
            call, names, exact, None, rows, columns, reg=reg, metric="precomputed", max_iter=max_iter, tol=max(tol, 0.0),
            norm="l2", warm_start=warm,
        )  # fmt: skip
    except ValueError:
        scaled = _of_one_mass(call, a, b, rows_last)
        if scaled is None:
            raise
        return solve(
            call, library, costs, *scaled, reg, max_iter=max_iter, tol=tol, start=start, rows_last=rows_last, names=names
        )  # fmt: skip
    return Solved(library, costs, a, b, reg, transport, transposed, rows_last)


def solve_relaxed(
    call: str,
    library: Library,
    costs: Tensor,
    a: Tensor,
    b: Tensor,
    reg: float,
    rho: tuple[float, float],
    *,
    reference: str,
    max_iter: int,
    tol: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> Solved:
    """Transport with penalties `rho` of its marginals, the entropy relative to `reference`; other arguments as in `solve`."""
    exact = costs.detach()
    if tol < _LEAST_OF_FLOAT32:
        exact = exact.double()
    rows, columns = a.detach().double(), b.detach().double()
    if reference == "ones":
        logs = (
            torch.where(w > 0, w, 1).log() for w in (rows, columns)
        )  # no plan has mass where there is none
        exact = exact + (reg * (next(logs)[..., :, None] + next(logs)[..., None, :])).to(exact.dtype)
    warm = None
    if start is not None or tol <= 0:
        given = start or (torch.zeros_like(rows), torch.zeros_like(columns))
        warm = tuple(
            torch.where(w > 0, reg * s.detach().double(), 0)
            for s, w in zip(given, (rows, columns), strict=True)
        )
    try:
        transport = run(
            call, _NAMES, exact, None, rows, columns, reg=reg, metric="precomputed",
            reg_marginal=tuple(None if math.isinf(r) else r for r in rho), max_iter=max_iter, tol=max(tol, 0.0),
            warm_start=warm,
        )  # fmt: skip
    except ValueError:
        scaled = _of_one_mass(call, a, b, rows_last=False) if all(map(math.isinf, rho)) else None
        if scaled is None:
            raise
        return solve_relaxed(
            call, library, costs, *scaled, reg, rho, reference=reference, max_iter=max_iter, tol=tol, start=start
        )  # fmt: skip
    return Solved(library, costs, a, b, reg, transport, False, False, rho, reference, True)


def _log(weights: Tensor) -> Tensor:
    return weights.detach().double().log()


def _of_one_mass(call: str, a: Tensor, b: Tensor, rows_last: bool) -> tuple[Tensor, Tensor] | None:
    """Weights of balanced problems whose sums differ, the side that POT's iterations do not end with scaled to the other's; None if the
    sums are the same, or none."""
    masses = a.detach().double().sum(-1, keepdim=True), b.detach().double().sum(-1, keepdim=True)
    if not all(bool((t.isfinite() & (t > 0)).all()) for t in masses):
        return None
    if bool(((masses[0] - masses[1]).abs() <= _SAME_MASS * torch.maximum(*masses)).all()):
        return None
    warn_caller(
        f"{call}: a and b have the sums {float(masses[0].flatten()[0]):.6g} and {float(masses[1].flatten()[0]):.6g}, so that no "
        f"plan has both as marginals; {'b' if rows_last else 'a'} is scaled to the sum of {'a' if rows_last else 'b'}",
        fc.ConvergenceWarning,
    )
    sums = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    return (a, b * (sums[0] / sums[1])) if rows_last else (a * (sums[1] / sums[0]), b)


def show(solved: Solved) -> None:
    """Prints the last line of POT's table of iterations and errors."""
    print("{:5s}|{:12s}".format("It.", "Err") + "\n" + "-" * 19)
    print(f"{solved.iterations - 1:5d}|{float(solved.error):8e}|")


def warm_potentials(
    scalings: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], reg: float
) -> tuple[Tensor, Tensor]:
    """Potentials from the log-scalings of a plan u K v whose K has no weights."""
    f, g = (
        torch.where(weight > 0, reg * (scaling.detach().double() - weight.log()), 0)
        for scaling, weight in zip(scalings, weights, strict=True)
    )
    return f, g


def run(
    call: str, names: dict[str, str], x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, **options: Any
) -> fc.Transport:
    """`fc.sinkhorn`, with the caller's names of arguments in errors, and without a warning of ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.ConvergenceWarning)
            return fc.sinkhorn(x, y, a, b, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}: {in_names(str(error), names)}") from None


def in_names(message: str, names: dict[str, str]) -> str:
    """An error's message with the argument that it begins with under the peer's name."""
    first = re.match(r"\w+", message)
    return message if first is None else names.get(first[0], first[0]) + message[first.end() :]
