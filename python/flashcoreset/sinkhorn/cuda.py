"""Batches of entropic optimal transport, by the CUDA kernels, on CUDA tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core import native
from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.cuda import compact, optional_compact, stream, with_memory
from flashcoreset._core.dispatch import Takes
from flashcoreset._core.native import capsule
from flashcoreset.pairwise.cuda import pairwise
from flashcoreset.sinkhorn.schedule import Solution

__all__ = ["TAKES", "pairwise", "sinkhorn", "sinkhorn_apply", "sinkhorn_plan"]

TAKES = Takes(checks_values=True)


# Bytes of shared memory that a block may take for a Sinkhorn problem; None for what the device has. Problems that need
# more are streamed.
SINKHORN_SHARED_BYTES: int | None = None


def _problems(
    x: Tensor,
    y: Tensor | None,
    metric: str,
    a: Tensor,
    b: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
) -> tuple[Any, ...]:
    """The first arguments of each compiled function. Capsules keep the memory that they show alive."""
    return (
        compact(x),
        None if y is None else compact(y),
        metric,
        compact(a),
        compact(b),
        optional_compact(x_lengths),
        optional_compact(y_lengths),
    )


def sinkhorn(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    metric: str,
    reg_marginal: tuple[float, float] = (math.inf, math.inf),
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    f: Tensor | None = None,
    g: Tensor | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    report: Callable[[int, int], None] | None = None,
) -> Solution:
    """Solves a batch of problems on the device; see `flashcoreset.sinkhorn.reference` for the definition.

    Waits once, when all problems are solved.

    Args:
        x: [B, n, d] points with `y` [B, m, d], or the costs [B, n, m] with `y` None; float32 or float64, on a CUDA
            device, like all that follows. A tensor that is not contiguous is copied.
        a, b: [B, n] and [B, m] float64.
        reg, metric, reg_marginal, max_iter, tol: as in the reference.
        x_lengths, y_lengths: [B] int64, from 1 to n and m; None for n and m.
        f, g: [B, n] and [B, m] float64 to start from; None starts from 0.
        memory_budget: not used: costs are kept in the multiprocessors' own memory or not at all.
        report: called once, at the end.

    Raises:
        BackendUnavailableError: if there are no CUDA kernels or no device.
        ValueError: for data that turned out to be NaN, infinite or too large, and for weights that are negative, all
            zero or of unequal sums.
    """
    batch = len(a)
    value, transport_cost, error, tolerance = a.new_empty(4, batch).unbind()
    found_f, found_g = (
        torch.zeros_like(weights, memory_format=torch.contiguous_format) for weights in (a, b)
    )
    iterations = torch.empty(batch, dtype=torch.int64, device=a.device)
    outputs = (found_f, found_g, value, transport_cost, error, tolerance, iterations)
    wrong, argument, problem, row, column = with_memory(
        lambda: native.cuda_module(x.device.index or 0).sinkhorn(
            *_problems(x, y, metric, a, b, x_lengths, y_lengths),
            reg,
            *reg_marginal,
            max_iter,
            tol,
            None if f is None else compact(f),
            None if g is None else compact(g),
            *map(capsule, outputs),
            -1 if SINKHORN_SHARED_BYTES is None else SINKHORN_SHARED_BYTES,
            stream(x.device),
        )
    )
    if wrong is not None:
        tensors = {"x": x, "y": y, "a": a, "b": b}
        raise ValueError(_sinkhorn_fault(wrong, argument, tensors, problem, row, column))
    if report is not None:
        report(batch * max_iter, batch * max_iter)
    return Solution(found_f, found_g, value, transport_cost, error, iterations, error <= tolerance)


def _sinkhorn_fault(
    wrong: str, argument: str, tensors: dict[str, Tensor | None], problem: int, row: int, column: int
) -> str:
    tensor, a, b = tensors[argument], tensors["a"], tensors["b"]
    assert tensor is not None
    assert a is not None
    assert b is not None
    of = f" of problem {problem}" if len(a) > 1 else ""
    within = of.replace(" of", " in", 1)
    if wrong == "not finite":
        value = float(tensor[problem, row, column])
        return f"{argument} must be finite, got {_named(value)} at row {row}, column {column}{of}"
    if wrong == "weight":
        return f"{argument} must be finite and >= 0, got {_named(float(tensor[problem, row]))} at position {row}{of}"
    if wrong == "no weight":
        return f"{argument} must have a finite sum > 0; its sum is not{within}"
    if wrong == "unequal":
        return f"a and b must have equal sums where both marginals are balanced; they differ by more than 1 in 10^4{within}"
    assert tensors["x"] is not None
    dtype = tensors["x"].dtype
    remedy = " or use float64" if dtype == torch.float32 else ""
    if wrong == "small reg":
        return f"reg: costs in units of it overflow {dtype}{within}; raise reg{remedy}"
    return f"x: costs overflow {dtype}{within}; scale the data down{remedy}"


def _named(value: float) -> str:
    return "NaN" if math.isnan(value) else str(value)


def sinkhorn_apply(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    *,
    reg: float,
    metric: str,
    transpose: bool = False,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """The products P v [B, n, k] float64 of the plans with potentials f, g for v [B, m, k]; with `transpose` P^T v [B, m, k] for v
    [B, n, k]. Rows beyond a problem's size are 0. Does not wait for the device; `memory_budget` is not used."""
    out = a.new_empty(len(a), (b if transpose else a).shape[1], v.shape[2])
    with_memory(
        lambda: native.cuda_module(x.device.index or 0).sinkhorn_apply(
            *_problems(x, y, metric, a, b, x_lengths, y_lengths),
            reg,
            compact(f),
            compact(g),
            compact(v.double()),
            transpose,
            capsule(out),
            stream(x.device),
        )
    )
    return out


def sinkhorn_plan(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    *,
    reg: float,
    metric: str,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
) -> Tensor:
    """The plans P [B, n, m] float64 with potentials f, g; 0 beyond a problem's size. Does not wait for the device."""
    out = a.new_empty(*a.shape, b.shape[1])
    with_memory(
        lambda: native.cuda_module(x.device.index or 0).sinkhorn_plan(
            *_problems(x, y, metric, a, b, x_lengths, y_lengths),
            reg,
            compact(f),
            compact(g),
            capsule(out),
            stream(x.device),
        )
    )
    return out
