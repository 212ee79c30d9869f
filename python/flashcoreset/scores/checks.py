"""Checks of targets and logits, and means over tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def check_targets(targets: Tensor, skipped: Tensor, classes: int, first: int = 0) -> None:
    """Raises ValueError naming the first target [N, T] outside [0, classes), those `skipped` excepted; sample 0 is
    called `first`."""
    bad = ((targets < 0) | (targets >= classes)) & ~skipped
    if bad.any():
        i, token = bad.nonzero()[0].tolist()
        where = _where(first + i, token, targets.shape[1])
        raise ValueError(f"targets must be in [0, {classes}), got {int(targets[i, token])} {where}")


def check_logits(x: Tensor, skipped: Tensor, first: int = 0) -> None:
    """Raises ValueError naming the first NaN or infinity in x [N, T, C], `skipped` [N, T] excepted; sample 0 is
    called `first`."""
    bad = ~x.isfinite() & ~skipped[:, :, None]
    if bad.any():
        i, token, column = bad.nonzero()[0].tolist()
        value = x[i, token, column].item()
        got = "NaN" if value != value else value
        where = _where(first + i, token, x.shape[1])
        raise ValueError(f"logits must be finite, got {got} {where}, class {column}")


def _where(sample: int, token: int, tokens: int) -> str:
    return f"at sample {sample}, token {token}" if tokens > 1 else f"at sample {sample}"


def mean_over_tokens(scores: Tensor, kept: Tensor | None) -> Tensor:
    """The means [5, N] of the scores [5, N, T] over the tokens that are `kept` [N, T] (None: over all); the others'
    scores are 0."""
    total = row_sums(scores.to(torch.float64))
    count = scores.shape[2] if kept is None else row_sums(kept.to(torch.float64))
    return (total / count).to(scores.dtype)


def row_sums(x: Tensor) -> Tensor:
    """Sums over the last dimension, each of which depends on its row alone: the order of additions in `sum` may
    depend on the number of rows."""
    return x.cumsum(-1)[..., -1]
