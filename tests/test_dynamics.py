"""TrainingDynamics against a record of every update that is gone through sample by sample."""

from __future__ import annotations

import math
import random
from io import BytesIO
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashcoreset as fc

Update = tuple[list[int], Tensor, list[int], int]  # indices, logits, targets, epoch

# Classes 0 and 1 with the target 0: correct with a margin of 0.96, and wrong.
RIGHT, WRONG = [2.0, -2.0], [-2.0, 2.0]


def straightforward(n: int, updates: list[Update], el2n_epochs: int = 10) -> dict[str, list[float]]:
    """The definitions, from the updates in the order of their epochs."""
    aum, el2n, correctness = [0.0] * n, [0.0] * n, [0.0] * n
    history: list[list[bool]] = [[] for _ in range(n)]
    for indices, logits, targets, epoch in sorted(updates, key=lambda update: update[3]):
        p = logits.double().softmax(1)
        for row, (i, t) in enumerate(zip(indices, targets, strict=True)):
            others = [float(p[row, j]) for j in range(p.shape[1]) if j != t]
            aum[i] += float(p[row, t]) - max(others)
            if epoch < el2n_epochs:
                el2n[i] += math.sqrt(sum(o * o for o in others) + (1 - float(p[row, t])) ** 2)
            right = int(logits[row].argmax()) == t
            history[i].append(right)
            correctness[i] += right
    forgetting = [float(sum(a and not b for a, b in pairwise(h))) if any(h) else math.inf for h in history]
    return {"aum": aum, "el2n": el2n, "forgetting": forgetting, "correctness": correctness}


def check(td: fc.TrainingDynamics, wanted: dict[str, list[float]]) -> None:
    scores = td.scores()
    assert list(scores) == ["aum", "el2n", "forgetting", "correctness"]
    for name, values in wanted.items():
        assert scores[name].dtype == torch.float64
        assert scores[name].tolist() == pytest.approx(values, abs=1e-5), name


def training(n: int, epochs: int, batch: int, seed: int, classes: int = 3) -> list[Update]:
    """Shuffled epochs in which samples are learned and forgotten."""
    generator = torch.Generator().manual_seed(seed)
    updates: list[Update] = []
    targets = torch.randint(0, classes, (n,), generator=generator)
    for epoch in range(epochs):
        for indices in torch.randperm(n, generator=generator).split(batch):
            logits = 2 * torch.randn(len(indices), classes, generator=generator)
            updates.append((indices.tolist(), logits, targets[indices].tolist(), epoch))
    return updates


@given(
    n=st.integers(1, 12), epochs=st.integers(1, 6), batch=st.integers(1, 12), el2n_epochs=st.integers(1, 8),
    seed=st.integers(0, 1000), order=st.randoms(use_true_random=False),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_follows_the_definition_in_any_order(
    n: int, epochs: int, batch: int, el2n_epochs: int, seed: int, order: random.Random
) -> None:
    updates = training(n, epochs, batch, seed)
    wanted = straightforward(n, updates, el2n_epochs)
    for shuffle in (False, True):
        td = fc.TrainingDynamics(n, el2n_epochs)
        if shuffle:
            order.shuffle(updates)
        for update in updates:
            td.update(*update)
        check(td, wanted)


def test_forgetting_counts_from_correct_to_wrong() -> None:
    histories = ["rrrr", "wwww", "wrrr", "rwrw", "rwww", "wwwr", "wrwr"]
    td = fc.TrainingDynamics(8)
    for epoch in range(4):
        logits = torch.tensor([RIGHT if history[epoch] == "r" else WRONG for history in histories])
        td.update(range(7), logits, [0] * 7, epoch)
    scores = td.scores()
    # The second was never learned, the last never seen: the hardest, not the easiest.
    assert scores["forgetting"].tolist() == [0, math.inf, 0, 2, 1, 0, 1, math.inf]
    assert scores["correctness"].tolist() == [4, 0, 3, 2, 1, 1, 2, 0]
    assert scores["aum"][7] == scores["el2n"][7] == 0


def test_el2n_is_summed_over_the_first_epochs_alone() -> None:
    td = fc.TrainingDynamics(1, el2n_epochs=2)
    one = float(fc.sample_scores(torch.tensor([WRONG]), [0]).el2n)
    for epoch, total in ((0, one), (1, 2 * one), (2, 2 * one), (50, 2 * one)):
        td.update([0], torch.tensor([WRONG]), [0], epoch)
        assert float(td.scores()["el2n"]) == pytest.approx(total)


def test_a_sample_twice_in_a_batch_counts_twice_in_its_order() -> None:
    indices = [3, 1, 3, 3, 1, 0]
    right = [True, False, False, True, True, False]
    logits = torch.tensor([RIGHT if r else WRONG for r in right])
    together, apart = fc.TrainingDynamics(4), fc.TrainingDynamics(4)
    together.update(indices, logits, [0] * 6, 0)
    for i, row in zip(indices, logits, strict=True):
        apart.update([i], row[None], [0], 0)
    assert together.scores()["forgetting"].tolist() == [math.inf, 0, math.inf, 1]
    for name, values in apart.scores().items():
        assert torch.equal(together.scores()[name], values), name


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_merged_states_of_workers_are_one_state(workers: int) -> None:
    """The samples are shared out anew in every epoch, so that most are forgotten between two workers."""
    n = 60
    updates = training(n, 7, 5, 4)
    whole = fc.TrainingDynamics(n)
    states = [fc.TrainingDynamics(n) for _ in range(workers)]
    for number, update in enumerate(updates):
        whole.update(*update)
        states[number % workers].update(*update)
    merged = fc.TrainingDynamics(n)
    for state in reversed(states):
        merged.merge(state)
    check(merged, straightforward(n, updates))
    for name in ("forgetting", "correctness"):
        assert torch.equal(merged.scores()[name], whole.scores()[name])
    before = states[0].scores()["forgetting"]
    merged.update(*updates[0])  # later updates do not change the merged ones
    assert torch.equal(states[0].scores()["forgetting"], before)


def test_merging_within_an_epoch_puts_the_other_after() -> None:
    td, other = fc.TrainingDynamics(1), fc.TrainingDynamics(1)
    td.update([0], torch.tensor([RIGHT]), [0], 0)
    other.update([0], torch.tensor([WRONG]), [0], 0)
    td.merge(other)
    assert td.scores()["forgetting"].tolist() == [1]


def test_resuming_from_a_state_goes_on_as_if_nothing_had_happened() -> None:
    n, updates = 40, training(40, 6, 7, 9)
    whole, first = fc.TrainingDynamics(n, 3), fc.TrainingDynamics(n, 3)
    for number, update in enumerate(updates):
        whole.update(*update)
        if number == 17:  # in the middle of an epoch
            file = BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            first = fc.TrainingDynamics(n, 3)
            first.load_state_dict(torch.load(file, weights_only=True))
        first.update(*update)
    for name, values in whole.scores().items():
        assert torch.equal(first.scores()[name], values), name
    state = first.state_dict()
    first.update(*updates[0])
    first.load_state_dict(state)  # the state is a copy
    assert torch.equal(first.scores()["aum"], whole.scores()["aum"])


def test_scores_are_copies_and_half_logits_are_taken() -> None:
    td = fc.TrainingDynamics(5)
    td.update(
        torch.tensor([1, 2], dtype=torch.int32), torch.tensor([RIGHT, WRONG]).half(), torch.zeros(2).long(), 0
    )
    td.scores()["aum"].fill_(7)
    assert td.scores()["aum"].abs().max() < 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"indices": [0, 9]}, ValueError, r"indices must be in \[0, 9\), got 9 at position 1"),
        ({"indices": [-1, 0]}, ValueError, r"indices must be in \[0, 9\), got -1 at position 0"),
        ({"indices": [0]}, ValueError, r"indices must have shape \[2\], got \(1,\)"),
        ({"indices": [0.0, 1.0]}, TypeError, "indices must hold integers, got dtype float64"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must have shape \[samples, classes\], got \(2, 3, 4\)"),
        ({"logits": torch.tensor([RIGHT, [0.0, math.nan]])}, ValueError, "logits must be finite, got NaN at sample 1"),
        ({"targets": [0, 2]}, ValueError, r"targets must be in \[0, 2\), got 2 at sample 1"),
        ({"targets": [0]}, ValueError, r"targets must have shape \(2,\) as logits has it, got \(1,\)"),
        ({"epoch": -1}, ValueError, "epoch must be >= 0, got -1"),
        ({"epoch": 1.0}, TypeError, "epoch must be an int, got 1.0"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    ],
)  # fmt: skip
def test_bad_updates_change_nothing(change: dict[str, Any], error: type[Exception], words: str) -> None:
    td = fc.TrainingDynamics(9)
    plain: dict[str, Any] = {
        "indices": [0, 1],
        "logits": torch.tensor([RIGHT, RIGHT]),
        "targets": [0, 0],
        "epoch": 0,
    }
    with pytest.raises(error, match=words):
        td.update(**(plain | change))
    assert td.scores()["correctness"].sum() == 0
    assert td.scores()["aum"].abs().sum() == 0


def test_bad_states() -> None:
    td = fc.TrainingDynamics(9)
    td.update([0], torch.tensor([RIGHT]), [0], 3)
    state = td.state_dict()
    for change, error, words in (
        ({"aum": state["aum"].float()}, TypeError, r"state\['aum'\] must be a tensor of dtype torch.float64, got torch.float32"),
        ({"aum": [0.0] * 9}, TypeError, r"state\['aum'\] must be a tensor .*, got list"),
        ({"el2n": state["el2n"][:3]}, ValueError, r"state\['el2n'\] must have shape \(9,\), got \(3,\)"),
        ({"records": state["records"][:0]}, ValueError, r"state\['records'\] must have shape \(1, 9\), got \(0, 9\)"),
        ({"epochs": ["a"]}, TypeError, r"state\['epochs'\] must be an int"),
        ({"n_samples": 8}, ValueError, "state must have n_samples=9 as this object has, got 8"),
        ({"el2n_epochs": 8}, ValueError, "state must have el2n_epochs=10 as this object has, got 8"),
        ({"more": 1}, ValueError, "state must have the entries n_samples, .*, got .*, more"),
        ({"epochs": 3}, TypeError, r"state\['epochs'\] must be a list, got int"),
        (
            {"epochs": [0, 0], "records": torch.zeros(2, 9, dtype=torch.uint8)},
            ValueError, r"state\['epochs'\] must be distinct, got \[0, 0\]",
        ),
        ({"aum": state["aum"].to_sparse()}, TypeError, r"state\['aum'\] must be a dense tensor, got layout torch.sparse_coo"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            td.load_state_dict(state | change)
    with pytest.raises(TypeError, match="state must be a dict, got list"):
        td.load_state_dict([])
    assert td.scores()["correctness"].sum() == 1
    with pytest.raises(TypeError, match="other must be a TrainingDynamics, got dict"):
        td.merge(state)
    with pytest.raises(ValueError, match="other must have n_samples=9 as this one has, got 3"):
        td.merge(fc.TrainingDynamics(3))
    with pytest.raises(ValueError, match="other must have el2n_epochs=10 as this one has, got 4"):
        td.merge(fc.TrainingDynamics(9, 4))
    for bad in ({"n_samples": 0}, {"n_samples": 3, "el2n_epochs": 0}):
        with pytest.raises(ValueError, match="must be >= 1, got 0"):
            fc.TrainingDynamics(**bad)
