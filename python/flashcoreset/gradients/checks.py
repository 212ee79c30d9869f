"""Checks by which GradientSketcher finds out two things about a model instead of assuming them: to which sample each row of a layer
belongs, and whether the samples' gradients add up to the gradient that autograd computes.

Rows: the forward pass runs again with the samples in another order, which has to be the order of each layer's rows, and with some
samples in the place of others: each row still has to be what its new sample gave in the first pass. If nothing moves
(token types that are all alike) or could move, the pass runs once more with one sample fewer: such a layer then has one row fewer.

Sums: both sides of sum_b G_b = G are taken between a few random vectors u, v, as u^T G v, without the matrices G_b: E (u^T D v)^2 = |D|^2.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import random
import types
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashcoreset.gradients.layers import Gradient, Outer, Rows, Vector

_PART = 1 << 22  # entries that are converted at a time
_VECTORS = 16
_PROJECTIONS = 4
_NOTHING_LEFT = 0.25  # a loss of autograd's sum in half precision from which on a difference says nothing


# ---- a model's inputs: tensors in containers of any depth


@dataclass(eq=False)
class Inputs:
    """The arguments of a call."""

    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def map(self, change: Callable[[Tensor], Any]) -> Inputs:
        """The inputs with other tensors, also inside of objects, which are copied."""
        memo = _memo([self.args, self.keywords])[0]
        return Inputs(_map(self.args, change, memo), _map(self.keywords, change, memo))

    def leaves(self) -> Iterator[tuple[str, Any]]:
        yield from _leaves(self.args, "")
        yield from _leaves(self.keywords, "")

    def tensors(self) -> list[Tensor]:
        """The tensors that have dimensions; those inside of objects come last."""
        found = [value for _, value in self.leaves() if isinstance(value, Tensor)]
        found += [value for value in _reach([self.args, self.keywords]) if isinstance(value, Tensor)]
        return list({id(value): value for value in found if value.dim()}.values())

    def main(self) -> Tensor | None:
        """The tensor whose first dimension is the batch: the first that does not hold positions for all samples, or the first."""
        tensors = [
            (path, value) for path, value in self.leaves() if isinstance(value, Tensor) and value.dim()
        ]
        found = (value for path, value in tensors if not _for_all(path, value))
        return next(found, tensors[0][1] if tensors else None)

    def form(self) -> tuple[Any, ...]:
        """The form of a call, which is everything except sizes and numbers."""
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


def _for_all(path: str, value: Tensor) -> bool:
    """Whether `value`, of size 1, holds positions instead of a batch of one: by its name, or because it counts up."""
    if value.shape[0] != 1:
        return False
    if "position" in path:
        return True
    if value.dim() < 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.shape[-1] > 1 and bool((value.diff(dim=-1) == 1).all())


def _map(value: Any, change: Callable[[Tensor], Any], memo: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, types.MappingProxyType):
        return types.MappingProxyType({key: _map(inner, change, memo) for key, inner in value.items()})
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, inner in value.items():
            changed[key] = _map(inner, change, memo)
        return changed
    if isinstance(value, (tuple, list)):
        parts = [_map(one, change, memo) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made: Any = copy.copy(value)
        for part in dataclasses.fields(value):
            object.__setattr__(made, part.name, _map(getattr(value, part.name, None), change, memo))
        return made
    return _copied(value, change, memo, "an input")


# ---- copies


class _Tensors(TorchFunctionMode):
    """Makes copies of objects hold what `change` makes of their tensors, whatever graph the tensors are in."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        if id(x) not in memo:
            memo[id(x)] = self._change(x)
        return memo[id(x)]


def _copied(value: Any, change: Callable[[Tensor], Any], memo: dict[int, Any], what: str) -> Any:
    try:
        with _Tensors(change):
            return copy.deepcopy(value, memo)
    except Exception as error:
        raise ValueError(
            f"{what} of type {type(value).__name__} cannot be copied ({type(error).__name__}: {error}), so that the forward passes "
            "that check whose sample each row is might change it; set verify='never' if row b of each layer belongs to sample b"
        ) from error


_HOMES = ("torch", "_thread", "threading", "weakref")
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _reach(values: Iterable[Any]) -> Iterator[Any]:
    """The values that can be reached through containers and attributes; modules are not entered."""
    waiting, seen = list(values), {}
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if _left_alone(value) or isinstance(value, (Tensor, nn.Module)):
            continue
        if isinstance(value, Mapping):
            waiting += list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            waiting += list(value)
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        waiting += list(getattr(value, "__dict__", {}).values())


def _left_alone(value: Any) -> bool:
    """Whether copies keep `value` itself: classes, functions, generators, marks, what belongs to torch or to threads."""
    kind = type(value)
    if kind in (object, types.ModuleType, types.FunctionType, *weakref.ProxyTypes):
        return True
    if isinstance(value, (type, *_GENERATORS)):
        return True
    return kind.__module__.split(".")[0] in _HOMES and not isinstance(
        value, (tuple, Mapping, Tensor, nn.Module)
    )


def _memo(values: Iterable[Any]) -> tuple[dict[int, Any], list[Any], list[nn.Module]]:
    """What deepcopy must not copy, and the random generators and the modules among it."""
    memo: dict[int, Any] = {}
    generators, modules = [], []
    for value in _reach(values):
        alone = _left_alone(value)
        if alone or isinstance(value, (nn.Module, nn.Parameter)):
            memo[id(value)] = value
        if alone and isinstance(value, _GENERATORS):
            generators.append(value)
        elif not alone and isinstance(value, nn.Module):
            modules.append(value)
    return memo, generators, modules


# ---- rows


class Unavailable(Exception):
    """The forward pass could not be run again."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """A tensor, known by its shape and by the projections and the norm of each row."""

    shape: tuple[int, ...]
    projection: Tensor  # [rows, _PROJECTIONS] float64
    norm: Tensor  # [rows] float64
    precision: float  # of its type
    arithmetic: float  # precision of the operations that made it


_Key = tuple[str, int, str]  # the layer, which of its calls, and which tensor of the call


class Record:
    """The inputs of layers in a forward pass, and the outputs of layers that may mix samples."""

    def __init__(self, like: Record | None = None) -> None:
        self.seen: dict[_Key, _Seen] = {}
        self.outputs: list[Tensor] = []  # outputs of the model
        self.drawn = False  # whether random numbers were drawn
        self._calls: Counter[str] = Counter()
        self._weights: dict[torch.device, Tensor] = {} if like is None else like._weights

    def add_call(self, owner: str) -> int:
        """Counts a call of `owner` and returns its number."""
        self._calls[owner] += 1
        return self._calls[owner]

    def add(self, owner: str, call: int, part: str, x: Tensor) -> None:
        number = sum(key[:2] == (owner, call) and key[2].startswith(part) for key in self.seen)
        self.seen[owner, call, part if not number else f"{part} {number + 1}"] = self.see(x)

    def see(self, x: Tensor) -> _Seen:
        rows = x.detach().reshape(x.shape[0], -1)
        dtype = _arithmetic(rows)
        projection = torch.empty(len(rows), _PROJECTIONS, dtype=torch.float64, device=x.device)
        norm, weights = projection.new_empty(len(rows)), self._weight(rows).to(dtype)
        step = max(1, _PART // max(1, rows.shape[1]))
        for first in range(0, len(rows), step):
            some = rows[first : first + step].to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                projection[first : first + step] = some @ weights
            norm[first : first + step] = torch.linalg.vector_norm(some, dim=1)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        arithmetic = precision_of(x.dtype, autocast, device=x.device)
        return _Seen(tuple(x.shape), projection, norm, _eps(x.dtype), arithmetic)

    def add_outputs(self, outputs: Any) -> None:
        """Adds the outputs of the model."""
        found = [value for _, value in _leaves(outputs, "") if isinstance(value, Tensor) and value.dim()]
        self.outputs = [value.detach() for value in found if value.is_floating_point() and value.numel() > 1]

    def of(self, batch: int) -> dict[_Key, _Seen]:
        return {key: seen for key, seen in self.seen.items() if seen.shape[0] == batch}

    def _weight(self, rows: Tensor) -> Tensor:
        """Some numbers for each column; a shorter row takes the first numbers of a longer one."""
        length = rows.shape[1]
        kept = self._weights.get(rows.device)
        if kept is None or len(kept) < length:
            places = torch.arange(2 * length + 1, dtype=torch.float64, device=rows.device)
            factors = places.new_tensor(
                [0.7390851332151607, 0.5671432904097838, 0.3678794411714423, 0.8767262153950624]
            )
            kept = self._weights[rows.device] = (places * places)[:, None].mul(factors).cos_()
        return kept[:length]


Again = Callable[[Inputs, bool], Record]


def check_rows(inputs: Inputs, batch: int, first: Record, again: Again) -> None:
    """Raises ValueError if a row of a layer does not belong to the sample with the same number.

    Args:
        inputs: the inputs of the model.
        first: the record of the forward pass with these inputs.
        again: runs the forward pass with other inputs, and with or without dropout; raises `Unavailable` if that fails.
    """
    main = inputs.main()
    assert main is not None
    found: list[dict[str, str]] = []
    failures: list[Unavailable] = []
    for number, taken in enumerate(_choices(inputs, main, batch)):
        try:
            trial = _Trial(inputs, taken, batch, first, again)
            trial.run()
        except Unavailable as error:
            failures.append(error)
            continue
        if not trial.problems:
            trial.settle(every=number > 0)
        if not trial.problems:
            return
        found.append(trial.problems)
        if trial.standing:
            break  # with fewer inputs taken as the samples' even less moves
    if not found:
        cause = failures[0].__cause__
        raise ValueError(
            "whose sample each row of a layer is could not be found out, since the forward pass failed when it was run again "
            f"with other samples of the batch ({type(cause).__name__}: {cause}); set verify='never' if row b of each layer "
            "belongs to sample b"
        ) from cause
    # A layer can be left out.
    owner, problem = next(iter(min(found, key=lambda problems: (_MODEL in problems, len(problems))).items()))
    advice = (
        "give the model inputs with the batch in dimension 0, or set verify='never' if samples have gradients of their own all the same"
        if owner == _MODEL
        else "leave it out with parameters=, or set verify='never' if row b stands for sample b all the same"
    )
    raise ValueError(f"{owner}: {problem}; {advice}")


_MODEL = "the model"


def _choices(inputs: Inputs, main: Tensor, batch: int) -> list[list[Tensor]]:
    """Which tensors may hold the samples. A tensor that has as many rows by chance, such as a mask [T, T], does not hold them: if the
    check fails with all candidates, tensors other than the main input are left alone."""
    others = [value for value in inputs.tensors() if value.shape[0] == batch and value is not main]
    few = range(1, len(others)) if len(others) <= 4 else ()
    kept = [others, *(list(some) for n in reversed(few) for some in itertools.combinations(others, n))]
    if others:
        kept.append([])
    return [[main, *some] for some in kept]


class _Trial:
    """A trial of one choice of the inputs that hold the samples: the same choice for all layers and outputs.

    If the model draws random numbers, a row that moves is comparable only without dropout; if the model draws some even then, the
    trial checks only which rows stay as they are, for every bit of their numbers.
    """

    def __init__(self, inputs: Inputs, taken: list[Tensor], batch: int, first: Record, again: Again) -> None:
        self._batch, self._again, self._still = batch, again, False
        self._numbers = [i for i, value in enumerate(inputs.tensors()) if any(value is x for x in taken)]
        self.problems: dict[str, str] = {}  # by owner
        self.standing = False  # whether the problems are that rows do not move
        self._moved: set[_Key] = set()
        self._stood: dict[_Key, int] = {}  # tensors that once did not move -> a row that should have moved
        self._exact = True
        alike = all(bool((_bits(x) == _bits(x[:1])).all()) for x in taken)
        if alike:
            inputs = self._change(inputs, _spread)
        base = None if alike else first
        if first.drawn:
            base = again(inputs, True)
            self._still = self._exact = not base.drawn and _shapes(base, batch) == _shapes(first, batch)
            base = base if self._exact else None if alike else first
        base = base or again(inputs, self._still)
        self._inputs, self._base, self._seen = inputs, base, base.of(batch)
        self._arithmetic = max((one.arithmetic for one in self._seen.values()), default=0.0)
        self._open = set(self._seen)  # not yet seen with other samples in the same shape

    def run(self) -> None:
        batch = self._batch
        if self._exact:
            order = _cycle(batch)
            self._compare(self._again(self._permuted(order), self._still), order, replaced=False)
        for number, rows in enumerate(_halves(batch, all_bits=not self._exact)):
            if self.problems or (number and self._exact and not self._open):
                break
            source = _others(rows)
            record = self._again(self._permuted(source), self._still)
            self._compare(record, source, replaced=True)
        for key, row in self._stood.items():
            if key in self._moved:
                self._add_wrong(key, row)
        for owner, call, part in () if self.problems else self._open:
            self.problems[owner] = (
                f"the shape {self._seen[owner, call, part].shape} of its {part} depends on which samples are in the batch, so that it "
                "could not be found out whether they influence each other"
            )

    def settle(self, every: bool) -> None:
        """Checks that what has not moved has one row fewer with one sample fewer; checks `every` layer if other inputs have as many rows
        and keep them, so that these inputs do not decide on the order."""
        waiting = [key for key, seen in self._seen.items() if every or key not in self._moved]
        waiting = [key for key in waiting if len(self._seen[key].norm)]
        if not waiting:
            return
        doubt = "they stay as they are when samples are replaced or left out"
        try:
            seen = self._again(self._change(self._inputs, lambda x: x.detach()[:-1]), self._still).seen
        except Unavailable as error:
            self.problems = self._by_chance(
                waiting, f"with one sample fewer the model fails ({error.__cause__})"
            )
            return
        waiting = [key for key in waiting if key in seen and seen[key].shape[0] != self._batch - 1]
        self.problems, self.standing = self._by_chance(waiting, doubt), bool(waiting)

    def _by_chance(self, keys: list[_Key], doubt: str) -> dict[str, str]:
        return {
            owner: f"the {self._batch} rows of its {part}, of shape {self._seen[owner, call, part].shape}, are as many as there are "
            f"samples by chance: {doubt}"
            for owner, call, part in reversed(keys)
        }

    def _permuted(self, source: Tensor) -> Inputs:
        """The inputs with the sample `source[b]` in row b."""
        return self._change(self._inputs, lambda x: x.detach()[source.to(x.device)])

    def _change(self, inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
        tensors = inputs.tensors()
        taken = {id(tensors[i]) for i in self._numbers}
        return inputs.map(lambda x: _again(x, change(x)) if id(x) in taken else x)

    def _compare(self, record: Record, source: Tensor, replaced: bool) -> None:
        """Compares with a pass whose row b has the sample `source[b]`: all of the samples or, if some were `replaced`, only some."""
        other = {key: record.seen.get(key) for key in self._seen}
        same_shapes = all(
            one is not None and one.shape == self._seen[key].shape for key, one in other.items()
        )
        for key, seen in self._seen.items():
            owner, _, part = key
            after = other[key]
            if after is None or after.shape != seen.shape:
                if not replaced or (after is not None and after.shape[0] != seen.shape[0]):
                    self.problems.setdefault(
                        owner,
                        f"the number of rows of its {part}, of shape {seen.shape}, depends on which samples are in the batch, so "
                        "that they are no samples (experts, selected tokens)",
                    )
                continue
            self._open -= {key} if replaced else set()
            wrong = self._wrong(seen, after, source, same_shapes)
            if _moves(seen, after):
                self._moved.add(key)
            elif wrong is not None:  # for now: positions, which never move, or rows in an order of their own
                self._stood.setdefault(key, wrong)
                continue
            if wrong is not None:
                self._add_wrong(key, wrong)
        if replaced and len(record.outputs) == len(self._base.outputs):
            self._compare_outputs(record, source, same_shapes)

    def _add_wrong(self, key: _Key, row: int) -> None:
        owner, _, part = key
        self.problems.setdefault(
            owner,
            f"row {row} of its {part}, of shape {self._seen[key].shape}, changes with other samples than sample {row}: rows are no "
            "samples there (time or tokens first, windows, nodes, another order), or samples influence each other",
        )

    def _wrong(self, seen: _Seen, after: _Seen, source: Tensor, same_shapes: bool) -> int | None:
        """The number of a row that is not what its sample gave before, or None."""
        source = source.to(seen.norm.device)
        stays = source == torch.arange(len(source), device=source.device)
        old, new = seen.projection[source], after.projection
        norm = torch.maximum(seen.norm[source], after.norm)
        # The same operations on the same shapes give the same numbers, except for the order of sums, which leaves few digits in half
        # precision.
        tight = seen.precision * (64 if seen.precision < 1e-6 else 4)
        # In another place of the batch the order of sums differs in all layers up to here; but rows of other samples are farther off.
        apart = torch.where(stays & same_shapes, tight, self._loose(seen)) * norm
        gap = (seen.projection - old).norm(dim=1).nan_to_num(0, 0)
        apart = torch.maximum(apart, gap / 10)
        wrong = ~_close(old, new, apart)
        if not self._exact:
            wrong &= stays
        return int(wrong.nonzero()[0]) if bool(wrong.any()) else None

    def _loose(self, seen: _Seen) -> float:
        """How far apart, relative to their norms, the rows may be that one sample gives in different places of the batch."""
        precision = max(seen.arithmetic, self._arithmetic)
        return precision * (1024 if precision < 1e-6 else 8)

    def _compare_outputs(self, record: Record, source: Tensor, same_shapes: bool) -> None:
        """Checks that replaced samples give what the samples in their place gave, wherever the output has them; a constant passes."""
        batch, outputs = self._batch, self._base.outputs
        whole = any(x.shape[0] % batch == 0 for x in outputs)
        for before, after in zip(outputs, record.outputs, strict=True):
            if whole and before.shape[0] != batch:
                continue
            if before.dim() == after.dim():
                places = [i for i, size in enumerate(before.shape) if size == batch == after.shape[i]]
                if any(
                    self._wrong(*self._sides(before, after, i), source, same_shapes) is None for i in places
                ):
                    continue
            row = self._new_row(before, after)
            if row is None:
                continue
            self.problems[_MODEL] = (
                f"row {row} of its output, of shape {tuple(after.shape)}, changes with other samples than sample {row}: samples influence "
                "each other"
                if whole
                else f"the model's input has {batch} rows, but its output the shape {tuple(before.shape)}, where samples influence each "
                "other: rows of the input are no samples"
            )

    def _sides(self, before: Tensor, after: Tensor, dim: int) -> tuple[_Seen, _Seen]:
        return self._base.see(before.movedim(dim, 0)), self._base.see(after.movedim(dim, 0))

    def _new_row(self, before: Tensor, after: Tensor) -> int | None:
        """The number of a row with vectors that the output did not have before, or None."""
        wide = before.shape[-1] if before.dim() > 1 else 1
        if not self._exact or not after.numel():
            return 0 if before.shape == after.shape and before.shape[0] == self._batch else None
        seen, other = self._base.see(before.reshape(-1, wide)), self._base.see(after.reshape(-1, wide))
        some = torch.linspace(0, len(other.norm) - 1, min(len(other.norm), 1024)).long().to(after.device)
        found, norm = other.projection[some].nan_to_num(), other.norm[some].nan_to_num()
        apart = self._loose(seen) * norm
        off = torch.cdist(found, seen.projection.nan_to_num()).amin(1) > apart
        return int(some[off][0]) * wide // max(1, after[0].numel()) if bool(off.any()) else None


def _shapes(record: Record, batch: int) -> dict[_Key, tuple[int, ...]]:
    return {key: seen.shape for key, seen in record.of(batch).items()}


def _close(a: Tensor, b: Tensor, apart: Tensor) -> Tensor:
    """Whether each row of `a` and `b` [rows, projections] differs by at most `apart`, [rows] bool."""
    same = (a == b) | (a.isnan() & b.isnan())
    return same.all(1) | ((a - b).norm(dim=1) <= apart)


def _moves(seen: _Seen, after: _Seen) -> bool:
    """Whether rows changed."""
    apart = seen.precision * (64 if seen.precision < 1e-6 else 4) * torch.maximum(seen.norm, after.norm)
    return not bool(_close(seen.projection, after.projection, apart).all())


def _cycle(batch: int) -> Tensor:
    """An order in which all samples follow each other in one ring: only other turns of the ring agree with it, and no turn agrees
    with `_others` of a sample, so that no fixed order of a layer's rows passes for the samples' own order."""
    ring = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    order = torch.empty_like(ring)
    order[ring] = ring.roll(1)
    return order


def _halves(batch: int, all_bits: bool) -> Iterator[Tensor]:
    """Masks [batch] bool of the rows whose samples are replaced, and then of the other rows."""
    number = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    for bit in range((batch - 1).bit_length() if all_bits else 1):
        rows = (number >> bit) % 2 == 0
        yield rows
        yield ~rows
    for one in range(0 if all_bits else min(batch, 4)):
        yield torch.arange(batch) == one


def _others(rows: Tensor) -> Tensor:
    """Samples for all rows: the sample of another row in `rows`, and each row's own sample elsewhere."""
    return torch.where(rows, (~rows).nonzero()[0], torch.arange(len(rows)))


def _bits(x: Tensor) -> Tensor:
    return x.detach().nan_to_num() if x.is_floating_point() else x.detach()


def _spread(x: Tensor) -> Tensor:
    """A copy of samples that are all alike, with other values in half of them."""
    x = x.detach().clone()
    rows = next(_halves(len(x), False)).to(x.device)
    x[rows] = _unlike(x[rows])
    return x


def _unlike(x: Tensor) -> Tensor:
    """Other values that are valid in the same place."""
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


class Randomness:
    """States of generators: of torch, Python and NumPy, and of `others`."""

    def __init__(self, others: list[Any], device: torch.device) -> None:
        self._others, self._device = others, device
        self._states = self._now()

    def _now(self) -> list[Any]:
        own = [_generator_state(one) for one in self._others]
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return [torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(), *own]  # noqa: NPY002

    def restore(self) -> None:
        cpu, cuda, python, numpy, *own = self._states
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for one, state in zip(self._others, own, strict=True):
            _set_generator(one, state)

    def drawn(self) -> bool:
        """Whether random numbers were drawn since the states were taken."""
        return not _equal(self._states, self._now())

    def of_now(self) -> Randomness:
        return Randomness(self._others, self._device)


def _generator_state(one: Any) -> Any:
    if isinstance(one, np.random.Generator):
        return copy.deepcopy(one.bit_generator.state)
    return one.getstate() if isinstance(one, random.Random) else one.get_state()


def _set_generator(one: Any, state: Any) -> None:
    if isinstance(one, np.random.Generator):
        one.bit_generator.state = state
    elif isinstance(one, random.Random):
        one.setstate(state)
    else:
        one.set_state(state)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping):
        return all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (tuple, list)):
        return all(map(_equal, a, b))
    return bool(a == b)


class State:
    """Copies of what a forward pass depends on beside its inputs and parameters: random numbers, also those of Python, NumPy and the
    model's own generators; buffers and other attributes of modules, also of modules that are in no list of modules."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        modules: dict[int, nn.Module] = {}
        waiting: list[nn.Module] = [model]
        self._memo: dict[int, Any] = {}
        generators: list[Any] = []
        while waiting:
            for module in waiting.pop().modules():
                if id(module) in modules or isinstance(module, nn.parallel.DistributedDataParallel):
                    continue
                modules[id(module)] = module
                memo, found, hidden = _memo(
                    value for name, value in vars(module).items() if name not in _MODULE
                )
                self._memo.update(memo)
                generators += found
                waiting += hidden
        self._memo.update((id(p), p) for module in modules.values() for p in module.parameters(recurse=False))
        self._memo.update(modules)
        self.random = Randomness(list({id(one): one for one in generators}.values()), device)
        memo = dict(self._memo)
        self._attributes = [(module, _own(module, vars(module), memo)) for module in modules.values()]

    def attributes(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Copies of the modules' attributes, which a forward pass may change."""
        memo = dict(self._memo)
        return [(module, _own(module, own, memo)) for module, own in self._attributes]


def _own(module: nn.Module, attributes: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Copies of a module's buffers and of what its class has put there."""

    def copied(name: str, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        return _copied(
            value, lambda x: x.detach().clone(), memo, f"{type(module).__name__}'s attribute {name!r}"
        )

    found = {name: copied(name, value) for name, value in attributes.items() if name not in _MODULE}
    buffers = {name: copied(name, value) for name, value in attributes["_buffers"].items()}
    return {**found, "_buffers": buffers}


@contextlib.contextmanager
def rehearsal(state: State, still: bool) -> Iterator[None]:
    """Calls of the model in here begin with `state`, keep no activations, and leave nothing behind; `still`: as in eval mode."""

    def drop(_: Tensor) -> None:
        return None

    def refuse(_: None) -> Tensor:
        raise RuntimeError("a backward pass inside the forward pass")

    now, attributes = state.random.of_now(), state.attributes()
    before = [(module, dict(vars(module))) for module, _ in attributes]
    try:
        for module, own in attributes:
            _assign(module, {**_only(vars(module)), **own, **({"training": False} if still else {})})
        state.random.restore()
        with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(drop, refuse):
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, own in before:
            _assign(module, own)
        now.restore()


_DROPOUTS = {
    getattr(F, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}


def without_dropout(
    function: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call of `function` in which nothing is dropped."""
    if function in _DROPOUTS:
        x = args[0] if args else keywords["input"]
        return (x,), {"p": 0.0, "training": False}
    if function is F.scaled_dot_product_attention:
        return (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, {
            name: value for name, value in keywords.items() if name != "dropout_p"
        }
    return args, keywords


def _only(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name in _MODULE}


def _assign(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in vars(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)


_MODULE = frozenset(vars(nn.Module()))  # attributes that every module has


def _arithmetic(x: Tensor) -> torch.dtype:
    """The type float32 if the squares of x's numbers are normal numbers, else float64."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not x.numel():
        return torch.float64
    low, high = torch.aminmax(x)
    return torch.float32 if 1e-12 <= max(-float(low), float(high)) <= 1e12 else torch.float64


# ---- sums


class Sums:
    """Sums of the samples' gradients of parameters, taken between random vectors."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, Tensor, float, float]] = {}
        self._vectors: dict[tuple[int, int, torch.device], Tensor] = {}

    def add(
        self, name: str, shape: torch.Size, gradient: Gradient, precision: float, rounded: float = 0.0
    ) -> None:
        """Adds a `gradient` of the parameter `name` of `shape`, computed in arithmetic of a relative `precision`; `rounded` is the share
        that autograd's sum may lose if it adds up in half precision."""
        rows, columns = _matrix(shape)
        device = (gradient.values if isinstance(gradient, Vector) else gradient.g).device
        u, v = self._normal(rows, 0, device), self._normal(columns, 1, device)
        sums, size, most, lost = self._found.get(name, (u.new_zeros(_VECTORS), u.new_zeros(()), 0.0, 0.0))
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
        self._found[name] = sums, size, max(most, precision), lost + rounded

    def pop(self, name: str, gradient: Tensor) -> float | None:
        """The distance of `gradient`, autograd's, from the sum, relative to autograd's, if it is more than rounding; forgets the sum."""
        sums, size, precision, rounded = self._found.pop(name)
        if rounded >= _NOTHING_LEFT:
            return None
        g = gradient.to_dense() if gradient.is_sparse else gradient
        rows, columns = _matrix(g.shape)
        u, v = self._normal(rows, 0, g.device), self._normal(columns, 1, g.device)
        step = max(1, _PART // columns)
        theirs = torch.zeros_like(sums)
        for first in range(0, rows, step):
            some = g.reshape(rows, columns)[first : first + step]
            theirs += (_product(some, v) * u[first : first + step]).sum(0)
        off, size, own = torch.stack([_rms(sums - theirs), size.sqrt(), _rms(theirs)]).tolist()
        # Sums of n terms lose sqrt(n) roundings of their type, of the size of the terms or of the whole sum; products in half
        # precision lose a few roundings.
        allowed = 4096 * precision if precision <= 2e-7 else max(8 * precision, 5e-4, rounded)
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
    """The gradient in parts of some samples, which are converted at a time."""
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
    """The squared lengths along the last dimension."""
    return torch.linalg.vector_norm(x.to(_arithmetic(x)), dim=-1).double().square()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def precision_of(*dtypes: torch.dtype, device: torch.device) -> float:
    """The relative precision of arithmetic with tensors of `dtypes`."""
    found = max(_eps(dtype) for dtype in dtypes)
    if found < 1e-12:
        return found
    if torch.get_float32_matmul_precision() == "medium":
        return max(found, 2.0**-7)
    tf32 = device.type == "cuda" or torch.get_float32_matmul_precision() == "high"  # cuDNN's default
    return max(found, 2.0**-10) if tf32 else found
