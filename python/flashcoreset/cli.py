"""The command line: ``flashcoreset info | demo | select | bench``.

Every command ends with 0 when it did its work, with 2 and one line on stderr when the input does not allow
it, and with 130 on Ctrl-C. Outputs appear whole or not at all: they are written beside their place and then
put into it. An existing output is replaced only with --force.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import secrets
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, NoReturn, TextIO

import numpy as np
import torch

import flashcoreset as fc
from flashcoreset._core import native
from flashcoreset._core.dispatch import BACKENDS, FAMILIES, cuda_failure, takes_of, triton_failure
from flashcoreset.methods.colm import nothing_kept

FLOATS = "a float16, float32 or float64"
POINT_METRICS = ("cosine", "dot", "euclidean", "sqeuclidean", "l1")
MATRICES = ("precomputed", "precomputed_distance")


class CommandError(Exception):
    """An error that says in one line what the user has to change."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option like any other bad input: one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see: {self.prog} --help)")


# --- files in -------------------------------------------------------------------------------------


def _split_key(text: str) -> tuple[Path, str | None]:
    """``F.npz:key`` -> (F.npz, key); a file whose name holds the colon itself wins."""
    path, colon, key = text.rpartition(":")
    if colon and path.endswith(".npz") and not os.path.exists(text):
        return Path(path), key
    return Path(text), None


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
        raise CommandError(f"{option}: {path} is neither .npy nor .npz; save the array with numpy.save")
    # numpy.load leaves the file open when it finds that an archive is broken.
    if head[:2] == b"PK" and not zipfile.is_zipfile(path):
        raise CommandError(f"{option}: cannot read {path}: the archive is damaged")


def load_array(text: str, option: str, *, kinds: str, ndim: int, wanted: str) -> np.ndarray:
    """The array of ``F.npy`` (memory-mapped) or ``F.npz[:key]`` (read into memory).

    `kinds` are the accepted NumPy kind letters ("f", "iu"), `wanted` says the same in words. Raises
    CommandError, naming `option`, for everything that keeps the file from being such an array.
    """
    path, key = _split_key(text)
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


def _load_features(text: str, option: str) -> np.ndarray:
    return load_array(text, option, kinds="f", ndim=2, wanted=f"{FLOATS} array [rows, features]")


def _load_matrix(text: str, option: str) -> Any:
    """A dense matrix, or a sparse one as scipy.sparse.save_npz writes it."""
    path, key = _split_key(text)
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


def _load_state(text: str, option: str) -> dict[str, Any]:
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
    if set(arrays) != _STATES.get(kind):
        raise CommandError(f"{option}: {path} is not a file that --save-state wrote")
    if kind == _NO_HISTORY:
        return {"history": None}
    history: dict[str, Any] = {"kind": kind}
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CommandError(f"{option}: {path}: {name} must be finite, got a NaN or an infinity")
        history[name] = array.item() if array.ndim == 0 else array.tolist() if name == "betas" else array
    return {"history": history}


def _parse_budgets(text: str) -> dict[int, int] | np.ndarray:
    """``LABEL=COUNT,LABEL=COUNT,...``, or a file of counts for the labels 0, 1, ..."""
    if "=" not in text:
        return load_array(text, "--budgets", kinds="iu", ndim=1, wanted="integer counts [groups]")
    budgets: dict[int, int] = {}
    for part in text.split(","):
        label, _, count = part.partition("=")
        try:
            pair = int(label), int(count)
        except ValueError:
            raise CommandError(f"--budgets: expected LABEL=COUNT,LABEL=COUNT,..., got {part!r}") from None
        if pair[0] in budgets:
            raise CommandError(f"--budgets: label {pair[0]} appears twice")
        budgets[pair[0]] = pair[1]
    return budgets


# --- files out ------------------------------------------------------------------------------------


class Output(NamedTuple):
    path: Path
    option: str
    write: Callable[[IO[bytes]], object]
    replace: bool = False  # whether an existing file may be replaced


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def check_output(
    text: str, option: str, suffix: str, inputs: Sequence[str] = (), *, replace: bool = False
) -> Path:
    """The path that `text` names, once it is known to be free (or may be replaced) and writable: before hours of work, not
    afterwards."""
    path = Path(text)
    if path.suffix.lower() != suffix:
        raise CommandError(f"{option}: expected a name that ends in {suffix}, got {path}")
    with _writing(path, option):
        if path.exists() and not path.is_file():
            raise CommandError(f"{option}: {path} exists and is not a regular file")
        for name in inputs:
            source = _split_key(name)[0]
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


def _jsonable(value: Any) -> Any:
    """`value` as JSON can hold it; tensors and arrays become lists."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return value


# --- select ---------------------------------------------------------------------------------------


class _Chosen(NamedTuple):
    arrays: dict[str, np.ndarray]
    info: dict[str, Any]
    state: dict[str, np.ndarray] | None = None  # for --save-state


def _options(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given; the library's own defaults hold for the rest."""
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _load_into(options: dict[str, Any], name: str, **expected: Any) -> None:
    if name in options:
        options[name] = load_array(options[name], f"--{name}", **expected)


def _facility_location(arguments: argparse.Namespace) -> _Chosen:
    options = _options(
        arguments, "metric", "weights", "groups", "preselected", "method", "epsilon", "seed", "offset"
    )
    options |= _options(arguments, "backend", "progress", "memory_budget", "clients", "budgets")
    is_matrix = options.get("metric") in MATRICES
    x = (_load_matrix if is_matrix else _load_features)(arguments.features, "--features")
    if "clients" in options:
        options["clients"] = _load_features(options["clients"], "--target")
    if "budgets" in options:
        options["budgets"] = _parse_budgets(options["budgets"])
    _load_into(options, "weights", kinds="fiu", ndim=1, wanted="a real array [clients]")
    _load_into(options, "groups", kinds="iu", ndim=1, wanted="an integer array [rows]")
    _load_into(options, "preselected", kinds="iu", ndim=1, wanted="an integer array of rows")
    k = getattr(arguments, "k", None)
    if k is None and "budgets" not in options:
        raise CommandError("-k: the number of rows to select is missing (only --budgets replaces it)")
    selection = fc.facility_location(x, k, **options)
    arrays = {
        "indices": selection.indices.numpy(),
        "weights": selection.weights.numpy(),
        "gains": selection.gains.numpy(),
        "assignment": selection.assignment.numpy(),
    }
    return _Chosen(arrays, {"rows": x.shape[0], "objective": selection.objective, "offset": selection.offset})


def _simcore(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "n_clusters", "stop", "stop_threshold", "patience", "seed")
    options |= _options(arguments, "backend", "progress", "memory_budget")
    openset = _load_features(arguments.features, "--features")
    target = _load_features(arguments.target, "--target")
    coreset = fc.simcore(openset, target, getattr(arguments, "k", None), **options)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    info = dict(coreset.info)
    arrays["centroids"] = info.pop("centroids").numpy()
    return _Chosen(arrays, {"rows": openset.shape[0], **info})


def _goracs(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "lam", "max_exchanges", "n_candidates", "solver", "reg", "seed")
    options |= _options(arguments, "backend", "progress", "memory_budget", "train_labels", "valid_labels")
    for name, rows in (("train_labels", "train rows"), ("valid_labels", "validation rows")):
        if name in options:
            option = f"--{name.replace('_', '-')}"
            wanted = f"an integer array [{rows}]"
            options[name] = load_array(options[name], option, kinds="iu", ndim=1, wanted=wanted)
    train = _load_features(arguments.train, "--train")
    valid = _load_features(arguments.valid, "--valid")
    norms = load_array(
        arguments.grad_norms, "--grad-norms", kinds="fiu", ndim=1, wanted="a real array [train rows]"
    )
    coreset = fc.goracs(train, valid, norms, arguments.k, **options)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    return _Chosen(arrays, {"rows": train.shape[0], **coreset.info})


def _ccs(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "mislabel_ratio", "n_strata", "seed", "groups", "mislabel_scores")
    wanted = "a real array [samples]"
    scores = load_array(arguments.scores, "--scores", kinds="fiu", ndim=1, wanted=wanted)
    if "mislabel_scores" in options:
        options["mislabel_scores"] = load_array(
            options["mislabel_scores"], "--mislabel-scores", kinds="fiu", ndim=1, wanted=wanted
        )
    _load_into(options, "groups", kinds="iu", ndim=1, wanted="an integer array [samples]")
    coreset = fc.ccs(scores, arguments.k, **options)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    return _Chosen(arrays, {"rows": scores.shape[0], **coreset.info})


def _colm(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "top", "betas", "eps", "keep_groups", "rule", "metric", "backend")
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    method = fc.CoLM(arguments.k, **options)
    if hasattr(arguments, "state"):
        state = _load_state(arguments.state, "--state")
        try:
            method.load_state_dict(state)
        except (TypeError, ValueError) as error:
            raise CommandError(f"--state: {arguments.state}: {error}") from None
    groups = None
    if hasattr(arguments, "groups"):
        groups = load_array(
            arguments.groups, "--groups", kinds="iu", ndim=1, wanted="an integer array [rows]"
        )
    grads: Any = load_array(
        arguments.gradients, "--gradients", kinds="f", ndim=2, wanted=f"{FLOATS} array [rows, dimensions]"
    )
    rows = grads.shape[0]
    if hasattr(arguments, "numel"):
        grads = fc.LowRankGradients(torch.tensor(grads), getattr(arguments, "seed", 0), arguments.numel)
    elif hasattr(arguments, "seed"):
        raise CommandError("--seed: it makes the directions of coefficients; give their length as --numel")
    coreset = method.select(grads, groups)
    if coreset.info["unseen"] and not hasattr(arguments, "state"):
        warnings.warn(nothing_kept(coreset.info["unseen"], "--groups", torch.as_tensor(groups)), stacklevel=1)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    info = dict(coreset.info)
    dims = info.pop("dims")
    if dims is not None:
        arrays["dims"] = dims.numpy()
    return _Chosen(arrays, {"rows": rows, **info}, _state_arrays(method))


_NO_HISTORY = "none"
# By kind of history, the entries that its file holds beside "kind".
_STATES = {
    "dense": {field.name for field in dataclasses.fields(fc.AdamState)},
    "rank one": {field.name for field in dataclasses.fields(fc.RankOneAdamState)},
    _NO_HISTORY: set(),
}


def _state_arrays(method: fc.CoLM) -> dict[str, np.ndarray]:
    history = method.state_dict()["history"] or {"kind": _NO_HISTORY}
    return {name: np.asarray(value) for name, value in history.items()}


def _autocoreset(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "method", "n_initial", "patience", "seed", "groups", "progress")
    x = _load_features(arguments.features, "--features")
    y = None
    if hasattr(arguments, "targets"):
        y = load_array(arguments.targets, "--targets", kinds="fiub", ndim=1, wanted="a real array [rows]")
    _load_into(options, "groups", kinds="iu", ndim=1, wanted="an integer array [rows]")
    if y is None and arguments.model != "kmeans":
        raise CommandError(f"--targets: {arguments.model} needs the targets of the rows")
    coreset = fc.autocoreset(x, y, arguments.model, None, arguments.k, **options)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    return _Chosen(arrays, {"rows": x.shape[0], "model": arguments.model, **coreset.info})


# Options that name files.
_INPUTS = (
    *("features", "target", "clients", "weights", "groups", "budgets", "preselected"),
    *("train", "valid", "grad_norms", "train_labels", "valid_labels"),
    *("scores", "mislabel_scores", "targets", "gradients"),
)
_ALGORITHMS = {
    "facility-location": _facility_location,
    "simcore": _simcore,
    "ccs": _ccs,
    "goracs": _goracs,
    "colm": _colm,
    "autocoreset": _autocoreset,
}


def _savez(contents: dict[str, Any], stream: IO[bytes]) -> None:
    np.savez(stream, **contents)


def _same_place(a: str, b: str) -> bool:
    """Whether two names are those of one file that is not a symbolic link."""
    first, second = (Path(text).parent.resolve() / Path(text).name for text in (a, b))
    return first == second and not first.is_symlink()


def _select(arguments: argparse.Namespace) -> int:
    given = [getattr(arguments, name) for name in _INPUTS if hasattr(arguments, name)]
    states = [arguments.state] if hasattr(arguments, "state") else []
    force = getattr(arguments, "force", False)
    out = check_output(arguments.out, "--out", ".npz", given + states, replace=force)
    kept, replaces = None, force
    if hasattr(arguments, "save_state"):
        # The saved state may replace the state that was read.
        replaces = force or any(_same_place(arguments.save_state, state) for state in states)
        kept = check_output(arguments.save_state, "--save-state", ".npz", given, replace=replaces)
        if kept.resolve() == out.resolve():
            raise CommandError(f"--save-state: {kept} is also --out; choose another name")
    start = time.perf_counter()
    arrays, info, state = _ALGORITHMS[arguments.algorithm](arguments)
    seconds = time.perf_counter() - start
    info = {"algorithm": arguments.algorithm, "version": fc.__version__, "seconds": seconds, **info}
    contents: dict[str, Any] = {"info": np.array(json.dumps(_jsonable(info))), **arrays}
    files = [Output(out, "--out", functools.partial(_savez, contents), force)]
    if kept is not None and state is not None:
        # Written last: if the state is one step behind its output, the same call once more makes up for it.
        files.append(Output(kept, "--save-state", functools.partial(_savez, state), replaces))
    write_whole(*files)
    print(f"{out}: {len(arrays['indices']):,} of {info['rows']:,} rows in {seconds:.2f} s")
    return 0


# --- info, bench, demo ----------------------------------------------------------------------------


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    print(title)
    for name, text in rows:
        print(f"  {name:<10}  {text}")


def _print_families() -> None:
    """Prints the families that each backend has kernels for, and what these take beside dense float32 and float64."""
    print("families, and what their kernels take beside dense float32 and float64")
    print(f"  {'':<20}" + "".join(f"{backend:<10}" for backend in BACKENDS))
    for family, backends in FAMILIES.items():
        cells = []
        for backend in BACKENDS:
            try:
                takes = takes_of(backend, family) if backend in backends else None
            except ImportError:
                cells.append("missing")
                continue
            if takes is None:
                cells.append("-")
            else:
                more = [word for word, there in (("sparse", takes.sparse), ("half", takes.half)) if there]
                cells.append("+".join(more) or "yes")
        print(f"  {family:<20}" + "".join(f"{cell:<10}" for cell in cells).rstrip())


def _info(_: argparse.Namespace) -> int:
    try:
        used = native.module().ISA
        cpu = f"available ({used})"
    except (ValueError, fc.BackendUnavailableError) as error:
        used = None
        cpu = f"missing: {error}"
    available = native.available_isas()
    isas = []
    for isa in native.MODULES:
        state = "in use" if isa == used else "available"
        isas.append((isa, state if isa in available else f"missing: {native.unavailable_reason(isa)}"))
    gpus = [
        (f"cuda:{index}", torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count())
    ]
    no_gpu = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"

    numbers = f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}"
    print(f"flashcoreset {fc.__version__} ({numbers})")
    where = torch.device("cuda" if gpus else "cpu")
    triton, cuda = (
        "available" if failure is None else f"missing: {failure}"
        for failure in (triton_failure(where), cuda_failure(where))
    )
    if (built := native.cuda_architectures()) is not None:
        cuda += f" (built for {built})"
    backends = [("torch", "available"), ("cpu", cpu), ("cuda", cuda), ("triton", triton)]
    _print_table("backends", backends)
    _print_table("instruction sets of the cpu backend", isas)
    _print_families()
    threads = f"{_processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads used"
    _print_table("devices", [("cpu", threads), *(gpus or [("cuda", f"none: {no_gpu}")])])
    return 0


def _is_checkout(folder: Path) -> bool:
    """Whether the folder is this project's source tree: another project's benchmarks must not be run."""
    try:
        project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return '\nname = "flashcoreset"\n' in project and (folder / "benchmarks" / "__main__.py").is_file()


def _bench(arguments: argparse.Namespace) -> int:
    here = Path.cwd()
    root = next((folder for folder in (here, *here.parents) if _is_checkout(folder)), None)
    if root is None:
        raise CommandError(
            "bench: the benchmarks come with the source tree, not with the package; run this in a checkout"
        )
    for module in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f"bench: {module} is missing: pip install 'flashcoreset[bench]'")
    families = {path.stem for path in (root / "benchmarks").glob("*.py") if "\nROWS = " in path.read_text()}
    for family in arguments.family:
        if family not in families | {"all"}:
            raise CommandError(
                f"bench: unknown family {family!r}; there are {', '.join(sorted(families))} and all"
            )
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments.family], cwd=root)


def _demo(arguments: argparse.Namespace) -> int:
    first = check_output(arguments.out, "--out", ".png", replace=arguments.force)
    others = ("-ccs", "-colm", "-autocoreset")
    outs = [
        first,
        *(
            check_output(
                str(first.with_name(first.stem + end + first.suffix)),
                "--out",
                ".png",
                replace=arguments.force,
            )
            for end in others
        ),
    ]
    for module in ("matplotlib", "ot"):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f"demo: {module} is missing: pip install 'flashcoreset[demo]'")
    from flashcoreset import demo
    from flashcoreset.demo import batches, fits, pruning

    shown = ("first picks", "strata", "training curves", "errors")
    parts: tuple[ModuleType, ...] = (demo, pruning, batches, fits)
    for part, out, title in zip(parts, outs, shown, strict=True):
        result = part.run()
        print(part.table(result))
        write_whole(Output(out, "--out", functools.partial(part.draw, result), arguments.force))
        print(f"{title}: {out}" if part is parts[-1] else f"{title}: {out}\n", flush=True)
    return 0


# --- the parser -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flashcoreset",
        description="Choose training data: facility location, SimCore, CCS, GORACS, CoLM and AutoCoreset.",
    )
    parser.add_argument("--version", action="version", version=f"flashcoreset {fc.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | select | bench")

    info = commands.add_parser(
        "info", help="backends, instruction sets, devices, and why each missing one is missing"
    )
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="the five methods on real data: tables and pictures")
    demo.add_argument(
        "--out",
        default="demo.png",
        help="the picture; others go beside it, as NAME-ccs.png, NAME-colm.png and NAME-autocoreset.png (default: %(default)s)",
    )
    _add_force(demo)
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="run the benchmarks of a checkout")
    bench.add_argument(
        "family", nargs="*", metavar="FAMILY", help="one or more kernel families (default: the quick ones)"
    )
    bench.set_defaults(run=_bench)

    select = commands.add_parser("select", help="choose rows of a file of features, scores or gradients")
    select.set_defaults(run=_select)
    algorithms = select.add_subparsers(
        dest="algorithm", required=True, metavar=" | ".join(reversed(_ALGORITHMS))
    )
    _add_simcore(
        algorithms.add_parser(
            "simcore", argument_default=argparse.SUPPRESS, help="open-set rows close to a target"
        )
    )
    _add_ccs(
        algorithms.add_parser(
            "ccs", argument_default=argparse.SUPPRESS, help="samples spread over the range of their scores"
        )
    )
    _add_goracs(
        algorithms.add_parser(
            "goracs", argument_default=argparse.SUPPRESS, help="training rows that stand for validation rows"
        )
    )
    _add_colm(
        algorithms.add_parser(
            "colm", argument_default=argparse.SUPPRESS, help="rows of a batch that train as all of it would"
        )
    )
    _add_autocoreset(
        algorithms.add_parser(
            "autocoreset", argument_default=argparse.SUPPRESS, help="rows on which a model fits as on all"
        )
    )
    _add_facility_location(
        algorithms.add_parser(
            "facility-location", argument_default=argparse.SUPPRESS, help="rows that represent all rows"
        )
    )
    return parser


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace outputs that exist")


def _add_output(parser: argparse.ArgumentParser, *, needs_k: bool) -> None:
    parser.add_argument("-k", type=int, required=needs_k, metavar="K", help="how many rows to select")
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="OUT.npz",
        help="indices, weights and info (JSON text) are written here",
    )
    _add_force(parser)
    parser.add_argument("--seed", type=int)


def _add_common(parser: argparse.ArgumentParser, *, needs_k: bool = False) -> None:
    _add_output(parser, needs_k=needs_k)
    parser.add_argument("--backend", choices=BACKENDS, help="default: the fastest that can")
    parser.add_argument("--memory-budget", type=int, metavar="BYTES", help="for similarities and orders")
    parser.add_argument("--progress", action="store_true", help="show a bar on stderr")


def _add_simcore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", required=True, metavar="F", help="open set [n, d]: F.npy, F.npz or F.npz:key"
    )
    parser.add_argument("--target", required=True, metavar="T", help="features of the target data [m, d]")
    _add_common(parser)
    parser.add_argument("--n-clusters", type=int, metavar="N", help="centroids of the target")
    parser.add_argument(
        "--stop-threshold", type=float, metavar="R", help="stop below this share of the first value"
    )
    parser.add_argument("--patience", type=int, metavar="N", help="the round whose value is the first value")
    parser.add_argument("--no-stop", dest="stop", action="store_false", help="take K rows however dissimilar")


def _add_ccs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scores", required=True, metavar="S", help="how hard each sample is [n]: S.npy, S.npz or S.npz:key"
    )
    _add_output(parser, needs_k=True)
    parser.add_argument("--mislabel-scores", metavar="M", help="low for labels that are probably wrong [n]")
    parser.add_argument("--mislabel-ratio", type=float, metavar="R", help="the share to drop of the lowest")
    parser.add_argument("--n-strata", type=int, metavar="N", help="strata of equal width")
    parser.add_argument("--groups", metavar="G", help="integer labels [n]: each group gets its share")


def _add_goracs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train", required=True, metavar="F", help="training features [n, d]: F.npy, F.npz or F.npz:key"
    )
    parser.add_argument("--valid", required=True, metavar="V", help="validation features [m, d]")
    parser.add_argument("--grad-norms", required=True, metavar="G", help="gradient norms [n]")
    _add_common(parser, needs_k=True)
    parser.add_argument("--lam", type=float, help="weight of the gradient norms")
    parser.add_argument("--max-exchanges", type=int, metavar="N", help="exchanges to make at most")
    parser.add_argument("--n-candidates", type=int, metavar="N", help="removals and additions to pair")
    parser.add_argument("--train-labels", metavar="L", help="integer class labels [n]")
    parser.add_argument("--valid-labels", metavar="L", help="integer class labels [m]")
    parser.add_argument("--solver", choices=("exact", "sinkhorn"))
    parser.add_argument("--reg", type=float, help="regularisation of --solver sinkhorn")


def _add_colm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gradients",
        required=True,
        metavar="G",
        help="per-sample gradients [B, D]: G.npy, G.npz or G.npz:key",
    )
    parser.add_argument(
        "--numel",
        type=int,
        metavar="D",
        help="the rows of G are coefficients [B, q] of directions of this length, made from --seed",
    )
    _add_output(parser, needs_k=True)
    parser.add_argument("--groups", metavar="L", help="integer labels of the rows' sources [B]")
    parser.add_argument(
        "--keep-groups", type=_labels, metavar="LABEL,...", help="sources of which every row is kept"
    )
    parser.add_argument(
        "--top", type=_top, metavar="N", help="dimensions that count in each source, or all (default: 2560)"
    )
    parser.add_argument(
        "--rule", choices=("proportional", "balanced", "none"), help="for the sources' shares"
    )
    parser.add_argument("--metric", choices=POINT_METRICS, help="default: l1")
    parser.add_argument("--betas", type=float, nargs=2, metavar=("BETA1", "BETA2"), help="Adam's")
    parser.add_argument("--eps", type=float, help="Adam's")
    parser.add_argument("--state", metavar="STATE.npz", help="Adam's history, as --save-state wrote it")
    parser.add_argument(
        "--save-state",
        metavar="STATE.npz",
        help="the history after this batch is written here (without --force also where it is STATE)",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="default: the fastest that can")


def _labels(text: str) -> list[int]:
    try:
        return [int(label) for label in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LABEL,LABEL,..., got {text!r}") from None


def _top(text: str) -> int | None:
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or all, got {text!r}") from None


def _add_autocoreset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", required=True, metavar="F", help="rows [n, d]: F.npy, F.npz or F.npz:key"
    )
    parser.add_argument("--targets", metavar="Y", help="labels or numbers [n]; --model kmeans needs none")
    parser.add_argument(
        "--model", required=True, choices=("kmeans", "logistic_regression", "linear_svm", "linear_regression")
    )
    _add_output(parser, needs_k=True)
    parser.add_argument("--method", choices=("caratheodory", "importance", "median_of_means", "uniform"))
    parser.add_argument("--n-initial", type=int, metavar="N", help="models fitted on uniform samples first")
    parser.add_argument("--patience", type=int, metavar="N", help="rounds without gain to end after")
    parser.add_argument("--groups", metavar="G", help="integer labels [n]: each group gets an equal share")
    parser.add_argument("--progress", action="store_true", help="show a bar on stderr")


def _add_facility_location(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        required=True,
        metavar="F",
        help="candidates [n, d], or the similarities or distances: F.npy, F.npz or F.npz:key",
    )
    parser.add_argument(
        "--target",
        "--clients",
        dest="clients",
        metavar="T",
        help="clients [m, d] (default: the candidates themselves)",
    )
    _add_common(parser)
    parser.add_argument("--metric", choices=(*POINT_METRICS, *MATRICES))
    parser.add_argument("--weights", metavar="W", help="client weights [m]")
    parser.add_argument("--groups", metavar="G", help="integer labels [n]")
    parser.add_argument("--budgets", metavar="B", help="LABEL=COUNT,LABEL=COUNT,... or a file of counts")
    parser.add_argument("--preselected", metavar="P", help="rows that are in the set already")
    parser.add_argument("--method", choices=("lazy", "naive", "stochastic"))
    parser.add_argument("--epsilon", type=float, help="sampling of --method stochastic")
    parser.add_argument("--offset", type=float, help="similarity of a distance of 0")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"flashcoreset: {category.__name__}: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _drop_stdout_that_fails() -> None:
    """Redirects stdout, because Python flushes it once more at exit and must not fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Turns torch's RuntimeError for missing memory into Python's MemoryError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in text for words in _NO_MEMORY):
            raise
        raise MemoryError(f"out of memory: {text}") from None


# What torch says when it cannot allocate CPU tensors, and for sizes beyond 2^63 bytes.
_NO_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for bad input (one line on stderr), 130 for Ctrl-C."""
    try:
        with _one_line_warnings(), _out_of_memory():
            arguments = _parser().parse_args(argv)
            code: int = arguments.run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print("flashcoreset: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_stdout_that_fails()  # its reader (such as head) has left
        return 1
    except OSError as error:  # for example stdout into a file on a full disk
        print(f"flashcoreset: {' '.join(str(error).split())}", file=sys.stderr)
        _drop_stdout_that_fails()
        return 2
    except (
        CommandError,
        TypeError,
        ValueError,
        MemoryError,
        ImportError,
        fc.BackendUnavailableError,
    ) as error:
        text = " ".join(str(error).split()) or "out of memory"
        print(f"flashcoreset: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
