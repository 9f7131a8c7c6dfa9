"""What an encoder of one's own gets on a device: arrays, errors, its thread's context."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_artifact as la
from conftest import Gpu, leftovers, vectors
from lance_artifact.backends.cuvs import CuvsBackend
from test_cuvs import DIM, ROWS, K, M, train


class Looker:
    """A `DeviceEncoder` that looks at the arrays it gets."""

    input_dtype = "float32"
    devices = (0,)

    def __init__(self, look: Any) -> None:
        self.look = look

    def open(self, device: int, stream: int) -> Looker:
        self.opened = (device, stream)
        return self

    def encode(self, vectors: Any, part_id: Any = None, pq_code: Any = None) -> Any:
        self.look(vectors, part_id, pq_code)

    def close(self) -> None:
        self.closed = True


class LookerBackend(CuvsBackend):
    name = "looker"

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.looker = Looker(look)

    def encoder(self, model: la.IvfPqModel) -> Any:
        return self.looker


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


def test_device_arrays_speak_both_protocols(double: Gpu, write: Any, tmp_path: Path) -> None:
    array = vectors(ROWS, DIM)
    ds, kept = write(array), []

    def look(given: Any, part_id: Any, pq_code: Any) -> None:
        for got, shape, dtype, typestr, dl in (
            (given, (1000, DIM), "float32", "<f4", (2, 32)),
            (part_id, (1000,), "uint32", "<u4", (1, 32)),
            (pq_code, (1000, M), "uint8", "|u1", (1, 8)),
        ):
            assert isinstance(got, la.DeviceArray)
            assert (got.shape, got.dtype, got.device) == (shape, dtype, 0)
            interface = got.__cuda_array_interface__
            assert (interface["shape"], interface["typestr"], interface["strides"]) == (shape, typestr, None)
            assert interface["version"] == 3
            assert interface["stream"] > 2
            assert got.__dlpack_device__() == (2, 0)
            capsule = got.__dlpack__()
            pointer = ctypes.pythonapi.PyCapsule_GetPointer
            pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            tensor = DLTensor.from_address(pointer(capsule, b"dltensor"))
            assert (tensor.data, tensor.device_type, tensor.device_id) == (interface["data"][0], 2, 0)
            assert (tensor.code, tensor.bits, tensor.lanes, tensor.strides, tensor.byte_offset) == (
                *dl,
                1,
                None,
                0,
            )
            assert tuple(tensor.shape[i] for i in range(tensor.ndim)) == shape
            with pytest.raises(BufferError):
                got.__dlpack__(copy=True)
        content = ctypes.string_at(given.__cuda_array_interface__["data"][0], 1000 * DIM * 4)
        assert np.array_equal(
            np.frombuffer(content, "f4").reshape(1000, DIM), array[len(kept) * 1000 :][:1000]
        )
        ctypes.memset(part_id.__cuda_array_interface__["data"][0], 0, 4000)
        kept.append((given, given.__dlpack__()))

    backend = LookerBackend(look)
    artifact = la.build_artifact(ds, "vector", train(ds), tmp_path / "a", backend=backend, batch_rows=1000)
    assert artifact.partition_sizes() == [ROWS] + [0] * (K - 1)
    assert backend.looker.closed
    assert len(kept) == ROWS // 1000


def test_an_encoder_that_fails_or_runs_out_of_memory(double: Gpu, write: Any, tmp_path: Path) -> None:
    ds = write(vectors(ROWS, DIM))
    model = train(ds)

    def refuse(error: BaseException) -> Any:
        def look(*_: Any) -> None:
            raise error

        return LookerBackend(look)

    for error, expected in (
        (la.StorageError("mine"), la.StorageError),
        (ValueError("mine"), la.DeviceError),
        (MemoryError("mine"), la.DeviceMemoryError),
    ):
        with pytest.raises(expected, match="mine"):
            la.build_artifact(ds, "vector", model, tmp_path / "a", backend=refuse(error))
    assert leftovers(tmp_path / "a") == []
    with pytest.raises(la.InvalidInputError, match="takes float16, the column is float32"):
        backend = LookerBackend(lambda *_: None)
        backend.looker.input_dtype = "float16"
        la.build_artifact(ds, "vector", model, tmp_path / "a", backend=backend)


def test_the_bus_is_measured(gpu: Gpu) -> None:
    from lance_artifact._lance_artifact import measure_copy

    to_device, from_device = measure_copy(0, size=1 << 20, repeats=3)
    assert to_device > 0
    assert from_device > 0


def test_the_threads_own_device_stays(double: Gpu, write: Any, tmp_path: Path) -> None:
    from lance_artifact._lance_artifact import _CudaDevice

    ds = write(vectors(ROWS, DIM))
    model, kept = train(ds), []
    with _CudaDevice(1):
        mine, now = ctypes.c_void_p(), ctypes.c_void_p()
        double.driver.cuCtxGetCurrent(ctypes.byref(mine))
        backend = LookerBackend(
            lambda *arrays: (
                kept.append(arrays),
                ctypes.memset(arrays[1].__cuda_array_interface__["data"][0], 0, 8),
            )
        )
        with pytest.raises(la.LanceArtifactError):
            backend.looker.close = lambda: 1 / 0
            la.build_artifact(ds, "vector", model, tmp_path / "a", backend=backend)
        kept.clear()
        gc.collect()
        double.driver.cuCtxGetCurrent(ctypes.byref(now))
        assert mine.value == now.value


def test_a_stub_of_the_driver_is_told_of(double: Gpu) -> None:
    double.fail(b"cuInit", 0, 34)
    missing = la.available_backends()["cuvs"].missing
    assert any("stub" in why and "LD_LIBRARY_PATH" in why for why in missing), missing
