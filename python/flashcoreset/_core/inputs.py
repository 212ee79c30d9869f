"""Columns, frames and arrays of other libraries as NumPy arrays, by what they offer: none of the libraries is imported.

pandas, polars and pyarrow objects offer `__array__`, h5py and zarr arrays a shape and slices, `datasets` columns the slices of a
sequence. A column of equally long lists is a matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.errors import remedy_for_objects


def is_array(value: Any) -> bool:
    """Whether `value` is an array, a column or a frame of some library, which `as_array` takes."""
    if isinstance(value, (str, bytes, bytearray, list, tuple, range, dict, np.generic, type)):
        return False
    if hasattr(value, "__array__"):
        return True
    if _library(value) == "datasets" and hasattr(value, "column_names"):
        return False  # a table, not a column
    shaped = isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype")
    return (shaped and hasattr(value, "__getitem__")) or isinstance(value, Sequence)


def as_array(value: Any, name: str) -> np.ndarray:
    """The numbers of a value that `is_array` as [n] or [n, d].

    Raises:
        TypeError: for columns that hold something else than numbers or lists of numbers.
        ValueError: for lists of unequal lengths or with missing values.
    """
    try:
        if is_arrow(value) and hasattr(value, "null_count"):
            array = arrow_matrix(value, name)
        elif _library(value) == "polars" and str(getattr(value, "dtype", "")).startswith("List"):
            array = _of_lists(value.explode().to_numpy(), value.list.len().to_numpy(), name, value)
        elif is_column(value):
            array = arrow_matrix(value.source.with_format("arrow")[:][value.column_name], name)
        elif hasattr(value, "iloc"):
            array = value.to_numpy(dtype=_numbers_of(value))
        elif hasattr(value, "__array__"):
            array = np.asarray(value)
        elif hasattr(value, "shape"):
            array = np.asarray(value[...])
        else:
            array = np.asarray(value[:])
    except ColumnError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: the numbers of {type(value).__name__} could not be read: {error}"
        ) from error
    return _stacked(array, name, value) if array.dtype == object else array


def _numbers_of(frame: Any) -> np.dtype | None:
    """The type that has the numbers of all columns of a pandas frame, or of a column, where pandas would make objects of them."""
    kinds = list(frame.dtypes) if getattr(frame, "ndim", 1) == 2 else [frame.dtype]
    if all(isinstance(kind, np.dtype) for kind in kinds):
        return None
    own = [getattr(kind, "numpy_dtype", kind) for kind in kinds]
    if not all(isinstance(kind, np.dtype) and kind.kind in "biuf" for kind in own):
        return None
    return np.result_type(*own)


def remedy_for_type(name: str, value: Any) -> str:
    """How to convert a value that is not taken, where that is known."""
    kind, library = type(value).__name__, _library(value)
    if kind == "LazyFrame":
        return f"; pass {name}.collect()"
    if library == "datasets" and isinstance(value, dict):
        return f"; choose a split and its column, as {name}['train']['name']"
    if library == "datasets":
        return f"; pass its column, as {name}['name'], or fc.open_rows({name}, 'name')"
    if hasattr(value, "todense") or hasattr(value, "tocsr"):
        return f"; pass {name}.toarray()"
    if isinstance(value, (dict, set, frozenset)) or hasattr(value, "__next__"):
        return f"; pass a list of its values, list({name}{'.values()' if isinstance(value, dict) else ''})"
    if isinstance(value, str):
        return f"; of a file pass fc.open_rows({name})"
    return ""


class ColumnError(ValueError):
    """What keeps a column from being a matrix; a ValueError for the caller."""


def is_column(value: Any) -> bool:
    """Whether a value is a column of `datasets`."""
    return _library(value) == "datasets" and hasattr(value, "column_name")


def is_arrow(value: Any) -> bool:
    """Whether a value is pyarrow's, whose `__dlpack__` takes neither lists nor gaps."""
    return _library(value) == "pyarrow"


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def arrow_matrix(column: Any, name: str) -> np.ndarray:
    """A column of Arrow, [n] or, if it holds lists of equal length, [n, d]; without a copy if it is one piece of numbers without gaps."""
    chunks = list(getattr(column, "chunks", [column]))
    if "list" not in str(column.type).partition("<")[0]:
        return np.asarray(column if len(chunks) != 1 else chunks[0])
    if column.null_count:
        raise ColumnError(f"{name} must have a list in every row, got {column.null_count} missing ones")
    size = getattr(column.type, "list_size", None)
    parts = []
    for chunk in chunks:
        flat = chunk.flatten()
        if flat.null_count:
            raise ColumnError(f"{name} must have lists without missing values, got {flat.null_count} missing")
        lengths = None if size is not None else np.asarray(chunk.value_lengths())
        parts.append(_of_lists(np.asarray(flat), lengths, name, column, len(chunk)))
    parts = [part for part in parts if len(part)] or parts[:1]
    if len({part.shape[1] for part in parts}) > 1:
        raise ColumnError(_UNEQUAL.format(name, type(column).__name__))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


_UNEQUAL = "{} must have lists of equal length, got a {} with others"


def _of_lists(
    flat: np.ndarray, lengths: np.ndarray | None, name: str, value: Any, rows: int | None = None
) -> np.ndarray:
    """The numbers of lists one after the other as a matrix, given the lists' lengths (None: all are equal)."""
    rows = rows if lengths is None else len(lengths)
    if lengths is not None and rows and (lengths != lengths[0]).any():
        raise ColumnError(_UNEQUAL.format(name, type(value).__name__))
    return flat.reshape(rows or 0, -1) if rows else flat.reshape(0, 0)


def _stacked(array: np.ndarray, name: str, value: Any) -> np.ndarray:
    """A column of lists as a matrix, and objects that are numbers as numbers."""
    try:
        if array.ndim == 1 and len(array) and isinstance(array[0], (Sequence, np.ndarray)):
            array = np.stack([np.asarray(row) for row in array])
        else:
            array = np.asarray(array.tolist())
    except ValueError:
        raise ValueError(_UNEQUAL.format(name, type(value).__name__)) from None
    if array.dtype.kind not in "biuf":
        raise TypeError(remedy_for_objects(name, value))
    return array


def numbered_labels(groups: Any, **by_label: Any) -> tuple[Any, ...]:
    """Labels that are not numbers by their places among the sorted ones: in `groups` [n], and as keys of the dicts `by_label`, which say
    something of each label. Numbers stay what they are.

    Returns:
        `groups` as a list of integers, and the dicts in their order.

    Raises:
        TypeError: for labels that cannot be sorted, and for something else than a dict.
        ValueError: for a label in a dict that is not in `groups`, a negative number, a label that "budgets" leaves out, and more asked of one than it has.
    """
    values = label_values(groups, "groups")
    if values is None:
        return (groups, *by_label.values())
    place = sorted_labels(values, "groups")
    sizes = Counter(values)
    found = []
    for name, given in by_label.items():
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"{name} must be a dict by label where groups holds {_kind(values)}, got {given!r}"
            )
        for label, count in (given or {}).items():
            if isinstance(count, Integral) and int(count) < 0:
                raise ValueError(f"{name} must be >= 0, got {count} for label {label!r}")
            if label not in place and count:
                raise ValueError(
                    f"{name}: {count} asked of label {label!r}, which no candidate has in groups"
                )
            if name == "budgets" and isinstance(count, Integral) and int(count) > sizes[label]:
                raise ValueError(
                    f"budgets: {count} asked of label {label!r}, whose group has {sizes[label]} candidates"
                )
        missing = [label for label in place if label not in given] if given is not None else []
        if missing and name == "budgets":
            raise ValueError(
                f"budgets must name every label in groups, got none for label {missing[0]!r} (0 takes none of it)"
            )
        known = (given or {}).items()
        found.append(given and {place[label]: count for label, count in known if label in place})
    return ([place[label] for label in values], *found)


def label_values(groups: Any, name: str) -> list[Any] | None:
    """The labels if they are something else than numbers, such as strings, dates, flags or tuples.

    Raises:
        ValueError: for dates that are missing.
    """
    if groups is None:
        return None
    if isinstance(groups, Tensor):
        flags = groups.dtype is torch.bool and groups.dim() == 1 and not torch.compiler.is_compiling()
        return groups.tolist() if flags else None
    if isinstance(groups, (list, tuple)):
        values = list(groups)
    elif hasattr(groups, "__array__"):
        array = np.asarray(groups)
        if array.ndim != 1:
            return None
        if array.dtype.kind in "Mm":
            missing = np.isnat(array)
            if missing.any():
                raise ValueError(
                    f"{name} must have a label for every item, got a missing date at position {int(missing.argmax())}"
                )
            return list(array)  # tolist() would make integers of nanoseconds
        values = array.tolist() if array.dtype.kind in "OUSb" else []
    elif is_array(groups):
        values = list(groups[:])
    else:
        return None
    if values and all(isinstance(value, (bool, np.bool_)) for value in values):
        return [bool(value) for value in values]
    numbers = (int, float, complex, np.number, np.bool_, list)
    words = [value for value in values if not isinstance(value, numbers)]
    return values if words and not any(isinstance(value, (Tensor, np.ndarray)) for value in words) else None


def sorted_labels(values: Iterable[Any], name: str) -> dict[Any, int]:
    """Each label's place among the sorted ones."""
    try:
        return {label: place for place, label in enumerate(sorted(set(values)))}
    except TypeError as error:
        raise TypeError(
            f"{name} must hold labels that can be sorted, such as strings, and none that are missing: {error}"
        ) from None


def _kind(values: list[Any]) -> str:
    return f"labels of type {type(values[0]).__name__}"
