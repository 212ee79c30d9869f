"""The evidence in its quick form, one seed and small: directions that are certain; and how claims are counted."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def quick(name: str) -> Any:
    return importlib.import_module(f"benchmarks.evidence.{name}").run([0], quick=True)


def values(evidence: Any, measure: int = 0) -> dict[str, float]:
    """Each arm's one figure."""
    return {arm: one[0] for arm, one in evidence.measures[measure].values.items()}


def test_ccs() -> None:
    accuracy = values(quick("ccs"))
    assert accuracy["CCS, cut-off 0.1"] > accuracy["the hardest samples"]
    assert accuracy["CCS, cut-off 0.1"] > accuracy["CCS, cut-off 0"]
    assert accuracy["random"] > accuracy["the hardest samples"]


def test_goracs() -> None:
    pytest.importorskip("ot", reason="the extra goracs")
    evidence = quick("goracs")
    right, wrong = values(evidence, 0), values(evidence, 1)
    assert right["cover alone, lam = 0"] > 50
    assert wrong["lam = 0.5"] < wrong["cover alone, lam = 0"] - 20  # large norms are wrong labels


def test_simcore() -> None:
    evidence = quick("simcore")
    purity, coverage, at_stop = (values(evidence, measure) for measure in range(3))
    assert purity["simcore, k = 100"] > purity["random, k = 100"] + 0.2
    assert coverage["simcore, k = 100"] > coverage["random, k = 100"]
    assert coverage["facility_location(clients=target), k = 100"] > coverage["nearest, k = 100"]
    assert at_stop["default"] > at_stop["patience=20"]


def test_autocoreset() -> None:
    error = values(quick("autocoreset"))
    assert error["caratheodory"] < error["best of as many uniform samples"] / 3
    assert error["best of as many uniform samples"] <= error["uniform samples"]
    assert min(error.values()) > -1e-5


def test_facility_location() -> None:
    evidence = quick("facility_location")
    distance, served = values(evidence, 0), values(evidence, 1)
    assert distance["lazy"] < distance["random"]
    assert served["clients=target, rounds=k"] > served["clients=target"] > served["random"]


def test_colm() -> None:
    pytest.importorskip("transformers", reason="the extra transformers")
    error = values(quick("colm"))
    assert 0 < error["OMP on them, weighted"] < error["random"]
    assert set(error) >= {"random, CoLM's quotas", "CoLM, zeroth order"}


def test_claims_are_counted_seed_by_seed(tmp_path: Path) -> None:
    record = importlib.import_module("benchmarks.evidence.record")
    measure = record.Measure("error, %")
    for ours, control in ((1, 2), (2, 4), (3, 3.5), (4, 6), (5, 4.9)):
        measure.add({"ours": ours, "control": control})
    claims = [
        record.Claim("less error", "paper", 0, "ours", "control", higher=False),
        record.Claim("more error", "paper", 0, "ours", "control"),
    ]
    evidence = record.Evidence("Method", "A setting.", [0, 1, 2, 3, 4], [measure], claims)
    assert evidence.differences(claims[0]).tolist() == pytest.approx([1, 2, 0.5, 2, -0.1])
    assert evidence.holds(claims[0])  # on 4 of 5, by 1.08 in the mean with a standard error of .42
    assert not evidence.holds(claims[1])
    assert measure.cell("ours") == "3.0 ± 1.6"
    record.write(tmp_path, "method", evidence, {"seconds": 3.0, "hardware": "a processor"})
    again, about = record.read(tmp_path / "method.json")
    assert again == evidence
    text = record.section(again, "method", about)
    assert "| less error | paper | control | 4 of 5 | +1.08 | held |" in text
    assert "| more error | paper | control | 1 of 5 | -1.08 | **did not hold** |" in text


def test_the_page_is_that_of_the_figures_that_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra demo")
    pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra of their own")
    main = importlib.import_module("benchmarks.evidence.__main__")
    assert main.page(main.FIGURES, tmp_path) == (ROOT / "docs/evidence.md").read_text()
    kept = {path.stem for path in main.FIGURES.iterdir()}
    assert kept <= {*main.METHODS}
    assert {path.name for path in tmp_path.iterdir()} == {f"evidence_{name}.png" for name in kept}
    for path in tmp_path.iterdir():
        assert (ROOT / "docs" / path.name).exists()


def test_unknown_methods_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("benchmarks.evidence.__main__")
    for arguments, words in ((["colmm"], "unknown method colmm"), (["--seeds", "0"], "--seeds must be >= 1")):
        with pytest.raises(SystemExit):
            main.main(arguments)
        assert words in capsys.readouterr().err
