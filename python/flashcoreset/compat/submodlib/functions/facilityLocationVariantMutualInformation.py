"""submodlib's variant of mutual information, which looks at similarities to queries alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcoreset.compat.submodlib._objective import Dense
from flashcoreset.compat.submodlib.functions._targeted import TargetedFunction, Targets


class FacilityLocationVariantMutualInformationFunction(TargetedFunction):
    """f(A) = sum_{q in Q} max_{j in A} s_jq + eta sum_{j in A} max_{q in Q} s_jq: the queries Q served, and served by what is like them.

    Args:
        n: elements of the ground set.
        num_queries: queries.
        query_sijs: [n, num_queries] similarities.
        data, queryData: features, from which they are computed if they are missing.
        metric: "cosine", "euclidean" or "dot".
        queryDiversityEta: eta.
    """

    def __init__(
        self,
        n: int,
        num_queries: int,
        query_sijs: Any = None,
        data: Any = None,
        queryData: Any = None,
        metric: str = "cosine",
        queryDiversityEta: float = 1,
    ) -> None:
        self.n, self.num_queries, self.metric, self.queryDiversityEta = (
            n,
            num_queries,
            metric,
            queryDiversityEta,
        )
        self.data, self.queryData = data, queryData
        self._set_kernels(
            None,
            [
                Targets(
                    "query",
                    num_queries,
                    query_sijs,
                    queryData,
                    "ERROR: Query Kernel should be n X num_queries",
                )
            ],
            "WARNING: similarity query kernel found. Provided data and query matrices will be ignored.",
            "Since query kernel is not provided, data matrices are a must",
            pairs=False,
        )
        # submodlib takes the smallest normal number for the similarity of what is like no query, which decides signs of gains.
        bonus = np.maximum(self._largest("query", 1), np.finfo(np.float32).tiny) * np.float32(
            queryDiversityEta
        )
        self._objective = Dense(self._kernel("query").T, "query_sijs", bonus=bonus)

    @property
    def query_sijs(self) -> np.ndarray:
        return self._read("query")
