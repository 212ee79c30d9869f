"""Samplers with `fit_resample`, for imbalanced-learn's Pipeline and for calls of one's own; scikit-learn is all that they need.

scikit-learn's transformers may not change the number of rows. Samplers may: `fit_resample(X, y)` returns the chosen rows of both, in the
containers that they came in, and `sample_indices_` holds their indices. An imblearn.pipeline.Pipeline calls it while fitting alone, so that
predictions are made for all rows.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.tensor import as_integer, one_of
from flashcoreset.facility_location import facility_location
from flashcoreset.methods import autocoreset, ccs, k_center
from flashcoreset.scores import sample_scores

try:
    from sklearn.utils.validation import validate_data as _validate_data
except ImportError:  # scikit-learn below 1.6

    def _validate_data(estimator: Any, **arguments: Any) -> Any:
        return estimator._validate_data(**arguments)


_STRATEGIES = ("auto", "majority", "not minority", "not majority", "all")
_SCORES = ("margin", "el2n", "entropy", "loss")

Strategy = float | str | Mapping[Any, int] | Callable[[Any], Mapping[Any, int]]


class _Sampler(OneToOneFeatureMixin, BaseEstimator):
    """What the samplers share: each class is a problem of its own, with its own number of picks."""

    _estimator_type = "sampler"
    _sampling_type = "under-sampling"

    sampling_strategy: Strategy = "auto"
    n_samples: int | None

    def fit(self, X: Any, y: Any) -> _Sampler:
        """Checks the data and sets `sampling_strategy_`, the number of picks of each class. `fit_resample` does this too."""
        self._prepare(X, y)
        return self

    def fit_resample(self, X: Any, y: Any) -> tuple[Any, Any]:
        """Chooses rows.

        Args:
            X: [n, d] numbers: an array, a list, a data frame or a sparse matrix (of which a dense copy is made).
            y: [n] class labels, or their one-hot rows [n, classes].

        Returns:
            The chosen rows of X and of y, in the same containers: class by class in label order, in the order of picking.

        Raises:
            ValueError: for targets that are not classes, a single class without `n_samples`, and numbers of picks that the
                classes do not have.
        """
        features, codes = self._prepare(X, y)
        rows = self._choose(features, codes)
        self.sample_indices_ = rows
        return _take(X, rows), _take(y, rows)

    def _prepare(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, d] and the class of each row as a number."""
        check_classification_targets(y)
        labels = _labels(y)
        features, labels = _validate_data(self, X=X, y=labels, reset=True, accept_sparse=["csr", "csc"])
        if scipy.sparse.issparse(features):
            features = features.toarray()
        if features.dtype not in (np.float32, np.float64):
            features = features.astype(np.float64)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        sizes = np.bincount(codes)
        if self.n_samples is None and len(sizes) == 1:
            raise ValueError("y must have more than one class where n_samples is None, got 1 class")
        self.sampling_strategy_ = self._counts(sizes, y)
        return np.ascontiguousarray(features), codes

    def _counts(self, sizes: np.ndarray, y: Any) -> dict[Any, int]:
        """How many rows of each class are picked; classes that are missing here are kept whole."""
        labels = self.classes_.tolist()
        if self.n_samples is not None:
            if self.sampling_strategy != "auto":
                raise ValueError(
                    f"n_samples={self.n_samples!r} and sampling_strategy={self.sampling_strategy!r} both say how many rows to pick; "
                    "leave one of them out"
                )
            total = as_integer(self.n_samples, "n_samples")
            if not len(labels) <= total <= sizes.sum():
                raise ValueError(
                    f"n_samples must be between the {len(labels)} classes and the {sizes.sum()} rows, got {total}"
                )
            # One row of each class at least, the rest in proportion.
            more = allocate_budgets((sizes - 1).tolist(), total - len(labels)).tolist()
            return {label: 1 + count for label, count in zip(labels, more, strict=True)}
        return _wanted(self.sampling_strategy, dict(zip(labels, sizes.tolist(), strict=True)), y)

    def _choose(self, features: np.ndarray, codes: np.ndarray) -> np.ndarray:
        chosen = []
        for code, label in enumerate(self.classes_.tolist()):
            rows = np.flatnonzero(codes == code)
            count = self.sampling_strategy_.get(label, len(rows))
            if 0 < count < len(rows):
                rows = rows[self._choose_of_class(features[rows], count, rows)]
            chosen.append(rows if count else rows[:0])
        return np.concatenate(chosen)

    def _choose_of_class(self, features: np.ndarray, count: int, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        if "imblearn" in sys.modules:  # whose checks ask for tags of its own
            from imblearn.utils._tags import InputTags, SamplerTags, Tags
            from sklearn.utils import TargetTags

            inputs = InputTags(two_d_array=True, sparse=True, dataframe=True)
            sampler = SamplerTags(sample_indices=True)
            target = TargetTags(required=True)
            return Tags(estimator_type="sampler", target_tags=target, input_tags=inputs, sampler_tags=sampler)
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.sparse = True
        return tags

    def _more_tags(self) -> dict[str, Any]:  # scikit-learn below 1.6
        return {"X_types": ["2darray", "sparse", "dataframe"], "requires_y": True, "sample_indices": True}


class FacilityLocationSampler(_Sampler):
    """Of each class the rows that represent it best: `flashcoreset.facility_location` inside each class.

    Args:
        sampling_strategy: how many rows of which classes, as imbalanced-learn's under-samplers take it: "auto" or "not minority"
            (all classes but the smallest get its size), "majority", "not majority", "all", a dict of label to number, a number in (0, 1]
            (two classes: the smaller one's size over the larger one's after sampling), or a callable(y) that returns a dict.
        n_samples: in place of that, the number of rows in all: the classes keep their shares, and each has one at least.
        metric: "euclidean", "sqeuclidean", "l1", "cosine" or "dot".
        method: "lazy", "naive" or "stochastic".
        random_state: for "stochastic"; an int, a numpy.random.RandomState or None (another choice at each call).
        backend: as in `flashcoreset.facility_location`.

    Attributes:
        sample_indices_: [k] int64, the rows chosen.
        sampling_strategy_: a dict of label to number of picks.
        classes_, n_features_in_, feature_names_in_: as in scikit-learn.

    Example:
        >>> import numpy as np
        >>> from flashcoreset.integrations.sklearn import FacilityLocationSampler
        >>> X, y = np.random.default_rng(0).standard_normal((50, 3)), np.arange(50) % 5 == 0
        >>> X_small, y_small = FacilityLocationSampler().fit_resample(X, y)
        >>> X_small.shape, int(y_small.sum())
        ((20, 3), 10)
    """

    def __init__(
        self,
        sampling_strategy: Strategy = "auto",
        *,
        n_samples: int | None = None,
        metric: str = "euclidean",
        method: str = "lazy",
        random_state: Any = 0,
        backend: str | None = None,
    ) -> None:
        self.sampling_strategy = sampling_strategy
        self.n_samples = n_samples
        self.metric = metric
        self.method = method
        self.random_state = random_state
        self.backend = backend

    def _choose_of_class(self, features: np.ndarray, count: int, rows: np.ndarray) -> np.ndarray:
        seed = _seed(self.random_state)
        options: dict[str, Any] = {"metric": self.metric, "method": self.method, "backend": self.backend}
        return facility_location(features, count, seed=seed, **options).indices.numpy()


class KCenterSampler(_Sampler):
    """Of each class the rows that leave no row of it far from all of them: `flashcoreset.k_center` inside each class.

    Args:
        sampling_strategy, n_samples: as in `FacilityLocationSampler`.
        metric: "euclidean", "sqeuclidean", "l1" or "cosine".
        backend: as in `flashcoreset.k_center`.

    Attributes:
        sample_indices_, sampling_strategy_: as in `FacilityLocationSampler`.

    Example:
        >>> import numpy as np
        >>> from flashcoreset.integrations.sklearn import KCenterSampler
        >>> X, y = np.random.default_rng(0).standard_normal((50, 3)), np.arange(50) % 5 == 0
        >>> KCenterSampler(n_samples=15).fit_resample(X, y)[0].shape
        (15, 3)
    """

    def __init__(
        self,
        sampling_strategy: Strategy = "auto",
        *,
        n_samples: int | None = None,
        metric: str = "euclidean",
        backend: str | None = None,
    ) -> None:
        self.sampling_strategy = sampling_strategy
        self.n_samples = n_samples
        self.metric = metric
        self.backend = backend

    def _choose_of_class(self, features: np.ndarray, count: int, rows: np.ndarray) -> np.ndarray:
        return k_center(features, count, metric=self.metric, backend=self.backend).indices.numpy()


class CCSSampler(_Sampler):
    """Of each class rows of all difficulties: `flashcoreset.ccs` inside each class, on scores from a classifier.

    Args:
        sampling_strategy, n_samples: as in `FacilityLocationSampler`.
        estimator: a classifier with `predict_proba`, which is cloned; None: logistic regression on standardised features.
        score: how hard a row is: "margin", "el2n", "entropy" or "loss" of its predicted probabilities (`flashcoreset.sample_scores`).
        cv: the folds for predictions of rows that the classifier has not seen; at most the rows of the smallest class.
        mislabel_ratio: the share of each class to drop first: the rows of the lowest margins, in [0, 1).
        n_strata: as in `flashcoreset.ccs`.
        random_state: an int, a numpy.random.RandomState or None (another choice at each call).

    Attributes:
        scores_: [n] float64, of all rows.
        sample_indices_, sampling_strategy_: as in `FacilityLocationSampler`.

    Example:
        >>> import numpy as np
        >>> from flashcoreset.integrations.sklearn import CCSSampler
        >>> X, y = np.random.default_rng(0).standard_normal((50, 3)), np.arange(50) % 5 == 0
        >>> CCSSampler(n_samples=15, mislabel_ratio=0.1).fit_resample(X, y)[0].shape
        (15, 3)
    """

    def __init__(
        self,
        sampling_strategy: Strategy = "auto",
        *,
        n_samples: int | None = None,
        estimator: Any = None,
        score: str = "margin",
        cv: int = 5,
        mislabel_ratio: float = 0.0,
        n_strata: int = 50,
        random_state: Any = 0,
    ) -> None:
        self.sampling_strategy = sampling_strategy
        self.n_samples = n_samples
        self.estimator = estimator
        self.score = score
        self.cv = cv
        self.mislabel_ratio = mislabel_ratio
        self.n_strata = n_strata
        self.random_state = random_state

    def _choose(self, features: np.ndarray, codes: np.ndarray) -> np.ndarray:
        one_of(self.score, "score", _SCORES)
        sizes = np.bincount(codes)
        folds = min(as_integer(self.cv, "cv"), int(sizes.min()))
        if len(sizes) < 2 or folds < 2:
            raise ValueError(
                f"y must have two classes of two rows at least, and cv be >= 2, got class sizes {sizes.tolist()} and cv={self.cv}"
            )
        estimator = self.estimator
        if estimator is None:
            estimator = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        p = cross_val_predict(clone(estimator), features, codes, cv=folds, method="predict_proba")
        logits = torch.from_numpy(np.log(np.maximum(p, np.finfo(np.float64).tiny)))
        scores = sample_scores(logits, torch.from_numpy(codes))
        self.scores_ = getattr(scores, self.score).numpy()
        self._margins = scores.margin.numpy()
        self._draws = _seed(self.random_state)
        return super()._choose(features, codes)

    def _choose_of_class(self, features: np.ndarray, count: int, rows: np.ndarray) -> np.ndarray:
        return ccs(
            self.scores_[rows],
            count,
            mislabel_scores=self._margins[rows],
            mislabel_ratio=self.mislabel_ratio,
            n_strata=self.n_strata,
            seed=self._draws,
        ).indices.numpy()


class AutoCoresetSampler(_Sampler):
    """A weighted subset on which a classifier fits as on all rows: `flashcoreset.autocoreset`, with as many rows of each class.

    The rows count by `sample_weight_`; pass it where the classifier is fitted: `fit(X, y, sample_weight=sampler.sample_weight_)`. A
    Pipeline does not.

    Args:
        n_samples: the most rows to pick; None: the size of the smallest class, of each class.
        model, loss, method, n_initial, patience: as in `flashcoreset.autocoreset`.
        random_state: an int, a numpy.random.RandomState or None (another choice at each call).

    Attributes:
        sample_weight_: [k] float64, the weight of each row chosen; their sum is n.
        sample_indices_: [k] int64, the rows chosen, ascending.
        sampling_strategy_: a dict of label to the most picks.

    Example:
        >>> import numpy as np
        >>> from flashcoreset.integrations.sklearn import AutoCoresetSampler
        >>> X, y = np.random.default_rng(0).standard_normal((60, 3)), np.arange(60) % 3 == 0
        >>> sampler = AutoCoresetSampler(n_samples=20)
        >>> X_small, y_small = sampler.fit_resample(X, y)
        >>> len(X_small) <= 20, round(sampler.sample_weight_.sum(), 6)
        (True, 60.0)
    """

    def __init__(
        self,
        *,
        n_samples: int | None = None,
        model: Any = "logistic_regression",
        loss: Any = None,
        method: str = "caratheodory",
        n_initial: int = 3,
        patience: int = 5,
        random_state: Any = 0,
    ) -> None:
        self.n_samples = n_samples
        self.model = model
        self.loss = loss
        self.method = method
        self.n_initial = n_initial
        self.patience = patience
        self.random_state = random_state

    def _counts(self, sizes: np.ndarray, y: Any) -> dict[Any, int]:
        total = len(sizes) * int(sizes.min())
        if self.n_samples is not None:
            total = as_integer(self.n_samples, "n_samples")
            if not len(sizes) <= total <= sizes.sum():
                raise ValueError(
                    f"n_samples must be between the {len(sizes)} classes and the {sizes.sum()} rows, got {total}"
                )
        self._total = total
        return dict.fromkeys(self.classes_.tolist(), math.ceil(total / len(sizes)))

    def _choose(self, features: np.ndarray, codes: np.ndarray) -> np.ndarray:
        coreset = autocoreset(
            features,
            codes,
            self.model,
            self.loss,
            self._total,
            method=self.method,
            n_initial=self.n_initial,
            patience=self.patience,
            groups=codes,
            seed=_seed(self.random_state),
        )
        self.sample_weight_ = coreset.weights.double().numpy()
        return coreset.indices.numpy()


def _seed(random_state: Any) -> int:
    if isinstance(random_state, numbers.Integral):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31))


def _labels(y: Any) -> np.ndarray:
    """Labels [n] of targets [n], [n, 1] or one-hot rows."""
    if type_of_target(y) == "multilabel-indicator":
        rows = y.toarray() if scipy.sparse.issparse(y) else np.asarray(y)
        if (rows.sum(1) != 1).any():
            raise ValueError(
                "y must have one class a row; multilabel and multioutput targets are not supported"
            )
        return rows.argmax(1)
    return column_or_1d(y)


def _take(value: Any, rows: np.ndarray) -> Any:
    """The rows of a container, in a container of its kind."""
    if hasattr(value, "iloc"):
        return value.iloc[rows]
    if isinstance(value, (list, tuple)):
        return type(value)(value[row] for row in rows)
    if scipy.sparse.issparse(value):
        return value.tocsr()[rows].asformat(value.format)
    return value[rows]


def _wanted(strategy: Strategy, sizes: dict[Any, int], y: Any) -> dict[Any, int]:
    """A sampling strategy as a dict of label to number of picks."""
    smallest = min(sizes.values())
    if isinstance(strategy, str):
        one_of(strategy, "sampling_strategy", _STRATEGIES)
        first, last = min(sizes, key=lambda c: sizes[c]), max(sizes, key=lambda c: sizes[c])
        skipped = {"auto": first, "not minority": first, "not majority": last}
        of = (last,) if strategy == "majority" else [c for c in sizes if c != skipped.get(strategy, object())]
        return dict.fromkeys(of, smallest)
    if isinstance(strategy, numbers.Real) and not isinstance(strategy, bool):
        if len(sizes) != 2 or not 0 < strategy <= 1:
            raise ValueError(
                f"sampling_strategy as a number must be in (0, 1], for two classes, got {strategy} for {len(sizes)}"
            )
        last = max(sizes, key=lambda c: sizes[c])
        wanted: Mapping[Any, Any] = {last: int(smallest / strategy)}
    elif isinstance(strategy, Mapping):
        wanted = strategy
    elif callable(strategy):
        wanted = strategy(y)
    else:
        raise TypeError(
            f"sampling_strategy must be a str, a number, a dict or a callable, got {type(strategy).__name__}"
        )
    for label, count in wanted.items():
        if label not in sizes:
            raise ValueError(
                f"sampling_strategy: y has no class {label!r}; it has {', '.join(map(repr, sizes))}"
            )
        if not 0 <= as_integer(count, f"sampling_strategy[{label!r}]") <= sizes[label]:
            raise ValueError(
                f"sampling_strategy: {count} rows of class {label!r} are wanted, and it has {sizes[label]}"
            )
    return {label: int(count) for label, count in wanted.items()}
