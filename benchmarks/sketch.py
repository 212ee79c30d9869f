"""Random projections beside trak, dattri, a library product with the stored matrix, and torch.index_add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashcoreset as fc
from benchmarks import peers
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row, Work


def _rows(batch: int, d: int, dim: int) -> Inputs:
    return {"x": torch.randn(batch, d, generator=torch.Generator().manual_seed(0)), "dim": dim}


def _with_matrix(batch: int, d: int, dim: int) -> Inputs:
    return _rows(batch, d, dim) | {"matrix": fc.projection_matrix(d, dim)}


def _with_entries(batch: int, d: int, dim: int) -> Inputs:
    inputs = _rows(batch, d, dim)
    matrix = fc.projection_matrix(d, dim, kind="sjlt")
    columns = matrix.abs().argmax(1)
    return inputs | {"columns": columns, "signs": matrix.gather(1, columns[:, None])[:, 0]}


def _sketch(kind: str) -> Callable[[Inputs], torch.Tensor]:
    return lambda inputs: fc.sketch(inputs["x"], inputs["dim"], kind=kind, backend="cpu")


def _same_lengths(inputs: Inputs, ours: torch.Tensor, peer: torch.Tensor) -> str:
    """Other signs, the same lengths: sqrt(2 / dim) is their relative standard deviation, six of them are allowed."""
    lengths = inputs["x"].norm(dim=1)
    off = [float((found.norm(dim=1) / lengths - 1).abs().max()) for found in (ours, peer)]
    if not max(off) <= 6 * (0.5 / inputs["dim"]) ** 0.5:
        raise Disagreement(f"lengths off by {off[0]:.2g} and {off[1]:.2g}")
    return f"lengths to {off[0]:.0e}, the peer's to {off[1]:.0e}"


def _same_values(_: Inputs, ours: torch.Tensor, peer: torch.Tensor) -> str:
    off = float((ours - peer).abs().max() / peer.abs().max())
    if not off <= 1e-5:
        raise Disagreement(f"values differ by {off:.2g}")
    return f"values to {off:.0e}"


STORED = Row(
    name="rademacher-stored",
    title="random signs, 32 x 200,000 to 512",
    make=_with_matrix,
    size={"batch": 32, "d": 200_000, "dim": 512},
    small={"batch": 3, "d": 500, "dim": 70},
    ours=_sketch("rademacher"),
    peer=peers.mm_stored,
    peer_name="torch.mm with the matrix in memory (410 MB)",
    check=_same_values,
    work=lambda batch, d, dim: Work("matrix", 2.0 * batch * d * dim),
    goal=1 / 0.8,
)

ROWS = [
    replace(
        STORED,
        name="rademacher-trak",
        make=_rows,
        peer=peers.trak_rademacher,
        peer_name="trak BasicProjector",
        check=_same_lengths,
        goal=24,
    ),
    replace(
        STORED,
        name="rademacher-dattri",
        make=_rows,
        peer=peers.dattri_rademacher,
        peer_name="dattri BasicProjector",
        check=_same_lengths,
        goal=28,
    ),
    STORED,
    replace(
        STORED,
        name="sjlt-index-add",
        title="one sign a row (sjlt), 32 x 200,000 to 512",
        make=_with_entries,
        ours=_sketch("sjlt"),
        peer=peers.index_add,
        peer_name="torch.index_add with columns and signs in memory",
        work=lambda batch, d, dim: Work("copy", 4.0 * batch * d),
        goal=2,
        calls=5,
    ),
    replace(
        STORED,
        name="gaussian-stored",
        title="normal numbers, 32 x 200,000 to 512",
        make=lambda batch, d, dim: (
            _rows(batch, d, dim) | {"matrix": fc.projection_matrix(d, dim, kind="gaussian")}
        ),
        ours=_sketch("gaussian"),
        goal=1.2,
    ),
    replace(
        STORED,
        name="srht-stored",
        title="blockwise Hadamard (srht), 32 x 200,000 to 512",
        make=lambda batch, d, dim: (
            _rows(batch, d, dim) | {"matrix": fc.projection_matrix(d, dim, kind="srht")}
        ),
        ours=_sketch("srht"),
        goal=None,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], Any]) -> None:
    """Measures one row."""
    measure(row)
