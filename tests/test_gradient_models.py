"""GradientSketcher on models of torch, transformers and peft: sketches and norms are autograd's of batches of one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks.gradient_sketcher import points, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flashcoreset as fc

CLOSE = 1e-4  # of the issue, relative to a row's length; the worst seen: 5e-6
# peft knows checkpoints by this name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::flashcoreset.SlowPathWarning"),
]

Call = Callable[..., Tensor]


def curved(output: Tensor) -> Tensor:
    """[B]: losses with gradients that differ everywhere."""
    flat = output.flatten(1)
    return (flat * points(flat.shape[1], seed=9)).sum(1).square() + flat.sin().sum(1)


def plain(model: nn.Module, *inputs: Tensor) -> Tensor:
    found = model(*inputs)
    return found if isinstance(found, Tensor) else next(v for v in found.values() if isinstance(v, Tensor))


def alone(model: nn.Module, call: Call, names: list[str], inputs: tuple[Tensor, ...], dim: int = 0) -> Tensor:
    """[B, D]: autograd's gradients of batches of one."""
    wanted = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for b in range(inputs[0].shape[dim]):
        output = call(model, *[x.narrow(dim if x.dim() > dim else 0, b, 1) for x in inputs])
        output = output.movedim(dim, 0) if output.dim() > dim + 1 else output
        found = torch.autograd.grad(curved(output).sum(), wanted, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows).double()


def check(
    model: nn.Module,
    *inputs: Tensor,
    call: Call = plain,
    dim: int = 0,
    reference: Callable[[], tuple[nn.Module, Call]] | None = None,
    close: float = CLOSE,
    **options: Any,
) -> fc.GradientSketcher:
    sketcher = fc.GradientSketcher(
        model, 64, **{"backend": "torch", "reduction": "sum", "batch_dim": dim, **options}
    )
    theirs, their_call = (model, call) if reference is None else reference()
    expected = alone(theirs, their_call, list(sketcher.offsets), inputs, dim)
    with torch.no_grad():
        before = call(model, *inputs) if not model.training else None
    with sketcher:
        output = call(model, *inputs)
        rows = output.movedim(dim, 0) if output.dim() > dim + 1 else output
        curved(rows).sum().backward()
    if before is not None and reference is None:
        assert torch.equal(output, call(model, *inputs))
    model.zero_grad(set_to_none=True)
    norms = expected.norm(dim=1)
    assert ((sketcher.norms.double() - norms).abs() <= close * norms).all()
    sketches = fc.sketch(expected, 64, kind="sjlt", backend="torch")
    assert ((sketcher.sketches.double() - sketches).norm(dim=1) <= close * norms).all()
    return sketcher


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(3))


# ---- layers of torch


class Attention(nn.Module):
    """Multi-head attention between samples in dimension 0, whatever the layout inside."""

    def __init__(self, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x if self.batch_first else x.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention(batch_first: bool) -> None:
    """As many samples as positions (5), as heads (2), and one."""
    for samples in (5, 2, 1):
        for options in ({}, {"add_bias_kv": True}, {"kdim": 8, "vdim": 8, "bias": False}):
            model = seeded(lambda options=options: Attention(batch_first, **options))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # no slow path
                check(model, points(samples, 5, 8))
    cross = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    dim = 0 if batch_first else 1
    shapes = ((4, 3, 8), (4, 6, 8)) if batch_first else ((3, 4, 8), (6, 4, 8))
    inputs = [points(*shape, seed=i) for i, shape in enumerate(shapes)]
    check(cross, *inputs, call=lambda model, x, y: model(x, y, y)[0], dim=dim)


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformers_of_torch(batch_first: bool) -> None:
    dim = 0 if batch_first else 1

    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    for samples in (3, 5, 1):
        x = points(samples, 5, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(seeded(encoder).train(), x if batch_first else x.transpose(0, 1), dim=dim)
    decoder = seeded(lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first))
    x, memory = points(3, 5, 8), points(3, 4, 8, seed=2)
    inputs = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
    check(decoder, *inputs, dim=dim)


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(6, 4, **options)
        self.head = nn.Linear(4 * (1 + options.get("bidirectional", False)), 3)
        self.first = options.get("batch_first", False)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.layer(x)
        return self.head(out[:, -1] if self.first else out[-1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers(kind: str) -> None:
    model = seeded(lambda: Recurrent(kind, batch_first=True, num_layers=2))
    with pytest.warns(fc.SlowPathWarning, match=rf"running {kind} 'layer' again on each sample"):
        check(model, points(5, 3, 6))
    check(seeded(lambda: Recurrent(kind, bidirectional=True)), points(3, 5, 6), dim=1)
    for samples in (5, 1):
        check(seeded(lambda: Recurrent(kind)), points(5, samples, 6), dim=1)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, x.flip(-1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "transposed-1d": (lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2), points(3, 4, 5)),
    "transposed-2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        points(3, 4, 5, 5),
    ),
    "transposed-3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 3)), points(3, 2, 3, 2, 3)),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 3), nn.PReLU()),
        points(5, 4),
    ),
    "prelu-2d": (lambda: nn.PReLU(4), points(3, 4, 5, 5)),
    "instance-norm": (lambda: nn.InstanceNorm2d(4, affine=True), points(3, 4, 5, 5)),
    "instance-norm-eval": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
        points(3, 4, 5),
    ),
    "bilinear": (Halves, points(5, 4)),
    "bilinear-sequence": (Halves, points(5, 3, 4)),
    "bag-mean": (lambda: nn.EmbeddingBag(9, 4), whole(9, 5, 6)),
    "bag-max": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4, mode="max"), nn.Linear(4, 2)), whole(9, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, x = LAYERS[name]
    check(seeded(make), x)


class Owning(nn.Module):
    """A class token, a position table, scales and a shift of the module's own around a layer of torch, time first or not."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=not time_first)
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(5, 8))
        self.scale, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.head, self.time_first = nn.Linear(8, 3), time_first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.table
        x = self.layer(x.transpose(0, 1)).transpose(0, 1) if self.time_first else self.layer(x)
        return self.head(self.scale * x - self.shift)[:, 0]


@pytest.mark.parametrize("time_first", [False, True])
def test_parameters_that_a_module_owns(time_first: bool) -> None:
    for samples in (3, 4, 5, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(seeded(lambda: Owning(time_first)), points(samples, 4, 8))


class Doubled(nn.Linear):
    """As Falcon's layers: a product written out."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x @ self.weight.T) + self.bias


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


def test_subclasses_that_compute_something_else() -> None:
    for shape in ((5, 4), (4, 4), (3, 6, 4), (1, 4)):
        check(seeded(lambda: nn.Sequential(Doubled(4, 4), nn.Tanh(), Doubled(4, 3))), points(*shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(seeded(lambda: nn.Sequential(Scaled(9, 4, padding_idx=-8), nn.Linear(4, 3))), whole(9, 5, 6))


class TiedTimeFirst(nn.Module):
    """An embedding and an output layer of one matrix, with time first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids.T).cumsum(0).tanh()).transpose(0, 1)


def test_tied_embeddings_with_time_first() -> None:
    for samples in (3, 5, 1):
        check(seeded(TiedTimeFirst), whole(9, samples, 5))


class Dropping(nn.Module):
    """A module that no rule knows, with dropout in it, which the second run must repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.randn(4, 4)), nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.drop((x @ self.weight.T).tanh()) @ self.weight


def test_dropout_is_repeated() -> None:
    model, x = seeded(Dropping).train(), points(6, 4)
    plain_model = seeded(Dropping).train()
    sketcher = fc.GradientSketcher(model, None, backend="torch", reduction="sum")
    torch.manual_seed(5)
    with sketcher:
        output = model(x)
        curved(output).sum().backward()
    torch.manual_seed(5)
    expected = plain_model(x)
    assert torch.equal(output, expected)
    rows = [
        torch.autograd.grad(row, plain_model.weight, retain_graph=True)[0].norm() for row in curved(expected)
    ]
    torch.testing.assert_close(sketcher.norms, torch.stack(rows), rtol=1e-5, atol=0)


def test_uses_that_change_between_batches() -> None:
    """Sizes that fit by chance on a later batch are not taken for samples."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.bias, self.head = nn.Embedding(9, 4), nn.Embedding(40, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            place = torch.arange(ids.shape[1])
            bias = self.bias((place[:, None] - place).flatten() + 20).tanh()  # [T * T, 4]
            return self.head(self.embed(ids) + bias.unflatten(0, (len(place), -1)).mean(0))

    model = seeded(Biased)
    sketcher = fc.GradientSketcher(model, None, backend="torch", reduction="sum")
    for samples, length in ((3, 5), (4, 6), (6, 6), (3, 6), (1, 4), (36, 6), (2, 2)):
        ids = whole(9, samples, length)
        with sketcher:
            curved(model(ids)).sum().backward()
        expected = alone(model, plain, list(sketcher.offsets), (ids,)).norm(dim=1)
        assert ((sketcher.norms - expected).abs() <= CLOSE * expected).all()


# ---- transformers

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip


def made(name: str, model: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    found = seeded(lambda: getattr(transformers, f"{name}{model}")(config)).eval()
    with torch.no_grad():
        for i, p in enumerate(found.parameters()):
            p += 0.05 * points(*p.shape, seed=i)
    return found


def causal(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def twofold(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, decoder_input_ids=ids.flip(1), use_cache=False).logits


def heard(model: nn.Module, sound: Tensor) -> Tensor:
    ids = whole(30, 1, 5).expand(len(sound), -1)
    return model(input_features=sound, decoder_input_ids=ids, use_cache=False).logits


MODELS: dict[str, tuple[Callable[[], nn.Module], Call, bool]] = {  # the last: whether all is on the fast path
    "gpt2": (lambda: made("GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0), causal, True),
    "llama": (lambda: made("Llama", "ForCausalLM"), causal, True),
    "bert": (lambda: made("Bert", "Model"), plain, True),
    "gemma3": (lambda: made("Gemma3Text", "Model", num_key_value_heads=1, head_dim=8), plain, True),
    "opt": (lambda: made("OPT", "ForCausalLM", ffn_dim=24, word_embed_proj_dim=16), causal, True),
    "bart": (lambda: made("Bart", "ForConditionalGeneration", **BART, scale_embedding=True, decoder_start_token_id=1), twofold, True),
    "falcon": (lambda: made("Falcon", "ForCausalLM", ffn_hidden_size=24, bos_token_id=0, eos_token_id=0), causal, False),
    "deberta-v2": (lambda: made("DebertaV2", "Model", relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8), plain, False),
    "t5": (lambda: made("T5", "ForConditionalGeneration", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0), twofold, False),
    "mixtral": (lambda: made("Mixtral", "ForCausalLM", num_local_experts=4, num_key_value_heads=1), causal, True),
    "qwen3-moe": (lambda: made("Qwen3Moe", "ForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, num_key_value_heads=1, head_dim=8), causal, True),
    "mamba": (lambda: made("Mamba", "ForCausalLM", state_size=4, expand=2, conv_kernel=3), causal, False),
    "whisper": (lambda: made("Whisper", "ForConditionalGeneration", **BART, num_mel_bins=8, max_source_positions=6, max_target_positions=12, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1), heard, True),
    "vit": (lambda: made("ViT", "ForImageClassification", image_size=8, patch_size=4, num_labels=3), plain, True),
    "swin": (lambda: made("Swin", "ForImageClassification", image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_attention_heads=[2, 2], window_size=4), plain, False),
    "resnet": (lambda: made("ResNet", "ForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"), plain, True),
}  # fmt: skip
IMAGES = {"vit": (3, 8, 8), "swin": (3, 16, 16), "resnet": (3, 16, 16), "whisper": (8, 12)}


def batch_of(name: str, samples: int, length: int) -> Tensor:
    if name in IMAGES:
        return points(samples, *IMAGES[name])
    return whole(40, samples, length)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """As many samples as positions (6), as heads (2), and one."""
    make, call, fast = MODELS[name]
    for samples, length in ((6, 6), (2, 5), (1, 4)):
        with warnings.catch_warnings():
            warnings.simplefilter("error" if fast else "ignore", fc.SlowPathWarning)
            check(make(), batch_of(name, samples, length), call=call)


# ---- mixtures of experts


class Mixture(nn.Module):
    """Experts that are modules, of which each token goes to one, with the tokens of all samples in one matrix: time first or not."""

    def __init__(
        self, pick: Callable[[Tensor, Tensor], Tensor], *, time_first: bool = False, whole: bool = False
    ) -> None:
        super().__init__()
        self.whole = whole
        self.first, self.router, self.pick, self.time_first = (
            nn.Linear(8, 8),
            nn.Linear(8, 4),
            pick,
            time_first,
        )
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 8)) for _ in range(4)
        )
        self.routes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        tokens = (h.transpose(0, 1) if self.time_first else h).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        self.routes.append(chosen)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out.index_add_(0, rows, expert(self.pick(tokens, rows)) * weights[rows, None])
        mixed = out.unflatten(0, (-1, len(x))).transpose(0, 1) if self.time_first else out.view_as(h)
        return h + mixed if self.whole else (h + mixed).sum(1)


PICKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda x, rows: x[rows],
    "slices-behind": lambda x, rows: x[rows, :],
    "mask": lambda x, rows: x[torch.zeros(len(x), dtype=torch.bool).index_fill(0, rows, True)],
    "index-select": lambda x, rows: x.index_select(0, rows),
    "index-of-index": lambda x, rows: x[torch.arange(len(x)).flip(0)][len(x) - 1 - rows],
    "negative": lambda x, rows: x[rows - len(x)],
    "repeated": lambda x, rows: x.repeat_interleave(2, 0)[2 * rows + 1].view(len(rows), 2, 4).flatten(1),
}


def mixture(pick: str = "index", **options: Any) -> nn.Module:
    return seeded(lambda: Mixture(PICKS[pick], **options))


@pytest.fixture
def fast() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", fc.SlowPathWarning)
        yield


@pytest.mark.parametrize("pick", PICKS)
def test_rows_that_are_picked(pick: str, fast: None) -> None:
    """Seven samples of three tokens: experts have all numbers of them, none too."""
    check(mixture(pick), points(7, 3, 8))


@pytest.mark.parametrize("time_first", [False, True])
def test_experts_that_are_modules(time_first: bool, fast: None) -> None:
    """As many samples as tokens, as experts, and one; the routes differ from batch to batch, and some experts are given one row."""
    model = mixture(time_first=time_first)
    sketcher = fc.GradientSketcher(model, 64, backend="torch", reduction="sum")
    for seed, (samples, length) in enumerate([(5, 5), (4, 3), (6, 2), (1, 4), (2, 1), (3, 40), (4, 3)]):
        x = points(samples, length, 8, seed=20 + seed)
        x[:, 0] = 1.0  # a token that all samples begin with, whose route tells nothing about them
        with sketcher:
            curved(model(x)).sum().backward()
        expected = alone(model, plain, list(sketcher.offsets), (x,))
        norms = expected.norm(dim=1)
        assert ((sketcher.norms.double() - norms).abs() <= CLOSE * norms).all()
        sketches = fc.sketch(expected, 64, kind="sjlt", backend="torch")
        assert ((sketcher.sketches.double() - sketches).norm(dim=1) <= CLOSE * norms).all()
    rows = [int((routes == number).sum()) for routes in model.routes for number in range(4)]
    assert {0, 1} < set(rows)


def test_experts_with_options(fast: None) -> None:
    x = points(4, 5, 8)
    check(mixture(), x, parameters=["*experts*", "router.*"])
    check(mixture(), x, verify="always")
    model = mixture()
    sizes = {name: torch.rand(p.shape) + 0.5 for name, p in model.named_parameters()}
    sketcher = fc.GradientSketcher(model, None, backend="torch", reduction="sum", scale=sizes)
    with sketcher:
        curved(model(x)).sum().backward()
    factors = torch.cat([one.flatten() for one in sizes.values()])
    expected = (alone(model, plain, list(sketcher.offsets), (x,)) * factors).norm(dim=1)
    torch.testing.assert_close(sketcher.norms.double(), expected, rtol=CLOSE, atol=0)
    layers = fc.GradientSketcher(model, 64, backend="torch", reduction="sum", per="module")
    with layers:
        curved(model(x)).sum().backward()
    whole_sketch = check(model, x).sketches
    torch.testing.assert_close(sum(layers.sketches.values()), whole_sketch, rtol=1e-4, atol=1e-5)
    tokens = fc.GradientSketcher(model, 64, backend="torch", reduction="sum", per="token")
    with tokens:
        curved(model(x)).sum().backward()
    assert tokens.sketches.shape == (4, 5, 64)
    torch.testing.assert_close(tokens.sketches.sum(1), whole_sketch, rtol=1e-4, atol=1e-5)


def test_experts_that_are_called_twice(fast: None) -> None:
    """Norms of parameters with several uses need them together."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixture = mixture()

        def forward(self, x: Tensor) -> Tensor:
            return self.mixture(x) + self.mixture(x.sin())

    check(seeded(Twice), points(5, 3, 8))


def test_rows_that_get_lost() -> None:
    """What is done to picked rows may bring rows of other samples in: such layers are run again for each sample, or refused."""

    def shifted(x: Tensor, rows: Tensor) -> Tensor:
        return (
            x[rows].cumsum(0).diff(dim=0, prepend=torch.zeros(1, 8))
        )  # the same rows, by operations that mix them

    model = seeded(lambda: Mixture(shifted))
    with pytest.warns(fc.SlowPathWarning, match="running Mixture '' again on each sample"):
        check(model, points(4, 3, 8))
    mixing = seeded(lambda: Mixture(lambda x, rows: (x + x.roll(1, 0))[rows]))  # with the neighbour's
    with pytest.raises(ValueError, match=r"samples"):
        check(mixing, points(4, 3, 8))


EXPERTS = {
    "mixtral": "MixtralExperts",
    "qwen3-moe": "Qwen3MoeExperts",
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_a_loop(name: str, fast: None) -> None:
    """The other implementation than the default, which `test_models` takes."""
    for samples, length in ((4, 4), (3, 5), (1, 4)):
        model = MODELS[name][0]()
        assert model.config._experts_implementation == "grouped_mm"
        model.set_experts_implementation("eager")
        check(model, batch_of(name, samples, length), call=causal)


def test_experts_whose_weights_are_copied() -> None:
    """A third implementation copies a matrix for each row: its module is run again."""
    model = MODELS["mixtral"][0]()
    model.set_experts_implementation("batched_mm")
    with pytest.warns(fc.SlowPathWarning, match="MixtralExperts 'model.layers.0.mlp.experts' again on each"):
        check(model, batch_of("mixtral", 4, 4), call=causal)


@pytest.mark.parametrize("name", ["bert", "gemma3", "mixtral", "t5", "swin"])
def test_models_with_checkpoints(name: str) -> None:
    """Checkpoints around layers with rules, experts, relative position biases, and in each other (Swin's stages and layers)."""
    make, call, fast = MODELS[name]
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        for option, value in vars(module).items():
            if (isinstance(module, nn.Dropout) or "drop" in option) and isinstance(value, float):
                setattr(module, option, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if fast else "ignore", fc.SlowPathWarning)
        check(model, batch_of(name, 3, 5), call=call, reference=lambda: (make(), call))


class Checkpointed(nn.Module):
    """Modules and operations in a checkpoint: a function of the module's own, around which no module is called when it runs again."""

    def __init__(self, kind: str, reentrant: bool | None) -> None:
        super().__init__()
        self.kind, self.reentrant = kind, reentrant
        self.before, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        if kind == "recurrent":
            self.inner: nn.Module = nn.GRU(8, 8, batch_first=True)
        elif kind == "attention":
            self.inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        elif kind == "experts":
            self.inner = Mixture(PICKS["index"], whole=True)
        else:
            self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8) + 0.5)

    def body(self, x: Tensor) -> Tensor:
        if self.kind == "recurrent":
            return self.inner(x)[0]
        if self.kind == "own":
            return nn.functional.linear(x, self.weight).tanh() * self.scale
        return (
            torch.einsum("btd,de->bte", x, self.weight) * self.scale if self.kind == "any" else self.inner(x)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x).tanh()
        h = self.body(h) if self.reentrant is None else checkpoint(self.body, h, use_reentrant=self.reentrant)
        return self.head(h).sum(1)


def checked_checkpoint(kind: str, reentrant: bool) -> None:
    theirs = seeded(lambda: Checkpointed(kind, None))
    for samples, length in ((4, 5), (5, 5), (1, 4)):
        model = seeded(lambda: Checkpointed(kind, reentrant))
        check(model, points(samples, length, 8), reference=lambda: (theirs, plain))


@pytest.mark.parametrize("kind", ["recurrent", "attention", "experts", "own", "any"])
def test_checkpoints(kind: str) -> None:
    checked_checkpoint(kind, reentrant=False)


@pytest.mark.parametrize("kind", ["recurrent", "attention", "experts"])
def test_reentrant_checkpoints(kind: str) -> None:
    checked_checkpoint(kind, reentrant=True)


@pytest.mark.parametrize("kind", ["own", "any"])
def test_operations_in_reentrant_checkpoints(kind: str) -> None:
    """They are seen in the backward pass for the first time, in no call of a module."""
    model = seeded(lambda: Checkpointed(kind, True))
    sketcher = fc.GradientSketcher(model, None, backend="torch")
    with pytest.raises(RuntimeError, match=r"'scale'.*'weight'.*use_reentrant=False"), sketcher:
        model(points(4, 5, 8)).sum().backward()


@pytest.mark.parametrize("name", ["bert", "gemma3", "mixtral", "t5", "deberta-v2"])
def test_models_under_autocast(name: str) -> None:
    """The gradients of DeBERTa's key biases nearly cancel out: most of what is left of autograd's sum is rounding."""
    make, call, _ = MODELS[name]
    exact = make()  # in float32, which is far more exact than bfloat16
    x = batch_of(name, 3, 5)
    sketcher = fc.GradientSketcher(make(), None, backend="torch", reduction="sum")
    with sketcher, torch.autocast("cpu", torch.bfloat16):
        curved(call(sketcher._model, x).float()).sum().backward()
    expected = alone(exact, lambda m, i: call(m, i).float(), list(sketcher.offsets), (x,)).norm(dim=1)
    assert ((sketcher.norms.double() - expected).abs() <= 0.15 * expected).all()


def test_what_cancels_out_hides_no_error_under_autocast() -> None:
    """A gradient that is half again as long is noticed, also where modules are run again."""
    model = MODELS["deberta-v2"][0]()
    name = "encoder.layer.0.attention.self.key_proj"
    dict(model.named_parameters())[f"{name}.weight"].register_hook(lambda g: 1.5 * g)
    sketcher = fc.GradientSketcher(model, None, backend="torch", parameters=f"{name}.*")
    with pytest.raises(RuntimeError, match=rf"'{name}.weight'.*do not add up"), sketcher:  # noqa: SIM117
        with torch.autocast("cpu", torch.bfloat16):
            curved(plain(model, batch_of("deberta-v2", 3, 5)).float()).sum().backward()


# ---- peft


def adapted(name: str, config: str, **options: Any) -> nn.Module:
    import peft

    base = MODELS[name][0]()
    found = seeded(lambda: peft.get_peft_model(base, getattr(peft, config)(**options))).eval()
    with torch.no_grad():
        for i, p in enumerate(found.parameters()):
            if p.requires_grad:
                p += 0.1 * points(*p.shape, seed=i)
    return found


ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"r": 3, "target_modules": ["q_proj", "down_proj"]}),
    "lora-of-embeddings": ("llama", "LoraConfig", {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora-of-mixtures": ("mixtral", "LoraConfig", {"r": 3, "target_modules": ["q_proj", "v_proj"]}),
    "dora": ("llama", "LoraConfig", {"r": 3, "target_modules": ["q_proj"], "use_dora": True}),
    "adalora": ("llama", "AdaLoraConfig", {"init_r": 3, "target_modules": ["q_proj"], "total_step": 10}),
    "ia3": ("llama", "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("llama", "VeraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "prompt-tuning": ("gpt2", "PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}),
    "lora-of-bert": ("bert", "LoraConfig", {"r": 3, "target_modules": ["query", "value"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    base, config, options = ADAPTERS[name]
    call = MODELS[base][1]
    for samples, length in ((6, 6), (3, 5), (1, 4)):
        check(adapted(base, config, **options), batch_of(base, samples, length), call=call)
