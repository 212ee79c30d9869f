"""Random programs that call the compiled modules: the functions and their arguments are read from their docstrings, so that a
new function is called too, and a recipe says which arguments fit each other."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from types import ModuleType

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

# Handles of the caller's, which nothing can check, and numbers on a GPU, which are left there unread.
UNTOUCHED = {"stream"}
TRUSTED = {
    "rows",
    "which",
    "places",
    "slots",
    "kept",
    "member",
    "offset",
    "chosen",
    "dims",
    "x_lengths",
    "y_lengths",
}
# Sizes of work that nothing stored bounds: a large one would be done.
LONG = {"length"}
LONG_ON_DEVICE = {"max_iter"}  # where the CPU's binding goes step by step
# The functions that set the emulator up, and those that a module has beside its kernels.
LEFT_OUT = {"set_schedule", "set_device", "set_current_device", "allocated_bytes", "unusable"}


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str  # "int", "float", "str", "bool" or "object"
    optional: bool


def parameters(function: object) -> list[Parameter]:
    """The parameters of a bound function, from the first line of its docstring; without `self`."""
    text = (function.__doc__ or "").split("\n")[0]
    inside = text[text.index("(") + 1 : text.rindex(") ->")]
    found = []
    # Types have commas in brackets of their own.
    for part in re.split(r", (?=\w+: )", inside):
        if ": " not in part:
            continue
        name, _, rest = part.partition(": ")
        kind, equals, _ = rest.partition(" = ")
        for known, marks in (
            ("int", ("SupportsInt", "Integer")),
            ("float", ("SupportsFloat", "Real")),
            ("str", ("str",)),
            ("bool", ("bool", "Flag")),
        ):
            if kind == known or any(mark in kind for mark in marks):
                kind = known
                break
        else:
            kind = "float" if kind == "float | None" else "object"
        if name != "self":
            found.append(Parameter(name, kind, bool(equals)))
    return found


def within(owner: str, fields: dict[str, Value]) -> dict[str, Value]:
    """The fields of an object that is an argument, by the names that programs have for them."""
    return {f"{owner}.{name}": value for name, value in fields.items()}


class Recipes:
    """Arguments by name that fit each other, for each function and class. `r` makes all choices."""

    def __init__(self, r: random.Random, on_device: bool) -> None:
        self.r, self.on_device = r, on_device
        most = r.choice((6, 6, 40, 150))
        self.sizes = {name: r.randint(1, most) for name in "nmBCT"}
        self.sizes.update({name: r.randint(1, r.choice((4, 40))) for name in "dkqG"})
        self.sizes["D"] = r.randint(1, r.choice((8, 80, 1200)))
        self.sizes["k"] = min(self.sizes["k"], self.sizes["n"])
        self.dtype = r.choice(FLOATS)
        self.real = r.choice(FLOATS + HALVES)

    def any_array(self, *shape: int | str, dtype: str | None = None, plain: bool = False) -> Tensor:
        r = self.r
        return array(*shape, dtype=dtype or self.dtype, content=r.choice(FINITE), seed=r.randrange(100),
                     layout="plain" if plain or self.on_device else r.choice(LAYOUTS))  # fmt: skip

    def rows(self, *shape: int | str, dtype: str | None = None) -> Tensor:
        """Rows that are contiguous."""
        layout = "plain" if self.on_device else self.r.choice(("plain", "padded", "offset"))
        return replace(self.any_array(*shape, dtype=dtype, plain=True), layout=layout)

    def out(self, *shape: int | str, dtype: str | None = None, content: str = "zeros") -> Tensor:
        return array(*shape, dtype=dtype or self.dtype, content=content)

    def indices(self, *shape: int | str, below: str) -> Tensor:
        return array(*shape, dtype="int64", content=f"below:{below}", seed=self.r.randrange(100))

    def common(self) -> dict[str, Value]:
        r = self.r
        return {
            "threads": literal(r.choice((1, 1, 2, 3, 8))),
            "memory_budget": literal(r.choice((0, 1000, 100_000, 2**28))),
            "stream": literal(0),
            "seed": literal(r.choice((0, 1, r.randrange(2**63)))),
            "shared_bytes": literal(r.choice((0, 48 * 1024, 160 * 1024))),
            "symmetric": literal(False),
            "one_scale": literal(r.random() < 0.3),
            "expected_picks": literal(r.choice((1, 5, 2**63 - 1))),
            "naive": literal(r.random() < 0.3),
            "magnitude": literal(r.random() < 0.5),
            "nonnegative": literal(r.random() < 0.5),
            "ridge": literal(r.choice((0.0, 0.1))),
            "transpose": literal(False),
        }

    # ---------------------------------------------------------------------------------------------- functions

    def pairwise(self) -> dict[str, Value]:
        return {"x": self.any_array("n", "d"), "y": self.any_array("m", "d"), "out": self.out("n", "m"),
                "metric": literal(self.r.choice(POINTS))}  # fmt: skip

    def _projection(self, dim: str) -> dict[str, Value]:
        nnz = self.r.choice(("1", "1", f"min(3, {dim})", dim))
        return {"kind": literal(self.r.choice(KINDS)), "nnz": Size(nnz), "offset": literal(0)}

    def sketch(self) -> dict[str, Value]:
        return {"x": self.any_array("B", "D"), "out": self.out("B", "d"), **self._projection("d")}

    def projection_matrix(self) -> dict[str, Value]:
        return {"out": self.out("D", "d"), **self._projection("d")}

    def sketch_csr(self) -> dict[str, Value]:
        self.sizes["G"] = min(self.sizes["G"], self.sizes["n"])
        csr = {"crow": array("G + 1", dtype="int64", content="offsets:n"), "col": self.indices("n", below="D"),
               "values": self.any_array("n")}  # fmt: skip
        return {**within("csr", csr), "out": self.out("G", "d"), **self._projection("d")}

    def sketch_rows(self) -> dict[str, Value]:
        return {"indices": self.indices("B", "q", below="n"), "g": self.any_array("B", "q", "d"),
                "out": self.out("B", "k"), **self._projection("k"),
                "kind": literal(self.r.choice(KINDS[:3]))}  # fmt: skip

    def sample_scores(self) -> dict[str, Value]:
        dtype = "float64" if self.real == "float64" else "float32"
        return {"logits": self.any_array("n", "q", "C", dtype=self.real), "targets": self.indices("n", "q", below="C"),
                "masked": literal(self.r.random() < 0.3), "out": self.out(5, "n", "q", dtype=dtype)}  # fmt: skip

    def directions(self) -> dict[str, Value]:
        begin, first = self.r.choice((0, 5, 2**40)), self.r.choice((0, 3, 2**31))
        return {"out": self.out("q", "D"), "begin": literal(begin), "first": literal(first)}

    def _gradients(self) -> tuple[dict[str, Value], str, str]:
        """The arguments, the name of the number of dimensions and the history's dtype."""
        seed = self.common()["seed"]
        if self.r.random() < 0.5:
            dtype = "float64" if self.real == "float64" else "float32"
            values = self.any_array("n", "D", dtype=self.real)
            return {"values": values, "length": Value("None"), "seed": seed}, "D", dtype
        return {"values": self.any_array("n", "q"), "length": Size("D"), "seed": seed}, "D", self.dtype

    def _updates(self) -> dict[str, Value]:
        g, length, dtype = self._gradients()
        history = self.r.random() < 0.6
        self.sizes["G"] = min(self.sizes["G"], self.sizes["n"])
        self.sizes["k"] = min(self.sizes["k"], self.sizes["D"])
        content = self.r.choice(("normal", "zeros", "tiny"))
        past = {
            "m": array(length, dtype=dtype, content=content),
            "v": array(length, dtype=dtype, content="positive"),
        }
        rule = {
            name: literal(self.r.choice((0.1, 0.9, 1.0)))
            for name in ("m_scale", "m_step", "v_scale", "v_step", "eps")
        }
        return {
            **within("problem.g", g),
            **(within("problem.history", past) if history else {"problem.history": Value("None")}),
            **within("problem.rule", rule),
            "problem.member": array("n", dtype="int64", content="range"),
            "problem.offset": array("G + 1", dtype="int64", content="offsets:n"),
            "dims": self.out("G", "k", dtype="int64"),
        }

    def top_updates(self) -> dict[str, Value]:
        return {**self._updates(), "u": self.out("n", "k", dtype="float64")}

    def restrict_updates(self) -> dict[str, Value]:
        return self.top_updates() | {"dims": self.indices("G", "k", below="D")}

    def top_dimensions(self) -> dict[str, Value]:
        return {**self._updates(), "values": self.out("G", "k", dtype="float64"),
                "refused": self.out(1, dtype="int64", content="whole:2**63 - 1")}  # fmt: skip

    def update_history(self) -> dict[str, Value]:
        g, length, dtype = self._gradients()
        return {
            **within("gradients", g),
            "history.m": array(length, dtype=dtype),
            "history.v": array(length, dtype=dtype, content="positive"),
            "history.betas": literal((0.9, 0.99)),
            "chosen": self.indices("k", below="n"),
            "new_m": self.out(length, dtype=dtype),
            "new_v": self.out(length, dtype=dtype),
            "overflows": self.out(1, dtype="int64"),
        }

    def caratheodory(self) -> dict[str, Value]:
        size = Size(self.r.choice(("0", "0", "k", "n")))
        room = f"min(n, max(d + 1, {size.text}))"
        weights = array("n", dtype="float64", content="positive", seed=self.r.randrange(100))
        problem = {"x": self.any_array("n", "d", dtype=self.real), "max_size": size,
                   "weights": weights if self.r.random() < 0.5 else Value("None"),
                   "one_scale": self.common()["one_scale"]}  # fmt: skip
        return {**within("problem", problem), "indices": self.out(room, dtype="int64"),
                "new_weights": self.out(room, dtype="float64")}  # fmt: skip

    def orthogonal_matching_pursuit(self) -> dict[str, Value]:
        common = self.common()
        problem = {"g": self.rows("n", "D"), "target": self.any_array("D", dtype="float64", plain=True),
                   **{name: common[name] for name in ("nonnegative", "ridge", "memory_budget")}}  # fmt: skip
        return {**within("problem", problem), "indices": self.out("k", dtype="int64"), "weights": self.out("k", dtype="float64"),
                "residual_norms": self.out("k", dtype="float64")}  # fmt: skip

    frank_wolfe = orthogonal_matching_pursuit

    def _batch(self, warm: bool = True) -> dict[str, Value]:
        self.sizes["B"] = min(self.sizes["B"], 5)
        self.sizes["n"], self.sizes["m"] = min(self.sizes["n"], 60), min(self.sizes["m"], 60)
        costs = self.r.random() < 0.4
        r = self.r
        x = self.any_array("B", "n", "m" if costs else "d")
        y = Value("None") if costs else self.any_array("B", "m", "d")
        length = {"x_lengths": "n", "y_lengths": "m"}
        problem = {
            "x": x,
            "y": y,
            "a": array("B", "n", dtype="float64", content="shares", seed=r.randrange(100)),
            "b": array("B", "m", dtype="float64", content="shares", seed=r.randrange(100)),
            "metric": literal("precomputed" if costs else r.choice(COSTS)),
            "reg": literal(r.choice((0.01, 0.1, 1.0, 10.0))),
            "rho_a": Value(r.choice(("inf", "inf", "0.5", "10.0"))),
            "rho_b": Value(r.choice(("inf", "inf", "0.5", "10.0"))),
            "max_iter": literal(r.choice((1, 2, 30))),
            "tol": literal(r.choice((0.0, 1e-6, 1e-2))),
            "memory_budget": self.common()["memory_budget"],
            "norm": literal(r.choice(("l1", "l2"))),
            "symmetric": literal(False),  # tests/test_sinkhorn_course.py has the shapes of those that are
            **{
                name: Value("None")
                if r.random() < 0.7
                else array("B", dtype="int64", content=f"whole:{size}")
                for name, size in length.items()
            },
        }
        start = array("B", "n", dtype="float64"), array("B", "m", dtype="float64")
        problem |= dict(zip("fg", start if warm else (Value("None"), Value("None")), strict=True))
        return within("problem", problem)

    def Sinkhorn(self) -> dict[str, Value]:
        return {
            **self._batch(warm=self.r.random() < 0.3),
            "f": array("B", "n", dtype="float64"),
            "g": array("B", "m", dtype="float64"),
            "scalars": self.out(4, "B", dtype="float64"),
            "iterations": self.out("B", dtype="int64"),
        }

    sinkhorn = Sinkhorn  # the CUDA module's, in one call

    def sinkhorn_plan(self) -> dict[str, Value]:
        dtype = "float64" if self.on_device else self.dtype
        return {**self._batch(), "out": self.out("B", "n", "m", dtype=dtype)}

    def sinkhorn_apply(self) -> dict[str, Value]:
        dtype = "float64" if self.on_device else self.dtype
        transpose = self.r.random() < 0.5
        long, short = ("n", "m") if transpose else ("m", "n")
        return {**self._batch(), "transpose": literal(transpose),
                "v": array("B", long, "k", dtype=dtype), "out": self.out("B", short, "k", dtype=dtype)}  # fmt: skip

    def sum_runs(self) -> dict[str, Value]:
        runs = {"x": self.any_array("n", "d", dtype=self.real), "rows": array("n", dtype="int64", content="range"),
                "weights": array("n", dtype="float64", content="positive"), "size": Size("T")}  # fmt: skip
        return {**within("runs", runs), "centre": array("d", dtype="float64"), "shrink": literal(1.0),
                "sums": self.out("(n + T - 1) // T", "1 + d", dtype="float64")}  # fmt: skip

    def keep_runs(self) -> dict[str, Value]:
        runs = {
            "x": self.any_array("n * T", "d"),
            "rows": Value("None"),
            "weights": Value("None"),
            "size": Size("T"),
        }
        return {**within("runs", runs),
                "kept": array("k", dtype="int64", content="range"), "factors": array("k", dtype="float64"),
                "new_rows": self.out("k * T", dtype="int64"),
                "new_weights": self.out("k * T", dtype="float64")}  # fmt: skip

    def products(self) -> dict[str, Value]:
        return {"g": self.any_array("n", "D"), "rows": Value("None"), "vectors": self.any_array("m", "D"),
                "which": self.indices("k", below="m"), "out": self.out("k", "n", dtype="float64"),
                "places": array("k", dtype="int64", content="range")}  # fmt: skip

    def squares(self) -> dict[str, Value]:
        return {"g": self.any_array("n", "D"), "out": self.out("n", dtype="float64")}

    def best_row(self) -> dict[str, Value]:
        known = {"start": array("n", dtype="float64"), "gram": array("m", "n", dtype="float64"),
                 "slots": self.indices("k", below="m"), "numbers": array("k + 1", dtype="float64"),
                 "norm": array("n", dtype="float64", content="positive"),
                 "magnitude": literal(self.r.random() < 0.5)}  # fmt: skip
        return {**within("correlations", known), "scores": self.out("n", dtype="float64"),
                "found": self.out(2, dtype="float64")}  # fmt: skip

    def residual(self) -> dict[str, Value]:
        return {"g": self.any_array("n", "D"), "target": array("D", dtype="float64"),
                "rows": self.indices("k", below="n"), "weights": array("k", dtype="float64"),
                "out": self.out("D", dtype="float64")}  # fmt: skip

    # ------------------------------------------------------------------------------- classes and their methods

    def FacilityLocation(self) -> dict[str, Value]:
        r = self.r
        matrix = r.random() < 0.3
        clients = "m" if matrix or r.random() < 0.4 else "n"
        self._clients = clients
        self.sizes["m"] += (
            self.sizes["m"] == self.sizes["n"]
        )  # a square matrix has clients that are candidates
        if not self.on_device and r.random() < 0.2:
            self._clients = "m"
            fields = {
                "x.crow": array("n + 1", dtype="int64", content="range"), "x.col": self.indices("n", below="m"),
                "x.values": self.any_array("n", plain=True), "x.shape": Size("n, m"), "clients": Value("None"),
                "metric": literal("precomputed"), "weights": Value("None"), "preselected": Value("None"), "offset": literal(0.0),
            }  # fmt: skip
            return self._problem(fields)
        fields = {
            "x": self.rows("n", "m") if matrix else self.any_array("n", "d"),
            "clients": self.any_array("m", "d") if clients == "m" and not matrix else Value("None"),
            "metric": literal("precomputed" if matrix else r.choice(POINTS)),
            "weights": array(clients, dtype="float64", content="positive")
            if r.random() < 0.4
            else Value("None"),
            "preselected": array(1, dtype="int64", content="whole:0") if r.random() < 0.2 else Value("None"),
            "offset": literal(0.0 if matrix else 1000.0),
        }
        return self._problem(fields)

    def _problem(self, fields: dict[str, Value]) -> dict[str, Value]:
        """The fields of a problem, also those that are common to several."""
        common = self.common()
        costs = array("n", dtype="float64", content="positive") if self.r.random() < 0.2 else Value("None")
        fields |= {"costs": costs, **{name: common[name] for name in ("memory_budget", "expected_picks")}}
        return {f"problem.{name}": value for name, value in fields.items()}

    def FacilityLocation_pick(self) -> dict[str, Value]:
        return {"stop_gain": literal(self.r.choice((0.0, 1.0, 1e30)))}

    def close(self) -> dict[str, Value]:
        return {"candidates": self.indices("k", below="n")}

    def FacilityLocation_step(self) -> dict[str, Value]:
        return {"count": Size("k")}

    def step_among(self) -> dict[str, Value]:
        return {
            "candidates": array(
                self.r.choice((1, "n")), dtype="int64", content=self.r.choice(("range", "whole:0"))
            )
        }

    def FacilityLocation_finish(self) -> dict[str, Value]:
        dtype = "float64" if self.on_device else self.r.choice(FLOATS)
        return {"indices": self.out("k", dtype="int64"), "gains": self.out("k", dtype=dtype),
                "weights": self.out("k", dtype=dtype), "assignment": self.out(self._clients, dtype="int64")}  # fmt: skip

    def Sinkhorn_step(self) -> dict[str, Value]:
        return {"iterations": literal(self.r.choice((1, 7, 100)))}

    def PartialGains(self) -> dict[str, Value]:
        return {
            "clients": Size("m"),
            "dtype": literal(self.dtype),
            "entries": literal(self.r.choice((0, 100, 10_000))),
        }

    def PartialGains_begin(self) -> dict[str, Value]:
        return {"rows": Size("n"), "listing": literal(self.r.random() < 0.7)}

    def PartialGains_add(self) -> dict[str, Value]:
        return {"s": self.rows("n", "m"), "first": literal(0), "best": self.any_array("m", plain=True),
                "weights": array("m", dtype=self.dtype, content="positive"), "sums": self.out("n", dtype="int64")}  # fmt: skip

    def PartialGains_keep(self) -> dict[str, Value]:
        return {"numbers": array("n", dtype="int64", content="range")}

    def PartialGains_has(self) -> dict[str, Value]:
        return {"number": Size("n - 1")}

    def PartialGains_evaluate(self) -> dict[str, Value]:
        return {"numbers": array("n", dtype="int64", content="range"), "best": self.any_array("m", plain=True),
                "weights": array("m", dtype=self.dtype, content="positive"), "sums": self.out("n", dtype="int64")}  # fmt: skip

    def PartialGains_win(self) -> dict[str, Value]:
        return {
            "number": Size("n - 1"),
            "position": literal(3),
            "best": self.out("m"),
            "owner": self.out("m", dtype="int64"),
        }

    def PartialGains_forget(self) -> dict[str, Value]:
        return {"number": Size("n - 1")}

    def NearestOrder(self) -> dict[str, Value]:
        return {"centroids": self.any_array("q", "d")}

    def of_similarities(self) -> dict[str, Value]:
        return {"lists": Size("q"), "dtype": literal(self.dtype)}

    def begin(self) -> dict[str, Value]:
        return {"length": Size("m")}

    def update(self) -> dict[str, Value]:
        return {"x": self.rows("n", "d")}

    def update_similarities(self) -> dict[str, Value]:
        return {"s": self.rows("n", "q")}

    def rounds(self) -> dict[str, Value]:
        return {"k": Size("k"), "items": self.out("T * q", dtype="int64"), "counts": self.out("T", dtype="int64"),
                "values": self.out("T", dtype="float64"), "takers": self.out("T * q", dtype="int64"),
                "similarities": self.out("T * q", dtype="float64")}  # fmt: skip

    def order(self) -> dict[str, Value]:
        return {"list": literal(0), "items": self.out("m", dtype="int64"), "similarities": self.out("m")}

    def Transport(self) -> dict[str, Value]:
        u = array("k", dtype="float64", content="positive") if self.r.random() < 0.5 else literal(None)
        return {"costs": self.rows("k", "d"), "u": u}

    def exchange(self) -> dict[str, Value]:
        return {
            "place": literal(0),
            "row": self.any_array("d"),
            "ceiling": literal(self.r.choice((0.5, 1e9))),
        }

    def _pairs(self) -> dict[str, Value]:
        return {"rows": self.out("k", dtype="int64"), "places": self.out("k", dtype="int64"),
                "bounds": self.out("k", dtype="float64")}  # fmt: skip

    def best_exchange(self) -> dict[str, Value]:
        return {
            "costs": self.rows("n", "d"),
            "ceiling": literal(1e9),
            "enough": literal(0.0),
            "most": Size("k"),
            **self._pairs(),
        }

    def bounds(self) -> dict[str, Value]:
        return {
            "costs": self.rows("n", "d"),
            "goal": literal(1e9),
            "ways": literal(self.r.random() < 0.5),
            "lowest": self.out("n", dtype="float64"),
            **self._pairs(),
        }

    def duals(self) -> dict[str, Value]:
        return {"u": self.out("k", dtype="float64"), "f": self.out("d", dtype="float64")}

    def ActiveSet(self) -> dict[str, Value]:
        return {"target_norm": literal(1.0)}

    def add(self) -> dict[str, Value]:
        return {"products": array(1, dtype="float64", content="ones"), "correlation": literal(0.5)}

    def ActiveSet_weights(self) -> dict[str, Value]:
        return {"out": self.out(self.r.randrange(3), dtype="float64")}

    def CaratheodoryReduction(self) -> dict[str, Value]:
        return {"centre": array("d", dtype="float64", content="zeros"), "shrink": literal(1.0)}

    def _sums(self, writable: bool = False) -> Value:
        return array("k", "1 + d", dtype="float64", content="positive", seed=self.r.randrange(100))

    def take_total(self) -> dict[str, Value]:
        return {"sums": self._sums()}

    move_to_mean = take_total

    def factors(self) -> dict[str, Value]:
        return {"sums": self._sums(), "out": self.out("k", dtype="float64")}

    def rest(self) -> dict[str, Value]:
        return {"x": self.any_array("n", "d"), "weights": array("n", dtype="float64", content="positive"),
                "indices": self.out("min(n, d + 1)", dtype="int64"),
                "new_weights": self.out("min(n, d + 1)", dtype="float64")}  # fmt: skip

    def correct(self) -> dict[str, Value]:
        return {"x": self.any_array("n", "d"), "weights": array("n", dtype="float64", content="positive"),
                "sums": array("1 + d", dtype="float64", content="positive")}  # fmt: skip

    def centre(self) -> dict[str, Value]:
        return {"out": self.out("d", dtype="float64")}

    def CaratheodorySampler(self) -> dict[str, Value]:
        return {"weights": array("n", dtype="float64", content="positive"), "goal": Size("k")}

    def push(self) -> dict[str, Value]:
        return {"x": self.any_array("n", "d")}


# The calls of a class's objects, in an order that makes sense; random programs shuffle a part of them.
USES = {
    "FacilityLocation": ("step", "close", "pick", "finish"),
    "PartialGains": ("begin", "add", "keep", "evaluate", "win", "evaluate", "forget"),
    "NearestOrder": ("begin", "update", "update_similarities", "finish", "rounds", "order"),
    "CaratheodoryReduction": ("take_total", "factors", "move_to_mean", "centre", "rest", "correct"),
    "CaratheodorySampler": ("push", "finish"),
    "ActiveSet": ("add", "weights"),
    "Transport": ("duals", "bounds", "best_exchange", "exchange"),
    "Sinkhorn": ("total", "step", "step"),
}


def callables(module: ModuleType) -> dict[str, object]:
    """Functions, classes and other makers of their objects, by name."""
    found = {}
    for name in sorted(vars(module)):
        value = getattr(module, name)
        if name.startswith("_") or name in LEFT_OUT or not callable(value):
            continue
        found[name] = value
        if isinstance(value, type):
            for other, member in vars(value).items():
                if isinstance(member, staticmethod) and not other.startswith("_"):
                    found[f"{name}.{other}"] = getattr(value, other)
    return found


def generate(seed: int, module: ModuleType, on_device: bool) -> Program:
    """A program of a few calls of the module `m`: half of the programs have arguments that fit; the others have one or two
    that do not."""
    r = random.Random(seed)
    recipes = Recipes(r, on_device)
    names = callables(module)
    name = r.choice(list(names))
    steps = [_step(recipes, "a", f"m.{name}", name, names[name])]
    kind = names[name] if isinstance(names[name], type) else getattr(module, name.partition(".")[0])
    if isinstance(kind, type):
        steps += _uses(recipes, kind)
    if "CaratheodorySampler" in name and "CaratheodoryReduction" in names:
        first = _step(
            recipes, "b", "m.CaratheodoryReduction", "CaratheodoryReduction", names["CaratheodoryReduction"]
        )
        total = _step(recipes, "_", "b.take_total", "take_total", names["CaratheodoryReduction"].take_total)
        changed = {**steps[0].arguments, "reduction": Value("b")}
        steps = [first, total, replace(steps[0], arguments=changed), *steps[1:]]
    for _ in range(r.choice((0, 1, 1, 2))):
        i = r.randrange(len(steps))
        steps[i] = _spoiled(r, steps[i], on_device)
    return Program(recipes.sizes, tuple(steps), valid=False)


def _uses(recipes: Recipes, kind: type) -> list[Step]:
    r = recipes.r
    uses = [name for name in USES.get(kind.__name__, ()) if hasattr(kind, name)]
    others = [name for name in vars(kind) if not name.startswith("_") and name not in uses]
    if others and r.random() < 0.3:
        uses.insert(r.randrange(len(uses) + 1), r.choice(others))
    if r.random() < 0.3:
        uses = r.choices(uses, k=r.randint(0, 6)) if uses else []
    steps = []
    for name in uses:
        member = vars(kind)[name]
        if isinstance(member, property):
            steps.append(Step("_", f"a.{name}", attribute=True))
        elif not isinstance(member, staticmethod):
            steps.append(_step(recipes, "_", f"a.{name}", name, member, kind.__name__))
    return steps


def _step(recipes: Recipes, result: str, target: str, name: str, function: object, owner: str = "") -> Step:
    name = name.rpartition(".")[2]
    signature = parameters(function.__init__ if isinstance(function, type) else function)
    recipe = getattr(recipes, f"{owner}_{name}", None) or getattr(recipes, name, None)
    known = recipes.common() | (recipe() if recipe is not None else {})
    defaults = {"int": literal(1), "float": literal(1.0), "str": literal("cosine"), "bool": literal(False)}
    arguments = {}
    for parameter in signature:
        fields = {key: value for key, value in known.items() if key.startswith(f"{parameter.name}.")}
        if parameter.name in known:
            arguments[parameter.name] = known[parameter.name]
        elif fields:
            arguments |= fields
        elif not parameter.optional:
            arguments[parameter.name] = defaults.get(parameter.kind, Value("None"))
    return Step(result, target, arguments, sum(name.startswith("arg") for name in arguments))


def field_of(name: str) -> str:
    """The last part of an argument's name."""
    return name.rpartition(".")[2]


def _spoiled(r: random.Random, step: Step, on_device: bool) -> Step:
    names = [name for name in step.arguments if field_of(name) not in UNTOUCHED]
    if not names:
        return step
    name = r.choice(names)
    value = step.arguments[name]
    if isinstance(value, Tensor):
        other = hostile_array(
            r, value, trusted=on_device and not TRUSTED.isdisjoint(map(field_of, step.arguments))
        )
    elif value.text == "None" or r.random() < 0.1:
        other = r.choice((hostile_any(r), array("n", "d"), array("n", dtype="int64", content="range")))
        if on_device and field_of(name) in TRUSTED:
            other = hostile_any(r)
    elif value.text in ("True", "False"):
        other = r.choice((hostile_any(r), literal(value.text == "False")))
    elif value.text[0] in "'\"":
        other = r.choice((hostile_word(r), literal(r.choice((*POINTS, *KINDS, *FLOATS, "precomputed")))))
    elif "." in value.text or value.text in ("inf", "nan") or "e-" in value.text:
        other = hostile_float(r)
    else:
        other = hostile_int(
            r, 10_000 if field_of(name) in (LONG | LONG_ON_DEVICE if on_device else LONG) else None
        )
    return replace(step, arguments={**step.arguments, name: other})
