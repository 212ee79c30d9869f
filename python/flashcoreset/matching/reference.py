"""What gradient matching computes from gradients, in plain torch: the definition that the kernels are tested against.

With Adam's history m, v [D] before step t, the gradient g_i would lead to the update

    u_i = mhat_i / (sqrt(vhat_i) + eps),   mhat_i = (beta1 m + (1 - beta1) g_i) / (1 - beta1^t),
                                           vhat_i = (beta2 v + (1 - beta2) g_i^2) / (1 - beta2^t).

For each group of samples `top_updates` takes the dimensions where the mean of the group's u_i is largest in size, ties to the lower
dimension, and restricts these u_i to them. `update_history` makes m and v the means of the new m_i and v_i over the chosen samples.

Source: Nguyen, Yang, Anand, Yang and Mirzasoleiman, "Mini-batch coresets for memory-efficient language model training on
data mixtures" (CoLM), ICLR 2025, section 4 (equations 7 and 8 and the sparse dimensions after them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.gradients.adam import AdamState
from flashcoreset.matching.problem import Gradients, Updates
from flashcoreset.matching.rule import BLOCK, OVERFLOW, check_history, entries, overflow
from flashcoreset.pairwise.reference import pairwise as pairwise

TAKES = Takes()


def top_updates(problem: Updates) -> tuple[Tensor, Tensor]:
    g, member, offset = problem.g, problem.member, problem.offset
    bounds = list(zip(offset.tolist(), offset.tolist()[1:], strict=False))
    best = [(g.values.new_empty(0, dtype=torch.float64), member.new_empty(0)) for _ in bounds]
    if problem.history is not None:
        check_history(problem.history.m, problem.history.v)
    for row in member.sort().values.tolist():
        bad = ~torch.isfinite(g.values[row])
        if bad.any():
            column = int(bad.nonzero()[0])
            value = float(g.values[row, column])
            raise ValueError(f"g must be finite, got {value} at row {row}, column {column}")
    for begin in range(0, g.numel, BLOCK):
        at = torch.arange(begin, min(begin + BLOCK, g.numel), device=g.values.device)
        for group, (first, last) in enumerate(bounds):
            u = _updates(problem, member[first:last], at)
            values = torch.cat([best[group][0], u.mean(0).abs()])
            dims = torch.cat([best[group][1], at])
            # A stable sort, so that among equal values the lower dimension, which is earlier, stays.
            order = values.sort(descending=True, stable=True).indices[: problem.top]
            best[group] = values[order], dims[order]
    dims = torch.stack([found for _, found in best])
    u = torch.cat(
        [_updates(problem, member[first:last], dims[group]) for group, (first, last) in enumerate(bounds)]
    )
    if not bool(u.isfinite().all()):  # NaN is above all else when sorted
        at = dims.repeat_interleave(offset.diff(), 0)[~u.isfinite()].min()
        raise ValueError(overflow(int(at)))
    return dims, u


def _updates(problem: Updates, rows: Tensor, at: Tensor) -> Tensor:
    """The updates u [rows, dimensions at] float64."""
    values, history = entries(problem.g, rows, at), problem.history
    if history is None:
        return values
    return problem.rule.updates(values, history.m[at].double(), history.v[at].double())


def update_history(g: Gradients, history: AdamState, chosen: Tensor) -> tuple[Tensor, Tensor]:
    m, v, (beta1, beta2) = history.m, history.v, history.betas
    new_m, new_v = torch.empty_like(m), torch.empty_like(v)
    for begin in range(0, len(m), BLOCK):
        part = slice(begin, begin + BLOCK)
        at = torch.arange(begin, min(begin + BLOCK, len(m)), device=m.device)
        values = entries(g, chosen, at)
        new_m[part] = beta1 * m[part].double() + (1 - beta1) * values.mean(0)
        new_v[part] = beta2 * v[part].double() + (1 - beta2) * values.square().mean(0)
    if not bool(new_m.isfinite().all() & new_v.isfinite().all()):
        raise ValueError(OVERFLOW)
    return new_m, new_v
