"""Fixtures for every test module: the backends that are tested, the compiled one in each build that this
processor can run."""

from __future__ import annotations

import collections
import functools
import importlib.machinery
import importlib.util
import itertools
import os
import platform
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Triton decides when it is imported whether kernels are compiled or interpreted. Here they are interpreted, on the CPU,
# unless the variable says otherwise; torch imports triton too, so this goes first.
if os.environ.get("FLASHCORESET_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# An OpenMP thread spins while it waits for another. If processes share the cores (pytest -n, tests that start some), it takes
# the core that the other needs, and small products last a hundred times as long. libgomp reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Processes that a shell starts in the background ignore Ctrl-C, and so would the processes that tests send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from cases import DEVICE

from flashcoreset._core import cuda, native

pytest.register_assert_rewrite("checks")

# No part of the reference is compiled here, and none of the Triton kernels: sanitizers (tests/sanitize.py) have nothing to
# watch in them.
SANITIZED = "FLASHCORESET_SANITIZER" in os.environ
BACKENDS = [*([] if SANITIZED else ["torch"]), *(f"cpu-{isa}" for isa in native.available_isas())]
# With the package's own dependencies alone, as where wheels are built (tests/environments.py), there is no emulator and no
# Triton.
BARE = "FLASHCORESET_TEST_BARE" in os.environ
# The CUDA kernels in the emulator and the Triton kernels in the interpreter, which runs on x86-64 alone; on a GPU the real ones.
TRITON = [] if BARE or SANITIZED or platform.machine() != "x86_64" else ["triton"]
GPU_BACKENDS = [] if BARE else ["cuda", *TRITON]
EVERY_BACKEND = pytest.mark.parametrize(
    "backend", [*(BACKENDS if DEVICE == "cpu" else []), *GPU_BACKENDS], indirect=True
)

if TRITON and DEVICE == "cpu":
    # The order of sums of NumPy's matrix product depends on a row's place and on the number of threads, that of a GPU's does not.
    # One product per row has one order.
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(
        builder: Any, a: Any, b: Any, d: Any, *options: Any, whole: Any = InterpreterBuilder.create_dot
    ) -> Any:
        rows, sums = (TensorHandle(of.data[:, None], of.dtype) for of in (a, d))
        return TensorHandle(whole(builder, rows, b, sums, *options).data[:, 0], d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot

# The few tests that take long: begun last, one of them would keep a single process busy while the others have nothing left.
LONG = (
    "test_triton_compile.py",
    "test_packaging.py",
    "test_benchmarks.py",
    "test_integrations_transformers.py",
    "test_interrupts.py",
    "test_fork.py",
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    if DEVICE == "cpu":
        thin_out([item for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")])


def thin_out(items: list[pytest.Function]) -> None:
    """Marks tests as slow whose parameters all come together, two at a time, in other tests of the same function and backend.

    All combinations of three and more parameters take an hour. `make test-large` runs them all.
    """
    functions: dict[object, dict[pytest.Function, set[object]]] = collections.defaultdict(dict)
    for item in items:
        key = item.function, str(item.callspec.params.get("backend"))
        functions[key][item] = set(itertools.combinations(_values(item), 2))
    for left in functions.values():
        while left:
            chosen = max(left, key=lambda item: len(left[item]))
            seen = left.pop(chosen)
            for item in list(left):
                left[item] -= seen
                if not left[item]:
                    item.add_marker("slow")
                    del left[item]


def _values(item: pytest.Function) -> Iterator[tuple[object, ...]]:
    """The values of a test's parameters but for the backend. If it has one alone, that is a table, whose cases have theirs between hyphens."""
    texts = [text for text in item.callspec._idlist if text != item.callspec.params.get("backend")]
    if len(texts) == 1:
        texts = texts[0].split("-")
        yield "parts", len(texts)  # no case is a beginning of another
    yield from enumerate(texts)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend; for "cpu" the build in use is the one that the test's id names.

    A test module runs on the GPU's backends as well if it says `pytestmark = EVERY_BACKEND`.
    """
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setattr(native, "_loaded", native.load_isa(isa))
    if name == "cuda":
        request.getfixturevalue("emulated_cuda")
    return name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On small matrices the threads of lstsq wait longer for each other than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cuda" on CPU tensors: the kernels of csrc/cuda, run by tests/emulator. On a GPU (`make gpu`) the real ones."""
    if DEVICE != "cpu":
        return
    module = emulated_module()
    if module is None:
        pytest.fail("the emulated CUDA module is not built: make emulated")
    monkeypatch.setattr(native, "cuda_failure", lambda device=0: None)
    monkeypatch.setattr(native, "cuda_module", lambda device=0: module)
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")


@functools.cache
def emulated_module() -> ModuleType | None:
    built = Path(__file__).resolve().parent.parent / "build" / "emulated" / "emulator"
    folder = Path(os.environ.get("FLASHCORESET_TEST_EMULATED", built))  # tests/sanitize.py has its own
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = folder / f"_cuda_emulated{suffix}"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "set_exporter"):  # an older commit's, to which tests/same_bits.py compares, has none
        module.set_exporter(torch.Tensor, native.capsule)
    return module


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases of the facility-location table (tests/cases.py) each backend passed."""
    where = "" if DEVICE == "cpu" else f" on {DEVICE}"
    names = {"cuda": f"cuda{where or ' emulated'}", "triton": f"triton{where or ' interpreted'}"}
    counts: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("passed", []):
        # Other families have tests of this name too.
        found = re.search(r"test_facility_location\.py::test_follows_the_definition\[(.+)\]", report.nodeid)
        if found is None or report.when != "call":
            continue
        name = next(b for b in [*BACKENDS, *GPU_BACKENDS] if found[1].startswith(f"{b}-"))
        counts[names.get(name, name)] += 1
    if counts:
        told = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        terminalreporter.write_line(f"facility location, cases by backend: {told}")
