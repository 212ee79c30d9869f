"""What every test module shares: the backends that are tested, the compiled one in each build that this
processor can run."""

from __future__ import annotations

import os

# Triton decides when it is imported whether kernels are compiled or interpreted. Here they are interpreted, on the CPU,
# unless the variable says otherwise; torch imports triton too, so this goes first.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from flashcoreset import _native

BACKENDS = ["torch", *(f"cpu-{isa}" for isa in _native.available_isas())]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend; for "cpu" the build in use is the one that the test's id names."""
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setattr(_native, "_loaded", _native.load_isa(isa))
    return name
