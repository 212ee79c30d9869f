"""Sketches of the gradients of a whole data set, in memory or in a file that a later run goes on with."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset.gradients.sketcher import GradientSketcher


def sketch_loader(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    dim: int,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Report | bool | None = None,
    **options: Any,
) -> Tensor:
    """Sketches of the per-sample gradients of all samples that a loader gives, in its order.

    The model stays in the mode that it is in (call .eval() before, as a rule), its parameters' .grad stay as they are, and batches are
    moved to its device.

    Args:
        model: the module.
        loader: gives batches: a DataLoader, or any iterable. For `resume` it must give the same samples in the same order.
        loss: (model, batch) -> the loss of the batch, a number; its mean over the samples, or their sum with reduction="sum".
        dim: columns of the sketches.
        out: None for a result in memory; or the path of an .npy file, which grows batch by batch and is memory-mapped. Beside it,
            `out` + ".json" says what the sketches are of.
        resume: whether to go on with the file `out` where an earlier call was stopped. Batches that are in it are loaded and passed
            over. Another model (by sums of its parameters), dim, kind, seed or choice of parameters than the file's is an error.
        progress: None, True for a bar, or a function (done, total) of batches; total is 0 if the loader does not say its length.
        options: those of `GradientSketcher`, but per="sample" alone: kind, seed, nnz, parameters, reduction, backend, verify, batch_dim,
            nonfinite, scale.

    Returns:
        [N, dim] float32 (float64 for float64 parameters) on the CPU; of a file, its memory map.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for `resume` without `out`, a loader that shuffles, a file that holds something else, an existing file without
            `resume`, and what `GradientSketcher` refuses.

    Example:
        >>> import torch, flashcoreset as fc
        >>> model, data = torch.nn.Linear(8, 3), [(torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])) for _ in range(4)]
        >>> loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> fc.sketch_loader(model, data, loss, 16).shape
        torch.Size([20, 16])
    """
    check_progress(progress)
    if not callable(loss):
        raise TypeError(f"loss must be a function (model, batch) -> loss, got {type(loss).__name__}")
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of batches, got {type(loader).__name__}")
    if not isinstance(resume, bool):
        raise TypeError(f"resume must be a bool, got {resume!r} of type {type(resume).__name__}")
    if dim is None:
        raise TypeError("dim must be an int, got None")
    if options.get("per", "sample") != "sample":
        raise ValueError(f"per must be 'sample' for a loader, got {options['per']!r}")
    if resume and out is None:
        raise ValueError("resume=True needs the file that an earlier call wrote: pass its path as out")
    if resume and isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        raise ValueError(
            "loader must give its samples in the same order for resume=True, got one that shuffles"
        )
    sketcher = GradientSketcher(model, dim, norms=False, **options)
    total = len(loader) if isinstance(loader, Sized) else 0
    store = _Memory() if out is None else _File(Path(out), sketcher, model, options, resume)
    wanted = [p for name, p in model.named_parameters() if name in sketcher.offsets]
    with Progress(progress, total, "sketches") as report, contextlib.closing(store):
        batches = iter(loader)
        for _ in itertools.islice(batches, store.batches):
            pass
        for done, batch in enumerate(batches, store.batches + 1):
            value = None
            with sketcher, torch.enable_grad():
                value = loss(model, _moved(batch, wanted[0].device))
                if not isinstance(value, Tensor) or value.numel() != 1:
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"loss must return a tensor with one number, got {got}")
                torch.autograd.grad(value.sum(), wanted, allow_unused=True)
            store.add(sketcher.sketches)
            report.update(done)
    return store.result(sketcher)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: _moved(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, (tuple, list)):
        parts = [_moved(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


class _Memory:
    batches = 0

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, sketches: Tensor) -> None:
        self._parts.append(sketches.cpu())

    def close(self) -> None:
        pass

    def result(self, sketcher: GradientSketcher) -> Tensor:
        if not self._parts:
            return torch.empty(0, sketcher.dim or 0, dtype=sketcher.dtype)
        return torch.cat(self._parts)


class _File:
    """An .npy file of a growing number of rows, and a JSON file beside it: what the rows are, and how many batches and rows are whole."""

    def __init__(
        self, path: Path, sketcher: GradientSketcher, model: nn.Module, options: dict[str, Any], resume: bool
    ) -> None:
        self._path, self._about = path, path.with_name(path.name + ".json")
        self._dim = sketcher.dim or 0
        self._type = np.dtype(np.float64 if sketcher.dtype == torch.float64 else np.float32)
        self._what = {
            "dim": self._dim, "dtype": self._type.name, "numel": sketcher.numel,
            **{name: options.get(name, default) for name, default in _DEFAULTS.items()},
            "parameters": _digest(*sketcher.offsets), "model": _fingerprint(model.state_dict()),
            "scale": _fingerprint(sketcher.scales()),
        }  # fmt: skip
        self.batches = self._rows = 0
        if resume and path.exists() and self._about.exists():
            self._go_on()
            return
        if path.exists() and not resume:
            raise ValueError(
                f"out: {str(path)!r} exists already; pass resume=True to go on with it, or delete it"
            )
        self._file = path.open("wb+")
        self._header()
        self._note()

    def _go_on(self) -> None:
        known = json.loads(self._about.read_text())
        if "kinds" not in known and known.get("kind") == "gaussian":
            known["kind"] = "gaussian-boxmuller"  # as that matrix was called when such files were made
        for name, value in self._what.items():
            if known.get(name) != value:
                raise ValueError(
                    f"out: {str(self._path)!r} holds sketches of another {name} ({known.get(name)!r}, now {value!r}); pass what it was made "
                    "with, or another path"
                )
        self.batches, self._rows = known["batches"], known["rows"]
        self._file = self._path.open("rb+")
        self._header()
        # What was written after the last whole batch was noted does not count.
        self._file.truncate(self._begin + self._rows * self._dim * self._type.itemsize)

    def _header(self) -> None:
        self._file.seek(0)
        shape = {"descr": self._type.str, "fortran_order": False, "shape": (self._rows, self._dim)}
        np.lib.format.write_array_header_1_0(self._file, shape)  # leaves room for a larger number of rows
        self._begin = self._file.tell()

    def _note(self) -> None:
        about = {**self._what, "kinds": _KINDS, "batches": self.batches, "rows": self._rows}
        new = self._about.with_name(self._about.name + ".new")
        new.write_text(json.dumps(about))
        new.replace(self._about)  # at once, so that an interruption leaves the old or the new one

    def add(self, sketches: Tensor) -> None:
        rows = np.ascontiguousarray(sketches.cpu().numpy())
        self._file.seek(self._begin + self._rows * self._dim * self._type.itemsize)
        self._file.write(rows.tobytes())
        self._rows += len(rows)
        self.batches += 1
        self._header()
        self._file.flush()
        self._note()

    def close(self) -> None:
        self._file.close()

    def result(self, sketcher: GradientSketcher) -> Tensor:
        if not self._rows:
            return torch.empty(0, self._dim, dtype=sketcher.dtype)
        return torch.from_numpy(np.load(self._path, mmap_mode="r+"))


_KINDS = 2  # the meaning of names of kinds: since there are two definitions of normal numbers
_DEFAULTS = {"kind": "sjlt", "seed": 0, "nnz": 1, "reduction": "mean"}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _fingerprint(state: Mapping[str, Any]) -> str:
    """A short text that depends on all tensors in `state`."""
    values = (
        f"{name} {tuple(x.shape)} {float(x.double().sum())!r} {float(x.double().norm())!r}"
        for name, x in state.items()
        if isinstance(x, Tensor)
    )
    return _digest(*values)
