"""Exact optimal transport between k equal sources and V equal sinks, when few of the sources change at a time.

POT's network simplex works on all k x V cells; an optimal plan uses k + V - 1 of them. So the simplex is given the cells
whose reduced cost C_sv - u_s - f_v under nearly optimal dual variables is small, and the cells of a plan that is
feasible for certain. Its dual variables then either satisfy u_s + f_v <= C_sv for all cells, which proves its plan
optimal for the whole problem, or the cells that violate this are added and the simplex runs again. The proof does not rest on
the solver: the plan's cost and the dual value enclose the exact cost. Masses are whole numbers, V / gcd per source
and k / gcd per sink, so that no flow is rounded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.imports import imported, pot

CostBlocks = Callable[[], Iterator[tuple[slice, Tensor]]]

_CELLS = 4  # the most cells per source and sink that a run adds
_GROUP = 16
_GAP = 1e-10  # enclosure of the exact cost at which the plan counts as optimal; costs are in [0, 1]
_RUNS = 100
_DENSE = 2**16  # the most cells of a problem that POT gets as a whole


@dataclass(frozen=True)
class CertifiedPlan:
    """A transport plan with the dual variables that bound how far it is from the optimum.

    Attributes:
        value: the plan's cost.
        gap: by how much `value` may exceed the optimum, >= 0.
        u: [k] float64, dual variables of the sources; with f_v = min_s (C_sv - u_s) they are feasible.
        cells: [cells] int64 each, the sources and the sinks between which mass moves; None for a dense plan.
    """

    value: float
    gap: float
    u: Tensor
    cells: tuple[Tensor, Tensor] | None = None


def load_pot() -> ModuleType:
    """POT, or an ImportError that says how to get it."""
    try:
        with warnings.catch_warnings():
            # POT warns about docstrings when it is compiled at its first import.
            warnings.simplefilter("ignore")
            return pot()
    except ImportError as error:
        raise ImportError(
            f"solver='exact' needs POT ({error}); install it with pip install 'flashcoreset[goracs]', or pass "
            "solver='sinkhorn'"
        ) from error


def sink_duals(blocks: CostBlocks, u: Tensor, sinks: int) -> Tensor:
    """The dual variables f_v = min_s (C_sv - u_s) of the sinks, [V] float64."""
    f = torch.full((sinks,), math.inf, dtype=torch.float64, device=u.device)
    for rows, c in blocks():
        f = torch.minimum(f, (c.double() - u[rows, None]).amin(0))
    return f


def dual_value(u: Tensor, f: Tensor) -> float:
    """The dual value sum(u) / k + mean(f), summed in one order whatever the number of threads."""
    return math.fsum(u.tolist()) / len(u) + math.fsum(f.tolist()) / len(f)


def feasible_cells(sources: int, sinks: int) -> tuple[Tensor, Tensor]:
    """The cells of the plan that serves the sinks in order from the sources in order."""
    ends = np.union1d(np.arange(1, sources + 1) * sinks, np.arange(1, sinks + 1) * sources)
    source, sink = (ends - 1) // sinks, (ends - 1) // sources
    return torch.from_numpy(source), torch.from_numpy(sink)


def solve(
    blocks: CostBlocks, u: Tensor, sinks: int, cells: tuple[Tensor, Tensor] | None = None
) -> CertifiedPlan:
    """The optimal transport of the costs [k, V] that `blocks()` yields as row blocks.

    Args:
        blocks: called for each pass over the costs; which of several optimal dual variables are found may depend
            on the blocks.
        u: [k] float64, dual variables to begin with; any are valid, nearly optimal ones are fast.
        sinks: V.
        cells: (sources, sinks) in which some feasible plan lies; None takes `feasible_cells`.

    Raises:
        ImportError: without POT.
        RuntimeError: if POT's solver fails.
    """
    ot, coo_array = load_pot(), imported("scipy.sparse").coo_array
    k, device = len(u), u.device
    if k * sinks <= _DENSE:
        return _solve_dense(ot, blocks, u, sinks)
    source, sink = (part.to(device) for part in (feasible_cells(k, sinks) if cells is None else cells))
    keys = source * sinks + sink
    masses, total = _masses(k, sinks)
    limit = _CELLS * (k + sinks)
    v = sink_duals(blocks, u, sinks)
    _, low = _scan(blocks, u, v, math.inf, limit)
    for _ in range(_RUNS):
        keys = torch.cat([keys, low]).sort().values.unique_consecutive()
        costs = _costs_of(blocks, keys, sinks)
        # With reduced costs the same plan is optimal, and the simplex method begins near it.
        reduced = (costs - u[keys // sinks] - v[keys % sinks]).cpu().numpy()
        cell = (keys // sinks).cpu().numpy(), (keys % sinks).cpu().numpy()
        graph = coo_array((reduced, cell), shape=(k, sinks))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what POT warns of is in the log
            plan, log = ot.emd(*masses, graph, numItermax=10_000_000, log=True, center_dual=False)
        if log["warning"] is not None:
            raise RuntimeError(f"POT's network simplex failed on a {k} x {sinks} problem: {log['warning']}")
        u = u + torch.from_numpy(np.asarray(log["u"], np.float64)).to(device)
        v = v + torch.from_numpy(np.asarray(log["v"], np.float64)).to(device)
        f, low = _scan(blocks, u, v, -_GAP / 4, limit)
        used = plan.data > 0
        source, sink = (torch.from_numpy(np.asarray(part[used], np.int64)).to(device) for part in plan.coords)
        prices = costs[torch.searchsorted(keys, source * sinks + sink)].tolist()
        value = math.fsum(mass * price for mass, price in zip(plan.data[used].tolist(), prices, strict=True))
        value /= total
        gap = value - dual_value(u, f)
        if gap <= _GAP:
            return CertifiedPlan(value, max(0.0, gap), u, (source, sink))
    raise RuntimeError(f"POT left a gap of {gap:.2g} on a {k} x {sinks} problem after {_RUNS} runs")


def _masses(sources: int, sinks: int) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Whole masses of the sources and the sinks, and their sum."""
    common = math.gcd(sources, sinks)
    masses = np.full(sources, float(sinks // common)), np.full(sinks, float(sources // common))
    return masses, float(sources * (sinks // common))


def _solve_dense(ot: ModuleType, blocks: CostBlocks, u: Tensor, sinks: int) -> CertifiedPlan:
    """One run on all cells, which for few cells costs less than choosing some."""
    masses, total = _masses(len(u), sinks)
    costs = torch.cat([c.double() for _, c in blocks()]).cpu().numpy()
    plan, log = ot.emd(*masses, costs, numItermax=10_000_000, log=True, center_dual=False)
    if log["warning"] is not None:
        raise RuntimeError(f"POT's network simplex failed on a {len(u)} x {sinks} problem: {log['warning']}")
    source, sink = plan.nonzero()
    value = math.fsum((plan[source, sink] * costs[source, sink]).tolist()) / total
    u = torch.from_numpy(np.asarray(log["u"], np.float64)).to(u.device)
    gap = value - dual_value(u, sink_duals(blocks, u, sinks))
    return CertifiedPlan(value, max(0.0, gap), u, (torch.from_numpy(source), torch.from_numpy(sink)))


def _scan(blocks: CostBlocks, u: Tensor, v: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """The values f_v = min_s (C_sv - u_s), and cells with C_sv - u_s - v_v below `threshold`, as source * V + sink: about `count`
    of the lowest, of every sink at most one among `_GROUP` neighbouring sources."""
    f = torch.full_like(v, math.inf)
    keys, values = [], []
    for rows, c in blocks():
        reduced = c.double() - u[rows, None]
        whole = len(c) // _GROUP * _GROUP
        for begin, end in ((0, whole), (whole, len(c))):
            if begin == end:
                continue
            groups = reduced[begin:end].view(-1, min(_GROUP, end - begin), len(v))
            low, row = groups.min(1)
            f = torch.minimum(f, low.amin(0))
            low -= v
            group, column = (low < threshold).nonzero(as_tuple=True)
            source = rows.start + begin + group * groups.shape[1] + row[group, column]
            keys.append(source * len(v) + column)
            values.append(low[group, column])
    key, value = torch.cat(keys), torch.cat(values)
    if len(key) > count:
        key = key[value <= value.kthvalue(count).values]
    return f, key


def _costs_of(blocks: CostBlocks, keys: Tensor, sinks: int) -> Tensor:
    """The costs of cells [cells] that are given as ascending source * V + sink, float64."""
    parts = []
    for rows, c in blocks():
        begin, end = torch.searchsorted(
            keys, torch.tensor([rows.start, rows.stop], device=keys.device) * sinks
        )
        parts.append(c.flatten()[keys[begin:end] - rows.start * sinks])
    return torch.cat(parts).double()
