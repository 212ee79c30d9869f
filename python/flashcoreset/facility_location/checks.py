"""Checks of the arguments of facility_location(): types, shapes and options; how many picks each group gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.constants import DISTANCES
from flashcoreset._core.errors import InputWarning, warn_caller
from flashcoreset._core.inputs import numbered_labels
from flashcoreset._core.results import Selection
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
    promoted,
    same_device,
)
from flashcoreset.facility_location.problem import MATRICES, METRICS, Request

METHODS = ("lazy", "naive", "stochastic")


def check_request(r: Request) -> None:
    """Checks the types, shapes and options of what a caller passed, and brings each argument into the form that `Request` says.
    Values are not looked at: under torch.compile there are none."""
    one_of(r.metric, "metric", METRICS)
    one_of(r.method, "method", METHODS)
    r.groups, r.budgets, r.caps = numbered_labels(r.groups, budgets=r.budgets, caps=r.caps)
    # With groups, clients that are passed belong to every group; without groups, passing `x` is the default.
    if r.clients is r.x and not r.is_grouped and r.metric not in MATRICES:
        r.clients = None
    n, m = _check_matrix(r)
    device = r.x.device
    if r.metric in MATRICES:
        if r.clients is not None:
            raise ValueError(
                f"clients must be None with metric {r.metric!r}, where they are the columns of x"
            )
        if r.is_grouped and n != m:
            raise ValueError(f"x must be square for groups with metric {r.metric!r}, got shape {(n, m)}")
    elif r.clients is None:
        m = n
    else:
        r.clients = as_matrix(r.clients, "clients")
        same_device(r.clients, "clients", device)
        r.x, r.clients = promoted(r.x, r.clients)
        if r.clients.shape[1] != m:
            raise ValueError(f"clients must have {m} columns as x has, got shape {tuple(r.clients.shape)}")
        m = r.clients.shape[0]
    if r.weights is not None:
        r.weights = as_vector(r.weights, "weights", device, integers=False, length=m)
    r.preselected = _indices(r.preselected, "preselected", device, n)
    taken = 0 if r.preselected is None else r.preselected.shape[0]
    if r.k is None and r.budgets is None and (r.cost_budget is not None or r.stop_gain is not None):
        r.k = n - taken
    r.k, r.groups, r.labels, r.budgets = check_picks(n, r.k, r.groups, r.budgets, device, taken, r.labels)
    check_limits(r, n)
    if r.min_distance is not None and r.metric in MATRICES and n != m:
        raise ValueError(f"x must be square for min_distance with metric {r.metric!r}, got shape {(n, m)}")
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


def check_limits(r: Request, n: int) -> None:
    """Checks what rules candidates out, ends the picks, or says what they cost, for `n` candidates; see `check_request`."""
    if not isinstance(r.cost_sensitive, bool):
        raise TypeError(f"cost_sensitive must be True or False, got {type(r.cost_sensitive).__name__}")
    r.rounds = as_integer(r.rounds, "rounds")
    if r.rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {r.rounds}")
    if r.costs is None and not r.is_limited:
        return
    device = r.x.device
    r.exclude = _indices(r.exclude, "exclude", device, n)
    if r.costs is not None:
        r.costs = as_vector(r.costs, "costs", device, integers=False, length=n)
        if r.is_grouped:
            raise ValueError("costs are for one problem, got groups, each of which is a problem of its own")
    for name, least in (("cost_budget", 0.0), ("stop_gain", -math.inf), ("min_distance", 0.0)):
        value = getattr(r, name)
        if value is None:
            continue
        value = as_number(value, name)
        if not value >= least:
            raise ValueError(f"{name} must be a number{' >= 0' if least == 0 else ''}, got {value}")
        setattr(r, name, value)
    if r.cost_budget is not None and r.costs is None:
        raise ValueError("cost_budget needs costs, got costs=None")
    for name, is_given in (("stop_gain", r.stop_gain is not None), ("rounds", r.rounds > 1)):
        if is_given and r.method == "stochastic":
            raise ValueError(
                f"{name} needs method 'lazy' or 'naive', got 'stochastic', whose gains are not the largest ones"
            )
    if r.min_distance is not None and r.metric in ("dot", "precomputed"):
        raise ValueError(f"min_distance needs distances, of which metric {r.metric!r} has none")
    if r.caps is None:
        return
    if r.groups is None:
        raise ValueError("caps need groups, the labels that they cap, got groups=None")
    if r.budgets is not None:
        raise ValueError("caps and budgets exclude each other: with budgets each group is its own problem")
    if r.cap_labels is None:
        r.cap_labels, r.caps, _ = _check_budgets(r.caps, device, None, "caps")


def _indices(value: Any, name: str, device: torch.device, n: int) -> Tensor | None:
    """Candidates [p] int64 from indices or a boolean mask [n]; None if there are none."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, bool) for entry in value):
        value = torch.tensor(value, device=device)
    is_mask = (
        value.dtype is torch.bool if isinstance(value, Tensor) else str(getattr(value, "dtype", "")) == "bool"
    )
    if not is_mask:
        found = as_vector(value, name, device, integers=True)
        return found if found.shape[0] else None
    mask = torch.as_tensor(value)
    same_device(mask, name, device)
    if mask.shape != (n,):
        raise ValueError(
            f"{name} must have shape {(n,)} as a mask, one entry per candidate, got {tuple(mask.shape)}"
        )
    if torch.compiler.is_compiling():
        raise TypeError(f"{name} must be indices under torch.compile, where a mask has no values yet")
    found = mask.nonzero()[:, 0]
    return found if found.shape[0] else None


def excluded_mask(r: Request) -> Tensor:
    """The candidates [n] bool in `exclude`, whose values are checked."""
    assert r.exclude is not None
    n = r.x.shape[0] if r.crow is None else r.crow.shape[0] - 1
    check_exclude(r.exclude, n)
    mask = torch.zeros(n, dtype=torch.bool, device=r.x.device)
    mask[r.exclude] = True
    return mask


def check_exclude(exclude: Tensor, n: int) -> None:
    outside = (exclude < 0) | (exclude >= n)
    if outside.any():
        raise ValueError(f"exclude must be in [0, {n}), got {int(exclude[outside][0])}")


def check_left(r: Request, n: int) -> None:
    """Raises ValueError if fewer than k of `n` candidates are neither excluded nor preselected, and k picks have to come back."""
    parts = [part for part in (r.exclude, r.preselected) if part is not None]
    left = n - len(torch.cat(parts).unique()) if parts else n
    if (
        r.k > left
        and r.cost_budget is None
        and r.stop_gain is None
        and r.caps is None
        and r.min_distance is None
    ):
        raise ValueError(
            f"k must be at most {left} ({n} candidates less {n - left} preselected or excluded), got {r.k}"
        )


def check_costs(costs: Tensor) -> None:
    bad = ~((costs >= 2.0**-900) & (costs <= 2.0**900))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"costs must be > 0, in [2^-900, 2^900], got {float(costs[at])} at position {at}")


def check_no_limits(r: Request) -> None:
    """Raises ValueError for what leaves the number of picks open, which a graph has to know."""
    for name in ("cost_budget", "stop_gain", "caps", "min_distance"):
        if getattr(r, name) is not None:
            raise ValueError(f"{name} is not for torch.compile: how many picks come back depends on values")
    if r.rounds > 1:
        raise ValueError(
            f"rounds is not for torch.compile: how many rounds begin depends on values; leave it 1, got {r.rounds}"
        )


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


def _check_budgets(
    budgets: Any, device: torch.device, k: Any, name: str = "budgets"
) -> tuple[Tensor, Tensor, int | None]:
    """Labels [G], counts [G] and the sum of the counts (None if it is not known yet, under
    torch.compile)."""
    if isinstance(budgets, Mapping):
        keys = [as_int64(label, f"a label in {name}") for label in budgets]
        counts = [as_int64(count, f"{name}[{label}]") for label, count in budgets.items()]
        labels = torch.tensor(keys, dtype=torch.int64, device=device)
        return labels, torch.tensor(counts, dtype=torch.int64, device=device), sum(counts)
    vector = as_vector(budgets, name, device, integers=True)
    labels = torch.arange(vector.shape[0], device=device)
    if isinstance(budgets, (list, tuple)):
        return labels, vector, sum(as_integer(count, f"a count in {name}") for count in budgets)
    if torch.compiler.is_compiling():
        if k is None:
            raise ValueError("k is needed beside a tensor of budgets under torch.compile, got None")
        return labels, vector, None
    return labels, vector, int(vector.sum())


def group_members(
    k: int,
    groups: Tensor,
    labels: Tensor | None,
    budgets: Tensor | None,
    preselected: Tensor | None = None,
    excluded: Tensor | None = None,
) -> list[tuple[Tensor, int]]:
    """For each label, ascending: its members, ascending, and how many of them to pick."""
    order = torch.argsort(groups, stable=True)
    present, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    rows = order.split(sizes.tolist())
    in_groups = present.tolist()
    free = sizes.clone()
    if preselected is not None or excluded is not None:
        taken = torch.zeros_like(groups, dtype=torch.bool) if excluded is None else excluded.clone()
        if preselected is not None:
            taken[preselected] = True
        free -= torch.bincount(torch.searchsorted(present, groups[taken]), minlength=len(in_groups))
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
                f"({size} less {size - left} preselected{'' if excluded is None else ' or excluded'})"
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


def warn_of_no_gain(r: Request, found: Selection) -> None:
    """Warns the caller if picks serve no client: with clients of their own, a few candidates may serve all of them as well as all
    candidates can."""
    n, m = r.matrix.shape if r.clients is None else (r.x.shape[0], r.clients.shape[0])
    if r.clients is None and (r.metric not in MATRICES or n == m):
        return  # a pick that gains nothing serves itself
    warn_of_idle_picks(found, r.method == "stochastic")


def warn_of_idle_picks(found: Selection, stochastic: bool) -> None:
    """Warns the caller if picks gain nothing, and says what to do."""
    k = len(found.gains)
    gained = int(torch.count_nonzero(found.gains))
    if gained == k:
        return
    begun = 1 if found.served_by is None else len(found.served_by)
    if not gained:
        remedy = "pass clients that some candidate is similar to"
    elif stochastic:
        remedy = f"pass method='lazy', or k={gained}"
    else:
        remedy = (
            f"pass rounds={-(-k * begun // gained)} or more for picks that serve each client again, or k={gained} or a stop_gain "
            "> 0 for those alone that gain"
        )
    warn_caller(
        f"{gained} of {k} picks gain something: no client is served better by the other {k - gained}, which are the lowest free "
        f"indices; {remedy}",
        InputWarning,
    )
