"""The second demo: how much of a training set can be left out when some of its labels are wrong?

The data are scikit-learn's 1,797 handwritten digits. A split holds out 500 of them and gives a fifth of the others a wrong
label. A small network is trained on these images once, which yields the training dynamics of every image; then the
same network is trained anew on what each method keeps, for the same number of steps, and scored on the held-out
images, whose labels are right. CCS is set to drop the quarter of the lowest area under the margin first; the random choice after the
same cut-off shows what its strata add to that. The same again with all labels right, where CCS takes the published cut-offs, or none.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import IO

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import flashcoreset as fc

HELD_OUT = 500
FLIPPED = 0.2  # share of the training labels
DROPPED = 0.25  # share that CCS leaves out as probably labelled wrongly
PRUNED = (0.5, 0.7, 0.8, 0.9)
SPLITS = 5
STEPS, BATCH, HIDDEN, RATE = 400, 64, 64, 0.1
CONTROL = "random, same cut-off"
METHODS = ("CCS", CONTROL, "hardest first", "easiest first", "random")
UNCUT = "CCS, no cut-off"
CLEAN_METHODS = ("CCS", CONTROL, UNCUT, "random")
CLEAN_PRUNED = (0.8, 0.9)


@dataclass
class Pruning:
    """Test accuracies, one figure per split: `whole` after training on all, `accuracy` by method and share pruned.

    `kept_flipped` is the share of wrong labels in what was kept; `clean_whole` and `clean` are the accuracies where all labels are
    right; `coreset`, `aum` and `flipped` are those of the first split at the first share, for the picture.
    """

    train_size: int
    whole: list[float]
    accuracy: dict[tuple[str, float], list[float]]
    kept_flipped: dict[tuple[str, float], list[float]]
    clean_whole: list[float]
    clean: dict[tuple[str, float], list[float]]
    coreset: fc.Coreset
    aum: Tensor
    flipped: Tensor


class Network:
    """64 pixels, one hidden layer, 10 classes."""

    def __init__(self, generator: torch.Generator) -> None:
        self.weights = [
            torch.randn(64, HIDDEN, generator=generator) * (2 / 64) ** 0.5,
            torch.zeros(HIDDEN),
            torch.randn(HIDDEN, 10, generator=generator) * (2 / HIDDEN) ** 0.5,
            torch.zeros(10),
        ]

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weights[0] + self.weights[1])

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weights[2] + self.weights[3]

    def __call__(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float((self(x).argmax(1) == y).float().mean())


def train(x: Tensor, y: Tensor, seed: int, dynamics: fc.TrainingDynamics | None = None) -> Network:
    """A network trained on images x [n, 64] with labels y [n]; every step is reported to `dynamics`."""
    generator = torch.Generator().manual_seed(seed)
    network = Network(generator)
    optimizer = torch.optim.SGD([w.requires_grad_() for w in network.weights], lr=RATE, momentum=0.9)
    step = epoch = 0
    while step < STEPS:
        for batch in torch.randperm(len(x), generator=generator).split(BATCH)[: STEPS - step]:
            logits = network(x[batch])
            if dynamics is not None:
                dynamics.update(batch, logits, y[batch], epoch)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, y[batch]).backward()
            optimizer.step()
            step += 1
        epoch += 1
    return network


def keep(
    method: str, scores: dict[str, Tensor], k: int, seed: int, mislabel_ratio: float | None = DROPPED
) -> fc.Coreset:
    """The k samples that a method keeps; a low area under the margin is hard."""
    if method in ("CCS", CONTROL):
        strata = 50 if method == "CCS" else 1
        return fc.ccs(scores, k, mislabel_ratio=mislabel_ratio, n_strata=strata, seed=seed)
    if method in (UNCUT, "random"):
        strata = 50 if method == UNCUT else 1
        return fc.ccs(scores, k, mislabel_ratio=0, n_strata=strata, seed=seed)
    return fc.top_scores(scores["aum"], k, largest=method == "easiest first")


def run(splits: int = SPLITS) -> Pruning:
    """Runs every method on every split, on one thread: products this small wait longer for other threads than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(splits)
    finally:
        torch.set_num_threads(threads)


def _run(splits: int) -> Pruning:
    images, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(digits).long()
    result: Pruning | None = None
    for seed in range(splits):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=generator)
        test, rows = order[:HELD_OUT], order[HELD_OUT:]
        n = len(rows)
        labels, flipped = y[rows].clone(), torch.zeros(n, dtype=torch.bool)
        flipped[torch.randperm(n, generator=generator)[: int(FLIPPED * n)]] = True
        shift = torch.randint(1, 10, (n,), generator=generator)
        labels[flipped] = ((labels + shift) % 10)[flipped]

        dynamics, right = fc.TrainingDynamics(n), fc.TrainingDynamics(n)
        whole = train(x[rows], labels, seed, dynamics).accuracy(x[test], y[test])
        clean_whole = train(x[rows], y[rows], seed, right).accuracy(x[test], y[test])
        scores, clean_scores = dynamics.scores(), right.scores()
        if result is None:
            first = keep("CCS", scores, n - int(PRUNED[0] * n), seed)
            result = Pruning(n, [], {}, {}, [], {}, first, scores["aum"], flipped)
        result.whole.append(whole)
        result.clean_whole.append(clean_whole)
        for pruned in PRUNED:
            k = n - int(pruned * n)
            for method in METHODS:
                kept = keep(method, scores, k, seed).indices
                network = train(x[rows[kept]], labels[kept], splits + seed)
                accuracy = network.accuracy(x[test], y[test])
                result.accuracy.setdefault((method, pruned), []).append(accuracy)
                wrong = float(flipped[kept].float().mean())
                result.kept_flipped.setdefault((method, pruned), []).append(wrong)
            for method in CLEAN_METHODS if pruned in CLEAN_PRUNED else ():
                kept = keep(method, clean_scores, k, seed, mislabel_ratio=None).indices
                network = train(x[rows[kept]], y[rows[kept]], splits + seed)
                accuracy = network.accuracy(x[test], y[test])
                result.clean.setdefault((method, pruned), []).append(accuracy)
    assert result is not None
    return result


def _percent(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f} %"


def _head(shares: tuple[float, ...]) -> str:
    return f"{'pruned':22}" + "".join(f"{f'{100 * pruned:.0f} %':>16}" for pruned in shares)


def _row(method: str, shares: tuple[float, ...], accuracy: dict[tuple[str, float], list[float]]) -> str:
    return f"{method:22}" + "".join(f"{_percent(accuracy[method, pruned]):>16}" for pruned in shares)


def table(result: Pruning) -> str:
    """The figures of `result` as text: mean and deviation over the splits."""
    lines = [
        f"Training set: {result.train_size:,} digits, {100 * FLIPPED:.0f} % of their labels wrong. A network trained on all "
        f"of them",
        f"reaches {_percent(result.whole)} on {HELD_OUT} held-out digits (mean and deviation over {len(result.whole)} random "
        "splits).",
        "Trained on what is left after pruning:",
        "",
        _head(PRUNED),
        *(_row(method, PRUNED, result.accuracy) for method in METHODS),
        "wrong labels among what is left:",
    ]
    for method in METHODS:
        shares = (statistics.mean(result.kept_flipped[method, pruned]) for pruned in PRUNED)
        lines.append(f"{method:22}" + "".join(f"{f'{100 * share:.1f} %':>16}" for share in shares))
    lines += [
        "",
        "Hard is a low area under the margin, as training on all measured it. CCS first drops the",
        f"{100 * DROPPED:.0f} % of the lowest, and then draws from all strata of the others.",
        "",
        f"With all labels right, a network trained on all digits reaches {_percent(result.clean_whole)}. Here CCS takes the "
        "published",
        "cut-offs (20 and 30 %), or none; fc.tune_ccs finds the best by validation data:",
        "",
        _head(CLEAN_PRUNED),
        *(_row(method, CLEAN_PRUNED, result.clean) for method in CLEAN_METHODS),
    ]
    return "\n".join(lines)


def draw(result: Pruning, stream: IO[bytes]) -> None:
    """Writes a PNG: the histogram of the scores with what CCS took of each stratum."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = fc.plot.strata(result.coreset, figure.add_subplot(), scores=result.aum)
    # CCS drops the lowest; of equal scores the first.
    dropped = result.aum.argsort(stable=True)[: result.coreset.info["dropped"]]
    wrong = int(result.flipped[dropped].sum())
    axes.containers[-1].set_label(f"dropped first, {wrong} of {len(dropped)} labelled wrongly")
    axes.set_xlabel("area under the margin (low: hard, or labelled wrongly)")
    axes.set_title(f"CCS keeps {len(result.coreset.indices)} of {result.train_size:,} digits")
    axes.legend(frameon=False)
    figure.savefig(stream, format="png")
