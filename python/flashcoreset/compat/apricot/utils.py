"""apricot.utils: random states and similarities."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import KNeighborsTransformer

from flashcoreset.compat._points import as_points
from flashcoreset.pairwise.backend import choose


def check_random_state(seed: Any) -> np.random.RandomState:
    """A RandomState from None (NumPy's global one), a seed or a RandomState."""
    if seed is None or seed is np.random:
        return np.random.mtrand._rand
    if isinstance(seed, (numbers.Integral, np.integer)):
        return np.random.RandomState(int(seed))
    if isinstance(seed, np.random.RandomState):
        return seed
    raise ValueError(f"{seed!r} cannot be used to seed a numpy.random.RandomState instance")


def similarities(X: Any, Y: Any, metric: str, n_neighbors: Any = None) -> Any:
    """apricot's similarities of the rows of X to those of Y (None: X), float64.

    "euclidean": the largest squared distance less the squared distance. "cosine", "correlation": squares of them. Others of
    scikit-learn's: the largest distance less the distance. With `n_neighbors` (a number or a KNeighborsTransformer) a CSR matrix
    of the nearest rows alone, whose euclidean distances are not squared.
    """
    if metric == "precomputed":
        return X
    if n_neighbors is not None:
        return _of_neighbors(X, metric, n_neighbors)
    if metric in ("cosine", "correlation"):
        return _squared_cosines(X, Y, centered=metric == "correlation")
    if metric == "euclidean":
        x, y = as_points(X, "X", np.float64), None if Y is None else as_points(Y, "Y", np.float64)
        distance = choose(None, x.device).pairwise(x, y, metric="sqeuclidean").numpy()
    else:
        distance = pairwise_distances(X, Y=Y, metric=metric)
    return np.subtract(distance.max(), distance, out=distance)


def _squared_cosines(X: Any, Y: Any, centered: bool) -> np.ndarray:
    x, y = as_points(X, "X", np.float64), None if Y is None else as_points(Y, "Y", np.float64)
    if centered:
        x, y = x - x.mean(dim=1, keepdim=True), None if y is None else y - y.mean(dim=1, keepdim=True)
    s = choose(None, x.device).pairwise(x, y, metric="cosine")
    if y is None:
        s.fill_diagonal_(1.0)  # that of a zero row too
    return s.square_().numpy()


def _of_neighbors(X: Any, metric: str, n_neighbors: Any) -> scipy.sparse.csr_matrix:
    squared = metric in ("cosine", "correlation")
    if isinstance(n_neighbors, KNeighborsTransformer):
        transformer = n_neighbors
    elif isinstance(n_neighbors, numbers.Integral):
        transformer = KNeighborsTransformer(
            n_neighbors=int(n_neighbors), metric="precomputed" if squared else metric
        )
    else:
        raise TypeError(
            f"n_neighbors must be an int, a KNeighborsTransformer or None, got {type(n_neighbors).__name__}"
        )
    graph = transformer.fit_transform(
        1 - _squared_cosines(X, None, metric == "correlation") if squared else X
    )
    graph.data = (1 if squared else graph.data.max()) - graph.data
    return scipy.sparse.csr_matrix(graph)
