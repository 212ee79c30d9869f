"""The chosen rows of whatever holds the data, in the order of the choice. None of the libraries is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from flashcoreset._core.tensor import is_sparse


def take_rows(data: Any, indices: Tensor) -> Any:
    """The rows `indices` [k] of `data`, as an object of the same kind."""
    if isinstance(data, Mapping):
        return {name: take_rows(column, indices) for name, column in data.items()}
    kind = _library(data)
    if isinstance(data, (str, bytes, bytearray)) or data is None:
        raise TypeError(
            f"data must be a tensor, array, frame, table, list or Dataset, got {type(data).__name__}"
        )
    if isinstance(data, DataLoader):
        raise TypeError(
            "data must have rows that can be chosen, got a DataLoader; pass its dataset, and make a new DataLoader of what comes back"
        )
    if isinstance(data, IterableDataset) or type(data).__name__ == "IterableDataset":
        raise TypeError(
            "data must have rows that can be chosen, got an IterableDataset, which has none by number; pass a list of its rows, or a "
            "Dataset with __getitem__ and __len__"
        )
    if kind == "polars" and type(data).__name__ == "LazyFrame":
        raise TypeError("data must hold its rows, got a LazyFrame; pass data.collect()")
    _check_length(data, indices)
    if isinstance(data, Tensor):
        return data.index_select(0, indices.to(data.device))
    rows = indices.cpu().numpy()
    if is_sparse(data):
        return data.tocsr()[rows]
    if hasattr(data, "iloc"):
        return data.iloc[rows]
    if kind in ("pyarrow", "pandas") and hasattr(data, "take"):
        return data.take(rows)
    if hasattr(data, "select") and kind == "datasets":
        return data.select(rows)
    if isinstance(data, Subset):
        inner = data.indices
        return Subset(data.dataset, [inner[row] for row in rows.tolist()])
    if isinstance(data, np.ndarray):
        return data[rows]
    if kind in ("polars", "cupy"):
        return data[rows.tolist()]
    if kind in ("h5py", "zarr"):
        return _of_file(data, rows)
    if isinstance(data, tuple):
        return tuple(data[row] for row in rows.tolist())
    if isinstance(data, Dataset):
        return Subset(data, rows.tolist())
    if isinstance(data, Sequence):
        return [data[row] for row in rows.tolist()]
    if isinstance(getattr(data, "shape", None), tuple):
        try:
            return data[rows]
        except (IndexError, TypeError, ValueError):
            return np.stack([np.asarray(data[row]) for row in rows.tolist()])
    return Subset(data, rows.tolist())


def _of_file(data: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of an array in a file, which gives them in ascending order, each once."""
    ordered, places = np.unique(rows, return_inverse=True)
    found = data.oindex[ordered] if hasattr(data, "oindex") else data[ordered]
    return np.asarray(found)[places]


def _check_length(data: Any, indices: Tensor) -> None:
    shape: Any = getattr(data, "shape", None)
    try:
        length = int(shape[0]) if isinstance(shape, (tuple, torch.Size)) and shape else len(data)
    except TypeError:
        raise TypeError(
            f"data must be a tensor, array, frame, table, list or Dataset, got {type(data).__name__}"
        ) from None
    if not hasattr(data, "__getitem__"):
        raise TypeError(
            f"data must have rows that can be chosen, got {type(data).__name__}; pass a list of them"
        )
    if len(indices) and int(indices.max()) >= length:
        raise ValueError(
            f"data must have the rows that were chosen, which go up to number {int(indices.max())}, got {length} rows"
        )


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]
