"""The cases of facility location, and the oracle: brute force in NumPy float64, written from the definition
alone.

The oracle follows a given sequence of picks and asks of each pick whether any other candidate would have been better by more
than rounding, so that either of two candidates that tie within rounding is accepted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flashcoreset as fc

# Where the tests of the GPU kernels put their tensors: "cuda" under `make gpu`; on the CPU an emulator or an interpreter runs them.
DEVICE = os.environ.get("FLASHCORESET_TEST_DEVICE", "cpu")

DISTANCES = ("euclidean", "sqeuclidean", "l1")
POINT_METRICS = ("cosine", "dot", *DISTANCES)
METRICS = (*POINT_METRICS, "precomputed")
SIZES = (1, 7, 97, 1025)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Largest error of a gain or objective allowed, relative to sum_i w_i * max_j |s(j, i) - floor|; the
# comment has the worst error seen over all cases, backends and builds. Half types are exact inputs to a
# float32 computation.
TOLERANCE = {
    torch.float16: 5e-7,
    torch.bfloat16: 5e-7,
    torch.float32: 5e-7,
    torch.float64: 2e-15,
}


@dataclass(frozen=True, eq=False)
class Case:
    """The arguments of one call."""

    name: str
    x: Any
    k: int | None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def metric(self) -> str:
        return self.options.get("metric", "cosine")


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def to_cpu(selection: fc.Selection) -> fc.Selection:
    names = ("indices", "gains", "weights", "assignment")
    return replace(selection, **{name: getattr(selection, name).cpu() for name in names})


def locate(x: Any, k: int | None, *, backend: str, **options: Any) -> fc.Selection:
    """facility_location, with the arguments of a GPU's backend on DEVICE; the result on the CPU."""
    if backend in ("cuda", "triton"):
        x, options = on_device(x), {name: on_device(value) for name, value in options.items()}
    return to_cpu(fc.facility_location(x, k, backend=backend, **options))


def select_on_device(case: Case, backend: str, **more: Any) -> fc.Selection:
    """The case's call with its tensors on DEVICE, the result on the CPU."""
    options = {name: on_device(value) for name, value in {**case.options, **more}.items()}
    return to_cpu(fc.facility_location(on_device(case.x), case.k, backend=backend, **options))


def points(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def data(metric: str, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Points, or for precomputed a square matrix that is not symmetric."""
    return points(n, n if metric == "precomputed" else 5, seed, dtype)


def plain_cases() -> list[Case]:
    """Every metric, size and dtype."""
    return [
        Case(
            f"{metric}-{n}-{str(dtype).removeprefix('torch.')}",
            data(metric, n, n, dtype),
            min(n, 9),
            {"metric": metric},
        )
        for metric in METRICS
        for n in SIZES
        for dtype in DTYPES
    ]


def variant_cases() -> list[Case]:
    """Every metric with each of the other arguments, and with awkward data."""
    return [
        case
        for metric in METRICS
        for dtype in (torch.float32, torch.float64)
        for case in _variants(metric, dtype)
    ]


def _variants(metric: str, dtype: torch.dtype) -> list[Case]:
    n, k = 97, 11
    x = data(metric, n, 1, dtype)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) * 3
    weights[::5] = 0
    groups = torch.randint(-1, 3, (n,), generator=generator)
    preselected = torch.tensor([5, 90, 13])
    twice = x.clone()
    if metric == "precomputed":
        twice[n // 2 :] = x[: n - n // 2]
        twice[:, n // 2 :] = twice[:, : n - n // 2].clone()
    else:
        twice[n // 2 :] = x[: n - n // 2]
    zeros = x.clone()
    zeros[::3] = 0
    # Squares of the first leave float32, which only cosine has to support.
    large, tiny = (1e30, 1e-30) if metric == "cosine" else (1e15, 1e-15)
    mixed = x * torch.tensor([large, 1.0, tiny], dtype=dtype).repeat(33)[:n, None]
    strided = torch.zeros(2 * n, 2 * x.shape[1], dtype=dtype)[::2, 1::2].copy_(x)
    variants = {
        "weights": (x, k, {"weights": weights}),
        "integer-weights": (x, k, {"weights": torch.arange(n)}),
        "groups": (x, None, {"groups": groups, "budgets": {-1: 4, 0: 1, 1: 0, 2: 7}}),
        "groups-default-budgets": (x, k, {"groups": groups, "preselected": preselected}),
        "groups-weights-preselected": (
            x, 10, {"groups": groups + 1, "budgets": [3, 3, 0, 4], "weights": weights, "preselected": preselected},
        ),
        "preselected": (x, k, {"preselected": preselected}),
        "all": (x, n, {}),
        "all-but-preselected": (x, n - 3, {"preselected": preselected}),
        "duplicates": (twice, k, {}),
        "identical": (x[:1].repeat(n, 1) if metric != "precomputed" else torch.ones_like(x), k, {}),
        "zeros": (zeros, k, {}),
        "only-zeros": (torch.zeros_like(x), k, {}),
        "mixed-magnitudes": (mixed, k, {}),
        "large": (x * large, k, {}),
        "tiny": (x * tiny, k, {}),
        "transposed": (x.T.contiguous().T, k, {}),
        "strided": (strided, k, {}),
    }  # fmt: skip
    if metric == "precomputed":
        variants["rectangular"] = (x[:, :31], k, {"weights": weights[:31], "preselected": preselected})
        variants["negative"] = (-x.abs() - 1, k, {})
        variants["wide"] = (x[:31], k, {})
    else:
        clients = points(41, 5, 3, dtype)
        variants["clients"] = (x, k, {"clients": clients})
        variants["clients-weights-preselected"] = (
            x, k, {"clients": clients, "weights": weights[:41], "preselected": preselected},
        )  # fmt: skip
        variants["clients-groups"] = (
            x, 10, {"clients": clients, "groups": groups, "weights": weights[:41], "preselected": preselected},
        )  # fmt: skip
        variants["one-client"] = (x, k, {"clients": clients[:1]})
        variants["more-clients"] = (x[:7], 5, {"clients": points(311, 5, 4, dtype)})
        variants["one-feature"] = (x[:, :1], k, {})
        variants["wide"] = (points(33, 700, 5, dtype), k, {})
    if metric in DISTANCES:
        variants["small-offset"] = (x, k, {"offset": 1.0})
        variants["large-offset"] = (x, k, {"offset": 100.0, "preselected": preselected})
    label = f"{metric}-{str(dtype).removeprefix('torch.')}"
    return [
        Case(f"{label}-{name}", data_, k_, {"metric": metric, **options})
        for name, (data_, k_, options) in variants.items()
    ]


def similarities(x: Any, clients: Any, metric: str, offset: float | None) -> np.ndarray:
    """s [n, m] in float64."""
    a = _float64(x)
    b = a if clients is None else _float64(clients)
    if metric == "precomputed":
        return a
    if metric == "cosine":
        a, b = (v / np.maximum(np.abs(v).max(1, keepdims=True), 1e-300) for v in (a, b))
        a, b = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300) for v in (a, b))
        return a @ b.T
    if metric == "dot":
        return a @ b.T
    difference = np.abs(a[:, None] - b[None])
    distance = difference.sum(2) if metric == "l1" else (difference**2).sum(2)
    if metric == "euclidean":
        distance = np.sqrt(distance)
    assert offset is not None
    return offset - distance


def _float64(value: Any) -> np.ndarray:
    return torch.as_tensor(value).double().numpy()


def worst_error(case: Case, selection: Any) -> float:
    """Checks `selection` against the definition; returns the largest error of a gain or of the objective,
    relative to the largest f(S) that could be. Asserts equality where results are exact."""
    options = case.options
    x = _float64(case.x)
    s = similarities(case.x, options.get("clients"), case.metric, selection.offset)
    n, m = s.shape
    self_clients = "clients" not in options and (case.metric != "precomputed" or n == m)
    weights = _float64(options["weights"]) if "weights" in options else np.ones(m)
    preselected = options.get("preselected", torch.empty(0, dtype=torch.int64)).tolist()
    groups = options["groups"].numpy() if "groups" in options else np.zeros(n, dtype=np.int64)
    picks = selection.indices.tolist()
    gains, won = _float64(selection.gains), _float64(selection.weights)
    assignment = selection.assignment.numpy()

    k = sum(_counts(options["budgets"])) if "budgets" in options else case.k
    assert len(picks) == len(gains) == len(won) == k
    assert len(set(picks)) == k
    assert not set(picks) & set(preselected)
    assert assignment.shape == (m,)
    assert x.shape[0] == n
    labels = groups[picks]
    assert (np.diff(labels) >= 0).all(), "picks come group by group in label order"
    if "budgets" in options:
        budgets = options["budgets"]
        for label in np.unique(groups):
            assert (labels == label).sum() == budgets[int(label)]

    reach = float((weights * np.abs(s).max(0)).sum()) or 1.0
    tolerance = TOLERANCE[torch.as_tensor(case.x).dtype] * reach
    worst = 0.0
    objective = 0.0
    for label in np.unique(groups):
        members = np.flatnonzero(groups == label)
        clients = members if self_clients and "groups" in options else np.arange(m)
        own = s[np.ix_(members, clients)]
        w = weights[clients]
        fixed = [p for p in preselected if groups[p] == label]
        best = np.maximum(0, s[np.ix_(fixed, clients)].max(0)) if fixed else np.zeros(len(clients))
        open_ = ~np.isin(members, preselected)
        for position in np.flatnonzero(labels == label):
            place = int(np.searchsorted(members, picks[position]))
            every = np.maximum(own - best, 0) @ w
            worst = max(worst, abs(gains[position] - every[place]), every[open_].max() - every[place])
            open_[place] = False
            best = np.maximum(best, own[place])
        objective += float(best @ w)
    if not self_clients and "groups" in options:  # f of all picks together
        everything = picks + preselected
        objective = float(np.maximum(0, s[everything].max(0)) @ weights)
    worst = max(worst, abs(selection.objective - objective))

    served = assignment >= 0
    expected = np.zeros(k)
    np.add.at(expected, assignment[served], weights[served])
    np.testing.assert_allclose(won, expected, rtol=1e-6)
    slack = 10 * TOLERANCE[torch.as_tensor(case.x).dtype] * max(1e-300, np.abs(s).max())
    # [k, m] similarities of the picks, and [p, m] of the preselected, if they may serve the client.
    same = (groups[:, None] == groups[None]) if self_clients else np.ones((n, m), dtype=bool)
    reachable = np.where(same, s, -np.inf)
    picked, fixed_best = reachable[picks], reachable[preselected].max(0, initial=-np.inf)
    most, covered = picked.max(0), np.maximum(0, fixed_best)
    position = np.where(served, assignment, 0)
    serving = picked[position, np.arange(m)]
    itself = np.zeros(m, dtype=bool)
    if self_clients:
        own_value = s[picks, picks]
        wins, may_lose = fixed_best[picks] <= own_value, fixed_best[picks] >= own_value - slack
        itself[picks] = wins
        assert ((assignment[picks] == np.arange(k)) | ~wins | may_lose).all(), "a pick serves itself"
    assert (itself | served | (most <= covered + slack)).all()
    assert (itself | ~served | (serving >= np.maximum(most, covered) - slack)).all()
    assert worst <= tolerance, (
        f"{case}: error {worst / reach:.2e} of {TOLERANCE[torch.as_tensor(case.x).dtype]:.0e}"
    )
    return worst / reach


def _counts(budgets: Any) -> list[int]:
    return list(budgets.values()) if isinstance(budgets, dict) else list(budgets)


def for_interpreter(cases: list[Case], k: int) -> list[Case]:
    """`cases` at sizes that a Triton kernel in the interpreter can bear, where a tile takes a millisecond per feature: n <=
    130, at most `k` picks; for n = 1,025 one case per metric, 2 picks; for many features one more than fit one chain of a sum,
    1 pick."""
    small = []
    for case in cases:
        n, is_wide = case.x.shape[0], case.metric != "precomputed" and case.x.shape[1] > 256
        if n > 130 and case.x.dtype != torch.float32:
            continue
        options = dict(case.options)
        picks = None if case.k is None else min(case.k, 1 if is_wide else 2 if n > 130 else k)
        if "budgets" in options:
            budgets = options["budgets"]
            if isinstance(budgets, dict):
                options["budgets"] = {label: count // 2 for label, count in budgets.items()}
            else:
                options["budgets"] = [count // 2 for count in budgets]
            picks = None
        small.append(Case(case.name, case.x[:, :257] if is_wide else case.x, picks, options))
    return small


PLAIN, VARIANTS = plain_cases(), variant_cases()
