"""submodlib's conditional gain of facility location, given private elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcoreset.compat.submodlib._objective import Dense
from flashcoreset.compat.submodlib.functions._targeted import TargetedFunction, Targets


class FacilityLocationConditionalGainFunction(TargetedFunction):
    """f(A) = sum_i max(max_{j in A} s_ij - nu max_{p in P} s_ip, 0): what A adds to the private elements P.

    Args:
        n: elements of the ground set.
        num_privates: private elements.
        data_sijs: [n, n] similarities.
        private_sijs: [n, num_privates] similarities.
        data, privateData: features, from which both are computed if one of them is missing.
        metric: "cosine", "euclidean" or "dot".
        privacyHardness: nu.
    """

    def __init__(
        self,
        n: int,
        num_privates: int,
        data_sijs: Any = None,
        private_sijs: Any = None,
        data: Any = None,
        privateData: Any = None,
        metric: str = "cosine",
        privacyHardness: float = 1,
    ) -> None:
        self.n, self.num_privates, self.metric, self.privacyHardness = (
            n,
            num_privates,
            metric,
            privacyHardness,
        )
        self.data, self.privateData = data, privateData
        self._set_kernels(
            data_sijs,
            [
                Targets(
                    "private",
                    num_privates,
                    private_sijs,
                    privateData,
                    "ERROR: Private Kernel should be n X num_privates",
                )
            ],
            "WARNING: similarity kernels found. Provided data matrix and query matrix will be ignored.",
            "Since kernels are not provided, data matrices are a must",
        )
        self._objective = Dense(
            self._kernel("data"), "data_sijs", base=self._largest("private", privacyHardness)
        )

    @property
    def data_sijs(self) -> np.ndarray:
        return self._read("data")

    @property
    def private_sijs(self) -> np.ndarray:
        return self._read("private")
