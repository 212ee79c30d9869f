"""Batches of Sinkhorn problems that every backend's kernels are checked with, against the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import on_device
from torch import Tensor

from flashcoreset.sinkhorn import cpu, reference
from flashcoreset.sinkhorn.backend import Kernels
from flashcoreset.sinkhorn.problem import Problem, Result

METRICS = ("sqeuclidean", "euclidean", "l1", "cosine", "precomputed")
BOTH = (math.inf, math.inf)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

# Largest error of potentials, value, transport cost and error (of the marginals, which sum up to 1) that is allowed, relative
# to the largest cost, or reg or (cosine, where 1 - cos cancels) 1 if that is more: costs computed in float32 are off by some
# units of 6e-8, and so are all numbers made from them. Worst seen: 1.9e-7 and 1.2e-15.
TOLERANCE = {torch.float32: 5e-7, torch.float64: 5e-15}
# On the CPU sums are taken in float32 too, 512 columns at a time. Worst seen: 9.6e-7, in the error of a plan of one entry.
_OF_CPU = {torch.float32: 4.0, torch.float64: 1.0}


def points(batch: int, n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def weights(batch: int, n: int, seed: int) -> Tensor:
    raw = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return raw / raw.sum(1, keepdim=True)


def there(problem: Problem) -> Problem:
    """The problem on the device of the tests."""
    arrays = ("x", "y", "a", "b", "x_lengths", "y_lengths", "f", "g")
    return replace(problem, **{name: on_device(getattr(problem, name)) for name in arrays})


class Case:
    """A batch of problems on the CPU, the largest cost of which is `largest`."""

    def __init__(
        self,
        batch: int,
        n: int,
        m: int,
        d: int = 3,
        *,
        metric: str = "sqeuclidean",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.x, self.y = points(batch, n, d, 1, dtype), points(batch, m, d, 2, dtype) + 0.5
        plain = "sqeuclidean" if metric == "precomputed" else metric
        costs = torch.stack(
            [reference._Costs(u, v, plain, 2**30).matrix for u, v in zip(self.x, self.y, strict=True)]
        )
        self.metric, self.dtype, self.largest = metric, dtype, float(costs.max())
        if metric == "precomputed":
            self.x, self.y = costs.to(dtype), None
        self.a, self.b = weights(batch, n, 3), weights(batch, m, 4)

    def problem(self, **options: Any) -> Problem:
        """A problem of a few iterations that stop at no error, but for the options."""
        return Problem(
            self.x, self.y, self.a, self.b, metric=self.metric, **{"tol": 0.0, "max_iter": 3, **options}
        )

    def solve(self, kernels: Kernels, **options: Any) -> Result:
        return Result(*(t.cpu() for t in kernels.sinkhorn(there(self.problem(**options)))))

    def compare(self, kernels: Kernels, tolerance: float = 1.0, **options: Any) -> Result:
        """The kernels' result, within `tolerance` times TOLERANCE of the definition's."""
        got, want = self.solve(kernels, **options), reference.sinkhorn(self.problem(**options))
        scale = max(self.largest, options["reg"], 1.0 if self.metric == "cosine" else 0.0)
        within, tol = TOLERANCE[self.dtype] * tolerance, options.get("tol", 0.0)
        if kernels is cpu:
            within *= _OF_CPU[self.dtype]
        assert [t.dtype for t in got] == [t.dtype for t in want]
        assert torch.equal(got.iterations, want.iterations)
        assert torch.equal(got.converged, got.error <= tol)
        if tol > 0:  # an error of 0 is an accident of rounding
            assert torch.equal(got.converged, want.converged)
        for name in ("f", "g", "value", "transport_cost"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=within * scale)
        torch.testing.assert_close(got.error, want.error, rtol=0, atol=within)
        return got

    def plan(self, kernels: Kernels, result: Result, **options: Any) -> Tensor:
        """The plan of a result, and the L1 error of its marginals."""
        return kernels.sinkhorn_plan(there(self.problem(f=result.f, g=result.g, **options))).cpu()


def spoil_padding(case: Case, lengths: dict[str, Tensor]) -> None:
    """Puts NaN into the padding, and makes the weights before it sum up to 1."""
    for p, (n, m) in enumerate(zip(*(t.tolist() for t in lengths.values()), strict=True)):
        case.x[p, n:] = math.nan
        if case.y is None:
            case.x[p, :, m:] = math.nan
        else:
            case.y[p, m:] = math.nan
        for weight, size in ((case.a, n), (case.b, m)):
            weight[p, :size] /= weight[p, :size].sum()
            weight[p, size:] = math.nan
