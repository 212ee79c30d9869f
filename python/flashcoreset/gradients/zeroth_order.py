"""Per-sample gradients from forward passes alone, as coefficients of shared random directions."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.op import define_op
from flashcoreset._core.philox import philox4x32
from flashcoreset._core.saving import Saved, savable
from flashcoreset._core.tensor import (
    FLOATING,
    as_floating,
    as_int64,
    as_integer,
    as_number,
    as_tensor,
    compute_dtype,
    is_traced,
)
from flashcoreset.directions.backend import choose

_CHUNK = 1 << 20  # elements of a direction that are formed at a time

_calls: Counter[int] = Counter()  # the number of calls with resample=True, by seed
_calls_lock = threading.Lock()


@savable
@dataclass(frozen=True, eq=False)
class LowRankGradients(Saved):
    """Per-sample gradients coefficients @ Z, the rows of Z [q, numel] being random directions made from a seed.

    Attributes:
        coefficients: [B, q] float32 or float64.
        seed: the seed that the directions are regenerated from (`flashcoreset.directions.reference` defines them).
        numel: the length of a gradient.
        backend: the backend that regenerates the directions: None, "cpu", "cuda", "triton" or "torch".

    Raises:
        TypeError, ValueError: for attributes of another type, shape or range.

    Example:
        >>> import torch, flashcoreset as fc
        >>> g = fc.LowRankGradients(torch.tensor([[2.0], [-1.0]]), seed=0, numel=5)
        >>> torch.equal(g.dense(), g.coefficients @ g.directions())
        True
    """

    coefficients: Tensor
    seed: int
    numel: int
    backend: str | None = None

    def __post_init__(self) -> None:
        coefficients = as_floating(as_tensor(self.coefficients, "coefficients"), "coefficients")
        if coefficients.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"coefficients must have dtype float32 or float64, got {coefficients.dtype}")
        if coefficients.dim() != 2 or 0 in coefficients.shape:
            raise ValueError(f"coefficients must have shape [B, q], got {tuple(coefficients.shape)}")
        numel = as_integer(self.numel, "numel")
        if not 1 <= numel < 2**63:
            raise ValueError(f"numel must be >= 1 and below 2^63, got {numel}")
        check_backend(self.backend)
        for name, value in (
            ("coefficients", coefficients),
            ("numel", numel),
            ("seed", as_int64(self.seed, "seed")),
        ):
            object.__setattr__(self, name, value)

    def directions(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The columns `begin` to `end` (default: all) of Z, [q, end - begin], in the dtype and on the device of the coefficients.

        Raises:
            TypeError, ValueError: unless 0 <= begin < end <= numel.

        Example:
            >>> import torch, flashcoreset as fc
            >>> g = fc.LowRankGradients(torch.ones(3, 2), seed=0, numel=1000)
            >>> torch.equal(g.directions(300, 310), g.directions()[:, 300:310])
            True
        """
        begin = as_integer(begin, "begin")
        end = self.numel if end is None else as_integer(end, "end")
        if not 0 <= begin < end <= self.numel:
            raise ValueError(
                f"begin and end must satisfy 0 <= begin < end <= {self.numel}, got {begin} and {end}"
            )
        make = _DIRECTIONS if is_traced(self.coefficients) else _directions
        made: Tensor = make(self.coefficients, self.seed, begin, end, self.backend)
        return made

    def dense(self) -> Tensor:
        """The gradients [B, numel], in the dtype of the coefficients.

        Example:
            >>> import torch, flashcoreset as fc
            >>> fc.LowRankGradients(torch.ones(3, 2), seed=0, numel=7).dense().shape
            torch.Size([3, 7])
        """
        return self.coefficients @ self.directions()


def _directions(like: Tensor, seed: int, begin: int, end: int, backend: str | None) -> Tensor:
    """The directions [q, end - begin], one row for each column of `like`."""
    out = like.new_empty(like.shape[1], end - begin)
    choose(backend, like.device).directions(out, seed=seed, begin=begin)
    return out


# The torch op, which torch.compile and fake tensors see.


def _fake_directions(like: Tensor, seed: int, begin: int, end: int, backend: str | None) -> Tensor:
    return like.new_empty(like.shape[1], end - begin)


_DIRECTIONS = define_op("directions", _directions, _fake_directions)


def zeroth_order_gradients(
    loss_fn: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    *,
    eps: float = 1e-3,
    seed: int = 0,
    n_perturbations: int = 1,
    resample: bool = False,
    backend: str | None = None,
) -> LowRankGradients:
    """Per-sample gradients by simultaneous perturbation (SPSA): with a direction z that all samples share,
    each sample with loss L has c = (L(theta + eps z) - L(theta - eps z)) / (2 eps) and the gradient c z.

    Takes two calls of `loss_fn` per direction, without gradients, and no memory for a direction: z is made from its seed a part at a
    time, in the order of `parameters`. A copy of the parameters is kept meanwhile, from which they are restored bit for bit,
    also when `loss_fn` raises or is interrupted. Both calls see the same state of torch's random numbers (dropout), which goes on
    from the last call.

    Args:
        loss_fn: a function without arguments that returns the losses of the samples, [B], of any floating dtype.
        parameters: the tensors that are perturbed, in place, floating and on one device; such as model.parameters().
        eps: the size of the step, > 0. In half precision, steps below half a unit in the last place of a parameter are lost.
        seed: a 64-bit integer.
        n_perturbations: q, the number of directions; the gradient is the mean over the directions, so the coefficients are divided
            by q.
        resample: False gives every call with this seed the same directions; True gives each such call of this process other directions, by
            counting the calls. The result's `seed` is then a new one, which regenerates its directions.
        backend: None, "cpu", "cuda", "triton" or "torch": the backend that makes the directions.

    Returns:
        `LowRankGradients` with `coefficients` [B, q] (float64 for float64 losses, else float32).

    Raises:
        TypeError: for arguments of a wrong type, or a loss that is not a floating tensor.
        ValueError: for a wrong value, losses that are not [B] or change their shape, NaN or infinity in the losses, and losses
            that overflow when divided by 2 eps.
        BackendUnavailableError: if `backend` cannot run here.

    Sources: Malladi et al., "Fine-tuning language models with just forward passes" (MeZO), 2023, definition 1; Nguyen et al.,
    "Mini-batch coresets for memory-efficient language model training on data mixtures" (CoLM), 2024, which shares z among
    the samples.

    Example:
        >>> import torch, flashcoreset as fc
        >>> weight, x = torch.zeros(3, requires_grad=True), torch.eye(3)
        >>> g = fc.zeroth_order_gradients(lambda: (x @ weight), [weight])  # gradients x, seen along z
        >>> torch.allclose(g.coefficients[:, 0], x @ g.directions()[0], rtol=1e-3)
        True
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function without arguments, got {type(loss_fn).__name__}")
    tensors = _check_parameters(parameters)
    eps = as_number(eps, "eps")
    if eps <= 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    for dtype in {tensor.dtype for tensor in tensors}:
        limits = torch.finfo(dtype)
        if not limits.tiny <= eps <= limits.max / 8:  # no number of a direction is above 8
            raise ValueError(
                f"eps must be in [{limits.tiny:.3g}, {limits.max / 8:.3g}] for parameters of {dtype}, got {eps}"
            )
    seed = as_int64(seed, "seed")
    count = as_integer(n_perturbations, "n_perturbations")
    if not 1 <= count < 2**32:
        raise ValueError(f"n_perturbations must be >= 1 and below 2^32, got {count}")
    if not isinstance(resample, bool):
        raise TypeError(f"resample must be a bool, got {resample!r} of type {type(resample).__name__}")
    check_backend(backend)
    device = tensors[0].device
    fill = choose(backend, device).directions
    if resample:
        seed = _next_seed(seed)
    numel = sum(tensor.numel() for tensor in tensors)
    columns: list[Tensor] = []
    with torch.no_grad(), _restored(tensors) as originals:
        for p in range(count):
            random = _random_state(device)
            losses = []
            for step in (eps, -eps):
                _set_random_state(device, random)
                _move(tensors, originals, step, partial(fill, seed=seed, first=p))
                losses.append(_losses(loss_fn, columns[0].shape if columns else None))
            above, below = losses
            if above.shape != below.shape:
                raise ValueError(_changed(above.shape, below.shape))
            difference = (above.double() - below.double()) / (2 * eps * count)
            column = difference.to(compute_dtype(above.dtype))
            if not bool(column.isfinite().all()):
                raise ValueError(
                    f"eps must be large enough that the differences of losses divided by 2 eps do not overflow {column.dtype}, got {eps}"
                )
            if not bool(column.any()) and not _moves(
                tensors, originals, eps, partial(fill, seed=seed, first=p)
            ):
                raise ValueError(
                    f"eps must be large enough to change the parameters in their types, got {eps}"
                )
            columns.append(column)
    return LowRankGradients(torch.stack(columns, 1), seed, numel, backend)


def _move(tensors: list[Tensor], originals: list[Tensor], step: float, fill: Callable[..., None]) -> None:
    """Sets tensors = originals + step z, with z from `fill`, a part at a time."""
    begin = 0
    for tensor, original in zip(tensors, originals, strict=True):
        target = tensor.detach()
        flat = target.view(-1) if target.is_contiguous() else torch.empty_like(original).view(-1)
        for first in range(0, flat.numel(), _CHUNK):
            part = original.view(-1)[first : first + _CHUNK]
            z = part.new_empty(1, part.numel(), dtype=compute_dtype(part.dtype))
            fill(z, begin=begin + first)
            flat[first : first + _CHUNK] = z[0].mul_(step).add_(part)
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))
        begin += flat.numel()
    torch.clear_autocast_cache()  # which holds the values before the step


def _moves(tensors: list[Tensor], originals: list[Tensor], step: float, fill: Callable[..., None]) -> bool:
    """Whether a step changes a parameter by more than rounding takes away."""
    _move(tensors, originals, step, fill)
    return not all(torch.equal(tensor, original) for tensor, original in zip(tensors, originals, strict=True))


@contextmanager
def _restored(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of the tensors, which are put back at the end whatever happens."""
    originals = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
    try:
        yield originals
    finally:
        _put_back(tensors, originals)


def _put_back(tensors: list[Tensor], originals: list[Tensor]) -> None:
    try:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.copy_(original)
        torch.clear_autocast_cache()
    except KeyboardInterrupt:  # restores once more, from the beginning
        _put_back(tensors, originals)
        raise


def _losses(loss_fn: Callable[[], Tensor], expected: torch.Size | None) -> Tensor:
    losses = loss_fn()
    if not isinstance(losses, Tensor) or losses.dtype not in FLOATING:
        got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"loss_fn must return a floating tensor, the losses of the samples, got {got}")
    if losses.dim() != 1 or not losses.numel():
        raise ValueError(
            f"loss_fn must return the losses of the samples, [B], got shape {tuple(losses.shape)} (reduction='none'?)"
        )
    if expected is not None and losses.shape != expected:
        raise ValueError(_changed(expected, losses.shape))
    bad = ~torch.isfinite(losses)
    if bool(bad.any()):
        sample = int(bad.nonzero()[0])
        raise ValueError(
            f"loss_fn must return finite losses, got {float(losses[sample])} for sample {sample}"
        )
    return losses.detach().clone()


def _changed(first: torch.Size, second: torch.Size) -> str:
    return f"loss_fn must return the same number of losses each time, got {first[0]} and {second[0]}"


def _check_parameters(parameters: Any) -> list[Tensor]:
    if isinstance(parameters, (Tensor, torch.nn.Module, str)) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters must be several tensors, such as model.parameters(), got {type(parameters).__name__}"
        )
    tensors = list(parameters)
    if not tensors:
        raise ValueError("parameters must hold at least one tensor, got none")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"parameters must hold tensors, got {type(tensor).__name__} at position {i}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"parameters must be floating, got {tensor.dtype} at position {i}")
        if tensor.device != tensors[0].device:
            raise ValueError(f"parameters must be on one device, got {tensors[0].device} and {tensor.device}")
        if tensor.layout is not torch.strided or tensor.is_meta:
            got = "a meta tensor" if tensor.is_meta else f"layout {tensor.layout}"
            raise TypeError(f"parameters must be dense tensors with values, got {got} at position {i}")
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(f"parameters must hold each number once, got an expanded tensor at position {i}")
        if any(_overlap(tensor, other) for other in tensors[:i]):
            raise ValueError(
                f"parameters must hold each tensor once, got the one at position {i}, or its memory, before"
            )
    if not any(tensor.numel() for tensor in tensors):
        raise ValueError("parameters must hold at least one number, got empty tensors")
    return tensors


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether both share memory: from its beginning, or, if contiguous, in any part."""
    if one is other:
        return True
    if not one.numel() or not other.numel():
        return False
    begin, beside = one.data_ptr(), other.data_ptr()
    if begin == beside:
        return True
    return (
        one.is_contiguous()
        and other.is_contiguous()
        and begin < beside + other.nbytes
        and beside < begin + one.nbytes
    )


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _next_seed(seed: int) -> int:
    """The seed of the next call with resample=True."""
    with _calls_lock:
        number = _calls[seed]
        _calls[seed] += 1
    return seed_of_call(seed, number)


def seed_of_call(seed: int, number: int) -> int:
    """The seed that `resample` makes of `seed` in call `number`: 64 bits of the block (number, 0, 0, 5) under the key `seed`."""
    counter = np.array([number & 0xFFFFFFFF, number >> 32, 0, 5], dtype=np.uint32)
    low, high = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[:2].tolist()
    return int(low) + (int(high) << 32) - 2**63
