"""GORACS on digits: training on 100 picks that stand for a validation set, with right labels and with a tenth of them wrong."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.evidence.record import Claim, Evidence, Measure
from benchmarks.goracs_accuracy import Choice, K, Problem, at_random, chosen

RANDOM, COVER, PLAIN, NORMS, BY_CLASS, RANDOM_BY_CLASS = (
    "random", "cover alone, lam = 0", "lam = 0", "lam = 0.5", "lam = 0.5, with labels", "random, with labels",
)  # fmt: skip
CHOICES: dict[str, tuple[Choice, bool]] = {
    RANDOM: (at_random, False),
    COVER: (chosen(max_exchanges=0), False),
    PLAIN: (chosen(), False),
    NORMS: (chosen(lam=0.5), False),
    RANDOM_BY_CLASS: (at_random, True),
    BY_CLASS: (chosen(lam=0.5), True),
}


def run(seeds: Iterable[int], quick: bool = False) -> Evidence:
    seeds = list(seeds)
    arms = (RANDOM, COVER, NORMS) if quick else tuple(CHOICES)
    measures = [Measure("accuracy, %, all labels right"), Measure("accuracy, %, 10 % of the labels wrong")]
    for share, measure in zip((0.0, 0.1), measures, strict=True):
        for seed in seeds:
            problem = Problem(seed, share)
            figures = {}
            for arm in arms:
                choose, labels = CHOICES[arm]
                figures[arm] = 100 * problem.score(choose(problem, labels))[0]
            measure.add(figures)
    paper = "Mei et al. 2025"
    claims = [
        Claim("Transport to the validation set beats random, right labels", paper, 0, COVER, RANDOM),
        Claim("Gradient norms add to transport, wrong labels", paper, 1, NORMS, COVER),
    ]
    if not quick:
        claims += [
            Claim("Transport to the validation set beats random, wrong labels", paper, 1, PLAIN, RANDOM),
            Claim("Exchanges add to the cover, right labels", paper, 0, PLAIN, COVER),
            Claim("Gradient norms add to transport, right labels", paper, 0, NORMS, PLAIN),
            Claim(
                "Labels repair gradient norms where labels are wrong", "docs/goracs.md", 1, BY_CLASS, NORMS
            ),
            Claim(
                "With labels it beats random with labels, right labels", paper, 0, BY_CLASS, RANDOM_BY_CLASS
            ),
        ]
    setting = (
        f"scikit-learn's digits: {K} of 1,097 images are chosen to stand for 200 with right labels; embeddings and gradient norms are those of a small network "
        'trained on these 200, which is trained anew on the picks and scored on 500 others. Source: Mei, Chen, Yu, Liang and Yang, "GORACS: Group-level Optimal '
        'Transport-guided Coreset Selection for LLM-based Recommender Systems", KDD 2025.'
    )
    return Evidence("GORACS", setting, seeds, measures, claims)
