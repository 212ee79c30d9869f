"""Optimal transport between equal sources and equal sinks by Sinkhorn iterations, with an enclosure of the exact cost.

The entropic plan P is rounded to a feasible one: rows and columns that hold too much are scaled down, and what
is missing is added as a product of what the rows and columns lack. The cost of that plan is not below the optimum; the dual
value of the potentials, made feasible by f_v = min_s (C_sv - u_s), is not above it.

Source: Altschuler, Weed and Rigollet, "Near-linear time approximation algorithms for optimal transport via Sinkhorn
iteration", NeurIPS 2017, algorithm 2 (the rounding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcoreset.methods.goracs.exact_transport import CertifiedPlan, CostBlocks, dual_value, sink_duals

_ITERATIONS = 500


def solve_entropic(
    blocks: CostBlocks, u: Tensor, sinks: int, reg: float, backend: str | None
) -> CertifiedPlan:
    """A feasible plan's cost for the costs [k, V] of `blocks()`, and by how much that cost may exceed the optimum.

    Args:
        blocks: the costs as row blocks.
        u: [k] float64, potentials to begin with.
        sinks: V.
        reg: the regularisation.
        backend: the backend of `fc.sinkhorn`.
    """
    from flashcoreset.sinkhorn import sinkhorn

    c = torch.cat([block for _, block in blocks()])
    start = (u.to(c.dtype), sink_duals(blocks, u, sinks).to(c.dtype))
    # A fixed number of iterations: what they leave undone shows in the gap, not in a warning.
    entropic = sinkhorn(
        c, metric="precomputed", reg=reg, max_iter=_ITERATIONS, tol=0.0, warm_start=start, backend=backend
    )
    k = len(c)
    plan = entropic.plan().double()
    plan *= (1 / k / plan.sum(1)).clamp_max_(1)[:, None]
    plan *= (1 / sinks / plan.sum(0)).clamp_max_(1)
    rows, columns = 1 / k - plan.sum(1), 1 / sinks - plan.sum(0)
    c = c.double()
    missing = float(rows.sum())
    value = float((plan * c).sum())
    value += float(rows @ c @ columns) / missing if missing > 0 else 0.0
    u = entropic.f.double()
    f = sink_duals(blocks, u, sinks)
    # The largest u that f allows.
    u = torch.cat([(block.double() - f).amin(1) for _, block in blocks()])
    return CertifiedPlan(value, max(0.0, value - dual_value(u, f)), u)
