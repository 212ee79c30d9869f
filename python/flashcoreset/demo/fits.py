"""The fourth demo: on how few samples does a model fit as on all of them?

The data are the 569 tumours of scikit-learn's breast cancer data, standardised; the model is its logistic regression. A coreset's
approximation error is the total loss on all data of the model that was fitted on it, over that of the model that was fitted on all, less 1.
AutoCoreset is compared with uniform samples: with their mean, and with the best of as many samples as AutoCoreset made fits.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import IO

from sklearn.datasets import load_breast_cancer

import flashcoreset as fc

MODEL = "logistic_regression"
SIZES = (50, 100, 200, 300)
TRIALS = 4
OURS, BEST, UNIFORM = NAMES = ("AutoCoreset", "best of as many uniform samples", "uniform samples")


@dataclass
class Fits:
    """Fits on `rows` samples: by name and size, the approximation error of each trial and the number of fits that it took."""

    rows: int
    errors: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    fits: dict[int, list[int]] = field(default_factory=dict)


def run(trials: int = TRIALS) -> Fits:
    """Runs AutoCoreset and its rivals at every size."""
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    least = fc.autocoreset(x, y, MODEL, None, len(x), n_initial=1).info["loss"]  # fitted on all
    result = Fits(len(x))
    for k in SIZES:
        for seed in range(trials):
            found = fc.autocoreset(x, y, MODEL, None, k, seed=seed).info
            # Its first models are fitted on uniform samples; a round follows that is not counted.
            drawn = fc.autocoreset(
                x,
                y,
                MODEL,
                None,
                k,
                method="uniform",
                groups=False,
                n_initial=found["fits"],
                patience=1,
                seed=trials + seed,
            ).info["losses"][: found["fits"]]
            for name, total in zip(NAMES, (found["loss"], min(drawn), statistics.mean(drawn)), strict=True):
                result.errors.setdefault((name, k), []).append(total / least - 1)
            result.fits.setdefault(k, []).append(found["fits"])
    return result


def table(result: Fits) -> str:
    """The figures of `result` as text: means over the trials."""
    lines = [
        f"Logistic regression on coresets of {result.rows} tumours (breast cancer data): the total loss on all of them over that",
        f"of the model fitted on all, less 1. Means over {len(result.fits[SIZES[0]])} trials:",
        "",
        "samples in the coreset          " + "".join(f"{k:>10}" for k in SIZES),
    ]
    for name in NAMES:
        means = [round(statistics.mean(result.errors[name, k]), 4) + 0.0 for k in SIZES]  # never "-0.0000"
        figures = "".join(f"{mean:>10.4f}" for mean in means)
        lines.append(f"{name:32}{figures}")
    lines.append(
        "fits                            "
        + "".join(f"{statistics.mean(result.fits[k]):>10.0f}" for k in SIZES)
    )
    return "\n".join(lines)


def draw(result: Fits, stream: IO[bytes]) -> None:
    """Writes a PNG: the errors against the number of samples, each trial and the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    fc.plot.errors({name: {k: result.errors[name, k] for k in SIZES} for name in NAMES}, ax=axes)
    axes.set_title(f"Logistic regression on a part of {result.rows} samples as on all of them")
    figure.savefig(stream, format="png")
