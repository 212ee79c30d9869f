"""apricot.functions.base: what selectors share."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch

from flashcoreset._core.progress import Progress
from flashcoreset.compat.apricot.optimizers import OPTIMIZERS, BaseOptimizer, SieveGreedy
from flashcoreset.compat.apricot.utils import check_random_state, similarities


class BaseSelection:
    """A selector of rows with apricot's methods: arguments, the optimizer's name, results.

    Subclasses say what gains are, by `_initialize`, `_calculate_gains`, `_gains_in_order` and `_cover`.
    """

    metric = "ignore"
    current_values: np.ndarray

    def __init__(
        self,
        n_samples: int,
        initial_subset: Any = None,
        optimizer: Any = "lazy",
        optimizer_kwds: dict[str, Any] | None = None,
        reservoir: np.ndarray | None = None,
        max_reservoir_size: int = 1000,
        n_jobs: int = 1,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        if n_samples <= 0:
            raise ValueError("n_samples must be a positive value.")
        if initial_subset is not None and not isinstance(initial_subset, (list, np.ndarray)):
            raise ValueError("initial_subset must be a list, numpy array, or None")
        optimizer = _ours(optimizer)
        if isinstance(optimizer, BaseOptimizer):
            optimizer.function = self
        elif optimizer not in OPTIMIZERS:
            raise ValueError(f"Optimizer must be an optimizer object or a str in {OPTIMIZERS.keys()}.")
        if verbose not in (True, False):
            raise ValueError("verbosity must be True or False")
        self.n_samples = n_samples
        self.random_state = check_random_state(random_state)
        self.optimizer = optimizer
        self.optimizer_kwds = {} if optimizer_kwds is None else optimizer_kwds
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.initial_subset = None if initial_subset is None else np.array(initial_subset)
        self.ranking: Any = None
        self.idxs: Any = None
        self.gains: Any = None
        self.subset: Any = None
        self.sparse: bool | None = None
        self.mask: Any = None
        self._X: Any = None
        self.n_seen_ = 0
        self.reservoir = reservoir
        self.reservoir_size = 0 if reservoir is None else reservoir.shape[0]
        self.max_reservoir_size = max_reservoir_size if reservoir is None else reservoir.shape[0]
        self.update_reservoir_ = reservoir is None
        self._bar: Progress | None = None
        self._streaming = False
        self._initial_seen: np.ndarray | None = None  # rows of the initial subset that the stream has brought
        self._rows_seen: dict[int, np.ndarray] = {}  # rows that the stream has brought and some sieve took

    def transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """The chosen rows of X, and of y and sample_weight if they are given."""
        rows = X[self.ranking]
        if sample_weight is not None:
            return rows, None if y is None else y[self.ranking], sample_weight[self.ranking]
        return rows if y is None else (rows, y[self.ranking])

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None, sample_cost: Any = None) -> Any:
        """`fit`, then `transform`."""
        fitted = self.fit(X, y=y, sample_weight=sample_weight, sample_cost=sample_cost)
        return fitted.transform(X, y=y, sample_weight=sample_weight)

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, sample_cost: Any = None) -> BaseSelection:
        raise NotImplementedError

    def _initialize(self, X: Any) -> None:
        """Begins anew with values X [n, m]."""
        n, d = X.shape
        self.sparse = scipy.sparse.issparse(X)
        self.ranking, self.gains = [], []
        self.current_values = np.zeros(d)
        self.mask = np.zeros(n, dtype=np.int8)
        self.mask[self._initial_rows(n)] = 1
        self.idxs = np.where(self.mask == 0)[0]

    def _initial_rows(self, n: int) -> np.ndarray:
        """Which of the `n` rows are in the initial subset."""
        subset = self.initial_subset
        if subset is None or subset.ndim != 1 or not len(subset):
            return np.empty(0, dtype=np.int64)
        if subset.dtype == bool:
            self.initial_subset = subset = np.where(subset)[0]
        if len(subset) and subset.min() < 0:
            raise ValueError(
                "When passing in an integer mask for the initial subset the minimum value cannot be negative."
            )
        if self._streaming:
            return np.unique(subset[(subset >= self.n_seen_) & (subset < self.n_seen_ + n)]) - self.n_seen_
        if len(subset) + self.n_samples > n:
            raise ValueError(
                "When using a mask for the initial subset must selected fewer than the size of the subset minus the initial "
                "subset size, i.e., n_samples < X.shape[0] - initial_subset.shape[0]."
            )
        if len(subset) and subset.max() >= n:
            raise ValueError(
                "When passing in an integer mask for the initial subset the maximum value cannot exceed the size of the data set."
            )
        return np.unique(subset)

    def _run(self, optimizer: BaseOptimizer, X: Any, sample_cost: Any) -> None:
        with Progress(bool(self.verbose or optimizer.verbose), int(self.n_samples), "apricot") as bar:
            self._bar = bar if bar.active else None
            try:
                optimizer.select(X, self.n_samples, sample_cost=sample_cost)
            finally:
                self._bar = None
        self.ranking = np.array(self.ranking, dtype=np.int64)
        self.gains = np.array(self.gains, dtype=np.float64)


class BaseGraphSelection(BaseSelection):
    """A selector whose gains come from similarities of all pairs; see FacilityLocationSelection."""

    def __init__(
        self,
        n_samples: int,
        metric: str = "euclidean",
        initial_subset: Any = None,
        optimizer: Any = "lazy",
        optimizer_kwds: dict[str, Any] | None = None,
        n_neighbors: Any = None,
        reservoir: np.ndarray | None = None,
        max_reservoir_size: int = 1000,
        n_jobs: int = 1,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            n_samples,
            initial_subset,
            optimizer,
            optimizer_kwds,
            reservoir,
            max_reservoir_size,
            n_jobs,
            random_state,
            verbose,
        )
        self.metric = "correlation" if metric == "corr" else metric
        self.n_neighbors = n_neighbors

    def fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, sample_cost: Any = None
    ) -> BaseGraphSelection:
        """Chooses rows of X.

        Args:
            X: [n, d] rows, or with metric="precomputed" their similarities [n, n], all >= 0 or all <= 0; a NumPy array, a list,
                or for similarities a SciPy CSR matrix or array.
            y, sample_weight: ignored, as in apricot.
            sample_cost: [n] costs, whose sum `n_samples` bounds; without them `n_samples` is a number of rows.
        """
        X = _checked(X)
        if scipy.sparse.issparse(X) and self.metric != "precomputed":
            raise ValueError(
                "Must passed in a precomputed sparse similarity matrix or a dense feature matrix."
            )
        if self.metric == "precomputed" and X.shape[0] != X.shape[1]:
            raise ValueError("Precomputed similarity matrices must be square and symmetric.")
        pairs = similarities(X, None, self.metric, self.n_neighbors)
        if self.metric == "precomputed":
            pairs = _floating(pairs)
            _check_signs(pairs)
        if self.n_samples > X.shape[0]:
            raise ValueError("Cannot select more examples than the number in the data set.")
        optimizer = self._made_optimizer(self.optimizer)
        self._X, self._streaming = X, False
        self._initialize(pairs)
        self._run(optimizer, pairs, sample_cost)
        self.subset = self._rows_of(self.ranking[:0] if self.metric == "precomputed" else self.ranking)
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None, sample_cost: Any = None) -> None:
        """Takes the next rows X [n, d] of a stream, by the optimizer "sieve".

        Rows are compared with a reservoir: the one given, or a random sample of `max_reservoir_size` rows seen so far, drawn by the
        same calls of `random_state` as apricot's. `initial_subset` counts the rows of the stream from its beginning.
        """
        X = _checked(X)
        if self.n_neighbors is not None:
            raise NotImplementedError(
                "n_neighbors: apricot's FacilityLocationSelection.partial_fit does not look at it; leave it None"
            )
        if scipy.sparse.issparse(X):
            raise NotImplementedError(
                "X: a sparse matrix cannot be streamed; pass X.toarray() to partial_fit"
            )
        if not isinstance(self.optimizer, SieveGreedy):
            self.optimizer = self._made_optimizer("sieve")
        self._streaming = True
        self._fill_reservoir(X)
        assert self.reservoir is not None
        first = self._initial_rows(len(X))
        initial = np.vstack([self._initial_seen, X[first]]) if self._initial_seen is not None else X[first]
        pairs = similarities(np.vstack([X, initial]), self.reservoir[: self.reservoir_size], self.metric)
        self._X = X
        self._initialize(pairs[: len(X)])
        self.current_values = pairs[len(X) :].max(axis=0, initial=0.0)
        self._run(self.optimizer, pairs[: len(X)], sample_cost)
        self._initial_seen = initial
        self.n_seen_ += len(X)
        self._X = None

    def _made_optimizer(self, optimizer: Any) -> BaseOptimizer:
        if isinstance(optimizer, BaseOptimizer):
            return optimizer
        return OPTIMIZERS[optimizer](
            function=self, verbose=self.verbose, random_state=self.random_state, **self.optimizer_kwds
        )

    def _fill_reservoir(self, X: np.ndarray) -> None:
        if self.reservoir is None:
            self.reservoir = np.empty((self.max_reservoir_size, X.shape[1]))
        if not self.update_reservoir_:
            return
        for i, row in enumerate(X):
            if self.reservoir_size < self.max_reservoir_size:
                self.reservoir[self.reservoir_size] = row
                self.reservoir_size += 1
            elif (place := self.random_state.choice(self.n_seen_ + i)) < self.max_reservoir_size:
                self.reservoir[place] = row

    def _rows_of(self, rows: np.ndarray) -> np.ndarray:
        """Rows of X, float64."""
        chosen = self._X[rows]
        return (chosen.toarray() if scipy.sparse.issparse(chosen) else chosen).astype(np.float64)

    def _keep_rows(self, ranking: np.ndarray, taken: set[int], begin: int) -> None:
        """Sets `subset` to the rows of the stream whose numbers are in `ranking`, and keeps those in `taken`; X begins at `begin`."""
        for number in taken:
            if number >= begin:
                self._rows_seen[number] = self._rows_of(np.array([number - begin]))[0]
        self.subset = np.zeros((int(self.n_samples), self._X.shape[1]))
        for place, number in enumerate(ranking.tolist()):
            self.subset[place] = self._rows_seen[number]


def _checked(X: Any) -> Any:
    if isinstance(X, list):
        X = np.array(X)
    if scipy.sparse.issparse(X) and X.format == "csr":
        return X
    if not isinstance(X, np.ndarray):
        raise ValueError("X must be either a list of lists, a 2D numpy array, or a scipy.sparse.csr_matrix.")
    if X.ndim != 2:
        raise ValueError("X must have exactly two dimensions.")
    return X


def _floating(X: Any) -> Any:
    """Similarities in float32 or float64, which the kernels compute in."""
    return X if X.dtype in (np.float32, np.float64) else X.astype(np.float64)


def _check_signs(X: Any) -> None:
    values = torch.from_numpy(X.data if scipy.sparse.issparse(X) else X)
    if values.numel() and values.min() < 0 and values.max() > 0:
        raise ValueError("X cannot contain negative values or must be entirely negative values.")


def _ours(optimizer: Any) -> Any:
    """An object of apricot's own classes as one of ours, with the same settings; anything else as it is."""
    kind = type(optimizer)
    if not kind.__module__.startswith("apricot.") or kind.__name__ not in _NAMES:
        return optimizer
    made = _NAMES[kind.__name__]()
    made.__dict__.update(
        {name: _ours(value) for name, value in vars(optimizer).items() if name in vars(made)}
    )
    return made


_NAMES = {kind.__name__: kind for kind in OPTIMIZERS.values()}
