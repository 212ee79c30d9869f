"""The Carathéodory reduction beside the published algorithm in NumPy: the same clustering, one singular value decomposition
per null vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

import flashcoreset as fc
from benchmarks import peers
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row, Work

# The largest error, as a share of the sums of magnitudes of float64 numbers.
_TOLERANCE = 1e-12
CLUSTERS = 4  # per dimension and one more, as the kernel has them


def _rows(n: int, d: int) -> Inputs:
    # Columns correlated, of different size and off 0, as features are.
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * np.logspace(-2, 2, d) + rng.random(d)
    }


def _worst(x: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> float:
    """The largest error of the total weight and the sums of columns, as a share of the sums of magnitudes; sums are rounded
    once."""
    worst = abs(math.fsum(weights) / len(x) - 1)
    for column in x.T:
        missing = math.fsum(column) - math.fsum(weights * column[indices])
        worst = max(worst, abs(missing) / math.fsum(np.abs(column)))
    return worst


def _same_sums(inputs: Inputs, ours: fc.Selection, peer: tuple[np.ndarray, np.ndarray]) -> str:
    x = inputs["x"]
    if len(ours.indices) > x.shape[1] + 1:
        raise Disagreement(f"{len(ours.indices)} rows, expected at most {x.shape[1] + 1}")
    if not bool((ours.weights > 0).all()):
        raise Disagreement("a weight is not positive")
    worst = _worst(x, ours.indices.numpy(), ours.weights.numpy())
    if worst > _TOLERANCE:
        raise Disagreement(f"sums differ by {worst:.2g}, more than {_TOLERANCE:g}")
    return f"{len(ours.indices)} rows, sums kept to {worst:.0e}, the peer's {len(peer[0])} to {_worst(x, *peer):.0e}"


def _row(n: int, d: int, clusters: int, goal: float | None, calls: int) -> Row:
    return Row(
        name=f"caratheodory-{n}x{d}" + ("" if clusters == CLUSTERS else "-published"),
        title=f"Carathéodory reduction of {n:,} x {d}, float64",
        make=_rows,
        size={"n": n, "d": d},
        small={"n": 400, "d": 5},
        ours=lambda inputs: fc.caratheodory(inputs["x"]),
        peer=lambda inputs: peers.svd_caratheodory(inputs["x"], clusters),
        peer_name="NumPy, an SVD for each step, "
        + ("the same clusters" if clusters == CLUSTERS else f"{clusters} (d + 1) clusters"),
        check=_same_sums,
        work=lambda n, d: Work("copy", 8.0 * n * d),
        goal=goal,
        calls=calls,
    )


ROWS = [
    _row(18_000, 16, CLUSTERS, 20, 10),
    _row(18_000, 16, 2, None, 10),
    _row(100_000, 32, CLUSTERS, 20, 3),
    _row(100_000, 32, 2, None, 3),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
