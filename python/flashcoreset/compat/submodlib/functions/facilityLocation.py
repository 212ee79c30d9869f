"""submodlib's facility-location function."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch

from flashcoreset._core.tensor import as_integer
from flashcoreset.compat._points import as_points
from flashcoreset.compat.submodlib._objective import Clustered, Dense, Objective, Points, Sparse
from flashcoreset.compat.submodlib._similarity import (
    check_metric,
    mirrored,
    nearest,
    similarities,
    square,
)
from flashcoreset.compat.submodlib.functions.setFunction import SetFunction
from flashcoreset.compat.submodlib.helper import create_cluster_kernels

_PYBIND_MODES = ("list", "numpyarray", "array32", "array64", "array")


class FacilityLocationFunction(SetFunction):
    """f(X) = sum_{i in U} max(0, max_{j in X} s_ij), for elements j of the ground set and elements i of a represented set U.

    Args:
        n: elements of the ground set.
        mode: "dense", "sparse" (similarities to nearest neighbours alone) or "clustered" (sums within clusters).
        separate_rep: whether U is another set than the ground set; must be given with a dense `sijs`.
        n_rep: elements of that set.
        sijs: [n_rep or n, n] similarities, a NumPy array or (sparse) a SciPy CSR matrix or array.
        data: [n, d] features, from which similarities are computed in float32 if there are no `sijs`.
        data_rep: [n_rep, d] features of U.
        num_clusters, cluster_labels: for "clustered"; without labels, scikit-learn's Birch makes them.
        metric: "cosine", "euclidean" (exp(-distance / d)) or "dot".
        num_neighbors: for "sparse".
        create_dense_cpp_kernel_in_python, pybind_mode: checked; they make no difference here.

    `sijs` and `cluster_sijs` that were not given are computed when they are read: from points, cosine and dot products need no
    matrix of all pairs.
    """

    def __init__(
        self,
        n: int,
        mode: str,
        separate_rep: bool | None = None,
        n_rep: int | None = None,
        sijs: Any = None,
        data: Any = None,
        data_rep: Any = None,
        num_clusters: int | None = None,
        cluster_labels: Any = None,
        metric: str = "cosine",
        num_neighbors: int | None = None,
        create_dense_cpp_kernel_in_python: bool = True,
        pybind_mode: str = "array",
    ) -> None:
        self.n, self.n_rep, self.mode, self.metric = n, n_rep, mode, metric
        self.data, self.data_rep, self.num_neighbors = data, data_rep, num_neighbors
        self.separate_rep, self._sijs = separate_rep, sijs
        self.cluster_labels, self.num_clusters = cluster_labels, num_clusters
        self.clusters: list[set[int]] | None = None
        self.cluster_map: list[int] | None = None
        self._cluster_kernels: list[np.ndarray] | None = None
        self._in_cpp = not create_dense_cpp_kernel_in_python
        self._check_ground()
        self._check_clusters()
        if sijs is not None:
            self._check_kernel()
        elif data is not None:
            self._check_data()
        else:
            raise Exception("ERROR: Neither ground set data matrix nor similarity kernel provided")
        if separate_rep is None:
            self.separate_rep = False
        if mode == "dense" and pybind_mode not in _PYBIND_MODES and not self._in_cpp:
            raise Exception("Invalid pybind mode!")
        self._objective = self._of_kernel() if sijs is not None else self._of_data()
        self.effective_ground = set(range(n))

    @property
    def sijs(self) -> Any:
        """The similarities: those given, or float64 of those computed; None in the modes in which submodlib has none."""
        if self._sijs is None and self.mode != "clustered" and not self._in_cpp:
            data = as_points(self.data, "data", np.float32)
            if self.mode == "sparse":
                assert self.num_neighbors is not None
                self._sijs = nearest(data, self.metric, self.num_neighbors)
            else:
                self._sijs = self._dense_similarities().double().numpy()
        return self._sijs

    @property
    def cluster_sijs(self) -> list[list[list[float]]] | None:
        """The similarities within each cluster, as nested lists."""
        return (
            None if self._cluster_kernels is None else [kernel.tolist() for kernel in self._cluster_kernels]
        )

    def _check_ground(self) -> None:
        if self.n <= 0:
            raise Exception("ERROR: Number of elements in ground set must be positive")
        if self.mode not in ("dense", "sparse", "clustered"):
            raise Exception("ERROR: Incorrect mode. Must be one of 'dense', 'sparse' or 'clustered'")
        if self.separate_rep:
            if self.n_rep is None or self.n_rep <= 0:
                raise Exception(
                    "ERROR: separate represented intended but number of elements in represented not specified or not positive"
                )
            if self.mode != "dense":
                raise Exception("Only dense mode supported if separate_rep = True")

    def _check_clusters(self) -> None:
        if self.mode != "clustered":
            return
        labels, count = self.cluster_labels, self.num_clusters
        if labels is None:
            if count is not None and count <= 0:
                raise Exception("Invalid number of clusters provided")
            return
        if count is None or count <= 0:
            raise Exception(
                "ERROR: Positive number of clusters must be provided in clustered mode when cluster_labels is provided"
            )
        if len(labels) != self.n:
            raise Exception("ERROR: cluster_labels's size is NOT same as ground set size")
        if not all(0 <= label <= count - 1 for label in labels):
            raise Exception("Cluster IDs/labels contain invalid values")

    def _check_kernel(self) -> None:
        if self._in_cpp:
            raise Exception(
                "ERROR: create_dense_cpp_kernel_in_python is to be set to False ONLY when a similarity kernel is not "
                "provided and a CPP kernel is desired to be created in CPP"
            )
        if scipy.sparse.issparse(self._sijs) and self._sijs.format == "csr":
            if self.num_neighbors is None or self.num_neighbors <= 0:
                raise Exception("ERROR: Positive num_neighbors must be provided for given sparse kernel")
            if self.mode != "sparse":
                raise Exception("ERROR: Sparse kernel provided, but mode is not sparse")
        elif type(self._sijs) is np.ndarray:
            if self.separate_rep is None:
                raise Exception("ERROR: separate_rep bool must be specified with custom dense kernel")
            if self.mode != "dense":
                raise Exception("ERROR: Dense kernel provided, but mode is not dense")
        else:
            raise Exception("Invalid kernel provided")
        rows, columns = np.shape(self._sijs)
        if self.separate_rep:
            if columns != self.n or rows != self.n_rep:
                raise Exception(
                    "ERROR: Inconsistency between n_rep, n and no of rows, columns of given kernel"
                )
        elif rows != self.n or columns != self.n:
            raise Exception("ERROR: Inconsistentcy between n and dimensionality of given similarity kernel")
        if self.data is not None or self.data_rep is not None:
            print("WARNING: similarity kernel found. Provided data matrix will be ignored.")

    def _check_data(self) -> None:
        if self.separate_rep:
            if self.data_rep is None:
                raise Exception("Represented data matrix not given")
            if np.shape(self.data)[0] != self.n or np.shape(self.data_rep)[0] != self.n_rep:
                raise Exception(
                    "ERROR: Inconsistentcy between n, n_rep and no of examples in the given ground data matrix and "
                    "represented data matrix"
                )
        else:
            if self.data_rep is not None:
                print("WARNING: Represented data matrix not required but given, will be ignored.")
            if np.shape(self.data)[0] != self.n:
                raise Exception("ERROR: Inconsistentcy between n and no of examples in the given data matrix")
        if self.mode == "dense" and not self.separate_rep and self.num_neighbors is not None:
            raise Exception("num_neighbors wrongly provided for dense mode")
        if self.mode == "sparse":
            self.num_neighbors = as_integer(self.num_neighbors, "num_neighbors")
            if self.num_neighbors <= 0:
                raise ValueError(f"num_neighbors must be positive, got {self.num_neighbors}")
        if self.mode != "clustered":
            check_metric(self.metric)

    def _of_kernel(self) -> Objective:
        if self.mode == "dense":
            return Dense(self._sijs, "sijs")
        return Sparse(mirrored(self._sijs), "sijs")

    def _of_data(self) -> Objective:
        if self.mode == "sparse":
            return Sparse(mirrored(self.sijs), "data")
        if self.mode == "clustered":
            return self._of_clusters()
        data = as_points(self.data, "data", np.float32)
        clients = as_points(self.data_rep, "data_rep", np.float32) if self.separate_rep else None
        # A zero row has cosine 1 with itself in submodlib's square kernel, 0 in ours.
        if self.metric == "euclidean" or (
            self.metric == "cosine" and clients is None and not data.any(dim=1).all()
        ):
            return Dense(self._dense_similarities().numpy(), "data")
        return Points(data, clients, self.metric)

    def _dense_similarities(self) -> torch.Tensor:
        data = as_points(self.data, "data", np.float32)
        if self.separate_rep:
            return similarities(as_points(self.data_rep, "data_rep", np.float32), data, self.metric)
        return square(data, self.metric)

    def _of_clusters(self) -> Objective:
        self.clusters, self._cluster_kernels, self.cluster_map = create_cluster_kernels(
            self.data, self.metric, self.cluster_labels, self.num_clusters
        )
        assert self.clusters is not None
        assert self._cluster_kernels is not None
        labels = np.empty(self.n, dtype=np.int64)
        entries = []
        for label, (members, kernel) in enumerate(zip(self.clusters, self._cluster_kernels, strict=True)):
            rows = np.array(sorted(members), dtype=np.int64)
            labels[rows] = label
            # [candidate, client], where submodlib has [client, candidate]
            entries.append(
                (
                    kernel.T.astype(np.float32).reshape(-1),
                    np.repeat(rows, len(rows)),
                    np.tile(rows, len(rows)),
                )
            )
        values, candidates, clients = (np.concatenate(parts) for parts in zip(*entries, strict=True))
        x = scipy.sparse.csr_matrix((values, (candidates, clients)), shape=(self.n, self.n))
        return Clustered(x, labels, "data")
