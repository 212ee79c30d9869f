"""Adam's history, by which gradient matching normalises gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.saving import Saved, savable
from flashcoreset._core.tensor import as_floating, as_int64, as_integer, as_number, as_tensor, promoted
from flashcoreset.gradients.zeroth_order import LowRankGradients


@savable
@dataclass(frozen=True, eq=False)
class AdamState(Saved):
    """Adam's running means m of gradients and v of their squares, before step `step`.

    Attributes:
        m: [D] float32 or float64; beside a v of the other type, float64.
        v: [D], not negative (checked when it is used).
        step: the number t >= 1 of the step to be made, on which the bias correction 1 - beta^t depends.
        betas: (beta1, beta2), each in [0, 1).
        eps: what is added to the square root of v's corrected value, > 0.

    Raises:
        TypeError, ValueError: for attributes of another type, shape or range.

    Example:
        >>> import torch, flashcoreset as fc
        >>> state = fc.AdamState(torch.zeros(10), torch.zeros(10), step=1)
        >>> state.betas, state.eps
        ((0.9, 0.999), 1e-08)
    """

    m: Tensor
    v: Tensor
    step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        m, v = as_floating(as_tensor(self.m, "m"), "m"), as_floating(as_tensor(self.v, "v"), "v")
        m, v = promoted(m, v)
        for name, tensor in (("m", m), ("v", v)):
            if tensor.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} must have dtype float32 or float64, got {tensor.dtype}")
            if tensor.dim() != 1 or not tensor.numel():
                raise ValueError(f"{name} must have shape [D], got {tuple(tensor.shape)}")
        if v.shape != m.shape:
            raise ValueError(f"v must have the shape of m, {tuple(m.shape)}, got {tuple(v.shape)}")
        if v.device != m.device:
            raise ValueError(f"v is on device {v.device}, but m is on {m.device}; move one of them")
        step, betas, eps = check_options(self.step, self.betas, self.eps)
        for name, value in (("m", m), ("v", v), ("step", step), ("betas", betas), ("eps", eps)):
            object.__setattr__(self, name, value)

    @property
    def numel(self) -> int:
        """The length D of the gradients."""
        return self.m.numel()

    def contiguous(self) -> AdamState:
        """The same with means that are contiguous in memory."""
        m, v = self.m.contiguous(), self.v.contiguous()
        return self if m is self.m and v is self.v else replace(self, m=m, v=v)


@savable
@dataclass(frozen=True, eq=False)
class RankOneAdamState(Saved):
    """Adam's history m = mean z and v = mean_square z^2 of gradients that were all multiples of one direction z: two numbers
    instead of 2 D. With means of 0 this is the history before the first step, whatever the direction.

    Attributes:
        mean: the factor of z in m.
        mean_square: the factor of z^2 in v, >= 0.
        seed: the seed that z is made from, as in `LowRankGradients`.
        numel: D.
        step, betas, eps: as in `AdamState`.

    Raises:
        TypeError, ValueError: for attributes of another type or range.

    Example:
        >>> import flashcoreset as fc
        >>> fc.RankOneAdamState(numel=1000).dense().m.abs().max()
        tensor(0.)
    """

    numel: int
    mean: float = 0.0
    mean_square: float = 0.0
    seed: int = 0
    step: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        step, betas, eps = check_options(self.step, self.betas, self.eps)
        numel = as_integer(self.numel, "numel")
        if not 1 <= numel < 2**63:
            raise ValueError(f"numel must be >= 1 and below 2^63, got {numel}")
        mean_square = as_number(self.mean_square, "mean_square")
        if mean_square < 0:
            raise ValueError(f"mean_square must be >= 0, got {mean_square}")
        for name, value in (
            ("numel", numel),
            ("mean", as_number(self.mean, "mean")),
            ("mean_square", mean_square),
            ("seed", as_int64(self.seed, "seed")),
            ("step", step),
            ("betas", betas),
            ("eps", eps),
        ):
            object.__setattr__(self, name, value)

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has entered this history, which then has no direction."""
        return self.mean == 0 and self.mean_square == 0

    def dense(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> AdamState:
        """The same history as an `AdamState`, its m and v in `dtype`, float32 or float64, on `device`; `backend` makes the
        direction.

        Example:
            >>> import flashcoreset as fc
            >>> fc.RankOneAdamState(numel=3, mean=2.0, mean_square=4.0).dense().v.shape
            torch.Size([3])
        """
        if self.is_empty:
            m = torch.zeros(self.numel, dtype=dtype, device=device)
            return AdamState(m, m.clone(), self.step, self.betas, self.eps)
        # No |z| is above 8.
        for name, value, bound in (("mean", abs(self.mean), 8), ("mean_square", self.mean_square, 64)):
            if value > torch.finfo(dtype).max / bound:
                raise ValueError(
                    f"{name} must be at most {torch.finfo(dtype).max / bound:.3g} in magnitude for {dtype}, got {value}"
                )
        one = torch.ones(1, 1, dtype=dtype, device=device)
        z = LowRankGradients(one, self.seed, self.numel, backend).directions()[0]
        return AdamState(z * self.mean, z.square() * self.mean_square, self.step, self.betas, self.eps)


def check_options(step: Any, betas: Any, eps: Any) -> tuple[int, tuple[float, float], float]:
    """`step`, `betas` and `eps` as numbers in their ranges."""
    number = as_int64(step, "step")
    if number < 1:
        raise ValueError(f"step must be >= 1, the number of the step to be made, got {number}")
    first, second = check_betas(betas)
    return number, (first, second), check_eps(eps)


def check_betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas must be a pair of numbers, got {type(betas).__name__}")
    if len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {len(betas)} of them")
    pair = as_number(betas[0], "betas[0]"), as_number(betas[1], "betas[1]")
    for i, beta in enumerate(pair):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
    return pair


def check_eps(eps: Any) -> float:
    number = as_number(eps, "eps")
    # With a far larger eps the squares of updates would vanish.
    if not 0 < number <= 1e100:
        raise ValueError(f"eps must be > 0 and at most 1e100, got {number}")
    return number
