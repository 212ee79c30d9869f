"""The same picks as submodlib's LazyGreedy and apricot's, whose gains are float sums: if two of theirs tie within rounding,
either."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_blobs

import flashcoreset as fc

with warnings.catch_warnings():
    # Both are imported from sources that current Python and NumPy warn about.
    warnings.simplefilter("ignore")
    from apricot import FacilityLocationSelection
    from submodlib.functions.facilityLocation import FacilityLocationFunction


def digits() -> torch.Tensor:
    return torch.from_numpy(load_digits().data[:600])


def clustered() -> torch.Tensor:
    return torch.from_numpy(make_blobs(500, 16, centers=12, random_state=0)[0])


def similarity(name: str) -> np.ndarray:
    """[n, n] in [0, 1], float32 values."""
    x = digits() if name == "digits" else clustered()
    if name == "digits":
        return fc.kernels.torch.pairwise(x, metric="cosine").clamp(0, 1).float().numpy()
    distance = fc.kernels.torch.pairwise(x, metric="euclidean")
    return (1 / (1 + distance)).float().numpy()


def submodlib_greedy(s: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    n = len(s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside submodlib
        function = FacilityLocationFunction(n=n, mode="dense", sijs=s.T.copy(), separate_rep=False)
    picks = function.maximize(
        budget=k, optimizer="LazyGreedy", stopIfZeroGain=False, stopIfNegativeGain=False
    )
    return [int(j) for j, _ in picks], [float(gain) for _, gain in picks]


def apricot_greedy(s: np.ndarray, k: int) -> tuple[list[int], list[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside apricot and numba
        model = FacilityLocationSelection(k, metric="precomputed", optimizer="lazy")
        model.fit(s.astype(np.float64))
    return [int(j) for j in model.ranking], [float(gain) for gain in model.gains]


@pytest.mark.parametrize("name", ["digits", "clustered"])
@pytest.mark.parametrize("peer", [submodlib_greedy, apricot_greedy])
def test_same_sequence(name: str, peer: object, backend: str) -> None:
    k, s = 60, similarity(name)
    theirs, their_gains = peer(s, k)  # type: ignore[operator]
    selection = fc.facility_location(torch.from_numpy(s), k, metric="precomputed", backend=backend)
    ours = selection.indices.tolist()

    # Follow the peer's picks; at the first difference ours must have tied with theirs within rounding.
    wide, best = s.astype(np.float64), np.zeros(len(s))
    for step in range(k):
        gain = np.maximum(wide[[ours[step], theirs[step]]] - best, 0).sum(1)
        if ours[step] != theirs[step]:
            assert abs(gain[0] - gain[1]) <= 1e-6 * gain[1], (
                f"pick {step}: {ours[step]} against {theirs[step]}"
            )
            break
        assert their_gains[step] == pytest.approx(float(selection.gains[step]), rel=1e-4)
        best = np.maximum(best, wide[ours[step]])
    else:
        step = k
    assert step >= 20, "a tie so early would leave the comparison empty"
