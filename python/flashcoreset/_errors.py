"""Exceptions and warnings of the public interface."""

from __future__ import annotations

import warnings


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message gives the reason and the remedy.

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


class SlowPathWarning(UserWarning):
    """No compiled kernel could take a call with `backend=None`, so the plain PyTorch reference did. Given
    once per reason.

    Example:
        >>> import warnings, flashcoreset as fc
        >>> warnings.simplefilter("ignore", fc.SlowPathWarning)
    """


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped at its last iteration before it came to the tolerance asked for; what it returns is
    the last iterate, and says how far it is off.

    Example:
        >>> import warnings, flashcoreset as fc
        >>> warnings.simplefilter("ignore", fc.ConvergenceWarning)
    """


_reported: set[str] = set()


def warn_slow_path(reason: str, stacklevel: int = 2) -> None:
    """Warns that the reference runs because of `reason`, the first time that reason is met."""
    if reason not in _reported:
        _reported.add(reason)
        warnings.warn(
            f"falling back to the slow PyTorch reference: {reason} (backend='torch' asks for it silently)",
            SlowPathWarning,
            stacklevel=stacklevel + 1,
        )
