"""The published sizes of CCS' cut-off: the share of probably mislabelled samples that is dropped first."""

from __future__ import annotations

# What the commands of the published code drop at a pruning rate, by the area under the margin: 0.2 at 80 % (ImageNet), 0.3 at
# 90 % (ImageNet and CIFAR-10).
_PUBLISHED = {0.8: 0.2, 0.9: 0.3}


def published_ratio(n: int, k: int) -> tuple[float, str]:
    """The share of n samples to drop before k are chosen, and whether that is "published" or "interpolated": on the line
    through what is published, but at least 0, and at most the largest that is published."""
    rate = round(1 - k / n, 2)
    (low, least), (high, most) = sorted(_PUBLISHED.items())
    ratio = least + (most - least) / (high - low) * (rate - low)
    return round(min(most, max(0.0, ratio)), 4), "published" if rate in _PUBLISHED else "interpolated"
