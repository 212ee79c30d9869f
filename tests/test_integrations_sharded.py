"""BatchSelector on models that fully_shard and FullyShardedDataParallel have sharded over two and four processes."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import Failed, Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

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


def batch(seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(20, (12, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def gpt2() -> nn.Module:
    """A model whose projections are one matrix, of which the last third of the columns is wanted."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2)
    return GPT2LMHeadModel(config)


MODELS = {"own": Decoder, "gpt2": gpt2}


def layers_of(model: nn.Module) -> nn.ModuleList:
    layers = model.layers if isinstance(model, Decoder) else model.transformer.h
    assert isinstance(layers, nn.ModuleList)
    return layers


def fully_sharded(model: nn.Module, how: str, world: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    mesh, options = init_device_mesh("cpu", (world,)), {}
    layers = layers_of(model)
    if how == "replicas":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    elif how == "columns":
        from torch.distributed.tensor import Shard

        options["shard_placement_fn"] = lambda p: Shard(1) if p.dim() == 2 else None
    elif how == "ignored":
        options["ignored_params"] = {layers[-1].v_proj.weight}
    elif how == "nested":
        fully_shard(layers[-1].v_proj, mesh=mesh)
    for layer in layers if how != "root" else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def flat(model: nn.Module, how: str) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(layers_of(model)[0])}) if how == "layers" else None
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)


def numbers_of(model: nn.Module) -> list[Tensor]:
    """This process's parts of all parameters; a root module stays whole after a forward pass."""
    reshard = getattr(model, "reshard", None)
    if reshard is not None:
        reshard()
    return [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]


def picks(model: nn.Module, kind: str, seed: int) -> tuple[list[int], Tensor]:
    """The rows that are picked of a batch, and what they are picked by, on the second of two batches."""
    selector = fc.integrations.torch.BatchSelector(model, fc.CoLM(4), shift_labels=True, **OPTIONS[kind])
    assert selector.numel == 64
    selector.select(batch(seed))
    found = selector.gradients(batch(seed))
    numbers = found.coefficients if kind == "zeroth_order" else found.dense()
    return selector.select(batch(seed)).indices.tolist(), numbers


def run_sharded(
    group: Any, rank: int, world: int, name: str, make: str, how: str, kind: str
) -> tuple[list[int], Tensor]:
    model = MODELS[name]()
    model = fully_sharded(model, how, world) if make == "fully_shard" else flat(model, how)
    before, states = numbers_of(model), [p.requires_grad for p in model.parameters()]
    found = picks(model, kind, seed=1 + rank % 2)
    after = numbers_of(model)
    assert len(before) == len(after)
    assert all(map(torch.equal, before, after))
    assert states == [p.requires_grad for p in model.parameters()]
    output = model(batch(1)["input_ids"])  # training goes on
    getattr(output, "logits", output).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.numel()]
    assert all(g is not None for g in gradients)
    return found


@functools.cache
def ranks_of(world: int) -> Ranks:
    return Ranks(world, subgroups=False)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    yield ranks_of
    for world in (2, 4):
        ranks_of(world).close()
    ranks_of.cache_clear()


CASES = [
    (name, "fully_shard", how, world, kind)
    for name, how, world in [
        ("own", "layers", 2),
        ("own", "root", 2),
        ("own", "nested", 2),
        ("own", "columns", 2),
        ("own", "ignored", 2),
        ("own", "layers", 4),
        ("own", "replicas", 4),
        ("gpt2", "layers", 2),
    ]
    for kind in OPTIONS
] + [
    (name, "fsdp1", how, world, "zeroth_order")
    for name, how, world in [("own", "layers", 2), ("own", "root", 4), ("gpt2", "layers", 2)]
]


@pytest.mark.parametrize(
    ("name", "make", "how", "world", "kind"), CASES, ids=["/".join(map(str, case)) for case in CASES]
)
def test_a_sharded_model(ranks: Any, name: str, make: str, how: str, world: int, kind: str) -> None:
    """Every process picks of its batch what one process with the whole model picks of it, and by the same numbers."""
    if how == "ignored" and "ignored_params" not in inspect.signature(fully_shard).parameters:
        pytest.skip("the oldest torch that is supported has no ignored_params")
    found = ranks(world).run(run_sharded, name, make, how, kind)
    for rank, (indices, own) in enumerate(found):
        expected, numbers = picks(MODELS[name](), kind, seed=1 + rank % 2)
        assert indices == expected
        torch.testing.assert_close(own, numbers, rtol=1e-5, atol=1e-6)


def numbers_after_an_empty_batch(model: nn.Module, kind: str, is_empty: bool) -> Tensor:
    """What rows are picked by in the second batch, if no label of the first one counts."""
    selector = fc.integrations.torch.BatchSelector(model, fc.CoLM(4), **OPTIONS[kind])
    first = batch()
    if is_empty:
        first["labels"] = torch.full_like(first["labels"], -100)
    else:
        first["labels"] = first["labels"].clone()
        first["labels"][1:] = -100  # one row alone does not show which dimension is the rows'
    selector.gradients(first)
    found = selector.gradients(batch(2))
    selector.gradients(first)
    return found.coefficients if kind == "zeroth_order" else found.dense()


def run_after_an_empty_batch(group: Any, rank: int, world: int, name: str, kind: str) -> Tensor:
    model = fully_sharded(MODELS[name](), "layers", world)
    return numbers_after_an_empty_batch(model, kind, is_empty=rank == 1)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_processes_that_know_more_wait_for_the_others(ranks: Any, name: str, kind: str) -> None:
    """A process that has found out all that it needs on the first batch makes as many passes as one that has not."""
    for rank, found in enumerate(ranks(2).run(run_after_an_empty_batch, name, kind)):
        alone = numbers_after_an_empty_batch(MODELS[name](), kind, is_empty=rank == 1)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def adapted(rank: int) -> nn.Module:
    """A model whose V-projections have adapters of low rank and are frozen themselves."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Decoder(), LoraConfig(r=rank, target_modules=["v_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model


def run_with_adapters(group: Any, rank: int, world: int, kind: str) -> list[Tensor]:

    model = adapted(2)
    for layer in model.base_model.model.layers:
        fully_shard(layer)
    return gradients_with_adapters(fully_shard(model), kind)


def gradients_with_adapters(model: nn.Module, kind: str) -> list[Tensor]:
    """The gradients of the adapter's matrix B, and those of the frozen matrix below it."""
    found = []
    for name in (None, "base_model.model.layers.2.v_proj.base_layer.weight"):
        selector = fc.integrations.torch.BatchSelector(
            model, parameter=name, shift_labels=True, **OPTIONS[kind]
        )
        assert ("lora_B" in selector.parameter_name) == (name is None)
        found.append(selector.gradients(batch()).dense())
    return found


@pytest.mark.parametrize("kind", OPTIONS)
def test_adapters_in_a_sharded_model(ranks: Any, kind: str) -> None:
    expected = gradients_with_adapters(adapted(2), kind)
    for found in ranks(2).run(run_with_adapters, kind):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- passes that end early


class Stop(Exception):
    pass


def loss_of(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    output = model(tokens["input_ids"])
    logits = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens["labels"].flatten())


def training_loss(model: nn.Module) -> tuple[float, list[str]]:
    """The loss of a training step, and the parameters that it gives no gradient."""
    loss = loss_of(model, batch(3))
    loss.backward()
    return float(loss.detach()), [
        name for name, p in model.named_parameters() if p.numel() and p.grad is None
    ]


def run_stopped(group: Any, rank: int, world: int, make: str, how: str, kind: str, where: str) -> Any:
    model = Decoder()
    stop = model.head if where == "head" else model.layers[-1].o_proj
    model = fully_sharded(model, how, world) if make == "fully_shard" else flat(model, how)
    selector = fc.integrations.torch.BatchSelector(model, shift_labels=True, **OPTIONS[kind])
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == (2 if kind == "zeroth_order" else 1):
            raise Stop

    handle = stop.register_forward_pre_hook(hook)
    with pytest.raises(Stop):
        selector.gradients(batch())
    handle.remove()
    return training_loss(model)


STOPS = [
    (make, how, kind, where)
    for make, how, kind in [
        ("fully_shard", "root", "zeroth_order"),
        ("fully_shard", "layers", "zeroth_order"),
        ("fully_shard", "root", "backprop"),
        ("fully_shard", "layers", "backprop"),
        ("fsdp1", "layers", "zeroth_order"),
        ("fsdp1", "root", "zeroth_order"),
    ]
    for where in ("layer", "head")
]


@pytest.mark.parametrize(("make", "how", "kind", "where"), STOPS, ids=["/".join(case) for case in STOPS])
def test_a_pass_that_ends_early(ranks: Any, make: str, how: str, kind: str, where: str) -> None:
    """The next training step is that of a model that nothing was selected by."""
    expected, _ = training_loss(Decoder())
    for loss, left_out in ranks(2).run(run_stopped, make, how, kind, where):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert not left_out


# ---- several matrices, and parts of one


def dense_of(model: nn.Module, kind: str, options: dict[str, Any]) -> Tensor:
    selector = fc.integrations.torch.BatchSelector(model, shift_labels=True, **OPTIONS[kind], **options)
    found = selector.gradients(batch()).dense()
    assert selector.numel == found.shape[1]
    return found


def run_matrices(group: Any, rank: int, world: int, name: str, make: str, kind: str) -> Tensor:
    model = MODELS[name]()
    model = fully_sharded(model, "layers", world) if make == "fully_shard" else flat(model, "layers")
    return dense_of(model, kind, {"matrices": ("v", "q", "o")})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("make", "kind"),
    [("fully_shard", "zeroth_order"), ("fully_shard", "backprop"), ("fsdp1", "zeroth_order")],
)
def test_several_matrices(ranks: Any, make: str, kind: str, name: str) -> None:
    """Two of them are parts of one parameter in GPT-2."""
    expected = dense_of(MODELS[name](), kind, {"matrices": ("v", "q", "o")})
    for found in ranks(2).run(run_matrices, name, make, kind):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- tensor parallelism


def run_parallel(group: Any, rank: int, world: int, kind: str) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, mesh = Decoder(), init_device_mesh("cpu", (world,))
    for layer in model.layers:
        parallelize_module(layer, mesh, {"v_proj": ColwiseParallel(output_layouts=Replicate())})
    return dense_of(model, kind, {})


def test_a_matrix_of_tensor_parallelism(ranks: Any) -> None:
    expected = dense_of(Decoder(), "zeroth_order", {})
    for found in ranks(2).run(run_parallel, "zeroth_order"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(Failed, match="must run as a whole matrix with gradients='backprop', got a DTensor"):
        ranks(2).run(run_parallel, "backprop")


# ---- what is refused


def run_refused(group: Any, rank: int, world: int, how: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, tokens = Decoder(), batch()
    options: dict[str, Any] = {"shift_labels": True}
    if how == "vector":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif how == "backprop":
        model, options["gradients"] = flat(model, "layers"), "backprop"
    elif how == "tied":
        model.head.weight = model.embed.weight
        model = fully_sharded(model, "layers", world)
        options["parameter"] = ["embed.weight", "head.weight"]
    elif how != "later":
        model = fully_sharded(model, "layers", world)
    if how == "seeds":
        options["seed"] = rank
    elif how == "entry":
        options["batch_size"] = 6
        tokens["table"] = torch.zeros(12, 12)
    selector = fc.integrations.torch.BatchSelector(model, fc.CoLM(4), **options)
    if how == "later":
        flat(model, "layers")
    selector.select([tokens] * (1 + rank) if how == "parts" else tokens)


REFUSED = {
    "later": "must be wrapped by FullyShardedDataParallel before the selector is made",
    "backprop": "must be sharded by fully_shard .* with gradients='backprop', got FullyShardedDataParallel",
    "vector": "must be made with use_orig_params=True",
    "tied": "must name each tensor once, got embed.weight and head.weight, which are tied",
    "seeds": "take gradients together, of as many parts of a batch and with the same options",
    "parts": "take gradients together, .* got on this one 1 parts",
    "entry": "whether the batch's 'input_ids', 'table' have a row for each sample .* with batch_keys=",
}


@pytest.mark.parametrize("how", REFUSED)
def test_models_that_are_refused(ranks: Any, how: str) -> None:
    """On every process, so that none waits for another."""
    ranks(2).start(run_refused, how)
    for rank in range(2):
        with pytest.raises(Failed) as failed:
            ranks(2).result(rank)
        assert failed.value.args[0] == "ValueError"
        if how != "parts" or rank == 0:
            assert re.search(REFUSED[how], failed.value.args[1])
