"""GradientSketcher against explicit per-sample gradients by torch.func, which are sketched by `sketch`."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks.gradient_sketcher import points, seeded
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import flashcoreset as fc

DIM = 64
SKETCHES, NORMS = 1e-4, 1e-5  # of the issue; the worst seen: 8e-7 for both


def explicit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *batch: Tensor,
    names: list[str] | None = None,
    vectorised: bool = True,
) -> Tensor:
    """[B, D]: the gradient of loss(model, one sample of each of `batch`), flattened; of all that require gradients, or of
    `names`."""
    trained = {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad and (names is None or name in names)
    }

    def one(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        def call(*args: Any, **keywords: Any) -> Any:
            return functional_call(model, parameters, args, keywords)

        return loss(call, *(value[None] for value in sample))

    if vectorised:
        found = vmap(grad(one), (None, *[0] * len(batch)), randomness="different")(trained, *batch)
    else:
        rows = [grad(one)(trained, *sample) for sample in zip(*batch, strict=True)]
        found = {name: torch.stack([row[name] for row in rows]) for name in trained}
    return torch.cat([found[name].flatten(1) for name in trained], 1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the length of each row."""
    assert found.shape == expected.shape
    if found.dim() == 1:
        found, expected = found[:, None], expected[:, None]
    off = (found.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert off.max() <= tolerance


def assert_no_further(sketcher: fc.GradientSketcher, theirs: Tensor, exact: Tensor) -> None:
    """Half-precision results beside those of vmap(grad): at most twice as far from the exact gradients, over the batch."""
    target = fc.sketch(exact, DIM, kind="sjlt", backend="torch").double()
    reach = (fc.sketch(theirs, DIM, kind="sjlt", backend="torch").double() - target).norm()
    assert (sketcher.sketches.double() - target).norm() <= 2 * reach
    assert (sketcher.sketches.double() - target).norm() <= 2e-2 * target.norm()
    assert_close(sketcher.norms, exact.norm(dim=1), 2e-2)


def check(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *batch: Tensor,
    run: Callable[..., Tensor] | None = None,
    backend: str = "torch",
    sketches: float = SKETCHES,
    norms: float = NORMS,
    vectorised: bool = True,
    **options: Any,
) -> fc.GradientSketcher:
    """Both results for the mean over the batch of `loss`."""
    g = explicit(model, loss, *batch, vectorised=vectorised)
    sketcher = fc.GradientSketcher(model, DIM, seed=3, backend=backend, **options)
    with sketcher:
        value = (run or loss)(model, *batch)
        value.backward()
    assert sketcher.numel == g.shape[1]
    options = {name: value for name, value in options.items() if name in ("kind", "nnz")}
    expected = fc.sketch(g, DIM, seed=3, backend="torch", **{"kind": "sjlt", **options})
    assert_close(sketcher.sketches, expected, sketches)
    assert_close(sketcher.norms, g.norm(dim=1), norms)
    return sketcher


def classify(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def labels(n: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(2))


def mlp() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(7, 19),
            nn.ReLU(inplace=True),
            nn.Linear(19, 23, bias=False),
            nn.Tanh(),
            nn.Linear(23, 5),
        )
    )


class Network(nn.Module):
    """A convolutional network with all that convolutions can be, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 2), groups=4, stride=2, dilation=(1, 2), bias=False)
        self.same = nn.Conv2d(12, 12, (3, 5), padding="same", padding_mode="reflect")
        self.depthwise = nn.Conv2d(12, 12, 3, padding=(2, 1), groups=12)
        self.group_norm = nn.GroupNorm(3, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        x = self.grouped(x)
        x = x + self.same(x)
        x = self.group_norm(self.depthwise(x))
        return self.out(x.mean((2, 3)))


def network() -> nn.Module:
    model = seeded(Network)
    with torch.no_grad():
        model.norm.running_mean.copy_(points(8, seed=5))
        model.norm.running_var.copy_(points(8, seed=6).square() + 0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "nnz"),
    [("sjlt", 1), ("sjlt", 3), ("rademacher", 1), ("gaussian", 1), ("srht", 1), ("gaussian-boxmuller", 1)],
)
def test_mlp(backend: str, kind: str, nnz: int) -> None:
    check(mlp(), classify, points(6, 7), labels(6, 5), backend=backend, kind=kind, nnz=nnz)


def test_cnn(backend: str) -> None:
    check(network(), classify, points(5, 3, 11, 10), labels(5, 4), backend=backend)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="circular"), (4, 9)),
        (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2), (4, 9)),
        (lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 3), padding=(1, 0, 2), dilation=(2, 1, 1)), (2, 5, 6, 4)),
        (lambda: nn.Conv3d(2, 4, 2, padding="valid", padding_mode="replicate", groups=2), (2, 3, 4, 3)),
        (lambda: nn.LayerNorm(7), (3, 2, 7)),
        (lambda: nn.LayerNorm((2, 7), bias=False), (3, 2, 7)),
        (lambda: nn.RMSNorm(7), (3, 2, 7)),
        (lambda: nn.RMSNorm((2, 7), eps=0.1), (3, 2, 7)),
        (lambda: nn.GroupNorm(2, 6), (6, 4)),
        (lambda: nn.GroupNorm(2, 6), (6,)),
        (lambda: nn.BatchNorm1d(6).eval(), (6,)),
        (lambda: nn.BatchNorm1d(6).eval(), (6, 5)),
        (lambda: nn.BatchNorm3d(2, eps=0.1).eval(), (2, 3, 1, 4)),
        (lambda: nn.Linear(7, 5), (3, 2, 4, 7)),
        (lambda: nn.Linear(70, 50, bias=False), (300, 70)),  # norms by the product
    ],
    ids=lambda value: str(value() if callable(value) else value).replace(" ", ""),
)  # fmt: skip
def test_layers(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = seeded(layer)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.3 * points(*p.shape, seed=i)
    x = points(4, *shape)
    weights = points(4, 1000, seed=7)

    def loss(call: Any, x: Tensor, w: Tensor) -> Tensor:
        out = call(x).flatten(1)
        return (out * w.repeat(1, -(-out.shape[1] // 1000))[:, : out.shape[1]]).sum(1).square().mean()

    check(model, loss, x, weights)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_embedding(reduction: str) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(11, 6, padding_idx=0)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.tokens(x).sum(1).tanh())

    model = seeded(Bag)
    x = torch.randint(0, 11, (5, 8), generator=torch.Generator().manual_seed(0))
    assert (x == 0).any()
    check(model, classify, x, labels(5, 3))
    sketcher = fc.GradientSketcher(model, DIM, reduction=reduction, backend="torch")
    with sketcher:
        F.cross_entropy(model(x), labels(5, 3), reduction=reduction).backward()
    g = explicit(model, classify, x, labels(5, 3))
    assert_close(sketcher.sketches, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)
    assert_close(sketcher.norms, g.norm(dim=1), NORMS)


def test_float64_and_half_models() -> None:
    model = mlp().double()
    sketcher = check(model, classify, points(6, 7).double(), labels(6, 5), sketches=1e-12, norms=1e-12)
    assert sketcher.sketches.dtype == sketcher.norms.dtype == torch.float64
    half, x, y = mlp().bfloat16(), points(6, 7).bfloat16(), labels(6, 5)
    exact = explicit(copy.deepcopy(half).double(), classify, x.double(), y)
    theirs = explicit(half, classify, x, y).double()
    sketcher = fc.GradientSketcher(half, DIM, backend="torch")
    with sketcher:
        classify(half, x, y).backward()
    assert sketcher.sketches.dtype == sketcher.norms.dtype == torch.float32
    assert_no_further(sketcher, theirs, exact)


# ---- transformers and peft (imported where they are used: they take seconds)

TOKENS, LENGTH, BATCH = 40, 9, 4


def token_ids() -> Tensor:
    return torch.randint(0, TOKENS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def next_token(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gpt2(**options: Any) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager", **options,
    )  # fmt: skip
    return seeded(lambda: transformers.GPT2LMHeadModel(config)).train()


def llama(**options: Any) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
        **{"tie_word_embeddings": True, **options},
    )  # fmt: skip
    return seeded(lambda: transformers.LlamaForCausalLM(config)).train()


def with_lora(model: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **options)
    model.requires_grad_(True)
    return seeded(lambda: peft.get_peft_model(model, config))


MODELS = {"gpt2": gpt2, "llama": llama}
# peft, and older versions of transformers, know checkpoints by this name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.mark.parametrize("kind", ["sjlt", "rademacher", "srht"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers(backend: str, name: str, kind: str) -> None:
    model = MODELS[name]()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    check(model, next_token, token_ids(), backend=backend, kind=kind)


@pytest.mark.parametrize(
    ("home", "name", "options"),
    [
        ("llama", "LlamaRMSNorm", {"hidden_size": 6}),
        ("t5", "T5LayerNorm", {"hidden_size": 6}),
        ("gemma", "GemmaRMSNorm", {"dim": 6}),
        ("cohere", "CohereLayerNorm", {"hidden_size": 6}),
        ("convnext", "ConvNextLayerNorm", {"normalized_shape": 6, "data_format": "channels_last"}),
    ],
)
def test_norms_of_transformers(home: str, name: str, options: dict[str, Any]) -> None:
    module = importlib.import_module(f"transformers.models.{home}.modeling_{home}")
    model = nn.Sequential(nn.Linear(6, 6), getattr(module, name)(**options), nn.Flatten(), nn.Linear(18, 4))
    for i, p in enumerate(model.parameters()):
        p.data += 0.3 * points(*p.shape, seed=i)
    check(model, classify, points(5, 3, 6), labels(5, 4))


def test_lora() -> None:
    sketcher = check(with_lora(mlp(), ["0", "2"]), classify, points(6, 7), labels(6, 5))
    assert len(sketcher.offsets) == 4
    check(with_lora(network(), ["first", "same", "out"]), classify, points(5, 3, 11, 10), labels(5, 4))
    targets = ["c_attn", "c_fc", "c_proj"]
    check(with_lora(gpt2(), targets, fan_in_fan_out=True), next_token, token_ids())
    check(with_lora(llama(), ["q_proj", "v_proj", "down_proj"]), next_token, token_ids())
    # Whole modules beside the adapters.
    model = with_lora(llama(tie_word_embeddings=False), ["q_proj"], modules_to_save=["lm_head", "norm"])
    sketcher = check(model, next_token, token_ids())
    assert any("modules_to_save" in name for name in sketcher.offsets)


# ---- autocast, checkpoints, shared parameters, data-parallel training


@pytest.mark.parametrize("name", ["mlp", "cnn", *MODELS])
def test_autocast(name: str) -> None:
    if name in MODELS:
        model, batch, loss = MODELS[name](), (token_ids(),), next_token
    elif name == "cnn":
        model, batch, loss = network(), (points(5, 3, 11, 10), labels(5, 4)), classify
    else:
        model, batch, loss = mlp(), (points(6, 7), labels(6, 5)), classify

    def cast(call: Any, *sample: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return loss(call, *sample)

    # vmap does not take group_norm's mixed types.
    exact, theirs = explicit(model, loss, *batch), explicit(model, cast, *batch, vectorised=name != "cnn")
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    with sketcher, torch.autocast("cpu", torch.bfloat16):
        value = loss(model, *batch)
        value.backward()
    assert_no_further(sketcher, theirs, exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    model = mlp()
    first, last = model[:2], model[2:]

    def run(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        hidden = checkpoint(first, x.requires_grad_(), use_reentrant=reentrant)
        return F.cross_entropy(checkpoint(last, hidden, use_reentrant=reentrant), y)

    check(model, classify, points(6, 7), labels(6, 5), run=run)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_transformers(name: str, reentrant: bool) -> None:
    model, expected = MODELS[name](), MODELS[name]()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    g = explicit(expected, next_token, token_ids())
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    for _ in range(2):  # the second pass is on its own
        with sketcher:
            next_token(model, token_ids()).backward()
        assert_close(sketcher.sketches, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)
        assert_close(sketcher.norms, g.norm(dim=1), NORMS)


class Traced(torch.autograd.Function):
    """Copies to memory whose end can be seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: list[Any]) -> Tensor:
        copied = x.numpy().copy()
        memory.append(weakref.ref(copied))
        return torch.from_numpy(copied)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def test_a_checkpoint_keeps_no_activations() -> None:
    layers = seeded(lambda: nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)]))
    memory: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(Traced.apply(x, memory))
        return x

    def alive() -> int:
        return sum(reference() is not None for reference in memory)

    x = points(5, 6).requires_grad_()
    with fc.GradientSketcher(layers, DIM, backend="torch"):
        out = forward(x)
        assert alive() == 4
        out.sum().backward()
        del out
        assert alive() == 0  # released as it was consumed
        out = checkpoint(forward, x, use_reentrant=False)
        assert alive() == 0
        out.sum().backward()


def test_data_parallel_training(tmp_path: Path) -> None:
    """One process of it; others only change what happens to the gradients of parameters."""
    model, batch = mlp(), (points(6, 7), labels(6, 5))
    g = explicit(model, classify, *batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for seen in (parallel, model):
            sketcher = fc.GradientSketcher(seen, DIM, backend="torch")
            with sketcher:
                classify(parallel, *batch).backward()
            assert_close(sketcher.sketches, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)
            assert_close(sketcher.norms, g.norm(dim=1), NORMS)
    finally:
        torch.distributed.destroy_process_group()


# Two processes, which see samples and parameters of their own seeds; rank 0's parameters count.
DATA_PARALLEL = """
import sys, torch
from torch import nn
from torch.nn.functional import cross_entropy
import flashcoreset as fc

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(7, 19), nn.ReLU(), nn.Linear(19, 5))
x, y = torch.randn(2, 4 + rank, 7), torch.randint(0, 5, (2, 4 + rank))
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
parallel = nn.parallel.DistributedDataParallel(model)
sketcher = fc.GradientSketcher(parallel, 64, seed=3, backend="torch")
found = []
for step in range(2):
    parallel.zero_grad()
    with sketcher:
        cross_entropy(parallel(x[step]), y[step]).backward()
    found.append((sketcher.sketches, sketcher.norms))
gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
torch.save({"x": x, "y": y, "found": found, "gradient": gradient, "model": model.state_dict()}, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_data_parallel_training(tmp_path: Path) -> None:
    """Each gets its own samples; what DistributedDataParallel adds up afterwards is the mean of both."""
    commands = [[sys.executable, "-c", DATA_PARALLEL, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = nn.Sequential(nn.Linear(7, 19), nn.ReLU(), nn.Linear(19, 5))
    model.load_state_dict(results[0]["model"])
    means = []
    for result in results:
        for step, (sketches, norms) in enumerate(result["found"]):
            g = explicit(model, classify, result["x"][step], result["y"][step])
            assert_close(sketches, fc.sketch(g, DIM, kind="sjlt", seed=3, backend="torch"), SKETCHES)
            assert_close(norms, g.norm(dim=1), NORMS)
        means.append(g.mean(0))
    for result in results:
        assert_close(result["gradient"][None], ((means[0] + means[1]) / 2)[None], 1e-5)


class Shared(nn.Module):
    """Layers that are called twice, and a matrix that two of them own."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.other = nn.Linear(6, 6, bias=False)
        self.other.weight = self.step.weight
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(self.step(x).tanh())
        for _ in range(2):
            x = self.conv(x[:, None]).squeeze(1)
        return self.other(x)


def test_shared_parameters() -> None:
    check(seeded(Shared), classify, points(5, 6), labels(5, 6))


class Tied(nn.Module):
    """Embeddings of two inputs and an output layer, all of one matrix; `twice` uses the output layer twice."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.tokens, self.more = nn.Embedding(9, 6, padding_idx=1), nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.more.weight = self.tokens.weight
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        hidden = (self.tokens(x) + self.more(x.flip(1) // 2)).cumsum(1).tanh()
        out = self.head(hidden)
        return out + self.head(hidden.flip(1)) if self.twice else out


@pytest.mark.parametrize("twice", [False, True])
def test_tied_embeddings(backend: str, twice: bool) -> None:
    model = seeded(lambda: Tied(twice))
    x = torch.randint(0, 9, (5, 7), generator=torch.Generator().manual_seed(0))

    def loss(call: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(call(x).mean(1), y)

    sketcher = check(model, loss, x, labels(5, 9), backend=backend)
    assert list(sketcher.offsets) == ["tokens.weight", "head.bias"]


def test_several_calls_and_backward_passes_add_up() -> None:
    model, x, z, y = mlp(), points(6, 7), points(6, 7, seed=8), labels(6, 5)

    def both(call: Any, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(call(x), y) + 2 * F.cross_entropy(call(z), y)

    check(model, both, x, z, y)
    model.zero_grad(set_to_none=True)
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    expected = fc.sketch(explicit(model, both, x, z, y), DIM, kind="sjlt", backend="torch")
    with sketcher:
        first, second = model(x), model(z)
        F.cross_entropy(first, y).backward()
        (2 * F.cross_entropy(second, y)).backward()
    assert_close(sketcher.sketches, expected, SKETCHES)
    assert_close(sketcher.norms, explicit(model, both, x, z, y).norm(dim=1), NORMS)
    with sketcher:
        out = model(x)
        F.cross_entropy(out, y).backward(retain_graph=True)
        F.cross_entropy(out * 2, y).backward()
    twice = explicit(
        model, lambda call, x, y: F.cross_entropy(call(x), y) + F.cross_entropy(2 * call(x), y), x, y
    )
    assert_close(sketcher.sketches, fc.sketch(twice, DIM, kind="sjlt", backend="torch"), SKETCHES)
    with pytest.raises(RuntimeError, match="several backward passes through one graph"):
        _ = sketcher.norms


def test_norms_of_shared_parameters_between_backward_passes() -> None:
    model, x, z, y = seeded(Shared), points(5, 6), points(5, 6, seed=8), labels(5, 6)
    one = explicit(model, classify, x, y).norm(dim=1)
    both = explicit(model, classify, x, y) + explicit(model, classify, z, y)
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    with sketcher:
        first, second = classify(model, x, y), classify(model, z, y)
        first.backward()
        assert_close(sketcher.norms, one, NORMS)
        second.backward()
        assert_close(sketcher.norms, both.norm(dim=1), NORMS)
    assert_close(sketcher.norms, both.norm(dim=1), NORMS)


def test_backward_passes_after_the_block_are_not_counted() -> None:
    model, batch = mlp(), (points(6, 7), labels(6, 5))
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    with sketcher:
        loss = classify(model, *batch)
        loss.backward(retain_graph=True)
    kept = sketcher.sketches
    loss.backward()
    assert torch.equal(sketcher.sketches, kept)
    with sketcher:
        loss = classify(model, *batch)
    loss.backward()
    with pytest.raises(RuntimeError, match="no backward pass yet"):
        _ = sketcher.sketches


def test_backward_passes_that_give_parameters_no_gradients() -> None:
    """A backward pass for the input alone, or for some parameters alone."""
    model, x, y = mlp(), points(6, 7).requires_grad_(), labels(6, 5)
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    g = explicit(model, classify, x.detach(), y)
    with sketcher:
        loss = classify(model, x, y)
        torch.autograd.grad(loss, x, retain_graph=True)
        with pytest.raises(RuntimeError, match="no backward pass yet"):
            _ = sketcher.sketches
        loss.backward()
    assert_close(sketcher.sketches, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)
    assert_close(sketcher.norms, g.norm(dim=1), NORMS)
    for alone in (
        lambda loss: torch.autograd.grad(loss, [model[2].weight, model[4].bias]),
        lambda loss: loss.backward(inputs=[model[2].weight, model[4].bias]),
    ):
        with sketcher:
            alone(classify(model, x, y))
        begin, end = sketcher.offsets["2.weight"], sketcher.offsets["4.weight"]
        last = sketcher.offsets["4.bias"]
        some = torch.zeros_like(g)
        some[:, begin:end], some[:, last:] = g[:, begin:end], g[:, last:]
        assert_close(sketcher.sketches, fc.sketch(some, DIM, kind="sjlt", backend="torch"), SKETCHES)
        assert_close(sketcher.norms, some.norm(dim=1), NORMS)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients_whose_squares_leave_float32(backend: str, scale: float) -> None:
    model, x, y = seeded(Shared), points(5, 6), labels(5, 6)
    g = explicit(model, classify, x, y)
    sketcher = fc.GradientSketcher(model, DIM, backend=backend)
    with sketcher:
        (classify(model, x, y) * scale).backward()
    assert_close(
        sketcher.sketches.double() / scale, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES
    )
    assert_close(sketcher.norms.double() / scale, g.norm(dim=1), NORMS)


def test_sequences_without_positions() -> None:
    for layer, x in (
        (nn.Linear(4, 3), torch.zeros(2, 0, 4)),
        (nn.Embedding(9, 4), torch.zeros(2, 0, dtype=torch.int64)),
    ):
        sketcher = fc.GradientSketcher(layer, DIM)
        with sketcher:
            layer(x).sum().backward()
        assert torch.equal(sketcher.sketches, torch.zeros(2, DIM))
        assert torch.equal(sketcher.norms, torch.zeros(2))


def test_a_loop_inside_one_block() -> None:
    model = mlp()
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    with sketcher:
        for seed, n in ((1, 6), (2, 3)):
            x, y = points(n, 7, seed=seed), labels(n, 5)
            classify(model, x, y).backward()
            with torch.no_grad():
                model(points(9, 7))  # an evaluation changes nothing
            g = explicit(model, classify, x, y)
            assert_close(sketcher.sketches, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)
            assert_close(sketcher.norms, g.norm(dim=1), NORMS)


def test_gradients_and_outputs_are_those_without_it() -> None:
    model, plain = network(), network()
    x, y = points(5, 3, 11, 10), labels(5, 4)
    with fc.GradientSketcher(model, DIM, backend="torch"):
        loss = classify(model, x, y)
        loss.backward()
    expected = classify(plain, x, y)
    expected.backward()
    assert torch.equal(loss, expected)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_parameters_are_chosen() -> None:
    model, batch = mlp(), (points(6, 7), labels(6, 5))
    for parameters, names in (
        ("0.weight", ["0.weight"]),
        (["4.*", "0.bias"], ["0.bias", "4.weight", "4.bias"]),
        (lambda name, p: p.dim() == 1, ["0.bias", "4.bias"]),
    ):
        sketcher = fc.GradientSketcher(model, DIM, parameters=parameters, backend="torch")
        with sketcher:
            classify(model, *batch).backward()
        g = explicit(model, classify, *batch, names=names)
        assert list(sketcher.offsets) == names
        assert_close(sketcher.sketches, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)
        assert_close(sketcher.norms, g.norm(dim=1), NORMS)
    shared = seeded(Shared)  # by its second name
    assert list(fc.GradientSketcher(shared, 4, parameters="other.*", backend="torch").offsets) == [
        "step.weight"
    ]


def test_norms_or_sketches_alone() -> None:
    model, batch = mlp(), (points(6, 7), labels(6, 5))
    g = explicit(model, classify, *batch)
    alone = fc.GradientSketcher(model, None, backend="torch")
    with alone:
        classify(model, *batch).backward()
    assert_close(alone.norms, g.norm(dim=1), NORMS)
    with pytest.raises(RuntimeError, match="dim=None"):
        _ = alone.sketches
    without = fc.GradientSketcher(model, DIM, norms=False, backend="torch")
    with without:
        classify(model, *batch).backward()
    assert_close(without.sketches, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)
    with pytest.raises(RuntimeError, match="norms=False"):
        _ = without.norms
    with pytest.raises(ValueError, match="dim must be a number"):
        fc.GradientSketcher(model, None, norms=False)


# ---- errors


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(7, 5, batch_first=True)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0] * self.scale


def test_arguments_are_checked() -> None:
    model = mlp()
    sketcher = fc.GradientSketcher
    for arguments, options, error, message in (
        ((nn.Linear, 4), {}, TypeError, "model must be a torch.nn.Module, got type"),
        ((model, 0), {}, ValueError, r"dim must be in \[1, 2\^31\], got 0"),
        ((model, 2**31 + 1), {}, ValueError, "dim must be in"),
        ((model, 4.0), {}, TypeError, "dim must be an int"),
        ((model, 4), {"kind": "dense"}, ValueError, "unknown kind 'dense'"),
        ((model, 4), {"nnz": 5}, ValueError, r"nnz must be in \[1, dim\] = \[1, 4\], got 5"),
        ((model, 4), {"seed": 0.5}, TypeError, "seed must be an int"),
        ((model, 4), {"reduction": "none"}, ValueError, "unknown reduction 'none'; valid names: mean, sum"),
        ((model, 4), {"reduction": None}, TypeError, "reduction must be a str"),
        ((model, 4), {"norms": 1}, TypeError, "norms must be a bool, got 1"),
        ((model, 4), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
        ((model, 4), {"backend": "cuda"}, fc.BackendUnavailableError, "cuda"),
        ((model, 4), {"parameters": 3}, TypeError, "parameters must be names, glob patterns or a function"),
        ((model, 4), {"parameters": [3]}, TypeError, "parameters must hold names or glob patterns, got 3"),
        ((model, 4), {"parameters": ["5.*"]}, ValueError, r"'5\.\*' matches no parameter of the model.*0\.weight"),
        ((model, 4), {"parameters": []}, ValueError, "none of the model's parameters is wanted"),
        ((model, 4), {"parameters": lambda name, p: False}, ValueError, "none of the model's parameters"),
        ((mlp().requires_grad_(False), 4), {}, ValueError, "requires gradients"),
        ((mlp().requires_grad_(False), 4), {"parameters": "0.*"}, ValueError, r"'0\.\*' matches does not require"),
        ((nn.Linear(2, 2, dtype=torch.complex64), 4), {}, TypeError, "'weight' must hold real floating numbers"),
        ((nn.LazyLinear(3), 4), {}, ValueError, "'weight' has no values yet: call the model once"),
        ((nn.DataParallel(model), 4), {}, ValueError, "DistributedDataParallel"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            sketcher(*arguments, **{"backend": "torch", **options})


def test_unsupported_layers_are_named() -> None:
    model = Unsupported()
    with pytest.warns(fc.SlowPathWarning, match="running LSTM 'inner' again on each sample"):
        check(model, lambda call, x: call(x).square().sum((1, 2)).mean(), points(3, 4, 7), vectorised=False)
    with pytest.raises(ValueError, match="Embedding 'tokens': scale_grad_by_freq"):
        fc.GradientSketcher(
            nn.ModuleDict({"tokens": nn.Embedding(5, 3, scale_grad_by_freq=True)}), 4, backend="torch"
        )

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with warnings.catch_warnings():
        check(nn.Sequential(Doubled(7, 5)), classify, points(6, 7), labels(6, 5))
    # A refusal names everything, with patterns that leave it out.
    tables = nn.ModuleDict({name: nn.Embedding(5, 3, scale_grad_by_freq=True) for name in ("a", "b")})
    model = nn.ModuleDict({"tables": tables, "head": nn.Linear(3, 2)})
    with pytest.raises(
        ValueError, match=r"'tables\.a\.weight'.*'tables\.b\.weight'.*leave them out"
    ) as refusal:
        fc.GradientSketcher(model, 4, backend="torch")
    assert "parameters=['*', '!tables.*']" in str(refusal.value)
    sketcher = fc.GradientSketcher(model, 4, parameters=["*", "!tables.*"], backend="torch")
    assert list(sketcher.offsets) == ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"'c\.\*' matches no parameter"):
        fc.GradientSketcher(model, 4, parameters=["*", "!c.*"], backend="torch")


def test_batch_statistics() -> None:
    model = network().train()
    sketcher = fc.GradientSketcher(model, 4, backend="torch")
    with pytest.raises(ValueError, match=r"BatchNorm2d 'norm' normalises over the batch.*eval"), sketcher:
        pass
    model.eval()
    with sketcher, pytest.raises(ValueError, match="BatchNorm2d 'norm' normalises over the batch"):
        model.train()(points(5, 3, 11, 10))
    never = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="BatchNorm1d '0' normalises over the batch"):
        fc.GradientSketcher(never, 4, backend="torch").__enter__()


def test_results_before_a_backward_pass() -> None:
    model = mlp()
    sketcher = fc.GradientSketcher(model, 4, backend="torch")
    with pytest.raises(RuntimeError, match="no backward pass yet"):
        _ = sketcher.sketches
    with sketcher:
        classify(model, points(6, 7), labels(6, 5)).backward()
        assert sketcher.norms.shape == (6,)
    with sketcher:
        model(points(6, 7))
        with pytest.raises(RuntimeError, match="no backward pass yet"):
            _ = sketcher.norms
    with sketcher, pytest.raises(RuntimeError, match="already active"):
        sketcher.__enter__()


def test_a_backward_pass_without_a_forward_pass() -> None:
    model = mlp()
    sketcher = fc.GradientSketcher(model, 4, backend="torch")
    loss = classify(model, points(6, 7), labels(6, 5))
    with (
        pytest.raises(RuntimeError, match=r"parameter '.*' came from no call.*inside `with sketcher:`"),
        sketcher,
    ):
        loss.backward()
    with pytest.raises(RuntimeError, match="came from no call"):
        _ = sketcher.sketches


def test_layers_that_are_not_called_as_modules() -> None:
    model = mlp()
    sketcher = fc.GradientSketcher(model, 4, backend="torch")
    x, y = points(6, 7), labels(6, 5)
    with (
        pytest.raises(RuntimeError, match=r"'0\.weight' is used outside of a call of its module, by linear"),
        sketcher,
    ):
        F.cross_entropy(model[1:](model[0].forward(x)), y).backward()
    with (
        pytest.raises(RuntimeError, match=r"'4\.weight' is used outside of a call of its module, by linear"),
        sketcher,
    ):
        F.cross_entropy(model(x) + F.linear(points(6, 23), model[4].weight), y).backward()
    with (
        pytest.raises(RuntimeError, match=r"'0\.weight' is used outside of a call of its module, by stack"),
        sketcher,
    ):
        (classify(model, x, y) + torch.stack([model[0].weight, model[0].weight]).square().sum()).backward()
    attention = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    check(
        attention,
        lambda call, x: call(x, x, x)[0].square().sum((1, 2)).mean(),
        points(3, 5, 8),
        vectorised=False,
    )


def test_second_derivatives() -> None:
    """Parameters contribute to a gradient's gradient past their modules."""
    for model in (mlp(), seeded(lambda: nn.Linear(7, 5))):
        sketcher = fc.GradientSketcher(model, 4, backend="torch")
        x, y = points(6, 7).requires_grad_(), labels(6, 5)

        def train(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> None:
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            (classify(model, x, y) + slope.square().sum()).backward()

        with pytest.raises(RuntimeError, match="by a second derivative"), sketcher:
            train()
        with sketcher:  # not taken
            torch.autograd.grad(classify(model, x, y), list(model.parameters()), create_graph=True)
        g = explicit(model, classify, x.detach(), y)
        assert_close(sketcher.norms, g.norm(dim=1), NORMS)


def test_parameters_used_directly_after_a_layer_raised() -> None:
    model, x, y = mlp(), points(6, 7), labels(6, 5)
    sketcher = fc.GradientSketcher(model, 4, backend="torch")

    def train() -> None:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(points(6, 8))
        (F.linear(points(6, 23), model[4].weight).sum() + classify(model, x, y)).backward()

    with pytest.raises(RuntimeError, match=r"'4\.weight' is used outside of a call"), sketcher:
        train()


def test_a_checkpoint_that_stops_inside_a_layer() -> None:
    model, x, y = mlp(), points(6, 7).requires_grad_(), labels(6, 5)
    last = model[4]
    last.weight.requires_grad_(False)
    sketcher = fc.GradientSketcher(model, 4, parameters="4.bias", backend="torch")

    def step(penalty: Tensor | float) -> None:
        (F.cross_entropy(checkpoint(model, x, use_reentrant=False), y) + penalty).backward()

    def train() -> None:
        step(0.0)
        step(last.bias.square().sum())

    with pytest.raises(RuntimeError, match=r"'4\.bias' is used outside of a call"), sketcher:
        train()


def test_uses_that_carry_no_gradient_are_no_matter() -> None:
    model, batch = mlp(), (points(6, 7), labels(6, 5))
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with sketcher:
        length = sum(p.square().sum() for p in model.parameters())
        loss = classify(model, *batch) + length.detach() * 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    g = explicit(model, classify, *batch)
    assert_close(sketcher.sketches, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)


def test_batch_dimensions() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(7, 6), nn.Flatten(0, 1), nn.Linear(6, 5)))
    check(model, lambda call, x: call(x).square().sum(1).mean(), points(3, 4, 7))  # tokens after each other
    model = nn.Sequential(nn.Linear(7, 6), nn.Flatten(0, 1), nn.Linear(6, 5))
    sketcher = fc.GradientSketcher(model, 4, backend="torch")
    with (
        pytest.raises(ValueError, match=r"Linear '0' must have an input with the batch.*got shape \(7,\)"),
        sketcher,
    ):
        model[0](points(7))
    with sketcher:
        model[0](points(0, 7)).sum().backward()
    assert sketcher.sketches.shape == (0, 4)
    assert sketcher.norms.shape == (0,)
    convolution = nn.Conv2d(3, 4, 3)
    sketcher = fc.GradientSketcher(convolution, 4, backend="torch")
    with pytest.raises(ValueError, match=r"4 dimensions or more, got shape \(3, 5, 5\)"), sketcher:
        convolution(points(3, 5, 5))


class Positions(nn.Module):
    """Positions are looked up once for all samples, before or after another layer has seen the batch."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.position, self.first, self.out = nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.early = early

    def forward(self, x: Tensor) -> Tensor:
        if self.early:
            position = self.position(torch.arange(4)[None])
            return self.out((self.first(x) + position).tanh()).mean(1)
        return self.out((self.first(x) + self.position(torch.arange(4)[None])).tanh()).mean(1)


@pytest.mark.parametrize("early", [False, True])
def test_outputs_that_broadcast_over_the_batch(early: bool) -> None:
    model = seeded(lambda: Positions(early))
    check(model, classify, points(5, 4, 6), labels(5, 3))
    assert tuple(model.position(torch.arange(4)[None]).shape) == (1, 4, 6)  # nor inside
    # Called by its parts, a model does not say how large the batch is.
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    with sketcher:
        hidden = model.position(torch.arange(4)[None])
        loss = F.cross_entropy(model.out((points(5, 4, 6) + hidden).tanh()).mean(1), labels(5, 3))
        with pytest.raises(
            ValueError, match=r"Embedding 'position'.*size 1 in dimension 0.*expand its input"
        ):
            loss.backward()


def test_a_batch_of_one() -> None:
    check(seeded(lambda: Positions(True)), classify, points(1, 4, 6), labels(1, 3))


def test_gradients_that_are_not_finite() -> None:
    model, x = mlp(), points(6, 7)
    x[3, 1] = float("nan")
    sketcher = fc.GradientSketcher(model, 4, backend="torch")
    with sketcher:
        classify(model, x, labels(6, 5)).backward()
    for name in ("sketches", "norms"):
        with pytest.raises(ValueError, match=f"{name}: the gradient of sample 3 is not finite"):
            getattr(sketcher, name)


def test_inputs_changed_in_place_are_noticed() -> None:
    model, x = seeded(lambda: nn.Linear(7, 5)), points(6, 7)
    with fc.GradientSketcher(model, 4, backend="torch"):
        with torch.autocast("cpu", torch.bfloat16):  # autograd itself keeps a copy
            out = model(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_frozen_after_construction() -> None:
    model = mlp()
    sketcher = fc.GradientSketcher(model, 4, backend="torch")
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0\.weight' no longer requires gradients"):
        sketcher.__enter__()


# torch.compile reads the .grad of tensors that are no leaves, with or without a sketcher.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("early", [False, True], ids=["compiled-inside", "compiled-before"])
@pytest.mark.parametrize("how", ["whole", "in-place", "a-layer", "a-function", "the-loss"])
def test_compiled(how: str, early: bool) -> None:
    torch.compiler.reset()
    model, batch = mlp(), (points(6, 7), labels(6, 5))
    g = explicit(model, classify, *batch)
    step: Callable[..., Tensor] = classify
    if how == "whole":
        model = torch.compile(model, backend="aot_eager")
    elif how == "in-place":
        model.compile(backend="aot_eager")
    elif how == "a-layer":
        model[2] = torch.compile(model[2], backend="aot_eager")
    else:
        loss = torch.compile(F.cross_entropy, backend="eager")
        step = (
            torch.compile(classify, backend="aot_eager")
            if how == "a-function"
            else lambda model, x, y: loss(model(x), y)
        )
    if early:
        step(model, *batch)
    sketcher = fc.GradientSketcher(model, DIM, backend="torch")
    with sketcher:
        step(model, *batch).backward()
    kept = sketcher.sketches
    assert_close(kept, fc.sketch(g, DIM, kind="sjlt", backend="torch"), SKETCHES)
    step(model, 2 * batch[0], batch[1]).backward()  # outside it sees nothing
    assert torch.equal(sketcher.sketches, kept)
