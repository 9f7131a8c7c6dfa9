"""NVIDIA cuVS: trains and encodes on a GPU.

What cuVS computes and how it differs from what an index needs is in docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from .._lance_artifact import DeviceArray, IvfPqModel, _CudaDevice
from ..exceptions import BackendUnavailableError, InvalidInputError
from . import _cuda
from ._cuvs_calls import (
    Cuvs,
    Index,
    device_errors,
    installed_distribution,
    installed_version,
    pooled,
    smallest_codebook,
    smallest_quantizer,
)
from ._protocol import Availability, TrainParams

if TYPE_CHECKING:
    import pyarrow as pa

INSTALL = (
    "pip install cuvs-cu13 nvidia-cuda-runtime (CUDA 13) or cuvs-cu12 nvidia-cuda-runtime-cu12 (CUDA 12)"
)
# The first release with transform, build_precomputed and the product quantizer.
OLDEST = "26.2"
# Share of a device's free memory that a training sample may take; k-means needs as much again.
SAMPLE_SHARE = 0.4
# Norms of dot's centroids may differ by this much and still have the nearest one be the one of largest dot product.
NORM_TOLERANCE = 2e-3


class CuvsBackend:
    """Trains and encodes with cuVS on one or more GPUs.

    Parameters
    ----------
    devices : sequence of int, default (0,)
        Indices among the visible devices. The first one trains; all of them encode, sharing the rows.
    """

    name = "cuvs"

    def __init__(self, devices: Sequence[int] = (0,)) -> None:
        self.devices = device_list(devices)

    def on_devices(self, devices: Sequence[int]) -> CuvsBackend:
        """The same backend on other devices."""
        return CuvsBackend(devices)

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

    def sample_bytes(self) -> int:
        """Bytes that a training sample may take, as float32, on the device that trains."""
        self._require()
        with _CudaDevice(self.devices[0]) as device:
            return int(device.free_memory() * SAMPLE_SHARE)

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
        with np.errstate(over="ignore"):
            computed = vectors if dtype == np.float16 else vectors.astype(np.float32, copy=False)
        if dtype == np.float64 and not np.isfinite(computed).all():
            raise InvalidInputError(
                "a vector of the float64 column has an element beyond the range of float32, in which this backend computes; "
                'use backend="cpu", or remove the vector'
            )
        given = None
        if params.ivf_centroids is not None:
            given = as_matrix(params.ivf_centroids)
            if given.shape != (params.num_partitions, vectors.shape[1]) or given.dtype != dtype:
                raise InvalidInputError(
                    f"ivf_centroids: got {given.dtype}{given.shape}, expected num_partitions = "
                    f"{params.num_partitions} of {vectors.shape[1]} {dtype}, the column's"
                )

        def work(report: Any) -> tuple[np.ndarray, np.ndarray]:
            with _CudaDevice(self.devices[0]), device_errors(f"training on {len(vectors)} vectors"):
                trainer = _Trainer(Cuvs(), computed, params, report)
                if given is not None:
                    return given, trainer.codebook_for(given.astype(np.float32))
                if params.metric == "dot":
                    return trainer.unit_centroids(), trainer.codebook_of_raw()
                return trainer.both()

        centroids, codebook = _on_a_thread(work, progress)
        return IvfPqModel(centroids.astype(dtype), codebook.astype(dtype), params.metric)

    def encoder(self, model: IvfPqModel) -> CuvsEncoder:
        """An encoder for any model.

        Raises
        ------
        InvalidInputError
            The model is for dot and its centroids are not of equal norm.
        """
        self._require()
        return CuvsEncoder(model, self.devices)

    def _require(self) -> None:
        found = self.availability()
        if not found.ok:
            raise BackendUnavailableError(
                f"backend {self.name!r} cannot run here: " + "; ".join(found.missing)
            )


class CuvsEncoder:
    """A model on its way to one or more GPUs. It fulfils `DeviceEncoder`, and `Encoder` for a few vectors at a time."""

    def __init__(self, model: IvfPqModel, devices: Sequence[int]) -> None:
        self.model = model
        self.devices = tuple(devices)
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
        return CuvsSession(Cuvs(), self.model, device, stream)

    def encode(self, vectors: pa.FixedSizeListArray) -> tuple[np.ndarray, np.ndarray]:
        """Encode prepared vectors from host memory on the first device; see `Encoder.encode`."""
        library = Cuvs()
        matrix = np.ascontiguousarray(as_matrix(vectors).astype(self.input_dtype, copy=False))
        with _CudaDevice(self.devices[0]), contextlib.closing(self.open(self.devices[0], 0)) as session:
            part_id = library.empty((len(matrix),), np.uint32)
            pq_code = library.empty((len(matrix), self.model.pq_code_width), np.uint8)
            session.encode(library.to_device(matrix), part_id, pq_code)
            session.finish()
            return part_id.copy_to_host(), pq_code.copy_to_host()


class CuvsSession:
    """The indexes of one model on one device."""

    def __init__(self, library: Cuvs, model: IvfPqModel, device: int, stream: int) -> None:
        self._library = library
        self._device = device
        self._restore = pooled(device)
        try:
            with device_errors("the model"):
                self._resources, self.on_stream = library.resources(stream)
                centroids = as_matrix(model.ivf_centroids).astype(np.float32)
                codebook = codebook_array(model).astype(np.float32)
                self._labels: Index | None = None
                self._codes: Index
                if model.metric == "dot":
                    # cuVS encodes residuals to the centroid for every metric. Dot needs raw vectors: those are residuals to
                    # a centroid of zero. The labels come from the centroids, with the smallest quantizer there is: at unit
                    # norm in float32, because what rounding to the column's type did to their norms would decide for short
                    # vectors.
                    norms = np.linalg.norm(centroids.astype(np.float64), axis=1, keepdims=True)
                    units = (centroids / np.where(norms > 0, norms, 1)).astype(np.float32)
                    self._labels = library.index(units, smallest_codebook(model.dimension), self._resources)
                    self._codes = library.index(
                        np.zeros((1, model.dimension), np.float32), codebook, self._resources
                    )
                else:
                    self._codes = library.index(centroids, codebook, self._resources)
                self._unused: dict[tuple[int, ...], Any] = {}
        except BaseException:
            self._restore()
            raise

    def encode(self, vectors: DeviceArray, part_id: DeviceArray, pq_code: DeviceArray) -> None:
        """See `DeviceSession.encode`."""
        rows = vectors.shape[0]
        with device_errors(f"{rows} vectors on device {self._device}"):
            if self._labels is None:
                self._library.transform(self._codes, vectors, part_id, pq_code, self._resources)
            else:
                self._library.transform(
                    self._labels, vectors, part_id, self._scratch((rows, 1), np.uint8), self._resources
                )
                self._library.transform(
                    self._codes, vectors, self._scratch((rows,), np.uint32), pq_code, self._resources
                )
            if not self.on_stream:
                self._resources.sync()

    def finish(self) -> None:
        """Wait for what was encoded."""
        self._resources.sync()

    def close(self) -> None:
        """Wait, and release the device's memory."""
        try:
            self._resources.sync()
        finally:
            del self._labels, self._codes, self._resources
            self._unused = {}
            self._restore()

    def _scratch(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Any:
        """Memory for outputs that nobody reads. Batches have few sizes, and those are kept."""
        if shape not in self._unused:
            if len(self._unused) > 4:
                self._unused = {}
            self._unused[shape] = self._library.empty(shape, dtype)
        return self._unused[shape]


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


class _Trainer:
    """The trainings of one sample: float16 or float32, in host memory, from where cuVS takes it."""

    def __init__(self, library: Cuvs, sample: np.ndarray, params: TrainParams, progress: Any) -> None:
        self.library, self.sample, self.params = library, sample, params
        self.report = progress

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        # cuVS does not say how far it is.
        self.report("start", name, 0, None, "")
        yield
        self.report("complete", name, 0, None, "")

    def both(self) -> tuple[np.ndarray, np.ndarray]:
        """Centroids and the codebook of residuals, for L2 and (normalised vectors) cosine."""
        p = self.params
        with self._stage("train_ivf"):
            index = self.library.train(
                self.sample, p.num_partitions, p.num_sub_vectors, p.num_bits, p.max_iters, p.sample_rate
            )
        self.report("start", "train_quantizer", 0, None, "")
        self.report("complete", "train_quantizer", 0, None, "")
        return self.library.centroids_of(index), self.library.codebook_of(index)

    def unit_centroids(self) -> np.ndarray:
        """Spherical k-means: centroids of unit norm, of the normalised sample; vectors of zero norm have no direction."""
        p = self.params
        wide = self.sample.astype(np.float32, copy=False)
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        directions = (wide / np.where(norms > 0, norms, 1))[norms[:, 0] > 0]
        if len(directions) < p.num_partitions:
            raise InvalidInputError(
                f"training: {len(directions)} vectors of non-zero norm, expected at least num_partitions = {p.num_partitions}"
            )
        sub_vectors, bits = smallest_quantizer(wide.shape[1])
        with self._stage("train_ivf"):
            index = self.library.train(directions, p.num_partitions, sub_vectors, bits, p.max_iters, 64)
        centroids = self.library.centroids_of(index)
        lengths = np.linalg.norm(centroids, axis=1, keepdims=True)
        unit: np.ndarray = centroids / np.maximum(lengths, np.finfo(np.float32).tiny)
        return unit

    def codebook_of_raw(self) -> np.ndarray:
        return self._codebook(self._codebook_sample().astype(np.float32, copy=False))

    def codebook_for(self, centroids: np.ndarray) -> np.ndarray:
        """The codebook for given centroids: of residuals to the nearest, or of raw vectors for dot."""
        if self.params.metric == "dot":
            return self.codebook_of_raw()
        vectors = np.ascontiguousarray(self._codebook_sample())
        library = self.library
        resources, _ = library.resources()
        index = library.index(centroids, smallest_codebook(centroids.shape[1]), resources)
        labels, unused = library.empty((len(vectors),), np.uint32), library.empty((len(vectors), 1), np.uint8)
        library.transform(index, library.to_device(vectors), labels, unused, resources)
        resources.sync()
        return self._codebook(vectors.astype(np.float32) - centroids[labels.copy_to_host()])

    def _codebook_sample(self) -> np.ndarray:
        return self.sample[: self.params.sample_rate << self.params.num_bits]

    def _codebook(self, vectors: np.ndarray) -> np.ndarray:
        p = self.params
        with self._stage("train_quantizer"):
            return self.library.train_codebook(
                vectors, p.num_sub_vectors, p.num_bits, p.max_iters, p.sample_rate
            )


def device_list(devices: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(devices)
    whole = all(isinstance(d, (int, np.integer)) and not isinstance(d, bool) and d >= 0 for d in chosen)
    if not chosen or not whole or len(set(chosen)) != len(chosen):
        raise InvalidInputError(
            f"devices: got {list(chosen)}, expected at least one device index, none of them twice"
        )
    return tuple(int(d) for d in chosen)


def as_matrix(vectors: Any) -> np.ndarray:
    """A fixed-size list without nulls as (rows, dimension), without a copy."""
    matrix: np.ndarray = vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, vectors.type.list_size)
    return matrix


def codebook_array(model: IvfPqModel) -> np.ndarray:
    """(num_sub_vectors, 2**num_bits, dimension // num_sub_vectors)."""
    width = model.dimension // model.num_sub_vectors
    return as_matrix(model.pq_codebook).reshape(model.num_sub_vectors, 2**model.num_bits, width)
