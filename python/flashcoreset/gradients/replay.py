"""Per-sample gradients of any module that treats samples apart: the call is run again on each sample.

Four ways, the first that works: a registered rule; `torch.func.vmap` of the vector-Jacobian product; one sample after another (modules
whose operations vmap does not take, or that depend on numbers, such as mixtures of experts); the whole batch once with the same random
numbers, and its backward pass for each sample's part of the gradient (dropout).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashcoreset.gradients.inputs import Inputs, _leaves
from flashcoreset.gradients.layers import Vector
from flashcoreset.gradients.layouts import Layout, layouts
from flashcoreset.gradients.precision import eps
from flashcoreset.gradients.quiet import own_calls, unhooked
from flashcoreset.gradients.rehearsal import State, rehearsal

_PART = 1 << 22  # entries of gradients that are formed at a time

Rule = Callable[[nn.Module, tuple[Any, ...], Any], Mapping[str, Tensor]]


class Inseparable(Exception):
    """A module's samples cannot be told apart from its inputs and outputs."""


@dataclass(eq=False)
class Way:
    """How a module's calls are run again: `name` is "rule", "vmap", "loop" or "batch"; the layouts of the input's tensors, None for those
    that belong to all samples, and of the outputs that have gradients."""

    name: str
    inputs: list[Layout | None] = field(default_factory=list)
    outputs: list[list[Layout]] = field(default_factory=list)  # candidates, the likeliest first


@dataclass(eq=False)
class Replay:
    """A call that is run again."""

    module: nn.Module
    names: dict[str, str]  # of the wanted parameters in the module -> in the model
    skeleton: Inputs
    places: list[Tensor]
    state: State
    leaves: list[int]  # which of the outputs' tensors have gradients
    autocast: tuple[bool, torch.dtype]
    device: torch.device
    batch: int
    way: Way
    rule: Rule | None = None
    fixed: list[Layout] | None = None  # the outputs' layouts

    # ---- runs

    def inputs(self, tensors: list[Tensor]) -> Inputs:
        table = {id(place): x for place, x in zip(self.places, tensors, strict=True)}
        return self.skeleton.map(lambda x: table.get(id(x), x))

    def run(self, parameters: dict[str, Tensor], tensors: list[Tensor]) -> list[Tensor]:
        """The outputs that have gradients."""
        inputs = self.inputs(tensors)
        out = torch.func.functional_call(self.module, parameters, inputs.args, inputs.keywords)
        found = tensor_leaves(out)
        return [found[i] for i in self.leaves]

    def parameters(self) -> dict[str, Tensor]:
        own = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: own[name].detach() for name in self.names}

    @contextlib.contextmanager
    def _as_before(self, grad: bool) -> Iterator[None]:
        enabled, dtype = self.autocast
        kind = self.device.type
        with (
            own_calls(self),
            unhooked(),
            rehearsal(self.state, still=False, backward=True),
            torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False),
            torch.set_grad_enabled(grad),
        ):
            yield

    # ---- how samples lie in inputs and outputs

    def find_way(self, tensors: list[Tensor], outputs: list[Tensor], batch_dim: int, drawn: bool) -> Way:
        """The way to run the call again, checked on this batch: the first, the last and a middle sample give alone what they gave in
        the batch."""
        found = [layouts(x.shape, self.batch, batch_dim) for x in outputs]
        if not all(found):
            raise Inseparable
        if drawn or self.batch == 1:
            return Way("batch", outputs=found)
        choices = [[*layouts(x.shape, self.batch, batch_dim), None] for x in tensors]
        tried = itertools.islice(itertools.product(*choices), 16)
        for inputs in tried:
            if all(one is None for one in inputs):
                continue
            agreed = self._agree(tensors, outputs, list(inputs), found)
            if agreed is not None:
                name = "vmap" if self._vectorises(tensors, list(inputs)) else "loop"
                return Way(name, list(inputs), [[one] for one in agreed])
        raise Inseparable

    def _sample(self, tensors: list[Tensor], inputs: list[Layout | None], b: int) -> list[Tensor]:
        return [
            x if layout is None else layout.one(layout.split(x, self.batch).select(layout.dim, b))
            for x, layout in zip(tensors, inputs, strict=True)
        ]

    def _agree(
        self,
        tensors: list[Tensor],
        outputs: list[Tensor],
        inputs: list[Layout | None],
        candidates: list[list[Layout]],
    ) -> list[Layout] | None:
        """The layouts of the outputs if samples alone give what they gave in the batch."""
        left = [list(some) for some in candidates]
        for b in sorted({0, self.batch // 2, self.batch - 1}):
            try:
                with self._as_before(False):
                    alone = self.run(self.parameters(), self._sample(tensors, inputs, b))
            except Exception:  # a module may raise anything for a batch that it does not take
                return None
            for some, x, one in zip(left, outputs, alone, strict=True):
                for layout in list(some):
                    theirs = layout.one(layout.split(x.detach(), self.batch).select(layout.dim, b))
                    if theirs.shape != one.shape or not _alike(theirs, one, self.autocast):
                        some.remove(layout)
            if not all(left):
                return None
        return [some[0] for some in left]

    def _vectorises(self, tensors: list[Tensor], inputs: list[Layout | None]) -> bool:
        samples = range(min(2, self.batch))
        some = [
            x
            if layout is None
            else layout.split(x, self.batch).index_select(layout.dim, torch.tensor(samples, device=x.device))
            for x, layout in zip(tensors, inputs, strict=True)
        ]
        try:
            with self._as_before(True):
                self._vmapped(some, inputs, None)
        except Exception:  # whatever stops vmap, samples can still be run one after another
            return False
        return True

    # ---- gradients

    def gradients(
        self, tensors: list[Tensor], gs: list[Tensor | None], dtype: torch.dtype
    ) -> Iterator[tuple[str, Vector]]:
        """The samples' gradients of each parameter, by its name in the model's module, in parts by samples."""
        numel = sum(p.numel() for p in self.parameters().values())
        step = max(1, _PART // max(1, numel))
        if self.way.name == "rule":
            yield from self._by_rule(tensors, gs, dtype)
            return
        for first in range(0, self.batch, step):
            count = min(step, self.batch - first)
            found = self._part(tensors, gs, first, count)
            for name, value in found.items():
                yield name, Vector(value.reshape(count, -1).to(dtype), first)

    def in_float32(
        self, tensors: list[Tensor], gs: list[Tensor | None], dtype: torch.dtype
    ) -> dict[str, list[Vector]]:
        """The same without half precision; empty if there is none, or if the module does not run so."""
        half = (torch.float16, torch.bfloat16)
        if self.way.name == "rule" or not self.autocast[0]:
            return {}

        def raised(x: Tensor) -> Tensor:
            return x.float() if x.dtype in half else x

        exact = dataclasses.replace(self, autocast=(False, self.autocast[1]), way=copy.copy(self.way))
        theirs = [None if g is None else raised(g) for g in gs]
        found: dict[str, list[Vector]] = {}
        try:
            for name, gradient in exact.gradients([raised(x) for x in tensors], theirs, dtype):
                found.setdefault(name, []).append(gradient)
        except Exception:  # a module may ask for half precision
            return {}
        return found

    def _part(
        self, tensors: list[Tensor], gs: list[Tensor | None], first: int, count: int
    ) -> dict[str, Tensor]:
        if self.way.name == "vmap":
            try:
                return self._vmap_part(tensors, gs, first, count)
            except RuntimeError:  # an operation whose backward pass vmap does not take
                self.way.name = "loop"
        if self.way.name == "loop":
            rows = [self._one(tensors, gs, b) for b in range(first, first + count)]
        else:
            rows = self._from_batch(tensors, gs, first, count)
        return {name: torch.stack([row[name] for row in rows]) for name in self.names}

    def _out_layouts(self) -> list[Layout]:
        return self.fixed or [some[0] for some in self.way.outputs]

    def _vmap_part(
        self, tensors: list[Tensor], gs: list[Tensor | None], first: int, count: int
    ) -> dict[str, Tensor]:
        inputs = self.way.inputs
        some = [
            x if layout is None else layout.split(x, self.batch).narrow(layout.dim, first, count)
            for x, layout in zip(tensors, inputs, strict=True)
        ]
        theirs = [
            None if g is None else layout.split(g, self.batch).narrow(layout.dim, first, count)
            for g, layout in zip(gs, self._out_layouts(), strict=True)
        ]
        with self._as_before(True):
            return self._vmapped(some, inputs, theirs)

    def _vmapped(
        self, tensors: list[Tensor], inputs: list[Layout | None], gs: list[Tensor | None] | None
    ) -> dict[str, Tensor]:
        """The gradients for outputs' gradients `gs`, or for those of ones."""
        parameters = self.parameters()
        own = [x for x, layout in zip(tensors, inputs, strict=True) if layout is not None]
        dims = [layout.dim for layout in inputs if layout is not None]
        outs = self._out_layouts() if gs is not None else []
        given = {i: g for i, g in enumerate(gs or []) if g is not None}
        taken = list(given)

        def one(samples: list[Tensor], slopes: list[Tensor]) -> dict[str, Tensor]:
            left = iter(samples)
            whole = [
                x if layout is None else layout.one(next(left))
                for x, layout in zip(tensors, inputs, strict=True)
            ]

            def call(p: dict[str, Tensor]) -> list[Tensor]:
                found = self.run(p, whole)
                return [found[i] for i in taken] if gs is not None else found

            value, back, *_ = torch.func.vjp(call, parameters)
            if gs is None:
                return back([torch.ones_like(x) for x in value])[0]
            return back([outs[i].one(g) for i, g in zip(taken, slopes, strict=True)])[0]

        slopes = list(given.values())
        slope_dims = [outs[i].dim for i in taken]
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # of operations that vmap runs one by one
            return torch.func.vmap(one, (dims, slope_dims))(own, slopes)

    def _one(self, tensors: list[Tensor], gs: list[Tensor | None], b: int) -> dict[str, Tensor]:
        with self._as_before(True):
            parameters = {name: p.requires_grad_() for name, p in self.parameters().items()}
            found = self.run(parameters, self._sample(tensors, self.way.inputs, b))
        pairs = [
            (x, layout.one(layout.split(g, self.batch).select(layout.dim, b)))
            for x, g, layout in zip(found, gs, self._out_layouts(), strict=True)
            if g is not None and x.requires_grad
        ]
        return self._slopes(parameters, pairs)

    def _from_batch(
        self, tensors: list[Tensor], gs: list[Tensor | None], first: int, count: int
    ) -> list[dict[str, Tensor]]:
        with self._as_before(True):
            parameters = {name: p.requires_grad_() for name, p in self.parameters().items()}
            found = self.run(parameters, tensors)
        rows = []
        for b in range(first, first + count):
            pairs = []
            for x, g, layout in zip(found, gs, self._out_layouts(), strict=True):
                if g is None or not x.requires_grad:
                    continue
                own = torch.zeros_like(g)
                layout.split(own, self.batch).select(layout.dim, b).copy_(
                    layout.split(g, self.batch).select(layout.dim, b)
                )
                pairs.append((x, own))
            rows.append(self._slopes(parameters, pairs, keep=True))
        return rows

    def _slopes(
        self, parameters: dict[str, Tensor], pairs: list[tuple[Tensor, Tensor]], keep: bool = False
    ) -> dict[str, Tensor]:
        if not pairs:
            return {name: torch.zeros_like(p) for name, p in parameters.items()}
        with own_calls(self):  # checkpoints in the module are computed again
            found = torch.autograd.grad(
                [x for x, _ in pairs],
                list(parameters.values()),
                [g for _, g in pairs],
                retain_graph=keep,
                allow_unused=True,
                materialize_grads=True,
            )
        return dict(zip(parameters, found, strict=True))

    def _by_rule(
        self, tensors: list[Tensor], gs: list[Tensor | None], dtype: torch.dtype
    ) -> Iterator[tuple[str, Vector]]:
        assert self.rule is not None
        inputs = self.inputs(tensors)
        kind = type(self.module).__name__
        slopes = gs[0] if len(gs) == 1 else tuple(gs)
        with own_calls(self), rehearsal(self.state, still=False, backward=True), torch.enable_grad():
            found = self.rule(self.module, (*inputs.args, *inputs.keywords.values()), slopes)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"the gradient rule of {kind} must return a dict: name of a parameter -> gradients [batch, *shape], got "
                f"{type(found).__name__}"
            )
        own = self.parameters()
        for name in self.names:
            if name not in found:
                raise ValueError(
                    f"the gradient rule of {kind} gives no gradients of {name!r}, which are wanted; it gives "
                    f"{', '.join(map(repr, found)) or 'none'}"
                )
            value = found[name]
            shape = (self.batch, *own[name].shape)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the gradient rule of {kind} must give {name!r} as {shape}, got {got}")
            yield name, Vector(value.detach().reshape(self.batch, -1).to(dtype))


def _alike(a: Tensor, b: Tensor, autocast: tuple[bool, torch.dtype]) -> bool:
    precision = max(eps(a.dtype), eps(autocast[1]) if autocast[0] else 0.0)
    size = max(float(a.detach().abs().amax()), 1e-300) if a.numel() else 1.0
    off = float((a.detach().double() - b.detach().double()).abs().nan_to_num().amax()) if a.numel() else 0.0
    return off <= (1024 if precision < 1e-6 else 16) * precision * size


def tensor_leaves(outputs: Any) -> list[Tensor]:
    return [value for _, value in _leaves(outputs, "") if isinstance(value, Tensor)]


def replaced(outputs: Any, by: dict[int, Tensor]) -> Any:
    """`outputs` with other tensors in the same containers."""
    if isinstance(outputs, Tensor):
        return by.get(id(outputs), outputs)
    if isinstance(outputs, Mapping):
        changed: Any = copy.copy(outputs)
        for key, value in outputs.items():
            changed[key] = replaced(value, by)
        return changed
    if isinstance(outputs, (tuple, list)):
        parts = [replaced(one, by) for one in outputs]
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        made: Any = copy.copy(outputs)
        for part in dataclasses.fields(outputs):
            object.__setattr__(made, part.name, replaced(getattr(outputs, part.name, None), by))
        return made
    return outputs
