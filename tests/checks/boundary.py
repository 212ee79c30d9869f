"""An array whose DLPack tensor is made by hand."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Plain(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Handmade:
    """A DLPack tensor over `memory` in which everything can be wrong. `deleted` counts the deleter's calls."""

    def __init__(
        self,
        memory: np.ndarray | None,
        shape: tuple[int, ...] | None,
        strides: tuple[int, ...] | None = None,
        *,
        code: int = 2,
        bits: int = 32,
        lanes: int = 1,
        device: int = 1,
        device_id: int = 0,
        offset: int = 0,
        ndim: int | None = None,
        versioned: bool = True,
        version: tuple[int, int] = (1, 0),
        flags: int = 0,
    ) -> None:
        self.memory = memory
        self.deleted = 0
        self._shape = (ctypes.c_int64 * len(shape))(*shape) if shape is not None else None
        self._strides = (ctypes.c_int64 * len(strides))(*strides) if strides is not None else None
        tensor = Tensor(
            memory.ctypes.data if memory is not None else None,
            Device(device, device_id),
            len(shape or ()) if ndim is None else ndim,
            DataType(code, bits, lanes),
            ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64)) if self._shape is not None else None,
            ctypes.cast(self._strides, ctypes.POINTER(ctypes.c_int64)) if self._strides is not None else None,
            offset,
        )
        deleter = DELETER(self._delete)
        self.name = b"dltensor_versioned" if versioned else b"dltensor"
        self.managed = (
            Versioned(*version, None, deleter, flags, tensor) if versioned else Plain(tensor, None, deleter)
        )

    def _delete(self, _: int) -> None:
        self.deleted += 1

    def capsule(self) -> Any:
        return new_capsule(ctypes.addressof(self.managed), self.name, None)

    def __dlpack__(self, max_version: tuple[int, int] | None = None) -> Any:
        return self.capsule()
