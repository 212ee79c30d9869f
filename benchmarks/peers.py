"""The rivals' calls, as their documentation shows them, with their progress bars and known warnings off.

Nothing of ours runs here: a peer gets plain arrays and gives plain arrays back. Facility location returns
(indices [k], gains [k], similarity [n, m]), so that the check can use the very numbers that the peer chose by.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import torch

Picks = tuple[np.ndarray, np.ndarray, np.ndarray]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Both packages use names that newer SciPy and Numba releases deprecate; a user sees these warnings only once.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def submodlib_cosine_matrix(x: np.ndarray) -> np.ndarray:
    """submodlib's own dense similarity matrix of points [n, d]; the fastest of the three ways it offers."""
    with _quiet():
        from submodlib.helper import create_kernel

        return create_kernel(x, metric="cosine", mode="dense", method="sklearn")


def submodlib_lazy(similarity: np.ndarray, k: int) -> Picks:
    """submodlib's lazy greedy on a square similarity matrix [n, n]."""
    with _quiet():
        from submodlib import FacilityLocationFunction

        function = FacilityLocationFunction(
            n=similarity.shape[0], mode="dense", separate_rep=False, sijs=similarity, pybind_mode="array"
        )
        chosen = function.maximize(budget=k, optimizer="LazyGreedy", show_progress=False, verbose=False)
    indices, gains = zip(*chosen, strict=True)
    return np.array(indices, dtype=np.int64), np.array(gains), similarity


def submodlib_cosine(x: np.ndarray, k: int) -> Picks:
    """From points to picks: the similarity matrix, then lazy greedy."""
    return submodlib_lazy(submodlib_cosine_matrix(x), k)


def submodlib_l1(x: np.ndarray, k: int, offset: float) -> Picks:
    """From points to picks with ``s = offset - |x_i - x_j|_1``: submodlib has no such metric, torch.cdist fills in."""
    points = torch.from_numpy(x)
    similarity = torch.cdist(points, points, p=1).neg_().add_(offset)
    return submodlib_lazy(similarity.numpy(), k)


def apricot_lazy(similarity: np.ndarray, k: int) -> Picks:
    """apricot's lazy greedy on a precomputed similarity matrix; every call compiles its Numba kernels anew."""
    with _quiet():
        from apricot import FacilityLocationSelection

        selector = FacilityLocationSelection(k, metric="precomputed", optimizer="lazy", verbose=False).fit(
            similarity
        )
    return np.asarray(selector.ranking, dtype=np.int64), np.asarray(selector.gains), similarity


@functools.cache
def _apricot_kernels() -> dict[str, object]:
    with _quiet():
        from apricot.functions import facilityLocation as module
    return {
        name: functools.cache(getattr(module, name)) for name in ("calculate_gains", "calculate_gains_sieve")
    }


def apricot_lazy_compiled(similarity: np.ndarray, k: int) -> Picks:
    """The same with the compiled kernels kept from call to call: what apricot's algorithm costs without its compiler."""
    with mock.patch.multiple("apricot.functions.facilityLocation", **_apricot_kernels()):
        return apricot_lazy(similarity, k)


def cdist_l1(x: torch.Tensor) -> torch.Tensor:
    """[n, d] -> [n, n] Manhattan distances."""
    return torch.cdist(x, x, p=1)


def mm_cosine(x: torch.Tensor) -> torch.Tensor:
    """[n, d] -> [n, n] cosines by one library product."""
    unit = torch.nn.functional.normalize(x, dim=1)
    return torch.mm(unit, unit.T)


def mm_dot(x: torch.Tensor) -> torch.Tensor:
    """[n, d] -> [n, n] inner products by one library product."""
    return torch.mm(x, x.T)


def full_order(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities [n, K] and, for each of the K lists, all n items sorted by them, [K, n]."""
    return s, torch.argsort(s.T, dim=1, descending=True, stable=True)


def full_order_of_features(x: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from features [n, d] and unit centroids [K, d]."""
    return full_order(torch.mm(torch.nn.functional.normalize(x, dim=1), centroids.T))


def eager_scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Loss, entropy, margin, EL2N and correctness of logits [n, C], each as usually written in torch."""
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    log_p = logits.float().log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    own = p.gather(1, targets[:, None])
    margin = own[:, 0] - p.scatter(1, targets[:, None], 0).amax(1)
    el2n = (p - torch.nn.functional.one_hot(targets, p.shape[1])).norm(dim=1)
    return loss, entropy, margin, el2n, logits.argmax(1) == targets


def masked_strata(scores: torch.Tensor, k: int, n_strata: int) -> torch.Tensor:
    """Samples of strata of equal width, each found by a mask over all scores and drawn by a permutation."""
    edges = torch.linspace(float(scores.min()), float(scores.max()), n_strata + 1)
    edges[-1] = torch.inf
    members = [((scores >= low) & (scores < high)).nonzero()[:, 0] for low, high in pairwise(edges)]
    picks = []
    for place, rows in enumerate(sorted(members, key=len)):
        count = min(len(rows), k // (n_strata - place))
        k -= count
        picks.append(rows[torch.randperm(len(rows))[:count]])
    return torch.cat(picks)


def svd_caratheodory(x: np.ndarray, clusters_per_dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """At most d + 1 rows of x [n, d] and their weights, by one singular value decomposition per null vector; rows are
    clustered in runs, `clusters_per_dimension` * (d + 1) of them in each round."""
    n, d = x.shape
    rows, weights = np.arange(n), np.ones(n)
    while len(rows) > d + 1:
        size = -(-len(rows) // (clusters_per_dimension * (d + 1)))
        ones = np.concatenate([np.ones((len(rows), 1)), x[rows]], 1)
        starts = np.arange(0, len(rows), size)
        sums = np.add.reduceat(weights[:, None] * ones, starts)
        rho = np.ones(len(sums))
        while np.count_nonzero(rho) > d + 1:
            live = np.flatnonzero(rho)[: d + 2]
            v = np.linalg.svd(sums[live].T)[2][-1]
            v = v if v.max() > 0 else -v
            steps = np.divide(rho[live], v, out=np.full(len(v), np.inf), where=v > 0)
            first = steps.argmin()
            rho[live] -= steps[first] * v
            rho[live[first]] = 0
        factors = np.repeat(rho, np.diff(np.append(starts, len(rows))))
        rows, weights = rows[factors > 0], (weights * factors)[factors > 0]
    return rows, weights


def uniform_fits(
    x: np.ndarray, y: np.ndarray | None, model: Any, loss: Any, k: int, count: int, seed: int
) -> list[float]:
    """Total losses on all data of models fitted on uniform samples of k rows, all of one weight."""
    from sklearn.base import clone

    rng = np.random.default_rng([seed, 1])
    classes = 0 if y is None or y.dtype.kind == "f" else len(np.unique(y))
    totals: list[float] = []
    while len(totals) < count:
        rows = rng.choice(len(x), k, replace=False)
        if classes and len(np.unique(y[rows])) < classes:
            continue
        fit = clone(model).fit(x[rows], None if y is None else y[rows], sample_weight=np.full(k, len(x) / k))
        totals.append(float(loss(fit, x, y).sum()))
    return totals


_ITERATIONS = 100
_REG = 0.05


def pot_plain_float32(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """POT's plain solver on float32 arrays: exactly 100 iterations of one problem of given costs."""
    return _pot(inputs["a32"], inputs["b32"], inputs["single"])


def pot_plain(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The same in float64, its default."""
    return _pot(inputs["a"], inputs["b"], inputs["double"])


def _pot(a: np.ndarray, b: np.ndarray, cost: np.ndarray) -> np.ndarray:
    import ot

    with _quiet():
        return ot.sinkhorn(a, b, cost, _REG, numItermax=_ITERATIONS, stopThr=0, warn=False)


def pot_log_float32(inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """POT's log-domain solver on torch float32 tensors."""
    import ot

    weights = torch.full((inputs["one"].shape[0],), 1 / inputs["one"].shape[0])
    with _quiet():
        plan = ot.bregman.sinkhorn_log(
            weights, weights, inputs["one"], _REG, numItermax=_ITERATIONS, stopThr=0, warn=False
        )
    return plan.numpy()


def pot_loop(inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """POT's plain solver for one problem after the other, float32."""
    return np.stack([_pot(inputs["a32"], inputs["b32"], cost) for cost in inputs["cost"].numpy()])


def pot_batch(inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """POT's batched solver on torch float32 tensors."""
    from ot.batch import solve_batch

    with _quiet():
        return solve_batch(inputs["cost"], reg=_REG, max_iter=_ITERATIONS, tol=0).plan.numpy()


def geomloss_value(inputs: dict[str, torch.Tensor]) -> float:
    """geomloss' entropic cost, not debiased; its cost is half the squared distance. At its default scaling of 0.5 it is 5 % off, at
    0.9 by a thousandth."""
    with _quiet():
        from geomloss import SamplesLoss

        loss = SamplesLoss(
            "sinkhorn", p=2, blur=(inputs["reg"] / 2) ** 0.5, debias=False, scaling=0.9, backend="tensorized"
        )
        return 2 * float(loss(inputs["x"], inputs["y"]))


def trak_rademacher(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """trak's projector without CUDA: random signs made in blocks of 100 columns. Its output is not scaled."""
    from trak.projectors import BasicProjector

    d, dim = inputs["x"].shape[1], inputs["dim"]
    projector = BasicProjector(d, dim, seed=0, proj_type="rademacher", device=torch.device("cpu"))
    return projector.project(inputs["x"], model_id=0) / dim**0.5


def dattri_rademacher(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """dattri's projector without CUDA, made the same way."""
    with _quiet():
        from dattri.func.projection import BasicProjector, ProjectionType

    projector = BasicProjector(
        inputs["x"].shape[1],
        inputs["dim"],
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
    )
    return projector.project(inputs["x"], ensemble_id=0)


def mm_stored(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One library product with the matrix [D, dim] already in memory."""
    return torch.mm(inputs["x"], inputs["matrix"])


def index_add(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A sparse projection by torch.index_add, columns and signs [D] already in memory."""
    out = torch.zeros(inputs["x"].shape[0], inputs["dim"])
    return out.index_add_(1, inputs["columns"], inputs["x"] * inputs["signs"])


def vmap_sketches(inputs: dict[str, Any]) -> torch.Tensor:
    """Explicit per-sample gradients [B, D] by torch.func, and a sparse projection by torch.index_add."""
    from torch.func import functional_call, grad, vmap

    model, loss = inputs["model"], inputs["loss"]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model, values, (ids[None],)), ids[None])

    found = vmap(grad(one), (None, 0))(parameters, inputs["ids"])
    return index_add(inputs | {"x": torch.cat([found[name].flatten(1) for name in parameters], 1)})


def colm_step(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """CoLM's selection with every matrix formed: gradients from a direction in memory, both moments, updates [B, D], a sort of the
    means, and greedy facility location on each group's distances."""
    g, step, eps, (beta1, beta2) = inputs["g"], inputs["step"], inputs["eps"], inputs["betas"]
    if not isinstance(g, torch.Tensor):
        g = g.coefficients * inputs["z"]
    m = beta1 * inputs["m"] + (1 - beta1) * g
    v = beta2 * inputs["v"] + (1 - beta2) * g**2
    u = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    picks = []
    labels = inputs["groups"].unique()
    for label in labels:
        rows = (inputs["groups"] == label).nonzero()[:, 0]
        own = u[rows]
        part = own[:, own.mean(0).abs().topk(inputs["top"]).indices]
        distance = torch.cdist(part, part, p=1)
        similarity = distance.max() - distance
        covered, taken = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
        for _ in range(inputs["k"] // len(labels)):
            gains = (similarity - covered).clamp(min=0).sum(1).masked_fill(taken, -1)
            best = int(gains.argmax())
            taken[best] = True
            covered = torch.maximum(covered, similarity[best])
            picks.append(int(rows[best]))
    return {"picks": torch.tensor(picks), "m": m[picks].mean(0), "v": v[picks].mean(0)}


def pursuit_by_lstsq(
    g: np.ndarray, target: np.ndarray, k: int, nonnegative: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Orthogonal matching pursuit as GradMatch's code has it: lstsq of all picks at every step, nnls if that gives a weight
    below 0."""
    from scipy.optimize import nnls

    picks: list[int] = []
    residual, weights = target, np.zeros(0)
    for _ in range(k):
        score = g @ residual
        if not nonnegative:
            score = np.abs(score)
        score[picks] = -np.inf
        picks.append(int(score.argmax()))
        matrix = g[picks].T
        weights = np.linalg.lstsq(matrix, target, rcond=None)[0]
        if nonnegative and weights.min() < 0:
            weights = nnls(matrix, target)[0]
        residual = target - matrix @ weights
    return np.array(picks), weights


def geodesic_ascent(g: np.ndarray, target: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """GIGA (Campbell and Broderick 2018, algorithm 1), one product with all rows per step; rows in the order of their first
    pick."""
    norms, length = np.linalg.norm(g, axis=1), np.linalg.norm(target)
    units, goal = g / norms[:, None], target / length
    cosines = units @ goal
    weights, y, picks = np.zeros(len(g)), np.zeros_like(target), []
    for _ in range(k):
        along, towards = units @ y, goal @ y
        sine = np.sqrt(np.maximum(1 - along**2, 1e-30))
        n = int(np.where(sine > 1e-3, (cosines - towards * along) / sine, -1).argmax())
        ahead, behind = cosines[n] - towards * along[n], towards - cosines[n] * along[n]
        gamma = ahead / (ahead + behind)
        weights *= 1 - gamma
        weights[n] += gamma
        y = (1 - gamma) * y + gamma * units[n]
        weights, y = weights / np.linalg.norm(y), y / np.linalg.norm(y)
        if n not in picks:
            picks.append(n)
    indices = np.array(picks)
    return indices, weights[indices] * length / norms[indices] * (goal @ y)
