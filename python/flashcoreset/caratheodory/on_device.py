"""The Carathéodory reduction of rows that lie on a device: the host's side of the backends "cuda" and "triton".

Reading the rows for the sums of their runs takes most of the time, so the device does it, and drops the rows that the host names. The
elimination that finds the rows to drop is short and sequential, so a round's sums come to the host (4 (d + 1) rows of d + 1
numbers), where the compiled CPU module reduces them; a round leaves a quarter of the rows. The rows left after a few rounds come
to the host too and are reduced there to the end, and so is a problem that is small from the start.

With `max_size` single rows are needed one after the other: rows come to the host in pieces, and the device does the sums. If there
are more columns than twice the rows, the device makes a triangle by QR factorisations, whose columns then stand for the rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.native import capsule
from flashcoreset._core.tensor import check_finite
from flashcoreset.caratheodory import cpu
from flashcoreset.caratheodory.problem import Problem, Runs

# Numbers of rows that come to the host without another round: a round costs the device's latency twice.
FEW = 1 << 17

# Bytes of rows that come to the host at a time, and numbers that are factorised together.
PIECE_BYTES = 1 << 22
QR_NUMBERS = 1 << 22

_SAMPLE = 64  # rows whose mean is the first centre
_SHRINK = 2.0**-80  # the factor for huge numbers, whose sums would overflow
_EPS = torch.finfo(torch.float64).eps


class SumRuns(Protocol):
    """Writes sums [runs, 1 + d] of w (1, shrink x - centre) over the rows of each run."""

    def __call__(self, runs: Runs, centre: Tensor, shrink: float, sums: Tensor) -> None: ...


class KeepRuns(Protocol):
    """Writes the rows of the runs `kept`, and their weights times their run's factor."""

    def __call__(
        self, runs: Runs, kept: Tensor, factors: Tensor, new_rows: Tensor, new_weights: Tensor
    ) -> None: ...


class _Reduction:
    """The sums that have to be kept, their centre, and how the device takes them."""

    def __init__(self, left: Runs, sum_runs: SumRuns) -> None:
        """Reads all rows."""
        self.sum_runs = sum_runs
        for shrink in (1.0, _SHRINK):
            self.shrink = shrink
            self.native = native.module().CaratheodoryReduction(capsule(_mean_of_a_few(left, shrink)), shrink)
            self.sums = self.of_runs(left)
            if self.native.take_total(capsule(self.sums)):
                break
            check_finite(left.x, "x")
        if not self.native.move_to_mean(capsule(self.sums)):
            self.sums = self.of_runs(left)
            self.native.take_total(capsule(self.sums))

    def size(self, count: int) -> int:
        """The number of rows in a run."""
        return -(-count // self.native.most_runs)

    def of_runs(self, left: Runs) -> Tensor:
        """The sums of runs [runs, 1 + d] about the centre, on the host."""
        d, device = left.x.shape[1], left.x.device
        centre = torch.empty(d, dtype=torch.float64)
        self.native.centre(capsule(centre))
        size = self.size(left.count)
        sums = torch.empty(-(-left.count // size), 1 + d, dtype=torch.float64, device=device)
        self.sum_runs(replace(left, size=size), centre.to(device), self.shrink, sums)
        return sums.cpu()


def reduce_on_device(
    problem: Problem, out: tuple[Tensor, Tensor] | None, sum_runs: SumRuns, keep_runs: KeepRuns
) -> tuple[Tensor, Tensor]:
    """As `flashcoreset.caratheodory.backend.Kernels` has it, by the device's kernels `sum_runs` and `keep_runs`."""
    x, weights = problem.x.detach(), problem.weights
    if weights is not None and not bool(weights.any()):
        raise ValueError("weights: expected one that is > 0")
    if x.numel() <= FEW:
        host = None if weights is None else weights.cpu()
        found = cpu.caratheodory(Problem(x.cpu(), host, problem.max_size))
    else:
        found = _reduce(Problem(x, weights, problem.max_size), sum_runs, keep_runs)
    if out is None:
        return found[0].to(x.device), found[1].to(x.device)
    count = len(found[0])
    return out[0][:count].copy_(found[0]), out[1][:count].copy_(found[1])


def _reduce(problem: Problem, sum_runs: SumRuns, keep_runs: KeepRuns) -> tuple[Tensor, Tensor]:
    x, weights, max_size = problem.x, problem.weights, problem.max_size
    exponent, live = 0, len(x)
    scaled = None
    if weights is not None:
        # Sums of weights and of products stay in range.
        exponent = math.frexp(float(weights.max()))[1]
        scaled = _times_power(weights.contiguous(), -exponent)
        live = int(scaled.count_nonzero())
    left = Runs(x, None, scaled)
    if live <= max(max_size, 1):
        check_finite(x, "x")
        left = left.without_zeros()
        rows, w = left.host_rows(), left.host_weights()
    elif x.shape[1] + 1 > 2 * live:
        check_finite(x, "x")
        left = left.without_zeros()
        w = left.host_weights()
        places, w = cpu.caratheodory(Problem(_triangle(left, w), w, max_size, one_scale=True))
        rows = left.host_rows()[places]
    elif max_size > 0:
        rows, w = _sample(left, live, max_size, sum_runs)
    else:
        rows, w = _run(left, live, sum_runs, keep_runs)
    return rows, _times_power(w, exponent)


def _run(left: Runs, live: int, sum_runs: SumRuns, keep_runs: KeepRuns) -> tuple[Tensor, Tensor]:
    """As few rows as possible, and their weights."""
    d = left.x.shape[1]
    reduction = _Reduction(left, sum_runs)
    sums: Tensor | None = reduction.sums
    if 2 * live <= left.count:  # empty runs would be read again and again
        left, sums = left.without_zeros(), None
    while left.count > max(reduction.native.most_runs, FEW // d):
        left = _drop(left, reduction, reduction.of_runs(left) if sums is None else sums, keep_runs)
        sums = None
    most = min(left.count, d + 1)
    places, w = torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.float64)
    count = reduction.native.rest(
        capsule(left.points(0, left.count)),
        capsule(left.host_weights()),
        capsule(places),
        capsule(w),
        torch.get_num_threads(),
    )
    return left.host_rows()[places[:count]], w[:count]


def _drop(left: Runs, reduction: _Reduction, sums: Tensor, keep_runs: KeepRuns) -> Runs:
    """The rows of the runs that a round leaves."""
    device, size = left.x.device, reduction.size(left.count)
    factors = torch.empty(len(sums), dtype=torch.float64)
    reduction.native.factors(capsule(sums), capsule(factors), torch.get_num_threads())
    kept = factors.nonzero()[:, 0]
    count = min(len(kept) * size, left.count - int(kept[-1]) * size + (len(kept) - 1) * size)
    rows = torch.empty(count, dtype=torch.int64, device=device)
    weights = torch.empty(count, dtype=torch.float64, device=device)
    keep_runs(replace(left, size=size), kept.to(device), factors[kept].to(device), rows, weights)
    return Runs(left.x, rows, weights)


def _sample(left: Runs, live: int, max_size: int, sum_runs: SumRuns) -> tuple[Tensor, Tensor]:
    """At most `max_size` rows, of weights as even as that allows."""
    x = left.x
    reduction = _Reduction(left, sum_runs)
    if live < left.count:
        left = left.without_zeros()
    w = left.host_weights()
    threads = torch.get_num_threads()
    sampler = native.module().CaratheodorySampler(reduction.native, capsule(w), max_size, threads)
    step = max(1, PIECE_BYTES // (x.shape[1] * x.element_size()))
    for begin in range(0, left.count, step):
        if not sampler.push(capsule(left.points(begin, begin + step))):
            break
    sampler.finish()
    del sampler  # it holds rows
    kept = w.nonzero()[:, 0]
    rows, w = left.host_rows()[kept], w[kept]
    # Among many rows, the heaviest take what the sums lack.
    chosen = w.sort(descending=True, stable=True).indices[: reduction.native.most_runs].sort().values
    on_device = rows.to(x.device)
    points = Runs(x, on_device[chosen.to(x.device)], None).points(0, len(chosen))
    for _ in range(2):
        sums = reduction.of_runs(Runs(x, on_device, w.to(x.device))).sum(0)
        own = w[chosen]
        reduction.native.correct(capsule(points), capsule(own), capsule(sums), threads)
        w[chosen] = own
    return rows, w


def _mean_of_a_few(left: Runs, shrink: float) -> Tensor:
    """The mean [d] float64 of a few rows, on the host."""
    count = min(left.count, _SAMPLE)
    at = torch.arange(count) * left.count // count
    rows = at.to(left.x.device)
    points = left.x.index_select(0, rows if left.rows is None else left.rows[rows]).cpu().double()
    w = torch.ones(count, dtype=torch.float64) if left.weights is None else left.weights[rows].cpu()
    if not w.any():
        w = torch.ones_like(w)
    return (points * shrink * (w / w.sum())[:, None]).sum(0)


def _triangle(left: Runs, w: Tensor) -> Tensor:
    """Points [n, n] float64 on the host with the null vectors of the n rows less their mean: the columns of R in a QR
    factorisation of these rows. Each column of the rows is divided by its largest magnitude; a constant column is 0."""
    n, d = left.count, left.x.shape[1]
    device = left.x.device
    share = (w / w.sum()).to(device)[:, None]
    points = left.x if left.rows is None else left.x.index_select(0, left.rows)
    # At least twice the rows, so that the triangle that each factorisation carries along costs little.
    step = max(2 * n, QR_NUMBERS // n)
    pieces = [(begin, min(begin + step, d)) for begin in range(0, d, step)]
    largest = max(float(points[:, begin:end].abs().amax()) for begin, end in pieces)
    triangle = torch.zeros(0, n, dtype=torch.float64, device=device)
    for begin, end in pieces:
        piece = points[:, begin:end].double() * (_SHRINK if largest > 1e290 else 1.0)
        mean = (share * piece).sum(0)
        piece = piece - mean
        most = piece.abs().amax(0)
        piece = torch.where(most > 4 * _EPS * mean.abs(), piece / most, 0)
        triangle = torch.linalg.qr(torch.cat([triangle, piece.T]), mode="r").R
    return triangle.T.cpu().contiguous()


def _times_power(values: Tensor, exponent: int) -> Tensor:
    """values * 2^exponent, even if the power alone is out of range."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)
