"""Arrays, matrices and states that commands read."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import flashcoreset as fc
from flashcoreset._core.files import ARRAYS, FORMATS, TABLES, split_column, suffix_of
from flashcoreset.cli.errors import CommandError

FLOATS = "a float16, float32 or float64"

NO_HISTORY = "none"
# By kind of history, the entries that its file holds beside "kind".
STATES = {
    "dense": {field.name for field in dataclasses.fields(fc.AdamState)},
    "rank one": {field.name for field in dataclasses.fields(fc.RankOneAdamState)},
    NO_HISTORY: set(),
}


# NumPy's letters of labels: integers, strings, and strings as tables have them.
LABELS = "iuUO"


def _check_file(path: Path, option: str) -> None:
    """Raises CommandError with the reason why a file cannot be an array; numpy.load would answer a text file with a word about pickles."""
    try:
        if not path.exists():
            raise CommandError(f"{option}: no such file: {path}")
        if not path.is_file():
            raise CommandError(f"{option}: {path} is not a regular file")
        with path.open("rb") as stream:
            head = stream.read(6)
    except OSError as error:
        raise CommandError(f"{option}: cannot read {path}: {error.strerror or error}") from None
    if not head:
        raise CommandError(f"{option}: {path} is empty")
    if head[:1] == b"\x80":
        raise CommandError(
            f"{option}: {path} is a pickle, which is never loaded; save a plain array with numpy.save"
        )
    if head != b"\x93NUMPY" and head[:2] != b"PK":
        raise CommandError(
            f"{option}: {path} is neither .npy nor .npz, nor named like {FORMATS}; save the array with numpy.save"
        )
    # numpy.load leaves the file open when it finds that an archive is broken.
    if head[:2] == b"PK" and not zipfile.is_zipfile(path):
        raise CommandError(f"{option}: cannot read {path}: the archive is damaged")


def load_array(text: str, option: str, *, kinds: str, ndim: int, wanted: str) -> np.ndarray:
    """The array of ``F.npy`` (memory-mapped) or ``F.npz[:key]`` (read into memory), or of another file that `open_rows` takes.

    `kinds` are the accepted NumPy kind letters ("f", "iu"), `wanted` says the same in words. Raises
    CommandError, naming `option`, for everything that keeps the file from being such an array.
    """
    path, key = _split(text)
    if is_other(path):
        return _checked(
            _from_other(text, path, option, floating=kinds == "f"), path, option, kinds, ndim, wanted
        )
    _check_file(path, option)
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                array = loaded[_choose_key(loaded.files, key, path, option)]
        elif key is not None:
            raise CommandError(f"{option}: {path} holds a single array; leave out :{key}")
        else:
            array = loaded
    except CommandError:
        raise
    except (
        Exception
    ) as error:  # a damaged file can raise anything: zipfile's, zlib's, the header parser's errors
        if "object" in str(error).lower():
            raise CommandError(
                f"{option}: {path} holds pickled Python objects, which are never loaded; save a plain array"
            ) from None
        raise CommandError(f"{option}: cannot read {path}: {error}") from None
    return _checked(array, path, option, kinds, ndim, wanted)


def is_other(path: Path) -> bool:
    """Whether a file is one of the formats beside NumPy's, or several files."""
    return "*" in str(path) or suffix_of(path) in (*ARRAYS[2:], *TABLES)


def _split(text: str) -> tuple[Path, str | None]:
    path, key = split_column(text)
    return Path(path), key


@contextmanager
def reading(path: Path, option: str) -> Iterator[None]:
    """Turns what keeps a file from being read into a CommandError that names the option."""
    try:
        yield
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from None
    except ImportError as error:
        raise CommandError(f"{option}: {path}: {error}") from None
    except OSError as error:
        raise CommandError(f"{option}: cannot read {path}: {error.strerror or error}") from None


def _from_other(text: str, path: Path, option: str, *, floating: bool) -> np.ndarray:
    """The array of another file; whole numbers become floating ones where these are needed, if that is exact."""
    with reading(path, option):
        array = fc.open_rows(text)[...]
    if not floating or array.dtype.kind not in "biu":
        return array
    if array.dtype.itemsize <= 2:
        return array.astype(np.float32)
    if array.size and max(abs(int(array.min())), abs(int(array.max()))) > 2**53:
        raise CommandError(f"{option}: {path} has whole numbers beyond 2^53, which float64 has not")
    return array.astype(np.float64)


def _checked(array: np.ndarray, path: Path, option: str, kinds: str, ndim: int, wanted: str) -> np.ndarray:
    shape = f"{array.dtype} {list(array.shape)}"
    if array.dtype.kind not in kinds or (kinds == "f" and array.dtype.itemsize > 8) or array.ndim != ndim:
        raise CommandError(f"{option}: expected {wanted}, got {shape} in {path}")
    if not array.dtype.isnative:
        raise CommandError(
            f"{option}: {path} is byte-swapped ({array.dtype.str}); save it in this machine's byte order"
        )
    return array


def _choose_key(keys: list[str], key: str | None, path: Path, option: str) -> str:
    names = ", ".join(keys) or "nothing"
    if key is None:
        if len(keys) != 1:
            raise CommandError(f"{option}: {path} holds {names}; choose one as {path}:NAME")
        return keys[0]
    if key not in keys:
        raise CommandError(f"{option}: no array {key!r} in {path}, which holds {names}")
    return key


def load_features(text: str, option: str) -> np.ndarray:
    return load_array(text, option, kinds="f", ndim=2, wanted=f"{FLOATS} array [rows, features]")


def load_matrix(text: str, option: str) -> Any:
    """A dense matrix, or a sparse one as scipy.sparse.save_npz writes it."""
    path, key = _split(text)
    if is_other(path):
        return load_array(text, option, kinds="f", ndim=2, wanted=f"{FLOATS} matrix [candidates, clients]")
    _check_file(path, option)
    with path.open("rb") as stream:
        is_archive = stream.read(2) == b"PK"
    if is_archive and key is None:
        try:
            with np.load(path, allow_pickle=False) as archive:
                is_sparse = {"format", "shape", "data"} <= set(archive.files)
            if is_sparse:
                import scipy.sparse

                return scipy.sparse.load_npz(path).tocsr()
        except Exception as error:  # as in load_array
            raise CommandError(f"{option}: cannot read {path}: {error}") from None
    return load_array(text, option, kinds="f", ndim=2, wanted=f"{FLOATS} matrix [candidates, clients]")


def load_state(text: str, option: str) -> dict[str, Any]:
    """The state for CoLM.load_state_dict, from a file with the arrays of `_state_arrays`."""
    path = Path(text)
    _check_file(path, option)
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded}
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
    except Exception as error:  # as in load_array
        raise CommandError(f"{option}: cannot read {path}: {error}") from None
    kind = str(arrays.pop("kind", None))
    if set(arrays) != STATES.get(kind):
        raise CommandError(f"{option}: {path} is not a file that --save-state wrote")
    if kind == NO_HISTORY:
        return {"history": None}
    history: dict[str, Any] = {"kind": kind}
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CommandError(f"{option}: {path}: {name} must be finite, got a NaN or an infinity")
        history[name] = array.item() if array.ndim == 0 else array.tolist() if name == "betas" else array
    return {"history": history}


def parse_counts(text: str, option: str, groups: np.ndarray | None) -> dict[Any, int] | np.ndarray:
    """``LABEL=COUNT,LABEL=COUNT,...`` by the labels that `groups` has, or a file of counts for the labels 0, 1, ..."""
    if "=" not in text:
        return load_array(text, option, kinds="iu", ndim=1, wanted="integer counts [groups]")
    kind: type = str if groups is not None and groups.dtype.kind in "UO" else int
    counts: dict[Any, int] = {}
    for part in text.split(","):
        label, _, count = part.rpartition("=")
        try:
            pair = kind(label), int(count)
        except ValueError:
            raise CommandError(f"{option}: expected LABEL=COUNT,LABEL=COUNT,..., got {part!r}") from None
        if pair[0] in counts:
            raise CommandError(f"{option}: label {pair[0]} appears twice")
        counts[pair[0]] = pair[1]
    return counts
