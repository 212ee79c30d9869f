"""What submodlib's functions of queries and private elements have in common: their kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from flashcoreset.compat._points import as_points
from flashcoreset.compat.submodlib._similarity import check_metric, similarities
from flashcoreset.compat.submodlib.functions.setFunction import SetFunction


@dataclass
class Targets:
    """Queries or private elements.

    Attributes:
        name: "query" or "private".
        count: how many.
        kernel: [n, count] similarities to the ground set, or None.
        data: [count, d] features, or None.
        wrong_shape: what submodlib says of a kernel of another shape.
    """

    name: str
    count: int
    kernel: Any
    data: Any
    wrong_shape: str

    @property
    def counted(self) -> str:
        return "num_queries" if self.name == "query" else "num_privates"


class TargetedFunction(SetFunction):
    """A function of the ground set and of queries or private elements.

    `data_sijs`, `query_sijs` and `private_sijs` that were not given are computed when they are read, in float64.
    """

    metric: str
    data: Any

    def _set_kernels(
        self, data_sijs: Any, targets: list[Targets], ignored: str, missing: str, *, pairs: bool = True
    ) -> None:
        """Checks kernels and data.

        Args:
            data_sijs: [n, n], or None.
            targets: queries and private elements.
            ignored: what submodlib warns of if data are given beside kernels.
            missing: what submodlib says if neither is there.
            pairs: whether similarities within the ground set are needed.
        """
        if self.n <= 0:
            raise Exception("ERROR: Number of elements in ground set must be positive")
        for target in targets:
            if target.count < 0:
                what = "queries" if target.name == "query" else "private data points"
                raise Exception(f"ERROR: Number of {what} must be >= 0")
        self._kernels = {target.name: target.kernel for target in targets}
        self._targets = targets
        if pairs:
            self._kernels["data"] = data_sijs
        if all(kernel is not None for kernel in self._kernels.values()):
            self._check_kernels(ignored)
        else:
            self._kernels = dict.fromkeys(self._kernels)
            self._check_data(missing)
            if pairs:
                self.num_neighbors = self.n
        self.effective_ground = set(range(self.n))

    def _check_kernels(self, ignored: str) -> None:
        for name in sorted(self._kernels, key=lambda name: name != "data"):
            if type(self._kernels[name]) is not np.ndarray:
                raise Exception(f"Invalid {name} kernel type provided, must be ndarray")
        if "data" in self._kernels and np.shape(self._kernels["data"]) != (self.n, self.n):
            raise Exception("ERROR: data kernel should be n X n")
        for target in self._targets:
            if np.shape(target.kernel) != (self.n, target.count):
                raise Exception(target.wrong_shape)
        if self.data is not None or any(target.data is not None for target in self._targets):
            print(ignored)

    def _check_data(self, missing: str) -> None:
        if self.data is None or any(target.data is None for target in self._targets):
            raise Exception(missing)
        if np.shape(self.data)[0] != self.n:
            raise Exception("ERROR: Inconsistentcy between n and no of examples in the given data matrix")
        for target in self._targets:
            if np.shape(target.data)[0] != target.count:
                raise Exception(
                    f"ERROR: Inconsistentcy between {target.counted} and no of examples in the given query data matrix"
                )
        check_metric(self.metric)

    def _kernel(self, name: str) -> np.ndarray:
        """The similarities of the ground set to "data", "query" or "private", as given or float32."""
        if self._kernels[name] is not None:
            return self._kernels[name]
        data = as_points(self.data, "data", np.float32)
        columns = data
        if name != "data":
            target = next(target for target in self._targets if target.name == name)
            if target.count == 0:
                return np.zeros((self.n, 0), dtype=np.float32)
            columns = as_points(target.data, f"{name}Data", np.float32)
        return self._similarities(data, columns).numpy()

    def _similarities(self, rows: Tensor, columns: Tensor) -> Tensor:
        if rows.shape[1] != columns.shape[1]:
            raise ValueError(
                f"data has {rows.shape[1]} features, but the other elements have {columns.shape[1]}"
            )
        return similarities(rows, columns, self.metric)

    def _read(self, name: str) -> np.ndarray:
        if self._kernels[name] is None:
            self._kernels[name] = self._kernel(name).astype(np.float64)
        return self._kernels[name]

    def _largest(self, name: str, factor: float) -> np.ndarray:
        """The largest similarity of each element to a query or private element, times `factor`; at least 0. [n] float32."""
        return (self._kernel(name).astype(np.float32) * np.float32(factor)).max(axis=1, initial=0)
