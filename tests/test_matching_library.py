"""match_gradients as a torch op: schema, fake kernel, torch.compile without a graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICE, on_device
from torch import Tensor

import flashcoreset as fc

OP = torch.ops.flashcoreset.match_gradients.default
LABELS = torch.arange(12) % 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(**changes: Any) -> tuple[Any, ...]:
    plain: dict[str, Any] = {
        "g": normal(12, 9), "length": None, "seed": 0, "directions": None, "k": 4, "m": None, "v": None, "step": 1,
        "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "top": None, "groups": None, "labels": None, "budgets": None,
        "metric": "l1", "method": "medoid", "nonnegative": True, "ridge": 0.0, "backend": None,
    }  # fmt: skip
    return tuple(on_device(value) for value in (plain | changes).values())


HISTORY = {"m": normal(9, seed=1), "v": normal(9, seed=2).square(), "step": 3}
BUDGETS = {"groups": LABELS, "labels": torch.arange(3), "budgets": torch.tensor([2, 0, 3]), "k": 5}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backend": "torch", "g": normal(12, 9).double(), "metric": "cosine"},
        {"g": normal(12, 9).half(), "top": 3, **HISTORY},
        {"g": normal(12, 2), "length": 9, "seed": -7, "top": 5, **HISTORY, **BUDGETS},
        {"method": "omp", "ridge": 0.1, "top": 4, "groups": LABELS},
        {"method": "omp", "g": torch.zeros(12, 9), **HISTORY},
        {"method": "frank_wolfe", **HISTORY},
        {"method": "caratheodory", "g": normal(12, 2), "groups": LABELS, "k": 9},
        {"method": "caratheodory", "g": normal(12, 2)},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)  # fmt: skip
def test_opcheck(changes: dict[str, Any]) -> None:
    torch.library.opcheck(OP, arguments(**changes))


@pytest.mark.parametrize("backend", ["cpu" if DEVICE == "cpu" else "cuda", "torch"])
@pytest.mark.parametrize("method", ["medoid", "omp"])
def test_compile_without_a_graph_break(method: str, backend: str) -> None:
    """Two steps in one graph; the second goes on from the history of the first."""
    g, m, v = (on_device(t) for t in (normal(20, 30), normal(30, seed=1), normal(30, seed=2).square()))
    groups = on_device(torch.arange(20) % 2)

    def steps(g: Tensor, m: Tensor, v: Tensor, groups: Tensor) -> tuple[fc.Selection, fc.Selection, Tensor]:
        first = fc.match_gradients(
            g * 2,
            None,
            normalize=fc.AdamState(m * 1, v * 1, 3, eps=1e-6),
            top=7,
            groups=groups,
            budgets={0: 3, 1: 2},
            method=method,
            backend=backend,
        )
        shared = fc.LowRankGradients(g[:, :2], seed=5, numel=30, backend=backend)
        second = fc.match_gradients(shared, 4, normalize=first.state, method=method, backend=backend)
        return first, second, g[first.indices] * first.weights[:, None] + shared.dense()[first.indices]

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")(g, m, v, groups)
    eager = steps(g, m, v, groups)
    torch.testing.assert_close(compiled[2], eager[2])
    for found, expected in zip(compiled[:2], eager[:2], strict=True):
        for name in ("indices", "gains", "weights", "assignment"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        # The last bit of the reference's fits, by LAPACK, depends on where a matrix lies in memory.
        assert found.objective == pytest.approx(expected.objective, rel=1e-12)
        assert isinstance(found.objective, float)
        assert found.offset == expected.offset
        assert torch.equal(found.state.m, expected.state.m)
        assert torch.equal(found.state.v, expected.state.v)
        assert (found.state.step, found.state.eps) == (expected.state.step, 1e-6)
    assert torch.equal(compiled[0].dims, eager[0].dims)
    assert compiled[1].dims is None


def test_compile_takes_labels_of_any_integer_type() -> None:
    g, labels = on_device(normal(12, 9)), on_device(LABELS.to(torch.uint64))
    expected = fc.match_gradients(g, 5, groups=labels).indices
    torch._dynamo.reset()
    choose = torch.compile(
        lambda g, groups: fc.match_gradients(g, 5, groups=groups).indices, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(choose(g, labels), expected)


def test_compile_says_which_history_it_takes() -> None:
    g = on_device(normal(6, 1))

    def choose(c: Tensor) -> Tensor:
        shared = fc.LowRankGradients(c, seed=1, numel=9)
        return fc.match_gradients(shared, 2, normalize=fc.RankOneAdamState(9)).indices

    torch._dynamo.reset()
    with pytest.raises(Exception, match="normalize must be an AdamState in a function"):
        torch.compile(choose, fullgraph=True, backend="eager")(g)


def test_errors_of_values_come_while_running() -> None:
    torch._dynamo.reset()
    choose = torch.compile(lambda g: fc.match_gradients(g, 1).indices, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="g must be finite, got NaN at row 0, column 1"):
        choose(on_device(torch.tensor([[1.0, float("nan")]])))


def test_the_op_checks_its_arguments() -> None:
    for changes, words in (
        ({"method": "q"}, "method 'q'"),
        ({"m": normal(9)}, "m and v must be given together"),
        ({"m": normal(9), "v": normal(9).abs(), "step": 0}, "step must be >= 1"),
        ({"k": 60}, "k must be at most"),
        ({"top": 10}, "top must be in"),
        ({"length": 0}, "numel must be >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            OP(*arguments(**changes))


def test_fake_and_meta_tensors_give_shapes() -> None:
    state = fc.AdamState(*(torch.empty(40, dtype=torch.float64, device="meta") for _ in "mv"), step=2)
    found = fc.match_gradients(
        torch.empty(50, 40, dtype=torch.float64, device="meta"), 6, normalize=state, top=8
    )
    assert (found.indices.shape, found.gains.dtype, found.assignment.shape) == ((6,), torch.float64, (50,))
    assert (found.dims.shape, found.state.m.shape, found.state.step) == ((1, 8), (40,), 3)
    assert found.indices.is_meta


def test_directions_are_an_op() -> None:
    torch.library.opcheck(
        torch.ops.flashcoreset.directions.default, (on_device(normal(4, 3)), -2, 5, 17, None)
    )
