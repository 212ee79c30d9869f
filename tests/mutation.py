"""Breaks the sources on purpose, one small change at a time, and counts how many of the changes the tests notice.

    python tests/mutation.py --count 200 --seed 1 --out mutation.jsonl

A mutant is one operator, bound or constant changed at random in the kernels or in the checks around them. It is built, and the
tests of its family that run the changed code (those of its backend) run until one fails, one of each function first. Mutants that do not compile are drawn
again and count for nothing; a test that no longer ends counts as a test that fails, a mutant that no test has failed for in its
time (`--seconds`) as not caught. A test that catches a mutant is run again on the sources as they are, and must pass.
All changes are made in a clone of the repository in a temporary folder, at the current commit; the environment must have what
`make test` installs. `--workers 2` runs two at once, each in a clone of its own. A run that was stopped goes on from the place
it had reached: mutants that the output file has are not tried again. Takes a minute per mutant, so this is not part of `make
test`. With CMAKE_CXX_COMPILER_LAUNCHER=ccache in the environment, building the sources as they were takes next to no time.
"""

from __future__ import annotations

import argparse
import ast
import collections
import fnmatch
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from checkouts import ROOT, Checkout

SOURCES = (
    "csrc/core/*.h",
    "csrc/cpu/*",
    "csrc/cuda/*",
    "csrc/bindings/*",
    "triton_kernels/*.py",
    "python/flashcoreset/*/*.py",
    "python/flashcoreset/methods/*/*.py",
    "python/flashcoreset/compat/*/*.py",
)
# Files that no test on this machine can run (other processors' code, the loading of CUDA's own libraries), and what draws pictures:
# neither kernels nor checks.
LEFT_OUT = (
    "python/flashcoreset/plot/*",
    "python/flashcoreset/demo/*",
    "csrc/core/print_isas.cpp",
    "csrc/core/dlpack.h",
    "csrc/cuda/runtime.h",
    "csrc/bindings/processor.cpp",
    "triton_kernels/__init__.py",
    "python/flashcoreset/__init__.py",
)

# Which tests guard a file: the first pattern that fits. Test files in the order in which they are tried, quick ones first.
TESTS = (
    ("*/distributed/*", "distributed"),
    ("*/compat/submodlib/*", "compat_submodlib"),
    ("*/compat/apricot/*", "compat_apricot"),
    ("*/compat/_coverage.py|*/compat/_knapsack.py", "compat_submodlib compat_apricot"),
    ("*/compat/ot/*", "compat_ot"),
    ("*/compat/geomloss/*", "compat_geomloss"),
    ("*/compat/_costs.py|*/compat/_plan_gradient.py|*/compat/_points.py", "compat_ot compat_geomloss"),
    ("*/compat/trak/*", "compat_trak"),
    ("*/compat/dattri/*|*/compat/sjlt.py", "compat_dattri"),
    ("*/compat/opacus.py", "compat_opacus"),
    ("*/compat/_gradients.py", "compat_trak compat_dattri"),
    ("*/compat/*", "compat"),
    ("*/cli/ranks.py|*/cli/shards.py", "distributed_failures"),
    ("*/cli/*", "cli select"),
    ("*/integrations/ray.py", "integrations_ray"),
    ("*/integrations/sklearn.py", "integrations_sklearn autocoreset"),
    ("*/integrations/_b*", "integrations_torch integrations_transformers"),
    ("*/k_center.py|*/nearest.py|*/random_subset.py", "controls"),
    ("*_core/inputs.py|*_core/labels.py|*_core/imports.py", "inputs frames odd_scalars"),
    ("*/results.py|*/saving.py|*/taking.py|*/files.py", "results cli_files"),
    ("*/progress.py", "progress"),
    ("*/forks.py", "fork"),
    ("*_core/tensor.py|*_core/errors.py", "bad_input inputs odd_scalars boundary edges"),
    ("*sinkhorn*", "sinkhorn goracs"),
    ("*transport*", "transport goracs sinkhorn"),
    ("*goracs*|*exchanges*", "goracs"),
    ("*nearest_order*|*simcore*", "nearest_order simcore"),
    ("*scores*|*dynamics*", "scores dynamics ccs"),
    ("*ccs*|*strata*", "ccs"),
    ("*budgets*", "budgets matching colm"),
    ("*adam*", "colm matching"),
    ("*colm*", "colm"),
    ("*autocoreset*|*loss_subsets*|*weighted_models*", "autocoreset"),
    ("*tableau*|*caratheodory*", "caratheodory autocoreset"),
    ("*pursuit*|*active_set*", "pursuit"),
    ("*zeroth_order*|*directions*", "zeroth_order matching"),
    ("*matching*|*core/gradients*", "matching"),
    ("*gradients/*", "gradient outer_products"),
    ("*sketch*|*projection*|*philox*|*normal*", "sketch zeroth_order"),
    ("*integrations/torch*", "integrations_torch"),
    ("*integrations/transformers*", "integrations_transformers"),
    (
        "*facility_location*|*sampling*|*live_lists*|*_source.h|*gain_sums*|*candidate_heap*|*sweeps*|*lookahead*",
        "facility_location precomputed select",
    ),
    ("*pairwise*|*pack*|*tile*|*metric*", "pairwise facility_location precomputed nearest_order"),
    (
        "*kernels/*|*dispatch*",
        "facility_location sinkhorn sketch scores matching caratheodory pursuit nearest_order",
    ),
    ("*/native.py", "native_loader"),
    ("*/memory.py", "memory_estimate"),
    (
        "*",
        "bindings boundary bad_input invariance edges facility_location sinkhorn sketch scores matching caratheodory pursuit",
    ),
)

# The replacements of each token: a boundary that moves by one, a sign, a neighbour in meaning.
OPERATORS = {
    "<": ["<=", ">"], "<=": ["<", ">="], ">": [">=", "<"], ">=": [">", "<="], "==": ["!="], "!=": ["=="],
    "+": ["-"], "-": ["+"], "*": ["/"], "/": ["*"], "//": ["*"], "%": ["*"], "+=": ["-="], "-=": ["+="], "*=": ["/="],
    "&&": ["||"], "||": ["&&"], "and": ["or"], "or": ["and"],
    "std::min": ["std::max"], "std::max": ["std::min"], "true": ["false"], "false": ["true"],
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one place: `before` at character `start` of `file` becomes `after`."""

    file: str
    line: int
    start: int
    before: str
    after: str

    def apply(self, text: str) -> str:
        assert text[self.start :].startswith(self.before)
        return text[: self.start] + self.after + text[self.start + len(self.before) :]


def _number(text: str) -> list[str]:
    """The replacements of a constant: small ones move by one, large ones double and halve."""
    whole = re.fullmatch(r"(0|[1-9]\d*)([uUlL]*)", text)
    if whole:
        value = int(whole[1])
        others = (value + 1, value - 1) if value <= 4 else (2 * value, value // 2)
        return [f"{other}{whole[2]}" for other in others if other >= 0]
    decimal = re.fullmatch(r"(\d*\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+)(f?)", text)
    return [f"{2 * float(decimal[1]) or 1.0!r}{decimal[2]}"] if decimal else []


def cpp_mutants(file: str, text: str) -> Iterator[Mutant]:
    """Every change of a C++ source. Operators are those with a space on both sides, as the formatter leaves binary ones."""
    blank = re.sub(
        r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|static_assert\(.*?\);|template <[^>\n]*>",
        lambda found: re.sub(r"[^\n]", " ", found[0]),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    pattern = r"(?<= )(?:[<>=!]=|[-+*]=|&&|\|\||[-+*/%<>])(?=\s)|\bstd::(?:min|max)\b|\b(?:true|false)\b|(?<![\w.])\d[\d.]*(?:e[+-]?\d+)?\w*"
    for found in re.finditer(pattern, blank):
        token = found[0]
        for after in OPERATORS.get(token) or _number(token):
            yield Mutant(file, text.count("\n", 0, found.start()) + 1, found.start(), token, after)


def python_mutants(file: str, text: str) -> Iterator[Mutant]:
    """Every change of a Python source: comparisons, arithmetic, boolean operators, `not`, numbers, True and False."""
    lines = [0]
    for line in text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    data = text.encode()

    def offset(line: int, column: int) -> int:
        return len(data[: lines[line - 1] + column].decode())

    def between(left: ast.expr, right: ast.expr) -> Iterator[Mutant]:
        begin, end = (
            offset(left.end_lineno or 0, left.end_col_offset or 0),
            offset(right.lineno, right.col_offset),
        )
        found = re.search(
            r"//|[<>=!]=|[-+*/%<>]|\band\b|\bor\b",
            re.sub(r"#[^\n]*", lambda c: " " * len(c[0]), text[begin:end]),
        )
        if found and found[0] in OPERATORS:
            for after in OPERATORS[found[0]]:
                yield Mutant(file, left.end_lineno or 0, begin + found.start(), found[0], after)

    tree = ast.parse(text)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        for name in ("annotation", "returns")
        if (part := getattr(node, name, None)) is not None
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):
            yield from between(node.left, node.right)
        elif isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                yield from between(left, right)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield Mutant(file, node.lineno, offset(node.lineno, node.col_offset), "not ", "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            start = offset(node.lineno, node.col_offset)
            before = text[start : offset(node.end_lineno or 0, node.end_col_offset or 0)]
            for after in [str(not node.value)] if isinstance(node.value, bool) else _number(before):
                yield Mutant(file, node.lineno, start, before, after)


def all_mutants(root: Path) -> list[Mutant]:
    """Every change of every source, in one order."""
    found = []
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            file = path.relative_to(root).as_posix()
            if (
                path.is_file()
                and path.resolve() == path
                and not any(fnmatch.fnmatch(file, left_out) for left_out in LEFT_OUT)
            ):
                make = python_mutants if path.suffix == ".py" else cpp_mutants
                found += sorted(set(make(file, path.read_text())), key=lambda m: (m.start, m.after))
    return found


def families_of(file: str) -> list[str]:
    """The families whose tests guard a file. Estimates of memory stand beside each family's code."""
    names = next(
        names for patterns, names in TESTS if any(fnmatch.fnmatch(file, p) for p in patterns.split("|"))
    )
    return [*names.split(), *(["memory_estimate"] if file.startswith("python/") else [])]


def test_files(root: Path, file: str) -> list[str]:
    """The test files that guard a source: those of all backends, and those of its own backend if there are any."""
    plain, own, other = [], [], []
    for family in families_of(file):
        for path in sorted(root.glob(f"tests/**/test_{family}*.py")):
            backend = path.stem.rpartition("_")[2]
            if backend == "interrupt":
                continue
            kind = plain if backend not in ("cuda", "triton") else own if backend in file else other
            kind.append(path.relative_to(root / "tests").as_posix())
    names = plain + (own or ([] if file.startswith("csrc/cpu") else other))
    return [f"tests/{name}" for name in dict.fromkeys(names)]


def selection(file: str) -> str:
    """pytest's -k for the tests that run the code of a file: those of its backend, or of the CPU's if it serves all."""
    if file.startswith(("csrc/cuda", "csrc/bindings/cuda")) or file.endswith("/cuda.py"):
        return "cuda"
    if file.startswith("triton_kernels") or file.endswith("/triton.py"):
        return "triton"
    return "not triton" if file.startswith("csrc/core") else "not triton and not cuda"


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """One test of each function first, then a second one of each: a mutant is caught by few functions and many parameters."""
    met: collections.Counter[object] = collections.Counter()
    rank = {}
    for item in items:
        rank[item] = met[item.function]
        met[item.function] += 1
    items.sort(key=lambda item: rank[item])


class Workshop(Checkout):
    """A clone of the repository in which mutants are built and tested, one after the other."""

    # The optimiser is not what is tried, and at -O1 a source takes less than half of the time to compile.
    MODULE = ("-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG", "-DFLASHCORESET_TESTS=ON")

    def __init__(self, folder: Path, jobs: int, seconds: float, passed: set[str]) -> None:
        super().__init__(folder, jobs=jobs)
        # pytest takes this file for a plugin. Compiled files are what makes it start within seconds.
        self.environment["PYTHONPATH"] += f"{os.pathsep}{self.root / 'tests'}"
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.seconds = seconds  # of tests per mutant
        self.passed = passed  # the tests that pass on the sources as they are
        # Which modules were built from a mutant, and have to be built anew before the next is tried.
        self.stale = {"module", "emulated"}
        if not self.build(set()):
            raise RuntimeError("the sources do not build as they are")

    def build(self, wanted: set[str]) -> bool:
        """Builds these modules and those that are stale; False if something does not compile."""
        kinds, self.stale = wanted | self.stale, wanted
        if "module" in kinds and not self.make_module(*self.MODULE):
            return False
        return "emulated" not in kinds or self.make_emulated()

    def _run(self, command: list[str], limit: float) -> tuple[int | None, str]:
        """The exit status, None if the command does not end, and what it printed."""
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]

    def _pytest(self, *arguments: str) -> str | None:
        """The first test that fails, or None if none does in the time that a mutant gets. A single test has 200 s to end."""
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "mutation",
            "-p",
            "no:cacheprovider",
            "--timeout=200",
            "--timeout-method=thread",
        ]
        status, output = self._run([*pytest, *arguments], self.seconds)
        if status in (0, 5, None):
            return None
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return found[1] if found else f"{' '.join(arguments)}: exit status {status}"

    def check(self, file: str, test: str) -> None:
        """Raises RuntimeError if the test that caught a mutant of `file` fails on the sources as they are, too."""
        if test in self.passed:
            return
        if not self.build(set()):
            raise RuntimeError("the sources do not build any more as they are")
        if ": exit status" in test:  # the interpreter died before a test could be named
            failed = self._pytest(*test_files(self.root, file), "-k", selection(file))
        else:
            failed = self._pytest(test) if test.startswith("tests/") else self._ctest(test)
        if failed is not None:
            raise RuntimeError(f"{failed} fails without a mutant of {file}")
        self.passed.add(test)

    def failure(self, file: str) -> str | None:
        """The first test that fails, or None if all pass. Python's tests go first, whose build exists already."""
        tests = test_files(self.root, file)
        if tests and (failed := self._pytest(*tests, "-k", selection(file))) is not None:
            return failed
        if not file.startswith(("csrc/cpu", "csrc/core", "csrc/cuda")):
            return None
        prefix = "test_cuda_" if "/cuda" in file else "test_"
        for family in families_of(file):
            if (self.root / f"tests/cpp/test_{family}.cpp").is_file():
                target = prefix + family + ("" if "/cuda" in file else f"_{self._isa()}")
                if (failed := self._ctest(target)) is not None:
                    return failed
        return None

    def _ctest(self, target: str) -> str | None:
        """The name of a C++ test if it fails, or None if it passes."""
        passes = (
            self.make_module(*self.MODULE, target=target)
            and self._run(["ctest", "--test-dir", "build/module/tests/cpp", "-R", f"^{target}$"], 1500)[0]
            == 0
        )
        return None if passes else target

    def _isa(self) -> str:
        built = next((self.root / "python/flashcoreset").glob("_cpu_*.so"))
        return built.name.partition(".")[0].removeprefix("_cpu_")

    def try_out(self, mutant: Mutant) -> dict[str, object] | None:
        """The outcome of a mutant; None if it does not compile."""
        path = self.root / mutant.file
        text = path.read_text()
        path.write_text(mutant.apply(text))
        try:
            if path.suffix == ".py":
                compile(path.read_text(), mutant.file, "exec")
            kinds = set()
            if mutant.file.startswith("csrc/") and "/cuda" not in mutant.file:
                kinds.add("module")
            if mutant.file.startswith(("csrc/cuda", "csrc/core", "csrc/bindings")):
                kinds.add("emulated")
            if not self.build(kinds):
                return None
            caught_by = self.failure(mutant.file)
        except SyntaxError:
            return None
        finally:
            path.write_text(text)
            # The file that Python compiled from the mutant may have the same second and length as the file it reads next.
            for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
                cached.unlink()
        if caught_by is not None:
            self.check(mutant.file, caught_by)
        return {**asdict(mutant), "caught_by": caught_by}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="how many mutants that compile (200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--seconds",
        type=float,
        default=400,
        help="of Python's tests per mutant, which counts as not caught then (400)",
    )
    parser.add_argument("--only", default="*", help="a pattern of files, such as '*sinkhorn*'")
    parser.add_argument("--out", type=Path, required=True, help="one JSON line for each mutant")
    arguments = parser.parse_args()

    mutants = [mutant for mutant in all_mutants(ROOT) if fnmatch.fnmatch(mutant.file, arguments.only)]
    random.Random(arguments.seed).shuffle(mutants)
    results = (
        [json.loads(line) for line in arguments.out.read_text().splitlines()]
        if arguments.out.is_file()
        else []
    )
    tried = {(r["file"], r["start"], r["after"]) for r in results}
    queue = iter([m for m in mutants if (m.file, m.start, m.after) not in tried])
    results = [r for r in results if r["compiles"]]
    lock = threading.Lock()
    passed: set[str] = set()
    print(f"{len(mutants)} possible mutants, {len(results)} tried before")

    def work(folder: Path) -> None:
        jobs = max(1, (os.cpu_count() or 1) // arguments.workers)
        workshop = Workshop(folder, jobs=jobs, seconds=arguments.seconds, passed=passed)
        while True:
            with lock:
                if len(results) >= arguments.count or (mutant := next(queue, None)) is None:
                    return
            begin = time.monotonic()
            result = workshop.try_out(mutant)
            seconds = round(time.monotonic() - begin)
            with lock, arguments.out.open("a") as out:
                out.write(
                    json.dumps(
                        {**(result or asdict(mutant)), "compiles": result is not None, "seconds": seconds}
                    )
                    + "\n"
                )
                if result is not None:
                    results.append(result)
                    print(
                        f"{len(results)}: {mutant.file}:{mutant.line}: {mutant.before} -> {mutant.after}: {result['caught_by'] or 'SURVIVED'} ({seconds} s)",
                        flush=True,
                    )

    with tempfile.TemporaryDirectory() as folder:
        workers = [
            threading.Thread(target=work, args=(Path(folder) / str(i),)) for i in range(arguments.workers)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    survivors = [r for r in results if r["caught_by"] is None]
    print(f"{len(results) - len(survivors)} of {len(results)} mutants caught")
    for r in survivors:
        print(f"  survived: {r['file']}:{r['line']}: {r['before']} -> {r['after']}")


if __name__ == "__main__":
    main()
