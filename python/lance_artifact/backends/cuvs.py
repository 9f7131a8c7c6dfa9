"""NVIDIA cuVS: trains and encodes on a GPU.

What cuVS computes and how it differs from what an index needs is in docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from .._lance_artifact import DeviceArray, IvfPqModel, _CudaDevice
from .._log import LOGGER
from ..exceptions import BackendUnavailableError, DeviceError, DeviceMemoryError, InvalidInputError
from . import _cuda
from ._cuvs_c import CIndex
from ._cuvs_calls import (
    Cuvs,
    Index,
    Scratch,
    broken_handle,
    device_errors,
    has_pool,
    in_pool,
    installed_distribution,
    installed_version,
    keep,
    pooled,
    smallest_codebook,
)
from ._cuvs_train import Trainer
from ._protocol import Availability, TrainParams
from ._vectors import as_matrix, codebook_array, narrowed, of_equal_norm

if TYPE_CHECKING:
    import pyarrow as pa

INSTALL = (
    "pip install cuvs-cu13 nvidia-cuda-runtime (CUDA 13) or cuvs-cu12 nvidia-cuda-runtime-cu12 (CUDA 12)"
)
# The first release with transform, build_precomputed and the product quantizer.
OLDEST = "26.2"
# Share of a device's memory that the vectors of a training may take; k-means needs as much again.
SAMPLE_SHARE = 0.4
# Vectors for each centroid that the device must hold at once.
LEAST_RATE = 8
# Of the memory that may be taken, what cuVS's own allocations may; slots have the rest.
OWN_SHARE = 0.75
# On these architectures cuVS rounds numbers to TF32 where both rows and partitions are fewer than this, and computes in float32 else
# (https://github.com/rapidsai/cuvs/blob/branch-26.06/cpp/src/cluster/kmeans_common.cuh).
ROUNDS_FEW, EXACT_ROWS = (9,), 4096
# Norms of dot's centroids may differ by this much and still have the nearest one be the one of largest dot product.
NORM_TOLERANCE = 2e-3


class CuvsBackend:
    """Trains and encodes with cuVS on one or more GPUs.

    Parameters
    ----------
    devices : sequence of int, default (0,)
        Indices among the visible devices. The first one trains; all of them encode, sharing the rows.
    device_memory_limit : int, optional
        Bytes that may be taken of each device, beside CUDA's own context; default what is free.
    """

    name = "cuvs"
    # Both k-means draw from the whole sample.
    takes_any_order = True

    def __init__(self, devices: Sequence[int] = (0,), device_memory_limit: int | None = None) -> None:
        self.devices = device_list(devices)
        if device_memory_limit is not None and device_memory_limit < 1:
            raise InvalidInputError(f"device_memory_limit: got {device_memory_limit}, expected bytes")
        self.device_memory_limit = device_memory_limit

    def on_devices(self, devices: Sequence[int]) -> CuvsBackend:
        """The same backend on other devices."""
        return CuvsBackend(devices, self.device_memory_limit)

    def within_device_memory(self, device_memory_limit: int) -> CuvsBackend:
        """The same backend in less of the devices' memory."""
        return CuvsBackend(self.devices, device_memory_limit)

    def availability(self) -> Availability:
        """Which of platform, package, driver and device is missing. Imports cuVS only where there is a device."""
        missing = []
        if not sys.platform.startswith("linux"):
            missing.append(f"platform: cuVS needs Linux, this is {sys.platform}")
        installed = find_spec("cuvs") is not None
        if not installed:
            missing.append(f"package: the Python package cuvs is not installed; {INSTALL}")
        cuda = _cuda.probe()
        missing += _cuda.missing(cuda)
        if not missing:
            missing += self._lacking(cuda)
        return Availability(
            not missing, tuple(missing), {"cuvs": installed_version(), **_cuda.describe(cuda)}
        )

    def _lacking(self, cuda: dict[str, Any]) -> list[str]:
        absent = [d for d in self.devices if d >= len(cuda["devices"])]
        if absent:
            return [
                f"device: devices {absent} are not among the {len(cuda['devices'])} visible ones; look at CUDA_VISIBLE_DEVICES"
            ]
        found = installed_distribution()
        name = found[0] if found else ""
        major = {"cuvs-cu12": 12, "cuvs-cu13": 13}.get(name)
        if major is not None and cuda["driver"][0] < major:
            return [
                f"driver: it runs CUDA {_cuda.version(cuda)}, and {name} needs {major}; update the driver, or install "
                f"cuvs-cu{cuda['driver'][0]} instead"
            ]
        least = (7, 5) if major == 13 else (7, 0)
        old = [
            d
            for d in cuda["devices"]
            if d["index"] in self.devices and tuple(d["compute_capability"]) < least
        ]
        if old:
            return [
                f"device: {d['name']} has compute capability {'.'.join(map(str, d['compute_capability']))}, cuVS needs "
                f"{least[0]}.{least[1]}"
                for d in old
            ]
        try:
            library = Cuvs()
        except (ImportError, OSError) as error:
            return [
                f"package: cuvs {installed_version()} is installed but cannot be imported ({error}); its CUDA must not be newer "
                "than the driver's, and it needs CUDA's runtime library, which it does not bring: "
                "pip install nvidia-cuda-runtime (with cuvs-cu13) or nvidia-cuda-runtime-cu12 (with cuvs-cu12)"
            ]
        lacking = library.lacking()
        if lacking:
            return [
                f"package: cuvs {installed_version()} has no {', '.join(lacking)}; it needs {OLDEST} or newer: {INSTALL}"
            ]
        return []

    def check_fits(self, params: TrainParams, dimension: int) -> None:
        """Before a sample is drawn: that enough of it fits the device that trains.

        Raises
        ------
        DeviceMemoryError
        """
        self._require()
        codes = 2**params.num_bits
        least = codes if params.ivf_centroids is not None else max(params.num_partitions * LEAST_RATE, codes)
        most = self._rows_at_once(dimension)
        if most < least:
            row_bytes = int(dimension * 4 / SAMPLE_SHARE)
            raise DeviceMemoryError(
                f"training: {least} vectors of dimension {dimension} must be on the device at once, which needs {least * row_bytes} bytes; "
                f"{most * row_bytes} are free on device {self.devices[0]}, or allowed (device_memory_limit){self._not_counted()}. Lower "
                "num_partitions, or train elsewhere and pass ivf_centroids and pq_codebook"
            )

    def _rows_at_once(self, dimension: int) -> int:
        """Vectors of a sample, as float32, that the device that trains may hold."""
        free = min(self._free_memory(), self.device_memory_limit or sys.maxsize)
        return int(free * SAMPLE_SHARE) // (dimension * 4)

    def _free_memory(self) -> int:
        keep(self.devices[0])
        with _CudaDevice(self.devices[0]) as device:
            return device.free_memory()

    def _not_counted(self) -> str:
        """What may be free beside what the driver calls so. rmm tells neither how much its pool holds nor how much of that is in use."""
        if not has_pool(self.devices[0]) or self._free_memory() > (self.device_memory_limit or sys.maxsize):
            return ""
        return ", without what cuVS had in earlier calls of this process and is kept for it: there is more in a new process"

    def train(self, sample: pa.FixedSizeListArray, params: TrainParams, progress: Any = None) -> IvfPqModel:
        """Train centroids and codebook; see `Backend.train`. ``seed`` decides the sample, cuVS its own start.

        Raises
        ------
        InvalidInputError
            There are too few vectors.
        DeviceMemoryError
            The sample does not fit the device's memory.
        """
        self._require()
        vectors = as_matrix(sample)
        codes = 2**params.num_bits
        needed = codes if params.ivf_centroids is not None else max(params.num_partitions, codes)
        if len(vectors) < needed:
            raise InvalidInputError(
                f"training: {len(vectors)} usable vectors, expected at least {needed} (num_partitions = "
                f"{params.num_partitions}, {codes} codes per sub-vector); lower num_partitions, or num_bits to 4"
            )
        dtype = vectors.dtype
        call: Callable[[Trainer], tuple[np.ndarray, np.ndarray]] = Trainer.train
        if params.ivf_centroids is not None:
            given = as_matrix(params.ivf_centroids)
            if given.shape != (params.num_partitions, vectors.shape[1]) or given.dtype != dtype:
                raise InvalidInputError(
                    f"ivf_centroids: got {given.dtype}{given.shape}, expected num_partitions = "
                    f"{params.num_partitions} of {vectors.shape[1]} {dtype}, the column's"
                )
            call = functools.partial(Trainer.codebook_only, centroids=given)
        centroids, codebook = self._trained(vectors, params, call, progress)
        return IvfPqModel(centroids.astype(dtype), codebook.astype(dtype), params.metric)

    def train_centroids(
        self, sample: pa.FixedSizeListArray, params: TrainParams, progress: Any = None
    ) -> np.ndarray:
        """Centroids alone, (num_partitions, dimension): as many vectors are enough. Otherwise as `train`."""
        self._require()
        vectors = as_matrix(sample)
        if len(vectors) < params.num_partitions:
            raise InvalidInputError(
                f"training: {len(vectors)} usable vectors, expected at least num_partitions = {params.num_partitions}; lower it"
            )
        return self._trained(vectors, params, Trainer.centroids_only, progress)[0].astype(vectors.dtype)

    def _trained(
        self,
        vectors: np.ndarray,
        params: TrainParams,
        call: Callable[[Trainer], tuple[np.ndarray, np.ndarray]],
        progress: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What a trainer makes of vectors, in float32."""
        computed = narrowed(vectors)

        def work(report: Any) -> tuple[np.ndarray, np.ndarray]:
            device = self.devices[0]
            # Before there is a pool of this training's.
            at_once, not_counted = self._rows_at_once(vectors.shape[1]), self._not_counted()
            with (
                _CudaDevice(device),
                in_pool(device, self.device_memory_limit),
                device_errors(f"training on {len(vectors)} vectors", trains=True),
            ):
                trainer = Trainer(Cuvs(), device, computed, params, report, at_once, not_counted)
                trained = call(trainer)
                # While the device is current.
                del trainer
                return trained

        trained: tuple[np.ndarray, np.ndarray] = _on_a_thread(work, progress)
        return trained

    def encoder(self, model: IvfPqModel) -> CuvsEncoder:
        """An encoder for any model.

        Raises
        ------
        InvalidInputError
            The model is for dot and its centroids are not of equal norm.
        """
        self._require()
        return CuvsEncoder(model, self.devices, self.device_memory_limit)

    def _require(self) -> None:
        found = self.availability()
        if not found.ok:
            raise BackendUnavailableError(
                f"backend {self.name!r} cannot run here: " + "; ".join(found.missing)
            )


class CuvsEncoder:
    """A model on its way to one or more GPUs. It fulfils `DeviceEncoder`, and `Encoder` for a few vectors at a time."""

    def __init__(
        self, model: IvfPqModel, devices: Sequence[int], device_memory_limit: int | None = None
    ) -> None:
        self.model = model
        self.devices = tuple(devices)
        self.device_memory_limit = device_memory_limit
        self.input_dtype = "float16" if model.dtype == "float16" else "float32"
        if model.metric == "dot":
            norms = np.linalg.norm(as_matrix(model.ivf_centroids).astype(np.float64), axis=1)
            if norms.max() > norms.min() * (1 + NORM_TOLERANCE):
                raise InvalidInputError(
                    f"ivf_centroids: their norms are {norms.min():.4g} to {norms.max():.4g}; for dot cuVS assigns by L2, which is "
                    "the largest dot product only for centroids of equal norm. Normalise them, or use backend='cpu'"
                )

    def open(self, device: int, stream: int) -> CuvsSession:
        """See `DeviceEncoder.open`."""
        limit = self.device_memory_limit
        return CuvsSession(
            Cuvs(), self.model, device, stream, None if limit is None else int(limit * OWN_SHARE)
        )

    def encode(self, vectors: pa.FixedSizeListArray) -> tuple[np.ndarray, np.ndarray]:
        """Encode prepared vectors from host memory on the first device; see `Encoder.encode`."""
        library = Cuvs()
        given = as_matrix(vectors)
        with (
            _CudaDevice(self.devices[0]),
            contextlib.closing(self.open(self.devices[0], 0)) as session,
            device_errors(f"{len(given)} vectors on device {self.devices[0]}"),
        ):
            rows = max(len(given), session.exact_from)
            matrix = np.zeros((rows, self.model.dimension), self.input_dtype)
            matrix[: len(given)] = given
            part_id = library.empty((rows,), np.uint32)
            pq_code = library.empty((rows, self.model.pq_code_width), np.uint8)
            session.encode(library.to_device(matrix), part_id, pq_code)
            session.finish()
            return part_id.copy_to_host()[: len(given)], pq_code.copy_to_host()[: len(given)]


class CuvsSession:
    """The indexes of one model on one device."""

    def __init__(
        self, library: Cuvs, model: IvfPqModel, device: int, stream: int, limit: int | None = None
    ) -> None:
        self._library, self._model, self._device, self._stream = library, model, device, stream
        self._broken = False
        self._labels: Index | CIndex | None = None
        self._codes: Index | CIndex | None = None
        self._resources: Any = None
        self._scratch: Scratch | None = None
        # Fewer rows than this are compared less exactly.
        few = model.num_partitions < EXACT_ROWS and _cuda.capability(device) in ROUNDS_FEW
        self.exact_from = EXACT_ROWS if few else 0
        self._restore = pooled(device, limit)
        try:
            with device_errors("the model"):
                self._open()
        except BaseException:
            self._restore()
            raise

    def _open(self) -> None:
        """Make the indexes, all of them or none."""
        try:
            self._make()
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        # What was allocated before what it was allocated with.
        self._labels = self._codes = self._scratch = None
        self._resources = None

    def _make(self) -> None:
        library, model = self._library, self._model
        self._resources, self.on_stream = library.resources(self._stream)
        centroids = as_matrix(model.ivf_centroids).astype(np.float32)
        codebook = codebook_array(model).astype(np.float32)
        self._scratch = Scratch(library, self._resources)
        if model.metric == "dot":
            # cuVS encodes residuals to the centroid for every metric. Dot needs raw vectors: those are residuals to
            # a centroid of zero. The labels come from the centroids, with the smallest quantizer there is.
            units = of_equal_norm(centroids, codebook)
            self._labels = library.index(
                units, smallest_codebook(model.dimension), self._resources, self._device
            )
            self._codes = library.index(
                np.zeros((1, model.dimension), np.float32), codebook, self._resources, self._device
            )
        else:
            self._codes = library.index(centroids, codebook, self._resources, self._device)

    def encode(self, vectors: DeviceArray, part_id: DeviceArray, pq_code: DeviceArray) -> None:
        """See `DeviceSession.encode`."""
        rows = vectors.shape[0]
        if rows < self.exact_from and isinstance(vectors, DeviceArray):
            wide = [w for w in (a._widened(self.exact_from) for a in (vectors, part_id, pq_code)) if w]
            if len(wide) == 3:
                try:
                    self._encode(*wide)
                    return
                except DeviceMemoryError as error:
                    LOGGER.info(
                        "device %d: %d rows are compared less exactly (%s)", self._device, rows, error
                    )
        self._encode(vectors, part_id, pq_code)

    def _encode(self, vectors: DeviceArray, part_id: DeviceArray, pq_code: DeviceArray) -> None:
        rows = vectors.shape[0]
        with device_errors(f"{rows} vectors on device {self._device}"):
            if self._broken:
                self._drop()
                self._open()
                self._broken = False
            if self._codes is None or self._scratch is None:
                raise DeviceError(f"the session on device {self._device} is closed")
            try:
                # For dot the labels of its only centroid first, in their place.
                self._codes.transform(vectors, part_id, pq_code, self._resources)
                if self._labels is not None:
                    unused = self._scratch.bytes_of(rows)
                    self._labels.transform(vectors, part_id, unused, self._resources)
            except Exception as error:
                self._broken = broken_handle(error)
                raise
            if not self.on_stream:
                self._resources.sync()

    def without_python(self, rows: int) -> tuple[int, int, list[tuple[int, int | None]], int] | None:
        """What encodes up to ``rows`` rows without the interpreter, until the next call of a method.

        The address of ``cuvsIvfPqTransform``, the resources, of each call the index and where codes go that nobody reads, and
        `exact_from`. None where each batch must come through `encode`.
        """
        library = self._library.c_interface
        if library is None or self._broken or not self.on_stream:
            return None
        if not isinstance(self._codes, CIndex) or self._scratch is None:
            return None
        calls: list[tuple[int, int | None]] = [(self._codes.address, None)]
        if isinstance(self._labels, CIndex):
            with device_errors(f"{rows} vectors on device {self._device}"):
                unused = self._scratch.bytes_of(max(rows, self.exact_from))
            calls.append((self._labels.address, unused.__cuda_array_interface__["data"][0]))
        return library.transform_address(), self._resources.get_c_obj(), calls, self.exact_from

    def finish(self) -> None:
        """Wait for what was encoded."""
        # None where it could not be opened again: nothing is under way.
        if self._resources is not None:
            self._resources.sync()

    def close(self) -> None:
        """Wait, and release the device's memory."""
        try:
            self.finish()
        finally:
            self._drop()
            restore, self._restore = self._restore, lambda: None
            restore()


def _on_a_thread(work: Callable[[Any], Any], progress: Any) -> Any:
    """Run cuVS's training beside the main thread, and tell progress on the calling one.

    On the main thread cuVS takes Ctrl-C for itself and answers with an error of its own. Here it waits until the call into
    cuVS, which holds the interpreter, returns; then it is raised.
    """
    steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(lambda *step: steps.put(step)), None))
        except BaseException as error:
            # Whoever keeps it does not keep what is on the device.
            cause: BaseException | None = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__
            outcome.append((None, error))
        finally:
            steps.put(None)

    thread = threading.Thread(target=run, name="lance-artifact-train")
    thread.start()
    try:
        while True:
            # Not for ever: where a library lets signals interrupt no system call, Ctrl-C is only heard between two waits.
            try:
                step = steps.get(timeout=0.05)
            except queue.Empty:
                continue
            if step is None:
                break
            if progress:
                progress(*step)
    finally:
        thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def device_list(devices: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(devices)
    whole = all(isinstance(d, (int, np.integer)) and not isinstance(d, bool) and d >= 0 for d in chosen)
    if not chosen or not whole or len(set(chosen)) != len(chosen):
        raise InvalidInputError(
            f"devices: got {list(chosen)}, expected at least one device index, none of them twice"
        )
    return tuple(int(d) for d in chosen)
