"""What exchanging one member of a subset for another item does to its transport cost, bounded from below for all
pairs at once.

With dual variables u of the k members and f_v = min_s (C_sv - u_s), the dual value is sum(u) / k + mean(f). Let
i_v be the member at which the minimum is reached and w_v the distance to the second smallest. Without member i,
f_v rises by w_v where i_v = i; with an item o and any y as its dual variable,

    bound(i, o) = sum(u) / k + mean(f) + loss_i + gain_o - (1/V) sum_{v: i_v = i} max(0, w_v - max(0, d_v - y))
    loss_i = -u_i / k + (1/V) sum_{v: i_v = i} w_v          d_v = C_ov - f_v
    gain_o = y / k - (1/V) sum_v max(0, y - d_v)

is not above the new transport cost. Every v belongs to one i_v, so the bounds of one o with all k members cost
O(V) together. y is taken where gain_o is greatest, at the R-th smallest d_v with R = ceil(V / k); the greatest
bound of a pair takes the R-th smallest after i has left, which `greatest_bounds` does, for O(V) per pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcoreset.methods.goracs.exact_transport import CostBlocks, dual_value

# The rise of f when the only member leaves: more than the differences of all costs, which are in [0, 1]. The
# bound is then the new transport cost itself.
_ALONE = 4.0


class Exchanges:
    """Bounds for a subset of k members with dual variables `u` [k] float64 and costs `blocks()`, [k, V].

    Attributes:
        value: the dual value, a lower bound of the subset's own transport cost.
        share: R.
        f, w: [V] float64; owner: [V] int64, i_v.
    """

    def __init__(self, blocks: CostBlocks, u: Tensor, sinks: int) -> None:
        k, device = len(u), u.device
        self.u, self.k, self.share = u, k, -(-sinks // k)
        first = torch.full((sinks,), math.inf, dtype=torch.float64, device=device)
        second = first.clone()
        owner = torch.zeros(sinks, dtype=torch.int64, device=device)
        columns = torch.arange(sinks, device=device)
        for rows, c in blocks():
            reduced = c.double() - u[rows, None]
            low, place = reduced.min(0)
            reduced[place, columns] = math.inf
            second = torch.minimum(torch.minimum(second, reduced.amin(0)), torch.maximum(first, low))
            owner = torch.where(low < first, place + rows.start, owner)
            first = torch.minimum(first, low)
        self.f, self.owner = first, owner
        self.w = second - first if k > 1 else torch.full_like(first, _ALONE)
        self.value = dual_value(u, first)
        self.loss = -u / k + torch.zeros_like(u).index_add_(0, owner, self.w) / sinks
        # If two members share the minimum, leaving costs nothing.
        self._alone = (self.w > 0).nonzero()[:, 0]

    def bounds(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """(bounds [r, k] of exchanging each member for each of r items with costs `c` [r, V]; y [r])."""
        sinks = c.shape[1]
        d = c - self.f.to(c.dtype)
        lowest = d.topk(self.share, dim=1, largest=False).values
        y = lowest.amax(1)
        gain = y / self.k - (y[:, None] - lowest).sum(1) / sinks
        w = self.w[self._alone].to(c.dtype)
        saved = (w - (d[:, self._alone] - y[:, None]).clamp_min_(0)).clamp_min_(0)
        bounds = c.new_zeros(len(c), self.k).index_add_(1, self.owner[self._alone], saved, alpha=-1 / sinks)
        return bounds.add_((gain + self.value)[:, None]).add_(self.loss.to(c.dtype)), y

    def touched(self, place: int, c: Tensor, y: Tensor) -> Tensor:
        """A mask [V] bool of the sinks that member `place` leaves or an item with costs `c` [V] and dual variable `y` takes."""
        return (c - self.f.to(c.dtype) <= y) | ((self.owner == place) & (self.w > 0))

    def greatest_bounds(self, places: Tensor, c: Tensor) -> Tensor:
        """The greatest bounds [p] float64 of exchanging the members `places` [p] for one item with costs `c` [V]."""
        f = self.f + torch.where(self.owner == places[:, None], self.w, 0)
        y = (c.double() - f).kthvalue(self.share, dim=1).values
        rest = self.u.sum() - self.u[places]
        return (rest + y) / self.k + torch.minimum(f, c.double() - y[:, None]).mean(1)


IMPROVEMENT = 1e-9  # the least by which an exchange has to lower the score
