"""flashcoreset.compat.trak beside traker on the same input, and its projections beside products with the explicit matrix."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashcoreset as fc
from flashcoreset.compat.trak import fast_jl
from flashcoreset.compat.trak import projectors as ours

with warnings.catch_warnings():
    # A docstring of trak's has an escape sequence that Python warns about.
    warnings.simplefilter("ignore")
    import trak
    from trak import projectors as theirs

TYPES = {"normal": "gaussian", "rademacher": "rademacher"}
CLASSES = ("BasicSingleBlockProjector", "BasicProjector", "CudaProjector")


def gradients(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def projector(name: str, columns: int, dim: int, proj_type: Any, seed: int = 3, **more: Any) -> Any:
    if name == "CudaProjector":
        more["max_batch_size"] = 8
    return getattr(ours, name)(columns, dim, seed, proj_type, "cpu", **more)


def explicit(columns: int, dim: int, proj_type: str, seed: int) -> Tensor:
    """The matrix in float64, its entries of variance 1."""
    matrix = fc.projection_matrix(columns, dim, kind=TYPES[proj_type], seed=seed, dtype=torch.float64)
    return matrix * math.sqrt(dim)


def test_version() -> None:
    """docs/drop_in.md names the versions that these tests ran with."""
    version = tuple(int(part) for part in importlib.metadata.version("traker").split("."))
    assert (0, 3, 2) <= version < (0, 4)
    page = (Path(__file__).parent.parent / "docs" / "drop_in.md").read_text()
    assert "traker 0.3.2" in page


@pytest.mark.parametrize("name", ["AbstractProjector", "NoOpProjector", *CLASSES, "ChunkedCudaProjector"])
def test_signatures(name: str) -> None:
    mine = inspect.signature(getattr(ours, name).__init__).parameters
    other = inspect.signature(getattr(theirs, name).__init__).parameters
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in other.values()
    ]
    for method in ("project", "free_memory"):
        mine = inspect.signature(getattr(getattr(ours, name), method)).parameters
        other = inspect.signature(getattr(getattr(theirs, name), method)).parameters
        assert list(mine) == list(other)


def test_types_are_the_same_strings() -> None:
    assert {t.name: t.value for t in ours.ProjectionType} == {t.name: t.value for t in theirs.ProjectionType}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize(("rows", "columns", "dim"), [(1, 1, 1), (3, 97, 64), (5, 1025, 7)])
def test_the_product_with_the_matrix(name: str, proj_type: str, rows: int, columns: int, dim: int) -> None:
    x = gradients(rows, columns)
    found = projector(name, columns, dim, proj_type).project(x, model_id=0)
    expected = x.double() @ explicit(columns, dim, proj_type, 3)
    # Rounding of float32, relative to the length of the sums.
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * columns**0.5)


@pytest.mark.parametrize("proj_type", [*TYPES, *ours.ProjectionType, *theirs.ProjectionType])
def test_types_by_name_and_by_member(proj_type: Any) -> None:
    x = gradients(2, 50)
    mine = projector("CudaProjector", 50, 16, proj_type)
    assert mine.proj_type is proj_type
    name = "normal" if proj_type == "normal" else "rademacher"
    assert torch.equal(mine.project(x, 0), projector("CudaProjector", 50, 16, name).project(x, 0))


@pytest.mark.parametrize("dim", [1, 7, 512, 1000])
def test_signs_are_plus_and_minus_one(dim: int) -> None:
    found = projector("BasicProjector", 40, dim, "rademacher").project(torch.eye(40), 0)
    assert torch.equal(found.abs(), torch.ones(40, dim))
    half = projector("CudaProjector", 40, dim, "rademacher").project(torch.eye(40).half(), 0)
    assert torch.equal(half, found.half())


def test_the_single_block_shows_its_matrix() -> None:
    mine = projector("BasicSingleBlockProjector", 30, 12, "normal")
    x = gradients(4, 30)
    for model_id in (0, 5):
        found = mine.project(x, model_id)
        torch.testing.assert_close(found, x @ mine.proj_matrix)
    assert (
        mine.proj_matrix.shape
        == theirs.BasicSingleBlockProjector(30, 12, 3, "normal", "cpu").proj_matrix.shape
    )


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [20, 130])
def test_types_of_results(given: torch.dtype, dtype: torch.dtype, dim: int) -> None:
    x = gradients(3, 60, dtype=given)
    mine = ours.BasicProjector(60, dim, 0, "normal", "cpu", dtype=dtype)
    other = theirs.BasicProjector(60, dim, 0, "normal", "cpu", dtype=dtype)
    found, expected = mine.project(x, 0), other.project(x, 0)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    for name in (
        "grad_dim",
        "proj_dim",
        "seed",
        "proj_type",
        "device",
        "block_size",
        "num_blocks",
        "dtype",
        "model_id",
    ):
        assert getattr(mine, name) == getattr(other, name), name
    right = x.double() @ explicit(60, dim, "normal", 0)
    eps = torch.finfo(torch.promote_types(torch.float32, dtype)).eps
    tolerance = max(torch.finfo(dtype).eps, 60 * eps)
    torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=30 * tolerance)
    # fast_jl keeps the gradients' own type.
    assert ours.CudaProjector(60, dim, 0, "normal", "cpu", 8).project(x, 0).dtype == given


def test_dictionaries_are_flattened_in_their_order() -> None:
    parts = {
        "b": gradients(4, 5, 1),
        "scale": gradients(4, 1, 2)[:, 0],
        "a": gradients(4, 6, 3).view(4, 2, 3),
    }
    flat = trak.utils.vectorize(parts, device="cpu")
    for name in CLASSES:
        mine = projector(name, 12, 33, "normal")
        torch.testing.assert_close(mine.project(parts, 1), mine.project(flat, 1), rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.NoOpProjector(device="cpu").project(parts, 0), flat)
    assert ours.NoOpProjector(device="cpu").project(flat, 0) is flat


def test_dictionaries_of_large_and_small_parameters() -> None:
    """Small neighbours are projected together, large ones alone; columns keep their numbers."""
    sizes = [3, 70_000, 10, 20, 66_000, 1, 40_000, 40_000]
    parts = {i: gradients(2, size, i) for i, size in enumerate(sizes)}
    flat = torch.cat(list(parts.values()), 1)
    mine = projector("BasicProjector", sum(sizes), 8, "rademacher")
    expected = flat.double() @ explicit(sum(sizes), 8, "rademacher", 3)
    torch.testing.assert_close(mine.project(parts, 0).double(), expected, rtol=1e-5, atol=1e-3)


def test_models_and_seeds_have_matrices_of_their_own() -> None:
    x = gradients(2, 100)
    found = [
        projector("BasicProjector", 100, 16, "normal", seed=seed).project(x, model_id)
        # trak's own seeds meet at 10,000 and 100,000 times the model.
        for seed, model_id in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (10_000, 0), (100_000, 0), (-1, 0), (-1, 1), (2**63 - 1, 3)]
    ]  # fmt: skip
    assert len({tuple(y.flatten().tolist()) for y in found}) == len(found)
    mine = projector("BasicProjector", 100, 16, "normal", seed=0)
    assert torch.equal(mine.project(x, 1), found[1])
    assert torch.equal(mine.project(x, 0), found[0])


@pytest.mark.parametrize("proj_type", TYPES)
def test_inner_products_are_kept(proj_type: str) -> None:
    """Over 400 models, inner products of projections have the mean and the variance that the entries' distribution gives."""
    dim, models = 32, 400
    a, b = gradients(2, 300).double()
    mine = ours.BasicProjector(300, dim, 0, proj_type, "cpu", dtype=torch.float64)
    both = torch.stack([a, b])
    found = torch.stack([(y := mine.project(both, model))[0] @ y[1] / dim for model in range(models)])
    variance = (a.square().sum() * b.square().sum() + (a @ b).square()) / dim
    if proj_type == "rademacher":  # whose fourth moment is 1, not 3
        variance -= 2 * (a * b).square().sum() / dim
    # Of 400: the mean's error is below 4 of its deviations, the variance's relative one, 7 %, below 4 times that.
    assert abs(found.mean() - a @ b) < 4 * (variance / models).sqrt()
    assert abs(found.var() / variance - 1) < 0.28


def test_rows_do_not_depend_on_each_other() -> None:
    x = gradients(40, 3000)
    mine = projector("CudaProjector", 3000, 64, "rademacher")
    assert torch.equal(mine.project(x[7:9], 0), mine.project(x, 0)[7:9])


def test_chunks() -> None:
    parts = {
        "a": gradients(5, 8, 1).view(5, 2, 4),
        "b": gradients(5, 4, 2),
        "c": gradients(5, 9, 3),
        "d": gradients(5, 1, 4)[:, 0],
    }
    sizes = [12, 10]
    each = [theirs.BasicProjector(size, 16, seed, "normal", "cpu") for seed, size in enumerate(sizes)]
    other = theirs.ChunkedCudaProjector(each, 12, sizes, 5, "cpu", torch.float32)
    mine = ours.ChunkedCudaProjector(each, 12, sizes, 5, "cpu", torch.float32)
    torch.testing.assert_close(mine.project(parts, 0), other.project(parts, 0))
    for name in ("proj_dim", "proj_type", "params_per_chunk", "max_chunk_size", "feat_bs", "device", "dtype"):
        assert getattr(mine, name) == getattr(other, name)
    mine.allocate_input()
    mine.free_memory()

    own = [projector("CudaProjector", size, 16, "rademacher", seed=seed) for seed, size in enumerate(sizes)]
    found = ours.ChunkedCudaProjector(own, 12, sizes, 2, "cpu", torch.float16).project(parts, 1)
    first = torch.cat([parts["a"].flatten(1), parts["b"]], 1)
    second = torch.cat([parts["c"], parts["d"][:, None]], 1)
    expected = (own[0].project(first, 1).half() + own[1].project(second, 1)).half()
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-2)
    with pytest.raises(
        ValueError, match=r"grads must come in chunks of \[12, 9\] columns, of at most 12, got \[12, 10\]"
    ):
        ours.ChunkedCudaProjector(own, 12, [12, 9], 5, "cpu", torch.float32).project(parts, 0)


@pytest.mark.parametrize("rows", [8, 16, 32])
def test_fast_jl(rows: int) -> None:
    x = gradients(9, 130)
    for proj_type in TYPES:
        project = getattr(fast_jl, f"project_{proj_type}_{rows}")
        assert project.__name__ == f"project_{proj_type}_{rows}"
        found = project(x, 512, 17, 108)
        assert torch.equal(found, projector("CudaProjector", 130, 512, proj_type, seed=17).project(x, 0))
        assert project(x.half(), 512, 17, 108).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [512, 1024, 2048])
def test_sums_of_signs_are_whole(dtype: torch.dtype, dim: int) -> None:
    """fast_jl's own tests: rows of ones give even numbers if their length is even, odd ones if it is odd."""
    for columns in (1024, 1025):
        found = fast_jl.project_rademacher_8(torch.ones(8, columns, dtype=dtype), dim, 78, 1)
        assert found.shape == (8, dim)
        assert bool((found % 2 == columns % 2).all())


def test_whole_numbers_beyond_exact_sums_are_not_rounded() -> None:
    x = gradients(1, 64).round() * 2.0**20 + 0.5
    found = fast_jl.project_rademacher_8(x, 8, 0, 1)
    expected = x.double() @ explicit(64, 8, "rademacher", 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=8)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def scores(projector: Any, folder: Path, lambda_reg: float) -> Tensor:
    """TRAK scores of 30 training rows for 10 others."""
    torch.manual_seed(0)
    model = Two().eval()
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    traker = trak.TRAKer(
        model=model, task="image_classification", train_set_size=30, save_dir=str(folder), device="cpu",
        projector=projector, logging_level=40, use_half_precision=False, lambda_reg=lambda_reg,
    )  # fmt: skip
    for model_id in (0, 1):
        traker.load_checkpoint(model.state_dict(), model_id=model_id)
        for begin in (0, 15):
            traker.featurize((x[begin : begin + 15], y[begin : begin + 15]), num_samples=15)
    traker.finalize_features()
    for model_id in (0, 1):
        traker.start_scoring_checkpoint("test", model.state_dict(), model_id, num_targets=10)
        traker.score((x[30:], y[30:]), num_samples=10)
    return torch.from_numpy(traker.finalize_scores(exp_name="test").copy()).double()


@pytest.mark.parametrize("name", ["BasicProjector", "CudaProjector"])
@pytest.mark.filterwarnings("ignore")  # trak's own
def test_traker_runs_on_our_projectors(name: str, tmp_path: Path) -> None:
    """Projections to many dimensions give nearly the scores of no projection; entries of variance 1 make Gram matrices 1,000 times as
    large, and so must be the ridge."""
    exact = scores(ours.NoOpProjector(device="cpu"), tmp_path / "exact", 0.1)
    assert torch.equal(exact, scores(theirs.NoOpProjector(device="cpu"), tmp_path / "theirs", 0.1))
    found = scores(projector(name, 83, 1000, "rademacher"), tmp_path / "found", 100.0)
    assert found.shape == (30, 10)
    correlation = torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.99  # with trak's projector, 0.998


@pytest.mark.parametrize("name", CLASSES)
def test_errors(name: str) -> None:
    with pytest.raises(KeyError, match="'normal', 'rademacher', got 'sparse'"):
        projector(name, 10, 4, "sparse")
    with pytest.raises(ValueError, match="proj_dim must be at least 1, got 0"):
        projector(name, 10, 0, "normal")
    with pytest.raises(TypeError, match="seed must be an int"):
        projector(name, 10, 4, "normal", seed=0.5)  # type: ignore[arg-type]
    mine = projector(name, 10, 4, "normal")
    with pytest.raises(ValueError, match=r"grads must have shape \[B, D\], got \(10,\)"):
        mine.project(torch.ones(10), 0)
    with pytest.raises(TypeError, match="grads must be a tensor or a dictionary of tensors, got list"):
        mine.project([1.0], 0)
    with pytest.raises(TypeError, match="model_id must be an int"):
        mine.project(torch.ones(2, 10), "a")
    with pytest.raises(ValueError, match=r"grads\['b'\] must have 2 rows as grads\['a'\], got 3"):
        mine.project({"a": torch.ones(2, 5), "b": torch.ones(3, 5)}, 0)
    with pytest.raises(ValueError, match="empty dictionary"):
        mine.project({}, 0)
    bad = torch.ones(2, 5)
    bad[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"grads\['b'\] must be finite, got NaN at row 1, column 3"):
        mine.project({"a": torch.ones(2, 5), "b": bad}, 0)
    assert mine.project(torch.ones(0, 10), 0).shape == (0, 4)
    assert mine.project({"a": torch.ones(2, 0), "b": torch.ones(2, 10)}, 0).shape == (2, 4)


def test_types_that_would_cut_fractions_off() -> None:
    for project in (
        projector("CudaProjector", 10, 4, "normal").project,
        lambda x, _: fast_jl.project_normal_8(x, 4, 0, 1),
    ):
        with pytest.raises(TypeError, match="grads must be of a floating type, got int64"):
            project(torch.ones(2, 10, dtype=torch.int64), 0)
        with pytest.raises(TypeError, match="grads must hold real numbers, got complex64"):
            project(torch.ones(2, 10, dtype=torch.complex64), 0)
    with pytest.raises(TypeError, match="dtype must be of a floating type, got int32"):
        projector("BasicProjector", 10, 4, "normal", dtype=torch.int32)
    whole = torch.arange(20).view(2, 10)
    mine = projector("BasicProjector", 10, 4, "rademacher")
    assert torch.equal(mine.project(whole, 0), mine.project(whole.float(), 0))


def test_basic_projectors_take_only_their_columns() -> None:
    for name in CLASSES[:2]:
        with pytest.raises(ValueError, match="grads must have grad_dim = 10 columns in all, got 9"):
            projector(name, 10, 4, "normal").project(torch.ones(1, 9), 0)
    # fast_jl never knew grad_dim.
    assert projector("CudaProjector", 10, 4, "normal").project(torch.ones(1, 9), 0).shape == (1, 4)


def test_nothing_of_the_peers_is_imported() -> None:
    """The swap modules come without trak, fast_jl, dattri, sjlt and opacus."""
    program = (
        "import sys\n"
        "for name in ('trak', 'fast_jl', 'dattri', 'sjlt', 'opacus', 'pydantic'): sys.modules[name] = None\n"
        "import flashcoreset.compat.trak, flashcoreset.compat.dattri.func.projection\n"
        "import flashcoreset.compat.dattri.params.projection, flashcoreset.compat.sjlt\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
