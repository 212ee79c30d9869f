"""The benchmarks' own machinery: answers agree at small sizes, checks and goals can fail, the report and the comparison work."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra of their own")


@pytest.fixture(autouse=True)
def _source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def benchmark_module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT))
    FAMILIES = benchmark_module("__main__").FAMILIES


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing in a process that it takes for a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def record() -> Any:
    harness = benchmark_module("harness")
    return harness.Record(
        name="row",
        title="a row | of the table",
        size={"n": 3},
        peer="the peer",
        figure="ratio",
        value=10.0,
        goal=20.0,
        memory_goal=None,
        met=False,
        ours={"q20": 0.9e-3, "median": 1e-3, "q80": 1.1e-3},
        peer_times={"q20": 0.9e-2, "median": 1e-2, "q80": 1.1e-2},
        rounds=5,
        agreement="same picks",
        agrees=True,
        memory=3_000_000,
        peer_memory=5_000_000,
        limit="matrix",
        share=0.25,
        limits={"matrix": 2e11, "copy": 1e10},
        command="python -m benchmarks family --rows row",
        commit="0123456789ab",
        date="2026-01-01",
    )


def rows_of(family: str) -> list[str]:
    # apricot's own call is left out here: it compiles for seconds, and the row that keeps its kernels makes the same picks.
    return [row.name for row in benchmark_module(family).ROWS if row.name != "matrix-apricot"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """All families at small sizes: the text printed, and the folder of the results. In one process, for the peers take seconds
    to import."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        rows = ",".join(dict.fromkeys(row for family in FAMILIES for row in rows_of(family)))
    options = ("--quick", "--seconds", "0.01", "--no-limits", "--rows", rows, "--results", str(folder))
    return run_module("benchmarks", *FAMILIES, *options), folder


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_agree_at_small_sizes(
    family: str, quick: tuple[subprocess.CompletedProcess[str], Path]
) -> None:
    done, folder = quick
    rows = rows_of(family)
    assert done.returncode == 0, done.stdout + done.stderr
    content = benchmark_module("results").read(folder)[family]
    assert [entry.name for entry in content["rows"]] == rows
    assert all(entry.agrees and entry.value == entry.value for entry in content["rows"])
    assert f"python -m benchmarks {family} --rows {rows[0]}" in done.stdout
    assert content["hardware"]["isa"]
    assert content["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert content["commit"]


def test_unknown_family_and_row_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark_module("__main__").main(["sinkhole"])
    assert ended.value.code == 2
    assert "facility_location" in capsys.readouterr().err
    row = run_module("benchmarks", "pairwise", "--quick", "--rows", "l3")
    assert row.returncode != 0
    assert "l1-2048x512" in row.stdout + row.stderr


def greedy(similarity: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    best, picks, gains = np.zeros(similarity.shape[1]), [], []
    for _ in range(k):
        gain = np.maximum(similarity - best, 0).sum(axis=1, dtype=np.float64)
        gain[picks] = -1
        picks.append(int(gain.argmax()))
        gains.append(gain[picks[-1]])
        best = np.maximum(best, similarity[picks[-1]])
    return np.array(picks), np.array(gains)


@pytest.fixture
def similarity() -> np.ndarray:
    data = benchmark_module("data")
    return data.nonnegative_cosine(data.clustered(60, 8, clusters=5))


def test_same_picks_accepts_equal_sequences(similarity: np.ndarray) -> None:
    checks = benchmark_module("checks")
    picks, gains = greedy(similarity, 10)
    assert "same picks, gains" in checks.same_picks((picks, gains), (picks, gains, similarity))


def test_same_picks_accepts_either_of_two_tied_candidates(similarity: np.ndarray) -> None:
    checks = benchmark_module("checks")
    picks, _ = greedy(similarity, 10)
    twin = next(j for j in range(60) if j not in picks)
    tied = similarity.copy()
    tied[twin] = tied[picks[3]]
    peer_picks, peer_gains = greedy(tied, 10)
    pair = {twin, int(picks[3])}
    position = next(i for i, pick in enumerate(peer_picks.tolist()) if pick in pair)
    # Past the tie both go on alike: the twins cover the same clients.
    other = peer_picks.copy()
    other[position] = (pair - {int(peer_picks[position])}).pop()
    assert "rounding tie" in checks.same_picks((other, peer_gains), (peer_picks, peer_gains, tied))


def test_same_picks_refuses_a_worse_pick_and_a_wrong_gain(similarity: np.ndarray) -> None:
    checks = benchmark_module("checks")
    picks, gains = greedy(similarity, 10)
    worse = picks.copy()
    worse[4] = next(j for j in range(60) if j not in picks)
    with pytest.raises(checks.Disagreement, match="pick 4"):
        checks.same_picks((worse, gains), (picks, gains, similarity))
    with pytest.raises(checks.Disagreement, match="gains differ"):
        checks.same_picks((picks, gains * 1.001), (picks, gains, similarity))
    with pytest.raises(checks.Disagreement, match="twice"):
        checks.same_picks((np.full(10, picks[0]), gains), (picks, gains, similarity))


def test_same_values_refuses_a_difference() -> None:
    checks = benchmark_module("checks")
    values = torch.tensor([[1.0, 2.0]])
    assert "bit for bit" in checks.same_values(values, values.clone(), 1e-5)
    for wrong in (values + 1e-3, torch.tensor([[1.0, float("nan")]])):
        with pytest.raises(checks.Disagreement):
            checks.same_values(wrong, values, 1e-5)


def test_same_scores_and_strata_refuse_a_difference() -> None:
    scores, checks = benchmark_module("scores"), benchmark_module("checks")
    row = scores.ROWS[0]
    inputs = row.make(**row.small)
    ours, peer = row.ours(inputs), list(row.peer(inputs))
    assert row.check(inputs, ours, tuple(peer)).startswith("scores to ")
    for place in range(5):
        wrong = list(peer)
        wrong[place] = wrong[place].clone()
        wrong[place][7] = ~wrong[place][7] if place == 4 else wrong[place][7] + 1e-3
        with pytest.raises(checks.Disagreement):
            row.check(inputs, ours, tuple(wrong))
    row = next(row for row in scores.ROWS if row.name == "ccs-10-million")
    inputs = row.make(**row.small)
    ours, peer = row.ours(inputs), row.peer(inputs)
    assert row.check(inputs, ours, peer).startswith("same strata ")
    highest = inputs["scores"].argsort(descending=True)[: row.small["k"]]
    with pytest.raises(checks.Disagreement, match="a stratum gives"):
        row.check(inputs, ours, highest)
    ours.indices[1] = ours.indices[0]
    with pytest.raises(checks.Disagreement, match="299 samples, expected 300"):
        row.check(inputs, ours, peer)


def test_same_rounds_refuses_another_item() -> None:
    simcore, peers = benchmark_module("simcore"), benchmark_module("peers")
    checks = benchmark_module("checks")
    row = simcore.FROM_SIMILARITIES
    inputs = row.make(**row.small)
    rounds, peer = row.ours(inputs), peers.full_order(inputs["s"])
    assert row.check(inputs, rounds, peer).startswith("same ")
    used = {item for items in rounds for item in items}
    rounds[2][0] = next(item for item in range(row.small["n"]) if item not in used)
    with pytest.raises(checks.Disagreement, match="round 2"):
        row.check(inputs, rounds, peer)


def test_peak_memory_sees_an_allocation_that_is_freed_again() -> None:
    memory = benchmark_module("harness").PeakMemory()
    memory.start()
    block = np.ones(8_000_000)
    del block
    memory.stop()
    if memory.bytes is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 60e6 < memory.bytes < 80e6


def test_goals() -> None:
    harness = benchmark_module("harness")
    row = benchmark_module("pairwise").L1
    assert harness.goal_met(row, 30.0, None) is True
    assert harness.goal_met(row, 29.9, None) is False
    scale = benchmark_module("scale").LAZY
    assert harness.goal_met(scale, 5.9, 10**9) is True
    assert harness.goal_met(scale, 6.1, 10**9) is False
    assert harness.goal_met(scale, 5.9, 10**9 + 1) is False
    assert harness.goal_met(replace(row, goal=None), 0.1, None) is None


def test_every_family_has_a_table() -> None:
    assert set(FAMILIES) == set(benchmark_module("report").TITLES)


def test_report_writes_between_the_markers(
    record: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, report = benchmark_module("results"), benchmark_module("report")
    results.write(tmp_path, "pairwise", [record])
    results.write(tmp_path, "sketch", [replace(record, name="rademacher-trak", title="signs"), record])
    document, readme = tmp_path / "benchmarks.md", tmp_path / "README.md"
    for path in (document, readme):
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(tmp_path), "--document", str(document), "--readme", str(readme)]
    assert report.main(arguments) == 0
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    line = next(line for line in text.splitlines() if "a row" in line)
    for cell in (
        "a row \\| of the table",
        "**10x**",
        ">= 20x: missed",
        "3 MB / 5 MB",
        "25 % of the matrix rate",
        "1 ms",
    ):
        assert cell in line
    assert readme.read_text().splitlines()[2:-2] == [
        "|  | peer | flashcoreset |  |",
        "| --- | --- | --- | --- |",
        "| Projection: signs | 10 ms, the peer | 1 ms | **10x** |",
    ]
    assert report.main(arguments) == 0
    assert document.read_text() == text
    readme.write_text("no markers")
    assert report.main(arguments) == 2
    assert str(readme) in capsys.readouterr().err
    assert document.read_text() == text
    document.write_text("no markers")
    assert report.main(arguments) == 2
    assert report.BEGIN in capsys.readouterr().err


def test_compare_flags_a_loss(record: Any) -> None:
    compare = benchmark_module("compare")
    slower, same = replace(record, value=8.9), replace(record, value=9.1)
    assert [change.lost for change in compare.changes([{"row": record}], [{"row": slower}])] == [True]
    assert [change.lost for change in compare.changes([{"row": record}], [{"row": same}])] == [False]
    # If there are several runs, the median counts.
    assert not compare.changes([{"row": record}] * 3, [{"row": slower}, {"row": same}, {"row": same}])[0].lost
    # A multiple of a product is better when it is smaller; an overhead is not compared; nor is a row that the base lacks.
    products = replace(record, figure="products")
    assert compare.changes([{"row": products}], [{"row": replace(products, value=11.2)}])[0].lost
    assert not compare.changes([{"row": products}], [{"row": replace(products, value=8.0)}])[0].lost
    assert (
        compare.changes(
            [{"row": replace(record, figure="overhead")}], [{"row": replace(record, figure="overhead")}]
        )
        == []
    )
    assert compare.changes([{}], [{"row": record}]) == []


def test_compare_names_an_unknown_commit(capsys: pytest.CaptureFixture[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the comparison needs a git checkout")
    assert benchmark_module("compare").main(["no-such-commit", "pairwise"]) == 2
    assert "no-such-commit" in capsys.readouterr().err


def test_the_error_curves_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    autocoreset = benchmark_module("autocoreset")
    path = tmp_path / "docs" / "errors.png"
    cases = list(autocoreset.CASES)[:2]
    curves = autocoreset.measure_curves((60, 90), 1, print, cases)
    assert {len(points) for lines in curves.values() for points in lines.values()} == {2}
    assert capsys.readouterr().out.count("\n") == 2 * len(cases)
    autocoreset.plot(path, curves, (60, 90), 1)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_cost_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scale = benchmark_module("scale")
    base, values = {"n": 60, "d": 4, "k": 5}, {"n": (30, 60), "k": (2, 5)}
    costs = scale.measure_costs(base, values, repeats=1)
    assert {axis: set(curves) for axis, curves in costs.items()} == {
        axis: {"lazy", "stochastic", "one product"} for axis in values
    }
    scale.plot(tmp_path / "docs" / "cost.png", costs, values, base)
    assert (tmp_path / "docs" / "cost.png").read_bytes()[:4] == b"\x89PNG"


def test_the_scaling_model_is_checked_against_runs(capsys: pytest.CaptureFixture[str]) -> None:
    module = benchmark_module("scaling_model")
    assert module.main(["--quick", "--ranks", "2"]) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    assert "all predictions hold" in told
    assert told.count("| exact | 2 |") == told.count("| GreeDi | 2 |") == told.count("| sample | 2 |") == 2


def test_the_scaling_model_can_fail() -> None:
    module = benchmark_module("scaling_model")
    plan = module.Plan((100, 1000), 8, 5, ("exact",), 0.1, 1, 60.0)
    costs = module.Costs(pair=1e-6, product=0.0, byte=0.0, collective=0.0, pick=0.0)

    def runs(n: int, seconds: float, sent: int, objective: float = 1.0) -> Any:
        return module.Run("exact", n, [1, 2], objective, seconds, seconds, 2 * n, sent, 10 * n, 5, 3)

    def wrong(**changed: Any) -> list[str]:
        of_two = [runs(100, 0.01, 40 * 100 + 2080 + 1000), runs(1000, 1.0, 40 * 1000 + 2080 + 10_000)]
        of_two[1] = replace(of_two[1], **changed)
        alone = [runs(100, 0.1, 0), runs(1000, 10.0, 0)]
        return module.table({1: (costs, [alone]), 2: (costs, [of_two, of_two])}, plan, 2.0)[1]

    assert wrong() == []
    assert wrong(cpu=2.5) == ["exact on 2 ranks, n = 1,000: 2.50 CPU s, predicted 1.00"]
    assert wrong(bytes=100_000) == ["exact on 2 ranks, n = 1,000: 100,000 bytes, predicted 52,080"]
    assert wrong(objective=0.9) == ["exact on 2 ranks, n = 1,000: the objective is 0.900 of the exact one"]
    assert wrong(indices=[2, 1]) == ["exact on 2 ranks, n = 1,000: the picks are not those of one process"]


def test_training_by_coresets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps: the arms run, and the control has CoLM's sources and quotas."""
    pytest.importorskip("transformers", reason="an extra of its own")
    module = benchmark_module("colm_training")
    sizes = ["--seeds", "1", "--steps", "2", "--validation-rows", "2"]
    assert module.main([*sizes, "--results", str(tmp_path)]) == 0
    content = benchmark_module("results").read(tmp_path)["colm_training"]
    runs = {run["arm"]: run for run in content["runs"]}
    assert list(runs) == list(module.ARMS)
    assert runs["colm"]["shares"] == runs["structure"]["shares"] != runs["random"]["shares"]
    assert runs["colm"]["activation_bytes"] == runs["random"]["activation_bytes"]
    assert 1.9 < runs["full"]["activation_bytes"] / runs["random"]["activation_bytes"] <= 2
    assert all(run["parameters"] <= 1_000_000 for run in content["runs"])
    assert all(len(run["losses"]["2"]) == len(content["sources"]) for run in content["runs"])
    assert content["summary"]["colm below random"]["of"] == 1
    assert "| CoLM | " in capsys.readouterr().out
