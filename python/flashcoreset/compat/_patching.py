"""`patch` and `unpatch`: the classes and functions of installed peers, taken over and given back."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from flashcoreset._core.errors import warn_caller
from flashcoreset.compat._calls import CALLS, table
from flashcoreset.compat._peers import PEERS, Entry, Peer
from flashcoreset.compat._takeover import ClassTakeover, FunctionTakeover, TableTakeover

# Held for changes of what is patched; never while something is imported, since other threads may wait for it in an import.
_lock = threading.RLock()
_active: dict[str, _Patched] = {}
_waiting: dict[str, Peer] = {}  # by package: patched when the package is imported


def patch(*names: str) -> None:
    """Makes programs that use other libraries run on these kernels, without a change.

    The classes and functions of the peers are taken over wherever they are already imported, and from now on; a peer that has not been
    imported yet is patched when it is. What ours do not take goes to the peer's own code. `report` says which calls
    went where. A second call changes nothing.

    Args:
        names: of peers: "submodlib", "apricot", "trak", "dattri", "sjlt", "ot", "geomloss", "opacus". None: all that are installed.

    Raises:
        TypeError: for a name that is not a string.
        ValueError: for a name that no peer has.
        ImportError: for a peer that is not installed; nothing is patched then.

    Example:
        >>> from flashcoreset import compat
        >>> compat.patch("submodlib")
        >>> import submodlib
        >>> compat.unpatch()
    """
    peers = _peers(names)
    missing = [peer for peer in peers if not _is_installed(peer)]
    if names and missing:
        told = "; ".join(f"{peer.name} is not: pip install {peer.distributions[0]}" for peer in missing)
        raise ImportError(f"patch needs the peers themselves to be installed, and {told}")
    if len(missing) == len(peers):
        raise ImportError(f"patch found none of the peers installed: {', '.join(PEERS)}")
    for peer in peers:
        if peer in missing:
            continue
        if peer.package in sys.modules:
            _take_over(peer)
        else:
            with _lock:
                _waiting[peer.package] = peer
                if _finder not in sys.meta_path:
                    sys.meta_path.insert(0, _finder)


def unpatch(*names: str) -> None:
    """Gives back what `patch` took over: every attribute is the peer's own again.

    Objects that were made in between go on working.

    Args:
        names: of peers; None: all that are patched.

    Raises:
        TypeError: for a name that is not a string.
        ValueError: for a name that no peer has.

    Example:
        >>> from flashcoreset import compat
        >>> compat.unpatch()
    """
    with _lock:
        for peer in _peers(names):
            _waiting.pop(peer.package, None)
            patched = _active.pop(peer.name, None)
            if patched is not None:
                patched.restore()
        if not _waiting and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


def report() -> str:
    """Which calls of patched peers were taken over and which were left to the peer's own code, and the seconds in each (without
    those of counted calls inside), since the peer was patched; and why calls were left.

    Example:
        >>> from flashcoreset import compat
        >>> print(compat.report())
        flashcoreset.compat: no calls of a patched peer
    """
    counts = CALLS.snapshot()
    with _lock:
        patched = [p for p in _active.values() if any(name.startswith(p.prefix) for name in counts)]
        absent = [entry.label for p in _active.values() for entry in p.absent]
    if not counts:
        return "flashcoreset.compat: no calls of a patched peer"
    versions = ", ".join(f"{p.peer.name} {p.peer.version() or ''}".strip() for p in patched)
    lines = [
        "flashcoreset.compat: calls of " + (versions or "peers that are no longer patched"),
        *table(counts),
    ]
    if absent:
        lines.append(f"not in the installed version: {', '.join(absent)}")
    return "\n".join(lines)


def _peers(names: Iterable[object]) -> list[Peer]:
    peers = []
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names must be str, got {name!r} of type {type(name).__name__}")
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; valid names: {', '.join(PEERS)}")
        peers.append(PEERS[name])
    return peers or list(PEERS.values())


def _is_installed(peer: Peer) -> bool:
    return peer.package in sys.modules or importlib.util.find_spec(peer.package) is not None


class _Patched:
    """A peer that is taken over."""

    def __init__(self, peer: Peer, found: Sequence[tuple[Entry, Any, Any]], absent: list[Entry]) -> None:
        self.peer = peer
        self.prefix = f"{peer.package}."
        self.absent = absent
        self._takeovers = [_kind_of(theirs)(entry, theirs, ours) for entry, theirs, ours in found]
        self._functions = [t for t in self._takeovers if isinstance(t, FunctionTakeover)]

    def install(self) -> None:
        CALLS.forget(self.prefix)
        for takeover in self._takeovers:
            takeover.install()
        _exchange({id(f.theirs): (f.theirs, f.wrapper) for f in self._functions})

    def restore(self) -> None:
        _exchange({id(f.wrapper): (f.wrapper, f.theirs) for f in self._functions})
        for takeover in self._takeovers:
            takeover.restore()


def _kind_of(theirs: Any) -> Any:
    if isinstance(theirs, dict):
        return TableTakeover
    return ClassTakeover if isinstance(theirs, type) else FunctionTakeover


def _take_over(peer: Peer) -> None:
    importlib.import_module(peer.package)  # waits for another thread that is importing it
    found, absent = [], []
    for entry in peer.entries:
        theirs = _find(entry.theirs)
        if theirs is None:
            absent.append(entry)
        else:
            name, _, attribute = entry.ours.partition(":")
            is_new = name not in sys.modules
            module = importlib.import_module(name)
            if is_new and isinstance(theirs, dict):
                module.unregister()  # being imported it has put its functions into the tables, uncounted
            found.append((entry, theirs, getattr(module, attribute)))
    with _lock:
        if peer.name in _active:
            return
        patched = _Patched(peer, found, absent)
        patched.install()
        _active[peer.name] = patched
    version = peer.version()
    if not peer.is_tested(version):
        first, last = peer.tested
        warn_caller(
            f"flashcoreset.compat is tested with {peer.name} {first if first == last else f'{first} to {last}'}, and "
            f"{version or 'an unknown version'} is installed; compare results with those without patch",
            UserWarning,
        )


def _find(path: str) -> Any:
    """The peer's object at "module:attribute"; None if the installed version has no such module or attribute."""
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name, None)
        return found
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return None
        raise


def _exchange(pairs: Mapping[int, tuple[Any, Any]]) -> None:
    """Replaces the first object of each pair, whose id is the key, by the second in all modules but our own."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] == "flashcoreset":
            continue
        names = module.__dict__
        for name, value in list(names.items()):
            pair = pairs.get(id(value))
            if pair is not None and pair[0] is value:
                names[name] = pair[1]


class _Finder(importlib.abc.MetaPathFinder):
    """Takes a peer over once it has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        peer = _waiting.pop(module.__name__, None)
        if peer is not None:
            _take_over(peer)


_finder = _Finder()
