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
    model: nn.Module, loss: Callable[..., Tensor], *batch: Tensor, names: list[str] | None = None
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

    found = vmap(grad(one), (None, *[0] * len(batch)), randomness="different")(trained, *batch)
    return torch.cat([found[name].flatten(1) for name in trained], 1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the length of each row."""
    assert found.shape == expected.shape
    if found.dim() == 1:
        found, expected = found[:, None], expected[:, None]
    off = (found.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert off.max() <= tolerance


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
        self.same = nn.Conv2d(12, 12, (3, 4), padding="same", padding_mode="reflect")
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
