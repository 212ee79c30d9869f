"""submodlib.helper: similarity kernels, in the precision of the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.cluster import Birch
from sklearn.neighbors import NearestNeighbors

from flashcoreset.compat._points import as_points
from flashcoreset.compat.submodlib._similarity import similarities
from flashcoreset.pairwise.backend import choose

# Which metrics each method of submodlib has, and what it says of others.
_METHODS = {
    "sklearn": (
        ("euclidean", "cosine", "dot"),
        "ERROR: unsupported metric for this method of kernel creation",
    ),
    "scipy": (("euclidean", "cosine"), "ERROR: unsupported metric"),
    "np": (("euclidean", "cosine", "dot"), "ERROR: unsupported metric"),
    "np_numba": (("euclidean", "cosine"), "ERROR: unsupported metric"),
    "rowwise": (("euclidean", "cosine", "dot"), "Unsupported metric for this method of kernel creation"),
    "other": (("euclidean", "cosine"), "Unsupported metric for this method of kernel creation"),
}
_BLOCK = 2**22


def create_kernel(
    X: Any,
    metric: str,
    mode: str = "dense",
    num_neigh: int = -1,
    n_jobs: int = 1,
    X_rep: Any = None,
    method: str = "sklearn",
) -> Any:
    """Similarities of the rows of X.

    Args:
        X: [n, d].
        metric: "cosine" (0 for a zero row), "euclidean" (exp(-distance / d)) or "dot".
        mode: "dense" or "sparse" (nearest neighbours alone).
        num_neigh: how many neighbours, for "sparse"; -1 for all.
        n_jobs: for scikit-learn's search of neighbours.
        X_rep: [m, d] rows of the kernel in the place of X, for "dense".
        method: submodlib's name of the way of computing. "other" makes squared cosines and largest minus squared distance; the
            rest have the same values and differ in which metrics they have.

    Returns:
        [n, n] or [m, n], float32 for float32, otherwise float64; a SciPy CSR matrix for "sparse".
    """
    X = as_points(X, "X")
    if X_rep is not None:
        X_rep = as_points(X_rep, "X_rep")
        assert X_rep.shape[1] == X.shape[1]
    if mode == "dense":
        return _dense(X, metric, X_rep, method).numpy()
    if mode == "sparse":
        if X_rep is not None:
            raise Exception("Sparse mode is not supported for separate X_rep")
        return create_sparse_kernel(X, metric, num_neigh, n_jobs, method)
    raise Exception("ERROR: unsupported mode")


def create_sparse_kernel(
    X: Any, metric: str, num_neigh: int, n_jobs: int = 1, method: str = "sklearn"
) -> scipy.sparse.csr_matrix:
    """Similarities [n, n] to the `num_neigh` nearest rows, the row itself among them; see `create_kernel`."""
    X = as_points(X, "X")
    n = X.shape[0]
    if num_neigh > n:
        raise Exception("ERROR: num of neighbors can't be more than no of datapoints")
    if method not in ("sklearn", "np_numba"):
        raise Exception("For creating sparse kernel, only 'sklearn' and 'np_numba' methods are supported")
    count = n if num_neigh == -1 else num_neigh
    _check_metric(metric, method)
    found = NearestNeighbors(n_neighbors=count, metric=metric, n_jobs=n_jobs).fit(X.numpy())
    column = np.sort(found.kneighbors(X.numpy(), return_distance=False), axis=1)
    value = np.empty(column.shape, dtype=X.numpy().dtype)
    step = max(1, _BLOCK // n)
    for begin in range(0, n, step):
        rows = slice(begin, begin + step)
        value[rows] = np.take_along_axis(_dense(X, metric, X[rows], method).numpy(), column[rows], axis=1)
    crow = np.arange(0, n * count + 1, count)
    kernel = scipy.sparse.csr_matrix((value.reshape(-1), column.reshape(-1), crow), shape=(n, n))
    kernel.eliminate_zeros()
    return kernel


def create_cluster_kernels(
    X: Any, metric: str, cluster_lab: Any = None, num_cluster: int | None = None, onlyClusters: bool = False
) -> tuple[list[set[int]], list[np.ndarray] | None, list[int] | None]:
    """The members of each cluster, their similarities, and the place of each row within its cluster.

    Args:
        X: [n, d].
        metric: "cosine" or "euclidean".
        cluster_lab: [n] labels; None: scikit-learn's Birch makes them.
        num_cluster: how many clusters; needed with labels.
        onlyClusters: leave out the rest.
    """
    X = as_points(X, "X")
    if cluster_lab is None:
        birch = Birch(n_clusters=num_cluster).fit(X.numpy())
        labels = birch.predict(X.numpy()).tolist()
        count = len(birch.subcluster_labels_) if num_cluster is None else num_cluster
    elif num_cluster is None:
        raise Exception("ERROR: num_cluster needs to be specified if cluster_lab is provided")
    else:
        labels, count = list(cluster_lab), num_cluster
    clusters: list[set[int]] = [set() for _ in range(count)]
    places = []
    for i, label in enumerate(labels):
        places.append(len(clusters[label]))
        clusters[label].add(i)
    if onlyClusters:
        return clusters, None, None
    if metric not in ("euclidean", "cosine"):
        raise Exception("ERROR: unsupported metric")
    kernels = []
    for members in clusters:
        rows = X[torch.tensor(sorted(members), dtype=torch.int64)]
        kernels.append(_dense(rows, metric, None, "sklearn").numpy() if members else np.zeros((0, 0)))
    return clusters, kernels, places


def _check_metric(metric: str, method: str) -> None:
    metrics, message = _METHODS[method]
    if metric not in metrics:
        raise Exception(message)


def _dense(X: torch.Tensor, metric: str, X_rep: torch.Tensor | None, method: str) -> torch.Tensor:
    """[m, n] for rows X_rep [m, d] (default X) and columns X [n, d]."""
    if method not in _METHODS:
        raise KeyError(f"create_kernel_dense_{method}")
    if not (
        method == "np_numba" and X_rep is not None and metric == "dot"
    ):  # its form for X_rep has one metric more
        _check_metric(metric, method)
    rows = X if X_rep is None else X_rep
    if method == "other":
        s = choose(None, X.device).pairwise(
            rows, X, metric="sqeuclidean" if metric == "euclidean" else "cosine"
        )
        return s.square_() if metric == "cosine" else s.max() - s
    return similarities(rows, X, metric)
