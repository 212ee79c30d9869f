"""Imports of large packages in the middle of a call."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import ModuleType

_WAIT = 0.05  # seconds
_LONGEST_IMPORT = 60.0  # seconds

_environment_lock = threading.Lock()
_imported: dict[str, ModuleType] = {}
_running: dict[threading.Thread, threading.Event] = {}


def imported(name: str, environment: Mapping[str, str] | None = None) -> ModuleType:
    """The module `name`, imported in a thread of its own if this is the first call for it.

    Ctrl-C reaches the main thread alone: it ends the wait at once, and the import goes on to its end. An interrupted import would
    leave half-made modules, which native modules do not survive.

    Args:
        name: the module's full name.
        environment: variables that are set while it is imported.

    Raises:
        ImportError: or whatever else the import raises.
    """
    module = _imported.get(name)
    if module is not None and sys.modules.get(name) is module:
        return module
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            with _with_environment(environment) if environment else nullcontext():
                _imported[name] = importlib.import_module(name)
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()
            del _running[thread]

    thread = threading.Thread(target=run, name=f"import {name}")
    _running[thread] = done
    thread.start()
    # In short waits, since a signal just before a wait begins is handled only after it. And without join(), which, when interrupted,
    # takes the thread for ended.
    while not done.wait(_WAIT):
        pass
    if errors:
        raise errors[0]
    return _imported[name]


def finish_before_forks() -> None:
    """Makes forks wait, from now on, for imports that an interrupted call has left running: the child would inherit the lock of the
    module, and not the thread that releases it."""

    def finish() -> None:
        for thread, done in list(_running.items()):
            if thread is not threading.current_thread():
                done.wait(_LONGEST_IMPORT)

    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(before=finish)


@contextmanager
def _with_environment(variables: Mapping[str, str]) -> Iterator[None]:
    # One import at a time, since a call after an interrupted call may come while that call's import still goes on.
    with _environment_lock:
        before = {key: os.environ.get(key) for key in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


def pot() -> ModuleType:
    """POT without array libraries that nobody has imported: POT would import all that are installed, and JAX takes seconds."""
    others = {"JAX": "jax", "TENSORFLOW": "tensorflow", "CUPY": "cupy"}
    off = {f"POT_BACKEND_DISABLE_{key}": "1" for key, name in others.items() if name not in sys.modules}
    return imported("ot", off)
