"""Similarities as submodlib computes them."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from flashcoreset.pairwise.backend import choose

METRICS = ("cosine", "euclidean", "dot")
_BLOCK = 2**22


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")


def similarities(rows: Tensor, columns: Tensor, metric: str) -> Tensor:
    """[n, m]: the cosine (0 for a zero row), exp(-distance / features), or the product."""
    kernels = choose(None, rows.device)
    if metric != "euclidean":
        return kernels.pairwise(rows, columns, metric=metric)
    distance = kernels.pairwise(rows, columns, metric="euclidean")
    return distance.mul_(-1 / rows.shape[1]).exp_()


def square(data: Tensor, metric: str) -> Tensor:
    """[n, n] of all pairs; a zero row has cosine 1 with itself."""
    s = similarities(data, data, metric)
    return s if metric == "dot" else s.fill_diagonal_(1.0)


def nearest(data: Tensor, metric: str, count: int) -> scipy.sparse.csr_matrix:
    """[n, n] with the `count` largest similarities of each row; of equal ones the first."""
    n = data.shape[0]
    count = min(count, n)
    columns = np.empty((n, count), dtype=np.int64)
    values = np.empty((n, count), dtype=np.float64)
    step = max(1, _BLOCK // n)
    for begin in range(0, n, step):
        s = similarities(data[begin : begin + step], data, metric)
        order = torch.argsort(s, dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
        columns[begin : begin + step] = order.numpy()
        values[begin : begin + step] = s.gather(1, order).numpy()
    crow = np.arange(0, n * count + 1, count)
    return scipy.sparse.csr_matrix((values.reshape(-1), columns.reshape(-1), crow), shape=(n, n))


def mirrored(sijs: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """[n candidates, n clients] float32 of a sparse kernel: s(i, j) where it is stored, otherwise s(j, i)."""
    n = sijs.shape[0]
    row = np.repeat(np.arange(n), np.diff(sijs.indptr))
    column, value = sijs.indices.astype(np.int64), sijs.data.astype(np.float32)
    # Of entries stored twice the last counts; an entry (client, candidate) goes before its mirror image.
    client = np.concatenate([row[::-1], column[::-1]])
    candidate = np.concatenate([column[::-1], row[::-1]])
    key, first = np.unique(candidate * n + client, return_index=True)
    value = np.concatenate([value[::-1], value[::-1]])[first]
    return scipy.sparse.csr_matrix((value, (key // n, key % n)), shape=(n, n))
