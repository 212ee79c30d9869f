"""The demo: which images of an unsorted pile help a task of which only a few unlabelled images are known?

The data are the 1,797 handwritten digits that scikit-learn ships, described by their edge orientations. The
task is to tell the digits 3, 5 and 8 apart. A split gives the target 40 images of each of the three, holds
out 40 more of each for the test, and leaves all other images of all ten digits as the open set. Every method
chooses the same number of images from the open set without seeing a label; the labels of the chosen images
then train a nearest-neighbour classifier that is scored on the held-out ones. GORACS also takes gradient norms, which
unlabelled images do not have: here GORACS uses transport alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

import flashcoreset as fc

CLASSES = (3, 5, 8)
SIDE = 8  # pixels
IN_TARGET = 40  # images per class in the target, and as many held out
PICKS = 60
CLUSTERS = 20
EXCHANGES = 5  # the most exchanges of GORACS
SPLITS = 10


@dataclass
class Outcome:
    """What one method chose: one figure per split, and the picks of the first split in order."""

    name: str
    picks: np.ndarray
    purity: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """`images` [n, 8, 8] and `labels` [n]; `target` and the picks are rows of both, for the first split."""

    images: np.ndarray
    labels: np.ndarray
    target: np.ndarray
    open_rows: int
    outcomes: list[Outcome]


def edge_features(images: np.ndarray, orientations: int = 8, cell: int = 2) -> np.ndarray:
    """Histograms of gradient orientation: [n, side, side] -> [n, (side / cell)^2 * orientations] float32.

    Each pixel adds its gradient's magnitude to the two orientations nearest to its own, in its cell of
    `cell` x `cell` pixels; the square root tempers strong strokes. After Dalal and Triggs, "Histograms of
    Oriented Gradients for Human Detection", CVPR 2005.

    Example:
        >>> import numpy as np
        >>> from flashcoreset.demo import edge_features
        >>> edge_features(np.eye(8)[None]).shape
        (1, 128)
    """
    n, side, _ = images.shape
    padded = np.pad(images / images.max(), ((0, 0), (1, 1), (1, 1)))
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    position = np.arctan2(down, right) / (2 * np.pi) % 1 * orientations
    lower = np.floor(position)
    histogram = np.zeros((n, side, side, orientations))
    for orientation in range(orientations):
        share = np.where(lower % orientations == orientation, 1 - (position - lower), 0)
        share += np.where((lower + 1) % orientations == orientation, position - lower, 0)
        histogram[..., orientation] = np.hypot(down, right) * share
    cells = side // cell
    summed = histogram.reshape(n, cells, cell, cells, cell, orientations).sum(axis=(2, 4))
    return np.sqrt(summed).reshape(n, -1).astype(np.float32)


def _split(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of the target, of the held-out test images and of the open set."""
    target, test = [], []
    for digit in CLASSES:
        rows = rng.permutation(np.flatnonzero(labels == digit))
        target.append(rows[:IN_TARGET])
        test.append(rows[IN_TARGET : 2 * IN_TARGET])
    used = np.concatenate(target + test)
    return np.concatenate(target), np.concatenate(test), np.setdiff1d(np.arange(len(labels)), used)


def _methods(
    rng: np.random.Generator, seed: int
) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """Each method as a function (open set [n, d], target [m, d]) -> rows of the open set [PICKS]."""
    return {
        "SimCore": lambda openset, target: fc.simcore(
            openset, target, PICKS, n_clusters=CLUSTERS, stop=False, seed=seed
        ).indices.numpy(),
        "GORACS, transport alone": lambda openset, target: fc.goracs(
            openset, target, np.zeros(len(openset)), PICKS, lam=0, max_exchanges=EXCHANGES
        ).indices.numpy(),
        "facility location, target as clients": lambda openset, target: fc.facility_location(
            openset, PICKS, clients=target
        ).indices.numpy(),
        "facility location of the open set": lambda openset, _: fc.facility_location(
            openset, PICKS
        ).indices.numpy(),
        "random": lambda openset, _: rng.permutation(len(openset))[:PICKS],
    }


def run() -> Result:
    """Runs every method on every split of the digits."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, SIDE, SIDE)
    features = normalize(edge_features(images))
    outcomes: dict[str, Outcome] = {}
    first: tuple[np.ndarray, int] | None = None
    for seed in range(SPLITS):
        rng = np.random.default_rng(seed)
        target, test, openset = _split(labels, rng)
        first = first or (target, len(openset))
        for name, choose in _methods(rng, seed).items():
            if seed == 0:
                choose(
                    features[openset], features[target]
                )  # loads the kernel and wakes the thread pools, untimed
            start = time.perf_counter()
            chosen = openset[choose(features[openset], features[target])]
            seconds = time.perf_counter() - start
            classifier = KNeighborsClassifier(n_neighbors=1).fit(features[chosen], labels[chosen])
            outcome = outcomes.setdefault(name, Outcome(name, chosen))
            outcome.purity.append(float(np.isin(labels[chosen], CLASSES).mean()))
            outcome.accuracy.append(float(classifier.score(features[test], labels[test])))
            outcome.seconds.append(seconds)
    assert first is not None
    return Result(images, labels, first[0], first[1], list(outcomes.values()))


def _percent(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):5.1f} ± {100 * statistics.stdev(values):4.1f} %"


def table(result: Result) -> str:
    """The figures of `result` as text: mean and deviation over the splits, median time of one selection."""
    digits = ", ".join(map(str, CLASSES))
    lines = [
        f"Target: {len(result.target)} images of the digits {digits}.",
        f"Open set: {result.open_rows:,} images of all ten digits.",
        f"Each method picks {PICKS} of them without labels; mean and deviation over {SPLITS} random splits.",
        "",
        f"{'':38}{'purity':>14}{'accuracy':>17}{'time':>12}",
    ]
    for outcome in result.outcomes:
        time_ms = 1000 * statistics.median(outcome.seconds)
        figures = f"{_percent(outcome.purity):>14}{_percent(outcome.accuracy):>17}{time_ms:9.2f} ms"
        lines.append(f"{outcome.name:38}{figures}")
    lines += [
        "",
        f"purity: share of the picks that show {digits}.",
        "accuracy: of a 1-nearest-neighbour classifier that is trained on the picks and their labels,",
        f"on {IN_TARGET * len(CLASSES)} held-out images of {digits}.",
        "time: median of one selection, SimCore's k-means of the target included.",
    ]
    return "\n".join(lines)


def draw(result: Result, stream: IO[bytes], columns: int = 20) -> None:
    """Writes a PNG: some of the target, then each method's first `columns` picks, framed by class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    inside, outside, plain = "#0072B2", "#E69F00", "#999999"  # distinguishable with any colour vision
    step = len(result.target) // columns
    rows: list[tuple[str, np.ndarray, Outcome | None]] = [
        ("target (some)", result.target[::step][:columns], None)
    ]
    for method in result.outcomes:
        name = method.name.replace(", ", ",\n").replace(" of ", "\nof ")
        rows.append((name, method.picks[:columns], method))

    figure = Figure(figsize=(0.5 * columns + 3.4, 0.72 * len(rows) + 1.3), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    grid = figure.add_gridspec(
        len(rows),
        columns,
        left=1.9 / width,
        right=1 - 1.3 / width,
        top=1 - 0.75 / height,
        bottom=0.5 / height,
        wspace=0.12,
    )
    for r, (name, members, outcome) in enumerate(rows):
        for c, member in enumerate(members):
            axes = figure.add_subplot(grid[r, c])
            axes.imshow(result.images[member], cmap="gray_r", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            fits = result.labels[member] in CLASSES
            colour = plain if outcome is None else inside if fits else outside
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2.4 if outcome is not None else 1)
            if c == 0:
                axes.text(-0.35, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=9)
            if c == columns - 1 and outcome is not None:
                fitting = f"{round(PICKS * outcome.purity[0])} of {PICKS} fit"
                axes.text(1.35, 0.5, fitting, transform=axes.transAxes, ha="left", va="center", fontsize=10)
    digits = ", ".join(map(str, CLASSES))
    figure.suptitle(
        f"The first {columns} of {PICKS} picks from {result.open_rows:,} digits; the target shows {digits}",
        fontsize=12,
        y=1 - 0.22 / height,
        va="top",
    )
    legend = [
        Patch(facecolor="white", edgecolor=inside, linewidth=2.4, label=f"one of {digits}"),
        Patch(facecolor="white", edgecolor=outside, linewidth=2.4, label="another digit"),
    ]
    figure.legend(
        handles=legend, loc="lower center", ncols=2, frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.02)
    )
    figure.savefig(stream, format="png")
