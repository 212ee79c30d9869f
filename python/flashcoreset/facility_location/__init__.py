"""Facility location: arguments checked, groups taken apart, the chosen kernel run, the result wrapped; and
the same as a torch op."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET, DISTANCES
from flashcoreset._core.dispatch import DEFAULTS, check_backend
from flashcoreset._core.errors import InputWarning, warn_caller
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.op import define_op
from flashcoreset._core.progress import Progress, check_progress
from flashcoreset._core.results import Selection
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import (
    Csr,
    as_csr,
    as_int64,
    as_integer,
    as_matrix,
    as_number,
    as_vector,
    canonical_csr,
    check_finite,
    check_preselected,
    check_weights,
    compute_dtype,
    is_sparse,
    is_traced,
    one_of,
    same_device,
)
from flashcoreset.facility_location.backend import Kernels, Run, choose
from flashcoreset.facility_location.lost_gains import check_gains
from flashcoreset.facility_location.sampling import CandidateSampler

MATRICES = ("precomputed", "precomputed_distance")
METRICS = ("cosine", "dot", "euclidean", "sqeuclidean", "l1", *MATRICES)
METHODS = ("lazy", "naive", "stochastic")

_HUGE_PAGE = 2**21
_FAR_ABOVE = 1000  # an offset this many times above the distances could lose them in rounding


def facility_location(
    x: Any,
    k: int | None,
    *,
    clients: Any = None,
    metric: str = "cosine",
    weights: Any = None,
    groups: Any = None,
    budgets: Any = None,
    preselected: Any = None,
    method: str = "lazy",
    epsilon: float = 0.1,
    seed: int = 0,
    offset: float | None = None,
    backend: str | None = None,
    progress: Callable[[int, int], object] | bool | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Selection:
    """Greedy maximisation of f(S) = sum_i w_i * max(0, max_{j in S} s(j, i)) over candidates j and clients i.

    Args:
        x: [n, d] candidates, float16, bfloat16, float32 or float64 (half types compute in float32); a torch
            tensor, a NumPy array or an object with `__dlpack__`. `x` may require grad; the result does not.
            With metric="precomputed": s itself, [n candidates, m clients], also as a scipy CSR matrix or
            torch sparse CSR tensor whose absent entries are 0. With metric="precomputed_distance": distances >= 0 of
            that shape.
        k: how many to pick, 1 <= k <= the candidates that are not preselected. With `budgets`: their sum, or
            None.
        clients: [m, d], same dtype as `x`; default `x` (passing `x` itself means the same).
        metric: "cosine" (0 for a zero row) and "dot" are s; "euclidean", "sqeuclidean" and "l1" make s =
            offset - distance; "precomputed" takes `x` as s, "precomputed_distance" as distances. A square matrix of
            similarities with zeros on the diagonal alone, as distances have them, gets an `InputWarning`.
        weights: [m] client weights >= 0; default 1.
        groups: [n] integer labels: each label is its own problem over its own members (as candidates and,
            without `clients`, as clients). Picks come label by label, ascending. With `clients`, every
            group's candidates face all clients, gains are the group's own, and weights, assignment and
            objective are those of all picks together.
        budgets: how many to pick from each group: a dict label -> count that names every label, or counts [G]
            for the labels 0..G-1. Default: `allocate_budgets` of the groups' sizes (without the preselected)
            and `k`.
        preselected: [p] distinct candidates already in S: they cover clients and are not returned.
        method: "lazy" and "naive" give the exact greedy sequence; "stochastic" picks the best of ceil(n/k *
            ln(1/epsilon)) candidates drawn anew for each pick.
        epsilon: in (0, 1), for "stochastic".
        seed: in [0, 2^64), for "stochastic".
        offset: for distances, a number >= 0; default an upper bound of all distances, on which the picks do
            not depend.
        backend: "cpu" (compiled), "cuda" or "triton" (on CUDA tensors; no sparse matrices), "torch" (the slow
            reference) or None: the first that takes `x` (docs/backends.md).
        progress: True shows a bar on stderr; a callable gets (picks made, picks wanted). Not called inside
            torch.compile.
        memory_budget: bytes that may be spent on similarities and lists larger than n + m, >= 0; default 256
            MiB. The result does not depend on it.

    Returns:
        Selection, on the device of `x`: `indices` [k] in pick order; `gains` [k] (float64 for float64, else
        float32); `weights` [k], the client weight that each pick won; `assignment` [m], the position in
        `indices` of the pick most similar to each client (ties: the earlier pick), or -1 if no pick has s
        > 0 or if a preselected item is as good. Without `clients` a pick serves itself unless a preselected item
        is more similar. `objective` = f(S) with the preselected in S; `offset` of distances.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, option, index, label, budget, weight or device, NaN, infinity, or
            overflow; the message names the argument and what was passed.
        BackendUnavailableError: if a `backend` was named that cannot run here.

    Ties go to the lowest index; gains are summed as 64-bit integers, so the result is the same for any number
    of threads.

    Sources: Nemhauser, Wolsey and Fisher 1978 (greedy, within 1 - 1/e of the best S); Minoux 1978 (lazy
    evaluation); Mirzasoleiman, Badanidiyuru, Karbasi, Vondrak and Krause, "Lazier than lazy greedy", AAAI
    2015 (stochastic).

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
        >>> selection = fc.facility_location(x, 2, metric="l1", offset=20.0)
        >>> selection.indices, selection.gains, selection.assignment
        (tensor([2, 3]), tensor([80., 15.]), tensor([0, 0, 0, 1, 1]))
        >>> fc.facility_location(x, None, metric="l1", groups=[0, 0, 0, 1, 1], budgets={0: 1, 1: 1}).indices
        tensor([1, 3])
    """
    problem = _check(
        x,
        k,
        clients,
        metric,
        weights,
        groups,
        budgets,
        preselected,
        method,
        epsilon,
        seed,
        offset,
        memory_budget,
    )
    check_backend(backend)
    check_progress(progress)
    if is_traced(problem.x.values if isinstance(problem.x, Csr) else problem.x):
        return _call_op(problem, backend)
    return Selection(*_solve_naming_offset(problem, backend, progress))


@dataclass(eq=False, slots=True)  # not frozen: that would cost 2 us per call
class _Problem:
    """The arguments: their types, shapes and options are checked, their values not yet."""

    x: Tensor | Csr
    k: int
    clients: Tensor | None
    metric: str
    weights: Tensor | None  # [m] float64
    groups: Tensor | None  # [n] int64
    labels: Tensor | None  # [G] int64
    budgets: Tensor | None  # [G] int64
    preselected: Tensor | None  # [p] int64
    method: str
    epsilon: float
    seed: int
    offset: float | None
    memory_budget: int
    # The part of an offset above all distances, if the offset is far above them. The kernels leave it out, because the first gains would
    # be rounded to the spacing of numbers near the offset, and take `near` in the offset's place.
    excess: float = 0.0
    near: float | None = None
    found_offset: float | None = None  # by the kernels, if they were left to find an offset

    @property
    def out_dtype(self) -> torch.dtype:
        return compute_dtype(self.x.dtype)


def _check(
    x: Any,
    k: Any,
    clients: Any,
    metric: Any,
    weights: Any,
    groups: Any,
    budgets: Any,
    preselected: Any,
    method: Any,
    epsilon: Any,
    seed: Any,
    offset: Any,
    memory_budget: Any,
) -> _Problem:
    one_of(metric, "metric", METRICS)
    one_of(method, "method", METHODS)
    given = x
    x = _check_x(x, metric)
    # With groups, clients that are passed belong to every group; without groups, passing `x` is the default.
    if clients is given and groups is None and metric not in MATRICES:
        clients = None
    n, m = x.shape
    device = x.device
    if metric in MATRICES:
        if clients is not None:
            raise ValueError(f"clients must be None with metric {metric!r}, where they are the columns of x")
        if groups is not None and n != m:
            raise ValueError(f"x must be square for groups with metric {metric!r}, got shape {(n, m)}")
    elif clients is None:
        m = n
    else:
        clients = as_matrix(clients, "clients")
        same_device(clients, "clients", device)
        if clients.dtype != x.dtype:
            raise TypeError(f"clients must have the dtype of x, {x.dtype}, got {clients.dtype}")
        if clients.shape[1] != x.shape[1]:
            raise ValueError(
                f"clients must have {x.shape[1]} columns as x has, got shape {tuple(clients.shape)}"
            )
        m = clients.shape[0]
    if weights is not None:
        weights = as_vector(weights, "weights", device, integers=False, length=m)
    if preselected is not None:
        preselected = as_vector(preselected, "preselected", device, integers=True)
        if preselected.shape[0] == 0:
            preselected = None
    k, groups, labels, budgets = check_picks(
        n, k, groups, budgets, device, 0 if preselected is None else preselected.shape[0]
    )
    epsilon = as_number(epsilon, "epsilon")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must be in (0, 1), got {epsilon}")
    seed = as_integer(seed, "seed")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    memory_budget = _check_memory_budget(memory_budget)
    if offset is not None:
        offset = as_number(offset, "offset")
        if metric not in DISTANCES and metric != "precomputed_distance":
            raise ValueError(f"offset is for distances; metric {metric!r} takes None, got {offset}")
        if not 0 <= offset <= torch.finfo(compute_dtype(x.dtype)).max:
            raise ValueError(f"offset must be >= 0 and in the range of the dtype of x, got {offset}")
    return _Problem(
        x, k, clients, metric, weights, groups, labels, budgets, preselected, method, epsilon, seed, offset,
        memory_budget,
    )  # fmt: skip


def check_picks(
    n: int, k: Any, groups: Any, budgets: Any, device: torch.device, preselected: int = 0
) -> tuple[int, Tensor | None, Tensor | None, Tensor | None]:
    """How many of `n` candidates are to be picked, groups [n], and the labels and counts [G] of budgets; types and shapes checked."""
    labels = None
    if groups is not None:
        groups = as_vector(groups, "groups", device, integers=True, length=n)
    elif budgets is not None:
        raise ValueError("budgets need groups, got groups=None")
    if budgets is not None:
        labels, budgets, total = _check_budgets(budgets, device, k)
    if k is not None:
        k = as_integer(k, "k")
    if budgets is not None:
        if k is not None and total is not None and k != total:
            raise ValueError(f"k must be the sum of the budgets, {total}, or None, got {k}")
        k = total if k is None else k
    if k is None:
        raise TypeError("k must be an int unless budgets are given, got None")
    left = n - preselected
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if k > left:
        among = f"{n} candidates less {preselected} preselected" if preselected else f"{n} candidates"
        raise ValueError(f"k must be at most {left} ({among}), got {k}")
    return k, groups, labels, budgets


def _check_memory_budget(value: Any) -> int:
    budget = as_integer(value, "memory_budget")
    if budget < 0:
        raise ValueError(f"memory_budget must be >= 0 bytes, got {budget}")
    return min(budget, 2**62)  # more than there is, and the kernels' 64-bit sums still hold it


def _check_x(x: Any, metric: str) -> Tensor | Csr:
    if isinstance(x, Csr):
        return x  # the torch op has checked it
    if not is_sparse(x):
        return as_matrix(x, "x")
    if metric != "precomputed":
        raise TypeError(
            f"x must be dense for metric {metric!r}; a sparse matrix is one of similarities, for metric 'precomputed'"
        )
    return as_csr(x, "x")


def _check_budgets(budgets: Any, device: torch.device, k: Any) -> tuple[Tensor, Tensor, int | None]:
    """Labels [G], counts [G] and the sum of the counts (None if it is not known yet, under
    torch.compile)."""
    if isinstance(budgets, Mapping):
        keys = [as_int64(label, "a label in budgets") for label in budgets]
        counts = [as_int64(count, f"budgets[{label}]") for label, count in budgets.items()]
        labels = torch.tensor(keys, dtype=torch.int64, device=device)
        return labels, torch.tensor(counts, dtype=torch.int64, device=device), sum(counts)
    vector = as_vector(budgets, "budgets", device, integers=True)
    labels = torch.arange(vector.shape[0], device=device)
    if isinstance(budgets, (list, tuple)):
        return labels, vector, sum(as_integer(count, "a count in budgets") for count in budgets)
    if torch.compiler.is_compiling():
        if k is None:
            raise ValueError("k is needed beside a tensor of budgets under torch.compile, got None")
        return labels, vector, None
    return labels, vector, int(vector.sum())


_Result = tuple[Tensor, Tensor, Tensor, Tensor, float, float | None]


def _solve_naming_offset(
    p: _Problem, backend: str | None, progress: Callable[[int, int], object] | bool | None
) -> _Result:
    try:
        if p.metric == "precomputed_distance":
            return _solve(_negated(p), backend, progress)
        result = _solve(p, backend, progress)
        # Checked afterwards, when a device has nothing left to wait for.
        if p.metric == "precomputed" and isinstance(p.x, Tensor) and _looks_like_distances(p.x):
            warn_caller(
                "x has zeros on its diagonal and positive numbers elsewhere, as distances have, but metric 'precomputed' takes it "
                "as similarities; for distances pass metric='precomputed_distance'",
                InputWarning,
            )
        return result
    except ValueError as error:
        if p.offset is None or not str(error).startswith("x: similarities times weights"):
            raise
        raise ValueError(f"{error}, or raise offset, {p.offset}") from None


# Largest magnitudes of points whose squares and products are normal numbers, also for points that are 2^20 times nearer; and
# the magnitudes that other points are scaled to.
_SAFE = {torch.float32: (-40, 50), torch.float64: (-400, 480)}
_SCALED_TO = {torch.float32: (-30, 30), torch.float64: (-300, 300)}
# Sums of distances "l1" may have terms of any magnitude, but 2^-61 of a sum has to be a normal number.
_LEAST_L1 = 2.0**-900


def _solve(p: _Problem, backend: str | None, progress: Callable[[int, int], object] | bool | None) -> _Result:
    """Solves a problem. If squares or products leave the range of the type, points are scaled by a power of two, which is exact,
    and the results are scaled back."""
    if p.metric in ("cosine", "precomputed"):
        return _solve_in_range(p, backend, progress)
    # What the run itself reports about the range costs nothing, but it reports nothing about an offset that is given.
    of_l1 = p.metric == "l1" and not (p.offset and _is_extreme(p, p.offset))
    exponent = 0 if p.offset is None or of_l1 else _exponent(p)
    if exponent == 0:
        try:
            result = _solve_in_range(p, backend, progress)
        except ValueError:
            exponent = _exponent(p)
            if exponent == 0:
                raise
        else:
            extreme = p.metric == "dot" and result[4] < 2.0 ** (2 * _SAFE[p.out_dtype][0])
            if p.found_offset is not None:
                extreme = _is_extreme(p, p.found_offset)
            exponent = _exponent(p) if extreme else 0
            if exponent == 0:
                return result
    return _solve_scaled(p, exponent, backend, progress)


def _is_extreme(p: _Problem, offset: float) -> bool:
    """Whether an upper bound of the distances is so small or large that their squares may have left the range."""
    low, high = _SAFE[p.out_dtype]
    power = 2 if p.metric == "sqeuclidean" else 1
    if p.metric == "l1":
        # "l1" has no squares, but the unit of gains has to be a normal number too.
        return p.out_dtype == torch.float64 and offset < _LEAST_L1
    # 1 stands for a bound of 0.
    return offset == 1 or not 2.0 ** (power * low) < offset < 2.0 ** (power * (high + 10))


def _exponent(p: _Problem) -> int:
    """The power of two by which points have to be multiplied; 0 if their magnitudes are safe, and if they are not finite."""
    assert isinstance(p.x, Tensor)
    most = largest_magnitude(p.x, p.clients)
    return exponent_into(most, _SAFE[p.out_dtype], _SCALED_TO[p.out_dtype])


def _solve_scaled(
    p: _Problem, exponent: int, backend: str | None, progress: Callable[[int, int], object] | bool | None
) -> _Result:
    dtype = p.out_dtype
    limit = torch.finfo(dtype)
    assert isinstance(p.x, Tensor)
    offset = p.offset
    if offset:
        power = 2 * exponent if p.metric == "sqeuclidean" else exponent
        if not limit.tiny <= times_power(offset, power) <= limit.max / 4:
            raise ValueError(
                f"offset: {offset} is too far from all distances to be added to them in {dtype}; leave it None, or scale x"
            )
        offset = times_power(offset, power)
    scaled = replace(
        p,
        x=scale(p.x.to(dtype), exponent),
        clients=None if p.clients is None else scale(p.clients.to(dtype), exponent),
        offset=offset,
    )
    indices, gains, won, assignment, objective, found = _solve_in_range(
        scaled, backend, progress, scaled=True
    )
    back = -exponent if p.metric in ("euclidean", "l1") else -2 * exponent
    value = times_power(objective, back)
    what = "distances" if p.metric in DISTANCES else "similarities"
    if p.offset is None and found is not None:
        found = times_power(found, back)
    if not max(value, found or 0.0) <= limit.max:
        raise ValueError(
            f"x: {what} of metric {p.metric!r} overflow {dtype}; scale the data down or use float64"
        )
    if objective != 0 and value < limit.tiny and p.metric in ("sqeuclidean", "dot"):
        raise ValueError(
            f"x: {what} of metric {p.metric!r} underflow {dtype}; scale the data up or use float64"
        )
    if p.offset is not None:
        found = p.offset
    return indices, scale(gains, back), won, assignment, value, found


def _solve_in_range(
    p: _Problem,
    backend: str | None,
    progress: Callable[[int, int], object] | bool | None,
    scaled: bool = False,
) -> _Result:
    x, clients = p.x, p.clients
    kernels = choose(backend, x.device, sparse=isinstance(x, Csr))
    out_dtype = p.out_dtype
    if x.dtype != out_dtype:
        x = Csr(x.crow, x.col, x.values.to(out_dtype), x.shape) if isinstance(x, Csr) else x.to(out_dtype)
        clients = None if clients is None else clients.to(out_dtype)
    # Groups are taken apart here, so their values are checked here.
    on_device = p.groups is None and kernels.TAKES.checks_values
    if p.weights is not None and not on_device:
        check_weights(p.weights, out_dtype)
    if p.preselected is not None and not on_device:
        check_preselected(p.preselected, x.shape[0])
    members = None
    if p.groups is not None:
        members = group_members(p.k, p.groups, p.labels, p.budgets, p.preselected)

    offset = p.offset
    if p.metric in DISTANCES:
        assert isinstance(x, Tensor)
        if offset is None and not on_device:
            offset = _default_offset(kernels, x, clients, p.metric)
            if not scaled and _is_extreme(p, offset) and (exponent := _exponent(p)):
                return _solve_scaled(p, exponent, backend, progress)
        if offset is not None:
            # The number that the kernel subtracts from, in its own precision.
            offset = float(torch.tensor(offset, dtype=out_dtype))
            if (
                p.offset is not None
                and not on_device
                and _is_far_above(kernels, x, clients, p.metric, offset)
            ):
                near = torch.tensor(_default_offset(kernels, x, clients, p.metric), dtype=out_dtype)
                p.near = min(float(near), offset)
                p.excess = offset - p.near

    if progress is None:
        result = _solve_checked(kernels, p, x, clients, members, offset, None)
    else:
        with Progress(progress, p.k, "facility location") as bar:
            result = _solve_checked(kernels, p, x, clients, members, offset, bar)
    if not result[-1] <= torch.finfo(out_dtype).max:
        lower = "" if p.offset is None else f", lower offset, {p.offset:.3g},"
        raise ValueError(
            f"weights: the objective, {result[-1]:.3g}, overflows {out_dtype}; scale the weights down{lower} "
            "or use float64"
        )
    return *result, p.found_offset if offset is None else offset


def _negated(p: _Problem) -> _Problem:
    """The problem of a matrix of distances as one of their negatives, which an offset puts above 0 inside the kernels."""
    assert isinstance(p.x, Tensor)
    least, most = (float(value) for value in p.x.aminmax())
    if not (least >= 0 and most < math.inf):
        check_finite(p.x, "x")
        row, column = (p.x < 0).nonzero()[0].tolist()
        raise ValueError(
            f"x must be >= 0 with metric 'precomputed_distance', got {float(p.x[row, column])} at row {row}, column {column}"
        )
    dtype = p.out_dtype
    above = min(most * 1.0001 or 1.0, torch.finfo(dtype).max)
    near, offset = (float(torch.tensor(above if v is None else v, dtype=dtype)) for v in (None, p.offset))
    if offset <= _FAR_ABOVE * near:
        near = offset
    return replace(p, x=-p.x.to(dtype), metric="precomputed", offset=offset, near=near, excess=offset - near)


def _looks_like_distances(s: Tensor) -> bool:
    """Whether a matrix is square and 0 on its diagonal, and all other numbers are positive."""
    n, m = s.shape
    if n != m or n == 1 or s[0, 0].item() != 0 or bool(s.diagonal().any()):
        return False
    return all(bool(((part > 0).sum(1) == n - 1).all()) for part in s.split(max(1, (1 << 22) // n)))


def _solve_checked(
    kernels: Kernels,
    p: _Problem,
    x: Tensor | Csr,
    clients: Tensor | None,
    members: list[tuple[Tensor, int]] | None,
    offset: float | None,
    bar: Progress | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    if members is None:
        return _solve_one(kernels, p, x, clients, p.weights, p.preselected, p.k, offset, bar, 0)
    # Checked here, since a group's kernel would name the row within its group.
    check_finite(x.values if isinstance(x, Csr) else x, "x")
    n = x.shape[0]
    m = n if clients is None else clients.shape[0]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    assignment = torch.full((m,), -1, dtype=torch.int64, device=x.device)
    objective, done = 0.0, 0
    is_preselected = torch.zeros(n, dtype=torch.bool, device=x.device)
    if p.preselected is not None:
        is_preselected[p.preselected] = True
    for rows, count in members:
        chosen = is_preselected[rows].nonzero()[:, 0]
        if count == 0 and (chosen.shape[0] == 0 or clients is not None):
            continue
        own_clients = clients is None
        part = _part(x, rows, square=p.metric == "precomputed")
        weights = p.weights[rows] if own_clients and p.weights is not None else p.weights
        indices, gains, won, served, value = _solve_one(
            kernels, p, part, clients, weights, chosen if chosen.shape[0] else None, count, offset, bar, done
        )  # fmt: skip
        parts.append((rows[indices], gains, won))
        if own_clients:
            assignment[rows] = torch.where(served >= 0, served + done, -1)
            objective += value
        done += count
    indices, gains, won = (torch.cat(column) for column in zip(*parts, strict=True))
    if clients is not None:
        assert isinstance(x, Tensor)
        won, assignment, objective = _serve(kernels, p, x, clients, indices, offset)
    return indices, gains, won, assignment, objective


def _solve_one(
    kernels: Kernels,
    p: _Problem,
    x: Tensor | Csr,
    clients: Tensor | None,
    weights: Tensor | None,
    preselected: Tensor | None,
    k: int,
    offset: float | None,
    bar: Progress | None,
    done: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """The `k` picks of one problem; `done` picks were made in the groups before it."""
    n = x.shape[0]
    m = x.shape[1] if p.metric == "precomputed" else n if clients is None else clients.shape[0]
    run = kernels.FacilityLocation(
        x,
        clients,
        metric=p.metric,
        weights=weights,
        preselected=preselected,
        offset=_kernel_offset(p, offset),
        memory_budget=p.memory_budget,
        expected_picks=k,
    )
    device = x.device
    indices = torch.empty(k, dtype=torch.int64, device=device)
    gains = torch.empty(k, dtype=p.out_dtype, device=device)
    won = torch.empty(k, dtype=p.out_dtype, device=device)
    assignment = torch.empty(m, dtype=torch.int64, device=device)
    unseen = False  # whether picks were made that the progress has not reported yet
    if p.method == "stochastic" and k > 0:
        _step_stochastic(run, p, n, preselected, k, bar, done, device)
    elif bar is None or not bar.active:
        run.step(k, p.method == "naive")
    else:
        made, completed, chunk = 0, 0, max(1, k // 100)
        while made < k:
            made = run.step(min(chunk, k - made), p.method == "naive")
            # Kernels on a device start picks that are made later.
            completed = run.completed
            bar.update(done + completed)
        if completed < k:
            unseen = True
    objective = run.finish(indices, gains, won, assignment)
    if unseen and bar is not None:
        bar.update(done + k)
    if p.metric in DISTANCES and offset is None:
        p.found_offset = run.offset
    inside = _kernel_offset(p, offset)
    inside = run.offset if inside is None else inside
    assert inside is not None
    check_gains(
        kernels, x, clients, p.metric, weights, preselected, indices, gains, inside, p.method == "stochastic"
    )
    if p.excess:
        constant = p.excess * (float(m) if weights is None else float(weights.sum()))
        objective += constant
        if preselected is None and k > 0:
            gains[0] += constant
    return indices, gains, won, assignment, objective


def _kernel_offset(p: _Problem, offset: float | None) -> float | None:
    if p.metric not in DISTANCES and offset is None:
        return 0.0
    return offset if p.near is None else p.near


def _step_stochastic(
    run: Run,
    p: _Problem,
    n: int,
    preselected: Tensor | None,
    k: int,
    bar: Progress | None,
    done: int,
    device: torch.device,
) -> None:
    taken = set() if preselected is None else set(preselected.tolist())
    candidates = [j for j in range(n) if j not in taken]
    size = max(1, math.ceil(len(candidates) / k * -math.log(p.epsilon)))
    sampler = CandidateSampler(candidates, p.seed, first_row=done)
    for made in range(1, k + 1):
        sampler.remove(run.step_among(sampler.draw(size).to(device)))
        if bar is not None:
            bar.update(done + made)


def _part(x: Tensor | Csr, rows: Tensor, square: bool) -> Tensor | Csr:
    if isinstance(x, Csr):
        return x.square_part(rows)
    return x[rows[:, None], rows] if square else x[rows]


def _serve(
    kernels: Kernels, p: _Problem, x: Tensor, clients: Tensor, indices: Tensor, offset: float | None
) -> tuple[Tensor, Tensor, float]:
    """Weights, assignment and f(S) of the picks of all groups together, over clients that are not the
    candidates."""
    sign = -1 if p.metric in DISTANCES else 1
    floor = torch.tensor(0.0 if offset is None else -offset, dtype=x.dtype, device=x.device)
    picks = x[indices]
    fixed = None if p.preselected is None else x[p.preselected]
    k, m = len(indices), clients.shape[0]
    position = torch.arange(k, device=x.device)[:, None]
    assignment = torch.empty(m, dtype=torch.int64, device=x.device)
    best = torch.empty(m, dtype=x.dtype, device=x.device)
    block = max(1, min(p.memory_budget, 1 << 24) // (x.element_size() * (k + x.shape[1])))
    for begin in range(0, m, block):
        some = clients[begin : begin + block]
        s = sign * kernels.pairwise(picks, some, metric=p.metric)
        covered = floor
        if fixed is not None:
            covered = torch.maximum(floor, (sign * kernels.pairwise(fixed, some, metric=p.metric)).amax(0))
        most = s.amax(0)
        first = torch.where(s == most, position, k).amin(0)  # argmax does not promise the first
        assignment[begin : begin + block] = torch.where(most > covered, first, -1)
        best[begin : begin + block] = torch.maximum(most, covered)
    # Summed on the CPU, where the order of summation is fixed.
    weights = torch.ones(m, dtype=torch.float64) if p.weights is None else p.weights.cpu()
    owner = assignment.cpu()
    won = torch.bincount(owner[owner >= 0], weights[owner >= 0], minlength=k)
    try:
        objective = math.fsum((weights * (best.double() - floor.double()).cpu()).tolist())
    except OverflowError:
        objective = math.inf
    return won.to(x.device, x.dtype), assignment, objective


def _default_offset(kernels: Kernels, x: Tensor, clients: Tensor | None, metric: str) -> float:
    """An upper bound of all distances: through the first client, by the triangle inequality."""
    plain = "euclidean" if metric == "sqeuclidean" else metric
    if clients is None:
        radius = 2 * _farthest(kernels, x[:1], x, "x", plain)
    else:
        radius = _farthest(kernels, clients[:1], clients, "clients", plain)
        radius += _farthest(kernels, clients[:1], x, "x", plain)
    offset = radius * 1.0001
    offset = offset * offset if metric == "sqeuclidean" else offset
    if not offset <= torch.finfo(x.dtype).max:
        raise ValueError(
            f"x: distances of metric {metric!r} overflow {x.dtype}; scale the data down or use float64"
        )
    return offset or 1.0


def _is_far_above(kernels: Kernels, x: Tensor, clients: Tensor | None, metric: str, offset: float) -> bool:
    """Whether `offset` is so much larger than some of the distances that float32 could lose these distances beside it."""
    few = (x if clients is None else clients)[:8]
    return offset > _FAR_ABOVE * float(kernels.pairwise(x[:1], few, metric=metric).max())


def _farthest(kernels: Kernels, point: Tensor, points: Tensor, name: str, metric: str) -> float:
    """The largest distance from `point` to `points`; NaN and infinity in `points` are refused under their `name`."""
    try:
        farthest = float(kernels.pairwise(point, points, metric=metric).max())
    except ValueError:
        check_finite(points, name)
        raise
    if not math.isfinite(farthest):
        check_finite(points, name)  # passes if only the distance overflows, which the caller reports
    return farthest


def group_members(
    k: int, groups: Tensor, labels: Tensor | None, budgets: Tensor | None, preselected: Tensor | None = None
) -> list[tuple[Tensor, int]]:
    """For each label, ascending: its members, ascending, and how many of them to pick."""
    order = torch.argsort(groups, stable=True)
    present, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    rows = order.split(sizes.tolist())
    in_groups = present.tolist()
    free = sizes.clone()
    if preselected is not None:
        free -= torch.bincount(torch.searchsorted(present, groups[preselected]), minlength=len(in_groups)).to(
            free.device
        )
    if budgets is None or labels is None:
        counts = allocate_budgets(free, k).tolist()
        return list(zip(rows, counts, strict=True))

    budget_of = dict(zip(labels.tolist(), budgets.tolist(), strict=True))
    for label, budget in budget_of.items():
        if budget < 0:
            raise ValueError(f"budgets must be >= 0, got {budget} for label {label}")
        if budget > 0 and label not in in_groups:
            raise ValueError(f"budgets: {budget} asked of label {label}, which no candidate has in groups")
    if sum(budget_of.values()) != k:
        raise ValueError(f"k must be the sum of the budgets, {sum(budget_of.values())}, got {k}")
    for label, size, left in zip(in_groups, sizes.tolist(), free.tolist(), strict=True):
        if label not in budget_of:
            raise ValueError(
                f"budgets must name every label in groups, got none for label {label} (0 takes none of it)"
            )
        if budget_of[label] > left:
            raise ValueError(
                f"budgets: {budget_of[label]} asked of label {label}, whose group has {left} candidates left "
                f"({size} less {size - left} preselected)"
            )
    return [(group, budget_of[label]) for group, label in zip(rows, in_groups, strict=True)]


# The torch op, which torch.compile and fake tensors see. An eager call goes to the kernel without the
# dispatcher, which would cost as much as a small problem.


@dataclass(frozen=True)
class _Call:
    """The arguments of the op, which takes tensors and numbers alone."""

    x: Tensor  # values, if the matrix is sparse
    crow: Tensor | None
    col: Tensor | None
    columns: int
    k: int
    clients: Tensor | None
    metric: str
    weights: Tensor | None
    groups: Tensor | None
    labels: Tensor | None
    budgets: Tensor | None
    preselected: Tensor | None
    method: str
    epsilon: float
    seed: str  # a torch op's int ends at 2^63
    offset: float | None
    memory_budget: int
    backend: str | None


def _op(c: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    data: Tensor | Csr = c.x.detach()
    if (c.crow is None) != (c.col is None):
        raise ValueError("crow and col must be given together, or neither of them")
    if c.crow is not None and c.col is not None:
        data = canonical_csr(c.crow, c.col, c.x.detach(), (c.crow.shape[0] - 1, c.columns), "x")
    named = None
    if c.labels is not None and c.budgets is not None:
        named = dict(zip(c.labels.tolist(), c.budgets.tolist(), strict=True))
    problem = _check(
        data, c.k, c.clients, c.metric, c.weights, c.groups, named, c.preselected, c.method, c.epsilon, int(c.seed), c.offset,
        c.memory_budget,
    )  # fmt: skip
    indices, gains, won, assignment, objective, used_offset = _solve_naming_offset(problem, c.backend, None)
    scalars = [
        torch.tensor(v, dtype=torch.float64, device=c.x.device) for v in (objective, used_offset or 0.0)
    ]
    return indices, gains, won, assignment, scalars[0], scalars[1]


def _fake(c: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if c.clients is not None:
        m = c.clients.shape[0]
    elif c.crow is not None:
        m = c.columns
    else:
        m = c.x.shape[1] if c.metric in MATRICES else c.x.shape[0]
    floating = compute_dtype(c.x.dtype)
    return (
        c.x.new_empty(c.k, dtype=torch.int64),
        c.x.new_empty(c.k, dtype=floating),
        c.x.new_empty(c.k, dtype=floating),
        c.x.new_empty(m, dtype=torch.int64),
        c.x.new_empty((), dtype=torch.float64),
        c.x.new_empty((), dtype=torch.float64),
    )


_SELECT = define_op(
    "facility_location", _op, _fake, ("indices", "gains", "weights", "assignment", "objective", "offset")
)


def _call_op(p: _Problem, backend: str | None) -> Selection:
    if isinstance(p.x, Csr):
        x, crow, col, columns = p.x.values, p.x.crow, p.x.col, p.x.shape[1]
    else:
        x, crow, col, columns = p.x, None, None, 0
    call = _Call(
        x, crow, col, columns, p.k, p.clients, p.metric, p.weights, p.groups, p.labels, p.budgets, p.preselected, p.method,
        p.epsilon, str(p.seed), p.offset, p.memory_budget, backend,
    )  # fmt: skip
    indices, gains, won, assignment, objective, offset = _SELECT(call)
    # The descriptor turns the 0-d tensors into numbers when they are read.
    return Selection(
        indices,
        gains,
        won,
        assignment,
        objective,
        None if p.metric not in (*DISTANCES, "precomputed_distance") else offset,
    )


def _has_contiguous_rows(x: Tensor | np.ndarray) -> bool:
    return x.stride(1) == 1 if isinstance(x, Tensor) else x.strides[1] == x.itemsize


@register_estimate("facility_location")
def _estimate(
    x: Any,
    clients: Any = None,
    k: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    metric: str = "cosine",
    weights: Any = None,
    groups: Any = None,
    budgets: Any = None,
    preselected: Any = None,
    method: str = "lazy",
    epsilon: float = 0.1,
    seed: int = 0,
    offset: float | None = None,
    backend: str | None = None,
    progress: Any = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> int:
    """Bytes of one call; see `memory_estimate`. Terms are named after what the kernels allocate."""
    one_of(metric, "metric", METRICS)
    one_of(method, "method", METHODS)
    check_backend(backend)
    memory_budget = _check_memory_budget(memory_budget)
    dtype = as_dtype(dtype)
    n, d = as_shape(x, "x")
    m = d if metric in MATRICES else n
    if clients is not None:
        m, width = as_shape(clients, "clients")
        if width != d:
            raise ValueError(f"clients must have {d} columns as x has, got shape {(m, width)}")
    k = n if k is None else as_integer(k, "k")
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and {n}, the candidates, got {k}")
    size, threads = compute_dtype(dtype).itemsize, torch.get_num_threads()
    is_points, self_clients = metric not in MATRICES, clients is None
    outputs = 40 * k + 8 * m
    # torch converts with its own threads, which it may have to start.
    converted = (n * d + (0 if self_clients else m * d)) * size + 2**22 if dtype.itemsize < size else 0
    of_group = n * d * size + 24 * n if groups is not None else 0
    # A matrix whose rows are not contiguous is copied; shapes alone do not say whether they are.
    strided = metric in MATRICES and isinstance(x, (Tensor, np.ndarray)) and not _has_contiguous_rows(x)
    of_group += n * d * size if strided else 0
    pairs = n * m * size
    of_group += pairs if metric == "precomputed_distance" else 0  # negated
    if backend is None and isinstance(x, Tensor):
        backend = DEFAULTS.get(x.device.type, ("torch",))[0]
    if backend == "cuda":
        packed = (n * d + (0 if self_clients else m * d)) * size if is_points else 0
        norms = 8 * (n + (0 if self_clients else m)) if metric == "dot" else 0
        # Bounds, sums and picks of candidates; best similarities, weights and owners of clients; a sample.
        state = (4 * 8 + 6 * 4) * n + (4 * size + 2 * 4) * m + (4 * n if method == "stochastic" else 0)
        named = 12 * n if preselected is not None else 0
        exact = 16 * k  # gains and weights are written in float64
        return outputs + exact + converted + of_group + packed + norms + state + named + 8 * m + 2**16
    if backend == "triton":
        points = (n * d + (0 if self_clients else m * d)) * size if is_points else 0
        panels = points + 256 * d * size
        wide = points * 8 // size if metric == "dot" else 0  # norms are taken in float64
        batch = 2 * n * d * size if is_points else 0  # of candidates: some columns of the panel, padded
        matrix = pairs if is_points and pairs <= memory_budget else 0
        normalized = 3 * points if metric == "cosine" else 0
        return outputs + converted + of_group + normalized + panels + wide + batch + matrix + 200 * n + 64 * m
    if backend == "torch":
        normalized = 2 * (n * d + (0 if self_clients else m * d)) * size if is_points else 0
        matrix = pairs if is_points and pairs <= memory_budget else 0
        # Temporaries of a block of rows, and the allocator's share of them.
        block = 8 * max(2**20, 8 * m)
        return outputs + converted + of_group + normalized + matrix + 200 * n + 64 * m + block

    columns = (n if self_clients else m) if is_points else 0
    packed = (columns + 32) * d * size if is_points else 0
    per_candidate, per_client = 113 * n, m * (16 * size + 24)
    sweep = threads * 8 * n
    if is_points and n >= 4096 and m >= 2048 and k >= 8:  # the kernel looks ahead
        states = 8  # the number of picks that the kernel looks ahead
        copies = states * 2 * m * size + 8 * n * (states + 1) + (min(m, 8192) + max(2048, m // 20)) * d * size
        sweep = copies + (threads * (states + 1) * 8 * n if self_clients else 0)
    matrix = pairs if is_points and pairs <= memory_budget else 0
    entry = 4 + size
    capacity = min((memory_budget - matrix) // entry, n * m)
    longest = min(m, max(256, 4 * capacity // n)) if capacity else 0
    lists = (capacity + threads * 48 * longest) * entry
    # Each thread packs a block of rows: 2 MB, or 96 rows if these are more.
    blocks = threads * max(2**20, min(n, 96) * d * size if is_points else 0)
    own = packed + per_candidate + per_client + sweep + matrix + lists + blocks
    # If large arrays lie side by side, the huge page that both share is counted whole.
    own += _HUGE_PAGE if own >= 2 * _HUGE_PAGE else 0
    return outputs + converted + of_group + own
