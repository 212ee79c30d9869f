"""``python docs/draw.py``: draws the pictures of plots.md from its examples, and those of benchmarks.md from the results."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

import flashcoreset as fc

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"


def save(ax: plt.Axes, name: str) -> None:
    ax.figure.savefig(DOCS / "pictures" / name, dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(ax.figure)


def main() -> None:
    text = (DOCS / "plots.md").read_text()
    names: dict[str, object] = {}
    for example, picture in re.findall(
        r"^```python\n(.*?)^```(?:\n+!\[[^]]*\]\(pictures/(.*?)\))?", text, re.M | re.S
    ):
        exec(compile(example, "plots.md", "exec"), names)
        if picture:
            save(names["ax"], picture)  # type: ignore[arg-type]
    sys.path.insert(0, str(DOCS.parent))
    from benchmarks.report import HEADLINES

    save(fc.plot.benchmarks(RESULTS, rows=[name for _, name, _ in HEADLINES]), "ratios.png")


if __name__ == "__main__":
    main()
