"""The two passes of greedy facility location: gains of some candidates over all clients, and the update after a pick.

    gain(j) = sum_i trunc(max(0, s(j, i) - best_i) * weight_i)            (64-bit integers; weight_i carries the scale)
    best_i  = max(best_i, s(j, i)),  owner_i = position of j where that is larger

for similarities s(j, i) of points, computed tile by tile and never stored, or read from a matrix [n, m]. Distances are
negated into similarities. A pair has the same bits in both passes, whatever tile it falls into.

A program takes ROWS candidates through a run of the clients' tiles and adds its sums to the gains by integer atomics:
the one reduction whose result does not depend on the order.

Cost: gains r * m * d fused multiply-adds for r candidates (a matrix: r * m numbers read); update m * d, and
m * d numbers read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcoreset.triton_kernels.pairwise import Tile, pair_values

# Programs that share the clients of a tile of candidates: a few tiles of candidates still occupy a whole GPU, and many
# bring few atomics.
_PROGRAMS = 16384


@triton.jit(do_not_specialize=["r", "m", "d", "tiles_each"])
def gains_kernel(
    candidates,  # points: [d, candidate_stride], a panel of the r candidates; precomputed: [n, candidate_stride]
    candidate_stride,
    clients,  # points: [d, client_stride], a panel; precomputed: not read
    client_stride,
    index,  # [r] int64 rows of the matrix; points: not read
    best,  # [m]
    weights,  # [m]
    gains,  # [r] int64, zeros at first
    r,
    m,
    d,
    tiles_each,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    place = first_row + tl.arange(0, ROWS)
    if METRIC == "precomputed":
        rows = tl.load(index + place, mask=place < r, other=0)
    sums = tl.full((ROWS,), 0, tl.int64)
    tile = tl.program_id(1) * tiles_each
    end = tl.minimum(tile + tiles_each, (m + COLS - 1) // COLS)
    while tile < end:
        first_col = tile.to(tl.int64) * COLS
        if METRIC == "precomputed":
            cols = first_col + tl.arange(0, COLS)
            places = candidates + rows[:, None] * candidate_stride + cols[None, :]
            s = tl.load(places, mask=(cols < m)[None, :], other=0)
        else:
            cols = first_col + tl.max_contiguous(tl.arange(0, COLS), 1)
            s = pair_values(
                candidates + first_row, candidate_stride, clients + first_col, client_stride, d,
                METRIC, ROWS, COLS, ONE_CHAIN,
            )  # fmt: skip
            if METRIC != "cosine" and METRIC != "dot":
                s = -s
        floor = tl.load(best + cols, mask=cols < m, other=0)
        weight = tl.load(weights + cols, mask=cols < m, other=0)
        # A client from m on has weight 0.
        terms = tl.maximum(s - floor[None, :], 0.0) * weight[None, :]
        sums += tl.sum(terms.to(tl.int64), axis=1)
        tile += 1
    tl.atomic_add(gains + place, sums, mask=place < r, sem="relaxed")


@triton.jit(do_not_specialize=["pick", "position", "m", "d"])
def update_kernel(
    candidates,  # points: [d, candidate_stride], a panel; precomputed: [n, candidate_stride]
    candidate_stride,
    clients,  # points: [d, client_stride], a panel; precomputed: not read
    client_stride,
    best,  # [m]
    owner,  # [m] int64
    own,  # [>= position + 1]; [position] becomes s(pick, pick) if the clients are the candidates
    pick,
    position,
    m,
    d,
    METRIC: tl.constexpr,
    COLS: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
):
    first_col = tl.program_id(0).to(tl.int64) * COLS
    if METRIC == "precomputed":
        cols = first_col + tl.arange(0, COLS)
        s = tl.load(candidates + tl.cast(pick, tl.int64) * candidate_stride + cols, mask=cols < m, other=0)
    else:
        cols = first_col + tl.max_contiguous(tl.arange(0, COLS), 1)
        s = pair_values(
            candidates + pick, candidate_stride, clients + first_col, client_stride, d,
            METRIC, 1, COLS, ONE_CHAIN,
        )  # fmt: skip
        s = tl.reshape(s, (COLS,))
        if METRIC != "cosine" and METRIC != "dot":
            s = -s
    here = tl.full((COLS,), 0, tl.int64) + position
    better = (cols < m) & (s > tl.load(best + cols, mask=cols < m, other=0))
    tl.store(best + cols, s, mask=better)
    tl.store(owner + cols, here, mask=better)
    tl.store(own + here, s, mask=cols == pick)


@dataclass(frozen=True)
class Similarities:
    """The tensors that s(j, i) is read or computed from."""

    metric: str
    candidates: Tensor  # a panel [d, >= n], or the matrix [n, m] with contiguous rows
    clients: Tensor  # a panel [d, >= m], or the matrix again
    n: int
    m: int

    @property
    def _d(self) -> int:
        return 0 if self.metric == "precomputed" else self.clients.shape[0]

    def gains(self, index: Tensor | None, best: Tensor, weights: Tensor) -> Tensor:
        """Returns the gains [r] int64 of the candidates `index` [r] int64 (None: of all n) over `best` [m], the
        clients' best similarities so far, and `weights` [m], scaled."""
        tile = Tile.of(best.dtype, self._d)
        r = self.n if index is None else index.shape[0]
        gains = torch.zeros(r, dtype=torch.int64, device=best.device)
        candidates = self.candidates
        if self.metric == "precomputed":
            index = torch.arange(r, device=best.device) if index is None else index
        elif index is not None:
            candidates = candidates.new_zeros(self._d, triton.cdiv(r, tile.rows) * tile.rows)
            candidates[:, :r] = self.candidates.index_select(1, index)
        row_tiles, tiles = triton.cdiv(r, tile.rows), triton.cdiv(self.m, tile.cols)
        tiles_each = triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // row_tiles)))
        with torch.cuda.device_of(best):
            gains_kernel[(row_tiles, triton.cdiv(tiles, tiles_each))](
                candidates,
                candidates.stride(0),
                self.clients,
                self.clients.stride(0),
                gains if index is None else index,
                best,
                weights,
                gains,
                r,
                self.m,
                self._d,
                tiles_each,
                METRIC=self.metric,
                ROWS=tile.rows,
                COLS=tile.cols,
                ONE_CHAIN=tile.one_chain,
                num_warps=tile.warps,
            )
        return gains

    def update(self, pick: int, position: int, best: Tensor, owner: Tensor, own: Tensor) -> None:
        """Raises `best` [m] to the similarities of candidate `pick` and writes `position` to `owner` [m] where that changes
        `best`; own[position] becomes s(pick, pick) if there is such a client."""
        tile = Tile.of(best.dtype, self._d)
        with torch.cuda.device_of(best):
            update_kernel[(triton.cdiv(self.m, tile.cols),)](
                self.candidates,
                self.candidates.stride(0),
                self.clients,
                self.clients.stride(0),
                best,
                owner,
                own,
                pick,
                position,
                self.m,
                self._d,
                METRIC=self.metric,
                COLS=tile.cols,
                ONE_CHAIN=tile.one_chain,
                num_warps=tile.warps,
            )
