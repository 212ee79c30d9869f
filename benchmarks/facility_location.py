"""Facility location beside submodlib-py and apricot-select: from points to picks, from a matrix to picks, and the call itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import flashcoreset as fc
from benchmarks import checks, data, peers
from benchmarks.harness import Inputs, Row, Work


def _points(make: Callable[..., np.ndarray]) -> Callable[..., Inputs]:
    def inputs(n: int, d: int, k: int) -> Inputs:
        x = make(n, d)
        return {"x": x, "tensor": torch.from_numpy(x), "k": k}

    return inputs


def _matrix(n: int, k: int) -> Inputs:
    similarity = data.nonnegative_cosine(data.clustered(n, 64))
    return {"similarity": similarity, "tensor": torch.from_numpy(similarity), "k": k}


def _l1_points(n: int, d: int, k: int) -> Inputs:
    # The gradients CoLM matches: as many dimensions as it keeps, a batch's worth of rows. The offset is one of the inputs, as
    # the peer has none of its own; ours with offset=None makes the same picks.
    x = data.clustered(n, d, clusters=50)
    offset = float(2 * np.abs(x).sum(axis=1).max())
    return {"x": x, "tensor": torch.from_numpy(x), "k": k, "offset": offset}


def _ours(**arguments: Any) -> Callable[[Inputs], fc.Selection]:
    def call(inputs: Inputs) -> fc.Selection:
        return fc.facility_location(inputs["tensor"], inputs["k"], backend="cpu", **arguments)

    return call


def _ours_l1(inputs: Inputs) -> fc.Selection:
    return fc.facility_location(
        inputs["tensor"], inputs["k"], metric="l1", offset=inputs["offset"], backend="cpu"
    )


def _tiny(n: int, d: int, k: int) -> Inputs:
    x = torch.from_numpy(data.unclustered(n, d))
    outputs = {
        "indices": torch.empty(k, dtype=torch.int64),
        "gains": torch.empty(k, dtype=torch.float64),
        "weights": torch.empty(k, dtype=torch.float64),
        "assignment": torch.empty(n, dtype=torch.int64),
    }
    return {"tensor": x, "k": k, "outputs": outputs}


def _kernel_alone(inputs: Inputs) -> Inputs:
    """The same picks by the low-level call, into arrays that exist already."""
    problem = fc.kernels.FacilityLocationProblem(inputs["tensor"], expected_picks=inputs["k"])
    run = fc.kernels.cpu.FacilityLocation(problem)
    run.step(inputs["k"])
    run.finish(**inputs["outputs"])
    return inputs


def _same_as_kernel(_: Inputs, ours: fc.Selection, kernel: Inputs) -> str:
    if not torch.equal(ours.indices, kernel["outputs"]["indices"]):
        raise checks.Disagreement(
            f"{ours.indices.tolist()}, the kernel {kernel['outputs']['indices'].tolist()}"
        )
    return "same picks"


def _same_picks(_: Inputs, ours: fc.Selection, peer: peers.Picks) -> str:
    return checks.same_picks((ours.indices.numpy(), ours.gains.numpy()), peer)


def _product(n: int, d: int, k: int) -> Work:
    return Work("matrix", 2.0 * n * n * d)


def _one_reading(n: int, k: int) -> Work:
    return Work("copy", 4.0 * n * n)


FROM_POINTS = Row(
    name="points-cosine",
    title="points to picks, cosine, 100 clusters, n = 10,000, d = 128, k = 1,000",
    make=_points(data.clustered),
    size={"n": 10_000, "d": 128, "k": 1_000},
    small={"n": 300, "d": 16, "k": 20},
    ours=_ours(metric="cosine"),
    peer=lambda inputs: peers.submodlib_cosine(inputs["x"], inputs["k"]),
    peer_name="submodlib, its similarity matrix included",
    check=_same_picks,
    work=_product,
    goal=20,
)
FROM_MATRIX = Row(
    name="matrix-submodlib",
    title="similarity matrix to picks, n = 2,000, k = 200",
    make=_matrix,
    size={"n": 2_000, "k": 200},
    small={"n": 200, "k": 20},
    ours=_ours(metric="precomputed"),
    peer=lambda inputs: peers.submodlib_lazy(inputs["similarity"], inputs["k"]),
    peer_name="submodlib",
    check=_same_picks,
    work=_one_reading,
    goal=40,
    calls=3,
)
ROWS = [
    FROM_POINTS,
    replace(
        FROM_POINTS,
        name="points-cosine-1gb",
        title=FROM_POINTS.title + ", memory_budget = 1 GB",
        ours=_ours(metric="cosine", memory_budget=10**9),
        goal=30,
    ),
    replace(
        FROM_POINTS,
        name="points-cosine-unclustered",
        title="points to picks, cosine, no clusters, n = 10,000, d = 128, k = 1,000",
        make=_points(data.unclustered),
        goal=None,
    ),
    Row(
        name="points-l1",
        title="points to picks, l1, n = 128, d = 2,560, k = 64",
        make=_l1_points,
        size={"n": 128, "d": 2_560, "k": 64},
        small={"n": 32, "d": 64, "k": 8},
        ours=_ours_l1,
        peer=lambda inputs: peers.submodlib_l1(inputs["x"], inputs["k"], inputs["offset"]),
        peer_name="torch.cdist and submodlib",
        check=_same_picks,
        work=_product,
        goal=20,
        calls=10,
    ),
    FROM_MATRIX,
    replace(
        FROM_MATRIX,
        name="matrix-apricot",
        peer=lambda inputs: peers.apricot_lazy(inputs["similarity"], inputs["k"]),
        peer_name="apricot lazy",
        goal=200,
    ),
    replace(
        FROM_MATRIX,
        name="matrix-apricot-compiled",
        peer=lambda inputs: peers.apricot_lazy_compiled(inputs["similarity"], inputs["k"]),
        peer_name="apricot lazy, its Numba kernels compiled beforehand",
        goal=None,
    ),
    Row(
        name="overhead",
        title="the public call above its kernel, 8 x 8, k = 3",
        make=_tiny,
        size={"n": 8, "d": 8, "k": 3},
        small={"n": 8, "d": 8, "k": 3},
        ours=_ours(metric="cosine"),
        peer=_kernel_alone,
        peer_name="kernels.cpu.FacilityLocation",
        check=_same_as_kernel,
        figure="overhead",
        goal=25e-6,
        calls=200,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
