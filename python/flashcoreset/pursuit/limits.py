"""What counts as rounding in pursuits, and the numbers that they take."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core.tensor import check_finite

# A row whose squared distance from the span of the rows in use is at most this share of its square depends on them.
DEPENDENT = 1e-10
# Correlations of at most this share of |g_j| (|target| + sum_i |w_i| |g_i|) are rounding errors.
NOISE = 1e-12
# The rounding error of cosines between geodesics, and the least squared sine between a row and the direction.
UNIT_NOISE, LEAST_SQUARED_SINE = 1e-10, 1e-8
# Norms of rows and target between which products, and what NOISE of them leaves, are normal numbers.
SMALLEST, LARGEST = 2.0**-400, 2.0**480
_OVERFLOW = "g, target: products of their entries overflow; scale them down"


def check_products(
    g: Tensor, target: Tensor, norms: Tensor, target_norm: float, correlation: Tensor, unit_rows: bool
) -> None:
    """Raises ValueError if products of the rows with each other or the target leave the range of float64, as the `norms` [B]
    of rows and target and their `correlation` [B] show; `unit_rows`: whether short rows count as much as long ones."""
    fits = (norms >= SMALLEST) & (norms <= LARGEST) & correlation.isfinite()
    if SMALLEST <= target_norm <= LARGEST and bool(fits.all()):
        return
    check_finite(g, "g")
    if not (target_norm <= LARGEST and bool((norms <= LARGEST).all() & correlation.isfinite().all())):
        raise ValueError(_OVERFLOW)
    short = norms < SMALLEST
    lost = (unit_rows or bool(short.all())) and bool(g[short].any())
    if lost or (target_norm < SMALLEST and bool(target.any())):
        raise ValueError("g, target: products of their entries underflow; scale them up")
