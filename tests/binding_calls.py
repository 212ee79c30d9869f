"""Calls of a compiled module's bindings with one hostile argument each, in a process of their own: ``python binding_calls.py NAME
PATH`` loads the module NAME from PATH.

A line of JSON is printed before each call and one with its outcome after it, so that a call that ends the process is named.
Parameters that are numbers are found by the signatures that the bindings report, and numbers of problems by the table's objects; the
table says with which other arguments each binding is called.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

KINDS = ("Integer", "Real", "Flag")  # of csrc/bindings/arguments.h
HOSTILE: dict[str, Any] = {
    "0": 0, "-1": -1, "2**31": 2**31, "2**62": 2**62, "2**63-1": 2**63 - 1, "2**63": 2**63, "-2**63": -(2**63), "2**70": 2**70,
    "10**400": 10**400, "1.5": 1.5, "nan": float("nan"), "inf": float("inf"), "'3'": "3", "None": None, "True": True, "b'x'": b"x",
}  # fmt: skip
LARGE = {("NearestOrder.of_similarities", "lists")}  # numbers that memory is made for
_SECONDS = 20  # per call
_ROOM = 2 << 30  # bytes that calls may take: a working array of 2^31 numbers is refused, not filled


def signatures(module: ModuleType) -> dict[str, list[tuple[str, str]]]:
    """(parameter, type) of every function, method and property of the module, as it reports them."""
    found = {}
    for name, value in vars(module).items():
        if isinstance(value, type):
            for method, member in vars(value).items():
                if isinstance(member, property):
                    found[f"{name}.{method}"] = []
                elif (doc := getattr(getattr(value, method), "__doc__", None)) and doc.startswith(
                    f"{method}("
                ):
                    found[f"{name}.{method}"] = _parameters(doc)
        elif callable(value):
            found[name] = _parameters(value.__doc__)
    return found


def _parameters(doc: str) -> list[tuple[str, str]]:
    listed = re.match(r"\w+\((.*)\) -> ", doc)
    assert listed, doc
    pairs = re.findall(r"(\w+): ((?:[^,\[]|\[[^\]]*\])+)", listed[1])
    return [(name, kind.split(" = ")[0].strip()) for name, kind in pairs if name != "self"]


def numbers(module: ModuleType) -> dict[str, list[tuple[str, str]]]:
    """(path, kind) of every number and flag of every binding: a parameter, or with dots the field of an object."""
    calls, _ = _tables(module)
    found = {}
    for binding, signature in signatures(module).items():
        given = calls.get(binding, {})
        found[binding] = [pair for pair in signature if pair[1] in KINDS]
        for name, kind in signature:
            if kind not in KINDS and isinstance(given.get(name), SimpleNamespace):
                found[binding] += _fields(given[name], name)
    return found


def _fields(value: Any, path: str) -> Iterator[tuple[str, str]]:
    kinds = {bool: "Flag", int: "Integer", float: "Real"}
    return ((at, kinds[type(field)]) for at, field in _leaves(value, path) if type(field) in kinds)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, SimpleNamespace):
        for name, field in vars(value).items():
            yield from _leaves(field, f"{path}.{name}")
    else:
        yield path, value


def calls_with_text(module: ModuleType, text: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """For each text that a binding takes, its name and a call with another value in its place."""
    calls, call = _tables(module)
    for binding, given in calls.items():
        for name, value in given.items():
            for path, leaf in _leaves(value, name):
                if isinstance(leaf, str):
                    anew = {key: _anew(argument) for key, argument in given.items()}
                    yield f"{binding}: {path}", functools.partial(call, binding, _with(anew, path, text))


def _with(given: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The arguments with another value at a path, objects made anew."""
    name, _, rest = path.partition(".")
    if rest:
        value = SimpleNamespace(**_with(vars(given[name]), rest, value))
    return given | {name: value}


def _anew(value: Any) -> Any:
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: _anew(field) for name, field in vars(value).items()})
    return value.clone() if hasattr(value, "clone") else value


# ------------------------------------------------------------------------------------------------ how each is called


def _tables(m: ModuleType) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The arguments for each call, made anew; and a function that makes the call."""
    import torch

    def f64(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5

    def f32(*shape: int) -> torch.Tensor:
        return f64(*shape).float()

    def i64(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64)

    cuda = hasattr(m, "unusable")
    where = {"stream": 0} if cuda else {"threads": 2}
    transport: dict[str, Any] = {
        "problem": SimpleNamespace(
            x=f32(2, 4, 3), y=f32(2, 5, 3), a=torch.full((2, 4), 0.25, dtype=torch.float64),
            b=torch.full((2, 5), 0.2, dtype=torch.float64), reg=0.5, metric="sqeuclidean", rho_a=1.0, rho_b=1.0, x_lengths=None,
            y_lengths=None, max_iter=20, tol=1e-3, f=f64(2, 4), g=f64(2, 5), memory_budget=1 << 20,
            symmetric=False, norm="l2",
        ),
    }  # fmt: skip
    solved = {"f": f64(2, 4), "g": f64(2, 5), "scalars": f64(4, 2), "iterations": zeros(2)}
    projection = {"kind": "sjlt", "seed": 1, "offset": 0, "nnz": 2}
    fields = SimpleNamespace
    # With a length the gradients are coefficients of directions; the history has the same.
    g, history = fields(values=f32(4, 2), seed=1, length=9), fields(m=f32(9), v=f32(9), betas=(0.9, 0.99))
    rule = fields(m_scale=0.9, m_step=0.1, v_scale=0.9, v_step=0.1, eps=1e-8)
    updates = {
        "problem": fields(g=g, history=history, rule=rule, member=i64(0, 1, 2, 3), offset=i64(0, 2, 4))
    }
    step = {"gradients": g, "history": history, "chosen": i64(0, 2), "new_m": f32(9), "new_v": f32(9)}
    pursuit = {
        "problem": fields(g=f32(6, 4), target=f64(4), nonnegative=True, ridge=0.1, memory_budget=1 << 20),
        "indices": zeros(3), "weights": f64(3), "residual_norms": f64(3),
    }  # fmt: skip
    greedy = fields(
        x=f32(6, 3), clients=None, metric="euclidean", weights=None, preselected=None, costs=None, offset=9.0, memory_budget=1 << 20,
        expected_picks=3,
    )  # fmt: skip
    common: dict[str, Any] = {
        "pairwise": {"x": f32(4, 3), "y": f32(4, 3), "out": f32(4, 4), "metric": "l1"} | where,
        "sketch": {"x": f32(4, 9), "out": f32(4, 8)} | projection | where,
        "projection_matrix": {"out": f32(9, 8)} | projection | where,
        "directions": {"out": f32(2, 9), "seed": 1, "begin": 3, "first": 0} | where,
        "FacilityLocation.__init__": {"problem": greedy} | where,
        "FacilityLocation.step": {"count": 2, "naive": False},
        "FacilityLocation.pick": {"naive": False, "stop_gain": 0.5},
        "sinkhorn_apply": transport | {"v": (f64 if cuda else f32)(2, 5, 2), "transpose": False, "out": (f64 if cuda else f32)(2, 4, 2)} | where,
        "sinkhorn_plan": transport | {"out": (f64 if cuda else f32)(2, 4, 5)} | where,
    }  # fmt: skip
    runs: dict[str, Any] = {"runs": fields(x=f32(6, 3), rows=None, weights=None, size=2)}
    of_cuda: dict[str, Any] = {
        "sinkhorn": transport | solved | {"shared_bytes": -1, "stream": 0},
        "top_dimensions": updates | {
            "dims": zeros(2, 3), "values": f64(2, 3), "refused": i64(2**62), "stream": 0,
        },
        "restrict_updates": updates | {"dims": zeros(2, 3), "u": f64(4, 3), "stream": 0},
        "update_history": step | {"overflows": zeros(1), "stream": 0},
        "sum_runs": runs | {"centre": f64(3), "shrink": 1.0, "sums": f64(3, 4), "stream": 0},
        "keep_runs": runs | {
            "kept": i64(0, 2), "factors": f64(2), "new_rows": zeros(4), "new_weights": f64(4), "stream": 0,
        },
        "products": {
            "g": f32(6, 4), "rows": None, "vectors": f32(2, 4), "which": i64(0, 1), "out": f64(2, 6), "places": i64(0, 1), "stream": 0,
        },
        "squares": {"g": f32(6, 4), "out": f64(6), "stream": 0},
        "best_row": {
            "correlations": fields(
                start=f64(6), gram=f64(2, 6), slots=i64(0), numbers=f64(2), norm=f64(6), magnitude=True,
            ),
            "scores": f64(6), "found": f64(2), "stream": 0,
        },
        "residual": {"g": f32(6, 4), "target": f64(4), "rows": i64(1), "weights": f64(1), "out": f64(4), "stream": 0},
        "unusable": {"device": 0},
        "set_device": {
            "count": 1, "cooperative_launch": True, "memory_pools": True, "has_code": True, "bytes": 1 << 40, "event_delay": 0,
        },
        "set_current_device": {"device": 0},
    }  # fmt: skip
    of_cpu: dict[str, Any] = {
        "pairwise": common["pairwise"] | {"symmetric": False},
        "NearestOrder.__init__": {"centroids": f32(3, 2), "threads": 2},
        "NearestOrder.of_similarities": {"lists": 3, "dtype": "float32", "threads": 2},
        "NearestOrder.begin": {"length": 2},
        "NearestOrder.rounds": {"k": 2, "items": zeros(6), "counts": zeros(2), "values": f64(2), "takers": zeros(6), "similarities": f64(6)},
        "NearestOrder.order": {"list": 0, "items": zeros(9), "similarities": f32(9)},
        "PartialGains.__init__": {"clients": 4, "dtype": "float32", "entries": 100, "threads": 2},
        "PartialGains.begin": {"rows": 2, "listing": True},
        "PartialGains.add": {"s": f32(2, 3), "first": 1, "best": f32(4), "weights": f32(4), "sums": zeros(2)},
        "PartialGains.has": {"number": 7},
        "PartialGains.evaluate": {"numbers": i64(7, 5), "best": f32(4), "weights": f32(4), "sums": zeros(2)},
        "PartialGains.win": {"number": 7, "position": 0, "best": f32(4), "owner": zeros(4)},
        "PartialGains.forget": {"number": 7},
        "Transport.__init__": {"costs": f32(3, 4), "u": f64(3), "threads": 2},
        "Transport.exchange": {"place": 1, "row": f32(4), "ceiling": 9.0},
        "Transport.best_exchange": {
            "costs": f32(2, 4), "rows": i64(0, 1), "places": i64(2, 0), "bounds": f64(2), "ceiling": 9.0, "enough": 0.0, "most": 2,
        },
        "Transport.bounds": {
            "costs": f32(2, 4), "goal": 9.0, "ways": True, "lowest": f64(2), "rows": zeros(6), "places": zeros(6), "bounds": f64(6),
        },
        "Transport.duals": {"u": f64(3), "f": f64(4)},
        "Sinkhorn.__init__": transport | solved | {"threads": 2},
        "Sinkhorn.step": {"iterations": 5},
        "FacilityLocation.step": {"count": 2, "naive": False, "report": None},
        "sketch_csr": {
            "csr": fields(crow=i64(0, 2, 3), col=i64(0, 3, 1), values=f32(3)), "out": f32(2, 8),
        } | projection | where,
        "sketch_rows": {"indices": zeros(2, 3), "g": f32(2, 3, 4), "out": f32(2, 8)} | projection | where,
        "sample_scores": {"logits": f32(3, 2, 4), "targets": zeros(3, 2), "masked": False, "out": f32(5, 3, 2)} | where,
        "top_updates": updates | {"dims": zeros(2, 3), "u": f64(4, 3)} | where,
        "update_history": step | where,
        "caratheodory": {
            "problem": fields(x=f32(9, 2), weights=None, max_size=0, one_scale=False), "indices": zeros(3), "new_weights": f64(3),
        } | where,
        "CaratheodoryReduction.__init__": {"centre": f64(2), "shrink": 1.0},
        "CaratheodoryReduction.factors": {"sums": f64(8, 3), "out": f64(8)} | where,
        "CaratheodoryReduction.rest": {"x": f32(9, 2), "weights": f64(9), "indices": zeros(3), "new_weights": f64(3)} | where,
        "CaratheodoryReduction.correct": {"x": f32(3, 2), "weights": f64(3), "sums": f64(3)} | where,
        "CaratheodorySampler.__init__": {"weights": f64(9), "goal": 4} | where,
        "ActiveSet.__init__": {"nonnegative": True, "ridge": 0.1, "target_norm": 1.0},
        "ActiveSet.add": {"products": f64(1), "correlation": 0.5},
        "orthogonal_matching_pursuit": pursuit | where,
        "frank_wolfe": pursuit | {
            "problem": fields(g=f32(6, 4), target=f64(4), memory_budget=1 << 20),
        } | where,
    }  # fmt: skip
    calls = common | (of_cuda if cuda else of_cpu)

    def reduction() -> Any:
        found = m.CaratheodoryReduction(f64(2), 1.0)
        found.take_total(f64(8, 3))
        return found

    def run_of(**arguments: Any) -> Any:
        return m.FacilityLocation(**(calls["FacilityLocation.__init__"] | arguments))

    def finished_order() -> Any:
        order = m.NearestOrder(f32(3, 2), 1)
        order.begin(4)
        order.update(f32(9, 2))
        order.finish()
        return order

    def gains_with_lists() -> Any:
        gains = m.PartialGains(4, "float32", 100, 2)
        gains.begin(2, True)
        gains.add(f32(2, 4), 0, zeros(4).float() - 9, f32(4), zeros(2))
        gains.keep(i64(7, 5))
        return gains

    # A method needs an object; a call that only notes its arguments is followed by a call that uses them.
    def call(name: str, given: dict[str, Any]) -> None:
        owner, _, method = name.rpartition(".")
        if name == "FacilityLocation.__init__":
            run_of(**given).step(2, False)
        elif name == "NearestOrder.of_similarities":
            m.NearestOrder.of_similarities(**given).begin(2)
        elif name == "NearestOrder.begin":
            order = m.NearestOrder(f32(3, 2), 1)
            order.begin(**given)
            order.update(f32(9, 2))
            order.finish()
        elif name == "PartialGains.begin":
            gains = m.PartialGains(4, "float32", 100, 2)
            gains.begin(**given)
            gains.add(f32(2, 4), 0, f32(4), f32(4), zeros(2))
        elif name == "PartialGains.add":
            gains = m.PartialGains(4, "float32", 100, 2)
            gains.begin(2, True)
            gains.add(**given)
        elif name == "Sinkhorn.__init__":
            m.Sinkhorn(**given).step(5)
        elif name == "Sinkhorn.step":
            m.Sinkhorn(**calls["Sinkhorn.__init__"]).step(**given)
        elif name == "CaratheodorySampler.__init__":
            sampler = m.CaratheodorySampler(reduction(), **given)
            sampler.push(f32(9, 2))
            sampler.finish()
        elif name == "ActiveSet.add":
            m.ActiveSet(True, 0.1, 1.0).add(**given)
        elif method == "__init__":
            getattr(m, owner)(**given)
        elif owner:
            makers = {
                "FacilityLocation": run_of,
                "NearestOrder": finished_order,
                "PartialGains": gains_with_lists,
                "CaratheodoryReduction": reduction,
                "Transport": lambda: m.Transport(f32(3, 4), None, 1),
            }
            getattr(makers[owner](), method)(**given)
        else:
            getattr(m, name)(**given)
        if name == "set_device":
            m.set_device()

    return calls, call


# ------------------------------------------------------------------------------------------------------- in the process


def main(name: str, path: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {_SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_long)
    calls, call = _tables(module)
    # A sanitizer reserves address space without end, and ends the process if it is asked for too much memory.
    sanitized = re.search("asan|tsan", os.environ.get("LD_PRELOAD", "")) is not None
    if not sanitized:
        with open("/proc/self/statm") as numbers_of_pages:
            used = int(numbers_of_pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))
    for binding, parameter, value in cases(module):
        key = [binding, parameter, value]
        print(json.dumps({"call": key}), flush=True)
        if binding not in calls:
            outcome, message = "not in the table", ""
        elif sanitized and value == "2**31" and (binding, parameter) in LARGE:
            outcome, message = "MemoryError", "not called under a sanitizer"
        else:
            given = {name: _anew(argument) for name, argument in calls[binding].items()}
            if parameter is not None:
                given = _with(given, parameter, HOSTILE[value])
            signal.alarm(_SECONDS)
            try:
                call(binding, given)
                outcome, message = "works", ""
            except Exception as error:
                outcome, message = type(error).__name__, str(error)
            signal.alarm(0)
        print(json.dumps({"result": key, "outcome": outcome, "message": message[:300]}), flush=True)


def cases(module: ModuleType) -> Iterator[tuple[str, str | None, str]]:
    """A binding, its parameter and the value passed for it; first each binding as it is meant to be called."""
    for binding, parameters in numbers(module).items():
        if parameters:
            yield binding, None, ""
            for parameter, _ in parameters:
                for value in HOSTILE:
                    yield binding, parameter, value


if __name__ == "__main__":
    main(*sys.argv[1:])
