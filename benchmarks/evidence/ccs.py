"""CCS at 90 % pruning of digits, with right labels and with a fifth of them wrong."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import flashcoreset as fc
from benchmarks.ccs_accuracy import PRUNED, Split
from benchmarks.evidence.record import Claim, Evidence, Measure

RANDOM, HARDEST, PLAIN, CUT, CUT_RANDOM = (
    "random", "the hardest samples", "CCS, cut-off 0", "CCS, cut-off {ratio}", "random after the cut-off {ratio}",
)  # fmt: skip
RATIOS = {0.0: 0.1, 0.2: 0.3}  # the cut-off of each share of wrong labels


def run(seeds: Iterable[int], quick: bool = False) -> Evidence:
    seeds = list(seeds)
    measures, claims = [], []
    for share in (0.0,) if quick else RATIOS:
        ratio = RATIOS[share]
        cut, cut_random = CUT.format(ratio=ratio), CUT_RANDOM.format(ratio=ratio)
        measure = Measure(f"accuracy, %, {100 * share:.0f} % of the labels wrong")
        for seed in seeds:
            own = Split(seed, share)
            scores = own.dynamics.scores()
            kept = {
                RANDOM: fc.random_subset(len(own.x), own.k, seed=seed),
                HARDEST: fc.top_scores(-scores["aum"], own.k),
                PLAIN: fc.ccs(scores, own.k, mislabel_ratio=0, seed=seed),
                cut: fc.ccs(scores, own.k, mislabel_ratio=ratio, seed=seed),
                cut_random: fc.ccs(scores, own.k, mislabel_ratio=ratio, n_strata=1, seed=seed),
            }
            accuracy = {arm: 100 * own.accuracy(torch.as_tensor(c.indices)) for arm, c in kept.items()}
            measure.add(accuracy)
        place, paper = len(measures), "Zheng et al. 2023"
        labels = "with right labels" if share == 0 else f"with {100 * share:.0f} % wrong labels"
        claims += [
            Claim(f"CCS beats the hardest samples, {labels}", paper, place, cut, HARDEST),
            Claim(f"CCS beats random, {labels}", paper, place, cut, RANDOM),
            Claim(f"Strata add to the cut-off, {labels}", paper, place, cut, cut_random),
            Claim(f"The cut-off adds to strata, {labels}", "docs/ccs.md", place, cut, PLAIN),
        ]
        measures.append(measure)
    setting = (
        f"scikit-learn's digits, {100 * PRUNED:.0f} % pruned, 500 held out; scores from the training run of a network of one hidden layer, which is "
        'trained anew on what each choice keeps. Source: Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high '
        'pruning rates", ICLR 2023.'
    )
    return Evidence("CCS", setting, seeds, measures, claims)
