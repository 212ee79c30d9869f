"""flashcoreset.compat.dattri and compat.sjlt beside dattri on the same input, and beside products with the explicit matrix."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashcoreset as fc
from flashcoreset.compat.dattri.func import projection as ours
from flashcoreset.compat.dattri.params import projection as params
from flashcoreset.compat.sjlt import SJLTProjection

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from dattri.func import projection as theirs

KINDS = {"normal": "gaussian", "rademacher": "rademacher", "sjlt": "sjlt"}
TYPES = [*KINDS, "random_mask", "identity", "grass", "grass_2"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def features(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of 40 columns in all."""
    return {
        "b": features(rows, 15, 1, dtype),
        "scale": features(rows, 1, 2, dtype)[:, 0],
        "a": features(rows, 24, 3, dtype).view(rows, 4, 6),
    }


def flattened(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts.values()], 1)


def matrix(columns: int, dim: int, proj_type: str, seed: int) -> Tensor:
    return fc.projection_matrix(columns, dim, kind=KINDS[proj_type], seed=seed, dtype=torch.float64)


def test_version() -> None:
    """docs/drop_in.md names the versions that these tests ran with."""
    version = tuple(int(part) for part in importlib.metadata.version("dattri").split("."))
    assert (0, 3, 0) <= version < (0, 4)
    page = (Path(__file__).parent.parent / "docs" / "drop_in.md").read_text()
    assert "dattri 0.3.0" in page


@pytest.mark.parametrize(
    "name", ["AbstractProjector", "BasicProjector", "CudaProjector", "ChunkedCudaProjector", "make_random_projector", "random_project"]
)  # fmt: skip
def test_signatures(name: str) -> None:
    """Ours take what theirs take, by the same names in the same places, and may take more at the end."""
    mine, other = getattr(ours, name), getattr(theirs, name)
    if isinstance(mine, type):
        assert {m for m in vars(other) if not m.startswith("_")} - set(dir(mine)) <= {"get_generator_states"}
        mine, other = mine.__init__, other.__init__
    found, expected = (list(inspect.signature(each).parameters.values()) for each in (mine, other))
    assert [(p.name, p.kind) for p in found[: len(expected)]] == [(p.name, p.kind) for p in expected]
    for p, q in zip(found, expected, strict=False):
        if q.default is not inspect.Parameter.empty:
            assert p.default == q.default, p.name


def test_types_are_the_same_strings() -> None:
    assert {t.name: t.value for t in ours.ProjectionType} == {t.name: t.value for t in theirs.ProjectionType}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj_type", ["identity", "random_mask"])
@pytest.mark.parametrize("dim", [7, 300])
def test_the_numbers_of_dattri(dtype: torch.dtype, proj_type: str, dim: int) -> None:
    """Where dattri's results do not depend on a matrix, ours are the same: also the columns of random_mask."""
    x, parts = features(5, 200, dtype=dtype), parameters(5, dtype)
    for given in (x, parts):
        mine, other = (each.random_project(given, 5, dim, 32, 11, proj_type) for each in (ours, theirs))
        for ensemble_id in (0, 2):
            found, expected = mine(given, ensemble_id), other(given, ensemble_id)
            assert found.dtype == expected.dtype == dtype
            assert torch.equal(found, expected)


def test_the_columns_of_a_mask() -> None:
    mine, other = (
        each.BasicProjector(100, 9, 5, "random_mask", torch.device("cpu")) for each in (ours, theirs)
    )
    for ensemble_id in (0, 3, 0):
        mine.project(features(1, 100), ensemble_id)
        other.project(features(1, 100), ensemble_id)
        assert torch.equal(mine.active_indices, other.active_indices)
    mine.free_memory()
    assert torch.equal(mine.active_indices, other.active_indices)
    with pytest.raises(AttributeError, match="normal has no active_indices"):
        ours.BasicProjector(100, 9, 5, "normal", "cpu").active_indices  # noqa: B018


@pytest.mark.parametrize("proj_type", KINDS)
@pytest.mark.parametrize(("rows", "columns", "dim"), [(1, 1, 1), (3, 97, 64), (5, 1025, 7)])
def test_the_product_with_the_matrix(proj_type: str, rows: int, columns: int, dim: int) -> None:
    x = features(rows, columns)
    found = ours.random_project(x, rows, dim, 32, 6, proj_type)(x)
    expected = x.double() @ matrix(columns, dim, proj_type, 6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * columns**0.5)


@pytest.mark.parametrize(("proj_type", "multiplier"), [("grass", 4), ("grass_2", 2), ("grass_1000", 125)])
def test_grass_is_a_mask_and_then_sjlt(proj_type: str, multiplier: int) -> None:
    x = features(4, 1000)
    for projector in (
        ours.BasicProjector(1000, 8, 1, proj_type, "cpu"),
        ours.CudaProjector(1000, 8, 1, "grass", "cpu", grass_multiplier=multiplier),
    ):
        found = projector.project(x, 0)
        assert projector.grass_multiplier == multiplier
        chosen = projector.active_indices
        mask = ours.BasicProjector(1000, 8 * multiplier, 1, "random_mask", "cpu").active_indices
        assert torch.equal(chosen, mask)
        expected = x[:, chosen].double() @ matrix(len(chosen), 8, "sjlt", 1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(ours.random_project(x, 4, 8, 32, 1, proj_type)(x), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj_type", ["normal", "rademacher"])
def test_types_and_lengths_as_of_dattri(dtype: torch.dtype, proj_type: str) -> None:
    """The same shapes and types; and lengths that are as near to the features' own."""
    x = features(6, 400, dtype=dtype)
    for dim in (50, 1000):
        mine, other = (each.random_project(x, 6, dim, 32, 0, proj_type)(x) for each in (ours, theirs))
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        for found in (mine, other):
            ratio = found.double().norm(dim=1) / x.double().norm(dim=1)
            assert (ratio - 1).abs().max() < 4 / (2 * dim) ** 0.5 + torch.finfo(dtype).eps


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dictionaries_are_flattened_in_their_order(proj_type: str, dtype: torch.dtype) -> None:
    parts = parameters(3, dtype)
    flat = flattened(parts)
    mine = ours.random_project(parts, 3, 6, 32, 2, proj_type)
    found, expected = mine(parts, 1), mine(flat, 1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    for each in ("feature_dim", "proj_dim", "seed", "proj_type", "dtype", "block_size", "num_blocks"):
        a = ours.make_random_projector([15, 1, 24], 3, 130, 32, torch.device("cpu"), 2, "normal", dtype=dtype)
        b = theirs.make_random_projector(
            [15, 1, 24], 3, 130, 32, torch.device("cpu"), 2, "normal", dtype=dtype
        )
        assert getattr(a, each) == getattr(b, each)


@pytest.mark.parametrize("proj_type", [each for each in TYPES if each != "identity"])
def test_ensembles_and_seeds_have_matrices_of_their_own(proj_type: str) -> None:
    x = features(2, 500)
    projections = {seed: ours.random_project(x, 2, 16, 32, seed, proj_type) for seed in (0, 1)}
    found = {(seed, member): projections[seed](x, member) for seed in (0, 1) for member in (0, 1, 2)}
    assert len({tuple(y.flatten().tolist()) for y in found.values()}) == len(found)
    assert torch.equal(projections[0](x, 1), found[0, 1])
    assert torch.equal(projections[0](x), found[0, 0])


@pytest.mark.parametrize("proj_type", KINDS)
def test_inner_products_are_kept(proj_type: str) -> None:
    """Over 400 members, inner products of projections have the mean and the variance that the matrix gives."""
    dim, members = 32, 400
    a, b = features(2, 300).double()
    project = ours.random_project(torch.stack([a, b]), 2, dim, 32, 0, proj_type)
    found = torch.stack([(y := project(torch.stack([a, b]), member))[0] @ y[1] for member in range(members)])
    variance = (a.square().sum() * b.square().sum() + (a @ b).square()) / dim
    if proj_type != "normal":  # the fourth moments of signs are 1, not 3
        variance -= 2 * (a * b).square().sum() / dim
    # Of 400: the mean's error is below 4 of its deviations, the variance's relative one, 7 %, below 4 times that.
    assert abs(found.mean() - a @ b) < 4 * (variance / members).sqrt()
    assert abs(found.var() / variance - 1) < 0.28


def test_both_conventions() -> None:
    x = features(4, 60)
    expected = ours.random_project(x, 4, 8, 32, 5, "rademacher", device="cpu")(x)
    own = params.RandomProjectionParams(
        proj_dim=8, proj_max_batch_size=32, proj_seed=5, feature_batch_size=4, device="cpu", proj_type="rademacher"
    )  # fmt: skip
    other = SimpleNamespace(**vars(own))
    assert own.device == torch.device("cpu")
    for found in (
        ours.random_project(x, own),
        ours.random_project(x, proj_params=own),
        ours.random_project(x, other),
        ours.random_project(x, feature_batch_size=4, proj_dim=8, proj_max_batch_size=32, proj_seed=5, proj_type="rademacher"),
    ):  # fmt: skip
        assert torch.equal(found(x), expected)
    with pytest.raises(TypeError, match="proj_params or numbers, not both"):
        ours.random_project(x, own, 8)
    with pytest.raises(TypeError, match="needs proj_dim and proj_max_batch_size, or proj_params"):
        ours.random_project(x, 4)


def test_params() -> None:
    """The fields and defaults that dattri's classes have."""
    assert vars(params.BaseProjectionParams()) == {
        "proj_max_batch_size": 64,
        "proj_seed": 0,
        "proj_type": "normal",
    }
    for kind in (params.IFProjectionParams, params.TracInProjectionParams, params.TRAKProjectionParams):
        assert vars(kind()) == {
            "proj_max_batch_size": 32,
            "proj_seed": 0,
            "proj_type": "normal",
            "proj_dim": 512,
        }
    for kind in (params.LoGraProjectionParams, params.FactGrassProjectionParams):
        assert kind().proj_dim_per_layer == 4096
    assert params.DVEmbProjectionParams().proj_dim_per_layer is None
    assert params.DVEmbProjectionParams().proj_type == "identity"
    with pytest.raises(TypeError, match="proj_dim"):
        params.GeneralProjectionParams()
    with pytest.raises(ValueError, match="proj_type must be one of 'identity'"):
        params.TRAKProjectionParams(proj_type="dense")
    with pytest.raises(TypeError, match="proj_seed must be an int"):
        params.TRAKProjectionParams(proj_seed=0.5)


def test_chunks() -> None:
    parts = {
        "a": features(5, 8, 1).view(5, 2, 4),
        "b": features(5, 4, 2),
        "c": features(5, 9, 3),
        "d": features(5, 1, 4)[:, 0],
    }
    sizes = [12, 10]
    each = [
        theirs.BasicProjector(size, 16, seed, "normal", torch.device("cpu"))
        for seed, size in enumerate(sizes)
    ]
    mine, other = (
        kind.ChunkedCudaProjector(each, 12, sizes, 5, torch.device("cpu"), torch.float32)
        for kind in (ours, theirs)
    )
    torch.testing.assert_close(mine.dict_project(parts, 0), other.dict_project(parts, 0))
    flat = flattened(parts)
    torch.testing.assert_close(mine.project(flat, 1), other.project(flat, 1))
    for kind in (mine, other):
        with pytest.raises(TypeError, match="only accepts Tensor inputs"):
            kind.project(parts, 0)
        with pytest.raises(ValueError, match=r"chunks of|feature dim of current chunk"):
            kind.dict_project({"a": features(5, 7)}, 0)
    with pytest.raises(
        ValueError, match=r"features must have sum\(dim_per_chunk\) = 22 columns in all, got 21"
    ):
        mine.project(flat[:, 1:], 0)
    own = [ours.CudaProjector(size, 16, seed, "sjlt", "cpu") for seed, size in enumerate(sizes)]
    found = ours.ChunkedCudaProjector(own, 12, sizes, 5, torch.device("cpu"), torch.float32).dict_project(
        parts, 1
    )
    torch.testing.assert_close(found, own[0].project(flat[:, :12], 1) + own[1].project(flat[:, 12:], 1))


def test_errors() -> None:
    x = features(4, 60)
    with pytest.raises(ValueError, match=r"proj_type must be one of .*, got 'dense'"):
        ours.random_project(x, 4, 8, 32, 0, "dense")
    with pytest.raises(ValueError, match="whole number N, got 'grass_x'"):
        ours.random_project(x, 4, 8, 32, 0, "grass_x")
    with pytest.raises(ValueError, match="grass_multiplier must be at least 1, got 0"):
        ours.random_project(x, 4, 8, 32, 0, "grass_0")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'meta'"):
        ours.random_project(x, 4, 8, 32, device="meta")
    with pytest.raises(ValueError, match="proj_dim must be at least 1, got 0"):
        ours.random_project(x, 4, 0, 32)
    with pytest.raises(ValueError, match="feature_batch_size must be at least 1, got 0"):
        ours.random_project(x, 0, 8, 32)
    project = ours.random_project(x, 4, 8, 32)
    with pytest.raises(ValueError, match="features must have feature_dim = 60 columns in all, got 59"):
        project(x[:, 1:])
    with pytest.raises(TypeError, match="ensemble_id must be an int"):
        project(x, 0.5)
    whole = torch.arange(240).view(4, 60)
    for proj_type in ("identity", "random_mask"):
        assert ours.random_project(whole, 4, 8, 32, 0, proj_type)(whole).dtype == torch.int64
    with pytest.raises(TypeError, match="dtype must be of a floating type, got int64"):
        ours.random_project(whole, 4, 8, 32)
    # An identity knows no columns, in dattri neither.
    assert ours.random_project(x, 4, 8, 32, 0, "identity")(x[:, 1:]).shape == (4, 59)
    x[2, 7] = torch.inf
    with pytest.raises(ValueError, match="features must be finite, got inf at row 2, column 7"):
        project(x)
    with pytest.raises(NotImplementedError, match=r"dattri\.func\.projection\.arnoldi_project"):
        ours.arnoldi_project(5, torch.sum, [x])
    with pytest.raises(NotImplementedError, match="ArnoldiProjector"):
        ours.ArnoldiProjector(5, 5, torch.sum, (x,))


# ---- sjlt


def dense(projection: SJLTProjection) -> Tensor:
    """The matrix [original_dim, proj_dim] that the buffers are, in float64."""
    out = torch.zeros(projection.original_dim, projection.proj_dim, dtype=torch.float64)
    for i in range(projection.original_dim):
        for column, sign in zip(
            projection.rand_indices[i].tolist(), projection.rand_signs[i].tolist(), strict=True
        ):
            out[i, column] += sign / math.sqrt(projection.c)
    return out


@pytest.mark.parametrize("c", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sjlt_multiplies_by_its_buffers(c: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    projection = SJLTProjection(90, 8, c=c, device="cpu")
    x, y = features(5, 90, dtype=dtype), features(5, 8, 1, dtype)
    for _ in range(2):
        right = dense(projection)
        eps = torch.finfo(dtype).eps
        for found, expected in (
            (projection(x), x.double() @ right),
            (projection.transpose(y), y.double() @ right.T),
        ):
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.double(), expected, rtol=2 * eps, atol=40 * torch.finfo(torch.float32).eps
            )
        # dattri writes numbers of its own into the buffers.
        projection.rand_indices.copy_(torch.randint(0, 8, (90, c)))
        projection.rand_signs.neg_()


def test_sjlt_is_a_module_with_the_buffers_of_sjlt() -> None:
    torch.manual_seed(5)
    projection = SJLTProjection(50, 6, c=2, device="cpu")
    torch.manual_seed(5)  # the draws of sjlt's constructor, in its order
    assert torch.equal(projection.rand_indices, torch.randint(0, 6, (50, 2)))
    assert torch.equal(projection.rand_signs, (torch.randint(0, 2, (50, 2)) * 2 - 1).to(torch.int8))
    assert {name: buffer.dtype for name, buffer in projection.named_buffers()} == {
        "rand_indices": torch.int64,
        "rand_signs": torch.int8,
    }
    other = SJLTProjection(50, 6, c=2, device="cpu")
    other.load_state_dict(projection.state_dict())
    x = features(3, 50)
    assert torch.equal(other(x), projection(x))
    assert (projection.get_compression_ratio(), projection.get_sparsity_ratio()) == (50 / 6, 1 - 2 / 6)
    assert "original_dim=50, proj_dim=6, c=2" in repr(projection)
    for arguments, message in [
        ((0, 4), "original_dim must be at least 1, got 0"),
        ((4, 0), "proj_dim must be at least 1, got 0"),
        ((4, 2, 0), "c must be at least 1, got 0"),
        ((4, 2, 3), "c must be at most proj_dim = 2, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            SJLTProjection(*arguments, device="cpu")
    for call in (projection, projection.transpose):
        with pytest.raises(ValueError, match=r"must have shape \[B, "):
            call(torch.ones(3, 7))


def test_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    projection: Any = SJLTProjection(5, 2)
    assert projection.device == torch.device("cpu")
