"""``python -m benchmarks [FAMILY ...]``: runs families, prints each row and writes benchmarks/results/FAMILY.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import results

HERE = Path(__file__).resolve().parent
FAMILIES = (
    "facility_location",
    "pairwise",
    "simcore",
    "sinkhorn",
    "sketch",
    "scores",
    "sketcher",
    "selection",
    "matching",
    "matching_caratheodory",
    "pursuit",
    "drop_in",
    "autocoreset",
    "goracs",
    "scale",
)
# Rows of "autocoreset", "goracs" and "scale" take minutes each: they run when asked for by name.
DEFAULT = FAMILIES[:12]


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    arguments.add_argument(
        "family", nargs="*", help=f"of {', '.join(FAMILIES)}, or all (default: {', '.join(DEFAULT)})"
    )
    arguments.add_argument(
        "--rows", help="comma-separated names of rows; results are then written only with --results"
    )
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes, only to see that the answers agree"
    )
    arguments.add_argument(
        "--seconds", type=float, default=10.0, help="time budget of each row's rounds (default 10)"
    )
    arguments.add_argument("--no-limits", action="store_true", help="do not measure the machine's limits")
    arguments.add_argument("--results", type=Path, help="directory for the JSON files")
    arguments.add_argument("--benchmark-json", type=Path, help="also write pytest-benchmark's own JSON here")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the families; returns 0 if every answer agreed, 1 if one did not, 2 for a wrong argument."""
    command = parser()
    arguments = command.parse_args(argv)
    families = list(arguments.family) or list(DEFAULT)
    if "all" in families:
        families = list(FAMILIES)
    for family in families:
        if family not in FAMILIES:
            command.error(f"unknown family {family!r}; there are {', '.join(FAMILIES)} and all")
    directory = arguments.results
    if directory is None and not arguments.quick and arguments.rows is None:
        directory = results.DIRECTORY
    options = ["-q", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE)]
    options += [f"--seconds={arguments.seconds}"]
    options += ["--quick"] if arguments.quick else []
    options += ["--no-limits"] if arguments.no_limits else []
    options += [f"--rows={arguments.rows}"] if arguments.rows else []
    options += [f"--results={directory}"] if directory else []
    options += [f"--benchmark-json={arguments.benchmark_json}"] if arguments.benchmark_json else []
    return int(pytest.main([*options, *(str(HERE / f"{family}.py") for family in families)]))


if __name__ == "__main__":
    sys.exit(main())
