"""Facility location: the public function, the same as a torch op, and what it allocates."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET, DISTANCES
from flashcoreset._core.dispatch import DEFAULTS, check_backend, kernels_of
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.op import define_op
from flashcoreset._core.progress import check_progress
from flashcoreset._core.results import Selection
from flashcoreset._core.tensor import as_integer, compute_dtype, is_traced, one_of
from flashcoreset.facility_location.checks import (
    METHODS,
    check_memory_budget,
    check_no_limits,
    check_request,
    check_seed,
)
from flashcoreset.facility_location.problem import MATRICES, METRICS, Problem, Request
from flashcoreset.facility_location.solve import solve


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
    costs: Any = None,
    cost_budget: float | None = None,
    cost_sensitive: bool = True,
    stop_gain: float | None = None,
    exclude: Any = None,
    caps: Any = None,
    min_distance: float | None = None,
    rounds: int = 1,
) -> Selection:
    """Greedy maximisation of f(S) = sum_i w_i * max(0, max_{j in S} s(j, i)) over candidates j and clients i.

    Args:
        x: [n, d] candidates, float16, bfloat16, float32 or float64 (half types compute in float32); a torch
            tensor, a NumPy array or an object with `__dlpack__`. `x` may require grad; the result does not.
            With metric="precomputed": s itself, [n candidates, m clients], also as a scipy CSR matrix or
            torch sparse CSR tensor whose absent entries are 0. With metric="precomputed_distance": distances >= 0 of
            that shape.
        k: how many to pick, 1 <= k <= the candidates that are not preselected. With `budgets`: their sum, or
            None. With `cost_budget` or `stop_gain`: the most picks, or None for any number.
        clients: [m, d], same dtype as `x`; default `x` (passing `x` itself means the same).
        metric: "cosine" (0 for a zero row) and "dot" are s; "euclidean", "sqeuclidean" and "l1" make s =
            offset - distance; "precomputed" takes `x` as s, "precomputed_distance" as distances. A square matrix of
            similarities with zeros on the diagonal alone, as distances have them, gets an `InputWarning`.
        weights: [m] client weights >= 0; default 1.
        groups: [n] labels, integers or values that can be sorted, such as strings: each label is its own problem over its own members (as candidates and,
            without `clients`, as clients). Picks come label by label, ascending. With `clients`, every
            group's candidates face all clients, gains are the group's own, and weights, assignment and
            objective are those of all picks together.
        budgets: how many to pick from each group: a dict label -> count that names every label, or counts [G]
            for the labels 0..G-1. Default: `allocate_budgets` of the groups' sizes (without the preselected)
            and `k`.
        preselected: [p] distinct candidates already in S, or a boolean mask [n]: they cover clients and are not returned.
        method: "lazy" and "naive" give the exact greedy sequence; "stochastic" picks the best of ceil(n/k *
            ln(1/epsilon)) candidates drawn anew for each pick.
        epsilon: in (0, 1), for "stochastic".
        seed: in [0, 2^64), for "stochastic".
        offset: for distances, a number >= 0; default an upper bound of all distances, on which the picks do
            not depend.
        backend: "cpu" (compiled), "cuda" or "triton" (on CUDA tensors; no sparse matrices), "torch" (the slow
            reference) or None: the first that takes `x` (docs/backends.md).
        progress: True shows a bar on stderr; a callable gets (done, k): the share of the work that is done, in picks. On a CPU the first
            pick, which takes the gains of all candidates, counts as half of the work once it takes longer than a report (50 ms). Not
            called inside torch.compile.
        memory_budget: bytes that may be spent on similarities and lists larger than n + m, >= 0; default 256
            MiB. The result does not depend on it.
        costs: [n] > 0: each pick is the candidate of the largest gain / cost, both as float64 (a tie is a tie of that number);
            with `cost_sensitive=False` it is the one of the largest gain, as without costs.
        cost_budget: a number >= 0: candidates that no longer fit, because their cost and those of all picks so far sum up (exactly,
            rounded once) to more, are passed over, until k are picked or nothing fits. What the preselected cost is not counted.
            This is the greedy rule of Khuller, Moss and Naor 1999 without their comparison with the best single candidate. For the
            rules that end at the first candidate that does not fit, or take it as the last one, leave `cost_budget` None and cut
            the picks where their costs reach the budget.
        cost_sensitive: whether picks go by gain per cost.
        stop_gain: picks end before the first gain below it (compared in float64), so that fewer than k may come back.
        exclude: indices, or a boolean mask [n], of candidates that are not picked; as clients they count.
        caps: a dict label -> at most so many picks of that label in `groups`, or counts [G] for the labels 0..G-1; labels
            that it does not name are not capped. The groups are one problem then, and the preselected count. Fewer than k picks
            come back if no candidate is left.
        min_distance: candidates at a smaller distance than this from a pick or a preselected one are not picked (1 - s for
            "cosine"; not for "dot" and "precomputed"; within groups that are problems of their own only). Fewer than k picks
            come back if no candidate is left.
        rounds: up to how many picks serve each client, >= 1, round after round. A round is the greedy sequence until no candidate
            gains anything (with `stop_gain`: before the first gain below it), that is, until each client has the best candidate that is
            left. The next round starts anew: nothing is covered, and what was picked or preselected before is no candidate any more. So
            after r whole rounds each client's r most similar candidates are picked, as far as they have s > 0. There are rounds until
            `k` picks are made or there were `rounds` of them (any large number: as many as `k` takes); the last one goes on
            with what gains nothing, unless `stop_gain` ends it. The preselected serve in the first round only. Limits hold for the picks of all rounds. Not
            for "stochastic". With groups each group has its own rounds. If clients are `x`, one round ends with all distinct rows.

    Returns:
        Selection, on the device of `x`: `indices` [k] in pick order; `gains` [k] (float64 for float64, else
        float32); `weights` [k], the client weight that each pick won; `assignment` [m], the position in
        `indices` of the pick most similar to each client (ties: the earlier pick), or -1 if no pick has s
        > 0 or if a preselected item is as good. Without `clients` a pick serves itself unless a preselected item
        is more similar. `objective` = f(S) with the preselected in S; `offset` of distances.
        With `rounds` > 1: `rounds` [k], the round of each pick, from 0; `served_by` [R, m] as `assignment`, for each of the R rounds
        that were begun; `gains` are those within the round; `weights` are summed over rounds; `assignment` is that of the first
        round, and f(S) is that of all picks.

    Warns:
        InputWarning: if picks gain nothing, with clients that are not `x`: they serve nobody, and are the lowest free indices.

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
        (tensor([2, 3]), tensor([80., 16.]), tensor([0, 0, 0, 1, 1]))
        >>> fc.facility_location(x, None, metric="l1", groups=[0, 0, 0, 1, 1], budgets={0: 1, 1: 1}).indices
        tensor([1, 3])
        >>> fc.facility_location(x, None, metric="l1", costs=[1, 3, 2, 1, 2], cost_budget=4).indices
        tensor([0, 3, 2])
    """
    wanted: Any = k  # None is replaced by the checks
    request = Request(
        x, None, None, 0, wanted, clients, metric, weights, groups, None, budgets, preselected, method, epsilon, check_seed(seed),
        offset, memory_budget, backend, costs, cost_budget, cost_sensitive, stop_gain, exclude, None, caps, min_distance, rounds,
    )  # fmt: skip
    check_request(request)
    check_backend(backend)
    check_progress(progress)
    if is_traced(request.x):
        check_no_limits(request)
        return _call_op(request)
    return solve(request, progress)


# The torch op, which torch.compile and fake tensors see. An eager call goes to the kernel without the
# dispatcher, which would cost as much as a small problem.


def _op(r: Request) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r.x, r.seed = r.x.detach(), check_seed(int(r.seed))
    check_request(r)
    check_no_limits(r)
    found = solve(r, None)
    scalars = [
        torch.tensor(value, dtype=torch.float64, device=r.x.device)
        for value in (found.objective, found.offset or 0.0)
    ]
    return found.indices, found.gains, found.weights, found.assignment, scalars[0], scalars[1]


def _fake(r: Request) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if r.clients is not None:
        m = r.clients.shape[0]
    elif r.crow is not None:
        m = r.columns
    else:
        m = r.x.shape[1] if r.metric in MATRICES else r.x.shape[0]
    return (
        r.x.new_empty(r.k, dtype=torch.int64),
        r.x.new_empty(r.k, dtype=r.dtype),
        r.x.new_empty(r.k, dtype=r.dtype),
        r.x.new_empty(m, dtype=torch.int64),
        r.x.new_empty((), dtype=torch.float64),
        r.x.new_empty((), dtype=torch.float64),
    )


_SELECT = define_op(
    "facility_location", _op, _fake, ("indices", "gains", "weights", "assignment", "objective", "offset")
)


def _call_op(r: Request) -> Selection:
    indices, gains, won, assignment, objective, offset = _SELECT(r)
    # The descriptor turns the 0-d tensors into numbers when they are read.
    has_offset = r.metric in (*DISTANCES, "precomputed_distance")
    return Selection(indices, gains, won, assignment, objective, offset if has_offset else None)


def _has_contiguous_rows(x: Tensor | np.ndarray) -> bool:
    return x.stride(1) == 1 if isinstance(x, Tensor) else x.strides[1] == x.itemsize


@register_estimate(facility_location, "x", "clients")
def _estimate(call: SimpleNamespace) -> int:
    """Bytes of one call; see `memory_estimate`."""
    one_of(call.metric, "metric", METRICS)
    one_of(call.method, "method", METHODS)
    check_backend(call.backend)
    memory_budget, dtype = check_memory_budget(call.memory_budget), as_dtype(call.dtype)
    n, d = as_shape(call.x, "x")
    clients = None if call.clients is None else as_shape(call.clients, "clients")
    if clients is not None and clients[1] != d:
        raise ValueError(f"clients must have {d} columns as x has, got shape {clients}")
    k = n if call.k is None else as_integer(call.k, "k")
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and {n}, the candidates, got {k}")
    is_matrix = call.metric in MATRICES

    def like(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=compute_dtype(dtype), device="meta")

    problem = Problem(
        like(n, d),
        None if clients is None else like(*clients),
        "precomputed" if is_matrix else call.metric,
        preselected=None if call.preselected is None else like(1),
        costs=None if call.costs is None else like(n),
        memory_budget=memory_budget,
        expected_picks=k,
    )
    size = problem.x.dtype.itemsize
    outputs = 40 * k + 8 * problem.shape[1]
    if (rounds := as_integer(call.rounds, "rounds")) > 1:
        outputs += (
            16 * k + 24 * min(rounds, k) * problem.shape[1]
        )  # of each round, in all, and those of groups
    points = n * d + (0 if clients is None else clients[0] * d)
    # torch converts with its own threads, which it may have to start.
    converted = points * size + 2**22 if dtype.itemsize < size else 0
    of_group = n * d * size + 24 * n if call.groups is not None else 0
    # A matrix whose rows are not contiguous is copied; shapes alone do not say whether they are.
    strided = is_matrix and isinstance(call.x, (Tensor, np.ndarray)) and not _has_contiguous_rows(call.x)
    copies = strided + (call.metric == "precomputed_distance")  # the distances negated
    backend = call.backend
    if backend is None:
        backend = DEFAULTS.get(call.x.device.type, ("torch",))[0] if isinstance(call.x, Tensor) else "cpu"
    kernels = kernels_of(backend, "facility_location")
    return outputs + converted + of_group + copies * n * d * size + kernels.workspace(problem)
