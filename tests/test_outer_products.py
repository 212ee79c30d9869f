"""OuterProductGradients and fc.matching_error beside the dense rows that they stand for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import flashcoreset as fc
from flashcoreset.gradients.outer_products import joined, shortened
from flashcoreset.matching import updates


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(
    samples: int = 23, dtype: torch.dtype = torch.float64, seed: int = 0
) -> fc.OuterProductGradients:
    """Two matrices [4, 7] and [5, 3], of factors of 6 and 2 positions."""
    shapes = ((6, 7), (6, 4), (2, 3), (2, 5))
    a, g, b, h = (normal(samples, *shape, seed=10 * seed + i, dtype=dtype) for i, shape in enumerate(shapes))
    return fc.OuterProductGradients([(a, g), (b, h)])


def by_hand(x: fc.OuterProductGradients) -> Tensor:
    rows = []
    for sample in range(len(x)):
        parts = [
            sum(
                torch.outer(g[sample, t].double(), a[sample, t].double()) for t in range(a.shape[1])
            ).flatten()
            for a, g in x.factors
        ]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_columns_are_sums_of_outer_products(dtype: torch.dtype) -> None:
    x = gradients(dtype=dtype)
    dense = by_hand(x)
    assert (len(x), x.numel, x.device.type) == (23, 43, "cpu")
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-4}
    for begin, end in ((0, 43), (0, 1), (5, 9), (27, 30), (20, 43), (42, 43)):
        found = x.columns(begin, end)
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), dense[:, begin:end], **tolerance)
    torch.testing.assert_close(x.dense().double(), dense, **tolerance)
    assert (x.bounds() >= dense.abs().amax(1) - 1e-9).all()
    rows = torch.tensor([4, 0, 4])
    torch.testing.assert_close(x.take(rows).dense().double(), dense[rows], **tolerance)
    mask = torch.arange(23) % 2 == 0
    torch.testing.assert_close(x.take(mask).dense().double(), dense[mask], **tolerance)


def test_what_else_it_can() -> None:
    x = gradients()
    for kind in ("sjlt", "rademacher", "gaussian", "gaussian-boxmuller"):
        torch.testing.assert_close(
            x.sketch(16, kind=kind, seed=3), fc.sketch(x.dense(), 16, kind=kind, seed=3), rtol=0, atol=1e-10
        )
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert torch.equal(other.dense(), x.dense())
    # Other numbers of positions, as parts of a batch have that are padded apart.
    y = gradients(4, seed=1)
    y = fc.OuterProductGradients([(a[:, :1], g[:, :1]) for a, g in y.factors])
    torch.testing.assert_close(joined([x, y, x]).dense(), torch.cat([x.dense(), y.dense(), x.dense()]))
    for positions in (1, 3, 40):  # the products themselves take less memory than 40 pairs of factors
        a, g = normal(5, positions, 7), normal(5, positions, 4, seed=1)
        short = fc.OuterProductGradients([shortened(a, g)])
        torch.testing.assert_close(short.dense(), fc.OuterProductGradients([(a, g)]).dense())
        stored = sum(tensor.untyped_storage().nbytes() for tensor in short.factors[0])
        assert stored <= 8 * (min(5 * positions * 11, 5 * 28) + 49)


@pytest.mark.parametrize("block", [1 << 25, 8 * 23 * 10], ids=["one block", "blocks of 10"])
@pytest.mark.parametrize("top", [None, 1, 9, 43])
@pytest.mark.parametrize("method", ["medoid", "omp", "frank_wolfe"])
def test_matching_is_that_of_the_rows(
    method: str, top: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of columns in place of rows change nothing but the last bits."""
    monkeypatch.setattr(updates, "BLOCK_BYTES", block)
    x = gradients()
    groups = torch.arange(23) % 3
    for history in (None, fc.AdamState(normal(43, seed=5), normal(43, seed=6).square(), 4)):
        for labels in (None, groups):
            options: dict[str, Any] = {"top": top, "method": method, "normalize": history, "groups": labels}
            found, expected = (fc.match_gradients(rows, 9, **options) for rows in (x, x.dense()))
            if method == "medoid" or top is not None or history is not None:
                assert torch.equal(found.indices, expected.indices)
                torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-9)
            else:  # rows with the same inner products are matched in place of the rows
                torch.testing.assert_close(
                    found.objective, expected.objective, rtol=1e-3, atol=1e-5 * float(x.dense().sum(0).norm())
                )
            assert (found.dims is None) == (top is None)
            if top is not None:
                assert torch.equal(found.dims, expected.dims)
            if history is not None:
                assert found.state.step == 5
                torch.testing.assert_close(found.state.m, expected.state.m)
                torch.testing.assert_close(found.state.v, expected.state.v)


def test_colm_takes_them(backend: str) -> None:
    x = gradients(40)
    labels = torch.tensor([0] * 20 + [1] * 16 + [9] * 4)
    (_, g), (_, h) = x.factors
    g[3] = torch.nan
    g[5], h[5] = 0, 0
    for options in ({}, {"top": 10}, {"method": "omp"}, {"normalize": False}):
        one, other = (fc.CoLM(14, keep_groups=[9], backend=backend, **options) for _ in range(2))
        for _ in range(2):
            found, expected = one.select(x, labels), other.select(x.dense(), labels)
            assert found.info["left_out"].tolist() == [3, 5]
            assert torch.equal(found.indices, expected.indices)
            torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-7)


def test_memory_and_compilation() -> None:
    x = gradients()
    assert fc.memory_estimate("match_gradients", x, k=5, top=9) > 0
    assert fc.memory_estimate("match_gradients", x, k=5, method="omp") > 0

    def call(a: Tensor) -> Tensor:
        return fc.match_gradients(fc.OuterProductGradients([(a, a)]), 2).indices

    with pytest.raises(Exception, match=r"in a function given to torch.compile|OuterProductGradients"):
        torch.compile(call, fullgraph=True, backend="eager")(normal(4, 2, 3))


def test_bad_factors_are_named() -> None:
    a, g = normal(4, 5, 3), normal(4, 5, 2)
    for factors, error, text in (
        (3, TypeError, "factors must be several pairs"),
        (a, TypeError, "factors must be several pairs"),
        ([], ValueError, "factors must hold at least one pair"),
        ([a], TypeError, r"factors\[0\] must be a pair \(a, g\), got Tensor"),
        ([(a, 3)], TypeError, r"factors\[0\]: g must be a floating tensor, got int"),
        ([(a.long(), g)], TypeError, r"factors\[0\]: a must be a floating tensor, got torch.int64"),
        ([(a[0], g)], ValueError, r"factors\[0\]: a must have shape \[B, T, .*got \(5, 3\)"),
        ([(a, g[:, :4])], ValueError, r"must have the same B and T, got \(4, 5\) and \(4, 4\)"),
        ([(a, g.float())], ValueError, "must have one dtype and device"),
        ([(a, g), (a[:3], g[:3])], ValueError, r"factors\[1\] must have 4 samples"),
    ):
        with pytest.raises(error, match=text):
            fc.OuterProductGradients(factors)
    x = fc.OuterProductGradients([(a, g)])
    for begin, end in ((-1, 3), (3, 3), (0, 7)):
        with pytest.raises(ValueError, match="0 <= begin < end <= 6"):
            x.columns(begin, end)
    with pytest.raises(ValueError, match="unknown kind 'srht'"):
        x.sketch(4, kind="srht")
    broken = fc.OuterProductGradients([(a * torch.nan, g)])
    with pytest.raises(ValueError, match="must be finite"):
        fc.match_gradients(broken, 2)
    method = fc.CoLM(2)
    method.select(normal(4, 7))
    with pytest.raises(ValueError, match="history must be of gradients of length 6"):
        method.select(x)


# ---- matching_error


def error_by_hand(g: Tensor, indices: Any, weights: Any = None, total: float | None = None) -> float:
    w = torch.ones(len(indices)).double() if weights is None else torch.as_tensor(weights).double()
    g = g.double()
    missed = (w[:, None] * g[indices]).sum(0) / (w.sum() if total is None else total) - g.mean(0)
    return float(missed.square().sum() / g.mean(0).square().sum())


@pytest.mark.parametrize("kind", ["rows", "half rows", "one direction", "directions", "factors"])
def test_matching_error_is_its_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "BLOCK_BYTES", 8 * 23 * 10)
    x: Any = gradients()
    if kind != "factors":
        x = x.dense() if kind == "rows" else x.dense().half()
    if "direction" in kind:
        x = fc.LowRankGradients(normal(23, 1 if kind == "one direction" else 4), seed=2, numel=91)
    dense = x if isinstance(x, Tensor) else x.dense()
    indices = torch.tensor([3, 3, 20, 7])
    for weights, total in ((None, None), ([1.0, 2.0, 0.5, 19.5], None), ([3.0, -1.0, 4.0, 0.0], 23)):
        given = None if weights is None else torch.tensor(weights)
        found = fc.matching_error(x, indices, given, total=total)
        assert isinstance(found, float)
        assert found == pytest.approx(error_by_hand(dense, indices, weights, total), rel=1e-8)
    assert fc.matching_error(x, list(range(23))) < 1e-20


def test_matching_error_at_its_ends() -> None:
    zero_mean = torch.tensor([[1.0], [-1.0]])
    assert fc.matching_error(zero_mean, [0]) == float("inf")
    assert fc.matching_error(zero_mean, [0, 1]) == 0.0
    assert fc.matching_error(torch.zeros(2, 3), [1]) == 0.0
    g = normal(4, 3)
    for arguments, options, error, text in (
        ((g, []), {}, ValueError, "indices must name at least one row"),
        ((g, [4]), {}, ValueError, r"indices must be in \[0, 3\].*got 4"),
        ((g, [-1]), {}, ValueError, r"indices must be in \[0, 3\].*got -1"),
        ((g, [0.5]), {}, TypeError, "indices must hold integers"),
        ((g, [1], [1.0, 2.0]), {}, ValueError, r"weights must have shape \[1\]"),
        ((g, [1, 2], [1.0, -1.0]), {}, ValueError, "weights must have a positive sum, got 0"),
        ((g, [1], [float("nan")]), {}, ValueError, "weights must be finite"),
        ((g, [1]), {"total": 0}, ValueError, "total must be > 0, got 0"),
        ((g, [1]), {"total": "a"}, TypeError, "total must be"),
        ((g * torch.inf, [1]), {}, ValueError, "g must be finite"),
        ((g[0], [1]), {}, ValueError, "g must have 2 dimensions"),
    ):
        with pytest.raises(error, match=text):
            fc.matching_error(*arguments, **options)
