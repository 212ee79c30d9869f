"""Inputs of more than 2^31 elements, and data sets of ten million rows: `make test-large` (pytest -m slow). They take some minutes and up
to 6 GB, which is why nothing else runs them.

Large arrays are zeros that no page of memory stands for, but for some numbers at their very end: an index of 32 bits would not reach
these.

Not here, because results or working memory alone exceed 6 GB: 2^31 rows of facility_location, caratheodory, match_gradients,
ccs, top_scores, sample_scores and TrainingDynamics (8 bytes per row and more), rows of 2^31 features of facility_location and
of pursuits (copied to panels, or summed in float64). Nor are medoids of gradients along directions of 2^31 numbers without
`top`: they take a quarter of an hour.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcoreset as fc
from flashcoreset.directions import reference as zeroth_order

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BEYOND = 2**31 + 1
TALL, WIDE = 65_537, 32_769  # their product is just above 2^31


def zeros(*shape: int, dtype: type = np.float16) -> np.ndarray:
    """Memory that is taken when it is written to."""
    return np.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_sketch_of_a_long_row(kind: str) -> None:
    x = zeros(1, BEYOND)
    end = np.float16([1.0, -2.0, 3.0, 0.5])
    x[0, -4:] = end
    x[0, 5] = 2.0
    found = fc.sketch(x, 4, kind=kind, seed=1)
    expected = fc.sketch(end[None], 4, kind=kind, seed=1, offset=BEYOND - 4)
    expected = expected + fc.sketch(x[:, :8], 4, kind=kind, seed=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.abs().sum() > 0


@pytest.mark.parametrize("kind", ["sjlt", "srht"])
def test_sketch_of_many_long_rows(kind: str) -> None:
    x = zeros(TALL, WIDE)
    x[-1, -3:] = 1.0, 2.0, 3.0
    x[-1, 0] = 4.0
    found = fc.sketch(x, 2, kind=kind, seed=2)
    assert torch.equal(found[-1], fc.sketch(x[-1:], 2, kind=kind, seed=2)[0])
    assert found[-1].abs().sum() > 0
    assert not found[:-1].any()


def test_scores_of_a_long_row() -> None:
    x = zeros(1, BEYOND)
    x[0, -1] = 20.0
    found = fc.sample_scores(x, np.array([BEYOND - 1]))
    others = (BEYOND - 1) * math.exp(-20.0)
    assert float(found.loss[0]) == pytest.approx(math.log1p(others), rel=1e-5)
    assert float(found.margin[0]) == pytest.approx((1 - math.exp(-20.0)) / (1 + others), rel=1e-5)
    assert bool(found.correct[0])


def test_scores_of_many_long_rows() -> None:
    x = zeros(TALL, WIDE)
    x[-1, -1] = 9.0
    found = fc.sample_scores(x, np.full(TALL, WIDE - 1))
    assert torch.equal(found.loss[:-1], found.loss[:1].expand(TALL - 1))
    assert float(found.loss[0]) == pytest.approx(math.log(WIDE), rel=1e-6)
    assert float(found.loss[-1]) == pytest.approx(math.log1p((WIDE - 1) * math.exp(-9.0)), rel=1e-5)


def test_similarities_beyond_the_indices() -> None:
    """A matrix [n, m]: the last rows alone serve, the best of them the last columns."""
    s = zeros(TALL, WIDE, dtype=np.float32)
    s[-1, -2:] = 3.0
    s[-2, -3:] = 1.0
    found = fc.facility_location(s, 2, metric="precomputed")
    assert found.indices.tolist() == [TALL - 1, TALL - 2]
    assert found.gains.tolist() == [6.0, 1.0]
    assert found.assignment.tolist() == [-1] * (WIDE - 3) + [1, 0, 0]


def test_pairs_beyond_the_indices() -> None:
    """For points on a line the median is the medoid, and its distances add up to those of the two halves."""
    n = 46_343  # odd; n^2 is above 2^31
    x = np.random.default_rng(0).permutation(n).astype(np.float64)
    found = fc.facility_location(x[:, None], 1, metric="l1", offset=float(n))
    half = n // 2
    assert float(x[found.indices[0]]) == half
    assert found.objective == n * n - half * (half + 1)


def test_directions_beyond_the_indices() -> None:
    g = fc.LowRankGradients(torch.ones(1, 2), 7, BEYOND + 2**33)
    for begin in (2**31 - 2, 2**32 - 1, 2**33):
        expected = torch.empty(2, 5)
        zeroth_order.directions(expected, seed=7, begin=begin)
        torch.testing.assert_close(g.directions(begin, begin + 5), expected, rtol=1e-5, atol=1e-6)


def test_gradients_beyond_the_indices() -> None:
    count = BEYOND // 3 + 1
    g = zeros(3, count, dtype=np.float32)
    g[:, -2:] = [[1.0, 0.0], [1.1, 0.0], [-4.0, 2.0]]
    found = fc.match_gradients(g, 2, top=2)
    assert found.dims.tolist() == [[count - 1, count - 2]]
    assert found.indices.tolist() == [0, 2]
    assert found.weights.tolist() == [2.0, 1.0]


# ---- ten million rows

ROWS, BATCH = 10_000_000, 1_000_000


def batch(number: int, width: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((BATCH, width), dtype=np.float32)


def test_ten_million_scores() -> None:
    scores = np.random.default_rng(0).random(ROWS, dtype=np.float32)
    found = fc.ccs(scores, 100_000, n_strata=50, seed=1)
    low, high = float(scores.min()), float(scores.max())
    place = np.minimum(((scores.astype(np.float64) - low) / (high - low) * 50).astype(int), 49)
    assert found.info["sizes"] == np.bincount(place, minlength=50).tolist()
    picked = found.indices.numpy()
    assert len(np.unique(picked)) == 100_000
    assert np.bincount(place[picked], minlength=50).tolist() == [2000] * 50
    top = fc.top_scores(scores, 1000).indices.numpy()
    assert np.array_equal(top, np.argsort(-scores, kind="stable")[:1000])


def test_ten_million_samples_in_training() -> None:
    dynamics = fc.TrainingDynamics(ROWS)
    correct = np.zeros(ROWS)
    some = np.arange(0, ROWS, 99_991)
    margins = np.zeros(len(some))
    for epoch in range(2):
        for number in range(ROWS // BATCH):
            logits = batch(100 * epoch + number, 3)
            targets = np.arange(BATCH) % 3
            begin = number * BATCH
            dynamics.update(np.arange(begin, begin + BATCH), logits, targets, epoch)
            correct[begin : begin + BATCH] += logits.argmax(1) == targets
            here = (some >= begin) & (some < begin + BATCH)
            z = logits[some[here] - begin].astype(np.float64)
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            own = targets[some[here] - begin]
            true = p[np.arange(len(p)), own].copy()
            p[np.arange(len(p)), own] = -1
            margins[here] += true - p.max(1)
    scores = dynamics.scores()
    assert np.array_equal(scores["correctness"].numpy(), correct)
    np.testing.assert_allclose(scores["aum"].numpy()[some], margins, atol=1e-6)


def test_ten_million_rows_of_an_open_set(tmp_path: Path) -> None:
    """From a memory-mapped file, and in batches."""
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float16, shape=(ROWS, 8))
    for number in range(ROWS // BATCH):
        x[number * BATCH : (number + 1) * BATCH] = batch(number, 8)
    target = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half()
    file = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = fc.simcore(file, target, 400, n_clusters=4, stop=False)
    batches = fc.simcore(
        lambda: (np.array(file[begin : begin + 123_457]) for begin in range(0, ROWS, 123_457)),
        target, 400, n_clusters=4, stop=False,
    )  # fmt: skip
    assert torch.equal(found.indices, batches.indices)
    unit = target.double() / target.double().norm(dim=1, keepdim=True)
    best = torch.full((4,), -1.0, dtype=torch.float64)
    first = torch.zeros(4, dtype=torch.int64)
    for begin in range(0, ROWS, BATCH):
        rows = torch.from_numpy(np.array(file[begin : begin + BATCH])).double()
        most, where = (unit @ (rows / rows.norm(dim=1, keepdim=True)).T).max(1)
        first = torch.where(most > best, where + begin, first)
        best = torch.maximum(best, most)
    assert found.indices[:4].tolist() == first.tolist()


def test_ten_million_rows_of_a_sketch() -> None:
    matrix = fc.projection_matrix(8, 4, dtype=torch.float64)
    worst = torch.zeros((), dtype=torch.float64)
    for number in range(ROWS // BATCH):
        x: Tensor = torch.from_numpy(batch(number, 8))
        found = fc.sketch(x, 4)
        worst = torch.maximum(worst, (found.double() - x.double() @ matrix).abs().max())
    assert worst < 1e-5
