"""The peers: which of their classes and functions are taken over, by what of ours, and the versions that this is tested with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Entry:
    """A class or function of a peer, and ours, both as "module:attribute"; or a dict of the peer's from types of layers to functions, and ours
    for the types in LAYERS of its module."""

    theirs: str
    ours: str
    state: frozenset[str] = frozenset()  # methods on whose effect other methods depend
    fresh: frozenset[str] = frozenset()  # methods that depend on no earlier call

    @property
    def label(self) -> str:
        return self.theirs.replace(":", ".")


@dataclass(frozen=True)
class Peer:
    name: str
    package: str  # that programs import
    distributions: tuple[str, ...]  # that hold it; the first is what pip installs
    tested: tuple[str, str]  # the first and last version that the tests ran with
    entries: tuple[Entry, ...]

    def version(self) -> str | None:
        for name in self.distributions:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    def is_tested(self, version: str | None) -> bool:
        first, last = map(_numbers, self.tested)
        return version is not None and first <= _numbers(version) <= last


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of the release, 0 where there are fewer than four."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    return tuple(numbers + [0] * (4 - len(numbers)))


def _same(theirs: str, ours: str, names: str, state: str = "", fresh: str = "") -> tuple[Entry, ...]:
    """Entries for names that the modules `theirs` and `ours` have both."""
    sets = {"state": frozenset(state.split()), "fresh": frozenset(fresh.split())}
    return tuple(Entry(f"{theirs}:{name}", f"{ours}:{name}", **sets) for name in names.split())


_OURS = "flashcoreset.compat"

_ALL = (
    Peer(
        name="submodlib",
        package="submodlib",
        distributions=("submodlib-py", "submodlib"),
        tested=("0.0.3", "0.0.3"),
        entries=_same(
            "submodlib",
            f"{_OURS}.submodlib",
            "FacilityLocationFunction FacilityLocationMutualInformationFunction FacilityLocationVariantMutualInformationFunction "
            "FacilityLocationConditionalGainFunction FacilityLocationConditionalMutualInformationFunction",
            state="setMemoization updateMemoization clearMemoization maximize",
            fresh="maximize evaluate marginalGain getEffectiveGroundSet",
        )
        + _same("submodlib.helper", f"{_OURS}.submodlib.helper", "create_kernel"),
    ),
    Peer(
        name="apricot",
        package="apricot",
        distributions=("apricot-select",),
        tested=("0.6.1", "0.6.1"),
        entries=_same(
            "apricot",
            f"{_OURS}.apricot",
            "FacilityLocationSelection",
            state="fit partial_fit fit_transform",
            fresh="fit fit_transform _initialize",  # a mixture's parts are initialised by the mixture
        ),
    ),
    Peer(
        name="trak",
        package="trak",
        distributions=("traker",),
        tested=("0.3.2", "0.3.2"),
        # Projections by two matrices must not be compared, so an object that has projected does not change sides.
        entries=_same(
            "trak.projectors",
            f"{_OURS}.trak.projectors",
            "BasicSingleBlockProjector BasicProjector CudaProjector ChunkedCudaProjector",
            state="project",
            fresh="free_memory",
        ),
    ),
    Peer(
        name="dattri",
        package="dattri",
        distributions=("dattri",),
        tested=("0.3.0", "0.3.0"),
        entries=_same(
            "dattri.func.projection",
            f"{_OURS}.dattri.func.projection",
            "random_project make_random_projector",
        )
        + _same(
            "dattri.func.projection",
            f"{_OURS}.dattri.func.projection",
            "BasicProjector CudaProjector ChunkedCudaProjector",
            state="project dict_project",
            fresh="free_memory",
        ),
    ),
    Peer(
        name="sjlt",
        package="sjlt",
        distributions=("sjlt",),
        tested=("0.0.1", "0.1"),
        entries=_same("sjlt", f"{_OURS}.sjlt", "SJLTProjection", state="forward transpose __call__"),
    ),
    Peer(
        name="ot",
        package="ot",
        distributions=("POT",),
        tested=("0.9.7", "0.9.7"),
        entries=_same(
            "ot.bregman",
            f"{_OURS}.ot.bregman",
            "sinkhorn sinkhorn2 sinkhorn_knopp sinkhorn_log sinkhorn_stabilized sinkhorn_epsilon_scaling greenkhorn "
            "empirical_sinkhorn empirical_sinkhorn2 empirical_sinkhorn_divergence empirical_sinkhorn2_geomloss",
        )
        + _same(
            "ot.unbalanced",
            f"{_OURS}.ot.unbalanced",
            "sinkhorn_unbalanced sinkhorn_unbalanced2 sinkhorn_knopp_unbalanced sinkhorn_stabilized_unbalanced "
            "sinkhorn_unbalanced_translation_invariant",
        )
        + _same(
            "ot.batch",
            f"{_OURS}.ot.batch",
            "solve_batch solve_sample_batch bregman_projection_batch bregman_log_projection_batch",
        )
        + _same("ot", f"{_OURS}.ot", "solve solve_sample"),
    ),
    Peer(
        name="geomloss",
        package="geomloss",
        distributions=("geomloss",),
        tested=("0.3.1", "0.3.1"),
        entries=_same("geomloss", f"{_OURS}.geomloss", "SamplesLoss")
        + _same("geomloss.ot", f"{_OURS}.geomloss.ot", "solve solve_batch solve_sample solve_sample_batch"),
    ),
    Peer(
        name="opacus",
        package="opacus",
        distributions=("opacus",),
        tested=("1.6.0", "1.6.0"),
        entries=(
            # A table that GradSampleModuleFastGradientClipping has too.
            Entry("opacus.grad_sample:GradSampleModule.GRAD_SAMPLERS", f"{_OURS}.opacus:grad_sample"),
            Entry(
                "opacus.grad_sample:GradSampleModuleFastGradientClipping.NORM_SAMPLERS",
                f"{_OURS}.opacus:norm_sample",
            ),
        ),
    ),
)

PEERS = {peer.name: peer for peer in _ALL}
