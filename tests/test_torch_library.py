"""facility_location as a torch op: schema, fake kernel, torch.compile without a graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICE, METRICS, data, on_device, points

import flashcoreset as fc

OP = torch.ops.flashcoreset.facility_location.default


def arguments(**changes: Any) -> tuple[Any, ...]:
    plain: dict[str, Any] = {
        "x": points(12, 3, 0, torch.float32), "crow": None, "col": None, "columns": 0, "k": 4, "clients": None,
        "metric": "cosine", "weights": None, "groups": None, "labels": None, "budgets": None, "preselected": None,
        "method": "lazy", "epsilon": 0.1, "seed": "0", "offset": None, "memory_budget": 2**28, "backend": None,
        "costs": None, "cost_budget": None, "cost_sensitive": True, "stop_gain": None, "exclude": None, "cap_labels": None, "caps": None,
        "min_distance": None, "rounds": 1,
    }  # fmt: skip
    return tuple(on_device(value) for value in (plain | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backend": "torch"},
        {"x": points(12, 3, 0)},
        {"x": points(12, 3, 0, torch.float16), "metric": "l1", "offset": 20.0},
        {"x": points(12, 5, 0), "metric": "precomputed", "weights": torch.ones(5, dtype=torch.float64)},
        {"clients": points(5, 3, 1, torch.float32), "metric": "euclidean", "preselected": torch.tensor([3])},
        {"groups": torch.arange(12) % 2, "labels": torch.arange(2), "budgets": torch.tensor([1, 3])},
        {
            "x": torch.ones(3), "crow": torch.tensor([0, 1, 2, 3]), "col": torch.tensor([0, 2, 5]), "columns": 6,
            "k": 2, "metric": "precomputed",
        },
        {"method": "stochastic", "seed": str(2**64 - 1)},
        {"costs": torch.arange(1, 13).double(), "exclude": torch.tensor([0, 5])},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)  # fmt: skip
def test_opcheck(changes: dict[str, Any]) -> None:
    torch.library.opcheck(OP, arguments(**changes))


@pytest.mark.parametrize("backend", ["cpu" if DEVICE == "cpu" else "cuda", "torch"])
@pytest.mark.parametrize("metric", METRICS)
def test_compile_without_a_graph_break(metric: str, backend: str) -> None:
    x = on_device(data(metric, 20, 1, torch.float32))
    weights = on_device(torch.rand(20, generator=torch.Generator().manual_seed(0)))
    preselected = on_device(torch.tensor([2]))

    def choose(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, fc.Selection]:
        selection = fc.facility_location(
            x * 2, 5, metric=metric, weights=weights, preselected=preselected, backend=backend
        )
        return x[selection.indices] * selection.weights[:, None] + selection.objective, selection

    torch._dynamo.reset()
    rows, compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")(x, weights)
    expected_rows, eager = choose(x, weights)
    assert torch.equal(compiled.indices, eager.indices)
    assert torch.equal(compiled.gains, eager.gains)
    assert torch.equal(compiled.assignment, eager.assignment)
    assert compiled.objective == eager.objective
    assert isinstance(compiled.objective, float)
    assert compiled.offset == eager.offset
    torch.testing.assert_close(rows, expected_rows, check_dtype=False)


def test_compile_groups_and_dict_of_budgets() -> None:
    x, groups = on_device(points(20, 3, 2)), on_device(torch.arange(20) % 3)

    def choose(x: torch.Tensor, groups: torch.Tensor) -> fc.Selection:
        return fc.facility_location(x, None, groups=groups, budgets={0: 2, 1: 1, 2: 3}, clients=x[:7])

    torch._dynamo.reset()
    compiled, eager = torch.compile(choose, fullgraph=True, backend="aot_eager")(x, groups), choose(x, groups)
    assert torch.equal(compiled.indices, eager.indices)
    assert compiled.assignment.shape == (7,)
    assert compiled.objective == eager.objective


def test_compile_takes_lists_and_arrays() -> None:
    x = points(20, 3, 2, torch.float32)

    def choose(x: torch.Tensor) -> torch.Tensor:
        return fc.facility_location(x, 4, preselected=[1, 2], weights=[1.0, 2.0] * 10).indices

    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), choose(x))
    assert torch.equal(compiled(x.numpy()), choose(x))


def test_the_op_checks_its_arguments() -> None:
    for changes, words in (
        ({"method": "q"}, "method 'q'"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"memory_budget": -1}, "memory_budget"),
        ({"k": 60}, "k must be at most"),
        (
            {"rounds": 2},
            "rounds is not for torch.compile: how many rounds begin depends on values; leave it 1, got 2",
        ),
        ({"crow": torch.tensor([0, 1])}, "crow and col"),
    ):
        with pytest.raises(ValueError, match=words):
            OP(*arguments(**changes))


def test_compile_detaches_and_lets_gradients_pass_beside() -> None:
    x = points(20, 3, 3).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return x[fc.facility_location(x, 4).indices].square().sum()

    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    picks = fc.facility_location(x, 4).indices
    expected = torch.zeros_like(x)
    expected[picks] = 2 * x.detach()[picks]
    torch.testing.assert_close(x.grad, expected)


def test_errors_of_types_and_shapes_come_while_tracing() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="k must be at most 3"):
        torch.compile(lambda x: fc.facility_location(x, 5).indices, fullgraph=True, backend="eager")(
            torch.ones(3, 2)
        )


def test_errors_of_values_come_while_running() -> None:
    torch._dynamo.reset()
    choose = torch.compile(lambda x: fc.facility_location(x, 1).indices, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="x must be finite, got NaN at row 0, column 1"):
        choose(torch.tensor([[1.0, float("nan")]]))


def test_fake_and_meta_tensors_give_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        selection = fc.facility_location(
            torch.empty(50, 4, dtype=torch.float64), 6, clients=torch.empty(9, 4).double()
        )
    assert (selection.indices.shape, selection.gains.dtype) == ((6,), torch.float64)
    assert selection.assignment.shape == (9,)
    meta = fc.facility_location(torch.empty(50, 4, device="meta"), 6)
    assert meta.indices.is_meta
    assert meta.assignment.shape == (50,)
