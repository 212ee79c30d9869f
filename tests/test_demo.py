"""The demo: its features, and that table and picture show the results of the run."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import flashcoreset as fc
from flashcoreset import cli, demo
from flashcoreset.demo import batches as demo_batches
from flashcoreset.demo import fits as demo_fits
from flashcoreset.demo import pruning as demo_pruning


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.run()


@pytest.fixture(scope="module")
def pruning() -> demo_pruning.Pruning:
    return demo_pruning.run(splits=2)


@pytest.fixture(scope="module")
def arms() -> dict[str, demo_batches.Arm]:
    return demo_batches.run(seeds=2)


@pytest.fixture(scope="module")
def fits() -> demo_fits.Fits:
    return demo_fits.run(trials=2)


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
        "GORACS, transport alone",
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
    for name in ("SimCore", "GORACS, transport alone"):
        assert np.mean(outcomes[name].purity) > 0.9
        assert np.mean(outcomes[name].accuracy) > np.mean(outcomes["random"].accuracy) + 0.1
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
        for method in demo_pruning.METHODS[2:]:
            assert mean["CCS", pruned] > mean[method, pruned], (method, pruned)
        # The cut-off does most of it: a random choice after the same is within a few points.
        assert abs(mean["CCS", pruned] - mean[demo_pruning.CONTROL, pruned]) < 0.06
        assert np.mean(pruning.kept_flipped["CCS", pruned]) < 0.02
        assert np.mean(pruning.kept_flipped["random", pruned]) == pytest.approx(
            demo_pruning.FLIPPED, abs=0.06
        )
    # Hardest first keeps the wrong labels: at 90 % little else.
    assert np.mean(pruning.kept_flipped["hardest first", 0.9]) > 0.9
    assert float(pruning.flipped.double().mean()) == pytest.approx(demo_pruning.FLIPPED, abs=0.001)


def test_no_cut_off_hurts_where_much_is_pruned_and_labels_are_right(pruning: demo_pruning.Pruning) -> None:
    mean = {key: float(np.mean(values)) for key, values in pruning.clean.items()}
    shares = demo_pruning.CLEAN_PRUNED
    assert set(mean) == {(method, pruned) for method in demo_pruning.CLEAN_METHODS for pruned in shares}
    assert mean["CCS", 0.9] > mean[demo_pruning.UNCUT, 0.9] + 0.1
    assert mean["random", 0.9] > mean[demo_pruning.UNCUT, 0.9] + 0.1
    assert abs(mean["CCS", 0.9] - mean[demo_pruning.CONTROL, 0.9]) < 0.06
    lines = demo_pruning.table(pruning).splitlines()
    assert f"{100 * np.mean(pruning.clean_whole):.1f} ± " in next(
        x for x in lines if x.startswith("With all")
    )
    line = next(x for x in lines if x.startswith(demo_pruning.UNCUT))
    for pruned in shares:
        assert f"{100 * mean[demo_pruning.UNCUT, pruned]:.1f} ± " in line


def test_table_of_pruning_says_what_was_measured(pruning: demo_pruning.Pruning) -> None:
    lines = demo_pruning.table(pruning).splitlines()
    assert f"{100 * np.mean(pruning.whole):.1f} ± " in lines[1]
    for method in demo_pruning.METHODS:
        accuracies, shares, *_ = (line for line in lines if line.startswith(f"{method}  "))
        for pruned in demo_pruning.PRUNED:
            values = pruning.accuracy[method, pruned]
            assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f} %" in accuracies
            assert f"{100 * np.mean(pruning.kept_flipped[method, pruned]):.1f} %" in shares


def test_picture_of_the_strata_shows_their_counts(pruning: demo_pruning.Pruning) -> None:
    from matplotlib.figure import Figure

    axes = fc.plot.strata(pruning.coreset, Figure().add_subplot(), scores=pruning.aum)
    sizes, taken, dropped = ([bar.get_height() for bar in bars] for bars in axes.containers)
    assert sizes == pruning.coreset.info["sizes"]
    assert taken == pruning.coreset.info["counts"]
    assert sum(dropped) == pruning.coreset.info["dropped"]
    assert [bar.get_x() for bar in axes.containers[0]] == pruning.coreset.info["edges"][:-1]
    stream = BytesIO()
    demo_pruning.draw(pruning, stream)
    stream.seek(0)
    pixels = (imread(stream, format="png")[..., :3] * 255).round().astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xCC, 0xCC, 0xCC), (0xE6, 0x9F, 0x00)):
        assert (pixels == colour).all(axis=-1).sum() > 5000


def test_sources_are_of_unequal_size_and_apart_from_the_test() -> None:
    (x, y, source), (test_x, test_y, test_source) = demo_batches.split(3)
    assert source.bincount().tolist() == [650, 120, 24]
    assert y.bincount().tolist() == [130] * 5 + [40] * 3 + [12] * 2
    assert test_y.bincount().tolist() == [demo_batches.HELD_OUT] * 10
    assert test_source.bincount().tolist() == [200, 120, 80]
    seen = {tuple(image) for image in x.tolist()}
    assert len(seen) == len(x)  # no two of the digits are equal
    assert not seen & {tuple(image) for image in test_x.tolist()}


@pytest.mark.parametrize("name", demo_batches.ARMS)
def test_rows_of_a_batch(name: str) -> None:
    """Halves keep the rare source whole if they should, and the control has CoLM's number of rows from each source."""
    (x, y, source), _ = demo_batches.split(0)
    rows = torch.cat([(source == label).nonzero()[:size, 0] for label, size in enumerate((50, 9, 5))])
    network = demo_batches.Network(torch.Generator().manual_seed(0))
    chosen = demo_batches.select_by(name, 0)(network, x[rows], y[rows], source[rows])
    assert len(chosen.unique()) == len(chosen)
    sizes = source[rows[chosen]].bincount(minlength=3).tolist()
    if name == demo_batches.WHOLE:
        assert sizes == [50, 9, 5]
    elif name == demo_batches.RANDOM:
        assert sum(sizes) == demo_batches.KEPT
    else:
        assert sizes == [22, 5, 5]


def test_gradients_that_colm_gets_are_those_of_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    select = fc.CoLM.select
    monkeypatch.setattr(fc.CoLM, "select", lambda self, g, groups: seen.append(g) or select(self, g, groups))
    (x, y, source), _ = demo_batches.split(0)
    x, y, source = x[::13], y[::13], source[::13]
    network = demo_batches.Network(torch.Generator().manual_seed(0))
    demo_batches.select_by(demo_batches.COLM, 0)(network, x, y, source)
    demo_batches.select_by(demo_batches.ZEROTH, 0)(network, x, y, source)
    weight = network.weights[2].requires_grad_()
    for row in (0, 30, 60):
        (expected,) = torch.autograd.grad(
            torch.nn.functional.cross_entropy(network(x[row : row + 1]), y[row : row + 1]), weight
        )
        torch.testing.assert_close(seen[0][row], expected.flatten(), rtol=1e-5, atol=1e-6)
        along = float(expected.flatten() @ seen[1].directions()[0])
        assert float(seen[1].coefficients[row, 0]) == pytest.approx(along, rel=0.02, abs=0.02)


def test_batches_that_keep_the_rare_source_beat_random_ones(arms: dict[str, demo_batches.Arm]) -> None:
    assert tuple(arms) == demo_batches.ARMS
    evaluations = demo_batches.STEPS // demo_batches.EVERY
    last = {}
    for name, arm in arms.items():
        assert np.shape(arm.loss) == np.shape(arm.accuracy) == (2, evaluations)
        assert len(arm.seconds) == 2 * demo_batches.STEPS
        assert np.mean(arm.loss, 0)[-1] < 0.3 * np.mean(arm.loss, 0)[0]
        last[name] = np.mean(arm.accuracy, 0)[-1]
        assert last[name] > 0.8
    assert last[demo_batches.QUOTAS] > last[demo_batches.RANDOM]


def test_table_of_batches_says_what_was_measured(arms: dict[str, demo_batches.Arm]) -> None:
    lines = demo_batches.table(arms).splitlines()
    ends = {name: np.array(arm.loss)[:, -1] for name, arm in arms.items()}
    for name, arm in arms.items():
        line = next(line for line in lines if line.startswith(f"{name}   "))
        assert f"{np.mean(ends[name]):.3f} ± {np.std(ends[name], ddof=1):.3f}" in line
        assert f"{100 * np.mean(np.array(arm.accuracy)[:, -1]):.1f} ± " in line
        assert (name == demo_batches.WHOLE) == ("ms" not in line)
    text = " ".join(lines)
    for words, other in (("random rows", "random"), ("random rows under its quotas", demo_batches.QUOTAS)):
        assert f"below that of {words} on {(ends['CoLM'] < ends[other]).sum()}" in text


def test_picture_of_batches_has_a_line_and_a_row_of_dots_for_each_way(
    arms: dict[str, demo_batches.Arm],
) -> None:
    stream = BytesIO()
    demo_batches.draw(arms, stream)
    stream.seek(0)
    pixels = (imread(stream, format="png")[..., :3] * 255).round().astype(int)
    for colour in (
        (0x99, 0x99, 0x99),
        (0x00, 0x72, 0xB2),
        (0x56, 0xB4, 0xE9),
        (0xE6, 0x9F, 0x00),
        (0xD5, 0x5E, 0x00),
    ):
        found = (pixels == colour).all(axis=-1)
        half = found.shape[1] * 3 // 5
        assert found[:, :half].sum() > 300
        assert found[:, half:].sum() > 100


def test_autocoreset_is_nearer_than_uniform_samples(fits: demo_fits.Fits) -> None:
    assert fits.rows == 569
    assert set(fits.errors) == {(name, k) for name in demo_fits.NAMES for k in demo_fits.SIZES}
    for k in demo_fits.SIZES:
        ours, best, uniform = (np.array(fits.errors[name, k]) for name in demo_fits.NAMES)
        assert ours.shape == best.shape == (2,)
        assert (ours < best).all()
        assert (best < uniform).all()
        assert ours.min() > -1e-3  # the fit on all ends within its solver's tolerance of the optimum
        assert min(fits.fits[k]) > 3
    assert np.mean(fits.errors["AutoCoreset", 300]) < 0.01


def test_table_and_picture_of_fits_show_what_was_measured(fits: demo_fits.Fits) -> None:
    lines = demo_fits.table(fits).splitlines()
    for name in demo_fits.NAMES:
        line = next(line for line in lines if line.startswith(name + " "))
        figures = [float(word) for word in line.removeprefix(name).split()]
        means = [np.mean(fits.errors[name, k]) for k in demo_fits.SIZES]
        np.testing.assert_allclose(figures, means, atol=5.1e-5)
    assert lines[-1].split()[1:] == [f"{np.mean(fits.fits[k]):.0f}" for k in demo_fits.SIZES]
    stream = BytesIO()
    demo_fits.draw(fits, stream)
    stream.seek(0)
    pixels = (imread(stream, format="png")[..., :3] * 255).round().astype(int)
    rows = [
        np.nonzero((pixels == colour).all(axis=-1))[0]
        for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73))
    ]
    medians = [np.median(found) for found in rows]
    assert medians[0] > medians[1] > medians[2]  # rows count from the top: the lower error lies lower


def test_command(
    tmp_path: Path,
    result: demo.Result,
    pruning: demo_pruning.Pruning,
    arms: dict[str, demo_batches.Arm],
    fits: demo_fits.Fits,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = tmp_path / "picture.png"
    expected, pictures = [], [first]
    for part, found, title, end in (
        (demo, result, "first picks", ""),
        (demo_pruning, pruning, "strata", "-ccs"),
        (demo_batches, arms, "training curves", "-colm"),
        (demo_fits, fits, "errors", "-autocoreset"),
    ):
        monkeypatch.setattr(part, "run", lambda found=found: found)
        pictures.append(tmp_path / f"picture{end}.png")
        expected.append(f"{part.table(found)}\n{title}: {pictures[-1]}\n")
    assert cli.main(["demo", "--out", str(first)]) == 0
    assert capsys.readouterr().out == "\n".join(expected)
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    second = pictures[2]
    second.unlink()
    second.mkdir()
    assert cli.main(["demo", "--out", str(first), "--force"]) == 2
    assert capsys.readouterr() == ("", f"flashcoreset: --out: {second} exists and is not a regular file\n")
