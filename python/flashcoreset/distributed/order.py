"""Order statistics of numbers that are spread over ranks, found by bisection: no rank needs the others' numbers."""

from __future__ import annotations

import numpy as np
import torch

from flashcoreset.distributed.communication import Communicator


def ordered_bits(values: np.ndarray) -> np.ndarray:
    """Keys [n] uint64 that are ordered as the float64 `values` [n] are, equal where these are."""
    bits = (values + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63))


def values_of_bits(keys: np.ndarray) -> np.ndarray:
    """The float64 values [n] that `ordered_bits` made keys of."""
    positive = keys >> np.uint64(63) == 1
    return np.where(positive, keys & np.uint64((1 << 63) - 1), ~keys).view(np.float64)


def kth_smallest(comm: Communicator, parts: list[np.ndarray], ranks: list[np.ndarray]) -> list[np.ndarray]:
    """Of several collections of keys: for each collection the keys that have `ranks` [r] smaller or equal ones, counted from 1.

    Args:
        comm: the ranks.
        parts: this rank's keys [n] uint64 of each collection, ascending.
        ranks: of each collection, in [1, size of the collection].
    """
    lengths = [len(wanted) for wanted in ranks]
    targets = np.concatenate([*ranks, np.empty(0, dtype=np.int64)]).astype(np.int64)
    low = np.zeros(len(targets), dtype=np.uint64)
    high = np.full(len(targets), np.uint64(2**64 - 1), dtype=np.uint64)
    cuts = np.cumsum(lengths)[:-1]
    for _ in range(64 if len(targets) else 0):
        middle = low + (high - low) // np.uint64(2)
        counts = [
            np.searchsorted(part, some, side="right")
            for part, some in zip(parts, np.split(middle, cuts), strict=True)
        ]
        reached = comm.sum(torch.from_numpy(np.concatenate(counts).astype(np.int64))).numpy() >= targets
        high = np.where(reached, middle, high)
        low = np.where(reached, low, middle + np.uint64(1))
    return np.split(high, cuts)


def lowest(comm: Communicator, parts: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
    """Masks of the `counts` lowest keys of each collection, the earlier rank and place first among equals.

    Args:
        comm: the ranks.
        parts: this rank's keys [n] uint64 of each collection, in any order.
        counts: how many of all ranks' keys of each collection.
    """
    ordered = [np.sort(part) for part in parts]
    wanted = [np.array([count] if count else [], dtype=np.int64) for count in counts]
    last = [found[0] if len(found) else None for found in kth_smallest(comm, ordered, wanted)]
    below = [0 if key is None else int((part < key).sum()) for part, key in zip(parts, last, strict=True)]
    equal = [0 if key is None else int((part == key).sum()) for part, key in zip(parts, last, strict=True)]
    told = comm.gather(torch.tensor([below, equal])).numpy()  # [world, 2, collections]
    masks = []
    for place, (part, key, count) in enumerate(zip(parts, last, counts, strict=True)):
        mask = np.zeros(len(part), dtype=bool)
        if key is not None:
            mask = part < key
            left = count - int(told[:, 0, place].sum()) - int(told[: comm.rank, 1, place].sum())
            mask[np.flatnonzero(part == key)[: max(0, left)]] = True
        masks.append(mask)
    return masks
