"""`flashcoreset info`, `bench` and `demo`."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import flashcoreset as fc
from flashcoreset._core import native
from flashcoreset._core.dispatch import BACKENDS, FAMILIES, cuda_failure, takes_of, triton_failure
from flashcoreset.cli.errors import CommandError
from flashcoreset.cli.files_out import Output, check_output, write_whole


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


def run_info(arguments: argparse.Namespace) -> int:
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
    where = torch.device("cuda" if gpus else "cpu")
    triton, cuda = (
        "available" if failure is None else f"missing: {failure}"
        for failure in (triton_failure(where), cuda_failure(where))
    )
    if (built := native.cuda_architectures()) is not None:
        cuda += f" (built for {built})"
    backends = [("torch", "available"), ("cpu", cpu), ("cuda", cuda), ("triton", triton)]
    threads = f"{_processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads used"
    devices = [("cpu", threads), *(gpus or [("cuda", f"none: {no_gpu}")])]
    if arguments.format == "json":
        versions = {"flashcoreset": fc.__version__, "python": platform.python_version()}
        versions |= {"torch": torch.__version__, "numpy": np.__version__}
        parts = {"backends": backends, "isas": isas, "devices": devices}
        print(json.dumps({"versions": versions, **{name: dict(rows) for name, rows in parts.items()}}))
        return 0
    print(f"flashcoreset {fc.__version__} ({numbers})")
    _print_table("backends", backends)
    _print_table("instruction sets of the cpu backend", isas)
    _print_families()
    _print_table("devices", devices)
    return 0


def _is_checkout(folder: Path) -> bool:
    """Whether the folder is this project's source tree: another project's benchmarks must not be run."""
    try:
        project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return '\nname = "flashcoreset"\n' in project and (folder / "benchmarks" / "__main__.py").is_file()


def run_bench(arguments: argparse.Namespace) -> int:
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


def run_demo(arguments: argparse.Namespace) -> int:
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
