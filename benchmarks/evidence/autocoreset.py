"""AutoCoreset: how much more the coreset's model loses on all data than the model of all data, beside uniform samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from threadpoolctl import threadpool_limits

import flashcoreset as fc
from benchmarks import peers
from benchmarks.autocoreset import CASES, least
from benchmarks.evidence.record import Claim, Evidence, Measure
from flashcoreset.methods.autocoreset.weighted_models import LOSSES, make_model

KS = (50, 100)
OURS, PLAIN, MEDIAN, IMPORTANCE, BEST, UNIFORM = (
    "caratheodory", "caratheodory, groups=False", "median_of_means", "importance", "best of as many uniform samples", "uniform samples",
)  # fmt: skip
OPTIONS = {
    OURS: {},
    PLAIN: {"groups": False},
    MEDIAN: {"method": "median_of_means"},
    IMPORTANCE: {"method": "importance"},
}
OF_CLASSES = ("logistic regression, breast cancer", "linear SVM, breast cancer")


def run(seeds: Iterable[int], quick: bool = False) -> Evidence:
    seeds = list(seeds)
    measures, claims = [], []
    for case in OF_CLASSES[:1] if quick else OF_CLASSES:
        name, load = CASES[case]
        for k in KS[-1:] if quick else KS:
            measure = Measure(f"eps, {case}, k = {k}", digits=4)
            for seed in seeds:
                found = {
                    arm: fc.autocoreset(*load(), name, None, k, seed=seed, **options).info
                    for arm, options in OPTIONS.items()
                }
                # As many draws as ours made fits, of which the best one counts as ours does.
                with threadpool_limits(1):
                    drawn = peers.uniform_fits(
                        *load(), make_model(name, seed), LOSSES[name], k, found[OURS]["fits"], seed
                    )
                totals = {arm: info["loss"] for arm, info in found.items()}
                totals |= {BEST: min(drawn), UNIFORM: float(np.mean(drawn))}
                measure.add({arm: total / least(case) - 1 for arm, total in totals.items()})
            place, paper = len(measures), "Maalouf et al. 2023"
            claims += [
                Claim(f"It beats uniform samples, {case}, k = {k}", paper, place, OURS, UNIFORM, False),
                Claim(
                    f"It beats the best of as many uniform samples, {case}, k = {k}",
                    paper,
                    place,
                    OURS,
                    BEST,
                    False,
                ),
                Claim(
                    f"Carathéodory beats median of means, {case}, k = {k}", paper, place, OURS, MEDIAN, False
                ),
                Claim(
                    f"Classes as groups help, {case}, k = {k}", "the default here", place, OURS, PLAIN, False
                ),
            ]
            measures.append(measure)
    setting = (
        "eps is the total loss on all data of the model fitted on the coreset, over that of the model fitted on all, less 1. Source: Maalouf, Tukan, "
        'Braverman and Rus, "AutoCoreset: an automatic practical coreset construction framework", ICML 2023.'
    )
    return Evidence("AutoCoreset", setting, seeds, measures, claims)
