"""cuVS's calls, with what goes in and comes out checked. The only place that imports cuVS, and only when it is used."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from .._lance_artifact import _CudaDevice, synchronize
from .._log import LOGGER
from ..exceptions import (
    BackendUnavailableError,
    DeviceError,
    DeviceMemoryError,
    InvalidInputError,
    LanceArtifactError,
)
from ._cuvs_c import CIndex, CuvsC, CuvsCallError

# Memory resources stay alive as long as anything may have been allocated from them.
_POOLS: dict[int, Any] = {}
# By what they limit, and to how much.
_LIMITED: dict[tuple[Any, int], Any] = {}
# And so do the contexts that they are of, which go with their last user.
_KEPT: dict[int, _CudaDevice] = {}


class Cuvs:
    """cuVS's modules, and its calls with what goes in and comes out checked."""

    def __init__(self) -> None:
        from cuvs.common import Resources
        from cuvs.neighbors import ivf_pq
        from pylibraft.common import device_ndarray

        self._resources, self._ivf_pq, self._array = Resources, ivf_pq, device_ndarray
        self._c: CuvsC | None = None
        try:
            self._c = CuvsC()
        except (OSError, AttributeError) as error:
            LOGGER.info("cuVS encodes through its Python package, one thread at a time (%s)", error)

    @property
    def c_interface(self) -> CuvsC | None:
        """Through which encodings run beside other threads of Python."""
        return self._c

    def lacking(self) -> list[str]:
        """What this version of cuVS has not."""
        lacking = [
            f"ivf_pq.{name}" for name in ("transform", "build_precomputed") if not hasattr(self._ivf_pq, name)
        ]
        if find_spec("cuvs.preprocessing.quantize.pq") is None:
            lacking.append("preprocessing.quantize.pq")
        return lacking

    def resources(self, stream: int = 0) -> tuple[Any, bool]:
        """Resources that compute on a stream, and whether they do.

        ``Resources(stream=)`` takes the address of the Python integer for the stream and crashes
        (https://github.com/NVIDIA/cuvs/issues/1863), so the stream is set, and read back, through cuVS's C interface.
        """
        made = self._resources()
        if not stream:
            return made, False
        try:
            # Loaded already, with cuvs.
            library = ctypes.CDLL("libcuvs_c.so")
            handle, got = ctypes.c_size_t(made.get_c_obj()), ctypes.c_void_p()
            succeeded = 1
            done = library.cuvsStreamSet(handle, ctypes.c_void_p(stream)) == succeeded
            done = (
                done and library.cuvsStreamGet(handle, ctypes.byref(got)) == succeeded and got.value == stream
            )
        except (OSError, AttributeError) as error:
            LOGGER.info("cuVS computes on a stream of its own (%s)", error)
            return made, False
        return made, done

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        made = self._array.empty(shape, dtype=dtype)
        # Allocated in the order of the default stream, for which other streams do not wait.
        synchronize()
        return made

    def to_device(self, array: np.ndarray) -> Any:
        return self._array(np.ascontiguousarray(array))

    def train(
        self, sample: np.ndarray, partitions: int, sub_vectors: int, bits: int, iterations: int, rate: int
    ) -> Any:
        """An index without vectors, with centroids and codebook of the whole sample."""
        params = self._ivf_pq.IndexParams(
            n_lists=partitions,
            metric="sqeuclidean",
            kmeans_n_iters=iterations,
            kmeans_trainset_fraction=1.0,
            pq_bits=bits,
            pq_dim=sub_vectors,
            codebook_kind="subspace",
            force_random_rotation=False,
            add_data_on_build=False,
            max_train_points_per_pq_code=rate,
        )
        dimension = sample.shape[1]
        index = self._ivf_pq.build(params, np.ascontiguousarray(sample))
        got = (index.n_lists, index.dim, index.pq_dim, index.pq_bits, index.pq_len)
        expected = (partitions, dimension, sub_vectors, bits, dimension // sub_vectors)
        if got != expected:
            raise BackendUnavailableError(
                f"backend 'cuvs': cuvs {installed_version()} trained (n_lists, dim, pq_dim, pq_bits, pq_len) = {got}, expected {expected}"
            )
        rotation = index.rotation_matrix.copy_to_host()
        if rotation.shape != (dimension, dimension) or not np.array_equal(
            rotation, np.eye(dimension, dtype=rotation.dtype)
        ):
            raise BackendUnavailableError(
                f"backend 'cuvs': cuvs {installed_version()} rotates the vectors; an index needs them as they are. "
                "Use another version, or backend='cpu'"
            )
        return index

    def centroids_of(self, index: Any) -> np.ndarray:
        """(partitions, dimension); cuVS keeps them padded."""
        padded = index.centers_padded.copy_to_host()
        return self._checked("centers", padded[:, : index.dim], (index.n_lists, index.dim))

    def codebook_of(self, index: Any) -> np.ndarray:
        """(sub_vectors, codes, sub_dimension); cuVS keeps (sub_vectors, sub_dimension, codes)."""
        codes = 2**index.pq_bits
        centers = self._checked(
            "pq_centers", index.pq_centers.copy_to_host(), (index.pq_dim, index.pq_len, codes)
        )
        return np.ascontiguousarray(centers.transpose(0, 2, 1))

    def train_codebook(
        self, vectors: np.ndarray, sub_vectors: int, bits: int, iterations: int, rate: int
    ) -> np.ndarray:
        """(sub_vectors, codes, sub_dimension) of raw vectors, float32."""
        from cuvs.preprocessing.quantize import pq

        params = pq.QuantizerParams(
            pq_bits=bits,
            pq_dim=sub_vectors,
            use_subspaces=True,
            use_vq=False,
            kmeans_n_iters=iterations,
            pq_kmeans_type="kmeans_balanced",
            max_train_points_per_pq_code=rate,
        )
        # From the device: of host memory each sub-vector's numbers would be copied row by row.
        quantizer = pq.build(params, self.to_device(vectors))
        width = vectors.shape[1] // sub_vectors
        codebook = quantizer.pq_codebook.copy_to_host()
        checked = self._checked("pq_codebook", codebook, (sub_vectors << bits, width))
        return checked.reshape(sub_vectors, 1 << bits, width)

    def index(
        self, centroids: np.ndarray, codebook: np.ndarray, resources: Any, device: int
    ) -> Index | CIndex:
        """An index of given centroids (partitions, dimension) and codebook (sub_vectors, codes, sub_dimension), float32."""
        partitions, dimension = centroids.shape
        sub_vectors, codes, _ = codebook.shape
        params = self._ivf_pq.IndexParams(
            n_lists=partitions,
            metric="sqeuclidean",
            pq_bits=codes.bit_length() - 1,
            pq_dim=sub_vectors,
            codebook_kind="subspace",
            force_random_rotation=False,
            add_data_on_build=False,
        )
        # As cuVS pads them: to a multiple of 8, with room for the squared norm.
        padded = np.zeros((partitions, (dimension + 1 + 7) // 8 * 8), np.float32)
        padded[:, :dimension] = centroids
        padded[:, dimension] = (centroids.astype(np.float64) ** 2).sum(1)
        parts = tuple(
            self.to_device(array.astype(np.float32, copy=False))
            for array in (codebook.transpose(0, 2, 1), padded, centroids, np.eye(dimension, dtype=np.float32))
        )
        if self._c is not None:
            return CIndex(self._c, params, dimension, parts, resources, device)
        index = self._ivf_pq.build_precomputed(params, dimension, *parts, resources=resources)
        # The index only refers to them.
        return Index(self._ivf_pq, index, parts)

    def _checked(self, what: str, array: Any, shape: tuple[int, ...]) -> np.ndarray:
        if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise BackendUnavailableError(
                f"backend 'cuvs': cuvs {installed_version()} gave {what} as {array.dtype}{array.shape}, "
                f"{'all finite' if np.isfinite(array).all() else 'not all finite'}; expected finite float32{shape}"
            )
        checked: np.ndarray = array
        return checked


class Scratch:
    """Device memory for outputs of any number of rows, one byte each, that nobody reads. It grows and is used again."""

    def __init__(self, library: Cuvs, resources: Any) -> None:
        self._library, self._resources, self._memory = library, resources, None

    def bytes_of(self, rows: int) -> Any:
        """(rows, 1) uint8."""
        if self._memory is None or self._memory.shape[0] < rows:
            # Batches differ by the rows that are left out of them. One may still be under way, and write to what goes.
            if self._memory is not None:
                self._resources.sync()
            self._memory = None
            self._memory = self._library.empty((1 << max(rows - 1, 1).bit_length(), 1), np.uint8)
        return FirstRows(self._memory, rows)


class FirstRows:
    """The first rows of an array."""

    def __init__(self, array: Any, rows: int) -> None:
        self._array, self.shape, self.dtype = array, (rows, *array.shape[1:]), array.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self._array.__cuda_array_interface__, "shape": self.shape}


class Index:
    """An index of cuVS's Python package, and the arrays it refers to; the index goes first."""

    def __init__(self, ivf_pq: Any, index: Any, parts: tuple[Any, ...]) -> None:
        self._ivf_pq, self._index, self._parts = ivf_pq, index, parts

    def transform(self, vectors: Any, part_id: Any, pq_code: Any, resources: Any) -> None:
        self._ivf_pq.transform(self._index, vectors, part_id, pq_code, resources=resources)


def smallest_quantizer(dimension: int) -> tuple[int, int]:
    """Sub-vectors and bits of the cheapest quantizer that cuVS takes without a rotation: one byte a vector."""
    return (2, 4) if dimension % 2 == 0 else (1, 8)


def smallest_codebook(dimension: int) -> np.ndarray:
    sub_vectors, bits = smallest_quantizer(dimension)
    return np.zeros((sub_vectors, 1 << bits, dimension // sub_vectors), np.float32)


def installed_distribution() -> tuple[str, str] | None:
    """Name and version of the installed package."""
    for name in ("cuvs-cu13", "cuvs-cu12", "cuvs"):
        with contextlib.suppress(PackageNotFoundError):
            return name, version(name)
    return None


def installed_version() -> str | None:
    found = installed_distribution()
    return found[1] if found else None


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        # Not "bad_alloc": any failed call of an allocation says so, also on a device that is lost.
        sign in text
        for sign in ("out_of_memory", "out of memory", "cudaerrormemoryallocation")
    )


def broken_handle(error: BaseException) -> bool:
    """Whether cuBLAS had no memory for its handle. cuVS keeps such a handle, and fails with it ever after."""
    text = str(error).lower()
    return any(f"cublas_status_{sign}" in text for sign in ("not_initialized", "alloc_failed"))


@contextlib.contextmanager
def device_errors(what: str, *, trains: bool = False) -> Iterator[None]:
    """cuVS's errors as ours. It reports that memory ran out as any other error."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LanceArtifactError):
            raise
        if _out_of_memory(error) or broken_handle(error):
            # Its first index and its quantizers are lost to the process when a training fails.
            kept = "; it keeps what it had taken: try again in a new process, with a lower sample_rate or num_partitions"
            raise DeviceMemoryError(
                f"cuVS ran out of device memory ({what}): {error}{kept if trains else ''}"
            ) from error
        if "mesocluster" in str(error):
            raise InvalidInputError(
                f"{what}: the vectors are too few distinct ones for so many partitions ({error}); lower num_partitions, or use "
                "backend='cpu'"
            ) from error
        of_cuvs = type(error).__module__.split(".")[0] in ("cuvs", "pylibraft", "rmm")
        if of_cuvs or isinstance(error, CuvsCallError):
            raise DeviceError(
                f"cuVS failed ({what}): {error}; look at nvidia-smi and the kernel log (dmesg, Xid). Nothing was committed. "
                "A fault of the device stays with the process: try again in a new one"
            ) from error
        raise


def keep(device: int) -> None:
    """Keep a device's context for the rest of the process: starting one takes longer than many a batch."""
    if device not in _KEPT:
        kept = _CudaDevice(device)
        kept.keep()
        _KEPT[device] = kept


def has_pool(device: int) -> bool:
    """Whether a pool holds what cuVS has freed on a device."""
    return device in _POOLS


def pooled(device: int, limit: int | None = None) -> Callable[[], None]:
    """Let cuVS allocate from a pool, at most ``limit`` bytes of it, and return what ends that.

    cuVS allocates and frees in every call, and a plain ``cudaFree`` waits for all work on the device, copies included. Where
    the program has chosen a memory resource of its own, that stays.

    Raises
    ------
    BackendUnavailableError
        A limit cannot be kept with this rmm.
    """
    try:
        from rmm import mr

        before = chosen = mr.get_current_device_resource()
        if type(before) is mr.CudaMemoryResource:
            keep(device)
            if device not in _POOLS:
                # It keeps what is freed: beyond a threshold it would give it back in every wait for the device, which is each batch.
                _POOLS[device] = mr.CudaAsyncMemoryResource()
            chosen = _POOLS[device]
        if limit is not None:
            of = (chosen, limit)
            if of not in _LIMITED:
                _LIMITED[of] = mr.LimitingResourceAdaptor(*of)
            chosen = _LIMITED[of]
        mr.set_current_device_resource(chosen)
    except (ImportError, AttributeError, RuntimeError, MemoryError) as error:
        if limit is not None:
            raise BackendUnavailableError(
                f"device_memory_limit: this rmm cannot keep to it ({error}); update cuVS, or leave it out"
            ) from error
        LOGGER.info("device %d: no memory pool (%s); copies overlap less", device, error)
        return lambda: None
    return lambda: mr.set_current_device_resource(before)


@contextlib.contextmanager
def in_pool(device: int, limit: int | None = None) -> Iterator[None]:
    """As `pooled`, for a block."""
    restore = pooled(device, limit)
    try:
        yield
    finally:
        restore()
