"""GradientSketcher against explicit per-sample gradients by torch.func, which are sketched by `sketch`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import flashcoreset as fc

DIM = 64
SKETCHES, NORMS = 1e-4, 1e-5  # of the issue; the worst seen: 2e-6 and 6e-7


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
    sketches: float = SKETCHES,
    norms: float = NORMS,
    **options: Any,
) -> fc.GradientSketcher:
    """Both results for the mean over the batch of `loss`."""
    g = explicit(model, loss, *batch)
    before = {name: p.grad for name, p in model.named_parameters()}
    assert all(value is None for value in before.values())
    sketcher = fc.GradientSketcher(model, DIM, seed=3, backend="torch", **options)
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


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def points(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    ("kind", "nnz"), [("sjlt", 1), ("sjlt", 3), ("rademacher", 1), ("gaussian", 1), ("srht", 1)]
)
def test_mlp(kind: str, nnz: int) -> None:
    check(mlp(), classify, points(6, 7), labels(6, 5), kind=kind, nnz=nnz)


def test_cnn() -> None:
    check(network(), classify, points(5, 3, 11, 10), labels(5, 4))


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
    ids=str,
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


# ---- transformers and peft

TOKENS, LENGTH, BATCH = 40, 9, 4


def token_ids() -> Tensor:
    return torch.randint(0, TOKENS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def next_token(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gpt2(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager", **options,
    )  # fmt: skip
    return seeded(lambda: transformers.GPT2LMHeadModel(config)).train()


def llama(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
        **{"tie_word_embeddings": True, **options},
    )  # fmt: skip
    return seeded(lambda: transformers.LlamaForCausalLM(config)).train()


def with_lora(model: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **options)
    model.requires_grad_(True)
    return seeded(lambda: peft.get_peft_model(model, config))


MODELS = {"gpt2": gpt2, "llama": llama}
# peft, and older versions of transformers, know checkpoints by this name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.mark.parametrize("name", MODELS)
def test_transformers(name: str) -> None:
    model = MODELS[name]()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    check(model, next_token, token_ids())


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


def test_a_checkpoint_keeps_no_activations() -> None:
    model = seeded(lambda: nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]))
    x = points(256, 16, 64).requires_grad_()

    def saved() -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.untyped_storage().data_ptr())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with fc.GradientSketcher(model, DIM, backend="torch"), hooks:
            checkpoint(model, x, use_reentrant=False)
        return len(set(sizes))

    assert saved() <= 1  # its input


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
def test_tied_embeddings(twice: bool) -> None:
    model = seeded(lambda: Tied(twice))
    x = torch.randint(0, 9, (5, 7), generator=torch.Generator().manual_seed(0))

    def loss(call: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(call(x).mean(1), y)

    sketcher = check(model, loss, x, labels(5, 9))
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
