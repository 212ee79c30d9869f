"""Sketches and norms of per-sample gradients, from hooks on one ordinary backward pass."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from flashcoreset._tensor import FLOATING, compute_dtype, one_of
from flashcoreset.ops.backends import check_backend, choose_kernels
from flashcoreset.ops.gradient_layers import Gradient, Layer, Outer, Rows, batch_statistics, layer_of
from flashcoreset.ops.gradient_norms import TiedEmbedding, add_explicit, squares
from flashcoreset.ops.gradient_products import add_products, add_rows
from flashcoreset.ops.sketch import check_projection

REDUCTIONS = ("mean", "sum")


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


@dataclass(eq=False)
class _Pass:
    """A forward pass, and what the backward passes through it have given so far."""

    likely_batch: int | None = None  # as the model's input has it
    batch: int | None = None  # as the layers have it
    calls: Counter[str] = field(default_factory=Counter)  # of the layers that use a parameter
    looked_up: dict[str, list[Tensor]] = field(default_factory=dict)  # indices of embeddings, by parameter
    consumed: int = 0
    repeated: bool = False  # a second backward pass through the same graph
    out: Tensor | None = None  # [B, dim]
    squares: Tensor | None = None  # [B] float64
    scale: float = 1.0  # a power of two, by which `out` and `squares` have the gradients
    tied: dict[str, TiedEmbedding] = field(default_factory=dict)
    kept: dict[str, list[tuple[_Place, Tensor | None, Tensor]]] = field(default_factory=dict)


class GradientSketcher:
    """Sketches and norms of the gradients that the samples of a batch have on their own, from one ordinary forward and
    backward pass over the batch; the B x D matrix of those gradients is never formed.

    Within `with sketcher:`, hooks keep the inputs of the layers that own the wanted parameters (by autograd's own means:
    they are released, recomputed or offloaded as what it saves itself), and as the gradient of a layer's output comes by,
    the sample's gradient sum_t g_t a_t^T is sketched and dropped.

    Everything between the first call of a forward pass and the next forward pass after a backward pass adds up: several
    backward passes, several calls of a model, parameters that several layers share. `.sketches` and `.norms` are those of the
    last such pass.

    Args:
        model: the module. Compiled by torch.compile, its layers run one by one inside the block (the hooks break the graph).
        dim: columns of the sketches, 1 to 2^31; None for norms alone.
        kind, seed, nnz: of the projection, as for `sketch`.
        parameters: which parameters' gradients: a name or glob pattern of `model.named_parameters()` or several of them, or a
            function (name, parameter) -> bool; None for all. Only those that require gradients count.
        reduction: how the loss reduces over the samples: "mean" (gradients are multiplied by B) or "sum". Of a mean over all
            tokens, a sample's gradient is that of its own tokens' share, times B. A loss that was scaled, as by a
            GradScaler, gives gradients that are.
        norms: whether norms are computed; without them sketches cost less.
        backend: None, "cpu", "cuda", "triton" or "torch", of the sketches.

    Layers: Linear, Conv1d, Conv2d, Conv3d, Embedding, LayerNorm, RMSNorm, GroupNorm, BatchNorm in eval mode, transformers'
    Conv1D, and other modules without children whose class is called ...RMSNorm or ...LayerNorm, or is a Norm of
    transformers. LoRA adapters of peft consist of Linear and Conv layers. Inputs and outputs have the batch in dimension 0; an
    output of size 1 there, which broadcasts over the batch, is expanded.

    Attributes:
        offsets: dict: name of each wanted parameter -> where it begins in the flattened gradient.
        numel: D, the length of the flattened gradient: of the wanted parameters, in the order of `named_parameters()`.

    Raises:
        TypeError: for arguments of a wrong type, or parameters that are not floating.
        ValueError: for an option that does not exist, a pattern that matches nothing, a wanted parameter of a layer that is not
            supported; in the forward pass for a batch dimension that is not dimension 0 or differs between layers, or a
            BatchNorm in training mode.
        RuntimeError: for `.sketches` or `.norms` before a backward pass, a backward pass without a forward pass inside
            `with`, and parameters that are used outside of supported layers, when the results are read or `with` ends.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model must not be a DataParallel, whose replicas live for one call; use DistributedDataParallel"
            )
        one_of(reduction, "reduction", REDUCTIONS)
        if not isinstance(norms, bool):
            raise TypeError(f"norms must be a bool, got {norms!r} of type {type(norms).__name__}")
        if dim is None and not norms:
            raise ValueError("dim must be a number where norms is False, got None: nothing would be computed")
        wanted = _wanted(model, parameters)
        self.offsets: dict[str, int] = {}
        self.numel = 0
        targets: dict[int, _Target] = {}
        for name, parameter in wanted.items():
            targets[id(parameter)] = _Target(name, parameter, self.numel)
            self.offsets[name] = self.numel
            self.numel += parameter.numel()
        columns, seed, _, nnz = check_projection(self.numel, 1 if dim is None else dim, kind, seed, 0, nnz)
        check_backend(backend)
        (device,) = _same_device(wanted)
        self._model, self._dim, self._device = model, None if dim is None else columns, device
        self._options: dict[str, Any] = {"kind": kind, "seed": seed, "nnz": nnz}
        self._norms, self._mean = norms, reduction == "mean"
        self._targets = targets
        self._places = _places(model, targets)
        found = {compute_dtype(parameter.dtype) for parameter in wanted.values()}
        self._dtype = torch.float64 if torch.float64 in found else torch.float32
        self._kernels = choose_kernels(backend, device, "sketch")
        self._watch = _Watch(self)
        self._handles: list[RemovableHandle] = []
        self._nodes: dict[int, Any] = {}  # of the wanted parameters, by their ids
        self._begin(None)

    # ---- results

    @property
    def sketches(self) -> Tensor:
        """[B, dim] float32 (float64 for float64 parameters): `sketch` of each sample's flattened gradient."""
        done = self._result()
        if self._dim is None:
            raise RuntimeError("there are no sketches with dim=None; make the GradientSketcher with a dim")
        assert done.out is not None
        assert done.batch is not None
        return _finite(done.out * (done.batch / done.scale if self._mean else 1 / done.scale), "sketches")

    @property
    def norms(self) -> Tensor:
        """[B] float32 (float64 for float64 parameters): the norm of each sample's gradient."""
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
        out = (done.squares + self._shared(done)).sqrt()
        out = out * (done.batch if self._mean else 1) / done.scale
        return _finite(out.to(self._dtype), "norms")

    def _result(self) -> _Pass:
        self._check()
        if self._done is None:
            raise RuntimeError(
                "there has been no backward pass yet: call the model and loss.backward() inside `with sketcher:` first"
            )
        return self._done

    def _check(self) -> None:
        """Raises RuntimeError for gradients that were not, or not wholly, seen."""
        if self._direct:
            name, function = next(iter(self._direct.items()))
            raise RuntimeError(
                f"parameter {name!r} is used outside of a call of its module, by {function}: its per-sample gradients are "
                "not known; use it through its module alone, or leave it out with parameters="
            )
        if self._missed:
            raise RuntimeError(
                f"the gradient of parameter {next(iter(self._missed))!r} came from no call of its module that was seen: "
                "run the forward pass inside `with sketcher:`, and call modules rather than their forward() (where torch.compile "
                "has left the hooks out, call the model uncompiled), or leave the parameter out with parameters="
            )

    # ---- hooks

    def __enter__(self) -> GradientSketcher:
        if self._handles:
            raise RuntimeError("this GradientSketcher is already active; leave its `with` block first")
        for name, module in self._model.named_modules():
            if batch_statistics(module):
                raise ValueError(
                    f"{type(module).__name__} {name!r} normalises by the batch, where samples have no gradients of their own; "
                    "put it in eval mode: .eval()"
                )
        for target in self._targets.values():
            if not target.parameter.requires_grad:
                raise ValueError(
                    f"parameter {target.name!r} no longer requires gradients; make a new GradientSketcher"
                )
        self._begin(None)
        self._nodes = {key: _node(target.parameter) for key, target in self._targets.items()}
        add = self._handles.append
        add(self._model.register_forward_pre_hook(self._before_model, with_kwargs=True))
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
        if kind is None:
            self._check()
            if self._done is not None and self._done.squares is not None:
                self._done.squares += self._shared(self._done)
                self._done.tied.clear()
                self._done.kept.clear()

    def _begin(self, likely_batch: int | None) -> None:
        """A new pass; at first, and after a backward pass."""
        self._pass = _Pass(likely_batch)
        self._done: _Pass | None = None if not self._handles else self._done
        self._arrived: set[str] = (
            set()
        )  # parameters whose layers' output gradients came, but not yet their own
        self._missed: dict[str, None] = {}
        self._direct: dict[str, str] = {}
        self._inside: nn.Module | None = None

    def _new_forward(self, likely_batch: int | None = None) -> None:
        if _in_backward():
            return  # a checkpoint that is computed again
        if self._pass.consumed:
            self._begin(likely_batch)
        elif likely_batch is not None:
            self._pass.likely_batch = likely_batch

    def _before_model(self, _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        for value in () if _in_transform() else (*args, *keywords.values()):
            if isinstance(value, Tensor) and value.dim():
                return self._new_forward(value.shape[0])

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
            self._new_forward()
            x = args[0] if args else next(iter(keywords.values()))
            taken = torch.is_grad_enabled()
            if not _in_backward():
                # Also under reentrant checkpoints, whose forward pass has no gradients.
                for target in place.targets.values():
                    self._pass.calls[target.name] += 1
                    if embedding:
                        self._pass.looked_up.setdefault(target.name, []).append(x.detach())
            if not taken or not output.requires_grad:
                return None
            x, output = self._with_batch(place, x, output)
            saved = (x.detach(),) if keeps_input else ()
            out: Tensor = _Capture.apply(output, _Use(self, self._pass, place, self._nodes_of(place)), *saved)
            return out

        return hook

    def _nodes_of(self, place: _Place) -> dict[str, Any]:
        """Of the parameters that the module has now: torch.func.functional_call puts others into it for a call."""
        found = {}
        for name in place.targets:
            parameter = getattr(place.module, name)
            found[name] = self._nodes.get(id(parameter)) or _node(parameter)
        return found

    def _with_batch(self, place: _Place, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output with the batch in dimension 0."""
        least = place.layer.least_dims(place.module)
        if x.dim() < least:
            raise ValueError(
                f"{place} must have an input with the batch in dimension 0 and {least} dimensions or more, got shape "
                f"{tuple(x.shape)}"
            )
        if batch_statistics(place.module):
            raise ValueError(
                f"{place} normalises by the batch, where samples have no gradients of their own; put it in eval mode: .eval()"
            )
        current, size = self._pass, output.shape[0]
        if size == 0:
            raise ValueError(
                f"{place} must have an output with a batch of 1 or more in dimension 0, got shape {tuple(output.shape)}"
            )
        batch = current.batch or current.likely_batch
        if size == 1 and batch is not None and batch > 1:
            return x.expand(batch, *x.shape[1:]), output.expand(batch, *output.shape[1:])
        if current.batch is None and size > 1:
            current.batch = size
        if current.batch is not None and size != current.batch:
            raise ValueError(
                f"{place} must have an output with the batch of {current.batch} in dimension 0, as the layers before it, got "
                f"shape {tuple(output.shape)}"
            )
        return x, output

    def _parameter_hook(self, target: _Target) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            # A checkpoint that was computed again for this gradient may have stopped inside a layer.
            self._inside = None
            if target.name in self._arrived:
                self._arrived.remove(target.name)
            else:
                self._missed[target.name] = None

        return hook

    # ---- the backward pass

    def _consume(self, use: _Use, x: Tensor | None, g: Tensor) -> None:
        """Takes in the gradient of a layer's output, [B, ...]."""
        if not self._handles:
            return  # a later backward pass through a graph from inside the block
        current, place = use.into, use.place
        wanted = {name: target for name, target in place.targets.items() if _gets_gradient(use.nodes[name])}
        if not wanted:
            return  # as in torch.autograd.grad with regard to the model's input
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
                current.squares = g.new_zeros(current.batch, dtype=torch.float64)
                current.scale = _scale(g)
            current.consumed += 1
            current.repeated |= use.used
            use.used = True
            self._done = current
            self._arrived.update(target.name for target in wanted.values())
            if not g.numel():
                return  # sequences without positions
            if current.scale != 1:
                g = g * current.scale
            shared = {name for name, target in wanted.items() if current.calls[target.name] > 1}
            for name, gradient in place.layer.gradients(place.module, wanted, x, g, self._dtype):
                target = wanted[name]
                if self._dim is not None:
                    self._add_sketch(current, gradient, target.offset)
                if self._norms:
                    if name not in shared:
                        first = getattr(gradient, "first", 0)
                        found = squares(gradient)
                        assert current.squares is not None
                        current.squares[first : first + len(found)] += found
                    elif (tied := self._tied(current, target)) is not None:
                        tied.add(gradient)
            for name, target in wanted.items():
                if self._norms and name in shared and self._tied(current, target) is None:
                    current.kept.setdefault(target.name, []).append((place, x, g))

    def _watched(self, place: _Place, g: Tensor) -> Tensor:
        """`g`, whose own gradient would tell of a second derivative, to which parameters contribute past their modules."""
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
            here += self._kernels.sketch(gradient.values, self._dim, offset=offset, **self._options)

    def _tied(self, current: _Pass, target: _Target) -> TiedEmbedding | None:
        """Of a parameter that embeddings and exactly one other layer use."""
        looked_up = current.looked_up.get(target.name, [])
        if current.calls[target.name] - len(looked_up) != 1 or not looked_up:
            return None
        if target.name not in current.tied:
            assert current.batch is not None
            indices = [x.expand(current.batch, *x.shape[1:]).reshape(current.batch, -1) for x in looked_up]
            current.tied[target.name] = TiedEmbedding(torch.cat(indices, 1).to(torch.int64))
        return current.tied[target.name]

    def _shared(self, done: _Pass) -> Tensor:
        """[B] float64: squared norms of the gradients of parameters that were used several times, which take all uses."""
        assert done.squares is not None
        found = torch.zeros_like(done.squares)
        with torch.no_grad():
            for tied in done.tied.values():
                found += tied.total()
            for target in self._targets.values():
                if target.name in done.kept:
                    found += self._together(target, done.kept[target.name], len(found))
        return found

    def _together(
        self, target: _Target, uses: list[tuple[_Place, Tensor | None, Tensor]], batch: int
    ) -> Tensor:
        """[B] float64: squared norms of the sums over `uses`, of one sample's gradient at a time."""
        found = torch.zeros(batch, dtype=torch.float64, device=self._device)
        whole = torch.empty(target.parameter.numel(), dtype=self._dtype, device=self._device)
        for sample in range(batch):
            whole.zero_()
            one = slice(sample, sample + 1)
            for place, x, g in uses:
                names = [name for name, other in place.targets.items() if other is target]
                own = None if x is None else x[one]
                for _, gradient in place.layer.gradients(place.module, names, own, g[one], self._dtype):
                    add_explicit(gradient, whole)
            found[sample] = whole.square().sum(dtype=torch.float64)
        return found


@dataclass(eq=False)
class _Use:
    """A call of a layer."""

    sketcher: GradientSketcher
    into: _Pass
    place: _Place
    nodes: dict[
        str, Any
    ]  # where autograd takes the gradients of the wanted parameters to, by their names in the module
    used: bool = False


class _Capture(torch.autograd.Function):
    """The identity, which hands the gradient on to the sketcher. Autograd saves the layer's input here as it saves any other
    tensor: checkpoints recompute it, and changes in place are noticed."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, use: _Use, *saved: Tensor) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(*saved)
        # Were it `output` itself, autograd would make a view of it, which in-place activations must not change.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ctx.use.sketcher._consume(ctx.use, saved[0] if saved else None, g.detach())
        if torch.is_grad_enabled():  # create_graph=True
            g = ctx.use.sketcher._watched(ctx.use.place, g)
        return (g, None, *[None] * len(saved))


class _Watch(TorchFunctionMode):
    """Sees whether gradients flow to wanted parameters from operations outside of their modules."""

    def __init__(self, sketcher: GradientSketcher) -> None:
        super().__init__()
        self._sketcher = sketcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
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
                f"parameters: {pattern!r} matches no parameter of the model; its names are like {some}"
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
        target = next(iter(own.values()))
        problem = "its layer type is not supported" if layer is None else layer.problem(module)
        if layer is None or problem is not None:
            raise ValueError(
                f"parameter {target.name!r} belongs to {type(module).__name__} {name!r}: {problem}; leave it out "
                "with parameters="
            )
        places.append(_Place(name, module, layer, own))
    return places


def _same_device(wanted: dict[str, nn.Parameter]) -> list[torch.device]:
    devices = list(dict.fromkeys(parameter.device for parameter in wanted.values()))
    if len(devices) > 1:
        raise ValueError(
            f"parameters must be on one device, got {devices[0]} and {devices[1]}; make a GradientSketcher for each"
        )
    return devices


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _node(parameter: Tensor) -> Any:
    """Where autograd takes the gradient of `parameter`."""
    return torch.autograd.graph.get_gradient_edge(parameter).node if parameter.requires_grad else None


def _gets_gradient(node: Any) -> bool:
    """Whether the backward pass that runs now computes the gradient that goes to `node`."""
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # "A leaf node was passed", by torch.autograd.grad with regard to it
        return True


def _scale(g: Tensor) -> float:
    """1, or a power of two that brings gradients whose squares would leave the range of float32 near to 1."""
    if not g.numel():
        return 1.0
    low, high = torch.aminmax(g)
    exponent = math.frexp(max(-float(low), float(high)))[1]  # 0 for NaN and infinity
    most = 500 if g.dtype == torch.float64 else 126
    return 2.0 ** -min(max(exponent, -most), most) if abs(exponent) > 30 else 1.0


def _in_transform() -> bool:
    """Whether a transform of torch.func calls: its gradients are its own affair."""
    return torch._C._are_functorch_transforms_active()


def _finite(values: Tensor, name: str) -> Tensor:
    bad = ~torch.isfinite(values.flatten(1) if values.dim() > 1 else values[:, None]).all(1)
    if bool(bad.any()):
        raise ValueError(f"{name}: the gradient of sample {int(bad.nonzero()[0])} is not finite")
    return values
