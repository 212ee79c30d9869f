"""SimCore's orders and rounds in plain torch: the definition that the compiled kernel is tested against.

Item i of the open set has the similarity s[i, c] to list c (a centroid): the cosine of their features. In a
round every list takes its most similar item that no EARLIER round took; two lists may take the same item in
one round, and then it counts once. A round's value is the mean over the lists of the similarities they took.
Ties go to the lowest item.

Source: Kim, Bae and Yun, "Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning", CVPR
2023, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.nearest_order.backend import Taken
from flashcoreset.nearest_order.rows import normalize_rows

TAKES = Takes()


def similarities(x: Tensor, centroids: Tensor) -> Tensor:
    """Cosines [r, K] of the rows of `x` [r, d] and of `centroids` [K, d], whose rows are normalized already.

    Summed feature by feature, because the last bits of a matrix product depend on its number of rows, and a
    similarity must not depend on that.
    """
    x = normalize_rows(x)
    s = x.new_zeros(x.shape[0], centroids.shape[0])
    for feature in range(x.shape[1]):
        s += x[:, feature, None] * centroids[:, feature]
    return s


class NearestOrder:
    """For each of K lists its most similar items in order, kept while the items stream by.

    A pass over the items is `begin`, any number of `update` calls (or `update_similarities` calls),
    `finish`; then `rounds` takes items. When a list has no item left that was not taken, although there are
    such items, `rounds` stops early: another pass over the same items is needed, which keeps the best
    items not taken yet.
    """

    def __init__(self, centroids: Tensor) -> None:
        """Takes `centroids` [K, d], of unit length or zero; [K, 0] if similarities are given instead of
        features.
        """
        self._centroids = centroids
        self._taken: Tensor | None = None
        self._rows = 0

    @classmethod
    def of_similarities(cls, lists: int, dtype: torch.dtype = torch.float32) -> NearestOrder:
        """An order fed by `update_similarities`."""
        return cls(torch.empty(lists, 0, dtype=dtype))

    def begin(self, length: int) -> None:
        """Starts a pass that keeps up to `length` items per list."""
        self._length = length
        self._rows = 0
        self._values = self._centroids.new_empty(self._centroids.shape[0], 0)
        self._items = torch.empty_like(self._values, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Adds the next items: features [r, d]."""
        self._check_finite(x, "openset")
        self._add(similarities(x, self._centroids))

    def update_similarities(self, s: Tensor) -> None:
        """Adds the next items: their similarities [r, K] to every list."""
        self._check_finite(s, "similarities")
        self._add(s)

    def _check_finite(self, x: Tensor, name: str) -> None:
        bad = ~torch.isfinite(x)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name} must be finite, got {x[row, column].item()} "
                f"at row {self._rows + row}, column {column}"
            )

    def _add(self, s: Tensor) -> None:
        items = torch.arange(self._rows, self._rows + s.shape[0], device=s.device)
        self._rows += s.shape[0]
        if self._taken is not None:
            free = ~self._taken[items]
            items, s = items[free], s[free]
        # Kept items stand before new ones, and the sort is stable: equal similarities stay in the order
        # of the items.
        values = torch.cat([self._values, s.T], dim=1)
        items = torch.cat([self._items, items.expand(s.shape[1], -1)], dim=1)
        order = torch.argsort(values, dim=1, descending=True, stable=True)[:, : self._length]
        self._values = values.gather(1, order)
        self._items = items.gather(1, order)

    def finish(self) -> int:
        """Ends the pass and returns the number of items seen in it."""
        if self._taken is None:
            self._taken = torch.zeros(self._rows, dtype=torch.bool, device=self._values.device)
        return self._rows

    @property
    def taken(self) -> int:
        """The number of items taken so far."""
        return 0 if self._taken is None else int(self._taken.sum())

    def order(self, index: int) -> tuple[Tensor, Tensor]:
        """The items and similarities that list `index` keeps, most similar first."""
        return self._items[index], self._values[index]

    def rounds(self, count: int, k: int) -> Taken:
        """Makes up to `count` further rounds.

        Ends early after the round with which `k` items or more are taken in all, when every item is taken,
        and when a list needs another pass.
        """
        if self._taken is None:
            raise ValueError("no pass is finished: call begin(), update() and finish() first")
        items: list[int] = []
        takers: list[int] = []
        similarities: list[float] = []
        counts: list[int] = []
        values: list[float] = []
        taken = self.taken
        while len(counts) < count and taken < min(k, self._rows):
            free = ~self._taken[self._items]
            if not free.any(dim=1).all():
                break
            place = free.to(torch.uint8).argmax(dim=1, keepdim=True)
            chosen = self._items.gather(1, place).flatten().tolist()
            new = list(dict.fromkeys(chosen))
            total = 0.0
            taking = self._values.gather(1, place).flatten().tolist()
            for value in taking:
                total += value
            takers += [chosen.index(item) for item in new]
            similarities += [taking[chosen.index(item)] for item in new]
            self._taken[new] = True
            taken += len(new)
            items += new
            counts.append(len(new))
            values.append(total / len(place))
        return Taken(
            torch.tensor(items, dtype=torch.int64),
            counts,
            values,
            torch.tensor(takers, dtype=torch.int64),
            torch.tensor(similarities, dtype=torch.float64),
        )
