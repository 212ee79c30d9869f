"""The kinds of random projections."""

from __future__ import annotations

# Those that every entry of a row goes into. Their numbers are the generator's streams; the directions of zeroth-order gradients
# have the next one.
KINDS = ("rademacher", "gaussian", "sjlt", "srht")
# Those that read a choice of the columns, which depends on how many there are.
CHOICES = ("mask", "grass")
CHOICE_STREAM = len(KINDS) + 1
GRASS_MULTIPLE = 4  # columns that grass reads per output

_LEAST_BLOCK, _MOST_BLOCK = 1 << 10, 1 << 12
ROWS_AT_ONCE = 1 << 22  # entries of the matrix


def hadamard_block(dim: int) -> int:
    """N, the rows that one transform of srht mixes."""
    return min(max(_LEAST_BLOCK, 1 << (dim - 1).bit_length()), _MOST_BLOCK)


def columns_read(columns: int, dim: int, kind: str) -> int:
    """How many columns a choice reads."""
    return dim if kind == "mask" else min(columns, GRASS_MULTIPLE * dim)
