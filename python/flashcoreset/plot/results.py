"""A picture of the benchmarks: how many times as fast each row is as its peer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from textwrap import fill
from typing import Any

from flashcoreset.plot.style import BLUE, DARK, RED, axes, grid


def benchmarks(results: Any, *, rows: Any = None, ax: Any = None) -> Any:
    """Draws a results file of the benchmarks: a bar for each row, the peer's time over ours, on a logarithmic axis.

    Rows that lose are left of the line at 1, in another colour. Rows without a peer, or whose figure is no ratio, have no bar.

    Args:
        results: the path of a JSON file of `benchmarks/results` or of the folder, what such a file holds, or a list of these.
        rows: names of rows to draw, in this order; None draws all.
        ax: a matplotlib Axes to draw on; None makes a new figure, as high as there are bars.

    Returns:
        The Axes.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for files without such rows, and names that are not among them.
        OSError: if a file cannot be read.
        ImportError: without matplotlib.

    Example:
        >>> import matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> row = {"name": "sums", "title": "sums of 3 numbers", "peer": "the abacus", "figure": "ratio", "value": 12.0}
        >>> fc.plot.benchmarks({"family": "sums", "rows": [row]}).get_xlabel()
        'times as fast as the peer'
    """
    found = {
        row["name"]: row
        for content in _contents(results)
        for row in content["rows"]
        if row.get("figure") == "ratio"
    }
    names = list(found) if rows is None else list(rows)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"rows must be among {', '.join(found) or 'none'}, got {', '.join(map(str, unknown))}"
        )
    if not names:
        raise ValueError("results must have rows that are compared with a peer, got none")
    new = ax is None
    ax = axes(ax, "benchmarks")
    if new:
        ax.figure.set_size_inches(9, 0.36 * len(names) + 0.9)
    values = [found[name]["value"] for name in names]
    colours = [BLUE if value >= 1 else RED for value in values]
    places = list(range(len(names)))
    # A bar begins at 1, where both take as long.
    ax.barh(places, [value - 1 for value in values], left=1, color=colours, height=0.7)
    for place, value in zip(places, values, strict=True):
        outside = {"ha": "left", "xytext": (3, 0)} if value >= 1 else {"ha": "right", "xytext": (-3, 0)}
        ax.annotate(
            f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x",
            (value, place),
            textcoords="offset points",
            va="center",
            fontsize=8,
            **outside,
        )
    ax.axvline(1, color=DARK, linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xlim(min([1.0, *values]) / 4, max([1.0, *values]) * 4)
    ax.set_ylim(-0.7, len(names) - 0.3)
    labels = [fill(f"{found[name]['title']}; {found[name]['peer']}", 70) for name in names]
    ax.set_yticks(places, labels, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("times as fast as the peer")
    grid(ax, "x")
    return ax


def _contents(results: Any) -> list[dict[str, Any]]:
    """What the results files hold."""
    if isinstance(results, (list, tuple)):
        return [content for entry in results for content in _contents(entry)]
    if isinstance(results, (str, os.PathLike)):
        path = Path(results)
        paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"results must be a file or a folder of files .json, got {path} without any")
        return _contents([json.loads(path.read_text()) for path in paths])
    if not isinstance(results, dict):
        raise TypeError(f"results must be a path or what a results file holds, got {type(results).__name__}")
    if not isinstance(results.get("rows"), list):
        raise ValueError(f"results must have rows, got {', '.join(map(str, results)) or 'nothing'}")
    return [results]
