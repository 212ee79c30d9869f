"""Gradient matching: a few weighted gradients that stand for many, group by group."""

from __future__ import annotations

from typing import Any

from flashcoreset._core.dispatch import check_backend
from flashcoreset._core.results import Selection
from flashcoreset._core.tensor import check_not_meta, is_traced
from flashcoreset.gradients.adam import AdamState, RankOneAdamState
from flashcoreset.matching import memory as memory  # registers the estimate
from flashcoreset.matching.error import matching_error
from flashcoreset.matching.op import call_op
from flashcoreset.matching.problem import check
from flashcoreset.matching.solve import match_members

__all__ = ["match_gradients", "matching_error"]


def match_gradients(
    g: Any,
    k: int | None,
    *,
    normalize: AdamState | RankOneAdamState | None = None,
    top: int | None = None,
    groups: Any = None,
    budgets: Any = None,
    metric: str = "l1",
    method: str = "medoid",
    nonnegative: bool = True,
    ridge: float = 0.0,
    backend: str | None = None,
) -> Selection:
    """A weighted subset of gradients that stands for all of them.

    Args:
        g: [B, D] gradients, one row per sample, float16, bfloat16, float32 or float64; `LowRankGradients`, for which nothing
            of size B x D or D x q is formed; or `OuterProductGradients`, of which some columns at a time are formed.
        k: how many gradients to take. With `budgets`: their sum, or None.
        normalize: Adam's history: each gradient is replaced by the update that Adam would make with it, and the `state` of the result
            is the history after a step with the chosen gradients. None matches the gradients themselves. If one of history and
            gradients is float32 and the other float64, all is float64.
        top: in each group, only the `top` dimensions of the largest |mean (normalised) gradient| count, ties to the lower
            dimension; 1 <= top <= D. None takes all.
        groups: [B] labels, integers or values that can be sorted, such as strings; each label is its own problem over its own members.
        budgets: how many to take from each group: a dict label -> count, or counts [G] for the labels 0..G-1. Default:
            `allocate_budgets` of the groups' sizes and `k`.
        metric: "l1", "euclidean", "sqeuclidean", "cosine" or "dot", between rows, for "medoid".
        method: "medoid" takes the gradients that are nearest to all others, by facility location. The other methods make a weighted
            sum of few gradients that is near the sum of all: "omp" by orthogonal matching pursuit (as in GradMatch), "frank_wolfe" by greedy
            iterative geodesic ascent, "caratheodory" exactly, if the rank of the gradients less their mean is below k.
        nonnegative: whether the weights of "omp" must be >= 0.
        ridge: for "omp": a multiple of the sum of squares of the weights that is added to the squared distance, >= 0.
        backend: None, "cpu", "cuda", "triton" or "torch".

    Returns:
        Selection on the device of `g`: `indices` [k] group by group in label order, in each in the order of the picks;
        `weights` [k], the sizes of their clusters, `gains` and `assignment` [B] as in `facility_location`. Methods other than "medoid"
        may take fewer than k; their `weights` are those of the sum, `gains` 0, `assignment` -1, and `objective` is minus the
        distance that is left, summed over the groups.
        `dims` [groups with a budget, top] int64, the largest first (None without `top`, and if one shared direction makes all
        dimensions alike); `state`, of the kind of `normalize`, its step one higher, its means unchanged if nothing was taken.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape, option, label or budget, a history of another D, NaN and infinity.
        BackendUnavailableError: if a `backend` was named that cannot run here.

    The sums of updates that decide which dimensions count, the rows and the distances are float64, whatever the dtype of `g`.

    With a `RankOneAdamState` and gradients along its one direction, every update is h(c) sign(z), c being the
    coefficient, and the history stays of this kind: numbers stand for rows if eps is small beside the square roots that it is
    added to (one part in a million); otherwise rows are made. Gradients along another direction make it an `AdamState`. A function
    given to torch.compile takes `AdamState` alone, to which `RankOneAdamState.dense` leads.

    Sources: Nguyen, Yang, Anand, Yang and Mirzasoleiman, "Mini-batch coresets for memory-efficient language model training on
    data mixtures" (CoLM), ICLR 2025, section 4; Killamsetty, Sivasubramanian, Ramakrishnan, De and Iyer, "GRAD-MATCH", ICML 2021;
    Campbell and Broderick, "Bayesian coreset construction via greedy iterative geodesic ascent", ICML 2018; Maalouf,
    Jubran and Feldman, "Fast and accurate least-mean-squares solvers", NeurIPS 2019.

    Example:
        >>> import torch, flashcoreset as fc
        >>> g = torch.tensor([[1.0, 0.0, 3.0], [1.1, 0.0, 3.0], [-2.0, 0.1, 3.0]])
        >>> found = fc.match_gradients(g, 2, top=2, normalize=fc.AdamState(torch.zeros(3), torch.ones(3), step=2))
        >>> found.indices, found.weights, found.dims, found.state.step
        (tensor([0, 2]), tensor([2., 1.]), tensor([[2, 0]]), 3)
    """
    problem, asked = check(g, k, normalize, top, groups, budgets, metric, method, nonnegative, ridge)
    check_backend(backend)
    if is_traced(problem.g.values):
        if problem.g.factors is not None:
            raise TypeError(
                "g must be rows or LowRankGradients in a function given to torch.compile, got OuterProductGradients; pass their sketch()"
            )
        if problem.method != "medoid" or (problem.top is not None and groups is not None):
            check_not_meta(problem.g.values, "g")
        return call_op(problem, asked, backend)
    return match_members(problem, backend)
