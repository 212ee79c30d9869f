"""What POT's `ot.utils` has of the pieces that transport needs: distances, uniform weights, results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcoreset.compat._arrays import Library, matrix, refuse_unknown, take
from flashcoreset.compat._costs import cost_matrix

__all__ = ["LazyTensor", "OTResult", "dist", "unif"]


def unif(n: int, type_as: Any = None) -> Any:
    """Uniform weights 1/n [n], of the library and type of the array `type_as`; NumPy float64 without one.

    Example:
        >>> unif(4)
        array([0.25, 0.25, 0.25, 0.25])
    """
    if type_as is None:
        return Library(True, torch.float64, torch.device("cpu")).give(
            torch.full((n,), 1 / n, dtype=torch.float64)
        )
    library, _ = take("ot.unif", type_as=type_as)
    return library.give(torch.full((n,), 1 / n, dtype=library.dtype, device=library.device))


def dist(
    x1: Any, x2: Any = None, metric: Any = "sqeuclidean", p: float = 2, w: Any = None, **unknown: Any
) -> Any:
    """Distances [n, m] between the rows of x1 [n, d] and x2 [m, d] (x1 again if None): "sqeuclidean", "euclidean", "cityblock",
    "minkowski" with its `p`, "cosine" and "correlation", differentiable for tensors; any other metric of SciPy's `cdist` for NumPy
    arrays.

    Raises:
        NotImplementedError: for weights `w`, `backend` and the like.

    Example:
        >>> import numpy as np
        >>> dist(np.array([[0.0], [1.0]]), np.array([[3.0]]))
        array([[9.],
               [4.]])
    """
    refuse_unknown("ot.dist", {**unknown, **({} if w is None else {"w": w})})
    library, found = take("ot.dist", x1=x1, x2=x2)
    x = matrix("ot.dist", "x1", found["x1"])
    y = x if x2 is None else matrix("ot.dist", "x2", found["x2"])
    return library.give(cost_matrix("ot.dist", library, x, y, metric, p=p))


class LazyTensor:
    """A matrix whose entries are computed when it is indexed by integers and slices; `shape`, `ndim` and the arrays that it is made
    of are attributes."""

    def __init__(self, shape: tuple[int, ...], getitem: Callable[..., Any], **kwargs: Any) -> None:
        self._getitem = getitem
        self.shape = shape
        self.ndim = len(shape)
        self.kwargs = kwargs
        for name, value in kwargs.items():
            setattr(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        keys = list(key) if isinstance(key, tuple) else [key]
        if not all(isinstance(k, (int, slice)) for k in keys):
            raise NotImplementedError("a LazyTensor is indexed by integers, slices and tuples of these")
        return self._getitem(*keys, *[slice(None)] * (self.ndim - len(keys)), **self.kwargs)

    def __repr__(self) -> str:
        return f"LazyTensor(shape={self.shape},attributes=({','.join(self.kwargs)}))"


class OTResult:
    """What `solve` and its relatives return: `plan`, `potentials`, `value`, `value_linear`, `marginals` and so on; None for what
    a method does not have.

    Example:
        >>> import numpy as np
        >>> from flashcoreset.compat import ot
        >>> ot.solve(np.zeros((2, 2)), reg=1.0).plan
        array([[0.25, 0.25],
               [0.25, 0.25]])
    """

    def __init__(
        self,
        potentials: tuple[Any, Any] | None = None,
        value: Any = None,
        value_linear: Any = None,
        value_quad: Any = None,
        plan: Any = None,
        log: dict[str, Any] | None = None,
        backend: Library | None = None,
        lazy_plan: LazyTensor | None = None,
        status: str | None = None,
        batch_size: int = 100,
    ) -> None:
        self._potentials = potentials
        self._value = value
        self._value_linear = value_linear
        self._value_quad = value_quad
        self._plan = plan
        self._log = log
        self._backend = backend
        self._lazy_plan = lazy_plan
        self._status = status
        self._batch_size = batch_size

    def __repr__(self) -> str:
        parts = [
            f"{name}={value}"
            for name, value in (("value", self._value), ("value_linear", self._value_linear))
            if value is not None
        ]
        parts += [
            f"{name}={type(value).__name__}(shape={value.shape})"
            for name, value in (("plan", self._plan), ("lazy_plan", self._lazy_plan))
            if value is not None
        ]
        return f"OTResult({','.join(parts)})"

    @property
    def potentials(self) -> tuple[Any, Any] | None:
        return self._potentials

    @property
    def potential_a(self) -> Any:
        return None if self._potentials is None else self._potentials[0]

    @property
    def potential_b(self) -> Any:
        return None if self._potentials is None else self._potentials[1]

    @property
    def plan(self) -> Any:
        return self._plan

    @property
    def sparse_plan(self) -> Any:
        return None if self._plan is None or self._backend is None else self._backend.tocsr(self._plan)

    @property
    def lazy_plan(self) -> LazyTensor | None:
        return self._lazy_plan

    @property
    def value(self) -> Any:
        return self._value

    @property
    def value_linear(self) -> Any:
        return self._value_linear

    @property
    def value_quad(self) -> Any:
        return self._value_quad

    @property
    def marginals(self) -> tuple[Any, Any] | None:
        return None if self._plan is None else (self.marginal_a, self.marginal_b)

    @property
    def marginal_a(self) -> Any:
        if self._plan is not None:
            return self._plan.sum(1)
        return None if self._lazy_plan is None else self._reduced(self._lazy_plan, 1)

    @property
    def marginal_b(self) -> Any:
        if self._plan is not None:
            return self._plan.sum(0)
        return None if self._lazy_plan is None else self._reduced(self._lazy_plan, 0)

    def _reduced(self, plan: LazyTensor, axis: int) -> Any:
        """The sums of a lazy plan along an axis, `batch_size` rows at a time."""
        step = self._batch_size
        blocks = [plan[begin : begin + step] for begin in range(0, plan.shape[0], step)]
        if axis == 0:
            return sum(block.sum(0) for block in blocks)
        sums = [block.sum(1) for block in blocks]
        if isinstance(sums[0], Tensor):
            return torch.cat(sums)
        import numpy as np

        return np.concatenate(sums)

    @property
    def status(self) -> str | None:
        return self._status

    @property
    def log(self) -> dict[str, Any] | None:
        return self._log

    @property
    def a_to_b(self) -> Any:
        raise NotImplementedError("OTResult.a_to_b: displacements are not computed, nor are they by POT")

    @property
    def b_to_a(self) -> Any:
        raise NotImplementedError("OTResult.b_to_a: displacements are not computed, nor are they by POT")

    @property
    def citation(self) -> str:
        return (
            "Computed by flashcoreset, through the interface of POT: Flamary et al., 'POT: Python Optimal Transport', "
            "Journal of Machine Learning Research 22(78), 2021."
        )
