"""Costs between points by POT's names of metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashcoreset._core.tensor import compute_dtype
from flashcoreset.compat._arrays import Library, wants_gradient
from flashcoreset.sinkhorn.backend import choose

# POT's names of metrics: those of `fc.sinkhorn`.
POINT_METRICS = {
    "sqeuclidean": "sqeuclidean",
    "euclidean": "euclidean",
    "cityblock": "l1",
    "cosine": "cosine",
}


def cost_matrix(
    call: str, library: Library, x: Tensor, y: Tensor, metric: Any = "sqeuclidean", p: float = 2
) -> Tensor:
    """Costs [n, m] between rows of x [n, d] and y [m, d]; with a graph if these ask for gradients."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{call}: the points must have the same number of features, got {x.shape[1]} and {y.shape[1]}"
        )
    if metric in ("cosine", "correlation"):
        if metric == "correlation":
            x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        return 1 - (x / x.norm(dim=1, keepdim=True)) @ (y / y.norm(dim=1, keepdim=True)).mT
    if metric == "sqeuclidean":
        return squared_distances(x, y)
    if metric in ("euclidean", "cityblock", "minkowski"):
        if metric != "minkowski" and not wants_gradient(x, y):
            return _pairwise(x, y, POINT_METRICS[metric])
        # Differences, not products: entries near 0 keep their digits, and gradients at 0 are 0.
        norm = {"euclidean": 2.0, "cityblock": 1.0}.get(metric, float(p))
        return torch.cdist(x, y, p=norm, compute_mode="donot_use_mm_for_euclid_dist")
    if not library.is_numpy:
        raise NotImplementedError(
            f"{call}: metric={metric!r} is not supported for tensors, nor is it by POT's ot.dist"
        )
    from scipy.spatial.distance import cdist

    return torch.from_numpy(cdist(x.detach().numpy(), y.detach().numpy(), metric=metric)).to(x.dtype)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 [n, m] for x [n, d] and y [m, d], or [B, n, m] for a batch; differentiable once."""
    found: Tensor = _SquaredDistances.apply(x, y)
    return found


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        if x.dim() == 2:
            return _pairwise(x, y, "sqeuclidean")
        return torch.stack([_pairwise(u, v, "sqeuclidean") for u, v in zip(x, y, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_distances: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        of_x = 2 * (of_distances.sum(-1)[..., None] * x - of_distances @ y)
        of_y = 2 * (of_distances.sum(-2)[..., None] * y - of_distances.mT @ x)
        return of_x, of_y


def _pairwise(x: Tensor, y: Tensor, metric: str) -> Tensor:
    exact = compute_dtype(x.dtype)
    points = (t.detach().to(exact).contiguous() for t in (x, y))
    return choose(None, x.device).pairwise(*points, metric=metric).to(x.dtype)
