"""The Python examples of the README and of docs/ run, and the files that they link to exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
EXAMPLES = {
    page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL) for page in PAGES
}


@pytest.mark.parametrize("page", [page for page in PAGES if EXAMPLES[page]], ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    names: dict[str, object] = {}
    for example in EXAMPLES[page]:  # later ones go on with the names of earlier ones
        exec(compile(example, str(page), "exec"), names)


def test_pages_with_examples() -> None:
    assert {page.name for page in PAGES if EXAMPLES[page]} >= {
        "README.md",
        "facility_location.md",
        "simcore.md",
        "sinkhorn.md",
        "goracs.md",
        "sketching.md",
        "scores.md",
        "ccs.md",
        "caratheodory.md",
        "autocoreset.md",
        "gradient_sketching.md",
        "matching.md",
        "colm.md",
        "colm_training.md",
        "controls.md",
        "sklearn.md",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
