"""Sketches and norms of per-sample gradients, from hooks on one ordinary backward pass."""

from __future__ import annotations

import fnmatch
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.tensor import FLOATING, compute_dtype, one_of
from flashcoreset.gradients.inputs import Inputs
from flashcoreset.gradients.layers import (
    Gradient,
    Layer,
    Outer,
    Rows,
    Vector,
    batch_statistics,
    layer_of,
    problem_of,
)
from flashcoreset.gradients.norms import SquaredNorms, TiedEmbedding, add_explicit, squares
from flashcoreset.gradients.precision import kept, precision_of
from flashcoreset.gradients.products import add_products, add_rows
from flashcoreset.gradients.rehearsal import State, rehearsal, without_dropout
from flashcoreset.gradients.row_checks import Record, Unavailable, check_rows
from flashcoreset.gradients.sum_checks import Sums
from flashcoreset.sketch import check_projection
from flashcoreset.sketch.backend import choose
from flashcoreset.sketch.kinds import KINDS

REDUCTIONS = ("mean", "sum")
VERIFY = ("first", "always", "never")


@dataclass(frozen=True, eq=False)
class _Target:
    """A wanted parameter, and where it begins in the flattened gradient."""

    name: str
    parameter: nn.Parameter
    offset: int


@dataclass(frozen=True, eq=False)
class _Place:
    """A module that uses wanted parameters; `targets` by their names in the module."""

    name: str
    module: nn.Module
    layer: Layer
    targets: dict[str, _Target]

    @property
    def keeps_input(self) -> bool:
        needs = self.layer.needs_input
        return needs is None or any(name in needs for name in self.targets)

    def __str__(self) -> str:
        return f"{type(self.module).__name__} {self.name!r}"

    @cached_property
    def owner(self) -> str:
        """The name of the module in the checks' errors."""
        return f"parameter {next(iter(self.targets.values())).name!r} of {self}"


@dataclass(eq=False)
class _Pass:
    """A forward pass, and what the backward passes through it have given so far."""

    batch: int | None = None  # that of the model's input, or of the layers if the input has none
    calls: Counter[str] = field(default_factory=Counter)  # of the layers that use each parameter
    looked_up: dict[str, list[Tensor]] = field(default_factory=dict)  # indices of embeddings, by parameter
    consumed: int = 0
    repeated: bool = False  # whether a second backward pass went through the same graph
    out: Tensor | None = None  # [B, dim]
    squares: SquaredNorms | None = None
    rows_checked: set[Any] = field(default_factory=set)  # forms of calls
    to_sum: dict[Any, set[str]] = field(default_factory=dict)  # forms -> parameters whose sums are compared
    tied: dict[str, TiedEmbedding] = field(default_factory=dict)
    kept: dict[str, list[tuple[_Place, Tensor | None, Tensor]]] = field(default_factory=dict)


@dataclass(eq=False)
class _Call:
    """A user's call of a module, the model or a part of it; other calls happen inside this one."""

    module: nn.Module
    form: Any
    inputs: Inputs
    batch: int | None
    depth: int = 1
    layers: set[tuple[_Place, bool]] = field(
        default_factory=set
    )  # the layers that were called, and whether for all samples at once
    record: Record | None = None
    state: State | None = None  # the state before the call


class GradientSketcher:
    """Sketches and norms of the gradient of each sample of a batch, from one ordinary forward and
    backward pass over the batch; the B x D matrix of these gradients is never formed.

    Within `with sketcher:`, hooks keep the inputs of the layers that own the wanted parameters (by autograd's own means:
    the inputs are released, recomputed or offloaded like anything that autograd saves), and when the gradient of a layer's output
    arrives, each sample's gradient sum_t g_t a_t^T is sketched and dropped.

    Everything between the first call of a forward pass and the next forward pass after a backward pass adds up: several
    backward passes, several calls of a model, parameters that several layers share. `.sketches` and `.norms` belong to the
    last such pass.

    Args:
        model: the module. If torch.compile compiled it, its layers run one by one inside the block (the hooks break the graph).
        dim: columns of the sketches, 1 to 2^31; None for norms alone.
        kind, seed, nnz: the projection, as for `sketch`, but for the kinds that choose columns, "mask" and "grass".
        parameters: which parameters' gradients: a name or glob pattern of `model.named_parameters()` or several of them, or a
            function (name, parameter) -> bool; None for all. Only those that require gradients count.
        reduction: how the loss reduces over the samples: "mean" (gradients are multiplied by B) or "sum". For a mean over all
            tokens, a sample's gradient is that of its own tokens' share, times B. A scaled loss, as with a
            GradScaler, gives scaled gradients.
        norms: whether norms are computed; without norms, sketches cost less.
        backend: None, "cpu", "cuda", "triton" or "torch", for the sketches.
        verify: "first" checks the first batch of each form of calls (same kinds of inputs, same layers): that row b of each layer
            belongs to sample b, by forward passes with the samples in other places (two to four), and that the
            samples' gradients add up to the one that autograd computes. "always" checks every batch, "never" none.

    Layers: Linear, Conv1d, Conv2d, Conv3d, Embedding, LayerNorm, RMSNorm, GroupNorm, BatchNorm in eval mode, transformers'
    Conv1D, and other modules without children whose class is called ...RMSNorm or ...LayerNorm, or is a Norm of
    transformers. LoRA adapters of peft consist of Linear and Conv layers. Inputs and outputs have the batch in dimension 0, as
    the model's first input has it; an output of size 1 there may be added to others, expanded or repeated over the batch.

    Attributes:
        offsets: dict: name of each wanted parameter -> where it begins in the flattened gradient.
        numel: D, the length of the flattened gradient of the wanted parameters, in the order of `named_parameters()`.

    Raises:
        TypeError: for arguments of a wrong type, or parameters that are not floating.
        ValueError: for an option that does not exist, a pattern that matches nothing, a wanted parameter of a layer that is not
            supported; in the forward pass for a layer whose rows are not the samples of the model's input, samples that
            influence each other, a layer that is called with a second input, or a BatchNorm in training mode.
        RuntimeError: for `.sketches` or `.norms` before a backward pass; when the results are read or `with` ends, for a backward
            pass without a forward pass inside `with`, parameters that are used outside of supported layers, and per-sample
            gradients that do not add up to autograd's.
        BackendUnavailableError: if `backend` cannot run here.

    Sources: Goodfellow, "Efficient per-example gradient computations", 2015; Li, Tramer, Liang and Hashimoto, "Large language
    models can be strong differentially private learners", 2022 (norms of sequence models by Gram matrices).

    Example:
        >>> import torch, flashcoreset as fc
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> sketcher = fc.GradientSketcher(model, 64)
        >>> with sketcher:
        ...     loss = torch.nn.functional.cross_entropy(model(torch.randn(5, 8)), torch.tensor([0, 1, 2, 0, 1]))
        ...     loss.backward()
        >>> sketcher.sketches.shape, sketcher.norms.shape
        (torch.Size([5, 64]), torch.Size([5]))
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int | None,
        *,
        kind: str = "sjlt",
        seed: int = 0,
        nnz: int = 1,
        parameters: str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        reduction: str = "mean",
        norms: bool = True,
        backend: str | None = None,
        verify: str = "first",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model must not be a DataParallel, whose replicas live for one call; use DistributedDataParallel"
            )
        one_of(reduction, "reduction", REDUCTIONS)
        one_of(verify, "verify", VERIFY)
        if not isinstance(norms, bool):
            raise TypeError(f"norms must be a bool, got {norms!r} of type {type(norms).__name__}")
        if dim is None and not norms:
            raise ValueError("dim must be a number if norms is False, got None: nothing would be computed")
        wanted = _wanted(model, parameters)
        self.offsets: dict[str, int] = {}
        self.numel = 0
        targets: dict[int, _Target] = {}
        for name, parameter in wanted.items():
            targets[id(parameter)] = _Target(name, parameter, self.numel)
            self.offsets[name] = self.numel
            self.numel += parameter.numel()
        columns = 1 if dim is None else dim
        # Gradients are sketched layer by layer, so a choice among all entries is not for them.
        columns, seed, _, nnz = check_projection(self.numel, columns, kind, seed, 0, nnz, kinds=KINDS)
        check_backend(backend)
        (device,) = _same_device(wanted)
        self._model, self._dim, self._device = model, None if dim is None else columns, device
        self._options: dict[str, Any] = {"kind": kind, "seed": seed, "nnz": nnz}
        self._norms, self._mean, self._verify = norms, reduction == "mean", verify
        self._targets = targets
        self._places = _places(model, targets)
        found = {compute_dtype(parameter.dtype) for parameter in wanted.values()}
        self._dtype = torch.float64 if torch.float64 in found else torch.float32
        self._kernels = choose(backend, device)
        self._watch = _Watch(self)
        self._rows_known: dict[
            Any, set[tuple[_Place, bool]]
        ] = {}  # for each form of calls: layers whose rows were checked
        self._sums_known: dict[Any, set[str]] = {}  # and parameters whose sums were compared
        self._sums = Sums()
        self._call: _Call | None = None
        self._record: Record | None = None  # the record in which calls of layers are noted
        self._rehearsing = self._still = False
        self._handles: list[RemovableHandle] = []
        self._nodes: dict[int, Any] = {}  # of the wanted parameters, by their ids
        self._begin()

    # ---- results

    @property
    def sketches(self) -> Tensor:
        """The sketches [B, dim] float32 (float64 for float64 parameters): `sketch` of each sample's flattened gradient."""
        done = self._result()
        if self._dim is None:
            raise RuntimeError("there are no sketches with dim=None; make the GradientSketcher with a dim")
        assert done.out is not None
        assert done.batch is not None
        return _finite(done.out * (done.batch if self._mean else 1), "sketches")

    @property
    def norms(self) -> Tensor:
        """The norms [B] float32 (float64 for float64 parameters) of the samples' gradients."""
        done = self._result()
        if not self._norms:
            raise RuntimeError(
                "there are no norms with norms=False; make the GradientSketcher with norms=True"
            )
        if done.repeated:
            raise RuntimeError(
                "norms are not known after several backward passes through one graph (sketches are); add the losses "
                "and call backward() once"
            )
        assert done.squares is not None
        assert done.batch is not None
        found = done.squares.copy()
        self._add_shared(done, found)
        return _finite((found.norms() * (done.batch if self._mean else 1)).to(self._dtype), "norms")

    def _result(self) -> _Pass:
        self._check()
        if self._done is None:
            raise RuntimeError(
                "there has been no backward pass yet: call the model and loss.backward() inside `with sketcher:` first"
            )
        return self._done

    def _check(self) -> None:
        """Raises RuntimeError for gradients that were missed, wholly or in part."""
        if self._direct:
            name, function = next(iter(self._direct.items()))
            raise RuntimeError(
                f"parameter {name!r} is used outside of a call of its module, by {function}: its per-sample gradients are "
                "not known; use it through its module alone, or leave it out with parameters="
            )
        if self._lost:
            name, (owner, function) = next(iter(self._lost.items()))
            raise RuntimeError(
                f"parameter {name!r}: an output of {owner} has size 1 in dimension 0 and goes into {function}, whose gradient is "
                "summed over the samples; add it to other tensors, expand or repeat it over the batch right away, or leave the parameter "
                "out with parameters="
            )
        if self._missed:
            raise RuntimeError(
                f"the gradient of parameter {next(iter(self._missed))!r} came from no call of its module in the block: "
                "run the forward pass inside `with sketcher:`, and call modules rather than their forward() (where torch.compile "
                "has left the hooks out, call the model uncompiled), or leave the parameter out with parameters="
            )
        if self._differs:
            name, (owner, off) = next(iter(self._differs.items()))
            raise RuntimeError(
                f"parameter {name!r} of {owner}: the samples' gradients do not add up to the gradient that autograd computed; "
                f"they are off by {off:.2g} times its length. The layer, or a hook on it or on the parameter, computes something "
                "else than its class says; leave the parameter out with parameters="
            )

    # ---- hooks

    def __enter__(self) -> GradientSketcher:
        if self._handles:
            raise RuntimeError("this GradientSketcher is already active; leave its `with` block first")
        for name, module in self._model.named_modules():
            if batch_statistics(module):
                raise ValueError(
                    f"{type(module).__name__} {name!r} normalises over the batch, so that samples have no gradients of their own; "
                    "put it in eval mode: .eval()"
                )
        for target in self._targets.values():
            if not target.parameter.requires_grad:
                raise ValueError(
                    f"parameter {target.name!r} no longer requires gradients; make a new GradientSketcher"
                )
        for place in self._places:
            _refuse_problems(place.name, place.module, place.layer, place.targets)
        self._begin()
        self._nodes = {key: _node(target.parameter) for key, target in self._targets.items()}
        add = self._handles.append
        self._note = _uncompiled(self._note_call)
        before, after = _uncompiled(self._before_call), _uncompiled(self._after_call)
        end = _uncompiled(self._end_call)
        for name, module in _callable(self._model, self._places):
            add(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            add(module.register_forward_hook(after))
            add(module.register_forward_hook(end, always_call=True))
        for place in self._places:
            add(place.module.register_forward_pre_hook(self._before_layer))
            add(place.module.register_forward_hook(self._layer_hook(place), with_kwargs=True, prepend=True))
            add(place.module.register_forward_hook(self._after_layer, always_call=True))
        for target in self._targets.values():
            add(target.parameter.register_hook(self._parameter_hook(target)))
        self._watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._watch.__exit__(kind, *_)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self._single.clear()
        self._sums.clear()
        self._call = self._record = None
        if kind is None:
            self._check()
            if self._done is not None and self._done.squares is not None:
                self._add_shared(self._done, self._done.squares)
                self._done.tied.clear()
                self._done.kept.clear()

    def _begin(self) -> None:
        """Starts a new pass: at first, and after a backward pass."""
        self._pass = _Pass()
        self._done: _Pass | None = None if not self._handles else self._done
        self._arrived: set[str] = (
            set()
        )  # parameters whose layers' output gradients came, but not yet their own
        self._missed: dict[str, None] = {}
        self._direct: dict[str, str] = {}
        self._lost: dict[str, tuple[str, str]] = {}  # parameters whose gradients came summed over the samples
        self._differs: dict[str, tuple[str, float]] = {}  # parameters whose sums differ from autograd's
        self._unsummed: set[str] = set()  # parameters whose gradients were not all added up
        self._single: dict[int, _Single] = {}  # outputs of size 1 for all samples, by their ids
        self._inside: nn.Module | None = None

    def _new_forward(self) -> None:
        if self._pass.consumed and not _in_backward():  # otherwise a checkpoint is being computed again
            self._begin()

    def _before_call(
        self, name: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        if self._rehearsing or not self._handles or _in_transform():
            return
        if self._call is not None:
            self._call.depth += self._call.module is module
            return
        self._new_forward()
        inputs = Inputs(args, keywords)
        main = inputs.main()
        form = (name, module.training, inputs.form())
        call = self._call = _Call(module, form, inputs, None if main is None else main.shape[0])
        # For a checkpoint, the first run with gradients counts.
        done = form in (
            self._pass.rows_checked if self._verify == "always" and _in_backward() else self._rows_known
        )
        if self._checks(call) and (not done or (self._verify == "always" and not _in_backward())):
            call.inputs, call.state = inputs.map(kept), State(self._model, self._device)
            call.record = self._record = Record()

    def _checks(self, call: _Call) -> bool:
        """Whether there are rows to be told apart."""
        return (
            self._verify != "never" and torch.is_grad_enabled() and call.batch is not None and call.batch > 1
        )

    def _after_call(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        call = self._call
        if call is None or call.module is not module or call.depth > 1 or self._rehearsing:
            return
        self._record = None
        if not call.layers or self._verify == "never" or not torch.is_grad_enabled():
            return
        if call.batch is None:
            raise ValueError(
                f"{type(module).__name__} is called without tensors, so that its batch is not known; give it tensors with the batch in "
                "dimension 0, or set verify='never' if row b of each layer belongs to sample b"
            )
        known = self._rows_known.get(call.form, set())
        if self._checks(call) and (call.record is not None or not call.layers <= known):
            self._check_rows(call, output)
            self._rows_known[call.form] = known | call.layers
            self._pass.rows_checked.add(call.form)
        names = {target.name for place, _ in call.layers for target in place.targets.values()}
        if self._verify == "first":
            names -= self._sums_known.get(call.form, set())
        if names:
            self._pass.to_sum.setdefault(call.form, set()).update(names)

    def _end_call(self, module: nn.Module, *_: Any) -> None:
        call = self._call
        if call is not None and call.module is module and not self._rehearsing:  # also when it raised
            call.depth -= 1
            if call.depth == 0:
                self._call = self._record = None

    def _check_rows(self, call: _Call, output: Any) -> None:
        assert call.batch is not None
        if call.record is None:  # layers that were not called before
            call.state = State(self._model, self._device)
            first = self._rehearse(call, Record(), call.inputs.map(kept))
        else:
            assert call.state is not None
            first = call.record
            first.drawn = call.state.random.drawn()
            first.add_outputs(output)

        def again(inputs: Inputs, still: bool) -> Record:
            return self._rehearse(call, Record(like=first), inputs.map(kept), still)

        check_rows(call.inputs, call.batch, first, again)

    def _rehearse(self, call: _Call, record: Record, inputs: Inputs, still: bool = False) -> Record:
        """Repeats the call with `inputs` and leaves no trace of it."""
        assert call.state is not None
        single, self._single = self._single, {}
        self._rehearsing, self._record, self._still = True, record, still
        try:
            with rehearsal(call.state, still):
                record.add_outputs(call.module(*inputs.args, **inputs.keywords))
                record.drawn = call.state.random.drawn()
        except Exception as error:
            raise Unavailable from error
        finally:
            self._single, self._rehearsing, self._record, self._still = single, False, None, False
            self._inside = None
        return record

    def _before_layer(self, module: nn.Module, _: tuple[Any, ...]) -> None:
        self._inside = module

    def _after_layer(self, *_: Any) -> None:
        self._inside = None  # also when the layer raised

    def _layer_hook(self, place: _Place) -> Callable[..., Tensor | None]:
        keeps_input, embedding = place.keeps_input, isinstance(place.module, nn.Embedding)

        def hook(
            _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            self._inside = None
            # Functions that torch.compile compiled inside `with` go on calling hooks that have been removed.
            if _in_transform() or not self._handles:
                return None
            x, *others = (*args, *keywords.values())
            out: Tensor
            number = self._note(place, x, output)
            if self._rehearsing:
                if not output.requires_grad:
                    return None
                out = _Capture.apply(output, None)  # in the graph as it is outside of rehearsals
                if output.dim() and output.shape[0] == 1:
                    self._single[id(out)] = _Single(weakref.ref(out), place, number)
                return out
            self._new_forward()
            if self._call is not None and (output.dim() == 0 or output.shape[0] != 1):
                self._call.layers.add((place, False))
            elif self._call is not None:
                self._call.layers.add((place, True))
            taken = torch.is_grad_enabled()
            if not _in_backward():
                # Also under reentrant checkpoints, whose forward pass has no gradients.
                for target in place.targets.values():
                    self._pass.calls[target.name] += 1
                    if embedding:
                        self._pass.looked_up.setdefault(target.name, []).append(x.detach())
            if not taken or not output.requires_grad:
                return None
            if any(value is not None and value is not False for value in others):
                raise ValueError(
                    f"{place} is called with more than one input, but its per-sample gradients are known for one input only; leave its "
                    "parameters out with parameters="
                )
            single = self._check_batch(place, x, output)
            saved = (x.detach(),) if keeps_input else ()
            use = _Use(self, self._pass, place, self._nodes_of(place), [] if single else None)
            out = _Capture.apply(output, use, *saved)
            if single:
                self._single[id(out)] = _Single(weakref.ref(out), place, number, use)
            return out

        return hook

    def _note_call(self, place: _Place, x: Any, output: Tensor) -> int:
        """Notes a call for the comparison of rows and returns its number."""
        record = self._record
        if record is None:
            return 0
        number = record.add_call(place.owner)
        if self._rehearsing or output.dim() == 0 or output.shape[0] != 1:
            record.add(place.owner, number, "input", x)
            if place.layer.names is None:  # a class that anyone may have written
                record.add(place.owner, number, "output", output)
        return number

    def _follow(self, function: Any, values: Iterable[Any], result: Any) -> None:
        """Follows outputs of size 1 in dimension 0 to where they go."""
        for value in values:
            if isinstance(value, (tuple, list)):
                self._follow(function, value, result)
            if not isinstance(value, Tensor):
                continue
            single = self._single.get(id(value))
            if single is None or single.output() is not value:
                continue
            for made in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(made, Tensor) and made.requires_grad and made is not value:
                    self._follow_one(single, value, made, getattr(function, "__name__", str(function)))

    def _follow_one(self, single: _Single, value: Tensor, made: Tensor, function: str) -> None:
        factor = _broadcast(value, made)
        if factor is not None and self._record is not None:
            self._record.add(single.place.owner, single.number, "broadcast output", made)
        use = single.use
        if use is None:
            return
        batch = self._call.batch if self._call is not None and self._call.batch != 1 else use.into.batch
        node, shape = value.grad_fn, value.shape
        if factor is None or made.shape[0] != (batch or use.into.batch):

            def lost(_: Tensor) -> None:
                for target in single.place.targets.values():
                    self._lost.setdefault(target.name, (str(single.place), function))

            made.register_hook(lost)
            return

        def part(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[0]
            if g is not None and _gets_gradient(node):
                g = g.detach() if factor == 1 else g.detach() * factor
                lead = (len(g), *[1] * (g.dim() - 1 - len(shape)), *shape[g.dim() == len(shape) :])
                assert use.parts is not None
                use.parts.append(g.sum_to_size(lead).reshape(len(g), *shape[1:]))

        assert made.grad_fn is not None
        made.grad_fn.register_prehook(part)

    def _nodes_of(self, place: _Place) -> dict[str, Any]:
        """The nodes of the parameters that the module has now: torch.func.functional_call replaces parameters for a call."""
        found = {}
        for name in place.targets:
            parameter = getattr(place.module, name)
            found[name] = self._nodes.get(id(parameter)) or _node(parameter)
        return found

    def _check_batch(self, place: _Place, x: Tensor, output: Tensor) -> bool:
        """Whether the output is one for all samples."""
        least = place.layer.least_dims(place.module)
        if x.dim() < least:
            raise ValueError(
                f"{place} must have an input with the batch in dimension 0 and {least} dimensions or more, got shape "
                f"{tuple(x.shape)}"
            )
        if batch_statistics(place.module):
            raise ValueError(
                f"{place} normalises over the batch, so that samples have no gradients of their own; put it in eval mode: .eval()"
            )
        current, size = self._pass, output.shape[0]
        if size == 0 or x.shape[0] != size:
            raise ValueError(
                f"{place} must have an output with a batch of 1 or more in dimension 0, got shape {tuple(output.shape)} of an input "
                f"of shape {tuple(x.shape)}"
            )
        model = None if self._call is None else self._call.batch
        for batch, source in ((model, "as the model's input"), (current.batch, "as calls before it")):
            if batch is not None and batch > 1 and size == 1:
                return True
            if batch is not None and size != batch:
                raise ValueError(
                    f"{place} must have an output with the batch of {batch} in dimension 0, {source}, got shape "
                    f"{tuple(output.shape)}: its rows are not samples (but flattened tokens, windows or time steps, say); leave its "
                    "parameters out with parameters="
                )
        if size > 1:
            current.batch = size
        return False

    def _parameter_hook(self, target: _Target) -> Callable[[Tensor], None]:
        def hook(g: Tensor) -> None:
            # A checkpoint that was computed again for this gradient may have stopped inside a layer.
            self._inside = None
            if target.name in self._arrived:
                self._arrived.remove(target.name)
            else:
                self._missed[target.name] = None
            if target.name in self._sums:
                self._compare(target, g.detach())
            self._unsummed.discard(target.name)

        return hook

    # ---- the backward pass

    def _compare(self, target: _Target, g: Tensor) -> None:
        """Compares the samples' gradients that arrived with autograd's."""
        off = self._sums.pop(target.name, g)
        if target.name in self._unsummed:
            return
        if off is not None:
            places = [place for place in self._places if target in place.targets.values()]
            self._differs[target.name] = (" and ".join(map(str, places)), off)
            return
        for form, names in self._pass.to_sum.items():
            if target.name in names:
                self._sums_known.setdefault(form, set()).add(target.name)

    def _arrive(self, use: _Use, x: Tensor | None, g: Tensor) -> None:
        if use.parts is None:
            return self._consume(use, x, g)
        parts, use.parts = use.parts, []
        if parts:
            return self._consume(use, x, torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
        for name, target in use.place.targets.items():
            if _gets_gradient(use.nodes[name]):
                self._lost.setdefault(target.name, (str(use.place), "an operation that was not seen"))
        return None

    def _consume(self, use: _Use, x: Tensor | None, g: Tensor) -> None:
        """Takes in the gradient of a layer's output, [B, ...]."""
        if not self._handles:
            return  # a later backward pass through a graph from inside the block
        current, place = use.into, use.place
        wanted = {name: target for name, target in place.targets.items() if _gets_gradient(use.nodes[name])}
        if not wanted:
            return  # as in torch.autograd.grad with respect to the model's input
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            if current.batch is None:
                current.batch = g.shape[0]
            if g.shape[0] != current.batch:
                raise ValueError(
                    f"{place}: its output has size {g.shape[0]} in dimension 0, and was computed before the batch of "
                    f"{current.batch} was known; expand its input over the batch"
                )
            if not current.consumed:
                if self._dim is not None:
                    current.out = g.new_zeros(current.batch, self._dim, dtype=self._dtype)
                current.squares = SquaredNorms(current.batch, g.device)
            current.consumed += 1
            current.repeated |= use.used
            use.used = True
            self._done = current
            self._arrived.update(target.name for target in wanted.values())
            if not g.numel():
                return  # sequences without positions
            if x is not None and len(x) != len(g):
                x = x.expand(len(g), *x.shape[1:])  # the output was one for all samples
            summed = {
                name
                for name, target in wanted.items()
                if any(target.name in names for names in current.to_sum.values())
            }
            self._unsummed.update(target.name for name, target in wanted.items() if name not in summed)
            shared = {name for name, target in wanted.items() if current.calls[target.name] > 1}
            for name, gradient in place.layer.gradients(place.module, wanted, x, g, self._dtype):
                target = wanted[name]
                if name in summed:
                    self._sums.add(
                        target.name,
                        target.parameter.shape,
                        gradient,
                        self._precision(target, x, g),
                        _rounded(place, gradient, g),
                    )
                if self._dim is not None:
                    self._add_sketch(current, gradient, target.offset)
                if self._norms:
                    if name not in shared:
                        assert current.squares is not None
                        current.squares.add(squares(gradient), getattr(gradient, "first", 0))
                    elif (tied := self._tied(current, target)) is not None:
                        tied.add(gradient)
            for name, target in wanted.items():
                if self._norms and name in shared and self._tied(current, target) is None:
                    current.kept.setdefault(target.name, []).append((place, x, g))

    def _precision(self, target: _Target, x: Tensor | None, g: Tensor) -> float:
        dtypes = (
            [target.parameter.dtype, g.dtype] if x is None else [target.parameter.dtype, g.dtype, x.dtype]
        )
        return precision_of(*dtypes, device=self._device)

    def _watched(self, place: _Place, g: Tensor) -> Tensor:
        """`g`, watched: a gradient of it would mean a second derivative, to which parameters contribute outside of their modules."""
        target = next(iter(place.targets.values()))
        g = g.view_as(g) if g.requires_grad else g.detach().requires_grad_()
        g.register_hook(self._watch.hook(target.name, "a second derivative (create_graph=True)"))
        return g

    def _add_sketch(self, current: _Pass, gradient: Gradient, offset: int) -> None:
        out = current.out
        assert out is not None
        if isinstance(gradient, Rows):
            add_rows(self._kernels, gradient.indices, gradient.g, out, offset=offset, **self._options)
        elif isinstance(gradient, Outer):
            here = out[gradient.first : gradient.first + len(gradient.a)]
            add_products(self._kernels, gradient.a, gradient.g, here, offset=offset, **self._options)
        else:
            here = out[gradient.first : gradient.first + len(gradient.values)]
            here += self._kernels.sketch(gradient.values, out.shape[1], offset=offset, **self._options)

    def _tied(self, current: _Pass, target: _Target) -> TiedEmbedding | None:
        """The norms of a parameter that embeddings and exactly one other layer use, or None for other parameters."""
        looked_up = current.looked_up.get(target.name, [])
        if current.calls[target.name] - len(looked_up) != 1 or not looked_up:
            return None
        if target.name not in current.tied:
            assert current.batch is not None
            indices = [x.expand(current.batch, *x.shape[1:]).reshape(current.batch, -1) for x in looked_up]
            current.tied[target.name] = TiedEmbedding(torch.cat(indices, 1).to(torch.int64))
        return current.tied[target.name]

    def _add_shared(self, done: _Pass, out: SquaredNorms) -> None:
        """Adds squared norms of the gradients of parameters that were used several times; each needs all its uses."""
        with torch.no_grad():
            for tied in done.tied.values():
                out.add_all(tied.total())
            for target in self._targets.values():
                if target.name in done.kept:
                    self._add_together(target, done.kept[target.name], out)

    def _add_together(
        self, target: _Target, uses: list[tuple[_Place, Tensor | None, Tensor]], out: SquaredNorms
    ) -> None:
        """Adds squared norms of the sums over `uses`, of one sample's gradient at a time."""
        whole = torch.empty(target.parameter.numel(), dtype=self._dtype, device=self._device)
        for sample in range(len(uses[0][2])):
            whole.zero_()
            one = slice(sample, sample + 1)
            for place, x, g in uses:
                names = [name for name, other in place.targets.items() if other is target]
                own = None if x is None else x[one]
                for _, gradient in place.layer.gradients(place.module, names, own, g[one], self._dtype):
                    add_explicit(gradient, whole)
            out.add(squares(Vector(whole[None])), sample)


@dataclass(eq=False)
class _Use:
    """A call of a layer."""

    sketcher: GradientSketcher
    into: _Pass
    place: _Place
    nodes: dict[
        str, Any
    ]  # the nodes of autograd that take in the gradients of the wanted parameters, by their names in the module
    parts: list[Tensor] | None = (
        None  # for an output for all samples: its gradients [B, ...], before they are summed
    )
    used: bool = False


@dataclass(frozen=True, eq=False)
class _Single:
    """An output of size 1 in dimension 0, for all samples."""

    output: weakref.ref[Tensor]
    place: _Place
    number: int  # the number of the call in the record
    use: _Use | None = None


class _Capture(torch.autograd.Function):
    """The identity, which hands the gradient on to the sketcher. Autograd saves the layer's input here like any other
    tensor: checkpoints recompute it, and changes in place are noticed."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, use: _Use | None, *saved: Tensor) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(*saved)
        # If `output` itself were returned, autograd would make a view of it, which in-place activations must not change.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ctx.use.sketcher._arrive(ctx.use, saved[0] if saved else None, g.detach())
        if torch.is_grad_enabled():  # create_graph=True
            g = ctx.use.sketcher._watched(ctx.use.place, g)
        return (g, None, *[None] * len(saved))


class _Watch(TorchFunctionMode):
    """Notices whether gradients flow to wanted parameters from operations outside of their modules."""

    def __init__(self, sketcher: GradientSketcher) -> None:
        super().__init__()
        self._sketcher = sketcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._sketcher._still:
            args, kwargs = without_dropout(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if self._sketcher._single and torch.is_grad_enabled():
            self._sketcher._follow(func, (*args, *(kwargs or {}).values()), result)
        if self._sketcher._inside is None and torch.is_grad_enabled():
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            for target in self._used((*args, *(kwargs or {}).values())):
                for output in outputs:
                    if isinstance(output, Tensor) and output.requires_grad and not output.is_leaf:
                        called = getattr(func, "__name__", str(func))
                        output.register_hook(self.hook(target.name, called))
        return result

    def _used(self, values: Iterable[Any]) -> Iterable[_Target]:
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._used(value)
            elif isinstance(value, nn.Parameter):
                target = self._sketcher._targets.get(id(value))
                if target is not None:
                    yield target

    def hook(self, name: str, called: str) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            self._sketcher._direct.setdefault(name, called)

        return hook


# ---- arguments


def _wanted(model: nn.Module, parameters: Any) -> dict[str, nn.Parameter]:
    """The wanted parameters by their first names, in order."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters is None:
        chosen = trainable
    elif callable(parameters):
        chosen = {name: p for name, p in trainable.items() if parameters(name, p)}
    else:
        patterns = [parameters] if isinstance(parameters, str) else parameters
        if isinstance(patterns, Mapping) or not isinstance(patterns, Iterable):
            raise TypeError(
                "parameters must be names, glob patterns or a function (name, parameter) -> bool, got "
                f"{type(parameters).__name__}"
            )
        chosen = _matching(model, trainable, list(patterns))
    if not chosen:
        raise ValueError("parameters: none of the model's parameters is wanted and requires gradients")
    for name, parameter in chosen.items():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} has no values yet: call the model once before, as lazy modules need it"
            )
        if parameter.dtype not in FLOATING:
            raise TypeError(f"parameter {name!r} must hold real floating numbers, got {parameter.dtype}")
    return chosen


def _matching(
    model: nn.Module, trainable: dict[str, nn.Parameter], patterns: list[Any]
) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters(remove_duplicate=False))  # shared ones by all their names
    picked: set[int] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"parameters must hold names or glob patterns, got {pattern!r} of type {type(pattern).__name__}"
            )
        found = [p for name, p in every.items() if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not found:
            some = ", ".join(list(every)[:3])
            raise ValueError(
                f"parameters: {pattern!r} matches no parameter of the model; its parameters have names like {some}"
            )
        if not any(p.requires_grad for p in found):
            raise ValueError(f"parameters: what {pattern!r} matches does not require gradients")
        picked |= {id(p) for p in found}
    return {name: p for name, p in trainable.items() if id(p) in picked}


def _places(model: nn.Module, targets: dict[int, _Target]) -> list[_Place]:
    """The modules that own the wanted parameters."""
    places = []
    for name, module in model.named_modules():
        own = {key: targets[id(p)] for key, p in module._parameters.items() if id(p) in targets}
        if not own:
            continue
        layer = layer_of(module)
        _refuse_problems(name, module, layer, own)
        assert layer is not None
        places.append(_Place(name, module, layer, own))
    return places


def _refuse_problems(name: str, module: nn.Module, layer: Layer | None, targets: dict[str, _Target]) -> None:
    for own, target in targets.items():
        problem = problem_of(module, layer, own)
        if problem is not None:
            raise ValueError(
                f"parameter {target.name!r} belongs to {type(module).__name__} {name!r}: {problem}; leave it out with "
                "parameters="
            )


def _callable(model: nn.Module, places: list[_Place]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold a place and may be called, by name."""
    holders = {""}
    for place in places:
        path = place.name.split(".")
        holders.update(".".join(path[:depth]) for depth in range(1, len(path) + 1))
    for name, module in model.named_modules():
        # Calls of DistributedDataParallel, which talk to other processes, are those of its module.
        if name in holders and not isinstance(module, nn.parallel.DistributedDataParallel):
            yield name, module


def _broadcast(value: Tensor, made: Tensor) -> float | None:
    """The factor by which `made`'s gradient becomes `value`'s, with a row for each row of `made`, if `value` is only
    broadcast; else None."""
    source, node = value.grad_fn, made.grad_fn
    if source is None or node is None or made.dim() < value.dim():
        return None
    edges = [i for i, (edge, _) in enumerate(node.next_functions) if edge is source]
    if len(edges) != 1:
        return None
    name = node.name()
    if name == "AddBackward0":
        return 1.0 if edges[0] == 0 else float(node._saved_alpha)  # type: ignore[attr-defined]
    if name == "ExpandBackward0" or (name == "RepeatBackward0" and made.shape[1:] == value.shape[1:]):
        return 1.0
    return None


def _same_device(wanted: dict[str, nn.Parameter]) -> list[torch.device]:
    devices = list(dict.fromkeys(parameter.device for parameter in wanted.values()))
    if len(devices) > 1:
        raise ValueError(
            f"parameters must be on one device, got {devices[0]} and {devices[1]}; make a GradientSketcher for each"
        )
    return devices


def _rounded(place: _Place, gradient: Gradient, g: Tensor) -> float:
    """The share n eps that autograd may lose of a sum of n terms that it adds up one by one in the type of `g`: torch does so in half
    precision for embeddings and norms; sums and products of matrices are in float32."""
    if g.dtype not in (torch.float16, torch.bfloat16) or isinstance(gradient, Outer):
        return 0.0
    if isinstance(place.module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 0.0
    terms = g.numel() / (gradient.width if isinstance(gradient, Rows) else gradient.values.shape[1])
    return terms * torch.finfo(g.dtype).eps


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _node(parameter: Tensor) -> Any:
    """The node of autograd that takes in the gradient of `parameter`."""
    return torch.autograd.graph.get_gradient_edge(parameter).node if parameter.requires_grad else None


def _gets_gradient(node: Any) -> bool:
    """Whether the backward pass that runs now computes the gradient that goes to `node`."""
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # "A leaf node was passed", if torch.autograd.grad differentiates with respect to it
        return True


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, left alone by torch.compile if that is in use."""
    dynamo = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)


def _in_transform() -> bool:
    """Whether a transform of torch.func is the caller, which takes care of its gradients itself."""
    return torch._C._are_functorch_transforms_active()


def _finite(values: Tensor, name: str) -> Tensor:
    bad = ~torch.isfinite(values.flatten(1) if values.dim() > 1 else values[:, None]).all(1)
    if bool(bad.any()):
        raise ValueError(f"{name}: the gradient of sample {int(bad.nonzero()[0])} is not finite")
    return values
