"""What the public functions return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashcoreset._core.saving import Saved, savable
from flashcoreset._core.taking import take_rows


class _Scalar:
    """A dataclass field that takes a number or a 0-d tensor and reads as a number.

    Inside torch.compile a result is a tensor without a value yet: reading gives the tensor itself there, and the
    conversion happens when the value is first read outside the graph.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._slot = "_" + name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            raise AttributeError(self._slot)  # the dataclass then sees a field without a default
        value = getattr(instance, self._slot)
        if isinstance(value, Tensor) and not torch.compiler.is_compiling():
            return float(value)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        object.__setattr__(instance, self._slot, value)


class _Choice(Saved):
    """What a choice of rows can do."""

    indices: Tensor

    def take(self, data: Any) -> Any:
        """The chosen rows of `data`, in pick order.

        Args:
            data: whatever holds one row per item that was chosen from: a tensor, array, sparse matrix or list; a pandas, polars or pyarrow
                column, frame or table; a `datasets.Dataset`; an h5py or zarr array; a torch `Dataset` or `Subset`; or a dict of such columns.

        Returns:
            An object of the same kind: of a torch `Dataset` a `Subset`, of an array in a file a NumPy array.

        Raises:
            TypeError: for objects without rows that can be chosen, such as a DataLoader, an IterableDataset or a LazyFrame.
            ValueError: if `data` has fewer rows than the items that were chosen from.

        Example:
            >>> import torch, flashcoreset as fc
            >>> coreset = fc.Coreset(torch.tensor([2, 0]), torch.ones(2))
            >>> coreset.take(["a", "b", "c"]), coreset.take(torch.tensor([1.0, 2.0, 3.0]))
            (['c', 'a'], tensor([3., 1.]))
        """
        return take_rows(data, self.indices)


@savable
@dataclass(frozen=True, eq=False)
class Selection(_Choice):
    """A chosen subset, and what each of its members stands for.

    Attributes:
        indices: [k] int64, the picks in the order in which they were made.
        gains: [k] float, by how much each pick raised the objective.
        weights: [k] float, the client weight that each pick won.
        assignment: [m] int64, for each client the position in `indices` of the pick that serves it, or -1.
        objective: f(S), a float, preselected items included.
        offset: what distances were subtracted from to make similarities of them; None for similarities.
        dims: kept for gradient matching; None otherwise.
        state: kept for gradient matching; None otherwise.
        rounds: [k] int64, the round, from 0, in which each pick was made: facility location with rounds > 1; None otherwise.
        served_by: [R, m] int64, for each round that was begun and each client the position in `indices` of the pick that serves it
            in that round, or -1: facility location with rounds > 1; None otherwise.

    Inside a function given to torch.compile, `objective` and `offset` are 0-d tensors.

    Example:
        >>> import torch, flashcoreset as fc
        >>> selection = fc.facility_location(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), 2)
        >>> selection.indices.tolist(), selection.weights.tolist(), selection.objective
        ([1, 0], [2.0, 1.0], 3.0)
    """

    indices: Tensor
    gains: Tensor
    weights: Tensor
    assignment: Tensor
    objective: float = _Scalar()  # type: ignore[assignment]
    offset: float | None = _Scalar()  # type: ignore[assignment]
    dims: Any = None
    state: Any = None
    rounds: Tensor | None = None
    served_by: Tensor | None = None


@savable
@dataclass(frozen=True, eq=False)
class Coreset(_Choice):
    """What a coreset method returns.

    Attributes:
        indices: [k] int64, the chosen items.
        weights: [k] float, the weight of each in the training loss.
        info: the method's own figures, by name.

    Example:
        >>> import torch, flashcoreset as fc
        >>> fc.Coreset(torch.tensor([4, 2]), torch.ones(2), {"rounds": 1}).info
        {'rounds': 1}
    """

    indices: Tensor
    weights: Tensor
    info: dict[str, Any] = field(default_factory=dict)
