"""Batched entropic optimal transport: arguments checked, the chosen kernels called, gradients by the envelope
theorem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.errors import ConvergenceWarning, warn_caller
from flashcoreset._core.memory import as_dtype, as_shape, register_estimate
from flashcoreset._core.op import define_op
from flashcoreset._core.progress import Progress, check_progress
from flashcoreset._core.tensor import (
    FLOATING,
    as_integer,
    as_number,
    as_tensor,
    as_vector,
    compute_dtype,
    is_traced,
    one_of,
    same_device,
)
from flashcoreset.sinkhorn.backend import Kernels, choose
from flashcoreset.sinkhorn.gradient import cost_gradients, weight_gradients
from flashcoreset.sinkhorn.schedule import Solution

METRICS = ("sqeuclidean", "euclidean", "l1", "cosine", "precomputed")
_INF = math.inf

# Sums of weights whose relative difference is smaller count as the same number, rounded.
_SAME_MASS = 1e-4

# Potentials that are this many times costs or reg leave 7 digits for costs and reg in float64.
_DIGITS = 1e9
# A penalty that is this many times costs and reg holds its marginal to nearly all digits of float64.
_LARGEST_RHO = 1e12
# With a smaller penalty, times the larger of 1 and reg, potentials are not normal numbers.
_LEAST_RHO = 1e-290


@dataclass(frozen=True, eq=False)
class Transport:
    """Entropic optimal transport plans P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg): what `sinkhorn` returns.

    Attributes:
        f, g: [n] and [m], or [B, n] and [B, m] for a batch: the potentials (dual variables); 0 in the padding. If
            a weight is zero, the potential is the one that the other side implies. `plan` and `apply` take potentials in float64.
        value: scalar or [B]: the optimum of <P, C> + reg KL(P | a x b), plus the penalties of the marginals if
            these are relaxed, computed as the dual objective; differentiable in x, y, the costs, a and b.
        transport_cost: scalar or [B]: <P, C>.
        error: scalar or [B]: the L1 error of both marginals of `plan()`; with `reg_marginal` the L1 distance of the
            marginals from what the potentials ask for, a exp(-f / rho) and b exp(-g / rho): 0 only at the solution.
        iterations: scalar or [B] int64.
        converged: scalar or [B] bool: whether `error` fell to `tol`.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.1], [1.1]])
        >>> transport = fc.sinkhorn(x, y, reg=0.01)
        >>> transport.plan()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
        >>> transport.apply(y)  # each row's mass at the points that it goes to
        tensor([[0.0500],
                [0.5500]])
    """

    f: Tensor
    g: Tensor
    value: Tensor
    transport_cost: Tensor
    error: Tensor
    iterations: Tensor
    converged: Tensor
    _problem: _Problem
    _potentials: tuple[Tensor, Tensor]  # [B, n], [B, m] float64

    def plan(self) -> Tensor:
        """The plan P as a matrix [n, m], or [B, n, m] with zeros in the padding. Not differentiable.

        Example:
            >>> import torch, flashcoreset as fc
            >>> fc.sinkhorn(torch.zeros(2, 2), reg=1.0, metric="precomputed").plan()
            tensor([[0.2500, 0.2500],
                    [0.2500, 0.2500]])
        """
        p = self._problem
        x, y, a, b = p.arrays()
        plan = _PLAN(x, y, a, b, *self._potentials, p.reg, p.metric, p.x_lengths, p.y_lengths, p.backend)
        return p.shaped(plan.to(p.out_dtype))

    def apply(self, v: Any) -> Tensor:
        """The product P v without forming P: v [m] or [m, k] gives [n] or [n, k], for a batch [B, m] or [B, m, k] gives [B, n] or
        [B, n, k]. The padding of `v` does not matter. Not differentiable.

        Raises:
            TypeError, ValueError: for a `v` of another dtype, shape or device.

        Example:
            >>> import torch, flashcoreset as fc
            >>> fc.sinkhorn(torch.zeros(2, 3), reg=1.0, metric="precomputed").apply(torch.ones(3))
            tensor([0.5000, 0.5000])
        """
        return self._apply(v, transpose=False)

    def apply_transpose(self, v: Any) -> Tensor:
        """The product P^T v without forming P: v [n] or [n, k] gives [m] or [m, k]; batches and errors as in `apply`.

        Example:
            >>> import torch, flashcoreset as fc
            >>> fc.sinkhorn(torch.zeros(2, 4), reg=1.0, metric="precomputed").apply_transpose(torch.ones(2))
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        return self._apply(v, transpose=True)

    def _apply(self, value: Any, transpose: bool) -> Tensor:
        p = self._problem
        x, y, a, b = p.arrays()
        v = _floating(as_tensor(value, "v"), "v")
        same_device(v, "v", x.device)
        size = (a if transpose else b).shape[1]
        outer = (x.shape[0], size) if p.batched else (size,)
        if v.dim() not in (len(outer), len(outer) + 1) or v.shape[: len(outer)] != outer:
            wanted = f"{list(outer)} or {[*outer, 'k']}".replace("'", "")
            raise ValueError(f"v must have shape {wanted}, got {tuple(v.shape)}")
        flat = v.dim() == len(outer)
        batched = v if p.batched else v[None]
        batched = batched[:, :, None] if flat else batched
        lengths = p.x_lengths if transpose else p.y_lengths
        if lengths is not None:
            batched = torch.where(_mask(lengths, size)[:, :, None], batched, 0)
        out = _APPLY(
            x, y, a, b, *self._potentials, batched.detach().to(x.dtype), p.reg, p.metric, transpose, p.x_lengths, p.y_lengths,
            p.memory_budget, p.backend,
        )  # fmt: skip
        out = out.to(p.out_dtype)
        return p.shaped(out[:, :, 0] if flat else out)


@dataclass(eq=False)
class _Problem:
    """The arguments: their types, shapes and options are checked, their values not yet. The tensors are those of a batch and may
    still ask for gradients."""

    x: Tensor  # [B, n, d] or [B, n, m], float32 or float64
    y: Tensor | None  # [B, m, d]
    a: Tensor | None  # [B, n] float64
    b: Tensor | None  # [B, m] float64
    reg: float
    metric: str
    reg_marginal: tuple[float, float]
    x_lengths: Tensor | None  # [B] int64
    y_lengths: Tensor | None
    max_iter: int
    tol: float
    f: Tensor | None  # [B, n] float64
    g: Tensor | None
    memory_budget: int
    backend: str | None
    batched: bool

    @property
    def out_dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def sizes(self) -> tuple[int, int]:
        return self.x.shape[1], self.x.shape[2] if self.y is None else self.y.shape[1]

    def arrays(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """x, y, a, b as the kernels take them: weights filled in, those in the padding 0."""
        n, m = self.sizes
        batch, device = self.x.shape[0], self.x.device
        a = _weights(self.a, self.x_lengths, batch, n, device)
        b = _weights(self.b, self.y_lengths, batch, m, device)
        if all(map(math.isinf, self.reg_marginal)) and (self.a is not None or self.b is not None):
            b = b * (a.sum(1) / b.sum(1))[:, None]
        return self.x.detach(), None if self.y is None else self.y.detach(), a, b

    def shaped(self, tensor: Tensor) -> Tensor:
        return tensor if self.batched else tensor[0]


def sinkhorn(
    x: Any,
    y: Any = None,
    a: Any = None,
    b: Any = None,
    *,
    reg: float,
    metric: str = "sqeuclidean",
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    x_lengths: Any = None,
    y_lengths: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    warm_start: Any = None,
    backend: str | None = None,
    progress: Callable[[int, int], object] | bool | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Transport:
    """Entropic optimal transport: min over P of <P, C> + reg KL(P | a x b) with marginals a and b.

    Args:
        x: [n, d] points, or [B, n, d] for a batch of problems; with metric="precomputed" the costs C, [n, m] or
            [B, n, m]. float16, bfloat16, float32 or float64 (half types compute in float32); a torch tensor, a NumPy
            array or an object with `__dlpack__`.
        y: [m, d] or [B, m, d], same dtype; None with metric="precomputed".
        a: [n] or [B, n] weights >= 0 of the rows, some of them > 0; default 1/n. b: [m] or [B, m], weights of the columns. If
            both marginals are balanced, their sums have to be the same; `b` is scaled to remove the difference that
            rounding leaves between them.
        reg: the weight of the entropy, > 0, in the units of the cost. The iterations are stable down to 1e-4 of the largest cost.
        metric: C_ij = |x_i - y_j|^2 ("sqeuclidean"), |x_i - y_j| ("euclidean"), sum_k |x_ik - y_jk| ("l1"),
            1 - cos(x_i, y_j) ("cosine"; 1 for a zero row), or given ("precomputed").
        reg_marginal: None for balanced transport. A number rho > 0 relaxes both marginals to a penalty
            rho KL(P 1 | a) + rho KL(P^T 1 | b); a pair (rho_a, rho_b) relaxes each on its own, None for a marginal that holds,
            as a marginal does from 1e12 times costs and reg on.
        x_lengths, y_lengths: [B] integers, the sizes of the problems of a batch in x and y; what lies beyond them (the
            padding, which may be NaN) is not read and costs no work.
        max_iter: the most iterations that one problem takes.
        tol: a problem stops when its `Transport.error`, an L1 distance of marginals, is at most `tol`, but no larger a
            share of the plan's mass (if both marginals are relaxed, of the larger mass of a and b) than `tol` or 1e-6. 0 makes exactly
            `max_iter` iterations, plain ones if reg is at least 1/500 of the costs' range, without a warning.
        warm_start: a `Transport` of problems of the same sizes, or potentials (f, g), to start from: at most 1e9 times the
            costs or reg.
        backend: None (the fastest that can run), "cpu", "cuda", "triton" or "torch" (the reference).
        progress: None, True (a bar on stderr) or a callable(done, total), in iterations.
        memory_budget: bytes that a matrix [n, m] of one problem may take; a larger matrix is made anew, a block at a time,
            in each iteration.

    Returns:
        A `Transport`.

    Warns:
        ConvergenceWarning: once per call, if a problem did not reach `tol` in `max_iter` iterations; what is returned
            is its last iterate, which a plain iteration made and which is therefore the best.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape or option, negative weights or all zero, sums that differ, NaN and infinity; for a
            batch the message names the number of the problem.
        BackendUnavailableError: if `backend` was named and cannot run here.

    Source: Cuturi, "Sinkhorn distances", 2013; Chizat et al., "Scaling algorithms for unbalanced optimal transport
    problems", 2018. Iterations with tol > 0 are over-relaxed (Thibault et al., 2021), iterations of relaxed marginals are
    translation invariant (Sejourne et al., 2022), and if reg is small, iterations start from a larger one (docs/sinkhorn.md).

    Example:
        >>> import torch, flashcoreset as fc
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
        >>> transport = fc.sinkhorn(x, y, reg=0.05)
        >>> transport.plan().sum(1), bool(transport.converged)
        (tensor([0.5000, 0.5000]), True)
    """
    problem = _check(
        x, y, a, b, reg, metric, reg_marginal, x_lengths, y_lengths, max_iter, tol, warm_start, backend, memory_budget
    )  # fmt: skip
    check_progress(progress)
    return _transport(problem, progress)


def sinkhorn_divergence(
    x: Any,
    y: Any,
    a: Any = None,
    b: Any = None,
    *,
    reg: float,
    metric: str = "sqeuclidean",
    reg_marginal: float | tuple[float | None, float | None] | None = None,
    x_lengths: Any = None,
    y_lengths: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    backend: str | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    """The debiased divergence OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + reg (sum a - sum b)^2 / 2, with OT the `value` of
    `sinkhorn`: 0 for x = y, positive otherwise.

    The arguments are those of `sinkhorn`; costs cannot be given, and a pair `reg_marginal` needs two equal numbers, since each
    side takes both places.

    Returns:
        A scalar, or [B] for a batch; differentiable in x, y, a and b.

    Warns:
        ConvergenceWarning: for each of the three transports that did not reach `tol`.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as `sinkhorn`.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", 2019; Sejourne
    et al., "Sinkhorn divergences for unbalanced optimal transport", 2019.

    Example:
        >>> import torch, flashcoreset as fc
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(float(fc.sinkhorn_divergence(x, x + 2, reg=0.5)), 4)
        4.0
    """
    one_of(metric, "metric", METRICS)
    if metric == "precomputed":
        raise ValueError("metric must be one of points for a divergence, got 'precomputed'")
    rho = _check_reg_marginal(reg_marginal)
    if rho[0] != rho[1]:
        raise ValueError(
            f"reg_marginal must be the same for both marginals of a divergence, got {reg_marginal}"
        )

    def value(first: Any, second: Any, left: Any, right: Any, lengths: tuple[Any, Any]) -> _Problem:
        return _check(
            first, second, left, right, reg, metric, reg_marginal, *lengths, max_iter, tol, None, backend, memory_budget
        )  # fmt: skip

    cross = value(x, y, a, b, (x_lengths, y_lengths))
    own = [value(x, x, a, a, (x_lengths, x_lengths)), value(y, y, b, b, (y_lengths, y_lengths))]
    parts = [_transport(problem, None) for problem in (cross, *own)]
    result = parts[0].value - 0.5 * (parts[1].value + parts[2].value)
    if not math.isinf(rho[0]):
        masses = [
            1.0 if weights is None else weights.sum(1).to(result.dtype) for weights in (cross.a, cross.b)
        ]
        extra = 0.5 * cross.reg * (masses[0] - masses[1]) ** 2
        result = result + (extra if cross.batched or not isinstance(extra, Tensor) else extra[0])
    return result


# ---- arguments


def _check(
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
    warm_start: Any,
    backend: Any,
    memory_budget: Any,
) -> _Problem:
    one_of(metric, "metric", METRICS)
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
    else:
        if y is None:
            raise ValueError(
                f"y must be given for metric {metric!r}, got None (costs go with metric 'precomputed')"
            )
        y, y_batched = _points(y, "y")
        same_device(y, "y", device)
        if y.dtype != x.dtype:
            raise TypeError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")
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
    rho = _check_reg_marginal(reg_marginal)
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
    shapes = ((a, "a", n), (b, "b", m))
    a, b = (_weight_argument(value, name, device, batch, size, batched) for value, name, size in shapes)
    f, g = _check_warm_start(warm_start, device, batch, n, m, batched)
    dtype = compute_dtype(x.dtype)
    if x.dtype != dtype:
        x, y = x.to(dtype), None if y is None else y.to(dtype)
    return _Problem(
        x, y, a, b, reg, metric, rho, lengths[0], lengths[1], max_iter, tol, f, g, min(budget, 2**62), backend, batched
    )  # fmt: skip


def _keep_graph(value: Any, name: str) -> Tensor:
    """`value` as a tensor; one that asks for gradients keeps asking."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        as_tensor(value, name)  # the checks
        return value
    return as_tensor(value, name)


def _points(value: Any, name: str) -> tuple[Tensor, bool]:
    tensor = _keep_graph(value, name)
    if tensor.dtype not in FLOATING:
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must have dtype float16, bfloat16, float32 or float64, got {got}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dim() not in (2, 3):
        raise ValueError(f"{name} must have 2 dimensions, or 3 for a batch, got shape {tuple(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name} must have no dimension of size 0, got shape {tuple(tensor.shape)}")
    batched = tensor.dim() == 3
    return tensor if batched else tensor[None], batched


def _floating(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name} must hold floating numbers, got dtype {str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    return tensor


def _weight_argument(
    value: Any, name: str, device: torch.device, batch: int, size: int, batched: bool
) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        try:
            value = torch.tensor(value, dtype=torch.float64, device=device)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must hold numbers, in a list of rows for a batch, got a {type(value).__name__}: {error}"
            ) from None
    tensor = _floating(_keep_graph(value, name), name)
    same_device(tensor, name, device)
    wanted = (batch, size) if batched else (size,)
    if tensor.shape != wanted:
        raise ValueError(f"{name} must have shape {list(wanted)}, got {tuple(tensor.shape)}")
    return (tensor if batched else tensor[None]).to(torch.float64)


def _check_reg_marginal(value: Any) -> tuple[float, float]:
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
        f, g = value._potentials
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
        tensor = _floating(as_tensor(potential, f"warm_start: {name}"), f"warm_start: {name}")
        wanted = (batch, size) if batched else (size,)
        if tensor.shape != wanted:
            raise ValueError(
                f"warm_start: {name} must have shape {list(wanted)}, got shape {tuple(tensor.shape)}"
            )
        same_device(tensor, f"warm_start: {name}", device)
        result.append((tensor if batched else tensor[None]).to(torch.float64))
    return result[0], result[1]


def _mask(lengths: Tensor, size: int) -> Tensor:
    """A mask [B, size] bool, True for what is not padding."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _weights(
    given: Tensor | None, lengths: Tensor | None, batch: int, size: int, device: torch.device
) -> Tensor:
    """Weights [B, size] float64, contiguous; 0 in the padding."""
    if given is not None:
        detached = given.detach()
        return (detached if lengths is None else torch.where(_mask(lengths, size), detached, 0)).contiguous()
    if lengths is None:
        return torch.full((batch, size), 1 / size, dtype=torch.float64, device=device)
    return torch.where(_mask(lengths, size), 1 / lengths.double()[:, None], 0)


# ---- values


def _check_values(p: _Problem, weights_too: bool) -> None:
    """Checks lengths, potentials and, if the kernels do not check them, weights; the kernels check the data themselves."""
    n, m = p.sizes
    for lengths, name, size in ((p.x_lengths, "x_lengths", n), (p.y_lengths, "y_lengths", m)):
        if lengths is not None and bool(((lengths < 1) | (lengths > size)).any()):
            worst = int(((lengths < 1) | (lengths > size)).nonzero()[0])
            raise ValueError(f"{name} must be in [1, {size}], got {int(lengths[worst])} for problem {worst}")
    _check_potentials(p)
    if weights_too:
        _check_weights(p)
    _check_masses(p)


def _check_weights(p: _Problem) -> None:
    n, m = p.sizes
    for given, lengths, name, size in ((p.a, p.x_lengths, "a", n), (p.b, p.y_lengths, "b", m)):
        if given is None:
            continue
        weights = given.detach() if lengths is None else torch.where(_mask(lengths, size), given.detach(), 0)
        if bool((~((weights >= 0) & torch.isfinite(weights))).any()):
            problem, place = (~((weights >= 0) & torch.isfinite(weights))).nonzero()[0].tolist()
            got = float(weights[problem, place])
            raise ValueError(
                f"{name} must be finite and >= 0, got {got} at position {place}{_of(p, problem)}"
            )
        total = weights.sum(1)
        if bool((~(total > 0)).any()):
            raise ValueError(
                f"{name} must have a weight > 0, got none{_of(p, int((~(total > 0)).nonzero()[0]))}"
            )
        if bool(torch.isinf(total).any()):
            raise ValueError(f"{name} must have a finite sum{_of(p, int(torch.isinf(total).nonzero()[0]))}")


def _check_masses(p: _Problem) -> None:
    """Checks the masses, before `_Problem.arrays` makes those of balanced problems equal."""
    n, m = p.sizes
    if all(map(math.isinf, p.reg_marginal)) and (p.a is not None or p.b is not None):
        batch, device = p.x.shape[0], p.x.device
        masses = [
            _weights(given, lengths, batch, size, device).sum(1)
            for given, lengths, size in ((p.a, p.x_lengths, n), (p.b, p.y_lengths, m))
        ]
        differ = (masses[0] - masses[1]).abs() > _SAME_MASS * torch.maximum(*masses)
        if bool(differ.any()):
            problem = int(differ.nonzero()[0])
            raise ValueError(
                f"a and b must have the same sum for balanced transport, got {float(masses[0][problem]):.6g} and "
                f"{float(masses[1][problem]):.6g}{_of(p, problem)}; scale one of them, or relax the marginals with "
                "reg_marginal"
            )


def _check_potentials(p: _Problem) -> None:
    n, m = p.sizes
    for potential, lengths, name, size in ((p.f, p.x_lengths, "f", n), (p.g, p.y_lengths, "g", m)):
        if potential is None:
            continue
        seen = potential if lengths is None else torch.where(_mask(lengths, size), potential, 0)
        if not bool(torch.isfinite(seen).all()):
            problem = int((~torch.isfinite(seen)).nonzero()[0, 0])
            raise ValueError(f"warm_start: {name} must be finite{_of(p, problem)}")
    _check_warm_range(p)


def _largest_costs(p: _Problem) -> Tensor:
    """Bounds [B] float64: at least the largest |C_ij| of each problem. Takes a pass over the data, so only for unusual magnitudes."""
    sides = [p.x] if p.y is None else [p.x, p.y]
    if p.metric == "cosine":
        return torch.full((p.x.shape[0],), 2.0, dtype=torch.float64, device=p.x.device)
    most = []
    for points, lengths in zip(sides, (p.x_lengths, p.y_lengths), strict=False):
        values = points.detach().double().abs()
        if lengths is not None:
            values = torch.where(_mask(lengths, values.shape[1])[:, :, None], values, 0)
        if p.y is None:
            if p.y_lengths is not None:
                values = torch.where(_mask(p.y_lengths, values.shape[2])[:, None], values, 0)
            most.append(values.amax((1, 2)))
            continue
        largest = values.amax(2)  # squares of the others may overflow
        far = (values / torch.where(largest > 0, largest, 1)[:, :, None]).norm(
            1 if p.metric == "l1" else 2, dim=2
        )
        most.append((far * largest).amax(1))
    total = sum(most[1:], most[0])
    return total**2 if p.metric == "sqeuclidean" else total


def _check_warm_range(p: _Problem) -> None:
    """Refuses potentials that are far larger than costs and reg: they leave no digits for costs and reg, whatever an iteration does."""
    for potential, lengths, name, size in (
        (p.f, p.x_lengths, "f", p.sizes[0]),
        (p.g, p.y_lengths, "g", p.sizes[1]),
    ):
        if potential is None:
            continue
        seen = potential if lengths is None else torch.where(_mask(lengths, size), potential, 0)
        most = seen.abs().amax(1)
        if not bool((most > _DIGITS * p.reg).any()):
            continue
        allowed = _DIGITS * _largest_costs(p).clamp(min=p.reg)
        if bool((most > allowed).any()):
            worst = int((most > allowed).nonzero()[0])
            raise ValueError(
                f"warm_start: {name} must be potentials of costs like these, at most {float(allowed[worst]):.3g} for reg "
                f"{p.reg:.3g}, got {float(most[worst]):.3g}{_of(p, worst)}"
            )


def _with_marginals_that_hold(p: _Problem) -> _Problem:
    """`p` with None for a reg_marginal so large beside costs and reg that nothing of the marginal would be relaxed; refused
    if the potentials would be too large for the digits that costs need."""
    if not any(_DIGITS * p.reg < rho < _INF for rho in p.reg_marginal):
        return p
    largest = float(_largest_costs(p).max())
    if not largest < _INF:
        return p  # refused by the kernels, by name
    scale = max(p.reg, largest)
    kept = [_INF if rho > _LARGEST_RHO * scale else rho for rho in p.reg_marginal]
    (n, m), (batch, device) = p.sizes, (p.x.shape[0], p.x.device)
    masses = [
        _weights(given, lengths, batch, size, device).sum(1)
        for given, lengths, size in ((p.a, p.x_lengths, n), (p.b, p.y_lengths, m))
    ]
    # The constant that differing masses ask for.
    rho = 1 / sum(1 / max(r, 1e-300) for r in p.reg_marginal)
    constant = rho * (masses[0].log() - masses[1].log()).abs()
    far = constant > _DIGITS * scale
    if all(map(math.isinf, kept)):
        far = (masses[0] - masses[1]).abs() > 1e-12 * torch.maximum(*masses)  # more than rounding
    if bool(far.any()):
        problem = int(far.nonzero()[0])
        given = ", ".join("None" if r == _INF else f"{r:.3g}" for r in p.reg_marginal)
        raise ValueError(
            f"reg_marginal of {given} all but holds the marginals, whose sums differ: a has {float(masses[0][problem]):.6g}, "
            f"b {float(masses[1][problem]):.6g}{_of(p, problem)}; scale one of them, or make reg_marginal smaller"
        )
    return replace(p, reg_marginal=(kept[0], kept[1]))


def _of(p: _Problem, problem: int) -> str:
    return f" of problem {problem}" if p.batched else ""


def _solve(p: _Problem, progress: Callable[[int, int], object] | bool | None) -> Solution:
    kernels = choose(p.backend, p.x.device)
    _check_values(p, weights_too=not kernels.TAKES.checks_values)
    p = _with_marginals_that_hold(p)
    x, y, a, b = p.arrays()
    with torch.no_grad(), Progress(progress, p.max_iter * x.shape[0], "sinkhorn") as bar:
        report = (lambda done, total: bar.update(done)) if bar.active else None
        solution: Solution = kernels.sinkhorn(
            x, y, a, b, reg=p.reg, metric=p.metric, reg_marginal=p.reg_marginal, x_lengths=p.x_lengths,
            y_lengths=p.y_lengths, max_iter=p.max_iter, tol=p.tol, f=p.f, g=p.g, memory_budget=p.memory_budget,
            report=report,
        )  # fmt: skip
    # In the type of the result, whose numbers end earlier.
    if p.tol > 0 and bool((solution.converged & solution.value.to(x.dtype).isfinite()).all()):
        return solution
    lost = ~(solution.value + solution.error).to(x.dtype).isfinite()
    if bool(lost.any()):
        raise ValueError(
            f"reg: value or error{_of(p, int(lost.nonzero()[0]))} is not finite: {p.reg:.3g} is so small beside the costs that "
            "costs and potentials in units of it differ by rounding alone, or the masses of a and b are so large that the plan's "
            "overflows; raise reg, or scale the weights down"
        )
    if p.tol > 0:
        failed = (~solution.converged).nonzero()[:, 0]
        worst = float(solution.error[failed].max())
        of_mass = f", which masses below 1 make {max(p.tol, 1e-6):.3g} of the mass" if worst <= p.tol else ""
        who = (
            f"{len(failed)} of {x.shape[0]} problems, the first of them {int(failed[0])},"
            if p.batched
            else "sinkhorn"
        )
        warn_caller(
            f"{who} did not converge in {p.max_iter} iterations: error {worst:.3g}, tol {p.tol:.3g}{of_mass}; raise "
            "max_iter, tol or reg",
            ConvergenceWarning,
        )
    return solution


# ---- the result


def _transport(p: _Problem, progress: Callable[[int, int], object] | bool | None) -> Transport:
    inputs = [t for t in (p.x, p.y, p.a, p.b) if t is not None]
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    traced = is_traced(*inputs)
    if traced:
        solution = Solution(*_SOLVE(p))
    else:
        solution = _solve(p, progress)
        if wants_gradient:
            value = _Envelope.apply(p.x, p.y, p.a, p.b, p, solution)
            solution = solution._replace(value=value)
    dtype = p.out_dtype
    # One number per problem; tensors without a graph, except for the value.
    f, g, cost, error = solution.f, solution.g, solution.transport_cost, solution.error
    if traced:
        f, g, cost, error = (t.detach() for t in (f, g, cost, error))
    return Transport(
        p.shaped(f.to(dtype)), p.shaped(g.to(dtype)), p.shaped(solution.value.to(dtype)), p.shaped(cost.to(dtype)),
        p.shaped(error.to(dtype)), p.shaped(solution.iterations), p.shaped(solution.converged),
        p if p.f is None and p.g is None else replace(p, f=None, g=None), (f, g),
    )  # fmt: skip


class _Envelope(torch.autograd.Function):
    """The value of a solution, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        p: _Problem,
        solution: Solution,
    ) -> Tensor:
        ctx.save_for_backward(x, y, a, b, p.x_lengths, p.y_lengths, solution.f, solution.g)
        ctx.options = (p.reg, p.metric, list(p.reg_marginal), p.memory_budget, p.backend)
        return solution.value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # The potentials count as constants here, so a second derivative would be wrong: without a graph it is refused.
        with torch.no_grad():
            needs = list(ctx.needs_input_grad[:4])
            found = _GRADIENTS(*ctx.saved_tensors, gradients[0], *ctx.options, needs)
        return (*_if_needed(ctx, found), None, None)


def _if_needed(ctx: Any, gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [t if needed else None for t, needed in zip(gradients, ctx.needs_input_grad, strict=False)]


def _gradients(
    x: Tensor,
    y: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    f: Tensor,
    g: Tensor,
    of_value: Tensor,
    reg: float,
    metric: str,
    reg_marginal: list[float],
    memory_budget: int,
    backend: str | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """of_value [B] times the gradients with respect to x, y, a and b; empty if not needed."""
    marginal = (reg_marginal[0], reg_marginal[1])
    p = _Problem(
        x, y, a, b, reg, metric, marginal, x_lengths, y_lengths, 1, 0.0, None, None, memory_budget, backend,
        batched=x.shape[0] > 1,
    )  # fmt: skip
    result = [f.new_empty(0) for _ in range(4)]
    x, y, weight_a, weight_b = p.arrays()
    if needs[0] or needs[1]:
        kernels: Kernels = choose(backend, x.device)
        of_x, of_y = cost_gradients(kernels, p, x, y, weight_a, weight_b, f, g, of_value, needs[1])
        result[0] = of_x
        result[1] = result[1] if of_y is None else of_y
    sides = ((f, marginal[0], weight_b, x_lengths), (g, marginal[1], weight_a, y_lengths))
    for side, (potential, rho, other, lengths) in enumerate(sides, start=2):
        if needs[side]:
            slope = weight_gradients(potential, rho, reg, other, of_value)
            result[side] = slope if lengths is None else torch.where(_mask(lengths, slope.shape[1]), slope, 0)
    return result[0], result[1], result[2], result[3]


# ---- the torch ops


def _op(p: _Problem) -> Solution:
    found = _solve(p, None)
    # Results of an op share no memory.
    return Solution(*(t.contiguous().clone() if t.dim() == 1 else t for t in found))


def _fake(p: _Problem) -> tuple[Tensor, ...]:
    x, batch, (n, m) = p.x, p.x.shape[0], p.sizes
    number = [x.new_empty(batch, dtype=torch.float64) for _ in range(3)]
    return (
        x.new_empty(batch, n, dtype=torch.float64),
        x.new_empty(batch, m, dtype=torch.float64),
        *number,
        x.new_empty(batch, dtype=torch.int64),
        x.new_empty(batch, dtype=torch.bool),
    )


_SOLVE = define_op("sinkhorn", _op, _fake, Solution._fields[:7])


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    (x, y), (f, g), needs = arguments[:2], arguments[6:8], arguments[-1]
    like = (
        x if needs[0] or needs[1] else None,
        y if needs[1] else None,
        f if needs[2] else None,
        g if needs[3] else None,
    )
    return tuple(f.new_empty(0) if t is None else torch.empty_like(t) for t in like)


_GRADIENTS = define_op("sinkhorn_gradients", _gradients, _fake_gradients, ("x", "y", "a", "b"))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, a, b, reg, metric, marginal, x_lengths, y_lengths, *_, memory_budget, backend, _ = inputs
    ctx.save_for_backward(x, y, a, b, x_lengths, y_lengths, output[0], output[1])
    ctx.options = (reg, metric, marginal, memory_budget, backend)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    found = _GRADIENTS(*ctx.saved_tensors, gradients[2], *ctx.options, needs)
    return (*_if_needed(ctx, found), *([None] * 12))


torch.library.register_autograd("flashcoreset::sinkhorn", _backward, setup_context=_setup_context)


def _plan(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    reg: float,
    metric: str,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    backend: str | None,
) -> Tensor:
    kernels = choose(backend, x.device)
    plan: Tensor = kernels.sinkhorn_plan(
        x, y, a, b, f, g, reg=reg, metric=metric, x_lengths=x_lengths, y_lengths=y_lengths
    )
    return plan.to(x.dtype)


def _fake_plan(x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, *_: object) -> Tensor:
    return x.new_empty(a.shape[0], a.shape[1], b.shape[1])


_PLAN = define_op("sinkhorn_plan", _plan, _fake_plan)


def _product(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    v: Tensor,
    reg: float,
    metric: str,
    transpose: bool,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    memory_budget: int,
    backend: str | None,
) -> Tensor:
    kernels = choose(backend, x.device)
    out: Tensor = kernels.sinkhorn_apply(
        x, y, a, b, f, g, v, reg=reg, metric=metric, transpose=transpose, x_lengths=x_lengths, y_lengths=y_lengths,
        memory_budget=memory_budget,
    )  # fmt: skip
    return out.to(x.dtype)


def _fake_product(
    x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, f: Tensor, g: Tensor, v: Tensor, reg: float, metric: str,
    transpose: bool, *_: object,
) -> Tensor:  # fmt: skip
    return x.new_empty(a.shape[0], (b if transpose else a).shape[1], v.shape[2])


_APPLY = define_op("sinkhorn_apply", _product, _fake_product)


@register_estimate("sinkhorn")
def _estimate(
    x: Any,
    y: Any = None,
    a: Any = None,
    b: Any = None,
    *,
    reg: float = 1.0,
    dtype: torch.dtype = torch.float32,
    metric: str = "sqeuclidean",
    reg_marginal: Any = None,
    x_lengths: Any = None,
    y_lengths: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-6,
    warm_start: Any = None,
    backend: str | None = None,
    progress: Any = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> int:
    """The bytes of one call; see `memory_estimate`. Terms are named after what the kernels allocate."""
    one_of(metric, "metric", METRICS)
    check_backend(backend)
    dtype = as_dtype(dtype)
    shape = as_shape(x, "x", len(getattr(x, "shape", x)))
    batch, (n, d) = (1, shape) if len(shape) == 2 else (shape[0], shape[1:])
    m = d if metric == "precomputed" else as_shape(y, "y", len(shape))[-2]
    size, threads = compute_dtype(dtype).itemsize, torch.get_num_threads()
    points = (n + m) * d if metric != "precomputed" else 0
    converted = batch * (points or n * m) * size + 2**22 if dtype.itemsize < size else 0
    outputs = batch * (n + m) * (8 * 3 + size)
    matrix = n * m * size
    resident = matrix <= memory_budget
    if backend == "torch":
        blocks = 16 * max(2**20, 8 * m)  # temporaries of a block of rows, and the allocator's share of them
        return (
            outputs + converted + (n * m * 8 if resident else 0) + 2 * points * 8 + 16 * (n + m) * 8 + blocks
        )
    # Problems that are solved at the same time: one, or one per thread.
    at_once = threads if batch > 1 and matrix * threads <= memory_budget else 1
    workers = 1 if at_once > 1 else threads
    chunks = min(64, n // 72 + 1)
    own = (points + 24 * d + 64 * m) * size + (matrix if resident else 0) + 10 * (n + m) * 8
    own += chunks * m * size + workers * 24 * m * size
    return outputs + converted + at_once * own + threads * 2**20
