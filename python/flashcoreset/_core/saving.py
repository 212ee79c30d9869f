"""Results in files: arrays of an .npz archive and a text of JSON that says how they belong together. Nothing is pickled.

The entry "flashcoreset" is the text: {"format": 1, "version": ..., "result": value}. A value is null, a bool, a number, a string or a list
of values, or a dict with one of these keys: "kind" (a result, with "fields"), "dict" (pairs of key and value), "tuple" (values),
"float" ("nan", "inf", "-inf"), "tensor" and "array" (the name of the entry that holds it; "dtype" where NumPy has no such type, "scalar"
for a number of NumPy).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

_ENTRY = "flashcoreset"
_FORMAT = 1
_Type = TypeVar("_Type", bound=type)


class _Kind(NamedTuple):
    type: type
    fields: Callable[[Any], dict[str, Any]]
    make: Callable[[dict[str, Any]], Any]


_KINDS: dict[str, _Kind] = {}


def savable(
    kind: _Type,
    fields: Callable[[Any], dict[str, Any]] | None = None,
    make: Callable[[dict[str, Any]], Any] | None = None,
) -> _Type:
    """Makes a class one that files may hold: a dataclass by its fields, others by `fields` and `make`."""
    if fields is None:
        names = [field.name for field in dataclasses.fields(kind)]
        fields = lambda value: {name: getattr(value, name) for name in names}  # noqa: E731
    _KINDS[kind.__name__] = _Kind(kind, fields, make or (lambda given: kind(**given)))
    return kind


class Saved:
    """What can be saved."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes this result to a file, for `flashcoreset.load`. The file is an .npz archive of arrays, and nothing in it is pickled; it
        appears whole, or an existing one stays as it was.

        Args:
            path: the file's name; an existing file is replaced.

        Raises:
            TypeError: for what such a file cannot hold: other objects than numbers, strings, tensors, arrays, and lists, tuples and dicts of
                them.
            OSError: if the file cannot be written.

        Example:
            >>> import tempfile, os, torch, flashcoreset as fc
            >>> path = os.path.join(tempfile.mkdtemp(), "chosen.npz")
            >>> fc.Coreset(torch.tensor([4, 2]), torch.ones(2), {"rounds": 1}).save(path)
            >>> fc.load(path).indices
            tensor([4, 2])
        """
        arrays: dict[str, np.ndarray] = {}
        tree = _encoded(self, "", arrays)
        text = json.dumps({"format": _FORMAT, "version": version("flashcoreset"), "result": tree})
        with replaced_file(path) as stream:
            np.savez(stream, allow_pickle=False, **{_ENTRY: np.array(text)}, **arrays)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """Reads what `save` wrote, or a choice that the command line wrote as .npz. No code in the file is run.

    Args:
        path: the file's name.
        device: where the tensors go.

    Returns:
        The result: a Coreset, Selection, Transport, AdamState, TrainingDynamics, ...; of the command line's files a Coreset
        whose `info` also has the other arrays.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not such a file.

    Example:
        >>> import tempfile, os, torch, flashcoreset as fc
        >>> path = os.path.join(tempfile.mkdtemp(), "picks.npz")
        >>> fc.facility_location(torch.eye(4), 2).save(path)
        >>> fc.load(path).assignment
        tensor([ 0,  1, -1, -1])
    """
    name = os.fspath(path)
    with open(path, "rb") as stream:
        if not zipfile.is_zipfile(stream):
            raise ValueError(f"path must be a file that save wrote, got {name}, which is no .npz archive")
        try:
            with np.load(stream, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
        except Exception as error:  # zipfile's, zlib's and the header parser's errors
            raise ValueError(f"path: {name} is damaged or holds pickled objects: {error}") from None
    where = torch.device(device)
    if _ENTRY not in arrays:
        return _from_command_line(arrays, name, where)
    try:
        document = json.loads(str(arrays[_ENTRY]))
        found = document["format"]
        if found != _FORMAT:
            raise ValueError(f"its format is {found!r}, and this version reads {_FORMAT}")
        return _decoded(document["result"], arrays, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"path must be a file that save wrote, got {name}: {error}") from None


def _from_command_line(arrays: dict[str, np.ndarray], name: str, device: torch.device) -> Any:
    kind = _KINDS["Coreset"].type
    if not {"indices", "weights", "info"} <= arrays.keys():
        listed = ", ".join(arrays) or "nothing"
        raise ValueError(f"path must be a file that save wrote, got {name}, which holds {listed}")
    info = json.loads(str(arrays.pop("info")))
    found = {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}
    return kind(found.pop("indices"), found.pop("weights"), {**info, **found})


def _encoded(value: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    """`value` as JSON, its arrays put into `arrays` by the place where they are."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise TypeError(f"{where} is a sparse tensor, which save cannot write; make it dense")
        tensor, more = value.detach().cpu(), {}
        if tensor.dtype is torch.bfloat16:
            tensor, more = tensor.view(torch.int16), {"dtype": "bfloat16"}
        arrays[where] = tensor.resolve_neg().numpy()
        return {"tensor": where, **more}
    if isinstance(value, (np.ndarray, np.generic)):
        if np.asarray(value).dtype.hasobject:
            raise TypeError(
                f"{where} is an array of objects, which save cannot write; pass numbers or strings"
            )
        arrays[where] = np.asarray(value)
        return {"array": where, **({"scalar": True} if isinstance(value, np.generic) else {})}
    kind = _KINDS.get(type(value).__name__)
    if kind is not None and type(value) is kind.type:
        fields = {
            name: _encoded(entry, f"{where}.{name}" if where else name, arrays)
            for name, entry in kind.fields(value).items()
        }
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [
                    _encoded(key, f"{where}.key{i}", arrays),
                    _encoded(entry, f"{where}.{_word(key, i)}", arrays),
                ]
                for i, (key, entry) in enumerate(value.items())
            ]
        }
    if isinstance(value, (list, tuple)):
        entries = [_encoded(entry, f"{where}.{i}", arrays) for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"tuple": entries}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which save cannot write; replace it by numbers, strings, tensors or arrays"
    )


def _word(key: Any, place: int) -> str:
    """A key as part of the name of an entry, which becomes the name of a file in the archive."""
    return key if isinstance(key, str) and key.isidentifier() else f"value{place}"


def _decoded(tree: Any, arrays: dict[str, np.ndarray], device: torch.device) -> Any:
    if isinstance(tree, list):
        return [_decoded(entry, arrays, device) for entry in tree]
    if not isinstance(tree, dict):
        return tree
    if "kind" in tree:
        fields = {name: _decoded(entry, arrays, device) for name, entry in tree["fields"].items()}
        return _KINDS[tree["kind"]].make(fields)
    if "dict" in tree:
        return {_decoded(key, arrays, device): _decoded(entry, arrays, device) for key, entry in tree["dict"]}
    if "tuple" in tree:
        return tuple(_decoded(entry, arrays, device) for entry in tree["tuple"])
    if "float" in tree:
        return float(tree["float"])
    if "tensor" in tree:
        tensor = torch.from_numpy(arrays[tree["tensor"]])
        if tree.get("dtype") == "bfloat16":
            tensor = tensor.view(torch.bfloat16)
        return tensor.to(device)
    array = arrays[tree["array"]]
    return array[()] if tree.get("scalar") else array


@contextmanager
def replaced_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream for a file that takes its place only when it is whole."""
    place = Path(path)
    beside = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)
