"""Writes tests/golden/FAMILY.json anew, the results of the calls of tests/test_invariance.py:

    python tests/make_golden.py FAMILY ...      or --all

A test compares them with what the library returns. Write them only for a change of results that is meant, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import json

import torch
from test_invariance import CALLS, GOLDEN, golden_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", choices=[*CALLS, []], metavar="FAMILY", help=", ".join(CALLS))
    parser.add_argument("--all", action="store_true", help="all families")
    arguments = parser.parse_args()
    families = list(CALLS) if arguments.all else arguments.families
    if not families:
        parser.error("name the families, or --all")
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for family in families:
        path = GOLDEN / f"{family}.json"
        entries = [f"{json.dumps(name)}: {lines(found)}" for name, found in golden_results(family).items()]
        path.write_text("{\n" + ",\n".join(entries) + "\n}\n")
        print(path)


def lines(found: list[dict[str, object]]) -> str:
    return "[\n" + ",\n".join(f"  {json.dumps(result)}" for result in found) + "\n]"


if __name__ == "__main__":
    main()
