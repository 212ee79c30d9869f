"""CoLMTrainer: the rows it trains on, the parts it leaves to Trainer, checkpoints, and the same decision in two processes."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashcoreset as fc

transformers = pytest.importorskip("transformers", reason="an extra of its own")
from flashcoreset.integrations.transformers import STATE_NAME, CoLMConfig, CoLMMixin, CoLMTrainer  # noqa: E402

# peft knows activation checkpoints by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

VOCABULARY, LENGTH, LARGE, K = 43, 10, 12, 4
COLM = {"large_batch_size": LARGE, "keep_sources": ("rare",), "top": 128, "eps": 1e-2}
EXACT = {"gradients": "backprop", "eps": 1e-3, "matrices": ("q", "v")}


def model(seed: int = 0, **options: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **options)
        )


def rows(n: int = 60) -> list[dict[str, Any]]:
    """Rows of unequal length; every sixth is of the rare source."""
    random = np.random.default_rng(0)
    data = []
    for i in range(n):
        tokens = random.integers(0, VOCABULARY, random.integers(4, LENGTH)).tolist()
        data.append(
            {"input_ids": tokens, "source": "rare" if i % 6 == 0 else ("common", "other")[i % 2], "unused": i}
        )
    return data


def numbers(drawn: list[dict[str, Any]]) -> list[int]:
    every = [row["input_ids"] for row in rows()]
    return [every.index(row["input_ids"]) for row in drawn]


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padding on the right; rows must come without columns that the model does not take."""
    assert all(feature.keys() == {"input_ids"} for feature in features)
    width = max(len(feature["input_ids"]) for feature in features)
    tokens = torch.zeros(len(features), width, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for row, feature in enumerate(features):
        own = torch.tensor(feature.pop("input_ids"))  # some collators do so
        tokens[row, : len(own)], labels[row, : len(own)] = own, own
    return {"input_ids": tokens, "attention_mask": (labels != -100).long(), "labels": labels}


def arguments(folder: Path, **options: Any) -> Any:
    plain = {
        "per_device_train_batch_size": K,
        "per_device_eval_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(str(folder), **{**plain, **options})


class Recording(CoLMTrainer):
    """Keeps the rows that it drew, chose and trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn: list[list[dict[str, Any]]] = []
        self.coresets: list[fc.Coreset] = []
        self.trained: list[dict[str, Tensor]] = []

    def _coreset_of(self, rows: Any) -> dict[str, Any]:
        self.drawn.append(copy.deepcopy(rows.rows))
        inputs = super()._coreset_of(rows)
        self.coresets.append(self.last_coreset)
        return inputs

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
        self.trained.append(dict(inputs))
        return super().training_step(model, inputs, *rest)


def trainer(folder: Path, colm: dict[str, Any] | None = None, data: Any = None, **options: Any) -> Recording:
    return Recording(
        options.pop("model", None) or model(),
        arguments(folder, **options),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(10),
        data_collator=collate,
        colm=CoLMConfig(**{**COLM, **(colm or {})}),
    )


def weights_of(network: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def test_steps_train_on_the_coreset(tmp_path: Path) -> None:
    """Against the selection made by hand, from a copy of the model."""
    run = trainer(tmp_path, max_steps=1)
    before = copy.deepcopy(run.model)
    run.train()
    drawn, coreset, trained = run.drawn[0], run.coresets[0], run.trained[0]
    assert len(drawn) == LARGE
    labels = [row["source"] for row in drawn]
    method = fc.CoLM(K, top=128, keep_groups=["rare"])
    selector = fc.integrations.torch.BatchSelector(before, method, eps=1e-2, batch_size=K)
    inputs = collate([{"input_ids": list(row["input_ids"])} for row in drawn])
    expected = selector.select(inputs, labels)
    assert torch.equal(coreset.indices, expected.indices)
    assert torch.equal(coreset.weights, expected.weights)
    rare = [i for i, row in enumerate(drawn) if row["source"] == "rare"]
    assert set(rare) <= set(coreset.indices.tolist()) or len(rare) > K
    chosen = collate([{"input_ids": list(drawn[i]["input_ids"])} for i in coreset.indices.tolist()])
    assert trained.keys() == chosen.keys()
    assert all(torch.equal(trained[name], chosen[name]) for name in chosen)  # as narrow as the coreset allows


def test_training_is_that_of_trainer_on_the_coresets(tmp_path: Path) -> None:
    """A plain Trainer that is fed the chosen rows, in order, ends with the same weights."""
    run = trainer(tmp_path, data=rows(8 * LARGE), gradient_accumulation_steps=2)
    run.train()
    assert len(run.trained) == 8
    assert [len(batch["input_ids"]) for batch in run.trained] == [K] * 8
    picked = [
        {"input_ids": list(drawn[i]["input_ids"])}
        for drawn, coreset in zip(run.drawn, run.coresets, strict=True)
        for i in coreset.indices.tolist()
    ]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(picked)

    plain = InOrder(
        model(),
        arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=picked,
        data_collator=collate,
    )
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(run.model), weights_of(plain.model), strict=True))
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses == [entry["loss"] for entry in plain.state.log_history if "loss" in entry]


def test_logs(tmp_path: Path) -> None:
    run = trainer(tmp_path, logging_steps=2)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert 0 < entry["selection_time"] < 60
        assert 0 < entry["selection_share"] < 1
        assert sum(entry[f"chosen/{source}"] for source in ("common", "other", "rare")) == K
        assert "matching_error" not in entry
    assert not any("selection_time" in entry for entry in run.state.log_history if "loss" not in entry)
    kept = [coreset.info["counts"].get("rare", 0) for coreset in run.coresets[:2]]
    assert entries[0]["chosen/rare"] == sum(kept) / 2
    names = {name for coreset in run.coresets for name in coreset.info["budgets"]}
    assert names == {"common", "other"}


@pytest.mark.parametrize("selection", ["random", "omp", "medoid"])
def test_the_matching_error_in_the_logs(selection: str, tmp_path: Path) -> None:
    """It is that of the gradients of the model before the step, and of the weights that are in the loss."""
    colm: dict[str, Any] = {**EXACT, "log_matching_error": True}
    colm |= {"selection": "random"} if selection == "random" else {"method": selection}
    run = trainer(tmp_path, colm, max_steps=1)
    before = copy.deepcopy(run.model)
    run.train()
    (entry,) = (entry for entry in run.state.log_history if "loss" in entry)
    inputs = collate([{"input_ids": list(row["input_ids"])} for row in run.drawn[0]])
    exact = fc.integrations.torch.BatchSelector(before, gradients="backprop", matrices=("q", "v"))
    g, coreset = exact.gradients(inputs).dense(), run.coresets[0]
    weights = coreset.weights if selection == "omp" else torch.ones(len(coreset.indices))
    total = coreset.info["represented"] if selection == "omp" else len(coreset.indices)
    missed = weights @ g[coreset.indices] / total - g.mean(0)
    expected = float(missed.square().sum() / g.mean(0).square().sum())
    assert entry["matching_error"] == pytest.approx(expected, rel=1e-3)


def test_random_rows_under_the_quotas(tmp_path: Path) -> None:
    """The model does not run for them, and the quotas are those of CoLM."""
    passes: list[int] = []
    run = Recording(
        model(), arguments(tmp_path), train_dataset=rows(), data_collator=collate, colm=CoLMConfig(**COLM),
        selection="random",
    )  # fmt: skip
    run.model.register_forward_hook(lambda *_: passes.append(1))
    run.train()
    assert len(passes) == len(run.coresets) == 4
    for drawn, coreset in zip(run.drawn, run.coresets, strict=True):
        by_colm = fc.CoLM(K, keep_groups=["rare"]).select(
            fc.LowRankGradients(torch.arange(1.0, LARGE + 1)[:, None], 0, 100),
            [row["source"] for row in drawn],
        )
        assert coreset.info["counts"] == by_colm.info["counts"]
    assert len({tuple(coreset.indices.tolist()) for coreset in run.coresets}) > 1


def test_matching_pursuit_has_its_weights_in_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, {**EXACT, "method": "omp", "normalize": False}, max_steps=1, max_grad_norm=0)
    reference = copy.deepcopy(run.model)
    gradients: list[Tensor] = []
    run.add_callback(Gradients(gradients))
    run.train()
    coreset, batch = run.coresets[0], run.trained[0]
    losses = [
        reference(input_ids=own[None], labels=label[None]).loss
        for own, label in (
            (tokens[mask.bool()], labels[mask.bool()])
            for tokens, labels, mask in zip(
                batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
            )
        )
    ]
    assert len(losses) == len(coreset.indices)
    (torch.stack(losses) @ coreset.weights / LARGE).backward()
    for found, parameter in zip(gradients, reference.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)


def test_evaluation_is_trainers(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    plain = transformers.Trainer(model(), arguments(tmp_path), eval_dataset=rows(10), data_collator=collate)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    loader = run.get_eval_dataloader()
    assert len(loader) == 2
    run.get_train_dataloader()
    assert len(next(iter(run.get_eval_dataloader()))["input_ids"]) == 8


@pytest.mark.parametrize(
    "options",
    [{}, {"resample": True, "n_perturbations": 2}, {**EXACT, "method": "omp"}, {"selection": "random"}],
    ids=["one direction", "many", "exact", "random"],
)
def test_resumed_training_is_uninterrupted_training(options: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of an epoch (60 rows, 12 per step) and in a later one, with dropout."""
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    whole = trainer(tmp_path / "whole", options, model=model(attention_dropout=0.3), **saving)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-3" / STATE_NAME).is_file()
    for step in (3, 6):
        run = trainer(tmp_path / "resumed", options, model=model(seed=1, attention_dropout=0.3), **saving)
        run.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert len(run.coresets) == 7 - step
        for found, expected in zip(run.coresets, whole.coresets[step:], strict=True):
            assert torch.equal(found.indices, expected.indices)
            assert torch.equal(found.weights, expected.weights)
        assert all(
            torch.equal(a, b) for a, b in zip(weights_of(run.model), weights_of(whole.model), strict=True)
        )


def test_a_second_run_starts_afresh(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.train()
    run.train()
    assert [coreset.info["step"] for coreset in run.coresets] == [1, 2, 1, 2]


def test_weights_of_clusters(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, {"weighting": "cluster"}, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0
    )
    reference = copy.deepcopy(run.model)
    gradients: list[Tensor] = []
    run.add_callback(Gradients(gradients))
    run.train()
    total = 0.0
    for batch, coreset in zip(run.trained, run.coresets, strict=True):
        logits = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows = [
            F.cross_entropy(row[:-1], label[1:]) for row, label in zip(logits, batch["labels"], strict=True)
        ]
        assert coreset.weights.sum() > K
        total = total + (torch.stack(rows) * coreset.weights).sum() / coreset.weights.sum() / 2
    total.backward()
    for found, parameter in zip(gradients, reference.parameters(), strict=True):
        torch.testing.assert_close(
            found, parameter.grad, rtol=1e-4, atol=1e-6
        )  # float32's rounding, in another order
    # evaluated as ever
    assert run.evaluate()["eval_loss"] > 0


class Gradients(transformers.TrainerCallback):
    def __init__(self, into: list[Tensor]) -> None:
        self.into = into

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.into.extend(parameter.grad.clone() for parameter in model.parameters())


def test_integer_sources_one_source_and_small_last_batches(tmp_path: Path) -> None:
    data = [{**row, "where": i % 3} for i, row in enumerate(rows(LARGE + 3))]
    run = trainer(tmp_path, {"source": "where", "keep_sources": [2], "rule": "balanced"}, data, max_steps=2)
    run.train()
    assert set(run.coresets[0].info["budgets"]) <= {0, 1}
    assert [len(batch["input_ids"]) for batch in run.trained] == [
        K,
        3,
    ]  # the rest of the epoch is taken whole
    run = trainer(tmp_path, {"source": None, "keep_sources": ()}, rows(), max_steps=1)
    run.train()
    assert list(run.coresets[0].info["budgets"].values()) == [K]


def test_iterable_data(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows())

    run = trainer(tmp_path, data=Stream(), max_steps=3)
    run.train()
    assert numbers(run.drawn[1]) == list(range(LARGE, 2 * LARGE))


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="an extra of its own")
    adapted = peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["v_proj", "q_proj"]))
    run = trainer(tmp_path, {"top": 64}, model=adapted, max_steps=2)
    run.train()
    assert run._selector.parameter_name.endswith("layers.1.self_attn.v_proj.lora_B.default.weight")
    assert all(len(batch["input_ids"]) == K for batch in run.trained)


# ---- two processes

PROCESSES = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_integrations_transformers import *

folder = Path(sys.argv[1])
run = trainer(folder, {{"keep_sources": ()}}, max_steps=2, ddp_backend="gloo", save_strategy="steps", save_steps=1)
run.train()
gradients = []
cluster = {{"keep_sources": (), "weighting": "cluster"}}
weighted = trainer(folder, cluster, max_steps=1, max_grad_norm=0, ddp_backend="gloo")
weighted.add_callback(Gradients(gradients))
weighted.train()
(folder / f"{{run.args.process_index}}.json").write_text(json.dumps({{
    "indices": [coreset.indices.tolist() for coreset in run.coresets],
    "drawn": [numbers(drawn) for drawn in run.drawn],
    "trained": [batch["input_ids"].tolist() for batch in run.trained],
    "sums": [float(parameter.double().sum()) for parameter in run.model.parameters()],
    "weighted": [weighted.coresets[0].indices.tolist(), weighted.coresets[0].weights.tolist()],
    "gradients": torch.cat([gradient.flatten() for gradient in gradients]).tolist(),
}}))
"""


class Sharded(Recording):
    """Shares the model out by fully_shard, by accelerate's own code, which for CPUs it does not call itself."""

    def create_accelerator_and_postprocess(self) -> None:
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True


SHARDED = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_integrations_transformers import *

folder, found = Path(sys.argv[1]), {{}}
for name, gradients in (("zeroth_order", {{}}), ("backprop", EXACT)):
    colm = CoLMConfig(**{{**COLM, **gradients, "keep_sources": ()}})
    for kind in (Recording, Sharded):
        run = kind(
            model(), arguments(folder, max_steps=2, ddp_backend="gloo"), train_dataset=rows(), data_collator=collate, colm=colm
        )
        run.train()
        whole = [getattr(p, "full_tensor", lambda p=p: p)().double().sum() for p in run.model.parameters()]
        kinds = {{type(p).__name__ for p in run.model.parameters()}}
        chosen = [coreset.indices.tolist() for coreset in run.coresets]
        found[f"{{name}} {{kind.__name__}}"] = [chosen, [float(s) for s in whole], sorted(kinds)]
(folder / f"{{run.args.process_index}}.json").write_text(json.dumps(found))
"""


def test_two_processes_that_share_the_model(tmp_path: Path) -> None:
    """The coresets, and what is trained on them, are those of two processes with the whole model each."""
    first, second = on_two_processes(SHARDED, tmp_path)
    assert first == second
    for name in ("zeroth_order", "backprop"):
        (chosen, sums, kinds), (expected, whole, plain) = first[f"{name} Sharded"], first[f"{name} Recording"]
        assert (kinds, plain) == (["DTensor"], ["Parameter"])
        assert chosen == expected
        assert sums == pytest.approx(whole, rel=1e-4, abs=1e-4)


PARTITIONED = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_integrations_transformers import *

folder, found = Path(sys.argv[1]), {{}}
for name, gradients in (("zeroth_order", {{}}), ("backprop", EXACT)):
    colm = CoLMConfig(**{{**COLM, **gradients, "keep_sources": ()}})
    # Without a threshold, DeepSpeed leaves matrices as small as these whole.
    for stage, threshold in ((0, 0), (1, 0), (2, 0), (3, 0), (3, 100_000)):
        zero = {{"stage": stage, "stage3_param_persistence_threshold": threshold}}
        config = {{
            "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        }}
        given = arguments(folder, max_steps=2, ddp_backend="gloo", optim="adamw_torch", deepspeed=config if stage else None)
        run = Recording(model(), given, train_dataset=rows(), data_collator=collate, colm=colm)
        run.train()
        sums = []
        for parameter in run.model.parameters():
            if stage == 3:
                import deepspeed
                assert threshold or not parameter.numel()
                with deepspeed.zero.GatheredParameters([parameter]):
                    sums.append(float(parameter.double().sum()))
            else:
                sums.append(float(parameter.double().sum()))
        found[f"{{name}} {{stage}} {{threshold}}"] = [[coreset.indices.tolist() for coreset in run.coresets], sums]
(folder / f"{{run.args.process_index}}.json").write_text(json.dumps(found))
"""


def test_two_processes_of_deepspeed(tmp_path: Path) -> None:
    """ZeRO 1 to 3: the coresets, and what is trained on them, are those without DeepSpeed."""
    pytest.importorskip("deepspeed", reason="DeepSpeed compiles a library of its own when it is first used")
    first, second = on_two_processes(PARTITIONED, tmp_path, seconds=600)
    assert first == second
    for name in ("zeroth_order", "backprop"):
        expected, whole = first[f"{name} 0 0"]
        for stage in ("1 0", "2 0", "3 0", "3 100000"):
            chosen, sums = first[f"{name} {stage}"]
            assert chosen == expected
            assert sums == pytest.approx(whole, rel=1e-4, abs=1e-4)


def on_two_processes(code: str, tmp_path: Path, seconds: int = 120) -> list[Any]:
    """What each process wrote to its file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "run.py"
    script.write_text(code.format(tests=str(Path(__file__).parent)))
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=seconds)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes(tmp_path: Path) -> None:
    first, second = on_two_processes(PROCESSES, tmp_path)
    # one decision, over the rows of both
    assert first["indices"] == second["indices"]
    assert first["sums"] == second["sums"]
    everything = rows()
    for step, indices in enumerate(first["indices"]):
        assert len(indices) == 2 * K
        drawn = first["drawn"][step] + second["drawn"][step]
        assert len(set(drawn)) == 2 * LARGE
        for rank, own in enumerate((first, second)):
            wanted = [everything[drawn[index]]["input_ids"] for index in indices[rank::2]]
            width = max(map(len, wanted))
            assert own["trained"][step] == [tokens + [0] * (width - len(tokens)) for tokens in wanted]
    # The first decision, made by one process on all rows.
    data = [everything[i] for i in first["drawn"][0] + second["drawn"][0]]
    selector = fc.integrations.torch.BatchSelector(model(), fc.CoLM(2 * K, top=128), eps=1e-2, batch_size=K)
    inputs = collate([{"input_ids": list(row["input_ids"])} for row in data])
    expected = selector.select(inputs, [row["source"] for row in data])
    assert first["indices"][0] == first["weighted"][0] == expected.indices.tolist()
    assert first["weighted"][1] == expected.weights.tolist()
    # With the sizes of the clusters: the gradient is that of one weighted mean over all of the coreset.
    network = model()
    picked = {name: value[expected.indices] for name, value in inputs.items()}
    logits = network(picked["input_ids"], attention_mask=picked["attention_mask"]).logits
    losses = [F.cross_entropy(row[:-1], of[1:]) for row, of in zip(logits, picked["labels"], strict=True)]
    ((torch.stack(losses) * expected.weights).sum() / expected.weights.sum()).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert first["gradients"] == second["gradients"]
    torch.testing.assert_close(torch.tensor(first["gradients"]), gradients, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "checkpoint-2" / STATE_NAME).is_file()


# ---- errors


def test_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare = transformers.Trainer.create_accelerator_and_postprocess

    def prepared(self: transformers.Trainer) -> None:
        prepare(self)
        self.is_fsdp_enabled = True
        self.accelerator.state.fsdp_plugin = types.SimpleNamespace(fsdp_version=1)

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", prepared)
    with pytest.raises(ValueError, match=r"fsdp_config must have version 2: .*, got FSDP1$"):
        trainer(tmp_path)


def test_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "flashcoreset.integrations.transformers"
    monkeypatch.delattr(fc.integrations, "transformers")
    assert fc.integrations.transformers.CoLMTrainer is CoLMTrainer
    with pytest.raises(AttributeError, match="has no attribute 'tensorflow'"):
        _ = fc.integrations.tensorflow
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'flashcoreset\[transformers\]'"):
        _ = fc.integrations.transformers


def test_bad_configurations() -> None:
    for options, error, message in (
        ({"large_batch_size": 0}, ValueError, "large_batch_size must be >= 1, got 0"),
        ({"large_batch_size": 1.5}, TypeError, "large_batch_size must be an int"),
        ({"source": 3}, TypeError, "source must be a str or None, got int"),
        ({"keep_sources": "rare"}, TypeError, "keep_sources must be several sources, got 'rare'"),
        ({"keep_sources": None}, TypeError, "keep_sources must be several sources, got None"),
        ({"source": None}, ValueError, "source must be given with keep_sources"),
        ({"weighting": "none"}, ValueError, "weighting"),
        ({"selection": "best"}, ValueError, "unknown selection 'best'"),
        ({"method": "random"}, ValueError, "unknown method 'random'"),
        ({"log_matching_error": 1}, TypeError, "log_matching_error must be a bool, got 1"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            CoLMConfig(**{**COLM, **options})


def test_bad_trainers(tmp_path: Path) -> None:
    for colm, options, error, message in (
        ({"large_batch_size": 4}, {}, ValueError, "large_batch_size must be above per_device_train_batch_size.*4 and 4"),
        ({"gradients": "backprop"}, {}, ValueError, "eps is for gradients='zeroth_order'"),
        ({"gradients": "exact"}, {}, ValueError, "unknown gradients 'exact'"),
        ({"matrices": ("x",)}, {}, ValueError, "matrices must be one or several"),
        ({"normalize": 1}, {}, TypeError, "normalize must be a bool"),
        ({"method": "omp"}, {"label_smoothing_factor": 0.1}, ValueError, "'mean' with label_smoothing_factor"),
        ({"top": 0}, {}, ValueError, "top must be >= 1, got 0"),
        ({"eps": 0}, {}, ValueError, "eps must be > 0, got 0"),
        ({"keep_sources": (1.5,)}, {}, TypeError, r"keep_sources\[0\] must be an int"),
        ({"rule": "fair"}, {}, ValueError, "rule"),
        ({"parameter": "lm_head"}, {}, ValueError, "parameter must be the name of a parameter"),
        (
            {"weighting": "cluster"}, {"model": model(output_router_logits=True)}, ValueError,
            "weighting must be 'mean' with output_router_logits",
        ),
        ({}, {"auto_find_batch_size": True}, ValueError, "auto_find_batch_size must be False"),
        ({"weighting": "cluster"}, {"label_smoothing_factor": 0.1}, ValueError, "'mean' with label_smoothing_factor"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            trainer(tmp_path, colm, **options)
    with pytest.raises(TypeError, match="colm must be a CoLMConfig, got dict"):
        CoLMTrainer(model(), arguments(tmp_path), train_dataset=rows(), colm=COLM)
    with pytest.raises(ValueError, match=r"decoder layers in an nn.ModuleList.*Bare has no nn.ModuleList"):
        trainer(tmp_path, model=Bare())


class Bare(torch.nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_data_without_sources(tmp_path: Path) -> None:
    data = [{"input_ids": row["input_ids"]} for row in rows()]
    run = trainer(tmp_path, data=data)
    message = "the training data must have the column 'source', the source of each row .*got input_ids"
    with pytest.raises(ValueError, match=message):
        run.train()

    class Table(list):
        column_names = ("input_ids", "labels")

    with pytest.raises(ValueError, match=r"the column 'source'.*got input_ids, labels"):
        trainer(tmp_path, data=Table(data))
    with pytest.raises(TypeError, match=r"the source of row 0 must be an int, got 1.5"):
        trainer(tmp_path, data=[{**row, "source": 1.5} for row in data]).train()
    with pytest.raises(ValueError, match=r"the source of row 0 must be in the range of 64-bit integers"):
        trainer(tmp_path, data=[{**row, "source": 2**63} for row in data]).train()


class Classes:
    """The same interface as `datasets.ClassLabel`."""

    names = ("common", "other", "rare")

    def str2int(self, name: str) -> int:
        return self.names.index(name)

    def int2str(self, label: int) -> str:
        return self.names[label]


class Columns(torch.utils.data.Dataset[dict[str, Any]]):
    """The same interface as a `datasets.Dataset`: columns, and rows that are made of them."""

    column_names = ("input_ids", "source")

    def __init__(self, data: list[dict[str, Any]], features: Any = None, custom: bool = False) -> None:
        self.data, self.features, self.format = data, features, {"type": "custom" if custom else None}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return dict(self.data[i])

    def unique(self, column: str) -> list[Any]:
        return list(dict.fromkeys(row[column] for row in self.data))


def by_number() -> list[dict[str, Any]]:
    return [{**row, "source": Classes.names.index(row["source"])} for row in rows()]


def kept_rows(run: Recording) -> None:
    """All rows of the rare source are kept."""
    run.train()
    for drawn, coreset in zip(run.drawn, run.coresets, strict=True):
        rare = [i for i, row in enumerate(drawn) if row["source"] in ("rare", 2)]
        assert coreset.indices.tolist()[: len(rare)] == rare[:K]
    assert any(coreset.info["kept"] for coreset in run.coresets)


def test_names_of_classes(tmp_path: Path) -> None:
    features = {"source": Classes()}
    for data, kept in (
        (Columns(by_number(), features), ("rare",)),
        (Columns(by_number(), features), (2,)),
        (Columns(rows(), features, custom=True), ("rare",)),  # whose transform makes names of the numbers
    ):
        kept_rows(trainer(tmp_path, {"keep_sources": kept}, data))
    with pytest.raises(
        ValueError,
        match=r"keep_sources\[0\] must be a class of the column 'source', 'common', 'other', 'rare', got 'rear'",
    ):
        trainer(tmp_path, {"keep_sources": ("rear",)}, Columns(by_number(), features))
    only_two = [row for row in by_number() if row["source"] != 2]
    with pytest.raises(
        ValueError,
        match=r"keep_sources\[0\] must be a source of the training data, which has 'common', 'other' in",
    ):
        trainer(tmp_path, {"keep_sources": ("rare",)}, Columns(only_two, features))


@pytest.mark.parametrize("kind", [list, Columns])
def test_sources_that_the_data_does_not_have(kind: Any, tmp_path: Path) -> None:
    message = r"keep_sources\[1\] must be a source of the training data, which has 'common', 'other', 'rare' in the column 'source', got "
    for source in ("rear", 2):
        with pytest.raises(ValueError, match=message + repr(source)):
            trainer(tmp_path, {"keep_sources": ("rare", source)}, kind(rows()))
    with pytest.raises(ValueError, match=r"which has 0, 1, 2 in the column 'source', got 'rare'"):
        trainer(tmp_path, data=kind(by_number()))


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A data set of which nothing is known beforehand."""

    column_names = ("text",)

    def __init__(self, data: list[dict[str, Any]]) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter([dict(row) for row in self.data])


@pytest.mark.parametrize(
    "steps", [3, 8], ids=["the run", "the first epoch"]
)  # 60 rows are five large batches
def test_sources_that_a_stream_does_not_have(steps: int, tmp_path: Path) -> None:
    where = "the run" if steps == 3 else "the first epoch"
    run = trainer(tmp_path, {"keep_sources": ("rare", "rear")}, Stream(rows()), max_steps=steps)
    with pytest.warns(
        UserWarning,
        match=f"keep_sources keeps nothing by 'rear': no row of {where} .* 'common', 'other', 'rare'",
    ) as told:
        run.train()
    assert len([w for w in told if "keep_sources" in str(w.message)]) == 1
    assert run.coresets[0].info["kept"] > 0
    run = trainer(tmp_path, data=Stream(by_number()))
    with pytest.raises(
        ValueError, match="keep_sources must be of the type of the sources, which are 0, 1, 2, got 'rare'"
    ):
        run.train()


def test_sources_that_come_late(tmp_path: Path) -> None:
    """No batch has to have all sources."""
    data = sorted(rows(), key=lambda row: row["source"] == "rare")
    kept_rows(trainer(tmp_path, data=Stream(data), max_steps=5))


def test_transforms_that_make_the_source(tmp_path: Path) -> None:
    class Lazy(torch.utils.data.Dataset[dict[str, Any]]):
        column_names = ("text",)

        def __len__(self) -> int:
            return 60

        def __getitem__(self, i: int) -> dict[str, Any]:
            return dict(rows()[i])

    kept_rows(trainer(tmp_path, data=Lazy()))
    kept_rows(trainer(tmp_path, data=Stream(rows())))


class Translation(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = [(i + 3 * j) % (VOCABULARY - 3) + 3 for j in range(6)]
        return {"input_ids": tokens, "labels": tokens[::-1][:5], "source": i % 2}


@pytest.mark.parametrize("kind", ["masked", "seq2seq"])
def test_models_that_are_not_causal(kind: str, tmp_path: Path) -> None:
    """With clusters' weights, the gradient is that of each row's own loss, as the model computes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "masked":
            network = transformers.BertForMaskedLM(transformers.BertConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                hidden_dropout_prob=0, attention_probs_dropout_prob=0,
            ))  # fmt: skip
        else:
            network = transformers.T5ForConditionalGeneration(transformers.T5Config(
                vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0,
                decoder_start_token_id=0,
            ))  # fmt: skip

    def hide(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens = torch.tensor([feature["input_ids"] for feature in features])
        if kind == "seq2seq":
            return {"input_ids": tokens, "labels": torch.tensor([feature["labels"] for feature in features])}
        hidden = torch.zeros_like(tokens, dtype=torch.bool)
        hidden[:, ::2] = True
        return {"input_ids": tokens.masked_fill(hidden, 1), "labels": tokens.masked_fill(~hidden, -100)}

    colm = {"large_batch_size": LARGE, "top": 64, "weighting": "cluster"}
    run = Recording(
        network, arguments(tmp_path, max_steps=1, max_grad_norm=0), train_dataset=Translation(),
        data_collator=hide, colm=CoLMConfig(**colm),
    )  # fmt: skip
    gradients: list[Tensor] = []
    run.add_callback(Gradients(gradients))
    reference = copy.deepcopy(run.model)
    run.train()
    assert run._selector.shift_labels is False
    trained, coreset = run.trained[0], run.coresets[0]
    losses = [
        reference(input_ids=trained["input_ids"][i : i + 1], labels=trained["labels"][i : i + 1]).loss
        for i in range(K)
    ]
    (torch.stack(losses) * coreset.weights / coreset.weights.mean()).mean().backward()
    for found, parameter in zip(gradients, reference.parameters(), strict=True):
        torch.testing.assert_close(
            found, parameter.grad, rtol=1e-4, atol=1e-6
        )  # float32's rounding, in another order


def test_collators_that_join_samples(tmp_path: Path) -> None:
    def join(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens = torch.cat([torch.tensor(feature["input_ids"]) for feature in features])[None]
        return {"input_ids": tokens, "labels": tokens}

    for colm in (COLM, {**COLM, "source": None, "keep_sources": ()}):
        run = CoLMTrainer(
            model(), arguments(tmp_path), train_dataset=rows(), data_collator=join, colm=CoLMConfig(**colm)
        )
        with pytest.raises(
            ValueError, match="data_collator must make one row of labels per sample, got 1 of 4"
        ):
            run.train()


class Patches(torch.nn.Module):
    """Sees the pictures of all rows one after the other, as many for each row as it says: nothing of it can be cut by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)
        layer = torch.nn.ModuleDict({"v_proj": torch.nn.Linear(8, 8), "other": torch.nn.Linear(8, 8)})
        self.layers = torch.nn.ModuleList([layer])
        self.head = torch.nn.Linear(8, VOCABULARY)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, counts: Tensor, labels: Tensor | None = None
    ) -> Any:
        assert int(counts.sum()) == len(pixel_values)
        seen = torch.stack([part.mean(0) for part in pixel_values.split(counts.tolist())])
        x = self.embedding(input_ids) + seen[:, None]
        for layer in self.layers:
            x = x + layer["other"](layer["v_proj"](x).tanh())
        logits = self.head(x)
        if labels is None:
            return (logits,)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels = torch.randn(i % 3 + 1, 8, generator=torch.Generator().manual_seed(i))
        tokens = [(i + j) % VOCABULARY for j in range(6)]
        return {"input_ids": tokens, "pixel_values": pixels, "source": ("a", "b")[i % 2]}


def test_collators_that_return_pictures(tmp_path: Path) -> None:
    """Parts of a batch are collated apart: entries without a row for each sample are never cut."""

    def with_pictures(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens = torch.tensor([feature["input_ids"] for feature in features])
        pixels = [feature["pixel_values"] for feature in features]
        counts = torch.tensor([len(own) for own in pixels])
        return {"input_ids": tokens, "labels": tokens, "pixel_values": torch.cat(pixels), "counts": counts}

    for options in ({}, {"gradients": "backprop"}):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = Patches()
        run = Recording(
            network, arguments(tmp_path, max_steps=1), train_dataset=Pictures(), data_collator=with_pictures,
            colm=CoLMConfig(large_batch_size=LARGE, keep_sources=("b",), forward_batch_size=5, **options),
        )  # fmt: skip
        before = copy.deepcopy(run.model)
        run.train()
        method = fc.CoLM(K, keep_groups=["b"])
        whole = fc.integrations.torch.BatchSelector(before, method, **options)
        features = [{**row} for row in run.drawn[0]]
        expected = whole.select(with_pictures(features), [row["source"] for row in features])
        assert torch.equal(run.coresets[0].indices, expected.indices)


def test_data_sets_with_a_transform(tmp_path: Path) -> None:
    """The columns that the model and CoLM see are made row by row; what else is made goes no further."""
    datasets = pytest.importorskip("datasets", reason="an extra of its own")
    made = datasets.Dataset.from_dict({"text": [" ".join(map(str, row["input_ids"])) for row in rows()]})
    names = [row["source"] for row in rows()]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        every = [[int(word) for word in text.split()] for text in batch["text"]]
        sources = [names[numbers([{"input_ids": tokens}])[0]] for tokens in every]
        return {"input_ids": every, "source": sources, "length": [len(tokens) for tokens in every]}

    kept_rows(trainer(tmp_path, data=made.with_transform(encode)))
    classes = datasets.Features(
        {
            "source": datasets.ClassLabel(names=list(Classes.names)),
            "input_ids": datasets.List(datasets.Value("int64")),
        }
    )
    table = datasets.Dataset.from_list(
        [{"source": row["source"], "input_ids": row["input_ids"]} for row in by_number()], features=classes
    )
    run = trainer(tmp_path, data=table)
    kept_rows(run)
    assert set(run.coresets[0].info["counts"]) <= set(Classes.names)
    with pytest.raises(ValueError, match=r"must be a class of the column 'source'.*got 'rear'"):
        trainer(tmp_path, {"keep_sources": ("rear",)}, table)


@pytest.mark.parametrize("order", ["first", "last"])
def test_sft_trainer(order: str, tmp_path: Path) -> None:
    """Completions alone count, whichever base comes first; the picks are those made by hand from the model before the step."""
    trl = pytest.importorskip("trl", reason="an extra of its own")
    datasets = pytest.importorskip("datasets", reason="an extra of its own")
    bases = (CoLMMixin, trl.SFTTrainer) if order == "first" else (trl.SFTTrainer, CoLMMixin)
    kind = type("CoLMSFTTrainer", bases, {})
    data = datasets.Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [0, *[1] * (len(row["input_ids"]) - 1)],
                "source": row["source"],
            }
            for row in rows()
        ]
    )
    options = {
        "per_device_train_batch_size": K, "max_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "dataloader_pin_memory": False, "max_length": None, "bf16": False, "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": False},
    }  # fmt: skip

    def made(colm: dict[str, Any], **more: Any) -> Any:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words(), pad_token="[PAD]", eos_token="[EOS]"
        )
        return kind(
            model(), trl.SFTConfig(str(tmp_path), **{**options, **more}), train_dataset=data, processing_class=tokenizer,
            colm=CoLMConfig(**{**COLM, **colm}),
        )  # fmt: skip

    for colm in ({}, {**EXACT, "method": "omp"}):
        run = made(colm)
        run.train()
        entries = [entry for entry in run.state.log_history if "loss" in entry]
        assert len(entries) == 2
        assert all(entry["selection_time"] > 0 for entry in entries)
        assert all(any(name.startswith("chosen/") for name in entry) for entry in entries)
        assert 0 < len(run.last_coreset.indices) <= K
        assert run.last_coreset.info["step"] == 2
    with pytest.raises(ValueError, match=r"(packing|padding_free) must be False"):
        made({}, packing=True, max_length=32)


def words() -> Any:
    import tokenizers

    vocabulary = {"[PAD]": 0, "[EOS]": 1, **{str(i): i for i in range(2, VOCABULARY)}}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[EOS]"))


def test_a_trainer_of_ones_own_before_the_mixin(tmp_path: Path) -> None:
    """A loss of one's own stays in charge of losses without weights; weighted ones are the mixin's."""

    class Own(transformers.Trainer):
        calls = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Both(Own, CoLMMixin):
        pass

    class Later(Both):
        pass

    for kind, weighting, calls in ((Both, None, 2), (Later, "cluster", 0)):
        run = kind(
            model(), arguments(tmp_path, max_steps=2), train_dataset=rows(), data_collator=collate,
            colm=CoLMConfig(**COLM, weighting=weighting),
        )  # fmt: skip
        run.train()
        assert run.calls == calls
        assert len(run.last_coreset.indices) == K
    with pytest.raises(TypeError, match="colm must be a CoLMConfig, got NoneType"):
        Both(model(), arguments(tmp_path), train_dataset=rows(), data_collator=collate)


def test_checkpoints_of_another_trainer(tmp_path: Path) -> None:
    plain = transformers.Trainer(
        model(),
        arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=1),
        train_dataset=rows(),
        data_collator=collate,
    )
    plain.train()
    run = trainer(tmp_path, max_steps=3)
    with pytest.warns(UserWarning, match=f"has no {STATE_NAME}.*selection begins with an empty history"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [coreset.info["step"] for coreset in run.coresets] == [1, 2]
