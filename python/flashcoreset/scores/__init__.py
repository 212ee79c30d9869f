"""Scores of samples from a classifier's outputs: arguments checked, the chosen kernel called, tokens averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.op import define_op
from flashcoreset._core.saving import Saved, savable
from flashcoreset._core.tensor import (
    as_dense,
    as_floating,
    as_integer,
    as_integers,
    as_tensor,
    compute_dtype,
    is_traced,
    one_of,
)
from flashcoreset.scores.backend import choose
from flashcoreset.scores.checks import check_targets, mean_over_tokens


@savable
@dataclass(frozen=True, eq=False)
class SampleScores(Saved):
    """What `sample_scores` returns: five numbers per sample.

    Attributes:
        loss: [N], the cross-entropy -log p_t, in nats.
        entropy: [N], of the predicted probabilities, in nats.
        margin: [N], p_t less the largest probability of another class, in [-1, 1]; with margin="logit" of the logits.
        el2n: [N], the Euclidean norm of p - onehot(t), in [0, sqrt(2)].
        correct: [N] bool, whether the prediction is the target; for logits of tokens [N] floating, the share of
            tokens that the prediction gets right.

    Example:
        >>> import torch, flashcoreset as fc
        >>> scores = fc.sample_scores(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> scores.correct
        tensor([ True, False])
    """

    loss: Tensor
    entropy: Tensor
    margin: Tensor
    el2n: Tensor
    correct: Tensor


MARGINS = ("probability", "logit")


def sample_scores(
    logits: Any,
    targets: Any,
    mask: Any = None,
    *,
    margin: str = "probability",
    ignore_index: int = -100,
    backend: str | None = None,
) -> SampleScores:
    """Loss, entropy, margin, EL2N and correctness of every sample, from one reading of the logits.

    With p = softmax(logits) and the target t: loss = -log p_t, entropy = -sum_j p_j log p_j, margin = p_t -
    max_{j != t} p_j (the largest probability of no other class counts as 0), el2n = |p - onehot(t)|_2, correct =
    whether t is the class of the largest logit (the lowest class among equals). For logits [N, T, C] each score is
    the mean over a sample's tokens. Nothing is differentiable.

    Args:
        logits: [N, C], or [N, T, C] for T tokens per sample; float16, bfloat16, float32 or float64 (half types
            compute in float32). Strides may be any: logits[:, :-1] costs no copy.
        targets: [N] or [N, T] integers in [0, C).
        mask: [N, T], bool or integers 0 and 1, for logits [N, T, C]: which tokens count, at least one in each
            sample. Logits and targets of other tokens may be anything (NaN, -100) and are not read by the
            compiled kernels. None: all tokens count.
        margin: "probability", or "logit": the target's logit less the largest of another class, as Pleiss et al. take it (one
            more reading of the logits).
        ignore_index: the target of tokens that do not count, as in torch's cross_entropy; for logits [N, T, C].
        backend: None, "cpu", "triton" (on CUDA tensors) or "torch".

    Returns:
        SampleScores, each [N]: float64 for float64 logits, else float32; `correct` is bool for logits [N, C] and
        a share of tokens for [N, T, C].

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, NaN or infinity in the logits, targets out of range, a mask that is not 0
            and 1, a sample in which no token counts, and margin "logit" for a single class.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Paul, Ganguli and Dziugaite, "Deep learning on a data diet: finding important examples early in
    training", NeurIPS 2021, definition 2.2 (EL2N); Pleiss, Zhang, Elenberg and Weinberger, "Identifying
    mislabeled data using the area under the margin ranking", NeurIPS 2020 (margin, here of probabilities).

    Example:
        >>> import torch, flashcoreset as fc
        >>> logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [8.0, 0.0, 0.0, 0.0]])
        >>> scores = fc.sample_scores(logits, torch.tensor([0, 0]))
        >>> scores.margin
        tensor([0.0000, 0.9987])
        >>> tokens = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
        >>> targets = torch.tensor([[3, 1, 4, -100, -100], [1, 5, 9, 2, 6]])
        >>> fc.sample_scores(tokens, targets, targets >= 0).loss.shape
        torch.Size([2])
    """
    check_backend(backend)
    one_of(margin, "margin", MARGINS)
    ignored = as_integer(ignore_index, "ignore_index")
    x, t, m = _check(logits, targets, mask)
    if margin == "logit" and x.shape[-1] == 1:
        raise ValueError("logits must have at least two classes for margin 'logit', got one")
    solve = _SCORES if is_traced(x) else _solve
    loss, entropy, margins, el2n, correct = solve(x, t, m, margin == "logit", ignored, backend).unbind()
    return SampleScores(loss, entropy, margins, el2n, correct > 0 if x.dim() == 2 else correct)


def _check(logits: Any, targets: Any, mask: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    x = as_floating(as_tensor(logits, "logits"), "logits")
    if x.dim() not in (2, 3) or 0 in x.shape:
        raise ValueError(
            f"logits must have shape [samples, classes] or [samples, tokens, classes], each >= 1, got {tuple(x.shape)}"
        )
    rows = tuple(x.shape[:-1])
    t = as_integers(targets, "targets", rows, "logits", x.device)
    if mask is None:
        return x, t, None
    if x.dim() == 2:
        raise ValueError(
            f"mask is for logits [samples, tokens, classes], got it with logits of shape {tuple(x.shape)}"
        )
    m = as_dense(mask, "mask")
    if m.dtype == torch.bool:
        m = m.to(torch.uint8)
    return x, t, as_integers(m, "mask", rows, "logits", x.device)


def _solve(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    of_logits: bool,
    ignore_index: int,
    backend: str | None,
) -> Tensor:
    """The scores [5, N], in the order of the attributes of SampleScores."""
    kernels = choose(backend, logits.device)
    kept = None
    ignored = targets == ignore_index
    if logits.dim() == 3 and bool(ignored.any()):
        mask = ~ignored if mask is None else mask * ~ignored
    if mask is not None:
        kept = _checked_mask(mask)
        check_targets(targets, ~kept, logits.shape[-1])
        targets = torch.where(kept, targets, -1)
    if logits.dim() == 2:
        logits, targets = logits.unsqueeze(1), targets.unsqueeze(1)
        scores = kernels.sample_scores(logits, targets)
        if of_logits:
            scores[2] = _margins_of_logits(logits, targets, scores.dtype)
        return scores[:, :, 0]
    scores = kernels.sample_scores(logits, targets, masked=kept is not None)
    if of_logits:
        margins = _margins_of_logits(logits, targets.clamp(min=0), scores.dtype)
        scores[2] = margins if kept is None else torch.where(kept, margins, 0)
    return mean_over_tokens(scores, kept)


def _margins_of_logits(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The target's logit less the largest of another class, [N, T]."""
    largest, classes = logits.detach().topk(2, -1)
    own = logits.detach().gather(-1, targets[..., None])[..., 0]
    other = torch.where(classes[..., 0] == targets, largest[..., 1], largest[..., 0])
    return own.to(dtype) - other.to(dtype)


def _checked_mask(mask: Tensor) -> Tensor:
    """`mask` [N, T] as bool."""
    bad = (mask != 0) & (mask != 1)
    if bad.any():
        i, token = bad.nonzero()[0].tolist()
        raise ValueError(f"mask must hold 0 and 1, got {int(mask[i, token])} at sample {i}, token {token}")
    kept = mask == 1
    empty = ~kept.any(1)
    if empty.any():
        raise ValueError(
            f"mask must keep at least one token of every sample, got none at sample {int(empty.nonzero()[0])}"
        )
    return kept


# The torch op, which torch.compile and fake tensors see.


def _fake(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    of_logits: bool,
    ignore_index: int,
    backend: str | None,
) -> Tensor:
    return logits.new_empty(5, logits.shape[0], dtype=compute_dtype(logits.dtype))


_SCORES = define_op("sample_scores", _solve, _fake)


@register_estimate("sample_scores")
def _estimate(
    logits: Any,
    targets: Any = None,
    mask: Any = None,
    *,
    margin: str = "probability",
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> int:
    """The bytes of one call; see `memory_estimate`."""
    check_backend(backend)
    dtype = as_dtype(dtype)
    shape = as_shape(logits, "logits", 3 if len(getattr(logits, "shape", logits)) == 3 else 2)
    for name, value in (("targets", targets), ("mask", mask)):
        if value is not None and as_shape(value, name, len(shape) - 1) != shape[:-1]:
            raise ValueError(
                f"{name} must have shape {shape[:-1]} as logits has it, got {as_shape(value, name, len(shape) - 1)}"
            )
    rows, classes = math.prod(shape[:-1]), shape[-1]
    size = compute_dtype(dtype).itemsize
    scores = 5 * rows * size
    # The means over tokens: in float64, with cumulative sums; the masks made from a mask.
    means = 2 * 5 * rows * 8 if len(shape) == 3 else 0
    masks = 32 * rows if mask is not None else 3 * rows
    if margin == "logit":
        masks += 40 * rows
    if backend == "torch":
        return scores * 2 + means + masks + rows * classes * (9 * size + 12)
    return scores + means + masks + torch.get_num_threads() * (1 << 16)
