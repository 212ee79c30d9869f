"""Models whose parameters are shared out among processes: by fully_shard (FSDP2) or otherwise as DTensors, by FullyShardedDataParallel (FSDP1),
or by DeepSpeed (ZeRO 3).

Every process adds the same step to a whole copy of a wanted parameter and gives the model its own part of the sum; the model's forward pass puts
the parts together. A pass is a collective call, so the processes decide together how many passes they make.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Processes:
    """The processes that share a model's parameters, or this one alone if it has the model whole. All of them call each method together."""

    def __init__(self, model: nn.Module) -> None:
        self._groups: list[Any] = []
        self._device = torch.device("cpu")
        meshes: list[Any] = []
        parameters: Iterable[Any] = model.parameters()
        for parameter in parameters:
            if is_distributed(parameter) and parameter.device_mesh not in meshes:
                meshes.append(parameter.device_mesh)
                self._device = parameter.device
            elif is_partitioned(parameter) and parameter.ds_process_group not in self._groups:
                self._groups.append(parameter.ds_process_group)
                self._device = parameter.device
        for mesh in meshes:
            self._groups += [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        modules: Iterable[Any] = model.modules()
        for module in modules:
            if is_flat(module) and module.process_group not in self._groups:
                self._groups.append(module.process_group)
                self._device = module.compute_device

    @property
    def are_several(self) -> bool:
        """Whether other processes take part."""
        return bool(self._groups)

    def agree(self, told: object) -> bool:
        """Whether `told`, by its `repr`, is the same on every process."""
        number = zlib.crc32(repr(told).encode())
        return self.all(self.least(number) == number)

    def least(self, number: int) -> int:
        """The least of the processes' numbers."""
        if not self._groups:
            return number
        found = torch.tensor(number, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=group)
        return int(found)

    def all(self, flag: bool) -> bool:
        """Whether `flag` is True on every process."""
        return bool(self.least(int(flag)))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on some process."""
        return not self.all(not flag)


def is_distributed(tensor: Tensor | None) -> bool:
    """Whether the tensor is a DTensor, of which each process has a part."""
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether the parameter is one of DeepSpeed's, which is empty but for the time in which it is used (ZeRO 3)."""
    return "deepspeed" in sys.modules and hasattr(tensor, "ds_process_group")


def is_flat(module: nn.Module) -> bool:
    """Whether the module is wrapped by FSDP1, which makes one long vector of its parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


class _Whole:
    """A parameter that this process has whole."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter

    def shape(self) -> torch.Size:
        return self._parameter.shape

    def gather(self) -> Tensor:
        """The whole parameter: itself, or a copy whose numbers `write` gives to the model."""
        return self._parameter

    def write(self, whole: Tensor) -> None:
        """Gives the model the numbers of `whole`, which are the same on every process."""

    def restore(self, whole: Tensor) -> None:
        """Gives the model the numbers again that it had at `gather`, and that stand in `whole`; also after a pass that ended early, when other
        processes may be elsewhere."""


class _Distributed(_Whole):
    """A DTensor, of which this process has a part."""

    def __init__(self, part: Callable[[], Any]) -> None:
        self._part = part

    def shape(self) -> torch.Size:
        found: torch.Size = self._part().shape
        return found

    def gather(self) -> Tensor:
        self._own = self._part()
        self._kept = self._own.to_local().clone()
        whole: Tensor = self._own.full_tensor()
        return whole

    def write(self, whole: Tensor) -> None:
        from torch.distributed.tensor import DTensor, Replicate

        parameter = self._part()
        mesh = parameter.device_mesh
        # Of a tensor that all processes have, each takes its part without sending anything.
        everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.to_local().copy_(everywhere.redistribute(mesh, parameter.placements).to_local())

    def restore(self, whole: Tensor) -> None:
        self._own.to_local().copy_(self._kept)
        current = self._part()
        if not is_distributed(current):  # a pass that ended early has left it whole
            current.copy_(whole)


class _Hidden(_Whole):
    """A parameter that stands whole in the model only within `gathered`, whose argument says whether it is changed there: one of the long
    vector of an FSDP1 module, or one of DeepSpeed's."""

    def __init__(
        self, gathered: Callable[[bool], AbstractContextManager[None]], find: Callable[[], Tensor]
    ) -> None:
        self._gathered, self._find = gathered, find

    def shape(self) -> torch.Size:
        with self._gathered(False):
            return self._find().shape

    def gather(self) -> Tensor:
        with self._gathered(False):
            return self._find().detach().clone()

    def write(self, whole: Tensor) -> None:
        with self._gathered(True):
            self._find().detach().copy_(whole)

    def restore(self, whole: Tensor) -> None:
        self.write(whole)


class _Flat(_Hidden):
    """A parameter of an FSDP1 module, `flat`."""

    def __init__(self, flat: Any, find: Callable[[], Tensor]) -> None:
        def gathered(change: bool) -> AbstractContextManager[None]:
            made: AbstractContextManager[None] = flat.summon_full_params(
                flat, recurse=False, writeback=change
            )
            return made

        super().__init__(gathered, find)
        self._vector = flat._handle.flat_param

    def gather(self) -> Tensor:
        self._kept = self._vector._local_shard.clone()
        return super().gather()

    def restore(self, whole: Tensor) -> None:
        try:
            self.write(whole)
        except (
            AssertionError
        ):  # a pass that ended early has left the vector whole, and FSDP1 changes it no more
            self._vector._local_shard.copy_(self._kept)
            current = self._find()
            if current.shape == whole.shape:
                current.detach().copy_(whole)


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that the parameter is in, from its own to the model."""
    path = name.split(".")[:-1]
    return [model.get_submodule(".".join(path[:depth])) for depth in reversed(range(len(path) + 1))]


def _owner(model: nn.Module, name: str) -> Any:
    """The module for which fully_shard puts the parameter together; None if there is none."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return next((m for m in _around(model, name) if kind is not None and isinstance(m, kind)), None)


def stored(model: nn.Module, name: str) -> Tensor:
    """The parameter as it is between passes: under fully_shard, a root module would stay whole after one, and not see a change of the parts."""
    owner = _owner(model, name)
    if owner is not None:
        owner.reshard()
    return model.get_parameter(name)


def _place(model: nn.Module, name: str) -> _Whole:
    flats: list[Any] = [module for module in _around(model, name) if is_flat(module)]
    if flats:
        flats[-1].check_is_root()  # else the first one that is put together takes itself for the root
        owner, _, leaf = name.rpartition(".")
        return _Flat(flats[0], lambda: getattr(model.get_submodule(owner), leaf))
    parameter = stored(model, name)
    if is_partitioned(parameter):
        zero = sys.modules["deepspeed"].zero

        def put_together(change: bool) -> AbstractContextManager[None]:
            made: AbstractContextManager[None] = zero.GatheredParameters(
                [parameter], modifier_rank=0 if change else None
            )
            return made

        return _Hidden(put_together, lambda: parameter)
    return _Distributed(lambda: stored(model, name)) if is_distributed(parameter) else _Whole(parameter)


@contextmanager
def whole_parameters(
    model: nn.Module, names: Sequence[str]
) -> Iterator[tuple[list[Tensor], Callable[[], None]]]:
    """Whole tensors of the parameters, one for each name, and a function that gives the model the numbers that stand in them.

    The caller restores the numbers of these tensors; then, at the end, the model has its own numbers again.
    """
    with torch.no_grad():
        places = {name: _place(model, name) for name in names}
        tensors = {name: place.gather() for name, place in places.items()}

    @torch.no_grad()
    def write() -> None:
        for name, place in places.items():
            place.write(tensors[name])

    try:
        yield [tensors[name] for name in names], write
    finally:
        _restore([(place, tensors[name]) for name, place in places.items()])


@torch.no_grad()
def _restore(places: list[tuple[_Whole, Tensor]]) -> None:
    """Restores every place, whatever happens at one of them."""
    for i, (place, whole) in enumerate(places):
        try:
            place.restore(whole)
        except KeyboardInterrupt:  # once more, from the place that was interrupted
            _restore(places[i:])
            raise
        except Exception:
            _restore(places[i + 1 :])
            raise


def whole_shape(model: nn.Module, name: str) -> torch.Size:
    """The shape of a whole parameter."""
    with torch.no_grad():
        return _place(model, name).shape()
