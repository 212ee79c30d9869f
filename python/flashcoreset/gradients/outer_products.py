"""Per-sample gradients of matrices as factors of outer products, from which columns are made when they are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.tensor import FLOATING, as_integer, compute_dtype, one_of
from flashcoreset.sketch import sketch

_TILE = 1 << 22  # entries that a sketch forms at a time
# The projections that take columns in pieces.
_KINDS = ("rademacher", "gaussian", "sjlt", "gaussian-boxmuller")


@dataclass(frozen=True, eq=False)
class OuterProductGradients:
    """Per-sample gradients of one or several matrices: sum_t g[b, t] a[b, t]^T for sample b.

    A linear layer's weight [rows, columns] has such gradients, `a` being its input at position t and `g` the gradient of the sample's
    loss with respect to its output there. The gradients of several matrices follow one another, each flattened row by row.

    Every matching function takes these gradients and forms some columns at a time, never [B, numel].

    Attributes:
        factors: one pair (a, g) per matrix: a [B, T, columns] and g [B, T, rows], floating, of one B, dtype and device. T may differ
            from matrix to matrix.

    Raises:
        TypeError, ValueError: for anything but such pairs.

    Source: Goodfellow, "Efficient per-example gradient computations", 2015.

    Example:
        >>> import torch, flashcoreset as fc
        >>> a, g = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
        >>> gradients = fc.OuterProductGradients([(a, g)])
        >>> gradients.numel, torch.allclose(gradients.dense(), (g.transpose(1, 2) @ a).flatten(1))
        (6, True)
    """

    factors: tuple[tuple[Tensor, Tensor], ...]

    def __post_init__(self) -> None:
        given = self.factors
        if isinstance(given, (Tensor, str)) or not isinstance(given, Iterable):
            raise TypeError(f"factors must be several pairs (a, g), got {type(given).__name__}")
        factors = tuple(_pair(pair, i) for i, pair in enumerate(given))
        if not factors:
            raise ValueError("factors must hold at least one pair (a, g), got none")
        first = factors[0][0]
        for i, (a, _) in enumerate(factors):
            if (len(a), a.dtype, a.device) != (len(first), first.dtype, first.device):
                raise ValueError(
                    f"factors[{i}] must have {len(first)} samples, {first.dtype} on {first.device}, as factors[0] has, got {len(a)}, "
                    f"{a.dtype} on {a.device}"
                )
        object.__setattr__(self, "factors", factors)

    def __len__(self) -> int:
        return len(self.factors[0][0])

    @property
    def numel(self) -> int:
        """The length of a gradient."""
        return sum(a.shape[2] * g.shape[2] for a, g in self.factors)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the columns that are formed: float64 for float64 factors, else float32."""
        return compute_dtype(self.factors[0][0].dtype)

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.factors[0][0].device

    def take(self, rows: Tensor) -> OuterProductGradients:
        """The gradients of the samples `rows`, indices [n] int64 or a mask [B] bool.

        Example:
            >>> import torch, flashcoreset as fc
            >>> gradients = fc.OuterProductGradients([(torch.randn(4, 5, 3), torch.randn(4, 5, 2))])
            >>> len(gradients.take(torch.tensor([2, 0])))
            2
        """
        return OuterProductGradients(tuple((a[rows], g[rows]) for a, g in self.factors))

    def columns(self, begin: int, end: int) -> Tensor:
        """The columns `begin` to `end` of the gradients, [B, end - begin].

        Raises:
            TypeError, ValueError: unless 0 <= begin < end <= numel.

        Example:
            >>> import torch, flashcoreset as fc
            >>> gradients = fc.OuterProductGradients([(torch.randn(4, 5, 3), torch.randn(4, 5, 2))])
            >>> gradients.columns(2, 6).shape
            torch.Size([4, 4])
        """
        begin, end = as_integer(begin, "begin"), as_integer(end, "end")
        if not 0 <= begin < end <= self.numel:
            raise ValueError(
                f"begin and end must satisfy 0 <= begin < end <= {self.numel}, got {begin} and {end}"
            )
        parts, first = [], 0
        for a, g in self.factors:
            width = a.shape[2]
            last = first + width * g.shape[2]
            low, high = max(begin, first) - first, min(end, last) - first
            if low < high:
                top, bottom = low // width, -(-high // width)
                rows = g[:, :, top:bottom].to(self.dtype).transpose(1, 2) @ a.to(self.dtype)
                parts.append(rows.flatten(1)[:, low - top * width : high - top * width])
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def dense(self) -> Tensor:
        """The gradients [B, numel].

        Example:
            >>> import torch, flashcoreset as fc
            >>> fc.OuterProductGradients([(torch.randn(4, 5, 3), torch.randn(4, 5, 2))]).dense().shape
            torch.Size([4, 6])
        """
        return self.columns(0, self.numel)

    def sketch(self, dim: int, *, kind: str = "sjlt", seed: int = 0, nnz: int = 1) -> Tensor:
        """The gradients' random projections [B, dim], those of `fc.sketch` of the dense gradients, some columns at a time.

        Args:
            dim, seed, nnz: those of `fc.sketch`.
            kind: "sjlt", "rademacher", "gaussian" or "gaussian-boxmuller".

        Example:
            >>> import torch, flashcoreset as fc
            >>> gradients = fc.OuterProductGradients([(torch.randn(4, 5, 3), torch.randn(4, 5, 2))])
            >>> torch.allclose(gradients.sketch(8), fc.sketch(gradients.dense(), 8, kind="sjlt"), atol=1e-5)
            True
        """
        one_of(kind, "kind", _KINDS)
        step = max(1, _TILE // max(1, len(self)))
        total: Tensor | None = None
        for begin in range(0, self.numel, step):
            part = self.columns(begin, min(begin + step, self.numel))
            found = sketch(part, dim, kind=kind, seed=seed, nnz=nnz, offset=begin)
            total = found if total is None else total.add_(found)
        assert total is not None
        return total

    def bounds(self) -> Tensor:
        """For each sample a number [B] float64 that no entry of its gradient exceeds: the sum over the matrices of |a| |g|. It is 0 for a
        gradient of zeros whose factors are zeros, and NaN or infinite if a factor has such numbers.

        Example:
            >>> import torch, flashcoreset as fc
            >>> fc.OuterProductGradients([(torch.ones(1, 4, 1), 2 * torch.ones(1, 4, 1))]).bounds()
            tensor([8.], dtype=torch.float64)
        """
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        for a, g in self.factors:
            total += torch.linalg.vector_norm(a.flatten(1), dim=1, dtype=torch.float64) * (
                torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64)
            )
        return total


def joined(parts: Sequence[OuterProductGradients]) -> OuterProductGradients:
    """The gradients of several sets of samples as one: factors of fewer positions get zeros, which add nothing."""
    if len(parts) == 1:
        return parts[0]
    factors = []
    for pairs in zip(*(part.factors for part in parts), strict=True):
        length = max(a.shape[1] for a, _ in pairs)
        a, g = (
            torch.cat(
                [torch.nn.functional.pad(pair[i], (0, 0, 0, length - pair[i].shape[1])) for pair in pairs]
            )
            for i in (0, 1)
        )
        factors.append((a, g))
    return OuterProductGradients(tuple(factors))


def shortened(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A pair with the same products that takes less memory, if there is one: the products themselves, beside unit vectors that are
    stored once."""
    (samples, positions, columns), rows = a.shape, g.shape[2]
    if rows * columns >= positions * (rows + columns):
        return a, g
    unit = torch.eye(columns, dtype=a.dtype, device=a.device).expand(samples, columns, columns)
    return unit, a.transpose(1, 2) @ g


def _pair(pair: Any, i: int) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"factors[{i}] must be a pair (a, g), got {type(pair).__name__}")
    for name, tensor in zip("ag", pair, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"factors[{i}]: {name} must be a floating tensor, got {got}")
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(
                f"factors[{i}]: {name} must have shape [B, T, columns of the matrix for a, rows for g], got {tuple(tensor.shape)}"
            )
    a, g = (tensor.detach() for tensor in pair)
    if a.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"factors[{i}]: a and g must have the same B and T, got {tuple(a.shape[:2])} and {tuple(g.shape[:2])}"
        )
    if (a.dtype, a.device) != (g.dtype, g.device):
        raise ValueError(
            f"factors[{i}]: a and g must have one dtype and device, got {a.dtype} on {a.device} and {g.dtype} on {g.device}"
        )
    return a, g
