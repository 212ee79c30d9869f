"""The `progress` argument: None, True or a callable(done, total)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from flashcoreset._core.imports import imported

Report = Callable[[int, int], object]


class Progress:
    """Reports how much of `total` is done: to nobody, to a bar with rate and remaining time (on stderr, in notebooks a widget), or to
    the caller's function. A total of 0 is one that is not known.

    `Progress` is used as a context manager, so that a bar is closed when the work is interrupted.
    """

    def __init__(self, progress: Report | bool | None, total: int, label: str) -> None:
        self.total = total
        self._report: Report | None = None
        self._bar: Any = None
        self._told = -1
        self._skipped = 0
        if progress is None or progress is False:
            return
        if progress is True:
            try:
                # A notebook has its own bar, which tqdm.auto finds.
                tqdm = imported("tqdm.auto" if "IPython" in sys.modules else "tqdm").tqdm
            except ImportError:
                self._report = _Line(label)
            else:
                self._bar = tqdm(total=total or None, desc=label, leave=False)
        else:
            self._report = progress

    @property
    def active(self) -> bool:
        return self._report is not None or self._bar is not None

    def update(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._skipped - self._bar.n)
        elif self._report is not None and done != self._told:  # a device that is not further yet has no news
            self._told = done
            self._report(done, self.total)

    def skip(self, to: int) -> None:
        """Goes on at `to`, because the work in between turned out not to be needed: a bar's total becomes that much less, a function is
        told `to`."""
        if self._bar is None:
            self.update(to)
            return
        left_out = to - self._skipped - self._bar.n
        self._skipped += left_out
        if self._bar.total is not None:
            self._bar.total -= left_out
        self._bar.refresh()

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
        self._start = time.monotonic()
        self._shown = -1.0
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        # As often as eyes can follow, and at the end.
        if now - self._shown < 0.1 and done != total:
            return
        self._shown = now
        text = f"{self._label}: {progress_text(done, total, now - self._start)}"
        sys.stderr.write(f"\r{text:<{self._width}}")
        sys.stderr.flush()
        self._width = len(text)

    def close(self) -> None:
        sys.stderr.write("\n")


def progress_text(done: int, total: int, seconds: float) -> str:
    """ "50/200 [00:10<00:30, 5.00/s]": what is done in how much time, how long the rest will take at that rate, and the rate."""
    rate = done / seconds if seconds > 0 else 0.0
    shown = f"{rate:.2f}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.2f} s each"
    if not total:
        return f"{done} [{_clock(seconds)}, {shown}]"
    left = _clock((total - done) / rate) if rate else "?"
    return f"{done}/{total} [{_clock(seconds)}<{left}, {shown}]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def check_progress(progress: object) -> None:
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"progress must be None, True or a callable(done, total), got {type(progress).__name__}"
        )
