"""Scores of samples, by the Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors."""

from __future__ import annotations

from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset._core.tensor import compute_dtype
from flashcoreset.scores.checks import check_logits, check_targets
from flashcoreset.triton_kernels.scores import launch_scores

__all__ = ["TAKES", "sample_scores"]

TAKES = Takes()


def sample_scores(
    logits: Tensor, targets: Tensor, *, masked: bool = False, out: Tensor | None = None
) -> Tensor:
    """Loss, entropy, margin, EL2N and correctness (1 or 0) of every token; see `flashcoreset.scores.reference` for
    the definition.

    Args:
        logits: [N, T, C] float16, bfloat16, float32 or float64, in any strides.
        targets: [N, T] int64 in [0, C).
        masked: a target of -1 says that the token does not count; its scores are 0, its logits are not read.
        out: [5, N, T] float64 for float64, else float32, contiguous; None allocates it.

    Returns:
        `out`.

    Raises:
        ValueError: for NaN or infinity in `logits` and targets out of range.
    """
    logits, targets = logits.detach(), targets.contiguous()
    if out is None:
        out = logits.new_empty(5, *targets.shape, dtype=compute_dtype(logits.dtype))
    refused = launch_scores(logits, targets, masked, out)
    if refused < targets.numel():
        sample = refused // targets.shape[1]
        named = targets[sample : sample + 1]
        skipped = (named == -1) & masked
        check_targets(named, skipped, logits.shape[2], sample)
        check_logits(logits[sample : sample + 1], skipped, sample)
    return out
