"""The notebooks of examples/ run from top to bottom, and what they claim (their assertions) holds."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "attribution",
        "choose_text",
        "half_batches",
        "prune_noisy_labels",
        "transport_in_batches",
        "validation_set",
    }
    listed = (NOTEBOOKS[0].parent / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"({path.name})" not in listed] == []


@pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")  # in the sources of POT
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    matplotlib.use("Agg")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small wait longer for other threads than they take
    names: dict[str, object] = {}
    try:
        for cell in cells(path, "code"):
            exec(compile(cell, path.name, "exec"), names)
    finally:
        torch.set_num_threads(threads)
        plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_its_outputs(path: Path) -> None:
    """As `make notebooks` left them: the site shows them."""
    content = json.loads(path.read_text())["cells"]
    assert cells(path, "markdown")[0].startswith("# ")
    outputs = [output for cell in content if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert outputs
    assert not [
        output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"
    ]
