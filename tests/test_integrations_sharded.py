"""BatchSelector on models that fully_shard and FullyShardedDataParallel have sharded over two processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import Failed, Ranks
from torch import Tensor, nn

import flashcoreset as fc

OPTIONS: dict[str, dict[str, Any]] = {
    "zeroth_order": {"eps": 1e-2},
    "backprop": {"gradients": "backprop"},
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.o_proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(self.norm(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return x + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(20, (12, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def picks(model: nn.Module, kind: str) -> tuple[list[int], Tensor]:
    """The rows that are picked of a batch, and what they are picked by, on the second of two batches."""
    selector = fc.integrations.torch.BatchSelector(model, fc.CoLM(4), shift_labels=True, **OPTIONS[kind])
    selector.select(batch())
    found = selector.gradients(batch())
    numbers = found.coefficients if kind == "zeroth_order" else found.dense()
    return selector.select(batch()).indices.tolist(), numbers


def shard(model: nn.Module, whole: set[nn.Parameter]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    return fully_shard(model, mesh=mesh, ignored_params=whole)


def sharded(ignored: bool) -> nn.Module:
    model = Decoder()
    return shard(model, {model.layers[-1].v_proj.weight} if ignored else set())


def run_sharded(group: Any, rank: int, world: int, kind: str) -> tuple[list[int], Tensor, bool]:
    model = sharded(ignored=True)
    found = picks(model, kind)
    model(batch()["input_ids"]).sum().backward()  # training goes on
    return *found, all(p.grad is not None for p in model.parameters())


def run_refused(group: Any, rank: int, world: int, how: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if how == "fsdp1":
        cpu = torch.device("cpu")
        model: nn.Module = FullyShardedDataParallel(Decoder(), device_id=cpu, use_orig_params=True)
    else:
        model = Decoder() if how == "later" else sharded(ignored=False)
    selector = fc.integrations.torch.BatchSelector(model, fc.CoLM(4), shift_labels=True)
    shard(model, set())
    selector.select(batch())


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        pytest.skip(
            "this torch's fully_shard has no ignored_params, which came after the oldest torch that is supported"
        )
    group = Ranks(2, subgroups=False)
    yield group
    group.close()


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_whole_matrix_in_a_sharded_model(ranks: Ranks, kind: str) -> None:
    """All processes pick what one process picks."""
    expected, numbers = picks(Decoder(), kind)
    for indices, own, trained in ranks.run(run_sharded, kind):
        assert indices == expected
        torch.testing.assert_close(own, numbers, rtol=1e-5, atol=1e-6)
        assert trained


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2", "later"])
def test_sharded_matrices_are_refused(ranks: Ranks, how: str) -> None:
    message = (
        "must not be sharded by FullyShardedDataParallel" if how == "fsdp1" else "v_proj.weight is sharded"
    )
    with pytest.raises(Failed, match=rf"{message}.*ignored_params"):
        ranks.run(run_refused, how)
