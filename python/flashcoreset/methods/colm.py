"""CoLM: coresets of mini-batches for training language models on mixtures of sources."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.budgets import RULES, allocate_budgets
from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.inputs import label_values, sorted_labels
from flashcoreset._core.labels import Labels, as_labels
from flashcoreset._core.results import Coreset
from flashcoreset._core.tensor import as_int64, as_integer, one_of
from flashcoreset.gradients.adam import AdamState, RankOneAdamState, check_betas, check_eps
from flashcoreset.matching.problem import METRICS, Gradients, Problem, check_history, check_top
from flashcoreset.matching.solve import match_members

_PATIENCE = 100  # batches in which a kept label is expected


class CoLM:
    """Chooses, batch by batch, the samples to train on: all samples of small sources, and from the others medoids of the gradients as
    Adam would normalise them.

    A `CoLM` holds Adam's history of the gradients that were matched, which starts at zero with the first batch.

    Args:
        k: the size of a coreset, >= 1 and at least the number of `keep_groups`.
        top: how many dimensions of a gradient count: those where a group's mean update is largest; no gradient may be shorter.
            None takes all.
        betas, eps: Adam's, with the optimizer's values.
        keep_groups: labels of the sources of which every sample is kept. A batch may have none of them; a warning reports labels that no
            sample of the first 100 batches has.
        rule: how the rest of k is divided among the other sources: "proportional" and "balanced" are those of `allocate_budgets`,
            "none" matches all other sources together.
        metric: the distance or similarity for medoids: "l1", "euclidean", "sqeuclidean", "cosine" or "dot".
        backend: None, "cpu", "cuda", "triton" or "torch".

    Raises:
        TypeError, ValueError: for arguments of a wrong type or out of range.

    Source: Nguyen, Yang, Anand, Yang and Mirzasoleiman, "Mini-batch coresets for memory-efficient language model training on
    data mixtures", ICLR 2025.

    Example:
        >>> import torch, flashcoreset as fc
        >>> method = fc.CoLM(3, top=None, keep_groups=[7])
        >>> coefficients = torch.tensor([[1.0], [1.1], [-2.0], [3.0], [0.5]])
        >>> grads = fc.LowRankGradients(coefficients, seed=0, numel=1000)
        >>> coreset = method.select(grads, groups=[0, 0, 0, 0, 7])
        >>> coreset.indices.tolist(), coreset.weights.tolist()
        ([4, 0, 2], [1.0, 3.0, 1.0])
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
        backend: str | None = None,
    ) -> None:
        self.k = as_integer(k, "k")
        if (
            isinstance(keep_groups, (str, bytes))
            or not isinstance(keep_groups, Iterable)
            or getattr(keep_groups, "ndim", 1) == 0
        ):
            raise TypeError(f"keep_groups must be several labels, got {keep_groups!r}")
        self.keep_groups: tuple[Any, ...] = _kept(keep_groups)
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
        check_backend(backend)
        self.rule, self.metric, self.backend = rule, metric, backend
        self.history: AdamState | RankOneAdamState | None = None
        self._unseen = set(self.keep_groups)
        self._batches = 0

    def select(self, grads: Any, groups: Any = None) -> Coreset:
        """The samples of a batch to train on.

        Samples whose gradient has a NaN or an infinity, or is zero, are left out, also in kept sources. If the kept sources
        have more than k samples, the first k of them are taken. If fewer than k samples are usable, all usable samples are taken.

        Args:
            grads: [B, D] gradients, one row per sample, or `LowRankGradients`, as `zeroth_order_gradients` returns them.
            groups: [B] labels of the samples' sources, integers, strings or other values that can be sorted; None stands for one
                source.

        Returns:
            Coreset on the device of `grads`: `indices`, the kept samples first and then the medoids, source by source in label
            order; `weights`, 1 for kept samples and the size of its cluster for a medoid; and `info`: "kept" (how many),
            "left_out" (the samples without a usable gradient), "budgets" (label -> count, for the matched sources; {None: count}
            with rule "none"), "dims" (the dimensions that counted, [sources, top] or None), "step" (the number of steps
            made), "unseen" (the keep_groups of which no batch so far had a sample) and "seconds".

        Raises:
            TypeError, ValueError: for gradients of another length, dtype or device than before, labels of another length, fewer
                dimensions than `top`, keep_groups without `groups`, and if no gradient is usable.
            BackendUnavailableError: if `backend` cannot run here.
        """
        start = time.perf_counter()
        g = Gradients.of(grads, "grads")
        device = g.values.device
        top = check_top(self.top, g.numel)
        g, history = check_history(self._history_for(g), g, "history")
        if groups is None and self.keep_groups:
            raise ValueError(f"groups must be given with keep_groups={self.keep_groups}, got None")
        named = Labels(torch.zeros(g.count, dtype=torch.int64, device=device))
        if groups is not None:
            named = as_labels(groups, "groups", device, g.count)
            self._check_kind(named)
        labels = named.codes
        self._note(named.present())
        usable = _usable(g)
        if not bool(usable.any()):
            raise ValueError(
                "grads must have at least one row that is finite and not zero, got none; does the loss depend on "
                "the parameters?"
            )
        is_kept = torch.isin(labels, labels.new_tensor(named.codes_of(self.keep_groups)))
        kept = (usable & is_kept).nonzero()[:, 0][: self.k]
        members, budgets = self._members(labels, usable & ~is_kept, self.k - len(kept))
        indices, weights, dims = [kept], [torch.ones(len(kept), dtype=g.dtype, device=device)], None
        if members:
            found = match_members(Problem(g, history, top, members, self.metric), self.backend)
            indices.append(found.indices)
            weights.append(found.weights)
            dims, self.history = found.dims, found.state
        return Coreset(
            torch.cat(indices),
            torch.cat(weights),
            {
                "kept": len(kept),
                "left_out": (~usable).nonzero()[:, 0],
                "budgets": budgets if None in budgets else named.named(budgets),
                "dims": dims,
                "step": 0 if self.history is None else self.history.step - 1,
                "unseen": sorted(self._unseen),
                "seconds": time.perf_counter() - start,
            },
        )

    def _check_kind(self, labels: Labels) -> None:
        """Raises TypeError if keep_groups are integers and the labels are not, or the other way round: they would never be equal."""
        integers = {type(label) is int for label in self.keep_groups}
        if (labels.names is None) in integers or not integers:
            return
        kept, own = ("integers", "others") if True in integers else ("no integers", "integers")
        raise TypeError(
            f"keep_groups must be labels as groups has them, got {list(self.keep_groups)} ({kept}) beside {labels.present()[:5]} ({own})"
        )

    def _note(self, present: list[Any]) -> None:
        """Notes which of keep_groups have occurred; warns if some have not for a long time."""
        self._batches += 1
        if not self._unseen:
            return
        self._unseen.difference_update(present)
        if self._unseen and self._batches == _PATIENCE:
            self._warn(present)

    def _warn(self, present: list[Any]) -> None:
        warnings.warn(nothing_kept(self._unseen, f"{_PATIENCE} batches", present), stacklevel=4)

    def _history_for(self, g: Gradients) -> AdamState | RankOneAdamState:
        if self.history is not None:
            return self.history
        if g.length is not None and g.values.shape[1] == 1:
            return RankOneAdamState(g.numel, betas=self.betas, eps=self.eps)
        m = torch.zeros(g.numel, dtype=g.dtype, device=g.values.device)
        return AdamState(m, m.clone(), 1, self.betas, self.eps)

    def _members(
        self, labels: Tensor, usable: Tensor, left: int
    ) -> tuple[list[tuple[Tensor, int]], dict[int | None, int]]:
        """The rows and the budget of each source that has a budget, and the budgets by label."""
        rows = usable.nonzero()[:, 0]
        left = min(left, len(rows))
        if not left:
            return [], {}
        if self.rule == "none":
            return [(rows, left)], {None: left}
        own = labels[rows]
        present, sizes = own.unique(return_counts=True)
        budgets = allocate_budgets(sizes, left, self.rule).tolist()
        by_label: dict[int | None, int] = dict(zip(present.tolist(), budgets, strict=True))
        return [(rows[own == label], count) for label, count in by_label.items() if count], by_label

    def state_dict(self) -> dict[str, Any]:
        """The history, for `load_state_dict` of a CoLM with the same arguments: tensors and numbers, as torch.save takes them."""
        if self.history is None:
            return {"history": None}
        if isinstance(self.history, RankOneAdamState):
            return {"history": {"kind": "rank one", **asdict(self.history)}}
        return {
            "history": {
                "kind": "dense",
                "m": self.history.m,
                "v": self.history.v,
                "step": self.history.step,
                "betas": self.history.betas,
                "eps": self.history.eps,
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned.

        Raises:
            TypeError, ValueError: unless `state` is such a dict, of a CoLM with the same betas and eps.
        """
        if not isinstance(state, dict) or "history" not in state:
            raise TypeError("state must be what state_dict returned, a dict with the entry history")
        history = state["history"]
        if history is None:
            self.history = None
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


def colm(grads: Any, k: int, *, groups: Any = None, **options: Any) -> Coreset:
    """The coreset `CoLM(k, **options).select(grads, groups)` of one batch without history; warns of keep_groups that have no
    sample in the batch."""
    coreset = CoLM(k, **options).select(grads, groups)
    if coreset.info["unseen"]:
        present = as_labels(
            groups, "groups", coreset.indices.device, Gradients.of(grads, "grads").count
        ).present()
        warnings.warn(nothing_kept(coreset.info["unseen"], "the batch", present), stacklevel=2)
    return coreset


def _kept(labels: Iterable[Any]) -> tuple[Any, ...]:
    """Distinct labels in ascending order: integers, or other values that can be sorted."""
    values = list(labels)
    if label_values(values, "keep_groups") is None:
        return tuple(sorted({as_int64(label, f"keep_groups[{i}]") for i, label in enumerate(values)}))
    return tuple(sorted_labels(values, "keep_groups"))


def nothing_kept(labels: Iterable[Any], where: str, present: list[Any]) -> str:
    """The warning of kept labels that no sample has."""
    listed = ", ".join(map(str, present[:20])) + (", ..." if len(present) > 20 else "")
    return f"keep_groups keeps nothing by {', '.join(map(str, sorted(labels)))}: no sample of {where} has that label, but {listed}"


def _usable(g: Gradients) -> Tensor:
    """A mask [B] bool of the gradients that are finite and not zero."""
    usable = torch.empty(g.count, dtype=torch.bool, device=g.values.device)
    step = max(1, (1 << 24) // g.values.shape[1])
    for begin in range(0, g.count, step):
        part = g.values[begin : begin + step]
        largest = part.abs().amax(1)  # NaN if there is one
        usable[begin : begin + step] = torch.isfinite(largest) & (largest > 0)
    return usable
