"""Finds out to which sample each row of a layer belongs.

The forward pass runs again with the samples in another order, which has to be the order of each layer's rows, and with some samples in
the place of others: each row still has to be what its new sample gave in the first pass. If nothing moves (token types that are all
alike) or could move, the pass runs once more with one sample fewer: such a layer then has one row fewer.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashcoreset.gradients.inputs import Inputs, _leaves
from flashcoreset.gradients.layouts import FIRST, Layout
from flashcoreset.gradients.picked import Base, Picked
from flashcoreset.gradients.precision import PART, as_input, eps, precision_of, working_dtype

_PROJECTIONS = 4


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
    picked: tuple[int, ...] = ()  # how many rows each call was given, if the rows are sums over calls


_Key = tuple[str, int, str]  # the layer, which of its calls, and which tensor of the call


class Record:
    """The inputs of layers in a forward pass, and the outputs of layers that may mix samples.

    A tensor may hold the samples in several layouts: it is kept once for each, under owners of their own.
    """

    def __init__(self, like: Record | None = None) -> None:
        self.seen: dict[_Key, _Seen] = {}
        self.others: dict[str, tuple[str, Layout]] = {}  # owners of other layouts -> owner, layout
        self.outputs: list[Tensor] = []  # outputs of the model
        self.drawn = False  # whether random numbers were drawn
        self._calls: Counter[str] = Counter()
        self._bases: dict[str, dict[Base, int]] = {}  # the tensors that rows were picked out of, numbered
        self._weights: dict[torch.device, Tensor] = {} if like is None else like._weights

    def add_call(self, owner: str) -> int:
        """Counts a call of `owner` and returns its number."""
        self._calls[owner] += 1
        return self._calls[owner]

    def add(self, owner: str, call: int, part: str, x: Tensor) -> None:
        number = sum(key[:2] == (owner, call) and key[2].startswith(part) for key in self.seen)
        self.seen[owner, call, part if not number else f"{part} {number + 1}"] = self.see(x)

    def add_layouts(
        self, owner: str, call: int, part: str, x: Tensor, batch: int, found: list[Layout]
    ) -> None:
        """Adds `x` in each of the layouts `found`."""
        self.add(owner, call, part, x)
        for layout in found:
            if layout != FIRST:
                other = f"{owner} ({layout})"
                self.others[other] = owner, layout
                self.add(other, call, part, layout.bring(x, batch))

    def add_picked(
        self, owner: str, part: str, x: Tensor, picked: Picked, batch: int, found: list[Layout]
    ) -> None:
        """Adds rows that were picked out of a tensor, under an owner that stands for all of them, in each of the layouts `found` of that
        tensor: the tensor itself, and for each of its rows the sum over what was made of it in all calls for `part` (of which some are
        left out in other batches, such as those of experts)."""
        base, groups = picked.origin.base, picked.groups()
        calls = self._bases.setdefault(owner, {})
        if base not in calls:
            calls[base] = len(calls) + 1
            if base.tensor is not None:
                self._add_layouts(owner, calls[base], "rows", self.see(base.tensor), batch, found)
        end = groups[-1][1]  # nothing is made of rows behind it
        seen, rows = self.see(x[:end]), picked.origin.rows[:end]
        projection = seen.projection.new_zeros(base.count, _PROJECTIONS)
        projection.index_add_(0, rows, seen.projection)
        squares = seen.norm.new_zeros(base.count).index_add_(0, rows, seen.norm.square())
        numbers = tuple(last - first for first, last in groups)
        before = self.seen.get((owner, calls[base], part))
        if before is not None:
            projection += before.projection
            squares += before.norm.square()
            numbers = (*before.picked, *numbers)
        sums = _Seen(
            (base.count, *seen.shape[1:]),
            projection,
            squares.sqrt(),
            seen.precision,
            seen.arithmetic,
            numbers,
        )
        self._add_layouts(owner, calls[base], part, sums, batch, found)

    def _add_layouts(
        self, owner: str, call: int, part: str, seen: _Seen, batch: int, found: list[Layout]
    ) -> None:
        """Adds what was seen of the rows of a tensor that may hold samples flattened with positions."""
        self.seen[owner, call, part] = seen
        for layout in found:
            if layout != FIRST:
                other = f"{owner} ({layout})"
                self.others[other] = owner, layout
                each = (
                    layout.bring(seen.projection, batch).sum(1),
                    layout.bring(seen.norm.square(), batch).sum(1).sqrt(),
                )
                shape = (batch, seen.shape[0] // batch, *seen.shape[1:])
                self.seen[other, call, part] = replace(seen, shape=shape, projection=each[0], norm=each[1])

    def see(self, x: Tensor) -> _Seen:
        rows = x.detach().reshape(x.shape[0], x.shape[1:].numel())
        dtype = working_dtype(rows)
        projection = torch.empty(len(rows), _PROJECTIONS, dtype=torch.float64, device=x.device)
        norm, weights = projection.new_empty(len(rows)), self._weight(rows).to(dtype)
        step = max(1, PART // max(1, rows.shape[1]))
        for first in range(0, len(rows), step):
            some = rows[first : first + step].to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                projection[first : first + step] = some @ weights
            norm[first : first + step] = torch.linalg.vector_norm(some, dim=1)
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        arithmetic = precision_of(x.dtype, autocast, device=x.device)
        return _Seen(tuple(x.shape), projection, norm, eps(x.dtype), arithmetic)

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


def check_rows(
    inputs: Inputs, batch: int, first: Record, again: Again, dim: int = 0
) -> tuple[dict[str, str], dict[str, Layout]]:
    """Finds out whether each row of a layer belongs to the sample with the same number.

    Args:
        inputs: the inputs of the model, with the samples in dimension `dim`.
        first: the record of the forward pass with these inputs.
        again: runs the forward pass with other inputs, and with or without dropout; raises `Unavailable` if that fails.

    Returns:
        What is wrong with layers, by their owners, and the layouts of those that have several.
    """
    main = inputs.main()
    assert main is not None
    found: list[dict[str, str]] = []
    failures: list[Unavailable] = []
    for number, taken in enumerate(_choices(inputs, main, batch, dim)):
        try:
            trial = _Trial(inputs, taken, batch, first, again)
            trial.run()
        except Unavailable as error:
            failures.append(error)
            continue
        if not trial.problems:
            trial.settle(every=number > 0)
        if not trial.problems:
            return {}, trial.layouts
        found.append(trial.problems)
        if trial.standing:
            break  # with fewer inputs taken as the samples' even less moves
    if not found:
        cause = failures[0].__cause__
        raise ValueError(
            "the check of which sample each row of a layer belongs to failed: the forward pass raised an error when it ran again "
            f"with other samples of the batch ({type(cause).__name__}: {cause}); set verify='never' if row b of each layer "
            "belongs to sample b"
        ) from cause
    # A layer can be left out.
    return min(found, key=lambda problems: (MODEL in problems, len(problems))), {}


MODEL = "the model"

_Taken = list[tuple[Tensor, int]]  # tensors that hold the samples, and the dimension of these


def _choices(inputs: Inputs, main: Tensor, batch: int, dim: int) -> list[_Taken]:
    """Which tensors may hold the samples. A tensor that has as many rows by chance, such as a mask [T, T], does not hold them: if the
    check fails with all candidates, tensors other than the main input are left alone."""
    others: _Taken = []
    turned: _Taken = []  # with the samples in dimension 0 where dimension `dim` may hold them too
    for value in inputs.tensors():
        dims = [d for d in dict.fromkeys((dim, 0)) if value.dim() > d and value.shape[d] == batch]
        if value is not main and dims:
            others.append((value, dims[0]))
            turned.append((value, dims[-1]))
    few = range(1, len(others)) if len(others) <= 4 else ()
    kept = [others, *([turned] if any(a[1] != b[1] for a, b in zip(others, turned, strict=True)) else [])]
    kept += [list(some) for n in reversed(few) for some in itertools.combinations(others, n)]
    if others:
        kept.append([])
    return [[(main, dim), *some] for some in kept]


class _Trial:
    """A trial of one choice of the inputs that hold the samples: the same choice for all layers and outputs.

    If the model draws random numbers, a row that moves is comparable only without dropout; if the model draws some even then, the
    trial checks only which rows stay as they are, for every bit of their numbers.
    """

    def __init__(self, inputs: Inputs, taken: _Taken, batch: int, first: Record, again: Again) -> None:
        self._batch, self._again, self._still = batch, again, False
        dims = {id(x): dim for x, dim in taken}
        self._dims = {i: dims[id(x)] for i, x in enumerate(inputs.tensors()) if id(x) in dims}
        self.layouts: dict[str, Layout] = {}
        self.problems: dict[str, str] = {}  # by owner
        self.standing = False  # whether the problems are that rows do not move
        self._moved: set[_Key] = set()
        self._stood: dict[_Key, int] = {}  # tensors that once did not move -> a row that should have moved
        self._exact = True
        rows = [x.movedim(dim, 0) for x, dim in taken]
        alike = all(bool((_bits(x) == _bits(x[:1])).all()) for x in rows)
        if alike:
            inputs = self._change(inputs, _spread)
        base = None if alike else first
        if first.drawn:
            base = again(inputs, True)
            self._still = self._exact = not base.drawn and _shapes(base, batch) == _shapes(first, batch)
            base = base if self._exact else None if alike else first
        base = base or again(inputs, self._still)
        self._inputs, self._base, self._seen = inputs, base, base.of(batch)
        self._others = base.others
        self._dropped: set[str] = set()  # owners that stand for layouts which it is not
        self._arithmetic = max((one.arithmetic for one in self._seen.values()), default=0.0)
        self._open = set(self._seen)  # not yet seen with other samples in the same shape

    def run(self) -> None:
        batch = self._batch
        if self._exact:
            order = _cycle(batch)
            self._compare(self._again(self._permuted(order), self._still), order, replaced=False)
        # Which rows are picked may depend on few of the other samples.
        picked = any(one.picked for one in self._seen.values())
        for number, rows in enumerate(_halves(batch, all_bits=not self._exact)):
            open_ = picked or any(key[0] not in self._dropped for key in self._open)
            if self.problems or (number and self._exact and not open_):
                break
            source = _others(rows)
            record = self._again(self._permuted(source), self._still)
            self._compare(record, source, replaced=True)
        for key, row in self._stood.items():
            if key in self._moved and key[0] not in self._dropped:
                self._add_wrong(key, row)
        self._prune()
        for owner, call, part in () if self.problems else self._open:
            if owner in self._dropped:
                continue
            self.problems[owner] = (
                f"the shape {self._seen[owner, call, part].shape} of its {part} depends on which samples are in the batch, so that it "
                "could not be found out whether they influence each other"
            )
        self._resolve()

    def _groups(self) -> dict[str, list[str]]:
        """The owners that stand for layouts of one tensor, by the first of them."""
        seen = {owner for owner, _, _ in self._seen}
        several: dict[str, list[str]] = {}
        for other, (owner, _) in self._others.items():
            if other in seen:
                several.setdefault(owner, [owner] if owner in seen else []).append(other)
        return several

    def _prune(self) -> None:
        """Drops layouts that have problems where another has none so far."""
        for ways in self._groups().values():
            left = [one for one in ways if one not in self._dropped]
            wrong = [one for one in left if one in self.problems]
            if len(wrong) < len(left):
                self._dropped.update(wrong)
                for one in wrong:
                    del self.problems[one]

    def _resolve(self) -> None:
        """Takes, for each owner of several layouts, the first that has no problem."""
        self._prune()
        for owner, ways in self._groups().items():
            left = [one for one in ways if one not in self._dropped]
            if left[0] not in self.problems:
                self.layouts[owner] = FIRST if left[0] == owner else self._others[left[0]][1]
                self._dropped.update(left[1:])
        self._own_names()

    def settle(self, every: bool) -> None:
        """Checks that what has not moved has one row fewer with one sample fewer; checks `every` layer if other inputs have as many rows
        and keep them, so that these inputs do not decide on the order."""
        waiting = [key for key, seen in self._seen.items() if every or key not in self._moved]
        waiting = [key for key in waiting if key[0] not in self._dropped]
        waiting = [key for key in waiting if len(self._seen[key].norm)]
        if not waiting:
            return
        doubt = "they stay as they are when samples are replaced or left out"
        try:
            fewer = self._change(self._inputs, lambda x: x.detach()[:-1])
            seen = self._again(fewer, self._still).seen
        except Unavailable as error:
            self.problems = self._by_chance(
                waiting, f"with one sample fewer the model fails ({error.__cause__})"
            )
            self._own_names()
            return
        waiting = [key for key in waiting if not self._one_fewer(key, seen)]
        self.problems, self.standing = self._by_chance(waiting, doubt), bool(waiting)
        self._own_names()

    def _one_fewer(self, key: _Key, seen: dict[_Key, _Seen]) -> bool:
        """Whether a tensor of the batch without its last sample has one row fewer, if its call took place; rows that were flattened
        with positions have as many positions as before, since any number of rows can be cut into samples if it has the right divisors."""
        owner, call, part = key
        found, other = seen.get(key), self._others.get(owner)
        if other is None:
            return found is None or found.shape[0] == self._batch - 1
        if (other[0], call, part) not in seen:
            return True
        return found is not None and found.shape == (self._batch - 1, *self._seen[key].shape[1:])

    def _own_names(self) -> None:
        self.problems = {self._others.get(owner, (owner,))[0]: text for owner, text in self.problems.items()}

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
        taken = {id(tensors[i]): dim for i, dim in self._dims.items()}

        def changed(x: Tensor) -> Tensor:
            dim = taken.get(id(x))
            if dim is None:
                return x
            return as_input(x, change(x.movedim(dim, 0)).movedim(0, dim))

        return inputs.map(changed)

    def _compare(self, record: Record, source: Tensor, replaced: bool) -> None:
        """Compares with a pass whose row b has the sample `source[b]`: all of the samples or, if some were `replaced`, only some."""
        other = {key: record.seen.get(key) for key in self._seen}
        same_shapes = all(
            one is not None and (one.shape, one.picked) == (self._seen[key].shape, self._seen[key].picked)
            for key, one in other.items()
        )
        for key, seen in self._seen.items():
            owner, _, part = key
            if owner in self._dropped:
                continue
            after = other[key]
            if after is None and seen.picked:  # no rows at all
                after = replace(
                    seen, projection=torch.zeros_like(seen.projection), norm=torch.zeros_like(seen.norm)
                )
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
        self._prune()
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
            self.problems[MODEL] = (
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
