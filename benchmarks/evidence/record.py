"""Measures of several arms over seeds, claims about them, and how both are written down."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Measure:
    """A figure per arm and seed.

    Attributes:
        name: what is measured, with its unit.
        values: for each arm one number per seed.
        digits: after the decimal point, in the table.
    """

    name: str
    values: dict[str, list[float]] = field(default_factory=dict)
    digits: int = 1

    def add(self, figures: Mapping[str, float]) -> None:
        """The figures of one more seed."""
        for arm, value in figures.items():
            self.values.setdefault(arm, []).append(float(value))

    def cell(self, arm: str) -> str:
        values = self.values[arm]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.fmean(values):.{self.digits}f} ± {spread:.{self.digits}f}"


@dataclass
class Claim:
    """That `ours` is better than `control`.

    Attributes:
        text: the claim in words.
        source: who makes it: a paper, or this library's documentation.
        measure: the place of its measure.
        ours, control: two arms.
        higher: whether more is better.
    """

    text: str
    source: str
    measure: int
    ours: str
    control: str
    higher: bool = True


@dataclass
class Evidence:
    """One method's measures and claims."""

    method: str
    setting: str
    seeds: list[int]
    measures: list[Measure]
    claims: list[Claim]

    def differences(self, claim: Claim) -> np.ndarray:
        """By how much `ours` is better, seed by seed."""
        values = self.measures[claim.measure].values
        return (np.array(values[claim.ours]) - np.array(values[claim.control])) * (1 if claim.higher else -1)

    def holds(self, claim: Claim) -> bool:
        """Whether it is better on four of five seeds, and by more than the standard error in the mean."""
        found = self.differences(claim)
        error = found.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else 0.0
        return bool((found > 0).mean() >= 0.8 and found.mean() > error)


def write(directory: Path, name: str, evidence: Evidence, about: Mapping[str, object]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    content = {**about, **asdict(evidence)}
    (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> tuple[Evidence, dict[str, object]]:
    """An evidence that was written, and what was said about its run."""
    content = json.loads(path.read_text())
    evidence = Evidence(
        content.pop("method"),
        content.pop("setting"),
        content.pop("seeds"),
        [Measure(**measure) for measure in content.pop("measures")],
        [Claim(**claim) for claim in content.pop("claims")],
    )
    return evidence, content


def section(evidence: Evidence, name: str, about: Mapping[str, object]) -> str:
    """Markdown: the setting, a table per measure, the claims."""
    lines = [f"## {evidence.method}", "", evidence.setting, ""]
    seeds = ", ".join(map(str, evidence.seeds))
    lines += [f"Seeds {seeds}; mean ± standard deviation over them; {about['seconds']:.0f} s.", ""]
    for measure in evidence.measures:
        lines += [f"| {measure.name} | |", "| --- | --- |"]
        lines += [f"| {arm} | {measure.cell(arm)} |" for arm in measure.values]
        lines += [""]
    lines += [f"![{evidence.method}: every arm, a point per seed](evidence_{name}.png)", ""]
    lines += [
        "| claim | by | against | better on | mean difference | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for claim in evidence.claims:
        found, measure = evidence.differences(claim), evidence.measures[claim.measure]
        held = "held" if evidence.holds(claim) else "**did not hold**"
        lines.append(
            f"| {claim.text} | {claim.source} | {claim.control} | {(found > 0).sum()} of {len(found)} | "
            f"{found.mean():+.{measure.digits + 1}f} | {held} |"
        )
    return "\n".join([*lines, ""])


def draw(path: Path, measures: Sequence[Measure]) -> None:
    """One panel per measure: the arms' means as bars, their seeds as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [measures[i : i + 2] for i in range(0, len(measures), 2)]  # a page is as wide as two panels
    heights = [0.6 + 0.32 * max(len(measure.values) for measure in row) for row in rows]
    figure, panels = plt.subplots(
        len(rows), min(2, len(measures)), figsize=(4.6 * min(2, len(measures)), sum(heights)), layout="constrained",
        squeeze=False, height_ratios=heights,
    )  # fmt: skip
    for panel in panels.flat[len(measures) :]:
        panel.remove()
    for panel, measure in zip(panels.flat[: len(measures)], measures, strict=True):
        arms = list(measure.values)[::-1]
        for place, arm in enumerate(arms):
            values = measure.values[arm]
            panel.barh(place, statistics.fmean(values), color="C0", alpha=0.35)
            panel.plot(values, [place] * len(values), "o", color="C0", markersize=3)
        panel.set_yticks(range(len(arms)), arms, fontsize=7)
        panel.set_title(measure.name, fontsize=8)
        panel.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
