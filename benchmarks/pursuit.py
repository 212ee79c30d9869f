"""Matching pursuit beside a fit by lstsq at every step, and Frank-Wolfe beside its steps in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row, Work
from flashcoreset.pursuit import Pursuit, frank_wolfe, orthogonal_matching_pursuit

_TOLERANCE = 1e-4  # of weights in float32


def _gradients(B: int, D: int, k: int) -> Inputs:
    """Rows that have something in common, and their sum."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(B, D, generator=generator) + 0.1 * torch.randn(1, D, generator=generator)
    return {"g": g, "target": g.double().sum(0).float(), "k": k}


def _away(B: int, D: int, k: int) -> Inputs:
    """A target for which many rows would get a weight below 0."""
    inputs = _gradients(B, D, k)
    return inputs | {"target": inputs["target"] + 4 * B**0.5 * torch.randn(D)}


def _same_pursuit(inputs: Inputs, ours: Pursuit, peer: tuple[np.ndarray, np.ndarray]) -> str:
    picks, weights = peer
    kept = weights != 0
    if ours.indices.tolist() != picks[kept].tolist():
        raise Disagreement("other rows, or another order")
    worst = float(np.abs(ours.weights.numpy() - weights[kept]).max() / np.abs(weights).max())
    if not worst <= _TOLERANCE:
        raise Disagreement(f"weights differ by {worst:.2g}, more than {_TOLERANCE:g}")
    return f"same {len(ours.indices)} rows, weights to {worst:.0e}"


def _row(
    name: str,
    title: str,
    size: dict[str, int],
    *,
    make: Callable[..., Inputs] = _gradients,
    nonnegative: bool,
    goal: float | None,
) -> Row:
    return Row(
        name=name,
        title=title,
        make=make,
        size=size,
        small={"B": 120, "D": 60, "k": 20},
        ours=lambda inputs: orthogonal_matching_pursuit(
            inputs["g"], inputs["target"], inputs["k"], nonnegative=nonnegative
        ),
        peer=lambda inputs: peers.pursuit_by_lstsq(
            inputs["g"].numpy(), inputs["target"].numpy(), inputs["k"], nonnegative
        ),
        peer_name="NumPy's lstsq at every step"
        + (", SciPy's nnls where it is negative" if nonnegative else ""),
        check=_same_pursuit,
        work=lambda B, D, k: Work("matrix", 2.0 * B * D * k),
        goal=goal,
    )


ROWS = [
    _row(
        "omp-4096x2048",
        "OMP, 400 of 4,096 rows of 2,048, weights of any sign",
        {"B": 4096, "D": 2048, "k": 400},
        nonnegative=False,
        goal=20,
    ),
    _row(
        "omp-nonnegative",
        "OMP, 100 of 4,096 rows of 2,048, weights >= 0",
        {"B": 4096, "D": 2048, "k": 100},
        make=_away,
        nonnegative=True,
        goal=None,
    ),
    Row(
        name="frank-wolfe-4096x2048",
        title="Frank-Wolfe (GIGA), 400 steps on 4,096 rows of 2,048",
        make=_gradients,
        size={"B": 4096, "D": 2048, "k": 400},
        small={"B": 120, "D": 60, "k": 20},
        ours=lambda inputs: frank_wolfe(inputs["g"], inputs["target"], inputs["k"]),
        peer=lambda inputs: peers.geodesic_ascent(inputs["g"].numpy(), inputs["target"].numpy(), inputs["k"]),
        peer_name="the steps in NumPy, products with the direction anew",
        check=_same_pursuit,
        work=lambda B, D, k: Work("matrix", 2.0 * B * D * k),
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
