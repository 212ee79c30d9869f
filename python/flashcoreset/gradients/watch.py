"""Sees the operations of a forward pass that use wanted parameters outside of layers that are known."""

from __future__ import annotations

import types as python_types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashcoreset.gradients.layers import (
    ELEMENTWISE,
    EMBEDDING,
    LINEAR,
    TRANSPOSED_LINEAR,
    Elementwise,
    Layer,
)
from flashcoreset.gradients.layouts import Layout, layouts
from flashcoreset.gradients.picked import grouped, in_place
from flashcoreset.gradients.quiet import quiet, rehearses
from flashcoreset.gradients.rehearsal import without_dropout
from flashcoreset.gradients.uses import Place, Target, in_backward

if TYPE_CHECKING:
    from flashcoreset.gradients.hooks import Hooks


@dataclass(frozen=True)
class _Lookup:
    """What the rule of embeddings reads of a module."""

    padding_idx: int | None


@dataclass(frozen=True, eq=False)
class _Slice:
    """Consecutive rows of a parameter."""

    tensor: weakref.ref[Tensor]
    target: Target
    row: int


class Watch(TorchFunctionMode):
    """Takes the gradients of operations that use wanted parameters directly, and notices those that it cannot take."""

    def __init__(self, sketcher: Hooks) -> None:
        super().__init__()
        self._sketcher = sketcher
        self._slices: dict[int, _Slice] = {}
        self._places: dict[Any, Place] = {}  # by the home and the use
        self._places_of: dict[Any, Place] = {}  # the last one for each use
        self._in_attention = False

    def clear(self) -> None:
        self._slices.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sketcher, kwargs = self._sketcher, kwargs or {}
        if quiet() and not rehearses(sketcher):
            return func(*args, **kwargs)
        if in_backward() and not sketcher._frames and not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in _BACKWARD and all(kind in (Tensor, nn.Parameter) for kind in types):
            return self._backward(func, args, kwargs)
        if sketcher._still:
            args, kwargs = without_dropout(func, args, kwargs)
        if (
            func is F.multi_head_attention_forward
            and _ATTENTION is not None
            and any(True for _ in self._used((*args, *kwargs.values())))
        ):
            return self._attention(args, kwargs)
        result = func(*args, **kwargs)
        if not torch.is_grad_enabled():
            if sketcher._frames and not sketcher._rehearsing and not in_backward():
                for _, target, _ in self._used(
                    (*args, *kwargs.values())
                ):  # a reentrant checkpoint's forward pass
                    sketcher._pass.calls[target.name] += 1
            return result
        if sketcher._frames:
            home, keep = sketcher._frames[-1], sketcher._record is not None
            sketcher._origins.see(func, args, kwargs, result, str(home), keep)
        if sketcher._single:
            sketcher._follow(func, (*args, *kwargs.values()), result)
        used = list(self._used((*args, *kwargs.values())))
        return self._use(func, args, kwargs, result, used) if used else result

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs torch's function of multi-head attention in the sight of this mode; time comes first in there."""
        assert _ATTENTION is not None
        before, self._in_attention = self._in_attention, True
        try:
            with self:
                return _ATTENTION(*args, **kwargs)
        finally:
            self._in_attention = before

    def _backward(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a backward pass in the sight of this mode, for the checkpoints that are computed again in it."""
        with self:
            return _BACKWARD[func](*args, **kwargs)

    def _used(self, values: Iterable[Any]) -> Iterator[tuple[Tensor, Target, int]]:
        """The tensors among `values` that are wanted parameters or rows of them, with the first row."""
        inside = self._sketcher._inside
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._used(value)
            elif isinstance(value, nn.Parameter):
                target = self._sketcher._targets.get(id(value))
                if target is not None and (inside is None or target not in inside.targets.values()):
                    yield value, target, 0
            elif isinstance(value, Tensor) and id(value) in self._slices:
                found = self._slices[id(value)]
                if found.tensor() is value:
                    yield value, found.target, found.row

    def _use(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, used: list[Any]
    ) -> Any:
        outputs = [
            one
            for one in (result if isinstance(result, (tuple, list)) else (result,))
            if isinstance(one, Tensor) and one.requires_grad and not one.is_leaf
        ]
        if not outputs:
            return result
        if len(used) == 1 and self._note_slices(used[0], outputs):
            return result
        sketcher, called = self._sketcher, getattr(func, "__name__", str(func))
        targets = list({id(target): target for _, target, _ in used}.values())
        # A function that a checkpoint runs again has no calls of modules around it.
        known = sketcher._frames or in_backward()
        if known and isinstance(result, Tensor) and not in_place(called):
            captured = self._captured(func, args, kwargs, result, used, targets, called)
            if captured is not None:
                return captured
        for target in targets:
            text = f"parameter {target.name!r} is used outside of a call of its module, by {called}"
            if not sketcher._need([target], text, refuse=False):
                for one in outputs:
                    one.register_hook(sketcher._hook_of(target.name, called))
        return result

    def _note_slices(self, used: tuple[Tensor, Target, int], outputs: list[Tensor]) -> bool:
        """Remembers outputs that are whole consecutive rows of a parameter, for later uses; those of a parameter that holds several
        matrices may be transposed."""
        _, target, _ = used
        parameter = target.parameter
        if parameter.dim() not in (1, 2, 3) or not parameter.is_contiguous():
            return False
        if not all(one._base is parameter and _is_slice(one, parameter) for one in outputs):
            return False
        for one in outputs:
            wide = 1 if one.dim() == 1 else parameter.shape[-1]
            at = (one.storage_offset() - parameter.storage_offset()) // wide
            self._slices[id(one)] = _Slice(weakref.ref(one), target, at)
        return True

    def _captured(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
        used: list[Any],
        targets: list[Target],
        called: str,
    ) -> Tensor | None:
        """`result`, whose gradient will be taken, or None if the operation is not known."""
        if func is F.linear:
            x, weight, bias = _linear(*args, **kwargs)
            roles = {"weight": weight, "bias": bias}
            return self._take(LINEAR, None, called, roles, used, x, result, None)
        if grouped(func):
            return self._grouped(args, kwargs, result, used, called)
        if func is F.embedding:
            return self._embedding(args, kwargs, result, used, called)
        if func is Tensor.__getitem__:
            return self._indexed(args, result, used, called)
        if len(used) != 1 or used[0][0] is not used[0][1].parameter:
            return None
        return self._elementwise(args, result, used[0], called)

    def _take(
        self,
        layer: Layer,
        module: Any,
        called: str,
        roles: dict[str, Any],
        used: list[Any],
        x: Any,
        result: Tensor,
        found: list[Layout] | None,
        ends: Tensor | None = None,
    ) -> Tensor | None:
        sketcher = self._sketcher
        mine: dict[str, Target] = {}
        rows: dict[str, range] = {}
        for value, target, row in used:
            role = next((name for name, one in roles.items() if one is value), None)
            if role is None or target in mine.values():
                return None
            if layer is not ELEMENTWISE:
                if value.dim() != (1 if role == "bias" else 2 if ends is None else 3):
                    return None
                height = value.shape[0] if ends is None else value.shape[0] * target.parameter.shape[1]
                rows[role] = range(row, row + height)
            mine[role] = target
        if x is not None and not isinstance(x, Tensor):
            return None
        place = self._place(called, layer, module, mine)
        if place is None:
            return None
        picked, place = sketcher._picked(place, x, result, ends)
        if place in sketcher._small or (ends is not None and picked is None):
            return None
        batch = sketcher._batch()
        if picked is not None:
            found = sketcher._layouts_of(picked)
        elif found is None and batch is not None:
            found = layouts(result.shape[:-1], batch, sketcher._batch_dim)
            if self._in_attention:
                found = [one for one in found if one.dim == 1]
        return sketcher._take(place, x, result, found, rows, picked)

    def _place(self, called: str, layer: Layer, module: Any, targets: dict[str, Target]) -> Place | None:
        """The place of an operation in the innermost module that is called."""
        use = (called, module, tuple(targets.items()))
        if not self._sketcher._frames:
            return self._places_of.get(use)  # as in the forward pass that is run again
        home = self._sketcher._frames[-1]
        place = self._places.get((home.name, use))
        if place is None:
            place = Place(home.name, module, layer, targets, f"{called} in {home}")
            self._places[home.name, use] = place
        self._places_of[use] = place
        return place

    def _grouped(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, used: list[Any], called: str
    ) -> Tensor | None:
        """A product of groups of rows, each with a matrix of a parameter."""
        names = ("input", "weight", "offs", "bias", "out_dtype")
        given: dict[str, Any] = {
            {"self": "input", "mat2": "weight"}.get(name, name): value for name, value in kwargs.items()
        }
        given.update(zip(names, args, strict=False))
        x, weight, ends = (given.get(name) for name in names[:3])
        assert isinstance(x, Tensor)
        assert isinstance(weight, Tensor)
        if given.get("bias") is not None or given.get("out_dtype") is not None:
            return None
        if not isinstance(ends, Tensor) or x.dim() != 2 or weight.dim() != 3 or len(used) != 1:
            return None
        layer = LINEAR if _is_transposed(weight, used[0][1].parameter) else TRANSPOSED_LINEAR
        return self._take(layer, None, called, {"weight": weight}, used, x, result, None, ends)

    def _embedding(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, used: list[Any], called: str
    ) -> Tensor | None:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
            return None
        padding, weight = given.get("padding_idx"), given["weight"]
        if padding is not None and padding < 0:
            padding += weight.shape[0]
        if used[0][2]:
            return None
        lookup, indices = _Lookup(padding), given["input"]
        return self._take(EMBEDDING, lookup, called, {"weight": weight}, used, indices, result, None)

    def _indexed(self, args: tuple[Any, ...], result: Tensor, used: list[Any], called: str) -> Tensor | None:
        """Rows of a matrix by a tensor of their numbers, as embeddings give them."""
        weight, index = args
        whole = weight.dim() == 2 and not used[0][2] and weight is used[0][0]
        if not whole or not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            return None
        rows = torch.where(index < 0, index + len(weight), index)
        return self._take(EMBEDDING, _Lookup(None), called, {"weight": weight}, used, rows, result, None)

    def _elementwise(
        self, args: tuple[Any, ...], result: Tensor, used: tuple[Tensor, Target, int], called: str
    ) -> Tensor | None:
        """Sums, products and copies for all samples, in which the parameter is broadcast over the samples."""
        parameter, batch = used[0], self._sketcher._batch()
        node = result.grad_fn
        if node is None or batch is None:
            return None
        own = torch.autograd.graph.get_gradient_edge(parameter).node
        edges = [i for i, (edge, _) in enumerate(node.next_functions) if edge is own]
        if len(edges) != 1:
            return None
        kind, x, factor = node.name(), None, 1.0
        if kind in ("AddBackward0", "SubBackward0"):
            if edges[0] == 1:
                factor = float(node._saved_alpha) * (1 if kind == "AddBackward0" else -1)  # type: ignore[attr-defined]
        elif kind == "MulBackward0":
            others = [one for one in args if isinstance(one, Tensor) and one is not parameter]
            if len(others) != 1:
                return None
            x = others[0].detach()
        elif kind not in ("ExpandBackward0", "RepeatBackward0"):
            return None
        shape = (*[1] * (result.dim() - parameter.dim()), *parameter.shape)
        if len(shape) != result.dim() or any(
            a not in (1, b) for a, b in zip(shape, result.shape, strict=True)
        ):
            return None
        found = [
            one
            for one in layouts(result.shape, batch, self._sketcher._batch_dim)
            if shape[0 if one.flat else one.dim] == 1
        ]
        if self._in_attention:
            found = [one for one in found if one.dim == 1]
        if batch > 1:  # a tensor of other samples or of positions may look the same
            found = [one for one in found if not one.flat]
        if not found:
            return None
        # The check of rows decides between several; the shape of a sample depends on it.
        found = found[:1]
        inner = list(shape)
        if found[0].flat:
            inner = [1, *inner[1:]] if found[0].dim == 0 else inner
        else:
            del inner[found[0].dim]
        if x is not None:
            x = x.expand(result.shape)
        module = Elementwise(tuple(inner), factor)
        return self._take(ELEMENTWISE, module, called, {"weight": parameter}, [used], x, result, found)


def _linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _is_slice(one: Tensor, parameter: Tensor) -> bool:
    """Whether a view is whole consecutive rows of the matrices that a parameter holds, or one of the vectors that it holds."""
    if one.dim() == 1 and parameter.dim() < 3:
        return one.is_contiguous()
    if one.dim() == 3 and parameter.dim() == 3:
        if _is_transposed(one, parameter):
            one = one.transpose(1, 2)
        elif one.shape == parameter.shape:
            return False  # a copy for the samples of a batch of one
        return one.is_contiguous() and one.shape[1:] == parameter.shape[1:]
    wide = parameter.shape[-1]
    begin = one.storage_offset() - parameter.storage_offset()
    return (
        one.dim() == 2 <= parameter.dim()
        and one.is_contiguous()
        and one.shape[1] == wide
        and not begin % wide
    )


def _is_transposed(one: Tensor, parameter: Tensor) -> bool:
    """Whether a view of a parameter of several matrices holds them transposed."""
    rows, columns = parameter.shape[1:]
    return one.shape[1:] == (columns, rows) and one.stride()[1:] == (1, columns) and rows * columns > 1


def _seen_through(function: Any) -> Any:
    """A copy of a function of torch that does not hand itself over to modes as a whole."""
    code = getattr(function, "__code__", None)
    asks = [name for name in getattr(code, "co_names", ()) if name.startswith("has_torch_function")]
    if code is None or not asks:
        return None
    names = {**function.__globals__, **dict.fromkeys(asks, lambda *_: False)}
    made = python_types.FunctionType(
        code, names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


_ATTENTION = _seen_through(F.multi_head_attention_forward)
_BACKWARD = {
    function: seen
    for function in (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
    if (seen := _seen_through(function)) is not None
}
