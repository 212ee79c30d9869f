"""The compiled nearest orders."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.nearest_order.backend import Taken

__all__ = ["TAKES", "NearestOrder"]

TAKES = Takes()


class NearestOrder:
    """For each of K lists its most similar items in order, kept while the items stream by; see
    `flashcoreset.nearest_order.reference`.

    A pass over the items is `begin`, any number of `update` calls (or `update_similarities` calls),
    `finish`; then `rounds` takes items. If `rounds` stops early, another pass over the same items is
    needed, which keeps the best items not taken yet. After an exception in a pass, the pass is begun again.

    Args:
        centroids: [K, d] float32 or float64 on the CPU, rows of unit length or zero.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        TypeError, ValueError: for arrays that do not fit, NaN or infinity.

    Example:
        >>> import torch
        >>> from flashcoreset.nearest_order.cpu import NearestOrder
        >>> order = NearestOrder.of_similarities(2)
        >>> order.begin(2)
        >>> order.update_similarities(torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.4, 0.8]]))
        >>> order.finish()
        3
        >>> taken = order.rounds(1, 2)
        >>> taken.items, taken.counts, taken.values
        (tensor([1, 0]), [2], [0.699999988079071])
    """

    def __init__(self, centroids: Tensor) -> None:
        self._native = native.module().NearestOrder(capsule(centroids), torch.get_num_threads())
        self._lists = centroids.shape[0]
        self._dtype = centroids.dtype

    @classmethod
    def of_similarities(cls, lists: int, dtype: torch.dtype = torch.float32) -> NearestOrder:
        """An order fed by `update_similarities`."""
        order = cls.__new__(cls)
        name = str(dtype).removeprefix("torch.")
        order._native = native.module().NearestOrder.of_similarities(lists, name, torch.get_num_threads())
        order._lists = lists
        order._dtype = dtype
        return order

    def begin(self, length: int) -> None:
        """Starts a pass that keeps up to `length` items per list."""
        self._length = length
        self._native.begin(length)

    def update(self, x: Tensor) -> None:
        """Adds the next items: features [r, d], rows contiguous."""
        self._native.update(capsule(x))

    def update_similarities(self, s: Tensor) -> None:
        """Adds the next items: their similarities [r, K] to every list, rows contiguous."""
        self._native.update_similarities(capsule(s))

    def finish(self) -> int:
        """Ends the pass and returns the number of items seen in it."""
        self._rows = self._native.finish()
        return self._rows

    @property
    def taken(self) -> int:
        """The number of items taken so far."""
        return self._native.taken

    def order(self, index: int) -> tuple[Tensor, Tensor]:
        """The items and similarities that list `index` keeps, most similar first."""
        room = min(self._length, self._rows)
        items, similarities = torch.empty(room, dtype=torch.int64), torch.empty(room, dtype=self._dtype)
        kept = self._native.order(index, capsule(items), capsule(similarities))
        return items[:kept], similarities[:kept]

    def rounds(self, count: int, k: int) -> Taken:
        """Makes up to `count` further rounds.

        Ends early after the round with which `k` items or more are taken in all, when every item is taken,
        and when a list needs another pass.
        """
        items, takers = torch.empty(2, count * self._lists, dtype=torch.int64)
        similarities = torch.empty(count * self._lists, dtype=torch.float64)
        counts = torch.empty(count, dtype=torch.int64)
        values = torch.empty(count, dtype=torch.float64)
        outputs = (items, counts, values, takers, similarities)
        made = self._native.rounds(k, *(capsule(output) for output in outputs))
        taken = int(counts[:made].sum())
        return Taken(
            items[:taken],
            counts[:made].tolist(),
            values[:made].tolist(),
            takers[:taken],
            similarities[:taken],
        )
