"""Entropic optimal transport beside POT and geomloss: iterations of given and of computed costs, one problem and many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import flashcoreset as fc
from benchmarks import peers
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row, Work

ITERATIONS = 100
REG = 0.05  # of the largest cost


def _costs(n: int, batch: int = 1) -> Inputs:
    """Squared distances of points in space, the largest of them 1; ``batch`` problems."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(batch, n, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    cost = torch.cdist(x, y) ** 2
    cost /= cost.amax((1, 2), keepdim=True)
    uniform = np.full(n, 1 / n)
    single = cost.float()
    return {
        "cost": single, "one": single[0], "double": cost[0].numpy(), "single": single[0].numpy(), "a": uniform,
        "b": uniform, "a32": uniform.astype(np.float32), "b32": uniform.astype(np.float32),
    }  # fmt: skip


def _points(n: int, d: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, d, generator=generator) for _ in range(2))
    return {"x": x, "y": y, "reg": REG * d / 3}


def _one(inputs: Inputs) -> torch.Tensor:
    return fc.sinkhorn(
        inputs["one"], reg=REG, metric="precomputed", tol=0, max_iter=ITERATIONS, backend="cpu"
    ).plan()


def _batch(inputs: Inputs) -> torch.Tensor:
    return fc.sinkhorn(
        inputs["cost"], reg=REG, metric="precomputed", tol=0, max_iter=ITERATIONS, backend="cpu"
    ).plan()


def _same_plans(tolerance: float) -> Callable[[Inputs, Any, Any], str]:
    def check(_: Inputs, ours: torch.Tensor, peer: Any) -> str:
        expected = torch.as_tensor(np.asarray(peer)).double()
        off = float((ours.double() - expected).abs().sum((-1, -2)).max())
        if not off <= tolerance:
            raise Disagreement(f"plans differ by {off:.2g} in L1, at most {tolerance:g} expected")
        return f"plans to {off:.0e} in L1"

    return check


def _reading(n: int, batch: int = 1) -> Work:
    """An iteration reads the kernel matrix once; the plan is written."""
    return Work("copy", 4.0 * n * n * batch * ITERATIONS)


ONE = Row(
    name="one-1000-plain-float32",
    title="100 iterations, n = m = 1,000, given costs",
    make=_costs,
    size={"n": 1_000},
    small={"n": 40},
    ours=_one,
    peer=peers.pot_plain_float32,
    peer_name="POT sinkhorn, NumPy float32",
    check=_same_plans(1e-4),
    work=_reading,
    goal=2,
    calls=3,
)

MANY = replace(
    ONE,
    name="many-128-batch",
    title="100 iterations of 256 problems of 128 x 128, given costs",
    size={"n": 128, "batch": 256},
    small={"n": 20, "batch": 3},
    ours=_batch,
    peer=peers.pot_batch,
    peer_name="ot.batch.solve_batch",
    goal=40,
    calls=1,
)


def _divergence_accuracy(inputs: Inputs, ours: torch.Tensor, peer: Any) -> str:
    """geomloss stops when its annealing ends; a thousandth is the accuracy that both are held to."""
    mine, other = float(ours), float(peer)
    if not abs(mine - other) <= 3e-3 * abs(other):
        raise Disagreement(f"values {mine:.6g} and {other:.6g}")
    return f"values to {abs(mine - other) / abs(other):.0e}"


def _ragged_inputs(problems: int, most: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.randint(1, most + 1, (problems,), generator=generator) for _ in range(2))
    x, y = (torch.rand(problems, most, 3, generator=generator) for _ in range(2))
    return {"x": x, "y": y, "rows": rows, "columns": columns}


def _ragged(inputs: Inputs) -> torch.Tensor:
    return fc.sinkhorn(
        inputs["x"], inputs["y"], reg=0.1, tol=0, max_iter=ITERATIONS, backend="cpu",
        x_lengths=inputs["rows"], y_lengths=inputs["columns"],
    ).value  # fmt: skip


def _ragged_loop(inputs: Inputs) -> torch.Tensor:
    values = [
        fc.sinkhorn(x[:n], y[:m], reg=0.1, tol=0, max_iter=ITERATIONS, backend="cpu").value
        for x, y, n, m in zip(
            inputs["x"], inputs["y"], inputs["rows"].tolist(), inputs["columns"].tolist(), strict=True
        )
    ]
    return torch.stack(values)


def _same_values(_: Inputs, ours: torch.Tensor, peer: torch.Tensor) -> str:
    off = float((ours - peer).abs().max())
    if not off <= 1e-6:
        raise Disagreement(f"values differ by {off:.2g}")
    return f"values to {off:.0e}"


def _streamed(inputs: Inputs) -> fc.Transport:
    return fc.sinkhorn(inputs["x"], inputs["y"], reg=inputs["reg"], tol=0, max_iter=2, backend="cpu")


def _streamed_check(inputs: Inputs, ours: fc.Transport, _: Any) -> str:
    """Rows of the plan by library products in float64; after an iteration the columns hold, so the rest is the rows' error."""
    columns = ours.apply_transpose(torch.ones(inputs["x"].shape[0]))
    off = float((columns.double() - 1 / columns.shape[0]).abs().sum())
    some = torch.arange(0, inputs["x"].shape[0], max(1, inputs["x"].shape[0] // 16))
    cost = torch.cdist(inputs["x"][some].double(), inputs["y"].double()) ** 2
    n, m = inputs["x"].shape[0], inputs["y"].shape[0]
    rows = ((ours.f[some, None] + ours.g - cost) / inputs["reg"]).exp().sum(1) / (n * m)
    found = ours.apply(torch.ones(m))[some].double()
    difference = float(((rows - found).abs() / rows).max())
    if not (off <= 1e-4 and difference <= 1e-3):
        raise Disagreement(f"columns off by {off:.2g} in L1, rows by {difference:.2g}")
    return f"columns to {off:.0e} in L1, 16 rows as by float64 products to {difference:.0e}"


def _streamed_work(n: int, d: int) -> Work:
    """Two iterations and the evaluation of the plan: three products; the exponentials come on top."""
    return Work("matrix", 3 * 2.0 * n * n * d)


ROWS = [
    ONE,
    replace(
        ONE,
        name="one-1000-plain-float64",
        peer=peers.pot_plain,
        peer_name="POT sinkhorn, NumPy float64",
        goal=4,
    ),
    replace(
        ONE,
        name="one-1000-log",
        peer=peers.pot_log_float32,
        peer_name="POT sinkhorn_log, torch float32",
        goal=40,
    ),
    replace(
        ONE,
        name="one-1000-geomloss",
        title="value from points at equal accuracy, n = m = 1,000, d = 3, blur^2 = 0.05 of the largest cost",
        make=_points,
        size={"n": 1_000, "d": 3},
        small={"n": 40, "d": 3},
        ours=lambda inputs: (
            fc.sinkhorn(inputs["x"], inputs["y"], reg=inputs["reg"], tol=1e-4, backend="cpu").value
        ),
        peer=peers.geomloss_value,
        peer_name="geomloss SamplesLoss, tensorized",
        check=_divergence_accuracy,
        work=None,
        goal=8,
    ),
    MANY,
    replace(MANY, name="many-128-loop", peer=peers.pot_loop, peer_name="a loop of ot.sinkhorn", goal=16),
    replace(
        ONE,
        name="ragged-64",
        title="100 iterations of 64 problems of 1 to 500 points in one padded batch",
        make=_ragged_inputs,
        size={"problems": 64, "most": 500},
        small={"problems": 5, "most": 20},
        ours=_ragged,
        peer=_ragged_loop,
        peer_name="one call for each of them",
        check=_same_values,
        work=None,
        goal=1 / 1.15,
        calls=1,
    ),
    Row(
        name="points-20000",
        title="2 iterations and the evaluation from points, n = m = 20,000, d = 64, matrix-free",
        make=_points,
        size={"n": 20_000, "d": 64},
        small={"n": 60, "d": 5},
        ours=_streamed,
        check=_streamed_check,
        work=_streamed_work,
        figure="products",
        memory_goal=200e6,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    """Measures one row."""
    measure(row)
