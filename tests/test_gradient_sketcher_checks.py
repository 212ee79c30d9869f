"""Facts that GradientSketcher cannot know from a layer's class are found out or the layer is refused; accepted layers give
autograd's gradients of batches of one."""

from __future__ import annotations

import itertools
import random
import re
import threading
import types
import warnings
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks.gradient_sketcher import points, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import flashcoreset as fc

# peft knows checkpoints and caches by these names.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(gradient_checkpointing|past_key_values).* is deprecated:FutureWarning"
)
CLOSE = 1e-5  # of norms, relative; the worst seen: 1e-6


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


def curved(output: Tensor, seed: int = 9) -> Tensor:
    """[B]: losses with gradients that differ everywhere."""
    flat = output.flatten(1)
    return (flat * points(flat.shape[1], seed=seed)).sum(1).square() + flat.sin().sum(1)


def one_by_one(model: nn.Module, names: list[str], *batch: Tensor) -> Tensor:
    """[B, D]: autograd's gradients of batches of one."""
    wanted = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for b in range(len(batch[0])):
        loss = curved(model(*[x[b : b + 1] for x in batch])).sum()
        found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows).double()


def run(model: nn.Module, *batch: Any, dim: int | None = 64, **options: Any) -> fc.GradientSketcher:
    sketcher = fc.GradientSketcher(model, dim, **{"backend": "torch", "reduction": "sum", **options})
    with sketcher:
        curved(model(*batch)).sum().backward()
    return sketcher


def check(model: nn.Module, *batch: Tensor, **options: Any) -> None:
    sketcher = run(model, *batch, **options)
    expected = one_by_one(model, list(sketcher.offsets), *batch)
    norms = expected.norm(dim=1)
    assert ((sketcher.norms.double() - norms).abs() <= CLOSE * norms).all()
    sketches = fc.sketch(expected, 64, kind="sjlt", backend="torch")
    assert ((sketcher.sketches.double() - sketches).norm(dim=1) <= CLOSE * norms).all()


def right(model: nn.Module, *batch: Tensor, **options: Any) -> None:
    """As `check`, for models of which a part is run again for each sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.SlowPathWarning)
        check(model, *batch, **options)


def quietly(model: nn.Module, *batch: Any, **options: Any) -> fc.GradientSketcher:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.SlowPathWarning)
        return run(model, *batch, **options)


def refused(message: str, model: nn.Module, *batch: Any, **options: Any) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(model, *batch, **options)


# ---- norms of any formula


class GatedRMSNorm(nn.Module):
    def __init__(self, over: int = -1) -> None:
        super().__init__()
        self.weight, self.over = nn.Parameter(1 + points(6) / 9), over

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * gate.sigmoid()
        return self.weight * x * (x.square().mean(self.over, keepdim=True) + 1e-6).rsqrt()


class Called(nn.Module):
    """Calls a layer by a function of the layer and the input."""

    def __init__(self, layer: nn.Module, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, *inputs: Any) -> Tensor:
        return self.how(self.layer, *inputs)


def test_a_norm_with_a_second_input() -> None:
    for how in (
        lambda norm, x: norm(x, x.flip(-1)),
        lambda norm, x: norm(x, gate=x.flip(-1)),
    ):
        with pytest.warns(
            fc.SlowPathWarning, match="GatedRMSNorm 'layer' is called with more than one input"
        ):
            check(Called(GatedRMSNorm(), how), points(5, 6))
    check(Called(GatedRMSNorm(), lambda norm, x: norm(x, None)), points(5, 6))


def test_a_norm_over_the_batch() -> None:
    refused(
        r"'weight' of GatedRMSNorm '': row 0 of its output.*changes with other samples",
        GatedRMSNorm(0),
        points(5, 6),
    )


# ---- rows that are not samples


class Tokens(nn.Module):
    """A layer between embeddings and an output layer, called in another layout."""

    def __init__(self, into: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.x, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.into, self.back = into, back

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(self.back(self.x(self.into(hidden)).tanh(), hidden))


LAYOUTS = {
    "flattened": (lambda h: h.flatten(0, 1), lambda x, h: x.view_as(h)),
    "windows": (lambda h: h.unflatten(1, (-1, 3)).flatten(0, 1), lambda x, h: x.reshape(h.shape)),
    "time-first": (lambda h: h.transpose(0, 1), lambda x, h: x.transpose(0, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_another_layout(layout: str) -> None:
    model = seeded(lambda: Tokens(*LAYOUTS[layout]))
    check(model, whole(9, 2, 6))  # found out by the check of rows
    right(model, whole(9, 2, 6), verify="never")  # not taken for granted without one
    check(model, whole(9, 1, 3))
    check(model, whole(9, 2, 6), parameters=["embed.*", "head.*"])
    check(model, whole(9, 1, 3), parameters=["embed.*", "head.*"])


def test_time_first_with_as_many_times_as_samples() -> None:
    model = seeded(lambda: Tokens(*LAYOUTS["time-first"]))
    check(model, whole(9, 6, 6))
    # A batch of one says nothing about the others.
    sketcher = fc.GradientSketcher(model, 8, backend="torch")
    with sketcher:
        model(whole(9, 1, 1)).sum().backward()
    ids = whole(9, 6, 6)
    for batch in (ids, whole(9, 5, 6), ids):  # an earlier layout is not taken for granted
        with sketcher:
            curved(model(batch)).sum().backward()
        expected = one_by_one(model, list(sketcher.offsets), batch).norm(dim=1)
        assert ((sketcher.norms.double() / len(batch) - expected).abs() <= CLOSE * expected).all()


class Experts(nn.Module):
    """The tokens that score highest go through a layer: as many as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = self.router(x).flatten().topk(len(x)).indices
        return flat.index_add(0, chosen, self.expert(flat[chosen])).view_as(x)


class Graph(nn.Module):
    """Nodes of several graphs, which belong to them by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
        hidden = self.first(nodes).tanh()
        return self.second(hidden.new_zeros(3, 4).index_add(0, graph, hidden))


def test_experts_and_graphs() -> None:
    model = seeded(Experts)
    refused(r"'expert.weight' of Linear 'expert'.*samples", model, points(5, 3, 4))
    graph = seeded(Graph), points(7, 4), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    refused(r"Linear 'second' must have an output with the batch of 7", *graph)
    refused(r"input has 7 rows, but its output the shape \(3, 3\)", *graph, parameters="first.*")


class Learned(nn.Module):
    """Sequences with positions that are looked up for all samples at once."""

    def __init__(self, places: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.embed, self.position, self.head = nn.Embedding(20, 8), nn.Embedding(20, 8), nn.Linear(8, 5)
        self.places = places

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids) + self.position(self.places(ids.shape[1]))))


@pytest.mark.parametrize("samples", [2, 6])
def test_positions(samples: int) -> None:
    plain = seeded(lambda: Learned(torch.arange))
    message = (
        r"'position.weight' of Embedding 'position': the 6 rows of its input.*are as many as there are samples by chance"
        if samples == 6
        else r"Embedding 'position'"
    )
    with pytest.warns(fc.SlowPathWarning, match=message):
        check(plain, whole(20, samples, 6))
    check(plain, whole(20, samples, 6), parameters=["embed.*", "head.*"])
    check(seeded(lambda: Learned(lambda n: torch.arange(n)[None])), whole(20, samples, 6))


def test_samples_that_are_all_alike() -> None:
    for ids in (torch.full((6, 6), 4), torch.zeros(6, 6, dtype=torch.long)):
        right(seeded(lambda: Learned(torch.arange)), ids)
        check(seeded(lambda: Learned(lambda n: torch.arange(n)[None])), ids)
    check(seeded(lambda: nn.Linear(4, 3)), torch.ones(5, 4))
    check(seeded(lambda: nn.Linear(4, 3)), torch.zeros(5, 4), parameters="bias")


class RelativeBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.bias = nn.Linear(4, 4), nn.Embedding(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        scores = self.query(x) @ x.transpose(1, 2) + self.bias(place[:, None] - place + 5).sum(-1)
        return scores.softmax(-1) @ x


def test_relative_biases() -> None:
    model = seeded(RelativeBias)
    with pytest.warns(fc.SlowPathWarning, match="'bias.weight' of Embedding 'bias': the 6 rows of its input"):
        check(model, points(6, 6, 4))
    for samples in (2, 3, 5):  # 36 rows of 6 times 6 are also 2 and 3 times as many as samples
        right(seeded(RelativeBias), points(samples, 6, 4))
    check(model, points(6, 6, 4), parameters="query.*")


class Prototypes(nn.Module):
    """Distances to a support set, which is encoded as the samples are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.register_buffer("support", points(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) @ self.encoder(self.support).T


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        return hidden - hidden.mean(0)


def test_samples_that_influence_each_other() -> None:
    right(seeded(Prototypes), points(5, 4))
    refused("the model: row 0 of its output", seeded(Centred), points(5, 4))
    refused(
        "'1.weight' of Linear '1': row 0 of its input|the model: row 0 of its output",
        seeded(lambda: nn.Sequential(Centred(), nn.Linear(4, 3))),
        points(5, 4),
        parameters="1.*",
    )


# ---- rows that are


class Typed(nn.Module):
    """Token types are all alike, and masks, biases and decoders come along."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.types, self.more = nn.Embedding(9, 4), nn.Embedding(2, 4), nn.Embedding(9, 4)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.types(torch.zeros_like(ids))
        seen = (hidden @ self.mix(hidden).transpose(1, 2) + mask).softmax(-1) @ hidden
        return self.head(seen) + self.more(other).mean(1, keepdim=True).mean(2, keepdim=True)


@pytest.mark.parametrize("samples", [2, 5])
def test_inputs_beside_the_batch(samples: int) -> None:
    """With samples = 5, the mask has as many rows as the batch by chance."""
    model, mask = seeded(Typed), torch.full((5, 5), -9.0).triu(1)
    ids, other = whole(9, samples, 5), whole(9, samples, 4).flip(0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            return model(ids, mask, other)

    sketcher = run(model, ids, mask, other)
    expected = one_by_one(Masked(), [f"model.{name}" for name in sketcher.offsets], ids, other).norm(dim=1)
    assert ((sketcher.norms.double() - expected).abs() <= CLOSE * expected).all()


class Pair(NamedTuple):
    x: Tensor
    scale: float


def test_inputs_in_containers() -> None:
    def total(layer: nn.Module, inputs: dict[str, Any]) -> Tensor:
        pair, more = inputs["pair"], inputs["more"]
        return layer(pair.x) * pair.scale + layer(more[0])

    model = Called(seeded(lambda: nn.Linear(4, 3)), total)
    x, z = points(5, 4), points(5, 4, seed=2)
    sketcher = run(model, {"pair": Pair(x, 2.0), "more": [z]})
    layer = model.layer
    rows = []
    for b in range(5):
        found = torch.autograd.grad(
            curved(layer(x[b : b + 1]) * 2 + layer(z[b : b + 1])).sum(), list(layer.parameters())
        )
        rows.append(torch.cat([g.flatten() for g in found]).norm())
    expected = torch.stack(rows)
    assert ((sketcher.norms - expected).abs() <= CLOSE * expected).all()


def test_inputs_that_say_nothing() -> None:
    layer = seeded(lambda: nn.Linear(4, 3))
    texts = Called(
        layer, lambda layer, *texts: layer(torch.stack([points(4, seed=len(text)) for text in texts]))
    )
    refused(
        r"Called is called without tensors, so that its batch is not known.*verify='never'", texts, "a", "bc"
    )
    assert run(texts, "a", "bc", verify="never").norms.shape == (2,)
    calls: list[int] = []
    once = Called(layer, lambda layer, x: 1 / 0 if calls else layer(x).add(calls.append(1) or 0))
    refused(r"an error when it ran again.*ZeroDivisionError.*verify='never'", once, points(5, 4))


# ---- layers that are not what their class says


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def test_layers_that_compute_something_else() -> None:
    def linear(change: Callable[[nn.Module], Any]) -> nn.Module:
        layer = seeded(lambda: nn.Linear(4, 3))
        with warnings.catch_warnings():  # the old forms are deprecated
            warnings.simplefilter("ignore")
            change(layer)
        return nn.Sequential(layer)

    def replace(layer: nn.Module) -> None:
        layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)

    for model in (
        nn.Sequential(Standardised(2, 4, 3)),
        linear(nn.utils.weight_norm),
        linear(nn.utils.parametrizations.weight_norm),
        linear(nn.utils.spectral_norm),
        linear(nn.utils.parametrizations.spectral_norm),
        linear(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
        linear(lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh())),
    ):
        batch = points(5, 2, 4, 4) if isinstance(model[0], nn.Conv2d) else points(5, 4)
        with pytest.warns(fc.SlowPathWarning, match=rf"{type(model[0]).__name__} '0' again on each sample"):
            check(model.eval(), batch)
        right(model, batch[:4])  # as many samples as the weight has columns
        if not isinstance(model[0], nn.Conv2d):
            run(model.train(), batch, parameters="0.bias")
            check(model.eval(), batch, parameters="0.bias")
    with pytest.raises(ValueError, match=r"'0\.weight' belongs to Linear '0': its forward was replaced"):
        fc.GradientSketcher(linear(replace), 8, backend="torch")
    model = linear(lambda layer: None)
    sketcher = fc.GradientSketcher(model, 8, backend="torch")
    replace(model[0])
    with pytest.raises(ValueError, match="its forward was replaced"):
        sketcher.__enter__()


# ---- sums


def test_a_gradient_that_is_not_the_sum() -> None:
    """The sums of a small layer beside a large one are checked, on the first batch or on any."""

    def model() -> nn.Module:
        made = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)))
        made[1].weight.data.mul_(1e-6)
        return made

    wrong = model()
    wrong[2].bias.register_hook(lambda g: 1.26 * g)
    message = r"parameter '2.bias' of Linear '2': the samples' gradients do not add up.*off by 0\.2"
    refused(message, wrong, points(5, 4))
    run(wrong, points(5, 4), verify="never")
    for verify in ("first", "always"):
        late = model()
        sketcher = fc.GradientSketcher(late, 8, backend="torch", verify=verify)
        with sketcher:
            curved(late(points(5, 4))).sum().backward()
        handle = late[2].bias.register_hook(lambda g: 1.26 * g)
        if verify == "always":
            with pytest.raises(RuntimeError, match=message), sketcher:
                curved(late(points(5, 4))).sum().backward()
        else:
            with sketcher:
                curved(late(points(5, 4))).sum().backward()
        handle.remove()


class Attention(nn.Module):
    """Biases of keys have only rounding as their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_that_cancel(dtype: torch.dtype, autocast: bool) -> None:
    """There is no false alarm if sums are exact to rounding or all rounding."""
    model, x = seeded(Attention).to(dtype), points(7, 33, 8).to(dtype)
    sketcher = fc.GradientSketcher(model, 8, backend="torch", verify="always")
    for factor in (1.0, 1e-3):
        with sketcher, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (curved(model(x).float()).sum() * factor).backward()
    linear = seeded(lambda: nn.Linear(8, 3)).to(dtype)
    with fc.GradientSketcher(linear, 8, backend="torch"):  # each sample beside its opposite
        (linear(torch.cat([x[:, 0], x[:, 0]])) * torch.cat([x[:, 0, :3], -x[:, 0, :3]])).sum().backward()


# ---- norms of any size


@pytest.mark.parametrize("kind", ["linear", "sequence", "product", "embedding", "tied", "shared", "norm"])
def test_samples_of_very_different_sizes(kind: str, backend: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tokens(x)) if kind == "tied" else self.tokens(x)

    model, x = {
        "linear": lambda: (nn.Linear(6, 3), points(6, 6)),
        "sequence": lambda: (nn.Linear(6, 7), points(6, 3, 6)),
        "product": lambda: (nn.Linear(6, 3), points(6, 30, 6)),
        "embedding": lambda: (nn.Embedding(9, 4), whole(9, 6, 5)),
        "tied": lambda: (Tied(), whole(9, 6, 5)),
        "shared": lambda: (Called(nn.Linear(6, 6), lambda layer, x: layer(layer(x).tanh())), points(6, 6)),
        "norm": lambda: (nn.LayerNorm(6), points(6, 3, 6)),
    }[kind]()
    exact = one_by_one(
        model.double(), list(dict(model.named_parameters())), x.double() if x.is_floating_point() else x
    )
    model.float()
    weights = torch.tensor([1.0, 1e25, 1e-25, 0.0, 1e-33, 1e30])
    sketcher = fc.GradientSketcher(model, None, reduction="sum", backend=backend)
    with sketcher:
        (curved(model(x)) * weights).sum().backward()
    expected = exact.norm(dim=1) * weights
    assert ((sketcher.norms.double() - expected).abs() <= CLOSE * expected).all()
    sketcher = fc.GradientSketcher(model.double(), None, reduction="sum", backend=backend)
    weights = torch.tensor([1.0, 1e-300, 1e300, 1e-200, 0.0, 1e200], dtype=torch.float64)
    with sketcher:
        (curved(model(x.double() if x.is_floating_point() else x)) * weights).sum().backward()
    expected = exact.norm(dim=1) * weights
    assert ((sketcher.norms - expected).abs() <= 1e-12 * expected).all()


class Extreme(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        self.last.weight.data.mul_(scale)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)) / self.scale


@pytest.mark.parametrize("scale", [1e22, 1e-22])
def test_layers_of_very_different_sizes(scale: float) -> None:
    check(seeded(lambda: Extreme(scale)), points(5, 4))


# ---- transformer layers of torch


class Encoder(nn.Module):
    """Batches come first, whatever the layer inside takes."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.self_attn.batch_first:
            return self.head(self.layer(x))
        return self.head(self.layer(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("training", [False, True])
def test_transformer_layers(length: int, training: bool) -> None:
    parameters = ["*linear*", "*norm*", "head.*"]
    x = points(5, length, 8)
    for batch_first in (True, False):
        for wanted in (parameters, None):
            model = seeded(lambda batch_first=batch_first: Encoder(batch_first)).train(training)
            if training:  # dropout, which a batch of one draws otherwise
                assert run(model, x, parameters=wanted).norms.shape == (5,)
            else:
                check(model, x, parameters=wanted)
    layer = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16)).train(training)
    with pytest.raises(ValueError, match=r"the model: row 0 of its output|its rows are not samples"):
        quietly(layer, x)  # whose batch is in dimension 1


# ---- outputs that are one for all samples


class Broadcast(nn.Module):
    """`use` takes the layer's output of the samples and that of the positions, [1, T, d]."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.samples, self.position, self.head = nn.Linear(4, 4), nn.Embedding(9, 4), nn.Linear(4, 3)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.samples(x), self.position(torch.arange(x.shape[1])[None])).tanh())


def in_place(x: Tensor, p: Tensor) -> Tensor:
    x += p
    return x.tanh_()


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, p: p + x,
    "alpha": lambda x, p: torch.add(x, p, alpha=3),
    "in-place": in_place,
    "twice": lambda x, p: (x + p).tanh() + p,
    "expand": lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1),
    "repeat": lambda x, p: x * p.repeat(len(x), 1, 1),
    "more-dimensions": lambda x, p: (x[:, None] + p).flatten(1, 2),
}


@pytest.mark.parametrize("samples", [1, 2, 6])
@pytest.mark.parametrize("use", USES)
def test_outputs_for_all_samples(use: str, samples: int) -> None:
    check(seeded(lambda: Broadcast(USES[use])), points(samples, 6, 4))


def test_outputs_for_all_samples_that_go_elsewhere() -> None:
    x = points(5, 6, 4)
    for use, message in (
        (lambda x, p: x * p, "goes into mul"),
        (lambda x, p: x + p[0], "goes into __getitem__"),
        (lambda x, p: x + p.relu(), "goes into relu"),
        (lambda x, p: x + p.transpose(0, 1).transpose(0, 1), "goes into transpose"),
    ):
        model = seeded(lambda use=use: Broadcast(lambda x, p: use(x, p).reshape(len(x), 6, 4)))
        message = rf"'position.weight': an output of Embedding 'position' has size 1.*{message}"
        with pytest.warns(fc.SlowPathWarning, match=message):
            check(model, x)
        assert run(model, x, parameters="head.*").norms.shape == (5,)
    check(seeded(lambda: Broadcast(lambda x, p: x + p.detach())), x, parameters=["samples.*", "head.*"])
    # Added to something else that has as many rows as there are samples.
    first = seeded(lambda: Broadcast(lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1)))
    with pytest.raises(ValueError, match=r"Embedding 'position': row \d of its broadcast output"):
        quietly(first, points(6, 6, 4))


# ---- nothing changes


def transformer(name: str, model: str, **options: Any) -> nn.Module:
    import transformers

    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, "max_position_embeddings": 32, "pad_token_id": 0, **options}
    )
    return seeded(lambda: getattr(transformers, f"{name}{model}")(config)).train()


def gpt2(**options: Any) -> nn.Module:
    return transformer(
        "GPT2",
        "LMHeadModel",
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )


def prompted(kind: str, **options: Any) -> nn.Module:
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
    return seeded(lambda: peft.get_peft_model(gpt2(), config))


def swin() -> nn.Module:
    import transformers

    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
    )
    return seeded(lambda: transformers.SwinForImageClassification(config)).train()


DEBERTA = {
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "position_buckets": 8,
}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "gpt2": (gpt2, None),
    "llama": (lambda: transformer("Llama", "ForCausalLM"), None),
    "gemma3": (
        lambda: transformer("Gemma3Text", "Model", num_key_value_heads=1, head_dim=8),
        lambda name, p: "embed_tokens" not in name,
    ),
    "bert": (lambda: transformer("Bert", "Model"), None),
    "deberta-v2": (
        lambda: transformer("DebertaV2", "Model", **DEBERTA),
        ["*dense*", "*value_proj*", "*word_embeddings*"],
    ),
    "opt": (
        lambda: transformer("OPT", "Model", ffn_dim=24, word_embed_proj_dim=16),
        ["*_proj.*", "*embed_tokens*", "*self_attn_layer_norm*"],
    ),
    "swin": (swin, ["classifier.*", "*patch_embeddings*", "*.layernorm_before*"]),
    "prompt-tuning": (lambda: prompted("PromptTuningConfig"), None),
    "p-tuning": (lambda: prompted("PromptEncoderConfig", encoder_hidden_size=8), "*mlp_head.4.*"),
    "prefix-tuning": (lambda: prompted("PrefixTuningConfig", encoder_hidden_size=8), None),
    "torch-encoder": (lambda: seeded(lambda: Encoder(True)), ["*linear*", "*norm*", "head.*"]),
    "positions": (lambda: seeded(lambda: Learned(lambda n: torch.arange(n)[None])), None),
    "repeat": (lambda: seeded(lambda: Broadcast(USES["repeat"])), None),
    "in-place": (lambda: seeded(lambda: Broadcast(in_place)), None),
}


def family_input(name: str) -> Tensor:
    if name == "swin":
        return points(3, 3, 16, 16)
    if name == "torch-encoder":
        return points(4, 6, 8)
    return points(4, 6, 4) if name in ("repeat", "in-place") else 1 + whole(19, 4, 6)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_changes(name: str) -> None:
    """Outputs and gradients of a model in training, with dropout, are those without the sketcher, bit for bit; so are random
    numbers and buffers afterwards."""
    make, parameters = FAMILIES[name]
    found = []
    for sketches in (False, True):
        model = make()
        sketcher = fc.GradientSketcher(model, 8, parameters=parameters, backend="torch", verify="always")
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        x = family_input(name)
        with sketcher if sketches else warnings.catch_warnings():
            output = model(x)
            output = (
                output if isinstance(output, Tensor) else next(v for v in output.values() if v is not None)
            )
            curved(output).sum().backward()
        gradients = [p.grad for p in model.parameters()]
        after = [torch.rand(3), random.random(), np.random.rand()]  # noqa: NPY002
        found.append((output, gradients, list(model.buffers()), after, x))
    for mine, theirs in zip(*found, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(
    ("name", "wanted", "part"),
    [
        ("opt", "*fc1*", None),  # flattened tokens
        ("swin", "*q_proj*", None),  # windows
        ("deberta-v2", "*key_proj*", "an output of Linear '.*key_proj' has size 1 in dimension 0 and goes into"),
        ("p-tuning", "*embedding*", "an output of Embedding '.*embedding' has size 1 in dimension 0 and goes into linear"),
    ],
)  # fmt: skip
def test_layers_of_transformers_in_other_layouts(name: str, wanted: str, part: str | None) -> None:
    make, _ = FAMILIES[name]
    model = make().eval()

    def outputs(x: Tensor) -> Tensor:
        found = model(x)
        return next(v for v in found.values() if v is not None)

    x = family_input(name)
    sketcher = fc.GradientSketcher(model, None, parameters=wanted, backend="torch", reduction="sum")
    with (
        warnings.catch_warnings() if part is None else pytest.warns(fc.SlowPathWarning, match=part),
        sketcher,
    ):
        curved(outputs(x)).sum().backward()
    own = [dict(model.named_parameters())[one] for one in sketcher.offsets]
    rows = []
    for b in range(len(x)):
        found = torch.autograd.grad(curved(outputs(x[b : b + 1])).sum(), own)
        rows.append(torch.cat([g.flatten() for g in found]).norm())
    expected = torch.stack(rows)
    assert ((sketcher.norms - expected).abs() <= 10 * CLOSE * expected).all()


class Counting(nn.Module):
    """Keeps what it has seen, in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.calls, self.seen, self.last = 0, [], torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.mean.add_(x.detach().mean(0))
        self.last.copy_(x[0].detach())
        self.new = self.calls
        return self.layer(F.dropout(x.mul_(2)))


def test_what_a_model_keeps_is_that_of_the_pass() -> None:
    model, plain = seeded(Counting), seeded(Counting)
    for made in (model, plain):
        torch.manual_seed(0)
        x = points(5, 4)
        if made is model:
            run(made, x)
        else:
            curved(made(x)).sum().backward()
        made.input = x
    assert (model.calls, model.seen, model.new) == (1, [5], 1)
    for name in ("mean", "last", "input"):
        assert torch.equal(getattr(model, name), getattr(plain, name))
    assert torch.equal(model.layer.weight.grad, plain.layer.weight.grad)


# ---- when


def test_when_it_is_checked() -> None:
    calls: list[int] = []
    for verify, passes in (("never", [1, 1, 1]), ("first", [3, 1, 1]), ("always", [3, 3, 3])):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        sketcher = fc.GradientSketcher(model, 8, backend="torch", verify=verify)
        found = []
        for samples in (5, 5, 3):
            calls.clear()
            with sketcher:
                curved(model(points(samples, 4))).sum().backward()
            found.append(len(calls))
        assert found == passes
    with pytest.raises(ValueError, match="unknown verify 'last'; valid names: first, always, never"):
        fc.GradientSketcher(model, 8, verify="last")


def test_layers_that_are_called_later_are_checked_then() -> None:
    model = seeded(lambda: Learned(torch.arange))
    forward = model.forward
    late: list[bool] = []

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            return forward(ids) if late else model.head(model.embed(ids))

    outer = Late()
    sketcher = fc.GradientSketcher(outer, 8, backend="torch")
    with sketcher:
        curved(outer(whole(20, 6, 6))).sum().backward()
    late.append(True)
    with (
        pytest.raises(ValueError, match=r"'inner.position.weight' of Embedding 'inner.position': the 6 rows"),
        sketcher,
    ):
        outer(whole(20, 6, 6))


# ---- which inputs are the samples', and in what order


def each(
    model: nn.Module,
    samples: int,
    call: Callable[[Tensor], Any],
    loss: Callable[[Any, Tensor], Tensor] = lambda output, _: curved(output),
    **options: Any,
) -> None:
    """Norms are those of batches of one; `call` takes the samples' numbers, `loss` gives [len(numbers)]."""
    sketcher = fc.GradientSketcher(model, None, **{"backend": "torch", "reduction": "sum", **options})
    with sketcher:
        loss(call(torch.arange(samples)), torch.arange(samples)).sum().backward()
    wanted = [dict(model.named_parameters())[name] for name in sketcher.offsets]
    rows = []
    for b in range(samples):
        one = torch.tensor([b])
        found = torch.autograd.grad(
            loss(call(one), one).sum(), wanted, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in found]).norm())
    expected = torch.stack(rows)
    assert ((sketcher.norms - expected).abs() <= CLOSE * expected).all()


class Two(nn.Module):
    """One layer per input, of two inputs, which `use` combines."""

    def __init__(self, use: Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.c, self.use = nn.Linear(6, 4), nn.Linear(5, 4), use

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.use(self.a, self.c, x, other)


def test_a_second_input_that_has_as_many_rows_by_chance() -> None:
    x, other = points(5, 6), points(5, 5, seed=4)
    classes = seeded(lambda: Two(lambda a, c, x, y: a(x) @ c(y).T))
    for wanted in (None, "c.*"):
        with pytest.warns(fc.SlowPathWarning, match="'c.weight' of Linear 'c': the 5 rows of its input"):
            each(classes, 5, lambda i: classes(x[i], other), parameters=wanted)
    each(classes, 5, lambda i: classes(x[i], other), parameters="a.*")
    time = seeded(lambda: Two(lambda a, c, x, y: a(x) * c(y).tanh().transpose(0, 1).mean(1)))
    refused(r"the model: row \d of its output", time, x, points(5, 5, 5))
    rolled = seeded(lambda: Two(lambda a, c, x, y: a(x) * c(y.roll(1, 0)).tanh().roll(-1, 0)))
    right(rolled, x, other)
    pairs = seeded(lambda: Two(lambda a, c, x, y: a(x) * c(y)))
    check(pairs, x, other)


class Ordered(nn.Module):
    """A layer whose rows are in an order of their own, which the output is not; they are put in order by an operation that is followed,
    or not."""

    def __init__(
        self, order: Callable[..., Tensor], change: Callable[[Tensor], Tensor], followed: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.order, self.change, self.drop = nn.Linear(6, 4), order, change, nn.Dropout(0.5)
        self.followed = followed

    def forward(self, x: Tensor, *lengths: Tensor) -> Tensor:
        order = self.order(x, *lengths)
        rows = x[order] if self.followed else torch.stack([x[int(row)] for row in order])
        return self.layer(self.drop(self.change(rows))).tanh()[order.argsort()]


ORDERS: dict[str, Callable[..., Tensor]] = {
    "flip": lambda x: torch.arange(len(x)).flip(0),
    "roll": lambda x: torch.arange(len(x)).roll(1),
    "pairs": lambda x: torch.arange(len(x)) ^ 1 if len(x) % 2 == 0 else torch.arange(len(x)).roll(2),
    "sorted": lambda x: x[:, 0].argsort(),
}
NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "dropout": lambda x: F.dropout(x, 0.3),
    "numbers": lambda x: x + 0.1 * torch.randn_like(x),
}


def found_out(model: nn.Module, x: Tensor, exact: bool) -> None:
    """That rows are in another order is noticed: the model is run again for each sample or, if it draws numbers, may be refused."""
    message = r"'layer.weight' of Linear 'layer': row \d of its input"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            check(model, x) if exact else run(model, x)
        except ValueError as error:
            found = [] if exact else [str(error)]
        else:
            found = [str(one.message) for one in seen if one.category is fc.SlowPathWarning]
    assert any(re.search(message, text) for text in found)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("training", [False, True])
def test_rows_in_an_order_of_their_own(noise: str, training: bool) -> None:
    """Also if the first batch happens to be in order already: the next one would not be."""
    for samples in (2, 3, 4, 8, 9):
        x = points(samples, 6)
        for name, order in ORDERS.items():
            if noise == "numbers" and name == "sorted" and samples < 4:
                continue  # so few samples change their places by replacing some only with luck
            model = seeded(lambda order=order: Ordered(order, NOISE[noise])).train(training)
            for some in (x, x[x[:, 0].argsort()]) if name == "sorted" and noise != "numbers" else (x,):
                found_out(model, some, exact=noise == "none" and not training)
        model = seeded(lambda: Ordered(lambda rows: torch.arange(len(rows)), NOISE[noise])).train(training)
        assert run(model, x).norms.shape == (samples,)


@pytest.mark.parametrize("noise", ["none", "dropout"])
def test_rows_that_were_put_in_an_order(noise: str) -> None:
    for order in ORDERS.values():
        model = seeded(lambda order=order: Ordered(order, NOISE[noise], followed=True)).train(noise != "none")
        sketcher = fc.GradientSketcher(model, None, backend="torch", reduction="sum")
        for samples in (2, 3, 4, 8, 9, 1):
            x = points(samples, 6)
            torch.manual_seed(5)
            with warnings.catch_warnings(), sketcher:
                warnings.simplefilter("error")  # no slow path
                curved(model(x)).sum().backward()
            torch.manual_seed(5)
            losses = curved(model(x))
            grads = [torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for loss in losses]
            expected = torch.stack([torch.cat([g.flatten() for g in some]) for some in grads]).norm(dim=1)
            torch.testing.assert_close(sketcher.norms, expected, rtol=1e-5, atol=0)


def test_rows_in_the_order_of_a_second_input() -> None:
    model = seeded(lambda: Ordered(lambda x, lengths: lengths.argsort(), NOISE["none"])).eval()
    for lengths in itertools.permutations(range(4)):
        sketcher = quietly(model, points(4, 6), torch.tensor(lengths))
        expected = one_by_one(model, list(sketcher.offsets), points(4, 6), torch.zeros(4, dtype=torch.int64))
        assert ((sketcher.norms.double() - expected.norm(dim=1)).abs() <= CLOSE * expected.norm(dim=1)).all()


def test_samples_that_differ_in_another_input_alone() -> None:
    layer, labels = seeded(lambda: nn.Linear(4, 3)), torch.ones(4, dtype=torch.long)
    flipped = Called(layer, lambda layer, _, x: layer(x.flip(0)).flip(0))
    right(flipped, labels, points(4, 4))
    check(Called(layer, lambda layer, labels, x: layer(x) * labels[:, None]), labels, points(4, 4))


@pytest.mark.parametrize("verify", ["first", "always"])
def test_positions_after_a_batch_of_one_position(verify: str) -> None:
    """Refused where modules are not run again after the first batch, and right where they are."""
    model, ids = seeded(lambda: Learned(torch.arange)), whole(20, 6, 6)
    sketcher = fc.GradientSketcher(model, None, parameters="position.*", verify=verify, reduction="sum")
    with sketcher:
        curved(model(whole(20, 6, 1))).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.SlowPathWarning)
        if verify == "first":
            with pytest.raises(ValueError, match="Embedding 'position': the 6 rows of its input"), sketcher:
                model(ids)
            return
        with sketcher:
            curved(model(ids)).sum().backward()
    norms = one_by_one(model, ["position.weight"], ids).norm(dim=1)
    assert ((sketcher.norms.double() - norms).abs() <= CLOSE * norms).all()


# ---- correct models that look otherwise


@pytest.mark.parametrize("samples", [1, 4, 5])
def test_a_batch_beside_tensors_with_more_rows(samples: int) -> None:
    """Batches of one sample too, as an epoch's last batch may be."""
    x, mask, ids = points(samples, 5, 4), torch.ones(5, 5).tril(), whole(20, samples, 5)
    model = Called(seeded(lambda: nn.Linear(4, 3)), lambda layer, x, mask: mask @ layer(x))
    each(model, samples, lambda i: model(x[i], mask))

    class Positioned(Learned):
        def forward(self, place: Tensor, ids: Tensor) -> Tensor:
            return self.head((self.embed(ids) + self.position(place)).tanh())

    positioned = seeded(lambda: Positioned(torch.arange))
    each(positioned, samples, lambda i: positioned(torch.arange(5)[None], ids[i]))
    llama = transformer("Llama", "ForCausalLM").eval()
    each(
        llama,
        samples,
        lambda i: llama(input_ids=ids[i], cache_position=torch.arange(5)),
        lambda output, _: curved(output.logits),
    )


def test_outputs_that_are_not_the_layers_rows() -> None:
    x = points(4, 4, 6)
    layer = seeded(lambda: nn.Linear(6, 3))
    time = Called(layer, lambda layer, x: layer(x).tanh().transpose(0, 1))
    for steps in (3, 4):
        each(
            time,
            4,
            lambda i, steps=steps: time(x[i, :steps]),
            lambda output, _: curved(output.transpose(0, 1)),
        )
    active = torch.arange(4) < torch.tensor([2, 3, 1, 4])[:, None]
    tokens = Called(layer, lambda layer, x, mask: layer(x).tanh()[mask])
    for mask in (active, active & (torch.arange(4) == 0), active & active.flip(0)):

        def loss(output: Tensor, i: Tensor, mask: Tensor = mask) -> Tensor:
            return output.new_zeros(len(i)).index_add(0, mask[i].nonzero()[:, 0], output.square().sum(1))

        each(tokens, 4, lambda i, mask=mask: tokens(x[i], mask[i]), loss)
    table = points(4, 3)
    constant = Called(layer, lambda layer, x: (layer(x), table))
    each(constant, 4, lambda i: constant(x[i]), lambda output, _: curved(output[0]))
    for mixed in (
        lambda layer, x: layer(x).flatten(1) @ layer(x).flatten(1).T,
        lambda layer, x: layer(x) + layer(x).sum(0),
    ):
        refused(r"the model: row \d of its output", Called(layer, mixed), x)


class Trimmed(nn.Module):
    """Leaves out padding that all samples have, of each of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.drop = nn.Embedding(20, 6), nn.Linear(6, 4), nn.Dropout(0.5)

    def forward(self, *inputs: Tensor) -> Tensor:
        cut = [ids[:, : int((ids != 0).sum(1).max())] for ids in inputs]
        return sum(
            (self.head(self.drop(self.embed(ids))).tanh() * (ids != 0)[..., None]).sum(1) for ids in cut
        )


def test_padding_that_is_left_out() -> None:
    model = seeded(Trimmed)
    for seed in range(4):
        ids, other = 1 + whole(19, 5, 6), 1 + whole(19, 5, 7).flip(0)
        lengths = torch.randint(1, 6, (2, 5), generator=torch.Generator().manual_seed(seed))
        lengths[0, seed], lengths[1, (2 * seed + 1) % 5] = 6, 7  # one is the longest
        ids = ids * (torch.arange(6) < lengths[0][:, None])
        other = other * (torch.arange(7) < lengths[1][:, None])
        check(model.eval(), ids)
        check(model.eval(), ids, other)
        assert run(model.train(), ids, other).norms.shape == (5,)


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_that_autograd_rounds(dtype: torch.dtype) -> None:
    """torch adds up gradients of norms and embeddings in half precision: the more terms, the fewer digits are left."""
    for shape in ((4, 16), (8, 32), (8, 128), (16, 300)):
        norm, x = nn.LayerNorm(16).to(dtype), points(*shape, 16).to(dtype)
        sketcher = fc.GradientSketcher(norm, None, backend="torch")
        with sketcher:
            (norm(x).float() * points(16)).sum((1, 2)).mean().backward()
        exact = nn.LayerNorm(16).double()
        (exact(x.double()) * points(16)).sum((1, 2)).mean().backward()
        sketcher = fc.GradientSketcher(norm, 64, backend="torch", reduction="sum")
        with sketcher:
            (norm(x).float() * points(16)).sum((1, 2)).mean().backward()
        expected = fc.sketch(
            torch.cat([p.grad for p in exact.parameters()])[None], 64, kind="sjlt", backend="torch"
        )[0]
        off = (sketcher.sketches.sum(0).double() - expected).norm() / expected.norm()
        assert off <= 2e-2 if dtype == torch.bfloat16 else off <= 2e-3  # the gradient g is rounded
        table = nn.Embedding(2, 16).to(dtype)
        with fc.GradientSketcher(table, None, backend="torch"):
            one = torch.zeros(shape, dtype=torch.long)
            (table(one).float() * points(*shape, 16).abs()).sum((1, 2)).mean().backward()
    wrong = nn.Linear(16, 4).to(dtype)
    wrong.bias.register_hook(lambda g: 1.26 * g)
    with (
        pytest.raises(RuntimeError, match="parameter 'bias' of Linear '': the samples' gradients"),
        fc.GradientSketcher(wrong, None, backend="torch"),
    ):
        (wrong(points(16, 300, 16).to(dtype)).float() * points(4)).sum((1, 2)).mean().backward()
    small = nn.LayerNorm(16).to(dtype)
    small.weight.register_hook(lambda g: 3 * g)
    with (
        pytest.raises(RuntimeError, match="parameter 'weight' of LayerNorm ''"),
        fc.GradientSketcher(small, None, backend="torch"),
    ):
        (small(points(5, 4, 16).to(dtype)).float() * points(16)).sum((1, 2)).mean().backward()


# ---- what a model keeps


class Keeping(nn.Module):
    """Keeps what it has seen in objects of every kind, and draws numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.queue, self.counts = deque(maxlen=9), defaultdict(int)
        self.object, self.held = types.SimpleNamespace(n=0, inner=[]), {"mean": torch.zeros(4)}
        self.tensors, self.hidden = [torch.zeros(())], [nn.BatchNorm1d(4)]
        self.generator, self.numpy = torch.Generator().manual_seed(5), np.random.default_rng(5)
        self.python, self.lock = random.Random(5), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.queue.append(len(x))
        self.counts["calls"] += 1
        self.object.n += 1
        self.object.inner.append(self.object.n)
        self.held["mean"].add_(x.detach().mean(0))
        self.tensors[0] = self.tensors[0] + 1
        self.hidden[0](x.detach())
        noise = torch.rand(x.shape, generator=self.generator) + float(self.numpy.random())
        return self.layer(x * noise * self.python.random())

    def kept(self) -> list[Any]:
        return [
            list(self.queue),
            dict(self.counts),
            self.object.n,
            self.object.inner,
            self.held["mean"].tolist(),
            self.tensors[0].item(),
            self.hidden[0].running_mean.tolist(),
            self.generator.get_state().tolist(),
            self.numpy.bit_generator.state,
            self.python.random(),
        ]


def test_what_a_model_keeps_in_objects() -> None:
    model, plain, x = seeded(Keeping), seeded(Keeping), points(5, 4)
    objects = [model.queue, model.counts, model.object, model.held, model.generator, model.numpy]
    run(model, x, verify="always"), run(model, x)
    outputs = plain(x), plain(x)
    after = [model.queue, model.counts, model.object, model.held, model.generator, model.numpy]
    assert all(one is other for one, other in zip(objects, after, strict=True))
    assert model.kept() == plain.kept()
    assert not torch.equal(*outputs)


def test_objects_among_the_inputs() -> None:
    class Cache:
        def __init__(self) -> None:
            self.states: list[Tensor] = []

    def cached(layer: nn.Module, x: Tensor, cache: Any) -> Tensor:
        cache.states.append(layer(x))
        return torch.cat(cache.states, 1)

    model, cache = Called(seeded(lambda: nn.Linear(4, 3)), cached), Cache()
    cache.states.append(points(5, 2))
    run(model, points(5, 4), cache)
    assert len(cache.states) == 2
    mapped = Called(seeded(lambda: nn.Linear(4, 3)), lambda layer, inputs: layer(inputs["x"]))
    x = points(5, 4)
    each(mapped, 5, lambda i: mapped(types.MappingProxyType({"x": x[i]})))

    def endless() -> Any:
        yield 1

    generated = Called(mapped.layer, lambda layer, x, numbers: layer(x))
    refused(r"an input of type generator cannot be copied.*verify='never'", generated, x, endless())
    assert run(generated, x, endless(), verify="never").norms.shape == (5,)
    mapped.numbers = endless()
    refused(r"Called's attribute 'numbers' of type generator cannot be copied", mapped, {"x": x})
