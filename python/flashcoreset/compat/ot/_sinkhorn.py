"""POT's `ot.sinkhorn`, `ot.sinkhorn2` and the methods by name: one solver under the signatures of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcoreset.compat._arrays import Library, matrix, refuse_unknown, take, warn_user
from flashcoreset.compat.ot._transport import DID_NOT_CONVERGE, Solved, number, show, solve, weights


@dataclass(frozen=True)
class _Arguments:
    """The arrays of one call: costs [n, m], a [n], b [m] or [m, k]."""

    call: str
    library: Library
    costs: Tensor
    a: Tensor
    b: Tensor
    reg: float

    @property
    def has_many(self) -> bool:
        return self.b.dim() == 2


def _arguments(call: str, a: Any, b: Any, M: Any, reg: Any) -> _Arguments:
    library, found = take(call, M=M, a=a, b=b)
    costs = matrix(call, "M", found["M"])
    n, m = costs.shape
    rows, columns = weights(found["a"], n, costs), weights(found["b"], m, costs)
    if rows.shape != (n,):
        raise ValueError(f"{call}: a must have shape ({n},), got {tuple(rows.shape)}")
    if columns.dim() not in (1, 2) or columns.shape[0] != m:
        raise ValueError(f"{call}: b must have shape ({m},) or ({m}, k), got {tuple(columns.shape)}")
    return _Arguments(call, library, costs, rows, columns, number(call, "reg", reg))


def _solve(
    p: _Arguments,
    *,
    max_iter: int,
    tol: float,
    start: tuple[Tensor, Tensor] | None,
    warn: bool,
    verbose: bool,
    together: bool = True,
) -> Solved:
    """Solves one problem, or one per column of b; `start` holds log-scalings, [k, n] and [k, m] for several. The error of several is that
    of each one, or of all `together`."""
    costs, a, b = p.costs, p.a, p.b
    if p.has_many:
        k = b.shape[1]
        a, b = a.expand(k, -1), b.mT  # the costs are read once for all
        if together:
            tol /= max(k, 1) ** 0.5
    solved = solve(p.call, p.library, costs, a, b, p.reg, max_iter=max_iter, tol=tol, start=start)
    if warn and (tol <= 0 or not solved.converged):
        warn_user(DID_NOT_CONVERGE)
    if verbose:
        show(solved)
    return solved


def _start(p: _Arguments, warmstart: Any, scale: float = 1.0) -> tuple[Tensor, Tensor] | None:
    """Log-scalings to start from: the pair `warmstart` over `scale`, [n] and [m], or [n, k] and [m, k] for many columns of b."""
    if warmstart is None:
        return None
    _, found = take(p.call, u=warmstart[0], v=warmstart[1])
    sides = []
    for value, size in zip(found.values(), p.costs.shape, strict=True):
        if value is None or value.shape not in ((size,), (size, p.b.shape[-1])):
            got = None if value is None else tuple(value.shape)
            raise ValueError(
                f"{p.call}: warmstart must be a pair of arrays of {tuple(p.costs.shape)} entries, got shape {got}"
            )
        value = value.detach().to(p.costs.device, torch.float64) / scale
        if p.has_many:
            value = value.mT if value.dim() == 2 else value.expand(p.b.shape[1], -1)
        sides.append(value)
    return sides[0], sides[1]


def _logs(p: _Arguments, solved: Solved) -> tuple[Tensor, Tensor]:
    """log u and log v, [n] and [m], or [n, k] and [m, k]."""
    u, v = solved.log_scalings
    return (u.mT, v.mT) if p.has_many else (u, v)


@dataclass(frozen=True)
class _Start:
    """What POT returns for reg = 0, after a warning: the plan of its start, which holds NaN."""

    costs: Tensor
    reg: float = 0.0

    @property
    def plan(self) -> Tensor:
        return torch.exp(self.costs / -0.0) / self.costs.numel()

    @property
    def cost(self) -> Tensor:
        return (self.plan * self.costs).sum()


@dataclass(frozen=True)
class _Outcome:
    arguments: _Arguments
    solved: Solved | _Start
    log: dict[str, Any] | None

    def result(self) -> Any:
        """The plan, or for many columns of b the costs [k]; with the log if one was asked for."""
        return self.cost() if self.arguments.has_many else self._with_log(self.solved.plan)

    def cost(self) -> Any:
        cost = self.solved.cost
        return self._with_log(cost.expand(self.arguments.b.shape[1]) if self.arguments.has_many else cost)

    def _with_log(self, found: Tensor) -> Any:
        given = self.arguments.library.give(found)
        return given if self.log is None else (given, self.log)


def _broken(p: _Arguments, log: bool, message: str) -> _Outcome:
    warn_user(message)
    return _Outcome(p, _Start(p.costs.detach()), {"err": []} if log else None)


def _knopp(
    call: str, /, a: Any, b: Any, M: Any, reg: Any, numItermax: int, stopThr: float, verbose: bool, log: bool, warn: bool,
    warmstart: Any, **unknown: Any,
) -> _Outcome:  # fmt: skip
    refuse_unknown(call, unknown)
    p = _arguments(call, a, b, M, reg)
    if p.reg == 0:
        return _broken(p, log, "Warning: numerical errors at iteration 0")
    solved = _solve(
        p, max_iter=numItermax, tol=stopThr, start=_start(p, warmstart), warn=warn, verbose=verbose
    )
    record = None
    if log:
        u, v = p.library.give_all(*(t.exp() for t in _logs(p, solved)))
        record = {"err": [p.library.give(solved.error)], "niter": solved.iterations - 1, "u": u, "v": v}
    return _Outcome(p, solved, record)


def _log_domain(
    call: str, /, a: Any, b: Any, M: Any, reg: Any, numItermax: int, stopThr: float, verbose: bool, log: bool, warn: bool,
    warmstart: Any, **unknown: Any,
) -> _Outcome:  # fmt: skip
    refuse_unknown(call, unknown)
    p = _arguments(call, a, b, M, reg)
    if p.has_many and warmstart is not None:  # a pair for each column
        pairs = [_start(_column(p), pair) for pair in warmstart]
        given = [pair for pair in pairs if pair is not None]
        start = (
            (torch.stack([f for f, _ in given]), torch.stack([g for _, g in given]))
            if len(given) == len(pairs)
            else None
        )
    else:
        start = _start(p, warmstart)
    # POT solves one column after the other.
    solved = _solve(
        p, max_iter=numItermax, tol=stopThr, start=start, warn=warn, verbose=verbose, together=False
    )
    record: dict[str, Any] | None = None
    if log:
        logs = _logs(p, solved)
        record = {} if p.has_many else {"err": [p.library.give(solved.error)], "niter": solved.iterations - 1}
        record["log_u"], record["log_v"] = p.library.give_all(*logs)
        record["u"], record["v"] = p.library.give_all(*(t.exp() for t in logs))
    return _Outcome(p, solved, record)


def _stabilized(
    call: str, /, a: Any, b: Any, M: Any, reg: Any, numItermax: int, stopThr: float, verbose: bool, log: bool, warn: bool,
    warmstart: Any, tau: float = 1e3, print_period: int = 20, **unknown: Any,
) -> _Outcome:  # fmt: skip
    refuse_unknown(call, unknown)
    p = _arguments(call, a, b, M, reg)
    if p.reg == 0:
        return _broken(p, log, "Numerical errors at iteration 0")
    start = _start(p, warmstart, p.reg)
    solved = _solve(p, max_iter=numItermax, tol=stopThr, start=start, warn=warn, verbose=verbose)
    record = None
    if log:
        logs = _logs(p, solved)
        record = {"err": [p.library.give(solved.error)], "n_iter": solved.iterations - 1}
        record["logu"], record["logv"] = p.library.give_all(*logs)
        record |= _potentials(p, logs)
    return _Outcome(p, solved, record)


def _epsilon_scaling(
    call: str, /, a: Any, b: Any, M: Any, reg: Any, numItermax: int, stopThr: float, verbose: bool, log: bool, warn: bool,
    warmstart: Any, epsilon0: float = 1e4, numInnerItermax: int = 100, tau: float = 1e3, print_period: int = 10,
    **unknown: Any,
) -> _Outcome:  # fmt: skip
    refuse_unknown(call, unknown)
    p = _one_column(_arguments(call, a, b, M, reg))
    start = _start(p, warmstart, p.reg)
    most = max(numItermax, 35) * numInnerItermax
    solved = _solve(p, max_iter=most, tol=stopThr, start=start, warn=warn, verbose=verbose)
    record = None
    if log:
        record = {"err": [p.library.give(solved.error**2)], "niter": solved.iterations - 1}
        record |= _potentials(p, _logs(p, solved))
    return _Outcome(p, solved, record)


def _greedy(
    call: str, /, a: Any, b: Any, M: Any, reg: Any, numItermax: int, stopThr: float, verbose: bool, log: bool, warn: bool,
    warmstart: Any, **unknown: Any,
) -> _Outcome:  # fmt: skip
    refuse_unknown(call, unknown)
    p = _one_column(_arguments(call, a, b, M, reg))
    start = _start(p, warmstart)
    solved = _solve(p, max_iter=numItermax, tol=stopThr, start=start, warn=warn, verbose=verbose)
    record = None
    if log:
        u, v = p.library.give_all(*(t.exp() for t in _logs(p, solved)))
        record = {"u": u, "v": v, "n_iter": solved.iterations - 1}
    return _Outcome(p, solved, record)


def _column(p: _Arguments) -> _Arguments:
    return replace(p, b=p.b[:, 0])


def _one_column(p: _Arguments) -> _Arguments:
    if p.has_many:
        raise ValueError(
            f"{p.call}: b must have shape ({p.b.shape[0]},), got {tuple(p.b.shape)}; this method takes one b"
        )
    return p


def _potentials(p: _Arguments, logs: tuple[Tensor, Tensor]) -> dict[str, Any]:
    alpha, beta = p.library.give_all(*(p.reg * t for t in logs))
    return {"alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}


_METHODS = {
    "sinkhorn": ("ot.bregman.sinkhorn_knopp", _knopp),
    "sinkhorn_log": ("ot.bregman.sinkhorn_log", _log_domain),
    "greenkhorn": ("ot.bregman.greenkhorn", _greedy),
    "sinkhorn_stabilized": ("ot.bregman.sinkhorn_stabilized", _stabilized),
    "sinkhorn_epsilon_scaling": ("ot.bregman.sinkhorn_epsilon_scaling", _epsilon_scaling),
}


def _by_method(method: str, names: Iterable[str], /, *args: Any, **options: Any) -> _Outcome:
    name = str(method).lower()
    if name not in names:
        raise ValueError(f"Unknown method {method!r}; valid names: {', '.join(names)}")
    call, function = _METHODS[name]
    return function(call, *args, **options)


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The entropic plan between a [n] and b [m] for costs M [n, m]: `ot.sinkhorn` of POT.

    Args:
        a, b: weights; empty for uniform ones. b may hold k of them as columns, [m, k]: then the k costs are returned.
        M: costs. NumPy arrays give NumPy arrays, torch tensors tensors, with gradients with respect to a, b and M.
        reg: the weight of the entropy, > 0.
        method: "sinkhorn", "sinkhorn_log", "greenkhorn", "sinkhorn_stabilized" or "sinkhorn_epsilon_scaling": whose arguments, log
            and stopping rule; the solver is the same, and stable, for all of them.
        numItermax, stopThr: the most iterations and the error to stop at.
        log: whether a dictionary is returned too.
        warmstart: a pair of log-scalings to start from; for "sinkhorn_stabilized" and "sinkhorn_epsilon_scaling" potentials.

    Example:
        >>> import numpy as np
        >>> sinkhorn([0.5, 0.5], [0.5, 0.5], np.array([[0.0, 1.0], [1.0, 0.0]]), 1.0).round(3)
        array([[0.366, 0.134],
               [0.134, 0.366]])
    """
    return _by_method(
        method, _METHODS, a, b, M, reg, numItermax=numItermax, stopThr=stopThr, verbose=verbose, log=log, warn=warn,
        warmstart=warmstart, **kwargs,
    ).result()  # fmt: skip


def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The cost <P, M> of the plan that `sinkhorn` returns, a scalar, or [k] for k columns of b; arguments as there, without
    the methods "greenkhorn" and "sinkhorn_epsilon_scaling".

    Example:
        >>> import numpy as np
        >>> round(float(sinkhorn2([], [], np.array([[0.0, 1.0], [1.0, 0.0]]), 1.0)), 3)
        0.269
    """
    return _by_method(
        method, ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"), a, b, M, reg, numItermax=numItermax, stopThr=stopThr,
        verbose=verbose, log=log, warn=warn, warmstart=warmstart, **kwargs,
    ).cost()  # fmt: skip


def sinkhorn_knopp(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """`sinkhorn` with method="sinkhorn": the log has err, niter, u and v."""
    return _knopp(
        "ot.bregman.sinkhorn_knopp",
        a,
        b,
        M,
        reg,
        numItermax,
        stopThr,
        verbose,
        log,
        warn,
        warmstart,
        **kwargs,
    ).result()


def sinkhorn_log(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """`sinkhorn` with method="sinkhorn_log": the log has err, niter, log_u, log_v, u and v, for many columns of b the last four. There
    `warmstart` is a list of pairs."""
    return _log_domain(
        "ot.bregman.sinkhorn_log", a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart, **kwargs
    ).result()


def greenkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    numItermax: int = 10000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
) -> Any:
    """`sinkhorn` with method="greenkhorn": the log has u, v and n_iter, which counts iterations over all rows and columns, not greedy
    updates of one."""
    return _greedy(
        "ot.bregman.greenkhorn", a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart
    ).result()


def sinkhorn_stabilized(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    numItermax: int = 1000,
    tau: float = 1e3,
    stopThr: float = 1e-9,
    warmstart: Any = None,
    verbose: bool = False,
    print_period: int = 20,
    log: bool = False,
    warn: bool = True,
    **kwargs: Any,
) -> Any:
    """`sinkhorn` with method="sinkhorn_stabilized": the log has err, n_iter, logu, logv, alpha, beta and warmstart, a pair of potentials.
    When scalings are absorbed is the solver's own matter: `tau` changes nothing."""
    return _stabilized(
        "ot.bregman.sinkhorn_stabilized", a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart, tau, print_period,
        **kwargs,
    ).result()  # fmt: skip


def sinkhorn_epsilon_scaling(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    numItermax: int = 100,
    epsilon0: float = 1e4,
    numInnerItermax: int = 100,
    tau: float = 1e3,
    stopThr: float = 1e-9,
    warmstart: Any = None,
    verbose: bool = False,
    print_period: int = 10,
    log: bool = False,
    warn: bool = True,
    **kwargs: Any,
) -> Any:
    """`sinkhorn` with method="sinkhorn_epsilon_scaling": the log has err, niter, alpha, beta and warmstart. From which `epsilon0` reg
    falls is the solver's own matter; numItermax * numInnerItermax iterations are the most."""
    return _epsilon_scaling(
        "ot.bregman.sinkhorn_epsilon_scaling", a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart, epsilon0,
        numInnerItermax, tau, print_period, **kwargs,
    ).result()  # fmt: skip
