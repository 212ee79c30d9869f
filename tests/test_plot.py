"""Pictures: what is drawn is what was measured, on the Axes that were given."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

import flashcoreset as fc
from flashcoreset.plot.style import CYCLE

matplotlib.use("Agg")

X = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
SELECTION = fc.facility_location(X, 12, metric="euclidean")
SCORES = torch.cat([X[:, 0] + 2, X[:20, 1] - 3])
CCS = fc.ccs(SCORES, 50, mislabel_scores=SCORES, mislabel_ratio=0.1, n_strata=10)
SIMCORE = fc.simcore(X, X[:10] + 0.1, n_clusters=4)
AUTOCORESET = fc.autocoreset(X, X @ torch.arange(5.0) + X[:, 0] ** 2, "linear_regression", None, 30)
GORACS = fc.goracs(X, X[:30] + 0.1, k=6, max_exchanges=4)
TRANSPORT = fc.sinkhorn(X[:7], X[7:20], reg=1.0)
ROW = {"name": "a", "title": "a row", "peer": "a peer", "figure": "ratio", "value": 4.0}
RESULTS = {"rows": [ROW, ROW | {"name": "b", "value": 0.5}, ROW | {"name": "c", "figure": "products"}]}

PICTURES: dict[str, Callable[..., Any]] = {
    "gains": lambda **ax: fc.plot.gains(SELECTION, **ax),
    "coverage": lambda **ax: fc.plot.coverage(X, SELECTION, **ax),
    "strata": lambda **ax: fc.plot.strata(CCS, **ax),
    "descent": lambda **ax: fc.plot.descent(GORACS, **ax),
    "rounds": lambda **ax: fc.plot.rounds(SIMCORE, **ax),
    "losses": lambda **ax: fc.plot.losses(AUTOCORESET, **ax),
    "errors": lambda **ax: fc.plot.errors({"one": {10: [0.5, 0.1]}}, **ax),
    "plan": lambda **ax: fc.plot.plan(TRANSPORT, **ax),
    "interpolation": lambda **ax: fc.plot.interpolation(TRANSPORT, X[:7], X[7:20], **ax),
    "benchmarks": lambda **ax: fc.plot.benchmarks(RESULTS, **ax),
}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def axes() -> Any:
    return Figure().add_subplot()


def heights(ax: Any) -> dict[str, list[float]]:
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}


def test_all_functions_are_here() -> None:
    assert {*PICTURES, "elbow"} == set(fc.plot.__all__)


@pytest.mark.parametrize("name", PICTURES)
def test_each_draws_on_the_axes_that_it_gets_and_returns_them(name: str) -> None:
    ax = axes()
    assert PICTURES[name](ax=ax) is ax
    assert ax.has_data()
    ax.figure.canvas.draw()  # no warning, which would be an error
    new = PICTURES[name]()
    assert new is not ax
    assert new.get_xlabel()
    with pytest.raises(TypeError, match="ax must be a matplotlib Axes or None, got int"):
        PICTURES[name](ax=3)


@pytest.mark.parametrize("name", ["gains", "strata", "descent", "rounds", "losses"])
def test_what_is_counted_has_whole_ticks(name: str) -> None:
    ax = PICTURES[name](ax=axes())
    ticks = (ax.yaxis if name == "strata" else ax.xaxis).get_ticklocs()
    assert len(ticks) > 2
    assert np.array_equal(ticks, np.round(ticks))


def test_colours_differ_with_any_colour_vision_and_in_grey() -> None:
    """The published matrices of Machado, Oliveira and Fernandes (2009) for the two kinds of dichromacy of red and green, and luminance."""
    kinds = {
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }
    for matrix in kinds.values():
        seen = [np.clip(np.array(matrix) @ to_rgb(colour), 0, 1) for colour in CYCLE[:4]]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.2
    grey = [np.dot([0.2126, 0.7152, 0.0722], to_rgb(colour)) for colour in (CYCLE[0], CYCLE[1])]
    assert abs(grey[0] - grey[1]) > 0.2  # the two colours that stand beside each other everywhere


# --- choices --------------------------------------------------------------------------------------


def test_gains_from_the_second_pick_on() -> None:
    ax = fc.plot.gains(SELECTION, ax=axes())
    line = ax.get_lines()[0]
    assert line.get_xdata().tolist() == list(range(2, 13))
    np.testing.assert_array_equal(line.get_ydata(), SELECTION.gains[1:].double())
    found = fc.plot.elbow(SELECTION.gains)
    assert found is not None
    assert ax.get_lines()[2].get_xdata() == [found]
    assert f"elbow: {found} picks" in ax.get_legend().get_texts()[0].get_text()
    assert ax.get_ylim()[0] == 0
    assert f"{float(SELECTION.gains[0]):,.0f}" in ax.get_title(loc="left")


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([100, 10, 9, 8, 1, 0.9, 0.8], 5),  # the fifth pick is the first that gains little
        ([5, 8, 2, 1, 0], 3),
        ([9, 4, 3, 2, 1], None),  # a line
        ([9, 4, 3.9, 3.7, 1], None),  # above the line
        ([9, 1, 1, 1, 1], None),
        ([9, 3, 1, 3, 1], None),  # of two groups
        ([9, 3, 1], None),
    ],
)
def test_elbow(gains: list[float], expected: int | None) -> None:
    assert fc.plot.elbow(gains) == expected
    assert fc.plot.elbow(torch.tensor(gains, dtype=torch.float64)) == expected


def test_gains_that_rise_have_no_elbow() -> None:
    selection = fc.facility_location(X, groups=torch.arange(120) % 2, budgets=[4, 4], k=None)
    ax = fc.plot.gains(selection, ax=axes())
    assert ax.get_legend() is None
    assert len(ax.get_lines()) == 1


def test_coverage_draws_picks_as_large_as_their_weights_and_lines_to_them() -> None:
    x = X[:, :2]
    selection = fc.facility_location(x, 6, metric="euclidean")
    ax = fc.plot.coverage(x, selection, ax=axes())
    lines, points, picks = ax.collections
    np.testing.assert_allclose(points.get_offsets(), x)
    np.testing.assert_allclose(picks.get_offsets(), x[selection.indices])
    sizes = picks.get_sizes()
    assert np.argsort(sizes, kind="stable").tolist() == selection.weights.argsort(stable=True).tolist()
    segments = np.array(lines.get_segments())
    np.testing.assert_allclose(segments[:, 0], x)
    np.testing.assert_allclose(segments[:, 1], x[selection.indices[selection.assignment]])
    assert ax.get_xlabel() == "first coordinate"


def test_coverage_of_many_columns_is_by_principal_components() -> None:
    flat = torch.cat([X[:, :2] * torch.tensor([5.0, 2.0]), 1e-3 * X[:, 2:]], 1)
    for points in (flat, torch.cat([flat, torch.zeros(120, 400)], 1)):  # both ways to find them
        ax = fc.plot.coverage(points, [3, 4], ax=axes())
        drawn = np.array(ax.collections[0].get_offsets())
        centred = flat[:, :2] - flat[:, :2].mean(0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        np.testing.assert_allclose(np.abs(drawn), (centred @ directions.T).abs().numpy(), atol=1e-2)
        assert "principal component 1" in ax.get_xlabel()
    share = float(drawn[:, 0].var() / drawn.var(0).sum())
    assert f"{100 * share:.0f} %" in ax.get_xlabel()


def test_coverage_takes_other_clients_indices_and_one_column() -> None:
    selection = fc.facility_location(X, 4, clients=X[:9] + 1)
    ax = fc.plot.coverage(X, selection, clients=X[:9] + 1, ax=axes())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["points", "clients", "picks"]
    assert len(ax.collections[0].get_segments()) == 9
    assert len(fc.plot.coverage(X[:, :1], np.array([1, 5]), ax=axes()).collections) == 2
    fc.plot.coverage(X, SIMCORE, ax=axes())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fc.plot.gains(CCS), TypeError, "selection must be a Selection, got Coreset"),
        (lambda: fc.plot.gains(fc.facility_location(X, 1)), ValueError, "at least 2 picks, got 1"),
        (lambda: fc.plot.elbow([1.0, float("nan")]), ValueError, "gains must be finite"),
        (lambda: fc.plot.coverage(X, [120]), ValueError, "chosen must hold rows of the 120 points.*120"),
        (lambda: fc.plot.coverage(X, []), (TypeError, ValueError), "chosen"),
        (lambda: fc.plot.coverage(X, [1], clients=X[:, :2]), ValueError, "clients must have 5 columns"),
        (lambda: fc.plot.coverage(X / 0, [1]), ValueError, "points must be finite"),
        (lambda: fc.plot.strata(SIMCORE), ValueError, "one that ccs returned.*got info with"),
        (lambda: fc.plot.strata(3), TypeError, "coreset must be a Coreset, got int"),
        (lambda: fc.plot.strata(CCS, scores=SCORES[:50]), ValueError, "scores must be those that ccs got"),
        (lambda: fc.plot.strata(CCS, scores=-SCORES), ValueError, "scores .* must be those that ccs got"),
        (
            lambda: fc.plot.strata(CCS, mislabel_scores=SCORES),
            ValueError,
            "scores must be given with mislabel",
        ),
        (lambda: fc.plot.strata(CCS, scores=SCORES, groups=[0] * 140), ValueError, "groups must be None"),
        (lambda: fc.plot.rounds(CCS), ValueError, "one that simcore returned"),
        (lambda: fc.plot.losses(CCS), ValueError, "one that autocoreset returned"),
        (lambda: fc.plot.losses(AUTOCORESET, full=0), ValueError, "full must be > 0, got 0"),
        (lambda: fc.plot.errors({}), ValueError, "at least one way"),
        (lambda: fc.plot.errors({"a": {3: []}}), (TypeError, ValueError), "found"),
        (lambda: fc.plot.errors({"a": {3: [float("inf")]}}), ValueError, "must be finite"),
        (lambda: fc.plot.errors([1]), TypeError, "found must be a mapping"),
        (lambda: fc.plot.plan(X), TypeError, "transport must be a Transport, got Tensor"),
        (lambda: fc.plot.plan(TRANSPORT, problem=0), ValueError, "problem must be None"),
        (lambda: fc.plot.interpolation(TRANSPORT, X, X), ValueError, "which is 7 x 13, got 120 and 120"),
        (lambda: fc.plot.interpolation(TRANSPORT, X[:7], X[:13], times=[2]), ValueError, r"in \[0, 1\]"),
        (lambda: fc.plot.benchmarks(3), TypeError, "results must be a path"),
        (lambda: fc.plot.benchmarks({"rows": []}), ValueError, "got none"),
        (lambda: fc.plot.benchmarks({}), ValueError, "must have rows"),
        (lambda: fc.plot.benchmarks(RESULTS, rows=["c"]), ValueError, "rows must be among a, b, got c"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# --- methods --------------------------------------------------------------------------------------


def test_strata_with_scores_leave_nobody_out() -> None:
    ax = fc.plot.strata(CCS, axes(), scores=SCORES)
    found = heights(ax)
    assert found["left out"] == CCS.info["sizes"]
    assert found["taken"] == CCS.info["counts"]
    dropped = np.sort(SCORES)[:14]
    assert sum(found["dropped first"]) == 14
    bars = ax.containers[2]
    for bar in bars:  # below the strata, as wide as these, where the scores are
        low, high = bar.get_x(), bar.get_x() + bar.get_width()
        assert high <= CCS.info["edges"][0] + 1e-9
        assert bar.get_height() == ((dropped >= low - 1e-9) & (dropped < high - 1e-9)).sum()


def test_strata_without_scores_have_one_bar_for_the_dropped() -> None:
    ax = fc.plot.strata(CCS, axes())
    assert heights(ax)["dropped first"] == [14]
    assert ax.containers[2][0].get_x() < CCS.info["edges"][0]
    assert "dropped" in [text.get_text() for text in ax.texts]


def test_dropped_inside_the_range_stand_on_the_strata() -> None:
    """Dropped by other scores than those of the strata."""
    suspects = X[:, 3]
    coreset = fc.ccs(X[:, 0], 40, mislabel_scores=suspects, mislabel_ratio=0.2, n_strata=6)
    ax = fc.plot.strata(coreset, axes(), scores=X[:, 0], mislabel_scores=suspects)
    sizes, dropped = ax.containers[0], ax.containers[2]
    assert sum(bar.get_height() for bar in dropped) == 24
    tops = {round(bar.get_x(), 6): bar.get_height() for bar in sizes}
    inside = [bar for bar in dropped if round(bar.get_x(), 6) in tops]
    assert len(inside) > 2
    assert all(bar.get_y() == tops[round(bar.get_x(), 6)] for bar in inside)
    low = X[:, 0][suspects.argsort()[:24]]
    drawn = np.repeat(
        [bar.get_x() + bar.get_width() / 2 for bar in dropped], [int(bar.get_height()) for bar in dropped]
    )
    width = dropped[0].get_width()
    np.testing.assert_allclose(drawn, np.sort(low), atol=width / 2 + 1e-6)


def test_infinite_scores_have_a_bar_of_their_own() -> None:
    forgetting = torch.cat([torch.arange(40.0) % 5, torch.full((12,), torch.inf)])
    coreset = fc.ccs(forgetting, 20, n_strata=5, mislabel_ratio=0)
    ax = fc.plot.strata(coreset, axes(), scores=forgetting)
    found = heights(ax)
    assert found["left out"] == [8, 8, 8, 8, 8, 12]
    assert sum(found["taken"]) == 20
    assert found["taken"][-1] == int(forgetting[coreset.indices].isinf().sum())
    bars = ax.containers[0]
    assert bars[-1].get_x() > bars[-2].get_x() + bars[-2].get_width()
    assert "inf" in [text.get_text() for text in ax.texts]


def test_strata_of_groups_are_rows() -> None:
    labels = np.arange(140) % 3 * 10
    coreset = fc.ccs(SCORES, 60, mislabel_scores=SCORES, mislabel_ratio=0.1, groups=labels, n_strata=8)
    ax = fc.plot.strata(coreset, axes(), scores=SCORES, groups=labels)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "10", "20"]
    rows = [bars for bars in ax.containers if bars[0].get_y() in (0, 1, 2) and len(bars) == 8]
    assert len(rows) == 6
    sizes = [np.array([bar.get_height() for bar in bars]) for bars in rows[::2]]
    scale = sizes[0].max() / max(coreset.info["groups"][0]["sizes"])
    for drawn, info in zip(sizes, coreset.info["groups"].values(), strict=True):
        np.testing.assert_allclose(drawn, scale * np.array(info["sizes"]))
    texts = [text.get_text() for text in ax.texts]
    assert any(text.endswith("4 dropped") for text in texts)
    with pytest.raises(
        ValueError, match="scores and groups must be given where samples of groups were dropped"
    ):
        fc.plot.strata(coreset, axes())
    with pytest.raises(ValueError, match="groups must be given with scores"):
        fc.plot.strata(coreset, axes(), scores=SCORES)
    whole = fc.ccs(SCORES, 60, mislabel_ratio=0, groups=labels, n_strata=8)
    assert len(fc.plot.strata(whole, axes()).get_yticklabels()) == 3


@pytest.mark.parametrize("kind", ["quantile", "log"])
def test_other_strata(kind: str) -> None:
    scores = X[:, 0].exp()
    coreset = fc.ccs(scores, 40, mislabel_scores=X[:, 3], mislabel_ratio=0.1, n_strata=8, strata=kind)
    for given in ({}, {"scores": scores, "mislabel_scores": X[:, 3]}):
        ax = fc.plot.strata(coreset, axes(), **given)
        assert heights(ax)["left out"] == coreset.info["sizes"]
        assert sum(heights(ax)["dropped first"]) == 12
        widths = np.array([bar.get_width() for bar in ax.containers[0]])
        if kind == "log":
            assert ax.get_xscale() == "log"
            np.testing.assert_allclose(widths[1:] / widths[:-1], widths[1] / widths[0], rtol=1e-6)
        else:
            assert set(widths) == {1.0}
            assert ax.get_xticklabels()[0].get_text() == f"{coreset.info['edges'][0]:.3g}"


def test_equal_scores_are_one_bar() -> None:
    ax = fc.plot.strata(fc.ccs([2.0] * 30, 10, n_strata=4, mislabel_ratio=0), axes())
    assert heights(ax) == {"left out": [30], "taken": [10]}


def test_descent_begins_at_nought() -> None:
    ax = fc.plot.descent(GORACS, ax=axes())
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] > max(GORACS.info["scores"])


def test_rounds_show_the_threshold_and_what_fell_below() -> None:
    info = SIMCORE.info
    ax = fc.plot.rounds(SIMCORE, ax=axes())
    values, threshold, reference, dropped = ax.get_lines()
    assert values.get_ydata().tolist() == info["values"]
    assert set(threshold.get_ydata()) == {info["threshold"]}
    assert reference.get_ydata() == [info["values"][info["patience"] - 1]]
    assert dropped.get_xdata() == [len(info["values"]) + 1]
    assert dropped.get_ydata() == [info["dropped_value"]]
    assert info["dropped_value"] < info["threshold"]
    whole = fc.simcore(X, X[:10], 20, n_clusters=4, stop=False)
    assert len(fc.plot.rounds(whole, ax=axes()).get_lines()) == 1


def test_losses_and_the_error_that_they_are() -> None:
    info = AUTOCORESET.info
    ax = fc.plot.losses(AUTOCORESET, ax=axes())
    first, later, kept = ax.collections
    drawn = np.concatenate([first.get_offsets(), later.get_offsets()])
    np.testing.assert_allclose(drawn[:, 1], info["losses"])
    assert len(first.get_offsets()) == len(info["losses"]) - info["rounds"] == 3
    np.testing.assert_allclose(kept.get_offsets(), [[info["best"] + 1, info["loss"]]])
    full = info["loss"]  # so that the best error is 0, which no logarithm has
    ax = fc.plot.losses(AUTOCORESET, full=full, ax=axes())
    assert ax.get_yscale() == "symlog"
    np.testing.assert_allclose(ax.collections[2].get_offsets()[0, 1], 0)


def test_errors_of_nought_and_below_are_drawn_where_they_are() -> None:
    ax = fc.plot.errors({"a": {10: [0.1, 0.3], 20: [0.0, -1e-6]}, "b": {10: [1.0], 20: [0.5]}}, ax=axes())
    assert ax.get_yscale() == "symlog"
    line = next(line for line in ax.get_lines() if line.get_label() == "a")
    np.testing.assert_allclose(line.get_ydata(), [0.2, -5e-7])
    low, high = ax.get_ylim()
    assert low < -1e-6
    assert high > 1
    positions = ax.transData.transform([(10, y) for y in (-1e-6, 0, 0.1, 1)])[:, 1]
    assert (np.diff(positions) > 0).all()
    assert ax.get_xticks().tolist() == [10, 20]
    assert fc.plot.errors({"b": {10: [1.0], 20: [0.5]}}, ax=axes()).get_yscale() == "log"


# --- transport and benchmarks ---------------------------------------------------------------------


def test_plan_shows_its_masses() -> None:
    ax = fc.plot.plan(TRANSPORT, ax=axes())
    np.testing.assert_allclose(ax.images[0].get_array(), TRANSPORT.plan().double(), rtol=1e-6)
    large = fc.sinkhorn(X, X.repeat(5, 1), reg=5.0)
    drawn = fc.plot.plan(large, ax=axes()).images[0].get_array()
    assert drawn.shape == (120, 400)
    assert float(drawn.sum()) == pytest.approx(1, abs=1e-4)


def test_plans_of_batches() -> None:
    batch = fc.sinkhorn(X[:30].reshape(3, 10, 5), X[30:60].reshape(3, 10, 5), reg=1.0)
    ax = fc.plot.plan(batch, problem=1, ax=axes())
    np.testing.assert_allclose(ax.images[0].get_array(), batch.plan()[1].double(), rtol=1e-6)
    for problem, error in ((None, ValueError), (3, ValueError), (True, TypeError)):
        with pytest.raises(error, match="problem must be"):
            fc.plot.plan(batch, problem=problem)


def test_interpolation_ends_at_the_means_of_the_plan() -> None:
    x, y = X[:7, :2], X[7:20, :2]
    transport = fc.sinkhorn(x, y, reg=0.5)
    ax = fc.plot.interpolation(transport, x, y, times=(0, 0.5, 1), ax=axes())
    _, ends, *moments = (np.array(drawn.get_offsets()) for drawn in ax.collections)
    np.testing.assert_allclose(ends, y)
    np.testing.assert_allclose(moments[0], x, atol=1e-6)
    goal = transport.apply(y) / transport.plan().sum(1, keepdim=True)
    np.testing.assert_allclose(moments[2], goal, atol=1e-5)
    np.testing.assert_allclose(moments[1], (x + goal) / 2, atol=1e-5)
    # A row without mass goes nowhere.
    weights = torch.tensor([0.0, *[1 / 6] * 6])
    ax = fc.plot.interpolation(fc.sinkhorn(x, y, weights, reg=0.5), x, y, times=[0], ax=axes())
    assert len(ax.collections[2].get_offsets()) == 6


def test_benchmarks_from_files(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RESULTS))
    (tmp_path / "two.json").write_text(json.dumps({"rows": [ROW | {"name": "d", "value": 120.0}]}))
    ax = fc.plot.benchmarks(tmp_path, ax=axes())
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert ends == [4.0, 0.5, 120.0]
    assert [text.get_text() for text in ax.texts] == ["4x", "0.5x", "120x"]
    assert len({to_hex(bar.get_facecolor()) for bar in ax.patches}) == 2
    assert ax.get_xscale() == "log"
    assert (
        fc.plot.benchmarks(str(tmp_path / "one.json"), rows=["b"], ax=axes()).get_yticklabels()[0].get_text()
        == "a row; a peer"
    )
    with pytest.raises(ValueError, match=r"a folder of files \.json"):
        fc.plot.benchmarks(tmp_path / "..", ax=axes())
