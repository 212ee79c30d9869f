"""Scores of samples from a classifier's outputs in plain torch: the definition that the kernels are tested against.

For logits x [C] with target t, p = softmax(x):

    loss        -log p_t                      entropy   -sum_j p_j log p_j
    margin      p_t - max_{j != t} p_j        el2n      |p - onehot(t)|_2
    correct     whether t is the first class of the largest logit

Sources: EL2N is that of Paul, Ganguli and Dziugaite, "Deep learning on a data diet: finding important examples
early in training", NeurIPS 2021 (definition 2.2); the margin of probabilities is that of Pleiss, Zhang,
Elenberg and Weinberger, "Identifying mislabeled data using the area under the margin ranking", NeurIPS 2020,
as the code of Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high pruning rates", ICLR
2023, computes it (Pleiss et al. take the margin of the logits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset._core.tensor import compute_dtype
from flashcoreset.scores.checks import check_logits, check_targets, row_sums

TAKES = Takes()

NAMES = ("loss", "entropy", "margin", "el2n", "correct")


def sample_scores(
    logits: Tensor, targets: Tensor, *, masked: bool = False, out: Tensor | None = None
) -> Tensor:
    """The five scores of every token.

    Args:
        logits: [N, T, C] float16, bfloat16, float32 or float64; half types are computed in float32.
        targets: [N, T] int64 in [0, C).
        masked: a target of -1 says that the token does not count; its scores are 0, whatever its logits.
        out: [5, N, T] float64 for float64, else float32; None allocates it.

    Returns:
        `out`: loss, entropy, margin, EL2N, and 1 if the prediction is correct, 0 if it is not.

    Raises:
        ValueError: for NaN or infinity in `logits` and targets out of range.
    """
    classes = logits.shape[2]
    skipped = (targets == -1) & masked
    check_targets(targets, skipped, classes)
    x = logits.detach().to(compute_dtype(logits.dtype))
    check_logits(x, skipped)
    x = torch.where(skipped[:, :, None], 0, x)
    t = torch.where(skipped, 0, targets)[:, :, None]

    log_p = x.log_softmax(-1)
    p = log_p.exp()
    others = p.scatter(-1, t, 0)
    largest = x.amax(-1, keepdim=True)
    # argmax may name any of equal logits.
    first = torch.where(x == largest, torch.arange(classes, device=x.device), classes).amin(-1)
    scores = torch.stack(
        [
            -log_p.gather(-1, t)[:, :, 0],
            -row_sums(torch.where(p > 0, p * log_p, 0)),
            p.gather(-1, t)[:, :, 0] - others.amax(-1),
            row_sums((p - torch.zeros_like(p).scatter(-1, t, 1)).square()).sqrt(),
            (first == t[:, :, 0]).to(x.dtype),
        ]
    )
    scores = torch.where(skipped, 0, scores)
    return scores if out is None else out.copy_(scores)
