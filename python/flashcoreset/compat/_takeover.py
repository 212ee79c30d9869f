"""Functions and classes of a peer whose calls go to ours first, and to the peer's own code if ours raise NotImplementedError.

A function is replaced by a wrapper in every module, or table, that has it. A class stays the object that it is, so that isinstance,
subclasses, `super(Name, self)` and names that were imported before go on working: its methods are replaced in place. An
object is either held (an object of our class does the work, and the peer's own constructor has not run) or the peer's own, in every detail.
What ours do not have turns a held object into the peer's own, unless earlier calls of the object were taken over and the peer's code
would need their results.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

from flashcoreset.compat._calls import CALLS
from flashcoreset.compat._peers import Entry

_HELD = "_flashcoreset_held"

# Methods that concern the shell of a held object.
_OF_THE_SHELL = {
    *("__new__", "__init__", "__init_subclass__", "__class_getitem__"),
    *("__getattribute__", "__getattr__", "__setattr__"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
}

_ABSENT = object()


class FunctionTakeover:
    """A function of a peer, and the wrapper that calls ours, and the peer's for what ours does not take."""

    def __init__(self, entry: Entry, theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
        self.theirs = theirs
        self.is_installed = False

        @functools.wraps(theirs)
        def wrapper(*args: Any, **keywords: Any) -> Any:
            # Where a program has kept the wrapper, it outlives `unpatch`.
            if CALLS.in_ours() or not self.is_installed:
                return theirs(*args, **keywords)
            return CALLS.run(entry.label, ours, theirs, args, keywords)

        self.wrapper = wrapper

    def install(self) -> None:
        self.is_installed = True

    def restore(self) -> None:
        self.is_installed = False


class TableTakeover:
    """A peer's table of functions by types of layers: under the types that ours take there are wrappers of both."""

    def __init__(self, entry: Entry, theirs: dict[Any, Any], ours: Callable[..., Any]) -> None:
        self._table = theirs
        kinds = sys.modules[ours.__module__].LAYERS
        self._own = {kind: theirs[kind] for kind in kinds if kind in theirs}
        self._functions = {
            kind: FunctionTakeover(replace(entry, theirs=f"{entry.theirs}.{kind.__name__}"), own, ours)
            for kind, own in self._own.items()
        }

    def install(self) -> None:
        for kind, function in self._functions.items():
            function.install()
            self._table[kind] = function.wrapper

    def restore(self) -> None:
        for kind, function in self._functions.items():
            function.restore()
            self._table[kind] = self._own[kind]


@dataclass
class _Held:
    """What does the work of an object, and what is needed to make the peer's own of it."""

    takeover: ClassTakeover
    ours: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    changed: dict[str, Any] = field(default_factory=dict)  # attributes set from outside
    has_state: bool = False  # whether a call was taken over on whose effect others depend

    def copied(self) -> _Held:
        return _Held(
            self.takeover, copy.copy(self.ours), self.args, self.keywords, dict(self.changed), self.has_state
        )

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.ours, self.args, self.keywords, self.changed, self.has_state)
        return _revive, (self.takeover.entry.theirs, *values)


class ClassTakeover:
    """A class of a peer whose methods are replaced in place between `install` and `restore`."""

    active: dict[str, ClassTakeover] = {}  # noqa: RUF012 - all that are installed, by the peer's name of the class

    def __init__(self, entry: Entry, theirs: type, ours: type) -> None:
        self.entry = entry
        self.theirs = theirs
        self.ours = ours
        self._init: Callable[..., None] = getattr(theirs, "__init__")  # noqa: B009 - mypy
        self._live: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._methods = _functions_of(theirs)
        self._wrappers: dict[str, Any] = {
            name: self._method(name, function) for name, function in self._methods.items()
        }
        self._wrappers |= self._shell()
        self._before: dict[str, Any] = {}

    def install(self) -> None:
        for name, wrapper in self._wrappers.items():
            self._before[name] = self.theirs.__dict__.get(name, _ABSENT)
            setattr(self.theirs, name, wrapper)
        self.active[self.entry.theirs] = self

    def restore(self) -> None:
        del self.active[self.entry.theirs]
        for name, before in self._before.items():
            if before is _ABSENT:
                delattr(self.theirs, name)
            else:
                setattr(self.theirs, name, before)
        # Held objects keep the methods that they need, in a class of their own.
        for held in list(self._live.values()):
            if _HELD in held.__dict__:
                kind: Any = type(held)
                names = {**self._wrappers, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
                object.__setattr__(held, "__class__", type(kind)(kind.__name__, (kind,), names))

    def overridden(self, kind: type) -> str | None:
        """A method of the peer's class that a subclass defines anew; the peer's own code may call it."""
        for base in kind.__mro__[: kind.__mro__.index(self.theirs)]:
            for name in base.__dict__:
                if name in self._methods:
                    return f"{kind.__name__} overrides {name}"
        return None

    def _method(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        label = f"{self.entry.label}.{name}"
        ours = getattr(self.ours, name, None)
        is_shared = ours is original  # both inherit it
        is_private = name.startswith("_") and not name.endswith("__")
        is_ours = not is_shared and not is_private and ours is not None
        leaves_state = name in self.entry.state

        @functools.wraps(original)
        def method(self_: Any, *args: Any, **keywords: Any) -> Any:
            held: _Held | None = self_.__dict__.get(_HELD)
            if held is None:
                top = CALLS.top()
                if is_private or is_shared or (top is not None and (top.taken or top.owner is self_)):
                    return original(self_, *args, **keywords)
                return CALLS.run(
                    label, None, original, (self_, *args), keywords, self_, "an object left before"
                )
            if is_shared:
                result = original(held.ours, *args, **keywords)
            elif not is_ours:
                self._make_own(self_, held, name)
                return original(self_, *args, **keywords)
            elif CALLS.in_ours():
                result = getattr(held.ours, name)(*args, **keywords)
            else:

                def as_peer(*args: Any, **keywords: Any) -> Any:
                    self._make_own(self_, held, name)
                    return original(self_, *args, **keywords)

                result = CALLS.run(label, getattr(held.ours, name), as_peer, args, keywords, self_)
                held.has_state |= leaves_state
            return self_ if result is held.ours else result

        return method

    def _shell(self) -> dict[str, Any]:
        entry = self.entry
        theirs: Any = self.theirs
        get = getattr(theirs, "__getattr__", None)
        set_ = theirs.__setattr__
        state: Any = _defined(theirs, "__getstate__")

        @functools.wraps(self._init)
        def __init__(self_: Any, *args: Any, **keywords: Any) -> None:
            top = CALLS.top()
            if _HELD in self_.__dict__ or (top is not None and (top.taken or top.owner is self_)):
                self._init(self_, *args, **keywords)
                return

            def hold(*args: Any, **keywords: Any) -> None:
                ours = self.ours(*args, **keywords)
                self_.__dict__[_HELD] = _Held(self, ours, args, keywords)
                self._live[id(self_)] = self_

            reason = self.overridden(type(self_))
            as_peer = functools.partial(self._init, self_)
            CALLS.run(entry.label, None if reason else hold, as_peer, args, keywords, self_, reason or "")

        def __getattr__(self_: Any, name: str) -> Any:
            held: _Held | None = self_.__dict__.get(_HELD)
            if held is None:
                if get is not None:
                    return get(self_, name)
                raise AttributeError(f"{type(self_).__name__!r} object has no attribute {name!r}")
            try:
                return getattr(held.ours, name)
            except AttributeError:
                if name.startswith("__") or held.has_state:
                    raise
            # The peer's object may have it.
            make = functools.partial(self._make_own, self_, held)
            CALLS.run(f"{entry.label}.{name}", None, make, (name,), {}, self_, "an attribute of the peer's")
            return getattr(self_, name)

        def __setattr__(self_: Any, name: str, value: Any) -> None:
            held: _Held | None = self_.__dict__.get(_HELD)
            if held is None or name in self_.__dict__ or name == "__class__":
                set_(self_, name, value)
            else:
                setattr(held.ours, name, value)
                held.changed[name] = value

        def __getstate__(self_: Any) -> Any:
            held: _Held | None = self_.__dict__.get(_HELD)
            if held is not None:
                return {**self_.__dict__, _HELD: held.copied()}
            return self_.__dict__ if state is None else state(self_)

        functions = (__init__, __getattr__, __setattr__, __getstate__)
        return {function.__name__: function for function in functions}

    def _make_own(self, object_: Any, held: _Held, name: str) -> None:
        """Turns a held object into the peer's own."""
        if held.has_state and name not in self.entry.fresh:
            raise NotImplementedError(
                f"{self.entry.label}: {name} is left to the peer, but earlier calls of this object were taken over, and the peer's "
                f"object does not have their results; run the program without {self.entry.label.partition('.')[0]} being patched"
            )
        del object_.__dict__[_HELD]
        self._init(object_, *held.args, **held.keywords)
        for attribute, value in held.changed.items():
            setattr(object_, attribute, value)


def _functions_of(kind: type) -> dict[str, Callable[..., Any]]:
    """The methods of a class, inherited ones too."""
    found: dict[str, Callable[..., Any]] = {}
    for base in kind.__mro__:
        for name, value in base.__dict__.items() if base is not object else ():
            if isinstance(value, FunctionType) and name not in _OF_THE_SHELL:
                found.setdefault(name, value)
    return found


def _defined(kind: type, name: str) -> Any:
    """A method that the class or one of its bases defines, other than object."""
    return next((base.__dict__[name] for base in kind.__mro__[:-1] if name in base.__dict__), None)


def _revive(
    theirs: str,
    ours: Any,
    args: tuple[Any, ...],
    keywords: Mapping[str, Any],
    changed: Mapping[str, Any],
    has_state: bool,
) -> _Held:
    takeover = ClassTakeover.active.get(theirs)
    if takeover is None:
        raise RuntimeError(
            f"this {theirs.partition(':')[2]} was pickled in a program with flashcoreset.compat.patch"
            f"({theirs.partition('.')[0].partition(':')[0]!r}); call that here first"
        )
    return _Held(takeover, ours, args, dict(keywords), dict(changed), has_state)
