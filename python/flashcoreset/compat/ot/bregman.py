"""POT's `ot.bregman`: entropic transport with marginals that hold."""

from __future__ import annotations

from typing import Any

from flashcoreset.compat.ot._empirical import (
    empirical_sinkhorn,
    empirical_sinkhorn2,
    empirical_sinkhorn2_geomloss,
    empirical_sinkhorn_divergence,
)
from flashcoreset.compat.ot._refused import refused
from flashcoreset.compat.ot._sinkhorn import (
    greenkhorn,
    sinkhorn,
    sinkhorn2,
    sinkhorn_epsilon_scaling,
    sinkhorn_knopp,
    sinkhorn_log,
    sinkhorn_stabilized,
)

__all__ = [
    "empirical_sinkhorn",
    "empirical_sinkhorn2",
    "empirical_sinkhorn2_geomloss",
    "empirical_sinkhorn_divergence",
    "greenkhorn",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_epsilon_scaling",
    "sinkhorn_knopp",
    "sinkhorn_log",
    "sinkhorn_stabilized",
]


def __getattr__(name: str) -> Any:
    return refused(__name__, name)
