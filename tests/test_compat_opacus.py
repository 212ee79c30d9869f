"""The samplers of flashcoreset.compat.opacus beside opacus' own and beside autograd, layer by layer and through opacus' modules."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import opacus.grad_sample as theirs
import pytest
import torch
from torch import Tensor, nn

from flashcoreset.compat import opacus as ours

# What opacus registers itself.
ours.unregister()
GRADIENTS = dict(theirs.GradSampleModule.GRAD_SAMPLERS)
NORMS = dict(theirs.GradSampleModuleFastGradientClipping.NORM_SAMPLERS)
ours.register()

# torch's, of even kernels; and of opacus' hooks on a layer whose input needs no gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(7, 5), lambda: torch.randn(4, 7)),
    "linear-sequence": (lambda: nn.Linear(7, 5), lambda: torch.randn(4, 9, 7)),
    "linear-short-sequence": (lambda: nn.Linear(40, 50), lambda: torch.randn(4, 3, 40)),
    "linear-grid": (lambda: nn.Linear(7, 5, bias=False), lambda: torch.randn(4, 2, 3, 7)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4, 9))),
    "embedding-one": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (4,))),
    "embedding-grid": (lambda: nn.Embedding(3, 6), lambda: torch.randint(0, 3, (4, 2, 5))),
    "layer-norm": (lambda: nn.LayerNorm(6), lambda: torch.randn(4, 3, 6)),
    "layer-norm-of-two": (lambda: nn.LayerNorm((3, 6)), lambda: torch.randn(4, 2, 3, 6)),
    "rms-norm": (lambda: nn.RMSNorm(6, eps=1e-4), lambda: torch.randn(4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(4, 4, 11)),
    "conv1d-same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), lambda: torch.randn(4, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(2, 1)), lambda: torch.randn(4, 4, 9, 8)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), lambda: torch.randn(4, 4, 9, 8)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="valid"), lambda: torch.randn(4, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), lambda: torch.randn(3, 2, 4, 5, 3)),
}  # fmt: skip
# Layers of which opacus' own samplers do not give the gradients that autograd gives, or none.
ALONE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "embedding-padding": (lambda: nn.Embedding(5, 6, padding_idx=2), lambda: torch.randint(0, 5, (4, 9))),
    "layer-norm-without-bias": (lambda: nn.LayerNorm(6, bias=False), lambda: torch.randn(4, 3, 6)),
    "conv1d-circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), lambda: torch.randn(4, 4, 11)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), lambda: torch.randn(4, 4, 9, 8)),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, its input, and gradients of its output."""
    torch.manual_seed(0)
    layer, x = {**CASES, **ALONE}[name]
    module, given = layer(), x()
    return module, given, torch.randn_like(module(given))


def by_autograd(module: nn.Module, x: Tensor, g: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradients sample by sample, in float64."""
    double = module.double()
    found: dict[nn.Parameter, list[Tensor]] = {p: [] for p in module.parameters()}
    for one, out in zip(x.double() if x.is_floating_point() else x, g.double(), strict=True):
        for p, gradient in zip(
            found, torch.autograd.grad(double(one[None]), list(found), out[None]), strict=True
        ):
            found[p].append(gradient)
    return {p: torch.stack(each) for p, each in found.items()}


@pytest.fixture
def registered() -> Iterator[None]:
    ours.register()
    yield
    ours.register()


def test_version() -> None:
    """docs/drop_in.md names the versions that these tests ran with."""
    version = tuple(int(part) for part in importlib.metadata.version("opacus").split("."))
    assert (1, 5) <= version < (2,)
    page = (Path(__file__).parent.parent / "docs" / "drop_in.md").read_text()
    assert "opacus 1.6.0" in page


@pytest.mark.parametrize("name", [*CASES, *ALONE])
def test_gradients_and_norms(name: str) -> None:
    module, x, g = made(name)
    gradients, norms = ours.grad_sample(module, [x], g), ours.norm_sample(module, [x], g)
    opacus = GRADIENTS[type(module)](module, [x], g) if name in CASES else {}
    right = by_autograd(module, x, g)
    assert set(gradients) == set(norms) == set(right)
    for p, expected in right.items():
        assert gradients[p].dtype == norms[p].dtype == torch.float32
        torch.testing.assert_close(gradients[p].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norms[p].double(), expected.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-5)
        if opacus:
            torch.testing.assert_close(gradients[p], opacus[p], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "linear-sequence", "embedding", "embedding-grid"])
def test_norms_of_opacus(name: str) -> None:
    module, x, g = made(name)
    for p, expected in NORMS[type(module)](module, [x], g).items():
        torch.testing.assert_close(ours.norm_sample(module, [x], g)[p], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["linear-sequence", "embedding", "layer-norm", "rms-norm", "conv2d", "conv2d-groups"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(name: str, dtype: torch.dtype) -> None:
    """Results have the type of the outputs' gradients; half types are summed in float32."""
    module, x, g = made(name)
    module, g = module.to(dtype), g.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    gradients, norms = ours.grad_sample(module, [x], g), ours.norm_sample(module, [x], g)
    right = by_autograd(module, x, g)
    eps = torch.finfo(dtype).eps
    for p, expected in right.items():
        assert gradients[p].dtype == norms[p].dtype == dtype
        torch.testing.assert_close(gradients[p].double(), expected, rtol=eps, atol=1e-5)
        torch.testing.assert_close(norms[p].double(), expected.flatten(1).norm(dim=1), rtol=eps, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_empty_batches(name: str) -> None:
    """What Poisson sampling may leave."""
    module, x, g = made(name)
    for p, found in ours.grad_sample(module, [x[:0]], g[:0]).items():
        assert found.shape == (0, *p.shape)
    for found in ours.norm_sample(module, [x[:0]], g[:0]).values():
        assert found.shape == (0,)


def test_only_parameters_that_require_a_gradient() -> None:
    module, x, g = made("linear")
    module.weight.requires_grad_(False)
    assert set(ours.grad_sample(module, [x], g)) == set(ours.norm_sample(module, [x], g)) == {module.bias}
    module.bias.requires_grad_(False)
    assert ours.grad_sample(module, [x], g) == ours.norm_sample(module, [x], g) == {}


def test_the_norm_of_long_sums_is_a_number() -> None:
    """Sums of squares of numbers near the end of float32's range."""
    module = nn.Linear(3, 2)
    x, g = torch.full((2, 4, 3), 1e15), torch.full((2, 4, 2), 1e15)
    for found in (
        ours.norm_sample(module, [x], g)[module.weight],
        ours.grad_sample(module, [x], g)[module.weight].double().flatten(1).norm(dim=1),
    ):
        torch.testing.assert_close(
            found.double(), torch.full((2,), 4e30 * 6**0.5, dtype=torch.float64), rtol=1e-6, atol=0
        )


def test_what_has_no_gradient_per_sample() -> None:
    module = nn.Embedding(5, 6, scale_grad_by_freq=True)
    x = torch.randint(0, 5, (4, 9))
    for sampler in (ours.grad_sample, ours.norm_sample):
        with pytest.raises(
            NotImplementedError, match="weight of Embedding are not supported: scale_grad_by_freq"
        ):
            sampler(module, [x], torch.randn(4, 9, 6))


class Model(nn.Module):
    """Every layer of LAYERS, and one that is opacus' own business."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rms = nn.Embedding(20, 8), nn.RMSNorm(8)
        self.conv1, self.conv2 = nn.Conv1d(8, 6, 3, padding=1), nn.Conv2d(1, 4, 3)
        self.group, self.conv3 = nn.GroupNorm(2, 4), nn.Conv3d(1, 2, 2)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.rms(self.tokens(x)).transpose(1, 2))
        y = self.group(torch.relu(self.conv2(y[:, None])))
        y = self.conv3(y[:, None]).flatten(2).mean(1)
        return self.out(self.norm(y[:, :8]))


def batch() -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    return Model(), torch.randint(0, 20, (5, 7)), torch.randint(0, 3, (5,))


def grad_samples() -> list[Tensor]:
    model, x, y = batch()
    module = theirs.GradSampleModule(model)
    nn.functional.cross_entropy(module(x), y).backward()
    return [p.grad_sample for p in module.parameters()]


def ghost_norms() -> Tensor:
    model, x, y = batch()
    module = theirs.GradSampleModuleFastGradientClipping(model, max_grad_norm=1, use_ghost_clipping=True)
    nn.functional.cross_entropy(module(x), y).backward()
    return module.get_norm_sample()


@pytest.mark.usefixtures("registered")
def test_models_of_opacus() -> None:
    """GradSampleModule's gradients and ghost clipping's norms of a whole model, with ours and with opacus' own samplers."""
    found, norms = grad_samples(), ghost_norms()
    ours.unregister()
    expected, right = grad_samples(), ghost_norms()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms, right, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        norms, torch.stack([a.flatten(1).norm(dim=1) for a in found]).norm(dim=0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.usefixtures("registered")
def test_the_tables() -> None:
    """The import has registered all layers; unregister() leaves the tables as opacus made them, and register() may run twice."""
    ghost = theirs.GradSampleModuleFastGradientClipping
    assert {type(layer()) for layer, _ in CASES.values()} == set(ours.LAYERS)
    for _ in range(2):
        for kind in ours.LAYERS:
            assert (
                theirs.GradSampleModule.GRAD_SAMPLERS[kind] is ghost.GRAD_SAMPLERS[kind] is ours.grad_sample
            )
            assert ghost.NORM_SAMPLERS[kind] is ours.norm_sample
        ours.register()
    for _ in range(2):
        ours.unregister()
        assert dict(theirs.GradSampleModule.GRAD_SAMPLERS) == dict(ghost.GRAD_SAMPLERS) == GRADIENTS
        assert dict(ghost.NORM_SAMPLERS) == NORMS


def test_without_opacus() -> None:
    program = (
        "import sys\n"
        "class NotInstalled:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'opacus': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, NotInstalled())\n"
        "try:\n"
        "    import flashcoreset.compat.opacus\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True
    )
    assert "opacus, which is not installed" in found.stdout
