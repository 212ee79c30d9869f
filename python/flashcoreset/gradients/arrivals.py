"""The backward pass of GradientSketcher: gradients of layers' outputs arrive and become sketches and norms of the samples' gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flashcoreset.gradients.layers import LINEAR, Gradient, Outer, Rows, Vector
from flashcoreset.gradients.layouts import FIRST, Layout
from flashcoreset.gradients.norms import SquaredNorms, TiedEmbedding, add_explicit, squares
from flashcoreset.gradients.precision import precision_of
from flashcoreset.gradients.products import add_products, add_rows
from flashcoreset.gradients.replay import Replay
from flashcoreset.gradients.scaling import scaled
from flashcoreset.gradients.sum_checks import Sums
from flashcoreset.gradients.uses import Kept, Pass, Place, Target, Use


class Arrivals:
    """What has arrived, and what becomes of it."""

    _model: nn.Module
    _dim: int | None
    _device: torch.device
    _dtype: torch.dtype
    _norms: bool
    _per: str
    _kernels: Any
    _options: dict[str, Any]
    _scales: dict[str, Tensor]
    _targets: dict[int, Target]
    _handles: list[Any]
    _pass: Pass
    _done: Pass | None
    _untied: set[str]  # embeddings' parameters whose other uses are run again

    def __init__(self) -> None:
        self._sums = Sums()
        self._sums_known: dict[Any, set[str]] = {}  # parameters whose sums were compared, by forms of calls
        self._layouts: dict[Any, Layout] = {}  # that checks have found
        self._untied = set()

    def _begin(self) -> None:
        """Starts a new pass: at first, and after a backward pass."""
        self._pass = Pass()
        self._done = None if not self._handles else self._done
        self._arrived: set[str] = (
            set()
        )  # parameters whose layers' output gradients came, but not yet their own
        self._missed: dict[str, None] = {}
        self._direct: dict[str, str] = {}
        self._lost: dict[str, tuple[str, str]] = {}  # parameters whose gradients came summed over the samples
        self._differs: dict[str, tuple[str, float]] = {}  # parameters whose sums differ from autograd's
        self._unsummed: set[str] = set()  # parameters whose gradients were not all added up
        self._owners: dict[str, list[str]] = {}  # where parameters are used, for errors

    def _hook_of(self, name: str, called: str) -> Callable[[Tensor], None]:
        """A hook that notes a parameter whose gradient comes past its module."""

        def hook(_: Tensor) -> None:
            self._direct.setdefault(name, called)

        return hook

    def _parameter_hook(self, target: Target) -> Callable[[Tensor], None]:
        def hook(g: Tensor) -> None:
            self._seen_gradient()
            if target.name in self._arrived:
                self._arrived.remove(target.name)
            else:
                self._missed[target.name] = None
            if target.name in self._sums:
                self._compare(target, g.detach())
            self._unsummed.discard(target.name)

        return hook

    def _seen_gradient(self) -> None:
        raise NotImplementedError

    def _compare(self, target: Target, g: Tensor) -> None:
        """Compares the samples' gradients that arrived with autograd's."""
        off = self._sums.pop(target.name, g)
        if target.name in self._unsummed:
            return
        if off is not None:
            self._differs[target.name] = (" and ".join(dict.fromkeys(self._owners[target.name])), off)
            return
        for form, names in self._pass.to_sum.items():
            if target.name in names:
                self._sums_known.setdefault(form, set()).add(target.name)

    # ---- arrivals

    def _arrive(self, use: Use, x: Tensor | None, g: Tensor) -> Tensor:
        """Takes in the gradient of a layer's output, and returns it."""
        watched = self._watched(use.place, g) if torch.is_grad_enabled() else g
        if not use.checked:
            return watched  # the parameters' gradients are missed, then
        g = g.detach()
        if use.parts is None:
            layout = self._layout(use)
            batch = g.shape[0] if use.batch is None else use.batch
            kind = _FromLayer if use.picked is None else _FromPicked
            self._consume(use, batch, kind(use, x, g, layout, batch))
            return watched
        parts, use.parts = use.parts, []
        if parts:
            whole = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
            if x is not None and len(x) != len(whole):
                x = x.expand(len(whole), *x.shape[1:])
            self._consume(use, len(whole), _FromLayer(use, x, whole, FIRST, len(whole)))
            return watched
        for name, target in use.place.targets.items():
            if gets_gradient(use.nodes[name]) and target.name not in use.skip:
                self._lost.setdefault(target.name, (str(use.place), "an operation that was not seen"))
        return watched

    def _arrive_all(
        self, use: Use, replay: Replay, tensors: list[Tensor], gs: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Takes in the gradients of a module's outputs, whose call is run again."""
        watched = gs
        if torch.is_grad_enabled():
            watched = [None if g is None else self._watched(use.place, g) for g in gs]
        own = [None if g is None else g.detach() for g in gs]
        if any(g is not None for g in own):
            replay.fixed = []
            for i, some in enumerate(replay.way.outputs):
                known = self._layouts.get(f"{use.key}, output {i}" if i else use.key)
                replay.fixed.append(known if known in some else some[0])
            self._consume(use, replay.batch, _FromReplay(replay, tensors, own))
        return watched

    def _layout(self, use: Use) -> Layout:
        known = self._layouts.get(use.key)
        if known is not None and known in use.candidates:
            return known
        return use.candidates[0] if use.candidates else FIRST

    def _consume(self, use: Use, batch: int, arrival: _Arrival) -> None:
        """Takes in the gradients of the parameters of a use, for `batch` samples."""
        if not self._handles:
            return  # a later backward pass through a graph from inside the block
        current, place = use.into, use.place
        wanted = {
            name: target
            for name, target in place.targets.items()
            if target.name not in use.skip and gets_gradient(use.nodes[name])
        }
        if not wanted:
            return  # as in torch.autograd.grad with respect to the model's input
        # A module that is run again may need the modes of torch functions that are active; what is computed here does not.
        apart: Any = nullcontext() if isinstance(arrival, _FromReplay) else torch._C.DisableTorchFunction()
        with apart, torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            if current.batch is None:
                current.batch = batch
            if batch != current.batch:
                raise ValueError(
                    f"{place}: its output has size {batch} in dimension 0, and was computed before the batch of "
                    f"{current.batch} was known; expand its input over the batch"
                )
            if self._per == "token":
                assert not isinstance(arrival, _FromReplay)  # calls are not run again for tokens
                self._split_tokens(current, arrival)
            current.consumed += 1
            current.repeated |= use.used
            use.used = True
            self._done = current
            self._arrived.update(target.name for target in wanted.values())
            for target in wanted.values():
                self._owners.setdefault(target.name, []).append(str(place))
            if not arrival.empty:  # sequences without positions, or no samples
                self._add(current, use, wanted, arrival)

    def _split_tokens(self, current: Pass, arrival: _FromLayer) -> None:
        """Makes each token a sample."""
        if isinstance(arrival, _FromPicked):
            if current.positions is None:
                current.positions = arrival.length
            if arrival.length != current.positions or not arrival.layout.flat:
                raise ValueError(
                    f"{arrival.use.place}: its rows were picked out of {arrival.length} for each sample, not out of one for each of the "
                    f"{current.positions} tokens; leave its parameters out with parameters=, or set per='sample'"
                )
            arrival.split()
            return
        place = arrival.use.place
        if place.layer.features is None:
            raise ValueError(
                f"{place} has no gradients per token; leave its parameters out with parameters=, or set per='sample'"
            )
        features = place.layer.features(place.module)
        if current.positions is None and arrival.g.dim() == 2 + features:
            current.positions = arrival.g.shape[1]
        if arrival.g.dim() != 2 + features or arrival.g.shape[1] != current.positions:
            raise ValueError(
                f"{place}: its output for each sample, of shape {tuple(arrival.g.shape[1:])}, does not have one row for each "
                f"of the {current.positions} tokens; leave its parameters out with parameters=, or set per='sample'"
            )
        arrival.g = arrival.g.flatten(0, 1)
        arrival.x = None if arrival.x is None else arrival.x.flatten(0, 1)

    def _add(self, current: Pass, use: Use, wanted: dict[str, Target], arrival: _Arrival) -> None:
        place = use.place
        summed = {
            name
            for name, target in wanted.items()
            if any(target.name in names for names in current.to_sum.values())
        }
        self._unsummed.update(target.name for name, target in wanted.items() if name not in summed)
        shared = {name for name, target in wanted.items() if self._norms and _overlap(current, target)}
        tied = {name: self._tied(current, wanted[name]) for name in shared}
        if isinstance(arrival, _FromReplay):
            arrival.kept = {name for name in shared if tied[name] is None}
        self._count(current, use, wanted, shared)
        exact = arrival.in_float32(self._dtype) if summed and isinstance(arrival, _FromReplay) else {}
        for name, gradient in arrival.gradients(wanted, self._dtype):
            target = wanted[name]
            if name in summed:
                dtypes = [target.parameter.dtype, *arrival.dtypes()]
                self._sums.add(
                    target.name,
                    target.parameter.shape,
                    gradient,
                    precision_of(*dtypes, device=self._device),
                    _rounded(place, gradient, arrival.dtypes()[-1]),
                )
                if exact.get(name):
                    assert isinstance(gradient, Vector)
                    self._sums.add_noise(target.name, target.parameter.shape, gradient, exact[name].pop(0))
            scale = self._scales.get(target.name)
            whole = tied.get(name)
            for part in [gradient] if scale is None else scaled(gradient, scale):
                if self._dim is not None:
                    self._add_sketch(current, part, target)
                if self._norms and name not in shared:
                    self._squares_of(current, target).add(squares(part), getattr(part, "first", 0))
                elif whole is not None:
                    whole.add(part)
        for name in shared:
            if tied[name] is None:
                kept = Kept(name, arrival.keep(name))
                current.kept.setdefault(wanted[name].name, []).append(kept)

    def _count(self, current: Pass, use: Use, wanted: dict[str, Target], shared: set[str]) -> None:
        """Notices parameters that are used several times, of which the forward pass has shown one use."""
        for name, target in wanted.items():
            key = target.name, use.rows[name].start if name in use.rows else 0
            current.arrivals[key] += 1
            if self._norms and name not in shared and current.arrivals[key] > 1 and not current.repeated:
                raise RuntimeError(
                    f"parameter {target.name!r} is used several times inside of a checkpoint, so that norms are not known; set "
                    "use_reentrant=False, or norms=False"
                )

    # ---- sums over parameters

    def _group(self, target: Target) -> str:
        return target.owner if self._per == "module" else ""

    def _rows(self, current: Pass) -> int:
        assert current.batch is not None
        return current.batch * (current.positions or 0) if self._per == "token" else current.batch

    def _groups(self) -> list[str]:
        return list(dict.fromkeys(self._group(target) for target in self._targets.values()))

    def _out(self, current: Pass, group: str) -> Tensor:
        if group not in current.out:
            assert self._dim is not None
            current.out[group] = torch.zeros(
                self._rows(current), self._dim, dtype=self._dtype, device=self._device
            )
        return current.out[group]

    def _squares_of(self, current: Pass, target: Target) -> SquaredNorms:
        return self._squares_in(current.squares, current, self._group(target))

    def _squares_in(self, found: dict[str, SquaredNorms], current: Pass, group: str) -> SquaredNorms:
        if group not in found:
            found[group] = SquaredNorms(self._rows(current), self._device)
        return found[group]

    def _add_sketch(self, current: Pass, gradient: Gradient, target: Target) -> None:
        out, offset = self._out(current, self._group(target)), target.offset
        if isinstance(gradient, Rows):
            add_rows(self._kernels, gradient.indices, gradient.g, out, offset=offset, **self._options)
        elif isinstance(gradient, Outer):
            here = out[gradient.first : gradient.first + len(gradient.a)]
            begin = offset + gradient.row * gradient.a.shape[2]
            add_products(self._kernels, gradient.a, gradient.g, here, offset=begin, **self._options)
        else:
            here = out[gradient.first : gradient.first + len(gradient.values)]
            begin = offset + gradient.begin
            here += self._kernels.sketch(gradient.values, out.shape[1], offset=begin, **self._options)

    def _tied(self, current: Pass, target: Target) -> TiedEmbedding | None:
        """The norms of a parameter that embeddings and exactly one other layer use, or None for other parameters."""
        looked_up = current.looked_up.get(target.name, [])
        if current.calls[target.name] - len(looked_up) != 1 or not looked_up:
            return None
        if self._per == "token" or target.name in self._scales or target.name in self._untied:
            return None
        if target.name not in current.tied:
            assert current.batch is not None
            rows = []
            for x, use in looked_up:
                layout = self._layout(use)
                if x.shape[0] != 1 or layout != FIRST:
                    if not layout.fits(x.shape, current.batch):
                        return None
                    x = layout.bring(x, current.batch)
                rows.append(x)
            indices = [x.expand(current.batch, *x.shape[1:]).reshape(current.batch, -1) for x in rows]
            current.tied[target.name] = TiedEmbedding(torch.cat(indices, 1).to(torch.int64))
        return current.tied[target.name]

    def _add_shared(self, done: Pass, out: dict[str, SquaredNorms]) -> None:
        """Adds squared norms of the gradients of parameters that were used several times; each needs all its uses."""
        with torch.no_grad():
            for target in self._targets.values():
                if target.name in done.tied:
                    self._squares_in(out, done, self._group(target)).add_all(done.tied[target.name].total())
                if target.name in done.kept:
                    into = self._squares_in(out, done, self._group(target))
                    self._add_together(target, done.kept[target.name], into)

    def _add_together(self, target: Target, uses: list[Kept], out: SquaredNorms) -> None:
        """Adds squared norms of the sums over `uses`, of one sample's gradient at a time."""
        whole = torch.empty(target.parameter.numel(), dtype=self._dtype, device=self._device)
        scale = self._scales.get(target.name)
        for sample in range(uses[0].arrival.samples):
            whole.zero_()
            for kept in uses:
                for gradient in kept.arrival.sample(sample, kept.name, self._dtype):
                    add_explicit(gradient, whole)
            if scale is not None:
                whole *= scale
            out.add(squares(Vector(whole[None])), sample)

    def _watched(self, place: Place, g: Tensor) -> Tensor:
        """`g`, watched: a gradient of it would mean a second derivative, to which parameters contribute outside of their modules."""
        target = next(iter(place.targets.values()))
        g = g.view_as(g) if g.requires_grad else g.detach().requires_grad_()
        g.register_hook(self._hook_of(target.name, "a second derivative (create_graph=True)"))
        return g


@dataclass(eq=False)
class _FromLayer:
    """The gradient of a layer's output."""

    use: Use
    x: Tensor | None
    g: Tensor
    layout: Layout
    batch: int

    def __post_init__(self) -> None:
        if self.layout != FIRST:
            self.g = self.layout.bring(self.g, self.batch)
            self.x = None if self.x is None else self.layout.bring(self.x, self.batch)

    @property
    def empty(self) -> bool:
        return not self.g.numel()

    @property
    def samples(self) -> int:
        return len(self.g)

    def dtypes(self) -> list[torch.dtype]:
        return [self.g.dtype] if self.x is None else [self.x.dtype, self.g.dtype]

    def gradients(self, wanted: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Gradient]]:
        yield from _gradients_of(self.use, self.x, self.g, wanted, dtype)

    def keep(self, name: str) -> _FromLayer:
        return self

    def sample(self, sample: int, name: str, dtype: torch.dtype) -> Iterator[Gradient]:
        one = slice(sample, sample + 1)
        x = None if self.x is None else self.x[one]
        for _, gradient in _gradients_of(self.use, x, self.g[one], [name], dtype):
            yield gradient


def _gradients_of(
    use: Use,
    x: Tensor | None,
    g: Tensor,
    wanted: Collection[str],
    dtype: torch.dtype,
    first: int = 0,
    block: int = 0,
) -> Iterator[tuple[str, Gradient]]:
    """The gradients that a layer's rule makes of x and g, the samples from `first` on, in the slices of parameters that the use has;
    `block`: which of the matrices in a slice, if groups of rows have their own."""
    place = use.place
    groups = 1 if use.picked is None or use.picked.ends is None else len(use.picked.ends)
    for name, gradient in place.layer.gradients(place.module, wanted, x, g, dtype):
        span = use.rows.get(name, range(0))
        begin = span.start + block * (len(span) // groups)
        if isinstance(gradient, Outer) and (begin or first):
            yield name, replace(gradient, row=begin, first=gradient.first + first)
        elif isinstance(gradient, Vector) and (begin or first):
            yield name, replace(gradient, begin=begin, first=gradient.first + first)
        else:
            yield name, gradient


_WASTE = 2  # at most this many times the rows of a part are its samples times the most rows of one


@dataclass(eq=False)
class _FromPicked(_FromLayer):
    """The gradient of a layer's output for rows that were picked out of a tensor: tokens of all samples, as many of each as it happens."""

    def __post_init__(self) -> None:
        assert self.use.picked is not None
        origin = self.use.picked.origin
        self._groups = self.use.picked.groups()
        self._sample, self._position = self.layout.sample_of(origin.rows, origin.base.count, self.batch)
        self.length = origin.base.count // max(1, self.batch)  # rows that each sample has in the tensor
        self._samples = self.batch

    @property
    def samples(self) -> int:
        return self._samples

    def split(self) -> None:
        """Makes each row of the tensor a sample."""
        self._sample = self._sample * self.length + self._position
        self._samples = self.batch * self.length

    def gradients(self, wanted: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Gradient]]:
        for block, (begin, end) in enumerate(self._groups):
            own = self._sample[begin:end]
            order = own.argsort(stable=True) + begin
            counts = own.bincount(minlength=self.samples)
            starts = counts.cumsum(0) - counts
            for first, last in _runs(counts.tolist()):
                # Samples with fewer rows are filled up with rows of their own, whose gradients are zeros.
                some, place = (
                    counts[first:last, None],
                    torch.arange(int(counts[first:last].max()), device=own.device),
                )
                rows = order[starts[first:last, None] + torch.minimum(place, some - 1)]
                g = self.g[rows]
                g = g.masked_fill((place >= some).view(*rows.shape, *[1] * (g.dim() - 2)), 0)
                x = None if self.x is None else self.x[rows]
                yield from _gradients_of(self.use, x, g, wanted, dtype, first, block)

    def sample(self, sample: int, name: str, dtype: torch.dtype) -> Iterator[Gradient]:
        for block, (begin, end) in enumerate(self._groups):
            rows = (self._sample[begin:end] == sample).nonzero()[:, 0] + begin
            if len(rows):
                x = None if self.x is None else self.x[rows][None]
                for _, gradient in _gradients_of(self.use, x, self.g[rows][None], [name], dtype, 0, block):
                    yield gradient


def _runs(counts: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring samples that have rows, with numbers of rows that are not too different."""
    first = most = total = 0
    for sample, number in enumerate([*counts, 0]):
        fits = number and (sample - first + 1) * max(most, number) <= _WASTE * (total + number)
        if not fits and total:
            yield first, sample
        if not fits:
            first, most, total = sample if number else sample + 1, 0, 0
        most, total = max(most, number), total + number


@dataclass(eq=False)
class _FromReplay:
    """The gradients of the outputs of a module that is run again."""

    replay: Replay
    tensors: list[Tensor]
    gs: list[Tensor | None]
    kept: set[str] = field(default_factory=set)  # parameters whose gradients are kept
    values: dict[str, list[Vector]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return all(g is None or not g.numel() for g in self.gs)

    @property
    def samples(self) -> int:
        return self.replay.batch

    def dtypes(self) -> list[torch.dtype]:
        found = [g.dtype for g in self.gs if g is not None]
        if self.replay.autocast[0]:
            found.insert(0, self.replay.autocast[1])
        return found

    def in_float32(self, dtype: torch.dtype) -> dict[str, list[Vector]]:
        return self.replay.in_float32(self.tensors, self.gs, dtype)

    def gradients(self, wanted: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Gradient]]:
        for name, gradient in self.replay.gradients(self.tensors, self.gs, dtype):
            if name in wanted:
                if name in self.kept:
                    self.values.setdefault(name, []).append(gradient)
                yield name, gradient

    def keep(self, name: str) -> _FromReplay:
        return self

    def sample(self, sample: int, name: str, dtype: torch.dtype) -> Iterator[Gradient]:
        for part in self.values[name]:
            if part.first <= sample < part.first + len(part.values):
                yield Vector(part.values[sample - part.first][None])


_Arrival = _FromLayer | _FromReplay


def _overlap(current: Pass, target: Target) -> bool:
    """Whether several calls use the same entries of a parameter."""
    calls, spans = current.calls[target.name], current.spans.get(target.name, [])
    if calls <= 1 or len(spans) < calls:
        return calls > 1
    spans = sorted(spans, key=lambda one: one.start)
    return any(a.stop > b.start for a, b in pairwise(spans))


def _rounded(place: Place, gradient: Gradient, dtype: torch.dtype) -> float:
    """The share n eps that autograd may lose of a sum of n terms that it adds up one by one in `dtype`: torch does so in half
    precision for embeddings and norms; sums and products of matrices are in float32."""
    if dtype not in (torch.float16, torch.bfloat16) or isinstance(gradient, Outer):
        return 0.0
    if isinstance(place.module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or place.layer is LINEAR:
        return 0.0
    if isinstance(gradient, Rows):
        terms = gradient.g.numel() / gradient.width
    else:
        own = gradient.values if gradient.terms is None else gradient.terms()
        terms = own.numel() / gradient.values.shape[1]
    return terms * torch.finfo(dtype).eps


def gets_gradient(node: Any) -> bool:
    """Whether the backward pass that runs now computes the gradient that goes to `node`."""
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # "A leaf node was passed", if torch.autograd.grad differentiates with respect to it
        return True
