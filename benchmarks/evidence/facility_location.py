"""Facility location: what greedy picks are worth, and what rounds give a target that is small."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

import flashcoreset as fc
from benchmarks.evidence.record import Claim, Evidence, Measure

GREEDY, STOCHASTIC, CENTER, RANDOM = "lazy", "stochastic", "k_center", "random"
ONE, MANY, NEAREST = "clients=target", "clients=target, rounds=k", "nearest"


def mixture(n: int, seed: int) -> Tensor:
    """Points [n, 16] of 40 clusters of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(40, 16, generator=generator)
    sizes = torch.rand(40, generator=generator).square() + 0.02
    return centers[torch.multinomial(sizes, n, replacement=True, generator=generator)] + torch.randn(
        n, 16, generator=generator
    )


def run(seeds: Iterable[int], quick: bool = False) -> Evidence:
    seeds = list(seeds)
    n, k, m, wanted = (600, 20, 20, 80) if quick else (4_000, 60, 100, 500)
    value = Measure(f"mean distance to the nearest pick, k = {k}", digits=3)
    served = Measure(f"mean similarity of a target row to its 5 nearest picks, k = {wanted}", digits=3)
    for seed in seeds:
        x = mixture(n, seed)
        chosen = {
            GREEDY: fc.facility_location(x, k, metric="euclidean").indices,
            STOCHASTIC: fc.facility_location(
                x, k, metric="euclidean", method="stochastic", seed=seed
            ).indices,
            CENTER: fc.k_center(x, k).indices,
            RANDOM: fc.random_subset(n, k, seed=seed).indices,
        }
        value.add({arm: torch.cdist(x, x[rows]).amin(1).mean() for arm, rows in chosen.items()})
        pool, target = x[m:], x[:m]
        with warnings.catch_warnings():  # that most picks gain nothing in one round is what is shown here
            warnings.simplefilter("ignore", fc.InputWarning)
            one = fc.facility_location(pool, wanted, clients=target).indices
        chosen = {
            ONE: one,
            MANY: fc.facility_location(pool, wanted, clients=target, rounds=wanted).indices,
            NEAREST: fc.nearest(pool, target, wanted).indices,
            RANDOM: fc.random_subset(len(pool), wanted, seed=seed).indices,
        }
        unit = torch.nn.functional.normalize
        s = unit(target, dim=1) @ unit(pool, dim=1).T
        served.add({arm: s[:, rows].topk(5).values.mean() for arm, rows in chosen.items()})
    claims = [
        Claim("Greedy picks represent better than random ones", "Nemhauser et al. 1978", 0, GREEDY, RANDOM, False),
        Claim("Greedy picks represent better than k-center's", "docs/controls.md", 0, GREEDY, CENTER, False),
        Claim("Stochastic greedy picks represent better than random ones", "Mirzasoleiman et al. 2015", 0, STOCHASTIC, RANDOM, False),
        Claim("Exact greedy picks represent better than stochastic ones", "docs/facility_location.md", 0, GREEDY, STOCHASTIC, False),
        Claim("Rounds serve a target better than one round", "docs/facility_location.md", 1, MANY, ONE),
        Claim("Rounds serve a target better than the nearest rows", "docs/facility_location.md", 1, MANY, NEAREST),
    ]  # fmt: skip
    setting = (
        f"Mixtures of 40 clusters of unequal sizes in 16 dimensions, {n:,} points. Left: how near each point has a pick. Right: {m} of the points are the "
        f"target, {wanted} picks come from the others."
    )
    return Evidence("Facility location", setting, seeds, [value, served], claims)
