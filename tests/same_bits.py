"""Compares the results of two commits bit by bit: for a change of the sources that should change no result.

    python tests/same_bits.py BASE [HEAD]

builds both commits in clones in a temporary folder (HEAD is the current commit by default), makes every call of
tests/test_invariance.py and every case of tests/cases.py on every backend in each, and prints the calls whose results differ.
Calls that BASE does not know are named and count for nothing. Takes ten minutes, so it is not part of `make test`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkouts import ROOT, Checkout


def digests() -> dict[str, str]:
    """By the name of each call, a digest of its results, or the error that it raised."""
    os.environ["TRITON_INTERPRET"] = "1"
    import cases
    import conftest
    import test_invariance as table
    import torch

    import flashcoreset as fc
    from flashcoreset._core import cuda, native

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    emulated = conftest.emulated_module()
    native.cuda_failure = lambda device=0: None
    native.cuda_module = lambda device=0: emulated
    found = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        try:
            tensors = list(table.tensors(run()))
        except (
            TypeError,
            ValueError,
            AttributeError,
            NotImplementedError,
            fc.BackendUnavailableError,
        ) as error:
            found[name] = f"{type(error).__name__}: {error}"
            return
        told = hashlib.sha256()
        for tensor in tensors:
            told.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + table.bits(tensor))
        found[name] = told.hexdigest()

    for label, call in table.ALL:
        for backend in call.backends or ("",):
            cuda.DEVICE_TYPE = "cpu" if backend == "cuda" else "cuda"
            note(f"{label} {backend}", lambda call=call, backend=backend: table.results(call, backend))
    every = [*cases.plain_cases(), *cases.variant_cases()]
    small = [case for case in every if case.x.shape[0] <= 100]  # the emulator takes minutes for larger ones
    for backend, some in {
        "torch": small, "cpu": every, "cuda": small, "triton": cases.for_interpreter(small, 2),
    }.items():  # fmt: skip
        cuda.DEVICE_TYPE = "cpu" if backend == "cuda" else "cuda"
        for case in some:
            note(
                f"{case.name} {backend}",
                lambda case=case, backend=backend: fc.facility_location(
                    case.x, case.k, backend=backend, **case.options
                ),
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", nargs="?")
    parser.add_argument("head", metavar="HEAD", nargs="?", default="HEAD")
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.digests:
        print(json.dumps(digests()))
        return
    if arguments.base is None:
        parser.error("name the commit to compare with")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, commit in (("base", arguments.base), ("head", arguments.head)):
            checkout = Checkout(Path(folder) / name, commit, jobs=os.cpu_count() or 1)
            if not (checkout.make_module() and checkout.make_emulated()):
                sys.exit(f"{commit} does not build")
            # The calls are those of this checkout's tests in both.
            command = [sys.executable, str(ROOT / "tests/same_bits.py"), "--digests"]
            done = subprocess.run(
                command, env=checkout.environment, stdout=subprocess.PIPE, check=True, text=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    base, head = results
    new = [
        name
        for name in head
        if head[name] != base[name] and base[name].startswith(("TypeError", "ValueError"))
    ]
    changed = [name for name in head if head[name] != base[name] and name not in new]
    for name in new:
        print(f"new: {name} (BASE: {base[name]})")
    for name in changed:
        print(f"differs: {name}")
    print(
        f"{len(head) - len(changed) - len(new)} of {len(head)} results are the same, {len(changed)} differ, {len(new)} are new"
    )
    sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
