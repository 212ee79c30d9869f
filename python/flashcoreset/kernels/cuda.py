"""The CUDA kernels, on tensors of a CUDA device and torch's current stream there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashcoreset import _native
from flashcoreset._errors import BackendUnavailableError, no_sparse_kernel
from flashcoreset._tensor import Csr, check_finite, check_preselected, check_weights
from flashcoreset.kernels import pursuit
from flashcoreset.kernels.caratheodory import reduce_on_device
from flashcoreset.reference.facility_location import DEFAULT_MEMORY_BUDGET, DISTANCES
from flashcoreset.reference.matching import OVERFLOW, Rule, refuse
from flashcoreset.reference.sinkhorn import Solution

__all__ = [
    "CHECKS_VALUES",
    "FacilityLocation",
    "caratheodory",
    "directions",
    "frank_wolfe",
    "orthogonal_matching_pursuit",
    "pairwise",
    "projection_matrix",
    "sinkhorn",
    "sinkhorn_apply",
    "sinkhorn_plan",
    "sketch",
    "top_updates",
    "update_history",
]

# The kernels look at weights and preselected candidates, and find an offset, on the device: a look from here would wait for it.
CHECKS_VALUES = True

# Where the kernels' tensors are. The tests run the same kernels on the CPU, by an emulator.
DEVICE_TYPE = "cuda"

# What a block may take of shared memory for a Sinkhorn problem, in bytes; None for what the device has. Problems that need
# more are streamed.
SINKHORN_SHARED_BYTES: int | None = None

_capsule = torch.utils.dlpack.to_dlpack

_T = TypeVar("_T")


def _with_memory(call: Callable[[], _T]) -> _T:
    """`call()`, and where it is out of memory, once more without the memory that torch keeps for later."""
    try:
        return call()
    except MemoryError:
        torch.cuda.empty_cache()
    try:
        return call()
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from None


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else _capsule(tensor.contiguous())


def pairwise(x: Tensor, y: Tensor | None = None, *, metric: str, out: Tensor | None = None) -> Tensor:
    """Similarities (cosine, dot) or distances (euclidean, sqeuclidean, l1) of all pairs of rows.

    Args:
        x: [n, d] float32 or float64, on a CUDA device. NaN and infinity are not looked for.
        y: [m, d], same dtype and device; None is `x` itself.
        metric: "cosine", "dot", "euclidean", "sqeuclidean" or "l1".
        out: [n, m], same dtype, rows contiguous; None allocates it.

    Returns:
        `out`; the work is on torch's current stream and not waited for.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        TypeError, ValueError: for arrays that do not fit each other.
        torch.OutOfMemoryError: if the device has no room for the packed points.
    """
    x = x.detach()
    other = x if y is None else y.detach()
    if out is None:
        out = x.new_empty(x.shape[0], other.shape[0])
    native, stream = _native.cuda_module(x.device.index or 0), _stream(x.device)
    _with_memory(lambda: native.pairwise(_capsule(x), _capsule(other), _capsule(out), metric, stream))
    return out


class FacilityLocation:
    """A greedy run that stays on the GPU; see `flashcoreset.reference.facility_location` for the definition.

    Args:
        x: [n, d] points, or [n, m] similarities when `metric` is "precomputed"; float32 or float64, on a CUDA
            device.
        clients: [m, d] points, or None: the candidates themselves (precomputed: if it is square).
        metric: "cosine", "dot", "euclidean", "sqeuclidean", "l1" or "precomputed".
        weights: [m] float64, not negative; None for 1.
        preselected: [p] int64, candidates already in S.
        offset: what distances are subtracted from, those of points and those that a matrix holds negated; None for an upper bound of all distances, found on the device
            and told by `offset` after `finish`.
        memory_budget: not used: memory is proportional to the points.
        expected_picks: not used.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device, and for a sparse matrix.
        TypeError, ValueError: for arrays that do not fit each other.
        torch.OutOfMemoryError: if the device has no room for the run.
    """

    def __init__(
        self,
        x: Tensor | Csr,
        clients: Tensor | None = None,
        *,
        metric: str = "cosine",
        weights: Tensor | None = None,
        preselected: Tensor | None = None,
        offset: float | None = 0.0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        expected_picks: int | None = None,
    ) -> None:
        if isinstance(x, Csr):
            raise BackendUnavailableError(f"backend 'cuda': {no_sparse_kernel('cuda')}")
        if metric == "precomputed" and x.stride(1) != 1:
            x = x.contiguous()
        self._x, self._clients, self._weights, self._preselected = x, clients, weights, preselected
        self._metric, self.offset = metric, offset
        native, stream = _native.cuda_module(x.device.index or 0), _stream(x.device)
        self._run = _with_memory(
            lambda: native.FacilityLocation(
                _capsule(x),
                None if clients is None else _capsule(clients),
                metric,
                _optional(weights),
                _optional(preselected),
                offset,
                stream,
            )
        )

    @property
    def completed(self) -> int:
        """Of the picks that `step` started, how many are known to be made."""
        return self._run.completed

    def step(self, count: int, naive: bool = False) -> int:
        """Starts up to `count` further picks; `naive` evaluates every candidate for each. Returns the number
        of picks that there will be; waits for those of them only that would take long, so that Ctrl-C is heard."""
        return _with_memory(lambda: self._run.step(count, naive))

    def step_among(self, candidates: Tensor) -> int:
        """One pick among `candidates` [r] int64, which are neither picked nor preselected. Waits and returns
        the pick."""
        pick = _with_memory(lambda: self._run.step_among(_capsule(candidates)))
        if pick < 0:
            self._raise(*self._run.verdict())
        return pick

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        """Writes the picks so far into `indices` [k] int64, `gains` and `weights` [k] float64 or float32,
        `assignment` [m] int64; waits and returns f(S), the preselected included.

        Raises:
            ValueError: for data that turned out to be NaN, infinite, or too large or small for its type.
        """
        exact_gains, exact_weights = gains.double(), weights.double()
        objective, offset = self._run.finish(
            _capsule(indices), _capsule(exact_gains), _capsule(exact_weights), _capsule(assignment)
        )
        self._raise(*self._run.verdict())
        if self._metric in DISTANCES and self.offset is None:
            self.offset = offset
        elif self._metric in DISTANCES and self.offset > offset:
            # The kernels do without what is far above all distances, beside which the first gains would be rounded.
            total = float(assignment.shape[0]) if self._weights is None else float(self._weights.sum())
            excess = (self.offset - offset) * total
            objective += excess
            if self._preselected is None and exact_gains.shape[0] > 0:
                exact_gains[0] += excess
        gains.copy_(exact_gains)
        weights.copy_(exact_weights)
        return objective

    def _raise(self, wrong: str | None, argument: str, row: int) -> None:
        if wrong is None:
            return
        dtype, is_points = self._x.dtype, self._metric != "precomputed"
        if wrong == "not finite":
            culprit = self._x if argument == "x" or self._clients is None else self._clients
            check_finite(culprit, argument)
        if wrong in ("weights", "weights sum") and self._weights is not None:
            check_weights(self._weights, dtype)
        if wrong == "preselected" and self._preselected is not None:
            check_preselected(self._preselected, self._x.shape[0])
        if wrong == "vanishing":
            raise ValueError(
                "x: similarities times weights are so close to the smallest numbers of the type that gains would be "
                "lost; scale x or the weights up"
            )
        if wrong == "overflow" and is_points:
            values = "distances" if self._metric in DISTANCES else "similarities"
            raise ValueError(
                f"x: {values} of metric {self._metric!r} overflow {dtype}; scale the data down or use float64"
            )
        if wrong == "overflow":
            raise ValueError(
                "x: the sum of a candidate's similarities overflows the range of a double; scale x or the weights down"
            )
        # Looked at again, the values are fine.
        raise RuntimeError(f"{argument}: {wrong} at row {row} on the device; was it written to meanwhile?")


def _compact(tensor: Tensor) -> Any:
    return _capsule(tensor.detach().contiguous())


def _problems(
    x: Tensor,
    y: Tensor | None,
    metric: str,
    a: Tensor,
    b: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
) -> tuple[Any, ...]:
    """What each of the compiled functions gets first. Capsules keep the memory that they show alive."""
    return (
        _compact(x),
        None if y is None else _compact(y),
        metric,
        _compact(a),
        _compact(b),
        _optional(x_lengths),
        _optional(y_lengths),
    )


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
    """Solves a batch of problems on the device; see `flashcoreset.reference.sinkhorn` for the definition.

    Waits once, when all problems are solved.

    Args:
        x: [B, n, d] points with `y` [B, m, d], or the costs [B, n, m] with `y` None; float32 or float64, on a CUDA
            device, like all that follows. A copy is made of what is not contiguous.
        a, b: [B, n] and [B, m] float64.
        reg, metric, reg_marginal, max_iter, tol: as in the reference.
        x_lengths, y_lengths: [B] int64, from 1 to n and m; None for n and m.
        f, g: [B, n] and [B, m] float64 to start from; None starts from 0.
        memory_budget: not used: costs are kept in the multiprocessors' own memory or not at all.
        report: called once, at the end.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        ValueError: for data that turned out to be NaN, infinite or too large, and for weights that are negative, all
            zero or of unequal sums.
    """
    batch = len(a)
    value, transport_cost, error, tolerance = a.new_empty(4, batch).unbind()
    found_f, found_g = (
        torch.zeros_like(weights, memory_format=torch.contiguous_format) for weights in (a, b)
    )
    iterations = torch.empty(batch, dtype=torch.int64, device=a.device)
    outputs = (found_f, found_g, value, transport_cost, error, tolerance, iterations)
    wrong, argument, problem, row, column = _with_memory(
        lambda: _native.cuda_module().sinkhorn(
            *_problems(x, y, metric, a, b, x_lengths, y_lengths),
            reg,
            *reg_marginal,
            max_iter,
            tol,
            None if f is None else _compact(f),
            None if g is None else _compact(g),
            *map(_capsule, outputs),
            -1 if SINKHORN_SHARED_BYTES is None else SINKHORN_SHARED_BYTES,
            _stream(x.device),
        )
    )
    if wrong is not None:
        tensors = {"x": x, "y": y, "a": a, "b": b}
        raise ValueError(_sinkhorn_fault(wrong, argument, tensors, problem, row, column))
    if report is not None:
        report(batch * max_iter, batch * max_iter)
    return Solution(found_f, found_g, value, transport_cost, error, iterations, error <= tolerance)


def _sinkhorn_fault(
    wrong: str, argument: str, tensors: dict[str, Tensor | None], problem: int, row: int, column: int
) -> str:
    tensor, a, b = tensors[argument], tensors["a"], tensors["b"]
    assert tensor is not None
    assert a is not None
    assert b is not None
    of = f" of problem {problem}" if len(a) > 1 else ""
    within = of.replace(" of", " in", 1)
    if wrong == "not finite":
        value = float(tensor[problem, row, column])
        return f"{argument} must be finite, got {_named(value)} at row {row}, column {column}{of}"
    if wrong == "weight":
        return f"{argument} must be finite and >= 0, got {_named(float(tensor[problem, row]))} at position {row}{of}"
    if wrong == "no weight":
        return f"{argument} must have a finite sum > 0; its sum is not{within}"
    if wrong == "unequal":
        return f"a and b must have equal sums where both marginals are balanced; they differ by more than 1 in 10^4{within}"
    assert tensors["x"] is not None
    dtype = tensors["x"].dtype
    remedy = " or use float64" if dtype == torch.float32 else ""
    if wrong == "small reg":
        return f"reg: costs in units of it overflow {dtype}{within}; raise reg{remedy}"
    return f"x: costs overflow {dtype}{within}; scale the data down{remedy}"


def _named(value: float) -> str:
    return "NaN" if math.isnan(value) else str(value)


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
    [B, n, k]. Rows beyond a problem's size are 0. Does not wait for the device; `memory_budget` is not used."""
    out = a.new_empty(len(a), (b if transpose else a).shape[1], v.shape[2])
    _with_memory(
        lambda: _native.cuda_module().sinkhorn_apply(
            *_problems(x, y, metric, a, b, x_lengths, y_lengths),
            reg,
            _compact(f),
            _compact(g),
            _compact(v.double()),
            transpose,
            _capsule(out),
            _stream(x.device),
        )
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
    """P [B, n, m] float64 of the plans with potentials f, g; 0 beyond a problem's size. Does not wait for the device."""
    out = a.new_empty(*a.shape, b.shape[1])
    _with_memory(
        lambda: _native.cuda_module().sinkhorn_plan(
            *_problems(x, y, metric, a, b, x_lengths, y_lengths),
            reg,
            _compact(f),
            _compact(g),
            _capsule(out),
            _stream(x.device),
        )
    )
    return out


def sketch(
    x: Tensor, dim: int, *, kind: str, seed: int, offset: int = 0, nnz: int = 1, out: Tensor | None = None
) -> Tensor:
    """x [B, D] times the projection's matrix [D, dim]; see `flashcoreset.reference.sketch` for the definition.

    Args:
        x: float32 or float64, on a CUDA device. NaN and infinities go where the product takes them.
        dim, kind, seed, offset, nnz: as for `fc.sketch`.
        out: [B, dim], same dtype and device, rows contiguous; None allocates it.

    Returns:
        `out`; the work is on torch's current stream. Only where it takes several launches of tenths of a second is the last
        but one of them waited for, so that Ctrl-C is heard.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        TypeError, ValueError: for arrays that do not fit each other.
        torch.OutOfMemoryError: if the device has no room for partial sums (64 MiB at most, or 8 bytes an output).
    """
    x = x.detach()
    if out is None:
        out = x.new_empty(x.shape[0], dim)
    native, stream = _native.cuda_module(x.device.index or 0), _stream(x.device)
    _with_memory(lambda: native.sketch(_capsule(x), _capsule(out), kind, seed, offset, nnz, stream))
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
    """The matrix [rows, dim] itself, float32 or float64, on torch's current stream."""
    out = torch.empty(rows, dim, dtype=dtype, device=device)
    native = _native.cuda_module(out.device.index or 0)
    native.projection_matrix(_capsule(out), kind, seed, offset, nnz, _stream(out.device))
    return out


def directions(out: Tensor, *, seed: int, begin: int, first: int = 0) -> None:
    """Fills out [q, n] float32 or float64, rows contiguous, with elements begin to begin + n of the directions first to
    first + q; see `flashcoreset.reference.zeroth_order` for the definition. Does not wait for the device.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        ValueError: for a negative `begin`, or directions outside [0, 2^32).
    """
    native = _native.cuda_module(out.device.index or 0)
    native.directions(_capsule(out), seed, begin, first, _stream(out.device))


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

    Waits for the device at the end, and before that for all but the last two chunks of the dimensions, so that Ctrl-C is heard.

    Args:
        g: [B, D] rows of any floating dtype, on a CUDA device, like all that follows; with `length` the coefficients [B, q],
            float32 or float64, of directions [q, length] from `seed`.
        m, v: [D] float64 where the rows are, else float32; None, with `rule`, takes the rows themselves as updates.
        rule: how updates are made.
        member: [R] int64, rows of the groups, one group after the other.
        offset: [G + 1] int64, where each group begins in `member`; none is empty.
        top: how many dimensions, 1 <= top <= D.

    Returns:
        dims [G, top] int64, the largest first, and u [R, top] float64.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        ValueError: for NaN and infinity, where v < 0, and for arrays that do not fit each other.
        torch.OutOfMemoryError: if the device has no room for the lists (24 bytes for each of 2^19 candidates, or for `top` in
            each group).
    """
    g, device, groups = g.detach(), g.device, len(offset) - 1
    history = None if rule is None or m is None or v is None else (m.contiguous(), v.contiguous())
    scales = (0.0, 1.0, 0.0, 0.0, 0.0)
    if history is not None and rule is not None:
        scales = (rule.m_scale, rule.m_step, rule.v_scale, rule.v_step, rule.eps)
    dims = torch.zeros(groups, top, dtype=torch.int64, device=device)
    values = torch.empty(groups, top, dtype=torch.float64, device=device)
    u = torch.empty(len(member), top, dtype=torch.float64, device=device)
    refused = torch.full((1,), 2**63 - 1, dtype=torch.int64, device=device)
    native, stream = _native.cuda_module(device.index or 0), _stream(device)

    def problem() -> tuple[Any, ...]:
        """What both functions get first; a capsule is used once."""
        past = (None, None) if history is None else map(_capsule, history)
        return (_capsule(g), seed, length, *past, *scales, _optional(member), _optional(offset))

    _with_memory(
        lambda: native.top_dimensions(*problem(), _capsule(dims), _capsule(values), _capsule(refused), stream)
    )
    dims, by_dimension = dims.sort(dim=1)
    order = values.gather(1, by_dimension).sort(dim=1, descending=True, stable=True).indices
    dims = dims.gather(1, order)
    native.restrict_updates(*problem(), _capsule(dims), _capsule(u), stream)
    first = int(refused)
    if first < (g.shape[1] if length is None else length):
        refuse(g, history, member, first, seed=seed, length=length)
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

    The other arguments and the errors are those of `top_updates`.
    """
    m, v = m.contiguous(), v.contiguous()
    new_m, new_v = torch.empty_like(m), torch.empty_like(v)
    overflows = torch.zeros(1, dtype=torch.int64, device=m.device)
    _native.cuda_module(g.device.index or 0).update_history(
        _capsule(g.detach()),
        seed,
        length,
        *betas,
        _capsule(m),
        _capsule(v),
        _optional(chosen),
        _capsule(new_m),
        _capsule(new_v),
        _capsule(overflows),
        _stream(g.device),
    )
    if bool(overflows):
        raise ValueError(OVERFLOW)
    return new_m, new_v


def caratheodory(
    x: Tensor, weights: Tensor | None = None, *, max_size: int = 0, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Rows with the weighted mean and total weight of all; see `flashcoreset.reference.caratheodory` for the definition.

    The device sums runs of rows, the host reduces these sums and what is left of the rows; it waits for each round.

    Args:
        x: [n, d] float16, bfloat16, float32 or float64, on a CUDA device, in any strides.
        weights: [n] float64 >= 0 there, not all 0; None for 1.
        max_size: > 0 ends the reduction as soon as at most that many rows are left; the rows come to the host in pieces.
        out: two tensors [min(n, max(d + 1, max_size))] there, int64 and float64, to write to; None allocates them.

    Returns:
        [k] int64, ascending, and [k] float64, > 0: the first k entries of `out`.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels, no device or no compiled CPU module.
        ValueError: for NaN or infinity in `x`.
        torch.OutOfMemoryError: if the device has no room for partial sums (a row of float64 for each 256 rows of x).
    """
    native, stream = _native.cuda_module(x.device.index or 0), _stream(x.device)

    def sum_runs(
        x: Tensor,
        rows: Tensor | None,
        weights: Tensor | None,
        centre: Tensor,
        shrink: float,
        size: int,
        sums: Tensor,
    ) -> None:
        _with_memory(
            lambda: native.sum_runs(
                _capsule(x),
                _optional(rows),
                _optional(weights),
                _capsule(centre),
                shrink,
                size,
                _capsule(sums),
                stream,
            )
        )

    def keep_runs(
        n: int,
        rows: Tensor | None,
        weights: Tensor | None,
        size: int,
        kept: Tensor,
        factors: Tensor,
        new_rows: Tensor,
        new_weights: Tensor,
    ) -> None:
        native.keep_runs(
            n,
            _optional(rows),
            _optional(weights),
            size,
            _capsule(kept),
            _capsule(factors),
            _capsule(new_rows),
            _capsule(new_weights),
            stream,
        )

    return reduce_on_device(x, weights, max_size, out, sum_runs, keep_runs)


def _products(
    g: Tensor, rows: Tensor | None, vectors: Tensor, which: Tensor, out: Tensor, places: Tensor
) -> None:
    native, stream = _native.cuda_module(g.device.index or 0), _stream(g.device)
    _with_memory(
        lambda: native.products(
            _capsule(g),
            None if rows is None else _capsule(rows),
            *map(_capsule, (vectors, which, out, places)),
            stream,
        )
    )


def _squares(g: Tensor, out: Tensor) -> None:
    native, stream = _native.cuda_module(g.device.index or 0), _stream(g.device)
    _with_memory(lambda: native.squares(_capsule(g), _capsule(out), stream))


def _pick(
    correlation: Tensor,
    gram: Tensor,
    slots: Tensor,
    numbers: Tensor,
    norm: Tensor,
    magnitude: bool,
    scores: Tensor,
    found: Tensor,
) -> None:
    native, stream = _native.cuda_module(norm.device.index or 0), _stream(norm.device)
    given = (correlation, gram, slots, numbers, norm)
    _with_memory(
        lambda: native.best_row(*map(_capsule, given), magnitude, _capsule(scores), _capsule(found), stream)
    )


def _residual(g: Tensor, target: Tensor, rows: Tensor, weights: Tensor, out: Tensor) -> None:
    native, stream = _native.cuda_module(g.device.index or 0), _stream(g.device)
    native.residual(*map(_capsule, (g, target, rows, weights, out)), stream)


_PURSUIT = pursuit.Launchers(_products, _squares, _pick, _residual)


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
        g: [B, D] float32 or float64, on a CUDA device. Rows that are not contiguous are copied.
        target: [D] float64.
        k: the most picks.
        nonnegative, ridge: as in the definition.
        memory_budget: bytes for columns of the Gram matrix, 8 * B each; what 2 k + 12 of them take is allocated at once, as far
            as it goes. Where k of them are more, every pick costs a pass over `g` instead.

    Returns:
        The rows [r], their weights [r] (float64) and the norms of the residual after each step (float64).

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device, or no compiled CPU module can be loaded.
        ValueError: for NaN or infinity, and where products overflow.
        torch.OutOfMemoryError: if the device has no room for the columns.
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
