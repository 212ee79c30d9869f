"""Facility location, by the compiled kernels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.facility_location.problem import Problem, Watch
from flashcoreset.pairwise.cpu import pairwise

__all__ = ["TAKES", "FacilityLocation", "PartialGains", "pairwise", "workspace"]

TAKES = Takes(sparse=True)

_HUGE_PAGE = 2**21


class FacilityLocation:
    """A greedy run, as `flashcoreset.facility_location.backend.Run` says.

    Raises:
        BackendUnavailableError: if no compiled module can be loaded.
        TypeError, ValueError: for arrays and numbers that do not fit each other.

    Example:
        >>> import torch
        >>> from flashcoreset import kernels
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> run = kernels.cpu.FacilityLocation(kernels.FacilityLocationProblem(x))
        >>> run.step(2)
        2
        >>> indices, assignment = torch.empty(2, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        >>> gains, weights = torch.empty(2, dtype=torch.float64), torch.empty(2, dtype=torch.float64)
        >>> run.finish(indices, gains, weights, assignment), indices
        (3.0, tensor([1, 0]))
    """

    def __init__(self, problem: Problem) -> None:
        self.offset, self.completed = problem.offset, 0
        x = problem.x
        if problem.metric == "precomputed" and isinstance(x, Tensor) and x.stride(1) != 1:
            problem = replace(problem, x=x.contiguous())
        self._run = native.module().FacilityLocation(problem, torch.get_num_threads())

    def step(self, count: int, naive: bool = False, report: Watch | None = None) -> int:
        self.completed = made = self._run.step(count, naive, report)
        return made

    def pick(self, naive: bool = False, stop_gain: float | None = None) -> int:
        j: int = self._run.pick(naive, stop_gain)
        self.completed += j >= 0
        return j

    def step_among(self, candidates: Tensor) -> int:
        return self._run.step_among(capsule(candidates))

    def close(self, candidates: Tensor) -> None:
        self._run.close(capsule(candidates))

    def finish(self, indices: Tensor, gains: Tensor, weights: Tensor, assignment: Tensor) -> float:
        return self._run.finish(capsule(indices), capsule(gains), capsule(weights), capsule(assignment))

    def stats(self) -> dict[str, int]:
        """What the run did so far: evaluations of candidates, similarities computed or read, and sweeps over
        all candidates."""
        return self._run.stats()


class PartialGains:
    """Gains over the clients that are here, as `flashcoreset.facility_location.backend.PartialGains` says."""

    def __init__(self, clients: int, dtype: torch.dtype, device: torch.device, entries: int) -> None:
        name = "float64" if dtype == torch.float64 else "float32"
        self._gains = native.module().PartialGains(clients, name, entries, torch.get_num_threads())
        self.begin, self.has, self.forget = self._gains.begin, self._gains.has, self._gains.forget

    def add(self, s: Tensor, first: int, best: Tensor, weights: Tensor, sums: Tensor) -> None:
        s = s if s.stride(1) == 1 else s.contiguous()
        self._gains.add(capsule(s), first, capsule(best), capsule(weights), capsule(sums))

    def keep(self, numbers: list[int]) -> None:
        self._gains.keep(capsule(torch.tensor(numbers, dtype=torch.int64)))

    def evaluate(self, numbers: list[int], best: Tensor, weights: Tensor) -> Tensor:
        sums = torch.empty(len(numbers), dtype=torch.int64)
        listed = torch.tensor(numbers, dtype=torch.int64)
        self._gains.evaluate(capsule(listed), capsule(best), capsule(weights), capsule(sums))
        return sums

    def win(self, number: int, position: int, best: Tensor, owner: Tensor) -> None:
        self._gains.win(number, position, capsule(best), capsule(owner))


def workspace(problem: Problem) -> int:
    """Terms are named after what csrc/cpu/facility_location.cpp allocates."""
    (n, m), d, size = problem.shape, problem.x.shape[1], problem.x.dtype.itemsize
    threads, is_points, self_clients = (
        torch.get_num_threads(),
        problem.metric != "precomputed",
        problem.clients is None,
    )
    columns = (n if self_clients else m) if is_points else 0
    packed = (columns + 32) * d * size if is_points else 0
    per_candidate = (113 + (24 if problem.costs is not None else 0)) * n
    per_client = m * (16 * size + 24)
    sweep = threads * 8 * n
    picks = 2**63 if problem.expected_picks is None else problem.expected_picks
    if is_points and n >= 4096 and m >= 2048 and picks >= 8:  # the kernel looks ahead
        states = 8  # the number of picks that the kernel looks ahead
        copies = states * 2 * m * size + 8 * n * (states + 1) + (min(m, 8192) + max(2048, m // 20)) * d * size
        sweep = copies + (threads * (states + 1) * 8 * n if self_clients else 0)
    pairs = n * m * size
    matrix = pairs if is_points and pairs <= problem.memory_budget else 0
    entry = 4 + size
    capacity = min((problem.memory_budget - matrix) // entry, n * m)
    longest = min(m, max(256, 4 * capacity // n)) if capacity else 0
    lists = (capacity + threads * 48 * longest) * entry
    # Each thread packs a block of rows: 2 MB, or 96 rows if these are more.
    blocks = threads * max(2**20, min(n, 96) * d * size if is_points else 0)
    own = packed + per_candidate + per_client + sweep + matrix + lists + blocks
    # If large arrays lie side by side, the huge page that both share is counted whole.
    return own + (_HUGE_PAGE if own >= 2 * _HUGE_PAGE else 0)
