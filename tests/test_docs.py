"""The Python examples of the README and of docs/ run, the files that they link to exist, and the site builds without network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot as plt

matplotlib.use("Agg")

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


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")  # in the sources of POT
@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")  # when OTT imports it
@pytest.mark.parametrize("page", [page for page in PAGES if EXAMPLES[page]], ids=lambda page: page.name)
def test_examples_run(page: Path) -> None:
    names: dict[str, object] = {}
    for example in EXAMPLES[page]:  # later ones go on with the names of earlier ones
        exec(compile(example, str(page), "exec"), names)


def test_the_readme_shows_what_its_example_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    example, output = re.findall(
        r"^```python\n(.*?)^```\n+```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )[0]
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == output


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    begin, end = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
    rows = text.split(begin)[1].split(end)[0].strip().splitlines()[2:]
    assert 0 < len(rows) <= 8
    ratios = [float(row.rsplit("**", 2)[1].rstrip("x").replace(",", "")) for row in rows]
    assert min(ratios) < 1 < max(ratios)


def test_the_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """After new results: `python -m benchmarks.report`."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import report, results

    families = results.read(ROOT / "benchmarks" / "results")
    for path, table in (("README.md", report.headlines), ("docs/benchmarks.md", report.render)):
        text = (ROOT / path).read_text()
        assert report.insert(text, table(families)) == text, path


def test_the_site_builds_without_network(tmp_path: Path) -> None:
    """As `make docs` does: warnings are errors, links between pages are checked, and no page fetches anything."""
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.html")}
    sources = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {
        f"{name}.html" for name in sources | {"changes", "writing_a_kernel", "api/index", "notebooks/index"}
    } <= pages.keys()
    for name, page in pages.items():
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\" >]+)", page)
        fetched += re.findall(
            r"<link[^>]+rel=\"?(?:stylesheet|preconnect)[^>]+href=\"?(https?:[^\" >]+)", page
        )
        assert fetched == [], name
    assert "&lt;P, C&gt;" in pages["sinkhorn.html"]  # not taken for HTML
    assert "&lt;P, C&gt;" in pages["api/sinkhorn.html"]
    listed = pages["api/index.html"]
    import flashcoreset as fc

    for name in fc.__all__:
        # A module is listed by its full name, or by its parts'.
        found = re.search(rf"[>.]{name}(</code>|\.)", listed)
        assert name in ("__version__", "kernels") or found, name
    index = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert any("sinkhorn" in entry["text"].lower() for entry in index["docs"])


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
