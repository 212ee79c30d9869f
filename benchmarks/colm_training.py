"""Does CoLM help training? A small language model on text of unequal sources, at equal numbers of optimizer steps or in equal time.

``python -m benchmarks.colm_training`` trains every arm from several seeds, prints a table and writes results/colm_training.json. The text
is the standard library's: the source code of packages that every Python has, and the documentation that ``help()`` shows.

The arms see the same large batches in the same order, from the same initial model. They differ in the rows that they train on:

    random      as many as the coreset, at random
    structure   all rows of the small sources and random ones of the others, with CoLM's quotas: CoLM without the matching
    colm        CoLM's coreset, as published: medoids of zeroth-order gradients of the last V-projection
    backprop    medoids of the exact gradients of that matrix
    omp         a weighted coreset by matching pursuit of these gradients; the weights are in the loss
    full        the whole large batch

``--ratios 2 4 8`` sets how many rows are drawn for each row of a coreset. ``--corrupt 0.1`` makes noise of a tenth of the rows of the largest
source. ``--equal-time`` gives each arm as many steps as fit into the time of CoLM's ``--steps``, by the median costs of a step that are
measured beforehand, arm beside arm.

The figure is the mean over the sources of the loss on held-out text, each source counting the same.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flashcoreset as fc
from benchmarks import machine, results

LENGTH = 64  # bytes per row
VOCABULARY = 256
PACKAGES = ("encodings", "unittest", "asyncio", "email", "xml", "multiprocessing", "http", "html")
BLOCK, HELD_OUT = 64, 8  # the last of each run of HELD_OUT blocks of BLOCK rows is for validation
NAMES = {
    "random": "random rows",
    "structure": "random rows, CoLM's sources and quotas",
    "colm": "CoLM",
    "backprop": "CoLM, exact gradients",
    "omp": "matching pursuit of exact gradients, weighted",
    "colm-weights": "CoLM, losses weighted by cluster sizes",
    "colm-resample": "CoLM, fresh directions each step",
    "full": "whole large batches",
}
ARMS = ("random", "structure", "colm", "backprop", "omp", "full")
_EXACT = ("backprop", "omp")
_CALIBRATION = 12  # steps by which the cost of an arm's step is measured


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the optimizer is AdamW with a linear warm-up over a tenth of the steps and a cosine to zero.

    The learning rate is the best of 1.5e-3, 3e-3 and 1e-2 for random rows, on two seeds: the baseline's choice, not CoLM's.
    """

    seeds: int = 5
    steps: int = 400
    ratio: int = 2
    k: int = 16
    corrupt: float = 0.0
    learning_rate: float = 1.5e-3
    layers: int = 3
    width: int = 128
    top: int = 2560
    eps: float = 1e-3
    validation_rows: int = 128

    @property
    def large(self) -> int:
        return self.ratio * self.k


@dataclass(frozen=True)
class Text:
    """Rows of bytes by source."""

    sources: tuple[str, ...]
    train: Tensor  # [n, LENGTH]
    labels: Tensor  # [n], the source of each
    validation: tuple[Tensor, ...]  # one [m, LENGTH] per source
    small: tuple[int, ...]  # sources below the mean share


def corrupted(text: Text, share: float) -> Text:
    """The text with noise in place of a share of the training rows of the largest source."""
    if not share:
        return text
    generator = torch.Generator().manual_seed(0)
    largest = int(torch.bincount(text.labels).argmax())
    own = (text.labels == largest).nonzero()[:, 0]
    hit = own[torch.randperm(len(own), generator=generator)[: round(share * len(own))]]
    train = text.train.clone()
    train[hit] = torch.randint(0, VOCABULARY, (len(hit), LENGTH), generator=generator)
    return replace(text, train=train)


def standard_library(validation_rows: int) -> Text:
    """Reads the text of this Python."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    files = {"modules": sorted(root.glob("*.py"))}
    files |= {name: sorted((root / name).rglob("*.py")) for name in PACKAGES}
    content = {name: b"".join(path.read_bytes() for path in paths) for name, paths in files.items()}
    content["documentation"] = "\n".join(topics[name] for name in sorted(topics)).encode()
    train, validation = [], []
    for text in content.values():
        usable = len(text) // LENGTH * LENGTH
        rows = torch.frombuffer(bytearray(text[:usable]), dtype=torch.uint8).view(-1, LENGTH).long()
        held_out = torch.arange(len(rows)) // BLOCK % HELD_OUT == HELD_OUT - 1
        train.append(rows[~held_out])
        own = rows[held_out]
        validation.append(own[:: max(1, len(own) // validation_rows)][:validation_rows])
    sizes = [len(rows) for rows in train]
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    small = tuple(fc.small_sources(labels))
    return Text(tuple(content), torch.cat(train), labels, tuple(validation), small)


def language_model(settings: Settings, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=settings.width,
            intermediate_size=2 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )


Choice = tuple[Tensor, Tensor | None]  # rows, and what their losses are multiplied by; None for their mean
Chooser = Callable[[Tensor, Tensor], Choice]


def chooser(arm: str, model: nn.Module, text: Text, settings: Settings, seed: int) -> Chooser:
    """Chooses rows of a large batch [large, LENGTH] with its sources [large]."""
    generator = torch.Generator().manual_seed(seed)
    k = settings.k
    if arm == "full":
        return lambda rows, _: (torch.arange(len(rows)), None)
    if arm == "random":
        return lambda rows, _: (torch.randperm(len(rows), generator=generator)[:k], None)
    exact: dict[str, Any] = {"gradients": "backprop"} if arm in _EXACT else {"eps": settings.eps}
    how = {"structure": "random", "omp": "omp"}.get(arm, "medoid")
    method = fc.CoLM(k, top=settings.top, keep_groups=text.small, method=how, seed=seed)
    selector = fc.integrations.torch.BatchSelector(
        model, method, seed=seed, resample=arm == "colm-resample", **exact
    )

    def by_colm(rows: Tensor, sources: Tensor) -> Choice:
        coreset = selector.select({"input_ids": rows, "labels": rows}, sources)
        if arm not in ("omp", "colm-weights"):
            return coreset.indices, None
        return coreset.indices, coreset.weights / coreset.info["represented"]

    return by_colm


def loss_of(model: Any, rows: Tensor, weights: Tensor | None) -> Tensor:
    losses = fc.integrations.torch.sample_losses(model(input_ids=rows, use_cache=False), rows)
    return losses.mean() if weights is None else (losses * weights).sum()


@torch.no_grad()
def validate(model: nn.Module, text: Text) -> list[float]:
    """The mean loss of each source, in nats per byte."""
    model.eval()
    losses = [float(loss_of(model, rows, None)) for rows in text.validation]
    model.train()
    return losses


def activations(model: nn.Module, rows: Tensor) -> int:
    """Bytes that a training step on `rows` keeps for its backward pass, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, rows, None)
    del loss
    return sum(seen.values())


def costs(arms: list[str], text: Text, settings: Settings) -> dict[str, float]:
    """The seconds of a step of each arm: medians of steps that are made in turn, so that a busy machine slows all of them."""
    few = replace(settings, steps=3)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(_CALIBRATION // 3):
        for arm in arms:
            run = train(arm, text, few, 0, validates=False)
            seconds[arm].append(run["selection_seconds"] + run["training_seconds"])
    return {arm: statistics.median(own) for arm, own in seconds.items()}


def train(arm: str, text: Text, settings: Settings, seed: int, validates: bool = True) -> dict[str, Any]:
    """One run: losses of each source over the steps, and the cost of a step."""
    model = language_model(settings, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / settings.steps))),
    )
    choose = chooser(arm, model, text, settings, seed)
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
    curve: dict[int, list[float]] = {}
    times: list[tuple[float, float]] = []
    shares = torch.zeros(len(text.sources))
    for step in range(settings.steps):
        places = order[torch.arange(step * settings.large, (step + 1) * settings.large) % len(order)]
        large, sources = text.train[places], text.labels[places]
        start = time.perf_counter()
        chosen, weights = choose(large, sources)
        middle = time.perf_counter()
        loss = loss_of(model, large[chosen], weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        times.append((middle - start, time.perf_counter() - middle))
        shares += torch.bincount(sources[chosen], minlength=len(text.sources))
        is_due = (step + 1) % max(1, settings.steps // 4) == 0 or step + 1 == settings.steps
        if is_due and validates:
            curve[step + 1] = validate(model, text)
    rows = text.train[order[: settings.large if arm == "full" else settings.k]]
    return {
        "arm": arm,
        "seed": seed,
        "losses": {str(step): losses for step, losses in curve.items()},
        "ratio": settings.ratio,
        "steps": settings.steps,
        "mean_loss": statistics.fmean(curve[settings.steps]) if validates else None,
        "selection_seconds": statistics.median(time[0] for time in times),
        "training_seconds": statistics.median(time[1] for time in times),
        "activation_bytes": activations(model, rows),
        "shares": (shares / shares.sum()).tolist(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def summary(runs: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """The answer: on how many seeds CoLM is below random rows, and below its structure alone."""
    by_arm: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["ratio"] != settings.ratio:
            continue
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run["mean_loss"]
    found: dict[str, Any] = {"steps": settings.steps}
    for better, worse in (
        ("colm", "random"),
        ("colm", "structure"),
        ("backprop", "structure"),
        ("omp", "structure"),
        ("omp", "random"),
        ("structure", "random"),
        ("colm", "full"),
    ):
        if better in by_arm and worse in by_arm:
            differences = [by_arm[worse][seed] - by_arm[better][seed] for seed in by_arm[better]]
            found[f"{better} below {worse}"] = {
                "seeds": sum(difference > 0 for difference in differences),
                "of": len(differences),
                "mean_difference": statistics.fmean(differences),
                "least": min(differences),
                "most": max(differences),
            }
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: one line per arm, with the spread over the seeds."""
    lines = [
        ["", "steps", "mean per-source loss", "least to most", "activations", "selection", "training step"],
        ["---"] * 7,
    ]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        losses = [run["mean_loss"] for run in own]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        lines.append(
            [
                NAMES[arm],
                str(own[0]["steps"]),
                f"{statistics.fmean(losses):.4f} +- {spread:.4f}",
                f"{min(losses):.4f} to {max(losses):.4f}",
                f"{own[0]['activation_bytes'] / 1e6:.1f} MB",
                results.seconds(statistics.median(run["selection_seconds"] for run in own)),
                results.seconds(statistics.median(run["training_seconds"] for run in own)),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(
    path: Path,
    runs: list[dict[str, Any]],
    text: Text,
    settings: Settings,
    command: str,
    more: dict[str, Any],
) -> None:
    content = {
        "family": "colm_training",
        "command": command,
        "commit": machine.commit(),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "rows": [],  # rows of the kind that the report's tables have
        "settings": asdict(settings),
        "sources": {
            name: {"rows": int((text.labels == i).sum()), "kept": i in text.small}
            for i, name in enumerate(text.sources)
        },
        "summary": summary(runs, settings),
        **more,
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    plain = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colm_training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arms", nargs="+", choices=NAMES, default=ARMS, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=plain.seeds)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=plain.steps)
    parser.add_argument(
        "--ratios", type=int, nargs="+", default=[plain.ratio], help="rows drawn for each chosen"
    )
    parser.add_argument("--k", type=int, default=plain.k, help="rows of a coreset")
    parser.add_argument(
        "--corrupt", type=float, default=plain.corrupt, help="the share of noise in one source"
    )
    parser.add_argument("--equal-time", action="store_true", help="as many steps as fit into CoLM's time")
    parser.add_argument("--layers", type=int, default=plain.layers)
    parser.add_argument("--width", type=int, default=plain.width)
    parser.add_argument("--learning-rate", type=float, default=plain.learning_rate)
    parser.add_argument("--eps", type=float, default=plain.eps, help="of the zeroth-order gradients")
    parser.add_argument("--validation-rows", type=int, default=plain.validation_rows, help="of each source")
    parser.add_argument(
        "--results", type=Path, help="directory for the JSON file; by default only a whole run writes one"
    )
    arguments = vars(parser.parse_args(argv))
    arms, directory, ratios = arguments.pop("arms"), arguments.pop("results"), arguments.pop("ratios")
    in_time, first = arguments.pop("equal_time"), arguments.pop("first_seed")
    settings = Settings(**arguments)
    if directory is None and settings == plain and set(ARMS) <= set(arms) and not in_time and not first:
        directory = results.DIRECTORY
    text = corrupted(standard_library(settings.validation_rows), settings.corrupt)
    counts = torch.bincount(text.labels).tolist()
    print(
        ", ".join(
            f"{name} {count}{' (kept)' if i in text.small else ''}"
            for i, (name, count) in enumerate(zip(text.sources, counts, strict=True))
        )
    )
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    command = "python -m benchmarks.colm_training" + "".join(
        f" {argument}" for argument in argv or sys.argv[1:]
    )
    for ratio in ratios:
        own = replace(settings, ratio=ratio)
        steps = dict.fromkeys(arms, own.steps)
        if in_time:
            seconds = costs(list(dict.fromkeys([*arms, "colm"])), text, own)
            steps = {arm: max(1, round(own.steps * seconds["colm"] / seconds[arm])) for arm in arms}
            found[f"seconds of a step at ratio {ratio}"] = seconds
            print(f"ratio {ratio}: steps {steps}", flush=True)
        for seed in range(first, first + settings.seeds):
            for arm in arms:
                runs.append(train(arm, text, replace(own, steps=steps[arm]), seed))
                print(f"ratio {ratio}, seed {seed}, {NAMES[arm]}: {runs[-1]['mean_loss']:.4f}", flush=True)
            if directory is not None:  # after each seed, so that a run that is cut short leaves what it has
                found[f"summary at ratio {ratio}"] = summary(runs, own)
                write(
                    directory / "colm_training.json",
                    runs,
                    text,
                    replace(settings, ratio=ratios[0]),
                    command,
                    found,
                )
        print(f"ratio {ratio}")
        print(table([run for run in runs if run["ratio"] == ratio]))
        print(json.dumps(summary(runs, own), indent=1), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
