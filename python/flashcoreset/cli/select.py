"""`flashcoreset select`: a method on files."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

import flashcoreset as fc
from flashcoreset.cli.errors import CommandError
from flashcoreset.cli.files_in import (
    FLOATS,
    LABELS,
    NO_HISTORY,
    load_array,
    load_features,
    load_matrix,
    load_state,
    parse_counts,
)
from flashcoreset.cli.files_out import Output, check_output, jsonable, write_whole
from flashcoreset.cli.parser import MATRICES, OUTPUTS
from flashcoreset.cli.tables import check_rows, chosen_rows, write_table
from flashcoreset.methods.colm import nothing_kept


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


def check_count(k: int | None, options: Mapping[str, Any]) -> None:
    """Raises CommandError if nothing says how many rows facility location selects."""
    if k is None and not options.keys() & {"budgets", "cost_budget", "stop_gain"}:
        raise CommandError(
            "-k: the number of rows to select is missing (only --budgets, --cost-budget and --stop-gain replace it)"
        )


def _facility_location(arguments: argparse.Namespace) -> _Chosen:
    options = _options(
        arguments, "metric", "weights", "groups", "preselected", "method", "epsilon", "seed", "offset"
    )
    options |= _options(arguments, "backend", "progress", "memory_budget", "clients", "budgets", "caps")
    options |= _options(arguments, "costs", "cost_budget", "cost_sensitive", "stop_gain", "exclude")
    options |= _options(arguments, "min_distance", "rounds")
    is_matrix = options.get("metric") in MATRICES
    x = (load_matrix if is_matrix else load_features)(arguments.features, "--features")
    if "clients" in options:
        options["clients"] = load_features(options["clients"], "--target")
    _load_into(options, "weights", kinds="fiu", ndim=1, wanted="a real array [clients]")
    _load_into(options, "groups", kinds=LABELS, ndim=1, wanted="an integer array [rows]")
    for name in ("budgets", "caps"):
        if name in options:
            options[name] = parse_counts(options[name], f"--{name}", options.get("groups"))
    _load_into(options, "costs", kinds="fiu", ndim=1, wanted="a real array [rows]")
    for name in ("preselected", "exclude"):
        _load_into(options, name, kinds="iub", ndim=1, wanted="an integer array of rows, or a mask [rows]")
        if name in options:
            options[name] = np.array(options[name])  # torch warns of files that cannot be written to
    k = getattr(arguments, "k", None)
    check_count(k, options)
    selection = fc.facility_location(x, k, **options)
    arrays = {
        "indices": selection.indices.numpy(),
        "weights": selection.weights.numpy(),
        "gains": selection.gains.numpy(),
        "assignment": selection.assignment.numpy(),
    }
    if selection.rounds is not None and selection.served_by is not None:
        arrays |= {"rounds": selection.rounds.numpy(), "served_by": selection.served_by.numpy()}
    return _Chosen(arrays, {"rows": x.shape[0], "objective": selection.objective, "offset": selection.offset})


def _simcore(arguments: argparse.Namespace) -> _Chosen:
    options = _options(
        arguments, "n_clusters", "stop", "stop_threshold", "patience", "seed", "ratio", "fit_on"
    )
    options |= _options(arguments, "backend", "progress", "memory_budget", "target", "centroids")
    if "target" not in options and "centroids" not in options:
        raise CommandError("--target: the target's features are missing (only --centroids replaces them)")
    openset = load_features(arguments.features, "--features")
    for name in ("target", "centroids"):
        if name in options:
            options[name] = load_features(options[name], f"--{name}")
    coreset = fc.simcore(openset, k=getattr(arguments, "k", None), **options)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    info = dict(coreset.info)
    for name in ("similarity", "centroid", "centroids"):
        arrays[name] = info.pop(name).numpy()
    return _Chosen(arrays, {"rows": openset.shape[0], **info})


def _goracs(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "lam", "max_exchanges", "n_candidates", "solver", "reg", "seed")
    options |= _options(arguments, "backend", "progress", "memory_budget", "train_labels", "valid_labels")
    options |= _options(arguments, "norm_clip", "norm_scale", "max_solves", "time_limit", "tol", "scaling")
    for name, rows in (("train_labels", "train rows"), ("valid_labels", "validation rows")):
        if name in options:
            option = f"--{name.replace('_', '-')}"
            wanted = f"an integer array [{rows}]"
            options[name] = load_array(options[name], option, kinds=LABELS, ndim=1, wanted=wanted)
    train = load_features(arguments.train, "--train")
    valid = load_features(arguments.valid, "--valid")
    norms = None
    if hasattr(arguments, "grad_norms"):
        norms = load_array(
            arguments.grad_norms, "--grad-norms", kinds="fiu", ndim=1, wanted="a real array [train rows]"
        )
    coreset = fc.goracs(train, valid, norms, arguments.k, **options)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    return _Chosen(arrays, {"rows": train.shape[0], **coreset.info})


def _ccs(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "mislabel_ratio", "n_strata", "strata", "seed", "groups", "mislabel_scores")
    wanted = "a real array [samples]"
    scores = load_array(arguments.scores, "--scores", kinds="fiu", ndim=1, wanted=wanted)
    if "mislabel_scores" in options:
        options["mislabel_scores"] = load_array(
            options["mislabel_scores"], "--mislabel-scores", kinds="fiu", ndim=1, wanted=wanted
        )
    _load_into(options, "groups", kinds=LABELS, ndim=1, wanted="an integer array [samples]")
    coreset = fc.ccs(scores, arguments.k, **options)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    return _Chosen(arrays, {"rows": scores.shape[0], **coreset.info})


def _colm(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "top", "betas", "eps", "keep_groups", "rule", "metric", "backend")
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    method = fc.CoLM(arguments.k, **options)
    if hasattr(arguments, "state"):
        state = load_state(arguments.state, "--state")
        try:
            method.load_state_dict(state)
        except (TypeError, ValueError) as error:
            raise CommandError(f"--state: {arguments.state}: {error}") from None
    groups = None
    if hasattr(arguments, "groups"):
        groups = load_array(
            arguments.groups, "--groups", kinds=LABELS, ndim=1, wanted="an integer array [rows]"
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
        warnings.warn(nothing_kept(coreset.info["unseen"], "--groups", coreset.info["counts"]), stacklevel=1)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    info = dict(coreset.info)
    dims = info.pop("dims")
    if dims is not None:
        arrays["dims"] = dims.numpy()
    return _Chosen(arrays, {"rows": rows, **info}, _state_arrays(method))


def _state_arrays(method: fc.CoLM) -> dict[str, np.ndarray]:
    history = method.state_dict()["history"] or {"kind": NO_HISTORY}
    return {name: np.asarray(value) for name, value in history.items()}


def _autocoreset(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "method", "n_initial", "patience", "seed", "groups", "progress")
    options |= _options(arguments, "n_clusters", "x_test", "y_test")
    x = load_features(arguments.features, "--features")
    if "x_test" in options:
        options["x_test"] = load_features(options["x_test"], "--x-test")
    if "y_test" in options:
        options["y_test"] = load_array(
            options["y_test"], "--y-test", kinds="fiub", ndim=1, wanted="a real array [test rows]"
        )
    y = None
    if hasattr(arguments, "targets"):
        y = load_array(arguments.targets, "--targets", kinds="fiubUO", ndim=1, wanted="a real array [rows]")
    _load_into(options, "groups", kinds=LABELS, ndim=1, wanted="an integer array [rows]")
    if y is None and arguments.model != "kmeans":
        raise CommandError(f"--targets: {arguments.model} needs the targets of the rows")
    if hasattr(arguments, "no_groups"):
        if "groups" in options:
            raise CommandError("--no-groups: groups are given by --groups; leave one of the two out")
        options["groups"] = False
    loss = getattr(arguments, "loss", None)
    coreset = fc.autocoreset(x, y, arguments.model, loss, arguments.k, **options)
    arrays = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    return _Chosen(arrays, {"rows": x.shape[0], "model": arguments.model, **coreset.info})


def _plain(coreset: fc.Coreset, rows: int, *arrays: str) -> _Chosen:
    """A control's result; the entries of `info` named by `arrays` are written as arrays."""
    info = dict(coreset.info)
    kept = {name: info.pop(name).numpy() for name in arrays}
    chosen = {"indices": coreset.indices.numpy(), "weights": coreset.weights.numpy()}
    return _Chosen(chosen | kept, {"rows": rows, **info})


def _random_subset(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "mislabel_ratio", "seed", "groups", "mislabel_scores")
    _load_into(options, "mislabel_scores", kinds="fiu", ndim=1, wanted="a real array [samples]")
    _load_into(options, "groups", kinds=LABELS, ndim=1, wanted="an integer array [samples]")
    return _plain(fc.random_subset(arguments.n, arguments.k, **options), arguments.n)


def _k_center(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "metric", "preselected", "backend", "progress", "memory_budget")
    _load_into(options, "preselected", kinds="iu", ndim=1, wanted="an integer array of rows")
    x = load_features(arguments.features, "--features")
    return _plain(fc.k_center(x, arguments.k, **options), x.shape[0], "distances", "pick_distances")


def _nearest(arguments: argparse.Namespace) -> _Chosen:
    options = _options(arguments, "metric", "backend", "progress", "memory_budget")
    openset = load_features(arguments.features, "--features")
    target = load_features(arguments.target, "--target")
    return _plain(fc.nearest(openset, target, arguments.k, **options), openset.shape[0], "values", "targets")


# The file that --rows means if it names none, by algorithm.
_ROWS = {"goracs": "train", "ccs": "scores", "colm": "gradients", "random-subset": ""}

# Options that name files.
_INPUTS = (
    *("features", "target", "centroids", "clients", "weights", "groups", "budgets", "preselected"),
    *("costs", "exclude", "caps", "x_test", "y_test"),
    *("train", "valid", "grad_norms", "train_labels", "valid_labels"),
    *("scores", "mislabel_scores", "targets", "gradients", "rows"),
)

ALGORITHMS = {
    "facility-location": _facility_location,
    "simcore": _simcore,
    "ccs": _ccs,
    "goracs": _goracs,
    "colm": _colm,
    "autocoreset": _autocoreset,
    "random-subset": _random_subset,
    "k-center": _k_center,
    "nearest": _nearest,
}


def _savez(contents: dict[str, Any], stream: IO[bytes]) -> None:
    np.savez(stream, **contents)


def _same_place(a: str, b: str) -> bool:
    """Whether two names are those of one file that is not a symbolic link."""
    first, second = (Path(text).parent.resolve() / Path(text).name for text in (a, b))
    return first == second and not first.is_symlink()


def run_select(arguments: argparse.Namespace) -> int:
    data = _rows_file(arguments)
    given = [name for name in (getattr(arguments, option, None) for option in _INPUTS) if name]
    states = [arguments.state] if hasattr(arguments, "state") else []
    force = getattr(arguments, "force", False)
    out = check_output(arguments.out, "--out", OUTPUTS, given + states, replace=force)
    suffix = out.suffix.lower()
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise CommandError(
            "--out: pyarrow is missing, which writes Parquet: pip install 'flashcoreset[files]'"
        )
    if data is not None:
        check_rows(data, "--rows", suffix)
    kept, replaces = None, force
    if hasattr(arguments, "save_state"):
        # The saved state may replace the state that was read.
        replaces = force or any(_same_place(arguments.save_state, state) for state in states)
        kept = check_output(arguments.save_state, "--save-state", ".npz", given, replace=replaces)
        if kept.resolve() == out.resolve():
            raise CommandError(f"--save-state: {kept} is also --out; choose another name")
    start = time.perf_counter()
    arrays, info, state = ALGORITHMS[arguments.algorithm](arguments)
    seconds = time.perf_counter() - start
    info = {"algorithm": arguments.algorithm, "version": fc.__version__, "seconds": seconds, **info}
    text = json.dumps(jsonable(info))
    rows = None if data is None else chosen_rows(data, "--rows", arrays, info["rows"], suffix)
    if suffix == ".npz":
        contents: dict[str, Any] = {"info": np.array(text), **arrays}
        if rows is not None:
            contents["rows"] = rows
        write = functools.partial(_savez, contents)
    else:
        write = functools.partial(write_table, rows, arrays, text, suffix)
    files = [Output(out, "--out", write, force)]
    if kept is not None and state is not None:
        # Written last: if the state is one step behind its output, the same call once more makes up for it.
        files.append(Output(kept, "--save-state", functools.partial(_savez, state), replaces))
    write_whole(*files)
    if getattr(arguments, "format", "text") == "json":
        print(json.dumps({"out": str(out), "chosen": len(arrays["indices"]), "info": jsonable(info)}))
    else:
        print(f"{out}: {len(arrays['indices']):,} of {info['rows']:,} rows in {seconds:.2f} s")
    return 0


def _rows_file(arguments: argparse.Namespace) -> str | None:
    """The file whose rows are written; None without --rows."""
    named: str | None = getattr(arguments, "rows", None)
    if named is None or named:
        return named
    option = _ROWS.get(arguments.algorithm, "features")
    if not option:
        raise CommandError(
            f"--rows: {arguments.algorithm} reads no rows; name their file, as in --rows DATA.parquet"
        )
    source: str = getattr(arguments, option)
    return source
