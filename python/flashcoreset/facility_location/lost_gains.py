"""Finds picks whose gains were lost beside far larger similarities: gains are whole numbers of a unit that these set."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.tensor import Csr

# A sum over m clients loses at most m units of 2^-60 of the bound of all sums; gains above 2^10 times that are right to 0.1 %.
_SAFE_UNITS = 2.0**-50
# Distances below this share of the points themselves, and gains below this share of the similarities, may be their rounding.
_ROUNDING = 2.0**-16
_CHUNK = 2**21  # numbers of float64 that are held at a time


def check_gains(
    x: Tensor | Csr,
    clients: Tensor | None,
    metric: str,
    weights: Tensor | None,
    preselected: Tensor | None,
    indices: Tensor,
    gains: Tensor,
    offset: float,
    stochastic: bool,
) -> None:
    """Computes gains again, one pick after the other in float64, if some are so small that their sums may have lost them.

    Args:
        x, clients, metric, weights, preselected: the problem that a kernel solved; "precomputed" for a matrix.
        indices, gains: [k] what it found.
        offset: what distances were subtracted from; 0 for similarities.
        stochastic: whether only some candidates were looked at for each pick.

    Raises:
        ValueError: if a pick is worth more than it was said to be, or a client still misses more than the worst pick brought.
    """
    if metric == "cosine" or len(gains) < (2 if preselected is None else 1):
        return
    m = x.shape[1] if metric == "precomputed" else x.shape[0] if clients is None else clients.shape[0]
    bound = offset * (m if weights is None else float(weights.sum())) if offset else float(gains[0])
    limit, least = m * bound * _SAFE_UNITS, float(gains.min())
    if least >= limit:
        return
    square = clients is None and (metric != "precomputed" or x.shape[0] == x.shape[1])
    before = [] if preselected is None else preselected.tolist()
    order = [*before, *indices.tolist()]
    worth = torch.zeros(len(order), dtype=torch.float64)
    missed = 0.0
    columns = m if isinstance(x, Csr) else max(1, _CHUNK // (x.shape[1] if metric != "precomputed" else 1))
    for begin in range(0, m, columns):
        end = min(begin + columns, m)
        w = 1.0 if weights is None else weights[begin:end].double()
        best = torch.full((end - begin,), -offset, dtype=torch.float64, device=x.device)
        for position, row in enumerate(order):
            s = _similarities(x, clients, metric, row, begin, end)
            worth[position] += float((_told(s - best, best, s, x, clients, metric, begin, end) * w).sum())
            best = torch.maximum(best, s)
        if square and not stochastic:
            own = _own(x, metric, begin, end)
            more = _told(own - best, best, own, x, clients, metric, begin, end) * w
            missed = max(missed, float(more.max()))
    worth = worth[len(before) :]
    lost = (worth > 1.02 * gains.double().cpu()) & (gains.cpu() < limit)
    most = max(float(worth[lost].max()) if lost.any() else 0.0, missed if missed > 2 * least else 0.0)
    if most:
        what, how = ("distances", "farther away") if offset else ("similarities", "longer")
        if metric == "precomputed" and not offset:
            how = "larger"
        raise ValueError(
            f"x: gains of {most:.3g} are lost beside {what} whose sum is {bound:.3g}, so that picks would be arbitrary; leave out rows "
            f"that are so much {how} than the others"
        )


def _similarities(
    x: Tensor | Csr, clients: Tensor | None, metric: str, row: int, begin: int, end: int
) -> Tensor:
    if isinstance(x, Csr):
        part = slice(int(x.crow[row]), int(x.crow[row + 1]))
        s = x.values.new_zeros(x.shape[1], dtype=torch.float64)
        s[x.col[part]] = x.values[part].double()
        return s
    if metric == "precomputed":
        return x[row, begin:end].double()
    some = (x if clients is None else clients)[begin:end].double()
    point = x[row : row + 1].double()
    if metric == "dot":
        return some @ point[0]
    distance = torch.cdist(point, some, 1 if metric == "l1" else 2, "donot_use_mm_for_euclid_dist")[0]
    return -(distance.square() if metric == "sqeuclidean" else distance)


def _own(x: Tensor | Csr, metric: str, begin: int, end: int) -> Tensor:
    """Each client's similarity with itself."""
    if isinstance(x, Csr):
        rows = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), x.crow.diff())
        s = x.values.new_zeros(x.shape[1], dtype=torch.float64)
        same = rows == x.col
        s[rows[same]] = x.values[same].double()
        return s
    if metric == "precomputed":
        return x.diagonal()[begin:end].double()
    if metric == "dot":
        return x[begin:end].double().square().sum(1)
    return torch.zeros(end - begin, dtype=torch.float64, device=x.device)


def _told(
    more: Tensor,
    best: Tensor,
    s: Tensor,
    x: Tensor | Csr,
    clients: Tensor | None,
    metric: str,
    begin: int,
    end: int,
) -> Tensor:
    """`more` >= 0, and 0 where it may be a rounding error."""
    if isinstance(x, Csr) or metric in ("dot", "precomputed"):
        told = more > _ROUNDING * torch.maximum(best.abs(), s.abs())
    else:
        size = _ROUNDING * (x if clients is None else clients)[begin:end].abs().amax(1).double()
        told = -best > (size.square() if metric == "sqeuclidean" else size)
    return torch.where(told & (more > 0), more, 0)
