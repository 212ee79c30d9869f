"""Backends take the arguments that they say they take, and every backend has its family's functions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from flashcoreset._core.dispatch import FAMILIES, Takes, kernels_of, takes_of

GRID = [(family, backend) for family, backends in FAMILIES.items() for backend in backends]


def functions(module: ModuleType) -> Iterator[tuple[str, inspect.Signature]]:
    """The functions of the family's protocol, as the module has them."""
    protocol = __import__(f"{module.__package__}.backend", fromlist=["Kernels"]).Kernels
    for name, member in vars(protocol).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            yield name, inspect.signature(getattr(module, name))


@pytest.mark.parametrize(("family", "backend"), GRID)
def test_every_backend_has_its_family_s_functions(family: str, backend: str) -> None:
    module = kernels_of(backend, family)
    protocol = __import__(f"flashcoreset.{family}.backend", fromlist=["Kernels"]).Kernels
    found = dict(functions(module))
    assert found
    for name, signature in found.items():
        wanted = inspect.signature(getattr(protocol, name)).parameters
        for parameter in wanted.values():
            if parameter.name != "self":
                assert parameter.name in signature.parameters, (family, backend, name)
        # Further parameters of a backend may be left out.
        for name_, parameter in signature.parameters.items():
            assert name_ in wanted or parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize(("family", "backend"), GRID)
def test_every_backend_says_what_it_takes(family: str, backend: str) -> None:
    takes = takes_of(backend, family)
    assert isinstance(takes, Takes)
    if takes.checks_values:
        assert backend == "cuda"
    if takes.host is not None:
        assert backend in ("cuda", "triton")


def test_half_types_are_read_as_they_are_where_that_is_said() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).half()
    taken = [backend for backend in FAMILIES["sketch"] if takes_of(backend, "sketch").half]
    assert taken == ["triton"]
    found = kernels_of("triton", "sketch").sketch(x, 8, kind="rademacher", seed=1, offset=0, nnz=1)
    expected = kernels_of("torch", "sketch").sketch(x.double(), 8, kind="rademacher", seed=1, offset=0, nnz=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
