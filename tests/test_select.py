"""select calls a method by its name."""

from __future__ import annotations

import pytest
import torch

import flashcoreset as fc


def test_simcore_by_name() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    by_name = fc.select("simcore", openset=x, target=x[:5], k=7, stop=False)
    direct = fc.simcore(x, x[:5], 7, stop=False)
    assert by_name.indices.tolist() == direct.indices.tolist()
    assert by_name.info["values"] == direct.info["values"]


def test_controls_by_name() -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    for name, direct in (
        ("random_subset", {"n": 30, "k": 5, "seed": 3}),
        ("top_scores", {"scores": x[:, 0], "k": 5}),
        ("k_center", {"x": x, "k": 5, "metric": "l1"}),
        ("nearest", {"openset": x, "target": x[:2], "k": 5}),
    ):
        by_name = fc.select(name, **direct)
        assert by_name.indices.tolist() == getattr(fc, name)(**direct).indices.tolist()


def test_bad_calls() -> None:
    with pytest.raises(
        ValueError,
        match="unknown method 'simcor'; valid names: colm, simcore, ccs, goracs, autocoreset, random_subset",
    ):
        fc.select("simcor")
    with pytest.raises(TypeError, match="name must be a str, got int"):
        fc.select(3)
    with pytest.raises(TypeError, match="n_cluster"):
        fc.select("simcore", openset=torch.eye(3), target=torch.eye(3), n_cluster=2)
