"""BatchSelector beside zeroth-order gradients through whole models, for the families of decoders and with adapters; and that it
leaves no trace in the model, the random numbers and the hooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashcoreset as fc
from flashcoreset.gradients.zeroth_order import seed_of_call
from flashcoreset.integrations.torch import BatchSelector, sample_losses

VOCABULARY, ROWS, LENGTH = 41, 6, 9

# Name -> configuration class, model class, and the differences from the sizes below.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 6}),
    "phi": ("PhiConfig", "PhiForCausalLM", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {}),
    "mpt": ("MptConfig", "MptForCausalLM", {}),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
}
ATTENTION = {"num_key_value_heads": 2, "head_dim": 8}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**ATTENTION, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**ATTENTION, "num_local_experts": 4, "sliding_window": 8}),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**LATENT, "q_lora_rank": 12}),
}  # fmt: skip
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    **MIXTURES,
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", ATTENTION),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "llama4": (
        "Llama4TextConfig", "Llama4ForCausalLM",
        {**ATTENTION, "num_local_experts": 2, "intermediate_size_mlp": 24, "pad_token_id": 0},
    ),
}  # fmt: skip
# The place of the last V-projection, if not in model.layers.2.self_attn.v_proj; and the attention's last projection, if not
# o_proj.
NAMES = {
    "gpt2": "transformer.h.2.attn.c_attn",
    "gpt_neox": "gpt_neox.layers.2.attention.query_key_value",
    "bloom": "transformer.h.2.self_attention.query_key_value",
    "mpt": "transformer.blocks.2.attn.Wqkv",
    "persimmon": "model.layers.2.self_attn.query_key_value",
    "phi3": "model.layers.2.self_attn.qkv_proj",
    "deepseek_v2": "model.layers.2.self_attn.kv_b_proj",
    "deepseek_v3": "model.layers.2.self_attn.kv_b_proj",
}
OUTPUTS = {
    "gpt2": "c_proj",
    "gpt_neox": "dense",
    "bloom": "dense",
    "mpt": "out_proj",
    "persimmon": "dense",
    "phi": "dense",
}
VALUES = "model.layers.2.self_attn.v_proj"

# peft knows activation checkpoints by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def language_model(family: str, **changes: Any) -> Any:
    import transformers  # takes seconds

    config_class, model_class, options = {**FAMILIES, **MORE}[family]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }
    if family == "mpt":  # has names of its own
        sizes = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, config_class)(**{**sizes, **tokens, **options, **changes})
    if family in MIXTURES:
        config._experts_implementation = "eager"  # the grouped product does not take float64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():  # some start with zeros, which would hide mistakes
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def with_adapters(model: Any, **options: Any) -> Any:
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_dropout=0.5, **options)).train()


def batch(rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """Rows of unequal length, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    real = torch.arange(length) < lengths[:, None]
    return {
        "input_ids": tokens.masked_fill(~real, 0),
        "attention_mask": real.long(),
        "labels": tokens.masked_fill(~real, -100),
    }


def losses_of_rows(model: Any, data: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Row by row, of a full pass."""
    inputs = {name: value for name, value in data.items() if name != "labels"}

    def losses() -> Tensor:
        rows = []
        for row, labels in zip(model(**inputs).logits, data["labels"][:, 1:], strict=True):
            kept = labels != -100
            rows.append(F.cross_entropy(row[:-1][kept], labels[kept]))
        return torch.stack(rows)

    return losses


def whole(model: Any, parameter: Tensor, data: dict[str, Tensor], **options: Any) -> Tensor:
    """Coefficients by full passes in eval mode."""
    model.eval()
    found = fc.zeroth_order_gradients(losses_of_rows(model, data), [parameter], **options)
    model.train()
    return found.coefficients


@pytest.mark.parametrize(
    ("family", "adapters"),
    [*itertools.product(FAMILIES, (False, True)), *itertools.product(MORE, (False,))],
    ids=lambda value: {False: "weight", True: "lora"}.get(value, value),
)
def test_coefficients_are_those_of_the_whole_model(family: str, adapters: bool) -> None:
    model = language_model(family).double()
    name = NAMES.get(family, VALUES)
    expected = f"{name}.weight"
    if adapters:
        options = {"fan_in_fan_out": True} if family == "gpt2" else {}
        model = with_adapters(model, target_modules=[name.rpartition(".")[2]], **options).double()
        expected = f"base_model.model.{name}.lora_B.default.weight"
    model.train()
    selector = BatchSelector(model, eps=1e-2, seed=5, n_perturbations=2)
    assert selector.parameter_name == expected
    assert selector.layer_name == expected.partition(".2.")[0] + ".2"
    g = selector.gradients(batch())
    full = whole(model, selector.parameter, batch(), eps=1e-2, seed=5, n_perturbations=2)
    assert (g.seed, g.numel) == (5, selector.parameter.numel())
    assert full.abs().min() > 1e-4
    torch.testing.assert_close(g.coefficients, full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v2", "deepseek_v3"])
def test_the_perturbed_rows_are_those_of_the_values(family: str) -> None:
    """Without the values attention has nothing to add up: its last projection gets 0. And the rows are all of them."""
    model = language_model(family).eval()
    name = NAMES.get(family, VALUES)
    projection = model.get_submodule(name)
    if projection.bias is not None:
        projection.bias.data.zero_()
    seen: list[Tensor] = []
    attention = model.get_submodule(name.rpartition(".")[0])
    getattr(attention, OUTPUTS.get(family, "o_proj")).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    parameter = BatchSelector(model).parameter
    with torch.no_grad():
        model(**batch())
        parameter.zero_()
        model(**batch())
    assert (seen[0][:, 0] != 0).all()  # past a window there may be nothing but padding
    assert (seen[1] == 0).all()
    if family.startswith(
        "deepseek"
    ):  # the rank of the compressed state, and five numbers for each of four heads
        assert parameter.shape == (4, 5, 10)
        return
    values = {"llama": 16, "qwen3": 12, "phi3": 16, "gpt2": 32, "mistral": 16, "qwen2": 16, "gemma2": 16}
    assert parameter.numel() == values.get(family, 32) * 32


# ---- exact gradients

EXACT: dict[str, Any] = {"gradients": "backprop"}
ALL = ("q", "k", "v", "o")


def by_autograd(model: Any, selector: BatchSelector, data: dict[str, Any]) -> Tensor:
    """The gradients [B, numel] of each row's loss alone, by autograd through the whole model in eval mode."""
    was_training, rows = model.training, []
    model.eval()
    own = [model.get_parameter(name) for name in selector.parameter_names]
    wanted = [(p, p.requires_grad_(True)) for p in own]
    for row in range(len(data["labels"])):
        alone = {name: value[row : row + 1] for name, value in data.items()}
        with torch.enable_grad():
            (loss,) = losses_of_rows(model, alone)()
        grads = torch.autograd.grad(loss, [p for p, _ in wanted])
        views = [view for _, view in selector._wanted]
        rows.append(
            torch.cat(
                [(g if view is None else view(g)).flatten() for g, view in zip(grads, views, strict=True)]
            )
        )
    model.train(was_training)
    return torch.stack(rows)


def near(found: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    assert exact.abs().amax(1).min() > 1e-6
    assert ((found - exact).norm(dim=1) <= tolerance * exact.norm(dim=1)).all()


@pytest.mark.parametrize(
    ("family", "adapters"),
    [*itertools.product(FAMILIES, (False, True)), *itertools.product(MORE, (False,))],
    ids=lambda value: {False: "weight", True: "lora"}.get(value, value),
)
def test_gradients_are_those_of_autograd(family: str, adapters: bool) -> None:
    model = language_model(family).double()
    if adapters:
        options = {"fan_in_fan_out": True} if family == "gpt2" else {}
        name = NAMES.get(family, VALUES).rpartition(".")[2]
        model = with_adapters(model, target_modules=[name], **options).double()
    model.train()
    for matrices in ("v", ALL):
        selector = BatchSelector(model, **EXACT, matrices=matrices)
        before = state_of(model)
        g = selector.gradients(batch())
        assert same(state_of(model), before)
        assert g.numel == selector.numel == sum(p.numel() for p in selector.parameters)
        near(g.dense(), by_autograd(model, selector, batch()))
    if adapters and family == "llama":
        assert selector.parameter_names[2].endswith("v_proj.lora_B.default.weight")


@pytest.mark.parametrize(
    "data",
    [(1, LENGTH), (LENGTH, LENGTH), (4, 4), (2, 2), (40, 5)],
    ids=["one row", "as many rows as tokens", "as rows as heads", "two of two", "more rows than tokens"],
)
def test_shapes_that_could_be_mistaken(data: tuple[int, int]) -> None:
    model = language_model("llama").double()
    tokens = torch.randint(1, VOCABULARY, data, generator=torch.Generator().manual_seed(1))
    rows = {"input_ids": tokens, "labels": tokens}
    for matrices in ("v", ALL):
        selector = BatchSelector(model, **EXACT, matrices=matrices)
        for _ in range(2):  # with the first batch's checks, and without
            near(selector.gradients(rows).dense(), by_autograd(model, selector, rows))


def test_parts_of_a_batch_and_sketches() -> None:
    model, data = language_model("llama").double(), batch()
    expected = BatchSelector(model, **EXACT, matrices=ALL).gradients(data).dense()
    parts = BatchSelector(model, **EXACT, matrices=ALL, batch_size=4).gradients(data).dense()
    torch.testing.assert_close(parts, expected)
    cut = [
        {name: value[rows] for name, value in data.items()}
        for rows in (slice(0, 1), slice(1, 5), slice(5, 6))
    ]
    cut[0] = (
        {name: value[:, :4] for name, value in cut[0].items()}
        if data["attention_mask"][0, 4:].sum() == 0
        else cut[0]
    )
    torch.testing.assert_close(BatchSelector(model, **EXACT, matrices=ALL).gradients(cut).dense(), expected)
    coefficients = BatchSelector(model).gradients(data).coefficients
    torch.testing.assert_close(BatchSelector(model).gradients(cut).coefficients, coefficients)
    sketches = BatchSelector(model, **EXACT, matrices=ALL, sketch_dim=16, seed=3).gradients(data)
    torch.testing.assert_close(sketches, fc.sketch(expected, 16, kind="sjlt", seed=3))
    with pytest.raises(ValueError, match="batch must have at least one part"):
        BatchSelector(model).gradients([])


def test_exact_gradients_of_rows_without_labels_and_broken_rows() -> None:
    model, data = language_model("llama").double(), batch()
    data["labels"][1] = -100
    model.model.embed_tokens.weight.data[40] = torch.nan
    data["input_ids"][data["input_ids"] == 40] = 1
    data["input_ids"][4, 0] = 40
    selector = BatchSelector(model, fc.CoLM(3), **EXACT)
    for _ in range(2):
        found = selector.gradients(data).dense()
        assert (found[1] == 0).all()
        assert found[4].isnan().all()
        kept = torch.tensor([0, 2, 3, 5])
        rows = {name: value[kept] for name, value in data.items()}
        near(found[kept], by_autograd(model, selector, rows))
    assert selector.select(data).info["left_out"].tolist() == [1, 4]


def test_exact_gradients_in_half_precision_and_with_checkpoints() -> None:
    model = language_model("llama").train()
    exact = BatchSelector(model, **EXACT).gradients(batch()).dense()
    near(exact.double(), by_autograd(model, BatchSelector(model, **EXACT), batch()).double(), 1e-4)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    torch.testing.assert_close(BatchSelector(model, **EXACT).gradients(batch()).dense(), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = BatchSelector(model, **EXACT).gradients(batch()).dense()
    assert F.cosine_similarity(rough, exact).min() > 0.99
    half = BatchSelector(model.bfloat16(), **EXACT).gradients(batch())
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half.dense(), exact).min() > 0.97
    with torch.inference_mode():
        assert torch.isfinite(BatchSelector(model, **EXACT).gradients(batch()).dense()).all()


def test_autograd_keeps_what_comes_after_the_matrices_alone() -> None:
    """One pass of the model; no tensor of the layers before is kept, also where adapters' training makes the embeddings require
    gradients."""
    model = language_model("llama", num_hidden_layers=6)
    model.enable_input_require_grads()
    selector = BatchSelector(model, **EXACT)
    selector.gradients(batch())
    calls = dict.fromkeys(("model.layers.0.mlp", "model.layers.5.mlp", "lm_head"), 0)
    for name in calls:
        model.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selector.gradients(batch())
    assert list(calls.values()) == [1, 1, 1]
    of_last_layer = len(kept)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        assert model(**batch()).loss > 0
    assert of_last_layer < len(kept) / 5


def test_only_the_last_layer_runs_again() -> None:
    model = language_model("llama")
    calls = dict.fromkeys(("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp", "lm_head"), 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        model.get_submodule(name).register_forward_hook(count(name))
    for count_of, expected in ((1, [1, 1, 2, 2]), (3, [1, 1, 6, 6])):
        selector = BatchSelector(model, n_perturbations=count_of)
        selector.gradients(batch())  # beside whole passes, once
        for name in calls:
            calls[name] = 0
        selector.gradients(batch())
        assert list(calls.values()) == expected


def test_another_parameter() -> None:
    model = language_model("llama").double()
    for name, layer in (("model.layers.1.mlp.up_proj.weight", "model.layers.1"), ("model.norm.weight", "")):
        selector = BatchSelector(model, parameter=name)
        assert (selector.layer_name, selector.parameter_name) == (layer, name)
        assert selector.parameter is model.get_parameter(name)
        g = selector.gradients(batch())
        torch.testing.assert_close(
            g.coefficients, whole(model, selector.parameter, batch()), rtol=0, atol=1e-5
        )


def test_adapters_that_leave_the_values_alone() -> None:
    model = with_adapters(language_model("llama"), target_modules=["q_proj"])
    assert BatchSelector(model).parameter_name == f"base_model.model.{VALUES}.weight"
    model = with_adapters(language_model("llama"), target_modules=["v_proj"])
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert BatchSelector(model).parameter_name == f"base_model.model.{VALUES}.lora_B.second.weight"
    with model.disable_adapter():
        assert BatchSelector(model).parameter_name == f"base_model.model.{VALUES}.base_layer.weight"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_do_not_depend_on_their_batch(family: str) -> None:
    """The result depends neither on the batch's width nor on how many rows run at a time."""
    model = language_model(family).double()
    data = batch()
    coefficients = BatchSelector(model).gradients(data).coefficients
    parts = BatchSelector(model, batch_size=4).gradients(data).coefficients
    torch.testing.assert_close(parts, coefficients, rtol=0, atol=1e-8)
    for row in range(ROWS):
        width = int(data["attention_mask"][row].sum())
        alone = {name: value[row : row + 1, :width] for name, value in data.items()}
        found = BatchSelector(model).gradients(alone).coefficients
        torch.testing.assert_close(found, coefficients[row : row + 1], rtol=0, atol=1e-8)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]] * 3)
    labels = torch.tensor([[1, 1, 0], [0, 0, -100], [1, -100, -100]])
    first = F.softplus(torch.tensor(-1.0)), F.softplus(torch.tensor(1.0))  # of labels 1 and 0 at position 0
    second = F.softplus(torch.tensor(-2.0))
    expected = torch.stack([(first[0] + second) / 2, first[1], torch.tensor(0.0)])
    for output in (logits, (logits, None), type("Output", (), {"logits": logits})()):
        torch.testing.assert_close(sample_losses(output, labels), expected)
    assert sample_losses(logits.bfloat16(), labels).dtype == torch.float32
    assert sample_losses(logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_labels_of_other_integers(dtype: torch.dtype) -> None:
    selector = BatchSelector(language_model("llama"))
    expected = selector.gradients(batch()).coefficients
    other = {**batch(), "labels": batch()["labels"].to(dtype)}
    assert torch.equal(selector.gradients(other).coefficients, expected)


def test_rows_without_labels_and_broken_rows() -> None:
    model, data = language_model("llama"), batch()
    data["labels"][1] = -100
    data["labels"][3, 1:] = -100
    model.model.embed_tokens.weight.data[40] = torch.nan
    data["input_ids"][data["input_ids"] == 40] = 1
    data["input_ids"][4, 0] = 40
    found = BatchSelector(model).gradients(data).coefficients[:, 0]
    assert found[[1, 3]].tolist() == [0.0, 0.0]
    assert found.isnan().tolist() == [False] * 4 + [True, False]
    assert (found[[0, 2, 5]] != 0).all()


# ---- no trace


def state_of(model: nn.Module) -> list[Any]:
    return [
        *[(name, p.detach().clone().view(torch.int32)) for name, p in model.named_parameters()],
        *[(name, module.training) for name, module in model.named_modules()],
        *[
            (name, sorted(module.__dict__), len(module._forward_hooks))
            for name, module in model.named_modules()
        ],
        torch.get_rng_state(),
    ]


def same(found: list[Any], expected: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, tuple):
            return all(equal(x, y) for x, y in zip(a, b, strict=True))
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return all(equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_nothing_is_left_behind(family: str) -> None:
    dropout = {"gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5}, "gpt_neox": {"hidden_dropout": 0.5}}
    model = language_model(family, **dropout.get(family, {"attention_dropout": 0.5})).train()
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    layers[1].eval()  # some may be frozen
    layers[0].forward = layers[0].forward  # as offloading hooks have it
    selector = BatchSelector(model)
    before = state_of(model)
    first = selector.gradients(batch())
    assert same(state_of(model), before)
    torch.rand(())
    assert torch.equal(selector.gradients(batch()).coefficients, first.coefficients)  # no dropout


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("place", ["model.layers.1", "lm_head"])
def test_nothing_is_left_behind_by_an_error(error: type[BaseException], call: int, place: str) -> None:
    model = language_model("llama").train()
    calls = itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == call:
            torch.rand(())
            raise error

    selector = BatchSelector(model)
    model.get_submodule(place).register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises(error):
        selector.gradients(batch())
    assert same(state_of(model), before)
    assert selector.steps == 0


def test_training_goes_on() -> None:
    """For a fused projection a view is moved: autograd must not notice."""
    model = language_model("gpt2").train()
    selector = BatchSelector(model)
    for _ in range(2):
        selector.gradients(batch())
        model(**batch()).loss.backward()
    assert model.get_parameter("transformer.h.2.attn.c_attn.weight").grad is not None


def test_half_precision_and_checkpoints() -> None:
    model = language_model("llama").train()
    exact = BatchSelector(model, eps=1e-2).gradients(batch()).coefficients
    model.gradient_checkpointing_enable()
    assert torch.equal(BatchSelector(model, eps=1e-2).gradients(batch()).coefficients, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = BatchSelector(model, eps=0.1).gradients(batch()).coefficients
    assert F.cosine_similarity(rough, exact, dim=0) > 0.9


# ---- models that are not transformers'


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attn = nn.Module()
        self.attn.wv = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float) -> Any:
        if self.kind == "in place":
            return x.add_(self.attn.wv(x).tanh() * scale)
        y = x + self.attn.wv(x).tanh() * scale
        return (y, None) if self.kind == "tuple" else y


class Decoder(nn.Module):
    """A decoder of plain modules; `rounds` > 1 runs its layers several times."""

    def __init__(self, kind: str = "tensor", rounds: int = 1, layers: int = 3) -> None:
        super().__init__()
        self.rounds = rounds
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList([Block(kind) for _ in range(layers)])
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for i, block in itertools.product(range(self.rounds), self.blocks):
            x = block(x, 1.0 / (1 + i))
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "tuple"}, {"kind": "in place"}, {"rounds": 2}, {"layers": 1}],
    ids=["plain", "tuple", "in place", "rounds", "one layer"],
)
def test_plain_modules(options: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder(**options).double()
    data = {name: value for name, value in batch().items() if name != "attention_mask"}
    selector = BatchSelector(model, n_perturbations=2)
    last = options.get("layers", 3) - 1
    assert selector.parameter_name == f"blocks.{last}.attn.wv.weight"
    inputs, labels = data["input_ids"], data["labels"]
    expected = fc.zeroth_order_gradients(
        lambda: sample_losses(model(inputs), labels), [model.blocks[last].attn.wv.weight], n_perturbations=2
    )
    found = selector.gradients(data)
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=0, atol=1e-10)


class Dense(Decoder):
    """A model whose head is given the outputs of all layers, or whose last layer in the list runs first."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), taken: int = 3) -> None:
        super().__init__()
        self.order, self.taken = order, taken

    def forward(self, input_ids: Tensor) -> Tensor:
        outputs = [self.embedding(input_ids)]
        for place in self.order:
            outputs.append(self.blocks[place](outputs[-1], 1.0))
        return self.head(sum(outputs[-self.taken :]))


@pytest.mark.parametrize(
    "options", [{}, {"order": (2, 0, 1), "taken": 1}], ids=["sum of all", "last one first"]
)
def test_other_uses_of_earlier_layers_take_whole_passes(options: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dense(**options).double()
    inputs, labels = batch()["input_ids"], batch()["labels"]
    selector = BatchSelector(model)
    nothing = {"input_ids": inputs, "labels": torch.full_like(labels, -100)}
    assert not selector.gradients(nothing).coefficients.any()  # says nothing
    with pytest.warns(fc.SlowPathWarning, match=r"all of Dense runs in each pass .* before blocks\.2 do"):
        found = [selector.gradients({"input_ids": inputs, "labels": labels}).coefficients]
    found.append(selector.gradients({"input_ids": inputs, "labels": labels}).coefficients)
    expected = fc.zeroth_order_gradients(
        lambda: sample_losses(model(inputs), labels), [model.blocks[2].attn.wv.weight]
    )
    for coefficients in found:
        torch.testing.assert_close(coefficients, expected.coefficients, rtol=0, atol=1e-10)


# ---- which loss, and which entries have rows

KINDS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "causal": ("LlamaConfig", "LlamaForCausalLM", {}, True),
    "masked": ("BertConfig", "BertForMaskedLM", {}, False),
    "masked, other": ("RobertaConfig", "RobertaForMaskedLM", {"pad_token_id": 0}, False),
    "bert that generates": ("BertConfig", "BertLMHeadModel", {"is_decoder": True}, True),
    "seq2seq": ("T5Config", "T5ForConditionalGeneration", {"decoder_start_token_id": 0, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}, False),
    "seq2seq, other": ("BartConfig", "BartForConditionalGeneration", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "decoder_start_token_id": 2}, False),
    "texts": ("BertConfig", "BertForSequenceClassification", {"num_labels": 5}, False),
    "texts by a decoder": ("LlamaConfig", "LlamaForSequenceClassification", {"num_labels": 5, "pad_token_id": 0}, False),
    "tokens": ("BertConfig", "BertForTokenClassification", {"num_labels": 5}, False),
    "images": ("ViTConfig", "ViTForImageClassification", {"num_labels": 5, "image_size": 8, "patch_size": 4}, False),
}  # fmt: skip


def model_of_kind(kind: str) -> Any:
    import transformers

    config_class, model_class, options, _ = KINDS[kind]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "seq2seq":
        sizes = {"vocab_size": VOCABULARY}
    if kind == "seq2seq, other":
        sizes = {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(
            getattr(transformers, config_class)(**{**sizes, **options})
        )
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.double().train()


def batch_of_kind(kind: str) -> dict[str, Tensor]:
    data, generator = batch(), torch.Generator().manual_seed(4)
    if kind.startswith("masked"):  # some tokens are hidden, and these alone are to be found
        hidden = (torch.rand(data["labels"].shape, generator=generator) < 0.4) & (data["labels"] != -100)
        hidden[:, 0] = True
        data["labels"] = data["labels"].masked_fill(~hidden, -100)
        data["input_ids"] = data["input_ids"].masked_fill(hidden, 3)
    elif kind.startswith("seq2seq"):
        data["labels"] = torch.randint(3, VOCABULARY, (ROWS, 5), generator=generator)
        data["labels"][1, 3:] = -100
    elif kind == "tokens":
        data["labels"] = torch.where(data["labels"] == -100, -100, data["labels"] % 5)
    elif kind.startswith("texts"):
        data["labels"] = torch.arange(ROWS) % 5
    elif kind == "images":
        pixels = torch.randn(ROWS, 3, 8, 8, generator=generator, dtype=torch.float64)
        data = {"pixel_values": pixels, "labels": torch.arange(ROWS) % 5}
    return data


@pytest.mark.parametrize("batch_size", [None, 4], ids=["all rows", "4 rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_models_own(kind: str, batch_size: int | None) -> None:
    """The losses of each row alone, by the model itself."""
    model, data = model_of_kind(kind), batch_of_kind(kind)
    selector = BatchSelector(model, eps=1e-2, batch_size=batch_size)
    found = selector.gradients(data)
    assert selector.shift_labels is KINDS[kind][3]

    def losses() -> Tensor:
        rows = [{name: value[i : i + 1] for name, value in data.items()} for i in range(ROWS)]
        return torch.stack([model(**row).loss for row in rows]).double()

    model.eval()
    expected = fc.zeroth_order_gradients(losses, [selector.parameter], eps=1e-2)
    assert expected.coefficients.abs().min() > 1e-4
    # Some models compute their own loss in float32.
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=1e-3, atol=1e-4)


def test_masked_tokens_in_float32_and_by_tuples() -> None:
    model = model_of_kind("masked").float()
    model.config.return_dict = False
    selector = BatchSelector(model)
    selector.gradients(batch_of_kind("masked"))
    assert selector.shift_labels is False


class OtherLoss(Decoder):
    """A decoder with a loss of its own: `loss` of the logits and the labels."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(input_ids)
        return SimpleNamespace(logits=logits, loss=None if labels is None else self.loss(logits, labels))


def unmasked(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in data.items() if name != "attention_mask"}


def test_a_loss_of_another_kind_is_refused() -> None:
    def focal(logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return (losses.square()).mean()

    model = OtherLoss(focal)
    with pytest.raises(
        ValueError,
        match=r"the loss of OtherLoss must be the mean cross-entropy .* shift_labels=True or False",
    ):
        BatchSelector(model).gradients(unmasked(batch()))
    found = BatchSelector(model, shift_labels=True).gradients(unmasked(batch()))
    assert found.coefficients.abs().min() > 0


def test_models_without_a_loss_tell_by_their_labels() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder()
    data = unmasked(batch())
    following = torch.full_like(data["labels"], -100)
    following[:, :-1] = data["labels"][:, 1:]
    expected = BatchSelector(model, shift_labels=True).gradients(data).coefficients
    for labels, shifted in ((data["labels"], True), (following, False)):
        selector = BatchSelector(model)
        found = selector.gradients({**data, "labels": labels}).coefficients
        assert selector.shift_labels is shifted
        torch.testing.assert_close(found, expected)
    other = {
        **data,
        "labels": (data["labels"] + 1).clamp(max=VOCABULARY - 1).masked_fill(data["labels"] < 0, -100),
    }
    for labels in (other["labels"], torch.ones_like(other["labels"])):
        with pytest.raises(
            ValueError, match="whether Decoder predicts the token itself or the next one cannot be told"
        ):
            BatchSelector(model).gradients({"input_ids": torch.ones_like(labels), "labels": labels})


def test_broken_rows_do_not_hide_what_the_loss_is() -> None:
    model, data = model_of_kind("masked"), batch_of_kind("masked")
    model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())
    model.bert.embeddings.word_embeddings.weight.data[40] = torch.nan  # and not the head, which shares it
    data["input_ids"][data["input_ids"] == 40] = 1
    clean = BatchSelector(model).gradients(data).coefficients
    data["input_ids"][2, 1] = 40
    selector = BatchSelector(model)
    found = selector.gradients(data).coefficients
    assert selector.shift_labels is False
    assert found[2].isnan()
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]], rtol=0, atol=1e-9)
    # A model without a loss is recognised by its labels, broken rows or not.
    plain = Decoder()
    plain.embedding.weight.data[40] = torch.nan
    following = {"input_ids": batch()["input_ids"].clone(), "labels": torch.full((ROWS, LENGTH), -100)}
    following["input_ids"][0, 0] = 40
    following["labels"][:, :-1] = following["input_ids"][:, 1:]
    selector = BatchSelector(plain)
    assert selector.gradients(following).coefficients[0].isnan()
    assert selector.shift_labels is False


def test_equal_losses_in_both_senses() -> None:
    """A head of zeros has the loss log C whatever the labels are: then the labels decide."""
    model = language_model("llama")
    model.lm_head.weight.data.zero_()
    selector = BatchSelector(model)
    selector.gradients(batch())
    assert selector.shift_labels is True


class Biased(Decoder):
    """Attends by a bias [heads, T, T], and takes a vector, scalars and lists too."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.linspace(1, 2, heads, dtype=torch.float64))

    def forward(
        self,
        input_ids: Tensor,
        bias: Tensor | None = None,
        place: Tensor | None = None,
        task: Tensor | None = None,
        names: Any = None,
        scale: float = 1.0,
    ) -> Tensor:
        x = self.embedding(input_ids) * scale
        if bias is not None:
            weights = torch.softmax(bias * self.scales[:, None, None], -1)  # fails, or broadcasts, if cut
            x = x + torch.einsum("hst,btd->bsd", weights.tril(), x) / len(weights)
        if place is not None:
            x = x + place[:, None].cos()
        if task is not None:
            x = x * (1 + task[:, None, None])
        if names is not None:
            x = x * torch.tensor([1.0 + len(name) for name in names])[:, None, None]
        for block in self.blocks:
            x = block(x, 1.0)
        return self.head(x)


def biased(heads: int = ROWS) -> Biased:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Biased(heads).double()


def extra_entries() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "bias": torch.randn(ROWS, LENGTH, LENGTH, generator=generator, dtype=torch.float64),
        "place": torch.arange(LENGTH) * 0.3,
        "task": torch.rand(ROWS, generator=generator, dtype=torch.float64),
        "names": ["a", "bc", "def", "g", "", "hi"],
        "scale": 0.5,
    }


@pytest.mark.parametrize(
    "names",
    [["bias"], ["task"], ["place"], ["names"], ["bias", "place", "task", "names", "scale"]],
    ids=" ".join,
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_has_rows_is_found_out(names: list[str], batch_size: int) -> None:
    data = {**unmasked(batch()), **{name: extra_entries()[name] for name in names}}
    expected = BatchSelector(biased()).gradients(data).coefficients
    selector = BatchSelector(biased(), batch_size=batch_size)
    for _ in range(2):
        torch.testing.assert_close(selector.gradients(data).coefficients, expected, rtol=0, atol=1e-9)
    with_rows = {"input_ids", "labels", "task", "names"} & data.keys()
    named = BatchSelector(biased(), batch_size=batch_size, batch_keys=with_rows).gradients(data)
    assert torch.equal(named.coefficients, selector.gradients(data).coefficients)


def test_as_many_tokens_as_rows() -> None:
    """Vectors of the sequence beside vectors of the batch."""
    data = {
        **unmasked(batch(ROWS, ROWS)),
        "place": torch.arange(ROWS) * 0.3,
        "task": torch.rand(ROWS).double(),
    }
    data["labels"] = data["labels"].clamp(min=0)
    data["labels"][0, -1] = -100
    expected = BatchSelector(biased(), shift_labels=True).gradients(data).coefficients
    found = BatchSelector(biased(), shift_labels=True, batch_size=2).gradients(data).coefficients
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_what_stays_open_is_refused_by_name() -> None:
    data = {
        **unmasked(batch()),
        "bias": torch.zeros(ROWS, LENGTH, LENGTH, dtype=torch.float64),
        "task": extra_entries()["task"],
    }
    alone = biased(1)  # of one head, so that a bias of zeros may be cut as well
    with pytest.raises(
        ValueError,
        match=r"whether batch\['bias'\] \(shape \(6, 9, 9\)\) has a row for each sample cannot be told .*batch_keys=",
    ):
        BatchSelector(alone, batch_size=1).gradients(data)
    named = BatchSelector(alone, batch_size=1, batch_keys=["input_ids", "task"]).gradients(data)
    expected = BatchSelector(alone).gradients(data)
    torch.testing.assert_close(named.coefficients, expected.coefficients, rtol=0, atol=1e-9)


class Pictures(Decoder):
    """Takes the patches of all pictures one after the other, as many per row as it has tokens 0."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        places = input_ids == 0
        if int(places.sum()) != len(pixel_values):
            raise ValueError("image features and image tokens do not match")
        x = x.masked_scatter(places[..., None], pixel_values)
        for block in self.blocks:
            x = block(x, 1.0)
        return self.head(x)


def test_pictures_beside_rows() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Pictures().double()
    tokens = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2 * ROWS, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one_each, unequal = tokens.clone(), tokens.clone()
    one_each[:, 1] = 0
    unequal[:3, 1:3] = 0
    data = {"input_ids": one_each, "labels": one_each, "pixel_values": pixels[:ROWS]}
    expected = BatchSelector(model).gradients(data).coefficients
    selector = BatchSelector(model, batch_size=2)
    torch.testing.assert_close(selector.gradients(data).coefficients, expected, rtol=0, atol=1e-9)
    # As many pictures as rows, but not one per row: the model itself notices it.
    with pytest.raises(ValueError, match="image features and image tokens do not match"):
        selector.gradients({"input_ids": unequal, "labels": unequal, "pixel_values": pixels[:ROWS]})
    # A later batch with others.
    two_each = one_each.clone()
    two_each[:, 2] = 0
    data = {"input_ids": two_each, "labels": two_each, "pixel_values": pixels}
    with pytest.raises(
        ValueError, match=r"batch\['pixel_values'\] must have 6 rows, as the labels have, got shape \(12, 8\)"
    ):
        selector.gradients(data)
    with pytest.raises(
        ValueError,
        match=r"whether batch\['input_ids'\].*batch\['pixel_values'\] \(shape \(12, 8\)\).*batch_size=None",
    ):
        BatchSelector(model, batch_size=2).gradients(data)
    assert BatchSelector(model).gradients(data).coefficients.shape == (ROWS, 1)


class TimeFirst(Decoder):
    """Takes a matrix [T, B]."""

    def forward(self, input_ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(input_ids) * weights.T[..., None]


@pytest.mark.parametrize("length", [LENGTH, ROWS])
def test_rows_in_another_dimension_are_refused(length: int) -> None:
    data = unmasked(batch(ROWS, length))
    data["weights"] = torch.rand(length, ROWS, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"whether .*batch\['weights'\] .* batch_size=None"):
        BatchSelector(TimeFirst(), batch_size=2).gradients(data)
    assert BatchSelector(TimeFirst()).gradients(data).coefficients.shape == (ROWS, 1)


def test_documented_entries_need_no_question() -> None:
    """The first batch runs no whole pass, which might not fit into memory."""
    model, sizes = language_model("llama"), []
    model.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    positions = torch.arange(LENGTH)[None]
    selector = BatchSelector(model, batch_size=2)
    selector.gradients({**batch(), "position_ids": positions})
    assert set(sizes) == {2}
    sizes.clear()
    selector.gradients({**batch(), "position_ids": positions.expand(ROWS, -1)})
    assert sizes == [2] * (2 * ROWS // 2)  # later batches run two passes of each part


# ---- exact gradients of models that are not transformers'


class Turned(nn.Module):
    """A decoder whose layers see [T, B, width], or all tokens as [B * T, width]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"v_proj": nn.Linear(8, 8), "other": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        batch, length = input_ids.shape
        if self.kind == "time first":
            x = x.transpose(0, 1)
        elif self.kind == "flat":
            x = x.flatten(0, 1)
        elif self.kind == "mixed":
            x = x.flatten(0, 1).roll(3, 0)
        for layer in self.layers:
            values = x if self.kind == "not at all" else layer["v_proj"](x)
            if self.kind == "in place":
                values *= 2
            if self.kind == "again":
                values = values + layer["v_proj"](values.tanh())
            if self.kind == "by hand":
                values = values + F.linear(x.cos(), layer["v_proj"].weight)
            if self.kind == "not at all":
                values = F.linear(x, layer["v_proj"].weight)
            x = x + layer["other"](values.tanh())
        if self.kind == "no gradients":
            x = x.detach()
        if self.kind == "time first":
            x = x.transpose(0, 1)
        elif self.kind == "mixed":
            x = x.roll(-3, 0)
        return self.head(x.reshape(batch, length, -1).cumsum(1))


def turned(kind: str) -> Turned:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Turned(kind).double()


def losses_of_turned(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    return sample_losses(model(data["input_ids"]), data["labels"])


@pytest.mark.parametrize("rows", [ROWS, LENGTH, 1])
@pytest.mark.parametrize("kind", ["plain", "time first", "flat", "in place", "again"])
def test_layouts_and_uses(kind: str, rows: int) -> None:
    model, data = turned(kind), unmasked(batch(rows))
    for parameter in (None, ["layers.1.v_proj.weight", "layers.0.other.weight"]):
        selector = BatchSelector(model, **EXACT, parameter=parameter)
        expected = []
        for row in range(rows):
            alone = {name: value[row : row + 1] for name, value in data.items()}
            found = torch.autograd.grad(losses_of_turned(model, alone).sum(), selector.parameters)
            expected.append(torch.cat([g.flatten() for g in found]))
        for _ in range(2):
            near(selector.gradients(data).dense(), torch.stack(expected))


def test_one_row_first_proves_nothing() -> None:
    """The layout is found again on the next batch."""
    model = turned("time first")
    selector = BatchSelector(model, **EXACT)
    selector.gradients(unmasked(batch(1)))
    found = selector.gradients(unmasked(batch(LENGTH))).dense()
    expected = BatchSelector(model, **EXACT).gradients(unmasked(batch(LENGTH))).dense()
    assert torch.equal(found, expected)


def test_what_exact_gradients_refuse() -> None:
    data = unmasked(batch())
    for kind, message in (
        (
            "mixed",
            r"the activations of layers.1.v_proj.weight must be those of 6 rows one by one, got shape \(54, 8\)",
        ),
        ("by hand", "the gradient of layers.1.v_proj.weight is not what passes through its module"),
        ("not at all", "the module of layers.1.v_proj.weight must run in the model's forward pass"),
        ("no gradients", "the model's logits must depend on layers.1.v_proj.weight"),
    ):
        model = turned(kind)
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            BatchSelector(model, **EXACT).gradients(data)
        assert same(state_of(model), before)


def test_losses_without_logits_are_refused() -> None:
    class Fused(Turned):
        def forward(self, input_ids: Tensor, labels: Any = None) -> Any:
            return SimpleNamespace(loss=super().forward(input_ids).mean(), logits=None)

    with pytest.raises(
        TypeError, match=r"must return logits, got a loss alone: a fused loss \(such as Liger's"
    ):
        BatchSelector(Fused("plain"), shift_labels=True).gradients(unmasked(batch()))


def test_vision_language_models() -> None:
    """The language model's last layer is taken, whichever tower comes last."""
    model = nn.ModuleDict({"language_model": turned("plain"), "visual_tower": turned("plain")})
    assert BatchSelector(model).parameter_name == "language_model.layers.1.v_proj.weight"
    assert BatchSelector(model["visual_tower"]).parameter_name == "layers.1.v_proj.weight"
    alone = nn.ModuleDict({"vision_model": turned("plain")})
    assert BatchSelector(alone).parameter_name == "vision_model.layers.1.v_proj.weight"


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_exact_gradients_of_models_that_are_not_causal(kind: str) -> None:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            sizes = {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 24,
            }
            model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **sizes))
        else:
            sizes = {
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 2,
                "num_heads": 2,
                "decoder_start_token_id": 0,
            }
            model = transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=VOCABULARY, **sizes)
            )
    model, data = model.double(), unmasked(batch())
    selector = BatchSelector(model, **EXACT, matrices=ALL)
    found = selector.gradients(data).dense()
    assert selector.shift_labels is False
    model.eval()
    for row in range(ROWS):
        alone = {name: value[row : row + 1] for name, value in data.items()}
        grads = torch.autograd.grad(model(**alone).loss, selector.parameters)
        near(found[row : row + 1], torch.cat([g.flatten() for g in grads])[None])


# ---- selecting, and going on later


class Recorder:
    """Chooses the rows of the largest coefficients, and remembers its arguments."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def select(self, grads: fc.LowRankGradients, groups: Any = None) -> fc.Coreset:
        self.calls.append((grads, groups))
        return fc.Coreset(grads.coefficients[:, 0].topk(2).indices, torch.ones(2))

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = [None] * state["calls"]


def test_select() -> None:
    model, method = language_model("llama"), Recorder()
    selector = BatchSelector(model, method)
    coreset = selector.select(batch(), torch.arange(ROWS))
    grads, groups = method.calls[0]
    assert torch.equal(groups, torch.arange(ROWS))
    assert torch.equal(coreset.indices, grads.coefficients[:, 0].topk(2).indices)


def test_random_rows_need_no_model() -> None:
    model = language_model("llama")
    model.forward = None  # would fail
    selector = BatchSelector(model, fc.CoLM(3, keep_groups=["b"], method="random"))
    coreset = selector.select(batch(), ["a", "a", "b", "a", "a", "b"])
    assert coreset.info["counts"] == {"a": 1, "b": 2}
    parts = [{name: value[rows] for name, value in batch().items()} for rows in (slice(0, 2), slice(2, 6))]
    assert len(selector.select(parts, ["a", "a", "b", "a", "a", "b"]).indices) == 3


def test_matching_pursuit_of_exact_gradients() -> None:
    """Its weighted sum is nearer to the batch's gradient than that of medoids, of exact or estimated gradients."""
    model, data = language_model("llama"), batch(24, 12)
    exact = BatchSelector(model, **EXACT, matrices=ALL).gradients(data)
    errors = {}
    for name, options, method in (
        ("omp", EXACT, fc.CoLM(12, method="omp", top=None, normalize=False)),
        ("medoid", EXACT, fc.CoLM(12, top=None, normalize=False)),
        ("estimated", {}, fc.CoLM(12)),
    ):
        coreset = BatchSelector(model, method, **options, **({"matrices": ALL} if options else {})).select(
            data
        )
        total = coreset.info["represented"]
        errors[name] = fc.matching_error(exact, coreset.indices, coreset.weights, total=total)
    assert errors["omp"] < 0.5 * min(errors["medoid"], errors["estimated"])


def test_distributed_models_are_unwrapped(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = language_model("llama")
        wrapped = nn.parallel.DistributedDataParallel(model)
        found = BatchSelector(wrapped)
        assert found.parameter_name == f"{VALUES}.weight"
        assert torch.equal(
            found.gradients(batch()).coefficients, BatchSelector(model).gradients(batch()).coefficients
        )
    finally:
        torch.distributed.destroy_process_group()


def test_directions_by_step() -> None:
    model = language_model("llama")
    assert [BatchSelector(model, seed=4).gradients(batch()).seed for _ in range(2)] == [4, 4]
    selector = BatchSelector(model, Recorder(), seed=4, resample=True, batch_size=2)
    seeds = [selector.gradients(batch()).seed for _ in range(3)]
    assert seeds == [seed_of_call(4, step) for step in range(3)]
    assert len(set(seeds)) == 3
    selector.select(batch())
    again = BatchSelector(model, Recorder(), seed=4, resample=True, batch_size=2)
    again.load_state_dict(selector.state_dict())
    assert (again.steps, len(again.method.calls)) == (4, 1)
    a, b = again.gradients(batch()), selector.gradients(batch())
    assert a.seed == b.seed == seed_of_call(4, 4)
    assert torch.equal(a.coefficients, b.coefficients)
    for state in ({}, {"steps": 1}, 3):
        with pytest.raises(ValueError, match="state must have the entries steps, method, got"):
            selector.load_state_dict(state)
    for steps, message in ((-1, "steps must be >= 0, got -1"), (2**70, "range of 64-bit integers")):
        with pytest.raises(ValueError, match=message):
            selector.load_state_dict({**selector.state_dict(), "steps": steps})


# ---- errors


def quantised() -> nn.Module:
    model = Decoder()
    values = model.blocks[2].attn.wv
    values.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    return model


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"qkv_proj": nn.Linear(4, 12)})])


def test_bad_models() -> None:
    class Plain(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = nn.ModuleList([nn.Linear(2, 2)]) if kind == "list" else nn.Linear(2, 2)

    for arguments, options, error, message in (
        ((3,), {}, TypeError, "model must be a torch.nn.Module, got int"),
        ((Plain("linear"),), {}, ValueError, "nn.ModuleList.*named v_proj, value.*c_attn, .*Plain has no nn.ModuleList"),
        ((Plain("list"),), {}, ValueError, r"Plain has the lists kind \(1 of Linear\); name the parameter"),
        ((Fused(),), {}, ValueError, "layers.0.qkv_proj.weight is known for the model_type phi3, got None"),
        ((quantised(),), {}, TypeError, "must be floating, got torch.uint8 .*LoRA"),
        ((Decoder(), 3), {}, TypeError, r"method must have select\(grads, groups\), as fc.CoLM has, got int"),
        ((Decoder(),), {"parameter": 3}, TypeError, "parameter must be a str, several, or None, got int"),
        ((Decoder(),), {"parameter": [3]}, TypeError, "parameter must be a str, several, or None, got int among them"),
        ((Decoder(),), {"parameter": []}, ValueError, "parameter must name one parameter or several, each once"),
        ((Decoder(),), {"parameter": ["head.weight"] * 2}, ValueError, "one parameter or several, each once"),
        ((Decoder(),), {"gradients": "exact"}, ValueError, "unknown gradients 'exact'"),
        ((Decoder(),), {"matrices": "x"}, ValueError, "matrices must be one or several of q, k, v, o"),
        ((Decoder(),), {"matrices": ("v", "v")}, ValueError, "each once"),
        ((Decoder(),), {"matrices": ()}, ValueError, "matrices must be one or several"),
        ((Decoder(),), {"matrices": 3}, ValueError, "matrices must be one or several of q, k, v, o, each once, got 3"),
        ((Decoder(),), {"matrices": "q"}, ValueError, "no projection named wq was found beside"),
        ((Decoder(),), {"sketch_dim": 8}, ValueError, "sketch_dim is for gradients='backprop'"),
        ((Decoder(),), {**EXACT, "sketch_dim": 0}, ValueError, "sketch_dim must be >= 1, got 0"),
        ((Decoder(),), {**EXACT, "eps": 0.1}, ValueError, "eps is for gradients='zeroth_order'"),
        ((Decoder(),), {**EXACT, "n_perturbations": 2}, ValueError, "n_perturbations is for gradients='zeroth_order'"),
        ((Decoder(),), {**EXACT, "resample": True}, ValueError, "resample is for gradients='zeroth_order'"),
        ((Decoder(),), {**EXACT, "parameter": "embedding.weight"}, ValueError, "weight of a linear layer .*got embedding.weight"),
        ((Decoder(),), {"parameter": "blocks.weight"}, ValueError, "such as head.weight, got 'blocks.weight'"),
        ((quantised(),), {"parameter": "blocks.2.attn.wv.weight"}, TypeError, "floating, got torch.uint8"),
        ((Decoder(),), {"eps": 0}, ValueError, "eps must be > 0, got 0"),
        ((Decoder(),), {"eps": float("nan")}, ValueError, "eps must be finite, got nan"),
        ((Decoder(),), {"seed": 2**63}, ValueError, "seed must be in the range"),
        ((Decoder(),), {"n_perturbations": 0}, ValueError, "n_perturbations must be >= 1, got 0"),
        ((Decoder(),), {"resample": 1}, TypeError, "resample must be a bool, got 1"),
        ((Decoder(),), {"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ((Decoder(),), {"batch_size": 1.5}, TypeError, "batch_size must be an int"),
        ((Decoder(),), {"shift_labels": 1}, TypeError, "shift_labels must be a bool or None, got 1"),
        ((Decoder(),), {"batch_keys": "task"}, TypeError, "batch_keys must be several names or None, got 'task'"),
        ((Decoder(),), {"batch_keys": [3]}, TypeError, r"batch_keys\[0\] must be a str, got int"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            BatchSelector(*arguments, **options)


def test_bad_batches() -> None:
    selector = BatchSelector(Decoder())
    tokens = torch.ones(2, 3, dtype=torch.int64)
    for data, error, message in (
        (tokens, TypeError, "batch must be a mapping of names to tensors, got Tensor"),
        ({"input_ids": tokens}, ValueError, "batch must have the entry labels, got input_ids"),
        ({"input_ids": tokens, "labels": tokens.float()}, TypeError, "must be an integer tensor, got torch.float32"),
        ({"input_ids": tokens, "labels": tokens > 0}, TypeError, "must be an integer tensor, got torch.bool"),
        ({"input_ids": tokens, "labels": [1]}, TypeError, "must be an integer tensor, got list"),
        ({"input_ids": tokens, "labels": tokens[:, 0]}, ValueError, r"logits must have shape \[2, 'C'\].*got \(2, 3, 41\)"),
        ({"input_ids": tokens, "labels": tokens[0, 0]}, ValueError, r"\[B, T\] with T >= 2, or \[B\], got \(\)"),
        ({"input_ids": tokens, "labels": tokens[:, :1]}, ValueError, r"T >= 2, or \[B\], got \(2, 1\)"),
        ({"input_ids": tokens, "labels": tokens[:, :2]}, ValueError, r"logits must have shape \[2, 2, 'C'\].*got \(2, 3, 41\)"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            selector.gradients(data)
    with pytest.raises(ValueError, match="method must be given for select"):
        selector.select({"input_ids": tokens, "labels": tokens})
    with pytest.raises(TypeError, match="must return logits or have them first, got dict"):
        sample_losses({}, tokens)


def test_importing_the_package_imports_no_extras() -> None:
    code = (
        "import sys, flashcoreset as fc\n"
        "assert fc.integrations.torch.BatchSelector\n"
        "assert not {'transformers', 'peft', 'accelerate'} & set(sys.modules)"
    )
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
