"""submodlib's mutual information of facility location with queries, given private elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcoreset.compat.submodlib._objective import Dense
from flashcoreset.compat.submodlib.functions._targeted import TargetedFunction, Targets


class FacilityLocationConditionalMutualInformationFunction(TargetedFunction):
    """f(A) = sum_i max(min(max_{j in A} s_ij, eta max_{q in Q} s_iq) - nu max_{p in P} s_ip, 0): what A says about the queries Q and the
    private elements P do not.

    Args:
        n: elements of the ground set.
        num_queries, num_privates: queries and private elements.
        data_sijs: [n, n] similarities.
        query_sijs, private_sijs: [n, num_queries] and [n, num_privates] similarities.
        data, queryData, privateData: features, from which all three are computed if one of them is missing.
        metric: "cosine", "euclidean" or "dot".
        magnificationEta: eta.
        privacyHardness: nu.
    """

    def __init__(
        self,
        n: int,
        num_queries: int,
        num_privates: int,
        data_sijs: Any = None,
        query_sijs: Any = None,
        private_sijs: Any = None,
        data: Any = None,
        queryData: Any = None,
        privateData: Any = None,
        metric: str = "cosine",
        magnificationEta: float = 1,
        privacyHardness: float = 1,
    ) -> None:
        self.n, self.num_queries, self.num_privates, self.metric = n, num_queries, num_privates, metric
        self.magnificationEta, self.privacyHardness = magnificationEta, privacyHardness
        self.data, self.queryData, self.privateData = data, queryData, privateData
        self._set_kernels(
            data_sijs,
            [
                Targets(
                    "query",
                    num_queries,
                    query_sijs,
                    queryData,
                    "ERROR: Query Kernel should be n X num_queries",
                ),
                Targets(
                    "private",
                    num_privates,
                    private_sijs,
                    privateData,
                    "ERROR: Query Kernel should be n X num_privates",
                ),
            ],
            "WARNING: similarity kernels found. Provided data and query and private matrices will be ignored.",
            "Since kernels are not provided, data matrices are a must",
        )
        self._objective = Dense(
            self._kernel("data"),
            "data_sijs",
            cap=self._largest("query", magnificationEta),
            base=self._largest("private", privacyHardness),
        )

    @property
    def data_sijs(self) -> np.ndarray:
        return self._read("data")

    @property
    def query_sijs(self) -> np.ndarray:
        return self._read("query")

    @property
    def private_sijs(self) -> np.ndarray:
        return self._read("private")
