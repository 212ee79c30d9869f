"""Zeroth-order gradients: the coefficients by their definition, the directions, and parameters that come back bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashcoreset as fc
from flashcoreset.gradients import zeroth_order

SEEDS = (0, 7, -3, 2**63 - 1)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 5, generator=generator).to(dtype), torch.arange(8) % 3


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y, reduction="none")


def gradients(loss_fn: Callable[[], Tensor], parameters: Any, **options: Any) -> fc.LowRankGradients:
    return fc.zeroth_order_gradients(loss_fn, parameters, **{"backend": "torch", **options})


def low_rank(*shape: int, seed: int, numel: int, dtype: torch.dtype = torch.float32) -> fc.LowRankGradients:
    generator = torch.Generator().manual_seed(2)
    return fc.LowRankGradients(torch.randn(shape, generator=generator, dtype=dtype), seed, numel, "torch")


@pytest.mark.parametrize("count", [1, 3])
def test_coefficients_follow_the_definition(count: int) -> None:
    """Compares with the formula, in float64, with the directions that the result names."""
    model, eps = network(torch.float64), 1e-3
    loss_fn = losses(model, *batch(torch.float64))
    g = gradients(loss_fn, model.parameters(), eps=eps, seed=5, n_perturbations=count)
    assert (g.seed, g.numel) == (5, sum(p.numel() for p in model.parameters()))
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    columns = []
    for z in g.directions():
        values = []
        for step in (eps, -eps):
            nn.utils.vector_to_parameters(start + step * z, model.parameters())
            values.append(loss_fn().detach())
        columns.append((values[0] - values[1]) / (2 * eps) / count)
    assert g.coefficients.dtype == torch.float64
    torch.testing.assert_close(g.coefficients, torch.stack(columns, 1), rtol=1e-10, atol=1e-12)


def test_coefficients_are_directional_derivatives() -> None:
    model = network()
    loss_fn = losses(model, *batch())
    g = gradients(loss_fn, model.parameters(), n_perturbations=400)
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in loss_fn()]
    exact = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    # The third derivative and float32's rounding of the losses, over 2 eps.
    torch.testing.assert_close(g.coefficients * 400, exact @ g.directions().T, rtol=2e-3, atol=2e-3)
    # An unbiased estimate: over 400 directions its error is about sqrt(57 / 400) of the gradient.
    off = (g.dense() - exact).norm() / exact.norm()
    assert off < 1.2 * (exact.shape[1] / 400) ** 0.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("numel", [1, 7, 97, 1025])
def test_directions_in_parts(seed: int, numel: int) -> None:
    g = low_rank(2, 3, seed=seed, numel=numel)
    whole = g.directions()
    assert whole.shape == (3, numel)
    for begin, end in itertools.product({0, numel // 3, numel - 1}, {numel // 2 + 1, numel}):
        if begin < end:
            assert torch.equal(g.directions(begin, end), whole[:, begin:end])


def test_directions_are_standard_normal_and_distinct() -> None:
    z = low_rank(1, 4, seed=1, numel=50_000, dtype=torch.float64).directions()
    other = low_rank(1, 4, seed=2, numel=50_000, dtype=torch.float64).directions()
    every = torch.cat([z, other])
    moments = every @ every.T / 50_000
    # 5 standard errors: sqrt(2 / n) for a mean square, sqrt(1 / n) for a mean product and for a mean.
    assert (moments - torch.eye(8)).abs().max() < 5 * (2 / 50_000) ** 0.5
    assert every.mean(1).abs().max() < 5 * 50_000**-0.5
    # A normal distribution has 4.55 % beyond 2 standard deviations.
    assert abs((every.abs() > 2).double().mean() - 0.0455) < 5 * (0.0455 / 400_000) ** 0.5


def test_directions_stay_the_same() -> None:
    """Across releases: coefficients that were stored belong to these numbers."""
    expected = torch.tensor([
        [0.482821167, -2.1157248, 0.871995091, 2.95313382, -0.623106897, 0.33868143],
        [1.58152521, 0.589677274, 1.55861688, -0.840708137, 1.26943099, 0.573478818],
    ])  # fmt: skip
    torch.testing.assert_close(low_rank(1, 2, seed=7, numel=6).directions(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense(dtype: torch.dtype) -> None:
    g = low_rank(4, 3, seed=9, numel=101, dtype=dtype)
    assert torch.equal(g.dense(), g.coefficients @ g.directions())
    assert g.dense().dtype == dtype


def test_one_sample_does_not_depend_on_the_others() -> None:
    model, (x, y) = network(torch.float64), batch(torch.float64)
    whole = gradients(losses(model, x, y), model.parameters())
    part = gradients(losses(model, x[2:4], y[2:4]), model.parameters())
    torch.testing.assert_close(whole.coefficients[2:4], part.coefficients, rtol=1e-9, atol=1e-9)


def snapshot(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def identical(tensors: list[Tensor], before: list[Tensor]) -> bool:
    # Bit for bit: as integers, so that NaN and the sign of 0 count.
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(now.detach().view(whole[now.element_size()]), then.view(whole[now.element_size()]))
        for now, then in zip(tensors, before, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_are_restored(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, 4, generator=generator).to(dtype),
        torch.randn(5, 2, generator=generator).to(dtype).T,
    ]
    tensors[0][0] = torch.tensor([-0.0, 1e-7, 60000.0, float("nan")], dtype=dtype)
    before = snapshot(tensors)
    seen: list[list[Tensor]] = []

    def loss_fn() -> Tensor:
        seen.append(snapshot(tensors))
        return tensors[1].float().sum(0)

    g = gradients(loss_fn, tensors, eps=0.01, n_perturbations=2)
    assert identical(tensors, before)
    assert len(seen) == 4
    assert not any(identical(moved, before) for moved in seen)
    assert g.coefficients.shape == (5, 2)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_parameters_are_restored_when_the_loss_raises(error: type[BaseException], call: int) -> None:
    model = network()
    tensors = list(model.parameters())
    before, calls = snapshot(tensors), itertools.count()

    def loss_fn() -> Tensor:
        if next(calls) == call:
            assert not identical(tensors, before)
            raise error
        return torch.zeros(2)

    with pytest.raises(error):
        gradients(loss_fn, tensors, n_perturbations=2)
    assert identical(tensors, before)


def test_an_interrupt_while_parameters_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = list(network().parameters())
    before, interrupts = snapshot(tensors), iter([True])
    plain = Tensor.copy_

    def copy_(target: Tensor, source: Tensor, *rest: Any) -> Tensor:
        if target is tensors[1] and torch.equal(source, before[1]) and next(interrupts, False):
            raise KeyboardInterrupt
        return plain(target, source, *rest)

    monkeypatch.setattr(Tensor, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt):
        gradients(lambda: torch.zeros(2), tensors)
    assert identical(tensors, before)


def test_parts_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    whole = gradients(losses(model, *batch()), model.parameters())
    monkeypatch.setattr(zeroth_order, "_CHUNK", 5)
    parts = gradients(losses(model, *batch()), model.parameters())
    assert torch.equal(whole.coefficients, parts.coefficients)


def test_both_calls_see_the_same_random_numbers() -> None:
    seen: list[float] = []

    def loss_fn() -> Tensor:
        seen.append(float(torch.rand(())))
        return torch.zeros(2)

    gradients(loss_fn, [torch.zeros(3)], n_perturbations=2)
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_autocast_sees_the_moved_parameters() -> None:
    """It keeps the parameters' copies in half precision for the whole of its block."""
    model, (x, y) = network(), batch()
    exact = gradients(losses(model, x, y), model.parameters(), eps=0.1).coefficients
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        rough = gradients(losses(model, x, y), model.parameters(), eps=0.1).coefficients
        assert torch.equal(model(x), before)
    # bfloat16's rounding of losses near 1, over 2 eps: 1 % of 1 / 0.2.
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.05)


def test_resample() -> None:
    model, options = network(), {"seed": 1234}
    loss_fn = losses(model, *batch())
    first, again = (gradients(loss_fn, model.parameters(), **options) for _ in range(2))
    assert torch.equal(first.coefficients, again.coefficients)
    other, another = (gradients(loss_fn, model.parameters(), resample=True, **options) for _ in range(2))
    assert len({first.seed, other.seed, another.seed}) == 3
    assert not torch.allclose(first.directions(), other.directions())
    repeated = gradients(loss_fn, model.parameters(), seed=another.seed)
    assert torch.equal(repeated.coefficients, another.coefficients)


def test_bad_input() -> None:
    tensor, loss_fn = torch.zeros(3), lambda: torch.zeros(2)
    for arguments, options, error, message in (
        ((3, [tensor]), {}, TypeError, "loss_fn must be a function without arguments, got int"),
        ((loss_fn, tensor), {}, TypeError, "parameters must be several tensors.*got Tensor"),
        ((loss_fn, nn.Linear(2, 2)), {}, TypeError, "parameters must be several tensors.*got Linear"),
        ((loss_fn, []), {}, ValueError, "at least one tensor"),
        ((loss_fn, [3]), {}, TypeError, "parameters must hold tensors, got int at position 0"),
        ((loss_fn, [tensor, torch.arange(3)]), {}, TypeError, "must be floating, got torch.int64 at position 1"),
        ((loss_fn, [tensor, tensor]), {}, ValueError, "each tensor once, got the one at position 1"),
        ((loss_fn, [tensor, tensor.detach()]), {}, ValueError, "the one at position 1, or its memory, before"),
        ((loss_fn, [tensor[:2], tensor[1:]]), {}, ValueError, "the one at position 1, or its memory, before"),
        ((loss_fn, [tensor[:1].expand(3)]), {}, ValueError, "got an expanded tensor at position 0"),
        ((loss_fn, [tensor.to_sparse()]), {}, TypeError, "must be dense tensors.*layout torch.sparse_coo at position 0"),
        ((loss_fn, [tensor.to("meta")]), {}, TypeError, "must be dense tensors.*got a meta tensor at position 0"),
        ((loss_fn, [torch.zeros(0)]), {}, ValueError, "at least one number"),
        ((loss_fn, [tensor]), {"eps": 0}, ValueError, "eps must be > 0, got 0"),
        ((loss_fn, [tensor]), {"eps": "1"}, TypeError, "eps must be a number"),
        ((loss_fn, [tensor]), {"seed": 2**63}, ValueError, "seed must be in the range of 64-bit integers"),
        ((loss_fn, [tensor]), {"n_perturbations": 0}, ValueError, "n_perturbations must be >= 1.*got 0"),
        ((loss_fn, [tensor]), {"resample": 1}, TypeError, "resample must be a bool, got 1"),
        ((loss_fn, [tensor]), {"backend": "gpu"}, ValueError, "unknown backend"),
        ((loss_fn, [tensor]), {"backend": "cuda"}, fc.BackendUnavailableError, "cuda"),
        ((lambda: 1.0, [tensor]), {}, TypeError, "loss_fn must return a floating tensor.*got float"),
        ((lambda: torch.arange(2), [tensor]), {}, TypeError, "got torch.int64"),
        ((lambda: torch.zeros(()), [tensor]), {}, ValueError, r"\[B\], got shape \(\) \(reduction='none'\?\)"),
        ((lambda: torch.tensor([0.0, float("nan")]), [tensor]), {}, ValueError, "got nan for sample 1"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            gradients(*arguments, **options)
        assert torch.equal(tensor, torch.zeros(3))
    sizes = iter([2, 3, 4, 4, 5, 5])
    with pytest.raises(ValueError, match="same number of losses each time, got 2 and 3"):
        gradients(lambda: torch.zeros(next(sizes)), [tensor])
    with pytest.raises(ValueError, match="same number of losses each time, got 4 and 5"):
        gradients(lambda: torch.zeros(next(sizes)), [tensor], n_perturbations=2)


def test_differences_that_overflow() -> None:
    tensor = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"eps must be large enough .* do not overflow torch.float32, got 1e-30"
    ):
        gradients(lambda: torch.full((2,), 1e30) * tensor[0].sign(), [tensor], eps=1e-30)
    assert torch.equal(tensor, torch.zeros(3))


def test_parts_of_one_tensor() -> None:
    """Slices that do not overlap, as of a flat buffer or the halves of a matrix, are parameters of their own."""
    generator = torch.Generator().manual_seed(0)
    flat, matrix, x = (torch.randn(shape, generator=generator) for shape in ((10,), (4, 6), (5, 10)))
    kept = flat.clone(), matrix.clone()

    def loss_fn() -> Tensor:
        return (x @ flat).square() + (x[:, :4] @ matrix).square().sum(1)

    parts = gradients(loss_fn, [flat[:3], flat[3:], matrix[:, :2], matrix[:, 2:]], seed=5)
    assert parts.numel == 34
    assert torch.equal(flat, kept[0])
    assert torch.equal(matrix, kept[1])


def test_bad_low_rank_gradients() -> None:
    c = torch.zeros(2, 1)
    for arguments, error, message in (
        (("numbers", 0, 3), TypeError, "coefficients must be a torch.Tensor"),
        ((c.half(), 0, 3), TypeError, "coefficients must have dtype float32 or float64, got torch.float16"),
        ((c[0], 0, 3), ValueError, r"coefficients must have shape \[B, q\], got \(1,\)"),
        ((c, 0.5, 3), TypeError, "seed must be an int"),
        ((c, 0, 0), ValueError, "numel must be >= 1 and below 2\\^63, got 0"),
        ((c, 0, 3, "gpu"), ValueError, "unknown backend"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fc.LowRankGradients(*arguments)
    g = fc.LowRankGradients(c, 0, 3)
    for begin, end in ((-1, 2), (2, 2), (0, 4)):
        with pytest.raises(ValueError, match=f"0 <= begin < end <= 3, got {begin} and {end}"):
            g.directions(begin, end)
