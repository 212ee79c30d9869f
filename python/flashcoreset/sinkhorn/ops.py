"""The torch ops of this family, and gradients by the envelope theorem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.errors import ConvergenceWarning, warn_caller
from flashcoreset._core.op import define_op
from flashcoreset._core.progress import Progress
from flashcoreset._core.tensor import is_traced
from flashcoreset.sinkhorn.backend import choose
from flashcoreset.sinkhorn.gradient import cost_gradients, weight_gradients
from flashcoreset.sinkhorn.problem import Problem, Result, masked
from flashcoreset.sinkhorn.values import check_allowed, check_values, with_marginals_that_hold

ProgressArgument = Callable[[int, int], object] | bool | None


def solve(p: Problem, progress: ProgressArgument) -> Result:
    """The solution, without a graph except for the value's."""
    inputs = [t for t in (p.x, p.y, p.a, p.b) if t is not None]
    if is_traced(*inputs):
        value = Result(*_SOLVE(p))
        kept = {name: getattr(value, name).detach() for name in ("f", "g", "transport_cost", "error")}
        return value._replace(**kept)
    result = _solve(p, progress)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        result = result._replace(value=_Envelope.apply(p.x, p.y, p.a, p.b, p, result))
    return result


def _solve(p: Problem, progress: ProgressArgument) -> Result:
    kernels = choose(p.backend, p.x.device)
    check_values(p, weights_too=not kernels.TAKES.checks_values)
    ready = with_marginals_that_hold(p).ready()
    with torch.no_grad(), Progress(progress, p.max_iter * p.sizes[0], "sinkhorn") as bar:
        result = kernels.sinkhorn(ready, (lambda done, total: bar.update(done)) if bar.active else None)
    if p.symmetric:  # potentials of zero weights, taken from either side, may differ by rounding
        result = result._replace(g=result.f.clone())
    if p.tol > 0 and _all_solved(p, result):
        return result
    lost = ~(result.value + result.error).to(p.x.dtype).isfinite()
    if bool(lost.any()):
        check_allowed(p)
        raise ValueError(
            f"reg: value or error{p.within(int(lost.nonzero()[0]))} is not finite: {p.reg:.3g} is so small beside the costs that "
            "costs and potentials in units of it differ by rounding alone, or the masses of a and b are so large that the plan's "
            "overflows; raise reg, or scale the weights down"
        )
    if p.tol > 0:
        check_allowed(p)
        warn_caller(_unconverged(p, result), ConvergenceWarning)
    return result


def _all_solved(p: Problem, result: Result) -> bool:
    """Whether all problems converged to values within the type of the result, whose numbers end earlier."""
    if p.has_few_numbers:
        most = torch.finfo(p.x.dtype).max
        values, converged = result.value.tolist(), result.converged.tolist()
        return all(converged) and all(-most <= value <= most for value in values)
    return bool((result.converged & result.value.to(p.x.dtype).isfinite()).all())


def _unconverged(p: Problem, result: Result) -> str:
    """The warning of problems that did not converge: those whose iterations came to an end, or if there are none, those that came to
    rest before."""
    failed = ~result.converged
    ended = failed & (result.iterations >= p.max_iter)
    at_rest = not bool(ended.any())
    numbers = (failed if at_rest else ended).nonzero()[:, 0]
    worst = float(result.error[numbers].max())
    who = (
        f"{len(numbers)} of {p.sizes[0]} problems, the first of them {int(numbers[0])},"
        if p.batched
        else "sinkhorn"
    )
    if at_rest:
        # The reference computes in float64 whatever the data's type.
        single = p.x.dtype == torch.float32 and worst > 1e-10
        remedy = "raise tol, or use float64" if single else "raise tol"
        return (
            f"{who} came to rest at an error of {worst:.3g} after {int(result.iterations[numbers].max())} iterations, tol "
            f"{p.tol:.3g}: about what {'float32' if single else 'float64'} can reach here; {remedy}"
        )
    of_mass = f", which masses below 1 make {max(p.tol, 1e-6):.3g} of the mass" if worst <= p.tol else ""
    return (
        f"{who} did not converge in {p.max_iter} iterations: error {worst:.3g}, tol {p.tol:.3g}{of_mass}; raise max_iter, tol "
        "or reg"
    )


class _Envelope(torch.autograd.Function):
    """The value of a solution, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, p: Problem, result: Result
    ) -> Tensor:
        _keep(ctx, p.at(result.f, result.g))
        return result.value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*_found(ctx, gradients[0]), None, None)


_NAMES = [field.name for field in fields(Problem)]
_TENSORS = ("x", "y", "a", "b", "x_lengths", "y_lengths", "f", "g")


def _keep(ctx: Any, p: Problem) -> None:
    ctx.save_for_backward(*(getattr(p, name) for name in _TENSORS))
    ctx.options = {name: getattr(p, name) for name in _NAMES if name not in _TENSORS}


def _found(ctx: Any, of_value: Tensor) -> list[Tensor | None]:
    # The potentials count as constants here, so a second derivative would be wrong: without a graph it is refused.
    with torch.no_grad():
        needs = list(ctx.needs_input_grad[:4])
        p = Problem(**dict(zip(_TENSORS, ctx.saved_tensors, strict=True)), **ctx.options)
        found = _GRADIENTS(p, of_value, needs)
    return [t if needed else None for t, needed in zip(found, needs, strict=True)]


def _gradients(p: Problem, of_value: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """of_value [B] times the gradients with respect to x, y, a and b of a problem with potentials; empty if not needed."""
    f, g = p.potentials()
    result = [f.new_empty(0) for _ in range(4)]
    ready = p.ready()
    if needs[0] or needs[1]:
        of_x, of_y = cost_gradients(choose(p.backend, p.x.device), ready, of_value, needs[1])
        result[0] = of_x
        result[1] = result[1] if of_y is None else of_y
    sides = ((f, p.rho_a, ready.b, p.x_lengths), (g, p.rho_b, ready.a, p.y_lengths))
    for side, (potential, rho, other, lengths) in enumerate(sides, start=2):
        if needs[side]:
            result[side] = masked(weight_gradients(potential, rho, p.reg, other, of_value), lengths)
    return result[0], result[1], result[2], result[3]


def _op(p: Problem) -> Result:
    # Results of an op share no memory.
    return Result(*(t.contiguous().clone() if t.dim() == 1 else t for t in _solve(p, None)))


def _fake(p: Problem) -> tuple[Tensor, ...]:
    number = [p.a.new_empty(p.sizes[0]) for _ in range(3)]
    counts = (p.a.new_empty(p.sizes[0], dtype=dtype) for dtype in (torch.int64, torch.bool))
    return (torch.empty_like(p.a), torch.empty_like(p.b), *number, *counts)


def _fake_gradients(p: Problem, of_value: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    like = (
        p.x if needs[0] or needs[1] else None,
        p.y if needs[1] else None,
        p.f if needs[2] else None,
        p.g if needs[3] else None,
    )
    return tuple(of_value.new_empty(0) if t is None else torch.empty_like(t) for t in like)


_SOLVE = define_op("sinkhorn", _op, _fake, Result._fields)
_GRADIENTS = define_op("sinkhorn_gradients", _gradients, _fake_gradients, ("x", "y", "a", "b"))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, Problem(*inputs).at(output[0], output[1]))


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return (*_found(ctx, gradients[2]), *([None] * (len(_NAMES) - 4)))


torch.library.register_autograd("flashcoreset::sinkhorn", _backward, setup_context=_setup_context)


def _plan(p: Problem) -> Tensor:
    return choose(p.backend, p.x.device).sinkhorn_plan(p).to(p.x.dtype)


def _fake_plan(p: Problem) -> Tensor:
    return p.x.new_empty(p.sizes)


def _apply(p: Problem, v: Tensor, transpose: bool) -> Tensor:
    return choose(p.backend, p.x.device).sinkhorn_apply(p, v, transpose).to(p.x.dtype)


def _fake_apply(p: Problem, v: Tensor, transpose: bool) -> Tensor:
    batch, n, m = p.sizes
    return p.x.new_empty(batch, m if transpose else n, v.shape[2])


plan_of: Callable[[Problem], Tensor] = define_op("sinkhorn_plan", _plan, _fake_plan)
apply_plan: Callable[[Problem, Tensor, bool], Tensor] = define_op("sinkhorn_apply", _apply, _fake_apply)
