"""Arguments as users pass them, checked and made uniform before anything is done with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pyarrow as pa

from ._checked import refuse_type, whole
from ._codebook_rate import one_rate
from ._lance_artifact import IvfPqModel, PartitionArtifactBuilder, _VectorSource
from ._log import LOGGER
from ._model import as_fixed_size_list
from ._process import temporary_artifact
from .backends import Backend, TrainParams
from .exceptions import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from lance.progress import IndexProgress

StorageOptions = dict[str, str] | Callable[[], dict[str, str] | None]
# What becomes of an index of a name: an error, replaced where it covers the same fragments, or never replaced.
Mode = Literal["create", "replace", "append"]
Progress = bool | Callable[["IndexProgress"], Any]

INDEX_TYPES = ("IVF_PQ", "IVF_HNSW_PQ")

# pylance's own numbers: rows of a partition, and the most partitions that are not asked for.
TARGET_PARTITION_SIZE = {"IVF_PQ": 8192, "IVF_HNSW_PQ": 1 << 20}
MAX_DEFAULT_PARTITIONS = 4096
# Of codes, where no codebook says it.
DEFAULT_BITS = 8


@dataclass(frozen=True)
class IndexParams:
    """What is asked of an index and its training, as the caller said it; None where it is left to us.

    ``m``, ``ef_construction`` and ``max_level`` are of IVF_HNSW_PQ.
    """

    index_type: str
    metric: str
    num_partitions: int | None
    num_sub_vectors: int | None
    num_bits: int | None
    sample_rate: int
    max_iters: int
    seed: int
    target_partition_size: int | None
    m: int
    ef_construction: int
    max_level: int
    skip_transpose: bool
    assign: str = "exact"

    def check(self) -> None:
        """What no column is needed for."""
        check_hnsw(self.index_type, self.m, self.ef_construction, self.max_level)

    def of_stock(self) -> dict[str, Any]:
        """Those that pylance's own create_index keeps of an index without rows."""
        names = [
            "metric",
            "num_partitions",
            "num_sub_vectors",
            "num_bits",
            "sample_rate",
            "max_iters",
            "target_partition_size",
        ]
        if self.index_type == "IVF_HNSW_PQ":
            names += ["m", "ef_construction", "max_level"]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**given, "sample_rate": one_rate(self.sample_rate)}

    def training(self, num_partitions: int, ivf_centroids: Any) -> TrainParams:
        """What a backend's ``train`` gets."""
        return TrainParams(
            self.metric,
            num_partitions,
            cast(int, self.num_sub_vectors),
            cast(int, self.num_bits),
            self.sample_rate,
            self.max_iters,
            self.seed,
            ivf_centroids,
        )


def index_type_name(index_type: str) -> str:
    if not isinstance(index_type, str):
        raise refuse_type("index_type", index_type, f"one of {INDEX_TYPES}")
    if index_type.upper() not in INDEX_TYPES:
        raise UnsupportedError(f"index_type: got {index_type!r}, expected one of {INDEX_TYPES}")
    return index_type.upper()


def index_mode(replace: bool, mode: str | None) -> Mode:
    """What becomes of an index of that name, of pylance's argument and of ours."""
    if mode is None:
        return "replace" if replace else "create"
    if mode not in ("create", "replace", "append"):
        raise InvalidInputError(f'mode: got {mode!r}, expected "create", "replace" or "append"')
    if replace and mode != "replace":
        raise InvalidInputError(f"mode: got {mode!r} beside replace=True; pass one of them")
    return cast(Mode, mode)


def metric_name(metric: str) -> str:
    names = {"l2": "l2", "euclidean": "l2", "cosine": "cosine", "dot": "dot"}
    if not isinstance(metric, str) or metric.lower() not in names:
        raise InvalidInputError(
            f"Metric {metric} not supported; expected 'l2' ('euclidean'), 'cosine' or 'dot'"
        )
    return names[metric.lower()]


def default_sub_vectors(dimension: int, num_bits: int = 8) -> tuple[int, str]:
    """LanceDB's number of sub-vectors, and how it comes. Of 4 bits it is even: LanceDB takes the next number, ours one that divides."""
    for part in (16, 8):
        if dimension % part == 0:
            made, why = dimension // part, f"dimension / {part}, as LanceDB has it"
            if num_bits != 4 or made % 2 == 0:
                return made, why
            even = next(m for m in range(made + 1, dimension + 1) if m % 2 == 0 and dimension % m == 0)
            return even, f"{why}, made even for 4 bits"
    raise InvalidInputError(
        f"num_sub_vectors: got None, and dimension {dimension} is no multiple of 8 or 16; expected a divisor of it"
    )


def one_progress(progress: Progress, progress_callback: Any) -> Progress:
    """Our argument for progress and pylance's are the same thing."""
    if progress_callback is None:
        return progress
    if progress is not False:
        raise InvalidInputError("progress and progress_callback: pass one of them")
    if not callable(progress_callback):
        raise refuse_type("progress_callback", progress_callback, "a callable")
    return cast(Progress, progress_callback)


def whole_number(what: str, value: Any) -> int | None:
    if value is None:
        return None
    return int(whole()(what, value))


def fragment_list(fragment_ids: Sequence[int] | None) -> list[int] | None:
    if fragment_ids is None:
        return None
    ids = [whole_number("fragment_ids", i) for i in fragment_ids]
    if not ids or any(i is None or i < 0 or i >= 2**32 for i in ids):
        raise InvalidInputError(
            f"fragment_ids: got {list(fragment_ids)}, expected at least one fragment id, or None for all"
        )
    return [i for i in ids if i is not None]


def check_sub_vectors(dimension: int, num_sub_vectors: int, num_bits: int) -> None:
    if num_bits not in (4, 8):
        raise UnsupportedError(f"num_bits: got {num_bits}, expected 4 or 8")
    if num_sub_vectors < 1 or dimension % num_sub_vectors:
        raise InvalidInputError(
            f"dimension ({dimension}) must be divisible by num_sub_vectors ({num_sub_vectors})"
        )
    if num_bits == 4 and num_sub_vectors % 2:
        raise UnsupportedError(
            f"num_sub_vectors: got {num_sub_vectors}, expected an even number with num_bits=4"
        )


def check_training(params: TrainParams) -> None:
    for what, value, least in (
        ("num_partitions", params.num_partitions, 1),
        ("sample_rate", params.sample_rate, 1),
        ("max_iters", params.max_iters, 1),
        ("seed", params.seed, 0),
    ):
        if value < least:
            raise InvalidInputError(f"{what}: got {value}, expected at least {least}")


def bounded_sample(params: TrainParams, wanted: int, there: int, most: int) -> int:
    """Rows of the training sample: of ``wanted`` of the rows that are ``there``, ``most`` fit the memory of the call.

    Fewer than wanted are said; fewer than there are to be centroids, or codewords, are an error before anything is read.
    """
    if there <= most:
        return wanted
    codes = 2**params.num_bits
    needed = codes if params.ivf_centroids is not None else max(params.num_partitions, codes)
    if most < min(needed, there):
        raise InvalidInputError(
            f"training: a sample of {min(needed, there)} vectors, one for each centroid or codeword, does not fit memory_limit, which "
            f"holds {most}; lower num_partitions, raise memory_limit, or train elsewhere and pass ivf_centroids and pq_codebook"
        )
    LOGGER.warning("training on %d vectors instead of %d: more do not fit memory_limit", most, there)
    return most


def check_hnsw(index_type: str, m: int, ef_construction: int, max_level: int = 7) -> None:
    if index_type != "IVF_HNSW_PQ":
        return
    if not 1 <= max_level <= 64:
        raise InvalidInputError(f"max_level: got {max_level}, expected 1 to 64")
    if not (4 <= m <= 1024 and m <= ef_construction <= 65_536):
        raise InvalidInputError(
            f"m and ef_construction: got {m} and {ef_construction}, expected m from 4 to 1024 and ef_construction from m to 65536"
        )


def check_target(
    source: _VectorSource,
    artifact_uri: str | Path | None,
    num_partitions: int,
    width: int,
    num_bits: int,
    memory_limit: int | None,
    options: Any,
) -> None:
    """What would fail after an hour of training fails before it: the writer's options, an artifact that is there, memory,
    files and threads that cannot be had."""
    if memory_limit is not None:
        _, _, writer = source.encode_shares(num_partitions, num_bits, memory_limit)
        needed = source.least_to_finalize(num_partitions, width, num_bits, writer)
        if memory_limit < needed:
            raise InvalidInputError(
                f"memory_limit: got {memory_limit} bytes, expected at least {needed}, which the index needs in the end"
            )
    with temporary_artifact() if artifact_uri is None else nullcontext(str(artifact_uri)) as uri:
        open_builder(
            source,
            uri,
            None,
            num_partitions,
            width,
            num_bits,
            memory_limit=memory_limit,
            storage_options=options,
        ).abort()


def open_builder(
    source: _VectorSource,
    uri: str | Path,
    model: IvfPqModel | None,
    num_partitions: int,
    width: int,
    num_bits: int,
    *,
    memory_limit: int | None,
    storage_options: Any,
    num_buckets: int | None = None,
    overwrite: bool = False,
    described: dict[str, Any] | None = None,
    sync: bool = True,
) -> PartitionArtifactBuilder:
    """A builder for all rows of ``source``, which gets its share of the call's memory."""
    limit, _, writer = source.encode_shares(num_partitions, num_bits, memory_limit)
    return PartitionArtifactBuilder._share(
        str(uri),
        model,
        num_partitions=num_partitions,
        pq_code_width=width,
        num_buckets=num_buckets,
        memory_limit=writer,
        held=limit - writer,
        overwrite=overwrite,
        storage_options=storage_options,
        source=described,
        sync=sync,
        expected_rows=source.count_rows(),
    )


def default_partitions(rows: int, target: int | None, index_type: str = "IVF_PQ") -> int:
    """As many as pylance has where none are asked for."""
    if target is not None and target < 1:
        raise InvalidInputError(f"target_partition_size: got {target}, expected at least 1")
    return min(max(rows // (target or TARGET_PARTITION_SIZE[index_type]), 1), MAX_DEFAULT_PARTITIONS)


def trainable_partitions(asked: int, rows: int, sample_rate: int) -> int:
    """As many of those asked for as pylance trains of a whole table: each centroid of ``sample_rate`` vectors, and a warning.

    It counts vectors, and this rows: nulls would have to be read.
    """
    if rows >= asked * sample_rate:
        return asked
    most = min(asked, min(max(rows // sample_rate, 1), MAX_DEFAULT_PARTITIONS))
    if most < asked:
        LOGGER.warning(
            "training %d of the %d partitions that were asked for: %d rows make no more with sample_rate=%d; lower it to have more",
            most,
            asked,
            rows,
            sample_rate,
        )
    return most


def wanted_partitions(
    num_partitions: int | None,
    ivf_centroids: Any,
    rows: int,
    target: int | None,
    sample_rate: int,
    index_type: str = "IVF_PQ",
    whole_table: bool = True,
) -> int:
    """The partitions that a model will have, before it is trained; nonsense is refused by the training's own checks."""
    if ivf_centroids is not None:
        return max(1, len(fixed_size_list("ivf_centroids", ivf_centroids)))
    if num_partitions is None:
        return default_partitions(rows, target, index_type)
    # Segments of one index are of fragments, and have to agree.
    return trainable_partitions(num_partitions, rows, sample_rate) if whole_table else num_partitions


def fixed_size_list(what: str, value: Any) -> pa.FixedSizeListArray:
    if isinstance(value, pa.FixedShapeTensorArray):
        value = value.storage
    if isinstance(value, pa.FixedSizeListArray):
        return value
    try:
        return as_fixed_size_list(value)
    except InvalidInputError as error:
        raise type(error)(f"{what}: {error}") from None


def given_centroids(ivf_centroids: Any, dtype: str) -> pa.FixedSizeListArray:
    """The caller's own centroids in the column's dtype, as pylance casts them."""
    centroids = fixed_size_list("ivf_centroids", ivf_centroids)
    if len(centroids) == 0:
        raise InvalidInputError("ivf_centroids: got none, expected at least one")
    return _cast(centroids, dtype)


def given_model(
    ivf_centroids: Any, pq_codebook: Any, metric: str, num_sub_vectors: int | None, dtype: str | None = None
) -> IvfPqModel:
    """The caller's own arrays as a model, in the column's dtype: a codebook only where it loses nothing by that."""
    centroids = fixed_size_list("ivf_centroids", ivf_centroids)
    codebook = fixed_size_list("pq_codebook", pq_codebook)
    if dtype is not None:
        centroids = _cast(centroids, dtype)
        cast_codebook = _cast(codebook, dtype)
        if not _cast(cast_codebook, _dtype(codebook)).flatten().equals(codebook.flatten()):
            raise InvalidInputError(
                f"pq_codebook: got values of {_dtype(codebook)} that {dtype}, the dtype of the column, cannot hold; cast it first"
            )
        codebook = cast_codebook
    return IvfPqModel(centroids, codebook, metric, num_sub_vectors=num_sub_vectors)


def check_asked(
    model: IvfPqModel, num_partitions: int | None, num_sub_vectors: int | None, num_bits: int | None
) -> None:
    """What is asked for beside a model of the caller's is what the model has; None asks for nothing."""
    if num_partitions not in (None, model.num_partitions):
        raise InvalidInputError(
            f"Ivf centroids has {model.num_partitions} clusters, but num_partitions={num_partitions}"
        )
    for what, got, has in (
        ("num_sub_vectors", num_sub_vectors, model.num_sub_vectors),
        ("num_bits", num_bits, model.num_bits),
    ):
        if got not in (None, has):
            raise InvalidInputError(f"{what}: got {got}, the codebook has {has}; leave it out, or pass {has}")


def _dtype(array: pa.FixedSizeListArray) -> str:
    # Not to_pandas_dtype, which needs pandas in some releases of pyarrow.
    return {"halffloat": "float16", "float": "float32", "double": "float64"}[str(array.type.value_type)]


def _cast(array: pa.FixedSizeListArray, dtype: str) -> pa.FixedSizeListArray:
    if _dtype(array) == dtype:
        return array
    # numpy rounds to the nearest, and pyarrow casts to float16 in no release that is supported.
    values = np.asarray(array.flatten().to_numpy(zero_copy_only=False)).astype(dtype)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), array.type.list_size)


def check_model(
    backend: Backend, model: IvfPqModel, params: TrainParams, sample: pa.FixedSizeListArray
) -> None:
    """A foreign backend's model must be what was asked for, before hours are spent on encoding with it."""
    got = (model.metric, model.num_partitions, model.num_sub_vectors, model.num_bits, model.dimension)
    expected = (
        params.metric,
        params.num_partitions,
        params.num_sub_vectors,
        params.num_bits,
        sample.type.list_size,
    )
    dtype = _dtype(sample)
    if got != expected or model.dtype != dtype:
        raise InvalidInputError(
            f"backend {backend.name!r} trained (metric, num_partitions, num_sub_vectors, num_bits, dimension) = {got} in "
            f"{model.dtype}, expected {expected} in {dtype}"
        )
