"""The vocabulary of the random callers' programs: tensors by shape, dtype, content and layout, and objects that lie."""

from __future__ import annotations

from types import SimpleNamespace as fields  # noqa: F401 - an object with these attributes
from typing import Any

import numpy as np
import torch

nan, inf = float("nan"), float("inf")

FLOATS = ("float32", "float64")
HALVES = ("float16", "bfloat16")

# The kinds of contents; see `tensor`.
FINITE = ("normal", "ties", "zeros", "ones", "mixed")
EXTREME = ("tiny", "huge", "denormal", "largest", "bits", "nan", "inf")
# Metrics of points, those of costs, and kinds of sketches.
POINTS = ("cosine", "dot", "euclidean", "sqeuclidean", "l1")
COSTS = ("cosine", "euclidean", "sqeuclidean", "l1")
KINDS = ("rademacher", "gaussian", "sjlt", "srht", "gaussian-boxmuller")
LAYOUTS = ("plain", "transposed", "strided", "offset", "padded")
HOSTILE_LAYOUTS = (
    "broadcast",
    "numpy",
    "reversed",
    "read-only",
    "list",
    "gradient",
    "capsule",
    "sparse",
    "meta",
)


class Planted(Exception):
    """The exception of an object that lies: it may come through a call, since it is the caller's own."""


def _content(shape: tuple[int, ...], dtype: torch.dtype, content: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    name, _, argument = content.partition(":")
    if name == "below":  # whole numbers in [0, argument)
        return torch.randint(0, max(1, int(argument)), shape, generator=generator).to(dtype)
    if name == "range":
        return torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    if (
        name == "offsets" and len(shape) == 1
    ):  # begins of groups of about equal sizes, and the end: 0, ..., argument
        return torch.linspace(0, int(argument), shape[0]).floor().to(dtype)
    if name == "whole":  # one number everywhere
        return torch.full(shape, int(argument), dtype=dtype)
    if name == "shares":  # weights that sum to 1 along the last axis, some of them 0
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        x = x * (x > 0.2)
        if x.numel() > 0:
            x[..., 0] = 1
        return (x / x.sum(-1, keepdim=True)).to(dtype)
    if name == "positive":
        return torch.rand(shape, generator=generator, dtype=torch.float64).add(0.01).to(dtype)
    if not dtype.is_floating_point:
        return torch.randint(-(2**62) if name in EXTREME else 0, 2**62 if name in EXTREME else 3, shape,
                             generator=generator).to(dtype)  # fmt: skip
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    limits = torch.finfo(dtype)
    if name == "ties":
        x = x.mul(1.5).round()
    elif name in ("zeros", "ones"):
        x = torch.full(shape, float(name == "ones"), dtype=torch.float64)
    elif name == "mixed":
        x = x * 10.0 ** torch.randint(-6, 3, shape, generator=generator)
    elif name == "tiny":
        x = x * limits.tiny * 10
    elif name == "huge":
        x = x * limits.max / 100
    elif name == "largest":
        x = x.sign() * limits.max
    elif name == "denormal":
        x = x * limits.tiny / 8
    elif name == "bits":
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        low, high = torch.iinfo(width).min, torch.iinfo(width).max
        return torch.randint(low, high, shape, generator=generator, dtype=width).view(dtype)
    x = x.to(dtype)
    if name in ("nan", "inf") and x.numel() > 0:
        x.view(-1)[seed % x.numel()] = {"nan": nan, "inf": inf if seed % 2 else -inf}[name]
    return x


def tensor(
    shape: tuple[int, ...],
    dtype: str = "float32",
    content: str = "normal",
    layout: str = "plain",
    seed: int = 0,
) -> Any:
    """An array of that shape. Views of larger memory are cut to exactly the part that they span, so that a sanitizer sees an
    overrun."""
    kind = getattr(torch, dtype)
    if kind.is_complex or kind == torch.bool:
        x = torch.ones(shape, dtype=kind)
    else:
        x = _content(tuple(shape), kind, content, seed)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x
    if layout == "strided":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=kind) if x.ndim else x
        return wide[..., ::2].copy_(x) if x.ndim else x
    if layout == "offset":
        memory = torch.zeros(x.numel() + 1, dtype=kind)
        return memory[1:].view(x.shape).copy_(x)
    if layout == "padded":
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=kind) if x.ndim else x
        return wide[..., : x.shape[-1]].copy_(x) if x.ndim else x
    if layout == "broadcast":
        return x[:1].expand(x.shape) if x.ndim else x
    if layout == "gradient":
        return x.requires_grad_() if kind.is_floating_point else x
    if layout == "capsule":
        return torch.utils.dlpack.to_dlpack(x)
    if layout == "sparse":
        return x.to_sparse()
    if layout == "meta":
        return x.to("meta")
    if layout in ("numpy", "reversed", "read-only", "list"):
        array = x.float().numpy() if kind == torch.bfloat16 else x.numpy()
        if layout == "reversed":
            array = array[::-1] if array.ndim else array
        if layout == "read-only":
            array.setflags(write=False)
        return array.tolist() if layout == "list" else array
    return x


class Liar:
    """An array whose answers differ from those of an array. `how` says in which way."""

    def __init__(self, how: str, shape: tuple[int, ...] = (4, 3)) -> None:
        self.how, self._tensor = how, torch.ones(shape)
        if how == "shape":
            self.shape: Any = (2**40, -1)
        elif how == "shape is text":
            self.shape = "4, 3"

    def __dlpack__(self, **keywords: Any) -> Any:
        if self.how == "raises":
            raise Planted(self.how)
        if self.how == "no keywords" and keywords:
            raise TypeError("__dlpack__() takes no keyword arguments")
        if self.how in ("None", "text"):
            return None if self.how == "None" else "capsule"
        capsule = torch.utils.dlpack.to_dlpack(self._tensor)
        if self.how == "used":
            torch.from_dlpack(capsule)
        return capsule

    def __dlpack_device__(self) -> Any:
        return {"device": "cpu", "cuda": (2, 0), "far": (1, 2**40)}.get(self.how, (1, 0))

    def __len__(self) -> int:
        if self.how == "length":
            return 2**40
        return len(self._tensor)


LIES = (
    "raises",
    "no keywords",
    "None",
    "text",
    "used",
    "device",
    "cuda",
    "far",
    "length",
    "shape",
    "shape is text",
)


class Awkward:
    """A number that raises when it is asked for its value."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __index__(self) -> Any:
        if self.how == "raises":
            raise Planted(self.how)
        return 3 if self.how == "index" else "3"

    def __float__(self) -> Any:
        if self.how == "raises":
            raise Planted(self.how)
        return 0.5 if self.how == "index" else "0.5"

    __int__ = __index__


class Word(str):
    """A string whose comparisons are its own."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise Planted("==")

    def __hash__(self) -> int:
        return 1


def scalar(value: Any, dtype: str) -> Any:
    """A NumPy scalar, or a tensor without dimensions for `torch.` names."""
    if dtype.startswith("torch."):
        return torch.tensor(value, dtype=getattr(torch, dtype.removeprefix("torch.")))
    return getattr(np, dtype)(value)
