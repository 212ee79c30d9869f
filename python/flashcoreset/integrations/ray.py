"""Scores, sketches and choices of Ray Data sets.

Sketches and scores are `map_batches` with actors. Choices number the rows in the order of their blocks, look at each block where it lies,
and return a Dataset of the chosen rows, in pick order, with the columns `coreset_index` (the row's number) and `coreset_weight`.
What each block finds for CCS, Carathéodory's reduction and SimCore's lists merges, whatever the order; facility location works in two
stages. A lost worker's part is done again by Ray.

The extra `ray` installs Ray.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import Dataset
from torch import Tensor

import flashcoreset as fc
from flashcoreset._core.inputs import arrow_matrix, as_array
from flashcoreset._core.tensor import as_matrix, as_number, at_least_one, check_finite, one_of
from flashcoreset.methods.simcore import patience_of

INDEX, WEIGHT, GAIN = "coreset_index", "coreset_weight", "coreset_gain"
_SIMILARITIES = ("cosine", "dot")
_DISTANCES = ("euclidean", "sqeuclidean", "l1")
# By how much a similarity may differ between two routines; both are sums of products of unit rows.
_SLACK = 1e-4
_CLIENTS = 4096  # rows of a block whose similarities to all picks are held at a time


# --- Columns added to every row -----------------------------------------------------------------------


def sketch(
    ds: Dataset, dim: int, *, column: str = "embedding", output: str = "sketch", actors: int | None = None,
    options: dict[str, Any] | None = None, **sketch_options: Any,
) -> Dataset:  # fmt: skip
    """The same rows with a column of sketches, `fc.sketch(column, dim)`: the same matrix on every worker.

    Args:
        ds: the rows.
        dim: the length of a sketch.
        column: the vectors, lists of equal length.
        output: the name of the new column, lists of `dim` numbers.
        actors: the most workers; None: one per processor.
        options: those of `Dataset.map_batches`, such as {"batch_size": 4096, "num_gpus": 1}.
        sketch_options: those of `fc.sketch`: kind, seed, nnz, ...

    Raises:
        TypeError, ValueError: as `fc.sketch`, and for a column that is not there.

    Example:
        >>> import ray, flashcoreset as fc
        >>> ds = ray.data.from_items([{"embedding": [1.0, 2.0, 3.0]}])  # doctest: +SKIP
        >>> fc.integrations.ray.sketch(ds, 2, kind="sjlt")  # doctest: +SKIP
    """
    dim = at_least_one(dim, "dim")
    _check_column(ds, column, "column")
    # Wrong options are an error here and not on a worker.
    fc.projection_matrix(1, dim, **{k: v for k, v in sketch_options.items() if k != "offset"})
    return _mapped(
        ds, _Sketch, actors, options, column=column, output=output, dim=dim, options=sketch_options
    )


def sample_scores(
    ds: Dataset, *, logits: str = "logits", targets: str = "label", actors: int | None = None,
    options: dict[str, Any] | None = None, **score_options: Any,
) -> Dataset:  # fmt: skip
    """The same rows with the columns loss, entropy, margin, el2n and correct of `fc.sample_scores`.

    Args:
        ds: the rows.
        logits: the column of logits, lists of equal length.
        targets: the column of target classes, integers.
        actors, options: as for `sketch`.
        score_options: those of `fc.sample_scores`.

    Raises:
        ValueError: for columns that are not there; on a worker, as `fc.sample_scores`.
    """
    _check_column(ds, logits, "logits")
    _check_column(ds, targets, "targets")
    return _mapped(ds, _Scores, actors, options, logits=logits, targets=targets, options=score_options)


class _Sketch:
    def __init__(self, column: str, output: str, dim: int, options: dict[str, Any]) -> None:
        self._column, self._output, self._dim, self._options = column, output, dim, options

    def __call__(self, table: pa.Table) -> pa.Table:
        if not table.num_rows:
            return _with(table, self._output, pa.array([], pa.list_(pa.float32(), self._dim)))
        found = fc.sketch(_matrix(table, self._column), self._dim, **self._options).numpy()
        return _with(
            table, self._output, pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), self._dim)
        )


class _Scores:
    def __init__(self, logits: str, targets: str, options: dict[str, Any]) -> None:
        self._logits, self._targets, self._options = logits, targets, options

    def __call__(self, table: pa.Table) -> pa.Table:
        if not table.num_rows:
            return table
        targets = as_array(table[self._targets], self._targets)
        found = fc.sample_scores(_matrix(table, self._logits), targets, **self._options)
        for name in ("loss", "entropy", "margin", "el2n", "correct"):
            table = _with(table, name, pa.array(getattr(found, name).numpy()))
        return table


def _mapped(
    ds: Dataset, kind: type, actors: int | None, of_ray: dict[str, Any] | None, **arguments: Any
) -> Dataset:
    most = at_least_one(actors, "actors") if actors is not None else 0
    most = most or max(1, int(ray.cluster_resources().get("CPU", 1)))
    return ds.map_batches(
        kind,
        fn_constructor_kwargs=arguments,
        concurrency=(1, most),
        batch_format="pyarrow",
        **(of_ray or {}),
    )


# --- Choices ------------------------------------------------------------------------------------------


class _Parts:
    """What is known of some blocks."""

    def __init__(self, *parts: dict[str, np.ndarray]) -> None:
        self.parts = list(parts)

    def joined(self) -> dict[str, np.ndarray]:
        first = self.parts[0]
        return {name: np.concatenate([part[name] for part in self.parts]) for name in first}


class _Mergeable(Protocol):
    """What blocks find on their own, so that it can be merged in any order."""

    def aggregate_block(self, table: pa.Table) -> _Parts: ...

    def combine(self, current: _Parts, new: _Parts) -> _Parts: ...

    def finalize(self, found: _Parts) -> dict[str, Any]: ...


class _CCS:
    """`fc.ccs` by blocks: gathers scores, 8 bytes per row and column, and draws once all are there.

    Args:
        k: as for `fc.ccs`.
        on: the column of scores.
        mislabel_scores, groups: columns, or None.
        index: the column of row numbers 0..n-1, whose order is the order of the scores.
        options: those of `fc.ccs`.

    The result is a dict: "indices", "weights" and "info".
    """

    def __init__(
        self, k: int, on: str = "score", *, mislabel_scores: str | None = None, groups: str | None = None,
        index: str = INDEX, **options: Any,
    ) -> None:  # fmt: skip
        self._k, self._options = k, options
        self._columns = {"scores": on, "mislabel_scores": mislabel_scores, "groups": groups, "index": index}

    def aggregate_block(self, table: pa.Table) -> _Parts:
        given = {key: name for key, name in self._columns.items() if name is not None}
        return _Parts({key: arrow_matrix(table[name], name) for key, name in given.items()})

    def combine(self, current: _Parts, new: _Parts) -> _Parts:
        return _Parts(*current.parts, *new.parts)

    def finalize(self, found: _Parts) -> dict[str, Any]:
        given = found.joined()
        order = np.argsort(given.pop("index"), kind="stable")
        ordered: dict[str, Any] = {name: values[order] for name, values in given.items()}
        chosen = fc.ccs(ordered.pop("scores"), self._k, **ordered, **self._options)
        return {
            "indices": chosen.indices.tolist(),
            "weights": chosen.weights.tolist(),
            "info": repr(chosen.info),
        }


class _Caratheodory:
    """`fc.caratheodory` by blocks: these are reduced to at most rank + 1 weighted rows with the same mean, and these again.

    Args:
        on: the column of vectors.
        weights: the column of weights, or None.
        index: the column of row numbers.
        max_size: as for `fc.caratheodory`.

    The result is a dict: "indices" and "weights", whose weighted mean and total weight are those of all rows.
    """

    def __init__(
        self,
        on: str = "embedding",
        *,
        weights: str | None = None,
        index: str = INDEX,
        max_size: int | None = None,
    ) -> None:
        self._on, self._weights, self._index, self._most = on, weights, index, max_size

    def aggregate_block(self, table: pa.Table) -> _Parts:
        x = _matrix(table, self._on)
        weights = np.ones(len(x)) if self._weights is None else as_array(table[self._weights], self._weights)
        return self._reduced(
            {
                "x": x.astype(np.float64),
                "weights": weights.astype(np.float64),
                "index": as_array(table[self._index], "index"),
            }
        )

    def combine(self, current: _Parts, new: _Parts) -> _Parts:
        return self._reduced(_Parts(*current.parts, *new.parts).joined())

    def finalize(self, found: _Parts) -> dict[str, Any]:
        # Whatever the order in which blocks were joined, the rows are in that of the data.
        (left,) = found.parts
        order = np.argsort(left["index"])
        return {"indices": left["index"][order].tolist(), "weights": left["weights"][order].tolist()}

    def _reduced(self, given: dict[str, np.ndarray]) -> _Parts:
        order = np.argsort(given["index"])
        given = {name: values[order] for name, values in given.items()}
        chosen = fc.caratheodory(given["x"], given["weights"], max_size=self._most)
        rows = chosen.indices.numpy()
        return _Parts(
            {"x": given["x"][rows], "weights": chosen.weights.numpy(), "index": given["index"][rows]}
        )


class _Nearest:
    """For each centroid the `length` most similar rows, and those that come as near as rounding lets them."""

    def __init__(self, centroids: Tensor, length: int, on: str) -> None:
        self._centroids, self._length, self._on = centroids.double(), length, on

    def aggregate_block(self, table: pa.Table) -> _Parts:
        x = as_matrix(_matrix(table, self._on), self._on)
        check_finite(x, self._on)
        s = fc.kernels.torch.pairwise(self._centroids, x.double(), metric="cosine").numpy()
        lists = np.repeat(np.arange(len(s)), s.shape[1])
        rows = np.tile(as_array(table[INDEX], INDEX), len(s))
        return self._shortened({"list": lists, "row": rows, "similarity": s.ravel()})

    def combine(self, current: _Parts, new: _Parts) -> _Parts:
        return self._shortened(_Parts(*current.parts, *new.parts).joined())

    def finalize(self, found: _Parts) -> dict[str, Any]:
        return {"indices": np.unique(found.parts[0]["row"]).tolist()}

    def _shortened(self, given: dict[str, np.ndarray]) -> _Parts:
        keep = np.zeros(len(given["row"]), dtype=bool)
        for number in range(len(self._centroids)):
            own = np.flatnonzero(given["list"] == number)
            values = given["similarity"][own]
            if len(own) > self._length:
                least = np.partition(values, -self._length)[-self._length]
                own = own[values >= least - _SLACK]
            keep[own] = True
        return _Parts({name: values[keep] for name, values in given.items()})


def ccs(
    ds: Dataset, k: int, *, column: str = "score", mislabel_scores: str | None = None, groups: str | None = None,
    **options: Any,
) -> Dataset:  # fmt: skip
    """The rows that `fc.ccs` takes of all scores, one machine's very choice.

    Args:
        ds: the rows.
        k: how many to take.
        column: the scores.
        mislabel_scores, groups: columns, or None.
        options: those of `fc.ccs`.

    Returns:
        The chosen rows in the order of `fc.ccs`, with `coreset_index` and `coreset_weight`.

    Raises:
        TypeError, ValueError: as `fc.ccs`, and for columns that are not there.
    """
    k = at_least_one(k, "k")
    for name, text in ((column, "column"), (mislabel_scores, "mislabel_scores"), (groups, "groups")):
        if name is not None:
            _check_column(ds, name, text)
    numbered = _Numbered(ds)
    found = numbered.aggregate(_CCS(k, column, mislabel_scores=mislabel_scores, groups=groups, **options))
    return numbered.rows(found["indices"], {WEIGHT: np.asarray(found["weights"], dtype=np.float32)})


def caratheodory(
    ds: Dataset, *, column: str = "embedding", weights: str | None = None, max_size: int | None = None
) -> Dataset:
    """A weighted subset of at most rank + 1 rows with the weighted mean and total weight of all.

    Args:
        ds: the rows.
        column: the vectors.
        weights: the column of their weights, or None.
        max_size: as for `fc.caratheodory`.

    Returns:
        The chosen rows in the order of the data, with `coreset_index` and `coreset_weight`. Another division into blocks leads to another
        subset with the same mean.
    """
    _check_column(ds, column, "column")
    if weights is not None:
        _check_column(ds, weights, "weights")
    numbered = _Numbered(ds)
    found = numbered.aggregate(_Caratheodory(column, weights=weights, max_size=max_size))
    return numbered.rows(found["indices"], {WEIGHT: np.asarray(found["weights"])})


def simcore(
    ds: Dataset,
    target: Any,
    k: int,
    *,
    column: str = "embedding",
    patience: int | None = None,
    **options: Any,
) -> Dataset:
    """The rows that `fc.simcore` takes of all rows, one machine's very choice.

    Each block keeps, for every centroid of the target, its k most similar rows; merged lists hold every row that the rounds can take.

    Args:
        ds: the open set.
        target: [m, d] the target's vectors, an array.
        k: the most rows to take; it also bounds the lists.
        column: the open set's vectors.
        patience: as for `fc.simcore`.
        options: those of `fc.simcore`.

    Returns:
        The chosen rows in the order of the rounds, with `coreset_index` and `coreset_weight`.

    Raises:
        TypeError, ValueError: as `fc.simcore`, and for a column that is not there.
    """
    k = at_least_one(k, "k")
    _check_column(ds, column, "column")
    points = as_matrix(target, "target")
    numbered = _Numbered(ds)
    if k > numbered.count:
        raise ValueError(f"k must be <= the {numbered.count} rows of ds, got {k}")
    clusters = {
        name: options.pop(name) for name in ("n_clusters", "fit_on", "n_init", "seed") if name in options
    }
    # With one pick of the target itself, for its centroids.
    centroids = fc.simcore(points, points, 1, stop=False, **clusters).info["centroids"]
    near = numbered.aggregate(_Nearest(centroids, k, column))["indices"]
    rows = numbered.table(near)
    if patience is None:
        patience = patience_of(numbered.count, len(centroids))
    seed = {"seed": clusters["seed"]} if "seed" in clusters else {}
    x = _matrix(rows, column)
    chosen = fc.simcore(x, centroids=centroids, k=k, patience=patience, **seed, **options)
    indices = np.asarray(near)[chosen.indices.numpy()]
    return numbered.rows(indices, {WEIGHT: chosen.weights.numpy()})


def facility_location(
    ds: Dataset, k: int, *, column: str = "embedding", metric: str = "cosine", offset: float | None = None,
    **options: Any,
) -> Dataset:  # fmt: skip
    """Rows that represent all rows, by partition greedy in two stages (GreeDi): each block chooses k of its own rows, and of all those,
    weighted by the rows that they stand for, k are chosen. A last pass measures what the picks are worth to all rows.

    One block has the exact greedy sequence of `fc.facility_location`. With several, f(S) is at least 1/min(number of blocks, k) (1 - 1/e)^2 of the best S in
    the worst case, and close to the exact greedy one on data that is not sorted: shuffle sorted data (`ds.random_shuffle()`).

    Args:
        ds: the rows, candidates and clients in one.
        k: how many to pick.
        column: the vectors.
        metric: "cosine" or "dot"; or "euclidean", "sqeuclidean" or "l1" with `offset`.
        offset: what distances are subtracted from, one number for all blocks.
        options: those of `fc.facility_location` for each stage: method, epsilon, seed, backend.

    Returns:
        The chosen rows in pick order, with `coreset_index`, `coreset_weight` (how many rows each serves) and `coreset_gain` (by how much it
        raised f(S) over all rows, float64; their sum is f(S)).

    Raises:
        TypeError, ValueError: as `fc.facility_location`, and for a column that is not there.

    Source: Mirzasoleiman, Karbasi, Sarkar and Krause, "Distributed submodular maximization: identifying representative elements in massive
    data", NeurIPS 2013.
    """
    k = at_least_one(k, "k")
    one_of(metric, "metric", (*_SIMILARITIES, *_DISTANCES))
    _check_column(ds, column, "column")
    if metric in _DISTANCES:
        if offset is None:
            raise ValueError(
                f"offset must be given with metric {metric!r}, since every block needs the same one"
            )
        options["offset"] = as_number(offset, "offset")
    elif offset is not None:
        raise ValueError(f"offset must be None with metric {metric!r}, got {offset}")
    numbered = _Numbered(ds)
    if k > numbered.count:
        raise ValueError(f"k must be <= the {numbered.count} rows of ds, got {k}")
    first = numbered.each_block(_pick_of_block, column, k, metric, options)
    indices = np.concatenate([found[0] for found in first])
    if len(first) > 1:
        weights = np.concatenate([found[1] for found in first])
        order = np.argsort(indices)
        indices, weights = indices[order], weights[order]
        x = _matrix(numbered.table(indices), column)
        indices = indices[
            fc.facility_location(x, k, metric=metric, weights=weights, **options).indices.numpy()
        ]
    picks = _matrix(numbered.table(indices), column)
    parts = numbered.each_block(_worth_in_block, column, picks, metric, options.get("offset", 0.0))
    gains, won = (np.sum([part[i] for part in parts], axis=0) for i in range(2))
    return numbered.rows(indices, {WEIGHT: won, GAIN: gains})


def _pick_of_block(
    table: pa.Table, column: str, k: int, metric: str, options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows that a block chooses, and how many rows each stands for."""
    x = _matrix(table, column)
    found = fc.facility_location(x, min(k, len(x)), metric=metric, **options)
    return as_array(table[INDEX], INDEX)[found.indices.numpy()], found.weights.numpy().astype(np.float64)


def _worth_in_block(
    table: pa.Table, column: str, picks: np.ndarray, metric: str, offset: float
) -> tuple[np.ndarray, np.ndarray]:
    """What each pick adds to f(S) on the rows of a block, after the picks before it, and how many rows it serves."""
    x, chosen = torch.from_numpy(_matrix(table, column)), torch.from_numpy(picks)
    gains, won = np.zeros(len(picks)), np.zeros(len(picks))
    for part in x.split(_CLIENTS):
        s = fc.kernels.torch.pairwise(chosen, part, metric=metric).double()
        s = (offset - s if metric in _DISTANCES else s).clamp_min(0)
        best = s.cummax(0).values
        gains += torch.diff(best, dim=0, prepend=torch.zeros_like(best[:1])).sum(1).numpy()
        served = s.max(0)
        # Of equal ones the earlier pick.
        first = (s == served.values).double().argmax(0)[served.values > 0]
        won += np.bincount(first.numpy(), minlength=len(picks))
    return gains, won


# --- Rows by number -----------------------------------------------------------------------------------


class _Numbered:
    """The blocks of a data set, whose rows are numbered in their order."""

    def __init__(self, ds: Dataset) -> None:
        context = ds.context.execution_options
        before, context.preserve_order = context.preserve_order, True
        try:
            blocks = ds.to_arrow_refs()
        finally:
            context.preserve_order = before
        counts = ray.get([_count.remote(block) for block in blocks])
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.count = int(self._starts[-1])
        if not self.count:
            raise ValueError("ds must have at least 1 row, got none")
        self._blocks = [
            _number.remote(block, int(start))
            for block, start, count in zip(blocks, self._starts, counts, strict=False)
            if count
        ]
        self._starts = np.unique(self._starts)

    def aggregate(self, how: _Mergeable) -> dict[str, Any]:
        """What `how` finds in all blocks."""
        return how.finalize(functools.reduce(how.combine, self.each_block(_of_block, how)))

    def each_block(self, run: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `run(table, *arguments)` returns for each block, in their order."""
        shared = [ray.put(argument) for argument in arguments]
        return ray.get([_run.remote(run, block, *shared) for block in self._blocks])

    def table(self, indices: Any) -> pa.Table:
        """The rows of these numbers, in this order."""
        wanted = np.asarray(indices, dtype=np.int64)
        ordered, places = np.unique(wanted, return_inverse=True)
        parts = []
        for block, low, high in zip(self._blocks, self._starts, self._starts[1:], strict=False):
            own = ordered[(ordered >= low) & (ordered < high)]
            if len(own):
                parts.append(_take.remote(block, own - low))
        return pa.concat_tables(ray.get(parts), promote_options="permissive").take(pa.array(places))

    def rows(self, indices: Any, columns: dict[str, np.ndarray]) -> Dataset:
        table = self.table(indices)
        for name, values in columns.items():
            table = _with(table, name, pa.array(values))
        return ray.data.from_arrow(table)


@ray.remote
def _count(block: pa.Table) -> int:
    return block.num_rows


@ray.remote
def _number(block: pa.Table, start: int) -> pa.Table:
    return _with(block, INDEX, pa.array(np.arange(start, start + block.num_rows)))


@ray.remote
def _take(block: pa.Table, rows: np.ndarray) -> pa.Table:
    return block.take(pa.array(rows))


@ray.remote
def _run(run: Callable[..., Any], block: pa.Table, *arguments: Any) -> Any:
    return run(block, *arguments)


def _of_block(block: pa.Table, how: _Mergeable) -> _Parts:
    return how.aggregate_block(block)


def _with(table: pa.Table, name: str, values: Any) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def _matrix(table: pa.Table, column: str) -> np.ndarray:
    """A column of vectors [rows, d]."""
    values = table[column]
    chunks = [chunk for chunk in values.chunks if len(chunk)]
    if chunks and hasattr(chunks[0], "to_numpy_ndarray"):  # Ray's own type of arrays
        found = np.concatenate([chunk.to_numpy_ndarray() for chunk in chunks])
    elif chunks and hasattr(chunks[0], "to_numpy") and "tensor" in str(values.type).lower():
        found = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks])
    else:
        found = arrow_matrix(values, column)
    if found.ndim != 2 or found.dtype.kind not in "biuf":
        raise ValueError(
            f"column {column!r} must hold lists of numbers of equal length, got type {values.type}"
        )
    return found if found.flags.writeable else found.copy()


def _check_column(ds: Any, name: str, argument: str) -> None:
    if not isinstance(ds, Dataset):
        raise TypeError(f"ds must be a ray.data.Dataset, got {type(ds).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a column's name, got {name!r} of type {type(name).__name__}")
    columns = ds.columns()
    if columns is not None and name not in columns:
        raise ValueError(f"{argument} must be one of the columns {', '.join(columns)}, got {name!r}")
