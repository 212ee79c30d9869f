"""What happens to each sample in the course of training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.saving import Saved, savable
from flashcoreset._core.tensor import as_dense, as_integer, as_number, as_vector
from flashcoreset.scores import sample_scores

# An epoch's record of a sample, one byte: whether the sample was seen, and whether it was correct at its first and at its
# last update in that epoch.
_SEEN, _FIRST, _LAST = 1, 2, 4


class TrainingDynamics(Saved):
    """Gathers the scores of training: area under the margin, EL2N, forgetting and correctness of every sample.

    Call `update` with every mini-batch of training, in any order of the samples; `scores` gives what `fc.ccs` and
    `fc.top_scores` take. The state is on the CPU: 32 bytes per sample, and 1 more for each epoch.

    Args:
        n_samples: the number of training samples, >= 1.
        el2n_epochs: the epochs 0, 1, ..., el2n_epochs - 1 over which EL2N is summed, >= 1.

    Raises:
        TypeError, ValueError: for arguments of a wrong type or out of range.

    Source: Pleiss, Zhang, Elenberg and Weinberger, "Identifying mislabeled data using the area under the margin
    ranking", NeurIPS 2020 (here margins of probabilities); Paul, Ganguli and Dziugaite, "Deep learning on a
    data diet", NeurIPS 2021 (EL2N); Toneva et al., "An empirical study of example forgetting during deep neural
    network learning", ICLR 2019, algorithm 1 (forgetting); Zheng, Liu, Lai and Prakash, "Coverage-centric coreset
    selection for high pruning rates", ICLR 2023 (their use for coresets).

    Example:
        >>> import torch, flashcoreset as fc
        >>> td = fc.TrainingDynamics(3)
        >>> right, wrong = [4.0, 0.0], [0.0, 4.0]
        >>> td.update([0, 1, 2], torch.tensor([right, right, wrong]), [0, 0, 0], epoch=0)
        >>> td.update([2, 0, 1], torch.tensor([wrong, wrong, right]), [0, 0, 0], epoch=1)
        >>> td.scores()["forgetting"]
        tensor([1., 0., inf], dtype=torch.float64)
    """

    def __init__(self, n_samples: int, el2n_epochs: int = 10) -> None:
        self.n_samples = _at_least(n_samples, "n_samples", 1)
        self.el2n_epochs = _at_least(el2n_epochs, "el2n_epochs", 1)
        self._aum = torch.zeros(self.n_samples, dtype=torch.float64)
        self._el2n = torch.zeros(self.n_samples, dtype=torch.float64)
        self._correct = torch.zeros(self.n_samples, dtype=torch.int64)
        self._forgotten = torch.zeros(
            self.n_samples, dtype=torch.int64
        )  # times forgotten from one update to the next within an epoch
        self._epochs: dict[int, Tensor] = {}
        self._reduced = False

    def update(
        self, indices: Any, logits: Any, targets: Any, epoch: int, *, backend: str | None = None
    ) -> None:
        """Adds a mini-batch. A sample that occurs several times in the batch counts each time, in the batch's order.

        Args:
            indices: [B] integers in [0, n_samples): which samples these are; on any device.
            logits: [B, C] as for `sample_scores`.
            targets: [B] integers in [0, C).
            epoch: the epoch, counted from 0.
            backend: as for `sample_scores`.

        Raises:
            TypeError: for arguments of a wrong type.
            ValueError: for wrong shapes, indices or targets out of range, NaN or infinity in the logits, a negative
                epoch; nothing is changed then.
            BackendUnavailableError: if `backend` was named and cannot run here.

        Example:
            >>> import torch, flashcoreset as fc
            >>> td = fc.TrainingDynamics(100)
            >>> td.update([7, 3], torch.tensor([[4.0, 0.0], [0.0, 4.0]]), [0, 0], epoch=0)
            >>> td.scores()["correctness"][[7, 3]]
            tensor([1., 0.], dtype=torch.float64)
        """
        check_backend(backend)
        epoch = _at_least(epoch, "epoch", 0)
        x = as_dense(logits, "logits")
        if x.dim() != 2:
            raise ValueError(f"logits must have shape [samples, classes], got {tuple(x.shape)}")
        cpu = torch.device("cpu")
        which = as_vector(
            indices.cpu() if isinstance(indices, Tensor) else indices, "indices", cpu, integers=True,
            length=x.shape[0],
        )  # fmt: skip
        bad = (which < 0) | (which >= self.n_samples)
        if bad.any():
            place = int(bad.nonzero()[0])
            raise ValueError(
                f"indices must be in [0, {self.n_samples}), got {int(which[place])} at position {place}"
            )
        scores = sample_scores(x, targets, backend=backend)
        margin, el2n, correct = (t.cpu() for t in (scores.margin, scores.el2n, scores.correct))

        self._aum.index_add_(0, which, margin.double())
        if epoch < self.el2n_epochs:
            self._el2n.index_add_(0, which, el2n.double())
        self._correct.index_add_(0, which, correct.long())
        record, marks = self._record(epoch), _SEEN + (_FIRST + _LAST) * correct.to(torch.uint8)
        for places in _occurrences(which):
            distinct = which[places]
            record[distinct], forgotten = _joined(record[distinct], marks[places])
            self._forgotten[distinct] += forgotten

    def _record(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs[epoch] = torch.zeros(self.n_samples, dtype=torch.uint8)
        return self._epochs[epoch]

    def scores(self, *, never_learned: float = math.inf) -> dict[str, Tensor]:
        """The scores so far, over all updates in the order of their epochs, within an epoch in the order of the calls.

        Args:
            never_learned: the "forgetting" of a sample that was correct at no update. +inf counts it among the hardest, as in
                Toneva et al.; 0, as in the published code of CCS, among those never forgotten, which leaves wrong
                labels, which are seldom learned, in a large stratum.

        Returns:
            Tensors [n_samples] float64. "aum": the sum of the margins; low is hard, or labelled wrongly. "el2n": the
            sum of EL2N over the first epochs; high is hard. "forgetting": how often the sample was correct at
            one update and wrong at the next; `never_learned` if it was correct at no update. "correctness": at how many
            updates it was correct. A sample without updates has 0, 0, `never_learned` and 0.

        Raises:
            TypeError: if `never_learned` is no number.
            ValueError: if it is negative or NaN.

        Example:
            >>> import flashcoreset as fc
            >>> list(fc.TrainingDynamics(2).scores())
            ['aum', 'el2n', 'forgetting', 'correctness']
        """
        forever = isinstance(never_learned, float) and never_learned == math.inf
        missing = math.inf if forever else as_number(never_learned, "never_learned")
        if missing < 0:
            raise ValueError(f"never_learned must be >= 0, got {never_learned}")
        events = self._forgotten.clone()
        before = torch.zeros(self.n_samples, dtype=torch.bool)
        for epoch in sorted(self._epochs):
            record = self._epochs[epoch]
            seen = _has(record, _SEEN)
            events += seen & before & ~_has(record, _FIRST)
            before = torch.where(seen, _has(record, _LAST), before)
        return {
            "aum": self._aum.clone(),
            "el2n": self._el2n.clone(),
            "forgetting": torch.where(self._correct > 0, events.double(), missing),
            "correctness": self._correct.double(),
        }

    def merge(self, other: TrainingDynamics) -> None:
        """Adds the updates that `other` has seen, as if they had been made here: for data-parallel training, where each
        process keeps a state of its own. The workers may share out the samples anew in every epoch. If both have
        updates of a sample in one epoch, those of `other` count as the later ones.

        Raises:
            TypeError: if `other` is no TrainingDynamics.
            ValueError: if `n_samples` or `el2n_epochs` differ.

        Example:
            >>> import torch, flashcoreset as fc
            >>> td, other = fc.TrainingDynamics(2), fc.TrainingDynamics(2)
            >>> td.update([0], torch.tensor([[4.0, 0.0]]), [0], epoch=0)
            >>> other.update([1], torch.tensor([[4.0, 0.0]]), [0], epoch=0)
            >>> td.merge(other)
            >>> td.scores()["correctness"]
            tensor([1., 1.], dtype=torch.float64)
        """
        if not isinstance(other, TrainingDynamics):
            raise TypeError(f"other must be a TrainingDynamics, got {type(other).__name__}")
        for name in ("n_samples", "el2n_epochs"):
            mine, got = getattr(self, name), getattr(other, name)
            if mine != got:
                raise ValueError(f"other must have {name}={mine} as this one has, got {got}")
        self._aum += other._aum
        self._el2n += other._el2n
        self._correct += other._correct
        self._forgotten += other._forgotten
        for epoch, theirs in list(other._epochs.items()):
            self._epochs[epoch], forgotten = _joined(self._record(epoch), theirs)
            self._forgotten += forgotten

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> TrainingDynamics:
        """Merges the states of all ranks of a process group into the one of every rank, as `merge` does it in the order of the ranks.

        Call it once, when training is over (or on a deep copy): updates that are merged already would count again.

        Args:
            group: the process group (gloo or NCCL); None is the default one.

        Returns:
            This object.

        Raises:
            TypeError: if `group` is no process group.
            ValueError: if `n_samples` or `el2n_epochs` differ, naming the rank, and if the states were merged before.
            flashcoreset.distributed.RankError: if a rank ends or hangs.

        Example:
            >>> import flashcoreset as fc
            >>> fc.TrainingDynamics(2).all_reduce().n_samples  # on one rank; torchrun starts several
            2
        """
        # This room knows nothing of ranks until it is asked for them.
        from flashcoreset.distributed.dynamics import merged

        if self._reduced:
            raise ValueError(
                "all_reduce was called on this TrainingDynamics before: its updates would count twice; keep the ranks' own states, and "
                "call it on a copy.deepcopy of them"
            )
        state = merged(self, group)
        self.load_state_dict(state)
        self._reduced = True
        return self

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, for `torch.save`.

        Example:
            >>> import flashcoreset as fc
            >>> td = fc.TrainingDynamics(5)
            >>> td.load_state_dict(td.state_dict())
        """
        epochs = sorted(self._epochs)
        records = [self._epochs[epoch] for epoch in epochs]
        return {
            "n_samples": self.n_samples,
            "el2n_epochs": self.el2n_epochs,
            "aum": self._aum.clone(),
            "el2n": self._el2n.clone(),
            "correct": self._correct.clone(),
            "forgotten": self._forgotten.clone(),
            "epochs": epochs,
            "records": torch.stack(records) if records else torch.empty(0, self.n_samples, dtype=torch.uint8),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            TypeError: if `state` is no dict, and for entries of a wrong type.
            ValueError: for missing or unknown entries, and if `n_samples` or `el2n_epochs` differ from this object's.

        Example:
            >>> import flashcoreset as fc
            >>> fc.TrainingDynamics(5).load_state_dict(fc.TrainingDynamics(5).state_dict())
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, got {type(state).__name__}")
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(
                f"state must have the entries {', '.join(own)}, got {', '.join(map(str, state))}"
            )
        for name in ("n_samples", "el2n_epochs"):
            if state[name] != own[name]:
                raise ValueError(f"state must have {name}={own[name]} as this object has, got {state[name]}")
        if not isinstance(state["epochs"], (list, tuple)):
            raise TypeError(f"state['epochs'] must be a list, got {type(state['epochs']).__name__}")
        epochs = [_at_least(epoch, "state['epochs']", 0) for epoch in state["epochs"]]
        if len(set(epochs)) < len(epochs):
            raise ValueError(f"state['epochs'] must be distinct, got {epochs}")
        shapes = {name: own[name].shape for name in ("aum", "el2n", "correct", "forgotten")}
        shapes["records"] = torch.Size([len(epochs), self.n_samples])
        for name, shape in shapes.items():
            value = state[name]
            if not isinstance(value, Tensor) or value.dtype != own[name].dtype:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"state[{name!r}] must be a tensor of dtype {own[name].dtype}, got {got}")
            if value.layout is not torch.strided:
                raise TypeError(f"state[{name!r}] must be a dense tensor, got layout {value.layout}")
            if value.shape != shape:
                raise ValueError(f"state[{name!r}] must have shape {tuple(shape)}, got {tuple(value.shape)}")
        taken = {name: state[name].to("cpu", copy=True) for name in shapes}
        self._aum, self._el2n = taken["aum"], taken["el2n"]
        self._correct, self._forgotten = taken["correct"], taken["forgotten"]
        self._epochs = dict(zip(epochs, taken["records"].unbind(), strict=True))


def _loaded(state: dict[str, Any]) -> TrainingDynamics:
    found = TrainingDynamics(state["n_samples"], state["el2n_epochs"])
    found.load_state_dict(state)
    return found


savable(TrainingDynamics, TrainingDynamics.state_dict, _loaded)


def _has(record: Tensor, bit: int) -> Tensor:
    return (record & bit) != 0


def _joined(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Records of an epoch with what came after them, and which samples were forgotten in between."""
    both = _has(old, _SEEN) & _has(new, _SEEN)
    joined = torch.where(both, (old & (_SEEN + _FIRST)) | (new & _LAST), old | new)
    return joined, both & _has(old, _LAST) & ~_has(new, _FIRST)


def _occurrences(which: Tensor) -> Iterator[Tensor]:
    """The places of first occurrences in `which` [B], those of second ones, and so on."""
    ordered, order = which.sort(stable=True)
    place = torch.arange(len(which))
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    number = place - torch.where(starts, place, 0).cummax(0).values
    for occurrence in range(int(number.max()) + 1):
        yield order[number == occurrence]


def _at_least(value: Any, name: str, least: int) -> int:
    number = as_integer(value, name)
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}")
    return number
