"""`make test` leaves out a test only if any two values of its parameters meet in another test of the same backend."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import conftest
import pytest

BACKENDS = ["torch", "cpu-x86-64-v3"]


class Item:
    """What a collected test shows of itself."""

    def __init__(self, *texts: str) -> None:
        self.function = "test"
        self.callspec = SimpleNamespace(_idlist=texts, params={"backend": texts[0]})
        self.is_slow = False

    def add_marker(self, name: str) -> None:
        assert name == "slow"
        self.is_slow = True

    def pairs(self) -> set[object]:
        return set(itertools.combinations(enumerate(self.callspec._idlist), 2))


def kept(*tables: list[str]) -> tuple[list[Any], list[Any]]:
    items: list[Any] = [Item(*texts) for texts in itertools.product(BACKENDS, *tables)]
    conftest.thin_out(items)
    return items, [item for item in items if not item.is_slow]


def test_any_two_values_meet_on_each_backend() -> None:
    kinds = ["gaussian", "gaussian-boxmuller", "sjlt"]  # of which one begins as another does
    items, left = kept(kinds, ["float32", "float64", "half"], ["1-2", "1-2-3", "7"], ["a", "b"])
    assert len(left) < len(items) / 3
    for backend in BACKENDS:
        met = [
            set().union(*(i.pairs() for i in some if i.callspec._idlist[0] == backend))
            for some in (items, left)
        ]
        assert met[0] == met[1]


@pytest.mark.parametrize(
    "tables",
    [
        (["x", "y", "z"], ["1", "2", "1-2"]),
        (["linear", "linear-sequence", "x", "x-metric", "x-metric-offset"],),
    ],
)
def test_two_parameters_and_names_of_cases_are_left_alone(tables: tuple[list[str], ...]) -> None:
    items, left = kept(*tables)
    assert left == items


def test_a_table_s_cases_are_thinned_out_by_their_parts() -> None:
    cases = ["-".join(parts) for parts in itertools.product("abc", "def", "ghi")]
    _, left = kept(cases)
    assert 9 <= len(left) / len(BACKENDS) <= 12
