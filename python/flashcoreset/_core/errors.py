"""Exceptions and warnings of the public interface."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class BackendUnavailableError(RuntimeError):
    """The requested backend cannot run here; the message gives the reason and the remedy.

    Example:
        >>> import torch, flashcoreset as fc
        >>> try:
        ...     fc.facility_location(torch.eye(3), 1, backend="cuda")
        ... except fc.BackendUnavailableError as error:
        ...     print("unavailable")
        unavailable
    """


def no_sparse_kernel(backend: str) -> str:
    """Why a backend without kernels for sparse matrices cannot take one, and what to do."""
    return (
        f"there is no {backend} kernel for sparse matrices; pass backend='torch', or backend='cpu' with the matrix on "
        "the CPU"
    )


def remedy_for_objects(name: str, value: object) -> str:
    """Why a column that holds no numbers cannot be taken, and what to do."""
    return (
        f"{name} must hold numbers, got a {type(value).__name__} with strings, missing values or other objects; fill or drop them, and "
        "pass the numbers as .to_numpy(dtype='float32')"
    )


class SlowPathWarning(UserWarning):
    """No compiled kernel could take a call with `backend=None`, so the plain PyTorch reference ran. The warning is given
    once per reason.

    Example:
        >>> import warnings, flashcoreset as fc
        >>> warnings.simplefilter("ignore", fc.SlowPathWarning)
    """


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped at its last iteration before it reached the requested tolerance; its result is
    the last iterate and contains the error.

    Example:
        >>> import warnings, flashcoreset as fc
        >>> warnings.simplefilter("ignore", fc.ConvergenceWarning)
    """


class InputWarning(UserWarning):
    """An input is valid, but looks like something other than what it is taken for; the message names that, and how to pass
    the input as that.

    Example:
        >>> import warnings, flashcoreset as fc
        >>> warnings.simplefilter("ignore", fc.InputWarning)
    """


# Frames of these packages lie between a call of the library and the warning: its own frames, those that call its ops and hooks,
# and the trainer that it extends.
_INSIDE = frozenset({"flashcoreset", "torch", "transformers", "accelerate", "contextlib"})
_reported: set[str] = set()


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns at the line that called the library, in the nearest frame outside of it."""
    frame: FrameType = sys._getframe(1)
    while _package(frame) in _INSIDE and frame.f_back is not None:
        frame = frame.f_back
    names = frame.f_globals
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        names.get("__name__", "<string>"),
        names.setdefault("__warningregistry__", {}),
    )


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def warn_slow_path(reason: str) -> None:
    """Warns that the reference runs because of `reason`, the first time that reason is met."""
    if reason not in _reported:
        _reported.add(reason)
        warn_caller(
            f"falling back to the slow PyTorch reference: {reason} (backend='torch' asks for it silently)",
            SlowPathWarning,
        )
