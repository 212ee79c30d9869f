"""What the projectors of trak and dattri share: gradients in one tensor or in a dictionary of parameters, projected without a
matrix and, if they come in a dictionary, without a flat copy of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.tensor import FLOATING, as_int64, check_finite, compute_dtype
from flashcoreset.sketch import sketch

_APART = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_JOINED = 1 << 16  # columns that are worth a call of their own


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the columns of a flattened gradient."""

    values: Tensor  # [B, columns]
    name: str  # as the caller knows it, for messages


def member_seed(seed: Any, member: Any, name: str) -> int:
    """The seed of the ensemble's member `member`, the argument `name`: the seed itself for member 0. The seeds of different
    members are far apart, so that those of different small seeds do not meet."""
    number = (as_int64(seed, "seed") + as_int64(member, name) * _APART) % 2**64
    return number - 2**64 if number >= 2**63 else number


def parts_of(gradients: Any, name: str, device: torch.device | str | None) -> list[Part]:
    """The parts of `gradients`, the argument `name`: a tensor [B, D], or a dictionary of [B, ...], which are flattened in its
    order; a [B] is one column. All are on `device`; None leaves them where they are."""
    if isinstance(gradients, Tensor):
        if gradients.dim() != 2:
            raise ValueError(f"{name} must have shape [B, D], got {tuple(gradients.shape)}")
        _check_real(gradients, name)
        return [Part(_on(gradients.detach(), device), name)]
    if not isinstance(gradients, Mapping):
        raise TypeError(f"{name} must be a tensor or a dictionary of tensors, got {type(gradients).__name__}")
    if not gradients:
        raise ValueError(f"{name} must hold at least one parameter, got an empty dictionary")
    parts: list[Part] = []
    for key, value in gradients.items():
        own = f"{name}[{key!r}]"
        if not isinstance(value, Tensor):
            raise TypeError(f"{own} must be a tensor, got {type(value).__name__}")
        if value.dim() == 0:
            raise ValueError(f"{own} must have shape [B, ...], got a single number")
        _check_real(value, own)
        if parts and len(value) != len(parts[0].values):
            raise ValueError(
                f"{own} must have {len(parts[0].values)} rows as {parts[0].name}, got {len(value)}"
            )
        values = value.detach()
        parts.append(Part(_on(values[:, None] if values.dim() == 1 else values.flatten(1), device), own))
    return parts


def width(parts: list[Part]) -> int:
    return sum(part.values.shape[1] for part in parts)


def check_width(parts: list[Part], expected: int, what: str, name: str) -> None:
    found = width(parts)
    if found != expected:
        raise ValueError(f"{name} must have {what} = {expected} columns in all, got {found}")


def project(parts: list[Part], dim: int, *, kind: str, seed: int, dtype: torch.dtype, name: str) -> Tensor:
    """The parts, side by side, times the projection's matrix: [B, dim], float64 if `dtype` is, else float32."""
    rows = len(parts[0].values)
    if rows == 0 or width(parts) == 0:
        return torch.zeros(rows, dim, dtype=compute_dtype(dtype), device=parts[0].values.device)
    out: Tensor | None = None
    offset = 0
    for values in _joined(parts):
        try:
            found = sketch(_converted(values, dtype), dim, kind=kind, seed=seed, offset=offset)
        except ValueError:
            for part in parts:
                if part.values.dtype in FLOATING:
                    check_finite(part.values, part.name)
            raise
        out = found if out is None else out.add_(found)
        offset += values.shape[1]
    assert out is not None
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"{name}: sums of its rows go beyond the range of {out.dtype}; scale it down")
    return out


def whole(parts: list[Part]) -> bool:
    """Whether all numbers are whole, and so few and small that sums of theirs have no rounding."""
    most: Tensor | float = 0.0
    for part in parts:
        for row in part.values:
            # Gradients leave after their first numbers.
            for some in (row[:64], row):
                if not bool((some == some.round()).all()):
                    return False
        most = most + part.values.abs().sum(1, dtype=torch.float64)
    return bool(torch.as_tensor(most).max() < 2**22) if len(parts[0].values) else True


def unscaled(out: Tensor) -> Tensor:
    """`out` [B, dim] of a dense projection in float64, as if its entries had a variance of 1: divided by the very number that the
    kernels scale them by."""
    return out.double() / torch.tensor(1 / math.sqrt(out.shape[1]), dtype=torch.float64).to(out.dtype).item()


def columns(parts: list[Part], chosen: Tensor) -> Tensor:
    """[B, chosen] the columns with the ascending numbers `chosen` of the parts side by side."""
    found, begin = [], 0
    for part in parts:
        end = begin + part.values.shape[1]
        first, last = torch.searchsorted(chosen, torch.tensor([begin, end], device=chosen.device)).tolist()
        found.append(part.values[:, chosen[first:last] - begin])
        begin = end
    return found[0] if len(found) == 1 else torch.cat(found, 1)


class Chunked:
    """A sum of projections, one per chunk of the parameters: what the peers' ChunkedCudaProjectors have in common.

    Args:
        projectors: of any library.
        most: columns that a chunk has at most; a parameter that does not fit begins the next.
        sizes: columns of each chunk.
        device: where results are.
        dtype: the type of results.
    """

    def __init__(
        self, projectors: list[Any], most: int, sizes: list[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        if len(projectors) != len(sizes):
            raise ValueError(
                f"projector_per_chunk must hold {len(sizes)} projectors, one per chunk, got {len(projectors)}"
            )
        self.projector_per_chunk = projectors
        self.proj_dim = projectors[0].proj_dim
        self.proj_type = projectors[0].proj_type
        self.max_chunk_size = most
        self.device = device
        self.dtype = dtype
        self.input_allocated = False
        self._sizes = [int(size) for size in sizes]

    def allocate_input(self) -> None:
        """Nothing to allocate: chunks are read where they are."""

    def free_memory(self) -> None:
        """Nothing to free."""

    def _project_dictionary(self, gradients: Any, name: str, **member: int) -> Tensor:
        """The sum of the projections of a dictionary's chunks; `member` is what the projectors name the ensemble's member by."""
        parts = parts_of(gradients, name, self.device)
        chunks: list[list[Part]] = [[]]
        for part in parts:
            if chunks[-1] and width(chunks[-1]) + part.values.shape[1] > self.max_chunk_size:
                chunks.append([])
            chunks[-1].append(part)
        found = [width(chunk) for chunk in chunks]
        if found != self._sizes:
            raise ValueError(
                f"{name} must come in chunks of {self._sizes} columns, of at most {self.max_chunk_size}, got {found}"
            )
        pieces = [{part.name: part.values for part in chunk} for chunk in chunks]
        return self._sum(pieces, len(parts[0].values), member)

    def _sum(self, pieces: list[Any], rows: int, member: dict[str, int]) -> Tensor:
        out = torch.zeros(rows, self.proj_dim, device=self.device, dtype=self.dtype)
        for projector, piece in zip(self.projector_per_chunk, pieces, strict=True):
            out += projector.project(piece, **member)
        return out


def check_floating(dtype: torch.dtype, name: str) -> None:
    """Raises TypeError for a type of results that would cut their fractions off."""
    if not dtype.is_floating_point:
        raise TypeError(f"{name} must be of a floating type, got {str(dtype).removeprefix('torch.')}")


def _check_real(values: Tensor, name: str) -> None:
    if values.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {str(values.dtype).removeprefix('torch.')}")


def _on(values: Tensor, device: torch.device | str | None) -> Tensor:
    return values if device is None else values.to(device)


def _converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in the precision of the result; half types stay, which the kernels convert."""
    wide = compute_dtype(dtype)
    if wide == torch.float32 and values.dtype in (torch.float16, torch.bfloat16):
        return values
    return values.to(wide)


def _joined(parts: list[Part]) -> Iterator[Tensor]:
    """The values of the parts, those of small neighbours in one tensor."""
    small: list[Tensor] = []
    for part in parts:
        if part.values.shape[1] < _JOINED:
            small.append(part.values)
        if small and (part.values.shape[1] >= _JOINED or sum(values.shape[1] for values in small) >= _JOINED):
            yield small[0] if len(small) == 1 else torch.cat(small, 1)
            small = []
        if part.values.shape[1] >= _JOINED:
            yield part.values
    if small:
        yield small[0] if len(small) == 1 else torch.cat(small, 1)
