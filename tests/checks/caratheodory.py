"""What every backend of the Carathéodory reduction is held to."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICE, to_cpu
from torch import Tensor

import flashcoreset as fc
from flashcoreset.kernels import CaratheodoryProblem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# The largest error, as a share of the sums of magnitudes. Worst seen for float64: 9e-15 (d = 1,000); float32 weights are
# rounded by up to 6e-8.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 7e-8}


def random(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reduce(x: Any, weights: Any = None, max_size: Any = None, *, backend: str) -> fc.Selection:
    """fc.caratheodory of tensors on the backend's device, its result on the CPU."""
    device = DEVICE if backend in ("cuda", "triton") else "cpu"
    if isinstance(x, np.ndarray) and device != "cpu":
        x = torch.tensor(x)
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in (x, weights)]
    return to_cpu(fc.caratheodory(*moved, max_size, backend=backend))


def exact_sums(x: np.ndarray, w: np.ndarray) -> list[float]:
    """The sums of w_i (1, x_i), each rounded once."""
    ones = np.concatenate([np.ones((len(x), 1)), x], 1)
    if len(x) > 200:
        return [math.fsum((w * column).tolist()) for column in ones.T]
    return [
        float(sum((Fraction(a) * Fraction(b) for a, b in zip(w, c, strict=True)), Fraction(0)))
        for c in ones.T
    ]


def check(subset: fc.Selection, x: Tensor, weights: Tensor | None = None, rank: int | None = None) -> None:
    """Rows ascending and positive, no more than rank + 1, and the sums of all."""
    n, d = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    indices, k = subset.indices, len(subset.indices)
    assert indices.dtype == torch.int64
    assert (indices.diff() > 0).all()
    assert 0 <= int(indices[0]) <= int(indices[-1]) < n
    assert subset.weights.dtype == subset.gains.dtype == dtype
    assert (subset.weights > 0).all()
    assert subset.assignment.tolist() == [-1] * n
    assert k <= (min(n, d + 1) if rank is None else rank + 1)
    w = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    assert (w[indices] > 0).all()
    points = x.double().numpy()
    got = exact_sums(points[indices.numpy()], subset.weights.double().numpy())
    wanted = exact_sums(points, w.numpy())
    sizes = exact_sums(np.abs(points), w.numpy())
    for a, b, size in zip(got, wanted, sizes, strict=True):
        assert abs(a - b) <= TOLERANCE[dtype] * size, (a, b, size)


def check_keeps_the_sums(backend: str, n: int, d: int, dtype: torch.dtype) -> None:
    x = random(n, d, n + d).to(dtype)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for w in (None, weights):
        subset = reduce(x, w, backend=backend)
        check(subset, x, w)
        if n > d + 1 and dtype == torch.float64:
            assert len(subset.indices) == d + 1  # points in general position need all of them


def check_a_case_worked_by_hand(backend: str) -> None:
    # Any two of the numbers on both sides of the mean 2.75 are right, with the weights of a balance.
    x = torch.tensor([[5.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    subset = reduce(x, backend=backend)
    (a, b), (wa, wb) = x[subset.indices, 0].tolist(), subset.weights.tolist()
    assert (wa, wb) == pytest.approx((4 * (2.75 - b) / (a - b), 4 * (2.75 - a) / (b - a)))
    assert reduce(x[:1], backend=backend).weights.tolist() == [1.0]
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    subset = reduce(corners, torch.tensor([1, 2, 3]), backend=backend)
    assert subset.indices.tolist() == [0, 1, 2]
    assert subset.weights.tolist() == [1.0, 2.0, 3.0]


def check_rank_deficient_rows(backend: str, d: int) -> None:
    for rank in (1, 2):
        x = random(500, rank, 1) @ random(rank, d, 2) + 3
        check(reduce(x, backend=backend), x, rank=rank)
    wide = random(60, 4, 3) @ random(4, 300, 4)
    check(reduce(wide, backend=backend), wide, rank=4)


def check_duplicates_and_constants(backend: str) -> None:
    five = random(5, 9)[torch.randint(0, 5, (400,), generator=torch.Generator().manual_seed(0))]
    check(reduce(five, backend=backend), five, rank=4)
    check(reduce(random(5, 900).repeat(4, 1), backend=backend), random(5, 900).repeat(4, 1), rank=4)
    for value in (0.0, 0.1, -1e300):
        same = torch.full((300, 3), value, dtype=torch.float64)
        subset = reduce(same, backend=backend)
        check(subset, same, rank=0)
        assert subset.weights.tolist() == pytest.approx([300.0])
    binary = (random(800, 12) > 0).double()
    check(reduce(binary, backend=backend), binary)


def check_rows_of_weight_zero_are_not_taken(backend: str) -> None:
    x = random(900, 5)
    weights = torch.rand(900, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[::2] = 0
    check(reduce(x, weights, backend=backend), x, weights)
    weights[:] = 0
    weights[7] = 2.5
    subset = reduce(x, weights, backend=backend)
    assert (subset.indices.tolist(), subset.weights.tolist()) == ([7], [2.5])


def check_size_of_the_weights_does_not_matter(backend: str, size: float) -> None:
    x = random(300, 4)
    plain = reduce(x, backend=backend)
    scaled = reduce(x, torch.full((300,), size, dtype=torch.float64), backend=backend)
    assert scaled.weights.sum().item() == pytest.approx(300 * size, rel=1e-13)
    assert (scaled.weights @ x[scaled.indices] / size).tolist() == pytest.approx(x.sum(0).tolist(), abs=1e-10)
    assert len(plain.indices) == len(scaled.indices) == 5


def check_columns_of_any_size_and_offset(backend: str) -> None:
    x = random(2000, 8)
    for points in (
        x * torch.logspace(-150, 150, 8, dtype=torch.float64),
        x * torch.logspace(-3, 3, 8, dtype=torch.float64) + torch.logspace(9, 0, 8, dtype=torch.float64),
        torch.exp(10 * x),
        torch.cat([x, x + 1e-7 * random(2000, 8, 1)], 1),
        x.sort(0).values,
    ):
        check(reduce(points, backend=backend), points)
    # With an offset the differences from the mean are kept too, as far as the numbers hold them: 1e-8 / 2^53.
    moved = x + 1e8
    subset = reduce(moved, backend=backend)
    centred = moved - 1e8  # exact
    short = subset.weights @ centred[subset.indices] - centred.sum(0)
    assert (short.abs() <= 1e-7 * centred.abs().sum(0)).all()
    if backend != "torch":
        assert (short.abs() <= 1e-12 * centred.abs().sum(0)).all()


def check_weights_of_very_different_size(backend: str) -> None:
    x = random(1500, 6)
    for spread in (3, 30):
        weights = torch.exp(spread * random(1500, 1, 1)[:, 0])
        check(reduce(x, weights, backend=backend), x, weights)


def check_huge_numbers(backend: str) -> None:
    x = (random(500, 3) * 1e308).clamp(-1.7e308, 1.7e308)
    for max_size in (None, 50):
        subset = reduce(x, None, max_size, backend=backend)
        check(subset, x * 2.0**-60, rank=(max_size or 4) - 1)
    wide = x.T.contiguous().repeat(1, 2)
    assert reduce(wide.repeat(5, 1), backend=backend).weights.tolist() == pytest.approx([5.0] * 3)


def check_sums_that_overflow_later(backend: str) -> None:
    """The sum of all rows is finite, but that of the few that are left, with their larger weights, would not be."""
    x = random(200, 4) * 1e307
    for seed in (2, 16, 29):
        weights = torch.rand(200, generator=torch.Generator().manual_seed(seed)).double()
        for max_size in (None, 5):
            check(reduce(x, weights, max_size, backend=backend), x * 2.0**-60, weights, rank=4)


def check_max_size_ends_the_reduction(backend: str, n: int) -> None:
    x = random(n, 6, n)
    for max_size in (7, 8, 31, n - 1):
        subset = reduce(x, None, max_size, backend=backend)
        assert len(subset.indices) == max_size  # rows in general position leave one at a time
        check_sums_only(subset, x)
    for max_size in (n, n + 5):
        subset = reduce(x, max_size=max_size, backend=backend)
        assert subset.indices.tolist() == list(range(n))
        assert subset.weights.tolist() == [1.0] * n


def check_weights_are_even_where_there_is_room(backend: str) -> None:
    n, d, k = 600, 3, 60
    x = random(n, d)
    subset = reduce(x, max_size=k, backend=backend)
    even = n / (k - d - 1)
    assert float(subset.weights.max()) <= even * (1 + 1e-12)
    # Beside the rows at the bound there are at most d + 1 in the end, and as many that were moved when k rows were reached.
    assert int(((subset.weights - even).abs() > 1e-9 * even).sum()) <= 2 * (d + 1)
    weights = torch.ones(n, dtype=torch.float64)
    weights[:5] = 300.0  # above the bound: they stay as they are
    subset = reduce(x, weights, k, backend=backend)
    assert subset.indices[:5].tolist() == [0, 1, 2, 3, 4]
    assert subset.weights[:5].tolist() == pytest.approx([300.0] * 5, rel=1e-12)


def check_sums_only(subset: fc.Selection, x: Tensor) -> None:
    assert (subset.weights > 0).all()
    got = subset.weights @ x[subset.indices]
    assert ((got - x.sum(0)).abs() <= 1e-13 * x.abs().sum(0)).all()
    assert subset.weights.sum().item() == pytest.approx(len(x), rel=1e-13)


def check_max_size_below_the_rank(backend: str) -> None:
    x = random(50, 3)
    with pytest.raises(
        ValueError, match=r"max_size must be >= 4, to which these rows can be reduced .* got 3"
    ):
        reduce(x, max_size=3, backend=backend)
    line = torch.arange(50, dtype=torch.float64)[:, None] * random(1, 3)
    assert len(reduce(line, max_size=2, backend=backend).indices) == 2
    with pytest.raises(ValueError, match="max_size must be >= 2"):
        reduce(line, max_size=1, backend=backend)


def check_half_types(backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = random(700, 5).to(dtype)
        narrow, wide = reduce(x, backend=backend), reduce(x.double(), backend=backend)
        assert torch.equal(narrow.indices, wide.indices)
        assert torch.equal(narrow.weights, wide.weights.float())


def check_views_and_inputs_of_other_libraries(backend: str) -> None:
    x = random(400, 6)
    plain = reduce(x[::2, ::3].contiguous(), backend=backend)
    for view in (x[::2, ::3], x.T.contiguous().T[::2, ::3], x.flip(0).flip(0)[::2, ::3]):
        found = reduce(view, backend=backend)
        assert torch.equal(found.indices, plain.indices)
        assert torch.equal(found.weights, plain.weights)
    array = x.numpy().copy()
    array.flags.writeable = False
    by_list = reduce(array, [1] * 400, backend=backend)
    assert torch.equal(by_list.indices, reduce(x.requires_grad_(), backend=backend).indices)


def check_memory(module: ModuleType, device: str) -> None:
    x = random(300, 4).to(device)
    out = (
        torch.empty(5, dtype=torch.int64, device=device),
        torch.empty(5, dtype=torch.float64, device=device),
    )
    indices, weights = module.caratheodory(CaratheodoryProblem(x), out)
    assert indices.data_ptr() == out[0].data_ptr()
    assert weights.data_ptr() == out[1].data_ptr()
    assert torch.equal(indices, module.caratheodory(CaratheodoryProblem(x))[0])


def check_op(backend: str, device: str) -> None:
    op = torch.ops.flashcoreset.caratheodory.default
    x = random(80, 3).to(device)
    torch.library.opcheck(op, (x.half(), torch.ones_like(x[:, 0]), 10, backend))


X = random(6, 2)


def spoiled(value: float) -> Tensor:
    x = X.clone()
    x[4, 1] = value
    return x


BAD: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "x int": (X.int(), None, None, TypeError, "x must have dtype .* got int32"),
    "x text": ("rows", None, None, TypeError, "x must be"),
    "x 1-d": (X[0], None, None, ValueError, r"x must have 2 dimensions, got shape \(2,\)"),
    "x empty": (X[:0], None, None, ValueError, "x must have at least 1 row"),
    "x NaN": (spoiled(math.nan), None, None, ValueError, "x must be finite, got NaN at row 4, column 1"),
    "x inf": (spoiled(-math.inf), None, None, ValueError, "x must be finite, got -inf at row 4, column 1"),
    "weights short": (X, [1.0] * 5, None, ValueError, r"weights must have shape \[6\], got \(5,\)"),
    "weights text": (X, ["a"] * 6, None, TypeError, "weights must hold real numbers"),
    "weights < 0": (
        X,
        [1, 1, -1, 1, 1, 1],
        None,
        ValueError,
        "weights must be finite and >= 0, got -1.0 at position 2",
    ),
    "weights NaN": (
        X,
        [1, math.nan, 1, 1, 1, 1],
        None,
        ValueError,
        "weights must be finite and >= 0, got nan",
    ),
    "weights 0": (X, [0] * 6, None, ValueError, "weights must not all be 0"),
    "max_size 0": (X, None, 0, ValueError, "max_size must be >= 1, got 0"),
    "max_size float": (X, None, 2.0, TypeError, "max_size must be an int"),
    "max_size huge": (X, None, 2**63, ValueError, "max_size must be in the range of 64-bit integers"),
}


def check_bad_input(backend: str, name: str) -> None:
    x, weights, max_size, error, words = BAD[name]
    with pytest.raises(error, match=words):
        reduce(x, weights, max_size, backend=backend)


def check_nan_where_the_weight_is_zero(backend: str) -> None:
    with pytest.raises(ValueError, match="x must be finite, got NaN at row 4, column 1"):
        reduce(spoiled(math.nan), [1, 1, 1, 1, 0, 1], backend=backend)
    wide = torch.cat([spoiled(math.nan)] * 9, 1)
    with pytest.raises(ValueError, match="x must be finite, got NaN at row 4, column 1"):
        reduce(wide, backend=backend)


Check = Callable[[str], None]


def check_driver(backend: str, n: int) -> None:
    """Several rounds on the device, most rows of weight 0, and rows that the host gets piece by piece."""
    d = 6
    x = (random(n, d) * torch.logspace(-3, 3, d, dtype=torch.float64) + 5).float().double()
    few = torch.zeros(n, dtype=torch.float64)
    few[::3] = torch.rand(len(few[::3]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for weights in (None, few):
        subset = reduce(x, weights, backend=backend)
        check(subset, x, weights)
        assert len(subset.indices) == d + 1
        spread = reduce(x, weights, 300, backend=backend)
        check(spread, x, weights, rank=299)
        even = (n if weights is None else float(weights.sum())) / (300 - d - 1)
        assert float(spread.weights.max()) <= even * (1 + 1e-12)


def check_matching(backend: str) -> None:
    device = DEVICE if backend in ("cuda", "triton") else "cpu"
    g = random(60, 5).to(device)
    found = fc.match_gradients(g, 6, method="caratheodory", backend=backend)
    assert len(found.indices) <= 6
    left = found.weights @ g[found.indices] - g.sum(0)
    assert float(left.abs().max()) < 1e-12 * float(g.abs().sum())
    groups = (torch.arange(60) % 2).to(device)
    found = fc.match_gradients(
        g, None, method="caratheodory", groups=groups, budgets=[6, 20], backend=backend
    )
    left = found.weights @ g[found.indices] - g.sum(0)
    assert len(found.indices) == 26
    assert float(left.abs().max()) < 1e-12 * float(g.abs().sum())
    low_rank = fc.LowRankGradients(random(60, 2).to(device), seed=0, numel=900, backend=backend)
    found = fc.match_gradients(low_rank, 3, method="caratheodory", backend=backend)
    rows = low_rank.dense()
    left = found.weights @ rows[found.indices] - rows.sum(0)
    assert len(found.indices) == 3
    assert float(left.abs().max()) < 1e-12 * float(rows.abs().sum())


def checks_of(sizes: list[tuple[int, int]], thorough: bool = False) -> list[Any]:
    """The checks above, each to be called with the name of a backend; `sizes` are the sizes of the first check's rows. `thorough` adds
    cases that take too long for the kernels of a device."""
    checks: list[Check] = [
        check_a_case_worked_by_hand,
        check_duplicates_and_constants,
        check_rows_of_weight_zero_are_not_taken,
        check_columns_of_any_size_and_offset,
        check_weights_of_very_different_size,
        check_huge_numbers,
        check_sums_that_overflow_later,
        check_weights_are_even_where_there_is_room,
        check_max_size_below_the_rank,
        check_half_types,
        check_views_and_inputs_of_other_libraries,
        check_nan_where_the_weight_is_zero,
    ]
    named: list[tuple[Callable[..., None], dict[str, Any]]] = [
        *((check_keeps_the_sums, {"n": n, "d": d, "dtype": dtype}) for n, d in sizes for dtype in DTYPES),
        *((check_rank_deficient_rows, {"d": d}) for d in (3, 20)),
        *(
            (check_size_of_the_weights_does_not_matter, {"size": size})
            for size in ((1e-300, 1e-20, 1e20, 1e300) if thorough else (1e-300, 1e300))
        ),
        *(
            (check_max_size_ends_the_reduction, {"n": n})
            for n in ((40, 700, 5000) if thorough else (40, 700))
        ),
        *((check_bad_input, {"name": name}) for name in BAD),
        *((check, {}) for check in checks),
    ]
    return [
        pytest.param(
            functools.partial(check, **arguments),
            id="-".join([check.__name__.split("_", 1)[1], *map(str, arguments.values())]),
        )
        for check, arguments in named
    ]
