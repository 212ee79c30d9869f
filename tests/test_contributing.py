"""CONTRIBUTING.md lists the files that are in the folders."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}


def listed() -> list[str]:
    """The files that the block of the grid names, folder by folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"^csrc/core/.*?(?=^tests/)", text, re.MULTILINE | re.DOTALL)
    assert block
    files, folder = [], ""
    for line in block[0].splitlines():
        names = re.split(r" {2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder, names = names[0], []
        files += [folder + name for name in names if Path(name).suffix in SUFFIXES]
    return files


def test_every_file_stands_in_the_tree() -> None:
    found = [
        str(path.relative_to(ROOT))
        for folder in ("csrc", "triton_kernels", "python/flashcoreset", "python/flashcoreset_cli")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES and "flashcoreset/triton_kernels" not in str(path)
    ]
    assert sorted(listed()) == sorted(found)


def test_the_oracle_is_imported_by_nobody_else() -> None:
    """By backend="torch" alone, through the dispatcher and flashcoreset.kernels.torch; references may use each other."""
    importing = re.compile(r"^\s*(from|import) \S*(\.reference\b| import .*\breference\b)", re.MULTILINE)
    for folder in ("triton_kernels", "python/flashcoreset"):
        for path in (ROOT / folder).rglob("*.py"):
            # A protocol names the modules that satisfy it, for the type checker alone.
            if path.name not in ("reference.py", "backend.py") and path.parent.name != "kernels":
                assert not importing.search(path.read_text()), path


def test_no_test_module_imports_another() -> None:
    """What several of them need lies in tests/checks, cases.py and conftest.py."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("test_"), path
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("test_") for alias in node.names), path
