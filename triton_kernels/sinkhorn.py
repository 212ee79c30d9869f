"""Batches of Sinkhorn iterations, from points or from costs; see python/flashcoreset/sinkhorn/reference.py for the
definition.

For each row i of a problem (a column, in the transposed problem: the same kernel with the sides swapped)

    t_ij = (f_i + (g_j + eps log b_j) - C_ij) / eps        S_i = log sum_j exp(t_ij)

by online log-sum-exp over tiles of columns: the largest exponent so far, and the sum under it in float64, scaled when the
largest grows. Costs are computed tile by tile and never stored, or read from a matrix.

In float32 the exponents are formed from potentials that are float64 and enter as two float32 parts each, (high, low), with the
rounding error of f_high - c added back, so that they are off by the rounding of the cost and of the result alone. A weight is
part of its column's potential, which costs no operation per pair, and weights of any size keep their exponents.

A problem whose `state` is not RUNNING is left alone by the kernels of an iteration, so the host launches several
iterations at a time; schedule_kernel decides what comes after each. Errors are summed block by block and the blocks in
order: no atomics, and the same bits each time.

Cost: an iteration is 2 n m (d multiply-adds, about 12 more operations and an exponential); memory (n + m) (d + 6) numbers.

Rejected: exponents shifted by the row's sum of the iteration before, which saves the search for the largest: that bound holds
after f moved, but not at a start, and not when eps has just fallen. Atomics for column sums in the row pass, which would save
half of the costs: Gauss-Seidel order needs f of all rows first. tl.dot for the costs: see pairwise.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcoreset.sinkhorn.problem import Problem
from flashcoreset.sinkhorn.schedule import MOST_EXPONENT, REACH, Schedule, ordered_sums
from flashcoreset.triton_kernels.pairwise import Tile, pair_values

# The stage of a problem: to be iterated; to be evaluated, as it may have converged or as it ends; solved.
RUNNING, CHECKED, STOPPED, DONE = (tl.constexpr(value) for value in range(4))

_FACTOR = tl.constexpr(Schedule.FACTOR)
_STAGE_ERROR = tl.constexpr(Schedule.STAGE_ERROR)
_PERIOD = tl.constexpr(Schedule.PERIOD)
_MOST_OMEGA = tl.constexpr(Schedule.MOST_OMEGA)
_FIRST_SYMMETRIC, _SECOND_SYMMETRIC = (tl.constexpr(omega) for omega in Schedule.SYMMETRIC)
_STALLED, _LUCK = tl.constexpr(Schedule.STALLED), tl.constexpr(Schedule.LUCK)
_WINDOW = tl.constexpr(Schedule.WINDOW)
_RESTS = tl.constexpr(Schedule.RESTS)
_INF = tl.constexpr(math.inf)
_MOST_EXPONENT = tl.constexpr(MOST_EXPONENT)

# Numbers that a program sums at a time.
_SUMMED = tl.constexpr(256)

# Columns of v that a program of apply_kernel multiplies its part of the plan by: the plan is made anew for each group of so
# many columns.
_FEATURES = 16


@triton.jit
def two_parts(value, like):
    """Splits float64 numbers into the nearest of the type of `like`, and the remainder."""
    high = value.to(like.dtype.element_ty)
    return high, (value - high.to(tl.float64)).to(like.dtype.element_ty)


@triton.jit
def allowed(potential, mass):
    """A new potential; if all pairs of its line are forbidden: 0 for a line without weight, and NaN, with which the run ends, for one
    that has weight and no place to go."""
    return tl.where(tl.abs(potential) < _INF, potential, tl.where(mass > 0, float("nan"), 0.0))


@triton.jit
def exponents(
    ours,  # points: the first of ROWS rows in a panel, `our_stride` from feature to feature; precomputed: C_00, rows so far apart
    our_stride,
    others,  # points: the first row of a panel; precomputed: not read
    other_stride,
    high,  # [ROWS] f in two parts
    low,
    other_potential,  # [m] float64
    other_log_weight,  # [m] float64
    first_row,
    first_col,
    n,
    m,
    d,
    eps,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
):
    """t_ij and C_ij [ROWS, COLS]; t is -inf for columns without weight, for forbidden pairs and from m on."""
    if METRIC == "precomputed":
        cols = first_col + tl.arange(0, COLS)
        rows = first_row + tl.arange(0, ROWS)
        places = ours + rows[:, None] * our_stride + cols[None, :] * other_stride
        c = tl.load(places, mask=(rows < n)[:, None] & (cols < m)[None, :], other=0)
        forbidden = c == _INF
        c = tl.where(forbidden, 0.0, c)
    else:
        cols = first_col + tl.max_contiguous(tl.arange(0, COLS), 1)
        c = pair_values(
            ours + first_row, our_stride, others + first_col, other_stride, d, METRIC, ROWS, COLS, ONE_CHAIN
        )
        if METRIC == "cosine":
            c = 1.0 - c
    g = tl.load(other_potential + cols, mask=cols < m, other=-_INF)
    g += eps * tl.load(other_log_weight + cols, mask=cols < m, other=0.0)
    s = high[:, None] - c
    if c.dtype == tl.float32:
        heavy = g > -_INF
        g_high, g_low = two_parts(tl.where(heavy, g, 0.0), ours)
        g_high = tl.where(heavy, g_high, -_INF)
        back = s - high[:, None]
        rounding = (high[:, None] - (s - back)) - (c + back)
        t = (s + g_high[None, :]) + (rounding + (low[:, None] + g_low[None, :]))
    else:
        t = s + g[None, :]
    if METRIC == "precomputed":
        t = tl.where(forbidden, -_INF, t)
    return t * (1.0 / eps).to(c.dtype), c


@triton.jit
def row_sums(
    ours,
    our_stride,
    others,
    other_stride,
    own,  # [ROWS] float64, the rows' potentials
    other_potential,
    other_log_weight,
    first_row,
    n,
    m,
    d,
    eps,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
    COSTS: tl.constexpr,
):
    """most_i = max_j t_ij, sum_j exp(t_ij - most_i) and, with COSTS, sum_j exp(t_ij - most_i) C_ij: [ROWS] float64 each."""
    high, low = two_parts(own, ours)
    most = tl.full((ROWS,), -_INF, ours.dtype.element_ty)
    total = tl.full((ROWS,), 0, tl.float64)
    cost = tl.full((ROWS,), 0, tl.float64)
    first_col = first_row - first_row
    while first_col < m:
        t, c = exponents(
            ours, our_stride, others, other_stride, high, low, other_potential, other_log_weight, first_row, first_col,
            n, m, d, eps, METRIC, ROWS, COLS, ONE_CHAIN,
        )  # fmt: skip
        largest = tl.maximum(most, tl.max(t, axis=1))
        # If no column so far has weight, there is nothing to shift by.
        shift = tl.where(largest == -_INF, 0.0, largest)
        e = tl.exp(t - shift[:, None])
        kept = tl.exp(most - shift).to(tl.float64)
        total = total * kept + tl.sum(e, axis=1).to(tl.float64)
        if COSTS:
            cost = cost * kept + tl.sum(e * c, axis=1).to(tl.float64)
        most = largest
        first_col += COLS
    return most.to(tl.float64), total, cost


@triton.jit
def damping_of(rho, eps):
    """rho / (rho + eps), which is 1 for a balanced marginal, whose rho is infinite."""
    return 1.0 / (1.0 + eps / rho)


@triton.jit
def asked_of(potential, rho, mass):
    """exp(-f / rho), the shares of their weights that potentials ask for; kept below infinity, which a plan may reach too."""
    exponent = tl.where(mass > 0, -potential / rho, 0.0)
    return tl.exp(tl.where(exponent < _MOST_EXPONENT, exponent, _MOST_EXPONENT))


@triton.jit
def expm1_of(x):
    """exp(x) - 1 with the digits of x if x is small (Kahan's way, with the logarithm of the rounded exponential)."""
    e = tl.exp(x)
    plain = e - 1
    log = tl.log(e)
    rounded = (log != 0) & (tl.abs(x) < 1)
    small = plain * (x / tl.where(rounded, log, 1.0))
    return tl.where(e == 1, x, tl.where(rounded, small, plain))


@triton.jit
def log1p_of(x):
    """log(1 + x), likewise."""
    u = 1 + x
    less = u - 1
    inner = (less != 0) & (tl.abs(x) < 1)
    small = tl.log(tl.where(inner, u, 1.0)) * (x / tl.where(inner, less, 1.0))
    return tl.where(less == 0, x, tl.where(inner, small, tl.log(u)))


@triton.jit
def squares_of(error, total):
    """The sum of the squares of errors as shares of the mass `total`: such squares stay in the range of numbers."""
    share = error / total
    return tl.sum(share * share, axis=0)


@triton.jit(do_not_specialize=["size", "other_size", "tiles", "d"])
def half_iteration_kernel(
    ours,  # points: [B, d, our_stride], panels; precomputed: [B, size, other_size] with these strides
    our_batch_stride,
    our_stride,
    others,  # points: such panels; precomputed: not read
    other_batch_stride,
    other_stride,
    our_count,  # [B] int64 rows of each problem
    other_count,  # [B] int64
    potential,  # [B, size] float64, updated
    other_potential,  # [B, other_size] float64
    weight,  # [B, size] float64
    other_log_weight,  # [B, other_size] float64
    off,  # [B, tiles] float64, becomes the error of the marginal, summed up by block
    squares,  # [B, tiles] float64, becomes the sum of its squares as shares of the side's mass likewise; without L2: not touched
    lost,  # [B, tiles] float64, becomes the sums asked for from now on less the weights, likewise; balanced: not touched
    total_of,  # [B] float64, the side's masses; without L2: not read
    eps_of,  # [B] float64
    omega_of,  # [B] float64
    rho_of,  # float64
    constant_of,  # [B] float64: the constant that f has gained and g lost besides
    state,  # [B] int32
    size,
    other_size,
    tiles,
    d,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
    BALANCED: tl.constexpr,
    AFTER: tl.constexpr,
    L2: tl.constexpr,
):
    """f_i <- (1 - omega) f_i + omega lambda (f_i - eps S_i). The marginal is a_i exp(S_i), that of the plan before; with
    AFTER, which columns have, it is that of the plan after, a_i exp(S_i + (new f_i - f_i) / eps). Its error is its difference
    from the marginal that f_i, or the new f_i, asks for: a_i exp(-f_i / rho)."""
    p = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tl.load(state + p) != RUNNING:
        return
    n, m = tl.load(our_count + p), tl.load(other_count + p)
    first_row = tile.to(tl.int64) * ROWS
    if first_row >= n:
        return
    eps, omega, rho = tl.load(eps_of + p), tl.load(omega_of + p), tl.load(rho_of)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < n
    own = tl.load(potential + p * size + rows, mask=inside, other=0.0)
    most, total, _ = row_sums(
        ours + p * our_batch_stride, our_stride, others + p * other_batch_stride, other_stride, own,
        other_potential + p * other_size, other_log_weight + p * other_size, first_row, n, m, d, eps,
        METRIC, ROWS, COLS, ONE_CHAIN, False,
    )  # fmt: skip
    log_sum = most + tl.log(tl.where(total == 0, 1.0, total))  # 0: all pairs are forbidden, and most is -inf
    constant = tl.load(constant_of + p)
    if AFTER:
        constant = -constant
    # Neither the plan nor the sum changes with the constant.
    own += constant
    damp = damping_of(rho, eps)
    mass = tl.load(weight + p * size + rows, mask=inside, other=0.0)
    new = (1 - omega) * (1 - damp) * own + damp * (own - omega * eps * log_sum)
    if METRIC == "precomputed":
        new = allowed(new, mass)
    judged = own
    if AFTER:
        log_sum += (new - own) / eps
        judged = new
    # A weight of 0 gives 0, however large the sum.
    now = mass * tl.exp(tl.where(mass > 0, log_sum, 0.0))
    if BALANCED:
        error = tl.abs(now - mass)
    else:
        error = tl.abs(now - mass * asked_of(judged, rho, mass))
        more = tl.where(mass > 0, mass * expm1_of(tl.where(mass > 0, -new / rho, 0.0)), 0.0)
        tl.store(lost + p * tiles + tile, tl.sum(tl.where(inside, more, 0.0), axis=0))
    tl.store(potential + p * size + rows, new - constant, mask=inside)
    error = tl.where(inside, error, 0.0)
    tl.store(off + p * tiles + tile, tl.sum(error, axis=0))
    if L2:
        tl.store(squares + p * tiles + tile, squares_of(error, tl.load(total_of + p)))


@triton.jit(do_not_specialize=["size", "other_size", "tiles", "d"])
def marginal_kernel(
    ours,  # this and what follows: as in half_iteration_kernel
    our_batch_stride,
    our_stride,
    others,
    other_batch_stride,
    other_stride,
    our_count,
    other_count,
    potential,  # [B, size] float64; updated if the weight is 0
    other_potential,
    weight,
    other_log_weight,
    off,  # [B, tiles] float64, becomes the error of the marginal, summed up by block
    masses,  # [B, tiles] float64, becomes the mass of the marginal likewise
    costs,  # [B, tiles] float64, becomes <P, C> likewise
    squares,  # [B, tiles] float64, as in half_iteration_kernel
    total_of,
    eps_of,  # [B] float64
    rho_of,
    constant_of,
    state,  # [B] int32
    size,
    other_size,
    tiles,
    d,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
    COSTS: tl.constexpr,
    L2: tl.constexpr,
):
    """Computes, for the problems that are to be evaluated: the marginal a_i exp(S_i) of the plan and its difference from a_i
    exp(-f_i / rho); sum_j P_ij C_ij with COSTS, which rows have; and for a_i = 0 the potential that the other side implies,
    f_i = lambda (f_i - eps S_i)."""
    p = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    at = tl.load(state + p)
    if (at != CHECKED) & (at != STOPPED):
        return
    n, m = tl.load(our_count + p), tl.load(other_count + p)
    first_row = tile.to(tl.int64) * ROWS
    if first_row >= n:
        return
    eps = tl.load(eps_of + p)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < n
    own = tl.load(potential + p * size + rows, mask=inside, other=0.0)
    most, total, cost = row_sums(
        ours + p * our_batch_stride, our_stride, others + p * other_batch_stride, other_stride, own,
        other_potential + p * other_size, other_log_weight + p * other_size, first_row, n, m, d, eps,
        METRIC, ROWS, COLS, ONE_CHAIN, COSTS,
    )  # fmt: skip
    rho = tl.load(rho_of)
    log_sum = most + tl.log(tl.where(total == 0, 1.0, total))  # 0: all pairs are forbidden, and most is -inf
    mass = tl.load(weight + p * size + rows, mask=inside, other=0.0)
    heavy = mass > 0
    constant = tl.load(constant_of + p)
    if not COSTS:
        constant = -constant
    own += constant
    now = mass * tl.exp(tl.where(heavy, log_sum, 0.0))
    error = tl.abs(now - mass * asked_of(own, rho, mass))
    tl.store(off + p * tiles + tile, tl.sum(error, axis=0))
    if L2:
        tl.store(squares + p * tiles + tile, squares_of(error, tl.load(total_of + p)))
    implied = damping_of(rho, eps) * (own - eps * log_sum)
    if METRIC == "precomputed":
        implied = allowed(implied, mass)
    tl.store(potential + p * size + rows, implied - constant, mask=inside & (mass == 0))
    tl.store(masses + p * tiles + tile, tl.sum(now, axis=0))
    if COSTS:
        moved = mass * (tl.exp(tl.where(heavy, most, 0.0)) * cost)
        tl.store(costs + p * tiles + tile, tl.sum(moved, axis=0))


@triton.jit(do_not_specialize=["size", "other_size", "tiles", "d", "k"])
def apply_kernel(
    ours,  # this and what follows: as in half_iteration_kernel
    our_batch_stride,
    our_stride,
    others,
    other_batch_stride,
    other_stride,
    our_count,
    other_count,
    potential,
    other_potential,
    weight,
    other_log_weight,
    factor,  # [B, k, other_size], of the points' type
    product,  # [B, size, k] float64
    eps_of,  # [B] float64
    size,
    other_size,
    tiles,
    d,
    k,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """(P v)_ic = a_i sum_j exp(t_ij) v_jc for FEATURES columns c of v, one after the other against each tile of the plan."""
    p = (tl.program_id(0) // tiles).to(tl.int64)
    n, m = tl.load(our_count + p), tl.load(other_count + p)
    first_row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS
    if first_row >= n:
        return
    eps = tl.load(eps_of + p)
    rows = first_row + tl.arange(0, ROWS)
    inside = rows < n
    high, low = two_parts(tl.load(potential + p * size + rows, mask=inside, other=0.0), ours)
    first_feature = tl.program_id(1).to(tl.int64) * FEATURES
    count = tl.minimum(k - first_feature, FEATURES)
    features = tl.arange(0, FEATURES)[None, :]
    sums = tl.full((ROWS, FEATURES), 0, tl.float64)
    first_col = first_row - first_row
    while first_col < m:
        t, _ = exponents(
            ours + p * our_batch_stride, our_stride, others + p * other_batch_stride, other_stride, high, low,
            other_potential + p * other_size, other_log_weight + p * other_size, first_row, first_col, n, m, d, eps,
            METRIC, ROWS, COLS, ONE_CHAIN,
        )  # fmt: skip
        part = tl.exp(t)
        cols = first_col + tl.arange(0, COLS)
        feature = count - count
        while feature < count:
            v = tl.load(
                factor + (p * k + first_feature + feature) * other_size + cols, mask=cols < m, other=0
            )
            added = tl.sum(part * v[None, :], axis=1).to(tl.float64)
            sums += tl.where(features == feature, added[:, None], 0.0)
            feature += 1
        first_col += COLS
    mass = tl.load(weight + p * size + rows, mask=inside, other=0.0)[:, None]
    places = product + (p * size + rows[:, None]) * k + first_feature + features
    tl.store(places, tl.where(mass > 0, mass * sums, 0.0), mask=inside[:, None] & (features < count))


@triton.jit
def sum_of(values, count):
    """The sum of `count` float64 numbers."""
    places = tl.arange(0, _SUMMED)
    sums = tl.full((_SUMMED,), 0, tl.float64)
    while count > 0:
        sums += tl.load(values + places, mask=places < count, other=0.0)
        values += _SUMMED
        count -= _SUMMED
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["row_tiles", "column_tiles", "max_iter"])
def schedule_kernel(
    rows_off,  # [B, row_tiles] float64: errors of the marginals by block
    columns_off,  # [B, column_tiles] float64
    rows_squares,  # [B, row_tiles] float64: of the errors as shares of the sides' masses; without L2: not read
    columns_squares,  # [B, column_tiles] float64
    row_count,  # [B] int64
    column_count,  # [B] int64
    row_tiles,
    column_tiles,
    reg_of,  # float64
    tol_of,  # [B] float64
    max_iter,
    rows_lost,  # [B, row_tiles] float64: the sums that rows ask for less their weights, by block; balanced: not read
    columns_lost,  # [B, column_tiles] float64
    row_rho,  # float64
    column_rho,  # float64
    mass_of,  # [B] float64
    column_mass_of,  # [B] float64
    spread_of,  # [B] float64
    reach_of,  # [B] float64
    accelerated_of,  # [B] int32
    translates_of,  # [B] int32
    stage_iterations_of,  # [B] int64, this and what follows: updated
    trial_stages_of,  # [B] int64
    before_of,  # [B] float64
    least_of,  # [B] float64
    best_least_of,  # [B] float64
    in_window_of,  # [B] int64
    rests_of,  # [B] int64
    ends_of,  # [B] int32
    eps_of,  # [B] float64
    omega_of,  # [B] float64
    base_of,  # [B] float64
    carried,  # [B] float64: the error of the columns that the iteration before left
    carried_l2,  # [B] float64: likewise, in L2; without L2: not touched
    constant_of,  # [B] float64
    iterations_of,  # [B] int64
    in_stage_of,  # [B] int64
    since_of,  # [B] int64
    state,  # [B] int32
    ROWS: tl.constexpr,
    BALANCED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    L2: tl.constexpr,
):
    """Schedule.after of problem p, whose error is that of the rows when the iteration began and of the columns after that (of
    symmetric problems twice that of the rows); and the constant that is best for its new potentials."""
    p = tl.program_id(0).to(tl.int64)
    if tl.load(state + p) != RUNNING:
        return
    error = sum_of(rows_off + p * row_tiles, (tl.load(row_count + p) + ROWS - 1) // ROWS)
    after = error - error
    if SYMMETRIC:
        error += error
    else:
        error += tl.load(carried + p)
        after = sum_of(columns_off + p * column_tiles, (tl.load(column_count + p) + ROWS - 1) // ROWS)
    judged, after_l2 = error, after
    if L2:
        squares = sum_of(rows_squares + p * row_tiles, (tl.load(row_count + p) + ROWS - 1) // ROWS)
        judged = tl.load(mass_of + p) * tl.sqrt(squares)
        if SYMMETRIC:
            judged += judged
        else:
            judged += tl.load(carried_l2 + p)
            squares = sum_of(
                columns_squares + p * column_tiles, (tl.load(column_count + p) + ROWS - 1) // ROWS
            )
            after_l2 = tl.load(column_mass_of + p) * tl.sqrt(squares)
    one = tl.load(omega_of + p) / tl.load(omega_of + p)
    if not BALANCED:
        column_mass, row_mass = tl.load(column_mass_of + p), tl.load(mass_of + p)
        lost_rows = sum_of(rows_lost + p * row_tiles, (tl.load(row_count + p) + ROWS - 1) // ROWS)
        lost_columns = sum_of(columns_lost + p * column_tiles, (tl.load(column_count + p) + ROWS - 1) // ROWS)
        logs = tl.log(row_mass) + log1p_of(lost_rows / row_mass)
        logs -= tl.log(column_mass) + log1p_of(lost_columns / column_mass)
        more = logs / (one / tl.load(row_rho) + one / tl.load(column_rho))
        more = tl.where((more - more == 0) & (tl.load(translates_of + p) != 0), more, 0.0)
        tl.store(constant_of + p, tl.load(constant_of + p) + more)
        added = tl.abs(expm1_of(more / tl.load(column_rho))) * (column_mass + lost_columns)
        after += added
        after_l2 += added
    reg, tol, mass = tl.load(reg_of), tl.load(tol_of + p), tl.load(mass_of + p)
    eps, omega, base = tl.load(eps_of + p), tl.load(omega_of + p), tl.load(base_of + p)
    iterations, in_stage = tl.load(iterations_of + p) + 1, tl.load(in_stage_of + p) + 1
    since = tl.load(since_of + p)

    annealed = eps > reg
    stage_over = (error <= _STAGE_ERROR * mass) | (in_stage >= tl.load(stage_iterations_of + p))
    falls = annealed & stage_over & (iterations < max_iter)
    checks = (eps <= reg) & (judged <= tol) & (tol > 0)
    ends = (iterations >= max_iter) | (error != error) | (tl.load(ends_of + p) != 0)
    goes_on = (falls == 0) & (checks == 0) & (ends == 0)

    reach, trial_stages, before = tl.load(reach_of + p), tl.load(trial_stages_of + p), tl.load(before_of + p)
    tried = goes_on & (trial_stages != 0) & (error > reach) & (max_iter - iterations >= 2 * trial_stages)
    over_relaxed = omega != 1
    still = (since == _PERIOD) & (error >= _STALLED * base)
    still = tl.where(over_relaxed, still, (iterations > 2) & (error >= _STALLED * before))
    stalls = tried & still
    goes_on = goes_on & (stalls == 0)
    tl.store(before_of + p, tl.where(tried & (over_relaxed == 0), error, before))
    tl.store(trial_stages_of + p, tl.where(stalls, 0, trial_stages))
    stage_iterations = tl.load(stage_iterations_of + p)
    tl.store(stage_iterations_of + p, tl.where(stalls, 1, stage_iterations))
    adapts = (tl.load(accelerated_of + p) != 0) & goes_on

    # Schedule._comes_to_rest
    watched = goes_on & (reach > 0)
    in_window, best_least = tl.load(in_window_of + p), tl.load(best_least_of + p)
    least = tl.where(in_window == 0, judged, tl.minimum(judged, tl.load(least_of + p)))
    full = watched & (in_window + 1 >= _WINDOW)
    second = full & (best_least > 0) & (least <= reach) & (least > _LUCK * tol)
    fall = tl.log(tl.where(second, best_least, one) / tl.where(second, least, one))
    wanted = tl.log(tl.where(second, least, one) / tl.where(second, tol, one))
    windows = ((max_iter - iterations) // _WINDOW).to(tl.float64)
    rests = tl.load(rests_of + p)
    counted = tl.where(second & (fall * windows < wanted), rests + 1, 0)
    rests = tl.where(full, counted, rests)
    tl.store(least_of + p, tl.where(watched, least, tl.load(least_of + p)))
    better = full & ((best_least == 0) | (least < best_least))
    tl.store(best_least_of + p, tl.where(falls | stalls, 0.0, tl.where(better, least, best_least)))
    in_window = tl.where(watched, tl.where(full, 0, in_window + 1), in_window)
    tl.store(in_window_of + p, tl.where(falls | stalls, 0, in_window))
    tl.store(rests_of + p, tl.where(falls | stalls, 0, rests))
    at_rest = full & (rests >= _RESTS)
    tl.store(ends_of + p, tl.where(at_rest, 1, tl.load(ends_of + p)))

    # Constants as float64: bare ones would be float32 to where, minimum and maximum.
    early = (since == 0) & (error >= 0.5 * mass)
    due = since == _PERIOD
    measured = due & (base > 0) & (error > 0)
    ratio = tl.where(measured, error, one) / tl.where(measured, base, one)
    rate = tl.where(measured, tl.exp(tl.log(ratio) * (one / _PERIOD)), 0.0)
    over = rate + omega - 1
    plain = tl.minimum(over * over / (tl.where(measured, rate, one) * omega * omega), one * 0.9999)
    better = tl.minimum(tl.maximum(omega, 2 / (1 + tl.sqrt(1 - plain))), one * _MOST_OMEGA)
    changed = tl.where(rate > omega - 1, better, 1 + 0.95 * (omega - 1))
    changed = tl.where(rate >= 1, 1 + 0.7 * (omega - 1), changed)
    new_omega = tl.where(due, changed, omega)
    new_base = tl.where(due | ((since == 0) & (early == 0)), error, base)
    new_since = tl.where(early, 0, tl.where(due, 1, since + 1))

    tl.store(iterations_of + p, iterations)
    new_eps = tl.where(stalls, tl.load(spread_of + p) / _FACTOR, tl.maximum(eps / _FACTOR, reg))
    falls = falls | stalls
    tl.store(in_stage_of + p, tl.where(falls, 0, in_stage))
    tl.store(eps_of + p, tl.where(falls, new_eps, eps))
    if SYMMETRIC:
        plain_omega = 0.5 * one
        first = tl.abs(omega - _FIRST_SYMMETRIC) < 1e-3
        new_omega = tl.where(first, one * _SECOND_SYMMETRIC, one * _FIRST_SYMMETRIC)
        new_omega = tl.where(error >= 0.5 * mass, plain_omega, new_omega)
    else:
        plain_omega = one
    plainly = falls | (iterations + 1 == max_iter) | at_rest
    tl.store(omega_of + p, tl.where(plainly, plain_omega, tl.where(adapts, new_omega, omega)))
    tl.store(since_of + p, tl.where(falls, 0, tl.where(adapts, new_since, since)))
    tl.store(base_of + p, tl.where(adapts, new_base, base))
    tl.store(carried + p, tl.where(falls, 0.0, after))
    if L2:
        tl.store(carried_l2 + p, tl.where(falls, 0.0, after_l2))
    ended = tl.where(ends, STOPPED, RUNNING)
    tl.store(state + p, tl.where(falls, RUNNING, tl.where(checks, CHECKED, ended)))


def tile_of(dtype: torch.dtype, d: int, metric: str) -> Tile:
    """The tile for points; for a matrix half the rows, since all of a tile's loads are under way at once, each with a register
    for its address too. (8 rows of float32 are a sector of memory if the matrix is read from its columns' side.)"""
    tile = Tile.of(dtype, d)
    return replace(tile, rows=tile.rows // 2) if metric == "precomputed" else tile


@dataclass(frozen=True)
class Side:
    """The rows of all problems, or their columns."""

    data: Tensor  # points: panels [B, d, stride]; precomputed: the costs [B, n, m]
    batch_stride: int
    stride: int  # from feature to feature; precomputed: from row to row, or from column to column
    count: Tensor  # [B] int64
    potential: Tensor  # [B, size] float64
    weight: Tensor  # [B, size] float64
    log_weight: Tensor  # [B, size] float64

    @property
    def size(self) -> int:
        return self.weight.shape[1]


class Batch:
    """A batch of problems as the kernels take it.

    Args:
        x: [B, n, d] points with `y` [B, m, d], of unit length for cosine, their padding finite; or costs [B, n, m] with
            `y` None.
        metric: "sqeuclidean", "euclidean", "l1", "cosine" or "precomputed".
        counts: [B] int64, the problems' rows, and their columns.
        potentials, weights: [B, n] and [B, m] float64, contiguous.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        metric: str,
        counts: tuple[Tensor, Tensor],
        potentials: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
    ) -> None:
        self.metric = metric
        self.d = 0 if y is None else x.shape[2]
        self.tile = tile_of(x.dtype, self.d, metric)
        if y is None:
            places = [(x, x.stride(0), stride) for stride in x.stride()[1:]]
        else:
            panels = [_panels(points, self.tile) for points in (x, y)]
            places = [(panel, panel.stride(0), panel.stride(1)) for panel in panels]
        self.sides = [
            Side(*place, count, potential, weight, weight.log())
            for place, count, potential, weight in zip(places, counts, potentials, weights, strict=True)
        ]

    def tiles(self, side: int) -> int:
        """The number of blocks of rows (side 0) or of columns (side 1) of the largest problem that there may be."""
        return triton.cdiv(self.sides[side].size, self.tile.rows)

    def launch(
        self,
        kernel: Any,
        side: int,
        tensors: tuple[Tensor, ...],
        *more: int,
        groups: int = 1,
        **constants: Any,
    ) -> None:
        """Launches `kernel` for the blocks of one side, over the other; `groups` programs per block."""
        ours, others = self.sides[side], self.sides[1 - side]
        batch, tiles = ours.weight.shape[0], self.tiles(side)
        with torch.cuda.device_of(ours.data):
            kernel[(batch * tiles, groups)](
                ours.data,
                ours.batch_stride,
                ours.stride,
                others.data,
                others.batch_stride,
                others.stride,
                ours.count,
                others.count,
                ours.potential,
                others.potential,
                ours.weight,
                others.log_weight,
                *tensors,
                ours.size,
                others.size,
                tiles,
                self.d,
                *more,
                METRIC=self.metric,
                ROWS=self.tile.rows,
                COLS=self.tile.cols,
                ONE_CHAIN=self.tile.one_chain,
                num_warps=self.tile.warps,
                **constants,
            )

    def apply(self, v: Tensor, reg: float, transpose: bool) -> Tensor:
        """P v [B, n, k] float64 for v [B, m, k] of the points' type, P^T v if `transpose`; 0 in the padding."""
        side = 1 if transpose else 0
        batch, _, k = v.shape
        weight = self.sides[side].weight
        product = weight.new_zeros(batch, weight.shape[1], k)
        factor = v.mT.contiguous()
        features = min(_FEATURES, triton.next_power_of_2(k))
        tensors = (factor, product, weight.new_full((batch,), reg))
        self.launch(
            apply_kernel, side, tensors, k, groups=triton.cdiv(k, features), FEATURES=features
        )  # fmt: skip
        return product


def _panels(points: Tensor, tile: Tile) -> Tensor:
    """[B, n, d] feature by feature, as [B, d, n rounded up to whole tiles]; zeros fill it up."""
    batch, n, d = points.shape
    size = max(tile.rows, tile.cols)
    packed = points.new_zeros(batch, d, -(-n // size) * size)
    packed[:, :, :n] = points.mT
    return packed


class Run:
    """The iterations of a batch: their state, on the device.

    Args:
        batch: the problems; their potentials are the start, and the result.
        problem: the options, and whether a start was given.
        spread: [B] float64, a bound of the range of each problem's costs.
    """

    def __init__(self, batch: Batch, problem: Problem, spread: Tensor) -> None:
        reg, rho, tol, max_iter = problem.reg, (problem.rho_a, problem.rho_b), problem.tol, problem.max_iter
        self._batch, self._max_iter = batch, max_iter
        self._balanced, self._symmetric, self._l2 = problem.balanced, problem.symmetric, problem.l2
        weight = batch.sides[0].weight
        count, device = weight.shape[0], weight.device
        self._reg, *self._rho = torch.tensor([reg, *rho], dtype=torch.float64, device=device).unbind()
        self._regs = weight.new_full((count,), reg)

        quotient = spread / reg
        logs = torch.where(quotient < math.inf, quotient.log(), spread.log() - math.log(reg))
        stages = (logs / math.log(Schedule.FACTOR)).ceil() - 1
        finite = torch.isfinite(spread)
        anneals = (spread > Schedule.ANNEALED_FROM * reg) & finite & (2 * stages <= max_iter)
        trial_stages = torch.where((spread > Schedule.REANNEALED_FROM * reg) & finite, stages, 0).long()
        if problem.f is not None or problem.symmetric:
            anneals = torch.zeros_like(anneals)
        if problem.f is None or problem.symmetric or tol == 0:
            trial_stages = torch.zeros_like(trial_stages)
        self._spread, self._trial_stages = spread.double().contiguous(), trial_stages
        share = max_iter // (2 * torch.where(anneals, stages, 1)).long()
        self._stage_iterations = share.clamp(max=Schedule.STAGE_ITERATIONS)
        accelerated = anneals | (tol > 0)
        self._accelerated = accelerated.int()
        columns_hold = math.isinf(rho[1])
        translated = not (self._balanced or self._symmetric)
        self._translates = (accelerated | columns_hold).int() * translated
        self._masses = [ordered_sums(side.weight) for side in batch.sides]
        # As Schedule has it, for each problem.
        whole = torch.maximum(*self._masses)
        if math.isinf(rho[0]) != math.isinf(rho[1]):
            whole = self._masses[0 if math.isinf(rho[0]) else 1]
        self.tolerance = (max(tol, Schedule.LEAST_SHARE) * whole).clamp(max=tol)
        reach = REACH[batch.sides[0].data.dtype] * whole
        self._reach = torch.where((self.tolerance > 0) & (self.tolerance < reach), reach, 0.0)
        self._eps = torch.where(anneals, spread / Schedule.FACTOR, reg)
        self._plain_omega = 0.5 if problem.symmetric else 1.0
        self._omega = torch.full_like(self._eps, self._plain_omega)
        self._base = torch.zeros_like(self._eps)
        self._carried, self.constant = torch.zeros_like(self._eps), torch.zeros_like(self._eps)
        self._carried_l2 = torch.zeros_like(self._eps)
        self._before, self._least, self._best_least = weight.new_zeros(3, count).unbind()
        self.iterations, self._in_stage, self._since, self._in_window, self._rests, self._checks = (
            torch.zeros(6, count, dtype=torch.int64, device=device).unbind()
        )
        self._state, self._ends = torch.zeros(2, count, dtype=torch.int32, device=device).unbind()
        # By side: errors of the marginal; its mass and <P, C> in the rows of the others; the sums that it asks for less its
        # weights; squares of the errors as shares. Blocks beyond a problem's size stay 0.
        self._sums = [weight.new_zeros(5, count, batch.tiles(side)) for side in (0, 1)]
        self.error, self.mass, self.cost = weight.new_zeros(3, count).unbind()

    def potentials(self) -> list[Tensor]:
        """f [B, n] and g [B, m], with the constant that they have gained and lost besides."""
        return [
            torch.where(
                torch.arange(side.size, device=constant.device) < side.count[:, None],
                side.potential + constant[:, None],
                side.potential,
            )
            for side, constant in zip(self._batch.sides, (self.constant, -self.constant), strict=True)
        ]

    def look(self) -> tuple[list[int], list[int]]:
        """The state of each problem, and its iterations. Waits for the device."""
        state, iterations = torch.stack((self._state.long(), self.iterations)).tolist()
        return state, iterations

    def iterate(self, count: int) -> None:
        """Up to `count` iterations of each problem that is running."""
        for _ in range(count):
            for side in (0,) if self._symmetric else (0, 1):
                tensors = (
                    self._sums[side][0],
                    self._sums[side][4],
                    self._sums[side][3],
                    self._masses[side],
                    self._eps,
                    self._omega,
                    self._rho[side],
                    self.constant,
                    self._state,
                )
                self._batch.launch(
                    half_iteration_kernel,
                    side,
                    tensors,
                    BALANCED=self._balanced,
                    AFTER=side == 1,
                    L2=self._l2,
                )
            if self._symmetric:
                rows, columns = (side.potential for side in self._batch.sides)
                torch.where((self._state == RUNNING.value)[:, None], rows, columns, out=columns)
            self._after_iteration()

    def _after_iteration(self) -> None:
        """Decides what comes next for each problem that is running, by the errors in `_sums`."""
        rows, columns = self._batch.sides
        with torch.cuda.device_of(self._eps):
            schedule_kernel[(len(self._eps),)](
                self._sums[0][0],
                self._sums[1][0],
                self._sums[0][4],
                self._sums[1][4],
                rows.count,
                columns.count,
                self._batch.tiles(0),
                self._batch.tiles(1),
                self._reg,
                self.tolerance,
                self._max_iter,
                self._sums[0][3],
                self._sums[1][3],
                *self._rho,
                *self._masses,
                self._spread,
                self._reach,
                self._accelerated,
                self._translates,
                self._stage_iterations,
                self._trial_stages,
                self._before,
                self._least,
                self._best_least,
                self._in_window,
                self._rests,
                self._ends,
                self._eps,
                self._omega,
                self._base,
                self._carried,
                self._carried_l2,
                self.constant,
                self.iterations,
                self._in_stage,
                self._since,
                self._state,
                ROWS=self._batch.tile.rows,
                BALANCED=self._balanced,
                SYMMETRIC=self._symmetric,
                L2=self._l2,
                num_warps=1,
            )

    def evaluate(self) -> None:
        """Evaluates the plans of the problems that may have converged or have ended: their errors, masses and costs, and the
        potentials that zero weights have. Problems that did not converge after all go on, with plain iterations."""
        for side in (0, 1):
            off, mass, cost, _, squares = self._sums[side]
            tensors = (off, mass, cost, squares, self._masses[side])
            self._batch.launch(
                marginal_kernel,
                side,
                (*tensors, self._regs, self._rho[side], self.constant, self._state),
                COSTS=side == 0,
                L2=self._l2,
            )
        checked = self._state == CHECKED.value
        evaluated = checked | (self._state == STOPPED.value)
        (rows_off, mass, cost, _, row_squares), (columns_off, _, _, _, column_squares) = map(
            ordered_sums, self._sums
        )
        if self._l2:
            rows_off, columns_off = (
                self._masses[0] * row_squares.sqrt(),
                self._masses[1] * column_squares.sqrt(),
            )
        for kept, value in ((self.error, rows_off + columns_off), (self.mass, mass), (self.cost, cost)):
            torch.where(evaluated, value, kept, out=kept)
        failed = checked & ~(self.error <= self.tolerance)
        hopeless = (self.error <= self._reach) & (self.error > Schedule.LUCK * self.tolerance)
        self._checks += failed & hopeless
        self._ends |= self._checks >= Schedule.CHECKS
        goes_on = failed & (self.iterations < self._max_iter) & (self._ends == 0)
        self._omega.masked_fill_(goes_on, self._plain_omega)
        self._since.masked_fill_(goes_on, 0)
        self._state.masked_fill_(evaluated, DONE.value).masked_fill_(goes_on, RUNNING.value)
