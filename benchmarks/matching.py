"""CoLM's selection step beside the same step with every matrix formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashcoreset as fc
from benchmarks import peers
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row
from flashcoreset.matching.rule import Rule

STEP, BETAS, EPS = 7, (0.9, 0.999), 1e-8


def _batch(count: int, numel: int, groups: int, top: int, k: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(count, 1, generator=generator)
    history = fc.RankOneAdamState(numel, mean=0.1, mean_square=1.1, seed=1, step=STEP, betas=BETAS, eps=EPS)
    dense = history.dense()
    g = fc.LowRankGradients(coefficients, seed=2, numel=numel)
    return {
        "g": g,
        "z": g.directions()[0],
        "m": dense.m,
        "v": dense.v,
        "step": STEP,
        "betas": BETAS,
        "eps": EPS,
        "groups": torch.arange(count) * groups // count,
        "top": top,
        "k": k,
        "history": dense,
    }


def _one_direction(count: int, numel: int, groups: int, top: int, k: int) -> Inputs:
    inputs = _batch(count, numel, groups, top, k)
    history = fc.RankOneAdamState(numel, mean=0.1, mean_square=1.1, seed=2, step=STEP, betas=BETAS, eps=EPS)
    dense = history.dense()
    return inputs | {"m": dense.m, "v": dense.v, "history": history}


def _rows(count: int, numel: int, groups: int, top: int, k: int) -> Inputs:
    inputs = _batch(count, numel, groups, top, k)
    return inputs | {"g": inputs["g"].dense()}


def _match(inputs: Inputs) -> fc.Selection:
    return fc.match_gradients(
        inputs["g"],
        inputs["k"],
        normalize=inputs["history"],
        top=inputs["top"],
        groups=inputs["groups"],
        backend="cpu",
    )


def _distances(inputs: Inputs, dims: torch.Tensor | None, picks: torch.Tensor) -> float:
    """The sum of the distances of all updates to the nearest pick of their group, in the dimensions that count there."""
    rule = Rule.adam(STEP, BETAS, EPS)
    g, z, total = inputs["g"], inputs["z"], 0.0
    for group, label in enumerate(inputs["groups"].unique()):
        rows = (inputs["groups"] == label).nonzero()[:, 0]
        # Along one direction all dimensions give the same result.
        at = torch.arange(100) if dims is None else dims[group]
        values = g[rows][:, at] if isinstance(g, torch.Tensor) else g.coefficients[rows] * z[at]
        u = rule.updates(values.double(), inputs["m"][at].double(), inputs["v"][at].double())
        own = torch.isin(rows, picks)
        total += float(torch.cdist(u, u[own], p=1).min(1).values.sum()) / len(at)
    return total


def _same_step(inputs: Inputs, ours: fc.Selection, peer: dict[str, torch.Tensor]) -> str:
    """If medoids tie, either may be picked; then the rows that they cover are compared."""
    shared = len(set(ours.indices.tolist()) & set(peer["picks"].tolist()))
    found, expected = (_distances(inputs, ours.dims, picks) for picks in (ours.indices, peer["picks"]))
    if len(ours.indices) != len(peer["picks"]) or not abs(found - expected) <= 0.05 * expected:
        raise Disagreement(f"distances to the picks sum up to {found:.4g} and {expected:.4g}")
    return f"{shared} of {len(ours.indices)} picks the same, distances to them {found / expected - 1:+.1%}"


STREAMED = Row(
    name="streamed",
    title="CoLM's step, 128 gradients of 655,360 dimensions along a fresh direction, 4 groups, top 2,560, k = 64",
    make=_batch,
    size={"count": 128, "numel": 655_360, "groups": 4, "top": 2_560, "k": 64},
    small={"count": 40, "numel": 3_000, "groups": 2, "top": 100, "k": 8},
    ours=_match,
    peer=peers.colm_step,
    peer_name="the step with every matrix formed (torch)",
    check=_same_step,
    goal=40,
    memory_goal=32e6,
)

ROWS = [
    STREAMED,
    replace(
        STREAMED,
        name="one-direction",
        title="CoLM's step, 128 gradients of 655,360 dimensions along one direction, 4 groups, top 2,560, k = 64",
        make=_one_direction,
        goal=1_000,
        memory_goal=None,
        calls=5,
    ),
    replace(
        STREAMED,
        name="dense",
        title="CoLM's step, 128 gradients of 655,360 dimensions in memory, 4 groups, top 2,560, k = 64",
        make=_rows,
        goal=None,
        memory_goal=None,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], Any]) -> None:
    """Measures one row."""
    measure(row)
