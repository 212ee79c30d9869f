"""Philox against its published vectors, and the sampler of stochastic greedy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcoreset._core.philox import philox4x32, uniforms
from flashcoreset.facility_location.sampling import CandidateSampler


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known-answer vectors of the authors' Random123 library
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    assert philox4x32(np.array(counter, dtype=np.uint32), key).tolist() == expected
    both = philox4x32(np.array([counter, [1, 2, 3, 4]], dtype=np.uint32), key)
    assert both[0].tolist() == expected
    assert both.dtype == np.uint32


def test_uniforms_are_uniform_and_distinct_between_rows_and_seeds() -> None:
    u = uniforms(7, 0, 100_000)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)
    assert (uniforms(7, 0, 11) == u[:11]).all()
    for seed, row in ((7, 1), (8, 0), (7 + 2**32, 0), (7, 2**32)):
        assert not np.isin(uniforms(seed, row, 1000), u).any()


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**64 - 1))
def test_samples_are_distinct_candidates_that_are_left(n: int, count: int, seed: int) -> None:
    sampler, left = CandidateSampler(list(range(0, 2 * n, 2)), seed), set(range(0, 2 * n, 2))
    while left:
        sample = sampler.draw(count).tolist()
        assert len(sample) == min(count, len(left))
        assert sample == sorted(set(sample))
        assert set(sample) <= left
        sampler.remove(sample[len(sample) // 2])
        left.remove(sample[len(sample) // 2])


def test_every_candidate_is_equally_likely() -> None:
    counts = np.zeros(10)
    for seed in range(3000):
        counts[CandidateSampler(list(range(10)), seed).draw(3).numpy()] += 1
    assert abs(counts - 900).max() < 5 * np.sqrt(900 * 0.7)
