"""What CoLM's selection costs in a training step: beside a forward pass, and beside the step on the rows that it chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flashcoreset as fc
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row
from flashcoreset.integrations.torch import BatchSelector

VOCABULARY = 1_000


def _inputs(layers: int, width: int, batch: int, length: int) -> Inputs:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=length, attn_implementation="eager",
        )
    )  # fmt: skip
    ids = torch.randint(0, VOCABULARY, (batch, length))
    k = batch // 2
    return {
        "model": model,
        "batch": {"input_ids": ids, "labels": ids},
        "exact": BatchSelector(model, fc.CoLM(k), gradients="backprop"),
        "omp": BatchSelector(model, fc.CoLM(k, method="omp"), gradients="backprop"),
        "zeroth order": BatchSelector(model, fc.CoLM(k)),
    }


def _forward(inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return inputs["model"](input_ids=inputs["batch"]["input_ids"]).logits


def _step(inputs: Inputs) -> float:
    """Forward and backward on half of the rows."""
    model, batch = inputs["model"], inputs["batch"]
    model.zero_grad(set_to_none=True)
    half = len(batch["labels"]) // 2
    loss = model(input_ids=batch["input_ids"][:half], labels=batch["labels"][:half]).loss
    loss.backward()
    return float(loss.detach())


def _with_gradients(**size: int) -> Inputs:
    inputs = _inputs(**size)
    return inputs | {"gradients": inputs["exact"].gradients(inputs["batch"])}


def _select(kind: str) -> Callable[[Inputs], fc.Coreset]:
    return lambda inputs: inputs[kind].select(inputs["batch"])


def _chooses(inputs: Inputs, ours: fc.Coreset, peer: object) -> str:
    """The gradients that the choice is made by, against autograd's on a batch of one; and how many rows were chosen."""
    model, batch, selector = inputs["model"], inputs["batch"], inputs["exact"]
    rows = (0, len(batch["labels"]) - 1)
    found = selector.gradients(batch).take(torch.tensor(rows)).dense().double()
    for row, mine in zip(rows, found, strict=True):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        model.eval()
        (exact,) = torch.autograd.grad(model(**one).loss, selector.parameter)
        error = float((mine - exact.flatten().double()).norm() / exact.double().norm())
        if not error < 1e-4:
            raise Disagreement(f"the gradient of row {row} is off by {error:.2g}")
    if not 0 < len(ours.indices) <= len(batch["labels"]) // 2:
        raise Disagreement(f"{len(ours.indices)} rows chosen")
    return f"{len(ours.indices)} rows; gradients as autograd's on a batch of one"


FORWARD = Row(
    name="exact-32-forward",
    title="CoLM's choice of 16 of 32 texts by exact gradients of the last V; 6 layers of 256, 64 tokens",
    make=_inputs,
    size={"layers": 6, "width": 256, "batch": 32, "length": 64},
    small={"layers": 2, "width": 16, "batch": 6, "length": 8},
    ours=_select("exact"),
    peer=_forward,
    peer_name="one forward pass of the model on the texts",
    check=_chooses,
    goal=1 / 1.6,
)
POOLS = {32: FORWARD.size, 128: {**FORWARD.size, "batch": 128}}
# 35 % of a step that is a selection and then a training step on what it chose.
SHARE = (1 - 0.35) / 0.35
ROWS = [
    FORWARD,
    replace(
        FORWARD,
        name="exact-128-forward",
        title="CoLM's choice of 64 of 128 texts by exact gradients of the last V; 6 layers of 256, 64 tokens",
        size=POOLS[128],
    ),
    replace(
        FORWARD,
        name="omp-128-choice",
        title="matching pursuit for 64 of 128 texts, their exact gradients given",
        make=_with_gradients,
        size=POOLS[128],
        ours=lambda inputs: inputs["omp"].method.select(inputs["gradients"]),
        peer=lambda inputs: inputs["exact"].method.select(inputs["gradients"]),
        peer_name="medoids of the same gradients",
        figure="overhead",
        goal=5e-3,
    ),
    *(
        replace(
            FORWARD,
            name=f"{kind.replace(' ', '-')}-{pool}-step",
            title=f"CoLM's choice of {pool // 2} of {pool} texts, {'exact' if kind == 'exact' else 'zeroth-order'} gradients of the last V",
            size=POOLS[pool],
            ours=_select(kind),
            peer=_step,
            peer_name="forward and backward on half of the texts",
            goal=SHARE,
        )
        for kind in ("exact", "zeroth order")
        for pool in POOLS
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
