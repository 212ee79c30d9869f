"""The demo: its features, and that table and picture show what the run found."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from flashcoreset import cli, demo, demo_pruning


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.run()


@pytest.fixture(scope="module")
def pruning() -> demo_pruning.Pruning:
    return demo_pruning.run(splits=2)


def test_edge_features_of_one_edge() -> None:
    image = np.zeros((1, 8, 8))
    image[0, :, 4:] = 16  # brighter to the right: orientation 0 of 8, at columns 3 and 4
    features = demo.edge_features(image).reshape(4, 4, 8)
    inner = features[1:3]  # rows whose neighbours above and below are equal
    np.testing.assert_allclose(inner[:, 1, 0], math.sqrt(2), rtol=1e-6)  # column 3 of two rows, gradient 1
    np.testing.assert_allclose(inner[:, 2, 0], math.sqrt(2), rtol=1e-6)  # column 4
    assert np.count_nonzero(inner[:, :3]) == 4


def test_edge_features_share_a_gradient_between_two_orientations() -> None:
    ramp = np.add.outer(
        np.arange(8) * math.tan(math.pi / 8), np.arange(8)
    )  # 22.5 degrees: half way to the next
    cell = demo.edge_features(ramp[None]).reshape(4, 4, 8)[1, 1]
    np.testing.assert_allclose(cell[0], cell[1], rtol=1e-5)
    assert np.count_nonzero(np.round(cell, 6)) == 2


def test_split_is_disjoint_and_complete() -> None:
    labels = np.arange(10).repeat(100)
    target, test, openset = demo._split(labels, np.random.default_rng(0))
    everything = np.concatenate([target, test, openset])
    assert sorted(everything) == list(range(1000))
    for rows in (target, test):
        assert np.bincount(labels[rows], minlength=10)[list(demo.CLASSES)].tolist() == [demo.IN_TARGET] * 3
        assert len(rows) == 3 * demo.IN_TARGET


def test_methods_that_see_the_target_beat_those_that_do_not(result: demo.Result) -> None:
    outcomes = {outcome.name: outcome for outcome in result.outcomes}
    assert list(outcomes) == [
        "SimCore",
        "facility location, target as clients",
        "facility location of the open set",
        "random",
    ]
    for outcome in result.outcomes:
        assert len(set(outcome.picks.tolist())) == demo.PICKS
        assert len(outcome.purity) == len(outcome.accuracy) == len(outcome.seconds) == demo.SPLITS
        assert not set(outcome.picks) & set(result.target)
    # Three classes of ten, less what target and test took of them: random picks find about 18 % of the target's classes.
    assert 0.1 < np.mean(outcomes["random"].purity) < 0.26
    assert np.mean(outcomes["SimCore"].purity) > 0.9
    assert np.mean(outcomes["SimCore"].accuracy) > np.mean(outcomes["random"].accuracy) + 0.1
    assert np.mean(outcomes["facility location of the open set"].accuracy) > np.mean(
        outcomes["random"].accuracy
    )


def test_table_says_what_was_measured(result: demo.Result) -> None:
    lines = demo.table(result).splitlines()
    for outcome in result.outcomes:
        line = next(line for line in lines if line.startswith(outcome.name + " "))
        assert f"{100 * np.mean(outcome.purity):.1f} ± " in line
        assert f"{100 * np.mean(outcome.accuracy):.1f} ± " in line
        assert f"{1000 * np.median(outcome.seconds):.2f} ms" in line
    assert f"{result.open_rows:,} images" in lines[1]


def test_picture_frames_every_pick_by_its_class(result: demo.Result) -> None:
    stream = BytesIO()
    demo.draw(result, stream)
    stream.seek(0)
    pixels = (imread(stream, format="png")[..., :3] * 255).round().astype(int)
    inside = (pixels == (0x00, 0x72, 0xB2)).all(axis=-1).sum()
    outside = (pixels == (0xE6, 0x9F, 0x00)).all(axis=-1).sum()
    first = np.concatenate([outcome.picks[:20] for outcome in result.outcomes])
    fitting = np.isin(result.labels[first], demo.CLASSES).mean()
    assert inside / (inside + outside) == pytest.approx(fitting, abs=0.03)  # the legend has one of each


def test_ccs_keeps_accuracy_where_labels_are_wrong(pruning: demo_pruning.Pruning) -> None:
    mean = {key: float(np.mean(values)) for key, values in pruning.accuracy.items()}
    assert set(mean) == {
        (method, pruned) for method in demo_pruning.METHODS for pruned in demo_pruning.PRUNED
    }
    for pruned in demo_pruning.PRUNED:
        for method in demo_pruning.METHODS[1:]:
            assert mean["CCS", pruned] > mean[method, pruned], (method, pruned)
        assert np.mean(pruning.kept_flipped["CCS", pruned]) < 0.02
        assert np.mean(pruning.kept_flipped["random", pruned]) == pytest.approx(
            demo_pruning.FLIPPED, abs=0.06
        )
    # Hardest first keeps the wrong labels: at 90 % little else.
    assert np.mean(pruning.kept_flipped["hardest first", 0.9]) > 0.9
    assert float(pruning.flipped.double().mean()) == pytest.approx(demo_pruning.FLIPPED, abs=0.001)


def test_table_of_pruning_says_what_was_measured(pruning: demo_pruning.Pruning) -> None:
    lines = demo_pruning.table(pruning).splitlines()
    assert f"{100 * np.mean(pruning.whole):.1f} ± " in lines[1]
    for method in demo_pruning.METHODS:
        accuracies, shares = (line for line in lines if line.startswith(f"{method}  "))
        for pruned in demo_pruning.PRUNED:
            values = pruning.accuracy[method, pruned]
            assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f} %" in accuracies
            assert f"{100 * np.mean(pruning.kept_flipped[method, pruned]):.1f} %" in shares


def test_picture_of_the_strata_shows_their_counts(pruning: demo_pruning.Pruning) -> None:
    from matplotlib.figure import Figure

    import flashcoreset as fc

    axes = fc.plot.strata(pruning.coreset, Figure().add_subplot())
    sizes, taken = ([bar.get_height() for bar in bars] for bars in axes.containers)
    assert sizes == pruning.coreset.info["sizes"]
    assert taken == pruning.coreset.info["counts"]
    assert [bar.get_x() for bar in axes.containers[0]] == pruning.coreset.info["edges"][:-1]
    with pytest.raises(
        ValueError, match=r"one that ccs returned without groups, .* info with dropped, groups"
    ):
        fc.plot.strata(fc.ccs(range(6), 2, groups=[0, 1] * 3))
    with pytest.raises(TypeError, match="coreset must be a Coreset, got int"):
        fc.plot.strata(3)  # type: ignore[arg-type]
    stream = BytesIO()
    demo_pruning.draw(pruning, stream)
    stream.seek(0)
    pixels = (imread(stream, format="png")[..., :3] * 255).round().astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xBB, 0xBB, 0xBB), (0xE6, 0x9F, 0x00)):
        assert (pixels == colour).all(axis=-1).sum() > 5000


def test_command(
    tmp_path: Path,
    result: demo.Result,
    pruning: demo_pruning.Pruning,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "run", lambda: result)
    monkeypatch.setattr(demo_pruning, "run", lambda: pruning)
    first, second = tmp_path / "picture.png", tmp_path / "picture-ccs.png"
    assert cli.main(["demo", "--out", str(first)]) == 0
    out = capsys.readouterr().out
    assert out == (
        f"{demo.table(result)}\nfirst picks: {first}\n\n{demo_pruning.table(pruning)}\nstrata: {second}\n"
    )
    for picture in (first, second):
        assert picture.read_bytes().startswith(b"\x89PNG")
    second.unlink()
    second.mkdir()
    assert cli.main(["demo", "--out", str(first)]) == 2
    assert capsys.readouterr() == ("", f"flashcoreset: --out: {second} exists and is not a regular file\n")
