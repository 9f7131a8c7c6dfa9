"""The public functions: train, build_artifact, finalize, and create_index, which is all three."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from lance.dataset import Index

from . import _lance_artifact as core
from ._dataset import Handle, vector_column
from ._lance_artifact import Artifact, IvfPqModel, PartitionArtifactBuilder
from ._progress import Report, reporter
from .backends import Backend, TrainParams, resolve_backend
from .backends.cpu import CpuBackend
from .exceptions import (
    ArtifactMismatchError,
    CommitConflictError,
    IndexExistsError,
    InvalidInputError,
    LanceArtifactError,
)

if TYPE_CHECKING:
    import lance
    from lance.progress import IndexProgress

LOGGER = logging.getLogger("lance_artifact")

INDEX_TYPES = ("IVF_PQ", "IVF_HNSW_PQ")
Progress = bool | Callable[["IndexProgress"], Any]

# pylance's own numbers (rows of a partition, bounds on the number of partitions).
TARGET_PARTITION_SIZE = 8192
MAX_DEFAULT_PARTITIONS = 4096


def describe_source(
    dataset: lance.LanceDataset | str | Path, column: str, fragment_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """What `PartitionArtifactBuilder(source=)` takes: where rows come from, for the finalizer's checks.

    Parameters
    ----------
    dataset : lance.LanceDataset or path
        At the version the rows are read from.
    column : str
    fragment_ids : sequence of int, optional
        The fragments that are encoded; default all.
    """
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    described: dict[str, Any] = handle.vectors(path, _ids(fragment_ids)).describe()
    return described


def train(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    *,
    metric: str = "l2",
    num_partitions: int | None = None,
    num_sub_vectors: int | None = None,
    num_bits: int = 8,
    sample_rate: int = 256,
    max_iters: int = 50,
    seed: int = 0,
    ivf_centroids: Any = None,
    fragment_ids: Sequence[int] | None = None,
    target_partition_size: int | None = None,
    backend: str | Backend = "auto",
    progress: Progress = False,
) -> IvfPqModel:
    """Train centroids and codebook on a random sample of the column, drawn without loading the column.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
    column : str
        ``fixed_size_list<float16|float32|float64>``; nested as ``"a.b"``.
    metric : {"l2", "euclidean", "cosine", "dot"}, default "l2"
    num_partitions : int, optional
        Default as in pylance: rows / target_partition_size, between 1 and 4096.
    num_sub_vectors : int
        A divisor of the dimension.
    num_bits : {4, 8}, default 8
    sample_rate : int, default 256
        Training vectors per centroid and per codeword.
    max_iters : int, default 50
    seed : int, default 0
        The same seed, version and backend give the same model.
    ivf_centroids : array (num_partitions, dimension), optional
        Train only the codebook, for these centroids.
    fragment_ids : sequence of int, optional
        Train on these fragments only.
    target_partition_size : int, default 8192
        Rows of a partition where num_partitions is not given.
    backend : str or Backend, default "auto"
    progress : bool or callable, default False
        True: a tqdm bar on a terminal. A callable gets `lance.progress.IndexProgress`.

    Raises
    ------
    InvalidInputError, ColumnNotFoundError, ColumnTypeError
        A parameter does not fit, or there are too few usable vectors.
    BackendUnavailableError
        The backend that was named cannot run here.
    """
    handle = Handle.of(dataset)
    path, dimension = vector_column(handle, column)
    metric = _metric(metric)
    chosen = resolve_backend(backend)
    ids = _ids(fragment_ids)
    if num_sub_vectors is None:
        raise InvalidInputError(
            "num_sub_vectors: got None; num_partitions and num_sub_vectors are required for IVF_PQ"
        )
    _check_sub_vectors(dimension, num_sub_vectors, num_bits)
    given = None
    if ivf_centroids is not None:
        given = _fixed_size_list("ivf_centroids", ivf_centroids)
        if num_partitions not in (None, len(given)):
            raise InvalidInputError(
                f"Ivf centroids has {len(given)} clusters, but num_partitions={num_partitions}"
            )
        num_partitions = len(given)
    if num_partitions is None:
        num_partitions = _default_partitions(handle.count_rows(ids), target_partition_size, sample_rate)
    params = TrainParams(
        metric, num_partitions, num_sub_vectors, num_bits, sample_rate, max_iters, seed, given
    )
    _check_training(params)
    wanted = sample_rate * (max(num_partitions, 2**num_bits) if given is None else 2**num_bits)
    sample = handle.vectors(path, ids).sample(wanted, metric, seed)
    LOGGER.info("training on %d vectors with backend %s", len(sample), chosen.name)
    model = chosen.train(sample, params, progress=reporter(progress))
    _check_model(chosen, model, params, sample)
    return model


def build_artifact(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    model: IvfPqModel,
    artifact_uri: str | Path,
    *,
    backend: str | Backend = "auto",
    fragment_ids: Sequence[int] | None = None,
    memory_limit: int | None = None,
    num_buckets: int | None = None,
    overwrite: bool = False,
    storage_options: dict[str, str] | None = None,
    progress: Progress = False,
) -> Artifact:
    """Encode every usable vector of a column into a partition artifact.

    Dropped, and counted in ``artifact.manifest["rows"]``, are the rows that Lance's own build leaves out: null vectors,
    vectors with a null, NaN or infinite element, and for cosine those of zero norm.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
        Rows are read at its version.
    column : str
    model : IvfPqModel
        Of the column's dtype and dimension.
    artifact_uri : str or path
        Local path, or a URI of an object store.
    backend : str or Backend, default "auto"
    fragment_ids : sequence of int, optional
        Encode these fragments only: one worker's share.
    memory_limit : int, optional
        Bytes of the writer; default 1 GiB or a quarter of RAM.
    num_buckets : int, optional
        Files of the artifact.
    overwrite : bool, default False
    storage_options : dict, optional
        Of the artifact; the dataset's own are taken from its handle.
    progress : bool or callable, default False

    Raises
    ------
    ArtifactMismatchError
        The model does not fit the column.
    ArtifactExistsError
        There is an artifact and overwrite is False.
    StorageError
        Reading or writing failed; nothing is left behind.
    """
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    chosen = resolve_backend(backend)
    source = handle.vectors(path, _ids(fragment_ids))
    if (model.dtype, model.dimension) != (source.dtype, source.dimension):
        raise ArtifactMismatchError(
            f"the model is {model.dtype}[{model.dimension}], column {path!r} is {source.dtype}[{source.dimension}]"
        )
    LOGGER.info("encoding with backend %s", chosen.name)
    report = reporter(progress)
    builder = PartitionArtifactBuilder(
        str(artifact_uri),
        model,
        num_buckets=num_buckets,
        memory_limit=memory_limit,
        overwrite=overwrite,
        storage_options=storage_options,
        source=source.describe(),
    )
    try:
        if isinstance(chosen, CpuBackend):
            seen, dropped = source.encode_on_cpu(model, builder, report)
        else:
            seen, dropped = _encode(chosen, model, source, builder, report)
        return builder.finish(rows_seen=seen, rows_dropped=dropped)
    except BaseException:
        builder.abort()
        raise


def finalize(
    dataset: lance.LanceDataset | str | Path,
    column: str,
    artifacts: Artifact | str | Path | Iterable[Artifact | str | Path],
    *,
    model: IvfPqModel | None = None,
    name: str | None = None,
    replace: bool = False,
    index_type: str = "IVF_PQ",
    metric: str | None = None,
    fragment_ids: Sequence[int] | None = None,
    m: int = 20,
    ef_construction: int = 150,
    storage_options: dict[str, str] | None = None,
    progress: Progress = False,
    backend_name: str | None = None,
) -> lance.LanceDataset:
    """Make a Lance index of artifacts and commit it through the dataset's handle, which sees it afterwards.

    The index is built and committed at the version the rows were encoded from; Lance carries it over appends, deletes and
    updates since, and refuses after a compaction or an overwrite. A failure leaves no files behind and the previous index in
    place.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
    column : str
    artifacts : Artifact, path, URI, or several of them
        Encoded with one model from fragments that do not overlap.
    model : IvfPqModel, optional
        Needed where the artifacts hold none; must match otherwise.
    name : str, optional
        Default ``f"{column}_idx"``.
    replace : bool, default False
    index_type : {"IVF_PQ", "IVF_HNSW_PQ"}
    metric : str, optional
        Must match the model's.
    fragment_ids : sequence of int, optional
        The fragments the index covers. Artifacts that say which they were encoded from must say the same.
    m, ef_construction : int, default 20 and 150
        Of the HNSW graphs of IVF_HNSW_PQ.
    storage_options : dict, optional
        For artifacts given by URI.
    progress : bool or callable, default False
    backend_name : str, optional
        Recorded in the index details.

    Returns
    -------
    lance.LanceDataset
        The handle given (or one opened from the path), at the version that has the index.

    Raises
    ------
    ArtifactMismatchError
        Artifacts, model, column, dataset or fragments do not fit each other.
    CorruptArtifactError
        An artifact breaks a promise of its manifest.
    CommitConflictError
        The dataset moved on in a way that the index cannot follow, or its coverage would be smaller than intended.
    IndexExistsError
        There is an index of that name and replace is False.
    """
    handle = Handle.of(dataset)
    path, _ = vector_column(handle, column)
    index_type = _index_type(index_type)
    name = name or f"{path}_idx"
    _check_name(handle, name, replace, path)
    opened = _open(artifacts, storage_options)
    at = handle.at(_common_version(handle, opened))
    segment_uuid = str(uuid.uuid4())
    hints = {"lance_artifact.version": core.__version__}
    if backend_name:
        hints["lance_artifact.backend"] = backend_name
    segment = core.build_segment(
        at.uri,
        at.version,
        path,
        opened,
        segment_uuid,
        model=model,
        metric=None if metric is None else _metric(metric),
        index_type=index_type,
        m=m,
        ef_construction=ef_construction,
        fragment_ids=_ids(fragment_ids),
        storage_options=at.storage_options,
        hints=hints,
        progress=reporter(progress),
    )
    _commit(handle, at, name, path, replace, segment)
    return handle.dataset


def create_index(
    dataset: lance.LanceDataset | str | Path,
    column: str | list[str],
    index_type: str = "IVF_PQ",
    name: str | None = None,
    metric: str = "L2",
    replace: bool = False,
    num_partitions: int | None = None,
    ivf_centroids: Any = None,
    pq_codebook: Any = None,
    num_sub_vectors: int | None = None,
    *,
    num_bits: int = 8,
    sample_rate: int = 256,
    max_iters: int = 50,
    seed: int = 0,
    fragment_ids: Sequence[int] | None = None,
    target_partition_size: int | None = None,
    m: int = 20,
    ef_construction: int = 150,
    backend: str | Backend = "auto",
    artifact_uri: str | Path | None = None,
    keep_artifact: bool | None = None,
    memory_limit: int | None = None,
    storage_options: dict[str, str] | None = None,
    progress: Progress = False,
) -> lance.LanceDataset:
    """Train, encode and finalize: an IVF_PQ or IVF_HNSW_PQ index of a column, as pylance's create_index makes it.

    Parameters
    ----------
    dataset : lance.LanceDataset, LanceDB table, or path
    column, index_type, name, metric, replace, num_partitions, ivf_centroids, pq_codebook, num_sub_vectors
        As in pylance. ``num_partitions`` may be a whole float. A codebook needs centroids.
    num_bits, sample_rate, max_iters, seed, fragment_ids, target_partition_size
        As in `train`.
    m, ef_construction : int, default 20 and 150
        Of IVF_HNSW_PQ.
    backend : str or Backend, default "auto"
        "auto" takes a GPU if there is one, else the CPU.
    artifact_uri : str or path, optional
        Where the encoded rows are laid out (8 + 4 + pq_code_width bytes a row). Default: a folder in the system's temporary
        folder, removed at the end.
    keep_artifact : bool, optional
        Default: kept where artifact_uri is given. After a failed commit a given one is always kept, to finalize again.
    memory_limit : int, optional
        Bytes of the writer.
    storage_options : dict, optional
        Of the artifact.
    progress : bool or callable, default False

    Returns
    -------
    lance.LanceDataset
        The handle given, which sees the new index.

    Raises
    ------
    See `train`, `build_artifact` and `finalize`.
    """
    handle = Handle.of(dataset)
    path, dimension = vector_column(handle, column)
    index_type = _index_type(index_type)
    metric = _metric(metric)
    num_partitions = _whole("num_partitions", num_partitions)
    _check_name(handle, name or f"{path}_idx", replace, path)
    chosen = resolve_backend(backend)
    if keep_artifact and artifact_uri is None:
        raise InvalidInputError("keep_artifact: got True without artifact_uri; say where to keep it")
    _check_hnsw(index_type, m, ef_construction)
    if pq_codebook is not None:
        if ivf_centroids is None:
            raise InvalidInputError("ivf_centroids must be specified when pq_codebook is provided")
        model = given_model(ivf_centroids, pq_codebook, metric, num_sub_vectors)
        if num_partitions not in (None, model.num_partitions):
            raise InvalidInputError(
                f"Ivf centroids has {model.num_partitions} clusters, but num_partitions={num_partitions}"
            )
        _check_sub_vectors(dimension, model.num_sub_vectors, model.num_bits)
        if num_bits not in (8, model.num_bits):
            raise InvalidInputError(f"num_bits: got {num_bits}, the codebook has {model.num_bits}")
        _check_target(artifact_uri, model.num_partitions, model.pq_code_width, memory_limit, storage_options)
    else:
        if num_sub_vectors is not None:
            _check_sub_vectors(dimension, num_sub_vectors, num_bits)
            width = num_sub_vectors * num_bits // 8
            _check_target(artifact_uri, max(1, num_partitions or 1), width, memory_limit, storage_options)
        model = train(
            handle.dataset,
            path,
            metric=metric,
            num_partitions=num_partitions,
            num_sub_vectors=num_sub_vectors,
            num_bits=num_bits,
            sample_rate=sample_rate,
            max_iters=max_iters,
            seed=seed,
            ivf_centroids=ivf_centroids,
            fragment_ids=fragment_ids,
            target_partition_size=target_partition_size,
            backend=chosen,
            progress=progress,
        )
    temporary = None
    if artifact_uri is None:
        temporary = tempfile.mkdtemp(prefix="lance-artifact-")
        artifact_uri = f"{temporary}/artifact"
    try:
        artifact = build_artifact(
            handle.dataset,
            path,
            model,
            artifact_uri,
            backend=chosen,
            fragment_ids=fragment_ids,
            memory_limit=memory_limit,
            storage_options=storage_options,
            progress=progress,
        )
        done = finalize(
            handle.dataset,
            path,
            artifact,
            name=name,
            replace=replace,
            index_type=index_type,
            m=m,
            ef_construction=ef_construction,
            progress=progress,
            backend_name=chosen.name,
        )
        if temporary is None and keep_artifact is False:
            core.delete_artifact(str(artifact_uri), storage_options)
        return done
    finally:
        if temporary is not None:
            _remove(temporary)


def _remove(folder: str) -> None:
    """Remove a temporary folder; a Ctrl-C meanwhile is raised after."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def given_model(ivf_centroids: Any, pq_codebook: Any, metric: str, num_sub_vectors: int | None) -> IvfPqModel:
    """The caller's own arrays as a model."""
    centroids = _fixed_size_list("ivf_centroids", ivf_centroids)
    codebook = _fixed_size_list("pq_codebook", pq_codebook)
    return IvfPqModel(centroids, codebook, metric, num_sub_vectors=num_sub_vectors)


def _encode(
    backend: Backend,
    model: IvfPqModel,
    source: core._VectorSource,
    builder: PartitionArtifactBuilder,
    report: Report | None,
) -> tuple[int, dict[str, int]]:
    """The loop for encoders in Python: a batch is prepared and scanned ahead in the extension, encoded here."""
    encoder = backend.encoder(model)
    scan = source.scan(model.metric)
    total, seen = source.count_rows(), 0
    if report:
        report("start", "encode", 0, total, "rows")
    for batch in scan:
        if batch.num_rows == 0:
            continue
        part_id, pq_code = encoder.encode(batch.column(1))
        builder.append_batch(_encoded(backend, model, batch.column(0), part_id, pq_code))
        seen = builder.num_rows + sum(scan.dropped.values())
        if report:
            report("progress", "encode", seen, total, "rows")
    if seen != total:
        raise LanceArtifactError(f"the scan gave {seen} rows, the dataset has {total} in these fragments")
    if report:
        report("complete", "encode", total, total, "rows")
    return seen, scan.dropped


def _encoded(
    backend: Backend, model: IvfPqModel, row_ids: pa.Array, part_id: Any, pq_code: Any
) -> pa.RecordBatch:
    rows, width = len(row_ids), model.pq_code_width
    if isinstance(pq_code, (pa.Array, pa.ChunkedArray)):
        codes = pq_code.combine_chunks() if isinstance(pq_code, pa.ChunkedArray) else pq_code
    else:
        array = np.asarray(pq_code)
        if array.shape != (rows, width) or array.dtype != np.uint8:
            raise InvalidInputError(
                f"backend {backend.name!r}: pq_code is {array.dtype}{array.shape}, expected uint8({rows}, {width})"
            )
        codes = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), width)
    if not isinstance(part_id, pa.Array):
        ids = np.asarray(part_id)
        if ids.shape != (rows,) or ids.dtype != np.uint32:
            raise InvalidInputError(
                f"backend {backend.name!r}: part_id is {ids.dtype}{ids.shape}, expected uint32({rows},)"
            )
        part_id = pa.array(ids)
    if len(part_id) != rows or len(codes) != rows:
        raise InvalidInputError(
            f"backend {backend.name!r}: {len(part_id)} part_id and {len(codes)} pq_code for {rows} vectors"
        )
    return pa.RecordBatch.from_arrays([row_ids, part_id, codes], ["_rowid", "__ivf_part_id", "__pq_code"])


def _commit(handle: Handle, at: Handle, name: str, path: str, replace: bool, segment: dict[str, Any]) -> None:
    """Commit through the user's handle, then look at what came of it.

    Lance would commit a segment whose fragments were rewritten meanwhile, with less coverage or none and without a word. So
    the latest version is compared with the rows' version first, and is what the commit is based on: a rewrite after the
    comparison makes Lance refuse.
    """
    intended = set(segment["fragment_ids"])
    index = Index(
        uuid=segment["uuid"],
        name=name,
        fields=[segment["field_id"]],
        dataset_version=segment["dataset_version"],
        fragment_ids=cast(Any, intended),  # pylance turns a set into its bitmap
        index_version=segment["index_version"],
        index_details=(segment["details_type_url"], segment["details"]),
    )
    try:
        base = handle.dataset
        if at.version != base.latest_version or base.version != at.version:
            base = base.checkout_version(base.latest_version)
            _check_unchanged(at, base, segment, name)
            _check_name(Handle.of(base), name, replace, path)
        base.commit_existing_index_segments(name, path, [index])
    except BaseException as error:
        # An answer that got lost may hide a commit that happened: files of a committed index must stay.
        if not _is_committed(handle, segment["uuid"]):
            core.discard_segment(at.uri, at.version, segment["uuid"], storage_options=at.storage_options)
        if isinstance(error, (OSError, RuntimeError, ValueError)) and not isinstance(
            error, LanceArtifactError
        ):
            text = str(error).lower()
            if "conflict" in text or "incompatible" in text or "concurrent" in text:
                raise CommitConflictError(
                    f"index {name!r} was not committed: another change of the dataset came first; build again from the latest "
                    f"version. Lance says: {error}"
                ) from error
        raise
    if base is not handle.dataset:
        cast(Any, handle.dataset).checkout_latest()
    committed = _coverage(handle.dataset, segment["uuid"])
    if committed is None or not intended <= committed:
        lost = sorted(intended - (committed or set()))
        raise CommitConflictError(
            f"index {name!r} was committed, but does not cover fragments {lost}: they were rewritten since version "
            f"{at.version}; searches scan them without the index. Build again."
        )


def _column_files(dataset: lance.LanceDataset, field_id: int) -> dict[int, set[str]]:
    """For each fragment the data files that hold the column."""
    return {
        f.fragment_id: {file.path for file in f.metadata.files if field_id in file.fields}
        for f in dataset.get_fragments()
    }


def _check_unchanged(at: Handle, latest: lance.LanceDataset, segment: dict[str, Any], name: str) -> None:
    """The column's files of every fragment to be covered are still those that were read."""
    then, now = (_column_files(d, segment["field_id"]) for d in (at.dataset, latest))
    lost = sorted(i for i in segment["fragment_ids"] if now.get(i) != then.get(i))
    if lost:
        shown = f"{lost[:10]}" + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        raise CommitConflictError(
            f"index {name!r} was not committed: fragments {shown} of version {at.version}, from which the rows were encoded, were "
            f"rewritten by version {latest.version} (a compaction, an overwrite, or an update of the column in place); build "
            "again from the latest version"
        )


def _coverage(dataset: lance.LanceDataset, segment_uuid: str) -> set[int] | None:
    for index in dataset.describe_indices():
        for segment in index.segments:
            if str(segment.uuid) == segment_uuid:
                return set(segment.fragment_ids)
    return None


def _is_committed(handle: Handle, segment_uuid: str) -> bool:
    with suppress(Exception):
        latest = handle.dataset.checkout_version(handle.dataset.latest_version)
        return _coverage(latest, segment_uuid) is not None
    return True  # not known: keep the files


def _open(artifacts: Any, storage_options: dict[str, str] | None) -> list[Artifact]:
    several = [artifacts] if isinstance(artifacts, (Artifact, str, Path)) else list(artifacts)
    if not several:
        raise InvalidInputError("artifacts: got none, expected at least one Artifact, path or URI")
    opened = [a if isinstance(a, Artifact) else Artifact.open(str(a), storage_options) for a in several]
    seen: set[str] = set()
    for artifact in opened:
        if artifact.uri in seen:
            raise InvalidInputError(f"artifacts: {artifact.uri} is given twice")
        seen.add(artifact.uri)
    return opened


def _common_version(handle: Handle, artifacts: list[Artifact]) -> int:
    versions = {a.manifest["source"]["version"]: a.uri for a in artifacts if "source" in a.manifest}
    if len(versions) > 1:
        raise ArtifactMismatchError(
            f"the artifacts were encoded from different versions of the dataset: {versions}; encode all shards at one version"
        )
    return next(iter(versions), handle.version)


def _check_hnsw(index_type: str, m: int, ef_construction: int) -> None:
    if index_type == "IVF_HNSW_PQ" and not (4 <= m <= 1024 and m <= ef_construction <= 65_536):
        raise InvalidInputError(
            f"m and ef_construction: got {m} and {ef_construction}, expected m from 4 to 1024 and ef_construction from m to 65536"
        )


def _check_target(
    artifact_uri: str | Path | None,
    num_partitions: int,
    width: int,
    memory_limit: int | None,
    options: dict[str, str] | None,
) -> None:
    """What would fail after an hour of training fails before it: the writer's options, and an artifact that is there."""
    with tempfile.TemporaryDirectory(prefix="lance-artifact-") as folder:
        PartitionArtifactBuilder(
            str(artifact_uri) if artifact_uri is not None else f"{folder}/artifact",
            num_partitions=num_partitions,
            pq_code_width=width,
            memory_limit=memory_limit,
            storage_options=options,
        ).abort()


def _check_name(handle: Handle, name: str, replace: bool, path: str) -> None:
    same = [index for index in handle.dataset.describe_indices() if index.name == name]
    for index in same:
        if list(index.field_names) != [path]:
            raise InvalidInputError(
                f"name: index {name!r} is on {list(index.field_names)}, not on {path!r}; choose another name"
            )
    if same and not replace:
        raise IndexExistsError(
            f"Index name '{name}' already exists, please specify a different name or use replace=True"
        )


def _index_type(index_type: str) -> str:
    if not isinstance(index_type, str) or index_type.upper() not in INDEX_TYPES:
        raise InvalidInputError(f"index_type: got {index_type!r}, expected one of {INDEX_TYPES}")
    return index_type.upper()


def _metric(metric: str) -> str:
    names = {"l2": "l2", "euclidean": "l2", "cosine": "cosine", "dot": "dot"}
    if not isinstance(metric, str) or metric.lower() not in names:
        raise InvalidInputError(
            f"Metric {metric} not supported; expected 'l2' ('euclidean'), 'cosine' or 'dot'"
        )
    return names[metric.lower()]


def _whole(what: str, value: Any) -> int | None:
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.integer))
        or not float(value).is_integer()
    ):
        raise InvalidInputError(f"{what}: got {value!r}, expected a whole number")
    return int(value)


def _ids(fragment_ids: Sequence[int] | None) -> list[int] | None:
    if fragment_ids is None:
        return None
    ids = [_whole("fragment_ids", i) for i in fragment_ids]
    if not ids or any(i is None or i < 0 or i >= 2**32 for i in ids):
        raise InvalidInputError(
            f"fragment_ids: got {list(fragment_ids)}, expected at least one fragment id, or None for all"
        )
    return [i for i in ids if i is not None]


def _check_sub_vectors(dimension: int, num_sub_vectors: int, num_bits: int) -> None:
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


def _check_training(params: TrainParams) -> None:
    for what, value, least in (
        ("num_partitions", params.num_partitions, 1),
        ("sample_rate", params.sample_rate, 2),
        ("max_iters", params.max_iters, 1),
        ("seed", params.seed, 0),
    ):
        if value < least:
            raise InvalidInputError(f"{what}: got {value}, expected at least {least}")


def _default_partitions(rows: int, target: int | None, sample_rate: int) -> int:
    if target is not None and target < 1:
        raise InvalidInputError(f"target_partition_size: got {target}, expected at least 1")
    wanted = min(max(rows // (target or TARGET_PARTITION_SIZE), 1), MAX_DEFAULT_PARTITIONS)
    # As Lance does: no more centroids than there are vectors to train them.
    return max(1, min(wanted, rows // sample_rate)) if rows < wanted * sample_rate else wanted


def _fixed_size_list(what: str, value: Any) -> pa.FixedSizeListArray:
    from ._model import as_fixed_size_list

    if isinstance(value, pa.FixedShapeTensorArray):
        value = value.storage
    if isinstance(value, pa.FixedSizeListArray):
        return value
    try:
        return as_fixed_size_list(value)
    except InvalidInputError as error:
        raise InvalidInputError(f"{what}: {error}") from None


def _check_model(
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
    dtype = str(np.dtype(sample.type.value_type.to_pandas_dtype()))
    if got != expected or model.dtype != dtype:
        raise InvalidInputError(
            f"backend {backend.name!r} trained (metric, num_partitions, num_sub_vectors, num_bits, dimension) = {got} in "
            f"{model.dtype}, expected {expected} in {dtype}"
        )
