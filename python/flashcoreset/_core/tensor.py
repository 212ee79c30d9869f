"""The boundary: whatever the caller passes becomes a torch tensor, without a copy if its memory layout
allows that.

Names in the messages are the public argument names. Only types, shapes and options are checked here, so
that torch.compile can trace through; values are checked by the ops.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.inputs import as_array, is_array, is_arrow, remedy_for_type

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


# Whose values are numbers of float32.
_SMALL = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16)

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


# What torch raises for an invalid __dlpack__ or __dlpack_device__, or for a device that it was built without.
_MISLED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    LookupError,
    RuntimeError,
    SystemError,
    TypeError,
    ValueError,
)


class _Writable:
    """Shows a read-only array to NumPy as a writable one. torch has no read-only tensors and warns about such
    arrays; nothing here writes to its inputs."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory alive
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.from_numpy(
            array
        )  # Dynamo cannot inspect an array any further, and makes a tensor of it itself
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored; pass a plain array")
    if not array.dtype.isnative:
        raise ValueError(
            f"{name} has byte-swapped dtype {array.dtype.str!r}; convert it with "
            f"{name}.astype({name}.dtype.newbyteorder('='))"
        )
    itemsize = array.dtype.itemsize
    if not array.flags.aligned or any(stride < 0 or stride % itemsize for stride in array.strides):
        array = array.copy()
    elif not array.flags.writeable and array.dtype.kind in "fiu":
        array = np.asarray(_Writable(array))
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise TypeError(f"{name} must hold real numbers, got an array of dtype {array.dtype}") from None


def as_tensor(value: Any, name: str) -> Tensor:
    """`value` as a detached tensor: a torch.Tensor, a NumPy array, anything with `__dlpack__`, a list of numbers or of lists of
    numbers, or a column, frame or array of another library (see `flashcoreset._core.inputs`)."""
    if isinstance(value, Tensor):
        if value.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got a nested one")
        tensor = value.detach() if value.requires_grad else value
        # A view that only records its sign would lose it on the way to a kernel. (torch.compile cannot trace this check.)
        if not torch.compiler.is_compiling() and tensor.is_neg():
            tensor = tensor.resolve_neg()
        return tensor
    if isinstance(value, np.ndarray):
        return _from_numpy(value, name)
    if hasattr(value, "__dlpack__") and not is_arrow(value):
        try:
            return torch.from_dlpack(value)
        except _MISLED as error:
            raise TypeError(
                f"{name}: the __dlpack__ of {type(value).__name__} could not be taken: {error}"
            ) from error
    if isinstance(value, (list, tuple, range)):
        return _from_numbers(value, name)
    if not is_sparse(value) and is_array(value):
        return _from_numpy(as_array(value, name), name)
    raise TypeError(
        f"{name} must be a torch.Tensor, a NumPy array, an object with __dlpack__ or __array__, or a list of numbers, "
        f"got {type(value).__name__}{remedy_for_type(name, value)}"
    )


def _from_numbers(value: Sequence[Any], name: str) -> Tensor:
    """Lists of numbers, in float64 unless they are flags, or tensors and arrays of one shape as rows."""
    if value and isinstance(value[0], (Tensor, np.ndarray)):
        rows = [as_dense(row, f"{name}[{i}]") for i, row in enumerate(value)]
        if any(row.shape != rows[0].shape for row in rows):
            raise ValueError(f"{name} must be rows of one shape, got {rows[0].shape} and others")
        return torch.stack(promoted(*rows))
    if torch.compiler.is_compiling():
        return torch.tensor(value, dtype=torch.float64)
    tensor = _from_sequence(value, name, False)
    if tensor.dtype != torch.int64:
        return tensor
    if bool((tensor.abs() > 2**53).any()):
        raise ValueError(f"{name} must hold integers of at most 2^53, which float64 has, got larger ones")
    return tensor.to(torch.float64)


def as_floating(tensor: Tensor, name: str) -> Tensor:
    """`tensor`, which must be dense, in a floating type: flags and integers of 8 and 16 bits become float32, which has them all."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype in FLOATING:
        return tensor
    if tensor.dtype in _SMALL:
        return tensor.to(torch.float32)
    convert = f"; convert it with {name}.double()" if tensor.dtype in _INTEGERS else ""
    raise TypeError(
        f"{name} must have dtype float16, bfloat16, float32 or float64, got {_dtype(tensor)}{convert}"
    )


def promoted(*tensors: Tensor) -> list[Tensor]:
    """Floating tensors in the smallest type that has the numbers of them all."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def as_dense(value: Any, name: str) -> Tensor:
    """`value` as a detached tensor that is not sparse."""
    tensor = as_tensor(value, name)
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    return tensor


def as_matrix(value: Any, name: str) -> Tensor:
    """`value` as a dense floating tensor [rows, columns], neither of them 0."""
    tensor = as_floating(as_tensor(value, name), name)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
    rows, columns = tensor.shape
    if rows == 0 or columns == 0:
        raise ValueError(f"{name} must have at least 1 row and 1 column, got shape {(rows, columns)}")
    return tensor


def as_vector(
    value: Any, name: str, device: torch.device, *, integers: bool, length: int | None = None
) -> Tensor:
    """`value` as a tensor [length] on `device`, int64 or float64. Lists and tuples of numbers are accepted."""
    if isinstance(value, (list, tuple, range)):
        tensor = _from_sequence(value, name, integers).to(device)
    else:
        tensor = as_dense(value, name)
    if integers and tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got dtype {_dtype(tensor)}")
    if not integers and tensor.dtype not in FLOATING and tensor.dtype not in (*_INTEGERS, torch.bool):
        raise TypeError(f"{name} must hold real numbers, got dtype {_dtype(tensor)}")
    if tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        expected = "[n]" if length is None else f"[{length}]"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    same_device(tensor, name, device)
    result = tensor.to(torch.int64 if integers else torch.float64)
    if tensor.dtype == torch.uint64 and integers and not is_traced(tensor) and (result < 0).any():
        raise ValueError(f"{name} must be below 2^63, got {tensor[result < 0][0].item()}")
    return result


def as_integers(value: Any, name: str, shape: tuple[int, ...], whose: str, device: torch.device) -> Tensor:
    """`value` as an int64 tensor of the given shape on `device`; both come from the argument `whose`. Lists of
    numbers are accepted."""
    if isinstance(value, (list, tuple, range)):
        tensor = _from_sequence(value, name, True).to(device)
    else:
        tensor = as_dense(value, name)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got dtype {_dtype(tensor)}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape} as {whose} has it, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on device {tensor.device}, but {whose} is on {device}; move one of them")
    result = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and not torch.compiler.is_compiling() and (result < 0).any():
        raise ValueError(f"{name} must be below 2^63, got {tensor[result < 0][0].item()}")
    return result


def _from_sequence(value: Sequence[Any], name: str, integers: bool) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(list(value), dtype=torch.int64 if integers and not value else None)
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be a list of numbers, got a nested one of unequal lengths") from None
    # NumPy's types for integers beyond int64.
    if array.dtype == np.uint64 or (array.dtype == object and all(isinstance(v, int) for v in array.flat)):
        raise ValueError(f"{name} must be in the range of 64-bit integers, got {max(value, key=abs)}")
    if array.size == 0 and integers:
        array = array.astype(np.int64)
    return as_tensor(array, name)


def same_device(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on device {tensor.device}, but x is on {device}; move one of them")


def as_integer(value: Any, name: str) -> int:
    """`value` as an int; bool and float are refused."""
    if type(value) is int:
        return value
    is_bool = isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool
    if not is_bool and not isinstance(value, float):
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
            pass
    raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")


def at_least_one(value: Any, name: str) -> int:
    """`value` as an int >= 1."""
    number = as_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {number}")
    return number


def as_int64(value: Any, name: str) -> int:
    """`value` as an int that fits into 64 bits."""
    number = as_integer(value, name)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be in the range of 64-bit integers, got {number}")
    return number


def as_number(value: Any, name: str) -> float:
    """`value` as a finite float; bools, complex numbers and arrays other than 0-dimensional ones are refused."""
    number = value if type(value) is float else _as_float(value, name)
    if number - number != 0:  # math.isfinite would break the graph under torch.compile
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _as_float(value: Any, name: str) -> float:
    dtype = str(getattr(value, "dtype", ""))
    is_other = (
        isinstance(value, (bool, str, bytes, bytearray, complex)) or "bool" in dtype or "complex" in dtype
    )
    if not is_other and getattr(value, "shape", ()) == ():
        try:
            return float(value.detach() if isinstance(value, Tensor) else value)
        except OverflowError:
            raise ValueError(f"{name} must be in the range of a float, got a larger number") from None
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor without values
            pass
    raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def one_of(value: Any, name: str, valid: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a str, one of {', '.join(valid)}, got {value!r} of type {type(value).__name__}"
        )
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; valid names: {', '.join(valid)}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(*tensors: Tensor) -> bool:
    """Whether a graph is being made: by torch.compile, or from tensors that are not plain ones (fake, meta, wrapped)."""
    return torch.compiler.is_compiling() or any(type(t) not in _PLAIN or t.is_meta for t in tensors)


def check_not_meta(tensor: Tensor, name: str) -> None:
    """Raises ValueError for a tensor without values if the shape of a result depends on them."""
    if tensor.is_meta and type(tensor) in _PLAIN and not torch.compiler.is_compiling():
        raise ValueError(
            f"{name} is on the meta device, but how many rows are chosen depends on its values; pass tensors that have values, or "
            "work in a FakeTensorMode"
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises ValueError naming the first NaN or infinity of a tensor [rows, columns] or [length]."""
    rows = tensor if tensor.dim() == 2 else tensor.unsqueeze(0)
    # Some rows at a time, so that the masks stay small beside the tensor.
    step = max(1, (1 << 22) // max(1, rows.shape[1]))
    for begin in range(0, rows.shape[0], step):
        bad = ~torch.isfinite(rows[begin : begin + step])
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            where = f"row {begin + row}, column {column}" if tensor.dim() == 2 else f"position {column}"
            value = rows[begin + row, column].item()
            got = "NaN" if value != value else value
            raise ValueError(f"{name} must be finite, got {got} at {where}")


def check_weights(weights: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless client weights [m] are finite and >= 0, and their sum is in the range of `dtype`."""
    bad = ~((weights >= 0) & torch.isfinite(weights))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f"weights must be finite and >= 0, got {float(weights[i])} at position {i}")
    if not float(weights.sum()) <= torch.finfo(dtype).max:
        raise ValueError(
            f"weights: their sum, {float(weights.sum()):.3g}, overflows {dtype}; scale them down"
        )


def check_preselected(preselected: Tensor, n: int) -> None:
    """Raises ValueError unless candidates [p] are distinct and in [0, n)."""
    bad = (preselected < 0) | (preselected >= n)
    if bad.any():
        raise ValueError(f"preselected must be in [0, {n}), got {int(preselected[bad][0])}")
    ordered = preselected.sort().values
    twice = ordered[1:][ordered.diff() == 0]
    if twice.shape[0]:
        raise ValueError(f"preselected must be distinct, got {int(twice[0])} more than once")


@dataclass(frozen=True, eq=False)
class Csr:
    """A sparse matrix: row i has values[crow[i] : crow[i+1]] in columns col[crow[i] : crow[i+1]], ascending,
    each column once."""

    crow: Tensor  # [rows + 1] int64
    col: Tensor  # [nnz] int64
    values: Tensor  # [nnz]
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def rows(self) -> Tensor:
        """The row of each entry, [nnz] int64."""
        return torch.repeat_interleave(torch.arange(self.shape[0], device=self.device), self.crow.diff())

    def to_dense(self) -> Tensor:
        dense = self.values.new_zeros(self.shape)
        dense[self.rows(), self.col] = self.values
        return dense

    def square_part(self, members: Tensor) -> Csr:
        """The rows and columns in `members` (ascending)."""
        place = torch.full((self.shape[1],), -1, dtype=torch.int64, device=self.device)
        place[members] = torch.arange(len(members), device=self.device)
        row_place = torch.full((self.shape[0],), -1, dtype=torch.int64, device=self.device)
        row_place[members] = torch.arange(len(members), device=self.device)
        row = torch.repeat_interleave(row_place, self.crow.diff())
        keep = ((row >= 0) & (place[self.col] >= 0)).nonzero()[:, 0]
        new_crow = torch.zeros(len(members) + 1, dtype=torch.int64, device=self.device)
        new_crow[1:] = torch.bincount(row[keep], minlength=len(members)).cumsum(0)
        return Csr(new_crow, place[self.col[keep]], self.values[keep], (len(members), len(members)))


def is_sparse(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout in _SPARSE
    scipy_sparse = sys.modules.get("scipy.sparse")
    return scipy_sparse is not None and bool(scipy_sparse.issparse(value))


def as_csr(value: Any, name: str) -> Csr:
    """A scipy CSR matrix or array, or a torch sparse CSR tensor, checked; without a copy if it is canonical
    with 64-bit indices."""
    if isinstance(value, Tensor):
        if value.layout is not torch.sparse_csr:
            raise TypeError(
                f"{name} must be a dense tensor or a sparse CSR tensor, got layout {value.layout}"
            )
        value = value.detach()
        crow, col, values = value.crow_indices(), value.col_indices(), value.values()
    else:
        if value.format != "csr":
            raise TypeError(
                f"{name} must be in CSR format, got scipy format {value.format!r}; convert it with .tocsr()"
            )
        crow = _from_numpy(value.indptr, f"{name}.indptr")
        col = _from_numpy(value.indices, f"{name}.indices")
        values = _from_numpy(value.data, f"{name}.data")
        # scipy lets the arrays be longer than their content.
        held = int(crow[-1]) if len(crow) else 0
        if 0 <= held < min(len(col), len(values)):
            col, values = col[:held], values[:held]
    values = as_floating(values, name)
    shape = tuple(value.shape)
    if len(shape) != 2 or values.dim() != 1:
        raise ValueError(f"{name} must have 2 dimensions, got shape {shape}")
    if 0 in shape:
        raise ValueError(f"{name} must have at least 1 row and 1 column, got shape {shape}")
    crow, col = crow.to(torch.int64).contiguous(), col.to(torch.int64).contiguous()
    return canonical_csr(crow, col, values.contiguous(), (int(shape[0]), int(shape[1])), name)


def canonical_csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int], name: str) -> Csr:
    # Neither scipy nor torch checks these in general, and a kernel would read outside its memory.
    rows, columns = shape
    if crow.shape != (rows + 1,) or col.shape != values.shape:
        raise ValueError(
            f"{name}: index arrays of lengths {len(crow)} and {len(col)} do not fit its shape {shape}"
        )
    if crow[0] != 0 or crow[-1] != len(col) or (crow.diff() < 0).any():
        raise ValueError(f"{name}: row pointers must rise from 0 to the number of entries, {len(col)}")
    if len(col) and (col.min() < 0 or col.max() >= columns):
        raise ValueError(
            f"{name}: column indices must be in [0, {columns}), got {int(col.min())} to {int(col.max())}"
        )
    row = torch.repeat_interleave(torch.arange(rows, device=crow.device), crow.diff())
    falls = (row.diff() == 0) & (col.diff() <= 0)
    if falls.any():
        order = torch.argsort(row * columns + col, stable=True)
        row, col, values = row[order], col[order], values[order]
        first = torch.ones(len(col), dtype=torch.bool, device=crow.device)
        first[1:] = (row.diff() != 0) | (col.diff() != 0)
        place = first.cumsum(0) - 1
        # Half types are summed in float32, as everywhere.
        values = values.to(compute_dtype(values.dtype))
        summed = torch.zeros(int(place[-1]) + 1, dtype=values.dtype, device=values.device)
        values = summed.index_add_(0, place, values)
        row, col = row[first], col[first]
        crow = torch.zeros(rows + 1, dtype=torch.int64, device=crow.device)
        crow[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return Csr(crow, col, values, shape)
