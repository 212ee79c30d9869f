"""Distances of kernels between weighted sets: 0.5 <a, K a> + 0.5 <b, K b> - <a, K b>, a block of rows of K at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashcoreset.compat._arrays import wants_gradient

NAMES = ("energy", "gaussian", "laplacian")

# Entries of K that are made at once.
_BLOCK = 2**24


def _kernel(x: Tensor, y: Tensor, name: str, blur: float) -> Tensor:
    """K [B, n, m] of x [B, n, d] and y [B, m, d]."""
    if name == "gaussian":
        return (-0.5 * (torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / blur) ** 2).exp()
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return -distances if name == "energy" else (-distances / blur).exp()


def _product(x: Tensor, y: Tensor, v: Tensor, name: str, blur: float) -> Tensor:
    """K v [B, n] for v [B, m]."""

    def rows(block: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return (_kernel(block, y, name, blur) @ v[:, :, None])[:, :, 0]

    step = max(1, _BLOCK // (y.shape[0] * y.shape[1]))
    if step >= x.shape[1]:
        return rows(x, y, v)
    blocks = x.split(step, dim=1)
    if not wants_gradient(x, y, v):
        return torch.cat([rows(block, y, v) for block in blocks], 1)
    # K is made again in the backward pass, rather than kept.
    return torch.cat([checkpoint(rows, block, y, v, use_reentrant=False) for block in blocks], 1)


def kernel_loss(
    a: Tensor, x: Tensor, b: Tensor, y: Tensor, name: str, blur: float, potentials: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """[B], or the potentials K a - K b [B, n] at x and K b - K a [B, m] at y."""
    a_x, b_x = _product(x, x, a, name, blur), _product(x, y, b, name, blur)
    b_y = _product(y, y, b, name, blur)
    if potentials:
        return a_x - b_x, b_y - _product(y, x, a, name, blur)
    return 0.5 * (a * a_x).sum(1) + 0.5 * (b * b_y).sum(1) - (a * b_x).sum(1)
