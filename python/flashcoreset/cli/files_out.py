"""Files that commands write: whole, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from flashcoreset._core.files import split_column
from flashcoreset.cli.errors import CommandError


class Output(NamedTuple):
    path: Path
    option: str
    write: Callable[[IO[bytes]], object]
    replace: bool = False  # whether an existing file may be replaced


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def check_output(
    text: str,
    option: str,
    suffixes: str | Sequence[str],
    inputs: Sequence[str] = (),
    *,
    replace: bool = False,
) -> Path:
    """The path that `text` names, once it is known to be free (or may be replaced) and writable: before hours of work, not
    afterwards."""
    path = Path(text)
    endings = [suffixes] if isinstance(suffixes, str) else list(suffixes)
    if path.suffix.lower() not in endings:
        raise CommandError(f"{option}: expected a name that ends in {' or '.join(endings)}, got {path}")
    with _writing(path, option):
        if path.exists() and not path.is_file():
            raise CommandError(f"{option}: {path} exists and is not a regular file")
        for name in inputs:
            source = split_column(name)[0]
            # Inputs that cannot be checked here are reported by the code that reads them.
            if path.exists() and os.path.exists(source) and path.samefile(source):
                raise CommandError(f"{option}: {path} is also an input; choose another name")
        if not replace:
            _check_free(path, option)
        probe = _beside(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    return path


def _check_free(path: Path, option: str) -> None:
    if path.is_symlink():
        raise CommandError(
            f"{option}: {path} is a symbolic link; choose another name, or pass --force to replace the link (not what it "
            "leads to)"
        )
    if os.path.lexists(path):
        raise _taken(path, option)


def _taken(path: Path, option: str) -> CommandError:
    return CommandError(f"{option}: {path} exists; choose another name, or pass --force to replace it")


@contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{option}: cannot write {path}: {error.strerror or error}") from None


def write_whole(*outputs: Output) -> None:
    """Writes a new file beside the place of each output, and once all are written puts them into place in order. A failure to write
    leaves nothing. A file that appeared in a place in the meantime stays, unless it may be replaced."""
    written: list[Path] = []
    try:
        for output in outputs:
            with _writing(output.path, output.option):
                beside = _beside(output.path)
                with beside.open("xb") as stream:
                    written.append(beside)
                    output.write(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
        for output in outputs:
            if not output.replace:
                _check_free(output.path, output.option)
        for beside, output in zip(written, outputs, strict=True):
            with _writing(output.path, output.option):
                if output.replace:
                    beside.replace(output.path)  # replaces a symbolic link itself, not its target
                else:
                    _place(beside, output)
    finally:
        for beside in written:
            beside.unlink(missing_ok=True)


def _place(beside: Path, output: Output) -> None:
    """Puts a file where there is none; asking first would leave time for one to appear."""
    try:
        os.link(beside, output.path)
    except FileExistsError:
        raise _taken(output.path, output.option) from None
    except OSError:  # a file system without hard links
        try:
            output.path.touch(exist_ok=False)
        except FileExistsError:
            raise _taken(output.path, output.option) from None
        beside.replace(output.path)


def jsonable(value: Any) -> Any:
    """`value` as JSON can hold it; tensors and arrays become lists."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return value
