"""Every wrong argument is a Python error that names the argument and the value that came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import flashcoreset as fc

X = torch.arange(12.0).reshape(6, 2) + 1
NAN, INF = float("nan"), float("inf")


def spoiled(value: float, row: int = 4, column: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = X.to(dtype).clone()
    x[row, column] = value
    return x


def options(**kw: Any) -> dict[str, Any]:
    return kw


# (x, k, options, error, words that the message must have)
CASES: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], list[str]]] = {
    "x int": (X.int(), 1, {}, TypeError, ["x", "int32"]),
    "x complex": (X.to(torch.complex64), 1, {}, TypeError, ["x", "complex64"]),
    "x object": (X.numpy().astype(object), 1, {}, TypeError, ["x", "object"]),
    "x strings": (np.array([["a"]]), 1, {}, TypeError, ["x", "<U1"]),
    "x long double": (X.numpy().astype(np.longdouble), 1, {}, TypeError, ["x", np.dtype(np.longdouble).name]),
    "x list": ([[1.0, 2.0], [3.0]], 1, {}, ValueError, ["x", "list", "unequal lengths"]),
    "x dict": ({"a": [1.0]}, 1, {}, TypeError, ["x", "dict"]),
    "x None": (None, 1, {}, TypeError, ["x", "NoneType"]),
    "x masked": (np.ma.masked_array(X.numpy(), X.numpy() > 3), 1, {}, TypeError, ["x", "masked"]),
    "x byte-swapped": (X.numpy().astype(">f4"), 1, {}, ValueError, ["x", "byte-swapped", ">f4"]),
    "x 1-d": (X[0], 1, {}, ValueError, ["x", "(2,)"]),
    "x 3-d": (X[None], 1, {}, ValueError, ["x", "(1, 6, 2)"]),
    "x no rows": (X[:0], 1, {}, ValueError, ["x", "(0, 2)"]),
    "x no columns": (X[:, :0], 1, {}, ValueError, ["x", "(6, 0)"]),
    "x COO": (X.to_sparse(), 1, options(metric="precomputed"), TypeError, ["x", "sparse_coo"]),
    "x sparse points": (scipy.sparse.csr_matrix(X.numpy()), 1, {}, TypeError, ["x", "cosine", "precomputed"]),
    "x scipy CSC": (
        scipy.sparse.csc_matrix(X.numpy()), 1, options(metric="precomputed"), TypeError, ["x", "csc", "tocsr"],
    ),
    "x sparse int": (
        scipy.sparse.csr_matrix(X.int().numpy()), 1, options(metric="precomputed"), TypeError, ["x", "int32"],
    ),
    "x NaN": (spoiled(NAN), 1, {}, ValueError, ["x", "NaN", "row 4", "column 1"]),
    "x inf": (spoiled(INF), 1, {}, ValueError, ["x", "inf", "row 4", "column 1"]),
    "x -inf": (spoiled(-INF), 1, options(metric="l1"), ValueError, ["x", "-inf", "row 4", "column 1"]),
    "x NaN in half": (spoiled(NAN, dtype=torch.float16), 1, {}, ValueError, ["x", "NaN", "row 4", "column 1"]),
    "x NaN, float64": (spoiled(NAN, dtype=torch.float64), 1, {}, ValueError, ["x", "NaN", "row 4", "column 1"]),
    "x NaN in a group": (
        spoiled(NAN), 2, options(groups=[0, 0, 1, 1, 1, 1]), ValueError, ["x", "NaN", "row 4", "column 1"],
    ),
    "matrix NaN": (spoiled(NAN), 1, options(metric="precomputed"), ValueError, ["x", "NaN", "row 4", "column 1"]),
    "sparse NaN": (
        scipy.sparse.csr_matrix(spoiled(NAN).numpy()), 1, options(metric="precomputed"), ValueError, ["NaN"],
    ),
    "x overflow": (X * 1e37, 1, options(metric="dot"), ValueError, ["x", "overflow"]),
    "x overflow of distances": (X * 1e37, 1, options(metric="sqeuclidean"), ValueError, ["x", "overflow"]),
    "k zero": (X, 0, {}, ValueError, ["k", "0"]),
    "k negative": (X, -3, {}, ValueError, ["k", "-3"]),
    "k above n": (X, 7, {}, ValueError, ["k", "7", "6"]),
    "k float": (X, 2.0, {}, TypeError, ["k", "2.0", "float"]),
    "k bool": (X, True, {}, TypeError, ["k", "True"]),
    "k bool tensor": (X, torch.tensor(True), {}, TypeError, ["k", "tensor(True)"]),
    "x nested": (torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged), 1, {}, TypeError, ["x", "nested"]),
    "x vanishing": (X * 1e-22, 1, options(metric="dot"), ValueError, ["x", "underflow", "scale the data up"]),
    "weights overflow": (X, 1, options(weights=[1e38] * 6), ValueError, ["weights", "6e+38", "float32"]),
    "gains overflow": (X, 1, options(metric="dot", weights=[1e37] * 6), ValueError, ["weights", "overflow"]),
    "metric None": (X, 1, options(metric=None), TypeError, ["metric", "str", "None"]),
    "metric array": (X, 1, options(metric=np.array(["dot", "l1"])), TypeError, ["metric", "str", "ndarray"]),
    "epsilon huge": (X, 1, options(epsilon=10**400), ValueError, ["epsilon", "range"]),
    "groups ragged": (X, 2, options(groups=[[0], [1, 2]]), ValueError, ["groups", "nested"]),
    "groups huge": (X, 2, options(groups=[2**70] * 6), ValueError, ["groups", "64-bit", str(2**70)]),
    "groups uint64": (
        X, 2, options(groups=np.array([2**63 + 1] * 6, np.uint64)), ValueError, ["groups", "2^63", str(2**63 + 1)],
    ),
    "budgets huge": (X, None, options(groups=[0] * 6, budgets={0: 10**30}), ValueError, ["budgets[0]", "64-bit"]),
    "k string": (X, "2", {}, TypeError, ["k", "'2'", "str"]),
    "k None": (X, None, {}, TypeError, ["k", "None"]),
    "k above what preselected leave": (X, 5, options(preselected=[0, 1]), ValueError, ["k", "5", "4", "2 preselected"]),
    "weights negative": (X, 1, options(weights=[1, 1, -0.5, 1, 1, 1]), ValueError, ["weights", "-0.5", "2"]),
    "weights NaN": (X, 1, options(weights=[1, NAN, 1, 1, 1, 1]), ValueError, ["weights", "nan", "1"]),
    "weights inf": (X, 1, options(weights=[1, INF, 1, 1, 1, 1]), ValueError, ["weights", "inf", "1"]),
    "weights length": (X, 1, options(weights=torch.ones(5)), ValueError, ["weights", "[6]", "(5,)"]),
    "weights 2-d": (X, 1, options(weights=torch.ones(6, 1)), ValueError, ["weights", "[6]", "(6, 1)"]),
    "weights length, clients": (
        X, 1, options(clients=X[:4], weights=torch.ones(6)), ValueError, ["weights", "[4]", "(6,)"],
    ),
    "weights complex": (X, 1, options(weights=torch.ones(6, dtype=torch.complex64)), TypeError, ["weights", "complex64"]),
    "clients width": (X, 1, options(clients=torch.ones(3, 5)), ValueError, ["clients", "2", "(3, 5)"]),
    "clients int": (X, 1, options(clients=X.int()), TypeError, ["clients", "int32"]),
    "clients NaN": (X, 1, options(clients=spoiled(NAN)), ValueError, ["clients", "NaN", "row 4", "column 1"]),
    "clients no rows": (X, 1, options(clients=X[:0]), ValueError, ["clients", "(0, 2)"]),
    "clients of a matrix": (X, 1, options(metric="precomputed", clients=X), ValueError, ["clients", "precomputed"]),
    "groups length": (X, 1, options(groups=[0, 1]), ValueError, ["groups", "[6]", "(2,)"]),
    "groups float": (X, 1, options(groups=torch.zeros(6)), TypeError, ["groups", "float32"]),
    "groups of a matrix that is not square": (
        X, 1, options(metric="precomputed", groups=[0] * 6), ValueError, ["x", "square", "(6, 2)"],
    ),
    "budgets without groups": (X, None, options(budgets=[2]), ValueError, ["budgets", "groups"]),
    "budget above its group": (
        X, None, options(groups=[0, 0, 1, 1, 1, 1], budgets=[3, 1]), ValueError, ["budgets", "3", "label 0", "2"],
    ),
    "budget above what preselected leave": (
        X, None, options(groups=[0, 0, 1, 1, 1, 1], budgets={0: 2, 1: 1}, preselected=[1]), ValueError,
        ["budgets", "2", "label 0", "1 candidates left", "1 preselected"],
    ),
    "budget negative": (
        X, None, options(groups=[0, 0, 1, 1, 1, 1], budgets={0: -1, 1: 4}), ValueError, ["budgets", "-1", "label 0"],
    ),
    "budget float": (X, None, options(groups=[0] * 6, budgets={0: 1.5}), TypeError, ["budgets[0]", "1.5"]),
    "budget for an absent label": (
        X, None, options(groups=[0] * 6, budgets={0: 1, 9: 1}), ValueError, ["budgets", "label 9"],
    ),
    "label without a budget": (
        X, None, options(groups=[0, 0, 1, 1, 1, 1], budgets={0: 1}), ValueError, ["budgets", "label 1"],
    ),
    "label outside a list of budgets": (
        X, None, options(groups=[0, 0, 1, 1, 1, 5], budgets=[1, 1]), ValueError, ["budgets", "label 5"],
    ),
    "k is not the sum": (X, 3, options(groups=[0] * 6, budgets=[2]), ValueError, ["k", "budgets", "3", "2"]),
    "budgets of zero": (X, None, options(groups=[0] * 6, budgets=[0]), ValueError, ["k", "0"]),
    "preselected twice": (X, 1, options(preselected=[3, 1, 3]), ValueError, ["preselected", "3", "distinct"]),
    "preselected above": (X, 1, options(preselected=[6]), ValueError, ["preselected", "6"]),
    "preselected below": (X, 1, options(preselected=[-1]), ValueError, ["preselected", "-1"]),
    "preselected float": (X, 1, options(preselected=[1.0]), TypeError, ["preselected", "float64"]),
    "metric unknown": (X, 1, options(metric="cosin"), ValueError, ["metric", "'cosin'", "cosine", "precomputed"]),
    "method unknown": (X, 1, options(method="fast"), ValueError, ["method", "'fast'", "lazy", "stochastic"]),
    "epsilon zero": (X, 1, options(method="stochastic", epsilon=0.0), ValueError, ["epsilon", "0.0"]),
    "epsilon one": (X, 1, options(method="stochastic", epsilon=1), ValueError, ["epsilon", "1.0"]),
    "epsilon NaN": (X, 1, options(method="stochastic", epsilon=NAN), ValueError, ["epsilon", "nan"]),
    "epsilon string": (X, 1, options(method="stochastic", epsilon="0.1"), TypeError, ["epsilon", "'0.1'"]),
    "seed float": (X, 1, options(seed=0.5), TypeError, ["seed", "0.5"]),
    "seed negative": (X, 1, options(seed=-1), ValueError, ["seed", "-1"]),
    "seed large": (X, 1, options(seed=2**64), ValueError, ["seed", str(2**64)]),
    "offset NaN": (X, 1, options(metric="l1", offset=NAN), ValueError, ["offset", "nan"]),
    "offset inf": (X, 1, options(metric="l1", offset=INF), ValueError, ["offset", "inf"]),
    "offset negative": (X, 1, options(metric="l1", offset=-1.0), ValueError, ["offset", "-1.0"]),
    "offset too large": (X, 1, options(metric="l1", offset=1e300), ValueError, ["offset", "1e+300"]),
    "offset of a similarity": (X, 1, options(offset=1.0), ValueError, ["offset", "cosine", "1.0"]),
    "offset string": (X, 1, options(metric="l1", offset="1"), TypeError, ["offset", "'1'"]),
    "memory_budget negative": (X, 1, options(memory_budget=-1), ValueError, ["memory_budget", "-1"]),
    "memory_budget float": (X, 1, options(memory_budget=1e9), TypeError, ["memory_budget", "1000000000.0"]),
    "progress": (X, 1, options(progress="yes"), TypeError, ["progress", "str"]),
    "device of clients": (X, 1, options(clients=X.to("meta")), ValueError, ["clients", "meta", "cpu"]),
    "device of weights": (X, 1, options(weights=torch.ones(6, device="meta")), ValueError, ["weights", "meta", "cpu"]),
    "device of groups": (
        X, 1, options(groups=torch.zeros(6, dtype=torch.int64, device="meta")), ValueError, ["groups", "meta", "cpu"],
    ),
    "device of preselected": (
        X, 1, options(preselected=torch.zeros(1, dtype=torch.int64, device="meta")), ValueError,
        ["preselected", "meta", "cpu"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_refused_by_name(name: str, backend: str) -> None:
    x, k, kw, error, words = CASES[name]
    with pytest.raises(error) as caught:
        fc.facility_location(x, k, backend=backend, **kw)
    message = str(caught.value)
    assert type(caught.value) is error
    assert [word for word in words if word not in message] == [], message


def test_unknown_backend_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"backend 'gpu'.*cpu, cuda, triton, torch"):
        fc.facility_location(X, 1, backend="gpu")


def test_missing_backend_gives_reason_and_remedy() -> None:
    with pytest.raises(
        fc.BackendUnavailableError,
        match=r"'cuda'.*(without CUDA kernels|CUDA device 0 cannot be used).*backend",
    ):
        fc.facility_location(X, 1, backend="cuda")


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support is in beta:UserWarning"
)  # of torch, for the test's own tensor
@pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)  # the test's own, too
@pytest.mark.parametrize(
    ("crow", "col", "words"),
    [
        ([0, 1, 9, 2], [0, 1], "row pointers"),
        ([1, 1, 2, 2], [0, 1], "row pointers"),
        ([0, 2, 1, 2], [0, 1], "row pointers"),
        ([0, 1, 2, 2], [0, 3], "column indices"),
        ([0, 1, 2, 2], [-1, 0], "column indices"),
    ],
)
def test_corrupt_sparse_matrix(crow: list[int], col: list[int], words: str, backend: str) -> None:
    x = torch.sparse_csr_tensor(
        torch.tensor(crow), torch.tensor(col), torch.ones(2), size=(3, 3), check_invariants=False
    )
    with pytest.raises(ValueError, match=f"x: {words}"):
        fc.facility_location(x, 1, metric="precomputed", backend=backend)
    broken = scipy.sparse.csr_matrix((3, 3), dtype=np.float32)
    broken.indptr, broken.indices, broken.data = np.array(crow), np.array(col), np.ones(2, dtype=np.float32)
    with pytest.raises(ValueError, match=f"x: {words}"):
        fc.facility_location(broken, 1, metric="precomputed", backend=backend)


@pytest.mark.parametrize("device", [(2, 0), None])
def test_devices_that_arrays_say_they_are_on(device: Any) -> None:
    """In a torch without CUDA an array on a GPU is an AssertionError of its own."""
    if device == (2, 0) and torch.cuda.is_available():
        device = (2, 1000)

    class Elsewhere:
        def __dlpack__(self, **keywords: Any) -> Any:
            return torch.utils.dlpack.to_dlpack(X)

        def __dlpack_device__(self) -> Any:
            return device

    for call in (
        lambda x: fc.facility_location(x, 1),
        lambda x: fc.facility_location(X, 1, weights=x),
        lambda x: fc.sketch(x, 2),
        lambda x: fc.ccs(x, 1),
        lambda x: fc.allocate_budgets(x, 1),
    ):
        with pytest.raises(TypeError, match="__dlpack__ of Elsewhere could not be taken"):
            call(Elsewhere())


def test_vmap_is_an_error_not_a_crash() -> None:
    """A batched tensor of torch.vmap has no memory of its own; the facility location's problem refuses it by name."""
    with pytest.raises(TypeError, match="x: expected a dense tensor in memory, got one that has none"):
        torch.vmap(lambda x: fc.facility_location(x, 1).indices)(torch.ones(2, 6, 3))
