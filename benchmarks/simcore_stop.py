"""What SimCore's stop rule takes, and what it is better at than the items nearest to any target: ``python -m benchmarks.simcore_stop``
prints the tables of docs/simcore.md, in less than a minute.

The setting is that of ``flashcoreset demo``: an unsorted pile of scikit-learn's digits is the open set, 120 images of a 3, 5 or 8 are the
target, both by histograms of edge directions. Purity is the share of the items taken that show a 3, 5 or 8, recall the share of
those in the pile that are taken, and coverage the mean over the target of the similarity of its most similar item.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import flashcoreset as fc
from flashcoreset import demo

RULES: dict[str, dict[str, object]] = {
    "default": {},
    "patience=20": {"patience": 20},
    "10 clusters": {"n_clusters": 10},
    "10 clusters, patience=20": {"n_clusters": 10, "patience": 20},
    "stop_threshold=0.9": {"stop_threshold": 0.9},
    "stop_threshold=0.85": {"stop_threshold": 0.85},
}


def measure(taken: Tensor, fits: np.ndarray, similarities: Tensor) -> tuple[float, float, float, float]:
    """Items taken, purity, recall and coverage; `similarities` [n, m] of the open set and the target."""
    good = fits[taken.numpy()]
    coverage = float(similarities[taken].amax(0).mean())
    return len(taken), float(good.mean()), float(good.sum() / fits.sum()), coverage


def line(name: str, rows: list[tuple[float, float, float, float]]) -> str:
    items, purity, recall, coverage = zip(*rows, strict=True)
    return (
        f"{name:28} {min(items):5} to {max(items):5} items, purity {statistics.mean(purity):.2f}, "
        f"recall {statistics.mean(recall):.2f}, coverage {statistics.mean(coverage):.3f}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=10)
    splits = parser.parse_args(argv).splits
    digits = load_digits()
    features = demo.edge_features(digits.images)
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        target, _, rows = demo._split(digits.target, rng)
        fits = np.isin(digits.target[rows], demo.CLASSES)
        openset = torch.nn.functional.normalize(torch.from_numpy(features[rows]), dim=1)
        wanted = torch.nn.functional.normalize(torch.from_numpy(features[target]), dim=1)
        similarities = openset @ wanted.T
        for name, options in RULES.items():
            taken = fc.simcore(openset, wanted, seed=seed, **options).indices
            found.setdefault(name, []).append(measure(taken, fits, similarities))
        for k in (100, 200, 400):
            taken = fc.simcore(openset, wanted, k, stop=False, seed=seed).indices
            found.setdefault(f"SimCore, k = {k}", []).append(measure(taken, fits, similarities))
            nearest = similarities.amax(1).argsort(descending=True, stable=True)[:k]
            found.setdefault(f"nearest to any, k = {k}", []).append(measure(nearest, fits, similarities))
    print(f"open set of {len(rows)}, {fits.sum()} of which fit; target of {len(target)}; {splits} splits")
    for name, measured in found.items():
        print(line(name, measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
