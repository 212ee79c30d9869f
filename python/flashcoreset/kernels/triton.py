"""The Triton kernels: on CUDA tensors, or in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors.

Importing this module imports triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flashcoreset._errors import BackendUnavailableError, no_sparse_kernel
from flashcoreset._tensor import Csr, check_finite, compute_dtype
from flashcoreset.kernels import pursuit
from flashcoreset.kernels.caratheodory import reduce_on_device
from flashcoreset.reference.facility_location import (
    DEFAULT_MEMORY_BUDGET,
    DISTANCES,
    bounds_of_matrix,
    bounds_of_points,
    gain_scale,
    normalize_rows,
)
from flashcoreset.reference.matching import OVERFLOW, Rule, refuse
from flashcoreset.reference.scores import check_logits, check_targets
from flashcoreset.reference.sinkhorn import Solution, dual_value, range_fault
from flashcoreset.triton_kernels.caratheodory import launch_keep, launch_sums
from flashcoreset.triton_kernels.facility_location import Similarities
from flashcoreset.triton_kernels.matching import (
    Gradients,
    launch_directions,
    launch_history,
    launch_top_updates,
)
from flashcoreset.triton_kernels.pairwise import INTERPRETED, launch_pairwise, panel
from flashcoreset.triton_kernels.pursuit import (
    launch_pick,
    launch_products,
    launch_residual,
    launch_squares,
)
from flashcoreset.triton_kernels.scores import launch_scores
from flashcoreset.triton_kernels.sinkhorn import RUNNING, Problems, Run
from flashcoreset.triton_kernels.sketch import Projection, launch_matrix, launch_sketch

__all__ = [
    "INTERPRETED",
    "SKETCH_TAKES",
    "FacilityLocation",
    "caratheodory",
    "directions",
    "frank_wolfe",
    "orthogonal_matching_pursuit",
    "pairwise",
    "projection_matrix",
    "sample_scores",
    "sinkhorn",
    "sinkhorn_apply",
    "sinkhorn_plan",
    "sketch",
    "top_updates",
    "update_history",
]

# What `sketch` reads as it is, beside float32 and float64.
SKETCH_TAKES = (torch.float16, torch.bfloat16)

# Candidates that a lazy pick looks at first, a tile of them at least: fewer would take as long.
_BATCH = 128

_PURSUIT = pursuit.Launchers(launch_products, launch_squares, launch_pick, launch_residual)

# Sinkhorn iterations that are launched between two looks at what is solved.
_ITERATIONS = 10

# Numbers that are looked at together for NaN: masks stay small beside the data.
_LOOKED_AT = 1 << 22


def _panels(x: Tensor, y: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    if metric == "cosine":
        x, y = normalize_rows(x), None if y is None else normalize_rows(y)
    a = panel(x)
    return a, a if y is None else panel(y)


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """Similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of all pairs of rows.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64; half types are computed in float32.
        y: [m, d], same dtype; None is `x` itself.
        metric: "cosine", "dot", "euclidean", "sqeuclidean" or "l1".
        out: [n, m] float64 for float64, else float32, rows contiguous; None allocates it.

    Returns:
        `out`.

    Raises:
        ValueError: for NaN or infinity in `x` or `y`.
    """
    check_finite(x, "x")
    if y is not None:
        check_finite(y, "y")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.detach().to(dtype), None if y is None else y.detach().to(dtype)
    if out is None:
        out = x.new_empty(x.shape[0], (x if y is None else y).shape[0])
    launch_pairwise(*_panels(x, y, metric), out, metric)
    return out


class FacilityLocation:
    """A greedy run that advances pick by pick; see `flashcoreset.reference.facility_location` for the
    definition.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from: those of points, and those that a matrix holds negated.
        memory_budget: similarities of points are kept if they take at most so many bytes, else computed as
            needed.
        expected_picks: how many picks are likely; not used, since nothing is prepared for later picks.

    Raises:
        BackendUnavailableError: for a sparse matrix.
        ValueError: for NaN or infinity in `x` or `clients`, or similarities that overflow.
    """

    def __init__(
        self,
        x: Tensor | Csr,
        clients: Tensor | None = None,
        *,
        metric: str = "cosine",
        weights: Tensor | None = None,
        preselected: Tensor | None = None,
        offset: float = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        expected_picks: int | None = None,
    ) -> None:
        if isinstance(x, Csr):
            raise BackendUnavailableError(f"backend 'triton': {no_sparse_kernel('triton')}")
        check_finite(x, "x")
        n, m = x.shape[0], x.shape[1] if metric == "precomputed" else x.shape[0]
        if clients is not None:
            check_finite(clients, "clients")
            m = clients.shape[0]
        device = x.device
        self._n, self._self_clients = n, clients is None and n == m
        has_offset = metric in DISTANCES or (metric == "precomputed" and offset)
        self._floor = torch.tensor(-offset if has_offset else 0.0, dtype=x.dtype, device=device)
        self._weights = torch.ones(m, dtype=torch.float64, device=device) if weights is None else weights
        if metric == "precomputed":
            upper = bounds_of_matrix(x, float(self._floor))
        else:
            if metric == "cosine":
                x, clients = normalize_rows(x), None if clients is None else normalize_rows(clients)
            upper = bounds_of_points(x, x if clients is None else clients, metric, float(self._floor))
        self._scale = gain_scale(upper, self._weights, metric, x.dtype)
        self._similarities = _similarities(x, clients, metric, m, memory_budget)
        self._scaled_weights = (self._weights * self._scale).to(x.dtype)

        self._numbers = torch.arange(n, device=device)
        # Gains when last computed, which bound today's; -1 for what is picked or preselected.
        self._bounds = torch.full((n,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
        self._covered = torch.full((m,), -math.inf, dtype=x.dtype, device=device)  # best of the preselected
        self._owner = torch.full((m,), -1, dtype=torch.int64, device=device)
        self._own_similarity = torch.empty(n, dtype=x.dtype, device=device)  # s(j, j) by position
        for j in [] if preselected is None else preselected.tolist():
            self._similarities.update(j, 0, self._covered, self._owner, self._own_similarity)
            self._bounds[j] = -1
        self._owner.fill_(-1)
        self._best = torch.maximum(self._covered, self._floor)
        self._left = n - (0 if preselected is None else preselected.shape[0])
        self._picks: list[int] = []
        self._gains: list[int] = []

    def step(self, count: int, naive: bool = False) -> int:
        """Makes up to `count` further picks; `naive` evaluates every candidate for each. Returns the number
        of picks so far."""
        for _ in range(min(count, self._left)):
            self._pick(*self._find_best(self._n if naive or not self._picks else _BATCH))
        return len(self._picks)

    def _find_best(self, batch: int) -> tuple[int, int]:
        """The candidate of the largest gain, the lowest of those, and the gain; `batch` candidates are
        evaluated first, then twice as many each time."""
        # A bound of 0 is a gain of 0.
        current = self._bounds <= 0
        while True:
            if batch >= self._n:
                gains = self._similarities.gains(None, self._best, self._scaled_weights)
                self._bounds = torch.where(self._bounds < 0, -1, gains)
                current.fill_(True)
            else:
                index = torch.where(current, -1, self._bounds).topk(batch).indices
                gains = self._similarities.gains(index, self._best, self._scaled_weights)
                self._bounds[index] = torch.where(self._bounds[index] < 0, -1, gains)
                current[index] = True
            largest = self._bounds.max()
            first = torch.where(self._bounds == largest, self._numbers, self._n).min()
            j, gain, is_current = torch.stack((first, largest, current[first].long())).tolist()
            if is_current:
                return j, gain
            batch *= 2

    def step_among(self, candidates: Tensor) -> int:
        """One pick among `candidates` [r] int64, which are neither picked nor preselected. Returns the
        pick."""
        candidates = candidates.sort().values
        gains = self._similarities.gains(candidates, self._best, self._scaled_weights)
        self._bounds[candidates] = gains
        largest = gains.max()
        j, gain = torch.stack((candidates[gains == largest][0], largest)).tolist()
        self._pick(j, gain)
        return j

    def _pick(self, j: int, gain: int) -> None:
        self._similarities.update(j, len(self._picks), self._best, self._owner, self._own_similarity)
        self._bounds[j] = -1
        self._left -= 1
        self._picks.append(j)
        self._gains.append(gain)

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32,
        `assignment` [m] int64; returns f(S), the preselected included."""
        k = len(self._picks)
        picks = torch.tensor(self._picks, dtype=torch.int64, device=self._best.device)
        owner = self._owner.clone()
        if self._self_clients:
            # A pick serves itself unless a preselected item is more similar to it.
            itself = ~(self._covered[picks] > self._own_similarity[:k])
            owner[picks[itself]] = itself.nonzero()[:, 0]
        indices.copy_(picks)
        gains.copy_(torch.tensor([g / self._scale if g else 0.0 for g in self._gains], dtype=torch.float64))
        # On the CPU, where the order of summation is fixed.
        served, client_weights = (owner >= 0).cpu(), self._weights.cpu()
        weights.copy_(torch.bincount(owner.cpu()[served], client_weights[served], minlength=k).double())
        assignment.copy_(owner)
        return math.fsum((client_weights * (self._best.double() - self._floor.double()).cpu()).tolist())


def _similarities(x: Tensor, clients: Tensor | None, metric: str, m: int, memory_budget: int) -> Similarities:
    """Of a matrix `x`, or of points whose rows have unit length already for cosine."""
    n = x.shape[0]
    if metric == "precomputed":
        matrix = x if x.stride(1) == 1 else x.contiguous()
        return Similarities(metric, matrix, matrix, n, m)
    a = panel(x)
    b = a if clients is None else panel(clients)
    if n * m * x.element_size() > memory_budget:
        return Similarities(metric, a, b, n, m)
    matrix = x.new_empty(n, m)
    launch_pairwise(a, b, matrix, metric)
    if metric in DISTANCES:
        matrix.neg_()
    return Similarities("precomputed", matrix, matrix, n, m)


def sinkhorn(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    metric: str,
    reg_marginal: tuple[float, float] = (math.inf, math.inf),
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    f: Tensor | None = None,
    g: Tensor | None = None,
    memory_budget: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Solution:
    """Solves a batch of problems; see `flashcoreset.reference.sinkhorn` for the definition.

    Args:
        x: [B, n, d] points with `y` [B, m, d], or the costs [B, n, m] with `y` None and metric "precomputed"; float32 or
            float64.
        a: [B, n] float64, and b [B, m]: weights >= 0, of equal sums where both marginals are balanced.
        reg, reg_marginal: eps and (rho_a, rho_b); inf for a balanced marginal.
        metric: "sqeuclidean", "euclidean", "l1", "cosine" or "precomputed".
        x_lengths, y_lengths: [B] int64, the sizes of the problems; None for n and m.
        max_iter, tol: the most iterations and the error to stop at.
        f, g: [B, n] and [B, m] float64 to start from; None starts from 0.
        memory_budget: not used, since costs are never kept.
        report: called with the number of iterations done and their largest possible number, every few iterations.

    Raises:
        ValueError: for NaN or infinity in `x` or `y`, and costs that overflow.
    """
    counts = _counts(x, y, x_lengths, y_lengths)
    _check_problems(x, y, counts)
    start = None if f is None or g is None else (f, g)
    problems = _problems(x, y, metric, counts, start, (a, b))
    spread = _spread(x, y, metric, counts)
    batch = a.shape[0]
    for p, largest in enumerate(spread.tolist()):
        fault = range_fault(largest, reg, metric, x.dtype, f" in problem {p}" if batch > 1 else "")
        if fault is not None:
            raise ValueError(fault)
    run = Run(problems, reg, reg_marginal, tol, max_iter, spread, start is not None)
    state, iterations = [RUNNING.value] * batch, [0] * batch
    while RUNNING.value in state:
        least = min(i for i, s in zip(iterations, state, strict=True) if s == RUNNING.value)
        run.iterate(min(_ITERATIONS, max_iter - least))
        state, iterations = run.look()
        if any(s != RUNNING.value for s in state):
            run.evaluate()
            state, iterations = run.look()
        if report is not None:
            done = sum(i if s == RUNNING.value else max_iter for i, s in zip(iterations, state, strict=True))
            report(done, batch * max_iter)
    f, g = run.potentials()
    value = dual_value(f, g, a, b, run.mass, reg, reg_marginal)
    return Solution(f, g, value, run.cost, run.error, run.iterations, run.error <= run.tolerance)


def sinkhorn_apply(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    *,
    reg: float,
    metric: str,
    transpose: bool = False,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    memory_budget: int = 0,
) -> Tensor:
    """P v [B, n, k] float64 of the plans with potentials f, g for v [B, m, k]; with `transpose` P^T v [B, m, k] for v
    [B, n, k]. Rows beyond a problem's size are 0. `memory_budget` is not used."""
    counts = _counts(x, y, x_lengths, y_lengths)
    return _problems(x, y, metric, counts, (f, g), (a, b)).apply(v.to(x.dtype), reg, transpose)


def sinkhorn_plan(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    *,
    reg: float,
    metric: str,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
) -> Tensor:
    """P [B, n, m] float64 of the plans with potentials f, g; 0 beyond a problem's size."""
    counts = _counts(x, y, x_lengths, y_lengths)
    out = torch.zeros(*a.shape, b.shape[1], dtype=torch.float64, device=a.device)
    sizes = torch.stack(counts, 1).tolist()
    for p, (n, m) in enumerate(sizes):
        if y is None:
            costs = x[p, :n, :m]
        else:
            costs = x.new_empty(n, m)
            launch_pairwise(*_panels(x[p, :n], y[p, :m], metric), costs, metric)
            costs = 1 - costs if metric == "cosine" else costs
        logs = (f[p, :n, None] + g[p, :m] - costs.double()) / reg + a[p, :n, None].log() + b[p, :m].log()
        torch.exp(logs, out=out[p, :n, :m])
    return out


def _counts(
    x: Tensor, y: Tensor | None, x_lengths: Tensor | None, y_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[B] int64, the rows and the columns of each problem."""
    sizes = (x.shape[1], x.shape[2] if y is None else y.shape[1])
    rows, columns = (
        torch.full((x.shape[0],), size, dtype=torch.int64, device=x.device)
        if lengths is None
        else lengths.contiguous()
        for size, lengths in zip(sizes, (x_lengths, y_lengths), strict=True)
    )
    return rows, columns


def _inside(count: Tensor, size: int) -> Tensor:
    """[B, size] bool: what is no padding."""
    return torch.arange(size, device=count.device) < count[:, None]


def _check_problems(x: Tensor, y: Tensor | None, counts: tuple[Tensor, Tensor]) -> None:
    """Raises ValueError naming the first NaN or infinity that is not in the padding."""
    rows, columns = counts
    if y is None:
        _check_batch(x, "x", rows, columns)
        return
    width = torch.full_like(rows, x.shape[2])
    _check_batch(x, "x", rows, width)
    _check_batch(y, "y", columns, width)


def _check_batch(tensor: Tensor, name: str, rows: Tensor, columns: Tensor) -> None:
    batch, height, _ = tensor.shape
    for begin, values, inside in _row_blocks(tensor, rows, columns):
        bad = ~torch.isfinite(values) & inside
        if bool(bad.any()):
            place, column = bad.nonzero()[0].tolist()
            problem, row = divmod(begin + place, height)
            value = float(values[place, column])
            got = "NaN" if math.isnan(value) else value
            of = f" of problem {problem}" if batch > 1 else ""
            raise ValueError(f"{name} must be finite, got {got} at row {row}, column {column}{of}")


def _row_blocks(tensor: Tensor, rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Some rows at a time of all problems of `tensor` [B, n, m], one after the other: the number of the first, the rows
    [r, m], and what of them is no padding [r, m]."""
    batch, height, width = tensor.shape
    inside = _inside(rows, height).flatten()
    step = max(1, _LOOKED_AT // width)
    for begin in range(0, batch * height, step):
        numbers = torch.arange(begin, min(begin + step, batch * height), device=tensor.device)
        problem = numbers // height
        mask = inside[numbers, None] & _inside(columns[problem], width)
        yield begin, tensor[problem, numbers % height], mask


def _problems(
    x: Tensor,
    y: Tensor | None,
    metric: str,
    counts: tuple[Tensor, Tensor],
    potentials: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor],
) -> Problems:
    """As the kernels take it; `potentials` are copied, None for 0."""
    if y is not None:
        x, y = (_without_padding(points, count) for points, count in zip((x, y), counts, strict=True))
        if metric == "cosine":
            x, y = (normalize_rows(points.flatten(0, 1)).view_as(points) for points in (x, y))
    rows, columns = (
        torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if potentials is None
        else torch.where(_inside(counts[side], weight.shape[1]), potentials[side], 0).contiguous()
        for side, weight in enumerate(weights)
    )
    return Problems(x, y, metric, counts, (rows, columns), (weights[0].contiguous(), weights[1].contiguous()))


def _without_padding(points: Tensor, count: Tensor) -> Tensor:
    return torch.where(_inside(count, points.shape[1])[:, :, None], points, 0)


def _spread(x: Tensor, y: Tensor | None, metric: str, counts: tuple[Tensor, Tensor]) -> Tensor:
    """[B] float64: the range of each problem's costs, of points at least the largest, by the triangle inequality through
    the first column's point."""
    if y is None:
        largest, smallest = [], []
        for _, values, mask in _row_blocks(x, *counts):
            largest.append(torch.where(mask, values, -math.inf).amax(1))
            smallest.append(torch.where(mask, values, math.inf).amin(1))
        high, low = (torch.cat(rows).view(x.shape[:2]) for rows in (largest, smallest))
        return high.amax(1).double() - low.amin(1).double()
    if metric == "cosine":
        return torch.full((x.shape[0],), 2.0, dtype=torch.float64, device=x.device)
    far = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for points, count in zip((x, y), counts, strict=True):
        difference = points - y[:, :1]
        distance = torch.linalg.vector_norm(
            difference, 1 if metric == "l1" else 2, dim=2, dtype=torch.float64
        )
        far += torch.where(_inside(count, points.shape[1]), distance, 0).amax(1)
    return far * far if metric == "sqeuclidean" else far


def sample_scores(
    logits: Tensor, targets: Tensor, *, masked: bool = False, out: Tensor | None = None
) -> Tensor:
    """Loss, entropy, margin, EL2N and correctness (1 or 0) of every token; see `flashcoreset.reference.scores` for
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


def sketch(
    x: Tensor,
    dim: int,
    *,
    kind: str,
    seed: int,
    offset: int = 0,
    nnz: int = 1,
    out: Tensor | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """x [B, D] times the projection's matrix [D, dim]; see `flashcoreset.reference.sketch` for the definition.

    Args:
        x: float16, bfloat16, float32 or float64. NaN and infinities go where the product takes them.
        dim, kind, seed, offset, nnz: as for `fc.sketch`.
        out: [B, dim] float64 for float64, else float32, rows contiguous; None allocates it.
        allow_tf32: whether products of float32 may be TF32's, with 10 bits of significand.

    Returns:
        `out`.
    """
    x = x.detach()
    if out is None:
        out = x.new_empty(x.shape[0], dim, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    launch_sketch(x, Projection(kind, dim, seed, offset, nnz), out, allow_tf32)
    return out


def projection_matrix(
    rows: int,
    dim: int,
    *,
    kind: str,
    seed: int,
    offset: int = 0,
    nnz: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
) -> Tensor:
    """The matrix [rows, dim] itself, float32 or float64."""
    out = torch.empty(rows, dim, dtype=dtype, device=device)
    launch_matrix(Projection(kind, dim, seed, offset, nnz), out)
    return out


def directions(out: Tensor, *, seed: int, begin: int, first: int = 0) -> None:
    """Fills out [q, n] float32 or float64 with elements begin to begin + n of the directions first to first + q; see
    `flashcoreset.reference.zeroth_order` for the definition. Does not wait for the device."""
    launch_directions(out, seed, begin, first)


def top_updates(
    g: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    rule: Rule | None,
    member: Tensor,
    offset: Tensor,
    top: int,
    *,
    seed: int = 0,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The dimensions of the largest mean updates of each group, and its members' updates there.

    Waits for the device at the end, and before that for all but the last launches, so that Ctrl-C is heard.

    Args:
        g: [B, D] rows of any floating dtype; with `length` the coefficients [B, q], float32 or float64, of directions
            [q, length] from `seed`.
        m, v: [D] float64 where the rows are, else float32; None, with `rule`, takes the rows themselves as updates.
        rule: how updates are made.
        member: [R] int64, rows of the groups, one group after the other.
        offset: [G + 1] int64, where each group begins in `member`; none is empty.
        top: how many dimensions, 1 <= top <= D.

    Returns:
        dims [G, top] int64, the largest first, and u [R, top] float64.

    Raises:
        ValueError: for NaN and infinity, and where v < 0.
    """
    history = None if rule is None or m is None or v is None else (m.contiguous(), v.contiguous())
    gradients = Gradients(g.detach(), seed, length)
    dims, u, refused = launch_top_updates(
        gradients, history, rule, member.contiguous(), offset.contiguous(), top
    )
    if refused < gradients.numel:
        refuse(g, history, member, refused, seed=seed, length=length)
    return dims, u


def update_history(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    betas: tuple[float, float],
    chosen: Tensor,
    *,
    seed: int = 0,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Adam's history after a step: the means of the new m and v, [D] each, of the rows `chosen` [c] int64. Waits for the
    device.

    The other arguments are those of `top_updates`.

    Raises:
        ValueError: if they overflow.
    """
    m, v = m.contiguous(), v.contiguous()
    new_m, new_v = torch.empty_like(m), torch.empty_like(v)
    gradients = Gradients(g.detach(), seed, length)
    if launch_history(gradients, m, v, betas, chosen.contiguous(), new_m, new_v):
        raise ValueError(OVERFLOW)
    return new_m, new_v


def caratheodory(
    x: Tensor, weights: Tensor | None = None, *, max_size: int = 0, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.reference.caratheodory` for the definition.

    The device sums runs of rows, the host reduces these sums and what is left of the rows; it waits for each round.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64, in any strides.
        weights: [n] float64 >= 0 there, not all 0; None for 1.
        max_size: > 0 ends the reduction as soon as at most that many rows are left; the rows come to the host in pieces.
        out: two tensors [min(n, max(d + 1, max_size))] there, int64 and float64, to write to; None allocates them.

    Returns:
        [k] int64, ascending, and [k] float64, > 0: the first k entries of `out`.

    Raises:
        BackendUnavailableError: if there is no compiled CPU module.
        ValueError: for NaN or infinity in `x`.
    """
    return reduce_on_device(x, weights, max_size, out, launch_sums, launch_keep)


def orthogonal_matching_pursuit(
    g: Tensor,
    target: Tensor,
    k: int,
    *,
    nonnegative: bool = True,
    ridge: float = 0.0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to k rows of `g` whose weighted sum is close to `target`; see `flashcoreset.reference.pursuit` for the
    definition. The weights are fitted on the host, by the compiled CPU module, so that every pick waits for the device.

    Args:
        g: [B, D] float32 or float64. Rows that are not contiguous are copied.
        target: [D] float64.
        k: the most picks.
        nonnegative, ridge: as in the definition.
        memory_budget: bytes for columns of the Gram matrix, 8 * B each; what 2 k + 12 of them take is allocated at once, as far
            as it goes. Where k of them are more, every pick costs a pass over `g` instead.

    Returns:
        The rows [r], their weights [r] (float64) and the norms of the residual after each step (float64).

    Raises:
        BackendUnavailableError: if no compiled CPU module can be loaded.
        ValueError: for NaN or infinity, and where products overflow.
    """
    return pursuit.orthogonal_matching_pursuit(
        _PURSUIT, g, target, k, nonnegative=nonnegative, ridge=ridge, memory_budget=memory_budget
    )


def frank_wolfe(
    g: Tensor, target: Tensor, k: int, *, memory_budget: int = DEFAULT_MEMORY_BUDGET
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by k steps of Frank-Wolfe on the sphere; where columns are more than `memory_budget`, old ones are computed
    anew. Nothing is fitted, but every step waits for the device."""
    return pursuit.frank_wolfe(_PURSUIT, g, target, k, memory_budget=memory_budget)
