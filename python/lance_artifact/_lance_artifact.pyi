from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, final

import pyarrow as pa

__all__ = [
    "Artifact",
    "CpuEncoder",
    "DeviceArray",
    "IvfPqModel",
    "PartitionArtifactBuilder",
    "VerifyReport",
    "_Call",
    "_CudaDevice",
    "_Dataset",
    "_Means",
    "_Segment",
    "_VectorScan",
    "_VectorSource",
    "__version__",
    "build_segment",
    "cuda_devices",
    "default_memory_limit",
    "delete_artifact",
    "delete_files",
    "delete_unfinished",
    "discard_segment",
    "encode_on_device",
    "list_folder",
    "measure_copy",
    "merge_segments",
    "model_of_index",
    "owner_is_gone",
    "owner_marks",
    "partition_sizes",
    "put_new",
    "read_file",
    "segments_with",
    "segments_without_coverage",
    "synchronize",
    "train_on_cpu",
    "unfinished_files",
    "unfinished_segments",
]
__version__: str

_Report = Callable[[str, str, int, int | None, str], None]
_StorageOptions = Mapping[str, str] | Callable[[], Mapping[str, str] | None]

@final
class IvfPqModel:
    def __new__(
        cls, ivf_centroids: Any, pq_codebook: Any, metric: str = "l2", *, num_sub_vectors: int | None = None
    ) -> IvfPqModel: ...
    @property
    def ivf_centroids(self) -> pa.FixedSizeListArray: ...
    @property
    def pq_codebook(self) -> pa.FixedSizeListArray: ...
    @property
    def metric(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_partitions(self) -> int: ...
    @property
    def num_sub_vectors(self) -> int: ...
    @property
    def num_bits(self) -> int: ...
    @property
    def dimension(self) -> int: ...
    @property
    def pq_code_width(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def training(self) -> dict[str, int] | None: ...
    @staticmethod
    def from_index(dataset: Any, name: str) -> IvfPqModel: ...
    def with_training(
        self,
        *,
        target_partition_size: int | None = None,
        sample_rate: int | None = None,
        max_iters: int | None = None,
    ) -> IvfPqModel: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...

@final
class CpuEncoder:
    def __new__(cls, model: IvfPqModel) -> CpuEncoder: ...
    def encode(self, vectors: Any) -> tuple[pa.UInt32Array, pa.FixedSizeListArray]: ...

@final
class DeviceArray:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> int: ...
    def _widened(self, rows: int) -> DeviceArray | None: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class _CudaDevice:
    def __new__(cls, index: int) -> _CudaDevice: ...
    def keep(self) -> None: ...
    def __enter__(self) -> _CudaDevice: ...
    def __exit__(self, *_exception: Any) -> None: ...
    def free_memory(self) -> int: ...

@final
class PartitionArtifactBuilder:
    def __new__(
        cls,
        uri: str | PathLike[str],
        model: IvfPqModel | None = None,
        *,
        num_partitions: int | None = None,
        pq_code_width: int | None = None,
        num_buckets: int | None = None,
        memory_limit: int | None = None,
        overwrite: bool = False,
        storage_options: _StorageOptions | None = None,
        source: Mapping[str, Any] | None = None,
        sync: bool = True,
        expected_rows: int | None = None,
        format_version: int | None = None,
    ) -> PartitionArtifactBuilder: ...
    @staticmethod
    def _share(
        uri: str,
        model: IvfPqModel | None,
        *,
        num_partitions: int,
        pq_code_width: int,
        num_buckets: int | None,
        memory_limit: int,
        held: int,
        overwrite: bool,
        storage_options: _StorageOptions | None,
        source: Mapping[str, Any] | None,
        sync: bool,
        expected_rows: int | None,
    ) -> PartitionArtifactBuilder: ...
    def append_batch(self, data: Any) -> int: ...
    def finish(
        self, *, rows_seen: int | None = None, rows_dropped: Mapping[str, int] | None = None
    ) -> Artifact: ...
    def abort(self) -> None: ...
    def __enter__(self) -> PartitionArtifactBuilder: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool: ...
    @property
    def artifact(self) -> Artifact: ...
    @property
    def can_finish_again(self) -> bool: ...
    @property
    def uri(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_partitions(self) -> int: ...
    @property
    def pq_code_width(self) -> int: ...
    @property
    def num_buckets(self) -> int: ...
    @property
    def memory_limit(self) -> int: ...

@final
class Artifact:
    @staticmethod
    def open(uri: str | PathLike[str], storage_options: _StorageOptions | None = None) -> Artifact: ...
    @staticmethod
    def _open_all(places: Sequence[tuple[str, _StorageOptions | None]]) -> list[Artifact]: ...
    @property
    def _source(self) -> dict[str, Any] | None: ...
    @property
    def uri(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_partitions(self) -> int: ...
    @property
    def pq_code_width(self) -> int: ...
    @property
    def model(self) -> IvfPqModel | None: ...
    @property
    def manifest(self) -> dict[str, Any]: ...
    @property
    def storage_options(self) -> dict[str, str] | None: ...
    def partition_sizes(self) -> list[int]: ...
    def partition_range_counts(self) -> list[int]: ...
    def read_partition(self, partition: int) -> pa.RecordBatchReader: ...
    def verify(self, progress: _Report | None = None) -> VerifyReport: ...

@final
class VerifyReport:
    @property
    def ok(self) -> bool: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_partitions(self) -> int: ...
    @property
    def num_files(self) -> int: ...
    @property
    def num_ranges(self) -> int: ...
    @property
    def checksums_checked(self) -> bool: ...
    @property
    def part_ids_checked(self) -> bool: ...
    @property
    def duplicate_row_ids(self) -> int: ...
    @property
    def num_problems(self) -> int: ...
    @property
    def problems(self) -> list[str]: ...

@final
class _Dataset:
    def __new__(
        cls,
        uri: str,
        manifest: bytes,
        *,
        storage_options: Mapping[str, str] | None = None,
        renew: Callable[[], Mapping[str, str] | None] | None = None,
        base_storage_options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> _Dataset: ...
    def is_there(self, manifest: bytes) -> bool | None: ...
    def field_id(self, path: str) -> int | None: ...
    def path_of(self, field_id: int) -> str | None: ...
    @property
    def uri(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def branch(self) -> str | None: ...

@final
class _Segment:
    @property
    def uuid(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def field_id(self) -> int: ...
    @property
    def fragment_ids(self) -> list[int]: ...
    @property
    def index_version(self) -> int: ...
    @property
    def details(self) -> tuple[str, bytes]: ...
    @property
    def dataset_version(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...
    def release(self, dataset: _Dataset) -> None: ...
    def check_commit(self, dataset: _Dataset, base: bytes, name: str) -> dict[str, Any] | None: ...
    def changed_since(self, dataset: _Dataset, now: bytes) -> str | None: ...
    def missing_files(self, dataset: _Dataset) -> str | None: ...

@final
class _VectorSource:
    def __new__(
        cls, dataset: _Dataset, column: str, *, fragment_ids: Sequence[int] | None = None
    ) -> _VectorSource: ...
    @property
    def dimension(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...
    def count_rows(self) -> int: ...
    def with_scan_bytes(self, scan_bytes: int) -> _VectorSource: ...
    def encode_shares(
        self, num_partitions: int, num_bits: int, memory_limit: int | None = None
    ) -> tuple[int, int, int]: ...
    def least_to_finalize(
        self, num_partitions: int, pq_code_width: int, num_bits: int, writer: int
    ) -> int: ...
    def train_shares(
        self,
        num_partitions: int,
        num_sub_vectors: int,
        num_bits: int,
        sample_rate: int,
        trains_centroids: bool,
        memory_limit: int | None = None,
    ) -> tuple[int, int, int]: ...
    def sample(
        self,
        rows: int,
        metric: str,
        seed: int,
        memory_limit: int | None = None,
        *,
        shuffled: bool = True,
        least: int | None = None,
    ) -> pa.FixedSizeListArray: ...
    def train_centroids_in_parts(
        self,
        rows: int,
        at_once: int,
        metric: str,
        *,
        num_partitions: int,
        sample_rate: int,
        max_iters: int,
        seed: int,
        memory_limit: int,
        progress: _Report | None = None,
    ) -> pa.FixedSizeListArray: ...
    def scan(self, metric: str) -> _VectorScan: ...
    def drain(self) -> tuple[int, float]: ...
    def encode_on_cpu(
        self,
        model: IvfPqModel,
        builder: PartitionArtifactBuilder,
        memory_limit: int,
        fast: bool,
        progress: _Report | None = None,
    ) -> tuple[int, dict[str, int]]: ...

@final
class _Means:
    def __new__(cls, clusters: int, dimension: int) -> _Means: ...
    def add(self, vectors: pa.FixedSizeListArray, labels: pa.UInt32Array) -> None: ...
    def moved(self, centroids: pa.FixedSizeListArray) -> pa.FixedSizeListArray: ...

@final
class _Call:
    def __new__(cls) -> _Call: ...
    def __enter__(self) -> _Call: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class _VectorScan:
    def __iter__(self) -> Iterator[pa.RecordBatch]: ...
    def __next__(self) -> pa.RecordBatch: ...
    @property
    def dropped(self) -> dict[str, int]: ...

def train_on_cpu(
    sample: Any,
    metric: str,
    *,
    num_partitions: int,
    num_sub_vectors: int,
    num_bits: int,
    sample_rate: int,
    max_iters: int,
    seed: int,
    ivf_centroids: Any = None,
    progress: _Report | None = None,
) -> IvfPqModel: ...
def model_of_index(dataset: _Dataset, name: str, segments: Sequence[str] | None = None) -> IvfPqModel: ...
def unfinished_files(
    folder: str, storage_options: _StorageOptions | None = None, unknown_too: bool = False
) -> tuple[list[str], bool]: ...
def delete_unfinished(
    folder: str, storage_options: _StorageOptions | None = None, unknown_too: bool = False
) -> None: ...
def unfinished_segments(dataset: _Dataset) -> list[str]: ...
def segments_with(dataset: _Dataset, name: str, text: str) -> list[str]: ...
def segments_without_coverage(dataset: _Dataset, name: str) -> list[str]: ...
def default_memory_limit() -> int: ...
def partition_sizes(dataset: _Dataset, name: str) -> list[int]: ...
def merge_segments(
    dataset: _Dataset,
    name: str,
    segments: Sequence[str],
    uuid: str,
    *,
    index_type: str = "IVF_PQ",
    m: int = 20,
    ef_construction: int = 150,
    max_level: int = 7,
    hints: Mapping[str, str] | None = None,
    sync: bool = False,
    memory_limit: int | None = None,
    progress: _Report | None = None,
) -> tuple[_Segment | None, str, int, int, int]: ...
def build_segment(
    dataset: _Dataset,
    column: str,
    artifacts: Sequence[Artifact],
    uuid: str,
    *,
    model: IvfPqModel | None = None,
    metric: str | None = None,
    index_type: str = "IVF_PQ",
    m: int = 20,
    ef_construction: int = 150,
    max_level: int = 7,
    fragment_ids: Sequence[int] | None = None,
    hints: Mapping[str, str] | None = None,
    skip_transpose: bool = False,
    sync: bool = False,
    memory_limit: int | None = None,
    progress: _Report | None = None,
) -> _Segment: ...
def discard_segment(dataset: _Dataset, uuid: str) -> None: ...
def delete_artifact(uri: str, storage_options: _StorageOptions | None = None) -> None: ...
def put_new(
    folder: str,
    name: str,
    content: bytes,
    storage_options: _StorageOptions | None = None,
    sync: bool = True,
) -> bool: ...
def read_file(folder: str, name: str, storage_options: _StorageOptions | None = None) -> bytes | None: ...
def list_folder(
    folder: str, below: str = "", storage_options: _StorageOptions | None = None
) -> list[tuple[str, int | None, float]]: ...
def delete_files(
    folder: str, names: Sequence[str], folders: Sequence[str], storage_options: _StorageOptions | None = None
) -> None: ...
def cuda_devices(*, free_memory: bool = False) -> dict[str, Any]: ...
def measure_copy(device: int, *, size: int = 67108864, repeats: int = 20) -> tuple[float, float]: ...
def encode_on_device(
    source: _VectorSource,
    model: IvfPqModel,
    builder: PartitionArtifactBuilder,
    encoder: Any,
    devices: Sequence[int],
    *,
    batch_rows: int | None = None,
    device_memory_limit: int | None = None,
    progress: _Report | None = None,
) -> tuple[int, dict[str, int], list[dict[str, Any]]]: ...
def synchronize() -> None: ...
def owner_marks() -> str: ...
def owner_is_gone(marks: str) -> bool: ...
