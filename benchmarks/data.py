"""Seeded inputs. Clustered points are the usual case of a coreset; unclustered ones are the lazy queue's worst."""

from __future__ import annotations

import numpy as np


def clustered(
    n: int, d: int, *, clusters: int = 100, noise: float = 1.0, seed: int = 0, centre_seed: int = 0
) -> np.ndarray:
    """Points around unit centres, [n, d] float32, with a deviation of length ``noise`` on average.

    ``clusters`` is meant for 50 to 200. ``centre_seed`` fixes the centres apart from the points, so that candidates and
    clients can come from the same clusters.
    """
    centres = np.random.default_rng(centre_seed).standard_normal((clusters, d), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rng = np.random.default_rng([seed, 1])
    labels = rng.integers(0, clusters, n)
    points = rng.standard_normal((n, d), dtype=np.float32)
    points *= noise / np.sqrt(d)
    points += centres[labels]
    return points


def unclustered(n: int, d: int, *, seed: int = 0) -> np.ndarray:
    """Standard normal points, [n, d] float32: no structure that a bound could use."""
    return np.random.default_rng([seed, 2]).standard_normal((n, d), dtype=np.float32)


def nonnegative_cosine(x: np.ndarray) -> np.ndarray:
    """Cosine similarities cut off at 0, [n, n] float32: apricot refuses negative entries."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.ascontiguousarray(np.maximum(unit @ unit.T, np.float32(0)))
