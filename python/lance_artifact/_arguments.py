"""Arguments as users pass them, checked and made uniform before anything is done with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pyarrow as pa

from ._checked import whole
from ._lance_artifact import IvfPqModel, PartitionArtifactBuilder, _VectorSource
from ._model import as_fixed_size_list
from ._process import temporary_artifact
from .backends import Backend, TrainParams
from .exceptions import InvalidInputError

if TYPE_CHECKING:
    from lance.progress import IndexProgress

StorageOptions = dict[str, str] | Callable[[], dict[str, str] | None]
# What becomes of an index of a name: an error, replaced where it covers the same fragments, or never replaced.
Mode = Literal["create", "replace", "append"]
Progress = bool | Callable[["IndexProgress"], Any]

LOGGER = logging.getLogger("lance_artifact")

INDEX_TYPES = ("IVF_PQ", "IVF_HNSW_PQ")

# pylance's own numbers (rows of a partition, bounds on the number of partitions).
TARGET_PARTITION_SIZE = 8192
MAX_DEFAULT_PARTITIONS = 4096


def index_type_name(index_type: str) -> str:
    if not isinstance(index_type, str) or index_type.upper() not in INDEX_TYPES:
        raise InvalidInputError(f"index_type: got {index_type!r}, expected one of {INDEX_TYPES}")
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
        raise InvalidInputError(f"num_bits: got {num_bits}, expected 4 or 8")
    if num_sub_vectors < 1 or dimension % num_sub_vectors:
        raise InvalidInputError(
            f"dimension ({dimension}) must be divisible by num_sub_vectors ({num_sub_vectors})"
        )
    if num_bits == 4 and num_sub_vectors % 2:
        raise InvalidInputError(
            f"num_sub_vectors: got {num_sub_vectors}, expected an even number with num_bits=4"
        )


def check_training(params: TrainParams) -> None:
    for what, value, least in (
        ("num_partitions", params.num_partitions, 1),
        ("sample_rate", params.sample_rate, 2),
        ("max_iters", params.max_iters, 1),
        ("seed", params.seed, 0),
    ):
        if value < least:
            raise InvalidInputError(f"{what}: got {value}, expected at least {least}")


def bounded_sample(
    backend: Backend, params: TrainParams, wanted: int, there: int, most: int, dimension: int
) -> int:
    """Rows of the training sample: of ``wanted`` of the rows that are ``there``, ``most`` fit the memory of the call.

    Fewer than wanted are said; fewer than there are to be centroids, or codewords, are an error before anything is read.
    """
    where = "memory_limit"
    limit = getattr(backend, "sample_bytes", None)
    if limit is not None and (on_device := limit() // (dimension * 4)) < most:
        most, where = on_device, "the device's memory"
    if there <= most:
        return wanted
    codes = 2**params.num_bits
    needed = codes if params.ivf_centroids is not None else max(params.num_partitions, codes)
    if most < min(needed, there):
        raise InvalidInputError(
            f"training: a sample of {min(needed, there)} vectors, one for each centroid or codeword, does not fit {where}, which holds "
            f"{most}; lower num_partitions, raise memory_limit, or train elsewhere and pass ivf_centroids and pq_codebook"
        )
    LOGGER.warning("training on %d vectors instead of %d: more do not fit %s", most, there, where)
    return most


def check_hnsw(index_type: str, m: int, ef_construction: int) -> None:
    if index_type == "IVF_HNSW_PQ" and not (4 <= m <= 1024 and m <= ef_construction <= 65_536):
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


def default_partitions(rows: int, target: int | None, sample_rate: int) -> int:
    if target is not None and target < 1:
        raise InvalidInputError(f"target_partition_size: got {target}, expected at least 1")
    wanted = min(max(rows // (target or TARGET_PARTITION_SIZE), 1), MAX_DEFAULT_PARTITIONS)
    # As Lance does: no more centroids than there are vectors to train them.
    return max(1, min(wanted, rows // sample_rate)) if rows < wanted * sample_rate else wanted


def wanted_partitions(
    num_partitions: int | None, ivf_centroids: Any, rows: int, target: int | None, sample_rate: int
) -> int:
    """The partitions that a model will have, before it is trained; nonsense is refused by the training's own checks."""
    if ivf_centroids is not None:
        return max(1, len(fixed_size_list("ivf_centroids", ivf_centroids)))
    if num_partitions is not None:
        return max(1, num_partitions)
    return default_partitions(rows, target, max(1, sample_rate))


def fixed_size_list(what: str, value: Any) -> pa.FixedSizeListArray:
    if isinstance(value, pa.FixedShapeTensorArray):
        value = value.storage
    if isinstance(value, pa.FixedSizeListArray):
        return value
    try:
        return as_fixed_size_list(value)
    except InvalidInputError as error:
        raise InvalidInputError(f"{what}: {error}") from None


def given_model(ivf_centroids: Any, pq_codebook: Any, metric: str, num_sub_vectors: int | None) -> IvfPqModel:
    """The caller's own arrays as a model."""
    centroids = fixed_size_list("ivf_centroids", ivf_centroids)
    codebook = fixed_size_list("pq_codebook", pq_codebook)
    return IvfPqModel(centroids, codebook, metric, num_sub_vectors=num_sub_vectors)


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
    # Not to_pandas_dtype, which needs pandas in some releases of pyarrow.
    dtype = {"halffloat": "float16", "float": "float32", "double": "float64"}[str(sample.type.value_type)]
    if got != expected or model.dtype != dtype:
        raise InvalidInputError(
            f"backend {backend.name!r} trained (metric, num_partitions, num_sub_vectors, num_bits, dimension) = {got} in "
            f"{model.dtype}, expected {expected} in {dtype}"
        )
