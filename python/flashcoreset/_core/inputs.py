"""Columns, frames and arrays of other libraries as NumPy arrays, by what they offer: none of the libraries is imported.

pandas, polars and pyarrow objects offer `__array__`, h5py and zarr arrays a shape and slices, `datasets` columns the slices of a
sequence. A column of equally long lists is a matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flashcoreset._core.errors import remedy_for_objects


def is_array(value: Any) -> bool:
    """Whether `value` is an array, a column or a frame of some library, which `as_array` takes."""
    if isinstance(value, (str, bytes, bytearray, list, tuple, range, dict, np.generic, type)):
        return False
    if hasattr(value, "__array__"):
        return True
    shaped = isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype")
    return (shaped and hasattr(value, "__getitem__")) or isinstance(value, Sequence)


def as_array(value: Any, name: str) -> np.ndarray:
    """The numbers of a value that `is_array` as [n] or [n, d].

    Raises:
        TypeError: for columns that hold something else than numbers or equally long lists of numbers.
    """
    try:
        if hasattr(value, "__array__"):
            array = np.asarray(value)
        elif hasattr(value, "shape"):
            array = np.asarray(value[...])
        else:
            array = np.asarray(value[:])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: the numbers of {type(value).__name__} could not be read: {error}"
        ) from error
    return _stacked(array, name, value) if array.dtype == object else array


def _stacked(array: np.ndarray, name: str, value: Any) -> np.ndarray:
    """A column of lists as a matrix, and objects that are numbers as numbers."""
    try:
        if array.ndim == 1 and len(array) and isinstance(array[0], (Sequence, np.ndarray)):
            array = np.stack([np.asarray(row) for row in array])
        else:
            array = np.asarray(array.tolist())
    except ValueError:
        raise ValueError(
            f"{name} must have lists of equal length, got a {type(value).__name__} with others"
        ) from None
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
        ValueError: for a label in a dict that is not in `groups`, a label that "budgets" leaves out, and more asked of one than it has.
    """
    values = label_values(groups)
    if values is None:
        return (groups, *by_label.values())
    try:
        place = {label: i for i, label in enumerate(sorted(set(values)))}
    except TypeError as error:
        raise TypeError(f"groups must hold labels that can be sorted, such as strings: {error}") from None
    sizes = Counter(values)
    found = []
    for name, given in by_label.items():
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"{name} must be a dict by label where groups holds {_kind(values)}, got {given!r}"
            )
        for label, count in (given or {}).items():
            if label not in place and count:
                raise ValueError(
                    f"{name}: {count} asked of label {label!r}, which no candidate has in groups"
                )
            if name == "budgets" and isinstance(count, int) and count > sizes[label]:
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


def label_values(groups: Any) -> list[Any] | None:
    """The labels if they are something else than numbers."""
    if groups is None or isinstance(groups, Tensor):
        return None
    if isinstance(groups, (list, tuple)):
        values = list(groups)
    elif hasattr(groups, "__array__"):
        array = np.asarray(groups)
        values = array.tolist() if array.ndim == 1 and array.dtype.kind in "OUSMm" else []
    elif is_array(groups):
        values = list(groups[:])
    else:
        return None
    numbers = (int, float, complex, np.number, np.bool_, list)
    words = [value for value in values if not isinstance(value, numbers)]
    return values if words and not any(isinstance(value, (Tensor, np.ndarray)) for value in words) else None


def _kind(values: list[Any]) -> str:
    return f"labels of type {type(values[0]).__name__}"
