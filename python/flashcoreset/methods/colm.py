"""CoLM: coresets of mini-batches for training language models on mixtures of sources."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.budgets import RULES, allocate_budgets
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.inputs import label_values
from flashcoreset._core.philox import uniforms
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_int64, as_integer, as_number, as_vector, at_least_one, one_of
from flashcoreset.gradients.adam import AdamState, RankOneAdamState, check_betas, check_eps
from flashcoreset.gradients.zeroth_order import seed_of_call
from flashcoreset.matching.problem import METRICS, Gradients, Problem, check_history, check_top
from flashcoreset.matching.solve import match_members

METHODS = ("medoid", "omp", "random")
_PATIENCE = 100  # batches in which a kept label is expected
_UNSIGNED = 2**64 - 1


class CoLM:
    """Chooses, batch by batch, the samples to train on: all samples of small sources, and from the others those whose gradients, as Adam
    would normalise them, stand for the rest.

    A `CoLM` holds Adam's history of the gradients that were matched, which starts at zero with the first batch. Every batch counts as a
    step of Adam, also one in which nothing was matched.

    Args:
        k: the size of a coreset, >= 1 and at least the number of `keep_groups`.
        top: how many dimensions of a gradient count: those where a group's mean update is largest. None takes all, as a number above the
            length of the gradients does. With gradients along one shared direction, all dimensions are alike.
        betas, eps: Adam's, with the optimizer's values.
        keep_groups: labels of the sources of which every sample is kept (`small_sources` finds them), integers or other values that can
            be sorted, such as strings. A batch may have none of them; a warning reports labels that no sample of the first 100 batches
            has.
        rule: how the rest of k is divided among the other sources: "proportional", "balanced" and "published_balanced" are those of
            `allocate_budgets`, "none" matches all other sources together.
        metric: the distance or similarity for medoids: "l1", "euclidean", "sqeuclidean", "cosine" or "dot".
        method: "medoid" takes the samples that are nearest to all others of their source, as published. "omp" makes a weighted sum of few
            gradients that is near the sum of all, by orthogonal matching pursuit with weights >= 0; it may take fewer than k samples,
            and its weights belong into the loss. It needs gradients that differ in direction (`BatchSelector(gradients="backprop")`).
            "random" draws under the same quotas: the control, which needs no gradients (see `draw`).
        normalize: False matches the gradients themselves; then there is no history.
        seed: a 64-bit integer, for the random numbers of "random" and of "published_balanced".
        backend: None, "cpu", "cuda", "triton" or "torch".

    Raises:
        TypeError, ValueError: for arguments of a wrong type or out of range.

    Sources: Nguyen, Yang, Anand, Yang and Mirzasoleiman, "Mini-batch coresets for memory-efficient language model training on
    data mixtures", ICLR 2025; for "omp" Killamsetty, Sivasubramanian, Ramakrishnan, De and Iyer, "GRAD-MATCH", ICML 2021.

    Example:
        >>> import torch, flashcoreset as fc
        >>> method = fc.CoLM(3, top=None, keep_groups=["rare"])
        >>> coefficients = torch.tensor([[1.0], [1.1], [-2.0], [3.0], [0.5]])
        >>> grads = fc.LowRankGradients(coefficients, seed=0, numel=1000)
        >>> coreset = method.select(grads, groups=["web", "web", "web", "web", "rare"])
        >>> coreset.indices.tolist(), coreset.weights.tolist(), coreset.info["counts"]
        ([4, 0, 2], [1.0, 3.0, 1.0], {'rare': 1, 'web': 2})
    """

    def __init__(
        self,
        k: int,
        *,
        top: int | None = 2560,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        keep_groups: Iterable[Any] = (),
        rule: str = "proportional",
        metric: str = "l1",
        method: str = "medoid",
        normalize: bool = True,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        self.k = as_integer(k, "k")
        if (
            isinstance(keep_groups, (str, bytes))
            or not isinstance(keep_groups, Iterable)
            or getattr(keep_groups, "ndim", 1) == 0
        ):
            raise TypeError(f"keep_groups must be several labels, got {keep_groups!r}")
        self.keep_groups = in_order(
            {as_label(label, f"keep_groups[{i}]") for i, label in enumerate(keep_groups)}
        )
        if self.k < max(1, len(self.keep_groups)):
            wanted = f"the {len(self.keep_groups)} keep_groups" if self.keep_groups else "1"
            raise ValueError(f"k must be at least {wanted}, got {self.k}")
        self.top = top
        if top is not None:
            self.top = as_integer(top, "top")
            if self.top < 1:
                raise ValueError(f"top must be >= 1, got {top}")
        self.betas = check_betas(betas)
        self.eps = check_eps(eps)
        one_of(rule, "rule", (*RULES, "none"))
        one_of(metric, "metric", METRICS)
        one_of(method, "method", METHODS)
        if not isinstance(normalize, bool):
            raise TypeError(
                f"normalize must be a bool, got {normalize!r} of type {type(normalize).__name__} (an Adam history of your own goes into "
                "match_gradients)"
            )
        check_backend(backend)
        self.rule, self.metric, self.backend = rule, metric, backend
        self.method, self.normalize, self.seed = method, normalize, as_int64(seed, "seed")
        self.history: AdamState | RankOneAdamState | None = None
        self._unseen = set(self.keep_groups)
        self._batches = 0

    def select(self, grads: Any, groups: Any = None) -> Coreset:
        """The samples of a batch to train on.

        Samples whose gradient has a NaN or an infinity, or is zero, are left out, also in kept sources. If the kept sources
        have more than k samples, the first k of them are taken. If fewer than k samples are usable, all usable samples are taken.

        Args:
            grads: [B, D] gradients, one row per sample, `LowRankGradients`, as `zeroth_order_gradients` returns them, or
                `OuterProductGradients`.
            groups: [B] labels of the samples' sources, integers or other values that can be sorted; None stands for one source.

        Returns:
            Coreset on the device of `grads`: `indices`, the kept samples first and then the others, source by source in label
            order; `weights`, 1 for kept samples, the size of its cluster for a medoid, for "omp" the weight of its gradient;
            and `info`: "kept" (how many),
            "left_out" (the samples without a usable gradient), "budgets" (label -> count, for the matched sources; {None: count}
            with rule "none"), "counts" (label -> how many of it were chosen), "represented" (how many samples the weights stand for: the
            loss of the batch is about sum_i weight_i loss_i / represented), "dims" (the dimensions that counted, [sources, top] or
            None), "step" (the number of steps made), "unseen" (the keep_groups of which no batch so far had a sample) and "seconds".

        Raises:
            TypeError, ValueError: for gradients of another length, dtype or device than before, labels of another length,
                keep_groups without `groups`, gradients of one shared direction with method "omp", and if no gradient is usable.
            BackendUnavailableError: if `backend` cannot run here.
        """
        start = time.perf_counter()
        g = Gradients.of(grads, "grads")
        if self.method == "random":
            return self.draw(g.count, groups, device=g.values.device)
        if self.method == "omp" and g.length is not None and g.values.shape[1] == 1:
            raise ValueError(
                "grads must differ in direction for method 'omp', got coefficients of one shared direction, of which one sample of each "
                "source makes any sum; take BatchSelector(gradients='backprop'), several directions (n_perturbations), or 'medoid'"
            )
        device = g.values.device
        top = None if self.top is None or self.top > g.numel else check_top(self.top, g.numel)
        history = None
        if self.normalize:
            g, history = check_history(self._history_for(g), g, "history")
        sources = self._sources(groups, g.count, device)
        usable = _usable(g)
        if not bool(usable.any()):
            raise ValueError(
                "grads must have at least one row that is finite and not zero, got none; does the loss depend on "
                "the parameters?"
            )
        kept, members, budgets = self._parts(sources, usable)
        indices, weights, dims = [kept], [torch.ones(len(kept), dtype=g.dtype, device=device)], None
        if history is not None:
            history = replace(history, step=history.step + 1)
        if members:
            # The history before the step.
            past = None if history is None else replace(history, step=history.step - 1)
            found = match_members(Problem(g, past, top, members, self.metric, self.method), self.backend)
            indices.append(found.indices)
            weights.append(found.weights)
            dims, history = found.dims, found.state
        if not sum(map(len, indices)):
            raise ValueError(
                "grads must have a sum that is not zero for method 'omp', got gradients that cancel out in every source"
            )
        self._finish(sources, history)
        return self._coreset(
            sources,
            torch.cat(indices),
            torch.cat(weights),
            len(kept) + sum(len(rows) for rows, _ in members),
            {"kept": len(kept), "left_out": (~usable).nonzero()[:, 0], "budgets": budgets, "dims": dims},
            start,
        )

    def draw(self, count: int, groups: Any = None, *, device: Any = None) -> Coreset:
        """Random samples of a batch under the same quotas: what the matching has to beat, without a gradient.

        Args:
            count: the number of samples of the batch, >= 1.
            groups: as for `select`.
            device: of the result; None: the CPU.

        Returns:
            As `select` returns, without "left_out" and "dims"; weights are 1 for kept samples, and for others the number of samples of
            their source that each stands for. A sample's random number depends on the seed, the number of the step and its place alone.

        Raises:
            TypeError, ValueError: as `select` does for groups; for a `count` below 1.

        Example:
            >>> import flashcoreset as fc
            >>> coreset = fc.CoLM(4, keep_groups=["rare"]).draw(6, ["web", "web", "code", "code", "web", "rare"])
            >>> coreset.info["counts"]
            {'code': 1, 'rare': 1, 'web': 2}
        """
        start = time.perf_counter()
        count = at_least_one(count, "count")
        sources = self._sources(groups, count, torch.device("cpu" if device is None else device))
        kept, members, budgets = self._parts(sources, torch.ones_like(sources.places, dtype=torch.bool))
        order = uniforms(self.seed & _UNSIGNED, self._step(), count).argsort(kind="stable")
        place = torch.empty(count, dtype=torch.int64)
        place[torch.from_numpy(order)] = torch.arange(count)
        place = place.to(sources.places.device)
        indices, weights = [kept], [torch.ones(len(kept), device=kept.device)]
        for rows, budget in members:
            drawn = rows[place[rows].argsort()[:budget]]
            indices.append(drawn.sort().values)
            weights.append(torch.full((budget,), len(rows) / budget, device=kept.device))
        history = self.history
        self._finish(sources, None if history is None else replace(history, step=history.step + 1))
        represented = len(kept) + sum(len(rows) for rows, _ in members)
        info = {"kept": len(kept), "budgets": budgets}
        return self._coreset(sources, torch.cat(indices), torch.cat(weights), represented, info, start)

    def take_all(self, count: int, groups: Any = None) -> Coreset:
        """All samples of a batch that is no larger than a coreset, with weights 1; the batch counts as a step.

        Args:
            count: the number of samples, >= 1.
            groups: as for `select`.

        Returns:
            Coreset on the CPU, `info` as that of `draw`.

        Raises:
            TypeError, ValueError: as `draw` does.

        Example:
            >>> import flashcoreset as fc
            >>> fc.CoLM(4).take_all(3, ["a", "b", "a"]).info["counts"]
            {'a': 2, 'b': 1}
        """
        start = time.perf_counter()
        count = at_least_one(count, "count")
        sources = self._sources(groups, count, torch.device("cpu"))
        history = self.history
        self._finish(sources, None if history is None else replace(history, step=history.step + 1))
        info = {"kept": int(sources.are(self.keep_groups).sum()), "budgets": {}}
        return self._coreset(sources, torch.arange(count), torch.ones(count), count, info, start)

    def _sources(self, groups: Any, count: int, device: torch.device) -> _Sources:
        if groups is None:
            if self.keep_groups:
                raise ValueError(f"groups must be given with keep_groups={self.keep_groups}, got None")
            return _Sources(torch.zeros(count, dtype=torch.int64, device=device), [0])
        words = label_values(groups, "groups")
        if words is None:
            labels = as_vector(groups, "groups", device, integers=True, length=count)
            present, places = labels.unique(return_inverse=True)
            self._check_kind(present.tolist(), integers=True)
            return _Sources(places, present.tolist())
        if len(words) != count:
            raise ValueError(f"groups must have shape [{count}], got ({len(words)},)")
        names = in_order({as_label(label, f"groups[{i}]") for i, label in enumerate(words)})
        self._check_kind(names, integers=False)
        place = {name: i for i, name in enumerate(names)}
        return _Sources(torch.tensor([place[label] for label in words], device=device), list(names))

    def _check_kind(self, present: Sequence[Any], *, integers: bool) -> None:
        """Raises TypeError if keep_groups are integers and the labels are not, or the other way round: they would never be equal."""
        kept = [_is_integer(label) for label in self.keep_groups]
        if not kept or integers in kept:
            return
        names = ("no integers", "integers")
        raise TypeError(
            f"keep_groups must be labels as groups has them, got {list(self.keep_groups)} ({names[not integers]}) beside "
            f"{list(present)[:5]} ({names[integers]})"
        )

    def _step(self) -> int:
        """The number of batches before this one."""
        return self._batches if self.history is None else max(self.history.step - 1, self._batches)

    def _finish(self, sources: _Sources, history: AdamState | RankOneAdamState | None) -> None:
        """Counts the batch, takes over the history, and notes which of keep_groups have occurred; warns if some have not for a long
        time."""
        self._batches = self._step() + 1
        self.history = history
        if not self._unseen:
            return
        self._unseen.difference_update(sources.names)
        if self._unseen and self._batches == _PATIENCE:
            self._warn(sources.names)

    def _warn(self, present: list[Any]) -> None:
        warnings.warn(nothing_kept(self._unseen, f"{_PATIENCE} batches", present), stacklevel=4)

    def _parts(
        self, sources: _Sources, usable: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, int]], dict[Any, int]]:
        """The kept rows, the rows and the budget of each source that has a budget, and the budgets by label."""
        is_kept = sources.are(self.keep_groups)
        kept = (usable & is_kept).nonzero()[:, 0][: self.k]
        rows = (usable & ~is_kept).nonzero()[:, 0]
        left = min(self.k - len(kept), len(rows))
        if not left:
            return kept, [], {}
        if self.rule == "none":
            return kept, [(rows, left)], {None: left}
        own = sources.places[rows]
        present, sizes = own.unique(return_counts=True)
        budgets = allocate_budgets(
            sizes, left, self.rule, seed=seed_of_call(self.seed, self._step())
        ).tolist()
        places = dict(zip(present.tolist(), budgets, strict=True))
        members = [(rows[own == place], count) for place, count in places.items() if count]
        return kept, members, {sources.names[place]: count for place, count in places.items()}

    def _coreset(
        self,
        sources: _Sources,
        indices: Tensor,
        weights: Tensor,
        represented: int,
        info: dict[str, Any],
        start: float,
    ) -> Coreset:
        chosen = Counter(sources.places[indices].tolist())
        more = {
            "counts": {name: chosen[place] for place, name in enumerate(sources.names)},
            "represented": represented,
            "step": self._batches,
            "unseen": list(in_order(self._unseen)),
            "seconds": time.perf_counter() - start,
        }
        return Coreset(indices, weights, {**info, **more})

    def _history_for(self, g: Gradients) -> AdamState | RankOneAdamState:
        if self.history is not None:
            return self.history
        if g.length is not None and g.values.shape[1] == 1:
            return RankOneAdamState(g.numel, betas=self.betas, eps=self.eps)
        m = torch.zeros(g.numel, dtype=g.dtype, device=g.values.device)
        return AdamState(m, m.clone(), 1, self.betas, self.eps)

    def state_dict(self) -> dict[str, Any]:
        """The history, the number of batches and which of keep_groups have not occurred, for `load_state_dict` of a CoLM with the same arguments: tensors and numbers, as
        torch.save takes them."""
        unseen = [place for place, label in enumerate(self.keep_groups) if label in self._unseen]
        state: dict[str, Any] = {"history": None, "batches": self._batches, "unseen": unseen}
        if isinstance(self.history, RankOneAdamState):
            state["history"] = {"kind": "rank one", **asdict(self.history)}
        elif self.history is not None:
            state["history"] = {
                "kind": "dense",
                "m": self.history.m,
                "v": self.history.v,
                "step": self.history.step,
                "betas": self.history.betas,
                "eps": self.history.eps,
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned. Older states have the history alone; then its step is the number of batches.

        Raises:
            TypeError, ValueError: unless `state` is such a dict, of a CoLM with the same betas and eps.
        """
        if not isinstance(state, dict) or "history" not in state:
            raise TypeError("state must be what state_dict returned, a dict with the entry history")
        history = state["history"]
        batches = as_int64(state.get("batches", 0), "state: batches")
        if batches < 0:
            raise ValueError(f"state: batches must be >= 0, got {batches}")
        unseen = state.get("unseen", range(len(self.keep_groups)))
        if any(place not in range(len(self.keep_groups)) for place in unseen):
            raise ValueError(
                f"state must be of a CoLM with {len(self.keep_groups)} keep_groups, as this one, got unseen ones at {list(unseen)}"
            )
        if history is None:
            self.history, self._batches = None, batches
            self._unseen = {self.keep_groups[place] for place in unseen}
            return
        if not isinstance(history, dict):
            raise TypeError(f"state: history must be a dict or None, got {type(history).__name__}")
        values = dict(history)
        kinds = {"rank one": RankOneAdamState, "dense": AdamState}
        name = values.pop("kind", None)
        kind = kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ValueError(f"state: the kind of history must be one of {', '.join(kinds)}, got {name!r}")
        wanted = [field.name for field in fields(kind)]
        if values.keys() != set(wanted):
            raise ValueError(
                f"state: the history must have the entries kind, {', '.join(wanted)}, got {', '.join(map(str, history))}"
            )
        loaded = kind(**values)
        if (loaded.betas, loaded.eps) != (self.betas, self.eps):
            raise ValueError(
                f"state must have betas={self.betas} and eps={self.eps} as this CoLM, got {loaded.betas} and {loaded.eps}"
            )
        self.history = loaded
        self._batches = max(batches, loaded.step - 1)
        self._unseen = {self.keep_groups[place] for place in unseen}


def colm(grads: Any, k: int, *, groups: Any = None, **options: Any) -> Coreset:
    """The coreset `CoLM(k, **options).select(grads, groups)` of one batch without history; warns of keep_groups that have no
    sample in the batch."""
    coreset = CoLM(k, **options).select(grads, groups)
    if coreset.info["unseen"]:
        warnings.warn(nothing_kept(coreset.info["unseen"], "the batch", coreset.info["counts"]), stacklevel=2)
    return coreset


def small_sources(labels: Any, share: float | None = None) -> list[Any]:
    """The labels of the sources with less than `share` of the samples: those of which CoLM keeps every sample (`keep_groups` of `CoLM`,
    `keep_sources` of `CoLMConfig`).

    A coreset of k of B samples under proportional quotas has k / B of a source's samples; a source that has fewer than B / k samples in
    most batches would have none. The paper keeps small sources whole without a rule for which they are (its code names 10 of
    MathInstruct's 14); a share below the mean one is what its choice comes to.

    Args:
        labels: [n] one label per sample of the training data: integers or other values that can be sorted, such as strings.
        share: in (0, 1]. None: 1 / the number of sources, the mean share.

    Returns:
        The labels in order.

    Raises:
        TypeError, ValueError: for labels that are none, and a share out of range.

    Source: Nguyen et al., "Mini-batch coresets for memory-efficient language model training on data mixtures" (CoLM), ICLR 2025,
    section 4.1.

    Example:
        >>> import flashcoreset as fc
        >>> fc.small_sources(["web"] * 90 + ["code"] * 8 + ["maths"] * 2)
        ['code', 'maths']
        >>> fc.small_sources(["web"] * 90 + ["code"] * 8 + ["maths"] * 2, share=0.05)
        ['maths']
    """
    if share is not None:
        share = as_number(share, "share")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
    words = label_values(labels, "labels")
    if words is None:
        words = as_vector(labels, "labels", torch.device("cpu"), integers=True).tolist()
    if not words:
        raise ValueError("labels must name at least one sample, got none")
    sizes = Counter(as_label(label, f"labels[{i}]") for i, label in enumerate(words))
    small = {name for name, size in sizes.items() if _is_small(size, len(words), share, len(sizes))}
    return list(in_order(small))


def _is_small(size: int, total: int, share: float | None, sources: int) -> bool:
    return size * sources < total if share is None else size < share * total


def nothing_kept(labels: Iterable[Any], where: str, present: Iterable[Any]) -> str:
    """The warning of kept labels that no sample has."""
    found = in_order(present)
    listed = ", ".join(map(str, found[:20])) + (", ..." if len(found) > 20 else "")
    return f"keep_groups keeps nothing by {', '.join(map(str, in_order(labels)))}: no sample of {where} has that label, but {listed}"


def as_label(label: Any, name: str) -> Any:
    """A label as an int, or, if it is not a number, as it is."""
    if isinstance(label, (bool, np.bool_)):
        return bool(label)
    if isinstance(label, (Number, np.generic, Tensor)) and not isinstance(label, (np.str_, np.datetime64)):
        return as_int64(label, name)
    if not isinstance(label, Hashable):
        raise TypeError(f"{name} must be an int, a str or another value that can be sorted, got {label!r}")
    return label


def _is_integer(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool)


def in_order(labels: Iterable[Any]) -> tuple[Any, ...]:
    """Distinct labels in order, numbers before others.

    Raises:
        TypeError: for labels that cannot be sorted.
    """
    try:
        return tuple(sorted(set(labels), key=lambda label: (not isinstance(label, int), label)))
    except TypeError as error:
        raise TypeError(f"labels must be values that can be sorted, such as strings: {error}") from None


@dataclass(frozen=True)
class _Sources:
    """The samples' sources: each one's place [B] in the names of those that are present, in order."""

    places: Tensor
    names: list[Any]

    def are(self, labels: Iterable[Any]) -> Tensor:
        """A mask [B] of the samples that have one of these labels."""
        wanted = set(labels)
        found = [place for place, name in enumerate(self.names) if name in wanted]
        return torch.isin(self.places, self.places.new_tensor(found))


def usable_rows(grads: Any) -> Tensor:
    """A mask [B] bool of the rows with which `CoLM.select` goes on: finite and not zero."""
    return _usable(Gradients.of(grads, "grads"))


def _usable(g: Gradients) -> Tensor:
    """A mask [B] bool of the gradients that are finite and not zero."""
    usable = torch.empty(g.count, dtype=torch.bool, device=g.values.device)
    step = max(1, (1 << 24) // g.values.shape[1])
    for begin in range(0, g.count, step):
        part = g.values[begin : begin + step]
        largest = part.abs().amax(1)  # NaN if there is one
        usable[begin : begin + step] = torch.isfinite(largest) & (largest > 0)
    return usable
