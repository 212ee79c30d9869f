"""The random directions of zeroth-order gradients, number by number.

Element j of direction p is a standard normal float32 number, from the Philox4x32-10 block with the key `seed` and the counter
(j // 4 low, j // 4 high, p, 4), 4 being the number after those of `sketch`'s kinds: words 0 and 1 give elements 0 and 1 of
the block's four, words 2 and 3 the next two, by Box and Muller's formula as in `flashcoreset.sketch.reference`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset._core.philox import philox4x32
from flashcoreset.directions import STREAM
from flashcoreset.sketch.reference import box_muller

TAKES = Takes()


def directions(out: Tensor, *, seed: int, begin: int, first: int = 0) -> None:
    """Fills out [q, n] with elements begin to begin + n of directions first to first + q, in its dtype, float32 or
    float64."""
    count, length = out.shape
    skipped = begin // 4 * 4
    block = np.arange(begin // 4, (begin + length + 3) // 4, dtype=np.int64)
    counter = np.empty((len(block), 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = block & 0xFFFFFFFF, block >> 32
    counter[:, 3] = STREAM
    for p in range(count):
        counter[:, 2] = first + p
        words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
        normal = box_muller(words.reshape(-1, 2)).reshape(-1)
        out[p] = torch.from_numpy(normal[begin - skipped :][:length])
