"""sample_scores against the formulas in NumPy, on every backend and build, and everything a caller can get wrong."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, TRITON
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset._core import native

NAMES = ("loss", "entropy", "margin", "el2n", "correct")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Largest error, relative to 1 + the value's magnitude; half types are exact inputs to a float32 computation. Worst
# seen: 2.7e-7 (float32 on x86-64-v2; on v4 1.5e-7) and 4.7e-15.
TOLERANCE = {torch.float16: 1e-6, torch.bfloat16: 1e-6, torch.float32: 1e-6, torch.float64: 2e-14}


@pytest.fixture(params=[*BACKENDS, *TRITON])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend; for "cpu" the build in use is the one that the test's id names."""
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setattr(native, "_loaded", native.load_isa(isa))
    if name == "triton":
        from flashcoreset.triton_kernels.pairwise import INTERPRETED

        if not INTERPRETED:
            pytest.skip("tests/test_triton.py runs it on a GPU")
    return name


def expected(logits: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    """The scores of logits [N, C] in extended precision, by their formulas."""
    x = logits.double().numpy().astype(np.longdouble)
    t = targets.numpy()
    rows = np.arange(len(x))
    d = x - x.max(1, keepdims=True)
    log_p = d - np.log(np.exp(d).sum(1, keepdims=True))
    p = np.exp(log_p)
    others = p.copy()
    others[rows, t] = 0
    onehot = np.zeros_like(p)
    onehot[rows, t] = 1
    with np.errstate(invalid="ignore"):
        surprise = np.where(p > 0, -p * log_p, 0)
    return {
        "loss": -log_p[rows, t],
        "entropy": surprise.sum(1),
        "margin": p[rows, t] - others.max(1),
        "el2n": np.sqrt(((p - onehot) ** 2).sum(1)),
        "correct": np.array([int(np.flatnonzero(row == row.max())[0]) for row in x]) == t,
    }


def check(scores: fc.SampleScores, logits: Tensor, targets: Tensor) -> None:
    wanted = expected(logits, targets)
    out = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert scores.correct.dtype == torch.bool
    np.testing.assert_array_equal(scores.correct.numpy(), wanted["correct"])
    for name in NAMES[:4]:
        got = getattr(scores, name)
        assert got.dtype == out
        assert got.shape == (len(logits),)
        error = np.abs(got.double().numpy() - wanted[name]) / (1 + np.abs(wanted[name]))
        assert error.max() <= TOLERANCE[logits.dtype], (name, float(error.max()))


def random_logits(n: int, classes: int, dtype: torch.dtype, scale: float = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale).to(dtype)


def random_targets(n: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 7, 16, 97, 1023, 1024, 1025, 5000])
def test_formulas(backend: str, classes: int, dtype: torch.dtype) -> None:
    n = 9 if backend == "triton" else 97
    for scale in (0.1, 3, 40):
        x, t = random_logits(n, classes, dtype, scale), random_targets(n, classes)
        x[: n // 2, :].scatter_(1, t[: n // 2, None], 8.0)  # half of them learned
        check(fc.sample_scores(x, t, backend=backend), x, t)


def test_a_case_worked_by_hand(backend: str) -> None:
    # Probabilities 1/2, 1/4, 1/8, 1/8.
    x = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64).log().expand(4, 4)
    scores = fc.sample_scores(x, torch.arange(4), backend=backend)
    assert scores.loss.tolist() == pytest.approx([math.log(2), math.log(4), math.log(8), math.log(8)])
    assert scores.entropy.tolist() == pytest.approx([1.75 * math.log(2)] * 4)
    assert scores.margin.tolist() == pytest.approx([1 / 4, -1 / 4, -3 / 8, -3 / 8])
    squares = [(1 / 4 + 1 / 16 + 2 / 64), (1 / 4 + 9 / 16 + 2 / 64), (1 / 4 + 1 / 16 + 1 / 64 + 49 / 64)]
    assert scores.el2n.tolist() == pytest.approx([math.sqrt(s) for s in [*squares, squares[2]]])
    assert scores.correct.tolist() == [True, False, False, False]


@pytest.mark.parametrize("classes", [4, 33, 1500])
def test_of_equal_logits_the_lowest_class_is_predicted(backend: str, classes: int) -> None:
    x = torch.zeros(4, classes)
    x[1:, 1:] = 2.0  # classes 1, 2, ... are equal and the largest
    t = torch.tensor([0, 1, 2, classes - 1])
    scores = fc.sample_scores(x, t, backend=backend)
    assert scores.correct.tolist() == [True, True, False, False]
    assert scores.margin.tolist() == [0.0] * 4


def test_one_class(backend: str) -> None:
    scores = fc.sample_scores(torch.tensor([[7.0], [-7.0]]), torch.tensor([0, 0]), backend=backend)
    assert [getattr(scores, name).tolist() for name in NAMES] == [[0, 0], [0, 0], [1, 1], [0, 0], [True] * 2]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits(backend: str, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    x = torch.tensor(
        [
            [most, -most, 0.0],  # differences overflow
            [-most, -most, -most],
            [most, most, most],
            [0.0, -1e4, -1e5],
            [1e-30, 0.0, -1e-30],
            [-most, most, most],
        ],
        dtype=dtype,
    )
    t = torch.zeros(6, dtype=torch.int64)
    scores = fc.sample_scores(x, t, backend=backend)
    log3, third = math.log(3), 1 / 3
    assert scores.loss[:5].tolist() == pytest.approx([0, log3, log3, 0, log3])
    assert float(scores.loss[5]) == math.inf
    assert scores.entropy.tolist() == pytest.approx([0, log3, log3, 0, log3, math.log(2)])
    assert scores.margin.tolist() == pytest.approx([1, 0, 0, 1, 0, -0.5], abs=1e-7)
    corner = math.sqrt((1 - third) ** 2 + 2 * third**2)
    assert scores.el2n.tolist() == pytest.approx([0, corner, corner, 0, corner, math.sqrt(1.5)])
    assert scores.correct.tolist() == [True, True, True, True, True, False]


def test_nothing_cancels_for_learned_samples() -> None:
    """1 - p is far below a unit in the last place of 1 and still has all its digits."""
    x = torch.zeros(1, 1000)
    x[0, 5] = 40.0
    scores = fc.sample_scores(x, torch.tensor([5]), backend="cpu")
    rest = 999 * math.exp(-40)
    assert float(scores.loss) == pytest.approx(rest, rel=1e-5)
    assert float(scores.el2n) == pytest.approx(rest * math.sqrt(1 + 1 / 999), rel=1e-5)
    assert float(scores.entropy) == pytest.approx(rest * 41, rel=1e-5)


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=6), st.integers(0, 4)
)
@settings(max_examples=60, deadline=None)
def test_bounds_and_shift_invariance(rows: list[list[int]], target: int) -> None:
    x = torch.tensor(rows, dtype=torch.float64)
    t = torch.full((len(rows),), target)
    scores = fc.sample_scores(x, t)
    check(scores, x, t)
    moved = fc.sample_scores(x + 1000, t)
    for name in NAMES[:4]:
        torch.testing.assert_close(getattr(scores, name), getattr(moved, name), rtol=1e-12, atol=1e-12)
    assert ((scores.entropy >= 0) & (scores.entropy <= math.log(5) + 1e-12)).all()
    assert ((scores.el2n >= 0) & (scores.el2n <= math.sqrt(2))).all()
    assert (scores.loss >= 0).all()
    assert (scores.correct == (scores.margin >= 0)).logical_or(scores.margin == 0).all()


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_are_averaged(backend: str) -> None:
    n, tokens, classes = 5, 6, 11
    x = random_logits(n * tokens, classes, torch.float32).reshape(n, tokens, classes)
    t = random_targets(n * tokens, classes).reshape(n, tokens)
    mask = torch.rand(n, tokens, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 2] = True
    flat = fc.sample_scores(x.reshape(-1, classes), t.reshape(-1), backend=backend)
    dirty, unknown = x.clone(), t.clone()
    dirty[~mask] = math.nan  # entries that do not count may be anything
    unknown[~mask] = -100
    for given_mask in (mask, mask.to(torch.int64), mask.numpy()):
        scores = fc.sample_scores(dirty, unknown, given_mask, backend=backend)
        for name in NAMES:
            values = getattr(flat, name).double().reshape(n, tokens)
            mean = torch.stack([values[i, mask[i]].mean() for i in range(n)])
            got = getattr(scores, name)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), mean, rtol=1e-6, atol=1e-6)
    every = fc.sample_scores(x, t, backend=backend)
    torch.testing.assert_close(every.loss, flat.loss.reshape(n, tokens).mean(1))
    assert every.correct.tolist() == pytest.approx(
        flat.correct.float().reshape(n, tokens).mean(1).tolist(), abs=1e-7
    )


def test_views_are_taken_as_they_are(backend: str) -> None:
    x = random_logits(7 * 6, 40, torch.float32).reshape(7, 6, 40)
    t = random_targets(7 * 5, 40).reshape(7, 5)
    half = x.to(torch.bfloat16)
    for view in (
        x[:, :-1],
        x[:, :-1].flip(0),
        x.transpose(1, 2).contiguous().transpose(1, 2)[:, 1:],
        half[:, 1:],
    ):
        got = fc.sample_scores(view, t, backend=backend)
        plain = fc.sample_scores(view.clone(memory_format=torch.contiguous_format), t, backend=backend)
        for name in NAMES:
            assert torch.equal(getattr(got, name), getattr(plain, name)), name
    strided = x[:, 0, ::3]
    assert torch.equal(
        fc.sample_scores(strided, t[:, 0] % 14, backend=backend).loss,
        fc.sample_scores(strided.contiguous(), t[:, 0] % 14, backend=backend).loss,
    )


def test_inputs_of_other_libraries() -> None:
    x, t = random_logits(6, 5, torch.float32), random_targets(6, 5)
    wanted = fc.sample_scores(x, t).loss
    x_array, t_array = x.numpy().copy(), t.numpy().astype(np.int32)
    x_array.flags.writeable = False
    assert torch.equal(fc.sample_scores(x_array, t_array).loss, wanted)
    assert torch.equal(fc.sample_scores(x, t.tolist()).loss, wanted)
    assert torch.equal(fc.sample_scores(x.requires_grad_(), t).loss, wanted)


# --- promises -------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("classes", [10, 1500, 40_000])
def test_a_row_depends_on_nothing_else(backend: str, classes: int, threads: None) -> None:
    """A row's scores depend neither on the other rows, their number and its place among them, nor on the number of threads."""
    n = 4 if backend == "triton" else 60
    x, t = random_logits(n, classes, torch.float32), random_targets(n, classes)
    whole = fc.sample_scores(x, t, backend=backend)
    for count in (1, 3):
        torch.set_num_threads(count)
        again = fc.sample_scores(x, t, backend=backend)
        for name in NAMES:
            assert torch.equal(getattr(again, name), getattr(whole, name)), (name, count)
        for i in (0, n - 1):
            alone = fc.sample_scores(x[i : i + 1], t[i : i + 1], backend=backend)
            tokens = fc.sample_scores(x[i : i + 1, None], t[i : i + 1, None], backend=backend)
            for name in NAMES:
                assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[i]), (name, count, i)
                assert float(getattr(tokens, name)[0]) == float(getattr(whole, name)[i])


def test_half_types_compute_in_float32(backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, t = random_logits(5, 300, dtype), random_targets(5, 300)
        got = fc.sample_scores(x, t, backend=backend)
        wide = fc.sample_scores(x.float(), t, backend=backend)
        for name in NAMES:
            assert torch.equal(getattr(got, name), getattr(wide, name)), name


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # Triton's interpreter: milliseconds per row
def test_every_half_number_is_read_right(backend: str) -> None:
    """All finite float16 and bfloat16 numbers, 64 per row, beside the same in float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = bits.view(dtype)
        x = numbers[numbers.isfinite()].reshape(-1, 64)
        t = torch.arange(len(x)) % 64
        for name in NAMES:
            got = getattr(fc.sample_scores(x, t, backend=backend), name)
            wide = getattr(fc.sample_scores(x.float(), t, backend=backend), name)
            assert torch.equal(got, wide), (dtype, name)


def test_error_is_not_above_that_of_torch_in_float32() -> None:
    x, t = random_logits(200, 1000, torch.float32), random_targets(200, 1000)
    got, wanted = fc.sample_scores(x, t, backend="cpu"), expected(x, t)
    p = x.softmax(1)
    onehot = torch.nn.functional.one_hot(t, 1000)
    plain = {
        "loss": torch.nn.functional.cross_entropy(x, t, reduction="none"),
        "entropy": torch.distributions.Categorical(logits=x).entropy(),
        "el2n": (p - onehot).norm(dim=1),
    }
    for name, theirs in plain.items():
        ours = np.abs(getattr(got, name).double().numpy() - wanted[name]).max()
        assert ours <= 2 * np.abs(theirs.double().numpy() - wanted[name]).max(), name


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_opcheck_and_compile(backend: str) -> None:
    op = torch.ops.flashcoreset.sample_scores.default
    x, t = random_logits(4 * 3, 5, torch.float32).reshape(4, 3, 5), random_targets(12, 5).reshape(4, 3)
    torch.library.opcheck(op, (x, t, torch.ones_like(t), True, -100, backend))
    torch.library.opcheck(op, (x, t, None, False, -100, backend))
    torch.library.opcheck(op, (x[:, 0].half(), t[:, 0], None, True, -100, backend))

    def hardness(x: Tensor, t: Tensor) -> Tensor:
        scores = fc.sample_scores(x * 2, t, backend=backend)
        return scores.loss * scores.correct

    torch._dynamo.reset()
    compiled = torch.compile(hardness, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[:, 0], t[:, 0]), hardness(x[:, 0], t[:, 0]))
    meta = fc.sample_scores(x.to("meta"), t.to("meta"))
    assert (meta.loss.is_meta, meta.loss.shape) == (True, (4,))


def test_the_low_level_call_writes_to_out() -> None:
    x, t = random_logits(6, 5, torch.float32)[:, None], random_targets(6, 5)[:, None]
    out = torch.full((5, 6, 2), -7.0)[:, :, :1]
    assert kernels.cpu.sample_scores(x, t, out=out) is out
    assert torch.equal(out, kernels.cpu.sample_scores(x, t))
    with pytest.raises(ValueError, match=r"out: expected shape \(5, 6, 1\), got \(5, 1, 1\)"):
        kernels.cpu.sample_scores(x, t, out=out[:, :1])
    with pytest.raises(TypeError, match="out: expected dtype float32, got float64"):
        kernels.cpu.sample_scores(x, t, out=out.double())
    with pytest.raises(ValueError, match=r"targets: expected shape \(6, 1\), got \(5, 1\)"):
        kernels.cpu.sample_scores(x, t[:5])


def test_calls_from_several_threads_at_once() -> None:
    x, t = random_logits(300, 1000, torch.float32), random_targets(300, 1000)
    wanted, found = fc.sample_scores(x, t).loss, []
    workers = [threading.Thread(target=lambda: found.append(fc.sample_scores(x, t).loss)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 6
    assert all(torch.equal(loss, wanted) for loss in found)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 3, 1400])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_are_refused(backend: str, value: float, column: int, dtype: torch.dtype) -> None:
    x = random_logits(6, 1500, dtype)
    x[[2, 4], column] = value
    name = "NaN" if math.isnan(value) else str(value)
    words = rf"^logits must be finite, got {name} at sample 2, class {column}$"
    with pytest.raises(ValueError, match=words):
        fc.sample_scores(x, torch.full((6,), 3), backend=backend)
    tokens = x[:, None].repeat(1, 2, 1)
    tokens[2, 0] = 0
    with pytest.raises(ValueError, match=rf"got {name} at sample 2, token 1, class {column}$"):
        fc.sample_scores(tokens, torch.full((6, 2), 3), backend=backend)


@pytest.mark.parametrize("wrong", [-1, 5, -100, 2**62, -(2**63)])
def test_targets_out_of_range(backend: str, wrong: int) -> None:
    x, t = random_logits(6, 5, torch.float32), torch.zeros(6, dtype=torch.int64)
    t[[3, 4]] = wrong
    with pytest.raises(ValueError, match=rf"^targets must be in \[0, 5\), got {wrong} at sample 3$"):
        fc.sample_scores(x, t, backend=backend)
    both = x[:, None].repeat(1, 2, 1)
    two = torch.stack([torch.zeros_like(t), t], 1)
    mask = torch.ones_like(two)
    for given_mask in (None, mask):
        with pytest.raises(ValueError, match=rf"got {wrong} at sample 3, token 1$"):
            fc.sample_scores(both, two, given_mask, ignore_index=-7, backend=backend)


X, T = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
X3, T3 = torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.int64)
BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "logits int": ((X.int(), T), TypeError, "logits must have dtype float16, .*, got int32"),
    "logits text": (("scores", [0]), TypeError, "logits must be a torch.Tensor, .*, got str"),
    "logits 1-d": ((X[0], T), ValueError, r"logits must have shape \[samples, classes\] or .*, got \(3,\)"),
    "logits 4-d": ((X3[None], T3), ValueError, r"logits must have shape .*, got \(1, 4, 2, 3\)"),
    "no samples": ((X[:0], T[:0]), ValueError, r"logits .* each >= 1, got \(0, 3\)"),
    "no classes": ((X[:, :0], T), ValueError, r"logits .* each >= 1, got \(4, 0\)"),
    "no tokens": ((X3[:, :0], T3[:, :0]), ValueError, r"logits .* each >= 1, got \(4, 0, 3\)"),
    "logits sparse": ((X.to_sparse(), T), TypeError, "logits must be a dense tensor, got layout torch.sparse_coo"),
    "targets short": ((X, T[:3]), ValueError, r"targets must have shape \(4,\) as logits has it, got \(3,\)"),
    "targets 2-d": ((X, T[:, None]), ValueError, r"targets must have shape \(4,\) .*, got \(4, 1\)"),
    "targets of tokens": ((X3, T), ValueError, r"targets must have shape \(4, 2\) .*, got \(4,\)"),
    "targets float": ((X, T.float()), TypeError, "targets must hold integers, got dtype float32"),
    "targets bool": ((X, T.bool()), TypeError, "targets must hold integers, got dtype bool"),
    "targets onehot": ((X, torch.eye(4)[:, :3]), TypeError, "targets must hold integers, got dtype float32"),
    "targets None": ((X, None), TypeError, "targets must be a torch.Tensor, .*, got NoneType"),
    "targets beyond 64 bits": (
        (X, torch.tensor([0, 1, 2, 2**63], dtype=torch.uint64)), ValueError,
        "targets must be below 2\\^63, got 9223372036854775808",
    ),
    "mask of 2-d": ((X, T, T), ValueError, r"mask is for logits \[samples, tokens, classes\], .*\(4, 3\)"),
    "mask shape": ((X3, T3, T3[:, :1]), ValueError, r"mask must have shape \(4, 2\) .*, got \(4, 1\)"),
    "mask float": ((X3, T3, T3.float()), TypeError, "mask must hold integers, got dtype float32"),
    "mask 2": ((X3, T3, T3 + 2), ValueError, "mask must hold 0 and 1, got 2 at sample 0, token 0"),
    "mask empty": (
        (X3, T3, torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1]])),
        ValueError, "mask must keep at least one token of every sample, got none at sample 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, error, words = BAD[name]
    with pytest.raises(error, match=words):
        fc.sample_scores(*arguments)


def test_backends_are_obeyed_or_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        fc.sample_scores(X, T, backend="gpu")
    with pytest.raises(fc.BackendUnavailableError, match=re.escape("there are no cuda kernels for scores")):
        fc.sample_scores(X, T, backend="cuda")
    with pytest.raises(ValueError, match="targets is on device cpu, but logits is on meta"):
        fc.sample_scores(X.to("meta"), T)


def test_margins_of_logits(backend: str) -> None:
    for dtype in (torch.float64, torch.float16):
        x, t = random_logits(40, 7, dtype), random_targets(40, 7)
        x[3, t[3]] = x[3].max() + 1
        x[4] = 2.0  # all are equal
        wide = x.double()
        others = wide.scatter(1, t[:, None], -torch.inf).amax(1)
        expected = wide.gather(1, t[:, None])[:, 0] - others
        found = fc.sample_scores(x, t, margin="logit", backend=backend)
        torch.testing.assert_close(found.margin.double(), expected, rtol=1e-6, atol=1e-6)
        plain = fc.sample_scores(x, t, backend=backend)
        assert torch.equal(found.loss, plain.loss)
        assert torch.equal(found.el2n, plain.el2n)
    tokens, targets = (
        random_logits(12, 7, torch.float64).reshape(3, 4, 7),
        random_targets(12, 7).reshape(3, 4),
    )
    targets[0, 1:], tokens[0, 1:] = -100, torch.nan
    every = fc.sample_scores(tokens[1:].reshape(8, 7), targets[1:].flatten(), margin="logit", backend=backend)
    found = fc.sample_scores(tokens, targets, margin="logit", backend=backend)
    torch.testing.assert_close(found.margin[1:], every.margin.reshape(2, 4).mean(1))
    first = fc.sample_scores(tokens[0, :1], targets[0, :1], margin="logit", backend=backend)
    torch.testing.assert_close(found.margin[:1], first.margin)


def test_ignored_tokens_do_not_count(backend: str) -> None:
    x, t = random_logits(12, 7, torch.float32).reshape(3, 4, 7), random_targets(12, 7).reshape(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:], mask[2, 0] = False, False
    for index in (-100, 6):
        ignored = torch.where(mask, t % 6, index)
        found = fc.sample_scores(x, ignored, ignore_index=index, backend=backend)
        expected = fc.sample_scores(x, t % 6, mask, backend=backend)
        for name in ("loss", "entropy", "margin", "el2n", "correct"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    half = torch.ones(3, 4, dtype=torch.uint8)
    half[1, 3] = 0
    both = fc.sample_scores(x, torch.where(mask, t, -100), half, backend=backend)
    assert torch.equal(both.loss, fc.sample_scores(x, t, mask & half.bool(), backend=backend).loss)
    with pytest.raises(
        ValueError, match="mask must keep at least one token of every sample, got none at sample 1"
    ):
        fc.sample_scores(x, t.index_fill(0, torch.tensor([1]), -100), backend=backend)


def test_wrong_margins_and_ignored_targets() -> None:
    x, t = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="unknown margin 'odds'; valid names: probability, logit"):
        fc.sample_scores(x, t, margin="odds")
    with pytest.raises(TypeError, match="ignore_index"):
        fc.sample_scores(x, t, ignore_index=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least two classes for margin 'logit'"):
        fc.sample_scores(x[:, :1], t * 0, margin="logit")
    with pytest.raises(ValueError, match=r"targets must be in \[0, 3\)"):
        fc.sample_scores(x, t - 100)
