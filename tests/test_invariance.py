"""The things that a result must not depend on, for every public function: one table of calls, and the axes along which they
are repeated.

Same inputs, arguments and backend give the same bits, whatever the number of threads, the memory budget, the other rows of a
row-wise result, the process and the layout of the memory that the inputs lie in (docs/numerics.md).

The table also makes the golden files (tests/golden, written by tests/make_golden.py): the results of a release.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from torch import Tensor

import flashcoreset as fc

GOLDEN = Path(__file__).with_name("golden")
THREADS = (1, 2, 3, 8)

Inputs = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a public function on seeded inputs.

    Attributes:
        inputs: by name; tensors among them may lie in memory in any way.
        run: gets the inputs (as tensors or arrays) and further keywords, and returns tensors, numbers and results that hold these.
        backends: which of them run it; () for a function that takes none. Emulated and interpreted kernels take seconds, so
            that of each family a small call or two goes to them.
        budgets: values of `memory_budget` beside the default.
        rows: inputs that are cut along dimension 0, if row i of the results depends on row i of them alone.
    """

    inputs: Callable[[], Inputs]
    run: Callable[..., Any]
    backends: tuple[str, ...] = ("torch", "cpu")
    budgets: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    layouts: bool = True
    exact: frozenset[int] = frozenset()  # floating results that are the same bits in every build and release
    rounding: frozenset[int] = (
        frozenset()
    )  # results that are rounding errors themselves: differences of nearly equal numbers


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of NumPy's old generator, whose stream never changes."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).to(dtype)


def uniform(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape)).to(dtype)


def integers(seed: int, below: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, below, shape))


def points(**options: Any) -> Call:
    return Call(
        lambda: {"x": normal(1, 150, 17)},
        lambda x, **more: fc.facility_location(x, 12, **options, **more),
        budgets=(0, 5000, 2**30),
    )


def gradients(backends: tuple[str, ...] = ("torch", "cpu"), **options: Any) -> Call:
    return Call(
        lambda: {"g": normal(2, 60, 300) + 0.2},
        lambda g, **more: fc.match_gradients(g, 8, **options, **more),
        backends,
    )


def transport(**options: Any) -> Call:
    return Call(
        lambda: {"x": normal(3, 40, 5), "y": normal(4, 33, 5)},
        lambda x, y, **more: fc.sinkhorn(x, y, **{"reg": 0.5, "max_iter": 30, "tol": 0.0, **options, **more}),
        rounding=frozenset({4}),
    )


def with_adam(g: Any, **more: Any) -> fc.Selection:
    state = fc.AdamState(normal(5, 300) * 0.1, normal(6, 300).square(), 3)
    return fc.match_gradients(g, 8, normalize=state, top=40, groups=integers(7, 3, 60), **more)


def own(x: Any) -> Tensor:
    return torch.from_numpy((x.numpy() if isinstance(x, Tensor) else x).copy())


def low_rank(c: Any, options: dict[str, Any], **more: Any) -> fc.Selection:
    backend = more.get("backend")
    given = fc.LowRankGradients(own(c), 11, 5000, backend)
    return fc.match_gradients(given, 8, **options, **more)


def colm(g: Any, **more: Any) -> tuple[Any, ...]:
    chooser = fc.CoLM(8, top=50, **more)
    first = chooser.select(g, groups=integers(7, 3, 60))
    second = chooser.select(g, groups=integers(8, 2, 60))
    return first.indices, first.weights, second.indices, second.weights


def perturbed(w: Any, **more: Any) -> Any:
    # In float64: a loss's rounding comes back divided by the step, and that of torch's products depends on the processor.
    a = normal(9, 6, 400).double()

    def losses() -> torch.Tensor:
        return torch.tanh(a @ w.double())

    return fc.zeroth_order_gradients(losses, [w], seed=5, n_perturbations=3).dense()


def dynamics(logits: Any, targets: Any, **more: Any) -> Any:
    found = fc.TrainingDynamics(len(targets))
    for epoch in range(3):
        found.update(
            torch.arange(len(targets)),
            logits,
            (own(targets) + epoch) % 7,
            epoch,
            **more,
        )
    return tuple(found.scores().values())


def autocoreset(x: Any, y: Any) -> fc.Coreset:
    from sklearn.linear_model import LogisticRegression

    return fc.autocoreset(x, y, LogisticRegression(), "logistic_regression", 20, n_initial=2, patience=1)


COMPILED = ("torch", "cpu")
EVERY = (*COMPILED, "cuda", "triton")
LOW_RANK: dict[str, dict[str, Any]] = {
    "top": {"top": 64},
    "euclidean": {"metric": "euclidean"},
    "omp": {"method": "omp"},
}
CALLS: dict[str, dict[str, Call]] = {
    "facility_location": {
        "cosine": points(),
        "euclidean": points(metric="euclidean", method="naive"),
        "l1": points(metric="l1", method="stochastic", seed=3),
        "dot": points(metric="dot", weights=uniform(12, 150)),
        "groups": points(metric="sqeuclidean", groups=integers(13, 3, 150)),
        "clients": Call(
            lambda: {"x": normal(1, 60, 300), "clients": normal(14, 90, 300)},
            lambda x, clients, **more: fc.facility_location(
                x, 5, clients=clients, metric="euclidean", **more
            ),
            budgets=(0, 2**30),
        ),
        "precomputed": Call(
            lambda: {"s": uniform(15, 80, 95, dtype=torch.float32)},
            lambda s, **more: fc.facility_location(s, 9, metric="precomputed", **more),
            budgets=(0, 5000),
        ),
        "float64": Call(
            lambda: {"x": normal(1, 70, 9, dtype=torch.float64)},
            lambda x, **more: fc.facility_location(x, 7, metric="euclidean", **more),
            backends=EVERY,
            budgets=(0, 2**30),
        ),
    },
    "match_gradients": {
        "medoid": gradients(),
        "cosine": gradients(metric="cosine"),
        "omp": gradients(method="omp", ridge=0.1, backends=EVERY),
        "frank_wolfe": gradients(method="frank_wolfe"),
        "adam": Call(lambda: {"g": normal(2, 60, 300)}, with_adam, backends=EVERY),
        **{
            f"low_rank_{name}": Call(
                lambda: {"c": normal(10, 60, 2)},
                functools.partial(low_rank, options=options),
                # Eight rows meet the mean of rows of two numbers exactly: what is left of it is rounding.
                rounding=frozenset({4} if name == "omp" else ()),
            )
            for name, options in LOW_RANK.items()
        },
    },
    "caratheodory": {
        "all": Call(lambda: {"x": normal(16, 900, 6)}, fc.caratheodory, backends=EVERY),
        "sample": Call(
            lambda: {"x": normal(16, 900, 6), "w": uniform(17, 900)},
            lambda x, w, **more: fc.caratheodory(x, w, 40, **more),
        ),
    },
    "sketch": {
        kind: Call(
            lambda: {"x": normal(18, 9, 700)},
            functools.partial(lambda x, kind, **more: fc.sketch(x, 24, kind=kind, seed=4, **more), kind=kind),
            backends=EVERY,
            rows=("x",),
        )
        for kind in ("rademacher", "gaussian", "sjlt", "srht", "gaussian-boxmuller", "mask", "grass")
    },
    "projection_matrix": {
        kind: Call(
            dict,
            functools.partial(
                lambda kind, **more: fc.projection_matrix(70, 9, kind=kind, seed=4, **more), kind=kind
            ),
            backends=EVERY,
            exact=frozenset() if kind.startswith("gaussian") else frozenset({0}),
        )
        for kind in ("rademacher", "gaussian", "sjlt", "srht", "gaussian-boxmuller", "mask", "grass")
    },
    "sample_scores": {
        "samples": Call(
            lambda: {"logits": 3 * normal(19, 40, 70), "targets": integers(20, 70, 40)},
            fc.sample_scores,
            backends=(*COMPILED, "triton"),
            rows=("logits", "targets"),
        ),
        "tokens": Call(
            lambda: {"logits": 3 * normal(19, 9, 5, 30), "targets": integers(20, 30, 9, 5)},
            fc.sample_scores,
            rows=("logits", "targets"),
        ),
        "half": Call(
            lambda: {"logits": (3 * normal(19, 20, 70)).half(), "targets": integers(20, 70, 20)},
            fc.sample_scores,
            rows=("logits", "targets"),
        ),
    },
    "sinkhorn": {
        "balanced": transport(),
        "unbalanced": transport(reg_marginal=2.0, metric="euclidean"),
        "l2": transport(norm="l2", tol=1e-3),
        "batch": Call(
            lambda: {"x": normal(3, 5, 20, 4), "y": normal(4, 5, 17, 4)},
            lambda x, y, **more: fc.sinkhorn(x, y, reg=0.5, max_iter=20, tol=0.0, **more),
            backends=(*COMPILED, "cuda"),
            rows=("x", "y"),
            rounding=frozenset({4}),
        ),
    },
    "sinkhorn_divergence": {
        "all": Call(
            lambda: {"x": normal(3, 4, 20, 4), "y": normal(4, 4, 17, 4)},
            lambda x, y, **more: fc.sinkhorn_divergence(x, y, reg=0.5, max_iter=20, tol=0.0, **more),
            rows=("x", "y"),
        )
    },
    "zeroth_order_gradients": {
        "all": Call(lambda: {"w": normal(21, 400)}, perturbed, backends=(), layouts=False)
    },
    "TrainingDynamics": {
        "all": Call(
            lambda: {"logits": normal(22, 30, 7), "targets": integers(23, 7, 30)},
            dynamics,
            rows=("logits", "targets"),
        )
    },
    "CoLM": {"all": Call(lambda: {"g": normal(2, 60, 300)}, colm)},
    "simcore": {
        "k": Call(
            lambda: {"x": normal(24, 200, 12), "t": normal(25, 60, 12)},
            lambda x, t, **more: fc.simcore(x, t, 40, n_clusters=6, patience=20, **more),
            backends=COMPILED,
            budgets=(20_000, 2**30),
        )
    },
    "goracs": {
        "exact": Call(
            lambda: {"x": normal(26, 60, 6), "v": normal(27, 25, 6), "norms": uniform(28, 60)},
            lambda x, v, norms, **more: fc.goracs(x, v, norms, 6, lam=0.3, max_exchanges=4, **more),
            budgets=(2**30,),
        )
    },
    "autocoreset": {
        "logistic_regression": Call(
            lambda: {"x": normal(29, 120, 4), "y": integers(30, 2, 120)},
            autocoreset,
            backends=(),
            layouts=False,
        )
    },
    "ccs": {
        "all": Call(
            lambda: {"scores": uniform(31, 500), "hard": uniform(32, 500)},
            lambda scores, hard: fc.ccs(scores, 50, mislabel_scores=hard, mislabel_ratio=0.1, seed=6),
            backends=(),
        )
    },
    "tune_ccs": {
        "all": Call(
            lambda: {"scores": uniform(31, 500), "hard": uniform(32, 500)},
            lambda scores, hard: fc.tune_ccs(
                scores, 50, lambda chosen: float(chosen.sum()), mislabel_scores=hard, seed=6
            ),
            backends=(),
        )
    },
    "coverage_auc": {
        "all": Call(
            lambda: {"x": normal(35, 120, 6), "y": normal(36, 40, 6)},
            lambda x, y, **more: fc.coverage_auc(x, range(0, 120, 7), test=y, **more),
            budgets=(1000, 2**30),
        )
    },
    "top_scores": {
        "all": Call(
            lambda: {"scores": integers(33, 40, 200).double()},
            lambda scores: fc.top_scores(scores, 50),
            backends=(),
        )
    },
    "random_subset": {
        "groups": Call(
            lambda: {"labels": integers(35, 3, 90)},
            lambda labels: fc.random_subset(90, 30, groups=labels, seed=4),
            backends=(),
        )
    },
    "k_center": {
        metric: Call(
            lambda: {"x": normal(1, 150, 17)},
            lambda x, metric=metric, **more: fc.k_center(x, 12, metric=metric, **more),
            budgets=(1, 2**30),
        )
        for metric in ("euclidean", "cosine")
    },
    "nearest": {
        metric: Call(
            lambda: {"x": normal(24, 200, 12), "t": normal(25, 60, 12)},
            lambda x, t, metric=metric, **more: fc.nearest(x, t, 40, metric=metric, **more),
            backends=EVERY if metric == "l1" else COMPILED,
            budgets=(1, 20_000),
        )
        for metric in ("cosine", "l1")
    },
    "select": {
        "simcore": Call(
            lambda: {"x": normal(24, 200, 12), "t": normal(25, 60, 12)},
            lambda x, t: fc.select("simcore", openset=x, target=t, k=30, n_clusters=6, patience=20),
            backends=(),
        )
    },
    "small_sources": {
        "all": Call(
            lambda: {"labels": integers(36, 9, 90)},
            lambda labels: fc.small_sources(labels, share=0.12),
            backends=(),
        )
    },
    "allocate_budgets": {
        "published_balanced": Call(
            lambda: {"sizes": integers(34, 90, 12) + 1},
            lambda sizes: fc.allocate_budgets(sizes, 77, "published_balanced", seed=5),
            backends=(),
        ),
        "all": Call(
            lambda: {"sizes": integers(34, 90, 12) + 1},
            lambda sizes: fc.allocate_budgets(sizes, 77),
            backends=(),
        ),
    },
}

# Public names that are in no call above, and why; errors and warnings return nothing.
NO_PROMISE = {
    "GradientSketcher": "reads the gradients of torch's own backward pass, whose products depend on threads and batches",
    "sketch_loader": "a GradientSketcher for each batch",
    "register_gradient_rule": "keeps a function",
    "AdamState": "a value",
    "Coreset": "a value",
    "Divergence": "a value",
    "OuterProductGradients": "a value; its columns are torch's products",
    "matching_error": "a float of torch's products and sums, whose last bits depend on threads",
    "LowRankGradients": "a value; its directions are those of zeroth_order_gradients",
    "RankOneAdamState": "a value",
    "Rows": "what a file holds",
    "SampleScores": "a value",
    "Selection": "a value",
    "Transport": "a value",
    "__version__": "a string",
    "compat": "a module; what it takes over calls the functions above",
    "distributed": "a module, whose results tests/test_distributed.py compares with those of the functions above",
    "integrations": "a module; its selectors call the functions above",
    "kernels": "a module; what is under the functions above",
    "load": "what a file holds",
    "memory_estimate": "a bound of bytes, which grows with the number of threads",
    "open_rows": "what a file holds",
    "plot": "a module of pictures",
    "read_ahead": "the caller's own batches",
}


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def test_every_public_name_is_looked_after() -> None:
    named = CALLS.keys() | NO_PROMISE.keys()
    public = {name for name in fc.__all__ if not _is_error(getattr(fc, name))}
    assert public - named == set(), "add a call to CALLS, or the reason why there is none to NO_PROMISE"
    assert named - public == set()
    assert CALLS.keys() & NO_PROMISE.keys() == set()


ALL = [(f"{name}-{variant}", call) for name, calls in CALLS.items() for variant, call in calls.items()]
ON = [
    pytest.param(call, backend, id=f"{label}-{backend}" if backend else label)
    for label, call in ALL
    for backend in call.backends or ("",)
]
COMPILED_ON = [p for p in ON if p.values[1] in ("", *COMPILED)]


def tensors(result: Any) -> Iterator[Tensor]:
    """All tensors and numbers of a result, in order."""
    if isinstance(result, Tensor):
        yield result.detach()
    elif isinstance(result, (bool, int, float)):
        yield torch.tensor(result, dtype=torch.float64)
    elif is_dataclass(result):
        for one in fields(result):
            if one.name != "info":  # which has times
                yield from tensors(getattr(result, one.name))
    elif isinstance(result, (tuple, list)):
        for one in result:
            yield from tensors(one)
    elif result is not None and not isinstance(result, str):
        raise TypeError(type(result).__name__)


def results(call: Call, backend: str, inputs: dict[str, Any] | None = None, **more: Any) -> list[Tensor]:
    options = {"backend": backend, **more} if backend else more
    found = call.run(**(call.inputs() if inputs is None else inputs), **options)
    if isinstance(found, fc.Transport):
        found = (found.f, found.g, found.value, found.transport_cost, found.error, found.iterations)
    return list(tensors(found))


def same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for place, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.dtype == b.dtype, place
        assert a.shape == b.shape, place
        assert bits(a) == bits(b), f"result {place} differs: {a} and {b}"


def bits(x: Tensor) -> bytes:
    return (
        x.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        if x.dim()
        else x.reshape(1).view(torch.uint8).numpy().tobytes()
    )


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def available(request: pytest.FixtureRequest) -> None:
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend == "cuda":
        request.getfixturevalue("emulated_cuda")
    if backend == "triton" and platform.machine() != "x86_64":
        pytest.skip("triton is published for x86-64 alone")


@pytest.mark.parametrize(("call", "backend"), COMPILED_ON)
def test_threads(call: Call, backend: str) -> None:
    expected = results(call, backend)
    for count in THREADS[1:]:
        torch.set_num_threads(count)
        same(expected, results(call, backend))


@pytest.mark.parametrize(("call", "backend"), [p for p in COMPILED_ON if p.values[0].budgets])
def test_memory_budgets(call: Call, backend: str) -> None:
    expected = results(call, backend)
    for budget in call.budgets:
        same(expected, results(call, backend, memory_budget=budget))


@pytest.mark.parametrize(("call", "backend"), [p for p in ON if p.values[0].rows])
def test_batches(call: Call, backend: str) -> None:
    inputs = call.inputs()
    expected = results(call, backend)
    count = len(inputs[call.rows[0]])
    for cuts in [(2, 3), (1,), range(1, count)] if backend in ("", *COMPILED) else [(2, 3)]:
        parts = [
            results(
                call, backend, {name: x[begin:end] if name in call.rows else x for name, x in inputs.items()}
            )
            for begin, end in itertools.pairwise([0, *cuts, count])
        ]
        same(expected, [torch.cat(part) for part in zip(*parts, strict=True)])


@pytest.mark.parametrize("kind", ["sjlt", "srht"])
def test_rows_of_half_types_that_are_converted_in_parts(kind: str) -> None:
    """So many rows that they are converted to float32 in several pieces."""
    x = torch.zeros(3000, 33_000, dtype=torch.float16)
    x[-1] = normal(35, 33_000).half()
    found = fc.sketch(x, 3, kind=kind, seed=2)
    same([found[-1:]], [fc.sketch(x[-1:], 3, kind=kind, seed=2)])


def read_only(x: Tensor) -> np.ndarray:
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


def spread(x: Tensor) -> Tensor:
    """Every second entry of a larger tensor whose other entries are NaN, or large."""
    fill = float("nan") if x.is_floating_point() else 10**9
    wide = torch.full([2 * n + 1 for n in x.shape], fill, dtype=x.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def offset(x: Tensor) -> Tensor:
    """Not at the beginning of its storage, at an address that is no multiple of a vector."""
    flat = torch.zeros(x.numel() + 3, dtype=x.dtype)
    return flat[3:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "strided": spread,
    "offset": offset,
    "read-only": read_only,
    "backwards": lambda x: np.flip(np.flip(x.numpy()).copy()),  # negative strides
}  # fmt: skip


SOME_LAYOUTS = ("strided",)  # where kernels are emulated or interpreted


@pytest.mark.parametrize(("call", "backend"), [p for p in ON if p.values[0].layouts and p.values[0].inputs()])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_layouts(call: Call, backend: str) -> None:
    expected = results(call, backend)
    for layout in LAYOUTS if backend in ("", *COMPILED) else SOME_LAYOUTS:
        laid = {name: LAYOUTS[layout](x) for name, x in call.inputs().items()}
        same(expected, results(call, backend, laid))


@pytest.mark.parametrize(
    ("call", "backend"), [p for p in COMPILED_ON if p.values[0].layouts and p.values[0].inputs()]
)
def test_expanded_rows(call: Call, backend: str) -> None:
    """One row, 0 bytes from the next, is that row many times."""
    inputs = call.inputs()
    views = {name: x[:1].expand(x.shape) for name, x in inputs.items()}
    copies = {name: x.contiguous() for name, x in views.items()}
    same(results(call, backend, copies), results(call, backend, views))


def digests() -> dict[str, str]:
    """The bits of all calls that the CPU runs."""
    found = {}
    for label, call in ALL:
        for backend in call.backends or ("",):
            if backend in ("", *COMPILED):
                whole = b"".join(bits(x) for x in results(call, backend))
                found[f"{label}-{backend}"] = hashlib.sha256(whole).hexdigest()
    return found


def test_fresh_processes() -> None:
    code = f"import sys; sys.path.insert(0, {str(GOLDEN.parent)!r}); import json, test_invariance as t; print(json.dumps(t.digests()))"
    told = processes.run(code, PYTHONHASHSEED="7", OMP_NUM_THREADS="1")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout.splitlines()[-1]) == digests()


# ---- golden files

# By how much floating results may differ from those of a release: a build without fused multiply-adds rounds each product, and
# the width of its vectors decides the order of sums in losses and Sinkhorn iterations (docs/numerics.md). Between x86-64-v2,
# v3 and v4 that is 2.5e-7 at most; methods that make products with torch or fit scikit-learn's models have the rounding of the
# installed library.
GOLDEN_SHARE = 2e-6


def told(call: Call) -> list[dict[str, Any]]:
    """The results of the default backend as a golden file has them: floating numbers in hexadecimal, which is exact."""
    found = []
    for x in results(call, "cpu" if "cpu" in call.backends else ""):
        flat = x.reshape(-1).tolist()
        values = [v.hex() for v in flat] if x.is_floating_point() else [int(v) for v in flat]
        found.append({"dtype": str(x.dtype), "shape": list(x.shape), "values": values})
    return found


def golden_results(family: str) -> dict[str, list[dict[str, Any]]]:
    return {variant: told(call) for variant, call in CALLS[family].items()}


@pytest.mark.parametrize("family", CALLS)
def test_golden(family: str) -> None:
    """Results equal those that a release returned; tests/make_golden.py writes them anew, for changes that are meant."""
    golden = json.loads((GOLDEN / f"{family}.json").read_text())
    assert golden.keys() == CALLS[family].keys()
    for variant, expected in golden.items():
        call = CALLS[family][variant]
        found = told(call)
        assert len(found) == len(expected)
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            where = f"{variant}, result {place}"
            assert (a["dtype"], a["shape"]) == (b["dtype"], b["shape"]), where
            if place in call.rounding:
                continue
            if place in call.exact or not a["dtype"].startswith("torch.float"):
                assert a["values"] == b["values"], where
                continue
            x, y = (
                torch.tensor([float.fromhex(v) for v in r["values"]], dtype=torch.float64) for r in (a, b)
            )
            torch.testing.assert_close(
                x, y, rtol=GOLDEN_SHARE, atol=GOLDEN_SHARE * float(y.abs().max() if len(y) else 0), msg=where
            )
