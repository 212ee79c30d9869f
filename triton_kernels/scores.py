"""Loss, entropy, margin, EL2N and correctness of rows of logits; see csrc/cpu/scores.cpp for the formulas, in which the target's
class is left out of the sums so that nothing cancels.

A program takes a row, in blocks of columns: the largest value so far, and under it the sums of e, e^2 and e d, scaled when
that value grows. Elements are computed in float32 (float64 for float64), a row's sums and the scores made from them in
float64.

A target that is out of range, NaN and infinity leave the number of the first such row in `refused`, by an atomic minimum.

Cost: itemsize * C bytes read and C exponentials per row; a row is read once.

Rejected: several rows per program for few classes (a row of 128 numbers is one warp's single load already), and sums lane by
lane with one reduction at the end (a second exponential per element).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 4096


@triton.jit
def log1p(r):
    """log(1 + r) of a float64 r >= 0, to the last digits of a small r (by Kahan)."""
    u = 1.0 + r
    return tl.where(u == 1.0, r, tl.log(u) * (r / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["tokens", "classes"])
def scores_kernel(
    logits,  # [N, T, C]
    sample_stride,
    token_stride,
    class_stride,
    targets,  # [N * T] int64
    results,  # [5, N * T]
    refused,  # [1] int64, N * T at first
    rows,
    tokens,
    classes,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    NUMBER: tl.constexpr = results.dtype.element_ty
    INFINITY: tl.constexpr = float("inf")
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(targets + row)
    valid = (t >= 0) & (t < classes)
    skipped = t == -1
    if not MASKED:
        skipped = t != t
    x = logits + (row // tokens) * sample_stride + (row % tokens) * token_stride
    own = tl.load(x + t * class_stride, mask=valid, other=0).to(NUMBER)
    valid = valid & (tl.abs(own) < INFINITY)
    own = tl.where(valid, own, 0)
    most = own
    before = tl.full((), -INFINITY, NUMBER)
    after = tl.full((), -INFINITY, NUMBER)
    rest = tl.full((), 0, tl.float64)
    square = tl.full((), 0, tl.float64)
    weighted = tl.full((), 0, tl.float64)
    left = tl.where(valid, tl.cast(classes, tl.int64), 0)
    first = tl.full((), 0, tl.int64)
    while left > 0:
        j = first + tl.arange(0, BLOCK)
        others = (j < classes) & (j != t)
        value = tl.load(x + j * class_stride, mask=others, other=0).to(NUMBER)
        finite = tl.abs(value) < INFINITY
        valid = valid & (tl.sum(finite.to(tl.int32), axis=0) == BLOCK)
        value = tl.where(finite, value, 0)
        before = tl.maximum(before, tl.max(tl.where(others & (j < t), value, -INFINITY), axis=0))
        after = tl.maximum(after, tl.max(tl.where(others & (j > t), value, -INFINITY), axis=0))
        now = tl.maximum(most, tl.maximum(before, after))
        # For values further below, the exponential is 0; so it is for the target and for columns that are no class.
        d = tl.where(others, tl.maximum(value - now, -1000.0), -1000.0)
        e = tl.exp(d)
        shift = most.to(tl.float64) - now.to(tl.float64)
        factor = tl.exp(shift)
        weighted = factor * (weighted + rest * tl.maximum(shift, -1000.0))
        weighted += tl.sum(e * d, axis=0).to(tl.float64)
        rest = rest * factor + tl.sum(e, axis=0).to(tl.float64)
        square = square * factor * factor + tl.sum(e * e, axis=0).to(tl.float64)
        most = now
        first += BLOCK
        left -= BLOCK
    tl.atomic_min(refused, row, mask=(valid == 0) & (skipped == 0), sem="relaxed")

    d_own = own.to(tl.float64) - most.to(tl.float64)
    d_other = tl.maximum(before, after).to(tl.float64) - most.to(tl.float64)
    e_own, e_other = tl.exp(d_own), tl.exp(d_other)
    total = rest + e_own
    log_total = tl.where(d_own == 0, log1p(rest), tl.log(total))
    product = e_own * tl.maximum(d_own, -1000.0)
    place = results + row
    tl.store(place, tl.where(skipped, 0.0, log_total - d_own).to(NUMBER))
    tl.store(place + rows, tl.where(skipped, 0.0, log_total - (weighted + product) / total).to(NUMBER))
    tl.store(place + 2 * rows, tl.where(skipped, 0.0, (e_own - e_other) / total).to(NUMBER))
    tl.store(place + 3 * rows, tl.where(skipped, 0.0, tl.sqrt(square + rest * rest) / total).to(NUMBER))
    correct = (own > before) & (own >= after) & (skipped == 0)
    tl.store(place + 4 * rows, tl.where(correct, 1.0, 0.0).to(NUMBER))


def block_of(classes: int) -> tuple[int, int]:
    """Columns that a program takes at a time, and its warps."""
    block = min(max(triton.next_power_of_2(classes), 32), _LARGEST_BLOCK)
    return block, max(1, min(8, block // 256))


def launch_scores(logits: Tensor, targets: Tensor, masked: bool, out: Tensor) -> int:
    """Writes the scores of `logits` [N, T, C] with `targets` [N, T] to `out` [5, N, T], both contiguous; returns the
    first row, of N * T, that is refused, or N * T. Waits for the device."""
    samples, tokens, classes = logits.shape
    rows = samples * tokens
    refused = torch.full((1,), rows, dtype=torch.int64, device=logits.device)
    block, warps = block_of(classes)
    with torch.cuda.device_of(logits):
        scores_kernel[(rows,)](
            logits,
            *logits.stride(),
            targets,
            out,
            refused,
            rows,
            tokens,
            classes,
            MASKED=masked,
            BLOCK=block,
            num_warps=warps,
        )
    return int(refused)
