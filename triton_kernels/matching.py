"""What gradient matching computes from many gradients; see csrc/cpu/matching.cpp for the formulas.

The dimensions are taken in chunks. For a chunk

    sieve    A program takes a block of dimensions and a group, and sums the group's updates in float32. A dimension whose mean
             may be above the bar, the least value of those kept so far, by a bound of the rounding errors, joins the candidates.
    weigh    A program takes a block of candidates and sums their updates in float64.

and a stable sort keeps the `top` largest of these sums and of those before. The host reads nothing before the end: bar and
candidates stay on the device, and chunks grow, so that few candidates pass once a bar is known (with random data top ln 2
while they double). A GPU made for games does 64 operations of float32 in the time of one of float64, one made for computing
two; so float64 alone would not do. Some gradients go to `weigh` right away: float64 ones, those without a history, and those
with an eps so tiny that float32 underflows.

A low-rank gradient's entries are made from the generator's words; sums over several directions are made in float64 in the
sieve too, because cancellation in them would exceed its bound.

Cost: B D square roots and quotients, and D ceil(B / ROWS) normal numbers per direction. Memory: 24 bytes per group and
dimension of a chunk, 16 per group and dimension of the list.

Rejected: recomputing a block in float64 on the spot if one of its dimensions passes (a few per cent of the dimensions do, and
with them half of the blocks); the list's selection in a kernel (no sort there is as fast as the library's).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcoreset.directions import STREAM
from flashcoreset.gradients.adam import AdamState
from flashcoreset.matching.problem import Gradients, Updates
from flashcoreset.triton_kernels.pairwise import INTERPRETED
from flashcoreset.triton_kernels.sketch import (
    in_turn,
    normal_pair,
    random_words,
    wait_for_all_but_a_few,
)

DIRECTIONS = tl.constexpr(STREAM)
TERMS = tl.constexpr(16)  # summed in float32 before the sum goes on in float64
# The error of a sum of so many terms and the eight roundings of each, with rounding units of 2^-24.
SLACK = tl.constexpr((16 + 8) * 2.0**-24)
BLOCK = 2048 if INTERPRETED else 128  # dimensions per program
CANDIDATES = 2048 if INTERPRETED else 64  # candidates per program, in float64
WARPS = 4
# Rows at a time. With more rows, more share a normal number, but they take registers.
ROWS = {"rows": 8, "one direction": 16, "directions": 8}
if INTERPRETED:
    ROWS = dict.fromkeys(ROWS, 16)
_FIRST_CHUNK = 1 << 12  # dimensions, or `top`
_CHUNK = 1 << 19  # dimensions times groups
_PRODUCTS = 1 << 34  # of coefficients and directions, or rows' entries, that a launch for the history takes
# Below this eps, underflow in float32 could change u visibly.
_LEAST_EPS_OF_SIEVE = 1e-10


@triton.jit
def direction(first, dims, p, seed_low, seed_high, SCATTERED: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] float32: elements of direction p, at `dims`, or, unless SCATTERED, from `first` on, a multiple of 4."""
    if SCATTERED:
        w0, w1, w2, w3 = random_words(
            dims // 4, p + tl.zeros((1,), tl.int64), seed_low, seed_high, DIRECTIONS
        )
        low = dims % 4 < 2
        x, y = normal_pair(tl.where(low, w0, w2), tl.where(low, w1, w3))
        z = tl.where(dims % 2 == 0, x, y)
    else:
        quads = first // 4 + tl.arange(0, BLOCK // 4)
        w0, w1, w2, w3 = random_words(quads, p + tl.zeros((1,), tl.int64), seed_low, seed_high, DIRECTIONS)
        n0, n1 = normal_pair(w0, w1)
        n2, n3 = normal_pair(w2, w3)
        z = in_turn(n0, n1, n2, n3)
    return z


@triton.jit
def entries(
    g,  # [B, D], or the coefficients [B, q]
    g_stride,
    g_step,
    rows,  # [ROWS] int64
    inside,  # [ROWS]: which of them there are
    first,
    dims,  # [BLOCK] int64
    here,  # [BLOCK]: which of them there are
    z,  # [BLOCK] float32: direction 0
    q,
    seed_low,
    seed_high,
    FORM: tl.constexpr,  # "rows", "one direction" or "directions"
    SCATTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """[ROWS, BLOCK]: entries of gradients, as NUMBER."""
    if FORM == "rows":
        places = rows[:, None] * g_stride + dims[None, :] * g_step
        x = tl.load(g + places, mask=inside[:, None] & here[None, :], other=0.0).to(NUMBER)
    elif FORM == "one direction":
        c = tl.load(g + rows * g_stride, mask=inside, other=0.0).to(NUMBER)
        x = c[:, None] * z.to(NUMBER)[None, :]
    else:
        c = tl.load(g + rows * g_stride, mask=inside, other=0.0).to(tl.float64)
        total = c[:, None] * z.to(tl.float64)[None, :]
        p = tl.full((), 1, tl.int64)
        while p < q:
            c = tl.load(g + rows * g_stride + p * g_step, mask=inside, other=0.0).to(tl.float64)
            more = direction(first, dims, p, seed_low, seed_high, SCATTERED, BLOCK)
            total += c[:, None] * more.to(tl.float64)[None, :]
            p += 1
        x = total.to(NUMBER)
    return x


@triton.jit
def first_direction(
    first, dims, seed_low, seed_high, FORM: tl.constexpr, SCATTERED: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK]: what `entries` takes for z."""
    if FORM == "rows":
        z = tl.zeros((BLOCK,), tl.float32)
    else:
        z = direction(first, dims, tl.full((), 0, tl.int64), seed_low, seed_high, SCATTERED, BLOCK)
    return z


@triton.jit
def updates(
    g,
    g_stride,
    g_step,
    numbers,  # as in sieve_kernel
    member,
    row,  # to `last`: members
    last,
    first,
    dims,
    here,
    z,
    past_m,  # [BLOCK] float64: m_scale m and v_scale v
    past_v,
    u_of,  # [R, top] float64, if WRITES
    top,
    at,  # [BLOCK]: columns of it
    q,
    seed_low,
    seed_high,
    FORM: tl.constexpr,
    HISTORY: tl.constexpr,
    SCATTERED: tl.constexpr,
    WRITES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[ROWS, BLOCK] float64, which add up to the sum of the rows' updates; if WRITES, zeros, and each update goes to its
    place."""
    m_step, v_step, eps = tl.load(numbers + 1), tl.load(numbers + 3), tl.load(numbers + 4)
    totals = tl.zeros((ROWS, BLOCK), tl.float64)
    while row < last:
        own = row + tl.arange(0, ROWS)
        inside = own < last
        rows = tl.load(member + own, mask=inside, other=0)
        x = entries(
            g, g_stride, g_step, rows, inside, first, dims, here, z, q, seed_low, seed_high,
            FORM, SCATTERED, BLOCK, tl.float64,
        )  # fmt: skip
        u = x
        if HISTORY:
            root = tl.sqrt(tl.fma(v_step * x, x, past_v[None, :] + tl.zeros_like(x)))
            u = tl.fma(m_step + tl.zeros_like(x), x, past_m[None, :] + tl.zeros_like(x)) / (root + eps)
        if WRITES:
            place = u_of + own[:, None] * top + at[None, :]
            tl.store(place, u, mask=inside[:, None] & here[None, :])
        else:
            totals += tl.where(inside[:, None], u, 0.0)
        row += ROWS
    return totals


@triton.jit(do_not_specialize=["begin", "count", "groups", "width", "q", "seed_low", "seed_high"])
def sieve_kernel(
    g,
    g_stride,
    g_step,
    m,  # [D]
    v,
    numbers,  # [5] float64: m_scale, m_step, v_scale, v_step, eps
    member,  # [R] int64
    offset,  # [groups + 1] int64
    groups,
    begin,  # the chunk's dimensions, `begin` a multiple of 4
    count,
    width,  # of a row of `values` and `candidates`
    bar,  # [groups] float64
    values,  # [groups, width]: -1 if there is no candidate
    candidates,  # [groups, width] int64
    found,  # [groups] int64, 0 at first: how many candidates
    q,
    seed_low,
    seed_high,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group, start = program % groups, program // groups * BLOCK
    at = start + tl.arange(0, BLOCK)
    here = at < count
    first_dim = begin.to(tl.int64) + start
    dims = begin.to(tl.int64) + at
    m_scale, m_step = tl.load(numbers), tl.load(numbers + 1)
    v_scale, v_step, eps = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    own_v = tl.load(v + dims, mask=here, other=1.0)
    past_m = m_scale.to(tl.float32) * tl.load(m + dims, mask=here, other=0.0)
    past_v = v_scale.to(tl.float32) * own_v
    z = first_direction(first_dim, dims, seed_low, seed_high, FORM, False, BLOCK)
    row, last = tl.load(offset + group), tl.load(offset + group + 1)
    size = (last - row).to(tl.float64)
    # Row by row of a tile, so that no sum goes over warps before the last.
    totals = tl.zeros((ROWS, BLOCK), tl.float64)
    while row < last:
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        flush = tl.minimum(row + TERMS * ROWS, last)
        while row < flush:
            own = row + tl.arange(0, ROWS)
            inside = own < last
            rows = tl.load(member + own, mask=inside, other=0)
            x = entries(
                g, g_stride, g_step, rows, inside, first_dim, dims, here, z, q, seed_low, seed_high,
                FORM, False, BLOCK, tl.float32,
            )  # fmt: skip
            root = tl.sqrt_rn(tl.fma(v_step.to(tl.float32) * x, x, past_v[None, :] + tl.zeros_like(x)))
            above = tl.fma(m_step.to(tl.float32) + tl.zeros_like(x), x, past_m[None, :] + tl.zeros_like(x))
            # A square beyond float32 makes the sum NaN, which passes.
            u = tl.div_rn(above, root + eps.to(tl.float32)) + (root - root)
            sums += tl.where(inside[:, None], u, 0.0)
            row += ROWS
        totals += sums.to(tl.float64)
    total = tl.sum(totals, axis=0)
    # |u| is at most this: the share of g alone plus the share of m alone.
    most = m_step / tl.sqrt(v_step) + tl.abs(past_m.to(tl.float64)) / (tl.sqrt(past_v.to(tl.float64)) + eps)
    below = (tl.abs(total) / size + SLACK * most <= tl.load(bar + group)) & (own_v >= 0)
    passes = here & (below == 0)
    place = tl.cumsum(passes.to(tl.int32), axis=0) - 1
    base = tl.atomic_add(found + group, tl.sum(passes.to(tl.int64), axis=0), sem="relaxed")
    tl.store(candidates + group * width + base + place, dims, mask=passes)
    tl.store(values + group * width + at, tl.full((BLOCK,), -1.0, tl.float64), mask=here)


@triton.jit(do_not_specialize=["begin", "count", "groups", "width", "q", "seed_low", "seed_high"])
def weigh_kernel(
    g,
    g_stride,
    g_step,
    m,
    v,
    numbers,
    member,
    offset,
    groups,
    begin,
    count,
    width,
    values,  # [groups, width]: gets |mean|
    candidates,
    found,
    refused,  # [1] int64: gets the first dimension with a NaN or infinity, or v < 0
    q,
    seed_low,
    seed_high,
    FORM: tl.constexpr,
    HISTORY: tl.constexpr,
    SIEVED: tl.constexpr,  # else all dimensions of the chunk are candidates
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    INFINITY: tl.constexpr = float("inf")
    LAST: tl.constexpr = 2**63 - 1
    program = tl.program_id(0).to(tl.int64)
    group, start = program % groups, program // groups * BLOCK
    at = start + tl.arange(0, BLOCK)
    first_dim = begin.to(tl.int64) + start
    if SIEVED:
        there = tl.load(found + group)
        here = at < there
        dims = tl.load(candidates + group * width + at, mask=here, other=0)
    else:
        there = count.to(tl.int64)
        here = at < there
        dims = begin.to(tl.int64) + at
    m_scale, v_scale = tl.load(numbers), tl.load(numbers + 2)
    own_m = tl.zeros((BLOCK,), tl.float64)
    own_v = tl.full((BLOCK,), 1, tl.float64)
    if HISTORY:
        own_m = tl.load(m + dims, mask=here, other=0.0).to(tl.float64)
        own_v = tl.load(v + dims, mask=here, other=1.0).to(tl.float64)
    past_m, past_v = m_scale * own_m, v_scale * own_v
    row, last = tl.load(offset + group), tl.load(offset + group + 1)
    size = (last - row).to(tl.float64)
    row = tl.where(start < there, row, last)  # most programs have no candidate
    z = tl.zeros((BLOCK,), tl.float32)
    if start < there:
        z = first_direction(first_dim, dims, seed_low, seed_high, FORM, SIEVED, BLOCK)
    totals = updates(
        g, g_stride, g_step, numbers, member, row, last, first_dim, dims, here, z, past_m, past_v, values, 0, at,
        q, seed_low, seed_high, FORM, HISTORY, SIEVED, False, ROWS, BLOCK,
    )  # fmt: skip
    mean = tl.abs(tl.sum(totals, axis=0)) / size
    good = (mean < INFINITY) & (tl.abs(own_m) < INFINITY) & (own_v >= 0) & (own_v < INFINITY)
    first_bad = tl.min(tl.where(here & (good == 0), dims, LAST), axis=0)
    tl.atomic_min(refused, first_bad, mask=first_bad < LAST, sem="relaxed")
    place = values + group * width + (dims - begin.to(tl.int64))
    tl.store(place, tl.where(good, mean, -1.0), mask=here)


@triton.jit(do_not_specialize=["groups", "top", "q", "seed_low", "seed_high"])
def restrict_kernel(
    g,
    g_stride,
    g_step,
    m,
    v,
    numbers,
    member,
    offset,
    groups,
    top,
    dims_of,  # [groups, top] int64
    u_of,  # [R, top] float64
    q,
    seed_low,
    seed_high,
    FORM: tl.constexpr,
    HISTORY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The updates of each group's rows in its dimensions."""
    program = tl.program_id(0).to(tl.int64)
    group, start = program % groups, program // groups * BLOCK
    at = start + tl.arange(0, BLOCK)
    here = at < top
    dims = tl.load(dims_of + group * top + at, mask=here, other=0)
    m_scale, v_scale = tl.load(numbers), tl.load(numbers + 2)
    past_m = tl.zeros((BLOCK,), tl.float64)
    past_v = tl.full((BLOCK,), 1, tl.float64)
    if HISTORY:
        past_m = m_scale * tl.load(m + dims, mask=here, other=0.0).to(tl.float64)
        past_v = v_scale * tl.load(v + dims, mask=here, other=1.0).to(tl.float64)
    z = first_direction(start, dims, seed_low, seed_high, FORM, True, BLOCK)
    row, last = tl.load(offset + group), tl.load(offset + group + 1)
    updates(
        g, g_stride, g_step, numbers, member, row, last, start, dims, here, z, past_m, past_v, u_of, top, at,
        q, seed_low, seed_high, FORM, HISTORY, True, True, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "end", "count", "q", "seed_low", "seed_high"])
def history_kernel(
    g,
    g_stride,
    g_step,
    m,
    v,
    betas,  # [2] float64
    chosen,  # [count] int64
    count,
    begin,  # dimensions [begin, end), `begin` a multiple of 4
    end,
    new_m,
    new_v,
    overflows,  # [1] int32
    q,
    seed_low,
    seed_high,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """new_m = beta1 m + (1 - beta1) mean g and new_v = beta2 v + (1 - beta2) mean g^2 over the rows `chosen`."""
    INFINITY: tl.constexpr = float("inf")
    first_dim = begin.to(tl.int64) + tl.program_id(0).to(tl.int64) * BLOCK
    dims = first_dim + tl.arange(0, BLOCK)
    here = dims < end
    z = first_direction(first_dim, dims, seed_low, seed_high, FORM, False, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float64)
    squares = tl.zeros((ROWS, BLOCK), tl.float64)
    row = tl.full((), 0, tl.int64)
    while row < count:
        own = row + tl.arange(0, ROWS)
        inside = own < count
        rows = tl.load(chosen + own, mask=inside, other=0)
        x = entries(
            g, g_stride, g_step, rows, inside, first_dim, dims, here, z, q, seed_low, seed_high,
            FORM, False, BLOCK, tl.float64,
        )  # fmt: skip
        x = tl.where(inside[:, None], x, 0.0)
        sums += x
        squares += x * x
        row += ROWS
    size = count.to(tl.float64)
    mean, square = tl.sum(sums, axis=0) / size, tl.sum(squares, axis=0) / size
    beta1, beta2 = tl.load(betas), tl.load(betas + 1)
    of_m = beta1 * tl.load(m + dims, mask=here, other=0.0).to(tl.float64) + (1.0 - beta1) * mean
    of_v = beta2 * tl.load(v + dims, mask=here, other=0.0).to(tl.float64) + (1.0 - beta2) * square
    next_m, next_v = of_m.to(new_m.dtype.element_ty), of_v.to(new_v.dtype.element_ty)
    tl.store(new_m + dims, next_m, mask=here)
    tl.store(new_v + dims, next_v, mask=here)
    finite = (tl.abs(next_m) < INFINITY) & (tl.abs(next_v) < INFINITY)
    worst = tl.max((here & (finite == 0)).to(tl.int32), axis=0)
    tl.atomic_max(overflows, worst, mask=worst > 0, sem="relaxed")


@triton.jit(do_not_specialize=["width", "begin", "first", "parts", "seed_low", "seed_high"])
def directions_kernel(
    out,  # [q, width], strides out_stride and out_step
    out_stride,
    out_step,
    width,
    begin,
    first,
    parts,  # programs to a direction
    seed_low,
    seed_high,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, start = program // parts, program % parts * BLOCK
    begin = begin.to(tl.int64)
    skipped = begin % 4
    at = start + tl.arange(0, BLOCK)
    dims = begin - skipped + at
    p = first.to(tl.int64) + row
    z = direction(begin - skipped + start, dims, p, seed_low, seed_high, False, BLOCK)
    column = at - skipped
    inside = (column >= 0) & (column < width)
    tl.store(out + row * out_stride + column * out_step, z.to(out.dtype.element_ty), mask=inside)


def _form(g: Gradients) -> str:
    if g.length is None:
        return "rows"
    return "one direction" if g.values.shape[1] == 1 else "directions"


def _arguments(g: Gradients) -> dict[str, object]:
    form = _form(g)
    return {
        "g": g.values,
        "g_stride": g.values.stride(0),
        "g_step": g.values.stride(1),
        "q": g.values.shape[1],
        "FORM": form,
        "ROWS": ROWS[form],
        **_seed(g.seed),
    }


def _seed(seed: int) -> dict[str, int]:
    # Always signed 32 bits, so that kernels are compiled for one type.
    low, high = (((seed >> shift) + 2**31) % 2**32 - 2**31 for shift in (0, 32))
    return {"seed_low": low, "seed_high": high}


def launch_directions(out: Tensor, seed: int, begin: int, first: int) -> None:
    """Fills out [q, n] with elements begin to begin + n of the directions first to first + q."""
    count, width = out.shape
    parts = triton.cdiv(width + begin % 4, BLOCK)
    with torch.cuda.device_of(out):
        directions_kernel[(count * parts,)](
            out, *out.stride(), width, begin, first, parts, BLOCK=BLOCK, num_warps=WARPS, **_seed(seed)
        )


def chunks(numel: int, groups: int, top: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of parts of the dimensions, each twice as long as the one before until the length is _CHUNK."""
    most = max(_CHUNK // groups, top)
    begin, size = 0, max(_FIRST_CHUNK, top)
    while begin < numel:
        size = -(-min(size, most) // 4) * 4
        yield begin, min(begin + size, numel)
        begin, size = begin + size, 2 * size


def launch_top_updates(problem: Updates) -> tuple[Tensor, Tensor, int]:
    """Returns dims [G, top], u [R, top], and the first dimension that is refused, or 2^63 - 1. Waits for the device."""
    g, history, rule, top = problem.g, problem.history, problem.rule, problem.top
    groups, device = len(problem.offset) - 1, g.values.device
    scales = (rule.m_scale, rule.m_step, rule.v_scale, rule.v_step, rule.eps)
    sieves = history is not None and g.values.dtype != torch.float64 and rule.eps >= _LEAST_EPS_OF_SIEVE
    m, v = (g.values, g.values) if history is None else (history.m, history.v)
    common: dict[str, object] = {
        "m": m,
        "v": v,
        "numbers": torch.tensor(scales, dtype=torch.float64, device=device),
        "member": problem.member,
        "offset": problem.offset,
        "groups": groups,
        "num_warps": WARPS,
        **_arguments(g),
    }
    refused = torch.full((1,), 2**63 - 1, dtype=torch.int64, device=device)
    best = torch.empty(groups, 0, dtype=torch.float64, device=device)
    dims = torch.empty(groups, 0, dtype=torch.int64, device=device)
    bar = torch.full((groups,), -1.0, dtype=torch.float64, device=device)
    waiting: list[torch.cuda.Event] = []
    with torch.cuda.device_of(g.values):
        for begin, end in chunks(g.numel, groups, top):
            count = end - begin
            values = torch.empty(groups, count, dtype=torch.float64, device=device)
            sieved = sieves and begin > 0  # all of the first chunk pass
            candidates = torch.empty(groups, count, dtype=torch.int64, device=device) if sieved else dims
            found = torch.zeros(groups, dtype=torch.int64, device=device)
            part = {"begin": begin, "count": count, "width": count, "values": values, "found": found}
            if sieved:
                grid = (groups * triton.cdiv(count, BLOCK),)
                sieve_kernel[grid](candidates=candidates, bar=bar, BLOCK=BLOCK, **part, **common)
            weigh_kernel[(groups * triton.cdiv(count, CANDIDATES),)](
                BLOCK=CANDIDATES,
                candidates=candidates,
                refused=refused,
                HISTORY=history is not None,
                SIEVED=sieved,
                **part,
                **common,
            )
            # Stable, and the list goes first: if values are equal, the lower dimension stays.
            best, order = torch.cat([best, values], 1).sort(dim=1, descending=True, stable=True)
            own = torch.arange(begin, end, device=device).expand(groups, -1)
            dims = torch.cat([dims, own], 1).gather(1, order[:, :top])
            best = best[:, :top].contiguous()
            bar = best[:, -1].contiguous()
            wait_for_all_but_a_few(waiting, device)
        u = torch.empty(len(problem.member), top, dtype=torch.float64, device=device)
        restrict_kernel[(groups * triton.cdiv(top, BLOCK),)](
            top=top, dims_of=dims, u_of=u, HISTORY=history is not None, BLOCK=BLOCK, **common
        )
    return dims, u, int(refused)


def launch_history(g: Gradients, history: AdamState, chosen: Tensor, new_m: Tensor, new_v: Tensor) -> bool:
    """Writes the history after a step whose gradients are the rows `chosen` to `new_m` and `new_v`; returns whether they
    overflow. Waits for the device."""
    m, v = history.m, history.v
    overflows = torch.zeros(1, dtype=torch.int32, device=m.device)
    both = torch.tensor(history.betas, dtype=torch.float64, device=m.device)
    products = len(chosen) * (1 if g.length is None else g.values.shape[1])
    at_once = max(1, _PRODUCTS // (products * BLOCK)) * BLOCK
    waiting: list[torch.cuda.Event] = []
    with torch.cuda.device_of(m):
        for begin in range(0, g.numel, at_once):
            end = min(begin + at_once, g.numel)
            history_kernel[(triton.cdiv(end - begin, BLOCK),)](
                m=m,
                v=v,
                betas=both,
                chosen=chosen,
                count=len(chosen),
                begin=begin,
                end=end,
                new_m=new_m,
                new_v=new_v,
                overflows=overflows,
                BLOCK=BLOCK,
                num_warps=WARPS,
                **_arguments(g),
            )
            wait_for_all_but_a_few(waiting, m.device)
    return bool(overflows)
