"""Matching pursuit and Frank-Wolfe for backends whose kernels make products and scores of the rows: the rows and columns of
their Gram matrix stay on the device, the few weights are fitted on the host.

At every step the device reports to the host which row is best, and its products with the picks; the host answers with the weights.
A triangular solve has one dependent step per pick, so that a GPU would take longer for it than the way to the host and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.tensor import check_finite
from flashcoreset.pursuit.limits import LEAST_SQUARED_SINE, UNIT_NOISE, check_products
from flashcoreset.pursuit.problem import Problem, Pursuit

_BATCH = 12  # columns of the Gram matrix at a time


@dataclass(slots=True, eq=False)
class Correlations:
    """The correlations of all rows with the residual of a pursuit, as a sum of known columns.

    Attributes:
        start: [B] float64, those with the target, or with the residual itself.
        gram: [slots, B] float64, columns of the Gram matrix.
        slots: [p] int64, the picks' places in `gram`.
        numbers: [p + 1] float64, the picks' weights, and the share of `norm` up to which correlations are rounding errors.
        norm: [B] float64, the rows' norms; infinite for rows that are not to be picked.
        magnitude: whether a row's score is the magnitude of its correlation.
    """

    start: Tensor
    gram: Tensor
    slots: Tensor
    numbers: Tensor
    norm: Tensor
    magnitude: bool


@dataclass(frozen=True)
class Launchers:
    """The kernels that a backend has; see `flashcoreset.triton_kernels.pursuit` for what the arguments are."""

    products: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], None]
    squares: Callable[[Tensor, Tensor], None]
    pick: Callable[[Correlations, Tensor, Tensor], None]
    residual: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


class _Rows:
    """The rows and what is known about them from the start; `unit_rows`: whether short ones count as much as long ones."""

    def __init__(self, launchers: Launchers, problem: Problem, *, unit_rows: bool) -> None:
        check_finite(problem.target, "target")
        problem = problem.compact()
        self.launchers = launchers
        self.g, self.target = problem.g, problem.target
        self.target_norm = math.sqrt(float(self.target.square().sum()))
        self.correlation = self.products(self.target)
        squares = torch.empty_like(self.correlation)
        launchers.squares(self.g, squares)
        self.norm = squares.sqrt()
        check_products(self.g, self.target, self.norm, self.target_norm, self.correlation, unit_rows)

    def products(self, vector: Tensor) -> Tensor:
        """The products [B] float64 of all rows with a vector [D] float64."""
        out = vector.new_empty(1, len(self.g))
        first = torch.zeros(1, dtype=torch.int64, device=vector.device)
        self.launchers.products(self.g, None, vector[None], first, out, first)
        return out[0]

    def products_of(self, j: int, rows: Tensor) -> Tensor:
        """The products [n] float64 of row j with `rows` [n] int64."""
        out = self.target.new_empty(1, len(rows))
        which = torch.tensor([j, 0], device=rows.device)
        self.launchers.products(self.g, rows, self.g, which[:1], out, which[1:])
        return out[0]

    def residual(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The part [D] float64 of the target that is left."""
        out = torch.empty_like(self.target)
        self.launchers.residual(self.g, self.target, rows, weights, out)
        return out


class _GramColumns:
    """Columns of the Gram matrix, computed as they are asked for and kept while there is room."""

    def __init__(self, problem: _Rows, slots: int) -> None:
        rows = len(problem.g)
        self.columns = problem.target.new_empty(slots, rows)
        self._problem = problem
        self._slot_of: dict[int, int] = {}  # by row
        self._owner = [-1] * slots
        self._kept = [False] * slots
        self._next = 0
        self._present = torch.zeros(rows, dtype=torch.bool, device=problem.g.device)

    def slot(self, j: int, scores: Tensor) -> int:
        """The slot of the column of row j. If the column has to be computed, those of the next best rows are computed as well."""
        if j not in self._slot_of:
            wanted = min(_BATCH, self._kept.count(False))
            self._compute([j, *self._next_best(j, scores, wanted - 1)])
        return self._slot_of[j]

    def keep(self, slot: int) -> None:
        """Keeps the column in `slot` for good."""
        self._kept[slot] = True

    def _next_best(self, j: int, scores: Tensor, count: int) -> list[int]:
        if count == 0:
            return []
        others = scores.masked_fill(self._present, -math.inf)
        others[j] = -math.inf
        best = others.topk(count)
        found = torch.stack([best.values, best.indices.double()], 1).tolist()
        return [int(row) for score, row in found if score > -math.inf]

    def _compute(self, rows: list[int]) -> None:
        slots = []
        for row in rows:
            while self._kept[self._next]:
                self._next = (self._next + 1) % len(self._owner)
            slot = self._next
            self._next = (self._next + 1) % len(self._owner)
            if (gone := self._owner[slot]) >= 0:
                del self._slot_of[gone]
                self._present[gone] = False
            self._owner[slot], self._slot_of[row] = row, slot
            slots.append(slot)
        which, places = torch.tensor([rows, slots], device=self._present.device)
        g = self._problem.g
        self._problem.launchers.products(g, None, g, which, self.columns, places)
        self._present.index_fill_(0, which, True)


def columns_kept(rows: int, k: int, memory_budget: int, *, orthogonal: bool) -> int:
    """How many columns of the Gram matrix there is room for; orthogonal pursuit keeps those of all picks or none."""
    # Columns that were computed on trial and not picked are seldom asked for later.
    count = min(max(memory_budget // (8 * rows), 1), rows, 2 * k + _BATCH)
    return 0 if orthogonal and count < min(k, rows) else count


def run_pursuit(launchers: Launchers, problem: Problem) -> Pursuit:
    """Runs orthogonal matching pursuit."""
    rows_of, k = _Rows(launchers, problem, unit_rows=False), problem.k
    g = rows_of.g
    count = columns_kept(len(g), k, problem.memory_budget, orthogonal=True)
    streamed = count == 0  # every pick costs a pass over g
    columns = _GramColumns(rows_of, count)
    active = native.module().ActiveSet(problem.nonnegative, problem.ridge, rows_of.target_norm)
    norm, products_with_target = rows_of.norm.clone(), rows_of.correlation.cpu()
    picked, slots = torch.zeros(2, k, dtype=torch.int64, device=g.device)
    scores, found = torch.empty_like(norm), norm.new_empty(2)
    picks: list[int] = []
    weights = torch.zeros(0, dtype=torch.float64)
    rest = rows_of.correlation
    norms: list[float] = []
    while len(picks) < k:
        own = 0 if streamed else len(picks)
        numbers = torch.cat([weights[:own], torch.tensor([active.noise], dtype=torch.float64)]).to(g.device)
        correlations = Correlations(
            rest, columns.columns, slots[:own], numbers, norm, not problem.nonnegative
        )
        launchers.pick(correlations, scores, found)
        score, row = found.tolist()
        if score == -math.inf:
            break
        j = int(row)
        norm[j] = math.inf  # so that no score is larger
        picked[len(picks)] = j
        rows = picked[: len(picks) + 1]
        slot = -1
        if streamed:
            products = rows_of.products_of(j, rows)
        else:
            slot = columns.slot(j, scores)
            products = columns.columns[slot].index_select(0, rows)
        if not active.add(products.cpu(), float(products_with_target[j])):
            continue
        if not streamed:
            columns.keep(slot)
            slots[len(picks)] = slot
        picks.append(j)
        weights = torch.empty(len(picks), dtype=torch.float64)
        active.weights(weights)
        # Computed from the Gram matrix, which has 16 digits of |b|^2; if few of these digits are left, from the rows.
        square = active.squared_residual
        if streamed or not square > 1e-6 * rows_of.target_norm**2:
            used = weights != 0
            chosen = torch.tensor(picks)[used]
            residual = rows_of.residual(chosen.to(g.device), weights[used].to(g.device))
            norms.append(math.sqrt(float(residual.square().sum())))
            if streamed:
                rest = rows_of.products(residual)
        else:
            norms.append(math.sqrt(square))
    kept = weights != 0
    indices = torch.tensor(picks, dtype=torch.int64)[kept]
    return Pursuit(
        indices.to(g.device),
        weights[kept].to(g.device),
        torch.tensor(norms, dtype=torch.float64, device=g.device),
    )


def run_frank_wolfe(launchers: Launchers, problem: Problem) -> Pursuit:
    """Runs Frank-Wolfe."""
    rows_of, k = _Rows(launchers, problem, unit_rows=True), problem.k
    g = rows_of.g
    kept = columns_kept(len(g), k, problem.memory_budget, orthogonal=False)
    columns = _GramColumns(rows_of, kept)
    norm = rows_of.norm
    lengths = norm * rows_of.target_norm
    inverse = torch.where(norm > 0, 1 / norm, 0)
    cosines = torch.where(lengths > 0, rows_of.correlation / lengths, 0)
    places = torch.arange(len(norm), device=norm.device)
    along, y = torch.zeros_like(norm), torch.zeros_like(rows_of.target)
    weights: dict[int, float] = {}  # of unit rows, whose sum is y
    towards, norms = 0.0, []
    for _ in range(k):
        square = 1 - along.square()
        score = (cosines - towards * along) / square.clamp_min(LEAST_SQUARED_SINE).sqrt()
        out = (square <= LEAST_SQUARED_SINE) | ~(score > UNIT_NOISE) | (lengths == 0)
        score.masked_fill_(out, -math.inf)
        # argmax does not promise the first of equal scores.
        best = torch.where(score == score.amax(), places, len(places)).amin(0, keepdim=True)
        numbers = [best.double(), *(all_of[best] for all_of in (score, cosines, along, norm))]
        row, most, cosine, near, length_of_row = torch.cat(numbers).tolist()
        if most == -math.inf:
            break
        j = int(row)
        ahead, behind = cosine - towards * near, towards - cosine * near
        part = min(max(ahead / (ahead + behind), 0.0), 1.0) if weights else 1.0
        length = math.sqrt(max((1 - part) ** 2 + part**2 + 2 * (1 - part) * part * near, 1e-300))
        old, added = (1 - part) / length, part / length
        weights = {row: weight * old for row, weight in weights.items()}
        weights[j] = weights.get(j, 0.0) + added
        scale = added / length_of_row
        along = old * along + scale * columns.columns[columns.slot(j, score)] * inverse
        y = old * y + scale * rows_of.g[j].double()
        unit = y.square().sum().sqrt()
        projection = (y * rows_of.target).sum() / unit
        residual = (rows_of.target - projection / unit * y).square().sum().sqrt()
        projected, left = torch.stack([projection, residual]).tolist()
        towards = projected / rows_of.target_norm
        norms.append(left)
    taken = [row for row, weight in weights.items() if weight > 0]
    indices = torch.tensor(taken, dtype=torch.int64, device=g.device)
    parts = torch.tensor([weights[row] for row in taken], dtype=torch.float64, device=g.device)
    found = parts * towards * rows_of.target_norm / norm[indices]
    return Pursuit(indices, found, torch.tensor(norms, dtype=torch.float64, device=g.device))
