"""fc.CoLM: quotas, kept sources, unusable gradients, the history over steps and its state dict."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcoreset as fc


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LABELS = torch.tensor([0] * 17 + [1] * 12 + [2] * 8 + [9] * 3)


def low_rank(
    count: int, seed: int, numel: int = 500, dtype: torch.dtype = torch.float32
) -> fc.LowRankGradients:
    return fc.LowRankGradients(normal(count, 1, seed=seed, dtype=dtype), seed=seed, numel=numel)


def test_kept_sources_and_quotas(backend: str) -> None:
    """The published example: 17 picks for sources of 17, 12 and 8 samples, beside 3 that are kept."""
    method = fc.CoLM(20, top=50, keep_groups=[9], backend=backend)
    for step in range(4):
        coreset = method.select(low_rank(40, step), LABELS)
        assert coreset.indices[:3].tolist() == [37, 38, 39]
        assert coreset.weights[:3].tolist() == [1, 1, 1]
        assert torch.bincount(LABELS[coreset.indices]).tolist() == [7, 6, 4, 0, 0, 0, 0, 0, 0, 3]
        assert len(set(coreset.indices.tolist())) == 20
        for label, size in ((0, 17), (1, 12), (2, 8)):
            assert coreset.weights[LABELS[coreset.indices] == label].sum() == size
        assert coreset.info["budgets"] == {0: 7, 1: 6, 2: 4}
        assert coreset.info["kept"] == 3
        assert coreset.info["step"] == step + 1
        if step > 0:  # before, everything is along the first batch's direction
            assert coreset.info["dims"].shape == (3, 50)
        assert not len(coreset.info["left_out"])
        assert coreset.info["seconds"] > 0


@pytest.mark.parametrize(
    ("rule", "expected"), [("proportional", [7, 6, 4]), ("balanced", [6, 6, 5]), ("none", None)]
)
def test_rules(rule: str, expected: list[int] | None) -> None:
    coreset = fc.CoLM(20, top=50, keep_groups=[9], rule=rule).select(low_rank(40, 0), LABELS)
    assert len(coreset.indices) == 20
    if expected is None:
        assert coreset.info["budgets"] == {None: 17}
        assert coreset.weights.sum() == 40
    else:
        assert torch.bincount(LABELS[coreset.indices])[:3].tolist() == expected


def test_groups_are_matched_apart_and_kept_ones_enter_nothing(backend: str) -> None:
    """The selection is match_gradients of the other sources' rows alone, with the same history."""
    method = fc.CoLM(20, top=50, keep_groups=[9], backend=backend)
    state: Any = fc.AdamState(torch.zeros(500).double(), torch.zeros(500).double(), 1)
    for step in range(5):
        g = normal(40, 500, seed=step)
        g[37:] *= 1e6
        coreset = method.select(g, LABELS)
        alone = fc.match_gradients(g[:37], 17, normalize=state, top=50, groups=LABELS[:37], backend=backend)
        state = alone.state
        assert torch.equal(coreset.indices[3:], alone.indices)
        assert torch.equal(coreset.weights[3:], alone.weights)
        assert torch.equal(coreset.info["dims"], alone.dims)
        assert isinstance(method.history, fc.AdamState)
        assert torch.equal(method.history.m, state.m)
        assert torch.equal(method.history.v, state.v)


def test_too_many_kept_samples_are_cut(backend: str) -> None:
    method = fc.CoLM(5, top=50, keep_groups=[0, 9], backend=backend)
    coreset = method.select(low_rank(40, 0), LABELS)
    assert coreset.indices.tolist() == [0, 1, 2, 3, 4]
    assert coreset.weights.tolist() == [1] * 5
    assert coreset.info["budgets"] == {}
    assert coreset.info["dims"] is None
    assert coreset.info["counts"] == {0: 5, 1: 0, 2: 0, 9: 0}
    # As published, Adam's t counts the step; its means stay as they are.
    assert coreset.info["step"] == 1
    assert (method.history.step, method.history.mean, method.history.mean_square) == (2, 0.0, 0.0)
    assert method.take_all(2, [9, 0]).info["step"] == 2
    method.keep_groups = ()
    g = low_rank(40, 0)
    past = fc.RankOneAdamState(500, step=3)
    assert torch.equal(
        method.select(g).indices, fc.match_gradients(g, 5, normalize=past, top=50, backend=backend).indices
    )


@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_unusable_gradients_are_left_out(backend: str, kind: str) -> None:
    coefficients = normal(40, 1, dtype=torch.float32)
    coefficients[3], coefficients[5], coefficients[38], coefficients[20] = 0, torch.nan, torch.nan, torch.inf
    g: Any = fc.LowRankGradients(coefficients, seed=0, numel=200)
    if kind == "dense":
        g = coefficients @ fc.LowRankGradients(torch.ones(1, 1), 0, 200).directions()
    method = fc.CoLM(20, top=50, keep_groups=[9], backend=backend)
    coreset = method.select(g, LABELS)
    assert coreset.info["left_out"].tolist() == [3, 5, 20, 38]
    assert coreset.indices[:2].tolist() == [37, 39]
    assert not set(coreset.indices.tolist()) & {3, 5, 20, 38}
    assert coreset.weights.sum() == 36
    assert len(coreset.indices) == 20


def test_rows_of_large_numbers_are_usable() -> None:
    """Finite numbers whose sum is not."""
    g = torch.full((3, 30), 1e308, dtype=torch.float64)
    g[1] = 1.0
    with pytest.raises(ValueError, match="scale the gradients down"):  # but v has no room for their squares
        fc.CoLM(2, top=5).select(g)
    coreset = fc.CoLM(3, top=5, keep_groups=[1]).select(g, [1, 1, 1])
    assert coreset.indices.tolist() == [0, 1, 2]


def test_fewer_usable_samples_than_asked_for_are_all_taken(backend: str) -> None:
    coreset = fc.CoLM(30, top=20, backend=backend).select(low_rank(8, 0))
    assert coreset.indices.sort().values.tolist() == list(range(8))
    assert coreset.weights.tolist() == [1] * 8


def test_one_direction_for_the_whole_run_needs_two_numbers() -> None:
    method = fc.CoLM(10, top=50)
    for step in range(6):
        coefficients = normal(40, 1, seed=step, dtype=torch.float32)
        coreset = method.select(fc.LowRankGradients(coefficients, seed=3, numel=10**9))
        assert coreset.weights.sum() == 40
        assert isinstance(method.history, fc.RankOneAdamState)
    chosen = normal(40, 1, seed=5)[coreset.indices]
    assert method.history.mean_square > 0.001 * float(chosen.square().mean()) * 0.999


@pytest.mark.parametrize("kind", ["dense", "low rank", "one direction"])
def test_a_loaded_state_goes_on_alike(kind: str) -> None:
    def batch(step: int) -> Any:
        if kind == "dense":
            return normal(40, 300, seed=step)
        seed = 3 if kind == "one direction" else step
        return fc.LowRankGradients(normal(40, 1, seed=step), seed=seed, numel=300)

    method = fc.CoLM(15, top=40, keep_groups=[9])
    assert method.state_dict() == {"history": None, "batches": 0, "unseen": [0]}
    for step in range(3):
        method.select(batch(step), LABELS)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = fc.CoLM(15, top=40, keep_groups=[9])
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        a, b = method.select(batch(step), LABELS), other.select(batch(step), LABELS)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.weights, b.weights)
        assert a.info["step"] == b.info["step"] == step + 1
    other.load_state_dict({"history": None})
    assert other.history is None


def test_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    fc.CoLM(10, top=20).select(low_rank(40, 0), LABELS)
    assert torch.equal(before, torch.get_rng_state())


def test_select_by_name() -> None:
    grads = normal(12, 30)
    found = fc.select("colm", grads=grads, k=4, top=10)
    assert torch.equal(found.indices, fc.CoLM(4, top=10).select(grads).indices)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 1.0}, TypeError, "k must be an int"),
        ({"k": 2, "keep_groups": [1, 2, 3]}, ValueError, "k must be at least the 3 keep_groups, got 2"),
        ({"k": 2, "keep_groups": 1}, TypeError, "keep_groups must be several labels"),
        ({"k": 2, "keep_groups": "12"}, TypeError, "keep_groups must be several labels"),
        ({"k": 2, "keep_groups": [1.5]}, TypeError, r"keep_groups\[0\] must be an int"),
        ({"k": 2, "keep_groups": [2**70]}, ValueError, r"keep_groups\[0\] must be in the range of 64-bit"),
        ({"k": 2, "keep_groups": torch.tensor(1)}, TypeError, "keep_groups must be several labels"),
        ({"k": 2, "top": 0}, ValueError, "top must be >= 1"),
        ({"k": 2, "betas": (1, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\)"),
        ({"k": 2, "eps": 0}, ValueError, "eps must be > 0"),
        ({"k": 2, "rule": "fair"}, ValueError, "unknown rule 'fair'"),
        ({"k": 2, "metric": "l3"}, ValueError, "unknown metric 'l3'"),
        ({"k": 2, "backend": "gpu"}, ValueError, "unknown backend"),
        ({"k": 2, "method": "caratheodory"}, ValueError, "unknown method 'caratheodory'"),
        ({"k": 2, "normalize": 1}, TypeError, "normalize must be a bool, got 1"),
        ({"k": 2, "normalize": None}, TypeError, "normalize must be a bool, got None"),
        ({"k": 2, "seed": 0.5}, TypeError, "seed must be an int"),
        (
            {"k": 2, "keep_groups": [["a"]]},
            TypeError,
            r"keep_groups\[0\] must be an int, a str or another value",
        ),
        ({"k": 2, "keep_groups": ["a", ("b",)]}, TypeError, "labels must be values that can be sorted"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fc.CoLM(**arguments)


def test_bad_batches_are_named() -> None:
    method = fc.CoLM(4, top=50, keep_groups=[9])
    with pytest.raises(ValueError, match=r"groups must be given with keep_groups=\(9,\)"):
        method.select(low_rank(40, 0))
    with pytest.raises(ValueError, match=r"groups must have shape \[40\], got \(39,\)"):
        method.select(low_rank(40, 0), LABELS[:39])
    with pytest.raises(TypeError, match="groups must hold integers"):
        method.select(low_rank(40, 0), LABELS.double())
    with pytest.raises(ValueError, match="grads must have 2 dimensions"):
        method.select(torch.zeros(3), LABELS)
    nothing = fc.LowRankGradients(torch.full((40, 1), torch.nan), 0, 500)
    with pytest.raises(ValueError, match="at least one row that is finite and not zero, got none"):
        method.select(nothing, LABELS)
    method.select(low_rank(40, 0), LABELS)
    with pytest.raises(ValueError, match=r"history must be of gradients of length 400, .* length 500"):
        method.select(low_rank(40, 0, numel=400), LABELS)
    with pytest.raises(TypeError, match="state must be what state_dict returned"):
        method.load_state_dict({"m": 1})
    with pytest.raises(ValueError, match="betas"):
        method.load_state_dict(fc.CoLM(4, betas=(0.5, 0.9)).state_dict() | {"history": _state((0.5, 0.9))})
    for batches, text in ((-1, "batches must be >= 0, got -1"), (2**70, "range of 64-bit integers")):
        with pytest.raises(ValueError, match=text):
            method.load_state_dict({"history": None, "batches": batches})
    with pytest.raises(ValueError, match=r"a CoLM with 1 keep_groups, as this one, got unseen ones at \[3\]"):
        method.load_state_dict({"history": None, "unseen": [3]})
    for kind in ("sparse", []):
        with pytest.raises(ValueError, match="kind of history"):
            method.load_state_dict({"history": {"kind": kind}})
    with pytest.raises(TypeError, match="history must be a dict or None, got int"):
        method.load_state_dict({"history": 3})
    whole = _state((0.9, 0.999))
    for history in ({name: whole[name] for name in whole if name != "betas"}, {**whole, "more": 1}):
        with pytest.raises(ValueError, match=r"history must have the entries kind, numel, mean, .* got kind"):
            method.load_state_dict({"history": history})


def _state(betas: tuple[float, float]) -> dict[str, Any]:
    method = fc.CoLM(4, top=50, betas=betas)
    method.select(low_rank(40, 0))
    history: dict[str, Any] = method.state_dict()["history"]
    return history


def test_kept_labels_that_no_sample_has() -> None:
    """A batch may lack a kept label; if none of many batches has it, that is reported once, and for a single call at once."""
    g, groups = low_rank(40, 0), [0, 1] * 20
    with pytest.warns(
        UserWarning, match="keep_groups keeps nothing by 7: no sample of the batch has that label, but 0, 1"
    ):
        fc.select("colm", grads=g, k=4, top=50, groups=groups, keep_groups=[7, 1])
    method = fc.CoLM(4, top=50, keep_groups=[7, 9, 1])
    assert method.select(g, groups).info["unseen"] == [7, 9]
    assert method.select(g, [9, *groups[1:]]).info["unseen"] == [7]
    for _ in range(97):
        method.select(g, groups)
    with pytest.warns(
        UserWarning, match="keep_groups keeps nothing by 7: no sample of 100 batches .*, but 0, 1"
    ):
        method.select(g, groups)
    assert method.select(g, groups).info["unseen"] == [7]  # reported once
    assert method.select(g, [7, *groups[1:]]).info["unseen"] == []


# ---- labels, quotas, random rows


WORDS = ["web"] * 17 + ["code"] * 12 + ["maths"] * 8 + ["rare"] * 3


def test_words_as_labels() -> None:
    """As with integers in the same order; what comes back uses the words."""
    numbers = torch.tensor([["code", "maths", "rare", "web"].index(word) for word in WORDS])
    by_number = fc.CoLM(20, top=50, keep_groups=[2]).select(low_rank(40, 0), numbers)
    for groups in (WORDS, tuple(WORDS), np.array(WORDS), np.array(WORDS, dtype=object)):
        coreset = fc.CoLM(20, top=50, keep_groups=["rare", "none"]).select(low_rank(40, 0), groups)
        assert torch.equal(coreset.indices, by_number.indices)
        assert coreset.info["budgets"] == {"web": 7, "code": 6, "maths": 4}
        assert coreset.info["counts"] == {"web": 7, "code": 6, "maths": 4, "rare": 3}
        assert coreset.info["unseen"] == ["none"]
        assert coreset.info["represented"] == 40
    with pytest.raises(ValueError, match=r"groups must have shape \[40\], got \(39,\)"):
        fc.CoLM(20).select(low_rank(40, 0), WORDS[:39])
    mixed = fc.CoLM(3, keep_groups=["b", 2]).draw(4, [2, "b", 1, "a"])
    assert mixed.info["counts"] == {1: 0, 2: 1, "a": 1, "b": 1} or mixed.info["counts"][1] == 1
    assert list(mixed.info["counts"]) == [1, 2, "a", "b"]


def test_more_dimensions_than_there_are_count_as_all() -> None:
    g = normal(40, 30)
    found = fc.CoLM(20, top=2560, keep_groups=[9]).select(g, LABELS)
    expected = fc.CoLM(20, top=None, keep_groups=[9]).select(g, LABELS)
    assert torch.equal(found.indices, expected.indices)
    assert found.info["dims"] is None


def test_the_published_balanced_rule() -> None:
    """Exact shares rounded down or up, at random: all that is missing goes to shares with a fraction, one each."""
    shares = np.array([17, 12, 8]) * 17 / 37
    seen = set()
    for seed in range(40):
        budgets = fc.allocate_budgets([17, 12, 8], 17, rule="published_balanced", seed=seed)
        assert budgets.sum() == 17
        assert all(np.floor(shares) <= budgets.numpy())
        assert all(budgets.numpy() <= np.ceil(shares))
        seen.add(tuple(budgets.tolist()))
    assert seen == {(8, 5, 4), (8, 6, 3), (7, 6, 4)}
    assert fc.allocate_budgets([6, 4, 2], 6, rule="published_balanced").tolist() == [3, 2, 1]
    assert fc.allocate_budgets([3, 0, 0], 3, rule="published_balanced").tolist() == [3, 0, 0]
    with pytest.raises(TypeError, match="seed must be an int"):
        fc.allocate_budgets([3], 1, seed=0.5)
    method = fc.CoLM(20, top=50, keep_groups=[9], rule="published_balanced")
    counts = {tuple(method.select(low_rank(40, step), LABELS).info["budgets"].values()) for step in range(12)}
    assert counts == seen  # another order in every step


def test_small_sources() -> None:
    assert fc.small_sources(WORDS) == ["maths", "rare"]  # below a quarter of 40
    assert fc.small_sources(WORDS, share=0.3) == ["maths", "rare"]
    assert fc.small_sources(WORDS, share=0.31) == ["code", "maths", "rare"]
    assert fc.small_sources(LABELS, share=0.1) == fc.small_sources(LABELS.tolist(), share=0.1) == [9]
    assert fc.small_sources(["a", "b"]) == []
    for arguments, error, text in (
        ((WORDS, 0), ValueError, r"share must be in \(0, 1\], got 0"),
        ((WORDS, 1.5), ValueError, r"share must be in \(0, 1\], got 1.5"),
        ((WORDS, "a"), TypeError, "share must be"),
        (([],), ValueError, "labels must"),
        (([0.5],), TypeError, "labels"),
        (([["a"]],), (TypeError, ValueError), "labels"),
    ):
        with pytest.raises(error, match=text):
            fc.small_sources(*arguments)


def test_random_rows_under_the_quotas() -> None:
    method = fc.CoLM(20, keep_groups=["rare"], method="random", seed=3)
    drawn = [method.draw(40, WORDS) for _ in range(30)]
    for step, coreset in enumerate(drawn):
        assert coreset.info["counts"] == {"code": 6, "maths": 4, "rare": 3, "web": 7}
        assert coreset.info["step"] == step + 1
        assert len(set(coreset.indices.tolist())) == 20
        assert coreset.indices[:3].tolist() == [37, 38, 39]
        assert float(coreset.weights.sum()) == pytest.approx(40)
    seen = torch.bincount(torch.cat([coreset.indices for coreset in drawn]), minlength=40)
    assert (seen > 0).all()
    assert (seen[:37] < 30).all()
    again = fc.CoLM(20, keep_groups=["rare"], method="random", seed=3)
    assert torch.equal(again.select(low_rank(40, 0), WORDS).indices, drawn[0].indices)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.draw(40, WORDS).indices, method.draw(40, WORDS).indices)
    assert len(fc.CoLM(20).draw(5).indices) == 5
    for arguments, error, text in (
        ((0,), ValueError, "count must be >= 1"),
        ((1.5,), TypeError, "count must be an int"),
        ((3,), ValueError, "groups must be given with keep_groups"),
        ((3, ["a"]), ValueError, r"groups must have shape \[3\]"),
    ):
        with pytest.raises(error, match=text):
            method.draw(*arguments)
        with pytest.raises(error, match=text):
            method.take_all(*arguments)


# ---- matching pursuit


def test_matching_pursuit_beats_medoids(backend: str) -> None:
    """Within each source, the weighted sum of few gradients is that of match_gradients, near the sum of all."""
    g = normal(40, 60) + 0.5
    method = fc.CoLM(20, top=None, keep_groups=[9], method="omp", normalize=False, backend=backend)
    coreset = method.select(g, LABELS)
    alone = fc.match_gradients(g[:37], 17, groups=LABELS[:37], method="omp", backend=backend)
    assert torch.equal(coreset.indices[3:], alone.indices)
    assert torch.equal(coreset.weights[3:], alone.weights)
    assert coreset.weights[:3].tolist() == [1, 1, 1]
    assert (coreset.weights > 0).all()
    assert coreset.info["represented"] == 40
    assert method.history is None
    medoids = fc.CoLM(20, top=None, keep_groups=[9], normalize=False, backend=backend).select(g, LABELS)
    errors = [
        fc.matching_error(g, found.indices, found.weights, total=found.info["represented"])
        for found in (coreset, medoids)
    ]
    assert errors[0] < errors[1] / 2


def test_matching_pursuit_of_updates() -> None:
    """With a history: the sums of the updates are matched, which are computed here by hand."""
    method = fc.CoLM(20, top=None, keep_groups=[9], method="omp")
    m = v = torch.zeros(60, dtype=torch.float64)
    for step in range(1, 4):
        g = normal(40, 60, seed=step) + 0.5
        u = (0.9 * m + 0.1 * g) / (1 - 0.9**step)
        u = u / (((0.999 * v + 0.001 * g.square()) / (1 - 0.999**step)).sqrt() + 1e-8)
        coreset = method.select(g, LABELS)
        for label in (0, 1, 2):
            own = coreset.indices[LABELS[coreset.indices] == label]
            weights = coreset.weights[LABELS[coreset.indices] == label]
            target = u[label == LABELS].sum(0)
            assert (weights @ u[own] - target).norm() < 0.7 * target.norm()
            assert (
                (weights @ u[own] - target) @ u[own].T
            ).abs().max() < 1e-6  # the best weights of these rows
        matched = coreset.indices[3:]
        m = 0.9 * m + 0.1 * g[matched].mean(0)
        v = 0.999 * v + 0.001 * g[matched].square().mean(0)
        torch.testing.assert_close(method.history.m, m)
        torch.testing.assert_close(method.history.v, v)


def test_matching_pursuit_along_one_direction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grads must differ in direction for method 'omp'.*backprop"):
        fc.CoLM(4, method="omp").select(low_rank(40, 0))
    several = fc.LowRankGradients(normal(40, 6), seed=0, numel=500)
    assert 0 < len(fc.CoLM(4, method="omp").select(several).indices) <= 4
    with pytest.raises(ValueError, match="gradients that cancel out in every source"):
        fc.CoLM(2, method="omp", normalize=False).select(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
