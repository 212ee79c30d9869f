"""Arrays in files, and columns of tables, read by slices: `open_rows`. Libraries are imported when a file of theirs is opened."""

from __future__ import annotations

import csv
import glob
import itertools
import json
import os
import queue
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from flashcoreset._core.imports import imported
from flashcoreset._core.inputs import ColumnError, arrow_matrix, as_array, is_array
from flashcoreset._core.tensor import at_least_one

ARRAYS = (".npy", ".npz", ".pt", ".pth", ".safetensors")
TABLES = (".parquet", ".pq", ".arrow", ".feather", ".ipc", ".csv", ".tsv", ".jsonl", ".ndjson")
FORMATS = ", ".join((*ARRAYS, *TABLES))
_BATCH = 1 << 24  # bytes


class FileError(ValueError):
    """Why a file cannot be read as an array."""


class _Reader(Protocol):
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, begin: int, end: int) -> np.ndarray: ...


class Rows:
    """An array [n] or [n, d] in files, of which slices are read: what `open_rows` returns. Every function takes it where it takes
    an array, and reads it whole then, without a second copy; `simcore` and `nearest` read it a batch at a time.

    Attributes:
        shape: (n,) or (n, d).
        dtype: the NumPy type.

    Example:
        >>> import numpy as np, flashcoreset as fc
        >>> rows = fc.open_rows(np.arange(6.0).reshape(3, 2))
        >>> rows.shape, rows[1:].tolist(), len(list(rows.batches(2)))
        ((3, 2), [[2.0, 3.0], [4.0, 5.0]], 2)
    """

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self.shape = tuple(reader.shape)
        self.dtype = np.dtype(reader.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: Any) -> np.ndarray:
        if key is Ellipsis:
            key = slice(None)
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            if step == 1:
                return self._reader.read(begin, max(begin, end))
            key = np.arange(len(self))[key]
        if isinstance(key, (int, np.integer)):
            row = range(len(self))[key]
            return self._reader.read(row, row + 1)[0]
        rows = np.asarray(key)
        ordered, places = np.unique(rows, return_inverse=True)
        if len(ordered) and not 0 <= ordered[0] <= ordered[-1] < len(self):
            raise IndexError(f"rows must be in [0, {len(self)}), got {ordered[0]} to {ordered[-1]}")
        out = np.empty((len(ordered), *self.shape[1:]), self.dtype)
        step = self._batch_rows()
        for begin in range(0, len(self), step):
            low, high = np.searchsorted(ordered, (begin, begin + step))
            if low < high:
                part = self._reader.read(begin, min(begin + step, len(self)))
                out[low:high] = part[ordered[low:high] - begin]
        return out[places]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows, for `numpy.asarray`."""
        return self[...] if dtype is None else self[...].astype(dtype, copy=False)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("rows of files are read in batches: iterate over rows.batches(), or take a slice")

    def _batch_rows(self) -> int:
        size = max(1, self.dtype.itemsize) * int(np.prod(self.shape[1:], dtype=np.int64))
        return max(1, _BATCH // max(1, size))

    def batches(self, rows: int | None = None, prefetch: int = 2) -> Iterator[np.ndarray]:
        """All rows in their order, so many at a time, read ahead by a thread.

        Args:
            rows: rows of a batch; None: about 16 MiB.
            prefetch: how many batches are read ahead; 0 reads each when it is asked for.

        Raises:
            ValueError: for numbers out of range, and for a file that changed or is damaged.

        Example:
            >>> import numpy as np, flashcoreset as fc
            >>> [len(batch) for batch in fc.open_rows(np.ones((5, 2))).batches(2)]
            [2, 2, 1]
        """
        step = self._batch_rows() if rows is None else at_least_one(rows, "rows")
        parts = (self._reader.read(b, min(b + step, len(self))) for b in range(0, len(self), step))
        return read_ahead(parts, prefetch)


def open_rows(source: Any, column: str | Sequence[str] | None = None) -> Rows:
    """Opens an array in a file, or a column of a table in one, without reading it: for data that should be in memory once or not at all.

    Args:
        source: a file's name, .npy (memory-mapped), .npz, .pt (of tensors alone), .safetensors, .parquet, .arrow or .feather, .csv, .tsv or
            .jsonl; "file:column" names an array or column in it, "file:a,b,c" several columns of numbers; a name with * stands for all files
            that it matches, in the order of their names; a list of names; a `datasets.Dataset`; or an array, column or frame.
        column: the same as after the colon. None: the only array or column, or all columns if they are all numbers.

    Returns:
        Rows: [n, d] for a matrix, a column of lists of equal length and several columns; [n] for a column of numbers or strings.

    Raises:
        TypeError: for another type of source.
        ValueError: for a file of another format, damaged or without that column, lists of unequal lengths or with missing values, and files
            that do not go together.
        OSError: if a file cannot be read.
        ImportError: if the library for the format is missing (pyarrow for Parquet and Arrow, safetensors).

    Example:
        >>> import os, tempfile, numpy as np, flashcoreset as fc
        >>> path = os.path.join(tempfile.mkdtemp(), "points.npy")
        >>> np.save(path, np.eye(4, dtype=np.float32))
        >>> fc.simcore(fc.open_rows(path), np.eye(4, dtype=np.float32)[:1], 1).indices
        tensor([0])
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        path, named = split_column(text)
        if column is not None:
            path, named = text, column if isinstance(column, str) else ",".join(column)
        if "*" in path and not os.path.exists(path):
            found = sorted(glob.glob(path, recursive=True))
            if not found:
                raise FileError(f"no file matches {path}")
            return Rows(_chained([_opened(Path(one), named) for one in found], found))
        return Rows(_opened(Path(path), named))
    if isinstance(source, (list, tuple)) and source and isinstance(source[0], (str, os.PathLike)):
        parts = [open_rows(one, column) for one in source]
        return Rows(_chained([part._reader for part in parts], [str(one) for one in source]))
    if type(source).__module__.partition(".")[0] == "datasets" and hasattr(source, "with_format"):
        return Rows(_Dataset(source, column))
    if is_array(source) or hasattr(source, "__dlpack__"):
        if column is not None:
            source = source[column if isinstance(column, str) else list(column)]
        array = source if isinstance(source, np.ndarray) else None
        if array is None:
            array = (
                np.from_dlpack(source)
                if not hasattr(source, "__array__") and hasattr(source, "__dlpack__")
                else as_array(source, "source")
            )
        return Rows(_Memory(array))
    raise TypeError(
        f"source must be a file's name or names, a datasets.Dataset, or an array or column, got {type(source).__name__}"
    )


def read_ahead(batches: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """The same batches, `depth` of them made ahead by a thread of their own, so that reading and computing overlap.

    Args:
        batches: any iterable. It is iterated by another thread; an error in it is raised here, in its place.
        depth: >= 0; 0 makes each batch when it is asked for.

    Example:
        >>> import flashcoreset as fc
        >>> list(fc.read_ahead(range(3)))
        [0, 1, 2]
    """
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth must be an int, got {depth!r} of type {type(depth).__name__}")
    if depth < 0:
        raise ValueError(f"depth must be >= 0, got {depth}")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable, got {type(batches).__name__}")
    return _ahead(batches, depth) if depth else iter(batches)


def _ahead(batches: Iterable[Any], depth: int) -> Iterator[Any]:
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()
    end = object()

    def put(item: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        try:
            for batch in batches:
                if not put((True, batch)):
                    return
            put((True, end))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=run, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            good, item = ready.get()
            if not good:
                raise item
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def split_column(text: str) -> tuple[str, str | None]:
    """``file:column`` -> (file, column); a file whose name holds the colon itself wins."""
    path, colon, column = text.rpartition(":")
    if colon and suffix_of(Path(path)) in (*ARRAYS[1:], *TABLES) and not os.path.exists(text):
        return path, column
    return text, None


def suffix_of(path: Path) -> str:
    return path.suffix.lower()


def _opened(path: Path, column: str | None) -> _Reader:
    opener = _OPENERS.get(suffix_of(path))
    if opener is None:
        raise FileError(
            f"{path} must be a file of one of the formats {FORMATS}, got {path.suffix or 'no ending'}"
        )
    if not path.exists():
        raise FileError(f"no such file: {path}")
    if not path.is_file():
        raise FileError(f"{path} is not a regular file")
    if path.stat().st_size == 0:
        raise FileError(f"{path} is empty")
    try:
        return opener(path, column)
    except (FileError, ColumnError, ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever the library raises for a damaged file
        raise FileError(f"cannot read {path}: {error}") from None


def _chosen(names: Sequence[str], column: str | None, path: Path) -> str:
    listed = ", ".join(names) or "nothing"
    if column is None:
        if len(names) != 1:
            raise FileError(f"{path} holds {listed}; choose one as {path}:NAME")
        return names[0]
    if column not in names:
        raise FileError(f"no array {column!r} in {path}, which holds {listed}")
    return column


class _Memory:
    """An array in memory, or a memory-mapped one."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype
        if not array.ndim:
            raise FileError("a single number is no array of rows")

    def read(self, begin: int, end: int) -> np.ndarray:
        return self._array[begin:end]


def _npy(path: Path, column: str | None) -> _Reader:
    if column is not None:
        raise FileError(f"{path} holds a single array; leave out :{column}")
    with path.open("rb") as stream:
        if stream.read(6) != b"\x93NUMPY":
            raise FileError(f"{path} is no .npy file; save the array with numpy.save")
    return _Memory(np.load(path, mmap_mode="r", allow_pickle=False))


def _npz(path: Path, column: str | None) -> _Reader:
    if not zipfile.is_zipfile(path):
        raise FileError(f"{path} is no .npz archive, or a damaged one; save the arrays with numpy.savez")
    with np.load(path, allow_pickle=False) as archive:
        return _Memory(archive[_chosen(archive.files, column, path)])


def _pt(path: Path, column: str | None) -> _Reader:
    is_archive = zipfile.is_zipfile(path)  # since torch 1.6; files from before cannot be memory-mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", mmap=is_archive, weights_only=True)
    except Exception as error:
        raise FileError(
            f"cannot read {path}: it holds more than tensors, or is damaged; save a tensor, or a dict of them, with torch.save "
            f"({str(error).splitlines()[0]})"
        ) from None
    if isinstance(loaded, torch.Tensor):
        if column is not None:
            raise FileError(f"{path} holds a single tensor; leave out :{column}")
        tensor = loaded
    elif isinstance(loaded, dict):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        tensor = tensors[_chosen(list(tensors), column, path)]
    else:
        raise FileError(f"{path} must hold a tensor or a dict of tensors, got {type(loaded).__name__}")
    return _Memory(_numpy(tensor, path))


def _numpy(tensor: torch.Tensor, path: Path) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        raise FileError(f"{path} holds a sparse tensor; save it dense")
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


class _Safetensors:
    """A tensor of a file of safetensors, whose slices alone are read."""

    def __init__(self, path: Path, column: str | None) -> None:
        safe_open = _library("safetensors").safe_open
        self._file = safe_open(str(path), framework="pt")
        self._name = _chosen(list(self._file.keys()), column, path)
        self._path = path
        self.shape = tuple(self._file.get_slice(self._name).get_shape())
        if not self.shape:
            raise FileError(f"{path}:{self._name} is a single number, not an array of rows")
        self.dtype = self.read(0, min(1, self.shape[0])).dtype

    def read(self, begin: int, end: int) -> np.ndarray:
        return _numpy(self._file.get_slice(self._name)[begin:end], self._path)


def _library(name: str) -> Any:
    try:
        return imported(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ImportError(
            f"{package} is missing, which such a file is read by: pip install 'flashcoreset[files]'"
        ) from None


def _columns(
    names: Sequence[str], column: str | None, path: Any, numeric: Callable[[str], bool]
) -> list[str]:
    """The columns to read: those named, the only one, or all if they are numbers."""
    listed = ", ".join(names) or "nothing"
    if column is None:
        if len(names) == 1 or (names and all(numeric(name) for name in names)):
            return list(names)
        raise FileError(
            f"{path} has the columns {listed}; choose one as {path}:NAME, or several as {path}:A,B"
        )
    wanted = [column] if column in names else column.split(",")
    for name in wanted:
        if name not in names:
            raise FileError(f"no column {name!r} in {path}, which has {listed}")
    if len(set(wanted)) < len(wanted):
        raise FileError(f"{path}:{column} names a column twice")
    return wanted


class _Arrow:
    """Columns of a table, by tables of consecutive rows."""

    def __init__(self, schema: Any, rows: int, columns: list[str], where: str) -> None:
        self._schema, self._rows, self._where, self._columns = schema, rows, where, columns
        first = next(iter(self._tables(0, rows)), None)
        if first is None or not rows:
            raise FileError(f"{where} has no rows")
        head = self._matrix(first.slice(0, 1))
        self.shape, self.dtype = (rows, *head.shape[1:]), head.dtype

    def _tables(self, begin: int, end: int) -> Iterator[Any]:
        raise NotImplementedError

    def _matrix(self, table: Any) -> np.ndarray:
        parts = []
        for name in self._columns:
            column = table[name]
            missing = column.null_count
            if missing:
                raise FileError(
                    f"{self._where}: column {name!r} has {missing} missing values; fill or drop them"
                )
            parts.append(arrow_matrix(column, f"{self._where}: column {name!r}"))
        if len(parts) == 1:
            return parts[0]
        for name, part in zip(self._columns, parts, strict=True):
            if part.ndim != 1 or part.dtype.kind not in "biuf":
                raise FileError(f"{self._where}: column {name!r} beside others must hold one number per row")
        return np.stack(parts, 1)

    def read(self, begin: int, end: int) -> np.ndarray:
        out = np.empty((end - begin, *self.shape[1:]), self.dtype)
        done = 0
        for table in self._tables(begin, end):
            part = self._matrix(table)
            if part.shape[1:] != self.shape[1:]:
                raise FileError(
                    f"{self._where}: lists must have equal lengths, got {self.shape[1:]} in row 0 and {part.shape[1:]} from row {begin + done} on"
                )
            if (
                part.dtype.kind in "biuf"
                and self.dtype.kind in "biuf"
                and np.result_type(part, out) != out.dtype
            ):
                raise FileError(
                    f"{self._where}: types must be the same throughout, got {self.dtype} and {part.dtype}"
                )
            out[done : done + len(part)] = part
            done += len(part)
        if done != end - begin:
            raise FileError(
                f"{self._where} has {begin + done} rows, where {self._rows} were announced; has it changed?"
            )
        return out


class _Parquet(_Arrow):
    def __init__(self, path: Path, column: str | None) -> None:
        self._file = _library("pyarrow.parquet").ParquetFile(path, memory_map=True)
        schema = self._file.schema_arrow
        names = _columns(schema.names, column, path, lambda name: _is_number(schema.field(name).type))
        self._pa = _library("pyarrow")
        counts = [
            self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)
        ]
        self._starts = [0, *itertools.accumulate(counts)]
        self._ahead: tuple[int, Any, Iterator[Any]] | None = (
            None  # the row that comes next, what is left of a batch, later batches
        )
        super().__init__(schema, self._file.metadata.num_rows, names, f"{path}:{','.join(names)}")

    def _tables(self, begin: int, end: int) -> Iterator[Any]:
        place, left, later = begin, None, None
        if self._ahead is not None and self._ahead[0] == begin:
            place, left, later = self._ahead
        self._ahead = None
        if later is None:
            group = max(0, int(np.searchsorted(self._starts, begin, side="right")) - 1)
            groups = range(group, len(self._starts) - 1)
            later = self._file.iter_batches(65536, row_groups=groups, columns=self._columns)
            skip = begin - self._starts[group]
            while skip:
                batch = next(later)
                left = batch.slice(skip) if skip < batch.num_rows else None
                skip = max(0, skip - batch.num_rows)
        while place < end:
            batch = left if left is not None else next(later, None)
            if batch is None:
                return
            count = min(batch.num_rows, end - place)
            yield self._pa.Table.from_batches([batch.slice(0, count)])
            left = batch.slice(count) if count < batch.num_rows else None
            place += count
        self._ahead = place, left, later


class _Ipc(_Arrow):
    """Files of Arrow (Feather), and the streams that `datasets` keeps, memory-mapped."""

    def __init__(self, path: Path, column: str | None) -> None:
        pa, ipc = _library("pyarrow"), _library("pyarrow.ipc")
        source = pa.memory_map(str(path))
        with path.open("rb") as stream:
            is_file = stream.read(6) == b"ARROW1"
        table = ipc.open_file(source).read_all() if is_file else ipc.open_stream(source).read_all()
        self._table = table
        names = _columns(
            table.schema.names, column, path, lambda name: _is_number(table.schema.field(name).type)
        )
        super().__init__(table.schema, table.num_rows, names, f"{path}:{','.join(names)}")

    def _tables(self, begin: int, end: int) -> Iterator[Any]:
        pa = _library("pyarrow")
        for batch in self._table.select(self._columns).slice(begin, end - begin).to_batches():
            yield pa.Table.from_batches([batch])


class _Dataset(_Arrow):
    """Columns of a `datasets.Dataset`."""

    def __init__(self, dataset: Any, column: str | Sequence[str] | None) -> None:
        if not hasattr(dataset, "num_rows") or isinstance(dataset, dict):
            raise TypeError(
                f"source must be a datasets.Dataset, got a {type(dataset).__name__}; choose a split, or load it without streaming"
            )
        self._dataset = dataset.with_format("arrow")
        named = column if column is None or isinstance(column, str) else ",".join(column)
        schema = dataset.features.arrow_schema
        names = _columns(schema.names, named, "the dataset", lambda name: _is_number(schema.field(name).type))
        self._dataset = self._dataset.select_columns(names)
        super().__init__(schema, dataset.num_rows, names, f"the dataset's {','.join(names)}")

    def _tables(self, begin: int, end: int) -> Iterator[Any]:
        for start in range(begin, end, 65536):
            yield self._dataset[start : min(start + 65536, end)]


def _is_number(kind: Any) -> bool:
    return str(kind) in ("bool", "halffloat", "float", "double") or str(kind).lstrip("u").startswith("int")


def _csv(path: Path, column: str | None) -> _Reader:
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, delimiter=delimiter)
        names = next(reader)
        first = next((row for row in reader if row), None)
    if first is None:
        raise FileError(f"{path} has no rows below its line of names")
    if len(set(names)) < len(names):
        raise FileError(f"{path} has a column name twice in its first line")
    seen = dict(zip(names, first, strict=False))
    wanted = _columns(names, column, path, lambda name: _as_float(seen.get(name, "")) is not None)
    places = [names.index(name) for name in wanted]
    if all(_as_float(seen.get(name, "")) is not None for name in wanted):
        found = _csv_numbers(path, delimiter, places, wanted)
        if found is not None:
            return _Memory(found)
    if len(wanted) > 1:
        raise FileError(f"{path}: the columns {', '.join(wanted)} must hold numbers alone")
    values = []
    for number, row in csv_rows(path):
        if len(row) != len(names):
            raise FileError(f"{path}, line {number}: expected {len(names)} columns, got {len(row)}")
        values.append(row[places[0]])
    if values[0][:1] == "[":
        return _Memory(_stacked([_list_of(text, path, wanted[0]) for text in values], path, wanted[0]))
    return _Memory(np.array(values))


def _csv_numbers(path: Path, delimiter: str, places: list[int], names: list[str]) -> np.ndarray | None:
    """[n] or [n, columns]; None where one of several values of a single column is no number."""
    try:
        array = np.loadtxt(
            path,
            delimiter=delimiter,
            skiprows=1,
            usecols=places,
            quotechar='"',
            comments=None,
            ndmin=2,
            encoding="utf-8-sig",
        )
    except ValueError as error:
        if len(places) == 1:
            return None
        raise FileError(f"{path}: the columns {', '.join(names)} must hold numbers alone: {error}") from None
    array = array if len(places) > 1 else array[:, 0]
    whole = np.abs(array) < 2**53
    if whole.all() and (array == np.trunc(array)).all():
        return array.astype(np.int64) if len(places) == 1 else array
    return array


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file below the line of names, each with its line's number."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, delimiter="\t" if suffix_of(path) == ".tsv" else ",")
        next(reader)
        for row in reader:
            if row:
                yield reader.line_num, row


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _list_of(text: str, path: Path, name: str) -> list[float]:
    try:
        found: list[float] = json.loads(text)
    except ValueError:
        raise FileError(
            f"{path}: column {name!r} must hold numbers, or lists like [1.0, 2.0], got {text[:40]!r}"
        ) from None
    return found


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON Lines; empty lines are left out."""
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise FileError(f"{path}, line {number}: {error}") from None
            if not isinstance(found, dict):
                raise FileError(
                    f"{path}, line {number}: expected an object {{...}}, got {type(found).__name__}"
                )
            yield found


def _json(path: Path, column: str | None) -> _Reader:
    first = next(json_lines(path), None)
    if first is None:
        raise FileError(f"{path} has no rows")
    wanted = _columns(list(first), column, path, lambda name: isinstance(first[name], (int, float)))
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    for number, row in enumerate(json_lines(path)):
        for name in wanted:
            if row.get(name) is None:
                raise FileError(f"{path}: row {number} has no value of {name!r}")
            value = row[name]
            values[name].append(np.asarray(value) if isinstance(value, list) else value)
    if len(wanted) == 1:
        return _Memory(_stacked(values[wanted[0]], path, wanted[0]))
    parts = [_stacked(values[name], path, name) for name in wanted]
    for name, part in zip(wanted, parts, strict=True):
        if part.ndim != 1 or part.dtype.kind not in "biuf":
            raise FileError(f"{path}: column {name!r} beside others must hold one number per row")
    return _Memory(np.stack(parts, 1))


def _stacked(values: list[Any], path: Path, name: str) -> np.ndarray:
    kinds = {isinstance(value, str) for value in values}
    if len(kinds) > 1:
        raise FileError(f"{path}: column {name!r} must hold strings or numbers, got both")
    try:
        array = np.array(values)
    except ValueError:
        raise FileError(f"{path}: column {name!r} must hold lists of equal length, got others") from None
    if array.dtype.kind not in "biufU":
        raise FileError(
            f"{path}: column {name!r} must hold numbers, lists of numbers or strings, got other values"
        )
    return array


class _Chain:
    """Files one after the other."""

    def __init__(self, parts: list[_Reader], names: list[str]) -> None:
        self._parts = parts
        first = parts[0]
        for part, name in zip(parts, names, strict=True):
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise FileError(
                    f"files must go together, got {first.dtype} {list(first.shape)} in {names[0]} and {part.dtype} {list(part.shape)} in {name}"
                )
        self._starts = [0, *itertools.accumulate(part.shape[0] for part in parts)]
        self.shape, self.dtype = (self._starts[-1], *first.shape[1:]), first.dtype

    def read(self, begin: int, end: int) -> np.ndarray:
        wanted = []
        for part, low, high in zip(self._parts, self._starts, self._starts[1:], strict=False):
            if max(begin, low) < min(end, high):
                wanted.append((part, max(begin, low) - low, min(end, high) - low))
        if len(wanted) == 1:
            part, low, high = wanted[0]
            return part.read(low, high)
        out = np.empty((end - begin, *self.shape[1:]), self.dtype)
        done = 0
        for part, low, high in wanted:
            out[done : done + high - low] = part.read(low, high)
            done += high - low
        return out


def _chained(parts: list[_Reader], names: list[str]) -> _Reader:
    return parts[0] if len(parts) == 1 else _Chain(parts, names)


_OPENERS: dict[str, Callable[[Path, str | None], _Reader]] = {
    ".npy": _npy,
    ".npz": _npz,
    **dict.fromkeys((".pt", ".pth"), _pt),
    ".safetensors": _Safetensors,
    **dict.fromkeys((".parquet", ".pq"), _Parquet),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), _Ipc),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    **dict.fromkeys((".jsonl", ".ndjson"), _json),
}
