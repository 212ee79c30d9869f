"""Entropic transport by POT's documented calls: test_compat_programs.py runs it with and without flashcoreset.compat."""

import numpy as np
import ot
import torch
from ot.bregman import empirical_sinkhorn_divergence, sinkhorn_log

rng = np.random.default_rng(0)
x, y = rng.standard_normal((30, 3)), rng.standard_normal((25, 3)) + 0.5
a, b = ot.unif(30), ot.unif(25)
M = ot.dist(x, y)
M /= M.max()

for method in ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"):
    plan = ot.sinkhorn(a, b, M, 0.1, method=method)
    print(method, plan.shape, plan.dtype, np.round((M * plan).sum(), 5), np.round(plan[0, :3] * 1e3, 3))
plan, log = sinkhorn_log(a, b, M, 0.1, log=True)
print(sorted(log), np.round(ot.sinkhorn2(a, b, M, 0.1), 5))
print(np.round(ot.unbalanced.sinkhorn_unbalanced2(a, b, M, 0.1, 1.0), 3))
print(np.round(empirical_sinkhorn_divergence(x, y, 1.0), 4))

cost = torch.tensor(M, requires_grad=True)
loss = ot.solve(cost, torch.tensor(a), torch.tensor(b), reg=0.1).value_linear
loss.backward()
print(type(loss).__name__, round(loss.item(), 5), torch.round(cost.grad[0, :2], decimals=3).tolist())

exact = ot.solve(M, a, b)  # no entropy: POT's own
print(round(float(exact.value), 6), np.round(ot.emd2(a, b, M), 6))
