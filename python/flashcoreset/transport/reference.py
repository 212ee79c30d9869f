"""Exact transport between equal sources and sinks in plain torch: the definition that the compiled kernel is tested against.

The least sum_sv C_sv x_sv with sum_v x_sv = V / g for each of k sources, sum_s x_sv = k / g for each of V sinks, x >= 0 and whole,
g = gcd(k, V); the transport cost is that sum divided by k V / g. Successive shortest paths: dual variables with
u_s + f_v <= C_sv, and equality where x_sv > 0, prove a flow that leaves no unit behind optimal. While a source has units left, the shortest path
of reduced costs C_sv - u_s - f_v from it to a sink that lacks units is found (from a sink it goes on to the sources that serve it, at no
cost), the dual variables move by the distances, and units go along the path.

After an exchange only the units of the source that left are placed anew. Its bound: with the least and the second least C_sv - u_s
of each sink (f_v at the member i_v, and f_v + w_v) and any y as the dual variable of an item o that enters for i,

    bound(i, o) = sum(u) / k + mean(f) + loss_i + gain_o - (1/V) sum_{v: i_v = i} max(0, w_v - max(0, d_v - y))
    loss_i = -u_i / k + (1/V) sum_{v: i_v = i} w_v          d_v = C_ov - f_v
    gain_o = y / k - (1/V) sum_v max(0, y - d_v)

is not above the new transport cost, by weak duality. (By ways it is raised: a unit of o enters at a sink, whose source takes over a sink of
another, and so on until one of i is taken over; the cheapest ways of all units, each way by itself, are a bound as well.) y is taken where gain_o is greatest, at the R-th smallest d_v, R = ceil(V / k).

Source: Ahuja, Magnanti and Orlin, "Network Flows", Prentice Hall 1993, section 9.7 (successive shortest paths).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcoreset._core.dispatch import Takes
from flashcoreset.transport.backend import Best, Candidates

TAKES = Takes()
_SLACKNESS = 1e-12  # of the largest cost


class Transport:
    """The optimal transport between k sources of mass 1/k and V sinks of mass 1/V; `flashcoreset.transport.cpu` says what its methods do."""

    def __init__(self, costs: Tensor, u: Tensor | None = None) -> None:
        self._c = costs.double().clone()
        k, sinks = costs.shape
        common = math.gcd(k, sinks)
        self._total = k * (sinks // common)
        self._u = torch.zeros(k, dtype=torch.float64) if u is None else u.clone()
        self._x = torch.zeros(k, sinks, dtype=torch.int64)
        self._supply = torch.full((k,), sinks // common)
        self._need = torch.full((sinks,), k // common)
        self._f = (self._c - self._u[:, None]).amin(0)
        self._route()

    @property
    def value(self) -> float:
        flow = self._x.nonzero(as_tuple=True)
        return math.fsum((self._x[flow] * self._c[flow]).tolist()) / self._total

    @property
    def _dual(self) -> float:
        return math.fsum(self._u.tolist()) / len(self._u) + math.fsum(self._f.tolist()) / len(self._f)

    @property
    def gap(self) -> float:
        return max(0.0, self.value - self._dual)

    @property
    def slackness(self) -> float:
        return float((self._c - self._u[:, None] - self._f)[self._x > 0].amax())

    def exchange(self, place: int, row: Tensor, ceiling: float = math.inf) -> float:
        before = [part.clone() for part in (self._c, self._u, self._f, self._x)]
        self._c[place] = row
        self._supply[place] = self._x[place].sum()
        self._need += self._x[place]
        self._x[place] = 0
        self._u[place] = (self._c[place] - self._f).amin()
        self._route()
        if (value := self.value) < ceiling:
            return value
        self._c, self._u, self._f, self._x = before
        return math.inf

    def best_exchange(
        self, costs: Tensor, candidates: Candidates, ceiling: float, enough: float, most: int
    ) -> Best:
        index, tried = -1, 0
        for i, (row, place, bound) in enumerate(zip(*(part.tolist() for part in candidates), strict=True)):
            if i == most or bound >= ceiling or (index >= 0 and ceiling <= enough):
                break
            before = [part.clone() for part in (self._c, self._u, self._f, self._x)]
            value = self.exchange(place, costs[row], ceiling)
            self._c, self._u, self._f, self._x = before
            tried += 1
            if value < ceiling:
                index, ceiling = i, value
        return Best(index, ceiling, tried)

    def bounds(self, costs: Tensor, goal: float, most: int, ways: bool = False) -> tuple[Tensor, Candidates]:
        k, sinks = self._c.shape
        reduced = self._c - self._u[:, None]
        owner = reduced.argmin(0)
        w = (reduced.kthvalue(2, dim=0).values - self._f) if k > 1 else torch.zeros_like(self._f)
        loss = -self._u / k + torch.zeros_like(self._u).index_add_(0, owner, w) / sinks
        d = costs.double() - self._f
        y = d.kthvalue(-(-sinks // k), dim=1).values[:, None]
        gain = y[:, 0] / k - (y - d).clamp_min(0).sum(1) / sinks
        saved = (w - (d - y).clamp_min(0)).clamp_min(0)
        values = (gain + self._dual)[:, None] + loss
        values.index_add_(1, owner, saved, alpha=-1 / sinks)
        lowest = values.amin(1)
        if ways:
            values = torch.maximum(values, self._way_bounds(costs.double()))
        rows, places = (values < goal).nonzero(as_tuple=True)
        below = values[rows, places]
        order = torch.argsort(below, stable=True)[:most]
        return lowest, Candidates(rows[order], places[order], below[order])

    def _way_bounds(self, costs: Tensor) -> Tensor:
        """Bounds [r, k]: each unit of an item enters at a sink and goes the cheapest way, whatever the others do."""
        k, sinks = self._c.shape
        served = self._x > 0
        # hand[s, t]: the least cost at which s takes over a sink of t, with other members in between or not.
        hand = torch.stack(
            [(self._c[:, served[t]] - self._c[t, served[t]]).amin(1) for t in range(k)], dim=1
        ).fill_diagonal_(0)
        for between in range(k):
            hand = torch.minimum(hand, hand[:, between, None] + hand[between])
        left = torch.full((sinks,), k // math.gcd(k, sinks)).cumsum(0)
        units = (self._total // k - left + left[0]).clamp(0, int(left[0])).double()
        bounds = []
        for place in range(k):
            freed = torch.where(served, hand[:, place, None] - self._c, math.inf).amin(0)
            ways = (costs + freed).sort(dim=1).values
            bounds.append(self.value + (units * ways).sum(1) / self._total)
        return torch.stack(bounds, dim=1)

    def duals(self) -> tuple[Tensor, Tensor]:
        return self._u.clone(), self._f.clone()

    def flows(self) -> tuple[Tensor, Tensor, Tensor]:
        sinks, sources = self._x.T.nonzero(as_tuple=True)
        return sources, sinks, self._x[sources, sinks]

    def _route(self) -> None:
        """Places all units that are left."""
        while (self._supply > 0).any():
            self._place_along_one_path(int(self._supply.argmax()))
        # Rounding is not to add up over exchanges.
        self._f = (self._c - self._u[:, None]).amin(0)
        if self.slackness > _SLACKNESS * float(self._c.abs().amax()):
            raise RuntimeError(
                f"the transport of {len(self._u)} sources and {len(self._f)} sinks violates complementary slackness by "
                f"{self.slackness}; scale the costs to [0, 1]"
            )

    def _place_along_one_path(self, root: int) -> None:
        """Dijkstra's algorithm from a source to the nearest sink that lacks units."""
        sinks = self._c.shape[1]
        distance, parent = torch.full((sinks,), math.inf, dtype=torch.float64), torch.full((sinks,), -1)
        settled = torch.zeros(sinks, dtype=torch.bool)
        of_source, by = {root: 0.0}, {root: -1}
        newest = [root]
        while True:
            for source in newest:
                reduced = (self._c[source] - self._u[source] - self._f).clamp_min(0) + of_source[source]
                nearer = reduced < distance
                distance[nearer], parent[nearer] = reduced[nearer], source
            sink = int(torch.where(settled, math.inf, distance).argmin())
            length = float(distance[sink])
            settled[sink] = True
            if self._need[sink] > 0:
                break
            newest = [s for s in self._x[:, sink].nonzero()[:, 0].tolist() if s not in of_source]
            for source in newest:
                of_source[source], by[source] = length, sink
        for source, at in of_source.items():
            self._u[source] += length - at
        self._f[settled] -= length - distance[settled]
        path = []
        units, at = int(self._need[sink]), sink
        while at >= 0:
            source = int(parent[at])
            path.append((source, at, 1))
            at = by[source]
            if at >= 0:
                path.append((source, at, -1))
                units = min(units, int(self._x[source, at]))
        units = min(units, int(self._supply[root]))
        for source, at, sign in path:
            self._x[source, at] += sign * units
        self._supply[root] -= units
        self._need[sink] -= units
