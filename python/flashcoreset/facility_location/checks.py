"""Checks of the arguments of facility_location(): types, shapes and options; how many picks each group gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.errors import InputWarning, warn_caller
from flashcoreset._core.tensor import (
    as_csr,
    as_int64,
    as_integer,
    as_matrix,
    as_number,
    as_vector,
    canonical_csr,
    is_sparse,
    one_of,
    same_device,
)
from flashcoreset.facility_location.problem import MATRICES, METRICS, Request

METHODS = ("lazy", "naive", "stochastic")


def check_request(r: Request) -> None:
    """Checks the types, shapes and options of what a caller passed, and brings each argument into the form that `Request` says.
    Values are not looked at: under torch.compile there are none."""
    one_of(r.metric, "metric", METRICS)
    one_of(r.method, "method", METHODS)
    # With groups, clients that are passed belong to every group; without groups, passing `x` is the default.
    if r.clients is r.x and r.groups is None and r.metric not in MATRICES:
        r.clients = None
    n, m = _check_matrix(r)
    device = r.x.device
    if r.metric in MATRICES:
        if r.clients is not None:
            raise ValueError(
                f"clients must be None with metric {r.metric!r}, where they are the columns of x"
            )
        if r.groups is not None and n != m:
            raise ValueError(f"x must be square for groups with metric {r.metric!r}, got shape {(n, m)}")
    elif r.clients is None:
        m = n
    else:
        r.clients = as_matrix(r.clients, "clients")
        same_device(r.clients, "clients", device)
        if r.clients.dtype != r.x.dtype:
            raise TypeError(f"clients must have the dtype of x, {r.x.dtype}, got {r.clients.dtype}")
        if r.clients.shape[1] != m:
            raise ValueError(f"clients must have {m} columns as x has, got shape {tuple(r.clients.shape)}")
        m = r.clients.shape[0]
    if r.weights is not None:
        r.weights = as_vector(r.weights, "weights", device, integers=False, length=m)
    if r.preselected is not None:
        r.preselected = as_vector(r.preselected, "preselected", device, integers=True)
        if r.preselected.shape[0] == 0:
            r.preselected = None
    taken = 0 if r.preselected is None else r.preselected.shape[0]
    r.k, r.groups, r.labels, r.budgets = check_picks(n, r.k, r.groups, r.budgets, device, taken, r.labels)
    r.epsilon = as_number(r.epsilon, "epsilon")
    if not 0 < r.epsilon < 1:
        raise ValueError(f"epsilon must be in (0, 1), got {r.epsilon}")
    r.memory_budget = check_memory_budget(r.memory_budget)
    if r.offset is not None:
        r.offset = as_number(r.offset, "offset")
        if r.metric not in DISTANCES and r.metric != "precomputed_distance":
            raise ValueError(f"offset is for distances; metric {r.metric!r} takes None, got {r.offset}")
        if not 0 <= r.offset <= torch.finfo(r.dtype).max:
            raise ValueError(f"offset must be >= 0 and in the range of the dtype of x, got {r.offset}")


def _check_matrix(r: Request) -> tuple[int, int]:
    """Checks `x`; returns its shape."""
    if (r.crow is None) != (r.col is None):
        raise ValueError("crow and col must be given together, or neither of them")
    if r.crow is not None and r.col is not None:
        csr = canonical_csr(r.crow, r.col, r.x.detach(), (r.crow.shape[0] - 1, r.columns), "x")
    elif is_sparse(r.x):
        if r.metric != "precomputed":
            raise TypeError(
                f"x must be dense for metric {r.metric!r}; a sparse matrix is one of similarities, for metric 'precomputed'"
            )
        csr = as_csr(r.x, "x")
    else:
        r.x = as_matrix(r.x, "x")
        return r.x.shape[0], r.x.shape[1]
    r.x, r.crow, r.col, r.columns = csr.values, csr.crow, csr.col, csr.shape[1]
    return csr.shape


def check_seed(value: Any) -> str:
    seed = as_integer(value, "seed")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    return str(seed)


def check_memory_budget(value: Any) -> int:
    budget = as_integer(value, "memory_budget")
    if budget < 0:
        raise ValueError(f"memory_budget must be >= 0 bytes, got {budget}")
    return min(budget, 2**62)  # more than there is, and the kernels' 64-bit sums still hold it


def check_picks(
    n: int,
    k: Any,
    groups: Any,
    budgets: Any,
    device: torch.device,
    preselected: int = 0,
    labels: Tensor | None = None,
) -> tuple[int, Tensor | None, Tensor | None, Tensor | None]:
    """How many of `n` candidates are to be picked, groups [n], and the labels and counts [G] of budgets, whose `labels` are
    given if they were found before; types and shapes checked."""
    total = None
    if groups is not None:
        groups = as_vector(groups, "groups", device, integers=True, length=n)
    elif budgets is not None:
        raise ValueError("budgets need groups, got groups=None")
    if labels is not None:
        budgets = dict(zip(labels.tolist(), budgets.tolist(), strict=True))
    if budgets is not None:
        labels, budgets, total = _check_budgets(budgets, device, k)
    if k is not None:
        k = as_integer(k, "k")
    if budgets is not None:
        if k is not None and total is not None and k != total:
            raise ValueError(f"k must be the sum of the budgets, {total}, or None, got {k}")
        k = total if k is None else k
    if k is None:
        raise TypeError("k must be an int unless budgets are given, got None")
    left = n - preselected
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if k > left:
        among = f"{n} candidates less {preselected} preselected" if preselected else f"{n} candidates"
        raise ValueError(f"k must be at most {left} ({among}), got {k}")
    return k, groups, labels, budgets


def _check_budgets(budgets: Any, device: torch.device, k: Any) -> tuple[Tensor, Tensor, int | None]:
    """Labels [G], counts [G] and the sum of the counts (None if it is not known yet, under
    torch.compile)."""
    if isinstance(budgets, Mapping):
        keys = [as_int64(label, "a label in budgets") for label in budgets]
        counts = [as_int64(count, f"budgets[{label}]") for label, count in budgets.items()]
        labels = torch.tensor(keys, dtype=torch.int64, device=device)
        return labels, torch.tensor(counts, dtype=torch.int64, device=device), sum(counts)
    vector = as_vector(budgets, "budgets", device, integers=True)
    labels = torch.arange(vector.shape[0], device=device)
    if isinstance(budgets, (list, tuple)):
        return labels, vector, sum(as_integer(count, "a count in budgets") for count in budgets)
    if torch.compiler.is_compiling():
        if k is None:
            raise ValueError("k is needed beside a tensor of budgets under torch.compile, got None")
        return labels, vector, None
    return labels, vector, int(vector.sum())


def group_members(
    k: int, groups: Tensor, labels: Tensor | None, budgets: Tensor | None, preselected: Tensor | None = None
) -> list[tuple[Tensor, int]]:
    """For each label, ascending: its members, ascending, and how many of them to pick."""
    order = torch.argsort(groups, stable=True)
    present, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    rows = order.split(sizes.tolist())
    in_groups = present.tolist()
    free = sizes.clone()
    if preselected is not None:
        free -= torch.bincount(torch.searchsorted(present, groups[preselected]), minlength=len(in_groups)).to(
            free.device
        )
    if budgets is None or labels is None:
        counts = allocate_budgets(free, k).tolist()
        return list(zip(rows, counts, strict=True))

    budget_of = dict(zip(labels.tolist(), budgets.tolist(), strict=True))
    for label, budget in budget_of.items():
        if budget < 0:
            raise ValueError(f"budgets must be >= 0, got {budget} for label {label}")
        if budget > 0 and label not in in_groups:
            raise ValueError(f"budgets: {budget} asked of label {label}, which no candidate has in groups")
    if sum(budget_of.values()) != k:
        raise ValueError(f"k must be the sum of the budgets, {sum(budget_of.values())}, got {k}")
    for label, size, left in zip(in_groups, sizes.tolist(), free.tolist(), strict=True):
        if label not in budget_of:
            raise ValueError(
                f"budgets must name every label in groups, got none for label {label} (0 takes none of it)"
            )
        if budget_of[label] > left:
            raise ValueError(
                f"budgets: {budget_of[label]} asked of label {label}, whose group has {left} candidates left "
                f"({size} less {size - left} preselected)"
            )
    return [(group, budget_of[label]) for group, label in zip(rows, in_groups, strict=True)]


def warn_of_distances(s: Tensor) -> None:
    """Warns the caller if the similarities `s` [n, m] look like distances: square, 0 on the diagonal, and positive elsewhere."""
    n, m = s.shape
    if n != m or n == 1 or s[0, 0].item() != 0 or bool(s.diagonal().any()):
        return
    if all(bool(((part > 0).sum(1) == n - 1).all()) for part in s.split(max(1, (1 << 22) // n))):
        warn_caller(
            "x has zeros on its diagonal and positive numbers elsewhere, as distances have, but metric 'precomputed' takes it "
            "as similarities; for distances pass metric='precomputed_distance'",
            InputWarning,
        )
