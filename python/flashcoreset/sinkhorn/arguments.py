"""Checks of the arguments of `sinkhorn`: types, shapes and options."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.tensor import (
    as_floating,
    as_integer,
    as_number,
    as_tensor,
    as_vector,
    compute_dtype,
    one_of,
    promoted,
    same_device,
)
from flashcoreset.sinkhorn.problem import METRICS, NORMS, Problem, inside
from flashcoreset.sinkhorn.transport import Transport

_INF = math.inf
# With a smaller penalty, times the larger of 1 and reg, potentials are not normal numbers.
_LEAST_RHO = 1e-290


def as_problem(
    x: Any,
    y: Any,
    a: Any,
    b: Any,
    reg: Any,
    metric: Any,
    reg_marginal: Any,
    x_lengths: Any,
    y_lengths: Any,
    max_iter: Any,
    tol: Any,
    norm: Any,
    warm_start: Any,
    backend: Any,
    memory_budget: Any,
) -> Problem:
    """The problem of a call of `sinkhorn`: types, shapes and options are checked, values not yet (see `values`). The tensors may
    still ask for gradients."""
    one_of(metric, "metric", METRICS)
    one_of(norm, "norm", NORMS)
    check_backend(backend)
    x, batched = _points(x, "x")
    device = x.device
    batch, n = x.shape[:2]
    if metric == "precomputed":
        if y is not None:
            raise ValueError(
                "y must be None with metric 'precomputed', where x is the cost of rows and columns"
            )
        m = x.shape[2]
        batches = [] if batched else [count for count in map(_batch_of, (a, b)) if count is not None]
        if batches:  # of weights: one cost for all of them
            batch, batched = max(batches), True
            if batch == 0:
                raise ValueError("a and b must have weights for one problem at least, got none")
    else:
        if y is None:
            raise ValueError(
                f"y must be given for metric {metric!r}, got None (costs go with metric 'precomputed')"
            )
        y, y_batched = _points(y, "y")
        same_device(y, "y", device)
        x, y = promoted(x, y)
        if y_batched != batched or y.shape[0] != batch or y.shape[2] != x.shape[2]:
            wanted = f"[{batch}, m, {x.shape[2]}]" if batched else f"[m, {x.shape[2]}]"
            got = tuple(y.shape) if y_batched else tuple(y.shape[1:])
            raise ValueError(f"y must have shape {wanted} to fit x, got {got}")
        m = y.shape[1]
    reg = as_number(reg, "reg")
    limits = torch.finfo(compute_dtype(x.dtype))
    least, most = 1e3 * limits.tiny, 1e-3 * limits.max
    if reg > most:
        raise ValueError(f"reg must be at most {most:.3g}; scale the data down, got {reg}")
    if not reg >= least:
        expected = "> 0" if reg <= 0 else f"at least {least:.3g}; scale the data up"
        raise ValueError(f"reg must be {expected}, got {reg}")
    rho = as_rho(reg_marginal)
    least = _LEAST_RHO * max(1.0, reg)
    if min(rho) < least:
        raise ValueError(f"reg_marginal must be at least {least:.3g}, got {min(rho)}; scale the data up")
    max_iter = as_integer(max_iter, "max_iter")
    if not 1 <= max_iter < 2**40:
        raise ValueError(f"max_iter must be >= 1 and below 2^40, got {max_iter}")
    tol = as_number(tol, "tol")
    if tol < 0:
        raise ValueError(f"tol must be >= 0, got {tol}")
    budget = as_integer(memory_budget, "memory_budget")
    if budget < 0:
        raise ValueError(f"memory_budget must be >= 0 bytes, got {budget}")
    if not batched and (x_lengths is not None or y_lengths is not None):
        raise ValueError("x_lengths and y_lengths are for batches, [B, n, d]; x has no batch dimension")
    lengths = []
    for value, name in ((x_lengths, "x_lengths"), (y_lengths, "y_lengths")):
        lengths.append(None if value is None else as_vector(value, name, device, integers=True, length=batch))
    f, g = _check_warm_start(warm_start, device, batch, n, m, batched)
    weighted = a is not None or b is not None
    sides = ((a, "a", n, lengths[0]), (b, "b", m, lengths[1]))
    a, b = (
        _uniform(batch, size, own, device)
        if value is None
        else _weights(value, name, device, batch, size, batched, shared=len(x) < batch)
        for value, name, size, own in sides
    )
    dtype = compute_dtype(x.dtype)
    if x.dtype != dtype:
        x, y = x.to(dtype), None if y is None else y.to(dtype)
    return Problem(
        x, y, a, b, reg, metric, rho[0], rho[1], lengths[0], lengths[1], max_iter, tol, f, g, min(budget, 2**62), weighted,
        batched, backend, norm=norm,
    )  # fmt: skip


def keep_graph(value: Any, name: str) -> Tensor:
    """`value` as a tensor; one that asks for gradients keeps asking."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        as_tensor(value, name)  # the checks
        return value
    return as_tensor(value, name)


def _points(value: Any, name: str) -> tuple[Tensor, bool]:
    tensor = as_floating(keep_graph(value, name), name)
    if tensor.dim() not in (2, 3):
        raise ValueError(f"{name} must have 2 dimensions, or 3 for a batch, got shape {tuple(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name} must have no dimension of size 0, got shape {tuple(tensor.shape)}")
    batched = tensor.dim() == 3
    return tensor if batched else tensor[None], batched


def _batch_of(weights: Any) -> int | None:
    """The number of problems that weights are for; None if they have no batch dimension."""
    if isinstance(weights, (list, tuple)):
        first = next(iter(weights), None)
        rows = isinstance(first, (list, tuple)) or len(getattr(first, "shape", ())) == 1
        return len(weights) if rows else None
    shape: Any = getattr(weights, "shape", ())
    return int(shape[0]) if len(shape) == 2 else None


def _uniform(batch: int, size: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Weights [B, size] that are the same for all rows of a problem; 0 in the padding."""
    if lengths is None:
        return torch.full((batch, size), 1 / size, dtype=torch.float64, device=device)
    return torch.where(inside(lengths, size), 1 / lengths.double()[:, None], 0)


def _weights(
    value: Any, name: str, device: torch.device, batch: int, size: int, batched: bool, *, shared: bool
) -> Tensor:
    if isinstance(value, (list, tuple)):
        try:
            value = torch.tensor(value, dtype=torch.float64, device=device)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must hold numbers, in a list of rows for a batch, got a {type(value).__name__}: {error}"
            ) from None
    tensor = as_floating(keep_graph(value, name), name)
    same_device(tensor, name, device)
    if shared and tensor.shape == (size,):
        tensor = tensor.expand(batch, size)
    wanted = (batch, size) if batched else (size,)
    if tensor.shape != wanted:
        raise ValueError(f"{name} must have shape {list(wanted)}, got {tuple(tensor.shape)}")
    return (tensor if batched else tensor[None]).to(torch.float64)


def as_rho(value: Any) -> tuple[float, float]:
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"reg_marginal must be None, a number or a pair of these, got {len(pair)} of them")
    result = []
    for rho in pair:
        if rho is None:
            result.append(_INF)
            continue
        number = (
            _INF if isinstance(rho, float) and math.isinf(rho) and rho > 0 else as_number(rho, "reg_marginal")
        )
        if not number > 0:
            raise ValueError(f"reg_marginal must be > 0, or None for a marginal that holds, got {rho}")
        result.append(number)
    return result[0], result[1]


def _check_warm_start(
    value: Any, device: torch.device, batch: int, n: int, m: int, batched: bool
) -> tuple[Tensor | None, Tensor | None]:
    if value is None:
        return None, None
    if isinstance(value, Transport):
        f, g = value._problem.potentials()
        if f.shape != (batch, n) or g.shape != (batch, m):
            raise ValueError(
                f"warm_start must have potentials of {batch} problems of {n} rows and {m} columns, got "
                f"{tuple(f.shape)} and {tuple(g.shape)}"
            )
        same_device(f, "warm_start", device)
        return f, g
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"warm_start must be None, a Transport or a pair (f, g), got {type(value).__name__}")
    result = []
    for potential, name, size in zip(value, ("f", "g"), (n, m), strict=True):
        tensor = as_floating(as_tensor(potential, f"warm_start: {name}"), f"warm_start: {name}")
        wanted = (batch, size) if batched else (size,)
        if tensor.shape != wanted:
            raise ValueError(
                f"warm_start: {name} must have shape {list(wanted)}, got shape {tuple(tensor.shape)}"
            )
        same_device(tensor, f"warm_start: {name}", device)
        result.append((tensor if batched else tensor[None]).to(torch.float64))
    return result[0], result[1]
