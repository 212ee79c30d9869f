"""How near do coresets come to the gradient of a large batch? The squared relative error of the mean gradient of all parameters.

``python -m benchmarks.colm_matching`` trains a small language model for a few steps on the text of benchmarks.colm_training, then takes
coresets of large batches in several ways and prints `fc.matching_error` of each by explicit per-row gradients of the whole model, the mean
over the batches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import flashcoreset as fc
from benchmarks.colm_training import Settings, Text, language_model, loss_of, standard_library

# Name -> options of BatchSelector, and of CoLM.
PLAIN: dict[str, Any] = {"top": None, "normalize": False}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CoLM, zeroth-order gradients": ({}, {}),
    "medoids of exact gradients of V": ({"gradients": "backprop"}, PLAIN),
    "medoids of their Adam updates": ({"gradients": "backprop"}, {"top": None}),
    "matching pursuit of exact gradients of V": ({"gradients": "backprop"}, {**PLAIN, "method": "omp"}),
    "matching pursuit of q, k, v and o": (
        {"gradients": "backprop", "matrices": ("q", "k", "v", "o")},
        {**PLAIN, "method": "omp"},
    ),
    "matching pursuit of V's Adam updates": ({"gradients": "backprop"}, {"top": None, "method": "omp"}),
}


def gradients_of(model: nn.Module, rows: Tensor) -> Tensor:
    """The gradients [B, parameters] of each row's loss with respect to all parameters."""
    found = []
    for row in rows:
        grads = torch.autograd.grad(loss_of(model, row[None], None), list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def warmed_up(text: Text, settings: Settings) -> tuple[nn.Module, Tensor]:
    """A model after `settings.steps` steps, and the rows that it has not seen."""
    model = language_model(settings, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(0))
    for places in order[: settings.steps * 32].split(32):
        loss_of(model, text.train[places], None).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, order[settings.steps * 32 :]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colm_matching", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--large", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of training before the measurement")
    arguments = parser.parse_args(argv)
    settings = Settings(layers=2, width=64, steps=arguments.steps, learning_rate=3e-3)
    text = standard_library(1)
    model, rest = warmed_up(text, settings)
    errors: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}

    def note(name: str, g: Tensor, coreset: fc.Coreset, weighted: bool) -> None:
        total = coreset.info["represented"] if weighted else None
        weights = coreset.weights if weighted else None
        errors.setdefault(name, []).append(fc.matching_error(g, coreset.indices, weights, total=total))

    for number, places in enumerate(rest.split(arguments.large)[: arguments.batches]):
        rows, sources = text.train[places], text.labels[places]
        g = gradients_of(model, rows)
        batch = {"input_ids": rows, "labels": rows}
        plain = fc.CoLM(arguments.k, method="random", seed=number)
        quotas = fc.CoLM(arguments.k, keep_groups=text.small, method="random", seed=number)
        for _ in range(8):
            note("random rows", g, plain.draw(len(rows)), False)
            note("random rows under CoLM's quotas", g, quotas.draw(len(rows), sources), False)
        for name, (how, options) in WAYS.items():
            keeps = () if options else text.small
            method = fc.CoLM(arguments.k, keep_groups=keeps, **options)
            selector = fc.integrations.torch.BatchSelector(model, method, **how)
            start = time.perf_counter()
            coreset = selector.select(batch, sources if keeps else None)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            note(name, g, coreset, options.get("method") == "omp")
        everything = fc.CoLM(arguments.k, method="omp", **PLAIN).select(g)
        note("matching pursuit of the whole model's gradients", g, everything, True)
    print(
        f"| {arguments.large} rows to {arguments.k} | squared relative error | a selection |\n| --- | --- | --- |"
    )
    for name, own in errors.items():
        took = f"{1000 * statistics.median(seconds[name]):.0f} ms" if name in seconds else ""
        print(f"| {name} | {statistics.fmean(own):.3f} | {took} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
