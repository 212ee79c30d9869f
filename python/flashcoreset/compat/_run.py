"""A run of the kernels that picks among candidates drawn by somebody else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcoreset._core.tensor import as_csr, as_matrix, is_sparse
from flashcoreset.facility_location.backend import choose
from flashcoreset.facility_location.problem import Problem


class SampledRun:
    """Facility location, one pick after the other.

    Args:
        x: [n, d] points, or [n, m] similarities, dense or a SciPy CSR matrix.
        count: how many picks there will be.
        clients: [m, d] points, or None for `x`.
        metric: of points, or "precomputed".
        preselected: [p] int64, or None.
    """

    def __init__(
        self,
        x: Any,
        count: int,
        *,
        clients: Tensor | None = None,
        metric: str,
        preselected: Tensor | None = None,
    ) -> None:
        sparse = is_sparse(x)
        kernels = choose(None, torch.device("cpu"), sparse=sparse)
        self._run = kernels.FacilityLocation(
            Problem(
                as_csr(x, "x") if sparse else as_matrix(x, "x"),
                clients,
                metric,
                preselected=preselected,
                expected_picks=count,
            )
        )

    def pick(self, candidates: np.ndarray) -> int:
        """The best of `candidates` [r] int64, which are neither picked nor preselected; of equal ones the lowest."""
        return int(self._run.step_among(torch.from_numpy(np.sort(candidates))))
