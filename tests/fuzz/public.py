"""Random programs that call the public functions, and the checks of their results."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from cases import Case, worst_error
from programs import (
    Program,
    Size,
    Step,
    Tensor,
    Value,
    array,
    hostile_any,
    hostile_array,
    hostile_float,
    hostile_int,
    hostile_word,
    literal,
)
from values import COSTS, FINITE, FLOATS, HALVES, KINDS, LAYOUTS, POINTS

import flashcoreset as fc

# Arguments that the work or the memory grows with: a large one would be carried out.
LONG = {"max_iter", "n_init", "max_exchanges", "n_candidates", "n_clusters", "n_initial", "dim", "D", "numel", "n_perturbations",
        "n_samples", "n_strata", "el2n_epochs", "top", "memory_budget"}  # fmt: skip


class WrongError(AssertionError):
    """A result is not what it must be, or two backends do not agree."""


# --------------------------------------------------------------------------------------------------- programs


class Recipes:
    """Arguments that fit each other, for each public function."""

    def __init__(self, r: random.Random) -> None:
        self.r = r
        most = r.choice((5, 30, 120))
        self.sizes = {name: r.randint(1, most) for name in "nmT"}
        self.sizes.update({name: r.randint(1, 6) for name in "dqBG"})
        self.sizes["C"] = r.randint(2, 9)
        self.sizes["D"] = r.randint(1, r.choice((8, 300)))
        self.sizes["k"] = r.randint(1, self.sizes["n"])
        self.dtype = r.choice(FLOATS * 3 + HALVES)

    def maybe(self, share: float, **values: Value) -> dict[str, Value]:
        return values if self.r.random() < share else {}

    def data(self, *shape: int | str, dtype: str | None = None, extreme: bool = False) -> Tensor:
        r = self.r
        layout = r.choice((*LAYOUTS, "numpy")) if (dtype or self.dtype) != "bfloat16" else r.choice(LAYOUTS)
        return array(
            *shape, dtype=dtype or self.dtype, content=r.choice(FINITE), layout=layout, seed=r.randrange(1000)
        )

    def labels(self, *shape: int | str, below: str = "3") -> Tensor:
        return array(*shape, dtype="int64", content=f"below:{below}", seed=self.r.randrange(1000))

    def seed(self) -> dict[str, Value]:
        return self.maybe(0.5, seed=literal(self.r.choice((0, 1, self.r.randrange(2**32)))))

    def facility_location(self) -> dict[str, Value]:
        r = self.r
        if r.random() < 0.2:
            self.sizes["m"] += self.sizes["n"] == self.sizes["m"]
            some = {"x": self.data("n", "m"), "k": Size("k"), "metric": literal("precomputed")}
            clients = "m"
        else:
            some = {"x": self.data("n", "d"), "k": Size("k"), "metric": literal(r.choice(POINTS))}
            clients = "n"
            if r.random() < 0.3:
                some["clients"], clients = self.data("m", "d"), "m"
        weights = array(clients, dtype=r.choice(FLOATS), content="positive", seed=r.randrange(100))
        some |= self.maybe(0.3, weights=weights)
        some |= self.maybe(
            0.5,
            method=literal(r.choice(("lazy", "naive", "stochastic"))),
            epsilon=literal(r.choice((0.01, 0.5))),
        )
        if clients == "n" and "clients" not in some:
            some |= self.maybe(0.2, groups=self.labels("n"))
        return some | self.seed()

    def sketch(self) -> dict[str, Value]:
        kind = self.r.choice(KINDS)
        return {"x": self.data("B", "D"), "dim": Size("T"), "kind": literal(kind), **self.seed(),
                **self.maybe(0.3 * (kind == "sjlt"), nnz=Size("min(T, 2)")),
                **self.maybe(0.3 * (kind != "srht"), offset=literal(self.r.choice((1, 2**40))))}  # fmt: skip

    def projection_matrix(self) -> dict[str, Value]:
        return {"D": Size("D"), "dim": Size("T"), "kind": literal(self.r.choice(KINDS)), **self.seed()}

    def sample_scores(self) -> dict[str, Value]:
        if self.r.random() < 0.3:
            return {"logits": self.data("n", "q", "C"), "targets": self.labels("n", "q", below="C"),
                    **self.maybe(0.4, mask=array("n", "q", dtype="bool"))}  # fmt: skip
        return {"logits": self.data("n", "C"), "targets": self.labels("n", below="C")}

    def caratheodory(self) -> dict[str, Value]:
        weights = array("n", dtype="float64", content="positive", seed=self.r.randrange(100))
        return {
            "x": self.data("n", "d"),
            **self.maybe(0.5, weights=weights),
            **self.maybe(0.3, max_size=Size("d + 1 + k")),
        }

    def match_gradients(self) -> dict[str, Value]:
        r = self.r
        rows: Value = self.data("n", "D")
        if r.random() < 0.2:
            coefficients = array("n", "q", dtype=r.choice(FLOATS), seed=r.randrange(100))
            rows = Value(
                f"fc.LowRankGradients({coefficients.source(self.sizes)}, seed=3, numel={self.sizes['D']})"
            )
        method = r.choice(("medoid", "omp", "frank_wolfe", "caratheodory"))
        some = {
            "g": rows,
            "k": Size("k"),
            "method": literal(method),
            **self.maybe(0.4, top=Size("max(1, D // 2)")),
        }
        if method == "caratheodory":  # as many as it takes
            return some | {"k": Size("n")}
        some |= self.maybe(0.2, groups=self.labels("n"))
        if method == "medoid":
            some |= self.maybe(0.4, metric=literal(r.choice(POINTS)))
        if method == "omp":
            some |= self.maybe(0.2, nonnegative=literal(False)) | self.maybe(0.2, ridge=literal(0.1))
        return some

    def _transport(self, debiased: bool = False) -> dict[str, Value]:
        r = self.r
        self.sizes["n"], self.sizes["m"] = min(self.sizes["n"], 40), min(self.sizes["m"], 40)
        batch = ("B",) if r.random() < 0.4 else ()
        some = {
            "x": self.data(*batch, "n", "d"),
            "y": self.data(*batch, "m", "d"),
            "metric": literal(r.choice(COSTS)),
        }
        weighted = r.random() < 0.5
        if weighted:
            some["a"] = array(*batch, "n", dtype="float64", content="shares", seed=r.randrange(100))
            some["b"] = array(*batch, "m", dtype="float64", content="shares", seed=r.randrange(100))
        pairs = () if debiased else ("(1.0, 1000.0)", "(None, 10.0)", "(0.5, None)")
        some |= self.maybe(0.3, reg_marginal=Value(r.choice(("1.0", "100.0", *pairs))))
        if batch and not weighted:  # which need not sum to the same over the first rows alone
            some |= self.maybe(0.4, x_lengths=array("B", dtype="int64", content="whole:max(1, n // 2)"))
            some |= self.maybe(0.4, y_lengths=array("B", dtype="int64", content="whole:max(1, m - 1)"))
        return (
            some
            | {"reg": literal(r.choice((0.05, 0.3, 1.0, 10.0))), "max_iter": literal(r.choice((1, 20, 100)))}
            | self.maybe(0.4, tol=literal(r.choice((0.0, 1e-9, 1e-3))))
            | self.maybe(0.3, norm=literal("l2"))
        )

    def sinkhorn(self) -> dict[str, Value]:
        some = self._transport()
        if self.r.random() < 0.3:
            batch = some["x"].shape[:-2]  # type: ignore[attr-defined]
            some |= {"x": self.data(*batch, "n", "m"), "metric": literal("precomputed")}
            del some["y"]
        return some

    def sinkhorn_divergence(self) -> dict[str, Value]:
        return self._transport(debiased=True)

    def allocate_budgets(self) -> dict[str, Value]:
        return {"sizes": array("G", dtype="int64", content="whole:T"), "k": Size("min(k, G * T)"),
                **self.maybe(0.5, rule=literal(self.r.choice(("proportional", "balanced"))))}  # fmt: skip

    def _scores(self, name: str) -> Tensor:
        return array(
            "n", dtype=self.r.choice(FLOATS), content=self.r.choice(FINITE), seed=self.r.randrange(100)
        )

    def ccs(self) -> dict[str, Value]:
        return {"scores": self._scores("scores"), "k": Size("max(1, n // 3)"), **self.seed(),
                **self.maybe(0.4, n_strata=literal(self.r.choice((1, 3, 100)))),
                **self.maybe(0.3, mislabel_ratio=literal(0.2), mislabel_scores=self._scores("mislabel_scores"))}  # fmt: skip

    def top_scores(self) -> dict[str, Value]:
        return {"scores": self._scores("scores"), "k": Size("k"), **self.maybe(0.4, largest=literal(False))}

    def simcore(self) -> dict[str, Value]:
        self.sizes["n"] = max(self.sizes["n"], 2)
        return {"openset": self.data("n", "d"), "target": self.data("m", "d"), "k": Size("k"), "n_init": literal(1),
                "n_clusters": Size("min(m, 3)"), **self.seed(), **self.maybe(0.3, stop=literal(False)),
                **self.maybe(0.3, patience=literal(2))}  # fmt: skip

    def goracs(self) -> dict[str, Value]:
        r = self.r
        self.sizes["n"] = max(self.sizes["n"] % 40, 3)
        self.sizes["m"] = min(self.sizes["m"], 20)
        self.sizes["k"] = r.randint(1, self.sizes["n"])
        labels = {"train_labels": array("n", dtype="int64", content="whole:1"),
                  "valid_labels": array("m", dtype="int64", content="whole:1")}  # fmt: skip
        return {"train": self.data("n", "d"), "valid": self.data("m", "d"),
                "grad_norms": array("n", dtype="float64", content="positive"), "k": Size("k"),
                "max_exchanges": literal(r.choice((0, 2, 5))), "n_candidates": literal(r.choice((1, 4))),
                **self.maybe(0.5, solver=literal("sinkhorn"), reg=literal(0.1)), **self.maybe(0.3, lam=literal(0.0)),
                **self.maybe(0.2, **labels), **self.seed()}  # fmt: skip

    def autocoreset(self) -> dict[str, Value]:
        self.sizes["n"] = max(self.sizes["n"], 12)
        self.sizes["k"] = min(max(self.sizes["k"], 6), self.sizes["n"])
        y = array("n", dtype="float64", seed=3)
        return {"x": array("n", "d", dtype="float64", seed=self.r.randrange(100)), "y": y,
                "model": Value("ridge()"), "loss": Value("squared_errors"), "k": Size("k"), **self.seed()}  # fmt: skip

    def select(self) -> dict[str, Value]:
        name = self.r.choice(("ccs", "simcore"))
        return {"name": literal(name), **getattr(self, name)()}

    def memory_estimate(self) -> dict[str, Value]:
        name, shapes = self.r.choice(
            (
                ("facility_location", "(n, d)"),
                ("sketch", "(n, D)"),
                ("sinkhorn", "(n, d), (m, d)"),
                ("sample_scores", "(n, C)"),
            )
        )
        for size in "nmdCD":
            shapes = shapes.replace(size, str(self.sizes[size]))
        more = {
            "facility_location": {"k": Size("k")},
            "sketch": {"dim": Size("T")},
            "sinkhorn": {"reg": literal(0.1)},
        }
        return {"fn": literal(name), "*shapes": Value(f"[{shapes}]"), **more.get(name, {})}

    def zeroth_order_gradients(self) -> dict[str, Value]:
        return {"loss_fn": Value("losses"), "parameters": Value("parameters"), **self.seed(),
                **self.maybe(0.5, n_perturbations=literal(3)), **self.maybe(0.3, resample=literal(True)),
                **self.maybe(0.3, eps=literal(0.01))}  # fmt: skip

    def LowRankGradients(self) -> dict[str, Value]:
        return {
            "coefficients": array("n", "q", dtype=self.r.choice(FLOATS)),
            "seed": literal(5),
            "numel": Size("D"),
        }

    def AdamState(self) -> dict[str, Value]:
        dtype = self.r.choice(FLOATS)
        return {
            "m": array("D", dtype=dtype),
            "v": array("D", dtype=dtype, content="positive"),
            "step": literal(3),
        }

    def CoLM(self) -> dict[str, Value]:
        return {"k": Size("k"), "top": Size("max(1, D // 2)"), **self.maybe(0.3, metric=literal("cosine"))}

    def CoLM_select(self) -> dict[str, Value]:
        return {
            "grads": replace(self.data("n", "D"), content="normal"),
            **self.maybe(0.4, groups=self.labels("n")),
        }

    def TrainingDynamics(self) -> dict[str, Value]:
        return {"n_samples": Size("n"), **self.maybe(0.4, el2n_epochs=literal(2))}

    def TrainingDynamics_update(self) -> dict[str, Value]:
        return {"indices": array("n", dtype="int64", content="range"), "logits": self.data("n", "C"),
                "targets": self.labels("n", below="C"), "epoch": literal(self.r.randrange(4))}  # fmt: skip

    def GradientSketcher(self) -> dict[str, Value]:
        return {"model": Value("network()"), "dim": Size("T"), "kind": literal(self.r.choice(KINDS[:3])), **self.seed(),
                **self.maybe(0.3, reduction=literal("sum")), **self.maybe(0.3, parameters=literal("0.*"))}  # fmt: skip


FUNCTIONS = ("facility_location", "facility_location", "sketch", "projection_matrix", "sample_scores", "caratheodory",
             "match_gradients", "match_gradients", "sinkhorn", "sinkhorn", "sinkhorn_divergence", "allocate_budgets", "ccs",
             "top_scores", "simcore", "goracs", "autocoreset", "select", "memory_estimate", "zeroth_order_gradients",
             "LowRankGradients", "AdamState", "CoLM", "TrainingDynamics", "GradientSketcher")  # fmt: skip
# The functions of whose kernels there are several.
BACKENDS = {
    "facility_location": ("cpu", "torch", "cuda", "triton"),
    "sketch": ("cpu", "torch", "cuda", "triton"),
    "projection_matrix": ("cpu", "torch", "cuda", "triton"),
    "sample_scores": ("cpu", "torch", "triton"),
    "caratheodory": ("cpu", "torch", "cuda", "triton"),
    "match_gradients": ("cpu", "torch", "cuda", "triton"),
    "sinkhorn": ("cpu", "torch", "cuda", "triton"),
    "sinkhorn_divergence": ("cpu", "torch", "cuda"),
    "simcore": ("cpu", "torch"),
    "LowRankGradients": ("cpu", "torch", "cuda"),
    "zeroth_order_gradients": ("cpu", "torch", "cuda"),
}
# The calls that are made on the result.
USES = {
    "sinkhorn": ("a.plan()", "a.apply(torch.ones(*a.g.shape, 2, dtype=a.f.dtype))", "a.value.sum()"),
    "LowRankGradients": ("a.dense()", "a.directions(0)"),
    "zeroth_order_gradients": ("a.dense()",),
    "AdamState": ("fc.match_gradients(torch.ones(4, len(a.m), dtype=a.m.dtype), 2, normalize=a)",),
}


@dataclass(frozen=True)
class Called(Step):
    """A call on each of `backends`, whose results are compared: result = called(target, backends, lambda: {arguments}, checked)."""

    backends: tuple[str, ...] = ()
    checked: bool = True

    def source(self, sizes: dict[str, int]) -> str:
        texts = ", ".join(f"{name!r}: {value.source(sizes)}" for name, value in self.arguments.items())
        return (
            f"{self.result} = called({self.target}, {self.backends!r}, lambda: {{{texts}}}, {self.checked})"
        )


def generate(seed: int) -> Program:
    """A call of a public function, with arguments that fit in half of the programs, and the calls on the result."""
    r = random.Random(seed)
    recipes = Recipes(r)
    name = r.choice(FUNCTIONS)
    backends = BACKENDS.get(name, ())
    if backends:
        some = ["cpu", "torch"]
        some += [
            other
            for other, share in (("cuda", 0.2), ("triton", 0.03))
            if other in backends and r.random() < share
        ]
        backends = tuple(some)
        if "triton" in backends:  # which the interpreter runs
            recipes.sizes.update({size: min(length, 20) for size, length in recipes.sizes.items()})
            recipes.sizes["k"] = min(recipes.sizes["k"], 3)
    arguments = getattr(recipes, name)()
    if "triton" in backends and "max_iter" in arguments:
        arguments["max_iter"] = literal(2)
    steps: list[Step] = [Called("a", f"fc.{name}", arguments, backends=backends)]
    steps += [Step("_", use, attribute=True) for use in USES.get(name, ()) if r.random() < 0.7]
    for method in {"CoLM": ("select",), "TrainingDynamics": ("update", "scores")}.get(name, ()):
        for _ in range(r.choice((1, 1, 2))):
            recipe = getattr(recipes, f"{name}_{method}", dict)
            steps.append(Called("_", f"a.{method}", recipe()))
    if name == "GradientSketcher":
        steps.append(Step("_", f"one_step(a, {recipes.sizes['n']})", attribute=True))
    hostile = r.random() < 0.6
    for _ in range(r.choice((1, 1, 2)) if hostile else 0):
        i = r.choice([i for i, step in enumerate(steps) if not step.attribute])
        steps[i] = _spoiled(r, steps[i])
    if hostile:
        steps = [replace(step, checked=False) if isinstance(step, Called) else step for step in steps]
    return Program(recipes.sizes, tuple(steps), valid=not hostile)


def _spoiled(r: random.Random, step: Step) -> Step:
    """Replaces one argument, or adds an option, or leaves an argument out."""
    names = list(step.arguments)
    if not names:
        return step
    if r.random() < 0.2:
        function = getattr(fc, step.target.removeprefix("fc."), None)
        more = [name for name in (signature(function).parameters if function else ()) if name not in names]
        name = r.choice(more or names)
    else:
        name = r.choice(names)
    value = step.arguments.get(name, literal(None))
    if r.random() < 0.03 and name in step.arguments:
        return replace(step, arguments={key: value for key, value in step.arguments.items() if key != name})
    most = 1000 if name in LONG else None
    if isinstance(value, Tensor):
        other = hostile_array(r, value)
    elif value.text == "None" or r.random() < 0.1:
        other = r.choice(
            (
                hostile_any(r),
                array("n", "d"),
                array("n", dtype="int64", content="below:3"),
                hostile_int(r, most),
                hostile_float(r),
            )
        )
    elif value.text[0] in "'\"":
        words = (
            *POINTS,
            *KINDS,
            "precomputed",
            "lazy",
            "omp",
            "caratheodory",
            "exact",
            "sinkhorn",
            "balanced",
        )
        other = r.choice((hostile_word(r), literal(r.choice(words))))
    elif "." in value.text and value.text[0].isdigit():
        other = hostile_float(r)
    elif value.text[0].isalpha() and not isinstance(value, Size):
        other = hostile_any(r)
    else:
        other = hostile_int(r, most)
    return replace(step, arguments={**step.arguments, name: other})


# ------------------------------------------------------------------------------------------- what programs use


class Ridge:
    """A model of scikit-learn's kind, of a few lines: enough for autocoreset, and quick."""

    def fit(self, x: Any, y: Any, sample_weight: Any = None) -> Ridge:
        w = np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight)
        x = np.column_stack([x, np.ones(len(x))])
        self.coef_ = np.linalg.solve(x.T @ (w[:, None] * x) + np.eye(x.shape[1]), x.T @ (w * y))
        return self

    def predict(self, x: Any) -> Any:
        return np.column_stack([x, np.ones(len(x))]) @ self.coef_


def squared_errors(model: Ridge, x: Any, y: Any) -> Any:
    return np.square(model.predict(x) - y)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def one_step(sketcher: fc.GradientSketcher, batch: int) -> None:
    """One backward pass inside the sketcher, and its norms against autograd's of one sample at a time."""
    model, x = sketcher.model if hasattr(sketcher, "model") else sketcher._model, torch.randn(batch, 3)
    with sketcher:
        model(x).square().sum(1).mean().backward()
    norms = sketcher.norms
    sketches = sketcher.sketches if sketcher._dim is not None else None
    _require(len(norms) == batch and (sketches is None or len(sketches) == batch), "a row for each sample")
    _require(bool(torch.isfinite(norms).all()), "finite norms")


def model_and_losses() -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]]:
    weight = torch.linspace(-1, 1, 6, requires_grad=True)
    x = torch.arange(18.0).reshape(3, 6) / 18
    return [weight], lambda: (x @ weight).square()


PARAMETERS, LOSSES = model_and_losses()


def called(
    function: Callable[..., Any],
    backends: tuple[str, ...],
    arguments: Callable[[], dict[str, Any]],
    checked: bool,
) -> Any:
    """function(**arguments()) on every backend: all of them give results that are right (`checked`), or none gives a
    result."""
    results: dict[str, Any] = {}
    refusals: dict[str, Exception] = {}
    given: dict[str, Any] = {}
    for backend in backends or ("",):
        given = arguments()
        keywords = dict(given)
        positional = [keywords.pop("fn", None), *keywords.pop("*shapes")] if "*shapes" in keywords else []
        if backend:
            keywords.setdefault("backend", backend)
        before = {name: _bytes(value) for name, value in keywords.items()}
        try:
            results[backend] = function(*positional, **keywords)
        except Exception as error:
            if not isinstance(error, (TypeError, ValueError, MemoryError, fc.BackendUnavailableError)):
                raise
            refusals[backend] = error
        for name, value in keywords.items():
            _require(before[name] == _bytes(value), f"{name} is as it was")
    if not results:
        raise next(iter(refusals.values()))
    for backend, error in refusals.items():
        if not isinstance(error, (fc.BackendUnavailableError, MemoryError)) and not AT_THE_END.search(
            str(error)
        ):
            raise WrongError(
                f"{backend} refuses what {next(iter(results))} takes: {type(error).__name__}: {error}"
            )
    name = getattr(function, "__name__", "")
    if name in BACKENDS and name not in NAN_IN_NAN_OUT:
        for backend, result in results.items():
            _require(not _has_nan(result), f"no NaN without an error ({backend})")
    if checked:
        for backend, result in results.items():
            try:
                CHECKS.get(name, lambda *_: None)(given, result)
            except AssertionError as error:
                raise WrongError(f"{backend}: {error}") from None
        first, *others = results.items()
        for other in others:
            if name not in NOT_COMPARED:
                _same(first[1], other[1], f"{name}: {first[0]} and {other[0]}")
    return next(iter(results.values()))


# A backend whose numbers end earlier than another's may say so.
AT_THE_END = re.compile("go beyond the range of|differ by rounding alone")
# Products with NaN are NaN, as documented.
NAN_IN_NAN_OUT = ("sketch", "LowRankGradients", "zeroth_order_gradients")
# If choices are equal, or equal within rounding, backends may take different ones, and an entropy near 0 has few digits:
# CHECKS say whether they are right.
NOT_COMPARED = ("facility_location", "match_gradients", "sinkhorn", "simcore", "zeroth_order_gradients", "caratheodory",
                "sinkhorn_divergence", "sample_scores")  # fmt: skip


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


def _bytes(value: Any) -> bytes | None:
    """The contents of a plain tensor or array, to check whether it was written to."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu":
        flat = value.detach().flatten().clone(memory_format=torch.contiguous_format)
        return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
    return None


def _has_nan(result: Any) -> bool:
    if isinstance(result, torch.Tensor):
        return result.is_floating_point() and result.layout == torch.strided and bool(result.isnan().any())
    if is_dataclass(result):
        return any(
            _has_nan(getattr(result, part.name)) for part in fields(result) if not part.name.startswith("_")
        )
    return isinstance(result, float) and math.isnan(result)


def _same(a: Any, b: Any, what: str) -> None:
    if isinstance(a, torch.Tensor):
        _require(a.shape == b.shape and a.dtype == b.dtype, f"{what}: shape and dtype")
        if not a.is_floating_point():
            _require(torch.equal(a, b), f"{what}: equal numbers")
        elif a.numel():
            error = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30)
            _require(
                float(error) <= (1e-9 if a.dtype == torch.float64 else 1e-4),
                f"{what}: {float(error):.1e} apart",
            )
    elif is_dataclass(a):
        for part in fields(a):
            if not part.name.startswith("_") and part.name != "backend":
                _same(getattr(a, part.name), getattr(b, part.name), f"{what}, {part.name}")


def _float64(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().double()


def _check_facility_location(given: dict[str, Any], found: fc.Selection) -> None:
    picks = found.indices.tolist()
    _require(len(set(picks)) == len(picks) == given["k"], "k distinct picks")
    # An offset far above its difference from the distances leaves few digits.
    exact = found.offset is None or float(found.gains[0]) > 0.05 * found.offset * float(found.weights.sum())
    if given.get("method") != "stochastic" and exact:
        options = {name: given[name] for name in ("clients", "metric", "weights", "groups") if name in given}
        worst_error(Case("", torch.as_tensor(given["x"]), given["k"], options), found)


def _check_sketch(given: dict[str, Any], found: torch.Tensor) -> None:
    x = _float64(given["x"])
    options = {name: value for name, value in given.items() if name not in ("x", "dim")}
    matrix = fc.projection_matrix(x.shape[1], given["dim"], dtype=torch.float64, backend="torch", **options)
    error = (found.double() - x @ matrix).abs()
    allowed = (1e-12 if found.dtype == torch.float64 else 1e-5) * (x.abs() @ matrix.abs()) + 1e-30
    _require(
        bool((error <= allowed).all()),
        f"x times the matrix, {float((error - allowed).max()):.1e} beyond rounding",
    )


def _check_scores(given: dict[str, Any], found: fc.SampleScores) -> None:
    x, targets = _float64(given["logits"]), torch.as_tensor(given["targets"])
    log_p = x.log_softmax(-1)
    p = log_p.exp()
    own = p.gather(-1, targets[..., None])[..., 0]
    other = p.scatter(-1, targets[..., None], -1.0).amax(-1)
    expected = {
        "loss": -log_p.gather(-1, targets[..., None])[..., 0],
        "entropy": -(p * log_p.clamp_min(-1e300)).sum(-1),
        "margin": own - other.clamp_min(0),
        "el2n": (p - torch.nn.functional.one_hot(targets, x.shape[-1])).norm(dim=-1),
    }
    mask = torch.as_tensor(given.get("mask", torch.ones(targets.shape, dtype=torch.bool)))
    for name, value in expected.items():
        if value.dim() == 2:
            value = (value * mask).sum(1) / mask.sum(1).clamp_min(1)
        got = getattr(found, name).double()
        tolerance = (
            1e-9
            if got.dtype == torch.float64 and torch.as_tensor(given["logits"]).dtype == torch.float64
            else 2e-5
        )
        error = float((got - value).abs().max())
        _require(error <= tolerance * max(1.0, float(x.abs().max())), f"{name} is {error:.1e} off")


def _check_caratheodory(given: dict[str, Any], found: fc.Selection) -> None:
    x = _float64(given["x"])
    w = _float64(given["weights"]) if "weights" in given else torch.ones(len(x), dtype=torch.float64)
    rows, weights = found.indices, found.weights.double()
    _require(
        bool((weights > 0).all()) and len(set(rows.tolist())) == len(rows), "distinct rows of weights > 0"
    )
    _require(len(rows) <= max(x.shape[1] + 1, given.get("max_size") or 0), "few rows")
    single = found.weights.dtype == torch.float32
    slack = (1e-5 if single else 1e-9) * float(w.sum())
    _require(abs(float(weights.sum() - w.sum())) <= slack, "the total weight")
    error = (weights @ x[rows] - w @ x).abs() / x.abs().amax(0).clamp_min(1e-300)
    _require(bool((error <= slack).all()), f"the weighted sum, {float(error.max()):.1e} off")


def _check_matching(given: dict[str, Any], found: fc.Selection) -> None:
    rows = found.indices.tolist()
    _require(len(set(rows)) == len(rows) <= given["k"], "at most k distinct rows")
    _require(bool(torch.isfinite(found.weights).all()), "finite weights")
    if given.get("nonnegative", True):
        _require(bool((found.weights >= 0).all()), "weights >= 0")


def _check_transport(given: dict[str, Any], found: fc.Transport) -> None:
    """Marginals of plans that converged, from the potentials that are returned."""
    plan, error = found.plan().double(), found.error
    _require(bool((plan >= 0).all()) and bool((error >= 0).all()), "a plan and an error >= 0")
    if (
        given.get("reg_marginal") is not None
        or "x_lengths" in given
        or "y_lengths" in given
        or "tol" in given
    ):
        return
    n, m = plan.shape[-2:]
    a = _float64(given["a"]) if "a" in given else torch.full(plan.shape[:-1], 1 / n, dtype=torch.float64)
    b = (
        _float64(given["b"])
        if "b" in given
        else torch.full((*plan.shape[:-2], m), 1 / m, dtype=torch.float64)
    )
    off = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)
    _require(
        bool(((off <= 1e-4) | ~found.converged).all()),
        f"marginals of a converged plan, {float(off.max()):.1e} off",
    )


def _check_budgets(given: dict[str, Any], found: torch.Tensor) -> None:
    sizes = torch.as_tensor(given["sizes"])
    _require(
        int(found.sum()) == given["k"] and bool((found <= sizes).all()) and bool((found >= 0).all()),
        "k in all",
    )


def _check_coreset(given: dict[str, Any], found: fc.Coreset) -> None:
    rows = found.indices.tolist()
    _require(len(set(rows)) == len(rows), "distinct items")
    if given.get("k") is not None and given.get("name") != "simcore" and "openset" not in given:
        _require(len(rows) == given["k"], "k items")


def _check_top(given: dict[str, Any], found: fc.Coreset) -> None:
    _check_coreset(given, found)
    scores = _float64(given["scores"])
    best = scores.sort(descending=given.get("largest", True)).values[: given["k"]]
    _require(torch.equal(scores[found.indices].sort().values, best.sort().values), "the k best scores")


CHECKS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "facility_location": _check_facility_location,
    "sketch": _check_sketch,
    "sample_scores": _check_scores,
    "caratheodory": _check_caratheodory,
    "match_gradients": _check_matching,
    "sinkhorn": _check_transport,
    "allocate_budgets": _check_budgets,
    "ccs": _check_coreset,
    "goracs": _check_coreset,
    "simcore": _check_coreset,
    "top_scores": _check_top,
}

# The names that programs refer to.
SPACE = {
    "called": called,
    "ridge": Ridge,
    "squared_errors": squared_errors,
    "network": network,
    "one_step": one_step,
    "losses": LOSSES,
    "parameters": PARAMETERS,
}
