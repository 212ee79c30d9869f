"""The updates of the members of all groups: in their largest dimensions, block by block, summed over pairs, or as shorter rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from flashcoreset._core.scaling import exponent_into, scale
from flashcoreset._core.tensor import check_finite
from flashcoreset.gradients.adam import AdamState
from flashcoreset.matching.backend import Kernels
from flashcoreset.matching.problem import Gradients, Problem, Updates
from flashcoreset.matching.rule import check_history as check_moments

BLOCK_BYTES = 1 << 25  # bytes of the gradients that are handled together
# Largest magnitudes of updates whose squares are normal numbers, also for rows that are 2^100 times nearer.
SAFE = (-400, 450)


def in_largest_dimensions(
    problem: Problem, history: AdamState | None, kernels: Kernels
) -> tuple[Tensor, list[Tensor]]:
    """The `top` dimensions of each group, and its members' updates there."""
    assert problem.top is not None
    if problem.g.factors is None:
        dims, u = kernels.top_updates(Updates(problem.g, history, *_offsets(problem), problem.top))
    else:
        dims, u = _largest_of_blocks(problem, history, kernels, problem.top)
    return dims, list(u.split([len(rows) for rows, _ in problem.members]))


def _largest_of_blocks(
    problem: Problem, history: AdamState | None, kernels: Kernels, top: int
) -> tuple[Tensor, Tensor]:
    """The dimensions [G, top] and updates [R, top] of `Kernels.top_updates`, kept while blocks of dimensions pass by."""
    sizes = [len(rows) for rows, _ in problem.members]
    dims: list[Tensor] = []
    u: list[Tensor] = []
    for begin, block_dims, block in _blocks_of_updates(problem, history, kernels, top):
        parts = block.split(sizes)
        if not dims:
            dims, u = list(block_dims), list(parts)
            continue
        for group, part in enumerate(parts):
            # A stable sort, so that among equal means the lower dimension, which is earlier, stays.
            every = torch.cat([u[group], part], 1)
            order = every.mean(0).abs().sort(descending=True, stable=True).indices[:top]
            dims[group] = torch.cat([dims[group], block_dims[group] + begin])[order]
            u[group] = every[:, order]
    return torch.stack(dims), torch.cat(u)


def history_after(
    g: Gradients, history: AdamState, chosen: Tensor, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """The means m and v of `Kernels.update_history`, of gradients of any form."""
    if g.factors is None:
        return kernels.update_history(g, history, chosen)
    taken = replace(g, values=g.values[chosen], factors=g.factors.take(chosen))
    every = torch.arange(len(chosen), device=chosen.device)
    new_m, new_v = torch.empty_like(history.m), torch.empty_like(history.v)
    for begin, end in blocks(taken):
        own = replace(history, m=history.m[begin:end], v=history.v[begin:end])
        part = Gradients(taken.columns(begin, end))
        new_m[begin:end], new_v[begin:end] = kernels.update_history(part, own, every)
    return new_m, new_v


def blocks(g: Gradients) -> Iterator[tuple[int, int]]:
    """Ranges of dimensions that are handled together."""
    step = max(1, BLOCK_BYTES // (8 * g.count))
    for begin in range(0, g.numel, step):
        yield begin, min(begin + step, g.numel)


def _offsets(problem: Problem) -> tuple[Tensor, Tensor]:
    """The groups' rows, one group after the other, and where each begins."""
    rows = [rows for rows, _ in problem.members]
    begins = list(accumulate((len(r) for r in rows), initial=0))
    return rows[0] if len(rows) == 1 else torch.cat(rows), torch.tensor(begins, device=rows[0].device)


def _sums_of_pairs(
    problem: Problem,
    history: AdamState | None,
    kernels: Kernels,
    metric: str,
    exponents: list[int] | None = None,
) -> list[Tensor]:
    """For each group the "l1", "sqeuclidean" or "dot" of its pairs, [members, members] float64, summed over blocks of dimensions; the
    updates of all members [R] are multiplied by 2^exponents."""
    sizes = [len(rows) for rows, _ in problem.members]
    sums = [problem.members[0][0].new_zeros(size, size, dtype=torch.float64) for size in sizes]
    for _, _, u in _blocks_of_updates(problem, history, kernels):
        for total, rows in zip(
            sums, (u if exponents is None else scale(u, exponents)).split(sizes), strict=True
        ):
            total += kernels.pairwise(rows, metric=metric)
    return sums


def _blocks_of_updates(
    problem: Problem, history: AdamState | None, kernels: Kernels, top: int | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each block of dimensions its first one, at most `top` of its dimensions for each group, the largest first, counted from there
    (None: all), and the updates of all members [R, dimensions] float64 there, group after group."""
    g = problem.g
    member, offset = _offsets(problem)
    for begin, end in blocks(g):
        part = Gradients(g.columns(begin, end))
        own = None
        if history is not None:
            own = replace(history, m=history.m[begin:end], v=history.v[begin:end])
        wanted = part.numel if top is None else min(top, part.numel)
        try:
            dims, u = kernels.top_updates(Updates(part, own, member, offset, wanted))
        except ValueError as error:
            raise explained(problem, history, error) from None
        yield begin, dims, u


def scaled_sums(
    problem: Problem, history: AdamState | None, kernels: Kernels, metric: str, each_row: bool = False
) -> tuple[list[Tensor], list[int]]:
    """The sums of pairs of each group, and the exponent of the power of two that the updates were multiplied by so that squares stay
    in the range of float64. `each_row`: every row by its own power, which does not change cosines."""
    sums = _sums_of_pairs(problem, history, kernels, metric)
    low, high = (2.0 ** (2 * end) for end in SAFE)
    sizes = [len(total) for total in sums]
    for total in sums:
        judged = total.diagonal() if each_row else total.amax()
        if not bool(((judged >= low) & (judged <= high)).all()):
            break
    else:
        return sums, [0] * len(sums)
    most = torch.zeros(sum(sizes), dtype=torch.float64, device=sums[0].device)
    for _, _, u in _blocks_of_updates(problem, history, kernels):
        most = torch.maximum(most, u.abs().amax(1))
    by_row = [exponent_into(value, SAFE) for value in most.tolist()]
    by_group = [exponent_into(float(part.max()), SAFE) for part in most.split(sizes)]
    if not any(by_row if each_row else by_group):
        return sums, [0] * len(sums)
    if not each_row:
        by_row = [e for e, size in zip(by_group, sizes, strict=True) for _ in range(size)]
    return _sums_of_pairs(problem, history, kernels, metric, by_row), by_group


def as_short_rows(problem: Problem, history: AdamState | None, kernels: Kernels) -> Iterable[Tensor]:
    """For each group, rows with the inner products of its updates in all dimensions: weighted sums of these rows are as near to each
    other as those of the updates."""
    g = problem.g
    if history is None and g.length is None and g.factors is None:
        # One group after the other; a group of all rows needs no copy.
        return (
            (g.values if len(rows) == g.count else g.values[rows]).to(g.dtype) for rows, _ in problem.members
        )
    if history is None and g.factors is None:
        # c Z has the inner products of c F, where Z Z^T = F F^T.
        factor = _factor(gram_of_directions(g))
        return [g.values[rows].double() @ factor for rows, _ in problem.members]
    sums, exponents = scaled_sums(problem, history, kernels, "dot")
    return [scale(_factor(total), -exponent) for total, exponent in zip(sums, exponents, strict=True)]


def gram_of_directions(g: Gradients) -> Tensor:
    """The inner products [q, q] float64 of shared directions."""
    gram = g.values.new_zeros(g.values.shape[1], g.values.shape[1], dtype=torch.float64)
    step = max(1, BLOCK_BYTES // (8 * len(gram)))
    for begin in range(0, g.numel, step):
        z = g.shared.directions(begin, min(begin + step, g.numel)).double()
        gram += z @ z.T
    return gram


def _factor(gram: Tensor) -> Tensor:
    """A matrix F with F F^T = gram, which is positive semidefinite except for rounding."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def check_rows(problem: Problem, name: str) -> None:
    """Raises ValueError for NaN and infinity in rows that are matched."""
    values = problem.g.values
    try:
        return check_finite(values, name)
    except ValueError:
        ignored = torch.ones(len(values), dtype=torch.bool, device=values.device)
    for rows, _ in problem.members:
        ignored[rows] = False
    check_finite(values.masked_fill(ignored[:, None], 0), name)


def explained(problem: Problem, history: AdamState | None, error: ValueError) -> ValueError:
    """The error for the arguments in place of a kernel's `error` for a block of dimensions, a sum or a group's rows: it names the first
    NaN or infinity; `error` itself if there is none."""
    try:
        if problem.g.length is None:
            check_rows(problem, "g")
        if history is not None:
            check_moments(history.m, history.v)
    except ValueError as found:
        return found
    return error
