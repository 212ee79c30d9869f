"""Scores of samples, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset._core.tensor import compute_dtype

__all__ = ["TAKES", "sample_scores"]

TAKES = Takes()


def sample_scores(
    logits: Tensor, targets: Tensor, *, masked: bool = False, out: Tensor | None = None
) -> Tensor:
    """Loss, entropy, margin, EL2N and correctness (1 or 0) of every token; see `flashcoreset.scores.reference` for
    the definition.

    Args:
        logits: [N, T, C] float16, bfloat16, float32 or float64, on the CPU, in any strides.
        targets: [N, T] int64 in [0, C).
        masked: a target of -1 says that the token does not count; its scores are 0, its logits are not read.
        out: [5, N, T] float64 for float64, else float32; None allocates it.

    Returns:
        `out`.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity in `logits`, targets out of range, arrays that do not fit each other.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> kernels.cpu.sample_scores(torch.zeros(1, 1, 4), torch.tensor([[2]]))[:, 0, 0]
        tensor([1.3863, 1.3863, 0.0000, 0.8660, 0.0000])
    """
    if out is None:
        dtype = compute_dtype(logits.dtype)
        out = torch.empty(5, *targets.shape, dtype=dtype)
    native.module().sample_scores(
        capsule(logits.detach()), capsule(targets), masked, capsule(out), torch.get_num_threads()
    )
    return out
