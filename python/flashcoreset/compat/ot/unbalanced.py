"""POT's `ot.unbalanced`: entropic transport whose marginals may differ from the weights, for a Kullback-Leibler penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset.compat._arrays import Library, matrix, refuse_unknown, take, warn_unconverged, warn_user
from flashcoreset.compat.ot._refused import refused
from flashcoreset.compat.ot._transport import Solved, number, show, solve_relaxed, weights

__all__ = [
    "sinkhorn_knopp_unbalanced",
    "sinkhorn_stabilized_unbalanced",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "sinkhorn_unbalanced_translation_invariant",
]


def __getattr__(name: str) -> Any:
    return refused(__name__, name)


# POT stops when scalings change by less than stopThr, ours when marginals are right to this share of stopThr: scalings of points that have
# little mass need it.
_SHARE = 1e-2
_LEAST = 1e-13  # what float64 reaches


def _solve(
    call: str, a: Any, b: Any, M: Any, reg: Any, reg_m: Any, reg_type: str, c: Any, warmstart: Any, numItermax: int,
    stopThr: float, verbose: bool, log: bool,
) -> tuple[Any, dict[str, Any] | None, Any]:  # fmt: skip
    """The plan or the costs [k], the log, and the cost of the plan."""
    library, found = take(call, M=M, a=a, b=b, c=c)
    costs = matrix(call, "M", found["M"])
    n, m = costs.shape
    rows, columns = weights(found["a"], n, costs), weights(found["b"], m, costs)
    if rows.shape != (n,) or columns.dim() not in (1, 2) or columns.shape[0] != m:
        got = f"{tuple(rows.shape)} and {tuple(columns.shape)}"
        raise ValueError(f"{call}: a and b must have shapes ({n},) and ({m},) or ({m}, k), got {got}")
    if not isinstance(reg_type, str) or reg_type.lower() not in ("kl", "entropy"):
        raise NotImplementedError(
            f"{call}: reg_type={reg_type!r} is not supported here; valid names: 'kl', 'entropy'"
        )
    reg, rho = number(call, "reg", reg), _pair(call, reg_m)
    given = found["c"]
    if reg_type.lower() == "entropy":
        warn_user("If reg_type = entropy, then the matrix c is overwritten by the one matrix.")
        given = torch.ones_like(costs)
    if columns.dim() == 2:  # whose reference is 1, whatever reg_type says, as in POT
        problems = [
            _one(
                call, library, costs, rows, columns[:, k], reg, rho, torch.ones_like(costs), _start(call, warmstart, k),
                numItermax, stopThr, verbose,
            )
            for k in range(columns.shape[1])
        ]  # fmt: skip
        values = library.give(torch.stack([cost for _, cost in problems]))
        record = None
        if log:
            logs = [
                torch.stack(side, 1)
                for side in zip(*(solved.log_scalings for solved, _ in problems), strict=True)
            ]
            errors = [library.give(torch.stack([solved.error for solved, _ in problems]).max())]
            record = dict(zip(("err", "logu", "logv"), (errors, *library.give_all(*logs)), strict=True))
        return values, record, values
    solved, cost = _one(
        call,
        library,
        costs,
        rows,
        columns,
        reg,
        rho,
        given,
        _start(call, warmstart),
        numItermax,
        stopThr,
        verbose,
    )
    record = None
    if log:
        record = {"err": [library.give(solved.error)]}
        record["logu"], record["logv"] = library.give_all(*solved.log_scalings)
        reference = rows[:, None] * columns[None, :] if given is None else given
        total = cost + reg * _divergence(solved.plan, reference)
        for side, (weight, penalty) in enumerate(zip((rows, columns), rho, strict=True)):
            if penalty < float("inf"):
                total = total + penalty * _divergence(solved.plan.sum(1 - side), weight)
        record["cost"], record["total_cost"] = library.give_all(cost, total)
    return library.give(solved.plan), record, library.give(cost)


def _one(
    call: str, library: Library, costs: Tensor, a: Tensor, b: Tensor, reg: float, rho: tuple[float, float], c: Tensor | None,
    start: tuple[Tensor, Tensor] | None, max_iter: int, stop: float, verbose: bool,
) -> tuple[Solved, Tensor]:  # fmt: skip
    """One solved problem and <P, M>; `c` is the reference of the entropy, None for a x b."""
    mass = float(torch.maximum(a.detach().sum(), b.detach().sum()))
    tol = max(_SHARE * stop, _LEAST) * mass if stop > 0 else 0.0
    relative = costs if c is None else costs - reg * c.log()
    solved = solve_relaxed(
        call, library, relative, a, b, reg, rho, reference="product" if c is None else "ones", max_iter=max_iter, tol=tol,
        start=start,
    )  # fmt: skip
    if stop <= 0 or not solved.converged:
        warn_unconverged(call, max_iter, solved.error)
    if verbose:
        show(solved)
    return solved, solved.cost if c is None else (costs * solved.plan).sum()


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), without the masses, as in POT; 0 where p is."""
    return torch.where(p > 0, p * torch.where(p > 0, p / q, 1).log(), 0).sum()


def _pair(call: str, reg_m: Any) -> tuple[float, float]:
    values = [reg_m] if isinstance(reg_m, (int, float)) else list(reg_m)
    if len(values) not in (1, 2):
        raise ValueError(
            f"{call}: reg_m must be a number or an array of 1 or 2 numbers, got {len(values)} of them"
        )
    return number(call, "reg_m", values[0]), number(call, "reg_m", values[-1])


def _start(call: str, warmstart: Any, column: int = 0) -> tuple[Tensor, Tensor] | None:
    if warmstart is None:
        return None
    u, v = (
        matrix(call, "warmstart", value, value.dim() if value is not None else 1)
        for value in take(call, u=warmstart[0], v=warmstart[1])[1].values()
    )
    u, v = (t[:, min(column, t.shape[1] - 1)] if t.dim() == 2 else t for t in (u, v))
    return u, v


_CALLS = {
    "sinkhorn": "ot.unbalanced.sinkhorn_knopp_unbalanced",
    "sinkhorn_stabilized": "ot.unbalanced.sinkhorn_stabilized_unbalanced",
    "sinkhorn_translation_invariant": "ot.unbalanced.sinkhorn_unbalanced_translation_invariant",
    "sinkhorn_reg_scaling": "ot.unbalanced.sinkhorn_knopp_unbalanced",
}


def _call_of(method: str, options: dict[str, Any]) -> str:
    """The function of POT for a method, whose arguments beyond the common ones `options` have to be."""
    name = str(method).lower()
    if name not in _CALLS:
        raise ValueError(f"Unknown method {method!r}; valid names: {', '.join(_CALLS)}")
    if name == "sinkhorn_reg_scaling":
        warn_user("Method not implemented yet. Using classic Sinkhorn-Knopp")
    call = _CALLS[name]
    refuse_unknown(call, {k: v for k, v in options.items() if (k, name) != ("tau", "sinkhorn_stabilized")})
    return call


def sinkhorn_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """The plan that minimises <P, M> + reg KL(P | c) + reg_m KL(P 1 | a) + reg_m KL(P^T 1 | b): `ot.unbalanced.sinkhorn_unbalanced` of
    POT.

    Args:
        a, b: weights [n] and [m], not of equal sums; empty for uniform ones. For b [m, k] the k costs are returned, with c = 1.
        M: costs [n, m]; reg: the weight of the entropy; reg_m: a number, or one or two in an array; infinite for a marginal that holds.
        method: "sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant" or "sinkhorn_reg_scaling": one solver for all.
        reg_type: "kl", c being a b^T by default, or "entropy", c being 1.
        warmstart: a pair of log-scalings (log u, log v) to start from.
        log: whether a dictionary with err, logu, logv, cost and total_cost is returned too.

    Warns:
        UserWarning: if stopThr was not reached, and as POT does.

    Example:
        >>> import numpy as np
        >>> sinkhorn_unbalanced([0.5, 0.5], [0.5, 0.5], np.array([[0.0, 1.0], [1.0, 0.0]]), 1.0, 1.0).round(3)
        array([[0.322, 0.118],
               [0.118, 0.322]])
    """
    call = _call_of(method, kwargs)
    plan, record, _ = _solve(
        call, a, b, M, reg, reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log
    )
    return plan if record is None else (plan, record)


def sinkhorn_unbalanced2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    returnCost: str = "linear",
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """The cost of the plan that `sinkhorn_unbalanced` returns: <P, M> for returnCost="linear", and with all penalties (without the terms
    of the masses, as in POT) for "total". Other arguments as there.

    Example:
        >>> import numpy as np
        >>> cost = sinkhorn_unbalanced2([0.5, 0.5], [0.5, 0.5], np.array([[0.0, 1.0], [1.0, 0.0]]), 1.0, 1.0)
        >>> round(float(cost), 3)
        0.237
    """
    call = _call_of(method, kwargs)
    if returnCost not in ("linear", "total"):
        raise ValueError(f"Unknown returnCost {returnCost!r}; valid names: linear, total")
    is_total = returnCost == "total"
    plan, record, cost = _solve(
        call, a, b, M, reg, reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log or is_total
    )
    has_many = plan is cost
    if has_many and reg_type.lower() == "kl":
        warn_user("Reg_type not implemented yet. Use entropy.")
    if is_total and record is not None and not has_many:
        cost = record["total_cost"]
    return (cost, record) if log else cost


def _named(method: str, /, *args: Any, **kwargs: Any) -> Any:
    a, b, M, reg, reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log = args
    _call_of(method, kwargs)  # refuses a second `method`, which `sinkhorn_unbalanced` would take
    return sinkhorn_unbalanced(
        a, b, M, reg, reg_m, method, reg_type, c, warmstart, numItermax, stopThr, verbose, log, **kwargs
    )


def sinkhorn_knopp_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """`sinkhorn_unbalanced` with method="sinkhorn"."""
    return _named(
        "sinkhorn", a, b, M, reg, reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log, **kwargs
    )


def sinkhorn_stabilized_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    tau: float = 1e5,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """`sinkhorn_unbalanced` with method="sinkhorn_stabilized". When scalings are absorbed is the solver's own matter: `tau` changes
    nothing."""
    return _named(
        "sinkhorn_stabilized",
        a,
        b,
        M,
        reg,
        reg_m,
        reg_type,
        c,
        warmstart,
        numItermax,
        stopThr,
        verbose,
        log,
        **kwargs,
    )


def sinkhorn_unbalanced_translation_invariant(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """`sinkhorn_unbalanced` with method="sinkhorn_translation_invariant"."""
    return _named(
        "sinkhorn_translation_invariant", a, b, M, reg, reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log,
        **kwargs,
    )  # fmt: skip
