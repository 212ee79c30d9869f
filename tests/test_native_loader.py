"""Which compiled module is taken, and the error if none can be."""

from __future__ import annotations

import warnings

import pytest
import torch
from processes import run

import flashcoreset as fc
from flashcoreset._core import errors, native

ISA = "from flashcoreset._core import native; print(native.module().ISA)"


def test_the_best_build_is_taken() -> None:
    result = run(ISA, FLASHCORESET_ISA="")
    assert result.stdout.strip().replace("_", "-") == native.available_isas()[0].replace("_", "-")


@pytest.mark.parametrize("isa", native.available_isas())
def test_the_environment_forces_a_build(isa: str) -> None:
    assert run(ISA, FLASHCORESET_ISA=isa).stdout.strip().replace("_", "-") == isa.replace("_", "-")


def test_an_unknown_build_lists_the_names() -> None:
    call = "import torch, flashcoreset as fc; fc.facility_location(torch.ones(2, 2), 1)"
    result = run(call, FLASHCORESET_ISA="avx9000")
    assert result.returncode == 1
    assert "ValueError" in result.stderr
    assert all(name in result.stderr for name in ("FLASHCORESET_ISA", "avx9000", *native.MODULES))


def test_a_build_for_another_processor_says_so() -> None:
    foreign = "x86-64-v2" if "aarch64" in native.available_isas() else "aarch64"
    with pytest.raises(
        fc.BackendUnavailableError, match=f"{foreign} cannot be used here.*processor.*available: "
    ):
        native.load_isa(foreign)
    result = run(ISA, FLASHCORESET_ISA=foreign)
    assert result.returncode == 1
    assert f"BackendUnavailableError: FLASHCORESET_ISA={foreign}" in result.stderr


def test_import_loads_no_kernels() -> None:
    result = run("import flashcoreset, sys; print([m for m in sys.modules if '._cpu_' in m])")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.fixture
def without_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package had been installed without its compiled modules."""
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_failure", None)
    monkeypatch.setattr(native, "_import", lambda name: "ImportError: no compiled module here")
    monkeypatch.setattr(errors, "_reported", set())
    monkeypatch.delenv("FLASHCORESET_ISA", raising=False)
    native.unavailable_reason.cache_clear()
    yield
    native.unavailable_reason.cache_clear()


@pytest.mark.usefixtures("without_modules")
def test_without_modules_the_reference_runs_and_warns_once() -> None:
    x = torch.eye(3)
    with pytest.warns(fc.SlowPathWarning, match=r"no compiled module here.*reinstall.*backend='torch'"):
        selection = fc.facility_location(x, 2)
    assert selection.indices.tolist() == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fc.facility_location(x, 2)
        fc.facility_location(x, 2, backend="torch")


@pytest.mark.usefixtures("without_modules")
def test_without_modules_the_cpu_backend_is_an_error_with_the_reason() -> None:
    for _ in range(2):  # the reason is kept
        with pytest.raises(fc.BackendUnavailableError, match=r"no compiled module here.*reinstall"):
            fc.facility_location(torch.eye(3), 2, backend="cpu")
