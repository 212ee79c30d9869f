"""The kinds of random projections."""

from __future__ import annotations

# Those that every entry of a row goes into.
KINDS = ("rademacher", "gaussian", "sjlt", "srht", "gaussian-boxmuller")
# Those that read a choice of the columns, which depends on how many there are.
CHOICES = ("mask", "grass")
# The streams of the generator: the last word of its counter.
STREAMS = {"rademacher": 0, "gaussian-boxmuller": 1, "sjlt": 2, "srht": 3, "gaussian": 6}
DIRECTION_STREAM = 4  # directions of zeroth-order gradients
CHOICE_STREAM = 5
GRASS_MULTIPLE = 4  # columns that grass reads per output

_LEAST_BLOCK, _MOST_BLOCK = 1 << 10, 1 << 12
ROWS_AT_ONCE = 1 << 22  # entries of the matrix


def hadamard_block(dim: int) -> int:
    """N, the rows that one transform of srht mixes."""
    return min(max(_LEAST_BLOCK, 1 << (dim - 1).bit_length()), _MOST_BLOCK)


def columns_read(columns: int, dim: int, kind: str) -> int:
    """How many columns a choice reads."""
    return dim if kind == "mask" else min(columns, GRASS_MULTIPLE * dim)
