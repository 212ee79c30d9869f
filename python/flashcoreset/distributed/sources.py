"""Where the similarities of a distributed greedy run come from.

A candidate lives on one rank. Points are evaluated by all ranks together, each over its own clients, and the parts are summed;
similarities that the candidate's rank has for all clients (a matrix, or clients that every rank holds) are evaluated there alone.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flashcoreset._core.constants import DISTANCES
from flashcoreset.facility_location.backend import Kernels


class Source(Protocol):
    """The candidates of this rank and the clients that it evaluates.

    Attributes:
        by_all: whether every rank evaluates a candidate, over its own clients; else the candidate's rank does, over all.
        count: how many candidates live here.
        clients: how many clients are evaluated here.
        width: the numbers of a candidate's row, which is all that another rank needs of it.
        kernels: the backend.
    """

    by_all: bool
    count: int
    clients: int
    width: int
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels

    def rows(self, candidates: Tensor) -> Tensor:
        """The rows [r, width] of candidates that live here."""
        ...

    def similarities(self, rows: Tensor, clients: slice) -> Tensor:
        """The similarities [r, c] of candidates, given by their rows, to some of the clients; may be a view of the rows."""
        ...


class Points:
    """Candidates and clients that are points; `replicated` clients are the same ones on every rank."""

    def __init__(
        self,
        kernels: Kernels,
        x: Tensor,
        clients: Tensor,
        metric: str,
        *,
        replicated: bool = False,
    ) -> None:
        self.kernels, self._x, self._clients, self._metric = kernels, x, clients, metric
        self.by_all = not replicated
        self.count, self.width, self.clients = x.shape[0], x.shape[1], clients.shape[0]
        self.dtype, self.device = x.dtype, x.device

    def rows(self, candidates: Tensor) -> Tensor:
        return self._x[candidates]

    def similarities(self, rows: Tensor, clients: slice) -> Tensor:
        some = self._clients[clients]
        if not (len(rows) and len(some)):
            return rows.new_empty(len(rows), len(some))
        values = self.kernels.pairwise(rows, some, metric=self._metric)
        return values.neg_() if self._metric in DISTANCES else values


class MatrixRows:
    """Rows of a matrix of similarities [candidates here, all clients]."""

    by_all = False

    def __init__(self, kernels: Kernels, s: Tensor) -> None:
        self.kernels, self._s = kernels, s
        self.count, self.clients = s.shape
        self.width = self.clients
        self.dtype, self.device = s.dtype, s.device

    def rows(self, candidates: Tensor) -> Tensor:
        return self._s[candidates]

    def similarities(self, rows: Tensor, clients: slice) -> Tensor:
        return rows[:, clients]
