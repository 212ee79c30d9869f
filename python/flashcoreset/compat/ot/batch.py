"""POT's `ot.batch`: many problems at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcoreset.compat._arrays import Library, matrix, take, warn_unconverged
from flashcoreset.compat._costs import squared_distances
from flashcoreset.compat.ot._refused import refused
from flashcoreset.compat.ot._transport import Solved, number, solve
from flashcoreset.compat.ot.utils import OTResult

__all__ = [
    "bregman_log_projection_batch",
    "bregman_projection_batch",
    "dist_batch",
    "entropy_batch",
    "loss_linear_batch",
    "loss_linear_samples_batch",
    "solve_batch",
    "solve_sample_batch",
]


def __getattr__(name: str) -> Any:
    return refused(__name__, name)


_METHODS = ("auto", "proximal", "log_sinkhorn", "sinkhorn")
_REG_TYPES = ("kl", "entropy")
_GRADS = ("detach", "autodiff", "last_step", "envelope")
_NAMES = {"x": "M"}


def dist_batch(X1: Any, X2: Any = None, metric: str = "sqeuclidean", p: float = 2, nx: Any = None) -> Any:
    """Distances [B, n, m] between rows of X1 [B, n, d] and X2 [B, m, d] (X1 again if None): `ot.batch.dist_batch` of POT. metric:
    "sqeuclidean", "euclidean", "minkowski" (sum of |x - y|^p, to the power 1 / p) or "kl" between rows that are histograms.

    Example:
        >>> import numpy as np
        >>> dist_batch(np.array([[[0.0], [2.0]]]))
        array([[[0., 4.],
                [4., 0.]]])
    """
    library, found = take("ot.batch.dist_batch", X1=X1, X2=X2)
    x = matrix("ot.batch.dist_batch", "X1", found["X1"], 3)
    y = x if X2 is None else matrix("ot.batch.dist_batch", "X2", found["X2"], 3)
    return library.give(_distances(x, y, metric, p))


def _distances(x: Tensor, y: Tensor, metric: str, p: float) -> Tensor:
    name = str(metric).lower()
    if name == "sqeuclidean":
        return squared_distances(x, y)
    if name in ("euclidean", "minkowski"):
        norm = 2.0 if name == "euclidean" else float(p)
        return torch.cdist(x, y, p=norm, compute_mode="donot_use_mm_for_euclid_dist")
    if name == "kl":
        return (y * (y + 1e-10).log()).sum(-1)[:, None, :] - (x + 1e-10).log() @ y.mT
    raise ValueError(f"Unknown metric {metric!r}; valid names: sqeuclidean, euclidean, minkowski, kl")


def loss_linear_batch(M: Any, T: Any, nx: Any = None) -> Any:
    """The costs <M_b, T_b> [B] of plans T [B, n, m].

    Example:
        >>> import numpy as np
        >>> loss_linear_batch(np.ones((2, 3, 4)), np.full((2, 3, 4), 1 / 12)).round(6)
        array([1., 1.])
    """
    library, found = take("ot.batch.loss_linear_batch", M=M, T=T)
    costs, plans = (matrix("ot.batch.loss_linear_batch", name, found[name], 3) for name in ("M", "T"))
    return library.give((costs * plans).sum((1, 2)))


def loss_linear_samples_batch(X: Any, Y: Any, T: Any, metric: str = "sqeuclidean") -> Any:
    """`loss_linear_batch` of `dist_batch(X, Y, metric)`."""
    return loss_linear_batch(dist_batch(X, Y, metric=metric), T)


def entropy_batch(T: Any, nx: Any = None, eps: float = 1e-16) -> Any:
    """The entropies -sum T log(T + eps) [B] of plans T [B, n, m].

    Example:
        >>> import numpy as np
        >>> entropy_batch(np.full((1, 2, 2), 0.25)).round(4)
        array([1.3863])
    """
    library, found = take("ot.batch.entropy_batch", T=T)
    plans = matrix("ot.batch.entropy_batch", "T", found["T"], 3)
    return library.give(-(plans * (plans + eps).log()).sum((1, 2)))


def _project(
    call: str, library: Library, costs: Tensor, found: dict[str, Tensor | None], reg: float, max_iter: int, tol: float,
    grad: str, names: dict[str, str],
) -> tuple[Solved, list[Tensor]]:  # fmt: skip
    """Solved problems, whose plans have the graph that `grad` asks for; and the weights as they were given."""
    batch, n, m = costs.shape
    sides = []
    for name, size in (("a", n), ("b", m)):
        value = found[name]
        value = costs.new_full((batch, size), 1 / size) if value is None else value
        if value.shape != (batch, size):
            raise ValueError(f"{call}: {name} must have shape {(batch, size)}, got {tuple(value.shape)}")
        sides.append(value)
    a, b = sides
    if grad not in ("autodiff", "last_step"):
        costs, a, b = (t.detach() for t in (costs, a, b))
    solved = solve(call, library, costs, a, b, reg, max_iter=max_iter, tol=tol, rows_last=False, names=names)
    if tol > 0 and not solved.converged:
        warn_unconverged(call, max_iter, solved.error)
    return solved, sides


def bregman_projection_batch(
    K: Any,
    a: Any = None,
    b: Any = None,
    nx: Any = None,
    max_iter: int = 10000,
    tol: float = 1e-5,
    grad: str = "detach",
) -> dict[str, Any]:
    """The plans u K v [B, n, m] with marginals a [B, n] and b [B, m] (uniform if None), K > 0: `ot.batch.bregman_projection_batch` of
    POT. The result has T, n_iters and potentials (u, v).

    Example:
        >>> import numpy as np
        >>> bregman_projection_batch(np.ones((1, 2, 2)))["T"]
        array([[[0.25, 0.25],
                [0.25, 0.25]]])
    """
    call = "ot.batch.bregman_projection_batch"
    library, found = take(call, K=K, a=a, b=b)
    costs = -matrix(call, "K", found["K"], 3).log()
    solved, _ = _project(
        call, library, costs, found, 1.0, max_iter, tol, _as_projection(call, grad), {"x": "K"}
    )
    potentials = library.give_all(*(t.exp() for t in solved.log_scalings))
    return {"T": library.give(solved.plan), "n_iters": solved.iterations - 1, "potentials": potentials}


def bregman_log_projection_batch(
    K: Any,
    a: Any = None,
    b: Any = None,
    nx: Any = None,
    max_iter: int = 10000,
    tol: float = 1e-5,
    grad: str = "detach",
) -> dict[str, Any]:
    """The plans exp(u + K + v) [B, n, m] with marginals a [B, n] and b [B, m]: `ot.batch.bregman_log_projection_batch` of POT. The
    result has T, log_T, n_iters and potentials (u, v).

    Example:
        >>> import numpy as np
        >>> bregman_log_projection_batch(np.zeros((1, 2, 2)))["T"]
        array([[[0.25, 0.25],
                [0.25, 0.25]]])
    """
    call = "ot.batch.bregman_log_projection_batch"
    library, found = take(call, K=K, a=a, b=b)
    kernel = matrix(call, "K", found["K"], 3)
    solved, _ = _project(
        call, library, -kernel, found, 1.0, max_iter, tol, _as_projection(call, grad), {"x": "K"}
    )
    return {
        "T": library.give(solved.plan),
        "log_T": library.give(solved.plan.log()),
        "n_iters": solved.iterations - 1,
        "potentials": library.give_all(*solved.log_scalings),
    }


def _as_projection(call: str, grad: str) -> str:
    if grad not in _GRADS:
        raise ValueError(f"{call}: grad must be one of {', '.join(_GRADS)}, got {grad!r}")
    return "autodiff" if grad == "envelope" else grad  # as POT has it, where no value is at hand


def solve_batch(
    M: Any,
    reg: float | None = None,
    a: Any = None,
    b: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
    solver: str | None = None,
) -> OTResult:
    """Entropic plans of a batch of costs M [B, n, m]: `ot.batch.solve_batch` of POT.

    Args:
        M: costs; reg: the weight of the entropy, > 0.
        a, b: weights [B, n] and [B, m]; uniform if None.
        max_iter, tol: the most iterations and the error to stop at, of each problem for itself.
        method: "auto" and "log_sinkhorn" give log-scalings as potentials, "sinkhorn" scalings. `solver` is its name in POT 0.9.6.
        reg_type: "entropy" or "kl": what `value` has beside `value_linear`.
        grad: "detach" (no gradients), "envelope" (those of the value, with the plan as a constant), "autodiff" and "last_step" (of
            the solved plan, by implicit differentiation).

    Raises:
        NotImplementedError: for the exact problem and method="proximal".

    Example:
        >>> import numpy as np
        >>> solve_batch(np.zeros((1, 2, 2)), reg=1.0).plan
        array([[[0.25, 0.25],
                [0.25, 0.25]]])
    """
    call = "ot.batch.solve_batch"
    method = method if solver is None else solver
    for name, value, valid in (
        ("method", method, _METHODS),
        ("reg_type", reg_type, _REG_TYPES),
        ("grad", grad, _GRADS),
    ):
        if value not in valid:
            raise ValueError(f"{call}: {name} must be one of {', '.join(valid)}, got {value!r}")
    if method in ("sinkhorn", "log_sinkhorn") and (reg is None or reg <= 0):
        raise ValueError(f"{call}: reg must be > 0 for method={method!r}, got {reg}")
    if method == "proximal" or reg is None or reg == 0:
        what = "method='proximal'" if method == "proximal" else f"reg={reg}"
        raise NotImplementedError(f"{call}: {what} is exact transport, which POT's {call} solves")
    library, found = take(call, M=M, a=a, b=b)
    costs = matrix(call, "M", found["M"], 3)
    reg = number(call, "reg", reg)
    solved, sides = _project(call, library, costs, found, reg, max_iter, tol, grad, _NAMES)
    if grad == "detach":
        costs, sides = costs.detach(), [t.detach() for t in sides]
    plan = solved.plan
    linear = (costs * plan).sum((1, 2))
    weight = torch.where(plan > 0, plan, 1)
    if reg_type == "kl":
        weight = weight / torch.where(plan > 0, sides[0][:, :, None] * sides[1][:, None, :], 1)
    entropies = torch.where(plan > 0, plan * weight.log(), 0).sum((1, 2))
    potentials = solved.log_scalings
    if method == "sinkhorn":
        potentials = potentials[0].exp(), potentials[1].exp()
    return OTResult(
        potentials=library.give_all(*potentials),
        value=library.give(linear + reg * entropies),
        value_linear=library.give(linear),
        plan=library.give(plan),
        backend=library,
        log={"n_iter": solved.iterations - 1},
    )


def solve_sample_batch(
    X_a: Any,
    X_b: Any,
    reg: float | None = None,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    p: float = 2,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
    solver: str | None = None,
) -> OTResult:
    """`solve_batch` of `dist_batch(X_a, X_b, metric, p)`.

    Example:
        >>> import numpy as np
        >>> solve_sample_batch(np.zeros((1, 2, 3)), np.ones((1, 2, 3)), reg=1.0).value_linear.round(6)
        array([3.])
    """
    M = dist_batch(X_a, X_b, metric=metric, p=p)
    return solve_batch(M, reg, a, b, max_iter, tol, method, inner_iter, inner_reg, reg_type, grad, solver)
