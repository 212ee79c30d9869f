"""SimCore over an open set that is spread over ranks.

In a pass each rank finds, for every centroid, the L most similar of its items that are not taken; the ranks' lists are merged, and the
rounds are made from the merged lists by every rank. The first L entries of a merged list are the L most similar items of all, so a
round is the one that one machine makes, until a list runs out of items that are free: then the next pass follows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.errors import InputWarning, warn_caller
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_matrix, check_finite
from flashcoreset.distributed.communication import Communicator
from flashcoreset.methods.simcore import (
    _PER_TARGET,
    _centroids,
    _distinct,
    _select,
    check_options,
    patience_of,
)
from flashcoreset.nearest_order import RowSource, chunk_rows, compute_type, list_bytes
from flashcoreset.nearest_order.backend import Taken, choose

_TAKES = 1 << 16  # items that are taken between reports of progress


def simcore(
    openset_shard: Any,
    target: Any = None,
    k: int | None = None,
    *,
    centroids: Any = None,
    ratio: float | None = None,
    n_clusters: int = 100,
    stop: bool = True,
    stop_threshold: float = 0.95,
    patience: int | None = None,
    fit_on: int | None = None,
    seed: int = 0,
    n_init: int | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> Coreset:
    """SimCore from the open set of all ranks: what `fc.simcore` returns for it, rank after rank.

    Args:
        openset_shard: this rank's part of the open set, [n of this rank, d] or an iterable of batches that can be read again, as in
            `fc.simcore`; a matrix may have no rows. Each rank streams its own.
        target, centroids: the same on every rank; k-means runs on the first rank.
        group: the process group; None is the default one.

    The other arguments are those of `fc.simcore`, the same on every rank.

    Returns:
        Coreset, the same on every rank: `indices` are global, and `info` has the entries of `fc.simcore` and "bytes" and "collectives";
        "passes" may be another number.

    Raises:
        TypeError, ValueError: as `fc.simcore` does, on every rank, naming the rank; and for an iterator, which can be read once only.
        RankError: if a rank ends or hangs.

    Source: Kim, Bae and Yun, "Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning", CVPR 2023.

    Example:
        >>> import torch, flashcoreset as fc
        >>> openset = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [-1.0, 0.0]])
        >>> fc.distributed.simcore(openset, torch.tensor([[1.0, 0.0]]), 2).indices
        tensor([0, 2])
    """
    with Communicator(group) as comm:
        error: Exception | None = None
        options: dict[str, Any] = {}
        try:
            check_backend(backend)
            check_progress(progress)
            asked = check_options(
                target, k, centroids, ratio, n_clusters, stop, stop_threshold, patience, fit_on, seed, n_init, memory_budget
            )  # fmt: skip
            points = as_matrix(centroids if asked.fixed else target, asked.name)
            shape: Any = getattr(openset_shard, "shape", ())
            empty = len(shape) == 2 and shape[0] == 0
            source = RowSource(
                torch.empty(1, points.shape[1], dtype=points.dtype) if empty else openset_shard
            )
            columns = shape[1] if empty else source.columns
            if points.shape[1] != columns:
                raise ValueError(
                    f"{asked.name} must have {columns} columns as openset_shard has, got shape {tuple(points.shape)}"
                )
            if source.once:
                raise ValueError(
                    "openset_shard is an iterator, which can be read once only; pass a matrix, a list, a DataLoader or a function "
                    "that returns a new iterator"
                )
            if points.device != source.device:
                raise ValueError(
                    f"{asked.name} is on device {points.device}, but openset_shard on {source.device}"
                )
            choose(backend, source.device)
            check_finite(points, asked.name)
            dtype = compute_type(source, points)
            options = asked._asdict() | {
                "dtype": str(dtype), "columns of openset_shard": columns, "stop": bool(stop),
                f"sum of {asked.name}": float(points.double().sum()), f"rows of {asked.name}": len(points),
            }  # fmt: skip
        except (TypeError, ValueError, RuntimeError) as caught:
            error = caught
        comm.agree(options, error)

        step = chunk_rows(columns, 1, dtype.itemsize, asked.memory_budget)
        rows = 0 if empty else source.rows
        if rows is None:
            rows = _counted(comm, source, dtype, step)
        counts = [int(count) for count in comm.gather(torch.tensor([rows]))[:, 0]]
        n = sum(counts)
        k = asked.k
        if k is not None and k > n:
            raise ValueError(f"k must be <= the {n} rows of openset, got {k}")
        if asked.share is not None:
            k = int(asked.share * n)
            if k < 1:
                raise ValueError(f"ratio must take at least 1 of the {n} rows of openset, got {asked.share}")
        if n == 0:
            raise ValueError(
                "openset_shard must have at least 1 row on one of the ranks, got none on all of them"
            )
        points = _distinct(points.to(dtype))
        made = points.contiguous() if asked.fixed else _same_centroids(comm, points, asked)
        limit = min(n, k if k is not None else _PER_TARGET * points.shape[0])
        wait = asked.patience
        if wait is None:
            wait = patience_of(n, len(made))
        with Progress(progress if comm.rank == 0 else None, limit, "simcore") as bar:
            lists = _MergedLists(
                comm,
                None if empty else source,
                made,
                sum(counts[: comm.rank]),
                n,
                limit,
                backend,
                asked.memory_budget,
                rows,
            )
            picks, info = _select(lists, limit, bool(stop), asked.stop_threshold, wait, asked.seed, bar)
        if info["stopped"] == "k" and k is None and limit == n:
            info["stopped"] = "exhausted"
        if not len(picks) and comm.rank == 0:
            warn_caller(
                f"nothing was taken: the open set's most similar items have a mean similarity of {info['dropped_value']:.3g} to the "
                f"{asked.name}; pass stop=False with k to take them all the same",
                InputWarning,
            )
        info["similarity"] = info["similarity"].to(source.device, dtype)
        info["centroid"] = info["centroid"].to(source.device)
        info |= {"k": limit, "passes": lists.passes, "centroids": made}
        info |= {"bytes": comm.bytes, "collectives": comm.collectives}
        weights = torch.ones(len(picks), dtype=dtype, device=source.device)
        return Coreset(picks.to(source.device), weights, info)


def _counted(comm: Communicator, source: RowSource, dtype: torch.dtype, step: int) -> int:
    """The rows of batches, which are read for it."""
    for _ in source.read(dtype, step):
        pass
    assert source.rows is not None
    return source.rows


def _same_centroids(comm: Communicator, points: Tensor, asked: Any) -> Tensor:
    """The centroids of the first rank: k-means may differ in its last bits from one processor to another."""
    found, error = points[:0], None
    if comm.rank == 0:
        try:
            found = _centroids(points, asked.n_clusters, asked.seed, asked.n_init, asked.fit_on)
        except (ValueError, RuntimeError, ImportError) as caught:
            error = caught
    (count, *_) = comm.agree({}, error, len(found))
    return comm.broadcast(found if comm.rank == 0 else points.new_empty(count, points.shape[1]), 0)


class _MergedLists:
    """Makes SimCore's rounds from the merged lists of all ranks; see `flashcoreset.nearest_order.Rounds`.

    Attributes:
        passes: how often the open set was read for lists.
    """

    def __init__(
        self, comm: Communicator, source: RowSource | None, centroids: Tensor, first: int, n: int, limit: int,
        backend: str | None, memory_budget: int, rows: int,
    ) -> None:  # fmt: skip
        self._comm, self._source, self._centroids = comm, source, centroids
        self._first, self._n, self._limit, self._rows = first, n, limit, rows
        self._kernels = choose(backend, centroids.device)
        size = centroids.dtype.itemsize
        lists = len(centroids)
        columns = centroids.shape[1]
        self._chunk = chunk_rows(columns, lists, size, memory_budget)
        self._longest = max(1, memory_budget // 4 // list_bytes(lists, size, backend))
        self._taken: set[int] = set()
        self._length = self.passes = 0
        self._items = self._values = np.empty((lists, 0))
        self._at = [0] * lists
        self._read()

    def _next_length(self) -> int:
        left = min(self._limit, self._n) - len(self._taken)
        start = max(64, 4 * -(-self._limit // len(self._centroids)))
        return max(1, min(left, start if self._length == 0 else 4 * self._length, self._longest))

    def _read(self) -> None:
        comm, lists = self._comm, len(self._centroids)
        self._length = length = self._next_length()
        self.passes += 1
        items = torch.full((lists, length), -1, dtype=torch.int64)
        values = torch.full((lists, length), -torch.inf, dtype=self._centroids.dtype)
        error: Exception | None = None
        try:
            self._own_lists(items, values)
        except ValueError as caught:
            error = caught
        comm.agree({}, error)
        everyone = comm.gather(items).numpy().transpose(1, 0, 2).reshape(lists, -1)
        their_values = comm.gather(values).numpy().transpose(1, 0, 2).reshape(lists, -1)
        # Absent entries are below all others.
        order = np.lexsort((everyone, -their_values), axis=1)[:, :length]
        self._items = np.take_along_axis(everyone, order, 1)
        self._values = np.take_along_axis(their_values, order, 1)
        self._at = [0] * lists

    def _own_lists(self, items: Tensor, values: Tensor) -> None:
        """This rank's lists of items that are not taken, as global numbers."""
        if self._source is None:
            return
        gone = np.array(sorted(j - self._first for j in self._taken if 0 <= j - self._first < self._rows))
        if len(gone) == self._rows:
            return
        order = self._kernels.NearestOrder(self._centroids)
        order.begin(items.shape[1])
        row = 0
        for piece in self._source.read(self._centroids.dtype, self._chunk):
            here = gone[(gone >= row) & (gone < row + len(piece))] - row if len(gone) else gone
            row += len(piece)
            if len(here):
                kept = np.delete(np.arange(len(piece)), here.astype(np.int64))
                piece = piece[torch.from_numpy(kept).to(piece.device)]
            if len(piece):
                order.update(piece)
        order.finish()
        # The j-th row that is left has as many rows before it as were taken before it.
        shift = gone - np.arange(len(gone)) if len(gone) else gone
        for which in range(len(self._centroids)):
            own, similar = order.order(which)
            left = own.cpu().numpy()
            if len(gone):
                left = left + np.searchsorted(shift, left, side="right")
            items[which, : len(left)] = torch.from_numpy(left + self._first)
            values[which, : len(left)] = similar.cpu()

    def take(self) -> Taken:
        """The next rounds, at least one unless all wanted items are taken."""
        wanted, lists = min(self._limit, self._n), len(self._at)
        items: list[int] = []
        takers: list[int] = []
        similarities: list[float] = []
        counts: list[int] = []
        values: list[float] = []
        while len(self._taken) < wanted and len(items) < _TAKES:
            if not self._advance():
                if counts:
                    break
                self._read()
                continue
            chosen = [int(self._items[c, at]) for c, at in enumerate(self._at)]
            taking = [float(self._values[c, at]) for c, at in enumerate(self._at)]
            total = 0.0
            for value in taking:
                total += value
            first: dict[int, int] = {}
            for c, item in enumerate(chosen):
                first.setdefault(item, c)
            self._taken.update(first)
            items += first
            takers += first.values()
            similarities += [taking[c] for c in first.values()]
            counts.append(len(first))
            values.append(total / lists)
        return Taken(
            torch.tensor(items, dtype=torch.int64),
            counts,
            values,
            torch.tensor(takers, dtype=torch.int64),
            torch.tensor(similarities, dtype=torch.float64),
        )

    def _advance(self) -> bool:
        """Moves every list to its first item that is free; whether each has one."""
        for c, at in enumerate(self._at):
            row = self._items[c]
            while at < len(row) and row[at] in self._taken:
                at += 1
            self._at[c] = at
            if at == len(row) or row[at] < 0:
                return False
        return True
