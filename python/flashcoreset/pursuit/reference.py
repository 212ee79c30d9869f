"""Matching pursuit and Frank-Wolfe as they are defined, in float64: every fit is a least-squares solve of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset._core.tensor import check_finite
from flashcoreset.pursuit.limits import (
    _OVERFLOW,
    DEPENDENT,
    LEAST_SQUARED_SINE,
    NOISE,
    UNIT_NOISE,
    check_products,
)
from flashcoreset.pursuit.problem import Problem, Pursuit

TAKES = Takes()


def orthogonal_matching_pursuit(problem: Problem) -> Pursuit:
    """Picks up to k rows of g [B, D] and weights w that make |sum_i w_i g_i - target|^2 + ridge |w|^2 small.

    A step picks the row of the largest inner product with the residual target - sum_i w_i g_i (of the largest
    magnitude, unless `nonnegative`), ties to the lowest index, and then fits the weights of all picks anew: by least
    squares, or under w >= 0. No row is picked twice. A pick whose weight became 0 stays among the picks, so that a
    later fit may give it weight again; picks that have weight 0 in the end are left out. A row that depends on those in use is
    passed over, and the run ends early when no row has a positive correlation that is more than rounding.

    Source: Killamsetty, Sivasubramanian, Ramakrishnan, De and Iyer, "GRAD-MATCH: gradient matching based data subset
    selection for efficient deep model training", ICML 2021, algorithm 2.
    """
    nonnegative, ridge = problem.nonnegative, problem.ridge
    rows, b, norms = _checked(problem, False)
    picks: list[int] = []
    weights = rows.new_zeros(0)
    free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    residual, residual_norms = b, []
    while len(picks) < problem.k:
        rest = (rows * residual).sum(1)  # row by row, so that equal rows give equal bits
        score = rest if nonnegative else rest.abs()
        scale = b.norm() + (weights.abs() * norms[picks]).sum()
        score[~free | (score <= NOISE * scale * norms)] = -torch.inf
        j = int(score.argmax())
        if score[j] == -torch.inf:
            break
        free[j] = False
        used = [
            p for p, weight in zip(picks, weights.tolist(), strict=True) if weight != 0 or not nonnegative
        ]
        if _depends(rows[j], rows[used], ridge):
            continue
        picks.append(j)
        weights = torch.cat([weights, weights.new_zeros(1)])
        if nonnegative:
            weights = _nonnegative_fit(rows[picks], b, ridge, weights)
        else:
            weights = _fit(rows[picks], b, ridge)
        residual = b - rows[picks].T @ weights
        residual_norms.append(residual.norm())
    kept = weights != 0
    indices = torch.tensor(picks, dtype=torch.int64, device=rows.device)
    return Pursuit(indices[kept], weights[kept], torch.stack(residual_norms) if picks else rows.new_zeros(0))


def frank_wolfe(problem: Problem) -> Pursuit:
    """Picks rows of g [B, D] and weights >= 0 by k steps on the unit sphere towards the target.

    A step moves the direction y, a unit vector, along the geodesic towards the unit row whose geodesic from y points
    most nearly at the target (the first of equally good rows; the row may have been picked before), as far as brings y
    nearest to the target. The weights are in the end scaled so that the sum is the target's projection on y. The run
    ends early when no row leads nearer.

    The rows are in the order of their first pick.

    Source: Campbell and Broderick, "Bayesian coreset construction via greedy iterative geodesic ascent", ICML 2018,
    algorithm 1.
    """
    rows, b, norms = _checked(problem, True)
    units = torch.where(norms[:, None] > 0, rows / norms[:, None], 0)
    goal = b / b.norm() if b.norm() > 0 else b
    cosines = (units * goal).sum(1)
    weights = torch.zeros_like(norms)
    y, towards = torch.zeros_like(b), 0.0
    picks: list[int] = []
    residual_norms = []
    for _ in range(problem.k):
        along = (units * y).sum(1)
        square = 1 - along**2
        score = torch.where(
            square > LEAST_SQUARED_SINE, (cosines - towards * along) / square.sqrt(), -torch.inf
        )
        j = int(score.argmax())
        if not score[j] > UNIT_NOISE:
            break
        ahead, behind = cosines[j] - towards * along[j], towards - cosines[j] * along[j]
        part = (ahead / (ahead + behind)).clamp(0, 1) if picks else torch.ones_like(ahead)
        y = (1 - part) * y + part * units[j]
        weights = (1 - part) * weights
        weights[j] += part
        weights, y = weights / y.norm(), y / y.norm()
        towards = float(y @ goal)
        if j not in picks:
            picks.append(j)
        residual_norms.append((b - (y @ b) * y).norm())
    indices = torch.tensor(picks, dtype=torch.int64, device=rows.device)
    found = weights[indices] * towards * b.norm() / norms[indices]
    kept = found > 0
    return Pursuit(indices[kept], found[kept], torch.stack(residual_norms) if picks else rows.new_zeros(0))


def _checked(problem: Problem, unit_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rows and the target in float64, and the norms of the rows; see `check_products`."""
    g, target = problem.g, problem.target
    check_finite(target, "target")
    check_finite(g, "g")
    rows, b = g.double(), target.double()
    norms = (rows * rows).sum(1).sqrt()
    check_products(g, target, norms, float(b.norm()), (rows * b).sum(1), unit_rows)
    return rows, b, norms


def _fit(rows: Tensor, b: Tensor, ridge: float) -> Tensor:
    """The w with the least |rows' w - b|^2 + ridge |w|^2."""
    if len(rows) == 0:
        return rows.new_zeros(0)
    # The penalty stands first, and the unknowns are w times its root: below the rows, or unscaled, a large penalty would cost digits
    # of the rows in the QR factors.
    root = ridge**0.5
    unit = max(1.0, root)
    penalty = root / unit * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    matrix, right = torch.cat([penalty, rows.T / unit]), torch.cat([b.new_zeros(len(rows)), b])
    # "gelsy", the default on the CPU, pivots by memory that torch does not set: its bits vary from call to call.
    found = torch.linalg.lstsq(matrix, right[:, None], driver="gels").solution[:, 0] / unit
    if not found.isfinite().all():  # otherwise the active-set loop would never end
        raise ValueError(_OVERFLOW)
    return found


def _nonnegative_fit(rows: Tensor, b: Tensor, ridge: float, weights: Tensor) -> Tensor:
    """The least w as in `_fit` under w >= 0, by the active-set method of Lawson and Hanson ("Solving least squares problems", 1974,
    chapter 23) from `weights`, whose last entry, 0, is that of the row that joined."""
    weights = weights.clone()
    used = weights > 0
    used[-1] = True
    norms = (rows * rows).sum(1).sqrt()
    barred = torch.zeros_like(used)
    entered = len(rows) - 1
    for _ in range(3 * len(rows) + 3):  # rounding could make rows come and go in a circle
        while True:
            z = torch.zeros_like(weights)
            z[used] = _fit(rows[used], b, ridge)
            falls = used & (z <= 0)
            if not falls.any():
                break
            reach = torch.where(falls, weights / (weights - z).clamp_min(1e-300), torch.inf)
            step = reach.min()
            gone = falls & (reach <= step)
            if step == 0:
                barred[entered] |= gone[entered]
            weights = torch.where(gone, 0, (weights + step * (z - weights)).clamp_min(0) * used)
            used &= ~gone
        weights = z
        residual = b - rows.T @ weights
        noise = NOISE * (b.norm() + (weights * norms).sum()) * norms
        while True:
            rest = torch.where(used | barred, -torch.inf, (rows * residual).sum(1) - noise)
            entered = int(rest.argmax())
            if rest[entered] <= 0:
                return weights
            if not _depends(rows[entered], rows[used], ridge):
                break
            barred[entered] = True
        used[entered] = True
    return weights


def _depends(row: Tensor, others: Tensor, ridge: float) -> bool:
    fitted = _fit(others, row, ridge)
    squared = (row - others.T @ fitted).square().sum() + ridge * fitted.square().sum() + ridge
    return not bool(squared > DEPENDENT * (row.square().sum() + ridge))
