"""A weighted subset with the weighted mean and total weight of all rows, in plain torch: the definition that the kernels
are tested against.

Row i with weight w_i > 0 is the vector M_i = w_i (1, x_i - mean) of d + 1 numbers, and rho_i = 1 its factor. While the
vectors are linearly dependent there is a v != 0 with sum_i v_i M_i = 0; then rho - t v has the same sum for every t, and
the smallest t > 0 that brings a factor to 0 drops that row. At most rank(M) rows are left, d + 1 at the most.

Clusters: in place of the n rows, 2 (d + 2) sums of neighbouring rows are reduced, a sum's factor belongs to all
of its rows, and the rows that are left, about half, are clustered anew.

With `max_size` = k the factors are bounded too, rho_i w_i <= sum_i w_i / (k - d - 1), null vectors of d + 2 rows that
are neither dropped nor at their bound lead to one of these ends, and the reduction stops at k rows: few of them have
other weights than the bound. Which of the two directions is taken is drawn (by fixed numbers) so that the mean of each
factor stays 1, which makes a balanced random sample of it.

The subset is not unique: backends agree in its sums, not in its members.

Sources: Caratheodory, "Über den Variabilitätsbereich der Koeffizienten von Potenzreihen, die gegebene Werte nicht
annehmen", Mathematische Annalen 64, 1907; Maalouf, Jubran and Feldman, "Fast and accurate least-mean-squares solvers",
NeurIPS 2019, algorithms 1 and 2; Deville and Tillé, "Efficient balanced sampling: the cube method", Biometrika 91,
2004 (the flight phase, for `max_size`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset._core.philox import uniforms
from flashcoreset._core.tensor import check_finite
from flashcoreset.caratheodory.problem import Problem

TAKES = Takes()

_EPS = torch.finfo(torch.float64).eps


def caratheodory(problem: Problem, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    x, weights, max_size = problem.x, problem.weights, problem.max_size
    check_finite(x, "x")
    if x.dtype == torch.float64:  # so that sums of huge columns stay finite
        x = torch.where(x.abs().amax(0) > 2.0**900, x * 2.0**-200, x)
    n, d = x.shape
    if weights is None:
        weights = torch.ones(n, dtype=torch.float64, device=x.device)
    rows = (weights > 0).nonzero()[:, 0]
    w = weights[rows] / weights.max()
    # Columns whose sums could overflow are shrunk by a power of two: numbers that vanish were rounding beside the column's largest number.
    most = x.abs().amax(0).to(torch.float64)
    shrink = torch.where(most > 2.0**900, 2.0**-100, 1.0).to(torch.float64)
    if max_size > 0:
        w = w * _even(_sums(x[rows].to(torch.float64) * shrink, w, 1), w, max_size)
        rows, w = rows[w > 0], w[w > 0]
    size = 0 if max_size > 0 else 2
    while size > 1:
        size = -(-len(rows) // (2 * (d + 2)))
        rho = _reduce(_sums(x[rows].to(torch.float64) * shrink, w, size))
        w = w * rho.repeat_interleave(size)[: len(rows)]
        if not (w.isfinite().all() and w.any()):  # otherwise rows would go or stay for no reason
            raise ValueError("x, weights: sums of their products are not finite; scale them down")
        rows, w = rows[w > 0], w[w > 0]
    w = w * weights.max()
    if out is None:
        return rows, w
    out[0][: len(rows)], out[1][: len(rows)] = rows, w
    return out[0][: len(rows)], out[1][: len(rows)]


def _sums(x: Tensor, w: Tensor, size: int) -> Tensor:
    """The sums [m, d + 1] of w_i (1, x_i - mean) over `size` neighbouring rows, each column scaled to a largest magnitude of
    1; a column whose differences are only rounding is 0."""
    mean = (w / w.sum()) @ x
    vectors = w[:, None] * torch.cat([torch.ones_like(w)[:, None], x - mean], 1)
    least = 8 * _EPS * w.max() * torch.cat([torch.zeros(1, dtype=w.dtype, device=w.device), mean.abs()])
    runs = torch.arange(len(w), device=w.device) // size
    sums = vectors.new_zeros(int(runs[-1]) + 1, vectors.shape[1]).index_add_(0, runs, vectors)
    most = sums.abs().amax(0)
    return torch.where(most > size * least, sums / most, 0)


def _reduce(vectors: Tensor) -> Tensor:
    """Factors [m] >= 0 of vectors [m, d + 1] that keep the sum of the vectors, as few factors > 0 as possible."""
    rho = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
    while True:
        # d + 2 vectors always have a null vector.
        live = rho.nonzero()[:, 0][: vectors.shape[1] + 1]
        v = _null_vector(vectors[live].T)
        if v is None:
            return rho
        v = v if v.max() > -v.min() else -v
        steps = torch.where(v > 0, rho[live] / v, torch.inf)
        first = steps.argmin()
        rho[live] = (rho[live] - steps[first] * v).clamp(min=0)
        rho[live[first]] = 0


def _even(vectors: Tensor, w: Tensor, max_size: int) -> Tensor:
    """Factors as in `_reduce` for the vectors of single rows of weights w [n], but no row's weight grows beyond the bound, and at most
    `max_size` factors are > 0 if so few are enough."""
    dim = vectors.shape[1]
    even = float(w.sum()) / (max_size - dim) if max_size > dim else torch.inf
    bound = torch.where(w < even, even / w, 1)
    rho = torch.ones_like(w)
    step = 0
    while int((rho > 0).sum()) > max_size:
        live = ((rho > 0) & (rho < bound)).nonzero()[:, 0][: dim + 1]
        v = None if len(live) == 0 else _null_vector(vectors[live].T)
        if v is None:
            break
        at, most = rho[live], bound[live]
        rooms = [torch.where(u > 0, (most - at) / u, torch.where(u < 0, -at / u, torch.inf)) for u in (v, -v)]
        up, down = float(rooms[0].min()), float(rooms[1].min())
        back = bool(uniforms(0, step, 1)[0] * (up + down) >= down)
        first = int(rooms[back].argmin())
        u = -v if back else v
        rho[live] = torch.minimum((at + (down if back else up) * u).clamp(min=0), most)
        rho[live[first]] = most[first] if u[first] > 0 else 0
        step += 1
    return rho


def _null_vector(matrix: Tensor) -> Tensor | None:
    """A unit vector [m] that `matrix` [D, m] takes to 0, or None."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    _, values, basis = torch.linalg.svd(matrix)
    full = len(values) == matrix.shape[1]
    if full and values[-1] > _EPS * 4 * max(matrix.shape[1], 16) * values[0]:
        return None
    return basis[-1]
