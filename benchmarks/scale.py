"""Large facility location: time as a multiple of one whole product, memory over the input, and where each method is faster.

Every row takes minutes at its full size. ``python -m benchmarks.scale --plot docs/cost.png`` draws the cost against n, d and k at
moderate sizes instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashcoreset as fc
from benchmarks import data, machine
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row, Work

GAIN_TOLERANCE = 1e-4
STOCHASTIC_SHARE = 0.98
# Greedy's objective by input, so that a stochastic row does not have to pay for it when the greedy row has run.
_greedy_objectives: dict[str, float] = {}


def _candidates(n: int, d: int, k: int) -> Inputs:
    x = torch.from_numpy(data.clustered(n, d))
    return {"x": x, "clients": None, "k": k, "key": f"square {n} {d} {k}"}


def _target(n: int, m: int, d: int, k: int) -> Inputs:
    # Candidates and clients from the same clusters: a pool, and the task it is chosen for.
    x = torch.from_numpy(data.clustered(n, d))
    clients = torch.from_numpy(data.clustered(m, d, seed=1))
    return {"x": x, "clients": clients, "k": k, "key": f"target {n} {m} {d} {k}"}


def _unclustered(n: int, d: int, k: int) -> Inputs:
    x = torch.from_numpy(data.unclustered(n, d))
    return {"x": x, "clients": None, "k": k, "key": f"unclustered {n} {d} {k}"}


def _select(method: str) -> Callable[[Inputs], fc.Selection]:
    def call(inputs: Inputs) -> fc.Selection:
        return fc.facility_location(
            inputs["x"], inputs["k"], clients=inputs["clients"], metric="cosine", method=method, backend="cpu"
        )

    return call


def _square_product(n: int, d: int, k: int) -> Work:
    return Work("matrix", 2.0 * n * n * d)


def _target_product(n: int, m: int, d: int, k: int) -> Work:
    return Work("matrix", 2.0 * n * m * d)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def _best_similarity(picks: torch.Tensor, clients: torch.Tensor) -> torch.Tensor:
    """max(0, best similarity to a pick) of each client, [m], in chunks of clients by library products."""
    parts = [torch.mm(chunk, picks.T).amax(dim=1).clamp_min(0) for chunk in clients.split(8192)]
    return torch.cat(parts)


def _objective_agrees(inputs: Inputs, selection: fc.Selection) -> torch.Tensor:
    """The picks' objective by library products against the one reported; returns each client's best similarity."""
    x = _unit(inputs["x"])
    clients = x if inputs["clients"] is None else _unit(inputs["clients"])
    if len(set(selection.indices.tolist())) != inputs["k"]:
        raise Disagreement("an index was picked twice")
    best = _best_similarity(x[selection.indices], clients)
    objective = float(best.double().sum())
    for name, value in (
        ("objective", selection.objective),
        ("sum of gains", float(selection.gains.double().sum())),
    ):
        if abs(value / objective - 1) > GAIN_TOLERANCE:
            raise Disagreement(f"{name} {value:.9g}, by library products {objective:.9g}")
    return best


def _greedy_check(inputs: Inputs, selection: fc.Selection, _: None) -> str:
    """No peer reaches these sizes: picks are tried against 256 random candidates at five points of the sequence."""
    _objective_agrees(inputs, selection)
    _greedy_objectives[inputs["key"]] = selection.objective
    x = _unit(inputs["x"])
    clients = x if inputs["clients"] is None else _unit(inputs["clients"])
    k = inputs["k"]
    rivals = torch.from_numpy(np.random.default_rng(0).choice(len(x), min(256, len(x)), replace=False))
    for position in sorted({0, 1, k // 100, k // 10, k - 1}):
        before = selection.indices[:position]
        best = _best_similarity(x[before], clients) if position else torch.zeros(len(clients))
        tried = torch.cat([selection.indices[position : position + 1], rivals])
        gains = torch.zeros(len(tried), dtype=torch.float64)
        for chunk, reached in zip(clients.split(8192), best.split(8192), strict=True):
            gains += (torch.mm(x[tried], chunk.T) - reached).clamp_min_(0).sum(dim=1, dtype=torch.float64)
        if float(gains.max()) > float(gains[0]) * (1 + GAIN_TOLERANCE):
            raise Disagreement(
                f"pick {position} gains {float(gains[0]):.9g}, a random candidate {float(gains.max()):.9g}"
            )
        if abs(float(selection.gains[position]) / float(gains[0]) - 1) > GAIN_TOLERANCE:
            raise Disagreement(
                f"pick {position} reports {float(selection.gains[position]):.9g}, not {float(gains[0]):.9g}"
            )
    return "objective and gains as by library products, no random candidate better"


def _stochastic_check(inputs: Inputs, selection: fc.Selection, _: None) -> str:
    _objective_agrees(inputs, selection)
    if inputs["key"] not in _greedy_objectives:
        _greedy_objectives[inputs["key"]] = _select("lazy")(inputs).objective
    share = selection.objective / _greedy_objectives[inputs["key"]]
    if share < STOCHASTIC_SHARE:
        raise Disagreement(f"objective {share:.4f} of lazy's, less than {STOCHASTIC_SHARE}")
    return f"objective {share:.4f} of lazy's"


LAZY = Row(
    name="lazy-100000",
    title="lazy, 100 clusters, n = 100,000, d = 128, k = 1,000",
    make=_candidates,
    size={"n": 100_000, "d": 128, "k": 1_000},
    small={"n": 400, "d": 16, "k": 20},
    ours=_select("lazy"),
    check=_greedy_check,
    work=_square_product,
    figure="products",
    goal=6,
    memory_goal=1e9,
)
STOCHASTIC = replace(
    LAZY,
    name="stochastic-100000",
    title="stochastic, 100 clusters, n = 100,000, d = 128, k = 1,000",
    ours=_select("stochastic"),
    check=_stochastic_check,
    goal=2.6,
)
# Where each method is faster: both at a size ten times smaller, at fewer picks, and on points without clusters. A lazy row
# stands before its stochastic one.
ROWS = [
    LAZY,
    STOCHASTIC,
    *(
        replace(
            row,
            name=f"{method}-{name}",
            title=f"{method}, {title}",
            make=make,
            size=size,
            goal=None,
            memory_goal=1e9,
        )
        for name, title, make, size in (
            (
                "100000-k100",
                "100 clusters, n = 100,000, d = 128, k = 100",
                _candidates,
                {"n": 100_000, "d": 128, "k": 100},
            ),
            (
                "20000",
                "100 clusters, n = 20,000, d = 128, k = 1,000",
                _candidates,
                {"n": 20_000, "d": 128, "k": 1_000},
            ),
            (
                "20000-unclustered",
                "no clusters, n = 20,000, d = 128, k = 1,000",
                _unclustered,
                {"n": 20_000, "d": 128, "k": 1_000},
            ),
        )
        for method, row in (("lazy", LAZY), ("stochastic", STOCHASTIC))
    ),
    replace(
        LAZY,
        name="lazy-million",
        title="lazy, 100 clusters, n = 1,000,000 candidates, m = 10,000 clients, d = 64, k = 1,000",
        make=_target,
        size={"n": 1_000_000, "m": 10_000, "d": 64, "k": 1_000},
        small={"n": 800, "m": 100, "d": 16, "k": 20},
        work=_target_product,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)


PLOT_BASE: Mapping[str, int] = {"n": 8_000, "d": 64, "k": 400}
PLOT_VALUES: Mapping[str, tuple[int, ...]] = {
    "n": (1_000, 2_000, 4_000, 8_000, 16_000),
    "d": (16, 32, 64, 128, 256),
    "k": (50, 100, 200, 400, 800),
}
PLOT_METHODS = ("lazy", "stochastic")


def measure_costs(
    base: Mapping[str, int] = PLOT_BASE, values: Mapping[str, tuple[int, ...]] = PLOT_VALUES, repeats: int = 3
) -> dict[str, dict[str, list[float]]]:
    """{axis: {method: seconds at each value}}, medians; one of n, d, k varies, the others stay at ``base``."""
    costs: dict[str, dict[str, list[float]]] = {}
    for axis, points in values.items():
        costs[axis] = {method: [] for method in (*PLOT_METHODS, "one product")}
        for point in points:
            size = {**base, axis: point}
            inputs = _candidates(**size)
            limits = machine.measure_limits(size=1024, copy_bytes=1 << 20, repeats=3)
            costs[axis]["one product"].append(_square_product(**size).amount / limits.matrix)
            for method in PLOT_METHODS:
                call = _select(method)
                seconds = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    call(inputs)
                    seconds.append(time.perf_counter() - start)
                costs[axis][method].append(float(np.median(seconds)))
    return costs


def plot(
    path: Path,
    costs: dict[str, dict[str, list[float]]],
    values: Mapping[str, tuple[int, ...]],
    base: Mapping[str, int],
) -> None:
    """Draws one panel per axis, both scales logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(values), figsize=(4 * len(values), 3.4), sharey=True, layout="constrained"
    )
    styles: dict[str, dict[str, Any]] = {
        "lazy": {"color": "C0", "marker": "o"},
        "stochastic": {"color": "C1", "marker": "s"},
        "one product": {"color": "0.5", "linestyle": "--"},
    }
    for panel, (axis, points) in zip(np.atleast_1d(panels), values.items(), strict=True):
        for method, seconds in costs[axis].items():
            panel.loglog(points, seconds, label=method, **styles[method])
        fixed = ", ".join(f"{name} = {value:,}" for name, value in base.items() if name != axis)
        panel.set_title(fixed, fontsize=10)
        panel.set_xlabel(axis)
        panel.set_xticks(points, [f"{point:,}" for point in points])
        panel.minorticks_off()
        panel.grid(visible=True, which="major", alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("seconds")
    np.atleast_1d(panels)[0].legend(frameon=False)
    hardware = machine.hardware()
    figure.suptitle(
        f"facility_location from points, cosine, 100 clusters; {hardware['cpu']}, {hardware['threads']} threads, {hardware['isa']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    arguments.add_argument("--plot", type=Path, required=True, metavar="PNG", help="where to draw the cost")
    path = arguments.parse_args(argv).plot
    plot(path, measure_costs(), PLOT_VALUES, PLOT_BASE)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
