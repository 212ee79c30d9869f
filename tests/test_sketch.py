"""Random projections against their definition, across backends, builds, chunkings and releases."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import DEVICE, on_device
from checks.sketch import (
    CHOICE_SIZES,
    CHOICES,
    DTYPES,
    ERROR,
    FEW_SIZES,
    KINDS,
    NORMAL,
    SIZES,
    check_close,
    check_matrix,
    check_product,
    check_stays,
    rows,
)
from conftest import BACKENDS, EVERY_BACKEND, GPU_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset._core.philox import philox4x32
from flashcoreset.sketch.chosen import choose_columns
from flashcoreset.sketch.kinds import hadamard_block
from flashcoreset.sketch.reference import normal_pairs


def sizes_of(backend: str, case: int) -> tuple[int, ...]:
    """An emulated warp takes its time over the entries of sjlt, so of those with 513 per row there are fewer."""
    batch, d, dim, nnz, offset = (FEW_SIZES if backend == "triton" else SIZES)[case]
    return batch, d, dim, min(nnz, 33) if backend == "cuda" else nnz, offset


@EVERY_BACKEND
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(SIZES)))
def test_is_the_product(backend: str, kind: str, dtype: torch.dtype, case: int) -> None:
    check_product(backend, DEVICE, kind, dtype, sizes_of(backend, case))


@EVERY_BACKEND
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(SIZES)))
def test_matrices_are_the_same_bits(backend: str, kind: str, dtype: torch.dtype, case: int) -> None:
    check_matrix(backend, DEVICE, kind, dtype, (FEW_SIZES if backend == "triton" else SIZES)[case])


@EVERY_BACKEND
@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", CHOICE_SIZES, ids=str)
def test_choices_of_columns(backend: str, kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    check_product(backend, DEVICE, kind, dtype, size)
    check_matrix(backend, DEVICE, kind, dtype, size)


@EVERY_BACKEND
@pytest.mark.parametrize("kind", [*KINDS, *CHOICES])
@pytest.mark.parametrize("case", range(3))
def test_stays_what_it_was(backend: str, kind: str, case: int) -> None:
    check_stays(backend, DEVICE, kind, case)


def test_the_generator_behind_it() -> None:
    """Signs, entry by entry, from the words of the documented counters."""
    row, column, seed = 2**33 + 5, 300, 2**35 + 9
    counter = np.array([row & 0xFFFFFFFF, row >> 32, column // 128, 0], dtype=np.uint32)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    bit = int(words[column % 128 // 32]) >> column % 32 & 1
    matrix = fc.projection_matrix(1, 400, seed=seed, offset=row, backend="torch")
    assert matrix[0, column] == (-1 if bit else 1) / math.sqrt(torch.tensor(400.0))


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_what_the_kind_says(kind: str) -> None:
    d, dim, nnz = 5000, 48, 6
    matrix = fc.projection_matrix(d, dim, kind=kind, nnz=nnz, seed=4, dtype=torch.float64, backend="torch")
    if kind in NORMAL:
        z = matrix.flatten() * math.sqrt(dim)
        n = z.numel()
        # Mean, variance and fourth moment of a standard normal, five standard errors; and tails.
        assert abs(z.mean()) < 5 / math.sqrt(n)
        assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / n)
        assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
        assert 3.5 < z.abs().max() < 6.7
    elif kind == "sjlt":
        assert ((matrix != 0).sum(1) == nnz).all()
        blocks = (matrix != 0).reshape(d, nnz, dim // nnz).sum(2)
        assert (blocks == 1).all()
        assert torch.allclose(
            matrix.abs().max(1).values, torch.tensor(1 / math.sqrt(nnz), dtype=torch.float64)
        )
    else:
        assert torch.allclose(matrix.abs(), torch.tensor(1 / math.sqrt(dim), dtype=torch.float64))
        assert abs(matrix.sign().mean()) < 5 / math.sqrt(d * dim)


def test_srht_is_a_signed_part_of_hadamard_matrices() -> None:
    dim, size = 40, hadamard_block(40)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)], 0)
    matrix = fc.projection_matrix(
        2 * size, dim, kind="srht", dtype=torch.float64, backend="torch"
    ) * math.sqrt(dim)
    for block in matrix.split(size):
        # Signs cancel in the product of two columns, which is a column of the Hadamard matrix again.
        spectrum = (block[:, :1] * block).T @ hadamard / size
        assert ((spectrum == 1).sum(1) == 1).all()
        assert ((spectrum == 0).sum(1) == size - 1).all()
        # The columns come from equal parts of the matrix, so all of them differ.
        assert len(spectrum.argmax(1).unique()) == dim
    assert not torch.equal(matrix[:size], matrix[size:])


@pytest.mark.parametrize("kind", [*KINDS, *CHOICES])
def test_keeps_inner_products_on_average(backend: str, kind: str) -> None:
    """Over 2,000 seeds, within three standard errors. (On cuda and triton the matrices are the same, to 2 units in the last
    place, as `test_matrices_are_the_same_bits` compares them.)"""
    d, dim, seeds = 60, 16, 2000
    x = rows(2, d, torch.float64)
    x[1] += x[0]
    products = torch.stack(
        [
            (s := fc.sketch(x, dim, kind=kind, seed=seed, nnz=2, backend=backend)) @ s.T
            for seed in range(seeds)
        ]
    )
    off = (products.mean(0) - x @ x.T).abs()
    assert (off <= 3 * products.std(0) / math.sqrt(seeds)).all()


@EVERY_BACKEND
@pytest.mark.parametrize("kind", KINDS)
def test_columns_may_come_in_pieces(backend: str, kind: str) -> None:
    d = {"cuda": 3000, "triton": 1500}.get(backend, 5000)
    x = on_device(rows(4, d, torch.float64))
    whole = fc.sketch(x, 70, kind=kind, nnz=2, backend=backend)
    for cut in (999,) if backend == "triton" else (1, 999, 2048, d - 1):
        pieces = fc.sketch(x[:, :cut], 70, kind=kind, nnz=2, backend=backend) + fc.sketch(
            x[:, cut:], 70, kind=kind, nnz=2, offset=cut, backend=backend
        )
        check_close(pieces, whole, torch.float64)


@pytest.mark.parametrize("kind", [*KINDS, *CHOICES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_do_not_see_each_other(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Results are equal bit for bit, with any number of threads and in any memory layout."""
    x = rows(37, 4500, dtype)
    whole = fc.sketch(x, 150, kind=kind, nnz=3, backend=backend)
    for part in (slice(0, 1), slice(5, 9), slice(20, 37)):
        assert torch.equal(fc.sketch(x[part], 150, kind=kind, nnz=3, backend=backend), whole[part])
    for view in (x.T.contiguous().T, torch.stack([x, x], 2)[:, :, 0], x.flip(0).flip(0)):
        assert torch.equal(fc.sketch(view, 150, kind=kind, nnz=3, backend=backend), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(fc.sketch(x, 150, kind=kind, nnz=3, backend=backend), whole)
    finally:
        torch.set_num_threads(threads)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 20),
    d=st.integers(1, 700),
    dim=st.integers(1, 300),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(0, 2**62),
    data=st.data(),
)
def test_any_size(
    kind: str, batch: int, d: int, dim: int, seed: int, offset: int, data: st.DataObject
) -> None:
    nnz = data.draw(st.integers(1, min(dim, 5)))
    options: dict[str, Any] = {"kind": kind, "seed": seed, "offset": offset, "nnz": nnz}
    x = rows(batch, d, torch.float64, seed=d)
    matrix = fc.projection_matrix(d, dim, dtype=torch.float64, **options)
    check_close(fc.sketch(x, dim, **options), x @ matrix, torch.float64)


def test_takes_numpy_and_integers_like_it() -> None:
    x = np.ones((2, 5), dtype=np.float32)
    assert torch.equal(fc.sketch(x, np.int64(3)), fc.sketch(torch.from_numpy(x), 3))
    x.flags.writeable = False
    assert torch.equal(fc.sketch(x, 3), fc.sketch(x.copy(), 3))


@EVERY_BACKEND
def test_bad_numbers_are_named(backend: str) -> None:
    for dtype, bad, word in ((torch.float32, math.inf, "inf"), (torch.bfloat16, math.nan, "NaN")):
        x = on_device(rows(2, 6, dtype))
        x[1, 2] = bad
        with pytest.raises(ValueError, match=f"x must be finite, got {word} at row 1, column 2"):
            fc.sketch(x, 4, backend=backend)


@pytest.mark.parametrize(("d", "count"), [(1, 1), (7, 3), (100, 100), (2**40, 1000), (7 * 2**31 - 9, 7)])
def test_chosen_columns_in_whole_numbers(d: int, count: int) -> None:
    """From the words of the documented counters, without rounding."""
    chosen, factors = choose_columns(d, count, seed=2**35 + 9)
    for c in range(count):
        counter = np.array([[0, 0, c // 2, 5]], dtype=np.uint32)
        words = philox4x32(counter, (9, 8))[0].tolist()[2 * (c % 2) :]
        begin, end = c * d // count, (c + 1) * d // count
        assert int(chosen[c]) == begin + ((words[0] << 32 | words[1]) * (end - begin) >> 64)
        assert float(factors[c]) == math.sqrt(end - begin)


def test_each_column_of_a_part_is_chosen_equally_often() -> None:
    """10,000 choices of 3 out of 11, by chi-squared tests: the 99.99 % quantile of 3 degrees of freedom is 21.1."""
    counts = np.zeros(11)
    for seed in range(10_000):
        counts[choose_columns(11, 3, seed)[0].numpy()] += 1
    for begin, end in ((0, 3), (3, 7), (7, 11)):
        expected = 10_000 / (end - begin)
        assert ((counts[begin:end] - expected) ** 2 / expected).sum() < 21.1


def test_grass_is_the_sjlt_of_a_mask() -> None:
    x = rows(5, 900, torch.float64)
    read = fc.sketch(x, 80, kind="mask", seed=3)
    assert torch.equal(
        fc.sketch(x, 20, kind="grass", seed=3, nnz=2), fc.sketch(read, 20, kind="sjlt", seed=3, nnz=2)
    )
    assert torch.equal(
        fc.sketch(x[:, :70], 20, kind="grass", seed=3), fc.sketch(x[:, :70], 20, kind="sjlt", seed=3)
    )


def test_columns_that_are_not_chosen_may_be_anything() -> None:
    x = rows(2, 50, torch.float32)
    chosen, _ = choose_columns(50, 5, 0)
    expected = fc.sketch(x, 5, kind="mask")
    others = torch.ones(50, dtype=torch.bool)
    others[chosen] = False
    x[:, others] = torch.nan
    assert torch.equal(fc.sketch(x, 5, kind="mask"), expected)


# --- rows that are mostly zeros


def sparse_rows(batch: int, d: int, dtype: torch.dtype, share: float = 0.1) -> torch.Tensor:
    x = rows(batch, d, dtype)
    x[torch.rand(batch, d, generator=torch.Generator().manual_seed(1)) > share] = 0
    x[batch // 2] = 0
    return x


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", [*KINDS, *CHOICES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (7, 97, 13, 3), (5, 3001, 600, 2), (40, 200, 129, 1)], ids=str
)
def test_sparse_rows(backend: str, kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    batch, d, dim, nnz = size
    x = sparse_rows(batch, d, dtype)
    options: dict[str, Any] = {"kind": kind, "seed": 2**40 + 3, "nnz": nnz}
    if kind in KINDS:
        options["offset"] = 2**33 + 7
    matrix = fc.projection_matrix(d, dim, dtype=torch.float64, backend="torch", **options)
    found = fc.sketch(x.to_sparse_csr(), dim, backend=backend, **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = x.double() @ matrix
    limit = ERROR.get(dtype, 1e-5) * float(expected.abs().max()) + 1e-300
    assert (found.double() - expected).abs().max() <= limit
    if dtype in (torch.float32, torch.float64):
        by_scipy = fc.sketch(scipy.sparse.csr_matrix(x.numpy()), dim, backend=backend, **options)
        assert torch.equal(found, by_scipy)


@pytest.mark.parametrize("kind", [*KINDS, *CHOICES])
def test_sparse_rows_do_not_see_each_other(kind: str) -> None:
    x = scipy.sparse.csr_matrix(sparse_rows(60, 500, torch.float32).numpy())
    whole = fc.sketch(x, 70, kind=kind, nnz=3)
    assert torch.equal(fc.sketch(x[7:20], 70, kind=kind, nnz=3), whole[7:20])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(fc.sketch(x, 70, kind=kind, nnz=3), whole)
    finally:
        torch.set_num_threads(threads)


def test_sparse_rows_cost_their_entries() -> None:
    """A trillion columns, of which nothing is allocated; entries that are listed twice add up."""
    d = 10**12
    crow, col = torch.tensor([0, 3, 3]), torch.tensor([5, d - 1, 5])
    x = scipy.sparse.csr_matrix((np.array([1.0, 2.0, 3.0]), col.numpy(), crow.numpy()), shape=(2, d))
    found = fc.sketch(x, 50)
    first, last = (fc.projection_matrix(1, 50, offset=i, dtype=torch.float64) for i in (5, d - 1))
    assert torch.allclose(found[:1], 4 * first + 2 * last, rtol=1e-12)
    assert not found[1].any()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)
def test_backends_without_sparse_kernels_say_so(backend: str) -> None:
    x = on_device(torch.eye(3)).to_sparse_csr()
    with pytest.raises(fc.BackendUnavailableError, match=f"no {backend} kernel for sparse matrices"):
        fc.sketch(x, 2, backend=backend)


def test_bad_sparse_input() -> None:
    x = scipy.sparse.csr_matrix(np.diag([1.0, np.nan, 2.0]))
    for kind in (*KINDS, "grass"):
        with pytest.raises(ValueError, match="x must be finite, got NaN at row 1, column 1"):
            fc.sketch(x, 3, kind=kind)
    with pytest.raises(ValueError, match="x: sums of its rows go beyond the range of"):
        fc.sketch(scipy.sparse.csr_matrix(np.full((1, 4001), 3e38, dtype=np.float32)), 1)
    with pytest.raises(ValueError, match=r"dim must be more than D / 2\^31 for kind 'mask', got D = 10"):
        fc.sketch(scipy.sparse.csr_matrix((1, 10**12)), 10, kind="mask")
    with pytest.raises(TypeError, match=r"x must be in CSR format, got scipy format 'csc'"):
        fc.sketch(x.tocsc(), 2)
    with pytest.raises(TypeError, match=r"x must have dtype float16, .*, got int64"):
        fc.sketch(scipy.sparse.csr_matrix(np.eye(3, dtype=np.int64)), 2)


WITH_OUT = [name for name in (*BACKENDS, *GPU_BACKENDS) if name != "torch"]


@pytest.mark.parametrize("backend", WITH_OUT, indirect=True)
def test_writes_where_it_is_told(backend: str) -> None:
    kernel = importlib.import_module(f"flashcoreset.sketch.{backend}")
    x = on_device(rows(5, 40, torch.float16 if kernel.TAKES.half else torch.float32))
    wide = torch.full((5, 20), 7.0, device=DEVICE)
    out = wide[:, 3:11]
    assert kernel.sketch(x, 8, kind="srht", seed=3, out=out) is out
    assert torch.equal(out, kernel.sketch(x, 8, kind="srht", seed=3))
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 11:] == 7).all()


def test_is_an_op() -> None:
    x = rows(3, 50, torch.float32)
    torch.library.opcheck(torch.ops.flashcoreset.sketch, (x, 8, "sjlt", 1, 2, 3, None))
    compiled = torch.compile(lambda t: fc.sketch(t, 8, kind="srht"), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), fc.sketch(x, 8, kind="srht"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, r"dim must be in \[1, 2\^31\], got 0"),
        ({"dim": 2**31 + 1}, ValueError, r"dim must be in \[1, 2\^31\], got 2147483649"),
        ({"dim": 2.0}, TypeError, "dim must be an int"),
        (
            {"kind": "hadamard"},
            ValueError,
            "unknown kind 'hadamard'; valid names: rademacher, gaussian, sjlt, srht, gaussian-boxmuller, mask, grass",
        ),
        ({"kind": "mask", "dim": 7}, ValueError, "dim must be at most D = 6 for kind 'mask', got 7"),
        (
            {"kind": "mask", "dim": 2, "offset": 1},
            ValueError,
            "offset must be 0 for kind 'mask', which chooses",
        ),
        ({"kind": "grass", "dim": 2, "offset": 1}, ValueError, "offset must be 0 for kind 'grass'"),
        ({"kind": 3}, TypeError, "kind must be a str"),
        ({"nnz": 9}, ValueError, r"nnz must be in \[1, dim\] = \[1, 8\], got 9"),
        ({"nnz": 0}, ValueError, "nnz must be in"),
        ({"offset": -1}, ValueError, "offset must be >= 0"),
        ({"offset": 2**63 - 3}, ValueError, "offset must be >= 0, and its sum with the 6 columns below 2"),
        ({"seed": 2**63}, ValueError, "seed must be in the range of 64-bit integers"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
        ({"x": torch.zeros(6)}, ValueError, "x must have 2 dimensions"),
        ({"x": torch.zeros(2, 0)}, ValueError, "x must have at least 1 row and 1 column"),
        ({"x": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, "x must have dtype"),
        ({"x": [[1.0, 2.0], [3.0]]}, ValueError, "x must be a list of numbers, got a nested one of unequal"),
        (
            {"x": torch.tensor([[0, 1, 2, 3, 4, math.nan]])},
            ValueError,
            "x must be finite, got NaN at row 0, column 5",
        ),
        (
            {"x": torch.tensor([[0, math.inf, 2, 3, 4, 5]])},
            ValueError,
            "x must be finite, got inf at row 0, column 1",
        ),
        (
            {"x": torch.full((1, 6), 3e38), "dim": 1, "seed": 9},
            ValueError,
            "beyond the range of torch.float32",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 6), "dim": 8} | change
    x, dim = arguments.pop("x"), arguments.pop("dim")
    with pytest.raises(error, match=message):
        fc.sketch(x, dim, **arguments)


def test_bad_input_of_the_matrix() -> None:
    with pytest.raises(ValueError, match="D must be at least 1, got 0"):
        fc.projection_matrix(0, 3)
    with pytest.raises(ValueError, match=r"device must be one that torch can use here, got 'nowhere': "):
        fc.projection_matrix(4, 4, device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device must be one that torch can use here, got 'cuda': "):
            fc.projection_matrix(4, 4, device="cuda")
    with pytest.raises(TypeError, match=r"device must be a torch\.device or its name, got 3\.5"):
        fc.projection_matrix(4, 4, device=3.5)
    with pytest.raises(ValueError, match=r"D times dim must be below 2\^60, got 4611686018427387904 \* 16"):
        fc.projection_matrix(2**62, 16)
    with pytest.raises(TypeError, match="dtype must be float16"):
        fc.projection_matrix(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="nnz must be in"):
        fc.projection_matrix(2, 3, nnz=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parts_of_long_rows(kind: str, dtype: torch.dtype) -> None:
    """The low-level call for embeddings' gradients: rows that are zero but for some parts, which may repeat."""
    g = rows(4 * 6, 33, dtype).reshape(4, 6, 33)
    indices = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(0))
    full = torch.zeros(4, 9, 33, dtype=torch.float64)
    full.scatter_add_(1, indices[:, :, None].expand(4, 6, 33), g.double())
    options: dict[str, Any] = {"kind": kind, "seed": 5, "offset": 77, "nnz": 2}
    expected = fc.sketch(full.flatten(1), 40, **options)
    found = torch.ones(4, 40, dtype=dtype)
    kernels.cpu.sketch_rows(indices, g, found, **options)
    check_close(found - 1, expected, dtype)
    with pytest.raises(ValueError, match="indices: expected numbers >= 0, got -1"):
        kernels.cpu.sketch_rows(indices - 5 * (indices == 4) - (indices == 0).long(), g, found, **options)
    with pytest.raises(
        ValueError, match="indices: expected numbers whose product with the width fits in 64 bits"
    ):
        kernels.cpu.sketch_rows(torch.full((4, 6), 2**62), g, found, **options)
    with pytest.raises(ValueError, match=r"indices: expected shape \(4, 6\)"):
        kernels.cpu.sketch_rows(indices[:3], g, found, **options)


# --- normal numbers


def test_normal_numbers_pass_statistical_tests() -> None:
    """2^24 numbers against the standard normal distribution: moments, the Kolmogorov-Smirnov distance, tails, and correlations of
    numbers that share words. Limits are five standard errors; the distance's is its 99.9999 % quantile."""
    n, dim = 1 << 18, 64
    z = (fc.projection_matrix(n, dim, kind="gaussian", seed=11, backend="cpu") * 8).double().numpy()
    count = z.size
    moments = {1: 0, 2: 1, 3: 0, 4: 3, 5: 0, 6: 15}
    squares = {1: 1, 2: 3, 3: 15, 4: 105, 5: 945, 6: 10395}
    for power, expected in moments.items():
        error = math.sqrt((squares[power] - expected**2) / count)
        assert abs((z**power).mean() - expected) < 5 * error, power
    ordered = ndtr(np.sort(z, axis=None))
    steps = np.arange(count + 1) / count
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    assert distance * math.sqrt(count) < 2.7
    for limit in (3, 4, 4.5, 5):
        for tail in (z > limit, z < -limit):
            expected = count * float(ndtr(-limit))
            assert abs(int(tail.sum()) - expected) < 5 * math.sqrt(expected), limit
    # Columns 2l and 2l + 1 share their words, columns 8 apart the radius and the angle; the two groups share nothing.
    for values, mean, variance in ((z, 0, 1), (z**2, 1, 2), (np.abs(z) > 2, 2 * ndtr(-2), None)):
        centred = values - mean
        variance = variance or mean * (1 - mean)
        products = centred.T @ centred / (n * variance)
        off = np.abs(products - np.eye(dim))[~np.eye(dim, dtype=bool)]
        assert off.max() < 5.5 / math.sqrt(n)
        rows = (centred[1:] * centred[:-1]).mean(0) / variance
        assert np.abs(rows).max() < 5 / math.sqrt(n)


@EVERY_BACKEND
def test_normal_numbers_keep_lengths_exactly(backend: str) -> None:
    """The mean of |sketch(x)|^2 / |x|^2 over many seeds, within three standard errors of 1; sqrt(2 / dim) is the deviation of one."""
    x, dim = on_device(rows(1, 40, torch.float64)), 64
    seeds = 40 if backend in ("cuda", "triton") else 2000
    lengths = torch.stack(
        [
            fc.sketch(x, dim, kind="gaussian", seed=seed, backend=backend).square().sum()
            for seed in range(seeds)
        ]
    )
    assert abs(float(lengths.mean() / x.square().sum()) - 1) < 3 * math.sqrt(2 / dim / seeds)


def test_the_formula_of_normal_numbers() -> None:
    """In float64, by its definition, for all corners of words; and the two words' halves exchanged."""
    rng = np.random.default_rng(0)
    corners = np.array([0, 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1], dtype=np.uint32)
    a = np.concatenate([np.repeat(corners, 8), rng.integers(0, 2**32, 200_000, dtype=np.uint32)])
    b = np.concatenate([np.tile(corners, 8), rng.integers(0, 2**32, 200_000, dtype=np.uint32)])
    x, y = normal_pairs(a, b)
    radius = np.sqrt(-2 * np.log(((a & 0x7FFFFFFF) + 0.5) / 2**31))
    angle = (2.0 * (b & 0x7FFFFFFF) + 1 - np.where(b & 2**30, 2.0**32, 0)) / 2**31 * np.pi / 4
    sine, cosine = radius * np.sin(angle), radius * np.cos(angle) * np.where(a >> 31, -1, 1)
    exchanged = b >> 31 == 1
    # The uniform number of small radii has steps of 2^-24, half of which moves a radius r by 2^-25 / r.
    slack = 6e-6 * radius + np.minimum(2.0**-25 / np.maximum(radius, 1e-300), 2.5e-4)
    assert (np.abs(x - np.where(exchanged, cosine, sine)) <= slack).all()
    assert (np.abs(y - np.where(exchanged, sine, cosine)) <= slack).all()
    assert max(np.abs(x).max(), np.abs(y).max()) < 6.67
