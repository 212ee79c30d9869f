"""metric="precomputed_distance": the results of the metrics of points, on all backends; and the warning for distances that are
passed as similarities."""

from __future__ import annotations

import warnings
from typing import Any

import cases
import numpy as np
import pytest
import scipy.sparse
import torch
from cases import locate
from conftest import EVERY_BACKEND

import flashcoreset as fc

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
N = 41
# On a grid distances are exact in every type, and many of them tie.
GRID = torch.randint(0, 12, (N, 3), generator=torch.Generator().manual_seed(0)).double()
CLIENTS = torch.randint(0, 12, (29, 3), generator=torch.Generator().manual_seed(1)).double()
GROUPS = torch.arange(N) % 3


def distances(clients: torch.Tensor | None = None) -> torch.Tensor:
    return (GRID[:, None] - (GRID if clients is None else clients)).abs().sum(2)


def same(found: fc.Selection, expected: fc.Selection, is_far: bool = False) -> None:
    """`is_far`: an offset far above all distances, from which each metric's own bound of these is put together with the rest."""
    for name in ("indices", "weights", "assignment", *(() if is_far else ("gains",))):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    last = torch.finfo(expected.gains.dtype).eps
    torch.testing.assert_close(found.gains, expected.gains, rtol=last if is_far else 0, atol=0)
    assert found.objective == pytest.approx(expected.objective, rel=1e-15 if is_far else 0, abs=0)
    assert found.offset == expected.offset


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 5.0, 40.0, 2.0**40])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"weights": torch.arange(N) % 4}, {"preselected": [3, 30]}, {"groups": GROUPS},
        {"groups": GROUPS, "preselected": [3, 30]}, {"method": "naive"}, {"method": "stochastic", "seed": 3}, {"memory_budget": 0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_it_is_the_metric_of_points(
    backend: str, options: dict[str, Any], offset: float, dtype: torch.dtype
) -> None:
    if backend in ("cuda", "triton") and dtype in (torch.float16, torch.float64) and options:
        options = {}  # the emulator and the interpreter are slow
    expected = fc.facility_location(GRID.to(dtype), 9, metric="l1", offset=offset, backend="torch", **options)
    found = locate(
        distances().to(dtype), 9, backend=backend, metric="precomputed_distance", offset=offset, **options
    )
    same(found, expected, offset == 2.0**40)


@EVERY_BACKEND
@pytest.mark.parametrize("offset", [6.0, 40.0])
def test_clients_are_the_columns(backend: str, offset: float) -> None:
    weights = torch.arange(29, dtype=torch.float64) / 8
    expected = fc.facility_location(
        GRID, 7, clients=CLIENTS, metric="l1", offset=offset, weights=weights, backend="torch"
    )
    found = locate(
        distances(CLIENTS), 7, backend=backend, metric="precomputed_distance", offset=offset, weights=weights
    )
    same(found, expected)


@EVERY_BACKEND
def test_the_default_offset_is_above_all_distances(backend: str) -> None:
    d = distances(CLIENTS)
    found = locate(d, 5, backend=backend, metric="precomputed_distance")
    assert found.offset == pytest.approx(float(d.max()) * 1.0001, rel=1e-12)
    assert torch.equal(
        found.indices, locate(d, 5, backend=backend, metric="precomputed_distance", offset=100.0).indices
    )
    nothing = locate(torch.zeros(3, 3), 2, backend=backend, metric="precomputed_distance")
    assert (nothing.indices.tolist(), nothing.offset) == ([0, 1], 1.0)


@EVERY_BACKEND
def test_small_distances_beside_a_large_one(backend: str) -> None:
    """The distances would be rounded away if they were subtracted from the offset. Candidate 2 gains 9e-6, then candidate 1
    3e-6."""
    d = torch.tensor([[0, 3e-6, 9e-6, 1e3], [1, 0, 5e-6, 1e3], [1, 8e-6, 0, 1e3], [1e3, 1e3, 1e3, 0]])
    found = locate(d, 2, backend=backend, metric="precomputed_distance", preselected=[0, 3])
    assert found.indices.tolist() == [2, 1]
    assert found.gains.tolist() == pytest.approx([9e-6, 3e-6], rel=1e-6)


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (-distances(), {}, ValueError, r"x must be >= 0 with metric 'precomputed_distance', got -\d+\.0 at row 0, column 1"),
        (distances() * torch.nan, {}, ValueError, "x must be finite, got NaN at row 0, column 0"),
        (distances() + torch.inf, {}, ValueError, "x must be finite, got inf at row 0, column 0"),
        (distances(), {"clients": GRID}, ValueError, "clients must be None with metric 'precomputed_distance'"),
        (distances(CLIENTS), {"groups": GROUPS}, ValueError, "x must be square for groups with metric 'precomputed_distance'"),
        (distances(), {"offset": -1}, ValueError, "offset must be >= 0"),
        (scipy.sparse.csr_matrix(np.eye(3)), {}, TypeError, "x must be dense for metric 'precomputed_distance'"),
    ],
)  # fmt: skip
def test_bad_distances(x: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fc.facility_location(x, 2, metric="precomputed_distance", **options)


def test_compiled_and_estimated() -> None:
    def pick(d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = fc.facility_location(d, 5, metric="precomputed_distance")
        return found.indices, found.assignment

    expected = pick(distances(CLIENTS))
    for found, right in zip(
        torch.compile(pick, fullgraph=True, backend="aot_eager")(distances(CLIENTS)), expected, strict=True
    ):
        assert torch.equal(found, right)
    more, less = (
        fc.memory_estimate(fc.facility_location, (400, 300), k=5, metric=metric)
        for metric in ("precomputed_distance", "precomputed")
    )
    assert more - less == 400 * 300 * 4


# --- distances that are passed as similarities ------------------------------------------------------


@EVERY_BACKEND
def test_distances_as_similarities_get_a_warning(backend: str) -> None:
    d = distances() + (1 - torch.eye(N))
    with pytest.warns(fc.InputWarning, match=r"pass metric='precomputed_distance'") as caught:
        locate(d, 3, backend=backend, metric="precomputed")
    assert [warning.filename for warning in caught] == [cases.__file__]


def test_the_warning_under_compile() -> None:
    d = distances() + (1 - torch.eye(N))
    compiled = torch.compile(
        lambda d: fc.facility_location(d, 3, metric="precomputed").indices,
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.warns(fc.InputWarning, match=r"pass metric='precomputed_distance'"):
        compiled(d)


@pytest.mark.parametrize(
    "s",
    [
        distances(CLIENTS) + 1, -distances() - (1 - torch.eye(N)), torch.eye(4), 1 - 2 * torch.eye(4), torch.zeros(4, 4),
        torch.ones(4, 4) - torch.diag(torch.tensor([1.0, 1, 0, 1])), torch.zeros(1, 1),
        torch.ones(4, 4) - torch.eye(4) - torch.eye(4).flip(0),
    ],
    ids=["rectangle", "negative", "similar to itself", "negative diagonal", "zeros", "one of the diagonal", "one", "zeros elsewhere"],
)  # fmt: skip
def test_similarities_get_none(s: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fc.facility_location(s, 1, metric="precomputed")
