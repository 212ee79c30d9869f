"""Labels of groups and classes: integers, or any values that can be sorted, which results use again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from flashcoreset._core.inputs import label_values, sorted_labels
from flashcoreset._core.tensor import as_vector

T = TypeVar("T")


class Labels(NamedTuple):
    """The labels of items.

    `codes` [n] int64 are the labels themselves if these are integers (`names` is None then), else each label's place in `names`,
    which are sorted.
    """

    codes: Tensor
    names: list[Any] | None = None

    def name(self, code: int) -> Any:
        return code if self.names is None else self.names[code]

    def named(self, by_code: Mapping[int, T]) -> dict[Any, T]:
        """The same entries by label."""
        return {self.name(code): value for code, value in by_code.items()}

    def present(self) -> list[Any]:
        """The labels that items have, ascending."""
        return [self.name(code) for code in self.codes.unique().tolist()]

    def per_item(self) -> list[Any]:
        """The label of each item."""
        return [self.name(code) for code in self.codes.tolist()]

    def codes_of(self, labels: Iterable[Any]) -> list[int]:
        """The codes of those of `labels` that an item has."""
        if self.names is None:
            return list(labels)
        place = {label: code for code, label in enumerate(self.names)}
        return [place[label] for label in labels if label in place]


def as_labels(value: Any, name: str, device: torch.device, length: int) -> Labels:
    """`value` as the labels of `length` items: integers, strings, or any values that can be sorted (not floats).

    Raises:
        TypeError: for floats, and for labels that cannot be sorted.
        ValueError: for another length, or labels on another device.
    """
    (labels,) = joint_labels(device, **{name: (value, length)})
    return labels


def joint_labels(device: torch.device, **given: tuple[Any, int]) -> list[Labels]:
    """Labels of several kinds of items, which have the same codes for all of them: by argument, its value and length."""
    values = {name: label_values(value, name) for name, (value, _) in given.items()}
    kinds = {name: "integers" if of is None else "other labels" for name, of in values.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{kind} in {name}" for name, kind in kinds.items())
        raise TypeError(f"{' and '.join(given)} must hold labels of one kind, got {listed}")
    place: dict[Any, int] = {}
    names: list[Any] | None = None
    if all(of is not None for of in values.values()):
        place = sorted_labels((label for of in values.values() for label in of or ()), " and ".join(given))
        names = list(place)
    found = []
    for name, (value, length) in given.items():
        of = values[name]
        codes = value if of is None else torch.tensor([place[label] for label in of], device=device)
        found.append(Labels(as_vector(codes, name, device, integers=True, length=length), names))
    return found
