"""Transport: what `sinkhorn` returns."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from flashcoreset._core.saving import Saved, savable
from flashcoreset._core.tensor import as_floating, as_tensor, same_device
from flashcoreset.sinkhorn.ops import apply_plan, plan_of
from flashcoreset.sinkhorn.problem import Problem, masked

savable(Problem)


@savable
@dataclass(frozen=True, eq=False)
class Transport(Saved):
    """Entropic optimal transport plans P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg): what `sinkhorn` returns.

    Attributes:
        f, g: [n] and [m], or [B, n] and [B, m] for a batch: the potentials (dual variables); 0 in the padding. If
            a weight is zero, the potential is the one that the other side implies. `plan` and `apply` take potentials in float64.
        value: scalar or [B]: the optimum of <P, C> + reg KL(P | a x b), plus the penalties of the marginals if
            these are relaxed, computed as the dual objective; differentiable in x, y, the costs, a and b.
        transport_cost: scalar or [B]: <P, C>.
        error: scalar or [B]: the error of both marginals of `plan()`, the sum of their two L1 (with norm="l2" L2) distances from a
            and b; with `reg_marginal` from what the potentials ask for, a exp(-f / rho) and b exp(-g / rho): 0 only at the solution.
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
    _problem: Problem  # with the potentials in float64

    def __getstate__(self) -> dict[str, Any]:
        """What copies, pickles and files hold: the same numbers, without a graph."""
        problem = self._problem
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {field.name: getattr(problem, field.name) for field in fields(problem)}
        return _detached(state) | {"_problem": replace(problem, **_detached(given))}

    def plan(self) -> Tensor:
        """The plan P as a matrix [n, m], or [B, n, m] with zeros in the padding. Not differentiable.

        Example:
            >>> import torch, flashcoreset as fc
            >>> fc.sinkhorn(torch.zeros(2, 2), reg=1.0, metric="precomputed").plan()
            tensor([[0.2500, 0.2500],
                    [0.2500, 0.2500]])
        """
        p = self._problem
        return p.shaped(plan_of(p.ready()))

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
        batch, n, m = p.sizes
        v = as_floating(as_tensor(value, "v"), "v")
        same_device(v, "v", p.x.device)
        size = n if transpose else m
        outer = (batch, size) if p.batched else (size,)
        if v.dim() not in (len(outer), len(outer) + 1) or v.shape[: len(outer)] != outer:
            wanted = f"{list(outer)} or {[*outer, 'k']}".replace("'", "")
            raise ValueError(f"v must have shape {wanted}, got {tuple(v.shape)}")
        flat = v.dim() == len(outer)
        factor = v if p.batched else v[None]
        factor = masked(factor[:, :, None] if flat else factor, p.x_lengths if transpose else p.y_lengths)
        out = apply_plan(p.ready(), factor.detach().to(p.x.dtype), transpose)
        return p.shaped(out[:, :, 0] if flat else out)


def _detached(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
