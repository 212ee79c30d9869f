"""The kinds of random projections."""

from __future__ import annotations

KINDS = ("rademacher", "gaussian", "sjlt", "srht")
_LEAST_BLOCK, _MOST_BLOCK = 1 << 10, 1 << 12
ROWS_AT_ONCE = 1 << 22  # entries of the matrix


def hadamard_block(dim: int) -> int:
    """N, the rows that one transform of srht mixes."""
    return min(max(_LEAST_BLOCK, 1 << (dim - 1).bit_length()), _MOST_BLOCK)
