"""POT's `ot` on these kernels, for entropic transport: `from flashcoreset.compat import ot` in the place of `import ot`.

Names, arguments, results, log dictionaries and warnings are POT's; NumPy arrays give NumPy arrays, torch tensors tensors with
gradients. What POT has beyond entropic transport is refused by name. docs/drop_in.md says what differs.

Example:
    >>> import numpy as np
    >>> from flashcoreset.compat import ot
    >>> ot.sinkhorn(ot.unif(2), ot.unif(2), np.array([[0.0, 1.0], [1.0, 0.0]]), 0.1).round(4)
    array([[0.5, 0. ],
           [0. , 0.5]])
"""

from __future__ import annotations

from typing import Any

from flashcoreset.compat.ot import batch, bregman, unbalanced, utils
from flashcoreset.compat.ot._refused import refused
from flashcoreset.compat.ot._solve import solve, solve_sample
from flashcoreset.compat.ot.batch import dist_batch, solve_batch, solve_sample_batch
from flashcoreset.compat.ot.bregman import sinkhorn, sinkhorn2
from flashcoreset.compat.ot.unbalanced import sinkhorn_unbalanced, sinkhorn_unbalanced2
from flashcoreset.compat.ot.utils import dist, unif

__all__ = [
    "batch",
    "bregman",
    "dist",
    "dist_batch",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
    "unbalanced",
    "unif",
    "utils",
]


def __getattr__(name: str) -> Any:
    return refused(__name__, name)
