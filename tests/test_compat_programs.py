"""The tables of `flashcoreset.compat` beside the installed peers, and unchanged programs that use them."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flashcoreset import compat
from flashcoreset.compat import _patching
from flashcoreset.compat._calls import CALLS
from flashcoreset.compat._peers import PEERS, Peer

PROGRAMS = Path(__file__).with_name("programs")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "drop_in.md"

# sjlt has to be compiled by nvcc to be imported.
INSTALLED = [peer for peer in PEERS.values() if peer.name not in ("sjlt",)]


@pytest.fixture
def patched() -> Iterator[Any]:
    yield compat.patch
    compat.unpatch()


@pytest.mark.parametrize("peer", INSTALLED, ids=lambda peer: peer.name)
def test_every_entry_is_there_and_of_one_kind(peer: Peer) -> None:
    pytest.importorskip(peer.package, reason=f"{peer.distributions[0]} is not installed")
    seen: dict[int, str] = {}
    for entry in peer.entries:
        theirs = _patching._find(entry.theirs)
        module, _, name = entry.ours.partition(":")
        ours = getattr(importlib.import_module(module), name)
        assert theirs is not None, entry.theirs
        assert callable(ours), entry.ours
        assert id(theirs) not in seen, (entry.theirs, seen.get(id(theirs)))
        seen[id(theirs)] = entry.theirs
        if not isinstance(theirs, dict):
            assert isinstance(theirs, type) == isinstance(ours, type), entry
        for method in entry.state | entry.fresh:
            assert callable(getattr(theirs, method, None)) or len(peer.entries) > 1, (entry.theirs, method)
    for method in {m for entry in peer.entries for m in entry.state | entry.fresh}:
        found = [_patching._find(entry.theirs) for entry in peer.entries]
        assert any(hasattr(theirs, method) for theirs in found), method


@pytest.mark.parametrize("peer", INSTALLED, ids=lambda peer: peer.name)
def test_the_installed_version_is_a_tested_one(peer: Peer) -> None:
    pytest.importorskip(peer.package, reason=f"{peer.distributions[0]} is not installed")
    assert peer.is_tested(peer.version()), (peer.version(), peer.tested)


def test_the_page_names_the_tested_versions() -> None:
    page = PAGE.read_text()
    for peer in PEERS.values():
        first, last = peer.tested
        versions = first if first == last else f"{first} to {last}"
        assert f"| `{peer.name}` | {peer.distributions[0]} | {versions} |" in page, peer.name


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.timeout(
    1200
)  # two programs that import torch and a peer: minutes where many processes share the cores
@pytest.mark.parametrize(
    ("peer", "program", "taken", "left"),
    [
        (
            "submodlib",
            "with_submodlib.py",
            {
                "submodlib.FacilityLocationFunction": 3,
                "submodlib.FacilityLocationFunction.maximize": 5,
                "submodlib.FacilityLocationMutualInformationFunction.maximize": 1,
                "submodlib.helper.create_kernel": 1,
            },
            {},
        ),
        (
            "ot",
            "with_pot.py",
            {
                "ot.bregman.sinkhorn": 3,
                "ot.bregman.sinkhorn_log": 1,
                "ot.bregman.sinkhorn2": 1,
                "ot.unbalanced.sinkhorn_unbalanced2": 1,
                "ot.bregman.empirical_sinkhorn_divergence": 1,
                "ot.solve": 1,
            },
            {"ot.solve": 1},
        ),
        (
            "trak",
            "with_traker.py",
            {"trak.projectors.BasicProjector": 3, "trak.projectors.BasicProjector.project": 11},
            {},
        ),
    ],
    ids=["submodlib", "ot", "trak"],
)
def test_an_unchanged_program(peer: str, program: str, taken: dict[str, int], left: dict[str, int]) -> None:
    path = str(PROGRAMS / program)
    plain = run(path)
    assert plain.returncode == 0, plain.stderr
    on_ours = run("-m", "flashcoreset.compat", "--only", peer, "--report", path)
    assert on_ours.returncode == 0, on_ours.stderr
    assert on_ours.stdout == plain.stdout
    rows = {}
    for line in on_ours.stderr.splitlines():
        parts = line.split()
        if len(parts) == 5 and parts[0].startswith(f"{PEERS[peer].package}."):
            rows[parts[0]] = (int(parts[1]), int(parts[3]))
    for name, count in taken.items():
        assert rows.get(name, (0, 0)) == (count, left.get(name, 0)), on_ours.stderr
    assert sum(n for _, n in rows.values()) == sum(left.values()), on_ours.stderr


def counts(name: str) -> tuple[int, int]:
    found = CALLS.snapshot()[name]
    return found.taken, found.left


def test_apricot_and_its_mixtures(patched: Any) -> None:
    import apricot

    x = np.abs(np.random.default_rng(0).standard_normal((40, 5)))

    def mixed() -> list[int]:
        parts = [
            apricot.FacilityLocationSelection(5, metric="precomputed"),
            apricot.FeatureBasedSelection(5),
        ]
        mixture = apricot.MixtureSelection(5, parts, metric="ignore", optimizer="naive")
        pairs = x @ x.T
        return mixture.fit(pairs).ranking.tolist()

    plain = apricot.FacilityLocationSelection(7, metric="cosine").fit(x)
    expected = mixed()
    patched("apricot")
    ours = apricot.FacilityLocationSelection(7, metric="cosine")
    assert isinstance(ours, apricot.functions.base.BaseGraphSelection)
    assert ours.fit(x) is ours
    assert ours.ranking.tolist() == plain.ranking.tolist()
    np.testing.assert_allclose(ours.gains, plain.gains, atol=1e-9)
    assert counts("apricot.FacilityLocationSelection.fit") == (1, 0)
    # The mixture computes with its parts' own methods, by apricot's code.
    assert mixed() == expected


def test_graph_cuts_are_left_to_submodlib(patched: Any) -> None:
    import submodlib

    data = np.random.default_rng(1).standard_normal((30, 4)).astype(np.float32)

    def cut() -> list[int]:
        function = submodlib.GraphCutFunction(n=30, mode="dense", lambdaVal=0.4, data=data)
        return [element for element, _ in function.maximize(5, show_progress=False)]

    expected = cut()
    patched("submodlib")
    assert cut() == expected


def test_samples_loss_inside_a_model(patched: Any) -> None:
    import geomloss

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))
            self.loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.loss(x + self.shift, x + 1)

    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    plain = Model()(x)
    patched("geomloss")
    model = copy.deepcopy(Model().to("cpu").eval())
    assert isinstance(model.loss, geomloss.SamplesLoss)
    assert [name for name, _ in model.named_parameters()] == ["shift"]
    found = model(x)
    found.backward()
    assert found.item() == pytest.approx(plain.item(), rel=1e-3)
    assert model.shift.grad is not None
    assert counts("geomloss.SamplesLoss") == (1, 0)


def test_projections_do_not_change_sides(patched: Any) -> None:
    """A projector that has projected by our matrix must not go on with trak's."""
    from trak import projectors

    patched("trak")
    projector = projectors.BasicProjector(100, 16, seed=0, proj_type="normal", device="cpu")
    projector.project(torch.ones(2, 100), model_id=0)
    with pytest.raises(NotImplementedError, match="earlier calls of this object were taken over"):
        projector.get_generator_states()


def test_opacus_tables(patched: Any) -> None:
    pytest.importorskip("opacus", reason="opacus comes with the extra `test`")
    from opacus.grad_sample import GradSampleModule

    table = GradSampleModule.GRAD_SAMPLERS
    own = dict(table)

    def gradients() -> torch.Tensor:
        torch.manual_seed(0)
        model = GradSampleModule(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)))
        model(torch.randn(7, 5, requires_grad=True)).square().sum().backward()
        return torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1)

    expected = gradients()
    patched("opacus")
    torch.testing.assert_close(gradients(), expected)
    assert counts("opacus.grad_sample.GradSampleModule.GRAD_SAMPLERS.Linear") == (2, 0)
    compat.unpatch("opacus")
    assert dict(table) == own
