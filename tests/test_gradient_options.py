"""Options of GradientSketcher, rules of one's own, and sketches of whole data sets."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks.gradient_sketcher import points, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flashcoreset as fc
from flashcoreset.gradients import rules


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)))


def labels(n: int) -> Tensor:
    return torch.arange(n) % 5


def explicit(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[B, D]: autograd's gradients of batches of one."""
    rows = []
    for one, target in zip(x, y, strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(one[None]), target[None]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def sketched(g: Tensor, dim: int = 16, **options: Any) -> Tensor:
    return fc.sketch(g, dim, **{"kind": "sjlt", "backend": "torch", **options})


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-6)


# ---- per module, per token


def test_per_module() -> None:
    """The modules' sketches add up to the sample's."""
    model, x, y = mlp(), points(4, 7), labels(4)
    sketcher = fc.GradientSketcher(model, 16, per="module", backend="torch")
    with sketcher:
        F.cross_entropy(model(x), y).backward()
    g = explicit(model, x, y)
    cut = 7 * 6 + 6
    assert list(sketcher.sketches) == list(sketcher.norms) == ["0", "2"]
    close(sketcher.sketches["0"], sketched(g[:, :cut]))
    close(sketcher.sketches["2"], sketched(g[:, cut:], offset=cut))
    close(sketcher.norms["0"], g[:, :cut].norm(dim=1))
    close(sketcher.norms["2"], g[:, cut:].norm(dim=1))
    close(sum(sketcher.sketches.values()), sketched(g))


class Tagger(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.embed(ids))
        return self.head(self.mix(hidden).cumsum(1).tanh())


@pytest.mark.parametrize("tied", [False, True])
def test_per_token(tied: bool) -> None:
    """Tokens' gradients: those of copies of the parameters for each position, whose sum is the sample's gradient."""
    model = seeded(lambda: Tagger(tied))
    ids = torch.randint(0, 9, (3, 4), generator=torch.Generator().manual_seed(0))

    def loss(logits: Tensor) -> Tensor:
        return (logits.flatten(1) * points(36, seed=4)).sum(1).square()

    sketcher = fc.GradientSketcher(model, 16, per="token", reduction="sum", backend="torch")
    with sketcher:
        loss(model(ids)).sum().backward()
    assert sketcher.sketches.shape == (3, 4, 16)
    assert sketcher.norms.shape == (3, 4)
    whole = fc.GradientSketcher(model, 16, reduction="sum", backend="torch")
    with whole:
        loss(model(ids)).sum().backward()
    close(sketcher.sketches.sum(1), whole.sketches)
    names = dict(model.named_parameters())
    for b in range(3):
        for t in range(4):
            # Only this position's copy of the parameters has gradients.
            own = {name: p.detach().clone().requires_grad_() for name, p in names.items()}

            def place(name: str, t: int = t, own: dict[str, Tensor] = own) -> Tensor:
                every = names[name].detach().expand(4, *names[name].shape)
                return torch.cat([every[:t], own[name][None], every[t + 1 :]])

            one = ids[b]
            hidden = torch.stack([place("embed.weight")[i, one[i]] for i in range(4)])
            hidden = F.layer_norm(hidden, (6,)) * place("norm.weight") + place("norm.bias")
            mixed = torch.einsum("toi,ti->to", place("mix.weight"), hidden) + place("mix.bias")
            head = place("embed.weight" if tied else "head.weight")
            logits = torch.einsum("tvi,ti->tv", head, mixed.cumsum(0).tanh())
            found = torch.autograd.grad(loss(logits[None]).sum(), list(own.values()), allow_unused=True)
            g = torch.cat(
                [
                    (torch.zeros_like(p) if v is None else v).flatten()
                    for v, p in zip(found, own.values(), strict=True)
                ]
            )
            close(sketcher.norms[b, t], g.norm())
            close(sketcher.sketches[b, t], sketched(g[None])[0])


def test_per_token_is_refused_without_tokens() -> None:
    for model, x in (
        (mlp(), points(4, 7)),
        (nn.Sequential(nn.Conv1d(7, 3, 1)), points(4, 7, 5)),
        (nn.Sequential(nn.Linear(7, 3), nn.Flatten(), nn.Linear(15, 2)), points(4, 5, 7)),
    ):
        sketcher = fc.GradientSketcher(model, 8, per="token", backend="torch", verify="never")
        with pytest.raises(ValueError, match=r"per token|one row for each"), sketcher:
            model(x).sum().backward()


# ---- samples that overflow, empty batches


@pytest.mark.parametrize("sequence", [False, True])
def test_one_overflowed_sample_costs_only_its_own_row(sequence: bool, backend: str) -> None:
    model, x, y = mlp(), points(5, 3, 7) if sequence else points(5, 7), labels(5)

    def loss(x: Tensor) -> Tensor:
        out = model(x)
        return F.cross_entropy(out.mean(1) if sequence else out, y)

    clean = fc.GradientSketcher(model, 16, backend=backend)
    with clean:
        loss(x).backward()
    bad = x.clone()
    bad[3] = float("inf")
    for verify in ("first", "always", "never"):
        sketcher = fc.GradientSketcher(model, 16, nonfinite="nan", backend=backend, verify=verify)
        with sketcher:
            loss(bad).backward()
        others = [0, 1, 2, 4]
        close(sketcher.sketches[others], clean.sketches[others])
        close(sketcher.norms[others], clean.norms[others])
        assert sketcher.sketches[3].isnan().all()
        assert sketcher.norms[3].isnan()
    strict = fc.GradientSketcher(model, 16, backend=backend)
    with strict:
        loss(bad).backward()
    with pytest.raises(
        ValueError, match=r"sketches: the gradient of sample 3 is not finite.*nonfinite='nan'"
    ):
        _ = strict.sketches


def test_empty_batches() -> None:
    model = mlp()
    for per, shape in (("sample", (0, 16)), ("module", (0, 16))):
        sketcher = fc.GradientSketcher(model, 16, per=per, backend="torch")
        for samples in (0, 4, 0):
            with sketcher:
                model(points(samples, 7)).sum().backward()
            found = sketcher.sketches if per == "sample" else sketcher.sketches["2"]
            assert found.shape == (samples, *shape[1:])
            norms = sketcher.norms if per == "sample" else sketcher.norms["2"]
            assert norms.shape == (samples,)


# ---- scaled gradients


def test_scale_is_a_diagonal() -> None:
    model, x, y = seeded(lambda: Tagger(True)), torch.arange(12).view(3, 4) % 9, labels(12).view(3, 4)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")

    rows = []
    for one, target in zip(x, y, strict=True):
        found = torch.autograd.grad(loss(model(one[None]), target[None]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    g = torch.stack(rows)
    scale = points(g.shape[1], seed=8).abs() + 0.1
    begin, parts = 0, {}
    for name, p in model.named_parameters():
        parts[name] = scale[begin : begin + p.numel()].view_as(p)
        begin += p.numel()
    for given in (scale, parts):
        for kind in ("sjlt", "srht", "rademacher"):
            sketcher = fc.GradientSketcher(
                model, 16, scale=given, kind=kind, backend="torch", reduction="sum"
            )
            with sketcher:
                loss(model(x), y).backward()
            close(sketcher.sketches, sketched(g * scale, kind=kind))
            close(sketcher.norms, (g * scale).norm(dim=1))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.Adam(ps, 1e-2),
        lambda ps: torch.optim.AdamW(ps, 1e-2, amsgrad=True, eps=1e-4),
        lambda ps: torch.optim.RMSprop(ps, 1e-2),
        lambda ps: torch.optim.Adagrad(ps, 1e-2),
    ],
    ids=["adam", "adamw-amsgrad", "rmsprop", "adagrad"],
)
def test_scale_of_an_optimizer(make: Any) -> None:
    """The scale is read when a block begins: that of the optimizer's next division."""
    model, x, y = mlp(), points(4, 7), labels(4)
    optimizer = make(model.parameters())
    sketcher = fc.GradientSketcher(model, 16, scale=optimizer, backend="torch")
    if not isinstance(optimizer, torch.optim.Adagrad):  # which begins with zeros
        message = r"scale: the optimizer .* has taken no step with parameter '0\.weight'"
        with pytest.raises(ValueError, match=message), sketcher:
            pass
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        with sketcher:
            F.cross_entropy(model(x), y).backward()
        g, factors = explicit(model, x, y), []
        for p in model.parameters():
            state, group = optimizer.state[p], optimizer.param_groups[0]
            if "exp_avg_sq" in state:
                v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
                v = v / (1 - 0.999 ** float(state["step"]))
            else:
                v = state["square_avg"] if "square_avg" in state else state["sum"]
            factors.append((1 / (v.double().sqrt() + group["eps"])).flatten())
        expected = g.double() * torch.cat(factors)
        close(sketcher.sketches, sketched(expected))
        close(sketcher.norms, expected.norm(dim=1))


# ---- rules


class Power(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.rand(4) + 0.5), nn.Linear(4, 4)

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        return self.inner(x) * self.weight.square() * times


@pytest.fixture
def _rules_restored() -> Iterator[None]:
    before = dict(rules._RULES)
    yield
    rules._RULES.clear()
    rules._RULES.update(before)


@pytest.mark.usefixtures("_rules_restored")
def test_a_rule_of_ones_own() -> None:
    calls: list[Any] = []

    @fc.register_gradient_rule(Power)
    def rule(module: Power, inputs: tuple[Any, ...], g: Tensor) -> dict[str, Tensor]:
        calls.append(inputs)
        x, times = inputs
        hidden = module.inner(x).detach()
        slope = g * module.weight.detach().square() * times
        return {
            "weight": 2 * g * hidden * module.weight.detach() * times,
            "inner.weight": torch.einsum("bo,bi->boi", slope, x),
            "inner.bias": slope,
        }

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.power = nn.Linear(7, 4), Power()

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(self.power(self.first(x), times=3.0), (0, 1))

    model, x, y = seeded(Outer), points(5, 7), labels(5)
    sketcher = fc.GradientSketcher(model, 16, backend="torch")
    with warnings.catch_warnings(), sketcher:
        warnings.simplefilter("error")
        F.cross_entropy(model(x), y).backward()
    assert len(calls) == 1
    assert not calls[0][0].requires_grad
    g = explicit(model, x, y)
    close(sketcher.sketches, sketched(g))
    close(sketcher.norms, g.norm(dim=1))

    class Sub(Power):
        pass

    class Other(Power):
        def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
            return super().forward(x) + 1

    assert rules.rule_of(Sub()) is rule
    assert rules.rule_of(Other()) is None
    for wrong, error, message in (
        (lambda m, i, g: {"weight": g}, ValueError, "gives no gradients of 'inner.weight'"),
        (
            lambda m, i, g: {"weight": g[0], "inner.weight": g, "inner.bias": g},
            ValueError,
            r"'weight' as \(5, 4\), got \(4,\)",
        ),
        (lambda m, i, g: [g], TypeError, "must return a dict"),
    ):
        fc.register_gradient_rule(Power)(wrong)
        sketcher = fc.GradientSketcher(model, 16, backend="torch")
        with pytest.raises(error, match=message), sketcher:
            F.cross_entropy(model(x), y).backward()
    fc.register_gradient_rule(Power)(lambda m, i, g: {**rule(m, i, g), "weight": 2 * rule(m, i, g)["weight"]})
    sketcher = fc.GradientSketcher(model, 16, backend="torch")
    with (
        pytest.raises(
            RuntimeError, match=r"'power\.weight' of Power 'power': the samples' gradients do not add up"
        ),
        sketcher,
    ):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(TypeError, match=r"module_type must be a subclass of torch\.nn\.Module, got 3"):
        fc.register_gradient_rule(3)
    with pytest.raises(TypeError, match="rule must be a function"):
        fc.register_gradient_rule(Power)(3)


# ---- several sketchers


def test_several_sketchers_on_one_model() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.first, self.out = nn.Embedding(3, 7), nn.Linear(7, 6), nn.Linear(6, 5)
            self.scale = nn.Parameter(torch.rand(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x + self.place(torch.arange(3)[None])).tanh() @ self.scale.T
            return self.out(hidden).mean(1)

    model, x, y = seeded(Positions), points(4, 3, 7), labels(4)
    g = explicit(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fc.SlowPathWarning)
        one = fc.GradientSketcher(model, 16, backend="torch")
        two = fc.GradientSketcher(model, 8, kind="rademacher", seed=5, backend="torch", verify="always")
        part = fc.GradientSketcher(model, None, parameters="first.*", backend="torch")
        for _ in range(2):
            with one, two, part:
                F.cross_entropy(model(x), y).backward()
            names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
            close(one.sketches, sketched(g))
            close(two.sketches, sketched(g, 8, kind="rademacher", seed=5))
            close(one.norms, g.norm(dim=1))
            close(part.norms, g[:, [name.startswith("first") for name in names]].norm(dim=1))


# ---- bad input


def test_arguments_are_checked() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for options, error, message in (
        ({"batch_dim": 2}, ValueError, "batch_dim must be 0 or 1, got 2"),
        ({"batch_dim": 0.5}, TypeError, "batch_dim must be an int"),
        ({"per": "layer"}, ValueError, "unknown per 'layer'; valid names: sample, module, token"),
        ({"nonfinite": "skip"}, ValueError, "unknown nonfinite 'skip'; valid names: raise, nan"),
        ({"scale": 2.0}, TypeError, "scale must be None, a tensor"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must have the shape \(83,\).*got \(3,\)"),
        ({"scale": {"0.weight": torch.ones(6, 7)}}, ValueError, "scale must hold each wanted parameter, got none for '0.bias'"),
        ({"scale": {n: torch.ones(2) for n, _ in model.named_parameters()}}, ValueError, r"scale\['0.weight'\] must have the shape \(6, 7\)"),
        ({"scale": {n: [1] for n, _ in model.named_parameters()}}, TypeError, r"scale\['0.weight'\] must be a tensor"),
        ({"scale": torch.full((83,), float("nan"))}, ValueError, "scale must be finite"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fc.GradientSketcher(model, 4, backend="torch", **options)
    F.cross_entropy(model(points(4, 7)), labels(4)).backward()
    optimizer.step()
    other = torch.optim.Adam(model[0].parameters())
    other.step()
    for scale, message in ((optimizer, "SGD"), (other, "does not hold parameter '2.weight'")):
        with pytest.raises(ValueError, match=message), fc.GradientSketcher(model, 4, scale=scale):
            pass


# ---- data sets


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def data(n: int = 11) -> TensorDataset:
    return TensorDataset(points(n, 7), labels(n))


def test_sketch_loader(tmp_path: Path) -> None:
    model, told = mlp(), []
    loader = DataLoader(data(), batch_size=4)
    expected = sketched(explicit(model, *data().tensors))
    model[0].weight.grad = torch.ones(6, 7)
    found = fc.sketch_loader(
        model, loader, loss, 16, progress=lambda *step: told.append(step), backend="torch"
    )
    close(found, expected)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(model[0].weight.grad, torch.ones(6, 7))
    assert model[2].weight.grad is None
    path = tmp_path / "sketches.npy"
    mapped = fc.sketch_loader(model, loader, loss, 16, out=path, backend="torch")
    assert torch.equal(mapped, found)
    assert np.array_equal(np.load(path), found.numpy())
    assert fc.sketch_loader(model, [], loss, 16).shape == (0, 16)
    assert (
        fc.sketch_loader(model.double(), [(points(2, 7).double(), labels(2))], loss, 16).dtype
        == torch.float64
    )


class Interrupted(Exception):
    pass


def test_sketch_loader_goes_on(tmp_path: Path) -> None:
    model, path = mlp(), tmp_path / "sketches.npy"
    loader = DataLoader(data(), batch_size=2)
    whole = fc.sketch_loader(model, loader, loss, 16, backend="torch")
    for stop in (3, 0, 2):  # batches before the next interruption
        calls = []

        def stopping(model: nn.Module, batch: Any, stop: int = stop, calls: list[int] = calls) -> Tensor:
            if len(calls) == stop:
                raise Interrupted
            calls.append(1)
            return loss(model, batch)

        with pytest.raises(Interrupted):
            fc.sketch_loader(model, loader, stopping, 16, out=path, resume=path.exists(), backend="torch")
        assert len(calls) == stop
    assert json.loads((tmp_path / "sketches.npy.json").read_text())["batches"] == 5
    with path.open("ab") as file:
        file.write(b"half a row")
    found = fc.sketch_loader(model, loader, loss, 16, out=path, resume=True, backend="torch")
    assert torch.equal(found, whole)
    with pytest.raises(ValueError, match=r"sketches.npy' exists already; pass resume=True"):
        fc.sketch_loader(model, loader, loss, 16, out=path)
    other = {"seed": 1}, {"kind": "srht"}, {"parameters": "0.*"}, {"reduction": "sum"}
    for options in other:
        with pytest.raises(ValueError, match="holds sketches of another"):
            fc.sketch_loader(model, loader, loss, 16, out=path, resume=True, **options)
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(ValueError, match="holds sketches of another model"):
        fc.sketch_loader(model, loader, loss, 16, out=path, resume=True)


def test_sketch_loader_knows_the_former_normal_numbers(tmp_path: Path) -> None:
    """A file without "kinds" was made when "gaussian" was the name of what is "gaussian-boxmuller" now."""
    model, path = mlp(), tmp_path / "sketches.npy"
    loader = DataLoader(data(), batch_size=4)
    former = fc.sketch_loader(model, loader, loss, 16, out=path, kind="gaussian-boxmuller").clone()
    about = path.with_name(path.name + ".json")
    known = json.loads(about.read_text())
    del known["kinds"]
    about.write_text(json.dumps(known | {"kind": "gaussian"}))
    with pytest.raises(
        ValueError, match=r"sketches of another kind \('gaussian-boxmuller', now 'gaussian'\)"
    ):
        fc.sketch_loader(model, loader, loss, 16, out=path, resume=True, kind="gaussian")
    found = fc.sketch_loader(model, loader, loss, 16, out=path, resume=True, kind="gaussian-boxmuller")
    assert torch.equal(found, former)
    present = fc.sketch_loader(model, loader, loss, 16, kind="gaussian")
    assert not torch.equal(present, former)


def test_arguments_of_sketch_loader_are_checked() -> None:
    model, loader = mlp(), DataLoader(data(), batch_size=4)
    shuffled = DataLoader(data(), batch_size=4, shuffle=True)
    for arguments, options, error, message in (
        ((model, 3, loss, 8), {}, TypeError, "loader must be an iterable of batches, got int"),
        ((model, loader, 3, 8), {}, TypeError, "loss must be a function"),
        ((model, loader, loss, None), {}, TypeError, "dim must be an int, got None"),
        ((model, loader, loss, 8), {"resume": 1}, TypeError, "resume must be a bool, got 1"),
        ((model, loader, loss, 8), {"resume": True}, ValueError, "pass its path as out"),
        ((model, shuffled, loss, 8), {"resume": True, "out": "x.npy"}, ValueError, "got one that shuffles"),
        ((model, loader, loss, 8), {"per": "token"}, ValueError, "per must be 'sample' for a loader, got 'token'"),
        ((model, loader, loss, 8), {"progress": 3}, TypeError, "progress must be"),
        ((model, loader, lambda m, b: m(b[0]), 8), {}, ValueError, r"one number, got \(4, 5\)"),
        ((model, loader, lambda m, b: 0.5, 8), {}, ValueError, "one number, got float"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fc.sketch_loader(*arguments, **options)


def test_sketch_of_a_dictionary(backend: str) -> None:
    """Parts stand side by side."""
    parts = {
        "a": points(3, 4, 5),
        "b": points(3, seed=2),
        "c": points(3, 0, 2),
        "d": points(3, 6, seed=3).double(),
    }
    whole = torch.cat([part.reshape(3, -1).double() for part in parts.values()], 1)
    for kind in ("sjlt", "rademacher", "srht", "mask", "grass"):
        found = fc.sketch(parts, 8, kind=kind, seed=3, backend=backend)
        assert found.dtype == torch.float64
        expected = fc.sketch(whole, 8, kind=kind, seed=3, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    later = fc.sketch(parts, 8, kind="sjlt", offset=7, backend=backend)
    torch.testing.assert_close(
        later, fc.sketch(whole, 8, kind="sjlt", offset=7, backend=backend), rtol=1e-5, atol=1e-6
    )
    for wrong, error, message in (
        ({}, ValueError, "at least one part, got an empty dict"),
        ({"a": points(3, 4), "b": points(2, 4)}, ValueError, "got 3 in 'a' and 2 in 'b'"),
        ({"a": torch.tensor(1.0)}, ValueError, r"x\['a'\] must have the batch in dimension 0"),
        ({"a": points(3, 0)}, ValueError, "at least one column"),
        ({"a": "text"}, TypeError, r"x\['a'\] must be a torch.Tensor"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fc.sketch(wrong, 8, backend=backend)
