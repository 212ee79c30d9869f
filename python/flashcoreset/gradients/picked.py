"""Rows that were picked out of a tensor, such as the tokens that go to an expert: which of its rows each of them is.

They are followed from operations that pick rows through those whose row r depends on row r of their input alone, until
another operation takes them; there they are lost. So what is known of a row is never a guess from sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Base:
    """A tensor of `count` rows out of which rows were picked, in the module `home`; the tensor itself, if it is to be checked."""

    home: str
    count: int
    tensor: Tensor | None


@dataclass(frozen=True, eq=False)
class Origin:
    """Where rows come from: `rows` [S] int64, their numbers in `base`."""

    rows: Tensor
    base: Base

    def is_as(self, other: Origin) -> bool:
        return self.base is other.base and (self.rows is other.rows or torch.equal(self.rows, other.rows))


@dataclass(frozen=True, eq=False)
class Picked:
    """Rows that were picked out of a tensor which holds the samples. `ends`: where groups of them end, each with a matrix of its own."""

    origin: Origin
    ends: Tensor | None = None

    def groups(self) -> list[tuple[int, int]]:
        """The first and the last row of each group."""
        ends = [len(self.origin.rows)] if self.ends is None else self.ends.tolist()
        return list(pairwise([0, *ends]))


class Origins:
    """The tensors whose rows were picked, among those that are alive."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        self._bases: dict[int, tuple[weakref.ref[Tensor], Base]] = {}

    def clear(self) -> None:
        self._found.clear()
        self._bases.clear()

    def of(self, x: Any) -> Origin | None:
        found = self._found.get(id(x))
        return found[1] if found is not None and found[0]() is x else None

    def move(self, old: Tensor, new: Tensor) -> None:
        """Takes `new`, a copy of `old`, for what `old` was."""
        origin = self.of(old)
        if origin is not None:
            self._set(new, origin)

    def see(
        self,
        function: Any,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
        result: Any,
        home: str,
        keep: bool,
    ) -> None:
        """Follows the rows of what an operation in the module `home` was given into its `result`; `keep`: whether tensors that rows are
        picked out of are to be checked."""
        picks = _PICKS.get(function)
        if picks is not None and self._pick(picks, args, keywords, result, home, keep):
            return
        if not self._found:
            return
        origin = self._followed(function, args, keywords, result)
        if origin is None:
            self._forget(function, args, keywords)
            return
        for one in _tensors([result]):
            if one.dim() and len(one) == len(origin.rows):
                self._set(one, origin)

    def _set(self, x: Tensor, origin: Origin) -> None:
        self._found[id(x)] = weakref.ref(x), origin

    def _pick(
        self,
        picks: _Pick,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
        result: Any,
        home: str,
        keep: bool,
    ) -> bool:
        given = {**dict(zip(("input", *picks.names), args, strict=False)), **keywords}
        x = given.pop("input", None)
        if (
            not isinstance(x, Tensor)
            or isinstance(x, nn.Parameter)
            or x.dim() < 2
            or not x.is_floating_point()
        ):
            return False
        try:
            rows = picks.rows(x, **given)
        except TypeError:  # another form of the call
            return False
        if rows is None or not isinstance(result, Tensor) or not result.dim() or len(result) != len(rows):
            return False
        before = self.of(x)
        if before is not None:
            self._set(result, Origin(before.rows[rows], before.base))
            return True
        known = self._bases.get(id(x))
        if known is None or known[0]() is not x:
            known = self._bases[id(x)] = weakref.ref(x), Base(home, len(x), x.detach() if keep else None)
        self._set(result, Origin(rows, known[1]))
        return True

    def _followed(
        self, function: Any, args: tuple[Any, ...], keywords: dict[str, Any], result: Any
    ) -> Origin | None:
        """The origin of the rows of `result`, if each depends on one row alone of the tensors whose rows are known."""
        if function in _ELEMENTWISE:
            return self._of_operands(args, keywords, result)
        x: Any = args[0] if args else keywords.get("input")
        keeps = _by_rows if grouped(function) else _KEEPS_FIRST.get(function)
        origin = self.of(x)
        if origin is None or keeps is None or not keeps(x, *args[1:], **keywords):
            return None
        # Other tensors that these functions take are weights, for all rows.
        others = _tensors([*args[1:], *keywords.values()])
        return None if any(self.of(one) is not None for one in others) else origin

    def _of_operands(self, args: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> Origin | None:
        if not isinstance(result, Tensor) or "out" in keywords:
            return None
        found: Origin | None = None
        for x in _tensors([*args, *keywords.values()]):
            origin = self.of(x)
            if origin is None:
                # A row of something else, unless it is broadcast over the rows.
                if x.dim() == result.dim() and x.dim() and len(x) == len(result):
                    return None
            elif x.dim() != result.dim() or len(x) != len(result):
                return None
            elif found is None:
                found = origin
            elif not found.is_as(origin):
                return None
        return found

    def _forget(self, function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Forgets what an operation has changed in place."""
        name = getattr(function, "__name__", "")
        if args and (in_place(name) or name == "__setitem__"):
            self._found.pop(id(args[0]), None)
        for one in _tensors([keywords.get("out")]):
            self._found.pop(id(one), None)


def in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


# ---- operations that pick rows


@dataclass(frozen=True)
class _Pick:
    """How an operation is called after its input, and the numbers of the rows that it takes; None if it takes no rows."""

    names: tuple[str, ...]
    rows: Callable[..., Tensor | None]


def _indexed(x: Tensor, index: Any) -> Tensor | None:
    first, *rest = index if isinstance(index, tuple) else (index,)
    if not isinstance(first, Tensor) or first.dim() != 1:
        return None
    if not all(one is None or one is Ellipsis or isinstance(one, slice) for one in rest):
        return None
    if first.dtype in (torch.bool, torch.uint8):
        return first.nonzero()[:, 0]
    return torch.where(first < 0, first + len(x), first).to(torch.int64)


def _selected(x: Tensor, dim: int, index: Tensor) -> Tensor | None:
    return index.to(torch.int64) if dim % x.dim() == 0 and index.dim() == 1 else None


def _repeated(
    x: Tensor, repeats: Any, dim: int | None = None, output_size: int | None = None
) -> Tensor | None:
    if dim is None or dim % x.dim():
        return None
    return torch.arange(len(x), device=x.device).repeat_interleave(repeats)


_PICKS: dict[Any, _Pick] = {
    Tensor.__getitem__: _Pick(("index",), _indexed),
    torch.index_select: _Pick(("dim", "index"), _selected),
    Tensor.index_select: _Pick(("dim", "index"), _selected),
    torch.repeat_interleave: _Pick(("repeats", "dim"), _repeated),
    Tensor.repeat_interleave: _Pick(("repeats", "dim"), _repeated),
}

# ---- operations that leave rows what they are


def _functions(names: str) -> set[Any]:
    homes = (torch, Tensor, F, torch._C._nn)
    found = {getattr(home, name, None) for home in homes for name in names.split()}
    return found - {None}


_ELEMENTWISE = _functions(
    "abs abs_ add add_ clamp clamp_ clamp_max clamp_min clip clone contiguous cos detach div div_ double dropout elu "
    "exp float gelu half bfloat16 hardsigmoid hardswish hardtanh leaky_relu log log1p logsigmoid masked_fill maximum minimum "
    "mish mul mul_ multiply neg pow reciprocal relu relu6 relu_ rsqrt sigmoid sign silu sin softplus sqrt square sub sub_ "
    "tanh to true_divide type type_as where __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ "
    "__truediv__ __rtruediv__ __itruediv__ __pow__ __neg__"
)


def _by_rows(x: Tensor, *_: Any, **__: Any) -> bool:
    return x.dim() > 1


def _normed(x: Tensor, normalized_shape: Any, *_: Any, **__: Any) -> bool:
    return len(normalized_shape) < x.dim()


def _viewed(*_: Any, **__: Any) -> bool:
    """A view with as many rows has the same ones."""
    return True


def _other_dim(place: int, extra: int = 0) -> Callable[..., bool]:
    """Whether an operation, whose argument `place` after the input is a dimension, works along dimensions other than that of rows."""

    def keeps(x: Tensor, *args: Any, **keywords: Any) -> bool:
        dims: Any = keywords.get("dim", args[place] if len(args) > place else None)
        dims = [dims] if isinstance(dims, int) else dims
        return bool(dims) and all(dim % (x.dim() + extra) for dim in dims)

    return keeps


def _inner(x: Tensor, index: Any) -> bool:
    """Whether an index leaves the rows alone."""
    parts = index if isinstance(index, tuple) else (index,)
    if not parts or not all(isinstance(one, (slice, int)) or one is None or one is Ellipsis for one in parts):
        return False
    if parts[0] is Ellipsis:
        return sum(one is not None for one in parts[1:]) < x.dim()
    return isinstance(parts[0], slice) and parts[0] == slice(None)


_KEEPS_FIRST: dict[Any, Callable[..., bool]] = {
    Tensor.__getitem__: _inner,
    **dict.fromkeys(_functions("view reshape flatten unflatten"), _viewed),
    **dict.fromkeys(_functions("mean sum squeeze softmax log_softmax"), _other_dim(0)),
    **dict.fromkeys(_functions("chunk split tensor_split"), _other_dim(1)),
    **dict.fromkeys(_functions("unsqueeze"), _other_dim(0, 1)),
    **dict.fromkeys(_functions("layer_norm rms_norm"), _normed),
    F.linear: _by_rows,
}
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def grouped(function: Any) -> bool:
    """Whether `function` multiplies groups of rows by matrices of their own: torch's product, or that of transformers."""
    return (
        function is getattr(torch, "_grouped_mm", None)
        or getattr(function, "_qualified_op_name", "") in _GROUPED
    )
