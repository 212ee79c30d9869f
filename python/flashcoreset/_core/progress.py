"""The `progress` argument: None, True or a callable(done, total)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flashcoreset._core.imports import imported

Report = Callable[[int, int], object]


class Progress:
    """Reports how much of `total` is done: to nobody, to a bar on stderr or to the caller's function.

    `Progress` is used as a context manager, so that a bar is closed when the work is interrupted.
    """

    def __init__(self, progress: Report | bool | None, total: int, label: str) -> None:
        self.total = total
        self._report: Report | None = None
        self._bar: Any = None
        self._told = -1
        if progress is None or progress is False:
            return
        if progress is True:
            try:
                tqdm = imported("tqdm").tqdm
            except ImportError:
                self._report = _Line(label)
            else:
                self._bar = tqdm(total=total, desc=label, leave=False)
        else:
            self._report = progress

    @property
    def active(self) -> bool:
        return self._report is not None or self._bar is not None

    def update(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._report is not None and done != self._told:  # a device that is not further yet has no news
            self._told = done
            self._report(done, self.total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif isinstance(self._report, _Line):
            self._report.close()


class _Line:
    """One line on stderr, rewritten in place, for when tqdm is not installed."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __call__(self, done: int, total: int) -> None:
        sys.stderr.write(f"\r{self._label}: {done}/{total}")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\n")


def check_progress(progress: object) -> None:
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"progress must be None, True or a callable(done, total), got {type(progress).__name__}"
        )
