"""The JSON files of results/ and the words for a record: shared by the terminal, the report and the comparison."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.checks import counted
from benchmarks.harness import Record

DIRECTORY = Path(__file__).resolve().parent / "results"


def write(directory: Path, family: str, records: list[Record]) -> Path:
    """Writes ``family``.json: rows, hardware, versions, commit and the command that repeats it."""
    content = {
        "family": family,
        "command": f"python -m benchmarks {family}",
        "commit": machine.commit(),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "rows": [asdict(record) for record in records],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{family}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def read(directory: Path) -> dict[str, dict[str, Any]]:
    """Every family's file in ``directory``, rows as Records."""
    found = {}
    names = {entry.name for entry in fields(Record)}
    for path in sorted(directory.glob("*.json")):
        content = json.loads(path.read_text())
        content["rows"] = [
            Record(**{key: value for key, value in row.items() if key in names}) for row in content["rows"]
        ]
        found[content["family"]] = content
    return found


def seconds(value: float) -> str:
    """Three significant digits with a unit."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if value >= s), ("us", 1e-6))
    return f"{value / scale:.3g} {unit}" if value < 1000 else f"{value:,.0f} s"


def megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:,.0f} MB"


def figure(record: Record) -> str:
    """The row's figure in words."""
    if record.figure == "ratio":
        return f"{record.value:.3g}x"
    if record.figure == "overhead":
        return f"{record.value * 1e6:.1f} us more"
    return f"{record.value:.2f} products"


def goal(record: Record) -> str:
    """The goals in words."""
    parts = []
    if record.goal is not None:
        parts.append(
            {
                "ratio": f">= {record.goal:g}x",
                "overhead": f"<= {record.goal * 1e6:g} us more",
                "products": f"<= {record.goal:g} products",
            }[record.figure]
        )
    if record.memory_goal is not None:
        parts.append(f"<= {megabytes(int(record.memory_goal))}")
    return ", ".join(parts)


def verdict(record: Record) -> str:
    return {True: "met", False: "missed", None: ""}[record.met]


def share(record: Record) -> str:
    if record.share is None or record.limit is None:
        return ""
    return (
        f"{100 * record.share:.3g} % of the {'matrix rate' if record.limit == 'matrix' else 'copy bandwidth'}"
    )


def spread(times: dict[str, float]) -> str:
    if times["q20"] == times["q80"]:
        return seconds(times["median"])
    return f"{seconds(times['median'])} ({seconds(times['q20'])} to {seconds(times['q80'])})"


def lines_of(record: Record) -> list[str]:
    """The text that a run prints for a row."""
    lines = [
        f"{record.title}: {figure(record)}"
        + (f" (goal {goal(record)}: {verdict(record)})" if goal(record) else "")
    ]
    lines.append(
        f"    ours {spread(record.ours)}, {megabytes(record.memory)}, {counted(record.rounds, 'round')}"
    )
    if record.peer_times is not None:
        lines.append(f"    {record.peer} {spread(record.peer_times)}, {megabytes(record.peer_memory)}")
    if share(record):
        lines.append(f"    {share(record)}")
    lines.append(f"    {record.agreement}")
    lines.append(f"    repeat with: {record.command}")
    return lines
