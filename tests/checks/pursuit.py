"""What every backend of matching pursuit and Frank-Wolfe is held to."""

from __future__ import annotations

import collections
import math
import signal
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flashcoreset as fc
from flashcoreset._core import native
from flashcoreset.kernels import PursuitProblem
from flashcoreset.pursuit import Pursuit, frank_wolfe, orthogonal_matching_pursuit, pursuit_bytes

# Largest relative error of a weight or a norm. Every backend computes in float64 and float32 results are rounded in the
# end. Worst seen: 3e-7 (rounding of a subnormal weight) and 2e-9 (a Gram matrix has the condition of the rows squared).
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-8}


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_rows(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """[rows, columns] float64."""
    x = normal(rows, columns, seed)
    if kind == "clustered":
        return 0.3 * x + normal(9, columns, seed + 1)[torch.arange(rows) % 9]
    if kind == "scaled":  # squares from 1e-6 to 1e6
        return x * torch.logspace(-3, 3, rows, dtype=torch.float64)[:, None]
    if kind == "repeated":  # duplicates, multiples and zeros
        generator = torch.Generator().manual_seed(seed + 2)
        picks = torch.randint(0, rows, (rows,), generator=generator)
        return x[picks] * torch.randint(0, 3, (rows, 1), generator=generator)
    return x


def make_target(rows: Tensor, whole: bool, seed: int = 0) -> Tensor:
    """The sum of the rows, or one to which weights below 0 would help."""
    if whole:
        return rows.double().sum(0)
    return rows.double().T @ normal(len(rows), 1, seed + 7)[:, 0]


def check_same(found: Pursuit, wanted: Pursuit, target: Tensor, dtype: torch.dtype) -> None:
    out = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[out]
    assert found.indices.dtype == torch.int64
    assert found.weights.dtype == found.residual_norms.dtype == out
    assert found.indices.tolist() == wanted.indices.tolist()
    torch.testing.assert_close(found.weights.cpu(), wanted.weights, rtol=tolerance, atol=1e-37)
    torch.testing.assert_close(
        found.residual_norms.cpu(), wanted.residual_norms, rtol=tolerance, atol=1e-10 * float(target.norm())
    )


def on_host(found: Pursuit) -> Pursuit:
    return Pursuit(found.indices.cpu(), found.weights.cpu(), found.residual_norms.cpu())


def check_equal(found: Pursuit, wanted: Pursuit) -> None:
    for name in ("indices", "weights", "residual_norms"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


def check_pursuit(
    backend: str, device: str, kind: str, dtype: torch.dtype, size: tuple[int, int], k: int
) -> None:
    """Compares with the definition, for the whole target and another, with weights of any sign and with a ridge."""
    g = make_rows(kind, *size).to(dtype)
    k = min(k, size[0])
    for whole in (True, False):
        target = make_target(g, whole)
        for options in (
            {},
            {"nonnegative": False},
            {"ridge": 0.3 * float(g.double().square().sum(1).mean())},
        ):
            found = orthogonal_matching_pursuit(
                g.to(device), target.to(device), k, backend=backend, **options
            )
            wanted = orthogonal_matching_pursuit(g, target, k, backend="torch", **options)
            check_same(found, wanted, target, dtype)


def check_frank_wolfe(
    backend: str, device: str, kind: str, dtype: torch.dtype, size: tuple[int, int], k: int
) -> None:
    g = make_rows(kind, *size).to(dtype)
    k = min(k, size[0])
    for whole in (True, False):
        target = make_target(g, whole)
        found = frank_wolfe(g.to(device), target.to(device), k, backend=backend)
        check_same(found, frank_wolfe(g, target, k, backend="torch"), target, dtype)


def check_by_hand(backend: str, device: str) -> None:
    g = torch.tensor([[1.0, 0, 0], [0, 2, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.float64, device=device)
    target = torch.tensor([3.0, 1, 2], dtype=torch.float64, device=device)
    # Products with the target: 3, 2, 4, 0. With the residual (1, -1, 2) they are 1, -2, 0, 0; then only the third of the
    # target's coordinates is left.
    found = orthogonal_matching_pursuit(g, target, 4, backend=backend)
    assert found.indices.tolist() == [2, 0]
    assert found.weights.tolist() == pytest.approx([1, 2])
    assert found.residual_norms.tolist() == pytest.approx([6**0.5, 2])
    found = orthogonal_matching_pursuit(g, target, 2, nonnegative=False, backend=backend)
    assert found.indices.tolist() == [2, 1]
    assert found.weights.tolist() == pytest.approx([3, -1])
    # With a ridge of 2 the first weight is 4 / (2 + 2).
    found = orthogonal_matching_pursuit(g, target, 1, ridge=2.0, backend=backend)
    assert found.weights.tolist() == pytest.approx([1])
    # The unit rows' cosines with the target are as 3, 1, 4 / sqrt(2).
    found = frank_wolfe(g, target, 1, backend=backend)
    assert (found.indices.tolist(), found.weights.tolist()) == ([0], pytest.approx([3]))
    # From the first row the geodesics to the second and the third are the same: without the third, nothing depends on
    # rounding.
    found = frank_wolfe(g[:2], target, 2, backend=backend)
    assert found.indices.tolist() == [0, 1]
    assert found.weights.tolist() == pytest.approx([3, 0.5])


def check_ties(backend: str, device: str, distinct_rows: int, k: int) -> None:
    """A duplicate may lie anywhere in a vector or a block of rows."""
    distinct = make_rows("normal", distinct_rows, distinct_rows + 10, seed=2)
    order = torch.randperm(5 * distinct_rows, generator=torch.Generator().manual_seed(0)) % distinct_rows
    g, target = distinct[order].to(device), distinct.sum(0).to(device)
    first = {int((order == i).nonzero()[0]) for i in range(distinct_rows)}
    for nonnegative in (True, False):
        found = orthogonal_matching_pursuit(g, target, k, nonnegative=nonnegative, backend=backend)
        assert len(found.indices) == k
        assert set(found.indices.tolist()) <= first
    assert set(frank_wolfe(g, target, k, backend=backend).indices.tolist()) <= first


def check_ends(backend: str, device: str) -> None:
    g = make_rows("normal", 80, 6).to(device)
    zero, one = torch.zeros(6, device=device), torch.ones(6, device=device)
    for nonnegative in (True, False):
        found = orthogonal_matching_pursuit(g, g.sum(0), 80, nonnegative=nonnegative, backend=backend)
        assert len(found.indices) == 6
        assert float(found.residual_norms[-1]) <= 1e-12 * float(g.sum(0).norm())
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        for rows, target in ((g, zero), (0 * g, one), (-g.abs(), one)):
            nothing = solve(rows, target, 5, backend=backend)
            assert [len(nothing.indices), len(nothing.weights), len(nothing.residual_norms)] == [0, 0, 0]


def check_nearly_dependent(backend: str, device: str, count: int) -> None:
    """Without the ridge; a ridge makes any rows independent."""
    g = make_rows("normal", count, count + 10)
    g = torch.cat([g, g * (1 + 1e-9)]).to(device)
    target = make_target(g.cpu(), True).to(device)
    found = orthogonal_matching_pursuit(g, target, 2 * count, nonnegative=False, backend=backend)
    assert sorted((found.indices % count).tolist()) == list(range(count))
    both = orthogonal_matching_pursuit(g, target, 2 * count, ridge=1.0, backend=backend)
    assert sorted(both.indices.tolist()) == list(range(2 * count))


def check_less_memory(
    module: ModuleType, device: str, size: tuple[int, int], k: int, columns: Sequence[int]
) -> None:
    """With room for so many columns; `k` of them are wanted."""
    g = make_rows("clustered", *size)
    target = make_target(g, False).to(device)
    g = g.to(device)
    budgets = [8 * size[0] * count for count in columns]
    for nonnegative in (True, False):
        problem = PursuitProblem(g, target, k, nonnegative, 0.1)
        many = on_host(module.orthogonal_matching_pursuit(problem))
        for budget in budgets:
            few = module.orthogonal_matching_pursuit(replace(problem, memory_budget=budget))
            check_same(few, many, target, torch.float64)
    problem = PursuitProblem(g, target, k)
    many = module.frank_wolfe(problem)
    for budget in budgets:
        check_equal(module.frank_wolfe(replace(problem, memory_budget=budget)), many)


def check_half_types(backend: str, device: str) -> None:
    target = torch.ones(30, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        g = make_rows("normal", 40, 30).to(device, dtype)
        for solve in (orthogonal_matching_pursuit, frank_wolfe):
            half = solve(g, target, 10, backend=backend)
            single = solve(g.float(), target, 10, backend=backend)
            assert torch.equal(half.indices, single.indices)
            assert torch.equal(half.weights, single.weights)


def check_views(backend: str, device: str) -> None:
    g = make_rows("normal", 20, 25).float().to(device)
    target = normal(25, 1)[:, 0].to(device)
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        wanted = solve(g, target, 4, backend=backend)
        wide, both = torch.cat([g, g], 1)[:, 3:28].roll(3, 1), torch.stack([target, target], 1)
        for rows in (g.T.contiguous().T, wide, torch.cat([g, g], 1)[:, :25], torch.cat([g, g])[:20]):
            found = solve(rows, both[:, 1], 4, backend=backend)
            assert torch.equal(found.indices, wanted.indices)
            assert torch.equal(found.weights, wanted.weights)


def check_opcheck_and_compile(name: str | None, device: str, k: int = 9) -> None:
    g, target = make_rows("normal", 12, 5).float().to(device), normal(5, 1)[:, 0].to(device)
    pursue, wolfe = (
        torch.ops.flashcoreset.orthogonal_matching_pursuit.default,
        torch.ops.flashcoreset.frank_wolfe.default,
    )
    torch.library.opcheck(pursue, (g, target, k, True, 0.0, name))
    torch.library.opcheck(pursue, (g.double(), target, min(k, 4), False, 0.5, name))
    torch.library.opcheck(wolfe, (g.half(), target, min(k, 4), name))

    def weighted(g: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        first = orthogonal_matching_pursuit(g * 2, target, k, backend=name)
        second = frank_wolfe(g * 2, target, k, backend=name)
        return first.indices * first.weights, second.weights

    torch._dynamo.reset()
    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")(g, target)
    for got, wanted in zip(compiled, weighted(g, target), strict=True):
        assert got.shape == (k,)  # padded, since a shape that depends on values would break the graph
        assert torch.equal(got[: len(wanted)], wanted)
        assert (got[len(wanted) :] == 0).all()


def check_bad_values(backend: str, device: str, value: float, dtype: torch.dtype) -> None:
    g, target = make_rows("normal", 9, 70).to(device, dtype), torch.ones(70, device=device)
    said = "NaN" if math.isnan(value) else str(value)
    bad, bad_target = g.clone(), target.clone()
    bad[[4, 6], 66] = value
    bad_target[[3, 50]] = value
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        with pytest.raises(ValueError, match=rf"^g must be finite, got {said} at row 4, column 66$"):
            solve(bad, target, 3, backend=backend)
        with pytest.raises(ValueError, match=rf"^target must be finite, got {said} at position 3$"):
            solve(g, bad_target, 3, backend=backend)


def check_overflow(backend: str, device: str) -> None:
    g = make_rows("normal", 5, 4).to(device)
    one = torch.ones(4, dtype=torch.float64, device=device)
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        with pytest.raises(ValueError, match=r"weights of up to .* overflow torch.float32"):
            solve(1e-30 * g.float(), 1e30 * one, 2, backend=backend)


def check_weights_that_round_to_zero(backend: str, device: str) -> None:
    """A weight of 1e-50 is none in float32, so its row is no pick; in float64 it is."""
    for dtype, expected in ((torch.float32, [1]), (torch.float64, [0, 1])):
        g = torch.tensor([[1e30, 0.0], [0.0, 1e-30]], dtype=dtype, device=device)
        target = torch.tensor([1e-20, 1e-20], dtype=torch.float64, device=device)
        for solve in (orthogonal_matching_pursuit, frank_wolfe):
            found = solve(g, target, 2, backend=backend)
            assert sorted(found.indices.tolist()) == expected
            assert found.weights.all()


G, GOAL = torch.ones(4, 3), torch.ones(3)


def check_needs_the_cpu_module(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernels of a GPU find the picks, the CPU module fits their weights."""
    monkeypatch.setattr(native, "failure", lambda: "no compiled CPU module could be loaded")
    said = f"backend '{backend}': of pursuit the weights are fitted on the host, .* no compiled CPU module"
    for solve in (orthogonal_matching_pursuit, frank_wolfe):
        with pytest.raises(fc.BackendUnavailableError, match=said):
            solve(G.to(device), GOAL.to(device), 1, backend=backend)


def check_match_gradients(backend: str, device: str) -> None:
    """By rows, with Adam's history and groups, and by the directions of zeroth-order gradients."""
    g, groups = normal(24, 300, seed=1), torch.arange(24) % 2
    state = fc.AdamState(0.1 * normal(1, 300, seed=3)[0], normal(1, 300, seed=4)[0].square(), 5)
    there = fc.AdamState(state.m.to(device), state.v.to(device), 5)
    for method in ("omp", "frank_wolfe"):
        wanted = fc.match_gradients(
            g, 5, normalize=state, top=40, method=method, groups=groups, backend="cpu"
        )
        found = fc.match_gradients(
            g.to(device), 5, normalize=there, top=40, method=method, groups=groups.to(device), backend=backend
        )
        assert found.indices.tolist() == wanted.indices.tolist()
        torch.testing.assert_close(found.weights.cpu(), wanted.weights, rtol=1e-9, atol=0)
        assert found.objective == pytest.approx(wanted.objective, rel=1e-9)
        shared = fc.LowRankGradients(normal(9, 3), seed=5, numel=2_000, backend="cpu")
        wanted = fc.match_gradients(shared, 3, method=method, backend="cpu")
        shared = fc.LowRankGradients(normal(9, 3).to(device), seed=5, numel=2_000, backend=backend)
        found = fc.match_gradients(shared, 3, method=method, backend=backend)
        assert found.indices.tolist() == wanted.indices.tolist()
        torch.testing.assert_close(found.weights.cpu(), wanted.weights, rtol=1e-6, atol=0)


class Allocations(TorchDispatchMode):
    """The bytes of the largest of torch's storages that come into being inside, and of all that live at the same time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.tensors = collections.Counter(tensor.untyped_storage().data_ptr() for tensor in known)
        self.largest = self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if not self.tensors[storage.data_ptr()]:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                self.largest = max(self.largest, storage.nbytes())
            self.tensors[storage.data_ptr()] += 1
            weakref.finalize(leaf, self._ends, storage.data_ptr(), storage.nbytes())
        return out

    def _ends(self, place: int, size: int) -> None:
        self.tensors[place] -= 1
        if not self.tensors[place]:
            self.now -= size


def check_memory(module: ModuleType, device: str) -> None:
    """Columns within the budget, numbers per row and column, and nothing of the size of the rows."""
    b, d, k, columns = 60, 2_000, 5, 7
    g, target = make_rows("normal", b, d).to(device), torch.ones(d, dtype=torch.float64, device=device)
    for solve in (module.orthogonal_matching_pursuit, module.frank_wolfe):
        for budget in (8 * b * columns, 0):
            with Allocations(g, target) as seen:
                solve(PursuitProblem(g, target, k, memory_budget=budget))
            assert seen.largest <= max(8 * d, 8 * b * columns)
        with Allocations(g, target) as seen:  # much is allowed, little is needed
            solve(PursuitProblem(g, target, k, memory_budget=2**40))
        assert seen.largest <= max(8 * d, 8 * b * (2 * k + 12))
        name, orthogonal = module.__name__.rpartition(".")[2], solve is module.orthogonal_matching_pursuit
        expected = pursuit_bytes(b, d, k, g.dtype, orthogonal, name) - 2**20
        assert seen.peak <= expected <= 2.5 * seen.peak


def check_interrupt(module: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is handled between two steps."""
    g = make_rows("normal", 20, 9).to(device)
    launchers, calls = module._PURSUIT, [0]

    def products(*arguments: Any) -> None:
        launchers.products(*arguments)
        calls[0] += 1
        if calls[0] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "_PURSUIT", replace(launchers, products=products))
    for solve in (module.orthogonal_matching_pursuit, module.frank_wolfe):
        calls[0] = 0
        with pytest.raises(KeyboardInterrupt):
            solve(PursuitProblem(g, g.sum(0), 9, memory_budget=0))
        assert calls[0] == 3
