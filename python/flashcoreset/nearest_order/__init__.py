"""SimCore's rounds over an open set that is read piece by piece: the source, the passes over it and the
memory they may take.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from flashcoreset._core.files import Rows
from flashcoreset._core.inputs import is_array, is_column
from flashcoreset._core.progress import Progress
from flashcoreset._core.tensor import as_matrix, compute_dtype
from flashcoreset.nearest_order import cpu
from flashcoreset.nearest_order.backend import Taken, choose

_CHUNK = 64 * 2**20  # bytes of features handed to a kernel at a time
_FINGERPRINT = 16  # one of this many rows of a batch source enters a checksum
# The most items that one call for rounds may take, so that Ctrl-C and progress are handled in between.
_TAKES = 1 << 16


def check_loader(value: Any, name: str) -> None:
    """Raises ValueError for a DataLoader that does not give all rows of its data set in their order: positions in its output
    would mean nothing."""
    if not isinstance(value, DataLoader):
        return
    workers: int = value.num_workers
    batches: Any = value.batch_sampler
    sampler = value.sampler if batches is None else getattr(batches, "sampler", None)
    if workers > 1 and not getattr(value, "in_order", True):
        reason, remedy = "in_order=False takes batches as workers finish them", "in_order=True"
    elif isinstance(value.dataset, IterableDataset):
        # An iterable data set orders its rows itself; the loader has no sampler of its own.
        reason = f"its {workers} workers read an IterableDataset side by side" if workers > 1 else ""
        remedy = "num_workers=0"
    elif batches is not None and type(batches) is not BatchSampler:
        reason, remedy = f"its batch_sampler is a {type(batches).__name__}", "batch_size=... in its place"
    elif type(sampler) is not SequentialSampler:
        reason, remedy = f"its sampler is a {type(sampler).__name__}", "shuffle=False and no sampler"
    else:
        reason = ""
    if (
        not reason
        and batches is not None
        and batches.drop_last
        and not _divides(batches.batch_size, value.dataset)
    ):
        reason, remedy = "drop_last=True leaves rows out", "drop_last=False"
    if reason:
        raise ValueError(
            f"{name} must be a DataLoader that gives every row in the order of its dataset, but {reason}, so that the "
            f"indices would mean nothing; pass a DataLoader with {remedy}"
        )


def _divides(size: int, dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and len(dataset) % size == 0


class RowSource:
    """The rows of an open set [n, d], readable from the start again and again, or once.

    A matrix is read in chunks without a copy of the whole. Anything else gives batches: an iterable of them
    (read again by another `iter()`), a function that returns a new iterator at each call, or an iterator,
    which can be read only once. A batch is a matrix, or a tuple or list that starts with one.
    """

    def __init__(self, openset: Any) -> None:
        self.rows: int | None = None  # known from the start for a matrix, after the first pass otherwise
        self.passes = 0
        self._checksum: int | None = None
        self._array: Tensor | None = None
        if isinstance(openset, Rows):
            openset = openset.batches
        # A sequence is one of batches, but a column of `datasets` one of rows.
        frame = is_array(openset) and (not isinstance(openset, Sequence) or is_column(openset))
        if isinstance(openset, Tensor) or hasattr(openset, "__dlpack__") or frame:
            self._array = first = as_matrix(openset, "openset")
            self.rows = first.shape[0]
            self.once = False
        else:
            check_loader(openset, "openset")
            iterable = hasattr(openset, "__iter__") and not isinstance(openset, (str, bytes, dict))
            if not iterable and not callable(openset):
                raise TypeError(
                    "openset must be a matrix, an iterable of matrices or a function that returns one, "
                    f"got {type(openset).__name__}"
                )
            self._openset = openset
            self._call = not iterable
            self._pending: tuple[Tensor, int, Iterator[Any]] | None = None
            iterator = self._iterator()
            self.once = iterator is openset
            number = -1
            for number, item in enumerate(iterator):
                batch = self._matrix(item, number)
                if batch is not None:
                    break
            else:
                got = "an empty iterable" if number < 0 else f"{number + 1} batches without rows"
                raise ValueError(f"openset must have at least 1 row, got {got}")
            first = batch
            self._pending = first, number + 1, iterator
        self.columns = first.shape[1]
        self.device = first.device
        self.dtype = first.dtype

    @property
    def is_matrix(self) -> bool:
        return self._array is not None

    def _iterator(self) -> Iterator[Any]:
        batches = self._openset() if self._call else self._openset
        if self._call and isinstance(batches, (Tensor, np.ndarray)):
            raise TypeError(
                f"openset() must return an iterable of matrices, got a {type(batches).__name__}; pass that itself, "
                "or return a list of it"
            )
        check_loader(batches, "openset()")
        try:
            return iter(batches)
        except TypeError:
            raise TypeError(
                f"openset() must return an iterable of matrices, got {type(batches).__name__}"
            ) from None

    @staticmethod
    def _matrix(item: Any, number: int) -> Tensor | None:
        """A batch as a matrix, or None if it has no rows."""
        if isinstance(item, (tuple, list)):
            if not item:
                raise ValueError(f"openset batch {number} is an empty {type(item).__name__}")
            item = item[0]
        shape: Any = getattr(item, "shape", ())
        if len(shape) == 2 and shape[0] == 0:
            return None
        return as_matrix(item, f"openset batch {number}")

    def _batches(self) -> Iterator[Tensor]:
        if self._array is not None:
            yield self._array
            return
        start = 0
        if self._pending is not None:
            first, start, iterator = self._pending
            self._pending = None
            yield first
        else:
            iterator = self._iterator()
        for number, item in enumerate(iterator, start):
            batch = self._matrix(item, number)
            if batch is None:
                continue
            if batch.shape[1] != self.columns:
                raise ValueError(
                    f"openset batch {number} must have {self.columns} columns as the first has, "
                    f"got shape {tuple(batch.shape)}"
                )
            if torch.promote_types(batch.dtype, self.dtype) == self.dtype:
                batch = batch.to(self.dtype)
            if batch.dtype != self.dtype or batch.device != self.device:
                raise ValueError(
                    f"openset batch {number} must have dtype {self.dtype} on {self.device} as the first has, "
                    f"got {batch.dtype} on {batch.device}"
                )
            yield batch

    def read(self, dtype: torch.dtype, chunk: int) -> Iterator[Tensor]:
        """All rows from the start, at most `chunk` of them at a time, as contiguous matrices of type
        `dtype`.
        """
        rows, checksum = 0, 0
        for batch in self._batches():
            if self.passes and self.rows is not None and rows + batch.shape[0] > self.rows:
                raise ValueError(
                    f"openset had {self.rows} rows in its first reading, "
                    f"and has more in reading {self.passes + 1}"
                )
            for begin in range(0, batch.shape[0], chunk):
                piece = batch[begin : begin + chunk].to(dtype).contiguous()
                if not self.is_matrix:
                    sample = piece[-rows % _FINGERPRINT :: _FINGERPRINT]
                    checksum = zlib.crc32(sample.cpu().numpy().tobytes(), checksum)
                rows += piece.shape[0]
                yield piece
        if self.passes and not self.is_matrix and (rows, checksum) != (self.rows, self._checksum):
            raise ValueError(
                "openset must give the same rows in the same order whenever it is read: "
                f"reading {self.passes + 1} ({rows} rows) differs from the first ({self.rows} rows); "
                "a DataLoader needs shuffle=False"
            )
        self.rows, self._checksum = rows, checksum
        self.passes += 1


def list_bytes(lists: int, itemsize: int, backend: str | None) -> int:
    """The bytes that one more entry in each list takes at the peak."""
    # Compiled: half as many entries again wait to be cut, 16 bytes each. Reference: values, items,
    # the order that sorts them, and the gathered results.
    return lists * (24 if backend != "torch" else 3 * (itemsize + 8) + 8)


def chunk_rows(columns: int, lists: int, itemsize: int, memory_budget: int) -> int:
    """The number of rows to hand to a kernel at a time."""
    bytes_a_row = columns * itemsize + 40 * lists
    return max(1, min(_CHUNK, memory_budget // 4) // bytes_a_row)


class Rounds:
    """Makes SimCore's rounds, reading the source as often as the lists need.

    Args:
        source: the open set.
        centroids: [K, d], rows of unit length or zero, in the dtype to compute in.
        k: the most items wanted.
        backend: as in the public functions.
        memory_budget: bytes for lists and chunks.
        progress: reports the items taken.
    """

    def __init__(
        self,
        source: RowSource,
        centroids: Tensor,
        k: int,
        *,
        backend: str | None,
        memory_budget: int,
        progress: Progress,
    ) -> None:
        chosen = choose(backend, source.device)
        self._order = chosen.NearestOrder(centroids)
        self._source = source
        self._dtype = centroids.dtype
        self._lists = len(centroids)
        self._k = k
        self._progress = progress
        self._budget = memory_budget
        itemsize = centroids.dtype.itemsize
        self._chunk = chunk_rows(source.columns, self._lists, itemsize, memory_budget)
        entry = list_bytes(self._lists, itemsize, "cpu" if chosen is cpu else "torch")
        self._longest = max(1, (memory_budget - memory_budget // 4) // entry)
        self._length = 0

    def _next_length(self) -> int:
        # While fewer than L items have been taken since a pass, one of the L items that a list kept is free: lists
        # as long as the number of picks left need no further pass. A matrix is cheap to read again, so its
        # lists start with the length that an even share would need.
        left = self._k - self._order.taken
        if self._source.rows is not None:
            left = min(left, self._source.rows - self._order.taken)
        if self._source.is_matrix:
            start = max(64, 4 * -(-self._k // self._lists))
            left = min(left, start if self._length == 0 else 4 * self._length)
        return max(1, min(left, self._longest))

    def read(self) -> None:
        """Makes one pass over the source."""
        if self._source.once and self._source.passes:
            raise ValueError(
                "openset is an iterator, which can be read once only, and "
                f"memory_budget={self._budget} keeps {self._length} items for each of the {self._lists} "
                f"centroids, too few for {self._k} picks; pass a list, a DataLoader or a function that "
                "returns a new iterator, or raise memory_budget"
            )
        self._length = self._next_length()
        self._order.begin(self._length)
        for piece in self._source.read(self._dtype, self._chunk):
            self._order.update(piece)
            self._progress.update(min(self._order.taken, self._k))
        self._order.finish()

    def take(self) -> Taken:
        """The next rounds, at least one unless `k` items or all items are taken."""
        count = max(1, _TAKES // self._lists)
        for attempt in range(2):
            taken = self._order.rounds(count, self._k)
            if taken.counts or self._order.taken >= min(self._k, self._source.rows or 0):
                return taken
            if attempt == 0:
                self.read()
        # A pass leaves every list an item that is free, except if a similarity is NaN or -inf.
        raise ValueError("openset: a list has found no item that is free; similarities must be finite")


def compute_type(source: RowSource, target: Tensor) -> torch.dtype:
    """The type to compute in: float64 if either is float64, else float32."""
    return torch.promote_types(compute_dtype(source.dtype), compute_dtype(target.dtype))
