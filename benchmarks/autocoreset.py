"""AutoCoreset beside the best of as many uniform samples as it made fits.

``python -m benchmarks.autocoreset --plot docs/autocoreset.png`` draws the approximation error eps(k) = total loss on all data
of the coreset's model / that of the model fitted on all data - 1 and prints the table, with 16 trials per size, which takes
some minutes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import flashcoreset as fc
from benchmarks import peers
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row
from flashcoreset.methods.autocoreset.weighted_models import LOSSES, make_model

SIZES = (50, 100, 150, 200, 250, 300)
TRIALS = 16
Data = tuple[np.ndarray, np.ndarray | None]


@functools.cache
def breast_cancer() -> Data:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), y


@functools.cache
def digits() -> Data:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x / 16, y


@functools.cache
def housing() -> Data:
    """Data made like the California housing data, which would have to be fetched: 20,640 x 8, columns correlated, three of
    them skewed; a target that is not linear, with noise that grows with a column."""
    rng = np.random.default_rng(0)
    n = 20_640
    x = rng.standard_normal((n, 8)) @ rng.standard_normal((8, 8)) / 2
    x[:, 2:5] = np.exp(0.7 * x[:, 2:5])
    x = (x - x.mean(0)) / x.std(0)
    noise = rng.standard_normal(n) * (0.5 + 0.15 * np.abs(x[:, 1]))
    return x, x @ rng.standard_normal(8) + 0.3 * np.sin(2 * x[:, 0]) + noise


CASES: dict[str, tuple[str, Callable[[], Data]]] = {
    "logistic regression, breast cancer": ("logistic_regression", breast_cancer),
    "linear SVM, breast cancer": ("linear_svm", breast_cancer),
    "linear regression, housing": ("linear_regression", housing),
    "k-means, digits": ("kmeans", lambda: (digits()[0], None)),
    "logistic regression, digits": ("logistic_regression", digits),
}


@functools.cache
def least(case: str) -> float:
    """The total loss of the fit on all data; for k-means the best of 50 fits."""
    name, load = CASES[case]
    x, y = load()
    model = make_model(name, 0)
    if name == "kmeans":
        model.set_params(n_init=50)
    with threadpool_limits(1):
        return float(LOSSES[name](model.fit(x, y), x, y).sum())


def coresets(case: str, k: int, trials: int, method: str = "caratheodory") -> list[fc.Coreset]:
    name, load = CASES[case]
    # Without groups, as the uniform samples beside them are; benchmarks/evidence has the classes as groups.
    return [
        fc.autocoreset(*load(), name, None, k, method=method, groups=False, seed=seed)
        for seed in range(trials)
    ]


def uniform(case: str, k: int, counts: Sequence[int]) -> list[list[float]]:
    """For each trial, the totals of as many uniform samples as `counts` says."""
    name, load = CASES[case]
    with threadpool_limits(1):
        return [
            peers.uniform_fits(*load(), make_model(name, seed), LOSSES[name], k, count, seed)
            for seed, count in enumerate(counts)
        ]


def errors(
    case: str, ours: Sequence[fc.Coreset], by_chance: Sequence[Sequence[float]]
) -> dict[str, np.ndarray]:
    """eps of each trial: ours, the best of its uniform samples, and the mean of these samples."""
    lowest = least(case)
    found = {
        "AutoCoreset": [coreset.info["loss"] for coreset in ours],
        "best of as many uniform": [min(totals) for totals in by_chance],
        "uniform": [np.mean(totals) for totals in by_chance],
    }
    return {label: np.array(totals) / lowest - 1 for label, totals in found.items()}


def _inputs(case: str) -> Callable[..., Inputs]:
    def make(k: int, trials: int) -> Inputs:
        least(case)
        # One draw per fit that ours will make; the number of fits is known only afterwards.
        counts = [coreset.info["fits"] for coreset in coresets(case, k, trials)]
        return {"case": case, "k": k, "trials": trials, "counts": counts}

    return make


def _lower(inputs: Inputs, ours: list[fc.Coreset], peer: list[list[float]]) -> str:
    n = len(CASES[inputs["case"]][1]()[0])
    for coreset in ours:
        if len(coreset.indices.unique()) != len(coreset.indices) or len(coreset.indices) > inputs["k"]:
            raise Disagreement("indices are not distinct, or too many")
        if not (coreset.weights > 0).all() or abs(float(coreset.weights.sum()) / n - 1) > 1e-9:
            raise Disagreement("weights are not positive, or do not sum to n")
    means = {label: float(values.mean()) for label, values in errors(inputs["case"], ours, peer).items()}
    return "eps " + ", ".join(f"{label} {value:.4f}" for label, value in means.items())


ROWS = [
    Row(
        name="autocoreset-" + case.replace(", ", "-").replace(" ", "-"),
        title=f"AutoCoreset: {case}, k = 100, 4 trials",
        make=_inputs(case),
        size={"k": 100, "trials": 4},
        # There are as many columns as samples at most, and the housing data reach that limit.
        small={"k": 20 if case.endswith("housing") else 50, "trials": 1},
        ours=lambda inputs: coresets(inputs["case"], inputs["k"], inputs["trials"]),
        peer=lambda inputs: uniform(inputs["case"], inputs["k"], inputs["counts"]),
        peer_name="as many fits on uniform samples (time: what the choice of samples costs beside the fits)",
        check=_lower,
    )
    for case in CASES
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], Any]) -> None:
    measure(row)


Curves = dict[str, dict[str, list[float]]]


def measure_curves(
    sizes: Sequence[int], trials: int, report: Callable[[str], object], cases: Sequence[str] = tuple(CASES)
) -> Curves:
    """{case: {label: the mean eps at each size}}."""
    curves: Curves = {}
    for case in cases:
        curves[case] = {}
        for k in sizes:
            ours = coresets(case, k, trials)
            found = errors(case, ours, uniform(case, k, [coreset.info["fits"] for coreset in ours]))
            for label, values in found.items():
                curves[case].setdefault(label, []).append(float(values.mean()))
            fits = np.mean([coreset.info["fits"] for coreset in ours])
            cells = " | ".join(f"{values.mean():.5f}" for values in found.values())
            report(f"| {case} | {k} | {cells} | {fits:.0f} |")
    return curves


def plot(path: Path, curves: Curves, sizes: Sequence[int], trials: int) -> None:
    """Draws one panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.3 * rows), layout="constrained", squeeze=False
    )
    for panel, (case, lines) in zip(panels.flat, curves.items(), strict=False):
        fc.plot.errors(
            {
                label: {k: [eps] for k, eps in zip(sizes, points, strict=True)}
                for label, points in lines.items()
            },
            ax=panel,
        )
        panel.set_title(case, fontsize=10)
        panel.set_ylabel(f"approximation error\n(mean of {trials} trials)")
        panel.get_legend().remove()
    for panel in panels.flat[len(curves) :]:
        panel.set_axis_off()
    place = {"loc": "center"} if len(curves) < rows * columns else {"loc": "best"}
    panels.flat[-1].legend(*panels.flat[0].get_legend_handles_labels(), frameon=False, **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.autocoreset", description=__doc__)
    arguments.add_argument("--plot", type=Path, required=True, metavar="PNG", help="where to draw the errors")
    arguments.add_argument("--trials", type=int, default=TRIALS)
    arguments.add_argument("--sizes", default=",".join(map(str, SIZES)), metavar="K,K,...")
    options = arguments.parse_args(argv)
    sizes = tuple(int(size) for size in options.sizes.split(","))
    print("| model and data | k | AutoCoreset | best of as many uniform | uniform | fits |")
    print("| --- | --- | --- | --- | --- | --- |")
    curves = measure_curves(sizes, options.trials, functools.partial(print, flush=True))
    plot(options.plot, curves, sizes, options.trials)
    print(f"wrote {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
