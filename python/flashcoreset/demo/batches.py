"""The third demo: can half of each batch train as well as the whole batch, when some sources are rare?

The data are scikit-learn's handwritten digits, in three sources of unequal size: the digits 0 to 4 are common, 5 to 7
less so, 8 and 9 rare. The same small network is trained by Adam for the same number of steps in several ways, which get the same large
batches: on whole batches, and on half of their rows as CoLM chooses them, as chance does, and as chance does under CoLM's quotas
(all rows of the rare source, and proportional shares of the others), which separates the effect of the quotas from the effect of the
matching. The test has equally many images of every digit.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from textwrap import fill
from typing import IO

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import flashcoreset as fc
from flashcoreset.demo.pruning import Network

SOURCES = {"0 to 4": (range(5), 130), "5 to 7": (range(5, 8), 40), "8 and 9": (range(8, 10), 12)}
RARE = 2
HELD_OUT = 40  # images per digit
LARGE, KEPT = 64, 32
TOP = 160  # weights that count, of the last layer's 640
STEPS, EVERY = 200, 10
# The best rate of 0.001, 0.003, 0.01 and 0.03 for random rows, on seeds that are not used here.
RATE = 0.01
SEEDS = 8
WHOLE, COLM, ZEROTH, QUOTAS, RANDOM = ARMS = (
    "whole batches",
    "CoLM",
    "CoLM, gradients of two forward passes",
    "random, CoLM's quotas",
    "random",
)

Select = Callable[["Network", Tensor, Tensor, Tensor], Tensor]


@dataclass
class Arm:
    """One way to choose rows: for each seed the test loss and accuracy, means over the sources, every EVERY steps
    [seeds, STEPS / EVERY]; and the seconds of each selection."""

    loss: list[list[float]] = field(default_factory=list)
    accuracy: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    pixels, digits = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits).long()


def split(seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Images [n, 64], digits [n] and sources [n] for training, and the same for the test."""
    x, y = _digits()
    generator = torch.Generator().manual_seed(seed)
    source = torch.empty(10, dtype=torch.int64)
    train, test = [], []
    for label, (members, size) in enumerate(SOURCES.values()):
        for digit in members:
            source[digit] = label
            rows = (y == digit).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=generator)]
            test.append(rows[:HELD_OUT])
            train.append(rows[HELD_OUT : HELD_OUT + size])
    of_training, of_test = (
        (x[rows], y[rows], source[y[rows]]) for rows in (torch.cat(train), torch.cat(test))
    )
    return of_training, of_test


def select_by(name: str, seed: int) -> Select:
    """A function (network, images, digits, sources) -> rows to train on."""
    generator = torch.Generator().manual_seed(seed)
    colm = fc.CoLM(KEPT, top=TOP, keep_groups=[RARE])

    def matched(network: Network, x: Tensor, y: Tensor, source: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = network.hidden(x)
            error = network.head(hidden).softmax(1) - torch.nn.functional.one_hot(y, 10)
            grads = (hidden[:, :, None] * error[:, None]).flatten(1)  # of the last layer's weights
        return colm.select(grads, source).indices

    def estimated(network: Network, x: Tensor, y: Tensor, source: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = network.hidden(x)
            grads = fc.zeroth_order_gradients(
                lambda: torch.nn.functional.cross_entropy(network.head(hidden), y, reduction="none"),
                [network.weights[2]],
                seed=seed,
            )
        return colm.select(grads, source).indices

    def by_chance(_: Network, x: Tensor, __: Tensor, ___: Tensor) -> Tensor:
        return torch.randperm(len(x), generator=generator)[:KEPT]

    def by_quotas(_: Network, __: Tensor, ___: Tensor, source: Tensor) -> Tensor:
        rows = [(source == label).nonzero()[:, 0] for label in range(len(SOURCES))]
        kept = rows.pop(RARE)[:KEPT]
        budgets = fc.allocate_budgets([len(own) for own in rows], KEPT - len(kept)).tolist()
        drawn = [
            own[torch.randperm(len(own), generator=generator)[:count]]
            for own, count in zip(rows, budgets, strict=True)
        ]
        return torch.cat([kept, *drawn])

    def everything(_: Network, x: Tensor, __: Tensor, ___: Tensor) -> Tensor:
        return torch.arange(len(x))

    ways = (everything, matched, estimated, by_quotas, by_chance)
    return dict(zip(ARMS, ways, strict=True))[name]


def train(name: str, seed: int, arm: Arm, steps: int = STEPS, rate: float = RATE) -> None:
    """Trains a network in the way `name` and adds the results to `arm`."""
    (x, y, source), (test_x, test_y, test_source) = split(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network(generator)
    select = select_by(name, seed)
    optimizer = torch.optim.Adam([w.requires_grad_() for w in network.weights], lr=rate)
    batches: list[Tensor] = []
    losses, accuracies = [], []
    for step in range(steps):
        if not batches:
            batches = [b for b in torch.randperm(len(x), generator=generator).split(LARGE) if len(b) == LARGE]
        batch = batches.pop()
        start = time.perf_counter()
        rows = batch[select(network, x[batch], y[batch], source[batch])]
        arm.seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                logits = network(test_x)
                loss = torch.nn.functional.cross_entropy(logits, test_y, reduction="none")
                right = (logits.argmax(1) == test_y).float()
            labels = range(len(SOURCES))
            losses.append(statistics.mean(float(loss[test_source == label].mean()) for label in labels))
            accuracies.append(statistics.mean(float(right[test_source == label].mean()) for label in labels))
    arm.loss.append(losses)
    arm.accuracy.append(accuracies)


def run(seeds: int = SEEDS) -> dict[str, Arm]:
    """Trains in every way on every seed, on one thread: products this small wait longer for other threads than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arms = {name: Arm() for name in ARMS}
        for seed in range(seeds):
            for name, arm in arms.items():
                train(name, seed, arm)
        return arms
    finally:
        torch.set_num_threads(threads)


def _mean(values: list[float], format_: str) -> str:
    return f"{statistics.mean(values):{format_}} ± {statistics.stdev(values):{format_}}"


def _last(curves: list[list[float]]) -> list[float]:
    return [curve[-1] for curve in curves]


def table(arms: dict[str, Arm]) -> str:
    """The figures of `arms` as text: mean and deviation over the seeds, median time of one selection."""
    seeds = len(arms[COLM].loss)
    sizes = ", ".join(f"{len(members) * size} of {name}" for name, (members, size) in SOURCES.items())
    steps = len(arms[COLM].seconds) // seeds
    lines = [
        f"Training set: digits from sources of unequal size, {sizes}.",
        f"A network is trained by Adam for {steps} steps on batches of {LARGE}, or on {KEPT} rows of each. After that, on",
        f"held-out digits, mean over the sources (mean and deviation over {seeds} seeds):",
        "",
        f"{'':40}{'loss':>16}{'accuracy':>17}{'selection':>13}",
    ]
    for name, arm in arms.items():
        loss = _mean(_last(arm.loss), ".3f")
        accuracy = _mean([100 * value for value in _last(arm.accuracy)], ".1f")
        seconds = "" if name == WHOLE else f"{1000 * statistics.median(arm.seconds):.2f} ms"
        lines.append(f"{name:40}{loss:>16}{accuracy + ' %':>17}{seconds:>13}")
    counts = []
    for other in (RANDOM, QUOTAS):
        pairs = zip(_last(arms[COLM].loss), _last(arms[other].loss), strict=True)
        counts.append(sum(ours < theirs for ours, theirs in pairs))
    lines += [
        "",
        f"CoLM's loss is below that of random rows on {counts[0]} of {seeds} seeds, and below that of random rows under its",
        f"quotas on {counts[1]}.",
        "CoLM keeps all rows of the rare source and of the others those whose gradients stand for the rest. Random",
        "rows under its quotas keep all rare rows too: they tell the quotas' share of a gain from the matching's.",
    ]
    return "\n".join(lines)


def draw(arms: dict[str, Arm], stream: IO[bytes]) -> None:
    """Writes a PNG: the test loss as training goes on, and that of each seed at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Distinguishable with any colour vision.
    colours = dict(zip(ARMS, ("#999999", "#0072B2", "#56B4E9", "#E69F00", "#D55E00"), strict=True))
    figure = Figure(figsize=(10, 4.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2, width_ratios=[3, 2])
    for place, (name, arm) in enumerate(arms.items()):
        means = [statistics.mean(values) for values in zip(*arm.loss, strict=True)]
        steps = [EVERY * (i + 1) for i in range(len(means))]
        curves.plot(steps, means, color=colours[name], label=name, linestyle="--" if name == WHOLE else "-")
        last = _last(arm.loss)
        ends.scatter(last, [place] * len(last), color=colours[name], s=16, alpha=0.6, edgecolors="none")
        ends.plot([statistics.mean(last)] * 2, [place - 0.3, place + 0.3], color=colours[name], linewidth=2.5)
    curves.set(xlabel="steps", ylabel="test loss, mean over the sources", yscale="log")
    curves.set_title(f"{KEPT} of {LARGE} rows a step, mean of {len(arms[COLM].loss)} seeds")
    curves.set_yticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"])
    curves.minorticks_off()
    curves.legend(frameon=False)
    ends.set(
        yticks=range(len(arms)),
        yticklabels=[fill(name, 20) for name in arms],
    )
    ends.invert_yaxis()
    ends.set_xlabel(f"test loss after {steps[-1]} steps")
    ends.set_title("each seed, and their mean")
    for axes in (curves, ends):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(stream, format="png")
