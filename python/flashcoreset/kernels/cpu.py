"""The compiled CPU kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcoreset import _native
from flashcoreset._tensor import Csr, compute_dtype
from flashcoreset.kernels.nearest_order import NearestOrder
from flashcoreset.reference.facility_location import DEFAULT_MEMORY_BUDGET
from flashcoreset.reference.matching import Rule
from flashcoreset.reference.sinkhorn import Solution

__all__ = [
    "FacilityLocation",
    "NearestOrder",
    "caratheodory",
    "directions",
    "frank_wolfe",
    "orthogonal_matching_pursuit",
    "pairwise",
    "sample_scores",
    "sinkhorn",
    "sinkhorn_apply",
    "sinkhorn_plan",
    "top_updates",
    "update_history",
]

# A capsule costs 0.3 us, calling Tensor.__dlpack__ from C++ 2 us.
_capsule = torch.utils.dlpack.to_dlpack
_MANY = 2**63 - 1


def _optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else _capsule(tensor)


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """Similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of all pairs of rows.

    Args:
        x: [n, d] float32 or float64, on the CPU.
        y: [m, d], same dtype; None is `x` itself, of which each pair is computed once.
        metric: "cosine", "dot", "euclidean", "sqeuclidean" or "l1".
        out: [n, m], same dtype, rows contiguous; None allocates it.

    Returns:
        `out`.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        TypeError, ValueError: for arrays that do not fit each other, NaN or infinity.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> kernels.cpu.pairwise(torch.eye(2), metric="sqeuclidean")
        tensor([[0., 2.],
                [2., 0.]])
    """
    x = x.detach()
    other = x if y is None else y.detach()
    if out is None:
        out = x.new_empty(x.shape[0], other.shape[0])
    _native.module().pairwise(
        _capsule(x), _capsule(other), _capsule(out), metric, torch.get_num_threads(), y is None
    )
    return out


class FacilityLocation:
    """A greedy run that advances pick by pick; see `flashcoreset.reference.facility_location` for the
    definition.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64, or such a
            sparse matrix.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from: those of points, and those that a matrix holds negated.
        memory_budget: bytes for lists and matrices larger than n + m.
        expected_picks: how many picks are likely to be asked for in all, on which the order of the work is
            planned (the result does not depend on it); None: many.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity in `x` or `clients` (at the first step).

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> run = kernels.cpu.FacilityLocation(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
        >>> run.step(2)
        2
        >>> indices, assignment = torch.empty(2, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        >>> gains, weights = torch.empty(2, dtype=torch.float64), torch.empty(2, dtype=torch.float64)
        >>> run.finish(indices, gains, weights, assignment), indices
        (3.0, tensor([1, 0]))
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
        native = _native.module().FacilityLocation
        threads = torch.get_num_threads()
        if isinstance(x, Csr):
            n, m = x.shape
            self._run = native.from_csr(
                _capsule(x.crow),
                _capsule(x.col),
                _capsule(x.values),
                m,
                _optional(weights),
                _optional(preselected),
                n == m,
                memory_budget,
                threads,
            )
            return
        if metric == "precomputed" and x.stride(1) != 1:
            x = x.contiguous()
        self._run = native(
            _capsule(x),
            _optional(clients),
            metric,
            _optional(weights),
            _optional(preselected),
            offset,
            memory_budget,
            threads,
            _MANY if expected_picks is None else expected_picks,
        )

    def step(self, count: int, naive: bool = False) -> int:
        """Makes up to `count` further picks; `naive` evaluates every candidate for each. Returns the number
        of picks so far."""
        return self._run.step(count, naive)

    def step_among(self, candidates: Tensor) -> int:
        """One pick among `candidates` [r] int64, which are neither picked nor preselected. Returns the
        pick."""
        return self._run.step_among(_capsule(candidates))

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32,
        `assignment` [m] int64; returns f(S), the preselected included."""
        return self._run.finish(_capsule(indices), _capsule(gains), _capsule(weights), _capsule(assignment))

    def stats(self) -> dict[str, int]:
        """What the run did so far: evaluations of candidates, similarities computed or read, and sweeps over
        all candidates."""
        return self._run.stats()


def _batch(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    metric: str,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
) -> tuple[Any, ...]:
    """What every call of the compiled module takes first."""
    points = None if y is None else y.detach()
    lengths = (_optional(x_lengths), _optional(y_lengths))
    return _capsule(x.detach()), _optional(points), _capsule(a), _capsule(b), metric, *lengths


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
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    report: Callable[[int, int], None] | None = None,
) -> Solution:
    """Solves a batch of entropic optimal transport problems; see `flashcoreset.reference.sinkhorn` for the
    definition.

    Args:
        x: [B, n, d] points with `y` [B, m, d], or the costs [B, n, m] with `y` None and metric "precomputed"; float32
            or float64, on the CPU.
        a: [B, n] float64, and b [B, m]: weights >= 0, of equal sums where both marginals are balanced.
        reg, reg_marginal: eps and (rho_a, rho_b); inf for a balanced marginal.
        metric: "sqeuclidean", "euclidean", "l1", "cosine" or "precomputed".
        x_lengths, y_lengths: [B] int64, the sizes of the problems; None for n and m.
        max_iter, tol: the most iterations and the error to stop at.
        f, g: [B, n] and [B, m] float64 to start from; None starts from 0.
        memory_budget: bytes that the kernel matrix of a problem may take; else its rows are made anew each time.
        report: called with the number of iterations done and their largest possible number.

    Returns:
        The potentials and, for each problem, value, transport cost, error, iterations and whether it converged.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity in `x` or `y`, and arrays that do not fit each other.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> cost, half = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.full((1, 2), 0.5, dtype=torch.float64)
        >>> found = kernels.cpu.sinkhorn(cost, None, half, half, reg=0.1, metric="precomputed")
        >>> round(found.transport_cost.item(), 6)
        4.5e-05
    """
    warm = f is not None and g is not None
    f = torch.zeros_like(a) if f is None or not warm else f.clone()
    g = torch.zeros_like(b) if g is None or not warm else g.clone()
    batch = a.shape[0]
    scalars = torch.empty(4, batch, dtype=torch.float64)
    iterations = torch.empty(batch, dtype=torch.int64)
    run = _native.module().Sinkhorn(
        *_batch(x, y, a, b, metric, x_lengths, y_lengths),
        reg,
        *reg_marginal,
        max_iter,
        tol,
        warm,
        memory_budget,
        torch.get_num_threads(),
        _capsule(f),
        _capsule(g),
        _capsule(scalars),
        _capsule(iterations),
    )
    total = run.total()
    part = total if report is None else max(1, total // 1000)
    done = 0
    while done < total:
        done = run.step(part)
        if report is not None:
            report(done, total)
    value, transport_cost, error, tolerance = scalars
    return Solution(f, g, value, transport_cost, error, iterations, error <= tolerance)


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
    """P v [B, n, k] of the plans with potentials f, g for v [B, m, k] of the dtype of `x`; with `transpose` P^T v
    [B, m, k] for v [B, n, k]. The plan is made 24 rows at a time, whatever the `memory_budget`.

    Rows beyond a problem's size are 0. The other arguments and the errors are those of `sinkhorn`.
    """
    out = x.new_zeros(a.shape[0], (b if transpose else a).shape[1], v.shape[2])
    _native.module().sinkhorn_apply(
        *_batch(x, y, a, b, metric, x_lengths, y_lengths),
        _capsule(f),
        _capsule(g),
        reg,
        _capsule(v.detach()),
        transpose,
        _capsule(out),
        torch.get_num_threads(),
    )
    return out


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
    """P [B, n, m], of the dtype of `x`, of the plans with potentials f, g; 0 beyond a problem's size. Arguments and
    errors are those of `sinkhorn`."""
    out = x.new_empty(a.shape[0], a.shape[1], b.shape[1])
    _native.module().sinkhorn_plan(
        *_batch(x, y, a, b, metric, x_lengths, y_lengths),
        _capsule(f),
        _capsule(g),
        reg,
        _capsule(out),
        torch.get_num_threads(),
    )
    return out


def sketch(
    x: Tensor, dim: int, *, kind: str, seed: int, offset: int = 0, nnz: int = 1, out: Tensor | None = None
) -> Tensor:
    """x [B, D] times the projection's matrix [D, dim], into `out` [B, dim] of the same dtype, float32 or float64. NaN and
    infinities go where the product takes them."""
    if out is None:
        out = x.new_empty(x.shape[0], dim)
    _native.module().sketch(_capsule(x), _capsule(out), kind, seed, offset, nnz, torch.get_num_threads())
    return out


def sketch_rows(
    indices: Tensor, g: Tensor, out: Tensor, *, kind: str, seed: int, offset: int = 0, nnz: int = 1
) -> None:
    """Adds to `out` [B, dim] the sketches of B long rows that are zero but for some of their parts: `g` [B, T, width] are the
    parts, `indices` [B, T] (int64, >= 0) their numbers, row offset + indices[b, t] * width of the projection being a part's
    first. Parts of the same number add up. `g` and `out` are of one dtype, float32 or float64."""
    _native.module().sketch_rows(
        _capsule(indices), _capsule(g), _capsule(out), kind, seed, offset, nnz, torch.get_num_threads()
    )


def projection_matrix(
    rows: int,
    dim: int,
    *,
    kind: str,
    seed: int,
    offset: int = 0,
    nnz: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The matrix [rows, dim] itself, float32 or float64."""
    out = torch.empty(rows, dim, dtype=dtype, device=device)
    _native.module().projection_matrix(_capsule(out), kind, seed, offset, nnz, torch.get_num_threads())
    return out


def sample_scores(
    logits: Tensor, targets: Tensor, *, masked: bool = False, out: Tensor | None = None
) -> Tensor:
    """Loss, entropy, margin, EL2N and correctness (1 or 0) of every token; see `flashcoreset.reference.scores` for
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
    _native.module().sample_scores(
        _capsule(logits.detach()), _capsule(targets), masked, _capsule(out), torch.get_num_threads()
    )
    return out


def directions(out: Tensor, *, seed: int, begin: int, first: int = 0) -> None:
    """Fills out [q, n] float32 or float64, on the CPU, with elements begin to begin + n of the directions first to
    first + q; see `flashcoreset.reference.zeroth_order` for the definition.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for a negative `begin`, or directions outside [0, 2^32).

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> z = torch.empty(1, 3)
        >>> kernels.cpu.directions(z, seed=0, begin=0)
        >>> bool(z.abs().max() < 6)
        True
    """
    _native.module().directions(_capsule(out), seed, begin, first, torch.get_num_threads())


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

    Args:
        g: [B, D] rows of any floating dtype, on the CPU; with `length` the coefficients [B, q], float32 or float64, of
            directions [q, length] from `seed`.
        m, v: [D] float64 where the rows are, else float32; None, with `rule`, takes the rows themselves as updates.
        rule: how updates are made.
        member: [R] int64, rows of the groups, one group after the other.
        offset: [G + 1] int64, where each group begins in `member`; none is empty.
        top: how many dimensions, 1 <= top <= D.

    Returns:
        dims [G, top] int64, the largest first, and u [R, top] float64.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN and infinity, where v < 0, and for arrays that do not fit each other.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> g, rows, offset = torch.tensor([[1.0, 5.0, -3.0]]), torch.tensor([0]), torch.tensor([0, 1])
        >>> kernels.cpu.top_updates(g, None, None, None, rows, offset, 2)
        (tensor([[1, 2]]), tensor([[ 5., -3.]], dtype=torch.float64))
    """
    dims = torch.empty(len(offset) - 1, top, dtype=torch.int64)
    u = torch.empty(len(member), top, dtype=torch.float64)
    numbers = (0.0, 1.0, 0.0, 0.0, 0.0)
    if rule is not None:
        numbers = (rule.m_scale, rule.m_step, rule.v_scale, rule.v_step, rule.eps)
    _native.module().top_updates(
        _capsule(g.detach()),
        seed,
        length,
        None if rule is None else _optional(m),
        None if rule is None else _optional(v),
        *numbers,
        _capsule(member),
        _capsule(offset),
        _capsule(dims),
        _capsule(u),
        torch.get_num_threads(),
    )
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
    """Adam's history after a step: the means of the new m and v, [D] each, of the rows `chosen` [c] int64.

    The other arguments and the errors are those of `top_updates`.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> g, zero = torch.tensor([[1.0], [3.0]]), torch.zeros(1)
        >>> kernels.cpu.update_history(g, zero, zero, (0.5, 0.5), torch.tensor([0, 1]))
        (tensor([1.]), tensor([2.5000]))
    """
    new_m, new_v = torch.empty_like(m), torch.empty_like(v)
    _native.module().update_history(
        _capsule(g.detach()),
        seed,
        length,
        *betas,
        _capsule(m),
        _capsule(v),
        _capsule(chosen),
        _capsule(new_m),
        _capsule(new_v),
        torch.get_num_threads(),
    )
    return new_m, new_v


def caratheodory(
    x: Tensor,
    weights: Tensor | None = None,
    *,
    max_size: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
    one_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.reference.caratheodory` for the definition.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64, on the CPU, in any strides.
        weights: [n] float64 >= 0, not all 0; None for 1.
        max_size: > 0 ends the reduction as soon as at most that many rows are left.
        out: two tensors [min(n, max(d + 1, max_size))], int64 and float64, to write to; None allocates them.
        one_scale: what is small beside the largest of all numbers is rounding, in whatever column.

    Returns:
        [k] int64, ascending, and [k] float64, > 0: the first k entries of `out`.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity in `x`, weights that are not as above, arrays that do not fit each other.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> kernels.cpu.caratheodory(torch.tensor([[0.0], [1.0], [2.0], [6.0]]))[1].sum()
        tensor(4., dtype=torch.float64)
    """
    if out is None:
        most = min(x.shape[0], max(x.shape[1] + 1, max_size))
        out = torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.float64)
    count = _native.module().caratheodory(
        _capsule(x.detach()),
        _optional(weights),
        max_size,
        _capsule(out[0]),
        _capsule(out[1]),
        torch.get_num_threads(),
        one_scale,
    )
    return out[0][:count], out[1][:count]


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
    definition.

    Args:
        g: [B, D] float32 or float64, on the CPU. Rows that are not contiguous are copied.
        target: [D] float64.
        k: the most picks.
        nonnegative, ridge: as in the definition.
        memory_budget: bytes for columns of the Gram matrix, 8 * B each. Where k of them are more, every pick costs a
            pass over `g` instead.

    Returns:
        The rows [r], their weights [r] (float64) and the norms of the residual after each step (float64).

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        ValueError: for NaN or infinity, arrays that do not fit each other, and where products overflow.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> target = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> kernels.cpu.orthogonal_matching_pursuit(torch.eye(2), target, 1)[:2]
        (tensor([1]), tensor([3.], dtype=torch.float64))
    """
    run = _native.module().orthogonal_matching_pursuit
    indices, weights, norms = _pursuit_results(k)
    rows, steps = run(
        *_pursuit_inputs(g, target),
        nonnegative,
        ridge,
        _capsule(indices),
        _capsule(weights),
        _capsule(norms),
        memory_budget,
        torch.get_num_threads(),
    )
    return indices[:rows], weights[:rows], norms[:steps]


def frank_wolfe(
    g: Tensor, target: Tensor, k: int, *, memory_budget: int = DEFAULT_MEMORY_BUDGET
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by k steps of Frank-Wolfe on the sphere; where columns are more than `memory_budget`, old ones are computed
    anew."""
    run = _native.module().frank_wolfe
    indices, weights, norms = _pursuit_results(k)
    rows, steps = run(
        *_pursuit_inputs(g, target),
        _capsule(indices),
        _capsule(weights),
        _capsule(norms),
        memory_budget,
        torch.get_num_threads(),
    )
    return indices[:rows], weights[:rows], norms[:steps]


def _pursuit_inputs(g: Tensor, target: Tensor) -> tuple[Any, Any]:
    g = g.detach()
    return _capsule(g if g.stride(1) == 1 else g.contiguous()), _capsule(target.contiguous())


def _pursuit_results(k: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.empty(2, k, dtype=torch.float64)
    return torch.empty(k, dtype=torch.int64), weights[0], weights[1]
