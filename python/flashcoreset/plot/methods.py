"""Pictures of what the methods did: GORACS' descent, CCS' strata, SimCore's rounds, AutoCoreset's fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_number, as_vector
from flashcoreset.methods.ccs.strata import lowest
from flashcoreset.plot.style import (
    BLUE,
    CYCLE,
    DARK,
    GREY,
    LIGHT,
    MARKERS,
    ORANGE,
    axes,
    coreset_with,
    grid,
    whole_numbers,
)


def descent(coreset: Coreset, ax: Any = None) -> Any:
    """Draws the score of a `goracs` coreset against the number of exchanges; with labels one curve per class.

    The axis of scores begins at 0.

    Args:
        coreset: what `goracs` returned.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: if `coreset` is no Coreset, or `ax` no Axes.
        ValueError: if its `info` holds no scores of exchanges.
        ImportError: without matplotlib.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> train = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
        >>> coreset = fc.goracs(train, torch.tensor([[0.5], [1.5], [9.5], [10.5]]), torch.ones(5), 2)
        >>> fc.plot.descent(coreset).get_xlabel()
        'exchanges'
    """
    origin = "goracs returned, whose info has scores and exchanges"
    coreset = coreset_with(coreset, set(), origin)
    classes = coreset.info.get("classes", {None: coreset.info})
    if not all({"scores", "exchanges"} <= info.keys() for info in classes.values()):
        coreset_with(coreset, {"scores", "exchanges"}, origin)
    ax = axes(ax, "descent")
    for place, (label, info) in enumerate(classes.items()):
        ax.plot(
            info["exchanges"],
            info["scores"],
            drawstyle="steps-post",
            color=CYCLE[place % len(CYCLE)],
            marker=MARKERS[place % len(MARKERS)],
            markersize=4,
            label=None if label is None else f"class {label}",
        )
    ax.set(xlabel="exchanges", ylabel="transport cost")
    highest = max(max(info["scores"]) for info in classes.values())
    ax.set_ylim(0, 1.06 * highest if highest > 0 else 1)
    whole_numbers(ax.xaxis)
    grid(ax)
    if "classes" in coreset.info:
        ax.legend(frameon=False)
    return ax


def strata(
    coreset: Coreset,
    ax: Any = None,
    *,
    scores: Any = None,
    mislabel_scores: Any = None,
    groups: Any = None,
) -> Any:
    """Draws the histogram of the scores behind a `ccs` coreset, one bar per stratum: what was taken, left out, and dropped first.

    Dropped samples have bars where their scores are if `scores` are given; without, one bar beside the strata. Infinite scores have bars of
    their own at the ends if `scores` are given; without, they are in the first or the last stratum, in which `ccs` counts them. With groups
    each group is a row with its own strata, all on one axis of scores. Strata of unequal width (quantiles) are drawn equally wide, their bounds written below.

    Args:
        coreset: what `ccs` returned.
        ax: a matplotlib Axes to draw on; None makes a new figure.
        scores: the scores [n] that `ccs` got, or the dict of them.
        mislabel_scores: the mislabel scores [n] that `ccs` got, if it got some beside the scores.
        groups: the labels [n] that `ccs` got; needed with `scores` where it got some.

    Returns:
        The Axes.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: if its `info` holds no strata, or `scores` and labels are not those of the coreset.
        ImportError: without matplotlib.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> coreset = fc.ccs(torch.randn(500, generator=torch.Generator().manual_seed(0)), 100, n_strata=20)
        >>> fc.plot.strata(coreset).get_ylabel()
        'samples'
    """
    origin = "ccs returned, whose info has strata"
    coreset = coreset_with(coreset, {"dropped", "mislabel_ratio"}, origin)
    grouped = "groups" in coreset.info
    parts = coreset.info["groups"] if grouped else {None: coreset.info}
    if not all({"edges", "sizes", "counts"} <= info.keys() for info in parts.values()):
        coreset_with(coreset, {"edges", "sizes", "counts"}, origin)
    given = {} if scores is None else _of_groups(coreset, parts, scores, mislabel_scores, groups)
    if scores is None and (mislabel_scores is not None or groups is not None):
        name = "groups" if mislabel_scores is None else "mislabel_scores"
        raise ValueError(f"scores must be given with {name}, got None")
    ax = axes(ax, "strata")
    bars = {label: _bars(info, given.get(label)) for label, info in parts.items()}
    if grouped and scores is None and coreset.info["dropped"]:
        raise ValueError(
            "scores and groups must be given where samples of groups were dropped, or the picture would leave these out; got None"
        )
    highest = max(max(b["sizes"].max(), b["dropped"].max(initial=0), 1) for b in bars.values())
    scale = 0.85 / highest if grouped else 1.0
    if grouped:
        ax.set_yticks(range(len(bars)), [str(label) for label in bars])
    for row, (label, found) in enumerate(bars.items()):
        base = row if grouped else 0
        taken, dropped = int(sum(parts[label]["counts"])), int(found["dropped"].sum())
        layers = [("left out", "sizes", LIGHT, None), ("taken", "counts", BLUE, None)]
        for name, key, colour, hatch in layers:
            ax.bar(
                found["left"], found[key] * scale, width=found["width"], bottom=base, align="edge",
                color=colour, hatch=hatch, label=name if row == 0 else None,
            )  # fmt: skip
        if dropped:
            ax.bar(
                found["dropped_left"], found["dropped"] * scale, width=found["dropped_width"],
                bottom=base + found["dropped_base"] * scale, align="edge", color=ORANGE,
                label="dropped first" if not any(bars[x]["dropped"].sum() for x in list(bars)[:row]) else None,
            )  # fmt: skip
        if grouped:
            words = f"{taken:,} of {int(found['sizes'].sum()) + dropped:,}" + (
                f", {dropped:,} dropped" if dropped else ""
            )
            ax.annotate(
                words, (1.0, row + 0.75), xycoords=("axes fraction", "data"), xytext=(-4, 0), textcoords="offset points", ha="right",
                fontsize=8, color=DARK,
            )  # fmt: skip
            ax.axhline(row, color=LIGHT, linewidth=0.6, zorder=0)
    ax.set(xlabel="score", ylabel="group" if grouped else "samples")
    if not grouped:
        whole_numbers(ax.yaxis)
    first = next(iter(bars.values()))
    if first["ticks"]:
        ax.set_xticks(*first["ticks"])
        ax.set_xlabel("score, by stratum")
    elif first["log"]:
        ax.set_xscale("log")
    ends = [(x, name) for found in bars.values() for x, name in found["ends"]]
    for x, name in dict(ends).items():
        ax.annotate(
            name, (x, 0), xycoords=("data", "axes fraction"), xytext=(0, -24), textcoords="offset points", ha="center",
            fontsize=8, color=DARK,
        )  # fmt: skip
    if grouped:
        ax.set_ylim(-0.05, len(bars))
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    else:
        ax.legend(frameon=False)
    return ax


def _of_groups(
    coreset: Coreset, parts: dict[Any, Any], scores: Any, mislabel_scores: Any, groups: Any
) -> dict[Any, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each group the scores of its samples, which of these were dropped, and which were taken."""
    if isinstance(scores, dict):
        if "aum" not in scores:
            raise ValueError(f"scores must have the entry aum, got {', '.join(map(str, scores)) or 'none'}")
        mislabel_scores = scores["aum"] if mislabel_scores is None else mislabel_scores
        scores = scores["aum"]
    values = _numbers(scores, "scores")
    suspects = values if mislabel_scores is None else _numbers(mislabel_scores, "mislabel_scores")
    if len(suspects) != len(values):
        raise ValueError(f"mislabel_scores must have the length {len(values)} of scores, got {len(suspects)}")
    grouped = "groups" in coreset.info
    if grouped and groups is None:
        raise ValueError("groups must be given with scores where ccs got groups, got None")
    if not grouped and groups is not None:
        raise ValueError("groups must be None where ccs got none")
    labels = (
        np.asarray(groups.cpu() if isinstance(groups, torch.Tensor) else groups)
        if grouped
        else np.zeros(len(values))
    )
    if labels.shape != values.shape:
        raise ValueError(f"groups must have shape {values.shape} as scores have, got {labels.shape}")
    chosen = np.zeros(len(values), dtype=bool)
    indices = coreset.indices.cpu().numpy()
    if indices.max() >= len(values):
        raise ValueError(
            f"scores must be those that ccs got, got {len(values)} and a coreset with index {indices.max()}"
        )
    chosen[indices] = True
    found = {}
    for label, info in parts.items():
        members = np.flatnonzero(labels == label) if grouped else np.arange(len(values))
        kept = int(sum(info["sizes"]))
        count = len(members) - kept
        out = lowest(suspects[members], count) if count > 0 else np.zeros(len(members), dtype=bool)
        if count < 0 or (out & chosen[members]).any() or chosen[members].sum() != sum(info["counts"]):
            raise ValueError(
                "scores (and mislabel_scores and groups) must be those that ccs got: the samples that it dropped and took are others"
            )
        found[label] = values[members], out, chosen[members]
    dropped = sum(int(out.sum()) for _, out, _ in found.values())
    if dropped != coreset.info["dropped"]:
        raise ValueError(
            f"scores (and groups) must be those that ccs got, which dropped {coreset.info['dropped']} samples, got {dropped} more than "
            "its strata have"
        )
    return found


def _numbers(value: Any, name: str) -> np.ndarray:
    vector = as_vector(value, name, torch.device("cpu"), integers=False).double().numpy()
    if np.isnan(vector).any():
        raise ValueError(f"{name} must not be NaN, got NaN at position {int(np.isnan(vector).argmax())}")
    return vector


def _bars(info: dict[str, Any], given: tuple[np.ndarray, np.ndarray, np.ndarray] | None) -> dict[str, Any]:
    """Where the bars of a group are and how high: strata, dropped samples, and infinite scores at the ends."""
    edges = np.array(info["edges"], dtype=float)
    sizes, counts = (np.array(info[key], dtype=float) for key in ("sizes", "counts"))
    number = len(sizes)
    kind = _kind(edges)
    ticks = None
    if kind == "unequal":  # drawn by rank, with the bounds below
        every = max(1, number // 5)
        places = np.arange(0, number + 1, every)
        ticks = (places.tolist(), [f"{edges[place]:.3g}" for place in places])
        bounds = np.arange(number + 1, dtype=float)
    else:
        bounds = edges.copy()
        if bounds[0] == bounds[-1]:  # all scores are equal, and all samples are in the last stratum
            bounds = np.array([bounds[0] - 0.5, bounds[0] + 0.5])
            sizes, counts = np.array([sizes.sum()]), np.array([counts.sum()])
    log = kind == "log"
    left, width = bounds[:-1], np.diff(bounds)
    result: dict[str, Any] = {"ticks": ticks, "log": log, "ends": []}

    def outside(side: int, steps: float) -> tuple[float, float]:
        """The left edge and the width of a bar outside the strata, below (-1) or above (1), so many bars away."""
        if log:
            factor = bounds[1] / bounds[0]
            x = bounds[0] * factor ** -(steps + 1) if side < 0 else bounds[-1] * factor**steps
            return x, x * (factor - 1)
        step = float(width[0])
        return (bounds[0] - (steps + 1) * step, step) if side < 0 else (bounds[-1] + steps * step, step)

    dropped_left, dropped_width, dropped, base = (np.zeros(0) for _ in range(4))
    if given is None:
        if info.get("dropped") and "edges" in info:
            x, w = outside(-1, max(1, number // 25))
            dropped_left, dropped_width = np.array([x]), np.array([w])
            dropped, base = np.array([float(info["dropped"])]), np.zeros(1)
            result["ends"].append((x + w / 2, "dropped"))
    else:
        values, out, chosen = given
        for side, place, infinite in ((1, -1, values == np.inf), (-1, 0, values == -np.inf)):
            if infinite[~out].any() and np.isfinite(values[~out]).any():
                more, taken = float((infinite & ~out).sum()), float((infinite & chosen).sum())
                sizes[place] -= more
                counts[place] -= taken
                x, w = outside(side, max(1, number // 25))
                left, width = np.append(left, x), np.append(width, w)
                sizes, counts = np.append(sizes, more), np.append(counts, taken)
                result["ends"].append((x + w / 2, "inf" if side > 0 else "-inf"))
        if out.any():
            dropped_left, dropped_width, dropped, base = _dropped_bars(
                values[out], bounds, edges, sizes, kind, outside
            )
            if not np.isfinite(values[out]).all():
                result["ends"].append((dropped_left[0] + dropped_width[0] / 2, "-inf"))
    return result | {
        "left": left,
        "width": width,
        "sizes": sizes,
        "counts": counts,
        "dropped_left": dropped_left,
        "dropped_width": dropped_width,
        "dropped": dropped,
        "dropped_base": base,
    }


def _dropped_bars(
    values: np.ndarray, bounds: np.ndarray, edges: np.ndarray, sizes: np.ndarray, kind: str, outside: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bars for the scores of dropped samples: left edges, widths, heights, and what they stand on.

    Inside the range of the strata they stand on the bars there; below it are as many bars of the same width as they need.
    """
    finite = values[np.isfinite(values) & ((values > 0) | (kind != "log"))]
    inside = finite[(finite >= edges[0]) & (finite <= edges[-1])]
    number = len(bounds) - 1
    if kind == "unequal":
        place = np.clip(np.searchsorted(edges[1:-1], inside, side="right"), 0, number - 1)
    elif len(edges) - 1 != number:  # all kept scores are equal
        place = np.zeros(len(inside), dtype=int)
    else:
        place = np.clip(np.searchsorted(edges, inside, side="right") - 1, 0, number - 1)
    counts = np.bincount(place, minlength=number).astype(float)
    rows = [(bounds[i], bounds[i + 1] - bounds[i], counts[i], sizes[i]) for i in np.flatnonzero(counts)]
    for side, rest in ((-1, finite[finite < edges[0]]), (1, finite[finite > edges[-1]])):
        if not len(rest):
            continue
        if kind == "unequal":
            x, width = outside(side, 1)
            rows.append((x, width, float(len(rest)), 0.0))
            continue
        if kind == "log":
            distance = np.log(rest / edges[0]) / math.log(bounds[1] / bounds[0])
        else:
            distance = (rest - edges[0]) / (bounds[1] - bounds[0])
        steps = -distance if side < 0 else distance - number
        for slot in np.unique(np.floor(steps)):
            x, width = outside(side, int(slot))
            rows.append((x, width, float((np.floor(steps) == slot).sum()), 0.0))
    infinite = len(values) - len(finite)
    if infinite:
        # One place free below the lowest other bar.
        steps = 1
        while sum(outside(-1, steps - 1)) > min((row[0] for row in rows), default=bounds[0]):
            steps += 1
        x, width = outside(-1, steps)
        rows.insert(0, (x, width, float(infinite), 0.0))
    table = np.array(rows)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def _kind(edges: np.ndarray) -> str:
    """Whether strata have equal widths, equal ratios ("log"), or neither ("unequal")."""
    widths = np.diff(edges)
    if np.allclose(widths, widths.mean(), rtol=1e-6, atol=1e-9 * max(abs(edges[0]), abs(edges[-1]))):
        return "equal"
    if edges[0] > 0:
        ratios = np.diff(np.log(edges))
        if np.allclose(ratios, ratios.mean(), rtol=1e-6, atol=1e-9):
            return "log"
    return "unequal"


def rounds(coreset: Coreset, *, ax: Any = None) -> Any:
    """Draws the value of each round of a `simcore` coreset: the mean similarity of what it took, and the threshold that ended it.

    Args:
        coreset: what `simcore` returned.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes. The round that set the threshold is marked, and the one that fell below it and was dropped.

    Raises:
        TypeError: if `coreset` is no Coreset, or `ax` no Axes.
        ValueError: if its `info` holds no rounds.
        ImportError: without matplotlib.

    Example:
        >>> import torch, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> fc.plot.rounds(fc.simcore(x, x[:20] + 0.1, 100, n_clusters=5)).get_xlabel()
        'rounds'
    """
    keys = {"values", "counts", "threshold", "dropped_value", "patience"}
    coreset = coreset_with(coreset, keys, "simcore returned, whose info has values of rounds")
    info = coreset.info
    values = list(info["values"])
    ax = axes(ax, "rounds")
    few = len(values) <= 60
    ax.plot(
        range(1, len(values) + 1),
        values,
        color=BLUE,
        marker="o" if few else None,
        markersize=3,
        label="kept rounds",
    )
    if info["threshold"] is not None:
        ax.axhline(
            info["threshold"],
            color=ORANGE,
            linestyle="--",
            label=f"threshold, set by round {info['patience']}",
        )
        ax.plot([info["patience"]], [values[info["patience"] - 1]], color=ORANGE, marker="s", linestyle="")
    if info["dropped_value"] is not None:
        ax.plot(
            [len(values) + 1],
            [info["dropped_value"]],
            color=DARK,
            marker="x",
            linestyle="",
            label="dropped round",
        )
    ax.set(xlabel="rounds", ylabel="mean similarity of a round (axis cut)")
    ax.set_title(
        f"{len(coreset.indices):,} items, ended by: {info['stopped']}",
        fontsize="medium",
        loc="left",
        color=DARK,
    )
    whole_numbers(ax.xaxis)
    grid(ax)
    ax.legend(frameon=False)
    return ax


def losses(coreset: Coreset, *, full: float | None = None, ax: Any = None) -> Any:
    """Draws the total loss of each fit of an `autocoreset`, and which one was kept.

    Args:
        coreset: what `autocoreset` returned.
        full: the total loss of the model fitted on all samples. With it, what is drawn is the approximation error: the total loss over
            `full`, less 1, on an axis that is logarithmic above the smallest error and linear down to 0 and below.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: if the `info` holds no losses, or `full` is not above 0.
        ImportError: without matplotlib.

    Example:
        >>> import numpy as np, matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> x = np.random.default_rng(0).standard_normal((300, 5))
        >>> coreset = fc.autocoreset(x, x @ np.arange(5) + x[:, 0] ** 2, "linear_regression", None, 30)
        >>> fc.plot.losses(coreset).get_xlabel()
        'fits'
    """
    coreset = coreset_with(
        coreset, {"losses", "best", "rounds"}, "autocoreset returned, whose info has losses"
    )
    info = coreset.info
    values = np.array(info["losses"], dtype=float)
    if full is not None:
        full = as_number(full, "full")
        if not full > 0:
            raise ValueError(f"full must be > 0, got {full}")
        values = values / full - 1
    ax = axes(ax, "losses")
    numbers = np.arange(1, len(values) + 1)
    first = len(values) - info["rounds"]
    ax.plot(numbers, values, color=LIGHT, zorder=1)
    ax.scatter(
        numbers[:first], values[:first], color=GREY, marker="s", s=22, label="uniform samples", zorder=2
    )
    if first < len(values):
        ax.scatter(numbers[first:], values[first:], color=BLUE, s=22, label="matched subsets", zorder=2)
    best = info["best"]
    ax.scatter(
        [numbers[best]],
        [values[best]],
        s=120,
        facecolors="none",
        edgecolors=ORANGE,
        linewidths=2,
        label="kept",
        zorder=3,
    )
    ax.set(xlabel="fits", ylabel="total loss on all samples" if full is None else "approximation error")
    if full is not None:
        _logarithmic(ax, values)
    whole_numbers(ax.xaxis)
    grid(ax)
    ax.legend(frameon=False)
    return ax


def errors(found: Mapping[str, Mapping[int, Any]], *, ax: Any = None) -> Any:
    """Draws approximation errors against the size of a coreset, for several ways to choose it: every trial, and their means.

    The axis of errors is logarithmic above the smallest positive mean and linear below it, so that errors of 0 and below have their place.

    Args:
        found: for each way its errors: a mapping from sizes to the numbers of all trials.
        ax: a matplotlib Axes to draw on; None makes a new figure.

    Returns:
        The Axes.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: without ways, sizes or trials, and for NaN and infinity.
        ImportError: without matplotlib.

    Example:
        >>> import matplotlib, flashcoreset as fc
        >>> matplotlib.use("Agg")
        >>> found = {"ours": {50: [0.1, 0.2], 100: [0.01, 0.0]}, "uniform": {50: [0.5, 0.7], 100: [0.2, 0.3]}}
        >>> fc.plot.errors(found).get_ylabel()
        'approximation error'
    """
    if not isinstance(found, Mapping) or not all(isinstance(sizes, Mapping) for sizes in found.values()):
        raise TypeError("found must be a mapping from names to mappings from sizes to errors")
    tables = {
        name: {int(size): _finite(values, f"found[{name!r}][{size}]") for size, values in sizes.items()}
        for name, sizes in found.items()
    }
    if not tables or not all(tables.values()):
        raise ValueError("found must have at least one way with at least one size, got none")
    ax = axes(ax, "errors")
    means = []
    for place, (name, table) in enumerate(tables.items()):
        style = {"color": CYCLE[place % len(CYCLE)], "marker": MARKERS[place % len(MARKERS)]}
        for size, values in table.items():
            ax.scatter([size] * len(values), values, s=14, alpha=0.5, linewidths=0, **style)
        own = [float(values.mean()) for values in table.values()]
        ax.plot(list(table), own, markersize=5, label=name, **style)
        means += own
    _logarithmic(ax, np.array(means))
    ax.set(xlabel="samples in the coreset", ylabel="approximation error")
    sizes = sorted({size for table in tables.values() for size in table})
    if len(sizes) <= 8:
        ax.set_xticks(sizes)
    else:
        whole_numbers(ax.xaxis)
    grid(ax)
    ax.legend(frameon=False)
    return ax


def _finite(values: Any, name: str) -> np.ndarray:
    vector = as_vector(values, name, torch.device("cpu"), integers=False).double().numpy()
    if len(vector) == 0:
        raise ValueError(f"{name} must have at least one error, got none")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return vector


def _logarithmic(ax: Any, values: np.ndarray) -> None:
    """A logarithmic axis if all values are positive; else linear around 0, from the decade of the smallest positive one on."""
    positive = values[values > 0]
    if not len(positive):
        return
    low = min(10.0 ** math.floor(math.log10(positive.min())), positive.max() / 10)
    if (values > 0).all():
        ax.set_yscale("log")
    else:
        ax.set_yscale("symlog", linthresh=low, linscale=0.5)
        ax.axhline(0, color=DARK, linewidth=0.8)
