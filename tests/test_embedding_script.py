"""The script of docs/embedding.md runs, with a stand-in for the model that it would download."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import flashcoreset as fc

PAGE = Path(__file__).resolve().parent.parent / "docs" / "embedding.md"
TEXTS = [f"text {i}" for i in range(40)]


def encode(texts: list[str], **options: object) -> np.ndarray:
    assert options == {"batch_size": 64, "show_progress_bar": True}
    return np.random.default_rng(len(texts)).standard_normal((len(texts), 8)).astype(np.float32)


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    package = SimpleNamespace(SentenceTransformer=lambda name: SimpleNamespace(encode=encode))
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    exec(compile(script, str(PAGE), "exec"), {})
    found = [json.loads(line) for line in Path("chosen.jsonl").read_text().splitlines()]
    expected = fc.facility_location(encode(TEXTS, batch_size=64, show_progress_bar=True), 4)
    assert [row["text"] for row in found] == expected.take(TEXTS)
    assert sum(row["weight"] for row in found) == 40
