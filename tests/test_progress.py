"""Progress shows how fast it goes and how long it will take."""

from __future__ import annotations

import builtins
import sys
import time
from types import ModuleType
from typing import Any

import pytest
import torch

import flashcoreset as fc
from flashcoreset._core import imports
from flashcoreset._core.progress import Progress, progress_text


def test_the_line_s_text() -> None:
    assert progress_text(50, 200, 10.0) == "50/200 [00:10<00:30, 5.00/s]"
    assert progress_text(1, 3, 7200.0) == "1/3 [2:00:00<4:00:00, 7200.00 s each]"
    assert progress_text(0, 9, 1.0) == "0/9 [00:01<?, 0.00/s]"
    assert progress_text(0, 9, 0.0) == "0/9 [00:00<?, 0.00/s]"
    assert progress_text(9, 9, 4.5) == "9/9 [00:04<00:00, 2.00/s]"
    assert progress_text(8, 0, 2.0) == "8 [00:02, 4.00/s]"


def run(total: int = 40) -> None:
    with Progress(True, total, "work") as bar:
        for done in range(1, 41):
            bar.update(done)
            time.sleep(0.005)


@pytest.mark.parametrize("total", [40, 0], ids=["known", "unknown"])
def test_a_bar_has_rate_and_time(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    run(total)
    shown = capsys.readouterr().err
    assert "it/s" in shown
    assert "work" in shown
    assert ("<" in shown) == bool(total)


def test_what_turns_out_not_to_be_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, 100, "work") as bar:
        bar.update(30)
        bar.skip(50)
        bar.update(60)
        bar.skip(100)
    shown = capsys.readouterr().err
    assert "40/40" in shown
    assert "100/100" not in shown
    told: list[tuple[int, int]] = []
    with Progress(lambda *now: told.append(now), 100, "work") as bar:
        bar.update(30)
        bar.skip(50)
        bar.update(60)
        bar.skip(100)
    assert told == [(30, 100), (50, 100), (60, 100), (100, 100)]


def test_without_tqdm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(imports, "_imported", {})
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    run()
    lines = capsys.readouterr().err.rstrip("\n").split("\r")
    assert lines[-1].startswith("work: 40/40 [00:00<00:00, ")
    assert 2 <= len(lines) <= 20  # not at every step


def test_a_notebook_gets_its_own_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = imports.imported

    def note(name: str, *rest: Any) -> Any:
        seen.append(name)
        return original("tqdm", *rest)

    monkeypatch.setattr("flashcoreset._core.progress.imported", note)
    run(40)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    run(40)
    assert seen == ["tqdm", "tqdm.auto"]


def test_results_do_not_depend_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fc.facility_location(x, 5, progress=True).indices, fc.facility_location(x, 5).indices)
    assert "facility location" in capsys.readouterr().err
