"""How many calls of a peer were taken over and how many were left to the peer, and the seconds in each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MOST_REASONS = 8  # that are told apart per name
_LONGEST_REASON = 160  # characters


@dataclass
class Count:
    """The calls of one name."""

    taken: int = 0
    left: int = 0
    seconds_taken: float = 0.0
    seconds_left: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)  # why calls were left

    def add(self, taken: bool, seconds: float, reason: str) -> None:
        if taken:
            self.taken += 1
            self.seconds_taken += seconds
            return
        self.left += 1
        self.seconds_left += seconds
        reason = (reason.splitlines() or ["no reason given"])[0][:_LONGEST_REASON]
        if reason not in self.reasons and len(self.reasons) == _MOST_REASONS:
            reason = "other reasons"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


@dataclass
class _Frame:
    owner: object
    taken: bool = True
    inner: float = 0.0  # seconds of counted calls inside this one


class Calls:
    """Runs calls and counts them by name, from any number of threads."""

    def __init__(self) -> None:
        self.counts: dict[str, Count] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def top(self) -> _Frame | None:
        """The innermost counted call that this thread is in."""
        frames = getattr(self._local, "frames", None)
        return frames[-1] if frames else None

    def in_ours(self) -> bool:
        """Whether this thread is in a call that was taken over: what that calls is the peer's own, or kernels that call the peer
        would call themselves."""
        top = self.top()
        return top is not None and top.taken

    def run(
        self,
        name: str,
        ours: Callable[..., Any] | None,
        theirs: Callable[..., Any],
        args: tuple[Any, ...],
        keywords: Mapping[str, Any],
        owner: object = None,
        reason: str = "",
    ) -> Any:
        """ours(*args, **keywords); or, if `ours` is None (for `reason`) or raises NotImplementedError, the same of `theirs`."""
        frames = self._local.__dict__.setdefault("frames", [])
        frame = _Frame(owner)
        frames.append(frame)
        start = time.perf_counter()
        try:
            if ours is not None:
                try:
                    return ours(*args, **keywords)
                except NotImplementedError as error:
                    reason = str(error)
            frame.taken = False
            return theirs(*args, **keywords)
        finally:
            frames.pop()
            seconds = time.perf_counter() - start
            if frames:
                frames[-1].inner += seconds
            with self._lock:
                self.counts.setdefault(name, Count()).add(frame.taken, seconds - frame.inner, reason)

    def forget(self, prefix: str) -> None:
        """Drops the counts of the names that begin with `prefix`."""
        with self._lock:
            for name in [name for name in self.counts if name.startswith(prefix)]:
                del self.counts[name]

    def snapshot(self) -> dict[str, Count]:
        with self._lock:
            return {
                name: Count(c.taken, c.left, c.seconds_taken, c.seconds_left, dict(c.reasons))
                for name, c in self.counts.items()
            }


CALLS = Calls()


def table(counts: Mapping[str, Count]) -> list[str]:
    """Lines of a table: a row per name, then why calls were left."""
    width = max([len(name) for name in counts], default=0)
    lines = [f"{'':{width}}    taken over            left to the peer"]
    lines += [f"{'':{width}}  {'calls':>8} {'seconds':>10}   {'calls':>8} {'seconds':>10}"]
    for name, c in sorted(counts.items()):
        lines.append(
            f"{name:{width}}  {c.taken:>8} {c.seconds_taken:>10.3f}   {c.left:>8} {c.seconds_left:>10.3f}"
        )
    for name, c in sorted(counts.items()):
        lines += [f"left: {name}, {n} x: {reason}" for reason, n in c.reasons.items()]
    return lines
