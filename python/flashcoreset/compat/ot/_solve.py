"""POT's `ot.solve` and `ot.solve_sample`, for every problem with an entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcoreset.compat._arrays import Library, matrix, take, warn_user
from flashcoreset.compat.ot._empirical import empirical_sinkhorn2
from flashcoreset.compat.ot._transport import DID_NOT_CONVERGE, number, show, weights
from flashcoreset.compat.ot._transport import solve as solve_transport
from flashcoreset.compat.ot.unbalanced import sinkhorn_knopp_unbalanced
from flashcoreset.compat.ot.utils import OTResult, dist

if TYPE_CHECKING:
    from flashcoreset.compat.geomloss.ot import OTResultSample

_METHODS = ("sinkhorn", "sinkhorn_log", "mm", "lbfgsb")
_GRADS = ("autodiff", "envelope", "last_step", "detach")
_SAMPLE_METHODS = [
    "1d",
    "gaussian",
    "gaussian_hd",
    "lowrank",
    "factored",
    "nystroem",
    "geomloss",
    "geomloss_auto",
    "geomloss_tensorized",
    "geomloss_online",
    "geomloss_multiscale",
    "sliced",
    "max_sliced",
    "bsp",
]


def solve(
    M: Any,
    a: Any = None,
    b: Any = None,
    reg: float | None = None,
    c: Any = None,
    reg_type: Any = "KL",
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    method: str | None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: Any = None,
    potentials_init: Any = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
) -> OTResult:
    """Entropic transport for costs M [n, m]: `ot.solve` of POT, with its results `plan`, `potentials` (log-scalings), `value`,
    `value_linear` and `marginals`.

    Args:
        M: costs; a [n], b [m]: weights, uniform if None.
        reg: the weight of the entropy, > 0. reg_type: "KL", relative to a b^T (to `c`, if unbalanced), or "entropy".
        unbalanced: a penalty of the marginals, or a pair of them, with unbalanced_type="KL".
        method: None, "sinkhorn" or "sinkhorn_log": one solver. n_threads: torch's number of threads is used.
        max_iter, tol: 1000 and 1e-9 if None.
        potentials_init: log-scalings to start from.
        grad: "autodiff" and "last_step" (by implicit differentiation of the solved plan), "envelope" (of the value, with the plan
            as a constant) or "detach".

    Raises:
        NotImplementedError: for exact transport and what has no entropy of these kinds; POT solves those.

    Example:
        >>> import numpy as np
        >>> result = solve(np.array([[0.0, 1.0], [1.0, 0.0]]), reg=1.0)
        >>> round(float(result.value_linear), 3)
        0.269
    """
    if method is not None and method not in _METHODS:
        raise ValueError(f"Unknown method {method!r} for solve; valid names: {', '.join(_METHODS)}")
    reg = _refuse_other_problems(
        "ot.solve", reg=reg, c=c, reg_type=reg_type, unbalanced=unbalanced, unbalanced_type=unbalanced_type, method=method,
        plan_init=plan_init,
    )  # fmt: skip
    max_iter, tol = 1000 if max_iter is None else max_iter, 1e-9 if tol is None else tol
    if grad not in _GRADS:
        raise ValueError(f"ot.solve: grad must be one of {', '.join(_GRADS)}, got {grad!r}")
    if unbalanced is not None:
        if grad != "autodiff":
            raise NotImplementedError(
                f"ot.solve: grad={grad!r} with unbalanced is not supported; POT's ot.solve takes it"
            )
        plan, log = sinkhorn_knopp_unbalanced(
            [] if a is None else a, [] if b is None else b, M, reg, unbalanced, c=c, warmstart=potentials_init,
            numItermax=max_iter, stopThr=tol, verbose=verbose, log=True,
        )  # fmt: skip
        library, _ = take("ot.solve", M=M, a=a, b=b)
        return OTResult(
            potentials=(log["logu"], log["logv"]), value=log["total_cost"], value_linear=log["cost"], plan=plan,
            backend=library,
        )  # fmt: skip
    library, found = take("ot.solve", M=M, a=a, b=b)
    costs = matrix("ot.solve", "M", found["M"])
    n, m = costs.shape
    rows, columns = weights(found["a"], n, costs), weights(found["b"], m, costs)
    if rows.shape != (n,) or columns.shape != (m,):
        got = f"{tuple(rows.shape)} and {tuple(columns.shape)}"
        raise ValueError(f"ot.solve: a and b must have shapes ({n},) and ({m},), got {got}")
    return _balanced(
        library, costs, rows, columns, number("ot.solve", "reg", reg), reg_type.lower() == "entropy", max_iter, tol,
        potentials_init, verbose, grad,
    )  # fmt: skip


def _balanced(
    library: Library, costs: Tensor, a: Tensor, b: Tensor, reg: float, is_entropy: bool, max_iter: int, tol: float,
    potentials_init: Any, verbose: bool, grad: str,
) -> OTResult:  # fmt: skip
    start = None
    if potentials_init is not None:
        sides = take("ot.solve", u=potentials_init[0], v=potentials_init[1])[1]
        start = (
            matrix("ot.solve", "potentials_init", sides["u"], 1),
            matrix("ot.solve", "potentials_init", sides["v"], 1),
        )
    given = costs, a, b
    if grad in ("detach", "envelope"):
        costs, a, b = (t.detach() for t in given)
    solved = solve_transport(
        "ot.solve", library, costs, a, b, reg, max_iter=max_iter, tol=tol, start=start,
        names={"x": "M", "warm_start": "potentials_init"},
    )  # fmt: skip
    if tol <= 0 or not solved.converged:
        warn_user(DID_NOT_CONVERGE)
    if verbose:
        show(solved)
    plan, u, v = solved.plan, *solved.log_scalings
    linear = (costs * plan).sum()
    weight = torch.where(plan > 0, plan, 1)
    if not is_entropy:
        weight = weight / torch.where(plan > 0, a[:, None] * b[None, :], 1)
    value = linear + reg * torch.where(plan > 0, plan * weight.log(), 0).sum()
    if grad == "envelope":
        slopes = (plan, *(reg * (t - t[t.isfinite()].mean()).nan_to_num(neginf=0.0) for t in (u, v)))
        for argument, slope in zip(given, slopes, strict=True):
            if argument.requires_grad:
                value = value + (slope * (argument - argument.detach())).sum()
    return OTResult(
        potentials=library.give_all(u, v), value=library.give(value), value_linear=library.give(linear),
        plan=library.give(plan), backend=library,
    )  # fmt: skip


def _refuse_other_problems(
    call: str, *, reg: Any, c: Any, reg_type: Any, unbalanced: Any, unbalanced_type: str, method: str | None, plan_init: Any
) -> float:  # fmt: skip
    """The regularisation `reg`; what is not entropic transport, or has arguments that would change nothing here, is refused by
    name."""
    wrong = None
    if reg is None or (not isinstance(reg, Tensor) and reg == 0):
        wrong = f"reg={reg} is transport without an entropy"
    elif not isinstance(reg_type, str) or reg_type.lower() not in ("kl", "entropy"):
        wrong = f"reg_type={reg_type!r} is not supported (valid names: 'KL', 'entropy')"
    elif unbalanced is not None and (str(unbalanced_type).lower() != "kl" or reg_type.lower() != "kl"):
        wrong = f"unbalanced_type={unbalanced_type!r} with reg_type={reg_type!r} is not supported ('KL' for both is)"
    elif method not in (None, "sinkhorn", "sinkhorn_log"):
        wrong = f"method={method!r} is not supported"
    elif c is not None and unbalanced is None:
        wrong = "c without unbalanced is not supported"
    elif plan_init is not None:
        wrong = "plan_init is not supported"
    if wrong is not None:
        raise NotImplementedError(f"{call}: {wrong}; POT's {call} takes it")
    checked: float = reg
    return checked


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    reg: float | None = None,
    c: Any = None,
    reg_type: Any = "KL",
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    lazy: bool | None = False,
    batch_size: int | None = None,
    method: str | None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: Any = None,
    rank: int = 100,
    scaling: float = 0.95,
    potentials_init: Any = None,
    X_init: Any = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
    random_state: Any = None,
    debias: bool = False,
    n_projections: int = 50,
    projections: Any = None,
    scaler: Any = None,
) -> OTResult | OTResultSample:
    """Entropic transport between samples X_a [n, d] and X_b [m, d]: `ot.solve_sample` of POT, which is `solve` of `dist`.

    Args:
        lazy: no matrix [n, m] is formed: the result has potentials, `lazy_plan` and `value_linear`. As in POT, method="sinkhorn"
            implies it. `batch_size` changes nothing.
        method: None, "sinkhorn", "sinkhorn_log", or "geomloss" with its variants: `flashcoreset.compat.geomloss.ot.solve_sample`.
        debias: the value less half of those of X_a and X_b with themselves.

    Raises:
        NotImplementedError: for other methods and their arguments, debias="split" and `scaler`.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0], [1.0]])
        >>> round(float(solve_sample(x, x, reg=1.0).value_linear), 3)
        0.269
    """
    call = "ot.solve_sample"
    name = None if method is None else str(method).lower()
    if name is not None and name not in (*_METHODS, *_SAMPLE_METHODS):
        raise ValueError(
            f"Unknown method {method!r} for solve_sample; valid names: {', '.join((*_METHODS, *_SAMPLE_METHODS))}"
        )
    others = {
        "rank": rank != 100, "scaling": scaling != 0.95, "X_init": X_init is not None,
        "random_state": random_state is not None, "n_projections": n_projections != 50,
        "projections": projections is not None, "scaler": scaler is not None, "debias": debias not in (False, True),
    }  # fmt: skip
    for argument, is_given in others.items():
        if is_given:
            raise NotImplementedError(
                f"{call}: the argument {argument!r} is not supported here; POT's {call} takes it"
            )
    common: dict[str, Any] = {
        "metric": metric, "reg": reg, "c": c, "reg_type": reg_type, "unbalanced": unbalanced,
        "unbalanced_type": unbalanced_type, "lazy": lazy, "batch_size": batch_size, "method": method,
        "n_threads": n_threads, "max_iter": max_iter, "plan_init": plan_init, "potentials_init": potentials_init, "tol": tol,
        "verbose": verbose, "grad": grad,
    }  # fmt: skip
    if debias:
        if name is not None and name.startswith("geomloss"):
            raise NotImplementedError(
                f"{call}: debias with method={method!r} is not supported; POT's {call} takes it"
            )
        return _debiased(X_a, X_b, a, b, common)
    if name is not None and name.startswith("geomloss"):
        from flashcoreset.compat.geomloss import ot as geomloss_ot

        return geomloss_ot.solve_sample(
            X_a, X_b, a=a, b=b, cost=metric, reg=reg, unbalanced=unbalanced, unbalanced_type=unbalanced_type,
            max_iter=1000 if max_iter is None else max_iter, tol=tol,
        )  # fmt: skip
    if not lazy and name is None:
        return solve(
            dist(X_a, X_b, metric), a, b, reg, c, reg_type, unbalanced, unbalanced_type, None, n_threads, max_iter, plan_init,
            potentials_init, tol, verbose, grad,
        )  # fmt: skip
    reg = _refuse_other_problems(
        call,
        reg=reg,
        c=c,
        reg_type=reg_type,
        unbalanced=None,
        unbalanced_type="KL",
        method=name,
        plan_init=plan_init,
    )
    if unbalanced is not None:
        raise NotImplementedError(f"{call}: unbalanced with lazy is not supported, nor is it by POT")
    value_linear, log = empirical_sinkhorn2(
        X_a, X_b, reg, a, b, metric=metric, numIterMax=1000 if max_iter is None else max_iter,
        stopThr=1e-9 if tol is None else tol, isLazy=True, log=True, warmstart=potentials_init,
    )  # fmt: skip
    library, _ = take(call, X_a=X_a, X_b=X_b)
    return OTResult(
        potentials=(log["u"], log["v"]), lazy_plan=log["lazy_plan"], value_linear=value_linear, backend=library, log=log,
        batch_size=100 if batch_size is None else batch_size,
    )  # fmt: skip


def _debiased(X_a: Any, X_b: Any, a: Any, b: Any, common: dict[str, Any]) -> OTResult:
    ab = solve_sample(X_a, X_b, a, b, **common)
    aa = solve_sample(X_a, X_a, a, a, **common)
    bb = solve_sample(X_b, X_b, b, b, **common)
    assert isinstance(ab, OTResult)  # geomloss' methods, whose results are geomloss' own, were refused

    def debiased(name: str) -> Any:
        cross, first, second = (getattr(result, name) for result in (ab, aa, bb))
        return None if cross is None else cross - 0.5 * (first + second)

    return OTResult(
        potentials=ab.potentials, value=debiased("value"), value_linear=debiased("value_linear"), plan=ab.plan,
        lazy_plan=ab.lazy_plan, status=ab.status, backend=ab._backend, log={"res_aa": aa, "res_bb": bb, "res_ab": ab},
    )  # fmt: skip
