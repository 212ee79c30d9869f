"""What CCS' cut-off and strata do to accuracy: ``python -m benchmarks.ccs_accuracy`` prints the tables of docs/ccs.md, in about a
minute.

The setting is that of ``flashcoreset demo``: scikit-learn's digits, 500 of them held out, a network of one hidden layer that is trained
once on all others (for the scores) and then on what each choice keeps; with all labels right, and with a fifth of them wrong. At 90 %
pruned, for each cut-off: CCS, and a random choice after the same cut-off, which is the control for the strata.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import flashcoreset as fc
from flashcoreset.demo import pruning

PRUNED = 0.9
RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)


def split(seed: int, flipped_share: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training images [n, 64] and labels [n], which labels are wrong [n], test images and labels."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(digits).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    test, rows = order[: pruning.HELD_OUT], order[pruning.HELD_OUT :]
    labels, flipped = y[rows].clone(), torch.zeros(len(rows), dtype=torch.bool)
    flipped[torch.randperm(len(rows), generator=generator)[: int(flipped_share * len(rows))]] = True
    shift = torch.randint(1, 10, (len(rows),), generator=generator)
    labels[flipped] = ((labels + shift) % 10)[flipped]
    return x[rows], labels, flipped, x[test], y[test]


def percent(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


class Split:
    """One split, its scores, and networks trained on choices, each once."""

    def __init__(self, seed: int, flipped_share: float) -> None:
        self.seed = seed
        self.x, self.labels, self.flipped, self.x_test, self.y_test = split(seed, flipped_share)
        self.dynamics = fc.TrainingDynamics(len(self.x))
        pruning.train(self.x, self.labels, seed, self.dynamics)
        self.k = len(self.x) - int(PRUNED * len(self.x))
        self._networks: dict[tuple[int, ...], pruning.Network] = {}

    def accuracy(self, kept: Tensor, held_out: slice = slice(None)) -> float:
        key = tuple(kept.tolist())
        if key not in self._networks:
            self._networks[key] = pruning.train(self.x[kept], self.labels[kept], 5 + self.seed)
        return self._networks[key].accuracy(self.x_test[held_out], self.y_test[held_out])


def cut_offs(flipped_share: float, splits: int) -> None:
    accuracy: dict[tuple[str, float], list[float]] = {}
    never: dict[float, list[float]] = {}
    best: list[float] = []
    first, second = slice(0, pruning.HELD_OUT // 2), slice(pruning.HELD_OUT // 2, None)
    for seed in range(splits):
        own = Split(seed, flipped_share)
        scores = own.dynamics.scores()
        for ratio in RATIOS:
            for name, n_strata in (("CCS", 50), ("random, same cut-off", 1)):
                kept = fc.ccs(scores, own.k, mislabel_ratio=ratio, n_strata=n_strata, seed=seed).indices
                accuracy.setdefault((name, ratio), []).append(own.accuracy(kept))
        # The cut-off is chosen on one half of the held-out images, and scored on the other.
        judge = functools.partial(own.accuracy, held_out=first)
        tuned = fc.tune_ccs(scores, own.k, judge, RATIOS, seed=seed)
        best.append(own.accuracy(tuned.indices, second))
        for value in (math.inf, 0.0):
            forgetting = own.dynamics.scores(never_learned=value)["forgetting"]
            with warnings.catch_warnings():  # counts of few values leave strata empty
                warnings.simplefilter("ignore", fc.InputWarning)
                kept = fc.ccs(forgetting, own.k, mislabel_ratio=0, seed=seed).indices
            never.setdefault(value, []).append(float(own.flipped[kept].float().mean()))
    print(f"{100 * flipped_share:.0f} % of the labels wrong, {100 * PRUNED:.0f} % pruned, {splits} splits")
    print(f"{'cut-off':22}" + "".join(f"{ratio:>14}" for ratio in RATIOS))
    for name in ("CCS", "random, same cut-off"):
        print(f"{name:22}" + "".join(f"{percent(accuracy[name, ratio]):>14}" for ratio in RATIOS))
    print(f"tune_ccs on half of the held-out images, scored on the other half: {percent(best)}")
    if flipped_share:
        kept_wrong = ", ".join(
            f"never_learned={value} {percent(shares)} %" for value, shares in never.items()
        )
        print(f"wrong labels among what CCS keeps by forgetting without a cut-off: {kept_wrong}")


def heavy_tails() -> None:
    scores = torch.exp(2 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    k = 2_000
    print("20,000 log-normal scores (sigma 2), k = 2,000")
    for strata in ("width", "log", "quantile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fc.InputWarning)
            coreset = fc.ccs(scores, k, strata=strata, mislabel_ratio=0)
        sizes, counts = (torch.tensor(coreset.info[name]) for name in ("sizes", "counts"))
        largest = int(sizes.argmax())
        print(
            f"{strata:10} {int((sizes == 0).sum())} strata empty; the largest has {100 * int(sizes[largest]) / 20_000:.0f} % of the "
            f"samples and gives {100 * int(counts[largest]) / k:.0f} % of the picks"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=5)
    splits = parser.parse_args(argv).splits
    torch.set_num_threads(1)
    heavy_tails()
    for flipped_share in (0.0, 0.2):
        cut_offs(flipped_share, splits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
