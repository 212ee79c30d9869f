"""The forward pass of GradientSketcher: calls of layers, of operations and of modules that use wanted parameters, and the checks of the
first batch."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashcoreset._core.errors import SlowPathWarning, warn_caller
from flashcoreset.gradients.arrivals import Arrivals, gets_gradient
from flashcoreset.gradients.inputs import Inputs
from flashcoreset.gradients.layers import ELEMENTWISE, EMBEDDING, Layer, batch_statistics
from flashcoreset.gradients.layouts import FIRST, Layout, layouts
from flashcoreset.gradients.picked import Origins, Picked
from flashcoreset.gradients.precision import kept
from flashcoreset.gradients.quiet import own_calls, quiet, rehearses
from flashcoreset.gradients.rehearsal import State, rehearsal, restore
from flashcoreset.gradients.replay import Inseparable, Replay, Way, replaced, tensor_leaves
from flashcoreset.gradients.row_checks import MODEL, Record, Unavailable, check_rows
from flashcoreset.gradients.rules import rule_of
from flashcoreset.gradients.uses import (
    Call,
    Capture,
    CaptureAll,
    Frame,
    Place,
    Single,
    Target,
    Use,
    in_backward,
    recomputes,
)
from flashcoreset.gradients.wanted import advice, callable_modules
from flashcoreset.gradients.watch import Watch

_TRIES = 8  # runs of a first batch, in each of which modules whose calls must be run again are found
ACTIVE: list[Hooks] = []  # whose `with` blocks are entered


class Hooks(Arrivals):
    """What hooks note in a forward pass."""

    _verify: str
    _batch_dim: int
    _places: list[Place]
    _ruled: dict[nn.Module, dict[str, Target]]
    _parameters: Any

    def __init__(self) -> None:
        super().__init__()
        self._watch = Watch(self)
        self._rows_known: dict[
            Any, set[tuple[Place, bool]]
        ] = {}  # for each form of calls: layers whose rows were checked
        self._call: Call | None = None
        self._record: Record | None = None  # the record in which calls of layers are noted
        self._rehearsing = self._still = False
        self._frames: list[Frame] = []
        self._origins = Origins()
        self._picking: dict[
            tuple[Place, str], Place
        ] = {}  # uses of rows that were picked, by the uses of any rows and where they were picked
        self._small: dict[Place, str] = {}  # uses whose rows are no samples, and why
        self._inseparable: set[nn.Module] = set()  # modules whose calls cannot be run again for each sample
        self._hosts: dict[nn.Module, Place] = {}  # modules whose calls are run again
        self._settled: set[nn.Module] = set()  # modules whose calls need not be run again
        self._ways: dict[Any, Way] = {}
        self._host_layouts: dict[Place, list[list[Layout]]] = {}
        self._contents: dict[nn.Module, set[int]] = {}
        self._nodes: dict[int, Any] = {}  # of the wanted parameters, by their ids
        self._warned: set[str] = set()
        self._next_tries = 0

    def _begin(self) -> None:
        super()._begin()
        self._single: dict[int, Single] = {}  # outputs of size 1 for all samples, by their ids
        self._inside: Place | None = None

    def _seen_gradient(self) -> None:
        # A checkpoint that was computed again for this gradient may have stopped inside a layer.
        self._inside = None
        if self._call is None:
            self._frames.clear()

    def _add_hooks(self) -> None:
        add = self._handles.append
        self._note = _uncompiled(self._note_call)
        before, after = _uncompiled(self._before_call), _uncompiled(self._after_call)
        end = _uncompiled(self._end_call)
        for name, module in callable_modules(self._model, self._targets):
            add(module.register_forward_pre_hook(partial(before, name), with_kwargs=True, prepend=True))
            add(module.register_forward_hook(after))
            add(module.register_forward_hook(end, always_call=True))
        for place in self._places:
            add(place.module.register_forward_pre_hook(partial(self._before_layer, place)))
            add(place.module.register_forward_hook(self._layer_hook(place), with_kwargs=True, prepend=True))
            add(place.module.register_forward_hook(self._after_layer, always_call=True))
        for target in self._targets.values():
            add(target.parameter.register_hook(self._parameter_hook(target)))

    def _asleep(self) -> bool:
        """Whether calls are not to be noted: those of other sketchers, of transforms, after the block."""
        # Functions that torch.compile compiled inside `with` go on calling hooks that have been removed.
        return not self._handles or (quiet() and not rehearses(self)) or _in_transform()

    def _new_forward(self) -> None:
        if self._pass.consumed and not in_backward():  # otherwise a checkpoint is being computed again
            self._begin()

    def _batch(self) -> int | None:
        """The batch, as far as it is known."""
        if self._call is not None and self._call.batch is not None:
            return self._call.batch
        return self._pass.batch

    # ---- calls of the model and of the modules in it

    def _before_call(
        self, name: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        if self._asleep():
            return
        frame = Frame(module, name)
        self._frames.append(frame)
        if self._rehearsing:
            return
        inputs = Inputs(args, keywords)
        if self._call is not None:
            self._call.depth += self._call.module is module
        else:
            self._begin_call(name, module, inputs)
        if torch.is_grad_enabled() and (module in self._hosts or module not in self._settled):
            self._prepare(frame, inputs)

    def _begin_call(self, name: str, module: nn.Module, inputs: Inputs) -> None:
        self._new_forward()
        del self._frames[:-1]
        main = inputs.main()
        form = (name, module.training, inputs.form())
        batch = None if main is None or main.dim() <= self._batch_dim else main.shape[self._batch_dim]
        again = recomputes()
        if again and self._pass.batch is not None:
            batch = self._pass.batch  # that of the call around the checkpoint
        call = self._call = Call(module, form, inputs, batch, tries=self._next_tries)
        # For a checkpoint, the first run with gradients counts.
        done = form in (
            self._pass.rows_checked if self._verify == "always" and in_backward() else self._rows_known
        )
        if (
            not again
            and self._checks(call)
            and (not done or (self._verify == "always" and not in_backward()))
        ):
            current = self._pass
            call.again, call.inputs = inputs.map(lambda x: x), inputs.map(kept)
            call.versions = [x._version for x in inputs.tensors()]
            call.state = State(self._model, self._device)
            call.counts = (
                current.batch, current.calls.copy(), _copied(current.looked_up), _copied(current.spans)
            )  # fmt: skip
            call.record = self._record = Record()

    def _prepare(self, frame: Frame, inputs: Inputs) -> None:
        """Keeps what is needed to run the call again."""
        frame.tensors = inputs.tensors()
        table = {id(x): torch.empty(x.shape, dtype=x.dtype, device="meta") for x in frame.tensors}
        frame.places = [table[id(x)] for x in frame.tensors]
        try:
            frame.skeleton = inputs.map(lambda x: table.get(id(x), x))
            frame.state = State(frame.module, self._device)
        except ValueError:  # what cannot be copied
            frame.skeleton = None

    def _checks(self, call: Call) -> bool:
        """Whether there are rows to be told apart."""
        return (
            self._verify != "never" and torch.is_grad_enabled() and call.batch is not None and call.batch > 1
        )

    def _after_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._asleep() or not self._frames or self._frames[-1].module is not module:
            return None
        frame = self._frames[-1]
        changed = self._close(frame, output) if torch.is_grad_enabled() else None
        call = self._call
        if self._rehearsing or call is None or call.module is not module or call.depth > 1:
            return changed
        again = self._close_call(call, output if changed is None else changed)
        return changed if again is None else again[0]

    def _end_call(self, module: nn.Module, *_: Any) -> None:
        if self._asleep():
            return
        if self._frames and self._frames[-1].module is module:  # also when it raised
            self._frames.pop()
        call = self._call
        if call is not None and call.module is module and not self._rehearsing:
            call.depth -= 1
            if call.depth == 0:
                self._call = self._record = None
                self._origins.clear()

    def _close_call(self, call: Call, output: Any) -> tuple[Any] | None:
        """Checks the rows of a call of the model; the outputs of another run if modules have to be run again for their samples."""
        self._record = None
        if not call.layers or self._verify == "never" or not torch.is_grad_enabled() or recomputes():
            return None
        if call.batch is None:
            raise ValueError(
                f"{type(call.module).__name__} is called without tensors, so that its batch is not known; give it tensors with the batch in "
                f"dimension {self._batch_dim}, or set verify='never' if row b of each layer belongs to sample b"
            )
        known = self._rows_known.get(call.form, set())
        if self._checks(call) and (call.record is not None or not call.layers <= known):
            problems = self._check_rows(call, output)
            if problems:
                return (self._run_again(call, problems),)
            self._rows_known[call.form] = known | call.layers
            self._pass.rows_checked.add(call.form)
        names = {target.name for place, _ in call.layers for target in place.targets.values()}
        if self._verify == "first":
            names -= self._sums_known.get(call.form, set())
        if names:
            self._pass.to_sum.setdefault(call.form, set()).update(names)
        return None

    def _check_rows(self, call: Call, output: Any) -> dict[str, str]:
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

        problems, found = check_rows(call.inputs, call.batch, first, again, self._batch_dim)
        self._layouts.update(found)
        return problems

    def _rehearse(self, call: Call, record: Record, inputs: Inputs, still: bool = False) -> Record:
        """Repeats the call with `inputs` and leaves no trace of it."""
        assert call.state is not None
        single, self._single = self._single, {}
        frames, self._frames = self._frames, []
        batch, main = call.batch, inputs.main()
        call.batch = None if main is None else main.shape[self._batch_dim]
        self._rehearsing, self._record, self._still = True, record, still
        try:
            with own_calls(self), rehearsal(call.state, still):
                record.add_outputs(call.module(*inputs.args, **inputs.keywords))
                record.drawn = call.state.random.drawn()
        except Exception as error:
            raise Unavailable from error
        finally:
            self._single, self._rehearsing, self._record, self._still = single, False, None, False
            self._frames, self._inside, call.batch = frames, None, batch
        return record

    def _run_again(self, call: Call, problems: dict[str, str]) -> Any:
        """Another run of a first batch, after uses whose rows are no samples were found: a module around them is run again for each
        sample instead."""
        uses: dict[str, list[Place]] = {}
        for place, _ in call.layers:
            for owner in self._owners_of(place):
                uses.setdefault(owner, []).append(place)
        wrong = [place for owner in problems for place in uses.get(owner, [])]
        fixable = (
            MODEL not in problems
            and all(owner in uses for owner in problems)
            and call.again is not None
            and call.tries < _TRIES
            and not in_backward()
            and call.versions == [x._version for x in call.again.tensors()]
            and all(self._host_of(place) is not call.module for place in wrong)
            and self._per != "token"
        )
        if not fixable:
            self._refuse(problems, uses)
        for owner, text in problems.items():
            self._small.update(dict.fromkeys(uses[owner], f"{owner}: {text}"))
        self._inseparable.update(host for host in map(self._host_of, wrong) if host is not None)
        assert call.again is not None
        assert call.state is not None
        restore(call.state)
        current = self._pass
        current.batch, calls, looked_up, spans = call.counts
        current.calls, current.looked_up, current.spans = calls.copy(), _copied(looked_up), _copied(spans)
        self._single.clear()
        self._settled.clear()
        frames, self._frames = self._frames, []
        self._call = None
        tries, again = call.tries + 1, call.again
        try:
            self._next_tries = tries
            out = call.module(*again.args, **again.keywords)
        finally:
            self._next_tries = 0
            self._frames, self._call = frames, call
        return out

    def _owners_of(self, place: Place) -> list[str]:
        """The names under which a place's tensors are compared."""
        return [place.owner, *(_output(place, i) for i in range(1, len(self._host_layouts.get(place, []))))]

    def _host_of(self, place: Place) -> nn.Module | None:
        """The module that a place is, if it is one."""
        return place.module if isinstance(place.module, nn.Module) else None

    def _forget(self) -> None:
        """Forgets what batches have shown, after one that is refused: the next is checked as the first."""
        for found in (self._small, self._inseparable, self._settled, self._ways, self._rows_known):
            found.clear()

    def _refuse(self, problems: dict[str, str], uses: dict[str, list[Place]]) -> None:
        self._forget()
        texts = "; ".join(f"{owner}: {problem}" for owner, problem in problems.items())
        if MODEL in problems:
            raise ValueError(
                f"{texts}; give the model inputs with the batch in dimension {self._batch_dim}, or set verify='never' if samples have "
                "gradients of their own all the same"
            )
        places = [place for owner in problems for place in uses.get(owner, [])]
        out = [target for place in places for target in place.targets.values()]
        raise ValueError(
            f"{texts}; {advice(out, self._targets, self._parameters)}, or set verify='never' if row b stands for sample b all the same"
        )

    # ---- calls that are run again for each sample

    def _need(self, targets: Iterable[Target], why: str, refuse: bool = True) -> bool:
        """Has the innermost call that holds the parameters run again for each sample; False, or an error, if there is none."""
        for frame in reversed(self._frames):
            if frame.module in self._inseparable or not self._holds(frame.module, targets):
                continue
            if not self._rehearsing:
                for target in targets:
                    frame.needs[target.name] = target
                    frame.why.setdefault(target.name, why)
            return True
        if not refuse or not self._frames or in_backward() or self._rehearsing:
            return False
        self._refuse_all({target.name: why for target in targets})
        return False

    def _holds(self, module: nn.Module, targets: Iterable[Target]) -> bool:
        if module not in self._contents:
            self._contents[module] = {id(p) for p in module.parameters()}
        return all(id(target.parameter) in self._contents[module] for target in targets)

    def _refuse_all(self, why: dict[str, str]) -> None:
        self._forget()
        out = [target for target in self._targets.values() if target.name in why]
        texts = "; ".join(dict.fromkeys(why[target.name] for target in out))
        raise ValueError(f"{texts}; {advice(out, self._targets, self._parameters)}")

    def _close(self, frame: Frame, output: Any) -> Any:
        """Takes the gradients of the outputs of a call that is to be run again for each sample; returns the outputs to go on with."""
        ruled = self._ruled.get(frame.module)
        if ruled is not None:
            for target in ruled.values():
                frame.needs[target.name] = target
        if self._rehearsing:
            place = self._hosts.get(frame.module)
            if place is not None and self._record is not None:
                self._note_outputs(place, [x for x in tensor_leaves(output) if _has_gradient(x)])
            return None
        if not frame.needs:
            if torch.is_grad_enabled() and not in_backward():
                self._settled.add(frame.module)
            return None
        outputs = list({id(x): x for x in tensor_leaves(output) if _has_gradient(x)}.values())
        if not outputs:
            return None
        replay = self._replay(frame, output, outputs)
        if replay is None:
            self._climb(frame)
            return None
        return self._capture_all(frame, replay, output, outputs)

    def _replay(self, frame: Frame, output: Any, outputs: list[Tensor]) -> Replay | None:
        """The call, made ready to be run again, or None if its samples cannot be told apart."""
        batch = self._batch()
        if frame.skeleton is None or frame.state is None or batch is None or self._per == "token":
            return None
        names: dict[str, str] = {}
        for name, parameter in frame.module.named_parameters(remove_duplicate=False):
            target = self._targets.get(id(parameter))
            if target is not None and target.name in frame.needs and target.name not in names.values():
                names[name] = target.name
        if len(names) < len(frame.needs):
            return None
        leaves = tensor_leaves(output)
        kind = self._device.type
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        replay = Replay(
            frame.module, names, frame.skeleton, frame.places, frame.state,
            [next(i for i, x in enumerate(leaves) if x is out) for out in outputs],
            autocast, self._device, batch, Way("batch"), rule_of(frame.module),
        )  # fmt: skip
        if frame.module in self._ruled:
            first = layouts(outputs[0].shape, batch, self._batch_dim)
            replay.way = Way("rule", outputs=[first[:1] or [FIRST] for _ in outputs])
            return replay
        shapes = tuple((x.dim(), x.dtype) for x in (*frame.tensors, *outputs))
        key = (frame.module, frame.module.training, shapes, batch == 1)
        way = self._ways.get(key)
        if way is None or not _still_fits(way, frame.tensors, outputs, batch):
            drawn = frame.state.random.drawn()
            if drawn and batch > 1 and not frame.tensors:
                return None
            with torch.no_grad():
                try:
                    way = replay.find_way(
                        [x.detach() for x in frame.tensors], outputs, self._batch_dim, drawn
                    )
                except Inseparable:
                    return None
            self._ways[key] = way
        replay.way = way
        return replay

    def _climb(self, frame: Frame) -> None:
        """Leaves what a call cannot give to the calls around it."""
        if frame.skeleton is None:
            self._settled.discard(frame.module)
        elif not in_backward():
            self._inseparable.add(frame.module)
        frames, self._frames = self._frames, self._frames[: self._frames.index(frame)]
        try:
            for target in frame.needs.values():
                if (
                    not any(self._holds(outer.module, [target]) for outer in self._frames)
                    and not in_backward()
                ):
                    self._refuse_all(frame.why)
                self._need([target], frame.why[target.name])
        finally:
            self._frames = frames

    def _capture_all(self, frame: Frame, replay: Replay, output: Any, outputs: list[Tensor]) -> Any:
        module = frame.module
        place = self._hosts.get(module)
        targets = {name: frame.needs[full] for name, full in replay.names.items()}
        if place is None or set(place.targets) != set(targets):
            what = f"{type(module).__name__} {frame.name!r}"
            place = self._hosts[module] = Place(frame.name, module, _REPLAYED, targets, what)
        if replay.way.name != "rule":
            self._warn_slow(frame)
        self._host_layouts[place] = replay.way.outputs
        for use in frame.uses:
            use.skip.update(frame.needs)
        self._untied.update(frame.needs)
        use = Use(self._pass, place, self._nodes_of(place), [])
        use.key = place.owner
        self._add_use(use, frame)
        self._note_outputs(place, outputs)
        if self._call is not None:
            self._call.layers.add((place, False))
        if not in_backward():
            for target in targets.values():
                self._pass.calls[target.name] += 1
        saved = [x.detach() for x in frame.tensors]
        arrive = partial(self._arrive_all, use, replay)
        made = CaptureAll.apply(arrive, len(outputs), *outputs, *saved)
        return replaced(output, {id(old): new for old, new in zip(outputs, made, strict=True)})

    def _note_outputs(self, place: Place, outputs: list[Tensor]) -> None:
        record, batch = self._record, self._batch()
        if record is None or batch is None:
            return
        number = record.add_call(place.owner)
        for i, x in enumerate(outputs):
            known = self._host_layouts[place]
            found = [one for one in known[min(i, len(known) - 1)] if one.fits(x.shape, batch)]
            record.add_layouts(_output(place, i), number, "output", x, batch, found)

    def _warn_slow(self, frame: Frame) -> None:
        what = f"{type(frame.module).__name__} {frame.name!r}"
        if what in self._warned:
            return
        self._warned.add(what)
        why = next(iter(frame.why.values()))
        names = ", ".join(repr(name) for name in list(frame.needs)[:3])
        more = f" and {len(frame.needs) - 3} more" if len(frame.needs) > 3 else ""
        warn_caller(
            f"the gradients of {names}{more} come from running {what} again on each sample ({why}); fc.register_gradient_rule gives a "
            "faster rule",
            SlowPathWarning,
        )

    def _add_use(self, use: Use, frame: Frame | None = None) -> None:
        for outer in self._frames:
            if outer is frame:
                break
            outer.uses.append(use)

    # ---- calls of layers

    def _before_layer(self, place: Place, *_: Any) -> None:
        self._inside = place

    def _after_layer(self, *_: Any) -> None:
        self._inside = None  # also when the layer raised

    def _layer_hook(self, place: Place) -> Callable[..., Tensor | None]:
        def hook(
            _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            self._inside = None
            if self._asleep():
                return None
            x, *others = (*args, *keywords.values())
            picked, use = self._picked(place, x, output)
            if batch_statistics(place.module) and torch.is_grad_enabled():
                raise ValueError(
                    f"{place} normalises over the batch, so that samples have no gradients of their own; put it in eval mode: .eval()"
                )
            if use in self._small:
                self._give_up(place, output, self._small[use])
                return None
            if any(value is not None and value is not False for value in others):
                text = f"{place} is called with more than one input, but its per-sample gradients are known for one input only"
                self._give_up(place, output, text)
                return None
            if picked is not None:
                return self._take(use, x, output, self._layouts_of(picked), picked=picked)
            features = place.layer.features
            batch = self._batch()
            found: list[Layout] | None = None
            if batch is not None and features is not None and output.dim() >= features(place.module):
                lead = output.shape[: output.dim() - features(place.module)]
                found = layouts(lead, batch, self._batch_dim)
                if self._verify == "never":  # nothing would tell them apart
                    only = Layout(min(self._batch_dim, len(lead) - 1))
                    found = [one for one in found if one == only]
            elif batch is not None:
                found = [FIRST] if output.dim() and output.shape[0] == batch else []
            return self._take(place, x, output, found)

        return hook

    def _give_up(self, place: Place, output: Tensor, text: str) -> None:
        """Leaves a call of a layer to the calls around it."""
        if torch.is_grad_enabled() and output.requires_grad:
            self._need(place.targets.values(), text)

    def _picked(
        self, place: Place, x: Any, output: Any, ends: Tensor | None = None
    ) -> tuple[Picked | None, Place]:
        """The rows of `x` if they were picked out of a tensor, and the place for rows of this kind, which are checked apart from
        others."""
        origin, features = self._origins.of(x), place.layer.features
        if origin is None or features is None or self._batch() is None:
            return None, place
        if output.dim() <= features(place.module) or len(output) != len(x):
            return None, place
        key = place, origin.base.home
        if key not in self._picking:
            self._picking[key] = replace(place, picked_in=origin.base.home)
        return Picked(origin, ends), self._picking[key]

    def _layouts_of(self, picked: Picked) -> list[Layout]:
        """How the tensor that rows were picked out of may hold the samples."""
        batch = self._batch()
        assert batch is not None
        found = layouts((picked.origin.base.count,), batch, self._batch_dim)
        return [one for one in found if not one.flat] if self._verify == "never" else found

    def _take(
        self,
        place: Place,
        x: Any,
        output: Tensor,
        found: list[Layout] | None,
        rows: dict[str, range] | None = None,
        picked: Picked | None = None,
    ) -> Tensor | None:
        """`output`, whose gradient will be taken; None if it will not be. `found`: how it may hold the samples; None if the batch is
        not known. `rows`: the slices of parameters, if they are slices."""
        single = picked is None and self._is_single(output) and place.layer is not ELEMENTWISE
        if found is not None and not single:
            found = self._trusted(place, found)
        number = self._note(place, x, output, found or [FIRST], single, picked)
        out: Tensor
        if self._rehearsing:
            if not output.requires_grad:
                return None
            out = Capture.apply(output, None)  # in the graph as it is outside of rehearsals
            self._origins.move(output, out)
            if single:
                self._single[id(out)] = Single(weakref.ref(out), place, number)
            return out
        self._new_forward()
        if self._call is not None:
            self._call.layers.add((place, single))
        if not in_backward():
            # Also under reentrant checkpoints, whose forward pass has no gradients.
            for name, target in place.targets.items():
                self._pass.calls[target.name] += 1
                if rows and target.parameter.dim() > (2 if name == "weight" else 1):
                    self._pass.spans.setdefault(target.name, []).append(rows[name])
                if place.layer is EMBEDDING and isinstance(x, Tensor):
                    use = Use(self._pass, place, {}, found or [FIRST], key=place.owner)
                    self._pass.looked_up.setdefault(target.name, []).append((x.detach(), use))
        if not torch.is_grad_enabled() or not output.requires_grad:
            return None
        problem, batch = self._problem(place, x, output, found, single, picked), self._batch()
        if problem is not None:
            if batch != 1 and not in_backward():
                self._small[place] = problem  # rows that are no samples may be as many in another batch
            self._give_up(place, output, problem)
            return None
        if batch is None:
            batch = output.shape[min(self._batch_dim, output.dim() - 1)]
        if not single and self._pass.batch is None and batch != 1:
            self._pass.batch = batch
        saved = (x.detach(),) if isinstance(x, Tensor) and place.keeps_input(place.targets) else ()
        use = Use(self._pass, place, self._nodes_of(place), found or [FIRST], [] if single else None)
        use.key, use.batch = place.owner, None if single else batch
        use.rows, use.picked = rows or {}, picked
        # Rows are checked at the end of a call; a function that a checkpoint runs again may be in none.
        use.checked = self._call is not None or not in_backward() or self._verify == "never" or batch == 1
        self._add_use(use)
        out = Capture.apply(output, partial(self._arrive, use), *saved)
        self._origins.move(output, out)
        if single:
            self._single[id(out)] = Single(weakref.ref(out), place, number, use)
        for other in ACTIVE:
            if other is not self:
                other._rename(output, out)
        return out

    def _trusted(self, place: Place, found: list[Layout]) -> list[Layout]:
        """Of the layouts `found` by sizes, those that this batch will be checked for, or an earlier one was."""
        call = self._call
        if self._verify == "never" or self._record is not None or call is None or call.batch == 1:
            return found
        if (place, False) not in self._rows_known.get(call.form, set()):
            return found
        known = self._layouts.get(place.owner, FIRST)
        if known.flat and FIRST in found:
            return [FIRST]  # samples of one position
        return [known] if known in found else []

    def _is_single(self, output: Tensor) -> bool:
        """Whether the output is one for all samples."""
        batch = self._batch()
        return bool(self._batch_dim == 0 and output.dim() and output.shape[0] == 1) and (
            batch is None or batch != 1
        )

    def _rename(self, old: Tensor, new: Tensor) -> None:
        """Follows an output that another sketcher has replaced by its own."""
        self._origins.move(old, new)
        single = self._single.get(id(old))
        if single is not None and single.output() is old:
            self._single[id(new)] = replace(single, output=weakref.ref(new))

    def _problem(
        self,
        place: Place,
        x: Any,
        output: Tensor,
        found: list[Layout] | None,
        single: bool,
        picked: Picked | None,
    ) -> str | None:
        """What is wrong with a layer's input and output, or None."""
        least = place.layer.least_dims(place.module)
        if isinstance(x, Tensor) and x.dim() < least:
            return (
                f"{place} must have an input with the batch in dimension {self._batch_dim} and {least} dimensions or more, got shape "
                f"{tuple(x.shape)}"
            )
        if (
            isinstance(x, Tensor)
            and (output.dim() == 0 or x.shape[0] != output.shape[0])
            and place.layer is not ELEMENTWISE
        ):
            return (
                f"{place} must have an output with a batch in dimension 0, got shape {tuple(output.shape)} of an input of shape "
                f"{tuple(x.shape)}"
            )
        if single or found is None or found:
            return None
        batch = self._batch()
        if picked is not None:
            return f"{place} is called with rows of a tensor of {picked.origin.base.count} rows, which cannot hold the batch of {batch}"
        source = (
            "as calls before it" if self._call is None or self._call.batch is None else "as the model's input"
        )
        return (
            f"{place} must have an output with the batch of {batch} in dimension {self._batch_dim}, {source}, got shape "
            f"{tuple(output.shape)}: its rows are not samples (but flattened tokens, windows or time steps, say)"
        )

    def _note_call(
        self,
        place: Place,
        x: Any,
        output: Tensor,
        found: list[Layout],
        single: bool,
        picked: Picked | None,
    ) -> int:
        """Notes a call for the comparison of rows and returns its number."""
        record, batch = self._record, self._batch()
        if record is None:
            return 0
        if picked is not None and batch is not None:
            record.add_picked(place.owner, f"input for {place.use}", x, picked, batch, found)
            if place.layer.names is None:
                record.add_picked(place.owner, f"output for {place.use}", output, picked, batch, found)
            return 0
        number = record.add_call(place.owner)
        if not single and batch is not None:
            seen = x if isinstance(x, Tensor) else output
            # A layout of the output is one of the input, whose leading dimensions are the same.
            record.add_layouts(place.owner, number, "input", seen, batch, found)
            if place.layer.names is None:  # a class that anyone may have written
                record.add_layouts(place.owner, number, "output", output, batch, found)
        elif self._rehearsing and isinstance(x, Tensor):
            record.add(place.owner, number, "input", x)
            if place.layer.names is None:
                record.add(place.owner, number, "output", output)
        return number

    # ---- outputs of size 1 for all samples

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

    def _follow_one(self, single: Single, value: Tensor, made: Tensor, function: str) -> None:
        factor = _broadcast(value, made)
        if factor is not None and self._record is not None:
            self._record.add(single.place.owner, single.number, "broadcast output", made)
        use = single.use
        if use is None:
            return
        batch = self._call.batch if self._call is not None and self._call.batch != 1 else use.into.batch
        node, shape = value.grad_fn, value.shape
        if factor is None or made.shape[0] != (batch or use.into.batch):
            text = (
                f"parameter {next(iter(single.place.targets.values())).name!r}: an output of {single.place} has size 1 in dimension 0 and "
                f"goes into {function}, whose gradient is summed over the samples"
            )
            if not self._need(single.place.targets.values(), text):
                self._lose(single, made, function)
            return

        def part(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[0]
            if g is not None and gets_gradient(node):
                g = g.detach() if factor == 1 else g.detach() * factor
                lead = (len(g), *[1] * (g.dim() - 1 - len(shape)), *shape[g.dim() == len(shape) :])
                assert use.parts is not None
                use.parts.append(g.sum_to_size(lead).reshape(len(g), *shape[1:]))

        assert made.grad_fn is not None
        made.grad_fn.register_prehook(part)

    def _lose(self, single: Single, made: Tensor, function: str) -> None:
        def lost(_: Tensor) -> None:
            for target in single.place.targets.values():
                self._lost.setdefault(target.name, (str(single.place), function))

        made.register_hook(lost)

    def _nodes_of(self, place: Place) -> dict[str, Any]:
        """The nodes of the parameters that the module has now: torch.func.functional_call replaces parameters for a call."""
        found = {}
        for name, target in place.targets.items():
            parameter: Any = target.parameter
            if isinstance(place.module, nn.Module) and name in place.module._parameters:
                parameter = getattr(place.module, name)
            found[name] = self._nodes.get(id(parameter)) or node_of(parameter)
        return found


def _no_rule(*_: Any) -> Any:
    raise NotImplementedError("the gradients of a call that is run again come from Replay")


_REPLAYED = Layer(_no_rule, lambda module: 0)


def _copied(lists: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: list(some) for name, some in lists.items()}


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


def node_of(parameter: Tensor) -> Any:
    """The node of autograd that takes in the gradient of `parameter`."""
    return torch.autograd.graph.get_gradient_edge(parameter).node if parameter.requires_grad else None


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, left alone by torch.compile if that is in use."""
    dynamo = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)


def _in_transform() -> bool:
    """Whether a transform of torch.func is the caller, which takes care of its gradients itself."""
    return torch._C._are_functorch_transforms_active()


def _output(place: Place, i: int) -> str:
    return f"{place.owner}, output {i}" if i else place.owner


def _has_gradient(x: Tensor) -> bool:
    return x.requires_grad and x.is_floating_point() and not x.is_leaf


def _still_fits(way: Way, tensors: list[Tensor], outputs: list[Tensor], batch: int) -> bool:
    if len(way.outputs) != len(outputs) or (way.inputs and len(way.inputs) != len(tensors)):
        return False
    fits = [
        layout is None or layout.fits(x.shape, batch) for x, layout in zip(tensors, way.inputs, strict=False)
    ]
    fits += [
        all(one.fits(x.shape, batch) for one in some) for x, some in zip(outputs, way.outputs, strict=True)
    ]
    return all(fits)
