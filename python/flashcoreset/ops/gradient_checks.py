"""What GradientSketcher finds out about a model rather than believe it: whose sample each row of a layer is, and whether the
samples' gradients add up to what autograd has.

Rows: the forward pass runs again with some samples' inputs replaced by others' of the batch, under the same random numbers and
in the same shapes. Rows of those samples change, and no others. Where none changes (token types that are all alike) or could,
it runs once more with one sample fewer: such a layer then has one row fewer.

Sums: both sides of sum_b G_b = G are taken between a few random vectors u, v, as u^T G v, which needs no G_b: E (u^T D v)^2 = |D|^2.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flashcoreset.ops.gradient_layers import Gradient, Outer, Rows, Vector

_PART = 1 << 22  # entries that are converted at a time
_VECTORS = 16


# ---- a model's inputs: tensors in containers of any depth


@dataclass(eq=False)
class Inputs:
    """Of a call."""

    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def map(self, change: Callable[[Tensor], Any]) -> Inputs:
        return Inputs(_map(self.args, change), _map(self.keywords, change))

    def leaves(self) -> Iterator[tuple[str, Any]]:
        yield from _leaves(self.args, "")
        yield from _leaves(self.keywords, "")

    def main(self) -> Tensor | None:
        """The one whose first dimension is the batch: the first that has more than one row there, or the first."""
        tensors = [value for _, value in self.leaves() if isinstance(value, Tensor) and value.dim()]
        return next((value for value in tensors if value.shape[0] != 1), tensors[0] if tensors else None)

    def form(self) -> tuple[Any, ...]:
        """What calls of one form have in common: everything but sizes and numbers."""
        return tuple(
            (path, value.dim(), value.dtype)
            if isinstance(value, Tensor)
            else (path, value if value is None or isinstance(value, (bool, str)) else type(value))
            for path, value in self.leaves()
        )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{i}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in dataclasses.fields(value):
            yield from _leaves(getattr(value, part.name, None), f"{path}.{part.name}")
    else:
        yield path, value


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, inner in value.items():
            changed[key] = _map(inner, change)
        return changed
    if isinstance(value, (tuple, list)):
        parts = [_map(one, change) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made: Any = copy.copy(value)
        for part in dataclasses.fields(value):
            object.__setattr__(made, part.name, _map(getattr(value, part.name, None), change))
        return made
    return value


# ---- rows


class Unavailable(Exception):
    """The forward pass could not be run again."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """A tensor, by its shape and, a row each, a projection and its norm."""

    shape: tuple[int, ...]
    projection: Tensor  # [rows] float64
    norm: Tensor  # [rows] float64
    precision: float


_Key = tuple[str, int, str]  # whose, in which of its calls, what


class Record:
    """What went into layers in a forward pass, and what came out where that may mix samples."""

    def __init__(self, like: Record | None = None) -> None:
        self.seen: dict[_Key, _Seen] = {}
        self._calls: Counter[str] = Counter()
        self._weights: dict[torch.device, Tensor] = {} if like is None else like._weights

    def add_call(self, owner: str) -> int:
        """Its number."""
        self._calls[owner] += 1
        return self._calls[owner]

    def add(self, owner: str, call: int, part: str, x: Tensor) -> None:
        number = sum(key[:2] == (owner, call) and key[2].startswith(part) for key in self.seen)
        rows = x.detach().reshape(x.shape[0], -1)
        dtype = _arithmetic(rows)
        projection = torch.empty(len(rows), dtype=torch.float64, device=x.device)
        norm, weights = torch.empty_like(projection), self._weight(rows).to(dtype)
        step = max(1, _PART // max(1, rows.shape[1]))
        for first in range(0, len(rows), step):
            some = rows[first : first + step].to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                projection[first : first + step] = some @ weights
            norm[first : first + step] = torch.linalg.vector_norm(some, dim=1)
        seen = _Seen(tuple(x.shape), projection, norm, _eps(x.dtype))
        self.seen[owner, call, part if not number else f"{part} {number + 1}"] = seen

    def add_outputs(self, outputs: Any, batch: int) -> None:
        """The model's own."""
        for value in _outputs(outputs):
            if value.shape[0] == batch:
                self.add("the model", 1, "output", value)

    def check_outputs(self, outputs: Any, batch: int) -> None:
        """Raises ValueError where fewer rows come out of the model than went in."""
        found = _outputs(outputs)
        if found and not any(value.shape[0] % batch == 0 for value in found):
            raise ValueError(
                f"the model's input has {batch} rows, but its output the shape {tuple(found[0].shape)}: rows of the input are "
                "no samples; give the model inputs with the batch in dimension 0, or set verify='never'"
            )

    def _weight(self, rows: Tensor) -> Tensor:
        """A number for each column; those of a shorter row are the first of a longer one's."""
        length = rows.shape[1]
        kept = self._weights.get(rows.device)
        if kept is None or len(kept) < length:
            places = torch.arange(2 * length + 1, dtype=torch.float64, device=rows.device)
            kept = self._weights[rows.device] = (places * places * 0.7390851332151607).cos_()
        return kept[:length]


def _outputs(outputs: Any) -> list[Tensor]:
    found = [value for _, value in _leaves(outputs, "") if isinstance(value, Tensor) and value.dim()]
    return [value for value in found if value.is_floating_point() and value.numel() > 1]


def check_rows(inputs: Inputs, batch: int, first: Record, again: Callable[[Inputs], Record]) -> None:
    """Raises ValueError where a row of a layer does not belong to the sample of its number.

    Args:
        inputs: of the model.
        first: of the forward pass with them.
        again: runs it with other inputs; `Unavailable` where that fails.
    """
    main = inputs.main()
    assert main is not None
    choices = _choices(inputs, main, batch)
    half = torch.zeros(batch, dtype=torch.bool)
    half[torch.randperm(batch, generator=torch.Generator().manual_seed(0))[: (batch + 1) // 2]] = True
    half = half.to(main.device)

    problems: dict[_Key, str] = dict.fromkeys(first.seen, "")
    moved: set[_Key] = set()

    def replace(takes: Callable[[Tensor], bool]) -> None:
        found: dict[_Key, str] = {}
        changed: set[_Key] = set()
        for rows in (half, ~half):
            _compare(first, again(_replaced(inputs, main, rows, takes)), rows, found, changed)
        moved.update(changed & (set(problems) - set(found)))
        for key in list(problems):
            if key not in found:
                del problems[key]
            elif not problems[key]:
                problems[key] = found[key]

    _try(choices, replace, lambda: bool(problems))
    advice = "leave it out with parameters=, or set verify='never' if row b stands for sample b all the same"
    if problems:
        (owner, _, part), problem = next(iter(problems.items()))
        raise ValueError(f"{owner}: {problem.format(part=part)}; {advice}")

    waiting = [key for key, seen in first.seen.items() if key not in moved and len(seen.projection)]

    def shorten(takes: Callable[[Tensor], bool]) -> None:
        record = again(inputs.map(lambda x: _again(x, x.detach()[:-1]) if takes(x) else x))
        waiting[:] = [
            key for key in waiting if key not in record.seen or record.seen[key].shape[0] != batch - 1
        ]

    _try(choices, shorten, lambda: bool(waiting))
    if waiting:
        owner, _, part = waiting[0]
        raise ValueError(
            f"{owner}: the {batch} rows of its {part}, of shape {first.seen[waiting[0]].shape}, are as many as there are samples by "
            f"chance: they stay as they are when samples are replaced or left out; {advice}"
        )


def _choices(inputs: Inputs, main: Tensor, batch: int) -> list[Callable[[Tensor], bool]]:
    """Which tensors may be the samples'. One that has as many rows by chance, such as a mask [T, T], is not: if it will not do with
    all of them, others than the main input are left alone."""
    tensors = [value for _, value in inputs.leaves() if isinstance(value, Tensor) and value.dim()]
    others = [value for value in tensors if value.shape[0] == batch and value is not main]
    few = range(1, len(others)) if len(others) <= 4 else ()
    kept = [others, *(list(some) for n in reversed(few) for some in itertools.combinations(others, n))]
    if others:
        kept.append([])
    return [_among([main, *some]) for some in kept]


def _among(tensors: list[Tensor]) -> Callable[[Tensor], bool]:
    return lambda x: any(x is one for one in tensors)


def _try(
    choices: Sequence[Callable[[Tensor], bool]],
    trial: Callable[[Callable[[Tensor], bool]], None],
    unsettled: Callable[[], bool],
) -> None:
    """The choices one after the other, as long as something is unsettled; one of them has to work."""
    failures = []
    for takes in choices:
        if not unsettled():
            return
        try:
            trial(takes)
        except Unavailable as error:
            failures.append(error)
    if len(failures) == len(choices):
        cause = failures[0].__cause__
        raise ValueError(
            "whose sample each row of a layer is could not be found out, since the forward pass failed when it was run again "
            f"with other samples of the batch ({type(cause).__name__}: {cause}); set verify='never' if row b of each layer "
            "belongs to sample b"
        ) from cause


def _compare(
    before: Record, after: Record, replaced: Tensor, problems: dict[_Key, str], changed: set[_Key]
) -> None:
    for key, seen in before.seen.items():
        other = after.seen.get(key)
        if other is None or other.shape != seen.shape:
            problems[key] = (
                f"the number of rows of its {{part}}, of shape {seen.shape}, depends on which samples are in the batch, so "
                "that they are no samples (experts, selected tokens)"
            )
            continue
        differs = _differs(seen, other)
        if bool((differs & ~replaced).any()):
            row = int((differs & ~replaced).nonzero()[0])
            problems[key] = (
                f"row {row} of its {{part}}, of shape {seen.shape}, changes with other samples than sample {row}: rows are no "
                "samples there (time or tokens first, windows, nodes), or samples influence each other"
            )
        elif bool(differs.any()):
            changed.add(key)


def _differs(before: _Seen, after: _Seen) -> Tensor:
    """[rows] bool."""
    a, b = before.projection, after.projection
    # The same operations on the same shapes: equal but for sums in another order, of which half precision leaves little.
    apart = before.precision * (64 if before.precision < 1e-6 else 4)
    same = (a - b).abs() <= apart * torch.maximum(before.norm, after.norm)
    return ~(same | (a == b) | (a.isnan() & b.isnan()))


def _replaced(inputs: Inputs, main: Tensor, rows: Tensor, takes: Callable[[Tensor], bool]) -> Inputs:
    """With other samples of the batch in `rows`."""
    batch = len(rows)
    here = torch.arange(batch, device=rows.device)
    source, waiting, flat = here.clone(), rows.clone(), main.detach().reshape(batch, -1)
    for shift in range(1, min(batch, 9)):
        other = (here + shift) % batch
        now = waiting & (flat != flat[other]).any(1)
        source, waiting = torch.where(now, other, source), waiting & ~now

    def change(x: Tensor) -> Tensor:
        if not takes(x):
            return x
        new = x.detach()[source.to(x.device)]
        if x is main and bool(waiting.any()):  # samples that are all alike
            new[waiting] = _unlike(new[waiting])
        return _again(x, new)

    return inputs.map(change)


def _unlike(x: Tensor) -> Tensor:
    """Other values that may stand there as well."""
    if x.dtype == torch.bool:
        return ~x
    return x / 2 + 0.25 if x.dtype.is_floating_point or x.dtype.is_complex else torch.where(x > 0, x - 1, 1)


def _again(x: Tensor, new: Tensor) -> Tensor:
    return new.requires_grad_(x.requires_grad)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 2.0**-52


def kept(x: Tensor) -> Tensor:
    """A copy that a model may change in place."""
    return _again(x, x.detach().clone())


class State:
    """What a forward pass depends on beside its inputs and parameters: random numbers, also of Python and NumPy, buffers and
    other attributes of modules; of which there are copies."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.attributes = [(module, _own(vars(module), {})) for module in model.modules()]
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    def restore_random(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self.device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


def _own(attributes: dict[str, Any], copies: dict[int, Tensor]) -> dict[str, Any]:
    """Copies of a module's buffers and of what its class has put there."""

    def copied(value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return value
        if isinstance(value, Tensor):
            return copies.setdefault(id(value), value.detach().clone())
        return copy.copy(value) if type(value) in (dict, list, set) else value

    found = {name: copied(value) for name, value in attributes.items() if name not in _MODULE}
    buffers = {name: copied(value) for name, value in attributes["_buffers"].items()}
    return {**found, "_buffers": buffers}


@contextlib.contextmanager
def rehearsal(state: State) -> Iterator[None]:
    """Calls of the model in here begin with `state`, keep no activations, and leave nothing behind."""

    def drop(_: Tensor) -> None:
        return None

    def refuse(_: None) -> Tensor:
        raise RuntimeError("a backward pass inside the forward pass")

    now = State(nn.Module(), state.device)
    before = [(module, dict(vars(module))) for module, _ in state.attributes]
    copies: dict[int, Tensor] = {}
    try:
        for module, attributes in state.attributes:
            _assign(module, {**_only(vars(module)), **_own(attributes, copies)})
        state.restore_random()
        with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(drop, refuse):
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, attributes in before:
            _assign(module, attributes)
        now.restore_random()


def _only(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name in _MODULE}


def _assign(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in vars(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)


_MODULE = frozenset(vars(nn.Module()))  # attributes by which a module is one


def _arithmetic(x: Tensor) -> torch.dtype:
    """float32 where the squares of x's numbers are normal ones, else float64."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not x.numel():
        return torch.float64
    low, high = torch.aminmax(x)
    return torch.float32 if 1e-12 <= max(-float(low), float(high)) <= 1e12 else torch.float64


# ---- sums


class Sums:
    """Of the samples' gradients of parameters, between random vectors."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, Tensor, float]] = {}
        self._vectors: dict[tuple[int, int, torch.device], Tensor] = {}

    def add(self, name: str, shape: torch.Size, gradient: Gradient, precision: float) -> None:
        """Of the parameter `name` of `shape`, computed in arithmetic of a relative `precision`."""
        rows, columns = _matrix(shape)
        device = (gradient.values if isinstance(gradient, Vector) else gradient.g).device
        u, v = self._normal(rows, 0, device), self._normal(columns, 1, device)
        sums, size, most = self._found.get(name, (u.new_zeros(_VECTORS), u.new_zeros(()), 0.0))
        for part in _parts(gradient):
            if isinstance(part, Outer):
                sums = sums + (_product(part.g, u) * _product(part.a, v)).sum((0, 1))
                size = size + (_squares(part.a) * _squares(part.g)).sum()
            elif isinstance(part, Rows):
                sums = sums + (u[part.indices] * _product(part.g, v)).sum((0, 1))
                size = size + _squares(part.g).sum()
            else:
                values = part.values.double()
                sums = sums + ((values.sum(0).view(rows, columns) @ v) * u).sum(0)
                size = size + values.square().sum()
                if part.terms is not None:
                    size = size + _squares(part.terms()).sum()
        self._found[name] = sums, size, max(most, precision)

    def pop(self, name: str, gradient: Tensor) -> float | None:
        """How far `gradient`, autograd's, is from the sum, in relation to it, if that is more than rounding; forgets the sum."""
        sums, size, precision = self._found.pop(name)
        g = gradient.to_dense() if gradient.is_sparse else gradient
        rows, columns = _matrix(g.shape)
        u, v = self._normal(rows, 0, g.device), self._normal(columns, 1, g.device)
        step = max(1, _PART // columns)
        theirs = torch.zeros_like(sums)
        for first in range(0, rows, step):
            some = g.reshape(rows, columns)[first : first + step]
            theirs += (_product(some, v) * u[first : first + step]).sum(0)
        off, size, own = torch.stack([_rms(sums - theirs), size.sqrt(), _rms(theirs)]).tolist()
        # Sums of n terms lose sqrt(n) roundings of the type they are in, of the size of the terms or of the whole; products of half
        # precision lose a few of theirs.
        allowed = 4096 * precision if precision <= 2e-7 else max(8 * precision, 5e-4)
        return off / max(own, 1e-300) if off > allowed * max(size, own) else None

    def clear(self) -> None:
        self._found.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def _normal(self, length: int, side: int, device: torch.device) -> Tensor:
        key = (length, side, device)
        if key not in self._vectors:
            generator = torch.Generator().manual_seed(side)
            found = torch.randn(length, _VECTORS, dtype=torch.float64, generator=generator)
            self._vectors[key] = found.to(device)
        return self._vectors[key]


def _matrix(shape: torch.Size) -> tuple[int, int]:
    return (shape[0], shape[1:].numel()) if len(shape) else (1, 1)


def _parts(gradient: Gradient) -> Iterator[Gradient]:
    """Some samples at a time, which are converted."""
    if isinstance(gradient, Vector):
        yield gradient
        return
    wide = gradient.g[0].numel() + (gradient.a[0].numel() if isinstance(gradient, Outer) else 0)
    step = max(1, _PART // max(1, wide))
    for first in range(0, len(gradient.g), step):
        here = slice(first, first + step)
        if isinstance(gradient, Outer):
            yield Outer(gradient.a[here], gradient.g[here])
        else:
            yield Rows(gradient.indices[here], gradient.g[here], gradient.width)


def _product(x: Tensor, vectors: Tensor) -> Tensor:
    dtype = _arithmetic(x)
    with torch.autocast(x.device.type, enabled=False):
        return (x.to(dtype) @ vectors.to(dtype)).double()


def _squares(x: Tensor) -> Tensor:
    """Of the last dimension's lengths."""
    return torch.linalg.vector_norm(x.to(_arithmetic(x)), dim=-1).double().square()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def precision_of(*dtypes: torch.dtype, device: torch.device) -> float:
    """Of arithmetic with tensors of `dtypes`."""
    found = max(_eps(dtype) for dtype in dtypes)
    if found < 1e-12:
        return found
    if torch.get_float32_matmul_precision() == "medium":
        return max(found, 2.0**-7)
    tf32 = device.type == "cuda" or torch.get_float32_matmul_precision() == "high"  # cuDNN's default
    return max(found, 2.0**-10) if tf32 else found
