"""What every backend of gradient matching is held to."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcoreset as fc
from flashcoreset import kernels
from flashcoreset.kernels import Gradients, UpdatesProblem
from flashcoreset.matching.rule import Rule

BETAS, EPS = (0.9, 0.999), 1e-8


Check = Callable[[str, str], None]


# Triton's interpreter is NumPy, which warns of overflow and NaN that are meant to happen.
QUIET = {"over": "ignore", "invalid": "ignore"}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kernels_of(backend: str) -> ModuleType:
    return importlib.import_module(f"flashcoreset.kernels.{backend}")


def history(m: Tensor, v: Tensor, step: int, eps: float = EPS) -> fc.AdamState:
    return fc.AdamState(m, v, step, BETAS, eps)


def moved(problem: UpdatesProblem, device: str) -> UpdatesProblem:
    """The problem with its tensors on the device."""
    g, h = problem.g, problem.history
    there = None if h is None else dataclasses.replace(h, m=h.m.to(device), v=h.v.to(device))
    return UpdatesProblem(
        Gradients(g.values.to(device), g.seed, g.length), there, problem.member.to(device),
        problem.offset.to(device), problem.top,
    )  # fmt: skip


def in_float64(problem: UpdatesProblem) -> UpdatesProblem:
    h = problem.history
    exact = None if h is None else dataclasses.replace(h, m=h.m.double(), v=h.v.double())
    return dataclasses.replace(problem, g=Gradients(problem.g.values.double()), history=exact)


def greedy_medoids(distance: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    """Facility location with the distances' largest value as offset, written out; cluster sizes."""
    similarity = distance.max() - distance
    covered, picks = np.zeros(len(distance)), []
    for _ in range(k):
        gains = np.maximum(similarity - covered, 0).sum(1)
        gains[picks] = -1
        picks.append(int(gains.argmax()))
        covered = np.maximum(covered, similarity[picks[-1]])
    nearest = similarity[picks].argmax(0)
    nearest[picks] = np.arange(k)
    return picks, np.bincount(nearest, minlength=k).astype(float).tolist()


class Restated:
    """One step of the method, every matrix formed."""

    def __init__(self, numel: int) -> None:
        self.m, self.v, self.t = np.zeros(numel), np.zeros(numel), 0

    def step(self, g: np.ndarray, groups: np.ndarray, budgets: dict[int, int], top: int) -> dict[str, Any]:
        self.t += 1
        m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        u = m / (1 - BETAS[0] ** self.t) / (np.sqrt(v / (1 - BETAS[1] ** self.t)) + EPS)
        picks, weights, dims = [], [], []
        for label in sorted(budgets):
            rows = np.flatnonzero(groups == label)
            order = np.argsort(-np.abs(u[rows].mean(0)), kind="stable")[:top]
            part = u[rows][:, order]
            found, sizes = greedy_medoids(np.abs(part[:, None] - part[None]).sum(2), budgets[label])
            picks += rows[found].tolist()
            weights += sizes
            dims.append(order.tolist())
        self.m, self.v = m[picks].mean(0), v[picks].mean(0)
        return {"picks": picks, "weights": weights, "dims": dims}


def check_steps(
    backend: str,
    device: str,
    kind: str,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    budgets: dict[int, int],
    steps: int = 20,
) -> None:
    # Few picks of many: if a candidate would serve one other alone, the two are an exact tie.
    count, numel, top = size
    groups = torch.arange(count) * 7 % len(budgets)
    restated = Restated(numel)
    zero = torch.zeros(numel, dtype=dtype, device=device)
    state: Any = fc.AdamState(zero, zero, 1, BETAS, EPS)
    for step in range(steps):
        if kind == "dense":
            rows = normal(count, numel, seed=step, dtype=dtype)
            g: Any = rows.to(device)
        else:
            c = normal(count, 2, seed=step, dtype=dtype)
            rows = c.double() @ fc.LowRankGradients(c, step, numel, "torch").directions().double()
            g = fc.LowRankGradients(c.to(device), seed=step, numel=numel)
        # Steps with the first history 0 are ties throughout, so the restatement goes on from ours.
        expected = restated.step(rows.double().numpy(), groups.numpy(), budgets, top)
        found = fc.match_gradients(
            g, None, normalize=state, top=top, groups=groups.to(device), budgets=budgets, backend=backend
        )
        state = found.state
        assert state.step == step + 2
        assert state.m.device.type == device
        assert found.dims.shape == (len(budgets), top)
        if step == 0:
            assert found.weights.sum() == count
            chosen = rows[found.indices.cpu()].double().numpy()
            restated.m = (1 - BETAS[0]) * chosen.mean(0)
            restated.v = (1 - BETAS[1]) * (chosen**2).mean(0)
        else:
            assert found.dims.tolist() == expected["dims"]
            assert found.indices.tolist() == expected["picks"]
            assert found.weights.tolist() == expected["weights"]
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert np.abs(state.m.cpu().double().numpy() - restated.m).max() <= tolerance
        assert np.abs(state.v.cpu().double().numpy() - restated.v).max() <= tolerance


SIZES = [(1, 1, 1), (7, 97, 13), (33, 1_025, 1_025), (5, 5_000, 100)]  # gradients, D, top


def check_kernels(
    backend: str, device: str, size: tuple[int, int, int], step: int | None, dtype: torch.dtype
) -> None:
    count, numel, top = size
    g = normal(count, numel, dtype=dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    past = None
    if step is not None:
        past = history(
            0.1 * normal(numel, seed=1, dtype=exact), normal(numel, seed=2, dtype=exact).square(), step
        )
    member = torch.arange(count).flip(0)
    offset = torch.tensor([0, (count + 1) // 2, count] if count > 1 else [0, 1])
    kernel, problem = kernels_of(backend), UpdatesProblem(Gradients(g), past, member, offset, top)
    ours, wanted = moved(problem, device), in_float64(problem)
    dims, u = kernel.top_updates(ours)
    expected_dims, expected_u = kernels.torch.top_updates(wanted)
    assert torch.equal(dims.cpu(), expected_dims)
    assert torch.allclose(u.cpu(), expected_u, rtol=1e-13, atol=1e-13)
    if past is not None:
        for found, theirs in zip(
            kernel.update_history(ours.g, ours.history, ours.member),
            kernels.torch.update_history(wanted.g, wanted.history, member),
            strict=True,
        ):
            assert found.dtype == exact
            assert torch.allclose(
                found.cpu().double(), theirs, rtol=2e-7 if exact == torch.float32 else 1e-14, atol=1e-15
            )


def check_low_rank(backend: str, device: str, q: int, dtype: torch.dtype, numel: int) -> None:
    c = normal(19, q, dtype=dtype)
    rows = c.double() @ fc.LowRankGradients(c, -4, numel, "torch").directions().double()
    past = history(0.1 * normal(numel, seed=1, dtype=dtype), normal(numel, seed=2, dtype=dtype).square(), 4)
    member, offset = torch.arange(19), torch.tensor([0, 6, 19])
    kernel = kernels_of(backend)
    for before in (None, past):
        problem = UpdatesProblem(Gradients(c, -4, numel), before, member, offset, 40)
        ours, wanted = moved(problem, device), in_float64(dataclasses.replace(problem, g=Gradients(rows)))
        dims, u = kernel.top_updates(ours)
        expected_dims, expected_u = kernels.torch.top_updates(wanted)
        assert torch.equal(dims.cpu(), expected_dims)
        # Normal numbers of float32 that are rounded the other way are off by one in 2^23 (none was seen).
        assert torch.allclose(u.cpu(), expected_u, rtol=1e-12, atol=1e-12)
    found = kernel.update_history(ours.g, ours.history, ours.member[::3])
    expected = kernels.torch.update_history(wanted.g, wanted.history, member[::3])
    for got, theirs in zip(found, expected, strict=True):
        assert torch.allclose(
            got.cpu().double(), theirs, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-9
        )


def check_ties(backend: str, device: str) -> None:
    kernel = kernels_of(backend)

    def dims_of(g: Tensor, past: fc.AdamState | None, top: int) -> Tensor:
        problem = UpdatesProblem(Gradients(g), past, torch.arange(4), torch.tensor([0, 4]), top)
        dims, u = kernel.top_updates(moved(problem, device))
        assert past is None or not u.any()
        return dims

    g = torch.ones(4, 9_000)
    g[:, 7_777] = -2
    assert dims_of(g, None, 5).tolist() == [[7_777, 0, 1, 2, 3]]
    # More of them than a list holds, some below and some above the others.
    g[:, 1:8_000:3], g[:, 5:8_000:3] = 3, 0.5
    expected = [*range(1, 8_000, 3), *(d for d in range(9_000) if g[0, d] == -2)]
    expected += [d for d in range(9_000) if g[0, d] == 1]
    assert dims_of(g, None, 2_700).tolist() == [expected[:2_700]]
    zero = torch.zeros(9_000)
    assert dims_of(torch.zeros(4, 9_000), history(zero, zero, 1), 5).tolist() == [[0, 1, 2, 3, 4]]


def check_close_calls(backend: str, device: str) -> None:
    """Means that differ by less than float32 sees, in shuffled order."""
    numel, count, top = 9_001, 8, 1_000
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(numel, generator=generator)
    m = (1 + 3e-8 * order.double()).float()
    g = torch.ones(count, numel)
    v = torch.ones(numel)
    rule = Rule.adam(3, BETAS, EPS)
    member, offset = torch.arange(count), torch.tensor([0, count])

    def check_dims() -> Tensor:
        problem = UpdatesProblem(Gradients(g), history(m, v, 3), member, offset, top)
        dims, _ = kernels_of(backend).top_updates(moved(problem, device))
        expected, _ = kernels.torch.top_updates(in_float64(problem))
        assert torch.equal(dims.cpu(), expected)
        return expected

    check_dims()
    # A list whose least mean is that of all other dimensions but for a few parts in 10^8; float32 may round it either way.
    early = torch.arange(numel) < 4_096
    for low in (1.0, 1.1, 1.2, 1.3):
        m = torch.where(torch.arange(numel) < 500, 2.0, low)
        m[~early] = low + torch.rand(int((~early).sum()), generator=generator)
        least = float(rule.updates(g[0, 0].double(), torch.tensor(low).double(), torch.ones(1).double()))
        root = (rule.m_scale * m.double() + rule.m_step) / least - rule.eps
        v = torch.where(early, 1.0, ((root.square() - rule.v_step) / rule.v_scale).float())
        assert (check_dims()[:, 500:] >= 4_096).all()


@np.errstate(**QUIET)
def check_large(backend: str, device: str) -> None:
    numel = 9_000
    g, m, v = torch.zeros(4, numel), torch.linspace(1, 2, numel), torch.ones(numel)
    g[:, 8_000] = 6e20
    problem = UpdatesProblem(Gradients(g), history(m, v, 2_000), torch.arange(4), torch.tensor([0, 4]), 3)
    dims, u = kernels_of(backend).top_updates(moved(problem, device))
    assert dims.tolist() == [[8_000, 8_999, 8_998]]
    expected = problem.rule.updates(g.double(), m.double(), v.double())[:, dims[0].cpu()]
    assert torch.allclose(u.cpu(), expected, rtol=1e-13)


def check_cancellation(backend: str, device: str) -> None:
    """A gradient c z that float32 makes 0 where it is not, in the one dimension without a history."""
    numel = 9_000
    z = fc.LowRankGradients(torch.ones(1, 2), 3, numel, "torch").directions()
    other = torch.nextafter(-z[0], torch.tensor(torch.inf))
    exact = (z[1].double() * z[0] + other.double() * z[1]).abs()
    vanishing = torch.where(z[1] * z[0] + other * z[1] == 0, exact, 0)
    vanishing[:5_000] = 0  # once there is a bar
    d = int(vanishing.argmax())
    assert vanishing[d] > 1e-8
    c = torch.stack([z[1, d], other[d]])[None]
    m, v = torch.zeros(numel), torch.ones(numel)
    v[d] = 0
    past = history(m, v, 2_000, 1e-10)
    problem = UpdatesProblem(Gradients(c, 3, numel), past, torch.arange(1), torch.tensor([0, 1]), 5)
    expected, _ = kernels.torch.top_updates(problem)
    assert expected[0, 0] == d
    dims, _ = kernels_of(backend).top_updates(moved(problem, device))
    assert torch.equal(dims.cpu(), expected)


def check_all_dimensions(backend: str, device: str, metric: str, normalize: bool) -> None:
    numel = 700
    g = normal(24, numel).to(device)
    groups = torch.arange(24, device=device) % 2
    state = None
    if normalize:
        m, v = 0.1 * normal(numel, seed=3).to(device), normal(numel, seed=4).square().to(device)
        state = fc.AdamState(m, v, 5)
    found = fc.match_gradients(g, 4, normalize=state, groups=groups, metric=metric, backend=backend)
    rows = g if state is None else Rule.adam(5, BETAS, EPS).updates(g, state.m, state.v)
    expected = fc.facility_location(rows, 4, groups=groups, metric=metric, backend="torch")
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.assignment, expected.assignment)
    assert found.dims is None
    if metric in ("cosine", "dot"):
        assert torch.allclose(found.gains, expected.gains, rtol=1e-9)
        assert found.objective == pytest.approx(expected.objective, rel=1e-9)
    else:
        assert found.offset is not None


def check_another_direction(backend: str, device: str) -> None:
    history = fc.RankOneAdamState(500, mean=0.4, mean_square=1.5, seed=3, step=4)
    c = normal(10, 1)
    g = fc.LowRankGradients(c.to(device), seed=8, numel=500, backend=backend)
    found = fc.match_gradients(g, 3, normalize=history, top=50, backend=backend)
    expected = fc.match_gradients(
        fc.LowRankGradients(c, 8, 500), 3, normalize=history.dense(torch.float64), top=50, backend="torch"
    )
    assert isinstance(found.state, fc.AdamState)
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert torch.allclose(found.state.m.cpu(), expected.state.m, rtol=1e-12)


@np.errstate(**QUIET)
def check_bad_values(backend: str, device: str, bad: float) -> None:
    g = normal(6, 9_000, dtype=torch.float32).to(device)
    zero, one = torch.zeros(9_000, device=device), torch.ones(9_000, device=device)
    state = fc.AdamState(zero, one, 2)
    broken = g.clone()
    broken[3, 8_000] = bad
    for normalize in (None, state):
        with pytest.raises(ValueError, match=r"g must be finite, got (nan|NaN|inf) at row 3, column 8000"):
            fc.match_gradients(broken, 2, top=5, normalize=normalize, backend=backend)
    m, v = zero.clone(), one.clone()
    m[7] = bad
    with pytest.raises(ValueError, match=r"normalize: m must be finite, got (NaN|inf) at position 7"):
        fc.match_gradients(g, 2, top=5, normalize=fc.AdamState(m, v, 2), backend=backend)
    # Also if no mean shows it.
    bad_v = one.clone()
    bad_v[8_000] = -1
    history = fc.AdamState(zero, bad_v, 2, (0.9, 0.0))
    with pytest.raises(ValueError, match=r"v must be finite and >= 0, got -.* at position 8000"):
        fc.match_gradients(g, 2, top=5, normalize=history, backend=backend)
    v[8] = -1
    with pytest.raises(ValueError, match=r"normalize: v must be finite and >= 0, got -1.* at position 8"):
        fc.match_gradients(g, 2, top=5, normalize=fc.AdamState(zero, v, 2), backend=backend)
    coefficients = torch.ones(4, 1, device=device)
    coefficients[2] = bad
    with pytest.raises(ValueError, match=r"g.coefficients must be finite"):
        fc.match_gradients(fc.LowRankGradients(coefficients, 0, 100), 2, top=5, backend=backend)


@np.errstate(**QUIET)
def check_overflow(backend: str, device: str) -> None:
    zero = torch.zeros(5, device=device)
    state = fc.AdamState(zero, zero, 1)
    with pytest.raises(ValueError, match="overflow"):
        fc.match_gradients(
            torch.full((4, 5), 1e30, device=device), 2, top=2, normalize=state, backend=backend
        )


def check_directions(backend: str, device: str) -> None:
    """To two units in the last place: logarithms differ."""
    for dtype, (begin, length, first) in itertools.product(
        (torch.float32, torch.float64),
        ((0, 1, 0), (5, 1_001, 2), (2**40 + 3, 70, 0), (3, 9_000, 2**32 - 2)),
    ):
        ours = torch.full((2, length + 2), 9.0, dtype=dtype, device=device)
        theirs = torch.empty(2, length, dtype=dtype)
        kernels_of(backend).directions(ours[:, 1:-1], seed=-9, begin=begin, first=first)
        kernels.torch.directions(theirs, seed=-9, begin=begin, first=first)
        found = ours[:, 1:-1].cpu()
        assert np.abs(found.float().numpy().view(np.int32) - theirs.float().numpy().view(np.int32)).max() <= 2
        assert (ours[:, 0] == 9).all()
        assert (ours[:, -1] == 9).all()


def check_zeroth_order(backend: str, device: str) -> None:
    """The parameters move along the directions that come back, and these are matched."""
    x = normal(12, 50, dtype=torch.float32)
    results = []
    for name, where in ((backend, device), ("torch", "cpu")):
        weight, inputs = torch.zeros(50, device=where), x.to(where)
        g = fc.zeroth_order_gradients(
            lambda weight=weight, inputs=inputs: inputs @ weight,
            [weight],
            seed=3,
            n_perturbations=2,
            backend=name,
        )
        results.append(g)
        assert not weight.any()
    ours, theirs = results
    assert ours.coefficients.device.type == device
    assert torch.allclose(ours.coefficients.cpu(), theirs.coefficients, rtol=1e-4, atol=1e-4)
    assert torch.allclose(ours.directions(7, 40).cpu(), theirs.directions(7, 40), rtol=1e-6)
    assert torch.allclose(ours.dense().cpu(), x @ theirs.directions().T @ theirs.directions() / 2, atol=1e-2)
    found = fc.match_gradients(ours, 3, top=20, backend=backend)
    same = fc.LowRankGradients(ours.coefficients.cpu(), 3, 50)
    expected = fc.match_gradients(same, 3, top=20, backend="torch")
    assert torch.equal(found.dims.cpu(), expected.dims)
    assert torch.equal(found.indices.cpu(), expected.indices)


def check(function: Callable[..., None], *arguments: Any) -> Any:
    """`function(backend, device, *arguments)` as an entry of CHECKS; its id is the function's name and the arguments."""
    name = function.__name__.removeprefix("check_").replace("_", " ")
    told = "-".join(str(argument).removeprefix("torch.") for argument in arguments)
    return pytest.param(
        lambda backend, device: function(backend, device, *arguments), id=f"{name}-{told}".rstrip("-")
    )


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# The checks of every backend, as check(backend, device): the test modules of gradient matching run them.
# Sizes are such that Triton's interpreter can do them.
CHECKS = [
    *(
        check(check_kernels, size, step, dtype)
        for size, step, dtype in itertools.product(SIZES, (None, 9), DTYPES)
    ),
    *(check(check_kernels, (7, 97, 13), 1, dtype) for dtype in DTYPES),
    *(
        check(check_low_rank, q, dtype, 5_001)
        for q, dtype in itertools.product((1, 3), (torch.float32, torch.float64))
    ),
    *(check(check_steps, kind, torch.float32, (32, 401, 40), {0: 2, 1: 2}) for kind in ("dense", "low rank")),
    *(check(check_all_dimensions, metric, True) for metric in ("l1", "cosine")),
    *(check(check_bad_values, bad) for bad in (math.nan, math.inf)),
    check(check_ties),
    check(check_close_calls),
    check(check_large),
    check(check_cancellation),
    check(check_another_direction),
    check(check_directions),
    check(check_overflow),
    check(check_zeroth_order),
]
