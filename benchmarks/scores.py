"""Sample scores beside the torch expressions that they stand for, and CCS beside its steps in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import flashcoreset as fc
from benchmarks import peers
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row, Work

# Scores in float32 on both sides; relative to 1 + the value's magnitude.
_TOLERANCE = 1e-5


def _logits(dtype: torch.dtype) -> Callable[..., Inputs]:
    def make(n: int, classes: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(0, classes, (n,), generator=generator)
        logits = 2 * torch.randn(n, classes, generator=generator)
        logits[: n // 2].scatter_(1, targets[: n // 2, None], 12.0)  # half of the samples are learned
        return {"logits": logits.to(dtype), "targets": targets}

    return make


def _same_scores(inputs: Inputs, ours: fc.SampleScores, peer: tuple[torch.Tensor, ...]) -> str:
    worst = 0.0
    for name, values in zip(("loss", "entropy", "margin", "el2n"), peer, strict=False):
        error = (getattr(ours, name) - values).abs() / (1 + values.abs())
        worst = max(worst, float(error.max()))
        if not float(error.max()) <= _TOLERANCE:
            raise Disagreement(f"{name} differs by {float(error.max()):.2g}, more than {_TOLERANCE:g}")
    differing = int((ours.correct != peer[4]).sum())
    if (
        differing and inputs["logits"].dtype == torch.float32
    ):  # among equal bfloat16 logits argmax may name any
        raise Disagreement(f"correct differs for {differing} samples")
    return f"scores to {worst:.0e}"


def _scores_row(name: str, title: str, dtype: torch.dtype, n: int, classes: int, goal: float | None) -> Row:
    return Row(
        name=name,
        title=title,
        make=_logits(dtype),
        size={"n": n, "classes": classes},
        small={"n": 200, "classes": 70},
        ours=lambda inputs: fc.sample_scores(inputs["logits"], inputs["targets"]),
        peer=lambda inputs: peers.eager_scores(inputs["logits"], inputs["targets"]),
        peer_name="the torch expressions",
        check=_same_scores,
        work=lambda n, classes: Work("copy", float(dtype.itemsize * n * classes)),
        goal=goal,
    )


def _difficulties(n: int, k: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {"scores": torch.randn(n, generator=generator), "k": k}


def _same_strata(inputs: Inputs, ours: fc.Coreset, peer: torch.Tensor) -> str:
    """Both draw at random; the numbers that they take per stratum are fixed, but for scores within rounding of an edge."""
    scores, k = inputs["scores"], inputs["k"]
    if len(ours.indices.unique()) != k:
        raise Disagreement(f"{len(ours.indices.unique())} samples, expected {k}")
    edges = torch.tensor(ours.info["edges"])
    counts = [
        torch.bucketize(scores[picks].double(), edges[1:-1], right=True) for picks in (ours.indices, peer)
    ]
    mine, theirs = (torch.bincount(places, minlength=len(edges) - 1) for places in counts)
    worst = int((mine - theirs).abs().max())
    if worst > 2 + k // 100_000:
        raise Disagreement(f"a stratum gives {worst} samples more or less")
    return f"same strata to {worst} samples; the peer returns {len(peer):,} of {k:,}"


ROWS = [
    _scores_row(
        "scores-50000x1000", "five scores of 50,000 x 1,000 logits, float32", torch.float32, 50_000, 1_000, 30
    ),
    _scores_row(
        "scores-bfloat16",
        "five scores of 50,000 x 1,000 logits, bfloat16",
        torch.bfloat16,
        50_000,
        1_000,
        None,
    ),
    _scores_row(
        "scores-vocabulary", "five scores of 400 x 128,000 logits, float32", torch.float32, 400, 128_000, None
    ),
    _scores_row(
        "scores-10-classes", "five scores of 100,000 x 10 logits, float32", torch.float32, 100_000, 10, None
    ),
    Row(
        name="ccs-10-million",
        title="CCS, 1,000,000 of 10 million scores, 50 strata (goal: under 1 s)",
        make=_difficulties,
        size={"n": 10_000_000, "k": 1_000_000},
        small={"n": 2_000, "k": 300},
        ours=lambda inputs: fc.ccs(inputs["scores"], inputs["k"], mislabel_ratio=0),
        peer=lambda inputs: peers.masked_strata(inputs["scores"], inputs["k"], 50),
        peer_name="a mask and torch.randperm for each stratum",
        check=_same_strata,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
