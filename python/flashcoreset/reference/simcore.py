"""SimCore's orders and rounds in plain torch: the definition that the compiled kernel is tested against.

Item i of the open set has the similarity s[i, c] to list c (a centroid): the cosine of their features. In a round every list takes
its most similar item that no EARLIER round took; two lists may take the same item in one round, where it counts once. A round's
value is the mean over the lists of the similarities they took. Ties go to the lowest item.

Source: Kim, Bae and Yun, "Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning", CVPR 2023, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_rows(x: Tensor) -> Tensor:
    """`x` [n, d] with every row divided by its Euclidean norm; a zero row stays zero.

    The row is first divided by its largest magnitude, so that squares neither overflow nor vanish.
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    norm = x.square().sum(dim=1, keepdim=True).sqrt()
    return x / torch.where(norm > 0, norm, 1)


def similarities(x: Tensor, centroids: Tensor) -> Tensor:
    """Cosines [r, K] of the rows of `x` [r, d] and of `centroids` [K, d], whose rows are normalized already.

    Summed feature by feature, because the last bits of a matrix product depend on the number of rows given to it, and a similarity
    must not.
    """
    x = normalize_rows(x)
    s = x.new_zeros(x.shape[0], centroids.shape[0])
    for feature in range(x.shape[1]):
        s += x[:, feature, None] * centroids[:, feature]
    return s


class NearestOrder:
    """For each of K lists its most similar items in order, kept while the items stream by.

    A pass over the items is `begin`, any number of `update` calls (or `update_similarities` calls), `finish`; then `rounds` takes
    items. When a list has no item left that was not taken, although there are such items, `rounds` stops early: another pass
    over the same items is needed, which keeps the best of those not taken yet.
    """

    def __init__(self, centroids: Tensor) -> None:
        """`centroids` [K, d], rows normalized; or [K, 0] when similarities are given instead of features."""
        self._centroids = centroids
        self._chosen: Tensor | None = None
        self._rows = 0

    def begin(self, length: int) -> None:
        """Starts a pass that keeps up to `length` items a list."""
        self._length = length
        self._rows = 0
        self._items = torch.empty(
            (self._centroids.shape[0], 0), dtype=torch.int64, device=self._centroids.device
        )
        self._values = self._centroids.new_empty((self._centroids.shape[0], 0))

    def update(self, x: Tensor) -> None:
        """Adds the next items: features [r, d]."""
        if not torch.isfinite(x).all():
            row = int((~torch.isfinite(x)).any(dim=1).nonzero()[0]) + self._rows
            raise ValueError(f"expected finite values, got NaN or inf in row {row}")
        self.update_similarities(similarities(x, self._centroids))

    def update_similarities(self, s: Tensor) -> None:
        """Adds the next items: their similarities [r, K] to every list."""
        if torch.isnan(s).any():
            row = int(torch.isnan(s).any(dim=1).nonzero()[0]) + self._rows
            raise ValueError(f"expected similarities, got NaN in row {row}")
        items = torch.arange(self._rows, self._rows + s.shape[0], device=s.device)
        self._rows += s.shape[0]
        if self._chosen is not None:
            keep = ~self._chosen[items]
            items, s = items[keep], s[keep]
        # What is kept stands before what comes, and the sort is stable: equal similarities stay in the order of the items.
        values = torch.cat([self._values, s.T], dim=1)
        items = torch.cat([self._items, items.expand(s.shape[1], -1)], dim=1)
        order = torch.argsort(values, dim=1, descending=True, stable=True)[:, : self._length]
        self._values = values.gather(1, order)
        self._items = items.gather(1, order)

    def finish(self) -> int:
        """Ends the pass and returns the number of items seen in it."""
        if self._chosen is None:
            self._chosen = torch.zeros(self._rows, dtype=torch.bool, device=self._centroids.device)
        return self._rows

    def order(self, index: int) -> tuple[Tensor, Tensor]:
        """Items and similarities that list `index` keeps, most similar first."""
        return self._items[index], self._values[index]

    def rounds(self, count: int, k: int) -> tuple[list[list[int]], list[float]]:
        """Up to `count` further rounds: the new items of each, in the order of the lists that took them, and its value.

        Ends early after the round with which `k` items or more are taken in all, when every item is taken, and when a list needs
        another pass.
        """
        assert self._chosen is not None
        items: list[list[int]] = []
        values: list[float] = []
        taken = int(self._chosen.sum())
        while len(items) < count and taken < min(k, self._rows):
            free = ~self._chosen[self._items]
            if not free.any(dim=1).all():
                break
            place = free.to(torch.uint8).argmax(dim=1, keepdim=True)
            new = list(dict.fromkeys(self._items.gather(1, place).flatten().tolist()))
            total = 0.0
            for value in self._values.gather(1, place).flatten().tolist():
                total += value
            self._chosen[new] = True
            taken += len(new)
            items.append(new)
            values.append(total / self._centroids.shape[0])
        return items, values
