"""What the double of cuVS's C interface computes: the Python double's arithmetic, on arrays as DLPack has them."""

import ctypes
import itertools

import numpy as np

from cuvs.common.resources import Resources

PARAMS, INDEXES = {}, {}
_KEYS = itertools.count(1)
_KINDS = {2: "f", 1: "u", 0: "i"}


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip


class CIndex(ctypes.Structure):
    _fields_ = [
        ("addr", ctypes.c_size_t),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    ]


class Borrowed(Resources):
    def __init__(self, handle):
        self._handle = ctypes.c_size_t(handle)

    def __del__(self):
        pass


class Array:
    def __init__(self, tensor):
        t = tensor.contents
        if t.device_type != 2 or t.strides or t.byte_offset or t.lanes != 1:
            raise ValueError("not a contiguous array of a device")
        current = ctypes.c_int()
        ctypes.CDLL("libcuda.so").cuCtxGetDevice(ctypes.byref(current))
        if t.device_id != current.value:
            raise ValueError(f"an array of device {t.device_id} on device {current.value}")
        self.__cuda_array_interface__ = {
            "shape": tuple(t.shape[: t.ndim]),
            "typestr": np.dtype(f"{_KINDS[t.code]}{t.bits // 8}").str,
            "data": (t.data, False),
            "strides": None,
            "version": 3,
        }


def handle_of(params):
    """As `get_handle` of the real one: an address that stays good as long as the object."""
    key = next(_KEYS)
    PARAMS[key] = params
    return key


def register(ivf_pq):
    library = ctypes.CDLL("libcuvs_c.so")
    tensor, index = ctypes.POINTER(DLTensor), ctypes.POINTER(CIndex)

    def told(work):
        def call(*given):
            try:
                work(*given)
            except Exception as error:
                library.fake_cuvs_fail(str(error).encode())
                return 0
            return 1

        return call

    def build(resources, params, dimension, pq_centers, centers, centers_rot, rotation, made):
        parts = [Array(part) for part in (pq_centers, centers, centers_rot, rotation)]
        found = ivf_pq.build_precomputed(PARAMS[params], dimension, *parts, resources=Borrowed(resources))
        made.contents.addr = next(_KEYS)
        INDEXES[made.contents.addr] = found

    def transform(resources, made, *arrays):
        ivf_pq.transform(INDEXES[made.contents.addr], *map(Array, arrays), resources=Borrowed(resources))

    size = ctypes.c_size_t
    functions = (
        ctypes.CFUNCTYPE(ctypes.c_int, size, size, ctypes.c_uint32, *[tensor] * 4, index)(told(build)),
        ctypes.CFUNCTYPE(ctypes.c_int, size, index, *[tensor] * 3)(told(transform)),
        ctypes.CFUNCTYPE(None, size)(lambda key: INDEXES.pop(key, None) and None),
    )
    library.fake_cuvs_arithmetic(*functions)
    return functions
