"""AutoCoreset: a weighted subset on which any model with sample weights trains as on all data."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.imports import imported
from flashcoreset._core.inputs import as_array, is_array
from flashcoreset._core.labels import as_labels
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_integer, one_of
from flashcoreset.methods.autocoreset.loss_subsets import (
    METHODS,
    class_budgets,
    equal_budgets,
    in_groups,
    uniform_with_classes,
)
from flashcoreset.methods.autocoreset.weighted_models import (
    CLUSTERS,
    HINGES,
    LOSSES,
    Fits,
    Loss,
    class_codes,
    make_model,
    named_loss,
    weight_arguments,
)

_REDRAWS = 100  # draws of subsets that lack a class before an error


def autocoreset(
    x: Any,
    y: Any,
    model: Any,
    loss: Any,
    k: int,
    *,
    method: str = "caratheodory",
    n_initial: int = 3,
    patience: int = 5,
    groups: Any = None,
    seed: int = 0,
    progress: Report | bool | None = None,
    n_clusters: int | None = None,
    x_test: Any = None,
    y_test: Any = None,
) -> Coreset:
    """A weighted subset of k samples on which the model fits as on all of them, found from the model's losses alone.

    `n_initial` models are fitted on uniform samples (with every class in each), and their losses on all samples are the
    first columns of a matrix. Then, again and again, a weighted subset is drawn whose column sums match those of all samples,
    a model is fitted on it, and its losses become a further column. The subset whose model has the least total loss on all
    samples is returned; the first subsets are candidates too. The search ends after `patience` rounds without gain, or when there
    are as many columns as samples in the subset.

    Args:
        x: [n, ...] samples, in any form that the model takes: an array or tensor, a sparse matrix, a data frame.
        y: [n] targets, or None. For a model that is not scikit-learn's, integers, bools and strings are classes.
        model: any object with scikit-learn's fit(X, y, sample_weight=...); the object itself is not changed (copies are
            fitted); or "kmeans" (`n_clusters` clusters), "logistic_regression", "linear_svm", "linear_regression". In a Pipeline each step whose
            fit has sample_weight gets the weights (a StandardScaler does); in a search (GridSearchCV) its estimator does in each fold, but scores
            are not weighted.
        loss: a callable(model, X, y) that returns the losses [n] >= 0 of samples; or one of the names above, for the loss
            that scikit-learn's own models of that kind minimise with all their parameters, whose total is least
            for the fit on all samples (each sample's loss includes an n-th of the penalty): KMeans or MiniBatchKMeans;
            LogisticRegression; LinearSVC; LinearRegression, Ridge, Lasso or ElasticNet; a Pipeline that ends with one of these; or "hinge" or
            "squared_hinge", for LinearSVC of that loss alone (`model="linear_svm"` becomes one); or None: the loss of a `model` given
            by name.
        k: the most samples to take, 1 <= k <= n.
        method: how subsets are drawn. "caratheodory": column sums match exactly, by `caratheodory` with max_size k on a
            random order. "importance": a sample's chance is the largest share that it has of a column. "median_of_means": the one of
            a hundred uniform samples whose column means are nearest to those of all samples. "uniform": uniform samples.
        n_initial: the number of first models, >= 1.
        patience: the number of rounds without gain to end after, >= 1.
        groups: [n] labels, integers, strings or other values that can be sorted. Column sums match in each group, and the weights of a group sum to its size; each group has k // G samples
            in a subset, the remainder goes to the largest group. None: the classes of a classifier, with budgets that favour small
            classes: each has the mean of its shares by p, |log p| and exp(-p), where p is the class's share of all samples. False: no groups.
        seed: 0 <= seed < 2^64. Models have random states of their own; models given by name take theirs from `seed`.
        progress: None, True or a callable(done, total) of columns; `total` is the largest possible number.
        n_clusters: of "kmeans" given by name, >= 1; default 8.
        x_test, y_test: a test set, whose loss is told for each fit's model and decides nothing.

    Returns:
        Coreset: `indices` ascending, at most k, distinct; `weights` > 0, their sum is n (float32 if x is); and `info`:
        "losses" (the total loss of every fit's model on all samples, in order), "fits" and "rounds" (how many, with and
        without the first), "best" (which fit won), "loss" (its total), "stopped" ("patience" or "columns"), "unconverged" (how many fits warned that they did not converge), "seconds"; with
        groups "budgets", a dict of label to count; with a test set "test_losses" and "test_loss", the same totals over the test samples.

    Warns:
        ConvergenceWarning: if fits of scikit-learn's models did not converge, once.

    Raises:
        TypeError: for arguments of a wrong type, a model without sample weights, and a named loss that does not belong
            to the model.
        ValueError: for options out of range, x and y of different lengths, a loss that is NaN, infinite, negative or not
            [n], k below the number of classes or groups, and subsets that lack a class in all draws.

    Source: Maalouf, Tukan, Braverman and Rus, "AutoCoreset: an automatic practical coreset construction framework",
    ICML 2023. The published code returns duplicates, weights of 0, and weights that sum to 0.41 to 2.08 n.

    Example:
        >>> import numpy as np, flashcoreset as fc
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1000, 5))
        >>> y = x @ np.arange(5) + rng.standard_normal(1000)
        >>> coreset = fc.autocoreset(x, y, "linear_regression", None, 50)
        >>> len(coreset.indices), round(float(coreset.weights.sum()), 6)
        (50, 1000.0)
    """
    one_of(method, "method", tuple(METHODS))
    k, n_initial, patience = (
        _at_least_one(value, name)
        for value, name in ((k, "k"), (n_initial, "n_initial"), (patience, "patience"))
    )
    seed = as_integer(seed, "seed")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    check_progress(progress)
    named = model if isinstance(model, str) else None
    clusters = _clusters(n_clusters, named)
    model, losses_of = _model_and_loss(model, loss, seed, clusters)
    fits = Fits(model)
    samples = _Samples(x, y)
    test = _test_samples(x_test, y_test, samples)
    n = samples.n
    if k > n:
        raise ValueError(f"k must be <= the {n} samples, got {k}")
    if named == "kmeans" and k < clusters:
        raise ValueError(f"k must be >= the {clusters} clusters of kmeans, got {k}")
    codes = class_codes(model, samples.y)
    if codes is not None and k <= codes.max():
        raise ValueError(f"k must be >= the {codes.max() + 1} classes of y, got {k}")
    labels, members = _groups(groups, samples, codes)
    if k < len(members):
        raise ValueError(f"k must be >= the {len(members)} groups, got {k}")
    share_out = class_budgets if groups is None else equal_budgets
    budgets = share_out([len(rows) for rows in members], k)
    # A group that is taken as a whole needs no matching.
    tightest = min((b for b, rows in zip(budgets, members, strict=True) if b < len(rows)), default=None)

    threadpool_limits = imported("threadpoolctl").threadpool_limits
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    # Column by column in memory, and room for more, so that none is copied when another follows.
    held = np.empty((n, 16), order="F")
    totals: list[float] = []
    test_totals: list[float] = []
    best: tuple[np.ndarray, np.ndarray] | None = None
    stopped, since = "columns", 0
    # The number of threads would change the last digits of fits.
    with threadpool_limits(1), Progress(progress, max(n_initial, tightest or 1), "autocoreset") as bar:
        while True:
            first = len(totals) < n_initial
            if not first and (tightest is None or len(totals) >= tightest):
                break
            if first:
                rows, weights = uniform_with_classes(codes, members, budgets, rng)
                if _lacks_a_class(codes, rows):
                    raise ValueError(_too_few(k, "the first subset"))
            else:
                rows, weights = _draw(method, held[:, : len(totals)], members, budgets, codes, rng)
            fit = fits.fit(*samples.take(rows), weights)
            column = _checked(losses_of(fit, samples.x, samples.y), n)
            if len(totals) == held.shape[1]:
                held = np.concatenate([held, np.empty_like(held)], 1)
            held[:, len(totals)] = column
            total = _total(column)
            if test is not None:
                test_totals.append(_total(_checked(losses_of(fit, test.x, test.y), test.n)))
            improved = not totals or total < min(totals)
            totals.append(total)
            if improved:
                best = rows, weights
            bar.update(len(totals))
            since = 0 if improved or first else since + 1
            if since == patience:
                stopped = "patience"
                break
    assert best is not None
    info: dict[str, Any] = {
        "losses": totals,
        "fits": len(totals),
        "rounds": len(totals) - n_initial,
        "best": int(np.argmin(totals)),
        "loss": min(totals),
        "stopped": stopped,
        "unconverged": fits.unconverged,
        "seconds": time.perf_counter() - start,
    }
    fits.warn_if_unconverged()
    if test is not None:
        info |= {"test_losses": test_totals, "test_loss": test_totals[info["best"]]}
    if labels is not None:
        info["budgets"] = dict(zip(labels, budgets, strict=True))
    indices = torch.from_numpy(best[0]).to(samples.device)
    return Coreset(indices, torch.from_numpy(best[1]).to(samples.device, samples.dtype), info)


class _Samples:
    """x and y as models take them."""

    def __init__(self, x: Any, y: Any, suffix: str = "") -> None:
        x_name, y_name = f"x{suffix}", f"y{suffix}"
        self.device = x.device if isinstance(x, Tensor) else torch.device("cpu")
        self.x = _rows(x, x_name)
        self.y = None if y is None else _rows(y, y_name)
        self.n = self.x.shape[0]
        if self.n == 0:
            raise ValueError(f"{x_name} must have at least 1 sample, got 0")
        if self.y is not None and self.y.shape[0] != self.n:
            raise ValueError(
                f"{y_name} must have {self.n} entries as {x_name} has samples, got {self.y.shape[0]}"
            )
        narrow = getattr(self.x, "dtype", None) in (np.float16, np.float32)
        self.dtype = torch.float32 if narrow else torch.float64

    def take(self, rows: np.ndarray) -> tuple[Any, Any]:
        return _at(self.x, rows), None if self.y is None else _at(self.y, rows)


def _rows(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    elif hasattr(value, "tocsr"):
        value = value.tocsr()
    elif name == "x" and is_array(value) and not _is_frame(value) and not isinstance(value, np.ndarray):
        # Row by row in memory, as other arrays are: models sum in the order of memory.
        value = np.ascontiguousarray(as_array(value, name))
    elif not hasattr(value, "iloc"):
        try:
            value = np.asarray(value)
        except ValueError:
            raise ValueError(f"{name} must be an array, got a nested list of unequal lengths") from None
    if not value.shape:
        raise TypeError(f"{name} must be an array of samples, got {value!r}")
    return value


def _is_frame(value: Any) -> bool:
    """Whether a value is a pandas frame, which models take as it is."""
    return hasattr(value, "iloc") and value.ndim == 2


def _at(value: Any, rows: np.ndarray) -> Any:
    return value.iloc[rows] if hasattr(value, "iloc") else value[rows]


def _test_samples(x: Any, y: Any, samples: _Samples) -> _Samples | None:
    if x is None:
        if y is not None:
            raise ValueError("y_test needs x_test, got x_test=None")
        return None
    if (y is None) != (samples.y is None):
        raise ValueError(
            f"y_test must be given with x_test if y is, got y_test={'None' if y is None else type(y).__name__} and "
            f"y={'None' if samples.y is None else type(samples.y).__name__}"
        )
    test = _Samples(x, y, "_test")
    if test.x.shape[1:] != samples.x.shape[1:]:
        raise ValueError(
            f"x_test must have samples of the shape {tuple(samples.x.shape[1:])} as x, got {tuple(test.x.shape[1:])}"
        )
    return test


def _clusters(n_clusters: Any, named: str | None) -> int:
    if n_clusters is None:
        return CLUSTERS
    if named != "kmeans":
        what = "an object, which has its own" if named is None else repr(named)
        raise ValueError(f"n_clusters is for model 'kmeans', got model {what}")
    return _at_least_one(n_clusters, "n_clusters")


def _model_and_loss(model: Any, loss: Any, seed: int, clusters: int) -> tuple[Any, Loss]:
    names = tuple(LOSSES)
    if isinstance(model, str):
        one_of(model, "model", names)
    else:
        weight_arguments(model)  # which refuses what is no model
    if loss is None:
        if not isinstance(model, str):
            raise TypeError(
                f"loss must be a callable(model, X, y) or one of {', '.join((*names, *HINGES))} if model is an object, got "
                "None"
            )
        loss = model
    if isinstance(model, str):
        hinge = {"hinge": loss} if isinstance(loss, str) and loss in HINGES else {}
        model = make_model(model, seed, clusters=clusters, **hinge)
    if callable(loss):
        return model, loss
    one_of(loss, "loss", (*names, *HINGES))
    return model, named_loss(loss, model)


def _groups(
    groups: Any, samples: _Samples, classes: np.ndarray | None
) -> tuple[list[Any] | None, list[np.ndarray]]:
    """The labels, ascending, and the rows of each; `classes` [n] are those of a classifier as 0, 1, ..., or None."""
    if groups is True:
        raise TypeError(
            "groups must be labels [n], None (the classes of a classifier) or False (none), got True"
        )
    if groups is None and classes is not None:
        labels, codes = np.unique(np.asarray(samples.y)).tolist(), classes
    elif groups is None or groups is False:
        return None, [np.arange(samples.n)]
    else:
        device = groups.device if isinstance(groups, Tensor) else torch.device("cpu")
        given = as_labels(groups, "groups", device, samples.n)
        labels = given.present()
        _, codes = np.unique(given.codes.cpu().numpy(), return_inverse=True)
    return labels, [np.flatnonzero(codes == place) for place in range(len(labels))]


def _draw(
    method: str,
    columns: np.ndarray,
    members: list[np.ndarray],
    budgets: list[int],
    codes: np.ndarray | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A subset in which no class is missing."""
    for _ in range(_REDRAWS):
        rows, weights = in_groups(method, columns, members, budgets, rng)
        if not _lacks_a_class(codes, rows):
            return rows, weights
    raise ValueError(_too_few(sum(budgets), f"{_REDRAWS} subsets"))


def _lacks_a_class(codes: np.ndarray | None, rows: np.ndarray) -> bool:
    return codes is not None and len(np.unique(codes[rows])) <= codes.max()


def _too_few(k: int, what: str) -> str:
    return f"k must be large enough for every class, got {k}, of which {what} lacked one; pass groups=y"


def _checked(losses: Any, n: int) -> np.ndarray:
    """The losses [n] float64, checked to be finite and >= 0."""
    if isinstance(losses, Tensor):
        losses = losses.detach().cpu()
        losses = (losses if losses.is_complex() else losses.double()).numpy()
    try:
        array = np.asarray(losses)
        if array.dtype.kind == "c":
            raise TypeError
        values = array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"loss must return real numbers [{n}], got {type(losses).__name__}") from None
    if values.shape != (n,):
        raise ValueError(f"loss must return shape ({n},), one number per sample, got {values.shape}")
    bad = ~(values >= 0) | np.isinf(values)
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"loss must be finite and >= 0, got {values[i]} for sample {i}")
    return values


def _total(column: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        total = float(column.sum())
    if not total * len(column) < np.inf:
        raise ValueError(f"loss: the total over all samples, {total:.3g}, is too large; scale losses down")
    return total


def _at_least_one(value: Any, name: str) -> int:
    number = as_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} must be >= 1, got {number}")
    return number
