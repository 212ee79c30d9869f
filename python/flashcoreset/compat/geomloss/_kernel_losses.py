"""Distances of kernels between weighted sets: 0.5 <a, K a> + 0.5 <b, K b> - <a, K b>, a block of rows of K at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMES = ("energy", "gaussian", "laplacian")

# Entries of K that are made at once.
_BLOCK = 2**24


def _kernel(x: Tensor, y: Tensor, name: str, blur: float) -> Tensor:
    """K [B, n, m] of x [B, n, d] and y [B, m, d]."""
    if name == "gaussian":
        return (-0.5 * (torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / blur) ** 2).exp()
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return -distances if name == "energy" else (-distances / blur).exp()


def _rows(x: Tensor, y: Tensor, v: Tensor, name: str, blur: float) -> Tensor:
    return (_kernel(x, y, name, blur) @ v[:, :, None])[:, :, 0]


class _Block(torch.autograd.Function):
    """`_rows`, whose K is made again in the backward pass, rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, v: Tensor, name: str, blur: float) -> Tensor:
        ctx.save_for_backward(x, y, v)
        ctx.options = (name, blur)
        return _rows(x, y, v, name, blur)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_rows: Tensor) -> tuple[Tensor | None, ...]:
        arguments = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            rows = _rows(*arguments, *ctx.options)
        return *torch.autograd.grad(rows, arguments, of_rows), None, None


def _product(x: Tensor, y: Tensor, v: Tensor, name: str, blur: float) -> Tensor:
    """K v [B, n] for v [B, m]."""
    step = max(1, _BLOCK // (y.shape[0] * y.shape[1]))
    if step >= x.shape[1]:
        return _rows(x, y, v, name, blur)
    return torch.cat([_Block.apply(block, y, v, name, blur) for block in x.split(step, dim=1)], 1)


def kernel_loss(
    a: Tensor, x: Tensor, b: Tensor, y: Tensor, name: str, blur: float, potentials: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """[B], or the potentials K a - K b [B, n] at x and K b - K a [B, m] at y."""
    a_x, b_x = _product(x, x, a, name, blur), _product(x, y, b, name, blur)
    b_y = _product(y, y, b, name, blur)
    if potentials:
        return a_x - b_x, b_y - _product(y, x, a, name, blur)
    return 0.5 * (a * a_x).sum(1) + 0.5 * (b * b_y).sum(1) - (a * b_x).sum(1)
