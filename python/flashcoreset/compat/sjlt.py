"""The name of the package `sjlt` (0.1): a sparse projection whose entries are the module's buffers, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flashcoreset._core.tensor import as_integer, compute_dtype

__all__ = ["SJLTProjection"]


class SJLTProjection(nn.Module):
    """The matrix with `c` entries +-1 / sqrt(c) per row, [original_dim, proj_dim], and products with it.

    The buffers are the matrix: `rand_indices` [original_dim, c] (int64) are columns, `rand_signs` [original_dim, c] (int8) signs, drawn by torch's
    generator in sjlt's order, so that torch.manual_seed gives the same matrix as there. Numbers that are written into them count. Entries that fall
    on each other add up. (`flashcoreset.sketch(kind="sjlt")` needs no buffers and is several times as fast.)

    Args:
        original_dim: columns of inputs.
        proj_dim: columns of results.
        c: entries per row, at most proj_dim.
        threads, fixed_blocks: how sjlt starts its CUDA kernels; they change nothing here.
        device: where the buffers are; None is a GPU where there is one, else the CPU.
    """

    rand_indices: Tensor
    rand_signs: Tensor

    def __init__(
        self,
        original_dim: int,
        proj_dim: int,
        c: int = 1,
        threads: int = 1024,
        fixed_blocks: int = 84,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.original_dim = as_integer(original_dim, "original_dim")
        self.proj_dim, self.c = as_integer(proj_dim, "proj_dim"), as_integer(c, "c")
        for name, value in (("original_dim", self.original_dim), ("proj_dim", self.proj_dim), ("c", self.c)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.c > self.proj_dim:
            raise ValueError(f"c must be at most proj_dim = {self.proj_dim}, got {self.c}")
        self.threads = max(32, threads // 32 * 32)
        self.fixed_blocks = fixed_blocks
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = (self.original_dim, self.c)
        self.register_buffer("rand_indices", torch.randint(0, self.proj_dim, shape, device=device))
        signs = torch.randint(0, 2, shape, device=device) * 2 - 1
        self.register_buffer("rand_signs", signs.to(torch.int8))
        self.normalization_factor = 1 / math.sqrt(self.c)

    @property
    def device(self) -> torch.device:
        """Where the buffers are; inputs are moved there."""
        return self.rand_indices.device

    def forward(self, x: Tensor) -> Tensor:
        """x [B, original_dim] times the matrix: [B, proj_dim], in the type of `x`."""
        values = self._checked(x, "x", self.original_dim)
        # Positive and negative entries into columns of their own, which saves a copy of x with signs.
        out = values.new_zeros(len(values), 2 * self.proj_dim)
        targets = self.rand_indices + self.proj_dim * (self.rand_signs < 0)
        for entry in targets.T:
            if values.device.type == "cpu":
                out.index_add_(1, entry, values)
            else:  # index_add_ of a GPU adds in any order
                out.T.index_put_((entry,), values.T, accumulate=True)
        out = (out[:, : self.proj_dim] - out[:, self.proj_dim :]) * self.normalization_factor
        return out.to(x.dtype)

    def transpose(self, y: Tensor) -> Tensor:
        """y [B, proj_dim] times the transposed matrix: [B, original_dim], in the type of `y`."""
        values = self._checked(y, "y", self.proj_dim)
        out = values.new_zeros(len(values), self.original_dim)
        for entry, signs in zip(self.rand_indices.T, self.rand_signs.T, strict=True):
            out += values[:, entry] * signs
        return out.mul_(self.normalization_factor).to(y.dtype)

    def get_compression_ratio(self) -> float:
        """original_dim / proj_dim."""
        return self.original_dim / self.proj_dim

    def get_sparsity_ratio(self) -> float:
        """The share of the matrix's entries that are 0."""
        return 1 - self.c / self.proj_dim

    def extra_repr(self) -> str:
        return f"original_dim={self.original_dim}, proj_dim={self.proj_dim}, c={self.c}, device={self.device}"

    def _checked(self, values: Tensor, name: str, expected: int) -> Tensor:
        if values.dim() != 2 or values.shape[1] != expected:
            raise ValueError(f"{name} must have shape [B, {expected}], got {tuple(values.shape)}")
        return values.detach().to(self.device, compute_dtype(values.dtype))
