"""Pairwise distances and similarities beside torch's: the part of facility location that has to touch every pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashcoreset as fc
from benchmarks import checks, data, peers
from benchmarks.harness import Inputs, Row, Work


def _inputs(n: int, d: int) -> Inputs:
    x = torch.from_numpy(data.unclustered(n, d))
    return {"x": x}


def _ours(metric: str) -> Callable[[Inputs], torch.Tensor]:
    def call(inputs: Inputs) -> torch.Tensor:
        # Each call makes a new result, as the peer's does.
        return fc.kernels.cpu.pairwise(inputs["x"], metric=metric)

    return call


def _peer(call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Inputs], torch.Tensor]:
    return lambda inputs: call(inputs["x"])


def _same_values(_: Inputs, ours: torch.Tensor, peer: torch.Tensor) -> str:
    return checks.same_values(ours, peer, tolerance=1e-5)


def _product(n: int, d: int) -> Work:
    return Work("matrix", 2.0 * n * n * d)


L1 = Row(
    name="l1-2048x512",
    title="l1 distances of 2,048 x 512",
    make=_inputs,
    size={"n": 2_048, "d": 512},
    small={"n": 33, "d": 17},
    ours=_ours("l1"),
    peer=_peer(peers.cdist_l1),
    peer_name="torch.cdist(p=1)",
    check=_same_values,
    work=_product,
    goal=30,
    calls=3,
)


SMALL: dict[str, Any] = {"size": {"n": 128, "d": 2_560}, "calls": 10}


def _variants(metric: str, call: Callable[[torch.Tensor], torch.Tensor], peer_name: str) -> list[Row]:
    base = replace(
        L1,
        name=f"{metric}-2048x512",
        title=f"{metric} similarities of 2,048 x 512",
        ours=_ours(metric),
        peer=_peer(call),
        peer_name=peer_name,
        goal=None,
    )
    return [
        base,
        replace(base, name=f"{metric}-128x2560", title=f"{metric} similarities of 128 x 2,560", **SMALL),
    ]


ROWS = [
    L1,
    replace(L1, name="l1-128x2560", title="l1 distances of 128 x 2,560", goal=None, **SMALL),
    *_variants("cosine", peers.mm_cosine, "normalize and torch.mm"),
    *_variants("dot", peers.mm_dot, "torch.mm"),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
