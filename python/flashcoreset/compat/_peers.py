"""The peers: which of their classes and functions are taken over, by what of ours, and the versions that this is tested with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Entry:
    """A class or function of a peer, and ours; both as "module:attribute"."""

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


_ALL: tuple[Peer, ...] = (
    Peer("submodlib", "submodlib", ("submodlib-py", "submodlib"), ("0.0.3", "0.0.3"), ()),
    Peer("apricot", "apricot", ("apricot-select",), ("0.6.1", "0.6.1"), ()),
    Peer("trak", "trak", ("traker",), ("0.3.2", "0.3.2"), ()),
    Peer("dattri", "dattri", ("dattri",), ("0.3.0", "0.3.0"), ()),
    Peer("sjlt", "sjlt", ("sjlt",), ("0.1", "0.1"), ()),
    Peer("ot", "ot", ("POT",), ("0.9.7", "0.9.7"), ()),
    Peer("geomloss", "geomloss", ("geomloss",), ("0.3.1", "0.3.1"), ()),
    Peer("opacus", "opacus", ("opacus",), ("1.5", "1.5"), ()),
)

PEERS = {peer.name: peer for peer in _ALL}
