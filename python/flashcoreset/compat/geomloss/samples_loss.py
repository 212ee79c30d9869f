"""geomloss' `SamplesLoss`: distances between weighted sets of points, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashcoreset.compat.geomloss._divergence import Parts, transports, uniform
from flashcoreset.compat.geomloss._kernel_losses import NAMES, kernel_loss

_BACKENDS = ("auto", "tensorized", "online", "multiscale")
_MAX_ITER = 10_000

# Errors of marginals at which the transports stop, over 1 - scaling: at geomloss' default of 0.5, 0.5 % of the mass, whose effect on
# the loss is a hundred times less than that of geomloss' own iterations.
_TOLERANCE = 1e-2


class SamplesLoss(torch.nn.Module):
    """A loss between two weighted sets of points: geomloss' `SamplesLoss`.

    Args:
        loss: "sinkhorn", or a distance of kernels: "energy" (-|x - y|), "gaussian" (exp(-|x - y|^2 / (2 blur^2))) or "laplacian"
            (exp(-|x - y| / blur)).
        p: 2 for the cost |x - y|^2 / 2, 1 for |x - y|.
        blur: the entropy has weight blur^p. reach: penalties reach^p relax the marginals; None for marginals that hold.
        scaling: the transports are solved until the marginals are right to 0.01 (1 - scaling) of the mass.
        cost: None, or a function of x [B, n, d] and y [B, m, d] that gives costs [B, n, m].
        debias: whether the losses of each set with itself are subtracted.
        potentials: whether to return the potentials (F, G), without a graph for "sinkhorn", in the place of the loss.
        diameter, truncate, cluster_scale, verbose, backend: change no result here; the memory taken is that of the points and a
            part of the matrix.

    Raises:
        NotImplementedError: when called with loss="hausdorff", p other than 1 and 2, formulas of KeOps as `cost`, and `kernel`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> loss = SamplesLoss("sinkhorn", p=2, blur=0.1)(x, torch.tensor([[1.0], [2.0]]))
        >>> loss.backward()
        >>> round(float(loss.detach()), 3), x.grad.round(decimals=2).tolist()
        (0.5, [[-0.5], [-0.5]])
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable[[Tensor, Tensor], Tensor] | str | None = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.loss = loss
        self.backend = backend
        self.p = p
        self.blur = blur
        self.reach = reach
        self.truncate = truncate
        self.diameter = diameter
        self.scaling = scaling
        self.cost = cost
        self.kernel = kernel
        self.cluster_scale = cluster_scale
        self.debias = debias
        self.potentials = potentials
        self.verbose = verbose

    def forward(self, *args: Tensor) -> Any:
        """The loss of (x, y), (a, x, b, y) or (labels_x, a, x, labels_y, b, y).

        Args:
            x: [n, d] or a batch [B, n, d]; y: [m, d] or [B, m, d].
            a: weights [n] or [n, 1], in a batch with B before; b: [m]; uniform if left out.
            labels_x, labels_y: clusters [n] and [m] of geomloss' multiscale scheme, which change no result.

        Returns:
            A scalar, or [B]; with potentials=True the pair (F, G), shaped as the weights are.
        """
        a, x, b, y = self._arguments(args)
        single = x.dim() == 2
        flat_a, flat_b = _checked(a, b, x, y, single)
        x, y, flat_a, flat_b = (t[None] if single else t for t in (x, y, flat_a, flat_b))
        if self.loss in NAMES:
            found = kernel_loss(flat_a, x, flat_b, y, self.loss, self.blur, self.potentials)
        else:
            parts = self._solve(x, y, flat_a, flat_b)
            found = parts.potentials if self.potentials else parts.value
        if isinstance(found, tuple):
            return found[0].to(x.dtype).view(a.shape), found[1].to(x.dtype).view(b.shape)
        return found[0] if single else found

    def _solve(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Parts:
        if not 0 < self.scaling < 1:
            raise ValueError(f"SamplesLoss: scaling must be > 0 and < 1, got {self.scaling}")
        tol = _TOLERANCE * (1 - self.scaling)
        # In units of the kernels' |x - y|^2, twice geomloss' cost.
        scale = 2.0 if self.p == 2 and self.cost is None else 1.0
        common: dict[str, Any] = {
            "reg": scale * self.blur**self.p, "reach": None if self.reach is None else scale * self.reach**self.p,
            "scale": scale, "debias": self.debias, "tol": tol, "max_iter": _MAX_ITER,
        }  # fmt: skip
        if self.cost is None:
            metric = "sqeuclidean" if self.p == 2 else "euclidean"
            return transports(x, y, a, b, metric=metric, **common)
        assert callable(self.cost)
        own = (self.cost(x, x), self.cost(y, y)) if self.debias else None
        return transports(self.cost(x, y), None, a, b, own=own, metric="precomputed", **common)

    def _arguments(self, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._refuse()
        if len(args) not in (2, 4, 6):
            raise ValueError(
                "SamplesLoss takes two arguments (x, y), four (a, x, b, y) or six (labels_x, a, x, labels_y, b, y), got "
                f"{len(args)}"
            )
        if len(args) == 2:
            x, y = args
            for points in args:
                _check_points(points)
            return uniform(x), x, uniform(y), y
        if len(args) == 4:
            a, x, b, y = args
            return a, x, b, y
        labels_x, a, x, labels_y, b, y = args
        for labels, points, name in ((labels_x, x, "labels_x"), (labels_y, y, "labels_y")):
            if labels is None:
                continue
            if self.backend not in ("auto", "multiscale"):
                raise ValueError(f"{name} need backend='auto' or 'multiscale', got {self.backend!r}")
            if points.dim() == 3:
                raise NotImplementedError(f"{name} with batches are not supported, nor are they by geomloss")
            if labels.shape not in ((points.shape[0],), (points.shape[0], 1)):
                raise ValueError(f"{name} must have shape ({points.shape[0]},), got {tuple(labels.shape)}")
        return a, x, b, y

    def _refuse(self) -> None:
        refused = None
        if self.loss not in ("sinkhorn", *NAMES):
            if self.loss != "hausdorff":
                raise ValueError(f"loss must be 'sinkhorn', {', '.join(map(repr, NAMES))}, got {self.loss!r}")
            refused = "loss='hausdorff'"
        elif self.backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {self.backend!r}")
        elif self.kernel is not None:
            refused = "kernel"
        elif self.cost is not None and not callable(self.cost):
            refused = f"cost={self.cost!r}, a formula,"
        elif self.p not in (1, 2) and self.cost is None and self.loss == "sinkhorn":
            refused = f"p={self.p}"
        if refused is not None:
            raise NotImplementedError(
                f"SamplesLoss: {refused} is not supported here; geomloss' SamplesLoss may take it"
            )


def _check_points(points: Tensor) -> None:
    if points.dim() not in (2, 3):
        raise ValueError(
            f"x and y must have shape [n, d], or [B, n, d] for a batch, got {tuple(points.shape)}"
        )


def _checked(a: Tensor, b: Tensor, x: Tensor, y: Tensor, single: bool) -> tuple[Tensor, Tensor]:
    """The weights [n] and [m], or [B, n] and [B, m], if they fit the points."""
    for points in (x, y):
        _check_points(points)
    if x.dim() != y.dim() or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            f"x and y must have the same batch size and number of features, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if a.dim() != b.dim():
        raise ValueError(
            f"a and b must have the same number of dimensions, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    flat = []
    for weights, points, name in ((a, x, "a"), (b, y, "b")):
        outer = points.shape[:-1]
        if weights.shape not in (outer, (*outer, 1)):
            raise ValueError(f"{name} must have shape {tuple(outer)}, got {tuple(weights.shape)}")
        flat.append(weights.reshape(outer))
    return flat[0], flat[1]
