"""Solves a request: the numbers brought into range, offsets found, the chosen kernel run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.progress import Progress, Report
from flashcoreset._core.results import Selection
from flashcoreset._core.scaling import exponent_into, largest_magnitude, scale, times_power
from flashcoreset._core.tensor import Csr, check_finite, check_preselected, check_weights
from flashcoreset.facility_location.backend import Kernels, Run, choose
from flashcoreset.facility_location.checks import (
    check_costs,
    check_left,
    excluded_mask,
    group_members,
    warn_of_distances,
    warn_of_no_gain,
)
from flashcoreset.facility_location.groups import solve_groups
from flashcoreset.facility_location.limits import Limits
from flashcoreset.facility_location.lost_gains import check_gains
from flashcoreset.facility_location.problem import MATRICES, Problem, Request
from flashcoreset.facility_location.rounds import in_rounds
from flashcoreset.facility_location.sampling import CandidateSampler

_FAR_ABOVE = 1000  # an offset this many times above the distances could lose them in rounding

# Largest magnitudes of points whose squares and products are normal numbers, also for points that are 2^20 times nearer; and
# the magnitudes that other points are scaled to.
_SAFE = {torch.float32: (-40, 50), torch.float64: (-400, 480)}
_SCALED_TO = {torch.float32: (-30, 30), torch.float64: (-300, 300)}
# Sums of distances "l1" may have terms of any magnitude, but 2^-61 of a sum has to be a normal number.
_LEAST_L1 = 2.0**-900


def solve(r: Request, progress: Report | bool | None) -> Selection:
    try:
        found = _solve(r, progress)
    except ValueError as error:
        if r.offset is None or not str(error).startswith("x: similarities times weights"):
            raise
        raise ValueError(f"{error}, or raise offset, {r.offset}") from None
    # Checked afterwards, when a device has nothing left to wait for.
    if r.metric == "precomputed" and r.crow is None:
        warn_of_distances(r.x)
    warn_of_no_gain(r, found)
    return found


def _solve(r: Request, progress: Report | bool | None) -> Selection:
    """Solves a problem. If squares or products leave the range of the type, points are scaled by a power of two, which is exact,
    and the results are scaled back."""
    if r.metric in ("cosine", *MATRICES):
        return _solve_in_range(r, progress)
    # What the run itself reports about the range costs nothing, but it reports nothing about an offset that is given.
    of_l1 = r.metric == "l1" and not (r.offset and _is_extreme(r, r.offset))
    exponent = 0 if r.offset is None or of_l1 else _exponent(r)
    if exponent == 0:
        try:
            found = _solve_in_range(r, progress)
        except ValueError:
            exponent = _exponent(r)
            if exponent == 0:
                raise
        else:
            if r.metric == "dot":
                extreme = found.objective < 2.0 ** (2 * _SAFE[r.dtype][0])
            else:
                extreme = r.offset is None and found.offset is not None and _is_extreme(r, found.offset)
            exponent = _exponent(r) if extreme else 0
            if exponent == 0:
                return found
    return _solve_scaled(r, exponent, progress)


def _is_extreme(r: Request, offset: float) -> bool:
    """Whether an upper bound of the distances is so small or large that their squares may have left the range."""
    low, high = _SAFE[r.dtype]
    power = 2 if r.metric == "sqeuclidean" else 1
    if r.metric == "l1":
        # "l1" has no squares, but the unit of gains has to be a normal number too.
        return r.dtype == torch.float64 and offset < _LEAST_L1
    # 1 stands for a bound of 0.
    return offset == 1 or not 2.0 ** (power * low) < offset < 2.0 ** (power * (high + 10))


def _exponent(r: Request) -> int:
    """The power of two by which points have to be multiplied; 0 if their magnitudes are safe, and if they are not finite."""
    most = largest_magnitude(r.x, r.clients)
    return exponent_into(most, _SAFE[r.dtype], _SCALED_TO[r.dtype])


def _solve_scaled(r: Request, exponent: int, progress: Report | bool | None) -> Selection:
    limit = torch.finfo(r.dtype)
    offset = r.offset
    power = exponent if r.metric in ("euclidean", "l1") else 2 * exponent
    if offset:
        if not limit.tiny <= times_power(offset, power) <= limit.max / 4:
            raise ValueError(
                f"offset: {offset} is too far from all distances to be added to them in {r.dtype}; leave it None, or scale x"
            )
        offset = times_power(offset, power)
    scaled = replace(
        r,
        x=scale(r.x.to(r.dtype), exponent),
        clients=None if r.clients is None else scale(r.clients.to(r.dtype), exponent),
        offset=offset,
        stop_gain=None if r.stop_gain is None else times_power(r.stop_gain, power),
        min_distance=None if r.min_distance is None else times_power(r.min_distance, power),
    )
    found = _solve_in_range(scaled, progress, scaled=True)
    back = -power
    value, offset = times_power(found.objective, back), found.offset
    what = "distances" if r.metric in DISTANCES else "similarities"
    if r.offset is None and offset is not None:
        offset = times_power(offset, back)
    if not max(value, offset or 0.0) <= limit.max:
        raise ValueError(
            f"x: {what} of metric {r.metric!r} overflow {r.dtype}; scale the data down or use float64"
        )
    if found.objective != 0 and value < limit.tiny and r.metric in ("sqeuclidean", "dot"):
        raise ValueError(
            f"x: {what} of metric {r.metric!r} underflow {r.dtype}; scale the data up or use float64"
        )
    offset = offset if r.offset is None else r.offset
    return replace(found, gains=scale(found.gains, back), objective=value, offset=offset)


def _solve_in_range(r: Request, progress: Report | bool | None, scaled: bool = False) -> Selection:
    x, clients, dtype = r.matrix, r.clients, r.dtype
    kernels = choose(r.backend, x.device, sparse=isinstance(x, Csr))
    if x.dtype != dtype:
        x = Csr(x.crow, x.col, x.values.to(dtype), x.shape) if isinstance(x, Csr) else x.to(dtype)
        clients = None if clients is None else clients.to(dtype)
    # Groups are taken apart here, and limits looked up here, so their values are checked here.
    on_device = kernels.TAKES.checks_values and not (r.is_grouped or r.is_limited or r.costs is not None)
    if r.weights is not None and not on_device:
        check_weights(r.weights, dtype)
    if r.preselected is not None and not on_device:
        check_preselected(r.preselected, x.shape[0])
    if r.costs is not None:
        check_costs(r.costs)
    excluded, members = None if r.exclude is None else excluded_mask(r), None
    if r.groups is not None and r.is_grouped:
        members = group_members(r.k, r.groups, r.labels, r.budgets, r.preselected, excluded)
    elif excluded is not None:
        check_left(r, x.shape[0])

    metric, offset = r.metric, r.offset
    near: float | None = 0.0  # the kernels' offset: beside one far above all distances sums would be rounded
    if isinstance(x, Tensor) and metric == "precomputed_distance":
        near, offset = _offsets_of_matrix(x, offset)
        metric, x = "precomputed", -x
    elif isinstance(x, Tensor) and metric in DISTANCES:
        if offset is None and not on_device:
            offset = _default_offset(kernels, x, clients, metric)
            if not scaled and _is_extreme(r, offset) and (exponent := _exponent(r)):
                return _solve_scaled(r, exponent, progress)
        near = None
        if offset is not None:
            near = offset = _rounded(offset, dtype)  # in the kernels' own precision
            if r.offset is not None and not on_device and _is_far_above(kernels, x, clients, metric, offset):
                near = min(_rounded(_default_offset(kernels, x, clients, metric), dtype), offset)

    costs = r.costs if r.cost_sensitive else None
    problem = Problem(x, clients, metric, r.weights, r.preselected, costs, near, r.memory_budget, r.k)

    def solve_all(bar: Progress | None) -> Selection:
        if members is None:
            return _solve_one(kernels, r, problem, r.k, excluded, offset, bar)

        def solve_group(rows: Tensor, group: Problem, k: int, done: int) -> Selection:
            own = None if excluded is None else excluded[rows]
            return _solve_one(kernels, r, group, k, own, offset, bar, done)

        return solve_groups(kernels, problem, members, offset, solve_group, r.rounds)

    if progress is None:
        found = solve_all(None)
    else:
        with Progress(progress, r.k, "facility location") as bar:
            found = solve_all(bar)
            bar.skip(r.k)  # picks that limits did not leave
    if not found.objective <= torch.finfo(dtype).max:
        lower = "" if r.offset is None else f", lower offset, {r.offset:.3g},"
        raise ValueError(
            f"weights: the objective, {found.objective:.3g}, overflows {dtype}; scale the weights down{lower} "
            "or use float64"
        )
    return found


def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype))


def _offsets_of_matrix(distances: Tensor, offset: float | None) -> tuple[float, float]:
    """For a matrix of distances, checked here: the offset that the kernels take, and the one that was meant."""
    least, most = (float(value) for value in distances.aminmax())
    if not (least >= 0 and most < math.inf):
        check_finite(distances, "x")
        row, column = (distances < 0).nonzero()[0].tolist()
        raise ValueError(
            f"x must be >= 0 with metric 'precomputed_distance', got {float(distances[row, column])} at row {row}, column {column}"
        )
    dtype = distances.dtype
    above = _rounded(min(most * 1.0001 or 1.0, torch.finfo(dtype).max), dtype)
    offset = above if offset is None else _rounded(offset, dtype)
    return offset if offset <= _FAR_ABOVE * above else above, offset


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


def _solve_one(
    kernels: Kernels,
    r: Request,
    problem: Problem,
    k: int,
    excluded: Tensor | None,
    offset: float | None,
    bar: Progress | None,
    done: int = 0,
) -> Selection:
    """The `k` picks of one problem, or fewer if its limits are reached; `done` picks were made in the groups before it."""
    limits = Limits(kernels, r, problem, excluded) if r.is_limited else None

    def solve_round(problem: Problem, k: int, made: int, stop_gain: float | None) -> Selection:
        return _run(kernels, replace(r, stop_gain=stop_gain), problem, k, limits, offset, bar, done + made)

    if r.rounds == 1:
        return _run(kernels, r, problem, k, limits, offset, bar, done)
    return in_rounds(problem, r.rounds, k, r.stop_gain, solve_round)


def _run(
    kernels: Kernels,
    r: Request,
    problem: Problem,
    k: int,
    limits: Limits | None,
    offset: float | None,
    bar: Progress | None,
    done: int,
) -> Selection:
    """Up to `k` picks of one greedy run."""
    run = kernels.FacilityLocation(problem)
    naive = r.method == "naive"
    unseen = False  # whether picks were made that the progress has not reported yet
    if limits is not None:
        k = _step_within(limits, run, r, problem, k, offset, bar, done)
    elif r.method == "stochastic" and k > 0:
        _step_stochastic(run, r, problem, k, bar, done)
    elif bar is None or not bar.active:
        run.step(k, naive)
    else:
        made, completed, chunk, work = 0, 0, max(1, k // 100), Work(k, bar, done)
        while made < k:
            made = run.step(min(chunk, k - made), naive, None if naive else work.report)
            # Kernels on a device start picks that are made later.
            completed = run.completed
            work.made(completed)
        unseen = completed < k
    device, dtype = problem.x.device, problem.x.dtype
    indices = torch.empty(k, dtype=torch.int64, device=device)
    gains = torch.empty(k, dtype=dtype, device=device)
    won = torch.empty(k, dtype=dtype, device=device)
    assignment = torch.empty(problem.shape[1], dtype=torch.int64, device=device)
    objective = run.finish(indices, gains, won, assignment)
    if unseen and bar is not None:
        bar.update(done + k)
    near = run.offset
    assert near is not None
    some = limits is not None or r.method == "stochastic" or problem.costs is not None
    check_gains(kernels, problem, near, indices, gains, some)
    if offset is None and problem.metric in DISTANCES:
        offset = near
    elif offset is not None and offset > near:
        # The kernels left out the part of the offset far above all distances.
        constant = (offset - near) * problem.total_weight
        objective += constant
        if problem.preselected is None and k > 0:
            gains[0] += constant
    return Selection(indices, gains, won, assignment, objective, offset)


class Work:
    """Reports how much of the work of `k` picks is done, in picks.

    Half of the work is what the first pick takes: the gains of all candidates. Of the other half, `k` / (k + 1,000) are the picks, and the rest
    is as many pairs again, which sweeps between the picks compute (2.2 to 2.8 times as many in all on points in clusters). If the first
    pick takes no time worth a report, the picks alone are counted.
    """

    def __init__(self, k: int, bar: Progress, done: int) -> None:
        self._k, self._bar, self._done = k, bar, done
        self._work = 0.0  # as last reported
        self._share = 0.0
        self._first: float | None = None  # when the first pick was made

    def report(self, work: float, picks: int) -> None:
        """Takes what the kernels report: pairs, in units of those before the first pick, and picks."""
        self._work = work
        self.made(picks)

    def made(self, picks: int) -> None:
        share = picks / self._k
        if self._work > 0:
            if picks == 0:
                share = 0.5 * min(1.0, self._work)
            else:
                if self._first is None:
                    self._first = self._work
                of_picks = self._k / (self._k + 1_000)
                pairs = min(1.0, (self._work - self._first) / (1.2 * self._first))
                share = 0.5 + 0.5 * (of_picks * share + (1 - of_picks) * pairs)
        # What a pick takes is an estimate, which may turn out too low.
        self._share = max(self._share, share)
        # Rounding must not take the last pick away.
        self._bar.update(self._done + (self._k if picks == self._k else int(self._k * self._share)))


def _step_within(
    limits: Limits,
    run: Run,
    r: Request,
    problem: Problem,
    k: int,
    offset: float | None,
    bar: Progress | None,
    done: int,
) -> int:
    """Makes up to `k` picks one by one, closing after each what the limits rule out; returns how many were made."""
    closed, sampler = limits.closed(), None
    if r.method == "stochastic" and k > 0:
        sampler, size = _sampler(r, problem, k, done)
    for made in range(k):
        if len(closed):
            run.close(closed)
            if sampler is not None:
                sampler.discard(closed)
        if sampler is not None:
            if sampler.left == 0:
                return made
            j = run.step_among(sampler.draw(size).to(problem.x.device))
            sampler.remove(j)
        else:
            stop_gain, near = r.stop_gain, problem.offset
            if (
                stop_gain is not None
                and made == 0
                and problem.preselected is None
                and offset is not None
                and near is not None
            ):
                # The run leaves out what an offset far above all distances adds to the first gain.
                stop_gain -= (offset - near) * problem.total_weight
            j = run.pick(r.method == "naive", stop_gain)
            if j < 0:
                return made
        closed = limits.after(j)
        if bar is not None:
            bar.update(done + made + 1)
    return k


def _sampler(r: Request, problem: Problem, k: int, done: int) -> tuple[CandidateSampler, int]:
    """Draws candidates for stochastic greedy; and how many each time."""
    taken = set() if problem.preselected is None else set(problem.preselected.tolist())
    candidates = [j for j in range(problem.shape[0]) if j not in taken]
    size = max(1, math.ceil(len(candidates) / k * -math.log(r.epsilon)))
    return CandidateSampler(candidates, int(r.seed), first_row=done), size


def _step_stochastic(run: Run, r: Request, problem: Problem, k: int, bar: Progress | None, done: int) -> None:
    sampler, size = _sampler(r, problem, k, done)
    for made in range(1, k + 1):
        sampler.remove(run.step_among(sampler.draw(size).to(problem.x.device)))
        if bar is not None:
            bar.update(done + made)
