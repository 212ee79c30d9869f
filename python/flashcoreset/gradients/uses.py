"""What GradientSketcher notes about the uses of wanted parameters in a forward pass, and how their gradients reach it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flashcoreset.gradients.inputs import Inputs
from flashcoreset.gradients.layers import Layer
from flashcoreset.gradients.layouts import Layout
from flashcoreset.gradients.norms import SquaredNorms, TiedEmbedding
from flashcoreset.gradients.picked import Picked
from flashcoreset.gradients.rehearsal import State
from flashcoreset.gradients.row_checks import Record


@dataclass(frozen=True, eq=False)
class Target:
    """A wanted parameter, and where it begins in the flattened gradient."""

    name: str
    parameter: nn.Parameter
    offset: int
    owner: str = ""  # the name of the module that owns it


@dataclass(frozen=True, eq=False)
class Place:
    """A module, or an operation in a module, that uses wanted parameters; `targets` by their names in it. `home`: the module
    that an operation belongs to."""

    name: str
    module: Any
    layer: Layer
    targets: dict[str, Target]
    what: str
    picked_in: str = ""  # where the rows that it uses were picked out of others, if they were

    def keeps_input(self, wanted: Iterable[str]) -> bool:
        needs = self.layer.needs_input
        return needs is None or any(name in needs for name in wanted)

    def __str__(self) -> str:
        return self.what

    @cached_property
    def use(self) -> str:
        """The place and a parameter, in errors."""
        return f"parameter {next(iter(self.targets.values())).name!r} of {self}"

    @cached_property
    def owner(self) -> str:
        """The name under which the place is checked; rows that were picked together are checked together."""
        return f"the rows that are picked in {self.picked_in}" if self.picked_in else self.use


@dataclass(eq=False)
class Pass:
    """A forward pass, and what the backward passes through it have given so far."""

    batch: int | None = None  # that of the model's input, or of the layers if the input has none
    positions: int | None = None  # the tokens of each sample, if results are per token
    calls: Counter[str] = field(default_factory=Counter)  # of the layers that use each parameter
    looked_up: dict[str, list[tuple[Tensor, Use]]] = field(
        default_factory=dict
    )  # indices of embeddings, by parameter
    spans: dict[str, list[range]] = field(
        default_factory=dict
    )  # the slices that calls use of parameters which hold several matrices or vectors
    arrivals: Counter[tuple[str, int]] = field(
        default_factory=Counter
    )  # of gradients, by parameter and where the slice begins
    consumed: int = 0
    repeated: bool = False  # whether a second backward pass went through the same graph
    out: dict[str, Tensor] = field(default_factory=dict)  # [B, dim], by group
    squares: dict[str, SquaredNorms] = field(default_factory=dict)
    rows_checked: set[Any] = field(default_factory=set)  # forms of calls
    to_sum: dict[Any, set[str]] = field(default_factory=dict)  # forms -> parameters whose sums are compared
    tied: dict[str, TiedEmbedding] = field(default_factory=dict)
    kept: dict[str, list[Kept]] = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """A user's call of a module, the model or a part of it; other calls happen inside this one."""

    module: nn.Module
    form: Any
    inputs: Inputs
    batch: int | None
    depth: int = 1
    layers: set[tuple[Place, bool]] = field(
        default_factory=set
    )  # the layers that were called, and whether for all samples at once
    record: Record | None = None
    state: State | None = None  # the state before the call
    again: Inputs | None = None  # the inputs for another run, if the first showed that layers belong together
    versions: list[int] = field(default_factory=list)  # of the inputs' tensors
    counts: tuple[Any, ...] = ()
    tries: int = 0  # how often the call was run before, on its first batch


@dataclass(eq=False)
class Frame:
    """A call of a module inside of a user's call, which may be run again for each sample."""

    module: nn.Module
    name: str
    skeleton: Inputs | None = None  # the inputs, with tensors on no device
    places: list[Tensor] = field(default_factory=list)  # these tensors
    tensors: list[Tensor] = field(default_factory=list)  # the inputs' tensors
    state: State | None = None
    needs: dict[str, Target] = field(default_factory=dict)  # what must come from running the call again
    uses: list[Use] = field(default_factory=list)  # in the call
    why: dict[str, str] = field(default_factory=dict)  # for each parameter that is needed

    def __str__(self) -> str:
        return f"{type(self.module).__name__} {self.name!r}"


@dataclass(eq=False)
class Use:
    """A call of a layer or of an operation."""

    into: Pass
    place: Place
    nodes: dict[
        str, Any
    ]  # the nodes of autograd that take in the gradients of the wanted parameters, by their names in the module
    candidates: list[Layout]
    parts: list[Tensor] | None = (
        None  # for an output for all samples: its gradients [B, ...], before they are summed
    )
    used: bool = False
    skip: set[str] = field(default_factory=set)  # parameters whose gradients another use gives
    key: Any = None  # under which the layout is remembered
    batch: int | None = None
    rows: dict[str, range] = field(
        default_factory=dict
    )  # the slices of parameters, in rows of a matrix or entries of a vector, by the parameters' names in the module
    picked: Picked | None = None
    checked: bool = True  # whether its rows were compared, or need not be


@dataclass(frozen=True, eq=False)
class Kept:
    """A use of a parameter that has several, kept until all of them have arrived: its name there and what arrived."""

    name: str
    arrival: Any


@dataclass(frozen=True, eq=False)
class Single:
    """An output of size 1 in dimension 0, for all samples."""

    output: weakref.ref[Tensor]
    place: Place
    number: int  # the number of the call in the record
    use: Use | None = None


class Capture(torch.autograd.Function):
    """The identity, which hands the gradient on to the sketcher. Autograd saves the layer's input here like any other
    tensor: checkpoints recompute it, and changes in place are noticed."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, arrive: Callable[..., Tensor] | None, *saved: Tensor) -> Tensor:
        ctx.arrive = arrive
        ctx.save_for_backward(*saved)
        # If `output` itself were returned, autograd would make a view of it, which in-place activations must not change.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return (ctx.arrive(saved[0] if saved else None, g), None, *[None] * len(saved))


class CaptureAll(torch.autograd.Function):
    """The identity of several outputs of a module, which hands their gradients on to the sketcher; the inputs of the module are saved."""

    @staticmethod
    def forward(ctx: Any, arrive: Callable[..., Any], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.arrive, ctx.count = arrive, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        return tuple(one.detach() for one in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = ctx.arrive(list(saved), list(gs))
        return (None, None, *found, *[None] * len(saved))


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def recomputes() -> bool:
    """Whether a checkpoint with use_reentrant=False runs again, for what its forward pass has saved: its calls have been noted."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True) if in_backward() else None
    return top is not None and getattr(top[0], "__module__", "") == "torch.utils.checkpoint"
