"""scikit-learn's models with sample weights, and the per-sample losses that they minimise, by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from flashcoreset._imports import imported

Loss = Callable[[Any, Any, Any], Any]
CLUSTERS = 8  # of "kmeans"


def squared_distances(model: Any, x: Any, y: Any) -> np.ndarray:
    """[n] squared distances to the nearest centre."""
    return model.transform(x).min(1) ** 2


def log_losses(model: Any, x: Any, y: Any) -> np.ndarray:
    """[n] cross-entropies in nats, each with an n-th of the penalty |coef|^2 / (2 C)."""
    z, own = model.decision_function(x), _class_places(model, y)
    if z.ndim == 1:
        losses = np.logaddexp(0, np.where(own == 1, -z, z))
    else:
        top = z.max(1)
        losses = top + np.log(np.exp(z - top[:, None]).sum(1)) - z[np.arange(len(z)), own]
    return np.maximum(losses, 0) + (model.coef_**2).sum() / (2 * model.C * len(z))


def squared_hinge_losses(model: Any, x: Any, y: Any) -> np.ndarray:
    """[n] squared hinge losses, summed over the classes where there are more than two, each with an n-th of the penalty
    (|coef|^2 + |intercept|^2) / (2 C)."""
    z, own = model.decision_function(x), _class_places(model, y)
    signs = (
        np.where(own == 1, 1, -1) if z.ndim == 1 else np.where(np.arange(z.shape[1]) == own[:, None], 1, -1)
    )
    losses = np.maximum(0, 1 - signs * z) ** 2
    penalty = (model.coef_**2).sum() + np.square(model.intercept_).sum()
    return losses.reshape(len(z), -1).sum(1) + penalty / (2 * model.C * len(z))


def squared_errors(model: Any, x: Any, y: Any) -> np.ndarray:
    """[n] squared errors, summed over the targets where there are several."""
    targets = np.asarray(y)
    return np.square(model.predict(x) - targets).reshape(len(targets), -1).sum(1)


def _class_places(model: Any, y: Any) -> np.ndarray:
    places = np.searchsorted(model.classes_, y).clip(max=len(model.classes_) - 1)
    unknown = model.classes_[places] != y
    if unknown.any():
        raise ValueError(
            f"model knows no class {np.asarray(y)[unknown][0]}, which none of the samples it was fitted on has; "
            "pass groups=y to have every class in the subset"
        )
    return places


LOSSES: dict[str, Loss] = {
    "kmeans": squared_distances,
    "logistic_regression": log_losses,
    "linear_svm": squared_hinge_losses,
    "linear_regression": squared_errors,
}


def named_loss(name: str) -> Loss:
    """The losses of a name, which raise TypeError for a model that has not what they are made of."""

    def loss(model: Any, x: Any, y: Any) -> Any:
        try:
            return LOSSES[name](model, x, y)
        except AttributeError as error:
            raise TypeError(
                f"loss {name!r} must be that of a model of its kind, got {type(model).__name__}: {error}"
            ) from None

    return loss


def make_model(name: str, seed: int) -> Any:
    """The model of a name, not fitted."""
    if name == "kmeans":
        return imported("sklearn.cluster").KMeans(n_clusters=CLUSTERS, n_init=3, random_state=seed % 2**32)
    if name == "linear_regression":
        return imported("sklearn.linear_model").LinearRegression()
    if name == "linear_svm":
        # It makes no use of it, but without one would take a number from NumPy's global state.
        return imported("sklearn.svm").LinearSVC(dual=False, max_iter=10_000, random_state=seed % 2**32)
    return imported("sklearn.linear_model").LogisticRegression(max_iter=10_000)


def check_model(model: Any) -> None:
    """Raises TypeError unless `model` has fit(X, y, sample_weight=...)."""
    fit = getattr(model, "fit", None)
    if isinstance(model, type) or not callable(fit):
        raise TypeError(
            f"model must be one of {', '.join(LOSSES)} or an object with fit(X, y, sample_weight=...), got "
            f"{model.__name__ + ', a class' if isinstance(model, type) else type(model).__name__}"
        )
    parameters = inspect.signature(fit).parameters
    if "sample_weight" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"model must have fit(X, y, sample_weight=...), got {type(model).__name__}, whose fit takes "
            f"{', '.join(parameters) or 'nothing'}"
        )


def fitted(model: Any, x: Any, y: Any, weights: np.ndarray) -> Any:
    """A copy of `model`, fitted to weighted samples."""
    is_sklearns = hasattr(model, "get_params")
    fresh = imported("sklearn.base").clone(model) if is_sklearns else copy.deepcopy(model)
    fresh.fit(x, y, sample_weight=weights)
    return fresh


def class_codes(model: Any, y: Any) -> np.ndarray | None:
    """[n] the classes of `y` as 0, 1, ..., or None where the model is no classifier."""
    if y is None or np.ndim(y) != 1:
        return None
    kind = np.asarray(y).dtype.kind
    if hasattr(model, "__sklearn_tags__"):
        if not imported("sklearn.base").is_classifier(model):
            return None
    elif kind not in "biuUSO":
        return None
    return np.unique(np.asarray(y), return_inverse=True)[1]
