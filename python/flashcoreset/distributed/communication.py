"""The collectives of a process group: counted, agreed upon, and with errors that name the rank that failed.

A rank that ends or hangs shows at the others as a broken connection or a timeout, which name no rank. So during a call each rank
writes a sign of life into the process group's store twice a second, with the number of collectives that it has begun. When a
collective fails, these say who is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_BEAT = 0.5  # seconds between signs of life
_SILENCE = 3.0  # seconds after which a rank without one counts as ended
_T = TypeVar("_T")
_calls: Counter[str] = Counter()  # of each group, in this process; all ranks make the same ones


class RankError(RuntimeError):
    """A rank of the process group ended, hangs or failed, so that the call cannot go on at the others.

    Attributes:
        rank: its global rank, or None if it is not known.

    Example:
        >>> import flashcoreset as fc
        >>> issubclass(fc.distributed.RankError, RuntimeError)
        True
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class _Pulse(threading.Thread):
    """Writes this rank's signs of life: "CALL BEAT BEGUN STATE"."""

    def __init__(self, store: Any, prefix: str, rank: int, ranks: Sequence[int]) -> None:
        _calls[prefix] += 1
        self._call = _calls[prefix]
        super().__init__(daemon=True, name="flashcoreset-pulse")
        self._store, self._prefix, self._rank, self._ranks = store, prefix, rank, ranks
        self._beat, self._ended = 0, threading.Event()
        self.begun, self.state = 0, "runs"
        self._write()

    def _write(self) -> None:
        self._beat += 1
        self._store.set(f"{self._prefix}{self._rank}", f"{self._call} {self._beat} {self.begun} {self.state}")

    def run(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                self._write()
            except RuntimeError:  # the store has ended; the collectives will tell
                return

    def end(self, state: str) -> None:
        self.state = state
        self._ended.set()
        self.join()
        with contextlib.suppress(RuntimeError):
            self._write()

    def _read(self) -> dict[int, tuple[int, int, str] | None]:
        found: dict[int, tuple[int, int, str] | None] = {}
        for rank in self._ranks:
            key = f"{self._prefix}{rank}"
            found[rank] = None
            if self._store.check([key]):
                call, beat, begun, state = self._store.get(key).decode().split(" ", 3)
                if int(call) > self._call:
                    found[rank] = int(beat), int(begun), "done"
                elif int(call) == self._call:
                    found[rank] = int(beat), int(begun), state
        return found

    def culprit(self) -> tuple[int | None, str]:
        """The rank because of which a collective failed, and what is known of it."""
        try:
            before = self._read()
            time.sleep(_SILENCE)
            after = self._read()
        except RuntimeError:
            holder = self._ranks[0]
            return holder, f"rank {holder}, or the process that holds the group's store, has ended"
        behind: tuple[int, int] | None = None
        for rank in self._ranks:
            if rank == self._rank:
                continue
            was, now = before[rank], after[rank]
            if now is None:
                return rank, f"rank {rank} has not begun the call"
            if now[2] == "done":
                continue
            if now[2].startswith("blames "):
                _, blamed, reason = now[2].split(" ", 2)
                return int(blamed), reason
            if now[2].startswith("failed "):
                return rank, f"rank {rank} {now[2]}"
            if was is not None and was[0] == now[0]:
                return (
                    rank,
                    f"rank {rank} was killed or stopped: it gave no sign of life for {_SILENCE:.0f} s",
                )
            if now[1] < self.begun and (behind is None or now[1] < behind[1]):
                behind = rank, now[1]
        if behind is not None:
            rank, begun = behind
            return (
                rank,
                f"rank {rank} hangs: it lives, but has begun {begun} collectives and this rank {self.begun}",
            )
        return None, "no rank is missing"


class Communicator:
    """One call's collectives over `group` (None: the default group; a single rank if torch.distributed is not initialized).

    All ranks make the same calls in the same order. A `Communicator` is a context manager.

    Attributes:
        rank, world: this rank's place in the group, and how many there are.
        bytes: what this rank's collectives brought: the size of each reduced or broadcast tensor, of all parts of gathered ones.
        collectives: how many there were.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.world, self.bytes, self.collectives = 0, 1, 0, 0
        self.ranks = [0]
        self._pulse: _Pulse | None = None
        self._device = torch.device("cpu")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed process group or None, got {type(group).__name__}"
            )
        if not (dist.is_available() and dist.is_initialized()):
            return
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must contain this rank; call the function on the group's ranks alone")
        self.ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        if dist.get_backend(group) == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def global_rank(self) -> int:
        return self.ranks[self.rank]

    def __enter__(self) -> Communicator:
        if self.world > 1:
            store = dist.distributed_c10d._get_default_store()
            name = hashlib.sha256(repr(self.ranks).encode()).hexdigest()[:16]
            prefix = f"flashcoreset/{name}/"
            self._pulse = _Pulse(store, prefix, self.global_rank, self.ranks)
            self._pulse.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pulse is None:
            return
        state = "done"
        if isinstance(error, RankError):
            if error.rank is not None:
                state = f"blames {error.rank} {error.args[0]}"
        elif kind is not None:
            state = f"failed with {kind.__name__}: {' '.join(str(error).split())}"[:2000]
        self._pulse.end(state)
        self._pulse = None

    def _run(self, what: str, size: int, work: Callable[[], _T]) -> _T:
        self.bytes += size
        self.collectives += 1
        if self._pulse is not None:
            self._pulse.begun += 1
        try:
            return work()
        except RuntimeError as error:
            if self._pulse is None:
                raise
            rank, reason = self._pulse.culprit()
            raise RankError(
                f"{reason} ({what}, collective {self.collectives} of this call; {_first_line(error)})", rank
            ) from error

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device).contiguous()

    def _reduced(self, tensor: Tensor, op: Any, what: str) -> Tensor:
        if self.world == 1:
            return tensor
        mine = self._moved(tensor)
        if mine is tensor:
            mine = tensor.clone()
        self._run(what, mine.nbytes, lambda: dist.all_reduce(mine, op, group=self._group))
        return mine.to(tensor.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks; of integers, so that their order does not matter."""
        assert not tensor.is_floating_point()
        return self._reduced(tensor, dist.ReduceOp.SUM, "a sum")

    def sum_floats(self, tensor: Tensor) -> Tensor:
        """A sum whose last bits depend on the ranks: for checks alone."""
        return self._reduced(tensor, dist.ReduceOp.SUM, "a sum")

    def maximum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.MAX, "a maximum")

    def most(self, value: float) -> float:
        """The largest of the ranks' numbers; NaN if one of them is."""
        return max(self.gather(torch.tensor([value], dtype=torch.float64))[:, 0].tolist(), key=_nan_first)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """What rank `source` passes; the others pass a tensor of its shape and type."""
        if self.world == 1:
            return tensor
        mine = self._moved(tensor)
        self._run(
            f"a broadcast from rank {self.ranks[source]}",
            mine.nbytes,
            lambda: dist.broadcast(mine, self.ranks[source], group=self._group),
        )
        return mine.to(tensor.device)

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of one shape, stacked."""
        if self.world == 1:
            return tensor[None]
        mine = self._moved(tensor)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        self._run(
            "a gathering",
            mine.nbytes * self.world,
            lambda: dist.all_gather(parts, mine, group=self._group),
        )
        return torch.stack(parts).to(tensor.device)

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """The ranks' tensors, which differ in their numbers of rows."""
        if self.world == 1:
            return [tensor]
        counts = self.gather(torch.tensor([tensor.shape[0]]))[:, 0].tolist()
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        return [part[:count] for part, count in zip(self.gather(padded), counts, strict=True)]

    def gather_objects(self, value: Any) -> list[Any]:
        """Small Python objects of all ranks."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        self._run(
            "a gathering of options",
            0,
            lambda: dist.all_gather_object(parts, value, group=self._group),
        )
        return parts

    def fold(self, state: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        """`add` applied by one rank after the other, in their order: a sum whose order is that of one machine."""
        for rank in range(self.world):
            if rank == self.rank:
                state = add(state)
            state = self.broadcast(state, rank)
        return state

    def agree(self, options: dict[str, Any], error: Exception | None, own: Any = None) -> list[Any]:
        """Every rank's `own`, once it is known that no rank has an `error` and that all have the same `options`.

        Raises:
            Exception: this rank's own error.
            TypeError, ValueError: for another rank's error, and for options that differ; the ranks and values are named.
        """
        told = None if error is None else (isinstance(error, TypeError), str(error))
        parts = self.gather_objects((told, options, own))
        if error is not None:
            raise error
        for rank, (other, _, _) in zip(self.ranks, parts, strict=True):
            if other is not None:
                raise (TypeError if other[0] else ValueError)(f"rank {rank}: {other[1]}")
        first = parts[0][1]
        for rank, (_, theirs, _) in zip(self.ranks, parts, strict=True):
            for name in first.keys() | theirs.keys():
                if not _same(first.get(name), theirs.get(name)):
                    raise ValueError(
                        f"{name} must be the same on every rank, got {_shown(first.get(name))} on rank {self.ranks[0]} and "
                        f"{_shown(theirs.get(name))} on rank {rank}"
                    )
        return [part[2] for part in parts]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _nan_first(value: float) -> tuple[bool, float]:
    return value != value, value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
