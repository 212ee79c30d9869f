"""submodlib's mutual information of facility location with queries."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcoreset.compat.submodlib._objective import Dense
from flashcoreset.compat.submodlib.functions._targeted import TargetedFunction, Targets


class FacilityLocationMutualInformationFunction(TargetedFunction):
    """f(A) = sum_i min(max_{j in A} s_ij, eta max_{q in Q} s_iq): what A says about the queries Q.

    Args:
        n: elements of the ground set.
        num_queries: queries.
        data_sijs: [n, n] similarities.
        query_sijs: [n, num_queries] similarities.
        data, queryData: features, from which both are computed if one of them is missing.
        metric: "cosine", "euclidean" or "dot".
        magnificationEta: eta.
    """

    def __init__(
        self,
        n: int,
        num_queries: int,
        data_sijs: Any = None,
        query_sijs: Any = None,
        data: Any = None,
        queryData: Any = None,
        metric: str = "cosine",
        magnificationEta: float = 1,
    ) -> None:
        self.n, self.num_queries, self.metric, self.magnificationEta = (
            n,
            num_queries,
            metric,
            magnificationEta,
        )
        self.data, self.queryData = data, queryData
        self._set_kernels(
            data_sijs,
            [
                Targets(
                    "query",
                    num_queries,
                    query_sijs,
                    queryData,
                    "ERROR: Query Kernel should be n X num_queries",
                )
            ],
            "WARNING: similarity kernels found. Provided data and query matrices will be ignored.",
            "Since kernels are not provided, data matrices are a must",
        )
        self._objective = Dense(
            self._kernel("data"), "data_sijs", cap=self._largest("query", magnificationEta)
        )

    @property
    def data_sijs(self) -> np.ndarray:
        return self._read("data")

    @property
    def query_sijs(self) -> np.ndarray:
        return self._read("query")
