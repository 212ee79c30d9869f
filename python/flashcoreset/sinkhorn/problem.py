"""A batch of entropic optimal transport problems and its solution, as all backends take and return them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashcoreset._core.constants import DEFAULT_MEMORY_BUDGET
from flashcoreset._core.tensor import one_of

METRICS = ("sqeuclidean", "euclidean", "l1", "cosine", "precomputed")
NORMS = ("l1", "l2")

_FEW = 16  # problems


@dataclass(slots=True, eq=False)
class Problem:
    """B problems of up to n rows and m columns each; see `flashcoreset.sinkhorn.reference` for the definition.

    Attributes:
        x: [B, n, d] points, or with metric "precomputed" the costs, [B, n, m] or [1, n, m] for all problems, +inf for pairs that are
            forbidden; float32 or float64. What lies beyond a problem's sizes (the padding) is not read, here and below.
        y: [B, m, d] points of the type of `x`; None with metric "precomputed".
        a, b: [B, n] and [B, m] float64: weights >= 0, of equal sums if both marginals are balanced.
        reg: eps, the weight of the entropy, > 0, in the units of the costs.
        metric: "sqeuclidean", "euclidean", "l1", "cosine" or "precomputed".
        rho_a, rho_b: the weights of the marginals' penalties; inf for a marginal that holds.
        x_lengths, y_lengths: [B] int64, the sizes of the problems; None for n and m.
        max_iter: the most iterations of one problem.
        tol: the error to stop at; see `flashcoreset.sinkhorn.schedule.Schedule`.
        f, g: [B, n] and [B, m] float64: the potentials to start from, None for 0; those of the plan in `sinkhorn_plan` and
            `sinkhorn_apply`.
        memory_budget: bytes that a matrix [n, m] of one problem may take; a larger one is made anew, a block at a time, in
            each iteration.
        weighted: whether weights were given, so that their values need checks; else they are uniform.
        batched: whether the caller's problem had a batch dimension.
        backend: the backend that was asked for.
        symmetric: whether `y` and `b` are `x` and `a`, so that both potentials are the same; with points alone.
        norm: "l1" or "l2": of which norms of both sides' residuals the error is the sum.
    """

    x: Tensor
    y: Tensor | None
    a: Tensor
    b: Tensor
    reg: float
    metric: str
    rho_a: float = math.inf
    rho_b: float = math.inf
    x_lengths: Tensor | None = None
    y_lengths: Tensor | None = None
    max_iter: int = 1000
    tol: float = 1e-6
    f: Tensor | None = None
    g: Tensor | None = None
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    weighted: bool = True
    batched: bool = True
    backend: str | None = None
    symmetric: bool = False
    norm: str = "l1"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, n and m."""
        return self.a.shape[0], self.a.shape[1], self.b.shape[1]

    @property
    def each_x(self) -> Tensor:
        """`x` with all B problems, without a copy."""
        return self.x.expand(len(self.a), -1, -1)

    @property
    def has_few_numbers(self) -> bool:
        """Whether one number per problem is checked sooner as Python's than as a tensor's."""
        return self.a.device.type == "cpu" and self.a.shape[0] <= _FEW

    @property
    def l2(self) -> bool:
        """Whether errors are L2 norms."""
        one_of(self.norm, "norm", NORMS)
        return self.norm == "l2"

    @property
    def balanced(self) -> bool:
        return math.isinf(self.rho_a) and math.isinf(self.rho_b)

    @property
    def sides(self) -> tuple[tuple[str, Tensor, Tensor | None, Tensor | None], ...]:
        """For the rows and for the columns: the name of their weights, these, their potentials, and the problems' sizes."""
        return ("a", self.a, self.f, self.x_lengths), ("b", self.b, self.g, self.y_lengths)

    def shaped(self, tensor: Tensor) -> Tensor:
        """The caller's shape of a result [B, ...]."""
        return tensor if self.batched else tensor[0]

    def at(self, f: Tensor, g: Tensor) -> Problem:
        """The problem with these potentials."""
        return self._with(self.x, self.y, self.a, self.b, f, g)

    def _with(
        self, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, f: Tensor | None, g: Tensor | None
    ) -> Problem:
        # By place: dataclasses.replace takes six times as long.
        return Problem(
            x, y, a, b, self.reg, self.metric, self.rho_a, self.rho_b, self.x_lengths, self.y_lengths, self.max_iter,
            self.tol, f, g, self.memory_budget, self.weighted, self.batched, self.backend, self.symmetric, self.norm,
        )  # fmt: skip

    def potentials(self) -> tuple[Tensor, Tensor]:
        """f and g, which have to be there."""
        if self.f is None or self.g is None:
            raise ValueError("f and g must be the potentials of the plan, got None")
        return self.f, self.g

    def within(self, problem: int) -> str:
        """ " of problem 3", to end a message with, if there are several."""
        return f" of problem {problem}" if self.a.shape[0] > 1 else ""

    def ready(self) -> Problem:
        """The problem as the kernels take it: without a graph; weights 0 in the padding, those of `b` scaled to the sum of those
        of `a` if both marginals are balanced, since rounding leaves a difference."""
        x, y, a, b = (
            t.detach() if t is not None and t.requires_grad else t for t in (self.x, self.y, self.a, self.b)
        )
        assert x is not None and a is not None and b is not None  # noqa: PT018
        if self.weighted:
            a, b = (masked(t, lengths) for t, lengths in ((a, self.x_lengths), (b, self.y_lengths)))
            if self.balanced:
                b = b * (totals(a) / totals(b))[:, None]
        elif x is self.x and y is self.y:
            return self
        return self._with(x, y, a, b, self.f, self.g)


def totals(weights: Tensor) -> Tensor:
    """The sum per row of `weights` [B, size], added up from left to right: whatever zeros follow, the bits are the same, which
    those of torch.sum are not."""
    return weights.cumsum(1)[:, -1] if weights.shape[1] else weights.sum(1)


def inside(lengths: Tensor, size: int) -> Tensor:
    """A mask [B, size] bool, True for what is not padding."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def masked(values: Tensor, lengths: Tensor | None) -> Tensor:
    """`values` [B, size] or [B, size, k] with 0 in the padding."""
    if lengths is None:
        return values
    mask = inside(lengths, values.shape[1])
    return torch.where(mask if values.dim() == 2 else mask[:, :, None], values, 0)


class Result(NamedTuple):
    """What every backend's `sinkhorn` returns: potentials in float64, 0 in the padding, and one entry per problem for the rest."""

    f: Tensor  # [B, n] float64
    g: Tensor  # [B, m] float64
    value: Tensor  # [B] float64
    transport_cost: Tensor  # [B] float64
    error: Tensor  # [B] float64
    iterations: Tensor  # [B] int64
    converged: Tensor  # [B] bool


class Output(NamedTuple):
    """What the compiled modules write a result to."""

    f: Tensor  # [B, n] float64
    g: Tensor  # [B, m] float64
    scalars: (
        Tensor  # [4, B] float64: value, transport cost, error, and the error at which the problem is solved
    )
    iterations: Tensor  # [B] int64

    @classmethod
    def of(cls, problem: Problem) -> Output:
        batch, n, m = problem.sizes
        device = problem.a.device
        f, g = (torch.zeros(batch, size, dtype=torch.float64, device=device) for size in (n, m))
        scalars = torch.empty(4, batch, dtype=torch.float64, device=device)
        return cls(f, g, scalars, torch.empty(batch, dtype=torch.int64, device=device))

    def result(self) -> Result:
        value, transport_cost, error, tolerance = self.scalars
        return Result(self.f, self.g, value, transport_cost, error, self.iterations, error <= tolerance)
