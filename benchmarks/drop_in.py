"""Programs written for other libraries, with the peer's module and with ours of the same name (flashcoreset.compat).

Each call is written once, for a module: the row's peer gets the installed library, our side the import swap. The rows named
``-native`` have the native call in the peer's place: what the shim itself costs.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import flashcoreset as fc
from benchmarks import data
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row

Call = Callable[[Any, Inputs], Any]


def _swapped(peer: str, call: Call) -> dict[str, Callable[[Inputs], Any]]:
    """Both sides of a row: `call` with our module, and with the library of the name `peer`."""

    def with_module(name: str) -> Callable[[Inputs], Any]:
        def run(inputs: Inputs) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return call(importlib.import_module(name), inputs)

        return run

    return {"ours": with_module(f"flashcoreset.compat.{peer}"), "peer": with_module(peer)}


def _close(tolerance: float) -> Callable[[Inputs, Any, Any], str]:
    def check(_: Inputs, ours: Any, peer: Any) -> str:
        mine, other = (torch.as_tensor(np.asarray(found)).double() for found in (ours, peer))
        off = float((mine - other).abs().max() / other.abs().max())
        if not off <= tolerance:
            raise Disagreement(f"results differ by {off:.2g} of the largest, at most {tolerance:g} expected")
        return f"results to {off:.0e}"

    return check


def _same_list(inputs: Inputs, ours: Any, peer: Any) -> str:
    """Picks and gains, but for the order of picks whose gains are equal to rounding."""
    off = max(abs(mine[1] - other[1]) / abs(other[1]) for mine, other in zip(ours, peer, strict=True))
    if not off <= 1e-4:
        raise Disagreement(f"gains differ by {off:.2g}")
    differing = sum(mine[0] != other[0] for mine, other in zip(ours, peer, strict=True))
    return f"gains to {off:.0e}, {differing} picks in another order or tied"


def _similarity(n: int, k: int) -> Inputs:
    return {"s": data.nonnegative_cosine(data.clustered(n, 64)), "k": k}


def _maximize(function: Any, k: int) -> list[tuple[int, float]]:
    return function.maximize(budget=k, optimizer="LazyGreedy", show_progress=False, verbose=False)


def _submodlib(module: Any, inputs: Inputs) -> list[tuple[int, float]]:
    s = inputs["s"]
    function = module.FacilityLocationFunction(
        n=len(s), mode="dense", separate_rep=False, sijs=s, pybind_mode="array"
    )
    return _maximize(function, inputs["k"])


def _points(n: int, d: int, k: int) -> Inputs:
    return {"x": data.clustered(n, d), "k": k}


def _submodlib_of_points(module: Any, inputs: Inputs) -> list[tuple[int, float]]:
    x = inputs["x"]
    function = module.FacilityLocationFunction(n=len(x), mode="dense", data=x, metric="cosine")
    return _maximize(function, inputs["k"])


def _apricot(module: Any, inputs: Inputs) -> list[tuple[int, float]]:
    found = module.FacilityLocationSelection(inputs["k"], metric="precomputed", optimizer="lazy").fit(
        inputs["s"]
    )
    return list(zip(found.ranking.tolist(), found.gains.tolist(), strict=True))


def _native_picks(inputs: Inputs) -> list[tuple[int, float]]:
    found = fc.facility_location(inputs["s"], inputs["k"], metric="precomputed", backend="cpu")
    return list(zip(found.indices.tolist(), found.gains.tolist(), strict=True))


def _gradients(batch: int, d: int, dim: int) -> Inputs:
    return {"x": torch.randn(batch, d, generator=torch.Generator().manual_seed(0)), "dim": dim}


def _same_lengths(inputs: Inputs, ours: torch.Tensor, peer: torch.Tensor) -> str:
    """Other random numbers, the same lengths: sqrt(1 / (2 dim)) is their relative deviation, six of them are allowed."""
    lengths = peer.norm(dim=1)
    off = float((ours.norm(dim=1) / lengths - 1).abs().max())
    if not off <= 6 * inputs["dim"] ** -0.5:
        raise Disagreement(f"lengths differ by {off:.2g}")
    return f"lengths to {off:.0e}"


def _trak(kind: str) -> Call:
    def call(module: Any, inputs: Inputs) -> torch.Tensor:
        projectors = importlib.import_module(f"{module.__name__}.projectors")
        projector = projectors.BasicProjector(
            inputs["x"].shape[1], inputs["dim"], seed=0, proj_type=kind, device=torch.device("cpu")
        )
        return projector.project(inputs["x"], model_id=0)

    return call


def _dattri(kind: str) -> Call:
    def call(module: Any, inputs: Inputs) -> torch.Tensor:
        projection = importlib.import_module(f"{module.__name__}.func.projection")
        project = projection.random_project(
            inputs["x"], len(inputs["x"]), proj_dim=inputs["dim"], proj_max_batch_size=32, proj_type=kind,
            proj_seed=0, device="cpu",
        )  # fmt: skip
        return project(inputs["x"])

    return call


def _transport(n: int, histograms: int = 0, reg: float = 0.05) -> Inputs:
    generator = np.random.default_rng(0)
    side = generator.random((n, 2))
    cost = ((side[:, None] - side) ** 2).sum(2)
    shape = (n, histograms) if histograms else (n,)
    a, b = generator.random(shape[:1]), generator.random(shape)
    return {"a": a / a.sum(), "b": b / b.sum(0), "cost": cost / cost.max(), "reg": reg}


def _ot(name: str, **options: Any) -> Call:
    def call(module: Any, inputs: Inputs) -> Any:
        function = module
        for part in name.split("."):
            function = getattr(function, part)
        return function(inputs["a"], inputs["b"], inputs["cost"], inputs["reg"], **options)

    return call


def _float32(n: int) -> Inputs:
    return {
        name: torch.from_numpy(value).float() if isinstance(value, np.ndarray) else value
        for name, value in _transport(n).items()
    }


def _batch(n: int, batch: int) -> Inputs:
    points = torch.rand(2, batch, n, 2, generator=torch.Generator().manual_seed(0))
    return {"cost": torch.cdist(points[0], points[1]).square()}


def _solve_batch(module: Any, inputs: Inputs) -> np.ndarray:
    solve = importlib.import_module(f"{module.__name__}.batch").solve_batch
    return solve(inputs["cost"], reg=0.1, max_iter=100, tol=0).plan.numpy()


def _native_plan(inputs: Inputs) -> np.ndarray:
    found = fc.sinkhorn(
        inputs["cost"], a=inputs["a"], b=inputs["b"], reg=inputs["reg"], metric="precomputed", tol=1e-9,
        backend="cpu",
    )  # fmt: skip
    return found.plan().numpy()


def _clouds(n: int, d: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, d, generator=generator) for _ in range(2))
    return {"x": x, "y": y + 0.2}


def _samples_loss(module: Any, inputs: Inputs) -> float:
    loss = module.SamplesLoss("sinkhorn", p=2, blur=0.1, scaling=0.9, backend="tensorized")
    return float(loss(inputs["x"], inputs["y"]))


SUBMODLIB = Row(
    name="submodlib",
    title="FacilityLocationFunction(sijs).maximize, n = 4,000, k = 400",
    make=_similarity,
    size={"n": 4_000, "k": 400},
    small={"n": 60, "k": 6},
    **_swapped("submodlib", _submodlib),
    peer_name="submodlib",
    check=_same_list,
    goal=10,
)
TRAK = Row(
    name="trak-normal",
    title="BasicProjector.project, 32 x 100,000 to 512, normal",
    make=_gradients,
    size={"batch": 32, "d": 100_000, "dim": 512},
    small={"batch": 3, "d": 500, "dim": 70},
    **_swapped("trak", _trak("normal")),
    peer_name="trak",
    check=_same_lengths,
    goal=10,
)
POT = Row(
    name="ot-sinkhorn-1000",
    title="ot.sinkhorn, n = 1,000, reg 5 % of the largest cost",
    make=_transport,
    size={"n": 1_000},
    small={"n": 30},
    **_swapped("ot", _ot("sinkhorn")),
    peer_name="POT",
    check=_close(1e-5),
    goal=2,
)

ROWS = [
    SUBMODLIB,
    replace(
        SUBMODLIB,
        name="submodlib-points",
        title="FacilityLocationFunction(data, cosine).maximize, n = 6,000, d = 128, k = 600",
        make=_points,
        size={"n": 6_000, "d": 128, "k": 600},
        small={"n": 60, "d": 8, "k": 6},
        **_swapped("submodlib", _submodlib_of_points),
        goal=20,
    ),
    replace(
        SUBMODLIB, name="submodlib-native", peer=_native_picks, peer_name="fc.facility_location", goal=0.9
    ),
    replace(
        SUBMODLIB,
        name="apricot",
        title="FacilityLocationSelection(precomputed).fit, n = 2,000, k = 200",
        size={"n": 2_000, "k": 200},
        **_swapped("apricot", _apricot),
        peer_name="apricot",
        goal=20,
    ),
    replace(
        SUBMODLIB,
        name="apricot-native",
        title="FacilityLocationSelection(precomputed).fit, n = 4,000, k = 400",
        **_swapped("apricot", _apricot) | {"peer": _native_picks},
        peer_name="fc.facility_location",
        goal=0.9,
    ),
    TRAK,
    replace(
        TRAK,
        name="trak-rademacher",
        title="BasicProjector.project, 32 x 100,000 to 512, rademacher",
        **_swapped("trak", _trak("rademacher")),
        goal=20,
    ),
    replace(
        TRAK,
        name="dattri-normal",
        title="random_project, 32 x 100,000 to 512, normal",
        **_swapped("dattri", _dattri("normal")),
        peer_name="dattri",
        goal=10,
    ),
    replace(POT, name="ot-sinkhorn-100", title="ot.sinkhorn, n = 100", size={"n": 100}, calls=20),
    POT,
    replace(POT, name="ot-sinkhorn-1000-native", peer=_native_plan, peer_name="fc.sinkhorn", goal=0.9),
    replace(POT, name="ot-sinkhorn-5000", title="ot.sinkhorn, n = 5,000", size={"n": 5_000}),
    replace(
        POT,
        name="ot-sinkhorn-log-1000",
        title="ot.bregman.sinkhorn_log, n = 1,000",
        **_swapped("ot", _ot("bregman.sinkhorn_log")),
        goal=20,
    ),
    replace(
        POT,
        name="ot-sinkhorn-log-1000-torch",
        title="ot.bregman.sinkhorn_log, n = 1,000, torch float32, stopThr 1e-6",
        make=_float32,
        **_swapped("ot", _ot("bregman.sinkhorn_log", stopThr=1e-6)),
        check=_close(1e-3),
        goal=20,
    ),
    replace(
        POT,
        name="ot-batch-128",
        title="ot.batch.solve_batch, 100 iterations of 256 problems of 128 x 128",
        make=_batch,
        size={"n": 128, "batch": 256},
        small={"n": 20, "batch": 3},
        **_swapped("ot", _solve_batch),
        goal=20,
    ),
    replace(
        POT,
        name="ot-histograms-64",
        title="ot.sinkhorn2 of 64 histograms on one cost of 784 x 784",
        size={"n": 784, "histograms": 64},
        small={"n": 30, "histograms": 3},
        **_swapped("ot", _ot("sinkhorn2")),
        goal=5,
    ),
    Row(
        name="geomloss",
        title="SamplesLoss, n = m = 2,000, d = 3, blur 0.1",
        make=_clouds,
        size={"n": 2_000, "d": 3},
        small={"n": 40, "d": 3},
        **_swapped("geomloss", _samples_loss),
        peer_name="geomloss",
        check=_close(1e-2),
        goal=8,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    """Measures one row."""
    measure(row)
