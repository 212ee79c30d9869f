"""GORACS: the training items that stand for a validation set, by optimal transport and gradient norms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.labels import Labels, joint_labels
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.progress import Progress, Report, check_progress
from flashcoreset._core.results import Coreset
from flashcoreset._core.scaling import exponent_into, scale, times_power
from flashcoreset._core.tensor import (
    as_integer,
    as_matrix,
    as_number,
    as_vector,
    check_finite,
    compute_dtype,
    one_of,
    promoted,
)
from flashcoreset.facility_location.backend import Kernels, choose
from flashcoreset.methods.goracs.descent import KEPT_BYTES, Descent, Options, pool_rows
from flashcoreset.methods.goracs.exact_descent import HELD_BYTES, ExactDescent, costs_bytes, transport_bytes
from flashcoreset.methods.goracs.exact_transport import load_pot
from flashcoreset.methods.goracs.transport_costs import (
    Cover,
    TransportCosts,
    cover_bytes,
    cover_picks,
    largest_distance,
)

SOLVERS = ("exact", "sinkhorn")
SCALINGS = ("class", "global")
NORM_SCALES = ("max", "spread")


def goracs(
    train: Any,
    valid: Any,
    grad_norms: Any = None,
    k: int | None = None,
    *,
    lam: float = 0.0,
    norm_clip: float | None = None,
    norm_scale: str = "max",
    max_exchanges: int = 100,
    n_candidates: int = 30,
    max_solves: int | None = None,
    time_limit: float | None = None,
    tol: float = 0.0,
    train_labels: Any = None,
    valid_labels: Any = None,
    scaling: str = "class",
    solver: str = "exact",
    seed: int = 0,
    reg: float = 1e-3,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Report | bool | None = None,
) -> Coreset:
    """Takes the k training items that a validation set is transported to at the least cost.

    The cost of a training item s for a validation item v is C_sv: their Euclidean distance, divided by the
    largest of all, less lam * grad_norms_s / max(grad_norms); then shifted and scaled so that C lies in [0, 1].
    The score of k items is the cost of the optimal transport between the uniform distributions on them and on the
    validation items. The score is lowered in two stages:

    1. A greedy k-medoid cover of the validation items goes on until k picks serve at least one of them each,
       and drops picks that serve none. If at most k training items are nearest to any validation item, the cover
       stops at k picks and keeps them all; likewise if the cover is complete before k picks serve.
    2. Members are exchanged for other items. The dual variables of the transport bound from below what each
       exchange would lead to. The pairs of the `n_candidates` most promising removals and additions are tried in
       the order of their bounds; pairs that do not touch the same validation items are tried together, and
       kept if a new transport problem shows a lower score, else halved in number. If none of these pairs helps, as many
       others follow. The stage ends after `max_exchanges`, when no candidate helps, or when no bound of any
       exchange is below the score: then no single exchange helps.

    Args:
        train: [n, d] features of the training items, float16, bfloat16, float32 or float64 (half types compute
            in float32).
        valid: [V, d] features of the validation items, same dtype and device.
        grad_norms: [n] gradient norms of the training items, >= 0; None where lam is 0.
        k: the number of items to take, 1 <= k <= n.
        lam: weight of the gradient norms, >= 0. With wrong labels in the data, whose gradients are large, a larger lam takes
            more of them.
        norm_clip: a quantile in (0, 1]: larger norms count as that, since a single outlier would make all others alike.
        norm_scale: "max" divides norms by the largest, as published. "spread" scales them so that they vary over the training
            items as much as the items' mean distances do (by their standard deviations): with lam=1 both weigh the same.
        max_exchanges: the most exchanges to make, >= 0; with labels, in each class.
        n_candidates: the number of removals and of additions to pair, >= 1.
        max_solves: the most transport problems to solve, >= 1, the one after stage 1 included; with labels, in each class.
        time_limit: seconds from the beginning after which no further transport problem is begun; stage 1 is always finished.
            With labels, each class gets an equal share of what is left. The result depends on the machine's speed then.
        tol: the share of the score by which an exchange has to lower it, >= 0; smaller gains are not looked for.
        train_labels: [n] class labels, integers, strings or other values that can be sorted. The budget is split by the validation classes' shares
            (`allocate_budgets`, no budget above the class's training items), and each class is a problem of its own.
            A class with a budget of 0 gets no item.
        valid_labels: [V] class labels, of the same kind; both or neither.
        scaling: with labels, what distances and norms are divided by, and quantiles are of: "class", the maxima of each class,
            so that lam weighs the same in all; "global", those of all items.
        solver: "exact" solves the transport problem by shortest augmenting paths and repairs it after each exchange (if the
            members' costs take more than about 1 GB, every score is a solve by POT), "sinkhorn" solves by `fc.sinkhorn`, whose plan is
            rounded to a feasible one.
        seed: 0 <= seed < 2^32. Nothing is drawn at random, so the result does not depend on it.
        reg: the regularisation of "sinkhorn", > 0; costs are in [0, 1].
        memory_budget: bytes for costs and lists; the result does not depend on it. The n x V costs are held if
            they take at most half of it, else computed as needed, a few times.
        backend: "cpu", "cuda" or "triton" (on CUDA tensors), "torch" or None: whose kernels compute distances.
        progress: None, True for a bar, or a callable(done, total) that gets picks and exchanges.

    Returns:
        Coreset: `indices` [k] in the order of the picks, an addition in the place of what it replaced; with
        labels class by class, ascending. `weights`: the number of validation items that an item stands for,
        V / k for all, because the transport is uniform (with labels, V and k are those of its class). `info`: "score",
        "scores" (after stage 1, then after each step that was kept), "exchanges" (their number by then),
        "exact_solves" (0 with "sinkhorn", which has "sinkhorn_solves"), "score_error" (by how much the exact
        score may be lower), "parts" (of the score: "distance", the mean distance of the transport as a share of the
        largest, and "norms", the items' mean norm term; the score is (distance - norms - shift) / scale, with the
        "shift" and the "scale" that bring costs into [0, 1]), "spread" (the standard deviations over the training
        items of their mean "distance" and of their "norms" term: which of the two decides), "picks" (that stage 1 made),
        "certificate" (whether it is proved that no single exchange lowers the score by more than 1e-9 or tol of it),
        "stopped" ("max_exchanges", "max_solves", "time_limit", "certificate" or "candidates": none of the candidates
        helped), "seconds" ({"cover", "exchange"}). With labels "classes"
        holds these entries for each label, "budgets" the counts, "score" and "score_error" are means by the
        classes' shares (each class has a scale of its own), and the rest are sums or hold for all.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for wrong shapes, options out of range, NaN or infinity, `grad_norms` that are negative or, with lam >
            0, missing or all 0 (after `norm_clip`), k > n, and a validation class that no training item has.
        ImportError: if `solver` is "exact", the members' costs take more than about 1 GB, and POT is not installed.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Mei, Chen, Yu, Liang and Yang, "GORACS: Group-level Optimal Transport-guided Coreset Selection for
    LLM-based Recommender Systems", KDD 2025; the bound of an exchange differs from the published one (see
    docs/goracs.md).

    Example:
        >>> import torch, flashcoreset as fc
        >>> train = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
        >>> coreset = fc.goracs(train, torch.tensor([[0.5], [1.5], [9.5], [10.5]]), torch.ones(5), 2)
        >>> coreset.indices, coreset.weights, coreset.info["certificate"]
        (tensor([1, 4]), tensor([2., 2.]), True)
    """
    check_backend(backend)
    check_progress(progress)
    start = time.perf_counter()
    k = _at_least(k, "k", 1)
    options, quantile, seconds = checked_options(
        lam=lam, norm_clip=norm_clip, norm_scale=norm_scale, max_exchanges=max_exchanges, n_candidates=n_candidates, max_solves=max_solves,
        time_limit=time_limit, tol=tol, scaling=scaling, solver=solver, reg=reg, memory_budget=memory_budget, backend=backend,
    )  # fmt: skip
    seed = as_integer(seed, "seed")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    x, y = as_matrix(train, "train"), as_matrix(valid, "valid")
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"valid must have {x.shape[1]} columns as train has, got shape {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"valid is on device {y.device}, but train is on {x.device}; move one of them")
    x, y = promoted(x, y)
    n, device = x.shape[0], x.device
    norms = checked_norms(grad_norms, n, device, options, quantile)
    if k > n:
        raise ValueError(f"k must be <= the {n} rows of train, got {k}")
    if (train_labels is None) != (valid_labels is None):
        missing = "train_labels" if train_labels is None else "valid_labels"
        raise ValueError(f"train_labels and valid_labels must be given together, got {missing}=None")
    labels = None
    if train_labels is not None:
        labels = joint_labels(device, train_labels=(train_labels, n), valid_labels=(valid_labels, y.shape[0]))
    kernels = choose(backend, device)
    check_finite(x, "train")
    check_finite(y, "valid")
    check_norms(norms)
    classes = [(0, torch.arange(n, device=device), torch.arange(len(y), device=device), k)]
    if labels is not None:
        of_train, of_valid = labels
        classes = _split(of_train, of_valid, k)
    dtype = compute_dtype(x.dtype)
    if solver == "exact" and not all(is_held(count, len(own), dtype) for _, _, own, count in classes):
        load_pot()
    together = labels is None or scaling == "global"
    if quantile is not None and together:
        norms = _clipped(norms, quantile)
    parts = {label: norms[members] for label, members, _, _ in classes}
    if quantile is not None and not together:
        parts = {label: _clipped(part, quantile) for label, part in parts.items()}
    if options.lam > 0:
        for label, part in parts.items():
            if not ((norms if together else part) > 0).any():
                where = "" if together or labels is None else f" in class {labels[0].name(label)!r}"
                clip = "" if quantile is None else f" and norm_clip={quantile}"
                raise ValueError(
                    f"grad_norms must not be all 0 with lam > 0{where}, got lam={options.lam}{clip}"
                )

    # With labels: None for the maxima of the class.
    top = float(norms.max()) if together else None
    largest = None
    if labels is not None and together:
        largest = largest_distance(x.to(dtype), y.to(dtype), kernels, options.memory_budget)
        if not math.isfinite(largest):
            raise ValueError("train and valid must have distances in the range of float64; scale them")
    total = k + len(classes) * options.max_exchanges
    indices, weights, infos, done = [], [], {}, 0
    with Progress(progress, total, "goracs") as bar:
        for number, (label, members, own, count) in enumerate(classes):
            whole = labels is None
            part, clients = (x, y) if whole else (x[members], y[own])
            report = _shifted(bar, done)
            options = in_time(options, start, seconds, len(classes) - number)
            begin = time.perf_counter()
            of_class = parts[label]
            most = float(of_class.max()) if top is None else top
            costs = costs_of(part.to(dtype), clients.to(dtype), of_class, options, kernels, most, largest)
            chosen, info = _select(costs, count, options, report, begin)
            indices.append(members[chosen])
            weights.append(torch.full((count,), len(own) / count, dtype=dtype, device=device))
            infos[label] = info
            done += count + options.max_exchanges
            bar.skip(done)  # the exchanges that were not made
    info = infos[0] if labels is None else info_of_classes(infos, classes, labels[0])
    return Coreset(torch.cat(indices), torch.cat(weights), info)


def checked_options(
    *, lam: Any, norm_clip: Any, norm_scale: Any, max_exchanges: Any, n_candidates: Any, max_solves: Any, time_limit: Any, tol: Any,
    scaling: Any, solver: Any, reg: Any, memory_budget: Any, backend: str | None,
) -> tuple[Options, float | None, float | None]:  # fmt: skip
    """The arguments of `goracs` that are no data, checked: the options of stage 2, `norm_clip` and `time_limit`."""
    one_of(solver, "solver", SOLVERS)
    one_of(scaling, "scaling", SCALINGS)
    one_of(norm_scale, "norm_scale", NORM_SCALES)
    options = Options(
        lam=as_number(lam, "lam"),
        max_exchanges=_at_least(max_exchanges, "max_exchanges", 0),
        n_candidates=_at_least(n_candidates, "n_candidates", 1),
        solver=solver,
        reg=as_number(reg, "reg"),
        memory_budget=_at_least(memory_budget, "memory_budget", 1),
        backend=backend,
        norm_scale=norm_scale,
        max_solves=None if max_solves is None else _at_least(max_solves, "max_solves", 1),
        tol=as_number(tol, "tol"),
    )
    seconds = None if time_limit is None else as_number(time_limit, "time_limit")
    if seconds is not None and seconds <= 0:
        raise ValueError(f"time_limit must be > 0 seconds, got {time_limit}")
    if options.tol < 0:
        raise ValueError(f"tol must be >= 0, got {tol}")
    quantile = None if norm_clip is None else as_number(norm_clip, "norm_clip")
    if quantile is not None and not 0 < quantile <= 1:
        raise ValueError(f"norm_clip must be in (0, 1], got {norm_clip}")
    if options.lam < 0:
        raise ValueError(f"lam must be >= 0, got {lam}")
    if options.reg <= 0:
        raise ValueError(f"reg must be > 0, got {reg}")
    return options, quantile, seconds


def in_time(options: Options, start: float, seconds: float | None, classes_left: int) -> Options:
    """The options of the next class, whose share of what is left of the time limit is that of each class after it."""
    if seconds is None:
        return options
    now = time.perf_counter()
    return replace(options, deadline=now + max(0.0, start + seconds - now) / classes_left)


def checked_norms(
    grad_norms: Any, n: int, device: torch.device, options: Options, quantile: float | None
) -> Tensor:
    """The gradient norms [n] float64, zeros if there are none and nothing needs them. Their values are not checked."""
    if grad_norms is not None:
        return as_vector(grad_norms, "grad_norms", device, integers=False, length=n)
    for name, value in (("lam", options.lam), ("norm_clip", quantile)):
        if value:
            raise ValueError(f"grad_norms must be given with {name}={value}, got None")
    return torch.zeros(n, dtype=torch.float64, device=device)


def check_norms(norms: Tensor) -> None:
    check_finite(norms, "grad_norms")
    if (norms < 0).any():
        place = int((norms < 0).nonzero()[0])
        raise ValueError(f"grad_norms must be >= 0, got {float(norms[place])} at position {place}")


_Class = tuple[int, Tensor, Tensor, int]  # the label's code, training items, validation items, budget


def _split(of_train: Labels, of_valid: Labels, k: int) -> list[_Class]:
    """The classes of the validation items, ascending, without those whose budget is 0."""
    train_labels, valid_labels = of_train.codes, of_valid.codes
    present, shares = valid_labels.unique(return_counts=True)
    members = [(train_labels == label).nonzero()[:, 0] for label in present.tolist()]
    names = [of_valid.name(label) for label in present.tolist()]
    budgets = checked_budgets(names, shares.tolist(), [len(rows) for rows in members], k)
    return [
        (label, rows, (valid_labels == label).nonzero()[:, 0], count)
        for label, rows, count in zip(present.tolist(), members, budgets, strict=True)
        if count
    ]


def checked_budgets(names: list[Any], shares: list[int], sizes: list[int], k: int) -> list[int]:
    """The budgets of classes, given their labels and how many validation and training items they have."""
    for name, size in zip(names, sizes, strict=True):
        if size == 0:
            raise ValueError(
                f"train_labels must hold every class of valid_labels, got none of class {name!r}"
            )
    if k > sum(sizes):
        raise ValueError(f"k must be <= the {sum(sizes)} rows of train in the classes of valid, got {k}")
    return class_budgets(shares, sizes, k)


def class_budgets(shares: list[int], sizes: list[int], k: int) -> list[int]:
    """`k` divided by `shares`, none above its size: what a full class cannot take is divided among the others."""
    budgets = [0] * len(sizes)
    free = list(range(len(sizes)))
    while True:
        left = k - sum(budgets[group] for group in range(len(sizes)) if group not in free)
        # allocate_budgets caps a group at its share; a multiple of all shares divides in the same way and never reaches the cap.
        factor = k + 1
        counts = allocate_budgets([shares[group] * factor for group in free], left).tolist()
        full = [group for group, count in zip(free, counts, strict=True) if count > sizes[group]]
        if not full:
            for group, count in zip(free, counts, strict=True):
                budgets[group] = count
            return budgets
        for group in full:
            budgets[group] = sizes[group]
        free = [group for group in free if group not in full]


def info_of_classes(
    infos: dict[int, dict[str, Any]], classes: list[_Class], labels: Labels
) -> dict[str, Any]:
    served = sum(len(own) for _, _, own, _ in classes)
    parts = [(infos[label], len(own) / served) for label, _, own, _ in classes]
    return {
        "score": sum(info["score"] * share for info, share in parts),
        "score_error": sum(info["score_error"] * share for info, share in parts),
        "exact_solves": sum(info["exact_solves"] for info, _ in parts),
        "sinkhorn_solves": sum(info["sinkhorn_solves"] for info, _ in parts),
        "picks": sum(info["picks"] for info, _ in parts),
        "certificate": all(info["certificate"] for info, _ in parts),
        "seconds": {
            stage: sum(info["seconds"][stage] for info, _ in parts) for stage in ("cover", "exchange")
        },
        "budgets": labels.named({label: count for label, _, _, count in classes}),
        "classes": labels.named(infos),
    }


def is_held(k: int, sinks: int, dtype: torch.dtype) -> bool:
    """Whether the transport of k members is held; whatever the budget, because the exchanges must not depend on that."""
    return costs_bytes(k, sinks, dtype.itemsize) <= HELD_BYTES


def _shifted(bar: Progress, done: int) -> Callable[[int], None]:
    return lambda more: bar.update(done + more)


def _clipped(norms: Tensor, quantile: float) -> Tensor:
    """The norms [n], those above their quantile as large as that."""
    bound = float(np.quantile(norms.cpu().numpy(), quantile))
    return norms.clamp_max(bound)


def costs_of(
    train: Tensor, valid: Tensor, norms: Tensor, options: Options, kernels: Kernels, top: float, largest: float | None,
    most: Callable[[float], float] = float, total: Callable[[list[float]], float] = math.fsum,
) -> TransportCosts:  # fmt: skip
    """The costs of one problem.

    Args:
        train, valid: features of its training and validation items.
        norms: [n] float64 gradient norms of the training items.
        options: those of the exchanges.
        kernels: those of facility location.
        top: what norms are divided by.
        largest: what distances are divided by, None for the largest of them.
        most, total: the largest of the numbers of all parts, and the exact sum of all their numbers, if `train` is one part of several.
    """
    # Scaled so that they stay finite times lam.
    exponent = exponent_into(top, (-1100, 500))
    share = scale(norms, exponent)

    def penalty(mean_distance: Tensor) -> Tensor:
        if not options.lam:
            return torch.zeros_like(share)
        if options.norm_scale == "max":
            return options.lam * share / times_power(top, exponent)
        deviation, of_distances = (_deviation(values, most, total) for values in (share, mean_distance))
        return options.lam * share * (of_distances / deviation if deviation else 0.0)

    return TransportCosts(train, valid, penalty, kernels, options.memory_budget, largest=largest, most=most)


def _deviation(
    values: Tensor,
    most: Callable[[float], float] = float,
    total: Callable[[list[float]], float] = math.fsum,
) -> float:
    """The standard deviation, summed exactly: neither the number of threads nor the parts of the values matter."""
    largest = most(float(values.abs().max()) if len(values) else 0.0)
    if largest == 0:
        return 0.0
    # In units of a power of two near the largest, so that squares and sums stay in range.
    unit = 2.0 ** (math.frexp(largest)[1] - 1)
    numbers = [number / unit for number in values.tolist()]
    count = total([float(len(numbers))])
    mean = total(numbers) / count
    return unit * math.sqrt(total([(number - mean) ** 2 for number in numbers]) / count)


def _select(
    costs: TransportCosts, k: int, options: Options, report: Callable[[int], None], begin: float
) -> tuple[Tensor, dict[str, Any]]:
    """The chosen rows [k] of one problem, whose costs were begun at `begin`, and what is known about them."""
    picks, made = cover_picks(Cover(costs), costs.shape[0], k, report)
    return exchanged(costs, picks, made, options, report, begin)


def exchanged(
    costs: TransportCosts,
    picks: Tensor,
    made: int,
    options: Options,
    report: Callable[[int], None],
    begin: float,
) -> tuple[Tensor, dict[str, Any]]:
    """Stage 2 from the `picks` [k] of stage 1, which made `made` of them."""
    k = len(picks)
    report(k)
    covered = time.perf_counter()
    held = options.solver == "exact" and is_held(k, costs.shape[1], costs.dtype)
    descent = (ExactDescent if held else Descent)(costs, picks, options)
    descent.run(lambda exchanges: report(k + exchanges))
    end = time.perf_counter()
    solves = {"exact": 0, "sinkhorn": 0} | {options.solver: descent.solves}
    score, norms = descent.scores[-1], math.fsum(costs.penalty[descent.subset].tolist()) / k
    info = {
        "score": score,
        "scores": descent.scores,
        "exchanges": descent.exchanges,
        "score_error": descent.gap,
        "parts": {
            "distance": score * costs.spread + costs.low + norms,
            "norms": norms,
            "shift": costs.low,
            "scale": costs.spread,
        },
        "spread": {"distance": _deviation(costs.mean_distance), "norms": _deviation(costs.penalty)},
        "exact_solves": solves["exact"],
        "sinkhorn_solves": solves["sinkhorn"],
        "picks": made,
        "certificate": descent.stopped == "certificate",
        "stopped": descent.stopped,
        "seconds": {"cover": covered - begin, "exchange": end - covered},
    }
    return descent.subset, info


def _at_least(value: Any, name: str, least: int) -> int:
    number = as_integer(value, name)
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}")
    return number


@register_estimate("goracs")
def _estimate(
    train: Any,
    valid: Any,
    grad_norms: Any = None,
    k: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    lam: float = 0.0,
    norm_clip: float | None = None,
    norm_scale: str = "max",
    max_exchanges: int = 100,
    n_candidates: int = 30,
    max_solves: int | None = None,
    time_limit: float | None = None,
    tol: float = 0.0,
    train_labels: Any = None,
    valid_labels: Any = None,
    scaling: str = "class",
    solver: str = "exact",
    seed: int = 0,
    reg: float = 1e-3,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    backend: str | None = None,
    progress: Any = None,
) -> int:
    """The bytes of one call; see `memory_estimate`. With labels, as if all items were of one class, which takes the most."""
    check_backend(backend)
    one_of(solver, "solver", SOLVERS)
    k = _at_least(k, "k", 1)
    n_candidates = _at_least(n_candidates, "n_candidates", 1)
    memory_budget = _at_least(memory_budget, "memory_budget", 1)
    dtype = as_dtype(dtype)
    n, d = as_shape(train, "train")
    clients, width = as_shape(valid, "valid")
    if width != d:
        raise ValueError(f"valid must have {d} columns as train has, got shape {(clients, width)}")
    if k > n:
        raise ValueError(f"k must be <= the {n} rows of train, got {k}")
    size = compute_dtype(dtype).itemsize
    copies = (n + clients) * d * size if dtype.itemsize < size or train_labels is not None else 0
    # The kernel packs its inputs.
    packed = (clients + 2 * 128) * d * size
    members = min(memory_budget // 4, 8 * k * clients)
    pool = min(n, pool_rows(clients, n_candidates))
    # For the pool, when the bounds of all its pairs are computed: costs, reduced costs, and the costs of the removals.
    screening = pool * (6 * clients * size + 3 * k * size)
    problem = 500 * (k + clients) * 8 + 8 * KEPT_BYTES
    if solver == "sinkhorn":
        problem += 6 * 8 * k * clients
    elif is_held(k, clients, compute_dtype(dtype)):
        problem, members = transport_bytes(k, clients, size) + k * clients * size, 0
    cover = cover_bytes(n, clients, d, size, memory_budget)
    held = n * clients * size if n * clients * size <= memory_budget // 2 else 0
    return copies + packed + max(cover, held + members + screening + problem) + 300 * (n + clients)
