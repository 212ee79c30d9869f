"""scikit-learn's models with sample weights, and the per-sample losses that they minimise, by name."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from flashcoreset._core.errors import ConvergenceWarning, warn_caller
from flashcoreset._core.imports import imported

Loss = Callable[[Any, Any, Any], Any]
CLUSTERS = 8  # clusters of "kmeans", unless the caller names another number
HINGES = ("hinge", "squared_hinge")  # losses of LinearSVC, by its own names
_CHUNK = 2**16  # numbers of a dense copy of some samples

# The models whose losses the names stand for, by their place in scikit-learn. Subclasses may minimise something else.
ESTIMATORS = {
    "kmeans": ("cluster.KMeans", "cluster.MiniBatchKMeans"),
    "logistic_regression": ("linear_model.LogisticRegression",),
    "linear_svm": ("svm.LinearSVC",),
    "linear_regression": (
        "linear_model.LinearRegression",
        "linear_model.Ridge",
        "linear_model.Lasso",
        "linear_model.ElasticNet",
    ),
}


@np.errstate(over="ignore")  # what is infinite is refused later
def squared_distances(model: Any, x: Any, y: Any) -> np.ndarray:
    """The squared distances [n] to the nearest centre."""
    n = x.shape[0]
    centers = model.cluster_centers_.astype(np.float64)
    middle = centers.mean(0)
    centers -= middle  # squares of large coordinates would swallow small distances
    norms = np.square(centers).sum(1)
    losses = np.empty(n)
    step = max(1, _CHUNK // max(centers.shape))
    for begin in range(0, n, step):
        points = _dense(x, slice(begin, begin + step)) - middle
        nearest = (norms - 2 * points @ centers.T).argmin(1)
        losses[begin : begin + step] = np.square(points - centers[nearest]).sum(1)
    return losses


def log_losses(model: Any, x: Any, y: Any) -> np.ndarray:
    """The cross-entropies [n] in nats times the weights of classes, each with an n-th of the penalty / C."""
    z, own = _decisions(model, x, y)
    _check_multi_class(model, len(model.classes_))
    if z.shape[1] == 1:
        losses = np.logaddexp(0, np.where(own == 1, -z[:, 0], z[:, 0]))
    else:
        above = z - z[np.arange(len(z)), own][:, None]
        above[np.arange(len(z)), own] = -np.inf
        top = above.max(1)
        losses = np.logaddexp(0, top + np.log(np.exp(above - top[:, None]).sum(1)))
    l1, l2 = np.abs(model.coef_).sum(), np.square(model.coef_).sum() / 2
    if model.solver == "liblinear" and model.fit_intercept:
        l1, l2 = _with_intercept(model, l1, l2)
    ratio = _l1_ratio(model)
    penalty = 0.0 if ratio is None else (ratio * l1 + (1 - ratio) * l2) / model.C
    return losses * _class_weights(model, y)[own] + penalty / len(z)


def _l1_ratio(model: Any) -> float | None:
    """The share of the l1 norm in LogisticRegression's penalty; None if it has no penalty."""
    # Newer releases give the kind of the penalty by l1_ratio and C alone.
    penalty = getattr(model, "penalty", "deprecated")
    if penalty is None:
        return None
    if penalty in ("l1", "l2"):
        return float(penalty == "l1")
    return model.l1_ratio or 0.0


def _check_multi_class(model: Any, classes: int) -> None:
    """Refuses two ways in which releases before 1.8 can fit: each class against the rest, and two classes as if they were several."""
    other = (
        (("multi_class", "multinomial"),)
        if classes == 2
        else (("multi_class", "ovr"), ("solver", "liblinear"))
    )
    for name, value in other:
        if getattr(model, name, None) == value:
            raise ValueError(
                f"loss 'logistic_regression' is that of scikit-learn's default for {classes} classes, got "
                f"{name}={value!r}; leave {name} out or pass a callable(model, X, y)"
            )


@np.errstate(over="ignore")  # what is infinite is refused later
def hinge_losses(model: Any, x: Any, y: Any) -> np.ndarray:
    """The squared or plain hinge losses [n] times the weights of classes, each with an n-th of the penalty / C; with more
    than two classes, the sum over the problems of each against the rest, or Crammer and Singer's."""
    z, own = _decisions(model, x, y)
    weights = _class_weights(model, y)
    l1, l2 = np.abs(model.coef_).sum(), np.square(model.coef_).sum() / 2
    if model.fit_intercept:
        l1, l2 = _with_intercept(model, l1, l2)
    rows = np.arange(len(z))
    if model.multi_class == "crammer_singer":
        # liblinear gets neither penalty nor loss here. For two classes their difference is kept, and each class has half of it.
        penalty = l2 / 2 if z.shape[1] == 1 else l2
        if z.shape[1] == 1:
            violations = 1 - np.where(own == 1, z[:, 0], -z[:, 0])
        else:
            violations = 1 + z - z[rows, own][:, None]
            violations[rows, own] = 0
            violations = violations.max(1)
        losses = np.maximum(0, violations) * weights[own]
    else:
        penalty = l1 if model.penalty == "l1" else l2
        if z.shape[1] == 1:
            signs, cost = np.where(own == 1, 1, -1)[:, None], weights[own][:, None]
        else:
            # The rest has a weight of 1, whatever the weights of its classes.
            is_own = np.arange(z.shape[1]) == own[:, None]
            signs, cost = np.where(is_own, 1, -1), np.where(is_own, weights, 1)
        hinge = np.maximum(0, 1 - signs * z)
        losses = (cost * (np.square(hinge) if model.loss == "squared_hinge" else hinge)).sum(1)
    return losses + penalty / (model.C * len(z))


def _with_intercept(model: Any, l1: float, l2: float) -> tuple[float, float]:
    """The penalties of liblinear, for which the intercept is the weight of one more feature, a constant."""
    weights = np.asarray(model.intercept_, dtype=np.float64) / model.intercept_scaling
    return l1 + np.abs(weights).sum(), l2 + np.square(weights).sum() / 2


@np.errstate(over="ignore")  # what is infinite is refused later
def squared_errors(model: Any, x: Any, y: Any) -> np.ndarray:
    """The squared errors [n], summed over the targets if there are several, each with an n-th of the penalty. Their sum is twice the
    objective of `Lasso` and `ElasticNet` times n, which halve the mean of the squares."""
    n = x.shape[0]
    targets, predictions = (
        np.asarray(values, dtype=np.float64).reshape(n, -1) for values in (y, model.predict(x))
    )
    if targets.shape != predictions.shape:
        raise ValueError(
            f"y must have {predictions.shape[1]} targets as model predicts, got {targets.shape[1]}"
        )
    losses = np.square(predictions - targets).sum(1)
    kind, coef = type(model).__name__, model.coef_
    if kind == "LinearRegression":
        return losses
    if kind == "Ridge":
        squares = np.square(np.atleast_2d(coef)).sum(1)  # of each target
        return losses + (np.ravel(model.alpha) * squares).sum() / n
    if hasattr(coef, "toarray"):
        coef = coef.toarray()
    ratio = 1.0 if kind == "Lasso" else model.l1_ratio
    return losses + model.alpha * (2 * ratio * np.abs(coef).sum() + (1 - ratio) * np.square(coef).sum())


def _dense(x: Any, rows: slice) -> np.ndarray:
    some = x.iloc[rows] if hasattr(x, "iloc") else x[rows]
    return np.asarray(some.toarray() if hasattr(some, "toarray") else some, dtype=np.float64)


def _decisions(model: Any, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """The decision function [n, classes], or [n, 1] for two, and the places [n] of the samples' classes."""
    if np.ndim(y) != 1 or len(y) != x.shape[0]:
        raise ValueError(f"y must have shape [{x.shape[0]}], one class per sample, got {np.shape(y)}")
    z = np.asarray(model.decision_function(x), dtype=np.float64)
    return z.reshape(len(z), -1), _class_places(model, y)


def _class_places(model: Any, y: Any) -> np.ndarray:
    places = np.searchsorted(model.classes_, y).clip(max=len(model.classes_) - 1)
    unknown = model.classes_[places] != y
    if unknown.any():
        raise ValueError(
            f"model knows no class {np.asarray(y)[unknown][0]}, which none of the samples it was fitted on has; "
            "pass groups=y to have every class in the subset"
        )
    return places


def _class_weights(model: Any, y: Any) -> np.ndarray:
    """The weight of each of the model's classes; "balanced" weights are computed from all samples."""
    compute_class_weight = imported("sklearn.utils.class_weight").compute_class_weight
    weights = compute_class_weight(model.class_weight, classes=model.classes_, y=np.asarray(y))
    return np.asarray(weights, dtype=np.float64)


LOSSES: dict[str, Loss] = {
    "kmeans": squared_distances,
    "logistic_regression": log_losses,
    "linear_svm": hinge_losses,
    "linear_regression": squared_errors,
}


def named_loss(name: str, model: Any) -> Loss:
    """The loss of a name for the kind of `model`, or of the last step of a Pipeline; raises TypeError if the model minimises
    something else."""
    if _is_pipeline(model):
        loss = named_loss(name, model.steps[-1][1])
        return lambda fit, x, y: loss(fit.steps[-1][1], fit[:-1].transform(x), y)
    kind = "linear_svm" if name in HINGES else name
    places = [place.split(".") for place in ESTIMATORS[kind]]
    if not any(type(model) is getattr(imported(f"sklearn.{m}"), c) for m, c in places):
        raise TypeError(
            f"loss {name!r} is what scikit-learn's own {' or '.join(c for _, c in places)} minimises, got "
            f"{type(model).__module__}.{type(model).__qualname__}; pass a callable(model, X, y) for it"
        )
    if name in HINGES and (model.loss != name or model.multi_class == "crammer_singer"):
        raise TypeError(
            f"loss {name!r} is what LinearSVC(loss={name!r}) minimises, got one with loss={model.loss!r}, "
            f"multi_class={model.multi_class!r}; pass loss='linear_svm', which is whatever it minimises"
        )
    return LOSSES[kind]


def make_model(name: str, seed: int, *, clusters: int = CLUSTERS, hinge: str = "squared_hinge") -> Any:
    """The model of a name, not fitted."""
    if name == "kmeans":
        return imported("sklearn.cluster").KMeans(n_clusters=clusters, n_init=3, random_state=seed % 2**32)
    if name == "linear_regression":
        return imported("sklearn.linear_model").LinearRegression()
    if (
        name == "linear_svm" and hinge == "hinge"
    ):  # which liblinear solves in its dual form alone, in random order
        svm = imported("sklearn.svm")
        return svm.LinearSVC(loss=hinge, dual=True, max_iter=10_000, random_state=seed % 2**32)
    if name == "linear_svm":
        # The model makes no use of a random state, but without one it would take a number from NumPy's global state.
        return imported("sklearn.svm").LinearSVC(dual=False, max_iter=10_000, random_state=seed % 2**32)
    return imported("sklearn.linear_model").LogisticRegression(max_iter=10_000)


def weight_arguments(model: Any) -> list[str]:
    """The arguments of the model's fit that take the samples' weights: `sample_weight`, and for a Pipeline that of each step whose fit
    has it.

    Raises:
        TypeError: for what is no model, and for one whose fit takes no weights.
        ValueError: for a search that keeps no model.
    """
    fit = getattr(model, "fit", None)
    if isinstance(model, type) or not callable(fit):
        raise TypeError(
            f"model must be one of {', '.join(LOSSES)} or an object with fit(X, y, sample_weight=...), got "
            f"{model.__name__ + ', a class' if isinstance(model, type) else type(model).__name__}"
        )
    if _is_routed():
        return ["sample_weight"]  # which scikit-learn hands on to those that asked for it
    if _is_pipeline(model):
        name, last = model.steps[-1]
        if last is None or isinstance(last, str):
            raise TypeError(
                f"model must end with an estimator, got a Pipeline whose last step, {name!r}, is {last!r}"
            )
        steps = [
            (step, part)
            for step, part in model.steps[:-1]
            if hasattr(part, "fit") and (_is_pipeline(part) or "sample_weight" in _parameters(part))
        ]
        found = []
        for step, part in [*steps, (name, last)]:
            found += [f"{step}__{argument}" for argument in _of_step(part, step, part is last)]
        return found
    if _is_search(model):
        if not model.refit:
            raise ValueError(
                f"model must keep the best model that it finds, got {type(model).__name__}(refit=False); pass refit=True"
            )
        return weight_arguments(model.estimator)
    parameters = _parameters(model)
    if "sample_weight" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"model must have fit(X, y, sample_weight=...), got {type(model).__name__}, whose fit takes "
            f"{', '.join(parameters) or 'nothing'}"
        )
    return ["sample_weight"]


def _of_step(part: Any, step: str, is_last: bool) -> list[str]:
    """`weight_arguments` of a Pipeline's step; none if it is not the last one, and takes none."""
    try:
        return weight_arguments(part)
    except TypeError as error:
        if not is_last:
            return []
        raise TypeError(f"{error}, as the last step, {step!r}, of a Pipeline") from None


def _parameters(model: Any) -> Any:
    return inspect.signature(model.fit).parameters


def _sklearn_class(module: str, name: str) -> Any:
    """A class of scikit-learn, or a tuple of none if nothing of that module can be around."""
    return getattr(sys.modules.get(module), name, ())


def _is_pipeline(model: Any) -> bool:
    return isinstance(model, _sklearn_class("sklearn.pipeline", "Pipeline"))


def _is_search(model: Any) -> bool:
    return isinstance(model, _sklearn_class("sklearn.model_selection._search", "BaseSearchCV"))


def _is_routed() -> bool:
    """Whether scikit-learn's own routing of weights is switched on."""
    sklearn: Any = sys.modules.get("sklearn")
    return sklearn is not None and bool(sklearn.get_config().get("enable_metadata_routing", False))


class Fits:
    """Fits copies of `model` to weighted samples, and counts those that did not converge."""

    def __init__(self, model: Any) -> None:
        self._model, self._arguments = model, weight_arguments(model)
        self._is_sklearn = type(model).__module__.partition(".")[0] == "sklearn"
        self._warned: set[tuple[type[Warning], str]] = set()
        self._count = 0
        self.unconverged = 0

    def fit(self, x: Any, y: Any, weights: np.ndarray) -> Any:
        """A fitted copy. Warnings that a fit did not converge are counted; others of scikit-learn's models are given
        at the line that called the library, once for all fits, and those of other models where they come from."""
        if hasattr(self._model, "get_params"):
            fresh = imported("sklearn.base").clone(self._model)
        else:
            fresh = copy.deepcopy(self._model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fresh.fit(x, y, **dict.fromkeys(self._arguments, weights))
            except (TypeError, ValueError) as error:
                if "sample_weight" not in str(error):
                    raise
                raise TypeError(
                    f"model must hand sample_weight on to its estimators, which {type(self._model).__name__} does if scikit-learn's routing "
                    "is on: sklearn.set_config(enable_metadata_routing=True), and set_fit_request(sample_weight=True) of the "
                    f"estimators inside; its fit said: {error}"
                ) from error
        self._count += 1
        not_converged = _sklearn_class("sklearn.exceptions", "ConvergenceWarning")
        self.unconverged += any(issubclass(warning.category, not_converged) for warning in caught)
        for warning in caught:
            if issubclass(warning.category, not_converged):
                continue
            kind = warning.category, str(warning.message)
            if not self._is_sklearn:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            elif kind not in self._warned:
                self._warned.add(kind)
                warn_caller(kind[1], kind[0])
        return fresh

    def warn_if_unconverged(self) -> None:
        if not self.unconverged:
            return
        limit = getattr(self._model, "max_iter", None)
        raised = "max_iter" if limit is None else f"max_iter, now {limit}"
        warn_caller(
            f"{self.unconverged} of {self._count} fits of {type(self._model).__name__} stopped before they converged, so that their losses are "
            f"not the least; raise its {raised}, or scale x",
            ConvergenceWarning,
        )


def class_codes(model: Any, y: Any) -> np.ndarray | None:
    """The classes [n] of `y` as 0, 1, ..., or None if the model is not a classifier."""
    if y is None or np.ndim(y) != 1:
        return None
    kind = np.asarray(y).dtype.kind
    if hasattr(model, "__sklearn_tags__"):
        if not imported("sklearn.base").is_classifier(model):
            return None
    elif kind not in "biuUSO":
        return None
    return np.unique(np.asarray(y), return_inverse=True)[1]
