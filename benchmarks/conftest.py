"""Options of a benchmark run, the fixture its rows are measured with, and the results they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.harness import Options, Record, Row, run

RECORDS: pytest.StashKey[dict[str, list[Record]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flashcoreset benchmarks")
    group.addoption(
        "--quick", action="store_true", help="small sizes: do the answers agree? The times mean nothing"
    )
    group.addoption(
        "--seconds", type=float, default=10.0, help="time budget of each row's rounds (default 10)"
    )
    group.addoption("--no-limits", action="store_true", help="do not measure the machine's limits")
    group.addoption("--results", type=Path, default=None, help="directory to write a JSON file a family to")
    group.addoption("--rows", default=None, help="comma-separated names of the rows to run (default: all)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--rows")
    if wanted is None:
        return
    names = set(wanted.split(","))
    chosen = [item for item in items if getattr(item, "callspec", None) and item.callspec.id in names]
    missing = names - {item.callspec.id for item in chosen}
    if missing:
        known = ", ".join(item.callspec.id for item in items if getattr(item, "callspec", None))
        raise pytest.UsageError(f"--rows: no row named {', '.join(sorted(missing))}; there are {known}")
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Row], None]:
    """Measures one row of the family that the requesting file is named after."""
    config = request.config
    options = Options(
        quick=config.getoption("--quick"),
        seconds=config.getoption("--seconds"),
        limits=not config.getoption("--no-limits"),
    )
    family = Path(request.node.path).stem
    records = config.stash[RECORDS].setdefault(family, [])
    return lambda row: run(row, family, benchmark, options, records)


def pytest_sessionfinish(session: pytest.Session) -> None:
    directory = session.config.getoption("--results")
    if directory is not None:
        for family, records in session.config.stash[RECORDS].items():
            if records:
                results.write(directory, family, records)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for family, records in config.stash[RECORDS].items():
        if not records:
            continue
        terminalreporter.section(f"{family}: ours and the peer's")
        for record in records:
            for line in results.lines_of(record):
                terminalreporter.write_line(line)
