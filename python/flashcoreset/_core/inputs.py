"""Columns, frames and arrays of other libraries as NumPy arrays, by what they offer: none of the libraries is imported.

pandas, polars and pyarrow objects offer `__array__`, h5py and zarr arrays a shape and slices, `datasets` columns the slices of a
sequence. A column of equally long lists is a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
