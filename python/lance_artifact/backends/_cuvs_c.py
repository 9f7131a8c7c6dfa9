"""Encoding through cuVS's C interface, whose calls let other threads of Python run: cuVS's Python package holds the interpreter meanwhile.

No structure of cuVS is spelled out: parameters and resources are handles of its Python objects, arrays are DLPack's ``DLManagedTensor``,
whose layout is fixed. https://docs.rapids.ai/api/cuvs/stable/c_api/neighbors_ivf_pq_c/
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

LIBRARY = "libcuvs_c.so"
_CUDA, _SUCCEEDED = 2, 1
_CODES = {"f": 2, "u": 1, "i": 0}


class CuvsCallError(Exception):
    """A call failed, with cuVS's own words."""


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    _fields_ = [("dl_tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


def _managed(array: Any, device: int) -> _ManagedTensor:
    """An array on a device, which stays the caller's."""
    interface = array.__cuda_array_interface__
    dtype, shape = np.dtype(interface["typestr"]), interface["shape"]
    kind = _Type(_CODES[dtype.kind], 8 * dtype.itemsize, 1)
    extents = (ctypes.c_int64 * len(shape))(*shape)
    tensor = _Tensor(interface["data"][0], _Device(_CUDA, device), len(shape), kind, extents, None, 0)
    return _ManagedTensor(tensor, None, None)


class CuvsC:
    """The functions that encode.

    Raises
    ------
    OSError, AttributeError
        The library is not there, or has not all of them.
    """

    def __init__(self) -> None:
        # Loaded already, with cuvs.
        library = ctypes.CDLL(LIBRARY)
        handle, tensor = ctypes.c_size_t, ctypes.POINTER(_ManagedTensor)
        self.create = library.cuvsIvfPqIndexCreate
        self.create.argtypes = [ctypes.POINTER(ctypes.c_void_p)]
        self.destroy = library.cuvsIvfPqIndexDestroy
        self.destroy.argtypes = [ctypes.c_void_p]
        self.build_precomputed = library.cuvsIvfPqBuildPrecomputed
        self.build_precomputed.argtypes = [handle, handle, ctypes.c_uint32, *[tensor] * 4, ctypes.c_void_p]
        self.transform = library.cuvsIvfPqTransform
        self.transform.argtypes = [handle, ctypes.c_void_p, *[tensor] * 3]
        self.last_error = library.cuvsGetLastErrorText
        self.last_error.restype = ctypes.c_char_p

    def transform_address(self) -> int:
        """Where the function is, for who calls it without the interpreter."""
        return int(ctypes.cast(self.transform, ctypes.c_void_p).value or 0)

    def check(self, status: int) -> None:
        if status != _SUCCEEDED:
            # Of this thread.
            raise CuvsCallError((self.last_error() or b"no reason given").decode(errors="replace"))


class CIndex:
    """An index of given parts, which it refers to: pq_centers, padded centers, rotated centers, rotation."""

    def __init__(
        self, library: CuvsC, params: Any, dimension: int, parts: tuple[Any, ...], resources: Any, device: int
    ) -> None:
        self._library, self._parts, self._device = library, parts, device
        self._index = ctypes.c_void_p()
        library.check(library.create(ctypes.byref(self._index)))
        tensors = [_managed(part, device) for part in parts]
        library.check(
            library.build_precomputed(
                resources.get_c_obj(),
                params.get_handle(),
                dimension,
                *map(ctypes.byref, tensors),
                self._index,
            )
        )

    @property
    def address(self) -> int:
        """Of cuVS's own structure, which goes with this object."""
        return int(self._index.value or 0)

    def transform(self, vectors: Any, part_id: Any, pq_code: Any, resources: Any) -> None:
        tensors = [_managed(array, self._device) for array in (vectors, part_id, pq_code)]
        self._library.check(
            self._library.transform(resources.get_c_obj(), self._index, *map(ctypes.byref, tensors))
        )

    def __del__(self) -> None:
        if self._index.value:
            self._library.destroy(self._index)
