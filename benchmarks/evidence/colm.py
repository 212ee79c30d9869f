"""CoLM: how well the rows that it keeps stand for the gradient of a whole batch, beside random rows under the same quotas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import flashcoreset as fc
from benchmarks.colm_training import Settings, chooser, language_model, loss_of, standard_library
from benchmarks.evidence.record import Claim, Evidence, Measure

RANDOM, QUOTAS, COLM, MEDOIDS, OMP = (
    "random", "random, CoLM's quotas", "CoLM, zeroth order", "medoids of true gradients of the last v matrix", "OMP on them, weighted",
)  # fmt: skip
BATCHES = 4


def run(seeds: Iterable[int], quick: bool = False) -> Evidence:
    seeds = list(seeds)
    large, warm, batches = (24, 5, 1) if quick else (64, 60, BATCHES)
    settings = Settings(ratio=2, k=large // 2, layers=2, width=64, validation_rows=1)
    text = standard_library(settings.validation_rows)
    measure = Measure(f"squared relative error of the mean gradient, {large} rows to {settings.k}", digits=4)
    for seed in seeds:
        model: Any = language_model(settings, seed)
        order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
        _warm_up(model, text.train[order[: warm * settings.large]], settings)
        random, quotas, colm = (
            chooser(arm, model, text, settings, seed) for arm in ("random", "structure", "colm")
        )
        errors: dict[str, list[float]] = {}
        for batch in range(batches):
            places = order[(warm + batch) * large : (warm + batch + 1) * large]
            rows, sources = text.train[places], text.labels[places]
            full, last = _gradients(model, rows)
            medoids, pursued = (
                fc.match_gradients(last, settings.k, method=method) for method in ("medoid", "omp")
            )
            for arm, indices, weights in (
                (RANDOM, random(rows, sources)[0], None),
                (QUOTAS, quotas(rows, sources)[0], None),
                (COLM, colm(rows, sources)[0], None),
                (MEDOIDS, medoids.indices, medoids.weights),
                (OMP, pursued.indices, pursued.weights),
            ):
                errors.setdefault(arm, []).append(_error(full, indices, weights))
        measure.add({arm: sum(found) / batches for arm, found in errors.items()})
    paper = "Nguyen et al. 2025"
    claims = [
        Claim("CoLM's rows match the gradient better than random ones", paper, 0, COLM, RANDOM, False),
        Claim("CoLM's rows match it better than random ones under its quotas", paper, 0, COLM, QUOTAS, False),
        Claim("Medoids of true gradients match it better than random rows", "docs/colm.md", 0, MEDOIDS, RANDOM, False),
        Claim("Pursuit of true gradients matches it better than random rows", "docs/matching.md", 0, OMP, RANDOM, False),
    ]  # fmt: skip
    setting = (
        f"A Llama of two layers and width 64 on bytes of the standard library's text, {warm} steps into its training; the rows are chosen from batches of {large} with unequal "
        "sources, and the mean of their gradients (all parameters) is compared with the batch's. What the choice does to training is in [CoLM: does it help "
        'training?](colm_training.md). Source: Nguyen, Yang, Anand, Yang and Mirzasoleiman, "Mini-batch coresets for memory-efficient language model training on data '
        'mixtures", ICLR 2025.'
    )
    return Evidence("CoLM", setting, seeds, [measure], claims)


def _warm_up(model: Any, rows: Tensor, settings: Settings) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    for batch in rows.split(settings.large):
        optimizer.zero_grad()
        loss_of(model, batch, None).backward()
        optimizer.step()


def _gradients(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each row: of all parameters [B, D], and of the last v matrix alone."""
    parameters = list(model.parameters())
    v = model.model.layers[-1].self_attn.v_proj.weight
    full, last = [], []
    for row in rows:
        found = torch.autograd.grad(loss_of(model, row[None], None), parameters)
        full.append(torch.cat([gradient.flatten() for gradient in found]))
        last.append(next(g for p, g in zip(parameters, found, strict=True) if p is v).flatten())
    return torch.stack(full), torch.stack(last)


def _error(g: Tensor, indices: Tensor, weights: Tensor | None) -> float:
    """|mean of the chosen - mean of all|^2 / |mean of all|^2."""
    w = torch.ones(len(indices)) if weights is None else weights
    mean = g.mean(0)
    return float((w @ g[indices] / w.sum() - mean).square().sum() / mean.square().sum())
