"""The command line: the files it writes, and that bad input ends with code 2, one line on stderr and no file."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

import flashcoreset as fc
from flashcoreset import cli
from flashcoreset._core.dispatch import FAMILIES
from flashcoreset.cli import select
from flashcoreset.cli.errors import CommandError
from flashcoreset.cli.files_in import load_array
from flashcoreset.cli.files_out import Output, write_whole

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def features(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return tmp_path / "x.npy"


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays, json.loads(str(arrays.pop("info")))


def expect_error(capsys: pytest.CaptureFixture[str], words: str, *arguments: object) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flashcoreset: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err, captured.err


# --- what select writes -------------------------------------------------------------------------------


def test_facility_location(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npz"
    assert run("select", "facility-location", "--features", features, "-k", 7, "-o", out) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 7 of 60 rows in ")
    arrays, info = read(out)
    expected = fc.facility_location(np.load(features), 7)
    assert arrays["indices"].dtype == np.int64
    for name in ("indices", "gains", "weights", "assignment"):
        np.testing.assert_array_equal(arrays[name], getattr(expected, name).numpy())
    assert info["algorithm"] == "facility-location"
    assert info["version"] == fc.__version__
    assert info["objective"] == expected.objective
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_every_option_of_facility_location(features: Path, tmp_path: Path) -> None:
    x = np.load(features)
    rng = np.random.default_rng(1)
    weights, groups = rng.random(60), rng.integers(0, 3, 60)
    np.savez(tmp_path / "more.npz", weights=weights, groups=groups, preselected=np.array([4, 9]))
    more, out = tmp_path / "more.npz", tmp_path / "out.npz"
    code = run(
        *("select", "facility-location", "--features", features, "-o", out, "--metric", "euclidean"),
        *("--weights", f"{more}:weights", "--groups", f"{more}:groups", "--budgets", "0=2,1=3,2=1"),
        *("--preselected", f"{more}:preselected", "--method", "stochastic", "--epsilon", "0.2", "--seed", 3),
        *("--offset", 9, "--backend", "torch", "--memory-budget", 10_000),
    )
    assert code == 0
    expected = fc.facility_location(
        x,
        None,
        metric="euclidean",
        weights=weights,
        groups=groups,
        budgets={0: 2, 1: 3, 2: 1},
        preselected=[4, 9],
        method="stochastic",
        epsilon=0.2,
        seed=3,
        offset=9.0,
        backend="torch",
    )
    arrays, info = read(out)
    np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
    np.testing.assert_array_equal(arrays["weights"], expected.weights.numpy())
    assert info["offset"] == 9


def test_limits_of_facility_location(features: Path, tmp_path: Path) -> None:
    x, rng = np.load(features), np.random.default_rng(1)
    groups, costs, mask = rng.integers(0, 3, 60), 0.5 + rng.random(60), rng.random(60) < 0.2
    np.savez(tmp_path / "more.npz", groups=groups, costs=costs, mask=mask)
    more, out = tmp_path / "more.npz", tmp_path / "out.npz"
    command = ("select", "facility-location", "--features", features, "--metric", "euclidean", "-o", out)

    def check(options: tuple[object, ...], k: int | None, **expected: object) -> None:
        assert run(*command, "--force", *options) == 0
        arrays, found = read(out)[0], fc.facility_location(x, k, metric="euclidean", **expected)
        np.testing.assert_array_equal(arrays["indices"], found.indices.numpy())
        np.testing.assert_array_equal(arrays["gains"], found.gains.numpy())
        if found.rounds is not None:
            np.testing.assert_array_equal(arrays["rounds"], found.rounds.numpy())

    check(("--costs", f"{more}:costs", "--cost-budget", 6.5), None, costs=costs, cost_budget=6.5)
    cheap = ("--costs", f"{more}:costs", "--cost-budget", 6.5, "--plain-gains")
    check(cheap, None, costs=costs, cost_budget=6.5, cost_sensitive=False)
    check(
        ("--groups", f"{more}:groups", "--caps", "0=1,2=2", "--exclude", f"{more}:mask", "-k", 9), 9,
        groups=groups, caps={0: 1, 2: 2}, exclude=mask,
    )  # fmt: skip
    check(("--min-distance", 0.8, "-k", 12), 12, min_distance=0.8)
    check(("--stop-gain", 0.5), None, stop_gain=0.5)
    np.save(tmp_path / "mask.npy", mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(("--exclude", tmp_path / "mask.npy", "-k", 9), 9, exclude=mask)
    table = tmp_path / "none.csv"
    assert run(*command[:-1], table, "--stop-gain", 1e9) == 0
    assert table.read_text() == "index,weight,gain\n"
    clients = tmp_path / "c.npy"
    np.save(clients, x[:7] + np.float32(0.1))
    check(("--clients", clients, "--rounds", 3, "-k", 12), 12, clients=np.load(clients), rounds=3)


@pytest.mark.parametrize("option", ["--target", "--clients"])
def test_clients(option: str, features: Path, tmp_path: Path) -> None:
    clients = np.load(features)[10:30] + np.float32(0.1)
    np.save(tmp_path / "c.npy", clients)
    out = tmp_path / "out.npz"
    assert (
        run(
            *("select", "facility-location", "--features", features, option, tmp_path / "c.npy"),
            *("-k", 4, "-o", out),
        )
        == 0
    )
    expected = fc.facility_location(np.load(features), 4, clients=clients)
    np.testing.assert_array_equal(read(out)[0]["indices"], expected.indices.numpy())


def test_precomputed_distance(tmp_path: Path) -> None:
    d, out = np.random.default_rng(2).random((12, 9)), tmp_path / "out.npz"
    np.save(tmp_path / "d.npy", d)
    command = ("select", "facility-location", "--features", tmp_path / "d.npy", "-k", 3, "-o", out)
    assert run(*command, "--metric", "precomputed_distance", "--offset", 2) == 0
    arrays, info = read(out)
    expected = fc.facility_location(2 - d, 3, metric="precomputed")
    np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
    assert (info["offset"], info["objective"]) == (2, pytest.approx(expected.objective, rel=1e-12))


@pytest.mark.parametrize("sparse", [False, True])
def test_precomputed(sparse: bool, tmp_path: Path) -> None:
    s = np.random.default_rng(2).random((12, 9))
    s[s < 0.5] = 0
    if sparse:
        scipy.sparse.save_npz(tmp_path / "s.npz", scipy.sparse.csr_matrix(s))
    else:
        np.savez(tmp_path / "s.npz", s)
    out = tmp_path / "out.npz"
    code = run(
        *("select", "facility-location", "--features", tmp_path / "s.npz", "--metric", "precomputed"),
        *("-k", 3, "-o", out),
    )
    assert code == 0
    expected = fc.facility_location(s, 3, metric="precomputed")
    np.testing.assert_array_equal(read(out)[0]["indices"], expected.indices.numpy())


def test_budgets_from_a_file(features: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", np.arange(60) % 2)
    np.save(tmp_path / "b.npy", np.array([1, 2]))
    out = tmp_path / "out.npz"
    code = run(
        *("select", "facility-location", "--features", features, "--groups", tmp_path / "g.npy"),
        *("--budgets", tmp_path / "b.npy", "-o", out),
    )
    assert code == 0
    assert (read(out)[0]["indices"] % 2).tolist() == [0, 1, 1]


def test_simcore(features: Path, tmp_path: Path) -> None:
    x = np.load(features)
    np.save(tmp_path / "t.npy", x[:9])
    out = tmp_path / "out.npz"
    code = run(
        *("select", "simcore", "--features", features, "--target", tmp_path / "t.npy", "-k", 20, "-o", out),
        *("--n-clusters", 4, "--stop-threshold", "0.5", "--patience", 1, "--seed", 5),
    )
    assert code == 0
    expected = fc.simcore(x, x[:9], 20, n_clusters=4, stop_threshold=0.5, patience=1, seed=5)
    arrays, info = read(out)
    np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
    np.testing.assert_array_equal(arrays["weights"], expected.weights.numpy())
    np.testing.assert_array_equal(arrays["centroids"], expected.info["centroids"].numpy())
    for name in ("similarity", "centroid"):
        np.testing.assert_array_equal(arrays[name], expected.info[name].numpy())
    assert info["rounds"] == expected.info["rounds"]
    assert info["values"] == list(expected.info["values"])
    common = ("select", "simcore", "--features", features, "--force", "-o", out)
    assert run(*common, "--centroids", tmp_path / "t.npy", "--ratio", 0.2, "--no-stop") == 0
    expected = fc.simcore(x, centroids=x[:9], ratio=0.2, stop=False)
    np.testing.assert_array_equal(read(out)[0]["indices"], expected.indices.numpy())
    options = ("--target", tmp_path / "t.npy", "-k", 9, "--n-clusters", 3, "--fit-on", 5)
    assert run(*common, *options) == 0
    expected = fc.simcore(x, x[:9], 9, n_clusters=3, fit_on=5)
    np.testing.assert_array_equal(read(out)[0]["centroids"], expected.info["centroids"].numpy())


def test_bad_input_of_simcore(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("select", "simcore", "--features", features, "-o", tmp_path / "out.npz")
    target = ("--target", features)
    for words, arguments in (
        ("one of target and centroids must be given, got both", (*target, "--centroids", features)),
        ("--target: the target's features are missing (only --centroids", ()),
        ("ratio must be in (0, 1], got 1.5", (*target, "--ratio", 1.5)),
        ("ratio must be None where k is given", (*target, "--ratio", 0.5, "-k", 3)),
        ("fit_on must be >= n_clusters=100, got 3", (*target, "--fit-on", 3)),
        ("--centroids: no such file", ("--centroids", tmp_path / "none.npy")),
    ):
        expect_error(capsys, words, *command, *arguments)


def test_goracs(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.load(features)
    files = {"valid": x[:11] + np.float32(0.1), "norms": np.linspace(0, 1, len(x))}
    files |= {"labels": np.arange(len(x)) % 2, "own": np.arange(11) % 2}
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    out = tmp_path / "out.npz"
    options = ("select", "goracs", "--train", features, "--valid", tmp_path / "valid.npy", "-o", out)
    norms = ("--grad-norms", tmp_path / "norms.npy")
    assert run(*options, *norms, "-k", 5, "--lam", "0.2", "--max-exchanges", 3, "--n-candidates", 4) == 0
    expected = fc.goracs(x, files["valid"], files["norms"], 5, lam=0.2, max_exchanges=3, n_candidates=4)
    arrays, info = read(out)
    np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
    np.testing.assert_array_equal(arrays["weights"], expected.weights.numpy())
    assert info["scores"] == expected.info["scores"]
    labels = ("--train-labels", tmp_path / "labels.npy", "--valid-labels", tmp_path / "own.npy")
    assert run(*options, *norms, *labels, "-k", 5, "--force") == 0
    assert read(out)[1]["budgets"] == {"0": 3, "1": 2}
    more = ("--lam", 0.2, "--norm-clip", 0.9, "--norm-scale", "spread", "--scaling", "global", "--tol", 0.01)
    more += ("--max-solves", 2, "--time-limit", 60)
    assert run(*options, *norms, *labels, *more, "-k", 5, "--force") == 0
    expected = fc.goracs(
        x, files["valid"], files["norms"], 5, lam=0.2, norm_clip=0.9, norm_scale="spread", scaling="global", tol=0.01,
        max_solves=2, train_labels=files["labels"], valid_labels=files["own"],
    )  # fmt: skip
    np.testing.assert_array_equal(read(out)[0]["indices"], expected.indices.numpy())
    assert run(*options, "-k", 5, "--force") == 0
    expected = fc.goracs(x, files["valid"], k=5)
    np.testing.assert_array_equal(read(out)[0]["indices"], expected.indices.numpy())
    capsys.readouterr()
    for words, arguments in (
        ("grad_norms must be given with lam=0.5, got None", ("--lam", 0.5)),
        ("norm_clip must be in (0, 1], got 2.0", (*norms, "--norm-clip", 2)),
        ("max_solves must be >= 1, got 0", ("--max-solves", 0)),
        ("time_limit must be > 0 seconds, got -1.0", ("--time-limit", -1)),
        ("tol must be >= 0, got -0.5", ("--tol", -0.5)),
    ):
        expect_error(capsys, words, *options, *arguments, "-k", 5, "--force")
    assert run(*options, "--grad-norms", features, "-k", 5, "--force") == 2
    assert "--grad-norms: expected a real array [train rows]" in capsys.readouterr().err
    assert run(*options, *norms) == 2
    assert "-k" in capsys.readouterr().err


def test_ccs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    scores, aum, labels = rng.standard_normal(60), rng.standard_normal(60), rng.integers(0, 3, 60)
    np.savez(tmp_path / "s.npz", el2n=scores, aum=aum, labels=labels)
    file, out = tmp_path / "s.npz", tmp_path / "out.npz"
    command = ("select", "ccs", "--scores", f"{file}:el2n", "-o", out)
    assert run(*command, "-k", 20, "--mislabel-ratio", 0) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 20 of 60 rows in ")
    arrays, info = read(out)
    np.testing.assert_array_equal(arrays["indices"], fc.ccs(scores, 20, mislabel_ratio=0).indices.numpy())
    np.testing.assert_array_equal(arrays["weights"], np.ones(20))
    assert (info["algorithm"], sum(info["counts"]), len(info["edges"])) == ("ccs", 20, 51)
    options = ("--mislabel-scores", f"{file}:aum", "--mislabel-ratio", 0.2, "--n-strata", 4, "--seed", 5)
    assert run(*command, "-k", 9, *options, "--groups", f"{file}:labels", "--force") == 0
    arrays, info = read(out)
    expected = fc.ccs(scores, 9, mislabel_scores=aum, mislabel_ratio=0.2, n_strata=4, seed=5, groups=labels)
    np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
    assert info["groups"]["2"] == expected.info["groups"][2]
    options = ("--mislabel-scores", f"{file}:aum", "--strata", "quantile", "--n-strata", 5)
    assert run(*command, "-k", 6, *options, "--force") == 0
    arrays, info = read(out)
    expected = fc.ccs(scores, 6, mislabel_scores=aum, strata="quantile", n_strata=5)
    np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
    assert (info["mislabel_ratio"], info["mislabel_ratio_from"]) == (0.3, "published")


def test_bad_input_of_ccs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "s.npy", np.arange(6.0))
    np.save(tmp_path / "nan.npy", np.array([0.0, np.nan]))
    np.save(tmp_path / "matrix.npy", np.zeros((6, 2)))
    out = tmp_path / "out.npz"
    command = ("select", "ccs", "-o", out, "--scores")
    file = tmp_path / "s.npy"
    for words, arguments in (
        ("k must be <= the 6 samples, got 7", (file, "-k", 7)),
        (
            "k must be <= the 3 samples that",
            (file, "-k", 4, "--mislabel-ratio", 0.5, "--mislabel-scores", file),
        ),
        ("mislabel_scores must be given", (file, "-k", 2, "--mislabel-ratio", 0.5)),
        ("mislabel_ratio must be in [0, 1), got 1.0", (file, "-k", 2, "--mislabel-ratio", 1)),
        ("n_strata must be >= 1, got 0", (file, "-k", 2, "--n-strata", 0)),
        ("scores must not be NaN, got NaN at position 1", (tmp_path / "nan.npy", "-k", 1)),
        ("--scores: expected a real array [samples], got float64 [6, 2]", (tmp_path / "matrix.npy", "-k", 1)),
        ("--groups: expected an integer array [samples], got float64 [6]", (file, "-k", 1, "--groups", file)),
        ("--mislabel-scores: no such file", (file, "-k", 1, "--mislabel-scores", tmp_path / "none.npy")),
        ("--scores: no such file", (tmp_path / "none.npy", "-k", 1)),
        ("required: -k", (file,)),
        ("is also an input", (out, "-k", 1)),
    ):
        if arguments[0] == out:
            np.savez(out, s=np.arange(3.0))
        expect_error(capsys, words, *command, *arguments)


def test_autocoreset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((120, 3)), rng.integers(0, 2, 120)
    y = x @ np.arange(3.0) + rng.standard_normal(120)
    np.savez(tmp_path / "d.npz", x=x, y=y, labels=labels)
    file, out = tmp_path / "d.npz", tmp_path / "out.npz"
    command = ("select", "autocoreset", "--features", f"{file}:x", "-o", out, "-k", 25, "--force")
    assert run(*command, "--targets", f"{file}:y", "--model", "linear_regression") == 0
    assert capsys.readouterr().out.startswith(f"{out}: 25 of 120 rows in ")
    arrays, info = read(out)
    expected = fc.autocoreset(x, y, "linear_regression", None, 25)
    np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
    np.testing.assert_array_equal(arrays["weights"], expected.weights.numpy())
    assert (info["algorithm"], info["model"]) == ("autocoreset", "linear_regression")
    assert info["losses"] == expected.info["losses"]
    options = (
        "--method",
        "importance",
        "--n-initial",
        2,
        "--patience",
        4,
        "--seed",
        7,
        "--groups",
        f"{file}:labels",
    )
    assert run(*command, "--targets", f"{file}:labels", "--model", "linear_svm", *options) == 0
    expected = fc.autocoreset(
        x, labels, "linear_svm", None, 25, method="importance", n_initial=2, patience=4, seed=7, groups=labels
    )
    np.testing.assert_array_equal(read(out)[0]["indices"], expected.indices.numpy())
    assert run(*command, "--model", "kmeans") == 0
    capsys.readouterr()
    for words, arguments in (
        ("--targets: linear_svm needs the targets", ("--model", "linear_svm")),
        (
            "--targets: expected a real array [rows], got float64 [120, 3]",
            ("--model", "linear_svm", "--targets", f"{file}:x"),
        ),
        ("--groups: expected an integer array", ("--model", "kmeans", "--groups", f"{file}:y")),
        ("n_initial must be >= 1, got 0", ("--model", "kmeans", "--n-initial", 0)),
        ("invalid choice: 'svm'", ("--model", "svm")),
    ):
        expect_error(capsys, words, *command, *arguments)


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    """Three batches of gradients, g0 to g2, one of coefficients, and the rows' sources."""
    rng = np.random.default_rng(0)
    arrays = {f"g{step}": rng.standard_normal((40, 90)).astype(np.float32) for step in range(3)}
    labels = np.array([0] * 20 + [1] * 14 + [7] * 6)
    np.savez(tmp_path / "b.npz", c=rng.standard_normal((40, 1)), labels=labels, **arrays)
    return tmp_path / "b.npz"


def test_colm_step_by_step(batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state file carries the history from call to call, in its own place or another, as one CoLM does."""
    method = fc.CoLM(16, top=30, keep_groups=[7])
    state = tmp_path / "state.npz"
    data = np.load(batches)
    for step in range(3):
        out = tmp_path / f"out{step}.npz"
        given = () if step == 0 else ("--state", state)
        code = run(
            *("select", "colm", "--gradients", f"{batches}:g{step}", "--groups", f"{batches}:labels"),
            *("--keep-groups", "7", "-k", 16, "--top", 30, *given, "--save-state", state, "-o", out),
        )
        assert code == 0
        assert capsys.readouterr().out.startswith(f"{out}: 16 of 40 rows in ")
        expected = method.select(data[f"g{step}"], data["labels"])
        arrays, info = read(out)
        np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
        np.testing.assert_array_equal(arrays["weights"], expected.weights.numpy())
        np.testing.assert_array_equal(arrays["dims"], expected.info["dims"].numpy())
        assert (info["algorithm"], info["kept"], info["step"]) == ("colm", 6, step + 1)
        assert info["budgets"] == {str(label): n for label, n in expected.info["budgets"].items()}
        with np.load(state) as saved:
            np.testing.assert_array_equal(saved["m"], method.history.m.numpy())
            np.testing.assert_array_equal(saved["v"], method.history.v.numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("b.npz", "out0.npz", "out1.npz", "out2.npz", "state.npz")
    ]


def test_every_option_of_colm(batches: Path, tmp_path: Path) -> None:
    out, first, second = tmp_path / "out.npz", tmp_path / "1.npz", tmp_path / "2.npz"
    data = np.load(batches)
    command = (
        "select",
        "colm",
        "--gradients",
        f"{batches}:c",
        "--numel",
        5000,
        "--seed",
        4,
        "-k",
        9,
        "-o",
        out,
    )
    options = ("--rule", "balanced", "--metric", "euclidean", "--betas", 0.8, 0.99, "--eps", "1e-7")
    options += ("--top", "all", "--backend", "torch", "--groups", f"{batches}:labels", "--keep-groups", "0,7")
    # The kept sources alone are more than k: nothing is matched, but Adam's t counts the step.
    assert run(*command, *options, "--save-state", first) == 0
    assert read(out)[0]["indices"].tolist() == list(range(9))
    with np.load(first) as saved:
        assert (saved["kind"], saved["mean"], saved["step"]) == ("rank one", 0, 2)
    options = (*options[:-1], "1")
    method = fc.CoLM(
        *(9,), top=None, betas=(0.8, 0.99), eps=1e-7, keep_groups=[0, 7], rule="balanced", metric="euclidean",
        backend="torch",
    )  # fmt: skip
    assert run(*command, *options[:-2], "--state", first, "--save-state", second, "--force") == 0
    grads = fc.LowRankGradients(torch.from_numpy(data["c"]), 4, 5000)
    method.select(grads, data["labels"])
    method.keep_groups = ()
    expected = method.select(grads, data["labels"])
    arrays, _ = read(out)
    np.testing.assert_array_equal(arrays["indices"], expected.indices.numpy())
    assert "dims" not in arrays
    with np.load(second) as saved:
        assert saved["kind"] == "rank one"
        assert (saved["mean"], saved["step"], saved["seed"]) == (method.history.mean, 3, 4)
    assert run(*command, *options[:-2], "--state", second, "--force") == 0
    np.testing.assert_array_equal(
        read(out)[0]["indices"], method.select(grads, data["labels"]).indices.numpy()
    )


def test_bad_input_of_colm(batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, state = tmp_path / "out.npz", tmp_path / "state.npz"
    command = ("select", "colm", "-o", out, "--gradients")
    gradients = f"{batches}:g0"
    assert run(*command, gradients, "-k", 4, "--top", 9, "--save-state", state) == 0
    out.unlink()
    capsys.readouterr()
    with np.load(state) as saved:
        fields = dict(saved)
    np.savez(tmp_path / "short.npz", **fields | {"m": fields["m"][1:]})
    np.savez(tmp_path / "pickled.npz", **fields | {"m": np.array([{}], object)})
    np.savez(tmp_path / "step.npz", **fields | {"step": 0})
    np.savez(tmp_path / "nan.npz", **fields | {"m": fields["m"] * np.nan})
    np.savez(tmp_path / "text.npz", **fields | {"m": np.array("m")})
    np.savez(tmp_path / "beta.npz", **fields | {"betas": 0.9})
    np.savez(tmp_path / "kind.npz", **fields | {"kind": "sparse"})
    np.save(tmp_path / "alone.npy", fields["m"])
    np.savez(tmp_path / "zero.npz", np.zeros((4, 9)))
    np.savez(tmp_path / "two.npz", np.ones((9, 2)))
    np.save(tmp_path / "labels.npy", np.zeros(39, int))
    good = (gradients, "-k", 4, "--top", 9)
    for words, arguments in (
        ("--gradients: no such file", (tmp_path / "none.npy", "-k", 1)),
        ("--gradients: expected a float16, float32 or float64 array", (f"{batches}:labels", "-k", 1)),
        ("required: -k", (gradients,)),
        ("k must be at least 1, got 0", (gradients, "-k", 0)),
        ("at least the 2 keep_groups", (gradients, "-k", 1, "--keep-groups", "1,2")),
        ("--top: expected a number or all, got 'some'", (gradients, "-k", 4, "--top", "some")),
        ("expected LABEL,LABEL,..., got 'a,,b'", (*good, "--keep-groups", "a,,b")),
        ("groups must be given with keep_groups", (*good, "--keep-groups", "7")),
        ("groups must have shape [40]", (*good, "--groups", tmp_path / "labels.npy")),
        ("--groups: expected an integer array", (*good, "--groups", f"{batches}:c")),
        ("betas[0] must be in [0, 1), got 1.0", (*good, "--betas", 1, 0.9)),
        ("eps must be > 0", (*good, "--eps", 0)),
        ("invalid choice: 'best'", (*good, "--rule", "best")),
        ("at least one row that is finite and not zero", (tmp_path / "zero.npz", "-k", 1, "--top", 1)),
        ("--seed: it makes the directions", (*good, "--seed", 1)),
        ("numel", (f"{batches}:c", "-k", 4, "--numel", 0)),
        # torch raises a RuntimeError for more memory than there are addresses, and another one beyond 2^63 bytes.
        ("out of memory", (tmp_path / "two.npz", "-k", 4, "--top", 9, "--numel", 2**50)),
        ("out of memory", (tmp_path / "two.npz", "-k", 4, "--top", 9, "--numel", 2**62)),
        ("--state: no such file", (*good, "--state", tmp_path / "none.npz")),
        ("--state: cannot read", (*good, "--state", tmp_path / "pickled.npz")),
        ("is not a file that --save-state wrote", (*good, "--state", batches)),
        ("is not a file that --save-state wrote", (*good, "--state", tmp_path / "alone.npy")),
        ("is not a file that --save-state wrote", (*good, "--state", tmp_path / "kind.npz")),
        ("v must have the shape of m", (*good, "--state", tmp_path / "short.npz")),
        ("step must be >= 1", (*good, "--state", tmp_path / "step.npz")),
        ("--state: " + str(tmp_path / "nan.npz: m must"), (*good, "--state", tmp_path / "nan.npz")),
        ("--state: ", (*good, "--state", tmp_path / "text.npz")),
        ("betas must be a pair", (*good, "--state", tmp_path / "beta.npz")),
        ("--state: ", (*good, "--state", state, "--betas", 0.5, 0.9)),
        ("history must be of gradients of length 1", (f"{batches}:c", "-k", 4, "--top", 1, "--state", state)),
        ("--save-state: expected a name that ends in .npz", (*good, "--save-state", tmp_path / "s.pt")),
        ("is also --out", (*good, "--save-state", out)),
        ("--save-state: " + str(batches) + " is also an input", (*good, "--save-state", batches)),
    ):
        expect_error(capsys, words, *command, *arguments)
        assert not out.exists()
    expect_error(
        capsys, "is also an input", "select", "colm", "--gradients", *good, "--state", state, "-o", state
    )
    with np.load(state) as saved:
        assert set(saved) == set(fields)


def test_no_stop_takes_all(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    options = ("select", "simcore", "--features", features, "--target", features, "-o", out, "-k", 60)
    assert run(*options, "--patience", 1, "--stop-threshold", "1") == 0
    stopped = len(read(out)[0]["indices"])
    assert run(*options, "--no-stop", "--force") == 0
    assert sorted(read(out)[0]["indices"]) == list(range(60))
    assert stopped < 60 or read(out)[1]["rounds"] == 1


def test_npy_is_memory_mapped(features: Path) -> None:
    array = load_array(str(features), "--features", kinds="f", ndim=2, wanted="features")
    assert isinstance(array, np.memmap)


def test_npz_key(features: Path, tmp_path: Path) -> None:
    x = np.load(features)
    np.savez_compressed(tmp_path / "many.npz", a=x[::2], b=x)
    out = tmp_path / "out.npz"
    options = ("select", "facility-location", "-k", 5, "-o", out, "--features")
    assert run(*options, f"{tmp_path / 'many.npz'}:b") == 0
    expected = fc.facility_location(x, 5)
    np.testing.assert_array_equal(read(out)[0]["indices"], expected.indices.numpy())


def test_an_output_has_the_umask_s_permissions(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    out.write_text("old")
    before = os.umask(0o027)
    try:
        assert run("select", "facility-location", "--features", features, "-k", 2, "-o", out, "--force") == 0
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o640
    assert len(read(out)[0]["indices"]) == 2


def test_progress_draws_a_bar(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npz"
    assert run("select", "facility-location", "--features", features, "-k", 3, "-o", out, "--progress") == 0
    assert "3" in capsys.readouterr().err
    assert run("select", "facility-location", "--features", features, "-k", 3, "-o", out, "--force") == 0
    assert capsys.readouterr().err == ""


# --- bad input ----------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, str]:
    """Files that are no features, by their fault, and a word that the error has to contain."""
    x = np.zeros((4, 3), np.float32)
    np.save(tmp_path / "int.npy", x.astype(int))
    np.save(tmp_path / "complex.npy", x.astype(complex))
    np.save(tmp_path / "bool.npy", x.astype(bool))
    np.save(tmp_path / "longdouble.npy", x.astype(np.longdouble))
    np.save(tmp_path / "swapped.npy", x.astype(">f4"))
    np.save(tmp_path / "flat.npy", x[0])
    np.save(tmp_path / "nan.npy", np.full((4, 3), np.nan, np.float32))
    np.save(tmp_path / "empty_rows.npy", x[:0])
    np.save(tmp_path / "object.npy", np.array([[{}]], object), allow_pickle=True)
    np.savez(tmp_path / "object.npz", np.array([[{}]], object))
    np.savez(tmp_path / "two.npz", a=x, b=x)
    np.savez(tmp_path / "none.npz")
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1.0]))
    (tmp_path / "text.npy").write_text("1,2\n3,4\n")
    (tmp_path / "zero.npy").write_bytes(b"")
    (tmp_path / "short.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:-4])
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xffnonsense")
    (tmp_path / "broken.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:100])
    os.mkfifo(tmp_path / "fifo.npy")
    return {
        "int.npy": "float16, float32 or float64",
        "complex.npy": "complex128",
        "bool.npy": "bool",
        "longdouble.npy": "expected a float16",
        "swapped.npy": "byte-swapped",
        "flat.npy": "[3]",
        "nan.npy": "NaN",
        "empty_rows.npy": "0",
        "object.npy": "pickled",
        "object.npz": "pickled",
        "two.npz": "holds a, b",
        "none.npz": "holds nothing",
        "two.npz:c": "no array 'c'",
        "flat.npy:a": "no such file",
        "pickle.npy": "pickle",
        "text.npy": "neither .npy nor .npz",
        "zero.npy": "is empty",
        "short.npy": "cannot read",
        "header.npy": "cannot read",
        "broken.npz": "cannot read",
        "fifo.npy": "not a regular file",
        "absent.npy": "no such file",
        ".": "not a regular file",
    }


@pytest.mark.parametrize("algorithm", ["facility-location", "simcore"])
def test_bad_files(
    algorithm: str, bad: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npz"
    np.save(tmp_path / "target.npy", np.ones((2, 3), np.float32))
    extra = ("--target", tmp_path / "target.npy") if algorithm == "simcore" else ()
    for name, words in bad.items():
        path = tmp_path / name
        expect_error(capsys, words, "select", algorithm, "--features", path, *extra, "-k", 1, "-o", out)
        assert not out.exists()


def test_bad_options(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npz"
    options = ("select", "facility-location", "--features", features, "-o", out)
    np.save(tmp_path / "floats.npy", np.ones(60))
    np.save(tmp_path / "negative.npy", -np.ones(60))
    np.save(tmp_path / "short.npy", np.ones(59))
    np.save(tmp_path / "labels.npy", np.arange(60) % 2)
    np.save(tmp_path / "complex.npy", np.ones(60, complex))
    labels = tmp_path / "labels.npy"
    for words, extra in {
        "-k": (),
        "invalid int value: 'x'": ("-k", "x"),
        "k ": ("-k", 0),
        "61": ("-k", 61),
        "invalid choice: 'cosin'": ("-k", 1, "--metric", "cosin"),
        "invalid choice: 'gpu'": ("-k", 1, "--backend", "gpu"),
        "backend 'cuda'": ("-k", 1, "--backend", "cuda"),
        "unrecognized arguments: --cluster": ("-k", 1, "--cluster", 3),
        "--groups: expected an integer array": ("-k", 1, "--groups", tmp_path / "floats.npy"),
        "--weights: expected a real array": ("-k", 1, "--weights", tmp_path / "complex.npy"),
        "weights must": ("-k", 1, "--weights", tmp_path / "short.npy"),
        "-1": ("-k", 1, "--weights", tmp_path / "negative.npy"),
        "got '1:2'": ("--groups", labels, "--budgets", "0=3,1:2"),
        "label 0 appears twice": ("--groups", labels, "--budgets", "0=3,0=2"),
        "budgets": ("--groups", labels, "--budgets", "0=3,1=31"),
        "--caps: label 1 appears twice": ("-k", 3, "--groups", labels, "--caps", "1=3,1=2"),
        "--costs: expected a real array": ("-k", 1, "--costs", tmp_path / "complex.npy"),
        "rounds must": ("-k", 1, "--rounds", 0),
        "-k: the number of rows to select is missing": ("--rounds", 2),
    }.items():
        expect_error(capsys, words, *options, *extra)
        assert not out.exists()


def test_bad_commands(capsys: pytest.CaptureFixture[str]) -> None:
    expect_error(capsys, "invalid choice: 'choose'", "choose")
    expect_error(capsys, "required")
    expect_error(capsys, "required", "select")
    expect_error(capsys, "--features", "select", "facility-location", "-k", 1, "-o", "out.npz")
    expect_error(capsys, "--target", "select", "simcore", "--features", "f.npy", "-k", 1, "-o", "out.npz")


def test_output_is_checked_before_the_work(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*_: object, **__: object) -> None:
        raise AssertionError("the work began before the output was checked")

    monkeypatch.setattr(fc, "facility_location", must_not_run)
    options = ("select", "facility-location", "--features", features, "-k", 2, "-o")
    expect_error(capsys, "ends in .npz", *options, tmp_path / "out.npy")
    expect_error(capsys, "No such file or directory", *options, tmp_path / "absent" / "out.npz")
    expect_error(capsys, "Not a directory", *options, features / "out.npz")
    (tmp_path / "folder.npz").mkdir()
    expect_error(capsys, "not a regular file", *options, tmp_path / "folder.npz")
    expect_error(capsys, "cannot write", *options, "/proc/out.npz")
    expect_error(capsys, "ends in .png", "demo", "--out", tmp_path / "demo.jpg")
    np.savez(tmp_path / "in.npz", np.load(features))
    same = tmp_path / "in.npz"
    expect_error(
        capsys, "also an input", "select", "facility-location", "--features", same, "-k", 2, "-o", same
    )
    assert len(np.load(same).files) == 1


def test_files_that_cannot_be_looked_at(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files whose existence cannot even be checked: too long a name here, a closed folder elsewhere."""
    out, long = tmp_path / "out.npz", tmp_path / ("x" * 300 + ".npz")
    options = ("select", "colm", "-k", 2, "--top", 2, "--force", "--gradients")
    expect_error(capsys, "--gradients: cannot read", *options, long, "-o", out)
    expect_error(capsys, "--gradients: cannot read", *options, f"{long}:key", "-o", out)
    out.write_text("old")
    expect_error(capsys, "--gradients: cannot read", *options, long, "-o", out)
    expect_error(capsys, "--state: cannot read", *options, features, "--state", long, "-o", out)
    expect_error(capsys, "--out: cannot write", *options, features, "-o", long)
    expect_error(capsys, "--save-state: cannot write", *options, features, "-o", out, "--save-state", long)
    expect_error(capsys, "--out: cannot write", "demo", "--out", long.with_suffix(".png"))
    assert out.read_text() == "old"


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    out.write_text("old")

    def fill_the_disk(stream: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CommandError, match="No space left"):
        write_whole(Output(out, "--out", fill_the_disk, replace=True))
    # Nor does it leave the first of two files.
    with pytest.raises(CommandError, match=r"--save-state: cannot write .*No space left"):
        write_whole(
            Output(out, "--out", lambda stream: stream.write(b"new"), replace=True),
            Output(tmp_path / "state.npz", "--save-state", fill_the_disk),
        )
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_output_that_exists_is_replaced_by_force_only(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, link, loose = (tmp_path / f"{name}.npz" for name in ("out", "link", "loose"))
    out.write_text("old")
    link.symlink_to(out)
    loose.symlink_to(tmp_path / "nothing.npz")
    before = _entries(tmp_path)
    command = ("select", "facility-location", "--features", features, "-k", 2)

    with monkeypatch.context() as patched:
        patched.setattr(fc, "facility_location", None)  # the error is reported before the work
        for words, path in (
            (f"--out: {out} exists; choose another name, or pass --force", out),
            (
                f"--out: {link} is a symbolic link; choose another name, or pass --force to replace the link",
                link,
            ),
            (f"--out: {loose} is a symbolic link;", loose),
        ):
            expect_error(capsys, words, *command, "-o", path)
    assert _entries(tmp_path) == before
    assert out.read_text() == "old"

    # A link itself is replaced; the file that it leads to stays as it is.
    for path in (link, loose, out):
        assert run(*command, "-o", path, "--force") == 0
        assert not path.is_symlink()
        assert len(read(path)[0]["indices"]) == 2
        assert out.read_text() == "old" if path is not out else True
    assert _entries(tmp_path) == before


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
@pytest.mark.parametrize("kind", ["file", "symbolic link"])
def test_an_output_that_appears_meanwhile_stays(
    kind: str,
    links: bool,
    features: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in the moment after the last check."""
    out, other = tmp_path / "out.npz", tmp_path / "other"
    other.write_text("of another")
    original = os.link

    def late(source: Path, target: Path) -> None:
        if kind == "file":
            out.write_text("of another")
        else:
            out.symlink_to(other)
        if not links:
            raise PermissionError(1, "Operation not permitted")
        original(source, target)

    monkeypatch.setattr(os, "link", late)
    before = _entries(tmp_path)
    expect_error(
        capsys,
        f"--out: {out} exists",
        "select",
        "facility-location",
        "--features",
        features,
        "-k",
        2,
        "-o",
        out,
    )
    assert other.read_text() == out.read_text() == "of another"
    assert _entries(tmp_path) == sorted([*before, "out.npz"])


def test_no_hard_links(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out.npz"
    assert run("select", "facility-location", "--features", features, "-k", 2, "-o", out) == 0
    assert len(read(out)[0]["indices"]) == 2
    assert _entries(tmp_path) == ["out.npz", "x.npy"]


def test_nothing_is_written_where_one_output_of_two_exists(
    batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, state = tmp_path / "out.npz", tmp_path / "state.npz"
    command = (
        "select",
        "colm",
        "--gradients",
        f"{batches}:g0",
        "-k",
        4,
        "--top",
        9,
        "-o",
        out,
        "--save-state",
        state,
    )
    state.write_text("old")
    expect_error(capsys, f"--save-state: {state} exists", *command)
    original = select._savez

    def appear(contents: dict, stream: object) -> None:
        state.write_text("old")
        original(contents, stream)

    state.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(select, "_savez", appear)
        expect_error(capsys, f"--save-state: {state} exists", *command)
    assert state.read_text() == "old"
    assert _entries(tmp_path) == ["b.npz", "state.npz"]
    assert run(*command, "--force") == 0


def test_a_state_goes_on_in_its_place(
    batches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that is read may be replaced by the next one, under whatever spelling of its name, but not through links."""
    state, other, link = (tmp_path / f"{name}.npz" for name in ("state", "other", "link"))
    command = ("select", "colm", "--gradients", f"{batches}:g0", "-k", 4, "--top", 9)
    assert run(*command, "-o", tmp_path / "1.npz", "--save-state", state) == 0
    first = int(np.load(state)["step"])
    monkeypatch.chdir(tmp_path)
    assert run(*command, "-o", tmp_path / "2.npz", "--state", state, "--save-state", "state.npz") == 0
    assert int(np.load(state)["step"]) == first + 1
    capsys.readouterr()
    link.symlink_to(state)
    other.write_bytes(state.read_bytes())
    for words, names in (
        (f"--save-state: {other} exists", ("--state", state, "--save-state", other)),
        (f"--save-state: {link} is a symbolic link", ("--state", link, "--save-state", link)),
        (f"--save-state: {link} is a symbolic link", ("--state", state, "--save-state", link)),
    ):
        expect_error(capsys, words, *command, "-o", tmp_path / "3.npz", *names)
    assert run(*command, "-o", tmp_path / "3.npz", "--state", link, "--save-state", link, "--force") == 0
    assert int(np.load(state)["step"]) == first + 1
    assert int(np.load(link)["step"]) == first + 2
    assert not link.is_symlink()


@pytest.mark.parametrize("name", ["demo.png", "demo-ccs.png", "demo-colm.png", "demo-autocoreset.png"])
def test_the_demo_replaces_no_picture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("old")
    expect_error(capsys, f"--out: {tmp_path / name} exists", "demo", "--out", tmp_path / "demo.png")
    assert _entries(tmp_path) == [name]


def test_warnings_are_one_line(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fc.facility_location

    def warn(*arguments: object, **options: object) -> fc.Selection:
        warnings.warn("slow\npath", fc.SlowPathWarning, stacklevel=1)
        return original(*arguments, **options)

    monkeypatch.setattr(fc, "facility_location", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        out = tmp_path / "out.npz"
        assert run("select", "facility-location", "--features", features, "-k", 1, "-o", out) == 0
    assert capsys.readouterr().err == "flashcoreset: SlowPathWarning: slow path\n"


# --- the other commands -------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcoreset._core import native

    assert run("info") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"flashcoreset {fc.__version__} (Python ")
    for name in ("torch", "cpu", "cuda", "triton", *native.MODULES):
        assert f"\n  {name:<10}  " in out
    assert torch.__version__ in out
    assert out.count("in use") == 1
    for isa in native.available_isas():
        assert f"{isa:<10}  missing" not in out
    # What the kernels of each family take, backend by backend: triton's where it is installed.
    header, *lines = (
        line.split() for line in out.partition("float32 and float64\n")[2].splitlines()[: len(FAMILIES) + 1]
    )
    table = {row[0]: dict(zip(header, row[1:], strict=True)) for row in lines}
    assert set(table["transport"].values()) == {"yes", "-"}
    assert table["sketch"]["cpu"] == table["sketch"]["torch"] == "sparse"
    assert table["sketch"]["triton"] in ("half", "missing")
    assert table["matching"]["cuda"] == "yes"
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setenv("FLASHCORESET_ISA", "z80")
    assert run("info") == 0
    assert "missing: FLASHCORESET_ISA=z80" in capsys.readouterr().out


def test_bench_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    expect_error(capsys, "run this in a checkout", "bench")
    # Another project's are not run.
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    expect_error(capsys, "run this in a checkout", "bench")


@pytest.mark.parametrize("code", [0, 1])
def test_bench_runs_the_checkout_s_benchmarks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "flashcoreset"\n')
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "__main__.py").write_text(
        f"import pathlib, sys; pathlib.Path('seen').write_text(' '.join(sys.argv[1:])); sys.exit({code})"
    )
    monkeypatch.chdir(tmp_path / "deeper")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for family in ("pairwise", "simcore"):
        (tmp_path / "benchmarks" / f"{family}.py").write_text("\nROWS = []")
    assert run("bench", "pairwise", "simcore") == code
    assert (tmp_path / "seen").read_text() == "pairwise simcore"


def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(ROOT)
    expect_error(capsys, "pip install 'flashcoreset[bench]'", "bench")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    expect_error(
        capsys,
        "unknown family 'nothing'; there are autocoreset, drop_in, facility_location",
        "bench",
        "nothing",
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    expect_error(capsys, "pip install 'flashcoreset[demo]'", "demo", "--out", tmp_path / "demo.png")


# --- as a process -------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flashcoreset.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_process_exit_codes(features: Path, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("flashcoreset")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"flashcoreset {fc.__version__}\n"
    absent = tmp_path / "absent.npy"
    process = start("select", "facility-location", "--features", absent, "-k", 1, "-o", "o.npz")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err == f"flashcoreset: --features: no such file: {absent}\n"


def test_ctrl_c(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32)
    np.save(tmp_path / "big.npy", x)
    out = tmp_path / "out.npz"
    # The slow reference, so that it is still at work when the signal comes; the bar shows that it has begun.
    process = start(
        *("select", "facility-location", "--features", tmp_path / "big.npy", "-k", 10_000, "-o", out),
        *("--method", "naive", "--backend", "torch", "--progress"),
    )
    with process:
        assert process.stderr is not None
        seen = ""
        while "0/10000" not in seen.replace(" ", ""):
            character = process.stderr.read(1)
            assert character, seen
            seen += character
        process.send_signal(signal.SIGINT)
        start_time = time.monotonic()
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert time.monotonic() - start_time < 30
    assert rest.rstrip("\n").splitlines()[-1].endswith("flashcoreset: interrupted")
    assert "Traceback" not in rest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.npy"]


def test_closed_pipe() -> None:
    script = f"{sys.executable} -m flashcoreset.cli info | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a disk that is full")
def test_full_stdout() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "flashcoreset.cli", "info"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "flashcoreset: [Errno 28] No space left on device\n"
