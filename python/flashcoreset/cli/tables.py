"""Tables that commands write, a row for each pick: Parquet, CSV and JSON Lines; and the rows of files that were chosen from."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

import flashcoreset as fc
from flashcoreset._core.files import TABLES, csv_rows, json_lines, split_column, suffix_of
from flashcoreset._core.imports import imported
from flashcoreset.cli.errors import CommandError
from flashcoreset.cli.files_in import reading

# By name in an .npz file, the name of the column.
_SINGULAR = {"indices": "index", "weights": "weight", "gains": "gain", "values": "value", "targets": "target"}
_INDEX, _WEIGHT = "coreset_index", "coreset_weight"

Records = list[dict[str, Any]]


def pick_columns(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that have a number for each pick."""
    k = len(arrays["indices"])
    return {
        _SINGULAR.get(name, name): array
        for name, array in arrays.items()
        if array.shape == (k,) and name != "assignment"
    }


def check_rows(text: str, option: str, suffix: str) -> None:
    """Raises CommandError, before the work, if there is no such file, or if its rows do not go into a file of this suffix."""
    path = Path(split_column(text)[0])
    if "*" not in str(path) and not path.is_file():
        raise CommandError(f"{option}: no such file: {path}")
    if suffix == ".npz" and suffix_of(path) in TABLES:
        raise CommandError(
            f"{option}: rows of a table go into .parquet, .csv or .jsonl, got --out of {suffix}"
        )


def chosen_rows(text: str, option: str, arrays: Mapping[str, np.ndarray], total: int, suffix: str) -> Any:
    """The rows of a file at `indices`, with their places and weights: an Arrow table, or the records of text files; the matrix of an array.

    Args:
        text: the file's name, or file:column.
        option: what the person typed.
        arrays: "indices" and "weights".
        total: how many rows were chosen from.
        suffix: of the file that they go into; CSV into CSV leaves every value as it stands.
    """
    path = Path(split_column(text)[0])
    with reading(path, option):
        if suffix_of(path) in (".csv", ".tsv"):
            records = _of_csv(path, arrays["indices"], option, total)
            return _added(records if suffix == ".csv" else _typed(records), arrays)
        if suffix_of(path) in (".jsonl", ".ndjson"):
            return _added(_at(list(json_lines(path)), arrays["indices"], option, path, total), arrays)
        if suffix_of(path) in TABLES:
            return _of_table(path, arrays, option, total)
        rows = fc.open_rows(text)
    _check_total(len(rows), option, path, total)
    return rows[arrays["indices"]]


def _check_total(rows: int, option: str, path: Path, total: int) -> None:
    if rows != total:
        raise CommandError(f"{option}: {path} has {rows} rows, but the choice was made from {total}")


def _at(records: list[Any], indices: np.ndarray, option: str, path: Path, total: int) -> list[Any]:
    _check_total(len(records), option, path, total)
    return [records[row] for row in indices.tolist()]


def _of_csv(path: Path, indices: np.ndarray, option: str, total: int) -> Records:
    """The rows with every value as its text."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        names = next(csv.reader(stream, delimiter="\t" if suffix_of(path) == ".tsv" else ","))
    rows = _at([row for _, row in csv_rows(path)], indices, option, path, total)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _added(records: Records, arrays: Mapping[str, np.ndarray]) -> Records:
    pairs = zip(arrays["indices"].tolist(), arrays["weights"].tolist(), strict=True)
    return [
        {**record, _INDEX: row, _WEIGHT: weight} for record, (row, weight) in zip(records, pairs, strict=True)
    ]


def _of_table(path: Path, arrays: Mapping[str, np.ndarray], option: str, total: int) -> Any:
    pa = imported("pyarrow")
    indices = arrays["indices"]
    if suffix_of(path) in (".parquet", ".pq"):
        file = imported("pyarrow.parquet").ParquetFile(path, memory_map=True)
        _check_total(file.metadata.num_rows, option, path, total)
        ordered, places = np.unique(indices, return_inverse=True)
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        parts = []
        for group, (low, high) in enumerate(itertools.pairwise([0, *itertools.accumulate(counts)])):
            wanted = ordered[np.searchsorted(ordered, low) : np.searchsorted(ordered, high)]
            if len(wanted):
                parts.append(file.read_row_group(group).take(pa.array(wanted - low)))
        table = pa.concat_tables(parts).take(pa.array(places))
    else:
        ipc = imported("pyarrow.ipc")
        with path.open("rb") as stream:
            opened = ipc.open_file if stream.read(6) == b"ARROW1" else ipc.open_stream
        table = opened(pa.memory_map(str(path))).read_all()
        _check_total(table.num_rows, option, path, total)
        table = table.take(pa.array(indices))
    for name, values in ((_INDEX, arrays["indices"]), (_WEIGHT, arrays["weights"])):
        if name in table.column_names:  # of an earlier choice
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array(values))
    return table


def write_table(
    content: Any, arrays: Mapping[str, np.ndarray], info: str, suffix: str, stream: IO[bytes]
) -> None:
    """Writes a table as Parquet, CSV or JSON Lines.

    Args:
        content: what `chosen_rows` returned, or None for the columns of the picks alone.
        arrays: "indices", "weights" and whatever else was found.
        info: JSON, which Parquet keeps in its metadata under "flashcoreset".
        suffix: of the file.
        stream: the file.
    """
    if content is None:
        content = _records(pick_columns(arrays))
    elif isinstance(content, np.ndarray):
        content = _added(_of_matrix(content, lists=suffix != ".csv"), arrays)
    if suffix == ".parquet":
        pa = imported("pyarrow")
        table = pa.Table.from_pylist(content) if isinstance(content, list) else content
        metadata = {**(table.schema.metadata or {}), b"flashcoreset": info.encode()}
        imported("pyarrow.parquet").write_table(table.replace_schema_metadata(metadata), stream)
        return
    records = content if isinstance(content, list) else content.to_pylist()
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    if suffix == ".csv":
        _write_csv(records, text, list(pick_columns(arrays)))
    else:
        for record in records:
            text.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    text.detach()  # which flushes it; the stream stays open


def _typed(records: Records) -> Records:
    """Records of texts with numbers in place of the texts of columns that are all numbers ("007" is none)."""
    columns = {}
    for name in records[0]:
        texts = [record[name] for record in records]
        columns[name] = _numbers(texts) or texts
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _numbers(texts: list[Any]) -> list[Any] | None:
    try:
        whole = [int(text) for text in texts]
    except ValueError:
        whole = []
    if [str(number) for number in whole] == texts:
        return list(whole)
    if any(re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?", text) is None for text in texts):
        return None
    return [float(text) for text in texts]


def _records(columns: Mapping[str, np.ndarray]) -> Records:
    lists = {name: array.tolist() for name, array in columns.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _of_matrix(rows: np.ndarray, *, lists: bool) -> Records:
    values: Sequence[Any] = rows.tolist()
    if rows.ndim == 1:
        return [{"value": value} for value in values]
    if lists:
        return [{"features": value} for value in values]
    return [{f"x{i}": number for i, number in enumerate(value)} for value in values]


def _write_csv(records: Records, stream: IO[str], without: list[str]) -> None:
    """Writes records as CSV; `without` are the columns if there are no records."""
    names = list(dict.fromkeys(name for record in records for name in record)) or without
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {
                name: json.dumps(value, default=str) if isinstance(value, (list, dict)) else value
                for name, value in record.items()
            }
        )
