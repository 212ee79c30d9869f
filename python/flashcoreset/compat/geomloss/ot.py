"""geomloss' newer interface, `geomloss.ot`: transport between samples or for given costs, one problem or a batch."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

import flashcoreset as fc
from flashcoreset.compat._arrays import Library, take, wants_gradient
from flashcoreset.compat._costs import squared_distances
from flashcoreset.compat._plan_gradient import differentiable
from flashcoreset.compat.geomloss._divergence import Parts, transports, uniform

__all__ = [
    "LinearOperator",
    "OTResult",
    "OTResultMatrix",
    "OTResultSample",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
]

_TOLERANCE = 1e-6
# geomloss' max_iter counts steps of a schedule, at the end of which it stops wherever it is.
_LEAST_ITERATIONS = 1000


class LinearOperator:
    """A linear map that is applied with `@` to arrays [m] or [m, k], for batches [B, m] or [B, m, k]; `T` is its transpose."""

    def __init__(self, result: OTResult, transposed: bool, is_density: bool) -> None:
        self._result = result
        self._transposed = transposed
        self._is_density = is_density

    @property
    def shape(self) -> tuple[int, int]:
        problem = self._result._problem
        n, m = problem.a.numel(), problem.b.numel()
        return (m, n) if self._transposed else (n, m)

    @property
    def T(self) -> LinearOperator:
        return LinearOperator(self._result, not self._transposed, self._is_density)

    def transpose(self) -> LinearOperator:
        return self.T

    def __matmul__(self, x: Any) -> Any:
        result = self._result
        value = take("geomloss.ot.LinearOperator", x=x)[1]["x"]
        if value is None:
            raise ValueError("x must not be empty")
        batched = value if result._batched else value[None]
        before, after = (
            (result._problem.a, result._problem.b)
            if self._transposed
            else (result._problem.b, result._problem.a)
        )
        if self._is_density:  # which is the plan over both weights
            batched = batched / _like(before.to(value.dtype), batched)
        transport = result._problem.ab
        batched = batched.to(transport.f.dtype)
        out = transport.apply_transpose(batched) if self._transposed else transport.apply(batched)
        if self._is_density:
            out = out / _like(after.to(out.dtype), out)
        return result._library.give(out if result._batched else out[0])


def _like(weights: Tensor, values: Tensor) -> Tensor:
    return weights if values.dim() == 2 else weights[:, :, None]


class OTResult:
    """What the solvers return: `value`, `potential_a`, `potential_b`, `plan`, `density` (the plan over a x b), their operators and
    `marginal_a`, `marginal_b`; with debias=True `potential_aa` and `potential_bb` too.

    Example:
        >>> import numpy as np
        >>> solve(np.zeros((2, 2)), reg=1.0, max_iter=10).plan
        array([[0.25, 0.25],
               [0.25, 0.25]])
    """

    lazy_density = None
    lazy_plan = None
    a_to_b = None
    b_to_a = None

    def __init__(self, library: Library, problem: Parts, costs: Tensor, rho: float, batched: bool) -> None:
        self._library = self._backend = library  # the second name is POT's
        self._problem = problem
        self._costs = costs  # [B, n, m], or [] with a graph if the points ask for gradients
        self._rho = rho
        self._batched = batched
        self.value_linear: Any = None

    def _give(self, tensor: Tensor) -> Any:
        return self._library.give(tensor if self._batched else tensor[0])

    @cached_property
    def value(self) -> Any:
        return self._give(self._problem.dual_value)

    @cached_property
    def potential_a(self) -> Any:
        return self._give(self._problem.cross_potentials[0])

    @cached_property
    def potential_b(self) -> Any:
        return self._give(self._problem.cross_potentials[1])

    @cached_property
    def potential_aa(self) -> Any:
        return self._give(self._problem.own_potentials[0])

    @cached_property
    def potential_bb(self) -> Any:
        return self._give(self._problem.own_potentials[1])

    @cached_property
    def _plan(self) -> Tensor:
        problem = self._problem
        plan = problem.ab.plan()
        if not wants_gradient(self._costs, problem.a, problem.b):
            return plan
        return differentiable(
            plan,
            self._costs,
            problem.a,
            problem.b,
            reg=problem.reg,
            rho=(self._rho, self._rho),
            product_reference=True,
        )

    @cached_property
    def plan(self) -> Any:
        return self._give(self._plan)

    @cached_property
    def density(self) -> Any:
        f, g = self._problem.cross_potentials
        exponents = (f[:, :, None] + g[:, None, :] - self._costs) / self._problem.reg
        return self._give(exponents.exp())

    @property
    def density_operator(self) -> LinearOperator:
        return LinearOperator(self, False, True)

    @property
    def plan_operator(self) -> LinearOperator:
        return LinearOperator(self, False, False)

    @cached_property
    def marginal_a(self) -> Any:
        return self._give(self._plan.sum(2))

    @cached_property
    def marginal_b(self) -> Any:
        return self._give(self._plan.sum(1))

    @property
    def citation(self) -> str:
        return (
            "Computed by flashcoreset, through the interface of geomloss: Feydy et al., 'Interpolating between optimal "
            "transport and MMD using Sinkhorn divergences', AISTATS 2019."
        )


class OTResultSample(OTResult):
    """The result of `solve_sample` and `solve_sample_batch`."""


class OTResultMatrix(OTResult):
    """The result of `solve` and `solve_batch`."""


def _check_options(
    call: str, reg: Any, unbalanced: Any, unbalanced_type: str, method: str, max_iter: int | None, tol: Any
) -> None:
    if reg is None or reg < 0:
        raise ValueError(f"{call}: reg must be > 0, got {reg}")
    if reg == 0:
        raise NotImplementedError(f"{call}: reg=0, exact transport, is not supported, nor is it by geomloss")
    if unbalanced is not None and unbalanced <= 0:
        raise ValueError(f"{call}: unbalanced must be None or > 0, got {unbalanced}")
    if unbalanced_type != "KL":
        raise NotImplementedError(
            f"{call}: unbalanced_type={unbalanced_type!r} is not supported, nor is it by geomloss"
        )
    if method != "auto":
        raise NotImplementedError(f"{call}: method={method!r} is not supported, nor is it by geomloss")
    if max_iter is None or max_iter < 1:
        raise ValueError(f"{call}: max_iter must be a positive integer, got {max_iter}")
    if tol is not None:
        raise NotImplementedError(f"{call}: tol is not supported, nor is it by geomloss")


def _as_arrays(**values: Any) -> dict[str, Any]:
    return {
        k: np.asarray(v, dtype=np.float64) if isinstance(v, (list, tuple)) else v for k, v in values.items()
    }


def _weight(call: str, name: str, given: Tensor | None, like: Tensor) -> Tensor:
    """Weights of the shape of `like` without its last dimension."""
    if given is None:
        return uniform(like)
    if given.shape != like.shape[:-1]:
        raise ValueError(f"{call}: {name} must have shape {tuple(like.shape[:-1])}, got {tuple(given.shape)}")
    if bool((given < 0).any()):
        raise ValueError(f"{call}: {name} must be >= 0")
    return given


def _transports(*args: Any, max_iter: int, **options: Any) -> Parts:
    with warnings.catch_warnings():
        # geomloss' iterations end where they end.
        warnings.simplefilter("ignore", fc.ConvergenceWarning)
        return transports(*args, max_iter=max(max_iter, _LEAST_ITERATIONS), tol=_TOLERANCE, **options)


def _solve_sample(
    call: str, dimensions: int, arrays: dict[str, Any], cost: Any, debias: bool, options: dict[str, Any]
) -> OTResultSample:
    if cost != "sqeuclidean":
        raise NotImplementedError(f"{call}: cost={cost!r} is not supported, nor is it by geomloss")
    for name, other in (("blur", "reg"), ("reach", "unbalanced")):
        value = options.pop(name)
        if value is None:
            continue
        if options[other] is not None:
            raise ValueError(f"{call}: {other} and {name} say the same; pass one of them")
        options[other] = 2 * value**2
    _check_options(call, **options)
    library, found = take(call, **_as_arrays(**arrays))
    points = []
    for name in ("X_a", "X_b"):
        value = found[name]
        if value is None or value.dim() != dimensions:
            got = None if value is None else tuple(value.shape)
            raise ValueError(f"{call}: {name} must have {dimensions} dimensions, got shape {got}")
        points.append(value)
    x, y = points
    if x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            f"{call}: X_a and X_b must have the same features and batch, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    a, b = _weight(call, "a", found["a"], x), _weight(call, "b", found["b"], y)
    batched = dimensions == 3
    x, y, a, b = (t if batched else t[None] for t in (x, y, a, b))
    reg, unbalanced = float(options["reg"]), options["unbalanced"]
    parts = _transports(
        x,
        y,
        a,
        b,
        reg=reg,
        reach=unbalanced,
        metric="sqeuclidean",
        debias=debias,
        max_iter=options["max_iter"],
    )
    return OTResultSample(library, parts, squared_distances(x, y), unbalanced or float("inf"), batched)


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    cost: str = "sqeuclidean",
    debias: bool = False,
    reg: float | None = None,
    unbalanced: float | None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
    blur: float | None = None,
    reach: float | None = None,
) -> OTResultSample:
    """Entropic transport between samples X_a [n, d] and X_b [m, d] for the cost |x - y|^2: `geomloss.ot.solve_sample`.

    Args:
        a, b: weights [n] and [m]; uniform if None.
        debias: whether the values of each set with itself are subtracted.
        reg: the weight of the entropy, or `blur` for 2 blur^2. unbalanced: the penalty of the marginals, or `reach` for 2 reach^2.
        max_iter: has to be given, as with geomloss; at least 1000 iterations may be made, until marginals are right to 1e-6.

    Example:
        >>> round(float(solve_sample([[0.0], [1.0]], [[1.0], [2.0]], reg=0.1, max_iter=100).value), 3)
        1.069
    """
    return _solve_sample(
        "geomloss.ot.solve_sample", 2, {"X_a": X_a, "X_b": X_b, "a": a, "b": b}, cost, debias,
        {"reg": reg, "unbalanced": unbalanced, "unbalanced_type": unbalanced_type, "method": method, "max_iter": max_iter,
         "tol": tol, "blur": blur, "reach": reach},
    )  # fmt: skip


def solve_sample_batch(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    cost: str = "sqeuclidean",
    debias: bool = False,
    reg: float | None = None,
    unbalanced: float | None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
    p: int | None = None,
    blur: float | None = None,
    reach: float | None = None,
) -> OTResultSample:
    """`solve_sample` of batches X_a [B, n, d] and X_b [B, m, d], with weights [B, n] and [B, m]. (geomloss 0.3.1 has the name alone.)

    Example:
        >>> import numpy as np
        >>> solve_sample_batch(np.zeros((2, 1, 3)), np.ones((2, 1, 3)), reg=0.1, max_iter=100).value.round(4)
        array([3., 3.])
    """
    if p not in (None, 2):
        raise NotImplementedError(
            f"geomloss.ot.solve_sample_batch: p={p} is not supported, nor is it by geomloss"
        )
    return _solve_sample(
        "geomloss.ot.solve_sample_batch", 3, {"X_a": X_a, "X_b": X_b, "a": a, "b": b}, cost, debias,
        {"reg": reg, "unbalanced": unbalanced, "unbalanced_type": unbalanced_type, "method": method, "max_iter": max_iter,
         "tol": tol, "blur": blur, "reach": reach},
    )  # fmt: skip


def _solve(call: str, dimensions: int, C: Any, a: Any, b: Any, options: dict[str, Any]) -> OTResultMatrix:
    _check_options(call, **options)
    library, found = take(call, **_as_arrays(C=C, a=a, b=b))
    costs = found["C"]
    if costs is None or costs.dim() != dimensions:
        raise ValueError(
            f"{call}: C must have {dimensions} dimensions, got shape {None if costs is None else tuple(costs.shape)}"
        )
    rows, columns = _weight(call, "a", found["a"], costs), _weight(call, "b", found["b"], costs.mT)
    batched = dimensions == 3
    costs, rows, columns = (t if batched else t[None] for t in (costs, rows, columns))
    unbalanced = options["unbalanced"]
    parts = _transports(
        costs, None, rows, columns, reg=float(options["reg"]), reach=unbalanced, metric="precomputed", debias=False,
        max_iter=options["max_iter"],
    )  # fmt: skip
    return OTResultMatrix(library, parts, costs, unbalanced or float("inf"), batched)


def solve(
    C: Any,
    *,
    reg: float,
    a: Any = None,
    b: Any = None,
    unbalanced: float | None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
) -> OTResultMatrix:
    """Entropic transport for costs C [n, m]: `geomloss.ot.solve`; arguments as in `solve_sample`.

    Example:
        >>> round(float(solve([[0.0, 1.0], [1.0, 0.0]], reg=0.1, max_iter=100).value), 3)
        0.069
    """
    return _solve(
        "geomloss.ot.solve", 2, C, a, b,
        {"reg": reg, "unbalanced": unbalanced, "unbalanced_type": unbalanced_type, "method": method, "max_iter": max_iter,
         "tol": tol},
    )  # fmt: skip


def solve_batch(
    C: Any,
    *,
    reg: float,
    a: Any = None,
    b: Any = None,
    unbalanced: float | None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
) -> OTResultMatrix:
    """`solve` of a batch of costs C [B, n, m], with weights [B, n] and [B, m].

    Example:
        >>> import numpy as np
        >>> solve_batch(np.ones((2, 3, 4)), reg=0.1, max_iter=100).value.round(4)
        array([1., 1.])
    """
    return _solve(
        "geomloss.ot.solve_batch", 3, C, a, b,
        {"reg": reg, "unbalanced": unbalanced, "unbalanced_type": unbalanced_type, "method": method, "max_iter": max_iter,
         "tol": tol},
    )  # fmt: skip
