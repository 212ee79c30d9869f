"""What a pursuit is given, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.tensor import as_number


@dataclass(slots=True, eq=False)
class Problem:
    """Rows of `g` whose weighted sum is to come close to `target`.

    Attributes:
        g: [B, D] float32 or float64. Kernels copy rows that are not contiguous.
        target: [D] float64.
        k: the most picks, 1 to B; for Frank-Wolfe the number of steps.
        nonnegative: whether weights must be >= 0; Frank-Wolfe's are always.
        ridge: for matching pursuit: what |w|^2 is multiplied by, >= 0, in units of the squares of `g`.
        memory_budget: bytes for columns of the Gram matrix, 8 * B each. If k columns take more, every pick of matching pursuit
            costs a pass over `g` instead, and Frank-Wolfe computes old columns anew. On a GPU room for 2 k + 12 columns is allocated at
            once, as far as the budget allows. The reference keeps none.
    """

    g: Tensor
    target: Tensor
    k: int
    nonnegative: bool = True
    ridge: float = 0.0
    memory_budget: int = DEFAULT_MEMORY_BUDGET

    def compact(self) -> Problem:
        """The same, detached, its rows and target contiguous."""
        g = self.g.detach()
        g = g if g.stride(1) == 1 else g.contiguous()
        return Problem(g, self.target.contiguous(), self.k, self.nonnegative, self.ridge, self.memory_budget)


@dataclass(frozen=True, eq=False)
class Pursuit:
    """Rows whose weighted sum is close to a target.

    Attributes:
        indices: [r] int64, the rows, distinct, in pick order; r <= k.
        weights: [r], none of them 0.
        residual_norms: [s], |target - sum_i w_i g_i| after each of the s <= k steps.

    Kernels give weights and norms as float64. Inside a function given to torch.compile all three have k entries: -1, 0 and -1 in
    places without a row or step.

    Example:
        >>> import torch
        >>> from flashcoreset.pursuit import orthogonal_matching_pursuit
        >>> found = orthogonal_matching_pursuit(torch.eye(3), torch.tensor([1.0, 3.0, -2.0]), 3)
        >>> found.indices.tolist(), found.weights.tolist()
        ([1, 0], [3.0, 1.0])
    """

    indices: Tensor
    weights: Tensor
    residual_norms: Tensor


def check_fit(nonnegative: Any, ridge: Any) -> float:
    """`ridge` as a number, after both were checked."""
    if not isinstance(nonnegative, bool):
        raise TypeError(
            f"nonnegative must be a bool, got {nonnegative!r} of type {type(nonnegative).__name__}"
        )
    number = as_number(ridge, "ridge")
    if number < 0:
        raise ValueError(f"ridge must be >= 0, got {number}")
    return number
