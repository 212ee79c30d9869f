"""``python -m benchmarks.evidence``: runs the methods' scripts, keeps their figures, and writes the page of all figures there are."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks import machine, results
from benchmarks.evidence import record

METHODS = ("goracs", "colm", "ccs", "simcore", "autocoreset", "facility_location")
FIGURES = results.DIRECTORY / "evidence"
DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
INTRODUCTION = """# Evidence

What each method's paper claims, and this library says of it, beside a control that could refute it. `make evidence` measures all of it anew (extra `evidence` for
embedded text); a claim holds here if it is better than its control on at least four of five seeds, and by more than the standard error in the mean. Data sets are
small and offline, so what holds here may not elsewhere; the scripts in `benchmarks/evidence` are short enough to be turned to other data.
"""


def page(directory: Path, docs: Path) -> str:
    """The page of the figures in `directory`; its pictures are drawn into `docs`."""
    sections, failed, missing, machines = [], [], [], set()
    for name in METHODS:
        path = directory / f"{name}.json"
        if not path.exists():
            missing.append(f"`{name}`")
            continue
        evidence, about = record.read(path)
        record.draw(docs / f"evidence_{name}.png", evidence.measures)
        sections.append(record.section(evidence, name, about))
        failed += [
            f"- {evidence.method}: {claim.text} (against: {claim.control})"
            for claim in evidence.claims
            if not evidence.holds(claim)
        ]
        machines.add(str(about["hardware"]))
    lines = [INTRODUCTION, "## What did not hold", "", *(failed or ["Every claim held."]), ""]
    if missing:
        lines += [
            f"Not measured for this page: {', '.join(missing)}. `make evidence METHOD=...` adds them.",
            "",
        ]
    return "\n".join([*lines, *sections, f"Measured on {'; '.join(sorted(machines))}.", ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: %(default)s")
    parser.add_argument(
        "--page-only", action="store_true", help="write the page of the figures that were kept"
    )
    arguments = parser.parse_args(argv)
    unknown = sorted({*arguments.methods} - {*METHODS})
    if unknown or arguments.seeds < 1:
        parser.error(f"unknown method {unknown[0]}" if unknown else "--seeds must be >= 1")
    for name in () if arguments.page_only else arguments.methods or METHODS:
        start = time.perf_counter()
        evidence = importlib.import_module(f"benchmarks.evidence.{name}").run(range(arguments.seeds))
        about = {
            "seconds": time.perf_counter() - start,
            "commit": machine.commit(),
            "hardware": machine.hardware()["cpu"],
            "versions": machine.versions(),
        }
        record.write(FIGURES, name, evidence, about)
        print(record.section(evidence, name, about), flush=True)
    (DOCS / "evidence.md").write_text(page(FIGURES, DOCS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
