"""POT's entropic transport between samples: costs are computed from points, or never formed (isLazy)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset.compat._arrays import matrix, refuse_unknown, take, wants_gradient, warn_user
from flashcoreset.compat._costs import POINT_METRICS, cost_matrix
from flashcoreset.compat.ot._sinkhorn import sinkhorn, sinkhorn2
from flashcoreset.compat.ot._transport import DID_NOT_CONVERGE, number, run, warm_potentials, weights
from flashcoreset.compat.ot.utils import LazyTensor

_NAMES = {"x": "X_s", "y": "X_t", "tol": "stopThr", "max_iter": "numIterMax", "warm_start": "warmstart"}


def empirical_sinkhorn(
    X_s: Any,
    X_t: Any,
    reg: float,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    isLazy: bool = False,
    batchSize: int | tuple[int, int] = 100,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The plan between samples X_s [n, d] and X_t [m, d], `ot.bregman.empirical_sinkhorn` of POT: `ot.sinkhorn` of `ot.dist`; with
    isLazy the log-scalings (f, g) of exp(f_i + g_j - M_ij / reg), without a matrix [n, m]. `batchSize` changes nothing.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0], [1.0]])
        >>> empirical_sinkhorn(x, x, 1.0).round(3)
        array([[0.366, 0.134],
               [0.134, 0.366]])
    """
    call = "ot.bregman.empirical_sinkhorn"
    if isLazy:
        refuse_unknown(call, kwargs)
        f, g, record, _ = _lazy(
            call, X_s, X_t, reg, a, b, metric, numIterMax, stopThr, batchSize, warn, warmstart
        )
        return (f, g, record) if log else (f, g)
    M, a, b = _costs(call, X_s, X_t, a, b, metric)
    return sinkhorn(
        a, b, M, reg, numItermax=numIterMax, stopThr=stopThr, verbose=verbose, log=log, warn=warn, warmstart=warmstart,
        **kwargs,
    )  # fmt: skip


def empirical_sinkhorn2(
    X_s: Any,
    X_t: Any,
    reg: float,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    isLazy: bool = False,
    batchSize: int | tuple[int, int] = 100,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The cost <P, M> of the plan of `empirical_sinkhorn`, whose arguments these are.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0], [1.0]])
        >>> round(float(empirical_sinkhorn2(x, x, 1.0, isLazy=True)), 3)
        0.269
    """
    call = "ot.bregman.empirical_sinkhorn2"
    if isLazy:
        refuse_unknown(call, kwargs)
        *_, record, cost = _lazy(
            call, X_s, X_t, reg, a, b, metric, numIterMax, stopThr, batchSize, warn, warmstart
        )
        return (cost, record) if log else cost
    M, a, b = _costs(call, X_s, X_t, a, b, metric)
    return sinkhorn2(
        a, b, M, reg, numItermax=numIterMax, stopThr=stopThr, verbose=verbose, log=log, warn=warn, warmstart=warmstart,
        **kwargs,
    )  # fmt: skip


def empirical_sinkhorn_divergence(
    X_s: Any,
    X_t: Any,
    reg: float,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The cost between samples less half of those of each with itself, `ot.bregman.empirical_sinkhorn_divergence` of POT; not below 0.
    `warmstart` (u, v) starts the other two from (u, u) and (v, v).

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0], [1.0]])
        >>> float(empirical_sinkhorn_divergence(x, x, 1.0))
        0.0
    """
    u, v = (None, None) if warmstart is None else warmstart
    starts = {"ab": warmstart, "a": None if u is None else (u, u), "b": None if v is None else (v, v)}
    sides = {"ab": (X_s, X_t, a, b), "a": (X_s, X_s, a, a), "b": (X_t, X_t, b, b)}
    losses, logs = {}, {}
    for name, (x, y, weights_x, weights_y) in sides.items():
        losses[name], logs[name] = empirical_sinkhorn2(
            x, y, reg, weights_x, weights_y, metric=metric, numIterMax=numIterMax, stopThr=stopThr, verbose=verbose, log=True,
            warn=warn, warmstart=starts[name], **kwargs,
        )  # fmt: skip
    value = losses["ab"] - 0.5 * (losses["a"] + losses["b"])
    value = value.clamp(min=0) if isinstance(value, Tensor) else max(value, type(value)(0))
    if not log:
        return value
    record = {f"sinkhorn_loss_{name}": loss for name, loss in losses.items()}
    return value, record | {f"log_sinkhorn_{name}": entries for name, entries in logs.items()}


def empirical_sinkhorn2_geomloss(
    X_s: Any,
    X_t: Any,
    reg: float,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    scaling: float = 0.95,
    verbose: bool = False,
    debias: bool = False,
    log: bool = False,
    backend: str = "auto",
) -> Any:
    """`SamplesLoss` under the name that POT has for it: the value of entropic transport between samples, geomloss' cost |x - y|^2 / 2
    for metric="sqeuclidean" and |x - y| for "euclidean". With `log`, as in POT, the value is that of the cost |x - y|^2, and the log
    has f, g, value and lazy_plan.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0], [1.0]])
        >>> value, log = empirical_sinkhorn2_geomloss(x, x, 1.0, log=True)
        >>> log["lazy_plan"][:].round(3)
        array([[0.366, 0.134],
               [0.134, 0.366]])
    """
    from flashcoreset.compat.geomloss import SamplesLoss

    call = "ot.bregman.empirical_sinkhorn2_geomloss"
    library, found = take(call, X_s=X_s, X_t=X_t, a=a, b=b)
    x, y = (matrix(call, name, found[name]) for name in ("X_s", "X_t"))
    if metric not in ("sqeuclidean", "euclidean"):
        raise ValueError(f"{call}: metric must be 'sqeuclidean' or 'euclidean', got {metric!r}")
    reg = number(call, "reg", reg)
    p, blur = (2, (reg / 2) ** 0.5) if metric == "sqeuclidean" else (1, reg)
    rows, columns = weights(found["a"], x.shape[0], x), weights(found["b"], y.shape[0], y)
    options: dict[str, Any] = {"p": p, "blur": blur, "debias": debias, "scaling": scaling, "backend": backend}
    value = SamplesLoss("sinkhorn", verbose=verbose, **options)(rows, x, columns, y)
    if not log:
        return library.give(value)
    with torch.no_grad():
        f, g = SamplesLoss("sinkhorn", potentials=True, **options)(rows, x, columns, y)
    value = 2 * value if p == 2 else value

    def entries(i: Any, j: Any, **_: Any) -> Any:
        """The plan at rows i and columns j; of debiased potentials too, as POT has it."""
        i, j = _as_slice(i), _as_slice(j)
        exponents = f[i, None] + g[None, j] - cost_matrix(call, library, x[i], y[j], metric) / p
        return library.give((torch.exp(exponents / (reg / p)) * rows[i, None] * columns[None, j]).squeeze())

    names = ("X_a", "X_b", "f", "g", "a", "b")
    parts = dict(zip(names, library.give_all(x, y, f, g, rows, columns), strict=True))
    plan = LazyTensor((x.shape[0], y.shape[0]), entries, **parts, metric=metric, blur=blur)
    record = {"f": parts["f"], "g": parts["g"], "value": library.give(value), "lazy_plan": plan}
    return record["value"], record


def _costs(call: str, X_s: Any, X_t: Any, a: Any, b: Any, metric: Any) -> tuple[Any, Any, Any]:
    """The costs and weights as arrays of the caller's library; uniform weights are empty."""
    library, found = take(call, X_s=X_s, X_t=X_t)
    x, y = (matrix(call, name, found[name]) for name in ("X_s", "X_t"))
    costs = cost_matrix(call, library, x, y, metric)
    return library.give(costs), [] if a is None else a, [] if b is None else b


def _lazy(
    call: str, X_s: Any, X_t: Any, reg: Any, a: Any, b: Any, metric: str, max_iter: int, tol: float, batch: Any,
    warn: bool, warmstart: Any,
) -> tuple[Any, Any, dict[str, Any], Any]:  # fmt: skip
    """Log-scalings, the log and the cost, from points alone."""
    library, found = take(call, X_s=X_s, X_t=X_t, a=a, b=b)
    x, y = (matrix(call, name, found[name]) for name in ("X_s", "X_t"))
    for name in ("a", "b"):
        if wants_gradient(found[name]):
            raise NotImplementedError(
                f"{call}: gradients with respect to {name} need isLazy=False; POT's {call} has them"
            )
    if not isinstance(batch, int) and not (isinstance(batch, tuple) and len(batch) == 2):
        raise ValueError(f"{call}: batchSize must be an integer or a pair of integers, got {batch!r}")
    if metric not in POINT_METRICS:
        raise NotImplementedError(
            f"{call}: metric={metric!r} is not supported with isLazy; valid names: {', '.join(POINT_METRICS)}; POT's {call} "
            "takes others"
        )
    reg = number(call, "reg", reg)
    x, y = (t.detach().double() for t in (x, y))
    rows, columns = weights(found["a"], x.shape[0], x).double(), weights(found["b"], y.shape[0], y).double()
    start = None
    if warmstart is not None:
        given = take(call, u=warmstart[0], v=warmstart[1])[1]
        u, v = given["u"], given["v"]
        if u is None or v is None:
            raise TypeError(f"{call}: warmstart must be a pair of arrays, got {warmstart!r}")
        start = warm_potentials((u, v), (rows, columns), reg)
    transport = run(
        call, _NAMES, x, y, rows, columns, reg=reg, metric=POINT_METRICS[metric], max_iter=max_iter, tol=max(tol, 0.0),
        warm_start=start,
    )  # fmt: skip
    if warn and (tol <= 0 or not bool(transport.converged)):
        warn_user(DID_NOT_CONVERGE)
    f, g = transport.f / reg + rows.log(), transport.g / reg + columns.log()

    def entries(i: Any, j: Any, **_: Any) -> Any:
        i, j = _as_slice(i), _as_slice(j)
        costs = cost_matrix(call, library, x[i], y[j], metric)
        return library.give(torch.exp(f[i, None] + g[None, j] - costs / reg))

    parts = dict(zip(("X_a", "X_b", "f", "g"), library.give_all(x, y, f, g), strict=True))
    plan = LazyTensor((x.shape[0], y.shape[0]), entries, **parts, metric=metric, reg=reg)
    record = {"err": [library.give(transport.error)], "u": parts["f"], "v": parts["g"]}
    record |= {"niter": int(transport.iterations) - 1, "lazy_plan": plan}
    return parts["f"], parts["g"], record, library.give(transport.transport_cost)


def _as_slice(index: Any) -> slice:
    return slice(index, index + 1 or None) if isinstance(index, int) else index
