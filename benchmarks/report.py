"""``python -m benchmarks.report``: writes the tables of results/*.json between the markers of docs/benchmarks.md, and a few rows
between those of README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from benchmarks.harness import Record

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
TITLES = {
    "facility_location": "Facility location",
    "pairwise": "Pairwise distances and similarities",
    "simcore": "SimCore's order",
    "sinkhorn": "Sinkhorn",
    "sketch": "Sketching",
    "scores": "Sample scores and CCS",
    "sketcher": "Per-sample gradients",
    "selection": "CoLM's selection in a training step",
    "matching": "Gradient matching",
    "matching_caratheodory": "Carathéodory reduction",
    "pursuit": "Matching pursuit and Frank-Wolfe",
    "drop_in": "Drop-in: the peer's own calls with our modules",
    "autocoreset": "AutoCoreset",
    "goracs": "GORACS",
    "scale": "Scale: time as a multiple of one whole product at the measured matrix rate",
}
# The rows of the README, at most eight, and one of them loses: (family, row, what it is about).
HEADLINES = (
    ("facility_location", "points-cosine", "Facility location"),
    ("facility_location", "matrix-apricot", "Facility location"),
    ("simcore", "order-from-features", "SimCore"),
    ("sinkhorn", "many-128-batch", "Sinkhorn"),
    ("sinkhorn", "one-1000-plain-float32", "Sinkhorn"),
    ("sketch", "rademacher-trak", "Projection"),
    ("scores", "scores-50000x1000", "Sample scores"),
    ("sketch", "gaussian-stored", "Projection"),
)


def _cells(record: Record) -> list[str]:
    outcome = results.goal(record)
    return [
        record.title,
        results.seconds(record.ours["median"]),
        f"{results.seconds(record.peer_times['median'])}, {record.peer}" if record.peer_times else "",
        f"**{results.figure(record)}**",
        f"{outcome}: {results.verdict(record)}" if outcome else "",
        results.megabytes(record.memory)
        + (f" / {results.megabytes(record.peer_memory)}" if record.peer_times else ""),
        results.share(record),
        record.agreement,
    ]


def _table(records: list[Record]) -> list[str]:
    header = [
        "",
        "ours",
        "peer",
        "",
        "goal",
        "peak memory over the input, ours / peer",
        "share of the limit",
        "agreement",
    ]
    return _lines([header, ["---"] * len(header), *(_cells(record) for record in records)])


def _lines(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _provenance(content: dict[str, Any]) -> str:
    hardware, versions = content["hardware"], content["versions"]
    limits = [record.limits for record in content["rows"] if record.limits]
    measured = ""
    if limits:
        matrix = sorted(entry["matrix"] for entry in limits)[len(limits) // 2] / 1e9
        copy = sorted(entry["copy"] for entry in limits)[len(limits) // 2] / 1e9
        measured = f", measured at {matrix:.0f} GFLOP/s in float32 products and {copy:.1f} GB/s copying"
    packages = ", ".join(
        f"{name} {version}" for name, version in versions.items() if version != "not installed"
    )
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads, build {hardware['isa']}{measured}. "
        f"{packages}. Commit {content['commit']}, {content['rows'][0].date}. Repeat with `{content['command']}`."
    )


def render(families: dict[str, dict[str, Any]]) -> str:
    """The Markdown of all families, in the order of ``TITLES``."""
    parts = []
    for family, title in TITLES.items():
        content = families.get(family)
        if content and content["rows"]:
            parts += [f"### {title}", "", *_table(content["rows"]), "", _provenance(content), ""]
    if not parts:
        raise ValueError("no results to report; run `make bench` first")
    parts.append(
        "Times are medians of alternating rounds in one process; calls of milliseconds are repeated within a round, on both sides. Memory is the peak of resident memory during the call over what "
        "was resident before it, input included. The share of a limit counts the least work: one product of all pairs at the "
        "matrix rate, or one reading of the matrix at the copy bandwidth."
    )
    return "\n".join(parts)


def headlines(families: dict[str, dict[str, Any]]) -> str:
    """The README's table: those of ``HEADLINES`` that were measured."""
    rows = [["", "peer", "flashcoreset", ""], ["---"] * 4]
    for family, name, about in HEADLINES:
        for record in families.get(family, {"rows": []})["rows"]:
            if record.name == name and record.peer_times:
                title = f"{about}: {record.title}"
                peer = f"{results.seconds(record.peer_times['median'])}, {record.peer}"
                rows.append(
                    [title, peer, results.seconds(record.ours["median"]), f"**{results.figure(record)}**"]
                )
    return "\n".join(_lines(rows))


def insert(document: str, table: str) -> str:
    """``document`` with the text between the markers replaced."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"expected one {BEGIN} and, after it, one {END}")
    head, rest = document.split(BEGIN)
    return head + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1]


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    arguments.add_argument(
        "--results", type=Path, default=results.DIRECTORY, help="directory of the JSON files"
    )
    arguments.add_argument(
        "--document", type=Path, default=machine.ROOT / "docs/benchmarks.md", help="file that has the markers"
    )
    arguments.add_argument(
        "--readme",
        type=Path,
        default=machine.ROOT / "README.md",
        help="file for the few rows, with the markers",
    )
    options = arguments.parse_args(argv)
    try:
        families = results.read(options.results)
        texts = {}
        for path, table in ((options.document, render), (options.readme, headlines)):
            try:
                texts[path] = insert(path.read_text(), table(families))
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    for path, text in texts.items():
        path.write_text(text)
    print("wrote the tables into " + " and ".join(map(str, texts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
