"""Kernels for choosing training data, and the coreset methods built on them.

Example:
    >>> import torch, flashcoreset as fc
    >>> fc.facility_location(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), 3).indices.shape
    torch.Size([3])
"""

from importlib.metadata import version as _version

from flashcoreset import compat, distributed, integrations, kernels, plot
from flashcoreset._core.budgets import allocate_budgets
from flashcoreset._core.errors import (
    BackendUnavailableError,
    ConvergenceWarning,
    InputWarning,
    SlowPathWarning,
)
from flashcoreset._core.files import Rows, open_rows, read_ahead
from flashcoreset._core.forks import one_thread_in_children as _one_thread_in_children
from flashcoreset._core.imports import finish_before_forks as _finish_imports_before_forks
from flashcoreset._core.memory import memory_estimate
from flashcoreset._core.results import Coreset, Selection
from flashcoreset._core.saving import load
from flashcoreset.caratheodory import caratheodory
from flashcoreset.facility_location import facility_location
from flashcoreset.gradients.adam import AdamState, RankOneAdamState
from flashcoreset.gradients.loader import sketch_loader
from flashcoreset.gradients.outer_products import OuterProductGradients
from flashcoreset.gradients.rules import register_gradient_rule
from flashcoreset.gradients.sketcher import GradientSketcher
from flashcoreset.gradients.zeroth_order import LowRankGradients, zeroth_order_gradients
from flashcoreset.matching import match_gradients, matching_error
from flashcoreset.methods import (
    CoLM,
    autocoreset,
    ccs,
    coverage_auc,
    goracs,
    k_center,
    nearest,
    random_subset,
    select,
    simcore,
    small_sources,
    top_scores,
    tune_ccs,
)
from flashcoreset.scores import SampleScores, sample_scores
from flashcoreset.scores.dynamics import TrainingDynamics
from flashcoreset.sinkhorn import Divergence, Transport, sinkhorn, sinkhorn_divergence
from flashcoreset.sketch import projection_matrix, sketch

__version__ = _version("flashcoreset")

_one_thread_in_children()
_finish_imports_before_forks()

__all__ = [
    "AdamState",
    "BackendUnavailableError",
    "CoLM",
    "ConvergenceWarning",
    "Coreset",
    "Divergence",
    "GradientSketcher",
    "InputWarning",
    "LowRankGradients",
    "OuterProductGradients",
    "RankOneAdamState",
    "Rows",
    "SampleScores",
    "Selection",
    "SlowPathWarning",
    "TrainingDynamics",
    "Transport",
    "__version__",
    "allocate_budgets",
    "autocoreset",
    "caratheodory",
    "ccs",
    "compat",
    "coverage_auc",
    "distributed",
    "facility_location",
    "goracs",
    "integrations",
    "k_center",
    "kernels",
    "load",
    "match_gradients",
    "matching_error",
    "memory_estimate",
    "nearest",
    "open_rows",
    "plot",
    "projection_matrix",
    "random_subset",
    "read_ahead",
    "register_gradient_rule",
    "sample_scores",
    "select",
    "simcore",
    "sinkhorn",
    "sinkhorn_divergence",
    "sketch",
    "sketch_loader",
    "small_sources",
    "top_scores",
    "tune_ccs",
    "zeroth_order_gradients",
]
