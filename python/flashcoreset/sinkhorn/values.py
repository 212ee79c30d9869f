"""Checks of the values of a problem, which the ops make: torch.compile cannot trace them. The kernels check points and costs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset.sinkhorn.problem import Problem, inside, masked

_INF = math.inf

# Sums of weights whose relative difference is smaller count as the same number, rounded.
_SAME_MASS = 1e-4

# Potentials that are this many times costs or reg leave 7 digits for costs and reg in float64.
_DIGITS = 1e9
# A penalty that is this many times costs and reg holds its marginal to nearly all digits of float64.
_LARGEST_RHO = 1e12


def check_values(p: Problem, weights_too: bool) -> None:
    """Checks lengths, potentials, masses and, if the kernels do not check them, weights."""
    for name, weight, _, lengths in p.sides:
        size, name = weight.shape[1], "x_lengths" if name == "a" else "y_lengths"
        if lengths is not None and bool((bad := (lengths < 1) | (lengths > size)).any()):
            worst = int(bad.nonzero()[0])
            raise ValueError(f"{name} must be in [1, {size}], got {int(lengths[worst])} for problem {worst}")
    _check_potentials(p)
    if not p.weighted:
        return
    weights = [masked(weight.detach(), lengths) for _, weight, _, lengths in p.sides]
    masses = [weight.sum(1) for weight in weights]
    if weights_too:
        for name, weight, mass in zip("ab", weights, masses, strict=True):
            _check_weights(p, name, weight, mass)
    if p.balanced:
        _check_masses(p, *masses)


def _check_weights(p: Problem, name: str, weights: Tensor, mass: Tensor) -> None:
    least = weights.amin(1)  # NaN if there is one
    if p.has_few_numbers:
        if all(number >= 0 for number in least.tolist()) and all(0 < m < _INF for m in mass.tolist()):
            return
    elif bool(((least >= 0) & (mass > 0) & (mass < _INF)).all()):
        return
    if bool((bad := ~((weights >= 0) & torch.isfinite(weights))).any()):
        problem, place = bad.nonzero()[0].tolist()
        got = float(weights[problem, place])
        raise ValueError(f"{name} must be finite and >= 0, got {got} at position {place}{p.within(problem)}")
    if bool((bad := ~(mass > 0)).any()):
        raise ValueError(f"{name} must have a weight > 0, got none{p.within(int(bad.nonzero()[0]))}")
    raise ValueError(f"{name} must have a finite sum{p.within(int(torch.isinf(mass).nonzero()[0]))}")


def _masses(p: Problem) -> tuple[Tensor, Tensor]:
    a, b = (masked(weight.detach(), lengths).sum(1) for _, weight, _, lengths in p.sides)
    return a, b


def _check_masses(p: Problem, a: Tensor, b: Tensor) -> None:
    """Checks the masses, before `Problem.ready` makes those of balanced problems equal."""
    if p.has_few_numbers:
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        if not any(abs(one - other) > _SAME_MASS * max(one, other) for one, other in pairs):
            return
    differ = (a - b).abs() > _SAME_MASS * torch.maximum(a, b)
    if bool(differ.any()):
        problem = int(differ.nonzero()[0])
        raise ValueError(
            f"a and b must have the same sum for balanced transport, got {float(a[problem]):.6g} and "
            f"{float(b[problem]):.6g}{p.within(problem)}; scale one of them, or relax the marginals with reg_marginal"
        )


def _check_potentials(p: Problem) -> None:
    """Refuses potentials that are not finite or far larger than costs and reg: those leave no digits for costs and reg, whatever
    an iteration does."""
    if p.f is None:
        return
    seen = [masked(potential, lengths) for _, _, potential, lengths in p.sides if potential is not None]
    for name, potential in zip("fg", seen, strict=True):
        if not bool(torch.isfinite(potential).all()):
            problem = int((~torch.isfinite(potential)).nonzero()[0, 0])
            raise ValueError(f"warm_start: {name} must be finite{p.within(problem)}")
    for name, potential in zip("fg", seen, strict=True):
        most = potential.abs().amax(1)
        if not bool((most > _DIGITS * p.reg).any()):
            continue
        allowed = _DIGITS * _largest_costs(p).clamp(min=p.reg)
        if bool((most > allowed).any()):
            worst = int((most > allowed).nonzero()[0])
            raise ValueError(
                f"warm_start: {name} must be potentials of costs like these, at most {float(allowed[worst]):.3g} for reg "
                f"{p.reg:.3g}, got {float(most[worst]):.3g}{p.within(worst)}"
            )


def _largest_costs(p: Problem) -> Tensor:
    """Bounds [B] float64: at least the largest |C_ij| of each problem. Takes a pass over the data, so only for unusual magnitudes."""
    if p.metric == "cosine":
        return torch.full((p.x.shape[0],), 2.0, dtype=torch.float64, device=p.x.device)
    most = []
    for points, lengths in ((p.x, p.x_lengths), (p.y, p.y_lengths)):
        if points is None:
            continue
        values = points.detach().double().abs()
        if p.y is None:
            values = torch.where(values < _INF, values, 0)  # forbidden pairs
        values = masked(values, lengths)
        if p.y is None:
            if p.y_lengths is not None:
                values = torch.where(inside(p.y_lengths, values.shape[2])[:, None], values, 0)
            most.append(values.amax((1, 2)).expand(len(p.a)))
            continue
        largest = values.amax(2)  # squares of the others may overflow
        far = (values / torch.where(largest > 0, largest, 1)[:, :, None]).norm(
            1 if p.metric == "l1" else 2, dim=2
        )
        most.append((far * largest).amax(1))
    total = sum(most[1:], most[0])
    return total**2 if p.metric == "sqeuclidean" else total


def with_marginals_that_hold(p: Problem) -> Problem:
    """`p` with an infinite rho for one so large beside costs and reg that nothing of its marginal would be relaxed; refused if the
    potentials would be too large for the digits that costs need."""
    given = (p.rho_a, p.rho_b)
    if not any(_DIGITS * p.reg < rho < _INF for rho in given):
        return p
    largest = float(_largest_costs(p).max())
    if not largest < _INF:
        return p  # refused by the kernels, by name
    scale = max(p.reg, largest)
    kept = [_INF if rho > _LARGEST_RHO * scale else rho for rho in given]
    masses = _masses(p)
    # The constant that differing masses ask for.
    rho = 1 / sum(1 / max(r, 1e-300) for r in given)
    constant = rho * (masses[0].log() - masses[1].log()).abs()
    far = constant > _DIGITS * scale
    if all(map(math.isinf, kept)):
        far = (masses[0] - masses[1]).abs() > 1e-12 * torch.maximum(*masses)  # more than rounding
    if bool(far.any()):
        problem = int(far.nonzero()[0])
        shown = ", ".join("None" if r == _INF else f"{r:.3g}" for r in given)
        raise ValueError(
            f"reg_marginal of {shown} all but holds the marginals, whose sums differ: a has {float(masses[0][problem]):.6g}, "
            f"b {float(masses[1][problem]):.6g}{p.within(problem)}; scale one of them, or make reg_marginal smaller"
        )
    return replace(p, rho_a=kept[0], rho_b=kept[1])


def check_allowed(p: Problem) -> None:
    """Refuses costs that forbid all pairs of a line with weight. Takes a pass over the costs, so only if a run has failed."""
    if p.y is not None:
        return
    a, b = (masked(weight.detach(), lengths) for _, weight, _, lengths in p.sides)
    allowed = p.each_x.detach() < _INF
    sides = (
        ("a", "row", a, (allowed & (b > 0)[:, None]).any(2)),
        ("b", "column", b, (allowed & (a > 0)[:, :, None]).any(1)),
    )
    for name, line, weight, there in sides:
        if bool((alone := (weight > 0) & ~there).any()):
            problem, place = alone.nonzero()[0].tolist()
            raise ValueError(
                f"x must allow a pair of each row and column with weight, got +inf in {line} {place}{p.within(problem)} wherever the "
                f"other side has weight, and {float(weight[problem, place]):.3g} in {name}"
            )
