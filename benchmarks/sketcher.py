"""Sketches and norms of per-sample gradients beside the plain pass that they come from, and beside torch.func's gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashcoreset as fc
from benchmarks import peers
from benchmarks.checks import Disagreement
from benchmarks.harness import Inputs, Row
from flashcoreset.sketch.reference import sjlt_entries

VOCABULARY, HEADS = 1_000, 4


class _Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (
            self.qkv(self.norms[0](x)).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        )
        # Written out, since torch.vmap has no rule for the fused attention.
        scores = (heads[0] @ heads[1].transpose(-1, -2)) * (width // HEADS) ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        seen = scores.masked_fill(future, float("-inf")).softmax(-1) @ heads[2]
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class _Transformer(nn.Module):
    def __init__(self, layers: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[_Block(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)[None])
        return self.head(self.norm(self.blocks(x)))


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _inputs(layers: int, width: int, batch: int, length: int, dim: int) -> Inputs:
    torch.manual_seed(0)
    model = _Transformer(layers, width, length)
    ids = torch.randint(0, VOCABULARY, (batch, length))
    columns, signs = sjlt_entries(0, dim, 1, np.arange(sum(p.numel() for p in model.parameters())))
    return {
        "columns": torch.from_numpy(columns[:, 0]), "signs": torch.from_numpy(signs[:, 0]).float(), "model": model, "ids": ids,
        "loss": _loss, "dim": dim, "both": fc.GradientSketcher(model, dim),
        "sketches": fc.GradientSketcher(model, dim, norms=False), "norms": fc.GradientSketcher(model, None),
        "always": fc.GradientSketcher(model, dim, norms=False, verify="always"),
        "never": fc.GradientSketcher(model, dim, norms=False, verify="never"),
    }  # fmt: skip


def _plain(inputs: Inputs) -> Tensor:
    model = inputs["model"]
    model.zero_grad(set_to_none=True)
    loss = _loss(model(inputs["ids"]), inputs["ids"])
    loss.backward()
    return loss.detach()


def _with(name: str) -> Callable[[Inputs], tuple[Tensor, fc.GradientSketcher]]:
    def call(inputs: Inputs) -> tuple[Tensor, fc.GradientSketcher]:
        with inputs[name]:
            return _plain(inputs), inputs[name]

    return call


def _sketches(inputs: Inputs) -> Tensor:
    return _with("sketches")(inputs)[1].sketches


def _same_loss(_: Inputs, ours: tuple[Tensor, fc.GradientSketcher], peer: Tensor) -> str:
    if not torch.equal(ours[0], peer):
        raise Disagreement(f"losses {float(ours[0])} and {float(peer)}")
    return "same loss, bit for bit"


def _same_loss_and_sketches(
    inputs: Inputs, ours: tuple[Tensor, fc.GradientSketcher], peer: tuple[Tensor, fc.GradientSketcher]
) -> str:
    if not torch.equal(ours[1].sketches, peer[1].sketches):
        raise Disagreement("sketches differ")
    return f"{_same_loss(inputs, ours, peer[0])}; same sketches"


def _same_sketches(_: Inputs, ours: Tensor, peer: Tensor) -> str:
    off = float(((ours - peer).norm(dim=1) / peer.norm(dim=1)).max())
    if not off <= 1e-4:
        raise Disagreement(f"sketches differ by {off:.2g}")
    return f"sketches to {off:.0e}"


SKETCHES = Row(
    name="sketches",
    title="forward and backward pass with sketches (sjlt) of per-sample gradients to 4,096, 6 layers of width 256, 32 x 128 tokens",
    make=_inputs,
    size={"layers": 6, "width": 256, "batch": 32, "length": 128, "dim": 4_096},
    small={"layers": 1, "width": 16, "batch": 3, "length": 6, "dim": 32},
    ours=_with("sketches"),
    peer=_plain,
    peer_name="the pass without them",
    check=_same_loss,
    goal=1 / 1.6,
)

ROWS = [
    SKETCHES,
    replace(
        SKETCHES,
        name="norms",
        title="forward and backward pass with per-sample gradient norms, 6 layers of width 256, 32 x 128 tokens",
        ours=_with("norms"),
        goal=1 / 1.35,
    ),
    replace(
        SKETCHES,
        name="sketches-and-norms",
        title="forward and backward pass with both, 6 layers of width 256, 32 x 128 tokens",
        ours=_with("both"),
        goal=None,
    ),
    replace(
        SKETCHES,
        name="verified-first",
        title="forward and backward pass with sketches (sjlt) of per-sample gradients to 4,096 that checks rows and sums, as on the "
        "first batch, 6 layers of width 256, 32 x 128 tokens",
        ours=_with("always"),
        peer=_with("never"),
        peer_name='the same with verify="never"',
        check=_same_loss_and_sketches,
        goal=None,
    ),
    replace(
        SKETCHES,
        name="verified-later",
        title="forward and backward pass with sketches (sjlt) of per-sample gradients to 4,096 on batches after the first, which was "
        "checked, 6 layers of width 256, 32 x 128 tokens",
        ours=_with("sketches"),
        peer=_with("never"),
        peer_name='the same with verify="never"',
        check=_same_loss_and_sketches,
        goal=0.98,
    ),
    replace(
        SKETCHES,
        name="sketches-vmap",
        title="sketches (sjlt) of per-sample gradients to 4,096, 6 layers of width 256, 32 x 128 tokens",
        ours=_sketches,
        peer=peers.vmap_sketches,
        peer_name="torch.func's vmap(grad), then torch.index_add with columns and signs in memory",
        check=_same_sketches,
        goal=2.3,
    ),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS])
def test_row(row: Row, measure: Callable[[Row], Any]) -> None:
    """Measures one row."""
    measure(row)
